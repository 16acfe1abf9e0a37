"""The memory of thawed instances: the page server that gives it to them, and what is learned of what they need."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

from woodfrog.engine.engine import Lazy
from woodfrog.errors import WoodfrogError
from woodfrog.linux import hugepages, procfs
from woodfrog.linux.pageserver import PageServer, ServedPages, common_set, is_guess, merge_sets, set_pages
from woodfrog.snapshot.catalogue import WORKING_SET, Opened
from woodfrog.store.files import write_atomic
from woodfrog.telemetry import counters

__all__ = ["SETTLED_S", "Huge", "Memory", "usable_set"]

Huge: TypeAlias = tuple[int, int, int]
"""(pid inside, begin, end) of memory that lay in huge pages."""

log = logging.getLogger("woodfrog")

_AROUND = 64 << 10
_AROUND_LEARNING = 4 << 10
_STALE_SHARE = 200
"""A working set that misses more than one page in so many is refined."""
SETTLED_S = 2.0
"""So long after its thaw a process is left alone: by then a burst of starts is over."""
_MISSED = "working-set.missed"
"""Beside the working set: what the last thaw asked for that was not in it."""


class Memory:
    """How thawed processes get their memory, on this machine.

    Args:
        min_bytes: a smaller snapshot that is still loose is read by CRIU at once.
        drain_ms: when the rest of the memory is filled in at the earliest, counted from the start; negative: never.
        huge_pages: give thawed processes the huge pages back that they had.
    """

    def __init__(self, *, uid: int, min_bytes: int, drain_ms: int, huge_pages: bool = True) -> None:
        self._uid = uid
        self._min_bytes = min_bytes
        self._drain_ms = drain_ms
        self._huge_pages = huge_pages
        self._piecing = ThreadPoolExecutor(1, "woodfrog-huge")
        """One for all: however many were thawed, calls have the rest of the machine."""
        self._closing = False
        self._server: PageServer | None = None
        self.on_need: Callable[[PageServer, int, int, bool], None] | None = None
        """Called when pages are wanted that are still on their way; see `PageServer.on_need`."""
        self.works = False
        """Whether a process of this host was given its memory so."""

    async def lazy(self, opened: Opened, *, everything: bool = False, parked: bool = False) -> Lazy | None:
        """How this snapshot's memory gets to a thawed process; None = CRIU reads it at once.

        Args:
            everything: all of it is there before the process runs, so that it may be frozen again.
            parked: what it will need is pushed when it is woken.
        """
        manifest = opened.manifest
        if manifest.form == "loose" and manifest.pages_bytes < self._min_bytes:
            return None
        if self._server is None or not self._server.alive:
            self._server = server = await PageServer.start(uid=self._uid, on_death=self._died)
            if (on_need := self.on_need) is not None:
                server.on_need = lambda place, pages, asked: on_need(server, place, pages, asked)
        working_set = opened.path / WORKING_SET
        known = await asyncio.to_thread(usable_set, working_set)
        return Lazy(
            self._server,
            working_set if known else None,
            # While the working set is being learned, only what is asked for may get into it.
            around=_AROUND if known and not is_guess(known) else _AROUND_LEARNING,
            files=opened.files,
            present=opened.present,
            everything=everything,
            parked=parked,
        )

    def adopt(self, served: ServedPages, on_failed: Callable[[str], None]) -> None:
        """A process runs on what is served to it; `on_failed` is told when no more can come."""
        self.works = True
        served.failed.add_done_callback(lambda failed: on_failed(failed.result()))

    @staticmethod
    def _died() -> None:
        counters["page-server.died"] += 1
        log.error("the page server died; what it served is started anew")

    def fill(self, served: ServedPages) -> None:
        """Let the rest of its memory come in the background."""
        if self._drain_ms >= 0:
            with contextlib.suppress(WoodfrogError):  # its end is told elsewhere
                served.drain(self._drain_ms)

    async def piece_together(self, root_pid: int, huge: tuple[Huge, ...], wanted: Callable[[], bool], who: str) -> None:
        """Give processes that run the huge pages back that they had at the freeze, of what memory they have by now.

        Args:
            root_pid: of the tree, on the host.
            huge: (pid inside, begin, end), as `Lazy.huge`.
            wanted: whether they are still there to be served.
        """
        if not self._huge_pages or not huge:
            return
        loop = asyncio.get_running_loop()
        with contextlib.suppress(RuntimeError):  # closed
            blocks = await loop.run_in_executor(
                self._piecing, _piece_together, root_pid, huge, lambda: wanted() and not self._closing
            )
            log.info("%s: memory: %d huge pages", who, blocks)

    @staticmethod
    async def record(served: ServedPages, who: str) -> bytes:
        """After the first call: what it touched, for the next thaw; empty when that is not known."""
        try:
            return await served.record()
        except (WoodfrogError, TimeoutError) as e:
            log.warning("%s: working set not known: %s", who, e)
            return b""

    @staticmethod
    async def keep(seen: bytes, snapshot: Path, who: str) -> None:
        """Refine the snapshot's working set with what faults asked for.

        What one request alone touched must not be pushed to all: a page joins when two thaws in a row missed it.
        """
        try:
            if seen and snapshot.is_dir():
                await asyncio.to_thread(_refine, snapshot / WORKING_SET, snapshot / _MISSED, seen)
        except (WoodfrogError, ValueError, OSError) as e:
            log.warning("%s: working set not kept: %s", who, e)

    @staticmethod
    async def drop(served: ServedPages, who: str) -> None:
        """The processes are gone."""
        pushed, faults, demanded = await served.drop()
        log.info("%s: memory: %d pages pushed, %d faults, %d pages on demand", who, pushed, faults, demanded)
        counters["pages.pushed"] += pushed
        counters["pages.faults"] += faults
        counters["pages.demanded"] += demanded

    async def close(self) -> None:
        self._closing = True
        self._piecing.shutdown(wait=False, cancel_futures=True)
        if self._server is not None:
            await self._server.close()


def _piece_together(root_pid: int, huge: tuple[Huge, ...], wanted: Callable[[], bool]) -> int:
    blocks = 0
    for inner, pid in procfs.by_inner_pid(root_pid).items():
        if ranges := [(begin, end) for of, begin, end in huge if of == inner]:
            done = hugepages.collapse(pid, ranges, wanted=wanted)
            blocks += done.blocks
            if done.error:
                log.debug("pid %d: no more huge pages: %s", pid, os.strerror(done.error))
    return blocks


def _read_or_empty(path: Path) -> bytes:
    with contextlib.suppress(FileNotFoundError):
        return path.read_bytes()
    return b""


def _refine(working_set: Path, missed: Path, seen: bytes) -> None:
    known = _read_or_empty(working_set)
    if not known or is_guess(known):
        write_atomic(working_set, merge_sets(seen, *filter(None, [known])))
        return
    if set_pages(seen) * _STALE_SHARE <= set_pages(known):
        return
    before = _read_or_empty(missed)
    write_atomic(missed, seen)
    again = common_set(before, seen) if before else b""
    if again and set_pages(again):
        write_atomic(working_set, merge_sets(known, again))


def usable_set(working_set: Path) -> bytes:
    """The working set to go by; empty = none. A damaged one is removed and learned anew: all can do without."""
    try:
        data = _read_or_empty(working_set)
        return data if set_pages(data) else b""
    except ValueError:
        if working_set.exists():
            log.warning("%s is damaged; it is learned anew", working_set)
            with contextlib.suppress(OSError):
                working_set.unlink(missing_ok=True)
    except OSError as e:
        log.warning("%s cannot be read: %s; it goes without", working_set, e.strerror)
    return b""
