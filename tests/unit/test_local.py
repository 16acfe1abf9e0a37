"""How a start on this machine ends: what it had is given back, and the observer hears of it once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from woodfrog.backends.base import CallRequest, StartRequest
from woodfrog.backends.connection import Payload, Reply, WorkerConnection
from woodfrog.backends.local import Instance, LocalBackend, LocalConfig
from woodfrog.backends.memory import Memory
from woodfrog.backends.zygote import ZygoteConfig
from woodfrog.errors import HostError, SandboxError, WoodfrogError
from woodfrog.snapshot.catalogue import Catalogue
from woodfrog.snapshot.compat import WorkerClass
from woodfrog.snapshot.manifest import FORMAT, Manifest, SigningKey
from woodfrog.spec import FunctionSpec, MethodSpec, RuntimeSpec, SnapshotPolicy, SourceSpec


class Observer:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, Any]] = []
        self.said: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        def hear(*args: Any, **_: Any) -> None:
            if name == "on_cold":
                self.said.append(args[1])
            elif name not in ("on_log", "on_stage"):
                self.heard.append((name, args))

        return hear

    @property
    def words(self) -> list[str]:
        return [name for name, _ in self.heard]


class Sandbox:
    destroyed = False


class Connection:
    def __init__(self, slow: asyncio.Event) -> None:
        self.slow = slow

    async def close(self) -> None:
        await self.slow.wait()


class Factory:
    """Where sandboxes go; `slow` holds up each step of that."""

    def __init__(self) -> None:
        self.slow = asyncio.Event()

    async def release(self, sandbox: Sandbox) -> None:
        await self.slow.wait()
        sandbox.destroyed = True


class Keeper:
    def __init__(self) -> None:
        self.in_use: Any = set

    def need(self, *_: Any) -> None: ...

    def evicted(self, _: str) -> bool:
        return False

    @contextlib.asynccontextmanager
    async def using(self, _: str) -> AsyncIterator[None]:
        yield

    async def open(self, _: str) -> Any:
        raise NotImplementedError


@pytest.fixture
def backend(tmp_path: Path) -> LocalBackend:
    nothing: Any = None
    parts: dict[str, Any] = {"observer": Observer(), "factory": Factory(), "keeper": Keeper()}
    zygotes = ZygoteConfig(tmp_path / "zygotes", tmp_path, enabled=False)
    return LocalBackend(
        LocalConfig(tmp_path, 0, 0, 0, zygotes),
        catalogue=nothing,
        content=nothing,
        criu=nothing,
        worker_class=WorkerClass("here"),
        **parts,
    )


def request(snapshot: str | None = None) -> StartRequest:
    spec = FunctionSpec(
        "f", "function", SourceSpec("module", "m", "f"), (MethodSpec("f"),), snapshot=SnapshotPolicy(enabled=True)
    )
    runtime = RuntimeSpec(sys.executable, sys.prefix, sys.base_prefix, "3.11")
    return StartRequest("i-1", "a", "a", spec, runtime, "key", "restore" if snapshot else "cold", snapshot, False, {})


async def until(done: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not done():
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), HostError("no bridge"), KeyError("x")])
async def test_whatever_a_thaw_fails_of_there_is_a_cold_start(backend: Any, error: Exception) -> None:
    async def fails(_: str) -> None:
        raise error

    backend.keeper.open = fails
    backend.start(request("s-1"))
    await until(lambda: backend._observer.heard)
    [(word, (instance, snapshot, told))] = backend._observer.heard
    assert (word, instance, snapshot) == ("on_restore_failed", "i-1", "s-1") and isinstance(told, WoodfrogError)


@pytest.mark.parametrize("kind", ["directory", "closed", "damaged"])
async def test_a_working_set_that_cannot_be_read_is_none(tmp_path: Path, kind: str, monkeypatch: Any) -> None:
    class Server:
        alive = True

    memory = Memory(uid=0, min_bytes=0, drain_ms=0)
    memory._server = Server()  # type: ignore[assignment]
    opened: Any = type("Opened", (), {"path": tmp_path, "files": None, "present": None})
    opened.manifest = type("Manifest", (), {"form": "packed", "pages_bytes": 1})
    if kind == "directory":
        (tmp_path / "working-set").mkdir()
    else:
        (tmp_path / "working-set").write_bytes(b"x")
    if kind == "closed":

        def refuse(path: Path) -> bytes:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(Path, "read_bytes", refuse)
    lazy = await memory.lazy(opened)
    assert lazy is not None and lazy.working_set is None


@pytest.mark.parametrize("told", [True, False], ids=["not stopped", "stopped"])
@pytest.mark.parametrize("at", ["connection", "sandbox"])
async def test_a_stop_while_a_failed_start_is_cleared_away(backend: Any, at: str, told: bool) -> None:
    """It leaves nothing: the sandbox goes, and no descriptor of its output stays open."""
    quick = asyncio.Event()
    quick.set()
    slow = backend._factory.slow
    if at == "connection":
        backend._factory.slow = quick
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.write(write, b"its last words")
    sandbox = Sandbox()

    async def fails(instance: Any) -> None:
        instance.sandbox = sandbox
        instance.connection = Connection(slow if at == "connection" else quick)
        instance.log_fds = {read: "stdout"}
        raise SandboxError("no")

    backend._start = fails
    backend.start(request())
    instance = backend._instances["i-1"]
    await asyncio.sleep(0.01)
    if not told:
        backend.stop("i-1", graceful=False, reason="app stopped")
        await asyncio.sleep(0.01)
    assert backend._observer.heard == [] and not sandbox.destroyed
    slow.set()
    await until(lambda: not backend._tasks)
    assert backend._observer.words == (["on_start_failed"] if told else ["on_stopped"])
    assert sandbox.destroyed and instance.sandbox is None and backend._instances == {}
    with pytest.raises(OSError):
        os.fstat(read)
    os.close(write)


async def test_a_start_that_is_stopped_between_two_sandboxes_leaves_neither(backend: Any) -> None:
    first, go = Sandbox(), asyncio.Event()

    async def goes_on(instance: Any) -> None:
        instance.sandbox = first
        instance.connection = Connection(backend._factory.slow)
        backend._drop_sandbox(instance)
        assert instance.connection is None and instance.sandbox is None
        await go.wait()

    backend._start = goes_on
    backend.start(request())
    await asyncio.sleep(0.01)
    backend.stop("i-1", graceful=False, reason="app stopped")
    await until(lambda: backend._observer.words == ["on_stopped"])
    assert not first.destroyed
    backend._factory.slow.set()
    await until(lambda: first.destroyed)


async def test_others_go_on_while_what_was_captured_is_removed(backend: Any) -> None:
    """It may be gigabytes."""
    begun, go = threading.Event(), threading.Event()

    class Catalogue:
        def abandon(self, _: Any) -> None:
            begun.set()
            assert go.wait(5)

    async def fails(instance: Any) -> None:
        instance.staging = "its staging"
        raise SandboxError("no")

    backend._catalogue, backend._start = Catalogue(), fails
    backend.start(request())
    await until(begun.is_set)
    assert backend._observer.heard == []
    go.set()
    await until(lambda: backend._observer.words == ["on_start_failed"])


@pytest.mark.parametrize(
    ("key", "worker_class", "retired", "said"),
    [
        ("other", "here", "", "its name changed since its last snapshot"),
        ("key", "there", "", "its last snapshot does not fit this host: kernel 6.1 there, 6.2 here"),
        ("key", "here", "damaged", "its last snapshot is retired: damaged"),
        ("key", "here", "invalidated", None),
        ("other", "here", "invalidated", None),
    ],
)
async def test_a_function_that_had_a_snapshot_says_why_it_starts_cold(
    backend: Any, tmp_path: Path, key: str, worker_class: str, retired: str, said: str | None
) -> None:
    catalogue = Catalogue(tmp_path / "snapshots", SigningKey.load_or_create(tmp_path / "key"))
    backend._catalogue, backend._worker_class = catalogue, WorkerClass("here", {"kernel": "6.2"})
    asked = request()
    manifest = Manifest(FORMAT, "s-1", key, worker_class, {"kernel": "6.1"}, "a", "f", "", 1.0, 100, 1, 0, 0, ())
    before = replace(asked, spec=replace(asked.spec, source=SourceSpec("module", "m", "g")))
    await backend._say_why_cold(Instance(asked))  # there is none yet
    backend._store(before, catalogue.begin("s-1"), manifest)
    if retired:
        catalogue.retire("s-1", retired)
    await backend._say_why_cold(Instance(asked))
    assert backend._observer.said == ([said] if said else [])
    await backend._say_why_cold(Instance(replace(asked, params_digest="other")))
    await backend._say_why_cold(Instance(replace(asked, family="b")))
    assert len(backend._observer.said) <= 1


async def test_items_that_are_all_there_already_let_others_run(backend: Any) -> None:
    """A worker may send them faster than they are taken: then nothing is waited for."""
    turns, items = 0, 0

    class Full:
        async def send(self, *_: Any) -> None: ...

        async def receive(self) -> Reply:
            return Reply({"type": "item" if turns < 50 else "done"}, Payload(data=b""))

    async def taken(_: Payload) -> None:
        nonlocal items
        items += 1
        assert items < 10_000, "nobody else runs"

    async def other() -> None:
        nonlocal turns
        while turns < 50:
            turns += 1
            await asyncio.sleep(0)

    instance = backend._instances["i-1"] = Instance(request())
    instance.connection = Full()
    beside = asyncio.ensure_future(other())
    answer = await backend.call("i-1", CallRequest("c", "f", "pickle", Payload(data=b""), taken))
    await beside
    assert answer.outcome == "success" and items


async def test_phases_that_a_worker_tells(backend: Any) -> None:
    """Their names are shown on terminals."""
    instance = Instance(request())
    told = {"reseed.numpy": 1, "bad\x1b[2J": 1, "new\nline": 1, "x" * 41: 1, "not a number": "x", "negative": -1}
    backend._take_phases(instance, {"phases": {**told, **{f"p{i}": 1 for i in range(1000)}}}, "wake")
    names = [p.name for p in instance.phases.items]
    assert names[0] == "reseed.numpy" and names[1] == "p0" and len(names) < 200


async def test_a_worker_that_takes_no_greeting_does_not_keep_its_sandbox(backend: Any, tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    connection = await WorkerConnection.of(ours, tmp_path)
    instance = Instance(request())
    instance.sandbox = sandbox = Sandbox()  # type: ignore[assignment]
    backend._context = lambda *_: {"type": "start", "env": {"LARGE": "x" * (3 << 20)}}

    async def now(*_: Any) -> WorkerConnection:
        return connection

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("woodfrog.backends.local.connect_now", now)
        instance.greeting = asyncio.ensure_future(backend._greet(instance, "s-1"))
        await asyncio.sleep(0.05)
    assert not instance.greeting.done()
    backend._factory.slow.set()
    await asyncio.wait_for(backend._leave(instance), 5)
    assert sandbox.destroyed
    theirs.setblocking(True)
    while theirs.recv(1 << 20):  # the connection was closed
        pass
    theirs.close()
