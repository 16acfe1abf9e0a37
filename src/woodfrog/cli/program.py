"""The user's program: import it, choose what to run in it, and make options of a function's parameters.

Everything that can be wrong with it is a `SpecError` of one line.
"""

from __future__ import annotations

import argparse
import ast
import enum
import inspect
import json
import os
import sys
import sysconfig
import traceback
import types
import typing
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Any, Literal, NoReturn

from woodfrog.errors import SpecError, WoodfrogError

__all__ = ["Reference", "arguments_from", "class_parameters", "load", "parse_reference", "pick"]

OWN = Path(__file__).resolve().parent.parent
LIBRARIES = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))


@dataclass(frozen=True)
class Reference:
    """`FILE`, `FILE::NAME`, or with `-m` the same with a dotted module name."""

    source: str
    name: str | None
    module: bool


def parse_reference(text: str, *, module: bool = False) -> Reference:
    """Split `FILE::NAME`.

    Raises:
        SpecError: nothing before or after the `::`, or an option in its place.
    """
    source, colons, name = text.partition("::")
    if source.startswith("-"):
        raise SpecError(f"no such option: {text} (see --help)", code="bad-reference")
    if not source or (colons and not name):
        raise SpecError(f"{text!r}: expected {'MODULE' if module else 'FILE'} or FILE::NAME", code="bad-reference")
    return Reference(source, name or None, module)


def load(reference: Reference) -> types.ModuleType:
    """Import the program.

    Raises:
        SpecError: no such file or module, a syntax error, or an exception of its own (its traceback is printed).
    """
    from woodfrog.sdk.source import import_program

    source = reference.source
    if reference.module:
        if source.endswith(".py") or "/" in source:
            raise SpecError(f"{source!r} is a file, -m takes a module: woodfrog run {source}", code="no-module")
        target = source
    else:
        path = Path(source).absolute()
        if path.is_dir():
            raise SpecError(f"{source} is a directory: name a file in it, or a package with -m", code="no-file")
        if not path.is_file():
            hint = " (to run a module: -m)" if path.suffix != ".py" and "/" not in source else ""
            raise SpecError(f"file not found: {source}{hint}", code="no-file")
        if path.suffix != ".py":
            raise SpecError(f"{source} is not a Python file (.py)", code="no-file")
        target = str(path)
    with _importing(source):
        return import_program(target)


@contextmanager
def _importing(what: str) -> Iterator[None]:
    try:
        yield
    except WoodfrogError as e:
        frames = user_frames(e)
        if frames and not any(f"{name}:" in e.message for name in (frames[-1].filename, _short(frames[-1].filename))):
            e.message = f"{_short(frames[-1].filename)}:{frames[-1].lineno}: {e.message}"
        e.message = e.message.removeprefix(os.getcwd() + "/")
        raise
    except (Exception, SystemExit) as e:
        frames = user_frames(e)
        if frames:
            sys.stderr.write("Traceback (most recent call last):\n" + "".join(traceback.format_list(frames)))
        where = f" ({_short(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
        problem = "".join(traceback.format_exception_only(e)).strip().splitlines()[-1]
        if isinstance(e, SystemExit):
            problem = f"it called sys.exit({e.code!r}) while being imported"
        raise SpecError(f"cannot import {what}: {problem}{where}", code="import-failed") from e


def user_frames(error: BaseException) -> list[traceback.FrameSummary]:
    """The frames of the traceback that are neither ours, nor the import system's, nor an installed library's."""
    frames = []
    for frame in traceback.extract_tb(error.__traceback__):
        path = frame.filename
        if path.startswith("<frozen ") or Path(path).is_relative_to(OWN) or path.startswith(LIBRARIES):
            continue
        frames.append(frame)
    return frames


def _short(path: str) -> str:
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative


def pick(candidates: dict[str, Any], name: str | None, *, what: str, source: str, prefer: Sequence[str] = ()) -> Any:
    """The candidate called `name`; without a name the only one, or the only one among `prefer`.

    Raises:
        SpecError: none there, no such name, or several and none named; the message lists them.
    """
    names = ", ".join(sorted(candidates))
    if not candidates:
        raise SpecError(f"{source}: no {what} found in it", code="nothing-to-run")
    if name is not None:
        if name in candidates:
            return candidates[name]
        raise SpecError(f"{source}: no {what} named {name!r}; there are: {names}", code="no-such-name")
    for group in (list(prefer), list(candidates)):
        if len(group) == 1:
            return candidates[group[0]]
        if group:
            break
    shown = ", ".join(sorted(prefer or candidates))
    raise SpecError(f"{source}: several {what}s ({shown}): choose one with {source}::NAME", code="ambiguous")


# --- options from a signature ----------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SpecError(f"{self.prog}: {message} (see its --help)", code="bad-arguments")


def _boolean(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text)


def _day(text: str) -> date:
    return date.fromisoformat(text)


def _object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError
    return value


_moment.__name__, _day.__name__, _object.__name__ = "date and time", "date", "JSON object"
CONVERTERS: dict[Any, Callable[[str], Any]] = {
    bytes: str.encode,
    dict: _object,
    Mapping: _object,
    str: str,
    int: int,
    float: float,
    Path: Path,
    datetime: _moment,
    date: _day,
    Any: str,
    object: str,
}


def _option(hint: Any, where: str) -> dict[str, Any]:
    """argparse's keywords for one annotation."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _option(args[0], where)
    if origin in (typing.Union, types.UnionType):
        inner = [a for a in args if a is not type(None)]
        return _option(inner[0], where) if len(inner) == 1 else _either(hint, inner, where)
    if (meant := getattr(hint, "__supertype__", None)) is not None:
        return _option(meant, where)
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if origin is Literal and len({type(a) for a in args}) == 1 and type(args[0]) in (str, int):
        return {"type": type(args[0]), "choices": list(args)}
    if origin in (list, Sequence) and len(args) == 1 and "action" not in (one := _one(args[0], where)):
        return {**one, "action": "append"}
    if hint is list:
        return {"type": str, "action": "append"}
    if origin in (dict, Mapping):
        hint = origin
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        kind = hint

        def member(text: str) -> enum.Enum:
            try:
                return kind[text]
            except KeyError:
                raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(kind.__members__)}") from None

        return {"type": member, "metavar": "{" + ",".join(kind.__members__) + "}"}
    if isinstance(hint, Hashable) and hint in CONVERTERS:
        return {"type": CONVERTERS[hint]} | ({"metavar": "JSON"} if CONVERTERS[hint] is _object else {})
    shown = getattr(hint, "__name__", str(hint))
    raise SpecError(f"{where} has the type {shown}, which no option can give", code="bad-parameter-type")


def _one(hint: Any, where: str) -> dict[str, Any]:
    """The keywords of an option with a value; a list's has an action all the same."""
    return {"type": _boolean} if hint is bool else _option(hint, where)


def _either(hint: Any, kinds: Sequence[Any], where: str) -> dict[str, Any]:
    """The first of several types that a text is of. "1" is a number before it is true; any text is a `str`."""
    options = [_one(kind, where) for kind in sorted(kinds, key=lambda kind: (kind is str, kind is bool))]
    if any(o.keys() & {"action", "choices"} for o in options):
        raise SpecError(f"{where} has the type {hint}, which no option can give", code="bad-parameter-type")

    def convert(text: str) -> Any:
        for option in options:
            with suppress(ValueError, argparse.ArgumentTypeError):
                return option["type"](text)
        raise argparse.ArgumentTypeError(f"{text!r} is not of the type {hint}")

    return {"type": convert}


def class_parameters(texts: Mapping[str, str]) -> dict[str, tuple[Any, Any]]:
    """A class's parameters by name, each with its type and default, from what its spec says: `{"size": "int = 3"}`."""
    kinds: dict[str, type] = {kind.__name__: kind for kind in (str, int, bool, float, bytes)}
    found: dict[str, tuple[Any, Any]] = {}
    for name, text in texts.items():
        kind, equals, default = text.partition(" = ")
        value: Any = inspect.Parameter.empty
        if equals:
            try:
                value = ast.literal_eval(default)
            except (ValueError, SyntaxError):  # such as `inf`
                value = kinds.get(kind, str)(default)
        found[name] = kinds.get(kind, str), value
    return found


def _add(parser: _Parser, name: str, hint: Any, default: Any, label: str, *, of: str = "") -> None:
    """An option for one parameter. One of a type that none can give, with a default, is there to say so."""
    missing = default is inspect.Parameter.empty
    if hint is None:
        hint = type(default) if not missing and type(default) in (*CONVERTERS, bool) else str
    try:
        option = _option(hint, f"{label}: parameter {name!r}")
    except SpecError as e:
        if missing:
            raise
        trouble = e.message.removeprefix(f"{label}: ")

        def refuse(text: str) -> NoReturn:
            raise argparse.ArgumentTypeError(f"{trouble}: it is left at its default")

        option = {"type": refuse, "metavar": "-"}
        of += "cannot be given here; "
    if option.get("action") == "append":
        of += "once for each item; "
    option["help"] = (of + ("required" if missing else f"default: {default!r}")).replace("%", "%%")
    flag = "--" + name.replace("_", "-")
    parser.add_argument(flag, dest=name, required=missing, default=argparse.SUPPRESS, **option)


def arguments_from(
    function: Callable[..., Any],
    argv: Sequence[str],
    *,
    label: str,
    skip_self: bool = False,
    constructor: Mapping[str, tuple[Any, Any]] | None = None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Turn `--name value` options into the function's arguments, by its annotations.

    `str`, `int`, `float`, `bool` (`--x` and `--no-x`), `bytes` (as UTF-8), `Path`, `datetime`, `date`, `Enum`,
    `Literal`, `dict` (as JSON), `list[...]` (repeat the option), and `Optional` or a union of these; without an
    annotation the type of the default, else text. Underscores in names become dashes. A `*args` parameter takes all
    that is left over.

    Args:
        constructor: further options by name, each with its annotation and default: those of the method's class.

    Raises:
        SpecError: an unknown or missing option, a value of the wrong type, or a type that has no form as an option.
    """
    try:
        signature = inspect.signature(function)  # evaluates them from Python 3.14 on
        hints = typing.get_type_hints(function, include_extras=True)
    except Exception as e:
        raise SpecError(f"{label}: its annotations cannot be resolved: {e}", code="bad-parameter-type") from e
    style = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog=label, description=inspect.getdoc(function), allow_abbrev=False, formatter_class=style)
    parameters = list(signature.parameters.values())[1 if skip_self else 0 :]
    rest: str | None = None
    for parameter in parameters:
        if parameter.kind is parameter.VAR_KEYWORD:
            continue
        if parameter.kind is parameter.VAR_POSITIONAL:
            rest = parameter.name
            continue
        if parameter.name in (constructor or ()):
            message = f"{label}: {parameter.name!r} is a parameter of the class and of the method: rename one"
            raise SpecError(message, code="bad-parameter")
        _add(parser, parameter.name, hints.get(parameter.name), parameter.default, label)
    for name, (hint, default) in (constructor or {}).items():
        _add(parser, name, hint, default, label, of="of the class, ")
    if rest is not None:
        known, extra = parser.parse_known_args(list(argv))
        extra = [a for a in extra if a != "--"]
    else:
        known, extra = parser.parse_args(list(argv)), []
    values = vars(known)
    by_place = [inspect.Parameter.POSITIONAL_ONLY, *([inspect.Parameter.POSITIONAL_OR_KEYWORD] if extra else [])]
    positional = [p.name for p in parameters if p.kind in by_place]
    args: list[Any] = []
    for name in positional:
        if name in values:
            args.append(values.pop(name))
        else:
            args.append(signature.parameters[name].default)
    return (*args, *extra), values
