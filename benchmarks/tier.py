"""The first answer of a machine that never saw the snapshot, which is in a bucket behind a slow line.

    python benchmarks/tier.py                                  # 600 MB of memory; 50 MB/s and 20 ms; 5 rounds
    python benchmarks/tier.py --mb-s 200 --latency-ms 5        # another line
    python benchmarks/tier.py --workload arrays --rounds 1     # briefly

Writes benchmarks/results/tier.json. The bucket is a directory behind as much of S3 as reading takes, on this machine:
all answers share so many bytes a second, each comes so many milliseconds late. Arms, in turn in each round: a cold
start; the snapshot fetched whole first; read-through. Then the same line without the daemon: how many requests at
a time fill it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from common import Daemon, console, has, machine, number, program, save, summary, table, wait_until

from woodfrog.settings import load
from woodfrog.snapshot.incoming import PIECE
from woodfrog.store.tiers import open_tier

ARMS = ("cold", "whole", "through")
TITLES = {"cold": "cold start", "whole": "all of it first", "through": "read-through"}
WORKLOADS = {"arrays": ("Arrays", ("numpy", "pandas")), "big": ("Big", ("numpy",))}
AT_ONCE = (1, 2, 4, 8, 16, 32)
BUCKET = "woodfrog"
CHUNK = 1 << 16


class Line:
    """As much of S3 as reading a bucket takes, from a directory, over a line that all answers share.

    Args:
        rate: bytes a second, of all answers together.
        latency_s: before each answer.
    """

    def __init__(self, root: Path, rate: float, latency_s: float) -> None:
        self.root, self._rate, self._latency_s = root, rate, latency_s
        self._free = 0.0
        self._mutex = threading.Lock()
        self.bytes = 0
        line = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                line.answer(self, self.command == "HEAD")

            do_HEAD = do_GET

            def log_message(self, format: str, *args: Any) -> None:
                """Nobody reads it."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._server.server_port}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "any",
            "AWS_SECRET_ACCESS_KEY": "any",
        }
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler, head: bool) -> None:
        time.sleep(self._latency_s)
        parts = urlsplit(request.path)
        path = self.root / unquote(parts.path).removeprefix(f"/{BUCKET}").strip("/")
        if "list-type" in parts.query:
            self._list(request, parse_qs(parts.query).get("prefix", [""])[0])
            return
        if not path.is_file():
            self._say(request, 404, b"<Error><Code>NoSuchKey</Code></Error>", {}, head)
            return
        size = path.stat().st_size
        headers = {"ETag": f'"{path.stat().st_ino}"', "Last-Modified": formatdate(path.stat().st_mtime, usegmt=True)}
        begin, end, status = 0, size, 200
        if asked := request.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            begin, end, status = int(first), min(size, int(last or size) + 1), 206
            if begin >= size:
                self._say(request, 416, b"", {}, head)
                return
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
        with path.open("rb") as file:
            file.seek(begin)
            self._say(request, status, file.read(end - begin) if not head else b"", headers, head, end - begin)

    def _say(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        data: bytes,
        headers: dict[str, str],
        head: bool,
        length: int | None = None,
    ) -> None:
        request.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data) if length is None else length)}.items():
            request.send_header(name, value)
        request.end_headers()
        with suppress(OSError):
            for at in range(0, 0 if head else len(data), CHUNK):
                part = data[at : at + CHUNK]
                with self._mutex:
                    now = time.monotonic()
                    self._free = max(self._free, now) + len(part) / self._rate
                    wait = self._free - now
                    self.bytes += len(part)
                if wait > 0.002:
                    time.sleep(wait)
                request.wfile.write(part)

    def _list(self, request: BaseHTTPRequestHandler, prefix: str) -> None:
        found = sorted(str(p.relative_to(self.root)) for p in self.root.rglob("*") if p.is_file())
        rows = "".join(
            f"<Contents><Key>{key}</Key><Size>{(self.root / key).stat().st_size}</Size><ETag>x</ETag>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for key in found
            if key.startswith(prefix) and not key.startswith(".")
        )
        text = f"<ListBucketResult><IsTruncated>false</IsTruncated><KeyCount>1</KeyCount>{rows}</ListBucketResult>"
        self._say(request, 200, text.encode(), {}, False)

    def close(self) -> None:
        self._server.shutdown()


def stored(daemon: Daemon) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = daemon.client.request("GET", "/store").json()["snapshots"]
    return rows


def make(root: Path, workload: str, keys: Path) -> tuple[dict[str, Any], list[Any]]:
    """Have a snapshot in the bucket, with its working set; its row, and the right answers."""
    tag, _ = WORKLOADS[workload]
    with Daemon(tier=str(root), zygotes=0) as daemon:
        daemon.deploy("demo", program("starts"), [tag], scaledown_window=60.0)
        time.sleep(0.5)
        right = [daemon.call("demo", f"{tag}.run", request) for request in (0, 1)]
        wait_until(lambda: [r for r in stored(daemon) if r["pushed"]], "the snapshot is not in the bucket", 300)
        shutil.copytree(daemon.home / "keys", keys)
        return next(r for r in stored(daemon) if r["pushed"]), right


def answer(line: Line, workload: str, arm: str, keys: Path, right: list[Any]) -> dict[str, Any]:
    """A new machine's first answer."""
    tag, _ = WORKLOADS[workload]
    settings: dict[str, Any] = {"zygotes": 0, "read_through": int(arm == "through")}
    if arm != "cold":
        settings["tier"] = f"s3://{BUCKET}"
    daemon = Daemon(**settings)
    daemon.env.update(line.environment)
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


def fill(line: Line, total: int) -> dict[str, Any]:
    """How fast an object comes in ranges of one piece, so many at a time."""
    os.environ.update(line.environment)
    tier = open_tier(f"s3://{BUCKET}")
    (line.root / "object").write_bytes(os.urandom(total))
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
    missing = [m for m in (*WORKLOADS[options.workload][1], "obstore") if not has(m)]
    if missing:
        raise SystemExit(f"{missing[0]} is not installed")
    facts = machine(load())
    place = Path(tempfile.mkdtemp(prefix="wfb-", dir="/var/tmp"))
    root, keys = place / "bucket", place / "keys"
    root.mkdir()
    try:
        made, right = make(root, options.workload, keys)
        line = Line(root, options.mb_s * 1e6, options.latency_ms / 1e3)
        rows: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
        for _ in range(options.rounds):
            for arm in ARMS:
                rows[arm].append(answer(line, options.workload, arm, keys, right))
                console.print(f"[dim]{arm}: {rows[arm][-1]}")
        fast = Line(root, 1e12, options.latency_ms / 1e3)
        parallel = {"this line": fill(line, options.fill_mb << 20), "latency alone": fill(fast, options.fill_mb << 20)}
        line.close()
        fast.close()
    finally:
        shutil.rmtree(place, ignore_errors=True)
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
