"""The manifest's form and its signature."""

from __future__ import annotations

import json
import os
import random
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from woodfrog.errors import IntegrityError
from woodfrog.snapshot.manifest import FORMAT, FileEntry, Manifest, SigningKey, decode, encode

MANIFEST = Manifest(
    format=FORMAT,
    id="s-1",
    function_key="f" * 64,
    worker_class="w" * 64,
    host={"cpu": "x86-64-v3", "kernel": "6.18"},
    app="demo",
    tag="Embedder",
    params_digest="",
    created=1.5,
    root_pid=100,
    tasks=3,
    pages_bytes=4096,
    fs_bytes=10,
    files=(FileEntry("img/core-100.img", 10, "0" * 64), FileEntry("fs/na\udcffme é", 1, "1" * 64)),
    links={"fs/dir": "40000 755 0:0 0"},
    external=("/usr/lib/x.so|10|20",),
    phases=("dump=1.0",),
)


def test_round_trip() -> None:
    data = encode(MANIFEST)
    assert decode(data) == MANIFEST
    assert encode(decode(data)) == data
    assert json.loads(data)["id"] == "s-1"  # readable alone


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        json.dumps({"format": FORMAT + 1}).encode(),
        json.dumps({"format": FORMAT}).encode(),
        json.dumps({**json.loads(encode(MANIFEST)), "extra": 1}).encode(),
        json.dumps({**json.loads(encode(MANIFEST)), "root_pid": "100"}).encode(),
        json.dumps({**json.loads(encode(MANIFEST)), "files": [{"path": "x"}]}).encode(),
    ],
)
def test_what_is_not_a_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(IntegrityError) as caught:
        decode(data)
    assert caught.value.code == "bad-manifest" and "\n" not in caught.value.message


def test_key_is_made_once_and_kept_secret(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "ed25519"
    key = SigningKey.load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    signature = key.sign(b"data")
    SigningKey.load_or_create(path).verify(b"data", signature, "it")


def test_signature_covers_every_bit(tmp_path: Path) -> None:
    key = SigningKey.load_or_create(tmp_path / "key")
    data = encode(MANIFEST)
    signature = key.sign(data)
    rng = random.Random(7)
    for _ in range(200):
        bad = bytearray(data)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        with pytest.raises(IntegrityError, match="altered or made elsewhere"):
            key.verify(bytes(bad), signature, "snapshot")
    for bit in range(len(signature) * 8):
        bad = bytearray(signature)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(IntegrityError):
            key.verify(data, bytes(bad), "snapshot")
    for wrong in (b"", signature[:-1], signature + b"\0", key.sign(encode(replace(MANIFEST, id="s-2")))):
        with pytest.raises(IntegrityError):
            key.verify(data, wrong, "snapshot")
    with pytest.raises(IntegrityError):
        SigningKey.load_or_create(tmp_path / "other").verify(data, signature, "snapshot")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_key_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key"
    SigningKey.load_or_create(path)
    os.chmod(path, mode)
    with pytest.raises(IntegrityError, match="others may read"):
        SigningKey.load_or_create(path)


@pytest.mark.parametrize("content", [b"", b"short", bytes(33)])
def test_file_that_is_no_key_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(IntegrityError, match="not an Ed25519 key"):
        SigningKey.load_or_create(path)
