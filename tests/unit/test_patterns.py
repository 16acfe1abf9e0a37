"""`FilePatternMatcher`: patterns as in .dockerignore."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import woodfrog
from woodfrog.errors import SpecError


@pytest.mark.parametrize(
    ("patterns", "yes", "no"),
    [
        (["*.py"], ["a.py", ".py"], ["d/a.py", "a.pyc", "a/py"]),
        (["**/*.py"], ["a.py", "d/a.py", "d/e/a.py"], ["a.pyc"]),
        (["data"], ["data", "data/x", "data/x/y"], ["data2", "d/data"]),
        (["/data/", "./x"], ["data/x", "x"], ["d/data/x"]),
        (["**/cache"], ["cache", "a/cache", "a/b/cache"], ["cached"]),
        (["data/**"], ["data/x", "data/x/y"], ["data"]),
        (["a?c", "[xy]z", "[^m]n", r"q\*"], ["abc", "xz", "on", "q*"], ["a/c", "zz", "mn", "qq"]),
        (["a.b", "c$", "(d)", "e+"], ["a.b", "c$", "(d)", "e+"], ["axb", "c", "d", "ee"]),
        (["**", "!**/*.py"], ["a", "d/a"], ["a.py", "d/a.py"]),
        (["*.py", "!a.py", "a.p?"], ["a.py", "b.py"], []),
        ([], [], ["a"]),
        (["  ", "# x"], ["# x"], ["a"]),
    ],
)
def test_patterns(patterns: list[str], yes: list[str], no: list[str]) -> None:
    matcher = woodfrog.FilePatternMatcher(*patterns)
    assert [p for p in (*yes, *no) if matcher(Path(p))] == yes
    assert [p for p in (*yes, *no) if (~matcher)(Path(p))] == no


def test_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "ignore").write_text("# comment\n\n**/*.bin\n!keep.bin\n")
    matcher = woodfrog.FilePatternMatcher.from_file(tmp_path / "ignore")
    assert (matcher(Path("a/x.bin")), matcher(Path("keep.bin")), matcher(Path("# comment"))) == (True, False, False)
    with pytest.raises(SpecError, match=r"none: No such file .*test_patterns.py:\d+"):
        woodfrog.FilePatternMatcher.from_file(tmp_path / "none")


@pytest.mark.parametrize("pattern", ["!", "[z-a]", 3])
def test_what_is_no_pattern(pattern: Any) -> None:
    with pytest.raises(SpecError, match=r"pattern.*test_patterns.py:\d+"):
        woodfrog.FilePatternMatcher(pattern)


def test_in_an_image(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    for name in ("a.py", "b.bin", "d/c.py", "d/e.bin"):
        (tmp_path / name).write_text("")
    only = ~woodfrog.FilePatternMatcher("**/*.py")
    image = woodfrog.Image.debian_slim().add_local_dir(tmp_path, "/root/x", ignore=only)
    assert image.spec.files[0].ignore == ("/b.bin", "/d/e.bin")
