"""Handles of functions: how they are called, here and in containers."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Protocol, TypeVar, overload

from woodfrog.errors import MissingNameError, NotFoundError, SpecError
from woodfrog.sdk import absent, checks
from woodfrog.sdk.dual import ClassDual, Dual
from woodfrog.sdk.hooks import in_worker
from woodfrog.spec import FunctionSpec, LeftOut, MethodSpec

if TYPE_CHECKING:
    from woodfrog.sdk.call import FunctionCall, Target
    from woodfrog.sdk.client import Client

__all__ = ["Decorator", "Deployed", "Function", "method_spec"]

P = ParamSpec("P")
R = TypeVar("R")
L = TypeVar("L")


class Owner(Protocol):
    """What a handle belongs to, and where it finds the daemon."""

    def reach(self, tag: str) -> tuple[Client, str]:
        """The client, and the app's name over there.

        Raises:
            SpecError: not running, not deployed, or not to be reached from here.
        """


class Deployed:
    """An app that was deployed, now or by another program, by its name."""

    def __init__(self, app_name: str) -> None:
        self.app_name = checks.name(app_name, "app name")
        self._client: Client | None = None

    def reach(self, tag: str) -> tuple[Client, str]:
        if in_worker():
            raise inside(tag)
        if self._client is None:
            from woodfrog.sdk.client import connect

            self._client = connect()
        return self._client, self.app_name

    def __reduce__(self) -> tuple[Any, ...]:
        return Deployed, (self.app_name,)


NESTED = "calling other functions from inside a container is not in woodfrog yet"
_STDLIB = os.path.dirname(os.__file__) + os.sep


def inside(what: str, remedy: str = "call it with .local(), or from the client") -> SpecError:
    where = checks.caller()  # of a task of an event loop it tells nothing
    place = "" if where.startswith(_STDLIB) else f" ({where})"
    return SpecError(f"{what}: {NESTED}: {remedy}{place}", code="not-yet")


_SCALING = "set min_containers=, max_containers=, buffer_containers= and scaledown_window= in the decorator"
NO_WEB = "there are no web endpoints"
SERVE = (
    "start the server on the host, and have it call functions with woodfrog.Function.from_name(…).remote() or "
    "woodfrog.Cls.from_name(…)"
)
LOOK = "look with `woodfrog app list`, `woodfrog container list` and `woodfrog app logs`"
NOT_YET = {
    "autoscaler": _SCALING,
    "experimental_spawn_map": "use spawn_map",
    "get_current_stats": LOOK,
    "get_dashboard_url": LOOK,
    "get_web_url": NO_WEB,
    "keep_warm": _SCALING,
    "logs": LOOK,
    "metrics": LOOK,
    "stats": LOOK,
    "update_autoscaler": _SCALING,
    "web_url": NO_WEB,
    "with_batching": "take a list of inputs in one call",
    "with_concurrency": "a container takes one input at a time",
    "with_options": "set the options in the decorator",
}
"""What Modal's handles have, and what to do without it."""


def missing(tag: str, name: str) -> MissingNameError:
    return MissingNameError(f"{tag}.{name}: not in woodfrog yet: {NOT_YET[name]} ({checks.caller()})", code="not-yet")


def ask(owner: Owner, tag: str) -> None:
    """Ask the daemon whether `tag` is there.

    Raises:
        NotFoundError: no such app, or nothing of that name in it.
        SpecError: the app neither runs nor is deployed, or this is a container, or `tag` was left out of the app.
    """
    from woodfrog.sdk.client import segment

    client, app = owner.reach(tag)
    found = client.request("GET", f"/apps/{segment(app)}", new=True).json()
    tags = {f["tag"]: f["kind"] for f in found["functions"]}
    tags |= {
        f"{f['tag']}.{m['name']}": "method" for f in found["functions"] if f["kind"] == "class" for m in f["methods"]
    }
    for left in found.get("left_out", ()):
        if left["tag"] in (tag, tag.partition(".")[0]):
            raise absent.error(LeftOut(left["tag"], left["why"]))
    if tag not in tags:
        raise NotFoundError(f"app {app} has no {tag!r}{checks.nearest(tag, tags)}", app=app)


def note_version(version: Any, what: str) -> None:
    if version is not None:
        checks.note(f"version:{what}", f"{what} ignores version=: the newest deploy is called ({checks.caller()})")


def method_spec(function: Callable[..., Any], name: str) -> MethodSpec:
    """Name and kind of a plain function."""
    is_async_generator = inspect.isasyncgenfunction(function)
    return MethodSpec(
        name=name,
        generator=is_async_generator or inspect.isgeneratorfunction(function),
        is_async=is_async_generator or inspect.iscoroutinefunction(function),
    )


@checks.lacking(
    {
        "app": "use the variable of the app",
        "client": "the daemon is found by WOODFROG_HOST",
        "from_id": "use Function.from_name",
        "object_id": "a function is known by its app and its name",
    }
)
class Function(Generic[P, R, L]):
    """A function, or one method of a class, that runs in containers. Made by `@app.function()` or `from_name`.

    `f.remote(x)` runs it in a container and waits; `f.local(x)` and `f(x)` run it here. Every way of calling that
    waits has an asynchronous form: `await f.remote.aio(x)`.

    To type checkers it is `Function[P, R, L]`: its parameters, what a call of it gives (`.remote`), and what the plain
    function gives (`.local`): of an `async def` a coroutine.

    Example:
        >>> import woodfrog
        >>> square = woodfrog.Function.from_name("example", "square")
        >>> square.remote(3)  # doctest: +SKIP
        9
    """

    def __init__(
        self,
        owner: Owner,
        tag: str,
        *,
        raw: Callable[..., Any] | None = None,
        method: MethodSpec | None = None,
        params: Callable[[], bytes | None] | None = None,
        spec: FunctionSpec | None = None,
        where: str = "",
        include_source: bool = True,
        lacks: tuple[absent.Lack, ...] = (),
    ) -> None:
        self._owner, self._tag, self._raw, self._method = owner, tag, raw, method
        self._params, self.spec, self._where, self._include_source = params, spec, where, include_source
        self._lacks = lacks
        """Why it is in no run and no deploy; none where it is."""
        if raw is not None:
            self.__doc__ = raw.__doc__
            self.__name__ = getattr(raw, "__name__", tag)
            self.__qualname__ = getattr(raw, "__qualname__", tag)
            self.__module__ = getattr(raw, "__module__", __name__)

    @classmethod
    def from_name(
        cls,
        app_name: str,
        name: str,
        *,
        version: int | None = None,
        environment_name: str | None = None,
        client: Any = None,
    ) -> Function[..., Any, Any]:
        """The function `name` of a deployed app. Asks nothing of the daemon before the first call, or `hydrate()`.

        Raises:
            SpecError: not names.
        """
        del environment_name, client
        note_version(version, "Function.from_name")
        service, dot, method = str(name).partition(".")
        checks.name(service, "Function.from_name")
        if dot and not method.isidentifier():
            raise SpecError(f"Function.from_name: {name!r} is not the name of a function or of a class's method")
        return Function(Deployed(app_name), name)

    @ClassDual
    @classmethod
    def lookup(cls, app_name: str, name: str, **options: Any) -> Function[..., Any, Any]:
        """An older name of `from_name`."""
        del options
        warnings.warn("Function.lookup is now called Function.from_name", DeprecationWarning, stacklevel=3)
        return cls.from_name(app_name, name)

    @property
    def tag(self) -> str:
        """Name in the app; of a method `Class.method`."""
        return self._tag

    @property
    def info(self) -> MethodSpec | None:
        """Name, generator or not, asynchronous or not; None for a function known by name only."""
        return self._method

    @property
    def is_generator(self) -> bool | None:
        """None where it is not known: the function was named, not defined, by this program."""
        return self._method.generator if self._method else None

    def _left_out(self) -> tuple[LeftOut, ...]:
        """What of it is in no run and no deploy, since woodfrog lacks what it asks for: itself, or nothing."""
        return (absent.left_out(self._tag, self._lacks),) if self._lacks else ()

    def get_raw_f(self) -> Callable[P, L]:
        """The plain function.

        Raises:
            SpecError: the function was named, not defined, by this program.
        """
        if self._raw is None:
            raise SpecError(
                f"{self._tag} was looked up by name: its code is not here, so it can only be called with .remote()"
            )
        return self._raw

    @property
    def __woodfrog_wrapped__(self) -> Callable[..., Any]:
        return self.get_raw_f()

    def _hydrate(self, client: Any = None) -> Function[P, R, L]:
        self._be_there()
        ask(self._owner, self._tag)
        return self

    @property
    def hydrate(self) -> Dual[..., Function[P, R, L], Coroutine[Any, Any, Function[P, R, L]]]:
        """`hydrate()`: ask the daemon whether the function is there; gives this handle.

        Raises:
            NotFoundError: no such app or function.
            SpecError: the app neither runs nor is deployed.
        """
        from woodfrog.sdk.call import in_thread

        return Dual(self._hydrate, in_thread(self._hydrate))

    if not TYPE_CHECKING:  # to a type checker every name would be there

        def __getattr__(self, name: str) -> Any:
            if name in NOT_YET:
                raise missing(self._tag, name)
            checks.tell_lacking(self, name)
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # Calls.

    def _be_there(self) -> None:
        if in_worker():
            here = f"call {self._tag}.local(), or call it" if self._raw is not None else "call it"
            raise inside(self._tag, f"{here} from the client, and pass its result on")
        for left in self._left_out():
            raise absent.error(left)

    def _target(self) -> Target:
        from woodfrog.sdk.call import Target

        client, app = self._owner.reach(self._tag)
        return Target(client, app, self._tag, self._params() if self._params else None)

    def _expect(self, generator: bool, verb: str) -> None:
        self._be_there()
        if self._method is not None and self._method.generator is not generator:
            right = "use .remote_gen()" if self._method.generator else "use .remote()"
            kind = "is a generator" if self._method.generator else "is not a generator"
            raise SpecError(f"{self._tag} {kind} and cannot be called with .{verb}(): {right}", code="wrong-call")

    def _remote(self, *args: P.args, **kwargs: P.kwargs) -> R:
        from woodfrog.sdk.call import Call

        self._expect(False, "remote")
        return Call(self._target(), args, kwargs).run()  # type: ignore[no-any-return]

    async def _remote_aio(self, *args: P.args, **kwargs: P.kwargs) -> R:
        from woodfrog.sdk.call import Call, run_aio

        self._expect(False, "remote")
        return await run_aio(lambda: Call(self._target(), args, kwargs))  # type: ignore[no-any-return]

    @property
    def remote(self) -> Dual[P, R, Coroutine[Any, Any, R]]:
        """`remote(*args, **kwargs)`: run in a container and wait for the result. Ctrl-C cancels the call.

        Raises:
            Exception: what the function raised, with its remote traceback.
            ExecutionError: the call came to no answer (timeout, out of memory, crash, start-up failure).
            SpecError: the app neither runs nor is deployed, or an argument cannot be pickled.
        """
        return Dual(self._remote, self._remote_aio)

    def local(self, *args: P.args, **kwargs: P.kwargs) -> L:
        """Run here, in this process."""
        checks.settle_imports()
        return self.get_raw_f()(*args, **kwargs)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> L:
        """The same as `.local(...)`."""
        return self.local(*args, **kwargs)

    def _spawn(self, *args: P.args, **kwargs: P.kwargs) -> FunctionCall[R]:
        from woodfrog.sdk.call import Call, FunctionCall

        self._expect(False, "spawn")
        target = self._target()
        call = Call(target, args, kwargs)
        call.send()
        return FunctionCall(call.id, target.client, self._tag)

    async def _spawn_aio(self, *args: P.args, **kwargs: P.kwargs) -> FunctionCall[R]:
        from woodfrog.sdk.call import in_thread

        return await in_thread(self._spawn)(*args, **kwargs)

    @property
    def spawn(self) -> Dual[P, FunctionCall[R], Coroutine[Any, Any, FunctionCall[R]]]:
        """`spawn(*args, **kwargs)`: start a call and return at once with a FunctionCall."""
        return Dual(self._spawn, self._spawn_aio)

    def _remote_gen(self, *args: P.args, **kwargs: P.kwargs) -> Iterator[Any]:
        from woodfrog.sdk.call import Call

        self._expect(True, "remote_gen")
        yield from Call(self._target(), args, kwargs).items()

    async def _remote_gen_aio(self, *args: P.args, **kwargs: P.kwargs) -> AsyncIterator[Any]:
        from woodfrog.sdk.call import Call, aio_iterate, give_up, in_thread

        self._expect(True, "remote_gen")
        target = await in_thread(self._target)()
        call = Call(target, args, kwargs)
        async for item in aio_iterate(call.items(), lambda: give_up([call])):
            yield item

    @property
    def remote_gen(self) -> Dual[P, Iterator[Any], AsyncIterator[Any]]:
        """`remote_gen(*args, **kwargs)`: the items of a generator as they come. Leaving the loop cancels it."""
        return Dual(self._remote_gen, self._remote_gen_aio)

    def _map(
        self,
        *input_iterators: Iterable[Any],
        kwargs: dict[str, Any] | None = None,
        order_outputs: bool = True,
        return_exceptions: bool = False,
        wrap_returned_exceptions: bool = False,
    ) -> Iterator[Any]:
        from woodfrog.sdk.call import map_calls, zipped

        del wrap_returned_exceptions
        self._expect(False, "map")
        inputs = zipped(input_iterators, kwargs or {})
        yield from map_calls(self._target(), inputs, order_outputs=order_outputs, return_exceptions=return_exceptions)

    async def _map_aio(
        self,
        *input_iterators: Any,
        kwargs: dict[str, Any] | None = None,
        order_outputs: bool = True,
        return_exceptions: bool = False,
        wrap_returned_exceptions: bool = False,
    ) -> AsyncIterator[Any]:
        import asyncio

        from woodfrog.sdk.call import zipped

        del wrap_returned_exceptions
        inputs = zipped(input_iterators, kwargs or {}, asyncio.get_running_loop())
        async for item in self._many_aio(inputs, order_outputs, return_exceptions):
            yield item

    async def _many_aio(
        self, inputs: Iterator[Any], order_outputs: bool, return_exceptions: bool
    ) -> AsyncIterator[Any]:
        from woodfrog.sdk.call import MapRun, aio_iterate, in_thread

        self._expect(False, "map")
        target = await in_thread(self._target)()
        run = MapRun(target, inputs, order_outputs=order_outputs, return_exceptions=return_exceptions)
        async for item in aio_iterate(iter(run), run.close):
            yield item

    @property
    def map(self) -> Dual[..., Iterator[Any], AsyncIterator[Any]]:
        """`map(*iterables, kwargs={}, order_outputs=True, return_exceptions=False)`: one call for each input.

        Inputs are taken as they are needed, about a hundred at a time. The first exception ends it and cancels the
        rest, unless `return_exceptions` hands exceptions out like results. Nothing is called before the first item is
        asked for.

        Example:
            >>> list(square.map(range(3)))  # doctest: +SKIP
            [0, 1, 4]
        """
        return Dual(self._map, self._map_aio)

    def _starmap(
        self,
        input_iterator: Iterable[Iterable[Any]],
        *,
        kwargs: dict[str, Any] | None = None,
        order_outputs: bool = True,
        return_exceptions: bool = False,
        wrap_returned_exceptions: bool = False,
    ) -> Iterator[Any]:
        from woodfrog.sdk.call import map_calls, starred

        del wrap_returned_exceptions
        self._expect(False, "starmap")
        inputs = starred(input_iterator, kwargs or {})
        yield from map_calls(self._target(), inputs, order_outputs=order_outputs, return_exceptions=return_exceptions)

    async def _starmap_aio(
        self,
        input_iterator: Any,
        *,
        kwargs: dict[str, Any] | None = None,
        order_outputs: bool = True,
        return_exceptions: bool = False,
        wrap_returned_exceptions: bool = False,
    ) -> AsyncIterator[Any]:
        import asyncio

        from woodfrog.sdk.call import starred

        del wrap_returned_exceptions
        inputs = starred(input_iterator, kwargs or {}, asyncio.get_running_loop())
        async for item in self._many_aio(inputs, order_outputs, return_exceptions):
            yield item

    @property
    def starmap(self) -> Dual[..., Iterator[Any], AsyncIterator[Any]]:
        """As `map`, over one iterable whose items are tuples of arguments."""
        return Dual(self._starmap, self._starmap_aio)

    def _for_each(
        self, *input_iterators: Iterable[Any], kwargs: dict[str, Any] | None = None, ignore_exceptions: bool = False
    ) -> None:
        for _ in self._map(*input_iterators, kwargs=kwargs, order_outputs=False, return_exceptions=ignore_exceptions):
            pass

    async def _for_each_aio(
        self, *input_iterators: Any, kwargs: dict[str, Any] | None = None, ignore_exceptions: bool = False
    ) -> None:
        async for _ in self._map_aio(
            *input_iterators, kwargs=kwargs, order_outputs=False, return_exceptions=ignore_exceptions
        ):
            pass

    @property
    def for_each(self) -> Dual[..., None, Coroutine[Any, Any, None]]:
        """`for_each(*iterables, kwargs={}, ignore_exceptions=False)`: as `map`, without results."""
        return Dual(self._for_each, self._for_each_aio)

    def _spawn_map(
        self, *input_iterators: Iterable[Any], kwargs: dict[str, Any] | None = None
    ) -> list[FunctionCall[R]]:
        return [self._spawn(*args, **(kwargs or {})) for args in zip(*input_iterators, strict=False)]

    async def _spawn_map_aio(
        self, *input_iterators: Iterable[Any], kwargs: dict[str, Any] | None = None
    ) -> list[FunctionCall[R]]:
        from woodfrog.sdk.call import in_thread

        return await in_thread(self._spawn_map)(*input_iterators, kwargs=kwargs)

    @property
    def spawn_map(self) -> Dual[..., list[FunctionCall[R]], Coroutine[Any, Any, list[FunctionCall[R]]]]:
        """`spawn_map(*iterables, kwargs={})`: `spawn` for each input; the FunctionCalls in order."""
        return Dual(self._spawn_map, self._spawn_map_aio)

    def __reduce__(self) -> tuple[Any, ...]:
        # By name: code travels with the deploy. A serialized function's deploy has no other code, so its comes along.
        name = getattr(self._owner, "app_name", None)
        if name is None or self._params is not None:
            raise SpecError(
                f"the handle of {self._tag} cannot be pickled: its app has no name, or it is an instance's method"
            )
        serialized = self.spec is not None and self.spec.source.kind == "serialized"
        return _rebuild, (name, self._tag, self._raw if serialized else None, self._method)

    def __repr__(self) -> str:
        return f"<Function {self._tag}>"


class Decorator(Protocol):
    """What `@app.function()` makes of a function: a call of an `async def` gives its result, as of any other."""

    @overload
    def __call__(self, raw: Callable[P, Coroutine[Any, Any, R]], /) -> Function[P, R, Coroutine[Any, Any, R]]: ...

    @overload
    def __call__(self, raw: Callable[P, R], /) -> Function[P, R, R]: ...


def _rebuild(
    app_name: str, tag: str, raw: Callable[..., Any] | None, method: MethodSpec | None
) -> Function[..., Any, Any]:
    return Function(Deployed(app_name), tag, raw=raw, method=method)
