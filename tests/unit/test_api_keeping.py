"""The routes that look after snapshots, over the real API and catalogue, with a keeper that only remembers."""

from __future__ import annotations

import asyncio
import contextlib
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from unit.test_api import Daemon, function
from woodfrog.errors import IncompatibleSnapshot, StoreError

ID, OTHER = "s-00000000000a", "s-00000000000b"


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Daemon]:
    made = Daemon(tmp_path)
    for snapshot_id in (ID, OTHER):
        made.backend.store(f"key-{snapshot_id}", snapshot_id)
    yield made
    await made.close()


async def test_work_that_takes_long_is_a_job_and_its_end_is_what_the_request_would_have_been(daemon: Daemon) -> None:
    gate = daemon.backend.keeper.gate = asyncio.Event()
    begun = await daemon.http.post(f"/snapshots/{ID}/push", params={"wait": 0.05})
    assert begun.status_code == 202
    job = begun.json()
    assert (job["what"], job["state"], job["step"], job["done"], job["total"]) == (
        f"push {ID}", "running", "packs", 1, 4,
    )  # fmt: skip
    assert (await daemon.http.get(f"/jobs/{job['job']}")).status_code == 202
    gate.set()
    ended = await daemon.http.get(f"/jobs/{job['job']}", params={"wait": 5})
    assert (ended.status_code, ended.json()) == (200, {"id": ID, "tier": "fake"})
    assert [j["state"] for j in (await daemon.http.get("/jobs")).json()["jobs"]] == ["done"]
    row = (await daemon.http.get(f"/snapshots/{ID}")).json()
    assert (row["pushed"], row["pinned"]) == (True, False)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (StoreError("the bucket is away", code="tier-unreachable"), 507, "tier-unreachable"),
        (IncompatibleSnapshot("a file was changed"), 409, "snapshot-incompatible"),
        (ValueError("a bug"), 500, "internal"),
    ],
)
async def test_work_that_fails_says_why_once_and_again(
    daemon: Daemon, error: Exception, status: int, code: str
) -> None:
    daemon.backend.keeper.fails = error
    failed = await daemon.http.post(f"/snapshots/{ID}/push", params={"wait": 5})
    assert (failed.status_code, failed.json()["error"]["code"]) == (status, code)
    job = (await daemon.http.get("/jobs")).json()["jobs"][0]
    assert job["state"] == "failed"
    assert (await daemon.http.get(f"/jobs/{job['job']}")).json() == failed.json()
    assert (await daemon.http.get("/jobs/none")).status_code == 404


async def test_an_exported_file_is_fetched_once_and_taken_up_again(daemon: Daemon, tmp_path: Path) -> None:
    spool = daemon.settings.home / "calls"
    answer = (await daemon.http.post(f"/snapshots/{ID}/export", params={"wait": 5})).json()
    assert answer["bytes"] == len(ID)
    fetched = await daemon.http.get(answer["file"])
    assert fetched.content == ID.encode()
    assert (await daemon.http.get(answer["file"])).status_code == 404
    taken = await daemon.http.post("/snapshots/import", params={"wait": 5}, content=fetched.content)
    assert (taken.json()["id"], taken.json()["new"]) == (ID, False)
    daemon.backend.keeper.fails = StoreError("the disk is full")
    assert (await daemon.http.post(f"/snapshots/{ID}/export", params={"wait": 5})).status_code == 507
    daemon.backend.keeper.fails = StoreError("the disk is full")
    assert (await daemon.http.post("/snapshots/import", params={"wait": 5}, content=b"x")).status_code == 507
    assert list(spool.iterdir()) == []


async def test_an_exported_file_that_nobody_fetches_is_removed(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = daemon.settings.home / "calls"
    gate = daemon.backend.keeper.gate = asyncio.Event()
    job = (await daemon.http.post(f"/snapshots/{ID}/export", params={"wait": 0.01})).json()
    assert job["for_client"]
    assert (await daemon.http.delete(f"/jobs/{job['job']}/file")).status_code == 200
    gate.set()  # written all the same, and gone
    assert "file" not in (await daemon.http.get(f"/jobs/{job['job']}", params={"wait": 5})).json()
    assert list(spool.iterdir()) == []

    monkeypatch.setattr("woodfrog.daemon.jobs._FETCH_S", 0.05)
    answer = (await daemon.http.post(f"/snapshots/{ID}/export", params={"wait": 5})).json()
    assert len(list(spool.iterdir())) == 1
    await asyncio.sleep(0.1)
    assert list(spool.iterdir()) == [] and (await daemon.http.get(answer["file"])).status_code == 404

    monkeypatch.undo()
    answer = (await daemon.http.post(f"/snapshots/{ID}/export", params={"wait": 5})).json()
    scope = {"type": "http", "method": "GET", "path": f"/v1{answer['file']}", "headers": [], "query_string": b""}

    async def gone(message: Any) -> None:
        raise OSError("the client went away")

    with contextlib.suppress(Exception):
        await daemon.app(scope, asyncio.Event().wait, gone)  # type: ignore[arg-type]
    assert list(spool.iterdir()) == []


async def test_collecting_here_and_in_the_tier(daemon: Daemon) -> None:
    async def gc(**params: int) -> dict[str, Any]:
        found: dict[str, Any] = (await daemon.http.post("/snapshots/gc", params={"wait": 5, **params})).json()
        return found

    assert await gc() == await gc(dry_run=1) == {"packs": 2, "freed_bytes": 8192, "rebuilt_bytes": 0}
    assert (await gc(rebuilt=1))["rebuilt_bytes"] == 4096
    in_tier = {
        "tier": "fake",
        "packs": 2,
        "chunks": 1,
        "snapshots": 0,
        "tombstones": 0,
        "objects": 7,
        "freed_bytes": 8192,
    }
    assert await gc(tier=1) == in_tier
    assert await gc(tier=1, dry_run=1) == {**in_tier, "objects": 0}


async def test_invalidating_here_and_in_the_tier(daemon: Daemon) -> None:
    keeper = daemon.backend.keeper

    async def invalidate(snapshot: str, status: int = 200) -> dict[str, Any]:
        answer = await daemon.http.post(f"/snapshots/{snapshot}/invalidate", params={"tier": 1, "wait": 5})
        assert answer.status_code == status, answer.text
        found: dict[str, Any] = answer.json()
        return found

    keeper.in_tier |= {ID, "s-00000000000c"}
    keeper.fails = StoreError("the bucket is away", code="tier-unreachable")
    assert (await invalidate(ID, 507))["error"]["code"] == "tier-unreachable"
    assert daemon.catalogue.retired(ID) is None and ID in keeper.in_tier, "nothing has changed"
    of_tier = {"removed": True, "tier": "fake"}
    assert await invalidate(ID[:-1] + "a") == {"snapshot": ID, "here": True, "in_tier": True, **of_tier}
    assert daemon.catalogue.form(ID) is None and daemon.catalogue.retired(ID) == "invalidated"
    only_there = "s-00000000000c"
    assert await invalidate(only_there) == {"snapshot": only_there, "here": False, "in_tier": True, **of_tier}
    assert daemon.catalogue.retired(only_there) == "invalidated", "no copy that another machine puts back is taken"
    assert keeper.in_tier == set()
    unknown = await invalidate(only_there, 404)
    assert unknown["error"]["message"] == f"no snapshot {only_there} here or in fake"
    assert await invalidate("s-00") == {"snapshot": OTHER, "here": True, "in_tier": False, **of_tier}
    assert (await daemon.http.post("/snapshots/s-f/invalidate")).status_code == 404


async def test_a_pinned_snapshot_is_invalidated_by_force_only(daemon: Daemon) -> None:
    await daemon.http.post(f"/snapshots/{ID}/pin")
    for params in ({}, {"tier": 1}):
        refused = await daemon.http.post(f"/snapshots/{ID}/invalidate", params=params)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "pinned")
    assert daemon.catalogue.retired(ID) is None
    done = await daemon.http.post(f"/snapshots/{ID}/invalidate", params={"force": 1})
    assert done.json() == {"snapshot": ID, "removed": True}


async def test_the_tier_is_listed_and_what_was_removed_there_is_pushed_on_a_persons_word_only(daemon: Daemon) -> None:
    assert (await daemon.http.get("/tier")).json() == {"tier": "fake"}

    async def listed() -> dict[str, str]:
        found = (await daemon.http.post("/tier/list", params={"wait": 5})).json()
        assert found["tier"] == "fake"
        return {row["id"]: row["state"] for row in found["snapshots"]}

    push = f"/snapshots/{ID}/push"
    assert (await daemon.http.post(push, params={"wait": 5})).status_code == 200
    assert await listed() == {ID: "ready"}
    await daemon.backend.keeper.withdraw(ID)
    assert await listed() == {ID: "removed"}
    refused = await daemon.http.post(push, params={"wait": 5})
    assert (refused.status_code, refused.json()["error"]["code"]) == (507, "tier-removed")
    assert (await daemon.http.post(push, params={"wait": 5, "anyway": 1})).status_code == 200
    assert await listed() == {ID: "ready"}


async def test_ids_may_be_short_where_there_is_one_and_unknown_ones_are_not_asked_for(daemon: Daemon) -> None:
    for action in ("pin", "unpin", "export", "push", "verify"):
        assert (await daemon.http.post(f"/snapshots/s-0/{action}")).status_code == 404, action
        assert (await daemon.http.post(f"/snapshots/s-f/{action}")).status_code == 404, action
    assert (await daemon.http.post(f"/snapshots/{ID}/pin")).json() == {"id": ID, "pinned": True}
    rows = {s["id"]: s["pinned"] for s in (await daemon.http.get("/snapshots")).json()["snapshots"]}
    assert rows == {ID: True, OTHER: False}
    stats = (await daemon.http.get("/store")).json()
    assert [s["pinned"] for s in stats["snapshots"]] == [True, False]


async def test_verify_of_one_of_all_and_of_a_damaged_one(daemon: Daemon) -> None:
    (daemon.catalogue.path(OTHER) / "img" / "extra").write_bytes(b"x")
    every = (await daemon.http.post("/snapshots/verify", params={"wait": 5})).json()
    assert [bool(s["problems"]) for s in every["snapshots"]] == [False, True]
    daemon.catalogue.damaged["s-bad"] = "its manifest is gone"
    one = (await daemon.http.post("/snapshots/s-bad/verify", params={"wait": 5})).json()
    assert one["snapshots"] == [{"id": "s-bad", "bytes": 0, "problems": ["its manifest is gone"]}]


async def test_only_who_can_read_roots_file_changes_whom_the_machine_trusts(daemon: Daemon) -> None:
    secret = daemon.settings.home / "keys" / "admin"
    for headers in ({}, {"Woodfrog-Admin": ""}, {"Woodfrog-Admin": "0" * 64}):
        refused = await daemon.http.post("/trust", json={"key": "KEY"}, headers=headers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not-root")
        assert (await daemon.http.post("/trust/KEY/remove", headers=headers)).status_code == 503
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600 and len(secret.read_text()) == 64
    root = {"Woodfrog-Admin": secret.read_text()}
    assert (await daemon.http.post("/trust", json={"key": "\n"}, headers=root)).status_code == 400
    added = await daemon.http.post("/trust", json={"key": "KEY host", "comment": "ann"}, headers=root)
    assert added.json() == {"fingerprint": "KEY", "comment": "ann"}
    listed = (await daemon.http.get("/trust")).json()
    assert listed["trusted"] == [{"fingerprint": "KEY", "comment": "ann"}] and listed["own"]["text"]
    assert (await daemon.http.post("/trust/KEY/remove", headers=root)).status_code == 200
    assert (await daemon.http.post("/trust/KEY/remove", headers=root)).status_code == 404


async def test_looking_into_what_cannot_be_read_is_one_line(daemon: Daemon) -> None:
    for path in (f"/snapshots/{ID}/contents", f"/snapshots/{ID}/diff/{OTHER}"):
        answer = await daemon.http.get(path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "unreadable"), answer.text
        assert "pstree.img" in answer.json()["error"]["message"]
    assert (await daemon.http.get(f"/snapshots/{ID}/diff/none")).status_code == 404
    assert (await daemon.http.get("/snapshots/none/contents")).status_code == 404
    (daemon.catalogue.path(OTHER) / "img" / "extra").write_bytes(b"x")
    altered = await daemon.http.get(f"/snapshots/{OTHER}/contents")
    assert (altered.status_code, altered.json()["error"]["code"]) == (409, "altered")


async def test_a_container_is_compared_with_its_own_snapshot_only(daemon: Daemon) -> None:
    await daemon.deploy(function("square"))
    await daemon.call("square", 3)
    container = next(iter(daemon.controller.instances))
    answer = await daemon.http.get(f"/snapshots/{ID}/diff/{container}")
    assert (answer.status_code, answer.json()["error"]["message"]) == (
        404, f"container {container} has no process just now",
    )  # fmt: skip
