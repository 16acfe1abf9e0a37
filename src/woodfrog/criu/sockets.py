"""CRIU's images of sockets: of TCP connections, those to the outside are made closed ones.

`files.img` is magic numbers, then length-prefixed protobuf messages, one for each open file. CRIU can restore all
connections or none; one to the outside cannot be had again, and one within the tree is not to be lost for it.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

from woodfrog.criu.stats import encode_bytes, encode_int, fields_of, messages_of

__all__ = ["close_outside", "closed_outside"]

_FILES = "files.img"
_INET_SOCKET = 4
_INODE, _PROTOCOL, _STATE, _SOURCE_PORT, _TARGET_PORT, _SOURCE, _TARGET, _SHUT_DOWN = 2, 5, 6, 7, 8, 11, 12, 19
_TCP = 6
_CLOSED = 7
_CONNECTED = frozenset({1, 2, 4, 5, 8, 9, 11})
"""The kernel's states with somebody at the other end, or nearly."""
_BOTH_WAYS = 3
_MAPPED = bytes(10) + b"\xff\xff"

Fields = list[tuple[int, int | bytes]]


def close_outside(images: Path) -> None:
    """Make connections that are not over the loopback device closed ones: they read as ended.

    Raises:
        ValueError: an image that is not what it should be; nothing was changed.
    """
    path = images / _FILES
    data = path.read_bytes()
    closed, inodes = closed_outside(data)
    if closed == data:
        return
    path.write_bytes(closed)
    for inode in inodes:
        (images / f"tcp-stream-{inode:x}.img").unlink(missing_ok=True)  # what was on its way there


def closed_outside(files: bytes) -> tuple[bytes, tuple[int, ...]]:
    """The image so changed, and the inodes of the sockets.

    Raises:
        ValueError: it is not understood in full.
    """
    out, inodes = [files[:8]], []
    for message in messages_of(files):
        entry: Fields = list(fields_of(message))
        for i, (number, value) in enumerate(entry):
            if number == _INET_SOCKET and isinstance(value, bytes) and (socket := _closed(list(fields_of(value)))):
                if _message(list(fields_of(value))) != value or _message(entry) != message:
                    raise ValueError("an unknown field in a socket's image")
                inodes.append(next(v for n, v in socket if n == _INODE and isinstance(v, int)))
                entry[i] = number, _message(socket)
                message = _message(entry)
        out.append(struct.pack("<I", len(message)) + message)
    return b"".join(out), tuple(inodes)


def _message(fields: Fields) -> bytes:
    return b"".join(encode_int(n, v) if isinstance(v, int) else encode_bytes(n, v) for n, v in fields)


def _closed(socket: Fields) -> Fields:
    """What a connection to the outside is to be; nothing for any other socket."""
    known = {n: v for n, v in socket if isinstance(v, int)}
    if known.get(_PROTOCOL) != _TCP or known.get(_STATE) not in _CONNECTED:
        return []
    if _loopback(socket, _SOURCE) and _loopback(socket, _TARGET):
        return []
    changed = {_STATE: _CLOSED, _SOURCE_PORT: 0, _TARGET_PORT: 0}
    kept: Fields = [(n, changed.get(n, v)) for n, v in socket if n != _SHUT_DOWN]
    return [*kept, (_SHUT_DOWN, _BOTH_WAYS)]


def _loopback(socket: Fields, number: int) -> bool:
    words = [v for n, v in socket if n == number]
    address = b"".join(v.to_bytes(4, sys.byteorder) for v in words if isinstance(v, int)).removeprefix(_MAPPED)
    return address[:1] == b"\x7f" if len(address) == 4 else address == bytes(15) + b"\x01"
