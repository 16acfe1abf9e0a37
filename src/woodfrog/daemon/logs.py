"""What functions print: one NDJSON file per app, bounded, followed live."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["AppLog", "LogBook", "rotate_own"]

_LINE_LIMIT = 64 << 10
_BLOCK = 64 << 10
_BACKLOG = 4 << 20


@dataclass(eq=False)
class _Follower:
    """Lines on their way to one reader. One that reads too slowly misses some, and is told so."""

    chunks: deque[bytes] = field(default_factory=deque)
    size: int = 0
    missed: int = 0

    def put(self, data: bytes, lines: int) -> None:
        if self.size + len(data) > _BACKLOG:
            self.missed += lines
            return
        self.chunks.append(data)
        self.size += len(data)

    def take(self) -> bytes:
        data = b"".join(self.chunks)
        self.chunks.clear()
        self.size = 0
        if self.missed:
            data += _encode([_own(f"{self.missed} lines left out: read too slowly")])
            self.missed = 0
        return data


class AppLog:
    """Lines of one app. Half of the byte budget is the current file, half the one before."""

    def __init__(self, path: Path, budget: int) -> None:
        self._path = path
        self._old = path.with_suffix(".old")
        self._limit = max(budget // 2, 1 << 16)
        self._fd = -1
        self._size = 0
        with contextlib.suppress(OSError):  # then the next write tries again
            self._open()
        self._followers: set[_Follower] = set()
        self._changed = asyncio.Event()
        self._ended = False
        self.dropped = 0
        """Lines that could not be written, on a full disk or for want of a descriptor; said in the log afterwards."""

    def _open(self) -> None:
        fd = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            size = os.fstat(fd).st_size
            if size and os.pread(fd, 1, size - 1) != b"\n":
                size += os.write(fd, b"\n")  # the daemon was killed in the middle of a line
        except OSError:
            os.close(fd)
            raise
        self._fd, self._size = fd, size

    def write(self, records: list[dict[str, Any]]) -> None:
        """Append; a full disk must not take the functions down, so this never fails."""
        data = _encode(records)
        for follower in self._followers:
            follower.put(data, len(records))
        self._changed.set()
        try:
            if self.dropped:
                self._append(_encode([_own(f"{self.dropped} lines lost: no room for them")]))
                self.dropped = 0
            self._append(data)
        except OSError:
            self.dropped += len(records)
        if self._size > self._limit:
            with contextlib.suppress(OSError):  # then the file grows on, and the next write tries again
                os.replace(self._path, self._old)
                self.close()
                self._open()

    def _append(self, data: bytes) -> None:
        """All of `data`, or nothing of it."""
        if self._fd < 0:
            self._open()
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError:
            os.ftruncate(self._fd, self._size)
            raise
        self._size += len(data)

    async def read(self, *, since: float, follow: bool) -> AsyncIterator[bytes]:
        """NDJSON from `since` (Unix time) on, whole lines; with `follow`, on and on until `end`."""
        follower = _Follower()
        files: list[tuple[BinaryIO, int]] = []
        # One moment for both: what is in the files now is read there, what comes later goes to the follower.
        for path in (self._old, self._path):
            with contextlib.suppress(FileNotFoundError):
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                files.append((os.fdopen(fd, "rb"), os.fstat(fd).st_size))
        if follow:
            self._followers.add(follower)
        try:
            for file, size in files:
                while size and (lines := file.readlines(min(size, _BLOCK))):
                    read = sum(map(len, lines))
                    if read > size:  # appended to since
                        lines = b"".join(lines)[:size].splitlines(keepends=True)
                    size -= min(read, size)
                    block = b"".join(line for line in lines if not since or _time_of(line) >= since)
                    if block:
                        yield block
            while follow:
                while follower.chunks or follower.missed:
                    yield follower.take()
                if self._ended:
                    return
                self._changed.clear()
                await self._changed.wait()
        finally:
            self._followers.discard(follower)
            for file, _ in files:
                file.close()

    @property
    def followed(self) -> bool:
        return bool(self._followers)

    def end(self) -> None:
        """Nothing more is written: who follows it gets the rest, and the end."""
        self._ended = True
        self._changed.set()

    def close(self) -> None:
        """Give the descriptor back; the next write opens the file again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _encode(records: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(r, separators=(",", ":")).encode() + b"\n" for r in records)


def _own(text: str) -> dict[str, Any]:
    now = round(time.time(), 3)
    return {"t": now, "instance": "", "function": "", "stream": "system", "call": None, "line": text}


def _time_of(line: bytes) -> float:
    found = re.match(rb'\{"t":([0-9.]+)', line)
    return float(found.group(1)) if found else 0.0


class LogBook:
    """All apps' logs; cuts the instances' raw output into lines."""

    def __init__(self, root: Path, budget: int) -> None:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._root = root
        self._budget = budget
        self._apps: dict[str, AppLog] = {}
        self._partial: dict[tuple[str, str], bytes] = {}

    def app(self, name: str) -> AppLog:
        if name not in self._apps:
            self._apps[name] = AppLog(self._root / f"{name}.ndjson", self._budget)
        return self._apps[name]

    def feed(self, app: str, *, instance: str, function: str, stream: str, call: str | None, data: bytes) -> None:
        """Take raw output; whole lines are written, the rest waits for its end."""
        key = (instance, stream)
        data = self._partial.pop(key, b"") + data
        *lines, rest = data.split(b"\n")
        while len(rest) > _LINE_LIMIT:
            lines.append(rest[:_LINE_LIMIT])
            rest = rest[_LINE_LIMIT:]
        if rest:
            self._partial[key] = rest
        self._emit(app, instance, function, stream, call, lines)

    def lines(self, app: str, text: str, *, instance: str, function: str, stream: str, call: str | None) -> None:
        """Whole lines, after what the stream has of an unfinished one."""
        rest = self._partial.pop((instance, stream), b"")
        lines = text.rstrip("\n").encode(errors="replace").split(b"\n")
        self._emit(app, instance, function, stream, call, [rest, *lines] if rest else lines)

    def end(self, app: str, instance: str, function: str) -> None:
        """The instance is gone: an unfinished line is a line."""
        for stream in ("stdout", "stderr", "system"):
            rest = self._partial.pop((instance, stream), b"")
            if rest:
                self._emit(app, instance, function, stream, None, [rest])

    def note(self, app: str, text: str, *, instance: str = "", function: str = "") -> None:
        """A line of the system's own."""
        self._emit(app, instance, function, "system", None, [text.encode(errors="replace")])

    def _emit(self, app: str, instance: str, function: str, stream: str, call: str | None, lines: list[bytes]) -> None:
        if not lines:
            return
        now = round(time.time(), 3)
        base = {"t": now, "instance": instance, "function": function, "stream": stream, "call": call}
        self.app(app).write([{**base, "line": line.decode(errors="replace")} for line in lines])

    def remove(self, name: str) -> None:
        """Forget an app's log.

        Raises:
            OSError: it is still there.
        """
        log = self._apps.pop(name, None)
        if log is not None:
            log.end()
            log.close()
        for path in (self._root / f"{name}.ndjson", self._root / f"{name}.old"):
            path.unlink(missing_ok=True)

    def settle(self, live: set[str], over: set[str]) -> None:
        """Keep no descriptor for what is not written to.

        Args:
            live: apps that run, or have containers.
            over: apps that will never be written of again.
        """
        for name in self._apps.keys() - live:
            log = self._apps[name]
            if name in over:
                log.end()
            log.close()
            if not log.followed:
                del self._apps[name]

    def close(self) -> None:
        for log in self._apps.values():
            log.close()


def rotate_own(path: Path, limit: int) -> None:
    """Begin the daemon's own log anew when it is longer than `limit` bytes; the one before it is kept as `<path>.old`.

    Does nothing where standard output and standard error go elsewhere.

    Raises:
        OSError: it goes on as it was.
    """
    there = os.stat(path) if path.exists() else None
    if there is None or there.st_size <= limit:
        return
    streams = [fd for fd in (1, 2) if os.path.samestat(os.fstat(fd), there)]
    if not streams:
        return
    new = path.with_name(path.name + ".new")
    fd = os.open(new, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        old = path.with_name(path.name + ".old")
        old.unlink(missing_ok=True)
        os.link(path, old)  # so that there is a log at every moment
        os.rename(new, path)
        for stream in streams:
            os.dup2(fd, stream)
    finally:
        os.close(fd)
