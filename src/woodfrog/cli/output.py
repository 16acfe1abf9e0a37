"""How the command line speaks: errors, tables, JSON, phases, progress. Results go to stdout, all else to stderr."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from woodfrog.errors import DaemonError, HostError, WoodfrogError

if TYPE_CHECKING:
    from rich.live import Live

USER_ERROR = 1
"""The user's function raised."""
OUR_ERROR = 2
"""The request was wrong, or woodfrog could not carry it out."""
DAEMON_ERROR = 3
"""No daemon to talk to."""
HOST_ERROR = 4
"""The machine lacks something."""
INTERRUPTED = 130
CLOSED = 141
"""Nobody reads the output any more: what a shell says of a program that SIGPIPE ended."""


def exit_code(error: WoodfrogError) -> int:
    """The process's exit status for one of our errors."""
    if isinstance(error, DaemonError):
        return DAEMON_ERROR
    if isinstance(error, HostError):
        return HOST_ERROR
    return OUR_ERROR


def debugging() -> bool:
    return os.environ.get("WOODFROG_DEBUG", "") not in ("", "0")


def note(text: str) -> None:
    """One line for the person, not part of the result."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def show_error(error: WoodfrogError) -> None:
    """`error: …` on stderr in one line, with the remedy where the message lacks it; an attached log below it."""
    message, _, rest = str(error).strip().partition("\n")
    remedy = " ".join(str(error.fields.get("remedy") or "").split())
    note(harmless(f"error: {message}" + (f"; {remedy}" if remedy and remedy not in message else "")))
    for line in rest.splitlines():
        note(harmless(f"    {line}"))


def harmless(text: str) -> str:
    """What comes from containers may hold what moves a terminal's cursor, or worse: it is shown as it is written."""
    if text.isprintable():
        return text
    shown = (c if c.isprintable() or c == "\t" else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
    return "".join(shown)


def show_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def text(value: Any) -> str:
    """A cell: nothing for None, no exponent or long fraction for numbers."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.1f}"
    return harmless(str(value))


def size(count: Any) -> str:
    """Bytes for people."""
    if not isinstance(count, (int, float)):
        return ""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return ""


def ago(when: Any) -> str:
    """A Unix time as an age."""
    if not isinstance(when, (int, float)) or when <= 0:
        return ""
    seconds = max(0.0, time.time() - when)
    for limit, unit, length in ((120, "s", 1), (7200, "min", 60), (172800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds / 86400:.0f} d ago"


def span(seconds: float) -> str:
    """A duration for people."""
    if seconds < 1:
        return f"{max(0.0, seconds) * 1000:.0f} ms"
    for limit, unit, length in ((120, "s", 1), (7200, "min", 60)):
        if seconds < limit:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds / 3600:.1f} h"


def table(headers: Sequence[str], rows: Iterable[Sequence[Any]], *, empty: str = "none") -> None:
    """Aligned columns; on a terminal they are fitted to its width."""
    cells = [[text(cell) for cell in row] for row in rows]
    if not cells:
        note(empty)
        return
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        grid = Table(*headers, box=None, header_style="bold", pad_edge=False)
        for row in cells:
            grid.add_row(*(Text(cell) for cell in row))
        Console().print(grid)
        return
    widths = [max(len(str(column[i])) for column in (headers, *cells)) for i in range(len(headers))]
    for row in ([h.upper() for h in headers], *cells):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def fields(values: Mapping[str, Any]) -> None:
    """Names and values, one a line; what is nested becomes compact JSON."""
    width = max((len(name) for name in values), default=0)
    for name, value in values.items():
        shown = json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else text(value)
        print(f"{name:<{width}}  {shown}".rstrip())


# --- phases ----------------------------------------------------------------------------------------------------------


@dataclass
class _Node:
    name: str
    start: float
    ms: float
    children: list[_Node] = field(default_factory=list)


def phase_tree(phases: Iterable[Mapping[str, Any]]) -> list[_Node]:
    """Phases nested by the name of their parent: the last of that name that began before them."""
    items = [
        (_Node(str(p["name"]), float(p.get("start_ms") or 0.0), float(p.get("ms") or 0.0)), p.get("parent"))
        for p in phases
    ]
    roots: list[_Node] = []
    for index, (node, parent) in enumerate(items):
        same = [(i, n) for i, (n, _) in enumerate(items) if n.name == parent and i != index and n is not node]
        # A later entry of the same start could be its own descendant: only what is listed earlier may hold it then.
        before = [n for i, n in same if n.start < node.start or (n.start == node.start and i < index)]
        chosen = before[-1] if before else None
        (chosen.children if chosen else roots).append(node)
    return roots


def trace_lines(phases: Iterable[Mapping[str, Any]], *, width: int = 30, full: str = "█") -> list[str]:
    """The phases as an indented table: name, milliseconds, and a bar at its place in the whole.

    What took no time within another phase is left out.
    """
    roots = phase_tree(phases)
    rows: list[tuple[str, _Node]] = []

    def walk(nodes: list[_Node], depth: int) -> None:
        for node in sorted(nodes, key=lambda n: n.start):
            if depth and node.ms < 0.05 and not node.children:
                continue
            rows.append(("  " * depth + node.name, node))
            walk(node.children, depth + 1)

    walk(roots, 0)
    if not rows:
        return []
    begin = min(node.start for _, node in rows)
    total = max(max(node.start + node.ms for _, node in rows) - begin, 1e-9)
    name_width = max(len(name) for name, _ in rows)
    lines = []
    for name, node in rows:
        left = min(int((node.start - begin) / total * width), width - 1)
        length = min(max(round(node.ms / total * width), 1), width - left)
        lines.append(f"{name:<{name_width}}  {node.ms:>10.1f} ms  {' ' * left}{full * length}")
    return lines


def show_trace(phases: Iterable[Mapping[str, Any]]) -> None:
    """Print the phases on stderr, so that the result alone is on stdout."""
    encoding = (sys.stderr.encoding or "ascii").lower()
    for line in trace_lines(phases, full="█" if "utf" in encoding else "#"):
        note(line)


STAGES = {
    "queued": "waiting for a container",
    "starting": "cold start",
    "importing": "cold start: importing",
    "entering": "cold start: enter()",
    "capturing": "capturing a snapshot",
    "restoring": "restoring a snapshot",
    "ready": "running",
}


def stage_words(stage: str | None) -> str:
    """What a call or a container is at, in words."""
    return STAGES.get(stage or "ready", stage or "")


def whole_lines() -> None:
    """Let what the program prints leave by whole lines, as what its containers print does: neither cuts the other.

    Python writes the pieces of one `print` apart where output is unbuffered, and cuts at 8 KiB where it is a pipe.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and not sys.stdout.isatty():
        sys.stdout.reconfigure(line_buffering=True, write_through=False)


# --- progress --------------------------------------------------------------------------------------------------------


class Progress:
    """What is going on just now: a spinner on a terminal, else one plain line each time it changes.

    May be used from several threads. Output of other kinds goes through `write`, which clears the spinner first.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._terminal = sys.stderr.isatty()
        self._lock = threading.RLock()
        self._live: Live | None = None
        self._said = ""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.clear()

    def say(self, what: str) -> None:
        with self._lock:
            if self._quiet or (what == self._said and (self._live is not None or not self._terminal)):
                return
            self._said = what
            if not self._terminal:
                note(what)
            else:
                from rich.console import Console
                from rich.live import Live
                from rich.spinner import Spinner
                from rich.text import Text

                spinner = Spinner("dots", Text(what))
                if self._live is None:
                    # What the program prints meanwhile goes around the spinner, unless it goes elsewhere anyway.
                    self._live = Live(
                        console=Console(stderr=True),
                        transient=True,
                        refresh_per_second=10,
                        redirect_stdout=sys.stdout.isatty(),
                    )
                    self._live.start()
                self._live.update(spinner, refresh=True)

    def clear(self) -> None:
        with self._lock:
            if self._live is not None:
                self._live.stop()
                self._live = None
            self._said = "" if self._terminal else self._said

    def write(self, line: str, *, error: bool = False) -> None:
        with self._lock:
            self.clear()
            stream = sys.stderr if error else sys.stdout
            _write_whole(stream, line)


def _write_whole(stream: TextIO, line: str) -> None:
    """Write a line in one piece, past the buffer in which a line of the program's may be half there."""
    try:
        if not stream.isatty():
            os.write(stream.fileno(), line.encode(errors="replace"))
            return
    except (OSError, ValueError):
        pass  # not a real file: a test's, or a notebook's
    stream.write(line)
    stream.flush()
