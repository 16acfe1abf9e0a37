"""The page store: every page of memory once, in packs named by what is in them.

    <root>/packs/<id[:2]>/<id>.names|.pages|.delta    see packs.py
    <root>/index.sqlite                               see index.py; found again from the packs when it is lost
    <root>/partial/<id>.part|.names|.delta            what has come of packs on their way, see partial.py
    <root>/tmp/<pid>-<born>-...                       of writers; those of dead processes go at the next open

A pack becomes visible when its `.names` gets its name; by then its data is durable. It goes in two steps: first its
row moves to `doomed`, from which moment nobody finds it, then its files are removed, names first.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from blake3 import blake3

from woodfrog.errors import IntegrityError, StoreError, WoodfrogError
from woodfrog.faults import fault
from woodfrog.store.files import fsync_dir, store_error
from woodfrog.store.folder import PackFolder, Stamp, content_digest, opened, stamp_of, wrong_page
from woodfrog.store.index import BrokenIndex, Index, identity, is_alive, page_key
from woodfrog.store.ingest import Ingest, Ingested, Run
from woodfrog.store.packs import (
    NAME,
    PAGE,
    Delta,
    Ref,
    is_pack_id,
    pack_id,
    page_name,
    read_delta,
    write_full,
)

__all__ = [
    "PAGE",
    "Collected",
    "Ingested",
    "PageStore",
    "Problem",
    "Ref",
    "Run",
    "StoreStats",
]

LISTED_AT_ONCE = 4096
LISTED_TOGETHER = 200_000
"""Rows of pages put in order at a time, about: some tens of megabytes."""
THREADS = 4


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong in the store. `pack` is "" where it is about none."""

    pack: str
    what: str


@dataclass(frozen=True, slots=True)
class Collected:
    """What a gc removed."""

    packs: tuple[str, ...]
    freed_bytes: int


@dataclass(frozen=True, slots=True)
class StoreStats:
    """`raw_bytes`: of all pages; `stored_bytes`: what packs take on disk; `cache_bytes`: rebuilt packs, beside that."""

    packs: int
    pages: int
    raw_bytes: int
    stored_bytes: int
    cache_bytes: int


class PageStore:
    """The pages of all snapshots of one machine. Any number of processes and threads may use one root at a time.

    Every method blocks: call it in a thread. Errors: StoreError (missing, disk full), IntegrityError (altered).

    Args:
        root: its folder; made when it is not there.
        key: 32 secret bytes of this machine. With them a pack whose pages were all verified gets a seal, a keyed digest
            of its content, and later processes check that instead of every page: as safe as the key, several times as
            fast. Without, each process verifies every page.

    Example:
        store = PageStore(home / "pages")
        done = store.ingest([Run(fd, 0, 1000)], owner="capture-7")
        paths = store.open_raw(done.packs)
        store.release("capture-7")
    """

    def __init__(self, root: Path, *, key: bytes | None = None) -> None:
        self.root, self.key = root, key
        self.me = identity()
        self.folder = PackFolder(root, f"{self.me[0]}-{self.me[1]}")
        self._verified: dict[str, tuple[Stamp, Stamp | None]] = {}
        self._locks = {delta: [threading.RLock() for _ in range(32)] for delta in (False, True)}
        self.index = Index(root, self.me, self._fill)
        self._settle()

    def close(self) -> None:
        """Leases of this process stay until it ends."""
        self.index.close()

    # The index and the files

    def _fill(self, connection: sqlite3.Connection) -> None:
        """Enter packs that no row speaks of, and remove what dead writers have left. In a write transaction."""
        for entry in os.scandir(self.folder.tmp):
            pid, _, rest = entry.name.partition("-")
            if not (pid.isdigit() and is_alive((int(pid), rest.partition("-")[0]))):
                Path(entry.path).unlink(missing_ok=True)
        good = {p for (p,) in connection.execute("SELECT id FROM packs WHERE bad = 0")}
        self.folder.sweep_parts(lambda pack: pack in good and self.folder.is_whole(pack))
        known = {p for (p,) in connection.execute("SELECT id FROM packs UNION SELECT id FROM doomed")}
        # The rows themselves, not the index over them: either may be damaged alone.
        known.update(p for (p,) in connection.execute("SELECT id FROM packs NOT INDEXED"))
        if odd := [p for p in known if not (isinstance(p, str) and is_pack_id(p))]:
            raise BrokenIndex(f"it names a pack {odd[0]!r}")
        for pack, forms in self.folder.listing().items():
            if pack in known or not is_pack_id(pack):
                continue
            if "names" not in forms:
                for form in forms:
                    self.folder.path(pack, form).unlink(missing_ok=True)
            elif self.folder.is_whole(pack):
                self._enter(connection, pack)

    def _enter(self, connection: sqlite3.Connection, pack: str) -> int:
        """Write a pack's row; its size on disk."""
        names = os.stat(self.folder.path(pack, "names")).st_size
        delta = self.folder.path(pack, "delta").exists()
        stored = names + os.stat(self.folder.path(pack, "delta" if delta else "pages")).st_size
        connection.execute(
            "INSERT INTO packs (id, delta, pages, stored, used) VALUES (?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET "
            "delta = excluded.delta, stored = excluded.stored, used = excluded.used, bad = 0, listed = 0, seal = NULL",
            (pack, delta, names // NAME, stored, time.time()),
        )
        return stored

    def _tidy(self) -> None:
        """Put right what processes have left that died."""
        self.index.write(self._fill)
        self._settle()

    def _settle(self) -> None:
        """Finish what others, or this process before, did not come to: packs half removed, packs not listed."""
        self._remove(self.index.query("SELECT id, num FROM doomed"))
        self._list(self.index.query("SELECT id, num FROM packs WHERE listed = 0 AND typeof(id) = 'text'"))

    def _rows(self, packs: Iterable[tuple[str, int]]) -> Iterator[tuple[list[tuple[int, int, int]], list[tuple[int]]]]:
        """The rows (key, pack, slot) of the pages of some packs, some packs at a time, and the numbers of those packs.

        In the order of keys: each transaction of a few then changes a part of the table, and not all of it.
        """
        rows: list[tuple[int, int, int]] = []
        nums: list[tuple[int]] = []
        for pack, num in packs:
            try:
                names = self.folder.names(pack)
            except (StoreError, IntegrityError):
                continue
            rows += [(page_key(names[i : i + NAME]), num, i // NAME) for i in range(0, len(names), NAME)]
            nums.append((num,))
            if len(rows) >= LISTED_TOGETHER:
                rows.sort()
                yield rows, nums
                rows, nums = [], []
        rows.sort()
        yield rows, nums

    def _list(self, packs: Iterable[tuple[str, int]]) -> None:
        """Make packs' pages findable. In small transactions, since others wait for each."""
        for rows, nums in self._rows(packs):
            for begin in range(0, len(rows), LISTED_AT_ONCE):
                part = rows[begin : begin + LISTED_AT_ONCE]
                self.index.execute("INSERT OR REPLACE INTO pages VALUES (?, ?, ?)", part)
            if nums:
                fault("store.listed")
                self.index.execute("UPDATE packs SET listed = 1 WHERE num = ?", nums)

    def _remove(self, packs: Sequence[tuple[str, int]]) -> None:
        """Remove doomed packs' rows and files."""
        for rows, _ in self._rows(packs):
            for begin in range(0, len(rows), LISTED_AT_ONCE):
                part = [row[:2] for row in rows[begin : begin + LISTED_AT_ONCE]]
                self.index.execute("DELETE FROM pages WHERE key = ? AND pack = ?", part)
        for pack, num in packs:
            self._remove_files(pack, num)

    def _remove_files(self, pack: str, num: int) -> None:
        def work(connection: sqlite3.Connection) -> None:
            if connection.execute("SELECT 1 FROM doomed WHERE id = ? AND num = ?", (pack, num)).fetchone() is None:
                return  # it came back, or another process was first
            if connection.execute("SELECT 1 FROM packs NOT INDEXED WHERE id = ?", (pack,)).fetchone():
                raise BrokenIndex(f"the pack {pack} both is and goes")
            self.folder.path(pack, "names").unlink(missing_ok=True)
            fault("store.gc.unlinked")
            self._unlink(pack)
            fault("store.gc.removed")
            connection.execute("DELETE FROM doomed WHERE id = ?", (pack,))

        self.index.write(work)

    def _forget(self, pack: str) -> None:
        self._verified.pop(pack, None)
        self.folder.forget(pack)

    def _unlink(self, pack: str) -> None:
        self._forget(pack)
        for form in ("names", "pages", "delta"):
            self.folder.path(pack, form).unlink(missing_ok=True)

    def publish(self, files: dict[str, Path], names: bytes, owner: str) -> tuple[str, int]:
        """Give durable temporary files their names. The pack's id, and what it takes on disk: 0 if it was there."""
        pack = pack_id(names)
        temporary = files["names"] = self.folder.temporary("names")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            write_full(fd, names)
            os.fsync(fd)
        finally:
            os.close(fd)
        folder = self.folder.path(pack, "names").parent
        if not folder.exists():
            folder.mkdir(mode=0o700, exist_ok=True)
            fsync_dir(self.folder.packs)
        fault("store.durable")

        def work(connection: sqlite3.Connection) -> int:
            row = connection.execute("SELECT bad FROM packs WHERE id = ?", (pack,)).fetchone()
            if owner:
                self.index.lease(connection, [pack], owner)
            if row == (0,) and self.folder.is_whole(pack):
                return 0
            self._unlink(pack)  # damaged, or half removed
            connection.execute("DELETE FROM doomed WHERE id = ?", (pack,))
            for form in ("pages", "delta", "names"):
                if form in files:
                    fault(f"store.{form}")
                    os.rename(files[form], self.folder.path(pack, form))
            fault("store.renamed")
            fsync_dir(folder)
            return self._enter(connection, pack)

        stored = self.index.write(work)
        fault("store.entered")
        for path in files.values():
            path.unlink(missing_ok=True)
        if stored:
            if "pages" in files and (stamp := stamp_of(self.folder.path(pack, "pages"))):
                self._set_verified(pack, stamp)  # hashed as they were written
            ((num,),) = self.index.query("SELECT num FROM packs WHERE id = ?", (pack,))
            self._list([(pack, num)])
        return pack, stored

    def _quarantine(self, pack: str) -> None:
        """Share no page of a damaged pack any more; it is stored anew when its pages come again."""
        self._forget(pack)
        self.index.execute("UPDATE packs SET bad = 1 WHERE id = ?", [(pack,)])

    # Leases

    def lease(self, packs: Iterable[str], owner: str) -> None:
        """Keep packs, and what they rest on, from being collected until `release`, or until this process ends."""
        wanted = sorted({p for p in packs if p})

        def work(connection: sqlite3.Connection) -> None:
            self.index.lease(connection, wanted, owner)
            for pack in self.needs(wanted):  # a pack that is being removed stays, if that has not begun
                row = connection.execute("SELECT 1 FROM doomed WHERE id = ?", (pack,)).fetchone()
                if row is not None and self.folder.is_whole(pack):
                    connection.execute("DELETE FROM doomed WHERE id = ?", (pack,))
                    self._enter(connection, pack)

        self.index.write(work)
        fault("store.leased")

    def release(self, owner: str) -> None:
        """Give up all leases that this process holds for `owner`."""
        self.index.write(lambda c: self.index.release(c, owner))

    def needs(self, packs: Iterable[str]) -> set[str]:
        """These packs and those that their deltas rest on."""
        wanted = {p for p in packs if p}
        return wanted.union(*map(self.folder.bases_of, wanted))

    # Reading

    def has(self, pack: str) -> bool:
        """Whether a pack is here, whole by its sizes and not known to be damaged. Lease it first."""
        if not is_pack_id(pack) or not self.folder.is_whole(pack):
            return False
        return self.index.query("SELECT bad FROM packs WHERE id = ?", (pack,)) == [(0,)]

    def files(self, pack: str) -> tuple[Path, Path, str]:
        """A pack's files, for `adopt` elsewhere: names, content, and its form ("pages", "delta"). Lease first.

        Raises:
            StoreError: it is missing (`pack-missing`).
        """
        if not is_pack_id(pack) or not self.folder.is_whole(pack):
            raise self.folder.missing(pack)
        form = "delta" if self.folder.path(pack, "delta").exists() else "pages"
        return self.folder.path(pack, "names"), self.folder.path(pack, form), form

    def open_raw(self, packs: Iterable[str]) -> dict[str, Path]:
        """The raw form of each pack, every page of it verified in this process since the file last changed.

        Deltas are rebuilt where that has not been done. Lease packs first: `gc` and `trim_cache` let leased ones be.

        Raises:
            StoreError: a pack is missing (`pack-missing`), or the disk is full.
            IntegrityError: a pack, or one that it rests on, is damaged (`pack` says which).
        """
        wanted = sorted({p for p in packs if p})
        for pack in wanted:
            if not is_pack_id(pack):
                raise StoreError(f"{pack!r} is not the id of a pack", code="pack-missing", pack=pack)
        todo = [p for p in wanted if not self._is_verified(p)]
        bases = {b for p in todo for b in self.folder.bases_of(p) if not self.folder.path(p, "pages").exists()}
        for step in (sorted(bases), todo):
            step = [p for p in step if not self._is_verified(p)]
            if len(step) > 1:
                with ThreadPoolExecutor(THREADS) as pool:
                    list(pool.map(self._open, step))
            elif step:
                self._open(step[0])
        for pack in wanted:
            delta = self.folder.path(pack, "delta")
            with suppress(OSError):  # for trim_cache
                os.utime(delta, ns=(time.time_ns(), os.stat(delta).st_mtime_ns))
        return {p: self.folder.path(p, "pages") for p in wanted}

    def _set_verified(self, pack: str, stamp: Stamp) -> None:
        self._verified[pack] = stamp, stamp_of(self.folder.path(pack, "names"))

    def unlink_alias(self, pack: str, path: Path) -> None:
        """Remove another name of what may be a pack's raw form by now: its stamp changes, its content does not."""
        verified = self._is_verified(pack)
        path.unlink(missing_ok=True)
        if verified and (stamp := stamp_of(self.folder.path(pack, "pages"))):
            self._set_verified(pack, stamp)

    def _is_verified(self, pack: str) -> bool:
        known = self._verified.get(pack)
        if known is None:
            return False
        if stamp_of(self.folder.path(pack, "names")) != known[1]:
            self.folder.forget(pack)  # they were read once and kept
            return False
        return stamp_of(self.folder.path(pack, "pages")) == known[0]

    def _open(self, pack: str) -> None:
        delta = self.folder.path(pack, "delta").exists()
        with self._locks[delta][int(pack[:2], 16) % 32]:
            if self._is_verified(pack):
                return
            path = self.folder.path(pack, "pages")
            try:
                names = self.folder.names(pack)
                if not self._check(pack, path, names):
                    if not delta:
                        raise self.folder.missing(pack)
                    self._rebuild(pack, path, names)
            except IntegrityError as e:
                if e.fields.get("pack") == pack:
                    with suppress(StoreError):  # the disk may be full
                        self._quarantine(pack)
                raise
            except OSError as e:
                raise store_error("cannot read", path, e) from e

    def _check(self, pack: str, path: Path, names: bytes) -> bool:
        """Verify a raw form; False when there is none, or when it is a cache and damaged."""
        try:
            with opened(path) as fd:
                before = stamp_of(fd)
                wrong = None
                if not self._is_sealed(pack, fd):
                    content = blake3() if self.key else None
                    wrong = wrong_page(fd, names, content)
                    if wrong is None:
                        self.seal(pack, content)
                stamp = stamp_of(fd)
        except FileNotFoundError:
            return False
        if wrong is None and stamp is not None and stamp == before:
            self._set_verified(pack, stamp)
            return True
        if self.folder.path(pack, "delta").exists():
            return False
        raise IntegrityError(
            f"the pack {pack[:12]}… in {self.folder.packs}: {wrong or 'changes while it is read'}", pack=pack
        )

    def _sealed(self, pack: str, content: bytes) -> bytes:
        assert self.key is not None
        return blake3(bytes.fromhex(pack) + content, key=self.key).digest()

    def _is_sealed(self, pack: str, fd: int) -> bool:
        if self.key is None:
            return False
        rows = self.index.query("SELECT seal FROM packs WHERE id = ? AND seal IS NOT NULL", (pack,))
        return bool(rows) and self._sealed(pack, content_digest(fd)) == rows[0][0]

    def seal(self, pack: str, content: blake3 | None) -> None:
        if content is not None:
            seal = self._sealed(pack, content.digest())
            with suppress(StoreError):  # without it every page is verified
                self.index.execute("UPDATE packs SET seal = ? WHERE id = ?", [(seal, pack)])

    def delta_of(self, pack: str, names: bytes) -> Delta:
        try:
            delta = read_delta(self.folder.path(pack, "delta"))
        except IntegrityError as e:
            raise IntegrityError(f"the pack {pack[:12]}… in {self.folder.packs}: {e}", pack=pack) from e
        if delta.pages * NAME != len(names):
            raise IntegrityError(f"the pack {pack[:12]}… in {self.folder.packs}: names and delta differ", pack=pack)
        return delta

    def _decode(self, pack: str, delta: Delta, names: bytes) -> Iterator[bytes]:
        """A delta's pages, each found to be what it is named for."""
        bases = self.open_raw(delta.bases)
        with ExitStack() as stack:
            files = {b: stack.enter_context(opened(p)) for b, p in bases.items()}
            slot = 0
            try:
                for pages in delta.decode(files):
                    view = memoryview(pages)
                    found = b"".join([page_name(view[i : i + PAGE]) for i in range(0, len(pages), PAGE)])
                    if found != names[slot * NAME : slot * NAME + len(found)]:
                        raise IntegrityError("a page is not what it is named for")
                    slot += len(pages) // PAGE
                    yield pages
            except IntegrityError as e:
                raise IntegrityError(f"the pack {pack[:12]}… in {self.folder.packs}: {e}", pack=pack) from e

    def _rebuild(self, pack: str, path: Path, names: bytes) -> None:
        delta = self.delta_of(pack, names)
        temporary = self.folder.temporary("pages")
        content = blake3() if self.key else None
        try:
            fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                for pages in self._decode(pack, delta, names):
                    write_full(fd, pages)
                    if content is not None:
                        content.update(pages)
                fault("store.rebuilt")
                os.rename(temporary, path)
                stamp = stamp_of(fd)
            finally:
                os.close(fd)
        except OSError as e:
            temporary.unlink(missing_ok=True)
            raise store_error("cannot rebuild", path, e) from e
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        assert stamp is not None
        self._set_verified(pack, stamp)
        self.seal(pack, content)

    def verify(self, packs: Iterable[str] | None = None, deep: bool = True) -> list[Problem]:
        """What is wrong with some packs, or with the whole store. Mends nothing of that.

        `deep`: read every page; otherwise only names, sizes and deltas' checksums.
        """
        problems: list[Problem] = []
        if packs is None:
            self._tidy()
            doomed = {p for (p,) in self.index.query("SELECT id FROM doomed")}
            wanted = {p for (p,) in self.index.query("SELECT id FROM packs")} | set(self.folder.listing()) - doomed
        else:
            wanted = {p for p in packs if p}
        for pack in sorted(wanted):
            found = self._wrong(pack, deep) if is_pack_id(pack) else ["is not the id of a pack"]
            # Read only now, and in a transaction: meanwhile the pack may have come or gone.
            rows = self.index.write(partial(self._row, pack=pack))
            if rows is None:
                if packs is None:
                    continue
            elif not found and rows != (self.folder.path(pack, "delta").exists(), len(self.folder.names(pack)) // NAME):
                found = ["the index has it otherwise" if rows else "the index does not have it"]
            problems.extend(Problem(pack, what) for what in found)
        if packs is None and deep:
            problems.extend(self._wrong_rows())
        return problems

    def _row(self, connection: sqlite3.Connection, pack: str) -> tuple[int, int] | tuple[()] | None:
        """Whether a pack is a delta and its pages, as the index has it; None when there is no such pack at all."""
        row: tuple[int, int] | None = connection.execute(
            "SELECT delta, pages FROM packs WHERE id = ?", (pack,)
        ).fetchone()
        if row is not None:
            return row
        return () if self.folder.path(pack, "names").exists() else None

    def _wrong(self, pack: str, deep: bool) -> list[str]:
        try:
            names = self.folder.read_names(pack)
            raw = self.folder.path(pack, "pages")
            if not self.folder.path(pack, "delta").exists():
                if deep:
                    with opened(raw) as fd:
                        wrong = wrong_page(fd, names)
                        return [wrong] if wrong else []
                return [] if os.stat(raw).st_size == len(names) // NAME * PAGE else ["its pages have the wrong size"]
            delta = self.delta_of(pack, names)
            if deep:
                for _ in self._decode(pack, delta, names):
                    pass
            problems = [f"rests on {b[:12]}…, which is missing" for b in delta.bases if not self.folder.is_whole(b)]
            if deep and raw.exists():
                with opened(raw) as fd:
                    wrong = wrong_page(fd, names)
                    if wrong:
                        problems.append(f"its rebuilt form {wrong}")
            return problems
        except FileNotFoundError:
            return ["its pages are missing"]
        except OSError as e:
            return [f"cannot be read: {e.strerror}"]
        except WoodfrogError as e:
            return [e.message]

    def _wrong_rows(self) -> list[Problem]:
        """Rows of the index that name another page than they say. Harmless: whoever reads one compares the names."""
        found: dict[int, array[int]] = {}
        last = -(1 << 63)
        statement = "SELECT key, pack, slot FROM pages WHERE key >= ? ORDER BY key LIMIT 65536"
        while rows := self.index.query(statement, (last,)):
            for key, num, slot in rows:
                slot = slot if isinstance(slot, int) else -1
                found.setdefault(num, array("q")).extend((key, slot))
            if (last := rows[-1][0] + 1) >= 1 << 63:
                break
        problems = []
        for num, pack in self.index.query("SELECT num, id FROM packs WHERE typeof(id) = 'text'"):
            try:
                names = self.folder.names(pack)
            except WoodfrogError:
                continue
            pairs = found.get(num, array("q"))
            each = zip(pairs[::2], pairs[1::2], strict=True)
            wrong = sum(page_key(names[slot * NAME : (slot + 1) * NAME]) != key for key, slot in each)
            if wrong:
                problems.append(Problem(pack, f"the index names {wrong} pages of it wrongly"))
        return problems

    def stats(self) -> StoreStats:
        ((packs, pages, stored),) = self.index.query("SELECT COUNT(*), TOTAL(pages), TOTAL(stored) FROM packs")
        cached = sum(size for _, size, _ in self._cached())
        return StoreStats(packs, int(pages), int(pages) * PAGE, int(stored), cached)

    def _cached(self) -> list[tuple[float, int, str]]:
        """Rebuilt packs: when last opened, bytes, id."""
        found = []
        for pack, forms in self.folder.listing().items():
            if {"delta", "pages"} <= forms:
                try:
                    used, size = (
                        os.stat(self.folder.path(pack, "delta")),
                        os.stat(self.folder.path(pack, "pages")).st_size,
                    )
                except FileNotFoundError:
                    continue
                found.append((max(used.st_atime, used.st_mtime), size, pack))
        return found

    def trim_cache(self, budget_bytes: int, keep: Collection[str] = (), *, dry_run: bool = False) -> int:
        """Drop rebuilt packs, least recently opened first, until they take no more than a budget; the bytes freed.

        Leased packs and those of `keep` stay. `dry_run`: only say how much would go.
        """
        cached = sorted(self._cached())
        excess = sum(size for _, size, _ in cached) - budget_bytes
        freed, dropped = 0, []

        def work(connection: sqlite3.Connection) -> None:
            # Whoever leases after this finds them gone. The disk frees them later, since others wait for this.
            nonlocal freed
            leased = self.index.leased(connection) | set(keep)
            for _, size, pack in cached:
                if freed >= excess:
                    break
                if pack not in leased and self.folder.path(pack, "delta").exists():
                    if dry_run:
                        freed += size
                        continue
                    self._verified.pop(pack, None)
                    temporary = self.folder.temporary("pages")
                    with suppress(FileNotFoundError):
                        os.rename(self.folder.path(pack, "pages"), temporary)
                        dropped.append(temporary)
                        freed += size

        if excess > 0:
            self.index.write(work)
        for path in dropped:
            path.unlink(missing_ok=True)
        return freed

    # Removing

    def gc(
        self, live: Collection[str] | Callable[[], Collection[str]], *, min_age_s: float = 120.0, dry_run: bool = False
    ) -> Collected:
        """Remove packs that are not live, nor rested on by live ones, nor leased, nor were within `min_age_s`.

        Args:
            live: the packs to keep, or what finds them, called while no lease can be taken or released: whoever makes
                packs live before it releases its lease loses none, whatever `min_age_s` is.
            min_age_s: with a plain set, at least the time from finding it to this call.
            dry_run: only say what would go.
        """
        self._tidy()

        def work(connection: sqlite3.Connection) -> list[tuple[str, int, int]]:
            rows = connection.execute(
                "SELECT id, num, CAST(stored AS INTEGER), CAST(used AS REAL) FROM packs"
            ).fetchall()
            now = time.time()
            young = {i for i, _, _, used in rows if now - used < min_age_s}
            keep = self.needs({*(live() if callable(live) else live), *young, *self.index.leased(connection)})
            gone = [(i, num, stored) for i, num, stored, _ in rows if i not in keep]
            if dry_run:
                return gone
            connection.executemany("INSERT OR REPLACE INTO doomed VALUES (?, ?)", [g[:2] for g in gone])
            connection.executemany("DELETE FROM packs WHERE id = ?", [(g[0],) for g in gone])
            return gone

        gone = self.index.write(work, durable=True)
        try:
            fault("store.gc.marked")
            if not dry_run:
                self._remove([g[:2] for g in gone])
        except OSError as e:
            raise store_error("cannot remove packs", self.folder.packs, e) from e
        return Collected(tuple(sorted(g[0] for g in gone)), sum(g[2] for g in gone))

    # Writing

    def ingest(self, runs: Sequence[Run], *, owner: str, breathe: Callable[[], None] | None = None) -> Ingested:
        """Store pages that the store does not have; all packs that the result names are leased to `owner`.

        Args:
            runs: what to store. Their files must not change meanwhile.
            breathe: called every 256 pages with no lock held: it may wait until more urgent work is done.

        Raises:
            StoreError: the disk is full (`disk-full`), or a run reaches beyond the end of its file.
        """
        self._settle()
        with Ingest(self, owner) as work:
            try:
                return work.run(runs, breathe)
            except OSError as e:
                raise store_error("cannot store pages", self.folder.packs / "x", e) from e

    def adopt(self, names: bytes, *, pages: Path | None = None, delta: Path | None = None, owner: str = "") -> str:
        """Take in a pack that was made elsewhere, in either form, after verifying every page; its id.

        Raises:
            IntegrityError: a page is not what it is named for.
            StoreError: a base of the delta is not here (`pack-missing`), or the disk is full.
        """
        if (pages is None) == (delta is None):
            raise ValueError("adopt needs pages or a delta")
        if not names or len(names) % NAME:
            raise IntegrityError("the names of a pack are not a multiple of 32 bytes")
        pack, source = pack_id(names), pages or delta
        assert source is not None
        files: dict[str, Path] = {}
        try:
            form = "pages" if delta is None else "delta"
            files[form] = self.folder.temporary(form)
            with opened(source) as fd, open(files[form], "xb", opener=_private) as out:
                at = 0
                while sent := os.sendfile(out.fileno(), fd, at, 1 << 24):
                    at += sent
                os.fsync(out.fileno())
            with opened(files[form]) as fd:
                if delta is None:
                    if wrong := wrong_page(fd, names):
                        raise IntegrityError(f"the pack {pack[:12]}… from {source}: {wrong}", pack=pack)
                else:
                    read = read_delta(files[form])
                    if read.pages * NAME != len(names):
                        raise IntegrityError(f"the pack {pack[:12]}… from {source}: names and delta differ", pack=pack)
                    for _ in self._decode(pack, read, names):
                        pass
            return self.publish(files, names, owner)[0]
        except OSError as e:
            raise store_error("cannot take in", self.folder.path(pack, "pages"), e) from e
        finally:
            for path in files.values():
                path.unlink(missing_ok=True)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)
