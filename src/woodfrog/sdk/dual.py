"""Callables with a blocking and an asynchronous form."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

__all__ = ["ClassDual", "Dual", "at_once"]

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


def at_once(function: Callable[P, R]) -> Dual[P, R, Coroutine[Any, Any, R]]:
    """Both forms of a function that waits for nothing."""

    async def aio(*args: P.args, **kwargs: P.kwargs) -> R:
        return function(*args, **kwargs)

    return Dual(function, aio)


class ClassDual(Generic[R]):
    """Both forms of a class method that waits for nothing; decorates what `@classmethod` gave."""

    def __init__(self, method: Callable[..., R]) -> None:
        self._method: Any = method
        self.__doc__ = method.__doc__

    def __get__(self, instance: Any, owner: type) -> Dual[..., R, Coroutine[Any, Any, R]]:
        return at_once(self._method.__get__(None, owner))
