"""A Merkle tree over signatures of blocks: states are compared by reading where they differ, and one root names all.

Parallel trees over device memory for checkpoints that store only what changed are from Tan et al., "Scalable
Incremental Checkpointing using GPU-Accelerated De-Duplication" (2023). Here the device makes the leaves, which is where
the data is read; the nodes are few (1/15 of the leaves) and made by the host, of BLAKE2b.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

__all__ = ["Tree"]

_ARITY = 16
_DIGEST = 32


class Tree:
    """A tree whose leaves are byte strings of one length. Not to be changed once made: `replace` makes another.

    Example:
        >>> a = Tree.build([b"1", b"2", b"3"])
        >>> b = a.replace({1: b"x"})
        >>> a.differences(b), a.root == b.root
        ([1], False)
    """

    def __init__(self, levels: tuple[tuple[bytes, ...], ...]) -> None:
        self._levels = levels
        self.reads = 0
        """Nodes and leaves that `differences` looked at so far."""

    @classmethod
    def build(cls, leaves: Iterable[bytes]) -> Tree:
        """The tree over `leaves`."""
        levels = [tuple(leaves)]
        while len(levels[-1]) > 1 or len(levels) == 1:
            below = levels[-1]
            levels.append(tuple(_node(below[i : i + _ARITY]) for i in range(0, max(1, len(below)), _ARITY)))
        return cls(tuple(levels))

    @property
    def root(self) -> bytes:
        """32 bytes that name all leaves, in order."""
        return hashlib.blake2b(
            len(self).to_bytes(8, "little") + self._levels[-1][0], digest_size=_DIGEST, person=b"woodfrog-root"
        ).digest()

    def __len__(self) -> int:
        return len(self._levels[0])

    def leaf(self, index: int) -> bytes:
        return self._levels[0][index]

    def replace(self, leaves: dict[int, bytes]) -> Tree:
        """The tree with other leaves at some places; only the nodes above them are made anew."""
        levels, changed = [], leaves
        for depth, level in enumerate(self._levels):
            row = list(level)
            for index, value in changed.items():
                row[index] = value
            levels.append(tuple(row))
            if depth + 1 < len(self._levels):
                parents = {index // _ARITY for index in changed}
                changed = {p: _node(row[p * _ARITY : (p + 1) * _ARITY]) for p in parents}
        return Tree(tuple(levels))

    def differences(self, other: Tree) -> list[int]:
        """Places whose leaves differ, ascending, also those that only one of them has. Reads only what differs."""
        if len(self._levels) != len(other._levels):
            common = min(len(self), len(other))
            self.reads += common
            differing = [i for i in range(common) if self.leaf(i) != other.leaf(i)]
            return differing + list(range(common, max(len(self), len(other))))
        places = [0]
        for depth in range(len(self._levels) - 1, -1, -1):
            mine, theirs = self._levels[depth], other._levels[depth]
            self.reads += len(places)
            places = [i for i in places if mine[i : i + 1] != theirs[i : i + 1]]
            if depth:
                width = max(len(self._levels[depth - 1]), len(other._levels[depth - 1]))
                places = [c for i in places for c in range(i * _ARITY, min((i + 1) * _ARITY, width))]
        return places


def _node(children: tuple[bytes, ...] | list[bytes]) -> bytes:
    return hashlib.blake2b(b"".join(children), digest_size=_DIGEST).digest()
