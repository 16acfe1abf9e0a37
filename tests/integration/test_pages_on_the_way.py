"""A process whose pages are still on their way: it waits for them, or is ended, and never reads another byte."""

from __future__ import annotations

import asyncio
import errno
import os
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from integration.pages_rig import UID as SERVER_UID
from integration.pages_rig import Victim, compile_c, cpu_s, sanitized_server
from integration.test_pageserver import some_of
from woodfrog.linux.pageserver import NEVER, PageServer, Present
from woodfrog.store.partial import PresentMap

pytestmark = [pytest.mark.root]

PAGE = 4096
FILES = 3


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = Path(__file__).parent / "pageserver_victim.c"
    return compile_c(tmp_path_factory.mktemp("victim") / "victim", source, "-O1", "-g")


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    return sanitized_server(tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="module")
def present() -> Iterator[PresentMap]:
    made = PresentMap(1 << 20)
    yield made
    os.close(made.fd)


@asynccontextmanager
async def page_server(binary: Path | None = None) -> AsyncIterator[PageServer]:
    server = await PageServer.start(uid=SERVER_UID, on_death=lambda: None, binary=binary)
    try:
        yield server
        assert server.alive
    finally:
        await server.close()


class Slow:
    """Brings a victim's pages when they are asked for, a moment later and some more than was wanted; or not at all."""

    def __init__(self, server: PageServer, present: PresentMap, seed: int, longest_s: float = 0.004) -> None:
        self.server, self.present, self.longest_s = server, present, longest_s
        self.rng = random.Random(seed)
        self.files: list[tuple[int, int, bytes, int]] = []
        self.asked: list[tuple[int, int, bool]] = []
        self.gone = False
        server.on_need = self.need

    def add(self, folder: Path) -> Present:
        places = []
        for n in range(FILES):
            data = (folder / f"pages{n}").read_bytes()
            fd = os.open(folder / f"part{n}", os.O_RDWR | os.O_CREAT)
            os.ftruncate(fd, len(data))
            os.chmod(folder / f"part{n}", 0o644)
            pages = len(data) // PAGE
            place = self.present.take(pages)
            self.files.append((place, pages, data, fd))
            places.append(place)
        return Present(self.present.fd, tuple(places))

    def put(self, place: int, pages: int) -> None:
        for begin, count, data, fd in self.files:
            low, high = max(place, begin), min(place + pages, begin + count)
            if low < high:
                os.pwrite(fd, data[(low - begin) * PAGE : (high - begin) * PAGE], (low - begin) * PAGE)
                self.present.mark(low, high - low)

    def need(self, place: int, pages: int, asked: bool) -> None:
        self.asked.append((place, pages, asked))
        if self.gone:
            self.server.have(place, pages, errno.EIO)
            return

        def come() -> None:
            self.put(place - self.rng.randrange(9), pages + 8 + self.rng.randrange(64))
            self.server.have(place, pages)

        asyncio.get_running_loop().call_later(self.rng.random() * self.longest_s, come)


@pytest.mark.parametrize(
    ("drain_ms", "with_set", "around"), [(NEVER, False, 1 << 12), (NEVER, True, 1 << 16), (0, True, 1 << 14)]
)
async def test_random_operations(
    victim: Path,
    sanitized: Path | None,
    present: PresentMap,
    tmp_path: Path,
    drain_ms: int,
    with_set: bool,
    around: int,
) -> None:
    """As with files that are whole: every page read is what it must be, and nothing is served that is not here."""
    async with page_server(sanitized) as server:
        slow = Slow(server, present, around)
        for seed in range(4):
            process = await Victim.start(
                victim, tmp_path / f"v{seed}", seed=seed * 7 + around, operations=1500, threads=4
            )
            try:
                here = slow.add(process.folder)
                working_set = some_of(process.folder, 3) if with_set else None
                served = process.serve(
                    server,
                    drain_ms=drain_ms,
                    around=around,
                    working_set=working_set,
                    present=here,
                    files=("part0", "part1", "part2"),
                )
                await process.expect("done")
                pushed, _ = await asyncio.wait_for(served.ready, 10)
                assert (pushed > 0) == with_set
                assert await process.end() == 0, await process.words()
                assert not served.failed.done()
                await served.drop()
            finally:
                await process.kill()
        assert any(asked for _, _, asked in slow.asked)


async def test_many_at_once(victim: Path, sanitized: Path | None, present: PresentMap, tmp_path: Path) -> None:
    async with page_server(sanitized) as server:
        slow = Slow(server, present, 5, longest_s=0.05)

        async def one(n: int) -> None:
            process = await Victim.start(victim, tmp_path / f"v{n}", seed=n, operations=400, threads=2, pages=1024)
            try:
                served = process.serve(
                    server,
                    drain_ms=(NEVER, 0, 10)[n % 3],
                    working_set=some_of(process.folder, 2 + n % 3),
                    present=slow.add(process.folder),
                    files=("part0", "part1", "part2"),
                    everything=n % 4 == 3,
                )
                await process.expect("done")
                assert await process.end() == 0, await process.words()
                await served.drop()
            finally:
                await process.kill()

        await asyncio.gather(*(one(n) for n in range(12)))


async def test_one_that_waits_for_what_does_not_come(
    victim: Path, sanitized: Path | None, present: PresentMap, tmp_path: Path
) -> None:
    """It waits, and takes no time meanwhile; told that there is none, its restore fails and no other one."""
    async with page_server(sanitized) as server:
        slow = Slow(server, present, 1, longest_s=0)
        asked: list[tuple[int, int]] = []
        first = await Victim.start(victim, tmp_path / "a", operations=0, pages=512)
        other = await Victim.start(victim, tmp_path / "b", operations=0, pages=512)
        try:
            server.on_need = lambda place, pages, _: asked.append((place, pages))
            served = first.serve(server, present=slow.add(first.folder), files=("part0", "part1", "part2"))
            while not asked:
                await asyncio.sleep(0.01)
            before = cpu_s(server.pid)
            await asyncio.sleep(0.3)
            assert cpu_s(server.pid) - before < 0.1
            assert not served.failed.done() and first.process.returncode is None

            server.on_need = slow.need
            serving = other.serve(server, present=slow.add(other.folder), files=("part0", "part1", "part2"))
            await other.expect("done")
            server.have(*asked[0], errno.EIO)
            why = await asyncio.wait_for(served.failed, 5)
            assert os.strerror(errno.EIO) in why
            assert await other.end() == 0, await other.words()
            await serving.drop()
            assert first.process.returncode is None, "it waits until it is killed"
        finally:
            await first.kill()
            await other.kill()
        await served.drop()


async def test_a_drain_waits_for_what_is_on_its_way(
    victim: Path, sanitized: Path | None, present: PresentMap, tmp_path: Path
) -> None:
    """Nobody is hurried for it, and where it gets nothing the process goes on with what it has."""
    async with page_server(sanitized) as server:
        slow = Slow(server, present, 1)
        process = await Victim.start(victim, tmp_path / "a", operations=0, pages=512)
        try:
            here = slow.add(process.folder)
            served = process.serve(
                server, working_set=some_of(process.folder, 1 << 20), present=here, files=("part0", "part1", "part2"),
                drain_ms=0,
            )  # fmt: skip
            await process.expect("done")
            await asyncio.wait_for(served.whole(), 10)
            assert await process.end() == 0
            await served.drop()
            assert {asked for _, _, asked in slow.asked} >= {True}
        finally:
            await process.kill()
