"""A small directory tree as one cold file, and back, exactly: owners, modes, times to the nanosecond, extended
attributes, hard links, symbolic links, devices, sockets, and the holes of sparse files.

Meant for overlayfs layers, whose whiteouts are character devices 0/0 and whose opaque directories are
`trusted.overlay.*` attributes. Inside is an ordinary POSIX (pax) archive with the attributes as `SCHILY.xattr.*` and
sparse files as GNU format 1.0, so that `tar --xattrs --xattrs-include='*'` lists and unpacks it too. It is written and
read with `tarfile` and not with the system's tar: a bundle from a bucket is not trusted before its snapshot's
manifest has been checked, so every name is resolved here, one directory descriptor at a time, never through a link.
"""

from __future__ import annotations

import errno
import os
import stat
import tarfile
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, cast

from woodfrog.errors import IntegrityError, StoreError
from woodfrog.store.chunks import LARGE, Large
from woodfrog.store.cold import LEVEL, Key, decode_stream, encode_stream, replacing
from woodfrog.store.files import Member, remove_tree, store_error

__all__ = ["large_files", "pack_tree", "unpack_tree"]

_XATTR = "SCHILY.xattr."
_SOCKET = "WOODFROG.socket"
_CHUNKS = "WOODFROG.chunks"
_HOST_XATTRS = ("security.selinux", "security.ima", "security.evm")
"""What the host's own policy puts on every file; another host puts its own."""
_XATTRS = ("user.", "trusted.overlay.", "security.capability", "system.posix_acl_")
_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MOST_STORED = 8**11 - 1
_PIECE = 1 << 20


def pack_tree(
    root: Path, target: Path, *, key: Key | None, level: int = LEVEL, send: Callable[[Path], Large] | None = None
) -> int:
    """Write all of the directory `root`, itself included, to the cold file `target`; returns the file's size in bytes.

    The same tree gives the same content, whatever the order on disk. Of the extended attributes, those that the host's
    own policy gives (SELinux labels, IMA) are left out.

    Args:
        send: takes the contents of large files elsewhere; the archive then only says what they consist of.

    Raises:
        StoreError: something cannot be read or written, or changed meanwhile.
    """
    with tempfile.TemporaryFile(dir=target.parent) as plain:
        try:
            with tarfile.open(
                fileobj=plain, mode="w", format=tarfile.PAX_FORMAT, encoding="utf-8", errors="surrogateescape"
            ) as archive:
                seen: dict[tuple[int, int], str] = {}
                for path, name in _walk(root):
                    _add(archive, path, name, seen, send)
        except OSError as e:
            raise store_error("cannot pack", Path(e.filename or root), e) from e
        plain.seek(0)
        with replacing(target) as out:
            return encode_stream(plain, out, str(root), key=key, level=level)


def unpack_tree(
    source: Path,
    root: Path,
    *,
    key: Key | None,
    devices: bool = False,
    bring: Callable[[str, Large, int], None] | None = None,
) -> None:
    """Unpack a bundle to the directory `root`, which must not exist or be empty; it appears whole or not at all.

    Nothing is ever written outside of it, whatever the bundle says. Other owners than the caller, devices and
    `trusted.*` attributes need root.

    Args:
        devices: let device nodes through; otherwise only whiteouts (character device 0/0) are made.
        bring: writes the content of a file that is not in the archive: its path in the tree, what it consists of, a
            descriptor.

    Raises:
        IntegrityError: altered, encrypted with another key, or a name, link or device that no honest bundle has.
        StoreError: something cannot be written, `root` is not empty.
    """
    staging = root.with_name(f".{root.name}.{uuid.uuid4().hex}")
    try:
        with tempfile.TemporaryFile(dir=root.parent) as plain:
            decode_stream(source, plain, key=key)
            plain.seek(0)
            os.mkdir(staging, 0o700)
            try:
                _unpack(plain, staging, str(source), devices, bring)
                os.rename(staging, root)
            except BaseException:
                remove_tree(staging)
                raise
    except OSError as e:
        if e.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise StoreError(f"cannot unpack to {root}: it is not empty", path=str(root)) from None
        if isinstance(e, PermissionError):
            raise StoreError(
                f"cannot unpack to {root}: {e.strerror} ({e.filename or 'owner, device or attribute'}); it needs root",
                path=str(root),
            ) from e
        raise store_error("cannot unpack", root, e) from e


def large_files(source: Path, *, key: Key | None) -> list[Large]:
    """The files whose contents are not in a bundle.

    Raises:
        IntegrityError: altered, or encrypted with another key.
        StoreError: it cannot be read.
    """
    try:
        with tempfile.TemporaryFile(dir=source.parent) as plain:
            decode_stream(source, plain, key=key)
            plain.seek(0)
            with _open(plain) as archive:
                texts = [text for member in archive if (text := member.pax_headers.get(_CHUNKS)) is not None]
            return [Large.parse(text) for text in texts]
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as e:
        raise IntegrityError(f"{source}: not a bundle: {e}", code="bad-bundle") from None
    except OSError as e:
        raise store_error("cannot read", source, e) from e


# -- packing -------------------------------------------------------------------------------------------------------


def _walk(root: Path) -> Iterator[tuple[Path, str]]:
    """Every path below `root` and its name in the bundle, directories before what is in them."""
    waiting = [(root, ".")]
    while waiting:
        path, name = waiting.pop()
        yield path, name
        if stat.S_ISDIR(os.lstat(path).st_mode):
            below = sorted(os.listdir(path), key=os.fsencode, reverse=True)
            waiting += [(path / entry, f"{name}/{entry}") for entry in below]


def _add(
    archive: tarfile.TarFile,
    path: Path,
    name: str,
    seen: dict[tuple[int, int], str],
    send: Callable[[Path], Large] | None,
) -> None:
    info = os.lstat(path)
    member = tarfile.TarInfo(name)
    member.mode, member.uid, member.gid = stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid
    second, nanosecond = divmod(info.st_mtime_ns, 10**9)
    if second < 0 and nanosecond:  # written as a decimal fraction, which rounds the other way below zero
        second, nanosecond = second + 1, 10**9 - nanosecond
        text = f"-{-second}.{nanosecond:09d}"
    else:
        text = f"{second}.{nanosecond:09d}"
    headers = {"mtime": text}
    member.pax_headers = headers

    identity = (info.st_dev, info.st_ino)
    if not stat.S_ISDIR(info.st_mode) and info.st_nlink > 1:
        if (first := seen.get(identity)) is not None:
            member.type, member.linkname = tarfile.LNKTYPE, first
            archive.addfile(member)
            return
        seen[identity] = name

    for attribute in os.listxattr(path, follow_symlinks=False):
        if attribute not in _HOST_XATTRS:
            value = os.getxattr(path, attribute, follow_symlinks=False)
            headers[_XATTR + attribute] = value.decode("utf-8", "surrogateescape")

    match stat.S_IFMT(info.st_mode):
        case stat.S_IFREG if send is not None and info.st_size >= LARGE:
            headers[_CHUNKS] = send(path).text()
        case stat.S_IFREG:
            _add_file(archive, member, path, info)
            return
        case stat.S_IFDIR:
            member.type = tarfile.DIRTYPE
        case stat.S_IFLNK:
            member.type, member.linkname = tarfile.SYMTYPE, os.readlink(path)
        case stat.S_IFCHR | stat.S_IFBLK as kind:
            member.type = tarfile.CHRTYPE if kind == stat.S_IFCHR else tarfile.BLKTYPE
            member.devmajor, member.devminor = os.major(info.st_rdev), os.minor(info.st_rdev)
        case stat.S_IFIFO:
            member.type = tarfile.FIFOTYPE
        case stat.S_IFSOCK:
            headers[_SOCKET] = "1"
        case _:
            raise StoreError(f"cannot pack {path}: of unknown kind", path=str(path))
    archive.addfile(member)


def _add_file(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path, info: os.stat_result) -> None:
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb", buffering=0) as f:
        size = info.st_size
        parts = _data(f.fileno(), size)
        stored = sum(length for _, length in parts)
        prefix = b""
        member.size = size
        if stored < size and stored < _MOST_STORED - (1 << 20):
            if not parts or sum(parts[-1]) < size:
                parts.append((size, 0))
            prefix = "".join([f"{len(parts)}\n", *(f"{offset}\n{length}\n" for offset, length in parts)]).encode()
            prefix += bytes(-len(prefix) % 512)
            sparse = {
                "GNU.sparse.major": "1",
                "GNU.sparse.minor": "0",
                "GNU.sparse.name": member.name,
                "GNU.sparse.realsize": str(size),
            }
            member.pax_headers = {**member.pax_headers, **sparse}
            # Short, so that no "path" record is written, which readers would take instead of the sparse name.
            member.name, member.size = "GNUSparseFile.0/file", len(prefix) + stored
        else:
            parts = [(0, size)]
        try:
            archive.addfile(member, _Parts(f.fileno(), prefix, parts))  # type: ignore[arg-type]
        except OSError as e:
            if e.errno is None:  # tarfile's own: fewer bytes than the size says
                raise StoreError(f"cannot pack {path}: it changed meanwhile", code="changed", path=str(path)) from None
            raise


def _data(fd: int, size: int) -> list[tuple[int, int]]:
    """The parts of a file that are not holes: (offset, length)."""
    parts = []
    end = 0
    while end < size:
        try:
            begin = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as e:
            if e.errno == errno.ENXIO:
                break
            raise
        end = min(os.lseek(fd, begin, os.SEEK_HOLE), size)
        if begin >= end:
            break
        parts.append((begin, end - begin))
    return parts


class _Parts:
    """Reads a prefix, then parts of a file one after the other."""

    def __init__(self, fd: int, prefix: bytes, parts: list[tuple[int, int]]) -> None:
        self.fd, self.prefix, self.parts = fd, prefix, [part for part in parts if part[1]]

    def read(self, size: int) -> bytes:
        pieces = []
        if self.prefix:
            pieces.append(self.prefix[:size])
            self.prefix = self.prefix[size:]
            size -= len(pieces[0])
        while size and self.parts:
            offset, length = self.parts[0]
            piece = os.pread(self.fd, min(size, length), offset)
            if not piece:
                break
            pieces.append(piece)
            size -= len(piece)
            if len(piece) == length:
                self.parts.pop(0)
            else:
                self.parts[0] = (offset + len(piece), length - len(piece))
        return b"".join(pieces)


# -- unpacking -----------------------------------------------------------------------------------------------------


def _open(plain: IO[bytes]) -> tarfile.TarFile:
    return tarfile.open(fileobj=plain, mode="r:", encoding="utf-8", errors="surrogateescape", tarinfo=Member)


def _unpack(
    plain: IO[bytes], staging: Path, what: str, devices: bool, bring: Callable[[str, Large, int], None] | None
) -> None:
    """Write everything below `staging`, an empty directory of ours that nobody else writes to."""
    top = os.open(staging, _FOLDER)
    folders: list[tuple[str, tarfile.TarInfo]] = []
    at = -1
    try:
        with _open(plain) as archive:
            for member in archive:
                name = member.pax_headers.get("GNU.sparse.name", member.name) if member.issparse() else member.name
                if member.offset <= at or member.size < 0:
                    raise _refused(what, name, "leads back")
                at = member.offset
                member.name = name
                if name == "." and member.isdir() and not folders:
                    folders.append((name, member))
                    continue
                _make(archive, member, top, what, devices, bring)
                if member.isdir():
                    folders.append((name, member))
        if not folders or folders[0][0] != ".":
            raise _refused(what, ".", "is missing")
        for name, member in reversed(folders):  # filling a directory changes its times, and a mode may forbid it
            fd = os.open(".", _FOLDER, dir_fd=top) if name == "." else _open_folder(top, _parts(name, what), what)
            try:
                _dress(member, fd, what)
            finally:
                os.close(fd)
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as e:
        raise IntegrityError(f"{what}: not a bundle: {e}", code="bad-bundle") from None
    finally:
        os.close(top)


def _refused(what: str, name: str, why: str) -> IntegrityError:
    return IntegrityError(f"{what}: {name[:200]!r} {why}; it is not unpacked", code="bad-bundle")


def _parts(name: str, what: str) -> list[str]:
    parts = name.removeprefix("./").split("/")
    if name.startswith("/") or "\0" in name or not all(part not in ("", ".", "..") for part in parts):
        raise _refused(what, name, "leads out of the tree")
    return parts


def _open_folder(top: int, parts: list[str], what: str) -> int:
    """Open a directory below `top`. A link on the way is refused, not followed."""
    fd = os.dup(top)
    for part in parts:
        try:
            below = os.open(part, _FOLDER, dir_fd=fd)
        except OSError as e:
            if e.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENOENT):
                raise _refused(what, "/".join(parts), "is no directory of the bundle") from None
            raise
        finally:
            os.close(fd)
        fd = below
    return fd


def _make(
    archive: tarfile.TarFile,
    member: tarfile.TarInfo,
    top: int,
    what: str,
    devices: bool,
    bring: Callable[[str, Large, int], None] | None,
) -> None:
    *above, last = _parts(member.name, what)
    folder = _open_folder(top, above, what)
    try:
        if member.isdir():
            os.mkdir(last, 0o700, dir_fd=folder)
            return
        if member.islnk():
            *link_above, link_last = _parts(member.linkname, what)
            link_folder = _open_folder(top, link_above, what)
            try:
                if stat.S_ISDIR(os.stat(link_last, dir_fd=link_folder, follow_symlinks=False).st_mode):
                    raise _refused(what, member.name, "is a hard link to a directory")
                os.link(link_last, last, src_dir_fd=link_folder, dst_dir_fd=folder, follow_symlinks=False)
            except FileNotFoundError:
                raise _refused(what, member.name, "is a hard link to nothing") from None
            finally:
                os.close(link_folder)
            return
        if member.issym():
            if not member.linkname or "\0" in member.linkname:
                raise _refused(what, member.name, "is a link to nothing")
            os.symlink(member.linkname, last, dir_fd=folder)
        elif member.ischr() or member.isblk():
            number = os.makedev(member.devmajor, member.devminor)
            if not devices and (number or member.isblk()):
                raise _refused(what, member.name, "is a device")
            os.mknod(last, 0o600 | (stat.S_IFCHR if member.ischr() else stat.S_IFBLK), number, dir_fd=folder)
        elif member.isfifo():
            os.mkfifo(last, 0o600, dir_fd=folder)
        elif _SOCKET in member.pax_headers:
            os.mknod(last, 0o600 | stat.S_IFSOCK, dir_fd=folder)
        elif member.isreg():
            fd = os.open(last, _FILE, 0o600, dir_fd=folder)
            try:
                if _CHUNKS in member.pax_headers:
                    _fill_elsewhere(member, fd, what, bring)
                else:
                    _fill(archive, member, fd, what)
                _dress(member, fd, what)
            finally:
                os.close(fd)
            return
        else:
            raise _refused(what, member.name, "is of unknown kind")
        _dress(member, folder, what, last)
    except FileExistsError:
        raise _refused(what, member.name, "is there twice") from None
    except OSError as e:
        if e.errno in (errno.ENAMETOOLONG, errno.EINVAL):
            raise _refused(what, member.name, "cannot be made") from None
        raise
    finally:
        os.close(folder)


def _fill_elsewhere(
    member: tarfile.TarInfo, fd: int, what: str, bring: Callable[[str, Large, int], None] | None
) -> None:
    if bring is None or member.size:
        raise _refused(what, member.name, "has its content elsewhere")
    try:
        large = Large.parse(member.pax_headers[_CHUNKS])
    except ValueError:
        raise _refused(what, member.name, "has its content nowhere") from None
    bring("/".join(_parts(member.name, what)), large, fd)


def _fill(archive: tarfile.TarFile, member: tarfile.TarInfo, fd: int, what: str) -> None:
    content = archive.extractfile(member)
    assert content is not None
    os.ftruncate(fd, member.size)
    parts = cast(list[tuple[int, int]] | None, member.sparse) or [(0, member.size)]
    for begin, length in parts:
        if begin < 0 or length < 0 or begin + length > member.size:
            raise _refused(what, member.name, "has data outside of itself")
        content.seek(begin)
        while length:
            piece = content.read(min(length, _PIECE))
            if not piece:
                raise _refused(what, member.name, "is cut off")
            view = memoryview(piece)
            while view:
                count = os.pwrite(fd, view, begin)
                view, begin, length = view[count:], begin + count, length - count


def _dress(member: tarfile.TarInfo, fd: int, what: str, last: str | None = None) -> None:
    """Give owner, attributes, mode and time: to `fd`, or to `last` in the directory `fd` where it cannot be opened."""
    # /proc names what has no descriptor of its own: there is no lsetxattrat before Linux 6.13.
    path: int | str = fd if last is None else f"/proc/self/fd/{fd}/{last}"
    follow = last is None
    info = os.stat(path, follow_symlinks=follow)
    if (info.st_uid, info.st_gid) != (member.uid, member.gid):
        os.chown(path, member.uid, member.gid, follow_symlinks=follow)  # clears set-user-ID bits and capabilities
    for attribute, value in member.pax_headers.items():
        if attribute.startswith(_XATTR):
            attribute = attribute.removeprefix(_XATTR)
            if not attribute.startswith(_XATTRS):
                raise _refused(what, member.name, f"has the attribute {attribute[:80]!r}")
            os.setxattr(path, attribute, value.encode("utf-8", "surrogateescape"), follow_symlinks=follow)
    if not member.issym():
        os.chmod(path, stat.S_IMODE(member.mode))  # after the attributes: it may forbid them
    moment = _nanoseconds(member.pax_headers.get("mtime", str(member.mtime)))
    os.utime(path, ns=(moment, moment), follow_symlinks=follow)


def _nanoseconds(text: str) -> int:
    whole, _, fraction = text.partition(".")
    sign = -1 if whole.startswith("-") else 1
    return int(whole) * 10**9 + sign * int(f"{fraction[:9]:0<9}" if fraction else 0)
