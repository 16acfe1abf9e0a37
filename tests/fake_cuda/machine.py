"""Runs a command as on a machine that has a GPU: with a /dev of its own in which the fake's hardware lies.

    python tests/fake_cuda/machine.py [--mib N] [--line 'fault cuInit sleep=3000']… COMMAND…

So what is meant for real GPUs (`tests/gpu`, `benchmarks/gpu/session.py`) is tried where there is none. Needs root.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from fake_cuda.hardware import MIB, Hardware

CLONE_NEWNS = 0x20000
KEPT = ("pts", "shm", "net")
LINKS = (
    ("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0"), ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"), ("ptmx", "pts/ptmx"),
)  # fmt: skip


def mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True)


def own_dev(hardware: Hardware) -> None:
    """Give this process a /dev without the machine's disks and with the fake's GPUs."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    mount("--make-rprivate", "/")
    dev = hardware.folder / "newdev"
    dev.mkdir()
    mount("-t", "tmpfs", "-o", "mode=755", "none", dev)
    for name in ("null", "zero", "full", "random", "urandom", "tty", "userfaultfd"):
        if (node := Path("/dev", name)).exists():
            os.mknod(dev / name, node.stat().st_mode, node.stat().st_rdev)
            (dev / name).chmod(node.stat().st_mode & 0o777)
    for name, target in LINKS:
        (dev / name).symlink_to(target)
    for path in (*(Path("/dev", name) for name in KEPT), *hardware.dev.iterdir()):
        if path.is_dir():
            (dev / path.name).mkdir()
        elif path.exists():
            (dev / path.name).touch()
        else:
            continue
        mount("--bind", path, dev / path.name)
    mount("--move", dev, "/dev")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=2048, help="of the GPU (default: 2048)")
    parser.add_argument("--line", action="append", default=[], help="of the fake's configuration")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="wf-gpu-", dir="/var/tmp"))
    try:
        folder.chmod(0o755)
        hardware = Hardware(folder / "cuda", gpus=(("NVIDIA H200", options.mib * MIB),), lines=options.line)
        own_dev(hardware)
        env = {**os.environ, "LD_LIBRARY_PATH": str(hardware.folder)}
        return subprocess.run(options.command, env=env).returncode
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        # Where the fake's processes were met, of those that were killed.
        for path in Path("/tmp").glob(".fake-cuda-*"):
            if not Path("/proc", path.name.rpartition("-")[2]).exists():
                path.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
