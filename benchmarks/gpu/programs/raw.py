"""The driver API by ctypes, as far as holder.py and copies.py need it: neither torch nor woodfrog is there."""

from __future__ import annotations

import ctypes
from typing import Any


class Cuda:
    """A context on the first GPU, current in the thread that made it."""

    def __init__(self) -> None:
        self._lib = ctypes.CDLL("libcuda.so.1")
        self.ok("cuInit", 0)
        self.context = ctypes.c_void_p()
        self.ok("cuCtxCreate_v2", ctypes.byref(self.context), 0, 0)

    def ok(self, name: str, *arguments: Any) -> None:
        result = getattr(self._lib, name)(*arguments)
        if result:
            raise RuntimeError(f"{name}: CUDA error {result}")

    def alloc(self, size: int) -> int:
        """Device memory: its address."""
        pointer = ctypes.c_uint64()
        self.ok("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(size))
        return pointer.value

    def to_device(self, to: int, source: int, size: int) -> None:
        self.ok("cuMemcpyHtoD_v2", ctypes.c_uint64(to), ctypes.c_void_p(source), ctypes.c_size_t(size))

    def to_host(self, to: int, source: int, size: int) -> None:
        self.ok("cuMemcpyDtoH_v2", ctypes.c_void_p(to), ctypes.c_uint64(source), ctypes.c_size_t(size))

    def on_device(self, to: int, source: int, size: int) -> None:
        self.ok("cuMemcpyDtoD_v2", ctypes.c_uint64(to), ctypes.c_uint64(source), ctypes.c_size_t(size))

    def synchronise(self) -> None:
        self.ok("cuCtxSynchronize")

    def pinned(self, size: int) -> int:
        """Page-locked host memory: its address."""
        pointer = ctypes.c_void_p()
        self.ok("cuMemHostAlloc", ctypes.byref(pointer), ctypes.c_size_t(size), 0)
        return int(pointer.value or 0)

    def free_pinned(self, address: int) -> None:
        self.ok("cuMemFreeHost", ctypes.c_void_p(address))

    def register(self, address: int, size: int) -> None:
        """Lock ordinary memory's pages where they are."""
        self.ok("cuMemHostRegister_v2", ctypes.c_void_p(address), ctypes.c_size_t(size), 0)

    def unregister(self, address: int) -> None:
        self.ok("cuMemHostUnregister", ctypes.c_void_p(address))

    def stream(self) -> ctypes.c_void_p:
        made = ctypes.c_void_p()
        self.ok("cuStreamCreate", ctypes.byref(made), 1)  # does not wait for the default stream
        return made

    def to_device_later(self, to: int, source: int, size: int, stream: ctypes.c_void_p) -> None:
        size_, at = ctypes.c_size_t(size), ctypes.c_void_p(source)
        self.ok("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(to), at, size_, stream)

    def to_host_later(self, to: int, source: int, size: int, stream: ctypes.c_void_p) -> None:
        size_, at = ctypes.c_size_t(size), ctypes.c_void_p(to)
        self.ok("cuMemcpyDtoHAsync_v2", at, ctypes.c_uint64(source), size_, stream)

    def wait(self, stream: ctypes.c_void_p) -> None:
        self.ok("cuStreamSynchronize", stream)
