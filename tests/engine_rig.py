"""What the engine's tests share: real sandboxes, a program in them that can be asked, freezing and thawing it."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from fake_cuda.hardware import Hardware
from woodfrog.backends.gpus import library_path
from woodfrog.criu.binary import Criu, find_criu
from woodfrog.engine.engine import AmdSide, DumpResult, GpuSide, Lazy, dump, restore
from woodfrog.linux import procfs
from woodfrog.linux.rootplan import DeviceNode, RootRequest, root_plan
from woodfrog.linux.sandbox import ProcessSpec, Sandbox, SandboxProcess, init_binary_path, prestart_path
from woodfrog.linux.skeleton import make_skeleton, read_host_root
from woodfrog.telemetry import Phases

UID = 64646
WORKER_PID = 100
SOCKET = "/run/woodfrog/worker/worker.sock"
PROGRAM = """
import ctypes, fcntl, mmap, os, select, signal, socket, struct, subprocess, sys, tempfile, threading, time, traceback
libc = ctypes.CDLL(None, use_errno=True)
keep = []
{setup}
def _answer(connection):
    try:
        return repr(check())
    except BaseException as e:
        return "raised " + repr(e)
_s = socket.socket(socket.AF_UNIX)
_s.bind("{socket}")
_s.listen(8)
while True:
    _c, _ = _s.accept()
    try:
        _c.sendall(_answer(_c).encode())
    except OSError:
        pass
    _c.close()
"""


@dataclass
class Frozen:
    """A snapshot by hand: images, the overlay's upper layer, /dev/shm."""

    images: Path
    fs: Path
    shm: Path
    result: DumpResult


@dataclass
class Rig:
    """Sandboxes of one test, all destroyed at its end."""

    home: Path
    criu: Criu
    sandboxes: list[Sandbox] = field(default_factory=list)
    hardware: Hardware | None = None
    """GPUs that sandboxes may be given."""
    nodes: Callable[[tuple[int, ...]], tuple[DeviceNode, ...]] | None = None
    """Device nodes of real ones."""
    said: dict[int, tuple[int, bytearray]] = field(default_factory=dict)
    """By init's pid: the end of the programs' standard error, and what was read of it."""

    @classmethod
    def make(cls, home: Path) -> Rig:
        named = os.environ.get("WOODFROG_CRIU")
        for name in ("mnt", "code/app", "files"):
            (home / name).mkdir(parents=True)
        # The worker's uid must reach the code below it.
        for path in (home, *home.parents):
            if path != Path("/tmp") and path.is_relative_to("/tmp"):
                path.chmod(0o755)
        return cls(home, find_criu(Path(named) if named else None))

    @property
    def kdat(self) -> Path:
        path = Path(f"/dev/shm/woodfrog-test-{os.getpid()}/criu")
        path.mkdir(parents=True, exist_ok=True)
        return path

    @property
    def libraries(self) -> list[str]:
        """Where the GPU's library is, if not where all libraries are."""
        path = library_path(str(self.hardware.folder) if self.hardware is not None else "")
        return list(filter(None, path.split(os.pathsep)))

    @property
    def prefixes(self) -> tuple[Path, ...]:
        prestart = prestart_path().parent  # also in a clone below /tmp
        places = (sys.base_prefix, self.criu.path.parents[1], prestart, self.home / "files", *self.libraries)
        return tuple({Path(p).resolve() for p in places})

    def devices(self, gpus: tuple[int, ...]) -> tuple[DeviceNode, ...]:
        if self.nodes is not None:
            return self.nodes(gpus)
        if self.hardware is None or not gpus:
            return ()
        names = ("nvidiactl", "nvidia-uvm", *(f"nvidia{i}" for i in gpus))
        return tuple(DeviceNode(p, p.name, p.is_dir()) for p in map(self.hardware.dev.joinpath, names))

    async def sandbox(
        self,
        *,
        layers: tuple[Path, ...] = (),
        shm: Path | None = None,
        disk: int = 1 << 30,
        gpus: tuple[int, ...] = (),
    ) -> Sandbox:
        host = read_host_root()
        skeleton = make_skeleton(self.home / "skeletons", host, self.prefixes, UID)
        sandbox = await Sandbox.prepare(
            f"t{uuid.uuid4().hex[:8]}",
            init_binary=init_binary_path(),
            scratch=self.home / "mnt",
            host=host,
            worker_uid=UID,
        )
        self.sandboxes.append(sandbox)
        request = RootRequest(
            scratch=self.home / "mnt",
            skeleton=skeleton,
            disk_bytes=disk,
            hostname="frog",
            worker_uid=UID,
            layers=layers,
            shm_layer=shm,
            code=self.home / "code",
            prefixes=self.prefixes,
            kdat_dir=self.kdat,
            devices=self.devices(gpus),
        )
        await sandbox.assemble(root_plan(request, host))
        return sandbox

    async def start(
        self, setup: str, *, env: Mapping[str, str] | None = None, seccomp: bool = True, gpus: tuple[int, ...] = ()
    ) -> tuple[Sandbox, SandboxProcess]:
        """Run a program: `setup` defines `check()`, whose repr every connection gets."""
        (self.home / "code/app/program.py").write_text(PROGRAM.replace("{setup}", setup).replace("{socket}", SOCKET))
        sandbox = await self.sandbox(gpus=gpus)
        library = {"LD_LIBRARY_PATH": os.pathsep.join(self.libraries)} if self.libraries else {}
        return sandbox, await self.spawn(sandbox, "program.py", env={**library, **(env or {})}, seccomp=seccomp)

    async def spawn(
        self, sandbox: Sandbox, program: str, *arguments: str, env: Mapping[str, str], seccomp: bool = True
    ) -> SandboxProcess:
        """Run a file of `code`, as the worker."""
        # Held from before its start: what it says last is gone when nobody reads a pipe that it closes.
        if sandbox.init_pid not in self.said:
            said = os.open(sandbox.path("/run/woodfrog/stderr"), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            self.said[sandbox.init_pid] = said, bytearray()
        return await sandbox.spawn(
            ProcessSpec(
                (sys._base_executable, "-B", f"/app/{program}", *arguments),
                env={"PATH": os.defpath, "HOME": "/tmp", **env},
                uid=UID,
                gid=UID,
                inner_pid=WORKER_PID,
                stdout="/run/woodfrog/stdout",
                stderr="/run/woodfrog/stderr",
                seccomp=seccomp,
            )
        )

    async def ask(self, sandbox: Sandbox, *, patience: float = 10.0) -> str:
        """The program's answer."""
        loop = asyncio.get_running_loop()
        end = loop.time() + patience
        while True:
            try:
                connection = await sandbox.connect(SOCKET)
                break
            except OSError:
                ended = len(procfs.tree(sandbox.init_pid)) < 2
                if ended or loop.time() > end:
                    why = "it ended" if ended else f"not within {patience:.0f} s"
                    raise AssertionError(f"no program answers ({why}): {self.stderr(sandbox)}") from None
                await asyncio.sleep(0.01)
        try:
            data = bytearray()
            async with asyncio.timeout(patience):
                while chunk := await loop.sock_recv(connection, 65536):
                    data += chunk
            return data.decode()
        finally:
            connection.close()

    async def nothing_runs(self, sandbox: Sandbox) -> None:
        """Only PID 1 is left, or will be in a moment: processes take a while to die."""
        for _ in range(100):
            left = procfs.tree(sandbox.init_pid)
            if left == (sandbox.init_pid,):
                return
            await asyncio.sleep(0.02)
        raise AssertionError(f"left running: {[procfs.status(p) for p in left[1:]]}")

    def stderr(self, sandbox: Sandbox) -> str:
        """What programs said so far that were started here, not thawed."""
        said, text = self.said.get(sandbox.init_pid, (-1, bytearray()))
        with suppress(OSError):
            while chunk := os.read(said, 65536):
                text += chunk
        return text.decode(errors="replace")

    def images(self) -> Path:
        path = self.home / f"snap-{uuid.uuid4().hex[:6]}"
        path.mkdir(mode=0o700)
        for name, mode in (("img", 0o700), ("fs", 0o755), ("shm", 0o1777)):
            (path / name).mkdir()
            (path / name).chmod(mode)
        return path / "img"

    async def freeze(
        self,
        sandbox: Sandbox,
        images: Path | None = None,
        phases: Phases | None = None,
        gpu: GpuSide | AmdSide | None = None,
    ) -> Frozen:
        images = images or self.images()
        result = await dump(
            sandbox, root_pid=WORKER_PID, images=images, criu=self.criu, phases=phases or Phases(), gpu=gpu
        )
        frozen = Frozen(images, images.parent / "fs", images.parent / "shm", result)
        for source, target in ((sandbox.upper_path(), frozen.fs), (sandbox.path("/dev/shm"), frozen.shm)):
            subprocess.run(["cp", "-a", f"{source}/.", f"{target}/"], check=True)
        await sandbox.destroy()
        return frozen

    async def thaw(
        self,
        frozen: Frozen,
        phases: Phases | None = None,
        gpu: GpuSide | AmdSide | None = None,
        gpus: tuple[int, ...] = (),
        lazy: Lazy | None = None,
    ) -> tuple[Sandbox, SandboxProcess]:
        sandbox = await self.sandbox(layers=(frozen.fs,), shm=frozen.shm, gpus=gpus)
        process = await restore(
            sandbox, images=frozen.images, criu=self.criu, phases=phases or Phases(), gpu=gpu, lazy=lazy
        )
        return sandbox, process

    async def close(self) -> None:
        for sandbox in self.sandboxes:
            await sandbox.destroy()
        for said, _ in self.said.values():
            os.close(said)
        self.said.clear()
        shutil.rmtree(self.kdat.parent, ignore_errors=True)
