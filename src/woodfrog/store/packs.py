"""What a pack is on disk: pages, their names, deltas against the pages of another pack.

    <id>.names   32 bytes (blake3) for each page, in order; blake3 of this file is the pack's id
    <id>.pages   the pages; page i at i * 4096
    <id>.delta   the same pages, compressed against pages of raw packs; `.pages` is then only a cache

A delta file, little-endian: `WFDELTA1`, u32 pages, u32 bases, u32 frames, u32 length of the table; the bases' ids
(32 bytes each); for each frame u32 pages and u32 length; the table (zstd): for each page u32 base and u32 slot; the
frames; blake3 of all before. A frame is what zstd makes of its pages with their base pages, end to end, as the
prefix to refer to: smaller than XOR where content has moved within a page, and the same where single bytes changed.
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3
from zstandard import (
    CONTENTSIZE_UNKNOWN,
    DICT_TYPE_RAWCONTENT,
    ZstdCompressionDict,
    ZstdCompressor,
    ZstdDecompressor,
    ZstdError,
    get_frame_parameters,
)

from woodfrog.errors import IntegrityError

__all__ = [
    "BATCH",
    "FRAME",
    "NAME",
    "PAGE",
    "ZERO",
    "Delta",
    "DeltaWriter",
    "Ref",
    "compress_frame",
    "is_pack_id",
    "pack_id",
    "page_name",
    "pread_full",
    "read_delta",
    "write_full",
]

PAGE = 4096
NAME = 32
ZERO = bytes(PAGE)
BATCH = 256
"""Pages handled at a time: enough that reads and look-ups cost little each, few enough that no lock is held long."""
FRAME = 32
"""Pages compressed together in a delta, at most."""

_HEAD = struct.Struct("<8sIIII")
_FRAME = struct.Struct("<II")
_MAGIC = b"WFDELTA1"
_MOST_PAGES = 1 << 17
"""Of a delta: twice what the largest pack has."""
_LEVEL = 3


@dataclass(frozen=True, slots=True)
class Ref:
    """Consecutive pages of one pack; `pack` is "" for pages of zeroes."""

    pack: str
    slot: int
    pages: int


def page_name(page: bytes | bytearray | memoryview) -> bytes:
    return blake3(page).digest()


def pack_id(names: bytes | bytearray) -> str:
    return blake3(names).hexdigest()


def is_pack_id(text: str) -> bool:
    return len(text) == 64 and not text.strip("0123456789abcdef")


def pread_full(fd: int, view: memoryview, offset: int) -> None:
    """Fill `view` from a file.

    Raises:
        EOFError: the file ends before.
    """
    while view:
        n = os.preadv(fd, [view], offset)
        if n == 0:
            raise EOFError("the file is shorter than it must be")
        view, offset = view[n:], offset + n


def write_full(fd: int, data: bytes | bytearray | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def compress_frame(pages: bytes, bases: bytes) -> bytes:
    """Pages, compressed against as many base pages."""
    prefix = ZstdCompressionDict(bases, dict_type=DICT_TYPE_RAWCONTENT)
    return ZstdCompressor(level=_LEVEL, dict_data=prefix).compress(pages)


def _decompress_frame(frame: memoryview, bases: bytes) -> bytes:
    prefix = ZstdCompressionDict(bases, dict_type=DICT_TYPE_RAWCONTENT)
    return _decompress(ZstdDecompressor(dict_data=prefix), frame, len(bases))


def _decompress(decompressor: ZstdDecompressor, frame: bytes | memoryview, most: int) -> bytes:
    """At most so many bytes: a frame that says its size is given that much memory, whatever was asked for."""
    size = get_frame_parameters(frame).content_size
    if size != CONTENTSIZE_UNKNOWN and size > most:
        raise ZstdError("larger than it can be")
    return decompressor.decompress(frame, max_output_size=max(1, most))


class DeltaWriter:
    """Collects a delta pack's frames; they are small, and go to the file when it is whole."""

    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self.lengths = array("I")
        self.table = array("I")
        self.bases: dict[str, int] = {}

    def add(self, frame: bytes, bases: Sequence[tuple[str, int]]) -> None:
        """Add a frame made by `compress_frame`, and the pack and slot of each page's base."""
        self.frames.append(frame)
        self.lengths.extend((len(bases), len(frame)))
        for pack, slot in bases:
            self.table.extend((self.bases.setdefault(pack, len(self.bases)), slot))

    def encode(self) -> Iterator[bytes]:
        """The parts of the file, in order."""
        table = ZstdCompressor(level=_LEVEL).compress(self.table.tobytes())
        head = _HEAD.pack(_MAGIC, len(self.table) // 2, len(self.bases), len(self.frames), len(table))
        digest = blake3()
        for part in (head, bytes.fromhex("".join(self.bases)), self.lengths.tobytes(), table, *self.frames):
            digest.update(part)
            yield part
        yield digest.digest()


@dataclass(frozen=True)
class Delta:
    """A delta file, read and found whole."""

    pages: int
    bases: tuple[str, ...]
    places: array[int]
    """For each page two numbers: which of the bases, and which page of it."""
    frames: tuple[tuple[int, int, int], ...]
    """For each frame: its pages, and where it is in `data`."""
    data: bytes

    def base(self, slot: int) -> tuple[str, int]:
        """Pack and slot of the page that a page was compressed against."""
        return self.bases[self.places[2 * slot]], self.places[2 * slot + 1]

    def decode(self, files: dict[str, int]) -> Iterator[bytes]:
        """The pages, a frame at a time. `files`: an open descriptor of each base's raw form.

        Raises:
            IntegrityError: a frame does not fit its bases.
        """
        slot = 0
        for number, (pages, _, _) in enumerate(self.frames):
            yield self.decode_frame(number, slot, files)
            slot += pages

    def decode_frame(self, number: int, slot: int, files: dict[str, int]) -> bytes:
        """The pages of one frame, of which `slot` is the first; as `decode`."""
        pages, begin, end = self.frames[number]
        bases = bytearray(pages * PAGE)
        try:
            i = 0
            while i < pages:  # consecutive base pages in one read
                pack, first = self.base(slot + i)
                n = 1
                while i + n < pages and self.base(slot + i + n) == (pack, first + n):
                    n += 1
                pread_full(files[pack], memoryview(bases)[i * PAGE : (i + n) * PAGE], first * PAGE)
                i += n
            made = _decompress_frame(memoryview(self.data)[begin:end], bytes(bases))
        except (ZstdError, EOFError, IndexError, KeyError) as e:
            raise IntegrityError(f"a delta does not fit its bases: {e}") from e
        if len(made) != pages * PAGE:
            raise IntegrityError("a delta's frame has the wrong length")
        return made


def read_delta(path: Path) -> Delta:
    """Read a delta file.

    Raises:
        FileNotFoundError: there is none.
        IntegrityError: it is not what was written.
    """
    data = path.read_bytes()
    broken = IntegrityError(f"{path.name} is damaged", path=str(path))
    if len(data) < _HEAD.size + NAME or blake3(memoryview(data)[:-NAME]).digest() != data[-NAME:]:
        raise broken
    magic, pages, bases, frames, table = _HEAD.unpack_from(data)
    if (
        magic != _MAGIC
        or pages > _MOST_PAGES
        or _HEAD.size + bases * NAME + frames * _FRAME.size + table > len(data) - NAME
    ):  # its digest is its own: whoever made it up made that, too
        raise broken
    at = _HEAD.size + bases * NAME
    names = tuple(data[i : i + NAME].hex() for i in range(_HEAD.size, at, NAME))
    lengths = [_FRAME.unpack_from(data, at + 8 * i) for i in range(frames)]
    at += frames * _FRAME.size
    places = array("I")
    try:
        places.frombytes(_decompress(ZstdDecompressor(), data[at : at + table], 8 * pages))
    except (ZstdError, ValueError) as e:
        raise broken from e
    at += table
    found = []
    for count, length in lengths:
        found.append((count, at, at + length))
        at += length
    if (
        at != len(data) - NAME
        or len(places) != 2 * pages
        or sum(count for count, _ in lengths) != pages
        or any(count > 4096 for count, _ in lengths)
        or any(i >= bases for i in places[::2])
    ):
        raise broken
    return Delta(pages, names, places, tuple(found), data)
