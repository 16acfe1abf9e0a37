"""The page server gives every process the bytes it must read, whatever the process does to its memory meanwhile.

First without CRIU: a C program (pageserver_victim.c) with a model of its own memory. Then Python through the engine.
"""

from __future__ import annotations

import ast
import asyncio
import importlib.util
import os
import struct
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from engine_rig import PROGRAM as RIG_PROGRAM
from engine_rig import SOCKET, UID, WORKER_PID, Frozen, Rig
from integration.pages_rig import UID as SERVER_UID
from integration.pages_rig import Victim, compile_c, sanitized_server
from woodfrog.engine.engine import Lazy, restore
from woodfrog.linux.pageserver import NEVER, PageServer, set_pages
from woodfrog.linux.sandbox import ProcessSpec
from woodfrog.telemetry import Phases

pytestmark = [pytest.mark.root]

HERE = Path(__file__).parent
SET_HEAD, SET_RANGE = struct.Struct("=QII"), struct.Struct("=iIQ")


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_c(tmp_path_factory.mktemp("victim") / "victim", HERE / "pageserver_victim.c", "-O1", "-g")


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    return sanitized_server(tmp_path_factory.mktemp("server"))


@asynccontextmanager
async def page_server(binary: Path | None = None) -> AsyncIterator[PageServer]:
    died: list[int] = []
    server = await PageServer.start(uid=SERVER_UID, on_death=lambda: died.append(1), binary=binary)
    try:
        yield server
        assert not died and server.alive
    finally:
        await server.close()


def extents_of(folder: Path) -> tuple[int, list[tuple[int, int, int]]]:
    data = (folder / "index").read_bytes()
    pid, count = struct.unpack_from("=iI", data, 16)
    return pid, list(struct.iter_unpack("=QQQ", data[24 : 24 + 24 * count]))


def some_of(folder: Path, every: int) -> bytes:
    """A working set: all extents but one of `every`, and some that nothing lies at."""
    pid, extents = extents_of(folder)
    ranges = [(pid, n, at) for i, (at, n, _) in enumerate(extents) if i % every]
    ranges += [(pid, 7, 0x1000), (pid + 1, 3, extents[0][0]), (pid, 5000, extents[-1][0] + (1 << 30))]
    return SET_HEAD.pack(int.from_bytes(b"FROGSET1", "little"), len(ranges), 0) + b"".join(
        SET_RANGE.pack(*r) for r in ranges
    )


@pytest.mark.parametrize(
    ("drain_ms", "with_set", "around"),
    [
        (NEVER, False, 1 << 12),
        (NEVER, False, 1 << 16),
        (NEVER, True, 1 << 16),
        (0, True, 1 << 14),
        (15, False, 1 << 16),
    ],
)
async def test_random_operations(
    victim: Path, sanitized: Path | None, tmp_path: Path, drain_ms: int, with_set: bool, around: int
) -> None:
    """madvise, munmap and mmap, mremap in all its ways, brk, fork with both sides writing, exec; many threads."""
    async with page_server(sanitized) as server:
        for seed in range(6):
            process = await Victim.start(
                victim, tmp_path / f"v{seed}", seed=seed * 1000 + around + drain_ms % 977, operations=2500, threads=4
            )
            try:
                working_set = some_of(process.folder, 3) if with_set else None
                served = process.serve(server, drain_ms=drain_ms, around=around, working_set=working_set)
                await process.expect("done")
                pushed, _ = await asyncio.wait_for(served.ready, 5)
                assert (pushed > 0) == with_set
                status = await process.end()
                assert status == 0, await process.words()
                # Descriptors of the children that ended are not kept.
                assert len(served._held) <= 6
                assert not served.failed.done()
                await served.drop()
            finally:
                await process.kill()


async def test_many_at_once(victim: Path, sanitized: Path | None, tmp_path: Path) -> None:
    async def one(server: PageServer, n: int) -> None:
        process = await Victim.start(victim, tmp_path / f"v{n}", seed=n, operations=600, threads=2, pages=1024)
        try:
            process.serve(server, drain_ms=(NEVER, 0, 10)[n % 3], working_set=some_of(process.folder, 2 + n % 3))
            await process.expect("done")
            status = await process.end()
            assert status == 0, await process.words()
            assert process.served is not None
            await process.served.drop()
        finally:
            await process.kill()

    async with page_server(sanitized) as server:
        await asyncio.gather(*(one(server, n) for n in range(16)))


async def test_record_then_push(victim: Path, tmp_path: Path) -> None:
    """What was asked for is recorded where it was at first; pushed, it needs no fault."""
    async with page_server() as server:
        process = await Victim.start(victim, tmp_path / "a", operations=0)
        served = process.serve(server)
        await process.expect("done")
        working_set = await served.record()
        _pid, extents = extents_of(process.folder)
        assert set_pages(working_set) == sum(n for _, n, _ in extents)
        assert await process.end() == 0
        pushed, faults, demanded = await served.drop()
        assert pushed == 0 and faults > 10 and demanded == set_pages(working_set)

        process = await Victim.start(victim, tmp_path / "b", operations=0)
        again, _ = extents_of(process.folder)
        ranges = [(again, *r[1:]) for r in SET_RANGE.iter_unpack(working_set[SET_HEAD.size :])]
        mine = working_set[: SET_HEAD.size] + b"".join(SET_RANGE.pack(*r) for r in ranges)
        heap = sum(n for at, n, _ in extents if at < 0x6000_0000_0000)  # its address is random
        served = process.serve(server, working_set=mine, drain_ms=0)
        assert (await asyncio.wait_for(served.ready, 5))[0] >= set_pages(working_set) - heap
        await process.expect("done")
        for _ in range(100):
            if served.complete:
                break
            await asyncio.sleep(0.02)
        assert served.complete, "the rest was to be filled in"
        assert await process.end() == 0
        await served.drop()


PROGRAM = """
import zlib
try:
    import numpy as np
except ImportError:
    np = None
import mmap, random
rng = random.Random(7)
blocks = [bytes([i % 251]) * (1 << 16) + str(i).encode() for i in range(600)]
little = [str(i) * 9 for i in range(150_000)]
table = {i: (i, str(i)) for i in range(60_000)}
maps = [mmap.mmap(-1, 1 << 20, mmap.MAP_PRIVATE) for _ in range(10)]
for i, m in enumerate(maps):
    m.write(bytes([i + 1]) * (1 << 20))
array = np.arange(2_500_000, dtype=np.int64) if np else list(range(2_500_000))
trim = libc.malloc_trim if hasattr(libc, "malloc_trim") else None

def digest():
    h = 0
    for b in blocks: h = zlib.crc32(b, h)
    for s in little: h = zlib.crc32(s.encode(), h)
    for k in table: h = zlib.crc32(table[k][1].encode(), h)
    for m in maps: h = zlib.crc32(m[:], h)
    return zlib.crc32(array.tobytes() if np else str(sum(array)).encode(), h)

def churn(errors):
    r = random.Random(threading.get_ident())
    for n in range(60):
        held = [os.urandom(1) * r.randrange(1, 300_000) for _ in range(8)]
        m = mmap.mmap(-1, r.randrange(1, 64) * 4096, mmap.MAP_PRIVATE)
        if any(m[:]):
            errors.append("a fresh map is not zero")
        m.write(b"x" * len(m))
        m.close()
        z = bytearray(r.randrange(1, 400_000))
        if any(z):
            errors.append("a fresh bytearray is not zero")
        if np is not None and np.zeros(r.randrange(1, 100_000)).any():
            errors.append("a fresh array is not zero")
        del held
        if trim and n % 20 == 0:
            trim(0)

calls = []

def check():
    calls.append(1)
    if len(calls) == 1:
        return "to be frozen"
    errors = []
    # Children first, before all is here; both sides touch.
    pids = []
    for n in range(3):
        pid = os.fork()
        if pid == 0:
            try:
                for i in range(n, len(blocks), 7):
                    blocks[i] = None
                m = maps[n]
                assert m[:100] == bytes([n + 1]) * 100
                m[:100] = b"c" * 100
                assert zlib.crc32(b"".join(s.encode() for s in little)) == LITTLE
            except BaseException:
                os._exit(1)
            os._exit(0)
        pids.append(pid)
    threads = [threading.Thread(target=churn, args=(errors,)) for _ in range(3)]
    for t in threads: t.start()
    if len(gone) < 2:
        for i in range(0, len(extra), 2): extra[i] = None
        if trim: trim(0)
        gone.append(1)
    first = digest()
    for t in threads: t.join()
    for pid in pids:
        if os.waitpid(pid, 0)[1]: errors.append("a child failed")
    return (first == WHOLE, digest() == WHOLE, all(e in (None, b"y" * 5000) for e in extra), errors, preloaded())

def preloaded():
    return "jemalloc" in open("/proc/self/maps").read()

gone = []
extra = [b"y" * 5000 for _ in range(6000)]
LITTLE = zlib.crc32(b"".join(s.encode() for s in little))
WHOLE = digest()
"""
JEMALLOC = Path("/usr/lib/x86_64-linux-gnu/libjemalloc.so.2")


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    made = Rig.make(tmp_path)
    yield made
    await made.close()


async def freeze(rig: Rig, env: dict[str, str]) -> Frozen:
    sandbox = await rig.sandbox()
    program = RIG_PROGRAM.replace("{setup}", PROGRAM).replace("{socket}", SOCKET)
    (rig.home / "code" / "program.py").write_text(program)
    numpy = importlib.util.find_spec("numpy")
    path = {"PYTHONPATH": str(Path(numpy.origin).parents[1])} if numpy and numpy.origin else {}
    await sandbox.spawn(
        ProcessSpec(
            (sys._base_executable, "-B", "/app/program.py"),
            env={"PATH": os.defpath, "HOME": "/tmp", **path, **env},
            uid=UID,
            gid=UID,
            inner_pid=WORKER_PID,
            stdout="/run/woodfrog/stdout",
            stderr="/run/woodfrog/stderr",
            seccomp=True,
            no_new_privs=True,
        )
    )
    assert await rig.ask(sandbox, patience=60) == "'to be frozen'"
    return await rig.freeze(sandbox)


async def thaw(rig: Rig, frozen: Frozen, lazy: Lazy, times: int = 2) -> list[tuple[object, ...]]:
    sandbox = await rig.sandbox(layers=(frozen.fs,), shm=frozen.shm)
    await restore(sandbox, images=frozen.images, criu=rig.criu, phases=Phases(), lazy=lazy)
    answers = [ast.literal_eval(await rig.ask(sandbox, patience=60)) for _ in range(times)]
    assert lazy.served is not None and not lazy.served.failed.done()
    return answers


@pytest.mark.criu
@pytest.mark.parametrize("allocator", ["glibc", "jemalloc"])
async def test_python_through_the_engine(rig: Rig, allocator: str) -> None:
    """About 100 MB; without and with a working set, drained at once, late or never."""
    env = {}
    if allocator == "jemalloc":
        if not JEMALLOC.exists():
            pytest.skip("needs libjemalloc2")
        env = {"LD_PRELOAD": str(JEMALLOC), "PYTHONMALLOC": "malloc"}
    frozen = await freeze(rig, env)
    right = (True, True, True, [], allocator == "jemalloc")
    working_set = rig.home / "working-set"
    async with page_server() as server:
        lazy = Lazy(server)
        assert await thaw(rig, frozen, lazy) == [right, right]
        assert lazy.served is not None
        working_set.write_bytes(await lazy.served.record())
        assert set_pages(working_set.read_bytes()) > 10_000
        for known, drain_ms in ((True, NEVER), (True, 0), (False, 0), (False, 60)):
            lazy = Lazy(server, working_set if known else None, around=1 << 16, drain_ms=drain_ms)
            assert await thaw(rig, frozen, lazy) == [right, right], (known, drain_ms)
            assert lazy.served is not None
            pushed, _ = await asyncio.wait_for(lazy.served.ready, 5)
            assert (pushed > 10_000) == known
        for sandbox in rig.sandboxes:
            await sandbox.destroy()
        await lazy.served.drop()
