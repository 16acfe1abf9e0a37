"""What images would have a restore do as root: read from images, decided on, looked for in layers."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from woodfrog.criu.authority import Credentials, credentials, paths
from woodfrog.criu.stats import encode_bytes, encode_int
from woodfrog.engine.plan import foreign_credentials, volumes_entered
from woodfrog.snapshot.capture import holes, link_on_the_way

UID = 64646
WORKER = Credentials(frozenset({UID}), 0, True)


def image(*messages: bytes) -> bytes:
    return bytes(8) + b"".join(struct.pack("<I", len(m)) + m for m in messages)


def core(ids: tuple[int, ...] = (UID,) * 8, more: bytes = b"", no_new_privs: int = 1) -> bytes:
    """Ids, four sets of capabilities in two halves each, secure bits."""
    creds = b"".join(encode_int(n, v) for n, v in enumerate(ids, 1))
    creds += b"".join(encode_int(n, 0) for n in (9, 9, 10, 10, 11, 11, 12, 12, 13)) + more
    creds += encode_int(18, no_new_privs) if no_new_privs is not None else b""
    thread = encode_int(1, 140564710874720) + encode_bytes(7, b"\x08\x01") + encode_bytes(10, creds)
    return encode_int(1, 1) + encode_bytes(2, b"\x08\x01") + encode_bytes(5, thread)


@pytest.mark.parametrize(
    ("message", "found"),
    [
        (core(), WORKER),
        (core((UID,) * 7 + (0,)), Credentials(frozenset({UID, 0}), 0, True)),
        (core(more=encode_int(14, 27)), Credentials(frozenset({UID, 27}), 0, True)),
        (core(more=encode_int(11, 1 << 21) + encode_int(11, 1 << 8)), None),
        (core(no_new_privs=0), Credentials(frozenset({UID}), 0, False)),
    ],
)
def test_credentials_of_a_thread(tmp_path: Path, message: bytes, found: Credentials | None) -> None:
    (tmp_path / "core-100.img").write_bytes(image(message))
    (tmp_path / "core-101.img").write_bytes(image(encode_int(1, 1) + encode_bytes(3, b"\x08\x03")))  # a zombie
    seen = credentials(tmp_path)
    assert list(seen) == ["core-100.img"]
    if found is None:
        assert seen["core-100.img"].capabilities
    else:
        assert seen["core-100.img"] == found
    wrong = foreign_credentials(seen, ids=frozenset({UID}), capabilities=0, no_new_privs=True)
    assert (wrong == "") == (found == WORKER)


@pytest.mark.parametrize(
    "data",
    [image(core())[:-1], image(encode_bytes(5, encode_int(1, 1))), image(encode_bytes(5, encode_bytes(10, b"\xff")))],
)
def test_credentials_that_are_not_understood(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "core-100.img").write_bytes(data)
    with pytest.raises((ValueError, IndexError)):
        credentials(tmp_path)


def test_more_than_it_had() -> None:
    def wrong(has: Credentials, *, capabilities: int = 0, no_new_privs: bool = True) -> str:
        found = {"core-1.img": WORKER, "core-2.img": has}
        return foreign_credentials(found, ids=frozenset({UID}), capabilities=capabilities, no_new_privs=no_new_privs)

    assert not wrong(WORKER)
    assert wrong(Credentials(frozenset({UID}), 2, True)) == f"core-2.img: ids {UID}, capabilities 2"
    assert not wrong(Credentials(frozenset({UID}), 2, True), capabilities=6)
    assert wrong(Credentials(frozenset({UID, 0}), 0, True))
    assert wrong(Credentials(frozenset({UID}), 0, False))
    assert not wrong(Credentials(frozenset({UID}), 0, False), no_new_privs=False)
    assert foreign_credentials({}, ids=frozenset({UID}), capabilities=0, no_new_privs=True)


def test_paths_of_files_and_sockets(tmp_path: Path) -> None:
    def socket(name: bytes, folder: bytes = b"") -> bytes:
        body = encode_int(1, 31) + encode_bytes(9, encode_int(1, 0)) + encode_bytes(11, name)
        return encode_int(1, 5) + encode_bytes(16, body + (encode_bytes(14, folder) if folder else b""))

    file = encode_int(1, 1) + encode_bytes(
        3, encode_int(1, 33) + encode_bytes(5, encode_int(1, 0)) + encode_bytes(6, b"/t/f")
    )
    (tmp_path / "files.img").write_bytes(
        image(file, socket(b"/data/sock\0"), socket(b"rel\0", b"/work"), socket(b"\0abstract"), socket(b""))
    )
    assert paths(tmp_path) == {"/t/f", "/data/sock", "/work/rel", "/work"}


def test_volumes_that_a_restore_opens_something_in() -> None:
    assert volumes_entered(("/", "/data2", "/usr/lib", "/models/a/b"), ("/data", "/models")) == ("/models",)
    assert volumes_entered(("/data",), ("/data",)) == ("/data",)
    assert volumes_entered((), ("/data",)) == ()


def test_a_link_on_the_way_to_an_open_file(tmp_path: Path) -> None:
    fs, shm = tmp_path / "fs", tmp_path / "shm"
    for folder in (fs / "tmp/real", fs / ".var-tmp", shm):
        folder.mkdir(parents=True)
    (fs / "tmp/real/file").touch()

    def through(*names: str) -> str:
        return link_on_the_way(names, fs, shm)

    assert not through("/tmp/real/file", "/", "/usr/lib/libc.so.6", "/dev/shm/x", "relative")
    (fs / "tmp/link").symlink_to("/etc")
    (fs / "tmp/real/last").symlink_to("/etc/shadow")
    (fs / ".var-tmp/link").symlink_to("/etc")
    (shm / "link").symlink_to("/etc")
    for name in ("/tmp/link/shadow", "/tmp/real/last", "/var/tmp/link/a/b", "/dev/shm/link", "/tmp/link/../x"):
        assert through("/tmp/real/file", name) == name


def test_holes_are_what_nobody_has_written(tmp_path: Path) -> None:
    fs, shm = tmp_path / "fs", tmp_path / "shm"
    (fs / "tmp").mkdir(parents=True)
    shm.mkdir()
    (fs / "tmp/full").write_bytes(b"x" * (1 << 20))
    (fs / "tmp/link").symlink_to("sparse")
    assert holes(fs, shm) == 0
    for path in (fs / "tmp/sparse", shm / "sparse"):
        with open(path, "wb") as file:
            file.truncate(1 << 40)
            file.write(b"x" * (1 << 20))
    assert 2 * ((1 << 40) - (2 << 20)) < holes(fs, shm) < 2 << 40
