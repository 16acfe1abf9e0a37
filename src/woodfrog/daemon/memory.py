"""The daemon's eye on memory: it tells the control machine what there is, and an app's log who waits for some.

Off the way of calls: instances are looked at in a thread, every so often while something runs. A start on a machine
where nothing ran reads /proc/meminfo on its way, once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from woodfrog.backends.base import Backend
from woodfrog.control.events import Event, MemorySeen
from woodfrog.control.state import State
from woodfrog.daemon.logs import LogBook

__all__ = ["MemoryWatch", "short_of", "to_give"]

log = logging.getLogger("woodfrog")

_MARGIN_SHARE = 20
_LEAST_MARGIN = 64 << 20
_FRESH_S = 1.0
_HUNGRY_S, _BUSY_S, _QUIET_S = 0.25, 0.5, 5.0
"""How often it is looked at while calls wait for memory, while any run, and else."""
_STEP = 4 << 20
"""Less of a change is none: each is a line in the event journal."""
_TOLD_S = 5.0
"""Who has waited so long is told why."""


class MemoryWatch:
    """Tells `emit` what memory there is.

    Args:
        limit: bytes that all instances may take together; 0 = what the machine has, below 0: nobody looks.
    """

    def __init__(
        self,
        state: State,
        backend: Backend,
        emit: Callable[[Event], None],
        logs: LogBook,
        *,
        limit: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._state = state
        self._backend = backend
        self._emit = emit
        self._logs = logs
        self._limit = limit
        self._clock = clock
        self._looked = float("-inf")
        self._last: tuple[Any, ...] = ()
        self._told: set[tuple[str, str, str, float]] = set()

    def look(self) -> None:
        """Before a start: what the machine has, unless that was looked at just now."""
        if self._limit >= 0 and self._clock() - self._looked >= _FRESH_S:
            self._tell(None, self._clock())

    async def run(self) -> None:
        """Look for as long as the daemon lives."""
        while self._limit >= 0:
            await asyncio.sleep(self._pause())
            try:
                begun = self._clock()
                self._tell(await self._backend.memory_used() if self._state.instances else {}, begun)
                self._explain()
            except Exception:  # the next one may succeed
                log.exception("memory is not looked at")
                await asyncio.sleep(_QUIET_S)

    def _pause(self) -> float:
        if self._state.memory_waits(self._clock()):
            return _HUNGRY_S
        return _BUSY_S if self._state.calls or self._state.starting else _QUIET_S

    def _tell(self, used: dict[str, int] | None, now: float) -> None:
        try:
            room = self._backend.room(quick=used is None)
        except (OSError, ValueError) as e:
            log.warning("starts do not depend on memory: %s", e)
            self._limit = -1
            self._emit(MemorySeen(now=self._clock(), total=0, available=0))
            return
        self._looked = self._clock()
        taken = used if used is not None else {i.id: i.used for i in self._state.instances.values()}
        total, available = to_give(room.total, room.available, sum(taken.values()), self._limit)
        seen = (
            total,
            available // max(total >> 6, _STEP),
            [
                (i.id, taken.get(i.id, 0) // _STEP, i.proven(now), i.known(now), i.whole and now < i.fills_until)
                for i in self._state.instances.values()
            ],
        )
        if seen != self._last:
            self._last = seen
            self._emit(MemorySeen(now=now, total=total, available=available, used=used))

    def _explain(self) -> None:
        """Once for each time that calls of a function begin to wait for memory."""
        told = set()
        for found in self._state.memory_waits(self._looked, _TOLD_S):
            told.add(key := (found["app"], found["tag"], found["params_digest"], found["since"]))
            if key not in self._told:
                text = short_of(found, self._limit)
                self._logs.note(found["app"], text, function=found["tag"])
                log.warning("%s.%s: %s", found["app"], found["tag"], text)
        self._told = told


def to_give(total: int, available: int, used: int, limit: int) -> tuple[int, int]:
    """What there is for instances in all, and what of it is free: a margin stays for everything else.

    Args:
        used: what instances take now.
        limit: on that; 0 = none.
    """
    available = max(available - max(total // _MARGIN_SHARE, _LEAST_MARGIN), 0)
    if limit:
        return min(total, limit), max(min(available, limit - used), 0)
    return total, available


def short_of(found: dict[str, Any], limit: int) -> str:
    """For people: what is needed, what is there, what to do."""
    need, left, total = (-(-found[name] // (1 << 20)) for name in ("need", "left", "total"))
    calls, containers = found["calls"], found["containers"]
    text = f"{calls} call{' waits' if calls == 1 else 's wait'} for memory: a container needs about {need} MiB, "
    text += f"{left} of {total} MiB are left"
    if containers:
        text += f"; {containers} answer{'s' if containers == 1 else ''} them one after the other"
    elif need > total:
        text += "; it starts when nothing else runs"
    text += ". Free memory on the machine"
    if limit:
        text += ", raise WOODFROG_MEMORY_MIB"
    return f"{text}, or have the function hold less"
