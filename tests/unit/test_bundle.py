"""Bundles: a tree comes back exactly, and one made by an enemy writes nothing outside of its place."""

from __future__ import annotations

import io
import os
import random
import shutil
import socket
import stat
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from woodfrog.errors import IntegrityError, StoreError
from woodfrog.store import bundle
from woodfrog.store.bundle import pack_tree, unpack_tree
from woodfrog.store.cold import Key, decode_file, encode_file

KEY = Key(bytes(range(32)))


def look(root: Path) -> dict[str, tuple[Any, ...]]:
    """Everything that a bundle keeps, by path."""
    found: dict[str, tuple[Any, ...]] = {}
    names: dict[int, str] = {}
    for folder, folders, files in os.walk(root):
        folders.sort()
        for path in sorted(os.path.join(folder, name) for name in [".", *folders, *files]):
            info = os.lstat(path)
            kind = stat.S_IFMT(info.st_mode)
            name = os.path.normpath(os.path.relpath(path, root))
            content: Any = None
            if kind == stat.S_IFREG:
                with open(path, "rb") as f:
                    content = (f.read(), bundle._data(f.fileno(), info.st_size))
            elif kind == stat.S_IFLNK:
                content = os.readlink(path)
            elif kind in (stat.S_IFCHR, stat.S_IFBLK):
                content = info.st_rdev
            attributes = {
                name: os.getxattr(path, name, follow_symlinks=False)
                for name in os.listxattr(path, follow_symlinks=False)
            }
            first = names.setdefault(info.st_ino, name)
            found[name] = (info.st_mode, info.st_uid, info.st_gid, info.st_mtime_ns, attributes, first, content)
    return found


def there_and_back(tree: Path, **options: Any) -> dict[str, tuple[Any, ...]]:
    pack_tree(tree, tree.with_name("bundle"), key=KEY)
    unpack_tree(tree.with_name("bundle"), tree.with_name("out"), key=KEY, **options)
    assert sorted(path.name for path in tree.parent.iterdir()) == ["bundle", "out", tree.name]
    return look(tree.with_name("out"))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    tree = tmp_path / "tree"
    tree.mkdir(mode=0o2751)
    tree.chmod(0o2751)
    return tree


def test_everything_comes_back(tree: Path) -> None:
    deep = tree / ("d" * 200) / ("e" * 200)
    deep.mkdir(parents=True)
    (deep / ("f" * 200)).write_bytes(b"far away")
    for name in (
        "ünï",
        b"\xff\xfe not utf-8".decode("utf-8", "surrogateescape"),
        "new\nline",
        " ",
        "-rf",
        "GNUSparseFile.0",
    ):
        (tree / name).write_bytes(os.urandom(1000))
    (tree / "empty").touch()
    (tree / "nothing here").mkdir(mode=0o700)
    (tree / "script").write_text("#!/bin/sh\n")
    (tree / "script").chmod(0o4755)
    (tree / "unreadable").write_text("x")
    (tree / "unreadable").chmod(0o400)
    os.link(tree / "script", tree / "nothing here" / "hard")
    os.symlink("../../outside/\udcff", tree / "link")
    os.symlink("/etc/passwd", tree / "absolute")
    os.link(tree / "link", tree / "hard link to link", follow_symlinks=False)
    os.mkfifo(tree / "fifo", 0o640)
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.open(tree, os.O_RDONLY)
        listener.bind(f"/proc/self/fd/{here}/socket")
        os.close(here)
    for number, path in enumerate(sorted(tree.rglob("*"))):
        moment = [0, 1, 999_999_999, 1_700_000_000_123_456_789, -1, -1_500_000_000][number % 6]
        os.utime(path, ns=(moment, moment), follow_symlinks=False)
    (tree / "sealed").mkdir(mode=0o500)
    os.utime(tree, ns=(5, 5))
    assert there_and_back(tree) == look(tree)


def test_holes_stay_holes(tree: Path) -> None:
    size = 40 << 20
    layouts: dict[str, list[int]] = {"all": [], "begin": [0], "middle": [7 << 20], "end": [size - 4096], "many": []}
    layouts["many"] = [number << 16 for number in range(0, 600, 2)]
    for name, offsets in layouts.items():
        with open(tree / name, "wb") as f:
            for offset in offsets:
                f.seek(offset)
                f.write(os.urandom(4096))
            f.truncate(size)
    long = tree / ("x" * 150)
    with open(long, "wb") as f:
        f.truncate(10_001)
    if (tree / "middle").stat().st_blocks * 512 >= size:
        pytest.skip("this file system has no sparse files")
    back = there_and_back(tree)
    assert back == look(tree)
    for path in tree.iterdir():
        assert (tree.with_name("out") / path.name).stat().st_blocks == path.stat().st_blocks
    assert tree.with_name("bundle").stat().st_size < 4 << 20


def test_user_attributes(tree: Path) -> None:
    (tree / "f").touch()
    try:
        os.setxattr(tree / "f", "user.any", bytes(range(256)))
    except OSError:
        pytest.skip("this file system has no user attributes")
    os.setxattr(tree, "user.text", "grün\n=1".encode())
    os.setxattr(tree / "f", "user.ключ", b"")
    (tree / "f").chmod(0o444)
    assert there_and_back(tree) == look(tree)


def test_random_trees(tmp_path: Path) -> None:
    for seed in range(12):
        chance = random.Random(seed)
        tree = tmp_path / f"{seed}" / "tree"
        tree.mkdir(parents=True)
        folders, files = [tree], []
        for number in range(chance.randrange(60)):
            path = chance.choice(folders) / f"{chance.choice('abc')}{number}"
            match chance.randrange(5):
                case 0:
                    path.mkdir(mode=chance.choice([0o700, 0o755, 0o1777]))
                    folders.append(path)
                case 1 if files:
                    os.link(chance.choice(files), path)
                case 2:
                    os.symlink(chance.choice(["a", "..", "/", "a/b/../c", "x" * 300]), path)
                case _:
                    path.write_bytes(chance.randbytes(chance.choice([0, 1, 511, 512, 513, 70_000])))
                    files.append(path)
        assert there_and_back(tree) == look(tree), seed


def test_equal_trees_make_equal_bundles(tree: Path, tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tree / name).write_text(name)
    os.link(tree / "a", tree / "z")
    shutil.copytree(tree, tmp_path / "copy", symlinks=True)
    (tmp_path / "copy/z").unlink()
    os.link(tmp_path / "copy/a", tmp_path / "copy/z")
    shutil.copystat(tree, tmp_path / "copy")
    sizes = [pack_tree(root, tmp_path / f"{root.name}.bundle", key=None) for root in (tree, tmp_path / "copy")]
    assert (tmp_path / "tree.bundle").read_bytes() == (tmp_path / "copy.bundle").read_bytes()
    assert sizes == [(tmp_path / "tree.bundle").stat().st_size] * 2


@pytest.mark.root
def test_an_overlay_layer_comes_back_and_still_means_the_same(tmp_path: Path) -> None:
    """A real overlay makes the layer, and a real overlay reads the copy."""
    lower, upper, merged, work, tree = (tmp_path / name for name in ("lower", "upper", "merged", "work", "tree"))
    for folder in (lower, upper, merged, work):
        folder.mkdir()
    for name in ("gone", "opaque/old", "renamed/in", "kept", "meta"):
        (lower / name).parent.mkdir(exist_ok=True)
        (lower / name).write_text(name)

    def mounted(layer: Path, then: Callable[[], Any]) -> Any:
        options = f"lowerdir={lower},upperdir={layer},workdir={work},redirect_dir=on,metacopy=on"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(merged)], check=True)
        try:
            return then()
        finally:
            subprocess.run(["umount", str(merged)], check=True)

    def use() -> dict[str, tuple[Any, ...]]:
        (merged / "gone").unlink()
        shutil.rmtree(merged / "opaque")
        (merged / "opaque").mkdir()
        (merged / "opaque/new").write_text("new")
        (merged / "renamed").rename(merged / "moved")
        os.chown(merged / "meta", 4_000_000, 64646)
        (merged / "owned").touch()
        os.chown(merged / "owned", 64646, 64646)
        (merged / "owned").chmod(0o6755)
        return look(merged)

    seen = mounted(upper, use)
    kinds = [stat.S_ISCHR(path.lstat().st_mode) for path in upper.rglob("*")]
    attributes = {name for path in [*upper.rglob("*")] for name in os.listxattr(path, follow_symlinks=False)}
    assert any(kinds) and {"trusted.overlay.opaque", "trusted.overlay.redirect"} <= attributes
    layer = look(upper)

    pack_tree(upper, tmp_path / "bundle", key=None)
    unpack_tree(tmp_path / "bundle", tree, key=None)
    assert look(tree) == layer
    without = {name: entry[:4] + entry[5:6] for name, entry in seen.items()}
    assert {name: entry[:4] + entry[5:6] for name, entry in mounted(tree, lambda: look(merged)).items()} == without


@pytest.mark.root
def test_devices_and_attributes_that_need_root(tree: Path) -> None:
    os.mknod(tree / "whiteout", stat.S_IFCHR, os.makedev(0, 0))
    os.mknod(tree / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(tree / "disk", stat.S_IFBLK | 0o660, os.makedev(259, 1 << 19))
    os.symlink("x", tree / "link")
    os.lchown(tree / "link", 64646, 64647)
    (tree / "ping").write_bytes(b"\x7fELF")
    os.chown(tree / "ping", 1000, 2_500_000_000)
    capability = bytes.fromhex("0100000200200000000000000000000000000000")
    os.setxattr(tree / "ping", "security.capability", capability)
    os.setxattr(tree / "link", "trusted.overlay.origin", bytes(range(200, 256)), follow_symlinks=False)
    os.setxattr(tree / "whiteout", "trusted.overlay.x", b"y", follow_symlinks=False)
    assert there_and_back(tree, devices=True) == look(tree)
    with pytest.raises(IntegrityError, match=r"'\./disk' is a device"):
        unpack_tree(tree.with_name("bundle"), tree.with_name("other"), key=KEY)
    assert not tree.with_name("other").exists()


def test_other_tools_read_a_bundle(tree: Path, tmp_path: Path) -> None:
    if not shutil.which("tar"):
        pytest.skip("needs tar")
    (tree / "sub").mkdir()
    (tree / "sub/f").write_text("text")
    os.link(tree / "sub/f", tree / "again")
    with open(tree / "sparse", "wb") as f:
        f.seek(1 << 20)
        f.write(b"data")
    pack_tree(tree, tmp_path / "bundle", key=None)
    decode_file(tmp_path / "bundle", tmp_path / "tar", key=None)
    (tmp_path / "out").mkdir()
    subprocess.run(["tar", "-xpf", tmp_path / "tar", "-C", tmp_path / "out"], check=True)
    assert look(tmp_path / "out") == look(tree)


# -- an enemy's ----------------------------------------------------------------------------------------------------


class Entry(tarfile.TarInfo):
    data = b""


def entry(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", data: bytes = b"", **extra: Any) -> Entry:
    member = Entry(name)
    member.type, member.linkname, member.size, member.mode = kind, link, len(data), 0o777
    member.uid, member.gid = os.geteuid(), os.getegid()
    for field, value in extra.items():
        setattr(member, field, value)
    member.data = data
    return member


DOT = (".", tarfile.DIRTYPE)
SPARSE = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "10"}
MAP = b"1\n0\n4\n".ljust(512, b"\0") + b"evil"


def forged(tmp_path: Path, *members: Entry) -> Path:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for member in members:
            archive.addfile(member, io.BytesIO(member.data))
    return sealed(tmp_path, out.getvalue())


def sealed(tmp_path: Path, content: bytes) -> Path:
    (tmp_path / "tar").write_bytes(content)
    encode_file(tmp_path / "tar", tmp_path / "evil", key=None)
    (tmp_path / "tar").unlink()
    return tmp_path / "evil"


ATTACKS: dict[str, list[Entry]] = {
    "absolute": [entry("/tmp/woodfrog-escaped", data=b"x")],
    "parent": [entry("../escaped", data=b"x")],
    "parent inside": [entry("a", tarfile.DIRTYPE), entry("a/../../escaped", data=b"x")],
    "parent at the end": [entry("a", tarfile.DIRTYPE), entry("a/..", tarfile.DIRTYPE)],
    "through a link to a directory": [entry("l", tarfile.SYMTYPE, "../outside"), entry("l/escaped", data=b"x")],
    "through an absolute link": [entry("l", tarfile.SYMTYPE, "/tmp"), entry("l/woodfrog-escaped", data=b"x")],
    "through two links": [
        entry("a", tarfile.SYMTYPE, "."),
        entry("b", tarfile.SYMTYPE, "a/.."),
        entry("b/escaped", data=b"x"),
    ],
    "a directory over a link": [
        entry("l", tarfile.SYMTYPE, "../outside"),
        entry("l", tarfile.DIRTYPE),
        entry("l/escaped"),
    ],
    "a file over a link": [entry("l", tarfile.SYMTYPE, "../outside/victim"), entry("l", data=b"changed")],
    "a device over a link": [entry("l", tarfile.SYMTYPE, "../outside/new"), entry("l", tarfile.CHRTYPE)],
    "a fifo over a link": [entry("l", tarfile.SYMTYPE, "../outside/new"), entry("l", tarfile.FIFOTYPE)],
    "the root over itself": [entry("."), entry(".", tarfile.SYMTYPE, "../outside")],
    "the root again": [entry(".", tarfile.DIRTYPE, mode=0o777)],
    "the root as ./.": [entry("./.", tarfile.DIRTYPE)],
    "an empty name": [entry("", data=b"x")],
    "a name with a hole": [entry("a//b", data=b"x")],
    "no parent": [entry("a/b", data=b"x")],
    "a file as parent": [entry("a"), entry("a/b", data=b"x")],
    "twice": [entry("a", data=b"1"), entry("a", data=b"2")],
    "hard link out, absolute": [entry("h", tarfile.LNKTYPE, "/etc/hostname")],
    "hard link out, relative": [entry("h", tarfile.LNKTYPE, "../outside/victim")],
    "hard link out, through a link": [
        entry("l", tarfile.SYMTYPE, "../outside"),
        entry("h", tarfile.LNKTYPE, "l/victim"),
    ],
    "hard link to a directory": [entry("d", tarfile.DIRTYPE), entry("h", tarfile.LNKTYPE, "d")],
    "hard link to nothing": [entry("h", tarfile.LNKTYPE, "later"), entry("later")],
    "write through a hard link to a link": [
        entry("l", tarfile.SYMTYPE, "../outside/victim"),
        entry("h", tarfile.LNKTYPE, "l"),
        entry("h", data=b"changed"),
    ],
    "a disk": [entry("sda", tarfile.BLKTYPE, devmajor=8, devminor=0)],
    "memory": [entry("mem", tarfile.CHRTYPE, devmajor=1, devminor=1)],
    "block 0/0": [entry("zero", tarfile.BLKTYPE)],
    "unknown kind": [entry("x", b"Z")],
    "a link to nothing": [entry("x", tarfile.SYMTYPE, "")],
    "too long a name": [entry("x" * 300)],
    "sparse, other name": [entry("ok", data=MAP, pax_headers={**SPARSE, "GNU.sparse.name": "../escaped"})],
    "sparse, absolute": [entry("ok", data=MAP, pax_headers={**SPARSE, "GNU.sparse.name": "/tmp/woodfrog-escaped"})],
    "sparse, outside of itself": [
        entry("ok", data=b"1\n9\n4\n".ljust(512, b"\0") + b"evil", pax_headers={**SPARSE, "GNU.sparse.name": "s"})
    ],
    "sparse, before itself": [
        entry("ok", data=b"1\n-9\n4\n".ljust(512, b"\0") + b"evil", pax_headers={**SPARSE, "GNU.sparse.name": "s"})
    ],
    "sparse, no map": [entry("ok", data=b"evil".ljust(512), pax_headers={**SPARSE, "GNU.sparse.name": "s"})],
    "sparse, enormous": [
        entry("ok", data=MAP, pax_headers={**SPARSE, "GNU.sparse.realsize": str(2**63), "GNU.sparse.name": "s"})
    ],
    "pax name": [entry("ok", data=b"x", pax_headers={"path": "../escaped"})],
    "pax link": [entry("ok", tarfile.LNKTYPE, "x", pax_headers={"linkpath": "../outside/victim"})],
    "pax size": [entry("ok", data=b"x", pax_headers={"size": "-512"})],
    "host's label": [entry("x", pax_headers={"SCHILY.xattr.security.selinux": "evil_t"})],
    "other namespace": [entry("x", pax_headers={"SCHILY.xattr.trusted.other": "x"})],
    "a time that is none": [entry("x", pax_headers={"mtime": "soon"})],
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_enemys_bundle_is_refused_and_touches_nothing(attack: str, tmp_path: Path) -> None:
    place = tmp_path / "place"
    outside = place / "outside"
    outside.mkdir(parents=True)
    (outside / "victim").write_text("untouched")
    before = look(place)
    evil = forged(tmp_path, entry(*DOT), *ATTACKS[attack])
    with pytest.raises(IntegrityError) as error:
        unpack_tree(evil, place / "root", key=None)
    assert error.value.code == "bad-bundle" and "\n" not in str(error.value)
    os.utime(place, ns=(before["."][3], before["."][3]))
    assert look(place) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil", "place"]
    assert not Path("/tmp/woodfrog-escaped").exists()


def test_honest_twins_of_the_attacks_unpack(tmp_path: Path) -> None:
    """So that the attacks are not refused for a reason of no account."""
    good = forged(
        tmp_path,
        entry(*DOT),
        entry("a", tarfile.DIRTYPE),
        entry("./a/b", data=b"x"),
        entry("l", tarfile.SYMTYPE, "../outside"),
        entry("h", tarfile.LNKTYPE, "a/b"),
        entry("hl", tarfile.LNKTYPE, "l"),
        entry("ok", data=MAP, pax_headers={**SPARSE, "GNU.sparse.name": "s"}),
        entry("long" * 50, pax_headers={"mtime": "12.5"}),
        entry("fifo", tarfile.FIFOTYPE),
    )
    unpack_tree(good, tmp_path / "root", key=None)
    root = tmp_path / "root"
    assert (
        (root / "h").read_bytes() == b"x"
        and (root / "hl").is_symlink()
        and (root / "s").read_bytes() == b"evil" + bytes(6)
    )
    assert (root / ("long" * 50)).stat().st_mtime == 12.5


def test_damaged_archives_are_refused(tmp_path: Path) -> None:
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(entry(*DOT))
        archive.addfile(entry("a", data=b"x" * 2000), io.BytesIO(b"x" * 2000))
    whole = plain.getvalue()
    # The last two: nothing behind the first member, and a header that `tarfile` alone would take for the end.
    cut_off, broken = whole[:512], whole[:512] + b"b" + whole[513:]
    for content in (b"", bytes(10240), b"garbage" * 1000, whole[:2048], whole[512:], cut_off, broken):
        with pytest.raises(IntegrityError) as error:
            unpack_tree(sealed(tmp_path, content), tmp_path / "root", key=None)
        assert error.value.code == "bad-bundle"
    chance = random.Random(1)
    for _ in range(300):
        altered = bytearray(whole)
        for _ in range(chance.randrange(1, 5)):
            altered[chance.randrange(1600)] = chance.randrange(256)
        try:
            unpack_tree(sealed(tmp_path, bytes(altered)), tmp_path / "root", key=None)
            shutil.rmtree(tmp_path / "root")
        except (IntegrityError, StoreError):
            pass
        assert sorted(path.name for path in tmp_path.iterdir()) == ["evil"]


def test_only_an_empty_place_is_filled(tree: Path, tmp_path: Path) -> None:
    (tree / "f").write_text("x")
    pack_tree(tree, tmp_path / "bundle", key=KEY)
    root = tmp_path / "root"
    root.mkdir()
    unpack_tree(tmp_path / "bundle", root, key=KEY)
    assert look(root) == look(tree)
    (root / "mine").touch()
    with pytest.raises(StoreError, match="not empty"):
        unpack_tree(tmp_path / "bundle", root, key=KEY)
    assert sorted(path.name for path in root.iterdir()) == ["f", "mine"]
    with pytest.raises(StoreError, match="absent"):
        pack_tree(tmp_path / "absent", tmp_path / "none", key=KEY)
    with pytest.raises(IntegrityError, match="no key"):
        unpack_tree(tmp_path / "bundle", tmp_path / "other", key=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "root", "tree"]
