"""A small daemon for tests of the client: the HTTP API on a Unix socket, functions in a child process, no sandbox.

What is real: the socket, the requests, the shipped code (unpacked and imported by the child), and the pickling.
Faults can be put in: answers that are dropped, and the whole server going away and coming back.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import socket
import socketserver
import struct
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from woodfrog.protocol import VERSION, pack_items

RUNNER = r"""
import importlib, json, pickle, struct, sys, threading, types
sys.modules["woodfrog.worker.state"] = types.ModuleType("woodfrog.worker.state")
import woodfrog.worker.codec as codec
boot = json.loads(sys.argv[1])
sys.path[:0] = boot["path"]
out, lock = sys.stdout.buffer, threading.Lock()
sys.stdout = sys.stderr

def load():
    if boot["blob"]:
        target = pickle.load(open(boot["blob"], "rb"))
    else:
        target = importlib.import_module(boot["module"])
        for part in boot["qualname"].split("."):
            target = getattr(target, part)
        target = target.__woodfrog_wrapped__
    if boot["kind"] == "class":
        args, kwargs = pickle.loads(bytes.fromhex(boot["params"])) if boot["params"] else ((), {})
        target = target(*args, **kwargs)
        from woodfrog.sdk.cls import hooks
        for hook in hooks(type(target), "enter", True) + hooks(type(target), "enter", False):
            hook(target)
    return target

def send(call, kind, pieces):
    body = b"".join(pieces)
    with lock:
        out.write(struct.pack("!32scQ", call.encode(), kind, len(body)) + body)
        out.flush()

def settle(value):
    if hasattr(value, "__await__"):
        import asyncio
        async def wait():
            return await value
        return asyncio.run(wait())
    return value

def run(call, method, generator, body):
    try:
        function = getattr(target, method) if boot["kind"] == "class" else target
        args, kwargs = pickle.loads(body)
        value = settle(function(*args, **kwargs))
        if generator:
            for item in value:
                send(call, b"i", codec.encode(item, "pickle", method))
            send(call, b"d", [])
        else:
            send(call, b"r", codec.encode(value, "pickle", method))
    except BaseException as e:
        send(call, b"e", codec.encode_error(e)[1])

target = load()
while head := sys.stdin.buffer.read(48):
    call, method_len, generator, body_len = struct.unpack("!32sI4sQ", head)
    method = sys.stdin.buffer.read(method_len).decode()
    body = sys.stdin.buffer.read(body_len)
    threading.Thread(target=run, args=(call.decode(), method, generator == b"gen_", body), daemon=True).start()
"""


class Call:
    def __init__(self, tag: str, generator: bool) -> None:
        self.tag, self.generator = tag, generator
        self.status = "pending"
        self.body = b""
        self.items: list[tuple[bytes, bytes]] = []
        self.changed = threading.Condition()

    def finish(self, status: str, body: bytes) -> None:
        with self.changed:
            if self.status == "pending":
                self.status, self.body = status, body
                if self.generator:
                    self.items.append(({"success": b"d", "exception": b"e"}.get(status, b"f"), body))
            self.changed.notify_all()


class FakeDaemon:
    def __init__(self, home: Path) -> None:
        self.home = home
        self.socket = home / "woodfrogd.sock"
        self.code: dict[str, Path] = {}
        self.blobs: dict[str, Path] = {}
        self.apps: dict[str, dict[str, Any]] = {}
        self.calls: dict[str, Call] = {}
        self.runners: dict[tuple[str, str, str], subprocess.Popen[bytes]] = {}
        self.started: Counter[str] = Counter()
        self.requests: list[str] = []
        self.most_pending = 0
        self.drop: list[str] = []
        """Request lines beginning with one of these are carried out, and their answer is dropped; each counts once."""
        self.lock = threading.RLock()
        self.server: Any = None
        self.start()

    # Coming and going.

    def start(self) -> None:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                fake.handle(self)

            do_GET = do_POST = do_PUT = do_HEAD = handle_any

            def log_message(self, *args: Any) -> None:
                pass

            def address_string(self) -> str:
                return "unix"

        class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
            daemon_threads = True
            request_queue_size = 256
            connections: set[socket.socket]

            def get_request(self) -> Any:
                connection, _ = super().get_request()
                self.connections.add(connection)
                return connection, ("unix", 0)

        self.socket.unlink(missing_ok=True)
        self.server = Server(str(self.socket), Handler)
        self.server.connections = set()
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Go away as a killed daemon does: every connection breaks. Calls and apps are remembered."""
        self.server.shutdown()
        self.server.server_close()
        self.socket.unlink(missing_ok=True)
        for connection in list(self.server.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.stop()
        for process in self.runners.values():
            process.kill()
            process.wait()

    # The API.

    def handle(self, http: BaseHTTPRequestHandler) -> None:
        url = urlsplit(http.path)
        query = {k: v[0] for k, v in parse_qs(url.query).items()}
        body = http.rfile.read(int(http.headers.get("content-length") or 0))
        parts = [unquote(p) for p in url.path.split("/")[2:]]
        line = f"{http.command} {url.path}"
        self.requests.append(line)
        try:
            status, headers, answer = self.route(http.command, parts, query, http.headers, body)
        except KeyError as e:
            error = {"code": "not-found", "message": f"no {e}", "fields": {}, "retryable": False}
            status, headers, answer = 404, {}, json.dumps({"error": error}).encode()
        dropped = next((d for d in self.drop if line.startswith(d)), None)
        if dropped is not None:
            self.drop.remove(dropped)
            http.close_connection = True
            http.connection.shutdown(socket.SHUT_RDWR)
            return
        try:
            http.send_response(status)
            for key, value in headers.items():
                http.send_header(key, value)
            http.send_header("Content-Length", str(len(answer)))
            http.end_headers()
            if http.command != "HEAD":
                http.wfile.write(answer)
        except OSError:
            http.close_connection = True

    def route(self, method: str, parts: list[str], query: dict[str, str], headers: Any, body: bytes) -> Any:
        match method, parts:
            case "GET", ["health"]:
                return self.json({"version": "fake", "pid": os.getpid(), "protocol": VERSION})
            case "HEAD", ["code" | "blobs" as kind, digest]:
                return (200 if digest in getattr(self, kind) else 404), {}, b""
            case "PUT", ["code", digest]:
                path = self.home / "code" / digest
                with tarfile.open(fileobj=io.BytesIO(body)) as tar:
                    tar.extractall(path, filter="data")
                self.code[digest] = path / "app"
                return self.json({})
            case "PUT", ["blobs", digest]:
                path = self.home / digest
                path.write_bytes(body)
                self.blobs[digest] = path
                return self.json({})
            case "POST", ["apps", app, "deploy"]:
                self.apps[app] = json.loads(body)
                return self.json({"app": app, "version": 1, "functions": []})
            case "GET", ["apps", app]:
                return self.json({"app": app, "functions": self.apps[app]["spec"]["functions"]})
            case "POST", ["apps", app, "stop"]:
                del self.apps[app]
                return self.json({})
            case "POST", ["apps", app, "touch"]:
                self.apps[app]
                return self.json({})
            case "GET", ["apps", app, "logs"]:
                line = {"stream": "stdout", "line": f"logs of {app}"}
                return 200, {}, json.dumps(line).encode() + b"\n"
            case "POST", ["apps", app, "calls", tag]:
                call_id = headers["woodfrog-call"]
                with self.lock:
                    if call_id not in self.calls:
                        self.begin(call_id, app, tag, headers.get("woodfrog-params"), body)
                return self.answer(call_id, float(query.get("wait", 0)))
            case "GET", ["calls", call_id]:
                return self.answer(call_id, float(query.get("wait", 0)))
            case "GET", ["calls", call_id, "items"]:
                call, after = self.calls[call_id], int(query["after"])
                with call.changed:
                    call.changed.wait_for(lambda: len(call.items) > after, float(query.get("wait", 0)))
                    return 200, {"Woodfrog-Status": call.status}, pack_items(call.items[after:])
            case "POST", ["calls", call_id, "cancel"]:
                error = {"type": "CallCancelled", "code": "cancelled", "message": "cancelled", "fields": {}}
                self.calls[call_id].finish("cancelled", json.dumps({"error": error}).encode())
                return self.json({})
        raise KeyError(f"route {method} {parts}")

    def json(self, value: Any) -> tuple[int, dict[str, str], bytes]:
        return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()

    def answer(self, call_id: str, wait: float) -> tuple[int, dict[str, str], bytes]:
        call = self.calls[call_id]
        with call.changed:
            call.changed.wait_for(lambda: call.status != "pending", wait)
            headers = {"Woodfrog-Call": call_id, "Woodfrog-Status": call.status}
            return (202, headers, b"") if call.status == "pending" else (200, headers, call.body)

    # Running functions.

    def begin(self, call_id: str, app: str, tag: str, params: str | None, body: bytes) -> None:
        service, _, method = tag.partition(".")
        spec = next(f for f in self.apps[app]["spec"]["functions"] if f["tag"] == service)
        names = {m["name"]: m for m in spec["methods"]}
        generator = (names[method] if method else spec["methods"][0])["generator"]
        self.calls[call_id] = Call(tag, generator)
        self.started[call_id] += 1
        self.most_pending = max(self.most_pending, sum(c.status == "pending" for c in self.calls.values()))
        process = self.runner(app, spec, base64.b64decode(params or "").hex())
        name = (method or "-").encode()
        head = struct.pack("!32sI4sQ", call_id.encode(), len(name), b"gen_" if generator else b"call", len(body))
        assert process.stdin
        try:
            process.stdin.write(head + name + body)
            process.stdin.flush()
        except OSError:
            time.sleep(0.1)

    def runner(self, app: str, spec: dict[str, Any], params: str) -> subprocess.Popen[bytes]:
        key = (app, spec["tag"], params)
        if key not in self.runners:
            source = spec["source"]
            code = self.code.get(source["code_digest"])
            boot = {
                "path": [str(code)] if code else [],
                "module": source["module"],
                "qualname": source["qualname"],
                "kind": spec["kind"],
                "params": params,
                "blob": str(self.blobs[source["blob_digest"]]) if source["blob_digest"] else "",
            }
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", RUNNER, json.dumps(boot)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd="/",
                env={**os.environ, **spec["image"]["env"], **spec["env"]},
            )
            self.runners[key] = process
            threading.Thread(target=self.read, args=(process, spec["tag"]), daemon=True).start()
        return self.runners[key]

    def read(self, process: subprocess.Popen[bytes], tag: str) -> None:
        assert process.stdout
        while head := process.stdout.read(41):
            call_id, kind, length = struct.unpack("!32scQ", head)
            body, call = process.stdout.read(length), self.calls[call_id.decode()]
            if kind == b"i":
                with call.changed:
                    call.items.append((b"i", body))
                    call.changed.notify_all()
            else:
                call.finish("exception" if kind == b"e" else "success", body)
        error = {"type": "InstanceCrashed", "code": "crashed", "message": f"{tag} crashed", "fields": {}}
        for call in self.calls.values():
            if call.tag.partition(".")[0] == tag:
                call.finish("failure", json.dumps({"error": error}).encode())
