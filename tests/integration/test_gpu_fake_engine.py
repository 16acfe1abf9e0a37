"""Freezing and thawing processes that hold device memory of a fake GPU, with real CRIU in real sandboxes.

None of it says how fast or whether a real GPU does the same: docs/gpu.md says what ran on what.
"""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from engine_rig import Rig
from fake_cuda.hardware import MIB, Hardware
from fake_cuda.program import GPU
from woodfrog import faults
from woodfrog.cuda import client
from woodfrog.cuda.client import Cuda
from woodfrog.engine.engine import AmdSide, GpuSide, Lazy
from woodfrog.engine.plan import FACTS, parse_facts
from woodfrog.errors import CaptureError, RestoreError
from woodfrog.linux.pageserver import PageServer, make_set
from woodfrog.linux.rootplan import DeviceNode
from woodfrog.linux.sandbox import Sandbox
from woodfrog.telemetry import Phases

pytestmark = [pytest.mark.root, pytest.mark.criu]

CHIP = "NVIDIA FAKE100"
HOLDER = (
    GPU
    + """
import hashlib
gpu = Cuda()
data = os.urandom(8 << 20)
held = gpu.put(data)
digest = hashlib.sha256(data).hexdigest()
del data
n = 0
def check():
    global n
    n += 1
    return n, hashlib.sha256(gpu.get(held)).hexdigest() == digest, gpu.uuid()[-1]
"""
)
LOCKED = (
    HOLDER
    + """
pattern = os.urandom(1 << 20) * 4
inside = check
SETUP
def check():
    return inside(), bytes(memory) == pattern
"""
)
FAMILY = (
    "CODE = r'''"
    + GPU
    + """
import sys
gpu = Cuda(int(sys.argv[1]))
data = sys.argv[1].encode() * (1 << 20)
held = gpu.put(data)
print("ready", flush=True)
for line in sys.stdin:
    print(gpu.get(held) == data, gpu.uuid()[-1], flush=True)
'''
"""
    + GPU
    + """
both = [Cuda(0), Cuda(1)]
mine = [(g, g.put(bytes([i]) * 3000000), bytes([i]) * 3000000) for i, g in enumerate(both)]
plain = subprocess.Popen(["sleep", "1000"])
children = [subprocess.Popen([sys.executable, "-c", CODE, str(i)], stdin=-1, stdout=-1, text=True) for i in (0, 1)]
assert all(c.stdout.readline() == "ready\\n" for c in children)
def ask(c):
    c.stdin.write("x\\n"); c.stdin.flush()
    return c.stdout.readline().strip()
def check():
    return [g.get(held) == data for g, held, data in mine], [ask(c) for c in children], plain.poll()
"""
)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    made = Rig.make(tmp_path)
    made.hardware = Hardware(tmp_path / "cuda", gpus=((CHIP, 64 * MIB), (CHIP, 64 * MIB), ("NVIDIA OTHER", 64 * MIB)))
    yield made
    await made.close()


@pytest.fixture
async def cuda(rig: Rig) -> AsyncIterator[Cuda]:
    assert rig.hardware is not None
    made = Cuda(library=rig.hardware.folder, ask_s=2, lock_s=1, move_s=3, context_bytes=MIB)
    yield made
    await made.close()


def side(rig: Rig, cuda: Cuda, *gpus: int) -> GpuSide:
    assert rig.hardware is not None
    return GpuSide(cuda, tuple(rig.hardware.uuids[i] for i in gpus))


def hardware_of(rig: Rig) -> Hardware:
    assert rig.hardware is not None
    return rig.hardware


async def answers(rig: Rig, sandbox: Sandbox, expected: str) -> None:
    assert await rig.ask(sandbox) == expected


async def test_freeze_and_thaw(rig: Rig, cuda: Cuda) -> None:
    sandbox, _ = await rig.start(HOLDER, gpus=(0,))
    await answers(rig, sandbox, "(1, True, '0')")
    assert hardware_of(rig).memory_of(0) >= 8 * MIB
    phases = Phases()
    frozen = await rig.freeze(sandbox, phases=phases, gpu=side(rig, cuda, 0))
    assert hardware_of(rig).memory_of(0) == 0
    assert frozen.result.gpu_bytes >= 8 * MIB and frozen.result.pages_bytes > frozen.result.gpu_bytes
    facts = parse_facts((frozen.images / FACTS).read_text())
    assert facts.gpu is not None and facts.gpu.visible == hardware_of(rig).uuids[:1] and len(facts.gpu.node) == 3
    for _ in range(2):
        thawed, _ = await rig.thaw(frozen, phases=phases, gpu=side(rig, cuda, 0), gpus=(0,))
        await answers(rig, thawed, "(2, True, '0')")
    assert {"gpu.lock", "gpu.checkpoint", "gpu.check", "gpu.restore", "gpu.unlock"} <= {p.name for p in phases.items}
    assert hardware_of(rig).memory_of(0) >= 16 * MIB


async def test_a_process_that_nvml_does_not_list_has_its_time(
    rig: Rig, cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container's NVML knows processes by other pids: the bound goes by what is in use of the GPU."""
    monkeypatch.setattr(client, "BYTES_PER_S", 1.5 * MIB)
    sandbox, _ = await rig.start(HOLDER, gpus=(0,))
    await answers(rig, sandbox, "(1, True, '0')")
    hardware_of(rig).configure("hidden 1", f"rate {2 * MIB}")  # 4.5 s: more than what is always given
    frozen = await rig.freeze(sandbox, gpu=side(rig, cuda, 0))
    thawed, _ = await rig.thaw(frozen, gpu=side(rig, cuda, 0), gpus=(0,))
    await answers(rig, thawed, "(2, True, '0')")


async def test_frozen_again_after_a_thaw(rig: Rig, cuda: Cuda) -> None:
    sandbox, _ = await rig.start(HOLDER, gpus=(0,))
    await answers(rig, sandbox, "(1, True, '0')")
    for turn in range(2, 5):
        frozen = await rig.freeze(sandbox, gpu=side(rig, cuda, 0))
        sandbox, _ = await rig.thaw(frozen, gpu=side(rig, cuda, 0), gpus=(0,))
        await answers(rig, sandbox, f"({turn}, True, '0')")


@pytest.mark.parametrize("line", ["map 0", "map 1"])
async def test_on_another_gpu_of_the_chip(rig: Rig, cuda: Cuda, line: str) -> None:
    hardware_of(rig).configure(line)
    sandbox, _ = await rig.start(HOLDER, gpus=(0,))
    await answers(rig, sandbox, "(1, True, '0')")
    frozen = await rig.freeze(sandbox, gpu=side(rig, cuda, 0))
    thawed, _ = await rig.thaw(frozen, gpu=side(rig, cuda, 1), gpus=(1,))
    await answers(rig, thawed, "(2, True, '1')")
    assert hardware_of(rig).memory_of(0) == 0 < hardware_of(rig).memory_of(1)


async def test_a_family_with_several_gpus(rig: Rig, cuda: Cuda) -> None:
    sandbox, _ = await rig.start(FAMILY, gpus=(0, 1))
    expected = "([True, True], ['True {}', 'True {}'], None)"
    await answers(rig, sandbox, expected.format(0, 1))
    frozen = await rig.freeze(sandbox, gpu=side(rig, cuda, 0, 1))
    facts = parse_facts((frozen.images / FACTS).read_text())
    assert facts.gpu is not None and len(facts.gpu.processes) == 3 and facts.tasks == 4
    thawed, _ = await rig.thaw(frozen, gpu=side(rig, cuda, 1, 0), gpus=(0, 1))
    await answers(rig, thawed, expected.format(1, 0))


async def test_memory_follows_the_processes(rig: Rig, cuda: Cuda) -> None:
    """The driver reads what it saved while the page server still has it."""
    sandbox, _ = await rig.start(HOLDER, gpus=(0,))
    await answers(rig, sandbox, "(1, True, '0')")
    frozen = await rig.freeze(sandbox, gpu=side(rig, cuda, 0))
    server = await PageServer.start(uid=64647, on_death=lambda: None)
    try:
        lazy = Lazy(server)
        thawed, _ = await rig.thaw(frozen, gpu=side(rig, cuda, 0), gpus=(0,), lazy=lazy)
        await answers(rig, thawed, "(2, True, '0')")
        assert lazy.served is not None
        _, faults, demanded = await lazy.served.drop()
        assert faults and demanded * 4096 >= 8 * MIB
    finally:
        await server.close()


async def test_memory_that_is_page_locked(rig: Rig, cuda: Cuda) -> None:
    """The driver locks it again in the restore, which memory that is still to come does not stand."""
    sandbox, _ = await rig.start(LOCKED.replace("SETUP", "memory = gpu.lock(pattern)"), gpus=(0,))
    await answers(rig, sandbox, "((1, True, '0'), True)")
    frozen = await rig.freeze(sandbox, gpu=side(rig, cuda, 0))
    server = await PageServer.start(uid=64647, on_death=lambda: None)
    try:
        with pytest.raises(RestoreError) as e:
            await rig.thaw(frozen, gpu=side(rig, cuda, 0), gpus=(0,), lazy=Lazy(server))
        assert e.value.code == "gpu-driver" and "CUDA_ERROR_OPERATING_SYSTEM" in e.value.message
        lazy = Lazy(server, everything=True)
        thawed, _ = await rig.thaw(frozen, gpu=side(rig, cuda, 0), gpus=(0,), lazy=lazy)
        await answers(rig, thawed, "((2, True, '0'), True)")
    finally:
        await server.close()


async def test_a_driver_that_saves_into_shared_memory(rig: Rig, cuda: Cuda) -> None:
    """As its own page-locked memory is. CRIU itself brings such memory back, before the processes run."""
    hardware_of(rig).configure("shared 1")
    sandbox, _ = await rig.start(LOCKED.replace("SETUP", "memory = gpu.host(pattern)"), gpus=(0,))
    await answers(rig, sandbox, "((1, True, '0'), True)")
    frozen = await rig.freeze(sandbox, gpu=side(rig, cuda, 0))
    assert frozen.result.gpu is not None and frozen.result.gpu_bytes >= 8 * MIB
    server = await PageServer.start(uid=64647, on_death=lambda: None)
    try:
        for lazy in (None, Lazy(server)):
            thawed, _ = await rig.thaw(frozen, gpu=side(rig, cuda, 0), gpus=(0,), lazy=lazy)
            await answers(rig, thawed, "((2, True, '0'), True)")
    finally:
        await server.close()


async def test_all_device_memory_comes_first(rig: Rig, cuda: Cuda, tmp_path: Path) -> None:
    """Where the driver put it is known, so that not even the first thaw waits for it page by page."""
    sandbox, _ = await rig.start(FAMILY, gpus=(0, 1))
    expected = "([True, True], ['True 0', 'True 1'], None)"
    await answers(rig, sandbox, expected)
    frozen = await rig.freeze(sandbox, gpu=side(rig, cuda, 0, 1))
    assert frozen.result.gpu is not None
    by_process = {pid: 0 for pid, _ in frozen.result.gpu.processes}
    for pid, begin, end in frozen.result.gpu.memory:
        by_process[pid] += end - begin
    assert all(by_process[pid] >= size - MIB // 4 for pid, size in frozen.result.gpu.processes)
    guess = tmp_path / "guess"
    guess.write_bytes(make_set(frozen.result.gpu.memory))
    server = await PageServer.start(uid=64647, on_death=lambda: None)
    try:
        lazy = Lazy(server, guess)
        thawed, _ = await rig.thaw(frozen, gpu=side(rig, cuda, 0, 1), gpus=(0, 1), lazy=lazy)
        await answers(rig, thawed, expected)
        assert lazy.served is not None
        pushed, _, demanded = await lazy.served.drop()
        # On a busy machine the driver asks for some of it before it is there.
        assert frozen.result.gpu_bytes // 2 < pushed * 4096 < frozen.result.gpu_bytes + 4 * MIB
        assert (pushed + demanded) * 4096 >= frozen.result.gpu_bytes - MIB
    finally:
        await server.close()


async def test_memory_that_no_longer_follows(rig: Rig, cuda: Cuda) -> None:
    """The page server dies while the driver is at work: nobody waits for what will not come."""
    sandbox, _ = await rig.start(HOLDER, gpus=(0,))
    await answers(rig, sandbox, "(1, True, '0')")
    frozen = await rig.freeze(sandbox, gpu=side(rig, cuda, 0))
    await cuda.close()
    slow = Cuda(library=hardware_of(rig).folder, move_s=30)
    await slow.start()
    hardware_of(rig).configure("fault target.restore hang")
    server = await PageServer.start(uid=64647, on_death=lambda: None)
    try:
        thaw = asyncio.ensure_future(rig.thaw(frozen, gpu=side(rig, slow, 0), gpus=(0,), lazy=Lazy(server)))
        while not (hardware_of(rig).control / "count-target.restore").exists():
            await asyncio.sleep(0.02)
            assert not thaw.done(), thaw.exception()
        begin = asyncio.get_running_loop().time()
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        for child in children:
            if Path(f"/proc/{child}/comm").read_text().startswith("woodfrog-pages"):
                os.kill(int(child), signal.SIGKILL)
        with pytest.raises(RestoreError) as e:
            await thaw
        assert e.value.code == "memory-not-served", e.value.message
        assert asyncio.get_running_loop().time() - begin < 10
        await rig.nothing_runs(rig.sandboxes[-1])
    finally:
        await server.close()
        await slow.close()


async def test_without_the_gpu_it_is_refused(rig: Rig, cuda: Cuda) -> None:
    sandbox, _ = await rig.start(HOLDER, gpus=(0,))
    await answers(rig, sandbox, "(1, True, '0')")
    with pytest.raises(CaptureError) as e:
        await rig.freeze(sandbox)
    assert e.value.code == "gpu-device" and e.value.alive
    await answers(rig, sandbox, "(2, True, '0')")


async def test_a_process_that_is_not_checkpointed_loses_its_memory(
    rig: Rig, cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the fake has in common with a GPU, and what the engine's refusals are for."""
    sandbox, _ = await rig.start(HOLDER, gpus=(0,))
    await answers(rig, sandbox, "(1, True, '0')")
    monkeypatch.setattr("woodfrog.engine.engine.refuse", lambda *a, **k: None)
    frozen = await rig.freeze(sandbox)
    thawed, _ = await rig.thaw(frozen, gpus=(0,))
    assert "CUDA error 709" in await rig.ask(thawed)


REFUSED = {
    "gpu-fork": "child = os.fork()\nif child == 0:\n    time.sleep(1000)\n",
    "gpu-mig": "cap = open('/dev/nvidia-caps-9', 'w+')\n",
    "gpu-graphics": "mode = open('/dev/nvidia-modeset', 'w+')\n",
    "gpu-mps": "os.makedirs('/tmp/nvidia-mps'); mps = open('/tmp/nvidia-mps/control', 'w+')\n",
    "gpu-peers": (
        "f = open('/dev/shm/nccl-abc', 'w+b'); f.truncate(4096); m = mmap.mmap(f.fileno(), 4096)\n"
    ),
}  # fmt: skip


@pytest.mark.parametrize("code", REFUSED)
async def test_refused_by_name(rig: Rig, cuda: Cuda, code: str) -> None:
    original = Rig.devices

    def devices(self: Rig, gpus: tuple[int, ...]) -> tuple[object, ...]:
        found = original(self, gpus)
        for name in ("nvidia-caps-9", "nvidia-modeset"):
            path = hardware_of(rig).dev / name
            path.touch()
            path.chmod(0o666)
            found = (*found, replace(found[1], source=path, name=name))
        return found

    Rig.devices = devices  # type: ignore[method-assign,assignment]
    try:
        sandbox, _ = await rig.start(HOLDER + REFUSED[code], gpus=(0,))
    finally:
        Rig.devices = original  # type: ignore[method-assign]
    await answers(rig, sandbox, "(1, True, '0')")
    with pytest.raises(CaptureError) as e:
        await rig.freeze(sandbox, gpu=side(rig, cuda, 0))
    assert e.value.code == code and e.value.alive and e.value.fields["remedy"], e.value.message
    await answers(rig, sandbox, "(2, True, '0')")


FAILURES = {
    "lock": ("fault cuCheckpointProcessLock fail=999", "gpu-driver"),
    "lock-late": ("fault cuCheckpointProcessLock late=999", "gpu-driver"),
    "lock-hangs": ("fault cuCheckpointProcessLock hang", "gpu-helper-hung"),
    "unsupported": ("fault cuCheckpointProcessCheckpoint fail=801", "gpu-unsupported"),
    "checkpoint": ("fault target.checkpoint fail=304", "gpu-driver"),
    "checkpoint-late": ("fault cuCheckpointProcessCheckpoint late=304", "gpu-driver"),
    "checkpoint-hangs": ("fault cuCheckpointProcessCheckpoint hang 1 1", "gpu-helper-hung"),
}


@pytest.mark.parametrize("what", FAILURES)
async def test_a_failed_capture_leaves_it_running(rig: Rig, cuda: Cuda, what: str) -> None:
    sandbox, _ = await rig.start(FAMILY, gpus=(0, 1))
    expected = "([True, True], ['True 0', 'True 1'], None)"
    await answers(rig, sandbox, expected)
    await cuda.start()
    line, code = FAILURES[what]
    hardware_of(rig).configure(line if "hang 1" in line else f"{line} 2 1")
    with pytest.raises(CaptureError) as e:
        await rig.freeze(sandbox, gpu=side(rig, cuda, 0, 1))
    assert (e.value.code, e.value.alive, e.value.fields["phase"]) == (code, True, "gpu"), e.value.fields
    hardware_of(rig).configure()
    await answers(rig, sandbox, expected)
    frozen = await rig.freeze(sandbox, gpu=side(rig, cuda, 0, 1))
    thawed, _ = await rig.thaw(frozen, gpu=side(rig, cuda, 0, 1), gpus=(0, 1))
    await answers(rig, thawed, expected)


async def test_a_checkpoint_that_saves_nothing_is_noticed(rig: Rig, cuda: Cuda) -> None:
    sandbox, _ = await rig.start(HOLDER, gpus=(0,))
    await answers(rig, sandbox, "(1, True, '0')")
    hardware_of(rig).configure("lossy 1")
    with pytest.raises(CaptureError) as e:
        await rig.freeze(sandbox, gpu=side(rig, cuda, 0))
    assert e.value.code == "gpu-bytes-missing" and not e.value.alive, e.value.message
    await rig.nothing_runs(sandbox)


async def test_not_all_that_is_held_has_to_be_saved(rig: Rig, cuda: Cuda) -> None:
    """The stacks of kernels, for one, which NVML counts too."""
    hardware_of(rig).configure(f"scratch {4 * MIB}")
    sandbox, _ = await rig.start(HOLDER, gpus=(0,))
    await answers(rig, sandbox, "(1, True, '0')")
    frozen = await rig.freeze(sandbox, gpu=side(rig, cuda, 0))
    assert frozen.result.gpu_bytes < 10 * MIB


@pytest.mark.parametrize("point", ["dump.before=raise", "dump.criu=kill-criu"])
async def test_what_fails_later_is_taken_back_to_the_gpu(rig: Rig, cuda: Cuda, point: str) -> None:
    sandbox, _ = await rig.start(FAMILY, gpus=(0, 1))
    expected = "([True, True], ['True 0', 'True 1'], None)"
    await answers(rig, sandbox, expected)
    faults.configure(point)
    try:
        with pytest.raises(CaptureError) as e:
            await rig.freeze(sandbox, gpu=side(rig, cuda, 0, 1))
    finally:
        faults.configure("")
    if e.value.alive:
        await answers(rig, sandbox, expected)
        assert hardware_of(rig).memory_of(0)
    else:
        assert "kill" in point
        await rig.nothing_runs(sandbox)


async def test_a_process_that_cannot_be_brought_back_is_ended(rig: Rig, cuda: Cuda) -> None:
    sandbox, _ = await rig.start(HOLDER, gpus=(0,))
    await answers(rig, sandbox, "(1, True, '0')")
    hardware_of(rig).configure("fault target.checkpoint hang")
    with pytest.raises(CaptureError) as e:
        await rig.freeze(sandbox, gpu=side(rig, cuda, 0))
    assert e.value.code == "gpu-helper-hung" and not e.value.alive and e.value.fields["cleanup"]
    await rig.nothing_runs(sandbox)


async def _frozen_holder(rig: Rig, cuda: Cuda) -> Callable[..., object]:
    sandbox, _ = await rig.start(HOLDER, gpus=(0,))
    await answers(rig, sandbox, "(1, True, '0')")
    frozen = await rig.freeze(sandbox, gpu=side(rig, cuda, 0))

    async def thaw(*gpus: int, gpu: bool = True) -> str:
        shown = gpus or (0,)
        thawed, _ = await rig.thaw(frozen, gpu=side(rig, cuda, *shown) if gpu else None, gpus=shown)
        return await rig.ask(thawed)

    return thaw


RESTORES = {
    "out-of-memory": ("fault target.restore fail=2", "gpu-out-of-memory"),
    "late": ("fault cuCheckpointProcessRestore late=304", "gpu-driver"),
    "hangs": ("fault target.restore hang", "gpu-helper-hung"),
    "unlock": ("fault cuCheckpointProcessUnlock fail=999", "gpu-driver"),
    "dies": ("fault target.restore kill", "gpu-driver"),
    "old": ("version 12060", "gpu-driver-old"),
}


@pytest.mark.parametrize("what", RESTORES)
async def test_a_failed_restore_leaves_nothing(rig: Rig, cuda: Cuda, what: str) -> None:
    thaw = await _frozen_holder(rig, cuda)
    line, code = RESTORES[what]
    hardware_of(rig).configure(line)
    if what == "old":
        await cuda.close()  # a helper knows the version it began with
    with pytest.raises(RestoreError) as e:
        await thaw()  # type: ignore[misc]
    assert e.value.code == code and not e.value.snapshot_at_fault, e.value.message
    await rig.nothing_runs(rig.sandboxes[-1])
    hardware_of(rig).configure()
    if what == "old":
        await cuda.close()
    assert await thaw() == "(2, True, '0')"  # type: ignore[misc]


async def test_a_gpu_that_is_full(rig: Rig, cuda: Cuda) -> None:
    thaw = await _frozen_holder(rig, cuda)
    hog = HOLDER.replace("8 << 20", "58 << 20")
    crowd, _ = await rig.start(hog, gpus=(0,))
    await answers(rig, crowd, "(1, True, '0')")
    with pytest.raises(RestoreError) as e:
        await thaw()  # type: ignore[misc]
    assert e.value.code == "gpu-out-of-memory" and "free memory" in e.value.message
    assert await thaw(1) == "(2, True, '1')"  # type: ignore[misc]
    await answers(rig, crowd, "(2, True, '0')")


async def test_a_chip_of_another_kind(rig: Rig, cuda: Cuda) -> None:
    thaw = await _frozen_holder(rig, cuda)
    for attempt, code in ((thaw(2), "gpu-chip"), (thaw(gpu=False), "gpu-needed")):
        with pytest.raises(RestoreError) as e:
            await attempt  # type: ignore[misc]
        assert e.value.code == code


async def test_it_grows_only_as_it_should(rig: Rig, cuda: Cuda) -> None:
    """No descriptor and no process is left of a freeze, ten times over."""
    sandbox, _ = await rig.start(HOLDER, gpus=(0,))
    await answers(rig, sandbox, "(1, True, '0')")
    before = len(os.listdir("/proc/self/fd"))
    for turn in range(2, 7):
        frozen = await rig.freeze(sandbox, gpu=side(rig, cuda, 0))
        sandbox, _ = await rig.thaw(frozen, gpu=side(rig, cuda, 0), gpus=(0,))
        await answers(rig, sandbox, f"({turn}, True, '0')")
        await asyncio.sleep(0)
    assert len(os.listdir("/proc/self/fd")) <= before + 8


async def test_a_rocm_process_without_criu_s_plugin(rig: Rig, tmp_path: Path) -> None:
    """What stands for /dev/kfd is another device, which CRIU captures by itself: only the way there is AMD's."""
    node = tmp_path / "kfd"
    os.mknod(node, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    node.chmod(0o666)
    rig.nodes = lambda gpus: (DeviceNode(node, "kfd"), DeviceNode(node, "dri/renderD128"))
    setup = (
        "held = [open('/dev/kfd', 'r+b', 0), open('/dev/dri/renderD128', 'r+b', 0)]\ndef check(): return len(held)\n"
    )
    there, missing = AmdSide(Path("/usr/share")), AmdSide(None)
    sandbox, _ = await rig.start(setup)
    await answers(rig, sandbox, "2")
    for given, code in ((missing, "gpu-amd-plugin"), (None, "gpu-device")):
        with pytest.raises(CaptureError) as e:
            await rig.freeze(sandbox, gpu=given)
        assert e.value.code == code and e.value.alive and e.value.fields["remedy"], e.value.message
        await answers(rig, sandbox, "2")
    frozen = await rig.freeze(sandbox, gpu=there)
    assert parse_facts((frozen.images / FACTS).read_text()).amd
    for given, code in ((missing, "gpu-amd-plugin"), (None, "gpu-needed")):
        with pytest.raises(RestoreError) as r:
            await rig.thaw(frozen, gpu=given)
        assert r.value.code == code and not r.value.snapshot_at_fault, r.value.message
    server = await PageServer.start(uid=64647, on_death=lambda: None)
    try:
        lazy = Lazy(server)
        thawed, _ = await rig.thaw(frozen, gpu=there, lazy=lazy)
        await answers(rig, thawed, "2")
        assert lazy.served is None, "all of it was read before"
    finally:
        await server.close()


def test_the_tests_for_real_gpus_find_one_and_pass() -> None:
    """As on a machine that has one: what they ask for is tried before there is one."""
    tests = Path(__file__).parents[1]
    command = [sys.executable, str(tests / "fake_cuda/machine.py"), "--mib", "600", sys.executable, "-m", "pytest"]
    done = subprocess.run(
        [*command, str(tests / "gpu/test_gpu_engine.py"), "-k", "freeze_and_thaw", "-p", "no:cacheprovider"],
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr


def test_a_program_for_real_gpus_that_ends_is_not_waited_for() -> None:
    tests = Path(__file__).parents[1]
    command = [sys.executable, str(tests / "fake_cuda/machine.py"), "--mib", "8", sys.executable, "-m", "pytest"]
    done = subprocess.run(
        [*command, str(tests / "gpu/test_gpu_engine.py"), "-k", "freeze_and_thaw", "-p", "no:cacheprovider"],
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 1 and "it ended" in done.stdout and "CUDA error 2" in done.stdout, done.stdout
