"""Delta files from a tier: their digest is of what is in them, so whoever can write there can make one up."""

from __future__ import annotations

import os
import struct
import tracemalloc
from pathlib import Path

import pytest
from blake3 import blake3
from zstandard import ZstdCompressor

from woodfrog.errors import IntegrityError
from woodfrog.store.packs import PAGE, DeltaWriter, compress_frame, read_delta

BASE = "ab" * 32
BOMB = ZstdCompressor().compress(bytes(256 << 20))
MOST = 32 << 20


def made_up(pages: int, bases: int, frames: int, table: bytes, rest: bytes = b"") -> bytes:
    data = struct.pack("<8sIIII", b"WFDELTA1", pages, bases, frames, len(table)) + rest + table
    return data + blake3(data).digest()


def delta(frame: bytes) -> bytes:
    writer = DeltaWriter()
    writer.add(frame, [(BASE, 0)])
    return b"".join(writer.encode())


@pytest.mark.parametrize(
    "data",
    [
        made_up(32 << 20, 0, 0, BOMB),
        made_up(1, 0, 0, BOMB),
        made_up(0, 20_000_000, 0, b""),
        made_up(0, 0, 20_000_000, b""),
        made_up(0, 0, 0, b"")[:-33] + b"x" * 33,
        made_up(1, 0, 0, b"no frame"),
    ],
    ids=["table", "table of one page", "bases", "frames", "digest", "no table"],
)
def test_what_it_says_of_itself_takes_no_memory(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "delta").write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(IntegrityError):
            read_delta(tmp_path / "delta")
        assert tracemalloc.get_traced_memory()[1] < MOST
    finally:
        tracemalloc.stop()


def test_a_frame_is_as_large_as_its_pages(tmp_path: Path) -> None:
    base, page = os.urandom(PAGE), os.urandom(PAGE)
    (tmp_path / "base").write_bytes(base)
    fd = os.open(tmp_path / "base", os.O_RDONLY)
    try:
        for frame, good in ((compress_frame(page, base), True), (BOMB, False)):
            (tmp_path / "delta").write_bytes(delta(frame))
            read = read_delta(tmp_path / "delta")
            if good:
                assert read.decode_frame(0, 0, {BASE: fd}) == page
                continue
            tracemalloc.start()
            with pytest.raises(IntegrityError, match="larger than it can be"):
                read.decode_frame(0, 0, {BASE: fd})
            assert tracemalloc.get_traced_memory()[1] < MOST
    finally:
        tracemalloc.stop()
        os.close(fd)
