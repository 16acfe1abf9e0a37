"""Connections of the HTTP API: what uvicorn leaves unbounded is bounded here.

Whoever can connect, with a token or without, may send a request's head: its parser keeps all of it, and copies it with
every piece that comes.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, MutableMapping
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from woodfrog.errors import SpecError

__all__ = ["JsonRoute", "Local", "Remote"]

_HEAD = 1 << 20
_HEAD_S = 30.0
_ONCE_MORE_S = 1.0
_REMOTE = 1024
_JSON = 64 << 20


class Local(HttpToolsProtocol):
    """A connection of the Unix socket."""

    _unread = 0
    """Bytes that came since the parser last had something whole: a head, a piece of a body."""
    _moved = False
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._moved = False
        super().data_received(data)
        self._unread = 0 if self._moved else self._unread + len(data)
        if self._unread > _HEAD and not self.transport.is_closing():
            self._refuse(431, f"a request's head has {_HEAD >> 10} KiB at most (parameters of a class are part of it)")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._moved = True
        if self._timer is None:
            self._expect_head()

    def on_headers_complete(self) -> None:
        self._moved = True
        self._stop_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._moved = True
        super().on_body(body)

    def _expect_head(self) -> None:
        self._timer = self.loop.call_later(_HEAD_S, self._is_late)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _is_late(self) -> None:
        # It may have come while the daemon was held up: what is there is read before the next timer.
        self._timer = self.loop.call_later(_ONCE_MORE_S, self.transport.close)

    def _refuse(self, status: int, why: str) -> None:
        body = json.dumps({"error": SpecError(why, code="too-large").to_dict()}).encode()
        head = f"HTTP/1.1 {status} \r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(f"{head}connection: close\r\n\r\n".encode() + body)
        self.transport.close()


class Remote(Local):
    """A connection over TCP. There are so many at a time that the daemon has descriptors left."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > _REMOTE:
            transport.abort()


class JsonRoute(APIRoute):
    """A route; where the framework reads a JSON body into memory, no more than so much of it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()
        if self.body_field is None:
            return handler

        async def bounded(request: Request) -> Response:
            body = bytearray()
            async for piece in request.stream():
                body += piece
                if len(body) > _JSON:
                    raise SpecError(f"over {_JSON >> 20} MiB of JSON in one request", code="too-large")

            async def receive() -> MutableMapping[str, Any]:
                return {"type": "http.request", "body": bytes(body), "more_body": False}

            return await handler(Request(request.scope, receive))

        return bounded
