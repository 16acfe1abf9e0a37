"""Instances on this machine: one sandbox each, cold-booted or thawed."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import logging
import os
import re
import signal
import time
import uuid
from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from woodfrog import protocol
from woodfrog.backends.base import Answer, CallRequest, Observer, StartRequest
from woodfrog.backends.connection import WorkerConnection, connect, connect_now
from woodfrog.backends.factory import SandboxFactory
from woodfrog.backends.gpus import Gpus
from woodfrog.backends.health import LOOK_S, Health
from woodfrog.backends.keeper import Keeper
from woodfrog.backends.memory import SETTLED_S, Huge, Memory
from woodfrog.backends.output import OutputReader
from woodfrog.backends.parked import unpark
from woodfrog.backends.payload import Payload
from woodfrog.backends.zygote import Plan, ZygoteConfig, Zygotes, basic_env
from woodfrog.criu.binary import Criu
from woodfrog.engine.engine import Lazy, prestart
from woodfrog.errors import (
    CaptureError,
    IncompatibleSnapshot,
    InstanceCrashed,
    IntegrityError,
    NotFoundError,
    OutOfMemoryError,
    RestoreError,
    SandboxError,
    StartupError,
    StoreError,
    WoodfrogError,
)
from woodfrog.linux import meminfo
from woodfrog.linux.meminfo import Room
from woodfrog.linux.pageserver import ServedPages
from woodfrog.linux.rootplan import APP
from woodfrog.linux.sandbox import Sandbox, SandboxProcess
from woodfrog.snapshot import origin
from woodfrog.snapshot.capture import SnapshotIdentity, capture
from woodfrog.snapshot.catalogue import Catalogue, Opened, Staging
from woodfrog.snapshot.compat import WorkerClass, explain_mismatch
from woodfrog.snapshot.manifest import Manifest
from woodfrog.snapshot.materialise import materialise
from woodfrog.store.content import ContentStore
from woodfrog.telemetry import Phases, counters

__all__ = ["LocalBackend", "LocalConfig"]

log = logging.getLogger("woodfrog")

_STOP_GRACE_S = 10.0
_END_S = 2.0
_FREEZE_TIMEOUT_S = 120.0
_ZYGOTE_S = 10.0
_FETCH_S = 30.0
_AFTER_ANSWER_S = 0.05
"""So long an answer has the processor to itself, on its way to the client."""
_USER_STAGES = frozenset({"importing", "starting"})
"""In these the user's code runs."""
_OTHER_GPUS = frozenset({"gpu-out-of-memory", "gpu-chip"})
"""Why a snapshot did not thaw that may thaw on other GPUs."""
_WORKER_PHASES = 200
_PHASE = re.compile(r"[\w.()-]{1,40}", re.ASCII)
"""Names of phases that a worker may tell: they are shown to people, on terminals."""
_RNDRESEEDCRNG = 0x5207


class _GaveUp(WoodfrogError):
    """A start ends here; `error` is what the observer is told."""

    def __init__(self, error: WoodfrogError) -> None:
        super().__init__(error.message)
        self.error = error


class _UserFailure(_GaveUp):
    """The user's code failed."""


class _Refused(_GaveUp):
    """The GPUs of the instance are not to be used."""


class _CaptureGaveUp(_GaveUp):
    """Its processes are gone, and there is no snapshot."""


class _RestoreGaveUp(_GaveUp):
    def __init__(self, snapshot_id: str, error: WoodfrogError, *, at_fault: bool) -> None:
        super().__init__(error)
        self.snapshot_id = snapshot_id
        self.at_fault = at_fault


@dataclass(eq=False)
class Instance:
    """One instance, from its start request until its sandbox is gone."""

    request: StartRequest
    phases: Phases = field(default_factory=Phases)
    started: float = field(default_factory=time.time)
    stage: str = "starting"
    sandbox: Sandbox | None = None
    process: SandboxProcess | None = None
    connection: WorkerConnection | None = None
    greeting: asyncio.Task[WorkerConnection | None] | None = None
    """While CRIU is still about to end: a connection over which the worker has its context already."""
    snapshot_id: str | None = None
    found: bool = False
    """It was to boot, and was thawed instead."""
    hostname: str = ""
    staging: Staging | None = None
    """Its snapshot, until that is committed; its sandbox's files rest on it."""
    zygote: str | None = None
    """What its worker was thawed from before it was told what to serve; its sandbox's files rest on it."""
    from_zygote: bool = False
    """It was booted in it."""
    plan: Plan | None = None
    commit_task: asyncio.Task[None] | None = None
    stopping: str | None = None
    exit_error: WoodfrogError | None = None
    pages: ServedPages | None = None
    huge: tuple[Huge, ...] = ()
    """What of its memory lay in huge pages at the freeze."""
    calls: int = 0
    """Answered since its memory is served."""
    start_task: asyncio.Task[None] | None = None
    watch_task: asyncio.Task[None] | None = None
    discarding: asyncio.Task[None] | None = None
    log_fds: dict[int, str] = field(default_factory=dict)
    oom_before: int = 0

    @property
    def id(self) -> str:
        return self.request.instance_id


@dataclass(frozen=True)
class LocalConfig:
    spool: Path
    """Where large bodies go while they arrive."""
    page_server_uid: int
    lazy_min_bytes: int
    drain_ms: int
    zygotes: ZygoteConfig
    huge_pages: bool = True
    """Thawed processes get the huge pages back that they had."""
    gpu_free_percent: int = 0
    """So much of a GPU's memory must be free for it to be given to an instance."""


class LocalBackend:
    """Starts, freezes, thaws, calls and stops instances in sandboxes of this machine."""

    def __init__(
        self,
        config: LocalConfig,
        *,
        observer: Observer,
        factory: SandboxFactory,
        catalogue: Catalogue,
        content: ContentStore,
        criu: Criu,
        worker_class: WorkerClass,
        keeper: Keeper,
        gpus: Gpus | None = None,
    ) -> None:
        self._config = config
        self._gpus = gpus or Gpus()
        self._health = Health(
            self._gpus, held=self._gpus_held, tell=observer.on_gpus, free_percent=config.gpu_free_percent
        )
        self._observer = observer
        self._output = OutputReader(observer.on_log)
        self._factory = factory
        factory.ahead = lambda sandbox: prestart(sandbox, criu)
        self._catalogue = catalogue
        self._content = content
        self._criu = criu
        self._worker_class = worker_class
        self.keeper = keeper
        keeper.in_use = self.snapshots_in_use
        self._instances: dict[str, Instance] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._storing: dict[tuple[str, str], Instance] = {}
        """Whose snapshot is on its way to disk, by function key and worker class."""
        self._memory = Memory(
            uid=config.page_server_uid,
            min_bytes=config.lazy_min_bytes,
            drain_ms=config.drain_ms,
            huge_pages=config.huge_pages,
        )
        self._memory.on_need = keeper.need
        self._limited = True
        """Whether there was a limit on the memory of all instances together when it was looked for last."""
        self._zygotes = Zygotes(
            config.zygotes,
            catalogue=catalogue,
            factory=factory,
            criu=criu,
            worker_class=worker_class,
            busy=self._starting,
            in_use=self.snapshots_in_use,
        )

    # Starting

    def start(self, request: StartRequest) -> None:
        instance = Instance(request)
        self._instances[request.instance_id] = instance
        instance.start_task = self._spawn(self._tell(instance, self._start(instance)))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _stage(self, instance: Instance, stage: str) -> None:
        instance.stage = stage
        self._observer.on_stage(instance.id, stage)

    async def _start(self, instance: Instance) -> None:
        request = instance.request
        if request.gpus:
            with instance.phases("gpu.health"):
                within = min(LOOK_S, request.spec.startup_timeout / 4)
                refused = await self._health.before_use(request.gpus, within=within)
            if refused is not None:
                raise _Refused(refused)
        if request.mode == "restore":
            assert request.snapshot_id is not None
            await self._thaw_stored(instance, request.snapshot_id)
            if request.parked:
                instance.stage = "parked"
                instance.watch_task = self._spawn(self._watch(instance))
                self._observer.on_parked(instance.id)
                return
        elif not (await self._thaw_stored_soon(instance) or (request.capture and await self._thaw_fetched(instance))):
            if request.capture:
                self._spawn(self._say_why_cold(instance))
            await self._boot(instance)
            if request.capture:
                await self._freeze_and_thaw(instance)
        await self._wake(instance)
        self._note_start(instance)

    def wake(self, instance_id: str, env: dict[str, str]) -> None:
        instance = self._instances.get(instance_id)
        if instance is None or instance.stopping is not None:
            return  # the observer hears, or has heard, of its end
        assert instance.watch_task is not None and instance.stage == "parked"
        instance.watch_task.cancel()
        instance.request = replace(instance.request, env=env)
        instance.phases = Phases()
        self._stage(instance, "restoring")
        instance.start_task = self._spawn(self._tell(instance, self._unpark(instance)))

    async def _unpark(self, instance: Instance) -> None:
        """From a parked instance to one that serves."""
        assert instance.sandbox is not None and instance.snapshot_id is not None
        try:
            reseed_kernel_generators()
            with instance.phases("unpark"):
                await unpark(instance.sandbox, instance.pages)
            with instance.phases("connect"):
                await self._connect(instance, instance.sandbox)
        except Exception as e:
            raise _RestoreGaveUp(instance.snapshot_id, _known("wake", e), at_fault=False) from e
        await self._wake(instance)

    async def _tell(self, instance: Instance, start: Coroutine[Any, Any, None]) -> None:
        """See a start to its end; what becomes of it, the observer hears."""
        try:
            await start
        except _UserFailure as e:
            await self._discard(instance)
            self._observer.on_start_failed(instance.id, e.error, user_fault=True)
        except _CaptureGaveUp as e:
            await self._discard(instance)
            self._observer.on_capture_failed(instance.request, e.error, alive=False)
        except _RestoreGaveUp as e:
            counters["restore.failed"] += 1
            await self._discard(instance)
            gpu = e.error.code in _OTHER_GPUS
            self._observer.on_restore_failed(instance.id, e.snapshot_id, e.error, at_fault=e.at_fault, gpu=gpu)
        except _Refused as e:
            await self._discard(instance)
            self._observer.on_refused(instance.id, e.error)
        except WoodfrogError as e:
            if isinstance(e, InstanceCrashed):
                await self._await_end(instance)
            error = self._with_cause(instance, e)
            await self._discard(instance)
            # A worker that died while it ran the user's import or enter died of the user's code.
            died = isinstance(error, (InstanceCrashed, OutOfMemoryError)) and instance.stage in _USER_STAGES
            self._observer.on_start_failed(instance.id, error, user_fault=died)
        except Exception as e:
            await self._discard(instance)
            self._observer.on_start_failed(instance.id, _known("start", e), user_fault=False)

    async def _sandbox(self, instance: Instance, layers: tuple[Path, ...] = (), shm: Path | None = None) -> Sandbox:
        """A sandbox from the pool with this function's root, its output flowing."""
        request, phases = instance.request, instance.phases
        with phases("sandbox"):
            sandbox = await self._factory.take(request.spec)
        instance.sandbox = sandbox
        instance.oom_before = sandbox.oom_kills()
        instance.hostname = instance.id
        with phases("assemble"):
            await self._factory.assemble(
                sandbox,
                spec=request.spec,
                runtime=request.runtime,
                code=self._code(request),
                volumes=request.volumes,
                layers=layers,
                shm=shm,
                hostname=instance.hostname,
                devices=self._gpus.device_nodes(request.gpus),
            )
        self._open_logs(instance, sandbox)
        return sandbox

    def _code(self, request: StartRequest) -> Path | None:
        digest = request.spec.source.code_digest
        return self._content.code_path(digest) if digest else None

    def _env(self, instance: Instance, *, gpu: bool = True) -> dict[str, str]:
        """`gpu=False`: as it is for every instance of the function, whichever GPU it has."""
        request = instance.request
        return {
            **basic_env(request.runtime),
            **self._factory.library_env(),
            "WOODFROG_APP": request.app,
            "WOODFROG_FUNCTION": request.spec.tag,
            "WOODFROG_INSTANCE": instance.id,
            # Programs written for Modal tell by these where they run, and their containers apart.
            "MODAL_IS_REMOTE": "1",
            "MODAL_TASK_ID": instance.id,
            **request.env,
            **(self._gpus.env(request.gpus) if gpu else {}),
        }

    def _saves_gpu(self, request: StartRequest) -> bool:
        """Whether its snapshots hold the memory of its GPUs."""
        return bool(request.gpus) and request.spec.snapshot.gpu

    def _class(self, request: StartRequest) -> WorkerClass:
        """Where its snapshots restore."""
        if self._saves_gpu(request):
            return self._gpus.worker_class(self._worker_class, request.gpus)
        return self._worker_class

    async def _boot(self, instance: Instance) -> None:
        request, phases = instance.request, instance.phases
        spec = request.spec
        if not await self._boot_zygote(instance):
            await self._spawn_worker(instance)
        self._stage(instance, "importing")
        assert instance.connection is not None
        blob = self._content.get_blob(spec.source.blob_digest) if spec.source.blob_digest else b""
        message = protocol.BootMessage(
            app=request.app,
            tag=spec.tag,
            kind=spec.kind,
            source_kind=spec.source.kind,
            module=spec.source.module,
            qualname=spec.source.qualname,
            methods=[{"name": m.name, "generator": m.generator, "is_async": m.is_async} for m in spec.methods],
            sys_path=[APP, *request.runtime.sys_path],
            env=self._env(instance),
            cwd=spec.image.workdir or APP,
            snapshot=spec.snapshot.enabled,
            hide_gpu=spec.snapshot.enabled and not spec.snapshot.gpu,
            has_params=bool(request.params),
            params_len=len(request.params),
            blob_len=len(blob),
            entropy=os.urandom(64).hex() if instance.zygote else "",
        )
        with phases("boot"):
            reply = await instance.connection.request(
                message.header(), Payload(data=request.params), Payload(data=blob), expect="booted"
            )
            self._check_failed(instance, reply.header)
        self._take_phases(instance, reply.header, "boot")

    async def _say_why_cold(self, instance: Instance) -> None:
        """A function that had a snapshot is to get another: say what is not as it was."""
        request, here = instance.request, self._class(instance.request)
        last = self._catalogue.last_of(request.family, request.spec.tag, request.params_digest, request.function_key)
        if last is None:
            return
        if last.function_key != request.function_key:
            text = await asyncio.to_thread(self._explain, request, last.id)
        elif last.worker_class != here.digest:
            text = f"its last snapshot does not fit this host: {explain_mismatch(last.host, here.parts)}"
        else:
            text = f"its last snapshot is retired: {why}" if (why := self._catalogue.retired(last.id)) else ""
        if text:
            self._observer.on_cold(instance.id, text)

    def _explain(self, request: StartRequest, last: str) -> str:
        before = origin.read(self._catalogue.path(last))
        now = self._origin(request) if before is not None else None
        return origin.explain(before, now) if before is not None and now is not None else ""

    def _origin(self, request: StartRequest) -> origin.Origin | None:
        """None = its code is gone."""
        with contextlib.suppress(NotFoundError):
            return origin.origin_of(request.spec, request.runtime, request.params_digest, self._code(request))
        return None

    async def _spawn_worker(self, instance: Instance) -> None:
        request, phases = instance.request, instance.phases
        sandbox = await self._sandbox(instance)
        self._stage(instance, "importing")
        with phases("spawn"):
            instance.process = await self._factory.spawn_worker(sandbox, request.runtime)
        with phases("connect"):
            await self._connect(instance, sandbox)

    async def _connect(self, instance: Instance, sandbox: Sandbox) -> None:
        assert instance.process is not None
        if instance.greeting is not None:
            await asyncio.wait({instance.greeting})
            instance.connection = instance.greeting.result()
            if instance.connection is not None:
                return
            instance.greeting = None
        instance.connection = await connect(sandbox, instance.process, self._config.spool)

    @staticmethod
    def _check_failed(instance: Instance, header: dict[str, Any]) -> None:
        if header["type"] != "failed":
            return
        error, stage = _plain_error(header.get("error")), str(header.get("stage", "?"))
        what = "enter" if stage == "enter-restore" else stage
        raise _UserFailure(
            StartupError(
                f"{instance.request.spec.tag}: {what} failed: {error['type']}: {error['message']}".rstrip(": "),
                code=f"startup-{stage}",
                stage=stage,
                traceback=error["traceback"],
            )
        )

    @staticmethod
    def _take_phases(instance: Instance, header: dict[str, Any], parent: str) -> None:
        phases = header.get("phases")
        if isinstance(phases, dict):
            for name, ms in itertools.islice(phases.items(), _WORKER_PHASES):
                if isinstance(ms, (int, float)) and 0 <= ms < 1e9 and _PHASE.fullmatch(name):
                    instance.phases.add(name, float(ms), parent=parent)

    async def _greet(self, instance: Instance, snapshot_id: str) -> WorkerConnection | None:
        """Give a thawed worker its context ahead of CRIU's end; None = it has to be given afterwards."""
        if instance.sandbox is None:
            return None
        try:
            connection = await connect_now(instance.sandbox, self._config.spool)
        except (SandboxError, OSError):
            return None
        try:
            await connection.send(self._context(instance, snapshot_id))
            return connection
        except BaseException as e:
            await connection.close()
            if isinstance(e, WoodfrogError):
                return None
            raise

    def _context(self, instance: Instance, snapshot_id: str | None) -> dict[str, Any]:
        return protocol.StartContext(
            instance_id=instance.id,
            hostname=instance.hostname,
            restored=snapshot_id is not None,
            snapshot_id=snapshot_id,
            entropy=os.urandom(64).hex(),
            wall_clock=time.time(),
            env=self._env(instance),
            gpu=list(instance.request.gpus),
        ).header()

    async def _wake(self, instance: Instance) -> None:
        """Give the worker its context, if it has not got it; it answers when it is ready to serve."""
        self._stage(instance, "starting")
        assert instance.connection is not None
        with instance.phases("wake"):
            if instance.greeting is None:
                await instance.connection.send(self._context(instance, instance.snapshot_id))
            instance.greeting = None
            reply = await instance.connection.answer("start", expect="ready")
            self._check_failed(instance, reply.header)
        self._take_phases(instance, reply.header, "wake")
        instance.stage = "ready"
        instance.watch_task = self._spawn(self._watch(instance))
        self._observer.on_ready(instance.id, phases=instance.phases.items, zygote=instance.from_zygote)
        if instance.huge:
            self._spawn(self._piece_together(instance))

    # Zygotes

    async def _boot_zygote(self, instance: Instance) -> bool:
        """Have a worker with imports of the program's; False = there is no worker, do without."""
        request = instance.request
        with instance.phases("scan"):
            instance.plan = await self._zygotes.plan(request, self._env(instance, gpu=False), self._code(request))
        found = self._zygotes.find(instance.plan) if instance.plan is not None else None
        if found is None:
            return False
        instance.zygote = found.id
        try:
            # Whatever it comes to, the function's own time is running: a plain start must still fit in.
            async with asyncio.timeout(min(_ZYGOTE_S, request.spec.startup_timeout / 4)), self.keeper.using(found.id):
                with instance.phases("zygote.restore"):
                    with instance.phases("verify"):
                        opened = await asyncio.to_thread(self._catalogue.open_verified, found.id)
                    # A process whose pages are still to come cannot be frozen again.
                    lazy = await self._memory.lazy(opened, everything=request.capture)
                    await self._materialise(instance, opened, lazy)
        except (WoodfrogError, OSError, TimeoutError) as e:
            self._drop_sandbox(instance)
            instance.zygote = None
            self._zygotes.failed(found.id, e)
            return False
        for stream, data in self._zygotes.printed(found.id):
            self._observer.on_log(instance.id, stream, data)
        counters["zygote.used"] += 1
        instance.from_zygote = True
        return True

    def _starting(self) -> bool:
        return any(i.stage not in ("ready", "parked") and i.stopping is None for i in self._instances.values())

    def _note_start(self, instance: Instance) -> None:
        """After a start without a snapshot: where the next one may begin is seen to when there is time."""
        code = self._code(instance.request)
        if instance.plan is not None and code is not None:
            took = sum(p.ms for p in instance.phases.items if p.name == "import")
            env = self._env(instance, gpu=False)
            self._zygotes.started(instance.request, env, code, instance.plan, took)

    # Freezing

    async def _freeze_and_thaw(self, instance: Instance) -> None:
        """Capture the booted worker, then go on through the restore path."""
        request, phases = instance.request, instance.phases
        assert instance.connection is not None and instance.sandbox is not None
        self._stage(instance, "capturing")
        with phases("freeze"):
            try:
                reply = await asyncio.wait_for(
                    instance.connection.request({"type": "freeze"}, expect="frozen"), _FREEZE_TIMEOUT_S
                )
            except TimeoutError:
                text = f"before-snapshot hooks did not end within {_FREEZE_TIMEOUT_S:.0f} s"
                raise _CaptureGaveUp(CaptureError(text, phase="freeze", code="hooks-timeout")) from None
            self._check_failed(instance, reply.header)
            await instance.connection.wait_closed_by_worker(10.0)
            await instance.connection.close()
            instance.connection = None
        self._take_phases(instance, reply.header, "freeze")
        identity = SnapshotIdentity(
            id=f"s-{uuid.uuid4().hex[:12]}",
            function_key=request.function_key,
            worker_class=self._class(request),
            app=request.family,
            tag=request.spec.tag,
            params_digest=request.params_digest,
            parent=instance.zygote or "",
        )
        # What lies in the pipes would be printed by every copy.
        self._output.drain(instance.id, instance.log_fds, always=True)
        try:
            if instance.pages is not None and not instance.pages.complete:
                raise CaptureError("its memory is not complete yet", alive=True, phase="freeze", code="lazy-pages")
            instance.staging = self._catalogue.begin(identity.id)
            with phases("capture"):
                draft = await capture(
                    instance.sandbox,
                    root_pid=protocol.WORKER_PID,
                    staging=instance.staging,
                    identity=identity,
                    criu=self._criu,
                    phases=phases,
                    below=self._catalogue.path(instance.zygote) / "fs" if instance.zygote else None,
                    gpu=self._gpus.side(request.gpus) if self._saves_gpu(request) else None,
                    device_use=reply.header.get("device"),
                )
        except Exception as e:
            counters["capture.failed"] += 1
            error = _known("capture", e)
            if instance.zygote is not None:
                self._zygotes.unfit(request, error)
            if instance.staging is not None:
                self._catalogue.keep_failure(instance.staging, error.message)
                error.fields["snapshot"] = instance.staging.id
            if not isinstance(error, StoreError) and not (isinstance(error, CaptureError) and error.alive):
                raise _CaptureGaveUp(error) from e
            await self._abandon(instance)
            self._observer.on_capture_failed(instance.request, error, alive=True)
            await self._connect(instance, instance.sandbox)
            return
        draft = replace(draft, phases=tuple(f"{p.name}={p.ms:.1f}" for p in phases.items))
        self._drop_sandbox(instance)
        with phases("share"):
            sharing = asyncio.ensure_future(asyncio.to_thread(self._catalogue.share_captured, instance.staging))
            try:
                await asyncio.shield(sharing)
            except asyncio.CancelledError:
                await asyncio.wait({sharing})  # what it changes will be removed
                raise
        try:
            await self._thaw(instance, Opened.staged(draft, instance.staging.path))
        except Exception as e:
            counters["capture.failed"] += 1
            error = _known("thaw", e)
            if instance.zygote is not None:
                self._zygotes.unfit(request, error)
            failure = CaptureError(f"the new snapshot does not thaw: {error.message}", phase="thaw")
            failure.fields |= {k: v for k, v in error.fields.items() if k in ("remedy", "log_tail")}
            raise _CaptureGaveUp(failure) from e
        instance.zygote = None
        # The first caller need not wait for the disk: the images are ours and in the page cache.
        instance.commit_task = self._spawn(self._commit(instance, instance.staging, draft))
        self._storing[draft.function_key, draft.worker_class] = instance

    async def _abandon(self, instance: Instance) -> None:
        """Drop a snapshot that never was; not while a sandbox rests on its files."""
        staging, instance.staging = instance.staging, None
        if staging is not None:
            await asyncio.to_thread(self._catalogue.abandon, staging)

    async def _commit(self, instance: Instance, staging: Staging, draft: Manifest) -> None:
        key = draft.function_key, draft.worker_class
        try:
            try:
                manifest = await asyncio.to_thread(self._store, instance.request, staging, draft)
            finally:
                if self._storing.get(key) is instance:
                    del self._storing[key]
        except Exception as e:
            counters["capture.failed"] += 1
            error = _known("commit", e)
            if instance.id not in self._instances:
                await self._abandon(instance)
            self._observer.on_capture_failed(instance.request, error, alive=True)
            return
        instance.staging = None
        counters["capture.done"] += 1
        self._observer.on_captured(instance.request, manifest.id)

    def _store(self, request: StartRequest, staging: Staging, draft: Manifest) -> Manifest:
        made_of = self._origin(request)
        if made_of is not None:
            origin.write(made_of, staging.path)
        return self._catalogue.commit(staging, draft)

    # Thawing

    async def _thaw_stored(self, instance: Instance, snapshot_id: str) -> None:
        try:
            async with self.keeper.using(snapshot_id):
                if self.keeper.evicted(snapshot_id):
                    with instance.phases("fetch"):
                        await self.keeper.fetch(snapshot_id, within=_fetch_s(instance))
                with instance.phases("verify"):
                    opened = await self.keeper.open(snapshot_id)
                await self._thaw(instance, opened)
        except (IntegrityError, IncompatibleSnapshot) as e:
            raise _RestoreGaveUp(snapshot_id, e, at_fault=True) from e
        except RestoreError as e:
            raise _RestoreGaveUp(snapshot_id, e, at_fault=e.snapshot_at_fault) from e
        except Exception as e:  # whatever it is: one can start without
            raise _RestoreGaveUp(snapshot_id, _known("thaw", e), at_fault=False) from e
        self._catalogue.used(snapshot_id)
        counters["restore.done"] += 1

    async def _thaw_stored_soon(self, instance: Instance) -> bool:
        """Thaw what another instance has captured, once it is on disk, if that is sooner than to boot; False = boot."""
        key = instance.request.function_key, self._class(instance.request).digest
        other = self._storing.get(key)
        if other is None or other.commit_task is None or not instance.request.spec.snapshot.enabled:
            return False
        boot_ms = sum(p.ms for p in other.phases.items if p.name == "boot")
        with instance.phases("await-snapshot"):
            await asyncio.wait({other.commit_task}, timeout=boot_ms / 1e3)
        found = self._catalogue.find(*key)
        return found is not None and await self._thaw_instead(instance, found.id)

    async def _thaw_fetched(self, instance: Instance) -> bool:
        """Thaw what another machine captured and left in the tier; False = boot, there is none that does."""
        with instance.phases("look-up"):
            found = await self.keeper.look_up(instance.request.function_key, self._class(instance.request).digest)
        return found is not None and await self._thaw_instead(instance, found, fetch=True)

    async def _thaw_instead(self, instance: Instance, found: str, *, fetch: bool = False) -> bool:
        """Thaw a snapshot where a boot was asked for; False = boot after all, it does not thaw."""
        key, worker_class = instance.request.function_key, self._class(instance.request).digest
        self._stage(instance, "restoring")
        instance.snapshot_id = found  # from here on nobody removes it
        try:
            async with self.keeper.using(found):
                if fetch:
                    with instance.phases("fetch"):
                        await self.keeper.fetch(
                            found, function_key=key, worker_class=worker_class, within=_fetch_s(instance)
                        )
                await self._thaw_stored(instance, found)
        except Exception as e:  # whatever it is: one can start without
            error = e.error if isinstance(e, _RestoreGaveUp) else _known("thaw", e)
            log.warning("%s: snapshot %s is not used: %s", instance.id, found, error.message)
            if fetch:
                self.keeper.no_use(key, found, error, worker_class)
                if isinstance(e, _RestoreGaveUp) and e.at_fault:
                    self._catalogue.retire(found, e.message)
            self._drop_sandbox(instance)
            instance.snapshot_id = None
            return False
        instance.found = True
        self._observer.on_found(instance.id, found)
        if instance.request.capture:
            self._observer.on_captured(instance.request, found)
        return True

    async def _thaw(self, instance: Instance, opened: Opened) -> None:
        self._stage(instance, "restoring")
        request, found = instance.request, opened.manifest.id
        # What was page-locked the driver locks again when it restores: in the kernel, where a fault cannot wait for the
        # page server (handle_userfault without FAULT_FLAG_ALLOW_RETRY). It fails, and the restore with it.
        everything = self._saves_gpu(request)
        lazy = await self._memory.lazy(opened, everything=everything, parked=request.parked)
        if lazy is not None and not request.parked and not request.gpus:

            def held() -> None:
                instance.greeting = asyncio.get_running_loop().create_task(self._greet(instance, found))

            lazy.on_held = held
        await self._materialise(instance, opened, lazy)
        instance.snapshot_id = found

    async def _materialise(self, instance: Instance, opened: Opened, lazy: Lazy | None) -> None:
        sandbox = await self._sandbox(instance, (opened.path / "fs",), opened.path / "shm")
        reseed_kernel_generators()
        instance.process = await materialise(
            sandbox,
            manifest=opened.manifest,
            images=opened.images,
            criu=self._criu,
            phases=instance.phases,
            lazy=lazy,
            stopped=instance.request.parked,
            gpu=self._gpus.side(instance.request.gpus),
        )
        if lazy is not None and lazy.served is not None:
            instance.pages, instance.huge = lazy.served, lazy.huge
            self._memory.adopt(lazy.served, lambda why: self._memory_failed(instance, why))
        if not instance.request.parked:
            with instance.phases("connect"):
                await self._connect(instance, sandbox)

    # Memory that follows

    def _memory_failed(self, instance: Instance, why: str) -> None:
        """Its processes wait for memory that will not come: what they were doing is done again elsewhere."""
        if instance.stopping is None and self._instances.get(instance.id) is instance:
            log.error("%s: memory cannot be served: %s", instance.id, why)
            if instance.pages is not None and instance.pages.out_of_memory and instance.sandbox is not None:
                # As if the kernel had killed it for that, and not the call's to be tried again.
                instance.exit_error = instance.exit_error or _limit_hit(instance)
                self._spawn(instance.sandbox.destroy())
                return
            self._observer.on_lost(instance.id, f"its memory cannot be served: {why}")

    async def _piece_together(self, instance: Instance, served: ServedPages | None = None) -> None:
        """Its huge pages again: soon after the thaw those of what was pushed, and those of the rest when that is in."""
        try:
            await (asyncio.sleep(SETTLED_S) if served is None else served.whole())
        except SandboxError:
            return  # it never will be
        if instance.process is not None and instance.stopping is None:
            root = instance.process.host_pid
            await self._memory.piece_together(root, instance.huge, lambda: instance.stopping is None, instance.id)

    async def _learn(self, instance: Instance) -> None:
        """After the first call: what it touched is kept for the next thaw; then the keeper looks after the snapshot."""
        origin, pages = instance.snapshot_id or instance.zygote, instance.pages
        if origin is None:
            return
        # At once: an instance that served one call may be gone before its snapshot is stored.
        seen = b"" if pages is None else await self._memory.record(pages, instance.id)
        await asyncio.sleep(_AFTER_ANSWER_S)
        if instance.commit_task is not None:
            await asyncio.shield(instance.commit_task)
        await self._memory.keep(seen, self._catalogue.path(origin), instance.id)
        self.keeper.pack_later(origin)

    # Output

    def _open_logs(self, instance: Instance, sandbox: Sandbox) -> None:
        for stream, inner in (("stdout", protocol.WORKER_STDOUT), ("stderr", protocol.WORKER_STDERR)):
            fd = os.open(sandbox.path(inner), os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            instance.log_fds[fd] = stream
            self._output.add(instance.id, fd, stream)

    # Calls

    async def call(self, instance_id: str, request: CallRequest) -> Answer:
        instance = self._instances.get(instance_id)
        if instance is None or instance.connection is None:
            return Answer("lost", error=InstanceCrashed(f"instance {instance_id} is gone").to_dict())
        connection = instance.connection  # the instance may be discarded meanwhile
        begin = time.monotonic()
        header = {"type": "call", "call": request.call_id, "method": request.method, "encoding": request.encoding}
        try:
            await connection.send(header, request.payload)
            while True:
                reply = await connection.receive()
                ms = (time.monotonic() - begin) * 1e3
                if reply.type == "item":
                    await asyncio.sleep(0)  # there may always be another one here already
                    if request.on_item is not None:
                        await request.on_item(reply.body)
                elif reply.type in ("result", "done"):
                    self._after_call(instance)
                    return Answer("success", reply.body, ms=ms)
                elif reply.type == "error":
                    self._after_call(instance)
                    self._output.drain(instance.id, instance.log_fds)  # what was printed comes before the traceback
                    return Answer("exception", reply.body, _plain_error(reply.header.get("error")), ms)
                else:
                    raise protocol.ProtocolError(f"worker answered {reply.type!r} to a call")
        except WoodfrogError as e:
            # Whatever it was, what comes next on this connection is not known any more.
            if instance.exit_error is None and instance.stopping is None and not isinstance(e, InstanceCrashed):
                instance.exit_error = e
            self._spawn(self._end_lost(instance))
            return Answer("lost", error=e.to_dict())

    def close_call(self, instance_id: str, call_id: str) -> None:
        instance = self._instances.get(instance_id)
        if instance is not None and instance.connection is not None:
            self._spawn(_send_close(instance.connection, call_id))

    @staticmethod
    async def _await_end(instance: Instance) -> bool:
        """Whether the process is seen dead within a moment: its connection ends a little before it does."""
        if instance.process is None:
            return False
        ended = asyncio.ensure_future(instance.process.wait())
        ended.add_done_callback(lambda f: f.cancelled() or f.exception())  # whoever watches the process tells
        await asyncio.wait({ended}, timeout=_END_S)
        return ended.done() and ended.exception() is None

    def _after_call(self, instance: Instance) -> None:
        instance.calls += 1
        if instance.calls == 1:
            self._spawn(self._learn(instance))

    def fill(self, instance_id: str) -> None:
        instance = self._instances.get(instance_id)
        if instance is not None and instance.pages is not None:
            self._memory.fill(instance.pages)
            if instance.huge:
                self._spawn(self._piece_together(instance, instance.pages))

    # The machine's memory

    def room(self, *, quick: bool = False) -> Room:
        room = meminfo.machine()
        if quick and not self._limited:
            return room
        limit = self._factory.room()
        self._limited = limit is not None
        if limit is None:
            return room
        return Room(min(room.total, limit.total), min(room.available, limit.available))

    async def memory_used(self) -> dict[str, int]:
        sandboxes = {i.id: i.sandbox for i in self._instances.values() if i.sandbox is not None}
        return await asyncio.to_thread(lambda: {name: s.memory_private() for name, s in sandboxes.items()})

    async def _end_lost(self, instance: Instance) -> None:
        """The connection is gone: give the process a moment to be seen dead, else it is made so."""
        if await self._await_end(instance):
            return
        if instance.stopping is None and instance.exit_error is None:
            instance.exit_error = InstanceCrashed(
                "the worker closed its connection in the middle of a call", code="worker-gone"
            )
        if instance.sandbox is not None:
            await instance.sandbox.destroy()

    def _death(self, instance: Instance, status: int | None) -> WoodfrogError:
        """Why a worker ended, for people."""
        sandbox = instance.sandbox
        if sandbox is not None and sandbox.oom_kills() > instance.oom_before:
            return _limit_hit(instance)
        if instance.exit_error is not None:
            return instance.exit_error
        if status is None:
            text = "ended"
        elif status < 0:
            try:
                name = signal.Signals(-status).name
            except ValueError:
                name = f"signal {-status}"
            text = f"was killed by {name}" + (" (segmentation fault)" if -status == signal.SIGSEGV else "")
        else:
            text = f"exited with code {status}"
        return InstanceCrashed(f"the process of {instance.request.spec.tag} {text}", exit_status=status)

    def _with_cause(self, instance: Instance, error: WoodfrogError) -> WoodfrogError:
        """A connection that broke in a start says little; why the process died says more."""
        if isinstance(error, InstanceCrashed) and instance.process is not None:
            status = instance.process.status
            if status is not None or (
                instance.sandbox is not None and instance.sandbox.oom_kills() > instance.oom_before
            ):
                death = self._death(instance, status)
                death.fields["stage"] = instance.stage
                death.args = (f"{death.message} while {instance.stage}",)
                death.message = str(death.args[0])
                return death
        return error

    async def _watch(self, instance: Instance) -> None:
        """Wait for the worker's end; one that was not asked for is reported."""
        assert instance.process is not None
        try:
            status: int | None = await instance.process.wait()
        except SandboxError:
            status = None  # the whole sandbox went
        if instance.stopping is not None:
            return
        error = self._death(instance, status)
        instance.stopping = "exited"
        await self._discard(instance)
        self._observer.on_exited(instance.id, error)

    # Stopping

    def stop(self, instance_id: str, *, graceful: bool, reason: str) -> None:
        instance = self._instances.get(instance_id)
        if instance is None:
            self._observer.on_stopped(instance_id)
            return
        self._spawn(self._stop(instance, graceful, reason))

    async def _stop(self, instance: Instance, graceful: bool, reason: str) -> None:
        if instance.stopping is not None:
            if not graceful and instance.sandbox is not None:
                await instance.sandbox.destroy()  # the exit hooks took too long
            return
        instance.stopping = reason
        if instance.start_task is not None and not instance.start_task.done():
            instance.start_task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await instance.start_task
        elif graceful and instance.connection is not None:
            try:
                reply = await asyncio.wait_for(
                    instance.connection.request({"type": "stop"}, expect="stopped"), _STOP_GRACE_S
                )
                if reply.type == "failed":
                    error = _plain_error(reply.header.get("error"))
                    self._output.drain(instance.id, instance.log_fds)
                    text = f"exit hook failed: {error['type']}: {error['message']}\n"
                    self._observer.on_log(instance.id, "system", text.encode(errors="replace"))
                    self._observer.on_log(instance.id, "stderr", error["traceback"].encode(errors="replace"))
            except TimeoutError:
                note = f"exit hooks did not end within {_STOP_GRACE_S:.0f} s; killed\n"
                self._observer.on_log(instance.id, "system", note.encode())
            except (InstanceCrashed, protocol.ProtocolError) as e:
                self._observer.on_log(instance.id, "system", f"stop: {e.message}\n".encode())
        await self._discard(instance)
        self._observer.on_stopped(instance.id)

    def _drop_sandbox(self, instance: Instance) -> None:
        """The instance goes on in another sandbox; nobody waits for the end of this one."""
        with instance.phases("teardown"):
            self._leave(instance)
            instance.process = None

    async def _discard(self, instance: Instance) -> None:
        """Nothing is left of an instance after this, also when whoever waits for it is cancelled."""
        if instance.discarding is None:
            instance.discarding = self._spawn(self._end(instance))
        await asyncio.shield(instance.discarding)

    async def _end(self, instance: Instance) -> None:
        await self._leave(instance)
        self._instances.pop(instance.id, None)
        if not _running(instance.commit_task):
            await self._abandon(instance)

    def _leave(self, instance: Instance) -> asyncio.Task[None]:
        """Begin to destroy the sandbox an instance is in, with all that hangs on it.

        In a task of its own: a start may be cancelled at any moment, and each of these ends must come.
        """
        ends = contextlib.AsyncExitStack()  # what is put on it last comes first
        pages, instance.pages = instance.pages, None
        if pages is not None:
            ends.push_async_callback(self._memory.drop, pages, instance.id)
        log_fds, instance.log_fds = instance.log_fds, {}
        ends.callback(self._output.close, instance.id, log_fds)
        sandbox, instance.sandbox = instance.sandbox, None
        if sandbox is not None:
            ends.push_async_callback(self._factory.release, sandbox)
        greeting, instance.greeting = instance.greeting, None
        connection, instance.connection = instance.connection, None
        ends.push_async_callback(_hang_up, greeting, connection)
        return self._spawn(_see_to(ends, instance.id))

    # Looking

    def find_snapshot(self, function_key: str, *, chip: str = "") -> str | None:
        wanted = self._gpus.class_of(self._worker_class, chip) if chip else self._worker_class
        found = self._catalogue.find(function_key, wanted.digest)
        return found.id if found is not None else None

    def _gpus_held(self) -> set[str]:
        return {gpu for i in self._instances.values() for gpu in i.request.gpus}

    def gpus(self) -> list[dict[str, Any]]:
        holders = {gpu: i.id for i in self._instances.values() for gpu in i.request.gpus}
        rows = []
        for row in self._health.view():
            holder = holders.get(row["gpu"], "")
            state = "set-aside" if row["why"] else "used" if holder else "free"
            rows.append({**row, "state": state, "container": holder})
        return rows

    async def check_gpus(self) -> None:
        await self._health.check()

    def snapshots_in_use(self) -> set[str]:
        used = {s for i in self._instances.values() for s in (i.snapshot_id, i.request.snapshot_id, i.zygote)}
        return {s for s in used if s is not None}

    def describe(self, instance_id: str) -> dict[str, Any] | None:
        instance = self._instances.get(instance_id)
        if instance is None:
            return None
        sandbox = instance.sandbox
        return {
            "id": instance.id,
            "app": instance.request.app,
            "function": instance.request.spec.tag,
            "mode": "restore" if instance.found else instance.request.mode,
            "stage": instance.stage,
            "storing": _running(instance.commit_task),
            "started": instance.started,
            "snapshot": instance.snapshot_id,
            "gpus": list(instance.request.gpus),
            "hostname": instance.hostname,
            "init_pid": sandbox.init_pid if sandbox else None,
            "pid": instance.process.host_pid if instance.process else None,
            "memory_bytes": sandbox.memory_current() if sandbox else None,
            "phases": instance.phases.to_list(),
        }

    async def execute(self, instance_id: str, argv: list[str], timeout: float) -> dict[str, Any]:
        instance = self._instances.get(instance_id)
        if instance is None or instance.sandbox is None:
            raise SandboxError(f"container {instance_id} is gone")
        if instance.stage == "capturing":
            raise SandboxError(f"container {instance_id} is being frozen; try again in a moment", code="exec")
        return await self._factory.execute(instance.sandbox, argv, self._env(instance), timeout)

    async def close(self) -> None:
        await self._zygotes.close()
        await self._health.close()
        for instance in list(self._instances.values()):
            self.stop(instance.id, graceful=False, reason="shutdown")
        while self._tasks:
            await asyncio.wait(set(self._tasks), timeout=30)
        await self._factory.close()
        await self._memory.close()
        await self.keeper.close()
        await self._gpus.close()


def _fetch_s(instance: Instance) -> float:
    """How long a start waits for the tier: one without a snapshot must still fit in."""
    return min(_FETCH_S, instance.request.spec.startup_timeout / 4)


def _limit_hit(instance: Instance) -> OutOfMemoryError:
    limit = instance.request.spec.resources.memory_mib
    return OutOfMemoryError(
        f"{instance.request.spec.tag} hit its memory limit"
        + (f" of {limit} MiB" if limit else "")
        + " and was killed; raise `memory=`",
        memory_mib=limit,
    )


def reseed_kernel_generators() -> None:
    """Make getrandom's user-space state (vDSO, glibc from 2.41 on) start anew in every process, thawed ones included.

    That state lies in the process's memory and so in the snapshot; the kernel has it refilled whenever its own
    generator was reseeded since.
    """
    with contextlib.suppress(OSError), open("/dev/urandom", "rb", buffering=0) as f:
        fcntl.ioctl(f, _RNDRESEEDCRNG)


def _known(what: str, error: Exception) -> WoodfrogError:
    """An error nobody foresaw is logged whole, and told in one line like any other."""
    if isinstance(error, WoodfrogError):
        return error
    log.error("%s failed unexpectedly", what, exc_info=error)
    return SandboxError(f"{what} failed unexpectedly: {type(error).__name__}: {error}", code="unexpected")


async def _send_close(connection: WorkerConnection, call_id: str) -> None:
    with contextlib.suppress(InstanceCrashed):  # whoever waits for the call's end hears of it
        await connection.send({"type": "close", "call": call_id})


async def _hang_up(greeting: asyncio.Task[WorkerConnection | None] | None, connection: WorkerConnection | None) -> None:
    if greeting is not None:
        greeting.cancel()  # the worker may never take what it is told
        await asyncio.wait({greeting})
        connection = None if greeting.cancelled() else greeting.result()
    if connection is not None:
        await connection.close()


async def _see_to(ends: contextlib.AsyncExitStack[bool | None], instance_id: str) -> None:
    """Each comes, whatever becomes of the others; nobody who waits for them can do anything about it."""
    try:
        await ends.aclose()
    except Exception:
        log.exception("%s: something of its sandbox is left", instance_id)


def _running(task: asyncio.Task[None] | None) -> bool:
    return task is not None and not task.done()


def _plain_error(raw: Any) -> dict[str, Any]:
    """The user's exception as plain text, whatever the worker sent."""
    data = raw if isinstance(raw, dict) else {}
    return {key: str(data.get(key, ""))[: 1 << 20] for key in ("type", "message", "traceback")}
