"""`woodfrog secret …`: values that functions get as environment variables and that no program holds."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from woodfrog.cli import output
from woodfrog.cli.remote import connect, get, put, segment
from woodfrog.errors import NotFoundError, SpecError

app = typer.Typer(help="Keep secrets for functions; values are never shown again.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What programs call it: Secret.from_name(NAME).")],
    values: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE...", help="Without any: a JSON object is read from standard input."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Keep a secret, replacing one of the same name. Functions see it from their next start or thaw on."""
    pairs: dict[str, str] = {}
    if values:
        for text in values:
            key, equals, value = text.partition("=")
            if not equals or not key:
                raise SpecError("secret create wants KEY=VALUE: a key without a value was given", code="bad-secret")
            pairs[key] = value
    else:
        try:
            pairs = json.load(sys.stdin)
        except ValueError:
            raise SpecError("standard input is not a JSON object of texts", code="bad-secret") from None
        if not isinstance(pairs, dict) or not all(isinstance(v, str) for v in pairs.values()):
            raise SpecError("standard input is not a JSON object of texts", code="bad-secret")
    answer = put(connect(), f"/secrets/{segment(name)}", pairs)
    if as_json:
        output.show_json(answer)
    else:
        output.note(f"kept {name} with {', '.join(answer.get('keys') or []) or 'no keys'}")


@app.command("list")
def list_secrets(as_json: Json = False) -> None:
    """Show the names of the secrets the daemon keeps."""
    names = get(connect(), "/secrets")["secrets"]
    if as_json:
        output.show_json(names)
    else:
        output.table(["secret"], [(n,) for n in names], empty="no secrets")


@app.command()
def delete(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What programs call it.")],
    allow_missing: Annotated[bool, typer.Option("--allow-missing", help="No error if there is none.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Remove a secret. Functions that name it lack its variables from their next start or thaw on."""
    client = connect()
    if not yes:
        if name not in get(client, "/secrets")["secrets"] and not allow_missing:
            raise NotFoundError(f"no secret {name!r}; `woodfrog secret list` shows them")
        if users := get(client, f"/secrets/{segment(name)}/functions")["functions"]:
            output.note(f"named by {', '.join(users)}: without it they start without its variables")
        typer.confirm(f"Remove secret {name}?", abort=True, err=True)
    try:
        answer = client.request("DELETE", f"/secrets/{segment(name)}", params={"force": "1"}).json()
    except NotFoundError:
        if not allow_missing:
            raise
        answer = {"name": name, "deleted": False}
    if as_json:
        output.show_json(answer)
    else:
        output.note(f"removed secret {name}" if answer["deleted"] else f"no secret {name}")
