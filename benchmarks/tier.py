"""The first answer of a machine that never saw the snapshot, which is in a bucket behind a slow line.

    python benchmarks/tier.py                                  # 600 MB of memory; 50 MB/s and 20 ms; 5 rounds
    python benchmarks/tier.py --mb-s 200 --latency-ms 5        # another line
    python benchmarks/tier.py --workload arrays --rounds 1     # briefly

Writes benchmarks/results/tier.json. The bucket is a real S3-compatible server (moto) on this machine, behind a relay
that all connections share: so many bytes a second together, so many milliseconds before each answer. Arms, in turn in
each round: a cold start; the snapshot fetched whole first; read-through. Then the same line without woodfrog's daemon:
how many requests at a time fill it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from common import Daemon, console, has, machine, number, program, save, summary, table, wait_until

from woodfrog.settings import load
from woodfrog.snapshot.incoming import PIECE
from woodfrog.store.tiers import ObjectTier, open_tier

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

ARMS = ("cold", "whole", "through")
TITLES = {"cold": "cold start", "whole": "all of it first", "through": "read-through"}
WORKLOADS = {"arrays": ("Arrays", ("numpy", "pandas")), "big": ("Big", ("numpy",))}
AT_ONCE = (1, 2, 4, 8, 16, 32)
BUCKET = "woodfrog"
CHUNK = 1 << 16


class Line:
    """A relay to `upstream`: all answers share `rate` bytes a second, each comes `latency_s` late."""

    def __init__(self, upstream: str, rate: float, latency_s: float) -> None:
        parts = urlsplit(upstream)
        self._upstream = (str(parts.hostname), int(parts.port or 80))
        self._rate, self._latency_s = rate, latency_s
        self._free = 0.0
        self._mutex = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.bytes = 0
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._upstream)
                asked = threading.Event()
                threading.Thread(target=self._ask, args=(client, server, asked), daemon=True).start()
                threading.Thread(target=self._answer, args=(server, client, asked), daemon=True).start()

    @staticmethod
    def _ask(client: socket.socket, server: socket.socket, asked: threading.Event) -> None:
        with suppress(OSError):
            while data := client.recv(CHUNK):
                asked.set()
                server.sendall(data)
            server.shutdown(socket.SHUT_WR)

    def _answer(self, server: socket.socket, client: socket.socket, asked: threading.Event) -> None:
        with suppress(OSError):
            while data := server.recv(CHUNK):
                if asked.is_set():  # the first bytes of an answer
                    asked.clear()
                    time.sleep(self._latency_s)
                with self._mutex:
                    now = time.monotonic()
                    self._free = max(self._free, now) + len(data) / self._rate
                    wait = self._free - now
                    self.bytes += len(data)
                if wait > 0.002:
                    time.sleep(wait)
                client.sendall(data)
            client.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)


@contextmanager
def bucket() -> Iterator[Any]:
    from s3_server import s3_server

    with s3_server() as server:
        server.make_bucket(BUCKET)
        yield server


def stored(daemon: Daemon) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = daemon.client.request("GET", "/store").json()["snapshots"]
    return rows


def make(server: Any, workload: str, keys: Path) -> tuple[dict[str, Any], list[Any]]:
    """Have a snapshot in the bucket, with its working set; its row, and the right answers."""
    tag, _ = WORKLOADS[workload]
    daemon = Daemon(tier=f"s3://{BUCKET}/p", zygotes=0)
    daemon.env.update(server.environment)
    with daemon:
        daemon.deploy("demo", program("starts"), [tag], scaledown_window=60.0)
        time.sleep(0.5)
        right = [daemon.call("demo", f"{tag}.run", request) for request in (0, 1)]
        wait_until(lambda: [r for r in stored(daemon) if r["pushed"]], "the snapshot is not in the bucket", 300)
        shutil.copytree(daemon.home / "keys", keys)
        return next(r for r in stored(daemon) if r["pushed"]), right


def answer(
    line: Line, environment: dict[str, str], workload: str, arm: str, keys: Path, right: list[Any]
) -> dict[str, Any]:
    """A new machine's first answer."""
    tag, _ = WORKLOADS[workload]
    settings: dict[str, Any] = {"zygotes": 0, "read_through": int(arm == "through")}
    if arm != "cold":
        settings["tier"] = f"s3://{BUCKET}/p"
    daemon = Daemon(**settings)
    daemon.env.update({**environment, "AWS_ENDPOINT_URL": line.url})
    shutil.copytree(keys, daemon.home / "keys")
    with daemon:
        daemon.deploy("demo", program("starts"), [tag], scaledown_window=120.0)
        time.sleep(1.0)
        sent = line.bytes
        begin = time.perf_counter()
        told = [daemon.call("demo", f"{tag}.run", 0)]
        first = (time.perf_counter() - begin) * 1e3
        result = {"first_ms": first, "first_mb": (line.bytes - sent) / 1e6}
        begin_other = time.perf_counter()
        told.append(daemon.call("demo", f"{tag}.run", 1))
        result["second_ms"] = (time.perf_counter() - begin_other) * 1e3
        if arm != "cold":
            wait_until(lambda: stored(daemon), "the snapshot did not arrive", 300)
            result["whole_ms"] = (time.perf_counter() - begin) * 1e3
            phases = daemon.client.request("GET", f"/containers/{daemon.containers('demo')[0]['id']}").json()["phases"]
            names = [p["name"] for p in phases]
            if "boot" in names or "fetch" not in names:
                raise SystemExit(f"{arm}: it was not thawed from the bucket: {names}")
        if told != right:
            raise SystemExit(f"{arm}: {told} is not {right}")
        return result


def fill(line: Line, environment: dict[str, str], total: int) -> dict[str, Any]:
    """How fast an object comes in ranges of one piece, so many at a time."""
    os.environ.update({**environment, "AWS_ENDPOINT_URL": line.url})
    tier = open_tier(f"s3://{BUCKET}/q")
    assert isinstance(tier, ObjectTier)
    tier.put("object", os.urandom(total))
    found = {}
    for at_once in AT_ONCE:
        ranges = [(at, min(at + PIECE, total)) for at in range(0, total, PIECE)]
        rates = []
        for _ in range(3):
            begin = time.perf_counter()
            with ThreadPoolExecutor(at_once) as pool:
                got = sum(pool.map(lambda r: len(tier.get_bytes("object", *r)), ranges))
            assert got == total
            rates.append(total / 1e6 / (time.perf_counter() - begin))
        found[str(at_once)] = summary(rates)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", default="big", choices=WORKLOADS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mb-s", type=float, default=50.0, help="of the line, all connections together")
    parser.add_argument("--latency-ms", type=float, default=20.0, help="of each answer")
    parser.add_argument("--fill-mb", type=int, default=64, help="size of the object for the second table")
    parser.add_argument("--json", default=None, help="where to write the results")
    options = parser.parse_args()
    missing = [m for m in (*WORKLOADS[options.workload][1], "obstore", "moto") if not has(m)]
    if missing:
        raise SystemExit(f"{missing[0]} is not installed")
    facts = machine(load())
    keys = Path(f"/var/tmp/wfb-keys-{os.getpid()}")
    try:
        with bucket() as server:
            made, right = make(server, options.workload, keys)
            line = Line(server.endpoint, options.mb_s * 1e6, options.latency_ms / 1e3)
            fast = Line(server.endpoint, 1e12, options.latency_ms / 1e3)
            rows: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
            for _ in range(options.rounds):
                for arm in ARMS:
                    rows[arm].append(answer(line, server.environment, options.workload, arm, keys, right))
                    console.print(f"[dim]{arm}: {rows[arm][-1]}")
            parallel = {
                "line": fill(line, server.environment, options.fill_mb << 20),
                "latency alone": fill(fast, server.environment, options.fill_mb << 20),
            }
            line.close()
            fast.close()
    finally:
        shutil.rmtree(keys, ignore_errors=True)
    arms = {arm: {key: summary([r[key] for r in found]) for key in found[0]} for arm, found in rows.items()}
    result = {
        "machine": facts,
        "workload": options.workload,
        "raw_bytes": made["raw_bytes"],
        "mb_s": options.mb_s,
        "latency_ms": options.latency_ms,
        "arms": arms,
        "whole_over_through": round(arms["whole"]["first_ms"]["median"] / arms["through"]["first_ms"]["median"], 2),
        "parallel_mb_s": parallel,
    }
    table(
        f"{made['raw_bytes'] / 1e6:.0f} MB of memory, {options.mb_s:.0f} MB/s, {options.latency_ms:.0f} ms",
        ["", "first answer, ms", "MB by then", "second, ms", "all here, ms"],
        [
            [TITLES[arm], *(number(values[k]["median"], 0) if k in values else "" for k in COLUMNS)]
            for arm, values in arms.items()
        ],
    )
    table(
        f"MB/s, ranges of {PIECE >> 20} MiB",
        ["requests at a time", *parallel],
        [[n, *(number(column[n]["median"], 0) for column in parallel.values())] for n in map(str, AT_ONCE)],
    )
    save("tier", result, options.json)
    return 0


COLUMNS = ("first_ms", "first_mb", "second_ms", "whole_ms")

if __name__ == "__main__":
    sys.exit(main())
