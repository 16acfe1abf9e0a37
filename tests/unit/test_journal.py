"""The journal: what was acknowledged is there after any death of the daemon."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from woodfrog.backends import payload as payload_module
from woodfrog.backends.payload import Payload
from woodfrog.daemon import journal as module
from woodfrog.daemon.journal import INLINE_BYTES, CallRow, Journal
from woodfrog.daemon.room import Room
from woodfrog.errors import OutputExpired, StoreError

BIG = bytes(range(256)) * ((INLINE_BYTES // 256) + 1)


CALL: Any = {
    **{"tag": "f", "method": "f", "params_digest": "", "encoding": "pickle"},
    "payload": Payload(data=b""),
}


def add(journal: Journal, call_id: str, payload: Payload | None = None, **more: str) -> CallRow:
    values = {"app": "demo", "tag": "f", "method": "f", "params_digest": "", "encoding": "pickle", **more}
    return journal.add_call(call_id, version=1, payload=payload or Payload(data=b"args"), **values)  # type: ignore[arg-type]


def finish(journal: Journal, call_id: str, result: Payload | None = None, outcome: str = "success") -> None:
    journal.finish_call(call_id, outcome=outcome, error=None, result=result or Payload(data=b"out"), trace=[])


def spooled(home: Path, data: bytes) -> Payload:
    path = home / "calls" / f".body-{os.urandom(4).hex()}"
    path.write_bytes(data)
    return Payload(path=path)


@pytest.fixture(autouse=True)
def removed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what is there can be looked at."""

    def discard(path: Path) -> Future[None]:
        wait([removing := payload_module.discard(path)])
        return removing

    monkeypatch.setattr(module, "discard", discard)


def bodies(home: Path) -> set[str]:
    return {p.name for p in (home / "calls").iterdir()}


def test_a_call_s_life(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    row = add(journal, "c1", Payload(data=b"args"), params_digest="p")
    assert journal.call("c1") == row and journal.payload("c1").read() == b"args"
    assert [r.id for r in journal.unfinished()] == ["c1"]
    trace = [{"name": "run", "start_ms": 0.0, "ms": 1.0, "parent": None}]
    error = {"type": "x.E", "message": "bad \ud800 é", "traceback": ""}
    journal.finish_call("c1", outcome="exception", error=error, result=Payload(data=b""), trace=trace)
    journal.close()
    journal = Journal(tmp_path)
    done = journal.call("c1")
    assert done is not None and (done.outcome, done.error, done.trace) == ("exception", error, trace)
    assert done.finished is not None and done.finished >= done.submitted
    assert journal.result("c1").read() == b"" and journal.payload("c1").read() == b""
    assert journal.unfinished() == [] and journal.call("never") is None
    assert stat.S_IMODE((tmp_path / "journal.sqlite").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "calls").stat().st_mode) == 0o700


@pytest.mark.parametrize("size", [0, INLINE_BYTES, INLINE_BYTES + 1, 5 << 20])
@pytest.mark.parametrize("on_disk", [False, True])
def test_bodies_of_every_size(tmp_path: Path, size: int, on_disk: bool) -> None:
    data = os.urandom(size)
    journal = Journal(tmp_path)

    def payload() -> Payload:
        return spooled(tmp_path, data) if on_disk else Payload(data=data)

    add(journal, "c1", payload())
    assert Journal(tmp_path).payload("c1").read() == data
    finish(journal, "c1", payload())
    assert Journal(tmp_path).result("c1").read() == data
    assert bodies(tmp_path) == ({"c1.out"} if size > INLINE_BYTES else set())


def test_a_lost_result_is_said_and_not_empty(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    add(journal, "c1")
    finish(journal, "c1", Payload(data=BIG))
    (tmp_path / "calls" / "c1.out").unlink()
    with pytest.raises(OutputExpired, match="c1"):
        journal.result("c1")


def test_unfinished_in_the_order_of_their_coming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(module.time, "time", lambda: clock[0])
    journal = Journal(tmp_path)
    for number in (5, 3, 9, 1, 7):
        clock[0] += 1
        add(journal, f"c{number}")
    finish(journal, "c9")
    assert [r.id for r in Journal(tmp_path).unfinished()] == ["c5", "c3", "c1", "c7"]
    assert [r.id for r in journal.recent(2)] == ["c7", "c1"]


def test_sweep_and_prune(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.add_params("used", b"used")
    journal.add_params("unused", b"unused")
    add(journal, "c1", Payload(data=BIG), params_digest="used")
    add(journal, "c2", Payload(data=BIG))
    finish(journal, "c2", Payload(data=BIG))
    (tmp_path / "calls" / "c2.in").write_bytes(b"killed between row and unlink")
    (tmp_path / "calls" / "gone.out").write_bytes(b"x")
    (tmp_path / "calls" / ".body-1").write_bytes(b"x")
    journal.close()
    journal = Journal(tmp_path)
    assert bodies(tmp_path) == {"c1.in", "c2.out"}
    assert journal.prune(0.0) == []
    assert journal.prune(time.time() + 1) == ["c2"]
    assert bodies(tmp_path) == {"c1.in"}  # an unfinished one is never pruned
    assert journal.call("c2") is None and journal.call("c1") is not None
    assert journal.params("used") == b"used" and journal.params("unused") == b""


def test_what_was_delivered_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(module.time, "time", lambda: clock[0])
    journal = Journal(tmp_path)
    for number in range(8):
        clock[0] += 1
        add(journal, f"c{number}")
        finish(journal, f"c{number}", Payload(data=BIG))
    one = journal.kept // 8
    journal.mark_delivered(["c3", "c5", "c7", "nobody's"])
    assert journal.prune(0.0, most=10 * one, spared=1005.0, delivered=1007.5) == []
    # c7 is too new to go.
    assert journal.prune(0.0, most=7 * one, spared=1005.0, delivered=1007.5) == ["c3"]
    assert journal.prune(0.0, most=one, spared=1002.5, delivered=1007.5) == ["c5", "c0", "c1"]
    assert journal.prune(1004.0, most=3 * one, spared=1007.0, delivered=1007.5) == ["c2"]
    assert bodies(tmp_path) == {"c4.out", "c6.out", "c7.out"} and journal.kept == 3 * one
    journal.close()


def test_same_id_twice_harms_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    add(journal, "c1", Payload(data=b"first"))
    with pytest.raises(StoreError):
        add(journal, "c1", Payload(data=b"second"))
    assert journal.payload("c1").read() == b"first"


def test_deploys(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for app in ("a", "b", "a"):
        journal.add_deploy(app, {"name": app}, ephemeral=app == "b", client={"user": "é"})
    journal.stop_app("a")
    assert journal.add_deploy("a", {"name": "a"}, ephemeral=False, client={}).version == 3
    rows = Journal(tmp_path).deploys()
    assert [(r.app, r.version, r.stopped is None) for r in rows] == [
        ("a", 1, False),
        ("b", 1, True),
        ("a", 2, False),
        ("a", 3, True),
    ]
    assert rows[1].ephemeral and rows[1].client == {"user": "é"} and rows[0].spec == {"name": "a"}


def test_what_a_daemon_takes_up(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for app in ("a", "a", "a", "b", "b", "c"):
        journal.add_deploy(app, {"name": app}, ephemeral=app == "c", client={})
    journal.stop_app("b")
    journal.add_call("c1", app="a", version=1, **CALL)
    journal.add_call("c2", app="a", version=2, **CALL)
    finish(journal, "c2")
    assert [(r.app, r.version) for r in journal.live()] == [("a", 1), ("a", 3), ("c", 1)]


def test_the_newest_versions_of_deployed_apps_are_kept(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for number, app in enumerate(("a", "a", "a", "a", "a", "b", "b", "c", "c")):
        journal.add_deploy(app, {"name": number}, ephemeral=app == "c", client={})
    journal.stop_app("b")
    journal.add_call("c1", app="a", version=1, **CALL)
    assert [json.loads(spec)["name"] for spec in journal.kept_specs()] == [0, 2, 3, 4, 8]


CHILD = """
import sys
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from pathlib import Path
from woodfrog.backends import payload as payload_module
from woodfrog.backends.payload import Payload
from woodfrog.daemon.journal import Journal
journal = Journal(Path(sys.argv[1]))
number = 0
while True:
    size = 300_000 if number % 5 == 0 else 100
    journal.add_call(f"c{number}", app="demo", version=1, tag="f", method="f", params_digest="", encoding="pickle",
                     payload=Payload(data=bytes([number % 256]) * size))
    print("in", number, flush=True)
    if number >= 3:
        journal.finish_call(f"c{number - 3}", outcome="success", error=None, trace=[],
                            result=Payload(data=bytes([number % 256]) * size))
        print("out", number - 3, flush=True)
    number += 1
"""


@pytest.mark.parametrize("lines", [1, 40, 301])
def test_killed_in_the_middle_of_writing(tmp_path: Path, lines: int) -> None:
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    said = [child.stdout.readline() for _ in range(lines)]
    child.kill()
    said += child.stdout.readlines()
    said = [line for line in said if line.endswith("\n")]  # the last may be half said
    child.wait()
    journal = Journal(tmp_path)
    taken = {int(line.split()[1]) for line in said if line.startswith("in ")}
    answered = {int(line.split()[1]) for line in said if line.startswith("out ")}
    assert taken
    unfinished = {r.id for r in journal.unfinished()}
    for number in taken - answered:
        row = journal.call(f"c{number}")
        assert row is not None
        if row.outcome is None:
            assert row.id in unfinished
            assert journal.payload(row.id).read() == bytes([number % 256]) * (300_000 if number % 5 == 0 else 100)
    for number in answered:
        row = journal.call(f"c{number}")
        assert row is not None and row.outcome == "success"
        size = 300_000 if (number + 3) % 5 == 0 else 100
        assert journal.result(row.id).read() == bytes([(number + 3) % 256]) * size
    rows = {r.id for r in journal.recent(100_000)}
    assert {name.split(".")[0] for name in bodies(tmp_path)} <= rows
    add(journal, "next")


def test_readers_beside_the_writer(tmp_path: Path) -> None:
    """Somebody looks into the database with sqlite3 while the daemon writes."""
    journal = Journal(tmp_path)
    add(journal, "c0")
    reader = sqlite3.connect(f"file:{tmp_path / 'journal.sqlite'}?mode=ro", uri=True)
    reader.execute("BEGIN")
    assert reader.execute("SELECT count(*) FROM calls").fetchone() == (1,)
    for number in range(1, 50):
        add(journal, f"c{number}")
        finish(journal, f"c{number}")
    assert reader.execute("SELECT count(*) FROM calls").fetchone() == (1,)
    reader.rollback()
    assert reader.execute("SELECT count(*) FROM calls").fetchone() == (50,)
    reader.close()


def test_failures_are_store_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path)
    add(journal, "c1")
    os.rename(tmp_path / "calls", tmp_path / "away")
    with pytest.raises(StoreError, match="cannot keep a call's result"):
        finish(journal, "c1", Payload(data=BIG))
    row = journal.call("c1")
    assert row is not None and row.outcome is None
    with pytest.raises(StoreError, match="cannot keep a call's arguments"):
        add(journal, "c2", Payload(data=BIG))
    assert journal.call("c2") is None
    os.rename(tmp_path / "away", tmp_path / "calls")
    journal._db.execute("PRAGMA query_only=1")
    with pytest.raises(StoreError, match=r"journal\.sqlite cannot be used"):
        add(journal, "c3", Payload(data=BIG))
    assert bodies(tmp_path) == set()
    journal.close()
    with pytest.raises(StoreError):
        journal.call("c1")


def test_a_damaged_database_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "journal.sqlite").write_bytes(b"not a database" * 500)
    with pytest.raises(StoreError, match=r"journal\.sqlite.*move it away") as caught:
        Journal(tmp_path)
    assert "\n" not in caught.value.message


@contextmanager
def disk(tmp_path: Path, size: str) -> Iterator[Path]:
    """One of its own, that can be filled."""
    home = tmp_path / "disk"
    home.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "woodfrog-test", str(home)], check=True)
    try:
        yield home
    finally:
        subprocess.run(["umount", str(home)], check=True)


@pytest.mark.root
def test_a_full_disk(tmp_path: Path) -> None:
    with disk(tmp_path, "2m") as home:
        journal = Journal(home)
        add(journal, "c0", Payload(data=b"first"))
        with pytest.raises(StoreError):
            for number in range(1, 100):
                add(journal, f"c{number}", Payload(data=os.urandom(100_000)))
        with pytest.raises(StoreError) as caught:
            add(journal, "big", Payload(data=os.urandom(4 << 20)))
        assert caught.value.code == "disk-full" and "big.in" not in bodies(home)
        taken = [r.id for r in journal.unfinished()]
        journal.close()
        again = Journal(home)
        assert [r.id for r in again.unfinished()] == taken and again.payload("c0").read() == b"first"
        again.close()


@pytest.mark.root
def test_a_full_disk_is_no_end_while_there_is_a_reserve(tmp_path: Path) -> None:
    with disk(tmp_path, "24m") as home:
        room = Room(home)
        room.take(0)
        reserve = (home / "reserve").stat()
        assert reserve.st_size == reserve.st_blocks * 512 == 16 << 20
        journal = Journal(home, room)
        add(journal, "c0")
        finish(journal, "c0", Payload(data=os.urandom(100_000)))
        (home / "volumes" / "data").mkdir(parents=True)
        with open(home / "volumes" / "data" / "x", "wb", buffering=0) as f, pytest.raises(OSError, match="No space"):
            while f.write(bytes(4096)):
                pass
        for number in range(1, 20):
            add(journal, f"c{number}", Payload(data=os.urandom(100_000)))
            finish(journal, f"c{number}")
        assert journal.prune(time.time() + 1, most=0)[0] == "c0"
        with pytest.raises(StoreError) as caught:
            for number in range(100, 1000):
                add(journal, f"c{number}", Payload(data=os.urandom(100_000)))
        said = caught.value.message
        assert caught.value.code == "disk-full" and str(home / "journal.sqlite") in said and "volume delete" in said
        # The rest is for a start, when nothing runs that would take it.
        assert (home / "reserve").stat().st_size == 4 << 20
        asyncio.run(room.look())
        with pytest.raises(StoreError, match=r"; it holds volumes \d MiB \(data \d MiB\), snapshots 0 MiB, results"):
            add(journal, "again", Payload(data=os.urandom(100_000)))
        journal.close()
        room.give_all()
        again = Journal(home, room)
        add(again, "again")
        again.close()
        (home / "volumes" / "data" / "x").unlink()
        room.take(1 << 20)
        assert 0 < (home / "reserve").stat().st_size < 16 << 20 and 1 << 19 < room.free() < 2 << 20
        room.take()
        assert room.free() > 1 << 19  # not in the face of who needs it


@pytest.mark.root
def test_no_room_to_bring_an_old_database_to_this_version_s_form(tmp_path: Path) -> None:
    with disk(tmp_path, "4m") as home:
        old = Journal(home)
        for index in ("calls_submitted", "calls_params", "calls_kept", "calls_delivered"):
            old._db.execute(f"DROP INDEX {index}")
        old._db.execute("ALTER TABLE calls DROP COLUMN size")
        old._db.execute("ALTER TABLE calls DROP COLUMN delivered")
        old._db.execute("BEGIN")
        old._db.executemany(
            "INSERT INTO calls (id, app, version, tag, method, params_digest, encoding, submitted, finished)"
            " VALUES (?, 'a', 1, 't', 'm', ?, 'json', 1, 1)",
            [(f"c{number}", f"{number}" * 8) for number in range(3000)],
        )
        old._db.execute("COMMIT")
        old.close()
        for left in (100_000, 0):  # too little for the indexes; none at all
            room = os.statvfs(home)
            (home / f"filler-{left}").write_bytes(bytes(room.f_bavail * room.f_frsize - left))
            with pytest.raises(StoreError, match=r"no space left .*free some; nothing in it is lost$") as caught:
                Journal(home)
            assert caught.value.code == "disk-full"
        for filler in home.glob("filler-*"):
            filler.unlink()
        journal = Journal(home)
        assert len(journal.recent(4000)) == 3000
        journal.close()


def test_nothing_goes_through_all_calls(tmp_path: Path) -> None:
    """The event loop waits for each of these; also in a database that an earlier version made."""
    journal = Journal(tmp_path)
    for index in ("calls_submitted", "calls_params", "calls_kept", "calls_delivered"):
        journal._db.execute(f"DROP INDEX {index}")
    journal._db.execute("ALTER TABLE calls DROP COLUMN size")
    journal._db.execute("ALTER TABLE calls DROP COLUMN delivered")
    journal._db.execute("CREATE INDEX calls_finished ON calls (finished) WHERE finished IS NOT NULL")
    journal.close()
    journal = Journal(tmp_path)
    said: list[str] = []
    journal._db.set_trace_callback(said.append)
    journal.add_params("p", b"params")
    add(journal, "c1", params_digest="p")
    finish(journal, "c1")
    journal.recent(50)
    journal.unfinished()
    journal.result("c1")
    journal.live()
    journal.mark_delivered(["c1"])
    journal.prune(time.time() + 1, most=1, spared=1.0, delivered=1.0)
    journal._db.set_trace_callback(None)
    plans = [(sql, row[3]) for sql in set(said) for row in journal._db.execute(f"EXPLAIN QUERY PLAN {sql}")]
    assert any("calls_params" in step for _, step in plans) and any("calls_submitted" in step for _, step in plans)
    assert [(sql, step) for sql, step in plans if step.startswith("SCAN calls") and "USING" not in step] == []


def test_bodies_go_where_the_disk_has_no_room_to_delete_a_row(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for call in ("c1", "c2"):
        add(journal, call)
        finish(journal, call, Payload(data=BIG))
    journal._db.execute("PRAGMA query_only=1")
    with pytest.raises(StoreError):
        journal.prune(time.time() + 1)
    assert bodies(tmp_path) == set()
    with pytest.raises(OutputExpired):
        journal.result("c1")
    journal._db.execute("PRAGMA query_only=0")
    assert set(journal.prune(time.time() + 1)) == {"c1", "c2"}


def test_an_answer_that_was_not_recorded_leaves_no_body(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    add(journal, "c1")
    journal._db.execute("PRAGMA query_only=1")
    with pytest.raises(StoreError):
        finish(journal, "c1", spooled(tmp_path, BIG))
    assert bodies(tmp_path) == set()


def test_the_oldest_results_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(module.time, "time", lambda: clock[0])
    journal = Journal(tmp_path)
    for number in range(10):
        clock[0] = 1000.0 + number
        add(journal, f"c{number}")
        finish(journal, f"c{number}", Payload(data=BIG if number % 2 else b"x" * 100_000))
    each = (len(BIG) + 100_000) // 2
    assert each * 10 < journal.kept < (each + 2048) * 10
    journal.close()
    journal = Journal(tmp_path)
    assert journal.prune(0.0, 0, 2000.0) == [] and journal.prune(0.0, each * 20, 2000.0) == []
    assert journal.prune(1002.0, 0, 2000.0) == ["c0", "c1"], "for their age"
    most = (each + 2048) * 4
    assert set(journal.prune(0.0, most, 1005.0)) == {"c2", "c3", "c4"}, "not the later ones"
    assert set(journal.prune(0.0, most, 2000.0)) == {"c5"}
    assert bodies(tmp_path) == {"c7.out", "c9.out"} and {r.id for r in journal.recent(9)} == {"c6", "c7", "c8", "c9"}
    kept = journal.kept
    journal.close()
    assert Journal(tmp_path).kept == kept < most


async def test_payloads() -> None:
    assert Payload(data=b"").size == 0 and Payload().read() == b""
    assert b"".join([c async for c in Payload(data=b"x").chunks()]) == b"x"
    await asyncio.sleep(0)


def test_whether_a_daemon_ran_there(tmp_path: Path) -> None:
    assert not Journal.exists(tmp_path)
    Journal(tmp_path).close()
    assert Journal.exists(tmp_path)
