"""The package's own compiled programs: where they are, and why one does not start."""

from __future__ import annotations

from pathlib import Path

__all__ = ["cannot_start", "native_path"]

_PACKAGE = Path(__file__).parents[1]


def native_path(name: str) -> Path:
    """Where the package keeps a program that it was built with."""
    return _PACKAGE / "native" / "bin" / name


def cannot_start(path: Path, error: OSError) -> str:
    """What to say of one that does not start."""
    if _PACKAGE.exists():
        return f"cannot start {path}: {error.strerror}; build it with `make native`"
    return f"cannot start {path}: woodfrog was removed from there; the next `woodfrog` command replaces this daemon"
