"""The page server gives every process the bytes it must read, whatever the process does to its memory meanwhile.

First without CRIU: a C program (pageserver_victim.c) with a model of its own memory. Then Python through the engine.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import importlib.util
import os
import platform
import signal
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from engine_rig import WORKER_PID, Frozen, Rig
from integration.pages_rig import UID as SERVER_UID
from integration.pages_rig import Victim, compile_c, cpu_s, sanitized_server
from woodfrog.criu.pagemap import PageIndex, PageTask, read_index, write_index
from woodfrog.engine.engine import Lazy, restore
from woodfrog.errors import RestoreError
from woodfrog.linux import hugepages, procfs
from woodfrog.linux.pageserver import NEVER, PageServer, set_pages
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
    return pid, [e[:3] for e in struct.iter_unpack("=QQQII", data[24 : 24 + 32 * count])]


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


async def test_a_signal_that_ends_a_group_does_not_end_it(victim: Path, tmp_path: Path) -> None:
    """As systemd sends it to all of a scope: whoever it serves would read zeroes once the daemon has ended, too."""
    async with page_server() as server:
        process = await Victim.start(victim, tmp_path / "v", seed=5, operations=200, threads=2, pages=512)
        try:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                os.kill(server.pid, number)
            process.serve(server, drain_ms=NEVER)
            await process.expect("done")
            assert await process.end() == 0, await process.words()
            assert process.served is not None
            await process.served.drop()
        finally:
            await process.kill()


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


async def test_parked_then_pushed(victim: Path, sanitized: Path | None, tmp_path: Path) -> None:
    """Nothing goes in that is not asked for, until it is to be pushed: before the process runs, or while it does."""
    async with page_server(sanitized) as server:
        for n, operations in enumerate((0, 3000, 3000)):
            process = await Victim.start(victim, tmp_path / f"v{n}", seed=n, operations=operations, threads=3)
            try:
                _, extents = extents_of(process.folder)
                served = process.serve(server, working_set=some_of(process.folder, 3), parked=True, drain_ms=0)
                await asyncio.wait_for(served.held, 5)
                if n == 0:
                    await process.expect("done")
                    before = cpu_s(server.pid)
                    await asyncio.sleep(0.3)
                    assert cpu_s(server.pid) - before < 0.1
                    assert not served.ready.done() and not served.complete
                pushed, _ = await served.push()
                assert await served.push() == served.ready.result()
                # The first one has touched all of it by now.
                assert pushed <= sum(pages for _, pages, _ in extents) if n else pushed == 0
                if n:
                    await process.expect("done")
                await asyncio.wait_for(served.whole(), 10)
                assert await process.end() == 0, await process.words()
                await served.drop()
            finally:
                await process.kill()
        # To be pushed before memory is laid out: then at once.
        process = await Victim.start(victim, tmp_path / "early", pages=512)
        go, process.go = process.go, lambda: None  # type: ignore[method-assign]
        try:
            served = process.serve(server, working_set=some_of(process.folder, 3), parked=True)
            pushing = asyncio.ensure_future(served.push())
            await asyncio.sleep(0.05)
            assert not pushing.done()
            go()
            assert (await asyncio.wait_for(pushing, 5))[0] > 100
            await process.expect("done")
            go()
            assert await process.process.wait() == 0
            await served.drop()
        finally:
            await process.kill()


def watched(pid: int) -> int:
    """How many of its maps a userfaultfd stands behind."""
    flags = [line.split() for line in Path(f"/proc/{pid}/smaps").read_text().splitlines() if line.startswith("VmFlags")]
    return sum("um" in f for f in flags)


async def test_everything_then_let_go(victim: Path, sanitized: Path | None, tmp_path: Path) -> None:
    async with page_server(sanitized) as server:
        for n, operations in enumerate((0, 0, 2500, 2500, 2500)):
            process = await Victim.start(victim, tmp_path / f"v{n}", seed=n, operations=operations, threads=3)
            try:
                _, extents = extents_of(process.folder)
                assert watched(process.process.pid) >= 3
                served = process.serve(server, everything=True)
                await asyncio.wait_for(served.whole(), 10)
                pushed, _ = served.ready.result()
                await process.expect("done")
                assert watched(process.process.pid) == 0
                assert await process.end() == 0, await process.words()
                _, _, demanded = await served.drop()
                if not operations:
                    assert pushed + demanded == sum(pages for _, pages, _ in extents)
            finally:
                await process.kill()


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
        grown = bytearray(b"z" * r.randrange(1, 300_000))  # glibc: mremap
        before = len(grown)
        grown.extend(bytes(r.randrange(1, 900_000)))
        if grown.count(b"z") != before or grown.count(0) != len(grown) - before:
            errors.append("a bytearray that grew has other bytes")
        del held, grown
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
FIRST_ANSWER = "'to be frozen'"
JEMALLOC = Path(f"/usr/lib/{platform.machine()}-linux-gnu/libjemalloc.so.2")
PRELOAD = {"LD_PRELOAD": str(JEMALLOC), "PYTHONMALLOC": "malloc"}
ALLOCATORS: dict[str, dict[str, str]] = {
    "glibc": {},
    # Everything that is freed goes back at once: madvise, munmap, brk, and arenas that shrink.
    "glibc-gives-back": {
        "PYTHONMALLOC": "malloc",
        "MALLOC_TRIM_THRESHOLD_": "0",
        "MALLOC_TOP_PAD_": "0",
        "MALLOC_MMAP_THRESHOLD_": "16384",
    },
    "jemalloc": PRELOAD,
    "jemalloc-gives-back": PRELOAD | {"MALLOC_CONF": "dirty_decay_ms:0,muzzy_decay_ms:0,retain:false"},
    "jemalloc-lazily-frees": PRELOAD | {"MALLOC_CONF": "dirty_decay_ms:0,muzzy_decay_ms:-1,background_thread:true"},
}


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    made = Rig.make(tmp_path)
    yield made
    await made.close()


async def freeze(rig: Rig, env: dict[str, str], setup: str = PROGRAM, answer: str = FIRST_ANSWER) -> Frozen:
    numpy = importlib.util.find_spec("numpy")
    path = {"PYTHONPATH": str(Path(numpy.origin).parents[1])} if numpy and numpy.origin else {}
    sandbox, _ = await rig.start(setup, env={"PYTHONFAULTHANDLER": "1", **path, **env})
    assert await rig.ask(sandbox, patience=60) == answer
    return await rig.freeze(sandbox)


async def thaw(rig: Rig, frozen: Frozen, lazy: Lazy, times: int = 2) -> list[tuple[object, ...]]:
    sandbox = await rig.sandbox(layers=(frozen.fs,), shm=frozen.shm)
    process = await restore(sandbox, images=frozen.images, criu=rig.criu, phases=Phases(), lazy=lazy)
    answers: list[tuple[object, ...]] = []
    for _ in range(times):
        answer = await rig.ask(sandbox, patience=60)
        if not answer:
            await asyncio.sleep(0.5)  # until its end is known
        assert answer, (answers, process.status, rig.stderr(sandbox))
        answers.append(ast.literal_eval(answer))
    assert lazy.served is not None and not lazy.served.failed.done()
    return answers


@pytest.mark.criu
@pytest.mark.parametrize(
    "allocator",
    # Those that give memory back meet all that the others do.
    [pytest.param(a, marks=() if "-" in a else pytest.mark.slow) for a in ALLOCATORS],
)
async def test_python_through_the_engine(rig: Rig, allocator: str) -> None:
    """About 100 MB; without and with a working set, drained at once, late or never."""
    env = ALLOCATORS[allocator]
    if "LD_PRELOAD" in env and not JEMALLOC.exists():
        pytest.skip("needs libjemalloc2")
    frozen = await freeze(rig, env)
    right = (True, True, True, [], "LD_PRELOAD" in env)
    working_set = rig.home / "working-set"
    async with page_server() as server:
        lazy = Lazy(server)
        assert await thaw(rig, frozen, lazy) == [right, right]
        assert lazy.served is not None
        working_set.write_bytes(await lazy.served.record())
        assert set_pages(working_set.read_bytes()) > 10_000
        ways = ((True, NEVER), (True, 0), (False, 0), (False, 60))
        for known, drain_ms in ways if allocator in ("glibc", "jemalloc") else ways[1:3]:
            lazy = Lazy(server, working_set if known else None, around=1 << 16, drain_ms=drain_ms)
            assert await thaw(rig, frozen, lazy) == [right, right], (known, drain_ms)
            assert lazy.served is not None
            pushed, _ = await asyncio.wait_for(lazy.served.ready, 5)
            assert (pushed > 10_000) == known
        for sandbox in rig.sandboxes:
            await sandbox.destroy()
        await lazy.served.drop()


@pytest.mark.criu
async def test_everything_may_be_dumped_again(rig: Rig) -> None:
    frozen = await freeze(rig, {})
    right = (True, True, True, [], False)
    async with page_server() as server:
        lazy = Lazy(server, everything=True)
        sandbox = await rig.sandbox(layers=(frozen.fs,), shm=frozen.shm)
        process = await restore(sandbox, images=frozen.images, criu=rig.criu, phases=Phases(), lazy=lazy)
        assert lazy.served is not None and lazy.served.complete
        pushed, _ = lazy.served.ready.result()
        assert pushed > 10_000 and watched(process.host_pid) == 0
        # At once, and after it has run: by plain CRIU, and by the page server again.
        again = await rig.freeze(sandbox)
        await lazy.served.drop()
        assert await thaw(rig, again, Lazy(server)) == [right, right]
        sandbox, _ = await rig.thaw(again)
        assert ast.literal_eval(await rig.ask(sandbox, patience=60)) == right
        third = await rig.freeze(sandbox)
        lazy = Lazy(server, everything=True)
        assert await thaw(rig, third, lazy) == [right, right]
        assert lazy.served is not None
        await lazy.served.drop()


HUGE = """
size = 16 << 20
area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
area.madvise(mmap.MADV_HUGEPAGE)
word = os.urandom(4096)
for at in range(0, size, 4096):
    area[at : at + 4096] = at.to_bytes(8, "little") + word[8:]
def check():
    return all(area[at : at + 4096] == at.to_bytes(8, "little") + word[8:] for at in range(0, size, 4096))
"""


@pytest.mark.criu
@pytest.mark.skipif(not hugepages.available(), reason="this machine has no huge pages")
async def test_huge_pages_come_back(rig: Rig) -> None:
    """What lay in huge pages is told at the thaw, and can be put into them again while it is still served."""
    sandbox, _ = await rig.start(HUGE)
    assert await rig.ask(sandbox) == "True"
    frozen = await rig.freeze(sandbox)
    async with page_server() as server:
        lazy = Lazy(server)
        sandbox, process = await rig.thaw(frozen, lazy=lazy)
        assert lazy.huge and {pid for pid, _, _ in lazy.huge} == {WORKER_PID}
        assert await rig.ask(sandbox) == "True"
        assert not hugepages.huge_ranges(process.host_pid), "nobody else does it: this module is of no use"
        ranges = [(begin, end) for _, begin, end in lazy.huge]
        done = await asyncio.to_thread(hugepages.collapse, process.host_pid, ranges)
        if not done.blocks and not done.error:
            pytest.skip("this kernel does not put pages together for others (Linux 6.1)")
        assert done.blocks >= 6 and not done.error
        assert set(hugepages.huge_ranges(process.host_pid)) <= set(ranges)
        assert hugepages.huge_ranges(process.host_pid)
        assert await rig.ask(sandbox) == "True"
        # And it may be frozen again.
        assert lazy.served is not None
        lazy.served.drain()
        await lazy.served.whole()
        again = await rig.freeze(sandbox)
        await lazy.served.drop()
        sandbox, _ = await rig.thaw(again)
        assert await rig.ask(sandbox) == "True"


SEEN_FROM_OUTSIDE = """
fill = bytearray(os.urandom(1 << 16)) * 500
def seen():
    return [zlib.crc32(open("/proc/self/" + name, "rb").read()) for name in ("cmdline", "environ")]
import zlib
before = seen()
def check():
    return before == seen(), len(open("/proc/self/environ").read()) > 30_000
"""


@pytest.mark.criu
async def test_arguments_and_environment_are_seen_from_outside(rig: Rig) -> None:
    """/proc/PID/cmdline and environ show what is in memory, and ask no page server for the rest."""
    frozen = await freeze(rig, {"LONG": "x" * 30_000}, SEEN_FROM_OUTSIDE, "(True, True)")
    async with page_server() as server:
        lazy = Lazy(server)
        assert await thaw(rig, frozen, lazy) == [(True, True)] * 2
        assert lazy.served is not None
        await lazy.served.drop()


WIPED = """
fill = bytearray(os.urandom(1 << 16)) * 500
areas = []
for n in range(3):
    area = mmap.mmap(-1, 1 << 16, mmap.MAP_PRIVATE)
    area.write(b"parent's" * (1 << 13))
    where = ctypes.addressof((ctypes.c_char * (1 << 16)).from_buffer(area))
    assert libc.madvise(ctypes.c_void_p(where), 1 << 16, 18) == 0
    areas.append(area)
calls = []

def seen(area):
    return {bytes(area[at : at + 8]) for at in range(0, 1 << 16, 4096)}

def check():
    calls.append(1)
    if len(calls) == 1:
        return "to be frozen"
    if len(calls) == 2:
        areas[0][:9]  # one page of it is there before the fork
    r, w = os.pipe()
    child = os.fork()
    if not child:
        try:
            if os.fork() == 0:
                os.write(w, repr([seen(a) for a in areas]).encode())
                os._exit(0)
            os.wait()
            os.write(w, repr([seen(a) for a in areas]).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    return os.read(r, 9999).decode(), [seen(a) for a in areas]
"""


@pytest.mark.criu
@pytest.mark.parametrize("drain_ms", [NEVER, 0])
async def test_what_a_fork_empties_is_empty(rig: Rig, drain_ms: int) -> None:
    """MADV_WIPEONFORK, by which generators of random numbers notice a fork: also where the pages are still to come."""
    frozen = await freeze(rig, {}, WIPED)
    nothing, parents = [{b"\0" * 8}] * 3, [{b"parent's"}] * 3
    async with page_server() as server:
        lazy = Lazy(server, drain_ms=drain_ms)
        for answer in await thaw(rig, frozen, lazy, times=2):
            assert answer == (repr(nothing) * 2, parents)
        for sandbox in rig.sandboxes:
            await sandbox.destroy()
        assert lazy.served is not None
        await lazy.served.drop()


SEVERAL = """
import json, zlib
blocks = [os.urandom(1 << 16) for _ in range(300)]

def digest():
    return zlib.crc32(b"".join(blocks))

pipes = []
for n in range(3):
    ask, answer = os.pipe(), os.pipe()
    if os.fork() == 0:
        blocks = blocks[n * 100 :] + [os.urandom(1 << 16) for _ in range(60)]
        right = digest()
        while os.read(ask[0], 1):
            os.write(answer[1], b"y" if digest() == right else b"n")
        os._exit(0)
    pipes.append((ask[1], answer[0]))
right = digest()

def check():
    for ask, _ in pipes:
        os.write(ask, b"?")
    return [digest() == right] + [os.read(answer, 1) for _, answer in pipes]
"""


RESERVED = """
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
at = libc.mmap(None, SIZE, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
used = at + (1 << 30)
def use(n):
    assert libc.mprotect(used, n, 3) == 0
    ctypes.memset(used, 7, n)
use(1 << 20)
def check():
    use(2 << 20)
    return ctypes.string_at(used + (2 << 20) - 2, 2)
"""


@pytest.mark.criu
async def test_more_is_reserved_than_there_is(rig: Rig) -> None:
    """As CUDA does, and garbage collectors: addresses for more than the machine has, of which little is used."""
    lines = [line.split() for line in Path("/proc/meminfo").read_text().splitlines()]
    size = sum(int(words[1]) << 10 for words in lines if words[0] in ("MemTotal:", "SwapTotal:")) + (4 << 30)
    sandbox, _ = await rig.start(RESERVED.replace("SIZE", str(size)))
    assert await rig.ask(sandbox) == repr(b"\7\7")
    frozen = await rig.freeze(sandbox)
    async with page_server() as server:
        for lazy in (None, Lazy(server), Lazy(server, everything=True)):
            thawed, _ = await rig.thaw(frozen, lazy=lazy)
            assert await rig.ask(thawed) == repr(b"\7\7")


@pytest.mark.criu
async def test_several_processes(rig: Rig) -> None:
    right = [True, b"y", b"y", b"y"]
    frozen = await freeze(rig, {}, SEVERAL, str(right))
    async with page_server() as server:
        for generation in range(2):
            lazy = Lazy(server, everything=True)
            assert await thaw(rig, frozen, lazy) == [right, right]
            sandbox = rig.sandboxes[-1]
            assert lazy.served is not None and lazy.served.complete
            assert [watched(pid) for pid in procfs.tree(sandbox.init_pid)[1:]] == [0] * 4
            if generation == 0:
                frozen = await rig.freeze(sandbox)
            await lazy.served.drop()
        lazy = Lazy(server, drain_ms=0)
        assert await thaw(rig, frozen, lazy) == [right, right]
        assert lazy.served is not None
        await asyncio.wait_for(lazy.served.whole(), 20)


@pytest.mark.criu
async def test_memory_in_packs(rig: Rig, tmp_path: Path) -> None:
    """Strewn over files elsewhere, and cut out of the images: served from there, or not at all."""
    frozen = await freeze(rig, {})
    index = read_index((frozen.images / "pages.idx").read_bytes())
    names = tuple(f"{n:064x}" for n in range(5))
    sizes, turn = [0] * len(names), 0
    with contextlib.ExitStack() as stack:
        packs = [stack.enter_context((tmp_path / name).open("wb")) for name in names]
        tasks = []
        for task in index.tasks:
            extents = []
            for address, pages, offset, file in task.extents:
                with (frozen.images / index.files[file]).open("r+b") as images:
                    images.seek(offset)
                    data = images.read(pages << 12)
                    images.seek(offset)
                    images.write(b"\xee" * len(data))  # what nobody may read
                at = 0
                while at < pages:
                    n = min(pages - at, (1, 3, 40, 500)[turn % 4])
                    piece, pack = data[at << 12 : at + n << 12], turn % len(names)
                    if piece.count(0) < len(piece):
                        extents.append((address + (at << 12), n, sizes[pack], pack))
                        sizes[pack] += packs[pack].write(piece)
                    at += n
                    turn += 1
            tasks.append(PageTask(task.pid, tuple(extents)))
    (frozen.images / "pages.idx").write_bytes(write_index(PageIndex(tuple(tasks), names)))
    files = tuple(tmp_path / name for name in names)
    right = (True, True, True, [], False)
    async with page_server() as server:
        for everything in (False, True):
            lazy = Lazy(server, files=files, everything=everything)
            assert await thaw(rig, frozen, lazy) == [right, right]
        (frozen.images / "pages.idx").unlink()
        with pytest.raises(RestoreError, match="lies in packs"):
            await thaw(rig, frozen, Lazy(server, files=files))
        await rig.nothing_runs(rig.sandboxes[-1])


SLOW_CLOSE = """
#include <sys/stat.h>
#include <unistd.h>
static inline int close_slowly(int fd)
{
    struct stat info;
    if (!fstat(fd, &info) && S_ISREG(info.st_mode) && info.st_nlink == 0)
        sleep(5);
    return close(fd);
}
#define close close_slowly
"""


async def test_a_removed_file_takes_its_time(victim: Path, tmp_path: Path) -> None:
    """Who closes a removed file last waits until its place on the disk is free. No process waits for that."""
    (tmp_path / "slow.h").write_text(SLOW_CLOSE)
    source = Path(__file__).parents[2] / "native" / "pageserver.c"
    slow = compile_c(tmp_path / "server", source, "-include", str(tmp_path / "slow.h"))
    server = await PageServer.start(uid=SERVER_UID, on_death=lambda: None, binary=slow)
    try:
        first = await Victim.start(victim, tmp_path / "first")
        served = first.serve(server)
        assert await first.end() == 0, await first.words()
        for path in (tmp_path / "first").glob("pages*"):
            path.unlink()
        begin = asyncio.get_running_loop().time()
        await served.drop()
        others = [await Victim.start(victim, tmp_path / f"other{n}", seed=n + 2) for n in range(4)]
        for other in others:
            other.serve(server)
        for other in others:
            assert await other.end() == 0, await other.words()
        assert asyncio.get_running_loop().time() - begin < 5
    finally:
        await server.close()
