"""Places that keep whole objects under keys: memory, a directory, a bucket.

A tier is simple on purpose: `put` and `get` are whole and atomic, keys are written once or overwritten whole, and
nothing is said about freshness. What comes out of a tier is not trusted: whoever adopts it checks it.

Every error is a `StoreError` that names the tier and the key:

| code               | meaning                                                            | retryable |
|--------------------|--------------------------------------------------------------------|-----------|
| `tier-missing`     | there is nothing under this key                                    | no        |
| `tier-denied`      | credentials are missing, wrong or not enough                       | no        |
| `tier-unreachable` | network, timeout, server error; transient ones were tried again    | if transient |
| `tier-damaged`     | fewer or other bytes than announced, or it changed while it was read | yes     |
| `tier-full`        | a bounded tier has no room left                                    | no        |
| `disk-full`        | no space left on the disk                                          | no        |
| `bad-tier`         | the URL or the key cannot be used                                  | no        |
| `tier-package`     | an optional package is missing                                     | no        |
"""

from __future__ import annotations

import errno
import math
import os
import re
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from woodfrog.errors import StoreError
from woodfrog.store.files import store_error

__all__ = ["DirectoryTier", "Entry", "MemoryTier", "ObjectTier", "Tier", "open_tier"]

_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=+@,-]{0,199}(/[A-Za-z0-9_][A-Za-z0-9_.=+@,-]{0,199})*\Z")
_MAX_KEY = 700
_TEMPORARY = ".incoming"
_STALE_S = 24 * 3600.0
_COPY = 8 << 20
_SMALL = 1 << 20
_RESUMES = 8


@dataclass(frozen=True, slots=True)
class Entry:
    """One object of a listing. `modified`: when it was put last, in Unix seconds by the tier's own clock."""

    key: str
    size: int
    modified: float


class Tier(Protocol):
    """Where objects are kept. All methods are synchronous and may be called from several threads at once."""

    @property
    def name(self) -> str:
        """Its URL, for messages; it holds no secrets."""

    def put(self, key: str, source: Path | bytes) -> None:
        """Store a file or bytes under `key`, replacing what is there. Nobody ever sees a part of it."""

    def get(self, key: str, target: Path, most: int | None = None) -> None:
        """Write the object to the file `target`, whole or not at all. It is not synced to disk.

        Args:
            most: bytes that it may have; one that has more is damaged, and no more of it is written.
        """

    def get_bytes(self, key: str, begin: int = 0, end: int | None = None) -> bytes:
        """Read bytes `begin` to `end` (exclusive); what lies past the end of the object is left out, as in a slice."""

    def has(self, key: str) -> bool: ...

    def size(self, key: str) -> int:
        """Length of the object in bytes."""

    def list(self, prefix: str = "") -> list[str]:
        """Keys below the folder `prefix` ("packs/ab" finds "packs/ab/x", not "packs/abc"), sorted; "" for all."""

    def entries(self, prefix: str = "") -> Sequence[Entry]:
        """As `list`, with what a listing tells beside."""

    def delete(self, key: str) -> None:
        """Remove an object; one that is gone already is fine."""


def open_tier(url: str, *, make: bool = True) -> Tier:
    """The tier that a URL names.

    Args:
        url: a path or `file:///path` (a directory, made when missing), `s3://bucket/prefix`, `gs://bucket/prefix`,
            `az://container/prefix`, or `memory://` (this process only). Buckets take credentials, endpoint and region
            from the usual variables (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, `GOOGLE_SERVICE_ACCOUNT`, ...), never
            from the URL.
        make: make a directory that is missing; otherwise that is an error.

    Raises:
        StoreError: the URL is not one of these, the directory cannot be made, or a package is missing.

    >>> open_tier("memory://").name
    'memory://'
    """
    scheme, separator, _ = url.partition("://")
    if not separator:
        if not url.startswith(("/", "./", "../", "~")):
            raise _bad(url, "is neither an absolute path nor a URL; write file:///path or s3://bucket/prefix")
        return _directory(Path(url).expanduser().absolute(), make)
    parts = urlsplit(url)
    if parts.username or parts.password or "@" in parts.netloc:
        raise _bad(f"{scheme}://…", "has credentials in it; put them into the environment")
    if parts.query or parts.fragment:
        raise _bad(f"{scheme}://{parts.netloc}{parts.path}", "is followed by ? or #, which mean nothing here")
    match scheme:
        case "file":
            if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
                raise _bad(url, "names another machine; write file:///path")
            return _directory(Path(unquote(parts.path)), make)
        case "memory":
            return MemoryTier(name=url)
        case "s3" | "s3a" | "gs" | "az" | "azure" | "abfs" | "abfss":
            if not parts.netloc:
                raise _bad(url, "names no bucket")
            return ObjectTier(url)
    raise _bad(url, "is of no known kind; use a path, file://, s3://, gs://, az:// or memory://")


def _directory(path: Path, make: bool) -> DirectoryTier:
    if not make and not path.is_dir():
        raise _bad(str(path), "is no directory: mount what belongs there, or make it")
    return DirectoryTier(path)


def _bad(what: str, why: str) -> StoreError:
    return StoreError(f"the tier {what!r} {why}", code="bad-tier", tier=what)


def _check_key(tier: str, key: str) -> str:
    if len(key) > _MAX_KEY or not _KEY.match(key):
        raise StoreError(
            f"{tier}: {key[:80]!r} cannot be a key: names of A-Z a-z 0-9 _ . = + @ , - between slashes can",
            code="bad-tier",
            tier=tier,
            key=key[:200],
        )
    return key


def _check_prefix(tier: str, prefix: str) -> str:
    prefix = prefix.strip("/")
    return _check_key(tier, prefix) if prefix else ""


def _check_range(begin: int, end: int | None) -> None:
    if begin < 0 or (end is not None and end < begin):
        raise ValueError(f"no such range: {begin} to {end}")


def _missing(tier: str, key: str) -> StoreError:
    return StoreError(f"{tier}: there is no {key}", code="tier-missing", tier=tier, key=key)


def _damaged(tier: str, key: str, why: str) -> StoreError:
    return StoreError(f"{tier}: {key} {why}; try again", code="tier-damaged", retryable=True, tier=tier, key=key)


def _check_most(tier: str, key: str, size: int, most: int | None) -> None:
    if most is not None and size > most:
        raise _damaged(tier, key, f"has {size} bytes now, and had no more than {most}")


@contextmanager
def _replacing(target: Path) -> Iterator[int]:
    """A descriptor of a new file that takes the place of `target` when the block ends well, and is gone otherwise."""
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as e:
        raise store_error("cannot write", target, e) from e
    try:
        try:
            yield fd
        finally:
            os.close(fd)
        os.rename(temporary, target)
    except BaseException as e:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(e, OSError):
            raise store_error("cannot write", target, e) from e
        raise


def _copy(source: int, target: int) -> bool:
    """Copy a file to another's current position; whether it was as long all the while. No more is written than it has
    in the beginning, however fast it grows."""
    size, copied = os.fstat(source).st_size, 0
    while count := os.sendfile(target, source, None, min(_COPY, size - copied)):
        copied += count
    return copied == os.fstat(source).st_size


def _write_at(fd: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count


class MemoryTier:
    """Objects in this process's memory, up to a budget; gone with the process.

    Args:
        budget: bytes that all objects together may take; a `put` past it is refused with `tier-full`.
    """

    def __init__(
        self, budget: int = 1 << 30, *, name: str = "memory://", clock: Callable[[], float] = time.time
    ) -> None:
        self._name = name
        self.budget, self._clock = budget, clock
        self._objects: dict[str, bytes] = {}
        self._times: dict[str, float] = {}
        self._used = 0
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return self._name

    def put(self, key: str, source: Path | bytes) -> None:
        _check_key(self.name, key)
        if isinstance(source, Path):
            try:
                data = source.read_bytes()
            except OSError as e:
                raise store_error("cannot read", source, e) from e
        else:
            data = bytes(source)
        with self._lock:
            used = self._used + len(data) - len(self._objects.get(key, b""))
            if used > self.budget:
                raise StoreError(
                    f"{self.name}: no room for {key} ({len(data)} bytes): {self._used} of {self.budget} are used",
                    code="tier-full",
                    tier=self.name,
                    key=key,
                )
            self._objects[key], self._used = data, used
            self._times[key] = self._clock()

    def get(self, key: str, target: Path, most: int | None = None) -> None:
        data = self._find(key)
        _check_most(self.name, key, len(data), most)
        with _replacing(target) as fd:
            _write_at(fd, data, 0)

    def get_bytes(self, key: str, begin: int = 0, end: int | None = None) -> bytes:
        _check_range(begin, end)
        return self._find(key)[begin:end]

    def has(self, key: str) -> bool:
        return _check_key(self.name, key) in self._objects

    def size(self, key: str) -> int:
        return len(self._find(key))

    def list(self, prefix: str = "") -> list[str]:
        return [entry.key for entry in self.entries(prefix)]

    def entries(self, prefix: str = "") -> Sequence[Entry]:
        folder = _check_prefix(self.name, prefix)
        with self._lock:
            keys = sorted(key for key in self._objects if not folder or key.startswith(f"{folder}/"))
            return [Entry(key, len(self._objects[key]), self._times[key]) for key in keys]

    def delete(self, key: str) -> None:
        _check_key(self.name, key)
        with self._lock:
            self._used -= len(self._objects.pop(key, b""))

    def _find(self, key: str) -> bytes:
        try:
            return self._objects[_check_key(self.name, key)]
        except KeyError:
            raise _missing(self.name, key) from None


def _clean(incoming: int) -> None:
    """Remove what writers that died have left. Age tells, since a writer may be on another machine."""
    for name in os.listdir(incoming):
        with suppress(FileNotFoundError, IsADirectoryError):
            if os.stat(name, dir_fd=incoming, follow_symlinks=False).st_mtime < time.time() - _STALE_S:
                os.unlink(name, dir_fd=incoming)


class DirectoryTier:
    """Objects as files below a directory: a disk, a tmpfs, a mounted share.

    What `put` has stored survives a power loss. Writers on several machines may share one directory. They may be others
    than root, who writes here: below `root` no symbolic link is followed.

    Args:
        name: what messages call it; its URL without.
    """

    def __init__(self, root: Path, name: str = "") -> None:
        self.root = Path(root)
        self._name = name or f"file://{self.root}"
        self._incoming = self.root / _TEMPORARY
        try:
            self._incoming.mkdir(parents=True, exist_ok=True, mode=0o700)
            with self._folder(f"{_TEMPORARY}/") as (incoming, _):
                _clean(incoming)
        except OSError as e:
            raise self._error("cannot use", self._incoming, e) from e

    @property
    def name(self) -> str:
        return self._name

    def put(self, key: str, source: Path | bytes) -> None:
        final, temporary = self._path(key), uuid.uuid4().hex
        try:
            with self._folder(f"{_TEMPORARY}/") as (incoming, _):
                try:
                    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                    fd = os.open(temporary, flags, 0o600, dir_fd=incoming)
                    try:
                        if isinstance(source, Path):
                            self._take(source, fd)
                        else:
                            _write_at(fd, source, 0)
                        os.fsync(fd)
                    finally:
                        os.close(fd)
                    with self._folder(key, make=True) as (folder, name):
                        os.rename(temporary, name, src_dir_fd=incoming, dst_dir_fd=folder)
                        os.fsync(folder)
                finally:
                    with suppress(OSError):
                        os.unlink(temporary, dir_fd=incoming)
        except OSError as e:
            raise self._error("cannot store", final, e, key) from e

    def get(self, key: str, target: Path, most: int | None = None) -> None:
        with self._opened(key) as source, _replacing(target) as fd:
            _check_most(self.name, key, os.fstat(source).st_size, most)
            if not _copy(source, fd):
                raise _damaged(self.name, key, "changed while it was read")

    def get_bytes(self, key: str, begin: int = 0, end: int | None = None) -> bytes:
        _check_range(begin, end)
        with self._opened(key) as fd:
            size = os.fstat(fd).st_size
            stop = size if end is None else min(end, size)
            pieces: list[bytes] = []
            while begin < stop and (piece := os.pread(fd, min(stop - begin, _COPY), begin)):
                pieces.append(piece)
                begin += len(piece)
            if begin < stop:
                raise _damaged(self.name, key, "changed while it was read")
            return b"".join(pieces)

    def has(self, key: str) -> bool:
        try:
            with self._opened(key):
                return True
        except StoreError as e:
            if e.code == "tier-missing":
                return False
            raise

    def size(self, key: str) -> int:
        with self._opened(key) as fd:
            return os.fstat(fd).st_size

    def entries(self, prefix: str = "") -> Sequence[Entry]:
        found = []
        for key in self.list(prefix):
            try:
                info = os.lstat(self.root / key)
            except (FileNotFoundError, NotADirectoryError):  # removed while we looked
                continue
            except OSError as e:
                raise self._error("cannot list", self.root / key, e, key) from e
            found.append(Entry(key, info.st_size, info.st_mtime))
        return found

    def list(self, prefix: str = "") -> list[str]:
        folder = _check_prefix(self.name, prefix)
        self._check_there(prefix)
        top = self.root / folder
        if any(
            place.is_symlink()
            for place in (top, *top.parents)
            if place != self.root and place.is_relative_to(self.root)
        ):
            return []
        keys = []

        def fail(error: OSError) -> None:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):  # removed while we looked, or never there
                raise self._error("cannot list", self.root / folder, error)

        for place, folders, names in os.walk(top, onerror=fail):
            folders[:] = [name for name in folders if not name.startswith(".")]
            below = os.path.relpath(place, self.root)
            keys += [os.path.normpath(f"{below}/{name}") for name in names if not name.startswith(".")]
        return sorted(keys)

    def delete(self, key: str) -> None:
        path = self._path(key)
        try:
            with self._folder(key) as (folder, name):
                os.unlink(name, dir_fd=folder)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return
        except OSError as e:
            raise self._error("cannot remove", path, e, key) from e

    def _path(self, key: str) -> Path:
        return self.root / _check_key(self.name, key)

    @contextmanager
    def _folder(self, key: str, *, make: bool = False) -> Iterator[tuple[int, str]]:
        """A descriptor of the directory that an object is in, and the object's name there.

        Args:
            make: make what is missing on the way.
        """
        *above, name = key.split("/")
        fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for part in above:
                if make:
                    with suppress(FileExistsError):
                        os.mkdir(part, dir_fd=fd)
                        os.fsync(fd)
                below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
                os.close(fd)
                fd = below
            yield fd, name
        finally:
            os.close(fd)

    @contextmanager
    def _opened(self, key: str) -> Iterator[int]:
        path = self._path(key)
        try:
            with self._folder(key) as (folder, name):
                # Not to wait for whoever writes to a FIFO.
                fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        except (FileNotFoundError, NotADirectoryError):
            self._check_there(key)
            raise _missing(self.name, key) from None
        except OSError as e:
            raise self._error("cannot read", path, e, key) from e
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise _missing(self.name, key)
            yield fd
        except OSError as e:
            raise self._error("cannot read", path, e, key) from e
        finally:
            os.close(fd)

    def _check_there(self, key: str) -> None:
        """Nothing is missing from a directory that is not there: a share that is not mounted has lost nothing."""
        if not self._incoming.is_dir():
            raise StoreError(
                f"{self.name}: the directory is gone; mount it again, or make it",
                code="tier-unreachable",
                tier=self.name,
                key=key,
            )

    def _take(self, source: Path, fd: int) -> None:
        try:
            with open(source, "rb", buffering=0) as f:
                if _copy(f.fileno(), fd):
                    return
        except FileNotFoundError as e:
            raise store_error("cannot read", source, e) from e
        raise _damaged(self.name, str(source), "changed while it was stored")

    def _error(self, what: str, path: Path, error: OSError, key: str = "") -> StoreError:
        if isinstance(error, PermissionError):
            return StoreError(
                f"{self.name}: {what} {path}: permission denied; check who owns the directory",
                code="tier-denied",
                tier=self.name,
                key=key,
            )
        plain = store_error(what, path, error)
        plain.fields.update(tier=self.name, key=key)
        if plain.code == "store":
            plain.code = "tier-unreachable"
        return plain


class ObjectTier:
    """Objects in a bucket (S3 and what speaks like it, Google Cloud Storage, Azure), through the package `obstore`.

    Large objects travel in parts, several at a time. A request that stalls, is refused a connection or gets a server
    error is tried again, up to four times and for about twice `stall_s` (an upload: twenty times); what was denied or
    does not exist is not. A link may be slow: 70 kB/s are enough for a download, 250 kB/s for an upload. An upload that
    dies half-way leaves its parts hidden in the bucket: give it a lifecycle rule for incomplete uploads.

    Args:
        url: `s3://bucket/prefix` and the like.
        stall_s: seconds without a byte after which a request counts as lost.
        part: bytes of one part; 5 MiB to 5 GiB on S3.
        parallel: requests at a time, for one object.
    """

    def __init__(self, url: str, *, stall_s: float = 15.0, part: int = 8 << 20, parallel: int = 8) -> None:
        self._name = url.rstrip("/")
        self.stall_s, self.part, self.parallel = stall_s, part, parallel
        try:
            import obstore
            from obstore.store import from_url
        except ImportError as e:
            raise StoreError(
                f"{self.name}: buckets need the package obstore: pip install 'woodfrog[bucket]' ({e})",
                code="tier-package",
                tier=self.name,
            ) from None
        self._api: Any = obstore
        upload_s = 20 * stall_s
        backoff = {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=2), "base": 2}

        def open_store(request_s: float, retry_s: float, **more: Any) -> Any:
            options = {
                "connect_timeout": timedelta(seconds=min(5.0, stall_s)),
                "timeout": timedelta(seconds=request_s),
                **more,
                **_client_environment(url),
            }
            retries = {"max_retries": 4, "retry_timeout": timedelta(seconds=retry_s), "backoff": backoff}
            return from_url(self._name, client_options=options, retry_config=retries)

        try:
            self._store: Any = open_store(8 * stall_s, 2 * stall_s, read_timeout=timedelta(seconds=stall_s))
            # The client counts the time that a body takes to send as waiting for the answer: on a slow line a part that
            # is well under way would be given up.
            self._uploads: Any = open_store(upload_s, upload_s)
        except Exception as e:
            raise self._error("cannot open it", "", e) from None

    @property
    def name(self) -> str:
        return self._name

    def put(self, key: str, source: Path | bytes) -> None:
        _check_key(self.name, key)
        try:
            size = source.stat().st_size if isinstance(source, Path) else len(source)
            if isinstance(source, Path):
                os.close(os.open(source, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as e:
            raise store_error("cannot read", Path(str(source)), e) from e
        many, large = size > self.part, size > _SMALL
        try:
            if large:  # whether the bucket answers at all is known sooner from a small request
                with suppress(FileNotFoundError):
                    self._api.head(self._store, key)
            self._api.put(
                self._uploads if large else self._store,
                key,
                source,
                use_multipart=many,
                chunk_size=max(self.part, math.ceil(size / 9000)),  # S3 takes 10,000 parts
                max_concurrency=self.parallel,
            )
            stored = int(self._api.head(self._store, key)["size"]) if many else size
        except FileNotFoundError:
            raise StoreError(
                f"{self.name}: there is no such bucket; make it, or correct the URL",
                code="tier-missing",
                tier=self.name,
                key=key,
            ) from None
        except Exception as e:
            raise self._error("cannot store", key, e) from None
        if stored != size:
            raise _damaged(self.name, key, f"has {stored} bytes after {size} were sent")

    def get(self, key: str, target: Path, most: int | None = None) -> None:
        with _replacing(target) as fd:

            def allocate(size: int) -> Callable[[int, memoryview], None]:
                _check_most(self.name, key, size, most)
                os.ftruncate(fd, size)
                return lambda offset, data: _write_at(fd, data, offset)

            self._fetch(key, 0, None, allocate)

    def get_bytes(self, key: str, begin: int = 0, end: int | None = None) -> bytes:
        _check_range(begin, end)
        found = bytearray()

        def allocate(size: int) -> Callable[[int, memoryview], None]:
            found.extend(bytes(size))
            view = memoryview(found)

            def write(offset: int, data: memoryview) -> None:
                view[offset : offset + len(data)] = data

            return write

        self._fetch(key, begin, end, allocate)
        return bytes(found)

    def has(self, key: str) -> bool:
        try:
            self.size(key)
        except StoreError as e:
            if e.code == "tier-missing":
                return False
            raise
        return True

    def size(self, key: str) -> int:
        try:
            return int(self._api.head(self._store, _check_key(self.name, key))["size"])
        except FileNotFoundError:
            raise _missing(self.name, key) from None
        except StoreError:
            raise
        except Exception as e:
            raise self._error("cannot look for", key, e) from None

    def list(self, prefix: str = "") -> list[str]:
        return [entry.key for entry in self.entries(prefix)]

    def entries(self, prefix: str = "") -> Sequence[Entry]:
        folder = _check_prefix(self.name, prefix)
        try:
            found = [
                Entry(str(one["path"]), int(one["size"]), one["last_modified"].timestamp())
                for batch in self._api.list(self._store, prefix=folder or None)
                for one in batch
            ]
            return sorted(found, key=lambda entry: entry.key)
        except Exception as e:
            raise self._error("cannot list", folder or "it", e) from None

    def delete(self, key: str) -> None:
        _check_key(self.name, key)
        try:
            self._api.delete(self._store, key)
        except FileNotFoundError:
            return
        except Exception as e:
            raise self._error("cannot remove", key, e) from None

    def _fetch(
        self, key: str, begin: int, end: int | None, allocate: Callable[[int], Callable[[int, memoryview], None]]
    ) -> None:
        """Read a range in parts; the answer to the first one tells how large the object is and which version."""
        _check_key(self.name, key)
        stop = begin + self.part if end is None else min(end, begin + self.part)
        if stop == begin or (first := self._request(key, begin, stop, None)) is None:
            if self.size(key) <= begin or begin == end:
                allocate(0)
                return
            raise _damaged(self.name, key, "has another size at each look")
        size, tag = int(first.meta["size"]), first.meta["e_tag"]
        end = size if end is None else min(end, size)
        write = allocate(end - begin)
        stop = min(stop, end)
        self._receive(key, begin, begin, stop, tag, write, first)
        rest = [(at, min(at + self.part, end)) for at in range(stop, end, self.part)]
        if not rest:
            return
        with ThreadPoolExecutor(min(self.parallel, len(rest)), thread_name_prefix="tier") as pool:
            waiting = [pool.submit(self._receive, key, begin, at, to, tag, write, None) for at, to in rest]
            try:
                for part in waiting:
                    part.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _request(self, key: str, begin: int, end: int, tag: str | None) -> Any:
        """Ask for a range; None when the object ends before it."""
        options: dict[str, Any] = {"range": (begin, end)}
        if tag:
            options["if_match"] = tag
        try:
            return self._api.get(self._store, key, options=options)
        except FileNotFoundError:
            raise _missing(self.name, key) from None
        except Exception as e:
            if "416" in _first_line(e):
                return None
            raise self._error("cannot read", key, e) from None

    def _receive(
        self,
        key: str,
        origin: int,
        begin: int,
        end: int,
        tag: str | None,
        write: Callable[[int, memoryview], None],
        answer: Any,
    ) -> None:
        """Write one part. A connection that breaks off in the middle is taken up again where it broke."""
        at, progress = begin, time.monotonic()
        for attempt in range(_RESUMES):
            if answer is None and (answer := self._request(key, at, end, tag)) is None:
                break
            if tuple(answer.range) != (at, end):
                break
            try:
                for piece in answer.stream(min_chunk_size=1 << 20):
                    data = memoryview(piece)
                    if at + len(data) > end:
                        raise _damaged(self.name, key, "came with more bytes than were asked for")
                    write(at - origin, data)
                    at, progress = at + len(data), time.monotonic()
            except (StoreError, OSError):
                raise
            except Exception as e:
                if attempt == _RESUMES - 1 or not _transient(e) or time.monotonic() > progress + 2 * self.stall_s:
                    raise self._error("cannot read", key, e) from None
            if at == end:
                return
            answer = None
        raise _damaged(self.name, key, f"broke off at byte {at} of {end}")

    def _error(self, what: str, key: str, error: Exception) -> StoreError:
        """Ours for obstore's. Its text is not passed on: it may hold signed URLs and parts of requests."""
        kind, line = type(error).__name__, _first_line(error)
        fields: dict[str, Any] = {"tier": self.name, "key": key}
        head = f"{self.name}: {what} {key}".rstrip()
        said = re.search(r"<Code>([A-Za-z0-9]{1,60})</Code>", str(error))
        detail = f" ({said[1]})" if said else ""
        if kind in ("PermissionDeniedError", "UnauthenticatedError") or _DENIED.search(f"{line} {detail}"):
            return StoreError(
                f"{head}: access denied{detail}; check the credentials in the environment ({_vendor(self.name)[1]}, …)",
                code="tier-denied",
                **fields,
            )
        if kind == "PreconditionError":
            return _damaged(self.name, key, "changed while it was read")
        if said and said[1] == "NoSuchBucket":
            return StoreError(
                f"{head}: there is no such bucket; make it, or correct the URL", code="tier-missing", **fields
            )
        if "builder error" in line:
            why = f"the endpoint is not https; use https, or set {_vendor(self.name)[0]}_ALLOW_HTTP=true"
            return StoreError(f"{head}: {why}", code="bad-tier", **fields)
        transient = _transient(error)
        why = "no answer in time" if _timed_out(error) else _short(line)
        hint = "check the network and the endpoint, then try again" if transient else "check the URL and the endpoint"
        return StoreError(f"{head}: {why}{detail}; {hint}", code="tier-unreachable", retryable=transient, **fields)


_DENIED = re.compile(
    r"status code: 40[13]|AccessDenied|SignatureDoesNotMatch|InvalidAccessKeyId|ExpiredToken|InvalidToken|Missing[A-Z ]"
    r"|credential|metadata service|must be specified",
    re.IGNORECASE,
)
_TRANSIENT = re.compile(
    r"error sending request|error decoding response body|response body error|connection (closed|reset|error)|timed out"
    r"|status code: (408|429|5\d\d)|SlowDown|incomplete message|end of file before message",
    re.IGNORECASE,
)


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0]


def _transient(error: Exception) -> bool:
    return bool(_TRANSIENT.search(_first_line(error)))


def _timed_out(error: Exception) -> bool:
    return bool(re.search(r"timed out|kind: Timeout|TimedOut", str(error)))


def _short(line: str) -> str:
    """What went wrong without the addresses and times around it."""
    status = re.search(r"status code: (\d{3}[ A-Za-z-]{0,40})", line)
    if status:
        return f"the server answers {status[1].strip()}"
    return (
        re.sub(r"\S*https?://\S+", "", line).rsplit(" - ", 1)[-1].rsplit("error: ", 1)[-1].strip()[:160]
        or "unknown error"
    )


def _vendor(url: str) -> tuple[str, str]:
    """Beginning of the variables that a kind of bucket is set up with, and the first one to check."""
    match url.partition(":")[0]:
        case "s3" | "s3a":
            return "AWS", "AWS_ACCESS_KEY_ID"
        case "gs":
            return "GOOGLE", "GOOGLE_SERVICE_ACCOUNT"
    return "AZURE", "AZURE_STORAGE_ACCOUNT_NAME"


def _client_environment(url: str) -> dict[str, Any]:
    """Options of the HTTP client from the environment; obstore reads them only when it is given none at all."""
    vendor = _vendor(url)[0]
    options: dict[str, Any] = {}
    for option in ("allow_http", "allow_invalid_certificates"):
        value = os.environ.get(f"{vendor}_{option.upper()}", "")
        if value.lower() in ("1", "true", "yes", "on"):
            options[option] = True
    for option in ("proxy_url", "proxy_ca_certificate", "proxy_excludes"):
        if text := os.environ.get(f"{vendor}_{option.upper()}"):
            options[option] = text
    return options
