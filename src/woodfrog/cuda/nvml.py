"""The few questions that only NVML answers. By ctypes: the package's own binding of NVML needs numpy.

Every question may go unanswered (NVML is not installed in many containers): then the answer is None.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from typing import Any

from woodfrog.cuda.health import Vitals

__all__ = ["Nvml"]

_MAX_PROCESSES = 1024
_LOST, _RESET_REQUIRED = 15, 16
"""What NVML answers, whatever it is asked, of a GPU that is not well."""
_UNCORRECTED, _VOLATILE = 1, 0
_XID_EVENTS = 8
_EVENT_WAIT_MS = 5000
_NOTHING_HAPPENED = 10


class _Process(ctypes.Structure):
    _fields_ = (
        ("pid", ctypes.c_uint),
        ("bytes", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class _Event(ctypes.Structure):
    _fields_ = (
        ("device", ctypes.c_void_p),
        ("kind", ctypes.c_ulonglong),
        ("data", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


class Nvml:
    def __init__(self) -> None:
        self._library: ctypes.CDLL | None = None
        self._events = ctypes.c_void_p()
        self._registered: dict[int | None, str] = {}
        try:
            library = ctypes.CDLL("libnvidia-ml.so.1")
            if library.nvmlInit_v2() == 0:
                self._library = library
        except (OSError, AttributeError):
            pass

    def _answer(self, name: str, *arguments: Any) -> int | None:
        """What NVML answers to a call; None = it has none of that name."""
        function = getattr(self._library, name, None)
        return None if function is None else int(function(*arguments))

    def _call(self, name: str, *arguments: Any) -> bool:
        return self._answer(name, *arguments) == 0

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
        """Bytes that a process has of these GPUs; None also where NVML does not list it: in a container it may know
        processes by their pids outside."""
        sizes: list[int] = []
        for uuid in uuids:
            handle = self._handle(uuid)
            count = ctypes.c_uint(_MAX_PROCESSES)
            found = (_Process * _MAX_PROCESSES)()
            name = "nvmlDeviceGetComputeRunningProcesses_v3"
            if handle is None or not self._call(name, handle, ctypes.byref(count), found):
                return None
            sizes += [process.bytes for process in found[: count.value] if process.pid == pid]
        # Where NVML may not tell, it says the highest number there is.
        return sum(sizes) if sizes and max(sizes) < 1 << 60 else None

    def vitals(self, uuid: str) -> Vitals:
        """How a GPU is. What a chip does not have (ECC, spare rows) counts as well."""
        handle = ctypes.c_void_p()
        answers = [self._answer("nvmlDeviceGetHandleByUUID", uuid.encode(), ctypes.byref(handle))]
        if answers[0] != 0:
            return Vitals(lost=answers[0] == _LOST, reset=answers[0] == _RESET_REQUIRED)

        def ask(name: str, *arguments: Any) -> bool:
            answers.append(self._answer(name, handle, *arguments))
            return answers[-1] == 0

        errors = ctypes.c_ulonglong()
        rows = [ctypes.c_uint() for _ in range(4)]
        retired = ctypes.c_int()
        memory = _Memory()
        counted = ask("nvmlDeviceGetTotalEccErrors", _UNCORRECTED, _VOLATILE, ctypes.byref(errors))
        remapped = ask("nvmlDeviceGetRemappedRows", *map(ctypes.byref, rows))
        pending = ask("nvmlDeviceGetRetiredPagesPendingStatus", ctypes.byref(retired))
        sized = ask("nvmlDeviceGetMemoryInfo", ctypes.byref(memory))
        return Vitals(
            uncorrected=errors.value if counted else None,
            remap_pending=remapped and rows[2].value != 0,
            remap_failed=remapped and rows[3].value != 0,
            retired_pending=pending and retired.value != 0,
            memory=memory.total if sized else None,
            used=memory.used if sized else None,
            lost=_LOST in answers,
            reset=_RESET_REQUIRED in answers,
        )

    def register(self, uuids: Sequence[str]) -> None:
        """Have NVML keep the Xid errors of these GPUs from now on for `watch`, where it can."""
        if not self._call("nvmlEventSetCreate", ctypes.byref(self._events)):
            return
        for uuid in uuids:
            handle = self._handle(uuid)
            kinds = ctypes.c_ulonglong(_XID_EVENTS)
            if handle is not None and self._call("nvmlDeviceRegisterEvents", handle, kinds, self._events):
                self._registered[handle.value] = uuid

    def watch(self, tell: Callable[[str, int], None]) -> None:
        """Tell of each Xid error by uuid and number; for ever, unless none is registered."""
        while self._registered:
            event = _Event()
            wait = ctypes.c_uint(_EVENT_WAIT_MS)
            answer = self._answer("nvmlEventSetWait_v2", self._events, ctypes.byref(event), wait)
            if answer is None:
                return
            if answer == 0 and event.kind == _XID_EVENTS and event.device in self._registered:
                tell(self._registered[event.device], event.data)
            elif answer not in (0, _NOTHING_HAPPENED):
                time.sleep(_EVENT_WAIT_MS / 1e3)  # one of them is lost, perhaps: `vitals` says so
