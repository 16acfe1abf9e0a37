"""This machine's snapshots: found by function key and worker class, committed atomically, verified before use."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from woodfrog.errors import IntegrityError, NotFoundError, StoreError
from woodfrog.faults import fault
from woodfrog.snapshot.manifest import FileEntry, Manifest, SigningKey, decode, encode
from woodfrog.store.files import fsync_dir, fsync_tree, remove_tree, sha256_file, store_error, write_atomic

__all__ = ["Catalogue", "Staging", "inventory"]

_PARTS = ("img", "fs", "shm")
_RETIRED = "retired"
_KEPT_FAILURES = 20


@dataclass(frozen=True)
class Staging:
    """A snapshot in the making, invisible until committed."""

    id: str
    path: Path

    @property
    def images(self) -> Path:
        return self.path / "img"

    @property
    def fs(self) -> Path:
        return self.path / "fs"

    @property
    def shm(self) -> Path:
        return self.path / "shm"

    @property
    def log(self) -> Path:
        return self.path / "log"


def _describe(path: str, info: os.stat_result) -> str:
    """Kind, mode, owner, target or device, and extended attributes (overlayfs keeps its marks there)."""
    target = os.readlink(path) if stat.S_ISLNK(info.st_mode) else str(info.st_rdev)
    text = f"{stat.S_IFMT(info.st_mode):o} {stat.S_IMODE(info.st_mode):o} {info.st_uid}:{info.st_gid} {target}"
    try:
        names = sorted(os.listxattr(path, follow_symlinks=False))
        return " ".join([text, *(f"{n}={os.getxattr(path, n, follow_symlinks=False).hex()}" for n in names)])
    except OSError as e:
        if e.errno != errno.ENOTSUP:
            raise
        return text


def inventory(root: Path) -> tuple[list[str], dict[str, str]]:
    """All of `root`'s parts: regular files, and what is not a file's content, by relative path.

    The latter are kind, mode, owner and target of directories, links and devices, and of the files that become
    visible in a sandbox.
    """
    files: list[str] = []
    others: dict[str, str] = {}

    def walk(folder: str, prefix: str) -> None:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda e: e.name):
                name = f"{prefix}/{entry.name}"
                info = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(info.st_mode):
                    files.append(name)
                    if not name.startswith("img/"):
                        others[name] = _describe(entry.path, info)
                else:
                    others[name] = _describe(entry.path, info)
                    if stat.S_ISDIR(info.st_mode):
                        walk(entry.path, name)

    for part in _PARTS:
        folder = str(root / part)
        others[part] = _describe(folder, os.lstat(folder))
        walk(folder, part)
    return files, others


def _hash_all(root: Path, names: Iterable[str]) -> dict[str, FileEntry]:
    """Digests of many files, on as many threads as pay (hashlib releases the interpreter lock)."""

    def one(name: str) -> FileEntry:
        path = root / name
        return FileEntry(name, path.stat().st_size, sha256_file(path))

    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        return {entry.path: entry for entry in pool.map(one, names)}


class Catalogue:
    """Snapshots below `<root>`; safe against being killed at any point.

    Verification reads every byte once per daemon lifetime and file: afterwards a file counts as unaltered while its
    inode, size, mtime and ctime stand (no write, truncation or replacement leaves all four).
    """

    def __init__(self, root: Path, key: SigningKey) -> None:
        self.root = root
        self._failures = root.parent / "failed-captures"
        self._key = key
        self._manifests: dict[str, Manifest] = {}
        self._verified: dict[str, tuple[tuple[int, int, int, int], ...]] = {}
        self._retired: dict[str, str] = {}
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.chmod(root, 0o700)
        self.damaged: dict[str, str] = {}
        """Directories that are not usable snapshots, with the reason."""
        self._load()

    def _load(self) -> None:
        for path in sorted(self.root.iterdir()):
            if path.name.startswith("."):
                try:
                    remove_tree(path)  # a capture or a removal that was cut off
                except OSError as e:
                    self.damaged[path.name] = f"cannot be removed: {e.strerror}"
                continue
            try:
                self._manifests[path.name] = self._read(path.name)
            except IntegrityError as e:
                self.damaged[path.name] = e.message
                continue
            mark = path / _RETIRED
            if mark.exists():
                self._retired[path.name] = mark.read_text(errors="replace").strip()

    def _read(self, snapshot_id: str) -> Manifest:
        path = self.root / snapshot_id
        try:
            data = (path / "manifest.json").read_bytes()
            signature = (path / "manifest.sig").read_bytes()
        except OSError as e:
            raise IntegrityError(f"snapshot {snapshot_id}: {e.strerror}: {e.filename}", code="bad-manifest") from None
        self._key.verify(data, signature, f"snapshot {snapshot_id}")
        manifest = decode(data)
        if manifest.id != snapshot_id:
            raise IntegrityError(f"snapshot {snapshot_id}: its manifest is of {manifest.id}", code="bad-manifest")
        return manifest

    def path(self, snapshot_id: str) -> Path:
        return self.root / snapshot_id

    def manifests(self) -> list[Manifest]:
        return sorted(self._manifests.values(), key=lambda m: m.created)

    def get(self, snapshot_id: str) -> Manifest:
        """One manifest by id or unambiguous prefix.

        Raises:
            NotFoundError: none, or several.
        """
        if snapshot_id in self._manifests:
            return self._manifests[snapshot_id]
        found = [m for m in self.manifests() if snapshot_id and m.id.startswith(snapshot_id)]
        if len(found) != 1:
            raise NotFoundError(
                f"no snapshot {snapshot_id!r}; `woodfrog snapshot list` shows them", snapshot=snapshot_id
            )
        return found[0]

    def retired(self, snapshot_id: str) -> str | None:
        """Why a snapshot is no longer used; None while it is."""
        return self._retired.get(snapshot_id)

    def find(self, function_key: str, worker_class: str) -> Manifest | None:
        """The newest usable snapshot for this function on this kind of host."""
        found = [
            m
            for m in self.manifests()
            if m.function_key == function_key and m.worker_class == worker_class and m.id not in self._retired
        ]
        return found[-1] if found else None

    def other_hosts(self, function_key: str, worker_class: str) -> list[Manifest]:
        """Snapshots of this function that were made on another kind of host."""
        return [m for m in self.manifests() if m.function_key == function_key and m.worker_class != worker_class]

    def begin(self, snapshot_id: str) -> Staging:
        """A place for a new snapshot.

        Raises:
            StoreError: the directory cannot be made.
        """
        staging = Staging(snapshot_id, self.root / f".staging-{snapshot_id}")
        try:
            staging.path.mkdir(mode=0o700)
        except OSError as e:
            raise store_error("cannot begin a snapshot", staging.path, e) from e
        try:
            for part in (staging.images, staging.fs, staging.shm, staging.log):
                part.mkdir(mode=0o700)
            # The roots of the two layers become visible inside sandboxes: their modes are the real directories'.
            os.chmod(staging.fs, 0o755)
            os.chmod(staging.shm, 0o1777)
        except OSError as e:
            self.abandon(staging)
            raise store_error("cannot begin a snapshot", staging.path, e) from e
        return staging

    def commit(self, staging: Staging, manifest: Manifest) -> Manifest:
        """Make a finished staging directory visible: data durable, then manifest, then one rename.

        Returns:
            The manifest with its files' digests.

        Raises:
            StoreError: something could not be written. The staging directory is the caller's to abandon: a sandbox
                may rest on its files.
        """
        try:
            fault("commit.before")
            names, others = inventory(staging.path)
            stamp = self._stamp(staging.path, names)  # before the digests: a later change is a change
            entries = _hash_all(staging.path, names)
            full = _with_files(manifest, tuple(entries[n] for n in names), others)
            fsync_tree(staging.path)
            fault("commit.data")
            data = encode(full)
            write_atomic(staging.path / "manifest.json", data)
            write_atomic(staging.path / "manifest.sig", self._key.sign(data))
            fault("commit.manifest")
            final = self.root / full.id
            os.rename(staging.path, final)
            fsync_dir(self.root)
        except OSError as e:
            raise store_error("cannot store the snapshot", staging.path, e) from e
        self._manifests[full.id] = full
        self._verified[full.id] = stamp
        return full

    def keep_failure(self, staging: Staging, why: str) -> None:
        """Keep the log of a capture that failed, for `failure`; the newest few."""
        try:
            self._failures.mkdir(mode=0o700, exist_ok=True)
            texts = [p.read_text(errors="replace") for p in (*staging.images.glob("*.log"), *staging.log.glob("*.log"))]
            write_atomic(self._failures / f"{staging.id}.log", "\n".join([why, *texts]).encode(errors="replace"))
            for old in sorted(self._failures.iterdir(), key=lambda p: p.stat().st_mtime)[:-_KEPT_FAILURES]:
                old.unlink()
        except (OSError, StoreError):
            return  # a full disk may be why the capture failed

    def failure(self, snapshot_id: str) -> str | None:
        """What is known of a capture that failed: the reason, then CRIU's log."""
        path = self._failures / f"{snapshot_id}.log"
        try:
            return path.read_text(errors="replace") if path.parent == self._failures else None
        except (FileNotFoundError, NotADirectoryError):
            return None

    @staticmethod
    def abandon(staging: Staging) -> None:
        """Drop what was captured; what cannot be removed now is swept at the next start."""
        with contextlib.suppress(OSError):
            remove_tree(staging.path)

    @staticmethod
    def _stamp(root: Path, names: Iterable[str]) -> tuple[tuple[int, int, int, int], ...]:
        infos = [os.stat(root / name, follow_symlinks=False) for name in names]
        return tuple((i.st_ino, i.st_size, i.st_mtime_ns, i.st_ctime_ns) for i in infos)

    def open_verified(self, snapshot_id: str) -> Manifest:
        """The manifest, after its signature and every file under it have been checked.

        Raises:
            IntegrityError: altered, truncated, or with files added or missing; nothing of it may be restored.
        """
        try:
            manifest = self._read(snapshot_id)
            root = self.root / snapshot_id
            names, others = inventory(root)
            expected = {entry.path: entry for entry in manifest.files}
            if names != list(expected):
                odd = sorted(set(names) ^ set(expected))[:1]
                raise IntegrityError(f"snapshot {snapshot_id}: file {odd} added or missing", code="altered")
            if others != manifest.links:
                odd = sorted(k for k in set(others) | set(manifest.links) if others.get(k) != manifest.links.get(k))[:1]
                raise IntegrityError(f"snapshot {snapshot_id}: {odd} is not as it was captured", code="altered")
            stamp = self._stamp(root, names)
            if self._verified.get(snapshot_id) == stamp:
                return manifest
            for (_, size, _, _), entry in zip(stamp, manifest.files, strict=True):
                if size != entry.size:
                    raise IntegrityError(
                        f"snapshot {snapshot_id}: {entry.path} has {size} bytes, not {entry.size}", code="truncated"
                    )
            for name, actual in _hash_all(root, names).items():
                if actual != expected[name]:
                    raise IntegrityError(f"snapshot {snapshot_id}: {name} was altered", code="altered")
        except OSError as e:
            raise IntegrityError(f"snapshot {snapshot_id}: {e.strerror}: {e.filename}", code="unreadable") from e
        self._verified[snapshot_id] = stamp
        return manifest

    def retire(self, snapshot_id: str, reason: str) -> None:
        """Never use this snapshot again; it is kept for inspection until removed."""
        if snapshot_id not in self._manifests:
            return
        self._retired[snapshot_id] = reason
        try:
            write_atomic(
                self.root / snapshot_id / _RETIRED, f"{time.strftime('%FT%TZ', time.gmtime())} {reason}\n".encode()
            )
        except StoreError:
            return  # it stays retired in this daemon; a restart may try it once more

    def remove(self, snapshot_id: str) -> None:
        """Delete a snapshot. Running instances keep what they have open.

        Raises:
            StoreError: it could not be removed whole.
        """
        self._manifests.pop(snapshot_id, None)
        self._retired.pop(snapshot_id, None)
        self._verified.pop(snapshot_id, None)
        self.damaged.pop(snapshot_id, None)
        hidden = self.root / f".removed-{snapshot_id}-{time.time_ns()}"
        try:
            os.rename(self.root / snapshot_id, hidden)
            remove_tree(hidden)
        except FileNotFoundError:
            return
        except OSError as e:
            raise store_error("cannot remove the snapshot", hidden, e) from e


def _with_files(manifest: Manifest, files: tuple[FileEntry, ...], links: dict[str, str]) -> Manifest:
    fs_bytes = sum(f.size for f in files if not f.path.startswith("img/"))
    return replace(manifest, files=files, links=links, fs_bytes=fs_bytes)
