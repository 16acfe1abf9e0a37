"""Looks after this machine's snapshots beside the calls: packs them, collects what nothing needs, moves them.

What takes long runs in threads, one thing at a time, and waits for restores of the snapshot it changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ParamSpec, TypeAlias, TypeVar

from woodfrog.backends.base import Progress
from woodfrog.backends.memory import usable_set
from woodfrog.errors import IncompatibleSnapshot, IntegrityError, NotFoundError, StoreError, WoodfrogError
from woodfrog.linux import heap
from woodfrog.linux.pageserver import PageServer
from woodfrog.snapshot import tombstones
from woodfrog.snapshot.arrival import Arrival
from woodfrog.snapshot.catalogue import PINNED, PUSHED, WITHDRAWN, WORKING_SET, Catalogue, Opened
from woodfrog.snapshot.manifest import Manifest
from woodfrog.snapshot.packing import NotPackable, prepare
from woodfrog.snapshot.pending import TRIES, Pending, PendingNotes, why_not
from woodfrog.snapshot.transport import Transport
from woodfrog.snapshot.trust import fingerprint, public_text
from woodfrog.store.files import write_atomic
from woodfrog.store.layers import LayerStats
from woodfrog.store.pages import PageStore, Problem
from woodfrog.store.tiers import Tier
from woodfrog.telemetry import counters

__all__ = ["Keeper"]

log = logging.getLogger("woodfrog")

T = TypeVar("T")
P = ParamSpec("P")

_Wanted: TypeAlias = tuple[str, str]
"""Function key and worker class of a snapshot that a start could thaw."""

_QUIET_S = 0.05
_GC_AFTER_S = 60.0
_LOOK_UP_S = 3.0
_NOT_THERE_S = 30.0
_PUSH_AGAIN_S = 60.0
_SLOW_S = 60.0
"""A copy to the tier that takes longer is told of in the log: others wait for it."""
_CLOSE_S = 10.0
_LEFT_S = 1.0
_NEED_S = 15.0
"""So long a process waits for a page of the tier."""
_STALLED_S = 30.0
_GO_ON_S = 5.0
"""So long after the start the calls that waited for it have what there is."""
_GO_ON_AGAIN_S = 60.0
"""Until the second try; twice as long until each one after that."""
_LOOK_AGAIN_S = 3600.0
"""Between two looks at what was removed from the tier."""
_MISSED_S = tombstones.KEEP_S - 24 * 3600.0
"""Who has not looked for so long may have missed a tombstone."""
_WITHDRAWN_FROM = "removed for all machines from"
_UNUSED = "it is in the tier and was not used for longest"


def _quietly(what: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


class Keeper:
    """Housekeeping of one catalogue and its page store.

    Args:
        transport: moves snapshots to and from `tier`.
        tier: where snapshots are kept beside this machine; None = nowhere.
        pack: put snapshots' memory into the page store when nobody waits.
        pack_min: bytes of memory below which a snapshot stays loose.
        budget: bytes that snapshots may take on this machine; what is in the tier as well goes first. 0 = no limit.
        worker_class: this kind of host.
        read_through: thaw a snapshot of the tier as soon as its working set is here.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        store: PageStore,
        transport: Transport,
        *,
        tier: Tier | None = None,
        pack: bool = True,
        pack_min: int = 0,
        budget: int = 0,
        worker_class: str = "",
        read_through: bool = True,
    ) -> None:
        self._catalogue = catalogue
        self._store = store
        self._transport = transport
        self._tier = tier
        self._pack = pack
        self._pack_min = pack_min
        self._budget = budget
        self._worker_class = worker_class
        self.in_use: Callable[[], set[str]] = set
        """The snapshots that instances rest on."""
        self.on_taken_up: Callable[[Manifest], None] = lambda _: None
        """Called when a snapshot has come from elsewhere by a person's wish, or after it was thawed already."""
        self.wanted: Callable[[str, str, str], bool] = lambda *_: False
        """Whether a deployed function would thaw a snapshot: by function key, tag, and digest of parameters."""
        self.on_withdrawn: Callable[[str, str], None] = catalogue.retire
        """Called with id and reason when a snapshot is not to be used any more: its copy in the tier was removed."""
        self._read_through = read_through
        self._fetches: dict[str, asyncio.Task[Manifest]] = {}
        self._arrivals: dict[str, Arrival] = {}
        """What can be thawed while the rest of it is on its way."""
        self._stalled = 0.0
        """Until when nothing is thawed that is not whole: the tier did not give what a process waited for."""
        self._whole_first: set[str] = set()
        """What once began to arrive and did not get here: it is not thawed again before all of it is here."""
        self._broken: dict[str, IntegrityError] = {}
        """What is not what it says, as was found after it was thawed."""
        self._not_there: dict[_Wanted, float] = {}
        self._tier_away = 0.0
        """Until when nobody asks the tier for what it may have: it did not answer in time."""
        self._refused: set[tuple[_Wanted, str]] = set()
        """What the tier has and this machine cannot use, by what it was offered as."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._used: Counter[str] = Counter()
        self._one = asyncio.Lock()
        self._sending = asyncio.Lock()
        """Held by what changes the tier at length. Nothing that is this machine's alone waits for it."""
        self._making_room = asyncio.Lock()
        self._queued: set[str] = set()
        self._swapping: dict[str, asyncio.Event] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._collecting: asyncio.Task[Any] | None = None
        self._pending = PendingNotes(catalogue.root.parent / "arriving")
        self._going_on: asyncio.Task[Any] | None = None
        self._looked = catalogue.root.parent / "tombstones-seen"
        self._looking: asyncio.Task[Any] | None = None
        self._pushing: Counter[str] = Counter()
        self._withdrawing: set[str] = set()
        self._closing = False
        self._owner = f"daemon-{os.getpid()}"

    @contextlib.contextmanager
    def _using(self, snapshot_id: str) -> Iterator[None]:
        self._used[snapshot_id] += 1
        try:
            yield
        finally:
            self._used[snapshot_id] -= 1
            if not self._used[snapshot_id]:
                del self._used[snapshot_id]

    @contextlib.asynccontextmanager
    async def using(self, snapshot_id: str) -> Any:
        """While a restore reads a snapshot: its images stay where they are."""
        while (swap := self._swapping.get(snapshot_id)) is not None:
            await swap.wait()
        with self._using(snapshot_id):
            yield

    def _spawn(self, work: Any) -> asyncio.Task[Any]:
        self._loop = asyncio.get_running_loop()
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    @contextlib.asynccontextmanager
    async def _alone(self, lock: asyncio.Lock | None = None) -> AsyncIterator[None]:
        """One at a time of what works through much memory: its tables leave tens of megabytes of holes."""
        async with lock or self._one:
            try:
                yield
            finally:
                await asyncio.to_thread(heap.trim)

    # Packing

    def pack_later(self, snapshot_id: str) -> None:
        """Pack a snapshot in the background, once; nothing that goes wrong with that harms it."""
        if snapshot_id in self._queued or self._closing or not (self._pack or self._tier):
            return
        if self._catalogue.form(snapshot_id) is None:
            return  # it was not stored, or removed since
        self._queued.add(snapshot_id)
        self._spawn(self._pack_one(snapshot_id))

    async def _pack_one(self, snapshot_id: str) -> None:
        try:
            async with self._alone():
                if not self._closing:
                    with contextlib.suppress(NotPackable):
                        await self.pack(snapshot_id)
            if self._sending.locked():  # that may take long, and what is in the tier already can go now
                await self._make_room()
            if not self._closing:
                await self._back_up(snapshot_id)
                await self._make_room()
        except WoodfrogError as e:
            counters["pack.failed"] += 1
            log.warning("snapshot %s is not packed: %s", snapshot_id, e.message)
            self._queued.discard(snapshot_id)
        except Exception:
            counters["pack.failed"] += 1
            log.exception("snapshot %s is not packed", snapshot_id)

    async def pack(self, snapshot_id: str) -> None:
        """Put a loose snapshot's memory into the page store.

        Raises:
            NotPackable: it stays loose.
            StoreError, IntegrityError: it could not be stored; it is as it was.
        """
        if not self._pack:
            raise NotPackable("packing is switched off", code="not-packable")
        if self._catalogue.get(snapshot_id).pages_bytes < self._pack_min:
            raise NotPackable("it is small: it is read at once", code="not-packable")
        parent = self._catalogue.get(snapshot_id).parent
        if parent and parent != snapshot_id and self._catalogue.form(parent) == "loose":
            try:
                await self.pack(parent)
            except WoodfrogError as e:  # without it, less is shared
                log.warning("snapshot %s is not packed: %s", parent, e.message)
        owner = f"{self._owner}-pack-{snapshot_id}"
        working_set = await asyncio.to_thread(usable_set, self._catalogue.path(snapshot_id) / WORKING_SET)
        try:
            with self._using(snapshot_id):
                old, new = await asyncio.to_thread(
                    prepare, self._catalogue, self._store, snapshot_id, working_set=working_set, owner=owner
                )
                ready = await asyncio.to_thread(self._catalogue.ready_images, old, new)
            await self._quiet(snapshot_id)
            with self._changing(snapshot_id):  # a start that comes now waits: not for more than it must
                await asyncio.to_thread(self._catalogue.swap_images, old, ready)
            await asyncio.to_thread(self._catalogue.remove_replaced, ready.manifest)
        finally:
            await asyncio.to_thread(self._store.release, owner)
        counters["pack.done"] += 1
        log.info(
            "snapshot %s packed: %.1f MB of memory, %.1f MB stored", snapshot_id, old.pages_bytes / 1e6,
            new.stored_bytes / 1e6,
        )  # fmt: skip

    @contextlib.contextmanager
    def _changing(self, snapshot_id: str) -> Iterator[None]:
        """Nobody begins to use a snapshot meanwhile. It must be quiet."""
        done = self._swapping[snapshot_id] = asyncio.Event()
        try:
            yield
        finally:
            del self._swapping[snapshot_id]
            done.set()

    async def _quiet(self, snapshot_id: str) -> None:
        while self._used[snapshot_id]:
            await asyncio.sleep(_QUIET_S)

    # The tier

    def _in_tier(self, snapshot_id: str) -> bool:
        """Whether it was copied to the tier that is configured now."""
        return self._tier is not None and self._catalogue.mark_text(snapshot_id, PUSHED) == self._tier.name

    async def _mark(self, snapshot_id: str, mark: str, text: str = "") -> None:
        """In a thread: it waits for the disk."""
        await asyncio.to_thread(self._catalogue.mark, snapshot_id, mark, text)

    async def _back_up(self, snapshot_id: str) -> None:
        """Copy a snapshot to the tier once. Where that fails it may be tried again after a while."""
        if not self._to_be_sent(snapshot_id):
            return
        tier, loop = self._configured(), asyncio.get_running_loop()
        async with self._alone(self._sending):
            if not self._to_be_sent(snapshot_id):
                return
            slow = loop.call_later(_SLOW_S, log.info, "snapshot %s is still on its way to %s", snapshot_id, tier.name)
            try:
                await self.push(snapshot_id)
            except WoodfrogError as e:
                counters["push.failed"] += 1
                log.warning("snapshot %s is not in %s: %s", snapshot_id, tier.name, e.message)
                loop.call_later(_PUSH_AGAIN_S, self._queued.discard, snapshot_id)
            finally:
                slow.cancel()

    def _to_be_sent(self, snapshot_id: str) -> bool:
        return not (
            self._tier is None
            or self._closing
            or self._in_tier(snapshot_id)
            or self._catalogue.form(snapshot_id) is None
            or self._catalogue.retired(snapshot_id) is not None
            or self._withdrawn(snapshot_id)
        )

    # What was removed from the tier

    def _withdrawn(self, snapshot_id: str) -> bool:
        return self._tier is not None and self._catalogue.mark_text(snapshot_id, WITHDRAWN) == self._tier.name

    def look_later(self) -> None:
        """Look in the background, now and then, whether what is here was removed from the tier for all machines."""
        if self._tier is not None and not self._closing:
            self._looking = self._spawn(self._look_again())

    async def _look_again(self) -> None:
        pause = _GO_ON_S
        while True:
            await asyncio.sleep(pause)
            pause = _LOOK_AGAIN_S
            try:
                await self._look()
            except Exception as e:  # whatever it is: it is tried again
                why = e.message if isinstance(e, WoodfrogError) else f"{type(e).__name__} {e}".strip()
                log.warning("%s cannot be asked what was removed there: %s", self._configured().name, why)

    async def _look(self) -> None:
        """Compare what is here with the tombstones in the tier.

        Raises:
            StoreError: the tier cannot be asked.
        """
        tier, begin = self._configured(), time.time()
        missed = await asyncio.to_thread(self._may_have_missed, tier.name, begin)
        dead = await _aside(tombstones.listed, tier)
        for manifest in self._catalogue.manifests():
            with contextlib.suppress(NotFoundError):  # it was removed here meanwhile
                if manifest.id in dead:
                    await self._met(manifest.id)
                else:
                    await self._compare(manifest.id, tier, missed=missed)
        await asyncio.to_thread(write_atomic, self._looked, f"{begin:.0f} {tier.name}\n".encode())

    async def _compare(self, snapshot_id: str, tier: Tier, *, missed: bool) -> None:
        """What has no tombstone may have had one: it was taken back, or is so long ago that this machine missed it."""
        withdrawn = self._withdrawn(snapshot_id)
        if not withdrawn and not (missed and self._in_tier(snapshot_id)):
            return
        there = await _aside(self._transport.has, tier, snapshot_id)
        if there and withdrawn:
            await self._back_again(snapshot_id)
        elif not there and not withdrawn:
            log.info("snapshot %s is not in %s any more: it was removed, perhaps", snapshot_id, tier.name)
            await self._disown(snapshot_id)

    def _may_have_missed(self, tier: str, now: float) -> bool:
        """Whether tombstones may have come and gone since the last look at this tier."""
        try:
            when, _, name = self._looked.read_text().rstrip("\n").partition(" ")
            return name != tier or not 0 <= now - float(when) < _MISSED_S
        except (OSError, ValueError):
            return True

    async def _disown(self, snapshot_id: str) -> None:
        """It is not copied to the tier again by itself."""
        await self._mark(snapshot_id, WITHDRAWN, self._configured().name)
        self._catalogue.unmark(snapshot_id, PUSHED)

    async def _met(self, snapshot_id: str) -> None:
        """There is a tombstone for what is here. Where a trusted key has signed it, this copy is not thawed any more,
        but for one that is pinned.

        Raises:
            StoreError: the tier cannot be asked.
        """
        tier = self._configured()
        found = await _aside(self._transport.tombstone, snapshot_id, tier)
        if found is None or self._catalogue.form(snapshot_id) is None:
            return
        if not self._withdrawn(snapshot_id):
            await self._disown(snapshot_id)
            whose = f"by the machine with key {found.signer}" if found.signer else "by nobody who is trusted here"
            log.warning("snapshot %s was removed from %s for all machines, %s", snapshot_id, tier.name, whose)
        pinned = self._catalogue.marked(snapshot_id, PINNED)
        if found.signer and not pinned and self._catalogue.retired(snapshot_id) is None:
            self.on_withdrawn(snapshot_id, f"{_WITHDRAWN_FROM} {tier.name}")

    def _retired_so(self, snapshot_id: str) -> bool:
        """Whether it is not used because it was removed from the tier, and for no other reason."""
        return _WITHDRAWN_FROM in (self._catalogue.retired(snapshot_id) or "")

    async def _back_again(self, snapshot_id: str) -> None:
        """It is in the tier after all, by a person's wish."""
        await self._mark(snapshot_id, PUSHED, self._configured().name)
        retired = self._retired_so(snapshot_id)
        if retired:
            await asyncio.to_thread(self._catalogue.reinstate, snapshot_id)
        self._catalogue.unmark(snapshot_id, WITHDRAWN)  # last: whoever looks next does what was cut off
        if retired:
            self.on_taken_up(self._catalogue.get(snapshot_id))

    # To and from it

    def _configured(self) -> Tier:
        if self._tier is None:
            raise StoreError(
                "no tier is configured; set WOODFROG_TIER to a bucket's URL or a directory", code="no-tier"
            )
        return self._tier

    def _wanted(self, function_key: str, worker_class: str) -> _Wanted:
        return function_key, worker_class or self._worker_class

    async def look_up(self, function_key: str, worker_class: str = "") -> str | None:
        """A snapshot for this function that another machine left in the tier; None also when it cannot be asked.

        Args:
            worker_class: of one that holds GPU memory: this host's with its GPU; "" = this host's.
        """
        now = time.monotonic()
        wanted = self._wanted(function_key, worker_class)
        if self._tier is None or now < max(self._tier_away, self._not_there.get(wanted, 0.0)):
            return None
        self._not_there = {key: until for key, until in self._not_there.items() if now < until}
        try:
            ids = await asyncio.wait_for(_aside(self._transport.find, self._tier, *wanted), _LOOK_UP_S)
        except Exception as e:  # whatever it is: one can start without
            why = e.message if isinstance(e, WoodfrogError) else f"{type(e).__name__} {e}".strip()
            log.warning("%s cannot be asked: %s", self._tier.name, why)
            self._tier_away = time.monotonic() + _NOT_THERE_S
            return None
        usable = [i for i in ids if (wanted, i) not in self._refused and self._catalogue.retired(i) is None]
        if not usable:
            self._not_there[wanted] = time.monotonic() + _NOT_THERE_S
            return None
        return max(usable, key=lambda i: (self._catalogue.form(i) is not None, i))

    def no_use(self, function_key: str, snapshot_id: str, error: Exception, worker_class: str = "") -> None:
        """What `look_up` found did not thaw: it is not looked up again, or not for a while."""
        wanted = self._wanted(function_key, worker_class)
        if isinstance(error, (IntegrityError, IncompatibleSnapshot, NotFoundError)):
            self._refused.add((wanted, snapshot_id))
        else:
            self._not_there[wanted] = time.monotonic() + _NOT_THERE_S

    def evicted(self, snapshot_id: str) -> bool:
        """Whether a snapshot is not here any more, but may be in the tier."""
        return self._tier is not None and self._catalogue.form(snapshot_id) is None

    async def fetch(
        self,
        snapshot_id: str,
        *,
        function_key: str = "",
        worker_class: str = "",
        within: float | None = None,
        urgent: bool = True,
    ) -> Manifest:
        """Bring a snapshot from the tier, so that it can be thawed; at once when it is here. The rest may follow.

        Args:
            function_key: what it must be a snapshot of; "" = of anything.
            worker_class: where that must restore, as of `look_up`.
            within: seconds to wait; it comes all the same, for the next one who asks.
            urgent: whoever asks waits for it; otherwise it gives way to others.

        Raises:
            NotFoundError, StoreError, IntegrityError, IncompatibleSnapshot: as `Transport.pull`.
        """
        if self._catalogue.form(snapshot_id) is None and self._catalogue.retired(snapshot_id) is not None:
            raise NotFoundError(f"snapshot {snapshot_id} was invalidated", snapshot=snapshot_id)
        if self._catalogue.form(snapshot_id) is None and snapshot_id not in self._arrivals:
            task = self._fetches.get(snapshot_id)
            if task is None:
                if (broken := self._broken.get(snapshot_id)) is not None:
                    raise broken
                task = self._fetches[snapshot_id] = self._spawn(
                    self._pull(snapshot_id, self._configured(), function_key, urgent)
                )
                task.add_done_callback(lambda t: self._fetched(snapshot_id, t))
            try:
                await asyncio.wait_for(asyncio.shield(task), within)
            except TimeoutError:
                raise StoreError(
                    f"snapshot {snapshot_id} is not here after {within:.0f} s; it comes in the background",
                    code="tier-slow",
                    retryable=True,
                ) from None
        arrival = self._arrivals.get(snapshot_id)
        if arrival is not None and time.monotonic() < self._stalled:
            raise StoreError(
                f"snapshot {snapshot_id} is not all here, and the tier does not give the rest",
                code="tier-slow",
                retryable=True,
            )
        manifest = self._catalogue.get(snapshot_id) if arrival is None else arrival.manifest
        wanted = self._wanted(function_key, worker_class)
        if function_key and (manifest.function_key, manifest.worker_class) != wanted:
            raise IntegrityError(f"snapshot {snapshot_id} is of another function or host", code="other-function")
        return manifest

    def _fetched(self, snapshot_id: str, task: asyncio.Task[Manifest]) -> None:
        self._fetches.pop(snapshot_id, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.debug("snapshot %s was not fetched: %s", snapshot_id, error)

    async def _pull(self, snapshot_id: str, tier: Tier, function_key: str, urgent: bool) -> Manifest:
        if self._closing:
            raise StoreError("the daemon is stopping", code="stopping")
        if self._read_through and snapshot_id not in self._whole_first:

            def note(m: Manifest) -> None:
                self._pending.add(Pending(m.id, tier.name, self._worker_class, m.function_key, m.tag, m.params_digest))

            try:
                arrival = await _aside(
                    self._transport.arrive,
                    snapshot_id,
                    tier,
                    function_key=function_key,
                    urgent=urgent,
                    on_begin=note,
                )
            except Exception as e:
                if not self._closing:
                    self._pending.drop(snapshot_id)
                if not isinstance(e, StoreError) or e.code != "map-full":
                    raise
            else:
                self._arrivals[snapshot_id] = arrival
                self._spawn(self._rest(snapshot_id, arrival, tier))
                return arrival.manifest
        manifest = await _aside(self._transport.pull, snapshot_id, tier, function_key=function_key)
        await self._pulled(snapshot_id, tier)
        return manifest

    async def _pulled(self, snapshot_id: str, tier: Tier) -> None:
        self._whole_first.discard(snapshot_id)
        self._catalogue.used(snapshot_id)  # what nobody has used yet is not what goes first
        try:
            await self._mark(snapshot_id, PUSHED, tier.name)
        except WoodfrogError as e:
            log.warning("snapshot %s: %s", snapshot_id, e.message)  # it is pushed once more, at worst
        counters["pull.done"] += 1

    async def _rest(self, snapshot_id: str, arrival: Arrival, tier: Tier) -> None:
        """Bring what is missing of a snapshot that may be thawed already; then it is one of this machine's."""
        try:
            await _aside(arrival.rest)
            await self._quiet(snapshot_id)
            with self._changing(snapshot_id):
                await asyncio.to_thread(arrival.finish)
                del self._arrivals[snapshot_id]
            self._pending.drop(snapshot_id)
            await self._pulled(snapshot_id, tier)
            self.on_taken_up(arrival.manifest)
        except Exception as e:
            error = e if isinstance(e, WoodfrogError) else None
            counters["pull.failed"] += 1
            log.warning("snapshot %s does not get here: %s", snapshot_id, error.message if error else e)
            self._arrivals.pop(snapshot_id, None)
            if not self._closing:
                self._pending.drop(snapshot_id)
            self._whole_first.add(snapshot_id)
            if isinstance(error, IntegrityError):
                self._broken[snapshot_id] = error
            await self._quiet(snapshot_id)
            left = await asyncio.to_thread(arrival.give_up, keep=self._closing)
            while snapshot_id in self.in_use() and not self._closing:
                await asyncio.sleep(_LEFT_S)
            with contextlib.suppress(OSError):  # the next start removes it
                await asyncio.to_thread(self._catalogue.remove_tree, left)

    def go_on_later(self) -> None:
        """Go on in the background with what was on its way when the last daemon ended."""
        if self._tier is not None and self._read_through and not self._closing:
            self._going_on = self._spawn(self._go_on())

    async def _go_on(self) -> None:
        """One after the other, when nothing else comes; while the tier is away, less and less often."""
        pause, again = _GO_ON_S, True
        while again:
            await asyncio.sleep(pause)
            pause, again = max(_GO_ON_AGAIN_S, 2 * pause), False
            for pending in await asyncio.to_thread(self._pending.list):
                while self._fetches or self._arrivals:
                    await asyncio.sleep(_LEFT_S)
                if self._pending.has(pending.id):  # else it came for somebody meanwhile
                    again |= not await self._go_on_with(pending)

    async def _go_on_with(self, pending: Pending) -> bool:
        """Whether that is done: it comes, or is given up."""
        why = why_not(
            pending,
            tier=self._configured().name,
            host=self._worker_class,
            have=self._catalogue.form(pending.id) is not None
            or self._catalogue.find(pending.function_key, self._worker_class) is not None,
            invalid=self._catalogue.retired(pending.id) is not None,
            wanted=self.wanted(pending.function_key, pending.tag, pending.params_digest),
        )
        if why:
            log.info("snapshot %s is not fetched to its end: %s", pending.id, why)
            self._pending.drop(pending.id)
            return True
        tried = replace(pending, tries=pending.tries + 1)
        self._pending.put(tried)  # before: what ends the daemon each time is not tried for ever
        log.info("snapshot %s was on its way: going on (%d of %d)", pending.id, tried.tries, TRIES)
        try:
            await self.fetch(pending.id, urgent=False)
        except Exception as e:  # whatever it is: nobody waits for it
            log.warning(
                "snapshot %s does not get here: %s", pending.id, e.message if isinstance(e, WoodfrogError) else e
            )
            if isinstance(e, StoreError):
                self._pending.put(tried)
                return False
        return True

    async def open(self, snapshot_id: str) -> Opened:
        """A snapshot to be thawed, every byte that is here verified, or about to be. Within `using`.

        Raises:
            IntegrityError: altered; nothing of it may be restored.
        """
        arrival = self._arrivals.get(snapshot_id)
        if arrival is not None:
            return arrival.opened()
        return await asyncio.to_thread(self._catalogue.open_verified, snapshot_id)

    def need(self, server: PageServer, place: int, pages: int, asked: bool) -> None:
        """Have pages come that a page server does not find here, and tell it."""
        loop = asyncio.get_running_loop()
        late: asyncio.TimerHandle | None = None

        def tell(here: bool) -> None:
            nonlocal late
            if late is not None:
                late.cancel()
            if asked and not here:
                self._stalled = time.monotonic() + _STALLED_S
            server.have(place, pages, 0 if here else errno.ENODATA)

        def answer(here: bool) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(tell, here)

        if asked:
            counters["pages.fetched"] += pages
            # Its call is better run again elsewhere than held up for as long as a network may take.
            late = loop.call_later(_NEED_S, tell, False)
        self._transport.incoming.need(place, pages, asked, answer)

    async def _make_room(self) -> None:
        """Stay within the budget: what is in the tier as well and was not used for longest goes."""
        if not self._budget:
            return
        async with self._making_room:
            try:
                while not self._closing and await asyncio.to_thread(self._local_bytes) > self._budget:
                    by_use = self._catalogue.by_use()
                    for manifest in sorted(by_use, key=lambda m: not self._retired_so(m.id)):
                        if await self._evict(manifest.id):
                            break
                    else:
                        if await self._drop_rebuilt() == 0:
                            if not self._sending.locked():  # what is being sent may go after that
                                log.warning("snapshots take more than snapshots_mib, and none of them can go")
                            return
            except WoodfrogError as e:
                log.warning("snapshots take more than snapshots_mib: %s", e.message)

    async def _drop_rebuilt(self, *, dry_run: bool = False) -> int:
        """Drop the rebuilt forms of packs but what a restore has opened; one that comes now waits. Bytes freed."""
        async with self._alone():
            busy = set(self._used) | set(self._swapping)
            with contextlib.ExitStack() as quiet:
                reading: set[str] = set()
                for manifest in self._catalogue.manifests():
                    if manifest.id in busy:
                        reading.update(manifest.packs)
                    elif not dry_run:
                        quiet.enter_context(self._changing(manifest.id))
                return await asyncio.to_thread(self._store.trim_cache, 0, reading, dry_run=dry_run)

    async def _evict(self, snapshot_id: str) -> bool:
        """Remove a snapshot that can be had again, or that nobody is to have; False = it stays."""
        if not self._may_go(snapshot_id):
            return False
        if self._in_tier(snapshot_id) and not await _aside(self._transport.has, self._configured(), snapshot_id):
            await self._look()
            if not self._withdrawn(snapshot_id):
                log.warning("snapshot %s is not in %s any more", snapshot_id, self._configured().name)
                self._catalogue.unmark(snapshot_id, PUSHED)
                self._queued.discard(snapshot_id)
        async with self._alone():
            if not self._may_go(snapshot_id):  # the tier, or what else was done here, may have taken its time
                return False
            log.info("snapshot %s goes: %s", snapshot_id, self._catalogue.retired(snapshot_id) or _UNUSED)
            with self._changing(snapshot_id):  # a start that comes now waits, and then fetches it
                await asyncio.to_thread(self._catalogue.remove, snapshot_id)
            self._queued.discard(snapshot_id)
            # What was stored a moment ago counts as well, else more would go than must: nothing needed is lost.
            await asyncio.to_thread(self._store.gc, self._live, min_age_s=0.0)
            if self._catalogue.layers is not None:
                await asyncio.to_thread(self._catalogue.layers.collect)
        return True

    def _may_go(self, snapshot_id: str) -> bool:
        if self._tier is None or self._catalogue.marked(snapshot_id, PINNED):
            return False
        if not (self._in_tier(snapshot_id) or self._retired_so(snapshot_id)):
            return False
        used = self.in_use() | set(self._used) | set(self._swapping)
        return snapshot_id not in used and self._catalogue.form(snapshot_id) is not None

    def _local_bytes(self) -> int:
        loose = sum(m.pages_bytes for m in self._catalogue.manifests() if m.form == "loose")
        layers = sum(m.fs_bytes for m in self._catalogue.manifests())
        if self._catalogue.layers is not None:
            layers = max(0, layers - self._catalogue.layers.stats().shared_bytes)
        stats = self._store.stats()
        return loose + layers + stats.stored_bytes + stats.cache_bytes

    # Collecting

    def collect_later(self) -> None:
        """Collect in a while: a snapshot was removed. In any thread."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self.collect_later)
            return
        if self._closing:
            return
        if self._collecting is None or self._collecting.done():
            self._collecting = self._spawn(self._collect_soon())

    async def _collect_soon(self) -> None:
        await asyncio.sleep(_GC_AFTER_S)
        try:
            async with self._alone():
                await self.collect()
        except WoodfrogError as e:
            log.warning("page store: nothing collected: %s", e.message)

    async def collect(self) -> Any:
        """Remove packs that no snapshot needs. A damaged one is never thawed and needs none.

        Raises:
            StoreError: the store could not be read or written.
        """
        if self._catalogue.layers is not None:
            await asyncio.to_thread(self._catalogue.layers.collect)
        return await asyncio.to_thread(self._store.gc, self._live)

    def _live(self) -> set[str]:
        return {pack for manifest in self._catalogue.manifests() for pack in manifest.packs}

    # What people ask for

    async def verify(self, snapshot_id: str | None, progress: Progress) -> dict[str, Any]:
        ids = [snapshot_id] if snapshot_id else [m.id for m in self._catalogue.manifests()]
        rows = []
        for number, found in enumerate(ids):
            progress("snapshots", number, len(ids))
            rows.append(await self._verify_one(found))
        damaged = {} if snapshot_id else self._catalogue.damaged
        rows += [{"id": i, "bytes": 0, "problems": [why]} for i, why in sorted(damaged.items())]
        problems = [] if snapshot_id else await asyncio.to_thread(self._store.verify)
        if not snapshot_id and self._catalogue.layers is not None:
            problems += [Problem("", what) for what in await asyncio.to_thread(self._catalogue.layers.verify)]
        progress("snapshots", len(ids), len(ids))
        return {"snapshots": rows, "store": [{"pack": p.pack, "what": p.what} for p in problems]}

    async def _verify_one(self, snapshot_id: str) -> dict[str, Any]:
        problems = []
        size = 0
        try:
            async with self.using(snapshot_id):
                self._catalogue.forget_verified(snapshot_id)
                opened = await asyncio.to_thread(self._catalogue.open_verified, snapshot_id)
                size = opened.manifest.pages_bytes + opened.manifest.fs_bytes
                if opened.manifest.packs:
                    found = await asyncio.to_thread(self._store.verify, opened.manifest.packs)
                    problems += [f"pack {p.pack}: {p.what}" for p in found]
        except WoodfrogError as e:
            problems.append(e.message)
        return {"id": snapshot_id, "bytes": size, "problems": problems}

    async def gc(self, *, dry_run: bool, rebuilt: bool, progress: Progress) -> dict[str, Any]:
        progress("packs", 0, 1)
        async with self._alone():
            gone = await asyncio.to_thread(self._store.gc, self._live, dry_run=dry_run)
            freed = 0
            if self._catalogue.layers is not None:
                freed = await asyncio.to_thread(self._catalogue.layers.collect, dry_run=dry_run)
        dropped = await self._drop_rebuilt(dry_run=dry_run) if rebuilt else 0
        return {
            "packs": len(gone.packs),
            "freed_bytes": gone.freed_bytes + freed + dropped,
            "rebuilt_bytes": dropped,
        }

    async def gc_tier(self, *, dry_run: bool, progress: Progress) -> dict[str, Any]:
        tier = self._configured()
        progress("snapshots", 0, 1)
        async with self._alone(self._sending):  # this machine's own uploads wait for it here, and not in vain
            gone = await _aside(self._transport.sweep, tier, dry_run=dry_run, progress=progress)
        return {
            "tier": tier.name,
            "packs": gone.packs,
            "chunks": gone.chunks,
            "snapshots": gone.snapshots,
            "tombstones": gone.tombstones,
            "objects": gone.objects,
            "freed_bytes": gone.freed_bytes,
        }

    async def pin(self, snapshot_id: str) -> dict[str, Any]:
        await self._mark(snapshot_id, PINNED)
        return {"id": snapshot_id, "pinned": True}

    async def unpin(self, snapshot_id: str) -> dict[str, Any]:
        self._catalogue.unmark(snapshot_id, PINNED)
        return {"id": snapshot_id, "pinned": False}

    async def export(self, snapshot_id: str, target: Path, progress: Progress) -> dict[str, Any]:
        async with self.using(snapshot_id):
            size = await _aside(self._transport.export, snapshot_id, target, progress)
        return {"id": snapshot_id, "bytes": size}

    async def import_(self, source: Path, progress: Progress) -> dict[str, Any]:
        before = {m.id for m in self._catalogue.manifests()}
        return self._taken_up(await _aside(self._transport.import_, source, progress), before)

    async def push(self, snapshot_id: str, progress: Progress = _quietly, *, anyway: bool = False) -> dict[str, Any]:
        """Copy a snapshot to the tier.

        Args:
            anyway: also when it was removed from there for all machines: that is taken back.

        Raises:
            StoreError, IntegrityError, IncompatibleSnapshot: as `Transport.push`.
        """
        tier = self._configured()
        async with self.using(snapshot_id):
            if snapshot_id in self._withdrawing:
                raise StoreError(f"snapshot {snapshot_id} is being removed from {tier.name}", code="tier-busy")
            self._pushing[snapshot_id] += 1
            try:
                await _aside(self._transport.push, snapshot_id, tier, progress, anyway=anyway)
            except StoreError as e:
                if e.code == "tier-removed":
                    await self._met(snapshot_id)
                raise
            finally:
                self._pushing[snapshot_id] -= 1
                if not self._pushing[snapshot_id]:
                    del self._pushing[snapshot_id]
            await self._back_again(snapshot_id)
        counters["push.done"] += 1
        return {"id": snapshot_id, "tier": tier.name}

    async def withdraw(self, snapshot_id: str) -> dict[str, Any]:
        """Take a snapshot out of the tier, for all machines. What is here of it stays, for the caller to remove.

        Raises:
            NotFoundError, StoreError: as `Transport.withdraw`.
        """
        tier = self._configured()
        self._withdrawing.add(snapshot_id)
        try:
            while self._pushing[snapshot_id]:  # its manifest would come after
                await asyncio.sleep(_QUIET_S)
            found = await _aside(self._transport.withdraw, snapshot_id, tier)
        finally:
            self._withdrawing.discard(snapshot_id)
        return {"id": snapshot_id, "tier": tier.name, "found": found}

    async def tier(self) -> dict[str, Any]:
        return {"tier": self._configured().name}

    async def list_tier(self, progress: Progress) -> dict[str, Any]:
        tier = self._configured()
        progress("snapshots", 0, 1)
        rows = await _aside(self._transport.listing, tier, progress)
        return {"tier": tier.name, "snapshots": rows}

    async def pull(self, snapshot_id: str, progress: Progress) -> dict[str, Any]:
        tier = self._configured()
        before = {m.id for m in self._catalogue.manifests()}
        progress("packs", 0, 1)
        self._broken.pop(snapshot_id, None)
        self._catalogue.accept(snapshot_id)
        manifest = await self.fetch(snapshot_id)
        while snapshot_id in self._arrivals:
            await asyncio.sleep(_QUIET_S)
        self._catalogue.get(snapshot_id)  # it did not get here, perhaps
        return {**self._taken_up(manifest, before), "tier": tier.name}

    def _taken_up(self, manifest: Manifest, before: set[str]) -> dict[str, Any]:
        if manifest.id not in before:
            self.on_taken_up(manifest)
        return {
            "id": manifest.id,
            "app": manifest.app,
            "function": manifest.tag,
            "new": manifest.id not in before,
        }

    async def trust_add(self, text: str, comment: str) -> dict[str, Any]:
        key = self._transport.trust.add(text, comment)
        self._refused.clear()
        self._broken.clear()
        self._not_there.clear()
        return {"fingerprint": key.fingerprint, "comment": key.comment}

    async def trust_list(self) -> dict[str, Any]:
        own = self._transport.signing
        return {
            "own": {"fingerprint": fingerprint(own.public), "text": public_text(own)},
            "trusted": [{"fingerprint": k.fingerprint, "comment": k.comment} for k in self._transport.trust.list()],
        }

    async def trust_remove(self, fingerprint: str) -> dict[str, Any]:
        key = self._transport.trust.remove(fingerprint)
        return {"fingerprint": key.fingerprint, "comment": key.comment}

    async def store_stats(self) -> dict[str, Any]:
        stats = await asyncio.to_thread(self._store.stats)
        layers = LayerStats(0, 0, 0)
        if self._catalogue.layers is not None:
            layers = await asyncio.to_thread(self._catalogue.layers.stats)
        return {
            "packs": stats.packs,
            "pages": stats.pages,
            "raw_bytes": stats.raw_bytes,
            "stored_bytes": stats.stored_bytes,
            "cache_bytes": stats.cache_bytes,
            "large_files": layers.files,
            "large_files_bytes": layers.bytes,
            "large_files_shared_bytes": layers.shared_bytes,
            "budget_bytes": self._budget,
            "tier": self._tier.name if self._tier else "",
            "snapshots": [
                {
                    "id": m.id,
                    "kind": m.kind,
                    "app": m.app,
                    "function": m.tag,
                    "parent": m.parent,
                    "form": m.form,
                    "raw_bytes": m.pages_bytes,
                    "stored_bytes": m.stored_bytes if m.form == "packed" else m.pages_bytes,
                    "fs_bytes": m.fs_bytes,
                    "pinned": self._catalogue.marked(m.id, PINNED),
                    "pushed": self._in_tier(m.id),
                }
                for m in self._catalogue.manifests()
            ],
        }

    async def close(self) -> None:
        """End. What is on its way to or from the tier is given up; whatever was begun is whole or not there."""
        self._closing = True
        self._transport.stop.set()
        self._transport.incoming.close()
        for arrival in self._arrivals.values():
            arrival.stop()
        for task in (self._collecting, self._going_on, self._looking):
            if task is not None:
                task.cancel()
        if self._tasks:
            _, late = await asyncio.wait(set(self._tasks), timeout=_CLOSE_S)
            if late:
                log.warning("%d pieces of work on snapshots are cut off", len(late))
                return
        await asyncio.to_thread(self._store.close)


async def _aside(work: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
    """The result of what may hang, in a thread of its own: whatever waits for a tier would take the few threads of
    `asyncio.to_thread` from starts, and hold up the exit."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def tell(result: T | None, error: BaseException | None) -> None:
        if not done.done():
            if error is not None:
                done.set_exception(error)
            else:
                done.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, error = None, None
        try:
            result = work(*args, **named)
        except BaseException as e:
            error = e
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(tell, result, error)

    threading.Thread(target=run, name="tier", daemon=True).start()
    return await done
