"""Many freeze/thaw cycles of mixed functions: is what a process sees the same before and after, and does anything leak?

    python benchmarks/soak.py                # 500 cycles
    python benchmarks/soak.py --cycles 20

Every cycle thaws a fresh instance from its snapshot, compares what it sees with what it saw before the freeze, changes
all of its state, and stops it. Every so often (`--recapture`) the snapshot is thrown away and made anew first. Exit
status 1 when there is a difference or a leak. Writes benchmarks/results/soak.json. benchmarks/README.md says what is
compared and counted.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from common import Daemon, console, machine, program, save, summary, table, wait_until

APP = "soak"
BRIDGE = "wfsoak"
SUBNET = "10.249.0.0/16"
NOT_LEAKS = ("journal.sqlite", "events", "logs", "calls", "daemon.log")
"""Below the state directory, what grows by design: the journal and the logs, each with a limit of its own."""


def differences(before: Any, after: Any, at: str = "") -> list[str]:
    """Paths at which two pieces of plain data differ, with both values."""
    if isinstance(before, dict) and isinstance(after, dict):
        found = []
        for key in sorted({*before, *after}, key=str):
            found += differences(before.get(key), after.get(key), f"{at}.{key}" if at else str(key))
        return found
    return [] if before == after else [f"{at}: {str(before)[:120]!r} -> {str(after)[:120]!r}"]


def disk_bytes(home: Path) -> int:
    total = 0
    for folder, folders, files in os.walk(home):
        if Path(folder) == home:
            folders[:] = [f for f in folders if f not in NOT_LEAKS]
            files = [f for f in files if not f.startswith(NOT_LEAKS)]
        for name in files:
            try:
                total += os.lstat(os.path.join(folder, name)).st_blocks * 512
            except FileNotFoundError:
                continue  # removed meanwhile
    return total


def children_of(pid: int) -> list[int]:
    try:
        return [int(p) for t in Path(f"/proc/{pid}/task").iterdir() for p in (t / "children").read_text().split()]
    except OSError:
        return []  # gone meanwhile


def daemon_tree(daemon: Daemon) -> list[int]:
    """The daemon and its own children, without what is in the sandboxes."""
    return [daemon.process.pid, *children_of(daemon.process.pid)]


def groups_of(tag: str) -> list[Path]:
    """Control groups of a state directory's sandboxes; others come and go meanwhile."""
    found = []
    for folder, folders, _ in os.walk("/sys/fs/cgroup"):  # skips what goes while it looks
        if Path(folder).name == "woodfrog":
            found += [Path(folder) / name for name in folders if name.startswith(f"{tag}-")]
            folders.clear()
    return found


def held(daemon: Daemon) -> dict[str, int]:
    """What the daemon holds of the machine now."""
    pid = daemon.process.pid
    groups = groups_of(daemon.settings.tag)
    # A process is in one group of each hierarchy: counted once.
    processes = set()
    for group in groups:
        with contextlib.suppress(OSError):
            processes |= set((group / "cgroup.procs").read_text().split())
    mounts = [
        line
        for who in (pid, os.getpid())
        for line in Path(f"/proc/{who}/mountinfo").read_text().splitlines()
        if str(daemon.home) in line
    ]
    ports = Path(f"/sys/class/net/{daemon.settings.network_bridge}/brif")
    namespaces = set()
    for process in Path("/proc").iterdir():
        if process.name in processes:
            try:
                namespaces.add(os.readlink(process / "ns/net"))
            except OSError:
                continue
    own_status = Path(f"/proc/{pid}/status").read_text()
    zombies = 0
    for child in daemon_tree(daemon)[1:]:
        try:
            zombies += "\nState:\tZ" in Path(f"/proc/{child}/status").read_text()
        except OSError:
            continue
    return {
        "processes": len(processes),
        "cgroups": len(groups),
        "mounts": len(mounts),
        "links": len(list(ports.iterdir())) if ports.exists() else 0,
        "network_namespaces": len(namespaces),
        "zombies": zombies,
        "children": len(daemon_tree(daemon)) - 1,
        "descriptors": len(list(Path(f"/proc/{pid}/fd").iterdir())),
        "threads": int(own_status.split("Threads:")[1].split()[0]),
        "disk_bytes": disk_bytes(daemon.home),
        "rss_kb": int(own_status.split("VmRSS:")[1].split()[0]),
    }


SETTLE_S = 150
"""Longer than packs that were in use are kept in the page store."""
GROWTH = {"descriptors": 4, "threads": 4, "children": 0, "disk_bytes": 64 << 20, "rss_kb": 65536}
"""What may be more at the end than at the start: a thread pool fills up, the allocator and SQLite keep memory,
snapshots of the same program differ a little in size. The rest must be as at the start."""
LATER_KB = 24576
"""Of the daemon's memory, what may be more at the end than half-way, when the caches are full: a leak goes on."""
MANY = 200
"""Cycles from which on there is a half-way."""


def settled(daemon: Daemon, like: dict[str, int] | None = None) -> dict[str, int]:
    """What is held once nothing runs and the pool of prepared sandboxes is full."""
    daemon.stop_containers()
    before: dict[str, int] = {}
    deadline = time.monotonic() + SETTLE_S
    while True:
        daemon.client.request("POST", "/snapshots/gc", params={"wait": "60"})
        now = held(daemon)
        stable = {k: v for k, v in now.items() if k != "rss_kb"} == {k: v for k, v in before.items() if k != "rss_kb"}
        if stable and (like is None or not grown(like, now)):
            return now
        if time.monotonic() > deadline:
            return now
        before = now
        time.sleep(1.5)  # the pool of prepared sandboxes is filled up a second after one was taken


def grown(first: dict[str, int], last: dict[str, int]) -> list[str]:
    return [f"{k}: {v} -> {last[k]}" for k, v in first.items() if last[k] > v + GROWTH.get(k, 0)]


class Soak:
    def __init__(self, daemon: Daemon, recapture: int) -> None:
        self.daemon = daemon
        self.recapture = recapture
        mixed = program("mixed")
        self.classes: list[str] = list(mixed.CLASSES)
        daemon.deploy(APP, mixed, self.classes, scaledown_window=600.0)
        self.visits: Counter[str] = Counter()
        self.freezes = self.thaws = 0
        self.found: list[str] = []
        self.thaw_ms: dict[str, list[float]] = {}

    def cycle(self, turn: int) -> None:
        daemon, name = self.daemon, self.classes[turn % len(self.classes)]
        fresh = self.visits[name] % self.recapture == 0
        self.visits[name] += 1
        if fresh:
            for row in daemon.snapshots(APP, name):
                daemon.client.request("POST", f"/snapshots/{row['id']}/invalidate")
        begin = time.perf_counter()
        before, after = daemon.call(APP, f"{name}.check")
        ms = (time.perf_counter() - begin) * 1e3
        start = daemon.last_trace(APP)["start"]
        if start != ("cold" if fresh else "restore"):
            self.found.append(f"cycle {turn}, {name}: a {start} start, {'freeze' if fresh else 'thaw'} meant")
        self.thaws += 1
        if fresh:
            self.freezes += 1
            daemon.wait_for_snapshot(APP, name)
        else:
            self.thaw_ms.setdefault(name, []).append(ms)
        self.found += [f"cycle {turn}, {name}: {d}" for d in differences(before, after)]
        daemon.call(APP, f"{name}.mutate")
        for row in daemon.containers(APP):
            daemon.client.request("POST", f"/containers/{row['id']}/stop")
        wait_until(lambda: not daemon.containers(APP), f"cycle {turn}: {name} does not stop")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cycles", type=int, default=500)
    parser.add_argument("--recapture", type=int, default=2, help="make every n-th snapshot of a function anew")
    parser.add_argument("--json", help="where the numbers go (default: benchmarks/results/soak.json)")
    options = parser.parse_args()
    # One of each function: then the disk holds as much at the end as at the start.
    with Daemon(network_bridge=BRIDGE, network_subnet=SUBNET, keep_snapshots=1) as daemon:
        facts = machine(daemon.settings)
        soak = Soak(daemon, options.recapture)
        # What is counted as held at the start is after one visit of each: skeletons, page server, thread pools.
        warm_up = len(soak.classes)
        for turn in range(warm_up):
            soak.cycle(turn)
        first = settled(daemon)
        begin = time.monotonic()
        halfway: dict[str, int] = {}
        for turn in range(warm_up, warm_up + options.cycles):
            soak.cycle(turn)
            if options.cycles >= MANY and turn - warm_up == options.cycles // 2:
                halfway = settled(daemon)
            if (turn - warm_up) % 50 == 49:
                done, took = turn + 1 - warm_up, time.monotonic() - begin
                memory = held(daemon)["rss_kb"] >> 10
                console.print(
                    f"   {done} cycles, {len(soak.found)} differences, the daemon has {memory} MiB, {took:.0f} s"
                )
        last = settled(daemon, like=first)
        seconds = time.monotonic() - begin
        leaks = grown(first, last)
        if halfway and last["rss_kb"] > halfway["rss_kb"] + LATER_KB:
            leaks.append(f"rss_kb since half-way: {halfway['rss_kb']} -> {last['rss_kb']}")
        home, tag = daemon.home, daemon.settings.tag
    leaks += [f"after the daemon's end: {p}" for p in groups_of(tag)]
    leaks += [f"after the daemon's end: {p}" for p in (Path(f"/sys/class/net/{BRIDGE}"), home) if p.exists()]
    result = {
        "machine": facts,
        "cycles": options.cycles,
        "functions": soak.classes,
        "freezes": soak.freezes,
        "thaws": soak.thaws,
        "seconds": round(seconds, 1),
        "differences": soak.found,
        "leaks": leaks,
        "held_at_start": first,
        "held_halfway": halfway,
        "held_at_end": last,
        "thaw_ms": {
            name: {k: v for k, v in summary(values).items() if k != "values"} for name, values in soak.thaw_ms.items()
        },
    }
    table(
        f"{options.cycles} cycles ({soak.freezes} freezes, {soak.thaws} thaws) in {seconds:.0f} s",
        ("held", "at the start", "half-way", "at the end"),
        [[k, str(v), str(halfway.get(k, "")), str(last[k])] for k, v in first.items()],
    )
    for line in (*soak.found[:20], *leaks):
        console.print(f"[red]{line}", soft_wrap=True)
    console.print(f"{len(soak.found)} differences, {len(leaks)} leaks. Numbers in {save('soak', result, options.json)}")
    return 1 if soak.found or leaks else 0


if __name__ == "__main__":
    sys.exit(main())
