"""Is a thawed copy as fast as one that booted, once both are warm? Reads of 8 bytes, all over 512 MiB; interleaved.

    python benchmarks/warm.py                # 20 rounds
    python benchmarks/warm.py --rounds 5

Writes benchmarks/results/warm.json. benchmarks/README.md says what each arm is.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from common import Daemon, console, has, machine, number, program, save, summary, table, wait_until

ARMS = {"booted": "booted, never frozen", "thawed": "thawed", "small": "thawed, huge_pages=0"}
SETTLE_CALLS = 10
"""From the 8th on all of its memory is filled in."""


def settle(daemon: Daemon, app: str, *, huge: bool) -> float:
    """Warm, all its memory there, and as huge as it gets; returns the answer."""
    answers = [daemon.call(app, "Gather.run") for _ in range(SETTLE_CALLS)]
    if huge:
        wait_until(lambda: daemon.call(app, "Gather.run")["huge_mib"] >= 500, f"{app} does not get its huge pages")
    return float(answers[-1]["answer"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", help="where the numbers go (default: benchmarks/results/warm.json)")
    options = parser.parse_args()
    if not has("numpy"):
        parser.error("numpy is not installed: make demo-setup")
    module = program("gathers")
    seen: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    with Daemon() as first, Daemon(huge_pages="0") as second:
        result: dict[str, Any] = {"rounds": options.rounds, "machine": machine(first.settings)}
        daemons = {"booted": first, "thawed": first, "small": second}
        with console.status("boot, freeze, thaw, settle"):
            for arm, daemon in daemons.items():
                daemon.deploy(arm, module, ["Gather"], snapshots=arm != "booted", scaledown_window=600.0)
                if arm != "booted":
                    daemon.call(arm, "Gather.run")
                    daemon.wait_for_snapshot(arm)
            for daemon in (first, second):
                daemon.stop_containers()
            expected = {settle(daemon, arm, huge=arm != "small") for arm, daemon in daemons.items()}
        for _ in range(options.rounds):
            for arm, daemon in daemons.items():
                seen[arm].append(daemon.call(arm, "Gather.run"))
                expected.add(seen[arm][-1]["answer"])
        if len(expected) != 1:
            raise SystemExit(f"the arms answered differently: {sorted(expected)}")
    result["ms"] = {arm: summary([s["ms"] for s in rows]) for arm, rows in seen.items()}
    result["huge_mib"] = {arm: summary([s["huge_mib"] for s in rows]) for arm, rows in seen.items()}
    for arm in ("thawed", "small"):
        result[f"{arm}_over_booted"] = round(result["ms"][arm]["median"] / result["ms"]["booted"]["median"], 2)
    table(
        "4 million reads all over 512 MiB: ms of processor time",
        ("", "min", "median", "p95", "MiB in huge pages"),
        [
            [
                ARMS[arm],
                *(number(result["ms"][arm][k]) for k in ("min", "median", "p95")),
                number(result["huge_mib"][arm]["median"]),
            ]
            for arm in ARMS
        ],
    )
    console.print(f"Numbers in {save('warm', result, options.json)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
