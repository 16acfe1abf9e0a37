"""What was removed from a tier for all machines: what the others do with their copies, and how it is taken back."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from contract.faulty_tier import Fault, FaultyTier
from machine import PAGE, PAGES, A, B, C, Machine
from s3_server import S3Server
from unit.test_keeper import quietly, settled, until
from woodfrog.backends import keeper as module
from woodfrog.backends.keeper import Keeper
from woodfrog.errors import NotFoundError, StoreError
from woodfrog.snapshot import tombstones
from woodfrog.snapshot.catalogue import PINNED, PUSHED, WITHDRAWN, Catalogue
from woodfrog.snapshot.manifest import decode, encode
from woodfrog.snapshot.trust import fingerprint, public_text
from woodfrog.store.cold import Key
from woodfrog.store.tiers import DirectoryTier, MemoryTier, ObjectTier, Tier


@pytest.fixture
def here(tmp_path: Path, tier: DirectoryTier) -> Machine:
    machine = Machine(tmp_path / "here")
    machine.make(A)
    machine.transport.push(A, tier)
    return machine


@pytest.fixture
def there(here: Machine, tier: DirectoryTier, tmp_path: Path) -> Machine:
    """Another machine that has A."""
    machine = Machine(tmp_path / "there")
    machine.trust.add(public_text(here.signing, "other"))
    machine.transport.pull(A, tier)
    machine.catalogue.mark(A, PUSHED, tier.name)
    return machine


def told(keeper: Keeper) -> list[str]:
    """Whose snapshots came back."""
    back: list[str] = []
    keeper.on_taken_up = lambda manifest: back.append(manifest.id)
    return back


def test_a_copy_elsewhere_is_not_used_or_pushed_until_a_person_wants_it(
    here: Machine, there: Machine, tier: DirectoryTier
) -> None:
    async def main() -> None:
        mine, theirs = here.keeper(tier), there.keeper(tier)
        back = told(theirs)
        await theirs._look()
        assert there.catalogue.retired(A) is None and theirs._in_tier(A)
        await mine.withdraw(A)
        with pytest.raises(StoreError, match=f"push {A} --anyway"):
            await theirs.push(A)
        reason = f"removed for all machines from {tier.name}"
        assert there.catalogue.retired(A) == reason and there.catalogue.find("key", "class") is None
        again = Catalogue(there.catalogue.root, there.signing, there.store)
        assert reason in (again.retired(A) or "") and again.mark_text(A, WITHDRAWN) == tier.name
        tombstones.dig_up(tier, A)  # as a collection does, long after
        for _ in range(2):
            await theirs._look()
            theirs._queued.clear()
            theirs.pack_later(A)
            await until(lambda: settled(theirs))
        assert not tier.list("by-key") and there.catalogue.retired(A) is not None and back == []
        tombstones.bury(tier, A, here.signing)
        await theirs.push(A, anyway=True)
        assert there.catalogue.retired(A) is None and theirs._in_tier(A) and back == [A]
        assert not theirs._withdrawn(A) and there.whole(A)
        await mine._look()
        assert here.catalogue.retired(A) is None and here.transport.has(tier, A)
        await mine.close()
        await theirs.close()

    asyncio.run(main())


def test_who_looks_now_and_then_meets_it_and_what_was_taken_back_is_used_again(
    here: Machine, there: Machine, tier: DirectoryTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_GO_ON_S", 0.01)
    monkeypatch.setattr(module, "_LOOK_AGAIN_S", 0.02)
    faulty = FaultyTier(tier, Fault("raise", "list", times=2), Fault("unreachable", "list", at=3, times=2))

    async def main() -> None:
        here.keeper().look_later()  # has no tier, and nothing to look at
        keeper = there.keeper(faulty)
        back = told(keeper)
        here.transport.withdraw(A, tier)
        keeper.look_later()
        await until(lambda: there.catalogue.retired(A) is not None)
        here.transport.push(A, tier, anyway=True)
        await until(lambda: there.catalogue.retired(A) is None)
        assert back == [A] and keeper._in_tier(A)
        await keeper.close()

    asyncio.run(main())


@pytest.mark.parametrize("why", ["pinned", "not signed", "not trusted"])
def test_what_is_pinned_or_removed_by_a_stranger_stays_in_use(
    here: Machine, there: Machine, tier: DirectoryTier, tmp_path: Path, why: str
) -> None:
    async def main() -> None:
        keeper = there.keeper(tier, budget=1)
        match why:
            case "pinned":
                there.catalogue.mark(A, PINNED)
                here.transport.withdraw(A, tier)
            case "not signed":
                tier.put(f"tombstones/{A}", b"gone")
            case _:
                Machine(tmp_path / "stranger").transport.withdraw(A, tier)
        await keeper._look()
        assert there.catalogue.retired(A) is None and keeper._withdrawn(A) and not keeper._in_tier(A)
        await keeper._make_room()
        assert there.whole(A), "nobody else may have it"
        if why == "pinned":
            await keeper.unpin(A)
            await keeper._look()
            assert there.catalogue.retired(A) is not None
        await keeper.close()

    asyncio.run(main())


def test_making_room_ends_it(here: Machine, there: Machine, tier: DirectoryTier) -> None:
    """The copy goes, though the tier has none."""

    async def main() -> None:
        keeper = there.keeper(tier, budget=int(1.5 * PAGES * PAGE))
        await keeper._look()
        here.transport.withdraw(A, tier)
        there.catalogue.used(A)
        there.make(B, created=time.time() + 1)
        keeper.pack_later(B)
        await until(lambda: settled(keeper))
        assert [m.id for m in there.catalogue.manifests()] == [B]
        assert keeper._in_tier(B) and there.transport.find(tier, "key", "class") == [B]
        await keeper.close()

    asyncio.run(main())


@pytest.mark.parametrize("off", [True, False])
def test_who_was_off_for_so_long_that_it_may_have_missed_it(
    here: Machine, there: Machine, tier: DirectoryTier, off: bool
) -> None:
    """Does not put it back by itself; who was there all the time knows that the tier has lost it."""

    async def main() -> None:
        keeper = there.keeper(tier, budget=1)
        await keeper._look()
        last = time.time() - (module._MISSED_S + 60 if off else 60)
        keeper._looked.write_text(f"{last:.0f} {tier.name}\n")
        here.transport.withdraw(A, tier)
        tombstones.dig_up(tier, A)
        for _ in range(2):
            keeper._queued.clear()
            keeper.pack_later(A)
            await until(lambda: settled(keeper))
        assert there.transport.has(tier, A) != off and keeper._withdrawn(A) == off
        await keeper.close()

    asyncio.run(main())


def test_an_old_note_of_the_last_look_is_no_reason_to_fail(there: Machine, tier: DirectoryTier) -> None:
    keeper = there.keeper(tier)
    now = time.time()
    for text in ("", "x", "nan file", "9 9", f"{now:.0f} s3://other"):
        keeper._looked.write_text(text)
        assert keeper._may_have_missed(tier.name, now)
    keeper._looked.write_text(f"{now - 5:.0f} {tier.name}\n")
    assert not keeper._may_have_missed(tier.name, now)
    assert keeper._may_have_missed(tier.name, now - 60), "the clock went back"


# The listing


@pytest.fixture(params=["memory", "directory", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tier]:
    match request.param:
        case "memory":
            yield MemoryTier()
        case "directory":
            yield DirectoryTier(tmp_path / "place")
        case _:
            server: S3Server = request.getfixturevalue("server")
            for name, value in server.environment.items():
                monkeypatch.setenv(name, value)
            yield ObjectTier(f"s3://woodfrog/list/{tmp_path.name}")


def rows(machine: Machine, tier: Tier) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in machine.transport.listing(tier, quietly)}


def test_each_snapshot_is_a_row_whatever_is_wrong_with_it(here: Machine, place: Tier, tmp_path: Path) -> None:
    there, stranger = Machine(tmp_path / "there"), Machine(tmp_path / "stranger")
    there.trust.add(public_text(here.signing, "other"))
    assert rows(there, place) == {}
    for number in range(8):
        here.make(f"s-00000000001{number}", created=10.0 + number)
        here.transport.push(f"s-00000000001{number}", place)
    stranger.make(B, created=5.0)
    stranger.transport.push(B, place)
    there.make(C, created=4.0)
    there.transport.push(C, place)
    there.transport.withdraw(C, place)
    place.put("snapshots/s-000000000010/manifest.json", b"\x1b[2J{")
    place.put("snapshots/s-000000000011/manifest.json", place.get_bytes("snapshots/s-000000000012/manifest.json"))
    place.delete("snapshots/s-000000000013/manifest.sig")
    place.delete("snapshots/s-000000000013/signer")
    place.delete("snapshots/s-000000000014/manifest.json")
    place.put("snapshots/s-000000000015/manifest.json", b"[" * 100_000)
    odd = decode(place.get_bytes("snapshots/s-000000000016/manifest.json"))
    odd = replace(odd, app="\x1b[31m" + "x" * 999, tag="a\nb", pages_bytes=10**400, fs_bytes=-1)
    place.put("snapshots/s-000000000016/manifest.json", encode(odd))
    place.put("tombstones/s-0000000000ff", b"")
    place.put("snapshots/other/x", b"")
    found = rows(there, place)
    states = {i[-2:]: row["state"] for i, row in found.items()}
    assert states == {
        "10": "unreadable", "11": "unreadable", "12": "ready", "13": "untrusted", "14": "incomplete",
        "15": "unreadable", "16": "untrusted", "17": "ready", "0b": "untrusted", "0c": "removed", "ff": "removed",
    }  # fmt: skip
    good = found["s-000000000012"]
    assert (good["app"], good["function"], good["created"], good["why"]) == ("demo", "f", 12.0, None)
    assert (good["signer"], good["signer_comment"]) == (fingerprint(here.signing.public), "other")
    assert good["memory_bytes"] == PAGES * PAGE and good["trusted"] and not good["here"]
    assert found["s-000000000013"]["signer"] is None and not found["s-000000000013"]["trusted"]
    assert found[B]["signer"] == fingerprint(stranger.signing.public) and not found[B]["trusted"]
    assert (found[C]["app"], found[C]["here"], found[C]["signer_comment"]) == ("demo", True, "this machine")
    assert abs(found[C]["removed"] - time.time()) < 60 and found["s-0000000000ff"]["signer"] is None
    bad = found["s-000000000016"]
    assert bad["app"].isprintable() and len(bad["app"]) <= 200 and bad["function"] == "a b"
    assert (bad["files_bytes"], bad["memory_bytes"]) == (0, 1 << 62)
    assert all((row["why"] or "x").isprintable() for row in found.values())


def test_a_listing_fetches_no_memory_and_few_at_a_time(here: Machine, tier: DirectoryTier) -> None:
    for number in range(30):
        tier.put(f"snapshots/s-0000000001{number:02}/manifest.json", b"x")
    now = most = 0
    lock = threading.Lock()

    class Watched(FaultyTier):
        def get_bytes(self, key: str, begin: int = 0, end: int | None = None) -> bytes:
            nonlocal now, most
            with lock:
                now += 1
                most = max(most, now)
            time.sleep(0.01)
            try:
                return super().get_bytes(key, begin, end)
            finally:
                with lock:
                    now -= 1

        def entries(self, prefix: str = "") -> Sequence[Any]:
            assert prefix in ("snapshots", "tombstones")
            return super().entries(prefix)

    watched = Watched(tier)
    assert len(rows(here, watched)) == 31 and 1 < most <= 8
    read = {key.rsplit("/", 1)[1] for op, key in watched.log if op != "list"}
    assert read == {"manifest.json", "manifest.sig"}


def test_a_key_that_is_another_or_missing_is_said_in_the_row(tmp_path: Path) -> None:
    tier = MemoryTier()
    one, none = Machine(tmp_path / "one", Key(bytes(32))), Machine(tmp_path / "none")
    one.make(A)
    one.transport.push(A, tier)
    assert rows(one, tier)[A]["state"] == "ready"
    assert rows(none, tier)[A]["state"] == "unreadable" and "key" in rows(none, tier)[A]["why"]


@pytest.mark.parametrize("kind", ["unreachable", "denied", "missing", "lost-answer", "truncate", "alter"])
def test_a_tier_that_fails_while_it_is_listed(here: Machine, tier: DirectoryTier, kind: str) -> None:
    """One that is away is an error; one object that cannot be had is a row."""
    for at in (1, 2, 3):
        faulty = FaultyTier(tier, Fault(kind, "get_bytes", at=at))  # type: ignore[arg-type]
        if kind in ("unreachable", "lost-answer") and at < 3:
            with pytest.raises(StoreError, match="no answer"):
                rows(here, faulty)
            continue
        row = rows(here, faulty)[A]
        assert row["state"] in ("ready", "untrusted", "unreadable") and (at == 3) == (row["state"] == "ready")
    with pytest.raises(StoreError):
        rows(here, FaultyTier(tier, Fault("denied", "list")))


def test_a_removal_that_nobody_could_mean_leaves_no_tombstone(here: Machine, tier: DirectoryTier) -> None:
    assert not here.transport.withdraw("s-0000000000ff", tier)
    for bad in ("s-1", "../x", ""):
        with pytest.raises(NotFoundError):
            here.transport.withdraw(bad, tier)
    assert not tier.list("tombstones")
    here.make(B)
    assert not here.transport.withdraw(B, tier), "it was not there"
    assert tier.list("tombstones") == [f"tombstones/{B}"], "others may have it"
