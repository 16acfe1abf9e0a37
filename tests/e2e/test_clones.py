"""Thirty-two copies of one snapshot, alive at the same time, and what is left when they are gone."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.harness import Daemon
from woodfrog.linux.network import Network

pytestmark = [pytest.mark.root, pytest.mark.criu]

COPIES = 32
STATE = hashlib.sha256(b"warm").digest() * 100_000

PROGRAM = f"""
import hashlib, json, os, socket, sys, time
import woodfrog

app = woodfrog.App("clones")
meeting = woodfrog.Volume.from_name("meeting", create_if_missing=True)


@app.cls(enable_memory_snapshot=True, max_containers={COPIES}, scaledown_window=3, volumes={{"/meeting": meeting}})
class Clone:
    @woodfrog.enter(snap=True)
    def load(self):
        self.state = hashlib.sha256(b"warm").digest() * 100_000
        with open("/tmp/notes", "w") as file:
            file.write("frozen")

    @woodfrog.method()
    def answer(self, i, of):
        # Nobody answers before all are there: each call needs a container of its own.
        open(f"/meeting/{{i}}", "w").close()
        while len(os.listdir("/meeting")) < of:
            time.sleep(0.2)
        notes = open("/tmp/notes").read()
        with open("/tmp/notes", "a") as file:
            file.write(f" {{i}}")
        digest = hashlib.sha256(self.state + str(i).encode()).hexdigest()
        return [digest, notes, open("/tmp/notes").read(), socket.gethostname(), woodfrog.snapshot_id()]


if __name__ == "__main__":
    answer = woodfrog.Cls.from_name("clones", "Clone")().answer
    calls = [answer.spawn(i, {COPIES}) for i in range({COPIES})]
    json.dump(woodfrog.FunctionCall.gather(*calls), sys.stdout)
"""


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    # A bridge of its own, so that its ports are this daemon's and nobody else's.
    bridge = f"wft{os.getpid() % 100_000}"
    with Daemon(WOODFROG_NETWORK_BRIDGE=bridge, WOODFROG_NETWORK_SUBNET="10.232.0.0/24") as daemon:
        yield daemon
    asyncio.run(Network(bridge).teardown())


def footprint(daemon: Daemon) -> dict[str, int]:
    """How much of each kind of thing the daemon has."""
    assert daemon.process is not None
    pids = family(daemon.process.pid)
    spaces = set()
    for pid in pids:
        for kind in ("mnt", "net", "pid", "ipc", "uts"):
            try:
                spaces.add(os.readlink(f"/proc/{pid}/ns/{kind}"))
            except OSError:
                continue
    ports = Path("/sys/class/net", daemon.env["WOODFROG_NETWORK_BRIDGE"], "brif")
    return {
        "processes": len(pids),
        "namespaces": len(spaces),
        "cgroups": len(daemon.cgroups()),
        "mounts": len(daemon.mounts()),
        "network devices": len(list(ports.iterdir())),
        "descriptors": len(os.listdir(f"/proc/{daemon.process.pid}/fd")),
        "containers": len(daemon.get("/containers")["containers"]),
    }


def family(root: int) -> list[int]:
    """A process and all below it."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            parents.setdefault(parent, []).append(int(entry.name))
    found = [root]
    for pid in found:
        found += parents.get(pid, [])
    return found


def settled(daemon: Daemon) -> dict[str, int]:
    """The footprint once it no longer changes."""
    daemon.wait_idle()
    last, since, deadline = footprint(daemon), time.monotonic(), time.monotonic() + 60
    while time.monotonic() < since + 2:
        time.sleep(0.25)
        now = footprint(daemon)
        if now != last:
            last, since = now, time.monotonic()
        assert time.monotonic() < deadline, f"it never settles: {now}"
    return last


def test_32_copies_side_by_side_leave_nothing_behind(daemon: Daemon) -> None:
    program = daemon.program(PROGRAM)
    daemon.cli("deploy", str(program), "--snapshot")
    before = settled(daemon)

    done = subprocess.run([sys.executable, str(program)], env=daemon.env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    answers: list[Any] = json.loads(done.stdout)
    busy = footprint(daemon)
    # All of them lived at once, each in namespaces of its own.
    assert busy["containers"] == COPIES
    assert busy["namespaces"] >= 5 * COPIES and busy["network devices"] >= COPIES and busy["cgroups"] >= COPIES

    snapshot = {answer[4] for answer in answers}
    assert len(snapshot) == 1 and None not in snapshot  # all from one, none cold
    assert len({answer[3] for answer in answers}) == COPIES
    for i, (digest, found, now, _, _) in enumerate(answers):
        assert digest == hashlib.sha256(STATE + str(i).encode()).hexdigest()
        # What one writes the others do not see.
        assert (found, now) == ("frozen", f"frozen {i}")

    assert settled(daemon) == before
    daemon.stop()
    assert daemon.leaks() == {}
