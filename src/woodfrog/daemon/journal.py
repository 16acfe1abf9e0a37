"""The daemon's durable state: deployed apps, calls and their answers, in SQLite (WAL).

A committed row survives `kill -9`. Bodies over `INLINE_BYTES` live in files beside the database; a row is written only
when its file is complete.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sqlite3
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from woodfrog.backends.payload import Payload, discard
from woodfrog.daemon.room import Room
from woodfrog.errors import OutputExpired, StoreError

__all__ = ["INLINE_BYTES", "CallRow", "DeployRow", "Journal", "StartRow"]

INLINE_BYTES = 256 << 10

_SCHEMA = """
CREATE TABLE IF NOT EXISTS deploys (
    app TEXT NOT NULL, version INTEGER NOT NULL, spec TEXT NOT NULL, ephemeral INTEGER NOT NULL,
    client TEXT NOT NULL, deployed REAL NOT NULL, stopped REAL, PRIMARY KEY (app, version)
);
CREATE TABLE IF NOT EXISTS elders (
    app TEXT NOT NULL, tag TEXT NOT NULL, params_digest TEXT NOT NULL, elder INTEGER NOT NULL,
    PRIMARY KEY (app, tag, params_digest)
);
CREATE TABLE IF NOT EXISTS params (digest TEXT PRIMARY KEY, data BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS calls (
    id TEXT PRIMARY KEY, app TEXT NOT NULL, version INTEGER NOT NULL, tag TEXT NOT NULL, method TEXT NOT NULL,
    params_digest TEXT NOT NULL, encoding TEXT NOT NULL, payload BLOB, submitted REAL NOT NULL,
    finished REAL, outcome TEXT, error TEXT, result BLOB, trace TEXT, size INTEGER NOT NULL DEFAULT 0,
    delivered INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS starts (
    at REAL NOT NULL, app TEXT NOT NULL, version INTEGER NOT NULL, function TEXT NOT NULL, instance TEXT NOT NULL,
    kind TEXT NOT NULL, result TEXT NOT NULL, ms REAL NOT NULL, why TEXT NOT NULL, words TEXT NOT NULL,
    snapshot TEXT NOT NULL, code TEXT NOT NULL, error TEXT NOT NULL
);
"""
_INDEXES = """
CREATE INDEX IF NOT EXISTS deploys_live ON deploys (app, version) WHERE stopped IS NULL;
CREATE INDEX IF NOT EXISTS deploys_runs ON deploys (stopped) WHERE ephemeral AND stopped IS NOT NULL;
CREATE INDEX IF NOT EXISTS calls_open ON calls (finished) WHERE finished IS NULL;
CREATE INDEX IF NOT EXISTS calls_kept ON calls (finished, size) WHERE finished IS NOT NULL;
CREATE INDEX IF NOT EXISTS calls_delivered ON calls (finished, size) WHERE delivered;
DROP INDEX IF EXISTS calls_finished;
CREATE INDEX IF NOT EXISTS calls_submitted ON calls (submitted);
CREATE INDEX IF NOT EXISTS starts_at ON starts (at, app, kind, result);
CREATE INDEX IF NOT EXISTS starts_of ON starts (app, at);
CREATE INDEX IF NOT EXISTS calls_params ON calls (params_digest) WHERE params_digest != '';
"""
_FILE = "journal.sqlite"
_ROW_BYTES = 1024
"""What a finished call takes beside its answer, its error and its trace."""
_PRUNED_AT_ONCE = 5000
_LOOKED_THROUGH = 10_000
_LITTLE = 1 << 20
"""With less room than that a disk is full."""
_LIVE = """stopped IS NULL AND (
    version = (SELECT max(version) FROM deploys AS d WHERE d.app = deploys.app AND d.stopped IS NULL)
    OR (app, version) IN (SELECT app, version FROM calls WHERE finished IS NULL)
    OR (app, version) IN (SELECT app, elder FROM elders)
)"""
"""Each running app's newest version, and those before it that have calls to finish, or serve in its place."""
_CHOSEN = "finished IS NOT NULL AND (:app = '' OR app = :app) AND (:before = 0 OR finished < :before)"
_FAILED = "IN ('exception', 'failure')"
VERSIONS_KEPT = 3
"""So many of each deployed app are kept with their code: a rollback needs it."""


@dataclass(frozen=True)
class DeployRow:
    app: str
    version: int
    spec: dict[str, Any]
    ephemeral: bool
    client: dict[str, Any]
    deployed: float
    stopped: float | None


@dataclass(frozen=True)
class CallRow:
    id: str
    app: str
    version: int
    tag: str
    method: str
    params_digest: str
    encoding: str
    submitted: float
    finished: float | None
    outcome: str | None
    error: dict[str, Any] | None
    trace: list[dict[str, Any]]


@dataclass(frozen=True)
class StartRow:
    """One start of a container that is over, as the API tells of it."""

    at: float
    """Unix time of its begin."""
    app: str
    version: int
    function: str
    instance: str
    kind: str
    result: str
    ms: float
    why: str
    words: str
    """`why` for people."""
    snapshot: str
    code: str
    error: str


def _is_full(home: Path, error: sqlite3.Error) -> bool:
    """Whether that is for want of room: SQLite calls it an I/O error where its index of the WAL has none."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    room = os.statvfs(home)
    no_room = room.f_bavail * room.f_frsize < _LITTLE
    return code == sqlite3.SQLITE_FULL or (code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN) and no_room)


class Journal:
    """SQLite behind a few named operations. Used from the event loop's thread alone.

    Raises (every method):
        StoreError: the database cannot be read or written (disk full).
    """

    @staticmethod
    def exists(home: Path) -> bool:
        """Whether a daemon ran there before."""
        return (home / _FILE).exists()

    def __init__(self, home: Path, room: Room | None = None) -> None:
        self._home = home
        self.room = room or Room(home)
        self.bodies = home / "calls"
        self.bodies.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = home / _FILE
        old_mask = os.umask(0o077)
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            try:
                self._prepare()
            except sqlite3.Error:
                self._db.close()
                raise
        except sqlite3.Error as e:
            if _is_full(home, e):
                raise StoreError(
                    f"{path}: no space left to open it, or to bring it to this version's form: free some; nothing in "
                    "it is lost",
                    code="disk-full",
                    path=str(path),
                ) from e
            raise StoreError(f"{path}: {e}; move it away to begin with an empty state", path=str(path)) from e
        finally:
            os.umask(old_mask)
        self._sweep()

    def _prepare(self) -> None:
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.executescript(_SCHEMA)
        there = {row[1] for row in self._db.execute("PRAGMA table_info(calls)")}
        for column in ("size", "delivered"):
            if column not in there:
                self._db.execute(f"ALTER TABLE calls ADD COLUMN {column} INTEGER NOT NULL DEFAULT 0")
        self._db.executescript(_INDEXES)
        self.kept = int(self._db.execute("SELECT total(size) FROM calls WHERE finished IS NOT NULL").fetchone()[0])
        """Bytes that finished calls take."""

    def _execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        while True:
            alone = False
            try:
                alone = not self._db.in_transaction  # else all of it is to be done again
                return self._db.execute(sql, values)
            except sqlite3.Error as e:
                path = self._home / _FILE
                if not _is_full(self._home, e):
                    raise StoreError(f"the daemon's journal {path} cannot be used: {e}", code="journal") from e
                if not (alone and self.room.give()):
                    text = f"no space left for the daemon's journal {path}: {self.room.remedy}"
                    raise StoreError(text, code="disk-full") from e

    def _sweep(self) -> None:
        """Remove body files that no row owns (half-written when the daemon was killed), and arguments of finished
        calls."""
        for path in self.bodies.iterdir():
            row = self._execute("SELECT finished IS NOT NULL FROM calls WHERE id = ?", path.stem).fetchone()
            if row is None or (row[0] and path.suffix == ".in"):
                path.unlink(missing_ok=True)

    def close(self) -> None:
        self._db.close()

    # Apps

    def add_deploy(self, app: str, spec: dict[str, Any], *, ephemeral: bool, client: dict[str, Any]) -> DeployRow:
        """Record a deploy as the app's next version."""
        last = self._execute("SELECT coalesce(max(version), 0) FROM deploys WHERE app = ?", app).fetchone()[0]
        now = time.time()
        self._execute(
            "INSERT INTO deploys VALUES (?, ?, ?, ?, ?, ?, NULL)",
            *(app, last + 1, json.dumps(spec), int(ephemeral), json.dumps(client), now),
        )
        return DeployRow(app, last + 1, spec, ephemeral, client, now, None)

    def stop_app(self, app: str) -> None:
        self._execute("UPDATE deploys SET stopped = ? WHERE app = ? AND stopped IS NULL", time.time(), app)
        self._execute("DELETE FROM elders WHERE app = ?", app)

    def set_elder(self, app: str, tag: str, params_digest: str, version: int | None) -> None:
        """Which version serves while the newest cannot start; None = none."""
        if version is None:
            which = "app = ? AND tag = ? AND params_digest = ?"
            self._execute(f"DELETE FROM elders WHERE {which}", app, tag, params_digest)
        else:
            self._execute("INSERT OR REPLACE INTO elders VALUES (?, ?, ?, ?)", app, tag, params_digest, version)

    def elders(self) -> dict[tuple[str, str, str], int]:
        """By app, tag and digest of the parameters."""
        return {(a, t, d): v for a, t, d, v in self._execute("SELECT * FROM elders")}

    def deploys(self, app: str | None = None) -> list[DeployRow]:
        """All deploys, or those of one app, oldest first."""
        return self._deploys("WHERE app = ?", app) if app is not None else self._deploys("")

    def live(self) -> list[DeployRow]:
        """What a daemon has to take up."""
        return self._deploys(f"WHERE {_LIVE}")

    def kept_specs(self) -> list[str]:
        """The specs of these, and of the versions that one may go back to, as JSON."""
        newest = "SELECT max(version) FROM deploys AS d WHERE d.app = deploys.app AND d.stopped IS NULL"
        kept = f"stopped IS NULL AND NOT ephemeral AND version > ({newest}) - {VERSIONS_KEPT}"
        return [row[0] for row in self._execute(f"SELECT spec FROM deploys WHERE ({_LIVE}) OR ({kept})")]

    def _deploys(self, where: str, *values: Any) -> list[DeployRow]:
        rows = self._execute(f"SELECT * FROM deploys {where} ORDER BY deployed, version", *values)
        return [DeployRow(a, v, json.loads(s), bool(e), json.loads(c), d, x) for a, v, s, e, c, d, x in rows]

    def ended_runs(self, before: float, limit: int) -> list[str]:
        """Ephemeral apps that were stopped before `before` (Unix time)."""
        sql = "SELECT DISTINCT app FROM deploys WHERE ephemeral AND stopped < ? LIMIT ?"
        return [row[0] for row in self._execute(sql, before, limit)]

    def forget_run(self, app: str) -> bool:
        """Forget an ephemeral app that was stopped; whether nothing is known of its name any more."""
        self._execute("DELETE FROM deploys WHERE app = ? AND ephemeral AND stopped IS NOT NULL", app)
        return self._execute("SELECT 1 FROM deploys WHERE app = ?", app).fetchone() is None

    # Starts

    def add_starts(self, rows: Sequence[StartRow], before: float, most: int) -> None:
        """Record starts that are over, and forget those from before `before` (Unix time) and beyond the newest `most`.

        Not at the price of the disk's last room: the reserve is for calls.
        """
        marks = ", ".join("?" * len(fields(StartRow)))
        with self._at_once():
            for row in rows:
                self._execute(f"INSERT INTO starts VALUES ({marks})", *astuple(row))
            self._execute("DELETE FROM starts WHERE at < ?", before)
            self._execute("DELETE FROM starts WHERE rowid <= (SELECT max(rowid) FROM starts) - ?", most)

    def starts(self, app: str, limit: int) -> list[StartRow]:
        """The latest of an app, the newest first."""
        sql = "SELECT * FROM starts WHERE app = ? ORDER BY at DESC, rowid DESC LIMIT ?"
        return [StartRow(*row) for row in self._execute(sql, app, limit)]

    def count_starts(self, since: float) -> list[tuple[str, str, str, int]]:
        """App, kind, result, and how many since then (Unix time). For a thread."""
        sql = "SELECT app, kind, result, count(*) FROM starts WHERE at >= :since GROUP BY app, kind, result"
        return self._apart(sql, since=since)

    # Calls

    def add_params(self, digest: str, data: bytes) -> None:
        self._execute("INSERT OR IGNORE INTO params VALUES (?, ?)", digest, data)

    def params(self, digest: str) -> bytes:
        row = self._execute("SELECT data FROM params WHERE digest = ?", digest).fetchone()
        return bytes(row[0]) if row else b""

    def _keep(self, call_id: str, kind: str, payload: Payload) -> bytes | None:
        """The inline form of a body, or None after moving it into its file. A large one is best in a file already: what
        is in memory alone is written here and now."""
        if payload.size <= INLINE_BYTES:
            return payload.read()
        path = self.bodies / f"{call_id}.{kind}"
        try:
            if payload.path is not None:
                os.rename(payload.path, path)
            else:
                path.write_bytes(payload.read())
        except OSError as e:
            self._drop(path)
            what = f"cannot keep a call's {'arguments' if kind == 'in' else 'result'}"
            if e.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StoreError(f"{what}: {e.strerror}: {path}; {self.room.remedy}", code="disk-full") from e
            raise StoreError(f"{what}: {e.strerror}: {path}") from e
        return None

    @staticmethod
    def _drop(path: Path) -> None:
        """Remove a body; what cannot be removed now is swept at the next start."""
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)

    def add_call(
        self,
        call_id: str,
        *,
        app: str,
        version: int,
        tag: str,
        method: str,
        params_digest: str,
        encoding: str,
        payload: Payload,
    ) -> CallRow:
        now = time.time()
        data = self._keep(call_id, "in", payload)
        try:
            self._execute(
                "INSERT INTO calls (id, app, version, tag, method, params_digest, encoding, payload, submitted)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                *(call_id, app, version, tag, method, params_digest, encoding, data, now),
            )
        except StoreError:
            if data is None and self.call(call_id) is None:
                self._drop(self.bodies / f"{call_id}.in")
            raise
        return CallRow(call_id, app, version, tag, method, params_digest, encoding, now, None, None, None, [])

    def _body(self, call_id: str, column: str, kind: str) -> Payload:
        row = self._execute(f"SELECT {column} FROM calls WHERE id = ?", call_id).fetchone()
        if row is not None and row[0] is not None:
            return Payload(data=bytes(row[0]))
        path = self.bodies / f"{call_id}.{kind}"
        with contextlib.suppress(OSError):
            # Files are not synced: a power loss may leave less of one than any has.
            if path.stat().st_size > INLINE_BYTES:
                return Payload(path=path)
        return Payload(data=b"")

    def payload(self, call_id: str) -> Payload:
        """The arguments of a call that is not over.

        Raises:
            StoreError: they were kept in a file, and that is gone.
        """
        payload = self._body(call_id, "payload", "in")
        lost = "SELECT 1 FROM calls WHERE id = ? AND finished IS NULL AND payload IS NULL"
        if payload.path is None and self._execute(lost, call_id).fetchone():
            raise StoreError(
                f"the arguments of call {call_id} are gone from {self.bodies} (a power loss?): call it again",
                code="payload-gone",
            )
        return payload

    def result(self, call_id: str) -> Payload:
        """The answer's body.

        Raises:
            OutputExpired: it was kept in a file, and that is gone.
        """
        payload = self._body(call_id, "result", "out")
        lost = "SELECT 1 FROM calls WHERE id = ? AND finished IS NOT NULL AND result IS NULL"
        if payload.path is None and self._execute(lost, call_id).fetchone():
            raise OutputExpired(
                f"the result of call {call_id} is gone from {self.bodies}; how long results are kept is said by "
                "WOODFROG_KEEP_RESULTS_S and WOODFROG_KEEP_RESULTS_MIB",
                call=call_id,
            )
        return payload

    def finish_call(
        self,
        call_id: str,
        *,
        outcome: str,
        error: dict[str, Any] | None,
        result: Payload,
        trace: list[dict[str, Any]],
        version: int | None = None,
    ) -> None:
        """Record the answer; the arguments are dropped, since nothing can ask for them any more.

        Args:
            version: the app's that answered, where it is known.
        """
        size = result.size
        data = self._keep(call_id, "out", result)
        why, phases = json.dumps(error) if error else None, json.dumps(trace)
        size += _ROW_BYTES + len(why or "") + len(phases)
        try:
            self._execute(
                "UPDATE calls SET finished = ?, outcome = ?, error = ?, result = ?, trace = ?, size = ?,"
                " payload = NULL, version = coalesce(?, version) WHERE id = ?",
                *(time.time(), outcome, why, data, phases, size, version, call_id),
            )
        except StoreError:
            if data is None:
                self._drop(self.bodies / f"{call_id}.out")
            raise
        self.kept += size
        arguments = self.bodies / f"{call_id}.in"
        if arguments.exists():
            discard(arguments)

    def call(self, call_id: str) -> CallRow | None:
        return next(iter(self._calls("WHERE id = ?", call_id)), None)

    def unfinished(self) -> list[CallRow]:
        return self._calls("WHERE finished IS NULL ORDER BY submitted")

    def recent(self, limit: int) -> list[CallRow]:
        return self._calls("ORDER BY submitted DESC LIMIT ?", limit)

    def recent_of(self, app: str, limit: int, *, failed: bool = False) -> list[CallRow]:
        """The latest of one app: all that are unfinished, and those among the newest of all apps.

        Args:
            failed: only those that came to nothing.
        """
        # Without an index by app, which every call would pay for.
        newest = f"SELECT rowid FROM calls ORDER BY submitted DESC LIMIT {_LOOKED_THROUGH}"
        among = f"SELECT rowid FROM calls WHERE finished IS NULL UNION SELECT * FROM ({newest})"
        chosen = f"rowid IN ({among}) AND app = ?{' AND outcome ' + _FAILED if failed else ''}"
        return self._calls(f"WHERE {chosen} ORDER BY submitted DESC LIMIT ?", app, limit)

    def _calls(self, where: str, *values: Any) -> list[CallRow]:
        rows = self._execute(
            "SELECT id, app, version, tag, method, params_digest, encoding, submitted, finished, outcome, error, trace"
            f" FROM calls {where}",
            *values,
        )
        return [
            CallRow(*(*r[:10], json.loads(r[10]) if r[10] else None, json.loads(r[11]) if r[11] else [])) for r in rows
        ]

    def last_failures(self) -> list[CallRow]:
        """Each app's latest call that came to nothing, of those among the newest of all apps."""
        newest = f"SELECT rowid FROM calls ORDER BY submitted DESC LIMIT {_LOOKED_THROUGH}"
        return self._calls(f"WHERE rowid IN ({newest}) AND outcome {_FAILED} GROUP BY app HAVING max(finished)")

    def usage(self, app: str = "", before: float = 0.0) -> list[dict[str, Any]]:
        """What the results of finished calls take, by app. For a thread: it looks at every row.

        Args:
            app: only this one's; "" = all.
            before: only those that finished before it (Unix time); 0 = all.
        """
        sql = "SELECT app, count(*), total(size), min(finished), total(delivered) FROM calls"
        rows = self._apart(f"{sql} WHERE {_CHOSEN} GROUP BY app ORDER BY total(size) DESC", app=app, before=before)
        names = ("app", "results", "bytes", "oldest", "fetched")
        return [dict(zip(names, (a, n, int(s), t, int(d)), strict=True)) for a, n, s, t, d in rows]

    def finished(self, app: str = "", before: float = 0.0) -> list[tuple[str, int, bool]]:
        """Id, size, and whether its result is in a file, of each such call. For a thread, as `usage`."""
        rows = self._apart(f"SELECT id, size, result IS NULL FROM calls WHERE {_CHOSEN}", app=app, before=before)
        return [(i, s, bool(f)) for i, s, f in rows]

    def _apart(self, sql: str, **values: Any) -> list[Any]:
        """Through a connection of its own, beside which the loop goes on writing."""
        try:
            with contextlib.closing(sqlite3.connect(f"file:{self._home / _FILE}?mode=ro", uri=True)) as db:
                return db.execute(sql, values).fetchall()
        except sqlite3.Error as e:
            path = self._home / _FILE
            raise StoreError(f"the daemon's journal {path} cannot be used: {e}", code="journal") from e

    def forget(self, calls: Sequence[tuple[str, int, bool]]) -> int:
        """Forget finished calls, as `finished` tells of them; the bytes that went."""
        files = [discard(self.bodies / f"{call_id}.out") for call_id, _, in_file in calls if in_file]
        size = sum(size for _, size, _ in calls)
        self._remove([call_id for call_id, _, _ in calls], files)
        self.kept -= size
        return size

    def mark_delivered(self, calls: Sequence[str]) -> None:
        """Their clients have got the answers."""
        with self._at_once():
            for call_id in calls:
                self._execute("UPDATE calls SET delivered = 1 WHERE id = ? AND NOT delivered", call_id)

    def prune(self, before: float, most: int = 0, spared: float = 0.0, delivered: float = 0.0) -> list[str]:
        """Forget finished calls, the oldest first; returns the ids of those that went. What is left for want of time
        goes the next time.

        Args:
            before: those finished before it go (Unix time).
            most: beyond so many bytes of them others go as well; 0 = no limit.
            delivered: first those with delivered answers that finished before it (Unix time).
            spared: then the rest, but not those that finished after it (Unix time).
        """
        gone: dict[str, None] = {}
        files: list[Future[None]] = []
        left = self.kept
        for kind, limit, over in (("", before, False), ("delivered AND", delivered, True), ("", spared, True)):
            if over and (not most or left <= most):
                break
            rows = self._execute(
                "SELECT id, size, result IS NULL FROM calls"
                f" WHERE {kind} finished IS NOT NULL AND finished < ? ORDER BY finished LIMIT ?",
                *(limit, _PRUNED_AT_ONCE),
            )
            for call_id, size, in_file in rows.fetchall():
                if over and left <= most:
                    break
                if call_id in gone:
                    continue
                gone[call_id] = None
                left -= size
                if in_file:
                    files.append(discard(self.bodies / f"{call_id}.out"))
        if gone:
            self._remove(gone, files)
            self.kept = left
        return list(gone)

    def _remove(self, calls: Collection[str], files: list[Future[None]]) -> None:
        """Forget calls whose results' files are being removed."""
        while True:
            try:
                self._remove_rows(calls)
                return
            except StoreError as e:
                if files:  # on a full disk there is no room to delete rows in until something has gone
                    wait(files)
                    files.clear()
                elif e.code != "disk-full" or not self.room.give():
                    raise

    def _remove_rows(self, calls: Collection[str]) -> None:
        with self._at_once():
            for call_id in calls:
                self._execute("DELETE FROM calls WHERE id = ?", call_id)
            self._execute(
                "DELETE FROM params WHERE NOT EXISTS"
                " (SELECT 1 FROM calls WHERE params_digest = params.digest AND params_digest != '')"
            )

    @contextlib.contextmanager
    def _at_once(self) -> Iterator[None]:
        self._execute("BEGIN")
        try:
            yield
            self._execute("COMMIT")
        except StoreError:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")  # it may have been rolled back by itself
            raise
