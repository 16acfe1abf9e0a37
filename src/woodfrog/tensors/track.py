"""Capturing tensors again and again: each time only the blocks that changed."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from woodfrog.tensors import find
from woodfrog.tensors.copying import CopyOut
from woodfrog.tensors.delta import Blocks, Delta, Memory, Placed, leaves, root_of
from woodfrog.tensors.hashing import Hasher
from woodfrog.tensors.merkle import Tree

__all__ = ["State", "TensorTracker"]


@dataclass(frozen=True)
class State:
    """What tensors were at a capture, without their bytes: enough to compare two states.

    Attributes:
        root: 32 bytes that name it. Equal roots of trackers with one key: equal tensors.
    """

    root: bytes
    memories: tuple[Memory, ...] = field(repr=False)
    trees: tuple[Tree, ...] = field(repr=False)

    def changed(self, other: State) -> dict[int, list[int]]:
        """Blocks that differ between two states of one tracker: memory's id to numbers of blocks, ascending.

        Memory that only one of them has is left out.
        """
        mine = dict(zip((m.id for m in self.memories), self.trees, strict=True))
        theirs = dict(zip((m.id for m in other.memories), other.trees, strict=True))
        found = {number: tree.differences(theirs[number]) for number, tree in mine.items() if number in theirs}
        return {number: blocks for number, blocks in found.items() if blocks}


class Pending:
    """A capture whose bytes are on their way from the device."""

    def __init__(self, delta: Delta, copies: list[CopyOut]) -> None:
        self._delta = delta
        self._copies = copies

    def result(self) -> Delta:
        """The capture, when all of its bytes are here."""
        for copy in self._copies:
            copy.finish()
        return self._delta


class TensorTracker:
    """Captures the tensors that objects hold, each time only the blocks of memory that changed.

    Blocks are compared by signatures, which are computed on the tensors' own device: two that differ are taken for the
    same with a probability of 2⁻¹²⁷ at most (`woodfrog.tensors.hashing`). Memory that several tensors share is captured
    once. Tensors may come, go, and change their size.

    Nothing may write to the tensors while `capture` or `begin` runs: on a GPU, work of other streams than the current
    one; on the CPU, other threads.

    Args:
        objects: modules, optimizers, tensors, containers, objects with attributes.
        block_bytes: a multiple of 4,096, up to 8 MiB. Small blocks capture less, and cost more signatures (64 bytes
            each, kept on the device and on the host).
        staging_bytes: of a GPU's memory, and of pinned host memory, so much is used while bytes leave.
        key: 32 bytes that signatures are made with; random by default. Give two trackers one key to compare them.

    Example:
        >>> tracker = TensorTracker(model, optimizer, block_bytes=65536)
        >>> first = tracker.capture()     # everything
        >>> train_one_step()
        >>> second = tracker.capture()    # what changed
        >>> restore([first, second], into=(model, optimizer))

    Raises:
        ValueError: `block_bytes` or `key` is not as said.
    """

    def __init__(
        self,
        *objects: Any,
        block_bytes: int = 1 << 16,
        staging_bytes: int = 1 << 28,
        key: bytes | None = None,
    ) -> None:
        if key is not None and len(key) != 32:
            raise ValueError(f"key must have 32 bytes, got {len(key)}")
        self._objects = objects
        self._key = key or os.urandom(32)
        self._hasher = Hasher(self._key, block_bytes)
        self._staging = staging_bytes
        self._known: dict[int, _Known] = {}
        self._next = 0
        self._state: State | None = None

    @property
    def state(self) -> State | None:
        """The state at the last capture."""
        return self._state

    def capture(self) -> Delta:
        """What changed since the last capture; everything, the first time.

        Raises:
            SpecError: a tensor has no memory of its own (sparse CSR, fake, meta …), by name.
        """
        return self.begin().result()

    def begin(self) -> Pending:
        """Like `capture`, but on a GPU the bytes may still be leaving when this returns: compute on, ask for
        `result()` later. With more changed than `staging_bytes`, this waits until the rest fits."""
        tensors, storages = self._layout()
        memories, trees, changed, known = [], [], [], {}
        copies: dict[torch.device, CopyOut] = {}
        for storage in storages:
            old = self._known.get(storage._cdata)
            number = self._next if old is None else old.number
            self._next += old is None
            data = find.as_bytes(storage)
            signatures = self._hasher.signatures(data)
            index, tree = _compare(signatures, old)
            if index.numel():
                if storage.device not in copies:
                    copies[storage.device] = CopyOut(storage.device, self._staging)
                out, places = self._room(data.numel(), index)
                copies[storage.device].put(data, self._hasher.block_bytes, index, out)
                changed.append(Blocks(number, places, out))
            memories.append(Memory(number, data.numel(), str(storage.device)))
            trees.append(tree)
            known[storage._cdata] = _Known(StorageWeakRef(storage), number, signatures, tree)
        root = root_of(tensors, memories, trees, self._hasher.block_bytes)
        parent = None if self._state is None else self._state.root
        self._known, self._state = known, State(root, tuple(memories), tuple(trees))
        delta = Delta(
            root, parent, self._key, self._hasher.block_bytes, tuple(tensors), tuple(memories), tuple(changed)
        )
        return Pending(delta, list(copies.values()))

    def _layout(self) -> tuple[list[Placed], list[torch.UntypedStorage]]:
        tensors: list[Placed] = []
        storages: dict[int, torch.UntypedStorage] = {}
        places: dict[int, int] = {}
        for name, tensor in find.named(self._objects).items():
            storage = find.storage_of(name, tensor)
            storages.setdefault(storage._cdata, storage)
            place = places.setdefault(storage._cdata, len(places))
            dtype = str(tensor.dtype).removeprefix("torch.")
            shape, stride, offset = tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset())
            view = "c" * tensor.is_conj() + "n" * tensor.is_neg()
            tensors.append(Placed(name, place, dtype, shape, stride, offset, view))
        return tensors, list(storages.values())

    def _room(self, nbytes: int, index: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
        """Host memory for the blocks `index` of a memory, and their numbers."""
        width = self._hasher.block_bytes
        places = tuple(index.tolist())
        short = max(0, (places[-1] + 1) * width - nbytes)
        return torch.empty(len(places) * width - short, dtype=torch.int8, device="cpu"), places


@dataclass(frozen=True)
class _Known:
    """A memory at the last capture. The weak reference keeps its address from being given to another."""

    alive: StorageWeakRef
    number: int
    signatures: torch.Tensor
    tree: Tree


def _compare(signatures: torch.Tensor, old: _Known | None) -> tuple[torch.Tensor, Tree]:
    """Numbers of the blocks that changed, on the device, and the tree over all."""
    count = signatures.shape[0]
    if old is None or old.signatures.device != signatures.device:
        return torch.arange(count, device=signatures.device), Tree.build(leaves(signatures))
    common = min(count, old.signatures.shape[0])
    differs = torch.ones(count, dtype=torch.bool, device=signatures.device)
    differs[:common] = (signatures[:common] != old.signatures[:common]).any(1)
    index = differs.nonzero().view(-1)
    if count != old.signatures.shape[0] or index.numel() > count // 4:
        return index, Tree.build(leaves(signatures))
    if not index.numel():
        return index, old.tree
    return index, old.tree.replace(dict(zip(index.tolist(), leaves(signatures[index]), strict=True)))
