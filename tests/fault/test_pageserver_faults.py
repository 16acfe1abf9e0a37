"""Page servers and processes that die, files that are wrong, memory that is full: never a wrong byte, never a hang."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import struct
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from e2e.harness import Daemon, until
from integration.pages_rig import UID, Victim, compile_c, cpu_s
from integration.test_pageserver import page_server, some_of
from woodfrog.errors import SandboxError
from woodfrog.linux import cgroups
from woodfrog.linux.cgroups import Limits
from woodfrog.linux.pageserver import NEVER, PageServer

pytestmark = [pytest.mark.root]

SOURCE = Path(__file__).parents[1] / "integration" / "pageserver_victim.c"


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_c(tmp_path_factory.mktemp("victim") / "victim", SOURCE, "-O1")


@pytest.fixture
async def spare(victim: Path, tmp_path: Path) -> AsyncIterator[list[Victim]]:
    """Killed at the end, whatever happens."""
    started: list[Victim] = []
    yield started
    for process in started:
        await process.kill()


async def serves_well(server: PageServer, victim: Path, folder: Path) -> None:
    process = await Victim.start(victim, folder, operations=200, pages=256)
    process.serve(server)
    await process.expect("done")
    assert await process.end() == 0
    assert process.served is not None
    await process.served.drop()


async def test_killed_page_server_leaves_processes_waiting(victim: Path, tmp_path: Path, spare: list[Victim]) -> None:
    """At random moments of ten restores: nothing reads zeroes, and what waits can be killed."""
    rng = random.Random(5)
    for n in range(10):
        died = asyncio.Event()
        server = await PageServer.start(uid=UID, on_death=died.set)
        process = await Victim.start(victim, tmp_path / f"v{n}", operations=4000, threads=3, seed=n)
        spare.append(process)
        served = process.serve(server, working_set=some_of(process.folder, 3) if n % 2 else None)
        await served.safe()
        await asyncio.sleep(rng.random() * 0.1)
        os.kill(server.pid, signal.SIGKILL)
        await asyncio.wait_for(died.wait(), 5)
        assert served.failed.result() == "the page server died" and not server.alive
        await asyncio.sleep(0.2)
        if process.process.returncode is not None:  # it had all it wanted
            assert process.process.returncode == 0
        process.process.kill()
        assert await asyncio.wait_for(process.process.wait(), 5) == -signal.SIGKILL, await process.words()
        assert await served.drop() == (0, 0, 0) and not served._held
        await server.close()


async def test_dropped_and_killed_at_any_time(victim: Path, tmp_path: Path, spare: list[Victim]) -> None:
    rng = random.Random(6)
    async with page_server() as server:

        async def one(n: int) -> None:
            process = await Victim.start(victim, tmp_path / f"v{n}", operations=4000, threads=2, seed=n)
            spare.append(process)
            served = process.serve(server, working_set=some_of(process.folder, 2), drain_ms=n % 3)
            await asyncio.sleep(rng.random() * 0.05)
            if n % 2:
                process.process.kill()
                await asyncio.sleep(rng.random() * 0.01)
            # A process that lives on reads zeroes from here on, as the daemon knows: it drops only the dead.
            await served.drop()
            await process.kill()

        for _ in range(3):
            await asyncio.gather(*(one(rng.randrange(1 << 30)) for _ in range(8)))
        before = len(os.listdir("/proc/self/fd"))
        await serves_well(server, victim, tmp_path / "last")
        assert len(os.listdir("/proc/self/fd")) <= before
        # Neither does the server keep any: control socket, epoll and wake-up of each thread, standard ones.
        assert len(os.listdir(f"/proc/{server.pid}/fd")) <= 4 + 2 * 16


async def test_files_that_are_wrong(victim: Path, tmp_path: Path, spare: list[Victim]) -> None:
    async with page_server() as server:
        # An index of more than the pages file has; one of another kind of file.
        for n, damage in enumerate((lambda f: os.truncate(f / "pages1", 4096), lambda f: os.truncate(f / "index", 40))):
            process = await Victim.start(victim, tmp_path / f"v{n}")
            spare.append(process)
            damage(process.folder)
            served = process.serve(server)
            assert "Invalid argument" in await asyncio.wait_for(served.failed, 5)
            await served.drop()
        # A working set of nonsense is left out.
        process = await Victim.start(victim, tmp_path / "set", pages=256)
        spare.append(process)
        served = process.serve(server, working_set=struct.pack("=QII", int.from_bytes(b"FROGSET1", "little"), 7, 0))
        assert (await asyncio.wait_for(served.ready, 5))[0] == 0
        await process.expect("done")
        assert await process.end() == 0
        # Cut while it is served: no byte is made up.
        for everything in (False, True):
            process = await Victim.start(victim, tmp_path / f"cut-{everything}", pages=4096)
            spare.append(process)
            held = os.open(process.folder / "pages1", os.O_RDWR)
            go, process.go = process.go, lambda: None  # type: ignore[method-assign]
            served = process.serve(server, everything=everything)
            await asyncio.sleep(0.1)
            os.ftruncate(held, 1 << 20)
            os.close(held)
            go()
            assert "Input/output error" in await asyncio.wait_for(served.failed, 5)
            if everything:
                with pytest.raises(SandboxError, match="Input/output error"):
                    await served.whole()
            assert not served.out_of_memory
            await served.drop()
        await serves_well(server, victim, tmp_path / "last")


async def test_full_memory_cgroup(victim: Path, tmp_path: Path, spare: list[Victim]) -> None:
    """The kernel kills the process, or the page server says that there is no memory: it never waits for ever."""
    groups = cgroups.detect(f"p{os.getpid():x}{os.urandom(2).hex()}")
    group = groups.create("small", Limits(memory_bytes=6 << 20))
    try:
        async with page_server() as server:
            process = await Victim.start(victim, tmp_path / "v", pages=4096, threads=2)
            spare.append(process)
            for path in group.attach_paths():
                path.write_text(str(process.process.pid))
            served = process.serve(server)
            ended = asyncio.ensure_future(process.process.wait())
            await asyncio.wait({ended, served.failed}, timeout=10, return_when=asyncio.FIRST_COMPLETED)
            assert ended.done() or served.failed.done(), "it waits for ever"
            if served.failed.done():
                assert "Cannot allocate memory" in served.failed.result() and served.out_of_memory
            else:
                assert ended.result() == -signal.SIGKILL and group.oom_kills() > 0
            await process.kill()
            await ended
            await served.drop()
            await serves_well(server, victim, tmp_path / "last")
    finally:
        await group.destroy()


BLKIO = Path("/sys/fs/cgroup/blkio")


@pytest.fixture
def slow_disk(tmp_path: Path) -> Iterator[Path]:
    """A cgroup whose processes read very slowly from the disk that the test's files are on."""
    device = os.stat(tmp_path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    if not (BLKIO / "blkio.throttle.read_bps_device").exists():
        pytest.skip("needs the blkio controller of cgroup v1")
    group = BLKIO / f"woodfrog-{os.getpid():x}{os.urandom(2).hex()}"
    group.mkdir()
    try:
        try:
            (group / "blkio.throttle.read_bps_device").write_text(f"{number} 1000000")
        except OSError:
            pytest.skip("needs a directory for temporary files on a disk")
        yield group
    finally:
        for pid in (group / "cgroup.procs").read_text().split():
            (BLKIO / "cgroup.procs").write_text(pid)
        group.rmdir()


def forget(folder: Path) -> None:
    """Out of the page cache."""
    for path in folder.glob("pages*"):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


async def test_a_slow_disk_delays_only_those_who_need_it(
    victim: Path, tmp_path: Path, spare: list[Victim], slow_disk: Path
) -> None:
    """More processes wait for the disk than the page server has threads; others are served as ever."""
    many = 2 * min(max(2, os.cpu_count() or 2), 16)
    async with page_server() as server:
        (slow_disk / "cgroup.procs").write_text(str(server.pid))
        slow = []
        for n in range(many):
            process = await Victim.start(victim, tmp_path / f"s{n}", pages=2048, seed=n)
            spare.append(process)
            forget(process.folder)
            working_set, everything = (some_of(process.folder, 3) if n % 3 == 1 else None), n % 3 == 2
            process.serve(server, working_set=working_set, everything=everything, drain_ms=0 if n % 2 else NEVER)
            slow.append(process)
        await asyncio.sleep(0.3)
        before = cpu_s(server.pid)
        await asyncio.sleep(0.3)
        assert cpu_s(server.pid) - before < 0.1, "it does not wait, it asks again and again"
        begin = time.monotonic()
        for n in range(4):
            await serves_well(server, victim, tmp_path / f"w{n}")
        took = time.monotonic() - begin
        assert not any(s.served.complete for s in slow if s.served), f"the disk was not slow: {took:.1f} s"
        # When the disk is fast again, they get what they waited for.
        device = (slow_disk / "blkio.throttle.read_bps_device").read_text().split()[0]
        (slow_disk / "blkio.throttle.read_bps_device").write_text(f"{device} 0")
        for process in slow:
            await process.expect("done")
            assert await process.end() == 0, await process.words()
            assert process.served is not None
            await process.served.drop()


APP = """
import time, zlib
import woodfrog

app = woodfrog.App("pages")

@app.cls(enable_memory_snapshot=True)
class Big:
    @woodfrog.enter(snap=True)
    def load(self):
        self.blocks = [bytes([i % 251]) * 65536 for i in range(1024)]
        self.sum = 0
        for b in self.blocks:
            self.sum = zlib.crc32(b, self.sum)

    @woodfrog.method()
    def check(self, spread):
        found = 0
        for i, b in enumerate(self.blocks):
            found = zlib.crc32(b, found)
            if spread and i % 64 == 0:
                time.sleep(0.02)
        return found == self.sum
"""


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with Daemon(WOODFROG_DRAIN_MS="-1") as made:
        made.cli("deploy", str(made.program(APP)))
        yield made


@pytest.mark.slow
@pytest.mark.criu
def test_page_server_killed_at_random_moments_of_ten_thaws(daemon: Daemon) -> None:
    assert daemon.call("pages", "Big.check", spread=False) is True
    daemon.wait_snapshot("pages")
    rng = random.Random(7)

    def stop_all() -> None:
        for container in daemon.get("/containers")["containers"]:
            daemon.cli("container", "stop", container["id"], check=False)  # it may be gone by now
        daemon.wait_idle()

    killed = 0
    for _ in range(10):
        stop_all()
        server = daemon.page_server()
        done = threading.Event()

        def kill(server: int | None = server, delay: float = rng.random() * 0.6, done: threading.Event = done) -> None:
            end = time.monotonic() + 5
            while server is None and time.monotonic() < end and not done.is_set():
                server = daemon.page_server()
            time.sleep(delay)
            if server is not None:
                os.kill(server, signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        assert daemon.call("pages", "Big.check", spread=True, timeout=60) is True
        done.set()
        killer.join()
        killed += "page server died" in daemon.log.read_text()
    assert killed
    stop_all()
    # The next thaw has a new one, and the snapshot was not blamed.
    assert daemon.call("pages", "Big.check", spread=False) is True
    assert until(daemon.page_server)
    assert len(daemon.snapshots("pages")) == 1
