"""How many descriptors the daemon may have open, and how many the processes that are not its own."""

from __future__ import annotations

import contextlib
import resource

__all__ = ["raise_limit", "usual"]

_WANTED = 65536
"""More than the daemon needs, and few enough for children that close every number up to their limit."""
_USUAL = 1024
_usual: dict[int, tuple[int, int]] = {}


def raise_limit() -> None:
    """Let this process have as many descriptors open as it may: the usual 1024 are soon used up by logs, pipes and
    sandboxes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY != hard < _WANTED:
        with contextlib.suppress(OSError, ValueError):  # it takes CAP_SYS_RESOURCE
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, _WANTED))
            hard = _WANTED
    wanted = _WANTED if hard == resource.RLIM_INFINITY else min(hard, _WANTED)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        _usual[resource.RLIMIT_NOFILE] = (min(max(soft, _USUAL), wanted), hard)


def usual() -> dict[int, tuple[int, int]]:
    """The limit as it was, for users' programs: `select()` takes no descriptor above 1023."""
    return dict(_usual)
