"""What workers print is read, in order and whole, and never takes the event loop for itself."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Iterator

import pytest

from woodfrog.backends.output import CHUNK, WHOLE, OutputReader

_F_SETPIPE_SZ = 1031


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ours, theirs = os.pipe()
    os.set_blocking(ours, False)
    os.set_blocking(theirs, False)
    yield ours, theirs
    os.close(theirs)


class Listener:
    """Writes on while it is told, as a program does that prints without end; each telling takes `seconds`."""

    def __init__(self, theirs: int, seconds: float = 0.0) -> None:
        self.said: list[tuple[str, bytes]] = []
        self.theirs = theirs
        self.now = 0.0
        self.seconds = seconds

    def tell(self, instance: str, stream: str, data: bytes) -> None:
        assert len(self.said) < 20, "read without end"
        self.said.append((stream, data))
        self.now += self.seconds
        if self.seconds:
            os.write(self.theirs, b"more")

    def clock(self) -> float:
        return self.now


async def test_draining_ends_though_the_writer_does_not(pipe: tuple[int, int]) -> None:
    ours, theirs = pipe
    listener = Listener(theirs, 0.05)
    reader = OutputReader(listener.tell, listener.clock)
    os.write(theirs, b"first")
    reader.drain("i", {ours: "stdout"})
    assert listener.said == [("stdout", b"first")]
    # Its share is used up many times over: the rest waits for its turn, except where it must be read.
    listener.now += 0.01
    for _ in range(3):
        reader.drain("i", {ours: "stdout"}, always=True)
    taken = len(listener.said)
    reader.drain("i", {ours: "stdout"})
    assert taken == 4 and len(listener.said) == taken
    os.close(ours)


async def test_output_rests_when_it_took_long(pipe: tuple[int, int]) -> None:
    ours, theirs = pipe
    listener = Listener(theirs, 0.1)
    reader = OutputReader(listener.tell, listener.clock)
    reader.add("i", ours, "stdout")
    os.write(theirs, b"x")
    await asyncio.sleep(0.05)
    assert len(listener.said) == 1  # 0.3 s of rest, of which nothing is over by this clock
    await asyncio.sleep(0.4)
    assert len(listener.said) == 2
    reader.close("i", {ours: "stdout"})
    with pytest.raises(OSError):
        os.fstat(ours)
    await asyncio.sleep(0.5)  # nobody reads the descriptor's number later


async def test_what_is_left_is_told_whole_and_what_was_lost_is_said(pipe: tuple[int, int]) -> None:
    ours, theirs = pipe
    listener = Listener(theirs)
    reader = OutputReader(listener.tell, listener.clock)
    fcntl.fcntl(theirs, _F_SETPIPE_SZ, 4 * WHOLE)
    reader.add("i", ours, "stdout")
    os.write(theirs, b"y" * (WHOLE + CHUNK))
    reader.close("i", {ours: "stdout"})
    assert [(stream, len(data)) for stream, data in listener.said] == [("stdout", WHOLE), ("system", 53)]
    assert listener.said[1][1] == b"%d bytes of output lost: its pipe was made larger\n" % CHUNK
