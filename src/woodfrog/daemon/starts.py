"""The latest starts of containers: how each went, how long it took, and why it was cold."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from woodfrog.control.state import WhyCold
from woodfrog.daemon.journal import Journal, StartRow
from woodfrog.errors import StoreError
from woodfrog.telemetry import Phase

__all__ = ["DAY_S", "Kind", "Start", "Starts", "why_words"]

log = logging.getLogger("woodfrog")

Kind = Literal["cold", "zygote", "thawed", "woken"]
"""How it came up: a plain boot, a boot in a thawed copy of its libraries, from its snapshot, from a parked copy."""

DAY_S = 86400.0
_KEPT_S = 7 * DAY_S
_KEPT = 100_000
_UNWRITTEN = 1000
"""So many wait at most until the journal takes them."""
_TEXT = 300

_WORDS: dict[WhyCold, str] = {
    "": "",
    "off": "it has no enable_memory_snapshot=True",
    "none-fits": "it had no snapshot yet",
    "being-made": "its snapshot was still being made",
    "gave-up": "its snapshots failed too often",
    "did-not-thaw": "its snapshot did not thaw",
    "gpu-full": "its snapshot did not fit on the GPUs that were free",
}


def why_words(why: WhyCold, detail: str = "") -> str:
    """Why a start was cold, for people. `detail`: what is known beyond that."""
    if why == "none-fits" and detail:
        return detail
    return f"{_WORDS[why]}: {detail}" if detail and why else _WORDS[why]


@dataclass(slots=True, eq=False)
class Start:
    """One start of one container, from its request to its end."""

    app: str
    version: int
    function: str
    instance: str
    kind: Kind
    why: WhyCold = ""
    detail: str = ""
    snapshot: str = ""
    at: float = field(default_factory=time.time)
    result: Literal["", "ready", "failed", "stopped"] = ""
    """ "" = under way."""
    ms: float = 0.0
    code: str = ""
    """Of the failure; "" = there was none."""
    error: str = ""
    phases: Sequence[Phase] = ()

    def found(self, snapshot_id: str) -> None:
        """It was to boot, and a snapshot was found."""
        self.kind, self.why, self.detail, self.snapshot = "thawed", "", "", snapshot_id

    @property
    def row(self) -> StartRow:
        return StartRow(
            self.at,
            self.app,
            self.version,
            self.function,
            self.instance,
            self.kind,
            self.result or "failed",
            round(self.ms, 1),
            self.why,
            why_words(self.why, self.detail)[:_TEXT],
            self.snapshot,
            self.code,
            self.error[:_TEXT],
        )


class Starts:
    """Keeps them in the journal, which is told by and by: no start waits for a disk."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._unwritten: list[Start] = []
        self.on_ended: Callable[[Start], None] = lambda start: None

    def ended(self, start: Start) -> None:
        self._unwritten.append(start)
        self.on_ended(start)

    def write(self) -> None:
        """Tell the journal of those that ended. Where it has no room the oldest are forgotten: they are only news."""
        ended, self._unwritten = self._unwritten, []
        if ended:
            try:
                self._journal.add_starts([start.row for start in ended], time.time() - _KEPT_S, _KEPT)
            except StoreError as e:
                self._unwritten = (ended + self._unwritten)[-_UNWRITTEN:]
                log.warning("starts are not recorded: %s", e.message)

    def latest(self, app: str, limit: int) -> list[StartRow]:
        """Of one app, the newest first."""
        self.write()
        return self._journal.starts(app, limit)

    async def of_a_day(self) -> dict[str, dict[str, int]]:
        """How many there were of each app in the last 24 hours, by kind; those that came to nothing as `failed`."""
        self.write()
        found: dict[str, dict[str, int]] = {}
        counted: list[Any] = await asyncio.to_thread(self._journal.count_starts, time.time() - DAY_S)
        for app, kind, result, count in counted:
            of_app = found.setdefault(app, {})
            name = "failed" if result == "failed" else kind
            of_app[name] = of_app.get(name, 0) + count * (result != "stopped")
        return found
