"""Signatures of blocks of memory, computed where the memory is, in integer matrix products.

A row of 4,096 bytes, taken as signed integers x, becomes 16 sums k·x, one for each of 16 columns of keys that were
drawn uniformly from -128…127. Two rows that differ in a byte have the same sum in one column for at most one of the
256 values of that byte's key, so in all 16 columns with probability 2⁻¹²⁸ at most. The sums are exact (below 2²⁶), so
every device and every way of multiplying gives the same. A block's rows are then taken as one row of bytes, and hashed
so once more with other keys: two different blocks have the same signature with probability 2⁻¹²⁷ at most, if their
contents do not depend on the keys. This is a universal hash, not a cryptographic one: who knows the keys can make
blocks that collide.

The products read memory once, as it is, and are what GPUs are fastest at. Multilinear hashing is Carter and Wegman's
("Universal classes of hash functions", 1979); hashing on the GPU to find the blocks that changed is after gMig (Liu et
al., TPDS 2019) and Tan et al., "Scalable Incremental Checkpointing using GPU-Accelerated De-Duplication", 2023.
"""

from __future__ import annotations

import hashlib

import torch

__all__ = ["LANES", "ROW", "SIGNATURE", "Hasher"]

ROW = 4096
LANES = 16
SIGNATURE = LANES * 4
"""Bytes of a block's signature."""
LARGEST = 1 << 23
"""A larger block's second sum could overflow 32 bits."""
_SLICE = 64 << 20
"""Memory hashed at a time, bytes: bounds what is needed beside it (1/64 of it, and a copy of a last, short block)."""
_FEW_ROWS = 17
"""The integer product on CUDA wants more rows than 16."""

_no_integers: set[torch.device] = set()


class Hasher:
    """Signatures of blocks of `block_bytes`, under one key.

    Args:
        key: 32 random bytes. The same key gives the same signatures in every process and on every device.
        block_bytes: a multiple of 4,096, up to 8 MiB.
    """

    def __init__(self, key: bytes, block_bytes: int) -> None:
        if block_bytes % ROW or not ROW <= block_bytes <= LARGEST:
            raise ValueError(f"block_bytes must be a multiple of {ROW} up to {LARGEST}, got {block_bytes}")
        self.block_bytes = block_bytes
        self._rows = block_bytes // ROW
        self._first = _keys(key, b"row", ROW)
        self._second = _keys(key, b"block", self._rows * SIGNATURE)
        self._on: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def signatures(self, data: torch.Tensor) -> torch.Tensor:
        """Signatures of a one-dimensional int8 tensor's blocks, one row of 16 int32 each, on its device.

        A last block that is not full is taken as if zeroes followed; its length is not in its signature.
        """
        first, second = self._keys_on(data.device)
        made = []
        per_slice = max(1, _SLICE // self.block_bytes) * self.block_bytes
        for at in range(0, data.numel(), per_slice):
            piece = data[at : at + per_slice]
            if short := -piece.numel() % self.block_bytes:
                full = piece.numel() // self.block_bytes * self.block_bytes
                if full:
                    made.append(self._blocks(piece[:full], first, second))
                piece = torch.cat((piece[full:], piece.new_zeros(short)))
            made.append(self._blocks(piece, first, second))
        return torch.cat(made) if made else torch.empty(0, LANES, dtype=torch.int32, device=data.device)

    def _blocks(self, data: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        rows = product(data.view(-1, ROW), first)
        return product(rows.view(torch.int8).view(-1, self._rows * SIGNATURE), second)

    def _keys_on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if device not in self._on:
            self._on[device] = (self._first.to(device), self._second.to(device))
        return self._on[device]


def _keys(key: bytes, purpose: bytes, rows: int) -> torch.Tensor:
    """`rows` × LANES keys from -128…127; one byte of a stream cipher's kind each."""
    stream = hashlib.shake_256(b"woodfrog tensors " + purpose + key).digest(rows * LANES)
    return torch.frombuffer(bytearray(stream), dtype=torch.int8).view(rows, LANES).clone()


def product(data: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """data @ keys, both int8, exactly, as int32."""
    if data.device.type == "cpu":
        return torch._int_mm(data, keys)
    if data.device.type != "cuda" or torch.version.hip is not None or data.device in _no_integers:
        return by_floats(data, keys)
    few = _FEW_ROWS - data.shape[0]
    padded = torch.cat((data, data.new_zeros(few, data.shape[1]))) if few > 0 else data
    try:
        return torch._int_mm(padded, keys)[: data.shape[0]]
    except RuntimeError:  # an older GPU; whatever else it is, it will show again
        _no_integers.add(data.device)
        return by_floats(data, keys)


def by_floats(data: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """The same for devices without an integer product: 32-bit floats hold sums of 512 such products exactly."""
    total = torch.zeros(data.shape[0], keys.shape[1], dtype=torch.int32, device=data.device)
    with torch._C._DisableAutocast():  # it would round the sums
        for at in range(0, data.shape[1], 512):
            total += (data[:, at : at + 512].float() @ keys[at : at + 512].float()).to(torch.int32)
    return total
