"""This machine's snapshots: found by function key and worker class, committed atomically, verified before use."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from woodfrog.criu.pagemap import INDEX, index_files
from woodfrog.errors import IntegrityError, NotFoundError, StoreError
from woodfrog.faults import fault
from woodfrog.linux.pageserver import Present
from woodfrog.snapshot.manifest import FileEntry, Manifest, SigningKey, decode, encode
from woodfrog.store.chunks import LARGE
from woodfrog.store.files import fsync_dir, fsync_tree, remove_tree, sha256_file, store_error, write_atomic

if TYPE_CHECKING:
    from woodfrog.store.layers import LayerFiles
    from woodfrog.store.pages import PageStore

__all__ = ["PINNED", "PUSHED", "WITHDRAWN", "WORKING_SET", "Catalogue", "Opened", "Staging", "inventory"]

_LAYERS = ("fs", "shm")
_PAGE = 4096
_PAGES_FILE = re.compile(r"\Aimg[^/]*/pages-\d+\.img\Z")
_SIGNATURE = 64
_RETIRED = "retired"
WORKING_SET = "working-set"
"""Beside the manifest, not under its signature: it says which pages come first, never what is in them."""
PINNED = "pinned"
"""Mark of a snapshot that only a person removes."""
PUSHED = "pushed"
"""Mark of a snapshot that is in the tier as well."""
WITHDRAWN = "withdrawn"
"""Mark of a snapshot that was removed from the tier for all machines: only a person copies it there again."""
_USED = "used"
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


@dataclass(frozen=True)
class Opened:
    """A snapshot whose every byte may be trusted for now.

    Args:
        files: what the page index names, in its order; None = pages files beside it.
        present: some of the files are still on their way.
    """

    manifest: Manifest
    path: Path
    files: tuple[Path, ...] | None = None
    present: Present | None = None

    @property
    def images(self) -> Path:
        return self.path / self.manifest.images

    @classmethod
    def staged(cls, manifest: Manifest, path: Path) -> Opened:
        """One that was captured a moment ago and is not committed yet."""
        return cls(manifest, path)


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


def inventory(root: Path, images: str = "img") -> tuple[list[str], dict[str, str]]:
    """All of a snapshot's parts: regular files, and what is not a file's content, by relative path.

    The latter are kind, mode, owner and target of directories, links and devices, and of the files that become
    visible in a sandbox.

    Args:
        images: the directory of CRIU's images.
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
                    if not name.startswith(f"{images}/"):
                        others[name] = _describe(entry.path, info)
                else:
                    others[name] = _describe(entry.path, info)
                    if stat.S_ISDIR(info.st_mode):
                        walk(entry.path, name)

    for part in (images, *_LAYERS):
        folder = str(root / part)
        others[part] = _describe(folder, os.lstat(folder))
        walk(folder, part)
    return files, others


def _sparse_sha256(path: Path) -> str:
    """sha256 of a file that is mostly holes: its size, then each page that is not zero, with its place.

    The same for a file whose holes were filled with zeroes, and a byte in a hole changes it.
    """
    zero = bytes(_PAGE)
    with open(path, "rb", buffering=0) as f:
        fd = f.fileno()
        size = os.fstat(fd).st_size
        digest = hashlib.sha256(f"sparse {size}\n".encode())
        at = 0
        while at < size:
            try:
                at = os.lseek(fd, at, os.SEEK_DATA) & -_PAGE
                end = os.lseek(fd, at, os.SEEK_HOLE)
                if end <= at:  # the page began in a hole
                    end = at + _PAGE
            except OSError as e:
                if e.errno == errno.ENXIO:
                    break
                raise
            for offset in range(at, end, _PAGE):
                page = os.pread(fd, _PAGE, offset)
                if page != zero[: len(page)]:
                    digest.update(offset.to_bytes(8, "little") + page)
            at = -(-end // _PAGE) * _PAGE
        return digest.hexdigest()


def _hash_all(root: Path, names: Iterable[str], *, sparse: bool) -> dict[str, FileEntry]:
    """Digests of many files, on as many threads as pay (hashlib releases the interpreter lock).

    Args:
        sparse: memory is packed, so that pages files are mostly holes.
    """

    def one(name: str) -> FileEntry:
        path = root / name
        digest = _sparse_sha256 if sparse and _PAGES_FILE.search(name) else sha256_file
        return FileEntry(name, path.stat().st_size, digest(path))

    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        return {entry.path: entry for entry in pool.map(one, names)}


class _Ready(NamedTuple):
    """New images of a snapshot, complete and durable."""

    manifest: Manifest
    stamp: tuple[tuple[int, int, int, int], ...]


class Catalogue:
    """Snapshots below `<root>`; safe against being killed at any point.

    Verification reads every byte once per daemon lifetime and file: afterwards a file counts as unaltered while its
    inode, size, mtime and ctime stand (no write, truncation or replacement leaves all four).
    """

    def __init__(
        self, root: Path, key: SigningKey, store: PageStore | None = None, layers: LayerFiles | None = None
    ) -> None:
        self.root = root
        self.layers = layers
        self._store = store
        self._failures = root.parent / "failed-captures"
        self._invalid = root.parent / "invalidated"
        self._key = key
        self._manifests: dict[str, Manifest] = {}
        self._verified: dict[str, tuple[tuple[int, int, int, int], ...]] = {}
        self._staged: dict[str, tuple[tuple[int, int, int, int], ...]] = {}
        self._retired: dict[str, str] = {}
        self._mutex = threading.Lock()
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.chmod(root, 0o700)
        self.on_removed: Callable[[], None] = lambda: None
        """Called after a snapshot was removed."""
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
                manifest = self._manifests[path.name] = self._read(path.name)
            except IntegrityError as e:
                self.damaged[path.name] = e.message
                continue
            self._sweep(path, manifest)
            mark = path / _RETIRED
            if mark.exists():
                self._retired[path.name] = mark.read_text(errors="replace").strip()

    @staticmethod
    def _sweep(path: Path, manifest: Manifest) -> None:
        """Remove images in a form that the snapshot does not have: a packing was cut off."""
        for other in path.glob("img*"):
            if other.name != manifest.images:
                with contextlib.suppress(OSError):  # it takes room, no more
                    remove_tree(other)

    def _read(self, snapshot_id: str) -> Manifest:
        path = self.root / snapshot_id
        try:
            data = (path / "manifest.json").read_bytes()
            signature = (path / "manifest.sig").read_bytes()
        except OSError as e:
            raise IntegrityError(f"snapshot {snapshot_id}: {e.strerror}: {e.filename}", code="bad-manifest") from None
        self._check(data, signature, f"snapshot {snapshot_id}")
        manifest = decode(data)
        if manifest.id != snapshot_id:
            raise IntegrityError(f"snapshot {snapshot_id}: its manifest is of {manifest.id}", code="bad-manifest")
        return manifest

    def _check(self, data: bytes, signature: bytes, what: str) -> bytes:
        """The signature of `data`. While a manifest is replaced there are two: of the old and of the new."""
        if len(signature) == 2 * _SIGNATURE:
            with contextlib.suppress(IntegrityError):
                self._key.verify(data, signature[:_SIGNATURE], what)
                return signature[:_SIGNATURE]
            signature = signature[_SIGNATURE:]
        self._key.verify(data, signature, what)
        return signature

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

    def form(self, snapshot_id: str) -> str | None:
        """ "loose" or "packed"; None when there is no such snapshot."""
        manifest = self.known(snapshot_id)
        return manifest.form if manifest else None

    def known(self, snapshot_id: str) -> Manifest | None:
        """The manifest of a whole id; None when there is no such snapshot."""
        return self._manifests.get(snapshot_id)

    def mark(self, snapshot_id: str, mark: str, text: str = "") -> None:
        """Put a mark beside the manifest; it says nothing about the content and is not signed.

        Raises:
            StoreError: it cannot be written.
        """
        write_atomic(self.root / self.get(snapshot_id).id / mark, f"{text}\n".encode())

    def unmark(self, snapshot_id: str, mark: str) -> None:
        (self.root / self.get(snapshot_id).id / mark).unlink(missing_ok=True)

    def marked(self, snapshot_id: str, mark: str) -> bool:
        return (self.root / snapshot_id / mark).exists()

    def mark_text(self, snapshot_id: str, mark: str) -> str | None:
        """What a mark says; None where there is none."""
        try:
            return (self.root / snapshot_id / mark).read_text(errors="replace").removesuffix("\n")
        except OSError:
            return None

    def used(self, snapshot_id: str) -> None:
        """Remember that it was thawed now."""
        path = self.root / snapshot_id / _USED
        with contextlib.suppress(OSError):
            path.touch(mode=0o600)

    def by_use(self) -> list[Manifest]:
        """All snapshots, the longest unused first."""
        return sorted(self.manifests(), key=self._last_use)

    def unused_since(self, before: float) -> list[Manifest]:
        """Functions' snapshots that were made, and thawed last, before then (Unix time); not what is pinned."""
        old = [m for m in self.manifests() if m.kind == "function" and self._last_use(m) < before]
        return [m for m in old if not self.marked(m.id, PINNED)]

    def _last_use(self, manifest: Manifest) -> float:
        try:
            return max(manifest.created, (self.root / manifest.id / _USED).stat().st_mtime)
        except OSError:
            return manifest.created

    def retired(self, snapshot_id: str) -> str | None:
        """Why a snapshot is no longer used, also when it is gone; None while it is."""
        known = self._retired.get(snapshot_id)
        return "invalidated" if known is None and self._refused(snapshot_id) else known

    def _refused(self, snapshot_id: str) -> bool:
        return (self._invalid / snapshot_id).is_file()

    def refuse(self, snapshot_id: str) -> None:
        """A person wants to see it no more: it is not used when it comes from elsewhere either, but by their own wish.

        Args:
            snapshot_id: a whole id; it need not be here.

        Raises:
            StoreError: that cannot be written.
        """
        try:
            self._invalid.mkdir(mode=0o700, exist_ok=True)
            (self._invalid / snapshot_id).touch(mode=0o600)
            fsync_dir(self._invalid)
        except OSError as e:
            raise store_error("cannot note the snapshot as invalid", self._invalid, e) from e

    def accept(self, snapshot_id: str) -> None:
        """A person wants it after all."""
        with contextlib.suppress(OSError, ValueError):  # it stays away, or is no id
            (self._invalid / snapshot_id).unlink(missing_ok=True)

    def find(self, function_key: str, worker_class: str) -> Manifest | None:
        """The newest usable snapshot for this function on this kind of host."""
        found = [
            m
            for m in self.manifests()
            if m.function_key == function_key and m.worker_class == worker_class and m.id not in self._retired
        ]
        return found[-1] if found else None

    def last_of(self, app: str, tag: str, params_digest: str, function_key: str) -> Manifest | None:
        """The newest snapshot of a function, of that function key if there is one, whether it is fit for use or not.

        None where there is none, or the newest was invalidated: people know of that.
        """
        found = [m for m in self.manifests() if (m.app, m.tag, m.params_digest) == (app, tag, params_digest)]
        found = [m for m in found if m.kind == "function"]
        same = [m for m in found if m.function_key == function_key]
        last = next(reversed(same or found), None)
        return last if last is not None and self.retired(last.id) != "invalidated" else None

    def superseded(self, snapshot_id: str, keep: int) -> list[Manifest]:
        """Which of a function's earlier snapshots a new one makes superfluous.

        The newest `keep` stay of its kind of host, and as many of the other kind that was used last: a kernel or driver
        that was changed may come back. Where they hold GPU memory, that is so for each chip. What is pinned stays.
        """
        new = self.get(snapshot_id)

        def whose(m: Manifest) -> tuple[str, ...]:
            return m.app, m.tag, m.params_digest, m.host.get("gpu", "")

        by_class: dict[str, list[Manifest]] = {}
        for manifest in self.by_use():
            if whose(manifest) == whose(new) and self.retired(manifest.id) != "invalidated":  # that goes anyway
                by_class[manifest.worker_class] = [*by_class.pop(manifest.worker_class, ()), manifest]
        # The new one is the newest, also where the clock was set back.
        gone = sorted(by_class.pop(new.worker_class), key=lambda m: (m is new, m.created))[:-keep]
        for number, same in enumerate(reversed(by_class.values())):  # that with the last used comes first
            gone += same if number else sorted(same, key=lambda m: m.created)[:-keep]
        return [m for m in gone if not self.marked(m.id, PINNED)]

    def begin(self, snapshot_id: str) -> Staging:
        """A place for a new snapshot.

        Raises:
            StoreError: the directory cannot be made.
        """
        staging = Staging(snapshot_id, self.root / f".staging-{snapshot_id}")
        self._staged.pop(snapshot_id, None)
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
        """Make a finished staging directory visible: data durable, then manifest, then one rename. A sandbox may have
        its layers mounted: nothing in them changes.

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
            entries = _hash_all(staging.path, names, sparse=False)
            full = _with_files(manifest, tuple(entries[n] for n in names), others)
            fsync_tree(staging.path)
            if self.layers is not None:
                large = self._large(full)
                self.layers.keep([(staging.path / f.path, f.sha256, stamp[n]) for n, f in large])
                stamp = self._restamp(staging.path, large, stamp)
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
        except (OSError, ValueError):  # there is none, or no file can have such a name
            return None

    def abandon(self, staging: Staging) -> None:
        """Drop what was captured; what cannot be removed now is swept at the next start."""
        self._remove_quietly(staging.path)

    def _stamp(self, root: Path, names: Iterable[str]) -> tuple[tuple[int, int, int, int], ...]:
        """What no write to a file leaves as it was. That other snapshots come to share a file, or no longer do, is no
        change of it."""
        layers = self.layers

        def one(info: os.stat_result) -> tuple[int, int, int, int]:
            shared = layers is not None and info.st_nlink > 1 and layers.knows(info)
            return info.st_ino, info.st_size, info.st_mtime_ns, 0 if shared else info.st_ctime_ns

        return tuple(one(os.stat(root / name, follow_symlinks=False)) for name in names)

    def _large(self, manifest: Manifest) -> list[tuple[int, FileEntry]]:
        """The files of a snapshot that others may share, with their places in the manifest."""
        return [(n, f) for n, f in enumerate(manifest.files) if f.size >= LARGE and f.path.partition("/")[0] in _LAYERS]

    def _restamp(
        self, path: Path, large: list[tuple[int, FileEntry]], stamp: tuple[tuple[int, int, int, int], ...]
    ) -> tuple[tuple[int, int, int, int], ...]:
        """A snapshot's stamp after its large files may have come to be shared."""
        now = dict(zip((n for n, _ in large), self._stamp(path, [f.path for _, f in large]), strict=True))
        return tuple(now[n] if n in now and now[n][3] == 0 else old for n, old in enumerate(stamp))

    def _note_shared(
        self, path: Path, manifest: Manifest, stamp: tuple[tuple[int, int, int, int], ...]
    ) -> tuple[tuple[int, int, int, int], ...]:
        """After all of a snapshot was found right: what others share of it need not be read again for them."""
        if self.layers is None or not (large := self._large(manifest)):
            return stamp
        for _, entry in large:
            self.layers.verified(path / entry.path)
        now = self._stamp(path, [f.path for f in manifest.files])
        if any(new[:3] != old[:3] or new[3] not in (0, old[3]) for new, old in zip(now, stamp, strict=True)):
            raise IntegrityError(f"snapshot {manifest.id}: it is being altered", code="altered")
        return now

    def remove_tree(self, path: Path) -> None:
        """Remove a directory of a snapshot; what is known of files that it shares with others stays known.

        Raises:
            OSError: something is left.
        """
        if self.layers is None:
            remove_tree(path)
            return
        shared = []
        for part in _LAYERS:
            for folder, _, names in os.walk(path / part):
                with contextlib.suppress(OSError):
                    infos = [os.lstat(os.path.join(folder, name)) for name in names]
                    shared += [i for i in infos if i.st_size >= LARGE and i.st_nlink > 1]
        with self.layers.steady(shared):
            remove_tree(path)

    def forget_verified(self, snapshot_id: str) -> None:
        """Read every byte again at the next use."""
        self._verified.pop(snapshot_id, None)

    def open_verified(self, snapshot_id: str) -> Opened:
        """The snapshot, after its signature and every byte of it have been checked.

        Raises:
            IntegrityError: altered, truncated, or with files added or missing; nothing of it may be restored.
        """
        try:
            manifest = self._read(snapshot_id)
            root = self.root / snapshot_id
            names = self._verify_names(manifest, root)
            stamp = self._stamp(root, names)
            if self._verified.get(snapshot_id) != stamp:
                self._verify_files(manifest, root, stamp, names)
                stamp = self._note_shared(root, manifest, stamp)
        except OSError as e:
            raise IntegrityError(f"snapshot {snapshot_id}: {e.strerror}: {e.filename}", code="unreadable") from e
        files = self._files(manifest) if manifest.form == "packed" else None
        self._verified[snapshot_id] = stamp
        return Opened(manifest, root, files)

    @staticmethod
    def _verify_names(manifest: Manifest, root: Path) -> list[str]:
        names, others = inventory(root, manifest.images)
        expected = [entry.path for entry in manifest.files]
        if names != expected:
            odd = sorted(set(names) ^ set(expected))[:1]
            raise IntegrityError(f"snapshot {manifest.id}: file {odd} added or missing", code="altered")
        if others != manifest.links:
            odd = sorted(k for k in set(others) | set(manifest.links) if others.get(k) != manifest.links.get(k))[:1]
            raise IntegrityError(f"snapshot {manifest.id}: {odd} is not as it was captured", code="altered")
        return names

    @staticmethod
    def _verify_files(
        manifest: Manifest, root: Path, stamp: tuple[tuple[int, int, int, int], ...], names: list[str]
    ) -> None:
        for (_, size, _, _), entry in zip(stamp, manifest.files, strict=True):
            if size != entry.size:
                raise IntegrityError(
                    f"snapshot {manifest.id}: {entry.path} has {size} bytes, not {entry.size}", code="truncated"
                )
        actual = _hash_all(root, names, sparse=manifest.form == "packed")
        for entry in manifest.files:
            if actual[entry.path] != entry:
                raise IntegrityError(f"snapshot {manifest.id}: {entry.path} was altered", code="altered")

    def admit(self, staging: Staging, manifest: Manifest) -> Manifest:
        """Make a snapshot that came from elsewhere visible, after checking that it is what its manifest says.

        Args:
            manifest: of a signature that was checked; it gets this machine's own.

        Raises:
            IntegrityError: it is not what the manifest says.
            StoreError: something could not be written. The staging directory is the caller's to abandon.
        """
        try:
            if self._refused(manifest.id):
                raise NotFoundError(f"snapshot {manifest.id} was invalidated", snapshot=manifest.id)
            self.check(staging, manifest)
            fsync_tree(staging.path)
            data = encode(manifest)
            write_atomic(staging.path / "manifest.json", data)
            write_atomic(staging.path / "manifest.sig", self._key.sign(data))
            fault("admit.manifest")
            os.rename(staging.path, self.root / manifest.id)
            fsync_dir(self.root)
        except OSError as e:
            raise store_error("cannot store the snapshot", staging.path, e) from e
        self._manifests[manifest.id] = manifest
        self._verified[manifest.id] = self._staged.pop(manifest.id)
        if self._refused(manifest.id):  # since it was looked for, by somebody who did not find it here
            self.retire(manifest.id, "invalidated")
        return manifest

    def check(self, staging: Staging, manifest: Manifest) -> None:
        """Whether a snapshot that came from elsewhere is what its manifest says, but for its packs; quick when it was
        checked before and nothing was touched since.

        Raises:
            IntegrityError: it is not.
        """
        try:
            names = self._verify_names(manifest, staging.path)
            stamp = self._stamp(staging.path, names)
            if self._staged.get(staging.id) != stamp:
                self._verify_files(manifest, staging.path, stamp, names)
        except OSError as e:
            raise store_error("cannot check the snapshot", staging.path, e) from e
        self._staged[staging.id] = stamp

    def share(self, staging: Staging, manifest: Manifest) -> None:
        """Let the large files of a snapshot that was just checked be one with their equals, once, before a sandbox
        mounts its layers.

        Raises:
            StoreError: the disk fails.
        """
        if self.layers is None:
            return
        stamp, large = self._staged[staging.id], self._large(manifest)
        try:
            self.layers.share([(staging.path / f.path, f.sha256, stamp[n]) for n, f in large])
            self._staged[staging.id] = self._restamp(staging.path, large, stamp)
        except OSError as e:
            raise store_error("cannot share files of the snapshot", staging.path, e) from e

    def share_captured(self, staging: Staging) -> None:
        """The same for what was captured a moment ago and has no manifest yet, while somebody waits for its thaw."""
        if self.layers is None:
            return
        walked = ((folder, names) for part in _LAYERS for folder, _, names in os.walk(staging.path / part))
        with contextlib.suppress(OSError):  # it saves room, no more; a disk that fails is the commit's to tell of
            self.layers.share_alike(Path(folder, name) for folder, names in walked for name in names)

    def set_aside(self, staging: Staging) -> Path:
        """Let another take a staging directory's place while sandboxes rest on it; where it is now, to be removed."""
        self._staged.pop(staging.id, None)
        hidden = self.root / f".removed-{staging.id}-{time.time_ns()}"
        with contextlib.suppress(OSError):
            os.rename(staging.path, hidden)
        return hidden

    def _files(self, manifest: Manifest) -> tuple[Path, ...]:
        """The files that a packed snapshot's page index names, in its order, each verified."""
        if self._store is None:
            raise IntegrityError(f"snapshot {manifest.id}: its memory is in a page store", code="no-page-store")
        path = self.root / manifest.id / manifest.images
        try:
            names = index_files(path / INDEX)
            beside = {name for name in names if _PAGES_FILE.search(f"img/{name}")}
            packs = self._store.open_raw([name for name in names if name not in beside])
        except (OSError, ValueError) as e:
            raise IntegrityError(f"snapshot {manifest.id}: page index: {e}", code="unreadable") from e
        except StoreError as e:
            raise IntegrityError(f"snapshot {manifest.id}: {e.message}", code=e.code) from e
        return tuple(packs[name] if name in packs else path / name for name in names)

    def ready_images(self, old: Manifest, new: Manifest) -> _Ready:
        """Make images in another form durable, and describe them: what takes long, while restores go on with the old
        ones. `swap_images` and `remove_replaced` come after.

        Args:
            new: as `old`, but for `images` (a directory in the snapshot's own), form and what belongs to it.

        Raises:
            StoreError: something could not be written.
            IntegrityError: what is in both is not the same.
        """
        path = self.root / old.id
        try:
            names, others = inventory(path, new.images)
            stamp = self._stamp(path, names)
            known = {entry.path: entry for entry in old.files}
            fresh = _hash_all(path, [n for n in names if n not in known], sparse=True)
            for name, entry in fresh.items():
                was = known.get(f"{old.images}{name.removeprefix(new.images)}")
                if was and was.sha256 != entry.sha256 and not _PAGES_FILE.search(name) and not name.endswith(INDEX):
                    raise IntegrityError(f"snapshot {old.id}: {was.path} was altered", code="altered")
            full = _with_files(new, tuple(known.get(n) or fresh[n] for n in names), others)
            fsync_tree(path / new.images)
            fsync_dir(path)
            fault("pack.data")
        except OSError as e:
            raise store_error("cannot pack the snapshot", path, e) from e
        return _Ready(full, stamp)

    def swap_images(self, old: Manifest, ready: _Ready) -> None:
        """From now on the new images are the snapshot's. No restore of it may be under way, or begin meanwhile.

        Raises:
            StoreError: something could not be written; the snapshot is as it was, or as it is to be.
        """
        path, full = self.root / old.id, ready.manifest
        try:
            self._replace_manifest(path, encode(full), f"snapshot {full.id}")
        except OSError as e:
            raise store_error("cannot pack the snapshot", path, e) from e
        finally:
            # Whatever went wrong, what is known of it must be what is on disk: its packs are collected otherwise.
            with self._mutex:
                if old.id in self._manifests:
                    with contextlib.suppress(IntegrityError):
                        self._manifests[old.id] = self._read(old.id)
        self._verified[full.id] = ready.stamp

    def remove_replaced(self, manifest: Manifest) -> None:
        """Remove the images that are no longer the snapshot's, which nobody restores from any more."""
        path, names = self.root / manifest.id, [entry.path for entry in manifest.files]
        try:
            before = self._stamp(path, names)
            verified = self._verified.get(manifest.id) == before
            self._sweep(path, manifest)
            after = self._stamp(path, names)
        except OSError:
            return  # it was removed meanwhile
        # Files of the new images may have had names among the old: a name that goes changes a file's time, and no more.
        if verified and all(new[:3] == old[:3] for new, old in zip(after, before, strict=True)):
            self._verified[manifest.id] = after

    def _replace_manifest(self, path: Path, data: bytes, what: str) -> None:
        """At every moment there is a manifest with its signature."""
        signature = self._key.sign(data)
        # Of what is there now, which an attempt that was cut off may have left with two.
        now = self._check((path / "manifest.json").read_bytes(), (path / "manifest.sig").read_bytes(), what)
        write_atomic(path / "manifest.sig", now + signature)
        fault("pack.signed")
        write_atomic(path / "manifest.json", data)
        fault("pack.manifest")
        with contextlib.suppress(StoreError):  # two are as good
            write_atomic(path / "manifest.sig", signature)

    def _remove_quietly(self, path: Path) -> None:
        with contextlib.suppress(OSError):
            self.remove_tree(path)

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

    def reinstate(self, snapshot_id: str) -> None:
        """Take back `retire`.

        Raises:
            StoreError: the mark of it cannot be removed.
        """
        mark = self.root / snapshot_id / _RETIRED
        try:
            mark.unlink(missing_ok=True)
        except OSError as e:
            raise store_error("cannot remove", mark, e) from e
        self._retired.pop(snapshot_id, None)

    def remove(self, snapshot_id: str, *, wait: bool = True) -> None:
        """Delete a snapshot. Running instances keep what they have open.

        Args:
            wait: until its files are gone, too; they may be gigabytes. What is left is removed at the next start.

        Raises:
            StoreError: it could not be removed whole.
        """
        with self._mutex:
            self._manifests.pop(snapshot_id, None)
        self._retired.pop(snapshot_id, None)
        self._verified.pop(snapshot_id, None)
        self.damaged.pop(snapshot_id, None)
        hidden = self.root / f".removed-{snapshot_id}-{time.time_ns()}"
        try:
            os.rename(self.root / snapshot_id, hidden)
            if wait:
                self.remove_tree(hidden)
            else:
                threading.Thread(target=self._remove_quietly, args=(hidden,), daemon=True).start()
            self.on_removed()
        except FileNotFoundError:
            return
        except OSError as e:
            raise store_error("cannot remove the snapshot", hidden, e) from e


def _with_files(manifest: Manifest, files: tuple[FileEntry, ...], links: dict[str, str]) -> Manifest:
    fs_bytes = sum(f.size for f in files if not f.path.startswith(f"{manifest.images}/"))
    return replace(manifest, files=files, links=links, fs_bytes=fs_bytes)
