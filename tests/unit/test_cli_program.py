"""The user's program: imported or refused in one line, and its parameters as options."""

from __future__ import annotations

import enum
import sys
from collections.abc import Iterator, Sequence
from datetime import date, datetime
from pathlib import Path
from typing import Any, Literal, NewType, Optional

import pytest

from woodfrog.cli.program import Reference, arguments_from, load, parse_reference, pick
from woodfrog.errors import SpecError


@pytest.fixture(autouse=True)
def fresh_imports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def refused(reference: Reference) -> str:
    with pytest.raises(SpecError) as caught:
        load(reference)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_references() -> None:
    assert parse_reference("a/b.py") == Reference("a/b.py", None, False)
    assert parse_reference("a.py::C.m") == Reference("a.py", "C.m", False)
    assert parse_reference("pkg.mod::f", module=True) == Reference("pkg.mod", "f", True)
    for wrong in ("::f", "a.py::"):
        with pytest.raises(SpecError, match="expected FILE"):
            parse_reference(wrong)


def test_a_file_and_a_module_are_imported_under_their_own_names(tmp_path: Path) -> None:
    (tmp_path / "helper_of_mine.py").write_text("X = 41\n")
    (tmp_path / "program_of_mine.py").write_text("from helper_of_mine import X\nY = X + 1\n")
    module = load(parse_reference("program_of_mine.py"))
    assert (module.__name__, module.Y) == ("program_of_mine", 42)
    package = tmp_path / "pkg_of_mine"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "mod.py").write_text("from . import other\nY = other.Z\n")
    (package / "other.py").write_text("Z = 7\n")
    assert load(parse_reference("pkg_of_mine.mod", module=True)).Y == 7
    assert load(parse_reference("pkg_of_mine/mod.py")).__name__ == "pkg_of_mine.mod"


def test_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "data.txt").write_text("")
    assert refused(parse_reference("none.py")) == "file not found: none.py"
    assert refused(parse_reference("none")).endswith("(to run a module: -m)")
    assert "is a directory" in refused(parse_reference("folder.py"))
    assert "not a Python file" in refused(parse_reference("data.txt"))
    assert "no_such_module_anywhere" in refused(parse_reference("no_such_module_anywhere", module=True))
    assert "is a file" in refused(parse_reference("none.py", module=True))


def test_a_syntax_error_is_named_by_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "wrong_syntax.py").write_text("x = 1\ndef f(:\n")
    assert refused(parse_reference("wrong_syntax.py")).startswith("wrong_syntax.py:2: syntax error")
    (tmp_path / "imports_wrong.py").write_text("import wrong_syntax\n")
    assert "wrong_syntax.py:2: syntax error" in refused(parse_reference("imports_wrong.py"))


def test_a_module_that_raises_shows_its_own_frames_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "deep_raiser.py").write_text("import json\ndef f():\n    json.loads('{')\n")
    (tmp_path / "raiser.py").write_text("import deep_raiser\n\ndeep_raiser.f()\n")
    message = refused(parse_reference("raiser.py"))
    assert message.startswith("cannot import raiser.py: json.decoder.JSONDecodeError: ")
    assert message.endswith("(deep_raiser.py:3)")
    shown = capsys.readouterr().err
    assert "raiser.py" in shown and "deep_raiser.py" in shown
    assert "importlib" not in shown and "woodfrog/" not in shown and "json/decoder.py" not in shown


def test_missing_imports_and_exits_are_the_programs_own_errors(tmp_path: Path) -> None:
    (tmp_path / "lacks.py").write_text("import not_a_package_at_all\n")
    assert "No module named 'not_a_package_at_all' (lacks.py:1)" in refused(parse_reference("lacks.py"))
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(3)\n")
    assert "called sys.exit(3) while being imported (leaves.py:2)" in refused(parse_reference("leaves.py"))
    (tmp_path / "declares.py").write_text(
        "from woodfrog.errors import SpecError\n\nraise SpecError('two functions are called f', code='twice')\n"
    )
    assert refused(parse_reference("declares.py")) == "declares.py:3: two functions are called f"


def test_a_file_that_hides_a_module_is_refused(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("")
    assert "rename it" in refused(parse_reference("json.py"))


def test_picking() -> None:
    two = {"b": 2, "a": 1}
    assert pick({"a": 1}, None, what="function", source="x.py") == 1
    assert pick(two, "b", what="function", source="x.py") == 2
    assert pick(two, None, what="function", source="x.py", prefer=["a"]) == 1
    for name, prefer, text in (
        (None, [], r"several functions \(a, b\): choose one with x.py::NAME"),
        (None, ["a", "b"], r"several functions \(a, b\)"),
        ("c", [], "no function named 'c'; there are: a, b"),
    ):
        with pytest.raises(SpecError, match=text):
            pick(two, name, what="function", source="x.py", prefer=prefer)
    with pytest.raises(SpecError, match="no function found"):
        pick({}, None, what="function", source="x.py")


class Colour(enum.Enum):
    red = 1
    blue = 2


def everything(
    text: str,
    count: int = 1,
    *,
    ratio: float = 0.5,
    dry_run: bool = False,
    where: Optional[Path] = None,  # noqa: UP045
    when: datetime | None = None,
    day: date | None = None,
    mode: Literal["fast", "slow"] = "fast",
    names: list[int] | None = None,
    colour: Colour = Colour.red,
    untyped=7,  # type: ignore[no-untyped-def]
) -> None:
    """Takes it all, 100% of it."""


def test_options_have_the_types_of_the_parameters() -> None:
    argv = (
        "--text hi --count 3 --ratio 2 --dry-run --where /tmp --when 2026-01-02T03:04 --day 2026-01-02"
        " --mode slow --names 1 --names 2 --colour blue --untyped 9"
    )
    args, kwargs = arguments_from(everything, argv.split(), label="x.py::everything")
    assert args == ()
    assert kwargs == {
        "text": "hi",
        "count": 3,
        "ratio": 2.0,
        "dry_run": True,
        "where": Path("/tmp"),
        "when": datetime(2026, 1, 2, 3, 4),
        "day": date(2026, 1, 2),
        "mode": "slow",
        "names": [1, 2],
        "colour": Colour.blue,
        "untyped": 9,
    }
    assert arguments_from(everything, ["--text=x", "--no-dry-run"], label="f") == ((), {"text": "x", "dry_run": False})


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: --text"),
        (["--text", "x", "--count", "many"], "argument --count: invalid int value: 'many'"),
        (["--text", "x", "--mode", "odd"], "argument --mode: invalid choice"),
        (["--text", "x", "--colour", "green"], "not one of red, blue"),
        (["--text", "x", "--when", "soon"], "invalid date and time value"),
        (["--text", "x", "--unknown", "1"], "unrecognized arguments: --unknown 1"),
        (["stray", "--text", "x"], "unrecognized arguments: stray"),
    ],
)
def test_wrong_options_are_one_line(argv: list[str], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        arguments_from(everything, argv, label="x.py::everything")
    assert message in str(caught.value)
    assert str(caught.value).startswith("x.py::everything: ")
    assert "\n" not in str(caught.value)


def test_help_lists_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        arguments_from(everything, ["--help"], label="x.py::everything")
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "--dry-run" in shown and "Takes it all, 100% of it." in shown


Size = NewType("Size", int)


def structured(
    table: dict[str, int] | None = None,
    raw: bytes = b"",
    either: int | float | str = 0,
    flags: Sequence[bool] = (),
    tables: list[dict[str, Any]] | None = None,
    size: Size = Size(1),
    number: bool | int = 0,
) -> None: ...


def test_structured_parameters() -> None:
    argv = ["--table", '{"a": 1}', "--raw", "é", "--either", "2.5", "--flags", "yes", "--flags", "no", "--tables", "{}"]
    assert arguments_from(structured, [*argv, "--size", "3", "--number", "7"], label="f")[1] == {
        "table": {"a": 1},
        "raw": "é".encode(),
        "either": 2.5,
        "flags": [True, False],
        "tables": [{}],
        "size": 3,
        "number": 7,
    }
    found = arguments_from(structured, ["--either", "x", "--number", "1"], label="f")[1]
    assert found == {"either": "x", "number": 1} and found["number"] is not True
    for text in ("[1]", "a=1"):
        with pytest.raises(SpecError, match="argument --table: invalid JSON object value"):
            arguments_from(structured, ["--table", text], label="f")


def test_parameters_that_no_option_can_give(capsys: pytest.CaptureFixture[str]) -> None:
    def needs(when: complex) -> None: ...
    def nested(rows: list[list[int]]) -> None: ...
    def has_default(when: complex = 1j, either: Colour | list[int] = Colour.red, some: list[int] = []) -> None: ...  # noqa: B006

    with pytest.raises(SpecError, match="parameter 'when' has the type complex, which no option can give"):
        arguments_from(needs, [], label="f")
    with pytest.raises(SpecError, match="parameter 'rows' has the type list"):
        arguments_from(nested, [], label="f")
    assert arguments_from(has_default, [], label="f") == ((), {})
    for name in ("when", "either"):
        with pytest.raises(
            SpecError, match=f"parameter '{name}' has the type .*, which no option can give: it is left"
        ):
            arguments_from(has_default, [f"--{name}", "2"], label="f")
    with pytest.raises(SystemExit):
        arguments_from(has_default, ["--help"], label="f")
    shown = " ".join(capsys.readouterr().out.split())
    assert "--when - cannot be given here; default: 1j" in shown and "once for each item; default: []" in shown


def test_leftovers_go_to_a_star_parameter() -> None:
    def f(first: int = 1, *rest: str, flag: bool = False) -> None: ...

    def g(*arglist: Any) -> None: ...

    assert arguments_from(f, ["a", "--flag", "b"], label="f") == ((1, "a", "b"), {"flag": True})
    assert arguments_from(f, ["--first", "2", "a"], label="f") == ((2, "a"), {})
    assert arguments_from(g, ["--lr", "0.1", "x"], label="g") == (("--lr", "0.1", "x"), {})


def test_methods_take_no_self() -> None:
    class C:
        def run(self, n: int) -> None: ...

    assert arguments_from(C.run, ["--n", "4"], label="C.run", skip_self=True) == ((), {"n": 4})
