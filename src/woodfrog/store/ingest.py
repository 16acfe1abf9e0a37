"""Storing a capture's pages: which are zeroes, which are there, which are close to their parent's, which are new."""

from __future__ import annotations

import itertools
import os
import sqlite3
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

from woodfrog.errors import IntegrityError, StoreError
from woodfrog.faults import fault
from woodfrog.store.index import page_key
from woodfrog.store.packs import (
    BATCH,
    FRAME,
    NAME,
    PAGE,
    ZERO,
    Delta,
    DeltaWriter,
    Ref,
    compress_frame,
    page_name,
    pread_full,
    write_full,
)

if TYPE_CHECKING:
    from woodfrog.store.pages import PageStore

__all__ = ["Ingest", "Ingested", "Run"]

MAX_PAGES = {False: 65536, True: 16384}
"""Pages of one raw pack (256 MiB) and of one delta pack, about: deltas are rebuilt whole, and collected in memory."""
MAX_FOUND_PACKS = 64
"""Packs beside those of its bases that one ingest takes pages from: every pack is a file to hold open and to keep."""
SPARSE = 8
"""Of such a pack at least one page in so many must be wanted; fewer are stored again, or a dead pack would be kept for
them, and the next capture would keep this one's for a few of its own."""


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive pages of a file, to be stored.

    `first`: of the working set; these pages go into packs of their own, in the order given. `base`: for some pages of
    the run (counted within it) the pages that the parent has at the same addresses; ascending, without overlap.
    """

    fd: int
    offset: int
    pages: int
    first: bool = False
    base: tuple[tuple[int, Ref], ...] = ()


@dataclass(frozen=True, slots=True)
class Ingested:
    """Where the pages are now. Every page is counted once, as zero, shared, new (stored whole) or delta."""

    refs: tuple[tuple[Ref, ...], ...]
    """For each run, in the order given."""
    packs: tuple[str, ...]
    """All that `refs` name."""
    raw_bytes: int
    stored_bytes: int
    """New bytes on disk."""
    new_pages: int
    delta_pages: int
    zero_pages: int
    shared_pages: int


@dataclass(eq=False)
class _Writer:
    """One pack being written."""

    handle: int
    path: Path
    fd: int
    delta: DeltaWriter | None
    content: blake3 | None
    names: bytearray = field(default_factory=bytearray)

    @property
    def pages(self) -> int:
        return len(self.names) // NAME


class Ingest:
    """One call of `PageStore.ingest`.

    A place is a pair (handle, slot). Handles stand for packs, of which new ones have no id yet; 0 is the zero page.
    """

    def __init__(self, store: PageStore, owner: str) -> None:
        self.store, self.owner = store, owner
        self.ids: list[str] = [""]
        self.handles: dict[str, int] = {"": 0}
        self.usable: dict[str, bool] = {}
        self.nums: dict[int, str] = {}
        self.found_packs = 0
        self.pending: dict[bytes, tuple[int, int]] = {}
        self.writers: dict[tuple[bool, bool], _Writer] = {}
        self.raw_files: dict[str, int] = {}
        self.deltas: dict[str, Delta] = {}
        self.lengths: dict[str, int] = {}
        self.counts: Counter[str] = Counter()
        self.stored = 0
        self.buffer = bytearray(BATCH * PAGE)
        self.page = memoryview(self.buffer)
        self.base = memoryview(bytearray(BATCH * PAGE))
        self.anchor: tuple[str, int] | None = None
        """A page of the lineage, for deltas of pages that have none of their own to rest on."""
        self.anchor_page = ZERO

    def __enter__(self) -> Ingest:
        return self

    def __exit__(self, *_: object) -> None:
        for writer in self.writers.values():
            os.close(writer.fd)
            writer.path.unlink(missing_ok=True)
        for fd in self.raw_files.values():
            os.close(fd)

    def run(self, runs: Sequence[Run], breathe: Callable[[], None] | None) -> Ingested:
        self._open_bases({ref.pack for run in runs for _, ref in run.base if ref.pack})
        refs: list[list[list[int]]] = [[] for _ in runs]
        for first in (True, False):
            for pieces in _batches(runs, first):
                places = self._batch(runs, pieces, first)
                for run, _, count, at in pieces:
                    _merge(refs[run], places[at : at + count])
                self._finish_full()
                if breathe is not None:
                    breathe()
        self._leave_sparse(runs, refs)
        for key in sorted(self.writers):
            self._finish(key)
        named = {self.ids[h] for run in refs for h, _, _ in run} - {""}
        return Ingested(
            tuple(tuple(Ref(self.ids[h], slot, n) for h, slot, n in run) for run in refs),
            tuple(sorted(named)),
            sum(run.pages for run in runs) * PAGE,
            self.stored,
            self.counts["new"],
            self.counts["delta"],
            self.counts["zero"],
            self.counts["shared"],
        )

    def _leave_sparse(self, runs: Sequence[Run], refs: list[list[list[int]]]) -> None:
        """Store again what was found in packs that are hardly needed otherwise."""
        wanted: Counter[int] = Counter()
        for handle, _, pages in itertools.chain.from_iterable(refs):
            wanted[handle] += pages
        names = {
            self.handles[pack]: self.store.folder.names(pack)
            for pack, good in self.usable.items()
            if good and pack in self.handles and pack not in self.lengths
        }
        sparse = {h: n for h, n in names.items() if wanted[h] and wanted[h] * SPARSE < len(n) // NAME}
        if not sparse:
            return
        again: dict[bytes, tuple[int, int]] = {}
        for number, page, place in _pages_of(refs):
            if place[0] in sparse:
                again.setdefault(sparse[place[0]][place[1] * NAME : (place[1] + 1) * NAME], (number, page))
        moved: dict[bytes, tuple[int, int]] = {}
        for first in (True, False):
            names_of = [name for name, (number, _) in again.items() if runs[number].first == first]
            for at in range(0, len(names_of), BATCH):
                moved |= self._store_again({n: again[n] for n in names_of[at : at + BATCH]}, runs, first)
        places: list[list[tuple[int, int]]] = [[] for _ in runs]
        for number, _, (handle, slot) in _pages_of(refs):
            place = (handle, slot)
            if handle in sparse:
                place = moved[sparse[handle][slot * NAME : (slot + 1) * NAME]]
            places[number].append(place)
        for number, of_run in enumerate(places):
            refs[number] = []
            _merge(refs[number], of_run)

    def _store_again(
        self, pages: dict[bytes, tuple[int, int]], runs: Sequence[Run], first: bool
    ) -> dict[bytes, tuple[int, int]]:
        """Store up to a batch of pages, each given as run and page in it."""
        for i, (name, (number, page)) in enumerate(pages.items()):
            view = self.page[i * PAGE : (i + 1) * PAGE]
            pread_full(runs[number].fd, view, runs[number].offset + page * PAGE)
            if page_name(view) != name:
                raise StoreError(f"run {number}: page {page} changed while it was stored")
        self._store(dict(enumerate(pages)), {}, first)
        self.counts["shared"] -= len(pages)
        places = {name: self.pending[name] for name in pages}
        self._finish_full()
        return places

    def _finish_full(self) -> None:
        for key, writer in list(self.writers.items()):
            if writer.pages >= MAX_PAGES[writer.delta is not None]:
                self._finish(key)

    def _handle(self, pack: str) -> int:
        if pack not in self.handles:
            self.handles[pack] = len(self.ids)
            self.ids.append(pack)
        return self.handles[pack]

    # Bases

    def _open_bases(self, packs: set[str]) -> None:
        """Lease and verify what the runs may rest on. One that is missing or damaged is done without."""
        store = self.store
        if not packs:
            return
        store.lease(packs, self.owner)
        for pack in sorted(packs):
            try:
                below = store.folder.bases_of(pack)
                for raw, path in store.open_raw(below or [pack]).items():
                    if raw not in self.raw_files:
                        self.raw_files[raw] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                if below:
                    self.deltas[pack] = store.delta_of(pack, store.folder.names(pack))
                self.usable[pack] = True
                self.lengths[pack] = len(store.folder.names(pack)) // NAME
            except IntegrityError:
                self.usable[pack] = False
            except StoreError as e:
                if e.code != "pack-missing":
                    raise
                self.usable[pack] = False

        if self.raw_files:
            self.anchor = min(self.raw_files), 0
            page = memoryview(bytearray(PAGE))
            pread_full(self.raw_files[self.anchor[0]], page, 0)
            self.anchor_page = bytes(page)

    def _compare(
        self, at: int, ref: Ref, places: list[tuple[int, int] | None]
    ) -> Iterator[tuple[int, tuple[str, int]]]:
        """Find the pages of the batch that are as their base. Yields the others, and the raw page that each may rest
        on, whose content is then in `self.base`."""
        buffer, handle = self.buffer, self._handle(ref.pack)
        begin, end = at * PAGE, (at + ref.pages) * PAGE
        if ref.pack in self.deltas:
            names, delta = self.store.folder.names(ref.pack), self.deltas[ref.pack]
            for i in range(ref.pages):
                name = page_name(self.page[begin + i * PAGE : begin + (i + 1) * PAGE])
                slot = ref.slot + i
                if name == names[slot * NAME : (slot + 1) * NAME]:
                    places[at + i] = (handle, slot)
                else:
                    raw, below = delta.base(slot)
                    view = self.base[begin + i * PAGE : begin + (i + 1) * PAGE]
                    pread_full(self.raw_files[raw], view, below * PAGE)
                    yield at + i, (raw, below)
            return
        pread_full(self.raw_files[ref.pack], self.base[begin:end], ref.slot * PAGE)
        if buffer.startswith(self.base[begin:end], begin):
            places[at : at + ref.pages] = [(handle, ref.slot + i) for i in range(ref.pages)]
            return
        for i in range(ref.pages):
            here = begin + i * PAGE
            if buffer.startswith(self.base[here : here + PAGE], here):
                places[at + i] = (handle, ref.slot + i)
            else:
                yield at + i, (ref.pack, ref.slot + i)

    # Pages

    def _batch(
        self, runs: Sequence[Run], pieces: list[tuple[int, int, int, int]], first: bool
    ) -> list[tuple[int, int]]:
        """The places of up to 256 pages, stored where they are new."""
        buffer = self.buffer
        total = pieces[-1][3] + pieces[-1][2]
        places: list[tuple[int, int] | None] = [None] * total
        rests: dict[int, tuple[str, int]] = {}
        for number, page, count, at in pieces:
            run = runs[number]
            try:
                pread_full(run.fd, self.page[at * PAGE : (at + count) * PAGE], run.offset + page * PAGE)
            except EOFError as e:
                raise StoreError(f"run {number}: {e} ({run.pages} pages from {run.offset})") from e
            for begin, ref in _overlapping(run, page, count):
                if ref.slot + ref.pages <= self.lengths.get(ref.pack, 0):
                    rests.update(self._compare(at + begin - page, ref, places))
        self.counts["shared"] += sum(p is not None for p in places)
        waiting: dict[bytes, list[int]] = {}
        for i in range(total):
            if places[i] is None:
                if buffer.startswith(ZERO, i * PAGE):
                    places[i] = (0, 0)
                    self.counts["zero"] += 1
                else:
                    waiting.setdefault(page_name(self.page[i * PAGE : (i + 1) * PAGE]), []).append(i)
        found = {n: p for n in waiting if (p := self.pending.get(n))}
        found.update(self._find([n for n in waiting if n not in found]))
        fresh = {i[0]: name for name, i in waiting.items() if name not in found}
        self.counts["shared"] += sum(map(len, waiting.values())) - len(fresh)
        self._store(fresh, rests, first)
        for name, positions in waiting.items():
            place = found.get(name) or self.pending[name]
            for i in positions:
                places[i] = place
        return [p for p in places if p is not None]

    def _find(self, names: list[bytes]) -> dict[bytes, tuple[int, int]]:
        """Where the store has some of these pages; the packs are leased."""
        if not names:
            return {}
        keys = {page_key(name): name for name in names}
        marks = ",".join("?" * len(keys))
        rows = self.store.index.query(
            f"SELECT key, pack, slot FROM pages WHERE key IN ({marks}) AND typeof(slot) = 'integer'", sorted(keys)
        )
        found = {}
        for key, num, slot in rows:
            name = keys[key]
            pack = self._pack(num)
            if pack and self._take(pack) and self.store.folder.names(pack)[slot * NAME : (slot + 1) * NAME] == name:
                found[name] = (self._handle(pack), slot)
        return found

    def _pack(self, num: int) -> str:
        if num not in self.nums:
            self.nums = dict(self.store.index.query("SELECT num, id FROM packs"))
            self.nums.setdefault(num, "")
        return self.nums[num]

    def _take(self, pack: str) -> bool:
        """Lease a pack that pages were found in, if it is good."""
        if pack in self.usable:
            return self.usable[pack]
        if self.found_packs >= MAX_FOUND_PACKS:
            self.usable[pack] = False
            return False
        store = self.store

        def work(connection: sqlite3.Connection) -> bool:
            for p in store.needs([pack]):
                row = connection.execute("SELECT bad FROM packs WHERE id = ?", (p,)).fetchone()
                if row != (0,) or not store.folder.is_whole(p):
                    return False
            store.index.lease(connection, [pack], self.owner)
            return True

        try:
            store.folder.names(pack)
            self.usable[pack] = store.index.write(work)
        except (IntegrityError, StoreError):
            self.usable[pack] = False
        fault("store.leased")
        self.found_packs += self.usable[pack]
        return self.usable[pack]

    def _store(self, fresh: dict[int, bytes], rests: dict[int, tuple[str, int]], first: bool) -> None:
        close = [i for i in fresh if i in rests]
        whole = [i for i in fresh if i not in rests]
        groups = [close[begin : begin + FRAME] for begin in range(0, len(close), FRAME)]
        if self.anchor is not None:
            # What is new in a child is compressed too: that it has a parent says that its kind is many.
            groups += [whole[begin : begin + FRAME] for begin in range(0, len(whole), FRAME)]
            whole = []
        for group in groups:
            pages = b"".join([self.page[i * PAGE : (i + 1) * PAGE] for i in group])
            below = [self.base[i * PAGE : (i + 1) * PAGE] if i in rests else self.anchor_page for i in group]
            frame = compress_frame(pages, b"".join(below))
            if 2 * len(frame) >= len(pages):
                whole.extend(group)
                continue
            writer = self._writer(first, True)
            assert writer.delta is not None
            writer.delta.add(frame, [rests.get(i, self.anchor or ("", 0)) for i in group])
            self._named(writer, [fresh[i] for i in group])
            self.counts["delta"] += len(group)
        if whole:
            whole.sort()
            writer = self._writer(first, False)
            data = b"".join([self.page[i * PAGE : (i + 1) * PAGE] for i in whole])
            write_full(writer.fd, data)
            if writer.content is not None:
                writer.content.update(data)
            self._named(writer, [fresh[i] for i in whole])
            self.counts["new"] += len(whole)

    def _named(self, writer: _Writer, names: list[bytes]) -> None:
        for slot, name in enumerate(names, writer.pages):
            self.pending[name] = (writer.handle, slot)
        writer.names += b"".join(names)

    # Packs

    def _writer(self, first: bool, delta: bool) -> _Writer:
        key = (not first, delta)
        if key not in self.writers:
            path = self.store.folder.temporary("delta" if delta else "pages")
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            self.ids.append("")
            content = blake3() if self.store.key and not delta else None
            self.writers[key] = _Writer(len(self.ids) - 1, path, fd, DeltaWriter() if delta else None, content)
        return self.writers[key]

    def _finish(self, key: tuple[bool, bool]) -> None:
        writer = self.writers[key]
        if writer.delta is not None:
            for part in writer.delta.encode():
                write_full(writer.fd, part)
        fault("store.written")
        os.fsync(writer.fd)
        files = {"pages" if writer.delta is None else "delta": writer.path}
        try:
            pack, stored = self.store.publish(files, bytes(writer.names), self.owner)
        finally:
            for path in files.values():
                path.unlink(missing_ok=True)
        if stored:
            self.store.seal(pack, writer.content)
        os.close(writer.fd)
        del self.writers[key]
        self.ids[writer.handle] = pack
        self.stored += stored
        self.pending = {n: p for n, p in self.pending.items() if p[0] != writer.handle}


def _batches(runs: Sequence[Run], first: bool) -> Iterator[list[tuple[int, int, int, int]]]:
    """All pages of some runs, 256 at a time, as pieces: run, page in the run, pages, page in the batch."""
    pieces: list[tuple[int, int, int, int]] = []
    at = 0
    for number, run in enumerate(runs):
        if run.first != first:
            continue
        page = 0
        while page < run.pages:
            count = min(run.pages - page, BATCH - at)
            pieces.append((number, page, count, at))
            page, at = page + count, at + count
            if at == BATCH:
                yield pieces
                pieces, at = [], 0
    if pieces:
        yield pieces


def _overlapping(run: Run, page: int, count: int) -> Iterator[tuple[int, Ref]]:
    """The parts of a run's bases that lie within some of its pages."""
    for begin, ref in itertools.islice(run.base, max(0, bisect_right(run.base, page, key=_begin) - 1), None):
        if begin >= page + count:
            return
        low, high = max(begin, page), min(begin + ref.pages, page + count)
        if low < high and ref.pack:
            yield low, Ref(ref.pack, ref.slot + low - begin, high - low)


def _begin(segment: tuple[int, Ref]) -> int:
    return segment[0]


def _pages_of(refs: list[list[list[int]]]) -> Iterator[tuple[int, int, tuple[int, int]]]:
    """Run, page in it, and place, of every page."""
    for number, run in enumerate(refs):
        page = 0
        for handle, slot, count in run:
            for i in range(count):
                yield number, page + i, (handle, slot + i if handle else 0)
            page += count


def _merge(refs: list[list[int]], places: list[tuple[int, int]]) -> None:
    for handle, slot in places:
        if refs and refs[-1][0] == handle and (handle == 0 or refs[-1][1] + refs[-1][2] == slot):
            refs[-1][2] += 1
        else:
            refs.append([handle, slot, 1])
