"""A tier that fails when it is told to: for tests of whatever is built on tiers."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from woodfrog.errors import StoreError
from woodfrog.store.tiers import Entry, Tier

Kind = Literal["unreachable", "denied", "missing", "hang", "lost-answer", "broken-off", "truncate", "alter", "raise"]


@dataclass
class Fault:
    """From the `at`-th matching operation on, `times` of them go wrong.

    Args:
        kind: `unreachable`, `denied`, `missing`: that error, and nothing was done. `hang`: as `unreachable`, but only
            after `FaultyTier.hang_s`. `lost-answer`: done, and then reported as unreachable. `broken-off`: the tier is
            gone in the middle of the transfer and stays away. `truncate`, `alter`: a read gives half of the bytes, or
            has one bit changed, and a write stores that, without an error. `raise`: an exception of no known kind.
        op: a method's name, or "*".
        at: 1 for the first matching operation.
        times: how often; -1 for ever.
        key: only keys that contain this.
    """

    kind: Kind
    op: str = "*"
    at: int = 1
    times: int = 1
    key: str = ""
    seen: int = 0

    def due(self, op: str, key: str) -> bool:
        if self.op not in ("*", op) or self.key not in key:
            return False
        self.seen += 1
        return self.seen >= self.at and (self.times < 0 or self.seen < self.at + self.times)


class FaultyTier:
    """`inner` with faults; without any it is as good as `inner`. `log` lists the operations: (method, key)."""

    def __init__(self, inner: Tier, *faults: Fault, hang_s: float = 0.2) -> None:
        self.inner = inner
        self.faults = list(faults)
        self.hang_s = hang_s
        self.log: list[tuple[str, str]] = []
        self.gone = False
        self.released = threading.Event()
        """Set it to end all hanging at once."""
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return self.inner.name

    def put(self, key: str, source: Path | bytes) -> None:
        kind = self._enter("put", key)
        if kind in ("truncate", "alter"):
            self.inner.put(key, _spoil(source.read_bytes() if isinstance(source, Path) else source, kind))
            return
        self.inner.put(key, source)
        self._leave(kind, key)

    def get(self, key: str, target: Path, most: int | None = None) -> None:
        kind = self._enter("get", key)
        self.inner.get(key, target, most)
        if kind in ("truncate", "alter"):
            target.write_bytes(_spoil(target.read_bytes(), kind))
        elif kind == "lost-answer":
            target.unlink()
        self._leave(kind, key)

    def get_bytes(self, key: str, begin: int = 0, end: int | None = None) -> bytes:
        kind = self._enter("get_bytes", key)
        data = self.inner.get_bytes(key, begin, end)
        self._leave(kind, key)
        return _spoil(data, kind) if kind in ("truncate", "alter") else data

    def has(self, key: str) -> bool:
        kind = self._enter("has", key)
        found = self.inner.has(key)
        self._leave(kind, key)
        return found

    def size(self, key: str) -> int:
        kind = self._enter("size", key)
        size = self.inner.size(key)
        self._leave(kind, key)
        return size

    def list(self, prefix: str = "") -> list[str]:
        kind = self._enter("list", prefix)
        keys = self.inner.list(prefix)
        self._leave(kind, prefix)
        return keys[: len(keys) // 2] if kind == "truncate" else keys

    def entries(self, prefix: str = "") -> Sequence[Entry]:
        kind = self._enter("list", prefix)
        found = self.inner.entries(prefix)
        self._leave(kind, prefix)
        return found[: len(found) // 2] if kind == "truncate" else found

    def delete(self, key: str) -> None:
        kind = self._enter("delete", key)
        self.inner.delete(key)
        self._leave(kind, key)

    def _enter(self, op: str, key: str) -> str | None:
        with self._lock:
            self.log.append((op, key))
            kind = next((fault.kind for fault in self.faults if fault.due(op, key)), None)
            if kind == "broken-off":
                self.gone = True
            gone = self.gone
        if kind == "hang":
            self.released.wait(self.hang_s)
        if gone or kind in ("unreachable", "hang"):
            raise self._unreachable(key)
        if kind == "denied":
            raise StoreError(
                f"{self.name}: {key}: access denied (injected)", code="tier-denied", tier=self.name, key=key
            )
        if kind == "missing":
            raise StoreError(f"{self.name}: there is no {key} (injected)", code="tier-missing", tier=self.name, key=key)
        if kind == "raise":
            raise RuntimeError(f"injected in {op} {key}")
        return kind

    def _leave(self, kind: str | None, key: str) -> None:
        if kind == "lost-answer":
            raise self._unreachable(key)

    def _unreachable(self, key: str) -> StoreError:
        return StoreError(
            f"{self.name}: {key}: no answer (injected)",
            code="tier-unreachable",
            retryable=True,
            tier=self.name,
            key=key,
        )


def _spoil(data: bytes, kind: str) -> bytes:
    if kind == "truncate":
        return data[: len(data) // 2]
    spoiled = bytearray(data)
    if spoiled:
        spoiled[len(spoiled) // 2] ^= 1
    return bytes(spoiled)
