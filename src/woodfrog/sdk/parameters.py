"""What a constructor takes, as its class's spec says it, and one form for all ways of giving the same."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Mapping
from typing import Any

__all__ = ["PLAIN", "annotations_of", "by_name", "described", "signature", "signature_of"]

if sys.version_info >= (3, 14):
    # Annotations are evaluated when they are asked for, and may name what only type checkers import.
    from annotationlib import Format

    def annotations_of(cls: type) -> Mapping[str, Any]:
        return inspect.get_annotations(cls, format=Format.FORWARDREF)

    def signature(cls: type) -> inspect.Signature:
        return inspect.signature(cls, annotation_format=Format.FORWARDREF)

else:
    annotations_of, signature = inspect.get_annotations, inspect.signature

PLAIN = (str, int, float, bool, bytes, type(None))
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def described(user_cls: type) -> dict[str, str] | None:
    """A constructor's parameters as in `FunctionSpec.constructor`; None where they cannot all be given by name."""
    try:
        parameters = signature(user_cls).parameters.values()
    except (ValueError, TypeError):  # some classes of C code tell no signature
        return None
    found: dict[str, str] = {}
    for p in parameters:
        if p.kind not in _BY_NAME:
            return None
        if p.kind is p.KEYWORD_ONLY:
            found.setdefault("*", "")
        kind = "" if p.annotation is p.empty else inspect.formatannotation(p.annotation).replace(" = ", "=")
        found[p.name] = kind if p.default is p.empty else f"{kind} = {_text(p.default)}"
    return found


def _text(default: Any) -> str:
    """A default that can be read back, else "..."."""
    text = repr(default)
    if type(default) not in PLAIN:
        return "..."
    try:
        return text if _alike(ast.literal_eval(text), default) else "..."
    except (ValueError, SyntaxError):  # such as `inf`
        return "..."


def signature_of(constructor: Mapping[str, str]) -> inspect.Signature:
    """Inverse of `described`, without annotations; a default of "..." is an `Ellipsis`."""
    kind: Any = inspect.Parameter.POSITIONAL_OR_KEYWORD
    found = []
    for name, text in constructor.items():
        if name == "*":
            kind = inspect.Parameter.KEYWORD_ONLY
            continue
        _, equals, default = text.partition(" = ")
        value = ast.literal_eval(default) if equals else inspect.Parameter.empty
        found.append(inspect.Parameter(name, kind, default=value))
    return inspect.Signature(found)


def _alike(value: Any, default: Any) -> bool:
    return type(value) is type(default) and type(value) in PLAIN and repr(value) == repr(default)


def by_name(
    takes: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments by name and without plain ones that equal their default, so that all who mean the same share
    containers and snapshots.

    Raises:
        TypeError: the constructor does not take them.
    """
    bound = takes.bind(*args, **kwargs)
    parameters = takes.parameters
    if any(p.kind not in _BY_NAME for p in parameters.values()):
        return args, kwargs
    return (), {k: v for k, v in bound.arguments.items() if not _alike(v, parameters[k].default)}
