"""What functions print: one NDJSON file per app, bounded, followed live."""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

__all__ = ["AppLog", "LogBook"]

_LINE_LIMIT = 64 << 10


class AppLog:
    """Lines of one app. Half of the byte budget is the current file, half the one before."""

    def __init__(self, path: Path, budget: int) -> None:
        self._path = path
        self._limit = max(budget // 2, 1 << 16)
        self._file = open(
            os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600), "ab", buffering=1 << 16
        )
        self._size = os.fstat(self._file.fileno()).st_size
        self._followers: set[deque[bytes]] = set()
        self._changed = asyncio.Event()
        self.dropped = 0

    def write(self, records: list[dict[str, Any]]) -> None:
        data = b"".join(json.dumps(r, separators=(",", ":")).encode() + b"\n" for r in records)
        try:
            self._file.write(data)
            self._file.flush()
        except OSError:
            self.dropped += len(records)  # a full disk must not take the functions down
            return
        self._size += len(data)
        if self._size > self._limit:
            self._file.close()
            os.replace(self._path, self._path.with_suffix(".old"))
            self._file = open(
                os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600), "ab", 1 << 16
            )
            self._size = 0
        for follower in self._followers:
            follower.append(data)
        self._changed.set()

    async def read(self, *, since: float, follow: bool) -> AsyncIterator[bytes]:
        """NDJSON from `since` (Unix time) on; with `follow`, on and on."""
        queue: deque[bytes] = deque(maxlen=10_000)
        if follow:
            self._followers.add(queue)
        try:
            for path in (self._path.with_suffix(".old"), self._path):
                if not path.exists():
                    continue
                with open(path, "rb") as f:
                    for line in f:
                        if not since or _time_of(line) >= since:
                            yield line
            while follow:
                while queue:
                    yield queue.popleft()
                self._changed.clear()
                if not queue:
                    await self._changed.wait()
        finally:
            self._followers.discard(queue)

    def close(self) -> None:
        self._file.close()


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
        if len(rest) > _LINE_LIMIT:
            lines.append(rest)
            rest = b""
        if rest:
            self._partial[key] = rest
        self._emit(app, instance, function, stream, call, lines)

    def end(self, app: str, instance: str, function: str) -> None:
        """The instance is gone: an unfinished line is a line."""
        for stream in ("stdout", "stderr", "system"):
            rest = self._partial.pop((instance, stream), b"")
            if rest:
                self._emit(app, instance, function, stream, None, [rest])

    def note(self, app: str, text: str, *, instance: str = "", function: str = "") -> None:
        """A line of the system's own."""
        self._emit(app, instance, function, "system", None, [text.encode()])

    def _emit(self, app: str, instance: str, function: str, stream: str, call: str | None, lines: list[bytes]) -> None:
        if not lines:
            return
        now = round(time.time(), 3)
        base = {"t": now, "instance": instance, "function": function, "stream": stream, "call": call}
        self.app(app).write([{**base, "line": line.decode(errors="replace")} for line in lines])

    def close(self) -> None:
        for log in self._apps.values():
            log.close()
