from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from woodfrog.criu.pagemap import PageTask, build_index, parse_pagemap, read_index, write_index

MAGICS = struct.pack("<II", 0x54564319, 0x56084025)
PARENT, LAZY, PRESENT = 1, 2, 4


def varint(n: int) -> bytes:
    out = bytearray()
    while n > 0x7F:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    return bytes(out) + bytes([n])


def message(**fields: int) -> bytes:
    body = b"".join(varint(int(k[1:]) << 3) + varint(v) for k, v in fields.items())
    return struct.pack("<I", len(body)) + body


def pagemap(*entries: tuple[int, int, int], old: bool = False, pages_file: int = 3) -> bytes:
    """(address, pages, flags) each; `old` writes the count where older versions of CRIU do."""
    count = "f2" if old else "f5"
    extra = {} if old else {"f2": 0}
    return MAGICS + message(f1=pages_file) + b"".join(message(f1=a, f4=f, **extra, **{count: n}) for a, n, f in entries)


@pytest.mark.parametrize("old", [False, True])
def test_offsets_count_what_is_present_lazy_or_not(old: bool) -> None:
    data = pagemap(
        (0x1000, 2, PRESENT | LAZY), (0x9000, 3, PRESENT), (0x20000, 9, 0), (0x40000, 1, PRESENT | LAZY), old=old
    )
    assert parse_pagemap(data) == (3, ((0x1000, 2, 0), (0x40000, 1, 5 * 4096)))


def test_what_cannot_be_served_is_refused() -> None:
    good = pagemap((0x1000, 2, PRESENT | LAZY))
    for bad in (
        b"\0" * 16,
        MAGICS,
        good[:-1],
        pagemap((0x1000, 2, PARENT | LAZY)),
    ):
        with pytest.raises(ValueError):
            parse_pagemap(bad)


@given(st.binary(max_size=200))
def test_damaged_page_maps_never_surprise(data: bytes) -> None:
    """Only what the engine takes as "no index"."""
    for text in (data, MAGICS + data, pagemap((0x1000, 2, PRESENT | LAZY)) + data):
        with contextlib.suppress(ValueError, KeyError, IndexError, struct.error):
            parse_pagemap(text)


@given(
    st.lists(
        st.tuples(
            st.integers(1, 2**31 - 1),
            st.integers(0, 2**32 - 1),
            st.lists(st.tuples(*[st.integers(0, 2**40)] * 3), max_size=4),
        ),
        max_size=5,
    )
)
def test_an_index_tells_its_tasks_and_files(tasks: list[tuple[int, int, list[tuple[int, int, int]]]]) -> None:
    index = write_index([PageTask(pid, file, tuple(extents)) for pid, file, extents in tasks])
    assert read_index(index) == [(pid, file) for pid, file, _ in tasks]


@pytest.mark.parametrize("data", [b"", b"FROGIDX1", b"x" * 64, struct.pack("=QII", 0, 1, 0) + b"\0" * 12])
def test_other_files_are_no_index(data: bytes) -> None:
    with pytest.raises(ValueError):
        read_index(data)


def test_the_page_maps_of_a_dump(tmp_path: Path) -> None:
    (tmp_path / "pagemap-100.img").write_bytes(pagemap((0x1000, 1, PRESENT | LAZY), pages_file=1))
    (tmp_path / "pagemap-101.img").write_bytes(pagemap((0x5000, 4, PRESENT), pages_file=2))
    (tmp_path / "pagemap-shmem-9.img").write_bytes(pagemap((0, 1, PRESENT), pages_file=4))
    assert build_index(tmp_path) == [PageTask(100, 1, ((0x1000, 1, 0),)), PageTask(101, 2, ())]
