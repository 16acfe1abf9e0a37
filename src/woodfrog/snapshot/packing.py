"""From a loose snapshot to a packed one: its memory goes into the page store, where equal pages are kept once.

A capture leaves all memory in CRIU's own pages files, since nobody should wait for more. Later, when nobody waits and
the first calls have shown which pages come first, each page that a page server would serve is put into the store; what
CRIU reads itself (stacks, shared memory) stays, in a file of the same size that is otherwise holes.
"""

from __future__ import annotations

import logging
import os
from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from woodfrog.criu.pagemap import INDEX, MAX_FILES, PageIndex, PageTask, read_index, write_index
from woodfrog.errors import IntegrityError, NotFoundError, StoreError
from woodfrog.faults import fault
from woodfrog.linux.pageserver import set_ranges
from woodfrog.snapshot.catalogue import Catalogue
from woodfrog.snapshot.manifest import Manifest
from woodfrog.store.files import fsync_dir, remove_tree, store_error
from woodfrog.store.pages import PageStore, Ref, Run

log = logging.getLogger("woodfrog")

__all__ = ["PACKED", "NotPackable", "Piece", "pieces", "prepare"]

PACKED = "img-packed"
"""Where a packed snapshot's images are, in its directory."""
_PAGE = 4096
_COPY = 1 << 20


class NotPackable(StoreError):
    """The snapshot stays as it is: its memory is not served by page."""


@dataclass(frozen=True)
class Piece:
    """Consecutive pages of a task, which lie consecutively in one pages file.

    Args:
        task: place in the index.
        first: of the working set.
        base: (page within the piece, the parent's pages at the same addresses).
    """

    task: int
    address: int
    pages: int
    file: int
    offset: int
    first: bool
    base: tuple[tuple[int, Ref], ...] = ()


def pieces(index: PageIndex, working_set: bytes = b"", parent: PageIndex | None = None) -> list[Piece]:
    """Cut the pages of an index at the borders of the working set, and find what the parent has at their addresses.

    Raises:
        ValueError: not a working set.
    """
    wanted: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for pid, pages, address in set_ranges(working_set) if working_set else ():
        wanted[pid].append((address, address + pages * _PAGE))
    lineage: dict[int, list[tuple[int, int, Ref]]] = defaultdict(list)
    for task in parent.tasks if parent else ():
        assert parent is not None
        for address, pages, offset, file in task.extents:
            if not parent.files[file].startswith("pages-"):
                ref = Ref(parent.files[file], offset // _PAGE, pages)
                lineage[task.pid].append((address, address + pages * _PAGE, ref))
    for ranges in wanted.values():
        ranges.sort()
    for spans in lineage.values():
        spans.sort(key=lambda span: span[0])
    found = []
    for number, task in enumerate(index.tasks):
        for address, pages, offset, file in task.extents:
            for begin, end, first in _cut(address, address + pages * _PAGE, wanted[task.pid]):
                base = _bases(begin, end, lineage[task.pid])
                found.append(Piece(number, begin, (end - begin) // _PAGE, file, offset + begin - address, first, base))
    return found


def _cut(begin: int, end: int, wanted: list[tuple[int, int]]) -> list[tuple[int, int, bool]]:
    """The parts of a range, and whether each is in one of the sorted, disjoint ranges `wanted`."""
    out = []
    at = begin
    for start, stop in wanted[max(0, bisect_right(wanted, (begin,)) - 1) :]:
        if start >= end:
            break
        start, stop = max(start, at), min(stop, end)
        if start >= stop:
            continue
        if at < start:
            out.append((at, start, False))
        out.append((start, stop, True))
        at = stop
    if at < end:
        out.append((at, end, False))
    return out


def _bases(begin: int, end: int, lineage: list[tuple[int, int, Ref]]) -> tuple[tuple[int, Ref], ...]:
    out = []
    for start, stop, ref in lineage[max(0, bisect_right(lineage, begin, key=lambda span: span[0]) - 1) :]:
        if start >= end:
            break
        low, high = max(start, begin), min(stop, end)
        if low < high:
            pages = (high - low) // _PAGE
            out.append(((low - begin) // _PAGE, Ref(ref.pack, ref.slot + (low - start) // _PAGE, pages)))
    return tuple(out)


def _packed_index(index: PageIndex, cut: list[Piece], refs: tuple[tuple[Ref, ...], ...]) -> PageIndex:
    """Where each page lies now. Zero pages are in no extent: the page server gives zeroes for what it does not know."""
    files = sorted({ref.pack for run in refs for ref in run if ref.pack})
    if len(files) > MAX_FILES:
        raise NotPackable(f"its pages would lie in {len(files)} packs, more than {MAX_FILES}", code="not-packable")
    number = {name: i for i, name in enumerate(files)}
    extents: list[list[tuple[int, int, int, int]]] = [[] for _ in index.tasks]
    for piece, run in zip(cut, refs, strict=True):
        address = piece.address
        for ref in run:
            if ref.pack:
                new = (address, ref.pages, ref.slot * _PAGE, number[ref.pack])
                mine = extents[piece.task]
                if mine and _follows(mine[-1], new):
                    mine[-1] = (mine[-1][0], mine[-1][1] + new[1], mine[-1][2], new[3])
                else:
                    mine.append(new)
            address += ref.pages * _PAGE
    tasks = tuple(PageTask(t.pid, tuple(e)) for t, e in zip(index.tasks, extents, strict=True))
    return replace(index, tasks=tasks, files=tuple(files))


def _follows(before: tuple[int, int, int, int], after: tuple[int, int, int, int]) -> bool:
    length = before[1] * _PAGE
    return before[3] == after[3] and before[0] + length == after[0] and before[2] + length == after[2]


def _keep_rest(source: Path, target: Path, packed: list[tuple[int, int]]) -> None:
    """Copy a pages file without the ranges (offset, pages) that are in the store."""
    with open(source, "rb", buffering=0) as old, open(target, "xb", buffering=0) as new:
        os.fchmod(new.fileno(), 0o600)
        size = os.fstat(old.fileno()).st_size
        os.truncate(new.fileno(), size)
        at = 0
        for offset, pages in [*sorted(packed), (size, 0)]:
            while at < offset:
                data = os.pread(old.fileno(), min(_COPY, offset - at), at)
                if not data:
                    raise OSError(5, f"{source} ends early")
                if data.count(0) != len(data):
                    os.pwrite(new.fileno(), data, at)
                at += len(data)
            at = max(at, offset + pages * _PAGE)


def _new_images(old: Path, new: Path, index: PageIndex, packed: PageIndex) -> None:
    """The images in their packed form: the same files, but for pages files and index."""
    if new.exists():
        remove_tree(new)
    new.mkdir(mode=0o700)
    ranges: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for task in index.tasks:
        for _, pages, offset, file in task.extents:
            ranges[file].append((offset, pages))
    holed = {index.files[file]: spans for file, spans in ranges.items()}
    for path in old.iterdir():
        if path.name == INDEX:
            (new / INDEX).write_bytes(write_index(packed))
        elif path.name in holed:
            _keep_rest(path, new / path.name, holed[path.name])
        else:
            os.link(path, new / path.name)
    fsync_dir(new)


def _stamps(images: Path) -> list[tuple[str, int, int, int]]:
    """What no write to a file leaves as it was."""
    with os.scandir(images) as entries:
        return sorted((e.name, i.st_ino, i.st_size, i.st_mtime_ns) for e in entries if (i := e.stat()))


def prepare(
    catalogue: Catalogue, store: PageStore, snapshot_id: str, *, working_set: bytes = b"", owner: str
) -> tuple[Manifest, Manifest]:
    """Put a loose snapshot's memory into the store, and its images in their packed form beside the loose ones.

    What it puts into the store is leased to `owner`, who swaps the images (`Catalogue.swap_images`) when no restore
    of this snapshot is under way, and then releases the lease.

    Returns:
        The manifest as it is, and as it will be.

    Raises:
        NotPackable: it stays loose.
        StoreError, IntegrityError: it could not be stored, or is not what it was.
    """
    opened = catalogue.open_verified(snapshot_id)
    manifest, images = opened.manifest, opened.images
    if manifest.form != "loose":
        raise NotPackable(f"snapshot {snapshot_id} is packed already", code="not-packable")
    before = _stamps(images)
    try:
        index = read_index((images / INDEX).read_bytes())
    except (OSError, ValueError) as e:
        raise NotPackable(f"snapshot {snapshot_id}: no page index: {e}", code="not-packable") from None
    parent = _parent_index(catalogue, manifest.parent)
    cut = pieces(index, working_set, parent)
    fds: list[int] = []
    try:
        fds += [os.open(images / name, os.O_RDONLY | os.O_CLOEXEC) for name in index.files]
        done = store.ingest([Run(fds[p.file], p.offset, p.pages, first=p.first, base=p.base) for p in cut], owner=owner)
        log.info(
            "snapshot %s: %d pages zero, %d as in the store, %d as deltas, %d new; %d bytes stored",
            snapshot_id, done.zero_pages, done.shared_pages, done.delta_pages, done.new_pages, done.stored_bytes,
        )  # fmt: skip
        fault("pack.ingested")
        packed = _packed_index(index, cut, done.refs)
        if _stamps(images) != before:  # it would be signed anew as it is now
            raise IntegrityError(f"snapshot {snapshot_id} was altered while it was packed", code="altered")
        _new_images(images, opened.path / PACKED, index, packed)
    except OSError as e:
        raise store_error("cannot pack the snapshot", opened.path, e) from e
    finally:
        for fd in fds:
            os.close(fd)
    new = replace(manifest, form="packed", images=PACKED, packs=done.packs, stored_bytes=done.stored_bytes)
    return manifest, new


def _parent_index(catalogue: Catalogue, parent: str) -> PageIndex | None:
    """Where the pages are that this snapshot's process began with; None where that is not known any more."""
    if not parent:
        return None
    try:
        manifest = catalogue.get(parent)
        if manifest.form != "packed":
            return None
        return read_index((catalogue.path(parent) / manifest.images / INDEX).read_bytes())
    except (NotFoundError, OSError, ValueError):
        return None
