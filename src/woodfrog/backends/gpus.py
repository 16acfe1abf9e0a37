"""The GPUs of this machine as sandboxes get them: device nodes, environment, worker class."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from woodfrog.cuda.client import Cuda
from woodfrog.cuda.devices import Device
from woodfrog.engine.engine import GpuSide
from woodfrog.errors import GpuError
from woodfrog.linux.rootplan import DeviceNode
from woodfrog.snapshot.compat import WorkerClass, with_gpu

__all__ = ["Gpus", "find_gpus"]

log = logging.getLogger("woodfrog")

_SHARED = ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools")
"""Device nodes that every CUDA program needs, whichever GPU it has."""


@dataclass(frozen=True)
class Gpus:
    """What `find_gpus` found. `why` says why there is none."""

    cuda: Cuda | None = None
    devices: tuple[Device, ...] = ()
    nodes: Path = Path("/dev")
    why: str = ""

    def device_nodes(self, uuids: Sequence[str]) -> tuple[DeviceNode, ...]:
        """Those of these GPUs, and what all share: a sandbox sees no other."""
        if not uuids:
            return ()
        numbers = {d.uuid: d.minor if d.minor is not None else i for i, d in enumerate(self.devices)}
        names = (*_SHARED, *(f"nvidia{numbers[uuid]}" for uuid in uuids))
        paths = [self.nodes / name for name in names]
        return tuple(DeviceNode(p, p.name, p.is_dir()) for p in paths if p.exists())

    def side(self, uuids: Sequence[str]) -> GpuSide | None:
        return GpuSide(self.cuda, tuple(uuids)) if self.cuda is not None and uuids else None

    def env(self, uuids: Sequence[str]) -> dict[str, str]:
        return {"CUDA_VISIBLE_DEVICES": ",".join(uuids)} if uuids else {}

    def classes(self, base: WorkerClass) -> tuple[WorkerClass, ...]:
        """One for each chip: GPU memory restores where chip and driver are the same."""
        return tuple(self.class_of(base, chip) for chip in dict.fromkeys(d.name for d in self.devices))

    def worker_class(self, base: WorkerClass, uuids: Sequence[str]) -> WorkerClass:
        return self.class_of(base, next((d.name for d in self.devices if d.uuid in uuids), ""))

    def class_of(self, base: WorkerClass, chip: str) -> WorkerClass:
        """That of snapshots with the memory of such a GPU."""
        node = self.cuda.node if self.cuda is not None else None
        return with_gpu(base, chip, node.driver if node is not None else "")

    async def close(self) -> None:
        if self.cuda is not None:
            await self.cuda.close()


async def find_gpus(wanted: str, directory: str) -> Gpus:
    """Look for NVIDIA GPUs, where there are device nodes at all.

    Args:
        wanted: the setting `gpu`.
        directory: the setting `cuda_dir`.
    """
    if wanted == "none":
        return Gpus(why="WOODFROG_GPU=none")
    library = Path(directory) if directory else None
    nodes = library / "dev" if library is not None and (library / "dev").is_dir() else Path("/dev")
    if not any(re.fullmatch(r"nvidia\d+", p.name) for p in nodes.glob("nvidia*")):
        return Gpus(why=f"no NVIDIA device in {nodes}")
    cuda = Cuda(library=library)
    try:
        node = await cuda.start()
    except GpuError as e:
        log.warning("GPUs are not used: %s", e.message)
        await cuda.close()
        return Gpus(why=e.message)
    whole = tuple(d for d in node.devices if not d.mig)
    for device in node.devices:
        log.info("GPU %s: %s, driver %s%s", device.uuid, device.name, node.driver, ", MIG: not used" * device.mig)
    return Gpus(cuda, whole, nodes, "" if whole else "all of its GPUs are split (MIG)")
