"""Content-addressed blobs (pickled functions) and source trees, as sent by clients.

A name is the sha256 of the bytes; what does not match its name is refused, so a name seen here can be trusted.
"""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import os
import re
import shutil
import tarfile
import time
import uuid
from contextlib import suppress
from pathlib import Path

from woodfrog.errors import NotFoundError, SpecError
from woodfrog.store.files import Member, fsync_dir, fsync_tree, remove_tree, store_error, write_atomic

__all__ = ["ContentStore"]

log = logging.getLogger("woodfrog")

CODE = "app"
"""Where code is in its layer."""
_LAYER = ".layer"
_DIGEST = re.compile(r"[0-9a-f]{64}\Z")
_DEEPEST = 256
"""Python's own functions for trees, which remove them again, are recursive."""
_BAD_NAME = (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)


def _unusable(why: object) -> SpecError:
    return SpecError(f"the source archive is not usable: {why}", code="bad-archive")


def _inside(root: Path, name: str) -> Path:
    parts = Path(name).parts
    if name.startswith("/") or ".." in parts or "\0" in name:
        raise _unusable(f"{name!r} leads out of the tree")
    if len(parts) > _DEEPEST:
        raise _unusable(f"{name[:80]!r}… lies more than {_DEEPEST} directories deep")
    return root.joinpath(*parts)


def _unpack(tar: bytes, root: Path) -> None:
    """Write the archive's files, then its links: while files are written there is no link to write through.

    `tarfile`'s own extraction is not used: its filters had holes in several releases, and the daemon is root.
    """
    links: dict[Path, str] = {}
    with tarfile.open(fileobj=io.BytesIO(tar), mode="r:", tarinfo=Member) as archive:
        for member in archive:
            path = _inside(root, member.name)
            if member.isdir():
                path.mkdir(parents=True, exist_ok=True)
            elif member.issym():
                if not member.linkname or member.linkname.startswith("/"):
                    raise _unusable(f"the link {member.name!r} leads out of the tree")
                links[path] = member.linkname
            elif member.isreg() and not member.issparse():
                path.parent.mkdir(parents=True, exist_ok=True)
                content = archive.extractfile(member)
                assert content is not None
                with open(path, "wb") as f:
                    shutil.copyfileobj(content, f)
                os.chmod(path, 0o755 if member.mode & 0o100 else 0o644)
                os.utime(path, (max(member.mtime, 0), max(member.mtime, 0)))
            else:
                raise _unusable(f"{member.name!r} is not a file, directory or symbolic link")
    for path in links:
        path.parent.mkdir(parents=True, exist_ok=True)  # all before the first link: none can come through another
    for path, target in links.items():
        os.symlink(target, path)
    real = root.resolve()
    for path in links:
        if not Path(os.path.realpath(path)).is_relative_to(real):
            raise _unusable(f"the link {str(path.relative_to(root))!r} leads out of the tree")
    for folder, _, _ in os.walk(root):
        os.chmod(folder, 0o755)  # whatever the daemon's umask


def _give(tree: Path, owner: int) -> None:
    """Whoever runs a copy of it may change the copy."""
    for folder, _, files in os.walk(tree):
        for path in (folder, *(os.path.join(folder, name) for name in files)):
            os.chown(path, owner, owner, follow_symlinks=False)


def _check(digest: str, data: bytes) -> None:
    if not _DIGEST.match(digest):
        raise SpecError(f"{digest!r} is not a sha256 digest", code="bad-digest")
    if hashlib.sha256(data).hexdigest() != digest:
        raise SpecError(f"content does not match its digest {digest[:12]}…; send it again", code="bad-digest")


def _asked_for(path: Path) -> None:
    """Whoever asks is about to use it. The access time says so: nothing that runs on the tree looks at that."""
    with suppress(OSError):
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


class ContentStore:
    """Blobs in `<root>/blobs`, what clients send with their code in `<root>/code`: layers of sandboxes' roots.

    Args:
        owner: user and group of the source trees; the caller's own unless given.
    """

    def __init__(self, root: Path, owner: int | None = None) -> None:
        self._owner = owner
        self.blobs = root / "blobs"
        self.code = root / "code"
        for folder in (self.blobs, self.code):
            folder.mkdir(parents=True, exist_ok=True)
        os.chmod(self.blobs, 0o700)
        os.chmod(self.code, 0o700)
        for leftover in [*self.code.glob(".*"), *self.blobs.glob(".*")]:
            remove_tree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
        self._take_up_older()

    def _take_up_older(self) -> None:
        """Versions before layers kept a source tree under its digest alone. Deployed apps are not to lose it."""
        for tree in [path for path in self.code.iterdir() if _DIGEST.match(path.name)]:
            place = self._layer(tree.name) / CODE
            if place.exists():  # an older version was here once more, and has unpacked its own
                remove_tree(tree)
                continue
            try:
                if self._owner is not None:
                    _give(tree, self._owner)
                place.parent.mkdir(mode=0o755, exist_ok=True)
                os.rename(tree, place)
            except OSError as e:  # a full disk: the next start tries again
                log.warning("code of an older version is not taken up: %s: %s", tree, e)

    def has_blob(self, digest: str) -> bool:
        found = bool(_DIGEST.match(digest)) and (self.blobs / digest).is_file()
        if found:
            _asked_for(self.blobs / digest)
        return found

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
        found = bool(_DIGEST.match(digest)) and self._layer(digest).is_dir()
        if found:
            _asked_for(self._layer(digest))
        return found

    def put_code(self, digest: str, tar: bytes) -> None:
        """Unpack a source tree.

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
                (staging / CODE).mkdir(parents=True)
                _unpack(tar, staging)
                if self._owner is not None:
                    _give(staging, self._owner)
                fsync_tree(staging)
                os.rename(staging, self._layer(digest))
                fsync_dir(self.code)
            except OSError as e:
                if self.has_code(digest):  # another deploy of the same tree was first
                    remove_tree(staging)
                    return
                if e.errno in _BAD_NAME:
                    raise _unusable(e) from e
                raise store_error("cannot store the source", self._layer(digest), e) from e
            except (tarfile.TarError, ValueError, OverflowError, EOFError) as e:
                raise _unusable(e) from e
        except BaseException:
            remove_tree(staging)
            raise

    def _layer(self, digest: str) -> Path:
        return self.code / f"{digest}{_LAYER}"

    def code_path(self, digest: str) -> Path:
        """Where the source tree is; its parent is the layer of a sandbox's root that it was sent in."""
        if not self.has_code(digest):
            raise NotFoundError(f"no source {digest[:12]}…: deploy the app again", digest=digest)
        return self._layer(digest) / CODE

    def set_aside(self, needed: set[str], before: float) -> list[Path]:
        """Take away what is not needed and was not asked for since `before` (Unix time).

        Returns:
            What is still to be removed; nobody finds it any more. What is left of it goes at the next start.
        """
        aside = []
        for folder in (self.code, self.blobs):
            with os.scandir(folder) as entries:
                old = [e.name for e in entries if not e.name.startswith(".") and e.stat().st_atime < before]
            for name in (n for n in old if n.removesuffix(_LAYER) not in needed):
                path = folder / f".{name}.{uuid.uuid4().hex}"
                os.rename(folder / name, path)
                aside.append(path)
        return aside
