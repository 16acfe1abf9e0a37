"""Failures made on purpose, at named points, for tests: `WOODFROG_FAULTS=dump.criu=kill-criu,commit.data=enospc*1`.

Each entry is `point=action` or `point=action*N` (only the first N times). Points and actions are the two tables below;
nothing is looked up while none is set.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from dataclasses import dataclass

from woodfrog.errors import SpecError

__all__ = ["ACTIONS", "POINTS", "InjectedFault", "active", "configure", "fault", "kills_criu"]

POINTS: dict[str, str] = {
    "dump.before": "everything is bound and ready, CRIU not started",
    "dump.criu": "CRIU is dumping",
    "dump.after": "CRIU has dumped, the processes are dead",
    "restore.before": "everything is bound and ready, CRIU not started",
    "restore.criu": "CRIU is restoring",
    "restore.after": "CRIU has restored, the processes run",
    "capture.files": "memory is dumped, the sandbox's files are not yet stored",
    "commit.before": "all is stored, nothing is hashed",
    "commit.data": "data is durable, there is no manifest",
    "commit.manifest": "the manifest is written, the snapshot not visible",
    "layers.linked": "a large file of a layer has a second name in the layer, it has not taken its place yet",
    "layers.kept": "a large file of a layer has a name among those that are shared",
    "store.leased": "packs of the page store are leased, nothing is written",
    "store.written": "a new pack's pages are written, not durable",
    "store.durable": "a new pack is durable under temporary names",
    "store.pages": "a new raw pack is about to get its names in the index's transaction",
    "store.delta": "a new delta pack is about to get its names in the index's transaction",
    "store.names": "a new pack's data has its name, its names have not: it is not visible",
    "store.renamed": "a new pack is visible, the index does not have it",
    "store.entered": "the index has a new pack, none of its pages can be found",
    "store.listed": "a new pack's pages can be found, the index does not say so",
    "store.rebuilt": "a delta is rebuilt under a temporary name",
    "store.gc.marked": "packs are marked for removal, their files are there",
    "store.gc.unlinked": "a pack's names are removed, its data is not",
    "store.gc.removed": "a pack's files are removed, its mark is not",
    "pack.ingested": "memory is in the page store, the images are still loose",
    "pack.data": "the packed images are durable, nothing names them",
    "pack.signed": "two signatures: of the loose and of the packed form",
    "push.packs": "the packs are in the tier, nothing names them",
    "push.tree": "a file layer is packed and its large files are in the tier, nothing names them",
    "push.files": "all is in the tier but the manifest",
    "sweep.marked": "it is known what no snapshot in the tier needs, nothing is removed there",
    "sweep.removed": "one object is removed from the tier",
    "pull.packs": "the packs are in the store, there is no snapshot",
    "pull.tree": "a file layer is unpacked, others are not",
    "pull.files": "the files are unpacked, nothing is checked",
    "arrive.files": "all is unpacked and checked but the packs, none of which is here",
    "arrive.page": "some pages of a pack are here",
    "arrive.ready": "the working set is here, the snapshot may be thawed",
    "arrive.pack": "one of the packs is whole and in the store",
    "arrive.whole": "all packs are in the store, there is no snapshot",
    "admit.manifest": "the manifest is written, the snapshot not visible",
    "pack.manifest": "the manifest names the packed form, both signatures still there",
}

ACTIONS: dict[str, str] = {
    "raise": "an unexpected exception",
    "enospc": "the disk is full",
    "kill-criu": "CRIU is killed while it works (at dump.criu and restore.criu)",
    "sigkill-self": "the daemon itself is killed",
    "slow": "it takes two seconds longer",
}


class InjectedFault(RuntimeError):
    """The exception of the action `raise`: of no kind that any code expects."""


@dataclass
class _Armed:
    action: str
    left: int | None


_armed: dict[str, _Armed] = {}


def configure(text: str) -> None:
    """Arm the points of a `settings.faults` text; the empty text disarms all.

    Raises:
        SpecError: an unknown point or action.
    """
    armed: dict[str, _Armed] = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        point, _, rest = entry.partition("=")
        action, _, count = rest.partition("*")
        if point not in POINTS or action not in ACTIONS or (count and not count.isdigit()):
            raise SpecError(
                f"faults: {entry!r} is not point=action[*times]; points: {', '.join(POINTS)}; actions: "
                f"{', '.join(ACTIONS)}",
                code="bad-setting",
            )
        armed[point] = _Armed(action, int(count) if count else None)
    _armed.clear()
    _armed.update(armed)


def active(point: str) -> str | None:
    """The action armed at a point, counted as used; None when there is none."""
    if not _armed or (armed := _armed.get(point)) is None or armed.left == 0:
        return None
    if armed.left is not None:
        armed.left -= 1
    return armed.action


def fault(point: str) -> None:
    """Do what is armed at this point, if anything."""
    if not _armed:
        return
    match active(point):
        case "raise":
            raise InjectedFault(f"injected fault at {point}")
        case "enospc":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"(injected at {point})")
        case "sigkill-self":
            os.kill(os.getpid(), signal.SIGKILL)
        case "slow":
            time.sleep(2.0)


def kills_criu(point: str) -> bool:
    """Whether CRIU is to be killed at this point; any other action armed there is done here."""
    if not _armed or (armed := _armed.get(point)) is None:
        return False
    if armed.action == "kill-criu":
        return active(point) is not None
    fault(point)
    return False
