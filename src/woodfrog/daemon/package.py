"""The daemon's own code on the disk: whether it is still there, and still what runs."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["Package"]


class Package:
    """woodfrog's directory, as it was when the daemon began."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._began_with = _stamps(path)

    @property
    def intact(self) -> bool:
        """Whether it is there at all."""
        return self.path.exists()

    def current(self) -> bool:
        """Whether no file of it was changed, added or removed since: half a millisecond."""
        return _stamps(self.path) == self._began_with


def _stamps(path: Path) -> frozenset[tuple[str, int, int]]:
    """What an installation changes in each file; without what Python or an editor leaves beside them."""
    found = set()
    folders = [str(path)]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.name == "__pycache__" or entry.name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    else:
                        info = entry.stat()
                        found.add((entry.path, info.st_size, info.st_mtime_ns))
        except OSError:  # it is being replaced just now
            continue
    return frozenset(found)
