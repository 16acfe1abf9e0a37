"""Which memory maps a worker joins before it is frozen."""

from __future__ import annotations

import subprocess
import sys

from woodfrog.worker.maps import constants, parse


def smaps(*maps: str) -> list[bytes]:
    """Text of /proc/PID/smaps, from "start-end mode offset inode [anonymous kB]"."""
    lines = []
    for text in maps:
        span, mode, offset, inode, *dirty = text.split()
        lines += [
            f"{span} {mode} {offset} 08:01 {inode}  /usr/lib/lib one.so".encode(),
            b"Rss:                   4 kB",
            f"Anonymous:             {dirty[0] if dirty else 0} kB".encode(),
            b"VmFlags: rd mr mw me ",
        ]
    return lines


def test_constants_beside_code_of_the_same_file_are_found() -> None:
    library = (
        "1000-2000 r--p 00000000 7",
        "2000-5000 r-xp 00001000 7",
        "5000-6000 r--p 00004000 7",
        "6000-7000 r--p 00005000 7 4",  # relocated: the process's own
        "7000-8000 rw-p 00006000 7 4",
    )
    assert [m.start for m in constants(parse(smaps(*library)))] == [0x1000, 0x5000]


def test_what_the_kernel_could_not_join_is_left_alone() -> None:
    code = "2000-5000 r-xp 00001000 7"
    for other in (
        "5000-6000 r--p 00004000 8",  # another file
        "6000-7000 r--p 00004000 7",  # a gap
        "5000-6000 r--p 00009000 7",  # another part of the file
        "5000-6000 r--p 00004000 7 4",  # written to
        "5000-6000 rw-p 00004000 7",
        "5000-6000 ---p 00004000 7",
        "5000-6000 r--s 00004000 7",
    ):
        assert constants(parse(smaps(code, other))) == []
    assert constants(parse(smaps("1000-2000 r--p 00000000 7"))) == []
    assert constants(parse(smaps("2000-5000 r-xp 00001000 7 4", "5000-6000 r--p 00004000 7"))) == []


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
    assert int(gone) > 10 and int(spared) >= int(gone) and int(again) <= int(spared) - int(gone)
    assert root.startswith('"1.414')
