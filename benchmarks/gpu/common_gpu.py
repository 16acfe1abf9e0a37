"""What the benchmarks of GPUs share: facts of the GPU, why there is none, the fake that stands for one."""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import RESULTS, has


def gpu_facts() -> dict[str, str]:
    """What nvidia-smi says of the first GPU, as far as numbers depend on it."""
    fields = ("name", "driver_version", "memory.total", "persistence_mode", "pcie.link.gen.max", "pcie.link.width.max")
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (v.strip() for v in done.stdout.splitlines()[0].split(",")), strict=False))


def missing(*, torch: bool) -> str:
    """Why nothing can be measured here; empty where it can."""
    if not Path("/dev/nvidiactl").exists():
        return "needs an NVIDIA GPU"
    if not has("cuda"):
        return "needs cuda-bindings: pip install 'woodfrog[gpu]'"
    if not torch:
        return ""
    if not has("torch"):
        return "needs a CUDA build of torch"
    asked = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.version.cuda or '')"], capture_output=True, text=True
    )
    return "" if asked.stdout.strip() else "needs a CUDA build of torch, and this one is without"


@contextlib.contextmanager
def fake_hardware(mib: int = 512) -> Iterator[Any]:
    """The fake driver of the tests, with one GPU (a `Hardware`). Its `folder`'s parent is gone afterwards."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
    from fake_cuda.hardware import MIB, Hardware

    with tempfile.TemporaryDirectory(prefix="wfb-cuda-", dir="/var/tmp") as folder:
        Path(folder).chmod(0o755)
        yield Hardware(Path(folder) / "cuda", gpus=(("NVIDIA FAKE100", mib * MIB),))


def refuse_fake_results(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """A fake's numbers among a GPU's are a mistake on the command line."""
    if options.fake and options.json and Path(options.json).resolve().is_relative_to(RESULTS / "gpu"):
        parser.error("numbers of the fake driver do not belong among a GPU's")
