"""The manifest: what a snapshot is, small, versioned, readable alone, and signed.

A snapshot is a directory `<id>/` with `manifest.json`, `manifest.sig` (Ed25519 over the manifest's bytes), `img/`
(CRIU's images), `fs/` (the sandbox's file system changes, an overlay layer), `shm/` (its /dev/shm) and `log/`.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from blake3 import blake3
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from woodfrog.errors import IntegrityError, SpecError
from woodfrog.spec import from_dict, to_dict
from woodfrog.store.files import write_atomic

__all__ = ["FORMAT", "FileEntry", "Manifest", "SigningKey", "decode", "encode", "external_file"]

FORMAT = 2
_SHA256 = 64


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
    """Files outside the sandbox that are mapped or open: `path|size|mtime_ns`, and `|sha256` in one that travels. They
    must be unchanged at a restore."""
    warnings: tuple[str, ...] = ()
    """What the snapshot does not keep, one line each."""
    phases: tuple[str, ...] = ()
    """How the capture spent its time: `name=ms`."""
    gpu_bytes: dict[str, int] = field(default_factory=dict)
    """Of `pages_bytes`, what was on GPUs, by what it is."""
    kind: str = "function"
    """"function" or "zygote": a worker with nothing but imports, which functions start from."""
    modules: tuple[str, ...] = ()
    """A zygote's imports, in order."""
    seen: tuple[str, ...] = ()
    """Every top-level module that they looked for; a program that has one of these names cannot start from it."""
    parent: str = ""
    """Id of the snapshot its process was thawed from before it became what it is: most pages are as they are there."""
    form: str = "loose"
    """"loose": the memory is in `img/`; "packed": it is in the page store's `packs`."""
    images: str = "img"
    """The directory of CRIU's images."""
    packs: tuple[str, ...] = ()
    """Every pack that its page index names."""
    stored_bytes: int = 0
    """What packing it added to the store, in bytes."""


def external_file(entry: str) -> tuple[str, int, int, str]:
    """Path, size, mtime in ns and digest ("" where it has none) of an entry of `Manifest.external`."""
    rest, _, last = entry.rpartition("|")
    digest = last if len(last) == _SHA256 else ""
    path, size, mtime = (rest if digest else entry).rsplit("|", 2)
    return path, int(size), int(mtime), digest


def encode(manifest: Manifest) -> bytes:
    """The manifest's bytes: canonical JSON."""
    return json.dumps(to_dict(manifest), sort_keys=True, indent=1).encode() + b"\n"


@lru_cache(maxsize=128)
def decode(data: bytes) -> Manifest:
    """Read a manifest back. The same bytes give the same object: every thaw reads one.

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
        manifest = from_dict(Manifest, raw)
        for entry in manifest.external:
            external_file(entry)
    except (SpecError, ValueError) as e:
        raise IntegrityError(f"manifest is damaged: {e}", code="bad-manifest") from None
    if manifest.form not in ("loose", "packed") or not re.fullmatch(r"img[a-z-]*", manifest.images):
        raise IntegrityError(f"manifest is damaged: form {manifest.form!r}", code="bad-manifest")
    return manifest


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

    @property
    def public(self) -> bytes:
        """The raw public key, 32 bytes: what other machines trust."""
        return self._public.public_bytes(Encoding.Raw, PublicFormat.Raw)

    def derive(self, purpose: str) -> bytes:
        """32 secret bytes for something else of this machine, from which the key cannot be found."""
        raw = self._private.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
        return blake3(raw, derive_key_context=f"woodfrog {purpose}").digest()

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
