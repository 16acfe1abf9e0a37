"""Large files of file layers: kept once here, sent once to a tier, and what they were wherever they come back."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contract.faulty_tier import FaultyTier
from machine import A, B, C, Machine
from woodfrog.errors import IntegrityError, StoreError
from woodfrog.snapshot import catalogue as catalogue_module
from woodfrog.snapshot.catalogue import Catalogue, Staging
from woodfrog.snapshot.manifest import FORMAT, Manifest
from woodfrog.snapshot.transport import Transport
from woodfrog.snapshot.trust import public_text
from woodfrog.store import layers as layers_module
from woodfrog.store.bundle import pack_tree, unpack_tree
from woodfrog.store.chunks import CHUNK, LARGE, Chunks, Large
from woodfrog.store.cold import Key
from woodfrog.store.folder import stamp_of
from woodfrog.store.layers import LayerFiles
from woodfrog.store.tiers import DirectoryTier, MemoryTier

D = "s-00000000000d"
MIB = 1 << 20
WHEN = 1_700_000_000_123_456_789
MODEL = random.Random(8).randbytes(9 * MIB + 77)


def draft(snapshot: str) -> Manifest:
    return Manifest(FORMAT, snapshot, "key", "class", {}, "demo", "f", "", 1.0, 1, 1, 0, 0, ())


class Sharing(Machine):
    """A machine whose snapshots share large files."""

    def __init__(self, home: Path, key: Key | None = None) -> None:
        super().__init__(home, key)
        self.key = key
        self.reopen()

    def reopen(self) -> None:
        """As after a start of the daemon."""
        self.layers = LayerFiles(self.store.root / "layers")
        root = self.catalogue.root
        self.catalogue = Catalogue(root, self.signing, self.store, self.layers)
        moving = self.store.root / "moving"
        self.transport = Transport(self.catalogue, self.store, self.signing, self.trust, moving, self.key)

    def capture(self, snapshot: str, *files: tuple[str, bytes], when: int = WHEN, mode: int = 0o640) -> Manifest:
        return self.catalogue.commit(self.stage(snapshot, *files, when=when, mode=mode), draft(snapshot))

    def stage(self, snapshot: str, *files: tuple[str, bytes], when: int = WHEN, mode: int = 0o640) -> Staging:
        """As it is when a sandbox mounts it."""
        staging = self.catalogue.begin(snapshot)
        (staging.images / "core-1.img").write_bytes(b"core")
        for name, data in files:
            path = staging.path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            path.chmod(mode)
            os.utime(path, ns=(when, when))
        self.catalogue.share_captured(staging)
        return staging

    def at(self, snapshot: str, name: str) -> Path:
        return self.catalogue.path(snapshot) / name


@pytest.fixture
def here(tmp_path: Path) -> Sharing:
    return Sharing(tmp_path / "here")


def inode(path: Path) -> int:
    return os.lstat(path).st_ino


def test_one_that_comes_from_a_tier_shares_before_it_is_mounted(
    here: Sharing, tmp_path: Path, tier: DirectoryTier
) -> None:
    """Names below an overlay do not change after that; and a file that came is here for the next attempt."""
    here.capture(A, ("fs/model", MODEL), ("fs/model-2", MODEL), ("fs/own", MODEL[::-1]))
    here.transport.push(A, tier)
    there = Sharing(tmp_path / "there")
    there.trust.add(public_text(here.signing))
    there.capture(B, ("fs/other", MODEL))
    faulty = FaultyTier(tier)
    arrival = there.transport.arrive(A, faulty)
    layer = arrival.opened().path / "fs"
    before = {name: inode(layer / name) for name in ("model", "model-2", "own")}
    assert before["model"] == inode(there.at(B, "fs/other")) != before["model-2"]
    assert there.layers.verify() == []
    arrival.rest()
    arrival.finish()
    assert {name: inode(there.at(A, f"fs/{name}")) for name in before} == before
    there.catalogue.open_verified(A)

    there.catalogue.remove(A)
    there.layers.collect()
    there.transport.arrive(A, faulty)
    there.reopen()  # killed: the staging directory is swept, what came of large files is not
    asked = len(faulty.log)
    arrival = there.transport.arrive(A, faulty)
    assert not [key for _, key in faulty.log[asked:] if key.startswith("chunks")]
    arrival.rest()
    arrival.finish()
    assert there.at(A, "fs/own").read_bytes() == MODEL[::-1]
    there.catalogue.open_verified(A)
    assert there.layers.verify() == []


# On this machine


def test_a_commit_changes_nothing_in_a_layer(here: Sharing, tmp_path: Path) -> None:
    """Its sandbox runs on it already. What became equal to another's only after it was mounted stays a copy."""
    staging = here.stage(A, ("fs/model", MODEL))
    here.capture(B, ("fs/other", MODEL))
    with overlay(staging.fs, tmp_path) as seen:
        before = inode(seen / "model")
        with open(seen / "model", "rb") as f:
            here.catalogue.commit(staging, draft(A))
            info = os.lstat(seen / "model")
            assert info.st_ino == os.fstat(f.fileno()).st_ino == before and info.st_nlink > 0
            assert f.read() == MODEL
        here.capture(C, ("fs/third", MODEL))
        assert inode(seen / "model") == before and os.lstat(seen / "model").st_nlink > 0
    assert inode(here.at(A, "fs/model")) != inode(here.at(B, "fs/other")) == inode(here.at(C, "fs/third"))
    assert here.layers.stats().shared_bytes == os.lstat(here.at(B, "fs/other")).st_blocks * 512
    for snapshot in (A, B, C):
        here.catalogue.open_verified(snapshot)


@contextmanager
def overlay(lower: Path, scratch: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    disk, target = scratch / "disk", scratch / "mounted"
    disk.mkdir()
    target.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", disk], check=True)
    try:
        for name in ("upper", "work"):
            (disk / name).mkdir()
        options = f"lowerdir={lower},upperdir={disk}/upper,workdir={disk}/work,index=off,xino=on"
        subprocess.run(["mount", "-t", "overlay", "none", target, "-o", options], check=True)
        try:
            yield target
        finally:
            subprocess.run(["umount", target], check=True)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_only_what_may_be_equal_is_read_before_a_mount(here: Sharing, monkeypatch: pytest.MonkeyPatch) -> None:
    here.capture(A, ("fs/model", MODEL))
    compared: list[Path] = []
    equal = layers_module._equal
    monkeypatch.setattr(layers_module, "_equal", lambda one, other: compared.append(one) or equal(one, other))
    here.stage(B, ("fs/later", MODEL), when=WHEN + 1)
    here.stage(C, ("fs/open", MODEL), mode=0o644)
    assert compared == []
    staging = here.stage(D, ("fs/other", MODEL[::-1]))
    assert [p.name for p in compared] == ["other"] and os.lstat(staging.fs / "other").st_nlink == 1


def test_equal_files_are_one(here: Sharing) -> None:
    """Not small ones, and not those that differ in anything that a process may see."""
    small = b"x" * (LARGE - 1)
    here.capture(A, ("fs/app/model", MODEL), ("fs/small", small))
    here.capture(B, ("fs/other/place", MODEL), ("shm/model", MODEL), ("fs/small", small))
    here.capture(C, ("fs/app/model", MODEL), when=WHEN + 1)
    assert inode(here.at(A, "fs/app/model")) == inode(here.at(B, "fs/other/place"))
    assert inode(here.at(B, "shm/model")) != inode(here.at(B, "fs/other/place")), "two of one layer stay two"
    assert inode(here.at(C, "fs/app/model")) != inode(here.at(A, "fs/app/model"))
    assert inode(here.at(A, "fs/small")) != inode(here.at(B, "fs/small"))
    stats = here.layers.stats()
    assert stats.files == 2 and stats.shared_bytes >= len(MODEL) and stats.bytes >= 2 * len(MODEL)
    for snapshot in (A, B, C):
        here.catalogue.forget_verified(snapshot)
        here.catalogue.open_verified(snapshot)
    info = os.lstat(here.at(B, "fs/other/place"))
    assert (stat.S_IMODE(info.st_mode), info.st_mtime_ns) == (0o640, WHEN)
    assert here.at(B, "fs/other/place").read_bytes() == MODEL and here.layers.verify() == []


def test_owner_and_attributes_are_a_part_of_it(here: Sharing, monkeypatch: pytest.MonkeyPatch) -> None:
    for snapshot, value in ((A, b"1"), (B, b"2"), (C, b"1")):
        staging = here.catalogue.begin(snapshot)
        path = staging.fs / "model"
        path.write_bytes(MODEL)
        try:
            os.setxattr(path, "user.what", value)
        except OSError:
            pytest.skip("no extended attributes here")
        os.utime(path, ns=(WHEN, WHEN))
        here.catalogue.share_captured(staging)
        here.catalogue.commit(staging, draft(snapshot))
    inodes = [inode(here.at(snapshot, "fs/model")) for snapshot in (A, B, C)]
    assert inodes[0] == inodes[2] != inodes[1]


def test_hard_links_of_a_layer_stay_what_they_are(here: Sharing) -> None:
    here.capture(A, ("fs/model", MODEL))
    staging = here.catalogue.begin(B)
    (staging.fs / "one").write_bytes(MODEL)
    os.link(staging.fs / "one", staging.fs / "two")
    for name in ("one", "two"):
        (staging.fs / name).chmod(0o640)
        os.utime(staging.fs / name, ns=(WHEN, WHEN))
    here.catalogue.share_captured(staging)
    here.catalogue.commit(staging, draft(B))
    one, two = here.at(B, "fs/one"), here.at(B, "fs/two")
    assert inode(one) == inode(two) != inode(here.at(A, "fs/model")) and os.lstat(one).st_nlink == 2
    here.catalogue.open_verified(B)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """The files that are read for their digest."""
    found: list[Path] = []

    def digest(path: Path) -> str:
        found.append(path)
        return real(path)

    real = catalogue_module.sha256_file
    monkeypatch.setattr(catalogue_module, "sha256_file", digest)
    monkeypatch.setattr(layers_module, "sha256_file", digest)
    yield found


def test_that_others_share_it_is_no_change_of_a_file(here: Sharing, reads: list[Path]) -> None:
    """Neither coming nor going makes a thaw of another snapshot read its files again."""
    here.capture(A, ("fs/model", MODEL))
    here.capture(B, ("fs/model", MODEL))
    reads.clear()
    here.catalogue.open_verified(A)
    here.catalogue.open_verified(B)
    here.capture(C, ("fs/model", MODEL))
    assert {p.parent.parent.name for p in reads if p.name == "model"} == {f".staging-{C}"}, "the new one's own"
    reads.clear()
    staging = here.stage(D, ("fs/model", MODEL))
    assert inode(staging.fs / "model") == inode(here.at(A, "fs/model"))
    here.catalogue.abandon(staging)
    here.catalogue.remove(C)
    here.catalogue.remove(B)
    here.catalogue.open_verified(A)
    assert reads == []
    here.reopen()
    here.catalogue.open_verified(A)
    assert len(reads) == 2, "all of it, once in each daemon's life"
    reads.clear()
    here.catalogue.open_verified(A)
    here.capture(B, ("fs/model", MODEL))
    here.catalogue.open_verified(A)
    assert len([p for p in reads if A in str(p)]) == 0


@pytest.mark.parametrize("how", ["compared", "read"])
def test_nobody_waits_for_a_file_that_is_read(here: Sharing, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """It may be gigabytes, and who removes a snapshot only takes names away. What changes meanwhile is read again."""
    here.capture(A, ("fs/model", MODEL))
    here.capture(B, ("fs/other", MODEL + b"x"))
    here.reopen()  # nothing is known
    name, inner = ("_equal", layers_module._equal) if how == "compared" else ("sha256_file", layers_module.sha256_file)
    reading, go, count = threading.Event(), threading.Event(), []

    def slowly(*paths: Path) -> object:
        count.append(paths)
        reading.set()
        go.wait(20)
        return inner(*paths)  # type: ignore[operator]

    monkeypatch.setattr(layers_module, name, slowly)
    [kept] = [p for p in here.layers._all() if os.lstat(p).st_size == len(MODEL)]
    staging = here.catalogue.begin(C)
    path = staging.fs / "model"
    path.write_bytes(MODEL)
    path.chmod(0o640)
    os.utime(path, ns=(WHEN, WHEN))
    stamp = stamp_of(path)
    assert stamp is not None

    def share() -> None:
        if how == "compared":
            here.layers.share_alike([path])
        else:
            here.layers.share([(path, hashlib.sha256(MODEL).hexdigest(), stamp)])

    thread = threading.Thread(target=share)
    thread.start()
    try:
        assert reading.wait(20)
        begin = time.monotonic()
        here.catalogue.remove(B)
        os.link(kept, here.catalogue.root.parent / "another name")
        assert time.monotonic() - begin < 5 and thread.is_alive()
    finally:
        go.set()
        thread.join()
    assert len(count) == 2 and inode(path) == inode(kept)


def test_what_nobody_shares_goes(here: Sharing) -> None:
    for snapshot in (A, B):
        here.capture(snapshot, ("fs/model", MODEL))
    here.catalogue.remove(A)
    assert here.layers.collect() == 0 and here.layers.stats().files == 1
    here.catalogue.remove(B)
    assert here.layers.collect(dry_run=True) >= len(MODEL) and here.layers.stats().files == 1
    assert here.layers.collect() >= len(MODEL) and here.layers.stats() == layers_module.LayerStats(0, 0, 0)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("harm", ["content", "mode", "gone"])
def test_a_damaged_one_is_not_taken_for_its_equal(here: Sharing, harm: str, known: bool) -> None:
    here.capture(A, ("fs/model", MODEL))
    if not known:
        here.reopen()
    (kept,) = here.layers._all()
    match harm:
        case "content":
            info = os.lstat(kept)
            with open(kept, "r+b") as f:
                f.seek(12345)
                f.write(bytes([MODEL[12345] ^ 1]))
            os.utime(kept, ns=(info.st_atime_ns, info.st_mtime_ns))
        case "mode":
            kept.chmod(0o600)
        case "gone":
            kept.unlink()
    here.capture(B, ("fs/model", MODEL))
    here.catalogue.open_verified(B)
    assert here.at(B, "fs/model").read_bytes() == MODEL
    if harm != "gone":
        with pytest.raises(IntegrityError):
            here.catalogue.open_verified(A)
    assert here.layers.verify() == []


def test_a_shared_file_that_was_altered_is_noticed_by_all(here: Sharing) -> None:
    for snapshot in (A, B):
        here.capture(snapshot, ("fs/model", MODEL))
    path = here.at(A, "fs/model")
    with open(path, "r+b") as f:
        f.write(b"\0")
    os.utime(path, ns=(WHEN, WHEN))
    for snapshot in (A, B):
        with pytest.raises(IntegrityError, match="altered"):
            here.catalogue.open_verified(snapshot)
    assert len(here.layers.verify()) == 1


# In a tier


@given(st.integers(0, 3 * CHUNK), st.data())
def test_what_a_file_consists_of_can_be_written_and_read(size: int, data: st.DataObject) -> None:
    names = st.sampled_from(("", "0" * 64, "9f" * 32))
    count = -(-size // CHUNK)
    large = Large(size, tuple(data.draw(st.lists(names, min_size=count, max_size=count))))
    assert Large.parse(large.text()) == large


@given(st.text(alphabet="0123456789abcdef,-+ \0٣", max_size=200))
def test_what_is_none_is_refused(text: str) -> None:
    try:
        large = Large.parse(text)
    except ValueError:
        return
    assert len(large.chunks) == -(-large.size // CHUNK)


PART = st.sampled_from((0, 1, 4096, CHUNK - 1, CHUNK, CHUNK + 1))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(PART, st.booleans()), max_size=4), st.booleans())
def test_any_file_comes_back(
    tmp_path_factory: pytest.TempPathFactory, parts: list[tuple[int, bool]], sealed: bool
) -> None:
    folder = tmp_path_factory.mktemp("chunks")
    data = b"".join(bytes(n) if hole else random.Random(n).randbytes(n) for n, hole in parts)
    (folder / "file").write_bytes(data)
    tier = MemoryTier()
    chunks = Chunks(tier, Key(bytes(32)) if sealed else None)
    large = chunks.send(folder / "file")
    fd = os.open(folder / "back", os.O_RDWR | os.O_CREAT)
    try:
        Chunks(tier, Key(bytes(32)) if sealed else None).bring(large, fd)
    finally:
        os.close(fd)
    assert (folder / "back").read_bytes() == data
    shutil.rmtree(folder)


def objects(tier: DirectoryTier, prefix: str = "") -> set[str]:
    return {key for key in tier.list() if key.startswith(prefix)}


@pytest.mark.parametrize("sealed", [False, True])
def test_it_is_sent_once_for_all_captures(tmp_path: Path, tier: DirectoryTier, sealed: bool) -> None:
    """Also where its time is another: what is sent is the content."""
    key = Key(bytes(range(32))) if sealed else None
    here, there = Sharing(tmp_path / "here", key), Sharing(tmp_path / "there", key)
    there.trust.add(public_text(here.signing))
    here.capture(A, ("fs/app/model", MODEL), ("fs/notes", b"small"))
    here.capture(B, ("fs/app/model", MODEL), ("fs/notes", b"other"), when=WHEN + 5)
    here.transport.push(A, tier)
    first = objects(tier, "chunks")
    assert len(first) == 3
    assert all(tier.size(k) < LARGE for k in objects(tier, "snapshots"))
    watched = FaultyTier(tier)
    here.transport.push(B, watched)
    assert objects(tier, "chunks") == first
    assert not [key for op, key in watched.log if op == "put" and key.startswith("chunks")]
    if sealed:
        plain = Chunks(MemoryTier(), None).send(here.at(A, "fs/app/model"))
        assert not {name for name in plain.chunks if any(name in key for key in first)}

    watched = FaultyTier(tier)
    there.transport.pull(A, watched)
    assert [key for op, key in watched.log if op == "get_bytes" and key.startswith("chunks")]
    watched.log.clear()
    there.transport.pull(B, watched)
    assert not [key for op, key in watched.log if op == "get_bytes" and key.startswith("chunks")], "it is here"
    for snapshot, when in ((A, WHEN), (B, WHEN + 5)):
        path = there.at(snapshot, "fs/app/model")
        assert path.read_bytes() == MODEL and os.lstat(path).st_mtime_ns == when
        there.catalogue.open_verified(snapshot)


def test_a_layer_with_all_that_overlays_have(here: Sharing, tier: DirectoryTier, tmp_path: Path) -> None:
    staging = here.catalogue.begin(A)
    fs = staging.fs
    with open(fs / "sparse", "wb") as f:
        f.seek(6 * CHUNK)
        f.write(b"end")
    (fs / "model").write_bytes(MODEL)
    os.link(fs / "model", fs / "again")
    os.symlink("model", fs / "link")
    if os.geteuid() == 0:
        os.mknod(fs / "gone", stat.S_IFCHR, os.makedev(0, 0))
        os.chown(fs / "model", 12, 34)
        with_attribute = True
        try:
            os.setxattr(fs / "model", "user.what", b"x")
        except OSError:
            with_attribute = False
    else:
        with_attribute = False
    here.catalogue.commit(staging, draft(A))
    here.transport.push(A, tier)
    there = Sharing(tmp_path / "there")
    there.trust.add(public_text(here.signing))
    there.transport.pull(A, tier)
    assert there.at(A, "fs/model").read_bytes() == MODEL
    assert inode(there.at(A, "fs/model")) == inode(there.at(A, "fs/again"))
    assert os.readlink(there.at(A, "fs/link")) == "model"
    assert os.stat(there.at(A, "fs/sparse")).st_size == 6 * CHUNK + 3
    assert os.stat(there.at(A, "fs/sparse")).st_blocks * 512 <= CHUNK + (1 << 16), "its holes are holes"
    if with_attribute:
        assert os.getxattr(there.at(A, "fs/again"), "user.what") == b"x"
        assert os.lstat(there.at(A, "fs/model")).st_uid == 12
        assert stat.S_ISCHR(os.lstat(there.at(A, "fs/gone")).st_mode)
    exported = tmp_path / "a.frog"
    there.transport.export(A, exported)
    third = Sharing(tmp_path / "third")
    third.trust.add(public_text(there.signing))
    third.transport.import_(exported)
    assert third.at(A, "fs/again").read_bytes() == MODEL


@pytest.mark.parametrize("harm", ["bit", "other", "gone", "short"])
def test_a_chunk_that_is_another(here: Sharing, tier: DirectoryTier, tmp_path: Path, harm: str) -> None:
    here.capture(A, ("fs/model", MODEL))
    here.transport.push(A, tier)
    there = Sharing(tmp_path / "there")
    there.trust.add(public_text(here.signing))
    paths = sorted((tier.root / "chunks").rglob("*"))
    paths = [p for p in paths if p.is_file()]
    data = bytearray(paths[0].read_bytes())
    match harm:
        case "bit":
            data[len(data) // 2] ^= 4
        case "other":
            data = bytearray(max(paths[1:], key=lambda p: p.stat().st_size).read_bytes())
        case "short":
            del data[len(data) // 2 :]
        case "gone":
            paths[0].unlink()
    if harm != "gone":
        paths[0].write_bytes(data)
    with pytest.raises((IntegrityError, StoreError)):
        there.transport.pull(A, tier)
    assert there.catalogue.form(A) is None and not list(there.catalogue.root.iterdir())


def test_a_bundle_says_nothing_of_what_it_is_not_asked(tmp_path: Path) -> None:
    """One with content elsewhere is not for those who do not know from where."""
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "model").write_bytes(MODEL)
    pack_tree(tmp_path / "tree", tmp_path / "cold", key=None, send=Chunks(MemoryTier(), None).send)
    with pytest.raises(IntegrityError, match="elsewhere"):
        unpack_tree(tmp_path / "cold", tmp_path / "out", key=None)
    assert not (tmp_path / "out").exists()
