"""Named, timed phases, and counters.

A `Phases` is filled along the way of one piece of work (a start, a capture, a call) and travels as plain JSON,
so that every answer can be asked where its time went.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Phase", "Phases", "counters"]

counters: Counter[str] = Counter()
"""Process-wide event counts, by dotted name (`restore.failed`, `capture.done`)."""


@dataclass(slots=True)
class Phase:
    """One timed step. `start_ms` counts from the beginning of its `Phases`."""

    name: str
    start_ms: float
    ms: float
    parent: str | None = None


@dataclass(slots=True)
class Phases:
    """The steps of one piece of work, in order.

    >>> phases = Phases()
    >>> with phases("restore"):
    ...     with phases("criu"):
    ...         pass
    >>> [p.name for p in phases.items], phases.items[1].parent
    (['restore', 'criu'], 'restore')
    """

    items: list[Phase] = field(default_factory=list)
    origin: float = field(default_factory=time.monotonic)
    _stack: list[str] = field(default_factory=list)

    @contextmanager
    def __call__(self, name: str) -> Iterator[Phase]:
        begin = time.monotonic()
        phase = Phase(name, round((begin - self.origin) * 1e3, 3), 0.0, self._stack[-1] if self._stack else None)
        self.items.append(phase)
        self._stack.append(name)
        try:
            yield phase
        finally:
            self._stack.pop()
            phase.ms = round((time.monotonic() - begin) * 1e3, 3)

    def add(self, name: str, ms: float, *, start_ms: float | None = None, parent: str | None = None) -> None:
        """Record a step timed elsewhere (inside the sandbox, by CRIU)."""
        if start_ms is None:
            start_ms = (time.monotonic() - self.origin) * 1e3 - ms
        self.items.append(Phase(name, round(start_ms, 3), round(ms, 3), parent))

    def elapsed_ms(self) -> float:
        return (time.monotonic() - self.origin) * 1e3

    def to_list(self) -> list[dict[str, Any]]:
        return [{"name": p.name, "start_ms": p.start_ms, "ms": p.ms, "parent": p.parent} for p in self.items]

    def merge(self, other: list[dict[str, Any]], *, offset_ms: float = 0.0, parent: str | None = None) -> None:
        """Take over phases recorded by another `Phases` (in `to_list` form)."""
        for p in other:
            self.items.append(
                Phase(
                    str(p["name"]),
                    round(float(p["start_ms"]) + offset_ms, 3),
                    float(p["ms"]),
                    p.get("parent") or parent,
                )
            )
