"""What is in a snapshot's memory and why it is big; what differs between two, or between one and a running container.

Pages are streamed, so that memory use does not grow with the snapshot's. The daemon runs it as a process of its own
(`python -m woodfrog.snapshot.contents`, a request on stdin, JSON on stdout): seconds of looking at bytes would keep its
event loop waiting.

What anonymous memory holds is told by what allocators leave in it: CPython's pools of small objects and glibc's
large blocks have headers that little else looks like.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from woodfrog.criu.pagemap import PAGE
from woodfrog.engine.plan import FACTS, parse_facts
from woodfrog.snapshot.memory import (
    ANONYMOUS,
    GPU,
    HEAP,
    LIBRARY,
    SHARED,
    Area,
    Memory,
    PageReader,
    areas_of_process,
    cut,
    library_of,
    load,
    mark,
    read_areas,
)

__all__ = ["Chunk", "answer", "contents", "difference", "walk"]

CHUNK = 256
"""Pages read at a time."""
PYTHON = "python objects"
BLOCKS = "large blocks"
FREE = "free heap"

_ZEROES = bytes(CHUNK * PAGE)
_ZERO = bytes(PAGE)
_POOL = 16384
_POOL_FIELDS = struct.Struct("<III")
_CHUNK_HEAD = struct.Struct("<QQ")
_LEAST_BLOCK = 64 << 10
_LEAST_CHUNK, _LEAST_FREE = 32, 2 * PAGE
_MOST_CHUNKS = 20_000_000
"""Chunks of a heap that are looked at; beyond, it is not told what is free."""
_BLOCK_PLACES = (0, 48, 112, 240, 496, 1008, 2032, 4080)
"""Where in its first page a large block's header is: at its start, or moved there by an alignment of 64, 128, …"""


def _is_pool(data: bytes, at: int) -> bool:
    """Whether a pool of CPython's small objects begins here: its last fields follow from its size class."""
    size_class, next_offset, last_offset = _POOL_FIELDS.unpack_from(data, at + 36)
    return bool(size_class < 32) and last_offset == _POOL - (size_class + 1) * 16 and 48 <= next_offset <= _POOL


def _block(data: bytes, at: int, room: int) -> int:
    """Length of the block of glibc's malloc that was mapped on its own and begins with this page; 0 = none."""
    for place in _BLOCK_PLACES:
        if data[at + place + 8] & 7 != 2:
            continue
        before, size = _CHUNK_HEAD.unpack_from(data, at + place)
        length = place + (size & ~7)
        if before == place and length % PAGE == 0 and _LEAST_BLOCK <= length <= room:
            return int(length)
    return 0


@dataclass(frozen=True)
class Chunk:
    """Pages of one area, and the kind of each."""

    area: Area
    address: int
    data: bytes
    kinds: list[str]


class _Heap:
    """Follows the chunks of glibc's malloc through a heap, which begins with one.

    Pages wholly inside a free chunk or a large one are told apart; what is in the caches of threads counts as used.
    """

    def __init__(self, pid: int, begin: int, end: int, reader: PageReader) -> None:
        self._pid, self.end, self._reader = pid, end, reader
        self._next = begin
        self._left = _MOST_CHUNKS
        self._marked = (0, 0, HEAP)

    def kinds(self, address: int, data: bytes, rest: str) -> list[str]:
        """The kind of each page, to be asked in order; `rest` where nothing more is known."""
        kinds = [rest] * (len(data) // PAGE)
        self._mark(kinds, address)
        if self._next < address:  # the header is in a page that is not there
            return kinds
        words = memoryview(data).cast("Q")
        end = address + len(data)
        while self._next < end and self._left > 0:
            size = words[(self._next - address) // 8 + 1] & ~7
            after = self._next + size
            if size < _LEAST_CHUNK or size & 15 or after > self.end:
                self._left = 0
                break
            if size >= _LEAST_FREE:
                kind = self._kind(after, size)
                if kind != HEAP:
                    self._marked = (-(-(self._next + 16) // PAGE) * PAGE, after // PAGE * PAGE, kind)
                    self._mark(kinds, address)
            self._next = after
            self._left -= 1
        return kinds

    def _kind(self, after: int, size: int) -> str:
        if after >= self.end:
            return FREE  # the top, from which more is taken
        page = self._reader.read(self._pid, after // PAGE * PAGE, 1)
        used = page[after % PAGE + 8] & 1
        return FREE if not used else BLOCKS if size >= _LEAST_BLOCK else HEAP

    def _mark(self, kinds: list[str], address: int) -> None:
        begin, end, kind = self._marked
        low, high = max(begin, address), min(end, address + len(kinds) * PAGE)
        if low < high:
            first, last = (low - address) // PAGE, (high - address) // PAGE
            kinds[first:last] = [kind] * (last - first)


class _Anonymous:
    """Tells CPython's pools and malloc's large blocks from the rest of anonymous memory up to `end`."""

    def __init__(self, end: int) -> None:
        self.end = end
        self._until, self._kind = 0, ANONYMOUS

    def kinds(self, address: int, data: bytes, rest: str) -> list[str]:
        """The kind of each page, to be asked in order; `rest` where nothing more is known."""
        kinds: list[str] = []
        pages = len(data) // PAGE
        while len(kinds) < pages:
            page = len(kinds)
            here = address + page * PAGE
            if here < self._until:
                kinds += [self._kind] * min((self._until - here) // PAGE, pages - page)
            elif here % _POOL == 0 and _is_pool(data, page * PAGE):
                self._until, self._kind = min(here + _POOL, self.end), PYTHON
            elif length := _block(data, page * PAGE, self.end - here):
                self._until, self._kind = here + length, BLOCKS
            else:
                kinds.append(rest)
        return kinds


def _is_anonymous(area: Area) -> bool:
    # What follows a library's data may have grown together with it.
    return area.kind == ANONYMOUS or (area.kind == LIBRARY and not area.backed)


def _end(areas: list[Area], number: int) -> int:
    """Where the memory of this kind ends: advice splits a mapping in the middle of what it holds."""
    heap, end = areas[number].kind == HEAP, areas[number].end
    for area in areas[number + 1 :]:
        if area.begin != end or not (area.kind == HEAP if heap else _is_anonymous(area)):
            break
        end = area.end
    return end


def walk(memory: Memory, reader: PageReader) -> Iterator[Chunk]:
    """All resident pages of a process, in order."""
    look: _Heap | _Anonymous | None = None
    for number, area in enumerate(memory.areas):
        if area.kind == SHARED or area.begin >= 1 << 47:
            continue
        if look is None or area.begin >= look.end:
            look = None
            if area.kind == HEAP:
                look = _Heap(memory.pid, area.begin, _end(memory.areas, number), reader)
            elif _is_anonymous(area):
                look = _Anonymous(_end(memory.areas, number))
        for span in reader.within(memory.pid, area.begin, area.end):
            for at in range(span.address, span.end, CHUNK * PAGE):
                part = cut(span, at, min(span.end, at + CHUNK * PAGE))
                data = load(part)
                yield Chunk(area, at, data, look.kinds(at, data, area.kind) if look else [area.kind] * part.pages)


def _zeroes(data: bytes) -> list[bool]:
    pages = len(data) // PAGE
    if data == _ZEROES[: len(data)]:
        return [True] * pages
    return [data[at : at + PAGE] == _ZERO for at in range(0, len(data), PAGE)]


def _same(data: bytes, address: int, pid: int, other: PageReader) -> list[bool | None]:
    """For each page whether the other has the same at its address; None where it has none."""
    out: list[bool | None] = [None] * (len(data) // PAGE)
    for span in other.within(pid, address, address + len(data)):
        theirs = load(span)
        begin = span.address - address
        first = begin // PAGE
        if theirs == data[begin : begin + len(theirs)]:
            out[first : first + span.pages] = [True] * span.pages
            continue
        for number in range(span.pages):
            at = number * PAGE
            out[first + number] = theirs[at : at + PAGE] == data[begin + at : begin + at + PAGE]
    return out


@dataclass
class Sum:
    """Bytes of pages: all, of zeroes only, and equal to the parent's at the same address."""

    resident: int = 0
    zero: int = 0
    shared: int = 0

    def add(self, zero: bool, shared: bool) -> None:
        self.resident += PAGE
        if zero:
            self.zero += PAGE
        if shared:
            self.shared += PAGE

    def row(self) -> dict[str, int]:
        return {"resident_bytes": self.resident, "zero_bytes": self.zero, "shared_bytes": self.shared}


@dataclass
class _Tally:
    """Sums of everything that is asked for, at one go."""

    all: Sum = field(default_factory=Sum)
    kinds: dict[str, Sum] = field(default_factory=lambda: defaultdict(Sum))
    libraries: dict[str, Sum] = field(default_factory=lambda: defaultdict(Sum))
    files: dict[str, Sum] = field(default_factory=lambda: defaultdict(Sum))
    areas: dict[Area, Sum] = field(default_factory=lambda: defaultdict(Sum))
    parts: dict[Area, dict[str, int]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(int)))

    def take(self, area: Area, kinds: list[str], zeroes: list[bool], same: list[bool | None]) -> None:
        library = library_of(area.name) if area.kind == LIBRARY and area.name else ""
        groups: dict[str, list[Sum]] = {}
        for kind, zero, shared in zip(kinds, zeroes, same, strict=True):
            sums = groups.get(kind)
            if sums is None:
                sums = groups[kind] = [self.all, self.kinds[kind], self.areas[area]]
                if area.name and kind == area.kind:
                    sums.append(self.files[area.name])
                    if library:
                        sums.append(self.libraries[library])
            for total in sums:
                total.add(zero, shared is True)
        for kind in groups:
            self.parts[area][kind] += kinds.count(kind) * PAGE


def _ordered(sums: Mapping[str, Sum], name: str) -> list[dict[str, Any]]:
    rows = sorted(sums.items(), key=lambda item: -item[1].resident)
    return [{name: key, **total.row()} for key, total in rows if total.resident]


def contents(
    memories: list[Memory], reader: PageReader, parent: PageReader | None = None, *, most: int = 50
) -> dict[str, Any]:
    """What is in a snapshot, the biggest first.

    Args:
        parent: the pages of the snapshot its process went on from.
        most: mappings told of each process, and files.

    Returns:
        `resident_bytes`, `zero_bytes`, `shared_bytes`; the same for each of `kinds`, `libraries`, `files` and, in
        `processes`, of `mappings` (with `begin`, `end`, `kind`, `name` and `parts`, bytes by kind).
    """
    nothing = PageReader({})
    whole = _Tally()
    processes = []
    counted: set[int] = set()
    for memory in memories:
        mine = _Tally()
        for chunk in walk(memory, reader):
            zeroes = _zeroes(chunk.data)
            same = _same(chunk.data, chunk.address, memory.pid, parent or nothing)
            for tally in (whole, mine):
                tally.take(chunk.area, chunk.kinds, zeroes, same)
        for area in memory.areas:
            if area.kind == SHARED and area.shared_id and area.shared_id not in counted:
                counted.add(area.shared_id)
                _shared_memory(area, reader, (whole, mine))
        rows = sorted(mine.areas.items(), key=lambda item: -item[1].resident)
        mappings = [{**_area_row(area, mine.parts[area]), **total.row()} for area, total in rows]
        processes.append(
            {
                "pid": memory.pid,
                "comm": memory.comm,
                **mine.all.row(),
                "mapped": len(memory.areas),
                "mappings": mappings[:most],
            }
        )
    return {
        **whole.all.row(),
        "kinds": _ordered(whole.kinds, "kind"),
        "libraries": _ordered(whole.libraries, "library"),
        "files": _ordered(whole.files, "file")[:most],
        "processes": sorted(processes, key=lambda p: -int(p["resident_bytes"])),
    }


def _shared_memory(area: Area, reader: PageReader, tallies: tuple[_Tally, ...]) -> None:
    """Count a shared memory object."""
    for span in reader.spans(-area.shared_id):
        for at in range(span.address, span.end, CHUNK * PAGE):
            zeroes = _zeroes(load(cut(span, at, min(span.end, at + CHUNK * PAGE))))
            for tally in tallies:
                tally.take(area, [SHARED] * len(zeroes), zeroes, [None] * len(zeroes))


def _area_row(area: Area, parts: Mapping[str, int]) -> dict[str, Any]:
    """An area is of the kind that most of it is."""
    kind = max(parts, key=lambda k: parts[k]) if parts else area.kind
    name = area.name if kind == area.kind else ""
    row = {"begin": f"{area.begin:x}", "end": f"{area.end:x}", "kind": kind, "name": name}
    return {**row, "parts": dict(sorted(parts.items(), key=lambda p: -p[1]))}


# --- what differs ----------------------------------------------------------------------------------------------------


@dataclass
class _Change:
    changed: int = 0
    new: int = 0

    def row(self) -> dict[str, int]:
        return {"changed": self.changed, "new": self.new, "bytes": (self.changed + self.new) * PAGE}


def difference(before: PageReader, after: PageReader, memories: list[Memory], *, most: int = 20) -> dict[str, Any]:
    """Which pages differ.

    Args:
        memories: of `after`.
        most: ranges of addresses told.

    Returns:
        Pages `same`, `changed`, `new` (only after) and `gone` (only before); `bytes` of changed and new ones; these by
        `kinds`, `libraries`, `mappings`; and the first `ranges`.
    """
    kinds: dict[str, _Change] = defaultdict(_Change)
    libraries: dict[str, _Change] = defaultdict(_Change)
    areas: dict[tuple[int, Area], _Change] = defaultdict(_Change)
    parts: dict[tuple[int, Area], dict[str, int]] = defaultdict(lambda: defaultdict(int))
    total = _Change()
    same = 0
    ranges: list[dict[str, Any]] = []
    for memory in memories:
        for chunk in walk(memory, after):
            equal = _same(chunk.data, chunk.address, memory.pid, before)
            for number, (kind, is_same) in enumerate(zip(chunk.kinds, equal, strict=True)):
                at = number * PAGE
                if is_same or (is_same is None and not chunk.area.backed and chunk.data[at : at + PAGE] == _ZERO):
                    same += 1
                    continue
                some = [total, kinds[kind], areas[memory.pid, chunk.area]]
                if chunk.area.kind == LIBRARY and chunk.area.name and kind == LIBRARY:
                    some.append(libraries[library_of(chunk.area.name)])
                parts[memory.pid, chunk.area][kind] += PAGE
                for change in some:
                    if is_same is None:
                        change.new += 1
                    else:
                        change.changed += 1
                _note(ranges, memory.pid, chunk.address + at, kind, chunk.area.name, most)
    by_area = sorted(areas.items(), key=lambda item: -(item[1].changed + item[1].new))
    return {
        "same": same,
        **total.row(),
        "gone": sum(_gone(before, after, memory.pid) for memory in memories),
        "kinds": _changes(kinds, "kind"),
        "libraries": _changes(libraries, "library"),
        "mappings": [{"pid": key[0], **_area_row(key[1], parts[key]), **change.row()} for key, change in by_area[:50]],
        "ranges": ranges[:most],
    }


def _changes(sums: Mapping[str, _Change], name: str) -> list[dict[str, Any]]:
    return [{name: key, **c.row()} for key, c in sorted(sums.items(), key=lambda i: -(i[1].changed + i[1].new))]


def _note(ranges: list[dict[str, Any]], pid: int, address: int, kind: str, name: str, most: int) -> None:
    last = ranges[-1] if ranges else None
    if last is not None and last["pid"] == pid and int(last["address"], 16) + last["pages"] * PAGE == address:
        last["pages"] += 1
    elif len(ranges) <= most:  # one more than is told, so that the last one told does not grow by what follows it
        ranges.append({"pid": pid, "address": f"{address:x}", "pages": 1, "kind": kind, "name": name})


def _gone(before: PageReader, after: PageReader, pid: int) -> int:
    """Pages that only the first has."""
    spans = before.spans(pid)
    held = sum(s.pages for span in spans for s in after.within(pid, span.address, span.end))
    return sum(span.pages for span in spans) - held


# --- as a process of its own -----------------------------------------------------------------------------------------


def _reader(place: dict[str, Any]) -> PageReader:
    files = place.get("files")
    return PageReader.of_images(Path(place["images"]), tuple(map(Path, files)) if files is not None else None)


def _memories(images: Path) -> list[Memory]:
    memories = {memory.pid: memory for memory in read_areas(images)}
    facts = parse_facts((images / FACTS).read_text()) if (images / FACTS).exists() else None
    for pid, begin, end in facts.gpu.memory if facts is not None and facts.gpu is not None else ():
        if (memory := memories.get(pid)) is not None:
            memory.areas = mark(memory.areas, GPU, begin, end)
    return list(memories.values())


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Carry out a request: `of` and perhaps `parent`, or `before` and `of`; each {`images`, `files`}, or for `of`
    {`pids`: {pid in the sandbox: pid here}}; `most`."""
    with contextlib.ExitStack() as stack:

        def opened(reader: PageReader) -> PageReader:
            stack.callback(reader.close)
            return reader

        place, most = request["of"], request.get("most", 50)
        if "pids" in place:
            pids = {int(inner): int(pid) for inner, pid in place["pids"].items()}
            reader = opened(PageReader.of_processes(pids))
            memories = [Memory(inner, "", areas_of_process(pid)) for inner, pid in pids.items()]
        else:
            reader = opened(_reader(place))
            memories = _memories(Path(place["images"]))
        if "before" in request:
            before = opened(_reader(request["before"]))
            # What a running process has not asked for since its thaw is as in the snapshot.
            after = reader.over(before, memories) if "pids" in place else reader
            return difference(before, after, memories, most=most)
        parent = request.get("parent")
        return contents(memories, reader, opened(_reader(parent)) if parent else None, most=most)


def main() -> int:
    """Read a request from stdin, print the answer or `{"error": …}`."""
    os.nice(5)
    try:
        result = answer(json.load(sys.stdin))
    except (OSError, ValueError, KeyError, IndexError, StopIteration, struct.error) as e:
        result = {"error": f"{type(e).__name__}: {e}"}
    json.dump(result, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
