"""Follows a program's imports, to send modules with it that lie elsewhere: beside its package, on PYTHONPATH, in an
editable install.

They are read from the source, those inside of functions too, and never by running it: what this process has imported
may be a test runner's business, and of what the program needs it has imported a part only.
"""

from __future__ import annotations

import ast
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from woodfrog.errors import SpecError
from woodfrog.sdk import checks
from woodfrog.sdk.source import IGNORE_FILE, Root, ignore_rules, installed, link_target, places, scan

__all__ = ["followed_roots"]

_MOST_MODULES = 5000
_OWN = Path(__file__).resolve().parent.parent
_IMPORT = re.compile(
    r"(?:^|[:;])[ \t]*(?:from[ \t]+(\.*)([\w.]*)[ \t]+import[ \t]*(\([^)]*\)|[^\n;#]*)|import[ \t]+([^\n;#]+))", re.M
)
"""A fraction of the time that parsing takes. What it takes for an import in a text or comment is sorted out later."""
_COMMENT = re.compile(r"#[^\n]*")
_NAME = re.compile(r"[\w.]+")


def followed_roots(
    modules: Iterable[tuple[str, Path]], shipped: Iterable[Root], visible: Sequence[str] = ()
) -> list[Root]:
    """Where else the code of these modules imports from, beside the Python environment.

    Args:
        modules: names and files.
        shipped: what is sent in any case.
        visible: directories of this machine that a container has on its import path.

    Raises:
        SpecError: the program has imported what cannot be sent, and a container would not see it otherwise.
    """
    inside = [r.directory / r.only if r.only is not None else r.directory for r in shipped]
    found: dict[Root, None] = {}
    here: dict[str, list[Path]] = {}
    seen: set[Path] = set()
    done: set[str] = set()
    todo = list(modules)
    while todo and len(seen) < _MOST_MODULES:
        name, path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        text = _text(path)
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for imported in _imports(text, package):
            if imported in done:
                continue
            top = imported.partition(".")[0]
            if top not in here:
                here[top] = _local(top)
            new = [p for p in here[top] if not any(p.is_relative_to(i) for i in inside)]
            if new and top not in _tops(text):  # it stands in a comment or text
                continue
            done.add(imported)
            for place in list(here[top]):
                if place in new:
                    root = Root(place.parent, place.name)
                    if not _can_go(root, path, visible):
                        here[top].remove(place)
                        continue
                    found[root] = None
                    inside.append(place)
                todo += _files(place, imported)
    return sorted(found)


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError:
        return ""


def _imports(text: str, package: str) -> Iterator[str]:
    """Dotted names, in full."""
    for dots, module, names, plain in _IMPORT.findall(text):
        if plain:
            for part in plain.split(","):
                if match := _NAME.match(part.strip()):
                    yield match[0]
            continue
        if dots:
            above = package.split(".")[: -(len(dots) - 1) or None] if package else []
            module = ".".join([*above, *([module] if module else [])])
        if module:
            yield module
            for part in _COMMENT.sub("", names).strip("() ").split(","):
                if match := _NAME.match(part.strip()):
                    yield f"{module}.{match[0]}"


@lru_cache(maxsize=64)
def _tops(text: str) -> frozenset[str]:
    """The top-level modules that it does import."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return frozenset()
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(a.name.partition(".")[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add("" if node.level else (node.module or "").partition(".")[0])
    return frozenset(found)


def _local(top: str) -> list[Path]:
    """The files or directories of a top-level module that is not the Python environment's."""
    if top in sys.stdlib_module_names or top == "__main__":
        return []
    try:
        found = [Path(p) for p in places(top, working_directory=False) or ()]
    except Exception:  # of an import hook
        return []
    found = [p.parent if p.name == "__init__.py" else p for p in found]
    found = [Path(os.path.realpath(p.parent), p.name) for p in found]
    return [p for p in found if p.exists() and not installed(p) and not _OWN.is_relative_to(p)]


def _files(place: Path, name: str) -> Iterator[tuple[str, Path]]:
    """The modules that importing `name` loads, of which the first is at `place`."""
    if place.suffix == ".py":
        yield name.partition(".")[0], place
        return
    done: list[str] = []
    for part in name.split("."):
        folder = place.joinpath(*done[1:], part) if done else place
        done.append(part)
        for path in (folder / "__init__.py", folder.with_name(f"{part}.py") if len(done) > 1 else folder):
            if path.suffix == ".py" and path.is_file():
                yield ".".join(done), path


def _can_go(root: Root, importer: Path, visible: Sequence[str]) -> bool:
    """Whether it is to be sent and can be."""
    assert root.only is not None
    path = root.directory / root.only
    if ignore_rules(root.directory / IGNORE_FILE)(root.only, path.is_dir()):
        return False
    try:
        for relative, kind in scan(root).items():
            if kind == "link":
                link_target(root.directory, root.directory / relative)
        return True
    except SpecError as e:
        there = str(root.directory) in map(os.path.realpath, visible)
        if not there and path.stem in sys.modules:
            raise
        what = "a change of it makes no new snapshot" if there else "a container has none"
        text = f"{path}, imported by {checks.short(str(importer))}, is not sent with the code: {what} ({e.message})"
        checks.note(f"stays:{path}", text)
        return False
