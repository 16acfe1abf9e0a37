"""What a program imports first, read from its source without running any of it.

Only what a plain start would surely import, before anything that could change how it imports, is found: the scan ends
at the first statement that might (a call into unknown code, an assignment to `os.environ[...]`, a condition that only
running it decides). What stands behind is for the program itself to import.

A *step* is "module", or "module:name" for what `from module import name` does after importing the module.
"""

from __future__ import annotations

import ast
import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

__all__ = ["OURS", "Source", "installed", "local_source", "scan", "serves"]

OURS = "woodfrog.sdk.app"
"""What every program that imports woodfrog imports of it."""
_MAX_SOURCE = 4 << 20


class _Stop(Exception):
    """From here on only running the program tells what it imports."""


class _Missing(Exception):
    """An import that will fail."""


_PURE = frozenset({
    "abc.abstractmethod", "classmethod", "contextlib.contextmanager", "functools.cache", "functools.lru_cache",
    "functools.wraps", "property", "staticmethod", "typing.overload",
    "bool", "bytes", "dict", "float", "frozenset", "int", "len", "list", "max", "min", "object", "print", "range",
    "set", "sorted", "str", "tuple", "collections.namedtuple", "dataclasses.dataclass", "dataclasses.field",
    "logging.getLogger", "os.environ.get", "os.getcwd", "os.getenv", "os.path.abspath", "os.path.basename",
    "os.path.dirname", "os.path.exists", "os.path.join", "pathlib.Path", "re.compile", "time.monotonic",
    "time.perf_counter", "time.time", "typing.NewType", "typing.TypeVar", "typing.cast",
})  # fmt: skip
"""Calls after which the next import does what it would have done before."""

Source = tuple[str, bool]
"""A module's text, and whether it is a package."""


def scan(module: str, source: Callable[[str], Source | None], has: Callable[[str], bool]) -> tuple[str, ...]:
    """The steps by which importing a program's `module` begins, in order, as far as they lead outside the program.

    woodfrog's own comes first: it has no part in how others are imported.

    Args:
        source: the program's own modules by dotted name; None = not the program's.
        has: whether the environment has a top-level module of that name.

    Example:
        >>> scan("app", {"app": ("import json, numpy\\nfrom torch import nn", False)}.get, lambda name: True)
        ('numpy', 'torch', 'torch:nn')
    """
    scanner = _Scanner(source, has)
    with contextlib.suppress(_Stop, _Missing):
        scanner.enter(module)
    ours = (OURS,) if OURS in scanner.found else ()
    return (*ours, *(step for step in scanner.found if step != OURS))


def serves(done: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether a process that has `done` these steps is as one that goes through the `wanted` would be on its way.

    Args:
        done: steps in order; in parentheses are those that loaded nothing any more.

    Example:
        >>> serves(["torch", "(torch:nn)", "pandas"], ["torch", "torch:nn", "pandas", "scipy"])
        True
        >>> serves(["torch", "pandas"], ["torch", "scipy", "pandas"]), serves(["torch"], ["numpy", "torch"])
        (False, False)
    """
    passed: set[str] = set()
    at = 0

    def skip() -> None:
        nonlocal at
        while at < len(done) and done[at].startswith("("):
            passed.add(done[at].strip("()"))
            at += 1

    skip()
    for step in wanted:
        if at == len(done):
            return True
        if step == done[at]:
            passed.add(step)
            at += 1
            skip()
        elif step not in passed and not any(p.startswith((f"{step}.", f"{step}:")) for p in passed):
            return False
    return at == len(done)


class _Scanner:
    def __init__(self, source: Callable[[str], Source | None], has: Callable[[str], bool]) -> None:
        self._source = source
        self._has = has
        self._entered: set[str] = set()
        self.found: dict[str, None] = {}

    def enter(self, name: str) -> None:
        """Go through a module of the program's own, its packages first."""
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            self._enter_one(".".join(parts[:end]))

    def _enter_one(self, name: str) -> None:
        if name in self._entered:
            return
        self._entered.add(name)
        entry = self._source(name)
        if entry is None:
            raise _Missing
        text, is_package = entry
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise _Stop from None
        package = name if is_package else name.rpartition(".")[0]
        _Module(self, package).body(tree.body)

    def outside(self, module: str, names: Iterable[str] = ()) -> None:
        top = module.partition(".")[0]
        if top in sys.stdlib_module_names:
            return
        if top == "woodfrog":
            self.found[OURS] = None
        elif self._has(top):
            self.found[module] = None
            self.found.update((f"{module}:{name}", None) for name in names if name != "*")
        else:
            raise _Missing

    def own(self, module: str) -> bool:
        """Whether the program has it. One that hides a module of the standard library is too clever for us."""
        top = module.partition(".")[0]
        if self._source(top) is None:
            return False
        if top in sys.stdlib_module_names or top == "woodfrog":
            raise _Stop
        return True

    def exists(self, module: str) -> bool:
        return self._source(module) is not None


class _Module:
    """One module's statements, and what its names stand for."""

    def __init__(self, scanner: _Scanner, package: str) -> None:
        self._scanner = scanner
        self._package = package
        self._names: dict[str, str] = {}

    def body(self, statements: Sequence[ast.stmt]) -> None:
        for statement in statements:
            self._statement(statement)

    def _statement(self, s: ast.stmt) -> None:
        match s:
            case ast.Import():
                for alias in s.names:
                    self._import(alias)
            case ast.ImportFrom():
                self._import_from(s)
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                defaults = [d for d in (*s.args.defaults, *s.args.kw_defaults) if d is not None]
                self._expressions(*defaults)
                self._decorators(s.decorator_list)
                self._names[s.name] = f".{s.name}"
            case ast.ClassDef():
                self._expressions(*s.bases, *(k.value for k in s.keywords))
                self._decorators(s.decorator_list)
                self.body(s.body)
                self._names[s.name] = f".{s.name}"
            case ast.Assign():
                self._expressions(s.value)
                self._bind(s.targets, s.value)
            case ast.AnnAssign():
                self._expressions(*([s.value] if s.value else []))
                self._bind([s.target], s.value)
            case ast.AugAssign():
                self._expressions(s.value)
                self._bind([s.target], None)
            case ast.Expr():
                self._expressions(s.value)
            case ast.Assert():
                self._expressions(s.test)
            case ast.Pass():
                return
            case ast.If():
                self._if(s)
            case ast.Try():
                self._try(s)
            case ast.With() if all(self._is_imports(item) for item in s.items):
                self.body(s.body)
            case _:
                raise _Stop

    def _import(self, alias: ast.alias) -> None:
        if self._scanner.own(alias.name):
            self._scanner.enter(alias.name)
        else:
            self._scanner.outside(alias.name)
        name = alias.asname or alias.name.partition(".")[0]
        self._names[name] = alias.name if alias.asname else name

    def _import_from(self, s: ast.ImportFrom) -> None:
        module = s.module or ""
        if s.level:
            parts = self._package.split(".") if self._package else []
            if s.level > len(parts):
                raise _Missing
            module = ".".join([*parts[: len(parts) - s.level + 1], *([module] if module else [])])
        if s.level or self._scanner.own(module):
            self._scanner.enter(module)
            for alias in s.names:
                if self._scanner.exists(f"{module}.{alias.name}"):
                    self._scanner.enter(f"{module}.{alias.name}")
        else:
            self._scanner.outside(module, (a.name for a in s.names))
        for alias in s.names:
            self._names[alias.asname or alias.name] = f"{module}.{alias.name}"

    def _bind(self, targets: Sequence[ast.expr], value: ast.expr | None) -> None:
        for target in targets:
            if isinstance(target, (ast.Tuple, ast.List)):
                self._bind(target.elts, None)
            elif isinstance(target, ast.Name):
                known = self._stands_for(value) if value is not None else ""
                self._names[target.id] = known or f".{target.id}"
            else:
                raise _Stop  # os.environ[...] = ..., torch.backends.x = ...

    def _stands_for(self, e: ast.expr) -> str:
        """The dotted name of what an expression is, or of whose it is; empty = who knows."""
        match e:
            case ast.Name():
                return self._names.get(e.id, e.id)
            case ast.Attribute():
                of = self._stands_for(e.value)
                return f"{of}.{e.attr}" if of else ""
            case ast.Call():
                of = self._stands_for(e.func)
                return of if of.startswith("woodfrog.") else ""
        return ""

    def _expressions(self, *expressions: ast.expr) -> None:
        for expression in expressions:
            for node in _evaluated(expression):
                if isinstance(node, ast.Call):
                    self._called(node.func)
                elif isinstance(node, (ast.Await, ast.Yield, ast.YieldFrom)):
                    raise _Stop

    def _decorators(self, decorators: Sequence[ast.expr]) -> None:
        self._expressions(*decorators)
        for decorator in decorators:
            self._called(decorator.func if isinstance(decorator, ast.Call) else decorator)

    def _called(self, function: ast.expr) -> None:
        name = self._stands_for(function)
        if not name.startswith("woodfrog.") and name not in _PURE and not name.endswith((".setter", ".deleter")):
            raise _Stop

    def _if(self, s: ast.If) -> None:
        verdict = self._verdict(s.test)
        if verdict is None:
            self._expressions(s.test)
            if any(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.walk(s)):
                raise _Stop
            self.body(s.body)
            self.body(s.orelse)
        else:
            self.body(s.body if verdict else s.orelse)

    def _verdict(self, test: ast.expr) -> bool | None:
        match test:
            case ast.UnaryOp(op=ast.Not()):
                inner = self._verdict(test.operand)
                return None if inner is None else not inner
            case ast.Constant():
                return bool(test.value)
            case ast.Name() | ast.Attribute() if self._stands_for(test) in ("typing.TYPE_CHECKING", "TYPE_CHECKING"):
                return False
            case ast.Call() if self._stands_for(test.func) == "woodfrog.is_local":
                return False
            case ast.Compare(left=ast.Name(id="__name__"), ops=[ast.Eq()], comparators=[ast.Constant("__main__")]):
                return False
        return None

    def _try(self, s: ast.Try) -> None:
        try:
            self.body(s.body)
        except _Missing:
            handler = next((h for h in s.handlers if _takes_missing(h.type)), None)
            if handler is None:
                raise
            self.body(handler.body)
        else:
            self.body(s.orelse)
        self.body(s.finalbody)

    def _is_imports(self, item: ast.withitem) -> bool:
        call = item.context_expr
        return (
            isinstance(call, ast.Call)
            and isinstance(call.func, ast.Attribute)
            and call.func.attr == "imports"
            and self._stands_for(call.func).startswith("woodfrog.")
        )


def _evaluated(expression: ast.expr) -> Iterable[ast.AST]:
    """What of an expression runs where it stands: not the bodies of lambdas."""
    todo: list[ast.AST] = [expression]
    while todo:
        node = todo.pop()
        yield node
        if not isinstance(node, ast.Lambda):
            todo.extend(ast.iter_child_nodes(node))


def _takes_missing(kind: ast.expr | None) -> bool:
    if isinstance(kind, ast.Tuple):
        return any(_takes_missing(k) for k in kind.elts)
    names = ("ImportError", "ModuleNotFoundError", "Exception", "BaseException")
    return kind is None or (isinstance(kind, ast.Name) and kind.id in names)


# Looking at the disk


def local_source(root: Path) -> Callable[[str], Source | None]:
    """The modules below a program's directory."""

    def source(name: str) -> Source | None:
        path = root.joinpath(*name.split("."))
        for file, is_package in ((path / "__init__.py", True), (path.with_name(path.name + ".py"), False)):
            if file.is_file():
                if file.stat().st_size > _MAX_SOURCE:
                    return "(", is_package
                return file.read_text(errors="replace"), is_package
        return ("", True) if path.is_dir() else None

    return source


def installed(sys_path: Sequence[str]) -> Callable[[str], bool]:
    """Whether the environment has a top-level module, by the files of its import path."""

    @cache
    def has(name: str) -> bool:
        for folder in sys_path:
            path = os.path.join(folder, name)
            if os.path.isdir(path) or os.path.isfile(path + ".py"):
                return True
            try:
                if any(f.startswith(name + ".") and f.endswith(".so") for f in os.listdir(folder)):
                    return True
            except OSError:
                continue
        return False

    return has
