"""Asynchronous generators as the worker runs them: one task for all items, and only as far as is asked."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextvars import ContextVar
from typing import Any

import anyio
import pytest

from woodfrog.worker.runtime import Runtime

variable: ContextVar[int] = ContextVar("variable")


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    made = Runtime()
    yield made
    made._end_loop()


def test_all_items_come_from_one_task(runtime: Runtime) -> None:
    tasks = []

    async def f() -> AsyncIterator[int]:
        for n in range(3):
            tasks.append(asyncio.current_task())
            yield n
            await asyncio.sleep(0)

    assert list(runtime.items(f())) == [0, 1, 2]
    assert len(set(tasks)) == 1


def test_a_timeout_around_yields_fires(runtime: Runtime) -> None:
    async def waits() -> AsyncIterator[str]:
        try:
            async with asyncio.timeout(0.05):
                yield "a"
                await asyncio.sleep(30)
                yield "b"
        except TimeoutError:
            yield "late"

    assert list(runtime.items(waits())) == ["a", "late"]

    async def passes_between() -> AsyncIterator[int]:
        async with asyncio.timeout(0.05):
            for n in range(1000):
                yield n
                await asyncio.sleep(0)

    got = []
    with pytest.raises(TimeoutError):
        for n in runtime.items(passes_between()):
            got.append(n)
            time.sleep(0.03)
    assert 2 <= len(got) <= 6


def test_a_cancellation_between_items_meets_the_generator_at_its_yield(runtime: Runtime) -> None:
    async def f() -> AsyncIterator[Any]:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().call_soon(task.cancel)
        try:
            yield "a"
        except asyncio.CancelledError:
            yield "cancelled"
        yield "b"

    assert list(runtime.items(f())) == ["a", "cancelled", "b"]


def test_cancel_scopes_of_anyio_around_yields(runtime: Runtime) -> None:
    async def f() -> AsyncIterator[str]:
        with anyio.move_on_after(0.05) as scope:
            yield "a"
            await anyio.sleep(30)
        yield f"cancelled {scope.cancelled_caught}"
        async with anyio.create_task_group() as group:
            group.start_soon(anyio.sleep, 0)
            yield "b"

    assert list(runtime.items(f())) == ["a", "cancelled True", "b"]


def test_a_context_variable_is_reset_behind_a_yield(runtime: Runtime) -> None:
    async def f() -> AsyncIterator[int]:
        token = variable.set(7)
        yield variable.get()
        variable.reset(token)
        yield variable.get(0)

    assert list(runtime.items(f())) == [7, 0]


def test_nothing_runs_ahead_of_what_is_asked(runtime: Runtime) -> None:
    begun = []

    async def f() -> AsyncIterator[int]:
        for n in range(9):
            begun.append(n)
            yield n

    items = runtime.items(f())
    assert begun == []
    for n in range(4):
        assert next(items) == n
        runtime._settle(asyncio.sleep(0.001))  # The loop runs for something else, too.
        assert begun == list(range(n + 1))


def test_left_early_it_is_closed_in_its_task_and_context(runtime: Runtime) -> None:
    seen: list[Any] = []

    async def f() -> AsyncIterator[int]:
        token, task = variable.set(1), asyncio.current_task()
        try:
            async with asyncio.timeout(30):
                yield 1
                yield 2
        finally:
            await asyncio.sleep(0.001)
            variable.reset(token)
            seen.append(asyncio.current_task() is task)

    items = runtime.items(f())
    assert next(items) == 1
    items.close()  # type: ignore[attr-defined]
    assert seen == [True]
    assert asyncio.all_tasks(runtime._loop) == set()

    async def fails() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            raise ValueError("in the end")

    items = runtime.items(fails())
    next(items)
    with pytest.raises(ValueError, match="in the end"):
        items.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (ValueError("no"), ValueError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (SystemExit(3), SystemExit),
        (asyncio.CancelledError(), asyncio.CancelledError),
        (StopAsyncIteration(), RuntimeError),
    ],
)
def test_what_it_raises_comes_out(
    runtime: Runtime, error: BaseException, raised: type[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    async def f() -> AsyncIterator[int]:
        yield 1
        raise error

    got = []
    with pytest.raises(raised) as caught:
        for item in runtime.items(f()):
            got.append(item)
    assert got == [1]
    assert caught.value is error or raised is RuntimeError
    # Nothing is left that would break the next call.
    assert list(runtime.items(f_of_two())) == [1, 2]
    assert runtime._settle(asyncio.sleep(0.001, "well")) == "well"
    del caught
    assert "never retrieved" not in capsys.readouterr().err


async def f_of_two() -> AsyncIterator[int]:
    yield 1
    yield 2


def test_an_interrupted_wait_closes_the_generator(runtime: Runtime) -> None:
    ended = []

    class Interrupt(Exception):
        pass

    def interrupt(*_: Any) -> None:
        raise Interrupt

    async def f() -> AsyncIterator[int]:
        try:
            yield 1
            await asyncio.sleep(30)
        finally:
            ended.append(True)

    items = runtime.items(f())
    assert next(items) == 1
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(Interrupt):
            next(items)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert ended == [True]
    assert list(runtime.items(f_of_two())) == [1, 2]


def test_an_iterator_that_is_no_generator(runtime: Runtime) -> None:
    class Count:
        n = 0

        def __aiter__(self) -> Count:
            return self

        async def __anext__(self) -> int:
            await asyncio.sleep(0)
            self.n += 1
            if self.n > 3:
                raise StopAsyncIteration
            return self.n

    assert list(runtime.items(Count())) == [1, 2, 3]
    items = runtime.items(Count())
    assert next(items) == 1
    items.close()  # type: ignore[attr-defined]
    with contextlib.suppress(StopIteration):
        raise AssertionError(next(items))
