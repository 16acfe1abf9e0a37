"""The users' bytes on their way: in memory while small, else in files that the event loop neither reads nor writes.

A disk that stands still holds up those whose bytes lie on it, not the other calls. The threads are the payloads' own:
however many wait for the disk, everything else that runs in threads goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

__all__ = ["CHUNK", "Payload", "Spool", "discard", "in_thread", "spooled"]

CHUNK = 256 << 10  # see heap.py
_AT_ONCE = 4 << 20
"""Bytes for one turn of a thread."""
_threads = ThreadPoolExecutor(8, thread_name_prefix="payload")

T = TypeVar("T")


async def in_thread(work: Callable[..., T], *args: object) -> T:
    """What reads, writes or removes a payload's file."""
    return await asyncio.get_running_loop().run_in_executor(_threads, work, *args)


def discard(path: Path) -> Future[None]:
    """Remove a body, soon: of a large file that takes a while. What cannot be removed is swept at the next start."""

    def remove() -> None:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)

    return _threads.submit(remove)


@dataclass(frozen=True)
class Payload:
    """Opaque bytes of the user's: in memory when small, else in a file; or in both, on their way to be kept."""

    data: bytes | None = None
    path: Path | None = None

    @property
    def size(self) -> int:
        return len(self.data) if self.data is not None else os.stat(self.path).st_size if self.path else 0

    async def chunks(self) -> AsyncIterator[bytes]:
        if self.data is not None:
            yield self.data
        elif self.path is not None:
            file = await in_thread(open, self.path, "rb")
            try:
                while pieces := await in_thread(_some_of, file):
                    for piece in pieces:
                        yield piece
            finally:
                _threads.submit(file.close)  # behind what a thread may still read for who was cancelled

    def read(self) -> bytes:
        if self.data is not None:
            return self.data
        return self.path.read_bytes() if self.path else b""


def _some_of(file: IO[bytes]) -> list[bytes]:
    pieces: list[bytes] = []
    for _ in range(_AT_ONCE // CHUNK):
        if not (piece := file.read(CHUNK)):
            break
        pieces.append(piece)
    return pieces


class Spool:
    """A payload's way into a file of its own. Either `close` or `drop` ends it.

    Raises (`write`, `close`):
        OSError: the disk's; the file is to be dropped.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._parts: list[bytes] = []
        self._waiting = 0
        self._turn = threading.Lock()  # a thread that writes for who was cancelled is not waited for
        self._fd = -1
        self._path: Path | None = None
        self._dropped = False

    async def write(self, part: bytes) -> None:
        self._parts.append(part)
        self._waiting += len(part)
        if self._waiting >= _AT_ONCE:
            await self._flush()

    async def _flush(self, *, close: bool = False) -> None:
        parts, self._parts, self._waiting = self._parts, [], 0
        await in_thread(self._write, parts, close)

    def _write(self, parts: list[bytes], close: bool) -> None:
        with self._turn:
            if self._dropped:
                return
            if self._path is None:
                self._fd, name = tempfile.mkstemp(prefix=".body-", dir=self._folder)
                self._path = Path(name)
            for part in parts:
                rest = memoryview(part)
                while rest:
                    rest = rest[os.write(self._fd, rest) :]
            if close:
                fd, self._fd = self._fd, -1
                os.close(fd)

    async def close(self) -> Path:
        """The file, which is the caller's from now on."""
        await self._flush(close=True)
        assert self._path is not None
        return self._path

    async def drop(self) -> None:
        """Nobody wants it: what it took is free again."""
        self._parts, self._waiting = [], 0
        await asyncio.shield(in_thread(self._drop))

    def _drop(self) -> None:
        with self._turn:
            self._dropped = True
            with contextlib.suppress(OSError):
                if self._fd >= 0:
                    fd, self._fd = self._fd, -1
                    os.close(fd)
            if self._path is not None:
                with contextlib.suppress(OSError):
                    self._path.unlink(missing_ok=True)


async def spooled(payload: Payload, folder: Path) -> Payload:
    """The same, in a file as well.

    Raises:
        OSError: the disk's; there is no file.
    """
    if payload.path is not None or payload.data is None:
        return payload
    spool = Spool(folder)
    try:
        await spool.write(payload.data)
        return Payload(payload.data, await spool.close())
    except BaseException:
        await spool.drop()
        raise
