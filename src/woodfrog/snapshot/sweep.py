"""Removes from a tier what no snapshot there needs: packs and chunks of snapshots that were removed, uploads that died.

Nobody counts references. All manifests are read, what they name is kept, and of the rest what is old goes:

- **Nothing that a manifest names.** One that cannot be read, or is signed by a key that is not trusted, ends the
  collection before anything is removed. So does a listing that cannot be right: a snapshot that the tier has when it is
  asked by name, or a pack that a manifest names, is not in it.
- **Nothing young** (`MIN_AGE_S`): it may be of an upload whose manifest is still to come, also of a version of woodfrog
  that does not say so.
- **Nothing while somebody sends.** An upload does not send what it finds there, however old that is, and names it
  later. So uploads and collections exclude one another (`store.leases`), on all machines. Several may collect at once:
  what one finds unnamed stays so until all of them are through.
- **Manifests are looked at again before each batch**, and what a new or changed one names stays.
- **A snapshot with a tombstone is none**, whatever is left of it: its removal was cut off. Its manifest is not read,
  and goes with the rest. The tombstone goes when it is old (`tombstones.KEEP_S`) and nothing else of its snapshot is
  there. Whoever has a copy has met it by then, or knows that it may have missed it.

A pack's names go first: whoever sends then takes the pack for missing, and sends all of it. A collection that is killed
leaves objects that the next one finds again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from woodfrog.errors import StoreError, WoodfrogError
from woodfrog.faults import fault
from woodfrog.snapshot.tombstones import KEEP_S, TOMBSTONES
from woodfrog.store.leases import LEASES, Lease, collecting
from woodfrog.store.tiers import Entry, Tier

__all__ = ["MIN_AGE_S", "Group", "Swept", "grouped", "sweep", "unneeded"]

MIN_AGE_S = 24 * 3600.0
_BATCH = 200
_PARALLEL = 8
_OBJECT = re.compile(
    r"(?P<pack>packs(-[0-9a-f]{16})?/[0-9a-f]{2}/[0-9a-f]{64})\.(names|pages|delta|frames)\Z"
    r"|(?P<chunk>chunks(-[0-9a-f]{16})?/[0-9a-f]{2}/[0-9a-f]{64})\Z"
    r"|snapshots/(?P<snapshot>[sz]-[0-9a-f]{12})/[a-z.-]+\Z"
    r"|by-key/[^/]+/[^/]+/(?P<pointer>[sz]-[0-9a-f]{12})\Z"
    rf"|(?P<tombstone>{TOMBSTONES}/[sz]-[0-9a-f]{{12}})\Z"
    rf"|(?P<lease>{LEASES}/[a-z]+/[0-9a-f]{{32}})\Z"
)


@dataclass(frozen=True)
class Group:
    """Objects that are only of use together.

    Args:
        name: of a pack or chunk without what follows it; `snapshots/<id>`, with what points to it.
        kind: "pack", "chunk", "snapshot", "tombstone" or "lease".
        entries: in the order in which they are removed.
    """

    name: str
    kind: str
    entries: tuple[Entry, ...]

    @property
    def modified(self) -> float:
        """When the youngest of it was put."""
        return max(entry.modified for entry in self.entries)

    @property
    def manifest(self) -> Entry | None:
        return next((e for e in self.entries if e.key == f"{self.name}/manifest.json"), None)

    @property
    def snapshot(self) -> str:
        """The group of the snapshot that a tombstone is of."""
        return self.name.replace(TOMBSTONES, "snapshots", 1)


@dataclass(frozen=True)
class Swept:
    """What a collection removed, or would."""

    packs: int
    chunks: int
    snapshots: int
    tombstones: int
    objects: int
    freed_bytes: int


def grouped(entries: Iterable[Entry]) -> dict[str, Group]:
    """What there is in a tier, by name. What is not woodfrog's is in none of it, and so never removed."""
    found: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        if (match := _OBJECT.match(entry.key)) is None:
            continue
        for kind, name in match.groupdict().items():
            if name is not None:
                name = f"snapshots/{name}" if kind in ("snapshot", "pointer") else name
                found.setdefault((name, "snapshot" if kind == "pointer" else kind), []).append(entry)
    return {
        name: Group(name, kind, tuple(sorted(mine, key=lambda e: (not _goes_first(e.key), e.key))))
        for (name, kind), mine in found.items()
    }


def _goes_first(key: str) -> bool:
    """Before the rest of its group."""
    return key.startswith("by-key/") or key.endswith((".names", "/manifest.json"))


def buried(groups: dict[str, Group]) -> set[str]:
    """The snapshots that have a tombstone."""
    return {group.snapshot for group in groups.values() if group.kind == "tombstone"}


def unneeded(groups: dict[str, Group], named: set[str], now: float, min_age_s: float) -> list[Group]:
    """What may go: not named, of no snapshot that has a manifest, and not young; snapshots before packs."""
    dead = buried(groups)

    def goes(group: Group) -> bool:
        if group.kind == "tombstone":
            return group.snapshot not in groups and now - group.modified >= max(KEEP_S, min_age_s)
        return (group.manifest is None or group.name in dead) and now - group.modified >= min_age_s

    gone = [group for name, group in groups.items() if name not in named and goes(group)]
    return sorted(gone, key=lambda group: (group.kind != "snapshot", group.name))


def sweep(
    tier: Tier,
    named_by: Callable[[str], set[str]],
    *,
    min_age_s: float = MIN_AGE_S,
    dry_run: bool = False,
    progress: Callable[[str, int, int], None] = lambda *_: None,
    go_on: Callable[[], None] = lambda: None,
) -> Swept:
    """Remove what no snapshot in a tier needs.

    Args:
        named_by: the names of all packs and chunks that a snapshot of the tier needs; raises when it cannot tell.
        min_age_s: what is younger stays. Only tests, and who knows that nobody uses the tier, may give less than a day.
        dry_run: only say what would go.
        go_on: raises when it is to be given up.

    Raises:
        StoreError: the tier fails or is busy (`tier-busy`), or something there cannot be read. What was removed until
            then was not needed.
    """
    with collecting(tier, go_on) as (lease, now):
        work = _Sweep(tier, named_by, lease, progress, go_on)
        gone = work.find(now, min_age_s)
        fault("sweep.marked")
        if not dry_run:
            gone = work.remove(gone)
    count = {kind: sum(group.kind == kind for group in gone) for kind in ("pack", "chunk", "snapshot", "tombstone")}
    entries = [entry for group in gone for entry in group.entries]
    return Swept(
        packs=count["pack"],
        chunks=count["chunk"],
        snapshots=count["snapshot"],
        tombstones=count["tombstone"],
        objects=len(entries),
        freed_bytes=sum(entry.size for entry in entries),
    )


class _Sweep:
    def __init__(
        self,
        tier: Tier,
        named_by: Callable[[str], set[str]],
        lease: Lease,
        progress: Callable[[str, int, int], None],
        go_on: Callable[[], None],
    ) -> None:
        self._tier, self._named_by, self._lease = tier, named_by, lease
        self._progress, self._go_on = progress, go_on
        self._read: dict[str, Entry] = {}
        """Manifests that were read, as they were listed then."""
        self._named: set[str] = set()
        self._buried: set[str] = set()

    def find(self, now: float, min_age_s: float) -> list[Group]:
        groups = grouped(self._tier.entries())
        self._buried = buried(groups)  # until the end: whoever takes one away is sending
        self._mark(groups)
        if absent := sorted(self._named - groups.keys()):
            raise self._stop(f"snapshots there need {absent[0]}, which is not in its listing")
        for group in groups.values():
            if group.kind == "snapshot" and group.manifest is None:
                self._insist_gone(group.name)
        return unneeded(groups, self._named, now, min_age_s)

    def _mark(self, groups: dict[str, Group]) -> None:
        """Read the manifests that were not read as they are."""
        found = {
            name: manifest
            for name, group in groups.items()
            if (manifest := group.manifest) is not None and name not in self._buried
        }
        todo = [(name, entry) for name, entry in sorted(found.items()) if self._read.get(name) != entry]

        def one(item: tuple[str, Entry]) -> set[str]:
            self._go_on()
            name = item[0].removeprefix("snapshots/")
            try:
                return self._named_by(name)
            except WoodfrogError as e:
                raise self._stop(f"snapshot {name} there cannot be read: {e.message}", e) from e

        with ThreadPoolExecutor(_PARALLEL, thread_name_prefix="sweep") as pool:
            for number, names in enumerate(pool.map(one, todo), 1):
                self._named |= names
                self._progress("snapshots", number, len(todo))
        self._read.update(todo)

    def _insist_gone(self, snapshot: str) -> None:
        """A listing may lack what is there: it is asked for by name."""
        if self._tier.has(f"{snapshot}/manifest.json"):
            raise self._stop(f"its listing lacks {snapshot}/manifest.json, which is there")

    def _stop(self, why: str, error: WoodfrogError | None = None) -> StoreError:
        return StoreError(
            f"nothing more is removed from {self._tier.name}: {why}",
            code=error.code if error else "tier-damaged",
            retryable=error.retryable if error else True,
            tier=self._tier.name,
        )

    def remove(self, groups: list[Group]) -> list[Group]:
        """Remove them, but what is needed by now; those that went."""
        gone: list[Group] = []
        with ThreadPoolExecutor(_PARALLEL, thread_name_prefix="sweep") as pool:
            for at in range(0, len(groups), _BATCH):
                self._mark(grouped(self._tier.entries("snapshots")))
                batch = [g for g in groups[at : at + _BATCH] if g.name not in self._named and g.name not in self._read]
                gone += pool.map(self._remove, batch)
                self._progress("objects", at + len(batch), len(groups))
        return gone

    def _remove(self, group: Group) -> Group:
        self._go_on()
        self._lease.check()
        if group.kind == "tombstone":
            self._insist_gone(group.snapshot)
        elif group.kind == "snapshot" and group.name not in self._buried:
            self._insist_gone(group.name)
        for entry in group.entries:
            self._tier.delete(entry.key)
            fault("sweep.removed")
        return group
