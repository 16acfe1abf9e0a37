"""Packs that come page by page from a tier: what is wanted first, and in the background the rest.

A pack's cold form is frames of which each can be fetched and found genuine alone; its table (`.frames`) says where they
lie. A delta comes whole, for it is small, and its pages are made when the pages that they rest on are here. Each page
is verified by its name before anybody may see it (`store.partial`).
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from woodfrog.errors import IntegrityError, StoreError, WoodfrogError
from woodfrog.faults import fault
from woodfrog.store.cold import FrameReader, Key, decode_bytes, decode_file
from woodfrog.store.files import store_error
from woodfrog.store.folder import opened
from woodfrog.store.packs import BATCH, NAME, PAGE, Delta, pack_id, read_delta
from woodfrog.store.pages import PageStore
from woodfrog.store.partial import PartialPack, PresentMap, runs
from woodfrog.store.tiers import Tier

__all__ = ["Incoming", "Origin", "Source"]

PARALLEL = 8
"""Requests at a time, see benchmarks/README.md."""
URGENT = 4
"""Of their own, for pages that a process waits for."""
BESIDE = 2
"""Requests of the background while a process waits."""
PIECE = 2 << 20
"""Bytes of content asked for at once in the background: large enough that a request's latency costs little, small
enough that who waits for another page is not held up for long."""
_MAX_FRAME = 4 << 20
_TABLE_MAX = 1 << 20
_TRIES = 3
_PAUSE_S = 0.3


class Fetch(Protocol):
    """Brings an object whose content has no more than so many bytes."""

    def __call__(self, tier: Tier, key: str, target: Path, most: int) -> None: ...


@dataclass(frozen=True)
class Origin:
    """Where a pack is in a tier.

    Args:
        kind: "pages" or "delta".
        pages: how many it has, as the tier says; 0 = it does not.
    """

    tier: Tier
    prefix: str
    kind: str
    pages: int


class Source:
    """How the pages of one pack get here. What blocks here waits for the tier.

    Args:
        names: when they are known already.
    """

    def __init__(self, incoming: Incoming, pack: str, origin: Origin, names: bytes = b"") -> None:
        self.pack, self.origin = pack, origin
        self._in = incoming
        self._change = threading.Condition()
        self._coming: set[int] = set()
        self._here: set[int] = set()
        self._prepared = False
        self._preparing = threading.Lock()
        self._reader: FrameReader | None = None
        self._delta: Delta | None = None
        self._delta_file: Path | None = None
        self._firsts: list[int] = []
        self._bases: dict[str, Source | None] = {}
        self.users = 0
        self.partial = PartialPack(incoming.store, incoming.present, pack, origin.pages or len(names) // NAME)
        if names:
            self.partial.learn(names)

    def close(self, *, keep: bool = False) -> None:
        """
        Args:
            keep: what has come, for whoever goes on with it.
        """
        mine = self.partial.kept("delta")
        self.partial.close(keep=keep)
        if self._delta_file is not None and self._delta_file != mine:
            self._delta_file.unlink(missing_ok=True)

    # What it is made of

    def _key(self, suffix: str) -> str:
        return f"{self.origin.prefix}.{suffix}"

    def _prepare(self) -> None:
        with self._preparing:
            if self._prepared:
                return
            if not self.partial.names:
                known = self.partial.known_names()
                right = pack_id(known) == self.pack and len(known) == self.partial.pages * NAME
                self.partial.learn(known if right else self._in.names(self.pack, self.origin))
            if self.origin.kind == "delta":
                self._take_delta()
            else:
                self._take_table()
            self._prepared = True

    def _take_table(self) -> None:
        tier, key = self.origin.tier, self._key("frames")
        try:
            table = tier.get_bytes(key, 0, _TABLE_MAX)
        except StoreError as e:
            if e.code != "tier-missing":
                raise
            table = b""  # it was put there by an older version: it comes whole
        pages = self.partial.pages
        if table:
            reader = FrameReader(table, f"{tier.name}: {self._key('pages')}", self._in.key)
            if reader.size != pages * PAGE:
                raise IntegrityError(f"the pack {self.pack[:12]}… has another size", code="altered", pack=self.pack)
            if reader.frame <= _MAX_FRAME and reader.frame % PAGE == 0:
                self._reader = reader
        step = self._reader.frame // PAGE if self._reader else pages
        self._firsts = list(range(0, pages, step))

    def _take_delta(self) -> None:
        kept = self.partial.kept("delta")
        if self._delta_file is not None:  # of an attempt before
            self._delta_file.unlink(missing_ok=True)
        self._delta_file = kept or self._in.store.folder.temporary("delta.whole")
        delta = self._known_delta(kept) if kept else None
        if delta is None:
            self._fetch_delta(self._delta_file)
            delta = read_delta(self._delta_file)
        if delta.pages != self.partial.pages:
            raise IntegrityError(f"the pack {self.pack[:12]}…: names and delta differ", code="altered", pack=self.pack)
        for base in delta.bases:
            if base not in self._bases:
                self._bases[base] = self._in.base(self, base)
        at = 0
        for pages, _, _ in delta.frames:
            self._firsts.append(at)
            at += pages
        self._delta = delta

    def _known_delta(self, kept: Path) -> Delta | None:
        """The compressed form that somebody before has kept, if it is whole; what it makes is compared with names."""
        with suppress(OSError, IntegrityError):
            delta = read_delta(kept)
            if delta.pages == self.partial.pages:
                return delta
        return None

    def _fetch_delta(self, target: Path) -> None:
        cold = self._in.store.folder.temporary("delta.cold")
        try:
            most = self.partial.pages * (PAGE + 64) + self._in.names_max
            self._in.fetch(self.origin.tier, self._key("delta"), cold, most)
            decode_file(cold, target, key=self._in.key)
        finally:
            cold.unlink(missing_ok=True)

    # Bringing pages

    def has(self, slot: int, count: int) -> bool:
        return self.partial.has(slot, count)

    def ensure(self, slot: int, count: int) -> None:
        """Have some pages here.

        Raises:
            IntegrityError: they are not what they are named for, or cannot be read with this key.
            StoreError: the tier or the disk fails.
        """
        if slot < 0 or count < 1 or slot + count > self.partial.pages:
            raise StoreError(f"the pack {self.pack[:12]}… has no such pages", code="pack-missing", pack=self.pack)
        if self.has(slot, count):
            return
        self._prepare()
        first = bisect_right(self._firsts, slot) - 1
        last = bisect_right(self._firsts, slot + count - 1)
        while True:
            with self._change:
                missing = [g for g in range(first, last) if g not in self._here]
                mine = [g for g in missing if g not in self._coming]
                if not missing:
                    return
                if not mine:
                    self._change.wait(1.0)
                    continue
                self._coming.update(mine)
            try:
                for begin, groups in runs([(g, 1) for g in mine if not self._recovered(g)]):
                    self._bring(begin, groups)
            finally:
                with self._change:
                    self._coming.difference_update(mine)
                    self._change.notify_all()
                self._in.came(self)

    def _recovered(self, group: int) -> bool:
        """Whether pages that have to be fetched together are here from before."""
        first = self._firsts[group]
        end = self._firsts[group + 1] if group + 1 < len(self._firsts) else self.partial.pages
        if not self.partial.recover(first, end - first):
            return False
        self._done(group)
        return True

    def _done(self, group: int) -> None:
        with self._change:
            self._here.add(group)

    def _bring(self, first: int, count: int) -> None:
        self._in.go_on()
        if self._delta is not None:
            for group in range(first, first + count):
                self._make(self._delta, group)
        elif self._reader is not None:
            key = self._key("pages")
            begin, end = self._reader.place(first, count)
            data = self.origin.tier.get_bytes(key, begin, end)
            for group, content in enumerate(self._reader.open(first, count, data), first):
                self.partial.put(self._firsts[group], content)
                self._done(group)
                fault("arrive.page")
        else:
            self._bring_whole()

    def _bring_whole(self) -> None:
        store = self._in.store
        cold, plain = store.folder.temporary("pages.cold"), store.folder.temporary("pages.whole")
        try:
            self._in.fetch(self.origin.tier, self._key("pages"), cold, self.partial.pages * (PAGE + 64))
            decode_file(cold, plain, key=self._in.key)
            with open(plain, "rb") as f:
                for slot in range(0, self.partial.pages, BATCH):
                    self.partial.put(slot, f.read(BATCH * PAGE))
        finally:
            cold.unlink(missing_ok=True)
            plain.unlink(missing_ok=True)
        self._done(0)

    def _make(self, delta: Delta, group: int) -> None:
        """The pages of one frame of a delta."""
        slot = self._firsts[group]
        wanted: dict[str, list[tuple[int, int]]] = {}
        for page in range(slot, slot + delta.frames[group][0]):
            base, at = delta.base(page)
            wanted.setdefault(base, []).append((at, 1))
        with ExitStack() as stack:
            files = {}
            for base, slots in wanted.items():
                source = self._bases[base]
                if source is None:
                    files[base] = stack.enter_context(opened(self._in.store.open_raw([base])[base]))
                    continue
                for first, count in runs(slots):
                    source.ensure(first, count)
                files[base] = source.partial.fd
            self.partial.put(slot, delta.decode_frame(group, slot, files))
        self._done(group)

    def pieces(self, slots: Iterable[tuple[int, int]] | None = None) -> list[tuple[int, int]]:
        """Some of its pages, or all, cut into what is worth a request."""
        most = PIECE // PAGE
        out = []
        for first, count in runs(list(slots) if slots is not None else [(0, self.partial.pages)]):
            # Cut at the same places whoever asks, so that no frame is fetched twice.
            at = first
            while at < first + count:
                stop = min(first + count, (at // most + 1) * most)
                out.append((at, stop - at))
                at = stop
        return out

    def bases(self) -> list[Source]:
        """The sources of what it rests on; known once some of its pages are here."""
        return [source for source in self._bases.values() if source is not None]

    def publish(self) -> None:
        """Make it a pack of the store; what it rests on must be in it."""
        for source in self.bases():
            source.publish()
        with self._preparing:
            self.partial.publish(self._delta_file)


class Incoming:
    """All packs that are on their way to one store. Thread-safe.

    Args:
        go_on: raises when no more is to be fetched.
        names_max: bytes that the names of a pack may take.
    """

    def __init__(
        self, store: PageStore, key: Key | None, fetch: Fetch, go_on: Callable[[], None], names_max: int
    ) -> None:
        self.store, self.key, self.fetch, self.go_on, self.names_max = store, key, fetch, go_on, names_max
        self.present = PresentMap()
        self._mutex = threading.RLock()
        self._sources: dict[str, Source] = {}
        self._places: list[tuple[int, Source]] = []
        self._origins: dict[str, Origin] = {}
        self._later: list[tuple[Source, int, int, Callable[[bool], None]]] = []
        self._urgent = ThreadPoolExecutor(URGENT, thread_name_prefix="urgent")
        self._hurry = self._turns = 0
        self._idle = threading.Condition()

    def source(self, pack: str, origin: Origin) -> Source:
        """The one source of a pack; to be released."""
        # Not with the lock: whoever asks for a page must not wait for this.
        names = b"" if origin.pages or pack in self._sources else self.names(pack, origin)
        with self._mutex:
            source = self._sources.get(pack)
            if source is None:
                source = self._sources[pack] = Source(self, pack, origin, names)
                self._places.append((source.partial.place, source))
            source.users += 1
            return source

    def names(self, pack: str, origin: Origin) -> bytes:
        """Fetch the names of a pack's pages."""
        key, target = f"{origin.prefix}.names", self.store.folder.temporary("names.cold")
        try:
            self.fetch(origin.tier, key, target, self.names_max)
            names = decode_bytes(target.read_bytes(), key=self.key, what=key)
        except OSError as e:
            raise store_error("cannot fetch", target, e) from e
        finally:
            target.unlink(missing_ok=True)
        if not names or pack_id(names) != pack or len(names) % NAME:
            raise IntegrityError(f"the pack {pack[:12]}… has other names", code="altered", pack=pack)
        return names

    def know(self, origins: dict[str, Origin]) -> None:
        """Where packs are that some delta may rest on."""
        with self._mutex:
            self._origins.update(origins)

    def base(self, delta: Source, pack: str) -> Source | None:
        """What a delta rests on; released with the delta's arrival."""
        if pack not in self._sources and self.store.has(pack):
            return None
        origin = self._origins.get(pack)
        if origin is None or origin.kind != "pages":
            raise IntegrityError(f"the pack {delta.pack[:12]}… rests on one that is not there", code="altered")
        return self.source(pack, origin)

    def release(self, sources: Iterable[Source], *, keep: bool = False) -> None:
        """Nobody may begin to read them any more; processes that do go on as long as nothing of them is missing.

        Args:
            keep: what has come of them, for whoever goes on with it.
        """
        with self._mutex:
            for source in sources:
                source.users -= 1
                if source.users:
                    continue
                self.release(source.bases(), keep=keep)
                self._sources.pop(source.pack, None)
                self._places = [(place, s) for place, s in self._places if s is not source]
                source.close(keep=keep)
        self._answer_later()

    # What the page server asks for

    def need(self, place: int, pages: int, asked: bool, answer: Callable[[bool], None]) -> None:
        """Have pages come, by their place in the map; `answer` is called from some thread when they are here (True), or
        cannot be had.

        Args:
            asked: a process waits for them. Otherwise they come when their turn is.
        """
        source, slot = self._find(place)
        if source is None:
            # Whoever asks may have begun when its pack was on its way, which is whole or given up by now.
            answer(self.present.gap(place, place + pages) < 0)
        elif source.has(slot, pages):
            answer(True)
        elif asked:
            with suppress(RuntimeError):  # it is closed
                self._urgent.submit(self._bring, source, slot, pages, answer)
        else:
            with self._mutex:
                self._later.append((source, slot, pages, answer))
            self._answer_later()

    def _find(self, place: int) -> tuple[Source | None, int]:
        with self._mutex:
            number = bisect_right(self._places, place, key=lambda entry: entry[0]) - 1
            if number >= 0:
                begin, source = self._places[number]
                if place < begin + source.partial.pages:
                    return source, place - begin
        return None, 0

    def _bring(self, source: Source, slot: int, pages: int, answer: Callable[[bool], None]) -> None:
        with self.hurry():
            try:
                insist(lambda: source.ensure(slot, pages), self.go_on)
                here = True
            except Exception:  # whatever it is, who waits must be told
                here = source.has(slot, pages)
        answer(here)

    @contextmanager
    def hurry(self) -> Iterator[None]:
        """While somebody waits for what comes: the background gives way."""
        with self._idle:
            self._hurry += 1
        try:
            yield
        finally:
            with self._idle:
                self._hurry -= 1
                self._idle.notify_all()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """One request of the background: most of them wait while somebody waits for what comes, but not all, or a
        process that goes through its memory would have to ask for each part of it."""
        with self._idle:
            self._idle.wait_for(lambda: not self._hurry or self._turns < BESIDE)
            self._turns += 1
        try:
            yield
        finally:
            with self._idle:
                self._turns -= 1
                self._idle.notify_all()

    def came(self, source: Source) -> None:
        """Pages came."""
        if self._later:
            self._answer_later()

    def _answer_later(self) -> None:
        with self._mutex:
            known = set(self._sources.values())
            over = [w for w in self._later if w[0] not in known or w[0].has(w[1], w[2])]
            self._later = [w for w in self._later if w not in over]
        for source, slot, pages, answer in over:
            answer(source.has(slot, pages))

    def close(self) -> None:
        self._urgent.shutdown(wait=False, cancel_futures=True)


def insist(work: Callable[[], None], go_on: Callable[[], None], tries: int = _TRIES) -> None:
    """Do what a tier may fail at for a moment, so many times.

    Raises:
        WoodfrogError: what the last try came to; what cannot get better at once.
    """
    for left in range(tries - 1, -1, -1):
        try:
            work()
            return
        except WoodfrogError as e:
            if not left or isinstance(e, IntegrityError) or e.code in ("disk-full", "stopping", "map-full"):
                raise
        time.sleep(_PAUSE_S * (tries - left))
        go_on()
