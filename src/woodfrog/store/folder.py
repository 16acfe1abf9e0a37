"""The folder of packs: which files there are, and what is in them. No index, no locks between processes."""

from __future__ import annotations

import fcntl
import itertools
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from blake3 import blake3

from woodfrog.errors import IntegrityError, StoreError
from woodfrog.store.files import store_error
from woodfrog.store.packs import BATCH, NAME, PAGE, pack_id, page_name, pread_full, read_delta

__all__ = ["PackFolder", "Stamp", "content_digest", "opened", "stamp_of", "wrong_page"]

NAMES_CACHE = 4 << 20
"""Bytes of names kept: those of 512 MiB of pages."""

KEPT_S = 24 * 3600.0
"""So long what has come of a pack waits for the rest of it to be fetched."""
_PARTS = ("names", "delta", "part")

Stamp = tuple[int, int, int, int]
"""Inode, size, and the times of the last change of content and of anything: a file that keeps it keeps its content."""


def stamp_of(fd_or_path: int | Path) -> Stamp | None:
    try:
        s = os.stat(fd_or_path)
    except FileNotFoundError:
        return None
    return s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns


@contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def wrong_page(fd: int, names: bytes, content: blake3 | None = None) -> str | None:
    """What is wrong with a raw form, if anything. `content` is given all of it."""
    count = len(names) // NAME
    if (size := os.fstat(fd).st_size) != count * PAGE:
        return f"has {size} bytes of pages, not {count * PAGE}"
    view = memoryview(bytearray(min(count, BATCH) * PAGE))
    for begin in range(0, count, BATCH):
        n = min(BATCH, count - begin)
        try:
            pread_full(fd, view[: n * PAGE], begin * PAGE)
        except EOFError as e:
            return str(e)
        found = b"".join([page_name(view[i : i + PAGE]) for i in range(0, n * PAGE, PAGE)])
        expected = names[begin * NAME : (begin + n) * NAME]
        if found != expected:
            wrong = next(i for i in range(n) if found[i * NAME : (i + 1) * NAME] != expected[i * NAME : (i + 1) * NAME])
            return f"page {begin + wrong} is not what it is named for"
        if content is not None:
            content.update(view[: n * PAGE])
    return None


def content_digest(fd: int) -> bytes:
    """blake3 of a file: several times as fast as of its pages one by one, and other threads run meanwhile."""
    digest, buffer = blake3(), memoryview(bytearray(BATCH * PAGE))
    at = 0
    while n := os.preadv(fd, [buffer], at):
        digest.update(buffer[:n])
        at += n
    return digest.digest()


class PackFolder:
    """`<root>/packs`, `<root>/partial` and `<root>/tmp`.

    Args:
        root: made when it is not there.
        prefix: of this process's temporary files.
    """

    def __init__(self, root: Path, prefix: str) -> None:
        self.packs, self.partial, self.tmp = root / "packs", root / "partial", root / "tmp"
        self._prefix = prefix
        try:
            for folder in (root, self.packs, self.partial, self.tmp):
                folder.mkdir(parents=True, exist_ok=True)
                os.chmod(folder, 0o700)
        except OSError as e:
            raise store_error("cannot open the page store", root, e) from e
        self._counter = itertools.count()
        self._mutex = threading.Lock()
        self._names: OrderedDict[str, bytes] = OrderedDict()
        self._names_size = 0
        self._bases: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {}

    def path(self, pack: str, form: str) -> Path:
        return self.packs / pack[:2] / f"{pack}.{form}"

    def temporary(self, form: str) -> Path:
        """A name that nobody uses. It must be on the same file system as the packs."""
        return self.tmp / f"{self._prefix}-{next(self._counter)}-{id(self):x}.{form}"

    def part(self, pack: str, form: str) -> Path:
        """What has come of a pack that is on its way ("part"), and what it is made of ("names", "delta")."""
        return self.partial / f"{pack}.{form}"

    def hold_part(self, pack: str) -> int | None:
        """A descriptor of a pack's part, made if there is none, whose lock only one can have; None: another has it."""
        path = self.part(pack, "part")
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held, named = os.fstat(fd), os.stat(path)
                if held.st_ino == named.st_ino and held.st_nlink == 1:
                    return fd
                if held.st_ino == named.st_ino:
                    path.unlink()  # it is a pack by now, which nobody may write to
            except BlockingIOError:
                os.close(fd)
                return None
            except FileNotFoundError:
                pass  # who had it is done with it
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)

    def drop_part(self, pack: str) -> None:
        """Remove it; the data last, since whoever looks goes by that. Hold it."""
        for form in _PARTS:
            self.part(pack, form).unlink(missing_ok=True)

    def sweep_parts(self, is_here: Callable[[str], bool]) -> None:
        """Remove parts that nobody is bringing, of packs that are here or that nobody has gone on with for long."""
        for pack in {entry.name.partition(".")[0] for entry in os.scandir(self.partial)}:
            path = self.part(pack, "part")
            existed = path.exists()
            if (fd := self.hold_part(pack)) is None:
                continue
            try:
                info = os.fstat(fd)
                if not (existed and info.st_size) or is_here(pack) or info.st_mtime < time.time() - KEPT_S:
                    self.drop_part(pack)
            finally:
                os.close(fd)

    def listing(self) -> dict[str, set[str]]:
        """The forms that there are of each pack."""
        found: dict[str, set[str]] = {}
        for folder in os.scandir(self.packs):
            for entry in os.scandir(folder.path):
                pack, _, form = entry.name.partition(".")
                found.setdefault(pack, set()).add(form)
        return found

    def read_names(self, pack: str) -> bytes:
        try:
            names = self.path(pack, "names").read_bytes()
        except FileNotFoundError as e:
            raise self.missing(pack) from e
        except OSError as e:
            raise store_error("cannot read", self.path(pack, "names"), e) from e
        if not names or len(names) % NAME or pack_id(names) != pack:
            raise IntegrityError(f"the pack {pack[:12]}… in {self.packs}: its names are damaged", pack=pack)
        return names

    def names(self, pack: str) -> bytes:
        with self._mutex:
            if pack in self._names:
                self._names.move_to_end(pack)
                return self._names[pack]
        names = self.read_names(pack)
        with self._mutex:
            if pack not in self._names:
                self._names[pack] = names
                self._names_size += len(names)
                while self._names_size > NAMES_CACHE and len(self._names) > 1:
                    self._names_size -= len(self._names.popitem(last=False)[1])
        return names

    def forget(self, pack: str) -> None:
        with self._mutex:
            self._bases.pop(pack, None)
            self._names_size -= len(self._names.pop(pack, b""))

    def bases_of(self, pack: str) -> tuple[str, ...]:
        """The packs that a pack rests on; none for a raw, missing or damaged one."""
        path = self.path(pack, "delta")
        try:
            s = os.stat(path)
            if (known := self._bases.get(pack)) and known[0] == (s.st_ino, s.st_size, s.st_mtime_ns):
                return known[1]
            bases = read_delta(path).bases
        except (FileNotFoundError, IntegrityError):
            return ()
        self._bases[pack] = ((s.st_ino, s.st_size, s.st_mtime_ns), bases)
        return bases

    def is_whole(self, pack: str) -> bool:
        """Whether the files of a pack are there, by their sizes."""
        try:
            size = os.stat(self.path(pack, "names")).st_size // NAME * PAGE
            if self.path(pack, "delta").exists():
                return True
            return os.stat(self.path(pack, "pages")).st_size == size
        except OSError:
            return False

    def missing(self, pack: str) -> StoreError:
        return StoreError(f"the pack {pack[:12]}… is missing from {self.packs}", code="pack-missing", pack=pack)
