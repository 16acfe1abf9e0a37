"""What is to be true of a GPU function through the command line, for whichever program and driver:
`test_gpu_programs.py` on a GPU, `e2e/test_gpu_programs.py` on the fake driver and with torch on the CPU.

The programs are those of benchmarks/gpu: an app named like its file, with the classes OnGpu and OnCpu.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from e2e.harness import Daemon
from fake_cuda.program import GPU

__all__ = ["PROGRAMS", "Program", "gpu_hidden_then_there", "occupied", "out_of_memory", "same_after_thaws"]

PROGRAMS = Path(__file__).parents[2] / "benchmarks" / "gpu" / "programs"
SETTINGS = {"WOODFROG_GPU_FREE_PERCENT": "0"}
"""A GPU that others use is taken all the same: how a thaw without room for it ends is the question here."""
CALL_S = 600.0
OCCUPANT = (
    GPU
    + """
import sys
def fill(gpu):
    gpu.ok("cuCtxPushCurrent_v2", gpu.context)
    free, total, at = _ct.c_size_t(), _ct.c_size_t(), _ct.c_uint64()
    gpu.ok("cuMemGetInfo_v2", _ct.byref(free), _ct.byref(total))
    for spared in (16 << 20, 64 << 20, 256 << 20):  # less than the programs take; a driver keeps some for itself
        if not gpu.lib.cuMemAlloc_v2(_ct.byref(at), _ct.c_size_t(free.value - spared)):
            return
    raise RuntimeError("no allocation of nearly all memory succeeds")
first, count = Cuda(), _ct.c_int()
first.ok("cuDeviceGetCount", _ct.byref(count))
for gpu in (first, *(Cuda(i) for i in range(1, count.value))):
    fill(gpu)
print("full", flush=True)
sys.stdin.read()
"""
)


@dataclass(frozen=True)
class Program:
    """A program to deploy, and what it is told by its environment."""

    path: Path
    env: Mapping[str, str] = field(default_factory=dict)

    def deploy(self, daemon: Daemon) -> None:
        daemon.cli("deploy", str(self.path), timeout=CALL_S, env=self.env)

    @property
    def app(self) -> str:
        return self.path.stem

    def call(self, daemon: Daemon, target: str, *arguments: str) -> tuple[Any, set[str]]:
        """Result, and the names of the call's phases."""
        done = daemon.cli("call", f"{self.app}.{target}", *arguments, "--json", timeout=CALL_S)
        answer = json.loads(done.stdout)
        return answer["result"], {p["name"] for p in answer["phases"]}


def same_after_thaws(daemon: Daemon, program: Program, cls: str = "OnGpu") -> tuple[dict[str, Any], set[str]]:
    """Two thaws answer what the frozen process did, with all of its weights.

    Returns:
        What the last copy says of itself, and the phases of its start.
    """
    program.deploy(daemon)
    answers = [program.call(daemon, f"{cls}.run", f"request={n}")[0] for n in (0, 5)]
    before, _ = program.call(daemon, f"{cls}.facts")
    assert answers[0] != answers[1]
    snapshot = daemon.wait_snapshot(program.app, seconds=300)
    for _ in range(2):
        daemon.scale_to_zero()
        first, phases = program.call(daemon, f"{cls}.run", "request=5")
        assert "restore" in phases and "boot" not in phases, daemon.app_text(program.app)
        again, _ = program.call(daemon, f"{cls}.run", "request=0")
        assert [again, first] == answers
        facts, _ = program.call(daemon, f"{cls}.facts")
        assert facts["restored"] and facts["weights"] == before["weights"]
    assert daemon.snapshots(program.app) == [snapshot]
    daemon.scale_to_zero()
    return facts, phases


def gpu_hidden_then_there(daemon: Daemon, program: Program) -> None:
    """A snapshot in host memory of a function that has a GPU after it."""
    facts, phases = same_after_thaws(daemon, program, "OnCpu")
    before, after = facts["seen"]
    assert before == 0 and after == 1
    assert "gpu.restore" not in phases


def out_of_memory(daemon: Daemon, program: Program, fill: Callable[[], AbstractContextManager[None]]) -> None:
    """A GPU that others have filled: the thaw fails by name, and so does the boot after it. With room again the
    snapshot, which was not at fault, is thawed."""
    program.deploy(daemon)
    answer, _ = program.call(daemon, "OnGpu.run", "request=0")
    snapshot = daemon.wait_snapshot(program.app, seconds=300)
    daemon.scale_to_zero()
    with fill():
        failed = daemon.cli("call", f"{program.app}.OnGpu.run", "request=0", check=False, timeout=CALL_S)
    assert failed.returncode != 0, failed.stdout
    text = daemon.app_text(program.app)
    assert "not enough free memory for what the snapshot holds" in text, text
    assert daemon.snapshots(program.app) == [snapshot]
    again, phases = program.call(daemon, "OnGpu.run", "request=0")
    assert again == answer and "gpu.restore" in phases and "boot" not in phases
    daemon.scale_to_zero()


@contextlib.contextmanager
def occupied(library: Path | None = None) -> Iterator[None]:
    """Another process has nearly all memory of every GPU.

    Args:
        library: directory of libcuda.so.1 where the loader does not find it.
    """
    env = {**os.environ, **({"LD_LIBRARY_PATH": str(library)} if library is not None else {})}
    with subprocess.Popen([sys.executable, "-c", OCCUPANT], stdin=-1, stdout=-1, text=True, env=env) as process:
        assert process.stdout is not None and process.stdin is not None
        try:
            assert process.stdout.readline() == "full\n"
            yield
        finally:
            process.stdin.close()
            process.kill()
