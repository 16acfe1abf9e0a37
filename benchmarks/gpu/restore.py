"""A restore of a process with its device memory against plain driver calls and CRIU one after the other; the driver's
own rate beside raw copies; several processes at once or in turn; a hundred freezes and thaws.

    python benchmarks/gpu/restore.py                               # 8 GiB, all parts
    python benchmarks/gpu/restore.py --parts bound,several         # what needs no CRIU
    python benchmarks/gpu/restore.py --fake                        # the harness alone, on the fake driver of the tests

Writes benchmarks/results/gpu/restore.json, after each part. benchmarks/README.md says what each arm is.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import gc
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from common import console, machine, number, save, summary, table
from common_gpu import fake_hardware, gpu_facts, missing, refuse_fake_results
from peers import PR_SET_CHILD_SUBREAPER, CriuImages

from engine_rig import SOCKET, UID, WORKER_PID, Frozen, Rig
from woodfrog.backends.gpus import Gpus, find_gpus
from woodfrog.cuda.client import Cuda
from woodfrog.cuda.states import Move
from woodfrog.engine.engine import GpuSide, Lazy
from woodfrog.linux import procfs
from woodfrog.linux.pageserver import PageServer, make_set, merge_sets
from woodfrog.linux.sandbox import ProcessSpec, Sandbox
from woodfrog.settings import load
from woodfrog.telemetry import Phases

PROGRAMS = Path(__file__).parent / "programs"
GIB = 1 << 30
ARMS = {
    "ours": "ours",
    "whole": "ours, no page server",
    "plain": "plain: criu, then the driver",
    "lazy": "plain, criu lazy-pages",
}
MOVES: tuple[Move, ...] = ("lock", "checkpoint", "restore", "unlock")
SHARES = {"restore": 0.5, "bound": 0.65, "several": 0.8, "cycles": 1.0}
"""The parts in their order, and the share of the time that is over when each may begin no more."""
FAMILIES = (1, 2, 4)
DIRECTIONS = {"to_device": "restore", "from_device": "checkpoint"}
"""Of copies, and the move of the driver that goes the same way."""
PAGES_UID = 64647
AROUND_LEARNING, AROUND = 4 << 10, 64 << 10
"""Bytes that the page server gives around a fault, as the daemon has it."""
READY_S = 180.0
END_S = 60.0
ANSWER_S = 180.0
FAILURES = 3
"""So many in a row, and an arm or the cycles go no further."""
WARM_UP = 3
GROWTH = {"descriptors": 4, "processes": 0, "device_mib": 8}
"""What may be more after the cycles than before: a thread pool fills up."""


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
            shutil.copy(PROGRAMS / name, self.home / "code")
        sandbox = await self.rig.sandbox(gpus=(0,))
        try:
            await sandbox.spawn(
                ProcessSpec(
                    (sys._base_executable, "-B", "/app/holder.py", SOCKET, str(size)),
                    env={"PATH": os.defpath, "HOME": "/tmp", **self.env},
                    uid=UID,
                    gid=UID,
                    inner_pid=WORKER_PID,
                    stdout="/run/woodfrog/stdout",
                    stderr="/run/woodfrog/stderr",
                )
            )
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


def medians(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: round(statistics.median(row[name] for row in rows if name in row), 3) for name in names}


async def write_back() -> None:
    """Images on their way to the disk would be in the way of who is measured next."""
    process = await asyncio.create_subprocess_exec("sync")
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(process.wait(), 60)


# Part: restore


class Ours:
    """The engine: a sandbox, CRIU in it, the page server, the driver."""

    def __init__(self, bench: Bench, size: int) -> None:
        self.bench, self.size = bench, size
        self.working_set = bench.home / f"working-set-{size}"
        self.capture: dict[str, float] = {}
        self.first_ms = 0.0
        self.pushed_pages = 0
        self.frozen: Frozen
        self.server: PageServer | None = None

    async def prepare(self) -> None:
        phases = Phases()
        sandbox = await self.bench.start(self.size)
        try:
            self.frozen = await self.bench.freeze(sandbox, phases)
        finally:
            await self.bench.end(sandbox)
        self.capture = times(phases)

    async def learn(self) -> None:
        """The first thaw with the page server, which knows of device memory alone what to push."""
        assert self.frozen.result.gpu is not None
        self.server = await PageServer.start(uid=PAGES_UID, on_death=lambda: None)
        self.working_set.write_bytes(make_set(self.frozen.result.gpu.memory))
        lazy = Lazy(self.server, self.working_set, AROUND_LEARNING)
        self.first_ms, _ = await self._thaw(lazy, "full", keep=True)

    async def measure(self, how: str, *, paged: bool) -> tuple[float, dict[str, float]]:
        if paged and self.server is None:
            await self.learn()
        return await self._thaw(Lazy(self.server, self.working_set, AROUND) if paged and self.server else None, how)

    async def _thaw(self, lazy: Lazy | None, how: str, *, keep: bool = False) -> tuple[float, dict[str, float]]:
        bench, phases = self.bench, Phases()
        begin = time.perf_counter()
        count = len(bench.rig.sandboxes)
        try:
            sandbox, _ = await bench.rig.thaw(self.frozen, phases=phases, gpu=bench.side, gpus=(0,), lazy=lazy)
            answered = time.perf_counter()
            await bench.check(sandbox)
            now = time.perf_counter()
            ms = (now - begin) * 1e3
            found = {"sandbox": round(ms - (now - answered) * 1e3 - engine_ms(phases), 3), **times(phases)}
            found["answer"] = round((now - answered) * 1e3, 3)
            if lazy is not None:
                if lazy.served is None:
                    raise Wrong("the page server did not serve this restore")
                # What the check of every byte reads besides does not belong to a start.
                seen = await lazy.served.record() if keep else b""
                if lazy.served.ready.done():
                    self.pushed_pages, found["page server: push"] = lazy.served.ready.result()
                if keep:
                    self.working_set.write_bytes(merge_sets(seen, self.working_set.read_bytes()))
            if how == "full":
                await bench.check(sandbox, "full")
            return ms, found
        finally:
            for sandbox in bench.rig.sandboxes[count:]:
                await bench.end(sandbox)
            if lazy is not None and lazy.served is not None:
                await lazy.served.drop()

    async def close(self) -> None:
        if self.server is not None:
            await self.server.close()
        if hasattr(self, "frozen"):
            shutil.rmtree(self.frozen.images.parent, ignore_errors=True)


def engine_ms(phases: Phases) -> float:
    """What the engine's own steps took, from the outermost of its phases."""
    return sum(p.ms for p in phases.items if p.parent is None)


class Plain:
    """The same process without us: the driver's calls, `criu dump`, `criu restore`, the driver's calls.

    The calls come from our warm helper, where the tool `cuda-checkpoint` starts the driver anew for each: so this is
    the fastest that plain tools can be.
    """

    def __init__(self, bench: Bench, size: int) -> None:
        self.bench, self.size = bench, size
        self.capture: dict[str, float] = {}
        self.images: CriuImages | None = None
        self._holder: Holder | None = None

    async def prepare(self) -> None:
        bench = self.bench
        self.images = images = CriuImages(str(bench.rig.criu.path), None, str(bench.under))
        with holders(bench, [self.size]) as (holder,):
            holder.check()
            self._holder = holder
            for move in ("lock", "checkpoint"):
                begin = time.perf_counter()
                await bench.cuda.move(holder.process.pid, move, size=self.size)
                self.capture[f"gpu.{move}"] = round((time.perf_counter() - begin) * 1e3, 3)
            self.capture["criu"] = round(images.dump(holder.process), 3)

    async def measure(self, how: str, *, paged: bool) -> tuple[float, dict[str, float]]:
        images, holder, cuda = self.images, self._holder, self.bench.cuda
        assert images is not None and holder is not None
        phases = Phases()
        with tempfile.TemporaryDirectory(dir=images.folder) as work, contextlib.ExitStack() as stack:
            if paged:
                stack.enter_context(images.lazy_server(work))
            holder.path.unlink(missing_ok=True)
            begin = time.perf_counter()
            try:
                with phases("criu"):
                    images.thaw(Path(work), *(("--lazy-pages",) if paged else ()))
                for move in MOVES[2:]:
                    with phases(f"gpu.{move}"):
                        await cuda.move(images.pid, move, size=self.size)
                with phases("answer"):
                    holder.check()
                ms = (time.perf_counter() - begin) * 1e3
                if how == "full":
                    holder.check("full")
                return ms, times(phases)
            finally:
                images.end()
                holder.path.unlink(missing_ok=True)

    def close(self) -> None:
        if self.images is not None:
            self.images.close()
        # Back to how it was: orphans of the other parts are not ours to wait for.
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def no_room(bench: Bench, size: int) -> str:
    """Why a size cannot be measured; empty when it can."""
    disk = shutil.disk_usage(bench.under).free
    info = Path("/proc/meminfo").read_text()
    memory = int(info.split("MemAvailable:")[1].split()[0]) << 10
    if disk < 2.2 * size + (1 << 30):
        return f"two images need {2.2 * size / GIB:.1f} GiB below {bench.under}, {disk / GIB:.1f} are free"
    if memory < 1.5 * size:
        return f"{memory / GIB:.1f} GiB of host memory are free, and a frozen process has as much as on the GPU"
    return ""


class Restore:
    """One size, its arms in turn."""

    def __init__(self, bench: Bench, size: int) -> None:
        self.bench, self.size = bench, size
        self.values: dict[str, list[float]] = {}
        self.phases: dict[str, list[dict[str, float]]] = {}
        self.failed: dict[str, str] = {}
        self.ours, self.plain = Ours(bench, size), Plain(bench, size)
        self.in_a_row = dict.fromkeys(ARMS, 0)

    async def prepare(self) -> None:
        for arms, one in ((("ours", "whole"), self.ours), (("plain", "lazy"), self.plain)):
            try:
                await one.prepare()
            except (Exception, SystemExit) as e:
                self.failed |= dict.fromkeys(arms, says(e))
        await write_back()

    async def measure(self, arm: str, how: str) -> tuple[float, dict[str, float]]:
        if arm in ("ours", "whole"):
            return await self.ours.measure(how, paged=arm == "ours")
        return await self.plain.measure(how, paged=arm == "lazy")

    async def round(self, turn: int) -> None:
        """Each arm once; the first one, which is not counted, with a look at every byte."""
        for arm in ARMS:
            if arm in self.failed:
                continue
            try:
                ms, phases = await self.measure(arm, "full" if turn < 0 else "quick")
            except (Exception, SystemExit) as e:
                self.in_a_row[arm] += 1
                console.print(f"[red]{ARMS[arm]}: {says(e)}", soft_wrap=True)
                # One that fails at its first try is not waited for again: it may have taken a minute for it.
                if turn < 0 or self.in_a_row[arm] >= FAILURES:
                    self.failed[arm] = says(e)
                continue
            self.in_a_row[arm] = 0
            if turn >= 0:
                self.values.setdefault(arm, []).append(ms)
                self.phases.setdefault(arm, []).append(phases)

    def result(self) -> dict[str, Any]:
        middle = {arm: statistics.median(v) for arm, v in self.values.items()}
        phases = {arm: medians(rows) for arm, rows in self.phases.items()}
        captures = {"ours": self.ours.capture, "plain": self.plain.capture}
        frozen = getattr(self.ours, "frozen", None)
        return {
            "bytes": self.size,
            "image_bytes": frozen.result.pages_bytes if frozen is not None else None,
            "ms": {arm: summary(v) for arm, v in self.values.items()},
            "over_ours": {
                a: round(m / middle["ours"], 2) for a, m in middle.items() if a != "ours" and "ours" in middle
            },
            "phases_ms": phases,
            "captures_ms": captures,
            "gib_s": {
                "gpu.checkpoint": {k: rate(self.size, v.get("gpu.checkpoint")) for k, v in captures.items()},
                "gpu.restore": {k: rate(self.size, v.get("gpu.restore")) for k, v in phases.items()},
            },
            "first_thaw_ms": round(self.ours.first_ms, 1),
            "pushed_bytes": self.ours.pushed_pages * 4096,
            "failed": self.failed,
        }

    async def close(self) -> None:
        await self.ours.close()
        self.plain.close()


async def part_restore(bench: Bench, sizes: Sequence[int], keep: Callable[[dict[str, Any]], None]) -> None:
    found: dict[str, Any] = {}
    for size in sizes:
        name = f"{size / GIB:g} GiB"
        if bench.over("restore") or (why := no_room(bench, size)):
            found[name] = {"failed": {"all": "the time is over (--seconds)" if bench.over("restore") else why}}
            keep(found)
            continue
        work = Restore(bench, size)
        try:
            with console.status(f"{name}: freeze"):
                await work.prepare()
            longest = 0.0
            for turn in range(-1, bench.rounds):
                # One counted round there is in any case: without it the session would have been for nothing.
                if turn > 0 and bench.left("restore") < longest:
                    console.print(f"{name}: {turn} of {bench.rounds} rounds, the time is over (--seconds)")
                    break
                begin = time.monotonic()
                with console.status(f"{name}: round {turn + 1} of {bench.rounds}"):
                    await work.round(turn)
                longest = time.monotonic() - begin
                if turn >= 0:
                    found[name] = work.result()
                    keep(found)
        finally:
            await work.close()


def show_restore(found: dict[str, Any]) -> None:
    for name, result in found.items():
        for arm, why in result["failed"].items():
            console.print(f"[red]{name}, {ARMS.get(arm, arm)}: {why}", soft_wrap=True)
        if "ms" not in result:
            continue
        rows = [
            [
                ARMS[arm],
                *(number(values[k]) for k in ("min", "median", "p95")),
                number(1.0 if arm == "ours" else result["over_ours"].get(arm), 2),
                number(result["gib_s"]["gpu.restore"].get(arm), 2),
            ]
            for arm, values in result["ms"].items()
        ]
        table(f"{name}: ms to the first answer", ("", "min", "median", "p95", "× ours", "driver GiB/s"), rows)
        for arm, phases in result["phases_ms"].items():
            listed(ARMS[arm], phases)
        for arm, phases in result["captures_ms"].items():
            speed = result["gib_s"]["gpu.checkpoint"].get(arm)
            listed(f"capture, {ARMS[arm]}" + (f" ({speed:.2f} GiB/s)" if speed else ""), phases)
        console.print(
            f"   pushed in {result['pushed_bytes'] / GIB:.2f} GiB; "
            f"the thaw that learned it: {result['first_thaw_ms']:.0f} ms"
        )


def listed(title: str, phases: dict[str, float]) -> None:
    text = ", ".join(f"{k} {v:.1f}" for k, v in phases.items() if v >= 0.1)
    console.print(f"   [bold]{title}[/]: {text}", soft_wrap=True)


# Part: bound


async def in_place(bench: Bench, group: Sequence[Holder], *, at_once: bool) -> dict[str, float]:
    """All four moves of all processes, where they are: ms of each.

    No process passes on before all have made a move, as with the engine: they may wait for one another.
    """
    taken: dict[str, float] = {}
    for move in MOVES:
        begin = time.perf_counter()
        if at_once:
            await asyncio.gather(*(bench.cuda.move(h.process.pid, move, size=h.size) for h in group))
        else:
            for holder in group:
                await bench.cuda.move(holder.process.pid, move, size=holder.size)
        taken[move] = (time.perf_counter() - begin) * 1e3
    taken["all"] = sum(taken.values())
    return taken


async def part_bound(bench: Bench, sizes: Sequence[int], keep: Callable[[dict[str, Any]], None]) -> None:
    found: dict[str, Any] = {}
    size = bench.copy_bytes
    env = {**os.environ, **bench.env}
    command = [sys.executable, "-B", str(PROGRAMS / "copies.py"), str(size), str(min(bench.rounds, 5))]
    with console.status("raw copies"):
        done = await asyncio.to_thread(subprocess.run, command, env=env, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise Wrong(f"copies.py: {done.stderr[-2000:]}")
    speeds = json.loads(done.stdout)
    found["copies"] = {
        "bytes": size,
        **{kind: {way: summary(v) for way, v in ways.items()} for kind, ways in speeds.items()},
    }
    keep(found)
    size = sizes[-1]
    with console.status("the driver alone"), holders(bench, [size]) as group:
        rows: list[dict[str, float]] = []
        for turn in range(-1, bench.rounds):
            if turn > 0 and bench.over("bound"):
                break
            taken = await in_place(bench, group, at_once=True)
            group[0].check("full" if turn < 0 else "quick")
            if turn >= 0:
                rows.append(taken)
    found["driver"] = {
        "bytes": size,
        "ms": {move: summary([r[move] for r in rows]) for move in (*MOVES, "all")},
        "gib_s": {m: rate(size, statistics.median(r[m] for r in rows)) for m in ("checkpoint", "restore")},
    }
    keep(found)


def show_bound(found: dict[str, Any]) -> None:
    copies, driver = found["copies"], found.get("driver")
    rows = [
        [way, *(" / ".join(number(copies[to][way][k], 2) for k in ("min", "median", "p95")) for to in DIRECTIONS)]
        for way in copies["to_device"]
    ]
    if driver is not None:
        rows.append(["the driver's restore, checkpoint", *(number(driver["gib_s"][m], 2) for m in DIRECTIONS.values())])
    title = f"copies of {copies['bytes'] / GIB:g} GiB: GiB/s, min / median / p95"
    table(title, ("", "to the GPU", "from it"), rows)
    pinning = ", ".join(f"{k} {v['median']:.1f} GiB/s" for k, v in copies["pinning"].items())
    console.print(f"   [bold]page-locking[/]: {pinning}", soft_wrap=True)
    if driver is not None:
        title = f"the driver alone, {driver['bytes'] / GIB:g} GiB, ms"
        listed(title, {k: v["median"] for k, v in driver["ms"].items()})


# Part: several


async def part_several(bench: Bench, sizes: Sequence[int], keep: Callable[[dict[str, Any]], None]) -> None:
    found: dict[str, Any] = {}
    for count in FAMILIES:
        if bench.over("several"):
            console.print(f"{count} processes: left out, the time is over (--seconds)")
            continue
        ways: dict[str, list[dict[str, float]]] = {"at_once": [], "in_turn": []}
        with console.status(f"{count} processes"), holders(bench, [sizes[-1] // count] * count) as group:
            for turn in range(-1, bench.rounds):
                if turn > 0 and bench.over("several"):
                    break
                for way in ways:
                    taken = await in_place(bench, group, at_once=way == "at_once")
                    for holder in group:
                        holder.check("full" if turn < 0 else "quick")
                    if turn >= 0:
                        ways[way].append(taken)
        found[str(count)] = {
            "bytes_each": sizes[-1] // count,
            **{way: {m: summary([r[m] for r in rows]) for m in (*MOVES, "all")} for way, rows in ways.items()},
            "in_turn_over_at_once": {
                m: round(
                    statistics.median(r[m] for r in ways["in_turn"]) / statistics.median(r[m] for r in ways["at_once"]),
                    2,
                )
                for m in (*MOVES, "all")
            },
        }
        keep(found)


def show_several(found: dict[str, Any]) -> None:
    for count, result in found.items():
        rows = [
            [title, *(number(result[way][m]["median"]) for m in (*MOVES, "all"))]
            for way, title in (("at_once", "all at once"), ("in_turn", "one after the other"))
        ]
        rows.append(["the second over the first", *(number(v, 2) for v in result["in_turn_over_at_once"].values())])
        table(f"{count} × {result['bytes_each'] / GIB:g} GiB, in place: median ms", ("", *MOVES, "all"), rows)


# Part: cycles


def children() -> list[int]:
    """All processes below this one."""
    return list(procfs.tree(os.getpid()))[1:]


async def held(bench: Bench) -> dict[str, int]:
    gc.collect()
    found = {"descriptors": len(os.listdir("/proc/self/fd")), "processes": len(children())}
    mib = await bench.device_mib()
    return found if mib is None else {**found, "device_mib": mib}


async def settled(bench: Bench, before: dict[str, int] | None = None) -> dict[str, int]:
    """What is held once it changes no more: processes take a while to die, and a GPU to forget them."""
    last: dict[str, int] = {}
    for _ in range(50):
        now = await held(bench)
        if now == last and (before is None or not grown(before, now)):
            break
        last = now
        await asyncio.sleep(0.1)
    return now


def grown(first: dict[str, int], last: dict[str, int]) -> list[str]:
    return [f"{k}: {v} -> {last[k]}" for k, v in first.items() if last.get(k, v) > v + GROWTH[k]]


class Cycles:
    """One process, frozen and thawed again and again: by turns as CRIU reads it all, and with the page server."""

    def __init__(self, bench: Bench, server: PageServer) -> None:
        self.bench, self.server = bench, server
        self.sandbox: Sandbox | None = None
        self.lazy: Lazy | None = None
        self.rows: list[dict[str, float]] = []

    async def cycle(self, turn: int) -> None:
        bench = self.bench
        if self.sandbox is None:
            self.sandbox = await bench.start(bench.cycle_bytes)
        before, phases = self.sandbox, Phases()
        begin = time.perf_counter()
        frozen = await bench.freeze(before, phases)
        freeze = time.perf_counter()
        try:
            await self._drop()
            self.lazy = Lazy(self.server, everything=True) if turn % 2 else None
            self.sandbox, _ = await bench.rig.thaw(frozen, phases=phases, gpu=bench.side, gpus=(0,), lazy=self.lazy)
            thaw = time.perf_counter()
            await bench.check(self.sandbox, "full")
        finally:
            shutil.rmtree(frozen.images.parent, ignore_errors=True)
        ms = {"freeze": (freeze - begin) * 1e3, "thaw": (thaw - freeze) * 1e3}
        self.rows.append({**ms, **{k: v for k, v in times(phases).items() if k.startswith("gpu.")}})

    async def _drop(self) -> None:
        if self.lazy is not None and self.lazy.served is not None:
            await self.lazy.served.drop()
        self.lazy = None

    async def end(self) -> None:
        """Nothing of it is left, also after a cycle that failed half-way."""
        for sandbox in list(self.bench.rig.sandboxes):
            await self.bench.end(sandbox)
        await self._drop()
        self.sandbox = None


async def part_cycles(bench: Bench, sizes: Sequence[int], keep: Callable[[dict[str, Any]], None]) -> None:
    server = await PageServer.start(uid=PAGES_UID, on_death=lambda: None)
    work = Cycles(bench, server)
    found: dict[str, Any] = {"bytes": bench.cycle_bytes, "asked": bench.cycles, "cycles": 0, "failures": []}
    in_a_row = 0

    def record(last: dict[str, int] | None = None) -> None:
        found["ms"] = {k: summary([r[k] for r in work.rows]) for k in (work.rows or [{}])[0]}
        if last is not None:
            found["held_at_end"], found["leaks"] = last, grown(found["held_at_start"], last)
        keep(found)

    try:
        for turn in range(-WARM_UP, bench.cycles):
            if turn == 0:
                await work.end()
                found["held_at_start"] = await settled(bench)
                work.rows.clear()
            if turn > 0 and bench.over("cycles"):
                console.print(f"{turn} of {bench.cycles} cycles, the time is over (--seconds)")
                break
            try:
                await work.cycle(turn)
                in_a_row = 0
            except Exception as e:
                if turn < 0:
                    raise
                found["failures"].append(f"cycle {turn}: {says(e)}")
                await work.end()
                in_a_row += 1
            found["cycles"] = max(0, turn + 1)
            if in_a_row >= FAILURES:
                break
            if turn >= 0 and turn % 10 == 9:
                record()
        await work.end()
        record(await settled(bench, found["held_at_start"]))
    finally:
        await work.end()
        await server.close()


def show_cycles(found: dict[str, Any]) -> None:
    leaks = found.get("leaks", ["it did not come to the end"])
    for line in (*found["failures"][:20], *leaks):
        console.print(f"[red]{line}", soft_wrap=True)
    rows = [[k, *(number(v[x]) for x in ("min", "median", "p95"))] for k, v in found["ms"].items()]
    table(
        f"{found['cycles']} cycles of {found['bytes'] >> 20} MiB: {len(found['failures'])} failures, "
        f"{len(leaks)} leaks; ms",
        ("", "min", "median", "p95"), rows,
    )  # fmt: skip
    console.print(f"   held before {found['held_at_start']}, after {found.get('held_at_end')}", soft_wrap=True)


# All of it


PARTS: dict[str, tuple[Callable[..., Awaitable[None]], Callable[[dict[str, Any]], None]]] = {
    "restore": (part_restore, show_restore),
    "bound": (part_bound, show_bound),
    "several": (part_several, show_several),
    "cycles": (part_cycles, show_cycles),
}


def says(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip()[:2000]


async def measure(options: argparse.Namespace, hardware: Any) -> int:
    task = asyncio.current_task()
    assert task is not None
    # One that is stopped takes its sandboxes with it.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    settings = load()
    result: dict[str, Any] = {
        "machine": machine(settings),
        "gpu": {"name": "fake"} if options.fake else gpu_facts(),
        "parts": {},
        "failed": {},
    }

    def write() -> None:
        if options.json or not options.fake:
            save("gpu/restore", result, options.json)

    under = Path(options.under)
    with tempfile.TemporaryDirectory(prefix="wfb-gpu-", dir=under) as folder:
        home = Path(folder)
        home.chmod(0o755)
        rig = Rig.make(home)
        rig.hardware = hardware
        place = str(hardware.folder) if hardware is not None else settings.cuda_dir
        library = place or os.environ.get("LD_LIBRARY_PATH", "")
        gpus = await find_gpus("", place)
        if not gpus.devices or gpus.cuda is None:
            console.print(f"gpu/restore.py: nothing measured: {gpus.why or 'no NVIDIA GPU'}")
            return 1
        rig.nodes = lambda indexes: gpus.device_nodes([gpus.devices[i].uuid for i in indexes])
        bench = Bench(
            home,
            rig,
            gpus,
            gpus.env([gpus.devices[0].uuid]) | ({"LD_LIBRARY_PATH": library} if library else {}),
            under,
            options.rounds,
            options.cycles,
            cycle_bytes=8 << 20 if options.fake else 256 << 20,
            copy_bytes=16 << 20 if options.fake else int(min(2.0, options.sizes[-1]) * GIB),
            seconds=options.seconds,
        )
        try:
            for name, (part, show) in PARTS.items():
                if name not in options.parts:
                    continue
                if bench.over(name):
                    result["failed"][name] = "left out, the time is over (--seconds)"
                    continue

                def keep(found: dict[str, Any], name: str = name) -> None:
                    result["parts"][name] = found
                    write()

                try:
                    await part(bench, [int(s * GIB) for s in options.sizes], keep)
                except (Exception, SystemExit) as e:
                    result["failed"][name] = says(e)
                # Also of a part that failed half-way.
                if name in result["parts"]:
                    show(result["parts"][name])
                write()
        finally:
            await rig.close()
            await gpus.close()
    for name, why in result["failed"].items():
        console.print(f"[red]{name}: {why}", soft_wrap=True)
    if options.json or not options.fake:
        console.print(f"Numbers in {save('gpu/restore', result, options.json)}")
    cycles = result["parts"].get("cycles", {})
    return 1 if result["failed"] or cycles.get("failures") or cycles.get("leaks") else 0


def numbers(text: str) -> tuple[float, ...]:
    return tuple(sorted(float(x) for x in text.split(",")))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=numbers, help="GiB on the GPU (default: 8)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cycles", type=int, default=100, help="freezes and thaws of a small process (default: 100)")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--seconds", type=float, default=400.0, help="begin nothing after so long (default: 400)")
    parser.add_argument("--under", default="/var/tmp", help="where images go")
    parser.add_argument("--fake", action="store_true", help="tiny processes on the fake driver of the tests")
    parser.add_argument(
        "--json", help="where the numbers go (default: benchmarks/results/gpu/restore.json; of --fake: nowhere)"
    )
    options = parser.parse_args()
    options.parts = options.parts.split(",")
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    refuse_fake_results(parser, options)
    if not options.fake and (why := missing(torch=False)):
        console.print(f"gpu/restore.py: nothing measured: {why}")
        return 0
    options.sizes = options.sizes or ((0.03125,) if options.fake else (8.0,))
    mib = int(options.sizes[-1] * 2048) + 256
    with fake_hardware(mib) if options.fake else contextlib.nullcontext() as hardware:
        try:
            return asyncio.run(measure(options, hardware))
        except asyncio.CancelledError:
            return 128 + signal.SIGTERM


if __name__ == "__main__":
    sys.exit(main())
