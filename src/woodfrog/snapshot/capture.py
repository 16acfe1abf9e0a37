"""From a frozen-still worker to a snapshot in staging: the engine's images, then the sandbox's private files."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import stat
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from woodfrog.criu.binary import Criu
from woodfrog.engine.engine import AmdSide, GpuSide, dump
from woodfrog.engine.plan import GpuFacts
from woodfrog.errors import CaptureError, StoreError
from woodfrog.faults import fault
from woodfrog.linux.pageserver import make_set
from woodfrog.linux.rootplan import VAR_TMP
from woodfrog.linux.sandbox import Sandbox
from woodfrog.snapshot.catalogue import WORKING_SET, Staging
from woodfrog.snapshot.compat import WorkerClass
from woodfrog.snapshot.manifest import FORMAT, Manifest
from woodfrog.store.files import store_error, write_atomic
from woodfrog.telemetry import Phases

__all__ = ["DEVICE_USES", "SnapshotIdentity", "capture", "device_bytes", "holes", "link_on_the_way"]

SHM = "/dev/shm"
MOST_HOLES = 16 << 30


@dataclass(frozen=True)
class SnapshotIdentity:
    """What a new snapshot will be found by."""

    id: str
    function_key: str
    worker_class: WorkerClass
    app: str
    tag: str
    params_digest: str
    modules: tuple[str, ...] = ()
    """For a zygote: what it has imported."""
    seen: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    """For a zygote: the files it was imported from, which must be unchanged at a restore."""
    parent: str = ""
    """The snapshot it was thawed from before it became what it is."""


async def copy_tree(source: Path, target: Path, what: str) -> None:
    """Copy a directory's content with owners, times, extended attributes, holes, devices and hard links.

    Raises:
        StoreError: anything could not be copied.
    """
    try:
        if not os.listdir(source):  # most often so with /dev/shm
            info = os.stat(source)
            os.chown(target, info.st_uid, info.st_gid)
            shutil.copystat(source, target)
            return
    except OSError as e:
        raise store_error(what, target, e) from e
    process = await asyncio.create_subprocess_exec(
        "cp", "-a", "--sparse=auto", f"{source}/.", f"{target}/", stderr=asyncio.subprocess.PIPE
    )
    _, err = await process.communicate()
    if process.returncode:
        lines = err.decode(errors="replace").strip().splitlines()
        full = any("No space left" in line for line in lines)
        raise StoreError(f"{what}: {lines[0] if lines else 'cp failed'}", code="disk-full" if full else "copy-failed")


def uncover(upper: Path, lower: Path) -> None:
    """Make way in `lower` for a copy of the overlay layer `upper`: remove what that replaces or hides."""
    with os.scandir(upper) as entries:
        for entry in entries:
            target = lower / entry.name
            if not os.path.lexists(target):
                continue
            is_dir = entry.is_dir(follow_symlinks=False)
            if is_dir and target.is_dir() and not target.is_symlink() and not _opaque(entry.path):
                uncover(Path(entry.path), target)
            elif target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            else:
                target.unlink()


def _opaque(path: str) -> bool:
    try:
        return os.getxattr(path, "trusted.overlay.opaque") == b"y"
    except OSError:
        return False


def link_on_the_way(paths: Iterable[str], fs: Path, shm: Path) -> str:
    """The first of these paths that leads through a symlink of the layers, or is one; empty when there is none.

    CRIU opens them as root. It has noted them as they were, without links, while somebody else may have held a
    directory of the sandbox and changed what is in it.
    """
    seen: dict[PurePosixPath, bool] = {}

    def is_link(path: PurePosixPath) -> bool:
        if path not in seen:
            inner = shm / path.relative_to(SHM) if path.is_relative_to(SHM) else fs / path.relative_to("/")
            others = fs / VAR_TMP[1:] / path.relative_to("/var/tmp") if path.is_relative_to("/var/tmp") else inner
            seen[path] = any(map(os.path.islink, (inner, others)))
        return seen[path]

    for path in paths:
        pure = PurePosixPath(path)
        if pure.is_absolute() and any(map(is_link, (pure, *pure.parents))):
            return path
    return ""


def holes(*folders: Path) -> int:
    """Bytes of files that nobody has written: they take no room, and as long to read as any others. A file of holes
    alone may have exabytes, and each snapshot's files are read whole by threads that others wait for."""
    total = 0
    for folder in folders:
        for where, _, names in os.walk(folder):
            for name in names:
                info = os.lstat(os.path.join(where, name))
                if stat.S_ISREG(info.st_mode):
                    total += max(0, info.st_size - 512 * info.st_blocks)
    return total


DEVICE_USES = ("weights", "tensors", "graphs", "allocator cache")
"""What a worker may say of its GPU memory."""


def device_bytes(gpu: GpuFacts, worker: int, told: object) -> dict[str, int]:
    """What the saved memory of GPUs is, as far as it is known. Bytes, nothing that is 0.

    Args:
        worker: inner pid of the process that told.
        told: by what it is; not trusted, and no more than what was saved is believed.
    """
    own = left = sum(size for pid, size in gpu.processes if pid == worker)
    said = told if isinstance(told, dict) else {}
    found: dict[str, int] = {}
    for use in DEVICE_USES:
        size = said.get(use)
        if isinstance(size, int) and size > 0:
            found[use] = min(size, left)
            left -= found[use]
    found["contexts and other libraries" if found else "not told"] = left
    found["other processes"] = sum(size for _, size in gpu.processes) - own
    return {use: size for use, size in found.items() if size}


def _unchanged_since(paths: tuple[str, ...]) -> list[str]:
    found = []
    for path in paths:
        with contextlib.suppress(OSError, ValueError):  # it is in the sandbox alone
            info = os.stat(path)
            found.append(f"{path}|{info.st_size}|{info.st_mtime_ns}")
    return found


async def _copy_layers(sandbox: Sandbox, staging: Staging, below: Path | None) -> None:
    if below is not None:
        await copy_tree(below, staging.fs, "cannot store the zygote's files")
        await asyncio.to_thread(uncover, sandbox.upper_path(), staging.fs)
    await copy_tree(sandbox.upper_path(), staging.fs, "cannot store the sandbox's files")


async def capture(
    sandbox: Sandbox,
    *,
    root_pid: int,
    staging: Staging,
    identity: SnapshotIdentity,
    criu: Criu,
    phases: Phases,
    below: Path | None = None,
    gpu: GpuSide | AmdSide | None = None,
    device_use: object = None,
) -> Manifest:
    """Freeze the tree of `root_pid` (a pid inside the sandbox) into `staging`.

    On success the processes are dead and the sandbox is only good for being destroyed.

    Args:
        below: the layer that the sandbox's own files lie on, of the zygote it was thawed from. It becomes part of the
        snapshot, which so depends on no other.
        gpu: capture the memory of these GPUs too.
        device_use: what the worker says that memory is.

    Returns:
        The manifest to commit, still without its files' digests.

    Raises:
        CaptureError: with `alive` telling whether the processes run on unharmed.
    """
    with phases("dump"):
        result = await dump(sandbox, root_pid=root_pid, images=staging.images, criu=criu, phases=phases, gpu=gpu)
    fault("capture.files")
    try:
        with phases("files"):
            copies = (
                _copy_layers(sandbox, staging, below),
                copy_tree(sandbox.path("/dev/shm"), staging.shm, "cannot store the sandbox's shared memory"),
            )
            # Both have ended when one has failed: nobody writes into what may then be removed.
            for failure in await asyncio.gather(*copies, return_exceptions=True):
                if failure is not None:
                    raise failure
            if (empty := await asyncio.to_thread(holes, staging.fs, staging.shm)) > MOST_HOLES:
                text = (
                    f"cannot capture: its files have {empty >> 30} GiB of holes, at most {MOST_HOLES >> 30} are taken"
                )
                remedy = "make sparse files after the snapshot (enter(snap=False)), or in a volume"
                raise CaptureError(f"{text}; {remedy}", alive=False, phase="files", code="sparse-files", remedy=remedy)
            if through := await asyncio.to_thread(link_on_the_way, result.reached, staging.fs, staging.shm):
                text = f"cannot capture: a symbolic link has come in the way of an open file: {through}"
                raise CaptureError(text, alive=False, phase="files", code="images-altered")
            if result.gpu is not None and result.gpu.memory:
                # The driver reads all of it at each restore: that has not to be learned.
                await asyncio.to_thread(write_atomic, staging.path / WORKING_SET, make_set(result.gpu.memory))
    except StoreError as e:
        raise CaptureError(e.message, alive=False, phase="files", code=e.code) from e
    sources = await asyncio.to_thread(_unchanged_since, identity.sources)
    for log in staging.images.glob("*.log"):
        log.rename(staging.log / log.name)
    return Manifest(
        format=FORMAT,
        id=identity.id,
        function_key=identity.function_key,
        worker_class=identity.worker_class.digest,
        host=dict(identity.worker_class.parts),
        app=identity.app,
        tag=identity.tag,
        params_digest=identity.params_digest,
        created=time.time(),
        root_pid=root_pid,
        tasks=result.tasks,
        pages_bytes=result.pages_bytes,
        fs_bytes=0,
        files=(),
        external=(*(f"{path}|{size}|{mtime}" for path, size, mtime in result.files), *sources),
        warnings=result.warnings,
        gpu_bytes=device_bytes(result.gpu, root_pid, device_use) if result.gpu is not None else {},
        kind="zygote" if identity.modules else "function",
        modules=identity.modules,
        seen=identity.seen,
        parent=identity.parent,
    )
