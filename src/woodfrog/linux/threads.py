"""How threads were told to run, as far as CRIU leaves it out: on which processors, I/O priority, timer slack.

Nice values, real-time priorities and policies are CRIU's. Each is read and set from outside, by root.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

__all__ = ["ThreadSettings", "apply", "own_settings", "tids"]

_IOPRIO_SET, _IOPRIO_GET = {"x86_64": (251, 252), "aarch64": (30, 31)}.get(platform.machine(), (0, 0))
_ONE_THREAD = 1
_libc = ctypes.CDLL(None, use_errno=True)


class ThreadSettings(NamedTuple):
    """What a thread has of its own.

    Args:
        tid: inside the sandbox.
        cpus: the processors it may run on; empty: those that all have.
        ioprio: class and priority as the kernel has them; 0 = by its nice value.
        slack_ns: how late its timers may be; 0 = as usual.
    """

    tid: int
    cpus: tuple[int, ...] = ()
    ioprio: int = 0
    slack_ns: int = 0


def tids(pid: int) -> Iterator[tuple[int, int]]:
    """(tid, tid inside) of a process's threads."""
    for name in os.listdir(f"/proc/{pid}/task"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            for line in Path(f"/proc/{pid}/task/{name}/status").read_text(errors="replace").splitlines():
                if line.startswith("NSpid:"):
                    yield int(name), int(line.split()[-1])
                    break


def _cpus(tid: int) -> tuple[int, ...]:
    return tuple(sorted(os.sched_getaffinity(tid)))


def _ioprio(tid: int) -> int:
    return max(int(_libc.syscall(_IOPRIO_GET, _ONE_THREAD, tid)), 0) if _IOPRIO_GET else 0


def _slack_ns(tid: int) -> int:
    try:
        return int(Path(f"/proc/{tid}/timerslack_ns").read_text())
    except (OSError, ValueError):
        return 0  # it takes CAP_SYS_NICE


def own_settings(pid: int, like: int) -> tuple[ThreadSettings, ...]:
    """The threads of a process that have settings of their own: other ones than the process `like` has.

    Raises:
        ProcessLookupError, FileNotFoundError: it is gone.
    """
    cpus, ioprio, slack = _cpus(like), _ioprio(like), _slack_ns(like)
    found = []
    for tid, inner in tids(pid):
        with suppress(ProcessLookupError):
            own = ThreadSettings(
                inner,
                cpus=(mine := _cpus(tid)) * (mine != cpus),
                ioprio=(urgency := _ioprio(tid)) * (urgency != ioprio),
                slack_ns=(late := _slack_ns(tid)) * (late != slack),
            )
            if own != ThreadSettings(inner):
                found.append(own)
    return tuple(found)


def apply(pids: Iterable[int], settings: Iterable[ThreadSettings], like: int) -> tuple[str, ...]:
    """Give the threads of some processes what they had. `like` has the processors that there are for them here. What
    cannot be had is told, one line each."""
    cpus = os.sched_getaffinity(like)
    wanted = {s.tid: s for s in settings}
    lost = []
    for pid in pids:
        with suppress(FileNotFoundError, ProcessLookupError):
            for tid, inner in tids(pid):
                if (own := wanted.get(inner)) is None:
                    continue
                with suppress(ProcessLookupError):
                    if own.cpus:
                        if here := cpus.intersection(own.cpus):
                            os.sched_setaffinity(tid, here)
                        else:
                            lost.append(f"thread {inner} was to run on processors {own.cpus}, which are not here")
                    if own.ioprio and _libc.syscall(_IOPRIO_SET, _ONE_THREAD, tid, own.ioprio) < 0:
                        lost.append(f"thread {inner}: I/O priority: {os.strerror(ctypes.get_errno())}")
                if own.slack_ns:
                    with suppress(OSError):
                        Path(f"/proc/{tid}/timerslack_ns").write_text(str(own.slack_ns))
    return tuple(lost)
