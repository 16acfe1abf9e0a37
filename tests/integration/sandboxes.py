"""Real sandboxes for the tests of woodfrog.linux: their own directories, cgroup tag, bridge and addresses."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from woodfrog.linux import cgroups
from woodfrog.linux.network import Network
from woodfrog.linux.rootplan import HostRoot, RootRequest, etc_files, root_plan
from woodfrog.linux.sandbox import Completed, Limits, ProcessSpec, Sandbox, init_binary_path, prestart_path
from woodfrog.linux.skeleton import make_skeleton, read_host_root

UID = 64646
PREFIX = Path(sys.base_prefix)
PREFIXES = (PREFIX, prestart_path().parent)
"""Seen inside wherever this clone is, also below /tmp."""
PYTHON = f"{sys.base_prefix}/bin/python3"
ENV = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "PYTHONDONTWRITEBYTECODE": "1"}


@dataclass
class Yard:
    """Makes sandboxes, and remembers them so that a failed test leaves none behind."""

    base: Path
    host: HostRoot
    skeleton: Path
    scratch: Path
    groups: cgroups.Cgroups
    tag: str
    network: Network
    kdat_dir: Path
    sandboxes: list[Sandbox] = field(default_factory=list)
    made: int = 0

    @classmethod
    def make(cls) -> Yard:
        # In /tmp and not in pytest's directory: that one is only root's way, and the state directory's mask is tested.
        base = Path(tempfile.mkdtemp(prefix="woodfrog-test-"))
        base.chmod(0o755)
        (base / "secret").write_text("state")
        tag = f"t{os.getpid():x}{time.monotonic_ns() & 0xFFFF:04x}"
        host = read_host_root()
        scratch = base / "mnt"
        scratch.mkdir()
        kdat_dir = Path("/dev/shm") / f"woodfrog-test-{tag}"
        kdat_dir.mkdir(mode=0o700)
        return cls(
            base=base,
            host=host,
            skeleton=make_skeleton(base / "skeletons", host, PREFIXES, UID),
            scratch=scratch,
            groups=cgroups.detect(tag),
            tag=tag,
            network=Network(f"wf{tag[-8:]}", f"10.{200 + os.getpid() % 30}.{time.monotonic_ns() % 250}.0/24"),
            kdat_dir=kdat_dir,
        )

    def request(self, sandbox: Sandbox, **changes: object) -> RootRequest:
        address = sandbox.network.address if sandbox.network is not None else ""
        request = RootRequest(
            scratch=self.scratch,
            skeleton=self.skeleton,
            disk_bytes=64 << 20,
            hostname=f"frog-{sandbox.id}",
            worker_uid=UID,
            prefixes=PREFIXES,
            hidden=(self.base,),
            etc=etc_files(
                self.host,
                hostname=f"frog-{sandbox.id}",
                worker_uid=UID,
                resolv_conf=self.network.resolver().text,
                address=address,
            ),
            kdat_dir=self.kdat_dir,
        )
        return replace(request, **changes)  # type: ignore[arg-type]

    async def prepare(self, *, network: bool = False, limits: Limits | None = None, id: str = "") -> Sandbox:
        self.made += 1
        id = id or f"s{self.made}"
        sandbox = await Sandbox.prepare(
            id,
            init_binary=init_binary_path(),
            scratch=self.scratch,
            host=self.host,
            worker_uid=UID,
            limits=limits or Limits(memory_bytes=256 << 20, cpus=2.0),
            cgroups=self.groups,
            network=await self.network.lease(id) if network else None,
        )
        self.sandboxes.append(sandbox)
        return sandbox

    async def sandbox(self, *, network: bool = False, limits: Limits | None = None, **changes: object) -> Sandbox:
        sandbox = await self.prepare(network=network, limits=limits)
        await sandbox.assemble(root_plan(self.request(sandbox, **changes), self.host))
        return sandbox

    async def close(self) -> None:
        await asyncio.gather(*(s.destroy() for s in self.sandboxes))
        await self.network.teardown()
        await self.groups.sweep_leftovers()
        shutil.rmtree(self.base)
        shutil.rmtree(self.kdat_dir)


def worker_spec(*argv: str, env: Mapping[str, str] = ENV, **changes: object) -> ProcessSpec:
    """A process as user code runs."""
    return replace(ProcessSpec(argv, env=env, uid=UID, gid=UID), **changes)  # type: ignore[arg-type]


async def python(sandbox: Sandbox, code: str, timeout: float = 30) -> Completed:
    return await sandbox.run(worker_spec(PYTHON, "-c", code), timeout)


async def shell(sandbox: Sandbox, script: str, timeout: float = 30) -> Completed:
    return await sandbox.run(worker_spec("/bin/sh", "-c", script), timeout)
