"""Other machines' public keys that this machine trusts: whose snapshots it may thaw.

Restoring a snapshot is running code with the daemon's powers, so a key is added by hand, after its fingerprint was
compared with what the other machine shows (`woodfrog snapshot trust`). Each lies in `<home>/keys/trusted/` as
`<fingerprint>.pub`, one line: the base64 of the raw Ed25519 key, and a comment.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from woodfrog.errors import IntegrityError, NotFoundError, SpecError
from woodfrog.snapshot.manifest import SigningKey
from woodfrog.store.files import store_error, write_atomic

__all__ = ["TrustStore", "TrustedKey", "fingerprint", "parse_public", "public_text", "verify_any"]

_LENGTH = 24
_Paths: TypeAlias = list[Path]


@dataclass(frozen=True)
class TrustedKey:
    fingerprint: str
    public: bytes
    """The raw Ed25519 key, 32 bytes."""
    comment: str = ""

    def text(self) -> str:
        """The line that another machine adds."""
        return f"{base64.b64encode(self.public).decode()} {self.comment}".rstrip()


def fingerprint(public: bytes) -> str:
    """The short name of a public key that people compare: the first 24 hex digits of its sha256.

    >>> fingerprint(bytes(32))
    '66687aadf862bd776c8fc18b'
    """
    return hashlib.sha256(public).hexdigest()[:_LENGTH]


def public_text(key: SigningKey, comment: str = "") -> str:
    """This machine's key as the line that other machines add; `comment` defaults to the host's name."""
    return TrustedKey(fingerprint(key.public), key.public, _clean(comment or os.uname().nodename)).text()


def parse_public(text: str) -> TrustedKey:
    """Read such a line.

    Raises:
        SpecError: not a public key.
    """
    encoded, _, comment = text.strip().partition(" ")
    try:
        public = base64.b64decode(encoded, validate=True)
        Ed25519PublicKey.from_public_bytes(public)
    except (ValueError, binascii.Error):
        raise SpecError(
            "not a public key: expected one line, 44 characters of base64 and a comment, as the other machine shows it",
            code="bad-public-key",
        ) from None
    if "\n" in comment:
        raise SpecError("one public key at a time: the text has several lines", code="bad-public-key")
    return TrustedKey(fingerprint(public), public, _clean(comment))


def _clean(comment: str) -> str:
    return "".join(c if c.isprintable() else " " for c in comment).strip()[:200]


class TrustStore:
    """The trusted keys in a directory, usually `<home>/keys/trusted`. Read at each use: a change counts at once."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def add(self, text: str, comment: str = "") -> TrustedKey:
        """Trust the key of a `public_text` line; `comment` replaces the one in it.

        Raises:
            SpecError: not a public key.
            StoreError: it cannot be written.
        """
        key = parse_public(text)
        if comment:
            key = TrustedKey(key.fingerprint, key.public, _clean(comment))
        try:
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as e:
            raise store_error("cannot make", self.root, e) from e
        write_atomic(self._path(key.fingerprint), f"{key.text()}\n".encode())
        return key

    def remove(self, name: str) -> TrustedKey:
        """Trust a key no longer.

        Args:
            name: its fingerprint, or as much of its beginning (8 digits or more) as names only one.

        Raises:
            NotFoundError: no such key, or several.
        """
        name = name.lower()
        found = [path for path in self._paths() if re.fullmatch(r"[0-9a-f]{8,24}", name) and path.stem.startswith(name)]
        if len(found) != 1:
            what = "no trusted key has" if not found else "several trusted keys have"
            raise NotFoundError(f"{what} the fingerprint {name[:80]!r}; see `woodfrog snapshot trust --list`")
        try:
            key = parse_public(found[0].read_text())
        except (SpecError, OSError, UnicodeDecodeError):
            key = TrustedKey(found[0].stem, b"", "")  # a damaged one can be removed as well
        try:
            found[0].unlink(missing_ok=True)
        except OSError as e:
            raise store_error("cannot remove", found[0], e) from e
        return key

    def list(self) -> list[TrustedKey]:
        """All trusted keys, by fingerprint.

        Raises:
            IntegrityError: a file is damaged, is not named after its key, or others may write it.
        """
        return [self._read(path) for path in self._paths()]

    def public_keys(self) -> tuple[bytes, ...]:
        """The raw keys, for `verify_any`."""
        return tuple(key.public for key in self.list())

    def _paths(self) -> _Paths:
        try:
            return sorted(path for path in self.root.iterdir() if re.fullmatch(r"[0-9a-f]{24}\.pub", path.name))
        except FileNotFoundError:
            return []
        except OSError as e:
            raise store_error("cannot read", self.root, e) from e

    def _path(self, name: str) -> Path:
        return self.root / f"{name}.pub"

    def _read(self, path: Path) -> TrustedKey:
        try:
            with open(path, "rb") as f:
                mode = os.fstat(f.fileno()).st_mode
                key = parse_public(f.read(4096).decode())
        except OSError as e:
            raise store_error("cannot read the trusted key", path, e) from e
        except (SpecError, UnicodeDecodeError):
            raise IntegrityError(f"{path}: not a public key; remove it and add the key again", code="bad-key") from None
        if key.fingerprint != path.stem:
            raise IntegrityError(f"{path}: named after another key; remove it and add the key again", code="bad-key")
        if mode & 0o022:
            raise IntegrityError(f"{path}: others may write it; chmod 600 it if the key is right", code="bad-key")
        return key


def verify_any(data: bytes, signature: bytes, keys: Iterable[bytes], what: str) -> bytes:
    """Which of the raw public keys made `signature` over `data`.

    Raises:
        IntegrityError: none of them (`bad-signature`).
    """
    for public in keys:
        try:
            Ed25519PublicKey.from_public_bytes(public).verify(signature, data)
        except InvalidSignature:
            continue
        return public
    raise IntegrityError(
        f"{what}: no trusted key has signed it; it was altered, or its maker is to be trusted first "
        "(`woodfrog snapshot trust`)",
        code="bad-signature",
    )
