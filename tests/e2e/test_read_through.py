"""A machine that never saw a snapshot thaws it from a slow bucket, long before all of it is here."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.harness import Daemon, until
from s3_server import S3Server
from wire import Wire, wire

pytestmark = [pytest.mark.root, pytest.mark.criu]

PROGRAM = """
import woodfrog
app = woodfrog.App("held")


@app.cls(enable_memory_snapshot=True, scaledown_window=60)
class Holder:
    @woodfrog.enter(snap=True)
    def load(self):
        import random
        rng = random.Random(4)
        self.data = [rng.randbytes(1 << 20) for _ in range(96)]
        with open("/tmp/started", "a") as f:
            f.write("x")

    @woodfrog.method()
    def look(self, at: int):
        import zlib
        return [zlib.crc32(self.data[at]), open("/tmp/started").read(), woodfrog.restored()]
"""
SLOW = f"slow {1 << 20}"
"""Bytes a second of each connection."""


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="wf-", dir="/var/tmp"))
    os.chmod(path, 0o755)
    (path / "src").mkdir()
    (path / "src" / "program.py").write_text(PROGRAM)
    yield path
    shutil.rmtree(path, ignore_errors=True)


ENV = {"WOODFROG_TIER": "s3://woodfrog/p", "WOODFROG_ZYGOTES": "0"}


@pytest.fixture(scope="module")
def made(server: S3Server, place: Path) -> tuple[str, str, dict[int, int]]:
    """A snapshot in the bucket: its id, who signed it, what is in it."""
    with Daemon(**ENV, **server.environment) as first:
        first.cli("deploy", str(place / "src" / "program.py"))
        first.call("held", "Holder.look", at=5)
        right = {at: first.call("held", "Holder.look", at=at)[0] for at in range(96)}
        (row,) = until(lambda: [r for r in first.kept() if r["pushed"]], 90, 0.2)
        return row["id"], first.json("snapshot", "trust", "list")["own"]["text"], right


@pytest.fixture
def line(server: S3Server) -> Iterator[Wire]:
    with wire(server.endpoint) as line:
        yield line


@pytest.fixture
def other(server: S3Server, line: Wire, made: tuple[str, str, dict[int, int]], place: Path) -> Iterator[Daemon]:
    """Another machine, behind a slow line."""
    env = {**server.environment, "AWS_ENDPOINT_URL": line.url}
    with Daemon(**ENV, **env) as other:
        other.cli("snapshot", "trust", "add", "--yes", made[1])
        other.cli("deploy", str(place / "src" / "program.py"))
        line.plan = lambda _: SLOW
        yield other


def whole(daemon: Daemon) -> list[str]:
    return daemon.snapshots("held")


def test_answers_come_long_before_all_of_it(other: Daemon, made: tuple[str, str, dict[int, int]]) -> None:
    snapshot, _, right = made
    begin = time.monotonic()
    answer = other.call("held", "Holder.look", at=5)
    first_s = time.monotonic() - begin
    assert answer[:3] == [right[5], "x", True]
    assert whole(other) == [], "it is still on its way"
    for at in (90, 40, 41, 95, 0):
        assert other.call("held", "Holder.look", at=at)[:3] == [right[at], "x", True]
    assert whole(other) == []
    until(lambda: whole(other) == [snapshot], 60, 0.1)
    all_s = time.monotonic() - begin
    assert first_s < all_s / 2, (first_s, all_s)
    for at in range(96):
        assert other.call("held", "Holder.look", at=at)[:3] == [right[at], "x", True]
    report = other.json("snapshot", "verify")
    assert report["store"] == [] and all(not row["problems"] for row in report["snapshots"])
    (row,) = other.json("container", "list")
    phases = [p["name"] for p in other.json("container", "inspect", row["id"])["phases"]]
    assert "fetch" in phases and "boot" not in phases


def test_killed_while_it_comes(
    other: Daemon, line: Wire, server: S3Server, made: tuple[str, str, dict[int, int]]
) -> None:
    """Of what was half here nothing is taken for a whole; it comes to its end by itself, and nothing of it twice."""
    snapshot, _, right = made
    partial = other.home / "store" / "partial"

    def arrived() -> int:
        return sum(path.stat().st_blocks * 512 for path in partial.iterdir())

    assert other.call("held", "Holder.look", at=5)[0] == right[5]
    until(lambda: arrived() > 30 << 20, 60)
    assert whole(other) == []
    other.kill()
    here, line.received = arrived(), 0
    there = server.client().list_objects_v2(Bucket="woodfrog", Prefix="p/")["Contents"]
    other.start()
    assert not [p for p in (other.home / "snapshots").iterdir()]
    assert not [p for p in (other.home / "store" / "tmp").iterdir()]
    assert other.json("snapshot", "verify") == {"snapshots": [], "store": []}
    line.plan = lambda _: "pass"
    until(lambda: whole(other) == [snapshot], 60, 0.1)
    assert line.received < sum(found["Size"] for found in there) - 0.3 * here
    assert other.json("snapshot", "verify")["store"] == [] and not list(partial.iterdir())
    for at in range(0, 96, 5):
        assert other.call("held", "Holder.look", at=at)[:3] == [right[at], "x", True]


def test_the_page_server_dies_while_it_comes(other: Daemon, made: tuple[str, str, dict[int, int]]) -> None:
    snapshot, _, right = made
    assert other.call("held", "Holder.look", at=5)[0] == right[5]
    pid = other.page_server()
    assert pid is not None
    os.kill(pid, 9)
    for at in (80, 5):
        assert other.call("held", "Holder.look", at=at)[:3] == [right[at], "x", True]
    until(lambda: whole(other) == [snapshot], 90, 0.1)


def test_a_bucket_that_goes_in_the_middle(other: Daemon, line: Wire, made: tuple[str, str, dict[int, int]]) -> None:
    """Whoever needs what is not here is ended, and its call answered by another that booted: never a wrong byte."""
    _, _, right = made
    answer = other.call("held", "Holder.look", at=5)
    assert answer[:3] == [right[5], "x", True] and whole(other) == []
    line.plan = lambda _: "refuse"
    line.close()
    begin = time.monotonic()
    for at in (95, 60, 30, 5):
        assert other.call("held", "Holder.look", at=at, timeout=120)[:2] == [right[at], "x"]
    assert time.monotonic() - begin < 100
    assert other.json("snapshot", "verify")["store"] == []
