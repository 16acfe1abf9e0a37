"""The wrapper of the driver's checkpoint calls against a driver that fails, hangs and runs out to order.

Nothing here is a GPU: what these tests show holds for the order of the calls and for what becomes of the processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fake_cuda.hardware import MIB, Hardware
from fake_cuda.program import GPU
from woodfrog.backends import gpus as backend
from woodfrog.backends.gpus import Gpus
from woodfrog.cuda.client import Cuda
from woodfrog.cuda.devices import Device
from woodfrog.cuda.health import Vitals
from woodfrog.cuda.states import MOVES, Move, State
from woodfrog.errors import GpuError

WORKER = (
    GPU
    + """
import sys
gpu = Cuda()
data = bytes(range(256)) * 4096 * int(sys.argv[1])
held = gpu.put(data)
print("ready", flush=True)
for line in sys.stdin:
    if line.startswith("kernel"):
        print("launched", flush=True)
        gpu.ok("fakeKernel", int(line.split()[1]))
    print(gpu.get(held) == data, gpu.uuid(), flush=True)
"""
)
LIFE: tuple[Move, ...] = ("lock", "checkpoint", "restore", "unlock")
CALLS: dict[Move, str] = {m: f"cuCheckpointProcess{m.capitalize()}" for m in MOVES}


class Worker:
    """A process with so many MiB of device memory."""

    def __init__(self, hardware: Hardware, mib: int = 1, **env: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(mib)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "LD_LIBRARY_PATH": str(hardware.folder), **env},
        )
        assert self.read() == "ready"
        self.pid = self.process.pid

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def say(self, line: str = "check") -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def intact(self) -> bool:
        self.say()
        return self.read().startswith("True")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()


@pytest.fixture
def hardware(tmp_path: Path) -> Hardware:
    return Hardware(tmp_path / "cuda", gpus=(("NVIDIA FAKE100", 16 * MIB),) * 2)


@pytest.fixture
def worker(hardware: Hardware) -> Iterator[Worker]:
    made = Worker(hardware)
    yield made
    made.end()


@pytest.fixture
async def cuda(hardware: Hardware) -> AsyncIterator[Cuda]:
    made = Cuda(library=hardware.folder, ask_s=1.0, vitals_s=1.0, lock_s=0.5, move_s=1.0, start_s=20)
    await made.start()
    yield made
    await made.close()


async def walk(cuda: Cuda, pid: int, *moves: Move) -> None:
    for move in moves:
        await cuda.move(pid, move)


async def test_the_node(cuda: Cuda, hardware: Hardware) -> None:
    node = await cuda.start()
    assert node.version == 13000 and node.driver == "580.00.00" and node.checkpoints
    assert [(d.uuid, d.name, d.memory, d.minor, d.mig) for d in node.devices] == [
        (uuid, "NVIDIA FAKE100", 16 * MIB, i, False) for i, uuid in enumerate(hardware.uuids)
    ]


async def test_the_whole_life(cuda: Cuda, hardware: Hardware, worker: Worker) -> None:
    assert await cuda.state(worker.pid) is State.RUNNING and await cuda.state(os.getpid()) is None
    hardware.configure("hidden 1")
    assert await cuda.held(worker.pid) is None
    hardware.configure()
    held = await cuda.held(worker.pid)
    assert held is not None and held >= MIB and hardware.memory_of(0) == held
    for move in LIFE:
        assert await cuda.move(worker.pid, move) is MOVES[move][1]
        devices = [os.readlink(p) for p in Path(f"/proc/{worker.pid}/fd").iterdir()]
        on_gpu = any(str(hardware.dev) in d for d in devices)
        assert on_gpu is (await cuda.state(worker.pid) is not State.CHECKPOINTED) is bool(hardware.memory_of(0))
    assert worker.intact()


async def test_how_a_gpu_is(cuda: Cuda, hardware: Hardware, worker: Worker) -> None:
    first, second = hardware.uuids
    well = await cuda.vitals(second)
    assert well == Vitals(uncorrected=0, memory=16 * MIB, used=0)
    assert (await cuda.vitals(first)).used == hardware.memory_of(0) >= MIB
    for told, found in (
        ({"ecc": 3}, replace(well, uncorrected=3)),
        ({"pending": 1}, replace(well, remap_pending=True)),
        ({"failed": 1}, replace(well, remap_failed=True)),
        ({"retired": 1}, replace(well, retired_pending=True)),
    ):
        hardware.health(1, **told)
        assert await cuda.vitals(second) == found
    hardware.health(1, lost=1)
    assert (await cuda.vitals(second)).lost
    hardware.health(1, reset=1)
    assert (await cuda.vitals(second)).reset and not (await cuda.vitals(first)).reset


async def test_a_gpu_that_nvml_hangs_on(cuda: Cuda, hardware: Hardware, worker: Worker) -> None:
    hardware.health(1, hang=1)
    with pytest.raises(GpuError) as e:
        await cuda.vitals(hardware.uuids[1])
    assert e.value.code == "gpu-helper-hung" and hardware.uuids[1] in e.value.message
    assert (await cuda.vitals(hardware.uuids[0])).memory == 16 * MIB
    assert await cuda.state(worker.pid) is State.RUNNING


async def test_errors_that_the_driver_reports(cuda: Cuda, hardware: Hardware, worker: Worker) -> None:
    heard: asyncio.Queue[tuple[str, int]] = asyncio.Queue()
    cuda.on_xid = lambda uuid, xid: heard.put_nowait((uuid, xid))
    hardware.xid(1, 79)
    hardware.xid(0, 31)
    assert await asyncio.wait_for(heard.get(), 10) == (hardware.uuids[1], 79)
    assert await asyncio.wait_for(heard.get(), 10) == (hardware.uuids[0], 31)
    assert await cuda.state(worker.pid) is State.RUNNING, "and it answers as ever"


async def test_illegal_moves_are_named(cuda: Cuda, worker: Worker) -> None:
    for done in range(5):
        state = await cuda.state(worker.pid)
        for move in set(LIFE) - {m for m, (before, _) in MOVES.items() if before is state}:
            with pytest.raises(GpuError) as e:
                await cuda.move(worker.pid, move)
            assert e.value.code == "gpu-illegal-move" and await cuda.state(worker.pid) is state
        if done < 4:
            await cuda.move(worker.pid, LIFE[done])
    assert worker.intact()


async def test_what_is_locked_waits(cuda: Cuda, worker: Worker) -> None:
    await cuda.move(worker.pid, "lock")
    worker.say()
    answer = asyncio.ensure_future(asyncio.to_thread(worker.read))
    await asyncio.sleep(0.2)
    assert not answer.done()
    await cuda.move(worker.pid, "unlock")
    assert (await answer).startswith("True")


async def test_a_lock_has_a_bound(cuda: Cuda, worker: Worker) -> None:
    worker.say("kernel 1500")
    assert await asyncio.to_thread(worker.read) == "launched"
    await asyncio.sleep(0.05)
    with pytest.raises(GpuError) as e:
        await cuda.move(worker.pid, "lock")
    assert e.value.code == "gpu-busy" and await cuda.state(worker.pid) is State.RUNNING
    assert (await asyncio.to_thread(worker.read)).startswith("True")
    await walk(cuda, worker.pid, *LIFE)


async def test_another_gpu_takes_its_place(cuda: Cuda, hardware: Hardware, worker: Worker) -> None:
    first, second = hardware.uuids
    await walk(cuda, worker.pid, "lock", "checkpoint")
    await cuda.move(worker.pid, "restore", pairs=[(first, second), (second, first)])
    await cuda.move(worker.pid, "unlock")
    worker.say()
    assert worker.read() == f"True {second.removeprefix('GPU-').replace('-', '')}"
    assert not hardware.memory_of(0) and hardware.memory_of(1)


async def test_a_map_that_leaves_a_gpu_out(cuda: Cuda, hardware: Hardware, worker: Worker) -> None:
    first, second = hardware.uuids
    await walk(cuda, worker.pid, "lock", "checkpoint")
    with pytest.raises(GpuError) as e:
        await cuda.move(worker.pid, "restore", pairs=[(first, second)])
    assert e.value.code == "gpu-driver" and "CUDA_ERROR_INVALID_VALUE" in e.value.message
    await walk(cuda, worker.pid, "restore", "unlock")
    assert worker.intact()


async def test_out_of_memory_at_a_restore_is_for_ever(cuda: Cuda, hardware: Hardware, worker: Worker) -> None:
    await walk(cuda, worker.pid, "lock", "checkpoint")
    other = Worker(hardware, mib=14)
    try:
        with pytest.raises(GpuError) as e:
            await cuda.move(worker.pid, "restore")
        assert e.value.code == "gpu-out-of-memory" and e.value.fields["pid"] == worker.pid
        assert await cuda.state(worker.pid) is State.CHECKPOINTED
    finally:
        other.end()
    with pytest.raises(GpuError) as e:
        await cuda.move(worker.pid, "restore")
    assert e.value.code == "gpu-driver" and "CUDA_ERROR_OPERATING_SYSTEM" in e.value.message


async def test_what_a_dead_process_had_is_free(cuda: Cuda, hardware: Hardware) -> None:
    for _ in range(3):
        one = Worker(hardware, mib=12)
        assert one.intact()
        one.end()


FAULTS = {
    "fail=2": "gpu-out-of-memory",
    "fail=401": "gpu-illegal-move",
    "fail=600": "gpu-busy",
    "fail=801": "gpu-unsupported",
    "fail=999": "gpu-driver",
    "late=304": "gpu-driver",
    "hang": "gpu-helper-hung",
}


@pytest.mark.parametrize("action", FAULTS)
@pytest.mark.parametrize("move", LIFE)
@pytest.mark.parametrize("where", ["caller", "target"])
async def test_each_fault_at_each_call(
    cuda: Cuda, hardware: Hardware, worker: Worker, move: Move, action: str, where: str
) -> None:
    """A clear error within its bound; then the way back, where there is one, leaves the process as it was."""
    await walk(cuda, worker.pid, *LIFE[: LIFE.index(move)])
    call = CALLS[move] if where == "caller" else f"target.{move}"
    hardware.configure(f"fault {call} {action} 1 1")
    begin = time.monotonic()
    with pytest.raises(GpuError) as e:
        await cuda.move(worker.pid, move)
    assert time.monotonic() - begin < 8
    assert e.value.code == FAULTS[action], e.value.message
    hardware.configure()
    if where == "target" and action == "hang":
        # Its own thread hangs: nobody can ask it any more, and a new helper says so instead of hanging too.
        with pytest.raises(GpuError) as e:
            await cuda.state(worker.pid)
        assert e.value.code == "gpu-helper-hung"
        return
    state = await cuda.state(worker.pid)
    assert state is not None
    before, then = MOVES[move]
    assert state is (then if action.startswith("late") else before)
    rest = {State.RUNNING: 0, State.LOCKED: 3, State.CHECKPOINTED: 2}[state]
    await walk(cuda, worker.pid, *(LIFE[rest:] if rest else ()))
    assert worker.intact()


@pytest.mark.parametrize("call", ["cuCheckpointProcessGetState", "target.state"])
async def test_a_state_that_is_not_told(cuda: Cuda, hardware: Hardware, worker: Worker, call: str) -> None:
    hardware.configure(f"fault {call} fail=999 1 1")
    with pytest.raises(GpuError) as e:
        await cuda.move(worker.pid, "lock")
    assert e.value.code == "gpu-driver"
    assert await cuda.state(worker.pid) is State.RUNNING and worker.intact()


async def test_a_target_that_dies_in_a_call(cuda: Cuda, hardware: Hardware, worker: Worker) -> None:
    await cuda.move(worker.pid, "lock")
    hardware.configure("fault target.checkpoint kill")
    with pytest.raises(GpuError) as e:
        await cuda.move(worker.pid, "checkpoint")
    assert e.value.code == "gpu-driver"
    worker.process.wait()
    with pytest.raises(GpuError) as e:
        await cuda.move(worker.pid, "checkpoint")
    assert e.value.code == "gpu-not-cuda"


async def test_one_that_hangs_takes_no_other_call_with_it(cuda: Cuda, hardware: Hardware, worker: Worker) -> None:
    other = Worker(hardware)
    try:
        other.say("kernel 300")
        assert await asyncio.to_thread(other.read) == "launched"
        hardware.configure("fault target.unlock hang 1 1")
        await cuda.move(worker.pid, "lock")
        stuck = asyncio.ensure_future(cuda.move(worker.pid, "unlock"))
        await asyncio.sleep(0.8)
        slow = await cuda.move(other.pid, "lock")  # in the same helper, while that one hangs
        assert slow is State.LOCKED
        with pytest.raises(GpuError) as e:
            await stuck
        assert e.value.code == "gpu-helper-hung"
        assert await cuda.move(other.pid, "unlock") is State.RUNNING
    finally:
        other.end()


async def test_a_helper_that_is_killed(cuda: Cuda, worker: Worker) -> None:
    assert cuda._helper is not None
    pid = cuda._helper.process.pid
    os.kill(pid, signal.SIGSTOP)
    call = asyncio.ensure_future(cuda.state(worker.pid))
    await asyncio.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(GpuError) as e:
        await call
    assert e.value.code == "gpu-helper-lost"
    assert await cuda.state(worker.pid) is State.RUNNING


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        (("version 12060",), "gpu-driver-old"),
        (("fault cuInit fail=999",), "gpu-driver"),
        (("fault cuInit hang",), "gpu-helper-hung"),
        (("fault cuDeviceGetCount fail=3",), "gpu-driver"),
    ],
)
async def test_a_driver_that_cannot(hardware: Hardware, worker: Worker, lines: tuple[str, ...], code: str) -> None:
    hardware.configure(*lines)
    cuda = Cuda(library=hardware.folder, start_s=3.0, ask_s=1.0)
    try:
        with pytest.raises(GpuError) as e:
            await cuda.start()
            await cuda.state(worker.pid)
        assert e.value.code == code
    finally:
        await cuda.close()


async def test_a_driver_without_the_calls(tmp_path: Path) -> None:
    old = Hardware(tmp_path / "old", old=True)
    cuda = Cuda(library=old.folder)
    one = Worker(old)
    try:
        await cuda.start()
        with pytest.raises(GpuError) as e:
            await cuda.move(one.pid, "lock")
        assert e.value.code == "gpu-driver-old"
    finally:
        one.end()
        await cuda.close()


async def test_no_driver_at_all(tmp_path: Path) -> None:
    if Path("/dev/nvidiactl").exists():
        pytest.skip("there is a driver here")
    cuda = Cuda(library=tmp_path)
    with pytest.raises(GpuError) as e:
        await cuda.start()
    assert e.value.code == "gpu-no-driver" and "woodfrog[gpu]" in e.value.message
    await cuda.close()


async def test_the_helper_finds_packages_where_the_daemon_does(
    tmp_path: Path, hardware: Hardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "more/cuda").mkdir(parents=True)
    (tmp_path / "more/cuda/__init__.py").write_text("raise ImportError('another one')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "more"))
    cuda = Cuda(library=hardware.folder)
    with pytest.raises(GpuError) as e:
        await cuda.start()
    assert e.value.code == "gpu-no-driver" and "another one" in e.value.message
    await cuda.close()


async def test_no_helper_is_left(hardware: Hardware, worker: Worker) -> None:
    cuda = Cuda(library=hardware.folder, ask_s=0.5)
    await cuda.start()
    hardware.configure("fault cuCheckpointProcessGetState hang")
    pids = []
    for _ in range(2):
        await cuda._running()
        assert cuda._helper is not None
        pids.append(cuda._helper.process.pid)
        with pytest.raises(GpuError):
            await cuda.state(worker.pid)
    await cuda.close()
    await asyncio.sleep(0.2)
    assert not [p for p in pids if Path(f"/proc/{p}/cmdline").exists() and Path(f"/proc/{p}/cmdline").read_text()]


async def test_nodes_that_are_not_there_before_the_driver_starts(
    hardware: Hardware, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backend, "DEV", tmp_path)
    monkeypatch.setattr(backend, "MODULE", tmp_path / "version")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(hardware.folder))
    assert "no NVIDIA device" in (await backend.find_gpus("", "")).why
    (tmp_path / "version").touch()
    (tmp_path / "nvidiactl").mkdir(mode=0o700)
    with caplog.at_level(logging.WARNING, "woodfrog"):
        found = await backend.find_gpus("", "")
    try:
        assert [d.uuid for d in found.devices] == list(hardware.uuids)
    finally:
        await found.close()
    assert f"there is no {tmp_path}/nvidia0: " in caplog.text and "nvidia-modprobe" in caplog.text
    assert f"{tmp_path}/nvidiactl is not open to all users" in caplog.text
    hardware.configure("fault cuInit fail=100")
    assert "CUDA_ERROR_NO_DEVICE" in (await backend.find_gpus("", "")).why


def test_without_nvml_nodes_are_taken_in_their_order(tmp_path: Path) -> None:
    for name in ("nvidia3", "nvidia5", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    devices = (Device("GPU-a", "H200", 1), Device("GPU-b", "H200", 1), Device("GPU-c", "H200", 1, minor=3))
    gpus = Gpus(None, devices, tmp_path)
    assert [n.name for n in gpus.device_nodes(["GPU-b"])] == ["nvidiactl", "nvidia-uvm", "nvidia5"]
    assert gpus.numbers() == {"GPU-a": 3, "GPU-b": 5, "GPU-c": 3}


async def test_the_driver_answers_as_the_real_one_where_there_is_no_process_of_its_own() -> None:
    """A caller that has not started the driver, or may not look into the process: our calls rely on these answers."""
    ask = "state = _ct.c_int(); print(lib.cuCheckpointProcessGetState(int(sys.argv[1]), _ct.byref(state)))"
    code = f"import sys\n{GPU}\nlib = _ct.CDLL('libcuda.so.1')\n{ask}\nCuda()\n{ask}"

    def answers(pid: int, uid: int) -> list[int]:
        # As another user it is the system's own Python: ours may lie where that user cannot look.
        python = sys.executable if uid == 0 else "/usr/bin/python3"
        done = subprocess.run(
            [python, "-I", "-c", code, str(pid)], env={"LD_LIBRARY_PATH": str(hardware.folder)},
            user=uid, group=uid, extra_groups=(), capture_output=True, text=True,
        )  # fmt: skip
        return [*map(int, done.stdout.split())]

    with contextlib.ExitStack() as stack:
        # Where every user can look, as pytest's directories are not.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/var/tmp")))
        folder.chmod(0o755)
        hardware = Hardware(folder / "cuda")
        sleeping = stack.enter_context(subprocess.Popen(["sleep", "60"]))
        stack.callback(sleeping.kill)
        assert answers(sleeping.pid, 0) == [3, 3] and answers(4194303, 0) == [3, 1]
        if os.path.exists("/usr/bin/python3"):
            assert answers(sleeping.pid, 64646) == [3, 304]
