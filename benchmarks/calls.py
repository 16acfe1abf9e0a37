"""`.remote` on a warm instance: how long it takes, by payload and encoding, where the time goes, and how many a second.

    python benchmarks/calls.py                  # 500 small calls, 8 clients
    python benchmarks/calls.py --calls 50 --seconds 1 --clients 1,2

Writes benchmarks/results/calls.json. benchmarks/README.md says what is measured.
"""

from __future__ import annotations

import argparse
import http.client
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import Daemon, console, machine, number, program, save, summary, table

from woodfrog.sdk.client import Client
from woodfrog.settings import load

APP = "calls"
SIZES = {"1 KB": 1 << 10, "1 MB": 1 << 20, "64 MB": 64 << 20}
SHARE = {"1 KB": 1.0, "1 MB": 0.2, "64 MB": 0.016}
"""Of the calls that are asked for, how many are made with payloads of this size."""


class RawHttp(http.client.HTTPConnection):
    """One kept-alive HTTP connection over the daemon's socket, with nothing of the SDK."""

    def __init__(self, path: Path) -> None:
        super().__init__("woodfrog")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self._path))


def timed(calls: int, work: Callable[[], Any]) -> list[float]:
    work()
    values = []
    for _ in range(calls):
        begin = time.perf_counter()
        work()
        values.append((time.perf_counter() - begin) * 1e3)
    return values


def by_payload(daemon: Daemon, calls: int) -> dict[str, Any]:
    """The argument goes there and comes back."""
    result: dict[str, Any] = {}
    for name, size in SIZES.items():
        count = max(2, round(calls * SHARE[name]))
        data, text = bytes(size), json.dumps("x" * size).encode()

        def pickled(data: bytes = data) -> None:
            if len(daemon.call(APP, "echo", data)) != len(data):
                raise SystemExit("an answer of the wrong length")

        def as_json(text: bytes = text) -> None:
            reply = daemon.client.request(
                "POST", f"/apps/{APP}/calls/echo", headers={"woodfrog-encoding": "json"}, content=text, wait=50.0
            )
            if len(reply.body.getvalue()) != len(text):
                raise SystemExit("an answer of the wrong length")

        for encoding, work in (("pickle", pickled), ("json", as_json)):
            values = summary(timed(count, work))
            if count > 50:
                del values["values"]
            result[f"{name} {encoding}"] = values
    return result


def where(daemon: Daemon, calls: int) -> dict[str, float]:
    """Medians of a small call's parts, each measured against the one below it."""
    raw = RawHttp(daemon.settings.socket)

    def health() -> None:
        raw.request("GET", "/v1/health")
        raw.getresponse().read()

    def submit(body: bytes = b'"x"') -> None:
        raw.request("POST", f"/v1/apps/{APP}/calls/echo?wait=50", body=body, headers={"Woodfrog-Encoding": "json"})
        raw.getresponse().read()

    medians = {
        "http": statistics.median(timed(calls, health)),
        "sdk_http": statistics.median(timed(calls, lambda: daemon.client.request("GET", "/health"))),
        "raw_call": statistics.median(timed(calls, submit)),
        "call": statistics.median(timed(calls, lambda: daemon.call(APP, "echo", "x"))),
    }
    rows = daemon.client.request("GET", "/calls", params={"limit": str(min(calls, 200))}).json()["calls"]
    traces = [daemon.client.request("GET", f"/calls/{row['id']}/trace").json()["phases"] for row in rows]
    for part in ("queue", "run"):
        medians[part] = statistics.median(p["ms"] for t in traces for p in t if p["name"] == part)
    medians["client"] = medians["call"] - medians["raw_call"]
    medians["daemon"] = medians["raw_call"] - medians["http"] - medians["run"]
    return {k: round(v, 3) for k, v in medians.items()}


def throughput(daemon: Daemon, clients: list[int], seconds: float) -> dict[str, Any]:
    """Calls a second of several client processes, on one instance and on as many instances as clients."""
    result: dict[str, Any] = {}
    for limit, title in ((1, "one instance"), (max(clients), "an instance for each client")):
        daemon.deploy(APP, program("echoes"), ["echo"], max_containers=limit, scaledown_window=600.0)
        # The first round is for the instances to come up.
        for number_, count in enumerate([max(clients), *clients]):
            done = run_clients(daemon, count, seconds)
            if number_:
                result[f"{title}, {count}"] = {
                    "calls_per_second": round(sum(d["calls"] for d in done) / seconds, 1),
                    "median_ms": round(statistics.median(d["median_ms"] for d in done), 3),
                }
        daemon.stop_containers()
    return result


def run_clients(daemon: Daemon, count: int, seconds: float) -> list[dict[str, Any]]:
    """So many client processes, calling at the same time."""
    command = [sys.executable, __file__, "--client", str(daemon.home), "--seconds", str(seconds)]
    running = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(count)]
    for process in running:
        assert process.stdout is not None
        process.stdout.readline()
    for process in running:
        assert process.stdin is not None
        process.stdin.write(b"go\n")
        process.stdin.flush()
    return [json.loads(process.communicate()[0]) for process in running]


def as_client(home: str, seconds: float) -> int:
    """One client process of the throughput arm: small calls for so many seconds."""
    from woodfrog.sdk.call import Call, Target

    target = Target(Client(load(home=Path(home))), APP, "echo")
    Call(target, ("x",), {}).run()
    print("ready", flush=True)
    sys.stdin.readline()
    values = []
    end = time.perf_counter() + seconds
    while (begin := time.perf_counter()) < end:
        Call(target, ("x",), {}).run()
        values.append((time.perf_counter() - begin) * 1e3)
    print(json.dumps({"calls": len(values), "median_ms": statistics.median(values)}))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=500, help="small calls; larger payloads get fewer")
    parser.add_argument("--clients", default="1,2,4,8", help="numbers of concurrent clients")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each throughput measurement")
    parser.add_argument("--json", help="where the numbers go (default: benchmarks/results/calls.json)")
    parser.add_argument("--client", metavar="HOME", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        return as_client(options.client, options.seconds)
    with Daemon() as daemon:
        result: dict[str, Any] = {"machine": machine(daemon.settings)}
        daemon.deploy(APP, program("echoes"), ["echo"], max_containers=1, scaledown_window=600.0)
        daemon.call(APP, "echo", "x")
        daemon.wait_for_snapshot(APP)
        for _ in range(20):
            daemon.call(APP, "echo", "x")
        result["where_ms"] = where(daemon, options.calls)
        result["payload_ms"] = by_payload(daemon, options.calls)
        result["throughput"] = throughput(daemon, [int(n) for n in options.clients.split(",")], options.seconds)
    table(
        "ms of one call on a warm instance; the payload goes there and back",
        ("payload", "calls", "min", "median", "p95"),
        [
            [name, str(v["n"]), *(number(v[k], 2) for k in ("min", "median", "p95"))]
            for name, v in result["payload_ms"].items()
        ],
    )
    parts = result["where_ms"]
    table(
        f"where {parts['call']:.2f} ms of a small call go (medians)",
        ("", "ms"),
        [
            [title, number(parts[k], 2)]
            for k, title in (
                ("http", "HTTP there and back (a request that does nothing)"),
                ("daemon", "daemon: journal, state machine, the worker's socket"),
                ("run", "worker: message in, function, message out"),
                ("client", "SDK: pickle, httpcore"),
            )
        ],
    )
    table(
        "small calls, several client processes",
        ("instances, clients", "calls a second", "median ms"),
        [[k, number(v["calls_per_second"], 0), number(v["median_ms"], 2)] for k, v in result["throughput"].items()],
    )
    console.print(f"Numbers in {save('calls', result, options.json)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
