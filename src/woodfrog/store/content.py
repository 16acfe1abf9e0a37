"""Content-addressed blobs (pickled functions) and source trees, as sent by clients.

A name is the sha256 of the bytes; what does not match its name is refused, so a name seen here can be trusted.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tarfile
import uuid
from pathlib import Path

from woodfrog.errors import NotFoundError, SpecError
from woodfrog.store.files import fsync_dir, fsync_tree, remove_tree, store_error, write_atomic

__all__ = ["ContentStore"]

_DIGEST = re.compile(r"^[0-9a-f]{64}$")


def _check(digest: str, data: bytes) -> None:
    if not _DIGEST.match(digest):
        raise SpecError(f"{digest!r} is not a sha256 digest", code="bad-digest")
    if hashlib.sha256(data).hexdigest() != digest:
        raise SpecError(f"content does not match its digest {digest[:12]}…; send it again", code="bad-digest")


class ContentStore:
    """Blobs in `<root>/blobs`, unpacked source trees in `<root>/code`."""

    def __init__(self, root: Path) -> None:
        self.blobs = root / "blobs"
        self.code = root / "code"
        for folder in (self.blobs, self.code):
            folder.mkdir(parents=True, exist_ok=True)
        os.chmod(self.blobs, 0o700)
        for leftover in [*self.code.glob(".*"), *self.blobs.glob(".*")]:
            remove_tree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)

    def has_blob(self, digest: str) -> bool:
        return bool(_DIGEST.match(digest)) and (self.blobs / digest).is_file()

    def put_blob(self, digest: str, data: bytes) -> None:
        """Store a blob.

        Raises:
            SpecError: the content does not match the digest.
            StoreError: it could not be written.
        """
        _check(digest, data)
        if not self.has_blob(digest):
            write_atomic(self.blobs / digest, data)

    def get_blob(self, digest: str) -> bytes:
        if not self.has_blob(digest):
            raise NotFoundError(f"no blob {digest[:12]}…: deploy the app again", digest=digest)
        return (self.blobs / digest).read_bytes()

    def has_code(self, digest: str) -> bool:
        return bool(_DIGEST.match(digest)) and (self.code / digest).is_dir()

    def put_code(self, digest: str, tar: bytes) -> None:
        """Unpack a source tree; readable by the worker, writable by nobody else.

        Raises:
            SpecError: wrong digest, not a tar, or members that leave the tree.
            StoreError: it could not be written.
        """
        _check(digest, tar)
        if self.has_code(digest):
            return
        staging = self.code / f".{digest}.{uuid.uuid4().hex}"
        try:
            try:
                staging.mkdir()
                with tarfile.open(fileobj=io.BytesIO(tar), mode="r:") as archive:
                    archive.extractall(staging, filter="data")
                os.chmod(staging, 0o755)
                fsync_tree(staging)
                os.rename(staging, self.code / digest)
                fsync_dir(self.code)
            except OSError as e:
                if self.has_code(digest):  # another deploy of the same tree was first
                    remove_tree(staging)
                    return
                raise store_error("cannot store the source", self.code / digest, e) from e
            except tarfile.TarError as e:
                raise SpecError(f"the source archive is not usable: {e}", code="bad-archive") from e
        except BaseException:
            remove_tree(staging)
            raise

    def code_path(self, digest: str) -> Path:
        if not self.has_code(digest):
            raise NotFoundError(f"no source {digest[:12]}…: deploy the app again", digest=digest)
        return self.code / digest
