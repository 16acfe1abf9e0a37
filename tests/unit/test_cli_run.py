"""`woodfrog run` and `woodfrog deploy`: what is chosen in a program, what is sent, what is shown."""

from __future__ import annotations

import base64
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import cloudpickle
import pytest
from typer.testing import CliRunner, Result

import woodfrog
from fake_daemon import Answer, Daemon, Request, private_home, serving
from woodfrog.cli import commands
from woodfrog.cli.run import runnables
from woodfrog.errors import FunctionTimeoutError, StartupError

PROGRAM = """\
import woodfrog

app = woodfrog.App("demo")

@app.function()
def square(x: int) -> int:
    return x * x

@app.function()
def count(n: int = 2):
    yield from range(n)

@app.cls(enable_memory_snapshot=True)
class Embedder:
    @woodfrog.method()
    def run(self, text: str, times: int = 1):
        return [text] * times
"""
ENTRYPOINT = """
@app.local_entrypoint()
def main(x: int = 3, shout: bool = False):
    y = square.remote(x)
    print("local", y, "!" if shout else "")
"""


@pytest.fixture(autouse=True)
def fresh_imports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["woodfrog"])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with private_home(monkeypatch) as path:
        yield path


class RunDaemon:
    """Takes any app, answers each call with `reply(tag, args, kwargs)`, and has it print a little."""

    def __init__(self, fake: Daemon) -> None:
        self.fake = fake
        self.reply: Callable[..., tuple[str, Any]] = lambda tag, args, kwargs: ("success", None)
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.params: list[str] = []
        self.deploys: list[dict[str, Any]] = []
        self.capture: dict[str, Any] = {"pending": True}
        self.warm: list[dict[str, Any]] = []
        """How it stands with a function's warm containers, from look to look; the last for good."""
        self.stopped: list[str] = []
        self.lines: list[dict[str, Any]] = []
        self.items: list[tuple[bytes, bytes]] = []
        self.unfinished = 0
        self.plain = fake.answer
        fake.answer = self.answer  # type: ignore[method-assign]

    def answer(self, request: Request) -> Answer:
        parts = request.path.strip("/").split("/")
        match (request.method, *parts):
            case ("HEAD" | "PUT", "code" | "blobs", _):
                return Answer(b"")
            case ("POST", "apps", _, "deploy"):
                self.deploys.append(request.json())
                return Answer({"app": parts[1], "version": 1, "functions": []})
            case ("GET", "apps", name):
                spec = self.deploys[-1]["spec"]
                warm = self.warm.pop(0) if len(self.warm) > 1 else next(iter(self.warm), {})
                known = [{**f, "key": "k", "capture": self.capture, "warm": warm} for f in spec["functions"]]
                return Answer({"app": name, "version": 4, "functions": known, "left_out": spec["left_out"]})
            case ("POST", "apps", name, "stop"):
                self.stopped.append(name)
                return Answer({"app": name, "stopped": True, "cancelled": self.unfinished})
            case ("GET", "apps", _, "logs"):
                after = int(parse_qs(request.query)["after"][0])
                numbered = list(enumerate(self.lines, 1))[after:]
                return Answer("".join(json.dumps({**line, "n": n}) + "\n" for n, line in numbered).encode())
            case ("GET", "containers"):
                return Answer({"containers": []})
            case ("POST", "apps", _, "calls", tag):
                args, kwargs = cloudpickle.loads(request.body)
                self.calls.append((tag, args, kwargs))
                self.params.append(request.headers.get("woodfrog-params", ""))
                for stream in ("stdout", "stderr", "system"):
                    line = {"t": 1.0, "instance": "i1", "function": tag, "stream": stream, "line": f"to {stream}"}
                    self.lines.append(line)
                status, value = self.reply(tag, args, kwargs)
                failed = status not in ("success", "exception")
                headers = {"Woodfrog-Call": request.headers["woodfrog-call"], "Woodfrog-Status": status}
                return Answer({"error": value} if failed else cloudpickle.dumps(value), 200, headers)
            case ("GET", "calls", _, "items"):
                from woodfrog.protocol import pack_items

                return Answer(pack_items(self.items), headers={"Woodfrog-Status": "success"})
        return self.plain(request)


@pytest.fixture
def daemon(home: Path) -> Iterator[RunDaemon]:
    with serving(home) as fake:
        yield RunDaemon(fake)


def program(tmp_path: Path, text: str, name: str = "a_program") -> str:
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
    return f"{name}.py"


def run(*argv: str) -> Result:
    return CliRunner().invoke(commands.app, list(argv))


def test_a_function_runs_in_an_app_of_its_own(tmp_path: Path, daemon: RunDaemon) -> None:
    daemon.reply = lambda tag, args, kwargs: ("success", kwargs["x"] ** 2)
    shown = run("run", program(tmp_path, PROGRAM) + "::square", "--x", "7")
    assert shown.exit_code == 0, shown.output
    assert daemon.calls == [("square", (), {"x": 7})]
    assert sorted(shown.stdout.splitlines()) == ["49", "to stdout"]
    assert shown.stdout.splitlines()[-1] == "49"
    assert shown.stderr.splitlines() == ["deploying", "to stderr", "· square i1: to system"]
    (deploy,) = daemon.deploys
    assert deploy["ephemeral"] is True and deploy["client"]["attended"] is True
    assert deploy["spec"]["name"].startswith("demo-")
    assert daemon.stopped == [deploy["spec"]["name"]]


def test_the_only_local_entrypoint_is_run_here(tmp_path: Path, daemon: RunDaemon) -> None:
    daemon.reply = lambda tag, args, kwargs: ("success", 25)
    file = program(tmp_path, PROGRAM + ENTRYPOINT)
    shown = run("run", file, "--x", "5", "--shout")
    assert shown.exit_code == 0, shown.output
    assert daemon.calls == [("square", (5,), {})]
    assert "local 25 !" in shown.stdout.splitlines()
    assert run("run", "-m", "a_program::main").exit_code == 0
    asked = run("run", file, "--help")
    assert asked.exit_code == 0 and "--shout, --no-shout" in asked.stdout
    assert len(daemon.deploys) == 2


def test_methods_and_generators(tmp_path: Path, daemon: RunDaemon) -> None:
    file = program(tmp_path, PROGRAM)
    daemon.reply = lambda tag, args, kwargs: ("success", ["hi", "hi"])
    for name in ("Embedder.run", "Embedder"):
        shown = run("run", "--json", f"{file}::{name}", "--text", "hi", "--times", "2")
        assert shown.exit_code == 0, shown.output
        assert json.loads(shown.stdout.splitlines()[-1]) == ["hi", "hi"]
    assert daemon.calls[0] == ("Embedder.run", (), {"text": "hi", "times": 2})
    daemon.items = [(b"i", cloudpickle.dumps(0)), (b"i", cloudpickle.dumps("one")), (b"d", b"")]
    daemon.reply = lambda tag, args, kwargs: ("success", None)
    shown = run("run", f"{file}::count")
    assert [line for line in shown.stdout.splitlines() if line != "to stdout"] == ["0", "one"]


def test_a_remote_exception_shows_both_tracebacks(tmp_path: Path, daemon: RunDaemon) -> None:
    text = 'Traceback (most recent call last):\n  File "/app/a_program.py", line 7, in square\nValueError: no\n'
    error = {"exception": ValueError("no"), "type": "ValueError", "message": "no", "traceback": text}
    daemon.reply = lambda tag, args, kwargs: ("exception", error)
    file = program(tmp_path, PROGRAM + ENTRYPOINT)
    shown = run("run", f"{file}::square", "--x", "1")
    assert shown.exit_code == 1
    assert shown.stderr.endswith(text)
    shown = run("run", file)
    assert shown.exit_code == 1
    after = shown.stderr[shown.stderr.index(text) + len(text) :]
    assert "raised in a container, called from:" in after
    assert "y = square.remote(x)" in after
    assert "woodfrog/" not in after
    assert len(daemon.stopped) == 2


def test_a_traceback_that_the_log_has_shown_is_not_shown_again(tmp_path: Path, daemon: RunDaemon) -> None:
    text = 'Traceback (most recent call last):\n  File "/app/a_program.py", line 7, in square\nValueError: no\n'
    error = {"exception": ValueError("no"), "type": "ValueError", "message": "no", "traceback": text}

    def reply(*call: Any) -> tuple[str, Any]:
        for line in text.splitlines():
            daemon.lines.append({"t": 1.0, "instance": "i1", "function": "square", "stream": "stderr", "line": line})
        return "exception", error

    daemon.reply = reply
    file = program(tmp_path, PROGRAM + ENTRYPOINT)
    shown = run("run", file)
    assert shown.exit_code == 1
    assert shown.stderr.count(text) == 1 and shown.stderr.count("Traceback") == 1
    end = shown.stderr[shown.stderr.index(text) + len(text) :]
    assert end.startswith("ValueError: no\n\nraised in a container, called from:\n") and "square.remote(x)" in end


@pytest.mark.parametrize("logged", [True, False])
def test_the_traceback_of_a_failed_start_is_shown_once(tmp_path: Path, daemon: RunDaemon, logged: bool) -> None:
    """By the log, or by the command where the log did not get here."""
    error = StartupError("square: enter failed: ValueError: no", traceback="Traceback:\n  load\nValueError: no\n")

    def reply(*call: Any) -> tuple[str, Any]:
        for line in error.fields["traceback"].splitlines() if logged else ():
            daemon.lines.append({"t": 1.0, "instance": "i1", "function": "square", "stream": "stderr", "line": line})
        return "failure", error.to_dict()

    daemon.reply = reply
    shown = run("run", program(tmp_path, PROGRAM) + "::square", "--x", "1")
    assert shown.exit_code == 2
    assert shown.stderr.count("Traceback:\n  load\nValueError: no\n") == 1
    assert shown.stderr.endswith("\nerror: square: enter failed: ValueError: no\n")


def test_our_failures_are_one_line(tmp_path: Path, daemon: RunDaemon) -> None:
    file = program(tmp_path, PROGRAM)
    for error in (FunctionTimeoutError("square: ran past its timeout of 3 s"), StartupError("import failed: no torch")):
        daemon.reply = lambda tag, args, kwargs, error=error: ("failure", error.to_dict())
        shown = run("run", f"{file}::square", "--x", "1")
        assert shown.exit_code == 2
        assert shown.stderr.splitlines()[-1] == f"error: {error}"
        assert "Traceback" not in shown.stderr


def test_an_exception_in_the_entrypoint_shows_the_programs_frames(tmp_path: Path, daemon: RunDaemon) -> None:
    text = PROGRAM + "\n@app.local_entrypoint()\ndef main():\n    {}['key']\n"
    shown = run("run", program(tmp_path, text))
    assert shown.exit_code == 1
    assert shown.stderr.splitlines()[-1] == "KeyError: 'key'"
    assert "in main" in shown.stderr and "woodfrog/" not in shown.stderr
    leaves = PROGRAM + "\n@app.local_entrypoint()\ndef main():\n    raise SystemExit(5)\n"
    assert run("run", program(tmp_path, leaves, "leaver")).exit_code == 5
    assert len(daemon.stopped) == 2


def test_an_asynchronous_entrypoint(tmp_path: Path, daemon: RunDaemon) -> None:
    text = "\n@app.local_entrypoint()\nasync def main():\n    print(await square.remote.aio(2))\n"
    daemon.reply = lambda tag, args, kwargs: ("success", "awaited")
    shown = run("run", program(tmp_path, PROGRAM + text))
    assert "awaited" in shown.stdout.splitlines()


def test_a_result_in_a_file(tmp_path: Path, daemon: RunDaemon) -> None:
    file = program(tmp_path, PROGRAM)
    for value, expected in (("größer", "größer".encode()), (b"\x00\xff", b"\x00\xff")):
        daemon.reply = lambda tag, args, kwargs, value=value: ("success", value)
        shown = run("run", "-w", "out.bin", f"{file}::square", "--x", "1")
        assert shown.exit_code == 0, shown.output
        assert (tmp_path / "out.bin").read_bytes() == expected
        assert set(shown.stdout.splitlines()) == {"to stdout"}
    local = file.replace(".py", "_2.py")
    (tmp_path / local).write_text(PROGRAM + "\n@app.local_entrypoint()\ndef main() -> str:\n    return 'here'\n")
    assert run("run", "--write-result", "local.txt", local).exit_code == 0
    assert (tmp_path / "local.txt").read_text() == "here"
    daemon.reply = lambda tag, args, kwargs: ("success", 3)
    for argv, words in (
        (["-w", "out.bin", f"{file}::square", "--x", "1"], "of type int: -w writes text or bytes"),
        (["-w", "no/where", f"{file}::square", "--x", "1"], "of type int"),
        (["-w", "out.bin", f"{file}::count"], "not with a generator"),
        (["-w", "out.bin", "--json", f"{file}::square", "--x", "1"], "not with --json"),
    ):
        shown = run("run", *argv)
        assert shown.exit_code == 2 and words in shown.stderr, shown.output
    daemon.reply = lambda tag, args, kwargs: ("success", "text")
    shown = run("run", "-w", "no/where", f"{file}::square", "--x", "1")
    assert shown.exit_code == 2 and "no/where: No such file or directory" in shown.stderr


def test_commands_of_modals_say_what_to_do_instead() -> None:
    shown = run("serve", "app.py")
    assert shown.exit_code == 2 and shown.stderr.startswith(
        "error: Modal has a command 'serve'; woodfrog has none: use"
    )
    assert "no such command 'nonsense'" in run("nonsense").stderr


def test_a_result_that_is_not_json(tmp_path: Path, daemon: RunDaemon) -> None:
    daemon.reply = lambda tag, args, kwargs: ("success", {1, 2})
    shown = run("run", "--json", program(tmp_path, PROGRAM) + "::square", "--x", "1")
    assert shown.exit_code == 2
    assert "cannot be written as JSON" in shown.stderr


TWO_APPS = """\
import woodfrog

one = woodfrog.App("one")
two = woodfrog.App("two")

@one.function(serialized=True)
def f():
    return 1

@two.function(serialized=True, name="f")
def g():
    return 2
"""


@pytest.mark.parametrize(
    ("text", "argv", "message"),
    [
        (None, ["run", "p.py"], "file not found: p.py"),
        (None, ["deploy", "p.py"], "file not found: p.py"),
        ("x = (\n", ["run", "p.py"], "p.py:1: syntax error: '(' was never closed"),
        ("1 / 0\n", ["deploy", "p.py"], "cannot import p.py: ZeroDivisionError: division by zero (p.py:1)"),
        ("x = 1\n", ["run", "p.py"], "p.py: no app in it: it needs a global `app = woodfrog.App(...)`"),
        ("x = 1\n", ["deploy", "p.py"], "p.py: no app in it: it needs a global `app = woodfrog.App(...)`"),
        ("import woodfrog\napp = woodfrog.App('a')\n", ["run", "p.py"], "p.py: no function found in it"),
        (
            PROGRAM,
            ["run", "p.py"],
            "p.py: several functions (Embedder.run, count, square): choose one with p.py::NAME",
        ),
        (
            PROGRAM,
            ["run", "p.py::cube"],
            "p.py: no function named 'cube'; there are: Embedder.run, count, square",
        ),
        (PROGRAM, ["run", "p.py::square"], "p.py::square: the following arguments are required: --x (see its --help)"),
        (TWO_APPS, ["run", "p.py"], "p.py: several functions (one.f, two.f): choose one with p.py::NAME"),
        (TWO_APPS, ["deploy", "p.py"], "p.py: several apps (one, two): choose one with p.py::NAME"),
        (TWO_APPS, ["deploy", "p.py::three"], "p.py: no app named 'three'; there are: one, two"),
        ("import woodfrog\napp = woodfrog.App()\n", ["deploy", "p.py"], "a deployed app needs a name"),
    ],
)
def test_programs_that_cannot_be_run(
    tmp_path: Path, daemon: RunDaemon, text: str | None, argv: list[str], message: str
) -> None:
    if text is not None:
        program(tmp_path, text, "p")
    shown = run(*argv)
    assert shown.exit_code == 2, shown.output
    errors = [line for line in shown.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith(f"error: {message}"), shown.stderr
    assert shown.stdout == ""
    assert not daemon.deploys


def test_deploy(tmp_path: Path, daemon: RunDaemon) -> None:
    file = program(tmp_path, PROGRAM)
    shown = run("deploy", file)
    assert shown.exit_code == 0, shown.output
    assert daemon.deploys[0]["spec"]["name"] == "demo"
    assert (daemon.deploys[0]["ephemeral"], daemon.deploys[0]["snapshot"]) == (False, False)
    assert daemon.deploys[0]["strategy"] == "rolling"
    lines = shown.stderr.splitlines()
    assert lines[:2] == ["deploying demo", "deployed demo, version 4"]
    assert [line.strip() for line in lines[2:]] == [
        "woodfrog call demo.square",
        "woodfrog call demo.count",
        "woodfrog call demo.Embedder.run",
    ]
    answer = json.loads(run("deploy", file, "--name", "other", "--strategy", "recreate", "--json").stdout)
    assert daemon.deploys[1]["strategy"] == "recreate"
    assert (answer["app"], answer["version"]) == ("other", 4)
    assert {f["tag"] for f in answer["functions"]} == {"square", "count", "Embedder"}


LEFT_OUT = (
    PROGRAM
    + """
@app.function(schedule=woodfrog.Period(days=1))
def nightly(): ...

@app.cls()
class Site:
    @woodfrog.method()
    def run(self): ...

    @woodfrog.fastapi_endpoint()
    def web(self): ...
"""
)


def test_what_woodfrog_lacks_is_left_out_by_name(tmp_path: Path, daemon: RunDaemon) -> None:
    file = program(tmp_path, LEFT_OUT)
    schedule = r"nightly.*: @app.function\(schedule=...\): .* cron .*\(a_program.py:19\)"
    web = r"Site.web.*: .* @fastapi_endpoint\(\) yet: .*\(a_program.py:27\)"
    shown = run("deploy", file)
    assert shown.exit_code == 0, shown.output
    assert [f["tag"] for f in daemon.deploys[0]["spec"]["functions"]] == ["square", "count", "Embedder", "Site"]
    assert [x["tag"] for x in daemon.deploys[0]["spec"]["left_out"]] == ["nightly", "Site.web"]
    for words in (schedule, web, r"left out, as said above: nightly, Site.web \(--strict"):
        assert re.search(words, shown.stderr), shown.stderr
    answer = run("deploy", file, "--json")
    assert [x["tag"] for x in json.loads(answer.stdout)["left_out"]] == ["nightly", "Site.web"]
    assert re.search(schedule, answer.stderr) and re.search(web, answer.stderr)
    strict = run("deploy", file, "--strict")
    assert strict.exit_code == 2 and len(daemon.deploys) == 2
    assert re.search(f"error: {schedule}; the same of 1 more, named above", strict.stderr)
    assert re.search(f"note: {web}", strict.stderr)


def test_a_run_goes_without_what_woodfrog_lacks(tmp_path: Path, daemon: RunDaemon) -> None:
    daemon.reply = lambda tag, args, kwargs: ("success", 9)
    file = program(tmp_path, LEFT_OUT + ENTRYPOINT)
    shown = run("run", file)
    assert "local 9 " in shown.stdout.splitlines() and "note: nightly is left out: " in shown.stderr
    assert "left out" not in run("run", "--quiet", file).stderr
    assert len(daemon.deploys) == 2
    for name in ("nightly", "Site.web"):
        refused = run("run", f"{file}::{name}")
        assert refused.exit_code == 2 and f"error: {name} is left out of its app: " in refused.stderr
    assert len(daemon.deploys) == 2


def test_nothing_but_what_woodfrog_lacks(tmp_path: Path, daemon: RunDaemon) -> None:
    text = "import woodfrog\napp = woodfrog.App('w')\n@app.function()\n@woodfrog.asgi_app()\ndef web(): ...\n"
    file = program(tmp_path, text)
    assert "error: nothing of w can be deployed: web: " in run("deploy", file).stderr
    assert "error: web is left out of its app: " in run("run", file).stderr
    assert not daemon.deploys


def test_deploy_with_snapshots_waits_for_them(tmp_path: Path, daemon: RunDaemon) -> None:
    ready = {"id": "s1", "app": "demo", "function": "Embedder", "state": "ready", "function_key": "k"}
    daemon.fake.routes["GET /snapshots"] = [{"snapshots": []}, {"snapshots": [ready]}]
    shown = run("deploy", program(tmp_path, PROGRAM), "--snapshot", "--json")
    assert json.loads(shown.stdout)["snapshots"] == [{"id": "s1", "function": "Embedder"}]
    assert daemon.deploys[0]["snapshot"] is True


def test_a_snapshot_that_fails_leaves_the_version_deployed(tmp_path: Path, daemon: RunDaemon) -> None:
    daemon.capture = {"pending": False, "reason": "Embedder: import failed: no module 'x'"}
    daemon.fake.routes["GET /snapshots"] = {"snapshots": []}
    shown = run("deploy", program(tmp_path, PROGRAM), "--snapshot")
    assert shown.exit_code == 2
    lines = shown.stderr.splitlines()
    assert "deployed demo, version 4" in lines
    assert lines[-2:] == [
        "version 4 is deployed all the same; `woodfrog app rollback demo` goes back to the version before",
        "error: demo.Embedder was not captured: Embedder: import failed: no module 'x'; see `woodfrog app logs demo`",
    ]


WARM = PROGRAM + "\n@app.function(min_containers=2)\ndef kept():\n    pass\n"


def test_deploy_waits_for_warm_containers(tmp_path: Path, daemon: RunDaemon) -> None:
    state = {"wanted": 2, "ready": 0, "reason": "", "no_room": False}
    daemon.warm = [state, {**state, "ready": 1}, {**state, "ready": 2}]
    shown = run("deploy", program(tmp_path, WARM), "--wait", "--json")
    assert shown.exit_code == 0 and json.loads(shown.stdout)["warm"] == [{"function": "kept", "ready": 2}]
    assert len(daemon.warm) == 1


def test_warm_containers_that_do_not_start_leave_the_version_deployed(
    tmp_path: Path, daemon: RunDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"wanted": 2, "ready": 1, "reason": "import failed: no module 'x'", "no_room": False}
    daemon.warm = [state]
    shown = run("deploy", program(tmp_path, WARM), "--wait")
    assert shown.exit_code == 2 and "deployed demo, version 4" in shown.stderr.splitlines()
    assert shown.stderr.splitlines()[-2:] == [
        "version 4 is deployed all the same; `woodfrog app rollback demo` goes back to the version before",
        "error: demo.kept does not start: import failed: no module 'x'; see `woodfrog app logs demo`",
    ]
    monkeypatch.setattr("woodfrog.cli.run.SETTLE_S", 0.3)
    daemon.warm = [{**state, "reason": "", "no_room": True}]
    shown = run("deploy", program(tmp_path, WARM), "--wait")
    line = "error: demo.kept: its 2 containers are not ready after 0 s (no room for more)"
    assert shown.exit_code == 2 and shown.stderr.splitlines()[-1] == line


SNAPPED = """\
import woodfrog

app = woodfrog.App("demo")

@app.cls(enable_memory_snapshot=True)
class Sized:
    size: int = woodfrog.parameter(default=3)

    @woodfrog.method()
    def run(self):
        pass

@app.cls(enable_memory_snapshot=True)
class Named:
    name: str = woodfrog.parameter()

    @woodfrog.method()
    def run(self):
        pass

@app.cls(enable_memory_snapshot=True)
class Plain:
    def __init__(self, path, count=1):
        pass

    @woodfrog.method()
    def run(self):
        pass
"""


def test_deploy_with_snapshots_of_classes_with_parameters(tmp_path: Path, daemon: RunDaemon) -> None:
    ready = {"id": "s1", "app": "demo", "function": "Sized", "state": "ready", "function_key": "k"}
    daemon.fake.routes["GET /snapshots"] = {"snapshots": [ready]}
    shown = run("deploy", program(tmp_path, SNAPPED), "--snapshot", "--json")
    assert json.loads(shown.stdout)["snapshots"] == [{"id": "s1", "function": "Sized"}]
    assert shown.stderr.splitlines() == [
        "Named has no snapshot before its first call: its constructor needs name",
        "Plain has no snapshot before its first call: its constructor needs path",
    ]


def test_ctrl_c_cancels_the_call_and_stops_the_app(tmp_path: Path, daemon: RunDaemon) -> None:
    text = PROGRAM + "\n@app.local_entrypoint()\ndef main():\n    raise KeyboardInterrupt\n"
    shown = run("run", program(tmp_path, text))
    assert shown.exit_code == 130
    assert shown.stderr.splitlines()[-1] == "interrupted"
    assert len(daemon.stopped) == 1


def test_calls_that_end_with_the_run_are_told(tmp_path: Path, daemon: RunDaemon) -> None:
    text = PROGRAM + "\n@app.local_entrypoint()\ndef main():\n    square.spawn(2)\n"
    for daemon.unfinished, words in ((1, "note: 1 call of demo-"), (3, "note: 3 calls of demo-")):
        shown = run("run", program(tmp_path, text))
        assert shown.exit_code == 0 and words in shown.stderr and "woodfrog run --detach" in shown.stderr
    daemon.unfinished = 0
    assert "note:" not in run("run", program(tmp_path, text)).stderr


CLASSES = """\
import woodfrog

app = woodfrog.App("demo")

@app.cls()
class Model:
    name: str = woodfrog.parameter()
    size: int = woodfrog.parameter(default=3)
    fast: bool = woodfrog.parameter(default=False)

    @woodfrog.method()
    def run(self, prompt: str = "x"):
        return prompt

@app.cls()
class Plain:
    def __init__(self, path: str, count: int = 1):
        self.path, self.count = path, count

    @woodfrog.method()
    def run(self, prompt: str):
        return prompt

@app.cls()
class Clash:
    name: str = woodfrog.parameter()

    @woodfrog.method()
    def run(self, name: str):
        return name
"""


def sent_parameters(daemon: RunDaemon) -> Any:
    return cloudpickle.loads(base64.b64decode(daemon.params[-1]))


def test_parameters_of_a_class_are_options_too(tmp_path: Path, daemon: RunDaemon) -> None:
    file = program(tmp_path, CLASSES)
    shown = run("run", f"{file}::Model.run", "--name", "a", "--prompt", "b", "--size", "3", "--fast")
    assert shown.exit_code == 0, shown.output
    assert daemon.calls[-1] == ("Model.run", (), {"prompt": "b"})
    assert sent_parameters(daemon) == ((), {"fast": True, "name": "a"})
    assert run("run", f"{file}::Plain.run", "--path", "p", "--prompt", "b").exit_code == 0
    assert sent_parameters(daemon) == ((), {"path": "p"})
    assert "  woodfrog call demo.Model.run name=..." in run("deploy", file).stderr.splitlines()
    asked = run("run", f"{file}::Model.run", "--help").stdout
    assert "of the class, required" in asked and "of the class, default: 3" in asked
    for argv, message in (
        (["Model.run"], "the following arguments are required: --name"),
        (["Model.run", "--name", "a", "--size", "b"], "argument --size: invalid int value: 'b'"),
        (["Clash.run", "--name", "a"], "'name' is a parameter of the class and of the method: rename one"),
    ):
        refused = run("run", f"{file}::{argv[0]}", *argv[1:])
        assert refused.exit_code == 2 and message in refused.stderr


def test_options_of_run(tmp_path: Path, daemon: RunDaemon) -> None:
    file = program(tmp_path, PROGRAM)
    shown = run("run", "--quiet", "--name", "mine", "-e", "main", f"{file}::app.square", "--x", "1")
    assert shown.exit_code == 0, shown.output
    assert shown.stderr.splitlines() == ["to stderr"] and shown.stdout.splitlines() == ["to stdout"]
    shown = run("run", "-e", "main", "nothing.py")
    assert "woodfrog: note: --env has no meaning on your own machine and is ignored" in shown.stderr.splitlines()
    assert daemon.deploys[-1]["spec"]["name"].startswith("mine-") and len(daemon.stopped) == 1
    shown = run("run", "-d", f"{file}::square", "--x", "1")
    left = daemon.deploys[-1]["spec"]["name"]
    assert shown.exit_code == 0 and len(daemon.stopped) == 1
    assert daemon.deploys[-1]["client"]["attended"] is False
    assert f"{left} is left running: `woodfrog app logs {left} -f`" in shown.stderr
    for argv in (["--interactive", file], ["-x", f"{file}::square"]):
        refused = run("run", *argv)
        assert refused.exit_code == 2 and f"error: no such option: {argv[0]}" in refused.stderr
    assert "error: no such option: --what" in run("run", "--", "--what").stderr
    refused = run("run", f"{file}::square", "--x", "1", "--detach")
    assert refused.stderr.splitlines()[-1] == (
        "error: a_program.py::square: unrecognized arguments: --detach (see its --help); options of `woodfrog run` "
        "such as --detach go before FILE"
    )
    assert "--name: 'a b' is not a name" in run("run", "--name", "a b", f"{file}::square", "--x", "1").stderr


def test_the_apps_variable_before_the_name(tmp_path: Path, daemon: RunDaemon) -> None:
    file = program(tmp_path, PROGRAM)
    for name in ("app.square", "app.Embedder.run", "app.Embedder"):
        option = ["--x", "1"] if "square" in name else ["--text", "t"]
        shown = run("run", f"{file}::{name}", *option)
        assert shown.exit_code == 0, shown.output
    assert [tag for tag, _, _ in daemon.calls] == ["square", "Embedder.run", "Embedder.run"]
    assert "no function named 'other.square'" in run("run", f"{file}::other.square").stderr
    assert "no function named 'app.cube'" in run("run", f"{file}::app.cube").stderr


def test_a_function_of_an_included_app_has_its_plain_name() -> None:
    common, other = woodfrog.App("common"), woodfrog.App("other")
    common.function(serialized=True, name="helper")(lambda: None)
    other.function(serialized=True, name="alone")(lambda: None)
    whole = woodfrog.App("whole").include(common)
    found = runnables({"common": common, "app": whole, "other": other})
    assert set(found) == {"helper", "alone"} and found["helper"].app is whole
    other.function(serialized=True, name="helper")(lambda: 1)
    assert set(runnables({"common": common, "app": whole, "other": other})) == {
        *("alone", "app.helper", "common.helper", "other.helper")
    }
