"""Messages between daemon and worker, and the few encodings SDK and daemon share. Stdlib only: every worker imports it.

A frame is a fixed head (`!4sII Q`: magic, protocol version, header length, body length), a JSON header with a
`"type"`, and an opaque body (pickled by the user's side; the daemon never unpickles).

Daemon → worker                          Worker → daemon
    preload {steps, env, sys_path, ...}      preloaded {phases, steps, seen, files, cpu_ms}; or failed
    boot    {function, code, env, ...}       booted   {phases, warnings}
                                             failed   {stage, error}         then the worker exits
    freeze  {}                               frozen   {phases, device} then it closes and blocks in accept(); or failed
    start   {context}                        ready    {phases}; or failed
    call    {call, method, encoding}+args    result+body | error+body | item+body ... done
    close   {call}                           nothing by itself: a generator that is under way ends with done, or error
    stop    {}                               stopped  {} then it exits 0; or failed (stage "exit"), then it exits 1
    ping    {}                               pong     {}

`freeze` follows `preloaded` (a zygote; `boot` comes after the thaw) or `booted`.
`close` may come while its call is answered, and after: a worker ignores one of a call that is over. It is looked for
before each item, at which the generator stands then.
Stages of `failed`: "preload", "import", "enter" (snap=True), "before-snapshot", "after-restore", "enter-restore"
(snap=False), "exit".
`error` in `failed` is {"type", "message", "traceback"}; the body, if not empty, is the pickled exception.
The socket is closed by the worker only for a freeze, or by dying.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from woodfrog.errors import WoodfrogError

__all__ = [
    "HEAD",
    "MAGIC",
    "MAX_BODY",
    "MAX_HEADER",
    "SPOOL_BYTES",
    "VERSION",
    "WORKER_PID",
    "WORKER_SOCKET",
    "WORKER_STDERR",
    "WORKER_STDOUT",
    "BootMessage",
    "Frame",
    "PreloadMessage",
    "ProtocolError",
    "StartContext",
    "pack",
    "pack_items",
    "parse_head",
    "parse_header",
    "unpack_items",
]

MAGIC = b"wfrg"
VERSION = 1
HEAD = struct.Struct("!4sIIQ")
MAX_HEADER = 4 << 20
MAX_BODY = 8 << 30
SPOOL_BYTES = 4 << 20
"""Bodies larger than this are spooled to disk by the daemon instead of being held in memory."""
WORKER_PID = 100
"""Pid of every worker inside its sandbox; CRIU's own pids stay below it."""
WORKER_SOCKET = "/run/woodfrog/worker/worker.sock"
WORKER_STDOUT = "/run/woodfrog/stdout"
WORKER_STDERR = "/run/woodfrog/stderr"


class ProtocolError(WoodfrogError):
    """The other side sent something that is not of this protocol."""

    code = "protocol"


@dataclass(frozen=True)
class Frame:
    header: dict[str, Any]
    body: bytes = b""

    @property
    def type(self) -> str:
        return str(self.header.get("type", ""))


def pack(header: dict[str, Any], body_len: int = 0) -> bytes:
    """Head and header of a frame; the caller sends `body_len` bytes of body after it."""
    text = json.dumps(header, separators=(",", ":")).encode()
    if len(text) > MAX_HEADER:
        raise ProtocolError(f"message header of {len(text)} bytes is over the limit of {MAX_HEADER}")
    return HEAD.pack(MAGIC, VERSION, len(text), body_len) + text


def parse_head(data: bytes) -> tuple[int, int]:
    """Lengths of header and body from the fixed head.

    Raises:
        ProtocolError: wrong magic, another version, or an oversized header or body.
    """
    magic, version, header_len, body_len = HEAD.unpack(data)
    if magic != MAGIC:
        raise ProtocolError(f"not a woodfrog message (starts with {magic!r})")
    if version != VERSION:
        raise ProtocolError(f"message of protocol version {version}, this side speaks {VERSION}")
    if header_len > MAX_HEADER:
        raise ProtocolError(f"message header of {header_len} bytes is over the limit of {MAX_HEADER}")
    if body_len > MAX_BODY:
        raise ProtocolError(f"message body of {body_len} bytes is over the limit of {MAX_BODY}; use a Volume")
    return header_len, body_len


def parse_header(data: bytes) -> dict[str, Any]:
    """The JSON header.

    Raises:
        ProtocolError: not a JSON object with a text `type`.
    """
    try:
        header = json.loads(data)
        if b"\\ud" in data.lower():
            # Half a surrogate pair could not be encoded again anywhere behind this.
            header = json.loads(json.dumps(header, ensure_ascii=False).encode("utf-8", "replace"))
    except (ValueError, RecursionError) as e:
        raise ProtocolError(f"message header is not JSON: {e}") from None
    if not isinstance(header, dict) or not isinstance(header.get("type"), str):
        raise ProtocolError("message header is not an object with a type")
    return header


@dataclass(frozen=True)
class BootMessage:
    """What a worker needs to import the user's code. Sent once in a worker's life."""

    app: str
    tag: str
    kind: str
    """"function" or "class"."""
    source_kind: str
    """"module" or "serialized"."""
    module: str
    qualname: str
    methods: list[dict[str, Any]]
    """Each {"name", "generator", "is_async"}."""
    sys_path: list[str]
    """Put in place of sys.path, in order; the first is the code directory."""
    env: dict[str, str]
    """The whole environment of the user's code."""
    cwd: str = "/app"
    argv: list[str] = field(default_factory=lambda: [""])
    snapshot: bool = False
    """A freeze follows: run enter(snap=True) now, enter(snap=False) at start. Without, both run before ready."""
    hide_gpu: bool = False
    """CUDA_VISIBLE_DEVICES and friends are emptied until `start`."""
    has_params: bool = False
    """The body starts with pickled constructor parameters of `params_len` bytes."""
    params_len: int = 0
    blob_len: int = 0
    """Then a pickled function or class of this many bytes (serialized source)."""
    entropy: str = ""
    """For a worker thawed from a zygote: 64 random bytes in hex, which its generators are reseeded from."""

    def header(self) -> dict[str, Any]:
        return {"type": "boot", **asdict(self)}


@dataclass(frozen=True)
class PreloadMessage:
    """What a worker imports before it knows what it will serve. It leaves a process as `boot` would have it."""

    steps: list[str]
    """"module", or "module:name" for `from module import name`. In the answer the ones that loaded nothing are in
    parentheses."""
    sys_path: list[str]
    """The environment's import path, without the code directory."""
    env: dict[str, str]
    cwd: str = "/app"
    argv: list[str] = field(default_factory=lambda: [""])
    hide_gpu: bool = False

    def header(self) -> dict[str, Any]:
        return {"type": "preload", **asdict(self)}


@dataclass(frozen=True)
class StartContext:
    """Sent before a worker serves, after a cold boot and after every restore."""

    instance_id: str
    hostname: str
    restored: bool
    """True when this worker was thawed from a snapshot."""
    snapshot_id: str | None
    entropy: str
    """64 fresh random bytes in hex; every generator is reseeded from them after a restore."""
    wall_clock: float
    """Unix time, seconds."""
    env: dict[str, str]
    """The whole environment of the user's code now: replaces what was frozen (rotated secrets, changed values)."""
    gpu: list[str] = field(default_factory=list)

    def header(self) -> dict[str, Any]:
        return {"type": "start", **asdict(self)}


_ITEM = struct.Struct("!cQ")


def pack_items(items: list[tuple[bytes, bytes]]) -> bytes:
    """Generator items for HTTP: (kind, payload) each; kind b"i" item, b"d" done, b"e" exception, b"f" failure."""
    return b"".join(_ITEM.pack(kind, len(payload)) + payload for kind, payload in items)


def unpack_items(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Inverse of `pack_items`.

    Raises:
        ProtocolError: truncated data.
    """
    offset = 0
    while offset < len(data):
        if offset + _ITEM.size > len(data):
            raise ProtocolError("truncated generator items")
        kind, length = _ITEM.unpack_from(data, offset)
        offset += _ITEM.size
        if offset + length > len(data):
            raise ProtocolError("truncated generator items")
        yield kind, data[offset : offset + length]
        offset += length
