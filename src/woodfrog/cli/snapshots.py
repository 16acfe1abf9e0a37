"""`woodfrog snapshot …`: frozen functions."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from woodfrog.cli import output
from woodfrog.cli.remote import connect, listing, split_target

app = typer.Typer(help="List, look into, make and retire snapshots.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Id = Annotated[str, typer.Argument(metavar="SNAPSHOT", help="Id of the snapshot, from `woodfrog snapshot list`.")]


@app.command("list")
def list_snapshots(
    of_app: Annotated[str, typer.Option("--app", help="Only this app's.")] = "", as_json: Json = False
) -> None:
    """Show the snapshots kept on this machine."""
    snapshots = [s for s in listing(connect(), "/v1/snapshots", "snapshots") if of_app in ("", s.get("app"))]
    if as_json:
        output.show_json(snapshots)
        return
    rows = [
        (
            s.get("id"),
            s.get("app"),
            s.get("function"),
            s.get("state"),
            output.size(s.get("bytes")),
            output.ago(s.get("created_at")),
        )
        for s in snapshots
    ]
    output.table(["snapshot", "app", "function", "state", "size", "made"], rows, empty="no snapshots")


@app.command()
def inspect(
    snapshot: Id,
    log: Annotated[bool, typer.Option("--log", help="Print the whole log of the capture instead.")] = False,
    as_json: Json = False,
) -> None:
    """Show all about one snapshot: what it was made of and for, its size, the phases of its capture."""
    answer = connect().json("GET", f"/v1/snapshots/{snapshot}", params={"log": 1} if log else None)
    if as_json:
        output.show_json(answer)
    elif log:
        logged = str(answer.get("log") or "")
        sys.stdout.write(logged if logged.endswith("\n") or not logged else logged + "\n")
    else:
        output.fields({k: v for k, v in answer.items() if k not in ("phases", "log")})
        for line in output.trace_lines(answer.get("phases") or []):
            print(line)


@app.command()
def create(
    target: Annotated[str, typer.Argument(metavar="APP.FUNC", help="A deployed function with snapshots enabled.")],
    as_json: Json = False,
) -> None:
    """Boot and freeze a function now, instead of at its first call."""
    client = connect()
    name, tag = split_target(client, target)
    with output.Progress(quiet=as_json) as progress:
        progress.say(f"capturing {target}")
        answer = client.json("POST", "/v1/snapshots/create", body={"app": name, "tag": tag}, timeout=None)
    if as_json:
        output.show_json(answer)
    else:
        print(answer.get("id", ""))


@app.command()
def invalidate(snapshot: Id, as_json: Json = False) -> None:
    """Retire a snapshot: the function's next start is cold, and makes a new one."""
    answer = connect().json("POST", f"/v1/snapshots/{snapshot}/invalidate")
    if as_json:
        output.show_json(answer)
    else:
        output.note(f"retired {snapshot}")
