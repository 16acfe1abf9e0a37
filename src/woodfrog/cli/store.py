"""`woodfrog store …`: what snapshots take on this machine."""

from __future__ import annotations

from collections import defaultdict
from typing import Annotated, Any

import typer

from woodfrog.cli import output
from woodfrog.cli.remote import connect, get

app = typer.Typer(help="Look at the store that snapshots' memory is in.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback()
def _group() -> None:
    """Look at the store that snapshots' memory is in."""


@app.command()
def stats(as_json: Json = False) -> None:
    """Show what is stored: all together, and each snapshot below the one it went on from."""
    answer = get(connect(), "/store")
    if as_json:
        output.show_json(answer)
        return
    snapshots = answer.get("snapshots") or []
    loose = sum(s["raw_bytes"] for s in snapshots if s.get("form") == "loose")
    raw = sum(s["raw_bytes"] for s in snapshots)
    files = sum(s.get("fs_bytes") or 0 for s in snapshots)
    shared = int(answer.get("large_files_shared_bytes") or 0)
    taken = loose + max(0, files - shared) + int(answer.get("stored_bytes") or 0)
    output.fields(
        {
            "snapshots": len(snapshots),
            "their memory": output.size(raw),
            "not packed yet": output.size(loose),
            "page store": f"{output.size(answer.get('stored_bytes'))} for {output.size(answer.get('raw_bytes'))} of "
            f"pages, in {answer.get('packs')} packs",
            "rebuilt packs": f"{output.size(answer.get('cache_bytes'))}, for faster thaws"
            + (" (`woodfrog snapshot gc --rebuilt`)" if answer.get("cache_bytes") else ""),
            "files": output.size(files) + (f", {output.size(shared)} of them shared" if shared else ""),
            "on disk": output.size(taken + int(answer.get("cache_bytes") or 0))
            + (f" of {output.size(answer['budget_bytes'])}" if answer.get("budget_bytes") else ""),
            "tier": answer.get("tier") or "none",
        }
    )
    rows = [
        (
            "  " * depth + s["id"],
            "zygote" if s.get("kind") == "zygote" else f"{s.get('app')}.{s.get('function')}",
            s.get("form"),
            output.size(s["raw_bytes"]),
            output.size(s.get("stored_bytes")),
            share(s.get("stored_bytes"), s["raw_bytes"]),
            " ".join(mark for mark in ("pinned", "pushed") if s.get(mark)),
        )
        for depth, s in by_lineage(snapshots)
    ]
    if rows:
        print()
    output.table(["snapshot", "of", "form", "memory", "added", "share", "marks"], rows, empty="no snapshots")


def share(part: Any, whole: Any) -> str:
    """A part of a whole in percent."""
    if not isinstance(part, (int, float)) or not whole:
        return ""
    percent = 100 * part / whole
    return f"{percent:.1f} %" if percent < 9.95 else f"{percent:.0f} %"


def by_lineage(snapshots: list[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    """Each with its depth, below its parent where that is there."""
    known = {s["id"] for s in snapshots}
    children = defaultdict(list)
    for s in snapshots:
        parent = s.get("parent") if s.get("parent") in known and s.get("parent") != s["id"] else ""
        children[parent].append(s)
    out: list[tuple[int, dict[str, Any]]] = []

    def walk(parent: str, depth: int) -> None:
        for s in children[parent]:
            out.append((depth, s))
            walk(s["id"], depth + 1)

    walk("", 0)
    return out
