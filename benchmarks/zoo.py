"""Which libraries can be frozen while they are in use, and are right afterwards?

    python benchmarks/zoo.py                    # all that are installed; the others are named
    python benchmarks/zoo.py Polars Grpc        # some of benchmarks/programs/libraries.py

Each is loaded and used in enter(snap=True), in a cold start without snapshots and in one that is captured; then it is
thawed twice, each time after scaling to zero. The answers must be those of the cold start. Writes
benchmarks/results/zoo.json. Exit status 1 when a library that was frozen answers otherwise than cold, or not at all.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from common import HERE, Daemon, console, has, machine, number, phase, program, save, table

from woodfrog.errors import WoodfrogError

BRIDGE = f"wfzoo{os.getpid() % 1000}"
SUBNET = f"10.{240 + os.getpid() % 10}.0.0/16"
PHASES = ("verify", "restore", "wake", "run")
SHOWN = ("first", "answer", "again")
"""Answers: compared whole, kept short."""
DISTRIBUTIONS = {
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
    "faiss": "faiss-cpu",
    "grpc": "grpcio",
    "opentelemetry.sdk": "opentelemetry-sdk",
    "posix_ipc": "posix-ipc",
    "sentry_sdk": "sentry-sdk",
    "prometheus_client": "prometheus-client",
    "sklearn": "scikit-learn",
    "tensorflow": "tensorflow-cpu",
    "zmq": "pyzmq",
}


def there(need: str) -> bool:
    try:
        return need == "outside" or shutil.which(need) is not None or has(need)
    except ModuleNotFoundError:
        return False


def version(need: str) -> str:
    try:
        return importlib.metadata.version(DISTRIBUTIONS.get(need, need))
    except importlib.metadata.PackageNotFoundError:
        return ""


def one_line(error: BaseException) -> str:
    return re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:1000]


@contextlib.contextmanager
def outside() -> Iterator[str]:
    """Servers in a network namespace of their own, which sandboxes reach through the host; their address."""
    name, number = f"wfz{os.getpid() % 100000}", os.getpid() % 250
    ours, theirs = (f"198.19.{number}.{n}" for n in (1, 2))

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)

    ip("netns", "add", name)
    try:
        ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("addr", "add", f"{ours}/30", "dev", name)
        ip("link", "set", name, "up")
        for command in (("addr", "add", f"{theirs}/30", "dev", "eth0"), ("link", "set", "eth0", "up")):
            ip("-n", name, *command)
        ip("-n", name, "link", "set", "lo", "up")
        command = ["ip", "netns", "exec", name, sys.executable, str(HERE / "programs/libraries.py")]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as servers:
            assert servers.stdout is not None
            if servers.stdout.readline() != "serving\n":
                raise SystemExit("the servers outside did not start")
            try:
                yield theirs
            finally:
                servers.communicate()
    finally:
        subprocess.run(["ip", "link", "del", name], check=False)
        ip("netns", "del", name)


def shown(name: str, found: dict[str, Any]) -> list[str]:
    cold, thaws = found["cold"], [found[arm] for arm in ("thaw", "thaw2") if found[arm]]
    memory = (found.get("snapshot") or {}).get("memory_bytes")
    return [
        name,
        found["state"],
        number(cold.get("total_ms"), 0),
        ", ".join(number(t["total_ms"], 0) for t in thaws),
        number(memory / 1e6 if memory else None, 0),
        str(thaws[-1].get("threads", "")) if thaws else "",
        str(len(thaws[-1].get("processes", ()))) if thaws else "",
    ]


class Zoo:
    def __init__(self, daemon: Daemon, address: str) -> None:
        self.daemon = daemon
        self.env = {"ZOO_OUTSIDE": address} if address else {}
        self.libraries = program("libraries")

    def visit(self, name: str) -> dict[str, Any]:
        """What was seen of one. `state`: right; no snapshot (refused, or failed); not thawed; wrong; closed (what was
        connected to the outside says so); fails (cold already); stuck."""
        daemon, app = self.daemon, f"zoo-{name.lower()}"
        row: dict[str, Any] | None = None
        found: dict[str, Any] = {"needs": {n: version(n) for n in self.libraries.NEEDS[name]}, "state": "right"}
        found["cold"] = {}
        try:
            # Deployed once as it is, once without snapshots: each has an app of its own.
            found["cold"] = self.call(f"{app}-cold", name, snapshots=False)
            daemon.stop_containers()
            if "answer" in found["cold"]:
                found["freeze"] = self.call(app, name, snapshots=True)
                row = self.snapshot(app)
            if row is not None:
                found["snapshot"] = {k: row.get(k) for k in ("memory_bytes", "files_bytes", "warnings")}
                daemon.stop_containers()
                found["thaw"] = self.again(app, name)
                daemon.stop_containers()
                found["thaw2"] = self.again(app, name)
        except SystemExit as e:
            if isinstance(e.code, int):
                raise
            found["state"], found["why"], row = "stuck", str(e), None
        found["log"] = self.system_lines(app if "answer" in found["cold"] else f"{app}-cold")
        self.judge(found, row is not None)
        for arm in ("cold", "freeze", "thaw", "thaw2"):
            found[arm] = {k: v[:200] if k in SHOWN else v for k, v in found.get(arm, {}).items()}
        for which in (f"{app}-cold", app):
            with contextlib.suppress(WoodfrogError):  # one that failed cold was not deployed otherwise
                daemon.client.request("POST", f"/apps/{which}/stop")
        return found

    def judge(self, found: dict[str, Any], frozen: bool) -> None:
        if found["state"] != "right":
            return
        if "answer" not in found["cold"]:
            found["state"] = "fails"
        elif not frozen:
            found["state"] = "no snapshot"
        else:
            arms = [found[k] for k in ("freeze", "thaw", "thaw2")]
            for key in ("answer", "again"):
                right = found["cold"].get(key)
                if any(arm.get(key) != right for arm in arms):
                    # Of what was connected to the outside, another answer is the error that tells of it.
                    found["state"] = "closed" if "outside" in found["needs"] else "wrong"
            if found["state"] == "right" and any(arm["start"] != "restore" for arm in arms[1:]):
                found["state"] = "not thawed"

    def call(self, app: str, name: str, *, snapshots: bool) -> dict[str, Any]:
        self.daemon.deploy(app, self.libraries, [name], snapshots=snapshots, env=self.env)
        return self.again(app, name)

    def again(self, app: str, name: str) -> dict[str, Any]:
        time.sleep(0.3)
        begin = time.perf_counter()
        try:
            answer: dict[str, Any] = self.daemon.call(app, f"{name}.run")
        except Exception as e:
            answer = {"error": one_line(e)}
        answer["total_ms"] = round((time.perf_counter() - begin) * 1e3, 1)
        trace = self.daemon.last_trace(app)
        answer["start"], answer["phases"] = trace["start"], {name: phase(trace, name) for name in PHASES}
        return answer

    def snapshot(self, app: str) -> dict[str, Any] | None:
        """Once it is there; none, when the log says so."""
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            if rows := self.daemon.snapshots(app):
                return rows[-1]
            if any(line.startswith("no snapshot") for line in self.system_lines(app)):
                return None
            time.sleep(0.1)
        return None

    def system_lines(self, app: str) -> list[str]:
        entries = list(self.daemon.client.logs(app))
        return [e["line"] for e in entries if e.get("stream") == "system" or e.get("line", "").startswith("woodfrog")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="classes of benchmarks/programs/libraries.py (default: all)")
    parser.add_argument("--json", help="where the numbers go (default: benchmarks/results/zoo.json)")
    options = parser.parse_args()
    needs: dict[str, tuple[str, ...]] = program("libraries").NEEDS
    missing = {name: [n for n in needs[name] if not there(n)] for name in options.names or needs}
    results: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        daemon = stack.enter_context(Daemon(network_bridge=BRIDGE, network_subnet=SUBNET))
        beyond = any("outside" in needs[name] for name, absent in missing.items() if not absent)
        zoo = Zoo(daemon, stack.enter_context(outside()) if beyond else "")
        facts = machine(daemon.settings)
        for name, absent in missing.items():
            if absent:
                continue
            results[name] = found = zoo.visit(name)
            console.print(f"{name}: {found['state']}", soft_wrap=True)
            for line in (found.get("why", ""), *found["log"]):
                if line:
                    console.print(f"   [dim]{line[:300]}", soft_wrap=True, markup=True)
            daemon.stop_containers()
            save("zoo", {"machine": facts, "libraries": results}, options.json)
    skipped = {name: absent for name, absent in missing.items() if absent}
    headings = ("", "state", "cold, ms", "thaws, ms", "MB", "threads", "processes")
    table(f"{len(results)} libraries", headings, [shown(name, found) for name, found in results.items()])
    console.print(f"skipped (not installed): {', '.join(f'{k} ({v[0]})' for k, v in skipped.items()) or 'none'}")
    result = {"machine": facts, "libraries": results, "skipped": skipped}
    console.print(f"numbers in {save('zoo', result, options.json)}")
    return 1 if any(r["state"] == "wrong" for r in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
