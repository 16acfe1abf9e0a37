"""Functions that start from a snapshot of a worker with their heavy imports: as in a plain start, or by one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from e2e.harness import Daemon, until

pytestmark = [pytest.mark.root, pytest.mark.criu]

PROGRAM = """
import json, locale, os, random, signal, sys, threading, warnings
import woodfrog
import numpy as np
from numpy.polynomial import Polynomial

BEFORE = list(sys.modules)
app = woodfrog.App("NAME")
drawn = [random.random(), float(np.random.rand())]


@app.function(ENABLE)
def look():
    tops = ("/tmp", "/dev/shm", os.environ["HOME"])
    files = sorted(os.path.join(at, n) for top in tops for at, _, names in os.walk(top) for n in names)
    fds = [f"/proc/self/fd/{f}" for f in os.listdir("/proc/self/fd") if int(f) > 2]
    ours = {k: v for k, v in os.environ.items() if k not in ("WOODFROG_INSTANCE", "WOODFROG_APP")}
    return {
        "same": {
            "order": [m for m in BEFORE if m.partition(".")[0] == "numpy"],
            "own": [m for m in BEFORE if m == "program"],
            "argv": sys.argv, "path": sys.path, "cwd": os.getcwd(), "env": ours, "files": files,
            "signals": {s.name: str(signal.getsignal(s)).partition(" at ")[0] for s in signal.Signals},
            "threads": sorted(t.name for t in threading.enumerate()), "tasks": len(os.listdir("/proc/self/task")),
            "locale": locale.setlocale(locale.LC_ALL), "warnings": [repr(f) for f in warnings.filters],
            "flags": repr(sys.flags), "pid": os.getpid(),
            "finders": [str(f).partition(" at ")[0] for f in sys.meta_path],
            "recursion": sys.getrecursionlimit(), "umask": os.umask(0o22), "version": VERSION,
        },
        "drawn": drawn,
        "fds": sorted(os.readlink(f).partition(":")[0] for f in fds if os.path.lexists(f)),
        "answer": float(Polynomial([1, 2])(np.float64(3))),
    }


VERSION = 1
"""


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with Daemon(WOODFROG_ZYGOTES="1", WOODFROG_ZYGOTE_MIN_MS="0") as daemon:
        yield daemon


def deploy(daemon: Daemon, name: str, text: str = PROGRAM, enable: str = "", **files: str) -> None:
    path = daemon.program(text.replace("NAME", name).replace("ENABLE", enable))
    for file, content in files.items():
        (path.parent / f"{file}.py").write_text(content)
    command = [sys.executable, "-c", "from woodfrog.cli import main; main()", "deploy", str(path)]
    done = subprocess.run(command, env=daemon.env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def answer(daemon: Daemon, name: str) -> tuple[dict[str, Any], set[str]]:
    """What the function sees, and the phases of its start."""
    value = daemon.call(name, "look")
    call = next(c for c in daemon.get("/calls")["calls"] if c["app"] == name)
    phases = daemon.get(f"/calls/{call['id']}/trace")["phases"]
    return value, {p["name"] for p in phases}


def zygotes(daemon: Daemon, state: str = "ready") -> list[dict[str, Any]]:
    rows = daemon.get("/snapshots")["snapshots"]
    return [r for r in rows if r.get("kind") == "zygote" and r["state"] == state]


def test_later_functions_start_from_it_and_cannot_tell(daemon: Daemon) -> None:
    with Daemon(WOODFROG_ZYGOTES="0") as other:
        deploy(other, "plain")
        plain, phases = answer(other, "plain")
        assert not phases & {"zygote.make", "zygote.restore", "preload"} and not zygotes(other)
    deploy(daemon, "first")
    first, phases = answer(daemon, "first")
    assert {"zygote.make", "preload", "zygote.restore"} <= phases
    found = until(lambda: zygotes(daemon))
    assert [z["modules"] for z in found] == [["woodfrog.sdk.app", "numpy", "numpy.polynomial"]]
    assert found[0]["function"] == "(zygote)"
    seen = [plain, first]
    for name in ("second", "third"):
        deploy(daemon, name, PROGRAM.replace("VERSION = 1", "import csv\n\nVERSION = 1"))
        value, phases = answer(daemon, name)
        assert "zygote.restore" in phases and "zygote.make" not in phases
        seen.append(value)
    for value in seen:
        assert value["answer"] == 7.0
        assert value["same"] == plain["same"] and value["fds"] == plain["fds"]
    for column in zip(*(v["drawn"] for v in seen), strict=True):
        assert len(set(column)) == len(seen)


def test_a_snapshot_of_a_child_needs_no_zygote(daemon: Daemon) -> None:
    deploy(daemon, "warm-up", enable="enable_memory_snapshot=True")
    answer(daemon, "warm-up")
    until(lambda: zygotes(daemon))
    deploy(daemon, "frozen", PROGRAM + "\nopen('/tmp/own', 'w').close()\n", "enable_memory_snapshot=True")
    first, phases = answer(daemon, "frozen")
    assert {"zygote.restore", "criu", "capture"} <= phases and "/tmp/own" in first["same"]["files"]
    daemon.wait_snapshot("frozen")
    for row in zygotes(daemon):
        daemon._client.request("POST", f"/snapshots/{row['id']}/invalidate")  # type: ignore[union-attr]
    assert not zygotes(daemon)
    for container in daemon.get("/containers")["containers"]:
        daemon._client.request("POST", f"/containers/{container['id']}/stop")  # type: ignore[union-attr]
    daemon.wait_idle()
    again, phases = answer(daemon, "frozen")
    assert "zygote.restore" not in phases and "restore" in phases and again == first


def test_whatever_is_wrong_with_a_zygote_the_answer_is_right(daemon: Daemon) -> None:
    deploy(daemon, "damage")
    answer(daemon, "damage")
    zygote = until(lambda: zygotes(daemon))[-1]["id"]
    image = next((daemon.home / "snapshots" / zygote / "img").glob("pages-*.img"))
    data = bytearray(image.read_bytes())
    data[len(data) // 2] ^= 1
    image.write_bytes(data)
    deploy(daemon, "after")
    value, phases = answer(daemon, "after")
    assert value["answer"] == 7.0 and "zygote.restore" in phases and "spawn" in phases
    assert zygote not in [z["id"] for z in zygotes(daemon)]
    assert "was altered; plain start instead" in daemon.log.read_text()


def test_a_program_that_hides_what_a_library_looks_for_starts_plainly(daemon: Daemon) -> None:
    deploy(
        daemon,
        "shadow",
        PROGRAM.replace("import numpy as np", "import numpy as np, numpy.random"),
        secrets="raise RuntimeError('mine')",
    )
    with pytest.raises(Exception, match="mine"):
        answer(daemon, "shadow")
    assert "libraries look for; plain start instead" in daemon.log.read_text()
    deploy(daemon, "known", secrets="raise RuntimeError('this too')")
    with pytest.raises(Exception, match="this too"):
        answer(daemon, "known")


def test_a_failing_import_is_told_as_by_a_plain_start(daemon: Daemon) -> None:
    deploy(
        daemon,
        "failing",
        PROGRAM.replace(
            "import numpy as np",
            "with woodfrog.Image.debian_slim().imports():\n    import numpy as np\n    import numpy.nothing_there",
        ),
    )
    with pytest.raises(Exception, match=r"No module named 'numpy\.nothing_there'"):
        answer(daemon, "failing")
    assert 'File "/app/program.py"' in json.dumps([e["line"] for e in daemon.app_log("failing")]).replace('\\"', '"')


def test_a_short_startup_timeout_is_not_spent_on_our_own_work(daemon: Daemon) -> None:
    deploy(daemon, "hasty", PROGRAM.replace("import numpy as np", "import numpy as np, numpy.ma"), "startup_timeout=5")
    assert answer(daemon, "hasty")[0]["answer"] == 7.0
