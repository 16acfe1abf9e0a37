"""What an idle copy of a 600 MB process costs in memory: proportional set size of everything that belongs to it.

    python benchmarks/memory.py                      # 32 copies, 4 with their memory filled in
    python benchmarks/memory.py --clones 8 --drained 2

Writes benchmarks/results/memory.json. benchmarks/README.md says what is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import Daemon, console, machine, number, program, save, table
from soak import children_of

APP = "memory"
CLASSES = {"Small": "a small request", "Reads": "a request that read 5%"}
KINDS = ("anonymous", "files", "tmpfs", "page_server", "machine", "page_cache_once")
HELD_S = 6.0
"""How long a call is held open, so that the others get containers of their own."""
SPARE_MIB = 2048
"""Left free on the machine, whatever happens."""


def pss_mib(pid: int) -> dict[str, float]:
    """A process's share of the memory it uses, in MiB, by kind; {} when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return {}
    values = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines}
    return {k: values.get(k, 0.0) for k in ("Pss", "Pss_Anon", "Pss_File", "Pss_Shmem")}


def tree(pid: int) -> list[int]:
    return [pid, *(p for c in children_of(pid) for p in tree(c))]


def parts(daemon: Daemon) -> dict[str, list[int]]:
    """Processes of the daemon by what they are."""
    found: dict[str, list[int]] = {"sandboxes": [], "page server": [], "daemon": [daemon.process.pid]}
    for child in children_of(daemon.process.pid):
        with contextlib.suppress(OSError):
            name = Path(f"/proc/{child}/comm").read_text()
            found["page server" if name.startswith("woodfrog-pages") else "sandboxes"] += tree(child)
    return found


def measure(daemon: Daemon) -> dict[str, float]:
    """MiB of all, by part and kind."""
    # Also what no process is charged for: page tables, sandboxes. Other work on the machine disturbs it.
    total = {"used": -available_mib()}
    for part, pids in parts(daemon).items():
        for pid in pids:
            for kind, mib in pss_mib(pid).items():
                total[f"{part} {kind}"] = total.get(f"{part} {kind}", 0.0) + mib
    return total


def per_clone(before: dict[str, float], after: dict[str, float], clones: int) -> dict[str, float]:
    """What a copy added: its sandbox's processes, and the page server's own memory. The snapshot's pages that the page
    server has mapped are page cache, there once for all copies, and given back when memory is short."""

    def grown(what: str) -> float:
        return (after.get(what, 0.0) - before.get(what, 0.0)) / clones

    anonymous = grown("page server Pss_Anon")
    return {
        "clone": round(grown("sandboxes Pss") + anonymous, 2),
        "anonymous": round(grown("sandboxes Pss_Anon"), 2),
        "files": round(grown("sandboxes Pss_File"), 2),
        "tmpfs": round(grown("sandboxes Pss_Shmem"), 2),
        "page_server": round(anonymous, 2),
        "machine": round(grown("used"), 2),
        "page_cache_once": round(after.get("page server Pss_File", 0.0), 2),
    }


def available_mib() -> float:
    return int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) / 1024


class Clones:
    """Copies of the 600 MB process, one for each call that is held open at the same time."""

    def __init__(self, drain_ms: int) -> None:
        self.daemon = Daemon(drain_ms=drain_ms, drain_calls=1)
        self.expected: dict[str, Any] = {}

    def run(self, clones: int, cls: str) -> dict[str, float]:
        """Let so many copies answer, each one request. What was held before they came."""
        daemon = self.daemon
        before = measure(daemon)
        gate = threading.Barrier(clones)

        def one(_: int) -> Any:
            gate.wait()
            return daemon.call(f"{APP}-{cls}", f"{cls}.run", HELD_S)

        with ThreadPoolExecutor(clones) as pool:
            answers = set(pool.map(one, range(clones)))
        if answers != {self.expected[cls]}:
            raise SystemExit(f"wrong answers: {answers}, not {self.expected[cls]}")
        if (running := len(daemon.containers(f"{APP}-{cls}"))) != clones:
            raise SystemExit(f"{running} copies where {clones} were meant")
        return before

    def learn(self, clones: int, cls: str) -> int:
        """A snapshot whose first thaws served the same requests; its bytes."""
        daemon, app = self.daemon, f"{APP}-{cls}"
        daemon.deploy(app, program("waits"), [cls], max_containers=clones, scaledown_window=600.0)
        for _ in range(3):
            self.expected[cls] = daemon.call(app, f"{cls}.run", 0.0)
            daemon.wait_for_packing(app)
            daemon.stop_containers()
        return int(daemon.wait_for_snapshot(app)["memory_bytes"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clones", type=int, default=32)
    parser.add_argument("--drained", type=int, default=4, help="copies whose memory is filled in: 0.65 GB each")
    parser.add_argument("--json", help="where the numbers go (default: benchmarks/results/memory.json)")
    options = parser.parse_args()
    result: dict[str, Any] = {"clones": options.clones, "drained": options.drained, "mib_per_clone": {}}
    for drain_ms, clones in ((-1, options.clones), (500, options.drained)):
        clone = Clones(drain_ms)
        with clone.daemon as daemon:
            result.setdefault("machine", machine(daemon.settings))
            if available_mib() < (clones * 660 if drain_ms >= 0 else clones * 60) + SPARE_MIB:
                raise SystemExit(f"{available_mib():.0f} MiB of memory are too little for {clones} copies")
            for cls, title in CLASSES.items():
                if drain_ms >= 0 and cls != "Reads":
                    continue
                with console.status("freeze"):
                    result["snapshot_bytes"] = clone.learn(clones, cls)
                time.sleep(3)  # the pool is full again
                before = clone.run(clones, cls)
                time.sleep(1)
                last = 0.0
                while drain_ms >= 0 and (now := measure(daemon)["sandboxes Pss"]) > last + 1:  # until all is filled in
                    last = now
                    time.sleep(2)
                title = f"{clones} copies, {title}" + (", filled in" if drain_ms >= 0 else "")
                result["mib_per_clone"][title] = per_clone(before, measure(daemon), clones)
                daemon.stop_containers()
    table(
        f"MiB of memory (Pss) that one idle copy of a {result['snapshot_bytes'] / 1e6:.0f} MB process costs",
        ("", "all", "anonymous", "files", "tmpfs", "page server", "machine", "page cache, once"),
        [[title, *(number(v[k]) for k in ("clone", *KINDS))] for title, v in result["mib_per_clone"].items()],
    )
    console.print(f"Numbers in {save('memory', result, options.json)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
