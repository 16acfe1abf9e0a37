"""What a client may send, and how many may connect, before anybody knows who it is."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request

from unit.test_api import Daemon, daemon, error_of  # noqa: F401
from woodfrog.daemon import connections
from woodfrog.daemon.connections import JsonRoute, Local, Remote

KIND: type[Any] = Local
"""What the tests below fail without: uvicorn's own."""


@pytest.fixture
async def address(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Any]:
    app = FastAPI()
    app.router.route_class = JsonRoute

    @app.put("/size")
    async def size(request: Request) -> int:
        return sum([len(piece) async for piece in request.stream()])

    remote = getattr(request, "param", Local) is Remote
    sock = socket.socket(socket.AF_INET if remote else socket.AF_UNIX)
    sock.bind(("127.0.0.1", 0) if remote else str(tmp_path / "s"))
    config = uvicorn.Config(app, http=Remote if remote else KIND, log_level="critical", lifespan="off")
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve(sockets=[sock]))
    while not server.started:
        await asyncio.sleep(0.01)
    yield sock.getsockname()
    server.should_exit = True
    await task


async def connect(address: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if isinstance(address, str):
        return await asyncio.open_unix_connection(address)
    return await asyncio.open_connection(*address)


async def answer(address: Any, *pieces: bytes) -> bytes:
    """What comes back, up to the end of the connection."""
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET) as sock:
        sock.setblocking(False)
        await loop.sock_connect(sock, address)
        said = b""
        with contextlib.suppress(ConnectionError):  # what was answered can be read all the same
            for piece in pieces:
                await loop.sock_sendall(sock, piece)
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(10):
                while more := await loop.sock_recv(sock, 1 << 16):
                    said += more
        return said


@pytest.mark.parametrize("begin", [b"GET /", b"GET / HTTP/1.1\r\nA: ", b"GET / HTTP/1.1\r\n"])
async def test_a_head_without_end_is_not_read(address: Any, begin: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_HEAD", 100_000)
    piece = b"b: c\r\n" * 10_000 if begin.endswith(b"\n") else b"a" * 60_000
    said = await answer(address, begin, *[piece] * 20)
    assert (
        said.startswith(b"HTTP/1.1 431 ") and json.loads(said.partition(b"\r\n\r\n")[2])["error"]["code"] == "too-large"
    )


async def test_trailers_without_end_are_not_read(address: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_HEAD", 100_000)
    head = b"PUT /size HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nA: "
    assert (await answer(address, head, *[b"a" * 60_000] * 20)).startswith(b"HTTP/1.1 431 ")


async def test_bodies_and_many_requests_are_not_heads(address: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_HEAD", 10_000)
    put = b"PUT /size HTTP/1.1\r\nContent-Length: 300000\r\n%s\r\n"
    last = put % b"Connection: close\r\n"
    body = [b"x" * 60_000] * 5
    said = await answer(address, put % b"", *body, put % (b"A: " + b"b" * 9000 + b"\r\n"), *body, last, *body)
    assert said.count(b"HTTP/1.1 200 ") == 3 and said.count(b"300000") == 3


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"PUT /size HTTP/1.1\r\nContent-Length: 1\r\n\r\nxGET / HT"])
async def test_a_head_that_does_not_come_is_not_waited_for(
    address: Any, sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "_HEAD_S", 0.05)
    monkeypatch.setattr(connections, "_ONCE_MORE_S", 0.05)
    said = await answer(address, sent)  # the end of the connection, or a timeout
    assert said.count(b"HTTP/1.1 200 ") == sent.count(b"PUT")


async def test_a_body_is_waited_for(address: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_HEAD_S", 0.01)
    monkeypatch.setattr(connections, "_ONCE_MORE_S", 0.01)
    reader, writer = await connect(address)
    writer.write(b"PUT /size HTTP/1.1\r\nContent-Length: 1\r\nConnection: close\r\n\r\n")
    await asyncio.sleep(0.2)
    writer.write(b"x")
    assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
    writer.close()


@pytest.mark.parametrize("address", [Remote], indirect=True)
async def test_so_many_connections_over_tcp(address: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_REMOTE", 3)
    held = []
    for _ in range(3):
        held.append(await connect(address))
        await asyncio.sleep(0.02)
    assert await answer(address, b"GET / HT") == b""
    held.pop()[1].close()
    await asyncio.sleep(0.05)
    assert (await answer(address, b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n")).startswith(b"HTTP/1.1 404 ")
    for _, writer in held:
        writer.close()


async def test_json_has_a_bound_where_it_is_read_into_memory(
    daemon: Daemon,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connections, "_JSON", 1000)
    answer = await daemon.http.post("/snapshots/create", json={"app": "a" * 2000})
    assert answer.status_code == 400 and error_of(answer)["code"] == "too-large"
    answer = await daemon.http.post("/snapshots/create", json={"app": "a" * 500, "tag": "b"})
    assert error_of(answer)["code"] == "not-found"
    answer = await daemon.http.put("/blobs/" + "0" * 64, content=b"x" * 2000)
    assert error_of(answer)["code"] == "bad-digest"
