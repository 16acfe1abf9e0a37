"""`woodfrog run` and `woodfrog deploy`: programs from a file or module."""

from __future__ import annotations

import inspect
import json
import sys
import threading
import time
import types
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from woodfrog.cli import output
from woodfrog.cli.logs import line_text
from woodfrog.cli.remote import get, segment
from woodfrog.errors import CaptureError, DaemonError, NotFoundError, SpecError, StartupError, WoodfrogError

if TYPE_CHECKING:
    from woodfrog.sdk.app import App
    from woodfrog.sdk.client import Client

Env = Annotated[
    str | None, typer.Option("--env", "-e", metavar="NAME", help="Ignored: for commands written for Modal.")
]
Strategy = Literal["rolling", "recreate"]
Module = Annotated[bool, typer.Option("-m", help="TARGET is a module's dotted name instead of a file.")]
DRAIN_S = 10.0
"""How long the last output is waited for once the app has been stopped."""
DETACHED_DRAIN_S = 1.0
"""The same of an app that goes on running: its containers do not end."""
INTERRUPTED_DRAIN_S = 2.0
"""The same after Ctrl-C, which is to end the program soon whatever the daemon does."""
POLL_S = 0.25
SETTLE_S = 600.0
"""How long `deploy --snapshot` waits for each, and `--wait` for the containers of each function."""


@dataclass(frozen=True)
class Runnable:
    """Something of the program that `run` can start."""

    app: App
    tag: str
    raw: Callable[..., Any]
    start: Callable[..., Any]
    local: bool
    """A local entrypoint: runs here, not in a container."""
    generator: bool = False
    method: bool = False
    constructor: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """What the method's class takes: annotation and default by name. Given to `start` among the named arguments."""


def apps_of(module: types.ModuleType) -> dict[str, App]:
    """The program's apps by the name of their variable."""
    from woodfrog.sdk.app import App

    found: dict[int, tuple[str, App]] = {}
    for name, value in vars(module).items():
        if issubclass(type(value), App):  # `isinstance` would ask, and so import, what `image.imports()` put off
            found.setdefault(id(value), (name, value))
    return dict(found.values())


def runnables(apps: dict[str, App]) -> dict[str, Runnable]:
    """What can be run, by name; `VARIABLE.NAME` where two apps have one of the same name.

    An app that includes another has the very functions of that one: no two of a name.
    """
    lists = {variable: _of_one(app) for variable, app in apps.items()}
    code: dict[str, set[int]] = {}
    for r in (r for found in lists.values() for r in found):
        code.setdefault(r.tag, set()).add(id(r.raw))
    return {
        f"{variable}.{r.tag}" if len(code[r.tag]) > 1 else r.tag: r for variable, found in lists.items() for r in found
    }


def _of_one(app: App) -> list[Runnable]:
    found = [Runnable(app, e.name, e.raw_f, e.raw_f, True) for e in app.registered_entrypoints.values()]
    left = {item.tag for item in app.left_out}
    for function in (f for tag, f in app.registered_functions.items() if tag not in left):
        generator = bool(function.is_generator)
        start = function.remote_gen if generator else function.remote
        found.append(Runnable(app, function.tag, function.get_raw_f(), start, False, generator))
    for cls in (c for tag, c in app.registered_classes.items() if tag not in left):
        for method in cls.spec.methods if cls.spec else ():
            found.append(_of_method(app, cls, method.name, method.generator))
    return found


def _of_method(app: App, cls: Any, name: str, generator: bool) -> Runnable:
    constructor = _constructor(cls)

    def start(*args: Any, **kwargs: Any) -> Any:
        own = {key: kwargs.pop(key) for key in constructor if key in kwargs}
        handle = getattr(cls(**own), name)
        return (handle.remote_gen if generator else handle.remote)(*args, **kwargs)

    raw = inspect.getattr_static(cls.__woodfrog_wrapped__, name)
    raw_f = getattr(raw, "raw_f", raw)
    return Runnable(app, f"{cls.tag}.{name}", raw_f, start, False, generator, method=True, constructor=constructor)


def _constructor(cls: Any) -> dict[str, tuple[Any, Any]]:
    """What is needed for an instance: the class's `parameter()` fields, else what its `__init__` takes by name."""
    from woodfrog.cli.program import class_parameters

    if cls.spec and cls.spec.parameters:
        return class_parameters(cls.spec.parameters)
    try:
        init = cls.__woodfrog_wrapped__.__init__
        parameters = list(inspect.signature(init).parameters.values())[1:]
        hints = inspect.get_annotations(init, eval_str=True)
    except Exception:  # of C code, or annotated with what is not there
        return {}
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {p.name: (hints.get(p.name), p.default) for p in parameters if p.kind in named}


def choose(module: types.ModuleType, source: str, name: str | None) -> Runnable:
    """What `FILE::NAME` means; without a name the only local entrypoint, else the only function.

    As in Modal the app's variable may stand before the name: `FILE::app.square`.

    Raises:
        SpecError: no app, no such name, or several and none named.
    """
    from woodfrog.cli.program import pick
    from woodfrog.sdk import absent

    apps = apps_of(module)
    if not apps:
        raise SpecError(f"{source}: no app in it: it needs a global `app = woodfrog.App(...)`", code="no-app")
    found = runnables(apps)
    variable, _, rest = (name or "").partition(".")
    if name not in found and rest and variable in apps:
        own = {n: r for n, r in found.items() if r.app is apps[variable]}
        if rest in own or any(n.startswith(rest + ".") for n in own):
            name = rest
    if name is not None and name not in found:
        # A class with one method stands for that method.
        methods = [n for n in found if n.startswith(name + ".")]
        name = methods[0] if len(methods) == 1 else name
    left = [item for app in apps.values() for item in app.left_out]
    for item in left:
        if name not in found and (item.tag in (name, str(name).partition(".")[0]) or not found):
            raise absent.error(item)
    local = [n for n, r in found.items() if r.local]
    chosen: Runnable = pick(found, name, what="function", source=source, prefer=local)
    return chosen


def run(
    context: typer.Context,
    target: Annotated[str, typer.Argument(metavar="FILE[::NAME]", help="Program, and the function or method in it.")],
    module: Module = False,
    name: Annotated[str, typer.Option("--name", "-n", help="Name of this run's app instead of the app's own.")] = "",
    detach: Annotated[
        bool,
        typer.Option(
            "--detach",
            "-d",
            help="Leave the app running at the end, also after Ctrl-C: until 5 minutes without a call.",
        ),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Show only what the program and functions print, and errors.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    write_result: Annotated[
        str, typer.Option("--write-result", "-w", metavar="PATH", help="Write the result, text or bytes, to this file.")
    ] = "",
    env: Env = None,
) -> None:
    """Run a function of a program, with the program's app running meanwhile.

    Without NAME the only local entrypoint is run, else the only function. What follows FILE are the function's own
    arguments, as options: `woodfrog run app.py::train --epochs 3`; `woodfrog run app.py::train --help` lists them. An
    option of a list is given once for each item, one of a dict as JSON.
    What the containers print appears here. Ctrl-C cancels; what runs with --detach goes on.
    """
    from woodfrog.cli.program import arguments_from, load, parse_reference
    from woodfrog.sdk.checks import be_quiet

    be_quiet(quiet)
    reference = parse_reference(target, module=module)
    _note_env(env)
    chosen = choose(load(reference), reference.source, reference.name)
    label = f"{reference.source}::{chosen.tag}"
    try:
        args, kwargs = arguments_from(
            chosen.raw, context.args, label=label, skip_self=chosen.method, constructor=chosen.constructor
        )
    except SpecError as e:
        misplaced = [a for a in context.args if a in _own_options(context)]
        if e.code == "bad-arguments" and "unrecognized" in e.message and misplaced:
            e.message += f"; options of `woodfrog run` such as {misplaced[0]} go before FILE"
        raise
    if write_result and (as_json or chosen.generator):
        raise SpecError(f"{label}: -w writes one result to a file: not with {'--json' if as_json else 'a generator'}")
    if name:
        from woodfrog.sdk.checks import name as checked

        chosen.app.name = checked(name, "--name")
    if chosen.local:
        # What the program reads of its own command line is what was meant for it.
        sys.argv = [reference.source, *context.args]
    shown = Shown()
    try:
        with _running(chosen.app, shown, detach=detach, quiet=quiet) as progress:
            result = _start(chosen, args, kwargs, progress, as_json=as_json)
    except (Exception, SystemExit) as e:
        if isinstance(e, StartupError) and (remote := _remote_text(e)) is not None and remote not in shown:
            output.note(remote.rstrip("\n"))
        if isinstance(e, SystemExit) or (isinstance(e, WoodfrogError) and not _from_container(e)):
            raise
        show_user_error(e, shown)
        raise typer.Exit(output.USER_ERROR) from None
    if write_result:
        _write(result, write_result, label)
    elif as_json:
        print(_json(result, label))
    elif result is not None and not chosen.local:
        print(result)


def _own_options(context: typer.Context) -> set[str]:
    return {text for parameter in context.command.params for text in parameter.opts}


def _note_env(env: str | None) -> None:
    if env is not None:
        from woodfrog.sdk.checks import note

        note("parameter:--env", "--env has no meaning on your own machine and is ignored")


def _start(
    chosen: Runnable, args: tuple[Any, ...], kwargs: dict[str, Any], progress: output.Progress, *, as_json: bool
) -> Any:
    result = chosen.start(*args, **kwargs)
    if inspect.iscoroutine(result):
        import asyncio

        return asyncio.run(result)
    if not chosen.generator:
        return result
    items = []
    for item in result:
        if as_json:
            items.append(item)
        else:
            progress.write(f"{item}\n")
    return items if as_json else None


def _write(value: Any, path: str, label: str) -> None:
    if not isinstance(value, (str, bytes)):
        raise SpecError(f"{label}: its result is of type {type(value).__name__}: -w writes text or bytes")
    try:
        Path(path).write_bytes(value.encode() if isinstance(value, str) else value)
    except OSError as e:
        raise SpecError(f"{path}: {e.strerror}: the result of {label} is not written") from None


def _json(value: Any, label: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as e:
        raise SpecError(f"{label}: its result cannot be written as JSON: {e}", code="not-json") from None


@contextmanager
def _running(app: App, shown: Shown, *, detach: bool = False, quiet: bool = False) -> Iterator[output.Progress]:
    """The app runs within this block, and what its containers print appears.

    Args:
        shown: is told what appears.
        detach: it goes on running after the block, and its containers with it.
        quiet: what is going on is not shown.
    """
    output.whole_lines()
    with output.Progress(quiet=quiet) as progress:
        progress.say("deploying")
        follower = None
        seconds = DETACHED_DRAIN_S if detach else DRAIN_S
        try:
            with app.run(detach=detach):
                progress.clear()
                client, running = app.reach("run")
                client.on_lost = progress.say
                if detach and not quiet:
                    output.note(
                        f"{running} is left running: `woodfrog app logs {running} -f`, `woodfrog app stop {running}`"
                    )
                follower = Follower(client, running, progress, shown, quiet=quiet)
                follower.start()
                yield progress
        except KeyboardInterrupt:
            seconds = min(seconds, INTERRUPTED_DRAIN_S)
            raise
        finally:
            if follower is not None:
                follower.finish(seconds)


class Shown:
    """The last errors that containers wrote here."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=5000)

    def add(self, line: str) -> None:
        self._lines.append(line)

    def __contains__(self, text: str) -> bool:
        return text.strip("\n") in "\n".join(self._lines)


class Follower:
    """Shows an app's output as it comes, and on a terminal what its containers are at."""

    def __init__(
        self, client: Client, app: str, progress: output.Progress, shown: Shown, *, quiet: bool = False
    ) -> None:
        self._client, self._app, self._progress, self._quiet = client, app, progress, quiet
        self._errors = shown
        self._lock = threading.Lock()
        self._at = 0
        """Number of the last line that is shown."""
        self._over = threading.Event()

    def start(self) -> None:
        work = [self._follow, *([self._watch] if sys.stderr.isatty() else [])]
        for target in work:
            threading.Thread(target=target, daemon=True, name="woodfrog-output").start()

    def _follow(self) -> None:
        try:
            for entry in self._client.logs(self._app, follow=True, after=0):
                with self._lock:
                    if self._over.is_set():
                        return
                    self._show(entry)
        except (WoodfrogError, OSError):
            # The call itself tells what is wrong with the daemon, and `finish` fetches the rest; or nobody reads on.
            return

    def _watch(self) -> None:
        while not self._over.wait(POLL_S):
            try:
                busy = [c for c in self._containers() if c.get("stage") != "ready"]
            except WoodfrogError:
                continue
            if busy and not self._over.is_set():
                self._progress.say(f"{busy[0].get('function')}: {output.stage_words(busy[0].get('stage'))}")
            else:
                self._progress.clear()

    def _containers(self, client: Client | None = None) -> list[dict[str, Any]]:
        return [c for c in get(client or self._client, "/containers")["containers"] if c.get("app") == self._app]

    def _show(self, entry: dict[str, Any]) -> None:
        self._at = entry.get("n") or self._at
        # Lines of no container tell of the app's own beginning and end.
        if entry.get("stream") != "system" or (entry.get("instance") and not self._quiet):
            self._progress.write(line_text(entry), error=entry.get("stream") != "stdout")
        if entry.get("stream") == "stderr":
            self._errors.add(str(entry.get("line", "")))

    def finish(self, seconds: float) -> None:
        """Show what was printed up to the end of the last container, or for `seconds`."""
        try:
            deadline = time.monotonic() + seconds
            with self._client.apart(seconds) as client:
                while self._containers(client) and time.monotonic() < deadline:
                    time.sleep(0.05)
                with self._lock:
                    self._over.set()
                    for entry in client.logs(self._app, after=self._at):
                        self._show(entry)
        except (NotFoundError, DaemonError) as e:
            output.note(f"the end of the output is missing: {e.message}")
        finally:
            self._over.set()
            self._progress.clear()


def _from_container(error: WoodfrogError) -> bool:
    """Whether it stands for, or is, an exception that a call raised in a container."""
    return error.code == "remote-exception" or (not isinstance(error, StartupError) and _remote_text(error) is not None)


def _remote_text(error: BaseException) -> str | None:
    """The traceback of the container that an exception came from: its cause, or a note where it had a cause already."""
    from woodfrog.sdk.payload import RemoteTraceback

    if isinstance(error.__cause__, RemoteTraceback):
        return error.__cause__.text
    start = "Remote traceback:\n"
    return next((n.removeprefix(start) for n in getattr(error, "__notes__", ()) if n.startswith(start)), None)


def show_user_error(error: BaseException, shown: Shown) -> None:
    """An exception of the user's code: the remote traceback, once, then the program's own frames that led there."""
    import traceback

    from woodfrog.cli.program import user_frames

    remote = _remote_text(error)
    frames = user_frames(error)
    if remote is not None:
        output.note(f"{type(error).__name__}: {error}" if remote in shown else remote.rstrip("\n"))
        if frames:
            output.note("\nraised in a container, called from:\n" + "".join(traceback.format_list(frames)).rstrip("\n"))
        return
    if frames:
        output.note("Traceback (most recent call last):\n" + "".join(traceback.format_list(frames)).rstrip("\n"))
    output.note("".join(traceback.format_exception_only(error)).rstrip("\n"))


def deploy(
    target: Annotated[str, typer.Argument(metavar="FILE[::APP]", help="Program, and the variable of the app in it.")],
    module: Module = False,
    name: Annotated[str, typer.Option("--name", help="Name to deploy under instead of the app's own.")] = "",
    snapshot: Annotated[bool, typer.Option("--snapshot", help="Take the snapshots now and wait for them.")] = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait until the containers that min_containers asks for are ready.")
    ] = False,
    strategy: Annotated[
        Strategy,
        typer.Option(
            help="rolling: what is in use of the version before serves until this one has a container ready. "
            "recreate: every call from now on gets the new code."
        ),
    ] = "rolling",
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Refuse a program of which a function asks for what woodfrog does not have."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    env: Env = None,
) -> None:
    """Deploy a program's app, so that its functions can be called from anywhere on this machine.

    What asks for something of Modal's that woodfrog does not have is left out, and named; --strict refuses instead.
    """
    _note_env(env)
    from woodfrog.cli.program import load, parse_reference, pick

    reference = parse_reference(target, module=module)
    apps = apps_of(load(reference))
    if not apps:
        raise SpecError(f"{reference.source}: no app in it: it needs a global `app = woodfrog.App(...)`", code="no-app")
    app: App = pick(apps, reference.name, what="app", source=reference.source)
    with output.Progress(quiet=as_json) as progress:
        progress.say(f"deploying {name or app.name or reference.source}")
        app.deploy(name=name or None, snapshot=snapshot, strategy=strategy, strict=strict)
    client, deployed = app.reach("deploy")
    found = get(client, f"/apps/{segment(deployed)}")
    functions = found["functions"]
    answer = {
        "app": deployed,
        "version": found["version"],
        "functions": [{"tag": f["tag"], "key": f["key"]} for f in functions],
        "left_out": found.get("left_out", []),
    }
    failed = _settle(client, answer, functions, "snapshots", quiet=as_json) if snapshot else []
    failed += _settle(client, answer, functions, "warm", quiet=as_json) if wait else []
    if as_json:
        output.show_json(answer)
    else:
        _show_deployed(answer, functions)
    if failed:
        before = found["version"] > 1
        hint = f"; `woodfrog app rollback {deployed}` goes back to the version before" if before else ""
        output.note(f"version {found['version']} is deployed all the same{hint}")
        for error in failed[1:]:
            output.note(f"error: {error.message}")
        raise failed[0]


def _settle(
    client: Client, answer: dict[str, Any], functions: list[dict[str, Any]], what: str, *, quiet: bool
) -> list[WoodfrogError]:
    """Wait for the functions' snapshots, or for their warm containers, and note them in `answer`; the errors of those
    that came to nothing."""
    from woodfrog.cli.snapshots import wait_for, wait_warm

    failed: list[WoodfrogError] = []
    answer[what] = []
    for f in functions:
        tag, key = f["tag"], f["key"]
        try:
            if what == "warm":
                if f["scaling"]["min_containers"]:
                    answer[what].append(wait_warm(client, answer["app"], tag, key, SETTLE_S, quiet=quiet))
            elif f["snapshot"]["enabled"]:
                if required := _required(f):
                    needs = ", ".join(required)
                    output.note(f"{tag} has no snapshot before its first call: its constructor needs {needs}")
                    continue
                taken = wait_for(client, answer["app"], tag, key, SETTLE_S, quiet=quiet)
                answer[what].append({"id": taken["id"], "function": taken["function"]})
        except (CaptureError, StartupError) as e:
            failed.append(e)
    return failed


def _required(function: dict[str, Any]) -> list[str]:
    """What its constructor has to be given, as `FunctionSpec.required`."""
    known = {**(function.get("parameters") or {}), **(function.get("constructor") or {})}
    return [name for name, text in known.items() if name != "*" and " = " not in text]


def _show_deployed(answer: dict[str, Any], functions: list[dict[str, Any]]) -> None:
    deployed = answer["app"]
    output.note(f"deployed {deployed}, version {answer['version']}")
    for f in functions:
        tags = [f["tag"]] if f["kind"] == "function" else [f"{f['tag']}.{m['name']}" for m in f["methods"]]
        needed = [f" {key}=..." for key, text in (f.get("parameters") or {}).items() if " = " not in text]
        for tag in tags:
            output.note(f"  woodfrog call {deployed}.{tag}{''.join(needed)}")
    if left := [x["tag"] for x in answer["left_out"]]:
        output.note(f"left out, as said above: {', '.join(left)} (--strict refuses the deploy instead)")
