"""What users get wrong, and what their code does to itself: one clear line each, and a daemon that goes on.

What the host must have (a kernel with userfaultfd, with CHECKPOINT_RESTORE, ...) is judged in unit/test_doctor.py.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from e2e.harness import BIN, Daemon, until

pytestmark = [pytest.mark.root, pytest.mark.criu]

APP = """
import ctypes, errno, os, signal, subprocess, sys, threading, time
import woodfrog

app = woodfrog.App("bad")
inside = "WOODFROG_INSTANCE" in os.environ
quick = {"scaledown_window": 2}

@app.function(**quick)
def plus_one(x: int = 1):
    return x + 1

@app.function(**quick)
def returns_lock():
    return threading.Lock()

@app.function(**quick)
def raises():
    raise KeyError("no such thing")

@app.function(**quick)
def leaves():
    os._exit(7)

@app.function(**quick)
def segfaults():
    ctypes.string_at(0)

@app.function(**quick)
def comes_back_twice():
    child = os.fork()
    if child:
        os.waitpid(child, 0)
    return "child" if child == 0 else "parent"

@app.function(**quick)
def leaves_children():
    # One plain, one in a session of its own, one that detached itself.
    subprocess.Popen(["sleep", "1234"])
    subprocess.Popen(["sleep", "1234"], start_new_session=True)
    subprocess.run(["sh", "-c", "setsid sleep 1234 >/dev/null 2>&1 & exit 0"])
    return True

@app.function(memory=128, **quick)
def fills_memory():
    held = []
    while True:
        held.append(bytearray(os.urandom(1 << 20)))

@app.function(memory=128, **quick)
def child_fills_memory():
    code = "held = [bytearray(1 << 20) for _ in iter(int, 1)]"
    return subprocess.run([sys.executable, "-c", code]).returncode

@app.cls(memory=128, **quick)
class MemoryInEnter:
    @woodfrog.enter()
    def load(self):
        self.held = bytearray(os.urandom(1 << 20)) * 1000

    @woodfrog.method()
    def run(self):
        return len(self.held)

@app.function(ephemeral_disk=24, **quick)
def fills_disk():
    where = []
    for path in ("/tmp/big", "/root/big", "/var/tmp/big"):
        try:
            with open(path, "wb") as f:
                for _ in range(4096):
                    f.write(bytes(1 << 20))
        except OSError as e:
            where.append(errno.errorcode[e.errno])
        os.unlink(path)
    with open("/tmp/again", "wb") as f:
        f.write(bytes(1 << 20))
    return where

@app.function(ephemeral_disk=24, **quick)
def fills_disk_and_falls():
    with open("/tmp/big", "wb") as f:
        while True:
            f.write(bytes(1 << 20))

@app.function(**quick)
def prints():
    line = "x" * 99
    for _ in range(1_000_000):
        print(line)
    return "printed"

@app.function(timeout=1, **quick)
def ignores_timeout():
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while True:
        try:
            time.sleep(1000)
        except BaseException:
            pass

@app.function(timeout=1, retries=woodfrog.Retries(max_retries=1, initial_delay=0.0), **quick)
def ignores_timeout_twice():
    print("attempt", flush=True)
    time.sleep(1000)

@app.cls(startup_timeout=1, **quick)
class NeverReady:
    @woodfrog.enter()
    def load(self):
        time.sleep(1000)

    @woodfrog.method()
    def run(self):
        return 1

@app.cls(enable_memory_snapshot=True, **quick)
class RaisesInEnter:
    @woodfrog.enter(snap=True)
    def load(self):
        raise FileNotFoundError("/weights.bin is not there")

    @woodfrog.method()
    def run(self):
        return 1

@app.cls(enable_memory_snapshot=True, **quick)
class RaisesInEnterAfterRestore:
    @woodfrog.enter(snap=False)
    def connect(self):
        raise ConnectionError("database is away")

    @woodfrog.method()
    def run(self):
        return 1

@app.cls(scaledown_window=0.2)
class RaisesInExit:
    @woodfrog.exit()
    def close(self):
        raise RuntimeError("exit went wrong")

    @woodfrog.method()
    def run(self):
        return "answered"

@app.cls(**quick)
class LeavesInEnter:
    @woodfrog.enter()
    def load(self):
        os._exit(9)

    @woodfrog.method()
    def run(self):
        return 1
"""


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with Daemon(WOODFROG_LOG_MIB="8") as daemon:
        daemon.cli("deploy", str(daemon.program(APP, "bad.py")))
        yield daemon
        daemon.stop()
        assert daemon.leaks() == {}
        assert "internal error" not in daemon.log.read_text(), daemon.log.read_text()


def call(daemon: Daemon, target: str, *args: str, timeout: float = 60) -> CompletedProcess[str]:
    return daemon.cli("call", f"bad.{target}", *args, check=False, timeout=timeout)


def one_line(done: CompletedProcess[str], *words: str, status: int = 2) -> str:
    """The command failed with one `error:` line that has these words; the line."""
    assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    for word in words:
        assert word.lower() in lines[0].lower(), (word, lines[0])
    assert "Traceback" not in lines[0] and "internal" not in lines[0]
    return lines[0]


def run(daemon: Daemon, text: str, *, name: str = "program.py", **kwargs: Any) -> CompletedProcess[str]:
    return daemon.cli("run", str(daemon.program(text, name)), check=False, **kwargs)


# The program


def test_file_not_found(daemon: Daemon) -> None:
    one_line(daemon.cli("run", "nowhere/app.py", check=False), "file not found", "nowhere/app.py")
    one_line(daemon.cli("deploy", "nowhere/app.py", check=False), "file not found", "nowhere/app.py")


def test_syntax_error(daemon: Daemon) -> None:
    done = run(daemon, "import woodfrog\napp = woodfrog.App('x')\ndef f(:\n    pass\n", name="broken.py")
    line = one_line(done, "broken.py", "syntax error")
    assert "broken.py:3:" in line


def test_two_functions_of_one_name(daemon: Daemon) -> None:
    done = run(
        daemon,
        "import woodfrog\napp = woodfrog.App('x')\n"
        "@app.function()\ndef f():\n    return 1\n\n@app.function()\ndef f():\n    return 2\n",
        name="twice.py",
    )
    line = one_line(done, "f", "twice.py")
    assert "name" in line or "already" in line, line


def test_unknown_parameter_names_the_nearest(daemon: Daemon) -> None:
    done = run(
        daemon, "import woodfrog\napp = woodfrog.App('x')\n@app.function(memroy=3)\ndef f(): pass\n", name="typo.py"
    )
    one_line(done, "memroy", "memory", "typo.py")


def test_import_that_raises_here(daemon: Daemon) -> None:
    done = run(daemon, "import woodfrog\napp = woodfrog.App('x')\nraise ValueError('no config')\n", name="raising.py")
    one_line(done, "raising.py", "ValueError", "no config")
    assert 'raising.py", line 3' in done.stderr


def test_import_that_raises_in_the_container(daemon: Daemon) -> None:
    done = run(
        daemon,
        "import os, woodfrog\napp = woodfrog.App('x')\n"
        "if 'WOODFROG_INSTANCE' in os.environ:\n    raise RuntimeError('not in a container')\n"
        "@app.function(enable_memory_snapshot=True)\ndef f():\n    return 1\n",
        name="remote_import.py",
    )
    one_line(done, "f: import failed", "RuntimeError", "not in a container")
    assert done.stderr.count('remote_import.py", line 4') == 1  # the traceback is in the log, which `run` shows


def test_module_that_is_only_here(daemon: Daemon) -> None:
    """A package of the container's that is missing is named."""
    done = run(
        daemon,
        "import os, woodfrog\napp = woodfrog.App('x')\n"
        "if 'WOODFROG_INSTANCE' in os.environ:\n    import not_installed_anywhere\n"
        "@app.function()\ndef f():\n    return 1\n",
        name="missing.py",
    )
    one_line(done, "import failed", "not_installed_anywhere")


# Arguments and results


def test_argument_that_cannot_be_pickled(daemon: Daemon) -> None:
    done = run(
        daemon,
        "import threading, woodfrog\napp = woodfrog.App('x')\n"
        "@app.function()\ndef f(a, key=None):\n    return 1\n"
        "@app.local_entrypoint()\ndef main():\n    f.remote(1, key=threading.Lock())\n",
    )
    one_line(done, "f", "'key'", "lock", "cannot be pickled")


def test_result_that_cannot_be_pickled(daemon: Daemon) -> None:
    done = run(
        daemon,
        "import threading, woodfrog\napp = woodfrog.App('x')\n"
        "@app.function()\ndef f():\n    return threading.Lock()\n"
        "@app.local_entrypoint()\ndef main():\n    f.remote()\n",
    )
    assert done.returncode == 1, done.stderr
    last = [line for line in done.stderr.splitlines() if "cannot be pickled" in line]
    assert last and "f()" in last[0] and "lock" in last[0].lower(), done.stderr
    # As JSON, from the shell.
    done = call(daemon, "returns_lock")
    assert done.returncode == 1 and "not JSON" in done.stderr and "returns_lock" in done.stderr, done.stderr


def test_exception_arrives_with_its_traceback(daemon: Daemon) -> None:
    done = call(daemon, "raises")
    assert done.returncode == 1
    assert "KeyError: 'no such thing'" in done.stderr and 'bad.py", line' in done.stderr
    assert "woodfrog/worker" not in done.stderr, done.stderr
    log = daemon.app_text("bad")
    assert log.count("\nKeyError: 'no such thing'") == 1 and "of raises: KeyError: 'no such thing'" in log


def test_arguments_on_the_command_line(daemon: Daemon) -> None:
    one_line(call(daemon, "plus_one", "--arg", "{not json"), "--arg", "not JSON")
    one_line(call(daemon, "nothing_here"), "nothing_here", "plus_one")
    one_line(daemon.cli("call", "nowhere.f", check=False), "nowhere", "bad")
    assert json.loads(call(daemon, "plus_one", "x=41").stdout) == 42


def test_result_of_one_gibibyte(daemon: Daemon) -> None:
    available = int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) >> 20  # type: ignore[index]
    if available < 6:
        pytest.skip(f"needs 6 GiB of free memory, there are {available}")
    free = os.statvfs(daemon.home)
    if free.f_bavail * free.f_frsize < 4 << 30:
        pytest.skip("needs 4 GiB of disk")
    begin = time.monotonic()
    done = run(
        daemon,
        "import woodfrog, zlib\napp = woodfrog.App('x')\n"
        "@app.function(timeout=120)\ndef big():\n    return bytes(range(256)) * (1 << 22)\n"
        "@app.local_entrypoint()\ndef main():\n    got = big.remote()\n"
        "    print(len(got), got[-256:] == bytes(range(256)), got.count(b'\\xff\\x00') == (1 << 22) - 1)\n",
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    assert f"{1 << 30} True True" in done.stdout
    print(f"1 GiB result: {time.monotonic() - begin:.1f} s")


# What user code does to its process


def test_exit_in_a_call(daemon: Daemon) -> None:
    one_line(call(daemon, "leaves"), "leaves", "exited with code 7")


def test_segmentation_fault(daemon: Daemon) -> None:
    one_line(call(daemon, "segfaults"), "segfaults", "SIGSEGV", "segmentation fault")
    # faulthandler's stack is in the log.
    text = until(lambda: "Fatal Python error: Segmentation fault" in (t := daemon.app_text("bad")) and t)
    assert "in segfaults" in text


def test_fork_that_comes_back_in_the_child(daemon: Daemon) -> None:
    """Only the worker answers; its copy ends."""
    for _ in range(2):
        assert json.loads(call(daemon, "comes_back_twice").stdout) == "parent"


def test_children_left_behind_go_with_the_container(daemon: Daemon) -> None:
    assert json.loads(call(daemon, "leaves_children").stdout) is True
    (container,) = [c for c in daemon.get("/containers")["containers"] if c["function"] == "leaves_children"]
    sleeping = [pid for pid in daemon.inits() if Path(f"/proc/{pid}/cmdline").read_bytes() == b"sleep\x001234\x00"]
    assert len(sleeping) == 3
    daemon.cli("container", "stop", container["id"])
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in sleeping))


def test_memory_limit_in_a_call(daemon: Daemon) -> None:
    one_line(call(daemon, "fills_memory"), "fills_memory", "memory limit", "128 MiB", "memory=")


def test_memory_limit_hit_by_a_child(daemon: Daemon) -> None:
    """The kernel kills the child; what becomes of the call is up to the user's code."""
    done = call(daemon, "child_fills_memory")
    if done.returncode == 0:
        assert json.loads(done.stdout) == -9
    else:
        one_line(done, "memory limit", "128 MiB")


def test_memory_limit_in_enter(daemon: Daemon) -> None:
    one_line(call(daemon, "MemoryInEnter.run"), "MemoryInEnter", "memory limit", "128 MiB", "memory=")


def test_memory_error_has_its_class_in_python(daemon: Daemon) -> None:
    code = (
        "import woodfrog\n"
        "from woodfrog.errors import OutOfMemoryError, FunctionTimeoutError, InstanceCrashed\n"
        "for name, kind in [('fills_memory', OutOfMemoryError), ('ignores_timeout', FunctionTimeoutError),"
        " ('leaves', InstanceCrashed)]:\n"
        "    try:\n        woodfrog.Function.from_name('bad', name).remote()\n"
        "    except kind as e:\n        print(name, 'as expected', isinstance(e, (MemoryError, TimeoutError)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=daemon.env, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == [
        "fills_memory as expected True",
        "ignores_timeout as expected True",
        "leaves as expected False",
    ], done.stderr


def test_disk_limit(daemon: Daemon) -> None:
    """User code sees an ordinary full disk, and may make room again."""
    assert json.loads(call(daemon, "fills_disk").stdout) == ["ENOSPC"] * 3
    done = call(daemon, "fills_disk_and_falls")
    assert done.returncode == 1 and "No space left on device" in done.stderr, done.stderr
    # What was written is on no disk of the host's, and goes with the container.
    assert json.loads(call(daemon, "plus_one").stdout) == 2


def test_a_hundred_megabytes_of_output(daemon: Daemon) -> None:
    """The daemon answers others meanwhile, and keeps no more than its log budget."""
    call(daemon, "plus_one")
    slowest, over = 0.0, threading.Event()

    def ask() -> None:
        nonlocal slowest
        while not over.is_set():
            begin = time.monotonic()
            daemon.get("/health")
            slowest = max(slowest, time.monotonic() - begin)
            time.sleep(0.05)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        begin = time.monotonic()
        done = call(daemon, "prints", timeout=120)
        took = time.monotonic() - begin
    finally:
        over.set()
        asking.join()
    assert json.loads(done.stdout) == "printed", done.stderr
    assert slowest < 2.0, slowest
    kept = sum(p.stat().st_size for p in (daemon.home / "logs").iterdir())
    assert kept <= 8 << 20, kept
    last = [e for e in daemon.app_log("bad") if e["function"] == "prints" and e["stream"] == "stdout"][-1]
    assert last["line"] == "x" * 99
    print(f"100 MB printed in {took:.1f} s, slowest health check {slowest * 1e3:.0f} ms")


def test_timeout_of_code_that_blocks_signals(daemon: Daemon) -> None:
    begin = time.monotonic()
    one_line(call(daemon, "ignores_timeout"), "ignores_timeout", "timeout", "1")
    assert time.monotonic() - begin < 6
    until(lambda: not [c for c in daemon.get("/containers")["containers"] if c["function"] == "ignores_timeout"], 5)


def test_timeout_is_retried_as_often_as_asked(daemon: Daemon) -> None:
    one_line(call(daemon, "ignores_timeout_twice"), "timeout")
    attempts = [e for e in daemon.app_log("bad") if e["function"] == "ignores_timeout_twice" and e["line"] == "attempt"]
    assert len(attempts) == 2


def test_start_that_never_ends(daemon: Daemon) -> None:
    begin = time.monotonic()
    one_line(call(daemon, "NeverReady.run"), "NeverReady", "startup_timeout")
    assert time.monotonic() - begin < 10


# Hooks


def test_enter_that_raises(daemon: Daemon) -> None:
    done = call(daemon, "RaisesInEnter.run")
    one_line(done, "RaisesInEnter: enter failed", "FileNotFoundError", "/weights.bin")
    assert 'bad.py", line' in done.stderr and "in load" in done.stderr
    log = [e["line"] for e in daemon.app_log("bad") if e["function"] == "RaisesInEnter"]
    assert sum('bad.py", line' in line for line in log) == 1, log
    assert not daemon.snapshots("bad")


def test_enter_that_raises_after_the_restore(daemon: Daemon) -> None:
    one_line(call(daemon, "RaisesInEnterAfterRestore.run"), "enter failed", "ConnectionError", "database is away")
    # The frozen part is sound: the same answer comes from the snapshot, which is kept.
    one_line(call(daemon, "RaisesInEnterAfterRestore.run"), "enter", "ConnectionError", "database is away")
    assert not daemon.snapshots("bad", "retired")


def test_exit_that_raises(daemon: Daemon) -> None:
    assert json.loads(call(daemon, "RaisesInExit.run").stdout) == "answered"
    until(lambda: "\nRuntimeError: exit went wrong" in daemon.app_text("bad"))
    log = daemon.app_text("bad")
    assert "exit hook failed: RuntimeError: exit went wrong" in log and log.count("in close") == 1


def test_exit_of_the_process_in_enter(daemon: Daemon) -> None:
    one_line(call(daemon, "LeavesInEnter.run"), "LeavesInEnter", "exited with code 9")


# Deploys


def test_two_deploys_at_once(daemon: Daemon) -> None:
    """Each becomes a version; the newest answers, whole."""

    def program(number: int) -> Path:
        text = (
            "import woodfrog, part\napp = woodfrog.App('race')\n"
            f"@app.function(enable_memory_snapshot=True)\ndef f():\n    return [{number}, part.NUMBER]\n"
        )
        path = daemon.program(text, "race.py")
        (path.parent / "part.py").write_text(f"NUMBER = {number}\n")
        return path

    paths = [program(n) for n in range(4)]
    deploys = [
        subprocess.Popen(
            [str(BIN / "woodfrog"), "deploy", str(path), "--json"],
            env=daemon.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for path in paths
    ]
    versions = {}
    for number, process in enumerate(deploys):
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        versions[json.loads(out)["version"]] = number
    # What a deploy prints is what the app is at by then, which may be a later one's version: the history has them all.
    history = daemon.json("app", "history", "race")
    assert sorted(h["version"] for h in (history["versions"] if isinstance(history, dict) else history)) == [1, 2, 3, 4]
    answer = json.loads(daemon.cli("call", "race.f").stdout)
    assert answer[0] == answer[1]
    if 4 in versions and list(versions).count(4) == 1 and len(versions) == 4:
        assert answer[0] == versions[4]
    # Of the versions that went nothing runs on.
    until(lambda: len([c for c in daemon.get("/containers")["containers"] if c["app"] == "race"]) <= 1)


# The machine


# An ordinary user, who may read the interpreter wherever it lives.
NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
NOBODY += [f"--{kind}-caps=+dac_read_search" for kind in ("inh", "ambient")]


def as_nobody(daemon: Daemon, *args: str) -> CompletedProcess[str]:
    return subprocess.run(
        [*NOBODY, str(BIN / "woodfrog"), *args], env=daemon.env, capture_output=True, text=True, timeout=60, cwd="/"
    )


def test_without_root_and_without_a_daemon() -> None:
    stopped = Daemon()
    try:
        path = stopped.program("import woodfrog\napp = woodfrog.App('x')\n@app.function()\ndef f(): return 1\n")
        one_line(as_nobody(stopped, "run", str(path)), "root", "sudo", status=4)
        assert not stopped.settings.socket.exists()
    finally:
        stopped.__exit__()


def test_without_root_beside_roots_daemon(daemon: Daemon) -> None:
    one_line(as_nobody(daemon, "call", "bad.plus_one"), "may not use", "sudo", "socket_group", status=4)


def test_daemon_without_root(daemon: Daemon) -> None:
    """`woodfrogd` itself, started by hand."""
    stopped = Daemon()
    try:
        os.chown(stopped.home, 65534, 65534)
        command = [*NOBODY, sys.executable, "-m", "woodfrog.daemon"]
        done = subprocess.run(command, env=stopped.env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1 and "root" in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    finally:
        stopped.__exit__()


FAKES = {
    "too-old": ("#!/bin/sh\necho 'Version: 3.17.1'\n", ("CRIU", "3.17.1", "too old", "4.1")),
    "does-not-start": ("#!/bin/sh\necho 'Unexpected rt vDSO area bounds' >&2\nexit 1\n", ("does not start", "vDSO")),
    "not-there": (None, ("criu", "no such file")),
}


@pytest.mark.parametrize("kind", FAKES)
def test_criu_that_will_not_do(kind: str) -> None:
    script, words = FAKES[kind]
    daemon = Daemon()
    try:
        fake = daemon.home / "criu"
        if script is not None:
            fake.write_text(script)
            fake.chmod(0o755)
        path = daemon.program("import woodfrog\napp = woodfrog.App('x')\n@app.function()\ndef f(): return 1\n")
        done = daemon.cli("run", str(path), check=False, env={"WOODFROG_CRIU": str(fake)})
        one_line(done, "daemon", status=3)
        told = [line for line in done.stderr.splitlines() if "woodfrogd: " in line]
        assert len(told) == 1, done.stderr
        assert all(word.lower() in told[0].lower() for word in words), told[0]
        assert "Traceback" not in done.stderr
    finally:
        daemon.__exit__()


def test_state_directory_that_cannot_be() -> None:
    done = subprocess.run(
        [str(BIN / "woodfrog"), "app", "list"],
        env={**os.environ, "WOODFROG_HOME": "/proc/woodfrog"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    one_line(done, "/proc/woodfrog", status=4)


def test_setting_of_the_wrong_type(daemon: Daemon) -> None:
    done = daemon.cli("app", "list", check=False, env={"WOODFROG_POOL_SIZE": "many"})
    one_line(done, "WOODFROG_POOL_SIZE", "many")


def test_a_nearly_full_disk_keeps_a_daemon_from_its_first_start_only() -> None:
    """Later it has to start: what fills the disk is removed through it."""
    with tempfile.TemporaryDirectory(prefix="wf-", dir="/var/tmp") as small:
        os.chmod(small, 0o755)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300m,mode=755", "none", small], check=True)
        try:
            daemon = Daemon(under=small)
            with pytest.raises(AssertionError, match=r"disk: .* free for .*; woodfrog needs 1.0 GiB"):
                daemon.start()
            (daemon.home / "journal.sqlite").touch()
            with daemon:
                daemon.cli("volume", "create", "made")
                daemon.cli("volume", "delete", "made", "--yes")
                assert "WARNING woodfrog: disk:" in daemon.log.read_text()
        finally:
            subprocess.run(["umount", "-l", small], check=True)
