"""Commits that break off: by an error, a full disk, or the daemon being killed. Nothing half-made is ever seen."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from woodfrog import faults
from woodfrog.errors import StoreError
from woodfrog.snapshot.catalogue import Catalogue
from woodfrog.snapshot.manifest import FORMAT, Manifest, SigningKey
from woodfrog.store import files

POINTS = ("commit.before", "commit.data", "commit.manifest")


def draft(snapshot_id: str) -> Manifest:
    return Manifest(FORMAT, snapshot_id, "key", "class", {}, "demo", "f", "", 1.0, 100, 1, 1, 0, ())


def commit(catalogue: Catalogue, snapshot_id: str) -> Manifest:
    staging = catalogue.begin(snapshot_id)
    (staging.images / "pages-1.img").write_bytes(os.urandom(200_000))
    (staging.fs / "tmp").mkdir()
    (staging.fs / "tmp" / "file").write_bytes(b"file")
    return catalogue.commit(staging, draft(snapshot_id))


@pytest.fixture(autouse=True)
def disarm() -> Iterator[None]:
    yield
    faults.configure("")


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    return Catalogue(tmp_path / "snapshots", SigningKey.load_or_create(tmp_path / "key"))


def seen_after_reopening(tmp_path: Path) -> list[str]:
    again = Catalogue(tmp_path / "snapshots", SigningKey.load_or_create(tmp_path / "key"))
    assert again.damaged == {}
    assert {p.name for p in again.root.iterdir()} == {m.id for m in again.manifests()}
    for manifest in again.manifests():
        again.open_verified(manifest.id)
    return sorted(m.id for m in again.manifests())


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize(("action", "error"), [("raise", faults.InjectedFault), ("enospc", StoreError)])
def test_a_failed_commit_leaves_nothing(
    tmp_path: Path, catalogue: Catalogue, point: str, action: str, error: type[Exception]
) -> None:
    commit(catalogue, "s-old")
    faults.configure(f"{point}={action}*1")
    with pytest.raises(error):
        commit(catalogue, "s-new")
    assert [m.id for m in catalogue.manifests()] == ["s-old"]
    # A sandbox may rest on the staging directory: it is for the caller to abandon.
    assert {p.name for p in catalogue.root.iterdir()} == {"s-old", ".staging-s-new"}
    assert seen_after_reopening(tmp_path) == ["s-old"]
    commit(catalogue, "s-new")
    assert seen_after_reopening(tmp_path) == ["s-new", "s-old"]


@pytest.mark.parametrize("point", POINTS)
def test_a_daemon_killed_in_a_commit_leaves_nothing_visible(tmp_path: Path, catalogue: Catalogue, point: str) -> None:
    commit(catalogue, "s-old")
    pid = os.fork()
    if pid == 0:
        faults.configure(f"{point}=sigkill-self")
        commit(catalogue, "s-new")
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert {p.name for p in catalogue.root.iterdir()} == {"s-old", ".staging-s-new"}
    assert seen_after_reopening(tmp_path) == ["s-old"]


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
from test_catalogue_faults import *
catalogue = Catalogue(Path({root!r}), SigningKey.load_or_create(Path({key!r})))
print("ready", flush=True)
for number in range(1000):
    commit(catalogue, f"s-{{number:04}}")
    print(f"s-{{number:04}}", flush=True)
    if number > 1:
        catalogue.remove(f"s-{{number - 2:04}}")
"""


@pytest.mark.parametrize("delay", [0.01, 0.037, 0.05, 0.08])
def test_killed_at_any_moment(tmp_path: Path, delay: float) -> None:
    """Whatever the moment: each acknowledged snapshot that was not removed is whole, and nothing else is there."""
    code = CHILD.format(here=str(Path(__file__).parent), root=str(tmp_path / "snapshots"), key=str(tmp_path / "key"))
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    try:
        child.wait(delay)
    except subprocess.TimeoutExpired:
        child.kill()
    acknowledged = child.stdout.read().split()
    child.wait()
    seen = seen_after_reopening(tmp_path)
    if acknowledged:
        assert acknowledged[-1] in seen
    assert len(seen) <= 4


def test_a_failing_clean_up_does_not_hide_the_failure(
    tmp_path: Path, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults.configure("commit.data=enospc")

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", refuse)
        with pytest.raises(StoreError, match="no space left"):
            commit(catalogue, "s-1")
    assert catalogue.manifests() == []
    assert seen_after_reopening(tmp_path) == []


def test_what_cannot_be_swept_does_not_stop_the_daemon(
    tmp_path: Path, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(catalogue, "s-1")
    catalogue.begin("s-2")

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(files.shutil, "rmtree", refuse)
    again = Catalogue(catalogue.root, SigningKey.load_or_create(tmp_path / "key"))
    assert [m.id for m in again.manifests()] == ["s-1"] and list(again.damaged) == [".staging-s-2"]


def test_a_full_disk_when_retiring_still_retires(catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(catalogue, "s-1")

    def refuse(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", refuse)
    catalogue.retire("s-1", "bad")
    assert catalogue.find("key", "class") is None and catalogue.retired("s-1")
