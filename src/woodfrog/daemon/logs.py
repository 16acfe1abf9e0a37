"""What functions print: one NDJSON file per app, bounded, followed live."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from json.encoder import encode_basestring_ascii
from pathlib import Path
from typing import Any

__all__ = ["AppLog", "LogBook", "rotate_own"]

_LINE_LIMIT = 64 << 10
_BLOCK = 64 << 10
_CONTAINER = re.compile("i-[0-9a-f]+-[0-9]+")
"""The whole id of one: it is also the beginning of others."""
_HEAD = re.compile(rb'\{"t":([0-9.]+)(?:,"n":([0-9]+))?')


class AppLog:
    """Lines of one app, numbered from 1 on. Half of the byte budget is the current file, half the one before."""

    def __init__(self, path: Path, budget: int) -> None:
        self._path = path
        self._old = path.with_suffix(".old")
        self._limit = max(budget // 2, 1 << 16)
        self._fd = -1
        self._size = 0
        self._last: int | None = None
        """Number of the last line."""
        self._file = 1
        """Which file is the current one; the old one is the one before."""
        self._readers = 0
        self._changed = asyncio.Event()
        self._ended = False
        self.dropped = 0
        """Lines that could not be written, on a full disk or for want of a descriptor; said in the log afterwards."""
        with contextlib.suppress(OSError):  # then the next write tries again
            self._open()

    def _open(self) -> None:
        fd = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            size = os.fstat(fd).st_size
            if size and os.pread(fd, 1, size - 1) != b"\n":
                size += os.write(fd, b"\n")  # the daemon was killed in the middle of a line
            if self._last is None:
                self._last = _last_number(self._path) or _last_number(self._old)
        except OSError:
            os.close(fd)
            raise
        self._fd, self._size = fd, size

    def write(self, who: Mapping[str, Any], lines: list[str]) -> None:
        """Append; a full disk must not take the functions down, so this never fails.

        Args:
            who: what the lines have in common: time, and where they are from.
        """
        try:
            if self.dropped:
                # As of one of its containers: a run shows these.
                self._append(_own(who), [f"{self.dropped} lines lost: no room for them"])
                self.dropped = 0
            self._append(who, lines)
        except OSError:
            self.dropped += len(lines)
        if self._size > self._limit:
            with contextlib.suppress(OSError):  # then the file grows on, and the next write tries again
                os.replace(self._path, self._old)
                self._file += 1
                self.close()
                self._open()
        self._changed.set()

    def _append(self, who: Mapping[str, Any], lines: list[str]) -> None:
        """All of them, or nothing."""
        if self._fd < 0:
            self._open()
        first = (self._last or 0) + 1
        data = _encode(first, who, lines)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError:
            os.ftruncate(self._fd, self._size)
            raise
        self._size += len(data)
        self._last = first + len(lines) - 1

    async def read(self, *, since: float = 0.0, after: int | None = None, follow: bool) -> AsyncIterator[bytes]:
        """NDJSON, whole lines. A reader who falls behind goes on in the files, and is told of lines that are no longer
        there.

        Args:
            since: Unix time of the first.
            after: number of the line before the first.
            follow: on and on until `end`.
        """
        last = self._last or 0
        if after is not None and after > last:
            after = 0  # of a log that was removed since
        number, file = self._file - 1, None
        self._readers += 1
        try:
            while True:
                if file is None:
                    with contextlib.suppress(FileNotFoundError):
                        file = (self._path if number == self._file else self._old).open("rb")
                # Nothing is written between this look and the wait below: no line comes unseen.
                if file is not None and (lines := file.readlines(_BLOCK)):
                    wanted, after = _pick(lines, since, after)
                    if wanted:
                        yield b"".join(wanted)
                    else:
                        await asyncio.sleep(0)
                    if not follow and (after or 0) >= last > 0:
                        return
                elif number < self._file:
                    if file is not None:
                        file.close()
                    number, file = max(number + 1, self._file - 1), None
                elif self._ended or not follow:
                    if self.dropped:
                        yield _encode(0, _own({}), [f"{self.dropped} lines lost: no room for them"])
                    return
                else:
                    self._changed.clear()
                    await self._changed.wait()
        finally:
            self._readers -= 1
            if file is not None:
                file.close()

    async def show(
        self,
        which: Mapping[str, str],
        *,
        last: int | None = None,
        since: float = 0.0,
        after: int | None = None,
        follow: bool,
    ) -> AsyncIterator[bytes]:
        """As `read`, of some lines only.

        Args:
            which: `function` by its name, `instance` and `call` by their ids or the beginnings of these; "" = all.
            last: so many before those that are still to come; None = all.
        """
        want = _chooser(which)
        if last is not None and after is None:
            if want is None:
                after = number - last if (number := self._last or 0) > last else None
            else:
                kept: deque[bytes] = deque(maxlen=last)
                after = 0
                async for chunk in self.read(since=since, follow=False):
                    lines = chunk.splitlines(keepends=True)
                    kept.extend(line for line in lines if want(line))
                    after = max(after, _head(lines[-1])[1])
                if kept:
                    yield b"".join(kept)
                if not follow:
                    return
        async for chunk in self.read(since=since, after=after, follow=follow):
            if want is None:
                yield chunk
            elif lines := [line for line in chunk.splitlines(keepends=True) if want(line)]:
                yield b"".join(lines)

    @property
    def followed(self) -> bool:
        return self._readers > 0

    def end(self) -> None:
        """Nothing more is written: who follows it gets the rest, and the end."""
        self._ended = True
        self._changed.set()

    def close(self) -> None:
        """Give the descriptor back; the next write opens the file again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _encode(first: int, who: Mapping[str, Any], lines: list[str]) -> bytes:
    """Successive lines as NDJSON. What they have in common is encoded once: who prints much keeps the daemon busy."""
    moment = json.dumps(who["t"])
    rest = json.dumps({name: value for name, value in who.items() if name != "t"}, separators=(",", ":"))[1:-1]
    text = encode_basestring_ascii
    return "".join(
        [f'{{"t":{moment},"n":{number},{rest},"line":{text(line)}}}\n' for number, line in enumerate(lines, first)]
    ).encode()


def _own(beside: Mapping[str, Any]) -> dict[str, Any]:
    """Whose a line of the log's own is: the same container's as another."""
    who = {key: beside.get(key, "") for key in ("instance", "function")}
    return {"t": round(time.time(), 3), **who, "stream": "system", "call": None}


def _head(line: bytes) -> tuple[float, int]:
    """Time and number; 0 for what is not there, as in the logs of versions that had no numbers."""
    found = _HEAD.match(line)
    return (float(found[1]), int(found[2] or 0)) if found else (0.0, 0)


def _last_number(path: Path) -> int:
    """The highest number in a file; 0 when there is none."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        size, length = file.seek(0, os.SEEK_END), _BLOCK
        while size:
            length = min(length, size)
            file.seek(size - length)
            numbers = [_head(line)[1] for line in file.read(length).split(b"\n")]
            if any(numbers) or length == size:
                return max(numbers)
            length *= 2
    return 0


def _chooser(which: Mapping[str, str]) -> Callable[[bytes], bool] | None:
    """Whether a line is one of those; None = all are."""
    wanted = {name: value for name, value in which.items() if value}
    if not wanted:
        return None
    needles = [encode_basestring_ascii(value)[1:-1].encode() for value in wanted.values()]

    def want(line: bytes) -> bool:
        if not all(needle in line for needle in needles):  # far sooner told than by reading it
            return False
        entry = json.loads(line)
        has = {name: str(entry.get(name) or "") for name in wanted}
        return all(
            has[n] == v or (n != "function" and not _CONTAINER.fullmatch(v) and has[n].startswith(v))
            for n, v in wanted.items()
        )

    return want


def _pick(lines: list[bytes], since: float, after: int | None) -> tuple[list[bytes], int | None]:
    """Of successive lines those from `since` on with numbers above `after`, and the number of the last.

    Where numbers are missing before them, a line says so.
    """
    end = _head(lines[-1])[1]
    if after is None:
        return [line for line in lines if not since or _head(line)[0] >= since], end or None
    if 0 < end <= after:
        return [], after
    wanted = []
    for line in lines:
        moment, number = _head(line)
        if number <= after:
            continue
        if number > after + 1:
            text = f"{number - after - 1} lines left out: the log was over its bound before they were read"
            wanted.append(_encode(number - 1, _own(json.loads(line)), [f"{text} (WOODFROG_LOG_MIB)"]))
        after = number
        if moment >= since:
            wanted.append(line)
    return wanted, after


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

    def note(self, app: str, text: str, *, instance: str = "", function: str = "", call: str | None = None) -> None:
        """A line of the system's own."""
        self._emit(app, instance, function, "system", call, [text.encode(errors="replace")])

    def _emit(self, app: str, instance: str, function: str, stream: str, call: str | None, lines: list[bytes]) -> None:
        if not lines:
            return
        now = round(time.time(), 3)
        who = {"t": now, "instance": instance, "function": function, "stream": stream, "call": call}
        self.app(app).write(who, [line.decode(errors="replace") for line in lines])

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
