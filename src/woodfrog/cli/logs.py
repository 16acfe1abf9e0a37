"""Log lines of apps and containers, printed where they were written: stdout to stdout, stderr to stderr."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

from woodfrog.errors import SpecError

if TYPE_CHECKING:
    from woodfrog.sdk.client import Client

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


def show_logs(client: Client, path: str, *, follow: bool, since: str, as_json: bool) -> None:
    params: dict[str, Any] = {}
    begin = since_time(since, time.time())
    if begin is not None:
        params["since"] = begin
    if follow:
        params["follow"] = 1
    for entry in client.lines(path, params=params):
        if as_json:
            print(json.dumps(entry, ensure_ascii=False), flush=True)
        else:
            show_line(entry)


def show_line(entry: dict[str, Any]) -> None:
    stream = sys.stderr if entry.get("stream") == "stderr" else sys.stdout
    stream.write(line_text(entry))
    stream.flush()


def line_text(entry: dict[str, Any]) -> str:
    line = str(entry.get("line", ""))
    return line if line.endswith("\n") else line + "\n"
