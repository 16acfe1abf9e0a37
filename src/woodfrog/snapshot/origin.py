"""What a snapshot was made of, kept beside its manifest: so that a start that it does not fit can say why."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from woodfrog.spec import CODE, FunctionSpec, RuntimeSpec, digest_of, key_parts

__all__ = ["MOST_BYTES", "ORIGIN", "Origin", "explain", "origin_of", "read", "write"]

ORIGIN = "origin"
"""Beside the manifest, not under its signature: it only ever becomes words."""
MOST_BYTES = 4 << 20
_NAMED = 3
"""So many files are named."""
_DIGITS = 16
_DIRECTORY = "dir"

_WORDS = {
    "kind": "its definition",
    "source.kind": "its definition",
    "source.module": "its module's name",
    "source.qualname": "its name",
    "source.blob_digest": "its pickled code",
    "methods": "its methods",
    "snapshot": "its snapshot options",
    "gpu": "gpu=",
    "block_network": "block_network=",
    "env": "env=",
    "secrets": "secrets=",
    "volumes": "volumes=",
    "image": "its image",
    "params": "its parameters",
    "runtime.version": "the Python version",
    "runtime.sys_path": "the import path",
    "runtime.packages_digest": "the installed packages",
}
_OTHER_PYTHON = "the Python environment"


@dataclass(frozen=True)
class Origin:
    parts: dict[str, str]
    """Digests of what the function key is made of, by name."""
    files: dict[str, str] | None = None
    """Digest of each file that the client sent, by its path in the container; None = not known."""


def origin_of(spec: FunctionSpec, runtime: RuntimeSpec, params_digest: str, code: Path | None) -> Origin:
    """Reads all that the client sent with the function: up to 256 MiB, mostly from the page cache.

    Args:
        code: where the code is, in the layer that the client's files are in.
    """
    parts: dict[str, str] = {}
    for name, value in key_parts(spec, runtime, params_digest).items():
        fields = {f"{name}.{k}": v for k, v in vars(value).items()} if name in ("source", "runtime") else {name: value}
        parts |= {k: digest_of(v)[:_DIGITS] for k, v in fields.items()}
    return Origin(parts, _files(code.parent) if code is not None else {})


def _files(layer: Path) -> dict[str, str] | None:
    found: dict[str, str] = {}
    try:
        for folder, below, names in os.walk(layer, onerror=_raise):
            for name in (*below, *names):
                path = os.path.join(folder, name)
                found["/" + os.path.relpath(path, layer)] = _digest(path)
    except OSError:  # it was removed meanwhile
        return None
    return found


def _raise(error: OSError) -> None:
    raise error


def _digest(path: str) -> str:
    if os.path.islink(path):
        return f"-> {os.readlink(path)}"
    if os.path.isdir(path):
        return _DIRECTORY
    executable = "x" if os.stat(path).st_mode & 0o100 else ""
    return blake3().update_mmap(path).hexdigest()[:_DIGITS] + executable


def write(origin: Origin, folder: Path) -> None:
    """Keep it with a snapshot that is not committed yet; where that cannot be, nothing is said later."""
    data = json.dumps(vars(origin), separators=(",", ":")).encode()
    if len(data) > MOST_BYTES:
        data = json.dumps({"parts": origin.parts, "files": None}).encode()
    with suppress(OSError):
        (folder / ORIGIN).write_bytes(data)


def read(folder: Path) -> Origin | None:
    """What is kept in a snapshot's directory; None = nothing that can be read. It may have come from elsewhere."""
    try:
        found = Origin(**json.loads((folder / ORIGIN).read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return found if _texts(found.parts) and (found.files is None or _texts(found.files)) else None


def _texts(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())


def explain(before: Origin, now: Origin) -> str:
    """What differs, in words; empty when nothing does.

    >>> explain(Origin({"env": "a"}, {"/app/log": "1"}), Origin({"env": "b"}, {"/app/log": "2"}))
    'log changed, env= changed since its last snapshot'
    """
    parts = [name for name in now.parts if now.parts[name] != before.parts.get(name)]
    words = dict.fromkeys(_WORDS.get(n, _OTHER_PYTHON) for n in parts if n != "source.code_digest")
    if _OTHER_PYTHON in words:  # all else that is the environment's comes with it
        words = {w: None for w in words if w not in [_WORDS[n] for n in _WORDS if n.startswith("runtime.")]}
    said = [f"{word} changed" for word in words]
    advice = ""
    if before.files is None or now.files is None:
        said[:0] = ["its files changed"] if "source.code_digest" in parts else []
    elif files := _changed(before.files, now.files):
        said[:0] = _named(files)
        advice = "" if words else _advice(list(files))
    return f"{', '.join(said)} since its last snapshot{advice}" if said else ""


def _changed(before: dict[str, str], now: dict[str, str]) -> dict[str, str]:
    """What became of each file that differs. A directory is named only when no file in it is."""
    found = {path: "is gone" for path in before.keys() - now.keys()}
    found |= {path: "is new" for path in now.keys() - before.keys()}
    found |= {path: "changed" for path in now.keys() & before.keys() if now[path] != before[path]}
    above = {str(folder) for path in found for folder in Path(path).parents}
    return {path: found[path] for path in sorted(found) if path not in above or _DIRECTORY not in (before | now)[path]}


def _named(files: dict[str, str]) -> list[str]:
    named = [f"{_shown(path)} {what}" for path, what in list(files.items())[:_NAMED]]
    rest = len(files) - len(named)
    return [*named, f"{rest} more file{'s' * (rest > 1)} changed"] if rest else named


def _shown(path: str) -> str:
    name = path.removeprefix(f"/{CODE}/")
    return name if name.isprintable() and len(name) <= 120 else repr(name[:120])


def _advice(paths: list[str]) -> str:
    """How to leave out what is not code."""
    if any(p.endswith(".py") or not p.startswith(f"/{CODE}/") for p in paths):
        return ""
    it = "it" if len(paths) == 1 else "them"
    return f" (name {it} in .woodfrogignore if the function does not need {it})"
