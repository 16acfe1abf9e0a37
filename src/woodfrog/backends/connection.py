"""The daemon's side of a worker's socket: frames out, frames in, large bodies straight to disk."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from woodfrog.backends.payload import CHUNK, Payload, Spool
from woodfrog.errors import InstanceCrashed, StoreError
from woodfrog.linux.sandbox import Sandbox, SandboxProcess
from woodfrog.protocol import HEAD, SPOOL_BYTES, WORKER_SOCKET, ProtocolError, pack, parse_head, parse_header
from woodfrog.store.files import FREE_SOME

__all__ = ["Reply", "WorkerConnection", "connect", "connect_now"]

_CONNECT_S = 60.0
_LONG_S = 0.002
_REST = 3.0


@dataclass(frozen=True)
class Reply:
    """One frame from the worker."""

    header: dict[str, Any]
    body: Payload

    @property
    def type(self) -> str:
        return str(self.header["type"])


class WorkerConnection:
    """One connection to one worker. Nothing the worker sends is trusted beyond its framing."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, spool: Path) -> None:
        self._reader = reader
        self._writer = writer
        self._sending = asyncio.Lock()
        self._spool = spool

    @classmethod
    async def of(cls, connected: socket.socket, spool: Path) -> WorkerConnection:
        reader, writer = await asyncio.open_unix_connection(sock=connected, limit=CHUNK)
        return cls(reader, writer, spool)

    @classmethod
    async def open(
        cls, connect: Callable[[], Awaitable[socket.socket]], *, timeout: float, spool: Path, gone: asyncio.Future[Any]
    ) -> WorkerConnection:
        """Connect as soon as the worker listens; `gone` ends the wait when the worker died first.

        Raises:
            InstanceCrashed: the worker ended, or did not listen in time.
        """
        deadline = asyncio.get_running_loop().time() + timeout
        delay = 0.0005
        while True:
            try:
                return await cls.of(await connect(), spool)
            except OSError as e:
                if gone.done():
                    raise InstanceCrashed("the worker ended before it listened", code="worker-start") from e
                if asyncio.get_running_loop().time() > deadline:
                    raise InstanceCrashed(
                        f"the worker did not listen within {timeout:.0f} s", code="worker-start"
                    ) from e
            await asyncio.sleep(delay)
            delay = min(delay * 1.5, 0.02)

    async def send(self, header: dict[str, Any], *bodies: Payload) -> None:
        """Send one frame whose body is `bodies` one after the other, after those that were begun before it.

        Raises:
            InstanceCrashed: the worker is gone.
            StoreError: a body's file is gone.
        """
        try:
            head = pack(header, sum(b.size for b in bodies))
        except OSError as e:
            raise StoreError(f"a payload is gone: {e.strerror}: {e.filename}", code="payload-gone") from e
        try:
            async with self._sending:
                self._writer.write(head)
                for body in bodies:
                    async for chunk in body.chunks():
                        self._writer.write(chunk)
                        if len(chunk) >= CHUNK:
                            await self._writer.drain()
                await self._writer.drain()
        except (ConnectionError, OSError) as e:
            raise InstanceCrashed("the worker closed its connection", code="worker-gone") from e

    async def receive(self) -> Reply:
        """The next frame.

        Raises:
            InstanceCrashed: the connection ended.
            ProtocolError: what came is not of the protocol.
            StoreError: the body was received whole but could not be kept; the connection is usable.
        """
        try:
            header_len, body_len = parse_head(await self._reader.readexactly(HEAD.size))
            header = await self._parse(await self._reader.readexactly(header_len))
            if body_len <= SPOOL_BYTES:
                return Reply(header, Payload(data=await self._reader.readexactly(body_len) if body_len else b""))
            return Reply(header, await self._to_disk(body_len))
        except (asyncio.IncompleteReadError, ConnectionError) as e:
            raise InstanceCrashed("the worker closed its connection", code="worker-gone") from e

    @staticmethod
    async def _parse(data: bytes) -> dict[str, Any]:
        """Nothing else runs while JSON is parsed: a worker that sends much of it waits for the others in between."""
        begin = time.monotonic()
        header = parse_header(data)
        if (took := time.monotonic() - begin) > _LONG_S:
            await asyncio.sleep(_REST * took)
        return header

    async def _to_disk(self, length: int) -> Payload:
        """Take a body into a file. A full disk costs this body, not the worker: the rest is read and dropped."""
        spool = Spool(self._spool)
        failure: OSError | None = None
        try:
            while length:
                chunk = await self._reader.read(min(length, CHUNK))
                if not chunk:
                    raise asyncio.IncompleteReadError(b"", length)
                length -= len(chunk)
                if failure is None:
                    try:
                        await spool.write(chunk)
                    except OSError as e:
                        failure = e
                        await spool.drop()
            if failure is None:
                try:
                    return Payload(path=await spool.close())
                except OSError as e:
                    failure = e
            what = f"cannot keep what the worker sent: {failure.strerror}: {self._spool}"
            raise StoreError(f"{what}; {FREE_SOME}", code="disk-full")
        except BaseException:
            await spool.drop()
            raise

    async def request(self, header: dict[str, Any], *bodies: Payload, expect: str) -> Reply:
        """Send, and take the one answer: `expect` or `failed`.

        Raises:
            ProtocolError: another answer.
        """
        await self.send(header, *bodies)
        return await self.answer(header["type"], expect=expect)

    async def answer(self, to: str, *, expect: str) -> Reply:
        """Take the one answer to what was sent: `expect` or `failed`.

        Raises:
            ProtocolError: another answer.
        """
        reply = await self.receive()
        if reply.type not in (expect, "failed"):
            raise ProtocolError(f"worker answered {reply.type!r} to {to!r}, not {expect!r}")
        return reply

    async def wait_closed_by_worker(self, timeout: float) -> None:
        """After `frozen`: the worker closes; only then is it still.

        Raises:
            ProtocolError: it sent something instead, or did not close in time.
        """
        try:
            rest = await asyncio.wait_for(self._reader.read(1), timeout)
        except TimeoutError:
            raise ProtocolError(f"worker did not close its connection within {timeout:.0f} s") from None
        except ConnectionError:
            rest = b""
        if rest:
            raise ProtocolError("worker sent data after it froze")

    async def close(self) -> None:
        """Close at once; what a worker that does not read has not taken is dropped."""
        self._writer.transport.abort()
        try:
            await self._writer.wait_closed()
        except (ConnectionError, OSError):
            return  # the other end was gone already


async def connect_now(sandbox: Sandbox, spool: Path) -> WorkerConnection:
    """A connection to the worker's socket as it is; the worker may accept it later.

    Raises:
        SandboxError, OSError: nobody listens.
    """
    return await WorkerConnection.of(await sandbox.connect(WORKER_SOCKET), spool)


async def connect(sandbox: Sandbox, process: SandboxProcess, spool: Path) -> WorkerConnection:
    """A connection to the worker `process`, as soon as it listens.

    Raises:
        InstanceCrashed: it ended, or did not listen in time.
    """
    gone = asyncio.ensure_future(process.wait())
    gone.add_done_callback(lambda f: f.cancelled() or f.exception())  # whoever watches the process tells
    try:
        return await WorkerConnection.open(
            lambda: sandbox.connect(WORKER_SOCKET), timeout=_CONNECT_S, spool=spool, gone=gone
        )
    finally:
        gone.cancel()
