"""A process that holds so many bytes on the GPU and answers whether they are what they were.

    python holder.py SOCKET BYTES

Each connection sends "quick" or "full" and gets a line of JSON. `quick` has the GPU read every byte (it copies each
piece into another) and reads samples back; `full` compares every byte.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import socket
import sys
from typing import Any

from raw import Cuda

PIECE = 64 << 20
SAMPLE = 4096
SHIFT = 4104
"""No multiple of a page: no two pages on the GPU are alike."""


class Holder:
    def __init__(self, size: int) -> None:
        self.cuda = Cuda()
        piece = self.piece = min(PIECE, size // 2) & -4096
        self.pool = os.urandom(piece)
        self.base = ctypes.cast(ctypes.c_char_p(self.pool), ctypes.c_void_p).value or 0
        self.scratch = self.cuda.alloc(piece)
        self.pieces = [self.cuda.alloc(piece) for _ in range(size // piece - 1)]
        for number, address in enumerate(self.pieces):
            shift = self.shift(number)
            self.cuda.to_device(address, self.base + shift, piece - shift)
            if shift:
                self.cuda.to_device(address + piece - shift, self.base, shift)
        self.cuda.synchronise()

    def shift(self, number: int) -> int:
        """Each piece is the pool, begun elsewhere."""
        return number * SHIFT % self.piece

    def expected(self, number: int, at: int, size: int) -> bytes:
        begin = (self.shift(number) + at) % self.piece
        found = self.pool[begin : begin + size]
        return found + self.pool[: size - len(found)]

    def quick(self) -> dict[str, Any]:
        wrong, got = 0, ctypes.create_string_buffer(SAMPLE)
        for number, address in enumerate(self.pieces):
            self.cuda.on_device(self.scratch, address, self.piece)
            at = number * 7919 * SAMPLE % (self.piece - SAMPLE + 1)
            self.cuda.to_host(ctypes.addressof(got), self.scratch + at, SAMPLE)
            wrong += got.raw != self.expected(number, at, SAMPLE)
        self.cuda.synchronise()
        return {"pieces": len(self.pieces), "wrong": wrong}

    def full(self) -> dict[str, Any]:
        wrong, got = 0, ctypes.create_string_buffer(self.piece)
        compare = ctypes.CDLL(None).memcmp
        here = ctypes.addressof(got)
        for number, address in enumerate(self.pieces):
            shift = self.shift(number)
            self.cuda.to_host(here, address, self.piece)
            rest = self.piece - shift
            parts = ((here, self.base + shift, rest), (here + rest, self.base, shift))
            wrong += any(compare(*map(ctypes.c_void_p, p[:2]), ctypes.c_size_t(p[2])) for p in parts)
        return {"pieces": len(self.pieces), "wrong": wrong}


def main(path: str, size: str) -> None:
    holder = Holder(int(size))
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(8)
    print("ready", flush=True)
    # What criu cannot take along must not be open when it comes.
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    os.close(null)
    while True:
        connection, _ = listener.accept()
        try:
            answer = {"quick": holder.quick, "full": holder.full}[connection.recv(16).decode()]()
        except Exception as e:
            answer = {"error": str(e)}
        with contextlib.suppress(OSError):  # who asked has gone
            connection.sendall(json.dumps(answer).encode() + b"\n")
        connection.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
