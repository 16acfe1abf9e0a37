"""`woodfrog container …`: running instances of functions."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from woodfrog.cli import output
from woodfrog.cli.logs import Lines, Timestamps, show_logs
from woodfrog.cli.remote import connect, get, post, segment

app = typer.Typer(help="List, inspect and enter running containers.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Id = Annotated[str, typer.Argument(metavar="CONTAINER", help="Id of the container, from `woodfrog container list`.")]


@app.command("list")
def list_containers(
    of_app: Annotated[str, typer.Option("--app", help="Only this app's.")] = "", as_json: Json = False
) -> None:
    """Show the containers that exist now."""
    containers = [c for c in get(connect(), "/containers")["containers"] if of_app in ("", c.get("app"))]
    if as_json:
        output.show_json(containers)
        return
    rows = [
        (
            c["id"],
            c.get("app"),
            c.get("function"),
            "busy" if c.get("call") else c["stage"],
            {"restore": "thawed", "cold": "cold"}.get(str(c.get("mode"))),
            c.get("served"),
            output.size(c.get("memory_bytes")),
            output.ago(c.get("started")),
        )
        for c in containers
    ]
    headers = ["container", "app", "function", "state", "start", "calls", "memory", "started"]
    output.table(headers, rows, empty="no containers")


@app.command()
def logs(
    container: Id,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for more.")] = False,
    lines: Lines = None,
    timestamps: Timestamps = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Print what one container wrote, and what became of it."""
    path = f"/containers/{segment(container)}/logs"
    params = {"follow": "1" if follow else None, "last": lines}
    entries = connect().lines(path, {k: v for k, v in params.items() if v is not None})
    show_logs(entries, as_json=as_json, timestamps=timestamps)


@app.command("exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def execute(
    container: Id,
    command: Annotated[list[str], typer.Argument(metavar="COMMAND...", help="Program and its arguments.")],
    timeout: Annotated[float, typer.Option(help="Seconds it may run.")] = 60.0,
    as_json: Json = False,
) -> None:
    """Run a program inside a container, as its user, and print what it wrote. Options go before CONTAINER."""
    argv = command[1:] if command[:1] == ["--"] else command
    answer = post(connect(), f"/containers/{segment(container)}/exec", {"argv": argv, "timeout": timeout}, wait=timeout)
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
    """End a container."""
    answer = post(connect(), f"/containers/{segment(container)}/stop")
    if as_json:
        output.show_json(answer)
    else:
        output.note(f"stopping {answer.get('container', container)}")


@app.command()
def inspect(container: Id, as_json: Json = False) -> None:
    """Show all about one container, with the phases of its start."""
    answer = get(connect(), f"/containers/{segment(container)}")
    if as_json:
        output.show_json(answer)
        return
    output.fields({k: v for k, v in answer.items() if k != "phases"})
    for line in output.trace_lines(answer.get("phases") or []):
        print(line)
