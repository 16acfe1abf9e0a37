"""Plain `criu restore` of a snapshot that woodfrog made, in a sandbox prepared beforehand, without the daemon.

The command is the engine's own, with the kernel-feature cache in place. Timed from the request to start criu, to the
first answer over the worker's socket. The worker wants its start message first, which renews its random generators:
that is woodfrog's doing and taken off again, except for the user's own hooks.
"""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

import cloudpickle
from common import Daemon

from woodfrog import protocol
from woodfrog.backends.connection import Payload, WorkerConnection
from woodfrog.backends.factory import SandboxFactory
from woodfrog.criu.binary import find_criu
from woodfrog.criu.options import check_command, environment, restore_command
from woodfrog.engine.plan import CACHE, FACTS, IMAGES, WORK, parse_facts, restore_plan
from woodfrog.linux.sandbox import ProcessSpec, Sandbox
from woodfrog.spec import AppSpec, FunctionSpec
from woodfrog.store.content import ContentStore

USER_HOOKS = ("after_restore", "enter_restore")
SETTLE_S = 0.3
"""A prepared sandbox has been waiting for a while."""


@dataclass(frozen=True)
class Plain:
    """One restore. Milliseconds; `ms` is the whole, from exec to answer, without the renewal (`wake`)."""

    ms: float
    criu: float
    connect: float
    wake: float
    run: float
    answer: object


class PlainRestore:
    """Restores the snapshots of one daemon by hand.

    Example:
        done = await PlainRestore(daemon).restore(app_spec, "s-0123456789ab", 7)
    """

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon.home
        self._content = ContentStore(daemon.home)
        home = daemon.home / "plain"
        home.mkdir(exist_ok=True)
        home.chmod(0o755)
        # A tag of its own, so that its sandboxes are not swept as somebody else's; no pool.
        self._settings = replace(daemon.settings, home=home, pool_size=0)
        self._criu = find_criu(Path(daemon.settings.criu) if daemon.settings.criu else None)
        self._factory: SandboxFactory | None = None

    async def _root(self, app: AppSpec, spec: FunctionSpec, snapshot: Path) -> Sandbox:
        if self._factory is None:
            self._factory = await SandboxFactory.open(self._settings)
        sandbox = await self._factory.take(spec)
        await self._factory.assemble(
            sandbox,
            spec=spec,
            runtime=app.runtime,
            code=self._content.code_path(spec.source.code_digest) if spec.source.code_digest else None,
            volumes=(),
            layers=(snapshot / "fs",),
            shm=snapshot / "shm",
            hostname="plain",
        )
        return sandbox

    def _criu_spec(self, argv: tuple[str, ...]) -> ProcessSpec:
        return ProcessSpec(argv, env=environment(CACHE), caps="held", no_new_privs=False, seccomp=False, umask=0o077)

    async def restore(self, app: AppSpec, snapshot_id: str, request: object, method: str = "run") -> Plain:
        """Restore once and ask once."""
        spec = app.functions[0]
        snapshot = self._daemon / "snapshots" / snapshot_id
        images = snapshot / "img"
        sandbox = await self._root(app, spec, snapshot)
        connection: WorkerConnection | None = None
        try:
            if not sandbox.path(f"{CACHE}/criu.kdat").exists():
                await sandbox.run(self._criu_spec(check_command(str(self._criu.path))), 60)
            facts = parse_facts((images / FACTS).read_text())
            plan = restore_plan(facts, monotonic_ns=time.monotonic_ns())
            command = self._criu_spec(restore_command(str(self._criu.path), plan))
            await sandbox.bind(images, IMAGES, read_only=True)
            await sandbox.set_last_pid(facts.max_pid)
            start = protocol.StartContext(
                instance_id="plain",
                hostname="plain",
                restored=True,
                snapshot_id=snapshot_id,
                entropy=os.urandom(64).hex(),
                wall_clock=time.time(),
                env={"PATH": os.defpath, "HOME": "/tmp"},
            ).header()
            call = {"type": "call", "call": uuid.uuid4().hex, "method": method, "encoding": "pickle"}
            body = Payload(data=cloudpickle.dumps(((request,), {})))
            await asyncio.sleep(SETTLE_S)

            begin = time.perf_counter()
            process = await sandbox.spawn(command)
            status = await process.wait()
            restored = time.perf_counter()
            if status != 0:
                said = sandbox.path(f"{WORK}/restore.log").read_text()
                raise SystemExit(f"criu restore ended with {status}:\n{said}")
            connection = await WorkerConnection.open(
                lambda: sandbox.connect(protocol.WORKER_SOCKET), timeout=5, spool=self._settings.home,
                gone=asyncio.get_running_loop().create_future(),
            )  # fmt: skip
            connected = time.perf_counter()
            ready = await connection.request(start, expect="ready")
            woken = time.perf_counter()
            reply = await connection.request(call, body, expect="result")
            end = time.perf_counter()

            if reply.type != "result":
                raise SystemExit(f"the restored worker failed: {ready.header} {reply.header}")
            hooks = sum(float(ready.header["phases"].get(name, 0.0)) for name in USER_HOOKS)
            wake = (woken - connected) * 1e3 - hooks
            return Plain(
                (end - begin) * 1e3 - wake, (restored - begin) * 1e3, (connected - restored) * 1e3, wake,
                (end - woken) * 1e3, cloudpickle.loads(reply.body.read()),
            )  # fmt: skip
        finally:
            if connection is not None:
                await connection.close()
            await self._factory.release(sandbox)  # type: ignore[union-attr]

    async def close(self) -> None:
        if self._factory is not None:
            await self._factory.close()
