"""Callables with a blocking and an asynchronous form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, ParamSpec, TypeVar

__all__ = ["Dual"]

P = ParamSpec("P")
R = TypeVar("R")
A = TypeVar("A")


@dataclass(frozen=True)
class Dual(Generic[P, R, A]):
    """Called, it blocks; `.aio(...)` of the same arguments is awaited (or iterated with `async for`)."""

    sync: Callable[P, R]
    aio: Callable[P, A]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.sync(*args, **kwargs)
