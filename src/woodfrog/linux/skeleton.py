"""The host as `rootplan` needs to see it, and the lowest layer of every sandbox's root on disk."""

from __future__ import annotations

import os
import shutil
from hashlib import sha256
from pathlib import Path

from woodfrog.errors import SandboxError
from woodfrog.linux.rootplan import (
    MASKED,
    NS_LAST_PID,
    OWN,
    PROC_MASKS,
    PROC_READ_ONLY,
    HostEntry,
    HostRoot,
    skeleton_entries,
)

__all__ = ["host_above", "is_the_systems", "make_skeleton", "private_skeletons", "read_host_root"]


def read_host_root(root: Path = Path("/")) -> HostRoot:
    """Look at the host once; a daemon keeps the answer."""
    entries = []
    with os.scandir(root) as listing:
        for entry in sorted(listing, key=lambda e: e.name):
            if entry.is_symlink():
                entries.append(HostEntry(entry.name, "symlink", os.readlink(entry.path)))
            elif entry.is_dir():
                entries.append(HostEntry(entry.name, "directory"))
    return HostRoot(
        entries=tuple(entries),
        masks=tuple((p, os.path.isdir(p)) for p in PROC_MASKS if os.path.lexists(p)),
        read_only=tuple(p for p in PROC_READ_ONLY if os.path.lexists(p)),
        ns_last_pid=os.path.exists(NS_LAST_PID),
        var_tmp=(root / "var/tmp").is_dir() and not (root / "var").is_symlink(),
        passwd=(root / "etc/passwd").read_text(errors="replace"),
        group=(root / "etc/group").read_text(errors="replace"),
    )


def host_above(target: str) -> str:
    """The host's directory that a mount point inside has to be added to: the nearest one above that exists.

    "" where none has to be: the sandbox has a directory of its own there, or the host has the very directory.

    Raises:
        SandboxError: a symlink of the host's is on the way.
    """
    path = Path(target)
    if len(path.parts) < 2 or path.parts[1] in OWN | MASKED:
        return ""
    nearest = ""
    for part in (*reversed(path.parents[:-1]), path):
        if part.is_symlink():
            raise SandboxError(
                f"{target} is below {part}, which is a symlink on this machine: choose another path",
                code="bad-mount-path",
            )
        if not part.is_dir():
            return nearest
        nearest = str(part)
    return ""


def is_the_systems(path: str) -> bool:
    """Whether what a sandbox's own layers hold at a path is hidden by the host's files, or by a file system's."""
    top = Path(path).parts[1]
    return top in OWN - {"tmp"} or (top not in MASKED | {"tmp"} and os.path.lexists(f"/{top}"))


def private_skeletons(home: Path) -> Path:
    """Where skeletons are: root's alone, since anybody may write to the `/tmp` in them, and each sandbox sees that.

    What earlier versions left open to others is removed; no sandbox may be up.
    """
    path = home / "skeletons"
    if path.exists() and path.stat().st_mode & 0o077:
        shutil.rmtree(path)
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def make_skeleton(parent: Path, host: HostRoot, prefixes: tuple[Path, ...], worker_uid: int) -> Path:
    """Make the lowest layer below `parent` unless it is there, and return its path.

    Its name is the digest of its content: a layer that sandboxes have mounted must not change.
    """
    entries = skeleton_entries(host, prefixes, worker_uid)
    path = parent / sha256(repr(entries).encode()).hexdigest()[:16]
    if path.is_dir():
        return path
    staging = parent / f".{path.name}.{os.getpid()}"
    staging.mkdir(parents=True)
    try:
        for entry in entries:
            at = f"{staging}{entry.path}"
            if entry.link:
                os.symlink(entry.link, at)
                continue
            if entry.file:
                os.close(os.open(at, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC))
            elif entry.path != "/":
                os.mkdir(at)
            os.chown(at, entry.uid, entry.gid)
            os.chmod(at, entry.mode)
        os.rename(staging, path)
    except OSError:
        shutil.rmtree(staging, ignore_errors=True)
        if not path.is_dir():
            raise
    return path
