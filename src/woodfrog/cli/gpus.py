"""`woodfrog gpu …`: the GPUs of this machine, and which are set aside."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from woodfrog.cli import output
from woodfrog.cli.remote import connect, get, post

app = typer.Typer(help="Show the GPUs of this machine, and look at their health.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("list")
def list_gpus(as_json: Json = False) -> None:
    """Show each GPU, who has it, and why it is not given out if it is set aside."""
    _show(get(connect(), "/gpus")["gpus"], as_json)


@app.command()
def check(as_json: Json = False) -> None:
    """Look at every GPU now, and forget the errors that were reported of it before: after a repair."""
    _show(post(connect(), "/gpus/check")["gpus"], as_json)


def _show(gpus: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        output.show_json(gpus)
        return
    rows = [
        (g["gpu"], g["chip"], output.size(g["memory_bytes"]), g["state"].replace("-", " "), g["container"], g["why"])
        for g in gpus
    ]
    output.table(["gpu", "chip", "memory", "state", "container", "why"], rows, empty="no GPUs")
