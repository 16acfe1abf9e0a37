"""The engine when things break in the middle: CRIU killed at any moment, a full disk, exceptions nobody expected."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from engine_rig import WORKER_PID, Rig
from woodfrog import faults
from woodfrog.engine import engine
from woodfrog.engine.engine import dump, restore
from woodfrog.errors import CaptureError, RestoreError
from woodfrog.linux import procfs
from woodfrog.telemetry import Phases

pytestmark = [pytest.mark.root, pytest.mark.criu]

PROGRAM = """
blob = bytearray(os.urandom(1 << 20)) * 48
import zlib
for _ in range(4): threading.Thread(target=threading.Event().wait, daemon=True).start()
echo = "import sys\\nfor l in sys.stdin: print(l.strip())"
child = subprocess.Popen([sys.executable, "-uc", echo], stdin=-1, stdout=-1, text=True)
def check():
    child.stdin.write("x\\n"); child.stdin.flush()
    return zlib.crc32(blob), threading.active_count(), child.stdout.readline()
"""


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    made = Rig.make(tmp_path)
    yield made
    faults.configure("")
    await made.close()


async def _dump(rig: Rig, sandbox: object, images: Path) -> None:
    await dump(sandbox, root_pid=WORKER_PID, images=images, criu=rig.criu, phases=Phases())  # type: ignore[arg-type]


def _bound(init_pid: int) -> bool:
    return any(m.target == "/run/woodfrog/img" for m in procfs.mountinfo(init_pid))


@pytest.mark.parametrize("fault", ["dump.before=raise", "dump.before=enospc"])
async def test_a_fault_before_the_dump_leaves_all_as_it_was(rig: Rig, fault: str) -> None:
    sandbox, _ = await rig.start(PROGRAM)
    before = await rig.ask(sandbox)
    images = rig.images()
    faults.configure(fault + "*1")
    with pytest.raises(CaptureError) as caught:
        await _dump(rig, sandbox, images)
    assert caught.value.alive and caught.value.fields["phase"] == "prepare" and "cleanup" not in caught.value.fields
    assert caught.value.code == ("disk-full" if "enospc" in fault else "engine-unexpected")
    assert not _bound(sandbox.init_pid) and await rig.ask(sandbox) == before
    # And the next try succeeds.
    frozen = await rig.freeze(sandbox)
    thawed, _ = await rig.thaw(frozen)
    assert await rig.ask(thawed) == before


async def test_a_fault_after_the_dump_knows_that_the_process_is_dead(rig: Rig) -> None:
    sandbox, process = await rig.start(PROGRAM)
    await rig.ask(sandbox)
    images = rig.images()
    faults.configure("dump.after=enospc")
    with pytest.raises(CaptureError) as caught:
        await _dump(rig, sandbox, images)
    assert not caught.value.alive and caught.value.code == "disk-full"
    assert await process.wait() == -signal.SIGKILL
    assert {p.suffix for p in images.iterdir()} <= {".log"} and not _bound(sandbox.init_pid)


@pytest.mark.parametrize("fault", ["restore.before=raise", "restore.after=raise", "restore.criu=kill-criu"])
async def test_a_fault_in_a_restore_leaves_nothing_running(rig: Rig, fault: str) -> None:
    sandbox, _ = await rig.start(PROGRAM)
    before = await rig.ask(sandbox)
    frozen = await rig.freeze(sandbox)
    faults.configure(fault + "*1")
    failing = await rig.sandbox(layers=(frozen.fs,), shm=frozen.shm)
    with pytest.raises(RestoreError) as caught:
        await restore(failing, images=frozen.images, criu=rig.criu, phases=Phases())
    assert not caught.value.snapshot_at_fault and "cleanup" not in caught.value.fields, caught.value.to_dict()
    if "kill" in fault:
        assert caught.value.code == "criu-killed"
    await rig.nothing_runs(failing)
    assert not _bound(failing.init_pid)
    thawed, _ = await rig.thaw(frozen)
    assert await rig.ask(thawed) == before


async def test_criu_killed_at_any_moment_leaves_the_processes_unharmed_or_known_dead(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {"alive": 0, "dead": 0, "done": 0}
    sandbox, process = await rig.start(PROGRAM)
    before = await rig.ask(sandbox)
    dice = random.Random(4)
    for turn in range(16):
        monkeypatch.setattr(engine, "KILL_AFTER_S", 0.002 + 0.007 * turn + dice.random() * 0.004)
        faults.configure("dump.criu=kill-criu*1")
        images = rig.images()
        try:
            await _dump(rig, sandbox, images)
        except CaptureError as e:
            assert not _bound(sandbox.init_pid) and "cleanup" not in e.fields, e.to_dict()
            assert e.code == "criu-killed", e.to_dict()
            if e.alive:
                seen["alive"] += 1
                assert process.status is None and await rig.ask(sandbox) == before
                assert not any("CRIU" in m.path for m in procfs.maps(process.host_pid))
                continue
            seen["dead"] += 1
            assert process.status is not None and process.status < 0
            await rig.nothing_runs(sandbox)
        else:
            seen["done"] += 1
        await sandbox.destroy()
        sandbox, process = await rig.start(PROGRAM)
        before = await rig.ask(sandbox)
    print(seen)
    assert seen["alive"] > 0
    # Whatever was left alive can still be frozen and thawed.
    faults.configure("")
    frozen = await rig.freeze(sandbox)
    thawed, _ = await rig.thaw(frozen)
    assert await rig.ask(thawed) == before


async def test_a_full_disk_is_named_and_the_process_runs_on(rig: Rig, tmp_path: Path) -> None:
    sandbox, _ = await rig.start(PROGRAM)
    before = await rig.ask(sandbox)
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m,mode=0700", "tmpfs", small], check=True)
    try:
        images = small / "img"
        images.mkdir(mode=0o700)
        with pytest.raises(CaptureError) as caught:
            await _dump(rig, sandbox, images)
        assert caught.value.code == "disk-full" and caught.value.alive, caught.value.to_dict()
        assert await rig.ask(sandbox) == before
        assert [p.name for p in images.iterdir()] == ["dump.log"], "the images still fill the disk"
    finally:
        subprocess.run(["umount", small], check=True)


async def test_a_dump_that_takes_too_long_is_cut_off(rig: Rig) -> None:
    sandbox, process = await rig.start(PROGRAM)
    before = await rig.ask(sandbox)
    with pytest.raises(CaptureError) as caught:
        await dump(sandbox, root_pid=WORKER_PID, images=rig.images(), criu=rig.criu, phases=Phases(), timeout=0.02)
    assert caught.value.code == "sandbox-timeout"
    if caught.value.alive:
        assert await rig.ask(sandbox) == before
    else:
        assert await asyncio.wait_for(process.wait(), 5) < 0


async def test_a_cancelled_dump_unbinds_its_directory(rig: Rig) -> None:
    sandbox, _ = await rig.start(PROGRAM)
    await rig.ask(sandbox)
    task = asyncio.create_task(_dump(rig, sandbox, rig.images()))
    while not _bound(sandbox.init_pid):
        await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not _bound(sandbox.init_pid)


async def test_link_remaps_of_a_dump_cut_off_are_removed(rig: Rig) -> None:
    setup = (
        "import multiprocessing as mp\nq = mp.get_context('spawn').Queue(); q.put(1); time.sleep(0.3)\n"
        "check = lambda: (q.get(timeout=5), q.put(1), time.sleep(0.1))[0]"
    )
    sandbox, _ = await rig.start(setup)
    assert await rig.ask(sandbox) == "1"
    faults.configure("dump.after=raise*1")
    with pytest.raises(CaptureError):
        await _dump(rig, sandbox, rig.images())
    assert not [n for n in os.listdir(sandbox.path("/dev/shm")) if n.startswith("link_remap")]
