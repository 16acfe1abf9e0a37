"""How many descriptors the daemon may have open, and how many the processes that are not its own."""

from __future__ import annotations

import contextlib
import resource

__all__ = ["raise_limit", "usual"]

_WANTED = 65536
"""More than the daemon needs, and few enough for children that close every number up to their limit."""
_usual: dict[int, tuple[int, int]] = {}


def raise_limit() -> None:
    """Let this process have as many descriptors open as it may: the usual 1024 are soon used up by logs, pipes and
    sandboxes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _WANTED if hard == resource.RLIM_INFINITY else min(hard, _WANTED)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        _usual[resource.RLIMIT_NOFILE] = (soft, hard)


def usual() -> dict[int, tuple[int, int]]:
    """The limit as it was, for users' programs: `select()` takes no descriptor above 1023."""
    return dict(_usual)
