"""Parked instances through the whole system: woken by a call, small, themselves, replaced, gone with their app."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.harness import Daemon, until

pytestmark = [pytest.mark.root, pytest.mark.criu]

MIB = 1 << 20
PROGRAM = """
import os, random, socket, threading, time, uuid
import woodfrog

app = woodfrog.App("parked")


@app.cls(enable_memory_snapshot=True, scaledown_window=300, secrets=[woodfrog.Secret.from_name("word")])
class Copy:
    @woodfrog.enter(snap=True)
    def load(self):
        self.state = bytearray(b"frog" * (16 << 20))
        self.ticks = 0
        threading.Thread(target=self.tick, daemon=True).start()

    def tick(self):
        while True:
            self.ticks += 1
            time.sleep(0.01)

    @woodfrog.method()
    def look(self, at):
        ticks = self.ticks
        return {
            "state": self.state[at : at + 4].decode(),
            "ticks": ticks,
            "host": socket.gethostname(),
            "word": os.environ.get("WORD"),
            "unique": [random.random(), uuid.uuid4().hex, os.urandom(8).hex()],
        }
"""


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with Daemon(WOODFROG_PARKED="1") as daemon:
        daemon.cli("secret", "create", "word", "WORD=before")
        daemon.cli("deploy", str(daemon.program(PROGRAM)))
        assert daemon.call("parked", "Copy.look", at=400)["state"] == "frog"
        daemon.wait_snapshot("parked")
        yield daemon


def containers(daemon: Daemon, stage: str) -> list[dict[str, Any]]:
    return [c for c in daemon.get("/containers")["containers"] if c["stage"] == stage]


def parked(daemon: Daemon, *, other_than: str = "") -> dict[str, Any]:
    def find() -> Any:
        """an instance is parked"""
        return next((c for c in containers(daemon, "parked") if c["id"] != other_than), None)

    found: dict[str, Any] = until(find)
    return found


def stop_ready(daemon: Daemon) -> None:
    """Only parked instances stay."""
    for container in containers(daemon, "ready"):
        daemon.cli("container", "stop", container["id"])
    until(lambda: not containers(daemon, "ready"))


def states(pid: int) -> set[str]:
    """The state of every thread of a process."""
    return {(task / "stat").read_text().rpartition(")")[2].split()[0] for task in Path(f"/proc/{pid}/task").iterdir()}


def last_start(daemon: Daemon) -> str:
    call = daemon.get("/calls", limit="1")["calls"][0]
    return str(daemon.get(f"/calls/{call['id']}/trace")["start"])


def test_a_call_wakes_a_copy_that_is_itself(daemon: Daemon) -> None:
    seen = []
    first = parked(daemon)["id"]
    for number in range(2):
        waiting = parked(daemon)
        assert states(waiting["pid"]) == {"T"}
        stop_ready(daemon)
        time.sleep(0.5)  # what ran while it waits would show
        if number:
            daemon.cli("secret", "create", "word", "WORD=after")
        begin = time.monotonic()
        seen.append(daemon.call("parked", "Copy.look", at=4000))
        assert time.monotonic() - begin < 2
        assert last_start(daemon) == "parked"
        assert seen[-1]["host"] == waiting["id"]
        assert seen[-1]["state"] == "frog"
        again = parked(daemon, other_than=waiting["id"])  # it is replaced
        assert again["id"] != first
    assert [s["word"] for s in seen] == ["before", "after"]
    assert abs(seen[0]["ticks"] - seen[1]["ticks"]) < 40
    for one, other in zip(seen[0]["unique"], seen[1]["unique"], strict=True):
        assert one != other
    # The state is 64 MiB; the working set of one call is a small part of it.
    assert parked(daemon)["memory_bytes"] < 32 * MIB
    rollup = Path(f"/proc/{parked(daemon)['pid']}/smaps_rollup").read_text()
    pss = next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    assert pss < 24 << 10


def test_a_parked_copy_that_dies_is_replaced(daemon: Daemon) -> None:
    first = parked(daemon)
    os.kill(first["pid"], signal.SIGKILL)
    second = parked(daemon, other_than=first["id"])
    # What is served to it goes with the page server, and a new one serves the next.
    server = daemon.page_server()
    assert server is not None
    os.kill(server, signal.SIGKILL)
    third = parked(daemon, other_than=second["id"])
    assert third["id"] != first["id"]
    stop_ready(daemon)
    assert daemon.call("parked", "Copy.look", at=40)["state"] == "frog"
    assert last_start(daemon) == "parked"


def test_parked_copies_go_with_their_snapshot_version_and_app(daemon: Daemon) -> None:
    first = parked(daemon)["id"]
    assert "parked" in daemon.cli("container", "list").stdout
    for snapshot in daemon.snapshots("parked"):
        daemon.cli("snapshot", "invalidate", snapshot)
    until(lambda: not containers(daemon, "parked"))
    daemon.cli("snapshot", "create", "parked.Copy")
    daemon.wait_snapshot("parked")
    daemon.call("parked", "Copy.look", at=0)
    second = parked(daemon, other_than=first)["id"]
    daemon.cli("deploy", str(daemon.program(PROGRAM + "\n")))
    until(lambda: second not in [c["id"] for c in daemon.get("/containers")["containers"]])
    daemon.cli("app", "stop", "parked")
    daemon.wait_idle()
