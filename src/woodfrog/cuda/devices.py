"""The GPUs of a node, and which of them stand for a snapshot's at a restore. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from woodfrog.cuda.failures import gpu_error

__all__ = ["CHECKPOINT_VERSION", "MAP_VERSION", "Device", "Node", "device_map", "node_from_dict"]

CHECKPOINT_VERSION = 12080
"""CUDA version of the first driver with the checkpoint calls (570)."""
MAP_VERSION = 13000
"""And of the first that restores on other GPUs than the captured ones (580)."""
PEERS_DRIVER = 610
"""The first driver that takes CUDA IPC, and so NCCL's communicators."""


@dataclass(frozen=True)
class Device:
    """One GPU. `uuid` as NVIDIA's tools write it (`GPU-…`); `minor` numbers its device node, None = not known."""

    uuid: str
    name: str
    memory: int
    minor: int | None = None
    mig: bool = False


@dataclass(frozen=True)
class Node:
    """What the driver of this machine says. `version` is CUDA's (13000), `driver` the kernel module's ("580.65.06")."""

    version: int
    driver: str
    devices: tuple[Device, ...] = field(default=())

    @property
    def checkpoints(self) -> bool:
        return self.version >= CHECKPOINT_VERSION

    @property
    def peers(self) -> bool:
        """Whether memory that processes share can be checkpointed."""
        major = self.driver.partition(".")[0]
        return major.isdigit() and int(major) >= PEERS_DRIVER

    def named(self, uuid: str) -> Device | None:
        return next((d for d in self.devices if d.uuid == uuid), None)


def node_from_dict(data: dict[str, Any]) -> Node:
    """From the helper's JSON.

    Raises:
        ValueError, TypeError, KeyError: it is something else.
    """
    return Node(int(data["version"]), str(data["driver"]), tuple(Device(**d) for d in data["devices"]))


def device_map(
    node_then: Sequence[tuple[str, str]], used_then: Sequence[str], now: Node, used_now: Sequence[str]
) -> tuple[tuple[str, str], ...]:
    """Which GPU takes the place of which: pairs of uuids; empty when each is its own.

    The driver wants every GPU of the machine in it, also those that no process of the snapshot uses.

    Args:
        node_then: (uuid, name) of each GPU of the machine at the capture.
        used_then, used_now: uuids that the processes saw and will see, in their order.

    Raises:
        GpuError: `gpu-chip`: other chips, or fewer; `gpu-driver-old`: this driver restores on the same ones only.
    """
    names = dict(node_then)
    if len(used_now) < len(used_then):
        raise gpu_error("gpu-chip", f"{len(used_then)} GPUs at the capture, {len(used_now)} now")
    pairs: dict[str, str] = {}
    for then, uuid in zip(used_then, used_now, strict=False):
        device = now.named(uuid)
        if device is None or device.name != names.get(then):
            raise gpu_error(
                "gpu-chip", f"{names.get(then, then)} at the capture, {device.name if device else uuid} now"
            )
        pairs[then] = uuid
    free = [d.uuid for d in now.devices if d.uuid not in pairs.values()]
    rest = [uuid for uuid, _ in node_then if uuid not in pairs]
    for uuid in [u for u in rest if u in free]:
        pairs[uuid] = uuid
        free.remove(uuid)
    pairs.update(zip((u for u in rest if u not in pairs), free, strict=False))
    if all(then == here for then, here in pairs.items()):
        return ()
    if now.version < MAP_VERSION:
        raise gpu_error("gpu-driver-old", f"driver {now.driver} cannot restore on another GPU")
    return tuple(pairs.items())
