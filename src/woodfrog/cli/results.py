"""`woodfrog result …`: the answers of finished calls that the daemon keeps."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from woodfrog.cli import output
from woodfrog.cli.logs import since_time
from woodfrog.cli.remote import connect, get
from woodfrog.errors import SpecError

app = typer.Typer(help="Look at the kept results of calls, and remove some.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("list")
def list_results(as_json: Json = False) -> None:
    """Show how many results of each app are kept, and what they take."""
    answer = get(connect(), "/results")
    if as_json:
        output.show_json(answer)
        return
    rows = [
        (r["app"], r["results"], output.size(r["bytes"]), r["results"] - r["fetched"], output.ago(r["oldest"]))
        for r in answer["apps"]
    ]
    output.table(["app", "results", "size", "not fetched", "oldest"], rows, empty="no results")
    if rows:
        limit = f" of at most {output.size(answer['limit_bytes'])}" if answer["limit_bytes"] else ""
        kept = output.span(answer["keep_s"])
        output.note(f"{output.size(sum(r['bytes'] for r in answer['apps']))}{limit}; each is kept for at most {kept}")


@app.command()
def delete(
    name: Annotated[str, typer.Argument(metavar="[APP]", help="Those of this app; without, of all.")] = "",
    older_than: Annotated[
        str, typer.Option("--older-than", help="Only what finished before: 30s, 10m, 2h, 1d ago, or a Unix time.")
    ] = "",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Remove results of finished calls. Who asks for one of them later is told that there is none."""
    if not name and not older_than:
        raise SpecError("name an app, or --older-than: results of everything go with --older-than 0s", code="no-target")
    params: dict[str, Any] = {"app": name} if name else {}
    if older_than:
        params["before"] = since_time(older_than, time.time(), option="--older-than")
    client = connect()
    if not yes:
        found = get(client, "/results", **params)["apps"]
        count, size = sum(r["results"] for r in found), sum(r["bytes"] for r in found)
        if not count:
            output.note("no such results")
            return
        lost = count - sum(r["fetched"] for r in found)
        output.note(f"{lost} of them have not been fetched by anybody" if lost else "all of them have been fetched")
        of = f" of {name}" if name else ""
        typer.confirm(f"Remove {count} result{'s' * (count != 1)}{of} ({output.size(size)})?", abort=True, err=True)
    answer = client.request("DELETE", "/results", params=params, wait=600.0).json()
    if as_json:
        output.show_json(answer)
    else:
        count = answer["deleted"]
        output.note(f"removed {count} result{'s' * (count != 1)}, {output.size(answer['bytes'])}")
