"""An asynchronous generator, its items handed out one at a time to code that is not asynchronous."""

from __future__ import annotations

from collections.abc import Iterator
from types import AsyncGeneratorType
from typing import Any

__all__ = ["items"]


class _Steps:
    """One task takes every step of the generator, as `async for` would.

    A timeout or cancel scope around a `yield`, and a ContextVar that is reset behind one, count on that.
    """

    def __init__(self, value: Any, loop: Any) -> None:
        self._value, self._loop = value, loop
        self._asked = loop.create_future()
        self._asked.set_result(None)
        self._given = loop.create_future()
        """Pending while an item is wanted."""
        self._leaving = False
        self._task = loop.create_task(self._drive())
        self._task.add_done_callback(self._over)

    def _over(self, task: Any) -> None:
        if not self._given.done():
            self._given.set_result(None)

    async def _drive(self) -> None:
        from asyncio import CancelledError

        value, closes = self._value, isinstance(self._value, AsyncGeneratorType)
        thrown: BaseException | None = None
        try:
            while True:
                while self._given.done() and not self._leaving:
                    self._asked = self._loop.create_future()
                    try:
                        await self._asked
                    except CancelledError as e:
                        if not closes:
                            raise
                        # For the generator, where it stands: a timeout around its `yield` is waiting for it.
                        thrown = e
                if self._leaving:
                    return
                step = value.__anext__() if thrown is None else value.athrow(thrown)
                thrown = None
                try:
                    item = await step
                except StopAsyncIteration:
                    return
                self._given.set_result((item,))
                del item
        finally:
            if closes:
                await value.aclose()

    def next(self) -> tuple[Any] | None:
        """The next item, or None at the end. The loop runs, and its timers fire, until then."""
        if self._given.done():
            self._given = self._loop.create_future()
            if self._task.done():
                self._over(self._task)
            elif not self._asked.done():  # a cancelled one wakes the task, too
                self._asked.set_result(None)
        found: tuple[Any] | None = self._loop.run_until_complete(self._given)
        if found is None:
            self._task.result()
        return found

    def close(self) -> None:
        """Have the generator closed in its own task, wherever it stands."""
        from asyncio import CancelledError

        self._leaving = True
        if self._task.done():
            if not self._task.cancelled():
                self._task.exception()  # it came out already, and is not to be logged as forgotten
            return
        if not self._asked.done():
            self._asked.set_result(None)
            self._loop.run_until_complete(self._task)
            return
        # Something else, such as a signal handler, broke off the wait for an item.
        self._task.cancel()
        try:
            self._loop.run_until_complete(self._task)
        except CancelledError:
            return


def items(value: Any, loop: Any) -> Iterator[Any]:
    """The items of an asynchronous iterator, which runs on `loop`, and only while an item is asked for."""
    steps = _Steps(value, loop)
    try:
        while (found := steps.next()) is not None:
            yield found[0]
            del found
    finally:
        steps.close()
