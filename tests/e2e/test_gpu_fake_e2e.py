"""GPU functions through the command line, the daemon and real CRIU, on GPUs that are fakes.

None of it says how fast, or whether a real GPU does the same: docs/gpu.md says what ran on what.
"""

from __future__ import annotations

import copy
import fcntl
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from e2e.harness import Daemon, until
from fake_cuda.hardware import MIB, Hardware
from fake_cuda.program import GPU
from fake_cuda.torch_stub import SENTENCE_TRANSFORMERS, TORCH
from woodfrog.control.replay import main as replay_main
from woodfrog.errors import WoodfrogError
from woodfrog.snapshot.catalogue import WORKING_SET

pytestmark = [pytest.mark.root, pytest.mark.criu]

CHIP = "NVIDIA FAKE100"
HOLDER = """
import glob, hashlib, os, time
import woodfrog as modal
from fakegpu import Cuda

app = modal.App("holder")

@app.cls(gpu={gpu!r}, enable_memory_snapshot=True, experimental_options={{"enable_gpu_snapshot": True}}, {more})
class Holder:
    @modal.enter(snap=True)
    def load(self):
        self.gpu = Cuda()
        data = os.urandom(24 << 20)
        self.held = self.gpu.put(data)
        self.digest = hashlib.sha256(data).hexdigest()
        self.locked = self.gpu.lock(data[:1 << 20])
        self.booted = time.time()

    @modal.method()
    def check(self, wait: float = 0.0):
        time.sleep(wait)
        return {{
            "intact": hashlib.sha256(self.gpu.get(self.held)).hexdigest() == self.digest,
            "digest": self.digest,
            "uuid": self.gpu.uuid(),
            "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "devices": sorted(glob.glob("/dev/nvidia*")),
        }}

@app.function()
def plain():
    return sorted(glob.glob("/dev/nvidia*")) + [os.environ.get("CUDA_VISIBLE_DEVICES")]
"""
# The programs of the guide that ask for a GPU, but for the model's path.
SEEDS = """
import woodfrog as modal  # changed: import modal

image = modal.Image.debian_slim()  # changed: without pip_install, the packages are stand-ins beside this file
app = modal.App("sentence-transformers", image=image)

with image.imports():
    from sentence_transformers import SentenceTransformer

model_vol = modal.Volume.from_name("sentence-transformers-models", create_if_missing=True)


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
        import torch
        print(f"GPUs available: {torch.cuda.is_available()}") # True


@app.function(
    gpu="a10",
    enable_memory_snapshot=True,
    experimental_options={"enable_gpu_snapshot": True},
)
def my_gpu_func():
    import torch
    print(f"GPUs available: {torch.cuda.is_available()}") # True


@app.cls(gpu="a10", volumes={"/models": model_vol}, enable_memory_snapshot=True)
class Embedder:
    model_id = "BAAI/bge-small-en-v1.5"

    @modal.enter(snap=True)
    def load(self):
        # Create a memory snapshot with the model loaded in CPU memory.
        self.model = SentenceTransformer(f"/models/{self.model_id}", device="cpu")

    @modal.enter(snap=False)
    def setup(self):
        self.model.to("cuda") # Move the model to a GPU!

    @modal.method()
    def run(self, sentences:list[str]):
        embeddings = self.model.encode(sentences, normalize_embeddings=True)
        print(embeddings)


@app.cls(
    gpu="a10",
    volumes={"/models": model_vol},
    enable_memory_snapshot=True,
    experimental_options={"enable_gpu_snapshot": True}
)
class GpuEmbedder:
    model_id = "BAAI/bge-small-en-v1.5"

    @modal.enter(snap=True)
    def load(self):
        # Create a memory snapshot with the model loaded in GPU memory.
        self.model = SentenceTransformer(f"/models/{self.model_id}", device="cuda")

    @modal.method()
    def run(self, sentences:list[str]):
        embeddings = self.model.encode(sentences, normalize_embeddings=True)
        print(embeddings)


@app.local_entrypoint()
def main():
    Embedder().run.remote(sentences=["what is the meaning of life?"])
    GpuEmbedder().run.remote(sentences=["what is the meaning of life?"])
"""


@pytest.fixture
def hardware() -> Iterator[Hardware]:
    folder = Path(tempfile.mkdtemp(prefix="wf-cuda-", dir="/var/tmp"))
    yield Hardware(folder, gpus=((CHIP, 96 * MIB), (CHIP, 96 * MIB), ("NVIDIA A10", 96 * MIB)))
    shutil.rmtree(folder)


@pytest.fixture
def daemon(hardware: Hardware) -> Iterator[Daemon]:
    with Daemon(WOODFROG_CUDA_DIR=str(hardware.folder)) as made:
        yield made


def holder(daemon: Daemon, gpu: Any = "FAKE100", **more: Any) -> Path:
    program = daemon.program(HOLDER.format(gpu=gpu, more=", ".join(f"{k}={v!r}" for k, v in more.items())))
    program.with_name("fakegpu.py").write_text(GPU)
    return program


def check(daemon: Daemon, wait: float = 0.0) -> dict[str, Any]:
    found: dict[str, Any] = daemon.call("holder", "Holder.check", wait=wait)
    assert found["intact"]
    return found


def last_trace(daemon: Daemon) -> str:
    return daemon.cli("call", "holder.Holder.check", "--json").stdout


def test_the_whole_life(daemon: Daemon, hardware: Hardware) -> None:
    first = hardware.uuids[0]
    daemon.cli("deploy", str(holder(daemon)), "--snapshot")
    snapshot = daemon.wait_snapshot("holder")
    looked = daemon.json("snapshot", "inspect", snapshot)
    kinds = {row["kind"]: row["resident_bytes"] for row in looked["contents"]["kinds"]}
    assert kinds["GPU memory"] >= 24 * MIB and 24 * MIB <= looked["gpu_bytes"]["not told"] < 28 * MIB
    assert "GPU memory" in (shown := daemon.cli("snapshot", "inspect", snapshot).stdout) and "of GPUs" in shown
    digests = set()
    for _ in range(3):
        found = check(daemon)
        digests.add(found["digest"])
        assert found["visible"] == first
        assert found["devices"] == [
            "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools", "/dev/nvidia0", "/dev/nvidiactl",
        ]  # fmt: skip
        assert hardware.memory_of(0) >= 24 * MIB and not hardware.memory_of(1)
        daemon.scale_to_zero()
        assert until(lambda: hardware.memory_of(0) == 0 or not _live(hardware, 0))
    assert len(digests) == 1, "the same bytes each time: thawed, not loaded anew"
    until(lambda: [row for row in daemon.kept() if row["id"] == snapshot and row["form"] == "packed"])
    trace = last_trace(daemon)
    assert '"gpu.restore"' in trace and '"gpu.unlock"' in trace and '"boot"' not in trace
    assert daemon.snapshots("holder") == [snapshot]
    assert daemon.call("holder", "plain") == [None]
    assert "gpu.checkpoint" in str(daemon.json("snapshot", "inspect", snapshot)["phases"])


def _live(hardware: Hardware, index: int) -> bool:
    """Whether some process holds memory of a GPU: a dead one's files stay until the next that looks."""
    for path in (hardware.dev / f"nvidia{index}").glob("mem-*"):
        with open(path) as f:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
    return False


def test_two_at_a_time_on_two_gpus(daemon: Daemon, hardware: Hardware) -> None:
    daemon.cli("deploy", str(holder(daemon)), "--snapshot")
    daemon.wait_snapshot("holder")
    daemon.scale_to_zero()
    found = at_once(daemon, 2, 1.5)
    assert {f["visible"] for f in found} == set(hardware.uuids[:2]) and len({f["digest"] for f in found}) == 1
    assert {f["uuid"] for f in found} == {u.removeprefix("GPU-").replace("-", "") for u in hardware.uuids[:2]}


def at_once(daemon: Daemon, count: int, wait: float) -> list[dict[str, Any]]:
    """So many calls from as many threads."""

    def one(_: int) -> dict[str, Any]:
        own = copy.copy(daemon)
        own._client = None  # a client is one thread's
        return check(own, wait)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def test_more_calls_than_gpus_wait(daemon: Daemon, hardware: Hardware) -> None:
    daemon.cli("deploy", str(holder(daemon, ["FAKE100:2", "A10"])), "--snapshot")
    found = at_once(daemon, 4, 0.5)
    assert len(found) == 4
    both = ",".join(hardware.uuids[:2])
    assert {f["visible"] for f in found} <= {both, hardware.uuids[2]}


def test_copies_in_reserve_are_idle_and_hold_their_gpus(daemon: Daemon, hardware: Hardware) -> None:
    """`buffer_containers` of a GPU function parks nothing, and says so."""
    daemon.cli("deploy", str(holder(daemon, buffer_containers=1)), "--snapshot")
    daemon.wait_snapshot("holder")
    first = check(daemon)
    assert "Holder: buffer_containers keeps idle copies that hold their GPUs; none is parked" in daemon.app_text(
        "holder"
    )

    def two() -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = daemon.get("/containers")["containers"]
        return rows if [r["stage"] for r in rows] == ["ready", "ready"] else []

    assert {tuple(r["gpus"]) for r in until(two)} == {(uuid,) for uuid in hardware.uuids[:2]}
    both = at_once(daemon, 2, 1.0)
    assert {f["visible"] for f in both} == set(hardware.uuids[:2]) and {f["digest"] for f in both} == {first["digest"]}


def test_no_room_at_a_thaw_is_another_gpu_and_then_a_cold_start(daemon: Daemon, hardware: Hardware) -> None:
    daemon.cli("deploy", str(holder(daemon)), "--snapshot")
    snapshot = daemon.wait_snapshot("holder")
    before = check(daemon)
    daemon.scale_to_zero()
    hardware.configure("fault target.restore fail=2 1 1")
    other = check(daemon)
    assert other["digest"] == before["digest"] and other["visible"] == hardware.uuids[1]
    assert "not enough free memory" in daemon.app_text("holder")
    daemon.scale_to_zero()
    hardware.configure("fault target.restore fail=2 1 2")
    assert check(daemon)["digest"] != before["digest"], "loaded anew: none had room"
    daemon.scale_to_zero()
    hardware.configure()
    assert check(daemon)["digest"] == before["digest"]
    assert daemon.snapshots("holder") == [snapshot], "the snapshot is not at fault"


def gpus(daemon: Daemon, *command: str) -> dict[str, dict[str, Any]]:
    return {g["gpu"]: g for g in daemon.json("gpu", *(command or ("list",)))}


def test_a_sick_gpu_is_set_aside_and_another_is_taken(daemon: Daemon, hardware: Hardware) -> None:
    first, second, _ = hardware.uuids
    daemon.cli("deploy", str(holder(daemon)), "--snapshot")
    daemon.wait_snapshot("holder")
    assert check(daemon)["visible"] == first
    listed = gpus(daemon)
    assert [g["state"] for g in listed.values()] == ["used", "free", "free"]
    assert listed[first]["container"] and not listed[second]["container"]
    hardware.xid(0, 31)
    hardware.xid(0, 79)
    until(lambda: daemon.get("/gpus")["gpus"][0]["state"] == "set-aside")
    assert "fallen off the bus" in gpus(daemon)[first]["why"] and gpus(daemon)[first]["xids"] == [31, 79]
    daemon.wait_idle()
    assert check(daemon)["visible"] == second, "what rested on it is gone, and the next is thawed elsewhere"
    assert daemon.log.read_text().count(f"GPU {first} is set aside") == 1
    daemon.scale_to_zero()
    assert gpus(daemon, "check")[first]["state"] == "free"
    assert check(daemon)["visible"] == first
    daemon.scale_to_zero()
    hardware.health(0, ecc=1)
    assert check(daemon)["visible"] == second, "found before it was used"
    daemon.scale_to_zero()
    shown = daemon.cli("gpu", "list").stdout
    assert "set aside" in shown and "1 uncorrectable memory errors" in shown


def test_where_all_gpus_are_sick_the_call_says_so(daemon: Daemon, hardware: Hardware) -> None:
    daemon.cli("deploy", str(holder(daemon)))
    hardware.health(0, ecc=1)
    hardware.health(1, hang=1)
    with pytest.raises(WoodfrogError) as e:
        daemon.call("holder", "Holder.check")
    assert e.value.code == "gpu-set-aside"
    assert f"{CHIP} {hardware.uuids[0]}: 1 uncorrectable" in e.value.message
    assert "did not return in time" in e.value.message and "woodfrog gpu list" in e.value.message
    hardware.health(1)
    assert check(daemon)["visible"] == hardware.uuids[1], "the next call finds it well again"


def test_a_gpu_that_others_use_is_not_given_out(daemon: Daemon, hardware: Hardware) -> None:
    daemon.cli("deploy", str(holder(daemon)))
    other = subprocess.Popen(
        [sys.executable, "-c", GPU + f"gpu = Cuda()\nheld = gpu.put(bytes({30 * MIB}))\nprint(flush=True)\ninput()"],
        env={**os.environ, "LD_LIBRARY_PATH": str(hardware.folder), "CUDA_VISIBLE_DEVICES": "0"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert other.stdout is not None and other.stdout.readline()
        assert check(daemon)["visible"] == hardware.uuids[1]
        assert "others use 31 of its 96 MiB" in gpus(daemon)[hardware.uuids[0]]["why"]
    finally:
        other.communicate(b"\n")
    daemon.scale_to_zero()
    until(lambda: gpus(daemon)[hardware.uuids[0]]["state"] == "free", 40, 1.0)  # it is looked at again by itself
    assert check(daemon)["visible"] == hardware.uuids[0]


def test_each_chip_takes_its_own_snapshot(daemon: Daemon, hardware: Hardware) -> None:
    """A machine with two kinds of chips: neither is ever thawed from the other's."""
    daemon.cli("deploy", str(holder(daemon, ["A10", "FAKE100:2"])), "--snapshot")
    small = daemon.wait_snapshot("holder")
    at_once(daemon, 2, 0.5)  # one of them on the other chip: cold, and captured
    large = daemon.wait_snapshot("holder", other_than=[small])
    daemon.scale_to_zero()
    digests: dict[str, set[str]] = {}
    for _ in range(3):
        for found in at_once(daemon, 2, 0.5):
            digests.setdefault(found["visible"], set()).add(found["digest"])
        daemon.scale_to_zero()
    assert set(digests) == {hardware.uuids[2], ",".join(hardware.uuids[:2])}
    assert all(len(of_chip) == 1 for of_chip in digests.values()), "thawed each time"
    assert daemon.snapshots("holder") == [small, large] and "did not thaw" not in daemon.app_text("holder")


def test_any_gpu_is_first_one_with_a_snapshot(daemon: Daemon, hardware: Hardware) -> None:
    hardware.health(0, ecc=1)
    hardware.health(1, ecc=1)
    daemon.cli("deploy", str(holder(daemon, "any")), "--snapshot")
    daemon.wait_snapshot("holder")
    digest = check(daemon)["digest"]
    daemon.scale_to_zero()
    hardware.health(0)
    hardware.health(1)
    gpus(daemon, "check")
    found = check(daemon)
    assert found["visible"] == hardware.uuids[2] and found["digest"] == digest
    daemon.scale_to_zero()
    daemon.stop()
    daemon.start()
    assert check(daemon)["digest"] == digest, "found by its chip"


def test_a_capture_that_fails_runs_on(daemon: Daemon, hardware: Hardware) -> None:
    hardware.configure("fault cuCheckpointProcessCheckpoint fail=801 1 1")
    daemon.cli("deploy", str(holder(daemon)))
    first = check(daemon)
    assert "cannot checkpoint" in daemon.app_text("holder")
    assert check(daemon)["digest"] == first["digest"], "the same process"
    assert daemon.snapshots("holder") == []
    daemon.scale_to_zero()
    assert check(daemon)["digest"] != first["digest"]
    daemon.wait_snapshot("holder")


FAULTS = ("fail=999", "fail=2", "late=304", "kill")
CALLS = {
    "lock": "cuCheckpointProcessLock",
    "checkpoint": "cuCheckpointProcessCheckpoint",
    "restore": "cuCheckpointProcessRestore",
    "unlock": "cuCheckpointProcessUnlock",
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("move", CALLS)
def test_each_fault_at_each_call(daemon: Daemon, hardware: Hardware, move: str) -> None:
    """Once it fails, in the driver's caller or in the process: a right answer or a clear error, and afterwards
    everything goes as it should: nothing is left locked, or on the GPU."""
    daemon.cli("deploy", str(holder(daemon)), "--snapshot")
    snapshot = daemon.wait_snapshot("holder")
    where = CALLS[move], f"target.{move}"
    # By turns in the driver's caller and in the process; the other half takes minutes, and tests/contract has them all.
    faults = [f"{where[(n + list(CALLS).index(move)) % 2]} {action}" for n, action in enumerate(FAULTS)]
    if os.environ.get("WOODFROG_SLOW") == "1":
        faults = [f"{call} {action}" for action in FAULTS for call in where]
    for fault in faults:
        if move in ("lock", "checkpoint"):
            daemon.cli("snapshot", "invalidate", snapshot, "--yes")
        daemon.scale_to_zero()
        hardware.configure(f"fault {fault} 1 1")
        try:
            digest = check(daemon)["digest"]
            assert check(daemon)["digest"] == digest, "the same process, unharmed"
        except WoodfrogError as e:
            assert e.code.startswith("gpu-") and e.message, f"{fault}: {e.code} {e.message}"
        assert (hardware.control / f"count-{fault.split()[0]}").exists(), f"{fault} did not come"
        hardware.configure()
        daemon.scale_to_zero()
        until(lambda: not _live(hardware, 0) and not _live(hardware, 1))
        before = check(daemon)["digest"]
        try:
            snapshot = daemon.wait_snapshot("holder")
        except AssertionError:
            raise AssertionError(f"{fault}: no snapshot\n{daemon.app_text('holder')[-4000:]}") from None
        daemon.scale_to_zero()
        assert check(daemon)["digest"] == before, f"{fault}: not thawed"


@pytest.mark.timeout(200)
@pytest.mark.slow
def test_a_driver_that_hangs_is_a_cold_start(daemon: Daemon, hardware: Hardware) -> None:
    daemon.cli("deploy", str(holder(daemon)), "--snapshot")
    daemon.wait_snapshot("holder")
    daemon.scale_to_zero()
    hardware.configure("fault cuCheckpointProcessRestore hang 1 1")
    found: dict[str, Any] = daemon.call("holder", "Holder.check", timeout=120, wait=0)
    assert found["intact"] and "did not return in time" in daemon.app_text("holder")
    assert daemon.get("/health")["pid"]


def test_a_killed_daemon_leaves_nothing_on_the_gpu(daemon: Daemon, hardware: Hardware) -> None:
    daemon.cli("deploy", str(holder(daemon)), "--snapshot")
    digest = check(daemon)["digest"]
    assert daemon.process is not None and _live(hardware, 0)
    children = Path(f"/proc/{daemon.process.pid}/task/{daemon.process.pid}/children").read_text().split()
    helpers = [c for c in children if "woodfrog.cuda.helper" in Path(f"/proc/{c}/cmdline").read_text()]
    assert len(helpers) == 1
    daemon.kill()
    until(lambda: not _live(hardware, 0) and not Path(f"/proc/{helpers[0]}").exists())
    daemon.start()
    assert check(daemon)["digest"] == digest, "thawed from what the killed daemon had stored"
    events = max((daemon.home / "events").glob("*.ndjson"), key=lambda p: p.stat().st_mtime)
    daemon.scale_to_zero()
    daemon.stop()
    assert replay_main([str(events)]) == 0


def test_a_chip_that_is_not_here(daemon: Daemon) -> None:
    daemon.cli("deploy", str(holder(daemon, "H100")))
    with pytest.raises(WoodfrogError) as e:
        daemon.call("holder", "Holder.check")
    assert e.value.code == "no-gpu" and CHIP in e.value.message and "gpu=H100" in e.value.message


def test_another_machine_thaws_it_from_the_tier(hardware: Hardware) -> None:
    """With an empty state directory, and other GPUs of the same chip; where the driver is another, it boots."""
    tier = Path(tempfile.mkdtemp(prefix="wf-tier-", dir="/var/tmp"))
    env = {"WOODFROG_CUDA_DIR": str(hardware.folder), "WOODFROG_TIER": str(tier)}
    try:
        with Daemon(**env) as first:
            first.cli("deploy", str(holder(first)))
            captured = check(first)
            (row,) = until(lambda: [s for s in first.kept() if s["app"] and s["pushed"]])
            key = first.json("snapshot", "trust", "list")["own"]["text"]
            working_set = (first.home / "snapshots" / row["id"] / WORKING_SET).read_bytes()[16:]
            pages = sum(count for _, count, _ in struct.iter_unpack("iIQ", working_set))
            assert pages * 4096 > 24 * MIB, "device memory is in it, and so here before the thaw"
        other = exchanged(hardware)
        assert not set(other.uuids) & set(hardware.uuids)
        with Daemon(**env) as second:
            second.cli("snapshot", "trust", "add", "--yes", key)
            second.cli("deploy", str(holder(second)))
            assert second.snapshots("holder") == []
            thawed = check(second)
            assert thawed["digest"] == captured["digest"], "the same bytes: thawed, not loaded anew"
            assert thawed["visible"] == other.uuids[0] != captured["visible"]
            assert thawed["uuid"] == other.uuids[0].removeprefix("GPU-").replace("-", "")
            (container,) = second.json("container", "list")
            phases = {p["name"] for p in second.json("container", "inspect", container["id"])["phases"]}
            assert {"look-up", "fetch", "gpu.restore", "gpu.unlock"} <= phases and "boot" not in phases
            until(lambda: second.snapshots("holder") == [row["id"]])
            second.scale_to_zero()
            assert check(second)["digest"] == captured["digest"], "and from here the next time"
        other.configure("driver 590")
        with Daemon(**env) as third:
            third.cli("snapshot", "trust", "add", "--yes", key)
            third.cli("deploy", str(holder(third)))
            assert check(third)["digest"] != captured["digest"]
    finally:
        shutil.rmtree(tier)


def exchanged(hardware: Hardware) -> Hardware:
    """The same chips in another machine: other uuids, the library at the same place."""
    shutil.rmtree(hardware.folder)
    return Hardware(hardware.folder, gpus=hardware.gpus, first=64)


def test_without_the_gpu_by_request(daemon: Daemon) -> None:
    """`WOODFROG_GPU=none`: no device, and no snapshot that has one is taken."""
    program = daemon.program(HOLDER.format(gpu="any", more="").replace("self.gpu = Cuda()", "return"))
    program.with_name("fakegpu.py").write_text(GPU)
    daemon.cli("deploy", str(program), env={"WOODFROG_GPU": "none"})
    with pytest.raises(AssertionError, match="AttributeError"):
        daemon.call("holder", "Holder.check")
    assert daemon.call("holder", "plain") == [None]


def test_the_guides_programs(daemon: Daemon, hardware: Hardware) -> None:
    program = daemon.program(SEEDS)
    torch = program.with_name("torch")
    torch.mkdir()
    for name, text in TORCH.items():
        (torch / name).write_text(text)
    program.with_name("sentence_transformers.py").write_text(SENTENCE_TRANSFORMERS)
    assert daemon.cli("run", f"{program}::GPUAvailability.demo").stdout.splitlines() == [
        "GPUs available: False", "GPUs available: True", "GPUs available: True",
    ]  # fmt: skip
    assert daemon.cli("run", f"{program}::my_gpu_func").stdout == "GPUs available: True\n"
    done = daemon.cli("run", str(program))
    assert len(set(done.stdout.splitlines())) == 1 and len(done.stdout.splitlines()) == 2, done.stdout
    daemon.cli("deploy", str(program), "--snapshot")
    for function in ("GPUAvailability.demo", "my_gpu_func"):
        assert '"restore"' in daemon.cli("call", f"sentence-transformers.{function}", "--json").stdout
    assert not _live(hardware, 0)
