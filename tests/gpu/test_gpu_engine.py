"""What `test_gpu_fake_engine.py` shows of the fake, on an NVIDIA GPU."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from e2e.harness import Daemon
from engine_rig import Rig
from fake_cuda.program import GPU
from woodfrog import faults
from woodfrog.backends.gpus import Gpus, find_gpus
from woodfrog.cuda.states import State
from woodfrog.engine.engine import Lazy
from woodfrog.errors import CaptureError
from woodfrog.linux.pageserver import PageServer
from woodfrog.telemetry import Phases

pytestmark = [pytest.mark.gpu, pytest.mark.root, pytest.mark.criu]

HOLDER = (
    GPU
    + """
import hashlib
gpu = Cuda()
data = os.urandom(256 << 20)
held = gpu.put(data)
digest = hashlib.sha256(data).hexdigest()
part = data[:4 << 20]
locked = gpu.lock(part), gpu.host(part)
del data
n = 0
def check():
    global n
    n += 1
    return n, hashlib.sha256(gpu.get(held)).hexdigest() == digest and [bytes(m) for m in locked] == [part, part]
"""
)
PROGRAM = """
import hashlib, os
import woodfrog as modal
from gpuprogram import Cuda

app = modal.App("holder")

@app.cls(
    gpu="any", enable_memory_snapshot=True, experimental_options={"enable_gpu_snapshot": True}, block_network=True,
)
class Holder:
    @modal.enter(snap=True)
    def load(self):
        self.gpu = Cuda()
        data = os.urandom(256 << 20)
        self.held = self.gpu.put(data)
        self.digest = hashlib.sha256(data).hexdigest()

    @modal.method()
    def check(self):
        return [hashlib.sha256(self.gpu.get(self.held)).hexdigest(), self.digest]
"""


@pytest.fixture
async def gpus() -> AsyncIterator[Gpus]:
    found = await find_gpus("", "")
    assert found.devices, found.why
    yield found
    await found.close()


@pytest.fixture
async def rig(tmp_path: Path, gpus: Gpus) -> AsyncIterator[Rig]:
    made = Rig.make(tmp_path)
    made.nodes = lambda indexes: gpus.device_nodes([gpus.devices[i].uuid for i in indexes])
    yield made
    await made.close()


async def test_freeze_and_thaw(rig: Rig, gpus: Gpus) -> None:
    side = gpus.side([gpus.devices[0].uuid])
    sandbox, _ = await rig.start(HOLDER, gpus=(0,))
    assert await rig.ask(sandbox, patience=60) == "(1, True)"
    phases = Phases()
    frozen = await rig.freeze(sandbox, phases=phases, gpu=side)
    assert frozen.result.gpu_bytes >= 256 << 20
    for _ in range(2):
        thawed, _ = await rig.thaw(frozen, phases=phases, gpu=side, gpus=(0,))
        assert await rig.ask(thawed, patience=60) == "(2, True)"
    print([(p.name, p.ms) for p in phases.items if p.name.startswith("gpu.")])


async def from_the_page_server(rig: Rig, gpus: Gpus, *, everything: bool) -> None:
    side = gpus.side([gpus.devices[0].uuid])
    sandbox, _ = await rig.start(HOLDER, gpus=(0,))
    assert await rig.ask(sandbox, patience=60) == "(1, True)"
    frozen = await rig.freeze(sandbox, gpu=side)
    server = await PageServer.start(uid=64647, on_death=lambda: None)
    try:
        thawed, _ = await rig.thaw(frozen, gpu=side, gpus=(0,), lazy=Lazy(server, everything=everything))
        assert await rig.ask(thawed, patience=60) == "(2, True)"
    finally:
        await server.close()


async def test_memory_from_the_page_server(rig: Rig, gpus: Gpus) -> None:
    """All before the driver begins, as the daemon has it."""
    await from_the_page_server(rig, gpus, everything=True)


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    with Daemon() as made:
        yield made


def test_the_whole_life(daemon: Daemon) -> None:
    program = daemon.program(PROGRAM)
    program.with_name("gpuprogram.py").write_text(GPU)
    daemon.cli("deploy", str(program), "--snapshot")
    daemon.wait_snapshot("holder")
    digests = set()
    for _ in range(3):
        now, then = daemon.call("holder", "Holder.check")
        assert now == then
        digests.add(now)
        for container in daemon.get("/containers")["containers"]:
            daemon.cli("container", "stop", container["id"])
        daemon.wait_idle()
    assert len(digests) == 1


async def test_on_another_gpu_of_the_chip(rig: Rig, gpus: Gpus) -> None:
    if len({d.name for d in gpus.devices}) == len(gpus.devices):
        pytest.skip("needs two GPUs of one chip")
    one, other = next(
        (i, j) for i, a in enumerate(gpus.devices) for j, b in enumerate(gpus.devices) if i < j and a.name == b.name
    )
    sandbox, _ = await rig.start(HOLDER, gpus=(one,))
    assert await rig.ask(sandbox, patience=60) == "(1, True)"
    frozen = await rig.freeze(sandbox, gpu=gpus.side([gpus.devices[one].uuid]))
    thawed, _ = await rig.thaw(frozen, gpu=gpus.side([gpus.devices[other].uuid]), gpus=(other,))
    assert await rig.ask(thawed, patience=60) == "(2, True)"


async def test_without_the_gpu_it_is_refused(rig: Rig, gpus: Gpus) -> None:
    sandbox, process = await rig.start(HOLDER, gpus=(0,))
    assert await rig.ask(sandbox, patience=60) == "(1, True)"
    with pytest.raises(CaptureError) as e:
        await rig.freeze(sandbox)
    assert e.value.code == "gpu-device" and e.value.alive
    assert await rig.ask(sandbox) == "(2, True)"
    assert gpus.cuda is not None and await gpus.cuda.state(process.host_pid) is State.RUNNING


async def test_a_failed_capture_leaves_it_running(rig: Rig, gpus: Gpus) -> None:
    sandbox, _ = await rig.start(HOLDER, gpus=(0,))
    assert await rig.ask(sandbox, patience=60) == "(1, True)"
    faults.configure("dump.before=raise")
    try:
        with pytest.raises(CaptureError) as e:
            await rig.freeze(sandbox, gpu=gpus.side([gpus.devices[0].uuid]))
    finally:
        faults.configure("")
    assert e.value.alive and await rig.ask(sandbox, patience=60) == "(2, True)"


@pytest.mark.xfail(reason="the driver locks pages that are still to come", strict=False)
async def test_memory_that_follows_while_the_driver_works(rig: Rig, gpus: Gpus) -> None:
    """To know what a driver stands. The last one: where it hangs, it takes no time of the others."""
    await from_the_page_server(rig, gpus, everything=False)
