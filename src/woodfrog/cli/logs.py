"""Log lines of apps and containers, printed where they were written: stdout to stdout, all else to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from datetime import datetime
from typing import Annotated, Any

import typer

from woodfrog.errors import SpecError

Timestamps = Annotated[
    bool, typer.Option("--timestamps", "-t", help="Begin each line with its time, function and container.")
]
Lines = Annotated[int | None, typer.Option("--lines", "-n", min=0, help="The last N of those that there are now.")]
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def since_time(text: str, now: float, *, option: str = "--since") -> float | None:
    """`10m` → the Unix time ten minutes ago; a bare number is a Unix time; empty → None.

    Raises:
        SpecError: neither.
    """
    if not text:
        return None
    try:
        if text[-1] in UNITS:
            return now - float(text[:-1]) * UNITS[text[-1]]
        return float(text)
    except ValueError:
        raise SpecError(f"{option} {text!r}: expected 30s, 10m, 2h, 1d, or a Unix time", code="bad-since") from None


def show_logs(entries: Iterable[dict[str, Any]], *, as_json: bool, timestamps: bool = False) -> int:
    """Print them; how many there were."""
    count = 0
    for entry in entries:
        count += 1
        if as_json:
            print(json.dumps(entry, ensure_ascii=False), flush=True)
        else:
            stream = sys.stdout if entry.get("stream") == "stdout" else sys.stderr
            stream.write(line_text(entry, timestamps=timestamps))
            stream.flush()
    return count


def line_text(entry: dict[str, Any], *, timestamps: bool = False) -> str:
    """A line as it is printed; the system's own are marked and name the container.

    Args:
        timestamps: before each line its time here, function and container.
    """
    line = str(entry.get("line", "")).rstrip("\n")
    who = " ".join(str(entry[k]) for k in ("function", "instance") if entry.get(k))
    who = f"{who}: " if who else ""
    system = entry.get("stream") == "system"
    if timestamps:
        when = datetime.fromtimestamp(entry.get("t", 0.0)).isoformat(" ", "milliseconds")
        line = f"{when} {who}{'· ' if system else ''}{line}"
    elif system:
        line = f"· {who}{line}"
    return line + "\n"
