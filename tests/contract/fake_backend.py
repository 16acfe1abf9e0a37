"""A backend whose instances are coroutines in this process, and a twin that fails to order.

Both keep what `backends.base` and `control.events` ask of a backend; the twin is where things break, never how they
are told.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import json
import pickle
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from contract.fake_keeper import FakeKeeper
from woodfrog.backends.base import Answer, CallRequest, Observer, StartRequest
from woodfrog.backends.payload import Payload
from woodfrog.errors import CaptureError, InstanceCrashed, RestoreError, SandboxError, StartupError, WoodfrogError
from woodfrog.linux.meminfo import Room
from woodfrog.snapshot.catalogue import Catalogue
from woodfrog.snapshot.manifest import FORMAT, Manifest

__all__ = ["WORKER_CLASS", "FakeBackend", "FaultyBackend", "Instance"]

WORKER_CLASS = "class"


@dataclass(eq=False)
class Instance:
    request: StartRequest
    task: asyncio.Task[None] | None = None
    stage: str = "starting"
    stopping: bool = False
    calls: set[asyncio.Future[Answer]] = field(default_factory=set)
    closed: set[str] = field(default_factory=set)
    """Calls whose generators are to be closed."""


class FakeBackend:
    """Runs `functions` (by method name); its snapshots are real manifests with nothing in them."""

    def __init__(self, observer: Observer, functions: dict[str, Callable[..., Any]], catalogue: Catalogue) -> None:
        self.observer = observer
        self.functions = functions
        self.catalogue = catalogue
        self.keeper = FakeKeeper(catalogue)
        self.instances: dict[str, Instance] = {}
        self.started: list[StartRequest] = []
        self.stopped: list[tuple[str, bool]] = []
        self._tasks: set[asyncio.Task[Any]] = set()
        self._numbers = itertools.count(1)

    def _spawn(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # What a twin may spoil

    async def _boot(self, instance: Instance) -> None:
        await asyncio.sleep(0)

    async def _thaw(self, instance: Instance) -> None:
        await asyncio.sleep(0)

    async def _freeze(self, instance: Instance) -> str:
        await asyncio.sleep(0)
        return f"s-{next(self._numbers)}"

    async def _unpark(self, instance: Instance) -> None:
        await asyncio.sleep(0)

    async def _answer(self, instance: Instance, request: CallRequest) -> Answer:
        return await self._run(request, instance.closed)

    # Backend

    def start(self, request: StartRequest) -> None:
        assert request.instance_id not in self.instances
        instance = self.instances[request.instance_id] = Instance(request)
        self.started.append(request)
        instance.task = self._spawn(self._start(instance))

    def wake(self, instance_id: str, env: dict[str, str]) -> None:
        instance = self.instances.get(instance_id)
        if instance is None or instance.stopping:
            return
        assert instance.stage == "parked"
        instance.request = replace(instance.request, env=env)
        instance.task = self._spawn(self._start(instance, woken=True))

    async def _start(self, instance: Instance, *, woken: bool = False) -> None:
        request = instance.request
        captured = None
        try:
            if woken:
                self._stage(instance, "restoring")
                await self._unpark(instance)
            elif request.mode == "restore":
                self._stage(instance, "restoring")
                await self._thaw(instance)
                if request.parked:
                    instance.stage = "parked"
                    self.observer.on_parked(request.instance_id)
                    return
            else:
                self._stage(instance, "importing")
                await self._boot(instance)
                if request.capture:
                    self._stage(instance, "capturing")
                    captured = await self._capture(instance)
            self._stage(instance, "starting")
            await asyncio.sleep(0)
        except CaptureError as e:
            self._drop(instance)
            self.observer.on_capture_failed(request, e, alive=False)
            return
        except RestoreError as e:
            self._drop(instance)
            assert request.snapshot_id is not None
            self.observer.on_restore_failed(request.instance_id, request.snapshot_id, e, at_fault=e.snapshot_at_fault)
            return
        except WoodfrogError as e:
            self._drop(instance)
            self.observer.on_start_failed(request.instance_id, e, user_fault=isinstance(e, StartupError))
            return
        instance.stage = "ready"
        self.observer.on_ready(request.instance_id)
        if captured is not None:
            self._spawn(self._commit(request, captured))

    async def _capture(self, instance: Instance) -> str | None:
        try:
            return await self._freeze(instance)
        except CaptureError as e:
            if not e.alive:
                raise
            self.observer.on_capture_failed(instance.request, e, alive=True)
            return None

    async def _commit(self, request: StartRequest, snapshot_id: str) -> None:
        await asyncio.sleep(0.001)  # the disk; the instance serves meanwhile
        self.store(request.function_key, snapshot_id, request)
        self.observer.on_captured(request, snapshot_id)

    def store(
        self,
        function_key: str,
        snapshot_id: str,
        request: StartRequest | None = None,
        *,
        tag: str = "f",
        worker_class: str = WORKER_CLASS,
        created: float | None = None,
    ) -> None:
        """Commit a snapshot."""
        self.catalogue.commit(
            self.catalogue.begin(snapshot_id),
            Manifest(
                format=FORMAT,
                id=snapshot_id,
                function_key=function_key,
                worker_class=worker_class,
                host={},
                app=request.app if request else "demo",
                tag=request.spec.tag if request else tag,
                params_digest=request.params_digest if request else "",
                created=time.time() if created is None else created,
                root_pid=100,
                tasks=1,
                pages_bytes=0,
                fs_bytes=0,
                files=(),
            ),
        )

    def _stage(self, instance: Instance, stage: str) -> None:
        instance.stage = stage
        self.observer.on_stage(instance.request.instance_id, stage)

    async def call(self, instance_id: str, request: CallRequest) -> Answer:
        instance = self.instances.get(instance_id)
        if instance is None:
            return Answer("lost")
        future: asyncio.Future[Answer] = asyncio.ensure_future(self._answer(instance, request))
        instance.calls.add(future)
        try:
            return await future
        except asyncio.CancelledError:
            if not future.cancelled():
                raise
            return Answer("lost")
        finally:
            instance.calls.discard(future)

    def close_call(self, instance_id: str, call_id: str) -> None:
        if instance_id in self.instances:
            self.instances[instance_id].closed.add(call_id)

    async def _run(self, request: CallRequest, closed: set[str]) -> Answer:
        as_json = request.encoding == "json"
        raw = request.payload.read()
        if as_json:
            value = json.loads(raw)
            args, kwargs = (value, {}) if isinstance(value, list) else ((), value)
        else:
            args, kwargs = pickle.loads(raw)

        def pack(value: Any) -> Payload:
            return Payload(data=json.dumps(value).encode() if as_json else pickle.dumps(value))

        try:
            result = self.functions[request.method](*args, **kwargs)
            if inspect.isgenerator(result):
                for item in result:
                    if request.call_id in closed:
                        result.close()
                        break
                    assert request.on_item is not None
                    await request.on_item(pack(item))
                    await asyncio.sleep(0)
                return Answer("success")
            if inspect.isawaitable(result):
                result = await result
        except Exception as e:
            error = {"type": type(e).__name__, "message": str(e), "traceback": traceback.format_exc()}
            return Answer("exception", pack(repr(e)), error)
        return Answer("success", pack(result), ms=1.0)

    def stop(self, instance_id: str, *, graceful: bool, reason: str) -> None:
        instance = self.instances.get(instance_id)
        self.stopped.append((instance_id, graceful))
        if instance is None:
            self.observer.on_stopped(instance_id)
        elif not instance.stopping:
            instance.stopping = True
            self._spawn(self._stop(instance))

    async def _stop(self, instance: Instance) -> None:
        if instance.task is not None and instance.task is not asyncio.current_task():
            instance.task.cancel()
            await asyncio.wait({instance.task})
        await asyncio.sleep(0)
        self._drop(instance)
        self.observer.on_stopped(instance.request.instance_id)

    def crash(self, instance_id: str) -> None:
        """The instance's process dies."""
        instance = self.instances[instance_id]
        self._drop(instance)
        self.observer.on_exited(instance_id, InstanceCrashed("the process was killed by SIGKILL", exit_status=-9))

    def _drop(self, instance: Instance) -> None:
        self.instances.pop(instance.request.instance_id, None)
        for future in instance.calls:
            future.cancel()

    def gpus(self) -> list[dict[str, Any]]:
        return []

    async def check_gpus(self) -> None:
        return

    def fill(self, instance_id: str) -> None:
        assert instance_id

    def room(self, *, quick: bool = False) -> Room:
        return Room(1 << 40, 1 << 40)

    async def memory_used(self) -> dict[str, int]:
        return {}

    def find_snapshot(self, function_key: str, *, chip: str = "") -> str | None:
        manifest = self.catalogue.find(function_key, WORKER_CLASS)
        return manifest.id if manifest else None

    def snapshots_in_use(self) -> set[str]:
        return {i.request.snapshot_id for i in self.instances.values() if i.request.snapshot_id is not None}

    def describe(self, instance_id: str) -> dict[str, Any] | None:
        instance = self.instances.get(instance_id)
        if instance is None:
            return None
        request = instance.request
        return {
            "id": instance_id,
            "app": request.app,
            "function": request.spec.tag,
            "mode": request.mode,
            "stage": instance.stage,
            "phases": [],
        }

    async def execute(self, instance_id: str, argv: list[str], timeout: float) -> dict[str, Any]:
        if instance_id not in self.instances:
            raise SandboxError(f"container {instance_id} is gone")
        return {"exit_code": 0, "stdout": " ".join(argv), "stderr": ""}

    async def close(self) -> None:
        for instance_id in list(self.instances):
            self.stop(instance_id, graceful=False, reason="shutdown")
        while self._tasks:
            await asyncio.wait(set(self._tasks))


class FaultyBackend(FakeBackend):
    """Takes one word per start, freeze and call from its plans, and does well when they are empty.

    starts: ok · slow · fails · user-fault · crashes · refuses
    thaws: ok · slow · fails · at-fault · crashes
    wakes: ok · slow · fails · crashes
    freezes: ok · fails-alive · fails-dead · crashes · late (it serves, and then its snapshot cannot be stored)
    calls: ok · crashes · hangs · breaks (an exception nobody expects)
    """

    def __init__(self, observer: Observer, functions: dict[str, Callable[..., Any]], catalogue: Catalogue) -> None:
        super().__init__(observer, functions, catalogue)
        self.starts: deque[str] = deque()
        self.thaws: deque[str] = deque()
        self.wakes: deque[str] = deque()
        self.freezes: deque[str] = deque()
        self.calls: deque[str] = deque()
        self._late: set[str] = set()

    @staticmethod
    def _next(plan: deque[str]) -> str:
        return plan.popleft() if plan else "ok"

    def start(self, request: StartRequest) -> None:
        if self.starts and self.starts[0] == "refuses":
            self.starts.popleft()
            raise SandboxError("no sandbox: the pool is closed")
        super().start(request)

    async def _die(self, instance: Instance) -> None:
        task, instance.task = instance.task, None
        self.crash(instance.request.instance_id)
        if task is not None:
            task.cancel()
        await asyncio.sleep(0)

    async def _boot(self, instance: Instance) -> None:
        match self._next(self.starts):
            case "slow":
                await asyncio.sleep(0.2)
            case "fails":
                raise SandboxError("no sandbox could be prepared")
            case "user-fault":
                raise StartupError("import failed: ImportError: nope", traceback="Traceback: caf\udce9")
            case "crashes":
                await self._die(instance)

    async def _thaw(self, instance: Instance) -> None:
        match self._next(self.thaws):
            case "slow":
                await asyncio.sleep(0.2)
            case "fails":
                raise RestoreError("criu restore failed")
            case "at-fault":
                raise RestoreError("pages are missing", snapshot_at_fault=True)
            case "crashes":
                await self._die(instance)

    async def _unpark(self, instance: Instance) -> None:
        match self._next(self.wakes):
            case "slow":
                await asyncio.sleep(0.2)
            case "fails":
                raise RestoreError("memory cannot be served")
            case "crashes":
                await self._die(instance)

    async def _freeze(self, instance: Instance) -> str:
        match self._next(self.freezes):
            case "fails-alive":
                raise CaptureError("an io_uring is open", alive=True)
            case "fails-dead":
                raise CaptureError("the disk is full", alive=False)
            case "crashes":
                await self._die(instance)
            case "late":
                self._late.add(instance.request.instance_id)
        return await super()._freeze(instance)

    async def _commit(self, request: StartRequest, snapshot_id: str) -> None:
        if request.instance_id not in self._late:
            return await super()._commit(request, snapshot_id)
        await asyncio.sleep(0.001)
        self.observer.on_capture_failed(request, CaptureError("the disk is full", alive=True), alive=True)

    async def _answer(self, instance: Instance, request: CallRequest) -> Answer:
        match self._next(self.calls):
            case "crashes":
                asyncio.get_running_loop().call_soon(self.crash, instance.request.instance_id)
                await asyncio.Event().wait()
            case "hangs":
                await asyncio.Event().wait()
            case "breaks":
                raise OSError(28, "No space left on device")
        return await super()._answer(instance, request)
