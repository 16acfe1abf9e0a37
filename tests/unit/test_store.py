"""Durable writes and the content store, on real files."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import stat
import subprocess
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from woodfrog.errors import NotFoundError, SpecError, StoreError
from woodfrog.store import files
from woodfrog.store.content import ContentStore


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def info(
    name: str, kind: bytes = tarfile.REGTYPE, *, link: str = "", mode: int = 0o644, size: int = 0
) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.mode, member.size = kind, link, mode, size
    return member


def make_tar(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for member, data in members:
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


def everything(root: Path) -> set[str]:
    return {str(p.relative_to(root)) for p in root.rglob("*")}


GOOD = make_tar(
    (info("app/app.py", mode=0o600), b"import pkg\n"),
    (info("app/pkg", tarfile.DIRTYPE, mode=0o700), b""),
    (info("app/pkg/__init__.py"), b"x = 1\n"),
    (info("app/pkg/run.sh", mode=0o4777), b"#!/bin/sh\n"),
    (info("app/deep/er/data.bin"), bytes(100_000)),
    (info("app/pkg/again.py", tarfile.SYMTYPE, link="__init__.py"), b""),
    (info("app/up", tarfile.SYMTYPE, link="deep/../pkg"), b""),
    (info("root/beside"), b"not code"),
)


def test_code_is_readable_by_the_worker_and_writable_by_nobody_else(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    old = os.umask(0o077)
    try:
        store.put_code(sha(GOOD), GOOD)
    finally:
        os.umask(old)
    code = store.code_path(sha(GOOD))
    assert (code / "up" / "again.py").read_text() == "x = 1\n"
    assert (code / "deep/er/data.bin").stat().st_size == 100_000
    modes = {str(p.relative_to(code)): stat.S_IMODE(p.lstat().st_mode) for p in code.rglob("*") if not p.is_symlink()}
    assert modes == {
        "app.py": 0o644,
        "pkg": 0o755,
        "pkg/__init__.py": 0o644,
        "pkg/run.sh": 0o755,
        "deep": 0o755,
        "deep/er": 0o755,
        "deep/er/data.bin": 0o644,
    }
    assert stat.S_IMODE(code.stat().st_mode) == 0o755


LEAVES: dict[str, bytes] = {
    "dot-dot": make_tar((info("../evil"), b"x")),
    "dot-dot inside": make_tar((info("a/../../evil"), b"x")),
    "absolute": make_tar((info("/tmp/woodfrog-evil"), b"x")),
    "absolute link": make_tar((info("a", tarfile.SYMTYPE, link="/etc/passwd"), b"")),
    "link out": make_tar((info("d/a", tarfile.SYMTYPE, link="../../evil"), b"")),
    "link out over a link": make_tar(
        (info("x/y/here", tarfile.SYMTYPE, link="../.."), b""),
        (info("x/y/out", tarfile.SYMTYPE, link="here/../evil"), b""),
    ),
    "file through a link": make_tar((info("a", tarfile.SYMTYPE, link=".."), b""), (info("a/evil"), b"x")),
    "link through a link": make_tar(
        (info("a", tarfile.SYMTYPE, link=".."), b""), (info("a/evil", tarfile.SYMTYPE, link="app.py"), b"")
    ),
    "directory through a link": make_tar(
        (info("a", tarfile.SYMTYPE, link=".."), b""), (info("a/evil", tarfile.DIRTYPE), b"")
    ),
    "hard link": make_tar((info("a", tarfile.LNKTYPE, link="/etc/hostname"), b"")),
    "device": make_tar((info("a", tarfile.CHRTYPE), b"")),
    "fifo": make_tar((info("a", tarfile.FIFOTYPE), b"")),
    "over itself": make_tar((info("a"), b"x"), (info("a/b"), b"y")),
    "link to nothing": make_tar((info("a", tarfile.SYMTYPE), b"")),
    "deep": make_tar((info("d/" * 1500 + "f"), b"x")),
    "deep directory": make_tar((info("d/" * 900, tarfile.DIRTYPE), b"")),
    "long name": make_tar((info("n" * 300), b"x")),
    "not a tar": b"hello" * 400,
    "truncated": GOOD[:-103_000],
    "truncated behind a file": GOOD[:1024],
    "damaged header": GOOD[:1024] + b"?" + GOOD[1025:],
}


@pytest.mark.parametrize("name", LEAVES)
def test_hostile_archives_are_refused_and_leave_nothing(tmp_path: Path, name: str) -> None:
    tar = LEAVES[name]
    store = ContentStore(tmp_path / "store")
    before = everything(tmp_path)
    with pytest.raises(SpecError) as caught:
        store.put_code(sha(tar), tar)
    assert caught.value.code == "bad-archive"
    assert everything(tmp_path) == before
    assert not Path("/tmp/woodfrog-evil").exists()
    assert not store.has_code(sha(tar))
    with pytest.raises(NotFoundError):
        store.code_path(sha(tar))


@pytest.mark.parametrize("bad", ["0" * 64, "../blobs", "", sha(b"x").upper(), sha(b"x") + "\n", sha(b"x")[:-1]])
def test_wrong_digests_are_refused(tmp_path: Path, bad: str) -> None:
    store = ContentStore(tmp_path)
    before = everything(tmp_path)
    for put in (store.put_blob, store.put_code):
        with pytest.raises(SpecError, match="digest"):
            put(bad, b"x")
    assert not store.has_blob(bad) and not store.has_code(bad)
    assert everything(tmp_path) == before


def test_blobs(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    store.put_blob(sha(b""), b"")
    store.put_blob(sha(b"data"), b"data")
    store.put_blob(sha(b"data"), b"data")
    assert ContentStore(tmp_path).get_blob(sha(b"data")) == b"data"
    assert stat.S_IMODE((store.blobs / sha(b"data")).stat().st_mode) == 0o600
    with pytest.raises(NotFoundError, match="deploy the app again"):
        store.get_blob(sha(b"other"))


def test_leftovers_are_swept_at_the_start(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    store.put_code(sha(GOOD), GOOD)
    half = store.code / f".{sha(b'x')}.1234"
    (half / "pkg").mkdir(parents=True)
    (half / "pkg" / "a.py").write_text("half")
    (store.code / ".stray").write_text("x")
    (store.code / ".loop").symlink_to(".")
    (store.blobs / f".{sha(b'y')}.99").write_bytes(b"half")
    again = ContentStore(tmp_path)
    assert [p.name for p in again.code.iterdir()] == [f"{sha(GOOD)}.layer"]
    assert list(again.blobs.iterdir()) == []


def test_code_of_a_version_without_layers_is_taken_up(tmp_path: Path) -> None:
    older = sha(b"older")
    both = sha(b"both")
    for digest in (older, both):
        (tmp_path / "code" / digest / "sub").mkdir(parents=True)
        (tmp_path / "code" / digest / "sub" / "m.py").write_text(digest)
    store = ContentStore(tmp_path)
    assert store.code_path(older) == tmp_path / "code" / f"{older}.layer" / "app"
    assert (store.code_path(older) / "sub" / "m.py").read_text() == older
    assert store.code_path(older).parent.stat().st_mode & 0o777 == 0o755
    store.code_path(older).rename(tmp_path / "code" / older)  # as if cut off between the two steps
    (tmp_path / "code" / both).mkdir()  # an older version ran in between, and has unpacked its own
    again = ContentStore(tmp_path)
    assert (again.code_path(older) / "sub" / "m.py").read_text() == older
    assert (again.code_path(both) / "sub" / "m.py").read_text() == both
    assert sorted(p.name for p in (tmp_path / "code").iterdir()) == sorted(f"{d}.layer" for d in (older, both))


def test_many_threads_put_the_same_tree(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    barrier = threading.Barrier(8)
    failures: list[BaseException] = []

    def put() -> None:
        barrier.wait()
        try:
            store.put_code(sha(GOOD), GOOD)
            store.put_blob(sha(GOOD), GOOD)
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=put) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert [p.name for p in store.code.iterdir()] == [f"{sha(GOOD)}.layer"]
    assert (store.code_path(sha(GOOD)) / "app.py").read_text() == "import pkg\n"


def _broken(what: str, error: OSError, monkeypatch: pytest.MonkeyPatch, after: int = 0) -> None:
    real: Callable[..., object] = getattr(os, what)
    left = [after]

    def fail(*args: object, **kwargs: object) -> object:
        if left[0] == 0:
            raise error
        left[0] -= 1
        return real(*args, **kwargs)

    monkeypatch.setattr(files.os, what, fail)


@pytest.mark.parametrize("what", ["open", "fsync", "rename"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_write_atomic_leaves_the_old_content_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, number: int
) -> None:
    path = tmp_path / "state"
    files.write_atomic(path, b"old")
    with monkeypatch.context() as patch:
        _broken(what, OSError(number, os.strerror(number)), patch)
        with pytest.raises(StoreError) as caught:
            files.write_atomic(path, b"new")
    assert caught.value.code == ("disk-full" if number == errno.ENOSPC else "store")
    assert path.read_bytes() == b"old"
    assert everything(tmp_path) == {"state"}


def test_write_atomic_survives_an_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state"
    files.write_atomic(path, b"old")

    def interrupted(fd: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and everything(tmp_path) == {"state"}


def test_write_atomic_is_all_of_the_new_when_only_the_directory_cannot_be_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state"
    files.write_atomic(path, b"old")
    with monkeypatch.context() as patch:
        _broken("fsync", OSError(errno.EIO, "i/o"), patch, after=1)
        with pytest.raises(StoreError):
            files.write_atomic(path, b"new")
    assert path.read_bytes() == b"new" and everything(tmp_path) == {"state"}


@pytest.mark.root
def test_a_really_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "woodfrog-test", str(disk)], check=True)
    try:
        store = ContentStore(disk)
        small, big = b"s" * 1000, os.urandom(1 << 20)
        store.put_blob(sha(small), small)
        with pytest.raises(StoreError) as caught:
            store.put_blob(sha(big), big)
        assert caught.value.code == "disk-full" and "no space left" in caught.value.message
        tar = make_tar((info("big"), big))
        with pytest.raises(StoreError) as caught:
            store.put_code(sha(tar), tar)
        assert caught.value.code == "disk-full"
        files.write_atomic(disk / "state", b"old")
        with pytest.raises(StoreError):
            files.write_atomic(disk / "state", big)
        assert (disk / "state").read_bytes() == b"old"
        assert list(store.code.iterdir()) == []
        assert [p.name for p in store.blobs.iterdir()] == [sha(small)]
        store.put_blob(sha(b"after"), b"after")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_remove_tree(tmp_path: Path) -> None:
    files.remove_tree(tmp_path / "never")
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tmp_path / "kept").write_text("kept")
    (tree / "sub" / "link").symlink_to(tmp_path / "kept")
    files.remove_tree(tree)
    (tmp_path / "file").write_text("x")
    files.remove_tree(tmp_path / "file")
    assert everything(tmp_path) == {"kept"}


def test_fsync_tree_says_what_it_cannot_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "dangling").symlink_to("nowhere")
    os.mkfifo(tmp_path / "fifo")
    files.fsync_tree(tmp_path)

    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "i/o")

    monkeypatch.setattr(files.os, "scandir", refuse)
    with pytest.raises(OSError, match="i/o"):
        files.fsync_tree(tmp_path)


@pytest.mark.parametrize("size", [300 << 20, (300 << 20) + 12345])
def test_holes_are_not_read_and_are_zeroes_in_the_digest(tmp_path: Path, size: int) -> None:
    path = tmp_path / "sparse"
    pieces = {0: b"begin", (7 << 20) + 4000: os.urandom(70_000), 150 << 20: bytes(1 << 20), size - 3: b"end"}
    expected, at = hashlib.sha256(), 0
    with open(path, "wb") as f:
        f.truncate(size)
        for offset, data in pieces.items():
            expected.update(bytes(offset - at) + data)
            at = offset + len(data)
            f.seek(offset)
            f.write(data)
    if path.stat().st_blocks * 512 > size // 2:
        pytest.skip("no holes on this file system")

    def read_so_far() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = read_so_far()
    assert files.sha256_file(path) == expected.hexdigest()
    assert read_so_far() - before < 16 << 20
    filled = tmp_path / "filled"
    filled.write_bytes(path.read_bytes())
    assert files.sha256_file(filled) == expected.hexdigest()
    for holes in (0, size):  # nothing but holes, from the beginning or the end on
        with open(path, "wb") as f:
            f.write(b"x" * (size - holes > 0))
            f.truncate(size)
        assert files.sha256_file(path) == hashlib.sha256(path.read_bytes()).hexdigest()
