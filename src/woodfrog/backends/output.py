"""What workers print: read from their pipes, no more of it than leaves the event loop to the others."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import struct
import termios
import time
from collections.abc import Callable, Mapping

__all__ = ["OutputReader"]

CHUNK = 16 << 10
WHOLE = 64 << 10
"""What a pipe holds. One that its writer has made larger is read on later."""
SHORT_S = 0.002
REST = 3.0
"""Reading that took longer than a moment is followed by so many times as long without: all output together has a
quarter of the loop, whoever prints it, and a writer waits for its pipe meanwhile."""
PATIENCE_S = 0.25


class OutputReader:
    """The pipes of all workers of a backend.

    Args:
        tell: is given instance, stream and bytes.
    """

    def __init__(self, tell: Callable[[str, str, bytes], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._tell = tell
        self._clock = clock
        self._free = 0.0
        """When output has had its share; in the future, what it has taken beyond that."""
        self._resting: dict[int, asyncio.TimerHandle] = {}

    def add(self, instance_id: str, fd: int, stream: str) -> None:
        """Read a non-blocking descriptor from now on, until `close`."""
        asyncio.get_running_loop().add_reader(fd, self._readable, instance_id, fd, stream)

    def _readable(self, instance_id: str, fd: int, stream: str) -> None:
        # Opened for both ways: with a writer of our own it never ends, also between a freeze and a thaw.
        took = self._take(instance_id, fd, stream, CHUNK)
        if took > SHORT_S:
            loop = asyncio.get_running_loop()
            loop.remove_reader(fd)
            self._resting[fd] = loop.call_later(self._free - self._clock(), self._again, instance_id, fd, stream)

    def _again(self, instance_id: str, fd: int, stream: str) -> None:
        del self._resting[fd]
        self.add(instance_id, fd, stream)

    def _take(self, instance_id: str, fd: int, stream: str, size: int) -> float:
        """How long it took."""
        begin = self._clock()
        with contextlib.suppress(BlockingIOError):
            if size:
                self._tell(instance_id, stream, os.read(fd, size))
        end = self._clock()
        if end - begin > SHORT_S:
            self._free = max(self._free, end) + REST * (end - begin)
        return end - begin

    def drain(self, instance_id: str, fds: Mapping[int, str], *, always: bool = False) -> None:
        """Read what is in the pipes by now: what comes next in the log was said after it.

        Never until they are empty: a process that prints without end would have the daemon read without end. Where
        output has taken far more than its share, it waits for its turn, unless `always`.
        """
        for fd, stream in fds.items():
            if always or self._free - self._clock() < PATIENCE_S:
                self._take(instance_id, fd, stream, min(_waiting(fd), WHOLE))

    def close(self, instance_id: str, fds: Mapping[int, str]) -> None:
        """Read what is left and close the descriptors."""
        self.drain(instance_id, fds, always=True)
        for fd in fds:
            if left := _waiting(fd):
                self._tell(instance_id, "system", b"%d bytes of output lost: its pipe was made larger\n" % left)
            handle = self._resting.pop(fd, None)
            if handle is None:
                asyncio.get_running_loop().remove_reader(fd)
            else:
                handle.cancel()
            os.close(fd)


def _waiting(fd: int) -> int:
    (size,) = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))
    return int(size)
