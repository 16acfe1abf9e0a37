"""GPU state of a tree: into its processes' own memory before CRIU dumps them, and back onto GPUs after the restore."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from woodfrog.cuda.client import Cuda
from woodfrog.cuda.devices import device_map
from woodfrog.cuda.failures import gpu_error
from woodfrog.cuda.states import Move, State, way_back
from woodfrog.engine.inspect import Task, Tree
from woodfrog.engine.plan import GpuFacts
from woodfrog.errors import GpuError
from woodfrog.linux import procfs
from woodfrog.telemetry import Phases

__all__ = ["GpuCapture", "GpuSide", "added", "plan_back", "put_back"]

_LEAST_GROWTH = 64 << 10
"""Less is the process's own."""


@dataclass(frozen=True)
class GpuSide:
    """The GPUs of one sandbox: who calls the driver, and what the processes see.

    Args:
        uuids: in the order in which the processes see them.
    """

    cuda: Cuda
    uuids: tuple[str, ...]


@dataclass
class _Process:
    pid: int
    inner_pid: int
    name: str
    held: int | None = None
    """Bytes of device memory, as NVML says; None = not known."""
    most: int = 0
    """That, or what is in use of its GPUs by anybody: how long its memory may take to move goes by it."""
    before: tuple[procfs.Resident, ...] = ()
    """Its host memory before it was checkpointed, and `saved`: what that added to it."""
    saved: tuple[tuple[int, int], ...] = ()
    grown: int = 0
    """Bytes."""

    @property
    def who(self) -> str:
        return f"process {self.inner_pid} ({self.name})"


async def _all(work: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Do all at once: processes of one program may wait for one another. The first failure is raised when all ended,
    so that what became of each is known."""
    done = await asyncio.gather(*work, return_exceptions=True)
    for result in done:
        if isinstance(result, BaseException):
            raise result
    return done


def added(before: Sequence[procfs.Resident], after: Sequence[procfs.Resident]) -> tuple[tuple[int, int], ...]:
    """The addresses, begin and end, at which a process has got memory: where a driver put what it saved.

    The kernel joins neighbouring mappings: of one that grew, what was not mapped before counts. All of it counts where
    that is too little: it was reserved, and has been filled since.
    """
    found: list[tuple[int, int]] = []
    first = 0
    for now in after:
        while first < len(before) and before[first].end <= now.begin:
            first += 1
        growth, fresh, at = now.own, [], now.begin
        for then in before[first:]:
            if then.begin >= now.end:
                break
            growth -= then.own
            if at < then.begin:
                fresh.append((at, then.begin))
            at = max(at, then.end)
        if at < now.end:
            fresh.append((at, now.end))
        if growth >= _LEAST_GROWTH:
            enough = sum(end - begin for begin, end in fresh) >= growth
            found += fresh if enough else [(now.begin, now.end)]
    return tuple(found)


async def _move(
    cuda: Cuda, pid: int, who: str, move: Move, *, size: int = 0, pairs: Sequence[tuple[str, str]] = ()
) -> None:
    """`Cuda.move`, with the process named as people know it: by its pid in the sandbox."""
    try:
        await cuda.move(pid, move, size=size, pairs=pairs)
    except GpuError as e:
        e.message = e.message.replace(f"process {pid}", who)
        e.args = (e.message,)
        raise


@dataclass
class GpuCapture:
    """The processes of a tree that have GPU state, and how far they are on the way into host memory."""

    side: GpuSide
    known: dict[int, bool] = field(default_factory=dict)
    """By host pid: whether the driver knows it. Those it was asked about."""
    processes: list[_Process] = field(default_factory=list)

    @property
    def peers(self) -> bool:
        """Whether this driver can checkpoint memory that processes share."""
        node = self.side.cuda.node
        return node is not None and node.peers

    async def find(self, tree: Tree) -> None:
        """Ask the driver for every process that may have GPU state, not only the root.

        Raises:
            GpuError: it cannot be known.
        """
        cuda = self.side.cuda
        await cuda.start()
        asked = [t for t in tree.tasks if t.gpu_devices or t.cuda]
        states = await _all([self._state(t) for t in asked])
        self.known = {t.pid: state is not None for t, state in zip(asked, states, strict=True)}
        self.processes = [_Process(t.pid, t.inner_pid, t.name) for t in asked if self.known[t.pid]]

    async def _state(self, task: Task) -> State | None:
        try:
            return await self.side.cuda.state(task.pid)
        except GpuError as e:
            if task.gpu_devices or e.code not in ("gpu-driver", "gpu-not-permitted"):
                raise
            return None  # it has the library loaded, and nothing of a GPU

    async def save(self, phases: Phases) -> None:
        """Bring all device memory into host memory. After a failure: `bring_back`.

        Raises:
            GpuError: with the process and the driver's answer.
        """
        cuda = self.side.cuda
        with phases("gpu.lock"):
            await _all([self._move(p, "lock") for p in self.processes])
        with phases("gpu.checkpoint"):
            for process, held in zip(
                self.processes, await _all([cuda.held(p.pid) for p in self.processes]), strict=True
            ):
                process.held, process.before = held, await asyncio.to_thread(procfs.resident, process.pid)
                process.most = held if held is not None else await self._used()
            await _all([self._move(p, "checkpoint", size=p.most) for p in self.processes])
        with phases("gpu.check"):
            # A checkpoint that saved nothing would make an image that restores to garbage.
            for process, state in zip(
                self.processes, await _all([cuda.state(p.pid) for p in self.processes]), strict=True
            ):
                if state is not State.CHECKPOINTED:
                    got = state.name if state is not None else "gone"
                    raise gpu_error("gpu-illegal-move", f"{process.who} is {got}, not CHECKPOINTED", pid=process.pid)
                now = await asyncio.to_thread(procfs.resident, process.pid)
                process.saved = added(process.before, now)
                process.grown = max(
                    sum(r.own + r.shared for r in now) - sum(r.own + r.shared for r in process.before), 0
                )
                process.before = ()
                # What it held and need not be saved (contexts, the stacks of kernels) is known roughly.
                spared = cuda.context_bytes * len(self.side.uuids)
                if process.held is not None and 2 * process.grown + spared < process.held:
                    raise gpu_error(
                        "gpu-bytes-missing",
                        f"{process.who}: {process.held >> 20} MiB on the GPU, {process.grown >> 20} MiB saved",
                        pid=process.pid,
                    )

    async def _used(self) -> int:
        return sum([(await self.side.cuda.vitals(uuid)).used or 0 for uuid in self.side.uuids])

    async def _move(self, process: _Process, move: Move, size: int = 0) -> None:
        await _move(self.side.cuda, process.pid, process.who, move, size=size)

    async def bring_back(self) -> None:
        """Take back what was done, in reverse: every process runs on, with its bytes on the GPU.

        None runs before all have their memory: they may wait for one another.

        The driver is asked how far each is: a call that failed may have had its effect.

        Raises:
            GpuError: one cannot be brought back; it must be ended.
        """
        ways = dict(zip(map(id, self.processes), await _all([self._way(p) for p in self.processes]), strict=True))
        moves: tuple[Move, ...] = ("restore", "unlock")
        for move in moves:
            going = [p for p in reversed(self.processes) if move in ways[id(p)]]
            await _all([self._move(p, move, size=p.most) for p in going])

    async def _way(self, process: _Process) -> tuple[Move, ...]:
        state = await self.side.cuda.state(process.pid)
        if state is None:
            raise gpu_error("gpu-not-cuda", process.who, pid=process.pid)
        return way_back(state, process.who)

    def facts(self) -> GpuFacts | None:
        """What a restore must know; None when no process has GPU state."""
        node = self.side.cuda.node
        if not self.processes or node is None:
            return None
        return GpuFacts(
            driver=node.driver,
            node=tuple((d.uuid, d.name) for d in node.devices),
            visible=self.side.uuids,
            processes=tuple((p.inner_pid, p.grown) for p in self.processes),
            memory=tuple((p.inner_pid, begin, end) for p in self.processes for begin, end in p.saved),
        )


async def plan_back(side: GpuSide, facts: GpuFacts) -> tuple[tuple[str, str], ...]:
    """Which of this sandbox's GPUs takes the place of which.

    Raises:
        GpuError: none can, or the driver cannot.
    """
    node = await side.cuda.start()
    if not node.checkpoints:
        raise gpu_error("gpu-driver-old", f"driver {node.driver} (CUDA {node.version})")
    return device_map(facts.node, facts.visible, node, side.uuids)


async def put_back(
    side: GpuSide, facts: GpuFacts, pairs: Sequence[tuple[str, str]], init_pid: int, phases: Phases
) -> None:
    """Bring the device memory of restored processes onto this sandbox's GPUs, and let them go on.

    Args:
        pairs: from `plan_back`.

    Raises:
        GpuError: after which the processes are good for nothing: the driver never takes them again.
    """
    cuda = side.cuda
    pids = await asyncio.to_thread(procfs.by_inner_pid, init_pid)
    missing = [inner for inner, _ in facts.processes if inner not in pids]
    if missing:
        raise gpu_error("gpu-not-cuda", f"process {missing[0]}: restore")
    who = {inner: f"process {inner}" for inner, _ in facts.processes}
    # Which GPUs a map must name: those that a process can reach, as a sandbox's does its own, says one who runs them in
    # containers; all of the machine, says the driver of one that can reach all and uses some. It refuses the wrong one
    # before it does anything.
    own = tuple(pair for pair in pairs if pair[0] in facts.visible)

    async def restore(inner: int, size: int) -> None:
        try:
            await _move(cuda, pids[inner], who[inner], "restore", size=size, pairs=own)
        except GpuError as e:
            if own == tuple(pairs) or e.fields.get("result") != "CUDA_ERROR_INVALID_VALUE":
                raise
            await _move(cuda, pids[inner], who[inner], "restore", size=size, pairs=pairs)

    with phases("gpu.restore"):
        await _all([restore(inner, size) for inner, size in facts.processes])
    with phases("gpu.unlock"):
        await _all([_move(cuda, pids[i], who[i], "unlock") for i, _ in facts.processes])
