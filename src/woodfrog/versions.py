"""Which versions of Python and of packages pickles were made and read with: told when one cannot be read.

Stdlib only, and imported at a failure only.
"""

from __future__ import annotations

import importlib.util
import io
import os
import pickletools
import platform
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata

__all__ = ["difference", "here", "installed_at", "modules_of"]

PYTHON = "Python"
MISSING = "not installed"
_LOOKED_AT = 64 << 20
"""So much of a pickle is searched."""
_TEXTS = frozenset({"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE"})


def modules_of(data: bytes | bytearray | io.BytesIO) -> list[str]:
    """The top-level modules, but for Python's own, that a pickle takes something from; as far as it can be read."""
    body = io.BytesIO(data) if not isinstance(data, io.BytesIO) else data
    before = body.tell()
    body.seek(0)
    text = body.read(_LOOKED_AT)
    body.seek(before)
    found: dict[str, None] = {}
    memo: dict[int, object] = {}
    stack: list[object] = []
    """The latest values: texts, and None for others."""
    try:
        for opcode, argument, _ in pickletools.genops(text):
            name = opcode.name
            if name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
                memo[len(memo) if name == "MEMOIZE" else int(argument)] = stack[-1] if stack else None  # type: ignore[arg-type]
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                stack.append(memo.get(int(argument)))  # type: ignore[arg-type]
            elif name == "STACK_GLOBAL":
                module = stack[-2] if len(stack) > 1 else None
                if isinstance(module, str):
                    found[module] = None
                stack.append(None)
            elif name in ("GLOBAL", "INST"):
                found[str(argument).partition(" ")[0]] = None
                stack.append(None)
            else:
                stack.append(argument if name in _TEXTS else None)
            del stack[:-4]
    except Exception:  # cut off, or no pickle at all: what was found so far is true
        pass
    tops = dict.fromkeys(module.partition(".")[0] for module in found)
    return [top for top in tops if top not in sys.stdlib_module_names and top != "__main__"]


def here(modules: Iterable[str]) -> dict[str, str]:
    """Versions by name in this process: of Python, and of those modules that belong to packages or are not there."""
    found = {PYTHON: platform.python_version()}
    distributions = metadata.packages_distributions()
    for module in modules:
        loaded = getattr(sys.modules.get(module), "__version__", None)
        if isinstance(loaded, str):
            found[module] = loaded
        elif names := distributions.get(module):
            found[module] = metadata.version(names[0])
        elif module not in sys.modules and importlib.util.find_spec(module) is None:
            found[module] = MISSING
    return found


def installed_at(paths: Sequence[str], modules: Sequence[str], python: str) -> dict[str, str]:
    """The same of another environment of this machine, by its import path; of Python alone where that is not here."""
    found = {PYTHON: python}
    distributions = list(metadata.distributions(path=list(paths)))
    for module in modules if distributions else ():
        owners = [d for d in distributions if _normal(d.metadata["Name"] or "") == _normal(module)]
        owners = owners or [d for d in distributions if module in (d.read_text("top_level.txt") or "").split()]
        if owners:
            found[module] = owners[0].version
        elif not any(os.path.exists(os.path.join(p, module + end)) for p in paths for end in ("", ".py")):
            found[module] = MISSING
    return found


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def difference(one: Mapping[str, str], other: Mapping[str, str], names: tuple[str, str]) -> str:
    """What differs, in words, or "". Python's last number does not count."""

    def counts(name: str, version: str) -> str:
        return ".".join(version.split(".")[:2]) if name == PYTHON else version

    return ", ".join(
        f"{name} is {one[name]} {names[0]} and {other[name]} {names[1]}"
        for name in one
        if name in other and counts(name, one[name]) != counts(name, other[name])
    )
