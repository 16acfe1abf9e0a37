"""The user's code in this process: import it, construct, run the hooks, call it. No socket, no frames."""

from __future__ import annotations

import gc
import importlib
import os
import pickle
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import GeneratorType
from typing import Any

from woodfrog.errors import NotFoundError, SpecError
from woodfrog.worker import codec, generators, maps, nogpu, renew, state

__all__ = ["Runtime", "StageError"]

_HOOKS, _TENSORS = "woodfrog.sdk.hooks", "woodfrog.tensors.away"
"""Modules that meet the worker here only: loaded by the user's code or not at all."""

_COLLECT_ALL_BYTES = 256 << 20
"""A process that has so much in memory is collected as a whole before it is frozen."""
_HOLD_CALLS = 8
"""So many calls of a thawed process the garbage collector leaves alone what was frozen: a full collection would touch
all of it, and all of it would have to be brought in. Most copies of a burst are gone before that."""


class StageError(Exception):
    """The user's code failed before it could serve; `stage` is one of protocol.py's, `cause` what it raised."""

    def __init__(self, stage: str, cause: BaseException) -> None:
        super().__init__(stage)
        self.stage = stage
        self.cause = cause


@dataclass(frozen=True)
class _Traces:
    """What imports left in the process's surroundings; a boot keeps it."""

    path_before: tuple[str, ...] = ()
    path_after: tuple[str, ...] = ()
    env: dict[str, str | None] = field(default_factory=dict)


def _traces(message: dict[str, Any], env: dict[str, str]) -> _Traces:
    """Raises RuntimeError for what could not be told apart from what `message` set."""
    given, now = message["sys_path"], list(sys.path)
    at = next((i for i in range(len(now) - len(given) + 1) if now[i : i + len(given)] == given), None)
    if at is None or sys.argv != message["argv"] or os.getcwd() != os.path.realpath(message["cwd"]):
        raise RuntimeError("an import rearranged sys.path or sys.argv, or changed the working directory")
    changed = {name: os.environ.get(name) for name in {*env, *os.environ} if os.environ.get(name) != env.get(name)}
    return _Traces(tuple(now[:at]), tuple(now[at + len(given) :]), changed)


class _Lookups:
    """The first finder: finds nothing, and knows every top-level module that was looked for."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        self.names.add(name.partition(".")[0])


def _resident_bytes() -> int:
    with open("/proc/self/statm", "rb") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _has_children() -> bool:
    """Whether there may be any."""
    try:
        for task in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{task}/children", "rb") as children:
                if children.read(1):
                    return True
    except OSError:
        return True  # a kernel without these files, or a thread that ended
    return False


class Runtime:
    """One booted function or class."""

    def __init__(self) -> None:
        self._boot: dict[str, Any] = {}
        self._target: Any = None
        self._instance: Any = None
        self._loop: Any = None
        self._methods: dict[str, bool] = {}
        self._hidden_gpu = False
        self._shield = nogpu.Shield()
        self._no_gpu = nogpu.Answers()
        self._shrinker: Any = None
        self.device_use: dict[str, int] = {}
        """What is on GPUs at the freeze; see `shrink.device_use`."""
        self._preloaded: _Traces | None = None
        self._held = 0
        self._descriptors = 0
        """At the program's start."""
        self._calls_to_hold = 0
        self.phases: dict[str, float] = {}

    @contextmanager
    def _stage(self, stage: str, phase: str) -> Iterator[None]:
        """Time a phase and turn whatever the user's code raises in it into a StageError."""
        with self._timed(phase):
            try:
                yield
            except BaseException as e:
                raise StageError(stage, e) from None

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.phases[phase] = round((time.perf_counter() - begin) * 1e3, 3)

    def preload(self, message: dict[str, Any]) -> dict[str, Any]:
        """Import what the program will import first.

        Returns:
            `phases`; `steps` as they went, those that loaded nothing in parentheses; `seen`, the top-level modules that
            were looked for; `files` that were loaded; `cpu_ms`, the processor time it took.

        Raises:
            StageError: "preload".
        """
        self.phases = {}
        begin, steps = time.process_time(), []
        with self._stage("preload", "preload"):
            self._surround(message)
            env, lookups = dict(os.environ), _Lookups()
            sys.meta_path.insert(0, lookups)
            try:
                for step in message["steps"]:
                    module, _, name = step.partition(":")
                    known = set(sys.modules)
                    found = __import__(module, {}, {}, (name,) if name else (), 0)
                    if name:
                        getattr(found, name)
                    steps.append(step if sys.modules.keys() - known else f"({step})")
            finally:
                sys.meta_path.remove(lookups)
            self._preloaded = _traces(message, env)
        files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
        return {
            "phases": self.phases,
            "steps": steps,
            "seen": sorted(lookups.names),
            "files": sorted(f for f in files if isinstance(f, str)),
            "cpu_ms": round((time.process_time() - begin) * 1e3, 3),
        }

    def _surround(self, message: dict[str, Any]) -> None:
        """Environment, arguments, import path and directory of the user's code."""
        traces = self._preloaded or _Traces()
        sys.argv = list(message["argv"])
        sys.path[:] = [*traces.path_before, *message["sys_path"], *traces.path_after]
        hidden = nogpu.hidden() if message.get("hide_gpu") else {}
        if hidden:
            self._shield.raise_()
        env = {**message["env"], **hidden, **traces.env}
        renew.set_environ({name: value for name, value in env.items() if value is not None})
        try:
            os.makedirs(message["cwd"], exist_ok=True)
            os.chdir(message["cwd"])
        except OSError as e:
            raise SpecError(f"the working directory {message['cwd']} cannot be entered: {e.strerror}") from None

    def boot(self, boot: dict[str, Any], body: bytearray) -> dict[str, float]:
        """Import, construct, run enter(snap=True).

        Raises:
            StageError: "import" or "enter".
        """
        self._boot, self.phases = boot, {}
        self._descriptors = _descriptors()
        self._methods = {m["name"]: bool(m.get("generator")) for m in boot["methods"]}
        self._hidden_gpu = bool(boot.get("hide_gpu"))
        if boot.get("entropy"):
            with self._stage("import", "renew"):
                renew.renew(bytes.fromhex(boot["entropy"]))
        with self._stage("import", "import"):
            self._surround(boot)
            self._target = self._load(bytes(body[boot.get("params_len", 0) :]))
        if boot["kind"] == "class":
            with self._stage("enter", "construct"):
                self._instance = self._construct(body[: boot.get("params_len", 0)])
            with self._stage("enter", "enter"):
                self._run_hooks("enter", snap=True)
        return self.phases

    def _load(self, blob: bytes) -> Any:
        module, qualname, tag = self._boot["module"], self._boot["qualname"], self._boot["tag"]
        if self._boot["source_kind"] == "serialized":
            target = codec.cloudpickle().loads(blob)
        else:
            target = importlib.import_module(module)
            for part in qualname.split("."):
                try:
                    target = getattr(target, part)
                except AttributeError:
                    raise SpecError(
                        f"module {module} has no {qualname!r} to serve {tag!r} from: "
                        "define it at the module's top level, or deploy with serialized=True"
                    ) from None
        target = getattr(target, "__woodfrog_wrapped__", target)
        if not callable(target):
            raise SpecError(f"{module}.{qualname}, which should serve {tag!r}, is a {type(target).__name__}")
        return target

    def _construct(self, params: bytearray) -> Any:
        args, kwargs = pickle.loads(params) if params else ((), {})
        if getattr(self._target, "__woodfrog_parameters__", None):
            return importlib.import_module("woodfrog.sdk.cls").construct(self._target, args, kwargs)
        return self._target(*args, **kwargs)

    def freeze(self) -> dict[str, float]:
        """Run the before-snapshot hooks and leave the process as small and as ready as it gets.

        Raises:
            StageError: "before-snapshot".
        """
        self.phases = {}
        with self._stage("before-snapshot", "before_snapshot"):
            for hook in reversed(_registered("_before_snapshot")):
                self._settle(hook())
            if self._hidden_gpu or not sys.modules.keys().isdisjoint(("vllm", _TENSORS)):
                # What is looked for is found through the collector, and it does not show what it was kept from. For
                # others it stays so: a collection of all would touch the pages that are shared with a zygote.
                self._let_go()
            self._put_away()
            with self._timed("preload"):
                codec.preload()
            if self._hidden_gpu:
                with self._timed("find_gpu"):
                    self._no_gpu.find()
            # The first caller waits for it: 20 ms with pandas imported, for next to nothing. Large things may be in a
            # cycle, though, and so may connections, with which nothing could be frozen.
            self._tidy(young=_resident_bytes() < _COLLECT_ALL_BYTES and _descriptors() <= self._descriptors)
        self._calls_to_hold = _HOLD_CALLS
        return self.phases

    def _put_away(self) -> None:
        """Have libraries free what need not travel, then move registered tensors off their devices."""
        shrinks = not sys.modules.keys().isdisjoint(("vllm", "torch")) or _has_children()
        if shrinks:
            from woodfrog.worker.shrink import OPTIONS, Shrinker, device_use

            wanted = getattr(sys.modules.get(_HOOKS), "_shrink", {})
            self._shrinker = Shrinker({**OPTIONS, **wanted})
            self._shrinker.before()
            self.phases.update(self._shrinker.phases)
            _tell(self._shrinker.warnings)
        tensors = sys.modules.get(_TENSORS)
        if tensors is not None:
            with self._timed("put_away.tensors"):
                _tell(tensors.put_away())
        if shrinks:
            try:
                self.device_use = device_use()
            except Exception as e:  # torch's inner matters; nothing but an answer is lost
                _tell([f"what is on the GPU is not known: {type(e).__name__}: {e}"])

    def _bring_back(self) -> list[str]:
        """Undo `_put_away`, also where no snapshot came of it; warnings."""
        warnings: list[str] = []
        tensors = sys.modules.get(_TENSORS)
        if tensors is not None:
            with self._timed("bring_back.tensors"):
                warnings += _tell(tensors.bring_back())
        if self._shrinker is None:
            return warnings
        shrinker, self._shrinker = self._shrinker, None
        shrinker.warnings, shrinker.phases = [], {}
        shrinker.after()
        self.phases.update(shrinker.phases)
        return warnings + _tell(shrinker.warnings)

    def settle(self) -> dict[str, float]:
        """The same for a worker that has no program yet.

        Raises:
            StageError: "preload".
        """
        self.phases = {}
        with self._stage("preload", "settle"):
            self._tidy(young=False)
        return self.phases

    def _tidy(self, *, young: bool) -> None:
        """
        Args:
            young: what is old stays uncollected for now.
        """
        with self._timed("prepare"):
            renew.prepare()
        with self._timed("collect"):
            gc.collect(1 if young else 2)
            self._hold()
        with self._timed("trim"):
            renew.trim_heap()
        with self._timed("join_code"):
            maps.join_code()

    def _hold(self) -> None:
        """Keep the collector from what there is; unless the program does so itself, and is left to it."""
        # What is kept from it may still go by itself, and then counts no more.
        if gc.get_freeze_count() <= self._held:
            gc.freeze()
            self._held = gc.get_freeze_count()

    def _let_go(self) -> None:
        """Have all of it collected as ever."""
        if gc.get_freeze_count() <= self._held:
            gc.unfreeze()
        self._held = 0

    def start(self, context: dict[str, Any]) -> tuple[dict[str, float], list[str]]:
        """Take on the identity of this instance; phases and warnings.

        Raises:
            StageError: "after-restore" or "enter-restore".
        """
        self.phases = {}
        warnings: list[str] = []
        restored = bool(context["restored"])
        state.restored, state.instance_id = restored, context["instance_id"]
        state.snapshot_id = context["snapshot_id"] if restored else None
        if not restored:
            self._let_go()
        with self._stage("after-restore", "reseed"):
            renew.set_environ(context["env"])
            if restored:
                families, warnings = renew.renew(bytes.fromhex(context["entropy"]))
                self.phases.update({f"reseed.{name}": ms for name, ms in families.items()})
            if self._hidden_gpu:
                self._shield.take_down()
                with self._timed("forget_gpu"):
                    warnings += _tell(self._no_gpu.forget())
        with self._stage("after-restore", "bring_back"):
            warnings += self._bring_back()
        if restored:
            with self._stage("after-restore", "after_restore"):
                for hook in list(_registered("_after_restore")):
                    self._settle(hook())
        if self._boot["kind"] == "class":
            with self._stage("enter-restore", "enter_restore"):
                self._run_hooks("enter", snap=False)
        if restored and self._loop is not None:
            # A session would hand out a connection that the freeze has closed before the loop has heard of its end.
            with self._timed("notice"):
                self._loop.run_until_complete(_two_rounds())
        return self.phases, warnings

    def stop(self) -> None:
        """Run the exit hooks and end the event loop.

        Raises:
            StageError: "exit".
        """
        with self._stage("exit", "exit"):
            try:
                if self._instance is not None:
                    self._run_hooks("exit")
            finally:
                self._end_loop()

    def is_generator(self, method: str) -> bool:
        return self._methods.get(method, False)

    def function(self, method: str) -> Callable[..., Any]:
        """What a call of `method` calls.

        Raises:
            NotFoundError: not one of the deployed methods.
        """
        if method not in self._methods:
            known = ", ".join(sorted(self._methods)) or "none"
            raise NotFoundError(f"{self._boot['tag']} has no method {method!r}; it has: {known}")
        return self._target if self._instance is None else _bound(self._instance, method)

    def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run it to its end and return its value; a generator is returned unstarted."""
        if self._held:
            self._calls_to_hold -= 1
            if self._calls_to_hold < 0:
                self._let_go()
        return self._settle(self.function(method)(*args, **kwargs))

    def items(self, value: Any) -> Generator[Any, None, None]:
        """The items of a generator, sync or async.

        Raises:
            TypeError: not something that gives items.
        """
        if isinstance(value, GeneratorType) or not hasattr(value, "__anext__"):
            yield from value
            return
        yield from generators.items(value, self._event_loop())

    def _settle(self, value: Any) -> Any:
        """Await what is awaitable, on the one event loop that lives as long as the worker."""
        if not hasattr(value, "__await__"):
            return value

        async def settle() -> Any:
            return await value

        return self._event_loop().run_until_complete(settle())

    def _event_loop(self) -> Any:
        if self._loop is None:
            import asyncio

            self._loop = asyncio.new_event_loop()
        return self._loop

    def _end_loop(self) -> None:
        if self._loop is None or self._loop.is_closed():
            return
        import asyncio

        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        if tasks:
            self._loop.run_until_complete(asyncio.wait(tasks, timeout=5))
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    def _run_hooks(self, kind: str, **wanted: bool) -> None:
        for function in _hooks(type(self._instance), kind, wanted):
            self._settle(function.__get__(self._instance)())


def _role(entry: Any) -> dict[str, Any] | None:
    for part in (entry, getattr(entry, "raw_f", None)):
        role = getattr(part, "__woodfrog_role__", None)
        if isinstance(role, dict):
            return role
    return None


def _hooks(cls: type, kind: str, wanted: dict[str, bool]) -> list[Any]:
    """Hooks of a class, bases first and in order of definition; an overridden one keeps its place and runs once."""
    entries: dict[str, Any] = {}
    for klass in reversed(cls.__mro__):
        for name, entry in vars(klass).items():
            if name in entries or _role(entry) is not None:
                entries[name] = entry
    found = []
    for entry in entries.values():
        role = _role(entry)
        if role is not None and role.get("kind") == kind and all(bool(role.get(k)) == v for k, v in wanted.items()):
            found.append(getattr(entry, "raw_f", None) or entry)
    return found


def _bound(instance: Any, name: str) -> Callable[..., Any]:
    for klass in type(instance).__mro__:
        raw = getattr(vars(klass).get(name), "raw_f", None)
        if raw is not None:
            return raw.__get__(instance, type(instance))  # type: ignore[no-any-return]
        if name in vars(klass):
            break
    return getattr(instance, name)  # type: ignore[no-any-return]


async def _two_rounds() -> None:
    """The event loop hears of what has happened in one, and tells who is concerned in the other."""
    import asyncio

    for _ in range(2):
        await asyncio.sleep(0)


def _registered(name: str) -> list[Callable[[], Any]]:
    """The user's snapshot hooks; the module is there only if the user's code imported it."""
    return getattr(sys.modules.get(_HOOKS), name, [])


def _tell(warnings: list[str]) -> list[str]:
    """Say them in the program's log, too."""
    for warning in warnings:
        print(f"woodfrog: {warning}", file=sys.stderr)
    return warnings
