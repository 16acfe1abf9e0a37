"""Part cycles: one process frozen and thawed again and again; what fails, and what is left behind."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any

from common import console, number, summary, table
from restore_bench import FAILURES, PAGES_UID, Bench, says, times

from woodfrog.engine.engine import Lazy
from woodfrog.linux import procfs
from woodfrog.linux.pageserver import PageServer
from woodfrog.linux.sandbox import Sandbox
from woodfrog.telemetry import Phases

WARM_UP = 3
GROWTH = {"descriptors": 4, "processes": 0, "device_mib": 8}
"""What may be more after the cycles than before: a thread pool fills up."""


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
