"""The HTTP API over the real controller, control machine and journal, with instances in this process."""

from __future__ import annotations

import asyncio
import base64
import errno
import hashlib
import io
import itertools
import json
import os
import pickle
import re
import shutil
import sqlite3
import sys
import tarfile
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from contract.fake_backend import WORKER_CLASS, FakeBackend, FaultyBackend
from woodfrog.backends import payload as payload_module
from woodfrog.control.events import RunCall
from woodfrog.daemon import api as api_module
from woodfrog.daemon import controller as controller_module
from woodfrog.daemon import journal as journal_module
from woodfrog.daemon import starts as starts_module
from woodfrog.daemon.api import TokenAuth, build
from woodfrog.daemon.controller import Controller
from woodfrog.daemon.journal import Journal
from woodfrog.daemon.logs import LogBook
from woodfrog.daemon.package import Package
from woodfrog.daemon.resources import Resources
from woodfrog.errors import InstanceCrashed, OutputExpired, StoreError, error_from_dict
from woodfrog.protocol import unpack_items
from woodfrog.sdk.client import error_from_answer
from woodfrog.settings import Settings
from woodfrog.snapshot.catalogue import Catalogue
from woodfrog.snapshot.compat import WorkerClass
from woodfrog.snapshot.manifest import SigningKey
from woodfrog.spec import (
    AppSpec,
    FunctionSpec,
    LeftOut,
    MethodSpec,
    RetryPolicy,
    RuntimeSpec,
    ScalingPolicy,
    SecretSpec,
    SnapshotPolicy,
    SourceSpec,
    VolumeMount,
    function_key,
    to_dict,
)

RUNTIME = RuntimeSpec(sys.executable, sys.prefix, sys.base_prefix, "3.11")
BIG = "x" * (6 << 20)


def function(tag: str, *methods: str, kind: str = "function", **more: Any) -> FunctionSpec:
    generators = {"count"}
    return FunctionSpec(
        tag=tag,
        kind=kind,  # type: ignore[arg-type]
        source=SourceSpec("module", "app", tag),
        methods=tuple(MethodSpec(m, generator=m in generators) for m in (methods or (tag,))),
        **{"retries": RetryPolicy(), **more},
    )


def fail() -> None:
    raise ValueError("no such thing")


gates: dict[str, asyncio.Event] = {}


async def wait_for_gate(name: str = "gate") -> str:
    await gates.setdefault(name, asyncio.Event()).wait()
    return "through"


def count(n: int, broken: bool = False) -> Iterator[int]:
    yield from range(n)
    if broken:
        raise ValueError("broke off")


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "square": lambda x=3: x * x,
    "big": lambda: BIG,
    "length": lambda x: len(x),
    "fail": fail,
    "wait": wait_for_gate,
    "count": count,
}


class Daemon:
    """What `woodfrogd` puts together, without sandboxes and sockets."""

    def __init__(self, home: Path, kind: type[FakeBackend] = FakeBackend) -> None:
        self.settings = Settings(home=home)
        self.journal = Journal(home)
        content = api_module.ContentStore(home)
        self.catalogue = Catalogue(home / "snapshots", SigningKey.load_or_create(home / "key"))
        self.logs = LogBook(home / "logs", 1 << 20)
        self.controller = Controller(
            self.settings,
            journal=self.journal,
            logs=self.logs,
            resources=Resources(self.settings, content),
            catalogue=self.catalogue,
            run_id=uuid.uuid4().hex[:6],
        )
        self.backend = kind(self.controller, FUNCTIONS, self.catalogue)
        self.controller.backend = self.backend
        self.downs = 0
        self.app = build(
            self.controller,
            content=content,
            catalogue=self.catalogue,
            worker_class=WorkerClass(WORKER_CLASS, {}),
            shutdown=self._down,
        )
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app, raise_app_exceptions=False), base_url="http://d/v1", timeout=20
        )
        self.controller.recover()

    def _down(self) -> None:
        self.downs += 1

    @property
    def faulty(self) -> FaultyBackend:
        assert isinstance(self.backend, FaultyBackend)
        return self.backend

    async def deploy(self, *functions: FunctionSpec, app: str = "demo", **more: Any) -> dict[str, Any]:
        spec = to_dict(AppSpec(app, RUNTIME, functions))
        answer = await self.http.post(f"/apps/{app}/deploy", json={"spec": spec, **more})
        assert answer.status_code == 200, answer.text
        result: dict[str, Any] = answer.json()
        return result

    async def submit(self, tag: str, *args: Any, wait: float = 0, app: str = "demo", **headers: str) -> httpx.Response:
        return await self.http.post(
            f"/apps/{app}/calls/{tag}",
            params={"wait": wait},
            content=pickle.dumps((args, {})),
            headers={"Woodfrog-Encoding": "pickle", **{k.replace("_", "-"): v for k, v in headers.items()}},
        )

    async def call(self, tag: str, *args: Any, **more: Any) -> Any:
        answer = await self.submit(tag, *args, wait=10, **more)
        assert answer.headers["woodfrog-status"] == "success", answer.text
        return pickle.loads(answer.content)

    async def failure(self, tag: str, *args: Any) -> Any:
        answer = await self.submit(tag, *args, wait=10)
        assert answer.headers["woodfrog-status"] in ("failure", "cancelled")
        return error_from_dict(answer.json()["error"])

    async def die(self) -> None:
        """As if killed: nothing is said to anybody."""
        self.journal.close()
        if self.controller._wake is not None:
            self.controller._wake.cancel()
        for task in [*self.controller._tasks, *self.backend._tasks]:
            task.cancel()
        await asyncio.sleep(0)
        await self.http.aclose()

    async def close(self) -> None:
        await self.controller.shutdown(grace=5)
        await self.http.aclose()
        self.logs.close()
        self.journal.close()
        assert self.controller.state.instances == {} and self.backend.instances == {}
        assert self.controller.instances == {}

    def spooled(self) -> list[str]:
        return sorted(p.name for p in (self.settings.home / "calls").iterdir())


@pytest.fixture(autouse=True)
def removed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what is there can be looked at."""

    def discard(path: Path) -> Future[None]:
        wait([removing := payload_module.discard(path)])
        return removing

    monkeypatch.setattr(journal_module, "discard", discard)
    monkeypatch.setattr(controller_module, "discard", discard)


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Daemon]:
    gates.clear()
    daemon = Daemon(tmp_path, FaultyBackend)
    yield daemon
    await daemon.close()


def error_of(answer: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"type", "code", "message", "retryable", "fields"} and "\n" not in error["message"]
    return error


# Calls


async def test_call_and_poll(daemon: Daemon) -> None:
    deployed = await daemon.deploy(function("square"), function("wait"))
    assert deployed["version"] == 1 and [f["tag"] for f in deployed["functions"]] == ["square", "wait"]
    assert await daemon.call("square", 7) == 49
    first = await daemon.submit("wait")
    assert (first.status_code, first.headers["woodfrog-status"], first.content) == (202, "pending", b"")
    call = first.headers["woodfrog-call"]
    polled = await daemon.http.get(f"/calls/{call}", params={"wait": 0.01})
    assert polled.status_code == 202
    waiting = asyncio.ensure_future(daemon.http.get(f"/calls/{call}", params={"wait": 10}))
    await asyncio.sleep(0.01)
    gates["gate"].set()
    assert pickle.loads((await waiting).content) == "through"
    trace = (await daemon.http.get(f"/calls/{call}/trace")).json()
    assert trace["status"] == "success" and trace["start"] == "cold"
    assert [p["name"] for p in trace["phases"]][-1] == "run"
    listed = (await daemon.http.get("/calls")).json()["calls"]
    assert listed[0]["id"] == call and listed[0]["outcome"] == "success"


async def test_calls_of_an_app(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that is older than what is looked through, while it is not finished."""
    await daemon.deploy(function("square"), function("wait"))
    await daemon.deploy(function("square"), app="other")
    waits = (await daemon.submit("wait")).headers["woodfrog-call"]
    await settle()
    await daemon.call("square", 7)
    await daemon.call("square", 7, app="other")

    async def listed(**params: int) -> list[tuple[str, str, bool]]:
        found = (await daemon.http.get("/apps/demo/calls", params=params)).json()["calls"]
        return [(c["function"], c["status"], c["finished"] is not None) for c in found]

    assert await listed() == [("square", "success", True), ("wait", "running", False)]
    assert await listed(limit=1) == [("square", "success", True)] and await listed(failed=1) == []
    broken = (await daemon.submit("square", "no number", wait=10)).headers["woodfrog-call"]
    await daemon.call("square", 8)
    assert await listed(failed=1, limit=1) == [("square", "exception", True)]
    traced = (await daemon.http.get(f"/calls/{broken}/trace")).json()
    assert traced["error"]["type"] == "TypeError" and traced["status"] == "exception" and traced["submitted"] > 0
    await daemon.call("square", 7, app="other")
    monkeypatch.setattr(journal_module, "_LOOKED_THROUGH", 1)
    assert await listed() == [("wait", "running", False)]
    assert (await daemon.http.get("/apps/none/calls")).status_code == 404
    await daemon.http.post(f"/calls/{waits}/cancel")
    assert await listed() == []


async def test_exceptions_are_the_user_s(daemon: Daemon) -> None:
    await daemon.deploy(function("fail"))
    answer = await daemon.submit("fail", wait=10)
    assert (answer.status_code, answer.headers["woodfrog-status"]) == (200, "exception")
    assert "no such thing" in pickle.loads(answer.content)
    answer = await daemon.http.post("/apps/demo/calls/fail?wait=10", json=[])
    assert answer.json()["error"]["type"] == "ValueError" and answer.headers["woodfrog-status"] == "exception"


async def log_of(daemon: Daemon, app: str = "demo") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (await daemon.http.get(f"/apps/{app}/logs")).text.splitlines()]


async def test_the_app_s_log_tells_of_every_attempt_that_failed(daemon: Daemon) -> None:
    """Also where nobody waits for the answer. The traceback comes after what was printed before it."""
    await daemon.deploy(function("fail", retries=RetryPolicy(max_retries=1, initial_delay=0.01)))
    call = (await daemon.submit("fail")).headers["woodfrog-call"]
    await daemon.http.get(f"/calls/{call}", params={"wait": 5})
    lines = await log_of(daemon)
    told = [line["line"] for line in lines if call in line["line"]]
    assert told == [
        f"call {call} of fail: ValueError: no such thing; attempt 1 of 2, the next in 0.01 s",
        f"call {call} of fail: ValueError: no such thing; the last of 2 attempts",
    ]
    trace = [line for line in lines if line["stream"] == "stderr"]
    assert [line["line"] for line in trace].count("ValueError: no such thing") == 2
    assert {(line["call"], line["function"], line["instance"]) for line in trace} == {
        (call, "fail", daemon.backend.started[0].instance_id)
    }


async def test_the_app_s_log_tells_of_calls_that_timed_out_or_lost_their_container(daemon: Daemon) -> None:
    await daemon.deploy(function("wait", timeout=0.05), function("square"))
    await daemon.failure("wait")
    daemon.faulty.calls.append("crashes")
    await daemon.failure("square", 2)
    told = [line["line"].partition(" of ")[2] for line in await log_of(daemon) if line["line"].startswith("call ")]
    assert told == [
        "wait: ran past its timeout of 0.05 s; raise timeout= or do less in one call",
        "square: the process was killed by SIGKILL",
    ]


async def test_a_start_that_fails_is_told_once(daemon: Daemon) -> None:
    """However many calls waited for it."""
    await daemon.deploy(function("square", scaling=ScalingPolicy(max_containers=1)))
    daemon.faulty.starts.append("user-fault")
    answers = await asyncio.gather(*(daemon.submit("square", n, wait=10) for n in range(3)))
    assert {a.headers["woodfrog-status"] for a in answers} == {"failure"}
    told = [line["line"] for line in await log_of(daemon) if line["stream"] == "system"]
    assert sum("import failed: ImportError: nope" in line for line in told) == 1
    assert sum(line.endswith("of square: not run, no container started") for line in told) == 3


async def starts_of(daemon: Daemon, app: str = "demo", **params: Any) -> list[dict[str, Any]]:
    """The oldest first."""
    answer = (await daemon.http.get(f"/apps/{app}/starts", params=params)).json()
    return list(reversed(answer["starts"]))


async def test_why_the_last_starts_were_cold(daemon: Daemon, tmp_path: Path) -> None:
    one_each = ScalingPolicy(single_use=True)
    frozen = SnapshotPolicy(enabled=True)
    await daemon.deploy(function("square", snapshot=frozen, scaling=one_each), function("length", scaling=one_each))
    assert await starts_of(daemon) == []
    for thaw in ("", "", "fails", ""):
        if thaw:
            daemon.faulty.thaws.append(thaw)
        await daemon.call("square", 2)
        await settle()
    daemon.faulty.starts.append("user-fault")
    await daemon.failure("length", "x")
    await daemon.call("length", "x")
    found = await starts_of(daemon)
    assert [(s["function"], s["kind"], s["result"], s["why"]) for s in found] == [
        ("square", "cold", "ready", "none-fits"),
        ("square", "thawed", "ready", ""),
        ("square", "thawed", "failed", ""),
        ("square", "cold", "ready", "did-not-thaw"),
        ("square", "thawed", "ready", ""),
        ("length", "cold", "failed", "off"),
        ("length", "cold", "ready", "off"),
    ]
    assert found[0]["words"] == "it had no snapshot yet" and found[1]["snapshot"] == "s-1"
    assert found[2]["error"] == "criu restore failed" and found[2]["code"] == "restore-failed"
    assert found[3]["words"] == "its snapshot did not thaw: criu restore failed"
    assert found[5]["error"].startswith("import failed") and all(s["version"] == 1 for s in found)
    assert [s["function"] for s in await starts_of(daemon, limit=2)] == ["length", "length"]
    unknown = await daemon.http.get("/apps/nope/starts")
    assert unknown.status_code == 404 and error_of(unknown)["code"] == "not-found"
    said = [line["line"] for line in await log_of(daemon) if "started in" in line["line"]]
    assert [re.sub(r"\d+ ms", "N ms", line) for line in said] == [
        "started in N ms, cold: it had no snapshot yet",
        "started in N ms",
        "started in N ms",
    ]
    [app] = (await daemon.http.get("/apps")).json()["apps"]
    assert app["starts"] == {"thawed": 2, "woken": 0, "zygote": 0, "cold": 3, "failed": 2}
    assert app["last_error"]["message"].startswith("import failed") and app["last_error"]["function"] == "length"


async def test_starts_and_the_last_error_outlive_the_daemon(tmp_path: Path) -> None:
    first = Daemon(tmp_path)
    await first.deploy(function("square"), function("fail"))
    await first.call("square", 2)
    await first.submit("fail", wait=10)
    await first.close()
    second = Daemon(tmp_path)
    try:
        assert [s["function"] for s in await starts_of(second)] == ["square", "fail"]
        [app] = (await second.http.get("/apps")).json()["apps"]
        assert app["starts"]["cold"] == 2
        last = app["last_error"]
        assert (last["function"], last["message"]) == ("fail", "ValueError: no such thing")
        assert abs(last["at"] - time.time()) < 60
    finally:
        await second.close()


async def test_starts_are_not_kept_for_ever(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    await daemon.deploy(function("square", scaling=ScalingPolicy(single_use=True)))
    for n in range(5):
        await daemon.call("square", n)
    await settle()
    assert len(await starts_of(daemon)) == 5 and daemon.controller.starts._unwritten == []
    monkeypatch.setattr(starts_module, "_KEPT", 3)
    await daemon.call("square", 1)
    assert len(await starts_of(daemon)) == 3
    # Where the disk is full the newest wait in memory, within a bound.
    monkeypatch.setattr(starts_module, "_UNWRITTEN", 2)

    def full(*_: Any) -> None:
        raise StoreError("no space left", code="disk-full")

    with monkeypatch.context() as patch:
        patch.setattr(daemon.journal, "add_starts", full)
        for n in range(4):
            await daemon.call("square", n)
            daemon.controller.tidy()
        assert len(daemon.controller.starts._unwritten) == 2
    await starts_of(daemon)
    assert daemon.controller.starts._unwritten == []


async def test_what_an_app_has_to_do(daemon: Daemon) -> None:
    await daemon.deploy(
        function("wait", scaling=ScalingPolicy(max_containers=1)),
        function("square", snapshot=SnapshotPolicy(enabled=True)),
    )
    for _ in range(3):
        await daemon.submit("wait")
    await settle()
    [app] = (await daemon.http.get("/apps")).json()["apps"]
    assert (app["calls"]["running"], app["calls"]["waiting"]) == (1, 2) and 0 <= app["calls"]["oldest_waiting_s"] < 60
    detail = (await daemon.http.get("/apps/demo")).json()
    assert detail["calls"] == {**detail["calls"], "running": 1, "waiting": 2}
    wait, square = detail["functions"]
    assert wait["calls"]["waiting"] == 2 and wait["containers"] == 1 and wait["snapshots"]["state"] == "off"
    assert square["calls"] == {"running": 0, "waiting": 0, "oldest_waiting_s": None}
    assert square["snapshots"] == {"state": "none", "snapshots": [], "reason": ""}
    gates["gate"].set()


async def scraped(daemon: Daemon) -> dict[str, float]:
    answer = await daemon.http.get("http://d/metrics")
    assert answer.status_code == 200 and answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    lines = [line.rpartition(" ") for line in answer.text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


async def test_metrics(daemon: Daemon) -> None:
    secret = "hunter2"
    await daemon.deploy(
        function("wait", scaling=ScalingPolicy(max_containers=1)),
        function("square", snapshot=SnapshotPolicy(enabled=True)),
        function("fail", env={"PASSWORD": secret}),
    )
    await daemon.deploy(function("square"), app="run-1a2b3c4d", ephemeral=True)
    assert (await scraped(daemon))['woodfrog_calls_total{app="demo",outcome="failure"}'] == 0
    await daemon.call("square", 2)
    await daemon.call("square", 2, app="run-1a2b3c4d")
    await daemon.submit("fail", wait=10)
    daemon.faulty.starts.append("user-fault")
    await daemon.failure("wait", secret)
    for _ in range(2):
        await daemon.submit("wait", secret)
    await settle()
    found = await scraped(daemon)
    demo = 'app="demo"'
    assert found[f'woodfrog_calls_total{{{demo},outcome="success"}}'] == 1
    assert found[f'woodfrog_calls_total{{{demo},outcome="exception"}}'] == 1
    assert found['woodfrog_calls_total{app="(ephemeral)",outcome="success"}'] == 1
    assert found[f"woodfrog_calls_running{{{demo}}}"] == found[f"woodfrog_calls_waiting{{{demo}}}"] == 1
    assert 0 <= found[f"woodfrog_calls_oldest_waiting_seconds{{{demo}}}"] < 60
    assert found[f'woodfrog_starts_total{{{demo},kind="cold",result="ready"}}'] == 3
    assert found[f'woodfrog_starts_total{{{demo},kind="cold",result="failed"}}'] == 1
    assert found[f'woodfrog_cold_starts_total{{{demo},why="none-fits"}}'] == 1
    assert found['woodfrog_failures_total{code="startup",what="start"}'] == 1
    assert found['woodfrog_containers{state="running"}'] == 1 and found[f"woodfrog_app_containers{{{demo}}}"] == 3
    assert found['woodfrog_snapshots{kind="function",state="ready"}'] == 1
    assert found['woodfrog_gpus{state="used"}'] == 0 and found["woodfrog_disk_free_bytes"] > 0
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text().partition("## Metrics")[2].partition("\n## ")[0]
    table = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    text = (await daemon.http.get("http://d/metrics")).text
    assert set(re.findall("# TYPE woodfrog_(\\w+)", text)) == set(re.findall(r"`(\w+)`", " ".join(table)))
    assert not any(word in name for name in found for word in (secret, "run-1a2b", 'wait"', "i-"))
    gates[secret].set()


async def test_metrics_of_an_app_that_was_stopped(daemon: Daemon) -> None:
    await daemon.deploy(function("wait"))
    await daemon.submit("wait")
    await settle()
    await daemon.http.post("/apps/demo/stop")
    found = await scraped(daemon)
    assert found['woodfrog_calls_total{app="demo",outcome="cancelled"}'] == 1
    assert 'woodfrog_calls_running{app="demo"}' not in found
    await settle()
    assert (await scraped(daemon))['woodfrog_containers{state="stopping"}'] == 0


async def test_a_scraper_s_token_opens_metrics_alone(daemon: Daemon) -> None:
    guarded = TokenAuth(daemon.app, "secret", "scrape")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(guarded), base_url="http://d") as http:  # type: ignore[arg-type]

        async def status(path: str, token: str = "", method: str = "GET") -> int:
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            return (await http.request(method, path, headers=headers)).status_code

        assert [await status("/metrics", t) for t in ("", "wrong", "scrape", "secret")] == [401, 401, 200, 200]
        for path in ("/v1/health", "/v1/apps", "/openapi.json", "/metrics/", "//metrics", "/v1/metrics"):
            assert await status(path, "scrape") == 401, path
        assert await status("/metrics", "scrape", "POST") == 401
    alone = TokenAuth(daemon.app, "secret")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(alone), base_url="http://d") as http:  # type: ignore[arg-type]
        for token, wanted in (("", 401), (" ", 401), ("secret", 200)):
            assert (await http.get("/metrics", headers={"Authorization": f"Bearer {token}"})).status_code == wanted


async def test_json_calls(daemon: Daemon) -> None:
    await daemon.deploy(function("square"))
    for body in ([4], {"x": 4}):
        answer = await daemon.http.post("/apps/demo/calls/square?wait=10", json=body)
        assert answer.json() == 16 and answer.headers["content-type"] == "application/json"
    answer = await daemon.http.post(
        "/apps/demo/calls/square?wait=10", content=b"[5]", headers={"Woodfrog-Encoding": "json"}
    )
    assert answer.json() == 25


async def test_large_arguments_and_results(daemon: Daemon) -> None:
    await daemon.deploy(function("big"), function("length"))
    assert await daemon.call("length", BIG) == len(BIG)
    answer = await daemon.submit("big", wait=10)
    assert pickle.loads(answer.content) == BIG
    call = answer.headers["woodfrog-call"]
    assert daemon.spooled() == [f"{call}.out"]
    daemon.controller.calls.clear()
    assert pickle.loads((await daemon.http.get(f"/calls/{call}")).content) == BIG


class Disk:
    """One that stands still for payloads until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, attribute: str, of: Any) -> None:
        self.reached, self.free, self.gave_up = threading.Event(), threading.Event(), False
        real = getattr(of, attribute)

        def stands_still(*args: Any) -> Any:
            self.reached.set()
            self.gave_up |= not self.free.wait(10)
            return real(*args)

        monkeypatch.setattr(of, attribute, stands_still)

    async def meanwhile(self) -> None:
        """Returns as soon as somebody waits for it."""
        while not self.reached.is_set():
            await asyncio.sleep(0.005)
        assert not self.gave_up, "the event loop waited for the disk"


@pytest.mark.parametrize("size", [1 << 20, 6 << 20])
async def test_calls_are_answered_while_others_wait_for_the_disk(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    daemon.backend.functions = {**FUNCTIONS, "big": lambda: "x" * size}
    await daemon.deploy(function("big"), function("length"), function("square"))
    assert await daemon.call("square", 2) == 4
    for tag, args in (("length", ("x" * size,)), ("big", ())):
        with monkeypatch.context() as patch:
            disk = Disk(patch, "_write", payload_module.Spool)
            slow = asyncio.ensure_future(daemon.submit(tag, *args, wait=10, Woodfrog_Call=tag))
            await disk.meanwhile()
            assert await daemon.call("square", 7) == 49
            assert not slow.done()
            unfinished = [row.id for row in daemon.journal.unfinished()]
            assert unfinished == ([] if tag == "length" else [tag])  # no row before its body is complete
            disk.free.set()
            assert (await slow).headers["woodfrog-status"] == "success"
    assert daemon.spooled() == ["big.out"]


async def test_a_stopping_daemon_writes_the_answers_that_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = Daemon(tmp_path)
    await daemon.deploy(function("big"))
    disk = Disk(monkeypatch, "_write", payload_module.Spool)
    call = (await daemon.submit("big")).headers["woodfrog-call"]
    await disk.meanwhile()
    stopping = asyncio.ensure_future(daemon.controller.shutdown(grace=5))
    while daemon.controller.state.instances:
        await asyncio.sleep(0.005)
    await asyncio.sleep(0.01)
    disk.free.set()
    await stopping
    row = daemon.journal.call(call)
    assert row is not None and row.outcome == "success"
    await daemon.close()


async def test_answers_in_memory_are_bounded_in_bytes(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("woodfrog.daemon.controller._ANSWERS_LIMIT", 100_000)
    daemon.backend.functions = {**FUNCTIONS, "square": lambda x: str(x) * 30_000}
    await daemon.deploy(function("square"))
    answers = [await daemon.submit("square", x, wait=10) for x in range(8)]
    calls = [a.headers["woodfrog-call"] for a in answers]
    assert list(daemon.controller.calls) == calls[-3:]
    for x, call in enumerate(calls):
        assert pickle.loads((await daemon.http.get(f"/calls/{call}")).content) == str(x) * 30_000
    monkeypatch.setattr("woodfrog.daemon.controller._ANSWER_S", -1.0)
    daemon.controller.tidy()
    assert not daemon.controller.calls and daemon.controller._answer_bytes == 0


async def test_results_that_were_fetched_make_room(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon.controller.settings = replace(daemon.settings, keep_results_mib=1)
    daemon.backend.functions = {**FUNCTIONS, "square": lambda x: b"x" * (600 << 10)}
    await daemon.deploy(function("square"))
    fetched = [(await daemon.submit("square", 1, wait=10)).headers["woodfrog-call"] for _ in range(3)]
    spawned = [(await daemon.submit("square", 1)).headers["woodfrog-call"] for _ in range(3)]
    await asyncio.gather(*(daemon.controller.calls[c].done.wait() for c in spawned))
    daemon.controller.tidy()
    assert len(daemon.spooled()) == 6  # a client that lost its connection may ask again
    monkeypatch.setattr("woodfrog.daemon.controller._FETCHED_S", -1.0)
    daemon.controller.tidy()
    assert daemon.spooled() == sorted(f"{c}.out" for c in spawned)
    gone = await daemon.http.get(f"/calls/{fetched[0]}")
    assert gone.status_code == 404 and "WOODFROG_KEEP_RESULTS_MIB" in error_of(gone)["message"]
    # With little room they go below the limit, too; what nobody has fetched stays.
    daemon.controller.settings = daemon.settings
    assert len((await daemon.http.get(f"/calls/{spawned[0]}")).content) > 600 << 10
    monkeypatch.setattr("woodfrog.daemon.controller._LITTLE_ROOM", 1 << 60)
    daemon.controller.tidy()
    assert daemon.spooled() == sorted(f"{c}.out" for c in spawned[1:])


async def test_results_are_listed_and_removed_by_hand(daemon: Daemon) -> None:
    async def listed(**params: Any) -> dict[str, tuple[int, int]]:
        answer = (await daemon.http.get("/results", params=params)).json()
        assert answer["limit_bytes"] == 4 << 30 and answer["keep_s"] == 7 * 86400
        return {r["app"]: (r["results"], r["fetched"]) for r in answer["apps"]}

    gates.clear()
    daemon.backend.functions = {**FUNCTIONS, "big": lambda: "x" * (1 << 20)}
    await daemon.deploy(function("big"), function("square"), function("wait"))
    await daemon.deploy(function("square"), app="other")
    assert await daemon.call("square", 2) == 4 and await daemon.call("square", 3, app="other") == 9
    big = (await daemon.submit("big")).headers["woodfrog-call"]
    running = (await daemon.submit("wait")).headers["woodfrog-call"]
    while daemon.controller.calls[big].outcome is None:
        await asyncio.sleep(0.01)
    assert await listed() == {"demo": (2, 1), "other": (1, 1)}
    for ask in (daemon.http.get, daemon.http.delete):
        unknown = await ask("/results", params={"app": "nope"})
        assert unknown.status_code == 404 and error_of(unknown)["message"] == "no app 'nope' was ever deployed here"
    assert await listed(app="other") == {"other": (1, 1)} and await listed(before=1.0) == {}
    assert error_of(await daemon.http.delete("/results"))["code"] == "bad-request"
    assert (await daemon.http.delete("/results", params={"before": 1.0})).json() == {"deleted": 0, "bytes": 0}
    gone = (await daemon.http.delete("/results", params={"app": "demo"})).json()
    assert gone["deleted"] == 2 and gone["bytes"] > 1 << 20 and daemon.spooled() == []
    assert daemon.journal.kept < 4096 and await listed() == {"other": (1, 1)}
    assert (await daemon.http.get(f"/calls/{big}")).status_code == 404
    assert (await daemon.http.get(f"/calls/{running}")).status_code == 202  # what is not over stays
    gates["gate"].set()
    gone = (await daemon.http.delete("/results", params={"before": time.time() + 60})).json()
    assert gone["deleted"] >= 1 and "other" not in await listed()


async def test_the_same_call_id_is_the_same_call(daemon: Daemon) -> None:
    ran: list[int] = []
    daemon.backend.functions = {**FUNCTIONS, "square": lambda x: ran.append(x) or x * x}
    await daemon.deploy(function("square"))
    call = uuid.uuid4().hex
    answers = await asyncio.gather(*(daemon.submit("square", 5, wait=10, Woodfrog_Call=call) for _ in range(5)))
    answers.append(await daemon.submit("square", 5, wait=10, Woodfrog_Call=call))
    daemon.controller.calls.clear()  # tidied: only the journal knows it
    answers.append(await daemon.submit("square", 5, Woodfrog_Call=call))
    assert [pickle.loads(a.content) for a in answers] == [25] * 7 and ran == [5]
    assert {a.headers["woodfrog-call"] for a in answers} == {call}


@pytest.mark.parametrize("call", ["../../etc/passwd", "a" * 65, "a.b", " ", "%00"])
async def test_bad_call_ids(daemon: Daemon, call: str) -> None:
    await daemon.deploy(function("square"))
    answer = await daemon.submit("square", 5, Woodfrog_Call=call)
    assert answer.status_code == 400 and error_of(answer)["code"] == "bad-request"


async def test_what_is_not_there(daemon: Daemon) -> None:
    await daemon.deploy(function("square"), function("Model", "run", "load", kind="class"))
    for path, words in (
        ("/apps/other/calls/square", "no app 'other' is deployed; deployed: demo"),
        ("/apps/demo/calls/cube", "no function 'cube'; it has: square, Model"),
        ("/apps/demo/calls/Model", "name one of its methods (run, load)"),
        ("/apps/demo/calls/Model.walk", "no method 'walk'; it has: run, load"),
    ):
        answer = await daemon.http.post(path, content=b"x" * (5 << 20))
        assert answer.status_code == 404 and words in error_of(answer)["message"]
    spec = AppSpec("part", RUNTIME, (function("square"),), left_out=(LeftOut("web", "no web (a.py:3)"),))
    spec = replace(spec, left_out=(*spec.left_out, LeftOut("square.m", "no m")))
    assert (await daemon.http.post("/apps/part/deploy", json={"spec": to_dict(spec)})).status_code == 200
    assert (await daemon.http.get("/apps/part")).json()["left_out"] == to_dict(spec.left_out)
    assert (await daemon.http.get("/apps")).json()["apps"][1]["left_out"] == to_dict(spec.left_out)
    assert [e["line"] for e in await log_of(daemon, "part")][1:] == [
        "web is left out: no web (a.py:3)",
        "square.m is left out: no m",
    ]
    for tag, words in (("web", "web is left out of app 'part': no web (a.py:3)"), ("square.m", "square.m is left out")):
        answer = await daemon.submit(tag, app="part")
        assert answer.status_code == 404 and words in error_of(answer)["message"]
        assert error_of(answer)["code"] == "left-out"
    assert (await daemon.submit("square", 3, app="part")).status_code == 202
    for tag in ("square", "square.square"):
        spec = replace(spec, functions=(function("other"),), left_out=(LeftOut(tag, "no more (a.py:3)"),))
        refused = await daemon.http.post("/apps/part/deploy", json={"spec": to_dict(spec)})
        assert refused.status_code == 400 and error_of(refused)["code"] == "left-out"
        assert (
            f"{tag} is served by version 1 of app 'part', and would be left out: no more"
            in error_of(refused)["message"]
        )
    assert (await daemon.http.get("/apps/part")).json()["functions"][0]["tag"] == "square"
    for path in (
        "/calls/none",
        "/calls/none/items",
        "/calls/none/trace",
        "/containers/none",
        "/snapshots/none",
        "/apps/other",
        "/apps/other/history",
        "/apps/other/logs",
    ):
        answer = await daemon.http.get(path)
        assert answer.status_code == 404 and error_of(answer)["code"] == "not-found", path
    for path in ("/calls/none/cancel", "/apps/other/stop", "/containers/none/stop", "/snapshots/none/invalidate"):
        answer = await daemon.http.post(path)
        assert answer.status_code == 404, path
    assert daemon.spooled() == []  # refused bodies are not kept


async def test_cancel(daemon: Daemon) -> None:
    await daemon.deploy(function("wait", scaling=ScalingPolicy(max_containers=1)))
    running = (await daemon.submit("wait")).headers["woodfrog-call"]
    queued = (await daemon.submit("wait")).headers["woodfrog-call"]
    await asyncio.sleep(0.02)
    for call in (queued, running):
        await daemon.http.post(f"/calls/{call}/cancel")
        answer = await daemon.http.get(f"/calls/{call}", params={"wait": 5})
        assert answer.headers["woodfrog-status"] == "cancelled" and error_of(answer)["code"] == "cancelled"
        again = await daemon.http.post(f"/calls/{call}/cancel")
        assert again.json()["finished"] == "cancelled"
    gates["gate"].set()
    assert await daemon.call("wait") == "through"  # on another instance
    assert len(daemon.backend.started) == 2


async def test_a_call_cancelled_before_it_began_is_not_run(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    await daemon.deploy(function("add"))
    call = (await daemon.submit("add", 1, 2, wait=5)).headers["woodfrog-call"]
    (instance,) = daemon.controller.instances
    run: list[object] = []

    async def record(*arguments: object) -> None:
        run.append(arguments)

    monkeypatch.setattr(daemon.backend, "call", record)
    await daemon.controller._run_call(RunCall(call_id=call, instance_id=instance))
    assert run == []


async def test_generators(daemon: Daemon) -> None:
    await daemon.deploy(function("count"))
    for args, last in (((450,), b"d"), ((3, True), b"e"), ((0,), b"d")):
        call = (await daemon.submit("count", *args)).headers["woodfrog-call"]
        items: list[tuple[bytes, bytes]] = []
        while not items or items[-1][0] == b"i":
            answer = await daemon.http.get(f"/calls/{call}/items", params={"after": len(items), "wait": 10})
            items += unpack_items(answer.content)
        assert [pickle.loads(body) for _, body in items[:-1]] == list(range(args[0]))
        assert items[-1][0] == last
    daemon.faulty.calls.append("crashes")
    call = (await daemon.submit("count", 5)).headers["woodfrog-call"]
    answer = await daemon.http.get(f"/calls/{call}/items", params={"wait": 10})
    ((kind, body),) = unpack_items(answer.content)
    assert kind == b"f" and isinstance(error_from_answer(json.loads(body), ""), InstanceCrashed)


async def test_empty_items_that_nobody_reads_are_not_kept_without_end(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("woodfrog.daemon.controller._ITEM_LIMIT", 64 << 10)
    made: list[int] = []

    def count() -> Iterator[bytes]:
        for i in range(5000):
            made.append(i)
            yield b""

    daemon.backend.functions = {**FUNCTIONS, "count": count}
    await daemon.deploy(function("count"))
    call = (await daemon.submit("count")).headers["woodfrog-call"]
    record = daemon.controller.calls[call]
    while record.unread <= 64 << 10:
        await asyncio.sleep(0.001)
    assert len(record.items) < 500 and not record.done.is_set()
    taken = 0
    while not record.done.is_set():  # it goes on as they are read
        answer = await daemon.http.get(f"/calls/{call}/items", params={"after": taken, "wait": 5})
        taken += len(list(unpack_items(answer.content)))
    assert len(made) == 5000 and record.unread <= 64 << 10


async def test_a_generator_that_is_left_early_is_closed_and_its_container_serves_on(daemon: Daemon) -> None:
    """Items that nobody wants any more do not keep it from its end; what its `finally` raises is in the log."""
    ended: list[int] = []

    def count(n: int) -> Iterator[Any]:
        try:
            for i in itertools.count():
                yield i, b"x" * (5 << 20)
        finally:
            ended.append(n)
            if n == 2:
                raise ValueError("at the end")

    daemon.backend.functions = {**FUNCTIONS, "count": count}
    await daemon.deploy(function("count", scaling=ScalingPolicy(max_containers=1)))
    for n in (1, 2, 3):
        call = (await daemon.submit("count", n)).headers["woodfrog-call"]
        record = daemon.controller.calls[call]
        while record.unread < 64 << 20 and n > 1:  # from there on it waits for its reader
            await asyncio.sleep(0.01)
        await daemon.http.post(f"/calls/{call}/cancel")
        assert record.outcome == "cancelled"
        while len(ended) < n - 1 or any(i.call_id for i in daemon.controller.instances.values()):
            await asyncio.sleep(0.01)
    assert [n for n in ended if n > 1] == [2, 3]
    assert len(daemon.backend.started) == 1 and not daemon.backend.stopped
    told = [line["line"] for line in await log_of(daemon) if line["line"].startswith("call ")]
    assert len(told) == 1 and told[0].endswith("count: ValueError: at the end; raised after the call was over")
    daemon.controller.calls.clear()
    assert len(daemon.spooled()) == 0


@pytest.mark.parametrize(
    ("read", "after", "kept"),
    [
        ("all", 50, True),
        ("all", 70, False),
        ("none", 250, True),
        ("none", 310, False),
        ("some", 3500, True),
        ("some", 3700, False),
        ("cancelled", 70, False),
    ],
)
async def test_items_are_kept_for_who_may_still_read_them(daemon: Daemon, read: str, after: int, kept: bool) -> None:
    def count(n: int) -> Iterator[Any]:
        yield b"x" * (5 << 20)  # on disk
        yield from range(1, n)

    daemon.backend.functions = {**FUNCTIONS, "count": count}
    await daemon.deploy(function("count"))
    call = (await daemon.submit("count", 450)).headers["woodfrog-call"]
    record = daemon.controller.calls[call]
    if read == "cancelled":
        while not record.items:
            await asyncio.sleep(0)
        await daemon.http.post(f"/calls/{call}/cancel")
    await asyncio.wait_for(record.done.wait(), 10)
    got = {"all": 400, "some": 200}.get(read, 0)
    if got:
        await daemon.http.get(f"/calls/{call}/items", params={"after": got})
        assert len(record.items) == 450 - got and record.count == 450
        again = await daemon.http.get(f"/calls/{call}/items", params={"after": got - 1})
        assert error_of(again)["code"] == "expired"
    for name in ("submitted", "finished", "asked", "closed"):
        if getattr(record, name) is not None:
            setattr(record, name, getattr(record, name) - after)
    daemon.controller.tidy()
    assert (call in daemon.controller.calls) is kept
    if not kept:
        assert not record.items and daemon.spooled() == []


@pytest.mark.parametrize("left", [None, 0])
async def test_a_call_whose_arguments_a_power_loss_took(daemon: Daemon, left: int | None) -> None:
    daemon.backend.functions = {**FUNCTIONS, "wait": wait_for_gate}
    await daemon.deploy(function("wait"))
    call = (await daemon.submit("wait", BIG)).headers["woodfrog-call"]
    await daemon.close()
    path = daemon.settings.home / "calls" / f"{call}.in"
    path.unlink() if left is None else os.truncate(path, left)
    again = Daemon(daemon.settings.home)
    answer = await again.http.get(f"/calls/{call}")
    assert answer.headers["woodfrog-status"] == "failure" and error_of(answer)["code"] == "payload-gone"
    assert "call it again" in error_of(answer)["message"]
    await again.close()
    daemon.__dict__.update(Daemon(daemon.settings.home).__dict__)


async def test_a_generator_whose_items_are_gone_says_so(daemon: Daemon) -> None:
    await daemon.deploy(function("count"))
    call = (await daemon.submit("count", 5, wait=10)).headers["woodfrog-call"]
    await daemon.close()
    again = Daemon(daemon.settings.home, FaultyBackend)
    items = list(unpack_items((await again.http.get(f"/calls/{call}/items")).content))
    assert items[-1][0] == b"f" and isinstance(error_from_answer(json.loads(items[-1][1]), ""), OutputExpired)
    await again.close()
    daemon.__dict__.update(Daemon(daemon.settings.home).__dict__)


@pytest.mark.parametrize("read", [True, False])
async def test_a_generator_is_not_pieced_together_from_two_daemons_runs(
    daemon: Daemon, read: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has items of a run that its daemon did not end hears that it failed; who has none gets all of another run."""
    monkeypatch.setattr(controller_module, "_ITEM_LIMIT", 1)  # it waits for its reader after each item
    await daemon.deploy(function("count"))
    call = (await daemon.submit("count", 4)).headers["woodfrog-call"]
    items: list[tuple[bytes, bytes]] = []
    while len(items) < 2 * read:
        answer = await daemon.http.get(f"/calls/{call}/items", params={"after": len(items), "wait": 10})
        items += unpack_items(answer.content)
    await daemon.die()
    again = Daemon(daemon.settings.home)
    while not items or items[-1][0] == b"i":
        answer = await again.http.get(f"/calls/{call}/items", params={"after": len(items), "wait": 10})
        items += unpack_items(answer.content)
    if read:
        assert [kind for kind, _ in items[:2]] == [b"i", b"i"] and items[2:] == [items[-1]]
        error = error_from_answer(json.loads(items[-1][1]), "")
        assert isinstance(error, InstanceCrashed) and "after 2 items" in error.message
        assert (await again.http.get(f"/calls/{call}", params={"wait": 10})).headers["woodfrog-status"] == "failure"
    else:
        assert [kind for kind, _ in items] == [b"i"] * 4 + [b"d"]
    await again.close()
    daemon.__dict__.update(Daemon(daemon.settings.home).__dict__)


async def test_no_more_containers_than_the_machine_may_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "Settings", partial(Settings, max_containers=2))
    daemon = Daemon(tmp_path)
    gates.clear()
    await daemon.deploy(function("wait"))
    calls = [(await daemon.submit("wait")).headers["woodfrog-call"] for _ in range(5)]
    gates.setdefault("gate", asyncio.Event()).set()
    for call in calls:
        assert (await daemon.http.get(f"/calls/{call}", params={"wait": 10})).headers["woodfrog-status"] == "success"
    assert len(daemon.backend.started) == 2
    await daemon.close()


async def test_constructor_parameters_have_instances_of_their_own(daemon: Daemon) -> None:
    await daemon.deploy(function("Model", "square", kind="class"))
    params = [pickle.dumps(((n,), {})) for n in range(2)]
    for param in (params[0], params[1], params[0]):
        header = base64.b64encode(param).decode()
        assert await daemon.call("Model.square", 2, Woodfrog_Params=header) == 4
    started = daemon.backend.started
    assert [r.params for r in started] == params
    assert [r.params_digest for r in started] == [hashlib.sha256(p).hexdigest() for p in params]
    answer = await daemon.submit("Model.square", 2, Woodfrog_Params="no base64!")
    assert answer.status_code == 400


async def test_payload_over_the_limit(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_module, "_MAX_BODY", 5 << 20)
    await daemon.deploy(function("length"))
    answer = await daemon.submit("length", BIG)
    assert answer.status_code == 400 and error_of(answer)["code"] == "too-large"
    assert daemon.spooled() == []


# Instances that break


async def test_crash_in_a_call(daemon: Daemon) -> None:
    await daemon.deploy(function("square"))
    daemon.faulty.calls.append("crashes")
    error = await daemon.failure("square", 2)
    assert error.code == "crashed" and "SIGKILL" in error.message
    assert await daemon.call("square", 2) == 4


async def test_retries(daemon: Daemon) -> None:
    await daemon.deploy(function("square", retries=RetryPolicy(2, initial_delay=0.0)))
    daemon.faulty.calls.extend(["crashes", "crashes"])
    assert await daemon.call("square", 2) == 4
    assert len(daemon.backend.started) == 3


async def test_timeout(daemon: Daemon) -> None:
    await daemon.deploy(function("wait", timeout=0.05))
    error = await daemon.failure("wait")
    assert error.code == "timeout" and "0.05 s" in error.message


async def test_a_backend_that_breaks_in_a_call_fails_the_call(daemon: Daemon) -> None:
    """Whatever it raises: the caller is told, and soon."""
    await daemon.deploy(function("square"))
    daemon.faulty.calls.append("breaks")
    answer = await daemon.submit("square", 2, wait=2)
    assert answer.headers["woodfrog-status"] == "failure"
    assert await daemon.call("square", 2) == 4


@pytest.mark.parametrize("plan", ["fails", "crashes", "refuses"])
async def test_start_that_fails_is_tried_again(daemon: Daemon, plan: str) -> None:
    await daemon.deploy(function("square"))
    daemon.faulty.starts.append(plan)
    assert await daemon.call("square", 2) == 4


async def test_user_s_fault_in_a_start(daemon: Daemon) -> None:
    """The text holds half a surrogate pair, as file names do."""
    await daemon.deploy(function("square"))
    daemon.faulty.starts.append("user-fault")
    answer = await daemon.submit("square", 2, wait=5)
    assert answer.status_code == 200 and "import failed" in error_of(answer)["message"]
    lines = (await daemon.http.get("/apps/demo/logs")).text
    assert "Traceback: caf" in lines


async def test_secret_that_went_does_not_hang_the_start(daemon: Daemon) -> None:
    home = daemon.settings.home
    secret = SecretSpec(name="token", required_keys=("TOKEN",))
    assert (await daemon.http.put("/secrets/token", json={"TOKEN": "1"})).status_code == 200
    await daemon.deploy(function("square", secrets=(secret,)))
    assert (await daemon.http.put("/secrets/token", json={"OTHER": "1"})).status_code == 200
    answer = await daemon.submit("square", 2, wait=2)
    assert answer.headers["woodfrog-status"] == "failure" and "TOKEN" in answer.text
    assert (await daemon.http.put("/secrets/token", json={"TOKEN": "2"})).status_code == 200
    assert await daemon.call("square", 2) == 4
    assert daemon.backend.started[-1].env["TOKEN"] == "2"
    assert (home / "secrets" / "token.json").stat().st_mode & 0o777 == 0o600


async def test_a_secret_that_a_function_names_is_removed_by_force_only(daemon: Daemon) -> None:
    await daemon.http.put("/secrets/token", json={"TOKEN": "1"})
    await daemon.deploy(function("square", secrets=(SecretSpec("token"),)))
    refused = await daemon.http.delete("/secrets/token")
    assert (refused.status_code, error_of(refused)["code"]) == (400, "secret-in-use")
    assert "named by demo.square: " in error_of(refused)["message"]
    assert (await daemon.http.get("/secrets")).json() == {"secrets": ["token"]}
    assert (await daemon.http.delete("/secrets/token?force=1")).json() == {"name": "token", "deleted": True}
    assert await daemon.call("square", 2) == 4 and "TOKEN" not in daemon.backend.started[-1].env
    await daemon.http.post("/apps/demo/stop")
    missing = await daemon.http.delete("/secrets/token")
    assert missing.status_code == 404 and "woodfrog secret list" in error_of(missing)["message"]
    assert (await daemon.http.delete("/secrets/..")).status_code in (400, 404)


# Snapshots

FROZEN = SnapshotPolicy(enabled=True)


async def test_packages_that_came_after_a_snapshot_are_named(
    daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site-packages"
    site.mkdir()
    monkeypatch.setitem(globals(), "RUNTIME", replace(RUNTIME, sys_path=(str(site),)))
    spec = function("square", snapshot=FROZEN, scaling=ScalingPolicy(single_use=True))

    async def said() -> list[str]:
        return [line["line"].partition(". ")[0] for line in await log_of(daemon) if "installed" in line["line"]]

    await daemon.deploy(spec)
    for _ in range(2):
        await daemon.call("square", 2)
        await settle()
    assert daemon.backend.started[-1].mode == "restore" and await said() == []
    (site / "torch-3.0.dist-info").mkdir()
    os.utime(site / "torch-3.0.dist-info", (time.time() + 60,) * 2)
    os.utime(site, (time.time() + 60,) * 2)
    for _ in range(3):
        await daemon.call("square", 2)
        await settle()
    assert await said() == ["installed since its snapshot was made: torch 3.0"]


async def settle() -> None:
    await asyncio.sleep(0.03)


async def test_capture_then_thaw(daemon: Daemon) -> None:
    await daemon.deploy(function("square", snapshot=FROZEN, scaling=ScalingPolicy(single_use=True)))
    for _ in range(3):
        assert await daemon.call("square", 2) == 4
        await settle()
    modes = [(r.mode, r.capture, r.snapshot_id) for r in daemon.backend.started]
    assert modes == [("cold", True, None), ("restore", False, "s-1"), ("restore", False, "s-1")]


async def test_snapshot_of_an_earlier_daemon_is_thawed_at_once(daemon: Daemon) -> None:
    """Also when the deploy itself starts instances."""
    spec = function("square", snapshot=FROZEN, scaling=ScalingPolicy(min_containers=1))
    key = (await daemon.deploy(function("square", snapshot=FROZEN)))["functions"][0]["key"]
    daemon.backend.store(key, "s-old")
    assert (await daemon.deploy(spec))["functions"][0]["key"] == key
    await settle()
    assert [(r.mode, r.snapshot_id) for r in daemon.backend.started] == [("restore", "s-old")]


@pytest.mark.parametrize("plan", ["fails", "at-fault", "crashes"])
async def test_thaw_that_fails_becomes_a_cold_start(daemon: Daemon, plan: str) -> None:
    spec = function("square", snapshot=FROZEN, scaling=ScalingPolicy(single_use=True))
    await daemon.deploy(spec)
    assert await daemon.call("square", 2) == 4
    await settle()
    daemon.faulty.thaws.append(plan)
    assert await daemon.call("square", 2) == 4
    assert [r.mode for r in daemon.backend.started] == ["cold", "restore", "cold"]
    assert bool(daemon.catalogue.retired("s-1")) == (plan == "at-fault")


@pytest.mark.parametrize("plan", ["fails-alive", "late", "fails-dead", "crashes"])
async def test_capture_that_fails_costs_no_call(daemon: Daemon, plan: str) -> None:
    await daemon.deploy(function("square", snapshot=FROZEN))
    daemon.faulty.freezes.append(plan)
    assert await daemon.call("square", 2) == 4
    await settle()
    assert await daemon.call("square", 2) == 4
    assert len(daemon.backend.started) == (1 if plan in ("fails-alive", "late") else 2)


async def test_after_failed_captures_it_is_not_tried_for_ever(daemon: Daemon) -> None:
    single = ScalingPolicy(single_use=True)
    await daemon.deploy(function("square", snapshot=FROZEN, scaling=single))
    daemon.faulty.freezes.extend(["fails-alive"] * 10)
    for _ in range(5):
        assert await daemon.call("square", 2) == 4
        await settle()
    assert [r.capture for r in daemon.backend.started] == [True, True, True, False, False]
    assert (await daemon.http.post("/snapshots/create", json={"app": "demo", "tag": "square"})).status_code == 200
    await settle()
    assert daemon.backend.started[-1].capture  # asked for by hand


async def test_a_snapshot_is_wanted_while_a_function_of_its_key_is_deployed(daemon: Daemon) -> None:
    frozen = function("square", snapshot=FROZEN)
    await daemon.deploy(frozen, function("plain"))
    runtime = daemon.controller.app("demo")[1].runtime
    thaws = daemon.controller.thaws
    assert thaws(function_key(frozen, runtime, ""), "square", "")
    assert thaws(function_key(frozen, runtime, "digest"), "square", "digest")
    assert not thaws(function_key(frozen, runtime, ""), "square", "digest")
    assert not thaws(function_key(function("plain"), runtime, ""), "plain", ""), "it takes no snapshots"
    assert not thaws(function_key(frozen, runtime, ""), "other", "")
    daemon.controller.stop_app("demo")
    assert not thaws(function_key(frozen, runtime, ""), "square", "")


async def test_snapshot_is_removed_when_its_last_instance_is_gone(daemon: Daemon) -> None:
    await daemon.deploy(function("square", snapshot=FROZEN, scaling=ScalingPolicy(single_use=True)), function("wait"))
    assert await daemon.call("square", 2) == 4
    await settle()
    await daemon.deploy(function("square", snapshot=FROZEN))
    assert await daemon.call("square", 2) == 4
    ((name, instance),) = daemon.backend.instances.items()
    assert instance.request.snapshot_id == "s-1"
    gone = await daemon.http.post("/snapshots/s-1/invalidate")
    assert gone.json() == {"snapshot": "s-1", "removed": False}
    (row,) = (await daemon.http.get("/snapshots")).json()["snapshots"]
    assert row["state"] == "retired"
    await daemon.http.post(f"/containers/{name}/stop")
    await settle()
    assert daemon.catalogue.manifests() == []


async def test_eager_capture(daemon: Daemon) -> None:
    await daemon.deploy(function("square", snapshot=FROZEN), snapshot=True)
    while not daemon.catalogue.manifests():  # its commit waits for the disk
        await settle()
    assert [r.capture for r in daemon.backend.started] == [True]
    answer = await daemon.http.post("/snapshots/create", json={"app": "demo", "tag": "nope"})
    assert answer.status_code == 404


# Apps


async def test_second_version_while_the_first_runs(daemon: Daemon) -> None:
    await daemon.deploy(function("wait"), function("square"))
    old = (await daemon.submit("wait", "old")).headers["woodfrog-call"]
    await settle()
    daemon.backend.functions = {**FUNCTIONS, "square": lambda x: "new"}
    second = await daemon.deploy(function("square", env={"V": "2"}))
    assert second["version"] == 2
    assert await daemon.call("square", 3) == "new"
    assert (await daemon.submit("wait")).status_code == 404
    assert (await daemon.http.get(f"/calls/{old}")).status_code == 202
    gates["old"].set()
    assert pickle.loads((await daemon.http.get(f"/calls/{old}", params={"wait": 5})).content) == "through"
    await settle()
    assert [i.request.spec.tag for i in daemon.backend.instances.values()] == ["square"]
    history = (await daemon.http.get("/apps/demo/history")).json()["versions"]
    assert [(v["version"], v["active"]) for v in history] == [(1, False), (2, True)]


async def test_the_old_version_serves_until_the_new_one_is_ready_also_past_a_restart(tmp_path: Path) -> None:
    gates.clear()
    kept = {"scaling": ScalingPolicy(min_containers=1)}
    first = Daemon(tmp_path, FaultyBackend)
    await first.deploy(function("square", **kept), function("wait", **kept))
    await settle()
    first.faulty.starts.extend(["user-fault"] * 2)
    await first.deploy(function("square", env={"V": "2"}, **kept), function("wait", env={"V": "2"}, **kept))
    assert await first.call("square", 3) == 9
    call = (await first.submit("wait")).headers["woodfrog-call"]
    await settle()
    assert {i.request.spec.env.get("V") for i in first.backend.instances.values()} == {None}
    rows = (await first.http.get("/apps/demo/calls")).json()["calls"]
    assert [(r["function"], r["status"], r["version"]) for r in rows] == [
        ("wait", "running", 1),
        ("square", "success", 1),
    ]
    assert first.journal.recent(5)[1].version == 1
    lines = (await first.http.get("/apps/demo/logs")).text
    assert "version 1 serves until version 2 starts" in lines
    await first.die()

    second = Daemon(tmp_path)
    gates["gate"].set()
    assert pickle.loads((await second.http.get(f"/calls/{call}", params={"wait": 5})).content) == "through"
    assert {r.spec.env.get("V") for r in second.backend.started} == {"2"}, "its call is the new version's"
    rows = (await second.http.get("/apps/demo/calls")).json()["calls"]
    assert [r["version"] for r in rows] == [2, 1]
    await second.close()


async def test_a_version_that_cannot_start_has_its_elder_past_a_restart(tmp_path: Path) -> None:
    """The code before serves again, also from nothing, and what it served is known until the new code starts."""

    def env(daemon: Daemon) -> list[str | None]:
        return [r.spec.env.get("V") for r in daemon.backend.started]

    gates.clear()
    kept = {"scaling": ScalingPolicy(min_containers=1)}
    first = Daemon(tmp_path, FaultyBackend)
    await first.deploy(function("square", env={"V": "1"}, **kept))
    await settle()
    first.faulty.starts.append("user-fault")
    await first.deploy(function("square", env={"V": "2"}, **kept))
    await settle()
    assert first.journal.elders() == {("demo", "square", ""): 1}
    await first.die()

    second = Daemon(tmp_path, FaultyBackend)
    second.faulty.starts.append("user-fault")
    assert await second.call("square", 3) == 9
    assert env(second)[:2] == ["2", "1"], "the new code is tried first"
    assert "version 1 serves until version 2 starts" in (await second.http.get("/apps/demo/logs")).text
    await second.die()

    third = Daemon(tmp_path, FaultyBackend)  # it starts now
    assert await third.call("square", 3) == 9
    assert set(env(third)) == {"2"} and third.journal.elders() == {}
    assert set(third.controller.state.services) == {"demo/square@2"}
    third.faulty.starts.append("user-fault")
    await third.deploy(function("square", env={"V": "3"}, **kept))
    await settle()
    assert third.journal.elders() == {("demo", "square", ""): 2}
    third.controller.stop_app("demo")
    assert third.journal.elders() == {} == third.controller._elders
    await third.close()


async def test_where_neither_the_new_nor_the_old_version_starts_after_a_restart_calls_are_told(tmp_path: Path) -> None:
    kept = {"scaling": ScalingPolicy(min_containers=1)}
    first = Daemon(tmp_path, FaultyBackend)
    await first.deploy(function("square", env={"V": "1"}, **kept))
    await settle()
    first.faulty.starts.append("user-fault")
    await first.deploy(function("square", env={"V": "2"}, **kept))
    await settle()
    await first.die()
    second = Daemon(tmp_path, FaultyBackend)
    second.faulty.starts.extend(["user-fault"] * 9)
    assert (await second.failure("square", 3)).code == "startup"
    assert second.journal.elders() == {}
    assert set(second.controller.state.services) == {"demo/square@2"}
    await second.close()


async def test_an_app_that_this_version_cannot_read_keeps_its_calls(tmp_path: Path) -> None:
    """After a downgrade: nothing is lost, and who asks is told. The newer version goes on."""
    gates.clear()
    newer = Daemon(tmp_path)
    await newer.deploy(function("wait"))
    await newer.deploy(function("square"), app="other")
    call = (await newer.submit("wait")).headers["woodfrog-call"]
    await newer.die()
    with sqlite3.connect(tmp_path / "journal.sqlite") as db:
        (spec,) = db.execute("SELECT spec FROM deploys WHERE app = 'demo'").fetchone()

    def rewrite(text: str) -> None:
        with sqlite3.connect(tmp_path / "journal.sqlite") as db:
            db.execute("UPDATE deploys SET spec = ? WHERE app = 'demo'", (text,))

    rewrite(json.dumps({**json.loads(spec), "of_a_later_version": 1}))
    older = Daemon(tmp_path)
    assert await older.call("square", 2, app="other") == 4
    for answer in (await older.http.get(f"/calls/{call}"), await older.submit("wait")):
        assert error_of(answer)["code"] == "app-unreadable" and "'of_a_later_version'" in error_of(answer)["message"]
    await older.die()
    rewrite(spec)
    gates["gate"] = asyncio.Event()
    gates["gate"].set()
    again = Daemon(tmp_path)
    assert pickle.loads((await again.http.get(f"/calls/{call}", params={"wait": 5})).content) == "through"
    await again.die()

    rewrite(json.dumps({**json.loads(spec), "of_a_later_version": 1}))
    older = Daemon(tmp_path)
    await older.deploy(function("square"))
    assert await older.call("square", 2) == 4, "it was deployed anew"
    await older.close()


async def test_snapshots_that_nothing_would_thaw_go_after_a_while(daemon: Daemon) -> None:
    """Else those of apps that were stopped or changed, and of kernels that were, would stay for good."""
    spec = function("square", snapshot=FROZEN)
    key = (await daemon.deploy(spec))["functions"][0]["key"]
    daemon.backend.store(key, "s-0", tag="square", created=1.0)
    daemon.backend.store(key, "s-1", tag="square", created=1.0, worker_class="an older kernel")
    daemon.backend.store("code before", "s-2", tag="square", created=1.0)

    def there() -> list[str]:
        daemon.controller._unused_due = 0.0
        daemon.controller.tidy()
        return sorted(m.id for m in daemon.catalogue.manifests())

    daemon.controller.settings = replace(daemon.settings, keep_unused_s=0.0)
    assert len(there()) == 3, "for good"
    daemon.controller.settings = replace(daemon.settings, keep_unused_s=60.0)
    daemon.catalogue.used("s-2")
    assert there() == ["s-0", "s-2"], "the kernel is another"
    os.utime(daemon.catalogue.path("s-2") / "used", (1.0, 1.0))
    assert there() == ["s-0"], "the code is another"
    await daemon.http.post("/apps/demo/stop")
    assert there() == []


async def test_rollback(daemon: Daemon) -> None:
    await daemon.deploy(function("square"))
    assert error_of(await daemon.http.post("/apps/demo/rollback", json={}))["message"].endswith("no version before 1")
    await daemon.deploy(function("fail"))
    answer = (await daemon.http.post("/apps/demo/rollback", json={})).json()
    assert (answer["version"], answer["rollback"]) == (3, 1)
    assert await daemon.call("square", 3) == 9
    history = (await daemon.http.get("/apps/demo/history")).json()["versions"]
    assert [(v["version"], v["active"], v["rollback"]) for v in history] == [
        (1, False, None),
        (2, False, None),
        (3, True, 1),
    ]
    for body, words in (
        ({"version": 3}, "is the active one"),
        ({"version": 9}, "was in: 1, 2, 3"),
        ({"version": "1"}, "is a number"),
    ):
        assert words in error_of(await daemon.http.post("/apps/demo/rollback", json=body))["message"]
    assert (await daemon.http.post("/apps/other/rollback", json={})).status_code == 404


async def test_what_came_of_a_snapshot_that_was_asked_for(daemon: Daemon) -> None:
    async def capture() -> dict[str, Any]:
        [found] = (await daemon.http.get("/apps/demo")).json()["functions"]
        return dict(found["capture"])

    daemon.faulty.starts.append("slow")
    await daemon.deploy(function("square", snapshot=FROZEN), snapshot=True)
    assert (await capture())["pending"] is True
    while (await capture())["pending"]:
        await asyncio.sleep(0.02)
    assert (await capture())["snapshot"]
    daemon.faulty.starts.append("user-fault")
    await daemon.deploy(function("square", snapshot=FROZEN, env={"V": "2"}), snapshot=True)
    await settle()
    assert await capture() == {"pending": False, "snapshot": None, "reason": "import failed: ImportError: nope"}


async def test_how_it_stands_with_the_containers_that_are_to_be_warm(daemon: Daemon) -> None:
    async def warm() -> tuple[int, int, str]:
        [found] = (await daemon.http.get("/apps/demo")).json()["functions"]
        return found["warm"]["wanted"], found["warm"]["ready"], found["warm"]["reason"]

    daemon.faulty.starts.append("slow")
    two = ScalingPolicy(min_containers=2)
    await daemon.deploy(function("square", scaling=two))
    assert (await warm())[1] < 2
    while (await warm())[1] < 2:
        await asyncio.sleep(0.02)
    assert await warm() == (2, 2, "")
    daemon.faulty.starts.extend(["user-fault"] * 2)
    await daemon.deploy(function("square", scaling=two, env={"V": "2"}))
    while not (await warm())[2]:
        await asyncio.sleep(0.02)
    assert (await warm())[2] == "import failed: ImportError: nope"
    await daemon.deploy(function("square"))
    assert await warm() == (0, 0, "")


async def test_a_call_that_outlasts_the_daemon_s_stop_is_told_so(tmp_path: Path) -> None:
    gates.clear()
    daemon = Daemon(tmp_path)
    await daemon.deploy(function("wait"), function("count", "count"))
    waiting = asyncio.ensure_future(daemon.submit("wait", wait=50))
    await settle()
    [call] = daemon.controller.calls
    items = asyncio.ensure_future(daemon.http.get(f"/calls/{call}/items", params={"wait": 50}))
    await settle()
    await daemon.controller.shutdown(grace=0.1)
    answer = await asyncio.wait_for(waiting, 5)
    assert (answer.status_code, answer.headers["woodfrog-status"]) == (202, "pending")
    answer = await asyncio.wait_for(items, 5)
    assert answer.headers["woodfrog-status"] == "pending" and list(unpack_items(answer.content)) == []
    await daemon.die()
    gates["gate"].set()
    second = Daemon(tmp_path)
    assert pickle.loads((await second.http.get(f"/calls/{call}", params={"wait": 5})).content) == "through"
    await second.close()


async def test_stopping_an_app_cancels_what_waits(daemon: Daemon) -> None:
    await daemon.deploy(function("wait", scaling=ScalingPolicy(max_containers=1)))
    calls = [(await daemon.submit("wait")).headers["woodfrog-call"] for _ in range(3)]
    await settle()
    assert (await daemon.http.post("/apps/demo/stop")).json() == {"app": "demo", "stopped": True, "cancelled": 3}
    for call in calls:
        answer = await daemon.http.get(f"/calls/{call}", params={"wait": 5})
        assert answer.headers["woodfrog-status"] == "cancelled" and "was stopped" in answer.text
    await settle()
    assert daemon.backend.instances == {}
    assert (await daemon.submit("wait")).status_code == 404
    assert (await daemon.http.get("/apps")).json() == {"apps": []}
    assert (await daemon.deploy(function("square")))["version"] == 2
    assert await daemon.call("square", 2) == 4


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (AppSpec("demo", RUNTIME, (function("a"), function("a"))), "two functions of this name"),
        (AppSpec("demo", RuntimeSpec("/no/python", "/", "/", "3"), (function("a"),)), "/no/python does not exist"),
        (AppSpec("demo", RUNTIME, (function("../a"),)), "function name"),
        (AppSpec("demo", RUNTIME, (function("a", secrets=(SecretSpec("nope"),)),)), "no secret 'nope'"),
        (AppSpec("demo", RUNTIME, (function("a", volumes=(VolumeMount("v", "/etc/x"),)),)), "is the system's"),
        (AppSpec("demo", RUNTIME, (function("a", volumes=(VolumeMount("../v", "/v"),)),)), "volume name"),
        (AppSpec("demo", RUNTIME, (function("a", volumes=(VolumeMount("v", "/v/../proc"),)),)), "is the system's"),
    ],
)
async def test_bad_deploys_change_nothing(daemon: Daemon, spec: AppSpec, words: str) -> None:
    answer = await daemon.http.post("/apps/demo/deploy", json={"spec": to_dict(spec)})
    assert answer.status_code in (400, 404) and words in error_of(answer)["message"]
    assert (await daemon.http.get("/apps")).json() == {"apps": []} and daemon.journal.deploys() == []


@pytest.mark.parametrize(
    ("method", "path", "content"),
    [
        ("POST", "/apps/demo/deploy", b"{}"),
        ("POST", "/apps/demo/deploy", b"not json"),
        ("POST", "/apps/demo/deploy", b'{"spec": {"name": "other"}}'),
        ("POST", "/apps/demo/deploy", b'{"spec": {"name": "demo", "runtime": 5}}'),
        ("PUT", "/secrets/x", b'{"A": 1}'),
        ("PUT", "/secrets/..", b"{}"),
        ("PUT", "/blobs/" + "0" * 64, b"x"),
        ("PUT", "/code/xyz", b"x"),
        ("GET", "/calls?limit=x", b""),
        ("GET", "/calls?limit=0", b""),
        ("GET", "/nowhere", b""),
        ("DELETE", "/apps", b""),
    ],
)
async def test_every_error_has_the_one_form(daemon: Daemon, method: str, path: str, content: bytes) -> None:
    answer = await daemon.http.request(method, path, content=content, headers={"Content-Type": "application/json"})
    assert 400 <= answer.status_code < 500
    error_of(answer)


async def test_secrets_are_never_shown(daemon: Daemon) -> None:
    await daemon.http.put("/secrets/token", json={"TOKEN": "hunter2"})
    inline = SecretSpec(values={"INLINE": "hunter2"})
    await daemon.deploy(function("square", secrets=(SecretSpec("token"), inline)))
    assert await daemon.call("square", 2) == 4
    assert daemon.backend.started[0].env == {"TOKEN": "hunter2", "INLINE": "hunter2"}
    for path in (
        "/secrets",
        "/apps",
        "/apps/demo",
        "/apps/demo/history",
        "/apps/demo/logs",
        "/state",
        "/calls",
        "/containers",
        "/health",
        "/snapshots",
    ):
        answer = await daemon.http.get(path)
        assert answer.status_code == 200 and "hunter2" not in answer.text, path


# Containers


async def test_health_tells_whether_the_code_is_what_runs(daemon: Daemon, tmp_path: Path) -> None:
    found = (await daemon.http.get("/health")).json()
    assert found["intact"] and found["current"]
    (tmp_path / "p/worker").mkdir(parents=True)
    (tmp_path / "p/worker/server.py").write_text("1")
    package = Package(tmp_path / "p")
    (tmp_path / "p/__pycache__").mkdir()
    (tmp_path / "p/__pycache__/x.pyc").touch()
    (tmp_path / "p/worker/.server.py.swp").touch()
    assert package.current() and package.intact
    (tmp_path / "p/worker/server.py").write_text("22")
    assert package.intact and not package.current()
    shutil.rmtree(package.path)
    assert not package.intact and not package.current()


async def test_containers(daemon: Daemon) -> None:
    await daemon.deploy(function("square"))
    await daemon.call("square", 2)
    (row,) = (await daemon.http.get("/containers")).json()["containers"]
    assert row["stage"] == "ready" and row["served"] == 1
    name = row["id"]
    assert (await daemon.http.get(f"/containers/{name}")).json()["function"] == "square"
    run = await daemon.http.post(f"/containers/{name}/exec", json={"argv": ["ls", "-l"]})
    assert run.json()["stdout"] == "ls -l"
    for body in ({}, {"argv": []}, {"argv": "ls"}, {"argv": ["ls"], "timeout": "x"}):
        assert (await daemon.http.post(f"/containers/{name}/exec", json=body)).status_code == 400, body
    assert (await daemon.http.post(f"/containers/{name}/stop")).json()["stopping"]
    await settle()
    assert (await daemon.http.get("/containers")).json() == {"containers": []}


async def test_call_in_a_container_stopped_by_hand_is_run_again(daemon: Daemon) -> None:
    await daemon.deploy(function("wait"))
    call = (await daemon.submit("wait")).headers["woodfrog-call"]
    await settle()
    (name,) = daemon.backend.instances
    await daemon.http.post(f"/containers/{name}/stop")
    await settle()
    gates["gate"].set()
    answer = await daemon.http.get(f"/calls/{call}", params={"wait": 5})
    assert pickle.loads(answer.content) == "through" and len(daemon.backend.started) == 2


# The daemon's own life


async def test_restart_takes_up_unfinished_calls(tmp_path: Path) -> None:
    gates.clear()
    first = Daemon(tmp_path)
    await first.deploy(function("wait"), function("length"), function("square"))
    waiting = (await first.submit("wait")).headers["woodfrog-call"]
    done = (await first.submit("square", 6, wait=5)).headers["woodfrog-call"]
    await first.deploy(function("square"))  # `wait` is in the old version only
    await settle()
    await first.die()

    second = Daemon(tmp_path)
    gates["gate"].set()
    answer = await second.http.get(f"/calls/{waiting}", params={"wait": 5})
    assert pickle.loads(answer.content) == "through"
    assert pickle.loads((await second.http.get(f"/calls/{done}")).content) == 36
    assert await second.call("square", 3) == 9
    assert (await second.submit("wait")).status_code == 404
    assert (await second.deploy(function("square")))["version"] == 3
    await second.close()


async def test_restart_after_the_app_was_stopped_cancels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gates.clear()
    first = Daemon(tmp_path)
    await first.deploy(function("wait"))
    call = (await first.submit("wait")).headers["woodfrog-call"]
    first.journal.stop_app("demo")  # killed between this and the calls' end
    await first.die()

    def full(*arguments: Any, **answer: Any) -> None:
        raise StoreError("the daemon's journal cannot be used: database or disk is full", code="journal")

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "finish_call", full)
        await Daemon(tmp_path).die()  # it starts, all the same
    second = Daemon(tmp_path)
    answer = await second.http.get(f"/calls/{call}")
    assert answer.headers["woodfrog-status"] == "cancelled"
    assert (await second.http.get("/apps")).json() == {"apps": []}
    await second.close()


async def test_a_deploy_that_cannot_be_read_any_more_does_not_stop_the_daemon(tmp_path: Path) -> None:
    first = Daemon(tmp_path)
    await first.deploy(function("square"))
    first.journal.add_deploy("older", {"name": "older", "format": "of another version"}, ephemeral=False, client={})
    await first.die()
    second = Daemon(tmp_path)
    assert await second.call("square", 2) == 4
    await second.close()


async def test_graceful_shutdown_lets_calls_end(tmp_path: Path) -> None:
    gates.clear()
    daemon = Daemon(tmp_path)
    await daemon.deploy(function("wait"), function("square"))
    call = (await daemon.submit("wait")).headers["woodfrog-call"]
    await settle()
    down = asyncio.ensure_future(daemon.controller.shutdown(grace=5))
    await settle()
    assert not down.done()
    queued = (await daemon.submit("square", 4)).headers["woodfrog-call"]
    gates["gate"].set()
    await down
    assert (await daemon.http.get(f"/calls/{call}")).headers["woodfrog-status"] == "success"
    await daemon.die()
    second = Daemon(tmp_path)
    assert pickle.loads((await second.http.get(f"/calls/{queued}", params={"wait": 5})).content) == 16
    await second.close()


async def test_shutdown_request_and_health(daemon: Daemon) -> None:
    health = (await daemon.http.get("/health")).json()
    assert health["protocol"] == 1 and health["state_dir"] == str(daemon.settings.home)
    assert (await daemon.http.post("/shutdown")).json() == {"stopping": True} and daemon.downs == 1


async def test_an_unforeseen_failure_in_one_action_does_not_take_the_others_along(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    await daemon.deploy(function("square"), function("length"))
    real = daemon.backend.start

    def start(request: Any) -> None:
        if request.spec.tag == "square":
            raise OSError(24, "Too many open files")
        real(request)

    monkeypatch.setattr(daemon.backend, "start", start)
    answer = await daemon.submit("square", 2)
    assert answer.status_code < 500
    assert await daemon.call("length", "abc") == 3
    monkeypatch.setattr(daemon.backend, "start", real)
    answer = await daemon.http.get(f"/calls/{answer.headers['woodfrog-call']}", params={"wait": 10})
    assert answer.headers["woodfrog-status"] == "success"


async def test_tidy_forgets_nothing_that_is_wanted(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    await daemon.deploy(function("wait"), function("square"), app="demo", ephemeral=True)
    waiting = (await daemon.submit("wait")).headers["woodfrog-call"]
    done = (await daemon.submit("square", 3, wait=5)).headers["woodfrog-call"]
    for record in daemon.controller.calls.values():
        record.submitted -= 3600
    daemon.controller.touched["demo"] -= 3600
    daemon.controller.tidy()
    assert set(daemon.controller.calls) == {waiting}
    assert pickle.loads((await daemon.http.get(f"/calls/{done}")).content) == 9
    gates["gate"].set()
    await daemon.http.get(f"/calls/{waiting}", params={"wait": 5})
    daemon.controller.touched["demo"] -= 3600
    daemon.controller.tidy()
    assert (await daemon.http.get("/apps")).json() == {"apps": []}


async def test_an_app_whose_client_is_there_is_not_idle(daemon: Daemon) -> None:
    """Its end, a question for the answer, and the client's own word count; then comes an end that says why it came."""
    await daemon.deploy(function("wait"), app="demo", ephemeral=True)
    touched = daemon.controller.touched
    call = (await daemon.submit("wait")).headers["woodfrog-call"]
    touched["demo"] -= 3600
    await asyncio.sleep(0.02)
    gates["gate"].set()
    while not daemon.controller.calls[call].done.is_set():
        await asyncio.sleep(0.01)
    daemon.controller.tidy()
    for path in (f"/calls/{call}", f"/calls/{call}"):
        assert set(touched) == {"demo"}
        touched["demo"] -= 3600
        assert (await daemon.http.get(path)).status_code == 200
        daemon.controller.tidy()
        daemon.controller.calls.clear()  # the second time it is the journal's
    touched["demo"] -= 3600
    assert (await daemon.http.post("/apps/demo/touch")).json() == {"app": "demo"}
    daemon.controller.tidy()
    assert set(touched) == {"demo"}
    touched["demo"] -= 301
    daemon.controller.tidy()
    answer = await daemon.submit("wait")
    assert answer.status_code == 404 and error_of(answer)["code"] == "app-abandoned"
    assert "stopped after 5 minutes without its client" in error_of(answer)["message"]
    assert (await daemon.http.post("/apps/demo/touch")).status_code == 404


@pytest.mark.parametrize("attended", [True, False])
async def test_a_run_whose_client_is_lost_is_stopped_with_its_calls(daemon: Daemon, attended: bool) -> None:
    """Only if it would say that it is there, and not before it may be silent; that calls end is no word of it."""
    client = {"attended": attended}
    await daemon.deploy(function("wait"), function("square"), app="run", ephemeral=True, client=client)
    await daemon.deploy(function("wait"), app="deployed", client=client)
    kept = (await daemon.submit("wait", app="deployed")).headers["woodfrog-call"]
    call = (await daemon.submit("wait", app="run")).headers["woodfrog-call"]
    controller = daemon.controller
    for silent in (359, 361):
        other = (await daemon.submit("square", 2, app="run")).headers["woodfrog-call"]
        for name in controller.heard:
            controller.heard[name] = controller.touched[name] = controller.now() - silent
        await controller.calls[other].done.wait()
        assert not controller.calls[call].done.is_set()
        controller.tidy()
    answer = await daemon.http.get(f"/calls/{call}")
    assert answer.headers["woodfrog-status"] == ("cancelled" if attended else "pending")
    assert not controller.calls[kept].done.is_set() and "deployed" in controller.active
    if attended:
        assert "nothing was heard of its client for 6 minutes" in error_of(answer)["message"]
        stopped = [line["line"] for line in await log_of(daemon, "run") if line["line"].startswith("stopped: nothing")]
        assert len(stopped) == 1 and "--detach" in stopped[0]
        assert error_of(await daemon.submit("square", 2, app="run"))["code"] == "app-abandoned"
    gates["gate"].set()


async def test_apps_that_were_run_leave_no_descriptor(daemon: Daemon) -> None:
    """Whoever follows the log of one gets its end."""
    await daemon.deploy(function("square"), app="kept")
    for number in range(20):
        app = f"run-{number}"
        await daemon.deploy(function("square"), app=app, ephemeral=True)
        assert await daemon.call("square", 2, app=app) == 4
    following = asyncio.ensure_future(daemon.http.get("/apps/run-7/logs", params={"follow": True}))
    await asyncio.sleep(0.05)
    for number in range(20):
        await daemon.http.post(f"/apps/run-{number}/stop")
    while daemon.controller.instances:
        await asyncio.sleep(0.01)
    daemon.controller.tidy()
    log = (await asyncio.wait_for(following, 5)).text
    assert [json.loads(line)["line"] for line in log.splitlines()][-1] == "stopped: app stopped"
    daemon.controller.tidy()
    paths = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    names = {Path(os.readlink(p)) for p in paths if os.path.islink(p)}
    logs = daemon.settings.home / "logs"
    assert [n.name for n in names if n.parent == logs] == ["kept.ndjson"]
    again = await asyncio.wait_for(daemon.http.get("/apps/run-7/logs", params={"follow": True}), 5)
    assert again.text == log


@pytest.mark.parametrize("room", ["for-a-row", "after-a-while", "at-the-end"])
async def test_a_call_that_was_said_to_have_failed_is_not_run_again(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, room: str
) -> None:
    """The disk has no room for its answer; at first perhaps not even for a word about it."""
    ran: list[int] = []
    daemon.backend.functions = {**FUNCTIONS, "square": lambda x: ran.append(x) or "x" * (1 << 20)}
    await daemon.deploy(function("square"))
    finish = daemon.journal.finish_call
    full = True

    def finish_call(call_id: str, **answer: Any) -> None:
        if full and (answer["result"].size or room != "for-a-row"):
            raise StoreError("cannot keep a call's out: No space left on device", code="disk-full")
        finish(call_id, **answer)

    monkeypatch.setattr(daemon.journal, "finish_call", finish_call)
    call = uuid.uuid4().hex
    for _ in range(2):
        answer = await daemon.submit("square", 5, wait=10, Woodfrog_Call=call)
        assert answer.headers["woodfrog-status"] == "failure" and error_of(answer)["code"] == "disk-full"
        for record in daemon.controller.calls.values():
            record.submitted -= 3600
        daemon.controller.tidy()  # it may forget the call only if the journal knows of it
    full = False
    if room == "after-a-while":
        daemon.controller.tidy()
        await daemon.die()
    else:
        await daemon.close()
    again = Daemon(daemon.settings.home)
    assert again.controller.calls == {}
    answer = await again.submit("square", 5, wait=10, Woodfrog_Call=call)
    assert answer.headers["woodfrog-status"] == "failure" and error_of(answer)["code"] == "disk-full" and ran == [5]
    await again.close()
    daemon.__dict__.update(Daemon(daemon.settings.home).__dict__)


async def test_results_are_kept_for_days_and_within_bounds(daemon: Daemon) -> None:
    await daemon.deploy(function("square"))
    calls = [(await daemon.submit("square", n, wait=10)).headers["woodfrog-call"] for n in range(3)]
    for call, days in zip(calls, (8, 6, 1), strict=True):
        daemon.journal._db.execute("UPDATE calls SET finished = ? WHERE id = ?", (time.time() - days * 86400, call))
    daemon.controller.tidy()
    daemon.controller.calls.clear()
    old = await daemon.http.get(f"/calls/{calls[0]}")
    assert old.status_code == 404 and "604800 s (WOODFROG_KEEP_RESULTS_S)" in error_of(old)["message"]
    assert "4096 MiB of them (WOODFROG_KEEP_RESULTS_MIB)" in error_of(old)["message"]
    assert pickle.loads((await daemon.http.get(f"/calls/{calls[1]}")).content) == 1
    daemon.journal._db.execute("UPDATE calls SET size = ? WHERE id = ?", (5 << 30, calls[1]))
    daemon.journal.kept += 5 << 30
    daemon.controller.tidy()
    assert (await daemon.http.get(f"/calls/{calls[1]}")).status_code == 404
    assert pickle.loads((await daemon.http.get(f"/calls/{calls[2]}")).content) == 4


async def test_housekeeping_goes_on_after_a_step_that_fails(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: float) -> list[str]:
        raise StoreError("the daemon's journal cannot be used: database or disk is full", code="journal")

    monkeypatch.setattr(daemon.journal, "prune", broken)
    await daemon.deploy(function("square"), app="demo", ephemeral=True)
    assert await daemon.call("square", 3) == 9
    daemon.controller.touched["demo"] -= 3600
    daemon.controller.tidy()
    assert daemon.controller.active == {}


async def tidied(daemon: Daemon) -> None:
    """Housekeeping, and what it began in threads."""
    daemon.controller._content_due = 0.0
    daemon.controller.tidy()
    while any(
        p.name.startswith(".") for f in ("code", "blobs", "volumes") for p in (daemon.settings.home / f).iterdir()
    ):
        await asyncio.sleep(0.01)


async def test_code_goes_that_nobody_needs(daemon: Daemon) -> None:
    home, sources = daemon.settings.home, {}
    for name in ("first", "second", "asked", "unused"):
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w") as tar:
            info = tarfile.TarInfo(f"{name}.py")
            info.size = len(name)
            tar.addfile(info, io.BytesIO(name.encode()))
        sources[name] = hashlib.sha256(data.getvalue()).hexdigest()
        assert (await daemon.http.put(f"/code/{sources[name]}", content=data.getvalue())).status_code == 200
    blob = hashlib.sha256(b"pickled").hexdigest()
    assert (await daemon.http.put(f"/blobs/{blob}", content=b"pickled")).status_code == 200

    async def deploy(tag: str, name: str, app: str = "demo", **more: Any) -> None:
        source = SourceSpec("module", "app", tag, code_digest=sources[name])
        await daemon.deploy(replace(function(tag, **more), source=source), app=app)

    def kept() -> set[str]:
        """What is here of what was last asked for hours ago."""
        found = {name for name, digest in sources.items() if (home / "code" / f"{digest}.layer").is_dir()}
        for path in [*(home / "code").iterdir(), *(home / "blobs").iterdir()]:
            os.utime(path, (time.time() - 7200, path.stat().st_mtime))
        return found

    await tidied(daemon)
    assert kept() == {"first", "second", "asked", "unused"}, "somebody is about to deploy them"
    await deploy("wait", "first")
    call = (await daemon.submit("wait")).headers["woodfrog-call"]
    await deploy("square", "second")
    await daemon.http.head(f"/code/{kept() and sources['asked']}")
    await tidied(daemon)
    assert list((home / "blobs").iterdir()) == []
    assert kept() == {"first", "second", "asked"}, "the first version has a call to finish"
    gates["gate"].set()
    await daemon.http.get(f"/calls/{call}", params={"wait": 5})
    while daemon.controller.instances:
        await asyncio.sleep(0.01)
    daemon.controller.tidy()  # the first version is forgotten
    await tidied(daemon)
    assert kept() == {"first", "second"}, "one may go back to the version before"
    for _ in range(2):
        await deploy("square", "second")
    await tidied(daemon)
    assert kept() == {"second"}
    await daemon.die()
    again = Daemon(home)
    await tidied(again)
    assert kept() == {"second"} and len(list((home / "code").iterdir())) == 1
    await again.http.post("/apps/demo/stop")
    await tidied(again)
    assert list((home / "code").iterdir()) == []
    await again.close()
    daemon.__dict__.update(Daemon(home).__dict__)


async def test_ephemeral_volumes_that_no_app_has_go_after_a_day(daemon: Daemon) -> None:
    """Their clients remove them, at the end of a block in which app may follow app."""
    names = ("ephemeral-0123456789ab", "ephemeral-data", "ephemeral-ba9876543210", "models")
    mounts = tuple(VolumeMount(n, f"/v/{n}", False, True, n.startswith("ephemeral-0")) for n in names)
    await daemon.deploy(function("wait", volumes=(mounts[0], mounts[1], mounts[3])), app="run", ephemeral=True)
    await daemon.deploy(function("square", volumes=mounts[2:]), app="other")
    volumes = daemon.settings.home / "volumes"
    (volumes / names[0] / "file").write_text("x")
    (volumes / "ephemeral-000000000000").mkdir()  # its client writes to it first, and deploys its app then

    async def a_day_later() -> set[str]:
        for path in volumes.iterdir():
            os.utime(path, (time.time() - 86401, path.stat().st_mtime))
        await tidied(daemon)
        return {p.name for p in volumes.iterdir()}

    await daemon.submit("wait", app="run")
    await asyncio.sleep(0.02)
    await tidied(daemon)
    assert {p.name for p in volumes.iterdir()} == {*names, "ephemeral-000000000000"}
    assert await a_day_later() == set(names)
    await daemon.http.post("/apps/run/stop")
    if daemon.controller.instances:  # it has the volume
        assert await a_day_later() == set(names)
    while daemon.controller.instances:
        await asyncio.sleep(0.01)
    await tidied(daemon)
    assert (volumes / names[0] / "file").read_text() == "x", "the next app of the block finds it"
    assert await a_day_later() == set(names[1:])


async def test_what_is_known_of_old_runs_goes(daemon: Daemon) -> None:
    for app, ephemeral in (("demo", True), ("old", True), ("recent", True), ("kept", False), ("runs", True)):
        await daemon.deploy(function("square"), app=app, ephemeral=ephemeral)
    for app in ("demo", "old", "recent", "kept"):
        await daemon.http.post(f"/apps/{app}/stop")
    await daemon.deploy(function("square"), app="demo")  # of the same name as one that was run
    past = time.time() - daemon.settings.keep_results_s - 10
    daemon.journal._db.execute("UPDATE deploys SET stopped = ? WHERE stopped AND app != 'recent'", (past,))
    await tidied(daemon)
    assert {r.app for r in daemon.journal.deploys()} == {"demo", "recent", "kept", "runs"}
    assert [r.version for r in daemon.journal.deploys("demo")] == [2]
    logs = {p.name for p in (daemon.settings.home / "logs").iterdir()}
    assert logs == {f"{app}.ndjson" for app in ("demo", "recent", "kept", "runs")}
    assert (await daemon.http.get("/apps/old/logs")).status_code == 404


async def test_tidy_forgets_versions_that_have_drained(daemon: Daemon) -> None:
    await daemon.deploy(function("wait"), app="demo")
    waiting = (await daemon.submit("wait")).headers["woodfrog-call"]
    for _ in range(2):
        await daemon.deploy(function("square"), app="demo")
    assert await daemon.call("square", 3) == 9
    daemon.controller.tidy()
    assert set(daemon.controller.apps) == {("demo", 1), ("demo", 3)}, "version 1 has a call to finish"
    gates["gate"].set()
    await daemon.http.get(f"/calls/{waiting}", params={"wait": 5})
    while any(i.request.spec.tag == "wait" for i in daemon.controller.instances.values()):
        await asyncio.sleep(0.01)
    daemon.controller.tidy()
    assert set(daemon.controller.apps) == {("demo", 3)} and await daemon.call("square", 3) == 9


async def test_an_event_journal_that_does_not_fit_on_the_disk(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """Housekeeping goes on, and so do calls and the shutdown."""

    class Full:
        def write(self, text: str) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        flush = close = lambda self: self.write("")

    monkeypatch.setattr(daemon.controller, "_record", Full())
    daemon.controller.tidy()
    await daemon.deploy(function("square"), app="demo")
    assert await daemon.call("square", 3) == 9
    daemon.controller.tidy()
    await daemon.controller.shutdown(1)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": "Bearer "}, 401),
        ({"Authorization": "secret"}, 401),
        ({"Authorization": "Basic c2VjcmV0"}, 401),
        ({"Authorization": "Bearer secre"}, 401),
        ({"Authorization": "Bearer secret"}, 200),
    ],
)
async def test_token(daemon: Daemon, headers: dict[str, str], status: int) -> None:
    guarded = TokenAuth(daemon.app, "secret")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(guarded), base_url="http://d") as http:  # type: ignore[arg-type]
        for path in ("/v1/health", "/openapi.json", "/v1/nowhere"):
            answer = await http.get(path, headers=headers)
            assert answer.status_code == (404 if status == 200 and "nowhere" in path else status)
            if status == 401:
                assert error_of(answer)["code"] == "unauthorized"


async def test_token_guards_everything_that_is_not_the_server_s_own(daemon: Daemon) -> None:
    """Also websockets, should the API ever get one."""
    reached: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope["type"])

    async def send(message: Any) -> None:
        return

    guarded = TokenAuth(app, "secret")  # type: ignore[arg-type]
    for kind in ("http", "websocket", "lifespan"):
        await guarded({"type": kind, "headers": []}, None, send)  # type: ignore[arg-type]
    assert reached == ["lifespan"]


async def test_a_container_that_the_backend_has_let_go_of_has_its_app(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    await daemon.deploy(function("wait"))
    await daemon.submit("wait")
    await settle()
    with monkeypatch.context() as patch:
        patch.setattr(daemon.controller.backend, "describe", lambda instance_id: None)
        [row] = (await daemon.http.get("/containers")).json()["containers"]
    assert (row["app"], row["function"]) == ("demo", "wait")
    gates["gate"].set()
    await settle()
