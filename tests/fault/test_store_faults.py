"""The page store while processes are killed, disks fill up and several processes work at a time."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from woodfrog import faults
from woodfrog.errors import StoreError
from woodfrog.store import ingest, pages
from woodfrog.store.pages import PAGE, PageStore, Ref, Run

POINTS = [p for p in faults.POINTS if p.startswith("store.")]


def scenario(rig: Rig, kill_at: int, said: IO[str]) -> None:
    """Ingest, rebuild and collect, in a process that is killed at a certain one of its fault points."""
    seen = 0

    def fault(point: str) -> None:
        nonlocal seen
        seen += 1
        print(point, file=said, flush=True)
        if seen == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    for module in (pages, ingest):
        module.fault = fault  # type: ignore[attr-defined]
    store = PageStore(rig.root)
    fd = os.open(rig.source, os.O_RDONLY)
    done = store.ingest(
        [
            Run(fd, 0, 3, first=True),
            Run(fd, 3 * PAGE, 4, base=((0, Ref(rig.base, 0, 4)),)),
            Run(fd, 7 * PAGE, 5),
        ],
        owner="child",
    )
    store.open_raw(done.packs)
    print("done", json.dumps(done.packs), file=said, flush=True)
    store.gc({rig.base, *done.packs}, min_age_s=0)
    assert not store.has(rig.doomed)
    print("collected", file=said, flush=True)


def noise(seed: int, pages: int = 1) -> bytes:
    return random.Random(seed).randbytes(pages * PAGE)


def put(
    store: PageStore, path: Path, data: bytes, owner: str, **more: object
) -> tuple[tuple[Ref, ...], tuple[str, ...]]:
    path.write_bytes(data)
    with open(path, "rb") as f:
        done = store.ingest([Run(f.fileno(), 0, len(data) // PAGE, **more)], owner=owner)  # type: ignore[arg-type]
    return done.refs[0], done.packs


def content(store: PageStore, refs: tuple[Ref, ...]) -> bytes:
    paths = store.open_raw({r.pack for r in refs})
    parts = []
    for ref in refs:
        with open(paths[ref.pack] if ref.pack else "/dev/zero", "rb") as f:
            f.seek(ref.slot * PAGE)
            parts.append(f.read(ref.pages * PAGE))
    return b"".join(parts)


class Rig:
    """A store with a live pack and one that goes; a child that ingests, rebuilds and collects."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "store"
        self.store = PageStore(self.root)
        self.old = noise(1, 4)
        self.refs, (self.base,) = put(self.store, folder / "a", self.old, "keep")
        _, (self.doomed,) = put(self.store, folder / "b", noise(2, 3), "drop")
        self.store.release("drop")
        changed = bytearray(self.old)
        for page in range(4):
            changed[page * PAGE + 100] ^= 1
        self.source = folder / "c"
        self.source.write_bytes(noise(3, 3) + changed + noise(4, 5))

    def child(self, kill_at: int) -> tuple[int, list[str]]:
        """How it ended, and what it said."""
        end, begin = os.pipe()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                with open(begin, "w") as said:
                    scenario(self, kill_at, said)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(begin)
        with open(end) as f:
            said = f.read().splitlines()
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, -signal.SIGKILL)
        return code, said

    def check(self, store: PageStore, said: list[str]) -> None:
        """All that is visible is whole; what was promised is there; nothing else is left."""
        assert store.verify() == []
        assert list((self.root / "tmp").iterdir()) == []
        files = {p.name for p in self.root.rglob("packs/*/*")}
        for name in files:
            assert f"{name[:64]}.names" in files, f"{name} has no names"
            assert store.has(name[:64])
        assert content(store, self.refs) == self.old
        packs = [p for line in said if line.startswith("done") for p in json.loads(line[5:])]
        if "collected" in said:
            assert not store.has(self.doomed)
        if not any(line.startswith("store.gc") for line in said):
            assert store.has(self.doomed)
        for pack in packs:
            assert store.has(pack)
        store.open_raw(packs)
        rows = dict(store.index.query("SELECT num, id FROM packs"))
        assert {n for (n,) in store.index.query("SELECT DISTINCT pack FROM pages")} <= set(rows)


@pytest.mark.parametrize("survivor", [False, True], ids=["reopened", "open-all-the-while"])
def test_killed_at_every_point(tmp_path: Path, survivor: bool) -> None:
    seen: set[str] = set()
    for kill_at in range(1, 200):
        folder = tmp_path / str(kill_at)
        folder.mkdir()
        rig = Rig(folder)
        code, said = rig.child(kill_at)
        seen.update(line for line in said if line.startswith("store."))
        if not survivor:
            rig.store.close()
            rig.store = PageStore(rig.root)
        rig.check(rig.store, said)
        # It goes on as if nothing had been: the same work, once more and to its end.
        again, said = rig.child(0)
        assert again == 0 and "collected" in said
        rig.check(rig.store, said)
        # And what the index says is what the files say.
        before = rig.store.stats()
        rig.store.close()
        (rig.root / "index.sqlite").unlink()
        rig.store = PageStore(rig.root)
        assert rig.store.stats() == before
        rig.check(rig.store, said)
        rig.store.release("keep")
        rig.store.gc(set(), min_age_s=0)
        assert list(rig.root.rglob("packs/*/*")) == []
        rig.store.close()
        if code == 0:
            break
    else:
        pytest.fail("the child never came to its end")
    assert seen == set(POINTS)


@pytest.mark.parametrize("action", ["raise", "enospc"])
@pytest.mark.parametrize("point", POINTS)
def test_failing_at_every_point(tmp_path: Path, point: str, action: str) -> None:
    rig = Rig(tmp_path)
    fd = os.open(rig.source, os.O_RDONLY)
    runs = [Run(fd, 0, 3, first=True), Run(fd, 3 * PAGE, 9, base=((0, Ref(rig.base, 0, 4)),))]

    def work() -> None:
        done = rig.store.ingest(runs, owner="t")
        rig.store.open_raw(done.packs)
        rig.store.gc({rig.base}, min_age_s=0)

    faults.configure(f"{point}={action}*1")
    try:
        with pytest.raises(faults.InjectedFault if action == "raise" else StoreError) as e:
            work()
        if action == "enospc":
            assert e.value.code == "disk-full"  # type: ignore[union-attr]
    finally:
        faults.configure("")
    assert rig.store.verify() == [] and list((rig.root / "tmp").iterdir()) == []
    assert content(rig.store, rig.refs) == rig.old
    work()
    assert rig.store.verify() == [] and not rig.store.has(rig.doomed)
    os.close(fd)
    rig.store.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    target = tmp_path / "disk"
    target.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(target)], check=True)
    yield target
    subprocess.run(["umount", str(target)], check=True)


@pytest.mark.root
def test_a_full_disk(small_disk: Path, tmp_path: Path) -> None:
    root = small_disk / "store"
    store = PageStore(root)
    old = noise(1, 100)
    refs, (pack,) = put(store, tmp_path / "a", old, "t")
    with pytest.raises(StoreError) as e:
        put(store, tmp_path / "b", noise(2, 600), "t")
    assert e.value.code == "disk-full" and "WOODFROG_HOME" in e.value.message
    assert store.verify() == [] and list((root / "tmp").iterdir()) == []
    # Fill it to the last byte: whatever fails first, the pages or the index, says the same and leaves nothing.
    filler = small_disk / "filler"
    for room in (0, 4096, 16384, 65536, 200_000, 400_000):
        filler.unlink(missing_ok=True)
        free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
        filler.write_bytes(bytes(max(0, free - room)))
        for count in (1, 40):
            try:
                put(store, tmp_path / "c", noise(room + count, count), "u")
            except StoreError as e:
                assert e.code == "disk-full", e.message
        try:
            store.release("u")
        except StoreError as e:
            assert e.code == "disk-full"
        assert content(store, refs) == old
    filler.unlink()
    store.release("u")
    assert store.verify() == []
    store.gc({pack}, min_age_s=0)
    assert store.stats().packs == 1 and content(store, refs) == old
    assert put(store, tmp_path / "d", noise(7, 10), "t")
    store.close()


WORKER = r"""
import json, os, random, sys, time
from pathlib import Path
from woodfrog.store.pages import PAGE, PageStore, Ref, Run

root, live, me, end = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], float(sys.argv[4])
rng = random.Random()

def page(kind):
    if kind < 40:
        return random.Random(kind).randbytes(PAGE)
    return rng.randbytes(PAGE) if kind < 45 else bytes(PAGE)

def read(store, refs):
    paths = store.open_raw({p for p, _, _ in refs})
    out = []
    for pack, slot, pages in refs:
        with open(paths[pack] if pack else "/dev/zero", "rb") as f:
            f.seek(slot * PAGE)
            out.append(f.read(pages * PAGE))
    return b"".join(out)

store, mine, n = PageStore(root), {}, 0
while time.time() < end:
    n += 1
    data = [page(rng.randrange(48)) for _ in range(rng.randrange(1, 60))]
    base = ()
    if mine and rng.random() < 0.5:
        old, refs = rng.choice(list(mine.values()))
        at, segments = 0, []
        for pack, slot, pages in refs:
            if at + pages <= len(data):
                segments.append((at, Ref(pack, slot, pages)))
                for i in range(at, at + pages):
                    changed = bytearray(old[i])
                    changed[rng.randrange(PAGE)] ^= 1
                    data[i] = bytes(changed) if rng.random() < 0.5 else old[i]
            at += pages
        base = tuple(segments)
    source = root.parent / f"source-{me}"
    source.write_bytes(b"".join(data))
    with open(source, "rb") as f:
        done = store.ingest([Run(f.fileno(), 0, len(data), base=base)], owner=f"{me}-{n}")
    refs = [(r.pack, r.slot, r.pages) for r in done.refs[0]]
    assert read(store, refs) == b"".join(data)
    name = f"{me}-{n}-{os.getpid()}"
    (live / f".{name}").write_text(json.dumps(done.packs))
    os.rename(live / f".{name}", live / name)
    store.release(f"{me}-{n}")
    mine[name] = data, refs
    while len(mine) > 4:
        gone = rng.choice(list(mine))
        del mine[gone]
        (live / gone).unlink()
    for data, refs in mine.values():
        store.lease([p for p, _, _ in refs], "reading")
        assert read(store, refs) == b"".join(data)
        store.release("reading")
print(n)
"""

COLLECTOR = r"""
import json, sys, time
from pathlib import Path
from woodfrog.store.pages import PageStore

root, live, end = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[4])

def find():
    packs = set()
    for path in live.iterdir():
        if not path.name.startswith("."):
            try:
                packs.update(json.loads(path.read_text()))
            except FileNotFoundError:
                pass
    return packs

n = 0
while time.time() < end:
    store = PageStore(root)
    for _ in range(5):
        n += len(store.gc(find, min_age_s=0).packs)
        store.trim_cache(100_000)
        time.sleep(0.01)
    assert all(p.what.startswith("rests on") for p in store.verify(deep=False)), store.verify(deep=False)
    store.close()
print(n)
"""


@pytest.mark.parametrize("kill", [False, True], ids=["undisturbed", "killed-at-random"])
def test_several_processes_at_a_time(tmp_path: Path, kill: bool) -> None:
    """Two that capture, read and delete, and one that collects everything the moment it may."""
    root, live = tmp_path / "store", tmp_path / "live"
    live.mkdir()
    end = time.time() + 6
    programs = {"w1": WORKER, "w2": WORKER, "gc": COLLECTOR}

    def start(name: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", programs[name], str(root), str(live), name, str(end)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    running = {name: start(name) for name in programs}
    rng = random.Random(1)
    while kill and time.time() < end - 0.5:
        time.sleep(rng.uniform(0.2, 0.5))
        name = rng.choice(sorted(running))
        running[name].kill()
        _, error = running[name].communicate()
        assert running[name].returncode == -signal.SIGKILL, error
        running[name] = start(name)
    made = {}
    for name, process in running.items():
        said, error = process.communicate(timeout=60)
        assert process.returncode == 0, f"{name}: {error}"
        made[name] = int(said)
    assert kill or min(made.values()) > 5, made
    store = PageStore(root)
    assert store.verify() == [] and list((root / "tmp").iterdir()) == []
    packs = {p for path in live.iterdir() if not path.name.startswith(".") for p in json.loads(path.read_text())}
    store.gc(packs, min_age_s=0)
    assert store.verify() == []
    assert set(store.open_raw(packs)) == packs
    assert {p for (p,) in store.index.query("SELECT id FROM packs")} == store.needs(packs)
    store.close()
