"""What a backend owes its observer, on the in-process backends; and the daemon over one that fails at random."""

from __future__ import annotations

import asyncio
import logging
import pickle
import random
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from contract.fake_backend import FakeBackend, FaultyBackend
from woodfrog.backends.base import CallRequest, StartRequest
from woodfrog.backends.payload import Payload
from woodfrog.daemon.controller import Controller
from woodfrog.daemon.journal import Journal
from woodfrog.daemon.logs import LogBook
from woodfrog.daemon.resources import Resources
from woodfrog.errors import WoodfrogError
from woodfrog.settings import Settings
from woodfrog.snapshot.catalogue import Catalogue
from woodfrog.snapshot.manifest import SigningKey
from woodfrog.spec import (
    AppSpec,
    FunctionSpec,
    MethodSpec,
    RetryPolicy,
    RuntimeSpec,
    ScalingPolicy,
    SnapshotPolicy,
    SourceSpec,
    to_dict,
)
from woodfrog.store.content import ContentStore

RUNTIME = RuntimeSpec(sys.executable, sys.prefix, sys.base_prefix, "3.11")
FUNCTION = FunctionSpec(
    tag="square",
    kind="function",
    source=SourceSpec("module", "app", "square"),
    methods=(MethodSpec("square"),),
    snapshot=SnapshotPolicy(enabled=True),
)
ENDS = {"start_failed", "refused", "restore_failed", "capture_failed dead", "exited", "stopped"}


def square(x: int) -> int:
    return x * x


class Recorder:
    """An observer that knows the rules."""

    def __init__(self) -> None:
        self.heard: dict[str, list[str]] = {}
        self.changed = asyncio.Event()

    def _take(self, instance_id: str, what: str) -> None:
        heard = self.heard.setdefault(instance_id, [])
        assert not ENDS & set(heard), f"{what} after the end: {heard}"
        heard.append(what)
        self.changed.set()

    def on_stage(self, instance_id: str, stage: str) -> None:
        assert "ready" not in self.heard.get(instance_id, [])
        self._take(instance_id, f"stage {stage}")

    def on_ready(self, instance_id: str, *, phases: Any = (), zygote: bool = False) -> None:
        assert "ready" not in self.heard.get(instance_id, [])
        self._take(instance_id, "ready")

    def on_parked(self, instance_id: str) -> None:
        assert not {"parked", "ready"} & set(self.heard[instance_id])
        self._take(instance_id, "parked")

    def on_found(self, instance_id: str, snapshot_id: str) -> None:
        self._take(instance_id, "found")

    def on_cold(self, instance_id: str, why: str) -> None:
        return

    def on_captured(self, request: StartRequest, snapshot_id: str) -> None:
        assert request.capture  # may come after the end
        self.heard.setdefault(request.instance_id, []).append("captured")
        self.changed.set()

    def on_capture_failed(self, request: StartRequest, error: WoodfrogError, *, alive: bool) -> None:
        assert request.capture  # alive: may come after the end
        if alive:
            self.heard.setdefault(request.instance_id, []).append("capture_failed alive")
            self.changed.set()
        else:
            self._take(request.instance_id, "capture_failed dead")

    def on_restore_failed(
        self, instance_id: str, snapshot_id: str, error: WoodfrogError, *, at_fault: bool, gpu: bool = False
    ) -> None:
        self._take(instance_id, "restore_failed")

    def on_refused(self, instance_id: str, error: WoodfrogError) -> None:
        self._take(instance_id, "refused")

    def on_gpus(self, sick: dict[str, str]) -> None:
        return

    def on_start_failed(self, instance_id: str, error: WoodfrogError, *, user_fault: bool) -> None:
        self._take(instance_id, "start_failed")

    def on_exited(self, instance_id: str, error: WoodfrogError) -> None:
        self._take(instance_id, "exited")

    def on_lost(self, instance_id: str, reason: str) -> None:
        self._take(instance_id, "lost")

    def on_stopped(self, instance_id: str) -> None:
        self._take(instance_id, "stopped")

    def on_log(self, instance_id: str, stream: str, data: bytes) -> None:
        return

    async def until(self, instance_id: str, *wanted: str) -> str:
        while True:
            for what in self.heard.get(instance_id, []):
                if what in wanted:
                    return what
            self.changed.clear()
            await asyncio.wait_for(self.changed.wait(), 10)


def request(number: int, *, mode: Any = "cold", snapshot_id: str | None = None, capture: bool = False) -> StartRequest:
    return StartRequest(f"i-{number}", "demo", "demo", FUNCTION, RUNTIME, "key", mode, snapshot_id, capture, {})


def catalogue_in(home: Path) -> Catalogue:
    return Catalogue(home / "snapshots", SigningKey.load_or_create(home / "key"))


@pytest.fixture
async def good(tmp_path: Path) -> AsyncIterator[tuple[FakeBackend, Recorder]]:
    recorder = Recorder()
    backend = FakeBackend(recorder, {"square": square}, catalogue_in(tmp_path))
    yield backend, recorder
    await backend.close()


@pytest.fixture
async def bad(tmp_path: Path) -> AsyncIterator[tuple[FaultyBackend, Recorder]]:
    recorder = Recorder()
    backend = FaultyBackend(recorder, {"square": square}, catalogue_in(tmp_path))
    yield backend, recorder
    await backend.close()


async def ask(backend: FakeBackend, instance_id: str) -> Any:
    answer = await backend.call(
        instance_id, CallRequest("c", "square", "pickle", Payload(data=pickle.dumps(((3,), {}))))
    )
    return pickle.loads(answer.payload.read()) if answer.outcome == "success" else answer.outcome


async def test_cold_start_capture_thaw_stop(good: tuple[FakeBackend, Recorder]) -> None:
    backend, recorder = good
    backend.start(request(1, capture=True))
    await recorder.until("i-1", "ready")
    assert await ask(backend, "i-1") == 9
    await recorder.until("i-1", "captured")
    found = backend.find_snapshot("key")
    assert found is not None
    backend.start(request(2, mode="restore", snapshot_id=found))
    await recorder.until("i-2", "ready")
    assert backend.snapshots_in_use() == {found}
    for name in ("i-1", "i-2"):
        backend.stop(name, graceful=True, reason="idle")
        backend.stop(name, graceful=False, reason="again")
        await recorder.until(name, "stopped")
    assert await ask(backend, "i-1") == "lost" and backend.describe("i-1") is None
    assert recorder.heard["i-2"] == ["stage restoring", "stage starting", "ready", "stopped"]


async def parked(backend: FakeBackend, recorder: Recorder, number: int) -> str:
    if backend.find_snapshot("key") is None:
        backend.store("key", "s-0")
    backend.start(replace(request(number, mode="restore", snapshot_id="s-0"), parked=True))
    name = f"i-{number}"
    assert await recorder.until(name, "parked", *ENDS) == "parked"
    return name


async def test_park_and_wake(good: tuple[FakeBackend, Recorder]) -> None:
    backend, recorder = good
    name = await parked(backend, recorder, 1)
    assert recorder.heard[name] == ["stage restoring", "parked"]
    described = backend.describe(name)
    assert described is not None and described["stage"] == "parked"
    assert backend.snapshots_in_use() == {"s-0"}
    backend.wake(name, {"WORD": "new"})
    assert await recorder.until(name, "ready", *ENDS) == "ready"
    assert recorder.heard[name][-3:] == ["stage restoring", "stage starting", "ready"]
    assert backend.instances[name].request.env == {"WORD": "new"}
    assert await ask(backend, name) == 9


async def test_the_end_of_what_is_parked(bad: tuple[FaultyBackend, Recorder]) -> None:
    backend, recorder = bad
    name = await parked(backend, recorder, 1)
    backend.stop(name, graceful=False, reason="not used any more")
    assert await recorder.until(name, *ENDS) == "stopped"
    name = await parked(backend, recorder, 2)
    backend.crash(name)
    assert await recorder.until(name, *ENDS) == "exited"
    backend.wake(name, {})  # decided before its end was known
    for number, (word, end) in enumerate({"fails": "restore_failed", "crashes": "exited"}.items(), 3):
        name = await parked(backend, recorder, number)
        backend.wakes.append(word)
        backend.wake(name, {})
        assert await recorder.until(name, "ready", *ENDS) == end
    name = await parked(backend, recorder, 5)
    backend.wakes.append("slow")
    backend.wake(name, {})
    await asyncio.sleep(0.01)
    backend.stop(name, graceful=False, reason="app stopped")
    assert await recorder.until(name, "ready", *ENDS) == "stopped"
    await asyncio.sleep(0.01)


async def test_stopped_while_it_starts(bad: tuple[FaultyBackend, Recorder]) -> None:
    backend, recorder = bad
    backend.starts.append("slow")
    backend.start(request(1))
    await asyncio.sleep(0.01)
    backend.stop("i-1", graceful=True, reason="app stopped")
    assert await recorder.until("i-1", *ENDS, "ready") == "stopped"


@pytest.mark.parametrize(
    ("plan", "word", "end"),
    [
        ("starts", "fails", "start_failed"),
        ("starts", "user-fault", "start_failed"),
        ("starts", "crashes", "exited"),
        ("thaws", "fails", "restore_failed"),
        ("thaws", "at-fault", "restore_failed"),
        ("thaws", "crashes", "exited"),
        ("freezes", "fails-dead", "capture_failed dead"),
        ("freezes", "fails-alive", "ready"),
        ("freezes", "late", "ready"),
        ("freezes", "crashes", "exited"),
    ],
)
async def test_every_failure_is_told_once(bad: tuple[FaultyBackend, Recorder], plan: str, word: str, end: str) -> None:
    backend, recorder = bad
    backend.store("key", "s-0")
    getattr(backend, plan).append(word)
    thaw = plan == "thaws"
    backend.start(
        request(
            1,
            mode="restore" if thaw else "cold",
            snapshot_id="s-0" if thaw else None,
            capture=plan == "freezes",
        )
    )
    assert await recorder.until("i-1", "ready", *ENDS) == end
    await asyncio.sleep(0.01)


async def test_lost_calls(bad: tuple[FaultyBackend, Recorder]) -> None:
    backend, recorder = bad
    for number, word in enumerate(("crashes", "hangs")):
        backend.start(request(number))
        await recorder.until(f"i-{number}", "ready")
        backend.calls.append(word)
        asking = asyncio.ensure_future(ask(backend, f"i-{number}"))
        await asyncio.sleep(0.01)
        if word == "hangs":
            backend.stop(f"i-{number}", graceful=False, reason="timeout")
        assert await asyncio.wait_for(asking, 5) == "lost"


@pytest.mark.parametrize("seed", range(6))
async def test_the_daemon_over_a_backend_that_fails_at_random(
    tmp_path: Path, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Every call ends once, the answers are right, nothing is left over, and the machine never heard nonsense."""
    caplog.set_level(logging.ERROR)
    rng = random.Random(seed)
    settings = Settings(home=tmp_path, parked=seed % 2)
    journal = Journal(tmp_path)
    catalogue = catalogue_in(tmp_path)
    controller = Controller(
        settings,
        journal=journal,
        logs=LogBook(tmp_path / "logs", 1 << 20),
        resources=Resources(settings, ContentStore(tmp_path)),
        catalogue=catalogue,
        run_id="t",
    )
    controller.state.config = replace(controller.state.config, park_delay=0.01, park_retry=0.02)
    backend = FaultyBackend(controller, {"square": square}, catalogue)
    controller.backend = backend
    backend.starts.extend(rng.choices(["ok", "slow", "fails", "crashes", "refuses"], [6, 1, 1, 1, 1], k=200))
    backend.thaws.extend(rng.choices(["ok", "slow", "fails", "at-fault", "crashes"], [6, 1, 1, 1, 1], k=200))
    backend.wakes.extend(rng.choices(["ok", "slow", "fails", "crashes"], [6, 1, 1, 1], k=200))
    backend.freezes.extend(rng.choices(["ok", "late", "fails-alive", "fails-dead", "crashes"], k=50))
    backend.calls.extend(rng.choices(["ok", "crashes"], [8, 1], k=200))
    functions = [
        FUNCTION,
        FunctionSpec(
            tag="once",
            kind="function",
            source=FUNCTION.source,
            methods=FUNCTION.methods,
            snapshot=FUNCTION.snapshot,
            retries=RetryPolicy(5, initial_delay=0.0),
            scaling=ScalingPolicy(single_use=True, max_containers=3),
        ),
    ]

    def deploy() -> None:
        raw = to_dict(AppSpec("demo", RUNTIME, tuple(functions)))
        controller.deploy(raw, ephemeral=False, client={}, capture=rng.random() < 0.5)

    deploy()
    records = []
    for number in range(60):
        record = controller.submit(
            f"c{number}",
            app="demo",
            service=rng.choice(["square", "once"]),
            method="square",
            params=b"",
            digest="",
            encoding="pickle",
            payload=Payload(data=pickle.dumps(((number,), {}))),
        )
        records.append(record)
        if rng.random() < 0.3:
            await asyncio.sleep(rng.random() * 0.01)
        if rng.random() < 0.05:
            controller.cancel(rng.choice(records).row.id)
        if rng.random() < 0.05 and backend.instances:
            controller.stop_instance(rng.choice(list(backend.instances)))
        if rng.random() < 0.03:
            deploy()
        if rng.random() < 0.05 and (known := catalogue.manifests()):
            controller.invalidate(rng.choice(known).id)
    for record in records:
        await asyncio.wait_for(record.done.wait(), 20)
    outcomes = [record.outcome for record in records]
    assert outcomes.count("success") > 30
    for number, record in enumerate(records):
        kept = journal.call(record.row.id)
        assert kept is not None and kept.outcome == record.outcome
        if record.outcome == "success":
            assert pickle.loads(record.result.read()) == number * number
        else:
            assert record.error is not None and record.error["message"]
    controller.stop_app("demo")
    await controller.shutdown(grace=5)
    assert controller.state.instances == {} and controller.instances == {} and backend.instances == {}
    assert journal.unfinished() == []
    assert [r.getMessage() for r in caplog.records] == []
    journal.close()
