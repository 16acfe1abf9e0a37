"""A process with device memory that is told and answers through files, so that nothing of it is open to others.

    python files.py raw|torch BYTES FOLDER

Appends a line to FOLDER/out: "ready", and for each time that FOLDER/go goes away, "same" or what is wrong. `raw` copies
bytes back; `torch` has a kernel add them up.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

PIECE = 16 << 20


def raw(size: int) -> Callable[[], object]:
    from ctypes import addressof, create_string_buffer

    from raw import Cuda

    cuda, data = Cuda(), os.urandom(PIECE)
    buffer = create_string_buffer(data, PIECE)
    pieces = [cuda.alloc(PIECE) for _ in range(max(1, size // PIECE))]
    for piece in pieces:
        cuda.to_device(piece, addressof(buffer), PIECE)
    locked = cuda.pinned(PIECE)

    def look() -> object:
        seen = set()
        for piece in pieces:
            cuda.to_host(locked, piece, PIECE)
            seen.add(hashlib.sha256((type(buffer)).from_address(locked)).hexdigest())
        return seen

    return look


def torch(size: int) -> Callable[[], object]:
    import torch

    found = torch.arange(size // 4, dtype=torch.int32, device="cuda")

    def look() -> object:
        return int(found.sum(dtype=torch.int64))

    return look


def main(kind: str, size: str, folder: str) -> None:
    go, out = Path(folder, "go"), open(Path(folder, "out"), "a", buffering=1)  # noqa: SIM115
    go.touch()
    look = {"raw": raw, "torch": torch}[kind](int(size))
    first = look()
    out.write("ready\n")
    while True:
        while go.exists():
            time.sleep(0.002)
        go.touch()
        try:
            found = look()
            out.write("same\n" if found == first else f"other bytes: {found} for {first}\n")
        except Exception as e:
            out.write(f"{type(e).__name__}: {e}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
