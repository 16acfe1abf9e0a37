"""`woodfrog app …`: deployed apps."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from woodfrog.cli import output
from woodfrog.cli.logs import show_logs
from woodfrog.cli.remote import connect, listing

app = typer.Typer(help="List, watch and stop apps.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Name = Annotated[str, typer.Argument(metavar="APP", help="Name of the app.")]


def _functions(item: dict[str, Any]) -> str:
    return ", ".join(str(f.get("tag", f)) if isinstance(f, dict) else str(f) for f in item.get("functions") or [])


@app.command("list")
def list_apps(as_json: Json = False) -> None:
    """Show the apps the daemon knows."""
    apps = listing(connect(), "/v1/apps", "apps")
    if as_json:
        output.show_json(apps)
        return
    rows = [
        (
            a.get("app"),
            a.get("state"),
            a.get("version"),
            a.get("containers"),
            output.ago(a.get("deployed_at")),
            _functions(a),
        )
        for a in apps
    ]
    output.table(["app", "state", "version", "containers", "deployed", "functions"], rows, empty="no apps")


@app.command()
def logs(
    name: Name,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for more.")] = False,
    since: Annotated[str, typer.Option(help="Only what is younger: 30s, 10m, 2h, 1d, or a Unix time.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Print what an app's functions wrote."""
    show_logs(connect(), f"/v1/apps/{name}/logs", follow=follow, since=since, as_json=as_json)


@app.command()
def stop(name: Name, as_json: Json = False) -> None:
    """Stop an app: its calls are cancelled and its containers ended."""
    answer = connect().json("POST", f"/v1/apps/{name}/stop")
    if as_json:
        output.show_json(answer)
    else:
        output.note(f"stopped {name}")


@app.command()
def history(name: Name, as_json: Json = False) -> None:
    """Show the versions an app was deployed in, the newest first."""
    versions = listing(connect(), f"/v1/apps/{name}/history", "versions")
    if as_json:
        output.show_json(versions)
        return
    rows = [(v.get("version"), v.get("state"), output.ago(v.get("deployed_at")), _functions(v)) for v in versions]
    output.table(["version", "state", "deployed", "functions"], rows, empty="no versions")
