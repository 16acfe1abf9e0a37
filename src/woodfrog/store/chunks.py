"""Large files of file layers in a tier: chunks named by what is in them, so that none is sent twice.

    chunks[-<key>]/<2>/<name>     4 MiB of a file, cold form; its name is the BLAKE3 of the content, keyed where there
                                  is an encryption key, so that a name tells nobody what it is of

A chunk of zeroes is nothing, and becomes a hole. Small files travel in the bundle of their layer (`bundle.py`), which
says of the large ones what they consist of. Nothing of that is trusted: a chunk must be what it is named for, and the
file what the snapshot's manifest says.
"""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from woodfrog.errors import IntegrityError, StoreError
from woodfrog.store.cold import HEADER, Key, content_size, decode_bytes, encode_bytes
from woodfrog.store.files import store_error
from woodfrog.store.tiers import Tier

__all__ = ["CHUNK", "LARGE", "Chunks", "Large"]

CHUNK = 4 << 20
LARGE = 1 << 20
"""Bytes from which on a file goes in chunks. No version may have less: collections in a tier look for the chunks of
smaller files nowhere."""
_PARALLEL = 8
_BESIDE = CHUNK >> 3
"""More than the cold form of a chunk takes beside its content."""
_NAME = re.compile(r"([0-9a-f]{64})?\Z")


@dataclass(frozen=True)
class Large:
    """A file by its chunks, in order; "" = zeroes."""

    size: int
    chunks: tuple[str, ...]

    def text(self) -> str:
        return ",".join([str(self.size), *self.chunks])

    @classmethod
    def parse(cls, text: str) -> Large:
        """The opposite of `text`.

        Raises:
            ValueError: it is not one.

        >>> Large.parse("0")
        Large(size=0, chunks=())
        """
        size, *chunks = text.split(",")
        if not size.isascii() or not size.isdigit() or len(size) > 15 or len(chunks) != -(-int(size) // CHUNK):
            raise ValueError("not a file in chunks")
        if not all(_NAME.match(name) for name in chunks):
            raise ValueError("not a file in chunks")
        return cls(int(size), tuple(chunks))


class Chunks:
    """The chunks of one tier.

    Args:
        key: what they are encrypted with; None = they are not.
    """

    def __init__(self, tier: Tier, key: Key | None) -> None:
        self._tier, self._key = tier, key
        self._place = f"chunks-{key.id[:16]}" if key else "chunks"

    def needed(self, large: Large) -> set[str]:
        """Where in the tier the content of a file is."""
        return {self._path(name) for name in large.chunks if name}

    def _name(self, data: bytes) -> str:
        return self._key.name(data) if self._key else blake3(data).hexdigest()

    def _path(self, name: str) -> str:
        return f"{self._place}/{name[:2]}/{name}"

    def send(self, path: Path) -> Large:
        """Have a file in the tier; what is there already is not sent.

        Raises:
            StoreError: it cannot be read, changed meanwhile, or the tier fails.
        """
        try:
            with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb", buffering=0) as f:
                size = os.fstat(f.fileno()).st_size

                def one(offset: int) -> str:
                    want = min(CHUNK, size - offset)
                    data = os.pread(f.fileno(), want, offset)
                    if len(data) != want:
                        raise StoreError(f"cannot send {path}: it changed meanwhile", code="changed", path=str(path))
                    if data.count(0) == len(data):
                        return ""
                    name = self._name(data)
                    if not self._tier.has(self._path(name)):
                        self._tier.put(self._path(name), encode_bytes(data, key=self._key))
                    return name

                with ThreadPoolExecutor(_PARALLEL, thread_name_prefix="chunks") as pool:
                    return Large(size, tuple(pool.map(one, range(0, size, CHUNK))))
        except OSError as e:
            raise store_error("cannot send", path, e) from e

    def bring(self, large: Large, fd: int) -> None:
        """Write a file's content to an empty one.

        Raises:
            IntegrityError: a chunk is not what it is named for.
            StoreError: the tier fails.
            OSError: it cannot be written.
        """
        os.ftruncate(fd, large.size)

        def one(item: tuple[int, str]) -> None:
            at, name = item
            view = memoryview(self._content(name, min(CHUNK, large.size - at)) if name else b"")
            while view:
                done = os.pwrite(fd, view, at)
                view, at = view[done:], at + done

        with ThreadPoolExecutor(_PARALLEL, thread_name_prefix="chunks") as pool:
            list(pool.map(one, zip(range(0, large.size, CHUNK), large.chunks, strict=True)))

    def _content(self, name: str, size: int) -> bytes:
        key = self._path(name)
        data = self._tier.get_bytes(key, 0, size + _BESIDE + HEADER)
        altered = IntegrityError(f"{self._tier.name}: {key} is not what it is named for", code="altered")
        if len(data) < HEADER or content_size(data[:HEADER]) != size:
            raise altered
        content = decode_bytes(data, key=self._key, what=f"{self._tier.name}: {key}")
        if self._name(content) != name:
            raise altered
        return content
