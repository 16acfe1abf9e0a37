"""What the benchmarks share: a private daemon, statistics, facts of the machine, tables, results."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent / "programs"))

from rich.console import Console
from rich.table import Table

from woodfrog.criu.binary import find_criu
from woodfrog.errors import HostError, WoodfrogError
from woodfrog.sdk import deploy
from woodfrog.sdk.call import Call, Target
from woodfrog.sdk.client import Client
from woodfrog.settings import Settings, load
from woodfrog.spec import AppSpec

HERE = Path(__file__).parent
RESULTS = HERE / "results"
START_S = 60.0
CHANGE_S = 120.0
"""How long the daemon may take for what a benchmark waits for."""

console = Console()


class Daemon:
    """A woodfrogd of the benchmark's own, with a state directory of its own, gone afterwards.

    Args:
        under: where the state directory is made; every user must be able to reach it.

    Example:
        with Daemon(pool_size=2) as daemon:
            daemon.client.health()
    """

    def __init__(self, *, under: str = "/var/tmp", **settings: Any) -> None:
        # Short: a Unix socket's path may have 107 bytes. World-readable: the worker's uid must reach the code in it.
        self.home = Path(tempfile.mkdtemp(prefix="wfb-", dir=under))
        os.chmod(self.home, 0o755)
        self.settings: Settings = dataclasses.replace(load(home=self.home), **settings)
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith("WOODFROG_")},
            "WOODFROG_HOME": str(self.home),
            **{f"WOODFROG_{k.upper()}": str(v) for k, v in settings.items()},
        }
        if self.settings.criu:
            self.env["WOODFROG_CRIU"] = self.settings.criu
        self.log = self.home / "daemon.log"
        self.process: subprocess.Popen[bytes]
        self.client: Client

    def __enter__(self) -> Daemon:
        # A benchmark that is stopped takes its daemon and its sandboxes with it.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        self.client = Client(self.settings)
        try:
            self.start()
        except BaseException:
            shutil.rmtree(self.home, ignore_errors=True)
            raise
        return self

    def start(self) -> None:
        """Start the process; again, after it was stopped or killed."""
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "woodfrog.daemon"],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_S
        # One that was killed left its socket behind.
        while (self.client.health() or {}).get("pid") != self.process.pid:
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                raise SystemExit(f"the daemon did not start:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.05)

    def __exit__(self, *exc: object) -> None:
        self.stop()
        self.client.close()
        if exc[0] is not None and not isinstance(exc[1], KeyboardInterrupt):
            console.print(f"[dim]the end of the daemon's log:\n{self.log.read_text()[-3000:]}")
        shutil.rmtree(self.home, ignore_errors=True)
        shutil.rmtree(self.settings.kdat_dir.parent, ignore_errors=True)

    def stop(self) -> None:
        if self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            console.print("[red]the daemon did not stop and was killed")

    # What benchmarks ask of it

    def deploy(
        self,
        name: str,
        module: ModuleType,
        tags: Sequence[str],
        *,
        snapshots: bool = True,
        plain: bool | None = None,
        env: Mapping[str, str] | None = None,
        **scaling: Any,
    ) -> AppSpec:
        """Deploy some of a program's functions and classes as an app.

        Args:
            snapshots: whether they keep theirs.
            plain: their starts without a snapshot begin at nothing, not in a zygote; by default if snapshots are off.
            env: for their containers, over what the program says.
        """
        registered = {**module.app.registered_functions, **module.app.registered_classes}
        bundle = deploy.build(name, [registered[t] for t in tags], (module.__name__, str(module.__file__)))
        functions = tuple(
            dataclasses.replace(
                f,
                snapshot=dataclasses.replace(f.snapshot, enabled=f.snapshot.enabled and snapshots),
                scaling=dataclasses.replace(f.scaling, **scaling),
                plain_start=not snapshots if plain is None else plain,
                env={**f.env, **(env or {})},
            )
            for f in bundle.spec.functions
        )
        bundle = dataclasses.replace(bundle, spec=dataclasses.replace(bundle.spec, functions=functions))
        deploy.send(self.client, bundle, ephemeral=False)
        return bundle.spec

    def call(self, app: str, tag: str, *args: Any) -> Any:
        """`.remote(*args)` of a handle that has found its daemon."""
        return Call(Target(self.client, app, tag), args, {}).run()

    def containers(self, app: str | None = None) -> list[dict[str, Any]]:
        rows = self.client.request("GET", "/containers").json()["containers"]
        return [r for r in rows if app is None or r.get("app") == app]

    def stop_containers(self, app: str | None = None) -> None:
        """Scale to zero, and wait until that is done."""
        deadline = time.monotonic() + CHANGE_S
        while rows := self.containers(app):
            for row in rows:
                try:
                    self.client.request("POST", f"/containers/{row['id']}/stop")
                except WoodfrogError:
                    continue  # it went by itself
            if time.monotonic() > deadline:
                raise SystemExit(f"containers do not stop: {rows}")
            time.sleep(0.02)

    def snapshots(self, app: str, function: str | None = None) -> list[dict[str, Any]]:
        rows = self.client.request("GET", "/snapshots").json()["snapshots"]
        return [
            r for r in rows if r.get("app") == app and r["state"] == "ready" and function in (None, r.get("function"))
        ]

    def wait_for_snapshot(self, app: str, function: str | None = None) -> dict[str, Any]:
        wait_until(lambda: self.snapshots(app, function), f"no snapshot of {app} was made")
        return self.snapshots(app, function)[-1]

    def wait_for_packing(self, app: str, seconds: float = CHANGE_S) -> str:
        """Until the memory of an app's newest snapshot is in the page store, where it goes after the first call.

        Returns:
            The snapshot's form: "packed", or "loose" when it stays as it was captured.
        """
        deadline = time.monotonic() + seconds
        while True:
            row = self.wait_for_snapshot(app)
            form = str(json.loads((self.home / "snapshots" / row["id"] / "manifest.json").read_text())["form"])
            small = row["memory_bytes"] < self.settings.lazy_min_mib << 20
            if form == "packed" or small or time.monotonic() > deadline:
                return form
            time.sleep(0.1)

    def last_trace(self, app: str) -> dict[str, Any]:
        calls = self.client.request("GET", "/calls", params={"limit": "20"}).json()["calls"]
        call = next(c for c in calls if c["app"] == app)
        answer: dict[str, Any] = self.client.request("GET", f"/calls/{call['id']}/trace").json()
        return answer


def wait_until(condition: Callable[[], Any], otherwise: str, seconds: float = CHANGE_S) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(otherwise)
        time.sleep(0.02)


def by_call(daemon: Daemon, app: str, cls: str, request: int, expected: str) -> tuple[float, Any, dict[str, Any]]:
    """Scale to zero, let the next sandbox be prepared, then one call: milliseconds at the client."""
    daemon.stop_containers()
    time.sleep(0.3)
    begin = time.perf_counter()
    answer = daemon.call(app, f"{cls}.run", request)
    ms = (time.perf_counter() - begin) * 1e3
    trace = daemon.last_trace(app)
    if trace["start"] != expected:
        raise SystemExit(f"{app}: a {trace['start']} start where a {expected} one was meant")
    return ms, answer, trace


def phase(trace: dict[str, Any], name: str) -> float:
    return float(sum(p["ms"] for p in trace["phases"] if p["name"] == name))


def phase_medians(traces: list[dict[str, Any]]) -> dict[str, float]:
    """Median of each phase, nested ones as parent/name; those of one name in one trace are added up."""
    found: dict[str, list[float]] = {}
    for trace in traces:
        sums: dict[str, float] = {}
        for p in trace["phases"]:
            parent = p["parent"]
            name = p["name"] if parent in (None, "queue") else f"{parent}/{p['name']}"
            sums[name] = sums.get(name, 0.0) + p["ms"]
        for name, ms in sums.items():
            found.setdefault(name, []).append(ms)
    return {name: round(statistics.median(values), 3) for name, values in found.items()}


def program(name: str) -> ModuleType:
    """A program of benchmarks/programs, under the name its containers import it by."""
    return import_module(name)


def has(module: str) -> bool:
    return find_spec(module) is not None


# Numbers


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Minimum, median and 95th percentile (nearest rank), and every value."""
    ordered = sorted(values)
    return {
        "n": len(ordered),
        "min": round(ordered[0], 3),
        "median": round(statistics.median(ordered), 3),
        "p95": round(ordered[max(0, -(-len(ordered) * 95 // 100) - 1)], 3),
        "values": [round(v, 3) for v in values],
    }


def machine(settings: Settings) -> dict[str, Any]:
    """What the numbers depend on. No names of hosts, users or paths."""
    info = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*:\s*(.*)$", info, re.M)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        criu = ".".join(map(str, find_criu(Path(settings.criu) if settings.criu else None).version))
    except HostError:
        criu = ""  # some measure what needs none
    return {
        "kernel": platform.release(),
        "cpu": model[1].strip() if model else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / (1 << 30), 1),
        "python": platform.python_version(),
        "criu": criu,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "load_before": [round(x, 2) for x in os.getloadavg()],
    }


def save(name: str, result: dict[str, Any], target: str | None = None) -> Path:
    path = Path(target) if target else RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    # One line for each list of numbers: a person reads these files too.
    text = json.dumps(result, indent=1)
    text = re.sub(r"\[\s+([-\d.,\se]+?)\s+\]", lambda m: "[" + re.sub(r"\s+", " ", m[1]) + "]", text)
    path.write_text(text + "\n")
    return path


def table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    made = Table()
    for i, heading in enumerate(headings):
        made.add_column(heading, justify="right" if i else "left")
    for row in rows:
        made.add_row(*row)
    console.print(f"\n[bold]{title}", soft_wrap=True)
    console.print(made)


def number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"
