"""Processes' memory as CRIU's images have it, or a running process: what is mapped where, and where each page lies.

Reads the images without CRIU: `mm` (mappings), `files` (their names), `core` and `pstree` (threads), `pagemap` and the
page index (where each page is).
"""

from __future__ import annotations

import contextlib
import os
import re
import struct
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from woodfrog.criu.pagemap import INDEX, PAGE, read_index
from woodfrog.criu.stats import fields_of

__all__ = [
    "ANONYMOUS",
    "ARENA",
    "FILE",
    "GPU",
    "HEAP",
    "LIBRARY",
    "SHARED",
    "STACK",
    "Area",
    "Memory",
    "PageReader",
    "Span",
    "areas_of_process",
    "cut",
    "explain",
    "library_of",
    "load",
    "mark",
    "read_areas",
]

_ZEROES = bytes(256 * PAGE)
_SERVICE_MAGICS = (0x54564319, 0x55105940)
_PRESENT, _LAZY, _IN_PARENT = 4, 2, 1

# CRIU's status of a mapping.
_STACK, _HEAP, _SYSVIPC, _MEMFD = 1 << 1, 1 << 5, 1 << 10, 1 << 14
_FILE_PRIVATE, _FILE_SHARED, _ANON_SHARED = 1 << 6, 1 << 7, 1 << 8
_SHARED = _FILE_SHARED | _ANON_SHARED | _SYSVIPC | _MEMFD
_WRITE, _GROWS_DOWN = 2, 0x100

HEAP = "heap"
ARENA = "malloc arenas"
LIBRARY = "library data"
FILE = "file pages"
STACK = "stacks"
SHARED = "shared memory"
ANONYMOUS = "anonymous"
GPU = "GPU memory"

_ARENA = 64 << 20
_MOST_BSS = 1 << 20
"""What follows a library's data is its zero-initialised data, but not when it is larger: then it has been added to."""


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive pages of a process that lie consecutively in a file; `fd` -1: they are zero."""

    address: int
    pages: int
    fd: int
    offset: int

    @property
    def end(self) -> int:
        return self.address + self.pages * PAGE


@dataclass(frozen=True, slots=True)
class Area:
    """A mapping. `name`: of its file, or of the library whose zero-initialised data it is; `kind`: what it is as a
    whole; `backed`: what was not written is in a file."""

    begin: int
    end: int
    kind: str
    name: str = ""
    shared_id: int = 0
    backed: bool = False


@dataclass
class Memory:
    """A process: what it is called and what is mapped where, ascending."""

    pid: int
    comm: str
    areas: list[Area]


def _messages(path: Path) -> Iterator[bytes]:
    data = path.read_bytes()
    at = 8 if struct.unpack_from("<I", data)[0] in _SERVICE_MAGICS else 4
    while at < len(data):
        (length,) = struct.unpack_from("<I", data, at)
        if at + 4 + length > len(data):
            raise ValueError(f"{path.name} is cut off")
        yield data[at + 4 : at + 4 + length]
        at += 4 + length


def _values(message: bytes) -> dict[int, int]:
    return {number: value for number, value in fields_of(message) if isinstance(value, int)}


# --- where pages are -------------------------------------------------------------------------------------------------


class PageReader:
    """The pages of processes, wherever they lie. Close it after use.

    Args:
        spans: for each pid, ascending and apart.
    """

    def __init__(self, spans: Mapping[int, Iterable[Span]], fds: Iterable[int] = ()) -> None:
        self._spans = {pid: sorted(some, key=lambda s: s.address) for pid, some in spans.items()}
        self._begins = {pid: [s.address for s in some] for pid, some in self._spans.items()}
        self._fds = list(fds)

    @classmethod
    def of_images(cls, images: Path, files: tuple[Path, ...] | None = None) -> PageReader:
        """Of a snapshot.

        Args:
            images: the directory of CRIU's images.
            files: of a packed one, what its page index names, in that order (`Opened.files`).

        Raises:
            OSError, ValueError: an image is missing or damaged.
        """
        opened: dict[Path, int] = {}

        def fd_of(path: Path) -> int:
            if path not in opened:
                opened[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            return opened[path]

        try:
            lazy: dict[int, list[Span]] = {}
            if files is not None:
                for task in read_index((images / INDEX).read_bytes()).tasks:
                    lazy[task.pid] = [Span(a, n, fd_of(files[file]), offset) for a, n, offset, file in task.extents]
            spans: dict[int, list[Span]] = {}
            for path in images.glob("pagemap-*.img"):
                found = re.fullmatch(r"pagemap-(\d+|shmem-\d+)\.img", path.name)
                if found is None:
                    continue
                # Shared memory is not a process's: it gets a negative number of its own.
                pid = int(found[1]) if found[1].isdigit() else -int(found[1].partition("-")[2])
                spans[pid] = cls._of_pagemap(path, lazy.get(pid), fd_of)
            return cls(spans, opened.values())
        except BaseException:
            for fd in opened.values():
                os.close(fd)
            raise

    @staticmethod
    def _of_pagemap(path: Path, lazy: list[Span] | None, fd_of: Any) -> list[Span]:
        spans: list[Span] = []
        pages_fd, offset = -1, 0
        for number, message in enumerate(_messages(path)):
            values = _values(message)
            if number == 0:
                pages_fd = fd_of(path.with_name(f"pages-{values[1]}.img"))
                continue
            address, pages, flags = values[1], values.get(5) or values.get(2, 0), values.get(4, 0)
            if flags & _IN_PARENT:
                raise ValueError(f"{path.name} rests on a parent image")
            if not flags & _PRESENT:
                continue
            if flags & _LAZY and lazy is not None:
                spans += _within(lazy, address, address + pages * PAGE)
            else:
                spans.append(Span(address, pages, pages_fd, offset))
            offset += pages * PAGE
        return spans

    @classmethod
    def of_processes(cls, pids: Mapping[int, int]) -> PageReader:
        """Of running processes: the pages that are theirs alone. What was not asked for since a thaw is not there.

        Args:
            pids: the pid in the sandbox, and the pid here.

        Raises:
            OSError: gone, or not root.
        """
        spans: dict[int, list[Span]] = {}
        fds: list[int] = []
        try:
            for inner, pid in pids.items():
                memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
                fds.append(memory)
                spans[inner] = list(_resident(pid, memory))
            return cls(spans, fds)
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise

    def over(self, below: PageReader, memories: Iterable[Memory]) -> PageReader:
        """These pages, and what `below` has of the others that are mapped. It ends with both of them."""
        spans: dict[int, list[Span]] = {}
        for memory in memories:
            mine = spans[memory.pid] = list(self.spans(memory.pid))
            for begin, end in _mapped(memory.areas):
                at = begin
                for span in [*self.within(memory.pid, begin, end), Span(end, 0, -1, 0)]:
                    mine += below.within(memory.pid, at, span.address)
                    at = span.end
        return PageReader(spans)

    def spans(self, pid: int) -> list[Span]:
        return self._spans.get(pid, [])

    def within(self, pid: int, begin: int, end: int) -> Iterator[Span]:
        """The spans of a range of addresses, cut at its ends."""
        spans = self._spans.get(pid, [])
        for number in range(max(0, bisect_right(self._begins.get(pid, []), begin) - 1), len(spans)):
            span = spans[number]
            if span.address >= end:
                return
            low, high = max(span.address, begin), min(span.end, end)
            if low < high:
                yield cut(span, low, high)

    def read(self, pid: int, address: int, pages: int) -> bytes:
        """Pages of a process; zeroes where it has none.

        Raises:
            OSError: they cannot be read.
        """
        out = bytearray(pages * PAGE)
        for span in self.within(pid, address, address + pages * PAGE):
            at = span.address - address
            out[at : at + span.pages * PAGE] = load(span)
        return bytes(out)

    def close(self) -> None:
        for fd in self._fds:
            with contextlib.suppress(OSError):
                os.close(fd)
        self._fds.clear()


def _mapped(areas: list[Area]) -> Iterator[tuple[int, int]]:
    """Ranges of addresses in which something is mapped."""
    begin = end = 0
    for area in areas:
        if area.begin != end:
            if begin < end:
                yield begin, end
            begin = area.begin
        end = area.end
    if begin < end:
        yield begin, end


def cut(span: Span, begin: int, end: int) -> Span:
    """The part of a span between two addresses in it."""
    if begin == span.address and end == span.end:
        return span
    return Span(begin, (end - begin) // PAGE, span.fd, span.offset + begin - span.address if span.fd >= 0 else 0)


def _within(lazy: list[Span], begin: int, end: int) -> Iterator[Span]:
    """What the index has of a range; the rest of it is zero."""
    at = begin
    first = max(0, bisect_right(lazy, begin, key=lambda s: s.address) - 1)
    for number in range(first, len(lazy)):
        span = lazy[number]
        if span.address >= end:
            break
        low, high = max(span.address, at), min(span.end, end)
        if low >= high:
            continue
        if at < low:
            yield Span(at, (low - at) // PAGE, -1, 0)
        yield cut(span, low, high)
        at = high
    if at < end:
        yield Span(at, (end - at) // PAGE, -1, 0)


def load(span: Span) -> bytes:
    """The bytes of a span, of any length."""
    length = span.pages * PAGE
    if span.fd < 0:
        return _ZEROES[:length] if length <= len(_ZEROES) else bytes(length)
    data = os.pread(span.fd, length, span.offset)
    if len(data) == length:
        return data
    parts = [data]
    while length > sum(map(len, parts)):
        have = sum(map(len, parts))
        more = os.pread(span.fd, length - have, span.offset + have)
        if not more:
            raise ValueError("a pages file ends early")
        parts.append(more)
    return b"".join(parts)


_PM_PRESENT, _PM_SWAP, _PM_FILE = 1 << 63, 1 << 62, 1 << 61


def _resident(pid: int, memory: int) -> Iterator[Span]:
    """Present or swapped pages of a running process that are neither a file's nor shared."""
    with open(f"/proc/{pid}/maps") as f:
        ranges = [[int(end, 16) for end in line.split(None, 1)[0].split("-")] for line in f]
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
        for begin, end in ranges:
            if end > 1 << 47:
                continue
            for at in range(begin, end, 512 * PAGE):
                count = min(512, (end - at) // PAGE)
                data = os.pread(pagemap.fileno(), count * 8, at // PAGE * 8)
                if data.count(0) == len(data):
                    continue
                start = -1
                flags = struct.unpack(f"<{len(data) // 8}Q", data)
                for number, flag in enumerate((*flags, 0)):
                    own = flag & (_PM_PRESENT | _PM_SWAP) and not flag & _PM_FILE
                    if own and start < 0:
                        start = number
                    elif not own and start >= 0:
                        yield Span(at + start * PAGE, number - start, memory, at + start * PAGE)
                        start = -1


# --- what is mapped --------------------------------------------------------------------------------------------------


def read_areas(images: Path) -> list[Memory]:
    """The processes of a snapshot and their mappings.

    Raises:
        OSError, ValueError: an image is missing or damaged.
    """
    names = _file_names(images)
    threads = _threads(images)
    out = []
    for path in images.glob("mm-*.img"):
        pid = int(path.stem.partition("-")[2])
        message = next(_messages(path))
        raw = [_values(value) for number, value in fields_of(message) if number == 14 and isinstance(value, bytes)]
        tops = [sp for tid in (pid, *threads.get(pid, ())) if (sp := _stack_pointer(images, tid))]
        areas = [
            Area(
                v[1],
                v[2],
                _kind(v, names),
                _name(v, names),
                v.get(4, 0) if v.get(7, 0) & _SHARED else 0,
                bool(v.get(7, 0) & (_FILE_PRIVATE | _FILE_SHARED)),
            )
            for v in sorted(raw, key=lambda v: v[1])
        ]
        writable = {v[1] for v in raw if v.get(5, 0) & _WRITE}
        out.append(Memory(pid, _comm(images, pid), explain(areas, writable, tops)))
    return sorted(out, key=lambda m: m.pid)


def _file_names(images: Path) -> dict[int, str]:
    """Regular files by their id in the images."""
    names = {}
    for image in ("files.img", "reg-files.img"):
        if not (images / image).exists():
            continue
        for message in _messages(images / image):
            fields = dict(fields_of(message))
            regular = fields.get(3) if image == "files.img" else message
            if isinstance(regular, bytes):
                file = dict(fields_of(regular))
                number, name = file.get(1), file.get(6)
                if isinstance(name, bytes) and isinstance(number, int):
                    names[number] = name.decode(errors="replace")
    return names


def _threads(images: Path) -> dict[int, list[int]]:
    """Threads of each process."""
    out = {}
    for message in _messages(images / "pstree.img"):
        pid = 0
        tids: list[int] = []
        for number, value in fields_of(message):
            if number == 1 and isinstance(value, int):
                pid = value
            elif number == 5 and isinstance(value, int):
                tids.append(value)
            elif number == 5 and isinstance(value, bytes):
                tids += _packed(value)
        out[pid] = [t for t in tids if t != pid]
    return out


def _packed(data: bytes) -> list[int]:
    out, value, shift = [], 0, 0
    for byte in data:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            out.append(value)
            value = shift = 0
    return out


def _core(images: Path, tid: int) -> dict[int, int | bytes]:
    try:
        return dict(fields_of(next(_messages(images / f"core-{tid}.img"))))
    except FileNotFoundError:
        return {}


_STACK_POINTERS = ((2, 2, 20), (8, 3, 2))
"""Where core.proto keeps a thread's stack pointer: registers of the thread's x86 part, of its arm64 part."""


def _stack_pointer(images: Path, tid: int) -> int:
    """The stack pointer of a thread; 0 where that is not known."""
    core = _core(images, tid)
    for part, registers, number in _STACK_POINTERS:
        info = core.get(part)
        saved = dict(fields_of(info)).get(registers) if isinstance(info, bytes) else None
        value = dict(fields_of(saved)).get(number) if isinstance(saved, bytes) else None
        if isinstance(value, int):
            return value
    return 0


def _comm(images: Path, pid: int) -> str:
    task = _core(images, pid).get(3)
    name = dict(fields_of(task)).get(6) if isinstance(task, bytes) else b""
    return name.decode(errors="replace") if isinstance(name, bytes) else ""


def _name(values: dict[int, int], names: dict[int, str]) -> str:
    return names.get(values.get(4, 0), "") if values.get(7, 0) & (_FILE_PRIVATE | _FILE_SHARED) else ""


def _kind(values: dict[int, int], names: dict[int, str]) -> str:
    status = values.get(7, 0)
    if status & (_ANON_SHARED | _SYSVIPC | _MEMFD):
        return SHARED
    if status & (_FILE_PRIVATE | _FILE_SHARED):
        return LIBRARY if is_library(_name(values, names)) else FILE
    if status & _HEAP:
        return HEAP
    # A stack that the kernel made grows down.
    return STACK if status & _STACK or values.get(6, 0) & _GROWS_DOWN else ANONYMOUS


def is_library(path: str) -> bool:
    name = path.rpartition("/")[2]
    return ".so" in name or name.startswith("python") or "/bin/" in path


def explain(areas: list[Area], writable: set[int], tops: Iterable[int]) -> list[Area]:
    """Say more of anonymous areas: threads' stacks, allocators' arenas, and what follows a library's own data.

    Args:
        areas: ascending.
        writable: where those begin that may be written.
        tops: the threads' stack pointers.
    """
    stacks = set(tops)
    out: list[Area] = []
    for number, area in enumerate(areas):
        new = area
        if area.kind == ANONYMOUS:
            before = out[-1] if out else None
            after = areas[number + 1] if number + 1 < len(areas) else None
            if any(area.begin <= top < area.end for top in stacks):
                new = Area(area.begin, area.end, STACK)
            elif area.begin % _ARENA == 0 and (
                area.end == area.begin + _ARENA
                or (after is not None and after.begin == area.end and after.end == area.begin + _ARENA)
            ):
                new = Area(area.begin, area.end, ARENA)
            elif (
                before is not None
                and before.end == area.begin
                and before.kind == LIBRARY
                and before.begin in writable
                and area.begin in writable
                and area.end - area.begin <= _MOST_BSS
            ):
                new = Area(area.begin, area.end, LIBRARY, before.name)
        out.append(new)
    return out


def mark(areas: list[Area], kind: str, begin: int, end: int) -> list[Area]:
    """The areas, with what is between two addresses of another kind: where more is known of it than it tells itself."""
    out: list[Area] = []
    for area in areas:
        low, high = max(area.begin, begin), min(area.end, end)
        if low >= high:
            out.append(area)
            continue
        out += [replace(area, end=low)] * (area.begin < low)
        out.append(Area(low, high, kind))
        out += [replace(area, begin=high)] * (high < area.end)
    return out


def areas_of_process(pid: int) -> list[Area]:
    """The mappings of a running process."""
    areas, writable, named = [], set(), ("[heap]", "[stack]")
    with open(f"/proc/{pid}/maps") as f:
        for line in f:
            span, mode, _, device, _, *rest = line.rstrip("\n").split(None, 5)
            begin, end = (int(part, 16) for part in span.split("-"))
            path = rest[0] if rest else ""
            if mode[1] == "w":
                writable.add(begin)
            if path in named:
                kind = HEAP if path == "[heap]" else STACK
            elif mode[3] == "s" and (device == "00:01" or path.startswith(("/dev/zero", "/memfd:", "/SYSV"))):
                kind = SHARED
            elif path.startswith("/"):
                kind = LIBRARY if is_library(path) else FILE
            else:
                kind = ANONYMOUS
            backed = path.startswith("/")
            areas.append(Area(begin, end, kind, path if backed else "", 0, backed))
    tops = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        for tid in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{tid}/syscall") as f:
                words = f.read().split()  # number, six arguments, stack pointer, instruction pointer
                tops += [int(words[-2], 16)] if len(words) > 2 else []
    return explain(areas, writable, tops)


def library_of(path: str) -> str:
    """The package or library that a file belongs to.

    >>> library_of("/v/lib/python3.11/site-packages/numpy.libs/libopenblas-1.so")
    'numpy'
    >>> library_of("/lib/x86_64-linux-gnu/libc.so.6")
    'libc'
    """
    parts = path.split("/")
    for place in ("site-packages", "dist-packages"):
        if place in parts[:-1]:
            first = parts[len(parts) - parts[::-1].index(place)]
            return first.removesuffix(".libs") if parts[-1] != first else first.partition(".")[0]
    name = parts[-1]
    if "lib-dynload" in parts or name.startswith(("libpython", "python")):
        return "python"
    return name.partition(".so")[0] if ".so" in name else name
