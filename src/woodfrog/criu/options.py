"""Command lines of criu, as pure functions.

Why these options (measured, and tried on trees of every kind):

- `--unprivileged` with XDG_RUNTIME_DIR: only so is the cache of kernel features looked for in a directory of our
  choice; without the cache every start probes the kernel for 25 ms. It also leaves out the time namespace and the
  control groups, which are the sandbox's business. Capabilities in effect are used all the same.
- `--file-validation filesize`: build-ids of 260 libraries cost 3.5 ms; size and time of each are checked before, by us.
- dump `-v4`, restore `-v1`: a full log is worth having where nobody waits for it; at a restore it costs 5 ms for 1,100
  maps, and errors alone name the cause.
- `--manage-cgroups=ignore`, `--network-lock skip`: both belong to the sandbox, which only this tree lives in.
- `--link-remap`, `--ghost-limit`, `--file-locks`: files deleted but open, semaphores, and locks are captured.
- `--no-default-config`: the host's /etc/criu is visible in the sandbox and must not change what we do.
- `--libdir`: so is /usr/lib/criu. The plugin for CUDA that distributions put there brings device memory back by itself
  where it finds `cuda-checkpoint`, and what we do after it would fail.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["Dump", "Restore", "Tcp", "check_command", "dump_command", "environment", "restore_command"]

Tcp = Literal["none", "established", "close"]
"""What becomes of connected TCP sockets: there are none; they are kept (those to the outside are made closed ones in
the images, `criu/sockets.py`); all come back closed."""

COMMON = (
    "--unprivileged",
    "--no-default-config",
    "--file-locks",
    "--link-remap",
    "--manage-cgroups=ignore",
    "--network-lock", "skip",
    "--file-validation", "filesize",
)  # fmt: skip
NO_PLUGINS = "/sys/fs"
"""A directory that every sandbox has, and without files: CRIU wants one that exists."""
TCP: dict[Tcp, tuple[str, ...]] = {
    "none": (),
    "established": ("--tcp-established",),
    "close": ("--tcp-close",),
}


@dataclass(frozen=True)
class Dump:
    """One dump. Paths are the sandbox's own.

    Args:
        pid: root of the tree.
        tcp: what to do with connected TCP sockets.
        irmap_paths: directories searched for the paths of inotify watches; empty when there are none.
        freeze_seconds: how long stopping all tasks may take.
        plugins: directory of the plugins that it is to load; empty = none.
    """

    pid: int
    images: str
    log: str
    tcp: Tcp = "none"
    irmap_paths: tuple[str, ...] = ()
    freeze_seconds: int = 30
    plugins: str = ""
    verbosity: int = 4


@dataclass(frozen=True)
class Restore:
    """One restore. `work` gets the log and the statistics; `images` is only read.

    Args:
        new_clock: give the tree a time namespace in which the monotonic clock goes on from the dump.
        lazy_pages: leave memory to the page server that listens on `lazy-pages.socket` in `work`.
        stopped: leave the tree stopped: it has not run when CRIU exits, and runs on SIGCONT.
        plugins: as in `Dump`.
    """

    images: str
    work: str
    log: str
    tcp: Tcp = "none"
    new_clock: bool = False
    lazy_pages: bool = False
    stopped: bool = False
    plugins: str = ""
    verbosity: int = 1


def dump_command(criu: str, dump: Dump) -> tuple[str, ...]:
    """The command that dumps a tree and kills it."""
    irmap = ("--force-irmap", *(part for p in dump.irmap_paths for part in ("--irmap-scan-path", p)))
    return (
        criu, "dump", *COMMON,
        "--tree", str(dump.pid),
        "--images-dir", dump.images,
        "--log-file", dump.log,
        f"-v{dump.verbosity}",
        # Such files lie in the sandbox's own memory-backed disk, whose size is limited already.
        "--ghost-limit", "1048576G",
        "--timeout", str(dump.freeze_seconds),
        *TCP[dump.tcp],
        "--libdir", dump.plugins or NO_PLUGINS,
        *(irmap if dump.irmap_paths else ()),
    )  # fmt: skip


def restore_command(criu: str, restore: Restore) -> tuple[str, ...]:
    """The command that restores a tree, leaves it to init, and exits."""
    common = tuple(o for o in COMMON if not (o == "--unprivileged" and restore.new_clock))
    return (
        criu, "restore", *common,
        "--restore-detached",
        "--images-dir", restore.images,
        "--work-dir", restore.work,
        "--log-file", restore.log,
        f"-v{restore.verbosity}",
        *(("--lazy-pages",) if restore.lazy_pages else ()),
        *(("--leave-stopped",) if restore.stopped else ()),
        *TCP[restore.tcp],
        "--libdir", restore.plugins or NO_PLUGINS,
    )  # fmt: skip


def check_command(criu: str) -> tuple[str, ...]:
    """The cheapest command that fills the cache of kernel features."""
    return (criu, "check", "--unprivileged", "--no-default-config")


def environment(cache: str, path: Sequence[str] = ("/usr/sbin", "/usr/bin", "/sbin", "/bin")) -> dict[str, str]:
    """The environment criu runs in; `cache` is the directory of its kernel-feature cache."""
    return {"PATH": ":".join(path), "XDG_RUNTIME_DIR": cache, "LC_ALL": "C"}
