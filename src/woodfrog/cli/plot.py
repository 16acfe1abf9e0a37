"""A picture of what is in a snapshot: an area for each part of its memory, in proportion."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from woodfrog.cli import output
from woodfrog.errors import SpecError

__all__ = ["check", "draw", "squarify", "tiles"]

FORMATS = (".png", ".svg", ".pdf")
COLOURS = {
    "python objects": "#3b6ea8",
    "heap": "#d98032",
    "large blocks": "#4d9a6a",
    "anonymous": "#8a6fb0",
    "library data": "#b8505a",
    "file pages": "#c9a83c",
    "shared memory": "#4aa3ad",
    "malloc arenas": "#a86f4d",
    "stacks": "#7d8590",
    "free heap": "#c3c8ce",
}
WORDS = {
    "python objects": "CPython's small objects",
    "heap": "malloc, small and middling",
    "large blocks": "malloc: arrays, tensors",
    "anonymous": "mapped by other allocators",
    "library data": "variables, relocations",
    "file pages": "written copies of a file's",
    "shared memory": "between processes",
    "malloc arenas": "malloc in threads",
    "free heap": "freed, not given back",
}
OTHER = "#9aa1a9"
SPLIT = {"large blocks", "anonymous", "shared memory"}
"""Kinds of which each mapping is a thing of its own."""
MOST_TILES = 14


def check(path: Path) -> None:
    """See that a picture can be drawn there, before minutes are spent on looking.

    Raises:
        SpecError: matplotlib is missing, or the name says no format that it knows.
    """
    if path.suffix.lower() not in FORMATS:
        raise SpecError(f"--plot {path}: its name must end with {', '.join(FORMATS)}", code="bad-plot")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise SpecError("--plot needs matplotlib: pip install 'woodfrog[plot]'", code="no-matplotlib") from None


@dataclass(frozen=True)
class Tile:
    """A part of a kind of memory: what it is called, and its bytes."""

    name: str
    size: int


@dataclass(frozen=True)
class Box:
    x: float
    y: float
    width: float
    height: float


def tiles(found: dict[str, Any]) -> list[tuple[str, list[Tile]]]:
    """What is drawn of each kind, the biggest first. What has no name of its own is one tile without a name."""
    out = []
    for row in found["kinds"]:
        kind, left = row["kind"], int(row["resident_bytes"])
        parts: list[Tile] = []
        if kind == "library data":
            parts = [Tile(r["library"], r["resident_bytes"]) for r in found["libraries"]]
        elif kind == "file pages":
            parts = [Tile(Path(r["file"]).name, r["resident_bytes"]) for r in found["files"] if ".so" not in r["file"]]
        elif kind in SPLIT:
            mappings = (m for process in found["processes"] for m in process["mappings"])
            parts = [Tile("", m["parts"][kind]) for m in mappings if m["parts"].get(kind)]
        parts = sorted(parts, key=lambda t: -t.size)[:MOST_TILES]
        shown = []
        for tile in parts:
            if 0 < tile.size <= left:
                shown.append(tile)
                left -= tile.size
        if left:
            shown.append(Tile("other" if any(t.name for t in shown) else "", left))
        out.append((kind, sorted(shown, key=lambda t: -t.size)))
    return out


def squarify(sizes: list[float], box: Box) -> Iterator[Box]:
    """Boxes of these areas (descending) that fill `box`, as square as they come.

    >>> [round(b.width * b.height, 3) for b in squarify([3.0, 1.0], Box(0, 0, 2, 2))]
    [3.0, 1.0]
    """
    total = sum(sizes)
    if not total:
        return
    areas = [size * box.width * box.height / total for size in sizes]
    x, y, width, height = box.x, box.y, box.width, box.height
    at = 0
    while at < len(areas):
        side = min(width, height)
        row = [areas[at]]
        while at + len(row) < len(areas) and _worst([*row, areas[at + len(row)]], side) <= _worst(row, side):
            row.append(areas[at + len(row)])
        thick = sum(row) / side if side else 0.0
        along = 0.0
        for area in row:
            length = area / thick if thick else 0.0
            yield Box(x, y + along, thick, length) if width >= height else Box(x + along, y, length, thick)
            along += length
        if width >= height:
            x, width = x + thick, width - thick
        else:
            y, height = y + thick, height - thick
        at += len(row)


def _worst(row: list[float], side: float) -> float:
    total = sum(row)
    return max(side * side * max(row) / (total * total), total * total / (side * side * min(row)))


def draw(found: dict[str, Any], path: Path, *, title: str) -> None:
    """Draw what `GET /v1/snapshots/{id}/contents` answers.

    Raises:
        SpecError: matplotlib is missing, or the file cannot be written.
    """
    check(path)
    from matplotlib.figure import Figure

    whole = int(found["resident_bytes"])
    figure = Figure(figsize=(11, 6.6), dpi=150, facecolor="white")
    figure.text(0.03, 0.945, title, fontsize=15, fontweight="bold", color="#22272e")
    subtitle = f"{found['id']}   {output.size(whole)} of memory, stored in {output.size(found.get('stored_bytes'))}"
    figure.text(0.03, 0.905, subtitle, fontsize=10, color="#57606a")
    _strip(figure, found, whole)
    axes = figure.add_axes((0.03, 0.04, 0.71, 0.74))
    width, height = 11 * 0.71, 6.6 * 0.74
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.axis("off")
    groups = tiles(found)
    for (kind, parts), box in zip(
        groups, squarify([float(sum(t.size for t in p)) for _, p in groups], Box(0, 0, width, height)), strict=True
    ):
        colour = COLOURS.get(kind, OTHER)
        boxes = list(squarify([float(t.size) for t in parts], box))
        for tile, inner in zip(parts, boxes, strict=True):
            _tile(axes, inner, tile, kind if inner is boxes[0] else "", colour)
        if len(parts) > 1:
            _outline(axes, box)
    _legend(figure, groups, whole)
    try:
        figure.savefig(path)
    except OSError as e:
        raise SpecError(f"cannot write {path}: {e.strerror}", code="no-file") from None


def _tile(axes: Any, box: Box, tile: Tile, kind: str, colour: str) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((box.x, box.y), box.width, box.height, facecolor=colour, edgecolor="white", linewidth=0.8))
    name = tile.name or kind
    size = output.size(tile.size)
    for lines, points in (([name, size], 10.0), ([name, size], 7.5), ([name or size], 7.5), ([name or size], 6.0)):
        text = [line for line in lines if line]
        # A character is about 0.6 of its height wide; a point is 1/72 inch.
        wide, high = max(len(line) for line in text) * points * 0.6 / 72, len(text) * points * 1.35 / 72
        if wide < box.width - 0.08 and high < box.height - 0.06:
            axes.text(
                box.x + box.width / 2,
                box.y + box.height / 2,
                "\n".join(text),
                ha="center",
                va="center",
                fontsize=points,
                color="#22272e" if colour in ("#c3c8ce", "#c9a83c") else "white",
                linespacing=1.3,
            )
            return


def _outline(axes: Any, box: Box) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((box.x, box.y), box.width, box.height, facecolor="none", edgecolor="white", linewidth=2.2))


def _strip(figure: Any, found: dict[str, Any], whole: int) -> None:
    """One bar: how much is as in the parent, zeroes, and its own."""
    zero = int(found["zero_bytes"])
    shared = min(int(found["shared_bytes"]), whole - zero) if found.get("compared") else 0
    parts = [
        (f"as in {found.get('parent')}", shared, "#8fb7de"),
        ("its own", whole - zero - shared, "#22405f"),
        ("zeroes", zero, "#d7dbe0"),
    ]
    axes = figure.add_axes((0.03, 0.835, 0.71, 0.035))
    axes.axis("off")
    axes.set_xlim(0, max(whole, 1))
    axes.set_ylim(0, 1)
    at = 0
    for _, size, colour in parts:
        axes.barh(0.5, size, left=at, height=1, color=colour, edgecolor="white", linewidth=0.8)
        at += size
    x = 0.03
    for name, size, colour in parts:
        if size:
            figure.text(x, 0.805, "■", fontsize=8, color=colour)
            text = f"{name} {output.size(size)}"
            figure.text(x + 0.013, 0.805, text, fontsize=8, color="#57606a")
            x += 0.03 + 0.0056 * len(text)


def _legend(figure: Any, groups: list[tuple[str, list[Tile]]], whole: int) -> None:
    y = 0.765
    for kind, parts in groups[:12]:
        size = sum(t.size for t in parts)
        figure.text(0.755, y, "■", fontsize=11, color=COLOURS.get(kind, OTHER), va="center")
        figure.text(0.776, y, kind, fontsize=9.5, color="#22272e", va="center")
        figure.text(0.776, y - 0.024, WORDS.get(kind, ""), fontsize=7, color="#8a929b", va="center")
        share = f"{100 * size / whole:.0f} %" if whole and size >= whole / 200 else "<1 %"
        figure.text(0.938, y, output.size(size), fontsize=9, color="#57606a", va="center", ha="right")
        figure.text(0.978, y, share, fontsize=9, color="#57606a", va="center", ha="right")
        y -= 0.062
