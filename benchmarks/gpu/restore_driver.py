"""Parts bound and several: the driver alone, beside raw copies; several processes at once or one after the other."""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from common import console, number, summary, table
from restore_bench import GIB, MOVES, PROGRAMS, Bench, Holder, Wrong, holders, listed, rate

FAMILIES = (1, 2, 4)
DIRECTIONS = {"to_device": "restore", "from_device": "checkpoint"}
"""Of copies, and the move of the driver that goes the same way."""


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
