"""Collecting in a tier: what a snapshot there needs stays, whoever sends or collects meanwhile; the rest goes."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contract.faulty_tier import Fault, FaultyTier
from machine import Machine
from s3_server import S3Server
from unit.test_arrival import A, B, memory
from unit.test_arrival import make as make_packed
from woodfrog.errors import NotFoundError, StoreError, WoodfrogError
from woodfrog.snapshot.sweep import MIN_AGE_S, Swept, grouped, sweep
from woodfrog.snapshot.tombstones import KEEP_S, bury
from woodfrog.snapshot.trust import public_text
from woodfrog.store import leases
from woodfrog.store.cold import Key
from woodfrog.store.leases import Lease, collecting, sending
from woodfrog.store.tiers import DirectoryTier, Entry, MemoryTier, ObjectTier, Tier

C = "s-00000000000c"
BIG = 5 << 20
_prefix = itertools.count()


class AgedTier:
    """`inner`, whose objects are so much older than they are, but for leases. `before` is called at each operation."""

    def __init__(self, inner: Tier, older_s: float = 2 * MIN_AGE_S) -> None:
        self.inner, self.older_s = inner, older_s
        self.before: Callable[[str, str], None] = lambda op, key: None

    @property
    def name(self) -> str:
        return self.inner.name

    def put(self, key: str, source: Path | bytes) -> None:
        self.before("put", key)
        self.inner.put(key, source)

    def get(self, key: str, target: Path, most: int | None = None) -> None:
        self.before("get", key)
        self.inner.get(key, target, most)

    def get_bytes(self, key: str, begin: int = 0, end: int | None = None) -> bytes:
        self.before("get_bytes", key)
        return self.inner.get_bytes(key, begin, end)

    def has(self, key: str) -> bool:
        self.before("has", key)
        return self.inner.has(key)

    def size(self, key: str) -> int:
        self.before("size", key)
        return self.inner.size(key)

    def list(self, prefix: str = "") -> list[str]:
        return [entry.key for entry in self.entries(prefix)]

    def entries(self, prefix: str = "") -> Sequence[Entry]:
        self.before("entries", prefix)
        return [
            e if e.key.startswith("leases/") else Entry(e.key, e.size, e.modified - self.older_s)
            for e in self.inner.entries(prefix)
        ]

    def delete(self, key: str) -> None:
        self.before("delete", key)
        self.inner.delete(key)


@pytest.fixture(params=["memory", "directory", "bucket"])
def tier(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tier:
    match request.param:
        case "memory":
            return MemoryTier()
        case "directory":
            return DirectoryTier(tmp_path / "tier")
    server: S3Server = request.getfixturevalue("server")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return ObjectTier(f"s3://woodfrog/sweep/{next(_prefix)}")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "_WAIT_S", 0.0)


def make(machine: Machine, snapshot: str, data: bytes, parent: str = "", big: str = "") -> None:
    """A packed snapshot; `big`: with a large file in its layer, made of that."""
    begin = machine.catalogue.begin

    def with_file(snapshot_id: str) -> object:
        staging = begin(snapshot_id)
        if big:
            (staging.fs / "big").write_bytes(random.Random(big).randbytes(BIG))
        return staging

    machine.catalogue.begin = with_file  # type: ignore[method-assign, assignment]
    try:
        make_packed(machine, snapshot, data, parent)
    finally:
        machine.catalogue.begin = begin  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """A, its child B (deltas against A's packs), and C, which has a large file of its own and one as B."""
    machine = Machine(tmp_path_factory.mktemp("made") / "here")
    make(machine, A, memory("a"))
    make(machine, B, memory("a", 600), parent=A, big="shared")
    make(machine, C, memory("c"), big="own")
    return machine


@pytest.fixture
def there(made: Machine, tmp_path: Path) -> Machine:
    machine = Machine(tmp_path / "there")
    machine.trust.add(public_text(made.signing))
    return machine


def drop(tier: Tier, snapshot: str, *, all_of_it: bool = False) -> None:
    """As a person removes it from a bucket."""
    keys = [k for k in tier.list("snapshots") if k.split("/")[1] == snapshot]
    for key in keys if all_of_it else [f"snapshots/{snapshot}/manifest.json"]:
        tier.delete(key)


def swept(machine: Machine, tier: Tier, **more: bool) -> Swept:
    return machine.transport.sweep(tier, **more)


def arrives(machine: Machine, tier: Tier, snapshot: str) -> None:
    """A machine that has nothing gets all of it."""
    machine.transport.pull(snapshot, tier)
    machine.catalogue.open_verified(snapshot)
    assert machine.store.verify() == []


def test_what_no_snapshot_needs_goes_and_nothing_else(made: Machine, there: Machine, tier: Tier) -> None:
    aged = AgedTier(tier)
    for snapshot in (A, B, C):
        made.transport.push(snapshot, tier)
    tier.put("somebody/elses", b"x")
    before = set(tier.list())
    assert swept(made, aged).objects == 0 and set(tier.list()) == before
    drop(tier, A)
    drop(tier, C, all_of_it=True)
    fresh = set(tier.list())
    assert swept(made, tier).objects == 0 and set(tier.list()) == fresh, "it is young"
    would = swept(made, aged, dry_run=True)
    assert set(tier.list()) == fresh
    assert swept(made, aged) == would
    left = set(tier.list())
    assert would.objects == len(fresh - left)
    assert (would.packs > 0, would.chunks, would.snapshots) == (True, 2, 2)
    assert "somebody/elses" in left and not any(A in k or C in k for k in left)
    assert not any(k.startswith("leases/") for k in left)
    arrives(there, tier, B)  # whose deltas rest on packs of A
    assert swept(made, aged).objects == 0
    drop(tier, B)
    assert swept(made, aged).objects
    assert tier.list() == ["somebody/elses"]
    for snapshot in (A, B, C):  # and all of it can come again
        made.transport.push(snapshot, tier)
    for snapshot in (A, C):
        arrives(there, tier, snapshot)


def test_what_was_withdrawn_is_found_no_more_and_others_keep_what_they_need(
    made: Machine, there: Machine, tier: Tier
) -> None:
    """A is the parent of B, whose deltas rest on its packs."""
    for snapshot in (A, B, C):
        made.transport.push(snapshot, tier)
    tier.put(f"by-key/somewhere/else/{A}", b"")
    before = set(tier.list())
    assert made.transport.withdraw(A, tier)
    left = set(tier.list())
    assert before - left == {f"by-key/key/class/{A}", f"by-key/somewhere/else/{A}", f"snapshots/{A}/manifest.json"}
    assert left - before == {f"tombstones/{A}"}
    assert not made.transport.withdraw(A, tier), "it is gone"
    for unknown in ("s-00000000000e", "s-0", "../x", ""):
        with contextlib.suppress(NotFoundError):
            assert not made.transport.withdraw(unknown, tier)
    assert set(tier.list()) == left
    assert sorted(made.transport.find(tier, "key", "class")) == [B, C]
    with pytest.raises(NotFoundError, match=f"{A} was removed from .* for all machines by the machine with key"):
        there.transport.pull(A, tier)
    assert swept(made, tier).objects == 0, "it is young"
    assert swept(made, AgedTier(tier)).snapshots == 1
    assert [key for key in tier.list() if A in key] == [f"tombstones/{A}"]
    arrives(there, tier, B)
    with pytest.raises(StoreError, match=f"push {A} --anyway` takes that back") as refused:
        made.transport.push(A, tier)
    assert refused.value.code == "tier-removed" and not made.transport.has(tier, A)
    made.transport.push(A, tier, anyway=True)
    assert not tier.list("tombstones")
    arrives(there, tier, A)


@pytest.mark.parametrize("what", ["manifest.json", "manifest.sig"])
def test_what_nobody_can_read_is_withdrawn_as_well(made: Machine, tmp_path: Path, what: str) -> None:
    """Else nothing could be collected for as long as it is there."""
    tier = MemoryTier()
    for snapshot in (B, C):
        made.transport.push(snapshot, tier)
    tier.put(f"snapshots/{B}/{what}", b"x")
    stranger = Machine(tmp_path / "stranger")
    with pytest.raises(StoreError, match="nothing more is removed"):
        swept(made, AgedTier(tier))
    assert stranger.transport.withdraw(B, tier)
    swept(made, AgedTier(tier))
    assert [key for key in tier.list() if B in key] == [f"tombstones/{B}"]


@pytest.mark.parametrize("kind", ["unreachable", "denied", "missing", "lost-answer", "truncate", "raise"])
@pytest.mark.parametrize("op", ["list", "has", "put", "delete"])
def test_a_tier_that_fails_while_one_is_withdrawn(made: Machine, there: Machine, kind: str, op: str) -> None:
    """It is there or not, and the next attempt ends it; another snapshot is not touched."""
    for at in (1, 2):
        inner = MemoryTier()
        for snapshot in (B, C):
            made.transport.push(snapshot, inner)
        others = {key for key in inner.list() if B not in key}
        faulty = FaultyTier(inner, Fault(kind, op, at=at))  # type: ignore[arg-type]
        with contextlib.suppress(WoodfrogError, RuntimeError):
            made.transport.withdraw(B, faulty)
        faulty.faults = []
        if inner.has(f"snapshots/{B}/manifest.json") and inner.list("tombstones"):
            with pytest.raises(NotFoundError, match="was removed from"):
                there.transport.pull(B, inner)
        if inner.has(f"snapshots/{B}/manifest.json"):
            assert made.transport.withdraw(B, faulty)
        made.transport.withdraw(B, faulty)
        assert not made.transport.has(inner, B) and made.transport.find(inner, "key", "class") == [C]
        assert others <= set(inner.list())
    arrives(there, inner, C)


def test_withdrawn_while_it_is_sent_or_collected(made: Machine, there: Machine) -> None:
    """Wherever an upload of the same snapshot is, it does not bring it back; and a collection goes on."""
    for number in itertools.count(1):
        inner = MemoryTier()
        made.transport.push(B, inner)
        if number % 2:
            made.transport.push(C, inner)
        tier, seen, withdrawn = AgedTier(inner), itertools.count(1), False

        def remove(op: str, key: str, seen: Iterator[int] = seen, number: int = number, inner: Tier = inner) -> None:
            nonlocal withdrawn
            if threading.current_thread().name != "lease" and next(seen) == number:
                made.transport.withdraw(C, inner)
                withdrawn = bool(inner.list("tombstones"))

        tier.before = remove
        try:
            made.transport.push(C, tier)
        except StoreError as e:
            assert e.code == "tier-removed" and withdrawn
        tier.before = lambda op, key: None
        last = next(seen) <= number
        # What comes after the last look of an upload is the end of its lease.
        assert withdrawn or last
        if withdrawn:
            assert not made.transport.has(inner, C) and made.transport.find(inner, "key", "class") == [B]
            with pytest.raises(NotFoundError):
                there.transport.pull(C, inner)
        if number % 4 == 2:
            needed = {key for key in inner.list() if B in key}
            swept(made, AgedTier(inner))
            assert needed <= set(inner.list())
        if last:
            break
    assert number > 10
    for number in itertools.count(1, 3):
        inner = MemoryTier()
        made.transport.push(B, inner)
        made.transport.push(C, inner)
        tier = AgedTier(inner)
        seen = itertools.count(1)

        def step(op: str, key: str, seen: Iterator[int] = seen, number: int = number, inner: Tier = inner) -> None:
            if threading.current_thread().name != "lease" and next(seen) == number:
                made.transport.withdraw(C, inner)

        tier.before = step
        try:
            swept(made, tier)
        except StoreError as e:
            assert f"no snapshot {C} in" in e.message, e
        tier.before = lambda op, key: None
        swept(made, tier)
        if next(seen) <= number:
            break
        assert [key for key in inner.list() if C in key] == [f"tombstones/{C}"]
    arrives(there, inner, B)


def test_a_removal_that_is_killed_is_one_or_none(made: Machine, there: Machine) -> None:
    """At each of its operations, and at each of an upload that comes after it: it is not fetched any more, or all of it
    is there; a collection ends it."""
    for number in itertools.count(1):
        inner = MemoryTier()
        for snapshot in (B, C):
            made.transport.push(snapshot, inner)
        tier, seen = AgedTier(inner), itertools.count(1)

        def die(op: str, key: str, seen: Iterator[int] = seen, number: int = number) -> None:
            if next(seen) >= number:
                raise Stop

        tier.before = die
        with contextlib.suppress(Stop):
            made.transport.withdraw(C, tier)
        done = next(seen) <= number
        if not inner.list("tombstones"):
            arrives(there, inner, C)
            there.catalogue.remove(C)
            continue
        with pytest.raises(NotFoundError, match="was removed"):
            there.transport.pull(C, inner)
        with pytest.raises(StoreError, match="was removed"):
            made.transport.push(C, inner)
        swept(made, AgedTier(inner))
        assert [key for key in inner.list() if C in key] == [f"tombstones/{C}"]
        if done:
            break
    assert number > 4
    for number in itertools.count(1):  # taken back: it is there when the tombstone goes
        inner = MemoryTier()
        made.transport.push(C, inner)
        made.transport.withdraw(C, inner)
        tier, seen = AgedTier(inner), itertools.count(1)

        def end(op: str, key: str, seen: Iterator[int] = seen, number: int = number) -> None:
            if threading.current_thread().name != "lease" and next(seen) >= number:
                raise Stop

        tier.before = end
        with contextlib.suppress(Stop):
            made.transport.push(C, tier, anyway=True)
        if not inner.list("tombstones"):
            arrives(there, inner, C)
            break
        with pytest.raises(NotFoundError, match="was removed"):
            there.transport.pull(C, inner)
        drop_leases(inner)
        if number % 4 == 1:
            swept(made, AgedTier(inner))
            assert [key for key in inner.list() if C in key] == [f"tombstones/{C}"]
    assert number > 10


def test_tombstones_go_when_they_are_old_and_nothing_else_is_left(made: Machine, there: Machine, tier: Tier) -> None:
    month = AgedTier(tier, KEEP_S + 1)
    for snapshot in (B, C):
        made.transport.push(snapshot, tier)
    made.transport.withdraw(C, tier)
    made.transport.push(C, tier, anyway=True)
    bury(tier, C, made.signing)  # as an older version leaves it, which knows no tombstones: it is there, and is not
    tier.put(f"snapshots/{C}/manifest.json", b"damaged")
    assert swept(made, AgedTier(tier, MIN_AGE_S - 600)).objects == 0
    would = swept(made, month, dry_run=True)
    assert (would.snapshots, would.tombstones) == (1, 0) and swept(made, month) == would
    assert [key for key in tier.list() if C in key] == [f"tombstones/{C}"]
    assert swept(made, AgedTier(tier, KEEP_S - 600)).objects == 0
    bury(tier, "s-0000000000ff", made.signing)
    tier.put("tombstones/somebody/elses", b"")
    assert swept(made, month).tombstones == 2
    assert tier.list("tombstones") == ["tombstones/somebody/elses"]
    arrives(there, tier, B)


def test_a_tombstone_that_is_needed_stays_when_a_listing_lacks_its_snapshot(made: Machine) -> None:
    tier = MemoryTier()
    made.transport.push(C, tier)
    bury(tier, C, made.signing)
    hidden = AgedTier(tier, KEEP_S + 1)
    entries = tier.entries
    tier.entries = lambda prefix="": [e for e in entries(prefix) if "snapshots/" not in e.key]  # type: ignore[method-assign]
    with pytest.raises(StoreError, match="its listing lacks"):
        swept(made, hidden)
    assert tier.has(f"tombstones/{C}")


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\xff" * 2000, b"00" * 64])
def test_a_tombstone_that_nobody_signed_denies_all_the_same(made: Machine, tier: Tier, content: bytes) -> None:
    made.transport.push(C, tier)
    tier.put(f"tombstones/{C}", content)
    found = made.transport.tombstone(C, tier)
    assert found is not None and found.signer == ""
    with pytest.raises(StoreError, match="for all machines; `woodfrog"):
        made.transport.push(C, tier)
    with pytest.raises(NotFoundError, match=r"for all machines$"):
        made.transport.arrive(C, tier)


def test_with_a_key(tmp_path: Path) -> None:
    tier = MemoryTier()
    one = Machine(tmp_path / "one", Key(bytes(range(32))))
    make(one, A, memory("a"), big="x")
    make(one, C, memory("c"), big="y")
    for snapshot in (A, C):
        one.transport.push(snapshot, tier)
    drop(tier, C)
    assert swept(one, AgedTier(tier)).chunks == 2
    two = Machine(tmp_path / "two", Key(bytes(range(32))))
    two.trust.add(public_text(one.signing))
    arrives(two, tier, A)
    for other in (Machine(tmp_path / "other", Key(bytes(32))), Machine(tmp_path / "none")):
        other.trust.add(public_text(one.signing))
        drop_all = set(tier.list())
        with pytest.raises(StoreError, match=f"nothing more is removed.*{A} there cannot be read.*"):
            swept(other, AgedTier(tier))
        assert set(tier.list()) == drop_all


@pytest.mark.parametrize(
    "what", ["manifest.json", "manifest.sig", "packs.json", "fs", "a pack", "a chunk", "untrusted"]
)
def test_what_cannot_be_read_ends_it_before_anything_goes(made: Machine, tmp_path: Path, what: str) -> None:
    tier = MemoryTier()
    for snapshot in (B, C):
        made.transport.push(snapshot, tier)
    drop(tier, C)
    collector = made
    match what:
        case "untrusted":
            collector = Machine(tmp_path / "stranger")
        case "a pack":
            named = made.transport._named_by(B, tier, tmp_path)
            for key in [k for k in tier.list("packs") if k.startswith(sorted(n for n in named if "packs" in n)[0])]:
                tier.delete(key)
        case "a chunk":
            named = made.transport._named_by(B, tier, tmp_path)
            tier.delete(next(n for n in sorted(named) if n.startswith("chunks")))
        case _:
            data = bytearray(tier.get_bytes(f"snapshots/{B}/{what}"))
            data[len(data) // 2] ^= 1
            tier.put(f"snapshots/{B}/{what}", bytes(data))
    before = set(tier.list())
    with pytest.raises(StoreError, match=r"nothing more is removed from memory://: ") as error:
        swept(collector, AgedTier(tier))
    assert "\n" not in error.value.message
    assert set(tier.list()) == before


@pytest.mark.parametrize("kind", ["unreachable", "denied", "missing", "lost-answer", "truncate", "alter", "raise"])
@pytest.mark.parametrize("op", ["list", "get_bytes", "get", "has", "delete", "put"])
def test_a_tier_that_fails_loses_nothing_that_is_needed(made: Machine, tmp_path: Path, kind: str, op: str) -> None:
    """Whatever a collection meets: an error, or it is right; and the next one removes what is left."""
    for at in (1, 2, 3):
        inner = MemoryTier()
        for snapshot in (B, C):
            made.transport.push(snapshot, inner)
        drop(inner, C)
        needed = needed_keys(made, inner, tmp_path)
        tier = AgedTier(FaultyTier(inner, Fault(kind, op, at=at)))  # type: ignore[arg-type]
        with contextlib.suppress(WoodfrogError, RuntimeError):
            swept(made, tier)
        assert needed <= set(inner.list()), (kind, op, at)
        drop_leases(inner)
        swept(made, AgedTier(inner))
        assert set(inner.list()) == needed


def test_a_listing_that_lacks_what_is_there_is_not_believed(made: Machine, tmp_path: Path) -> None:
    """Also when it does so each time it is asked."""
    inner = MemoryTier()
    made.transport.push(B, inner)
    before = set(inner.list())
    tier = AgedTier(FaultyTier(inner, Fault("truncate", "list", at=2, times=-1)))
    with pytest.raises(StoreError, match=f"its listing lacks snapshots/{B}/manifest.json, which is there"):
        swept(made, tier)
    assert set(inner.list()) == before


def test_what_says_that_it_is_whole_goes_first() -> None:
    pack, snapshot = f"packs/ab/{'ab' * 32}", "s-00000000000d"
    keys = [f"{pack}.delta", f"{pack}.names", f"snapshots/{snapshot}/fs", f"by-key/f/w/{snapshot}", "notes/x.names"]
    found = grouped([Entry(key, 1, 5.0) for key in keys])
    assert [e.key for e in found[pack].entries] == [f"{pack}.names", f"{pack}.delta"]
    assert [e.key for e in found[f"snapshots/{snapshot}"].entries] == [keys[3], keys[2]]
    assert set(found) == {pack, f"snapshots/{snapshot}"}


def needed_keys(machine: Machine, tier: Tier, room: Path) -> set[str]:
    """All of B."""
    named = machine.transport._named_by(B, tier, room)
    return {k for k in tier.list() if k.partition(".")[0] in named or B in k}


def drop_leases(tier: Tier) -> None:
    for key in tier.list("leases"):
        tier.delete(key)


class Stop(Exception):
    pass


def test_killed_at_each_operation(made: Machine, there: Machine, tmp_path: Path) -> None:
    """What is left is found by the next one, and an upload takes nothing for whole that is not."""
    for number in itertools.count(1):
        inner = MemoryTier()
        for snapshot in (B, C):
            made.transport.push(snapshot, inner)
        drop(inner, C)
        needed = needed_keys(made, inner, tmp_path)
        tier, seen = AgedTier(inner), itertools.count(1)

        def die(op: str, key: str, seen: Iterator[int] = seen, number: int = number) -> None:
            if op == "delete" and next(seen) >= number:
                raise Stop

        tier.before = die
        try:
            swept(made, tier)
        except Stop:
            done = False
        else:
            done = True
        drop_leases(inner)
        assert needed <= set(inner.list())
        made.transport.push(C, inner)
        if number % 3 == 1:
            arrives(there, inner, C)
            there.catalogue.remove(C)
            there.store.gc(set(), min_age_s=0)
        if done:
            break
    assert number > 5


# -- at the same time ----------------------------------------------------------------------------------------------


def interleaved(
    number: int, tier: AgedTier, first: Callable[[], object], second: Callable[[], object]
) -> tuple[bool, list[str]]:
    """Do `second` before the operation `number` of `first`, on the same tier; whether there was such an operation, and
    how each ended."""
    seen, ended, inside = itertools.count(1), [], False

    def step(op: str, key: str) -> None:
        nonlocal inside
        if not inside and threading.current_thread().name != "lease" and next(seen) == number:
            inside = True
            try:
                second()
                ended.append("second")
            except StoreError as e:
                assert e.code == "tier-busy", e
            finally:
                inside = False

    tier.before = step
    try:
        first()
        ended.append("first")
    except StoreError as e:
        assert e.code == "tier-busy", e
    tier.before = lambda op, key: None
    return next(seen) > number, ended


@pytest.mark.parametrize("first", ["push", "sweep"])
def test_an_upload_and_a_collection_at_once(made: Machine, there: Machine, first: str) -> None:
    """C's packs and chunks are in the tier, old, and no manifest names them: an upload finds them, a collection too."""
    both = 0
    for number in itertools.count(1):
        inner = MemoryTier()
        made.transport.push(C, inner)
        drop(inner, C, all_of_it=True)
        tier = AgedTier(inner)
        work = [lambda t=tier: made.transport.push(C, t), lambda t=tier: swept(made, t)]
        more, ended = interleaved(number, tier, *(work if first == "push" else work[::-1]))
        assert ended, "one of them gets on"
        both += len(ended) == 2
        pushed = "first" in ended if first == "push" else "second" in ended
        if not pushed:
            made.transport.push(C, tier)
        elif number % 4:
            if not more:
                break
            continue  # to pull it takes its time
        arrives(there, inner, C)
        there.catalogue.remove(C)
        there.store.gc(set(), min_age_s=0)
        if not more:
            break
    assert number > 10 and both


def test_two_collections_at_once(made: Machine, there: Machine) -> None:
    for number in itertools.count(1, 3):
        inner = MemoryTier()
        for snapshot in (B, C):
            made.transport.push(snapshot, inner)
        drop(inner, C)
        tier = AgedTier(inner)
        more, ended = interleaved(number, tier, lambda t=tier: swept(made, t), lambda t=tier: swept(made, t))
        assert "first" in ended and not any(C in key for key in inner.list())
        if not more:
            break
    arrives(there, inner, B)


def test_an_upload_of_a_version_that_takes_no_lease(made: Machine, tmp_path: Path) -> None:
    """Its own objects are young; a manifest that appears in the middle is read before more goes."""
    inner = MemoryTier()
    for snapshot in (B, C):
        made.transport.push(snapshot, inner)
    manifest = inner.get_bytes(f"snapshots/{C}/manifest.json")
    drop(inner, C)
    tier = AgedTier(inner)
    before = set(inner.list())

    def appear(op: str, key: str) -> None:
        if op == "entries" and key == "snapshots":
            inner.put(f"snapshots/{C}/manifest.json", manifest)

    tier.before = appear
    assert swept(made, tier).objects == 0
    assert before <= set(inner.list())


def test_leases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    tier = MemoryTier(clock=lambda: now[0])
    go_on = lambda: None  # noqa: E731
    with sending(tier, go_on) as lease, sending(tier, go_on):
        lease.check()
        with pytest.raises(StoreError, match="is being sent") as error, collecting(tier, go_on):
            raise AssertionError
        assert error.value.code == "tier-busy" and error.value.retryable
    assert tier.list() == []
    with collecting(tier, go_on), collecting(tier, go_on):
        with pytest.raises(StoreError, match="removes") as error, sending(tier, go_on):
            raise AssertionError
        assert error.value.code == "tier-busy"
    assert tier.list() == []
    tier.put(f"leases/sending/{'0' * 32}", b"")  # of one that died
    now[0] += leases.TTL_S - 1
    with pytest.raises(StoreError, match="is being sent"), collecting(tier, go_on):
        raise AssertionError
    now[0] += 2
    with collecting(tier, go_on) as (_, told):
        assert told == now[0]
    # one whose tier was away for long does not go on
    faulty = FaultyTier(tier)
    with Lease(faulty, "sending") as lease:
        monkeypatch.setattr(lease, "_renewed", time.monotonic() - leases.TTL_S / 2 - 1)
        with pytest.raises(StoreError, match="away for too long"):
            lease.check()
    # nor one that the tier does not list
    faulty = FaultyTier(tier, Fault("truncate", "list"))
    with pytest.raises(StoreError, match="does not list"), sending(faulty, go_on):
        raise AssertionError


def test_a_lease_is_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "_RENEW_S", 0.01)
    faulty = FaultyTier(MemoryTier(), Fault("unreachable", "put", at=2, times=2))
    with Lease(faulty, "sending"):
        deadline = time.monotonic() + 10
        while sum(op == "put" for op, _ in faulty.log) < 6:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert faulty.inner.list() == []


def test_a_dead_one_holds_up_nobody_for_long(tmp_path: Path) -> None:
    """`kill -9` in a collection: an upload waits until its lease has ended, and no longer."""
    script = f"""
from pathlib import Path
from woodfrog import faults
from woodfrog.snapshot.sweep import sweep
from woodfrog.store.tiers import DirectoryTier
faults.configure("sweep.marked=sigkill-self")
sweep(DirectoryTier(Path({str(tmp_path / "tier")!r})), lambda i: set())
"""
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=60).returncode == -9
    tier = DirectoryTier(tmp_path / "tier")
    (left,) = tier.list("leases")
    with pytest.raises(StoreError, match="try again later"), sending(tier, lambda: None):
        raise AssertionError
    old = time.time() - leases.TTL_S - 1
    os.utime(tier.root / left, (old, old))
    with sending(tier, lambda: None):
        pass
    os.utime(tier.root / left, (0, 0))
    sweep(tier, lambda i: set())
    assert tier.list() == []


# -- a model -------------------------------------------------------------------------------------------------------

PACK = [f"packs/{n:02x}/{n:064x}" for n in range(4)]
IDS = [f"s-{n:012x}" for n in range(3)]
STEP = st.one_of(
    st.tuples(st.just("push"), st.sampled_from(IDS), st.sets(st.sampled_from(PACK), min_size=1)),
    st.tuples(st.just("die"), st.sampled_from(IDS), st.sets(st.sampled_from(PACK), min_size=1)),
    st.tuples(st.just("drop"), st.sampled_from(IDS), st.just(frozenset())),
    st.tuples(st.just("wait"), st.floats(0, 2 * MIN_AGE_S), st.just(frozenset())),
    st.tuples(st.just("sweep"), st.booleans(), st.just(frozenset())),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(STEP, max_size=25))
def test_whatever_happens_in_whatever_order(steps: list[tuple[str, object, set[str]]]) -> None:
    """What a manifest names is there; what nothing has named or touched for a day is not, after a collection."""
    now = [1e9]
    tier = MemoryTier(clock=lambda: now[0])
    live: dict[str, set[str]] = {}
    touched: dict[str, float] = {}

    def put(pack: str) -> None:
        if not tier.has(f"{pack}.names"):
            for form in ("pages", "names"):
                tier.put(f"{pack}.{form}", b"x")
            touched[pack] = now[0]

    for what, of, packs in steps:
        match what:
            case "push" | "die":
                for pack in sorted(packs):
                    put(pack)
                if what == "push":
                    live[str(of)] = set(packs)
                    tier.put(f"snapshots/{of}/manifest.json", b"")
                    tier.put(f"by-key/k/c/{of}", b"")
            case "drop":
                live.pop(str(of), None)
                tier.delete(f"snapshots/{of}/manifest.json")
            case "wait":
                now[0] += float(str(of))
            case "sweep":
                sweep(tier, lambda i: live[i], dry_run=bool(of))
                if not of:
                    named = set().union(*live.values())
                    kept = {key.partition(".")[0] for key in tier.list("packs")}
                    assert {p for p in kept - named if now[0] - touched[p] >= MIN_AGE_S} == set()
        for names in live.values():
            assert all(tier.has(f"{pack}.{form}") for pack in names for form in ("names", "pages"))
        assert all(tier.has(f"snapshots/{i}/manifest.json") for i in live)
