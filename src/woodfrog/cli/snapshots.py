"""`woodfrog snapshot …`: frozen functions."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from woodfrog.cli import output
from woodfrog.cli.remote import connect, get, post, segment, split_target
from woodfrog.errors import CaptureError, NotFoundError

if TYPE_CHECKING:
    from woodfrog.sdk.client import Client

GRACE_S = 2.0
app = typer.Typer(help="List, look into, make and retire snapshots.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Id = Annotated[str, typer.Argument(metavar="SNAPSHOT", help="Id of the snapshot, from `woodfrog snapshot list`.")]


@app.command("list")
def list_snapshots(
    of_app: Annotated[str, typer.Option("--app", help="Only this app's.")] = "", as_json: Json = False
) -> None:
    """Show the snapshots kept on this machine."""
    client = connect()
    keys = _keys_of(client, of_app) if of_app else set()
    snapshots = [
        s
        for s in get(client, "/snapshots")["snapshots"]
        # The same code run under another name has the same key, and shares the snapshot.
        if of_app in ("", s.get("app")) or s.get("function_key") in keys
    ]
    if as_json:
        output.show_json(snapshots)
        return
    rows = [
        (
            s["id"],
            s.get("app"),
            s.get("function"),
            s["state"],
            output.size(s.get("memory_bytes")),
            output.size(s.get("files_bytes")),
            output.ago(s.get("created")),
            s.get("why") or ", ".join(s.get("modules") or ()),
        )
        for s in snapshots
    ]
    headers = ["snapshot", "app", "function", "state", "memory", "files", "made", "why"]
    output.table(headers, rows, empty="no snapshots")


@app.command()
def inspect(
    snapshot: Id,
    log: Annotated[bool, typer.Option("--log", help="Print the whole logs of the capture instead.")] = False,
    as_json: Json = False,
) -> None:
    """Show all about one snapshot: what it was made of and for, its size, the phases of its capture."""
    params = {"log": 1} if log else {}
    answer = get(connect(), f"/snapshots/{segment(snapshot)}", **params)
    if as_json:
        output.show_json(answer)
    elif log:
        for name, text in (answer.get("log") or {}).items():
            output.note(f"== {name}")
            sys.stdout.write(text if text.endswith("\n") or not text else text + "\n")
    else:
        output.fields({k: v for k, v in answer.items() if k not in ("phases", "log", "files")})
        for line in output.trace_lines(answer.get("phases") or []):
            print(line)


@app.command()
def create(
    target: Annotated[str, typer.Argument(metavar="APP.FUNC", help="A deployed function with snapshots enabled.")],
    timeout: Annotated[float, typer.Option(help="Seconds to wait for it.")] = 600.0,
    as_json: Json = False,
) -> None:
    """Boot and freeze a function now, instead of at its first call, and print the snapshot's id."""
    client = connect()
    app_name, tag = split_target(client, target)
    key = _key_of(client, app_name, tag)
    found = _ready(client, key)
    if found is None:
        post(client, "/snapshots/create", {"app": app_name, "tag": tag})
        found = wait_for(client, app_name, tag, key, timeout, quiet=as_json)
    if as_json:
        output.show_json(found)
    else:
        print(found["id"])


def _keys_of(client: Client, app_name: str) -> set[str]:
    try:
        return {f["key"] for f in get(client, f"/apps/{segment(app_name)}")["functions"]}
    except NotFoundError:
        return set()  # Its snapshots outlive an app.


def _key_of(client: Client, app_name: str, tag: str) -> str:
    functions = {f["tag"]: f["key"] for f in get(client, f"/apps/{segment(app_name)}")["functions"]}
    if tag not in functions:
        raise NotFoundError(f"app {app_name!r} has no function {tag!r}; it has: {', '.join(functions) or 'none'}")
    return str(functions[tag])


def _ready(client: Client, key: str) -> dict[str, Any] | None:
    snapshots = get(client, "/snapshots")["snapshots"]
    return next((s for s in snapshots if s.get("function_key") == key and s["state"] == "ready"), None)


def wait_for(client: Client, app_name: str, tag: str, key: str, timeout: float, *, quiet: bool) -> dict[str, Any]:
    """The snapshot of that function key, as soon as there is one.

    Raises:
        CaptureError: nothing is booting any more, or not within `timeout` seconds.
    """
    begin = time.monotonic()
    with output.Progress(quiet=quiet) as progress:
        while time.monotonic() - begin < timeout:
            found = _ready(client, key)
            if found is not None:
                return found
            booting = [
                c["stage"]
                for c in get(client, "/containers")["containers"]
                if (c.get("app"), c.get("function")) == (app_name, tag) and (c["stage"] != "ready" or c.get("storing"))
            ]
            # Between the request and the first container, and from one attempt to the next, there is a short gap.
            if not booting and time.monotonic() - begin > GRACE_S:
                raise CaptureError(f"{target_of(app_name, tag)} was not captured: see `woodfrog app logs {app_name}`")
            progress.say(f"{target_of(app_name, tag)}: {output.stage_words(booting[0] if booting else 'queued')}")
            time.sleep(0.2)
    raise CaptureError(f"{target_of(app_name, tag)} was not captured within {timeout:.0f} s", code="capture-timeout")


def target_of(app_name: str, tag: str) -> str:
    return f"{app_name}.{tag}"


@app.command()
def invalidate(snapshot: Id, as_json: Json = False) -> None:
    """Remove a snapshot, now or when its last container ends: the next start is cold, and makes a new one."""
    answer = post(connect(), f"/snapshots/{segment(snapshot)}/invalidate")
    if as_json:
        output.show_json(answer)
    else:
        name = answer.get("snapshot", snapshot)
        gone = answer.get("removed", True)
        output.note(f"removed {name}" if gone else f"retired {name}: removed with the last container thawed from it")
