"""What the driver does with memory that comes only when it is asked for (userfaultfd), as after a thaw with the page
server; a program of probe.py.

Prints JSON: for each call its result, how many pages it asked for, and what came of it.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import mmap
import os
import select
import struct
import threading
from collections.abc import Callable
from typing import Any

from raw import Cuda

PAGE = 4096
SMALL, LARGE = 1 << 20, 64 << 20
USERFAULTFD = 323
API, REGISTER, COPY = 0xC018AA3F, 0xC020AA00, 0xC028AA03


class Follows:
    """Memory of which each page comes when it is touched."""

    def __init__(self, size: int) -> None:
        self.fd = ctypes.CDLL(None, use_errno=True).syscall(USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "userfaultfd")
        fcntl.ioctl(self.fd, API, struct.pack("=QQQ", 0xAA, 0, 0))
        self.memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.at = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        fcntl.ioctl(self.fd, REGISTER, struct.pack("=QQQQ", self.at, len(self.memory), 1, 0))
        self.page = ctypes.create_string_buffer(b"x" * PAGE, PAGE)
        self.served = 0
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            select.select([self.fd], [], [])
            try:
                message = os.read(self.fd, 32)
            except BlockingIOError:
                continue
            address = struct.unpack_from("=Q", message, 16)[0] & -PAGE
            self.served += 1
            fcntl.ioctl(self.fd, COPY, struct.pack("=QQQQq", address, ctypes.addressof(self.page), PAGE, 0, 0))


def main() -> None:
    cuda = Cuda()
    device = cuda.alloc(LARGE)
    calls: dict[str, tuple[int, Callable[[Follows], Any]]] = {
        "copied to the GPU": (SMALL, lambda m: cuda.to_device(device, m.at, SMALL)),
        "64 MiB copied to the GPU": (LARGE, lambda m: cuda.to_device(device, m.at, LARGE)),
        "64 MiB copied from the GPU": (LARGE, lambda m: cuda.to_host(m.at, device, LARGE)),
        "page-locked": (SMALL, lambda m: cuda.register(m.at, SMALL)),
    }
    found = {}
    for name, (size, call) in calls.items():
        memory = Follows(size)
        try:
            call(memory)
            result = "as it should"
        except RuntimeError as e:
            result = str(e)
        found[name] = {"result": result, "pages_asked_for": memory.served, "pages": size // PAGE}
    print(json.dumps(found), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
