"""A daemon that answers from a table, over a real Unix socket: for tests of how clients present things."""

from __future__ import annotations

import json
import os
import socketserver
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from woodfrog.errors import NotFoundError
from woodfrog.protocol import VERSION


@dataclass
class Answer:
    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    breaks_off: bool = False


@dataclass
class Request:
    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Daemon:
    """`routes` maps "GET /apps" to an answer, or to a function of the request; a list is taken in turn."""

    home: Path
    routes: dict[str, Any] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)

    def seen(self, route: str) -> list[Request]:
        method, path = route.split(" ")
        return [r for r in self.requests if r.method == method and r.path == path]

    def answer(self, request: Request) -> Answer:
        self.requests.append(request)
        found = self.routes.get(f"{request.method} {request.path}")
        if isinstance(found, list):
            found = found.pop(0) if len(found) > 1 else found[0]
        if callable(found):
            found = found(request)
        if found is None:
            error = NotFoundError(f"nothing at {request.path}").to_dict()
            return Answer({"error": error}, 404)
        return found if isinstance(found, Answer) else Answer(found)


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    fake: Daemon


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def address_string(self) -> str:
        return "client"

    def log_message(self, *args: Any) -> None:
        pass

    def _serve(self) -> None:
        length = int(self.headers.get("content-length") or 0)
        path, _, query = self.path.partition("?")
        headers = {k.lower(): v for k, v in self.headers.items()}
        request = Request(self.command, path.removeprefix("/v1"), query, headers, self.rfile.read(length))
        answer = self.server.fake.answer(request)  # type: ignore[attr-defined]
        body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body) + answer.breaks_off))
        self.close_connection = self.close_connection or answer.breaks_off
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = _serve


HEALTH = {"version": "9.9", "protocol": VERSION, "pid": 1 << 22, "state_dir": "/x", "uptime_s": 1.0}


@contextmanager
def private_home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A state directory of its own, named in the environment."""
    # Short: a socket's path has 107 bytes.
    with tempfile.TemporaryDirectory(prefix="wf-") as directory:
        for name in [n for n in os.environ if n.startswith("WOODFROG_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("WOODFROG_HOME", directory)
        yield Path(directory)


@contextmanager
def serving(home: Path) -> Iterator[Daemon]:
    """A daemon on the socket of that state directory."""
    fake = Daemon(home, {"GET /health": HEALTH})
    with _Server(str(home / "woodfrogd.sock"), _Handler) as server:
        server.fake = fake
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield fake
        server.shutdown()
