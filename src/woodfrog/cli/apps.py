"""`woodfrog app …`: deployed apps."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from woodfrog.cli import output
from woodfrog.cli.logs import Lines, Timestamps, show_logs, since_time
from woodfrog.cli.remote import connect, get, post, segment
from woodfrog.errors import SpecError

app = typer.Typer(help="List, watch, stop and roll back apps.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_ERROR = 60
"""Characters of an error in a table."""
_KINDS = {"zygote": "cold (zygote)", "woken": "woken"}
Name = Annotated[str, typer.Argument(metavar="APP", help="Name of the app.")]


@app.command("list")
def list_apps(as_json: Json = False) -> None:
    """Show the apps the daemon knows."""
    apps = get(connect(), "/apps")["apps"]
    if as_json:
        output.show_json(apps)
        return
    rows = [
        (
            a["app"],
            _state(a),
            a["version"],
            a["containers"],
            *load_cells(a.get("calls") or {}),
            start_cells(a.get("starts") or {}),
            error_cell(a.get("last_error")),
            output.ago(a["deployed"]),
            ", ".join((*a["functions"], *(f"{x['tag']} (left out)" for x in a.get("left_out", ())))),
        )
        for a in apps
    ]
    headers = ["app", "state", "version", "containers", "running", "waiting", "24 h", "last error", "since"]
    output.table([*headers, "functions"], rows, empty="no apps")


def load_cells(calls: dict[str, Any]) -> tuple[str, str]:
    """Calls that run, and that wait, the oldest for how long."""
    waiting, oldest = calls.get("waiting", 0), calls.get("oldest_waiting_s")
    return str(calls.get("running", 0)), f"{waiting} ({output.span(oldest)})" if oldest is not None else str(waiting)


def start_cells(starts: dict[str, int]) -> str:
    """Of the last 24 hours: `12 thawed, 1 cold`. Who boots in a copy of its libraries was not thawed."""
    counts = {
        "thawed": starts.get("thawed", 0) + starts.get("woken", 0),
        "cold": starts.get("cold", 0) + starts.get("zygote", 0),
        "failed": starts.get("failed", 0),
    }
    return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count) or "-"


def error_words(last: dict[str, Any]) -> str:
    """In one line, and whose it is."""
    function, message = str(last["function"]), " ".join(str(last["message"]).split())
    return message if message.startswith(f"{function}: ") else f"{function}: {message}"


def error_cell(last: dict[str, Any] | None) -> str:
    if not last:
        return ""
    return f"{output.ago(last['at'])}: {short(error_words(last))}"


def short(message: str) -> str:
    """As much as a table has room for."""
    return message if len(message) <= _ERROR else f"{message[: _ERROR - 1]}…"


@app.command()
def inspect(name: Name, as_json: Json = False) -> None:
    """Show an app's functions: what each has to do, how its next start will go, the last error, what was left out."""
    found = get(connect(), f"/apps/{segment(name)}")
    if as_json:
        output.show_json(found)
        return
    last = found.get("last_error") or {}
    shown = {
        "app": found["app"],
        "state": "running (ephemeral)" if found["ephemeral"] else "deployed",
        "version": found["version"],
        "deployed": output.ago(found["deployed"]),
        "containers": found["containers"],
        "starts, 24 h": start_cells(found["starts"]),
        "last error": f"{output.ago(last['at'])}: {error_words(last)}" if last else "none",
    }
    output.fields(shown)
    print()
    rows = [
        (f["tag"], f["kind"], f["containers"], *load_cells(f["calls"]), snapshot_words(found["app"], f))
        for f in found["functions"]
    ]
    output.table(["function", "kind", "containers", "running", "waiting", "next start"], rows, empty="no functions")
    for left in found.get("left_out", ()):
        output.note(f"{left['tag']} is left out: {left['why']}")


def snapshot_words(name: str, function: dict[str, Any]) -> str:
    """How the next start of a function will go."""
    found = function["snapshots"]
    match found["state"]:
        case "off":
            return "cold: it has no enable_memory_snapshot=True"
        case "available":
            return f"thaws {', '.join(found['snapshots'])}"
        case "capturing":
            return "cold: its snapshot is being made"
        case "gave-up":
            again = f"`woodfrog snapshot create {name}.{function['tag']}` tries again"
            return f"cold: its snapshots failed too often: {found['reason']}; {again}"
        case "failed":
            return f"cold, and makes a snapshot; the last attempt failed: {found['reason']}"
    return "cold, and makes a snapshot: it has none that fits yet"


@app.command()
def starts(
    name: Name,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=1000, help="So many, the newest.")] = 20,
    as_json: Json = False,
) -> None:
    """Show the latest starts of an app's containers: how each went, how long it took, and why it was cold."""
    found = get(connect(), f"/apps/{segment(name)}/starts", limit=limit)["starts"]
    if as_json:
        output.show_json(found)
        return
    rows = [
        (
            output.ago(s["at"]),
            s["function"],
            s["instance"],
            s["version"],
            _KINDS.get(s["kind"], s["kind"]) if s["result"] == "ready" else s["result"],
            output.span(s["ms"] / 1e3),
            s["error"] or s["words"] or s["snapshot"],
        )
        for s in found
    ]
    headers = ["when", "function", "container", "version", "start", "took", "why, or from which snapshot"]
    output.table(headers, rows, empty="no starts")


def _state(a: dict[str, Any]) -> str:
    state = "running (ephemeral)" if a["ephemeral"] else "deployed"
    waiting = a.get("waiting_for_memory")
    return f"{state}, {waiting} call{'s' if waiting > 1 else ''} short of memory" if waiting else state


@app.command()
def logs(
    name: Name,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for more.")] = False,
    lines: Lines = None,
    since: Annotated[str, typer.Option(help="Only what is younger: 30s, 10m, 2h, 1d, or a Unix time.")] = "",
    function: Annotated[str, typer.Option(help="Only this function's, or class's.")] = "",
    container: Annotated[
        str, typer.Option(help="Only this container's: the beginning of its id, also when it is gone.")
    ] = "",
    call: Annotated[str, typer.Option(help="Only what was printed in this call: the beginning of its id.")] = "",
    timestamps: Timestamps = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Print what an app's functions wrote, and what became of its containers."""
    begin = since_time(since, time.time())
    which = {"function": function, "container": container, "call": call}
    entries = connect().logs(name, follow=follow, since=begin, last=lines, which=which)
    shown = show_logs(entries, as_json=as_json, timestamps=timestamps)
    chosen = ", ".join(f"--{key} {value}" for key, value in which.items() if value)
    if chosen and not shown and lines != 0:
        output.note(f"the log of {name} has no line of {chosen}{' that is so young' if since else ''}")


@app.command()
def calls(
    name: Name,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=1000, help="So many, the newest.")] = 50,
    failed: Annotated[bool, typer.Option("--failed", help="Only those that came to nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Show an app's latest calls: an id that was lost, what still runs, what failed.

    `woodfrog app trace CALL` shows where the time of one went, `woodfrog.FunctionCall.from_id(CALL).get()` in Python
    gets its result.
    """
    only = {"failed": 1} if failed else {}
    found = get(connect(), f"/apps/{segment(name)}/calls", limit=limit, **only)["calls"]
    if as_json:
        output.show_json(found)
        return
    rows = [
        (
            c["id"],
            c["function"],
            f"{c['status']}: {c['waits_for']}" if c.get("waits_for") else c["status"],
            c["version"],
            output.ago(c["submitted"]),
            output.span((c["finished"] or time.time()) - c["submitted"]),
            short(call_error(c.get("error"))),
        )
        for c in found
    ]
    output.table(["call", "function", "status", "version", "submitted", "took", "error"], rows, empty="no calls")


def call_error(error: dict[str, Any] | None) -> str:
    """In one line: the user's by its type, one of ours by what it says."""
    if not error:
        return ""
    message = " ".join(str(error.get("message", "")).split())
    return message if "code" in error else f"{error.get('type')}: {message}"


@app.command()
def trace(
    call: Annotated[str, typer.Argument(metavar="CALL", help="Id of a call, from `woodfrog app calls APP`.")],
    as_json: Json = False,
) -> None:
    """Show what became of one call: its container, how that started, where the time went, and its error."""
    found = get(connect(), f"/calls/{segment(call)}/trace")
    if as_json:
        output.show_json(found)
        return
    error = found.get("error") or {}
    stage = f", {output.stage_words(found['stage'])}" if found.get("stage") else ""
    shown = {
        "call": found["call"],
        "function": f"{found['app']}.{found['function']}",
        "status": f"{found['status']}{stage}",
        "submitted": output.ago(found.get("submitted")),
        "container": found.get("instance"),
        "start": {"restore": "thawed", "parked": "woken"}.get(str(found.get("start")), found.get("start")),
        "error": call_error(error),
    }
    output.fields({name: value for name, value in shown.items() if value})
    for line in output.trace_lines(found.get("phases") or []):
        print(line)
    if error.get("traceback"):
        print()
        print("\n".join(output.harmless(line) for line in str(error["traceback"]).rstrip("\n").split("\n")))
    output.note(f"what it printed: woodfrog app logs {found['app']} --call {found['call']}")


@app.command()
def stop(name: Name, as_json: Json = False) -> None:
    """Stop an app: its calls are cancelled and its containers ended."""
    answer = post(connect(), f"/apps/{segment(name)}/stop")
    if as_json:
        output.show_json(answer)
    else:
        output.note(f"stopped {name}")


@app.command()
def rollback(
    name: Name,
    version: Annotated[
        str, typer.Argument(metavar="[VERSION]", help="As in `woodfrog app history`; else the one before the active.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Deploy an earlier version again, as a new version. The code of an app's newest three versions is kept."""
    number = version.removeprefix("v")
    if version and not number.isdecimal():
        raise SpecError(f"{version!r} is no version: give a number, see `woodfrog app history {name}`")
    answer = post(connect(), f"/apps/{segment(name)}/rollback", {"version": int(number) if number else None})
    if as_json:
        output.show_json(answer)
    else:
        output.note(f"deployed {name}, version {answer.get('version')}: version {answer.get('rollback')} again")


@app.command()
def history(name: Name, as_json: Json = False) -> None:
    """Show the versions an app was deployed in, the newest first."""
    versions = sorted(get(connect(), f"/apps/{segment(name)}/history")["versions"], key=lambda v: -v["version"])
    if as_json:
        output.show_json(versions)
        return
    rows = [
        (
            v["version"],
            "active" if v["active"] else "stopped" if v["stopped"] else "replaced",
            output.ago(v["deployed"]),
            f"version {v['rollback']} again" if v.get("rollback") else "",
            ", ".join(v["functions"]),
        )
        for v in versions
    ]
    output.table(["version", "state", "deployed", "is", "functions"], rows, empty="no versions")
