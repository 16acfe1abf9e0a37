"""What the parts of restore.py share: a process with device memory, outside every sandbox and in one; the machine
that they run on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import console

from engine_rig import SOCKET, Frozen, Rig
from woodfrog.backends.gpus import Gpus
from woodfrog.cuda.client import Cuda
from woodfrog.cuda.states import Move
from woodfrog.engine.engine import GpuSide
from woodfrog.linux import procfs
from woodfrog.linux.sandbox import Sandbox
from woodfrog.telemetry import Phases

PROGRAMS = Path(__file__).parent / "programs"
GIB = 1 << 30
MOVES: tuple[Move, ...] = ("lock", "checkpoint", "restore", "unlock")
SHARES = {"restore": 0.5, "bound": 0.65, "several": 0.8, "cycles": 1.0}
"""The parts in their order, and the share of the time that is over when each may begin no more."""
PAGES_UID = 64647
READY_S = 180.0
END_S = 60.0
ANSWER_S = 180.0
FAILURES = 3
"""So many in a row, and an arm or the cycles go no further."""


class Wrong(Exception):
    """An answer that is not what it should be, or none."""


def check(answer: dict[str, Any]) -> None:
    if answer.get("wrong") != 0 or not answer.get("pieces"):
        raise Wrong(f"device memory is not what it was: {answer}")


# A process outside every sandbox


class Holder:
    """programs/holder.py as a child of this process."""

    def __init__(self, folder: Path, size: int, env: dict[str, str]) -> None:
        self.size, self.path = size, folder / f"h{time.monotonic_ns()}.sock"
        self.process = subprocess.Popen(
            [sys.executable, "-B", str(PROGRAMS / "holder.py"), str(self.path), str(size)],
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def ready(self) -> None:
        assert self.process.stdout is not None and self.process.stderr is not None
        line = self.process.stdout.readline()
        self.process.stdout.close()
        if line != b"ready\n":
            raise Wrong(f"the process did not start: {self.process.stderr.read().decode(errors='replace')[-2000:]}")
        self.process.stderr.close()

    def check(self, how: str = "quick") -> None:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(ANSWER_S)
            connection.connect(str(self.path))
            connection.sendall(how.encode())
            with connection.makefile() as stream:
                check(json.loads(stream.readline() or "{}"))

    def end(self) -> None:
        self.process.kill()
        self.process.wait(END_S)
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def holders(bench: Bench, sizes: Sequence[int]) -> Iterator[list[Holder]]:
    made: list[Holder] = []
    try:
        made += [Holder(bench.home, size, bench.env) for size in sizes]
        for holder in made:
            holder.ready()
        yield made
    finally:
        for holder in made:
            holder.end()


# A process in a sandbox


@dataclass
class Bench:
    """What all parts share: where things go, sandboxes, the driver, one GPU."""

    home: Path
    rig: Rig
    gpus: Gpus
    env: dict[str, str]
    under: Path
    rounds: int
    cycles: int
    cycle_bytes: int
    copy_bytes: int
    begin: float = field(default_factory=time.monotonic)
    seconds: float = 0.0

    @property
    def cuda(self) -> Cuda:
        assert self.gpus.cuda is not None
        return self.gpus.cuda

    @property
    def uuid(self) -> str:
        return self.gpus.devices[0].uuid

    @property
    def side(self) -> GpuSide:
        side = self.gpus.side([self.uuid])
        assert isinstance(side, GpuSide)
        return side

    def over(self, part: str) -> bool:
        return time.monotonic() - self.begin >= self.seconds * SHARES[part]

    def left(self, part: str) -> float:
        return self.begin + self.seconds * SHARES[part] - time.monotonic()

    async def start(self, size: int) -> Sandbox:
        """programs/holder.py in a sandbox."""
        for name in ("holder.py", "raw.py"):
            shutil.copy(PROGRAMS / name, self.home / "code/app")
        sandbox = await self.rig.sandbox(gpus=(0,))
        try:
            await self.rig.spawn(sandbox, "holder.py", SOCKET, str(size), env=self.env)
            await self.check(sandbox, patience=READY_S)
        except BaseException:
            await self.end(sandbox)
            raise
        return sandbox

    async def check(self, sandbox: Sandbox, how: str = "quick", *, patience: float = 10.0) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + patience
        while True:
            try:
                connection = await sandbox.connect(SOCKET)
                break
            except OSError as e:
                if loop.time() > end or len(procfs.tree(sandbox.init_pid)) < 2:
                    raise Wrong(f"no process answers ({e}): {self.rig.stderr(sandbox)[-2000:]}") from None
                await asyncio.sleep(0.005)
        data = bytearray()
        with connection:
            async with asyncio.timeout(ANSWER_S):
                await loop.sock_sendall(connection, how.encode())
                while chunk := await loop.sock_recv(connection, 4096):
                    data += chunk
        check(json.loads(data or b"{}"))

    async def end(self, sandbox: Sandbox) -> None:
        await sandbox.destroy()
        if sandbox in self.rig.sandboxes:
            self.rig.sandboxes.remove(sandbox)

    async def freeze(self, sandbox: Sandbox, phases: Phases) -> Frozen:
        frozen = await self.rig.freeze(sandbox, phases=phases, gpu=self.side)
        await self.end(sandbox)
        return frozen

    async def device_mib(self) -> int | None:
        used = (await self.cuda.vitals(self.uuid)).used
        return None if used is None else used >> 20


def times(phases: Phases) -> dict[str, float]:
    """Of one piece of work; those that happen within another are not told apart by their names."""
    found: dict[str, float] = {}
    for phase in phases.items:
        found[phase.name] = round(found.get(phase.name, 0.0) + phase.ms, 3)
    return found


def rate(size: int, ms: float | None) -> float | None:
    return round(size / GIB / ms * 1e3, 3) if ms else None


def says(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip()[:2000]


def listed(title: str, phases: dict[str, float]) -> None:
    text = ", ".join(f"{k} {v:.1f}" for k, v in phases.items() if v >= 0.1)
    console.print(f"   [bold]{title}[/]: {text}", soft_wrap=True)
