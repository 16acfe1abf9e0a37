"""Finds calls of one function to another, which fail in a container, before there is one.

Read from the source: what is found is certain to be such a call when its line is reached, and many are not found
(through variables, helper functions, nested functions). What stands in a `try`, or in a function that asks where it
runs, is the program's own business.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from types import FunctionType, ModuleType
from typing import Any

from woodfrog.sdk import checks
from woodfrog.sdk.cls import Cls, Method, hooks
from woodfrog.sdk.functions import Function

__all__ = ["Inner", "calls_of"]

_VERBS = frozenset({"remote", "remote_gen", "map", "starmap", "for_each", "spawn", "spawn_map"})
_WHERE = frozenset({"is_local", "is_inside", "MODAL_IS_REMOTE", "MODAL_TASK_ID"})
"""What a function that asks where it runs has in it."""
_Def = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Inner:
    """One call, as it is written."""

    text: str
    """`square.remote`, `Model().run.spawn`."""
    local: str
    """How to call it in the same process instead; "" where its code is not there."""
    on_client: bool
    """Whether the very call works on the client."""
    where: str
    """`file:line`."""


def calls_of(handle: Function[..., Any, Any] | Cls) -> Iterator[tuple[str, Inner]]:
    """The calls that a function, or a class's methods and hooks, make in a container; each with who makes it."""
    if isinstance(handle, Function):
        yield from ((handle.tag, call) for call in _calls(handle.get_raw_f(), None))
        return
    cls = handle._get_user_cls()
    for name in dir(cls):
        method = inspect.getattr_static(cls, name)
        if isinstance(method, Method):
            yield from ((f"{handle.tag}.{name}", call) for call in _calls(method.raw_f, cls))
    for hook in (*hooks(cls, "enter", True), *hooks(cls, "enter"), *hooks(cls, "exit")):
        yield from ((f"{handle.tag}.{hook.__name__}", call) for call in _calls(hook, cls))


def _calls(raw: Callable[..., Any], cls: type | None) -> Iterator[Inner]:
    if not isinstance(raw, FunctionType):
        return
    file = raw.__code__.co_filename
    found = _definitions(file).get((raw.__qualname__, raw.__code__.co_firstlineno))
    if found is None or _asks_where(found):
        return
    reader = _Reader(found, raw, cls)
    for node in _reached(found):
        if isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Attribute) and called.attr == "aio":
                called = called.value
            if isinstance(called, ast.Attribute) and called.attr in _VERBS and reader.is_function(called.value):
                text, own = ast.unparse(called.value), reader.is_own(called.value)
                local = "" if "from_name" in text else f"{text}.local()"
                yield Inner(f"{text}.{called.attr}", local, not own, f"{checks.short(file)}:{node.lineno}")


@lru_cache(maxsize=64)
def _definitions(file: str) -> dict[tuple[str, int], _Def]:
    """Functions and methods of a file by qualified name and first line, that of the first decorator."""
    try:
        with open(file, "rb") as f:
            tree = ast.parse(f.read())
    except (OSError, SyntaxError, ValueError):
        return {}
    found: dict[tuple[str, int], _Def] = {}
    todo: list[tuple[str, ast.stmt]] = [("", statement) for statement in tree.body]
    while todo:
        before, node = todo.pop()
        if isinstance(node, _Def):
            found[before + node.name, min([node.lineno, *(d.lineno for d in node.decorator_list)])] = node
        elif isinstance(node, ast.ClassDef):
            todo += [(f"{before}{node.name}.", statement) for statement in node.body]
        elif isinstance(node, ast.If):
            todo += [(before, statement) for statement in (*node.body, *node.orelse)]
    return found


def _reached(function: _Def) -> Iterator[ast.AST]:
    """What runs when the function does, as far as that is certain."""
    todo: list[ast.AST] = list(function.body)
    while todo:
        node = todo.pop(0)
        if isinstance(node, _Def | ast.Lambda | ast.ClassDef | ast.Try | ast.TryStar):
            continue
        yield node
        todo += ast.iter_child_nodes(node)


def _asks_where(function: _Def) -> bool:
    return any(
        getattr(node, at, None) in _WHERE
        for node in ast.walk(function)
        for kind, at in ((ast.Name, "id"), (ast.Attribute, "attr"), (ast.Constant, "value"))
        if isinstance(node, kind)
    )


class _Reader:
    """What the expressions of one function stand for."""

    def __init__(self, definition: _Def, raw: FunctionType, cls: type | None) -> None:
        self._globals, self._cls = raw.__globals__, cls
        arguments = definition.args
        first = [*arguments.posonlyargs, *arguments.args][:1]
        self._self = first[0].arg if cls is not None and first else None
        self._own: set[str] = set()
        """Names that the function gives a meaning of its own somewhere."""
        for node in ast.walk(definition):
            if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
                self._own.add(node.id)
            elif isinstance(node, ast.arg):
                self._own.add(node.arg)
            elif isinstance(node, ast.alias):
                self._own.add((node.asname or node.name).partition(".")[0])
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node is not definition:
                self._own.add(node.name)

    def is_own(self, node: ast.expr) -> bool:
        """Whether it is a method of `self`."""
        return (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == self._self
            and self._is_method(self._cls, node.attr)
        )

    def is_function(self, node: ast.expr) -> bool:
        """Whether it is a handle, a method's too."""
        if isinstance(node, ast.Attribute):
            if self.is_own(node):
                return True
            made = node.value.func if isinstance(node.value, ast.Call) else None
            cls = self._value(made) if made is not None else None
            if type(cls) is Cls:
                return cls._user_cls is None or self._is_method(cls._user_cls, node.attr)
            if made is not None and self._named(made) is Cls:
                return True
        if isinstance(node, ast.Call):
            return self._named(node.func) is Function
        return type(self._value(node)) is Function

    @staticmethod
    def _is_method(cls: type | None, name: str) -> bool:
        return isinstance(inspect.getattr_static(cls, name, None), Method)

    def _named(self, node: ast.expr) -> Any:
        """`Function` or `Cls`, for the `from_name` of these; for a `Cls` that was found so, too."""
        if isinstance(node, ast.Attribute) and node.attr == "from_name":
            return self._value(node.value)
        if isinstance(node, ast.Call) and self._named(node.func) is Cls:
            return Cls
        return None

    def _value(self, node: ast.expr) -> Any:
        """What a global name, or a name of a module, is now; None where it is not known."""
        if isinstance(node, ast.Name):
            return None if node.id in self._own else self._globals.get(node.id)
        if isinstance(node, ast.Attribute):
            value = self._value(node.value)
            if type(value) is not ModuleType:  # not what `image.imports()` put off
                return None
            if value.__name__ == "woodfrog":
                return {"Function": Function, "Cls": Cls}.get(node.attr)
            return vars(value).get(node.attr)
        return None
