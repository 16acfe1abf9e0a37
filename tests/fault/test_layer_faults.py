"""Killed while snapshots come to share a large file, or it is sent and fetched: all that is there is whole."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from machine import A, B
from unit.test_layers import MODEL, WHEN, Sharing
from woodfrog import faults
from woodfrog.errors import StoreError
from woodfrog.snapshot.trust import public_text
from woodfrog.store.tiers import DirectoryTier

LINKED, KEPT = "layers.linked", "layers.kept"


@pytest.fixture(autouse=True)
def disarm() -> Iterator[None]:
    yield
    faults.configure("")


def killed(work: Callable[[], object], point: str) -> None:
    """Do something in a process that is killed at this point."""
    pid = os.fork()
    if pid == 0:
        faults.configure(f"{point}=sigkill-self")
        work()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL


def sound(home: Path, *snapshots: str) -> Sharing:
    """The machine as it is after a start: these snapshots, whole, and nothing else."""
    machine = Sharing(home)
    assert machine.catalogue.damaged == {}
    assert {p.name for p in machine.catalogue.root.iterdir()} == set(snapshots)
    for snapshot in snapshots:
        machine.catalogue.open_verified(snapshot)
        assert machine.at(snapshot, "fs/model").read_bytes() == MODEL
    assert machine.layers.verify() == []
    return machine


@pytest.mark.parametrize("point", [LINKED, KEPT, "commit.data", "commit.manifest"])
def test_killed_while_two_become_one(tmp_path: Path, point: str) -> None:
    home = tmp_path / "home"
    machine = Sharing(home)
    before = []
    if point != KEPT:
        machine.capture(A, ("fs/model", MODEL))
        before = [A]
    killed(lambda: machine.capture(B, ("fs/model", MODEL)), point)
    again = sound(home, *before)
    again.capture(B, ("fs/model", MODEL))
    again = sound(home, *before, B)
    for snapshot in (*before, B):
        again.catalogue.remove(snapshot)
    again.layers.collect()
    assert again.layers.stats().files == 0, "nothing stays behind"


def test_a_full_disk_costs_the_snapshot_and_no_other(tmp_path: Path) -> None:
    machine = Sharing(tmp_path / "home")
    machine.capture(A, ("fs/model", MODEL))
    faults.configure(f"{KEPT}=enospc*1")
    with pytest.raises(StoreError) as error:
        machine.capture(B, ("fs/model", MODEL), when=WHEN + 1)
    assert error.value.code == "disk-full" and os.strerror(errno.ENOSPC)
    machine.catalogue.open_verified(A)
    sound(tmp_path / "home", A)


def test_what_cannot_be_shared_before_it_is_mounted_stays_a_copy(tmp_path: Path) -> None:
    """Nobody is told: the capture goes on, and the commit finds what is wrong with the disk."""
    machine = Sharing(tmp_path / "home")
    machine.capture(A, ("fs/model", MODEL))
    faults.configure(f"{LINKED}=enospc*1")
    machine.capture(B, ("fs/model", MODEL))
    assert os.lstat(machine.at(B, "fs/model")).st_nlink == 1
    sound(tmp_path / "home", A, B)


@pytest.mark.parametrize("point", ["push.tree", "pull.tree", LINKED, KEPT])
def test_killed_on_its_way(tmp_path: Path, point: str) -> None:
    """Chunks without a snapshot are in nobody's way, and are not sent again."""
    here, tier = Sharing(tmp_path / "here"), DirectoryTier(tmp_path / "tier")
    here.capture(A, ("fs/model", MODEL))
    if point == "push.tree":
        killed(lambda: here.transport.push(A, tier), point)
    here.transport.push(A, tier)
    there = Sharing(tmp_path / "there")
    there.trust.add(public_text(here.signing))
    before = []
    if point == LINKED:
        there.capture(B, ("fs/model", MODEL))
        before = [B]
    if point != "push.tree":
        killed(lambda: there.transport.pull(A, tier), point)
    again = sound(tmp_path / "there", *before)
    again.transport.pull(A, tier)
    sound(tmp_path / "there", *before, A)
