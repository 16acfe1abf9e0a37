"""The whole system when snapshots go bad, disks fill and things change under it: every call is still answered rightly.

What the catalogue and the engine do by themselves is in test_catalogue_faults.py and test_engine_faults.py.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from e2e.harness import Daemon, until
from woodfrog.errors import OutOfMemoryError

pytestmark = [pytest.mark.root, pytest.mark.criu]

APP = """
import ctypes, os, subprocess, time, zlib
import woodfrog

app = woodfrog.App("sys")
frozen = {"enable_memory_snapshot": True, "single_use_containers": True}

class Base:
    def fill(self):
        self.held = list(range(1000))
        with open("/tmp/state", "w") as f:
            f.write("written before")
        with open("/dev/shm/shared", "w") as f:
            f.write("shared before")

    def answer(self, x):
        with open("/tmp/state") as a, open("/dev/shm/shared") as b:
            return [sum(self.held) + x, a.read(), b.read()]

@app.cls(**frozen)
class Altered(Base):
    @woodfrog.enter(snap=True)
    def load(self):
        self.fill()

    @woodfrog.method()
    def run(self, x):
        return self.answer(x)

@app.cls(**frozen)
class Faulty(Base):
    which: str = woodfrog.parameter(default="")

    @woodfrog.enter(snap=True)
    def load(self):
        self.fill()

    @woodfrog.method()
    def run(self, x):
        return self.answer(x)

@app.cls(**frozen)
class Stray(Base):
    @woodfrog.enter(snap=True)
    def load(self):
        self.fill()
        subprocess.run(["sh", "-c", "setsid sleep 4321 >/dev/null 2>&1 & exit 0"])

    @woodfrog.method()
    def run(self, x):
        names = [open(f"/proc/{pid}/comm").read().strip() for pid in os.listdir("/proc") if pid.isdigit()]
        return self.answer(x) + [names.count("sleep")]

@app.cls(**frozen)
class SystemV(Base):
    @woodfrog.enter(snap=True)
    def load(self):
        self.fill()
        libc = ctypes.CDLL(None)
        libc.shmat.restype = ctypes.c_void_p
        self.at = libc.shmat(libc.shmget(0, 4096, 0o1600), None, 0)
        assert self.at not in (None, ctypes.c_void_p(-1).value)

    @woodfrog.method()
    def run(self, x):
        return self.answer(x)

@app.cls(enable_memory_snapshot=True, scaledown_window=30)
class Lazy:
    @woodfrog.enter(snap=True)
    def load(self):
        self.held = [os.urandom(1 << 16) for _ in range(1024)]
        self.sums = [zlib.crc32(b) for b in self.held]

    @woodfrog.method()
    def check(self, first, last, seconds=0.0):
        time.sleep(seconds)
        return all(zlib.crc32(b) == s for b, s in zip(self.held[first:last], self.sums[first:last]))

@app.cls(volumes={"/libs": woodfrog.Volume.from_name("libs", create_if_missing=True)}, **frozen)
class Mapped:
    @woodfrog.enter(snap=True)
    def load(self):
        self.lib = ctypes.CDLL("/libs/libz.so.1")
        self.lib.crc32.restype = ctypes.c_ulong

    @woodfrog.method()
    def run(self, text):
        return self.lib.crc32(0, text.encode(), len(text))

@app.function(
    secrets=[woodfrog.Secret.from_name("token"), woodfrog.Secret.from_dict({"INLINE": "inline-sesame-5511"})], **frozen
)
def secretive():
    return [os.environ["TOKEN"], os.environ["INLINE"], woodfrog.restored()]
"""
SUM = sum(range(1000))


def answer(x: int) -> list[Any]:
    return [SUM + x, "written before", "shared before"]


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    # What is altered here are images as they were captured; test_packing_faults.py has the page store's.
    with Daemon(WOODFROG_LAZY_MIN_MIB="16") as daemon:
        daemon.cli("secret", "create", "token", input='{"TOKEN": "first-sesame-7741"}')
        daemon.cli("deploy", str(daemon.program(APP, "faulty.py")))
        yield daemon
        daemon.stop()
        assert daemon.leaks() == {}
        assert "internal error" not in daemon.log.read_text(), daemon.log.read_text()


def call(daemon: Daemon, tag: str, **arguments: Any) -> tuple[Any, str]:
    """A call's answer, and what the app's log says of the containers since."""
    begin = time.time()
    value = daemon.call("sys", tag, **arguments)
    return value, "\n".join(e["line"] for e in daemon.app_log("sys") if e["t"] >= begin - 0.001)


def of_function(daemon: Daemon, function: str, state: str = "ready") -> list[str]:
    rows = [s for s in daemon.get("/snapshots")["snapshots"] if s.get("function") == function and s["state"] == state]
    return [s["id"] for s in sorted(rows, key=lambda s: s["created"])]


def nothing_half_made(daemon: Daemon) -> None:
    def hidden() -> list[str]:
        return [p.name for p in (daemon.home / "snapshots").iterdir() if p.name.startswith(".")]

    until(lambda: hidden() == [], 10)
    visible = {p.name for p in (daemon.home / "snapshots").iterdir()}
    assert visible == {s["id"] for s in daemon.get("/snapshots")["snapshots"]}


# Altered snapshots


def flip(path: Path, at: int = -1) -> None:
    """Change one bit and leave no trace in the times that a program can set."""
    info = path.stat()
    with open(path, "r+b") as f:
        f.seek(info.st_size // 2 if at < 0 else at)
        byte = f.read(1)[0]
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte ^ 1]))
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


def pages(snapshot: Path) -> Path:
    return max((snapshot / "img").glob("pages-*.img"), key=lambda p: p.stat().st_size)


def alter_manifest(snapshot: Path) -> None:
    path = snapshot / "manifest.json"
    text = path.read_text()
    assert '"tag"' in text and "Altered" in text
    path.write_text(text.replace("Altered", "Changed", 1))


def other_snapshots_files(snapshot: Path) -> None:
    """A page image of the right size that is whole, but not this snapshot's: all zero."""
    path = pages(snapshot)
    size = path.stat().st_size
    path.write_bytes(bytes(size))


ALTERATIONS: dict[str, tuple[Callable[[Path], object], str]] = {
    "pages-truncated": (lambda s: os.truncate(pages(s), pages(s).stat().st_size - 4096), "bytes, not"),
    "pages-flipped": (lambda s: flip(pages(s)), "altered"),
    "pages-replaced": (other_snapshots_files, "altered"),
    "core-flipped": (lambda s: flip(next((s / "img").glob("core-*.img"))), "altered"),
    "image-removed": (lambda s: next((s / "img").glob("mm-*.img")).unlink(), "missing"),
    "manifest-altered": (alter_manifest, "sign"),
    "manifest-empty": (lambda s: os.truncate(s / "manifest.json", 0), "sign"),
    "manifest-removed": (lambda s: (s / "manifest.json").unlink(), "manifest.json"),
    "signature-altered": (lambda s: flip(s / "manifest.sig"), "sign"),
    "layer-flipped": (lambda s: flip(s / "fs/tmp/state"), "altered"),
    "layer-added": (lambda s: (s / "fs/tmp/sitecustomize.py").write_text("raise SystemExit"), "added"),
    "layer-setuid": (lambda s: os.chmod(s / "fs/tmp/state", 0o4755), "not as it was captured"),
    "layer-linked": (lambda s: (s / "fs/tmp/passwd").symlink_to("/etc/passwd"), "not as it was captured"),
    "image-added": (lambda s: (s / "img/extra.img").write_bytes(b"x"), "added"),
    "shm-flipped": (lambda s: flip(s / "shm/shared"), "altered"),
}


@pytest.mark.parametrize("kind", ALTERATIONS)
def test_altered_snapshot_is_never_thawed(daemon: Daemon, kind: str) -> None:
    if not of_function(daemon, "Altered"):
        assert call(daemon, "Altered.run", x=1)[0] == answer(1)
        until(lambda: of_function(daemon, "Altered"))
    if kind == "pages-truncated":
        value, log = call(daemon, "Altered.run", x=2)  # it thaws as long as nobody touched it
        assert value == answer(2) and "thawed in" in log
    (snapshot,) = of_function(daemon, "Altered")
    alter, word = ALTERATIONS[kind]
    alter(daemon.home / "snapshots" / snapshot)

    value, log = call(daemon, "Altered.run", x=3)

    assert value == answer(3)
    reason = [line for line in log.splitlines() if "did not thaw" in line]
    assert len(reason) == 1 and snapshot in reason[0] and word in reason[0] and "cold start" in reason[0], log
    # The bad one is out of use, a new one takes its place and serves.
    (new,) = until(lambda: [s for s in of_function(daemon, "Altered") if s != snapshot])
    assert snapshot in daemon.snapshots("sys", "retired")
    value, log = call(daemon, "Altered.run", x=4)
    assert value == answer(4) and "thawed in" in log and of_function(daemon, "Altered") == [new]


def test_damaged_while_the_daemon_was_down(daemon: Daemon) -> None:
    """The next daemon reads all anew: a flipped bit is found by its hash, a bad manifest is listed as damaged."""
    call(daemon, "Altered.run", x=1)
    (first,) = until(lambda: of_function(daemon, "Altered"))
    daemon.stop()
    flip(pages(daemon.home / "snapshots" / first))
    daemon.start()
    value, log = call(daemon, "Altered.run", x=5)
    assert value == answer(5) and "altered" in log
    (second,) = until(lambda: [s for s in of_function(daemon, "Altered") if s != first])

    daemon.stop()
    alter_manifest(daemon.home / "snapshots" / second)
    daemon.start()
    rows = {s["id"]: s for s in daemon.get("/snapshots")["snapshots"]}
    assert rows[first]["state"] == "retired"
    assert rows[second]["state"] == "damaged" and "sign" in rows[second]["why"]
    assert call(daemon, "Altered.run", x=6)[0] == answer(6)
    until(lambda: of_function(daemon, "Altered"))
    daemon.cli("snapshot", "invalidate", second)
    assert second not in {s["id"] for s in daemon.get("/snapshots")["snapshots"]}
    assert not (daemon.home / "snapshots" / second).exists()


# Captures that fail

CAPTURE_FAULTS = (
    "dump.before=raise", "dump.before=enospc", "dump.criu=kill-criu", "dump.after=raise", "dump.after=enospc",
    "capture.files=enospc", "capture.files=raise",
    "commit.before=enospc", "commit.data=enospc", "commit.manifest=enospc", "commit.manifest=raise",
    "restore.before=raise", "restore.criu=kill-criu", "restore.after=raise",
)  # fmt: skip


@pytest.mark.parametrize("fault", CAPTURE_FAULTS)
def test_failed_capture_costs_nothing_but_itself(daemon: Daemon, fault: str) -> None:
    daemon.stop()
    daemon.start(WOODFROG_FAULTS=f"{fault}*1", WOODFROG_ZYGOTES="0")  # else it may be a zygote that the fault meets
    before = set(daemon.snapshots("sys"))
    code = (
        "import woodfrog\n"
        f"o = woodfrog.Cls.from_name('sys', 'Faulty')(which={fault!r})\n"
        "print([o.run.remote(n) for n in range(3)])"
    )
    begin = time.time()
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=daemon.env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.strip() == str([answer(n) for n in range(3)]), done.stderr

    def reasons() -> list[str]:
        """Also of a container that is gone by then."""
        lines = [e["line"] for e in daemon.app_log("sys") if e["t"] >= begin]
        return [line for line in lines if "no snapshot: " in line]

    assert "enospc" not in fault or "no space left" in until(reasons)[0].lower(), reasons()
    until(reasons)
    # The next start tries again, and succeeds.
    done = subprocess.run([sys.executable, "-c", code], env=daemon.env, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == str([answer(n) for n in range(3)]), done.stderr
    daemon.wait_snapshot("sys", other_than=sorted(before))
    nothing_half_made(daemon)


# Restores that fail


@pytest.mark.parametrize(
    "fault", ["restore.before=raise", "restore.before=enospc", "restore.criu=kill-criu", "restore.after=raise"]
)
def test_failed_restore_is_a_cold_start(daemon: Daemon, fault: str) -> None:
    if not of_function(daemon, "Altered"):
        call(daemon, "Altered.run", x=1)
        until(lambda: of_function(daemon, "Altered"))
    snapshots = of_function(daemon, "Altered")
    daemon.stop()
    daemon.start(WOODFROG_FAULTS=f"{fault}*1")
    value, log = call(daemon, "Altered.run", x=7)
    assert value == answer(7)
    # CRIU may be done before it is killed; that it is killed at every moment is for test_engine_faults.py to see to.
    if "kill-criu" not in fault or "thawed in" not in log:
        assert "did not thaw" in log and "cold start" in log and "started in" in log, log
    # Once is no reason to give the snapshot up.
    value, log = call(daemon, "Altered.run", x=8)
    assert value == answer(8) and "thawed in" in log
    assert of_function(daemon, "Altered") == snapshots
    nothing_half_made(daemon)


def test_snapshot_that_fails_repeatedly_is_retired(daemon: Daemon) -> None:
    if not of_function(daemon, "Altered"):
        call(daemon, "Altered.run", x=1)
    (bad,) = until(lambda: of_function(daemon, "Altered"))
    daemon.stop()
    daemon.start(WOODFROG_FAULTS="restore.before=raise*3", WOODFROG_ZYGOTES="0")
    for n in range(3):
        value, log = call(daemon, "Altered.run", x=n)
        assert value == answer(n) and "did not thaw" in log
    assert bad in daemon.snapshots("sys", "retired")
    (why,) = [s["why"] for s in daemon.get("/snapshots")["snapshots"] if s["id"] == bad]
    assert "injected" in why
    assert call(daemon, "Altered.run", x=9)[0] == answer(9)
    until(lambda: of_function(daemon, "Altered"))
    value, log = call(daemon, "Altered.run", x=9)
    assert value == answer(9) and "thawed in" in log
    # A restart does not forget it.
    daemon.stop()
    daemon.start()
    assert bad in daemon.snapshots("sys", "retired")
    assert "thawed in" in call(daemon, "Altered.run", x=9)[1]


# Workers that cannot be dumped


def test_worker_that_cannot_be_dumped_runs_on(daemon: Daemon) -> None:
    value, log = call(daemon, "SystemV.run", x=1)
    assert value == answer(1)
    (reason,) = [line for line in log.splitlines() if "no snapshot: " in line]
    assert "System V shared memory" in reason and "runs on without a snapshot" in reason, reason
    assert log.count("started in") == 1 and "starting anew" not in log
    for n in range(3):
        value, log = call(daemon, "SystemV.run", x=n)
        assert value == answer(n)
    # After a few attempts it is left at that, and still said.
    assert "no snapshot: " not in log
    groups = [g for s in daemon.get("/state")["services"] if s["tag"] == "SystemV" for g in s["groups"]]
    assert groups[0]["snapshot"]["state"] == "gave-up" and "System V" in groups[0]["snapshot"]["reason"]
    assert of_function(daemon, "SystemV") == []
    nothing_half_made(daemon)
    done = daemon.cli("snapshot", "create", "sys.SystemV", check=False, timeout=30)
    assert done.returncode == 2 and done.stderr.strip().count("error: ") == 1, done.stderr


def test_process_that_detached_itself_is_captured_too(daemon: Daemon) -> None:
    assert call(daemon, "Stray.run", x=1)[0] == [*answer(1), 1]
    until(lambda: of_function(daemon, "Stray"))
    value, log = call(daemon, "Stray.run", x=2)
    assert value == [*answer(2), 1] and "thawed in" in log


# Memory that follows after the thaw


def working_set(daemon: Daemon) -> Path:
    (snapshot,) = of_function(daemon, "Lazy")
    return daemon.home / "snapshots" / snapshot / "working-set"


def thaw_lazily(daemon: Daemon, *, learn: bool = True) -> str:
    """A container of the class Lazy, thawed, of whose memory only a little has been asked for; its id."""
    for container in daemon.get("/containers")["containers"]:
        daemon.cli("container", "stop", container["id"])
    daemon.wait_idle()
    if learn:
        working_set(daemon).unlink(missing_ok=True)
    value, log = call(daemon, "Lazy.check", first=0, last=2)
    assert value is True and "thawed in" in log
    (container,) = [c for c in daemon.get("/containers")["containers"] if c["function"] == "Lazy"]
    return str(container["id"])


@pytest.fixture(scope="module")
def lazy(daemon: Daemon) -> Iterator[Daemon]:
    daemon.stop()
    daemon.start(WOODFROG_DRAIN_MS="-1", WOODFROG_PACK="0")
    assert call(daemon, "Lazy.check", first=0, last=2)[0] is True
    until(lambda: of_function(daemon, "Lazy"))
    yield daemon
    daemon.stop()
    daemon.start()


def test_page_server_killed_between_calls(lazy: Daemon) -> None:
    """What it served waits for memory that will not come: it is replaced, not believed."""
    instance = thaw_lazily(lazy)
    os.kill(lazy.page_server() or 0, signal.SIGKILL)
    value, log = call(lazy, "Lazy.check", first=0, last=1024)
    assert value is True
    until(lambda: instance not in {c["id"] for c in lazy.get("/containers")["containers"]})
    assert instance in lazy.app_text("sys") or instance in log or "page server" in lazy.log.read_text()
    # A new one serves the next.
    thaw_lazily(lazy)
    assert call(lazy, "Lazy.check", first=0, last=1024)[0] is True


def test_page_server_killed_in_a_call(lazy: Daemon) -> None:
    """The call is run again, in another container."""
    instance = thaw_lazily(lazy)
    server = lazy.page_server()
    assert server is not None
    timer = threading.Timer(1.0, os.kill, (server, signal.SIGKILL))
    timer.start()
    value, _ = call(lazy, "Lazy.check", first=0, last=1024, seconds=2.0)
    assert value is True
    assert instance not in {c["id"] for c in lazy.get("/containers")["containers"]}


def test_page_file_cut_under_a_running_container(lazy: Daemon) -> None:
    """Memory that cannot be read any more: the call is run again, and the snapshot is not thawed a second time."""
    instance = thaw_lazily(lazy)
    (snapshot,) = of_function(lazy, "Lazy")
    os.truncate(pages(lazy.home / "snapshots" / snapshot), 4096)
    value, log = call(lazy, "Lazy.check", first=0, last=1024)
    assert value is True
    assert "bytes, not" in log and "cold start" in log, log
    assert instance not in {c["id"] for c in lazy.get("/containers")["containers"]}
    assert snapshot in lazy.snapshots("sys", "retired")
    until(lambda: of_function(lazy, "Lazy"))


@pytest.mark.parametrize("kind", ["empty", "garbage", "truncated", "elsewhere", "unreadable"])
def test_bad_working_set_costs_time_at_most(lazy: Daemon, kind: str) -> None:
    """It says which pages come first; nothing hangs on it being right."""
    thaw_lazily(lazy)
    before = of_function(lazy, "Lazy")
    path = working_set(lazy)
    until(path.exists)
    good = path.read_bytes()
    header, ranges = good[:16], good[16:]
    bad = {
        "empty": b"",
        "garbage": os.urandom(999),
        "truncated": good[:-5],
        "elsewhere": header + bytes(b ^ 0x55 if n % 16 > 7 else b for n, b in enumerate(ranges)),
        "unreadable": None,
    }[kind]
    if bad is None:
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(bad)
    thaw_lazily(lazy, learn=False)
    assert call(lazy, "Lazy.check", first=0, last=1024)[0] is True
    assert of_function(lazy, "Lazy") == before
    if bad is None:
        path.rmdir()


TIGHT = """
import os, zlib
import woodfrog

app = woodfrog.App("tight")

@app.cls(enable_memory_snapshot=True, memory=160)
class Big:
    @woodfrog.enter(snap=True)
    def load(self):
        self.held = [os.urandom(1 << 16) for _ in range(1600)]
        self.crc = self.sum()

    def sum(self):
        crc = 0
        for piece in self.held:
            crc = zlib.crc32(piece, crc)
        return crc

    @woodfrog.method()
    def ok(self, more):
        taken = [os.urandom(1 << 20) for _ in range(more)]
        return self.sum() == self.crc
"""


def test_memory_limit_hit_while_memory_follows(lazy: Daemon) -> None:
    """Pages that are filled in from outside count for the container they go to, which is told apart from a lost one."""
    lazy.cli("deploy", str(lazy.program(TIGHT, "tight.py")))
    assert lazy.call("tight", "Big.ok", more=0) is True
    lazy.wait_snapshot("tight")
    for container in lazy.get("/containers")["containers"]:
        lazy.cli("container", "stop", container["id"])
    with pytest.raises(OutOfMemoryError, match="160 MiB"):
        lazy.call("tight", "Big.ok", more=100)
    assert lazy.call("tight", "Big.ok", more=1) is True
    assert "did not thaw" not in lazy.app_text("tight") and lazy.snapshots("tight", "retired") == []


# A full disk


FULL = """
import os, zlib
import woodfrog

app = woodfrog.App("full")

@app.cls(enable_memory_snapshot=True)
class Big:
    @woodfrog.enter(snap=True)
    def load(self):
        self.held = os.urandom(64 << 20)
        self.crc = zlib.crc32(self.held)

    @woodfrog.method()
    def ok(self):
        return zlib.crc32(self.held) == self.crc

@app.function()
def large(n: int):
    return "z" * n

@app.function(volumes={"/data": woodfrog.Volume.from_name("data", create_if_missing=True)})
def fill():
    try:
        with open("/data/x", "wb", buffering=0) as f:
            while f.write(bytes(1 << 16)):
                pass
    except OSError as e:
        return e.strerror
"""


def brim(path: Path) -> None:
    with open(path, "wb", buffering=0) as f, pytest.raises(OSError, match="No space left"):
        while f.write(bytes(4096)):
            pass


def test_state_directory_fills_up_in_mid_capture() -> None:
    """Real: the state directory is on a file system smaller than the memory to be captured."""
    mount = Path(tempfile.mkdtemp(prefix="wf-small-", dir="/var/tmp"))
    mount.chmod(0o755)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1200m,mode=0755", "woodfrog-test", str(mount)], check=True)
    try:
        with Daemon(under=mount, WOODFROG_ZYGOTES="0") as daemon:
            daemon.cli("deploy", str(daemon.program(FULL, "full.py")))
            # The daemon starts with no less than a gibibyte.
            subprocess.run(["mount", "-o", "remount,size=64m", str(mount)], check=True)
            assert json.loads(daemon.cli("call", "full.Big.ok").stdout) is True
            log = daemon.app_text("full")
            (reason,) = [line for line in log.splitlines() if "no snapshot: " in line]
            assert "No space left" in reason or "disk" in reason, reason
            assert "state directory" in reason or "room" in reason or str(mount) in reason, reason
            assert daemon.get("/snapshots")["snapshots"] == []
            nothing_half_made(daemon)
            # What it took is given back.
            assert shutil.disk_usage(mount).free > 30 << 20
            # A result that does not fit is an error of that call alone.
            done = daemon.cli("call", "full.large", "n=60000000", check=False, timeout=30)
            assert done.returncode == 2 and "No space left" in done.stderr, (done.stdout[:200], done.stderr[-2000:])
            assert json.loads(daemon.cli("call", "full.large", "n=3").stdout) == "zzz"
            assert shutil.disk_usage(mount).free > 30 << 20
            # And a disk that is full to the brim: calls that need none of it are told the truth, then work again.
            brim(mount / "filler")
            done = daemon.cli("call", "full.large", "n=4", check=False, timeout=30)
            assert done.returncode == 0 or "error: " in done.stderr, done.stderr
            (mount / "filler").unlink()
            assert json.loads(daemon.cli("call", "full.large", "n=5").stdout) == "zzzzz"
            # One function fills it with its volume: the others go on. So does a daemon that was killed then, and one
            # that finds nothing of its reserve.
            for reserve in (True, False):
                assert json.loads(daemon.cli("call", "full.fill").stdout) == "No space left on device"
                assert json.loads(daemon.cli("call", "full.large", "n=6").stdout) == "z" * 6
                daemon.kill()
                if not reserve:
                    (daemon.home / "reserve").unlink()
                    brim(mount / "filler")
                daemon.start()
                daemon.cli("volume", "delete", "data", "--yes")
                until(lambda: shutil.disk_usage(mount).free > 8 << 20)
                (mount / "filler").unlink(missing_ok=True)
                assert json.loads(daemon.cli("call", "full.large", "n=7").stdout) == "z" * 7
            daemon.stop()
            assert [line for line in daemon.mounts() if str(daemon.home) in line] == []
    finally:
        subprocess.run(["umount", str(mount)], check=True)
        mount.rmdir()


# What changes after the snapshot


def test_mapped_library_replaced_after_the_snapshot(daemon: Daemon) -> None:
    libs = daemon.home / "volumes" / "libs"
    found = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=True).stdout
    libz = next(line.split("=> ")[1] for line in found.splitlines() if "libz.so.1 " in line and "64" in line)
    shutil.copyfile(os.path.realpath(libz), libs / "libz.so.1")
    os.chmod(libs / "libz.so.1", 0o755)
    import zlib

    wanted = zlib.crc32(b"abc")
    assert call(daemon, "Mapped.run", text="abc")[0] == wanted
    (first,) = until(lambda: of_function(daemon, "Mapped"))
    value, log = call(daemon, "Mapped.run", text="abc")
    assert value == wanted and "thawed in" in log
    # An upgrade in place: the same bytes, written anew.
    shutil.copyfile(os.path.realpath(libz), libs / "libz.so.1")
    value, log = call(daemon, "Mapped.run", text="abc")
    assert value == wanted
    (reason,) = [line for line in log.splitlines() if "did not thaw" in line]
    assert "libz.so.1" in reason and "changed" in reason, reason
    (second,) = until(lambda: [s for s in of_function(daemon, "Mapped") if s != first])
    value, log = call(daemon, "Mapped.run", text="abc")
    assert value == wanted and "thawed in" in log
    # Taken away: no thaw, and an honest error of the cold start.
    (libs / "libz.so.1").unlink()
    done = daemon.cli("call", "sys.Mapped.run", "text=abc", check=False)
    assert done.returncode == 2 and "libz.so.1" in done.stderr, done.stderr
    assert second in daemon.snapshots("sys", "retired")


def test_rotated_secret_is_seen_and_shown_nowhere(daemon: Daemon) -> None:
    old, new, inline = "first-sesame-7741", "second-sesame-9923", "inline-sesame-5511"
    assert call(daemon, "secretive")[0][:2] == [old, inline]
    (snapshot,) = until(lambda: of_function(daemon, "secretive"))
    daemon.cli("secret", "create", "token", input=json.dumps({"TOKEN": new}))
    value, log = call(daemon, "secretive")
    assert value == [new, inline, True] and "thawed in" in log
    assert of_function(daemon, "secretive") == [snapshot]

    texts = [old, new, inline]
    for shown in (daemon.log.read_text(), daemon.app_text("sys"), daemon.cli("secret", "list", "--json").stdout,
                  json.dumps(daemon.get("/apps/sys")), json.dumps(daemon.get("/state")),
                  json.dumps(daemon.get("/containers")), json.dumps(daemon.get("/snapshots"))):  # fmt: skip
        assert not any(t in shown for t in texts)
    daemon.get("/health")
    for path in daemon.home.rglob("*"):
        program = path.name.startswith("faulty.")
        if path.is_symlink() or not path.is_file() or program or readable_by_none(path, daemon.home):
            continue
        data = path.read_bytes()
        assert not any(t.encode() in data for t in texts), path


def readable_by_none(path: Path, top: Path) -> bool:
    """Whether some directory on the way, or the file itself, is closed to all but root."""
    if not path.stat().st_mode & stat.S_IROTH:
        return True
    return any(not p.stat().st_mode & stat.S_IXOTH for p in path.parents if p.is_relative_to(top))


def test_changed_environment_is_seen(daemon: Daemon) -> None:
    def deploy(value: str) -> None:
        text = (
            "import os, woodfrog\napp = woodfrog.App('env')\n"
            f"@app.function(enable_memory_snapshot=True, single_use_containers=True, env={{'MODE': {value!r}}})\n"
            "def mode():\n    return os.environ['MODE']\n"
        )
        daemon.cli("deploy", str(daemon.program(text, "env.py")))

    for value in ("one", "two", "one"):
        deploy(value)
        assert daemon.call("env", "mode") == value
        until(lambda: daemon.snapshots("env"))
        assert daemon.call("env", "mode") == value


# A snapshot that takes long to get to the disk

SLOWLY = """
import time
import woodfrog

app = woodfrog.App("NAME")

@app.cls(enable_memory_snapshot=True, single_use_containers=True)
class Slowly:
    @woodfrog.enter(snap=True)
    def load(self):
        time.sleep(SECONDS)
        self.made = time.time()

    @woodfrog.method()
    def look(self):
        return self.made
"""


def slowly(daemon: Daemon, app: str, seconds: float) -> Callable[[], float]:
    text = SLOWLY.replace("NAME", app).replace("SECONDS", str(seconds))
    daemon.cli("deploy", str(daemon.program(text, f"{app}.py")))
    return partial(daemon.call, app, "Slowly.look")


@pytest.mark.parametrize(("seconds", "thaws"), [(6.0, True), (0.0, False)], ids=["sooner", "later"])
def test_a_start_waits_for_a_snapshot_if_that_is_sooner_than_to_boot(
    daemon: Daemon, seconds: float, thaws: bool
) -> None:
    """Its container is gone; the next call comes before it is on the disk."""
    daemon.stop()
    daemon.start(WOODFROG_FAULTS="commit.before=slow")
    app = f"slowly-{thaws}"
    look = slowly(daemon, app, seconds)
    first = look()
    until(lambda: app not in [c["app"] for c in daemon.get("/containers")["containers"]], 20)
    assert not daemon.snapshots(app)
    second = look()
    phases, said = daemon.last_phases(), daemon.app_text(app)
    assert "await-snapshot" in phases
    assert ("boot" not in phases) == (first == second) == thaws
    assert ("goes on from snapshot s-" in said and "thawed in" in said) == thaws
    daemon.wait_snapshot(app)
    until(lambda: app not in [c["app"] for c in daemon.get("/containers")["containers"]], 20)
    assert look() == first, "the one snapshot there is"
    assert daemon.app_text(app).count(" captured") == 1


def test_a_snapshot_that_never_gets_to_the_disk_is_told_though_its_container_is_gone(daemon: Daemon) -> None:
    daemon.stop()
    daemon.start(WOODFROG_FAULTS="commit.before=slow,commit.data=enospc*1")
    app = "slowly-never"
    look = slowly(daemon, app, 0.1)
    first = look()
    until(lambda: "no space left at" in daemon.app_text(app))
    assert "(it had answered, and is gone" in daemon.app_text(app)
    second = look()
    daemon.wait_snapshot(app)
    assert first < second == look(), "the next start captures"
    nothing_half_made(daemon)
