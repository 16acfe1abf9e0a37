"""The daemon's end of a worker's socket, against workers that misbehave."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import socket
import struct
import subprocess
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from woodfrog.backends import payload as payload_module
from woodfrog.backends.connection import WorkerConnection
from woodfrog.backends.payload import Payload
from woodfrog.errors import InstanceCrashed, StoreError
from woodfrog.protocol import HEAD, MAGIC, MAX_BODY, MAX_HEADER, SPOOL_BYTES, VERSION, ProtocolError, pack, parse_header


class Pair:
    """A connection and the worker's naked end of it."""

    def __init__(self, connection: WorkerConnection, worker: socket.socket, spool: Path) -> None:
        self.connection = connection
        self.worker = worker
        self.spool = spool

    async def say(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.worker, data)

    async def hear(self, count: int) -> bytes:
        loop = asyncio.get_running_loop()
        out = b""
        while len(out) < count:
            part = await loop.sock_recv(self.worker, count - len(out))
            if not part:
                break
            out += part
        return out

    def left(self) -> list[str]:
        return os.listdir(self.spool)


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)

    async def connect() -> socket.socket:
        return ours

    spool = tmp_path / "spool"
    spool.mkdir()
    gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    connection = await WorkerConnection.open(connect, timeout=5, spool=spool, gone=gone)
    yield Pair(connection, theirs, spool)
    theirs.close()
    await connection.close()


def head(*, magic: bytes = MAGIC, version: int = VERSION, header: int = 2, body: int = 0) -> bytes:
    return struct.pack("!4sIIQ", magic, version, header, body)


async def test_frames_both_ways(pair: Pair, tmp_path: Path) -> None:
    big = os.urandom(3 << 20)
    (tmp_path / "big").write_bytes(big)
    task = asyncio.ensure_future(
        pair.connection.request(
            {"type": "call"}, Payload(data=b"one"), Payload(path=tmp_path / "big"), Payload(), expect="result"
        )
    )
    fixed = await pair.hear(HEAD.size)
    _, _, header_len, body_len = HEAD.unpack(fixed)
    assert body_len == 3 + len(big)
    assert json.loads(await pair.hear(header_len)) == {"type": "call"}
    assert await pair.hear(body_len) == b"one" + big
    await pair.say(pack({"type": "result"}, 5) + b"hello" + pack({"type": "pong"}))
    reply = await task
    assert (reply.type, reply.body.read()) == ("result", b"hello")
    assert (await pair.connection.receive()).type == "pong"


async def test_a_frame_waits_for_the_body_of_the_one_before(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(20 << 20))
    begun = asyncio.ensure_future(pair.connection.send({"type": "call"}, Payload(path=tmp_path / "big")))
    await asyncio.sleep(0.01)
    assert not begun.done()
    after = asyncio.ensure_future(pair.connection.send({"type": "close"}))
    await asyncio.sleep(0.01)
    for kind, size in (("call", 20 << 20), ("close", 0)):
        _, _, header_len, body_len = HEAD.unpack(await pair.hear(HEAD.size))
        assert json.loads(await pair.hear(header_len)) == {"type": kind} and body_len == size
        assert not any(await pair.hear(body_len))
    await begun
    await after


@pytest.mark.parametrize("extra", [0, 1, 3 << 20])
async def test_large_bodies_go_to_disk(pair: Pair, extra: int) -> None:
    body = os.urandom(SPOOL_BYTES + extra)
    task = asyncio.ensure_future(pair.connection.receive())
    await pair.say(pack({"type": "result"}, len(body)) + body)
    reply = await task
    assert (reply.body.path is None) == (extra == 0)
    assert reply.body.read() == body and reply.body.size == len(body)
    assert reply.body.path is None or (reply.body.path.stat().st_mode & 0o777 == 0o600)


async def test_large_bodies_do_not_fill_the_memory(pair: Pair) -> None:
    size, block = 256 << 20, bytes(1 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    task = asyncio.ensure_future(pair.connection.receive())
    await pair.say(pack({"type": "result"}, size))
    for _ in range(size // len(block)):
        await pair.say(block)
    assert (await task).body.size == size
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (head(magic=b"HTTP"), "not a woodfrog message"),
        (head(version=VERSION + 1), "protocol version"),
        (head(header=MAX_HEADER + 1), "over the limit"),
        (head(header=0xFFFFFFFF), "over the limit"),
        (head(body=MAX_BODY + 1), "over the limit"),
        (head(body=2**64 - 1), "over the limit"),
        (head(header=2) + b"[]", "not an object with a type"),
        (head(header=2) + b"{}", "not an object with a type"),
        (head(header=10) + b'{"type":1}', "not an object with a type"),
        (head(header=3) + b"\xff\xfe\x00", "not JSON"),
        (head(header=0), "not JSON"),
        (head(header=200_000) + b"[" * 200_000, "not JSON"),
        (head(header=6001) + b"-" + b"9" * 6000, "not JSON|not an object"),
    ],
)
async def test_what_is_not_of_the_protocol(pair: Pair, data: bytes, message: str) -> None:
    task = asyncio.ensure_future(pair.connection.receive())
    await pair.say(data)
    with pytest.raises(ProtocolError, match=message):
        await asyncio.wait_for(task, 10)


async def test_text_that_cannot_be_encoded_is_mended(pair: Pair) -> None:
    """A lone surrogate from a file name would break every log and answer it comes to."""
    await pair.say(pack({"type": "failed", "error": {"message": "caf\udce9 \U0001f438 \\ud800"}}))
    reply = await pair.connection.receive()
    assert reply.header["error"]["message"] == "caf? \U0001f438 \\ud800"


@pytest.mark.parametrize("size", [100, SPOOL_BYTES + (2 << 20)])
@pytest.mark.parametrize("cut", [0, 5, HEAD.size, HEAD.size + 3, HEAD.size + 60, -1])
async def test_the_worker_dies_in_the_middle(pair: Pair, size: int, cut: int) -> None:
    frame = pack({"type": "result", "pad": "x" * 10}, size) + bytes(size)
    task = asyncio.ensure_future(pair.connection.receive())
    await pair.say(frame[:cut])
    pair.worker.close()
    with pytest.raises(InstanceCrashed, match="closed its connection"):
        await task
    assert pair.left() == []


async def test_cancelled_in_the_middle_of_a_large_body(pair: Pair) -> None:
    task = asyncio.ensure_future(pair.connection.receive())
    await pair.say(pack({"type": "result"}, SPOOL_BYTES * 2) + bytes(SPOOL_BYTES))
    while not pair.left():
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert pair.left() == []


async def test_slow_trickle(pair: Pair) -> None:
    """A byte at a time, in odd portions, several frames."""
    frames = pack({"type": "item"}, 3) + b"abc" + pack({"type": "done"})

    async def trickle() -> None:
        for i in range(len(frames)):
            await pair.say(frames[i : i + 1])
            if i % 7 == 0:
                await asyncio.sleep(0.001)

    task = asyncio.ensure_future(trickle())
    first = await pair.connection.receive()
    second = await pair.connection.receive()
    assert (first.type, first.body.read(), second.type) == ("item", b"abc", "done")
    await task
    silent = asyncio.ensure_future(pair.connection.receive())
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(silent, 0.05)


async def test_wrong_answer(pair: Pair) -> None:
    await pair.say(pack({"type": "pong"}))
    with pytest.raises(ProtocolError, match="answered 'pong' to 'boot', not 'booted'"):
        await pair.connection.request({"type": "boot"}, expect="booted")
    await pair.say(pack({"type": "failed", "stage": "import"}))
    assert (await pair.connection.request({"type": "boot"}, expect="booted")).type == "failed"


async def test_frozen_worker_must_close_and_say_nothing(pair: Pair) -> None:
    with pytest.raises(ProtocolError, match="did not close"):
        await pair.connection.wait_closed_by_worker(0.05)
    await pair.say(b"x")
    with pytest.raises(ProtocolError, match="after it froze"):
        await pair.connection.wait_closed_by_worker(1)
    pair.worker.close()
    await pair.connection.wait_closed_by_worker(1)


async def test_closing_does_not_wait_for_a_worker_that_does_not_read(pair: Pair) -> None:
    """A stopped worker with a large call in its socket must still be killable."""
    sending = asyncio.ensure_future(pair.connection.send({"type": "call"}, Payload(data=bytes(64 << 20))))
    await asyncio.sleep(0.05)
    assert not sending.done()
    await asyncio.wait_for(pair.connection.close(), 2)
    with pytest.raises(InstanceCrashed):
        await asyncio.wait_for(sending, 2)
    with pytest.raises(InstanceCrashed):
        await asyncio.wait_for(pair.connection.receive(), 2)


async def test_sending_to_a_dead_worker(pair: Pair) -> None:
    pair.worker.close()
    with pytest.raises(InstanceCrashed):
        for _ in range(100):
            await pair.connection.send({"type": "call"}, Payload(data=bytes(1 << 20)))
            await asyncio.sleep(0)


async def test_a_payload_that_is_gone_is_not_the_worker_s_fault(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="payload is gone"):
        await pair.connection.send({"type": "call"}, Payload(path=tmp_path / "nowhere"))
    await pair.connection.send({"type": "ping"})  # nothing of the other was sent
    _, _, header_len, body_len = HEAD.unpack(await pair.hear(HEAD.size))
    assert json.loads(await pair.hear(header_len)) == {"type": "ping"} and body_len == 0


@pytest.mark.parametrize("what", ["_some_of", "_write"])
async def test_nobody_else_waits_for_a_slow_disk(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    reached, free, gave_up = threading.Event(), threading.Event(), False
    of = payload_module if what == "_some_of" else payload_module.Spool
    real = getattr(of, what)

    def stands_still(*args: object) -> object:
        nonlocal gave_up
        reached.set()
        gave_up |= not free.wait(10)
        return real(*args)

    monkeypatch.setattr(of, what, stands_still)
    body = os.urandom(SPOOL_BYTES + 5)
    if what == "_some_of":
        path = tmp_path / "body"
        path.write_bytes(body)
        head = pack({"type": "call"}, len(body))
        sent = asyncio.ensure_future(pair.connection.send({"type": "call"}, Payload(path=path)))
        got = asyncio.ensure_future(pair.hear(len(head) + len(body)))
    else:
        sent = asyncio.ensure_future(pair.say(pack({"type": "result"}, len(body)) + body))
        got = asyncio.ensure_future(pair.connection.receive())
    while not reached.is_set():
        await asyncio.sleep(0.005)
    assert not gave_up and not got.done()
    free.set()
    await sent
    reply = await got
    assert (reply[-len(body) :] if isinstance(reply, bytes) else reply.body.read()) == body


async def test_no_place_for_a_large_body_costs_only_this_body(pair: Pair) -> None:
    os.rename(pair.spool, pair.spool.with_name("away"))
    task = asyncio.ensure_future(pair.connection.receive())
    await pair.say(pack({"type": "result"}, SPOOL_BYTES + 1) + bytes(SPOOL_BYTES + 1) + pack({"type": "pong"}))
    with pytest.raises(StoreError, match="cannot keep what the worker sent"):
        await task
    assert (await pair.connection.receive()).type == "pong"
    os.rename(pair.spool.with_name("away"), pair.spool)


@pytest.mark.root
async def test_full_disk_costs_only_this_body(pair: Pair) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "woodfrog-test", str(pair.spool)], check=True)
    try:
        task = asyncio.ensure_future(pair.connection.receive())
        await pair.say(pack({"type": "result"}, SPOOL_BYTES + 1) + bytes(SPOOL_BYTES + 1) + pack({"type": "pong"}))
        with pytest.raises(StoreError) as caught:
            await task
        assert caught.value.code == "disk-full" and pair.left() == []
        assert (await pair.connection.receive()).type == "pong"
    finally:
        subprocess.run(["umount", str(pair.spool)], check=True)


async def test_open_waits_for_the_listener(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    path = str(tmp_path / "s")

    async def connect() -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.setblocking(False)
        try:
            await loop.sock_connect(sock, path)
        except OSError:
            sock.close()
            raise
        return sock

    gone: asyncio.Future[None] = loop.create_future()
    with pytest.raises(InstanceCrashed, match="did not listen within"):
        await WorkerConnection.open(connect, timeout=0.05, spool=tmp_path, gone=gone)
    opening = asyncio.ensure_future(WorkerConnection.open(connect, timeout=5, spool=tmp_path, gone=gone))
    await asyncio.sleep(0.02)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        await (await opening).close()
    os.unlink(path)
    gone.set_result(None)
    with pytest.raises(InstanceCrashed, match="ended before it listened"):
        await WorkerConnection.open(connect, timeout=5, spool=tmp_path, gone=gone)


async def test_json_that_took_long_is_followed_by_a_rest(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    now, rests = [0.0], []
    sleep = asyncio.sleep

    def slow(data: bytes) -> dict[str, Any]:
        now[0] += 0.5 if b"long" in data else 0.0
        return parse_header(data)

    async def rest(seconds: float) -> None:
        rests.append(seconds)
        await sleep(0)

    monkeypatch.setattr("woodfrog.backends.connection.parse_header", slow)
    monkeypatch.setattr("woodfrog.backends.connection.time.monotonic", lambda: now[0])
    monkeypatch.setattr("woodfrog.backends.connection.asyncio.sleep", rest)
    await pair.say(pack({"type": "short"}) + pack({"type": "long"}) + pack({"type": "short"}))
    assert [(await pair.connection.receive()).type for _ in range(3)] == ["short", "long", "short"]
    assert rests == [1.5]
