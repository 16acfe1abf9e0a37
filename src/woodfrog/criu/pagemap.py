"""CRIU's page maps, and the page index made of them: where in the images each page of a task's memory lies.

A `pagemap-<pid>.img` is magic numbers, then length-prefixed protobuf messages: a head with the number of the pages
file, then entries. The present entries' pages lie in `pages-<n>.img` one after the other, in that order.
"""

from __future__ import annotations

import itertools
import os
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from woodfrog.criu.stats import encode_bytes, encode_int, fields_of

__all__ = [
    "INDEX",
    "MAX_FILES",
    "PageIndex",
    "PageTask",
    "build_index",
    "index_files",
    "keep_arguments",
    "keep_reservations",
    "parse_pagemap",
    "read_index",
    "unreserved",
    "wiped_on_fork",
    "write_index",
]

INDEX = "pages.idx"
"""The page index, beside the images."""

MAX_FILES = 190
"""Files of one index: a descriptor for each has to fit into one message to the page server."""

PAGE = 4096
_MAGICS = (0x54564319, 0x56084025)
_IN_PARENT, _LAZY, _PRESENT = 1, 2, 4
_HEAD = struct.Struct("=QII")
_TASK = struct.Struct("=iI")
_EXTENT = struct.Struct("=QQQII")
_NAME = 64
_MAX_TASKS = 1 << 16
_SET = struct.Struct("=QII")
_RANGE = struct.Struct("=iIQ")
_SET_MAGIC = int.from_bytes(b"FROGSET1", "little")
_MM_ARGUMENTS = (8, 9, 10, 11)
"""Where arguments begin and end, and environment."""
_MM_VMAS = 14
_VMA_END, _VMA_PROT, _VMA_FLAGS = 2, 5, 6
_WRITE, _PRIVATE, _NORESERVE = 2, 2, 0x4000
_LARGE = 1 << 30
_MADVISE_KEY = bytes([9 << 3])
_MADV_WIPEONFORK = 18
_INDEX_MAGIC = int.from_bytes(b"FROGIDX2", "little")


@dataclass(frozen=True)
class PageTask:
    """One task's lazy memory: `extents` are (address, pages, offset in bytes, number of file), in order and apart."""

    pid: int
    extents: tuple[tuple[int, int, int, int], ...]


@dataclass(frozen=True)
class PageIndex:
    """Where each page that a page server gives lies. One in no extent is zero.

    Args:
        files: what the extents' numbers mean: "pages-3.img", beside the index; or the id of a pack, 64 hex digits.
        wiped: (pid, pages, address) of memory that a fork empties for the child (MADV_WIPEONFORK): the kernel tells
            nobody, and the child must not be given its parent's pages.
    """

    tasks: tuple[PageTask, ...]
    files: tuple[str, ...]
    wiped: tuple[tuple[int, int, int], ...] = ()


@dataclass(frozen=True)
class _Entry:
    """Pages side by side: its message as it was read, and where that lies in the image."""

    message: dict[int, int]
    begin: int
    end: int

    @property
    def address(self) -> int:
        return self.message[1]

    @property
    def pages(self) -> int:
        # Newer versions write the count as field 5 and leave the older field 2 at 0.
        return self.message.get(5) or self.message.get(2, 0)

    @property
    def flags(self) -> int:
        return self.message.get(4, 0)

    def part(self, first: int, pages: int, flags: int) -> bytes:
        """Some of its pages, as an entry of its own."""
        changed = {1: self.address + first * PAGE, 4: flags} | {n: pages for n in (2, 5) if self.message.get(n)}
        body = b"".join(encode_int(n, v) for n, v in sorted((self.message | changed).items()))
        return struct.pack("<I", len(body)) + body


def _entries(data: bytes) -> Iterator[_Entry]:
    """The messages of a page map; the first one is its head."""
    if struct.unpack_from("<II", data) != _MAGICS:
        raise ValueError("not a page map")
    at = 8
    while at < len(data):
        (length,) = struct.unpack_from("<I", data, at)
        end = at + 4 + length
        if end > len(data):
            raise ValueError("a truncated page map")
        fields = {number: value for number, value in fields_of(data[at + 4 : end]) if isinstance(value, int)}
        yield _Entry(fields, at, end)
        at = end


def parse_pagemap(data: bytes) -> tuple[int, tuple[tuple[int, int, int], ...]]:
    """Number of the pages file, and the extents CRIU leaves to a page server.

    Raises:
        ValueError: not a page map, or one that rests on a parent image.
    """
    entries = _entries(data)
    head = next(entries, None)
    if head is None:
        raise ValueError("an empty page map")
    extents: list[tuple[int, int, int]] = []
    offset = 0
    for entry in entries:
        if entry.flags & _IN_PARENT:
            raise ValueError("a page map that rests on a parent")
        if not entry.flags & _PRESENT:
            continue
        if entry.flags & _LAZY:
            extents.append((entry.address, entry.pages, offset))
        offset += entry.pages * PAGE
    return head.message[1], tuple(extents)


def _read_by_criu(data: bytes, begin: int, end: int) -> bytes:
    """A page map whose pages in [begin, end) CRIU does not leave to a page server."""
    out, copied = [], 0
    entries = _entries(data)
    next(entries)
    for entry in entries:
        first = min(max((begin - entry.address) // PAGE, 0), entry.pages)
        last = min(max(-(-(end - entry.address) // PAGE), first), entry.pages)
        if first == last or not entry.flags & _LAZY:
            continue
        out.append(data[copied : entry.begin])
        for start, stop, flags in (
            (0, first, entry.flags), (first, last, entry.flags & ~_LAZY), (last, entry.pages, entry.flags),
        ):  # fmt: skip
            if stop > start:
                out.append(entry.part(start, stop - start, flags))
        copied = entry.end
    return b"".join((*out, data[copied:]))


def keep_arguments(images: Path) -> None:
    """Let CRIU itself read the pages with each task's arguments and environment.

    /proc/PID/cmdline and environ show another process only what is in memory: the kernel asks no page server for it.

    Raises:
        ValueError: an image that is not what it should be; nothing was changed in it.
    """
    for path in sorted(images.glob("pagemap-*.img")):
        pid = _pid_of(path)
        maps = images / f"mm-{pid}.img"
        if pid is None or not maps.exists():
            continue
        known = itertools.takewhile(lambda field: field[0] <= _MM_ARGUMENTS[-1], _of_maps(maps.read_bytes()))
        bounds = [value for n, value in known if n in _MM_ARGUMENTS and isinstance(value, int) and value]
        if bounds:
            data = path.read_bytes()
            kept = _read_by_criu(data, min(bounds) & -PAGE, max(bounds))
            if kept != data:
                path.write_bytes(kept)


def keep_reservations(images: Path) -> None:
    """Let maps that only reserve addresses be mapped again, however large they are.

    CRIU maps what is private writable, to begin with: of a page server's memory all, of any other what a child has in
    common with its parent. The kernel refuses that of more than the machine has, as a browser's reservation of a
    terabyte. With MAP_NORESERVE it does not count what nobody may write to.

    Raises:
        ValueError: an image that is not what it should be; nothing was changed in it.
    """
    for path in sorted(images.glob("mm-*.img")):
        data = path.read_bytes()
        kept = unreserved(data)
        if kept != data:
            path.write_bytes(kept)


def unreserved(mm: bytes) -> bytes:
    """An image of a task's maps in which large ones that are private and not writable reserve no memory."""
    fields = list(_of_maps(mm))
    changed = [(n, _unreserved(v) if n == _MM_VMAS and isinstance(v, bytes) else v) for n, v in fields]
    if changed == fields or _maps_image(mm, fields) != mm:  # else there is more in it than is understood here
        return mm
    return _maps_image(mm, changed)


def _unreserved(vma: bytes) -> bytes:
    # Of a thousand maps, few are large: the others are read no further.
    begin, end = itertools.islice(fields_of(vma), 2)
    if end[0] != _VMA_END or not isinstance(begin[1], int) or not isinstance(end[1], int) or end[1] - begin[1] < _LARGE:
        return vma
    fields = {n: v for n, v in fields_of(vma) if isinstance(v, int)}
    if fields[_VMA_PROT] & _WRITE or not fields[_VMA_FLAGS] & _PRIVATE:
        return vma
    fields[_VMA_FLAGS] |= _NORESERVE
    return b"".join(encode_int(n, v) for n, v in fields.items())


def _maps_image(mm: bytes, fields: Iterable[tuple[int, int | bytes]]) -> bytes:
    """`mm` with other fields."""
    body = b"".join(encode_int(n, v) if isinstance(v, int) else encode_bytes(n, v) for n, v in fields)
    return mm[:8] + struct.pack("<I", len(body)) + body


def write_index(index: PageIndex) -> bytes:
    """The page index as `native/pageserver.c` reads it."""
    out = [_HEAD.pack(_INDEX_MAGIC, len(index.tasks), len(index.files))]
    out += [_TASK.pack(t.pid, len(t.extents)) for t in index.tasks]
    for task in index.tasks:
        out += [_EXTENT.pack(*e, 0) for e in task.extents]
    out += [name.encode().ljust(_NAME, b"\0") for name in index.files]
    if index.wiped:
        out += [_SET.pack(_SET_MAGIC, len(index.wiped), 0), *(_RANGE.pack(*r) for r in index.wiped)]
    return b"".join(out)


def read_index(data: bytes) -> PageIndex:
    """The opposite of `write_index`.

    Raises:
        ValueError: not an index.
    """
    heads, at, files, rest = _parts(data, len(data))
    tasks = []
    for pid, count in heads:
        end = at + count * _EXTENT.size
        tasks.append(PageTask(pid, tuple(e[:4] for e in _EXTENT.iter_unpack(data[at:end]))))
        at = end
    return PageIndex(tuple(tasks), _names(data[files:rest]), _wiped(data[rest:]))


def index_files(path: Path) -> tuple[str, ...]:
    """The files that an index points into, without reading all of it: there may be a million extents.

    Raises:
        ValueError: not an index.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD.size)
        if len(head) == _HEAD.size:
            head += file.read(min(_HEAD.unpack(head)[1], _MAX_TASKS) * _TASK.size)
        _, _, files, end = _parts(head, file.seek(0, os.SEEK_END))
        file.seek(files)
        return _names(file.read(end - files))


def _parts(data: bytes, size: int) -> tuple[list[tuple[int, int]], int, int, int]:
    """(pid, extents) of each task, where the extents begin, where the files do, and where these end."""
    try:
        magic, tasks, files = _HEAD.unpack_from(data)
        if magic != _INDEX_MAGIC:
            raise ValueError("not a page index")
        heads: list[tuple[int, int]] = list(_TASK.iter_unpack(data[_HEAD.size : _HEAD.size + tasks * _TASK.size]))
    except struct.error as e:
        raise ValueError(f"a damaged page index: {e}") from None
    begin = _HEAD.size + tasks * _TASK.size
    end = begin + sum(count for _, count in heads) * _EXTENT.size
    rest = size - end - files * _NAME
    if len(heads) != tasks or rest < 0 or (rest and (rest <= _SET.size or rest % _RANGE.size)):
        raise ValueError("a damaged page index: its size is wrong")
    return heads, begin, end, end + files * _NAME


def _names(data: bytes) -> tuple[str, ...]:
    try:
        return tuple(data[at : at + _NAME].rstrip(b"\0").decode("ascii") for at in range(0, len(data), _NAME))
    except UnicodeDecodeError:
        raise ValueError("a damaged page index: not a file's name") from None


def _wiped(data: bytes) -> tuple[tuple[int, int, int], ...]:
    if not data:
        return ()
    magic, count, _ = _SET.unpack_from(data)
    if magic != _SET_MAGIC or len(data) != _SET.size + count * _RANGE.size:
        raise ValueError("a damaged page index: what follows the files")
    return tuple(_RANGE.iter_unpack(data[_SET.size :]))


def _of_maps(mm: bytes) -> Iterator[tuple[int, int | bytes]]:
    _, _, length = struct.unpack_from("<III", mm)
    return fields_of(mm[12 : 12 + length])


def wiped_on_fork(mm: bytes) -> list[tuple[int, int]]:
    """(address, pages) of the maps with MADV_WIPEONFORK, from CRIU's image of a task's maps (`mm-<pid>.img`)."""
    found = []
    for number, value in _of_maps(mm):
        if number != _MM_VMAS or not isinstance(value, bytes) or _MADVISE_KEY not in value:
            continue  # of a thousand maps, few have any advice
        vma = {n: v for n, v in fields_of(value) if isinstance(v, int)}
        if vma.get(9, 0) >> _MADV_WIPEONFORK & 1:
            found.append((vma[1], (vma[2] - vma[1]) // PAGE))
    return found


def _pid_of(pagemap: Path) -> int | None:
    """None: shared memory's (pagemap-shmem-…), which CRIU always reads itself."""
    found = re.fullmatch(r"pagemap-(\d+)\.img", pagemap.name)
    return int(found.group(1)) if found else None


def build_index(images: Path) -> PageIndex:
    """Read the page maps of a dump.

    Raises:
        ValueError: a page map that cannot be served lazily; the restore then reads everything, as plain CRIU does.
    """
    tasks = []
    files: list[str] = []
    wiped: list[tuple[int, int, int]] = []
    for path in sorted(images.glob("pagemap-*.img")):
        pid = _pid_of(path)
        if pid is None:
            continue
        number, extents = parse_pagemap(path.read_bytes())
        tasks.append(PageTask(pid, tuple((*e, len(files)) for e in extents)))
        files.append(f"pages-{number}.img")
        maps = images / f"mm-{pid}.img"
        if maps.exists():
            wiped += ((pid, pages, at) for at, pages in wiped_on_fork(maps.read_bytes()))
    return PageIndex(tuple(tasks), tuple(files), tuple(wiped))
