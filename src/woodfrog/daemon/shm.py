"""What daemons keep in /dev/shm: a directory for each state directory, which outlives it."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import stat
import uuid
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from woodfrog.errors import HostError, StoreError
from woodfrog.store.files import remove_tree, write_atomic

__all__ = ["claim", "sweep"]

log = logging.getLogger("woodfrog")

_HOME = "home"
_NAME = re.compile(r"woodfrog-([0-9a-f]{8})")


def claim(directory: Path, home: Path) -> int:
    """Make a state directory's place in /dev/shm, and note whose it is. Without the note it is never removed.

    The descriptor that this returns keeps it for as long as it is open, also where the state directory cannot be seen:
    a container, which has files of its own, may share /dev/shm. -1: there is nothing to keep.

    Everybody can tell its name and may have made it first: what CRIU, as root, reads there must be ours alone.

    Raises:
        HostError: somebody else has it, and it cannot be moved out of the way.
    """
    with suppress(OSError):  # there is no note then
        if os.path.lexists(directory) and not _ours(directory):
            aside = directory.with_name(f"{directory.name}.{uuid.uuid4().hex}")
            os.rename(directory, aside)
            log.warning("%s: somebody else had made it; it is %s now", directory, aside)
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    if os.path.isdir(directory) and not _ours(directory):
        raise HostError(f"{directory}: others may write there; remove it", code="state-dir")
    try:
        write_atomic(directory / _HOME, f"{home}\n".encode())
    except StoreError as e:
        log.warning("%s", e.message)
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(fd, fcntl.LOCK_SH)
        return fd
    except OSError:
        return -1


def _in_use(path: Path) -> bool:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(fd)


def _ours(path: Path) -> bool:
    info = path.lstat()
    return stat.S_ISDIR(info.st_mode) and info.st_uid == os.geteuid() and not info.st_mode & 0o022


def sweep(root: Path = Path("/dev/shm")) -> list[Path]:
    """Remove the places of state directories that are gone; returns those.

    Everybody may make directories there: only what is ours, and says of which state directory it is, goes.
    """
    gone = []
    for path in root.iterdir():
        name = _NAME.fullmatch(path.name)
        try:
            if name is None or not _ours(path):
                continue
            home = (path / _HOME).read_text().removesuffix("\n")
            if sha256(home.encode()).hexdigest()[:8] != name[1] or os.path.lexists(home) or _in_use(path):
                continue
            remove_tree(path)
            gone.append(path)
        except (OSError, ValueError) as e:  # another daemon does the same, or it says nothing
            if not isinstance(e, FileNotFoundError):
                log.warning("%s is left: %s", path, e)
    return gone
