"""Room on the state directory's disk: some kept for the daemon itself, and who takes the rest."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from pathlib import Path

from woodfrog.store.files import FREE_SOME

__all__ = ["Room"]

log = logging.getLogger("woodfrog")

_SIZE = 16 << 20
_PIECE = 1 << 20
_FOR_STARTS = 4 << 20
"""The last of it is given up at a start only, when no function runs that would take it at once."""
_LEFT = 64 << 20
"""The reserve is made whole again where so much is free beside it: not in the face of who just needs it."""
_LOW = 256 << 20
_MOST_FILES = 1_000_000
_KINDS = (
    ("snapshots", ("snapshots", "store", "sealed", "arriving")),
    ("results and arguments of calls", ("calls",)),
    ("code", ("code", "blobs")),
    ("logs", ("logs", "events")),
)


class Room:
    """The reserve is a file. On a disk that others have filled it is given up, piece by piece, to what the daemon has
    to write: else nobody could have it remove what fills the disk."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._path = home / "reserve"
        self._taken = ""
        """Who takes it, in words; known while there is little left."""

    def free(self) -> int:
        """Bytes that everybody may still take."""
        found = os.statvfs(self._home)
        return found.f_bavail * found.f_frsize

    def _have(self) -> int:
        try:
            return os.stat(self._path).st_size
        except OSError:
            return 0

    def _cut(self, size: int) -> None:
        fd = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.ftruncate(fd, size)
            os.fsync(fd)  # until then some file systems do not give the blocks away
        finally:
            os.close(fd)

    def give(self) -> bool:
        """Give up a piece, for something that had no room; whether there was one to give."""
        have = self._have()
        if have <= _FOR_STARTS:
            return False
        try:
            self._cut(max(_FOR_STARTS, have - _PIECE))
        except OSError:
            return False
        return True

    def give_all(self) -> None:
        """For a start: give up what there is, if it is needed. `take` takes back what was not."""
        if self.free() < _FOR_STARTS and self._have():
            with contextlib.suppress(OSError):
                self._cut(0)

    def take(self, left: int = _LEFT) -> None:
        """Make the reserve whole again, as far as `left` bytes stay free beside it."""
        have = self._have()
        size = min(_SIZE, have + self.free() - left)
        if size <= have:
            return
        with contextlib.suppress(OSError):
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, size)
            except OSError:
                os.ftruncate(fd, have)
            finally:
                os.close(fd)

    # Who takes it

    @property
    def remedy(self) -> str:
        """What to do on a full disk, and who takes it as far as that is known."""
        return f"{FREE_SOME}{self._taken and f'; it holds {self._taken}'}"

    async def look(self) -> None:
        """When little is left, find out who takes it, and say so once."""
        free = self.free()
        if free >= _LOW:
            self._taken = ""
        elif not self._taken:
            self._taken = await asyncio.to_thread(self._count)
            log.warning("disk: %d MiB free for %s: it holds %s; %s", free >> 20, self._home, self._taken, FREE_SOME)

    def _count(self) -> str:
        volumes: dict[str, int] = {}
        with contextlib.suppress(OSError):
            for name in os.listdir(self._home / "volumes"):
                volumes[name] = _size_of(self._home / "volumes" / name)
        largest = sorted(volumes, key=lambda n: -volumes[n])[:3]
        names = ", ".join(f"{name} {_text(volumes[name])}" for name in largest if volumes[name])
        parts = [f"volumes {_text(sum(volumes.values()))}{names and f' ({names})'}"]
        for kind, folders in _KINDS:
            parts.append(f"{kind} {_text(sum(_size_of(self._home / f) for f in folders))}")
        return ", ".join(parts)


def _text(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB" if size >= 1 << 30 else f"{size >> 20} MiB"


def _size_of(top: Path) -> int:
    """What a directory takes of its own disk, as far as it can be read. User code may change it meanwhile."""
    total, count, todo = 0, 0, [str(top)]
    seen: set[int] = set()
    with contextlib.suppress(OSError):
        device = os.stat(top, follow_symlinks=False).st_dev
        while todo and count < _MOST_FILES:
            with contextlib.suppress(OSError), os.scandir(todo.pop()) as entries:
                for entry in entries:
                    found = entry.stat(follow_symlinks=False)
                    count += 1
                    if found.st_dev != device or found.st_ino in seen:
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        todo.append(entry.path)
                    elif found.st_nlink > 1:
                        seen.add(found.st_ino)
                    total += found.st_blocks * 512
    return total
