"""How the contents of a snapshot, and the difference of two, are shown."""

from __future__ import annotations

from typing import Any

from woodfrog.cli import output
from woodfrog.cli.store import share

__all__ = ["show", "show_difference"]

_BAR = 24


def _bar(part: int, whole: int) -> str:
    return "▇" * round(_BAR * part / whole) if whole else ""


def _short(path: str, width: int = 60) -> str:
    return path if len(path) <= width else "…" + path[1 - width :]


def _where(mapping: dict[str, Any]) -> tuple[str, str]:
    return f"{mapping['begin']}-{mapping['end']}", mapping["kind"]


def show(found: dict[str, Any], most: int) -> None:
    """Print what is in a snapshot: kinds of memory, libraries, files, mappings; the biggest first."""
    whole = int(found["resident_bytes"])
    compared = bool(found.get("compared"))
    processes = found.get("processes") or []
    print(f"\nmemory {output.size(whole)} in {len(processes)} process{'' if len(processes) == 1 else 'es'}: ", end="")
    parts = [f"{output.size(found['zero_bytes'])} zeroes"]
    if compared:
        parts.append(f"{output.size(found['shared_bytes'])} as in {found['parent']}")
    parts.append(f"stored in {output.size(found.get('stored_bytes'))} ({found.get('form')})")
    print(", ".join(parts))

    headers = ["size", "share", "zeroes", *(["as parent"] if compared else []), ""]

    def sizes(item: dict[str, Any]) -> tuple[str, ...]:
        size, shared = item["resident_bytes"], item["shared_bytes"]
        cells = (output.size(size), share(size, whole), output.size(item["zero_bytes"]))
        return (*cells, *((output.size(shared),) if compared else ()), _bar(size, whole))

    for name, items in (("kind", "kinds"), ("library", "libraries"), ("file", "files")):
        if found.get(items):
            print()
            output.table([name, *headers], [(_short(i[name]), *sizes(i)) for i in found[items][:most]])
    for process in processes:
        print(f"\nprocess {process['pid']} {process['comm']}: {process['mapped']} mappings")
        mappings = process.get("mappings") or []
        output.table(
            ["addresses", "kind", *headers, "file"],
            [(*_where(m), *sizes(m), _short(m["name"], 40)) for m in mappings[:most]],
        )
    written = [(f["file"], output.size(f["bytes"])) for f in (found.get("written") or [])[:most]]
    if written:
        print(f"\nfiles it wrote: {output.size(found.get('files_bytes'))}")
        output.table(["file", "size"], written)


def show_difference(found: dict[str, Any], most: int) -> None:
    """Print which pages differ, and where."""
    after = found["after"]
    if "container" in found:
        served = found.get("served")
        after = f"container {after}, after {served} call{'' if served == 1 else 's'}"
    changed, new = int(found["changed"]), int(found["new"])
    print(f"{found['before']} → {after}: {changed + new} pages differ, {output.size(found['bytes'])}")
    output.fields(
        {
            "changed": f"{changed} pages",
            "new": f"{new} pages",
            "gone": f"{found['gone']} pages",
            "same": f"{found['same']} pages",
        }
    )
    if min(new, int(found["gone"])) > int(found["same"]):
        output.note("little is at the same addresses: these did not go on from one another")

    def counts(item: dict[str, Any]) -> tuple[Any, ...]:
        return output.size(item["bytes"]), item["changed"], item["new"]

    headers = ["size", "changed", "new"]
    for name, items in (("kind", "kinds"), ("library", "libraries")):
        if found.get(items):
            print()
            output.table([name, *headers], [(i[name], *counts(i)) for i in found[items][:most]])
    mappings = found.get("mappings") or []
    if mappings:
        print()
        rows = [(m["pid"], *_where(m), *counts(m), _short(m["name"], 40)) for m in mappings[:most]]
        output.table(["pid", "addresses", "kind", *headers, "file"], rows)
    ranges = [(r["pid"], r["address"], r["pages"], r["kind"], _short(r["name"], 40)) for r in found.get("ranges") or []]
    if ranges:
        print("\nthe first of them")
        output.table(["pid", "address", "pages", "kind", "file"], ranges[:most])
