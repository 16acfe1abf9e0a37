"""Apps: where functions and classes are gathered, run and deployed."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar, cast, dataclass_transform

from woodfrog.errors import DaemonError, NotFoundError, SpecError, WoodfrogError
from woodfrog.sdk import absent, checks, options, source
from woodfrog.sdk.cls import Cls, Method, make_cls, parameter
from woodfrog.sdk.dual import ClassDual, Dual, at_once
from woodfrog.sdk.functions import LOOK, NO_WEB, SERVE, Decorator, Deployed, Function, inside, method_spec
from woodfrog.sdk.hooks import in_worker
from woodfrog.sdk.image import Image
from woodfrog.sdk.secret import Secret
from woodfrog.sdk.volume import Volume
from woodfrog.spec import LeftOut

if TYPE_CHECKING:
    import threading
    from typing import Unpack

    from woodfrog.sdk.client import Client, Reply

__all__ = ["App", "LocalEntrypoint", "Stub", "enable_output"]

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C", bound=type)

_output = False
STOP_S = 5.0
"""How long the end of `app.run()` waits for a daemon that is away."""
TOLD = 3
"""So many calls that go on are told by their ids."""
PRESENT_S = 60.0
"""How often a running app's client says that it is there."""


class LocalEntrypoint:
    """A function of the client's, run by `woodfrog run`."""

    def __init__(self, app: App, raw_f: Callable[..., Any], name: str, where: str) -> None:
        self.app, self.raw_f, self.name, self.where = app, raw_f, name, where
        self.__doc__ = raw_f.__doc__
        self.__name__ = raw_f.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.raw_f(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<LocalEntrypoint {self.name}>"


@checks.lacking(
    {
        "get_dashboard_url": LOOK,
        "logs": LOOK,
        "registered_web_endpoints": NO_WEB,
        "sandboxes": "run the program with subprocess inside a function",
        "serve": "use `woodfrog run`, or `with app.run():`",
        "set_description": "an app is known by its name",
        "stats": LOOK,
        "stop": "use `woodfrog app stop`",
    }
)
class App:
    """A group of functions and classes that are deployed together.

    Args:
        name: letters, digits, '.', '_', '-'. Needed to deploy; `run` makes one up.
        image, secrets, volumes: given to every function, beside its own.
        include_source: False leaves the program's code at home: only installed modules can then be imported.

    Raises:
        SpecError: a wrong value. TypeError: an unknown parameter.

    Example:
        >>> import woodfrog
        >>> app = woodfrog.App("example")
        >>> @app.function(cpu=1.0, enable_memory_snapshot=True, serialized=True)
        ... def square(x):
        ...     return x * x
        >>> with app.run():  # doctest: +SKIP
        ...     square.remote(3)
        9
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        image: Image | None = None,
        secrets: Sequence[Secret] | None = None,
        volumes: Mapping[Any, Volume] | None = None,
        include_source: bool | None = None,
        tags: Mapping[str, str] | None = None,
        **unknown: Any,
    ) -> None:
        self._tags = dict(tags or {})
        where = checks.caller()
        known = ("name", "image", "secrets", "volumes", "include_source", "tags")
        for key in unknown:
            raise TypeError(f"App has no parameter {key!r}{checks.nearest(key, known)} ({where})")
        self.name = checks.name(name, "App") if name is not None else None
        given = {"image": image, "secrets": secrets, "volumes": volumes, "include_source": include_source}
        for value in given.values():
            if (stand_in := absent.among(value)) is not None:
                raise SpecError(f"App({name!r}): {stand_in.text} ({stand_in.where})", code="not-yet")
        try:
            parsed = {k: options.PARAMETERS[k].parse(v) for k, v in given.items() if v is not None}
        except (TypeError, ValueError) as e:
            raise SpecError(f"App({name!r}): {e} ({where})", code="bad-parameter") from None
        self._defaults = options.Defaults(**parsed)
        self._handles: dict[str, Function[..., Any, Any] | Cls] = {}
        self._entrypoints: dict[str, LocalEntrypoint] = {}
        self._included_by: list[App] = []
        self._running: tuple[Client, str] | None = None
        self._deployed: Deployed | None = None
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("woodfrog."):
            frame = frame.f_back
        module = frame.f_globals.get("__name__", "")
        module = source.main_name() if module == "__main__" else module
        file = frame.f_globals.get("__file__")
        self._program: tuple[str, str] | None = (module, file) if module and file else None

    # What it holds.

    @property
    def app_name(self) -> str | None:
        """Name over there, of a handle that travels by name."""
        return self._deployed.app_name if self._deployed else self.name

    @property
    def app_id(self) -> str | None:
        """What it is called over there while it runs, or since this program deployed it."""
        return self._running[1] if self._running else self._deployed.app_name if self._deployed else None

    @property
    def description(self) -> str | None:
        return self.name

    @property
    def set_tags(self) -> Dual[..., None, Coroutine[Any, Any, None]]:
        """`set_tags(tags)`: kept for `get_tags` of this very object. Tags have no other effect here."""

        def keep(tags: Mapping[str, str], *, client: Any = None) -> None:
            self._tags = dict(tags)

        return at_once(keep)

    @property
    def get_tags(self) -> Dual[..., dict[str, str], Coroutine[Any, Any, dict[str, str]]]:
        """`get_tags()`: what `App(tags=...)` or `set_tags` said."""

        def tell(*, client: Any = None) -> dict[str, str]:
            return dict(self._tags)

        return at_once(tell)

    @property
    def image(self) -> Image:
        """The image of functions that have none of their own, for `with app.image.imports():`."""
        return Image(self._defaults.image)

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """What of its functions, classes and methods runs and deploys go without: woodfrog lacks what they ask for."""
        return tuple(left for handle in self._handles.values() for left in handle._left_out())

    @property
    def handles(self) -> tuple[Function[..., Any, Any] | Cls, ...]:
        """All functions and classes."""
        return tuple(self._handles.values())

    @property
    def registered_functions(self) -> dict[str, Function[..., Any, Any]]:
        return {k: h for k, h in self._handles.items() if isinstance(h, Function)}

    @property
    def registered_classes(self) -> dict[str, Cls]:
        return {k: h for k, h in self._handles.items() if isinstance(h, Cls)}

    @property
    def registered_entrypoints(self) -> dict[str, LocalEntrypoint]:
        return dict(self._entrypoints)

    def __getitem__(self, tag: str) -> Function[..., Any, Any] | Cls:
        """The function or class called `tag`; of a looked-up app, a handle of the function called so."""
        if tag in self._handles:
            return self._handles[tag]
        if self._deployed is not None and not self._handles:
            return Function.from_name(self._deployed.app_name, tag)
        raise KeyError(f"app {self.name} has no function {tag!r}{checks.nearest(tag, self._handles)}")

    def _add(self, handle: Function[..., Any, Any] | Cls) -> None:
        before = self._handles.get(handle.tag)
        # In a notebook a cell is run again: the later definition counts.
        again = before is not None and before.spec is not None and before.spec.source.kind == "serialized"
        again = again and handle.spec is not None and handle.spec.source.module == "__main__"
        if before is not None and not again:
            raise SpecError(
                f"two functions of one name in app {self.name or '(unnamed)'}: {handle._where}, and before it "
                f"{before._where}; rename one, or give it name=...",
                code="duplicate-name",
            )
        self._handles[handle.tag] = handle

    # Decorators.

    def function(self, *args: Any, **parameters: Unpack[options.Options]) -> Decorator:
        """Decorates a function so that it can run in containers. The parameters are those of `Options`.

        Raises:
            SpecError: a wrong value, a second function of that name, or a function that a container could not import.
            TypeError: an unknown parameter; names the nearest.
        """
        line = checks.caller()
        if args:
            raise TypeError(f"write @app.function(), with parentheses and with named parameters only ({line})")

        def decorate(raw: Callable[P, Any]) -> Function[P, Any, Any]:
            name = getattr(raw, "__name__", type(raw).__name__)
            where = f"{name}, {line}"
            if isinstance(raw, Method):
                raise SpecError(
                    f"{name}: @method() and @app.function() do not go together: use @app.cls() on its class ({line})"
                )
            if isinstance(raw, (Function, Cls)):
                raise SpecError(f"{raw.tag} is decorated twice ({line})")
            if isinstance(raw, type) or not callable(raw) or not hasattr(raw, "__qualname__"):
                raise SpecError(f"@app.function() is for functions, got {raw!r}: use @app.cls() for a class ({line})")
            spec = method_spec(raw, name)
            built = options.build_spec(
                "function",
                name=name,
                module=source.module_name(raw),
                qualname=raw.__qualname__,
                methods=(spec,),
                options=cast("Mapping[str, Any]", parameters),
                defaults=self._defaults,
                where=where,
            )
            handle: Function[P, Any, Any] = Function(
                self,
                built.spec.tag,
                raw=raw,
                method=built.spec.methods[0],
                spec=built.spec,
                where=where,
                include_source=built.include_source,
                lacks=(*built.lacks, *absent.lacks_of(raw)),
            )
            self._add(handle)
            return handle

        return decorate

    @dataclass_transform(field_specifiers=(parameter,), kw_only_default=True)
    def cls(self, *args: Any, **parameters: Unpack[options.Options]) -> Callable[[C], C]:
        """Decorates a class so that its instances live in containers. The parameters are those of `Options`.

        Raises:
            SpecError: a wrong value, a second class of that name, `enter(snap=True)` without snapshots, no method.
            TypeError: an unknown parameter; names the nearest.
        """
        line = checks.caller()
        if args:
            raise TypeError(f"write @app.cls(), with parentheses and with named parameters only ({line})")

        def decorate(user_cls: C) -> C:
            handle = make_cls(self, user_cls, cast("Mapping[str, Any]", parameters), self._defaults, line)
            self._add(handle)
            return cast("C", handle)  # For editors it is still the class.

        return decorate

    if not TYPE_CHECKING:  # to a type checker it is not there

        def server(self, *args, **parameters):
            """Of Modal's: the class is left out of runs and deploys."""
            line = checks.caller()
            lack = absent.Lack(f"woodfrog does not have Modal's @app.server() yet: {SERVE}", line)

            def decorate(user_cls):
                if not isinstance(user_cls, type):
                    raise SpecError(f"@app.server() is for classes, got {user_cls!r} ({line})")
                name = user_cls.__name__
                handle = Cls(self, name, user_cls=user_cls, where=f"{name}, {line}", lacks=(lack,))
                self._add(handle)
                return handle

            return decorate

    def local_entrypoint(self, *args: Any, name: str | None = None) -> Callable[[Callable[P, R]], LocalEntrypoint]:
        """Decorates the function that `woodfrog run` calls here, on the client, with the app running.

        Raises:
            SpecError: a second one of that name.
        """
        line = checks.caller()
        if args:
            raise TypeError(f"write @app.local_entrypoint(), with parentheses ({line})")

        def decorate(raw: Callable[P, R]) -> LocalEntrypoint:
            if not callable(raw) or isinstance(raw, (type, Function, Cls)):
                raise SpecError(f"@app.local_entrypoint() is for plain functions, got {raw!r} ({line})")
            tag = name or raw.__name__
            entrypoint = LocalEntrypoint(self, raw, tag, f"{tag}, {line}")
            before = self._entrypoints.get(tag)
            if before is not None:
                raise SpecError(f"two local entrypoints of one name: {entrypoint.where}, and before it {before.where}")
            self._entrypoints[tag] = entrypoint
            return entrypoint

        return decorate

    def include(self, other_app: App, inherit_tags: bool = True) -> App:
        """Take in all functions and classes of another app, as that app described them.

        Raises:
            SpecError: a name that is taken.
        """
        del inherit_tags
        if not isinstance(other_app, App):
            raise SpecError(f"App.include needs an App, got {type(other_app).__name__} ({checks.caller()})")
        for handle in other_app._handles.values():
            if self._handles.get(handle.tag) is not handle:
                self._add(handle)
        other_app._included_by.append(self)
        return self

    # Running and deploying.

    def reach(self, tag: str) -> tuple[Client, str]:
        """The client and the app's name over there, for a call of `tag`.

        Raises:
            SpecError: the app neither runs nor is deployed by this program, or this is a container.
        """
        if in_worker():
            raise inside(tag)
        apps: list[App] = [self]
        for app in apps:
            if app._running is not None:
                return app._running
            apps += [a for a in app._included_by if a not in apps]
        for app in apps:
            if app._deployed is not None:
                return app._deployed.reach(tag)
        file = self._program[1] if self._program else "FILE"
        service, _, _ = tag.partition(".")
        kind = "Cls" if isinstance(self._handles.get(service), Cls) else "Function"
        raise SpecError(
            f"{tag}.remote() needs a running app: call it inside `with app.run():` or start the program with "
            f"`woodfrog run {checks.short(file)}`; to call a deployed app use "
            f"woodfrog.{kind}.from_name({self.name or 'APP'!r}, {service!r})",
            code="not-running",
        )

    def _send(
        self,
        name: str,
        *,
        ephemeral: bool,
        attended: bool = False,
        snapshot: bool = False,
        strategy: str = "rolling",
        strict: bool = False,
    ) -> tuple[Client, str]:
        from woodfrog.sdk.client import connect
        from woodfrog.sdk.deploy import build, send

        left = self.left_out
        nothing = not ephemeral and left and all(handle._lacks for handle in self.handles)
        if left and (strict or nothing):
            for item in left[1:]:
                checks.tell(f"{item.tag}: {item.why}")
            none = "" if strict else f"nothing of {name} can be deployed: "
            more = f"; the same of {len(left) - 1} more, named above" if left[1:] else ""
            raise SpecError(f"{none}{left[0].tag}: {left[0].why}{more}", code="not-yet")
        bundle = build(name, self.handles, self._program)
        for item in left:
            checks.tell(f"{item.tag} is left out: {item.why}")
        client = connect()
        answer = send(client, bundle, ephemeral=ephemeral, attended=attended, snapshot=snapshot, strategy=strategy)
        return client, str(answer.get("app", name))

    def run(self, *, name: str | None = None, detach: bool = False, **ignored: Any) -> RunningApp:
        """`with app.run():` (or `async with`): deploys the app for the time of the block, under a name of its own.

        Args:
            name: what that name begins with, instead of the app's own.
            detach: leave the app running at the end of the block, and its calls where this process is interrupted
                (Ctrl-C) or killed.

        Raises:
            SpecError: see `deploy`; or the app runs already.
            HostError, DaemonError: no daemon, and none could be started.
        """
        # There is one of each here.
        checks.known("App.run", ignored, ("client", "environment_name", "interactive", "show_progress"))
        return RunningApp(self, detach, checks.name(name, "App.run(name=...)") if name is not None else None)

    def _deploy(
        self,
        name: str | None = None,
        *,
        snapshot: bool = False,
        strategy: Literal["rolling", "recreate"] = "rolling",
        strict: bool = False,
        **ignored: Any,
    ) -> App:
        checks.known("App.deploy", ignored, ("client", "environment_name", "tag"))
        if strategy not in ("rolling", "recreate"):
            raise SpecError(f"deploy(strategy={strategy!r}): expected 'rolling' or 'recreate' ({checks.caller()})")
        if in_worker():
            raise SpecError("an app cannot be deployed from inside a container")
        name = name or self.name
        if name is None:
            raise SpecError(
                f'a deployed app needs a name: woodfrog.App("name"), or deploy(name=...) ({checks.caller()})'
            )
        client, app = self._send(
            checks.name(name, "App.deploy"), ephemeral=False, snapshot=snapshot, strategy=strategy, strict=strict
        )
        deployed = Deployed(app)
        deployed._client = client
        self._deployed = deployed
        return self

    @property
    def deploy(self) -> Dual[..., App, Coroutine[Any, Any, App]]:
        """`deploy(name=None, snapshot=False, strategy="rolling", strict=False)`: deploy the app so that it stays, under
        its name. Gives the app.

        Args:
            snapshot: take the snapshots now instead of at the first calls.
            strategy: "rolling": warm containers of the version before that are in use serve until this one has a
                container ready. "recreate": every call from now on gets the new code.
            strict: refuse the deploy where a function or method asks for what woodfrog does not have. Otherwise these
                are left out, and named on stderr; the app has the rest.

        Raises:
            SpecError: no name, a missing package, code that a container could not import.
            HostError, DaemonError: no daemon, and none could be started.
        """
        from functools import partial

        def aio(*args: Any, **kwargs: Any) -> Coroutine[Any, Any, App]:
            from woodfrog.sdk.call import in_thread

            return in_thread(partial(self._deploy, *args, **kwargs))()

        return Dual(self._deploy, aio)

    @ClassDual
    @classmethod
    def lookup(cls, name: str, *, create_if_missing: bool = False, **ignored: Any) -> App:
        """A handle of the deployed app `name`; `app["square"]` is its function. Asks nothing of the daemon yet."""
        del create_if_missing
        checks.known("App.lookup", ignored, ("client", "environment_name"))
        app = cls(name)
        app._deployed = Deployed(name)
        return app

    def __reduce__(self) -> tuple[Any, ...]:
        return _by_name, (self.app_name,)

    def __repr__(self) -> str:
        return f"App({self.name!r})"


def _by_name(name: str | None) -> App:
    return App.lookup(name) if name else App()


class RunningApp:
    """The block of `app.run()`."""

    def __init__(self, app: App, detach: bool, name: str | None = None) -> None:
        self._app, self._detach, self._name = app, detach, name
        self._logs: threading.Thread | None = None
        self._over: threading.Event | None = None
        self._process = os.getpid()

    def __enter__(self) -> App:
        app = self._app
        if in_worker():
            raise SpecError(
                "an app cannot be run from inside a container: where the program does so at top level, put it below "
                f'`if __name__ == "__main__":` ({checks.caller()})'
            )
        if app._running is not None:
            raise SpecError(f"app {app.name or '(unnamed)'} runs already: do not nest app.run() ({checks.caller()})")
        stem = re_name(Path(app._program[1]).stem) if app._program else "app"
        name = f"{(self._name or app.name or stem)[:54]}-{os.urandom(4).hex()}"
        try:
            app._running = app._send(name, ephemeral=True, attended=not self._detach)
        except KeyboardInterrupt:
            from woodfrog.sdk.client import connect

            # It may have arrived.
            with contextlib.suppress(WoodfrogError):
                _stop(connect(start=False), name, interrupted=True)
            raise
        if self._detach:
            from woodfrog.sdk.call import Detached, detached

            detached[app._running[1]] = Detached()
        import threading

        self._over = threading.Event()
        threading.Thread(target=_stay, args=(*app._running, self._over), daemon=True, name="woodfrog-presence").start()
        if _output:
            self._logs = threading.Thread(target=_show, args=app._running, daemon=True, name="woodfrog-output")
            self._logs.start()
        return app

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        running, self._app._running = self._app._running, None
        if self._over is not None:
            self._over.set()
        if running is None or os.getpid() != self._process:  # a forked child leaves its copy
            return
        client, name = running
        if self._detach:
            import asyncio

            if isinstance(error, (KeyboardInterrupt, asyncio.CancelledError)):
                _leave(name)
            return
        cancelled = 0
        with contextlib.suppress(NotFoundError):
            try:
                cancelled = _stop(client, name, interrupted=isinstance(error, KeyboardInterrupt))
            except DaemonError as e:
                if error is None:
                    raise
                checks.note(f"stop:{name}", f"app {name} could not be stopped: {e}")
        if self._logs is not None:
            self._logs.join(2.0)
        if cancelled and error is None:
            checks.note(
                f"cancelled:{name}",
                f"{cancelled} call{'s' if cancelled > 1 else ''} of {name} had not finished and "
                f"{'were' if cancelled > 1 else 'was'} cancelled: a run that is detached (`woodfrog run --detach`, "
                "`app.run(detach=True)`) goes on with its calls",
            )

    async def __aenter__(self) -> App:
        from woodfrog.sdk.call import in_thread

        return await in_thread(self.__enter__)()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        from woodfrog.sdk.call import in_thread

        await in_thread(self.__exit__)(kind, error, traceback)


def _leave(name: str) -> None:
    """The end of an interrupted run that is detached."""
    from woodfrog.sdk.call import detached

    run = detached[name]
    run.interrupted.set()
    calls = [f"{call.id} ({call.target.tag})" for call in run.left]
    if not calls:
        return
    more = f" and {len(calls) - TOLD} more (`woodfrog app calls {name}`)" if len(calls) > TOLD else ""
    checks.note(
        f"left:{name}",
        f"{name} goes on with call {', '.join(calls[:TOLD])}{more}: `woodfrog app logs {name} -f` shows its output, "
        f"woodfrog.FunctionCall.from_id({run.left[0].id!r}).get() gets the result, `woodfrog app stop {name}` ends it",
    )


def _stop(client: Client, name: str, *, interrupted: bool) -> int:
    """The number of calls that were cancelled for it."""
    from woodfrog.sdk.client import segment

    path = f"/apps/{segment(name)}/stop"
    if not interrupted:
        return _cancelled(client.request("POST", path, reconnect_s=STOP_S))
    with client.apart(STOP_S) as apart:
        return _cancelled(apart.request("POST", path))


def _cancelled(reply: Reply) -> int:
    answer = reply.json()
    return int(answer.get("cancelled", 0)) if isinstance(answer, dict) else 0


def _stay(client: Client, name: str, over: threading.Event) -> None:
    """Say again and again that the app's client is there, until its block is over.

    The daemon stops an app of whose client it has heard nothing for 5 minutes; while a call runs for 6, or never if
    it is detached.
    """
    from woodfrog.sdk.client import segment

    while not over.wait(PRESENT_S):
        try:
            client.request("POST", f"/apps/{segment(name)}/touch", reconnect_s=0.0)
        except NotFoundError:
            return
        except WoodfrogError:
            continue  # the daemon is away: the next one has the app, too


def re_name(stem: str) -> str:
    """A file's stem as a name."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in stem).lstrip("._-") or "app"


def _show(client: Client, name: str) -> None:
    """Print an app's log lines as they come."""
    with contextlib.suppress(NotFoundError, DaemonError):
        for entry in client.logs(name, follow=True):
            out = sys.stderr if entry.get("stream") == "stderr" else sys.stdout
            print(entry.get("line", ""), file=out, flush=True)


@contextmanager
def enable_output(show_progress: bool = True) -> Iterator[None]:
    """Within this block, `app.run()` shows what the functions print."""
    del show_progress
    global _output
    before, _output = _output, True
    try:
        yield
    finally:
        _output = before


class Stub(App):
    """The name that `App` had when checkpoints were in beta (`checkpointing_enabled=True`)."""

    def __init__(self, name: str | None = None, **parameters: Any) -> None:
        warnings.warn("Stub is now called App", DeprecationWarning, stacklevel=2)
        super().__init__(name, **parameters)

    def is_inside(self, image: Image | None = None) -> bool:
        """True inside a container; `woodfrog.is_local()` says the opposite."""
        del image
        warnings.warn("Stub.is_inside() is now called `not woodfrog.is_local()`", DeprecationWarning, stacklevel=2)
        return in_worker()
