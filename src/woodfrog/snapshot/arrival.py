"""One snapshot on its way from a tier: thawed as soon as its working set is here, while the rest comes.

Until all of it is here and durable it lies in a staging directory that the next start of the daemon sweeps, and its
packs are no packs: for whoever looks later it was never here. What has come of packs waits for who fetches it next.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

from woodfrog.criu.pagemap import INDEX, PageIndex, read_index
from woodfrog.errors import IntegrityError, StoreError, WoodfrogError
from woodfrog.faults import fault
from woodfrog.linux.pageserver import Present
from woodfrog.snapshot.catalogue import WORKING_SET, Catalogue, Opened, Staging
from woodfrog.snapshot.incoming import PARALLEL, Incoming, Origin, Source, insist
from woodfrog.snapshot.manifest import Manifest
from woodfrog.snapshot.packing import pieces
from woodfrog.store.pages import PageStore

__all__ = ["Arrival"]

log = logging.getLogger("woodfrog")

_PAGE = 4096
_GIVE_UP_S = 300.0
"""So long the background tries to get what a tier does not give. Who waits for a page is told much sooner."""
_PAUSE_S = 5.0
_FINAL = ("disk-full", "map-full", "stopping", "tier-missing")
"""What does not get better while one waits. What is missing from a tier was collected: its snapshot was removed."""


class Arrival:
    """What has come of one snapshot. Its methods block: call them in a thread.

    Args:
        staging: with all of it but its packs, not checked yet.
        manifest: of a signature that was checked, as it will be here.
        owner: of its leases.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        store: PageStore,
        incoming: Incoming,
        staging: Staging,
        manifest: Manifest,
        owner: str,
    ) -> None:
        self.manifest = manifest
        self._catalogue, self._store, self._in = catalogue, store, incoming
        self._staging, self._owner = staging, owner
        self._sources: dict[str, Source] = {}
        self._whole: dict[str, Path] = {}
        self._names: tuple[str, ...] = ()
        self._over = threading.Event()

    def begin(self, origins: dict[str, Origin], *, urgent: bool = True) -> None:
        """Check what is here, and bring the working set.

        Args:
            origins: where the tier has its packs, and those that they rest on.
            urgent: somebody waits for it.

        Raises:
            IntegrityError: it is not what its manifest says.
            StoreError: the tier or the disk fails.
        """
        manifest = self.manifest
        self._catalogue.check(self._staging, manifest)
        self._catalogue.share(self._staging, manifest)
        self._store.lease([*manifest.packs, *origins], self._owner)
        self._in.know(origins)
        images = self._staging.path / manifest.images
        try:
            index = read_index((images / INDEX).read_bytes()) if manifest.form == "packed" else PageIndex((), ())
        except ValueError as e:
            raise IntegrityError(f"snapshot {manifest.id}: page index: {e}", code="unreadable") from e
        self._names = index.files
        here = []
        for pack in manifest.packs:
            if pack in self._sources or pack in here:
                continue
            if self._store.has(pack):
                here.append(pack)
            elif pack in origins:
                self._sources[pack] = self._in.source(pack, origins[pack])
            else:
                raise IntegrityError(f"snapshot {manifest.id}: the tier does not name pack {pack}", code="altered")
        self._whole = self._store.open_raw(here)
        fault("arrive.files")
        wanted = self._first(index)
        self._fetch([(s, piece) for s, slots in wanted.items() for piece in s.pieces(slots)], urgent=urgent)
        fault("arrive.ready")

    def _first(self, index: PageIndex) -> dict[Source, list[tuple[int, int]]]:
        """The pages of the working set, by where they come from."""
        path = self._staging.path / WORKING_SET
        try:
            cut = pieces(index, path.read_bytes() if path.exists() else b"")
        except ValueError:
            log.warning("snapshot %s: its working set is damaged; it is learned anew", self.manifest.id)
            path.unlink(missing_ok=True)
            return {}
        found: dict[Source, list[tuple[int, int]]] = defaultdict(list)
        for piece in cut:
            source = self._sources.get(index.files[piece.file])
            if piece.first and source is not None:
                found[source].append((piece.offset // _PAGE, piece.pages))
        return found

    def _fetch(self, todo: Iterable[tuple[Source, tuple[int, int]]], *, urgent: bool) -> None:
        def one(item: tuple[Source, tuple[int, int]]) -> None:
            source, (slot, count) = item
            if self._over.is_set():
                raise StoreError("the snapshot is not wanted any more", code="stopping")
            if source.has(slot, count):
                return
            with nullcontext() if urgent else self._in.turn():
                insist(lambda: source.ensure(slot, count), self._in.go_on)

        with ThreadPoolExecutor(PARALLEL, thread_name_prefix="arrive") as pool:
            waiting = [pool.submit(one, item) for item in todo]
            try:
                for future in waiting:
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def opened(self) -> Opened:
        """It as it is now, to be thawed; good until it is finished or given up."""
        images = self._staging.path / self.manifest.images
        files, places = [], []
        for name in self._names:
            source = self._sources.get(name)
            if source is not None:
                files.append(source.partial.path)
            else:
                files.append(self._whole.get(name) or images / name)
            places.append(source.partial.place if source is not None else None)
        present = Present(self._in.present.fd, tuple(places)) if self._sources else None
        packed = self.manifest.form == "packed"
        return Opened(self.manifest, self._staging.path, tuple(files) if packed else None, present)

    def rest(self) -> None:
        """Bring all that is not here yet, and make packs of it. It waits for a tier that is away for a while.

        Raises:
            IntegrityError: something is not what its name says: nobody should thaw it any more.
            StoreError: the tier stayed away, or the disk is full.
        """
        until = time.monotonic() + _GIVE_UP_S
        while True:
            try:
                self._bring_all()
                return
            except IntegrityError:
                raise
            except StoreError as e:
                if e.code in _FINAL or time.monotonic() > until:
                    raise
                log.warning("snapshot %s: %s; it is tried again", self.manifest.id, e.message)
            if self._over.wait(_PAUSE_S):
                raise StoreError("the snapshot is not wanted any more", code="stopping")
            self._in.go_on()

    def _bring_all(self) -> None:
        # What deltas rest on first: they are made of it.
        ordered = sorted(self._sources.values(), key=lambda s: (s.origin.kind == "delta", s.pack))
        for kind in ("pages", "delta"):
            mine = [s for s in ordered if s.origin.kind == kind]
            self._fetch([(s, piece) for s in mine for piece in s.pieces()], urgent=False)
        bases = {b for s in ordered for b in s.bases()}
        self._fetch([(b, piece) for b in bases for piece in b.pieces()], urgent=False)
        for source in ordered:
            source.publish()
            fault("arrive.pack")

    def finish(self) -> Manifest:
        """Make it a snapshot of this machine. Nobody may be about to thaw it, and its directory gets another name.

        Raises:
            IntegrityError, StoreError: it could not be; give it up then.
        """
        fault("arrive.whole")
        manifest = self._catalogue.admit(self._staging, self.manifest)
        self._end()
        return manifest

    def stop(self) -> None:
        """Bring no more."""
        self._over.set()

    def give_up(self, *, keep: bool = False) -> Path:
        """Leave what has come to those that run on it; the directory to be removed when they are gone.

        Args:
            keep: what has come of its packs, for the next daemon to go on with.
        """
        self.stop()
        self._end(keep=keep)
        return self._catalogue.set_aside(self._staging)

    def _end(self, *, keep: bool = False) -> None:
        sources, self._sources = list(self._sources.values()), {}
        self._in.release(sources, keep=keep)
        try:
            self._store.release(self._owner)
        except WoodfrogError as e:
            log.warning("snapshot %s: %s", self.manifest.id, e.message)
