"""`woodfrog app …`: deployed apps."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from woodfrog.cli import output
from woodfrog.cli.logs import Timestamps, show_logs, since_time
from woodfrog.cli.remote import connect, get, post, segment
from woodfrog.errors import SpecError

app = typer.Typer(help="List, watch, stop and roll back apps.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Name = Annotated[str, typer.Argument(metavar="APP", help="Name of the app.")]


@app.command("list")
def list_apps(as_json: Json = False) -> None:
    """Show the apps the daemon knows."""
    apps = get(connect(), "/apps")["apps"]
    if as_json:
        output.show_json(apps)
        return
    rows = [
        (
            a["app"],
            _state(a),
            a["version"],
            a["containers"],
            output.ago(a["deployed"]),
            ", ".join((*a["functions"], *(f"{x['tag']} (left out)" for x in a.get("left_out", ())))),
        )
        for a in apps
    ]
    output.table(["app", "state", "version", "containers", "since", "functions"], rows, empty="no apps")


def _state(a: dict[str, Any]) -> str:
    state = "running (ephemeral)" if a["ephemeral"] else "deployed"
    waiting = a.get("waiting_for_memory")
    return f"{state}, {waiting} call{'s' if waiting > 1 else ''} short of memory" if waiting else state


@app.command()
def logs(
    name: Name,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for more.")] = False,
    since: Annotated[str, typer.Option(help="Only what is younger: 30s, 10m, 2h, 1d, or a Unix time.")] = "",
    timestamps: Timestamps = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Print what an app's functions wrote, and what became of its containers."""
    begin = since_time(since, time.time())
    show_logs(connect().logs(name, follow=follow, since=begin), as_json=as_json, timestamps=timestamps)


@app.command()
def calls(
    name: Name,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=1000, help="So many, the newest.")] = 50,
    as_json: Json = False,
) -> None:
    """Show an app's latest calls: an id that was lost, what still runs, what failed.

    `woodfrog.FunctionCall.from_id(CALL).get()` in Python gets the result of one.
    """
    found = get(connect(), f"/apps/{segment(name)}/calls", limit=limit)["calls"]
    if as_json:
        output.show_json(found)
        return
    rows = [
        (
            c["id"],
            c["function"],
            f"{c['status']}: {c['waits_for']}" if c.get("waits_for") else c["status"],
            c["version"],
            output.ago(c["submitted"]),
            output.span((c["finished"] or time.time()) - c["submitted"]),
        )
        for c in found
    ]
    output.table(["call", "function", "status", "version", "submitted", "took"], rows, empty="no calls")


@app.command()
def stop(name: Name, as_json: Json = False) -> None:
    """Stop an app: its calls are cancelled and its containers ended."""
    answer = post(connect(), f"/apps/{segment(name)}/stop")
    if as_json:
        output.show_json(answer)
    else:
        output.note(f"stopped {name}")


@app.command()
def rollback(
    name: Name,
    version: Annotated[
        str, typer.Argument(metavar="[VERSION]", help="As in `woodfrog app history`; else the one before the active.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Deploy an earlier version again, as a new version. The code of an app's newest three versions is kept."""
    number = version.removeprefix("v")
    if version and not number.isdecimal():
        raise SpecError(f"{version!r} is no version: give a number, see `woodfrog app history {name}`")
    answer = post(connect(), f"/apps/{segment(name)}/rollback", {"version": int(number) if number else None})
    if as_json:
        output.show_json(answer)
    else:
        output.note(f"deployed {name}, version {answer.get('version')}: version {answer.get('rollback')} again")


@app.command()
def history(name: Name, as_json: Json = False) -> None:
    """Show the versions an app was deployed in, the newest first."""
    versions = sorted(get(connect(), f"/apps/{segment(name)}/history")["versions"], key=lambda v: -v["version"])
    if as_json:
        output.show_json(versions)
        return
    rows = [
        (
            v["version"],
            "active" if v["active"] else "stopped" if v["stopped"] else "replaced",
            output.ago(v["deployed"]),
            f"version {v['rollback']} again" if v.get("rollback") else "",
            ", ".join(v["functions"]),
        )
        for v in versions
    ]
    output.table(["version", "state", "deployed", "is", "functions"], rows, empty="no versions")
