"""What an app's log says of calls that failed, and how much of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from woodfrog.daemon.calllog import CallLog
from woodfrog.daemon.journal import CallRow
from woodfrog.daemon.logs import LogBook

ERROR = {"type": "ValueError", "message": "bad\ninput", "traceback": "Traceback:\n  line 3\nValueError: bad\ninput\n"}


def row(call: str, tag: str = "f", method: str = "f") -> CallRow:
    return CallRow(call, "demo", 1, tag, method, "", "pickle", 0.0, None, None, None, [])


class Log:
    def __init__(self, root: Path) -> None:
        self.path = root / "demo.ndjson"
        self.book = LogBook(root, 1 << 20)
        self.time = 0.0
        self.calls = CallLog(self.book, lambda: self.time)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def told(self) -> list[str]:
        return [line["line"] for line in self.lines() if line["stream"] == "system"]


def test_one_line_of_the_failure_and_the_traceback_whole(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.book.feed("demo", instance="i", function="C", stream="stderr", call=None, data=b"half")
    log.calls.failed(row("1", "C", "run"), "i", ERROR, "attempt 1 of 2, the next at once")
    lines = log.lines()
    assert log.told() == ["call 1 of C.run: ValueError: bad input; attempt 1 of 2, the next at once"]
    assert [line["line"] for line in lines[1:]] == ["half", "Traceback:", "  line 3", "ValueError: bad", "input"]
    assert all(line["instance"] == "i" and line["function"] == "C" for line in lines)


def test_why_no_container_started_is_said_once(tmp_path: Path) -> None:
    log = Log(tmp_path)
    error = {"type": "StartupError", "code": "startup-enter", "message": "f: enter failed: OSError: no weights"}
    log.calls.start_failed("demo", "f", error["message"])
    log.calls.failed(row("1"), "", error)
    log.calls.failed(row("2", "g", "g"), "", error)  # another function's
    log.calls.failed(row("3"), "", {**error, "message": "no GPU"})
    assert log.told() == [
        "call 1 of f: not run, no container started",
        "call 2 of g: f: enter failed: OSError: no weights",
        "call 3 of f: no GPU",
    ]
    assert [line["call"] for line in log.lines()] == ["1", "2", "3"]
    log.calls.settle("demo")
    log.calls.failed(row("4"), "", error)
    assert log.told()[-1] == "call 4 of f: enter failed: OSError: no weights"


def test_what_an_exception_carries_is_cut(tmp_path: Path) -> None:
    log = Log(tmp_path)
    much = "x" * (1 << 20)
    log.calls.failed(row("1"), "i", {"type": "E", "message": much, "traceback": f"first\n{much}\nlast"})
    assert log.path.stat().st_size < 64 << 10
    lines = [line["line"] for line in log.lines()]
    assert len(lines[0]) < 400 and lines[1] == "first" and lines[-1] == "last"
    assert any("characters left out" in line for line in lines)


def test_many_failures_at_once_do_not_flood_the_log(tmp_path: Path) -> None:
    """Each function has its own share; how many are left out is told, at the latest when the housekeeping comes by."""
    log = Log(tmp_path)
    for n in range(10_000):
        log.calls.failed(row(f"{n}"), "i", ERROR)
    log.calls.failed(row("other", "g", "g"), "i", ERROR)
    assert len(log.told()) == 21 and log.told()[-1].startswith("call other of g")
    log.calls.settle()
    log.calls.settle()
    assert log.told()[21:] == ["failures of calls left out here: 9980"]
    assert log.lines()[-1]["instance"] == "i", "a line of no container is not shown by `woodfrog run`"
    log.calls.failed(row("more"), "i", ERROR)
    log.time = 3.0
    log.calls.failed(row("later"), "i", ERROR)
    assert log.told()[22:] == ["failures of calls left out here: 1", "call later of f: ValueError: bad input"]
    log.time = 100.0
    log.calls.settle()
    assert not log.calls._budgets and len(log.told()) == 24
