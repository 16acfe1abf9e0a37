"""The GPUs of this machine as sandboxes get them: device nodes, environment, worker class."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from woodfrog.criu.plugins import find_amd_plugin
from woodfrog.cuda.client import Cuda
from woodfrog.cuda.devices import Device
from woodfrog.engine.engine import AmdSide, GpuSide
from woodfrog.errors import GpuError
from woodfrog.linux.kfd import KfdGpu, find_kfd
from woodfrog.linux.rootplan import DeviceNode
from woodfrog.snapshot.compat import WorkerClass, with_gpu

__all__ = ["Gpus", "amd_gpus", "find_gpus", "library_path"]

log = logging.getLogger("woodfrog")

DEV = Path("/dev")
MODULE = Path("/proc/driver/nvidia/version")
"""There while the kernel's part of the driver is loaded. Its device nodes may come with the first `cuInit` only."""
_SHARED = ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools")
"""Device nodes that every CUDA program needs, whichever GPU it has."""
_LIBRARIES = ("libcuda.so.1", "libnvidia-ml.so.1")


def library_path(setting: str, environ: Mapping[str, str] = os.environ) -> str:
    """LD_LIBRARY_PATH for sandboxes: where the driver's libraries are, if not where all libraries are.

    In many images the driver is mounted at a place that only LD_LIBRARY_PATH names. The rest of it is the daemon's own.

    Args:
        setting: the setting `cuda_dir`.
    """
    if setting:
        return setting
    named = environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    found = [d for d in named if d.startswith("/") and any(Path(d, name).exists() for name in _LIBRARIES)]
    return os.pathsep.join(dict.fromkeys(found))


def _numbers(nodes: Path) -> list[int]:
    """Those of NVIDIA's GPUs that have a device node."""
    found = (re.fullmatch(r"nvidia(\d+)", p.name) for p in nodes.glob("nvidia*"))
    return sorted(int(m[1]) for m in found if m)


@dataclass(frozen=True)
class Gpus:
    """What `find_gpus` found. `why` says why there is none."""

    cuda: Cuda | None = None
    devices: tuple[Device, ...] = ()
    nodes: Path = Path("/dev")
    why: str = ""
    amd: AmdSide | None = None
    """They are AMD's. A device's `minor` is then the number of its render node."""
    amd_driver: str = ""

    def device_nodes(self, uuids: Sequence[str]) -> tuple[DeviceNode, ...]:
        """Those of these GPUs, and what all share: a sandbox sees no other."""
        if not uuids:
            return ()
        numbers = self.numbers()
        if self.amd is not None:
            names = ("kfd", *(f"dri/renderD{numbers[uuid]}" for uuid in uuids))
        else:
            names = (*_SHARED, *(f"nvidia{numbers[uuid]}" for uuid in uuids))
        paths = [(self.nodes / name, name) for name in names]
        return tuple(DeviceNode(p, name, p.is_dir()) for p, name in paths if p.exists())

    def numbers(self) -> dict[str, int]:
        """Of each GPU's device node.

        Without NVML's word, in the order of the nodes: a container may have others than the first.
        """
        order = dict(enumerate(_numbers(self.nodes)))
        return {d.uuid: d.minor if d.minor is not None else order.get(i, i) for i, d in enumerate(self.devices)}

    def side(self, uuids: Sequence[str]) -> GpuSide | AmdSide | None:
        if self.amd is not None:
            return self.amd if uuids else None
        return GpuSide(self.cuda, tuple(uuids)) if self.cuda is not None and uuids else None

    def env(self, uuids: Sequence[str]) -> dict[str, str]:
        if not uuids:
            return {}
        if self.amd is None:
            return {"CUDA_VISIBLE_DEVICES": ",".join(uuids)}
        # ROCr sees those whose nodes are there, and HIP counts what ROCr sees. Chips without a number of their own have
        # no name that ROCr takes.
        named = {"ROCR_VISIBLE_DEVICES": ",".join(uuids)} if all(u.startswith("GPU-") for u in uuids) else {}
        return {**named, "HIP_VISIBLE_DEVICES": ",".join(map(str, range(len(uuids))))}

    def classes(self, base: WorkerClass) -> tuple[WorkerClass, ...]:
        """One for each chip: GPU memory restores where chip and driver are the same."""
        return tuple(self.class_of(base, chip) for chip in dict.fromkeys(d.name for d in self.devices))

    def worker_class(self, base: WorkerClass, uuids: Sequence[str]) -> WorkerClass:
        return self.class_of(base, next((d.name for d in self.devices if d.uuid in uuids), ""))

    def class_of(self, base: WorkerClass, chip: str) -> WorkerClass:
        """That of snapshots with the memory of such a GPU."""
        node = self.cuda.node if self.cuda is not None else None
        return with_gpu(base, chip, node.driver if node is not None else self.amd_driver)

    async def close(self) -> None:
        if self.cuda is not None:
            await self.cuda.close()


def amd_gpus(found: Sequence[KfdGpu], plugins: Path | None, nodes: Path = Path("/dev"), driver: str = "") -> Gpus:
    """AMD's GPUs. `plugins`: where CRIU has AMD's plugin; None = nowhere. `driver`: its version, where it is not the
    kernel's own."""
    devices = tuple(Device(g.id or f"renderD{g.render}", g.chip, g.memory, g.render) for g in found)
    return Gpus(None, devices, nodes, amd=AmdSide(plugins), amd_driver=driver)


def _warn_closed(node: Path, how: str) -> None:
    """User code has a uid of no group."""
    if node.stat().st_mode & 0o006 != 0o006:
        log.warning("%s is not open to all users: functions cannot use it; chmod 0666, %s", node, how)


def _find_amd(criu: Path | None) -> Gpus | None:
    nodes = DEV
    found = find_kfd() if (nodes / "kfd").exists() else ()
    if not found:
        return None
    driver = Path("/sys/module/amdgpu/version")
    plugins = find_amd_plugin(criu) if criu is not None else None
    gpus = amd_gpus(found, plugins, nodes, driver.read_text().strip() if driver.exists() else "")
    for device in gpus.devices:
        log.info("GPU %s: %s", device.uuid, device.name)
        for node in gpus.device_nodes((device.uuid,)):
            _warn_closed(node.source, "by a udev rule")
    if gpus.amd is not None and gpus.amd.plugins is None:
        log.warning("CRIU has no plugin for AMD's GPUs (amdgpu_plugin.so): there are no snapshots of their memory")
    return gpus


async def find_gpus(wanted: str, directory: str, criu: Path | None = None) -> Gpus:
    """Look for GPUs: NVIDIA's where its driver is loaded or there are device nodes of it, else AMD's.

    Args:
        wanted: the setting `gpu`.
        directory: the setting `cuda_dir`.
        criu: the binary, beside which AMD's plugin may lie.
    """
    if wanted == "none":
        return Gpus(why="WOODFROG_GPU=none")
    library = Path(directory) if directory else None
    nodes = library / "dev" if library is not None and (library / "dev").is_dir() else DEV
    if not _numbers(nodes) and not MODULE.exists():
        return _find_amd(criu) or Gpus(why=f"no NVIDIA device in {nodes}")
    cuda = Cuda(library=library)
    try:
        node = await cuda.start()
    except GpuError as e:
        log.warning("GPUs are not used: %s", e.message)
        await cuda.close()
        return (None if _numbers(nodes) else _find_amd(criu)) or Gpus(why=e.message)
    whole = tuple(d for d in node.devices if not d.mig)
    gpus = Gpus(cuda, whole, nodes, "" if whole else "all of its GPUs are split (MIG)")
    for device in node.devices:
        log.info("GPU %s: %s, driver %s%s", device.uuid, device.name, node.driver, ", MIG: not used" * device.mig)
    for path in (nodes / n for n in (*_SHARED[:2], *(f"nvidia{n}" for n in gpus.numbers().values()))):
        if not path.exists():
            log.warning("there is no %s: functions cannot use the GPU; create it (nvidia-modprobe -u -c 0)", path)
        else:
            _warn_closed(path, "set the module's NVreg_DeviceFileMode")
    return gpus
