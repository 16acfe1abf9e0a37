"""Packs that are still on their way: a file of full length, and a map that says which of its pages are here.

The file lies in a folder of its own, so that nobody ever takes it for a pack. A page is written there only when it was
found to be what it is named for, and is marked only when it is written. Who reads the file looks at the map first: what
is not marked is a hole, and would read as zeroes.

The map goes with its process, the file stays when that dies: whoever goes on with the pack compares each page with its
name before it fetches it. So nothing has to be durable for that, in whatever order a power loss has kept it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from woodfrog.errors import IntegrityError, StoreError
from woodfrog.store.files import store_error
from woodfrog.store.folder import opened
from woodfrog.store.packs import BATCH, NAME, PAGE, pack_id, page_name
from woodfrog.store.pages import PageStore

__all__ = ["PartialPack", "PresentMap", "runs"]

_PAGES = 1 << 30
"""In one map, for all packs that come lazily in a process's life: 4 TiB. It takes memory only where it was written."""
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class PresentMap:
    """A byte for each page of packs on their way, shared with the page server. Its parts are never used again: somebody
    may still look at them.

    Args:
        pages: how many it can ever have.
    """

    def __init__(self, pages: int = _PAGES) -> None:
        self.fd = os.memfd_create("woodfrog-present", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, pages)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
            self._bytes = mmap.mmap(self.fd, pages)
        except BaseException:
            os.close(self.fd)
            raise
        self._pages, self._next = pages, 0
        self._mutex = threading.Lock()

    def take(self, pages: int) -> int:
        """A place for so many pages, none of them here.

        Raises:
            StoreError: it is used up (`map-full`).
        """
        with self._mutex:
            if pages > self._pages - self._next:
                raise StoreError("no more snapshots can come page by page before the next start", code="map-full")
            place, self._next = self._next, self._next + pages
            return place

    def mark(self, place: int, pages: int) -> None:
        self._bytes[place : place + pages] = b"\1" * pages

    def gap(self, place: int, end: int) -> int:
        """The first of some places that is not marked; -1 when all are."""
        return self._bytes.find(b"\0", place, end)


class PartialPack:
    """One pack on its way. Methods may be called from several threads; two must not put the same page at once.

    Args:
        pages: how many it has, as somebody says; `learn` finds out.
    """

    def __init__(self, store: PageStore, present: PresentMap, pack: str, pages: int) -> None:
        self.pack, self.pages = pack, pages
        self._store, self._present = store, present
        self.place = present.take(pages)
        self.names = b""
        folder = store.folder
        self.path = folder.part(pack, "part")
        self._mine = False
        """It can be gone on with; another process brings the same pack otherwise."""
        try:
            held = folder.hold_part(pack)
            self._mine = held is not None
            if held is None:
                self.path = folder.temporary("part")
                held = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            self.fd = held
            self._left = os.fstat(self.fd).st_size > 0
            os.ftruncate(self.fd, pages * PAGE)
        except OSError as e:
            raise store_error("cannot begin a pack", self.path, e) from e
        self._published = False

    def kept(self, form: str) -> Path | None:
        """Where its names, or its compressed form, are kept for whoever goes on with it; None: nowhere."""
        return self._store.folder.part(self.pack, form) if self._mine else None

    def known_names(self) -> bytes:
        """Its names, when somebody before has kept them; not checked."""
        path = self.kept("names")
        with suppress(OSError):
            return path.read_bytes() if path else b""
        return b""

    def learn(self, names: bytes) -> None:
        """Its names.

        Raises:
            IntegrityError: they are another pack's, or not so many.
        """
        if pack_id(names) != self.pack or len(names) != self.pages * NAME:
            raise IntegrityError(f"the pack {self.pack[:12]}… has other names", code="altered", pack=self.pack)
        self.names = names
        path = self.kept("names")
        if path is not None and not path.exists():
            with suppress(OSError):  # they are fetched again, at worst
                path.write_bytes(names)

    def recover(self, slot: int, count: int) -> bool:
        """Mark pages that are in the file already, if all of them are what they are named for."""
        if not self._left:
            return False
        for first in range(slot, slot + count, BATCH):
            pages = min(BATCH, slot + count - first)
            data = memoryview(os.pread(self.fd, pages * PAGE, first * PAGE))
            found = b"".join([page_name(data[i : i + PAGE]) for i in range(0, len(data), PAGE)])
            if found != self.names[first * NAME : (first + pages) * NAME]:
                return False
            self._present.mark(self.place + first, pages)
        return True

    def put(self, slot: int, data: bytes) -> None:
        """Write pages, verified, and mark them.

        Raises:
            IntegrityError: one of them is not what it is named for; none is written.
            StoreError: the disk is full.
        """
        view = memoryview(data)
        found = b"".join([page_name(view[i : i + PAGE]) for i in range(0, len(data), PAGE)])
        if not found or found != self.names[slot * NAME : slot * NAME + len(found)]:
            raise IntegrityError(
                f"the pack {self.pack[:12]}…: pages from {slot} on are not what they are named for",
                code="altered",
                pack=self.pack,
            )
        try:
            at = slot * PAGE
            while view:
                done = os.pwrite(self.fd, view, at)
                view, at = view[done:], at + done
        except OSError as e:
            raise store_error("cannot store pages", self.path, e) from e
        self._present.mark(self.place + slot, len(data) // PAGE)

    def has(self, slot: int, count: int) -> bool:
        return self._present.gap(self.place + slot, self.place + slot + count) < 0

    @property
    def whole(self) -> bool:
        return self.has(0, self.pages)

    def publish(self, delta: Path | None = None) -> None:
        """Make it a pack of the store: all of it must be here. Its own name stays, for whoever is about to open it.

        Args:
            delta: its compressed form; the pages are a cache then.

        Raises:
            StoreError: it could not be; it is as it was.
        """
        if self._published:
            return
        if not self.whole or not self.names:
            raise StoreError(f"the pack {self.pack[:12]}… is not whole", code="pack-missing", pack=self.pack)
        files = {"pages": self._store.folder.temporary("pages")}
        try:
            os.fsync(self.fd)
            os.link(self.path, files["pages"])
            if delta is not None:
                files["delta"] = self._store.folder.temporary("delta")
                os.link(delta, files["delta"])
                with opened(files["delta"]) as fd:
                    os.fsync(fd)
            self._store.publish(files, self.names, "")
        except OSError as e:
            raise store_error("cannot take in", self.path, e) from e
        finally:
            for path in files.values():
                path.unlink(missing_ok=True)
        self._published = True

    def close(self, *, keep: bool = False) -> None:
        """Give up its own name; whoever has it open keeps it.

        Args:
            keep: what has come, for whoever goes on with it.
        """
        if self.fd < 0:
            return
        with suppress(OSError):
            if self._mine and not keep:
                for form in ("names", "delta"):
                    self._store.folder.part(self.pack, form).unlink(missing_ok=True)
            if not (self._mine and keep):
                self._store.unlink_alias(self.pack, self.path)
        os.close(self.fd)  # which lets others have it
        self.fd = -1


def runs(slots: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Ranges (first, count), in order and joined where they touch."""
    begin = end = -1
    for first, count in [*sorted(slots), (1 << 62, 1)]:
        if first <= end:
            end = max(end, first + count)
            continue
        if end > begin:
            yield begin, end - begin
        begin, end = first, first + count
