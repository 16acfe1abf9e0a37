"""Sandboxes for instances: a pool of prepared ones, their roots, their limits, their end."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import woodfrog
from woodfrog import protocol
from woodfrog.backends.gpus import library_path
from woodfrog.errors import SandboxError, WoodfrogError
from woodfrog.linux import cgroups, descriptors
from woodfrog.linux.meminfo import Room
from woodfrog.linux.network import Network
from woodfrog.linux.rootplan import APP, HOME, Beneath, DeviceNode, RootRequest, VolumeMount, etc_files, root_plan
from woodfrog.linux.sandbox import Limits, ProcessSpec, Sandbox, SandboxProcess, init_binary_path
from woodfrog.linux.skeleton import make_skeleton, private_skeletons, read_host_root
from woodfrog.settings import Settings
from woodfrog.spec import FunctionSpec, RuntimeSpec

__all__ = ["SandboxFactory"]

log = logging.getLogger("woodfrog")

_EXEC_LIMIT = 4 << 20
_REFILL_DELAY_S = 1.0
"""Preparing a sandbox takes 20 ms of a processor, and whoever took one needs them all for his start."""


class SandboxFactory:
    """Prepares sandboxes ahead of need and gives them their function's root."""

    def __init__(self, settings: Settings, groups: cgroups.Cgroups, network: Network) -> None:
        self._settings = settings
        self._groups = groups
        self._network = network
        self._root_seen = 0
        self._libraries = library_path(settings.cuda_dir)
        self._look_at_host()
        self._scratch = settings.home / "scratch"
        self._scratch.mkdir(mode=0o700, exist_ok=True)
        self._skeletons = private_skeletons(settings.home)
        settings.kdat_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        self._disk_bytes = (settings.disk_mib << 20) or memory // 4
        self._disk_limit = max(self._disk_bytes, memory * 3 // 4)
        self._ready: list[Sandbox] = []
        self._filling: asyncio.Task[None] | None = None
        self._wanted = asyncio.Event()
        self._count = 0
        self._all: set[Sandbox] = set()
        self._closed = False
        self.ahead: Callable[[Sandbox], Awaitable[None]] | None = None
        """Done in each sandbox that is prepared ahead of need."""
        self.package_root = Path(woodfrog.__file__).resolve().parent.parent

    @classmethod
    async def open(cls, settings: Settings) -> SandboxFactory:
        """Detect cgroups, clean up after a daemon that was killed.

        Raises:
            HostError: this machine cannot hold sandboxes; the message names the remedy.
        """
        groups = cgroups.detect(settings.tag)
        swept = await groups.sweep_leftovers()
        if swept:
            log.info("removed %d cgroups of a daemon that was killed", len(swept))
        network = Network(settings.network_bridge, settings.network_subnet)
        return cls(settings, groups, network)

    # The pool

    def start_filling(self) -> None:
        self._wanted.set()
        self._filling = asyncio.get_running_loop().create_task(self._fill())

    async def _fill(self) -> None:
        failures = 0
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            while len(self._ready) < self._settings.pool_size and not self._closed:
                try:
                    sandbox = await self._prepare(network=True)
                    if self.ahead is not None:
                        await self.ahead(sandbox)
                    self._ready.append(sandbox)
                    failures = 0
                except Exception as e:  # whatever it is, the next one may succeed
                    failures += 1
                    if failures == 1:
                        known = isinstance(e, WoodfrogError)
                        log.warning("cannot prepare a sandbox ahead: %s", e, exc_info=None if known else e)
                    await asyncio.sleep(min(30.0, 2.0**failures))

    async def _prepare(self, *, network: bool) -> Sandbox:
        self._count += 1
        name = f"{os.getpid()}-{self._count}"
        lease = await self._network.lease(name) if network else None
        sandbox = await Sandbox.prepare(
            name,
            init_binary=init_binary_path(),
            scratch=self._scratch,
            host=self._host,
            worker_uid=self._settings.worker_uid,
            limits=Limits(disk_bytes=self._disk_bytes),
            cgroups=self._groups,
            network=lease,
        )
        self._all.add(sandbox)
        return sandbox

    async def take(self, spec: FunctionSpec, *, background: bool = False) -> Sandbox:
        """A prepared sandbox with this function's limits.

        Args:
            background: one for work nobody waits for: the others go before it.

        Raises:
            SandboxError: none could be prepared.
        """
        sandbox = None
        while self._ready and sandbox is None and not background:
            sandbox = self._ready.pop(0)
            if not sandbox.alive:
                await self.release(sandbox)
                sandbox = None
        if not background:
            asyncio.get_running_loop().call_later(_REFILL_DELAY_S if self._ready else 0.0, self._wanted.set)
        if sandbox is None:
            sandbox = await self._prepare(network=not spec.block_network)
        memory = spec.resources.memory_mib
        try:
            await sandbox.set_limits(
                Limits(
                    memory_bytes=memory << 20 if memory else None,
                    cpus=spec.resources.cpu_limit,
                    cpu_share=spec.resources.cpu,
                    background=background,
                )
            )
        except Exception:  # nobody else knows of it
            await asyncio.shield(self.release(sandbox))
            raise
        return sandbox

    async def assemble(
        self,
        sandbox: Sandbox,
        *,
        spec: FunctionSpec,
        runtime: RuntimeSpec,
        code: Path | None,
        volumes: tuple[VolumeMount, ...],
        layers: tuple[Path, ...],
        shm: Path | None,
        hostname: str,
        devices: tuple[DeviceNode, ...] = (),
    ) -> None:
        """Give the sandbox its root."""
        settings = self._settings
        self._look_at_host()
        prefixes, lowest = self._base(runtime)
        lease = sandbox.network
        request = RootRequest(
            scratch=self._scratch,
            skeleton=lowest,
            disk_bytes=min(spec.resources.disk_mib << 20, self._disk_limit)
            if spec.resources.disk_mib
            else self._disk_bytes,
            hostname=hostname,
            worker_uid=settings.worker_uid,
            layers=layers,
            shm_layer=shm,
            code=code.parent if code is not None else None,
            prefixes=prefixes,
            named=self._named(prefixes),
            volumes=volumes,
            hidden=(settings.home,),
            etc=etc_files(
                self._host,
                hostname=hostname,
                worker_uid=settings.worker_uid,
                resolv_conf=self._network.resolver().text if lease is not None else "",
                address=lease.address if lease is not None and not spec.block_network else "",
            ),
            kdat_dir=settings.kdat_dir,
            devices=devices,
            network=not spec.block_network or lease is None,  # one made for such a function has none
        )
        await sandbox.assemble(root_plan(request, self._host))

    def _look_at_host(self) -> None:
        """See which top-level directories there are, again when some came or went: a daemon runs for months."""
        changed = os.stat("/").st_mtime_ns
        if changed != self._root_seen:
            self._host = read_host_root()
            self._bases: dict[RuntimeSpec, tuple[tuple[Path, ...], Path]] = {}
            self._root_seen = changed

    def _base(self, runtime: RuntimeSpec) -> tuple[tuple[Path, ...], Path]:
        """What every root for this Python environment shares: its prefixes and the lowest layer."""
        if runtime not in self._bases:
            prefixes = self._prefixes(runtime)
            lowest = make_skeleton(self._skeletons, self._host, prefixes, self._settings.worker_uid)
            self._bases[runtime] = (prefixes, lowest)
        return self._bases[runtime]

    def _named(self, prefixes: tuple[Path, ...]) -> tuple[tuple[Path, Beneath], ...]:
        """Where they are now, when others than root may name them: whose they are may exchange them at any time, also
        after the deploy, when it was seen that they are open to all."""
        if not (self._settings.socket_group or self._settings.listen):
            return ()
        owns = {Path(own).resolve() for own in (sys.prefix, sys.base_prefix, self.package_root)}
        found = []
        for prefix in prefixes:
            real = Path(os.path.realpath(prefix))
            foreign = not owns & {real, *real.parents}
            found.append((prefix, Beneath(Path("/"), real.parts[1:], open=foreign, recursive=True)))
        return tuple(found)

    def _prefixes(self, runtime: RuntimeSpec) -> tuple[Path, ...]:
        """Directories the interpreter needs, at the paths it knows them by and at their real ones."""
        wanted = [runtime.prefix, runtime.base_prefix, os.path.dirname(runtime.executable), *runtime.sys_path]
        wanted += [str(self.package_root), os.path.dirname(os.path.realpath(runtime.executable))]
        wanted += filter(None, self._libraries.split(os.pathsep))
        found: dict[Path, None] = {}
        for text in wanted:
            for path in (Path(text), Path(os.path.realpath(text))):
                if not path.is_absolute() or not path.is_dir() or path == Path("/"):
                    continue
                if path == self._settings.home or self._settings.home in path.parents:
                    raise SandboxError(
                        f"{path} is below woodfrog's state directory and cannot be part of an environment"
                    )
                found[path] = None
        return tuple(found)

    def room(self) -> Room | None:
        """What a limit on all sandboxes together leaves of memory."""
        return self._groups.room()

    def library_env(self) -> dict[str, str]:
        """Where programs find the GPU's library, if not where all libraries are."""
        return {"LD_LIBRARY_PATH": self._libraries} if self._libraries else {}

    async def spawn_worker(self, sandbox: Sandbox, runtime: RuntimeSpec) -> SandboxProcess:
        """Start a worker of this Python environment; it has no program yet."""
        uid = self._settings.worker_uid
        await sandbox.drop_prestarted()  # a capture would take it for a process that strayed
        return await sandbox.spawn(
            ProcessSpec(
                (runtime.executable, "-P", "-B", "-m", "woodfrog.worker"),
                env={
                    "PATH": "/usr/bin:/bin",
                    "HOME": HOME,
                    "LANG": "C.UTF-8",
                    "PYTHONPATH": str(self.package_root),
                    **self.library_env(),
                },
                uid=uid,
                gid=uid,
                inner_pid=protocol.WORKER_PID,
                stdout=protocol.WORKER_STDOUT,
                stderr=protocol.WORKER_STDERR,
                rlimits=descriptors.usual(),
                subreaper=True,
            )
        )

    async def execute(self, sandbox: Sandbox, argv: list[str], env: dict[str, str], timeout: float) -> dict[str, Any]:
        """Run a command as the worker's user, beside the worker."""
        uid = self._settings.worker_uid
        try:
            done = await sandbox.run(
                ProcessSpec(tuple(argv), env=env, uid=uid, gid=uid, cwd=APP, rlimits=descriptors.usual()),
                timeout,
                limit=_EXEC_LIMIT,
            )
        except SandboxError as e:
            if "errno" not in e.fields:
                raise
            reason = os.strerror(e.fields["errno"])
            raise SandboxError(f"{argv[0]} cannot be run in the container: {reason}", code="exec") from None
        return {
            "exit_code": done.status,
            "stdout": done.stdout.decode(errors="replace"),
            "stderr": done.stderr.decode(errors="replace"),
            "truncated": done.truncated,
        }

    async def release(self, sandbox: Sandbox) -> None:
        """Destroy a sandbox and all in it; what would not go is logged, not lost."""
        try:
            await sandbox.destroy()
        except SandboxError as e:
            log.error("%s", e.message)
        self._all.discard(sandbox)

    async def close(self) -> None:
        self._closed = True
        if self._filling is not None:
            self._filling.cancel()
            await asyncio.wait([self._filling])
        await asyncio.gather(*(self.release(s) for s in list(self._all)))
        await self._network.teardown()
