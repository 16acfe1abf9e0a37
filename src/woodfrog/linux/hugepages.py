"""Huge pages for thawed processes.

Memory that lay in huge pages when its process was frozen comes back in pages of 4 KiB, whoever gives it back: CRIU and
userfaultfd know no others. Programs that read here and there in a lot of memory are then up to twice as slow as before,
since the processor has to look each page up; and the kernel's own daemon for it takes a quarter of an hour for a
gigabyte. So the kernel is asked to put them together again (`MADV_COLLAPSE`, Linux 6.1), a block at a time.
"""

from __future__ import annotations

import array
import ctypes
import errno
import os
import struct
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Collapsed", "available", "block_bytes", "collapse", "huge_ranges", "parse_huge"]

_SYSTEM = Path("/sys/kernel/mm/transparent_hugepage")
_PROCESS_MADVISE = 440
_MADV_COLLAPSE = 25
_PAGE = os.sysconf("SC_PAGE_SIZE")
_OWN = 1 << 63 | 1 << 56
"""Of an entry of /proc/PID/pagemap: it is there, and no other process has it."""
_FULL = 7 / 8
"""A block of which less is there, and the process's alone, stays as it is: the rest would be made of nothing or copied
from what it shares with a child, and counted against its limit."""
_LARGEST = 32 << 20
"""Larger blocks (kernels with pages of 64 KiB) are hardly ever full."""
_TRIES = 8
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Collapsed:
    """What became of it.

    Args:
        blocks: how many were put together, or were already.
        error: what ended it early (an errno); 0 = nothing.
    """

    blocks: int
    error: int = 0


def block_bytes() -> int:
    """How large a huge page is; 0 = this kernel has none."""
    try:
        size = int((_SYSTEM / "hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return 0
    return size if size <= _LARGEST else 0


def available() -> bool:
    """Whether processes of this machine get huge pages at all: by themselves, or where they ask."""
    try:
        return bool(block_bytes()) and "[never]" not in (_SYSTEM / "enabled").read_text()
    except OSError:
        return False


def parse_huge(smaps: bytes) -> tuple[tuple[int, int], ...]:
    """(begin, end) of the mappings that have memory in huge pages, as /proc/pid/smaps tells."""
    found: list[tuple[int, int]] = []
    at = smaps.find(b"\nAnonHugePages:")
    while at >= 0:
        end = smaps.index(b"\n", at + 1)
        if smaps[at:end].split()[1] != b"0":
            # Back to the mapping's head: the last line before that begins with an address.
            head = smaps.rindex(b"\nSize:", 0, at)
            begin = smaps.rfind(b"\n", 0, head) + 1
            first, _, last = smaps[begin:head].split(b" ", 1)[0].partition(b"-")
            found.append((int(first, 16), int(last, 16)))
        at = smaps.find(b"\nAnonHugePages:", end)
    return tuple(found)


def huge_ranges(pid: int) -> tuple[tuple[int, int], ...]:
    """(begin, end) of the mappings of a process that have memory in huge pages; empty also when it is gone."""
    with suppress(OSError):
        total = Path(f"/proc/{pid}/smaps_rollup").read_bytes()  # a quarter of what all of them take
        if any(line.startswith(b"AnonHugePages:") and line.split()[1] != b"0" for line in total.splitlines()):
            return parse_huge(Path(f"/proc/{pid}/smaps").read_bytes())
    return ()


def _full(pagemap: int, block: int, size: int) -> bool:
    entries = array.array("Q", os.pread(pagemap, size // _PAGE * 8, block // _PAGE * 8))
    return sum(1 for e in entries if e & _OWN == _OWN) >= size // _PAGE * _FULL


def _collapse(pidfd: int, block: int, size: int) -> int:
    """The errno, or 0."""
    part = struct.pack("PN", block, size)
    done = _libc.syscall(
        _PROCESS_MADVISE, pidfd, part, ctypes.c_size_t(1), ctypes.c_int(_MADV_COLLAPSE), ctypes.c_uint(0)
    )
    return 0 if done >= 0 else ctypes.get_errno()


def collapse(pid: int, ranges: Iterable[tuple[int, int]], *, wanted: Callable[[], bool] = lambda: True) -> Collapsed:
    """Put the memory of a running process into huge pages again, wherever it is there. In a thread: half of the time it
    sleeps, so that the process, which waits while a block is moved, has the other half.

    Args:
        ranges: (begin, end) as `huge_ranges` gave them.
        wanted: asked before each block; False ends it.
    """
    size = block_bytes()
    if not size:
        return Collapsed(0, errno.ENOSYS)
    done = failures = 0
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as e:
        return Collapsed(0, e.errno or errno.ESRCH)
    try:
        pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            for begin, end in ranges:
                for block in range(-(-begin // size) * size, end - size + 1, size):
                    if not wanted():
                        return Collapsed(done)
                    if not _full(pagemap, block, size):
                        continue
                    start = time.monotonic()
                    error = _collapse(pidfd, block, size)
                    if not error:
                        done, failures = done + 1, 0
                    elif error == errno.EINVAL:
                        break  # something else lies there by now, or this kernel cannot
                    elif error in (errno.EPERM, errno.ENOSYS, errno.ESRCH):
                        return Collapsed(done, error)
                    else:  # no such page free, or something holds one of the block's
                        failures += 1
                        if failures >= _TRIES:
                            return Collapsed(done, error)
                    time.sleep(time.monotonic() - start)
        finally:
            os.close(pagemap)
    except OSError as e:
        return Collapsed(done, e.errno or errno.EIO)
    finally:
        os.close(pidfd)
    return Collapsed(done)
