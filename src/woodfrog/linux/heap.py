"""The allocator of a process that lives long and now and then needs much.

glibc gives each of several threads an arena of its own, and what one of them leaves free no other one takes: packing a
snapshot, now on this thread and now on that, would leave tens of megabytes of holes in each.
"""

from __future__ import annotations

import ctypes

__all__ = ["confine", "trim"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # malloc.h
_ARENAS = 2
_LARGE = 512 << 10
"""Above what is read from a socket or a file at once: a mapping for each piece costs as much as copying it, twice."""
_KEPT = 4 << 20
_libc = ctypes.CDLL(None)


def confine() -> None:
    """Have all threads share two arenas, and large blocks mappings of their own, which leave no holes.

    To be called before there are threads. Without glibc it does nothing.
    """
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(_ARENA_MAX, _ARENAS)
        _libc.mallopt(_MMAP_THRESHOLD, _LARGE)  # glibc would raise it with each large block that is freed
        _libc.mallopt(_TRIM_THRESHOLD, _KEPT)


def trim() -> None:
    """Give the kernel what the allocator holds for nobody."""
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)
