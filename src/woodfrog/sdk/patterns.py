"""Patterns of file names as in .dockerignore, for `ignore=` of images."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path, PurePath

from woodfrog.errors import SpecError
from woodfrog.sdk import checks
from woodfrog.sdk.hooks import in_worker

__all__ = ["FilePatternMatcher"]


class FilePatternMatcher:
    """Says of a relative path whether patterns match it; `~` turns that round.

    Args:
        patterns: as in .dockerignore, from the top of the directory: `*` and `?` stay within one name, `**` stands for
            any number of directories, and what matches a directory matches all in it. One that begins with "!" takes
            back.

    Raises:
        SpecError: a pattern that is none.

    Example:
        >>> import woodfrog
        >>> from pathlib import Path
        >>> python_only = ~woodfrog.FilePatternMatcher("**/*.py")
        >>> python_only(Path("data/x.bin")), python_only(Path("lib/a.py"))
        (True, False)
    """

    def __init__(self, *patterns: str) -> None:
        self._rules: list[tuple[bool, int, re.Pattern[str]]] = []
        """Whether it takes back, how many names deep it goes, and what it matches."""
        for text in patterns:
            if not isinstance(text, str):
                raise SpecError(f"FilePatternMatcher: expected a pattern, got {text!r} ({checks.caller()})")
            stripped = text.strip()
            back = stripped.startswith("!")
            pattern = stripped.removeprefix("!").strip().strip("/").removeprefix("./")
            if back and not pattern:
                raise SpecError(f"FilePatternMatcher: {text!r} is no pattern ({checks.caller()})")
            if not pattern:
                continue
            try:
                self._rules.append((back, pattern.count("/") + 1, re.compile(_expression(pattern), re.DOTALL)))
            except re.error as e:
                raise SpecError(f"FilePatternMatcher: {text!r} is no pattern: {e} ({checks.caller()})") from None

    @classmethod
    def from_file(cls, file_path: str | Path) -> FilePatternMatcher:
        """The patterns of a file, one a line; lines that begin with "#" are left out.

        Raises:
            SpecError: it cannot be read.
        """
        if in_worker():  # the files are the client's
            return cls()
        try:
            lines = Path(file_path).read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            why = getattr(e, "strerror", None) or e
            raise SpecError(f"FilePatternMatcher: {file_path}: {why} ({checks.caller()})") from None
        return cls(*(line for line in lines if line.strip() and not line.startswith("#")))

    def __call__(self, path: PurePath) -> bool:
        names = PurePath(path).parts
        matched = False
        for back, depth, expression in self._rules:
            if matched is back and self._one(expression, depth, names):
                matched = not back
        return matched

    @staticmethod
    def _one(expression: re.Pattern[str], depth: int, names: tuple[str, ...]) -> bool:
        """What matches the path, or a directory that it is in."""
        if expression.fullmatch("/".join(names)):
            return True
        return depth < len(names) and bool(expression.fullmatch("/".join(names[:depth])))

    def __invert__(self) -> Callable[[PurePath], bool]:
        return lambda path: not self(path)


def _expression(pattern: str) -> str:
    found, at = [], 0
    while at < len(pattern):
        if pattern.startswith("**", at):
            at += 2
            if at == len(pattern):
                found.append(".*")
            else:
                at += pattern.startswith("/", at)
                found.append("(?:.*/)?")
        elif pattern[at] == "*":
            found.append("[^/]*")
            at += 1
        elif pattern[at] == "?":
            found.append("[^/]")
            at += 1
        elif pattern[at] == "[" and (end := pattern.find("]", at + 2)) > 0:
            found.append("[" + pattern[at + 1 : end].replace("[", r"\[") + "]")
            at = end + 1
        elif pattern[at] == "\\" and at + 1 < len(pattern):
            found.append(re.escape(pattern[at + 1]))
            at += 2
        else:
            found.append(re.escape(pattern[at]))
            at += 1
    return "".join(found)
