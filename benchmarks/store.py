"""The page store: a million pages opened, looked up, verified, collected; a capture's pages stored. Time and memory.

    python benchmarks/store.py                  # a million pages: 4 GB of disk
    python benchmarks/store.py --pages 100000 --capture 20000

Every step runs in a process of its own, so that its peak of memory is its own. Needs no root and no CRIU.
Writes benchmarks/results/store.json. benchmarks/README.md says what is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import console, machine, number, save, table

from woodfrog.settings import load
from woodfrog.store.pages import PAGE, Ingested, PageStore, Ref, Run

KEY = bytes(range(32))
PACK = 5000
"""Pages of one of the captures that the store is filled with."""
CHANGED = 0.14
"""Share of a child's pages that differ from its parent's."""


def apart(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a step answers, its seconds, the processor's, and the peak of memory of a process that does only this."""
    end, begin = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            before, clock = os.times(), time.perf_counter()
            answer = work()
            after = os.times()
            answer.setdefault("seconds", round(time.perf_counter() - clock, 4))
            answer["cpu_seconds"] = round(after.user + after.system - before.user - before.system, 3)
            answer["peak_mib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
            with open(begin, "w") as f:
                json.dump(answer, f)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(begin)
    with open(end) as f:
        text = f.read()
    if os.waitpid(pid, 0)[1]:
        raise SystemExit("a step failed")
    answer: dict[str, Any] = json.loads(text)
    return answer


class Bench:
    def __init__(self, folder: Path, pages: int, capture: int) -> None:
        self.root = folder / "store"
        self.source = folder / "source"
        self.pages, self.capture = pages, capture

    def opened(self, *, key: bytes | None = KEY) -> PageStore:
        return PageStore(self.root, key=key)

    def fill(self) -> dict[str, Any]:
        """All pages but a capture's, each with content of its own."""
        store = self.opened()
        fd = os.memfd_create("pages")
        begin = time.perf_counter()
        made = 0.0
        for first in range(0, self.pages - self.capture, PACK):
            clock = time.perf_counter()
            count = min(PACK, self.pages - self.capture - first)
            os.pwrite(fd, b"".join([(1 + first + i).to_bytes(8, "little") * 512 for i in range(count)]), 0)
            made += time.perf_counter() - clock
            store.ingest([Run(fd, 0, count)], owner="fill")
        return {"seconds": round(time.perf_counter() - begin - made, 3)}

    def write_source(self, *, changed: float = 0.0) -> dict[str, Any]:
        """A capture's pages; with `changed`, some of them with a few bytes changed, as in the process that goes on."""
        rng, choice = random.Random(1), random.Random(2)
        with open(self.source, "wb") as f:
            for _ in range(self.capture):
                page = rng.randbytes(PAGE)
                if changed and (number := choice.random()) < changed:
                    page = page[:1000] + str(number).encode().ljust(40) + page[1040:]
                f.write(page)
        return {}

    def ingest(self, *, based: bool = False, keep: bool = False, first: bool = False) -> dict[str, Any]:
        store = self.opened()
        refs: list[Ref] = []
        if based:
            refs = [Ref(*r) for r in json.loads((self.root / "refs").read_text())]
        at, base = 0, []
        for ref in refs:
            base.append((at, ref))
            at += ref.pages
        fd = os.open(self.source, os.O_RDONLY)
        runs = [Run(fd, 0, self.capture, first, tuple(base))]
        if based:
            store.open_raw({r.pack for r in refs})  # a daemon has thawed the parent
        late: list[float] = []
        done: list[Ingested] = []
        worker = threading.Thread(target=lambda: done.append(store.ingest(runs, owner="capture")))
        begin = time.perf_counter()
        worker.start()
        while worker.is_alive():  # what else the process has to do: how late does it come to it?
            clock = time.perf_counter()
            time.sleep(0.001)
            late.append((time.perf_counter() - clock - 0.001) * 1e3)
        seconds = time.perf_counter() - begin
        (made,) = done
        if keep:
            (self.root / "refs").write_text(json.dumps([[r.pack, r.slot, r.pages] for r in made.refs[0]]))
        late.sort()
        return {
            "seconds": round(seconds, 4),
            "gb_per_s": round(made.raw_bytes / seconds / 1e9, 2),
            "new": made.new_pages,
            "delta": made.delta_pages,
            "shared": made.shared_pages,
            "zero": made.zero_pages,
            "stored_bytes": made.stored_bytes,
            "stored_share": round(made.stored_bytes / made.raw_bytes, 4),
            "late_ms": {"median": round(late[len(late) // 2], 2), "p99": round(late[len(late) * 99 // 100], 2)}
            | {"max": round(late[-1], 2)},
        }

    def open(self) -> dict[str, Any]:
        begin = time.perf_counter()
        store = self.opened()
        opened = time.perf_counter()
        stats = store.stats()
        return {
            "seconds": round(opened - begin, 4),
            "stats_seconds": round(time.perf_counter() - opened, 4),
            "packs": stats.packs,
            "pages": stats.pages,
            "stored_bytes": stats.stored_bytes,
            "index_bytes": (self.root / "index.sqlite").stat().st_size,
        }

    def verify(self) -> dict[str, Any]:
        store = self.opened()
        begin = time.perf_counter()
        if problems := store.verify():
            raise SystemExit(f"the store is not whole: {problems[:3]}")
        seconds = time.perf_counter() - begin
        return {"seconds": round(seconds, 3), "gb_per_s": round(store.stats().raw_bytes / seconds / 1e9, 2)}

    def open_raw(self, key: bytes | None) -> dict[str, Any]:
        """All packs of the first capture: verified by this process for the first time, and again."""
        store = self.opened(key=key)
        refs = [Ref(*r) for r in json.loads((self.root / "refs").read_text())]
        begin = time.perf_counter()
        paths = store.open_raw({r.pack for r in refs})
        seconds = time.perf_counter() - begin
        size = sum(p.stat().st_size for p in paths.values())
        begin = time.perf_counter()
        store.open_raw({r.pack for r in refs})
        again = time.perf_counter() - begin
        return {
            "seconds": round(seconds, 4),
            "gb_per_s": round(size / seconds / 1e9, 2),
            "again_ms": round(again * 1e3, 3),
        }

    def lose_index(self) -> dict[str, Any]:
        for path in self.root.glob("index.sqlite*"):
            path.unlink()
        begin = time.perf_counter()
        store = self.opened()
        seconds = time.perf_counter() - begin
        return {"seconds": round(seconds, 3), "pages": store.stats().pages}

    def gc(self, keep: float) -> dict[str, Any]:
        store = self.opened()
        packs = sorted(p for (p,) in store.index.query("SELECT id FROM packs"))
        live = set(packs[: round(len(packs) * keep)])
        begin = time.perf_counter()
        gone = store.gc(live, min_age_s=0)
        return {
            "seconds": round(time.perf_counter() - begin, 4),
            "packs": len(gone.packs),
            "freed_bytes": gone.freed_bytes,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, default=1_000_000, help="of the whole store (default: a million)")
    parser.add_argument("--capture", type=int, default=80_000, help="of one capture (default: 80000, 328 MB)")
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"), help="on the disk to measure")
    parser.add_argument("--output", help="where the JSON goes")
    options = parser.parse_args()
    facts = machine(load())
    folder = Path(tempfile.mkdtemp(prefix="wfb-store-", dir=options.folder))
    try:
        bench = Bench(folder, options.pages, options.capture)
        steps: dict[str, dict[str, Any]] = {}

        def step(name: str, work: Callable[[], dict[str, Any]]) -> None:
            steps[name] = apart(work)
            console.print(f"[dim]{name}: {steps[name]}", soft_wrap=True)

        step("fill", bench.fill)
        apart(bench.write_source)
        step("ingest, all new", lambda: bench.ingest(keep=True))
        step("open and count", bench.open)
        step("ingest, all there, no parent", bench.ingest)
        step("ingest, all as the parent", lambda: bench.ingest(based=True))
        apart(lambda: bench.write_source(changed=CHANGED))
        step("ingest, 14% unlike the parent", lambda: bench.ingest(based=True))
        step("open packs, every page", lambda: bench.open_raw(None))
        step("open packs, by their seals", lambda: bench.open_raw(KEY))
        step("verify all", bench.verify)
        step("gc, nothing to do", lambda: bench.gc(1.0))
        step("index lost", bench.lose_index)
        step("gc, half goes", lambda: bench.gc(0.5))
        step("gc, all goes", lambda: bench.gc(0.0))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    save("store", {"machine": facts, "pages": options.pages, "capture_pages": options.capture, "steps": steps},
         options.output)  # fmt: skip
    table(
        f"Page store of {options.pages:,} pages, a capture of {options.capture:,}",
        ("step", "seconds", "processor s", "GB/s", "peak MiB", "new on disk, MB"),
        [
            (
                name,
                number(s["seconds"], 3),
                number(s["cpu_seconds"], 2),
                number(s.get("gb_per_s"), 2),
                number(s["peak_mib"], 0),
                number(s["stored_bytes"] / 1e6 if "shared" in s else None),
            )
            for name, s in steps.items()
        ],
    )


if __name__ == "__main__":
    main()
