"""Memory that is not in the page cache: a thaw that needs all of it, beside plain reads of the same file, in turn.

    python benchmarks/cold_disk.py                       # 1,500 MiB, 4 rounds
    python benchmarks/cold_disk.py --mib 64 --rounds 1   # briefly

Writes benchmarks/results/cold_disk.json. Drops the machine's page cache. benchmarks/README.md says what each arm is.
"""

from __future__ import annotations

import argparse
import asyncio
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from common import console, machine, number, save, summary, table

from engine_rig import Frozen, Rig
from woodfrog.engine.engine import Lazy
from woodfrog.linux.pageserver import PageServer, make_set
from woodfrog.settings import load
from woodfrog.snapshot.memory import read_areas

PROGRAM = """
import hashlib, os
data = [os.urandom(1 << 20) for _ in range({mib})]
held = hashlib.blake2b(b"".join(data[::16])).hexdigest()
def check(): return len(data), hashlib.blake2b(b"".join(data[::16])).hexdigest() == held
"""
PAGES_UID = 64647
READ = 4 << 20
PARALLEL = 8
ARMS = {
    "warm": "thaw, all in the page cache",
    "cold": "thaw, nothing in it",
    "buffered": "read through the page cache",
    "direct": "direct reads, one at a time",
    "parallel": f"direct reads, {PARALLEL} at a time",
}


def drop_caches() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("1")


def read(path: Path, *, parallel: int, direct: bool) -> None:
    size = path.stat().st_size
    fd = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))

    def part(number: int) -> None:
        with mmap.mmap(-1, READ) as buffer:  # direct reads want memory that is aligned
            for at in range(number * READ, size, parallel * READ):
                os.preadv(fd, [buffer], at)

    try:
        with ThreadPoolExecutor(parallel) as pool:
            list(pool.map(part, range(parallel)))
    finally:
        os.close(fd)


async def thaw(rig: Rig, frozen: Frozen, needed: Path, mib: int) -> None:
    """Until it has answered, and all of its memory is there."""
    server = await PageServer.start(uid=PAGES_UID, on_death=lambda: None)
    lazy = Lazy(server, needed)
    sandbox = None
    try:
        sandbox, _ = await rig.thaw(frozen, lazy=lazy)
        answer = await rig.ask(sandbox, patience=120)
        assert lazy.served is not None
        pages, _ = await lazy.served.ready
        if answer != f"({mib}, True)" or pages * 4096 < mib << 20:
            raise SystemExit(f"it answered {answer}, with {pages} pages")
    finally:
        if sandbox is not None:
            await sandbox.destroy()
            rig.sandboxes.remove(sandbox)
        if lazy.served is not None:
            await lazy.served.drop()
        await server.close()


async def measure(mib: int, rounds: int, under: str) -> tuple[int, dict[str, list[float]]]:
    """Bytes of memory in the images, and seconds by arm."""
    with tempfile.TemporaryDirectory(prefix="wfb-cold-", dir=under) as folder:
        home = Path(folder)
        home.chmod(0o755)
        rig = Rig.make(home)
        try:
            sandbox, _ = await rig.start(PROGRAM.format(mib=mib))
            await rig.ask(sandbox, patience=120)
            frozen = await rig.freeze(sandbox)
            rig.sandboxes.remove(sandbox)
            memories = read_areas(frozen.images)
            needed = home / "needed"
            needed.write_bytes(make_set((m.pid, a.begin, a.end) for m in memories for a in m.areas if a.end <= 1 << 47))
            pages = max(frozen.images.glob("pages-*.img"), key=lambda p: p.stat().st_size)
            reads: dict[str, Callable[[], None]] = {
                "buffered": lambda: read(pages, parallel=1, direct=False),
                "direct": lambda: read(pages, parallel=1, direct=True),
                "parallel": lambda: read(pages, parallel=PARALLEL, direct=True),
            }
            await thaw(rig, frozen, needed, mib)
            taken: dict[str, list[float]] = {arm: [] for arm in ARMS}
            for turn in range(rounds):
                with console.status(f"round {turn + 1} of {rounds}"):
                    for arm in ARMS:
                        if arm != "warm":
                            drop_caches()
                        begin = time.perf_counter()
                        if arm in reads:
                            reads[arm]()
                        else:
                            await thaw(rig, frozen, needed, mib)
                        taken[arm].append(time.perf_counter() - begin)
                    # For the next round's first arm.
                    read(pages, parallel=1, direct=False)
            return pages.stat().st_size, taken
        finally:
            await rig.close()
            subprocess.run(["sync"], check=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--under", default="/var/tmp", help="the disk: where images go")
    parser.add_argument("--json", help="where the numbers go")
    options = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("needs root")
    size, taken = asyncio.run(measure(options.mib, options.rounds, options.under))
    ms = {arm: summary([s * 1e3 for s in seconds]) for arm, seconds in taken.items()}
    rates = {arm: round(size / (1 << 30) / v["median"] * 1e3, 3) for arm, v in ms.items()}
    rows = [[ARMS[a], *(number(v[k]) for k in ("min", "median", "p95")), number(rates[a], 2)] for a, v in ms.items()]
    table(f"{size >> 20} MiB: ms", ("", "min", "median", "p95", "GiB/s"), rows)
    result = {"machine": machine(load()), "bytes": size, "ms": ms, "gib_s": rates}
    console.print(f"Numbers in {save('cold_disk', result, options.json)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
