"""The manifest: what a snapshot is, small, versioned, readable alone, and signed.

A snapshot is a directory `<id>/` with `manifest.json`, `manifest.sig` (Ed25519 over the manifest's bytes), `img/`
(CRIU's images), `fs/` (the sandbox's file system changes, an overlay layer), `shm/` (its /dev/shm) and `log/`.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from woodfrog.errors import IntegrityError, SpecError
from woodfrog.spec import from_dict, to_dict
from woodfrog.store.files import write_atomic

__all__ = ["FORMAT", "FileEntry", "Manifest", "SigningKey", "decode", "encode"]

FORMAT = 1


@dataclass(frozen=True)
class FileEntry:
    """A file of the snapshot; `path` is relative to its directory."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    format: int
    id: str
    function_key: str
    worker_class: str
    """Digest of what must match where it is restored."""
    host: dict[str, str]
    """The parts the worker class is made of, by name."""
    app: str
    tag: str
    params_digest: str
    created: float
    """Unix time, seconds."""
    root_pid: int
    """Pid of the worker inside its sandbox."""
    tasks: int
    pages_bytes: int
    """Bytes of memory in the images."""
    fs_bytes: int
    files: tuple[FileEntry, ...]
    """Every file of `img/`, `fs/` and `shm/` with its digest, in the order of `catalogue.inventory`."""
    links: dict[str, str] = field(default_factory=dict)
    """Kind, mode, owner, target: of directories, symlinks and devices, and of the files in `fs/` and `shm/`."""
    external: tuple[str, ...] = ()
    """Files outside the sandbox that are mapped or open: `path|size|mtime_ns`. They must be unchanged at a restore."""
    warnings: tuple[str, ...] = ()
    """What the snapshot does not keep, one line each."""
    phases: tuple[str, ...] = ()
    """How the capture spent its time: `name=ms`."""
    kind: str = "function"
    """"function" or "zygote": a worker with nothing but imports, which functions start from."""
    modules: tuple[str, ...] = ()
    """A zygote's imports, in order."""
    seen: tuple[str, ...] = ()
    """Every top-level module that they looked for; a program that has one of these names cannot start from it."""


def encode(manifest: Manifest) -> bytes:
    """The manifest's bytes: canonical JSON."""
    return json.dumps(to_dict(manifest), sort_keys=True, indent=1).encode() + b"\n"


def decode(data: bytes) -> Manifest:
    """Read a manifest back.

    Raises:
        IntegrityError: not a manifest of a format this version knows.
    """
    try:
        raw: Any = json.loads(data)
    except ValueError as e:
        raise IntegrityError(f"manifest is not JSON: {e}", code="bad-manifest") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        known = raw.get("format") if isinstance(raw, dict) else None
        raise IntegrityError(f"manifest of format {known!r}; this version reads {FORMAT}", code="bad-manifest")
    try:
        return from_dict(Manifest, raw)
    except SpecError as e:
        raise IntegrityError(f"manifest is damaged: {e.message}", code="bad-manifest") from None


class SigningKey:
    """This machine's Ed25519 key. Restoring an image is running code: only what this key signed is restored."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self._public: Ed25519PublicKey = private.public_key()

    @classmethod
    def load_or_create(cls, path: Path) -> SigningKey:
        """Read the key at `path` (mode 0600), making one on first use.

        Raises:
            IntegrityError: the file is not a key, or others may read it.
        """
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            private = Ed25519PrivateKey.generate()
            write_atomic(path, private.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption()))
            return cls(private)
        if os.stat(path).st_mode & 0o077:
            raise IntegrityError(
                f"{path}: others may read the signing key; chmod 600 it, or remove it and its snapshots"
            )
        try:
            return cls(Ed25519PrivateKey.from_private_bytes(path.read_bytes()))
        except ValueError:
            raise IntegrityError(f"{path}: not an Ed25519 key; remove it (snapshots will be made anew)") from None

    def sign(self, data: bytes) -> bytes:
        return self._private.sign(data)

    def verify(self, data: bytes, signature: bytes, what: str) -> None:
        """Check a signature.

        Raises:
            IntegrityError: it is not this machine's signature over `data`.
        """
        try:
            self._public.verify(signature, data)
        except InvalidSignature:
            raise IntegrityError(
                f"{what}: signature does not match; it was altered or made elsewhere", code="bad-signature"
            ) from None
