"""Whose snapshots this machine may thaw."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from woodfrog.errors import IntegrityError, NotFoundError, SpecError, StoreError
from woodfrog.snapshot.manifest import SigningKey
from woodfrog.snapshot.trust import TrustStore, fingerprint, parse_public, public_text, verify_any


@pytest.fixture
def keys(tmp_path: Path) -> list[SigningKey]:
    return [SigningKey.load_or_create(tmp_path / f"key{number}") for number in range(3)]


@pytest.fixture
def trusted(tmp_path: Path) -> TrustStore:
    return TrustStore(tmp_path / "keys" / "trusted")


def test_a_key_travels_as_one_line(keys: list[SigningKey], trusted: TrustStore) -> None:
    assert trusted.list() == [] and trusted.public_keys() == ()
    line = public_text(keys[0], "frog@pond\nsecond line")
    assert "\n" not in line and public_text(keys[0]).startswith(base64.b64encode(keys[0].public).decode())
    added = trusted.add(f"  {line}\n")
    assert added.public == keys[0].public and added.comment == "frog@pond second line"
    assert added.fingerprint == fingerprint(keys[0].public) and added.text() == line
    trusted.add(public_text(keys[1]), "another comment")
    assert {key.public: key.comment for key in trusted.list()} == {
        keys[0].public: "frog@pond second line",
        keys[1].public: "another comment",
    }
    again = trusted.add(line)
    assert len(trusted.list()) == 2 and again == added
    path = trusted.root / f"{added.fingerprint}.pub"
    assert path.stat().st_mode & 0o777 == 0o600 and trusted.root.stat().st_mode & 0o777 == 0o700
    assert parse_public(path.read_text()) == added


def test_trust_ends_when_the_key_is_removed(keys: list[SigningKey], trusted: TrustStore) -> None:
    for key in keys:
        trusted.add(public_text(key))
    gone = fingerprint(keys[1].public)
    for name in ("", "0", gone[:7], "0" * 24, "../../key0", f"{gone}0", "zzzzzzzzzz"):
        with pytest.raises(NotFoundError):
            trusted.remove(name)
    assert trusted.remove(gone[:8].upper()).public == keys[1].public
    assert set(trusted.public_keys()) == {keys[0].public, keys[2].public}
    assert trusted.remove(fingerprint(keys[0].public)).public == keys[0].public


def test_only_a_trusted_key_verifies(keys: list[SigningKey], trusted: TrustStore) -> None:
    trusted.add(public_text(keys[0]))
    trusted.add(public_text(keys[1]))
    signature = keys[1].sign(b"manifest")
    assert verify_any(b"manifest", signature, trusted.public_keys(), "snapshot x") == keys[1].public
    wrong = [
        (b"manifesT", signature),
        (b"manifest", keys[2].sign(b"manifest")),
        (b"manifest", signature[:-1]),
        (b"manifest", b""),
        (b"manifest", bytes(64)),
    ]
    for data, bad in wrong:
        with pytest.raises(IntegrityError, match=r"^snapshot x: no trusted key .*snapshot trust") as error:
            verify_any(data, bad, trusted.public_keys(), "snapshot x")
        assert error.value.code == "bad-signature"
    with pytest.raises(IntegrityError):
        verify_any(b"manifest", signature, [], "snapshot x")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "AAAA comment",
        base64.b64encode(bytes(31)).decode(),
        base64.b64encode(bytes(33)).decode(),
        "ä" * 44,
        "-" * 44,
    ],
)
def test_what_is_no_key_is_not_added(text: str, trusted: TrustStore) -> None:
    with pytest.raises(SpecError, match="not a public key"):
        trusted.add(text)
    assert trusted.list() == []


def test_two_keys_are_not_taken_for_one(keys: list[SigningKey], trusted: TrustStore) -> None:
    with pytest.raises(SpecError, match="one public key at a time"):
        trusted.add(f"{public_text(keys[0], 'a')}\n{public_text(keys[1], 'b')}\n")


def test_a_damaged_store_trusts_nobody_and_can_be_repaired(keys: list[SigningKey], trusted: TrustStore) -> None:
    name = trusted.add(public_text(keys[0])).fingerprint
    path = trusted.root / f"{name}.pub"
    good = path.read_text()
    (trusted.root / "README").write_text("not ours")
    for content in ("", "garbage", public_text(keys[1]), "\xff"):
        path.write_text(content, "latin-1")
        with pytest.raises(IntegrityError, match=rf"{name}\.pub: .*remove it"):
            trusted.public_keys()
    path.write_text(good)
    path.chmod(0o620)
    with pytest.raises(IntegrityError, match="others may write it"):
        trusted.list()
    path.write_text("garbage")
    assert trusted.remove(name).fingerprint == name and trusted.list() == []


def test_a_store_that_cannot_be_written_says_so(keys: list[SigningKey], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="file"):
        TrustStore(tmp_path / "file" / "trusted").add(public_text(keys[0]))
