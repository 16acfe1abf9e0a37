"""`woodfrog volume …`: directories that functions share, and the files in them."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from woodfrog.cli import output
from woodfrog.cli.remote import connect, get, segment
from woodfrog.errors import NotFoundError, SpecError, WoodfrogError

if TYPE_CHECKING:
    from woodfrog.sdk.client import Client
    from woodfrog.sdk.volume_files import FileEntry

app = typer.Typer(help="Make and remove volumes, and the files in them.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="What programs call it: Volume.from_name(NAME).")]
Volume = Annotated[str, typer.Argument(metavar="VOLUME", help="Name of the volume, from `woodfrog volume list`.")]
Recursive = Annotated[bool, typer.Option("--recursive", "-r", help="A directory with all that is in it.")]


@app.command()
def create(name: Name, as_json: Json = False) -> None:
    """Make a volume."""
    answer = connect().request("PUT", f"/volumes/{segment(name)}").json()
    if not answer.get("created"):
        raise SpecError(f"volume {name!r} exists already", code="exists")
    if as_json:
        output.show_json(answer)
    else:
        output.note(f"made volume {name}")


@app.command("list")
def list_volumes(as_json: Json = False) -> None:
    """Show the volumes, and how many containers use each now."""
    volumes = get(connect(), "/volumes")["volumes"]
    if as_json:
        output.show_json(volumes)
        return
    output.table(["volume", "containers"], [(v["name"], v["containers"]) for v in volumes], empty="no volumes")


@app.command()
def delete(
    name: Name,
    allow_missing: Annotated[bool, typer.Option("--allow-missing", help="No error if there is none.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Remove a volume and all that is in it. Refused while a container uses it."""
    client = connect()
    if not yes:
        if name not in {v["name"] for v in get(client, "/volumes")["volumes"]} and not allow_missing:
            raise NotFoundError(f"no volume {name!r}; `woodfrog volume list` shows them")
        typer.confirm(f"Remove volume {name} and all that is in it?", abort=True, err=True)
    try:
        answer = client.request("DELETE", f"/volumes/{segment(name)}").json()
    except NotFoundError:
        if not allow_missing:
            raise NotFoundError(f"no volume {name!r}; `woodfrog volume list` shows them") from None
        answer = {"name": name, "deleted": False}
    if as_json:
        output.show_json(answer)
    else:
        output.note(f"removed volume {name}" if answer["deleted"] else f"no volume {name}")


@app.command()
def ls(
    volume: Volume,
    path: Annotated[str, typer.Argument(metavar="PATH", help="Directory or file in the volume.")] = "/",
    as_json: Json = False,
) -> None:
    """List what a directory of a volume holds."""
    from woodfrog.sdk.volume_files import entries

    found = [_row(e) for e in entries(connect(), volume, path, recursive=False)]
    if as_json:
        output.show_json(found)
        return
    rows = [
        (
            _shown(e["path"]),
            e["type"],
            "" if e["type"] == "directory" else output.size(e["size"]),
            output.ago(e["mtime"]),
        )
        for e in found
    ]
    output.table(["path", "type", "size", "changed"], rows, empty="nothing in it")


def _row(entry: FileEntry) -> dict[str, Any]:
    kind = entry.type.name.lower() if entry.type else "device"
    return {"path": entry.path, "type": kind, "size": entry.size, "mtime": entry.mtime}


def _shown(path: str) -> str:
    """A name as a terminal may see it: containers choose it."""
    return path if path.isprintable() else path.encode("unicode_escape", "surrogatepass").decode()


@app.command()
def put(
    volume: Volume,
    local: Annotated[str, typer.Argument(metavar="LOCAL", help="File or directory of this machine.")],
    remote: Annotated[
        str, typer.Argument(metavar="REMOTE", help="Path in the volume; with / at its end LOCAL goes into it.")
    ] = "/",
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace files that exist.")] = False,
) -> None:
    """Send a file, or a directory's files, to a volume. Missing directories are made."""
    from woodfrog.sdk.volume_files import BatchUpload

    if remote.endswith("/") or not remote:
        remote = f"{remote.rstrip('/')}/{os.path.basename(os.path.abspath(local))}"
    source = Path(local)
    client = connect()
    with (
        _progress("sending") as progress,
        _local_errors(),
        BatchUpload(lambda: client, volume, force=force, progress=progress) as batch,
    ):
        if source.is_dir():
            batch.put_directory(source, remote)
        else:
            batch.put_file(source, remote.rstrip("/"))
        count = len(batch)
    what = str(source) if source.is_file() else f"{source}: {_files(count)}"
    output.note(f"sent {what} to {_shown(remote.lstrip('/')) or '/'} in {volume}")


@app.command("get")
def get_(
    volume: Volume,
    remote: Annotated[str, typer.Argument(metavar="REMOTE", help="File or directory in the volume.")],
    local: Annotated[
        str, typer.Argument(metavar="LOCAL", help="Where to: a directory that exists, a new name, or - for stdout.")
    ] = ".",
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace files that exist.")] = False,
) -> None:
    """Fetch a file, or a directory with all that is in it, from a volume."""
    from woodfrog.sdk.volume_files import FileEntryType, entries, read_into

    client = connect()
    top = "/".join(p for p in remote.split("/") if p not in ("", "."))
    if local == "-":
        read_into(client, volume, remote, sys.stdout.buffer)
        sys.stdout.flush()
        return
    target = Path(local)
    into = target.is_dir() or local.endswith("/")
    count = 0
    with _progress("fetching") as progress, _local_errors():
        found = list(entries(client, volume, remote, recursive=True))
        single = len(found) == 1 and found[0].path == top and found[0].type != FileEntryType.DIRECTORY
        goal = target / Path(top).name if into else target
        if not single:
            goal.mkdir(parents=True, exist_ok=True)
        skip = 0 if single or not top else len(top.split("/"))
        wanted = [(e, goal if single else goal.joinpath(*_safe(e.path.split("/")[skip:]))) for e in found]
        for entry, path in wanted:  # before the first byte: nobody wants half of them
            if entry.type == FileEntryType.FILE:
                _check_free(path, force=force)
        for entry, path in wanted:
            if entry.type == FileEntryType.DIRECTORY:
                path.mkdir(parents=True, exist_ok=True)
            elif entry.type == FileEntryType.FILE:
                _fetch(client, volume, entry.path, path, progress)
                count += 1
            elif single:
                what = f"{_shown(top)} is not a regular file: a {_row(entry)['type']}"
                raise SpecError(f"volume {volume!r}: {what}", code="not-a-file")
            else:
                output.note(f"left out {_shown(entry.path)}: a {_row(entry)['type']}")
    output.note(f"fetched {goal}{'' if single else f': {_files(count)}'}")


def _safe(parts: list[str]) -> list[str]:
    """Names that lead nowhere else, whatever the daemon says."""
    if any(p in ("", ".", "..") or "/" in p or "\0" in p for p in parts):
        raise SpecError(f"the daemon lists {'/'.join(parts)!r}, which is no path in a volume")
    return parts


def _check_free(path: Path, *, force: bool) -> None:
    if path.is_dir():
        raise SpecError(f"{path} is a directory", code="is-directory")
    if os.path.lexists(path) and not force:
        raise SpecError(f"{path} exists already: --force replaces it", code="exists")


def _fetch(client: Client, volume: str, remote: str, path: Path, progress: Any) -> None:
    """Write one file: whole, or not at all."""
    from woodfrog.sdk.volume_files import read_into

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        file = tempfile.NamedTemporaryFile(dir=path.parent, prefix=".woodfrog-", delete=False)  # noqa: SIM115
    except OSError as e:
        raise SpecError(f"{path}: {e.strerror}", code="local-file") from None
    with file:
        try:
            read_into(client, volume, remote, file, lambda count: progress(remote, count))
            mask = os.umask(0)
            os.umask(mask)
            os.fchmod(file.fileno(), 0o666 & ~mask)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


@app.command()
def cp(
    volume: Volume,
    paths: Annotated[list[str], typer.Argument(metavar="SOURCE... TARGET", help="Paths in the volume.")],
    recursive: Recursive = False,
) -> None:
    """Copy within a volume, as `cp` does."""
    from woodfrog.sdk.volume_files import copy

    if len(paths) < 2:
        raise SpecError(f"volume cp wants SOURCE and TARGET, got {paths[0]!r} only", code="bad-arguments")
    copy(connect(), volume, paths[:-1], paths[-1], recursive=recursive)


@app.command()
def rm(
    volume: Volume,
    path: Annotated[str, typer.Argument(metavar="PATH", help="File or directory in the volume.")],
    recursive: Recursive = False,
) -> None:
    """Remove a file, or with -r a directory, from a volume."""
    from woodfrog.sdk.volume_files import remove

    remove(connect(), volume, path, recursive=recursive)
    output.note(f"removed {path} from {volume}")


def _files(count: int) -> str:
    return f"{count} file{'' if count == 1 else 's'}"


@contextlib.contextmanager
def _progress(verb: str) -> Iterator[Any]:
    """Says, on a terminal, how far a file is."""
    with output.Progress(quiet=not sys.stderr.isatty()) as progress:
        yield lambda path, count: progress.say(f"{verb} {_shown(path)}: {output.size(count)}")


@contextlib.contextmanager
def _local_errors() -> Iterator[None]:
    """What is wrong with this machine's files, in one line."""
    try:
        yield
    except WoodfrogError:
        raise
    except OSError as e:
        where = f"{e.filename}: " if e.filename else ""
        raise SpecError(f"{where}{e.strerror or e}", code="local-file") from None
