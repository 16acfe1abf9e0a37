"""Freezing: what the first caller waits for it, against a plain `criu dump` of the same workload; interleaved.

    python benchmarks/capture.py                      # small, arrays, big; 10 rounds of each
    python benchmarks/capture.py --model
    python benchmarks/capture.py --rounds 3 small

Writes benchmarks/results/capture.json. benchmarks/README.md says what is measured.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

from common import Daemon, console, has, machine, number, phase, phase_medians, program, save, summary, table
from peers import CriuImages
from start import WORKLOADS

CHOICES = ("small", "arrays", "big", "model")
PAUSE = ("freeze", "capture")
"""What happens between the user's `enter` and the thaw: hooks and collection, then the dump and its files."""
THAW = ("sandbox", "assemble", "check", "restore", "connect")


def first_call(daemon: Daemon, app: str, cls: str, *, snapshots: bool) -> dict[str, Any]:
    """A first call, with or without a capture in it; and how long after its answer the snapshot was there."""
    starts = program("starts")
    daemon.deploy(app, starts, [cls], snapshots=snapshots, scaledown_window=600.0)
    daemon.stop_containers()
    time.sleep(0.3)
    begin = time.perf_counter()
    answer = daemon.call(app, f"{cls}.run", 0)
    answered = time.perf_counter()
    stored = None
    if snapshots:
        early = bool(daemon.snapshots(app))
        snapshot = daemon.wait_for_snapshot(app)
        stored = (time.perf_counter() - answered) * 1e3
    trace = daemon.last_trace(app)
    if trace["start"] != "cold":
        raise SystemExit(f"{app}: a {trace['start']} start where a cold one was meant")
    daemon.stop_containers()
    if snapshots:
        daemon.client.request("POST", f"/snapshots/{snapshot['id']}/invalidate")
        return {
            "ms": (answered - begin) * 1e3, "answer": answer, "trace": trace, "stored": stored, "early": early,
            "bytes": snapshot["memory_bytes"],
        }  # fmt: skip
    return {"ms": (answered - begin) * 1e3, "answer": answer, "trace": trace}


def measure(daemon: Daemon, name: str, rounds: int) -> dict[str, Any]:
    cls = WORKLOADS[name][0]
    with_capture, without, dumps = [], [], []
    for turn in range(-1, rounds):
        frozen = first_call(daemon, f"capture-{name}", cls, snapshots=True)
        plain = first_call(daemon, f"capture-{name}-off", cls, snapshots=False)
        images = CriuImages(daemon.settings.criu, cls)
        images.close()
        if frozen["answer"] != plain["answer"]:
            raise SystemExit(f"{name}: answers differ: {frozen['answer']} and {plain['answer']}")
        if turn >= 0:
            with_capture.append(frozen)
            without.append(plain)
            dumps.append(images.dump_ms)
    traces = [f["trace"] for f in with_capture]
    pause = [sum(phase(t, n) for n in PAUSE) for t in traces]
    dump = statistics.median(dumps)
    longer = [f["ms"] - p["ms"] for f, p in zip(with_capture, without, strict=True)]
    return {
        "memory_bytes": with_capture[0]["bytes"],
        "criu_dump_ms": summary(dumps),
        "pause_ms": summary(pause),
        "pause_over_criu_dump": round(statistics.median(pause) / dump, 2),
        "dump_over_criu_dump": round(statistics.median(phase(t, "capture") for t in traces) / dump, 2),
        "thaw_ms": summary([sum(phase(t, n) for n in THAW) for t in traces]),
        "first_call_ms": summary([f["ms"] for f in with_capture]),
        "first_call_without_capture_ms": summary([p["ms"] for p in without]),
        "longer_ms": summary(longer),
        "stored_after_answer_ms": summary([f["stored"] for f in with_capture]),
        "answered_before_stored": sum(not f["early"] for f in with_capture),
        "phases_ms": phase_medians(traces),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workloads", nargs="*", help=f"of {', '.join(CHOICES)}; without any: all but the model")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--model", action="store_true", help="also the model (needs `make demo-setup`)")
    parser.add_argument("--json", help="where the numbers go (default: benchmarks/results/capture.json)")
    options = parser.parse_args()
    if unknown := set(options.workloads) - set(CHOICES):
        parser.error(f"unknown workload {', '.join(unknown)}; there are: {', '.join(CHOICES)}")
    chosen = list(options.workloads or [n for n in CHOICES if n != "model"])
    chosen += ["model"] * (options.model and "model" not in chosen)
    if "arrays" in chosen and not has("numpy"):
        chosen.remove("arrays")
    result: dict[str, Any] = {"rounds": options.rounds, "workloads": {}}
    with Daemon() as daemon:
        result["machine"] = machine(daemon.settings)
        for name in chosen:
            done = result["workloads"][name] = measure(daemon, name, options.rounds)
            lines = {
                "criu dump": done["criu_dump_ms"],
                "pause: freeze and capture": done["pause_ms"],
                "thaw after it": done["thaw_ms"],
                "first call, with a capture": done["first_call_ms"],
                "first call, without": done["first_call_without_capture_ms"],
                "difference": done["longer_ms"],
                "stored so long after the answer": done["stored_after_answer_ms"],
            }
            table(
                f"{name} ({done['memory_bytes'] / 1e6:.0f} MB): ms; the pause is {done['pause_over_criu_dump']:.2f}× a "
                f"criu dump; answered before stored {done['answered_before_stored']} of {options.rounds} times",
                ("", "min", "median", "p95"),
                [[title, *(number(v[k]) for k in ("min", "median", "p95"))] for title, v in lines.items()],
            )
            phases = ", ".join(f"{k} {v:.1f}" for k, v in done["phases_ms"].items() if v >= 0.5)
            console.print(f"   [bold]phases[/]: {phases}", soft_wrap=True)
    console.print(f"Numbers in {save('capture', result, options.json)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
