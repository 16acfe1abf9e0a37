"""A GPU that is hidden until after the restore: a real worker and a real torch, whose C part is told of GPUs by a file.

torch's CPU build has no CUDA in its C part; `fake_gpu` puts stand-ins in, with the behaviour that makes hiding hard.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fake_gpu import install
from integration.test_worker import Worker
from woodfrog import protocol

NONE = {
    "is_available": False,
    "device_count": 0,
    "nvml": 0,
    "dynamo": [],
    "transformers": False,
    "devices": False,
    "xformers": False,
}
BOTH = {
    "is_available": True,
    "device_count": 2,
    "nvml": 2,
    "start": "started",
    "dynamo": ["cuda:0", "cuda:1"],
    "transformers": True,
    "devices": True,
    "xformers": True,
}
PROGRAM = """
import fake_cuda
import xformers

class Model:
    @enter(snap=True)
    def load(self):
        self.before = fake_cuda.answers()
    @enter(snap=False)
    def setup(self):
        self.after = fake_cuda.answers()
    def seen(self):
        return self.before, self.after
"""


@pytest.fixture
def gpus(tmp_path: Path) -> Path:
    path = tmp_path / "gpus"
    path.write_text("2")
    return path


@pytest.fixture
def model(tmp_path: Path, gpus: Path) -> Iterator[Worker]:
    root = tmp_path / "w"
    root.mkdir()
    install(root)
    worker = Worker(root, PROGRAM)
    yield worker
    worker.close()


def environment(gpus: Path, **more: str) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "FAKE_GPUS": str(gpus), "HF_HUB_OFFLINE": "1", **more}


@pytest.mark.model
@pytest.mark.slow  # of the libraries, not of ours
def test_without_hiding_it_well_a_gpu_is_never_seen_again(model: Worker, gpus: Path) -> None:
    """What the stand-ins stand for: an empty CUDA_VISIBLE_DEVICES alone leaves a process without GPUs for good."""
    text = (
        "import os, sys\nsys.path.insert(0, sys.argv[1])\nimport fake_cuda, xformers\n"
        "fake_cuda.answers()\ndel os.environ['CUDA_VISIBLE_DEVICES']\nprint(fake_cuda.answers())"
    )
    done = subprocess.run(
        [sys.executable, "-c", text, str(model.root)],
        env=environment(gpus, CUDA_VISIBLE_DEVICES=""),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    seen = eval(done.stdout)
    assert not seen["is_available"] and seen["start"] != "started"
    assert not any(seen[name] for name in ("dynamo", "transformers", "devices", "xformers"))


@pytest.mark.model
@pytest.mark.parametrize("restored", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_hidden_before_and_seen_after(model: Worker, gpus: Path, restored: bool) -> None:
    env = environment(gpus)
    booted = model.boot("Model", kind="class", methods=("seen",), env=env, snapshot=True, hide_gpu=True)
    assert booted["type"] == "booted", booted
    if restored:
        assert model.freeze()["type"] == "frozen"
    ready = model.start(restored=restored, env=env)
    assert ready["type"] == "ready" and ready["warnings"] == [], ready
    # Without a freeze nothing was looked for before.
    assert ready["phases"]["forget_gpu"] < (20 if restored else 2000)
    before, after = model.call("seen")
    assert "hidden until after the snapshot" in before.pop("start")
    assert before == NONE and after == BOTH


@pytest.mark.model
def test_placement_by_number_and_by_name(model: Worker, gpus: Path) -> None:
    model.boot("Model", kind="class", methods=("seen",), env=environment(gpus), snapshot=True, hide_gpu=True)
    model.freeze()
    one = "GPU-00000001-0000-0000-0000-000000000000"
    model.start(restored=True, env=environment(gpus, CUDA_VISIBLE_DEVICES=one))
    after: dict[str, Any] = model.call("seen")[1]
    assert after["nvml"] == after["device_count"] == 1


@pytest.mark.model
def test_hidden_in_a_zygote_too(model: Worker, gpus: Path) -> None:
    """torch is imported, and asked, before the program is known. The collector is then kept from all that there is."""
    (model.root / "asked.py").write_text("import fake_cuda, xformers\nfake_cuda.answers()\n")
    env, paths = environment(gpus), [str(model.root), *[p for p in sys.path if p]]
    place: dict[str, Any] = {"cwd": str(model.root), "hide_gpu": True}
    preloaded = model.ask(protocol.PreloadMessage(["fake_cuda", "asked"], paths, env, **place).header())[0]
    assert preloaded["type"] == "preloaded", preloaded
    assert model.freeze()["type"] == "frozen"
    more = {"snapshot": True, "entropy": os.urandom(64).hex(), **place}
    assert model.boot("Model", kind="class", methods=("seen",), env=env, **more)["type"] == "booted"
    model.freeze()
    ready = model.start(restored=True, env=env)
    assert ready["type"] == "ready", ready
    before, after = model.call("seen")
    assert "hidden until after the snapshot" in before.pop("start")
    assert before == NONE and after == BOTH


def test_a_program_without_such_libraries_pays_nothing(tmp_path: Path) -> None:
    worker = Worker(tmp_path / "w", "import sys\ndef f(): return sorted(m for m in sys.modules if 'torch' in m)")
    try:
        worker.boot("f", snapshot=True, hide_gpu=True)
        worker.freeze()
        ready = worker.start(restored=True)
        assert ready["phases"]["forget_gpu"] < 1 and worker.call("f") == []
    finally:
        worker.close()
