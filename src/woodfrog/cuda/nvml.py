"""The few questions that only NVML answers. By ctypes: the package's own binding of NVML needs numpy.

Every question may go unanswered (NVML is not installed in many containers): then the answer is None.
"""

from __future__ import annotations

import ctypes
from typing import Any

__all__ = ["Nvml"]

_MAX_PROCESSES = 1024


class _Process(ctypes.Structure):
    _fields_ = (
        ("pid", ctypes.c_uint),
        ("bytes", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


class Nvml:
    def __init__(self) -> None:
        self._library: ctypes.CDLL | None = None
        try:
            library = ctypes.CDLL("libnvidia-ml.so.1")
            if library.nvmlInit_v2() == 0:
                self._library = library
        except (OSError, AttributeError):
            pass

    def _call(self, name: str, *arguments: Any) -> bool:
        function = getattr(self._library, name, None)
        return function is not None and function(*arguments) == 0

    def driver(self) -> str | None:
        """The kernel module's version, "580.65.06"."""
        text = ctypes.create_string_buffer(96)
        return text.value.decode() if self._call("nvmlSystemGetDriverVersion", text, 96) else None

    def _handle(self, uuid: str) -> ctypes.c_void_p | None:
        handle = ctypes.c_void_p()
        return handle if self._call("nvmlDeviceGetHandleByUUID", uuid.encode(), ctypes.byref(handle)) else None

    def minor(self, uuid: str) -> int | None:
        number = ctypes.c_uint()
        handle = self._handle(uuid)
        if handle is None or not self._call("nvmlDeviceGetMinorNumber", handle, ctypes.byref(number)):
            return None
        return number.value

    def mig(self, uuid: str) -> bool:
        now, pending = ctypes.c_uint(), ctypes.c_uint()
        handle = self._handle(uuid)
        if handle is None or not self._call("nvmlDeviceGetMigMode", handle, ctypes.byref(now), ctypes.byref(pending)):
            return False
        return now.value == 1

    def held(self, uuids: list[str], pid: int) -> int | None:
        """Bytes that a process has of these GPUs."""
        total = 0
        for uuid in uuids:
            handle = self._handle(uuid)
            count = ctypes.c_uint(_MAX_PROCESSES)
            found = (_Process * _MAX_PROCESSES)()
            name = "nvmlDeviceGetComputeRunningProcesses_v3"
            if handle is None or not self._call(name, handle, ctypes.byref(count), found):
                return None
            for process in found[: count.value]:
                # Where NVML may not tell, it says the highest number there is.
                if process.pid == pid and process.bytes < 1 << 60:
                    total += process.bytes
        return total
