"""Zygotes: snapshots of workers that have a program's heavy imports and have not been told yet what they will serve.

The first start of a program on new libraries is a plain one. Afterwards, when the machine is at rest, another worker
imports what that program imported first (`backends/imports.py`), and is frozen. Later starts that would go the same way
begin there.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import logging
import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from woodfrog import protocol
from woodfrog.backends.base import StartRequest
from woodfrog.backends.connection import connect
from woodfrog.backends.factory import SandboxFactory
from woodfrog.backends.imports import OURS, installed, local_source, scan, serves
from woodfrog.criu.binary import Criu
from woodfrog.errors import IncompatibleSnapshot, IntegrityError, StoreError, WoodfrogError
from woodfrog.linux.rootplan import APP, HOME
from woodfrog.linux.sandbox import Sandbox
from woodfrog.snapshot.capture import SnapshotIdentity, capture
from woodfrog.snapshot.catalogue import Catalogue, Staging
from woodfrog.snapshot.compat import WorkerClass
from woodfrog.snapshot.manifest import Manifest
from woodfrog.spec import RuntimeSpec, to_dict
from woodfrog.store.files import write_atomic
from woodfrog.telemetry import Phases, counters

__all__ = ["PER_INSTANCE", "Plan", "ZygoteConfig", "Zygotes", "basic_env", "load_key", "make_plan", "overlap"]

log = logging.getLogger("woodfrog")

PER_INSTANCE = frozenset({"MODAL_TASK_ID", "WOODFROG_APP", "WOODFROG_FUNCTION", "WOODFROG_INSTANCE"})
"""Variables that a zygote's imports do not see; they are set when it is told what it serves."""
_ATTEMPTS = 2
_CONFIG = (".cfg", ".conf", ".env", ".ini", ".json", ".toml", ".yaml", ".yml", "rc")
"""Ends of the names of files that a library may read from the working directory while it is imported."""
_CONFIG_BYTES = 4 << 20
_KEY_BYTES = 32
_REST_S = 1.0
"""Nothing must have been starting for so long before a zygote is made."""
_PATIENCE_S = 60.0
"""A machine that never rests makes its zygotes after so long all the same."""
_MAKE_S = 900.0
_AGAIN_S = 900.0
"""One that had to go for others is not made again within so long."""
_FREEZE_S = 120.0
_OUTPUT_BYTES = 64 << 10
_STREAMS = {"stdout": protocol.WORKER_STDOUT, "stderr": protocol.WORKER_STDERR}


@dataclass(frozen=True)
class Plan:
    """How a program begins: what a zygote for it would be made of, and what finds one.

    Args:
        key: what its imports can see of their surroundings. `base` is the same for woodfrog's own, which see nothing.
        steps: see `backends/imports.py`.
        names: top-level modules of the program's own.
    """

    key: str
    base: str
    steps: tuple[str, ...]
    names: frozenset[str]
    hide_gpu: bool = False

    @property
    def own(self) -> Plan:
        """A zygote with nothing but woodfrog's own imports: any program may start from it."""
        return Plan(self.base, self.base, (OURS,), frozenset())


@dataclass(frozen=True)
class ZygoteConfig:
    """Args:
    key: path of the key that keeps secret values out of names (`load_key`).
    keep: how many are kept.
    min_ms: imports that take less are not worth one.
    """

    key: Path
    spool: Path
    enabled: bool = True
    keep: int = 4
    min_ms: float = 50


@dataclass(frozen=True)
class _Job:
    request: StartRequest
    env: dict[str, str]
    code: Path | None
    plan: Plan


@dataclass
class _Output:
    """What a worker prints while it imports."""

    sandbox: Sandbox
    data: dict[str, bytearray] = field(default_factory=dict)
    fds: dict[int, str] = field(default_factory=dict)

    def __enter__(self) -> _Output:
        loop = asyncio.get_running_loop()
        for stream, inner in _STREAMS.items():
            fd = os.open(self.sandbox.path(inner), os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            self.fds[fd], self.data[stream] = stream, bytearray()
            loop.add_reader(fd, self._read, fd)
        return self

    def _read(self, fd: int) -> None:
        with contextlib.suppress(BlockingIOError):
            kept = self.data[self.fds[fd]]
            kept += os.read(fd, 1 << 16)[: max(0, _OUTPUT_BYTES - len(kept))]

    def drain(self) -> None:
        """What lies in the pipes would be printed by every copy."""
        for fd, stream in self.fds.items():
            with contextlib.suppress(BlockingIOError):
                while data := os.read(fd, 1 << 16):
                    self.data[stream] += data[: max(0, _OUTPUT_BYTES - len(self.data[stream]))]

    def __exit__(self, *exc: object) -> None:
        for fd in self.fds:
            asyncio.get_running_loop().remove_reader(fd)
            os.close(fd)


class _Never(WoodfrogError):
    """Why there can be no zygote of a plan."""


def basic_env(runtime: RuntimeSpec) -> dict[str, str]:
    """What every worker has in its environment, before the function's own."""
    return {
        "PATH": f"{os.path.dirname(runtime.executable)}:/usr/local/bin:/usr/bin:/bin",
        "HOME": HOME,
        "USER": "woodfrog",
        "LOGNAME": "woodfrog",
        "LANG": "C.UTF-8",
        "TMPDIR": "/tmp",
        # Else these listen on the sandbox's own address, which a copy does not have, and nothing that uses
        # torch.distributed (vLLM with one GPU, too) could be captured. From outside nobody reaches a sandbox anyway.
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
    }


def load_key(path: Path) -> bytes:
    """The machine's key for names that are made from secret values too; made on first use, mode 0600.

    Raises:
        StoreError: it cannot be read or written.
    """
    try:
        if path.stat().st_mode & 0o077 == 0 and len(key := path.read_bytes()) == _KEY_BYTES:
            return key
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as e:
        raise StoreError(f"cannot read {path}: {e.strerror}", code="zygote-key") from e
    # Whoever could read the old one could try values against the names made with it: those are not found any more.
    key = os.urandom(_KEY_BYTES)
    write_atomic(path, key)
    return key


def overlap(one: str, other: str) -> bool:
    """Whether one path is the other, or is below it.

    >>> overlap("/usr/lib", "/usr"), overlap("/usr", "/usr/lib"), overlap("/usr", "/usr2")
    (True, True, False)
    """
    a, b = os.path.normpath(one) + "/", os.path.normpath(other) + "/"
    return a.startswith(b) or b.startswith(a)


def make_plan(
    module: str,
    root: Path,
    runtime: RuntimeSpec,
    env: Mapping[str, str],
    *,
    key: bytes,
    hide_gpu: bool = False,
    network: bool = True,
) -> Plan | None:
    """How the program below `root` begins; None = nobody can know.

    Raises:
        OSError: the source cannot be read.
    """
    entries = sorted(os.scandir(root), key=lambda e: e.name)
    if any(e.name.endswith((".dist-info", ".egg-info")) for e in entries):
        return None  # what libraries find installed would depend on the program's own directory
    steps = scan(module, local_source(root), installed(runtime.sys_path))
    if not steps:
        return None
    config = []
    for entry in entries:
        if entry.name.endswith(_CONFIG) and entry.is_file():
            small = entry.stat().st_size <= _CONFIG_BYTES
            # With a large one a program shares its zygote with nobody: the path has its code's digest in it.
            content = hashlib.sha256(Path(entry.path).read_bytes()).hexdigest() if small else str(root)
            config.append((entry.name, content))
    seen = sorted((k, v) for k, v in env.items() if k not in PER_INSTANCE)

    def digest(*parts: Any) -> str:
        return hmac.digest(key, json.dumps([to_dict(runtime), *parts]).encode(), "sha256").hex()[:32]

    names = frozenset(entry.name.partition(".")[0] for entry in entries)
    return Plan(digest(seen, hide_gpu, network, config), digest(), steps, names, hide_gpu)


class Zygotes:
    """Which zygotes there are, which a start may begin from, and when another is made."""

    def __init__(
        self,
        config: ZygoteConfig,
        *,
        catalogue: Catalogue,
        factory: SandboxFactory,
        criu: Criu,
        worker_class: WorkerClass,
        busy: Callable[[], bool],
        in_use: Callable[[], set[str]],
    ) -> None:
        self._config = config
        self._catalogue = catalogue
        self._factory = factory
        self._criu = criu
        self._worker_class = worker_class
        self._busy = busy
        self._in_use = in_use
        self._key = load_key(config.key) if config.enabled else b""
        self._plans: dict[Any, Plan | None] = {}
        self._failures: Counter[Any] = Counter()
        """By zygote, by plan, by function key."""
        self._used: dict[str, int] = {}
        self._count = 0
        self._jobs: dict[tuple[str, tuple[str, ...]], _Job] = {}
        self._maker: asyncio.Task[None] | None = None
        self._trimmed: dict[tuple[str, tuple[str, ...]], float] = {}
        self._closed = False

    # Which

    @staticmethod
    def function_key(key: str) -> str:
        return f"zygote-{key}"

    async def plan(self, request: StartRequest, env: Mapping[str, str], code: Path | None) -> Plan | None:
        """How this program begins; None = it starts plainly."""
        spec = request.spec
        hide_gpu = spec.snapshot.enabled and not spec.snapshot.gpu
        if (
            not self._config.enabled
            or spec.plain_start
            or spec.source.kind != "module"
            or code is None
            or (spec.resources.gpu and not hide_gpu)
            or self._failures[request.function_key] >= _ATTEMPTS
        ):
            return None
        fixed = (*request.runtime.sys_path, HOME, APP)
        for volume in spec.volumes:
            # What the libraries are, or find, would depend on what the volume holds.
            if any(overlap(volume.path, inner) for inner in fixed) or any(volume.path in v for v in env.values()):
                return None
        seen = tuple(sorted((k, v) for k, v in env.items() if k not in PER_INSTANCE))
        known = (spec.source, request.runtime, seen, hide_gpu, spec.block_network)
        if known not in self._plans:
            while len(self._plans) > 256:
                del self._plans[next(iter(self._plans))]
            try:
                self._plans[known] = await asyncio.to_thread(
                    make_plan,
                    spec.source.module,
                    code,
                    request.runtime,
                    env,
                    key=self._key,
                    hide_gpu=hide_gpu,
                    network=not spec.block_network,
                )
            except OSError:
                return None  # the plain start tells what is wrong
        return self._plans[known]

    def find(self, plan: Plan) -> Manifest | None:
        """Of the zygotes that are on this program's way, the one that is furthest."""
        keys = {self.function_key(plan.key), self.function_key(plan.base)}
        found: tuple[int, Manifest] | None = None
        for manifest in self._catalogue.manifests():
            if (
                manifest.function_key in keys
                and manifest.worker_class == self._worker_class.digest
                and self._catalogue.retired(manifest.id) is None
                and self._failures[manifest.id] < _ATTEMPTS
                and serves(manifest.modules, plan.steps)
                and plan.names.isdisjoint(manifest.seen)
            ):
                length = sum(not step.startswith("(") for step in manifest.modules)
                if found is None or length >= found[0]:
                    found = length, manifest
        if found is None:
            return None
        self._count += 1
        self._used[found[1].id] = self._count
        return found[1]

    def failed(self, zygote_id: str, error: Exception) -> None:
        """A start from it came to nothing. One that is damaged or out of date is not used again."""
        counters["zygote.failed"] += 1
        if getattr(error, "snapshot_at_fault", False) or isinstance(error, (IntegrityError, IncompatibleSnapshot)):
            self._catalogue.retire(zygote_id, str(error))
        else:
            self._failures[zygote_id] += _ATTEMPTS if isinstance(error, TimeoutError) else 1
        log.warning("zygote %s: %s; plain start instead", zygote_id, _text(error))

    def unfit(self, request: StartRequest, error: Exception) -> None:
        """What came out of it cannot be frozen, or not be thawed: perhaps it can after a plain start."""
        if not isinstance(error, StoreError):
            self._failures[request.function_key] = _ATTEMPTS
            log.warning("%s: %s; it starts plainly from now on", request.spec.tag, _text(error))

    def printed(self, zygote_id: str) -> list[tuple[str, bytes]]:
        """What its imports printed, by stream."""
        found = []
        for stream in _STREAMS:
            with contextlib.suppress(OSError):
                data = (self._catalogue.path(zygote_id) / "log" / stream).read_bytes()
                found.append((stream, data[:_OUTPUT_BYTES]))
        return found

    # Making

    def started(self, request: StartRequest, env: dict[str, str], code: Path, plan: Plan, import_ms: float) -> None:
        """A program has come up, its own imports having taken so long: perhaps the next may begin further on."""
        if self._closed:
            return
        wanted = [plan.own] if OURS in plan.steps else []
        if import_ms >= self._config.min_ms and plan.steps != (OURS,):
            wanted.append(plan)
        for one in wanted:
            if self._worth(one):
                own = one.key == one.base
                job = _Job(request, basic_env(request.runtime) if own else env, None if own else code, one)
                self._jobs.setdefault((one.key, one.steps), job)
        if self._jobs and self._maker is None:
            self._maker = asyncio.get_running_loop().create_task(self._make_all())

    def _worth(self, plan: Plan) -> bool:
        """Whether there is none yet that has all of it."""
        if self._failures[plan.key, plan.steps] >= _ATTEMPTS:
            return False
        name = self.function_key(plan.key), plan.steps
        if time.monotonic() - self._trimmed.get(name, -_AGAIN_S) < _AGAIN_S:
            return False  # more are wanted than are kept: making them in turn would never end
        return not any(
            _name(m) == name and m.worker_class == self._worker_class.digest and self._catalogue.retired(m.id) is None
            for m in self._catalogue.manifests()
        )

    async def _make_all(self) -> None:
        try:
            while self._jobs:
                await self._rest()
                name = next(iter(self._jobs))
                job = self._jobs.pop(name)
                try:
                    async with asyncio.timeout(_MAKE_S):
                        await self._make(job)
                except Exception as e:
                    self._failures[name] += _ATTEMPTS if isinstance(e, _Never) else 1
                    if not isinstance(e, (WoodfrogError, TimeoutError)):
                        log.error("making a zygote failed unexpectedly", exc_info=e)
                    log.info("no zygote of %s: %s", ", ".join(job.plan.steps), _text(e))
        finally:
            self._maker = None

    async def _rest(self) -> None:
        """Whoever starts now has the machine to himself."""
        loop = asyncio.get_running_loop()
        begin = quiet = loop.time()
        while loop.time() - quiet < _REST_S and loop.time() - begin < _PATIENCE_S:
            await asyncio.sleep(_REST_S / 4)
            if self._busy():
                quiet = loop.time()

    async def _make(self, job: _Job) -> None:
        """Import in a worker of its own, and freeze it."""
        phases = Phases()
        with phases("sandbox"):
            sandbox = await self._factory.take(job.request.spec, background=True)
        staging = None
        try:
            await self._factory.assemble(
                sandbox,
                spec=job.request.spec,
                runtime=job.request.runtime,
                code=job.code,
                volumes=(),
                layers=(),
                shm=None,
                hostname=sandbox.id,
            )
            with _Output(sandbox) as output:
                modules, seen, files = await self._preload(job, sandbox, phases)
                output.drain()
                identity = SnapshotIdentity(
                    id=f"z-{uuid.uuid4().hex[:12]}",
                    function_key=self.function_key(job.plan.key),
                    worker_class=self._worker_class,
                    app="",
                    tag="(zygote)",
                    params_digest="",
                    modules=modules,
                    seen=seen,
                    sources=files,
                )
                staging = self._catalogue.begin(identity.id)
                draft = await self._capture(sandbox, staging, identity, phases)
            for stream, data in output.data.items():
                if data:
                    (staging.log / stream).write_bytes(data)
            commit = asyncio.ensure_future(asyncio.to_thread(self._catalogue.commit, staging, draft))
            try:
                await asyncio.shield(commit)
            except asyncio.CancelledError:
                await asyncio.wait({commit})
                raise
            staging = None
        finally:
            await asyncio.shield(self._leave(sandbox, staging))
        self._count += 1
        self._used[identity.id] = self._count
        counters["zygote.made"] += 1
        log.info("zygote %s made: %s", identity.id, ", ".join(modules))
        self.trim()

    async def _leave(self, sandbox: Sandbox, staging: Staging | None) -> None:
        await self._factory.release(sandbox)
        if staging is not None:
            await asyncio.to_thread(self._catalogue.abandon, staging)

    async def _preload(
        self, job: _Job, sandbox: Sandbox, phases: Phases
    ) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        """A worker that has gone the steps and blocks in accept(): what it did, looked for and loaded.

        Raises:
            _Never: another time it would be the same.
        """
        with phases("spawn"):
            process = await self._factory.spawn_worker(sandbox, job.request.runtime)
            connection = await connect(sandbox, process, self._config.spool)
        try:
            message = protocol.PreloadMessage(
                steps=list(job.plan.steps),
                sys_path=list(job.request.runtime.sys_path),
                env={k: v for k, v in job.env.items() if k not in PER_INSTANCE},
                hide_gpu=job.plan.hide_gpu,
            )
            with phases("preload"):
                reply = _checked(await connection.request(message.header(), expect="preloaded"))
            seen, files = _texts(reply.get("seen")), _texts(reply.get("files"))
            cpu_ms = reply.get("cpu_ms")
            if not job.plan.names.isdisjoint(seen):
                raise _Never("the program has a module of a name that the libraries look for")
            if job.plan.steps != (OURS,) and isinstance(cpu_ms, (int, float)) and cpu_ms < self._config.min_ms:
                raise _Never(f"its imports took {cpu_ms:.0f} ms: the time goes into the program's own code")
            with phases("freeze"):
                _checked(await asyncio.wait_for(connection.request({"type": "freeze"}, expect="frozen"), _FREEZE_S))
                await connection.wait_closed_by_worker(10.0)
            return _texts(reply.get("steps")), seen, files
        finally:
            await connection.close()

    async def _capture(
        self, sandbox: Sandbox, staging: Staging, identity: SnapshotIdentity, phases: Phases
    ) -> Manifest:
        with phases("capture"):
            draft = await capture(
                sandbox,
                root_pid=protocol.WORKER_PID,
                staging=staging,
                identity=identity,
                criu=self._criu,
                phases=phases,
            )
        return replace(draft, phases=tuple(f"{p.name}={p.ms:.1f}" for p in phases.items))

    def trim(self) -> None:
        """Remove the retired and the longest unused beyond the number kept; not those that some instance rests on."""
        ours = [m for m in self._catalogue.manifests() if m.kind == "zygote"]
        good = [m for m in ours if m.worker_class == self._worker_class.digest and not self._catalogue.retired(m.id)]
        good.sort(key=lambda m: (self._used.get(m.id, 0), m.created))
        kept = {m.id for m in good[-self._config.keep :]} if self._config.keep else set()
        for manifest in ours:
            if manifest.id not in kept | self._in_use():
                if self._catalogue.retired(manifest.id) is None:
                    self._trimmed[_name(manifest)] = time.monotonic()
                try:
                    self._catalogue.remove(manifest.id, wait=False)
                except StoreError as e:
                    log.error("%s", e.message)

    async def close(self) -> None:
        """Stop making them."""
        self._closed = True
        self._jobs.clear()
        if self._maker is not None:
            self._maker.cancel()
            await asyncio.wait({self._maker})


def _name(manifest: Manifest) -> tuple[str, tuple[str, ...]]:
    return manifest.function_key, tuple(step.strip("()") for step in manifest.modules)


def _checked(reply: Any) -> dict[str, Any]:
    header: dict[str, Any] = reply.header
    if header["type"] == "failed":
        error = header.get("error") or {}
        raise _Never(f"{error.get('type', '?')}: {error.get('message', '')}"[:500])
    return header


def _text(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "it took too long"
    return error.message if isinstance(error, WoodfrogError) else f"{type(error).__name__}: {error}"


def _texts(raw: Any) -> tuple[str, ...]:
    """A list of texts, whatever the worker sent."""
    return tuple(str(text)[:4096] for text in raw[:100_000]) if isinstance(raw, list) else ()
