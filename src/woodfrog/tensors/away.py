"""Tensors moved off their devices for a snapshot, and put back in place: for drivers that cannot save device memory.

A tensor's memory is freed and given back under it (its storage is resized to nothing and to its size again), so every
object stays the one it was: parameters, views of them, tied weights, optimizer state, leaves of autograd. Only
addresses change. That API calls are not watched, and only PyTorch's own memory is moved, is what tells it from
CheCUDA (Takizawa et al., 2009), which does the same for a whole CUDA program: copy out, destroy, make anew, copy in.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

import torch

from woodfrog.errors import RestoreError
from woodfrog.tensors import find
from woodfrog.tensors.copying import Arena, CopyIn, copy_to_host
from woodfrog.tensors.link import free_pinned

__all__ = ["Away", "bring_back", "put_away", "put_away_on_snapshot"]

_registered: list[Away] = []
_STAGING = 64 << 20
_NODES = ("/dev/nvidia", "/dev/kfd", "/dev/dri/")


class Away:
    """Moves tensors' device memory to the host, and back.

    Args:
        objects: modules, optimizers, tensors, containers, objects with attributes; with none, every tensor that
            Python's garbage collector knows and is not kept from (`gc.freeze`, as in a thawed process's first calls).
        devices: kinds of devices that are left: all but the CPU by default.
        staging_bytes: of pinned host memory, so much at most is used on the way out, and on the way back. It is there
            only while bytes are on their way, never between `leave` and `come_back`. Back, it is at most a quarter of
            what comes. With less than 16 MiB, and on devices without streams, copies are plain ones.

    Example:
        >>> away = Away(model, optimizer)
        >>> away.leave()         # the device's memory is free
        >>> away.come_back()     # the same tensors, the same values
    """

    def __init__(self, *objects: Any, devices: Collection[str] | None = None, staging_bytes: int = _STAGING) -> None:
        if staging_bytes < 0:
            raise ValueError(f"staging_bytes must not be negative, got {staging_bytes}")
        self._objects = objects
        self._devices = None if devices is None else frozenset(devices)
        self._staging = staging_bytes
        self._held: dict[int, tuple[torch.UntypedStorage, torch.Tensor]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes that are away now."""
        return sum(host.numel() for _, host in self._held.values())

    def leave(self) -> list[str]:
        """Move the memory to the host. Tensors must not be used until `come_back`.

        Returns:
            Warnings: what stays on its device, and why.

        Raises:
            RuntimeError: of torch; then everything is where it was.
        """
        warnings: list[str] = []
        tensors = find.named(self._objects).items() if self._objects else enumerate(find.reachable())
        storages: dict[int, tuple[str, torch.UntypedStorage]] = {}
        for name, tensor in tensors:
            kind = tensor.device.type
            if kind == "meta" or (kind == "cpu" if self._devices is None else kind not in self._devices):
                continue
            try:
                storage = find.storage_of(str(name), tensor)
            except Exception as e:
                warnings.append(f"it stays on its device: {e}")
                continue
            if storage.device.type != "meta":  # what compilers trace with has a device, and no memory
                storages.setdefault(storage._cdata, (str(name), storage))
        try:
            for address, (name, storage) in storages.items():
                if address in self._held or not storage.nbytes():
                    continue
                if not storage.resizable() or (storage.is_shared() and storage.device.type == "cpu"):
                    warnings.append(f"tensor {name} stays: its memory is another's (shared, mapped, or not torch's)")
                    continue
                self._held[address] = (storage, copy_to_host(find.as_bytes(storage), self._staging))
                storage.resize_(0)
        except BaseException:
            self.come_back()
            free_pinned()
            raise
        _empty()
        return warnings + _left(self._devices)

    def come_back(self) -> list[str]:
        """Put everything back in place, what left last first.

        Returns:
            Warnings: why it was slower than it could be.

        Raises:
            RestoreError: there is no room on a device (code "device-memory"); what is back stays, and it can be called
                again.
        """
        if not self._held:
            return []
        copier = CopyIn(Arena.of(self._staging, self.nbytes))
        failure: Exception | None = None
        try:
            try:
                for address in reversed(list(self._held)):
                    storage, host = self._held[address]
                    storage.resize_(host.numel())
                    copier.put(host, find.as_bytes(storage), partial(self._held.pop, address))
                    del host  # its memory is free as soon as it has arrived
            finally:
                copier.finish()
        except (RuntimeError, MemoryError) as e:
            failure = e
        finally:
            copier.close()
            for storage, _ in self._held.values():
                storage.resize_(0)
        if failure is not None:
            device = next(reversed(self._held.values()))[0].device
            reason = str(failure).splitlines()[0] if str(failure) else type(failure).__name__
            raise RestoreError(
                f"{self.nbytes} bytes of tensors do not fit back on {device}: {reason}",
                code="device-memory",
            ) from None
        return copier.warnings


def put_away_on_snapshot(*objects: Any, devices: Collection[str] | None = None, staging_bytes: int = _STAGING) -> Away:
    """Have these objects' device memory moved to the host before this process is frozen, and back in every copy.

    For drivers without a checkpoint API. It happens after all other before-snapshot functions, and is undone before all
    after-restore functions. What stays on a device is named in the log. A process that has used CUDA cannot leave it
    altogether: see docs/gpu.md for what follows from that.

    Args:
        objects: as for `Away`; none means every tensor of the process.
        devices: kinds of devices that are left; all but the CPU by default.
        staging_bytes: as for `Away`.

    Example:
        >>> woodfrog.tensors.put_away_on_snapshot(model)
    """
    away = Away(*objects, devices=devices, staging_bytes=staging_bytes)
    _registered.append(away)
    return away


def put_away() -> list[str]:
    """Called by the worker, before the freeze: warnings. Never raises; what cannot leave stays."""
    warnings: list[str] = []
    for away in _registered:
        try:
            warnings += [f"tensors: {warning}" for warning in away.leave()]
        except Exception as e:
            warnings.append(f"tensors: {str(e).splitlines()[0] if str(e) else type(e).__name__}; they stay")
    return warnings


def bring_back() -> list[str]:
    """Called by the worker, after the restore: warnings. Raises RestoreError."""
    return [f"tensors: {warning}" for away in reversed(_registered) for warning in away.come_back()]


def open_nodes(links: Iterable[str] | None = None) -> list[str]:
    """Device nodes of GPUs that this process has open or mapped; while there is one, CRIU alone cannot dump it."""
    if links is None:
        links = _links("/proc/self/fd")
        with open("/proc/self/maps") as maps:
            links += [words[5].rstrip() for line in maps if len(words := line.split(None, 5)) == 6]
    return sorted({link for link in links if link.startswith(_NODES)})


def _links(folder: str) -> list[str]:
    found = []
    try:
        for name in os.listdir(folder):
            try:
                found.append(os.readlink(f"{folder}/{name}"))
            except OSError:
                continue
    except OSError:
        pass
    return found


def _empty() -> None:
    """What torch itself keeps of the device."""
    if not torch.cuda.is_initialized():
        return
    for device in range(torch.cuda.device_count()):
        torch.cuda.synchronize(device)
    calls: tuple[Callable[[], Any] | None, ...] = (
        getattr(torch._C, "_cuda_clearCublasWorkspaces", None),
        getattr(torch._C, "_host_emptyCache", None),
        torch.cuda.empty_cache,
        torch.cuda.ipc_collect,
    )
    for call in calls:
        if call is not None:
            call()


def _left(devices: Collection[str] | None) -> list[str]:
    """What is still on the device, as warnings."""
    found = []
    if torch.cuda.is_initialized() and (devices is None or "cuda" in devices):
        left = sum(torch.cuda.memory_allocated(i) for i in range(torch.cuda.device_count()))
        if left:
            found.append(f"{left} bytes stay allocated on the GPU: tensors of others, CUDA graphs, or held by C++")
    nodes = open_nodes()
    if nodes:
        found.append(f"the GPU's context stays: {', '.join(nodes)} open; only a driver's checkpoint can save that")
    return found
