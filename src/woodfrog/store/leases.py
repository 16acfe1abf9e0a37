"""Who sends to a tier, and who collects there: told by small objects that their holders renew while they live.

    leases/<kind>/<random>        kind: "sending" or "collecting"

Whoever sends finds objects that are in the tier already and names them in its manifest, which it writes last; whoever
collects removes objects that no manifest names. So the two must not overlap. Each says first what it is about to do,
and looks after that whether somebody does the other: of two, at least one sees the other. A collector then takes back
what it said, and whoever sends waits. This rests on one property of the tier: what was put is in a listing that begins
later (S3, Google Cloud Storage, Azure and local directories have it); whoever does not find itself there gives up.

Ages are those of the tier's own clock: the difference of two objects' times. A holder that died is one that has not
renewed its lease for `TTL_S`; one that could not renew it for half of that stops by itself (`Lease.check`).
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType

from woodfrog.errors import StoreError
from woodfrog.store.tiers import Tier

__all__ = ["LEASES", "TTL_S", "Lease", "collecting", "sending"]

LEASES = "leases"
TTL_S = 900.0
_RENEW_S = 120.0
_WAIT_S = 60.0
"""So long one waits for another that is at work."""
_LOOK_S = 0.5
_JOIN_S = 5.0


class Lease:
    """What somebody does in a tier, said there from the beginning of the block to its end."""

    def __init__(self, tier: Tier, kind: str) -> None:
        self._tier = tier
        self.key = f"{LEASES}/{kind}/{uuid.uuid4().hex}"
        self._renewed = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        self._renew()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._thread.join(_JOIN_S)
        with suppress(StoreError):  # it ends by itself
            self._tier.delete(self.key)

    def _renew(self) -> None:
        begin = time.monotonic()
        self._tier.put(self.key, b"")
        self._renewed = begin

    def _keep(self) -> None:
        while not self._over.wait(_RENEW_S):
            with suppress(StoreError):  # `check` tells
                self._renew()

    def check(self) -> None:
        """Raise unless others still see it for as long as the next step may take.

        Raises:
            StoreError: the tier was away for so long that they may not.
        """
        if time.monotonic() > self._renewed + TTL_S / 2:
            raise StoreError(
                f"{self._tier.name}: it was away for too long; try again", code="tier-unreachable", retryable=True
            )

    def look(self, kind: str) -> tuple[float, bool]:
        """The time by the tier's clock, as of the last renewal, and whether somebody alive does `kind`.

        Raises:
            StoreError: the tier fails, or does not list what was put.
        """
        found = {entry.key: entry.modified for entry in self._tier.entries(LEASES)}
        if self.key not in found:
            raise StoreError(
                f"{self._tier.name}: it does not list what was just put there; try again",
                code="tier-damaged",
                retryable=True,
            )
        now = found.pop(self.key)
        begin = f"{LEASES}/{kind}/"
        return now, any(key.startswith(begin) and now - modified < TTL_S for key, modified in found.items())


def _busy(tier: Tier, what: str) -> StoreError:
    return StoreError(f"{tier.name}: {what}; try again later", code="tier-busy", retryable=True, tier=tier.name)


@contextmanager
def sending(tier: Tier, go_on: Callable[[], None]) -> Iterator[Lease]:
    """While this machine sends: nobody collects. To be checked before the manifest is written.

    Args:
        go_on: raises when it is to be given up.

    Raises:
        StoreError: somebody collects for long (`tier-busy`), or the tier fails.
    """
    until = time.monotonic() + _WAIT_S
    with Lease(tier, "sending") as lease:
        while lease.look("collecting")[1]:
            if time.monotonic() > until:
                raise _busy(tier, "somebody removes what no snapshot there needs")
            go_on()
            time.sleep(_LOOK_S)
        yield lease


@contextmanager
def collecting(tier: Tier, go_on: Callable[[], None]) -> Iterator[tuple[Lease, float]]:
    """While this machine collects: nobody sends. The lease, to be checked before each removal, and the tier's time.

    Raises:
        StoreError: somebody sends for long (`tier-busy`), or the tier fails.
    """
    until = time.monotonic() + _WAIT_S
    while True:
        with Lease(tier, "collecting") as lease:
            now, busy = lease.look("sending")
            if not busy:
                yield lease, now
                return
        if time.monotonic() > until:
            raise _busy(tier, f"a snapshot is being sent there (one that died counts for {TTL_S / 60:.0f} minutes)")
        go_on()
        time.sleep(_LOOK_S)
