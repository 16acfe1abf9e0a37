"""The worker's life on its socket: accept, answer frames one after the other, close for a freeze, accept again.

One thread does everything. The connection and the listening socket are close-on-exec and kept at high descriptors,
out of the way of programs that close low ones. `_socket` is used rather than `socket`, so that programs may patch or
configure that module (default timeouts, gevent) without touching the worker.
"""

from __future__ import annotations

import _socket
import fcntl
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

from woodfrog.protocol import HEAD, ProtocolError, pack, parse_head, parse_header
from woodfrog.worker import codec, state
from woodfrog.worker.runtime import Runtime, StageError

__all__ = ["serve"]

T = TypeVar("T")
_JOIN = 1 << 16
"""Frames up to this size go out in one write."""
_GOOD = frozenset({"booted", "frozen", "preloaded", "ready", "result", "item", "done", "stopped", "pong"})


class _Gone(Exception):
    """The daemon closed the connection."""


def serve(path: str) -> int:
    """Serve one worker's whole life on the Unix socket `path`; its exit status."""
    import faulthandler

    if sys.stderr is not None:
        faulthandler.enable()
    if sys.stdout is not None:
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    try:
        listener = _listen(path)
    except OSError as e:
        print(f"woodfrog worker: cannot listen on {path}: {e}", file=sys.stderr)
        return 2
    return _Worker(listener).run()


def _listen(path: str) -> _socket.socket:
    listener = _lift(_socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM).detach())
    umask = os.umask(0o177)
    try:
        listener.bind(path)
    finally:
        os.umask(umask)
    listener.listen(8)
    return listener


def _lift(fd: int) -> _socket.socket:
    """The socket of `fd`, moved to a high descriptor where the limits allow it; blocking, whatever the default."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    try:
        high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, max(3, (1024 if soft < 0 else min(soft, 1024)) - 24))
        os.close(fd)
        fd = high
    except OSError:
        os.set_inheritable(fd, False)
    sock = _socket.socket(fileno=fd)
    sock.settimeout(None)
    return sock


def _persist(operation: Callable[[], T]) -> T:
    """Repeat a wait that an exception out of the user's signal handler broke off."""
    while True:
        try:
            return operation()
        except OSError:
            raise
        except Exception as e:
            print(f"woodfrog worker: a signal handler raised outside of any call: {codec.describe(e)}", file=sys.stderr)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, OSError, ValueError):
            # Closed or replaced by the user's code.
            continue


class _Worker:
    def __init__(self, listener: _socket.socket) -> None:
        self._listener = listener
        self._conn: _socket.socket = listener
        self._runtime = Runtime()
        self._state = "new"
        self._pid = os.getpid()
        os.register_at_fork(after_in_child=self._close_in_fork)

    def _close_in_fork(self) -> None:
        """A child of the user's keeps nothing of the daemon's: with it the connection would outlive the freeze."""
        self._conn.close()
        self._listener.close()

    def run(self) -> int:
        while True:
            self._conn = _lift(_persist(self._accept))
            try:
                status = self._converse()
            except _Gone:
                # Before the boot and in the freeze a connection may come and go; otherwise nobody is left to serve.
                status = None if self._state in ("new", "zygote", "frozen") else 0
            except ProtocolError as e:
                print(f"woodfrog worker: {e}", file=sys.stderr)
                status = 2
            finally:
                self._conn.close()
            if status is not None:
                return status

    def _accept(self) -> int:
        fd: int = self._listener._accept()[0]  # type: ignore[attr-defined]
        return fd

    def _converse(self) -> int | None:
        """Answer frames until the freeze (None) or the end (exit status)."""
        while True:
            header, body = self._receive()
            self._pid = os.getpid()
            try:
                status = self._handle(header, body)
            except StageError as e:
                self._failed(e.stage, e.cause)
                return 1
            if self._state in ("zygote", "frozen") or status is not None:
                return status

    def _handle(self, header: dict[str, Any], body: bytearray) -> int | None:
        kind = header["type"]
        if kind == "ping":
            self._send({"type": "pong"})
        elif kind == "preload" and self._state == "new":
            done = self._runtime.preload(header)
            self._state = "preloaded"
            _flush()
            self._send({"type": "preloaded", **done})
        elif kind == "freeze" and self._state == "preloaded":
            phases = self._runtime.settle()
            _flush()
            self._send({"type": "frozen", "phases": phases})
            self._state = "zygote"
        elif kind == "boot" and self._state in ("new", "zygote"):
            phases = self._runtime.boot(header, body)
            self._state = "booted"
            _flush()
            self._send({"type": "booted", "phases": phases, "warnings": []})
        elif kind == "freeze" and self._state == "booted":
            phases = self._runtime.freeze()
            _flush()
            self._send({"type": "frozen", "phases": phases, "device": self._runtime.device_use})
            self._state = "frozen"
        elif kind == "start" and self._state in ("booted", "frozen"):
            self._state = "booted"
            phases, warnings = self._runtime.start(header)
            self._state = "ready"
            _flush()
            self._send({"type": "ready", "phases": phases, "warnings": warnings})
        elif kind == "call" and self._state == "ready":
            self._call(header, body)
        elif kind == "close" and self._state == "ready":
            return None  # that call is over
        elif kind == "stop":
            self._runtime.stop()
            _flush()
            self._send({"type": "stopped"})
            return 0
        else:
            raise ProtocolError(f"message {kind!r} does not fit a worker that is {self._state}")
        return None

    def _call(self, header: dict[str, Any], body: bytearray) -> None:
        call, method = header.get("call"), str(header.get("method"))
        encoding = header.get("encoding", "pickle")
        phases: dict[str, float] = {}
        state.call_id = str(call)
        try:
            answer = self._answer(call, method, encoding, body, phases)
        except BaseException as e:
            plain, pieces = codec.encode_error(e, encoding)
            answer = ({"type": "error", "call": call, "error": plain, "phases": phases}, pieces)
        finally:
            state.call_id = None
        _flush()
        self._send(*answer)

    def _answer(
        self, call: Any, method: str, encoding: str, body: bytearray, phases: dict[str, float]
    ) -> tuple[dict[str, Any], codec.Body]:
        runtime, clock = self._runtime, time.perf_counter
        t0 = clock()
        runtime.function(method)
        args, kwargs = codec.load_arguments(body, encoding, f"{method}()")
        # The arguments are objects now; a large body must not stay in memory beside them.
        body.clear()
        t1 = clock()
        phases["decode"] = round((t1 - t0) * 1e3, 3)
        value = runtime.call(method, args, kwargs)
        del args, kwargs
        if runtime.is_generator(method):
            count, items = 0, runtime.items(value)
            try:
                for item in items:
                    if self._is_closed(call):
                        break
                    self._send({"type": "item", "call": call}, codec.encode(item, encoding, f"{method}()"))
                    count += 1
            finally:
                items.close()
            phases["run"] = round((clock() - t1) * 1e3, 3)
            return {"type": "done", "call": call, "items": count, "phases": phases}, ()
        t2 = clock()
        phases["run"] = round((t2 - t1) * 1e3, 3)
        pieces = codec.encode(value, encoding, f"{method}()")
        phases["encode"] = round((clock() - t2) * 1e3, 3)
        return {"type": "result", "call": call, "phases": phases}, pieces

    def _is_closed(self, call: Any) -> bool:
        """Whether the daemon wants no more items of that call."""
        while os.getpid() == self._pid:  # else a child forked by the user's code is about to leave
            try:
                if not self._conn.recv(1, _socket.MSG_PEEK | _socket.MSG_DONTWAIT):
                    raise _Gone
            except BlockingIOError:
                return False
            header, _ = self._receive()
            if header["type"] != "close":
                raise ProtocolError(f"message {header['type']!r} does not fit a worker that runs a generator")
            if header.get("call") == call:
                return True
        return False

    def _failed(self, stage: str, error: BaseException) -> None:
        plain = codec.format_error(error)
        _flush()
        data = codec.pickle_exception(error)
        shown = {key: codec.shorten(text) for key, text in plain.items()}
        self._send({"type": "failed", "stage": stage, "error": shown}, [data] if data else ())

    def _receive(self) -> tuple[dict[str, Any], bytearray]:
        header_len, body_len = parse_head(bytes(self._read(HEAD.size)))
        return parse_header(bytes(self._read(header_len))), self._read(body_len)

    def _read(self, size: int) -> bytearray:
        data = bytearray(size)
        rest = memoryview(data)
        while rest:
            try:
                count = _persist(lambda rest=rest: self._conn.recv_into(rest))  # type: ignore[misc]
            except ConnectionError:
                raise _Gone from None
            if count == 0:
                raise _Gone
            rest = rest[count:]
        return data

    def _send(self, header: dict[str, Any], pieces: codec.Body = ()) -> None:
        if os.getpid() != self._pid:
            _leave_fork(header)
        size = sum(map(len, pieces))
        head = pack(header, size)
        pieces = [b"".join((head, *pieces))] if len(head) + size <= _JOIN else [head, *pieces]
        for piece in pieces:
            rest = memoryview(piece)
            while rest:
                try:
                    count = _persist(lambda rest=rest: self._conn.send(rest))  # type: ignore[misc]
                except OSError:
                    raise _Gone from None
                rest = rest[count:]


def _leave_fork(header: dict[str, Any]) -> None:
    """A child forked by the user's code came back into the worker's loop: it ends here and sends nothing."""
    error = header.get("error")
    if isinstance(error, dict):
        print(error.get("traceback", ""), end="", file=sys.stderr)
    _flush()
    os._exit(0 if header["type"] in _GOOD else 1)
