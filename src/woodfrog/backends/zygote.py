"""Zygotes: snapshots of workers that have a program's heavy imports and have not been told yet what they will serve.

`scan` finds in the source, without running any of it, the imports with which a program begins. Only what a plain start
would surely import, before anything that could change how it imports, may be in a zygote: the scan ends at the first
statement that might (a call into unknown code, an assignment to `os.environ[...]`, a condition that only running it
decides). What stands behind is imported after the thaw, as in a plain start.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from woodfrog.errors import IncompatibleSnapshot, IntegrityError, StoreError, WoodfrogError
from woodfrog.snapshot.catalogue import Catalogue
from woodfrog.snapshot.manifest import Manifest
from woodfrog.spec import RuntimeSpec, to_dict

__all__ = ["PER_INSTANCE", "Import", "Plan", "Zygotes", "installed", "local_source", "make_plan", "overlap", "scan"]

log = logging.getLogger("woodfrog")

PER_INSTANCE = frozenset({"WOODFROG_APP", "WOODFROG_FUNCTION", "WOODFROG_INSTANCE"})
"""Variables that a zygote's imports do not see; they are set when it is told what it serves."""
_ATTEMPTS = 2
_MAX_SOURCE = 4 << 20
_CONFIG = (".cfg", ".conf", ".ini", ".toml", ".yaml", ".yml", "rc")
"""Ends of the names of files that a library may read from the working directory while it is imported."""


@dataclass(frozen=True)
class Import:
    """`import module`, or `from module import names`."""

    module: str
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What a zygote for a program is made of. `key` finds it."""

    key: str
    imports: tuple[Import, ...]

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(i.module for i in self.imports)


class _Stop(Exception):
    """From here on only running the program tells what it imports."""


class _Missing(Exception):
    """An import that will fail."""


_OURS = Import("woodfrog.sdk.app")
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


def scan(module: str, source: Callable[[str], Source | None], has: Callable[[str], bool]) -> tuple[Import, ...]:
    """The imports from outside a program with which importing its `module` begins, in order.

    Args:
        source: the program's own modules by dotted name; None = not the program's.
        has: whether the environment has a top-level module of that name.

    Returns:
        Nothing if there is none, or none but woodfrog's.

    Example:
        >>> scan("app", {"app": ("import json, numpy\\nfrom torch import nn", False)}.get, lambda name: True)
        (Import(module='numpy', names=()), Import(module='torch', names=('nn',)))
    """
    scanner = _Scanner(source, has)
    with contextlib.suppress(_Stop, _Missing):
        scanner.enter(module)
    found = tuple(scanner.found)
    return found if any(i != _OURS for i in found) else ()


class _Scanner:
    def __init__(self, source: Callable[[str], Source | None], has: Callable[[str], bool]) -> None:
        self._source = source
        self._has = has
        self._entered: set[str] = set()
        self.found: dict[Import, None] = {}

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
            self.found[_OURS] = None
        elif self._has(top):
            self.found[Import(module, tuple(n for n in names if n != "*"))] = None
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


def _top_names(root: Path) -> set[str]:
    return {entry.name.partition(".")[0] for entry in os.scandir(root)}


def overlap(one: str, other: str) -> bool:
    """Whether one path is the other, or is below it.

    >>> overlap("/usr/lib", "/usr"), overlap("/usr", "/usr/lib"), overlap("/usr", "/usr2")
    (True, True, False)
    """
    a, b = os.path.normpath(one) + "/", os.path.normpath(other) + "/"
    return a.startswith(b) or b.startswith(a)


def make_plan(module: str, root: Path, runtime: RuntimeSpec, env: Mapping[str, str], *, hide_gpu: bool) -> Plan | None:
    """What to have imported before a program below `root` is; None = nothing that would pay.

    Raises:
        OSError: the source cannot be read.
    """
    entries = sorted(os.scandir(root), key=lambda e: e.name)
    if any(e.name.endswith((".dist-info", ".egg-info")) for e in entries):
        return None  # what libraries find installed would depend on the program's own directory
    imports = scan(module, local_source(root), installed(runtime.sys_path))
    if not imports:
        return None
    config = [
        (e.name, hashlib.sha256(Path(e.path).read_bytes()).hexdigest())
        for e in entries
        if e.name.endswith(_CONFIG) and e.is_file() and e.stat().st_size <= _MAX_SOURCE
    ]
    parts: Any = [
        [[i.module, i.names] for i in imports],
        sorted((k, v) for k, v in env.items() if k not in PER_INSTANCE),
        to_dict(runtime),
        hide_gpu,
        config,
    ]
    return Plan(hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32], imports)


class Zygotes:
    """Which zygotes there are, which are worth a try, which are kept."""

    def __init__(self, catalogue: Catalogue, worker_class: str, *, keep: int) -> None:
        self._catalogue = catalogue
        self._worker_class = worker_class
        self._keep = keep
        self._failures: dict[str, int] = {}
        self._making: set[str] = set()
        self._used: dict[str, int] = {}
        self._count = 0

    @staticmethod
    def function_key(key: str) -> str:
        return f"zygote-{key}"

    def find(self, plan: Plan, root: Path) -> Manifest | None:
        """A zygote whose imports looked for nothing that this program would have given them instead."""
        manifest = self._catalogue.find(self.function_key(plan.key), self._worker_class)
        if manifest is None or not self.suits(manifest.seen, root):
            return None
        self._count += 1
        self._used[manifest.id] = self._count
        return manifest

    @staticmethod
    def suits(seen: Iterable[str], root: Path) -> bool:
        """Whether a program's directory hides none of the top-level modules that the imports asked for."""
        return _top_names(root).isdisjoint(seen)

    def usable(self, plan: Plan) -> bool:
        return self._failures.get(plan.key, 0) < _ATTEMPTS

    def begin(self, plan: Plan) -> bool:
        """Whether to make one now: there is none, and nobody else is at it. Call `end` afterwards."""
        known = self._catalogue.find(self.function_key(plan.key), self._worker_class)
        if known is not None or plan.key in self._making:
            return False
        self._making.add(plan.key)
        return True

    def end(self, plan: Plan) -> None:
        self._making.discard(plan.key)

    def give_up(self, plan: Plan) -> None:
        """Not worth another try in this daemon's life."""
        self._failures[plan.key] = _ATTEMPTS

    def failed(self, plan: Plan, error: Exception, zygote_id: str | None) -> None:
        """Note a failure. A zygote that is damaged or out of date is not used again."""
        at_fault = bool(getattr(error, "snapshot_at_fault", False))
        if zygote_id is not None and (at_fault or isinstance(error, (IntegrityError, IncompatibleSnapshot))):
            self._catalogue.retire(zygote_id, str(error))
        if not isinstance(error, IncompatibleSnapshot):
            self._failures[plan.key] = self._failures.get(plan.key, 0) + 1
        text = error.message if isinstance(error, WoodfrogError) else f"{type(error).__name__}: {error}"
        last = "" if self.usable(plan) else "; it is not tried again"
        log.warning("zygote of %s: %s; plain start instead%s", ", ".join(plan.modules), text, last)

    def trim(self, in_use: set[str]) -> None:
        """Remove the retired and the longest unused beyond the number kept; not those that some instance rests on."""
        ours = [m for m in self._catalogue.manifests() if m.kind == "zygote"]
        good = [m for m in ours if m.worker_class == self._worker_class and self._catalogue.retired(m.id) is None]
        good.sort(key=lambda m: (self._used.get(m.id, 0), m.created))
        kept = {m.id for m in good[-self._keep :]} if self._keep else set()
        for manifest in ours:
            if manifest.id not in kept | in_use:
                try:
                    self._catalogue.remove(manifest.id)
                except StoreError as e:
                    log.error("%s", e.message)
