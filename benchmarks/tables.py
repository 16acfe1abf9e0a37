"""Write the numbers of results/*.json into README.md, between its markers: `python benchmarks/tables.py`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ARMS = {
    "cold": "cold start",
    "plain": "criu restore",
    "whole": "woodfrog, page server off",
    "woodfrog": "woodfrog",
    "fork": "fork server",
}
PHASES = ("verify", "assemble", "restore", "wake", "run")


def rows(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = [" | ".join(headings), "|".join(["---", *["---:"] * (len(headings) - 1)])]
    return "".join(
        f"| {line} |\n" if i != 1 else f"|{line}|\n" for i, line in enumerate([*head, *map(" | ".join, lines)])
    )


def facts(result: dict[str, Any]) -> str:
    m = result["machine"]
    return (
        f"Measured {m['date']}: {m['cpu']}, {m['cores']} cores, {m['memory_gib']:.0f} GiB, kernel {m['kernel']}, "
        f"CRIU {m['criu']}, Python {m['python']}; load before {m['load_before'][0]}.\n\n"
    )


def start(result: dict[str, Any]) -> str:
    work = result["workloads"]
    lines = [
        [
            title,
            *(
                f"{w['ms'][arm]['min']:.0f} / {w['ms'][arm]['median']:.0f} / {w['ms'][arm]['p95']:.0f}"
                for w in work.values()
            ),
        ]
        for arm, title in ARMS.items()
    ]
    lines.append(
        [
            "woodfrog's own share: page server off, over criu restore",
            *(f"{w['overhead_ms']['whole']['median']:.1f}" for w in work.values()),
        ]
    )
    lines.append(["cold / woodfrog", *(f"{w['cold_over_woodfrog']:.1f}" for w in work.values())])
    for name in PHASES:
        lines.append(
            [f"phase `{name}` of woodfrog", *(f"{w['phases_ms']['woodfrog'].get(name, 0):.1f}" for w in work.values())]
        )
    heads = [f"{name} ({w['snapshot']['memory_bytes'] / 1e6:.0f} MB)" for name, w in work.items()]
    return f"{facts(result)}ms, min / median / p95 of {result['rounds']} rounds:\n\n{rows(['', *heads], lines)}"


def calls(result: dict[str, Any]) -> str:
    payload = [
        [k, str(v["n"]), *(f"{v[x]:.2f}" for x in ("min", "median", "p95"))] for k, v in result["payload_ms"].items()
    ]
    parts = result["where_ms"]
    where = ", ".join(
        f"{k} {parts[p]:.2f}" for k, p in (("HTTP", "http"), ("daemon", "daemon"), ("worker", "run"), ("SDK", "client"))
    )
    many = [[k, f"{v['calls_per_second']:.0f}", f"{v['median_ms']:.2f}"] for k, v in result["throughput"].items()]
    return (
        f"{facts(result)}{rows(['payload', 'calls', 'min ms', 'median ms', 'p95 ms'], payload)}\n"
        f"Where {parts['call']:.2f} ms of a small call go: {where} ms.\n\n"
        f"{rows(['instances, clients', 'calls a second', 'median ms'], many)}"
    )


def soak(result: dict[str, Any]) -> str:
    held = [[k, str(v), str(result["held_at_end"][k])] for k, v in result["held_at_start"].items()]
    return (
        f"{facts(result)}{result['cycles']} cycles, {result['freezes']} freezes and {result['thaws']} thaws in all, "
        f"{result['seconds']:.0f} s: {len(result['differences'])} differences, {len(result['leaks'])} leaks.\n\n"
        f"{rows(['held', 'at the start', 'at the end'], held)}"
    )


def main() -> int:
    readme = HERE / "README.md"
    text = readme.read_text()
    parts: dict[str, Callable[[dict[str, Any]], str]] = {"start": start, "calls": calls, "soak": soak}
    for name, render in parts.items():
        path = HERE / "results" / f"{name}.json"
        if not path.exists():
            print(f"no results/{name}.json yet: its part is left as it is", file=sys.stderr)
            continue
        made = f"<!-- {name} -->\n\n{render(json.loads(path.read_text()))}\n<!-- end -->"
        text = re.sub(rf"<!-- {name} -->.*?<!-- end -->", lambda _, made=made: made, text, flags=re.S)
    readme.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
