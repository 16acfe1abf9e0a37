"""From a verified snapshot to a running worker in an assembled sandbox."""

from __future__ import annotations

import os
from pathlib import Path

from woodfrog.criu.binary import Criu
from woodfrog.engine.engine import AmdSide, GpuSide, Lazy, restore
from woodfrog.errors import IncompatibleSnapshot
from woodfrog.linux.sandbox import Sandbox, SandboxProcess
from woodfrog.snapshot.manifest import Manifest, external_file
from woodfrog.telemetry import Phases

__all__ = ["check_external", "materialise"]


def check_external(manifest: Manifest) -> None:
    """Every library and file that the frozen process has mapped or open must be the one it knew.

    Raises:
        IncompatibleSnapshot: a file was changed or removed (a package was upgraded in place): cold start, new snapshot.
    """
    for entry in manifest.external:
        path, size, mtime, _ = external_file(entry)
        try:
            info = os.stat(path)
        except OSError as e:
            raise IncompatibleSnapshot(
                f"{path} is gone since the snapshot was made ({e.strerror})", path=path
            ) from None
        if info.st_size != size or info.st_mtime_ns != mtime:
            raise IncompatibleSnapshot(f"{path} was changed since the snapshot was made", path=path)


async def materialise(
    sandbox: Sandbox,
    *,
    manifest: Manifest,
    images: Path,
    criu: Criu,
    phases: Phases,
    lazy: Lazy | None = None,
    stopped: bool = False,
    gpu: GpuSide | AmdSide | None = None,
) -> SandboxProcess:
    """Thaw the snapshot in a sandbox whose root is assembled already; `stopped`: it does not run before SIGCONT; `gpu`:
    the GPUs of that sandbox.

    Raises:
        IncompatibleSnapshot: what it rests on has changed.
        RestoreError: the engine could not restore it.
    """
    with phases("check"):
        check_external(manifest)
    with phases("restore"):
        return await restore(sandbox, images=images, criu=criu, phases=phases, lazy=lazy, stopped=stopped, gpu=gpu)
