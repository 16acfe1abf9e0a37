"""`kill -9` of the daemon at each point of a capture and a restore: the next daemon owes and leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.harness import BIN, Daemon, until

pytestmark = [pytest.mark.root, pytest.mark.criu]

APP = """
import os, time
import woodfrog

app = woodfrog.App("kill")

@app.cls(enable_memory_snapshot=True, single_use_containers=True)
class Frozen:
    which: str = woodfrog.parameter(default="")

    @woodfrog.enter(snap=True)
    def load(self):
        self.held = list(range(1000))

    @woodfrog.method()
    def total(self, x):
        return sum(self.held) + x

@app.cls(enable_memory_snapshot=True, single_use_containers=True)
class Kept:
    @woodfrog.enter(snap=True)
    def load(self):
        self.held = list(range(1000))
        self.large = os.urandom(40 << 20)  # enough that its memory follows after the thaw

    @woodfrog.method()
    def total(self, x):
        return sum(self.held) + x

@app.function(timeout=60, scaledown_window=2)
def slow(x: int, seconds: float):
    print("slow begins", flush=True)
    time.sleep(seconds)
    return x * 2

@app.function(scaledown_window=2)
def large(n: int):
    return "y" * n

@app.function(scaledown_window=2)
def once(x: int):
    return x
"""
CAPTURE = (
    "dump.before", "dump.criu", "dump.after", "capture.files",
    "commit.before", "commit.data", "commit.manifest",
)  # fmt: skip
RESTORE = ("restore.before", "restore.criu", "restore.after")
SUM = sum(range(1000))


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    # Zygotes are captured and restored as well, at moments of the daemon's own: not where the fault is meant to be.
    daemon = Daemon(WOODFROG_ZYGOTES="0")
    with daemon:
        daemon.cli("deploy", str(daemon.program(APP, "kill.py")))
        yield daemon
        daemon.stop()
        assert daemon.leaks() == {}
        assert "internal error" not in daemon.log.read_text(), daemon.log.read_text()


class Pending:
    """`woodfrog call` on its way."""

    def __init__(self, daemon: Daemon, *args: str) -> None:
        self.process = subprocess.Popen(
            [str(BIN / "woodfrog"), "call", *args, "--json"],
            env=daemon.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def result(self, timeout: float = 60) -> Any:
        out, err = self.process.communicate(timeout=timeout)
        assert self.process.returncode == 0, err
        return json.loads(out)["result"]


def restart(daemon: Daemon, **env: str) -> None:
    daemon.stop()
    daemon.start(**env)


def wait_death(daemon: Daemon) -> None:
    assert daemon.process is not None
    assert daemon.process.wait(30) == -signal.SIGKILL
    # Sandboxes go with the daemon, before any other daemon looks after them.
    until(lambda: not daemon.inits(), 10)


def staging(daemon: Daemon) -> list[str]:
    return [p.name for p in (daemon.home / "snapshots").iterdir() if p.name.startswith(".")]


def check_clean(daemon: Daemon) -> None:
    """Nothing of an earlier daemon: only this one's prepared sandboxes, no half of a snapshot, no stray mount."""
    assert daemon.process is not None
    until(lambda: staging(daemon) == [], 10)
    assert daemon.mounts() == []
    for group in daemon.cgroups():
        assert f"-{daemon.process.pid}-" in group.name, group
    states = {s["id"]: s["state"] for s in daemon.get("/snapshots")["snapshots"]}
    assert set(states.values()) <= {"ready"}, states


@pytest.mark.parametrize("point", [*CAPTURE, *RESTORE])
def test_killed_while_capturing(daemon: Daemon, point: str) -> None:
    """The first start of a class with new parameters is a capture, and goes on through the restore."""
    finished = daemon.cli("call", "kill.once", "x=5", "--json")
    call_id = json.loads(finished.stdout)["call"]
    before = set(daemon.snapshots("kill"))
    restart(daemon, WOODFROG_FAULTS=f"{point}=sigkill-self*1")
    code = f"import woodfrog; print(woodfrog.Cls.from_name('kill', 'Frozen')(which={point!r}).total.remote(3))"
    pending = subprocess.Popen(
        [str(BIN / "python"), "-c", code], env=daemon.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_death(daemon)
    daemon.start()
    out, err = pending.communicate(timeout=60)
    assert out.strip() == str(SUM + 3), err
    # What was finished is still to be had, and the app still deployed.
    assert daemon.get(f"/calls/{call_id}") == 5
    assert [a["app"] for a in daemon.get("/apps")["apps"]] == ["kill"]
    check_clean(daemon)

    def again() -> str:
        done = subprocess.run(
            [str(BIN / "python"), "-c", code], env=daemon.env, capture_output=True, text=True, timeout=60
        )
        return done.stdout.strip() or done.stderr

    # The next start that captures makes the snapshot, whole, and the one after that thaws it.
    if point.startswith("commit"):  # behind the answer, which may have been out before the kill
        assert again() == str(SUM + 3)
    daemon.wait_snapshot("kill", other_than=sorted(before))
    begin = time.time()
    assert again() == str(SUM + 3)
    assert any("thawed in" in e["line"] for e in daemon.app_log("kill") if e["t"] >= begin)
    check_clean(daemon)


@pytest.mark.parametrize("point", RESTORE)
def test_killed_while_restoring(daemon: Daemon, point: str) -> None:
    """A thaw of a snapshot that is good: the snapshot stays in use."""

    def kept() -> list[str]:
        return [s["id"] for s in daemon.get("/snapshots")["snapshots"] if s["function"] == "Kept"]

    if not kept():
        daemon.cli("snapshot", "create", "kill.Kept")
    before = daemon.snapshots("kill")
    restart(daemon, WOODFROG_FAULTS=f"{point}=sigkill-self*1")
    pending = Pending(daemon, "kill.Kept.total", "x=4")
    wait_death(daemon)
    daemon.start()
    assert pending.result() == SUM + 4
    assert daemon.snapshots("kill") == before
    assert daemon.snapshots("kill", "retired") == []
    check_clean(daemon)


def test_killed_in_a_call(daemon: Daemon) -> None:
    """The call is run again by the next daemon, and the client that waits gets its answer."""
    pending = Pending(daemon, "kill.slow", "x=21", "seconds=1.5")
    until(lambda: "slow begins" in daemon.app_text("kill"))
    daemon.kill()
    until(lambda: not daemon.inits(), 10)
    assert pending.process.poll() is None
    daemon.start()
    assert pending.result() == 42
    check_clean(daemon)


def test_page_server_goes_with_its_daemon(daemon: Daemon) -> None:
    """A little later: until the sandboxes are gone, their memory must not turn to zeroes."""
    daemon.call("kill", "Kept.total", x=1)
    until(lambda: daemon.get("/snapshots")["snapshots"])
    assert daemon.call("kill", "Kept.total", x=1) == SUM + 1
    server = daemon.page_server()
    assert server is not None
    daemon.kill()
    daemon.start()
    until(lambda: not Path(f"/proc/{server}").exists(), 15)
    assert daemon.call("kill", "Kept.total", x=1) == SUM + 1


def test_killed_with_many_calls_queued(daemon: Daemon) -> None:
    """Spawned calls are answered once each, in spite of two kills."""
    code = (
        "import woodfrog\n"
        "f = woodfrog.Function.from_name('kill', 'slow')\n"
        "print(*[f.spawn(n, 0.3).object_id for n in range(12)])\n"
    )
    done = subprocess.run([str(BIN / "python"), "-c", code], env=daemon.env, capture_output=True, text=True, timeout=60)
    ids = done.stdout.split()
    assert len(ids) == 12, done.stderr
    for _ in range(2):
        time.sleep(0.3)
        daemon.kill()
        daemon.start()
    code = "import sys, woodfrog\nprint([woodfrog.FunctionCall.from_id(i).get(timeout=40) for i in sys.argv[1:]])\n"
    done = subprocess.run(
        [str(BIN / "python"), "-c", code, *ids], env=daemon.env, capture_output=True, text=True, timeout=60
    )
    assert json.loads(done.stdout or "null") == [2 * n for n in range(12)], done.stderr


def test_large_result_survives_and_half_of_one_does_not(daemon: Daemon) -> None:
    """Bodies in files: kept when finished; what no call owns is swept."""
    done = json.loads(daemon.cli("call", "kill.large", "n=9000000", "--json").stdout)
    daemon.kill()
    (daemon.home / "calls" / ".body-abc").write_bytes(b"half")
    daemon.start()
    assert daemon.get(f"/calls/{done['call']}") == "y" * 9_000_000
    assert [p.name for p in (daemon.home / "calls").iterdir()] == [f"{done['call']}.out"]


def test_two_daemons_for_one_directory(daemon: Daemon) -> None:
    """The second gives way; the first does not notice."""
    done = subprocess.run(
        [str(BIN / "python"), "-m", "woodfrog.daemon"], env=daemon.env, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0 and "runs already" in done.stderr, done.stderr
    assert daemon.get("/health")["pid"] == daemon.process.pid  # type: ignore[union-attr]


def test_a_container_killed_from_outside(daemon: Daemon) -> None:
    """PID 1 of a sandbox is killed in a call: an error, or the answer from another; the pool's losses are replaced."""
    pending = Pending(daemon, "kill.slow", "x=1", "seconds=20")
    (container,) = until(
        lambda: [
            c for c in daemon.get("/containers")["containers"] if c["function"] == "slow" and c["stage"] == "ready"
        ]
    )
    detail = daemon.get(f"/containers/{container['id']}")
    os.kill(detail["init_pid"], signal.SIGKILL)
    out, err = pending.process.communicate(timeout=30)
    assert pending.process.returncode == 2 and "slow" in err and "error: " in err, (out, err)
    # The prepared sandboxes too.
    time.sleep(0.5)
    for pid in daemon.inits():
        if Path(f"/proc/{pid}").exists():
            os.kill(pid, signal.SIGKILL)
    assert daemon.call("kill", "once", x=6) == 6
    check_clean(daemon)
