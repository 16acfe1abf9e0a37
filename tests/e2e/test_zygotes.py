"""Functions that start from a snapshot of a worker with their heavy imports: as in a plain start, or by one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest

from e2e.harness import Daemon, until

MADE_S = 120
"""A zygote is made when nothing has been starting for a second, at the latest after a minute, and behind all others."""

pytestmark = [pytest.mark.root, pytest.mark.criu]

PROBE = '''
import atexit, asyncio, codecs, gc, json, locale, logging, mimetypes, multiprocessing, os, random, re, resource
import signal, ssl, sys, tempfile, threading, uuid, warnings
import woodfrog
IMPORTS

app = woodfrog.App("NAME")
BEFORE, DRAWN = list(sys.modules), [random.random(), uuid.uuid1().hex, os.urandom(8).hex(), *DRAW]
VERSION = 1


@app.function(ENABLE)
def look():
    """All that a program can see of how it was started, what must be the same apart from what must not."""
    tops = ("/tmp", "/dev/shm", "/var/tmp", os.environ["HOME"])
    files = sorted(os.path.join(at, n) for top in tops for at, _, names in os.walk(top) for n in names)
    held = {f: os.readlink(f"/proc/self/fd/{f}") for f in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{f}")}
    # Newer libffi keeps its own library open, from when ctypes is loaded.
    fds = sorted(re.sub(r"\\d+", "N", target) for n, target in held.items() if int(n) > 2 and "/libffi" not in target)
    status = dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines())
    mine = ("WOODFROG_INSTANCE", "WOODFROG_APP", "MODAL_TASK_ID")
    kinds = lambda items: [re.sub(r" at 0x.*", "", repr(i)) for i in items]
    loggers = {n: kinds(l.handlers) for n, l in sorted(logging.root.manager.loggerDict.items()) if hasattr(l, "handlers")}
    ours = (__name__, "woodfrog", "__mp_main__", *sys.stdlib_module_names)
    return {
        "same": {
            "modules": [m for m in BEFORE if m.partition(".")[0] not in ours], "main": sys.modules["__main__"].__spec__.name, "name": __name__, "file": __file__,
            "stdlib": sorted(m for m in BEFORE if m.partition(".")[0] in sys.stdlib_module_names),
            "argv": sys.argv, "orig_argv": sys.orig_argv, "path": sys.path, "flags": repr(sys.flags), "cwd": os.getcwd(),
            "hooks": kinds([sys.excepthook, sys.displayhook, sys.unraisablehook, threading.excepthook]),
            "finders": kinds(sys.meta_path), "path_hooks": kinds(sys.path_hooks), "recursion": sys.getrecursionlimit(),
            "switch": sys.getswitchinterval(), "trace": [repr(sys.gettrace()), repr(sys.getprofile())],
            "environ": {k: v for k, v in os.environ.items() if k not in mine}, "environb": len(os.environb),
            "pid": [os.getpid(), os.getppid(), os.getpgid(0), os.getsid(0)], "ids": [os.getresuid(), os.getresgid(), os.getgroups()],
            "nice": os.getpriority(os.PRIO_PROCESS, 0), "policy": os.sched_getscheduler(0), "cpus": len(os.sched_getaffinity(0)),
            "limits": {n: resource.getrlimit(getattr(resource, n)) for n in dir(resource) if n.startswith("RLIMIT_")},
            "umask": os.umask(0o22), "files": files, "fds": fds, "stdin": held["0"], "stdout": held["1"], "stderr": held["2"],
            "signals": {s.name: str(signal.getsignal(s)).partition(" at ")[0] for s in signal.Signals},
            "status": {k: status[k] for k in ("SigBlk", "SigIgn", "SigCgt", "NoNewPrivs", "Seccomp", "CapEff", "CapBnd")},
            "threads": sorted(t.name for t in threading.enumerate()), "tasks": len(os.listdir("/proc/self/task")),
            "stack": threading.stack_size(), "locale": locale.setlocale(locale.LC_ALL), "encoding": sys.getfilesystemencoding(),
            "streams": [[s.encoding, s.errors, s.line_buffering, s.isatty()] for s in (sys.stdout, sys.stderr)],
            "warnings": kinds(warnings.filters), "once": sorted(map(str, warnings.onceregistry)),
            "loggers": loggers, "root": [logging.root.level, kinds(logging.root.handlers)], "levels": logging._levelToName.__len__(),
            "start_method": multiprocessing.get_start_method(allow_none=True), "children": len(multiprocessing.active_children()),
            "loop": repr(asyncio.get_event_loop_policy()).partition(" at ")[0], "tempdir": tempfile.gettempdir(),
            "gc": [gc.get_threshold(), gc.isenabled(), gc.get_debug(), kinds(gc.callbacks)], "atexit": atexit._ncallbacks(),
            "codecs": codecs.lookup("utf-8").name, "mimetypes": mimetypes.inited, "ssl": ssl.OPENSSL_VERSION, "version": VERSION,
            "extra": EXTRA,
        },
        "drawn": DRAWN, "hash": hash("woodfrog"),
        "context": woodfrog.restored(),
    }
'''  # noqa: E501
CASES = {
    "stdlib": ("import csv", "[]", "None", ()),
    "arrays": (
        "import numpy as np\nimport pandas as pd\nfrom numpy.polynomial import Polynomial",
        "[float(np.random.rand())]",
        "[np.show_config('dicts')['Python Information'], np.geterr(), repr(np.get_printoptions()), "
        "pd.get_option('display.max_rows'), float(Polynomial([1, 2])(3))]",
        ("numpy", "pandas"),
    ),
    "torch": (
        "import torch\nfrom torch import nn",
        "[float(torch.rand(1))]",
        "[torch.get_num_threads(), torch.get_num_interop_threads(), str(torch.get_default_dtype()), "
        "torch.is_grad_enabled(), torch.backends.mkldnn.enabled, sorted(nn.Linear(2, 2).state_dict()), "
        "torch.multiprocessing.get_sharing_strategy()]",
        ("torch",),
    ),
}
FOR_RENEWAL = {"_ctypes", "ctypes", "ctypes._endian", "sysconfig", "_blake2"}
"""What the worker renews generators with; it has loaded it when it is thawed, and otherwise when it is frozen."""


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with Daemon(WOODFROG_ZYGOTES="1", WOODFROG_ZYGOTE_MIN_MS="0", WOODFROG_KEEP_ZYGOTES="30") as daemon:
        yield daemon


@pytest.fixture(scope="module")
def plain() -> Iterator[Daemon]:
    with Daemon(WOODFROG_ZYGOTES="0") as daemon:
        yield daemon


def probe(imports: str, name: str, *, draw: str = "[]", extra: str = "None", enable: str = "") -> str:
    text = PROBE.replace("IMPORTS", imports).replace("DRAW]", f"{draw}]").replace("EXTRA", extra)
    return text.replace("NAME", name).replace("ENABLE", enable)


def deploy(daemon: Daemon, text: str, **files: str) -> None:
    path = daemon.program(text)
    for file, content in files.items():
        (path.parent / f"{file}.py").write_text(content)
    command = [sys.executable, "-c", "from woodfrog.cli import main; main()", "deploy", str(path)]
    done = subprocess.run(command, env=daemon.env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr


def answer(daemon: Daemon, name: str) -> tuple[dict[str, Any], set[str]]:
    """What the function sees, and the phases of its start."""
    value = daemon.call(name, "look")
    call = next(c for c in daemon.get("/calls")["calls"] if c["app"] == name)
    phases = daemon.get(f"/calls/{call['id']}/trace")["phases"]
    return value, {p["name"] for p in phases}


def zygotes(daemon: Daemon, *modules: str) -> list[dict[str, Any]]:
    """Those that went through all of these."""
    rows = daemon.get("/snapshots")["snapshots"]
    ready = [r for r in rows if r.get("kind") == "zygote" and r["state"] == "ready"]
    return [r for r in ready if {"woodfrog.sdk.app", *modules} <= {m.strip("()") for m in r["modules"]}]


FROZEN = "enable_memory_snapshot=True"


@pytest.mark.parametrize(
    ("case", "enable"),
    [
        ("stdlib", ""),
        ("stdlib", FROZEN),
        ("torch", FROZEN),
        *(pytest.param("arrays", enable, marks=pytest.mark.slow) for enable in ("", FROZEN)),
        pytest.param("torch", "", marks=pytest.mark.slow),
    ],
)
def test_a_program_cannot_tell_how_it_was_started(daemon: Daemon, plain: Daemon, case: str, enable: str) -> None:
    imports, draw, extra, needs = CASES[case]
    for module in needs:
        if find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    name = f"{case}-{'frozen' if enable else 'not'}"
    deploy(plain, probe(imports, name, draw=draw, extra=extra, enable=enable))
    expected, phases = answer(plain, name)
    assert "zygote.restore" not in phases and not zygotes(plain)
    known = len(zygotes(daemon, *needs)) if needs else 0
    deploy(daemon, probe(imports, f"{name}-1", draw=draw, extra=extra, enable=enable))
    first, phases = answer(daemon, f"{name}-1")
    until(lambda: len(zygotes(daemon, *needs)) > known, 120)
    seen = [expected, first]
    for number in (2, 3):
        text = probe(imports, f"{name}-{number}", draw=draw, extra=extra, enable=enable)
        deploy(daemon, text.replace("BEFORE, DRAWN", f"import colorsys\n_ = {number}\nBEFORE, DRAWN"))
        value, phases = answer(daemon, f"{name}-{number}")
        assert "zygote.restore" in phases and "spawn" not in phases, (phases, daemon.app_text(f"{name}-{number}"))
        value["same"]["stdlib"].remove("colorsys")
        seen.append(value)
    early = FOR_RENEWAL - set(expected["same"]["stdlib"])
    for value in seen:
        value["same"]["stdlib"] = [m for m in value["same"]["stdlib"] if m not in early]
        assert set(value["same"]["stdlib"]) ^ set(expected["same"]["stdlib"]) == set()
        for key, wanted in expected["same"].items():
            assert value["same"][key] == wanted, key
        assert value["same"].keys() == expected["same"].keys() and value["context"] == bool(enable)
    for column in zip(*(v["drawn"] for v in seen), strict=True):
        assert len(set(column)) == len(seen)
    assert seen[2]["hash"] == seen[3]["hash"]
    daemon.scale_to_zero()
    plain.scale_to_zero()


def test_one_of_fewer_imports_serves_and_the_rest_is_imported_after(daemon: Daemon) -> None:
    deploy(daemon, probe("import numpy", "less"))
    answer(daemon, "less")
    until(lambda: [z for z in zygotes(daemon, "numpy") if len(z["modules"]) == 2], MADE_S)
    deploy(daemon, probe("import numpy\nimport numpy.ma, numpy.testing", "more", enable="enable_memory_snapshot=True"))
    value, phases = answer(daemon, "more")
    assert {"zygote.restore", "import"} <= phases and "spawn" not in phases
    order = [m for m in value["same"]["modules"] if m in ("numpy", "numpy.ma", "numpy.testing")]
    assert order == ["numpy", "numpy.ma", "numpy.testing"]
    # The page store finds most of its memory where it came from.
    manifest = json.loads((daemon.home / "snapshots" / daemon.wait_snapshot("more") / "manifest.json").read_text())
    parent = next(z for z in daemon.get("/snapshots")["snapshots"] if z["id"] == manifest["parent"])
    assert parent["modules"][0] == "woodfrog.sdk.app" and "numpy.testing" not in parent["modules"]
    until(lambda: zygotes(daemon, "numpy", "numpy.testing"), MADE_S)
    # Others before numpy, and a start begins where it is still as theirs.
    deploy(daemon, probe("import pandas\nimport numpy", "other"))
    if find_spec("pandas"):
        value, phases = answer(daemon, "other")
        assert "zygote.restore" in phases and "numpy.testing" not in value["same"]["modules"]


def test_a_snapshot_of_a_child_needs_no_zygote(daemon: Daemon) -> None:
    deploy(daemon, probe("import numpy", "warm-up"))
    answer(daemon, "warm-up")
    until(lambda: zygotes(daemon, "numpy"), MADE_S)
    deploy(daemon, probe("import numpy\nopen('/tmp/own', 'w').close()", "child", enable="enable_memory_snapshot=True"))
    first, phases = answer(daemon, "child")
    assert {"zygote.restore", "capture"} <= phases, (phases, daemon.log.read_text()[-2000:])
    assert "/tmp/own" in first["same"]["files"]
    daemon.wait_snapshot("child")
    for row in zygotes(daemon):
        daemon._client.request("POST", f"/snapshots/{row['id']}/invalidate")  # type: ignore[union-attr]
    assert not zygotes(daemon)
    daemon.scale_to_zero()
    again, phases = answer(daemon, "child")
    assert "zygote.restore" not in phases and "restore" in phases and again == first


def test_values_of_secrets_are_not_in_its_name_and_a_rotated_one_is_seen(daemon: Daemon) -> None:
    imports = "import numpy, numpy.ctypeslib\nTAKEN = os.environ.get('TOKEN')"
    secret = "secrets=[woodfrog.Secret.from_name('token')]"
    mine = ("numpy", "numpy.ctypeslib")  # others of numpy alone may still be on their way
    for number, (value, made) in enumerate((("hunter2", 1), ("hunter2", 1), ("correct horse", 2))):
        daemon.cli("secret", "create", "token", f"TOKEN={value}")
        deploy(daemon, probe(imports, f"secret-{number}", extra="[TAKEN, os.environ['TOKEN']]", enable=secret))
        answered, _ = answer(daemon, f"secret-{number}")
        assert answered["same"]["extra"] == [value, value]
        until(lambda made=made: len(zygotes(daemon, *mine)) == made, MADE_S)  # type: ignore[misc]
    paths = [daemon.home / "snapshots" / z["id"] / "manifest.json" for z in zygotes(daemon, *mine)]
    keys = {json.loads(path.read_text())["function_key"] for path in paths}
    assert len(keys) > 1 and all(re.fullmatch(r"zygote-[0-9a-f]{32}", key) for key in keys)
    assert (daemon.home / "keys" / "zygotes").stat().st_mode & 0o777 == 0o600


def test_whatever_is_wrong_with_a_zygote_the_answer_is_right(daemon: Daemon) -> None:
    deploy(daemon, probe("import numpy, numpy.f2py", "damage"))
    answer(daemon, "damage")
    zygote = until(lambda: zygotes(daemon, "numpy", "numpy.f2py"), MADE_S)[-1]["id"]
    images = daemon.home / "snapshots" / zygote
    image = next(p for p in images.glob("img*/core-*.img"))
    data = bytearray(image.read_bytes())
    data[len(data) // 2] ^= 1
    image.write_bytes(data)
    deploy(daemon, probe("import numpy, numpy.f2py, numpy.ma", "after"))
    value, phases = answer(daemon, "after")
    assert "zygote.restore" in phases and "spawn" in phases and "numpy.ma" in value["same"]["modules"]
    assert zygote not in [z["id"] for z in zygotes(daemon)]
    assert "was altered; plain start instead" in daemon.log.read_text()


def test_a_program_that_hides_what_a_library_looks_for_starts_plainly(daemon: Daemon) -> None:
    deploy(daemon, probe("import numpy, numpy.random", "open"))
    answer(daemon, "open")
    until(lambda: zygotes(daemon, "numpy", "numpy.random"), MADE_S)
    deploy(daemon, probe("import numpy, numpy.random", "shadow"), secrets="raise RuntimeError('mine')")
    with pytest.raises(Exception, match="mine"):
        answer(daemon, "shadow")


def test_a_failing_import_is_told_as_by_a_plain_start(daemon: Daemon) -> None:
    text = "with woodfrog.Image.debian_slim().imports():\n    import numpy as np\n    import numpy.nothing_there"
    deploy(daemon, probe(text, "failing"))
    with pytest.raises(Exception, match=r"No module named 'numpy\.nothing_there'"):
        answer(daemon, "failing")
    assert 'File "/app/program.py"' in json.dumps([e["line"] for e in daemon.app_log("failing")]).replace('\\"', '"')


def test_what_imports_print_is_in_every_log(daemon: Daemon) -> None:
    """Numpy prints nothing; a library that does is told by what stands in the log of its start."""
    deploy(daemon, probe("import this", "zen"))  # of the standard library, and so no part of a zygote
    answer(daemon, "zen")
    assert "Beautiful is better than ugly." in daemon.app_text("zen")


def test_a_short_startup_timeout_is_one_for_the_whole_start(daemon: Daemon) -> None:
    text = probe("import numpy, time\ntime.sleep(0 if 'slow' not in '{}' else 30)", "{}", enable="startup_timeout=4")
    deploy(daemon, text.replace("{}", "hasty"))
    answer(daemon, "hasty")
    until(lambda: zygotes(daemon, "numpy"), MADE_S)
    deploy(daemon, text.replace("{}", "slow"))
    with pytest.raises(Exception, match="not ready after 4 s"):
        answer(daemon, "slow")


def test_a_daemon_that_stops_does_not_wait_for_what_it_makes() -> None:
    with Daemon(WOODFROG_ZYGOTES="1", WOODFROG_ZYGOTE_MIN_MS="0") as daemon:
        deploy(daemon, probe("import numpy", "leaving"))
        answer(daemon, "leaving")
        until(lambda: len(list((daemon.home / "snapshots").glob(".staging-z-*"))) or zygotes(daemon), 60, 0.005)
        daemon.stop()
        assert not list((daemon.home / "snapshots").glob(".staging-*"))
        assert not daemon.leaks() and os.path.isdir(daemon.home / "snapshots")
