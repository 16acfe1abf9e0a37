"""`woodfrog call APP.FUNC`: a deployed function from the shell, JSON in and JSON out."""

from __future__ import annotations

import base64
import inspect
import json
import os
import stat
import sys
import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from woodfrog.cli import output
from woodfrog.cli.remote import connect, get, segment, split_target, waiting
from woodfrog.errors import NotFoundError, SpecError
from woodfrog.protocol import unpack_items

if TYPE_CHECKING:
    from woodfrog.sdk.client import Client, Reply

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


def show_remote_error(error: dict[str, Any]) -> None:
    """The remote traceback as it was written there, or one line when there is none."""
    traceback = str(error.get("traceback") or "").rstrip("\n")
    output.note(traceback or f"{error.get('type', 'Exception')}: {error.get('message', '')}")


def raise_failure(status: str, body: bytes) -> None:
    """What became of a call that did not succeed.

    Raises:
        typer.Exit: the function raised; its traceback has been printed.
        WoodfrogError: woodfrog could not bring the call to an answer.
    """
    from woodfrog.sdk.client import error_from_answer

    try:
        answer = json.loads(body or b"null")
    except ValueError:
        answer = None
    if status == "exception":
        show_remote_error((answer.get("error") if isinstance(answer, dict) else None) or {})
        raise typer.Exit(output.USER_ERROR)
    error = error_from_answer(answer, f"the call ended with status {status!r}")
    if error.fields.get("traceback"):  # of a start that failed
        output.note(str(error.fields["traceback"]).rstrip("\n"))
    raise error


def call(
    target: Annotated[str, typer.Argument(metavar="APP.FUNC", help="Deployed function, or APP.CLASS.METHOD.")],
    pairs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="Named arguments, and the parameters of the class; a value is JSON, else text."
        ),
    ] = None,
    arg: Annotated[
        str | None,
        typer.Option(
            "--arg", metavar="JSON", help="Arguments, else from stdin: an array, an object of names, or the only one."
        ),
    ] = None,
    trace: Annotated[bool, typer.Option("--trace", help="Show where the time went.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print result, call id and phases in one object.")] = False,
) -> None:
    """Call a deployed function and print its result as JSON.

    Exit status: 0, 1 when the function raised (its traceback is printed), 2 when woodfrog could not carry the call out.
    """
    if arg is not None:
        payload_from(arg, [], stdin_text)  # what is wrong with it needs no daemon
    client = connect()
    app, tag = split_target(client, target)
    function = _function(client, app, tag)
    params, rest = class_arguments(function, pairs or [], target)
    content = payload_from(arg, rest, stdin_text)
    run = _Run(client, uuid.uuid4().hex, app, tag, content, params)
    phases: list[Any] = []
    try:
        result = run.items(show=not as_json) if _is_generator(function, tag) else run.value()
    except KeyboardInterrupt:
        from woodfrog.sdk.call import cancel

        cancel(client, run.id)
        output.note(f"cancelled call {run.id}")
        raise
    finally:
        if trace or as_json:
            phases = run.trace().get("phases") or []
        if trace and not as_json:
            output.show_trace(phases)
    if as_json:
        output.show_json({"call": run.id, "result": result, "phases": phases})
    elif not isinstance(result, _Printed):
        print(json.dumps(result, ensure_ascii=False))


class _Printed(list[Any]):
    """Items of a generator that have been printed as they came."""


def _function(client: Client, app: str, tag: str) -> dict[str, Any]:
    """What the daemon knows of it; nothing if there is none, which the call itself will tell."""
    functions = get(client, f"/apps/{segment(app)}")["functions"]
    return next((f for f in functions if f["tag"] == tag.partition(".")[0]), {})


def _is_generator(function: dict[str, Any], tag: str) -> bool:
    method = tag.partition(".")[2]
    return any(m["generator"] for m in function.get("methods", ()) if m["name"] == (method or m["name"]))


def class_arguments(function: dict[str, Any], pairs: Sequence[str], target: str) -> tuple[bytes, list[str]]:
    """The parameters of a class among `key=value`, as they travel, and the other pairs.

    Raises:
        SpecError: one is missing, or has the wrong type.
    """
    from woodfrog.cli.program import class_parameters

    known = class_parameters(function.get("parameters") or {})
    values: dict[str, Any] = {}
    rest: list[str] = []
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or key not in known:
            rest.append(pair)
            continue
        kind, _ = known[key]
        value: Any = text if kind is str else text.encode() if kind is bytes else parse_value(text)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise SpecError(f"{pair!r}: the parameter {key} is of type {kind.__name__}", code="bad-arguments")
        values[key] = value
    missing = [key for key, (_, default) in known.items() if default is inspect.Parameter.empty and key not in values]
    if missing:
        wanted = " ".join(f"{key}=..." for key in missing)
        raise SpecError(
            f"{function['tag']} needs {', '.join(missing)}: woodfrog call {target} {wanted}", code="bad-arguments"
        )
    # As the SDK does, so that both share containers and snapshots.
    values = {key: value for key, value in values.items() if value != known[key][1]}
    if not values:
        return b"", rest
    from woodfrog.sdk.payload import dumps_parameters

    return dumps_parameters((), values, target), rest


class _Run:
    """One call on its way. Its id is made here, so that it can be cancelled before its first answer."""

    def __init__(self, client: Client, call_id: str, app: str, tag: str, content: bytes, params: bytes = b"") -> None:
        self.id = call_id
        self._client = client
        self._path = f"/apps/{segment(app)}/calls/{segment(tag)}"
        self._content = content
        self._headers = {"woodfrog-encoding": "json", "content-type": "application/json"}
        if params:
            self._headers["woodfrog-params"] = base64.b64encode(params).decode()

    def _send(self, wait: float = 0.0) -> Reply:
        headers = {**self._headers, "woodfrog-call": self.id}
        return self._client.request(
            "POST", self._path, headers=headers, content=self._content, wait=wait, kept=self._kept, new=True
        )

    @property
    def _kept(self) -> str:
        return f"the call is kept: woodfrog.FunctionCall.from_id({self.id!r}).get() in Python asks for it again"

    def value(self) -> Any:
        """The result.

        Raises:
            typer.Exit, WoodfrogError: see `raise_failure`.
        """
        with waiting(self._client) as progress:
            reply = self._send(QUICK_S)
            while (status := reply.headers.get("woodfrog-status", "pending")) == "pending":
                progress.say(self._stage())
                reply = self._client.request("GET", f"/calls/{self.id}", wait=POLL_S, kept=self._kept)
        if status != "success":
            raise_failure(status, reply.body.getvalue())
        return reply.json()

    def items(self, *, show: bool) -> list[Any]:
        """A generator's items: printed as they come, one JSON value a line, or collected.

        Raises:
            typer.Exit, WoodfrogError: see `raise_failure`.
        """
        found: list[Any] = _Printed() if show else []
        seen = 0
        with waiting(self._client) as progress:
            self._send()
            wait = QUICK_S
            while True:
                reply = self._client.request("GET", f"/calls/{self.id}/items", params={"after": seen}, wait=wait)
                for kind, data in unpack_items(reply.body.getvalue()):
                    if kind == b"i":
                        seen += 1
                        if show:
                            progress.write(data.decode(errors="replace").rstrip("\n") + "\n")
                        else:
                            found.append(json.loads(data))
                    elif kind == b"d":
                        return found
                    else:
                        progress.clear()
                        # The whole answer: an item of this kind holds a pickled exception.
                        whole = self._client.request("GET", f"/calls/{self.id}")
                        raise_failure(whole.headers.get("woodfrog-status", ""), whole.body.getvalue())
                if not reply.body.getvalue():
                    progress.say(self._stage())
                    wait = POLL_S

    def trace(self) -> dict[str, Any]:
        try:
            return get(self._client, f"/calls/{self.id}/trace")
        except NotFoundError:
            # Where the time went is an extra: a call that was refused has none.
            return {}

    def _stage(self) -> str:
        return output.stage_words(self.trace().get("stage"))
