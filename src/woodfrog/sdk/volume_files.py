"""What a client does with a volume's content, through the daemon: it may be another user's, or on another machine."""

from __future__ import annotations

import enum
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, BinaryIO

from woodfrog.errors import SpecError
from woodfrog.sdk import checks

if TYPE_CHECKING:
    from woodfrog.sdk.client import Client

__all__ = ["BatchUpload", "FileEntry", "FileEntryType", "copy", "entries", "pieces", "read_into", "remove"]

_PIECE = 256 << 10
"""httpcore copies what is left of a piece after every write: larger ones are slower."""
_STALLED_S = 120.0
"""How long either side may send nothing."""
_COPY_S = 3600.0
_NAMED = 3
"""So many files are named in a note."""


class FileEntryType(enum.IntEnum):
    """What kind of thing an entry of a volume is."""

    UNSPECIFIED = 0
    FILE = 1
    DIRECTORY = 2
    SYMLINK = 3
    FIFO = 4
    SOCKET = 5


_TYPES = {"file": 1, "directory": 2, "symlink": 3, "fifo": 4, "socket": 5}


@dataclass(frozen=True)
class FileEntry:
    """A file or directory in a volume."""

    path: str
    """From the volume's top on, without a leading `/`."""
    type: FileEntryType
    mtime: int
    """When it was changed, a Unix time in seconds."""
    size: int
    """In bytes."""


def _route(name: str, what: str) -> str:
    from woodfrog.sdk.client import segment

    return f"/volumes/{segment(name)}/{what}"


def _params(path: str | PurePosixPath, **more: Any) -> dict[str, Any]:
    text = str(path)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise SpecError(f"{text!r}: a path that is not UTF-8 cannot be sent", code="bad-path") from None
    return {"path": text, **{key: int(value) for key, value in more.items()}}


def entries(client: Client, name: str, path: str, *, recursive: bool) -> Iterator[FileEntry]:
    """What a directory of a volume holds, or the one file.

    Raises:
        FileMissing: nothing of that name.
    """
    from woodfrog.sdk.client import error_from_answer

    for line in client.lines(_route(name, "list"), _params(path, recursive=recursive)):
        if "error" in line:
            raise error_from_answer(line, "the listing broke off")
        kind = FileEntryType(_TYPES.get(line["type"], 0))
        yield FileEntry(line["path"], kind, line["mtime"], line["size"])


def pieces(client: Client, name: str, path: str) -> Iterator[bytes]:
    """A file's content, as it comes.

    Raises:
        FileMissing, SpecError: no regular file of that name.
        DaemonError: the daemon went away, or the file became shorter meanwhile.
    """
    import httpcore

    from woodfrog.sdk.client import error_from_answer

    route = "/v1" + _route(name, "file")
    try:
        with client._stream("GET", route, params=_params(path), read=_STALLED_S, write=_STALLED_S) as answer:
            if answer.status >= 400:
                raise error_from_answer(_json(answer.read()), f"the daemon answered {answer.status}")
            yield from answer.pieces()
    except (httpcore.NetworkError, httpcore.TimeoutException, httpcore.RemoteProtocolError) as e:
        raise client._broken(e) from None


def read_into(
    client: Client, name: str, path: str, target: IO[bytes], progress: Callable[[int], None] = lambda count: None
) -> int:
    """Write a file's content to `target`, and say how much that was."""
    count = 0
    for piece in pieces(client, name, path):
        target.write(piece)
        count += len(piece)
        progress(count)
    return count


def remove(client: Client, name: str, path: str, *, recursive: bool) -> None:
    """Remove a file, or with `recursive` a directory."""
    client.request("DELETE", _route(name, "file"), params=_params(path, recursive=recursive))


def copy(client: Client, name: str, sources: Sequence[str], target: str, *, recursive: bool) -> None:
    """Copy within a volume, as `cp` does."""
    body = {"sources": [str(s) for s in sources], "target": str(target), "recursive": recursive}
    client.request("POST", _route(name, "copy"), data=body, wait=_COPY_S)


def _json(body: bytes) -> Any:
    import json

    try:
        return json.loads(body)
    except ValueError:
        return None


@dataclass(frozen=True)
class _Item:
    source: Path | IO[bytes]
    remote: str
    mode: int


class _Tree:
    """What a local directory holds."""

    def __init__(self, top: Path) -> None:
        self._top = top
        self.files: list[Path] = []
        self.empty: list[Path] = []
        self._outside: list[str] = []
        self._left: list[str] = []

    def walk(self, *, recursive: bool) -> None:
        """Find all of it.

        Raises:
            OSError: a directory cannot be read.
        """
        real = self._top.resolve()
        todo: list[tuple[Path, frozenset[tuple[int, int]]]] = [(self._top, frozenset())]
        while todo:
            folder, above = todo.pop()
            info = folder.stat()
            above |= {(info.st_dev, info.st_ino)}
            count = len(self.files)
            below = []
            for entry in sorted(os.scandir(folder), key=lambda e: e.name):
                path = Path(entry.path)
                if entry.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(real):
                    self._outside.append(f"{path.relative_to(self._top)} -> {os.path.realpath(path)}")
                if path.is_file():
                    self.files.append(path)
                elif not path.is_dir():
                    what = "a link to nothing" if entry.is_symlink() and not path.exists() else "not a file"
                    self._left.append(f"{path.relative_to(self._top)} ({what})")
                elif (found := path.stat()) and (found.st_dev, found.st_ino) in above:
                    self._left.append(f"{path.relative_to(self._top)} (a link to a directory above it)")
                elif recursive:
                    below.append((path, above))
            todo += reversed(below)
            if len(self.files) == count and not below:
                self.empty.append(folder)

    def say(self) -> None:
        """What a person would not expect."""
        for what, names in (("followed out of it", self._outside), ("left out", self._left)):
            if names:
                more = f" and {len(names) - _NAMED} more" * (len(names) > _NAMED)
                text = f"{self._top}: {what}: {', '.join(names[:_NAMED])}{more}"
                checks.note(f"tree:{text}", text if text.isprintable() else repr(text))


class BatchUpload:
    """Files on their way into a volume: they are sent when the `with` block ends, none if it ends by an exception.

    Each file is there as a whole or not at all. If one that exists is in the way, nothing is sent.

    Example:
        >>> with volume.batch_upload(force=True) as batch:
        ...     batch.put_file("weights.bin", "/models/weights.bin")
        ...     batch.put_directory("data", "/data")
    """

    def __init__(
        self,
        connect: Callable[[], Client],
        name: str,
        *,
        force: bool,
        progress: Callable[[str, int], None] = lambda path, count: None,
    ) -> None:
        self._connect, self._name, self._force = connect, name, bool(force)
        self._progress = progress
        self._items: list[_Item] = []
        self._empty: list[str] = []
        """Directories without a file in them."""
        self._client: Client | None = None

    def put_file(
        self, local_file: str | Path | BinaryIO | IO[bytes], remote_path: str | PurePosixPath, mode: int | None = None
    ) -> None:
        """Have a file sent; missing directories are made.

        Args:
            local_file: a path, or an open binary file, which is read from its beginning when the block ends.
            remote_path: the file's path in the volume, its name included.
            mode: permissions; otherwise those of the local file, or 0o644.

        Raises:
            ValueError: `remote_path` names no file.
            OSError: the local file cannot be found.
        """
        remote = str(remote_path)
        if remote.endswith("/") or not remote:
            raise ValueError(f"remote_path {remote!r} must name a file: it cannot end with /")
        if isinstance(local_file, (str, os.PathLike)):
            source = Path(local_file)
            found = source.stat()
            if source.is_dir():
                raise IsADirectoryError(f"{source} is a directory: use put_directory")
            if not source.is_file():
                raise OSError(f"{source} is not a regular file")
            self._items.append(_Item(source, remote, found.st_mode & 0o777 if mode is None else mode))
        elif not hasattr(local_file, "read") or not hasattr(local_file, "seekable"):
            raise TypeError(f"put_file wants a path or an open file, got {type(local_file).__name__}")
        else:
            self._items.append(_Item(local_file, remote, 0o644 if mode is None else mode))

    def put_directory(self, local_path: str | Path, remote_path: str | PurePosixPath, recursive: bool = True) -> None:
        """Have a directory sent with all that is in it, empty directories too. Symbolic links are followed.

        A note says which links lead out of it, and what is left out: links to nothing or to a directory above them,
        and what is no file (sockets, devices).

        Args:
            remote_path: the directory's path in the volume.
            recursive: also what is in its subdirectories.

        Raises:
            OSError: it is no directory, or cannot be read.
        """
        local = Path(local_path)
        if not local.is_dir():
            kind = NotADirectoryError if local.exists() else FileNotFoundError
            raise kind(f"{local} is not a directory" if local.exists() else f"{local}: no such directory")
        found = _Tree(local)
        found.walk(recursive=recursive)
        for source in found.files:
            self.put_file(source, str(PurePosixPath(str(remote_path)) / source.relative_to(local).as_posix()))
        self._empty += [str(PurePosixPath(str(remote_path)) / e.relative_to(local).as_posix()) for e in found.empty]
        found.say()

    def __len__(self) -> int:
        """How many files it has."""
        return len(self._items)

    def __enter__(self) -> BatchUpload:
        self._client = self._connect()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self._send_all()

    async def __aenter__(self) -> BatchUpload:
        from woodfrog.sdk.call import in_thread

        return await in_thread(self.__enter__)()

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        from woodfrog.sdk.call import in_thread

        await in_thread(self.__exit__)(kind, value, tb)

    def _send_all(self) -> None:
        items, self._items = self._items, []
        empty, self._empty = self._empty, []
        if not items and not empty:
            return
        client = self._client or self._connect()
        paths = [_params(i.remote)["path"] for i in items]
        if paths:  # before the first byte: several GB may be refused for a name
            client.request("POST", _route(self._name, "check"), data={"paths": paths, "force": self._force})
        for directory in empty:
            client.request("PUT", _route(self._name, "directory"), params=_params(directory))
        for item in items:
            if isinstance(item.source, Path):
                with open(item.source, "rb") as file:
                    self._send(client, item, file)
            else:
                if item.source.seekable():
                    item.source.seek(0)
                self._send(client, item, item.source)

    def _send(self, client: Client, item: _Item, file: IO[bytes]) -> None:
        import httpcore

        from woodfrog.sdk.client import error_from_answer

        def content() -> Iterator[bytes]:
            count = 0
            while piece := file.read(_PIECE):
                if not isinstance(piece, bytes):
                    raise TypeError(f"the file for {item.remote} gives {type(piece).__name__}: open it in binary mode")
                yield piece
                count += len(piece)
                self._progress(item.remote, count)

        route = "/v1" + _route(self._name, "file")
        params = _params(item.remote, force=self._force, mode=item.mode)
        try:
            with client._stream(
                "PUT", route, params=params, content=content(), read=_STALLED_S, write=_STALLED_S
            ) as answer:
                body = answer.read()
        except (httpcore.NetworkError, httpcore.TimeoutException, httpcore.RemoteProtocolError) as e:
            raise client._broken(e) from None
        if answer.status >= 400:
            raise error_from_answer(_json(body), f"the daemon answered {answer.status}")
