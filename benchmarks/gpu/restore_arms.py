"""Part restore: a thaw by the engine and by plain tools, in turn."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import console, number, summary, table
from peers import PR_SET_CHILD_SUBREAPER, CriuImages
from restore_bench import FAILURES, GIB, MOVES, PAGES_UID, Bench, Holder, Wrong, holders, listed, rate, says, times

from engine_rig import Frozen
from woodfrog.engine.engine import Lazy
from woodfrog.linux.pageserver import PageServer, make_set, merge_sets
from woodfrog.telemetry import Phases

ARMS = {
    "ours": "ours",
    "follows": "ours, memory follows meanwhile",
    "whole": "ours, no page server",
    "plain": "plain: criu, then the driver",
    "lazy": "plain, criu lazy-pages",
}
OURS = ("ours", "follows", "whole")
AROUND_LEARNING, AROUND = 4 << 10, 64 << 10
"""Bytes that the page server gives around a fault, as the daemon has it."""


def medians(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: round(statistics.median(row[name] for row in rows if name in row), 3) for name in names}


async def write_back(seconds: float) -> None:
    """Images on their way to the disk would be in the way of who is measured next. A slow disk is not waited for at the
    cost of the measuring."""
    process = await asyncio.create_subprocess_exec("sync")
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(process.wait(), seconds)


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
        """The first thaw whose memory follows, which knows of device memory alone what to push."""
        assert self.frozen.result.gpu is not None and self.server is not None
        self.working_set.write_bytes(make_set(self.frozen.result.gpu.memory))
        lazy = Lazy(self.server, self.working_set, AROUND_LEARNING)
        self.first_ms, _ = await self._thaw(lazy, "full", keep=True)

    async def measure(self, arm: str, how: str) -> tuple[float, dict[str, float]]:
        if arm == "whole":
            return await self._thaw(None, how)
        if self.server is None:
            self.server = await PageServer.start(uid=PAGES_UID, on_death=lambda: None)
        if arm == "ours":
            return await self._thaw(Lazy(self.server, everything=True), how)
        if not self.working_set.exists():
            await self.learn()
        return await self._thaw(Lazy(self.server, self.working_set, AROUND), how)

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
                    pages, found["page server: push"] = lazy.served.ready.result()
                    if lazy.everything:
                        self.pushed_pages = pages
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
        self.first: dict[str, dict[str, float]] = {}
        """Of the round that is not counted."""
        self.failed: dict[str, str] = {}
        self.ours, self.plain = Ours(bench, size), Plain(bench, size)
        self.in_a_row = dict.fromkeys(ARMS, 0)

    async def prepare(self) -> None:
        for arms, one in ((OURS, self.ours), (("plain", "lazy"), self.plain)):
            try:
                await one.prepare()
            except (Exception, SystemExit) as e:
                self.failed |= dict.fromkeys(arms, says(e))
        await write_back(min(60.0, max(1.0, self.bench.left("restore") / 4)))

    async def measure(self, arm: str, how: str) -> tuple[float, dict[str, float]]:
        if arm in OURS:
            return await self.ours.measure(arm, how)
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
            if turn < 0:
                self.first[arm] = {"all": round(ms, 3), **phases}
            else:
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
            "first_round_ms": self.first,
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
            # What is known so far, for the case that there is no time for more.
            found[name] = work.result()
            keep(found)
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
            f"the thaw that learned what to push before the rest: {result['first_thaw_ms']:.0f} ms"
        )
