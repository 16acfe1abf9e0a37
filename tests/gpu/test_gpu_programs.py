"""torch programs on an NVIDIA GPU through the command line: weights, compiled code and CUDA graphs after a thaw."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from e2e.harness import Daemon
from gpu import scenarios
from gpu.scenarios import Program

pytestmark = [
    pytest.mark.gpu, pytest.mark.root, pytest.mark.criu, pytest.mark.torch, pytest.mark.timeout(900),
]  # fmt: skip


@pytest.fixture(autouse=True)
def cuda_build() -> None:
    import torch

    if torch.version.cuda is None:
        pytest.skip("needs a CUDA build of torch")


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with Daemon(**scenarios.SETTINGS) as made:
        yield made


def transformer(variant: str = "plain", gib: float = 0.5) -> Program:
    return Program(scenarios.PROGRAMS / "transformer.py", {"MODEL_GIB": str(gib), "MODEL_VARIANT": variant})


@pytest.mark.parametrize("variant", ["plain", "compile", "graphs"])
def test_a_model_is_the_same_after_a_thaw(daemon: Daemon, variant: str) -> None:
    facts, phases = scenarios.same_after_thaws(daemon, transformer(variant))
    assert facts["seen"] == [1, 1] and facts["device_bytes"] > 512 << 20
    assert {"gpu.restore", "gpu.unlock"} <= phases and "enter" not in phases


@pytest.mark.parametrize("variant", ["plain", "graphs"])
def test_a_host_snapshot_has_its_gpu_after_the_restore(daemon: Daemon, variant: str) -> None:
    scenarios.gpu_hidden_then_there(daemon, transformer(variant))


def test_out_of_memory_at_a_restore(daemon: Daemon) -> None:
    scenarios.out_of_memory(daemon, transformer(gib=1), scenarios.occupied)
