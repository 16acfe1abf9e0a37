"""Starts of a GPU function: cold, from a snapshot with its device memory, from a snapshot in host memory that is moved
to the GPU afterwards; interleaved.

    python benchmarks/gpu/start.py                              # 1, 8, 30 GiB; compiled and with CUDA graphs: 1 GiB
    python benchmarks/gpu/start.py --sizes 1 --variants plain   # briefly
    python benchmarks/gpu/start.py --fake                       # the harness alone, on the fake driver of the tests

Writes benchmarks/results/gpu/start.json, after each workload. benchmarks/README.md says what each arm is.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent / "programs"))

from common import (
    Daemon,
    by_call,
    console,
    machine,
    number,
    phase_medians,
    program,
    save,
    summary,
    table,
    wait_until,
)
from common_gpu import fake_hardware, gpu_facts, missing, refuse_fake_results

HERE = Path(__file__).parent
TITLES = {"cold": "cold start", "cpu": "host snapshot", "gpu": "GPU snapshot"}
CLASSES = {"cold": "OnGpu", "cpu": "OnCpu", "gpu": "OnGpu"}
STARTS = {"cold": "cold", "cpu": "restore", "gpu": "restore"}
VARIANTS = ("plain", "compile", "graphs")
MOVES = ("gpu.lock", "gpu.checkpoint", "gpu.check", "gpu.restore", "gpu.unlock")
ROOM = 1.15
"""Of a model's size: what its snapshot takes on disk, host memory of torch included."""
MARGIN = 4 << 30
STORE_S_PER_GIB = 10.0
"""The slowest disk that a snapshot's way to it is waited for."""
TOLERANCE = 0.05
"""How far answers of bfloat16 may lie apart where other kernels may have made them; a thawed GPU has the same."""


@dataclass(frozen=True)
class Plan:
    """One workload: a size in one variant, and the ways to start it that there is room for."""

    gib: float
    variant: str
    arms: tuple[str, ...]
    rounds: int

    @property
    def name(self) -> str:
        return f"{self.gib:g} GiB" + ("" if self.variant == "plain" else f", {self.variant}")

    def app(self, arm: str) -> str:
        return f"gpu-{self.variant}-{round(self.gib * 1024)}-{arm}"


def rounds_for(gib: float, rounds: int) -> int:
    """Fewer of the large ones: they take as many seconds as the small ones take milliseconds."""
    return rounds if gib < 4 else max(2, math.ceil(rounds / 2)) if gib < 16 else 2


def fitting(gib: float, arms: Sequence[str], free: int) -> tuple[str, ...]:
    """The arms whose snapshots fit on a disk at once, the host's left out first; none when the GPU's does not fit."""
    need = gib * ROOM * (1 << 30)
    room = int((free - MARGIN) // need) if free > MARGIN else 0
    if "gpu" in arms and room < 1:
        return ()
    return tuple(a for a in arms if a != "cpu" or room >= 1 + ("gpu" in arms))


def near(one: Sequence[float], other: Sequence[float]) -> bool:
    return len(one) == len(other) and all(
        abs(a - b) <= TOLERANCE * (1 + abs(a)) for a, b in zip(one, other, strict=True)
    )


class Workload:
    """One workload with its snapshots made, and what was measured of it so far."""

    def __init__(self, daemon: Daemon, module: ModuleType, plan: Plan) -> None:
        self.plan, self._daemon = plan, daemon
        self.values: dict[str, list[float]] = {arm: [] for arm in plan.arms}
        self.traces: dict[str, list[dict[str, Any]]] = {arm: [] for arm in plan.arms}
        self.captures: dict[str, dict[str, Any]] = {}
        self.facts: dict[str, Any] = {}
        self._answers: dict[str, list[float]] = {}
        env = {"MODEL_GIB": repr(plan.gib), "MODEL_VARIANT": plan.variant}
        for arm in plan.arms:
            daemon.deploy(plan.app(arm), module, [CLASSES[arm]], snapshots=arm != "cold", env=env)
            if arm == "cold":
                continue  # its first start is the first round's
            begin = time.perf_counter()
            self._check(arm, daemon.call(plan.app(arm), f"{CLASSES[arm]}.run", 0))
            ms = (time.perf_counter() - begin) * 1e3
            self.captures[arm] = self._capture(arm, ms)
            self._facts(arm)
            if daemon.settings.pack:
                daemon.wait_for_packing(plan.app(arm), 600)
            daemon.stop_containers()

    def _capture(self, arm: str, first_call_ms: float) -> dict[str, Any]:
        """What a first call with a capture in it took, and how large the snapshot is."""
        app = self.plan.app(arm)
        seconds = 120 + self.plan.gib * STORE_S_PER_GIB
        wait_until(lambda: self._daemon.snapshots(app), f"no snapshot of {app} was made", seconds)
        row = self._daemon.wait_for_snapshot(app)
        detail = self._daemon.client.request("GET", f"/snapshots/{row['id']}").json()
        folder = self._daemon.home / "snapshots" / row["id"]
        gpu = json.loads(next(folder.glob("img*/engine.json")).read_text()).get("gpu") or {}
        return {
            "first_call_ms": round(first_call_ms, 1),
            "phases_ms": {p["name"]: float(p["ms"]) for p in detail["phases"]},
            "memory_bytes": row["memory_bytes"],
            "files_bytes": row["files_bytes"],
            "gpu_bytes": sum(size for _, size in gpu.get("processes", ())),
        }

    def _check(self, arm: str, answer: list[float]) -> None:
        """All arms give one answer; a thawed GPU the very same each time."""
        before = self._answers.setdefault(arm, answer)
        first = next(iter(self._answers.values()))
        if not near(answer, first) or (arm == "gpu" and answer != before):
            raise SystemExit(f"{self.plan.name}: {arm} answered {answer}, not {before if arm == 'gpu' else first}")

    def _facts(self, arm: str) -> None:
        """Every byte of the weights is what it was, on a GPU that was seen when it was to be seen."""
        facts = self._daemon.call(self.plan.app(arm), f"{CLASSES[arm]}.facts")
        if facts["weights"] != self.facts.setdefault("weights", facts["weights"]):
            raise SystemExit(f"{self.plan.name}: {arm} has other weights")
        before, now = facts["seen"]
        if now < 1 or bool(before) is (arm == "cpu"):
            raise SystemExit(f"{self.plan.name}: {arm} saw {before} GPUs at first and {now} after")
        self.facts |= {"device": facts["device"], "torch": facts["torch"]}
        self.facts.setdefault("device_bytes", {})[arm] = facts["device_bytes"]

    def round(self, *, counted: bool) -> None:
        """Each arm once."""
        for arm in self.plan.arms:
            app = self.plan.app(arm)
            ms, answer, trace = by_call(self._daemon, app, CLASSES[arm], 0, STARTS[arm])
            self._check(arm, answer)
            if not counted or not self.values[arm]:
                self._facts(arm)
            self._daemon.stop_containers()
            if counted:
                self.values[arm].append(ms)
                self.traces[arm].append(trace)

    def result(self) -> dict[str, Any]:
        medians = {arm: statistics.median(v) for arm, v in self.values.items() if v}
        phases = {arm: phase_medians(rows) for arm, rows in self.traces.items() if rows}
        moves = {m: ms for name, ms in phases.get("gpu", {}).items() if (m := name.rpartition("/")[2]) in MOVES}
        moves |= {m: ms for m, ms in self.captures.get("gpu", {}).get("phases_ms", {}).items() if m in MOVES[:3]}
        return {
            "gib": self.plan.gib,
            "variant": self.plan.variant,
            "ms": {arm: summary(v) for arm, v in self.values.items() if v},
            "over_gpu": {
                a: round(m / medians["gpu"], 2) for a, m in medians.items() if a != "gpu" and "gpu" in medians
            },
            "phases_ms": phases,
            "gpu_ms": moves,
            "captures": self.captures,
            **{k: v for k, v in self.facts.items() if k != "weights"},
        }

    def close(self) -> None:
        self._daemon.stop_containers()
        for arm in self.plan.arms:
            app = self.plan.app(arm)
            for row in self._daemon.snapshots(app):
                self._daemon.client.request("POST", f"/snapshots/{row['id']}/invalidate")
            self._daemon.client.request("POST", f"/apps/{app}/stop")


def show(name: str, result: dict[str, Any]) -> None:
    captures = result["captures"]
    rows = []
    for arm, values in result["ms"].items():
        capture = captures.get(arm, {})
        sizes = [result["device_bytes"].get(arm), capture.get("memory_bytes"), capture.get("gpu_bytes")]
        size = [number(None if n is None else n / 2**30, 2) for n in sizes]
        factor = 1.0 if arm == "gpu" else result["over_gpu"].get(arm)
        rows.append([TITLES[arm], *(number(values[k]) for k in ("min", "median", "p95")), number(factor, 2), *size])
    table(
        f"{name}: ms to the first answer",
        ("", "min", "median", "p95", "× GPU", "GiB on it", "image GiB", "of a GPU"),
        rows,
    )
    size = captures.get("gpu", {}).get("gpu_bytes", 0) / 2**30
    moves = ", ".join(
        f"{move.removeprefix('gpu.')} {ms:.1f}"
        + (f" ({size / ms * 1e3:.1f} GiB/s)" if move in ("gpu.checkpoint", "gpu.restore") and ms else "")
        for move, ms in result["gpu_ms"].items()
    )
    if moves:
        console.print(f"   [bold]the driver, ms[/]: {moves}", soft_wrap=True)
    for arm, phases in result["phases_ms"].items():
        text = ", ".join(f"{k} {v:.1f}" for k, v in phases.items() if v >= 0.1)
        console.print(f"   [bold]{TITLES[arm]}[/]: {text}", soft_wrap=True)
    for arm, capture in captures.items():
        text = ", ".join(f"{k} {v:.0f}" for k, v in capture["phases_ms"].items() if v >= 1)
        console.print(f"   [bold]capture, {TITLES[arm]}[/]: {text}", soft_wrap=True)


def measure(
    daemon: Daemon, module: ModuleType, plans: Sequence[Plan], until: float, keep: Callable[[str, dict[str, Any]], None]
) -> dict[str, str]:
    """All workloads, smallest first, as many rounds of each as there is time for.

    Args:
        until: no workload begins after it, and no round that would take longer than what is left.
        keep: takes what was measured of each.

    Returns:
        Those that failed, and why; the others went on.
    """
    failed: dict[str, str] = {}
    for plan in plans:
        if time.monotonic() >= until:
            console.print(f"{plan.name}: left out, the time is over (--seconds)")
            continue
        arms = fitting(plan.gib, plan.arms, shutil.disk_usage(daemon.home).free)
        if gone := [TITLES[a] for a in plan.arms if a not in arms]:
            console.print(
                f"{plan.name}: without {', '.join(gone)}: no room for the snapshots below {daemon.home.parent}"
            )
        if not arms:
            continue
        plan = Plan(plan.gib, plan.variant, arms, plan.rounds)
        workload: Workload | None = None
        try:
            with console.status(f"{plan.name}: freeze"):
                workload = Workload(daemon, module, plan)
            longest = 0.0
            # Of small ones a round that is not counted: page cache, what the page server learns.
            for turn in range(-1 if plan.gib < 16 else 0, plan.rounds):
                if turn > 0 and time.monotonic() + longest > until:
                    console.print(f"{plan.name}: {turn} of {plan.rounds} rounds, the time is over (--seconds)")
                    break
                begin = time.monotonic()
                with console.status(f"{plan.name}: round {turn + 1} of {plan.rounds}"):
                    workload.round(counted=turn >= 0)
                longest = max(longest, time.monotonic() - begin)
            keep(plan.name, workload.result())
        except (Exception, SystemExit) as e:
            if isinstance(e, SystemExit) and not isinstance(e.code, str):
                raise  # told to end
            failed[plan.name] = f"{type(e).__name__}: {e}".strip()[:2000]
            console.print(f"[red]{plan.name}: {failed[plan.name]}", soft_wrap=True)
            console.print(f"[dim]the end of the daemon's log:\n{daemon.log.read_text()[-3000:]}")
            if workload is not None and any(workload.values.values()):
                keep(plan.name, workload.result())
        finally:
            if workload is not None:
                workload.close()
            else:
                daemon.stop_containers()
    return failed


@contextlib.contextmanager
def fake() -> Iterator[tuple[dict[str, Any], ModuleType]]:
    """The fake driver's settings, and its program with the class that calls it."""
    with fake_hardware() as hardware:
        from fake_cuda.program import GPU

        programs = hardware.folder.parent / "programs"
        programs.mkdir()
        for name in ("tiny.py", "served.py"):
            shutil.copy(HERE / "programs" / name, programs)
        (programs / "driver.py").write_text(GPU)
        sys.path.insert(0, str(programs))
        yield {"cuda_dir": str(hardware.folder)}, program("tiny")


def numbers(text: str) -> tuple[float, ...]:
    return tuple(sorted(float(x) for x in text.split(",")))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=numbers, help="GiB of weights (default: 1,8,30)")
    parser.add_argument("--variants", default=",".join(VARIANTS), help=f"of {','.join(VARIANTS)}")
    parser.add_argument("--variant-size", type=float, default=1.0, help="GiB, of those that are not plain (default: 1)")
    parser.add_argument("--arms", default=",".join(TITLES), help=f"of {','.join(TITLES)}")
    parser.add_argument("--rounds", type=int, default=5, help="of 1 GiB; of larger ones fewer (default: 5)")
    parser.add_argument("--seconds", type=float, default=440.0, help="begin nothing after so long (default: 440)")
    parser.add_argument("--under", default="/var/tmp", help="where the daemon's state goes, snapshots and all")
    parser.add_argument("--pack", action="store_true", help="put snapshots into the page store before they are thawed")
    parser.add_argument("--fake", action="store_true", help="a tiny program on the fake driver of the tests")
    parser.add_argument(
        "--json", help="where the numbers go (default: benchmarks/results/gpu/start.json; of --fake: nowhere)"
    )
    options = parser.parse_args()
    arms = tuple(a for a in TITLES if a in options.arms.split(","))
    variants = [v for v in VARIANTS if v in options.variants.split(",")]
    if unknown := set(options.arms.split(",")) - set(TITLES) | set(options.variants.split(",")) - set(VARIANTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    refuse_fake_results(parser, options)
    if not options.fake and (why := missing(torch=True)):
        console.print(f"gpu/start.py: nothing measured: {why}")
        return 0
    if options.fake:
        plans = [Plan(gib, "plain", arms, options.rounds) for gib in options.sizes or (0.03125,)]
    else:
        plans = [Plan(g, "plain", arms, rounds_for(g, options.rounds)) for g in options.sizes or (1.0, 8.0, 30.0)]
        rounds = max(2, math.ceil(options.rounds / 2))
        # The largest last: whatever happens to it, the rest is measured.
        plans += [Plan(options.variant_size, v, arms, rounds) for v in variants if v != "plain"]
        plans = sorted((p for p in plans if p.variant in variants), key=lambda p: p.gib)
    with contextlib.ExitStack() as stack:
        settings, module = stack.enter_context(fake()) if options.fake else ({}, program("transformer"))
        daemon = stack.enter_context(Daemon(under=options.under, pack=int(options.pack), **settings))
        result: dict[str, Any] = {
            "machine": machine(daemon.settings),
            "gpu": {"name": "fake"} if options.fake else gpu_facts(),
            "packed": options.pack,
            "workloads": {},
        }

        def keep(name: str, found: dict[str, Any]) -> None:
            result["workloads"][name] = found
            show(name, found)
            if options.json or not options.fake:
                path = save("gpu/start", result, options.json)
                console.print(f"Numbers in {path}")

        result["failed"] = measure(daemon, module, plans, time.monotonic() + options.seconds, keep)
        if result["failed"] and (options.json or not options.fake):
            save("gpu/start", result, options.json)
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
