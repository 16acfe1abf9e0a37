"""Snapshots that come page by page: what is here is right, what is not is waited for, nothing half is ever a whole."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from contract.faulty_tier import Fault, FaultyTier
from machine import A, B, Machine
from repack import repack
from unit.test_keeper import settled, until
from woodfrog.backends import keeper as keeper_module
from woodfrog.backends.keeper import Keeper
from woodfrog.criu.pagemap import INDEX, PageIndex, PageTask, read_index, write_index
from woodfrog.errors import IntegrityError, NotFoundError, StoreError
from woodfrog.snapshot import arrival as arrival_module
from woodfrog.snapshot import incoming as incoming_module
from woodfrog.snapshot.arrival import Arrival
from woodfrog.snapshot.catalogue import PUSHED, WORKING_SET, Opened
from woodfrog.snapshot.manifest import FORMAT, Manifest
from woodfrog.snapshot.packing import prepare
from woodfrog.snapshot.pending import TRIES, Pending, PendingNotes, why_not
from woodfrog.snapshot.sweep import sweep
from woodfrog.snapshot.trust import public_text
from woodfrog.store.cold import Key
from woodfrog.store.partial import PresentMap
from woodfrog.store.tiers import DirectoryTier

PAGE = 4096
BASE = 0x7F0000000000
PAGES = 3000
FIRST = 100
"""Pages from here on, for as many, are the working set."""


def memory(seed: str, changed: int = 0) -> bytes:
    data = bytearray(random.Random(seed).randbytes(PAGES * PAGE))
    rng = random.Random(changed)
    for _ in range(changed):
        data[rng.randrange(len(data))] ^= 1
    return bytes(data)


def working_set() -> bytes:
    import struct

    return struct.pack("=QIIiIQ", int.from_bytes(b"FROGSET1", "little"), 1, 0, 100, FIRST, BASE + FIRST * PAGE)


def make(machine: Machine, snapshot: str, data: bytes, parent: str = "") -> None:
    """A packed snapshot with a known working set."""
    staging = machine.catalogue.begin(snapshot)
    (staging.images / "pages-1.img").write_bytes(data)
    index = PageIndex((PageTask(100, ((BASE, PAGES, 0, 0),)),), ("pages-1.img",))
    (staging.images / INDEX).write_bytes(write_index(index))
    (staging.fs / "file").write_bytes(b"in the layer")
    draft = Manifest(FORMAT, snapshot, "key", "class", {}, "demo", "f", "", 1.0, 1, 1, PAGES * PAGE, 0, ())
    machine.catalogue.commit(staging, replace(draft, parent=parent))
    (machine.catalogue.path(snapshot) / WORKING_SET).write_bytes(working_set())
    old, new = prepare(machine.catalogue, machine.store, snapshot, working_set=working_set(), owner="me")
    repack(machine.catalogue, old, new)
    machine.store.release("me")


def pushed(home: Path, *snapshots: str) -> None:
    """A machine with both snapshots in `home/here`, those named in the tier `home/tier` too."""
    machine = Machine(home / "here")
    make(machine, A, memory("a"))
    make(machine, B, memory("a", 600), parent=A)
    for snapshot in snapshots:
        machine.transport.push(snapshot, DirectoryTier(home / "tier"))
    machine.store.close()


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("once")
    pushed(home, A, B)
    return home


@pytest.fixture
def here(tmp_path: Path, once: Path) -> Machine:
    shutil.copytree(once, tmp_path, symlinks=True, dirs_exist_ok=True)
    return Machine(tmp_path / "here")


@pytest.fixture
def there(tmp_path: Path, here: Machine) -> Machine:
    machine = Machine(tmp_path / "there")
    machine.trust.add(public_text(here.signing))
    return machine


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(incoming_module, "_PAUSE_S", 0.01)
    monkeypatch.setattr(arrival_module, "_PAUSE_S", 0.01)
    monkeypatch.setattr(arrival_module, "_GIVE_UP_S", 0.1)
    monkeypatch.setattr(keeper_module, "_LEFT_S", 0.01)
    yield


class Reader:
    """Reads as the page server does: the map first, then the file; and asks for what is not here."""

    def __init__(self, machine: Machine, opened: Opened) -> None:
        self.machine, self.opened = machine, opened
        self.index = read_index((opened.images / INDEX).read_bytes())
        assert opened.files is not None
        self.files = [path.open("rb", buffering=0) for path in opened.files]

    def place(self, page: int) -> tuple[int, int]:
        for address, pages, offset, file in self.index.tasks[0].extents:
            first = (address - BASE) // PAGE
            if first <= page < first + pages:
                return file, offset // PAGE + page - first
        raise AssertionError(f"page {page} is in no extent")

    def is_here(self, page: int) -> bool:
        file, slot = self.place(page)
        begin = self.opened.present.places[file] if self.opened.present else None
        return begin is None or self.machine.transport.incoming.present.gap(begin + slot, begin + slot + 1) < 0

    def read(self, page: int) -> bytes:
        """A page that is here."""
        file, slot = self.place(page)
        self.files[file].seek(slot * PAGE)
        return self.files[file].read(PAGE)

    def ask(self, page: int, asked: bool = True) -> bool:
        """Whether a page that is not here comes."""
        file, slot = self.place(page)
        begin = self.opened.present.places[file] if self.opened.present else None
        if begin is None:
            return True
        answered = threading.Event()
        said: list[bool] = []

        def answer(here: bool) -> None:
            said.append(here)
            answered.set()

        self.machine.transport.incoming.need(begin + slot, 1, asked, answer)
        assert answered.wait(20)
        return said[0]


@contextlib.contextmanager
def arriving(machine: Machine, tier: FaultyTier | DirectoryTier, snapshot: str) -> Iterator[Arrival]:
    arrival = machine.transport.arrive(snapshot, tier)
    yield arrival
    shutil.rmtree(arrival.give_up(), ignore_errors=True)


@pytest.mark.parametrize(("snapshot", "data"), [(A, memory("a")), (B, memory("a", 600))])
def test_what_is_here_is_right_and_the_rest_comes_when_it_is_asked_for(
    there: Machine, tier: DirectoryTier, snapshot: str, data: bytes
) -> None:
    """Also where pages are deltas against those of a parent that was never here."""
    with arriving(there, tier, snapshot) as arrival:
        reader = Reader(there, arrival.opened())
        assert there.catalogue.form(snapshot) is None and not there.store.stats().packs
        present = [reader.is_here(page) for page in range(PAGES)]
        assert all(present[FIRST : 2 * FIRST]), "the working set"
        assert sum(present) < PAGES / 2
        for page in random.Random(1).sample(range(PAGES), 40):
            if not reader.is_here(page):
                assert reader.read(page) == bytes(PAGE), "it is a hole as yet"
                assert reader.ask(page)
            assert reader.read(page) == data[page * PAGE : (page + 1) * PAGE]
        arrival.rest()
        assert all(reader.is_here(page) for page in range(PAGES))
        assert arrival.finish().id == snapshot
        again = Reader(there, there.catalogue.open_verified(snapshot))
        for reading in (reader, again):
            assert b"".join(reading.read(page) for page in range(PAGES)) == data
    assert there.store.verify() == []
    assert not list(there.store.folder.tmp.iterdir())


def test_two_that_come_at_once_share_what_they_have_in_common(there: Machine, tier: DirectoryTier) -> None:
    slow = FaultyTier(tier)
    with arriving(there, slow, A) as one, arriving(there, slow, B) as two:
        readers = [Reader(there, one.opened()), Reader(there, two.opened())]
        threads = [threading.Thread(target=arrival.rest) for arrival in (one, two)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        one.finish()
        two.finish()
        for reader, data in zip(readers, (memory("a"), memory("a", 600)), strict=True):
            assert b"".join(reader.read(page) for page in range(PAGES)) == data
    fetched = [key for op, key in slow.log if op == "get" and key.endswith((".delta", ".names"))]
    assert len(fetched) == len(set(fetched)), "nothing comes twice"
    assert there.store.verify() == []


def altered(tier: DirectoryTier, machine: Machine) -> None:
    """Spoil all that is not needed for the working set of A: its second pack."""
    index = read_index((machine.catalogue.open_verified(A).images / INDEX).read_bytes())
    extent = next(e for e in index.tasks[0].extents if e[0] == BASE)  # not of the working set
    pack = index.files[extent[3]]
    (path,) = (tier.root / "packs").rglob(f"{pack}.pages")
    data = bytearray(path.read_bytes())
    for at in range(1000, len(data), 1 << 16):
        data[at] ^= 1
    path.write_bytes(data)


def test_altered_bytes_are_never_given_to_anybody(here: Machine, there: Machine, tier: DirectoryTier) -> None:
    altered(tier, here)
    with arriving(there, tier, A) as arrival:
        reader = Reader(there, arrival.opened())
        missing = [page for page in range(PAGES) if not reader.is_here(page)]
        for page in random.Random(2).sample(missing, 10):
            assert not reader.ask(page), "it cannot be had"
            assert not reader.is_here(page)
        with pytest.raises(IntegrityError, match="altered"):
            arrival.rest()
    assert there.catalogue.form(A) is None
    assert there.store.verify() == []


def test_a_tier_that_goes_and_comes_back(there: Machine, tier: DirectoryTier) -> None:
    """Who asks meanwhile is told so in bounded time; the rest comes when it is back."""
    faulty = FaultyTier(tier)
    with arriving(there, faulty, A) as arrival:
        reader = Reader(there, arrival.opened())
        missing = [page for page in range(PAGES) if not reader.is_here(page)]
        faulty.gone = True
        assert not reader.ask(missing[0])
        with pytest.raises(StoreError, match="no answer"):
            arrival.rest()
        faulty.gone = False
        faulty.faults = [Fault("unreachable", "get_bytes", times=2)]
        assert reader.ask(missing[0]), "tried again"
        arrival.rest()
        arrival.finish()
    assert there.catalogue.form(A) == "packed" and there.store.verify() == []


def test_one_that_nobody_hurries_for_comes_with_the_rest(there: Machine, tier: DirectoryTier) -> None:
    with arriving(there, tier, A) as arrival:
        reader = Reader(there, arrival.opened())
        missing = [page for page in range(PAGES) if not reader.is_here(page)]
        answers: list[bool] = []
        thread = threading.Thread(target=lambda: answers.append(reader.ask(missing[-1], asked=False)))
        thread.start()
        assert not answers
        arrival.rest()
        thread.join(10)
        assert answers == [True]
        thread = threading.Thread(target=lambda: answers.append(reader.ask(missing[-1], asked=False)))
        thread.start()
        thread.join(10)
        assert answers == [True, True]
    # one that is given up is told of, too
    there.catalogue.remove(A)
    there.store.gc(set(), min_age_s=0)
    with arriving(there, tier, A) as arrival:
        reader = Reader(there, arrival.opened())
        missing = [page for page in range(PAGES) if not reader.is_here(page)]
        thread = threading.Thread(target=lambda: answers.append(reader.ask(missing[-1], asked=False)))
        thread.start()
        until_waits(there)
    thread.join(10)
    assert answers == [True, True, False]


def until_waits(machine: Machine) -> None:
    for _ in range(1000):
        if machine.transport.incoming._later:
            return
        threading.Event().wait(0.01)
    raise AssertionError("nobody waits")


def test_what_an_older_version_left_in_a_tier(here: Machine, there: Machine, tier: DirectoryTier) -> None:
    """No tables of frames, and no numbers of pages: packs come whole, when something of them is wanted."""
    import json

    for path in (tier.root / "packs").rglob("*.frames"):
        path.unlink()
    hint = tier.root / "snapshots" / B / "packs.json"
    old = json.loads(hint.read_text())
    hint.write_text(json.dumps({**old, "packs": [row[:2] for row in old["packs"]]}))
    with arriving(there, tier, B) as arrival:
        reader = Reader(there, arrival.opened())
        assert all(reader.is_here(page) for page in range(FIRST, 2 * FIRST))
        arrival.rest()
        arrival.finish()
        assert b"".join(reader.read(page) for page in range(PAGES)) == memory("a", 600)
    assert there.store.verify() == []


@pytest.mark.parametrize("change", ["pages", "table", "other table", "names", "kind"])
def test_a_hint_that_lies(here: Machine, there: Machine, tier: DirectoryTier, change: str) -> None:
    """It costs the snapshot, never a wrong byte."""
    import json

    hint = tier.root / "snapshots" / A / "packs.json"
    rows = json.loads(hint.read_text())
    tables = sorted((tier.root / "packs").rglob("*.frames"))
    match change:
        case "pages":
            rows["packs"] = [[p, k, n + 1] for p, k, n in rows["packs"]]
        case "kind":
            rows["packs"] = [[p, "delta", n] for p, k, n in rows["packs"]]
        case "table":
            for table in tables:
                table.write_bytes(table.read_bytes()[:-4])
        case "other table":
            for table in tables:
                data = table.read_bytes()
                table.write_bytes(data[:-4] + b"\xff\0\0\0")
        case "names":
            names = sorted((tier.root / "packs").rglob("*.names"))
            names[0].write_bytes(names[1].read_bytes())
            names[1].write_bytes(names[-1].read_bytes())
    hint.write_text(json.dumps(rows))
    with pytest.raises((IntegrityError, StoreError)):
        arrival = there.transport.arrive(A, tier)
        try:
            arrival.rest()
        finally:
            arrival.give_up()
    assert there.catalogue.form(A) is None and there.store.verify() == []


def test_with_a_key(tmp_path: Path) -> None:
    key = Key(bytes(range(32)))
    tier = DirectoryTier(tmp_path / "tier")
    one, two = Machine(tmp_path / "one", key), Machine(tmp_path / "two", key)
    two.trust.add(public_text(one.signing))
    make(one, A, memory("a"))
    one.transport.push(A, tier)
    with arriving(two, tier, A) as arrival:
        reader = Reader(two, arrival.opened())
        assert reader.ask(PAGES - 1)
        assert reader.read(PAGES - 1) == memory("a")[-PAGE:]
        arrival.rest()
        arrival.finish()
    assert two.store.verify() == []
    other = Machine(tmp_path / "other", Key(bytes(32)))
    other.trust.add(public_text(one.signing))
    with pytest.raises(IntegrityError):
        other.transport.arrive(A, tier)


# With the keeper


class Server:
    """As much of a page server as the keeper sees."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, int, int]] = []

    def have(self, place: int, pages: int, error: int = 0) -> None:
        self.answers.append((place, pages, error))


def keeping(machine: Machine, tier: DirectoryTier | FaultyTier) -> Keeper:
    return machine.keeper(tier, read_through=True)


def test_it_is_thawed_before_it_is_here(there: Machine, tier: DirectoryTier) -> None:
    """Who asks for it gets it at once; it becomes a snapshot of this machine when nobody is about to thaw it."""

    async def main() -> None:
        keeper = keeping(there, tier)
        arrived: list[str] = []
        keeper.on_taken_up = lambda manifest: arrived.append(manifest.id)
        manifest = await keeper.fetch(A, function_key="key")
        assert manifest.id == A and there.catalogue.form(A) is None and keeper.evicted(A)
        async with keeper.using(A):
            opened = await keeper.open(A)
            reader = Reader(there, opened)
            server = Server()
            missing = next((p for p in range(PAGES) if not reader.is_here(p)), None)
            if missing is not None:
                file, slot = reader.place(missing)
                place = (opened.present.places[file] or 0) + slot if opened.present else 0
                keeper.need(server, place, 1, True)  # type: ignore[arg-type]
                await until(lambda: server.answers == [(place, 1, 0)])
                assert reader.read(missing) == memory("a")[missing * PAGE : (missing + 1) * PAGE]
            await asyncio.sleep(0.5)
            assert there.catalogue.form(A) is None, "it is being thawed"
            assert opened.path.is_dir() and all(path.exists() for path in opened.files or ())
        await until(lambda: there.catalogue.form(A) == "packed" and settled(keeper))
        assert arrived == [A] and there.catalogue.mark_text(A, PUSHED) == tier.name
        async with keeper.using(A):
            assert (await keeper.open(A)).present is None
        await keeper.close()

    asyncio.run(main())
    there.store = type(there.store)(there.store.root)
    assert there.store.verify() == []


def test_what_does_not_get_here_is_not_thawed_so_again(here: Machine, there: Machine, tier: DirectoryTier) -> None:
    """Bytes that are wrong: never. A tier that goes: when all of it is here. Who runs on it keeps what there is."""

    async def main() -> None:
        faulty = FaultyTier(tier)
        keeper = keeping(there, faulty)
        running = {A}
        keeper.in_use = lambda: running
        await keeper.fetch(A)
        faulty.gone = True
        await until(lambda: not keeper._arrivals and list(there.catalogue.root.glob(".removed-*")))
        left = list(there.catalogue.root.glob(".removed-*"))
        assert len(left) == 1 and (left[0] / "fs" / "file").read_bytes() == b"in the layer"
        with pytest.raises(StoreError):
            await keeper.fetch(A)
        faulty.gone = False
        await keeper.fetch(A)
        assert there.catalogue.form(A) == "packed"
        running.clear()
        await until(lambda: not left[0].exists())

        there.catalogue.remove(A)
        there.store.gc(set(), min_age_s=0)
        altered(tier, here)
        with contextlib.suppress(IntegrityError):
            await keeper.fetch(A)
        await until(lambda: not keeper._arrivals and settled(keeper))
        asked = len(faulty.log)
        with pytest.raises(IntegrityError):
            await keeper.fetch(A)
        assert len(faulty.log) == asked, "it is known"
        await keeper.close()

    asyncio.run(main())


@pytest.mark.parametrize("when", ["begin", "rest"])
def test_what_comes_from_a_tier_that_hangs_holds_up_no_start(
    there: Machine, tier: DirectoryTier, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Those that start need threads, too: to verify, to look, to make a directory."""
    hanging, go = threading.Semaphore(0), threading.Event()

    def hang(*_: object, **__: object) -> None:
        hanging.release()
        go.wait(20)
        raise StoreError("no answer (injected)", code="tier-missing")

    monkeypatch.setattr(Arrival, when, hang)

    async def main() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
        keeper = there.keeper(tier, read_through=True)
        fetching = [asyncio.ensure_future(keeper.fetch(snapshot)) for snapshot in (A, B)]
        try:
            for _ in fetching:
                await until(lambda: hanging.acquire(blocking=False))
            await asyncio.wait_for(asyncio.to_thread(lambda: None), 1)
        finally:
            go.set()
            await asyncio.wait(fetching)
            await keeper.close()

    asyncio.run(main())


def test_a_person_waits_for_all_of_it(there: Machine, tier: DirectoryTier) -> None:
    async def main() -> None:
        keeper = keeping(there, tier)
        told = await keeper.pull(A, lambda *_: None)
        assert told["id"] == A and told["new"] and there.catalogue.form(A) == "packed"
        await keeper.close()

    asyncio.run(main())


def test_the_end_does_not_wait_for_the_rest(there: Machine, tier: DirectoryTier) -> None:
    async def main() -> None:
        faulty = FaultyTier(tier)
        keeper = keeping(there, faulty)
        await keeper.fetch(A)
        faulty.gone = True
        async with asyncio.timeout(5):
            await keeper.close()
        assert there.catalogue.form(A) is None

    asyncio.run(main())
    assert list(there.store.folder.partial.glob("*.part")), "the next start goes on with it"
    assert not list(there.store.folder.tmp.iterdir())


def test_a_server_is_told_what_it_asks_of_nothing(there: Machine) -> None:
    """A place that no pack has any more."""

    async def main() -> None:
        keeper = there.keeper()
        server = Server()
        keeper.need(server, 12345, 2, True)  # type: ignore[arg-type]
        await until(lambda: len(server.answers) == 1)
        assert server.answers[0][:2] == (12345, 2) and server.answers[0][2]
        await keeper.close()

    asyncio.run(main())


def test_one_that_waits_too_long_is_told_so_and_nobody_begins_the_same(
    there: Machine, tier: DirectoryTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        monkeypatch.setattr(keeper_module, "_NEED_S", 0.2)
        monkeypatch.setattr(keeper_module, "_STALLED_S", 0.3)
        monkeypatch.setattr(arrival_module, "_GIVE_UP_S", 60)
        faulty = FaultyTier(tier, hang_s=20)
        keeper = keeping(there, faulty)
        await keeper.fetch(A)
        reader = Reader(there, await keeper.open(A))
        faulty.faults = [Fault("hang", "get_bytes", times=-1)]
        missing = next(p for p in range(PAGES - 1, 0, -1) if not reader.is_here(p))
        file, slot = reader.place(missing)
        assert reader.opened.present is not None
        place = (reader.opened.present.places[file] or 0) + slot
        server = Server()
        keeper.need(server, place, 1, True)  # type: ignore[arg-type]
        await until(lambda: bool(server.answers))
        assert server.answers[0][2] != 0
        with pytest.raises(StoreError, match="does not give"):
            await keeper.fetch(A)
        faulty.faults = []
        faulty.released.set()
        await until(lambda: there.catalogue.form(A) == "packed" and settled(keeper))
        await keeper.fetch(A)
        await keeper.close()

    asyncio.run(main())


def test_where_no_more_can_come_by_page_it_comes_whole(there: Machine, tier: DirectoryTier) -> None:
    async def main() -> None:
        there.transport.incoming.present = PresentMap(10)
        keeper = keeping(there, tier)
        await keeper.fetch(A)
        assert there.catalogue.form(A) == "packed" and not keeper._arrivals
        assert there.store.verify() == [] and not list(there.store.folder.tmp.iterdir())
        await keeper.close()

    asyncio.run(main())


# Removed from the tier, or by a person, meanwhile


@pytest.mark.parametrize("collected", [False, True])
def test_withdrawn_while_it_comes(here: Machine, there: Machine, tier: DirectoryTier, collected: bool) -> None:
    """All of it gets here, or none: when its memory is collected, too, nobody waits for what does not come."""

    async def main() -> None:
        faulty = FaultyTier(tier)
        keeper = keeping(there, faulty)
        go = threading.Event()
        get_bytes = faulty.get_bytes

        def slowly(key: str, begin: int = 0, end: int | None = None) -> bytes:
            go.wait(20)
            return get_bytes(key, begin, end)

        await keeper.fetch(A)
        faulty.get_bytes = slowly  # type: ignore[method-assign]
        for snapshot in (A, B):
            assert here.transport.withdraw(snapshot, tier)
        if collected:
            named_by = here.transport._named_by
            sweep(tier, lambda i: named_by(i, tier, tier.root), min_age_s=0)
            assert tier.list() == tier.list("tombstones")
        go.set()
        await until(lambda: not keeper._arrivals and settled(keeper))
        assert (there.catalogue.form(A) is None) == collected
        if collected:
            with pytest.raises(NotFoundError):
                await keeper.fetch(A)
            assert not list(there.catalogue.root.iterdir())
        await keeper.close()

    arrival_module._GIVE_UP_S = 60  # what is missing is not waited for
    asyncio.run(main())
    there.store = type(there.store)(there.store.root)
    assert there.store.verify() == [] and not list(there.store.folder.partial.iterdir())


def test_invalidated_while_it_comes(there: Machine, tier: DirectoryTier) -> None:
    """Who runs on it gets the rest; a snapshot of this machine it never is, until a person pulls it."""

    async def main() -> None:
        keeper = keeping(there, tier)
        running = {A}
        keeper.in_use = lambda: running
        async with keeper.using(A):
            await keeper.fetch(A)
            reader = Reader(there, await keeper.open(A))
            there.catalogue.refuse(A)
            with pytest.raises(NotFoundError, match="was invalidated"):
                await keeper.fetch(A)
        await until(lambda: not keeper._arrivals)
        assert there.catalogue.form(A) is None and not keeper._pending.list()
        assert b"".join(reader.read(page) for page in range(PAGES)) == memory("a")
        assert (there.catalogue.root / next(iter(there.catalogue.root.glob(".removed-*"))) / "fs" / "file").exists()
        running.clear()
        await until(lambda: settled(keeper) and not list(there.catalogue.root.iterdir()))
        await keeper.pull(A, lambda *_: None)
        assert there.catalogue.form(A) == "packed" and there.catalogue.retired(A) is None
        await keeper.close()

    asyncio.run(main())


# Going on after the end of a daemon


def pending(**more: object) -> Pending:
    return replace(Pending(A, "file:///tier", "class", "key", "f", ""), **more)  # type: ignore[arg-type]


def test_what_is_worth_going_on_with() -> None:
    right = {"tier": "file:///tier", "host": "class", "have": False, "invalid": False, "wanted": True}
    assert why_not(pending(), **right) == ""  # type: ignore[arg-type]
    assert why_not(pending(tries=TRIES - 1), **right) == ""  # type: ignore[arg-type]
    assert "tried" in why_not(pending(tries=TRIES), **right)  # type: ignore[arg-type]
    for change, word in (
        ({"tier": "s3://other"}, "tier"),
        ({"host": "other"}, "host"),
        ({"have": True}, "here"),
        ({"invalid": True}, "invalidated"),
        ({"wanted": False}, "no deployed function"),
    ):
        assert word in why_not(pending(), **{**right, **change})  # type: ignore[arg-type]


def test_notes_that_are_damaged_are_none(tmp_path: Path) -> None:
    notes = PendingNotes(tmp_path / "arriving")
    assert notes.list() == []
    notes.add(pending())
    notes.put(pending(tries=2))
    notes.add(pending())
    assert notes.list() == [pending(tries=2)] and notes.has(A)
    for name, text in ((B, ""), ("x", "[]"), ("y", '{"id": "y"}'), ("z", notes._folder.joinpath(A).read_text())):
        (tmp_path / "arriving" / name).write_text(text)
    assert [one.id for one in notes.list()] == [A]
    assert [path.name for path in (tmp_path / "arriving").iterdir()] == [A]
    notes.drop(A)
    notes.drop(A)
    assert notes.list() == []


@pytest.fixture
def cut_off(there: Machine, tier: DirectoryTier) -> Machine:
    """A machine whose daemon ended while A was on its way."""

    async def main() -> None:
        faulty = FaultyTier(tier)
        keeper = keeping(there, faulty)
        await keeper.fetch(A)
        faulty.gone = True
        await keeper.close()

    asyncio.run(main())
    assert list(there.store.folder.partial.glob("*.part"))
    return again(there)


def again(machine: Machine) -> Machine:
    """As the next daemon finds it."""
    found = Machine(machine.catalogue.root.parent)
    assert found.catalogue.form(A) is None and not list(found.catalogue.root.iterdir())
    return found


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper_module, "_GO_ON_S", 0.05)
    monkeypatch.setattr(keeper_module, "_GO_ON_AGAIN_S", 0.05)


def going_on(machine: Machine, tier: DirectoryTier | FaultyTier) -> Keeper:
    keeper = keeping(machine, tier)
    keeper.wanted = lambda *asked: asked == ("key", "f", "")
    keeper.go_on_later()
    return keeper


def over(keeper: Keeper) -> bool:
    return keeper._going_on is not None and keeper._going_on.done() and settled(keeper)


@pytest.mark.usefixtures("soon")
def test_the_next_daemon_goes_on_by_itself(cut_off: Machine, tier: DirectoryTier) -> None:
    """And tells the functions that it fits; what had come is not fetched again."""

    async def main() -> None:
        known = {path.stem for path in cut_off.store.folder.partial.glob("*.names")}
        log = FaultyTier(tier)
        keeper = going_on(cut_off, log)
        arrived: list[str] = []
        keeper.on_taken_up = lambda manifest: arrived.append(manifest.id)
        await until(lambda: over(keeper))
        assert arrived == [A] and cut_off.catalogue.form(A) == "packed"
        fetched = {Path(key).stem for _, key in log.log if key.endswith(".names")}
        assert keeper._pending.list() == [] and known and not known & fetched
        async with keeper.using(A):
            reader = Reader(cut_off, await keeper.open(A))
            assert b"".join(reader.read(page) for page in range(PAGES)) == memory("a")
        await keeper.close()

    asyncio.run(main())


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("why", ["not wanted", "invalidated", "another tier", "another here", "withdrawn"])
def test_what_nobody_wants_any_more_does_not_come(
    here: Machine, cut_off: Machine, tier: DirectoryTier, tmp_path: Path, why: str
) -> None:
    async def main() -> None:
        place = FaultyTier(tier)
        match why:
            case "invalidated":
                cut_off.catalogue.refuse(A)
            case "another here":
                cut_off.make("s-00000000000c")
            case "another tier":
                place = FaultyTier(DirectoryTier(tmp_path / "other"))
            case "withdrawn":
                here.transport.withdraw(A, tier)
        keeper = going_on(cut_off, place)
        if why == "not wanted":
            keeper.wanted = lambda *_: False
        await until(lambda: over(keeper))
        assert keeper._pending.list() == [] and cut_off.catalogue.form(A) is None
        assert (place.log == []) == (why != "withdrawn")
        await keeper.close()

    asyncio.run(main())


@pytest.mark.usefixtures("soon")
def test_a_tier_that_is_away_is_asked_so_often_and_no_more(cut_off: Machine, tier: DirectoryTier) -> None:
    """In all daemons together; and what had come stays until then."""

    async def main(machine: Machine, times: int) -> None:
        faulty = FaultyTier(tier)
        faulty.gone = True
        keeper = going_on(machine, faulty)
        await until(lambda: sum(op == "get_bytes" for op, _ in faulty.log) >= times)
        if times == 2:
            await until(lambda: [p.tries for p in keeper._pending.list()] >= [2])
        else:
            await until(lambda: over(keeper))
            assert keeper._pending.list() == []
        await keeper.close()

    asyncio.run(main(cut_off, 2))
    following = again(cut_off)
    asyncio.run(main(following, 1))
    assert list(following.store.folder.partial.glob("*.part"))


@pytest.mark.usefixtures("soon")
def test_a_tier_that_comes_back(cut_off: Machine, tier: DirectoryTier) -> None:
    async def main() -> None:
        faulty = FaultyTier(tier, Fault("unreachable", "get_bytes", times=2))
        keeper = going_on(cut_off, faulty)
        await until(lambda: over(keeper))
        assert cut_off.catalogue.form(A) == "packed" and keeper._pending.list() == []
        await keeper.close()

    asyncio.run(main())


@pytest.mark.usefixtures("soon")
def test_who_asks_first_is_served_first(cut_off: Machine, tier: DirectoryTier) -> None:
    """A fetch for a start goes before; and one that asks for the same shares it."""

    async def main() -> None:
        faulty = FaultyTier(tier)
        cut_off.catalogue.find = lambda *_: None  # type: ignore[method-assign]  # B counts as another function's
        keeper = going_on(cut_off, faulty)
        assert (await keeper.fetch(B)).id == B
        assert keeper._pending.has(A) and A not in keeper._fetches
        await until(lambda: A in keeper._arrivals or cut_off.catalogue.form(A) is not None)
        assert cut_off.catalogue.form(B) == "packed"
        assert (await keeper.fetch(A)).id == A
        await until(lambda: over(keeper))
        assert cut_off.catalogue.form(A) == "packed" and cut_off.store.verify() == []
        await keeper.close()

    asyncio.run(main())


def test_the_end_does_not_wait_for_what_is_to_come(cut_off: Machine, tier: DirectoryTier) -> None:
    async def main() -> None:
        keeper = going_on(cut_off, tier)
        await asyncio.sleep(0)
        async with asyncio.timeout(3):
            await keeper.close()
        assert keeper._pending.has(A)

    asyncio.run(main())
