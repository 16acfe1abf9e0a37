"""How a working set is refined by what later thaws asked for."""

from __future__ import annotations

import struct
from pathlib import Path

from woodfrog.backends.memory import Memory
from woodfrog.linux.pageserver import is_guess, make_set, merge_sets, set_pages, set_ranges

MAGIC = int.from_bytes(b"FROGSET1", "little")


def record(*ranges: tuple[int, int]) -> bytes:
    """(first page, pages)…"""
    data = struct.pack("=QII", MAGIC, len(ranges), 0)
    return merge_sets(data + b"".join(struct.pack("=iIQ", 100, n, at << 12) for at, n in ranges))


def known(folder: Path) -> list[tuple[int, int]]:
    return [(address >> 12, pages) for _, pages, address in set_ranges((folder / "working-set").read_bytes())]


async def test_what_is_missed_twice_in_a_row_joins(tmp_path: Path) -> None:
    await Memory.keep(record((0, 100)), tmp_path, "i")
    assert known(tmp_path) == [(0, 100)]
    await Memory.keep(record((200, 20), (500, 10)), tmp_path, "i")
    assert known(tmp_path) == [(0, 100)], "one request's alone"
    await Memory.keep(record((210, 20), (900, 10)), tmp_path, "i")
    assert known(tmp_path) == [(0, 100), (210, 10)]


async def test_requests_that_have_nothing_in_common_do_not_fill_it(tmp_path: Path) -> None:
    for i in range(50):
        await Memory.keep(record((i * 1000, 100)), tmp_path, "i")
    assert known(tmp_path) == [(0, 100)]


async def test_a_few_pages_are_not_worth_a_write(tmp_path: Path) -> None:
    await Memory.keep(record((0, 1000)), tmp_path, "i")
    for _ in range(2):
        await Memory.keep(record((5000, 5)), tmp_path, "i")
    assert set_pages((tmp_path / "working-set").read_bytes()) == 1000
    await Memory.keep(b"not a set", tmp_path, "i")
    await Memory.keep(b"", tmp_path, "i")
    await Memory.keep(record((0, 1)), tmp_path / "gone", "i")
    assert not (tmp_path / "gone").exists()


async def test_what_is_known_beforehand_is_learned_on_from(tmp_path: Path) -> None:
    """A guess is not a working set that the first thaw missed pages of."""
    (tmp_path / "working-set").write_bytes(make_set([(100, 50 << 12, 90 << 12)]))
    assert is_guess((tmp_path / "working-set").read_bytes()) and known(tmp_path) == [(50, 40)]
    await Memory.keep(record((0, 10), (85, 10)), tmp_path, "i")
    assert known(tmp_path) == [(0, 10), (50, 45)] and not is_guess((tmp_path / "working-set").read_bytes())
    await Memory.keep(record((200, 20)), tmp_path, "i")
    assert known(tmp_path) == [(0, 10), (50, 45)], "learned: one request's alone"
