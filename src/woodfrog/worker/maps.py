"""Fewer memory maps in a process that is about to be frozen: a restore pays for each one of them.

A linker gives a library's constants a map of their own before and behind its code, so that they are not executable.
Once these have the code's protection, the kernel keeps the three as one map: a numpy process has 590 maps before and
357 after, and CRIU restores it with an eighth less work. What can be written, or was, is left alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Map", "constants", "join_code", "parse"]

_READ, _EXEC = 1, 4


@dataclass(frozen=True, slots=True)
class Map:
    """One map. `written`: some page of it is the process's own by now."""

    start: int
    end: int
    mode: str
    offset: int
    file: tuple[str, str]
    """Device and inode."""
    written: bool


def parse(lines: Iterable[bytes]) -> list[Map]:
    """The maps in a text of /proc/PID/smaps."""
    found: list[Map] = []
    head: list[bytes] = []
    for line in lines:
        words = line.split(None, 5)
        if line.startswith(b"Anonymous:") and head:
            start, end = (int(x, 16) for x in head[0].split(b"-"))
            file = (head[3].decode(), head[4].decode())
            found.append(Map(start, end, head[1].decode(), int(head[2], 16), file, words[1] != b"0"))
        elif not words[0].endswith(b":"):
            head = words
    return found


def constants(maps: list[Map]) -> list[Map]:
    """The maps that continue a neighbour with code, of the same file, and differ from it in nothing but being code."""

    def joins(a: Map, b: Map) -> bool:
        return a.end == b.start and a.file == b.file != ("00:00", "0") and a.offset + a.end - a.start == b.offset

    found = []
    for left, middle, right in zip([None, *maps], maps, [*maps[1:], None], strict=False):
        if middle.mode != "r--p" or middle.written:
            continue
        if any(
            code is not None and code.mode == "r-xp" and not code.written and joins(*pair)
            for code, pair in ((left, (left, middle)), (right, (middle, right)))
        ):
            found.append(middle)
    return found


def join_code() -> int:
    """Join this process's code with the constants around it; how many maps that spared."""
    import ctypes

    try:
        with open("/proc/self/smaps", "rb") as smaps:
            found = constants(parse(smaps))
    except (OSError, ValueError, IndexError):
        return 0  # a restore that takes a little longer
    mprotect = ctypes.CDLL(None).mprotect
    mprotect.argtypes, mprotect.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return sum(mprotect(m.start, m.end - m.start, _READ | _EXEC) == 0 for m in found)
