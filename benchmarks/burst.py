"""Many thaws at once: calls that each need a container of their own, all sent at the same time.

    python benchmarks/burst.py                     # 100 calls, 10 rounds
    python benchmarks/burst.py --calls 20 --rounds 2

Writes benchmarks/results/burst.json. benchmarks/README.md says what is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import Daemon, console, machine, number, phase_medians, program, save, summary, table, wait_until
from soak import children_of

APP = "burst"
WHO = ("daemon", "sandboxes", "page server", "client")
SETTLE_S = 2.5
"""After a round: the last sandboxes go, the pool is filled."""
TICK = os.sysconf("SC_CLK_TCK")


def seconds_of(pid: int, *, children: bool = False) -> float:
    """Processor time of a process so far, or of its children that have ended, and theirs."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    first = 13 if children else 11
    return (int(fields[first]) + int(fields[first + 1])) / TICK


def used(daemon: Daemon) -> dict[str, float]:
    """Processor seconds so far, by who used them. A sandbox counts when it is gone: init, criu, worker."""
    found = {
        "daemon": seconds_of(daemon.process.pid),
        "sandboxes": seconds_of(daemon.process.pid, children=True),
        "client": seconds_of(os.getpid()),
        "page server": 0.0,
    }
    for child in children_of(daemon.process.pid):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{child}/comm").read_text().startswith("woodfrog-pages"):
                found["page server"] = seconds_of(child)
    return found


class Burst:
    def __init__(self, daemon: Daemon, tag: str) -> None:
        self.daemon, self.tag = daemon, tag

    def round(self, calls: int) -> dict[str, Any]:
        """So many calls at the same moment."""
        daemon = self.daemon
        gate = threading.Barrier(calls + 1)

        def one(n: int) -> tuple[float, Any]:
            gate.wait()
            begin = time.perf_counter()
            answer = daemon.call(APP, f"{self.tag}.identity", n)
            return (time.perf_counter() - begin) * 1e3, answer

        with ThreadPoolExecutor(calls) as pool:
            running = [pool.submit(one, n) for n in range(calls)]
            before = used(daemon)
            gate.wait()
            begin = time.perf_counter()
            done = [f.result() for f in running]
            took = time.perf_counter() - begin
        wait_until(lambda: not daemon.containers(APP), "containers do not go")
        time.sleep(SETTLE_S)
        answers = [answer for _, answer in done]
        wrong = [a for n, a in enumerate(answers) if a[0] != n * 2]
        if wrong or len({a[1] for a in answers}) != calls or len({a[2] for a in answers}) != calls:
            raise SystemExit(f"wrong answers, or not from {calls} containers: {wrong[:3]}")
        after = used(daemon)
        return {"seconds": took, "ms": [ms for ms, _ in done], "used": {k: after[k] - v for k, v in before.items()}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", help="where the numbers go (default: benchmarks/results/burst.json)")
    options = parser.parse_args()
    # A connection and a thread for each call.
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    with Daemon() as daemon:
        result: dict[str, Any] = {"machine": machine(daemon.settings), "calls": options.calls}
        daemon.deploy(APP, program("bursts"), ["Once"], single_use=True)
        burst = Burst(daemon, "Once")
        with console.status("freeze"):
            daemon.call(APP, "Once.identity", 0)
            result["memory_bytes"] = daemon.wait_for_snapshot(APP)["memory_bytes"]
            burst.round(min(8, options.calls))
            daemon.wait_for_packing(APP)
        before = daemon.client.request("GET", "/health").json()["counters"]
        rounds = []
        for _ in range(options.rounds):
            rounds.append(burst.round(options.calls))
        after = daemon.client.request("GET", "/health").json()["counters"]
        rows = daemon.client.request("GET", "/calls", params={"limit": str(min(200, options.calls))}).json()["calls"]
        traces = [daemon.client.request("GET", f"/calls/{row['id']}/trace").json() for row in rows]
    thaws = after.get("restore.done", 0) - before.get("restore.done", 0)
    result |= {
        "thaws": thaws,
        "cold": options.calls * options.rounds - thaws,
        "thaws_per_second": summary([options.calls / r["seconds"] for r in rounds]),
        "answer_ms": {k: v for k, v in summary([ms for r in rounds for ms in r["ms"]]).items() if k != "values"},
        "processor_ms_per_thaw": {
            who: round(statistics.median(r["used"][who] for r in rounds) / options.calls * 1e3, 1) for who in WHO
        },
        "phases_ms": phase_medians(traces),
    }
    rate, wait, cpu = result["thaws_per_second"], result["answer_ms"], result["processor_ms_per_thaw"]
    table(
        f"{options.calls} calls at once, {options.rounds} times; a container each ({result['memory_bytes'] >> 20} MiB)",
        ("", "min", "median", "p95"),
        [
            ["thaws a second", *(number(rate[k]) for k in ("min", "median", "p95"))],
            ["ms to an answer", *(number(wait[k], 0) for k in ("min", "median", "p95"))],
        ],
    )
    console.print(
        f"   [bold]processor time of a thaw, ms[/]: {', '.join(f'{who} {cpu[who]:.1f}' for who in WHO)}; "
        f"{result['cold']} cold starts",
        soft_wrap=True,
    )
    phases = ", ".join(f"{k} {v:.1f}" for k, v in result["phases_ms"].items() if v >= 0.1)
    console.print(f"   [bold]phases[/]: {phases}", soft_wrap=True)
    console.print(f"Numbers in {save('burst', result, options.json)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
