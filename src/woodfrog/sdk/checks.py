"""Checks of what a program hands to the SDK, and the notes it prints. Messages are one line and say what to change."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from woodfrog.errors import MissingNameError, SpecError
from woodfrog.sdk.hooks import in_worker

__all__ = [
    "be_quiet",
    "caller",
    "environment",
    "known",
    "lacking",
    "name",
    "nearest",
    "note",
    "number",
    "tell",
    "tell_lacking",
    "text_dict",
    "whole",
]

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_NOT_CALLERS = (_PACKAGE, "<frozen importlib.")
C = TypeVar("C", bound=type)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_noted: set[str] = set()
_quiet = False


def caller() -> str:
    """`file:line` of the nearest frame outside woodfrog."""
    frame = sys._getframe(1)
    while frame.f_back is not None and (
        frame.f_code.co_filename.startswith(_NOT_CALLERS)
        # What dataclasses made for ours is in no file.
        or (frame.f_code.co_filename == "<string>" and frame.f_globals.get("__name__", "").startswith("woodfrog."))
    ):
        frame = frame.f_back
    return f"{short(frame.f_code.co_filename)}:{frame.f_lineno}"


def short(path: str) -> str:
    """`path` relative to the working directory where that is shorter."""
    try:
        relative = os.path.relpath(path)
    except (OSError, ValueError):
        return path
    return relative if os.path.isabs(path) and not relative.startswith("..") else path


def be_quiet(quiet: bool) -> None:
    """Whether notes are kept from the user, who asked for that."""
    global _quiet
    _quiet = quiet


def note(key: str, text: str) -> None:
    """Print a note to stderr, once in a process for each `key`; never inside a container."""
    if _quiet or key in _noted or in_worker():
        return
    _noted.add(key)
    tell(text)


def tell(text: str) -> None:
    """Print a note to stderr, each time."""
    if not _quiet and not in_worker():
        print(f"woodfrog: note: {text}", file=sys.stderr)


def settle_imports() -> None:
    """Before code of the container runs here: what `image.imports()` put off."""
    deferred = sys.modules.get("woodfrog.sdk.deferred")
    if deferred is not None:
        deferred.settle()


def nearest(word: str, known: Any) -> str:
    """`; did you mean 'x'?`, or nothing."""
    from difflib import get_close_matches

    found = get_close_matches(word, list(known), 1)
    return f"; did you mean {found[0]!r}?" if found else ""


class _Lacking:
    """A name that Modal's class has, and what to do without it. An AttributeError, so that `hasattr` says no."""

    def __init__(self, name: str, instead: str) -> None:
        self._name, self._instead = name, instead

    def __get__(self, instance: Any, owner: type) -> Any:
        raise MissingNameError(
            f"{owner.__name__}.{self._name}: not in woodfrog yet: {self._instead} ({caller()})", code="not-yet"
        )


def lacking(names: Mapping[str, str]) -> Callable[[C], C]:
    """Decorates a class that Modal has with more names: each is an error that says what to do instead.

    Type checkers do not see them.
    """

    def add(cls: C) -> C:
        for name, instead in names.items():
            setattr(cls, name, _Lacking(name, instead))
        return cls

    return add


def tell_lacking(handle: Any, name: str) -> None:
    """For the `__getattr__` of a class with names that are `lacking`: Python asks it after their error, too.

    Raises:
        MissingNameError: it is one of these.
    """
    for klass in type(handle).__mro__:
        if isinstance(found := vars(klass).get(name), _Lacking):
            found.__get__(handle, type(handle))


def known(what: str, given: Iterable[str], names: Iterable[str]) -> None:
    """Of parameters that are accepted without effect: that they are Modal's.

    Raises:
        TypeError: an unknown one; names the nearest.
    """
    names = list(names)
    for key in given:
        if key not in names:
            raise TypeError(f"{what} has no parameter {key!r}{nearest(key, names)} ({caller()})")


def name(value: Any, what: str) -> str:
    """A name as it may stand in a URL and in a file system.

    Raises:
        SpecError: anything else.
    """
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise SpecError(
            f"{what}: {value!r} is not a name (letters, digits, '.', '_' and '-', beginning with a letter or digit, "
            "at most 63)",
            code="bad-name",
        )
    return value


def number(value: Any, *, above: float | None = None, least: float | None = None, most: float | None = None) -> float:
    """A finite number within bounds.

    Raises:
        TypeError, ValueError: with the words to put behind the parameter's name.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"expected a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"expected a finite number, got {value!r}")
    if above is not None and value <= above:
        raise ValueError(f"must be more than {above}, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"must be at least {least}, got {value!r}")
    if most is not None and value > most:
        raise ValueError(f"must be at most {most}, got {value!r}")
    return value


def whole(value: Any, *, least: int = 0, most: int | None = None) -> int:
    """A whole number within bounds.

    Raises:
        TypeError, ValueError: with the words to put behind the parameter's name.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"expected a whole number, got {value!r}")
    return int(number(value, least=least, most=most))


def text_dict(value: Any) -> dict[str, str]:
    """Names and texts of an environment.

    Raises:
        TypeError, ValueError: with the words to put behind the parameter's name.
    """
    if not isinstance(value, Mapping):
        raise TypeError(f"expected a dict of str to str, got {type(value).__name__}")
    for key, text in value.items():
        if not isinstance(key, str) or not isinstance(text, str):
            raise TypeError(f"expected str to str, got {key!r}: {type(text).__name__}")
        if not key or "=" in key or "\0" in key or "\0" in text:
            raise ValueError(f"{key!r} cannot stand in an environment")
    return dict(value)


def environment(value: Any, where: str) -> dict[str, str]:
    """`text_dict` with a SpecError that names `where`."""
    try:
        return text_dict(value)
    except (TypeError, ValueError) as e:
        raise SpecError(f"{where}: {e}") from None
