"""What of Modal's woodfrog lacks and a program puts on one function: stand-ins, so that the other functions run.

The stand-in of a decorator marks what it decorates; that of a class makes a value, which is noticed where an option is
given it. What is marked so is left out of runs and deploys, by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from woodfrog.errors import MissingNameError, SpecError
from woodfrog.sdk import checks
from woodfrog.spec import LeftOut

__all__ = ["DECORATORS", "VALUES", "Absent", "Decorator", "Lack", "among", "error", "lacks_of", "left_out", "stand_in"]

T = TypeVar("T")

DECORATORS = (
    *("asgi_app", "batched", "build", "clustered", "concurrent", "fastapi_endpoint", "sessioned"),
    *("web_endpoint", "web_server", "wsgi_app", "experimental.clustered", "experimental.http_server"),
)
VALUES = ("CloudBucketMount", "Cron", "Mount", "NetworkFileSystem", "Period", "Proxy", "SchedulerPlacement")
"""Names at Modal's top level that are given to one function."""


@dataclass(frozen=True)
class Lack:
    """Why a function or method is left out."""

    text: str
    """What is not there, and what to do without it."""
    where: str
    """`file:line`."""

    def __str__(self) -> str:
        return f"{self.text} ({self.where})"


def left_out(tag: str, lacks: Iterable[Lack]) -> LeftOut:
    return LeftOut(tag, "; ".join(map(str, lacks)))


def error(left: LeftOut) -> SpecError:
    """For who wants it all the same."""
    return SpecError(f"{left.tag} is left out of its app: {left.why}", code="left-out")


def lacks_of(target: Any) -> tuple[Lack, ...]:
    """What decorators have marked a function or class with; a class has nothing of its bases."""
    found: tuple[Lack, ...] = getattr(target, "__dict__", {}).get("__woodfrog_lacks__", ())
    return found


def among(value: Any) -> Absent | None:
    """The stand-in that an option's value is, or holds."""
    inner: Iterable[Any] = ()
    if isinstance(value, Mapping):
        inner = value.values()
    elif isinstance(value, (list, tuple)):
        inner = value
    return next((v for v in (value, *inner) if isinstance(v, Absent)), None)


@cache
def stand_in(name: str, remedy: str) -> Any:
    """For one of `DECORATORS` or `VALUES`."""
    if name in VALUES:
        return _Kind(name, (Absent,), {"__module__": "woodfrog", "_remedy": remedy})
    return Decorator(name, remedy)


def _no(name: str, remedy: str) -> MissingNameError:
    return MissingNameError(
        f"Modal has {name!r}; woodfrog does not have it yet: {remedy} ({checks.caller()})", code="not-yet"
    )


class Decorator:
    """Stands for a decorator of Modal's: what it decorates is left out."""

    def __init__(self, name: str, remedy: str) -> None:
        self.__name__ = name
        self._remedy = remedy

    def __call__(self, *args: Any, **options: Any) -> Callable[[T], T]:
        line = checks.caller()
        name = f"@{self.__name__}()"
        if args and (inspect.isroutine(args[0]) or hasattr(args[0], "raw_f")):
            raise SpecError(f"write {name}, with parentheses ({line})")
        lack = Lack(f"woodfrog does not have Modal's {name} yet: {self._remedy}", line)
        return lambda target: _mark(target, lack, name)

    def __getattr__(self, name: str) -> Any:
        raise _no(f"{self.__name__}.{name}", self._remedy)

    def __repr__(self) -> str:
        return f"<stand-in for Modal's {self.__name__}>"


def _mark(target: Any, lack: Lack, name: str) -> Any:
    from woodfrog.sdk.cls import Method  # which imports this module

    raw: Any = target.raw_f if isinstance(target, Method) else target
    if hasattr(raw, "__woodfrog_wrapped__"):
        raise SpecError(f"{raw.tag}: {name} goes below @app.function() or @app.cls() ({lack.where})")
    if not (inspect.isfunction(raw) or isinstance(raw, type)):
        raise SpecError(f"{name} is for functions and classes, got {target!r} ({lack.where})")
    setattr(raw, "__woodfrog_lacks__", (*lacks_of(raw), lack))  # noqa: B010
    outer = raw.__qualname__.rpartition(".")[0]
    if isinstance(target, Method) or isinstance(raw, type) or not outer or outer.endswith("<locals>"):
        return target
    if name == "@build()" or hasattr(raw, "__woodfrog_role__"):
        return target  # the whole class rests on it
    # It stands in a class: `self.name(x)` and `self.name.local(x)` are the plain call, as of other methods.
    return Method(raw, None)


class _Kind(type):
    _remedy = ""

    def __getattr__(cls, name: str) -> Any:
        raise _no(f"{cls.__name__}.{name}", cls._remedy)


class Absent(metaclass=_Kind):
    """Stands for a value of Modal's: no trouble until a function is given it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.where = checks.caller()

    @classmethod
    def from_name(cls, *args: Any, **options: Any) -> Absent:
        return cls()

    ephemeral = from_local_dir = from_local_file = from_local_python_packages = from_name

    @property
    def text(self) -> str:
        kind = type(self)
        return f"woodfrog does not have Modal's {kind.__name__} yet: {kind._remedy}"

    def __getattr__(self, name: str) -> Any:
        kind = type(self)
        raise _no(f"{kind.__name__}.{name}", kind._remedy)
