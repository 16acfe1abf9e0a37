"""Volumes' content over the HTTP API: list, read, write, remove.

The daemon is root, and what a volume holds was written by code that nobody trusts. So no path is ever given to the
kernel as a whole: each component is opened relative to the directory before it, and no symbolic link is followed.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import json
import logging
import os
import re
import secrets
import stat
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from fastapi import FastAPI, Query, Request
from fastapi.responses import StreamingResponse

from woodfrog.daemon.names import check_name
from woodfrog.errors import FileMissing, FileTaken, NotFoundError, SpecError, StoreError, WoodfrogError
from woodfrog.spec import VolumeMount

if TYPE_CHECKING:
    from woodfrog.daemon.controller import Controller

__all__ = ["Upload", "VolumeFiles", "add_routes"]

log = logging.getLogger("woodfrog")

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OWN = re.compile(r"\.woodfrog-tmp-[0-9a-f]{16}")
"""What is on its way into a volume, or out of it, has such a name at its top. Listings leave it out."""
_PIECE = 1 << 20
_DEEPEST = 256
_MOST = 1_000_000
"""Directories nested deeper, or more of them, are not listed all: each is looked up from the volume's top on."""
_AT_ONCE = 10_000
"""So many entries of a directory are held in memory, however many somebody makes."""
_BATCH = 500
"""So many entries of a listing are sent at a time."""
_KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}


def _own_name() -> str:
    return f".woodfrog-tmp-{secrets.token_hex(8)}"


def _kind(mode: int) -> str:
    return _KINDS.get(stat.S_IFMT(mode), "device")


def path_parts(path: str) -> tuple[str, ...]:
    """The components of a path within a volume, from its top on; a leading `/` makes no difference.

    Raises:
        SpecError: `..`, or what no file can be called.
    """
    parts = tuple(p for p in path.split("/") if p not in ("", "."))
    if ".." in parts:
        raise SpecError(f"{path!r}: '..' is not allowed in a path of a volume", code="bad-path")
    if any("\0" in p or not p.isprintable() for p in parts):
        # Listings show what containers have called so; nobody needs more such names.
        raise SpecError(f"{path[:80]!r}: a character that cannot stand in a path", code="bad-path")
    return parts


@contextlib.contextmanager
def _telling(where: str) -> Iterator[None]:
    """What the kernel refuses, as one of our errors."""
    try:
        yield
    except WoodfrogError:
        raise
    except FileNotFoundError:
        raise FileMissing(f"{where}: no such file or directory") from None
    except FileExistsError:
        raise FileTaken(f"{where} exists already: force=True (--force) replaces it") from None
    except IsADirectoryError:
        raise SpecError(f"{where} is a directory", code="is-directory") from None
    except OSError as e:
        if e.errno in (errno.ENOTDIR, errno.ELOOP):
            message = f"{where} is not a directory (symbolic links are not followed)"
            raise SpecError(message, code="not-directory") from None
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreError(f"{where}: no space left on the volume's disk", code="disk-full") from None
        if e.errno in (errno.ENAMETOOLONG, errno.EINVAL):
            raise SpecError(f"{where[:200]}: {e.strerror}", code="bad-path") from None
        raise StoreError(f"{where}: {e.strerror or e}") from None


class VolumeFiles:
    """The files of all volumes. Everything blocks: call it from a thread.

    Args:
        folder: where the volumes are; nobody but root may write there.
        uid: whom new files belong to: the user that functions run as.
    """

    def __init__(self, folder: Path, uid: int) -> None:
        self._folder = folder
        self._uid = uid

    def names(self) -> list[str]:
        return sorted(e.name for e in os.scandir(self._folder) if not e.name.startswith(".") and e.is_dir())

    def _top(self, name: str) -> int:
        try:
            # Root may have put a link to another disk in its place.
            return os.open(self._folder / check_name("volume", name), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            raise NotFoundError(f"no volume {name!r}: `woodfrog volume create {name}` makes it", volume=name) from None

    @contextlib.contextmanager
    def _directory(self, name: str, parts: Sequence[str], *, make: bool = False) -> Iterator[int]:
        """A descriptor of a directory in a volume.

        Args:
            make: make what is missing on the way.
        """
        fd = self._top(name)
        try:
            for number, part in enumerate(parts, 1):
                with _telling(_shown(name, parts[:number])):
                    deeper = self._step(fd, part, make)
                os.close(fd)
                fd = deeper
            yield fd
        finally:
            os.close(fd)

    def _step(self, fd: int, part: str, make: bool) -> int:
        made = False
        if make:
            with contextlib.suppress(FileExistsError):
                os.mkdir(part, 0o755, dir_fd=fd)
                made = True
        deeper = os.open(part, _DIRECTORY, dir_fd=fd)
        # Code in a container may have put another directory in its place: one that holds something is not given away.
        if made and os.fstat(deeper).st_uid == os.geteuid() and not os.listdir(deeper):
            self._give(deeper)
        return deeper

    def _give(self, fd: int) -> None:
        if os.geteuid() == 0:
            os.fchown(fd, self._uid, self._uid)

    def make(self, name: str, parts: Sequence[str]) -> None:
        """Make a directory, and those above it, where they are missing.

        Raises:
            SpecError: a link or a file is on the way.
        """
        with self._directory(name, parts, make=True):
            pass

    # Looking

    def entries(self, name: str, path: str, *, recursive: bool) -> Iterator[dict[str, Any]]:
        """What a directory holds, or the one file; a directory comes before what is in it.

        Raises:
            FileMissing: nothing of that name. From the first item on, what vanishes meanwhile is left out.
        """
        parts = path_parts(path)
        if parts:
            with self._directory(name, parts[:-1]) as fd, _telling(_shown(name, parts)):
                found = os.stat(parts[-1], dir_fd=fd, follow_symlinks=False)
            if not stat.S_ISDIR(found.st_mode):
                yield _entry(parts, found)
                return
        todo = [parts]
        while todo:
            folder = todo.pop()
            below = []
            try:
                for child, found in self._inside(name, folder):
                    yield _entry((*folder, child), found)
                    if recursive and stat.S_ISDIR(found.st_mode):
                        below.append((*folder, child))
                        if len(folder) >= _DEEPEST or len(below) + len(todo) > _MOST:
                            message = f"{_shown(name, parts)} holds too many directories, or too deep ones, to list all"
                            raise SpecError(message, code="too-large")
            except SpecError as e:
                # What was removed or replaced since it was seen is left out.
                if folder == parts or e.code not in (FileMissing.code, "not-directory"):
                    raise
            todo += reversed(below)

    def _inside(self, name: str, parts: Sequence[str]) -> Iterator[tuple[str, os.stat_result]]:
        """What is in one directory, by name as far as it is taken at once."""
        # From the volume's top each time: however deep somebody nests directories, one is open at a time.
        with self._directory(name, parts) as fd, _telling(_shown(name, parts)), os.scandir(fd) as entries:
            while some := list(itertools.islice(entries, _AT_ONCE)):
                for entry in sorted(some, key=lambda e: e.name):
                    if parts or not _OWN.fullmatch(entry.name):
                        with contextlib.suppress(FileNotFoundError):
                            yield entry.name, entry.stat(follow_symlinks=False)

    def open_file(self, name: str, path: str) -> tuple[BinaryIO, int]:
        """A regular file for reading, and its size now.

        Raises:
            FileMissing, SpecError: nothing of that name, or no regular file.
        """
        parts = path_parts(path)
        where = _shown(name, parts)
        if not parts:
            raise SpecError(f"{where} is a directory", code="is-directory")
        with self._directory(name, parts[:-1]) as fd, _telling(where):
            # A descriptor of the name alone first: to open a device or a FIFO has consequences.
            handle = os.open(parts[-1], os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            try:
                found = os.fstat(handle)
                if stat.S_ISDIR(found.st_mode):
                    raise SpecError(f"{where} is a directory", code="is-directory")
                if not stat.S_ISREG(found.st_mode):
                    raise SpecError(f"{where} is not a regular file: a {_kind(found.st_mode)}", code="not-a-file")
                real = os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            finally:
                os.close(handle)
        return os.fdopen(real, "rb", buffering=0), found.st_size

    # Writing

    def check(self, name: str, paths: Sequence[str], *, force: bool) -> None:
        """Whether uploads to these paths would be taken, as far as that is known beforehand.

        Raises:
            FileTaken, SpecError: the first that would not.
        """
        for path in paths:
            parts = path_parts(path)
            where = _shown(name, parts)
            if not parts:
                raise SpecError(f"{where} is a directory", code="is-directory")
            try:
                with self._directory(name, parts[:-1]) as fd, _telling(where):
                    found = os.stat(parts[-1], dir_fd=fd, follow_symlinks=False)
            except FileMissing:
                continue
            if stat.S_ISDIR(found.st_mode):
                raise SpecError(
                    f"{where} is a directory: end the path with / to put a file into it", code="is-directory"
                )
            if not force:
                raise FileTaken(f"{where} exists already: force=True (--force) replaces it")

    def upload(self, name: str, path: str, *, force: bool, mode: int = 0o644) -> Upload:
        """Begin to write a file.

        Raises:
            FileTaken, SpecError, NotFoundError: it would not be taken.
        """
        self.check(name, [path], force=force)
        return Upload(self, name, path_parts(path), force=force, mode=mode & 0o777)

    def make_directory(self, name: str, path: str) -> None:
        """Make a directory, and those above it; one that is there is left as it is.

        Raises:
            SpecError, NotFoundError: something else has its name, or one above it.
        """
        with self._directory(name, path_parts(path), make=True):
            pass

    def copy(self, name: str, sources: Sequence[str], target: str, *, recursive: bool) -> None:
        """Copy within a volume as `cp` does: several sources, or one to a directory, go into it; files are replaced.

        Symbolic links below a directory are copied as links.

        Raises:
            FileMissing, SpecError: no such source; a directory without `recursive`, or into itself.
        """
        to = path_parts(target)
        into = len(sources) > 1 or target.endswith("/") or self._is_directory(name, to)
        for source in sources:
            parts = path_parts(source)
            where = _shown(name, parts)
            goal = (*to, *parts[-1:]) if into else to
            if not self._is_directory(name, parts):
                self._copy_file(name, source, goal)
                continue
            if not recursive:
                raise SpecError(f"{where} is a directory: recursive=True (--recursive) copies it", code="is-directory")
            if goal[: len(parts)] == parts:
                raise SpecError(f"{where} cannot be copied into itself", code="bad-path")
            self.make_directory(name, "/".join(goal))
            for entry in self.entries(name, source, recursive=True):
                there = (*goal, *path_parts(entry["path"])[len(parts) :])
                if entry["type"] == "file":
                    self._copy_file(name, entry["path"], there)
                elif entry["type"] == "directory":
                    self.make_directory(name, "/".join(there))
                elif entry["type"] == "symlink":
                    self._copy_link(name, path_parts(entry["path"]), there)
                else:
                    raise SpecError(f"{_shown(name, there)} cannot be copied: a {entry['type']}", code="not-a-file")

    def _is_directory(self, name: str, parts: Sequence[str]) -> bool:
        try:
            with self._directory(name, parts):
                return True
        except FileMissing:
            return False
        except SpecError as e:
            if e.code != "not-directory":
                raise
            return False

    def _copy_file(self, name: str, source: str, goal: Sequence[str]) -> None:
        file, _ = self.open_file(name, source)
        with (
            file,
            contextlib.closing(
                self.upload(name, "/".join(goal), force=True, mode=os.fstat(file.fileno()).st_mode)
            ) as upload,
        ):
            while piece := file.read(_PIECE):
                upload.write(piece)
            upload.finish()

    # Removing

    def _copy_link(self, name: str, source: Sequence[str], goal: Sequence[str]) -> None:
        where = _shown(name, goal)
        with self._directory(name, source[:-1]) as fd, _telling(_shown(name, source)):
            target = os.readlink(source[-1], dir_fd=fd)
        with self._directory(name, goal[:-1]) as fd, _telling(where):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(goal[-1], dir_fd=fd)
            os.symlink(target, goal[-1], dir_fd=fd)
            if os.geteuid() == 0:
                os.chown(goal[-1], self._uid, self._uid, dir_fd=fd, follow_symlinks=False)

    def remove(self, name: str, path: str, *, recursive: bool) -> None:
        """Remove a file, or with `recursive` a directory; it is gone at once, the disk's room somewhat later.

        Raises:
            FileMissing, SpecError: nothing of that name; a directory without `recursive`.
        """
        parts = path_parts(path)
        where = _shown(name, parts)
        if not parts:
            raise SpecError(f"{where} is the whole volume: `woodfrog volume delete {name}` removes it", code="bad-path")
        with self._directory(name, ()) as top, self._directory(name, parts[:-1]) as fd, _telling(where):
            if not stat.S_ISDIR(os.stat(parts[-1], dir_fd=fd, follow_symlinks=False).st_mode):
                os.unlink(parts[-1], dir_fd=fd)
                return
            if not recursive:
                message = f"{where} is a directory: recursive=True (--recursive) removes it with all that is in it"
                raise SpecError(message, code="is-directory")
            own = _own_name()
            os.rename(parts[-1], own, src_dir_fd=fd, dst_dir_fd=top)
            _in_background(os.dup(top), [own])

    def delete(self, name: str) -> None:
        """Remove a volume; it is gone at once, the disk's room somewhat later.

        Raises:
            NotFoundError: there is none of that name.
        """
        os.close(self._top(name))
        own = _own_name()
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with _telling(f"volume {name!r}"):
                if stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                    message = (
                        f"volume {name!r} is a symbolic link to {os.readlink(name, dir_fd=folder)}: remove it by hand"
                    )
                    raise SpecError(message, code="bad-path")
                os.rename(name, own, src_dir_fd=folder, dst_dir_fd=folder)
            _in_background(os.dup(folder), [own])
        finally:
            os.close(folder)

    def sweep(self) -> None:
        """Remove what a daemon that was killed left half done. Only while nothing is on its way."""
        tops = [self._folder, *(self._folder / name for name in self.names())]
        for top in tops:
            left = [n for n in os.listdir(top) if _OWN.fullmatch(n)]
            if left:
                _in_background(os.open(top, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), left)


class Upload:
    """A file on its way into a volume: under another name at the volume's top until it is whole."""

    def __init__(self, files: VolumeFiles, name: str, parts: tuple[str, ...], *, force: bool, mode: int) -> None:
        self._files, self._name, self._parts = files, name, parts
        self._force, self._mode = force, mode
        self._where = _shown(name, parts)
        self._own: str | None = _own_name()
        # Whoever waits for a thread may be cancelled: nothing is closed while that thread works with it.
        self._lock = threading.Lock()
        self._top = files._top(name)
        try:
            with _telling(self._where):
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                self._file = os.fdopen(os.open(self._own, flags, 0o600, dir_fd=self._top), "wb", buffering=0)
        except BaseException:
            os.close(self._top)
            raise

    def write(self, data: bytes | bytearray) -> None:
        """
        Raises:
            StoreError: the disk is full.
        """
        with self._lock, _telling(self._where):
            view = memoryview(data)
            while view:
                view = view[self._file.write(view) :]

    def finish(self) -> None:
        """Give the file its name and its owner.

        Raises:
            FileTaken, SpecError: something came in its way meanwhile.
        """
        with (
            self._lock,
            self._files._directory(self._name, self._parts[:-1], make=True) as fd,
            _telling(self._where),
        ):
            own = self._own
            assert own is not None
            os.fchmod(self._file.fileno(), self._mode)
            self._files._give(self._file.fileno())
            if self._force:
                os.rename(own, self._parts[-1], src_dir_fd=self._top, dst_dir_fd=fd)
            else:
                # Unlike a rename it replaces nothing.
                os.link(own, self._parts[-1], src_dir_fd=self._top, dst_dir_fd=fd, follow_symlinks=False)
                os.unlink(own, dir_fd=self._top)
            self._own = None

    def close(self) -> None:
        """Let go; without `finish` nothing is left of it."""
        with self._lock:
            self._file.close()
            if self._own is not None:
                with contextlib.suppress(OSError):
                    os.unlink(self._own, dir_fd=self._top)
            os.close(self._top)


def _shown(name: str, parts: Sequence[str]) -> str:
    return f"volume {name!r}: {'/'.join(parts) or '/'}"


def _entry(parts: Sequence[str], found: os.stat_result) -> dict[str, Any]:
    return {
        "path": "/".join(parts),
        "type": _kind(found.st_mode),
        "mtime": int(found.st_mtime),
        "size": found.st_size,
    }


def _in_background(top: int, names: list[str]) -> None:
    """Empty and remove directories below `top`, which is closed in the end."""

    def work() -> None:
        try:
            _remove_all(top, names)
        except OSError as e:
            log.warning("a removed directory is not all gone: %s; the next daemon tries again", e)
        finally:
            os.close(top)

    threading.Thread(target=work, daemon=True, name="woodfrog-remove").start()


def _remove_all(top: int, names: Sequence[str]) -> None:
    """Remove directories below `top` with all that is in them.

    Directories in them are moved beside them first, so that nothing is ever deep, however deep somebody made it.
    """
    todo = list(names)
    while todo:
        name = todo.pop()
        try:
            fd = os.open(name, _DIRECTORY, dir_fd=top)
        except FileNotFoundError:
            continue
        except OSError as e:
            if e.errno not in (errno.ENOTDIR, errno.ELOOP):
                raise
            os.unlink(name, dir_fd=top)
            continue
        try:
            with os.scandir(fd) as entries:
                some = list(itertools.islice(entries, _AT_ONCE))
            todo += [name] if len(some) == _AT_ONCE else []
            for entry in some:
                with contextlib.suppress(FileNotFoundError):
                    if stat.S_ISDIR(os.stat(entry.name, dir_fd=fd, follow_symlinks=False).st_mode):
                        own = _own_name()
                        os.rename(entry.name, own, src_dir_fd=fd, dst_dir_fd=top)
                        todo.append(own)
                    else:
                        os.unlink(entry.name, dir_fd=fd)
        finally:
            os.close(fd)
        if len(some) < _AT_ONCE:
            os.rmdir(name, dir_fd=top)


def _users(controller: Controller, name: str) -> Counter[str]:
    """The containers that have a volume, by app."""
    requests = [info.request for info in controller.instances.values()]
    return Counter(r.app for r in requests if any(v.name == name for v in r.spec.volumes))


def add_routes(api: FastAPI, controller: Controller) -> VolumeFiles:
    """Add them."""
    settings = controller.settings
    files = VolumeFiles(settings.home / "volumes", settings.worker_uid)
    files.sweep()
    Where = Query("", alias="path", description="Within the volume, from its top on.")

    @api.get("/v1/volumes", tags=["volumes"])
    async def list_volumes() -> dict[str, Any]:
        """All volumes, and how many containers have each."""
        rows = [{"name": n, "containers": _users(controller, n).total()} for n in files.names()]
        return {"volumes": rows}

    @api.put("/v1/volumes/{name}", tags=["volumes"])
    async def create_volume(name: str) -> dict[str, Any]:
        """Make a volume, if there is none of that name."""
        check_name("volume", name)
        created = name not in files.names()
        controller.resources.volume_path(VolumeMount(name, "/", create=True))
        return {"name": name, "created": created}

    @api.delete("/v1/volumes/{name}", tags=["volumes"])
    async def delete_volume(name: str) -> dict[str, Any]:
        """Remove a volume and all that is in it; refused while a container has it."""
        check_name("volume", name)
        users = _users(controller, name)
        if users:
            count, apps = users.total(), ", ".join(sorted(users))
            raise SpecError(
                f"volume {name!r} is in use by {count} container{'s' if count > 1 else ''} of {apps}: "
                "`woodfrog app stop` ends them, or wait until they end",
                code="volume-in-use",
            )
        # Not in a thread: no container may start with it in between.
        files.delete(name)
        return {"name": name, "deleted": True}

    @api.get("/v1/volumes/{name}/list", tags=["volumes"])
    async def list_files(name: str, path: str = Where, recursive: bool = False) -> StreamingResponse:
        """NDJSON: what a directory holds, or the one file. An error in the middle is the last line."""
        entries = files.entries(name, path, recursive=recursive)
        # What is wrong from the beginning has a status of its own.
        first = await asyncio.to_thread(lambda: list(itertools.islice(entries, 1)))

        async def lines() -> AsyncIterator[bytes]:
            batch: list[dict[str, Any]] = first
            while batch:
                yield b"".join(json.dumps(entry).encode() + b"\n" for entry in batch)
                try:
                    batch = await asyncio.to_thread(lambda: list(itertools.islice(entries, _BATCH)))
                except WoodfrogError as e:
                    batch = []
                    yield json.dumps({"error": e.to_dict()}).encode() + b"\n"

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    @api.get("/v1/volumes/{name}/file", tags=["volumes"])
    async def read_file(name: str, path: str = Where) -> StreamingResponse:
        """A file's bytes, as many as it has when the answer begins."""
        file, size = await asyncio.to_thread(files.open_file, name, path)

        async def pieces() -> AsyncIterator[bytes]:
            left = size
            with file:
                while left and (piece := await asyncio.to_thread(file.read, min(left, _PIECE))):
                    left -= len(piece)
                    yield piece

        headers = {"content-length": str(size)}
        return StreamingResponse(pieces(), media_type="application/octet-stream", headers=headers)

    @api.put("/v1/volumes/{name}/file", tags=["volumes"])
    async def write_file(
        name: str,
        request: Request,
        path: str = Where,
        force: bool = False,
        mode: int = Query(0o644, ge=0, le=0o7777, description="Permissions; more than 0777 is left out."),
    ) -> dict[str, Any]:
        """Write a file; it is there when all of it is. Missing directories are made. `force` replaces a file."""
        upload = await asyncio.to_thread(files.upload, name, path, force=force, mode=mode)
        size = 0
        try:
            pending = bytearray()
            async for chunk in request.stream():
                pending += chunk
                size += len(chunk)
                if len(pending) >= _PIECE:
                    await asyncio.to_thread(upload.write, pending)
                    pending = bytearray()
            await asyncio.to_thread(upload.write, pending)
            await asyncio.to_thread(upload.finish)
        finally:
            upload.close()
        return {"path": "/".join(path_parts(path)), "size": size}

    @api.put("/v1/volumes/{name}/directory", tags=["volumes"])
    async def make_directory(name: str, path: str = Where) -> dict[str, Any]:
        """Make a directory, if there is none; those above it are made, too."""
        await asyncio.to_thread(files.make_directory, name, path)
        return {"path": "/".join(path_parts(path))}

    @api.delete("/v1/volumes/{name}/file", tags=["volumes"])
    async def remove_file(name: str, path: str = Where, recursive: bool = False) -> dict[str, Any]:
        """Remove a file, or with `recursive` a directory."""
        await asyncio.to_thread(files.remove, name, path, recursive=recursive)
        return {"path": "/".join(path_parts(path)), "removed": True}

    @api.post("/v1/volumes/{name}/check", tags=["volumes"])
    async def check_files(name: str, body: dict[str, Any]) -> dict[str, Any]:
        """Whether these uploads would be taken: an error of the first that would not."""
        paths = _texts(body.get("paths"), "check wants paths: a list of texts")
        await asyncio.to_thread(files.check, name, paths, force=bool(body.get("force")))
        return {"paths": len(paths)}

    @api.post("/v1/volumes/{name}/copy", tags=["volumes"])
    async def copy_files(name: str, body: dict[str, Any]) -> dict[str, Any]:
        """Copy within a volume, as `cp` does."""
        sources = _texts(body.get("sources"), "copy wants sources: a list of texts")
        target = _texts([body.get("target")], "copy wants target: a text")[0]
        await asyncio.to_thread(files.copy, name, sources, target, recursive=bool(body.get("recursive")))
        return {"target": target}

    return files


def _texts(value: Any, message: str) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise SpecError(message, code="bad-request")
    return value
