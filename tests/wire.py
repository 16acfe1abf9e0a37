"""A TCP relay in front of a server that breaks connections in the ways networks do."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass
class Wire:
    """`plan(n)` says what becomes of the n-th connection (from 0).

    "pass"; "refuse": closed at once; "hang": accepted, and never a byte; a number: the answer is cut off after so many
    bytes; "stall N": it stops after N bytes and the connection stays open; "say TEXT": this is the answer; "slow N":
    N bytes a second, both ways.
    """

    url: str
    plan: Callable[[int], str | int] = lambda n: "pass"
    connections: int = 0
    received: int = 0
    """Bytes of answers."""
    _open: list[socket.socket] = field(default_factory=list)
    _mutex: threading.Lock = field(default_factory=threading.Lock)

    def serve(self, listener: socket.socket, upstream: tuple[str, int]) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            number, self.connections = self.connections, self.connections + 1
            self._open.append(client)
            threading.Thread(target=self._relay, args=(client, upstream, self.plan(number)), daemon=True).start()

    def _relay(self, client: socket.socket, upstream: tuple[str, int], behaviour: str | int) -> None:
        with suppress(OSError):
            if behaviour == "refuse":
                _end(client)
                return
            if behaviour == "hang":
                return
            if isinstance(behaviour, str) and behaviour.startswith("say "):
                client.recv(1 << 16)
                client.sendall(behaviour.removeprefix("say ").encode())
                _end(client)
                return
            server = socket.create_connection(upstream)
            self._open.append(server)
            if isinstance(behaviour, str) and behaviour.startswith("slow "):
                rate = int(behaviour.removeprefix("slow "))
                threading.Thread(target=_trickle, args=(client, server, rate), daemon=True).start()
                _trickle(server, client, rate, self._count)
                _end(client)
                _end(server)
                return
            threading.Thread(target=_copy, args=(client, server, None), daemon=True).start()
            stall = isinstance(behaviour, str) and behaviour.startswith("stall ")
            limit = None if behaviour == "pass" else int(str(behaviour).removeprefix("stall "))
            _copy(server, client, limit, self._count)
            if not stall:
                _end(client)
                _end(server)

    def _count(self, size: int) -> None:
        with self._mutex:
            self.received += size

    def close(self) -> None:
        for end in self._open:
            _end(end)


def _end(connection: socket.socket) -> None:
    """Close it for both sides now, also while a thread of ours waits in it."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


def _nobody(size: int) -> None:
    """Nobody counts."""


def _copy(
    source: socket.socket, target: socket.socket, limit: int | None, count: Callable[[int], None] = _nobody
) -> None:
    with suppress(OSError):
        while limit is None or limit > 0:
            data = source.recv(1 << 16 if limit is None else min(limit, 1 << 16))
            if not data:
                break
            count(len(data))
            target.sendall(data)
            limit = None if limit is None else limit - len(data)
        if limit is None:
            target.shutdown(socket.SHUT_WR)


def _trickle(source: socket.socket, target: socket.socket, rate: int, count: Callable[[int], None] = _nobody) -> None:
    with suppress(OSError):
        source.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        while data := source.recv(max(1, rate // 10)):
            count(len(data))
            target.sendall(data)
            time.sleep(len(data) / rate)
        target.shutdown(socket.SHUT_WR)


@contextmanager
def wire(endpoint: str) -> Iterator[Wire]:
    """Relay a free local port to `endpoint` (http://host:port)."""
    parts = urlsplit(endpoint)
    assert parts.hostname and parts.port
    with socket.create_server(("127.0.0.1", 0)) as listener:
        made = Wire(f"http://127.0.0.1:{listener.getsockname()[1]}")
        thread = threading.Thread(target=made.serve, args=(listener, (parts.hostname, parts.port)), daemon=True)
        thread.start()
        try:
            yield made
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            made.close()
            thread.join(10)
