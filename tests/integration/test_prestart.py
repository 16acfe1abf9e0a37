"""Programs that wait before their main(), CRIU among them; restores that stop before the first instruction."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest

from engine_rig import Rig
from integration.sandboxes import Yard
from woodfrog.engine.engine import prestart, restore
from woodfrog.linux import procfs
from woodfrog.linux.rootplan import root_plan
from woodfrog.linux.sandbox import ProcessSpec, Sandbox
from woodfrog.telemetry import Phases

pytestmark = pytest.mark.root

SHELL = ProcessSpec(("/bin/sh", "-c", 'echo "$$ $#: $*"; env; ls /run/woodfrog; exit 7', "sh", "a b", "c"), caps="held")


@pytest.fixture
async def yard() -> AsyncIterator[Yard]:
    yard = Yard.make()
    try:
        yield yard
    finally:
        await yard.close()


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    made = Rig.make(tmp_path)
    yield made
    await made.close()


def others(sandbox: Sandbox) -> list[int]:
    """Pids inside, but for init's."""
    found = []
    for pid in procfs.tree(sandbox.init_pid):
        with suppress(ProcessLookupError, FileNotFoundError):  # it goes while it is looked at
            found += [procfs.status(pid).ns_pids[-1]] if pid != sandbox.init_pid else []
    return found


async def test_it_runs_as_if_it_had_been_started_now(yard: Yard) -> None:
    sandbox = await yard.prepare()
    await sandbox.prestart(SHELL)
    await sandbox.assemble(root_plan(yard.request(sandbox), yard.host))  # the root changes under it
    assert others(sandbox) == [2]
    variables = {"PATH": "/usr/bin:/bin", "WORD": "frog=1"}
    done = await sandbox.run(ProcessSpec(SHELL.argv, variables, caps="held"), 30)
    lines = done.stdout.decode().splitlines()
    assert done.status == 7 and done.stderr == b""
    assert lines[0] == "2 2: a b c"
    assert "WORD=frog=1" in lines and not any(line.startswith("LD_PRELOAD") for line in lines)
    assert "worker" in lines
    again = await sandbox.run(ProcessSpec(SHELL.argv, variables, caps="held"), 30)
    assert again.status == 7 and not again.stdout.startswith(b"2 ")


async def test_another_program_is_not_mistaken_for_it(yard: Yard) -> None:
    sandbox = await yard.sandbox()
    await sandbox.prestart(SHELL)
    for other in (
        ProcessSpec(("/bin/bash", "-c", "echo $$"), caps="held"),
        ProcessSpec(("/bin/sh", "-c", "echo $$"), caps="none"),
        ProcessSpec(("/bin/sh", "-c", "echo $$"), caps="held", umask=0o077),
    ):
        assert (await sandbox.run(other, 30)).stdout != b"2\n"
    await sandbox.drop_prestarted()
    await sandbox.drop_prestarted()
    assert others(sandbox) == []


async def test_one_that_died_is_done_without(yard: Yard) -> None:
    sandbox = await yard.sandbox()
    await sandbox.prestart(SHELL)
    await sandbox.signal(2, signal.SIGKILL)
    while others(sandbox):
        await asyncio.sleep(0.01)
    assert (await sandbox.run(SHELL, 30)).status == 7
    await sandbox.prestart(SHELL)
    await sandbox.destroy()


PROGRAM = """
import subprocess
ticks = 0
def tick():
    global ticks
    while True:
        ticks += 1
        time.sleep(0.005)
threading.Thread(target=tick, daemon=True).start()
child = subprocess.Popen(["sleep", "1000"])
check = lambda: (ticks, child.poll())
"""


@pytest.mark.criu
async def test_a_waiting_criu_restores_and_leaves_all_stopped(rig: Rig) -> None:
    sandbox, _ = await rig.start(PROGRAM)
    await rig.ask(sandbox)
    frozen = await rig.freeze(sandbox)
    counts = []
    for pause in (0.0, 1.0):
        sandbox = await rig.sandbox(layers=(frozen.fs,), shm=frozen.shm)
        await prestart(sandbox, rig.criu)
        assert others(sandbox) == [2]
        await restore(sandbox, images=frozen.images, criu=rig.criu, phases=Phases(), stopped=True)
        assert 2 not in others(sandbox) and len(others(sandbox)) == 2
        tasks = [p for p in procfs.tree(sandbox.init_pid) if p != sandbox.init_pid]
        await asyncio.sleep(pause)
        assert {procfs.stat(p).state for p in tasks} == {"T"}
        await sandbox.signal(-1, signal.SIGCONT)
        count, child = eval(await rig.ask(sandbox))
        assert child is None
        counts.append(count)
    assert abs(counts[0] - counts[1]) < 60  # not 200 more in a second
