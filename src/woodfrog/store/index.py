"""The page store's index: where a page is, which packs there are, who leases them, which are being removed.

It can be lost: packs are found again from their files. Rows of `pages` are hints (the first eight bytes of a name as
the key): whoever finds one compares the pack's own names. What must never be wrong is decided from the files.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from woodfrog.errors import StoreError
from woodfrog.store.files import FREE_SOME, store_error

__all__ = ["BrokenIndex", "Identity", "Index", "identity", "is_alive", "page_key"]

T = TypeVar("T")
_FILES = ("index.sqlite-wal", "index.sqlite-shm", "index.sqlite")
"""In the order in which they are removed."""
_SCHEMA = """
CREATE TABLE packs (num INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, delta INTEGER NOT NULL,
    pages INTEGER NOT NULL, stored INTEGER NOT NULL, used REAL NOT NULL, bad INTEGER NOT NULL DEFAULT 0,
    listed INTEGER NOT NULL DEFAULT 0, seal BLOB);
CREATE TABLE pages (key INTEGER PRIMARY KEY, pack INTEGER NOT NULL, slot INTEGER NOT NULL);
CREATE TABLE leases (pack TEXT NOT NULL, owner TEXT NOT NULL, pid INTEGER NOT NULL, born TEXT NOT NULL,
    PRIMARY KEY (pack, owner, pid, born)) WITHOUT ROWID;
CREATE TABLE doomed (id TEXT PRIMARY KEY, num INTEGER NOT NULL) WITHOUT ROWID;
PRAGMA user_version = 1;
"""
_BROKEN = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_READONLY)
"""SQLITE_ERROR: a table or column that is not there. SQLITE_READONLY: its header says a format of later versions."""

Identity = tuple[int, str]
"""A process: its id and when it began (boot and clock ticks), so that a reused id is not taken for it."""


def _born(pid: int) -> str | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            text = f.read()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text[text.rindex(b")") + 2 :].split()
    if fields[0] in b"ZX":
        return None
    return f"{_boot()}.{fields[19].decode()}"


def _boot() -> str:
    with open("/proc/sys/kernel/random/boot_id") as f:
        return f.read(8)


def identity() -> Identity:
    return os.getpid(), _born(os.getpid()) or ""


def page_key(name: bytes) -> int:
    return int.from_bytes(name[:8], "little", signed=True)


def is_alive(who: Identity) -> bool:
    return _born(who[0]) == who[1]


class BrokenIndex(Exception):
    """The index is readable, but cannot be what was written."""


def _is_broken(e: Exception) -> bool:
    if isinstance(e, sqlite3.Error):
        return getattr(e, "sqlite_errorcode", 0) & 0xFF in _BROKEN
    return True


class Index:
    """One connection, used by one thread at a time. Every write holds a shared lock on `<root>/lock`, so that the
    one who replaces a broken index (exclusive) does it under nobody's feet.

    Args:
        me: whose leases these are.
        fill: enters the packs that there are files of and no rows; called in a write transaction when the index is
            opened, or was made anew.
    """

    def __init__(self, root: Path, me: Identity, fill: Callable[[sqlite3.Connection], None]) -> None:
        self.path = root / _FILES[-1]
        self._fill = fill
        self._mutex = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._inode = 0
        self._leases: set[tuple[str, str]] = set()
        self.me = me
        try:
            self._lock = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as e:
            raise store_error("cannot open the page store", root / "lock", e) from e
        try:
            self.write(fill)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        with self._mutex:
            if self._connection is not None:
                self._connection.close()
                self._connection = None
            if self._lock >= 0:
                os.close(self._lock)
                self._lock = -1

    # Transactions

    def write(self, work: Callable[[sqlite3.Connection], T], *, durable: bool = False) -> T:
        """Run `work` in a write transaction: it sees what all others have committed, and nobody else writes.

        It runs a second time, on a new index, when the index turns out to be broken.
        """
        return self._attempt(lambda c: self._transaction(c, work, durable))

    def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        return self._attempt(work)

    def query(self, statement: str, values: Sequence[Any] = ()) -> list[Any]:
        return self.read(lambda c: c.execute(statement, values).fetchall())

    def execute(self, statement: str, rows: Sequence[tuple[Any, ...]]) -> None:
        self.write(lambda c: c.executemany(statement, rows))

    def _transaction(self, connection: sqlite3.Connection, work: Callable[[sqlite3.Connection], T], durable: bool) -> T:
        if durable:
            connection.execute("PRAGMA synchronous=FULL")
        try:
            connection.execute("BEGIN IMMEDIATE")
            try:
                result = work(connection)
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
        finally:
            if durable:
                connection.execute("PRAGMA synchronous=NORMAL")
        return result

    def _attempt(self, work: Callable[[sqlite3.Connection], T]) -> T:
        with self._mutex:
            if self._lock < 0:
                raise StoreError(f"the page store {self.path.parent} is closed", code="store-closed")
            for last in (False, False, True):
                try:
                    fcntl.flock(self._lock, fcntl.LOCK_SH)
                    return work(self._current())
                except (sqlite3.DatabaseError, UnicodeDecodeError, BrokenIndex) as e:
                    if last or not _is_broken(e):
                        raise self._error(e) from e
                    self._replace()
                except OSError as e:
                    raise store_error("the page store cannot be written", self.path, e) from e
                finally:
                    fcntl.flock(self._lock, fcntl.LOCK_UN)
            raise AssertionError

    def _error(self, e: Exception) -> StoreError:
        if getattr(e, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL:
            return StoreError(
                f"cannot write {self.path}: no space left; {FREE_SOME} or set WOODFROG_HOME to a larger disk",
                code="disk-full",
                path=str(self.path),
            )
        return StoreError(f"the page store's index {self.path}: {e}", path=str(self.path))

    def _current(self) -> sqlite3.Connection:
        """The connection to the index that has the name now; another process may have made it anew."""
        inode = self._find()
        if self._connection is not None and inode == self._inode:
            return self._connection
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if inode == 0:
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            if self._find() == 0:
                self._clear()  # a journal without its index would be taken for the new one's
        connection = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
        try:
            os.chmod(self.path, 0o600)
            connection.text_factory = partial(str, encoding="utf-8", errors="replace")
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.execute("PRAGMA cache_size=-4096")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version != 1:
                self._transaction(connection, self._make, False)
            elif self._leases:
                self._transaction(connection, self._renew, False)
            self._inode = self._find()
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        return connection

    def _make(self, connection: sqlite3.Connection) -> None:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version == 1:
            return  # another process was first
        if version:
            raise BrokenIndex(f"version {version}")
        for statement in _SCHEMA.split(";"):
            connection.execute(statement)
        self._fill(connection)
        self._renew(connection)

    def _renew(self, connection: sqlite3.Connection) -> None:
        connection.executemany(
            "INSERT OR IGNORE INTO leases VALUES (?, ?, ?, ?)", [(p, o, *self.me) for p, o in self._leases]
        )

    def _find(self) -> int:
        """The index's inode, 0 when there is none."""
        try:
            return os.stat(self.path).st_ino
        except FileNotFoundError:
            return 0

    def _clear(self) -> None:
        for name in _FILES:
            (self.path.parent / name).unlink(missing_ok=True)

    def _replace(self) -> None:
        """Remove a broken index; `_current` makes a new one."""
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        if self._connection is not None:
            self._connection.close()
            self._connection = None
            if self._find() != self._inode:
                return  # another process was first
        self._clear()

    # Leases

    def lease(self, connection: sqlite3.Connection, packs: list[str], owner: str) -> None:
        """Record leases of this process, in a write transaction."""
        now = time.time()
        self._leases.update((p, owner) for p in packs)
        connection.executemany(
            "INSERT OR IGNORE INTO leases VALUES (?, ?, ?, ?)", [(p, owner, *self.me) for p in packs]
        )
        connection.executemany("UPDATE packs SET used = ? WHERE id = ?", [(now, p) for p in packs])

    def release(self, connection: sqlite3.Connection, owner: str) -> None:
        now = time.time()
        self._leases = {(p, o) for p, o in self._leases if o != owner}
        mine = "owner = ? AND pid = ? AND born = ?", (owner, *self.me)
        connection.execute(
            f"UPDATE packs SET used = ? WHERE id IN (SELECT pack FROM leases WHERE {mine[0]})", (now, *mine[1])
        )
        connection.execute(f"DELETE FROM leases WHERE {mine[0]}", mine[1])

    def leased(self, connection: sqlite3.Connection) -> set[str]:
        """Packs leased by living processes; leases of dead ones are dropped."""
        holders = connection.execute("SELECT DISTINCT pid, born FROM leases").fetchall()
        for who in holders:
            if not is_alive(who):
                connection.execute("DELETE FROM leases WHERE pid = ? AND born = ?", who)
        return {p for (p,) in connection.execute("SELECT DISTINCT pack FROM leases")} | {p for p, _ in self._leases}
