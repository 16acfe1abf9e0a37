"""More calls at once than the machine has memory for: all are answered, by as many containers as fit."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from e2e.harness import Daemon, until
from woodfrog.linux import cgroups

pytestmark = [pytest.mark.root, pytest.mark.criu]

LIMIT_MIB = 1000
HELD_MIB = 200

PROGRAM = f"""
import time
import woodfrog

app = woodfrog.App("holder")


@app.cls(enable_memory_snapshot=True, scaledown_window=60)
class Holder:
    @woodfrog.enter(snap=True)
    def load(self):
        self.data = bytearray(b"x" * ({HELD_MIB} << 20))

    @woodfrog.method()
    def work(self, n, seconds=0.3):
        self.data[::4096] = bytes([n]) * (len(self.data) // 4096)  # every page becomes its own
        time.sleep(seconds)
        return n


@app.function(enable_memory_snapshot=True, scaledown_window=60)
def small(n):
    return n
"""


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with Daemon(WOODFROG_MEMORY_MIB=str(LIMIT_MIB), WOODFROG_POOL_SIZE="4", WOODFROG_ZYGOTES="0") as daemon:
        daemon.cli("deploy", str(daemon.program(PROGRAM)))
        yield daemon


def private_mib(group: Path) -> float:
    """What a container takes for itself, read as the kernel says it, v1 or v2."""
    try:
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return 0.0
    return (int(stat.get("rss", stat.get("anon", 0))) + int(stat.get("shmem", 0))) / (1 << 20)


class Watch(threading.Thread):
    """The most memory that the daemon's containers took together, and the most of them at a time."""

    def __init__(self, daemon: Daemon) -> None:
        super().__init__()
        self.daemon_ = daemon
        self.most_mib = 0.0
        self.most = 0
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.1):
            held = [private_mib(g) for g in self.daemon_.cgroups() if (g / "memory.stat").exists()]
            self.most_mib = max(self.most_mib, sum(held))
            self.most = max(self.most, sum(mib > HELD_MIB / 2 for mib in held))


def at_once(daemon: Daemon, count: int, tag: str = "Holder.work", **arguments: float) -> tuple[list[int], Watch]:
    """Answers of so many calls at once, and what they took."""
    watch = Watch(daemon)
    watch.start()
    try:
        with ThreadPoolExecutor(count) as pool:
            asked = [pool.submit(daemon.call, "holder", tag, timeout=120, n=n, **arguments) for n in range(count)]
            return [a.result() for a in asked], watch
    finally:
        watch.over.set()
        watch.join()


def test_thirty_calls_are_answered_by_the_containers_that_fit(daemon: Daemon) -> None:
    answers, watch = at_once(daemon, 30)  # nothing is known of it: booted, and thawed as soon as there is a snapshot
    assert answers == list(range(30))
    assert watch.most < 30 and watch.most_mib <= LIMIT_MIB
    daemon.wait_snapshot("holder")
    daemon.scale_to_zero()
    answers, watch = at_once(daemon, 30, seconds=0.5)
    assert answers == list(range(30))
    assert 2 <= watch.most <= LIMIT_MIB // HELD_MIB
    assert watch.most_mib <= LIMIT_MIB
    text = daemon.app_text("holder")
    assert "killed" not in text and "failed" not in text


def test_who_waits_is_shown_and_idle_containers_make_room(daemon: Daemon) -> None:
    with ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(daemon.call, "holder", "Holder.work", timeout=120, n=n, seconds=2) for n in range(16)]
        until(lambda: next(a for a in daemon.get("/apps")["apps"])["waiting_for_memory"])
        assert "short of memory" in daemon.cli("app", "list").stdout
        assert "queued: memory" in daemon.cli("app", "calls", "holder").stdout
        assert [a.result() for a in asked] == list(range(16))
    assert re.search(r"wait.? for memory: a container needs about 2\d\d MiB, ", daemon.app_text("holder"))
    assert daemon.call("holder", "small", n=7) == 7, "nothing is known of it: more than is left is kept for it"
    assert "makes room in memory for another function" in daemon.app_text("holder")


@pytest.fixture
def small_machine() -> Iterator[tuple[Daemon, Path]]:
    """A daemon that sees a cgroup with a limit in the place of all, as in a container; and the group."""
    found = cgroups.detect("small")
    place = found.root if isinstance(found, cgroups._CgroupsV2) else found.roots["memory"]  # type: ignore[attr-defined]
    group = place / f"woodfrog-test-{os.getpid()}"
    group.mkdir()
    try:
        limit = group / ("memory.max" if found.version == 2 else "memory.limit_in_bytes")
        limit.write_text(str(LIMIT_MIB << 20))
        daemon = Daemon(WOODFROG_POOL_SIZE="4", WOODFROG_ZYGOTES="0")
        bind = f"mount --bind {group} {place} && exec {' '.join(daemon.command)}"
        daemon.command = ("unshare", "--mount", "sh", "-c", bind)
        with daemon:
            yield daemon, group
    finally:
        for directory in sorted(group.glob("**/"), key=lambda p: -len(p.parts)):
            with contextlib.suppress(OSError):
                directory.rmdir()


def test_nothing_is_killed_on_a_small_machine(small_machine: tuple[Daemon, Path]) -> None:
    daemon, group = small_machine
    daemon.cli("deploy", str(daemon.program(PROGRAM)))
    assert daemon.get("/state")["memory"]["total"] == LIMIT_MIB << 20
    answers, watch = at_once(daemon, 1)
    assert answers == [0]
    daemon.wait_snapshot("holder")
    daemon.scale_to_zero()
    answers, watch = at_once(daemon, 30, seconds=0.5)
    assert answers == list(range(30)) and 2 <= watch.most <= LIMIT_MIB // HELD_MIB
    kills = [p.read_text() for name in ("memory.events", "memory.oom_control") for p in group.glob(f"**/{name}")]
    assert kills and all(line.endswith(" 0") for t in kills for line in t.splitlines() if line.startswith("oom_kill "))
    assert "killed" not in daemon.app_text("holder")
