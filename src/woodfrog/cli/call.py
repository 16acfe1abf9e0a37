"""`woodfrog call APP.FUNC`: a deployed function from the shell, JSON in and JSON out."""

from __future__ import annotations

import json
import os
import stat
import sys
import urllib.parse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from woodfrog.cli import output
from woodfrog.cli.remote import connect, split_target
from woodfrog.errors import DaemonError, SpecError, WoodfrogError, error_from_dict
from woodfrog.protocol import unpack_items

if TYPE_CHECKING:
    from woodfrog.sdk.client import Client

T = TypeVar("T")
QUICK_S = 0.5
"""A call that takes longer says what it is waiting for."""
POLL_S = 2.0


def parse_value(text: str) -> Any:
    """JSON where it is JSON (`3`, `true`, `[1]`, `"3"`), else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def payload_from(arg: str | None, pairs: Sequence[str], read_stdin: Callable[[], str]) -> bytes:
    """The call's arguments as JSON: an array = positional, an object = named, anything else = the only argument.

    Raises:
        SpecError: not JSON, or not of the form key=value, or both ways at once.
    """
    if arg is not None and pairs:
        raise SpecError("give arguments either with --arg or as key=value, not both", code="bad-arguments")
    if pairs:
        named = {}
        for pair in pairs:
            key, equals, value = pair.partition("=")
            if not equals or not key.isidentifier():
                raise SpecError(f"{pair!r} is not of the form key=value", code="bad-arguments")
            named[key] = parse_value(value)
        return json.dumps(named).encode()
    where, raw = ("--arg", arg) if arg is not None else ("standard input", read_stdin())
    if where != "--arg" and not raw.strip():
        return b"[]"
    try:
        return json.dumps(json.loads(raw)).encode()
    except ValueError as e:
        hint = " (a text needs its quotes: --arg '\"text\"')" if where == "--arg" else ""
        raise SpecError(f"{where} is not JSON: {e}{hint}", code="bad-arguments") from None


def stdin_text() -> str:
    """What is piped or redirected in; nothing from a terminal or another device, which might never end."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):
        return sys.stdin.read() if sys.stdin is not None else ""
    return "" if stat.S_ISCHR(mode) else sys.stdin.read()


def raise_failure(answer: Answer) -> None:
    """Turn the two ways in which a call fails into an exit and an exception.

    Raises:
        typer.Exit: the function raised; its traceback has been printed.
        WoodfrogError: woodfrog could not bring the call to an answer.
    """
    if answer.status in ("success", "pending"):
        return
    error = answer.error()
    if answer.status == "exception":
        show_remote_error(error)
        raise typer.Exit(output.USER_ERROR)
    raise error_from_dict(error) if error else WoodfrogError(f"call {answer.call} ended as {answer.status!r}")


def show_remote_error(error: dict[str, Any]) -> None:
    """The remote traceback as it was written there, or the one line when there is none."""
    traceback = str(error.get("traceback") or "").rstrip("\n")
    output.note(traceback or f"{error.get('type', 'Exception')}: {error.get('message', '')}")


def interruptible(client: Client, call: Callable[[], str], work: Callable[[], T]) -> T:
    """Do `work`; Ctrl-C cancels the call, if there is one already, and goes on."""
    try:
        return work()
    except KeyboardInterrupt:
        if call():
            try:
                client.json("POST", f"/v1/calls/{call()}/cancel")
                output.note(f"cancelled call {call()}")
            except WoodfrogError as e:
                output.show_error(e)
        raise


def stage_of(trace: dict[str, Any]) -> str:
    """What a call is waiting for, in words."""
    words = {
        "queued": "waiting for a container",
        "cold": "cold start",
        "boot": "cold start",
        "start": "cold start",
        "capture": "capturing a snapshot",
        "freeze": "capturing a snapshot",
        "restore": "restoring a snapshot",
        "thaw": "restoring a snapshot",
        "call": "running",
    }
    phases = trace.get("phases") or []
    stage = str(trace.get("stage") or (phases[-1].get("name") if phases else "") or "waiting")
    return words.get(stage, stage)


def call(
    target: Annotated[str, typer.Argument(metavar="APP.FUNC", help="Deployed function, or APP.CLASS.METHOD.")],
    pairs: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Named arguments; a value is JSON, else text.")
    ] = None,
    arg: Annotated[
        str | None,
        typer.Option("--arg", metavar="JSON", help="Arguments: an array, an object of names, or one value."),
    ] = None,
    trace: Annotated[bool, typer.Option("--trace", help="Show where the time went.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print result, call id and phases in one object.")] = False,
) -> None:
    """Call a deployed function and print its result as JSON.

    Exit status: 0, 1 when the function raised (its traceback is printed), 2 when woodfrog could not carry the call out.
    """
    payload = payload_from(arg, pairs or [], stdin_text)
    client = connect()
    app, tag = split_target(client, target)
    path = f"/v1/apps/{urllib.parse.quote(app)}/calls/{urllib.parse.quote(tag)}"
    headers = {"Woodfrog-Encoding": "json"}
    current = ""

    def work() -> tuple[Answer, list[Any]]:
        nonlocal current
        with output.Progress() as progress:
            answer = exchange(client, "POST", path, wait=QUICK_S, content=payload, headers=headers)
            current = answer.call
            if answer.generator:
                return _collect(client, answer, progress, as_json=as_json)
            while answer.status == "pending":
                progress.say(stage_of(_trace(client, current)))
                answer = exchange(client, "GET", f"/v1/calls/{current}", wait=POLL_S, headers=headers)
            return answer, []

    answer, items = interruptible(client, lambda: current, work)
    phases = _trace(client, current).get("phases") or [] if trace or as_json else []
    if trace and not as_json:
        output.show_trace(phases)
    raise_failure(answer)
    if as_json:
        result = items if answer.generator else answer.value()
        output.show_json({"call": current, "result": result, "phases": phases})
    elif not answer.generator:
        print(answer.body.decode(errors="replace").rstrip("\n"))


def _trace(client: Client, call_id: str) -> dict[str, Any]:
    try:
        answer = client.json("GET", f"/v1/calls/{call_id}/trace")
    except DaemonError:
        raise
    except WoodfrogError:
        # Where the time went is an extra: the answer counts.
        return {}
    return answer if isinstance(answer, dict) else {}


def _collect(client: Client, answer: Answer, progress: output.Progress, *, as_json: bool) -> tuple[Answer, list[Any]]:
    """A generator's items: one JSON value a line as they come, or all of them for `--json`."""
    items: list[Any] = []
    seen = 0
    while True:
        part = exchange(
            client,
            "GET",
            f"/v1/calls/{answer.call}/items",
            wait=POLL_S,
            params={"after": seen},
            headers={"Woodfrog-Encoding": "json"},
        )
        for kind, data in unpack_items(part.body):
            if kind == b"i":
                seen += 1
                if as_json:
                    items.append(json.loads(data))
                else:
                    progress.write(data.decode(errors="replace").rstrip("\n") + "\n")
            elif kind == b"d":
                return Answer("success", answer.call, b"null", True), items
            else:
                return Answer("exception" if kind == b"e" else "failure", answer.call, data, True), items
        if not part.body:
            progress.say(stage_of(_trace(client, answer.call)))
