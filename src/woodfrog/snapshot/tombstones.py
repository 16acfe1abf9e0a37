"""Tombstones: a snapshot was removed from a tier for all machines, and none that still has it is to bring it back.

    tombstones/<id>     a signature over the id, in hex

One is there before the first object of its snapshot goes, and outlives the last. While it is there, nobody sends the
snapshot or fetches it, whatever else of it is there. Who can write to the tier can put one there, as they could delete
the snapshot: one that no trusted key has signed denies the tier, and nothing here. What a trusted key has signed counts
for the copies on other machines, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from woodfrog.errors import IntegrityError, StoreError
from woodfrog.snapshot.manifest import SigningKey
from woodfrog.snapshot.trust import fingerprint, verify_any
from woodfrog.store.tiers import Entry, Tier

__all__ = ["KEEP_S", "TOMBSTONES", "Tombstone", "bury", "dig_up", "listed", "read"]

TOMBSTONES = "tombstones"
KEEP_S = 30 * 24 * 3600.0
"""So long one stays. A machine that has not looked at them for that long may have missed one."""
_ID = re.compile(r"[sz]-[0-9a-f]{12}\Z")
_MAX = 1024


@dataclass(frozen=True)
class Tombstone:
    snapshot: str
    signer: str
    """The fingerprint of the trusted key that removed it; "" = nobody that is known here."""


def _key(snapshot_id: str) -> str:
    return f"{TOMBSTONES}/{snapshot_id}"


def _words(snapshot_id: str) -> bytes:
    return f"woodfrog tombstone {snapshot_id}\n".encode()


def bury(tier: Tier, snapshot_id: str, signing: SigningKey) -> None:
    """Put one there, or renew it.

    Raises:
        StoreError: the tier fails.
    """
    tier.put(_key(snapshot_id), f"{signing.sign(_words(snapshot_id)).hex()}\n".encode())


def dig_up(tier: Tier, snapshot_id: str) -> None:
    """Take it away: the snapshot may be there again.

    Raises:
        StoreError: the tier fails.
    """
    tier.delete(_key(snapshot_id))


def read(tier: Tier, snapshot_id: str, known: Callable[[], Iterable[bytes]]) -> Tombstone | None:
    """That of a snapshot; None where there is none.

    Args:
        known: the public keys that are trusted; asked when there is one.

    Raises:
        StoreError: the tier fails.
    """
    try:
        data = tier.get_bytes(_key(snapshot_id), 0, _MAX)
    except StoreError as e:
        if e.code == "tier-missing":
            return None
        raise
    try:
        signer = verify_any(_words(snapshot_id), bytes.fromhex(data.decode()), known(), "")
    except (ValueError, IntegrityError):
        return Tombstone(snapshot_id, "")  # that it is there is enough to deny
    return Tombstone(snapshot_id, fingerprint(signer))


def listed(tier: Tier) -> dict[str, Entry]:
    """All that are in a tier, by snapshot.

    Raises:
        StoreError: the tier fails.
    """
    found = {entry.key.removeprefix(f"{TOMBSTONES}/"): entry for entry in tier.entries(TOMBSTONES)}
    return {name: entry for name, entry in found.items() if _ID.match(name)}
