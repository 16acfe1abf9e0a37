"""Large files of snapshots' file layers, kept once on this machine: equal files are one file with several names.

    <root>/<2>/<sha256>-<what else it is>     a name of its own for each large file that some snapshot has

A layer is the lower directory of an overlay: its files must lie there whole, with owner, mode, time and attributes. So
two files are one only when all of that is equal. Nobody writes to them: a sandbox that does gets a copy (overlayfs). A
name here that no snapshot shares any more goes with the next collection.

What a mounted layer holds is never replaced: whoever has seen the file before goes on with one that has no name, and
later, all at once, with another. A further name elsewhere changes nothing but how many it has.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
import threading
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from woodfrog.errors import StoreError
from woodfrog.faults import fault
from woodfrog.store.chunks import LARGE
from woodfrog.store.files import fsync_dir, sha256_file, store_error
from woodfrog.store.folder import Stamp, stamp_of

__all__ = ["LayerFiles", "LayerStats"]

_FICLONE = 0x40049409
_MOST_LINKS = 30000
"""Names of one file: ext4 allows 65,000."""
_TRIES = 3
"""A file that is read has to be read again when somebody else has given it a name, or taken one, meanwhile."""


@dataclass(frozen=True, slots=True)
class LayerStats:
    """`files`, `bytes`: what there is, once each; `shared_bytes`: what equal files would take beside that."""

    files: int
    bytes: int
    shared_bytes: int


def _else(path: Path, info: os.stat_result) -> str:
    """Digest of what a file is beside its content."""
    digest = hashlib.sha256(f"{info.st_mode:o} {info.st_uid}:{info.st_gid} {info.st_mtime_ns}\n".encode())
    with suppress(OSError):
        for name in sorted(os.listxattr(path, follow_symlinks=False)):
            digest.update(os.fsencode(name) + b"=" + os.getxattr(path, name, follow_symlinks=False) + b"\n")
    return digest.hexdigest()[:32]


def _sharable(info: os.stat_result) -> bool:
    """Whether a file of a layer may become one with others: of several names in one layer, no two belong to different
    files."""
    return stat.S_ISREG(info.st_mode) and info.st_size >= LARGE and info.st_nlink == 1


def _equal(one: Path, other: Path) -> bool:
    """Whether two files have one content. To compare takes a fraction of what digests take."""
    with open(one, "rb", buffering=0) as a, open(other, "rb", buffering=0) as b:
        if os.fstat(a.fileno()).st_size != os.fstat(b.fileno()).st_size:
            return False
        while block := a.read(LARGE):
            if block != b.read(len(block)):
                return False
    return True


class LayerFiles:
    """Any number of threads may use one; of several processes each sees what the others left.

    Args:
        root: its folder, on the file system of the snapshots; made when it is not there.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._mutex = threading.RLock()
        """Held while names are made or removed; never while files are read, which takes as long as they are large."""
        self._verified: dict[int, Stamp] = {}
        """By inode: files whose content was found to be what it is named for, and what they looked like then."""
        try:
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as e:
            raise store_error("cannot keep files of layers", root, e) from e

    def _path(self, name: str) -> Path:
        return self.root / name[:2] / name

    def share(self, files: Iterable[tuple[Path, str, Stamp]]) -> int:
        """Keep the files of one layer once: each becomes one with its equal, if there is one. How many did.

        Before a sandbox mounts the layer, since names in it change, and before it is made durable, since its equals
        may not be yet.

        Args:
            files: with their digest, and what they looked like before they were read for it.

        Raises:
            OSError: the disk fails. Each name is what it was or what it is to be.
        """
        return self._each(files, replace=True)

    def share_alike(self, paths: Iterable[Path]) -> int:
        """The same for files whose digests nobody knows yet, while somebody waits: only what has the size, owner, mode,
        time and attributes of a file here is read, and compared with it.

        Raises:
            OSError: as of `share`, and where there can be no second names.
        """
        sharable = [(path, info) for path in paths if _sharable(info := os.lstat(path))]
        if not sharable:
            return 0
        here: dict[str, list[Path]] = defaultdict(list)
        done: set[Path] = set()
        for kept in self._all():
            here[kept.name.partition("-")[2]].append(kept)
        for path, info in sharable:
            rest = _else(path, info)
            for kept in here.get(rest, ()):
                if kept not in done and self._share_if_equal(path, kept, rest):
                    done.add(kept)
                    break
        return len(done)

    def _share_if_equal(self, path: Path, kept: Path, rest: str) -> bool:
        with suppress(FileNotFoundError):  # it was collected meanwhile
            for _ in range(_TRIES):
                before, found = stamp_of(kept), os.lstat(kept)
                # Its name says what it is, but anybody may have changed it since.
                if found.st_nlink >= _MOST_LINKS or _else(kept, found) != rest or not _equal(path, kept):
                    return False
                with self._mutex:
                    if stamp_of(kept) == before:
                        self._replace(path, kept)
                        return True
        return False

    def keep(self, files: Iterable[tuple[Path, str, Stamp]]) -> None:
        """Let those who come later become one with files of one layer, which stays as it is: it may be mounted.

        Args:
            files: as of `share`, and durable.

        Raises:
            OSError: the disk fails.
        """
        self._each(files, replace=False)

    def _each(self, files: Iterable[tuple[Path, str, Stamp]], *, replace: bool) -> int:
        taken: set[Path] = set()
        try:
            return sum(self._one(path, sha256, stamp, taken, replace) for path, sha256, stamp in files)
        except OSError as e:
            if e.errno not in (errno.EPERM, errno.EMLINK, errno.EXDEV, errno.EOPNOTSUPP):
                raise
            return 0  # there can be no second names here: each stays what it is

    def _one(self, path: Path, sha256: str, stamp: Stamp, taken: set[Path], replace: bool) -> bool:
        info = os.lstat(path)
        if stamp_of(path) != stamp:
            return False
        if not _sharable(info):
            self.verified(path)  # it became one with another before its digest was known
            return False
        kept = self._path(f"{sha256}-{_else(path, info)}")
        if kept in taken:  # no two files of a layer become one
            return False
        taken.add(kept)
        self._read(kept, sha256)
        with self._mutex:
            if not kept.parent.exists():
                kept.parent.mkdir(mode=0o700, exist_ok=True)
                fsync_dir(self.root)
            if self._usable(kept, sha256):
                if replace:
                    self._replace(path, kept)
                return replace
            kept.unlink(missing_ok=True)  # damaged, or of too many names
            os.link(path, kept)
            fsync_dir(kept.parent)
            fault("layers.kept")
            self._note(path)
            return False

    def _replace(self, path: Path, kept: Path) -> None:
        temporary = path.with_name(f".{uuid.uuid4().hex}")
        with self.steady([os.lstat(kept)]):
            try:
                os.link(kept, temporary)
                fault("layers.linked")
                os.rename(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)

    def _read(self, kept: Path, sha256: str) -> None:
        """Find out whether a file here is what it is named for, if nobody knows."""
        with suppress(FileNotFoundError):
            for _ in range(_TRIES):
                info, before = os.lstat(kept), stamp_of(kept)
                if info.st_nlink >= _MOST_LINKS or self.knows(info) or sha256_file(kept) != sha256:
                    return
                with self._mutex:
                    if stamp_of(kept) == before:
                        return self._note(kept)

    def _usable(self, kept: Path, sha256: str) -> bool:
        try:
            info = os.lstat(kept)
            # Its name says so, but anybody may have changed it since.
            return info.st_nlink < _MOST_LINKS and self.knows(info) and kept.name == f"{sha256}-{_else(kept, info)}"
        except FileNotFoundError:
            return False

    def _note(self, path: Path) -> None:
        if (stamp := stamp_of(path)) is not None:
            self._verified[stamp[0]] = stamp

    def knows(self, info: os.stat_result) -> bool:
        """Whether a file is one that is kept here, verified in this process, and untouched since."""
        return self._verified.get(info.st_ino) == (info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)

    def verified(self, path: Path) -> None:
        """Somebody has read a file of a layer and found it right."""
        with suppress(OSError):
            if os.lstat(path).st_nlink > 1:
                self._note(path)

    @contextmanager
    def steady(self, infos: Iterable[os.stat_result]) -> Iterator[None]:
        """While names of files are made or removed, which changes their times: what was known of them stays known."""
        with self._mutex:
            known = {info.st_ino for info in infos if self.knows(info)}
            try:
                yield
            finally:
                if known:
                    for path in self._all():
                        with suppress(OSError):
                            if os.lstat(path).st_ino in known:
                                self._note(path)

    def _all(self) -> Iterator[Path]:
        for folder in sorted(self.root.iterdir()):
            yield from sorted(folder.iterdir())

    def copy(self, sha256: str, size: int, fd: int) -> bool:
        """Write a content to an empty file, if some file here has it: it need not come from elsewhere."""
        folder = self.root / sha256[:2]
        for path in sorted(folder.glob(f"{sha256}-*")) if folder.exists() else ():
            with suppress(OSError), open(path, "rb", buffering=0) as source:
                if os.fstat(source.fileno()).st_size != size:
                    continue
                try:
                    fcntl.ioctl(fd, _FICLONE, source.fileno())
                except OSError:
                    at = 0
                    while at < size and (done := os.copy_file_range(source.fileno(), fd, size - at, at, at)):
                        at += done
                if sha256_file(Path(f"/proc/self/fd/{fd}")) == sha256:
                    return True
            os.ftruncate(fd, 0)
        return False

    def collect(self, *, dry_run: bool = False) -> int:
        """Remove the names that no snapshot shares; bytes freed. With `dry_run`: only count them.

        Raises:
            StoreError: one cannot be removed.
        """
        freed = 0
        try:
            with self._mutex:
                for path in self._all():
                    info = os.lstat(path)
                    if info.st_nlink == 1:
                        freed += info.st_blocks * 512
                        if dry_run:
                            continue
                        path.unlink()
                        self._verified.pop(info.st_ino, None)
        except OSError as e:
            raise store_error("cannot remove files of layers", self.root, e) from e
        return freed

    def stats(self) -> LayerStats:
        files = size = shared = 0
        for path in self._all():
            with suppress(OSError):
                info = os.lstat(path)
                files, size = files + 1, size + info.st_blocks * 512
                shared += max(0, info.st_nlink - 2) * info.st_blocks * 512
        return LayerStats(files, size, shared)

    def verify(self) -> list[str]:
        """What is wrong with the files that snapshots share, read anew; those snapshots say so, too."""
        problems = []
        for path in self._all():
            sha256, _, rest = path.name.partition("-")
            try:
                if os.lstat(path).st_nlink == 1:
                    continue  # of a snapshot that is gone, or never was whole; whoever takes it up reads it first
                if sha256_file(path) != sha256:
                    problems.append(f"the file {sha256[:12]}… is not what it is named for")
                elif _else(path, os.lstat(path)) != rest:
                    problems.append(f"the file {sha256[:12]}… has another owner, mode, time or attribute")
            except FileNotFoundError:
                continue
            except (OSError, StoreError) as e:
                problems.append(f"the file {sha256[:12]}…: {e}")
        return problems
