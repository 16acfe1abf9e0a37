"""What a further function on known libraries adds to the page store, and what a new capture after changed code adds.

    python benchmarks/lineage.py                      # arrays, model; 3 functions and 3 redeploys each
    python benchmarks/lineage.py --count 1 arrays     # one workload, briefly

Writes benchmarks/results/lineage.json. `stored_percent` is the bytes that packing a snapshot added to the store (names
and compressed pages), of the bytes of its memory. What is rebuilt for serving is a cache, and is told beside it.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from common import Daemon, console, has, machine, number, save, summary, table, wait_until
from first_start import WORKLOADS, Programs, zygote

from woodfrog.settings import load

NAMES = ("arrays", "model")


def stats(daemon: Daemon) -> dict[str, Any]:
    answer: dict[str, Any] = daemon.client.request("GET", "/store").json()
    return answer


def packed(daemon: Daemon, app: str, known: set[str]) -> dict[str, Any]:
    """The newest snapshot of an app, once its memory is in the store."""

    def look() -> dict[str, Any] | None:
        rows = stats(daemon)["snapshots"]
        return next((r for r in rows if r["app"] == app and r["form"] == "packed" and r["id"] not in known), None)

    wait_until(look, f"{app}: its snapshot is not packed")
    found = look()
    assert found is not None
    known.add(found["id"])
    return found


def share(row: dict[str, Any]) -> float:
    return float(100 * row["stored_bytes"] / row["raw_bytes"])


def measure(name: str, count: int) -> dict[str, Any]:
    _, text, needs = WORKLOADS[name]
    programs, known = Programs(name), set[str]()
    further, again = [], []
    try:
        with Daemon(zygotes=1) as daemon:

            def capture(app: str) -> dict[str, Any]:
                daemon.deploy(app, programs.new(text), ["New"], snapshots=True, scaledown_window=600.0)
                time.sleep(0.5)
                daemon.call(app, "New.run", 0)
                row = packed(daemon, app, known)
                daemon.stop_containers()
                return row

            first = capture("first")
            wait_until(lambda: zygote(daemon, needs[0]), "no zygote was made")
            for i in range(count):
                further.append(capture(f"further-{i}"))
            for _ in range(count):
                again.append(capture("further-0"))
            store = stats(daemon)
    finally:
        programs.close()
    for rows in (further, again):
        if not all(row["parent"] for row in rows):
            raise SystemExit(f"{name}: a function did not start from the zygote")
    return {
        "raw_bytes": first["raw_bytes"],
        "stored_percent": {
            "first": share(first),
            "further": summary([share(r) for r in further]),
            "again": summary([share(r) for r in again]),
        },
        "store": {k: store[k] for k in ("packs", "pages", "raw_bytes", "stored_bytes", "cache_bytes")},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workloads", nargs="*", default=[], help=f"of {', '.join(NAMES)}")
    parser.add_argument("--count", type=int, default=3, help="functions, and redeploys, of each")
    parser.add_argument("--json", default=None, help="where to write the results")
    options = parser.parse_args()
    results = {}
    for name in options.workloads or NAMES:
        missing = [m for m in WORKLOADS[name][2] if not has(m)]
        if missing:
            console.print(f"{name}: skipped, {missing[0]} is not installed")
            continue
        results[name] = measure(name, options.count)
        percent = results[name]["stored_percent"]
        rows = [
            [title, number(value if isinstance(value, float) else value["median"])]
            for title, value in (
                ("first function, before there is a zygote", percent["first"]),
                ("further function", percent["further"]),
                ("captured again after changed code", percent["again"]),
            )
        ]
        table(f"{name}: {results[name]['raw_bytes'] / 1e6:.0f} MB each", ["snapshot", "stored, % of its memory"], rows)
    save("lineage", {"machine": machine(load()), "workloads": results}, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
