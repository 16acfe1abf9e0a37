"""Other machines: a kernel that lacks something, and a state directory that moves to another host and back."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.harness import BIN, Daemon

pytestmark = [pytest.mark.root, pytest.mark.criu]

CONFINE = Path(__file__).with_name("confine.py")
PROGRAM = """
import os
import woodfrog

app = woodfrog.App("host")


@app.cls(enable_memory_snapshot=True, scaledown_window=1)
class Large:
    @woodfrog.enter(snap=True)
    def load(self):
        self.table = [str(i) for i in range(400_000)]
        self.boot = os.urandom(8).hex()

    @woodfrog.method()
    def ask(self, n: int):
        return [self.table[n], self.boot]


@app.cls(enable_memory_snapshot=True, scaledown_window=1)
class Other(Large):
    pass
"""


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    # Nothing is too small to be thawed through the page server; what is packed could not be thawed in any other way.
    with Daemon(WOODFROG_LAZY_MIN_MIB="1", WOODFROG_PACK="0") as daemon:
        daemon.cli("deploy", str(daemon.program(PROGRAM)))
        yield daemon


def confined(*lacks: str) -> tuple[str, ...]:
    return (sys.executable, str(CONFINE), *lacks, "--")


def doctor(daemon: Daemon, *lacks: str) -> list[str]:
    done = subprocess.run(
        [*confined(*lacks), str(BIN / "woodfrog"), "doctor"],
        env=daemon.env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout.splitlines()


def restart(daemon: Daemon, command: tuple[str, ...] | list[str]) -> None:
    daemon.stop()
    daemon.command = command
    daemon.start()


def ask(daemon: Daemon, tag: str, n: int) -> str:
    """The boot that answers; each answer from a container of its own."""
    answer, boot = daemon.call("host", f"{tag}.ask", n=n, timeout=120)
    assert answer == str(n)
    daemon.wait_idle()
    return str(boot)


def test_a_kernel_without_userfaultfd_thaws_by_reading_all_memory_first(daemon: Daemon) -> None:
    boot = ask(daemon, "Large", 1)
    snapshot = daemon.wait_snapshot("host")

    lines = doctor(daemon, "userfaultfd")
    [at] = [i for i, line in enumerate(lines) if line.split()[1:2] == ["userfaultfd"]]
    assert lines[at].split(maxsplit=2) == ["note", "userfaultfd", "not in this kernel"]
    assert "read all memory before" in lines[at + 1] and "CONFIG_USERFAULTFD=y" in lines[at + 1]

    restart(daemon, [*confined("userfaultfd"), *daemon.command])
    assert [ask(daemon, "Large", n) for n in (7, 399_999)] == [boot, boot], "not thawed"
    assert daemon.page_server() is None
    assert daemon.snapshots("host") == [snapshot]
    assert "userfaultfd: not in this kernel" in daemon.log.read_text()


@pytest.mark.parametrize("lack", ["checkpoint-restore", "userfaultfd"])
def test_where_nothing_can_be_frozen_every_call_is_answered_cold(daemon: Daemon, lack: str) -> None:
    """Without CHECKPOINT_RESTORE, and under a seccomp profile of a container's."""
    lines = doctor(daemon, lack)
    wanted = {
        "checkpoint-restore": ("checkpoint-restore", "not in this kernel", "CONFIG_CHECKPOINT_RESTORE=y"),
        "userfaultfd": ("seccomp-profile", "woodfrog itself runs under a seccomp filter", "seccomp=unconfined"),
    }
    name, found, remedy = wanted[lack]
    [at] = [i for i, line in enumerate(lines) if line.split()[1:2] == [name]]
    assert lines[at].split(maxsplit=2) == ["FAIL", name, found]
    assert "every start is a cold one" in lines[at + 1] and remedy in lines[at + 1]

    restart(daemon, [*confined(lack), *daemon.command])
    boots = [ask(daemon, "Large", n) for n in (1, 2)]
    assert len(set(boots)) == 2 and daemon.snapshots("host") == []
    said = [line for line in daemon.app_text("host").splitlines() if line.startswith("no snapshot")]
    assert said and all(line.startswith("no snapshot: cannot capture: ") for line in said), said
    assert not daemon.leaks().get("mounts")


OTHER_HOST = """
import sys
from dataclasses import replace
from woodfrog.daemon import __main__ as daemon
from woodfrog.snapshot.compat import host_facts

daemon.host_facts = lambda criu: replace(host_facts(criu), kernel="9.9.9-other")
sys.exit(daemon.main([]))
"""


def test_another_host_captures_anew_and_the_first_one_finds_its_own_again(daemon: Daemon) -> None:
    here = daemon.command
    first = ask(daemon, "Large", 1)
    snapshot = daemon.wait_snapshot("host")
    assert ask(daemon, "Large", 2) == first

    restart(daemon, [sys.executable, "-c", OTHER_HOST])
    second = ask(daemon, "Large", 3)
    assert second != first and ask(daemon, "Large", 4) == second
    listed = {s["id"]: s for s in daemon.json("snapshot", "list") if s["id"].startswith("s-")}
    assert listed[snapshot]["state"] == "other-host"
    assert "9.9.9-other here" in listed[snapshot]["why"], listed[snapshot]
    newer = daemon.wait_snapshot("host", other_than=[snapshot])

    restart(daemon, here)
    assert [ask(daemon, "Large", n) for n in (5, 6)] == [first, first]
    listed = {s["id"]: s for s in daemon.json("snapshot", "list") if s["id"].startswith("s-")}
    assert listed.keys() == {snapshot, newer}, "captured again"
    assert listed[snapshot]["state"] == "ready" and "9.9.9-other there" in listed[newer]["why"]
