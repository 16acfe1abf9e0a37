"""Processes killed at random moments under a load of mixed calls: is every answer right, and does nothing stay behind?

    python benchmarks/kills.py                   # 200 kills
    python benchmarks/kills.py --count 20 --seed 3

Exit status 1 when an answer was wrong or missing, when anything leaked, or when a store does not verify at the end.
Writes benchmarks/results/kills.json. benchmarks/README.md says what is killed, called and counted.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path

from common import Daemon, console, machine, program, save, summary, table
from soak import children_of, groups_of, grown, settled

from woodfrog.errors import WoodfrogError

APP = "kills"
BRIDGE, SUBNET = "wfkills", "10.248.0.0/16"
TAGS = ("OnceAgain.check", "LazyAgain.check", "twice", "OnceAgain.check", "LazyAgain.check")
VICTIMS = ("daemon", "page server", "worker", "criu", "init")
WEIGHTS = (2, 3, 5, 3, 1)
FIND_S = 1.0
CALLERS = 5
WITHOUT_ANSWER = ("crashed",)
"""What a call may end with instead of an answer: its process was killed under it more often than it is retried."""


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def descendants(pid: int) -> list[int]:
    found = []
    for child in children_of(pid):
        found += [child, *descendants(child)]
    return found


def processes(daemon: Daemon, kind: str) -> list[int]:
    """What of this kind runs now."""
    if kind == "daemon":
        return [daemon.process.pid]
    names = {"page server": "woodfrog-pages", "criu": "criu", "init": "woodfrog-init", "worker": "python"}
    return [p for p in descendants(daemon.process.pid) if command_of(p).startswith(names[kind])]


def kill_one(random_: random.Random, daemon: Daemon) -> str:
    """Kill something, at some moment of its life; what it was, or "" when there was none."""
    kind = random_.choices(VICTIMS, WEIGHTS)[0]
    deadline = time.monotonic() + FIND_S
    while not (found := processes(daemon, kind)):  # criu is there for moments only
        if time.monotonic() > deadline:
            return ""
        time.sleep(0.005)
    time.sleep(random_.uniform(0.0, 0.03))
    try:
        os.kill(random_.choice(found), signal.SIGKILL)
    except ProcessLookupError:
        return ""
    if kind == "daemon":
        daemon.process.wait()
        daemon.start()
    return kind


class Callers:
    """Threads that call in turn until they are told to stop; every answer is checked."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.stop = threading.Event()
        self.right = 0
        self.without: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.ms: list[float] = []
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(CALLERS)]
        for thread in self._threads:
            thread.start()

    def _run(self, caller: int) -> None:
        number = caller * 1_000_000
        while not self.stop.is_set():
            number += 1
            tag = TAGS[number % len(TAGS)]
            arguments = (number,) if tag == "twice" else (number, (0.0, 0.2, 0.05)[number % 3])
            begin = time.perf_counter()
            code, text = "", ""
            try:
                answer = self.daemon.call(APP, tag, *arguments)
                text = "" if answer == number * 2 else f"{tag}({number}) answered {answer!r}"
            except WoodfrogError as e:
                code, text = e.code, f"{tag}({number}): {type(e).__name__} {e.code}: {e}"
            except Exception as e:  # raised by the function: it saw bytes that are not its own
                text = f"{tag}({number}) raised {type(e).__name__}: {e}"
            with self._lock:
                if not text:
                    self.right += 1
                    self.ms.append((time.perf_counter() - begin) * 1e3)
                elif code in WITHOUT_ANSWER:
                    self.without[code] += 1
                else:
                    self.wrong.append(text[:300])

    def join(self) -> None:
        self.stop.set()
        for thread in self._threads:
            thread.join(300)
            if thread.is_alive():
                self.wrong.append("a call never ended")


def leftovers(daemon: Daemon) -> list[str]:
    """What is still there when the daemon has ended."""
    tag = daemon.settings.tag
    found = [str(p) for p in groups_of(tag)]
    found += [str(p) for p in (Path(f"/sys/class/net/{BRIDGE}"),) if p.exists()]
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    found += [line for line in lines if str(daemon.home) in line]
    found += [str(p) for p in daemon.home.glob("snapshots/.*")]
    mark = str(daemon.home).encode()
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if mark in (process / "environ").read_bytes() or mark in (process / "cmdline").read_bytes():
                found.append(f"process {process.name} {command_of(int(process.name))}")
    return found


def problems(daemon: Daemon) -> list[str]:
    """What is wrong with the snapshots and their store on the disk, while no daemon runs."""
    from woodfrog.snapshot.catalogue import Catalogue
    from woodfrog.snapshot.manifest import SigningKey
    from woodfrog.store.pages import PageStore

    store = PageStore(daemon.home / "store")
    try:
        found = [str(p) for p in store.verify(None)]
        catalogue = Catalogue(daemon.home / "snapshots", SigningKey.load_or_create(daemon.home / "keys/ed25519"), store)
        found += [f"{name}: {why}" for name, why in catalogue.damaged.items()]
        for manifest in catalogue.manifests():
            if catalogue.retired(manifest.id) is None:
                try:
                    catalogue.open_verified(manifest.id)
                except WoodfrogError as e:
                    found.append(e.message)
        live = {pack for manifest in catalogue.manifests() for pack in manifest.packs}
        store.gc(live, min_age_s=0.0)
        kept = {p.stem for p in daemon.home.glob("store/packs/*/*")}
        found += [f"the pack {name} is left though nothing needs it" for name in sorted(kept - store.needs(live))]
    finally:
        store.close()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", help="where the numbers go (default: benchmarks/results/kills.json)")
    options = parser.parse_args()
    random_ = random.Random(options.seed)
    killed: Counter[str] = Counter()
    # So many failures in a row are nobody's fault here.
    patient = {"snapshot_failures": 1 << 30, "capture_attempts": 1 << 30}
    with Daemon(network_bridge=BRIDGE, network_subnet=SUBNET, **patient) as daemon:
        facts = machine(daemon.settings)
        daemon.deploy(APP, program("bursts"), ["OnceAgain", "LazyAgain", "twice"])
        for _ in range(2):
            for n, tag in enumerate(TAGS[:3]):
                if daemon.call(APP, tag, n) != n * 2:
                    raise SystemExit(f"{tag} answers wrongly before anything was killed")
            daemon.wait_for_packing(APP)
        first = settled(daemon)
        callers = Callers(daemon)
        begin = time.monotonic()
        try:
            while sum(killed.values()) < options.count:
                time.sleep(random_.uniform(0.0, 1.5))
                if random_.random() < 0.1:  # so that captures are under way now and then
                    for row in random_.sample(rows := daemon.snapshots(APP), min(1, len(rows))):
                        with contextlib.suppress(WoodfrogError):
                            daemon.client.request("POST", f"/snapshots/{row['id']}/invalidate")
                if not (kind := kill_one(random_, daemon)):
                    continue
                killed[kind] += 1
                if sum(killed.values()) % 20 == 0:
                    console.print(f"   {sum(killed.values())} kills, {callers.right} right answers", callers.wrong[:3])
        finally:
            callers.join()
        seconds = time.monotonic() - begin
        last = settled(daemon, like=first)
        # The disk holds what may still be thawed, or waits for the collector: looked at below.
        leaks = [line for line in grown(first, last) if not line.startswith("disk_bytes")]
        daemon.stop()
        time.sleep(4)  # the page server of a killed daemon keeps its descriptors for three seconds
        leaks += leftovers(daemon)
        damage = problems(daemon)
    leaks += [str(p) for p in (daemon.home, daemon.settings.kdat_dir.parent) if p.exists()]
    result = {
        "machine": facts,
        "count": options.count,
        "seed": options.seed,
        "seconds": round(seconds, 1),
        "killed": dict(killed),
        "right_answers": callers.right,
        "answer_ms": {k: v for k, v in summary(callers.ms or [0.0]).items() if k != "values"},
        "without_answer": dict(callers.without),
        "wrong": callers.wrong,
        "leaks": leaks,
        "store_problems": damage,
        "held_at_start": first,
        "held_at_end": last,
    }
    table(
        f"{sum(killed.values())} kills in {seconds:.0f} s",
        ("killed", "times"),
        [[k, str(v)] for k, v in sorted(killed.items())],
    )
    for line in (*callers.wrong[:20], *leaks[:20], *damage[:20]):
        console.print(f"[red]{line}", soft_wrap=True)
    console.print(
        f"{callers.right} right answers, {dict(callers.without) or 'none'} without one, {len(callers.wrong)} wrong; "
        f"{len(leaks)} leaks; {len(damage)} problems in the store. Numbers in {save('kills', result, options.json)}"
    )
    return 1 if callers.wrong or leaks or damage else 0


if __name__ == "__main__":
    sys.exit(main())
