"""Which memory maps a worker joins before it is frozen."""

from __future__ import annotations

import subprocess
import sys

import pytest

from woodfrog.worker.maps import Map, constants, owned, parse


def found(*maps: str) -> list[Map]:
    """What is found in "start-end mode offset inode [written]"."""
    lines, written = [], set()
    for text in maps:
        span, mode, offset, inode, *own = text.split()
        lines.append(f"{span} {mode} {offset} 08:01 {inode}  /usr/lib/lib one.so\n".encode())
        written |= {int(span.split("-")[0], 16)} if own else set()
    return constants(parse(lines), lambda m: m.start in written)


def test_constants_beside_code_of_the_same_file_are_found() -> None:
    library = (
        "1000-2000 r--p 00000000 7",
        "2000-5000 r-xp 00001000 7",
        "5000-6000 r--p 00004000 7",
        "6000-7000 r--p 00005000 7 own",  # relocated: the process's own
        "7000-8000 rw-p 00006000 7 own",
    )
    assert [m.start for m in found(*library)] == [0x1000, 0x5000]


def test_what_the_kernel_could_not_join_is_left_alone() -> None:
    code = "2000-5000 r-xp 00001000 7"
    for other in (
        "5000-6000 r--p 00004000 8",  # another file
        "6000-7000 r--p 00004000 7",  # a gap
        "5000-6000 r--p 00009000 7",  # another part of the file
        "5000-6000 r--p 00004000 7 own",  # written to
        "5000-6000 rw-p 00004000 7",
        "5000-6000 ---p 00004000 7",
        "5000-6000 r--s 00004000 7",
    ):
        assert found(code, other) == []
    assert found("1000-2000 r--p 00000000 7") == []
    assert found("2000-5000 r-xp 00001000 7 own", "5000-6000 r--p 00004000 7") == []


@pytest.mark.parametrize(
    ("bits", "own"),
    [((), False), ((63, 61), False), ((63,), True), ((62,), True), ((61,), False), ((63, 61, 56), False)],
)
def test_a_page_that_was_written_to_is_known(bits: tuple[int, ...], own: bool) -> None:
    of_file = (1 << 63 | 1 << 61 | 1234).to_bytes(8, "little")
    assert owned(of_file * 9 + sum(1 << b for b in bits).to_bytes(8, "little") + bytes(80)) == own


def test_a_process_has_fewer_maps_and_runs_on() -> None:
    program = """
import decimal, json, sqlite3, sys
from woodfrog.worker.maps import join_code
count = lambda: len(open("/proc/self/maps").readlines())
before = count()
spared = join_code()
print(before - count(), spared, join_code(), json.dumps(str(decimal.Decimal(2).sqrt())))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    gone, spared, again, root = done.stdout.split()
    assert int(gone) > 4 and int(spared) >= int(gone) and int(again) <= int(spared) - int(gone)
    assert root.startswith('"1.414')
