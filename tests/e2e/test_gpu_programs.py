"""The scenarios of tests/gpu, as far as they go without a GPU: a program in ctypes on the fake driver, and the torch
program on the CPU. docs/gpu.md says what ran on what."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from e2e.harness import Daemon
from fake_cuda.hardware import MIB, Hardware
from fake_cuda.program import GPU
from gpu import scenarios
from gpu.scenarios import Program

pytestmark = [pytest.mark.root, pytest.mark.criu]


@pytest.fixture
def hardware() -> Iterator[Hardware]:
    folder = Path(tempfile.mkdtemp(prefix="wf-cuda-", dir="/var/tmp"))
    yield Hardware(folder, gpus=(("NVIDIA FAKE100", 96 * MIB),))
    shutil.rmtree(folder)


@pytest.fixture
def daemon(hardware: Hardware) -> Iterator[Daemon]:
    with Daemon(WOODFROG_CUDA_DIR=str(hardware.folder), **scenarios.SETTINGS) as made:
        yield made


@pytest.fixture
def tiny(daemon: Daemon) -> Program:
    path = daemon.program((scenarios.PROGRAMS / "tiny.py").read_text(), "tiny.py")
    path.with_name("driver.py").write_text(GPU)
    shutil.copy(scenarios.PROGRAMS / "served.py", path.parent)
    return Program(path)


@pytest.mark.slow
def test_the_same_after_a_thaw(daemon: Daemon, tiny: Program) -> None:
    facts, phases = scenarios.same_after_thaws(daemon, tiny)
    assert facts["seen"] == [1, 1] and facts["device_bytes"] == 32 * MIB
    assert {"gpu.restore", "gpu.unlock"} <= phases and "enter" not in phases


def test_a_host_snapshot_has_its_gpu_after_the_restore(daemon: Daemon, tiny: Program) -> None:
    scenarios.gpu_hidden_then_there(daemon, tiny)


def test_out_of_memory_at_a_restore(daemon: Daemon, hardware: Hardware, tiny: Program) -> None:
    scenarios.out_of_memory(daemon, tiny, partial(scenarios.occupied, hardware.folder))


@pytest.mark.torch
@pytest.mark.slow
def test_the_torch_program_on_the_cpu() -> None:
    env = {"MODEL_GIB": "0.01", "MODEL_DEVICE": "cpu", "WOODFROG_GPU": "none"}
    with Daemon() as daemon:
        facts, _ = scenarios.same_after_thaws(daemon, Program(scenarios.PROGRAMS / "transformer.py", env), "OnCpu")
    assert facts["seen"] == [0, 0] and facts["device"] == "CPU"


MODEL = """
import torch
from transformer import Model, build, shape

for gib in (0.05, 0.5, 1, 8, 30):
    width, blocks = shape(gib)
    assert blocks >= 8 and 0.85 < 24 * width * width * blocks / (gib * 2**30) < 1.15, (gib, width, blocks)
one, other = Model(0.01, "plain", "cpu"), Model(0.01, "plain", "cpu")
assert one.weights() == other.weights() and one.answer(3) == other.answer(3) != one.answer(4)
memory = [w.view(torch.int16).view(-1) for w in one.model.parameters() if w.dim() > 1]
pages = torch.cat([m[: m.numel() // 2048 * 2048].view(-1, 2048) for m in memory])
assert len({bytes(p.numpy()) for p in pages}) == len(pages) > 1000, "no two pages are alike"
with torch.no_grad():
    row = other.model.blocks[1].up.weight[0]
    row[:2] = row[:2].flip(0)
assert one.weights() != other.weights(), "the place counts"
"""


@pytest.mark.slow
@pytest.mark.torch
def test_the_model_is_of_its_size_and_the_same_each_time() -> None:
    done = subprocess.run([sys.executable, "-c", MODEL], cwd=scenarios.PROGRAMS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
