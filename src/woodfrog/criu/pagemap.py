"""CRIU's page maps, and the page index made of them: where in the images each page of a task's memory lies.

A `pagemap-<pid>.img` is magic numbers, then length-prefixed protobuf messages: a head with the number of the pages
file, then entries. The present entries' pages lie in `pages-<n>.img` one after the other, in that order.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path

from woodfrog.criu.stats import fields_of

__all__ = ["INDEX", "PageTask", "build_index", "parse_pagemap", "read_index", "write_index"]

INDEX = "pages.idx"
"""The page index, beside the images."""

PAGE = 4096
_MAGICS = (0x54564319, 0x56084025)
_IN_PARENT, _LAZY, _PRESENT = 1, 2, 4
_HEAD = struct.Struct("=QII")
_TASK = struct.Struct("=iI")
_EXTENT = struct.Struct("=QQQ")
_INDEX_MAGIC = int.from_bytes(b"FROGIDX1", "little")


@dataclass(frozen=True)
class PageTask:
    """One task's lazy memory: `extents` are (address, pages, offset in bytes in `pages-<file>.img`)."""

    pid: int
    file: int
    extents: tuple[tuple[int, int, int], ...]


def parse_pagemap(data: bytes) -> tuple[int, tuple[tuple[int, int, int], ...]]:
    """Number of the pages file, and the extents CRIU leaves to a page server.

    Raises:
        ValueError: not a page map, or one that rests on a parent image.
    """
    if struct.unpack_from("<II", data) != _MAGICS:
        raise ValueError("not a page map")
    at, offset = 8, 0
    pages_file: int | None = None
    extents: list[tuple[int, int, int]] = []
    while at < len(data):
        (length,) = struct.unpack_from("<I", data, at)
        at += 4
        if at + length > len(data):
            raise ValueError("a truncated page map")
        values = {number: value for number, value in fields_of(data[at : at + length]) if isinstance(value, int)}
        at += length
        if pages_file is None:
            pages_file = values[1]
            continue
        # Newer versions write the count as field 5 and leave the older field 2 at 0.
        address, pages, flags = values[1], values.get(5) or values.get(2, 0), values.get(4, 0)
        if flags & _IN_PARENT:
            raise ValueError("a page map that rests on a parent")
        if not flags & _PRESENT:
            continue
        if flags & _LAZY:
            extents.append((address, pages, offset))
        offset += pages * PAGE
    if pages_file is None:
        raise ValueError("an empty page map")
    return pages_file, tuple(extents)


def write_index(tasks: list[PageTask]) -> bytes:
    """The page index as `native/pageserver.c` reads it; the tasks' pages files go with it in the same order."""
    out = [_HEAD.pack(_INDEX_MAGIC, len(tasks), 0)]
    out += [_TASK.pack(t.pid, len(t.extents)) for t in tasks]
    for task in tasks:
        out += [_EXTENT.pack(*e) for e in task.extents]
    return b"".join(out) + struct.pack(f"={len(tasks)}I", *(t.file for t in tasks))


def read_index(data: bytes) -> list[tuple[int, int]]:
    """(pid, number of its pages file) of each task of an index.

    Raises:
        ValueError: not an index.
    """
    try:
        magic, count, _ = _HEAD.unpack_from(data)
        pids = [_TASK.unpack_from(data, _HEAD.size + i * _TASK.size)[0] for i in range(count)]
        files = struct.unpack(f"={count}I", data[len(data) - 4 * count :])
    except struct.error as e:
        raise ValueError(f"a damaged page index: {e}") from None
    if magic != _INDEX_MAGIC:
        raise ValueError("not a page index")
    return list(zip(pids, files, strict=True))


def build_index(images: Path) -> list[PageTask]:
    """Read the page maps of a dump.

    Raises:
        ValueError: a page map that cannot be served lazily; the restore then reads everything, as plain CRIU does.
    """
    tasks = []
    for path in sorted(images.glob("pagemap-*.img")):
        found = re.fullmatch(r"pagemap-(\d+)\.img", path.name)
        if found is None:
            continue  # shared memory has page maps of its own (pagemap-shmem-…), which CRIU always reads itself
        number, extents = parse_pagemap(path.read_bytes())
        tasks.append(PageTask(int(found.group(1)), number, extents))
    return tasks
