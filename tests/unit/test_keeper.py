"""The keeper with a real catalogue, page store and tier: what goes is what may go, and nothing foreign comes in."""

from __future__ import annotations

import asyncio
import io
import json
import os
import random
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from contract.faulty_tier import Fault, FaultyTier
from machine import PAGE, PAGES, A, B, C, Machine
from repack import repack
from unit.test_pages import Files, altered, noise
from woodfrog import faults
from woodfrog.backends import keeper as module
from woodfrog.backends.keeper import Keeper
from woodfrog.errors import IntegrityError, NotFoundError, StoreError
from woodfrog.faults import InjectedFault
from woodfrog.snapshot.catalogue import PINNED, PUSHED, WORKING_SET, Catalogue
from woodfrog.snapshot.manifest import decode, encode
from woodfrog.snapshot.origin import MOST_BYTES, Origin, read, write
from woodfrog.snapshot.packing import prepare
from woodfrog.snapshot.trust import public_text
from woodfrog.store.cold import Key, key_id
from woodfrog.store.pages import Ref
from woodfrog.store.tiers import DirectoryTier, Tier


def quietly(what: str, done: int, total: int) -> None:
    """Nobody watches."""


@pytest.fixture
def here(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "here")


@pytest.fixture(autouse=True)
def no_faults() -> Iterator[None]:
    yield
    faults.configure("")


async def until(done: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not done():
            await asyncio.sleep(0.01)


def settled(keeper: Keeper) -> bool:
    """Nothing is under way."""
    return not any(t for t in keeper._tasks if t is not keeper._collecting)


def test_collecting_in_the_tier(here: Machine, tier: DirectoryTier) -> None:
    """On a person's word; where an upload of this machine is under way, after it."""

    async def main() -> None:
        alone = here.keeper()
        with pytest.raises(StoreError, match="no tier is configured"):
            await alone.gc_tier(dry_run=False, progress=quietly)
        keeper = here.keeper(tier)
        for snapshot in (A, B):
            here.make(snapshot)
            keeper.pack_later(snapshot)
        await until(lambda: settled(keeper))
        tier.delete(f"snapshots/{B}/manifest.json")
        none = {
            "tier": tier.name,
            "packs": 0,
            "chunks": 0,
            "snapshots": 0,
            "tombstones": 0,
            "objects": 0,
            "freed_bytes": 0,
        }
        assert await keeper.gc_tier(dry_run=False, progress=quietly) == none
        for key in tier.list():
            os.utime(tier.root / key, (0, 0))
        would = await keeper.gc_tier(dry_run=True, progress=quietly)
        assert await keeper.gc_tier(dry_run=False, progress=quietly) == would
        assert (would["packs"], would["snapshots"]) == (1, 1) and would["freed_bytes"] > 50 * PAGE
        assert {key.split("/")[1] for key in tier.list("snapshots")} == {A}
        assert await keeper.gc_tier(dry_run=False, progress=quietly) == none
        await keeper.close()

    asyncio.run(main())


# Making room


def evicting(here: Machine, tier: Tier, busy: set[str] | None = None) -> Keeper:
    """A keeper that may hold about two snapshots, with three of them."""
    keeper = here.keeper(tier, budget=int(2.5 * PAGES * PAGE))
    keeper.in_use = lambda: busy or set()
    for number, snapshot in enumerate((A, B, C)):
        here.make(snapshot, created=1.0 + number)
        keeper.pack_later(snapshot)
    return keeper


def test_over_its_budget_the_longest_unused_goes_and_no_more(here: Machine, tier: DirectoryTier) -> None:
    async def main() -> None:
        keeper = evicting(here, tier)
        await until(lambda: settled(keeper))
        assert [m.id for m in here.catalogue.manifests()] == [B, C]
        assert here.store.stats().packs == 2, "what it alone needed is gone from the disk"
        assert keeper.evicted(A) and here.whole(B) and here.whole(C)
        await keeper.fetch(A)
        assert here.whole(A) and here.catalogue.by_use()[-1].id == A
        await keeper.close()

    asyncio.run(main())


def test_what_is_in_use_pinned_or_elsewhere_stays(here: Machine, tier: DirectoryTier, tmp_path: Path) -> None:
    async def main() -> None:
        keeper = here.keeper(tier, budget=1)
        for snapshot in (A, B, C):
            here.make(snapshot)
        keeper.in_use = lambda: {A}
        here.catalogue.mark(B, PINNED)
        here.catalogue.mark(C, PUSHED, "s3://another-tier")
        keeper._back_up = nothing  # type: ignore[method-assign]
        keeper.pack_later(A)
        await until(lambda: settled(keeper))
        assert len(here.catalogue.manifests()) == 3
        # marked, and lost there
        here.catalogue.mark(C, PUSHED, tier.name)
        keeper.pack_later(B)
        await until(lambda: settled(keeper))
        assert len(here.catalogue.manifests()) == 3 and not here.catalogue.marked(C, PUSHED)
        await keeper.close()

    async def nothing(_: str) -> None: ...

    asyncio.run(main())


def test_what_restores_read_is_not_dropped(here: Machine, tier: DirectoryTier) -> None:
    """Rebuilt packs go for want of room: those of a restore stay, and one that begins meanwhile waits."""

    async def main() -> None:
        keeper = here.keeper(tier, budget=1)
        for snapshot in (A, B):
            here.make(snapshot)
            here.catalogue.mark(snapshot, PINNED)
        begun, goes = threading.Event(), threading.Event()
        kept: list[set[str]] = []

        def trim(budget: int, keep: set[str], *, dry_run: bool) -> int:
            kept.append(keep)
            begun.set()
            goes.wait(5)
            return 0

        async def restore() -> None:
            async with keeper.using(B):
                pass

        here.store.trim_cache = trim  # type: ignore[method-assign,assignment]
        keeper.pack_later(A)
        keeper.pack_later(B)
        goes.set()
        await until(lambda: settled(keeper))
        kept.clear()
        begun.clear()
        goes.clear()
        async with keeper.using(A):
            room = asyncio.create_task(keeper._make_room())
            await until(begun.is_set)
            late = asyncio.create_task(restore())
            await asyncio.sleep(0.05)
            assert not late.done()
            assert kept == [set(here.catalogue.get(A).packs)] and kept[0]
            goes.set()
            await room
            await late
        await keeper.close()

    asyncio.run(main())


@pytest.mark.parametrize("bad", ["text", "directory"])
def test_a_working_set_that_cannot_be_read_keeps_nothing_from_the_store_or_the_tier(
    here: Machine, tier: DirectoryTier, bad: str
) -> None:
    """It only says what is wanted first."""
    here.make(A)
    working_set = here.catalogue.path(A) / WORKING_SET
    working_set.write_text("no set") if bad == "text" else working_set.mkdir()

    async def main() -> None:
        keeper = here.keeper(tier)
        keeper.pack_later(A)
        await until(lambda: settled(keeper))
        assert here.catalogue.form(A) == "packed" and here.whole(A) and keeper._in_tier(A)
        assert working_set.exists() == (bad == "directory")
        await keeper.close()

    asyncio.run(main())


@pytest.mark.parametrize("damaged", [False, True])
def test_what_a_snapshot_was_made_of_travels_with_it(
    here: Machine, tmp_path: Path, tier: DirectoryTier, damaged: bool
) -> None:
    """So that another machine can say which files changed since. Nothing else rests on it."""
    made_of = Origin({"env": "1"}, {"/app/a.py": "2"})
    here.make(A)
    write(made_of, here.catalogue.path(A))
    here.transport.push(A, tier)
    if damaged:
        tier.delete(f"snapshots/{A}/origin")
        tier.put(f"snapshots/{A}/origin", bytes(MOST_BYTES + 1))
    there = Machine(tmp_path / "there")
    there.trust.add(public_text(here.signing))
    there.transport.pull(A, tier)
    assert there.whole(A) and read(there.catalogue.path(A)) == (None if damaged else made_of)
    exported = tmp_path / "exported"
    here.transport.export(A, exported)
    third = Machine(tmp_path / "third")
    third.trust.add(public_text(here.signing))
    third.transport.import_(exported)
    assert read(third.catalogue.path(A)) == made_of


def test_rebuilt_packs_go_when_asked_for(here: Machine, tmp_path: Path) -> None:
    """They are what makes thaws fast: a plain collection leaves them."""
    files = Files(tmp_path)
    base = here.store.ingest([files.run(noise(1))], owner="t")
    changed = files.run(altered(noise(1), 2), base=((0, Ref(base.packs[0], 0, 1)),))
    here.store.open_raw(here.store.ingest([changed], owner="t").packs)
    files.close()
    here.store.release("t")

    async def main() -> None:
        keeper = here.keeper()

        async def gc(*, dry_run: bool = False, rebuilt: bool = True) -> int:
            found = await keeper.gc(dry_run=dry_run, rebuilt=rebuilt, progress=quietly)
            assert found["freed_bytes"] == found["rebuilt_bytes"]
            return int(found["rebuilt_bytes"])

        assert await gc(rebuilt=False) == 0 and await gc(dry_run=True) == PAGE
        assert here.store.stats().cache_bytes == PAGE
        assert await gc() == PAGE and here.store.stats().cache_bytes == 0

    asyncio.run(main())


def test_a_start_that_comes_while_its_snapshot_goes_fetches_it(here: Machine, tier: DirectoryTier) -> None:
    async def main() -> None:
        begun, goes = threading.Event(), threading.Event()
        remove = here.catalogue.remove

        def slowly(snapshot_id: str) -> None:
            begun.set()
            goes.wait(5)
            remove(snapshot_id)

        here.catalogue.remove = slowly  # type: ignore[method-assign]
        keeper = evicting(here, tier)
        await until(begun.is_set)

        async def start() -> bool:
            async with keeper.using(A):
                assert keeper.evicted(A)
                await keeper.fetch(A)
                return here.whole(A)

        starting = asyncio.ensure_future(start())
        await asyncio.sleep(0.05)
        assert not starting.done()
        goes.set()
        assert await starting
        await until(lambda: settled(keeper))
        await keeper.close()

    asyncio.run(main())


@pytest.mark.parametrize("asked", ["has", "look"])
def test_a_start_does_not_wait_for_what_the_tier_is_asked_to_make_room(
    here: Machine, tier: DirectoryTier, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    """What was about to go stays, then: somebody uses it."""
    asking, go = threading.Event(), threading.Event()

    def hang(*_: object) -> bool:
        asking.set()
        go.wait(20)
        return asked == "has"

    async def look() -> None:
        await asyncio.to_thread(hang)

    async def main() -> None:
        keeper = here.keeper(tier, budget=1)
        here.make(A)
        here.catalogue.mark(A, PUSHED, tier.name)
        if asked == "has":
            monkeypatch.setattr(here.transport, "has", hang)
        else:
            monkeypatch.setattr(here.transport, "has", lambda *_: False)
            monkeypatch.setattr(keeper, "_look", look)
        room = asyncio.ensure_future(keeper._make_room())
        await until(asking.is_set)
        async with asyncio.timeout(1), keeper.using(A):
            go.set()
            await room
            assert here.whole(A)
        await keeper.close()

    try:
        asyncio.run(main())
    finally:
        go.set()


def test_what_is_sent_slowly_holds_up_neither_packing_nor_room(here: Machine, tier: DirectoryTier) -> None:
    sending, go = threading.Event(), threading.Event()
    push = here.transport.push

    def slowly(snapshot_id: str, *more: object, **named: object) -> None:
        if snapshot_id == B:
            sending.set()
            go.wait(20)
        push(snapshot_id, *more, **named)  # type: ignore[arg-type]

    here.transport.push = slowly  # type: ignore[method-assign]

    async def main() -> None:
        keeper = here.keeper(tier, budget=int(2.5 * PAGES * PAGE))
        for number, snapshot in enumerate((A, B)):
            here.make(snapshot, created=1.0 + number)
        keeper.pack_later(A)
        await until(lambda: keeper._in_tier(A) or here.catalogue.form(A) is None)  # room is made at once
        keeper.pack_later(B)
        await until(sending.is_set)
        here.make(C, created=3.0)  # from now on there is no room for all
        keeper.pack_later(C)
        await until(lambda: here.catalogue.form(C) == "packed")
        await keeper.gc(dry_run=False, rebuilt=False, progress=quietly)
        await until(lambda: here.catalogue.form(A) is None)
        assert here.whole(B) and not keeper._in_tier(C)
        go.set()
        await until(lambda: settled(keeper))
        assert keeper._in_tier(B) and keeper._in_tier(C) and here.whole(B) and here.whole(C)
        await keeper.close()

    try:
        asyncio.run(main())
    finally:
        go.set()


# Packing


def test_images_are_swapped_when_no_restore_reads_them(here: Machine) -> None:
    async def main() -> None:
        keeper = here.keeper()
        here.make(A)
        async with keeper.using(A):
            keeper.pack_later(A)
            await asyncio.sleep(0.5)
            assert here.catalogue.form(A) == "loose" and here.whole(A)
        await until(lambda: here.catalogue.form(A) == "packed")
        await until(lambda: settled(keeper))
        await keeper.collect()
        assert here.whole(A)
        await keeper.close()

    asyncio.run(main())


def test_cut_off_at_the_same_moment_again_and_again(here: Machine, tmp_path: Path) -> None:
    """There is a signature of the manifest that is there, however often it was about to be replaced."""
    here.make(A)
    for _ in range(3):
        here.store.lease([], "me")
        old, new = prepare(here.catalogue, here.store, A, owner="me")
        faults.configure("pack.signed=raise")
        with pytest.raises(InjectedFault):
            repack(here.catalogue, old, replace(new, stored_bytes=random.randrange(1 << 30)))
        faults.configure("")
        assert Catalogue(here.catalogue.root, here.signing, here.store).damaged == {}
        assert here.catalogue.form(A) == "loose" and here.whole(A)


def test_what_is_known_of_a_snapshot_is_what_is_on_disk(here: Machine) -> None:
    """Else a gc would take the packs of a snapshot that was packed, but not to the end."""
    here.make(A)
    old, new = prepare(here.catalogue, here.store, A, owner="me")
    faults.configure("pack.manifest=enospc")
    with pytest.raises(StoreError):
        repack(here.catalogue, old, new)
    here.store.release("me")
    live = {pack for m in here.catalogue.manifests() for pack in m.packs}
    here.store.gc(live, min_age_s=0)
    assert here.whole(A)


def test_a_packed_snapshot_is_not_read_anew_for_the_names_that_went(
    here: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files had names among the old images: another thaw would wait for gigabytes of files to be read."""
    here.make(A)
    old, new = prepare(here.catalogue, here.store, A, owner="me")
    ready = here.catalogue.ready_images(old, new)
    here.catalogue.swap_images(old, ready)
    time.sleep(0.02)  # the kernel's clock for files ticks
    here.catalogue.remove_replaced(ready.manifest)
    read: list[object] = []
    monkeypatch.setattr(here.catalogue, "_verify_files", lambda *arguments: read.append(arguments))
    opened = here.catalogue.open_verified(A)
    assert read == []
    image = opened.images / "core-100.img"
    os.utime(image, ns=(0, image.stat().st_mtime_ns))  # its change time alone
    here.catalogue.open_verified(A)
    assert len(read) == 1


def test_a_snapshot_removed_while_it_is_packed_stays_away(here: Machine) -> None:
    here.make(A)
    old, new = prepare(here.catalogue, here.store, A, owner="me")
    sweep = here.catalogue._replace_manifest

    def removed_after(path: Path, data: bytes, what: str) -> None:
        sweep(path, data, what)
        here.catalogue.remove(A)

    here.catalogue._replace_manifest = removed_after  # type: ignore[method-assign]
    repack(here.catalogue, old, new)
    assert here.catalogue.form(A) is None and here.catalogue.manifests() == []


def test_a_parent_that_cannot_be_packed_does_not_keep_its_children_loose(here: Machine) -> None:
    async def main() -> None:
        keeper = here.keeper()
        here.make(A)
        here.make(B)
        manifest = replace(here.catalogue.get(B), parent=A)
        here.catalogue._manifests[B] = manifest
        path = here.catalogue.path(A) / "img" / "pages-1.img"
        path.write_bytes(path.read_bytes()[::-1])
        keeper.pack_later(B)
        await until(lambda: settled(keeper))
        assert (here.catalogue.form(A), here.catalogue.form(B)) == ("loose", "packed")
        await keeper.close()

    asyncio.run(main())


# What others left in the tier


def test_another_functions_snapshot_is_not_taken_for_this_ones(
    here: Machine, tier: DirectoryTier, tmp_path: Path
) -> None:
    """Who writes to the tier can lay any signed snapshot under any key."""
    here.make(A, function="harmless")
    here.transport.push(A, tier)
    tier.put(f"by-key/dangerous/class/{A}", b"")
    tier.put("by-key/dangerous/class/zzz", b"")

    async def main(machine: Machine) -> None:
        keeper = machine.keeper(tier)
        for _ in range(2):
            assert await keeper.look_up("dangerous") == A
            with pytest.raises(IntegrityError) as caught:
                await keeper.fetch(A, function_key="dangerous")
            assert caught.value.code == "other-function"
        keeper.no_use("dangerous", A, caught.value)
        assert await keeper.look_up("dangerous") is None
        assert await keeper.look_up("harmless") == A
        assert (await keeper.fetch(A, function_key="harmless")).id == A
        machine.catalogue.retire(A, "does not thaw")
        assert await keeper.look_up("harmless") is None
        await keeper.close()

    asyncio.run(main(here))
    there = Machine(tmp_path / "there")
    there.trust.add(public_text(here.signing))
    asyncio.run(main(there))


def test_each_worker_class_has_its_own(here: Machine, tier: DirectoryTier, tmp_path: Path) -> None:
    """A snapshot with GPU memory is found under chip and driver, and taken for nothing else."""
    here.make(A)
    here.make(B, host="chip")
    for snapshot in (A, B):
        here.transport.push(snapshot, tier)
    tier.put(f"by-key/key/other/{B}", b"")
    there = Machine(tmp_path / "there")
    there.trust.add(public_text(here.signing))

    async def main() -> None:
        keeper = there.keeper(tier)
        assert await keeper.look_up("key", "none") is None
        assert (await keeper.look_up("key"), await keeper.look_up("key", "chip")) == (A, B)
        assert await keeper.look_up("key", "other") == B
        with pytest.raises(IntegrityError) as caught:
            await keeper.fetch(B, function_key="key", worker_class="other")
        assert caught.value.code == "other-function"
        keeper.no_use("key", B, caught.value, "other")
        assert await keeper.look_up("key", "other") is None
        assert await keeper.look_up("key", "chip") == B, "what lay in the wrong place is good in its own"
        assert (await keeper.fetch(B, function_key="key", worker_class="chip")).worker_class == "chip"
        await keeper.close()

    asyncio.run(main())


def test_what_a_person_invalidated_does_not_come_back_by_itself(here: Machine, tier: DirectoryTier) -> None:
    async def main() -> None:
        keeper = here.keeper(tier)
        here.make(A)
        await keeper.push(A)
        here.catalogue.refuse(A)
        here.catalogue.retire(A, "invalidated")
        here.catalogue.remove(A)
        assert await keeper.look_up("key") is None
        assert Catalogue(here.catalogue.root, here.signing, here.store).retired(A) == "invalidated"
        await keeper.pull(A, quietly)  # by their own wish
        assert here.catalogue.retired(A) is None and here.whole(A)
        await keeper.close()

    asyncio.run(main())


def test_one_is_not_put_back_by_an_upload_that_is_under_way(here: Machine, tier: DirectoryTier) -> None:
    async def main() -> None:
        with pytest.raises(StoreError, match="no tier is configured"):
            await here.keeper().withdraw(A)
        begun, go = threading.Event(), threading.Event()
        push = here.transport.push

        def slowly(snapshot_id: str, *rest: object, anyway: bool) -> None:
            begun.set()
            go.wait(20)
            push(snapshot_id, *rest, anyway=anyway)  # type: ignore[arg-type]

        here.transport.push = slowly  # type: ignore[method-assign]
        keeper = here.keeper(tier)
        here.make(A)
        pushing = asyncio.ensure_future(keeper.push(A))
        await until(begun.is_set)
        withdrawing = asyncio.ensure_future(keeper.withdraw(A))
        await asyncio.sleep(0.1)
        assert not withdrawing.done()
        with pytest.raises(StoreError, match="is being removed from"):
            await keeper.push(A)
        go.set()
        assert (await pushing)["tier"] == tier.name
        assert await withdrawing == {"id": A, "tier": tier.name, "found": True}
        assert not here.transport.has(tier, A) and await keeper.look_up("key") is None
        assert not (await keeper.withdraw(A))["found"]
        assert here.whole(A), "what is here is the caller's"
        await keeper.push(A, anyway=True)
        assert here.transport.has(tier, A)
        await keeper.close()

    asyncio.run(main())


def test_a_tier_that_hangs_holds_nobody_up(here: Machine, tier: DirectoryTier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_UP_S", 0.2)
    faulty = FaultyTier(tier, Fault("hang", op="list", times=-1), hang_s=30)

    async def main() -> None:
        keeper = here.keeper(faulty)
        begin = time.monotonic()
        assert await asyncio.gather(*(keeper.look_up(f"f{i}") for i in range(50))) == [None] * 50
        # threads that others need are free
        await asyncio.gather(*(asyncio.to_thread(time.sleep, 0.01) for _ in range(20)))
        asked = len(faulty.log)
        assert await keeper.look_up("later") is None and len(faulty.log) == asked
        await keeper.close()
        assert time.monotonic() - begin < 5

    asyncio.run(main())
    faulty.released.set()


def test_an_error_of_no_known_kind_is_no_reason_not_to_start(here: Machine, tier: DirectoryTier) -> None:
    async def main() -> None:
        keeper = here.keeper(FaultyTier(tier, Fault("raise", op="list")))
        assert await keeper.look_up("key") is None
        await keeper.close()

    asyncio.run(main())


def test_a_start_waits_so_long_for_a_slow_tier_and_the_next_one_has_it(
    here: Machine, tier: DirectoryTier, tmp_path: Path
) -> None:
    here.make(A)
    here.transport.push(A, tier)
    there = Machine(tmp_path / "there")
    there.trust.add(public_text(here.signing))
    get, go = tier.get, threading.Event()

    def slowly(key: str, target: Path, most: int | None = None) -> None:
        go.wait(20)
        get(key, target, most)

    tier.get = slowly  # type: ignore[method-assign]

    async def main() -> None:
        keeper = there.keeper(tier)
        with pytest.raises(StoreError) as caught:
            await keeper.fetch(A, within=0.2)
        assert caught.value.code == "tier-slow"
        go.set()
        await keeper.fetch(A, within=20)
        assert there.whole(A) and keeper._in_tier(A)
        await keeper.close()

    asyncio.run(main())


def test_the_end_does_not_wait_for_a_tier(here: Machine, tier: DirectoryTier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CLOSE_S", 0.3)
    put, hanging, go = tier.put, threading.Event(), threading.Event()

    def hang(key: str, source: Path | bytes) -> None:
        hanging.set()
        go.wait(20)
        put(key, source)

    tier.put = hang  # type: ignore[method-assign]

    async def main() -> None:
        keeper = here.keeper(tier)
        here.make(A)
        keeper.pack_later(A)
        await until(hanging.is_set)
        begin = time.monotonic()
        await keeper.close()
        assert time.monotonic() - begin < 5
        go.set()
        await until(lambda: settled(keeper))

    asyncio.run(main())
    assert not tier.list("snapshots"), "it was given up"
    assert here.whole(A)


# What comes in


@pytest.fixture
def there(here: Machine, tier: DirectoryTier, tmp_path: Path) -> Machine:
    """Another machine that trusts this one, and a packed snapshot in the tier."""
    here.make(A)
    repack(here.catalogue, *prepare(here.catalogue, here.store, A, owner="me"))
    here.transport.push(A, tier)
    there = Machine(tmp_path / "there")
    there.trust.add(public_text(here.signing))
    return there


def test_a_pack_is_not_collected_while_a_snapshot_that_needs_it_arrives(there: Machine, tier: DirectoryTier) -> None:
    there.transport.pull(A, tier)
    packs = there.catalogue.get(A).packs
    there.catalogue.remove(A)  # its packs are still there
    has = there.store.has

    def collected_meanwhile(pack: str) -> bool:
        found = has(pack)
        there.store.gc(set(), min_age_s=0)
        return found

    there.store.has = collected_meanwhile  # type: ignore[method-assign]
    assert all(map(has, packs))
    there.transport.pull(A, tier)
    assert there.whole(A)


@pytest.mark.parametrize(
    "name, content",
    [
        ("working-set", None),
        ("packs.json", None),
        ("manifest.sig", None),
        ("packs.json", b"[" * 100_000),
        ("packs.json", b'{"place": "../packs", "packs": []}'),
        ("packs.json", b'{"place": "packs", "packs": []}'),
        ("images", None),
        ("shm", b"not a cold form, and long enough for the header of one" * 9),
    ],
)
def test_nothing_larger_than_it_can_be_is_taken(
    there: Machine, tier: DirectoryTier, name: str, content: bytes | None
) -> None:
    """And nothing of another shape: one line says so, and nothing is left of it."""
    path = tier.root / "snapshots" / A / name
    if content is None:
        with open(path, "ab") as f:
            f.truncate(1 << 40)  # sparse: reading all of it is noticed
    else:
        path.write_bytes(content)
    with pytest.raises(IntegrityError) as caught:
        there.transport.pull(A, tier)
    assert "\n" not in caught.value.message
    assert there.catalogue.manifests() == [] and not list(there.catalogue.root.iterdir())
    there.store.gc(set(), min_age_s=0)
    assert there.store.stats().packs == 0, "no lease is left"


def test_a_pack_of_other_pages_is_refused_before_it_is_read(there: Machine, here: Machine, tier: DirectoryTier) -> None:
    here.make(B)
    repack(here.catalogue, *prepare(here.catalogue, here.store, B, owner="me"))
    here.transport.push(B, tier)
    (a,), (b,) = here.catalogue.get(A).packs, here.catalogue.get(B).packs
    for suffix in ("names", "pages"):
        tier.put(f"packs/{a[:2]}/{a}.{suffix}", tier.get_bytes(f"packs/{b[:2]}/{b}.{suffix}"))
    with pytest.raises(IntegrityError):
        there.transport.pull(A, tier)
    assert there.store.stats().packs == 0


@pytest.mark.parametrize("change", [{"images": "../../x"}, {"form": "odd"}, {"external": ["no numbers"]}])
def test_a_manifest_leads_nowhere_else(here: Machine, change: dict[str, object]) -> None:
    here.make(A)
    raw = json.loads(encode(here.catalogue.get(A))) | change
    with pytest.raises(IntegrityError):
        decode(json.dumps(raw).encode())


def test_snapshots_of_two_keys_and_of_none_share_a_tier(tmp_path: Path, tier: DirectoryTier) -> None:
    """The same pages: each can be read by who has its key, and with a key nothing is left in the open."""
    keys = [None, Key(bytes(32)), Key(bytes([1] * 32))]
    machines = [Machine(tmp_path / f"m{i}", key) for i, key in enumerate(keys)]
    for machine, snapshot in zip(machines, (A, B, C), strict=True):
        machine.make(snapshot, seed=7)
        repack(machine.catalogue, *prepare(machine.catalogue, machine.store, snapshot, owner="me"))
        machine.transport.push(snapshot, tier)
        for other in machines:
            if other is not machine:
                other.trust.add(public_text(machine.signing))
    for number, key in enumerate(keys[1:], 1):
        (pack,) = machines[number].catalogue.get((A, B, C)[number]).packs
        content = tier.get_bytes(f"packs-{key.id[:16]}/{pack[:2]}/{pack}.pages")  # type: ignore[union-attr]
        assert key_id(content) == key.id  # type: ignore[union-attr]
        files = (tier.root / "snapshots" / (A, B, C)[number]).iterdir()
        assert not [p for p in files if b"sha256" in p.read_bytes()], "nor what the files are"
    machines[1].transport.pull(A, tier)
    for number, snapshot, code in ((0, B, "no-key"), (1, C, "wrong-key"), (2, B, "wrong-key")):
        with pytest.raises(IntegrityError) as caught:
            machines[number].transport.pull(snapshot, tier)
        assert caught.value.code == code


def exported(path: Path, members: list[tarfile.TarInfo]) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    return path


def member(name: str, **more: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for key, value in more.items():
        setattr(info, key, value)
    return info


@pytest.mark.parametrize(
    "odd",
    [
        member("snapshots/s-0123456789ab/../../../x"),
        member("/etc/x"),
        member("snapshots/s-0123456789ab\n/images"),
        member("snapshots/link", type=tarfile.SYMTYPE, linkname="/etc"),
        member(
            "snapshots/s-0123456789ab/images",
            pax_headers={"GNU.sparse.size": str(1 << 45), "GNU.sparse.numblocks": "0", "GNU.sparse.map": "0,0"},
        ),
    ],
)
def test_an_import_makes_no_file_that_no_export_has(here: Machine, tmp_path: Path, odd: tarfile.TarInfo) -> None:
    source = exported(tmp_path / "x.frog", [odd])
    with pytest.raises(IntegrityError) as caught:
        here.transport.import_(source)
    assert "\n" not in caught.value.message
    assert not list((tmp_path / "here" / "store" / "moving").iterdir())


def test_an_import_of_bytes_at_random(here: Machine, tmp_path: Path) -> None:
    source = tmp_path / "x.frog"
    exported(source, [member("snapshots/s-0123456789ab/images", size=3000)])
    good = source.read_bytes()
    rng = random.Random(2)
    for _ in range(200):
        data = bytearray(good)
        for _ in range(rng.randrange(1, 8)):
            data[rng.randrange(600)] = rng.randrange(256)
        source.write_bytes(data[: rng.randrange(1, len(data))])
        with pytest.raises((IntegrityError, NotFoundError, StoreError)) as caught:
            here.transport.import_(source)
        message = caught.value.message
        assert "\n" not in message and str(tmp_path) not in message, "what the daemon calls it is nobody's business"


def test_an_export_is_for_root_alone_from_its_first_byte(here: Machine, tmp_path: Path) -> None:
    here.make(A)
    modes = set()
    opened = os.open

    def seen(path: object, flags: int, mode: int = 0o777, **more: object) -> int:
        if ".out.frog" in str(path):
            modes.add(mode)
        return opened(path, flags, mode, **more)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", seen)
        here.transport.export(A, tmp_path / "out.frog")
    assert modes == {0o600} and (tmp_path / "out.frog").stat().st_mode & 0o777 == 0o600
