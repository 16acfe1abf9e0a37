"""Calls of one function to another, found before there is a container."""

from __future__ import annotations

import importlib
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from woodfrog.sdk import checks, nested
from woodfrog.sdk.deploy import build

BEGIN = """
import woodfrog, woodfrog as modal
from woodfrog import Function
app = modal.App("a")
known = modal.Function.from_name("b", "known")
Named = modal.Cls.from_name("b", "Named")
remote = {"square": 1}

@app.function()
def square(x): ...

@app.cls()
class Model:
    @modal.enter()
    def load(self):
        ENTER
    @modal.method()
    def run(self, x=1): ...
    @modal.method()
    def other(self, x=1):
        METHOD
    def helper(self):
        self.run.remote()

@app.function()
def outer(x=1, given=None):
    BODY
"""


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(body: str = "pass", method: str = "pass", enter: str = "pass") -> ModuleType:
        text = BEGIN
        for name, lines in (("BODY", body), ("METHOD", method), ("ENTER", enter)):
            indent = " " * (len(line := next(x for x in text.splitlines() if name in x)) - len(line.lstrip()))
            text = text.replace(indent + name, textwrap.indent(lines, indent))
        sys.modules.pop("nested_program", None)
        nested._definitions.cache_clear()
        (tmp_path / "nested_program.py").write_text(text)
        importlib.invalidate_caches()
        sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
        try:
            return importlib.import_module("nested_program")
        finally:
            sys.dont_write_bytecode = before

    yield make
    sys.modules.pop("nested_program", None)


def found(module: ModuleType) -> list[tuple[str, str]]:
    return [(who, call.text) for handle in module.app.handles for who, call in nested.calls_of(handle)]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("return square.remote(x)", "square.remote"),
        ("return sum(await_(square.map([1, 2])))", "square.map"),
        ("for a in square.starmap([(1,)]):\n    pass", "square.starmap"),
        ("if x:\n    call = square.spawn(x)", "square.spawn"),
        ("with open('x') as f:\n    square.for_each([1])", "square.for_each"),
        ("[square.remote(y) for y in range(x)]", "square.remote"),
        ("return square.remote.aio(x)", "square.remote"),
        ("return Model().run.remote(x)", "Model().run.remote"),
        ("return known.remote(x)", "known.remote"),
        ("return modal.Function.from_name('b', 'f').remote(x)", "modal.Function.from_name('b', 'f').remote"),
        ("return Function.from_name('b', 'f').spawn(x)", "Function.from_name('b', 'f').spawn"),
        ("return Named().run.remote(x)", "Named().run.remote"),
        ("return modal.Cls.from_name('b', 'C')().run.remote(x)", "modal.Cls.from_name('b', 'C')().run.remote"),
    ],
)
def test_what_is_found(load, body: str, text: str) -> None:  # type: ignore[no-untyped-def]
    assert found(load(body)) == [("outer", text)]


@pytest.mark.parametrize(
    "body",
    [
        "return square.local(x) + square(x)",
        "return Model().run.local(x)",
        "return remote['square']",
        "square = given\nreturn square.remote(x)",
        "for square in given:\n    square.remote(x)",
        "from elsewhere import square\nsquare.remote(x)",
        "import elsewhere as square\nsquare.remote(x)",
        "try:\n    return square.remote(x)\nexcept Exception:\n    return square.local(x)",
        "if woodfrog.is_local():\n    return square.remote(x)",
        "if not modal.is_local():\n    return 1\nreturn square.remote(x)",
        "import os\nif not os.environ.get('MODAL_IS_REMOTE'):\n    square.remote(x)",
        "def inner():\n    square.remote(x)\nreturn inner",
        "return lambda: square.remote(x)",
        "return given.remote(x) + app.remote(x) + Model.helper.remote(x) + unknown.remote(x)",
        "return square.remote",
        "return Model().load.remote()",
    ],
)
def test_what_is_no_such_call_for_certain(load, body: str) -> None:  # type: ignore[no-untyped-def]
    assert found(load(body)) == []


def test_methods_and_hooks(load) -> None:  # type: ignore[no-untyped-def]
    module = load("pass", "self.run.remote(x)\nself.helper.remote(x)\nself.run.local(x)", "square.remote(1)")
    assert found(module) == [("Model.other", "self.run.remote"), ("Model.load", "square.remote")]


def test_they_are_noted_before_anything_runs(
    load, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(checks, "_noted", set())
    module = load("square.remote(x)\nmodal.Function.from_name('b', 'f').remote(x)", "self.run.remote(x)")
    build("a", module.app.handles)
    first, second, third = capsys.readouterr().err.splitlines()
    assert "Model.other calls self.run.remote(), which fails in a container: " in first
    assert first.endswith("yet: call self.run.local() there " + first[first.rindex("(") :])
    assert "outer calls square.remote(), which fails" in second
    assert ": call square.local() there, or run outer on the client (.local()) (" in second
    assert third.endswith("nested_program.py:28)") and ": run outer on the client (.local()) (" in third
