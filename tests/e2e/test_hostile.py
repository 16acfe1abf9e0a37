"""Programs that mean harm: what they reach, and what they keep others from."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.harness import Daemon
from woodfrog.errors import WoodfrogError
from woodfrog.sdk.client import Client

pytestmark = [pytest.mark.root, pytest.mark.criu]

CLOSED = Path("/etc/shadow")
"""A file of the host's that every sandbox has, and only root may read."""

THIEF = """
import os, woodfrog

app = woodfrog.App("thief")
volume = woodfrog.Volume.from_name("shared", create_if_missing=True)

@app.cls(enable_memory_snapshot=True, volumes={"/data": volume}, single_use_containers=True)
class Thief:
    @woodfrog.enter(snap=True)
    def prepare(self):
        if os.path.islink("/data/d"):
            self.fd = None  # the snapshot was not used
            return
        about = os.stat("/etc/shadow")
        os.makedirs("/data/d", exist_ok=True)
        with open("/data/d/shadow", "wb") as file:
            file.write(b"x" * about.st_size)
        os.chmod("/data/d/shadow", about.st_mode & 0o7777)
        os.utime("/data/d/shadow", ns=(about.st_mtime_ns, about.st_mtime_ns))
        self.fd = os.open("/data/d/shadow", os.O_RDONLY)
        with suppress(FileExistsError):
            os.symlink("d", "/data/link")

    @woodfrog.method()
    def read(self):
        if self.fd is None:
            return "cold"
        with open("/data/link/shadow", "rb") as file:  # links in volumes lead somewhere again
            return [os.pread(self.fd, 64, 0).decode(), len(file.read(1))]

@app.function(volumes={"/data": volume})
def swap():
    os.rename("/data/d", "/data/old")
    os.symlink("/etc", "/data/d")
""".replace("import os, woodfrog", "import os, woodfrog\nfrom contextlib import suppress")

NOISY = """
import os, time, woodfrog

app = woodfrog.App("noisy")

@app.function()
def shout():
    for _ in range(3):
        if os.fork() == 0:
            while True:
                os.write(1, b"\\n" * 65536)
    time.sleep(0.3)
    raise ValueError("and the rest of it")

@app.function()
def quiet():
    return 1
"""


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with Daemon() as daemon:
        yield daemon


@pytest.mark.skipif(not CLOSED.exists() or os.stat(CLOSED).st_mode & 0o004, reason="no file that only root may read")
def test_a_restore_opens_nothing_through_a_link_in_a_volume(daemon: Daemon) -> None:
    """CRIU opens the files as root; what was a directory at the freeze may be a link at the thaw."""
    daemon.cli("deploy", str(daemon.program(THIEF, "thief.py")))
    captured = daemon.call("thief", "Thief.read")
    daemon.wait_snapshot("thief")
    assert captured == daemon.call("thief", "Thief.read") and set(captured[0]) == {"x"} and captured[1] == 1
    assert "criu" in daemon.last_phases()
    daemon.call("thief", "swap")
    assert daemon.call("thief", "Thief.read") == "cold"


def test_output_without_end_stops_nobody_else(daemon: Daemon) -> None:
    """The daemon reads what is in the pipes before a traceback: not until they are empty, which they never are."""
    daemon.cli("deploy", str(daemon.program(NOISY, "noisy.py")))
    assert daemon.call("noisy", "quiet") == 1
    answers: list[str] = []

    def shout() -> None:
        other = Daemon.__new__(Daemon)
        other.__dict__.update(daemon.__dict__, _client=None)
        try:
            other.call("noisy", "shout", timeout=60)
        except (AssertionError, WoodfrogError) as e:
            answers.append(str(e))

    thread = threading.Thread(target=shout)
    thread.start()
    begin, calls = time.monotonic(), 0
    while time.monotonic() < begin + 5:
        assert daemon.call("noisy", "quiet", timeout=30) == 1
        calls += 1
    assert calls > 1
    thread.join(60)
    # In the log it may have been followed by more than that keeps.
    assert answers and "and the rest of it" in answers[0], answers


KEEPER = """
import os, woodfrog

app = woodfrog.App("keeper")
volume = woodfrog.Volume.from_name("private", create_if_missing=True)

@app.function(volumes={"/data": volume})
def keep():
    with open("/data/file", "w") as file:
        file.write("private")
    os.chmod("/data/file", 0o666)
    return sorted(os.listdir("/tmp"))
"""


def test_what_other_users_of_the_machine_reach(daemon: Daemon) -> None:
    """Nothing of volumes, snapshots, code or secrets; nothing that containers see."""
    daemon.cli("deploy", str(daemon.program(KEEPER, "keeper.py")))
    daemon.cli("secret", "create", "closed", "KEY=value")
    daemon.call("keeper", "keep")
    known = [path for path in daemon.home.rglob("*") if not path.is_relative_to(daemon.home / "snapshots")]
    assert any(path.name == "file" for path in known) and any(path.name == "keeper.py" for path in known)
    theirs = ("src-", "test-daemon.log")  # what the test itself left there

    names = [str(p) for p in known if not p.relative_to(daemon.home).parts[0].startswith(theirs)]
    script = 'while read -r p; do if [ -r "$p" ] || [ -w "$p" ] && ! [ -L "$p" ]; then echo "$p"; fi; done'
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "sh", "-c", script],
        input="".join(f"{name}\n" for name in names),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == []


SPARSE = """
import woodfrog

app = woodfrog.App("sparse")

@app.cls(enable_memory_snapshot=True, single_use_containers=True)
class Sparse:
    @woodfrog.enter(snap=True)
    def prepare(self):
        with open("/tmp/holes", "wb") as file:
            file.truncate(1 << 43)

    @woodfrog.method()
    def serve(self):
        return 1
"""


def test_a_file_of_holes_is_not_read_for_hours(daemon: Daemon) -> None:
    daemon.cli("deploy", str(daemon.program(SPARSE, "sparse.py")))
    assert daemon.call("sparse", "Sparse.serve") == 1
    assert "of holes, at most 16" in daemon.app_text("sparse") and not daemon.snapshots("sparse")


NAMED = """
import woodfrog

app = woodfrog.App("named")

@app.function(single_use_containers=True)
def read(path):
    try:
        with open(path) as file:
            return file.read()
    except OSError as e:
        return type(e).__name__
"""


def test_a_directory_that_a_deploy_named_is_not_exchanged_for_a_closed_one() -> None:
    """Who may use the socket may be anybody on the machine, and own what is bound into his functions' sandboxes."""
    with (
        tempfile.TemporaryDirectory(prefix="wf-named-", dir="/tmp") as folder,
        Daemon(WOODFROG_SOCKET_GROUP="root") as d,
    ):
        base = Path(folder)
        base.chmod(0o755)
        named, closed = base / "named", base / "closed"
        for path in (named, closed / "open"):
            path.mkdir(parents=True)
            (path / "file").write_text(path.name)
        closed.chmod(0o700)
        d.cli("deploy", str(d.program(NAMED, "named.py")))
        with sqlite3.connect(d.home / "journal.sqlite") as db:
            spec = json.loads(db.execute("SELECT spec FROM deploys").fetchone()[0])
        spec["runtime"]["sys_path"].append(str(named))
        Client(d.settings).request("POST", "/apps/named/deploy", data={"spec": spec})

        def read() -> str:
            done = d.cli("call", "named.read", "--arg", json.dumps([str(named / "file")]), check=False)
            return done.stdout or done.stderr

        assert '"named"' in read()
        named.rename(base / "away")
        named.symlink_to(closed / "open")
        assert "not open to all users" in read()
        named.unlink()
        named.symlink_to(base / "away")
        assert '"named"' in read()
