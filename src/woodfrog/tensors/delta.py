"""What a capture holds, and tensors made of a chain of captures again."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, BinaryIO

import torch

from woodfrog.errors import IntegrityError, SpecError
from woodfrog.tensors import find
from woodfrog.tensors.hashing import SIGNATURE, Hasher
from woodfrog.tensors.merkle import Tree

__all__ = ["Blocks", "Delta", "Memory", "Placed", "leaves", "restore", "root_of", "trees_of"]

_HEAD = struct.Struct("<8sQ")
_MAGIC = b"wftensr1"


@dataclass(frozen=True)
class Placed:
    """Where a tensor lies: in memory number `memory` of its state, at `offset` elements of its type."""

    name: str
    memory: int
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    view: str = ""
    """"c" for a lazily conjugated view, "n" for a lazily negated one."""


@dataclass(frozen=True)
class Memory:
    """One piece of memory. `id` stays the same from capture to capture of one tracker."""

    id: int
    nbytes: int
    device: str


@dataclass(frozen=True)
class Blocks:
    """Changed blocks of the memory `id`: their numbers, ascending, and their bytes one after the other."""

    id: int
    index: tuple[int, ...]
    data: torch.Tensor = field(repr=False)
    """int8, in host memory; the last block of a memory may be short."""


@dataclass(frozen=True)
class Delta:
    """One capture: where all tensors lie, and the bytes of what changed since its parent.

    Attributes:
        root: 32 bytes that name the state after it.
        parent: root of the state that it is added to; None for one that holds everything.
        key, block_bytes: what signatures are made with.
    """

    root: bytes
    parent: bytes | None
    key: bytes = field(repr=False)
    block_bytes: int
    tensors: tuple[Placed, ...] = field(repr=False)
    memories: tuple[Memory, ...] = field(repr=False)
    changed: tuple[Blocks, ...] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of tensor memory in it."""
        return sum(blocks.data.numel() for blocks in self.changed)

    def save(self, file: BinaryIO) -> None:
        """Write it. Plain JSON and bytes: reading it runs nothing.

        Example:
            >>> with open("step-100.delta", "wb") as file:
            ...     delta.save(file)
        """
        head = {
            "root": self.root.hex(),
            "parent": self.parent.hex() if self.parent else None,
            "key": self.key.hex(),
            "block_bytes": self.block_bytes,
            "tensors": [asdict(t) for t in self.tensors],
            "memories": [asdict(m) for m in self.memories],
            "changed": [[b.id, b.index, b.data.numel()] for b in self.changed],
        }
        text = json.dumps(head, separators=(",", ":")).encode()
        file.write(_HEAD.pack(_MAGIC, len(text)) + text)
        for blocks in self.changed:
            file.write(blocks.data.numpy().data)

    @classmethod
    def load(cls, file: BinaryIO) -> Delta:
        """Read what `save` wrote.

        Raises:
            IntegrityError: it is not such a file, or it is cut short.
        """
        try:
            magic, size = _HEAD.unpack(file.read(_HEAD.size))
            if magic != _MAGIC:
                raise ValueError("wrong magic")
            head = json.loads(file.read(size))
            changed = []
            for number, index, nbytes in head["changed"]:
                data = bytearray(file.read(nbytes))
                if len(data) != nbytes:
                    raise ValueError("cut short")
                tensor = torch.empty(0, dtype=torch.int8, device="cpu")
                if data:
                    tensor = torch.frombuffer(data, dtype=torch.int8)
                changed.append(Blocks(int(number), tuple(index), tensor))
            return cls(
                bytes.fromhex(head["root"]),
                bytes.fromhex(head["parent"]) if head["parent"] else None,
                bytes.fromhex(head["key"]),
                int(head["block_bytes"]),
                tuple(_placed(t) for t in head["tensors"]),
                tuple(Memory(**m) for m in head["memories"]),
                tuple(changed),
            )
        except (KeyError, TypeError, ValueError, struct.error) as e:
            raise IntegrityError(f"not a capture of tensors, or damaged: {e}", code="tensors-damaged") from None


def _placed(plain: dict[str, Any]) -> Placed:
    return Placed(**{**plain, "shape": tuple(plain["shape"]), "stride": tuple(plain["stride"])})


def root_of(tensors: Iterable[Placed], memories: Iterable[Memory], trees: Iterable[Tree], block_bytes: int) -> bytes:
    """The name of a state: what tensors there are, how they share memory, and every byte of it; not on which device."""
    layout = [[asdict(t) for t in tensors], [m.nbytes for m in memories], block_bytes]
    made = hashlib.blake2b(json.dumps(layout).encode(), digest_size=32, person=b"woodfrog-state")
    for tree in trees:
        made.update(tree.root)
    return made.digest()


def trees_of(hasher: Hasher, memories: Iterable[torch.Tensor]) -> list[Tree]:
    """The trees over pieces of memory (int8, one row each)."""
    return [Tree.build(leaves(hasher.signatures(data))) for data in memories]


def leaves(signatures: torch.Tensor) -> list[bytes]:
    """Signatures as bytes, one each."""
    raw = signatures.cpu().contiguous().numpy().tobytes()
    return [raw[at : at + SIGNATURE] for at in range(0, len(raw), SIGNATURE)]


def restore(
    chain: Sequence[Delta], *, into: Iterable[Any] | None = None, device: str | torch.device | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of a chain's last state, bit for bit, sharing memory as they did.

    Args:
        chain: captures in order, from one that holds everything.
        into: the objects that were tracked, or others of the same shape: their tensors get the values in place, so that
            parameters, views and optimizer state stay the objects that they are. They must have all tensors.
        device: where new tensors are made; the device that each was on by default. Not used with `into`.

    Returns:
        The tensors by name: new ones, or those of `into`.

    Raises:
        IntegrityError: the chain does not fit together, or the bytes are not those that were captured.
        SpecError: `into` lacks a tensor, or has one of another type or shape.

    Example:
        >>> restore([first, second], into=(model, optimizer))
    """
    last, held = _replay(chain)
    hasher = Hasher(last.key, last.block_bytes)
    data = [held[m.id] for m in last.memories]
    if root_of(last.tensors, last.memories, trees_of(hasher, data), last.block_bytes) != last.root:
        raise IntegrityError("the chain's bytes are not those that were captured", code="tensors-damaged")
    if into is not None:
        return _fill(last, data, find.named(into))
    homes = [source.to(device or m.device).untyped_storage() for source, m in zip(data, last.memories, strict=True)]
    made = {}
    for t in last.tensors:
        home = homes[t.memory]
        made[t.name] = _view(t, home)
    return made


def _replay(chain: Sequence[Delta]) -> tuple[Delta, dict[int, torch.Tensor]]:
    """The last capture, and each memory's bytes after it."""
    held: dict[int, torch.Tensor] = {}
    root: bytes | None = None
    for delta in chain:
        if delta.parent != root:
            wanted = "a capture of everything" if root is None else "the state before it"
            raise IntegrityError(f"the chain is broken: {delta!r} does not follow {wanted}", code="tensors-chain")
        now = {}
        for memory in delta.memories:
            old, new = held.get(memory.id), torch.zeros(memory.nbytes, dtype=torch.int8, device="cpu")
            if old is not None and old.numel() == memory.nbytes:
                new = old
            elif old is not None:
                common = min(old.numel(), memory.nbytes)
                new[:common] = old[:common]
            now[memory.id] = new
        for blocks in delta.changed:
            _apply(now.get(blocks.id), blocks, delta.block_bytes)
        held, root = now, delta.root
    if not chain:
        raise IntegrityError("the chain is empty", code="tensors-chain")
    return chain[-1], held


def _apply(target: torch.Tensor | None, blocks: Blocks, width: int) -> None:
    at, size = 0, 0 if target is None else target.numel()
    for first, last in _runs(blocks.index):
        begin = first * width
        length = min((last + 1) * width, size) - begin
        if target is None or first < 0 or last * width >= size or at + length > blocks.data.numel():
            raise IntegrityError("a capture names blocks that are not there", code="tensors-damaged")
        target[begin : begin + length] = blocks.data[at : at + length]
        at += length


def _runs(index: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First and last of each run of numbers that follow one another."""
    first = 0
    for at in range(1, len(index) + 1):
        if at == len(index) or index[at] != index[at - 1] + 1:
            yield index[first], index[at - 1]
            first = at


def _fill(last: Delta, data: list[torch.Tensor], targets: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    pairs = []
    for t in last.tensors:
        target = targets.get(t.name)
        if target is None:
            raise SpecError(f"restore: there is no tensor {t.name} to put the captured one into", code="no-tensor")
        if tuple(target.shape) != t.shape or target.dtype != _dtype(t):
            have = f"{tuple(target.shape)} {str(target.dtype).removeprefix('torch.')}"
            raise SpecError(f"restore: tensor {t.name} is {have}, captured {t.shape} {t.dtype}", code="other-tensor")
        pairs.append((t, target))
    filled = set()
    with torch.no_grad():
        for t, target in pairs:
            home = find.storage_of(t.name, target)
            same = (target.storage_offset(), target.stride()) == (t.offset, t.stride)
            if same and home.nbytes() == data[t.memory].numel():
                if home._cdata not in filled:
                    filled.add(home._cdata)
                    find.as_bytes(home).copy_(data[t.memory])
                continue
            target.detach().copy_(_view(t, data[t.memory].untyped_storage()))
    return {t.name: target for t, target in pairs}


def _dtype(placed: Placed) -> torch.dtype:
    found = getattr(torch, placed.dtype, None)
    if not isinstance(found, torch.dtype):
        raise IntegrityError(
            f"tensor {placed.name} has no type that torch knows: {placed.dtype}", code="tensors-damaged"
        )
    return found


def _view(placed: Placed, home: torch.UntypedStorage) -> torch.Tensor:
    """The tensor at its place in `home`."""
    empty = torch.empty(0, dtype=_dtype(placed), device=home.device)
    tensor = empty.set_(home, placed.offset, placed.shape, placed.stride)
    if "c" in placed.view:
        tensor = tensor.conj()
    return torch._neg_view(tensor) if "n" in placed.view else tensor
