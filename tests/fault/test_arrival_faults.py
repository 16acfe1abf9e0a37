"""Killed while a snapshot comes page by page: the next goes on where it was, and takes no wrong byte for it."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from machine import PAGE, B, Machine
from unit.test_arrival import memory, pushed
from unit.test_keeper import settled, until
from woodfrog.backends import keeper as keeper_module
from woodfrog.criu.pagemap import INDEX, read_index
from woodfrog.faults import POINTS
from woodfrog.snapshot.trust import public_text
from woodfrog.store.cold import FrameReader
from woodfrog.store.folder import KEPT_S
from woodfrog.store.packs import NAME, page_name
from woodfrog.store.pages import PageStore
from woodfrog.store.tiers import DirectoryTier

SCRIPT = """
import asyncio, json, os, signal, sys, threading
from pathlib import Path
from machine import Machine
from woodfrog import faults
from woodfrog.store.tiers import DirectoryTier

home, tier, snapshot, point, reads, log, as_keeper = sys.argv[1:]


class Server(DirectoryTier):
    left, mutex = int(reads) or 1 << 30, threading.Lock()

    def tell(self, key, begin, end):
        with self.mutex:
            if key.endswith(".pages"):
                self.left -= 1
                if self.left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            with open(log, "a") as f:
                f.write(json.dumps([key, begin, end]) + chr(10))

    def get(self, key, target, most=None):
        super().get(key, target, most)
        self.tell(key, 0, self.size(key))

    def get_bytes(self, key, begin=0, end=None):
        data = super().get_bytes(key, begin, end)
        self.tell(key, begin, begin + len(data))
        return data


machine = Machine(Path(home))
if point:
    faults.configure(point + "=sigkill-self")
if as_keeper == "True":
    asyncio.run(machine.keeper(Server(Path(tier)), read_through=True).pull(snapshot, lambda *_: None))
else:
    arrival = machine.transport.arrive(snapshot, Server(Path(tier)))
    arrival.rest()
    arrival.finish()
"""


@dataclass(frozen=True)
class Rig:
    tmp: Path
    snapshot: str = B
    """A child of A, which the other machine never had: deltas against packs that come as well."""

    @property
    def home(self) -> Path:
        return self.tmp / "there"

    @property
    def partial(self) -> Path:
        return self.home / "store" / "partial"

    def run(self, point: str = "", reads: int = 0, *, keeper: bool = False) -> tuple[int, list[tuple[str, int, int]]]:
        """The exit status, and what was read at the tier."""
        log = self.tmp / f"log-{time.monotonic_ns()}"
        log.touch()
        argv = [sys.executable, "-c", SCRIPT, self.home, self.tmp / "tier", self.snapshot, point, reads, log, keeper]
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        done = subprocess.run([str(a) for a in argv], check=False, timeout=60, env=env, capture_output=True, text=True)
        assert done.returncode in (0, -9), done.stderr
        return done.returncode, [tuple(json.loads(line)) for line in log.read_text().splitlines()]

    def arrived(self) -> dict[str, set[int]]:
        """Which groups of pages of each pack are here, by what is in the file."""
        found = {}
        for part in self.partial.glob("*.part"):
            pack = part.stem
            frames = self.tmp / "tier" / "packs" / pack[:2] / f"{pack}.frames"
            if not frames.exists():
                continue
            step = FrameReader(frames.read_bytes(), "it", None).frame // PAGE
            names = part.with_suffix(".names").read_bytes() if part.with_suffix(".names").exists() else b""
            data = part.read_bytes()
            right = [page_name(data[i * PAGE : (i + 1) * PAGE]) == names[i * NAME : (i + 1) * NAME]
                     for i in range(len(names) // NAME)]  # fmt: skip
            found[pack] = {at // step for at in range(0, len(right), step) if all(right[at : at + step])}
        return found

    def not_again(self, arrived: dict[str, set[int]], reads: list[tuple[str, int, int]]) -> None:
        """Nothing that had come was read at the tier."""
        for key, begin, end in reads:
            pack = Path(key).stem
            if key.endswith(".pages") and pack in arrived:
                frames = self.tmp / "tier" / key.replace(".pages", ".frames")
                reader = FrameReader(frames.read_bytes(), "it", None)
                for group in arrived[pack]:
                    first, last = reader.place(group, 1)
                    assert end <= first or begin >= last, (key, group)

    def check(self) -> None:
        """All of it is here and right, and nothing is left over."""
        machine = Machine(self.home)
        opened = machine.catalogue.open_verified(self.snapshot)
        index = read_index((opened.images / INDEX).read_bytes())
        assert opened.files is not None
        files = [path.read_bytes() for path in opened.files]
        parts = [files[e[3]][e[2] : e[2] + e[1] * PAGE] for e in sorted(index.tasks[0].extents)]
        assert b"".join(parts) == memory("a", 600)
        assert (opened.path / "fs" / "file").read_bytes() == b"in the layer"
        assert machine.store.verify() == [] and machine.catalogue.damaged == {}
        assert not list(self.partial.iterdir()) and not list(machine.store.folder.tmp.iterdir())
        assert [p.name for p in machine.catalogue.root.iterdir()] == [self.snapshot]
        machine.store.close()


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("once")
    pushed(home, B)
    here, there = Machine(home / "here"), Machine(home / "there")
    there.trust.add(public_text(here.signing))
    here.store.close()
    there.store.close()
    return home


@pytest.fixture
def rig(tmp_path: Path, once: Path) -> Rig:
    shutil.copytree(once, tmp_path, symlinks=True, dirs_exist_ok=True)
    return Rig(tmp_path)


def goes_on(rig: Rig) -> int:
    """After a kill: nothing half is visible, what is here is not fetched again. How many groups of pages were here."""
    machine = Machine(rig.home)
    assert machine.catalogue.form(rig.snapshot) is None and machine.store.verify() == []
    assert not list(machine.catalogue.root.iterdir()) and not list(machine.store.folder.tmp.iterdir())
    whole = {p for (p,) in machine.store.index.query("SELECT id FROM packs")}
    machine.store.close()
    arrived = rig.arrived()
    deltas = {path.stem for path in rig.partial.glob("*.delta")}
    known = {path.stem for path in rig.partial.glob("*.names")}
    status, reads = rig.run()
    assert status == 0
    for key, _, _ in reads:
        folder, _, pack = key.rpartition("/")
        pack, _, form = pack.partition(".")
        if folder.startswith("packs/"):
            assert pack not in whole, key
            assert (form, pack) not in {("delta", p) for p in deltas} | {("names", p) for p in known}, key
    rig.not_again(arrived, reads)
    rig.check()
    return sum(map(len, arrived.values())) + len(whole)


@pytest.mark.parametrize(
    "point",
    [p for p in POINTS if p.startswith("arrive.")]
    + ["pull.tree", "admit.manifest"]
    + [f"store.{p}" for p in ("durable", "names", "renamed", "entered")],
)
def test_killed_at_each_point(rig: Rig, point: str) -> None:
    assert rig.run(point)[0] == -9
    here = goes_on(rig)
    if point in ("arrive.page", "arrive.ready", "arrive.pack", "arrive.whole", "admit.manifest"):
        assert here > 0


@pytest.mark.parametrize("reads", [2, 5])
def test_killed_again_and_again(rig: Rig, reads: int) -> None:
    """It comes to its end, with never a read that was done before."""
    status, rounds, done = -9, 0, 0
    while status != 0:
        before = rig.arrived()
        # More each time: one that is killed early may have read, and not written yet.
        status, read = rig.run(reads=reads + rounds // 3)
        rig.not_again(before, read)
        rounds += 1
        after = rig.arrived()
        if status != 0:
            assert all(before[pack] <= after.get(pack, set()) for pack in before)
            done = sum(map(len, after.values()))
    assert rounds > 1 and done > 0
    rig.check()


@pytest.mark.parametrize("point", ["arrive.files", "arrive.page", "arrive.whole"])
def test_the_next_daemon_goes_on_after_a_kill(rig: Rig, point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nobody asking for it: what had come is not read again."""
    monkeypatch.setattr(keeper_module, "_GO_ON_S", 0.01)
    assert rig.run(point, keeper=True)[0] == -9
    arrived = rig.arrived()
    machine, tier, reads = Machine(rig.home), DirectoryTier(rig.tmp / "tier"), []
    get_bytes = tier.get_bytes

    def told(key: str, begin: int = 0, end: int | None = None) -> bytes:
        data = get_bytes(key, begin, end)
        reads.append((key, begin, begin + len(data)))
        return data

    tier.get_bytes = told  # type: ignore[method-assign]

    async def main() -> None:
        keeper = machine.keeper(tier, read_through=True)
        keeper.wanted = lambda *_: True
        keeper.go_on_later()
        await until(lambda: machine.catalogue.form(rig.snapshot) == "packed" and settled(keeper))
        assert not keeper._pending.list()
        await keeper.close()

    asyncio.run(main())
    rig.not_again(arrived, reads)
    rig.check()


def spoil(rig: Rig) -> None:
    for path in rig.partial.iterdir():
        data = bytearray(path.read_bytes())
        for at in range(100, len(data), 1 << 20):
            data[at] ^= 1
        path.write_bytes(data)


def cut(rig: Rig) -> None:
    for path in rig.partial.iterdir():
        os.truncate(path, path.stat().st_size // 3)


def lose(rig: Rig) -> None:
    """As a power loss may leave it: the files are there, and empty."""
    for path in rig.partial.iterdir():
        os.truncate(path, 0)


@pytest.mark.parametrize("damage", [spoil, cut, lose])
def test_what_was_damaged_meanwhile_is_fetched_again(rig: Rig, damage: object) -> None:
    assert rig.run("arrive.ready")[0] == -9
    assert rig.arrived()
    damage(rig)  # type: ignore[operator]
    assert rig.run()[0] == 0
    rig.check()


def test_what_nobody_goes_on_with_is_removed_in_time(rig: Rig) -> None:
    """And what somebody is bringing is not, however old."""
    assert rig.run("arrive.ready")[0] == -9
    parts = list(rig.partial.iterdir())
    old = time.time() - KEPT_S - 60
    store = PageStore(rig.home / "store")
    assert parts and sorted(rig.partial.iterdir()) == sorted(parts)
    one = next(p for p in parts if p.suffix == ".part")
    held = store.folder.hold_part(one.stem)
    assert held is not None and store.folder.hold_part(one.stem) is None
    for path in parts:
        os.utime(path, (old, old))
    store.gc(set())
    assert {p.stem for p in rig.partial.iterdir()} == {one.stem}
    os.close(held)
    store.gc(set())
    assert not list(rig.partial.iterdir())
    store.close()


def test_one_that_came_whole_leaves_no_part(rig: Rig) -> None:
    """Fetched in another way after the kill."""
    assert rig.run("arrive.ready")[0] == -9
    machine = Machine(rig.home)
    machine.transport.pull(rig.snapshot, DirectoryTier(rig.tmp / "tier"))
    machine.store.gc(set(machine.catalogue.get(rig.snapshot).packs))
    machine.store.close()
    rig.check()
