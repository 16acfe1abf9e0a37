"""What daemons keep in /dev/shm: a directory for each state directory, which outlives it."""

from __future__ import annotations

import logging
import os
import re
import stat
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from woodfrog.errors import StoreError
from woodfrog.store.files import remove_tree, write_atomic

__all__ = ["claim", "sweep"]

log = logging.getLogger("woodfrog")

_HOME = "home"
_NAME = re.compile(r"woodfrog-([0-9a-f]{8})")


def claim(directory: Path, home: Path) -> None:
    """Make a state directory's place in /dev/shm, and note whose it is. Without the note it is never removed."""
    with suppress(OSError):  # there is no note then
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    try:
        write_atomic(directory / _HOME, f"{home}\n".encode())
    except StoreError as e:
        log.warning("%s", e.message)


def sweep(root: Path = Path("/dev/shm")) -> list[Path]:
    """Remove the places of state directories that are gone; returns those.

    Everybody may make directories there: only what is ours, and says of which state directory it is, goes.
    """
    gone = []
    for path in root.iterdir():
        name = _NAME.fullmatch(path.name)
        try:
            info = path.lstat()
            if name is None or not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o022:
                continue
            home = (path / _HOME).read_text().removesuffix("\n")
            if sha256(home.encode()).hexdigest()[:8] != name[1] or os.path.lexists(home):
                continue
            remove_tree(path)
            gone.append(path)
        except (OSError, ValueError) as e:  # another daemon does the same, or it says nothing
            if not isinstance(e, FileNotFoundError):
                log.warning("%s is left: %s", path, e)
    return gone
