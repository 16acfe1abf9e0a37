"""The commands against a daemon that answers from a table, over a real Unix socket."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fake_daemon import HEALTH, Answer, Daemon, Request, private_home, serving
from woodfrog.cli import commands
from woodfrog.cli.call import parse_value, payload_from
from woodfrog.errors import OutOfMemoryError, SpecError, StartupError
from woodfrog.protocol import pack_items
from woodfrog.sdk.payload import dumps_parameters


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with private_home(monkeypatch) as path:
        yield path


@pytest.fixture
def daemon(home: Path) -> Iterator[Daemon]:
    with serving(home) as fake:
        yield fake


def run(*argv: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(commands.app, list(argv), input=stdin)


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (
            ["deploy", "--strategy", "foo", "x.py"],
            "--strategy: 'foo' is not one of 'rolling', 'recreate' (see `woodfrog deploy --help`)",
        ),
        (["deploy", "--nope", "x"], "no such option: --nope; did you mean --name? (see `woodfrog deploy --help`)"),
        (["deploy", "a", "b"], "got unexpected extra argument(s) (b) (see `woodfrog deploy --help`)"),
        (["app", "calls", "x", "-n", "q"], "--limit / -n: "),
        (["deploy", "--name"], "option '--name' requires an argument"),
        (["app", "logs"], "missing argument 'APP' (see `woodfrog app logs --help`)"),
        (["nope"], "no such command 'nope' (see `woodfrog --help`)"),
        (["--nope"], "no such option: --nope (see `woodfrog --help`)"),
    ],
)
def test_what_is_wrong_with_a_command_line_is_one_line(argv: list[str], line: str) -> None:
    shown = CliRunner().invoke(commands.app, argv, prog_name="woodfrog")
    assert shown.exit_code == 2 and shown.stdout == ""
    assert shown.stderr.startswith(f"error: {line}") and shown.stderr.count("\n") == 1
    assert "Input" not in shown.stderr and "Value error" not in shown.stderr


@pytest.mark.parametrize("argv", [["--help"], ["deploy", "--help"]])
def test_help_that_nobody_reads(argv: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", "from woodfrog.cli import main; main()", *argv], stdout=write)
    os.close(write)
    assert done.returncode == 141


def result_of(call_id_of: Callable[[Request], str], body: Any, status: str = "success") -> Callable[[Request], Answer]:
    def answer(request: Request) -> Answer:
        headers = {"Woodfrog-Call": call_id_of(request), "Woodfrog-Status": status}
        return Answer(body, 202 if status == "pending" else 200, headers)

    return answer


def called(body: Any = None, status: str = "success") -> Callable[[Request], Answer]:
    return result_of(lambda r: r.headers.get("woodfrog-call", ""), body, status)


def serve_function(daemon: Daemon, *, generator: bool = False) -> None:
    method = {"name": "square", "generator": generator, "is_async": False}
    function = {"tag": "square", "methods": [method], "key": "k", "capture": {"pending": True}}
    daemon.routes["GET /apps/demo"] = {"app": "demo", "functions": [function]}


# --- apps, containers, snapshots -------------------------------------------------------------------------------------

APP: dict[str, Any] = {
    "calls": {"running": 1, "waiting": 2, "oldest_waiting_s": 90.0},
    "starts": {"thawed": 10, "woken": 2, "zygote": 1, "cold": 2, "failed": 1},
    "app": "demo",
    "version": 3,
    "ephemeral": False,
    "deployed": time.time() - 7300,
    "description": "",
    "functions": ["square", "Embedder"],
    "containers": 2,
}


PHASES = [
    {"name": "queue", "start_ms": 0.0, "ms": 50.0, "parent": None},
    {"name": "criu", "start_ms": 5.0, "ms": 30.0, "parent": "queue"},
]


def test_app_list(daemon: Daemon) -> None:
    last = {"at": time.time() - 300, "function": "square", "message": "OSError: " + "x" * 80}
    app = APP | {"deployed": time.time() - 7300, "last_error": last}
    daemon.routes["GET /apps"] = {"apps": [app]}
    shown = run("app", "list")
    assert shown.exit_code == 0
    cells = re.split("  +", shown.stdout.splitlines()[1])
    assert cells == [
        *("demo", "deployed", "3", "2", "1", "2 (90.0 s)", "12 thawed, 3 cold, 1 failed"),
        "5 min ago: square: OSError: " + "x" * 42 + "…",
        *("2 h ago", "square, Embedder"),
    ]
    assert json.loads(run("app", "list", "--json").stdout) == [app]
    daemon.routes["GET /apps"] = {"apps": [app | {"left_out": [{"tag": "web", "why": "so"}]}]}
    assert run("app", "list").stdout.splitlines()[1].endswith("square, Embedder, web (left out)")
    daemon.routes["GET /apps"] = {"apps": []}
    assert (run("app", "list").stdout, run("app", "list").stderr) == ("", "no apps\n")
    assert run("app", "list", "--json").stdout == "[]\n"


def test_app_inspect_says_how_the_next_start_will_go(daemon: Daemon) -> None:
    busy = {"running": 1, "waiting": 2, "oldest_waiting_s": 4.0}
    states = {
        "off": "cold: it has no enable_memory_snapshot=True",
        "none": "cold, and makes a snapshot: it has none that fits yet",
        "available": "thaws s-1, s-2",
        "capturing": "cold: its snapshot is being made",
        "failed": "cold, and makes a snapshot; the last attempt failed: io_uring",
        "gave-up": "cold: its snapshots failed too often: io_uring; `woodfrog snapshot create demo.gave-up` tries "
        "again",
    }
    functions = [
        {
            **{"tag": s, "kind": "function", "containers": 1, "calls": busy},
            "snapshots": {"state": s, "snapshots": ["s-1", "s-2"], "reason": "io_uring"},
        }
        for s in states
    ]
    found = APP | {"functions": functions, "last_error": None}
    daemon.routes["GET /apps/demo"] = found
    shown = run("app", "inspect", "demo").stdout
    assert "last error    none" in shown and "12 thawed, 3 cold, 1 failed" in shown
    rows = [re.split("  +", line) for line in shown.splitlines()[-len(states) :]]
    assert rows == [[s, "function", "1", "1", "2 (4.0 s)", words] for s, words in states.items()]
    daemon.routes["GET /apps/demo"] = found | {"last_error": {"at": 1.0, "function": "f", "message": "OSError: no"}}
    assert "d ago: f: OSError: no" in run("app", "inspect", "demo").stdout
    assert json.loads(run("app", "inspect", "demo", "--json").stdout)["starts"] == APP["starts"]
    daemon.routes["GET /apps/demo"] = found | {"left_out": [{"tag": "nightly", "why": "schedule= (a.py:3)"}]}
    assert "nightly is left out: schedule= (a.py:3)\n" in run("app", "inspect", "demo").stderr


def test_app_starts_says_why_each_was_cold(daemon: Daemon) -> None:
    row = {"at": time.time() - 30, "app": "demo", "version": 2, "function": "f", "instance": "i-1", "ms": 640.0}
    row |= {
        "kind": "cold",
        "result": "ready",
        "why": "none-fits",
        "words": "app.py changed",
        "snapshot": "",
        "error": "",
    }
    starts = [
        row,
        {**row, "kind": "zygote", "words": "it had no snapshot yet"},
        {**row, "kind": "thawed", "words": "", "snapshot": "s-1", "ms": 40.0},
        {**row, "result": "failed", "error": "f: enter failed: OSError: no"},
    ]
    daemon.routes["GET /apps/demo/starts"] = {"starts": starts}
    lines = run("app", "starts", "demo", "-n", "4").stdout.splitlines()
    assert [re.split("  +", line)[4:] for line in lines[1:]] == [
        ["cold", "640 ms", "app.py changed"],
        ["cold (zygote)", "640 ms", "it had no snapshot yet"],
        ["thawed", "40 ms", "s-1"],
        ["failed", "640 ms", "f: enter failed: OSError: no"],
    ]
    assert daemon.seen("GET /apps/demo/starts")[0].query == "limit=4"
    assert json.loads(run("app", "starts", "demo", "--json").stdout) == starts


def test_the_last_lines_of_a_log(daemon: Daemon) -> None:
    daemon.routes["GET /apps/demo/logs"] = daemon.routes["GET /containers/i1/logs"] = Answer(b"")
    chosen = ["--function", "f", "--container", "i-1", "--call", "c9"]
    done = run("app", "logs", "demo", "-n", "20", *chosen)
    assert done.exit_code == 0
    assert done.stderr == "the log of demo has no line of --function f, --container i-1, --call c9\n"
    assert daemon.seen("GET /apps/demo/logs")[-1].query == "last=20&function=f&container=i-1&call=c9"
    assert run("container", "logs", "i1", "-n", "0", "-f").exit_code == 0
    assert daemon.seen("GET /containers/i1/logs")[-1].query == "follow=1&last=0"
    assert run("app", "logs", "demo", "-n", "-1").exit_code == 2


def test_app_history_is_newest_first(daemon: Daemon) -> None:
    versions = [{"version": v, "deployed": 1.0, "stopped": None, "active": v == 2, "functions": ["f"]} for v in (1, 2)]
    daemon.routes["GET /apps/demo/history"] = {"app": "demo", "versions": versions}
    lines = run("app", "history", "demo").stdout.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["2", "active"], ["1", "replaced"]]


def test_app_stop_and_an_unknown_app(daemon: Daemon) -> None:
    daemon.routes["POST /apps/demo/stop"] = {"app": "demo", "stopped": True}
    assert run("app", "stop", "demo").exit_code == 0
    unknown = run("app", "stop", "de/mo")
    assert unknown.exit_code == 2
    assert unknown.stderr == "error: nothing at /apps/de%2Fmo/stop\n"
    assert unknown.stdout == ""


LINES = [
    {"t": 1.0, "instance": "i1", "function": "square", "stream": "stdout", "line": "out", "call": "c"},
    {"t": 2.0, "instance": "i1", "function": "square", "stream": "stderr", "line": "err", "call": "c"},
    {"t": 3.0, "instance": "i1", "function": "square", "stream": "system", "line": "thawed in 40 ms", "call": None},
]


def test_logs_go_where_they_were_written(daemon: Daemon) -> None:
    body = "".join(json.dumps(line) + "\n" for line in LINES).encode()
    daemon.routes["GET /apps/demo/logs"] = daemon.routes["GET /containers/i1/logs"] = Answer(body)
    for argv in (["app", "logs", "demo", "--since", "1h"], ["container", "logs", "i1", "-f"]):
        shown = run(*argv)
        assert shown.stdout == "out\n"
        assert shown.stderr == "err\n· square i1: thawed in 40 ms\n"
    assert re.fullmatch(r"since=\d+(\.\d+)?", daemon.seen("GET /apps/demo/logs")[0].query)
    assert daemon.seen("GET /containers/i1/logs")[0].query == "follow=1"
    shown = run("app", "logs", "demo", "--json")
    assert [json.loads(line) for line in shown.stdout.splitlines()] == LINES
    assert run("app", "logs", "demo", "--since", "soon").exit_code == 2
    for argv in (["app", "logs", "demo", "-t"], ["container", "logs", "i1", "--timestamps"]):
        shown = run(*argv)
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:01\.000 square i1: out\n", shown.stdout)
        assert shown.stderr.splitlines()[1].endswith(":03.000 square i1: · thawed in 40 ms")


def test_app_calls(daemon: Daemon) -> None:
    now = time.time()
    calls = [
        {
            "id": "c2",
            "function": "square",
            "status": "running",
            "version": 2,
            "submitted": now - 300,
            "finished": None,
            "error": None,
        },
        {"id": "c1", "function": "M.run", "status": "success", "version": 1, "submitted": 5.0, "finished": 5.25},
        {"id": "c0", "function": "f", "status": "exception", "version": 1, "submitted": 5.0, "finished": 6.0},
        {"id": "c9", "function": "f", "status": "failure", "version": 1, "submitted": 5.0, "finished": 6.0},
    ]
    calls[2]["error"] = {"type": "OSError", "message": "no\nroom", "traceback": "…"}
    calls[3]["error"] = {"type": "FunctionTimeoutError", "code": "timeout", "message": "f: ran past its timeout"}
    daemon.routes["GET /apps/demo/calls"] = {"calls": calls}
    lines = [re.split("  +", line.strip()) for line in run("app", "calls", "demo", "-n", "2").stdout.splitlines()]
    assert lines[1] == ["c2", "square", "running", "2", "5 min ago", "5.0 min"]
    assert lines[2][:4] == ["c1", "M.run", "success", "1"] and lines[2][-1] == "250 ms"
    assert lines[3][-1] == "OSError: no room" and lines[4][-1] == "f: ran past its timeout"
    assert run("app", "calls", "demo", "--failed").exit_code == 0
    assert [r.query for r in daemon.seen("GET /apps/demo/calls")] == ["limit=2", "limit=50&failed=1"]
    assert json.loads(run("app", "calls", "demo", "--json").stdout) == calls


def test_what_became_of_a_call(daemon: Daemon) -> None:
    answer: dict[str, Any] = {
        **{"call": "c1", "app": "demo", "function": "M.run", "status": "exception", "stage": None, "instance": "i-1"},
        **{"start": "restore", "submitted": time.time() - 30, "phases": PHASES},
        "error": {"type": "OSError", "message": "no", "traceback": "Traceback:\n  line 3\x1b[2J\nOSError: no\n"},
    }
    daemon.routes["GET /calls/c1/trace"] = answer
    shown = run("app", "trace", "c1")
    lines = shown.stdout.splitlines()
    assert [re.split("  +", line)[1] for line in lines[:3]] == ["c1", "demo.M.run", "exception"]
    assert [re.split("  +", line)[1] for line in lines[4:7]] == ["i-1", "thawed", "OSError: no"]
    assert any("criu" in line and " ms " in line for line in lines)
    assert lines[-3:] == ["Traceback:", "  line 3\\x1b[2J", "OSError: no"]
    assert shown.stderr == "what it printed: woodfrog app logs demo --call c1\n"
    assert json.loads(run("app", "trace", "c1", "--json").stdout) == answer
    daemon.routes["GET /calls/c1/trace"] = {**answer, "status": "pending", "stage": "capturing", "error": None}
    assert "pending, capturing a snapshot\n" in run("app", "trace", "c1").stdout
    assert run("app", "trace", "c2").exit_code == 2


def test_who_follows_a_log_goes_on_with_the_next_daemon(daemon: Daemon) -> None:
    def answer(lines: list[dict[str, Any]], breaks_off: bool = False) -> Answer:
        body = "".join(json.dumps({**line, "n": n}) + "\n" for n, line in enumerate(lines, 4)).encode()
        return Answer(body, breaks_off=breaks_off)

    daemon.routes["GET /apps/demo/logs"] = [answer(LINES[:1], breaks_off=True), answer([], breaks_off=True), answer([])]
    assert run("app", "logs", "demo", "-f", "--since", "5").stdout == "out\n"
    queries = [r.query for r in daemon.seen("GET /apps/demo/logs")]
    assert queries == ["follow=1&since=5.0", *["follow=1&since=5.0&after=4"] * 2]
    assert len(daemon.seen("GET /health")) == 3, "it waits for a daemon, and one is started where none is"
    daemon.routes["GET /apps/demo/logs"] = daemon.routes["GET /containers/i1/logs"] = answer(LINES[:1], breaks_off=True)
    for argv in (["app", "logs", "demo"], ["container", "logs", "i1", "-f"]):
        shown = run(*argv)
        assert (shown.exit_code, shown.stdout) == (3, "out\n") and "went away in the middle" in shown.stderr


CONTAINER = {
    "id": "i1",
    "app": "demo",
    "function": "square",
    "mode": "restore",
    "stage": "ready",
    "started": time.time(),
    "memory_bytes": 5 << 20,
    "call": None,
    "served": 4,
}


def test_container_list_and_inspect(daemon: Daemon) -> None:
    daemon.routes["GET /containers"] = {
        "containers": [CONTAINER, {**CONTAINER, "id": "i2", "app": "other", "call": "c"}]
    }
    lines = run("container", "list").stdout.splitlines()
    assert lines[1].split()[:6] == ["i1", "demo", "square", "ready", "thawed", "4"]
    assert "busy" in lines[2]
    only = json.loads(run("container", "list", "--app", "other", "--json").stdout)
    assert [c["id"] for c in only] == ["i2"]
    phases = [{"name": "restore", "start_ms": 0, "ms": 40.25, "parent": None}]
    daemon.routes["GET /containers/i1"] = {**CONTAINER, "phases": phases}
    shown = run("container", "inspect", "i1").stdout
    assert re.search(r"^served +4$", shown, re.MULTILINE)
    assert re.search(r"^restore +40\.\d ms", shown, re.MULTILINE)
    assert json.loads(run("container", "inspect", "i1", "--json").stdout)["phases"] == phases


@pytest.mark.parametrize(("code", "status"), [(0, 0), (3, 3), (-9, 137)])
def test_container_exec_passes_everything_on(daemon: Daemon, code: int, status: int) -> None:
    daemon.routes["POST /containers/i1/exec"] = {"exit_code": code, "stdout": "o", "stderr": "e"}
    shown = run("container", "exec", "--timeout", "5", "i1", "--", "ls", "--all", "-l")
    assert (shown.exit_code, shown.stdout, shown.stderr) == (status, "o", "e")
    sent = daemon.seen("POST /containers/i1/exec")[0].json()
    assert sent == {"argv": ["ls", "--all", "-l"], "timeout": 5.0}


SNAPSHOT = {
    "id": "s1",
    "app": "demo",
    "function": "square",
    "state": "ready",
    "why": None,
    "created": time.time(),
    "memory_bytes": 46 << 20,
    "files_bytes": 2048,
    "function_key": "k",
}


def test_snapshot_list_and_inspect(daemon: Daemon) -> None:
    damaged = {"id": "s2", "state": "damaged", "why": "img/pages-1.img is altered"}
    daemon.routes["GET /snapshots"] = {"snapshots": [SNAPSHOT, damaged]}
    lines = run("snapshot", "list").stdout.splitlines()
    assert lines[1].split()[:8] == ["s1", "demo", "square", "ready", "46.0", "MiB", "2.0", "KiB"]
    assert lines[2].split()[:2] == ["s2", "damaged"] and lines[2].endswith("img/pages-1.img is altered")
    daemon.routes["GET /snapshots/s1"] = {
        **SNAPSHOT,
        "phases": [{"name": "dump", "ms": "12.5"}],
        "log": {"dump.log": "one\ntwo"},
    }
    assert re.search(r"^dump +12\.5 ms", run("snapshot", "inspect", "s1").stdout, re.MULTILINE)
    shown = run("snapshot", "inspect", "s1", "--log")
    assert (shown.stdout, shown.stderr) == ("one\ntwo\n", "== dump.log\n")
    assert daemon.seen("GET /snapshots/s1")[-1].query == "log=1"


def test_snapshot_create_waits_until_it_is_there(daemon: Daemon) -> None:
    serve_function(daemon)
    other = {**SNAPSHOT, "id": "s0", "function_key": "another"}
    daemon.routes["GET /snapshots"] = [{"snapshots": [other]}, {"snapshots": [other]}, {"snapshots": [other, SNAPSHOT]}]
    daemon.routes["GET /containers"] = {"containers": [{**CONTAINER, "stage": "capturing"}]}
    daemon.routes["POST /snapshots/create"] = {"requested": True}
    shown = run("snapshot", "create", "demo.square")
    assert (shown.exit_code, shown.stdout, shown.stderr) == (0, "s1\n", "demo.square: capturing a snapshot\n")
    assert daemon.seen("POST /snapshots/create")[0].json() == {"app": "demo", "tag": "square"}
    assert "has no function 'cube'; it has: square" in run("snapshot", "create", "demo.cube").stderr


def test_snapshot_create_that_fails_says_why_and_where_to_look(daemon: Daemon) -> None:
    serve_function(daemon)
    daemon.routes["GET /apps/demo"]["functions"][0]["capture"] = {"pending": False, "reason": "the disk is full"}
    daemon.routes["GET /snapshots"] = {"snapshots": []}
    daemon.routes["GET /containers"] = {"containers": [CONTAINER]}
    daemon.routes["POST /snapshots/create"] = {"requested": True}
    shown = run("snapshot", "create", "demo.square")
    assert shown.exit_code == 2
    told = "error: demo.square was not captured: the disk is full; see `woodfrog app logs demo`\n"
    assert shown.stderr == told


def test_snapshot_create_waits_for_what_is_stored_after_its_container_is_gone(daemon: Daemon) -> None:
    serve_function(daemon)
    daemon.routes["GET /snapshots"] = [{"snapshots": []}, {"snapshots": []}, {"snapshots": [SNAPSHOT]}]
    daemon.routes["GET /containers"] = {"containers": []}
    daemon.routes["POST /snapshots/create"] = {"requested": True}
    assert run("snapshot", "create", "demo.square").stdout == "s1\n"


def test_app_rollback(daemon: Daemon) -> None:
    daemon.routes["POST /apps/demo/rollback"] = {"app": "demo", "version": 4, "rollback": 2}
    shown = run("app", "rollback", "demo")
    assert (shown.exit_code, shown.stderr) == (0, "deployed demo, version 4: version 2 again\n")
    assert run("app", "rollback", "demo", "v2").exit_code == 0
    assert [r.json() for r in daemon.seen("POST /apps/demo/rollback")] == [{"version": None}, {"version": 2}]
    assert "is no version" in run("app", "rollback", "demo", "last").stderr


# --- call ------------------------------------------------------------------------------------------------------------


def test_call_with_arguments_of_each_form(daemon: Daemon) -> None:
    serve_function(daemon)
    daemon.routes["POST /apps/demo/calls/square"] = called({"y": [1, "ü"]})
    for argv, stdin, sent in (
        (["--arg", "[3, 4]"], None, [3, 4]),
        (["--arg", '"text"'], None, "text"),
        (["x=3", "name=Ann", "flag=true", "t=1=2"], None, {"x": 3, "name": "Ann", "flag": True, "t": "1=2"}),
        ([], '{"x": 3}', {"x": 3}),
        ([], "", []),
    ):
        shown = run("call", "demo.square", *argv, stdin=stdin)
        assert (shown.exit_code, shown.stdout) == (0, '{"y": [1, "ü"]}\n'), shown.output
        request = daemon.seen("POST /apps/demo/calls/square")[-1]
        assert request.json() == sent
        assert request.headers["woodfrog-encoding"] == "json"


def test_parameters_of_a_class_in_a_call(daemon: Daemon) -> None:
    method = {"name": "run", "generator": False, "is_async": False}
    parameters = {"name": "str", "size": "int = 3", "rate": "float = inf", "fast": "bool = False"}
    model = {"tag": "Model", "methods": [method], "key": "k", "parameters": parameters}
    daemon.routes["GET /apps/demo"] = {"app": "demo", "functions": [model]}
    daemon.routes["GET /apps"] = {"apps": [APP]}
    daemon.routes["POST /apps/demo/calls/Model.run"] = called("done")
    for argv, sent, params in (
        (["name=3", "size=3", "prompt=b"], {"prompt": "b"}, {"name": "3"}),
        (["name=a", "rate=2", "fast=true", "--arg", '["b"]'], ["b"], {"name": "a", "rate": 2.0, "fast": True}),
    ):
        shown = run("call", "demo.Model.run", *argv)
        assert (shown.exit_code, shown.stdout) == (0, '"done"\n'), shown.output
        request = daemon.seen("POST /apps/demo/calls/Model.run")[-1]
        assert request.json() == sent
        # As the SDK sends them: both share containers and snapshots.
        assert base64.b64decode(request.headers["woodfrog-params"]) == dumps_parameters((), params, "")
    for argv, message in (
        (["prompt=b"], "Model needs name: woodfrog call demo.Model.run name=..."),
        (["name=a", "size=x"], "'size=x': the parameter size is of type int"),
        (["name=a", "fast=1"], "'fast=1': the parameter fast is of type bool"),
    ):
        shown = run("call", "demo.Model.run", *argv)
        assert (shown.exit_code, shown.stderr) == (2, f"error: {message}\n")


def test_arguments_that_cannot_be_meant() -> None:
    for arg, pairs, stdin, message in (
        ("{", [], "", r"--arg is not JSON: .*needs its quotes"),
        (None, [], "nope", "standard input is not JSON"),
        ("1", ["x=1"], "", "not both"),
        (None, ["x"], "", "'x' is not of the form key=value"),
        (None, ["1x=2"], "", "not of the form"),
    ):
        with pytest.raises(SpecError, match=message):
            payload_from(arg, pairs, lambda stdin=stdin: stdin)
    assert [parse_value(v) for v in ("3", "x", "null", '"3"')] == [3, "x", None, "3"]


def test_a_users_exception_is_shown_with_its_remote_traceback(daemon: Daemon) -> None:
    serve_function(daemon)
    error = {"type": "ValueError", "message": "no", "traceback": "Traceback (remote):\n  line\nValueError: no\n"}
    daemon.routes["POST /apps/demo/calls/square"] = called({"error": error}, "exception")
    shown = run("call", "demo.square", "x=1")
    assert shown.exit_code == 1
    assert (shown.stdout, shown.stderr) == ("", "Traceback (remote):\n  line\nValueError: no\n")


def test_our_failure_is_one_line(daemon: Daemon) -> None:
    serve_function(daemon)
    error = OutOfMemoryError("square: the container hit its memory limit of 64 MiB")
    daemon.routes["POST /apps/demo/calls/square"] = called({"error": error.to_dict()}, "failure")
    shown = run("call", "demo.square", "x=1")
    assert shown.exit_code == 2
    assert shown.stderr == "error: square: the container hit its memory limit of 64 MiB\n"


def test_a_failed_start_shows_the_program_s_traceback(daemon: Daemon) -> None:
    serve_function(daemon)
    error = StartupError("square: enter failed: OSError: no", traceback="Traceback:\n  line\nOSError: no\n")
    daemon.routes["POST /apps/demo/calls/square"] = called({"error": error.to_dict()}, "failure")
    shown = run("call", "demo.square", "x=1")
    assert shown.exit_code == 2
    assert shown.stderr == "Traceback:\n  line\nOSError: no\nerror: square: enter failed: OSError: no\n"


def test_a_slow_call_says_what_it_waits_for_and_where_its_time_went(daemon: Daemon) -> None:
    serve_function(daemon)
    daemon.routes["POST /apps/demo/calls/square"] = called(b"", "pending")
    phases = [
        {"name": "queue", "start_ms": 0, "ms": 900, "parent": None},
        {"name": "restore", "start_ms": 5, "ms": 40, "parent": "queue"},
        {"name": "run", "start_ms": 900, "ms": 100, "parent": None},
    ]
    stages: Iterator[str | None] = iter(["queued", "capturing", "capturing", None])

    def polled(request: Request) -> Answer:
        call_id = request.path.rpartition("/")[2]
        last = len(daemon.seen(f"GET /calls/{call_id}")) == 4
        return result_of(lambda r: call_id, 9 if last else b"", "success" if last else "pending")(request)

    def answer(request: Request) -> Answer:
        daemon.requests.append(request)
        if request.path.endswith("/trace"):
            return Answer({"stage": next(stages, None), "phases": phases})
        if request.path.startswith("/calls/"):
            return polled(request)
        daemon.requests.pop()
        return Daemon.answer(daemon, request)

    daemon.answer = answer  # type: ignore[method-assign]
    shown = run("call", "demo.square", "--arg", "3", "--trace")
    assert (shown.exit_code, shown.stdout) == (0, "9\n")
    lines = shown.stderr.splitlines()
    assert lines[:3] == ["waiting for a container", "capturing a snapshot", "running"]
    assert lines[3].startswith("queue ") and "900.0 ms" in lines[3]
    assert lines[4].startswith("  restore ") and lines[5].startswith("run ")
    machine = json.loads(run("call", "demo.square", "--arg", "3", "--json").stdout)
    assert set(machine) == {"call", "result", "phases"}
    assert machine["phases"] == phases


def test_a_generators_items_are_lines(daemon: Daemon) -> None:
    serve_function(daemon, generator=True)
    daemon.routes["POST /apps/demo/calls/square"] = called(b"", "pending")
    plain = Daemon.answer

    def answer(request: Request) -> Answer:
        if request.path.endswith("/items"):
            after = int(re.search(r"after=(\d+)", request.query).group(1))  # type: ignore[union-attr]
            parts = [[(b"i", b"1"), (b"i", b'"two"')], [(b"i", b"null"), (b"d", b"")]]
            return Answer(pack_items(parts[0] if after == 0 else parts[1]))
        if request.path.endswith("/trace"):
            return Answer({"phases": []})
        return plain(daemon, request)

    daemon.answer = answer  # type: ignore[method-assign]
    shown = run("call", "demo.square")
    assert (shown.exit_code, shown.stdout) == (0, '1\n"two"\nnull\n')
    assert json.loads(run("call", "demo.square", "--json").stdout)["result"] == [1, "two", None]


def test_ctrl_c_cancels_the_call(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_function(daemon)
    daemon.routes["POST /apps/demo/calls/square"] = called(b"", "pending")

    def interrupted(self: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("woodfrog.cli.call._Run._stage", interrupted)
    plain = Daemon.answer

    def answer(request: Request) -> Answer:
        if request.path.endswith("/cancel"):
            daemon.requests.append(request)
            return Answer({"finished": None})
        return plain(daemon, request)

    daemon.answer = answer  # type: ignore[method-assign]
    shown = run("call", "demo.square")
    assert shown.exit_code == 130
    call_id = daemon.seen("POST /apps/demo/calls/square")[0].headers["woodfrog-call"]
    assert [r.path for r in daemon.requests if r.path.endswith("/cancel")] == [f"/calls/{call_id}/cancel"]
    assert shown.stderr == f"cancelled call {call_id}\ninterrupted\n"


def test_targets(daemon: Daemon) -> None:
    daemon.routes["GET /apps"] = {"apps": [APP, {**APP, "app": "my.app"}]}
    for target, path in (
        ("demo.Embedder.run", "/apps/demo/calls/Embedder.run"),
        ("my.app.square", "/apps/my.app/calls/square"),
        ("my.app::Embedder.run", "/apps/my.app/calls/Embedder.run"),
    ):
        name, _, tag = path.removeprefix("/apps/").partition("/calls/")
        daemon.routes[f"GET /apps/{name}"] = {"functions": []}
        daemon.routes[f"POST {path}"] = called(1)
        assert run("call", target).exit_code == 0, (target, tag)
        assert daemon.seen(f"POST {path}")
    for wrong in ("square", ".square", "demo."):
        shown = run("call", wrong)
        assert shown.exit_code == 2
        assert "write APP.FUNC or APP.CLASS.METHOD" in shown.stderr


def test_secret_delete_says_who_names_it_and_asks(daemon: Daemon) -> None:
    daemon.routes["GET /secrets"] = {"secrets": ["db"]}
    daemon.routes["GET /secrets/db/functions"] = {"functions": ["demo.square"]}
    daemon.routes["DELETE /secrets/db"] = {"name": "db", "deleted": True}
    asked = run("secret", "delete", "db", stdin="n\n")
    assert asked.exit_code == 1 and "named by demo.square" in asked.stderr and "Remove secret db?" in asked.stderr
    assert not daemon.seen("DELETE /secrets/db")
    assert "no secret 'other'" in run("secret", "delete", "other").stderr
    assert run("secret", "delete", "db", "--yes").stderr == "removed secret db\n"
    assert daemon.seen("DELETE /secrets/db")[0].query == "force=1"
    assert run("secret", "delete", "other", "-y", "--allow-missing").stderr == "no secret other\n"


# --- the daemon ------------------------------------------------------------------------------------------------------


def test_status_of_a_running_and_of_no_daemon(daemon: Daemon, home: Path) -> None:
    shown = run("daemon", "status", "--json")
    assert (shown.exit_code, json.loads(shown.stdout)) == (0, {"running": True, **HEALTH})
    assert "already running: pid" in run("daemon", "start").stderr


def test_without_a_daemon(home: Path) -> None:
    shown = run("daemon", "status")
    assert shown.exit_code == 3
    assert f"the daemon is not running (state directory {home})" in shown.stderr
    assert json.loads(run("daemon", "status", "--json").stdout) == {"running": False}
    assert run("daemon", "stop").exit_code == 0
    logs = run("daemon", "logs")
    assert logs.exit_code == 3
    assert logs.stderr.startswith(f"error: no log at {home}/daemon.log")


def test_stop_waits_until_the_daemon_has_ended(daemon: Daemon) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    daemon.routes["GET /health"] = {**HEALTH, "pid": process.pid}

    def shutdown(request: Request) -> Answer:
        threading.Timer(0.2, process.kill).start()
        return Answer({"stopping": True})

    daemon.routes["POST /shutdown"] = shutdown
    try:
        shown = run("daemon", "stop", "--json")
        assert json.loads(shown.stdout) == {"running": False, "stopped": True, "pid": process.pid}
        daemon.routes["GET /health"] = {**HEALTH, "pid": os.getpid()}
        daemon.routes["POST /shutdown"] = {"stopping": True}
        stuck = run("daemon", "stop", "--timeout", "0.1")
        assert stuck.exit_code == 3
        assert "has not ended within" in stuck.stderr
    finally:
        process.kill()
        process.wait()


def test_restart_ends_one_of_any_version_and_goes_on_with_another(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    daemon.routes["GET /health"] = {**HEALTH, "pid": process.pid, "protocol": 99}

    def shutdown(request: Request) -> Answer:
        process.kill()
        daemon.routes["GET /health"] = HEALTH
        return Answer({"stopping": True})

    daemon.routes["POST /shutdown"] = shutdown
    shown = run("daemon", "restart", "--json")
    assert json.loads(shown.stdout) == {"running": True, "restarted": True, **HEALTH} and process.wait() == -9
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    refused = run("daemon", "restart")
    assert refused.exit_code == 4 and "sudo woodfrog daemon restart" in refused.stderr
    monkeypatch.setenv("WOODFROG_HOST", "elsewhere:8040")
    assert "is restarted on its machine" in run("daemon", "restart").stderr
    assert len(daemon.seen("POST /shutdown")) == 1


def test_a_daemon_that_is_older_than_its_code(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    old = f"woodfrog's daemon (pid {HEALTH['pid']}) is older than its code in /p, which was updated: `woodfrog daemon"
    daemon.routes["GET /health"] = {**HEALTH, "package": "/p", "current": False}
    daemon.routes["GET /apps"] = {"apps": []}
    monkeypatch.setattr("woodfrog.sdk.checks._noted", set())
    assert f"note: {old} restart`" in run("app", "list").stderr
    assert f"note: {old} restart`" in run("daemon", "status").stderr
    assert "older" not in run("app", "list").stderr  # once is enough for a program


def test_daemon_logs_of_one_that_writes_elsewhere(daemon: Daemon, home: Path) -> None:
    (home / "daemon.log").write_text("an earlier one's\n")
    daemon.routes["GET /health"] = {**HEALTH, "pid": os.getpid()}
    shown = run("daemon", "logs")
    assert shown.stdout == "an earlier one's\n"
    assert f"note: the daemon that runs (pid {os.getpid()}) does not write to {home}/daemon.log" in shown.stderr


def test_daemon_logs_from_its_end(home: Path) -> None:
    (home / "daemon.log").write_text("one\ntwo\nthree\n")
    assert run("daemon", "logs").stdout == "one\ntwo\nthree\n"
    assert run("daemon", "logs", "-n", "2").stdout == "two\nthree\n"


def test_daemon_logs_are_followed_into_the_next_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = home / "daemon.log"
    log.write_text("one\n")
    sleep = time.sleep

    def rotate(seconds: float) -> None:
        if threading.current_thread() is not threading.main_thread():
            return sleep(seconds)  # of a client that an earlier test left
        if (home / "daemon.log.old").exists():
            raise KeyboardInterrupt
        (home / "new").write_text("three\n")
        log.rename(home / "daemon.log.old")
        (home / "new").rename(log)

    # Not `time.sleep` itself: the thread that watches for a hung daemon sleeps, too.
    monkeypatch.setattr("woodfrog.cli.daemon.time", SimpleNamespace(**{**vars(time), "sleep": rotate}))
    assert run("daemon", "logs", "-f").stdout == "one\nthree\n"


# --- the whole -------------------------------------------------------------------------------------------------------


def test_version_and_help(home: Path) -> None:
    assert re.fullmatch(r"woodfrog \S+\n", run("--version").stdout)
    for command in ("run", "deploy", "call", "doctor", "app", "container", "snapshot", "daemon"):
        shown = run(command, "--help")
        assert shown.exit_code == 0, shown.output
        assert command in shown.stdout


def test_a_bug_of_ours_is_one_line_unless_debugging(home: Path) -> None:
    code = "import woodfrog.cli.commands as c\nc.app = lambda: 1 / 0\nfrom woodfrog.cli import main\nmain()"
    for debug, lines in (("", 1), ("1", 5)):
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "WOODFROG_DEBUG": debug}, capture_output=True, text=True
        )
        assert done.returncode != 0
        assert len(done.stderr.splitlines()) >= lines
        assert ("Traceback" in done.stderr) is bool(debug)
    assert "ZeroDivisionError" in done.stderr


def test_the_command_line_starts_without_the_heavy_parts(home: Path) -> None:
    code = "import sys, woodfrog.cli.commands; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & {
        "httpcore",
        "httpx",
        "rich.table",
        "rich.console",
        "cloudpickle",
        "asyncio",
        "fastapi",
        "cryptography",
    }
    assert not {
        m for m in loaded if m.startswith(("woodfrog.daemon", "woodfrog.linux", "woodfrog.criu", "woodfrog.sdk."))
    }
