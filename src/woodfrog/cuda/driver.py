"""Typed calls of the driver's checkpoint API (`cuCheckpointProcess*`), through the package cuda-bindings.

Blocking, and a call may hang for ever: only the helper process uses this.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID

from woodfrog.cuda.devices import CHECKPOINT_VERSION, MAP_VERSION, Device, Node
from woodfrog.cuda.failures import RESULTS, gpu_error
from woodfrog.cuda.health import Vitals
from woodfrog.cuda.nvml import Nvml
from woodfrog.cuda.states import Move, State, after

__all__ = ["Driver"]

_CALLS: dict[Move, str] = {
    "lock": "cuCheckpointProcessLock",
    "checkpoint": "cuCheckpointProcessCheckpoint",
    "restore": "cuCheckpointProcessRestore",
    "unlock": "cuCheckpointProcessUnlock",
}


class Driver:
    """The driver of this machine.

    Raises:
        GpuError: `gpu-no-driver`, `gpu-driver-old`, or what `cuInit` said.
    """

    def __init__(self) -> None:
        try:
            from cuda.bindings import driver
        except ImportError as e:
            raise gpu_error("gpu-no-driver", f"cuda-bindings cannot be imported ({e})") from None
        self._cuda = driver
        try:
            self._ask("cuInit", 0)
            self.version = int(self._ask("cuDriverGetVersion"))
        except (RuntimeError, OSError) as e:
            # The package finds the library at the first call, and says so in errors of its own.
            raise gpu_error("gpu-no-driver", f"libcuda.so.1 cannot be loaded ({e})") from None
        self._nvml = Nvml()
        self.node = Node(self.version, self._nvml.driver() or f"CUDA {self.version}", tuple(self._devices()))
        self._nvml.register([d.uuid for d in self.node.devices])

    def _devices(self) -> list[Device]:
        found = []
        for ordinal in range(self._ask("cuDeviceGetCount")):
            device = self._ask("cuDeviceGet", ordinal)
            uuid = f"GPU-{UUID(bytes=bytes(self._ask('cuDeviceGetUuid', device).bytes))}"
            name = self._ask("cuDeviceGetName", 128, device).split(b"\0")[0].decode(errors="replace").strip()
            memory = int(self._ask("cuDeviceTotalMem", device))
            found.append(Device(uuid, name, memory, self._nvml.minor(uuid), self._nvml.mig(uuid)))
        return found

    def _invoke(self, call: str, *arguments: Any) -> tuple[str, list[Any]]:
        """The name of the driver's answer, and what came with it."""
        function = getattr(self._cuda, call, None)
        if function is None:
            raise gpu_error("gpu-driver-old", f"{call} is not in this cuda-bindings", call=call)
        try:
            result, *values = function(*arguments)
        except RuntimeError as e:
            if call in str(e) and "not found" in str(e):
                raise gpu_error("gpu-driver-old", f"{call} is not in this driver", call=call) from None
            raise
        return str(getattr(result, "name", result)), values

    def _ask(self, call: str, *arguments: Any, who: str = "", pid: int | None = None) -> Any:
        name, values = self._invoke(call, *arguments)
        if name != "CUDA_SUCCESS":
            what = " ".join(filter(None, (who, call, f"answered {name}")))
            raise gpu_error(RESULTS.get(name, "gpu-driver"), what, pid=pid, call=call, result=name)
        return values[0] if values else None

    def state(self, pid: int) -> State | None:
        """Where a process of this pid namespace stands; None = it is no CUDA process, or gone."""
        self._demand(CHECKPOINT_VERSION)
        call = "cuCheckpointProcessGetState"
        name, values = self._invoke(call, pid)
        if name in ("CUDA_ERROR_INVALID_VALUE", "CUDA_ERROR_NOT_INITIALIZED"):
            return None
        if name != "CUDA_SUCCESS":
            what = f"process {pid}: {call} answered {name}"
            raise gpu_error(RESULTS.get(name, "gpu-driver"), what, pid=pid, call=call, result=name)
        return State(int(values[0]))

    def _demand(self, version: int) -> None:
        if self.version < version:
            raise gpu_error("gpu-driver-old", f"driver {self.node.driver} (CUDA {self.version})")

    def move(self, pid: int, move: Move, *, timeout_ms: int = 0, pairs: Sequence[tuple[str, str]] = ()) -> State:
        """Bring a process one step on.

        Args:
            timeout_ms: for "lock": how long the GPU's work may take to end; the driver waits for ever with 0.
            pairs: for "restore": which GPU takes the place of which, every one of the machine.

        Raises:
            GpuError: see `failures.CODES`; the process's state may have changed all the same: ask for it.
        """
        who = f"process {pid}"
        now = self.state(pid)
        if now is None:
            raise gpu_error("gpu-not-cuda", f"{who}: {move}", pid=pid)
        wanted = after(now, move, who)
        self._ask(_CALLS[move], pid, self._arguments(move, timeout_ms, pairs), who=who, pid=pid)
        reached = self.state(pid)
        if reached is not wanted:
            got = reached.name if reached is not None else "gone"
            raise gpu_error("gpu-driver", f"{who}: {move} led to {got}, not {wanted.name}", pid=pid, call=_CALLS[move])
        return wanted

    def _arguments(self, move: Move, timeout_ms: int, pairs: Sequence[tuple[str, str]]) -> Any:
        if move == "lock":
            lock = self._cuda.CUcheckpointLockArgs()
            lock.timeoutMs = timeout_ms
            return lock
        if move != "restore" or not pairs:
            return None
        self._demand(MAP_VERSION)
        if not hasattr(self._cuda, "CUcheckpointGpuPair"):
            raise gpu_error("gpu-driver-old", "a map of GPUs is not in this cuda-bindings")
        restore = self._cuda.CUcheckpointRestoreArgs()
        made = []
        for then, now in pairs:
            # The binding's own uuid cannot be written to; one over our memory is copied into its pair.
            raw = [ctypes.create_string_buffer(UUID(u.removeprefix("GPU-")).bytes, 16) for u in (then, now)]
            pair = self._cuda.CUcheckpointGpuPair()
            pair.oldUuid, pair.newUuid = (self._cuda.CUuuid(ctypes.addressof(r)) for r in raw)
            made.append(pair)
        restore.gpuPairs = made
        restore.gpuPairsCount = len(made)
        return restore

    def thread(self, pid: int) -> int:
        """The thread of a process that the driver restores it with."""
        return int(self._ask("cuCheckpointProcessGetRestoreThreadId", pid, who=f"process {pid}", pid=pid))

    def vitals(self, uuid: str) -> Vitals:
        """How a GPU is."""
        return self._nvml.vitals(uuid)

    def watch(self, tell: Callable[[str, int], None]) -> None:
        """Tell of each Xid error since the start, by uuid and number; does not return where NVML can tell of them."""
        self._nvml.watch(tell)

    def held(self, pid: int) -> int | None:
        """Bytes of GPU memory a process has; None = not known."""
        return self._nvml.held([d.uuid for d in self.node.devices], pid)
