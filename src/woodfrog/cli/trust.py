"""`woodfrog snapshot trust …`: whose snapshots this machine takes up."""

from __future__ import annotations

import base64
import binascii
import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from woodfrog.cli import output
from woodfrog.cli.remote import connect, get, segment
from woodfrog.errors import HostError, SpecError

if TYPE_CHECKING:
    from woodfrog.sdk.client import Client

app = typer.Typer(
    help="Show this machine's key and those it trusts, and change them.",
    no_args_is_help=False,
    invoke_without_command=True,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback()
def default(context: typer.Context, as_json: Json = False) -> None:
    """Show this machine's key and those it trusts; `add` and `remove` change them."""
    if context.invoked_subcommand is None:
        list_keys(as_json)


@app.command("list")
def list_keys(as_json: Json = False) -> None:
    """Show this machine's key, which another machine adds, and the keys this one trusts."""
    answer = get(connect(), "/trust")
    if as_json:
        output.show_json(answer)
        return
    own = answer.get("own") or {}
    print(own.get("text", ""))
    output.note(f"this machine's key, fingerprint {own.get('fingerprint')}: add it on the machine that is to trust it")
    rows = [(key["fingerprint"], key.get("comment")) for key in answer.get("trusted") or []]
    output.table(["trusted", "comment"], rows, empty="no other machine is trusted")


@app.command()
def add(
    key: Annotated[
        str, typer.Argument(metavar="KEY", help="What `woodfrog snapshot trust` prints there, or a file with it, or -.")
    ],
    comment: Annotated[str, typer.Option("--comment", help="Whose it is, instead of the name in it.")] = "",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Trust another machine's key. Compare the fingerprint first: its snapshots run here as if made here."""
    text = _key_text(key)
    if not yes:
        output.note(f"fingerprint {_fingerprint(text)} {text.partition(' ')[2]}".rstrip())
        typer.confirm("Trust snapshots signed with this key?", abort=True, err=True)
    client = connect()
    headers = _as_root(client)
    answer = client.request("POST", "/trust", data={"key": text, "comment": comment}, headers=headers).json()
    if as_json:
        output.show_json(answer)
    else:
        output.note(f"trusted {answer.get('fingerprint')} {answer.get('comment') or ''}".rstrip())


@app.command()
def remove(
    fingerprint: Annotated[str, typer.Argument(metavar="FINGERPRINT", help="Or its first 8 digits or more.")],
    as_json: Json = False,
) -> None:
    """Trust a key no longer. Snapshots that were taken up already stay."""
    client = connect()
    path = f"/trust/{segment(fingerprint)}/remove"
    answer = client.request("POST", path, data={}, headers=_as_root(client)).json()
    if as_json:
        output.show_json(answer)
    else:
        output.note(f"no longer trusted: {answer.get('fingerprint')} {answer.get('comment') or ''}".rstrip())


def _key_text(key: str) -> str:
    if key == "-":
        return sys.stdin.read().strip()
    try:
        path = Path(key)
        # A key's own text may look like a path: base64 has slashes.
        return path.read_text().strip() if path.is_file() else key.strip()
    except (OSError, UnicodeDecodeError) as e:
        raise SpecError(f"cannot read {key}: {getattr(e, 'strerror', None) or 'not text'}", code="no-file") from None


def _fingerprint(text: str) -> str:
    try:
        return hashlib.sha256(base64.b64decode(text.partition(" ")[0], validate=True)).hexdigest()[:24]
    except (ValueError, binascii.Error):
        raise SpecError(
            "not a public key: expected the line that `woodfrog snapshot trust` prints there", code="bad-public-key"
        ) from None


def _as_root(client: Client) -> dict[str, str]:
    """What shows the daemon that root asks."""
    path = client.settings.home / "keys" / "admin"
    if client.settings.host:
        raise HostError("whom a machine trusts is changed on that machine, not over the network", code="not-root")
    try:
        return {"woodfrog-admin": path.read_text()}
    except OSError as e:
        raise HostError(
            f"only root may change whom this machine trusts: use sudo ({path}: {e.strerror})", code="not-root"
        ) from None
