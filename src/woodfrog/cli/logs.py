"""Log lines of apps and containers, printed where they were written: stdout to stdout, all else to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Any

from woodfrog.errors import SpecError

UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def since_time(text: str, now: float) -> float | None:
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
        raise SpecError(f"--since {text!r}: expected 30s, 10m, 2h, 1d, or a Unix time", code="bad-since") from None


def show_logs(entries: Iterable[dict[str, Any]], *, as_json: bool) -> None:
    for entry in entries:
        if as_json:
            print(json.dumps(entry, ensure_ascii=False), flush=True)
        else:
            stream = sys.stdout if entry.get("stream") == "stdout" else sys.stderr
            stream.write(line_text(entry))
            stream.flush()


def line_text(entry: dict[str, Any]) -> str:
    """A line as it is printed; the system's own are marked and name the container."""
    line = str(entry.get("line", "")).rstrip("\n")
    if entry.get("stream") == "system":
        who = " ".join(str(entry[k]) for k in ("function", "instance") if entry.get(k))
        line = f"· {who}: {line}" if who else f"· {line}"
    return line + "\n"
