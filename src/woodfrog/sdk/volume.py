"""Volumes: directories that outlive containers and are shared between them."""

from __future__ import annotations

import contextlib
import os
import posixpath
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import IO, TYPE_CHECKING, Any

from woodfrog.errors import SpecError, WoodfrogError
from woodfrog.sdk import checks
from woodfrog.sdk.dual import Dual, at_once
from woodfrog.sdk.hooks import in_worker
from woodfrog.spec import VolumeMount

if TYPE_CHECKING:
    from woodfrog.sdk.client import Client
    from woodfrog.sdk.volume_files import BatchUpload, FileEntry

__all__ = ["Volume", "mounts"]

_TAKEN = ("/app", "/bin", "/dev", "/etc", "/lib", "/lib64", "/proc", "/run", "/sbin", "/sys", "/usr", "/var")


@checks.lacking(
    {
        "delete": "use `woodfrog volume delete`",
        "from_id": "use Volume.from_name",
        "get_dashboard_url": "look with `woodfrog volume list` and `woodfrog volume ls`",
        "info": "look with `woodfrog volume list`",
        "lookup": "use Volume.from_name",
        "object_id": "a volume is known by its name",
        "objects": "use `woodfrog volume list`, `create` and `delete`",
        "persisted": "use Volume.from_name(name, create_if_missing=True)",
        "rename": "copy its files to one of another name: `woodfrog volume get` and `put`",
    }
)
@dataclass(frozen=True)
class Volume:
    """A directory kept by the daemon. Made by `from_name` or `ephemeral`.

    What one container writes is visible to the others at once: all of them see the same directory. A program outside
    of containers reads and fills it with `listdir`, `read_file`, `batch_upload` and so on; each has an `.aio`.

    Example:
        >>> import woodfrog
        >>> models = woodfrog.Volume.from_name("models", create_if_missing=True)
        >>> app = woodfrog.App("example", volumes={"/models": models})
        >>> with models.batch_upload() as batch:
        ...     batch.put_file("weights.bin", "/weights.bin")
    """

    name: str
    is_read_only: bool = False
    create: bool = False
    is_ephemeral: bool = False
    sub_path: str = ""
    """What of it containers see, where it is not all."""

    @classmethod
    def from_name(
        cls,
        name: str,
        *,
        create_if_missing: bool = False,
        environment_name: str | None = None,
        version: Any = None,
        create_options: Any = None,
        client: Any = None,
    ) -> Volume:
        """The volume called `name`; without `create_if_missing` it must exist when a container starts.

        Raises:
            SpecError: not a name.
        """
        del environment_name, version, create_options, client
        return cls(checks.name(name, "Volume.from_name"), create=bool(create_if_missing))

    @classmethod
    def ephemeral(
        cls, client: Any = None, environment_name: str | None = None, version: Any = None, create_options: Any = None
    ) -> _Ephemeral:
        """A volume for the time of a `with` or `async with` block, removed at its end."""
        del client, environment_name, version, create_options
        return _Ephemeral(cls(f"ephemeral-{os.urandom(6).hex()}", create=True, is_ephemeral=True))

    def read_only(self) -> Volume:
        """The same volume, mounted read-only."""
        return replace(self, is_read_only=True)

    def with_mount_options(
        self, *, read_only: bool | None = None, sub_path: str | PurePosixPath | None = None
    ) -> Volume:
        """The same volume as containers are to see it; None leaves it as it is.

        Args:
            sub_path: the directory in the volume that is mounted, instead of all of it; made where it is missing. It
                must be one: a symbolic link is not followed. `listdir` and so on go on from the volume's top.

        Raises:
            SpecError: not a path within the volume.

        Example:
            >>> jobs = woodfrog.Volume.from_name("jobs", create_if_missing=True)
            >>> app = woodfrog.App("a", volumes={"/out": jobs.with_mount_options(sub_path="today")})
        """
        changed = self if read_only is None else replace(self, is_read_only=bool(read_only))
        if sub_path is None:
            return changed
        parts = [p for p in str(sub_path).split("/") if p not in ("", ".")]
        if ".." in parts or not "".join(parts).isprintable():
            raise SpecError(
                f"Volume.with_mount_options: sub_path={str(sub_path)[:200]!r} is not a path within the volume "
                f"({checks.caller()})",
                code="bad-path",
            )
        return replace(changed, sub_path="/".join(parts))

    @property
    def commit(self) -> Dual[[], None, Coroutine[Any, Any, None]]:
        """`commit()`: does nothing: writes are shared as they happen. Here for programs written for Modal."""
        return at_once(_nothing)

    @property
    def reload(self) -> Dual[[], None, Coroutine[Any, Any, None]]:
        """`reload()`: does nothing: writes are seen as they happen. Here for programs written for Modal."""
        return at_once(_nothing)

    def _hydrate(self, client: Any = None) -> Volume:
        from woodfrog.sdk.volume_files import entries

        for _ in entries(self._reach("hydrate"), self.name, "/", recursive=False):
            break
        return self

    @property
    def hydrate(self) -> Dual[..., Volume, Coroutine[Any, Any, Volume]]:
        """`hydrate()`: have the volume made, or ask whether it is there; gives this one.

        Raises:
            NotFoundError: no such volume, and it was named without `create_if_missing`.
        """
        return Dual(self._hydrate, _awaited(self._hydrate))

    # Its content, from outside of containers.

    def _reach(self, what: str, *, write: bool = False) -> Client:
        """The daemon's client, once the volume is there if it may be made."""
        if in_worker():
            raise SpecError(
                f"Volume.{what} works outside of containers: in one, use the files at the path where the volume is "
                "mounted",
                code="not-yet",
            )
        if write and self.is_read_only:
            raise SpecError(f"Volume.{what}: volume {self.name!r} is read-only here", code="read-only")
        from woodfrog.sdk.client import connect, segment

        client = connect()
        if self.create:
            client.request("PUT", f"/volumes/{segment(self.name)}")
        return client

    @property
    def iterdir(self) -> Dual[..., Iterator[FileEntry], AsyncIterator[FileEntry]]:
        """`iterdir(path, *, recursive=True)`: the files and directories below a directory, or the one file.

        A directory comes before what is in it. Each is a `FileEntry` with `path`, `type`, `mtime` and `size`.

        Raises:
            NotFoundError: no such volume. FileMissing (a FileNotFoundError, too): nothing of that name in it.

        Example:
            >>> for entry in volume.iterdir("/models"):
            ...     print(entry.path, entry.size)
        """
        return Dual(self._iterdir, _iterated(self._iterdir))

    def _iterdir(self, path: str = "/", *, recursive: bool = True) -> Iterator[FileEntry]:
        from woodfrog.sdk.volume_files import entries

        yield from entries(self._reach("iterdir"), self.name, path, recursive=recursive)

    @property
    def listdir(self) -> Dual[..., list[FileEntry], Any]:
        """`listdir(path, *, recursive=False)`: as `iterdir`, as a list.

        Raises:
            NotFoundError: no such volume. FileMissing (a FileNotFoundError, too): nothing of that name in it.
        """
        return Dual(self._listdir, _awaited(self._listdir))

    def _listdir(self, path: str = "/", *, recursive: bool = False) -> list[FileEntry]:
        return list(self._iterdir(path, recursive=recursive))

    @property
    def read_file(self) -> Dual[..., Iterator[bytes], AsyncIterator[bytes]]:
        """`read_file(path)`: the content of a file, piece by piece.

        Raises:
            FileMissing (a FileNotFoundError, too): nothing of that name. SpecError: a directory, or no regular file.

        Example:
            >>> data = b"".join(volume.read_file("results.json"))
        """
        return Dual(self._read_file, _iterated(self._read_file))

    def _read_file(self, path: str) -> Iterator[bytes]:
        from woodfrog.sdk.volume_files import pieces

        yield from pieces(self._reach("read_file"), self.name, path)

    @property
    def read_file_into_fileobj(self) -> Dual[..., int, Any]:
        """`read_file_into_fileobj(path, fileobj)`: write the content of a file to a file that is open for writing.

        Returns how many bytes that were. Raises as `read_file`.
        """
        return Dual(self._read_into, _awaited(self._read_into))

    def _read_into(self, path: str, fileobj: IO[bytes], progress_cb: Any = None) -> int:
        del progress_cb
        from woodfrog.sdk.volume_files import read_into

        return read_into(self._reach("read_file_into_fileobj"), self.name, path, fileobj)

    @property
    def batch_upload(self) -> Dual[..., BatchUpload, BatchUpload]:
        """`batch_upload(force=False)`: a `with` block (or `async with`) in which files to send are named.

        They are sent when it ends. With `force` files that exist are replaced; directories never are.

        Raises:
            FileTaken (a FileExistsError, too): one exists, and nothing was sent. SpecError: one is a directory, or
            the volume is read-only here.

        Example:
            >>> with volume.batch_upload(force=True) as batch:
            ...     batch.put_file("local.txt", "/remote.txt")
            ...     batch.put_file(io.BytesIO(b"text"), "/other.txt")
            ...     batch.put_directory("data", "/data")
        """
        return Dual(self._batch_upload, self._batch_upload)

    def _batch_upload(self, force: bool = False) -> BatchUpload:
        from woodfrog.sdk.volume_files import BatchUpload

        return BatchUpload(lambda: self._reach("batch_upload", write=True), self.name, force=force)

    @property
    def remove_file(self) -> Dual[..., None, Any]:
        """`remove_file(path, recursive=False)`: remove a file, or with `recursive` a directory and all below it.

        Raises:
            FileMissing (a FileNotFoundError, too): nothing of that name. SpecError: a directory without `recursive`,
            or the volume is read-only here.
        """
        return Dual(self._remove_file, _awaited(self._remove_file))

    def _remove_file(self, path: str, recursive: bool = False) -> None:
        from woodfrog.sdk.volume_files import remove

        remove(self._reach("remove_file", write=True), self.name, path, recursive=recursive)

    @property
    def copy_files(self) -> Dual[..., None, Any]:
        """`copy_files(src_paths, dst_path, recursive=False)`: copy within the volume, as `cp` does.

        Files that exist are replaced. Symbolic links in a directory are copied as links.

        Raises:
            FileMissing (a FileNotFoundError, too): no such source. SpecError: a directory without `recursive`.
        """
        return Dual(self._copy_files, _awaited(self._copy_files))

    def _copy_files(self, src_paths: Sequence[str], dst_path: str, recursive: bool = False) -> None:
        from woodfrog.sdk.volume_files import copy

        if isinstance(src_paths, str):
            raise TypeError("Volume.copy_files: src_paths is a list of paths, got one text")
        copy(self._reach("copy_files", write=True), self.name, src_paths, dst_path, recursive=recursive)


def _nothing() -> None: ...


class _Ephemeral:
    """The block of `Volume.ephemeral()`."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume

    def __enter__(self) -> Volume:
        return self._volume

    def __exit__(self, *error: object) -> None:
        if in_worker():
            return
        from woodfrog.sdk.client import connect, segment

        # Where a container still has it, or the daemon is away, the daemon removes it after a while.
        with contextlib.suppress(WoodfrogError):
            connect(start=False).request("DELETE", f"/volumes/{segment(self._volume.name)}", reconnect_s=0.0)

    async def __aenter__(self) -> Volume:
        return self._volume

    async def __aexit__(self, *error: object) -> None:
        await _awaited(self.__exit__)()


def _awaited(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as one that is awaited. What it takes is loaded then: containers import this module, too."""

    def start(*args: Any, **kwargs: Any) -> Any:
        from woodfrog.sdk.call import in_thread

        return in_thread(function)(*args, **kwargs)

    return start


def _iterated(function: Callable[..., Iterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
    """`function`, which gives an iterator, as one for `async for`."""

    def start(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        from woodfrog.sdk.call import aio_iterate

        found: Any = function(*args, **kwargs)
        return aio_iterate(found, found.close)

    return start


def mounts(value: Any) -> tuple[VolumeMount, ...]:
    """The `volumes=` parameter as mounts in the order of their paths.

    Raises:
        TypeError, ValueError: with the words to put behind the parameter's name.
    """
    if not isinstance(value, Mapping):
        raise TypeError(f"expected a dict of path to Volume, got {type(value).__name__}")
    found: dict[str, VolumeMount] = {}
    for path, volume in value.items():
        if not isinstance(volume, Volume):
            raise TypeError(f"{path}: expected a woodfrog.Volume, got {type(volume).__name__}")
        text = posixpath.normpath(str(path))
        if not text.startswith("/") or text.startswith("//") or text == "/":
            raise ValueError(f"{str(path)!r} is not an absolute path below /")
        if text in _TAKEN or text.startswith(("/proc/", "/sys/", "/dev/", "/run/", "/app/")):
            raise ValueError(f"{text} is taken by the container itself: choose another path")
        if text in found:
            raise ValueError(f"two volumes at {text}")
        found[text] = VolumeMount(
            name=volume.name,
            path=text,
            read_only=volume.is_read_only,
            create=volume.create,
            ephemeral=volume.is_ephemeral,
            sub_path=volume.sub_path,
        )
    return tuple(found[k] for k in sorted(found))
