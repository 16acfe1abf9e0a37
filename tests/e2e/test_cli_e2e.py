"""Every command of the command line against a real daemon, as a person and as a script would use it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import woodfrog
from e2e.harness import BIN, Daemon, until

pytestmark = [pytest.mark.root, pytest.mark.criu]

PROGRAM = '''
import os, sys, time
import woodfrog

app = woodfrog.App("tool")


@app.function(enable_memory_snapshot=True, scaledown_window=300)
def add(a: int, b: int = 1, *, loud: bool = False):
    """Add two numbers."""
    print("adding", a, b)
    if loud:
        print("loudly", file=sys.stderr)
    return a + b


@app.function()
def fail(why="no reason"):
    raise ValueError(why)


@app.function()
def count(n: int):
    for i in range(n):
        yield i


@app.function()
def opaque():
    return object()


@app.function()
def slow(seconds: float = 60.0):
    print("begun", flush=True)
    time.sleep(seconds)


@app.cls(enable_memory_snapshot=True, scaledown_window=300)
class Box:
    size: int = woodfrog.parameter(default=3)

    @woodfrog.method()
    def volume(self, factor: float = 1.0):
        return self.size**3 * factor


@app.local_entrypoint()
def main(n: int = 2):
    print("total", add.remote(n, b=n))
'''


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with Daemon() as daemon:
        yield daemon


@pytest.fixture(scope="module")
def program(daemon: Daemon) -> Path:
    """The program, deployed."""
    path = daemon.program(PROGRAM, "tool.py")
    daemon.cli("deploy", str(path))
    return path


def error_line(done: subprocess.CompletedProcess[str]) -> str:
    assert "Traceback" not in done.stderr, done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    return line


# run


def test_run(daemon: Daemon, program: Path) -> None:
    assert sorted(daemon.cli("run", str(program)).stdout.splitlines()) == ["adding 2 2", "total 4"]
    assert sorted(daemon.cli("run", str(program), "--n", "5").stdout.splitlines()) == ["adding 5 5", "total 10"]

    done = daemon.cli("run", f"{program}::add", "--a", "3", "--loud")
    assert done.stdout.splitlines() == ["adding 3 1", "4"] and "loudly" in done.stderr.splitlines()
    done = daemon.cli("run", "--json", f"{program}::add", "--a", "3", "--b", "4")
    assert json.loads(done.stdout.splitlines()[-1]) == 7
    assert daemon.cli("run", f"{program}::Box.volume", "--factor", "2").stdout.strip() == "54.0"
    assert daemon.cli("run", "-q", f"{program}::app.Box.volume", "--size", "2").stdout.strip() == "8.0"
    assert daemon.cli("run", f"{program}::count", "--n", "3").stdout.split() == ["0", "1", "2"]
    help_text = daemon.cli("run", f"{program}::add", "--help").stdout
    assert "--a" in help_text and "--loud" in help_text and "Add two numbers" in help_text

    assert "total 4" in daemon.cli("run", "-m", "tool", cwd=program.parent).stdout


def test_modules_of_the_working_directory(daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "deploy").mkdir()
    (tmp_path / "imported").mkdir()
    (tmp_path / "imported" / "__init__.py").write_text("word = 'imported'\n")
    (tmp_path / "named.py").write_text("word = 'named'\n")
    (tmp_path / "deploy" / "prog.py").write_text(
        "import imported, woodfrog\n"
        "app = woodfrog.App('modules')\n"
        "@app.function(image=woodfrog.Image.debian_slim().add_local_python_source('named'))\n"
        "def words():\n    import named\n    return imported.word, named.word\n"
    )
    done = daemon.cli("run", "--json", "deploy/prog.py", cwd=tmp_path)
    assert json.loads(done.stdout) == ["imported", "named"]
    (tmp_path / "named.py").unlink()
    refused = daemon.cli("run", "deploy/prog.py", cwd=tmp_path, check=False)
    assert refused.returncode == 2 and "add_local_python_source('named')" in error_line(refused)


LINES = """
import woodfrog
app = woodfrog.App("lines")

@app.function()
def chatter():
    for n in range(300):
        print("container", n)

@app.local_entrypoint()
def main():
    call = chatter.spawn()
    for n in range(20_000):
        print("program", n, "x" * (n % 50))
    call.get()
"""


def test_output_of_program_and_containers_is_by_whole_lines(daemon: Daemon) -> None:
    """Both print at once, buffered by blocks and not at all: no line has a part of another in it."""
    path = daemon.program(LINES, "lines.py")
    container = [f"container {n}" for n in range(300)]
    expected = sorted([*container, *(f"program {n} {'x' * (n % 50)}" for n in range(20_000))])
    for unbuffered in ("", "1"):
        done = daemon.cli("run", str(path), env={"PYTHONUNBUFFERED": unbuffered})
        assert sorted(done.stdout.splitlines()) == expected


def test_run_with_errors(daemon: Daemon, program: Path) -> None:
    done = daemon.cli("run", f"{program}::fail", "--why", "because", check=False)
    assert done.returncode == 1
    assert done.stderr.rstrip().splitlines()[-1] == "ValueError: because" and "raise ValueError(why)" in done.stderr

    for arguments, words in (
        ((f"{program}::ad",), ("ad", "add")),
        ((f"{program}::add", "--a", "three"), ("three",)),
        ((f"{program}::add",), ("--a",)),
        ((f"{program}::add", "--a", "1", "--c", "2"), ("--c",)),
        ((str(program.parent / "none.py"),), ("none.py", "not found")),
    ):
        done = daemon.cli("run", *arguments, check=False)
        line = error_line(done)
        assert done.returncode == 2 and all(word in line for word in words), (arguments, line)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_run_is_cancelled_by_ctrl_c(daemon: Daemon, program: Path, number: int) -> None:
    process = subprocess.Popen(
        [str(BIN / "woodfrog"), "run", f"{program}::slow"],
        env=daemon.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    process.send_signal(number)
    _, complaint = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in complaint, complaint
    until(lambda: not [c for c in daemon.get("/containers")["containers"] if c["function"] == "slow"], 20)
    assert [a["app"] for a in daemon.get("/apps")["apps"]] == ["tool"]


FROM_THE_FIRST_IMPORT = """
import sys
import woodfrog.cli

class Tell:
    def find_spec(self, name, path=None, target=None):
        if name == "woodfrog.cli.output":
            print("up", flush=True)

sys.meta_path.insert(0, Tell())
woodfrog.cli.main()
"""
"""Python's own start is not ours to guard."""


def test_ctrl_c_at_any_moment_ends_without_a_traceback_and_leaves_nothing(daemon: Daemon, program: Path) -> None:
    for delay in (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0):
        process = subprocess.Popen(
            [sys.executable, "-c", FROM_THE_FIRST_IMPORT, "run", f"{program}::slow"],
            env=daemon.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, complaint = process.communicate(timeout=30)
        assert process.returncode == 130 and "Traceback" not in complaint, (delay, complaint)
        assert complaint.splitlines()[-1] == "interrupted"
    until(lambda: [a["app"] for a in daemon.get("/apps")["apps"]] == ["tool"], 20)
    until(lambda: not [c for c in daemon.get("/containers")["containers"] if c["function"] == "slow"], 20)


# deploy, call


def test_call(daemon: Daemon, program: Path) -> None:
    assert daemon.cli("call", "tool.add", "a=2", "b=40").stdout == "42\n"
    assert daemon.cli("call", "tool.add", "--arg", "[1, 2]").stdout == "3\n"
    assert daemon.cli("call", "tool.add", "--arg", "5").stdout == "6\n"
    assert daemon.cli("call", "tool.add", input='{"a": 7, "b": 1}').stdout == "8\n"
    assert daemon.cli("call", "tool.Box.volume", "factor=0.5").stdout == "13.5\n"
    assert daemon.cli("call", "tool.Box.volume", "size=2", "--arg", "[0.5]").stdout == "4.0\n"
    assert daemon.cli("call", "tool.count", "n=3").stdout == "0\n1\n2\n"
    assert daemon.json("call", "tool.count", "n=2")["result"] == [0, 1]

    done = daemon.cli("call", "tool.fail", "why=text", check=False)
    assert done.returncode == 1 and done.stderr.rstrip().endswith("ValueError: text")
    for arguments, word in (
        (("tool.none",), "none"),
        (("nowhere.add",), "nowhere"),
        (("tool.add", "--arg", "{"), "JSON"),
        (("tool.opaque",), "JSON"),
    ):
        done = daemon.cli("call", *arguments, check=False)
        assert done.returncode in (1, 2) and word in done.stderr, done.stderr


def test_where_the_time_of_a_call_went(daemon: Daemon, program: Path) -> None:
    for container in daemon.json("container", "list", "--app", "tool"):
        daemon.cli("container", "stop", container["id"])
    daemon.wait_idle()
    thawed = daemon.json("call", "tool.add", "a=1")
    names = {p["name"] for p in thawed["phases"]}
    assert {"queue", "start", "restore", "wake", "run"} <= names or {"restore", "wake", "run"} <= names, names
    assert "import" not in names and all(p["ms"] >= 0 for p in thawed["phases"])
    [container] = daemon.json("container", "list", "--app", "tool")
    assert container["mode"] == "restore"

    warm = daemon.cli("call", "tool.add", "a=1", "--trace")
    assert warm.stdout == "2\n" and " ms  " in warm.stderr
    assert not any(line.strip().startswith("restore") for line in warm.stderr.splitlines())


# app


def test_app(daemon: Daemon, program: Path) -> None:
    [row] = [a for a in daemon.json("app", "list") if a["app"] == "tool"]
    assert row["functions"] == ["add", "fail", "count", "opaque", "slow", "Box"] and not row["ephemeral"]
    assert "tool" in daemon.cli("app", "list").stdout

    mark = time.time()
    daemon.cli("call", "tool.add", "a=100")
    assert daemon.cli("app", "logs", "tool", "--since", str(mark)).stdout == "adding 100 1\n"
    entries = [json.loads(line) for line in daemon.cli("app", "logs", "tool", "--json").stdout.splitlines()]
    [entry] = [e for e in entries if e["line"] == "adding 100 1"]
    assert entry["stream"] == "stdout" and entry["function"] == "add" and mark <= entry["t"] <= time.time()

    follower = subprocess.Popen(
        [str(BIN / "woodfrog"), "app", "logs", "-f", "--since", str(time.time()), "tool"],
        env=daemon.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert follower.stdout is not None
        for a in (200, 300):  # the first may have come before it followed, the second cannot
            daemon.cli("call", "tool.add", f"a={a}")
            assert until(follower.stdout.readline, 20) == f"adding {a} 1\n"
    finally:
        follower.send_signal(signal.SIGINT)
        assert follower.wait(20) in (0, 130)

    before = daemon.json("app", "history", "tool")
    daemon.cli("deploy", str(program))
    after = daemon.json("app", "history", "tool")
    assert [v["version"] for v in after] == [len(before) + 1, *(v["version"] for v in before)]
    assert [v["active"] for v in after] == [True] + [False] * len(before)
    shown = daemon.cli("app", "history", "tool").stdout.splitlines()
    assert "active" in shown[1] and "replaced" in shown[2]


def test_stopping_an_app(daemon: Daemon) -> None:
    path = daemon.program(PROGRAM.replace('App("tool")', 'App("stopped")'), "stopped.py")
    daemon.cli("deploy", str(path))
    daemon.cli("call", "stopped.add", "a=1")
    assert daemon.json("container", "list", "--app", "stopped")
    daemon.cli("app", "stop", "stopped")
    until(lambda: not daemon.json("container", "list", "--app", "stopped"), 20)
    done = daemon.cli("call", "stopped.add", "a=1", check=False)
    assert done.returncode == 2 and "stopped" in error_line(done)
    assert "stopped" in daemon.cli("app", "history", "stopped").stdout.splitlines()[1]
    assert daemon.cli("app", "logs", "stopped").stdout == "adding 1 1\n"
    done = daemon.cli("app", "stop", "stopped", check=False)
    assert done.returncode == 2 and "stopped" in error_line(done)


# container


def test_container(daemon: Daemon, program: Path) -> None:
    daemon.cli("call", "tool.add", "a=1")
    [row] = [c for c in daemon.json("container", "list", "--app", "tool") if c["function"] == "add"]
    name = row["id"]
    assert name in daemon.cli("container", "list").stdout

    detail = daemon.json("container", "inspect", name)
    assert detail["stage"] == "ready" and detail["served"] >= 1 and detail["memory_bytes"] > 1 << 20
    assert {p["name"] for p in detail["phases"]} >= {"sandbox", "assemble", "connect"}
    shown = daemon.cli("container", "inspect", name).stdout
    assert name in shown and "assemble" in shown and " ms" in shown
    assert "adding 1 1" in daemon.cli("container", "logs", name).stdout.splitlines()

    done = daemon.cli("container", "exec", name, "sh", "-c", "id -u; hostname; pwd; echo oops >&2; exit 7", check=False)
    assert done.returncode == 7 and done.stderr == "oops\n"
    assert done.stdout.split() == [str(daemon.settings.worker_uid), name, "/app"]
    answer = json.loads(daemon.cli("container", "exec", "--json", name, "cat", "/proc/self/status").stdout)
    assert answer["exit_code"] == 0 and "NoNewPrivs:\t1" in answer["stdout"]
    assert "CapBnd:\t0000000000000000" in answer["stdout"] and "Seccomp:\t2" in answer["stdout"]
    done = daemon.cli("container", "exec", name, "no-such-program", check=False)
    assert done.returncode != 0 and "no-such-program" in done.stderr
    done = daemon.cli("container", "exec", "--timeout", "0.5", name, "sleep", "60", check=False)
    assert done.returncode != 0 and "0.5" in done.stderr

    daemon.cli("container", "stop", name)
    until(lambda: name not in [c["id"] for c in daemon.json("container", "list")], 20)
    done = daemon.cli("container", "inspect", name, check=False)
    assert done.returncode == 2 and "container list" in error_line(done)


# snapshot


def test_snapshot(daemon: Daemon) -> None:
    path = daemon.program(PROGRAM.replace('App("tool")', 'App("snaps")') + "\n# another version\n", "snaps.py")
    daemon.cli("deploy", str(path))
    assert daemon.json("snapshot", "list", "--app", "snaps") == []
    first = daemon.cli("snapshot", "create", "snaps.add").stdout.strip()
    assert daemon.cli("snapshot", "create", "snaps.add").stdout.strip() == first  # it is there already
    box = daemon.json("snapshot", "create", "snaps.Box")["id"]
    rows = {s["id"]: s for s in daemon.json("snapshot", "list", "--app", "snaps")}
    assert set(rows) == {first, box} and all(s["state"] == "ready" for s in rows.values())
    assert first in daemon.cli("snapshot", "list").stdout
    # The same code under the name that `run` gives it shares the snapshot.
    ran = daemon.cli("run", f"{path}::add", "--a", "1")
    assert ran.stdout.splitlines()[-1] == "2"
    assert {s["id"] for s in daemon.json("snapshot", "list", "--app", "snaps")} == {first, box}

    detail = daemon.json("snapshot", "inspect", first)
    assert detail["memory_bytes"] > 1 << 20 and detail["function"] == "add" and detail["phases"]
    assert first in daemon.cli("snapshot", "inspect", first).stdout
    log = daemon.cli("snapshot", "inspect", first, "--log")
    assert "Dumping finished successfully" in log.stdout and "dump.log" in log.stderr

    # The container that made it lives on files of it: until that has ended, it is no more than out of use.
    assert "retired" in daemon.cli("snapshot", "invalidate", first).stderr
    states = {s["id"]: s["state"] for s in daemon.json("snapshot", "list", "--app", "snaps")}
    assert states == {first: "retired", box: "ready"}
    for container in daemon.json("container", "list", "--app", "snaps"):
        daemon.cli("container", "stop", container["id"])
    until(lambda: len(daemon.json("snapshot", "list", "--app", "snaps")) == 1, 20)
    assert daemon.cli("call", "snaps.add", "a=1").stdout == "2\n"  # cold, and makes another
    second = until(lambda: [s for s in daemon.json("snapshot", "list", "--app", "snaps") if s["function"] == "add"], 20)
    assert second[0]["id"] != first
    assert "removed" in daemon.cli("snapshot", "invalidate", box).stderr
    for verb, name in (("inspect", first), ("invalidate", first), ("create", "snaps.no")):
        done = daemon.cli("snapshot", verb, name, check=False)
        assert done.returncode == 2 and error_line(done)
    done = daemon.cli("snapshot", "create", "snaps.fail", check=False)
    assert done.returncode == 2 and "enable_memory_snapshot" in error_line(done)


# secret, doctor, daemon


def test_secrets(daemon: Daemon) -> None:
    path = daemon.program(
        """
import os, woodfrog
app = woodfrog.App("teller")

@app.function(enable_memory_snapshot=True, secrets=[woodfrog.Secret.from_name("door", required_keys=["CODE"])])
def tell():
    return os.environ["CODE"]
""",
        "teller.py",
    )
    daemon.cli("secret", "create", "door", "CODE=123")
    assert daemon.cli("run", f"{path}::tell").stdout == "123\n"
    listed = daemon.cli("secret", "list")
    assert "door" in listed.stdout and "123" not in listed.stdout
    # A new value is in the next container, also one that is thawed.
    daemon.cli("secret", "create", "door", "CODE=456")
    assert daemon.cli("run", f"{path}::tell").stdout == "456\n"


def test_doctor(daemon: Daemon) -> None:
    found = json.loads(daemon.cli("doctor", "--json").stdout)
    assert found["ok"] and len(found["checks"]) > 5
    assert {"criu", "daemon"} <= {c["name"] for c in found["checks"]}
    assert "this machine can run woodfrog" in daemon.cli("doctor").stdout

    done = daemon.cli("doctor", "--json", env={"WOODFROG_CRIU": "/nowhere/criu"}, check=False)
    bad = [c for c in json.loads(done.stdout)["checks"] if c["required"] and c["ok"] is False]
    assert done.returncode == 1 and bad and all(c["remedy"] for c in bad)


def test_version_and_help(daemon: Daemon) -> None:
    assert daemon.cli("--version").stdout.startswith("woodfrog 0.")
    shown = daemon.cli("--help").stdout
    for command in ("run", "deploy", "call", "app", "container", "snapshot", "daemon", "doctor"):
        assert command in shown
    done = daemon.cli("frob", check=False)
    assert done.returncode == 2 and "frob" in done.stderr


def test_daemon_commands(tmp_path: Path) -> None:
    """The daemon as the command line starts it: of itself, when one is needed."""
    with own_home() as daemon:
        done = daemon.cli("daemon", "status", check=False)
        assert done.returncode == 3 and "not running" in done.stderr
        assert json.loads(daemon.cli("daemon", "status", "--json", check=False).stdout) == {"running": False}
        assert daemon.json("daemon", "stop") == {"running": False, "stopped": False}

        started = daemon.json("daemon", "start")
        assert started["running"] and started["started"] and started["state_dir"] == str(daemon.home)
        assert daemon.json("daemon", "start")["started"] is False
        assert daemon.json("daemon", "status")["pid"] == started["pid"]
        assert "running" in daemon.cli("daemon", "status").stdout
        path = daemon.program(PROGRAM, "tool.py")
        daemon.cli("deploy", str(path))
        again = daemon.json("daemon", "restart")
        assert again["restarted"] and again["current"] and not alive(started["pid"])
        stopped = daemon.json("daemon", "stop")
        assert stopped["stopped"] and not alive(again["pid"])

        # Another is started by the first command that needs one; what was deployed is there.
        assert daemon.cli("call", "tool.add", "a=4").stdout == "5\n"
        pid = daemon.json("daemon", "status")["pid"]
        assert pid != again["pid"]
        assert daemon.cli("daemon", "logs", "-n", "5").stdout
        assert f"pid {pid}" in daemon.cli("daemon", "stop").stderr
        assert not alive(pid) and daemon.leaks() == {}


SLOW = """
import time
import woodfrog
app = woodfrog.App("slow")

@app.function()
def nap(seconds):
    time.sleep(seconds)
    return seconds
"""


def test_a_daemon_whose_code_was_removed_is_replaced(tmp_path: Path) -> None:
    """A clone that was deleted while its daemon ran: the next command says so, and goes on with one of its own."""
    with own_home() as daemon:
        copy = tmp_path / "clone"
        shutil.copytree(Path(woodfrog.__file__).parent, copy / "woodfrog")
        daemon.start(PYTHONPATH=str(copy))
        old = daemon.json("daemon", "status")["pid"]
        path = daemon.program(SLOW, "slow.py")
        daemon.cli("deploy", str(path))
        long = subprocess.Popen(
            [BIN / "woodfrog", "call", "slow.nap", "seconds=8"], env=daemon.env, stdout=subprocess.PIPE, text=True
        )
        until(lambda: any(c["call"] for c in daemon.get("/containers")["containers"]))
        with open(copy / "woodfrog/worker/server.py", "a") as file:
            file.write("# a new version\n")
        assert f"(pid {old}) is older than its code in {copy / 'woodfrog'}" in daemon.cli("app", "list").stderr
        shutil.rmtree(copy)
        gone = f"(pid {old}) runs from {copy / 'woodfrog'}, which is gone"
        checks = {c["name"]: c for c in json.loads(daemon.cli("doctor", "--json", check=False).stdout)["checks"]}
        assert not checks["daemon"]["ok"] and str(copy) in checks["daemon"]["found"]
        refused = daemon.cli("call", "slow.nap", "seconds=0", check=False)
        assert refused.returncode and f"{gone}, and 1 call is not finished there" in refused.stderr
        assert long.communicate()[0] == "8\n"
        done = daemon.cli("call", "slow.nap", "seconds=0")
        assert done.stdout == "0\n" and f"note: woodfrog's daemon {gone}: another is started" in done.stderr
        assert daemon.json("daemon", "status")["pid"] != old and not alive(old)
        assert daemon.cli("call", "slow.nap", "seconds=0").stderr.count("note") == 0


WAITING = """
import woodfrog
from woodfrog.sdk import client
client.ABANDONED_S = 0.2
print(woodfrog.Function.from_name("slow", "nap").remote(2))
"""


def test_who_waits_for_a_daemon_that_was_killed_starts_another() -> None:
    with own_home() as daemon:
        daemon.start()
        daemon.cli("deploy", str(daemon.program(SLOW, "slow.py")))
        waiting = subprocess.Popen(
            [BIN / "python", "-c", WAITING], env=daemon.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        until(lambda: any(c["call"] for c in daemon.get("/containers")["containers"]))
        daemon.kill()
        said, told = waiting.communicate(timeout=120)
        assert (said, waiting.returncode) == ("2\n", 0) and "died: starting another" in told, told


class own_home:
    """A state directory without a daemon, and the end of whatever daemon was started in it."""

    def __enter__(self) -> Daemon:
        self.daemon = Daemon()
        return self.daemon

    def __exit__(self, *exc: Any) -> None:
        try:
            self.daemon.cli("daemon", "stop", check=False)
        finally:
            self.daemon.__exit__(None, None, None)


def alive(pid: int) -> bool:
    try:
        return not Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except OSError:
        return os.path.exists(f"/proc/{pid}")
