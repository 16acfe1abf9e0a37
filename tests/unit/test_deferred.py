"""`image.imports()` on a client: what is installed is imported when it is used, and is then what it always was."""

from __future__ import annotations

import pickle
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

import woodfrog as modal
from woodfrog.sdk import deferred

SITE = {
    "heavy/__init__.py": """
        LOG.append("heavy")
        class Thing:
            kind = "thing"
        class Broken(Exception): ...
        def twice(x): return 2 * x
        def decorate(f): f.decorated = True; return f
        NUMBER, NAMES = 7, ["a", "b"]
    """,
    "heavy/deep/__init__.py": "LOG.append('deep')",
    "heavy/deep/er.py": "LOG.append('deeper'); WORD = 'er'",
    "other.py": "LOG.append('other'); import heavy.deep",
    "broken.py": "import nothing_of_this_name",
}


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was imported; packages that are installed beside a program's own module."""
    found: list[str] = []
    monkeypatch.setattr("builtins.LOG", found, raising=False)
    site = tmp_path / "lib" / "site-packages"
    for name, text in SITE.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(textwrap.dedent(text))
    (tmp_path / "mine.py").write_text("LOG.append('mine'); NAME = 'mine'")
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(site), *sys.path])
    for name in ("heavy", "heavy.deep", "heavy.deep.er", "other", "broken", "mine"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(deferred, "_waiting", {})
    return found


def block(text: str, after: str = "") -> dict[str, Any]:
    """The globals of a program with such a block."""
    body = textwrap.indent(textwrap.dedent(text).strip(), "    ")
    namespace: dict[str, Any] = {"image": modal.Image.debian_slim(), "__name__": __name__}
    exec(f"with image.imports():\n{body}\n{textwrap.dedent(after)}", namespace)
    return namespace


def test_nothing_is_imported_before_it_is_used(log: list[str]) -> None:
    after = """
        def method(self, thing: Thing, other: "heavy.Thing") -> Thing: ...
        keep = [Thing, heavy]
    """
    found = block("import heavy, other\nimport heavy.deep.er as er\nfrom heavy import Thing, twice as double", after)
    assert log == []
    assert found["double"](4) == 8 and log == ["heavy"]
    assert found["double"] is sys.modules["heavy"].twice, "the real thing is in its place"
    assert found["er"].WORD == "er" and log == ["heavy", "deep", "deeper"]
    assert found["er"] is sys.modules["heavy.deep.er"]
    assert isinstance(sys.modules["heavy"].Thing(), found["keep"][0]) and found["keep"][0]().kind == "thing"


@pytest.mark.parametrize(
    ("imports", "use", "result"),
    [
        ("from heavy import Thing", "class A(Thing): ...\nmade = A.__mro__[1].__name__", "Thing"),
        ("import heavy", "class A(heavy.Thing): ...\nmade = A().kind", "thing"),
        ("from heavy import decorate", "@decorate\ndef f(): ...\nmade = f.decorated", True),
        ("from heavy import NUMBER", "made = [NUMBER + 1, 1 + NUMBER, NUMBER > 3, f'{NUMBER:03}', str(NUMBER)]",
         [8, 8, True, "007", "7"]),
        ("from heavy import NAMES", "made = [list(NAMES), len(NAMES), NAMES[1], 'a' in NAMES, {*NAMES}]",
         [["a", "b"], 2, "b", True, {"a", "b"}]),
        ("from heavy import Thing", "from typing import Optional\nmade = 'heavy.Thing' in str(Optional[Thing])", True),
        ("from heavy import Thing", "made = str(Thing | None)", "heavy.Thing | None"),
        ("from heavy import Thing", "import dataclasses\n@dataclasses.dataclass\nclass D:\n    thing: Thing = None\n"
         "made = isinstance(Thing, type), D().thing", (True, None)),
        ("from heavy import deep", "made = deep.__name__", "heavy.deep"),
        ("import heavy.deep\nimport heavy.deep.er", "made = heavy.deep.er.WORD, heavy.NUMBER", ("er", 7)),
        ("import heavy.deep.er", "made = heavy.NUMBER, heavy.deep.er.WORD", (7, "er")),
        ("import heavy", "made = hasattr(heavy, 'nothing'), getattr(heavy, 'NUMBER', 0)", (False, 7)),
        ("import heavy", "heavy.NUMBER = 8\nimport heavy as again\nmade = again.NUMBER", 8),
        ("import heavy\nmade = heavy.twice(2)", "", 4),
    ],
)  # fmt: skip
def test_it_is_what_it_always_was(log: list[str], imports: str, use: str, result: object) -> None:
    assert block(imports, use)["made"] == result


def test_what_is_missing_or_the_programs_own_is_imported_as_ever(log: list[str]) -> None:
    found = block("import mine, json\nfrom mine import NAME\nimport nothing_of_this_name\nimport heavy")
    assert log == ["mine"] and found["NAME"] == "mine" and found["json"] is sys.modules["json"]
    assert "nothing_of_this_name" not in found and "heavy" not in found, "a missing module ends the block"
    sys.modules["heavy"] = sys  # what is there already
    assert block("import heavy")["heavy"] is sys
    assert block("from heavy import *")["path"] is sys.path


def test_what_fails_says_so_when_it_is_used(log: list[str]) -> None:
    found = block("import broken\nfrom heavy import nothing\nimport heavy.none")
    for use, message in (
        ("broken.x", "No module named 'nothing_of_this_name'"),
        ("nothing()", "cannot import name 'nothing' from 'heavy'"),
        ("heavy.none.x", "No module named 'heavy.none'"),
    ):
        for _ in range(2):
            with pytest.raises(ImportError, match=message):
                eval(use, found)


def test_other_code_imports_at_once(log: list[str]) -> None:
    """Only the block's own imports wait: not those of what it imports."""
    found = block("import mine", "")
    assert found["mine"].NAME == "mine"
    found = block("import other\nother.x = 1")
    assert log == ["mine", "other", "heavy", "deep"]
    import heavy  # type: ignore[import-not-found]

    assert type(heavy) is type(sys), "after the block imports are as ever"


def test_code_of_the_container_that_runs_here_finds_the_real_things(log: list[str]) -> None:
    app = modal.App("local")

    def failing() -> str:
        try:
            raise found["heavy"].Broken
        except found["Broken"]:
            return "caught"

    found = block("import heavy\nfrom heavy import Broken\nimport broken")
    function = app.function(serialized=True)(failing)
    assert log == [] and function.local() == "caught"
    assert type(found["heavy"]) is type(sys) and isinstance(found["Broken"], type)


def test_it_travels_by_name(log: list[str]) -> None:
    found = block("import heavy\nfrom heavy import Thing, NUMBER")
    kept = found["heavy"], found["Thing"], found["NUMBER"]
    packed = pickle.dumps(kept)
    assert log == [], "who packs it does not need it"
    heavy, thing, number = pickle.loads(packed)
    assert heavy is sys.modules["heavy"] and thing is heavy.Thing and number == 7


def test_in_a_container_all_is_imported_at_once(log: list[str], tmp_path: Path) -> None:
    program = f"""
import builtins, sys, types
builtins.LOG = []
sys.path[:0] = {sys.path[:2]!r}
sys.modules["woodfrog.worker.state"] = types.ModuleType("state")
import woodfrog
with woodfrog.Image.debian_slim().imports():
    import heavy.deep.er
assert LOG == ["heavy", "deep", "deeper"], LOG
assert "wrapt" not in sys.modules
try:
    with woodfrog.Image.debian_slim().imports():
        import nothing_of_this_name
except ImportError:
    print("raised")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "raised\n", done.stderr
