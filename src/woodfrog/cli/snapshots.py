"""`woodfrog snapshot …`: frozen functions."""

from __future__ import annotations

import os
import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from woodfrog.cli import contents, output, trust
from woodfrog.cli.call import payload_from, raise_failure
from woodfrog.cli.remote import connect, finish, get, post, segment, split_target, work
from woodfrog.errors import (
    CaptureError,
    NotFoundError,
    SnapshotError,
    SpecError,
    StartupError,
    StoreError,
    WoodfrogError,
)

if TYPE_CHECKING:
    from woodfrog.sdk.client import Client

LOOK_S = 300.0
"""Looking through a snapshot's memory may take so long."""
SHORT = 8
"""As many digits of a key's fingerprint tell it from others."""
app = typer.Typer(help="List, look into, make, keep, move and retire snapshots.", no_args_is_help=True)
app.add_typer(trust.app, name="trust")

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Id = Annotated[str, typer.Argument(metavar="SNAPSHOT", help="Id of the snapshot, from `woodfrog snapshot list`.")]


@app.command("list")
def list_snapshots(
    of_app: Annotated[str, typer.Option("--app", help="Only this app's.")] = "",
    tier: Annotated[bool, typer.Option("--tier", help="Those in the tier, and those that were removed there.")] = False,
    as_json: Json = False,
) -> None:
    """Show the snapshots kept on this machine, or those in the tier (WOODFROG_TIER)."""
    client = connect()
    answer = work(client, "/tier/list", quiet=as_json) if tier else get(client, "/snapshots")
    keys = _keys_of(client, of_app) if of_app else set()
    snapshots = [
        s
        for s in answer["snapshots"]
        # The same code run under another name has the same key, and shares the snapshot.
        if of_app in ("", s.get("app")) or s.get("function_key") in keys
    ]
    if as_json:
        output.show_json(snapshots)
    elif tier:
        _show_tier(snapshots, str(answer.get("tier")))
    else:
        _show_here(snapshots)


HEADERS = ("snapshot", "app", "function", "state", "memory", "stored", "files", "made")


def _cells(s: dict[str, Any]) -> tuple[Any, ...]:
    """Of one snapshot, what HEADERS say."""
    sizes = (output.size(s.get(f"{part}_bytes")) for part in ("memory", "stored", "files"))
    return (s["id"], s.get("app"), s.get("function"), s["state"], *sizes, output.ago(s.get("created")))


def _show_here(snapshots: list[dict[str, Any]]) -> None:
    rows = [
        (
            *_cells(s),
            " ".join(mark for mark in ("pinned", "pushed", "withdrawn") if s.get(mark)),
            s.get("why") or ", ".join(s.get("modules") or ()),
        )
        for s in snapshots
    ]
    headers = [*HEADERS, "marks", "why"]
    output.table(headers, rows, empty="no snapshots")


def _show_tier(snapshots: list[dict[str, Any]], name: str) -> None:
    rows = [
        (
            *_cells(s),
            f"{(s.get('signer') or '')[:SHORT]} {s.get('signer_comment') or ''}".strip(),
            "here" if s.get("here") else "",
            f"{s.get('why')}, {output.ago(s['removed'])}" if s.get("removed") else s.get("why"),
        )
        for s in snapshots
    ]
    headers = [*HEADERS, "signed by", "here", "why"]
    output.table(headers, rows, empty=f"no snapshots in {name}")


@app.command()
def inspect(
    snapshot: Id,
    log: Annotated[bool, typer.Option("--log", help="Print the whole logs of the capture instead.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Do not look into its memory, which takes seconds.")] = False,
    most: Annotated[int, typer.Option("--most", min=1, help="Rows of each table.")] = 15,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw what is in it: .png, .svg or .pdf.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show all about one snapshot: what it was made of and for, what is in it and why it is big, its capture."""
    if plot is not None:
        from woodfrog.cli import plot as drawing

        drawing.check(plot)
    client = connect()
    params = {"log": 1} if log else {}
    answer = get(client, f"/snapshots/{segment(snapshot)}", **params)
    if log and not as_json:
        for name, text in (answer.get("log") or {}).items():
            output.note(f"== {name}")
            sys.stdout.write(text if text.endswith("\n") or not text else text + "\n")
        return
    found: dict[str, Any] | None = None
    if plot is not None or not (quick or log):
        try:
            found = _contents(client, str(answer.get("id", snapshot)), most, quiet=as_json)
        except WoodfrogError as e:
            if plot is not None:
                raise
            output.note(f"not looked into: {e.message}")
    if plot is not None and found is not None:
        drawing.draw(found, plot, title=f"{answer.get('app')}.{answer.get('function')}")
    if as_json:
        output.show_json(answer if quick or log else {**answer, "contents": found})
        return
    output.fields({k: v for k, v in answer.items() if k not in ("phases", "log", "files", "gpu_bytes")})
    if on_gpu := answer.get("gpu_bytes"):
        print(f"\nof GPUs {output.size(sum(on_gpu.values()))}")
        output.table(["size", "what"], [(output.size(size), what) for what, size in on_gpu.items()])
    if found is not None:
        contents.show(found, most)
    lines = list(output.trace_lines(answer.get("phases") or []))
    if lines:
        print("\ncapture")
    for line in lines:
        print(line)


def _contents(client: Client, snapshot: str, most: int, *, quiet: bool) -> dict[str, Any]:
    with output.Progress(quiet=quiet or not sys.stderr.isatty()) as progress:
        progress.say(f"looking into {snapshot}")
        path = f"/snapshots/{segment(snapshot)}/contents"
        found = client.request("GET", path, params={"most": max(most, 50)}, wait=LOOK_S).json()
    return dict(found)


@app.command()
def diff(
    snapshot: Id,
    other: Annotated[
        str, typer.Argument(metavar="OTHER", help="Another snapshot, or a container thawed from this one.")
    ] = "",
    call: Annotated[
        str, typer.Option("--call", metavar="METHOD", help="Instead of OTHER: thaw it, and call this.")
    ] = "",
    args: Annotated[str, typer.Option("--args", metavar="JSON", help="The call's arguments, as `woodfrog call`.")] = "",
    most: Annotated[int, typer.Option("--most", min=0, help="Rows of each table, and addresses.")] = 15,
    as_json: Json = False,
) -> None:
    """Show which pages differ, by kind of memory, library and mapping: what a request wrote to.

    A container's pages are read while it lives, so ask when it is idle. They hold what its thaw wrote, and all of its
    calls.
    """
    if bool(other) == bool(call):
        raise SpecError("give either another snapshot or container, or --call METHOD", code="bad-arguments")
    if args and not call:
        raise SpecError("--args belongs to --call", code="bad-arguments")
    client = connect()
    if call:
        other = _called(client, snapshot, call, args)
    with output.Progress(quiet=as_json or not sys.stderr.isatty()) as progress:
        progress.say(f"comparing {snapshot} and {other}")
        path = f"/snapshots/{segment(snapshot)}/diff/{segment(other)}"
        found = client.request("GET", path, params={"most": most}, wait=LOOK_S).json()
    if as_json:
        output.show_json(found)
    else:
        contents.show_difference(found, most)


def _called(client: Client, snapshot: str, method: str, args: str) -> str:
    """Call a method of the snapshot's function; the container that served it.

    Raises:
        NotFoundError: its app is not deployed.
        CaptureError: the container was not thawed from it.
    """
    row = get(client, f"/snapshots/{segment(snapshot)}")
    app_name, function = str(row.get("app")), str(row.get("function"))
    key = _key_of(client, app_name, function)
    if key != row.get("function_key"):
        raise NotFoundError(f"{snapshot} is of another version of {app_name}.{function} than is deployed now")
    tag = function if method == function else f"{function}.{method}"
    call_id = uuid.uuid4().hex
    headers = {"woodfrog-call": call_id, "woodfrog-encoding": "json", "content-type": "application/json"}
    content = payload_from(args or "[]", [], str)
    path = f"/apps/{segment(app_name)}/calls/{segment(tag)}"
    with output.Progress(quiet=not sys.stderr.isatty()) as progress:
        progress.say(f"calling {app_name}.{tag}")
        reply = client.request("POST", path, headers=headers, content=content, wait=1.0)
        while (status := reply.headers.get("woodfrog-status", "pending")) == "pending":
            reply = client.request("GET", f"/calls/{call_id}", wait=2.0)
    if status != "success":
        raise_failure(status, reply.body.getvalue())
    container = str(get(client, f"/calls/{call_id}/trace").get("instance"))
    try:
        found = get(client, f"/containers/{segment(container)}")
    except NotFoundError:
        raise CaptureError(f"container {container} ended with the call; --call needs one that stays") from None
    if found.get("snapshot") != row.get("id"):
        raise CaptureError(f"container {container} was not thawed from {row.get('id')}: try again once it is idle")
    return container


@app.command()
def create(
    target: Annotated[str, typer.Argument(metavar="APP.FUNC", help="A deployed function with snapshots enabled.")],
    timeout: Annotated[float, typer.Option(help="Seconds to wait for it.")] = 600.0,
    as_json: Json = False,
) -> None:
    """Boot and freeze a function now, instead of at its first call, and print the snapshot's id."""
    client = connect()
    app_name, tag = split_target(client, target)
    key = _key_of(client, app_name, tag)
    found = _ready(client, key)
    if found is None:
        post(client, "/snapshots/create", {"app": app_name, "tag": tag})
        found = wait_for(client, app_name, tag, key, timeout, quiet=as_json)
    if as_json:
        output.show_json(found)
    else:
        print(found["id"])


def _keys_of(client: Client, app_name: str) -> set[str]:
    try:
        return {f["key"] for f in get(client, f"/apps/{segment(app_name)}")["functions"]}
    except NotFoundError:
        return set()  # Its snapshots outlive an app.


def _key_of(client: Client, app_name: str, tag: str) -> str:
    functions = {f["tag"]: f["key"] for f in get(client, f"/apps/{segment(app_name)}")["functions"]}
    if tag not in functions:
        raise NotFoundError(f"app {app_name!r} has no function {tag!r}; it has: {', '.join(functions) or 'none'}")
    return str(functions[tag])


def _state_of(client: Client, app_name: str, tag: str, key: str, what: str) -> dict[str, Any]:
    """How far the daemon is with it; nothing where another version was deployed meanwhile."""
    functions = get(client, f"/apps/{segment(app_name)}")["functions"]
    states = (f.get(what) for f in functions if f["tag"] == tag and f["key"] == key)
    return dict(next(states, None) or {})


def _ready(client: Client, key: str) -> dict[str, Any] | None:
    snapshots = get(client, "/snapshots")["snapshots"]
    return next((s for s in snapshots if s.get("function_key") == key and s["state"] == "ready"), None)


def wait_for(client: Client, app_name: str, tag: str, key: str, timeout: float, *, quiet: bool) -> dict[str, Any]:
    """The snapshot of that function key, as soon as there is one.

    Raises:
        CaptureError: it came to nothing, or not within `timeout` seconds.
    """
    begin = time.monotonic()
    with output.Progress(quiet=quiet) as progress:
        while time.monotonic() - begin < timeout:
            state = _state_of(client, app_name, tag, key, "capture")
            found = _ready(client, key)
            if found is not None:
                return found
            if state.get("snapshot"):  # the rest of it is on its way from the tier
                return {"id": state["snapshot"], "app": app_name, "function": tag, "function_key": key}
            if not state.get("pending"):
                why = f": {state['reason']}" if state.get("reason") else ""
                logs = f"see `woodfrog app logs {app_name}`"
                raise CaptureError(f"{target_of(app_name, tag)} was not captured{why}; {logs}")
            progress.say(_words(client, app_name, tag))
            time.sleep(0.2)
    raise CaptureError(f"{target_of(app_name, tag)} was not captured within {timeout:.0f} s", code="capture-timeout")


def wait_warm(client: Client, app_name: str, tag: str, key: str, timeout: float, *, quiet: bool) -> dict[str, Any]:
    """The containers that `min_containers` asks for, as soon as they are ready.

    Raises:
        StartupError: they do not start, or not within `timeout` seconds.
    """
    begin = time.monotonic()
    state: dict[str, Any] = {}
    with output.Progress(quiet=quiet) as progress:
        while time.monotonic() - begin < timeout:
            state = _state_of(client, app_name, tag, key, "warm")
            logs = f"see `woodfrog app logs {app_name}`"
            if not state:
                raise StartupError(f"{target_of(app_name, tag)} is of another version meanwhile, or stopped; {logs}")
            if state["ready"] >= state["wanted"]:
                return {"function": tag, "ready": state["ready"]}
            if state["reason"]:
                raise StartupError(f"{target_of(app_name, tag)} does not start: {state['reason']}; {logs}")
            progress.say(_words(client, app_name, tag))
            time.sleep(0.2)
    why = "no room for more" if state.get("no_room") else f"{state.get('ready', 0)} are"
    raise StartupError(
        f"{target_of(app_name, tag)}: its {state.get('wanted')} containers are not ready after {timeout:.0f} s ({why})",
        code="startup-timeout",
    )


def _words(client: Client, app_name: str, tag: str) -> str:
    """What is going on with a function that is waited for."""
    booting = [
        c["stage"]
        for c in get(client, "/containers")["containers"]
        if (c.get("app"), c.get("function")) == (app_name, tag) and (c["stage"] != "ready" or c.get("storing"))
    ]
    return f"{target_of(app_name, tag)}: {output.stage_words(booting[0] if booting else 'queued')}"


def target_of(app_name: str, tag: str) -> str:
    return f"{app_name}.{tag}"


@app.command()
def invalidate(
    snapshot: Id,
    tier: Annotated[
        bool,
        typer.Option(
            "--tier", help="Remove it from the tier as well, for all machines; its memory there goes with `gc --tier`."
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Remove a snapshot, now or when its last container ends: the next start is cold, and makes a new one.

    In the tier it stays, and is not taken from there again by this machine. With --tier it goes there, too, and no
    other machine puts it back; give the whole id of one that is only there. Asks before that, and before a pinned one.
    """
    client = connect()
    if not tier:
        answer = _remove_here(client, snapshot, yes)
    else:
        if not yes:
            snapshot = _ask_to_withdraw(client, snapshot)
        answer = work(client, f"/snapshots/{segment(snapshot)}/invalidate", quiet=as_json, tier="1", force="1")
    if as_json:
        output.show_json(answer)
        return
    name = answer.get("snapshot", snapshot)
    gone = answer.get("removed", True)
    if answer.get("here", True):
        output.note(f"removed {name}" if gone else f"retired {name}: removed with the last container thawed from it")
    if tier:
        there = f"removed {name} from" if answer.get("in_tier") else f"{name} was not in"
        output.note(f"{there} {answer.get('tier')}")


def _remove_here(client: Client, snapshot: str, yes: bool) -> dict[str, Any]:
    """Have a snapshot removed from this machine; a pinned one when a person confirms that."""
    path = f"/snapshots/{segment(snapshot)}/invalidate"
    if not yes:
        try:
            return post(client, path)
        except SpecError as e:
            if e.code != "pinned":
                raise
        typer.confirm(f"{snapshot} is pinned. Remove it?", abort=True, err=True)
    return work(client, path, quiet=True, force="1")


def _ask_to_withdraw(client: Client, snapshot: str) -> str:
    """Have a person confirm that nobody needs it; its whole id."""
    name = get(client, "/tier")["tier"]  # or there is none, and nothing to ask
    where = f"from {name}"
    try:
        row = get(client, f"/snapshots/{segment(snapshot)}")
    except NotFoundError:
        output.note(f"{snapshot} is not on this machine: the tier's may be the last copy")
    else:
        snapshot, where = str(row.get("id", snapshot)), f"here and from {name}"
        pinned = ", which is pinned" if row.get("pinned") else ""
        output.note(f"{snapshot} of {row.get('app')}.{row.get('function')}{pinned}")
    typer.confirm(f"Remove it {where}, for all machines?", abort=True, err=True)
    return snapshot


# --- keeping ---------------------------------------------------------------------------------------------------------


@app.command()
def verify(
    snapshot: Annotated[str, typer.Argument(metavar="[SNAPSHOT]", help="Only this one.")] = "",
    every: Annotated[bool, typer.Option("--all", help="All of them and the page store; as without SNAPSHOT.")] = False,
    as_json: Json = False,
) -> None:
    """Read every byte again and compare it with what was signed. Exit status 2 when something is wrong."""
    if snapshot and every:
        raise SpecError("give a snapshot or --all, not both", code="bad-arguments")
    path = f"/snapshots/{segment(snapshot)}/verify" if snapshot else "/snapshots/verify"
    answer = work(connect(), path, quiet=as_json)
    rows, store = answer.get("snapshots") or [], answer.get("store") or []
    wrong = sum(bool(row["problems"]) for row in rows) + len(store)
    if as_json:
        output.show_json(answer)
    else:
        table = [
            (row["id"], output.size(row.get("bytes")), "; ".join(row["problems"]) if row["problems"] else "good")
            for row in rows
        ]
        output.table(["snapshot", "size", "result"], table, empty="no snapshots")
        for problem in store:
            output.note(f"page store: {problem.get('pack') or 'index'}: {problem.get('what')}")
    if wrong:
        if not as_json:
            output.note(f"{wrong} damaged: never thawed; `woodfrog snapshot invalidate` removes a snapshot")
        raise typer.Exit(output.OUR_ERROR)


@app.command()
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    rebuilt: Annotated[
        bool, typer.Option("--rebuilt", help="Rebuilt packs, too: the next thaws that need them rebuild them.")
    ] = False,
    tier: Annotated[
        bool, typer.Option("--tier", help="In the tier instead: what no snapshot there needs, a day old or more.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Remove memory that no snapshot and no container needs any more. The daemon does so by itself, a while later.

    In the tier it is done only when you ask: on one machine, that trusts all keys whose snapshots are there.
    """
    if rebuilt and tier:
        raise SpecError("rebuilt packs are on this machine only: give --rebuilt or --tier", code="bad-arguments")
    asked = {name: "1" for name, wanted in (("dry_run", dry_run), ("rebuilt", rebuilt), ("tier", tier)) if wanted}
    answer = work(connect(), "/snapshots/gc", quiet=as_json, **asked)
    if as_json:
        output.show_json(answer)
        return
    packs, freed = answer.get("packs") or 0, output.size(answer.get("freed_bytes") or 0)
    verb = "would free" if dry_run else "freed"
    if tier:
        parts = [f"{answer.get(kind) or 0} {kind}" for kind in ("packs", "chunks", "snapshots", "tombstones")]
        what = f"{verb} {freed} in {answer.get('tier')}: {answer.get('objects')} objects of {', '.join(parts)}"
        output.note(what if answer.get("objects") else f"nothing to remove in {answer.get('tier')}")
    else:
        what = f"{verb} {freed} in {packs} pack{'' if packs == 1 else 's'}"
        if answer.get("rebuilt_bytes"):
            what += f", {output.size(answer['rebuilt_bytes'])} of it rebuilt ones"
        output.note(what if answer.get("freed_bytes") else "nothing to remove")


@app.command()
def pin(snapshot: Id, as_json: Json = False) -> None:
    """Keep a snapshot: neither a newer one of its function nor a full disk removes it."""
    _mark(snapshot, "pin", "pinned", as_json)


@app.command()
def unpin(snapshot: Id, as_json: Json = False) -> None:
    """Take back `pin`."""
    _mark(snapshot, "unpin", "unpinned", as_json)


def _mark(snapshot: str, action: str, done: str, as_json: bool) -> None:
    answer = post(connect(), f"/snapshots/{segment(snapshot)}/{action}")
    if as_json:
        output.show_json(answer)
    else:
        output.note(f"{done} {answer.get('id', snapshot)}")


# --- moving ----------------------------------------------------------------------------------------------------------


@app.command()
def export(
    snapshot: Id,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write.")],
    force: Annotated[bool, typer.Option("--force", help="Replace FILE.")] = False,
    as_json: Json = False,
) -> None:
    """Write a snapshot to one file, with all that it needs. It holds a process's memory, and so its secrets."""
    if file.exists() and not force:
        raise SpecError(f"{file} exists: name another file, or give --force", code="file-exists")
    if not file.absolute().parent.is_dir():
        raise SpecError(f"no directory {file.absolute().parent}", code="no-file")
    client = connect()
    answer = work(client, f"/snapshots/{segment(snapshot)}/export", quiet=as_json)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with (
            open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out,
            output.Progress(quiet=as_json or not sys.stderr.isatty()) as progress,
        ):
            total = output.size(answer.get("bytes"))
            client.download(answer["file"], out, lambda n: progress.say(f"fetching: {output.size(n)} of {total}"))
        os.replace(temporary, file)
    except OSError as e:
        raise SpecError(f"cannot write {file}: {e.strerror}", code="no-file") from None
    finally:
        temporary.unlink(missing_ok=True)
    result = {"id": answer.get("id"), "file": str(file), "bytes": answer.get("bytes")}
    if as_json:
        output.show_json(result)
    else:
        output.note(f"exported {result['id']} to {file}, {output.size(result['bytes'])}")


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file that `snapshot export` wrote.")],
    as_json: Json = False,
) -> None:
    """Take up a snapshot from a file. The machine it comes from must be trusted: `woodfrog snapshot trust`."""
    client = connect()
    try:
        with open(file, "rb") as source:
            size = os.fstat(source.fileno()).st_size
            with output.Progress(quiet=as_json or not sys.stderr.isatty()) as progress:
                progress.say(f"sending {output.size(size)}")
                answer = client.upload("/snapshots/import", source, size)
        answer = finish(client, answer, quiet=as_json)
    except OSError as e:
        raise SpecError(f"cannot read {file}: {e.strerror}", code="no-file") from None
    except (NotFoundError, SnapshotError, StoreError) as e:
        e.message = f"{file}: {e.message}"  # the daemon knows its content only
        raise
    _show_taken(answer, "imported", as_json)


@app.command()
def push(
    snapshot: Id,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Also when it was removed from there for all machines: take that back.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Copy a snapshot to the tier (WOODFROG_TIER), from which other machines thaw it."""
    asked = {"anyway": "1"} if anyway else {}
    answer = work(connect(), f"/snapshots/{segment(snapshot)}/push", quiet=as_json, **asked)
    if as_json:
        output.show_json(answer)
    else:
        output.note(f"pushed {answer.get('id', snapshot)} to {answer.get('tier')}")


@app.command()
def pull(
    snapshot: Annotated[str, typer.Argument(metavar="SNAPSHOT", help="Its whole id.")], as_json: Json = False
) -> None:
    """Bring a snapshot from the tier (WOODFROG_TIER) to this machine."""
    _show_taken(work(connect(), f"/snapshots/{segment(snapshot)}/pull", quiet=as_json), "pulled", as_json)


def _show_taken(answer: dict[str, Any], done: str, as_json: bool) -> None:
    if as_json:
        output.show_json(answer)
        return
    of = f"{answer.get('app')}.{answer.get('function')}"
    output.note(f"{done} {answer.get('id')} of {of}" if answer.get("new") else f"{answer.get('id')} of {of} is here")
