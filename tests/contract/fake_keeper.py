"""A keeper that does nothing but remember, and twins of its work that fail or take their time to order."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

from woodfrog.backends.base import Progress
from woodfrog.errors import IntegrityError, NotFoundError, StoreError
from woodfrog.snapshot.catalogue import PINNED, PUSHED, Catalogue

__all__ = ["FakeKeeper"]


class FakeKeeper:
    """Keeps marks in the catalogue; an "exported" file is the snapshot's id.

    `fails`: the next piece of work raises it. `gate`: work waits for it after it has told of its progress.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        self.fails: Exception | None = None
        self.gate: asyncio.Event | None = None
        self.trusted: dict[str, str] = {}
        self.in_tier: set[str] = set()
        self.removed: set[str] = set()

    def using(self, snapshot_id: str) -> contextlib.AbstractAsyncContextManager[Any]:
        return contextlib.nullcontext()

    async def _work(self, progress: Progress) -> None:
        progress("packs", 1, 4)
        if self.gate is not None:
            await self.gate.wait()
        if self.fails is not None:
            error, self.fails = self.fails, None
            raise error

    async def verify(self, snapshot_id: str | None, progress: Progress) -> dict[str, Any]:
        await self._work(progress)
        snapshots = []
        for manifest in self.catalogue.manifests() if snapshot_id is None else [self.catalogue.get(snapshot_id)]:
            problems = []
            try:
                self.catalogue.open_verified(manifest.id)
            except IntegrityError as e:
                problems.append(e.message)
            snapshots.append({"id": manifest.id, "bytes": manifest.pages_bytes, "problems": problems})
        return {"snapshots": snapshots, "store": []}

    async def gc(self, *, dry_run: bool, rebuilt: bool, progress: Progress) -> dict[str, Any]:
        await self._work(progress)
        return {"packs": 2, "freed_bytes": 8192, "rebuilt_bytes": 4096 * rebuilt}

    async def gc_tier(self, *, dry_run: bool, progress: Progress) -> dict[str, Any]:
        await self._work(progress)
        found = {"packs": 2, "chunks": 1, "snapshots": 0, "tombstones": 0, "objects": 7, "freed_bytes": 8192}
        return {"tier": "fake", **found, "objects": 0 if dry_run else 7}

    async def pin(self, snapshot_id: str) -> dict[str, Any]:
        self.catalogue.mark(snapshot_id, PINNED)
        return {"id": snapshot_id, "pinned": True}

    async def unpin(self, snapshot_id: str) -> dict[str, Any]:
        self.catalogue.unmark(snapshot_id, PINNED)
        return {"id": snapshot_id, "pinned": False}

    async def export(self, snapshot_id: str, target: Path, progress: Progress) -> dict[str, Any]:
        target.write_text(snapshot_id)
        await self._work(progress)
        return {"id": snapshot_id, "bytes": target.stat().st_size}

    async def import_(self, source: Path, progress: Progress) -> dict[str, Any]:
        await self._work(progress)
        manifest = self.catalogue.get(source.read_text())
        return {"id": manifest.id, "app": manifest.app, "function": manifest.tag, "new": False}

    async def push(self, snapshot_id: str, progress: Progress, *, anyway: bool = False) -> dict[str, Any]:
        await self._work(progress)
        if snapshot_id in self.removed and not anyway:
            raise StoreError(f"snapshot {snapshot_id} was removed from fake for all machines", code="tier-removed")
        self.removed.discard(snapshot_id)
        self.in_tier.add(snapshot_id)
        self.catalogue.mark(snapshot_id, PUSHED)
        return {"id": snapshot_id, "tier": "fake"}

    async def pull(self, snapshot_id: str, progress: Progress) -> dict[str, Any]:
        await self._work(progress)
        if snapshot_id not in self.in_tier:
            raise NotFoundError(f"no snapshot {snapshot_id} in fake", snapshot=snapshot_id)
        manifest = self.catalogue.get(snapshot_id)
        return {"id": manifest.id, "app": manifest.app, "function": manifest.tag, "new": False, "tier": "fake"}

    async def tier(self) -> dict[str, Any]:
        return {"tier": "fake"}

    async def list_tier(self, progress: Progress) -> dict[str, Any]:
        await self._work(progress)
        rows = [{"id": i, "state": "ready"} for i in self.in_tier] + [
            {"id": i, "state": "removed"} for i in self.removed
        ]
        return {"tier": "fake", "snapshots": sorted(rows, key=lambda row: row["id"])}

    async def withdraw(self, snapshot_id: str) -> dict[str, Any]:
        if self.fails is not None:
            error, self.fails = self.fails, None
            raise error
        found = snapshot_id in self.in_tier
        self.in_tier.discard(snapshot_id)
        self.removed.add(snapshot_id)
        return {"id": snapshot_id, "tier": "fake", "found": found}

    async def trust_add(self, text: str, comment: str) -> dict[str, Any]:
        fingerprint = text.split()[0]
        self.trusted[fingerprint] = comment
        return {"fingerprint": fingerprint, "comment": comment}

    async def trust_list(self) -> dict[str, Any]:
        keys = [{"fingerprint": f, "comment": c} for f, c in self.trusted.items()]
        return {"own": {"fingerprint": "0" * 24, "text": "AAAA host"}, "trusted": keys}

    async def trust_remove(self, fingerprint: str) -> dict[str, Any]:
        if fingerprint not in self.trusted:
            raise NotFoundError(f"no trusted key {fingerprint}")
        return {"fingerprint": fingerprint, "comment": self.trusted.pop(fingerprint)}

    async def store_stats(self) -> dict[str, Any]:
        if self.fails is not None:
            raise StoreError("the store cannot be read")
        rows = [
            {
                "id": m.id,
                "kind": m.kind,
                "app": m.app,
                "function": m.tag,
                "parent": m.parent,
                "form": m.form,
                "raw_bytes": m.pages_bytes,
                "stored_bytes": m.stored_bytes,
                "fs_bytes": m.fs_bytes,
                "pinned": self.catalogue.marked(m.id, PINNED),
                "pushed": self.catalogue.marked(m.id, PUSHED),
            }
            for m in self.catalogue.manifests()
        ]
        return {
            "packs": 0,
            "pages": 0,
            "raw_bytes": 0,
            "stored_bytes": 0,
            "cache_bytes": 0,
            "budget_bytes": 0,
            "tier": "",
            "snapshots": rows,
        }
