"""Machines with GPUs that are not there: `libcuda.c` built, and the files that stand for the hardware."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

__all__ = ["MIB", "Hardware", "build"]

MIB = 1 << 20
SOURCE = Path(__file__).with_name("libcuda.c")


def build(*, old: bool = False) -> Path:
    """The compiled library, made once per version of its source; `old`: a driver without the checkpoint calls."""
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    target = Path(tempfile.gettempdir()) / f"woodfrog-fake-cuda-{digest}{'-old' * old}.so"
    if not target.exists():
        draft = target.with_suffix(f".{os.getpid()}")
        command = ["cc", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
        command += ["-DFAKE_CUDA_OLD"] * old
        subprocess.run([*command, "-o", str(draft), str(SOURCE), "-lpthread", "-ldl"], check=True)
        draft.rename(target)
    return target


@dataclass
class Hardware:
    """A directory with the fake's library, and `dev/`, what stands for the GPUs of one machine.

    Args:
        folder: where to make it; every user must be able to reach it.
        gpus: chip and bytes of each.
    """

    folder: Path
    gpus: tuple[tuple[str, int], ...] = (("NVIDIA FAKE100", 64 * MIB),)
    old: bool = False
    lines: list[str] = field(default_factory=list)
    first: int = 0
    """Number in the first GPU's uuid: machines differ in it."""

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        library = self.folder / "libcuda.so.1"
        library.write_bytes(build(old=self.old).read_bytes())
        library.chmod(0o755)
        (self.folder / "libnvidia-ml.so.1").symlink_to("libcuda.so.1")
        for index, (name, memory) in enumerate(self.gpus):
            gpu = self.dev / f"nvidia{index}"
            gpu.mkdir(parents=True)
            gpu.chmod(0o777)
            uuid = UUID(self.uuids[index].removeprefix("GPU-")).hex
            (gpu / "info").write_text(f"name {name}\nuuid {uuid}\nmemory {memory}\n")
        self.control.mkdir(parents=True)
        self.control.chmod(0o777)
        self.configure()
        (self.dev / "nvidia-uvm").touch()
        (self.dev / "nvidia-uvm").chmod(0o666)
        if os.geteuid() == 0:
            # The one of them that is a device, as all of the real ones are: it is bound, and never opened.
            os.mknod(self.dev / "nvidia-uvm-tools", 0o666 | stat.S_IFCHR, os.makedev(1, 3))

    @property
    def dev(self) -> Path:
        return self.folder / "dev"

    @property
    def control(self) -> Path:
        return self.dev / "nvidiactl"

    @property
    def uuids(self) -> tuple[str, ...]:
        return tuple(f"GPU-{UUID(int=(0xF0 << 120) + self.first + i)}" for i in range(len(self.gpus)))

    def configure(self, *lines: str) -> None:
        """What the driver does from now on: `"version 12060"`, `"fault cuMemAlloc fail=2 1 3"`, … None of it: as it
        should."""
        for count in self.control.glob("count-*"):
            count.unlink()
        draft = self.control / ".config"
        draft.write_text("".join(f"{line}\n" for line in (*self.lines, *lines)))
        draft.chmod(0o644)
        draft.rename(self.control / "config")

    def health(self, index: int, **values: int) -> None:
        """How a GPU is from now on: `ecc=2`, `pending=1`, `failed=1`, `retired=1`, `lost=1`, `reset=1`, `hang=1`."""
        draft = self.dev / f"nvidia{index}" / ".health"
        draft.write_text("".join(f"{key} {value}\n" for key, value in values.items()))
        draft.rename(draft.with_name("health"))

    def xid(self, index: int, number: int) -> None:
        """The driver reports an error."""
        with open(self.control / "xids", "a") as file:
            file.write(f"{index} {number}\n")

    def memory_of(self, index: int) -> int:
        """Bytes that are in use on a GPU, by processes that live or did."""
        return sum(p.stat().st_size for p in (self.dev / f"nvidia{index}").glob("mem-*"))
