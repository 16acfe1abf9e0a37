"""`woodfrog container …`: running instances of functions."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from woodfrog.cli import output
from woodfrog.cli.logs import show_logs
from woodfrog.cli.remote import connect, listing

app = typer.Typer(help="List, inspect and enter running containers.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Id = Annotated[str, typer.Argument(metavar="CONTAINER", help="Id of the container, from `woodfrog container list`.")]


@app.command("list")
def list_containers(
    of_app: Annotated[str, typer.Option("--app", help="Only this app's.")] = "", as_json: Json = False
) -> None:
    """Show the containers that exist now."""
    containers = [c for c in listing(connect(), "/v1/containers", "containers") if of_app in ("", c.get("app"))]
    if as_json:
        output.show_json(containers)
        return
    rows = [
        (
            c.get("id"),
            c.get("app"),
            c.get("function"),
            c.get("state"),
            "thawed" if c.get("restored") else "cold",
            c.get("calls"),
            output.ago(c.get("started_at")),
        )
        for c in containers
    ]
    output.table(["container", "app", "function", "state", "start", "calls", "started"], rows, empty="no containers")


@app.command()
def logs(
    container: Id,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for more.")] = False,
    since: Annotated[str, typer.Option(help="Only what is younger: 30s, 10m, 2h, 1d, or a Unix time.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Print what one container wrote."""
    show_logs(connect(), f"/v1/containers/{container}/logs", follow=follow, since=since, as_json=as_json)


@app.command("exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def execute(
    container: Id,
    command: Annotated[list[str], typer.Argument(metavar="COMMAND...", help="Program and its arguments.")],
    as_json: Json = False,
) -> None:
    """Run a program inside a container, as its user, and print what it wrote."""
    argv = command[1:] if command[:1] == ["--"] else command
    answer = connect().json("POST", f"/v1/containers/{container}/exec", body={"argv": argv})
    if as_json:
        output.show_json(answer)
    else:
        sys.stdout.write(str(answer.get("stdout", "")))
        sys.stderr.write(str(answer.get("stderr", "")))
    code = int(answer.get("exit_code", 0))
    # A negative status is a signal's number, which a shell shows as 128 + n.
    raise typer.Exit(code if code >= 0 else 128 - code)


@app.command()
def stop(container: Id, as_json: Json = False) -> None:
    """End a container after the calls that it is serving."""
    answer = connect().json("POST", f"/v1/containers/{container}/stop")
    if as_json:
        output.show_json(answer)
    else:
        output.note(f"stopped {container}")


@app.command()
def inspect(container: Id, as_json: Json = False) -> None:
    """Show all about one container, with the phases of its start."""
    answer = connect().json("GET", f"/v1/containers/{container}")
    if as_json:
        output.show_json(answer)
        return
    output.fields({k: v for k, v in answer.items() if k != "phases"})
    for line in output.trace_lines(answer.get("phases") or []):
        print(line)
