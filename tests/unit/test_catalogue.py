"""Snapshots on disk: found, verified, retired, removed; and every way of altering them noticed."""

from __future__ import annotations

import os
import random
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from woodfrog.errors import IntegrityError, NotFoundError, StoreError
from woodfrog.snapshot import catalogue as module
from woodfrog.snapshot.catalogue import PINNED, Catalogue, Staging
from woodfrog.snapshot.manifest import FORMAT, Manifest, SigningKey, encode


def draft(snapshot_id: str, *, key: str = "key", worker_class: str = "class", created: float = 1.0) -> Manifest:
    return Manifest(
        format=FORMAT,
        id=snapshot_id,
        function_key=key,
        worker_class=worker_class,
        host={},
        app="demo",
        tag="f",
        params_digest="",
        created=created,
        root_pid=100,
        tasks=1,
        pages_bytes=1,
        fs_bytes=0,
        files=(),
    )


def fill(staging: Staging) -> None:
    """Images, files, links, directories, odd names."""
    rng = random.Random(3)
    (staging.images / "pages-1.img").write_bytes(rng.randbytes(50_000))
    (staging.images / "core-100.img").write_bytes(rng.randbytes(500))
    (staging.images / "empty.img").write_bytes(b"")
    tmp = staging.fs / "tmp"
    tmp.mkdir()
    (tmp / "file").write_bytes(rng.randbytes(3000))
    (tmp / "file").chmod(0o644)
    (tmp / "link").symlink_to("file")
    (tmp / "na\udcffme é").write_bytes(b"odd")
    (tmp / "sub-a").write_bytes(b"sorts beside sub/")
    (tmp / "sub").mkdir()
    (tmp / "sub" / "x").write_bytes(b"x")
    os.mkfifo(tmp / "fifo")
    (staging.shm / "sem.x").write_bytes(b"shm")
    (staging.log / "dump.log").write_text("log")


def make(catalogue: Catalogue, snapshot_id: str = "s-1", **more: object) -> Manifest:
    staging = catalogue.begin(snapshot_id)
    fill(staging)
    return catalogue.commit(staging, draft(snapshot_id, **more))  # type: ignore[arg-type]


@pytest.fixture
def key(tmp_path: Path) -> SigningKey:
    return SigningKey.load_or_create(tmp_path / "key")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "snapshots"


def test_what_a_new_snapshot_makes_superfluous(root: Path, key: SigningKey) -> None:
    """Of the kernel before this one some stay; of those before that, none."""
    catalogue = Catalogue(root, key)

    def make(name: str, worker_class: str, **more: Any) -> None:
        created = 1.0 + len(catalogue.manifests())
        staging = catalogue.begin(name)
        catalogue.commit(staging, replace(draft(name, worker_class=worker_class, created=created), **more))

    for kernel in ("k1", "k2", "k3"):
        for number in range(3):
            make(f"s-{kernel}-{number}", kernel)
    make("s-other", "k1", tag="g")
    make("s-chip", "k1-chip", host={"gpu": "H100"})
    make("z-1", "k1", kind="zygote", app="", tag="(zygote)")
    catalogue.mark("s-k1-0", PINNED)

    def gone(keep: int = 2) -> set[str]:
        return {m.id for m in catalogue.superseded("s-k3-2", keep)}

    assert gone() == {"s-k1-1", "s-k1-2", "s-k2-0", "s-k3-0"}
    assert gone(9) == {"s-k1-1", "s-k1-2"}
    catalogue.used("s-k1-0")  # that kernel was booted once more
    assert gone() == {"s-k2-0", "s-k2-1", "s-k2-2", "s-k3-0"}
    assert {m.id for m in catalogue.superseded("s-chip", 1)} == set()
    catalogue.retire("s-k3-1", "invalidated")
    assert gone() == {"s-k2-0", "s-k2-1", "s-k2-2"}, "it is about to go, and counts no more"


def test_a_new_snapshot_is_not_superfluous_because_the_clock_was_set_back(root: Path, key: SigningKey) -> None:
    """Else it would be removed as soon as it is there, and every start be cold until the clock has caught up."""
    catalogue = Catalogue(root, key)
    for number in range(3):
        make(catalogue, f"s-{number}", key=f"v{number}", created=9000.0 + number)
    make(catalogue, "s-new", key="v3", created=1.0)
    assert [m.id for m in catalogue.superseded("s-new", 3)] == ["s-0"]


def test_unused_ones_are_told_by_when_they_were_thawed_last(root: Path, key: SigningKey) -> None:
    catalogue = Catalogue(root, key)
    for name in ("s-old", "s-pinned", "s-thawed"):
        make(catalogue, name, created=1.0)
    make(catalogue, "s-new", created=time.time())
    catalogue.mark("s-pinned", PINNED)
    catalogue.used("s-thawed")
    assert [m.id for m in catalogue.unused_since(time.time() - 60)] == ["s-old"]


def test_commit_find_open(root: Path, key: SigningKey) -> None:
    catalogue = Catalogue(root, key)
    assert catalogue.find("key", "class") is None
    staging = catalogue.begin("s-1")
    assert catalogue.manifests() == []  # invisible while in the making
    fill(staging)
    manifest = catalogue.commit(staging, draft("s-1"))
    assert manifest.fs_bytes == 3000 + 3 + len("sorts beside sub/") + 1 + 3
    for seen in (catalogue, Catalogue(root, key)):
        assert seen.find("key", "class") == manifest
        assert seen.find("key", "other class") is None and seen.find("other key", "class") is None
        assert seen.open_verified("s-1").manifest == manifest
        assert seen.get("s-") == manifest
        assert (seen.path("s-1") / "fs" / "tmp" / "link").read_bytes()
        assert seen.damaged == {}


def test_newest_usable_one_is_found(root: Path, key: SigningKey) -> None:
    catalogue = Catalogue(root, key)
    for number, created in ((1, 5.0), (2, 9.0), (3, 7.0)):
        make(catalogue, f"s-{number}", created=created)
    assert [m.id for m in catalogue.manifests()] == ["s-1", "s-3", "s-2"]
    for expected in ("s-2", "s-3", "s-1"):
        found = catalogue.find("key", "class")
        assert found is not None and found.id == expected
        catalogue.retire(expected, f"bad {expected}\nsecond line é")
    assert catalogue.find("key", "class") is None
    again = Catalogue(root, key)
    assert again.find("key", "class") is None
    assert "bad s-2" in (again.retired("s-2") or "")
    assert again.open_verified("s-2").manifest.id == "s-2"  # the mark is not an alteration
    with pytest.raises(NotFoundError):
        again.get("s-")
    with pytest.raises(NotFoundError):
        again.get("")
    catalogue.retire("never", "x")


def test_remove(root: Path, key: SigningKey) -> None:
    catalogue = Catalogue(root, key)
    make(catalogue)
    catalogue.remove("s-1")
    catalogue.remove("s-1")
    assert catalogue.manifests() == [] and list(root.iterdir()) == []
    with pytest.raises(IntegrityError):
        catalogue.open_verified("s-1")
    make(catalogue)
    assert catalogue.retired("s-1") is None


def test_abandoned_and_cut_off_work_is_swept(root: Path, key: SigningKey) -> None:
    catalogue = Catalogue(root, key)
    catalogue.abandon(catalogue.begin("s-1"))
    catalogue.abandon(Staging("s-0", root / ".staging-s-0"))
    assert list(root.iterdir()) == []
    fill(catalogue.begin("s-2"))
    make(catalogue, "s-3")
    os.rename(root / "s-3", root / ".removed-s-3")
    (root / ".stray").write_text("x")
    again = Catalogue(root, key)
    assert list(root.iterdir()) == [] and again.damaged == {}


def test_an_id_is_begun_once(root: Path, key: SigningKey) -> None:
    catalogue = Catalogue(root, key)
    staging = catalogue.begin("s-1")
    fill(staging)
    with pytest.raises(StoreError):
        catalogue.begin("s-1")
    catalogue.commit(staging, draft("s-1"))  # unharmed by the second
    second = catalogue.begin("s-1")
    with pytest.raises(StoreError):
        catalogue.commit(second, draft("s-1"))
    catalogue.abandon(second)
    assert catalogue.open_verified("s-1").manifest.files and not second.path.exists()


def flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    with open(path, "r+b") as f:  # same inode, same size
        f.write(data)


def test_every_flipped_bit_is_noticed(root: Path, key: SigningKey) -> None:
    """Warm (verified before) and cold, with size and times put back."""
    catalogue = Catalogue(root, key)
    make(catalogue)
    folder = root / "s-1"
    targets = [p for p in folder.rglob("*") if p.is_file() and not p.is_symlink() and p.stat().st_size]
    targets = [p for p in targets if p.parent.name != "log"]
    assert len(targets) >= 7
    rng = random.Random(11)
    for number in range(200):
        path = targets[number % len(targets)]
        original, before = path.read_bytes(), path.stat()
        catalogue.open_verified("s-1")
        flip(path, rng)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        after = path.stat()
        assert (after.st_ino, after.st_size, after.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)
        for seen in (catalogue, Catalogue(root, key) if number % 10 == 0 else catalogue):
            with pytest.raises(IntegrityError):
                seen.open_verified("s-1")
        with open(path, "r+b") as f:
            f.write(original)
    assert catalogue.open_verified("s-1").manifest.id == "s-1"


def replace_by_link(folder: Path) -> None:
    shutil.copy(folder / "fs/tmp/file", folder.parent.parent / "copy")
    (folder / "fs/tmp/file").unlink()
    (folder / "fs/tmp/file").symlink_to(folder.parent.parent / "copy")


def replace_part_by_link(folder: Path) -> None:
    os.rename(folder / "fs", folder.parent.parent / "fs-elsewhere")
    (folder / "fs").symlink_to(folder.parent.parent / "fs-elsewhere")


def retarget(folder: Path) -> None:
    (folder / "fs/tmp/link").unlink()
    (folder / "fs/tmp/link").symlink_to("/etc/shadow")


ALTERATIONS: dict[str, Callable[[Path], object]] = {
    "truncated": lambda f: os.truncate(f / "img/pages-1.img", 49_999),
    "emptied": lambda f: os.truncate(f / "img/core-100.img", 0),
    "extended": lambda f: os.truncate(f / "img/pages-1.img", 50_001),
    "file added to img": lambda f: (f / "img/extra.img").write_bytes(b"x"),
    "empty file added to fs": lambda f: (f / "fs/tmp/.hidden").touch(),
    "directory added": lambda f: (f / "fs/new").mkdir(),
    "link added": lambda f: (f / "shm/new").symlink_to("x"),
    "file removed": lambda f: (f / "shm/sem.x").unlink(),
    "directory removed": lambda f: shutil.rmtree(f / "fs/tmp/sub"),
    "part removed": lambda f: shutil.rmtree(f / "shm"),
    "file renamed": lambda f: (f / "fs/tmp/sub-a").rename(f / "fs/tmp/sub-b"),
    "files swapped": lambda f: (
        (f / "fs/tmp/sub-a").rename(f / "fs/t"),
        (f / "fs/tmp/sub/x").rename(f / "fs/tmp/sub-a"),
        (f / "fs/t").rename(f / "fs/tmp/sub/x"),
    ),
    "link retargeted": retarget,
    "file replaced by a link": replace_by_link,
    "part replaced by a link": replace_part_by_link,
    "fifo replaced by a file": lambda f: ((f / "fs/tmp/fifo").unlink(), (f / "fs/tmp/fifo").touch()),
    "directory's mode": lambda f: (f / "fs/tmp/sub").chmod(0o777),
    "part's mode": lambda f: (f / "fs").chmod(0o777),
    "file's mode": lambda f: (f / "fs/tmp/file").chmod(0o4755),
    "manifest removed": lambda f: (f / "manifest.json").unlink(),
    "signature removed": lambda f: (f / "manifest.sig").unlink(),
    "signature emptied": lambda f: os.truncate(f / "manifest.sig", 0),
    "manifest is a directory": lambda f: ((f / "manifest.json").unlink(), (f / "manifest.json").mkdir()),
    "space appended to the manifest": lambda f: (f / "manifest.json").write_bytes(
        (f / "manifest.json").read_bytes() + b" "
    ),
}


@pytest.mark.parametrize("name", ALTERATIONS)
def test_alterations_are_noticed(root: Path, key: SigningKey, name: str) -> None:
    catalogue = Catalogue(root, key)
    make(catalogue)
    catalogue.open_verified("s-1")
    ALTERATIONS[name](root / "s-1")
    for seen in (catalogue, Catalogue(root, key)):
        with pytest.raises(IntegrityError) as caught:
            seen.open_verified("s-1")
        assert "s-1" in caught.value.message and "\n" not in caught.value.message


@pytest.mark.root
def test_changed_owner_and_attributes_are_noticed(root: Path, key: SigningKey) -> None:
    catalogue = Catalogue(root, key)
    make(catalogue)
    os.chown(root / "s-1/fs/tmp/file", 1, 1)
    with pytest.raises(IntegrityError, match="fs/tmp/file"):
        catalogue.open_verified("s-1")
    os.chown(root / "s-1/fs/tmp/file", 0, 0)
    catalogue.open_verified("s-1")
    # An overlay reads this as "nothing below this directory counts".
    os.setxattr(root / "s-1/fs/tmp", "trusted.overlay.opaque", b"y")
    with pytest.raises(IntegrityError, match="fs/tmp"):
        catalogue.open_verified("s-1")


def test_signed_by_another_key(root: Path, key: SigningKey, tmp_path: Path) -> None:
    catalogue = Catalogue(root, key)
    manifest = make(catalogue)
    other = SigningKey.load_or_create(tmp_path / "other")
    assert "signature" in Catalogue(root, other).damaged["s-1"]
    forged = replace(manifest, root_pid=1)
    (root / "s-1/manifest.json").write_bytes(encode(forged))
    (root / "s-1/manifest.sig").write_bytes(other.sign(encode(forged)))
    with pytest.raises(IntegrityError, match="signature"):
        catalogue.open_verified("s-1")


def test_renamed_directory_is_not_another_snapshot(root: Path, key: SigningKey) -> None:
    catalogue = Catalogue(root, key)
    make(catalogue)
    os.rename(root / "s-1", root / "s-2")
    again = Catalogue(root, key)
    assert again.manifests() == [] and "its manifest is of s-1" in again.damaged["s-2"]
    for seen in (catalogue, again):
        for name in ("s-1", "s-2"):
            with pytest.raises(IntegrityError):
                seen.open_verified(name)
    again.remove("s-2")
    assert again.damaged == {} and list(root.iterdir()) == []


def test_foreign_things_in_the_directory_do_no_harm(root: Path, key: SigningKey) -> None:
    make(Catalogue(root, key))
    (root / "README").write_text("x")
    (root / "lost+found").mkdir()
    again = Catalogue(root, key)
    assert set(again.damaged) == {"README", "lost+found"} and [m.id for m in again.manifests()] == ["s-1"]


def test_verified_files_are_read_once(root: Path, key: SigningKey, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stamp spares reading; any write takes it back."""
    catalogue = Catalogue(root, key)
    make(catalogue)
    read: list[Path] = []
    real = module.sha256_file
    monkeypatch.setattr(module, "sha256_file", lambda path: read.append(path) or real(path))
    catalogue.open_verified("s-1")
    assert read == []
    again = Catalogue(root, key)
    again.open_verified("s-1")
    assert len(read) == 8
    again.open_verified("s-1")
    assert len(read) == 8
    path = root / "s-1/fs/tmp/file"
    os.utime(path)  # nothing but a new time
    again.open_verified("s-1")
    assert len(read) == 16
    shutil.copy2(path, path.with_name("copy"))
    os.replace(path.with_name("copy"), path)  # same content and mtime, another inode
    again.open_verified("s-1")
    assert len(read) == 24


def test_a_change_during_the_commit_is_not_taken_for_verified(
    root: Path, key: SigningKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue = Catalogue(root, key)
    staging = catalogue.begin("s-1")
    fill(staging)
    real = module.fsync_tree

    def late_write(path: Path) -> None:
        flip(staging.images / "pages-1.img", random.Random(1))
        real(path)

    monkeypatch.setattr(module, "fsync_tree", late_write)
    catalogue.commit(staging, draft("s-1"))
    with pytest.raises(IntegrityError, match=r"pages-1\.img"):
        catalogue.open_verified("s-1")


def test_looking_while_others_commit_and_remove(root: Path, key: SigningKey) -> None:
    """The daemon's loop looks; threads commit and remove."""
    catalogue = Catalogue(root, key)
    stop = threading.Event()
    failures: list[BaseException] = []

    def churn(prefix: str) -> None:
        for number in range(15):
            name = f"s-{prefix}{number}"
            staging = catalogue.begin(name)
            (staging.images / "x").write_bytes(b"x")
            catalogue.commit(staging, draft(name))
            catalogue.open_verified(name)
            if number % 2:
                catalogue.remove(name)

    def look() -> None:
        try:
            while not stop.is_set():
                catalogue.find("key", "class")
                catalogue.manifests()
                catalogue.by_use()
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=churn, args=(p,)) for p in "ab"]
    looker = threading.Thread(target=look)
    looker.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    looker.join()
    assert failures == [] and len(catalogue.manifests()) == 16


@pytest.mark.parametrize("name", ["..", "\0", "s-\n", "x" * 5000, "../keys/ed25519", ""])
def test_names_that_no_failure_can_have(root: Path, key: SigningKey, name: str) -> None:
    assert Catalogue(root, key).failure(name) is None
