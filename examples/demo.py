"""`make demo`: a real model's cold start against its thaw, side by side.

Deploys examples/embedder.py twice: as it is, and with snapshots off. Then, alternating: start each from nothing with a
call, stop its container, again. Then a few new programs on the same libraries: their first start ever. Times are the
client's, from the call to the answer. Writes demo.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

import embedder
import numpy as np
from rich.console import Console
from rich.table import Table

import woodfrog
from woodfrog.errors import WoodfrogError
from woodfrog.sdk import deploy
from woodfrog.sdk.client import Client, connect, outdated

SENTENCES = ["what is the meaning of life?", "a wood frog freezes in winter", "and thaws in spring"]
# What a person wants to see of a start, from the names the system gives its phases.
COLD_PHASES = ("sandbox", "assemble", "spawn", "connect", "boot", "wake", "run")
NEW = 3
"""New programs whose first start is measured."""
THAW_PHASES = ("verify", "sandbox", "assemble", "check", "restore", "connect", "wake", "run")


def deploy_twin(client: Client) -> None:
    """The same program with nothing frozen, not its libraries either: what a cold start is without woodfrog."""
    bundle = deploy.build(
        "embedder-cold", [embedder.app.registered_classes["Embedder"]], ("embedder", embedder.__file__)
    )
    functions = tuple(
        dataclasses.replace(f, snapshot=dataclasses.replace(f.snapshot, enabled=False), plain_start=True)
        for f in bundle.spec.functions
    )
    deploy.send(
        client,
        dataclasses.replace(bundle, spec=dataclasses.replace(bundle.spec, functions=functions)),
        ephemeral=False,
    )


def stop_containers(client: Client, app: str) -> None:
    while rows := [c for c in client.request("GET", "/containers").json()["containers"] if c.get("app") == app]:
        for row in rows:
            try:
                client.request("POST", f"/containers/{row['id']}/stop")
            except WoodfrogError:
                continue  # it went by itself
        time.sleep(0.05)
    time.sleep(0.3)  # the next prepared sandbox


def trace_of_last(client: Client, app: str) -> dict[str, Any]:
    calls = client.request("GET", "/calls").json()["calls"]
    call = next(c for c in calls if c["app"] == app)
    answer: dict[str, Any] = client.request("GET", f"/calls/{call['id']}/trace").json()
    return answer


def measure(client: Client, app: str) -> tuple[float, np.ndarray, dict[str, Any]]:
    """Start from nothing, by one call: milliseconds at the client, the answer, the trace."""
    stop_containers(client, app)
    model = woodfrog.Cls.from_name(app, "Embedder")()
    begin = time.perf_counter()
    answer = model.run.remote(SENTENCES)
    return (time.perf_counter() - begin) * 1e3, np.asarray(answer), trace_of_last(client, app)


def wait_for_libraries(client: Client, seconds: float = 120) -> bool:
    """After the first start of a program its libraries are frozen too, in the background."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        rows = client.request("GET", "/snapshots").json()["snapshots"]
        if any(s.get("kind") == "zygote" and "sentence_transformers" in s.get("modules", ()) for s in rows):
            return True
        time.sleep(0.2)
    return False


def measure_new(client: Client, folder: Path) -> tuple[float, np.ndarray, dict[str, Any]]:
    """The first start ever of a program that was changed a moment ago."""
    stamp = f"{time.time_ns():x}"
    text = Path(embedder.__file__).read_text().replace('"warm up"', f'"warm up {stamp}"')
    (folder / f"embedder_{stamp}.py").write_text(text)
    sys.path.insert(0, str(folder))
    try:
        program = import_module(f"embedder_{stamp}")
    finally:
        sys.path.remove(str(folder))
    known = snapshots(client, "embedder-new")
    program.app.deploy("embedder-new")
    measured = measure(client, "embedder-new")
    wait_for_snapshot(client, "embedder-new", known)
    stop_containers(client, "embedder-new")
    (folder / f"embedder_{stamp}.py").unlink()
    return measured


def phase_ms(traces: list[dict[str, Any]], name: str) -> float | None:
    """Median over the traces; nested phases of the same name count once, at the top."""
    values = []
    for trace in traces:
        found = [p["ms"] for p in trace["phases"] if p["name"] == name and p["parent"] in (None, "queue")]
        if found:
            values.append(sum(found))
    return statistics.median(values) if values else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", default="demo.json", help="where the numbers go")
    options = parser.parse_args()
    console = Console()
    client = connect()
    if outdated(client.health() or {}):  # the clone was updated
        subprocess.run([Path(sys.executable).with_name("woodfrog"), "daemon", "restart"], check=True)
    console.print(
        "[bold]1.[/] deploy the embedder (all-MiniLM-L6-v2 through sentence-transformers), with and without snapshots"
    )
    embedder.app.deploy("embedder")
    deploy_twin(client)
    console.print("[bold]2.[/] first start: boot, freeze, thaw, answer")
    first_ms, reference, _ = measure(client, "embedder")
    wait_for_snapshot(client, "embedder")
    console.print(f"   answered after {first_ms:.0f} ms, snapshot included; later starts thaw")
    known = wait_for_libraries(client)
    cold: list[tuple[float, dict[str, Any]]] = []
    thaw: list[tuple[float, dict[str, Any]]] = []
    difference = 0.0
    console.print(f"[bold]3.[/] {options.rounds} cold starts and {options.rounds} thaws, in turn")
    for number in range(options.rounds):
        for app, into, expected in (("embedder-cold", cold, "cold"), ("embedder", thaw, "restore")):
            ms, answer, trace = measure(client, app)
            if trace["start"] != expected:
                console.print(
                    f"[red]a {trace['start']} start where a {expected} one was meant; see `woodfrog app logs {app}`"
                )
                return 1
            difference = max(difference, float(np.abs(answer - reference).max()))
            into.append((ms, trace))
        console.print(f"   round {number + 1}: cold {cold[-1][0]:7.0f} ms   thawed {thaw[-1][0]:6.1f} ms")
    stop_containers(client, "embedder")
    stop_containers(client, "embedder-cold")
    new: list[float] = []
    if known:
        console.print(f"[bold]4.[/] {NEW} new programs on these libraries: their first start")
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(NEW):
                ms, answer, trace = measure_new(client, Path(folder))
                difference = max(difference, float(np.abs(answer - reference).max()))
                if any(p["name"] == "zygote.restore" for p in trace["phases"]):
                    new.append(ms)
        client.request("POST", "/apps/embedder-new/stop")
    else:
        console.print("[bold]4.[/] the libraries were not frozen in time: without new programs")
    result = report(console, cold, thaw, new, difference)
    Path(options.json).write_text(json.dumps(result, indent=1) + "\n")
    console.print(
        f"Numbers in {options.json}. Look closer: woodfrog snapshot list; woodfrog app logs embedder; woodfrog --help"
    )
    if difference > 1e-6:
        console.print(f"[red]the answers differ by {difference:g}")
        return 1
    return 0


def snapshots(client: Client, app: str) -> set[str]:
    rows = client.request("GET", "/snapshots").json()["snapshots"]
    return {s["id"] for s in rows if s.get("app") == app and s["state"] == "ready"}


def wait_for_snapshot(client: Client, app: str, known: Collection[str] = ()) -> None:
    deadline = time.monotonic() + 60
    while snapshots(client, app) <= set(known):
        if time.monotonic() > deadline:
            raise SystemExit(f"no snapshot was made; see `woodfrog app logs {app}`")
        time.sleep(0.1)


def report(
    console: Console,
    cold: list[tuple[float, dict[str, Any]]],
    thaw: list[tuple[float, dict[str, Any]]],
    new: list[float],
    difference: float,
) -> dict[str, Any]:
    cold_ms, thaw_ms = [ms for ms, _ in cold], [ms for ms, _ in thaw]
    factor = statistics.median(cold_ms) / statistics.median(thaw_ms)
    table = Table(title="From nothing to the first answer, ms (client-measured)")
    for heading in ("", *(str(i + 1) for i in range(len(cold))), "median"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, values in (("cold", cold_ms), ("thawed", thaw_ms), ("new program", new)):
        if values:
            cells = [f"{v:.0f}" for v in values[: len(cold)]]
            cells += [""] * (len(cold) - len(cells))
            table.add_row(name, *cells, f"[bold]{statistics.median(values):.0f}")
    console.print(table)
    phases: dict[str, dict[str, float]] = {"cold": {}, "thaw": {}}
    where = Table(title="Where the time goes, median ms")
    for heading in ("cold", "ms", "thawed", "ms"):
        where.add_column(heading, justify="right" if heading == "ms" else "left")
    columns: list[list[tuple[str, str]]] = []
    for kind, names, rows in (("cold", COLD_PHASES, cold), ("thaw", THAW_PHASES, thaw)):
        column = []
        for name in names:
            ms = phase_ms([t for _, t in rows], name)
            if ms is not None:
                phases[kind][name] = round(ms, 2)
                column.append((name, f"{ms:.1f}"))
        columns.append(column)
    for i in range(max(map(len, columns))):
        cells = [column[i] if i < len(column) else ("", "") for column in columns]
        where.add_row(*cells[0], *cells[1])
    console.print(where)
    console.print(f"[bold green]Thawed is {factor:.1f} times faster[/]; answers equal to {difference:.1g}.")
    return {
        "cold_ms": [round(v, 2) for v in cold_ms],
        "thaw_ms": [round(v, 2) for v in thaw_ms],
        "new_program_ms": [round(v, 2) for v in new],
        "factor": round(factor, 2),
        "phases": phases,
        "max_difference": difference,
    }


if __name__ == "__main__":
    sys.exit(main())
