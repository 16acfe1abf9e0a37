"""What is in a tier, a row for each snapshot and each tombstone: manifests and signatures are read, and no memory.

Nothing there is trusted, and one that is damaged, or signed by nobody who is known, is a row that says so.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from woodfrog.errors import IntegrityError, SpecError, StoreError, WoodfrogError
from woodfrog.snapshot.manifest import Manifest, decode
from woodfrog.snapshot.sweep import Group, grouped
from woodfrog.snapshot.tombstones import Tombstone, listed
from woodfrog.snapshot.trust import TrustedKey, parse_public, verify_any
from woodfrog.store.tiers import Tier

__all__ = ["MANIFEST_MAX", "SIGNATURE_MAX", "SIGNER", "Lister"]

MANIFEST_MAX = 64 << 20
SIGNATURE_MAX = 4096
SIGNER = "signer"
_PARALLEL = 8
_TEXT = 200
_INCOMPLETE = "it has no manifest: it is on its way there, or what is left of it goes with `gc --tier`"


@dataclass(frozen=True)
class Lister:
    """Lists one tier.

    Args:
        small: the content of an object, plain, of no more than so many bytes.
        tombstone: that of a snapshot.
        keys: those that are trusted, this machine's among them.
        here: what this machine has of a snapshot; None where it does not.
        go_on: raises when it is to be given up.
    """

    tier: Tier
    small: Callable[[str, int], bytes]
    tombstone: Callable[[str], Tombstone | None]
    keys: tuple[TrustedKey, ...]
    here: Callable[[str], Manifest | None]
    go_on: Callable[[], None]

    def rows(self, progress: Callable[[str, int, int], None]) -> list[dict[str, Any]]:
        """All of them, the oldest first.

        Raises:
            StoreError: the tier cannot be asked.
        """
        removed = {snapshot: entry.modified for snapshot, entry in listed(self.tier).items()}
        groups = {
            name.removeprefix("snapshots/"): group
            for name, group in grouped(self.tier.entries("snapshots")).items()
            if group.kind == "snapshot"
        }
        ids = sorted(groups.keys() | removed.keys())

        def one(snapshot: str) -> dict[str, Any]:
            self.go_on()
            found = self._buried(snapshot) if snapshot in removed else self._row(snapshot, groups[snapshot])
            here = self.here(snapshot) is not None
            return {**_empty(snapshot), **found, "removed": removed.get(snapshot), "here": here}

        rows = []
        with ThreadPoolExecutor(_PARALLEL, thread_name_prefix="list") as pool:
            try:
                for number, row in enumerate(pool.map(one, ids), 1):
                    rows.append(row)
                    progress("snapshots", number, len(ids))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return sorted(rows, key=lambda row: (row["created"] or row["removed"] or 0.0, row["id"]))

    def _buried(self, snapshot: str) -> dict[str, Any]:
        """Of what was removed, this machine knows what it has of it."""
        stone, manifest = self.tombstone(snapshot), self.here(snapshot)
        signer = next((k for k in self.keys if stone is not None and k.fingerprint == stone.signer), None)
        row = _words(manifest) if manifest is not None else {}
        return row | _signed(signer, trusted=signer is not None) | {"state": "removed", "why": "for all machines"}

    def _row(self, snapshot: str, group: Group) -> dict[str, Any]:
        if group.manifest is None:
            return {"state": "incomplete", "why": _INCOMPLETE}
        try:
            data = self.small(f"{group.name}/manifest.json", MANIFEST_MAX)
            manifest = decode(data)
            if manifest.id != snapshot:
                raise IntegrityError(f"its manifest is of {manifest.id}")
            words = _words(manifest)
        except (WoodfrogError, ValueError, TypeError, ArithmeticError, RecursionError) as e:
            if isinstance(e, StoreError) and e.code in ("tier-unreachable", "stopping"):
                raise
            return {"state": "unreadable", "why": _clean(e.message if isinstance(e, WoodfrogError) else str(e))}
        signer, trusted = self._signer(group.name, data)
        state = {"state": "ready"} if trusted else {"state": "untrusted", "why": "no trusted key has signed it"}
        return words | _signed(signer, trusted=trusted) | state

    def _signer(self, name: str, data: bytes) -> tuple[TrustedKey | None, bool]:
        """Whose signature it has, where that can be told, and whether it is trusted."""
        try:
            signature = self.small(f"{name}/manifest.sig", SIGNATURE_MAX)
            for key in self.keys:
                if _verifies(data, signature, key):
                    return key, True
            hint = parse_public(self.small(f"{name}/{SIGNER}", SIGNATURE_MAX).decode())
            return (hint if _verifies(data, signature, hint) else None), False
        except (StoreError, IntegrityError, SpecError, UnicodeDecodeError) as e:
            if isinstance(e, StoreError) and e.code in ("tier-unreachable", "stopping"):
                raise
            return None, False


def _verifies(data: bytes, signature: bytes, key: TrustedKey) -> bool:
    try:
        verify_any(data, signature, (key.public,), "")
    except IntegrityError:
        return False
    return True


def _empty(snapshot: str) -> dict[str, Any]:
    names = ("why", "app", "function", "kind", "created", "memory_bytes", "files_bytes", "stored_bytes")
    return {"id": snapshot} | dict.fromkeys((*names, "function_key", "worker_class")) | _signed(None, trusted=False)


def _signed(key: TrustedKey | None, *, trusted: bool) -> dict[str, Any]:
    return {"signer": key and key.fingerprint, "signer_comment": key and key.comment, "trusted": trusted}


def _words(manifest: Manifest) -> dict[str, Any]:
    """What a manifest says, fit to be shown: whoever wrote it may have meant harm."""
    return {
        "app": _clean(manifest.app),
        "function": _clean(manifest.tag),
        "kind": _clean(manifest.kind),
        "created": manifest.created,
        "memory_bytes": _count(manifest.pages_bytes),
        "files_bytes": _count(manifest.fs_bytes),
        "stored_bytes": _count(manifest.stored_bytes if manifest.form == "packed" else manifest.pages_bytes),
        "function_key": _clean(manifest.function_key),
        "worker_class": _clean(manifest.worker_class),
    }


def _count(number: int) -> int:
    return min(max(number, 0), 1 << 62)


def _clean(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text).strip()[:_TEXT]
