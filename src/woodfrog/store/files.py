"""Durable file operations: nothing half-written is ever visible under its final name."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tarfile
import uuid
from pathlib import Path

from woodfrog.errors import StoreError

__all__ = [
    "FREE_SOME",
    "Member",
    "fsync_dir",
    "fsync_tree",
    "remove_tree",
    "sha256_file",
    "store_error",
    "write_atomic",
]

FREE_SOME = (
    "free some (`woodfrog volume rm`, `woodfrog volume delete`, `woodfrog result delete`, "
    "`woodfrog snapshot gc --rebuilt`, `woodfrog snapshot invalidate`)"
)
"""What makes room in a state directory."""
_HOLES = 16 << 20
"""With so many bytes of holes a file is read around them."""
_ZEROES = memoryview(bytes(1 << 20))


def store_error(what: str, path: Path, error: OSError) -> StoreError:
    """One line that says what could not be stored, where and why."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreError(
            f"{what}: no space left at {path.parent}; {FREE_SOME} or set WOODFROG_HOME to a larger disk",
            code="disk-full",
            path=str(path),
        )
    return StoreError(f"{what}: {path}: {error.strerror or error}", path=str(path))


class Member(tarfile.TarInfo):
    """For `tarfile.open(tarinfo=...)`: raises ReadError for a header that cannot be read, and where the end is missing.

    `tarfile` alone takes both for the end of the archive, and says nothing of what may come behind it.
    """

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Member:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.HeaderError as e:
            if isinstance(e, tarfile.EOFHeaderError):  # type: ignore[attr-defined]
                raise
            raise tarfile.ReadError(f"cut off or damaged: {e}") from None


def fsync_dir(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_tree(root: Path) -> None:
    """Make every file and directory below `root` durable."""

    def fail(error: OSError) -> None:
        raise error

    for folder, _, names in os.walk(root, onerror=fail):
        for name in names:
            path = os.path.join(folder, name)
            if not os.path.isfile(path) or os.path.islink(path):
                continue
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        fsync_dir(Path(folder))


def write_atomic(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Write `data` so that `path` holds either its old content or all of the new, also after a power loss.

    Raises:
        StoreError: the disk is full or the directory cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            with os.fdopen(fd, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            os.rename(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_dir(path.parent)
    except OSError as e:
        raise store_error("cannot write", path, e) from e


def sha256_file(path: Path) -> str:
    """sha256 of a file's content, in hex. Its holes are not read: that takes four times as long as to hash zeroes, and
    fills the page cache with them."""
    with open(path, "rb", buffering=0) as f:
        info = os.fstat(f.fileno())
        if info.st_size - 512 * info.st_blocks < _HOLES:
            return hashlib.file_digest(f, "sha256").hexdigest()
        digest, at = hashlib.sha256(), 0
        buffer = bytearray(256 << 10)
        while at < info.st_size:
            begin, end = _data_from(f.fileno(), at, info.st_size)
            for zeroes in range(at, begin, len(_ZEROES)):
                digest.update(_ZEROES[: begin - zeroes])
            f.seek(begin)
            at = begin
            while at < end:
                count = f.readinto(memoryview(buffer)[: end - at])
                if not count:  # it is being truncated: not the file that was meant
                    return digest.hexdigest()
                digest.update(memoryview(buffer)[:count])
                at += count
        return digest.hexdigest()


def _data_from(fd: int, at: int, size: int) -> tuple[int, int]:
    """Where the next data begins, and the hole behind it; the end of the file for both where there is none."""
    try:
        begin = os.lseek(fd, at, os.SEEK_DATA)
    except OSError as e:
        if e.errno != errno.ENXIO:
            raise
        return size, size
    return begin, min(os.lseek(fd, begin, os.SEEK_HOLE), size)


def remove_tree(path: Path) -> None:
    """Remove a directory and all below it, or a file; one that is gone already is fine.

    Raises:
        OSError: something is left.
    """
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
        return
    shutil.rmtree(path, ignore_errors=False, onerror=_ignore_missing)


def _ignore_missing(function: object, path: str, info: tuple[type, BaseException, object]) -> None:
    if not isinstance(info[1], FileNotFoundError):
        raise info[1]
