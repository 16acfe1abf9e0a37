"""Errors, tables, phases and progress as they are written."""

from __future__ import annotations

import pytest

from woodfrog.cli import output
from woodfrog.cli.logs import since_time
from woodfrog.errors import DaemonError, HostError, NotFoundError, SpecError, StoreError

PHASES = [
    {"name": "queue", "start_ms": 0.0, "ms": 80.0, "parent": None},
    {"name": "restore", "start_ms": 10.0, "ms": 40.0, "parent": "queue"},
    {"name": "run", "start_ms": 80.0, "ms": 20.0, "parent": None},
    {"name": "criu", "start_ms": 12.0, "ms": 30.0, "parent": "restore"},
    {"name": "verify", "start_ms": 10.0, "ms": 0.5, "parent": "restore"},
]


def test_phases_are_indented_in_order_of_time_with_bars_in_place() -> None:
    lines = output.trace_lines(PHASES, width=20, full="#")
    assert [line.split()[0] for line in lines] == ["queue", "restore", "verify", "criu", "run"]
    assert lines[1].startswith("  restore ") and lines[3].startswith("    criu ")
    assert "40.0 ms" in lines[1]
    start = lines[0].index("#")
    assert lines[0].count("#") == 16
    assert lines[4].rstrip().endswith("####") and lines[4].index("#") == start + 16
    assert output.trace_lines([]) == []


def test_phases_with_odd_parents_are_never_lost() -> None:
    phases = [
        {"name": "a", "start_ms": 0, "ms": 1, "parent": "b"},
        {"name": "b", "start_ms": 0, "ms": 1, "parent": "a"},
        {"name": "c", "start_ms": 0, "ms": 1, "parent": "c"},
        {"name": "d", "start_ms": 5, "ms": 1, "parent": "nobody"},
    ]
    assert [line.split()[0] for line in output.trace_lines(phases)] == ["a", "b", "c", "d"]


def test_what_took_no_time_within_another_phase_is_left_out() -> None:
    phases = [
        {"name": "wake", "start_ms": 0, "ms": 0, "parent": None},
        {"name": "reseed", "start_ms": 0, "ms": 0.04, "parent": "wake"},
        {"name": "enter", "start_ms": 0, "ms": 0.06, "parent": "wake"},
    ]
    assert [line.split()[0] for line in output.trace_lines(phases)] == ["wake", "enter"]


def test_a_table_has_aligned_columns(capsys: pytest.CaptureFixture[str]) -> None:
    output.table(["app", "count"], [("long-name", 3), ("x", None)])
    assert capsys.readouterr().out.splitlines() == ["APP        COUNT", "long-name  3", "x"]
    output.table(["app"], [], empty="no apps")
    assert capsys.readouterr() == ("", "no apps\n")


def test_an_error_is_one_line_and_has_its_remedy_once(capsys: pytest.CaptureFixture[str]) -> None:
    output.show_error(HostError("no CRIU", remedy="install it"))
    assert capsys.readouterr().err == "error: no CRIU; install it\n"
    output.show_error(HostError("no CRIU; install it", remedy="install it"))
    assert capsys.readouterr().err == "error: no CRIU; install it\n"


def test_a_log_attached_to_an_error_stands_below_it(capsys: pytest.CaptureFixture[str]) -> None:
    output.show_error(DaemonError("it ended while starting; the end of its log:\nfirst\n  second"))
    assert capsys.readouterr().err.splitlines()[1:] == ["    first", "      second"]


def test_the_exit_status_tells_the_kind_of_error() -> None:
    codes = [output.exit_code(e("x")) for e in (SpecError, NotFoundError, StoreError, DaemonError, HostError)]
    assert codes == [2, 2, 2, 3, 4]


def test_progress_says_each_change_once(capsys: pytest.CaptureFixture[str]) -> None:
    with output.Progress() as progress:
        for what in ("cold start", "cold start", "capturing", "capturing"):
            progress.say(what)
        progress.write("result\n")
    assert capsys.readouterr() == ("result\n", "cold start\ncapturing\n")


def test_sizes_ages_and_times() -> None:
    assert [output.size(n) for n in (12, 2048, 5 << 20, 3 << 30, None)] == ["12 B", "2.0 KiB", "5.0 MiB", "3.0 GiB", ""]
    assert output.ago(None) == ""
    assert since_time("10m", 1000.0) == 400.0
    assert since_time("", 1000.0) is None
    assert since_time("12.5", 1000.0) == 12.5
    for wrong in ("soon", "m", "tenm"):
        with pytest.raises(SpecError, match="expected 30s, 10m"):
            since_time(wrong, 1000.0)


def test_nothing_of_a_container_moves_the_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    """Messages of users' exceptions stand in tables and errors; logs are shown as they are."""
    output.table(["error"], [("ValueError: é\x1b[2J\r\x9b\ud800\tx",)])
    output.show_error(SpecError("f: ValueError: \x1b]0;title\x07\nbelow \x1b[1m"))
    said = capsys.readouterr()
    assert said.out.splitlines()[1] == "ValueError: é\\x1b[2J\\r\\x9b\\ud800\tx"
    assert said.err.splitlines() == ["error: f: ValueError: \\x1b]0;title\\x07", "    below \\x1b[1m"]
