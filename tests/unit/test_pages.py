"""The page store, against a dictionary of pages as the oracle."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from woodfrog.errors import IntegrityError, StoreError
from woodfrog.store import ingest as ingest_module
from woodfrog.store.pages import PAGE, Ingested, PageStore, Ref, Run

KEY = bytes(range(32))


def noise(seed: int, pages: int = 1) -> bytes:
    return random.Random(seed).randbytes(pages * PAGE)


def altered(page: bytes, seed: int) -> bytes:
    """The same page with a few bytes changed, as a process does that goes on."""
    made, rng = bytearray(page), random.Random(seed)
    for _ in range(3):
        made[rng.randrange(PAGE)] ^= rng.randrange(1, 256)
    return bytes(made)


class Files:
    """Files to take runs from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fds: list[int] = []

    def run(self, data: bytes, **more: object) -> Run:
        path = self.folder / f"source-{len(self.fds)}"
        path.write_bytes(noise(7) + data)
        self.fds.append(os.open(path, os.O_RDONLY))
        return Run(self.fds[-1], PAGE, len(data) // PAGE, **more)  # type: ignore[arg-type]

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)


def content(store: PageStore, refs: tuple[Ref, ...]) -> bytes:
    paths = store.open_raw({r.pack for r in refs})
    parts = []
    for ref in refs:
        if ref.pack:
            with open(paths[ref.pack], "rb") as f:
                f.seek(ref.slot * PAGE)
                parts.append(f.read(ref.pages * PAGE))
        else:
            parts.append(bytes(ref.pages * PAGE))
    return b"".join(parts)


def whole(ingested: Ingested) -> tuple[tuple[int, Ref], ...]:
    """The refs of a run of its own, as the base of a run that has the same addresses."""
    at, base = 0, []
    for ref in ingested.refs[0]:
        base.append((at, ref))
        at += ref.pages
    return tuple(base)


def counts(done: Ingested) -> tuple[int, int, int, int]:
    return done.new_pages, done.delta_pages, done.zero_pages, done.shared_pages


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.rglob(pattern)
    return found


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Files]:
    folder = tmp_path / "sources"
    folder.mkdir()
    made = Files(folder)
    yield made
    made.close()


@pytest.fixture(params=[None, KEY], ids=["plain", "sealed"])
def key(request: pytest.FixtureRequest) -> bytes | None:
    return request.param


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(root: Path) -> Iterator[PageStore]:
    made = PageStore(root)
    yield made
    made.close()


# What is stored


def test_each_page_is_stored_once_and_zeroes_never(store: PageStore, files: Files) -> None:
    a, b, zero = noise(1), noise(2), bytes(PAGE)
    data = a + zero * 3 + b + a
    done = store.ingest([files.run(data)], owner="t")
    (pack,) = done.packs
    assert done.refs == ((Ref(pack, 0, 1), Ref("", 0, 3), Ref(pack, 1, 1), Ref(pack, 0, 1)),)
    assert counts(done) == (2, 0, 3, 1)
    assert done.raw_bytes == 6 * PAGE and done.stored_bytes == 2 * (PAGE + 32)
    assert content(store, done.refs[0]) == data
    again = store.ingest([files.run(b + a)], owner="t")
    assert again.refs == ((Ref(pack, 1, 1), Ref(pack, 0, 1)),) and again.stored_bytes == 0
    assert store.ingest([files.run(zero * 600)], owner="t").refs == ((Ref("", 0, 600),),)
    assert store.ingest([], owner="t").packs == ()
    assert store.stats().stored_bytes == 2 * (PAGE + 32) and store.verify() == []


def test_a_pack_is_named_by_its_names(store: PageStore, files: Files, root: Path) -> None:
    pages = [noise(i) for i in range(5)]
    (pack,) = store.ingest([files.run(b"".join(pages))], owner="t").packs
    names = only(root, "*.names").read_bytes()
    assert names == b"".join(blake3(p).digest() for p in pages)
    assert pack == blake3(names).hexdigest() and only(root, "*.pages").parent.name == pack[:2]


def test_the_working_set_lies_together_in_packs_of_its_own(store: PageStore, files: Files) -> None:
    rest, first = noise(1, 300), noise(2, 280)
    runs = [
        files.run(rest[: 200 * PAGE]),
        files.run(first[: 10 * PAGE], first=True),
        files.run(rest[200 * PAGE :]),
        files.run(first[10 * PAGE :], first=True),
    ]
    done = store.ingest(runs, owner="t")
    packs = {r.pack for r in done.refs[1] + done.refs[3]}
    assert len(packs) == 1 and len(done.packs) == 2
    assert [(r.slot, r.pages) for r in done.refs[1] + done.refs[3]] == [(0, 10), (10, 270)]
    assert content(store, done.refs[0] + done.refs[2]) == rest


def test_pages_like_their_base_are_shared_or_stored_as_deltas(store: PageStore, files: Files, root: Path) -> None:
    old = noise(1, 400)
    base = store.ingest([files.run(old)], owner="t")
    pages = [old[i * PAGE : (i + 1) * PAGE] for i in range(400)]
    for i in range(0, 400, 10):
        pages[i] = altered(pages[i], i)
    pages[15] = bytes(PAGE)
    new = b"".join(pages)
    done = store.ingest([files.run(new, base=whole(base))], owner="t")
    assert counts(done) == (0, 40, 1, 359)
    assert only(root, "*.delta").stat().st_size < 40 * PAGE / 10
    assert content(store, done.refs[0]) == new
    assert store.needs(done.packs) == set(done.packs) and store.verify() == []
    (delta,) = set(done.packs) - set(base.packs)
    assert store.needs([delta]) == {delta, *base.packs}
    # A child of the child: its deltas rest on the raw pack, never on a delta.
    for i in range(0, 400, 20):
        pages[i] = altered(pages[i], i + 1)
    newer = b"".join(pages)
    child = store.ingest([files.run(newer, base=whole(done))], owner="t")
    assert counts(child) == (0, 20, 1, 379)
    (second,) = set(child.packs) - set(done.packs)
    assert store.needs([second]) == {second, *base.packs}
    assert content(store, child.refs[0]) == newer and store.verify() == []


def test_what_a_base_does_not_help_is_stored_whole(store: PageStore, files: Files) -> None:
    base = store.ingest([files.run(noise(1, 40))], owner="t")
    done = store.ingest([files.run(noise(2, 40), base=whole(base))], owner="t")
    assert counts(done) == (40, 0, 0, 0)


def test_a_base_that_is_missing_or_damaged_is_done_without(store: PageStore, files: Files, root: Path) -> None:
    old = noise(1, 4)
    base = store.ingest([files.run(old)], owner="t")
    flip(only(root, "*.pages"), 5000, 1)
    new = altered(old[:PAGE], 3) + old[PAGE:]
    gone = ((0, Ref("ab" * 32, 0, 4)),)
    for bad in (whole(base), gone):
        store.close()
        store = PageStore(root)
        done = store.ingest([files.run(new, base=bad)], owner="t")
        assert content(store, done.refs[0]) == new
    store.close()


def test_packs_are_split(store: PageStore, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest_module, "MAX_PAGES", {False: 256, True: 256})
    data = noise(1, 1000)
    data += data[: 300 * PAGE]
    done = store.ingest([files.run(data)], owner="t")
    assert len(done.packs) == 4 and counts(done) == (1000, 0, 0, 300)
    assert content(store, done.refs[0]) == data


def test_few_packs_are_shared_from(store: PageStore, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest_module, "MAX_FOUND_PACKS", 3)
    pages = [noise(i) for i in range(8)]
    for page in pages:
        store.ingest([files.run(page)], owner="t")
    done = store.ingest([files.run(b"".join(pages))], owner="t")
    assert len(done.packs) == 4 and counts(done) == (5, 0, 0, 3)
    assert content(store, done.refs[0]) == b"".join(pages)
    assert store.verify() == []


def test_few_pages_of_a_pack_are_stored_again(root: Path, store: PageStore, files: Files) -> None:
    """A pack is not kept for a few of its pages: else each capture would keep the one before it, for ever."""
    old = noise(1, 100)
    [pack] = store.ingest([files.run(old)], owner="old").packs
    store.release("old")
    few = noise(2, 3) + old[:PAGE] * 2 + old[50 * PAGE : 59 * PAGE] + noise(3, 2)
    made = store.ingest([files.run(few), files.run(old[:PAGE], first=True)], owner="new")
    assert pack not in made.packs and made.shared_pages == 2
    assert (content(store, made.refs[0]), content(store, made.refs[1])) == (few, old[:PAGE])
    assert made.new_pages == 15
    store.release("new")
    assert store.gc(set(made.packs), min_age_s=0.0).packs == (pack,)
    assert content(store, made.refs[0]) == few
    # Where they are an eighth of it, they are shared.
    other = noise(5, 100)
    [pack] = store.ingest([files.run(other)], owner="other").packs
    assert pack in store.ingest([files.run(noise(4, 2) + other[: 20 * PAGE])], owner="third").packs
    # The parent's are shared, be they ever so few.
    base = tuple((n, Ref(pack, n, 1)) for n in range(2))
    child = store.ingest([files.run(other[: 2 * PAGE], base=base)], owner="child")
    assert child.packs == (pack,) and child.shared_pages == 2


def test_a_run_beyond_its_file_and_other_misuse(store: PageStore, files: Files) -> None:
    run = files.run(noise(1, 3))
    with pytest.raises(StoreError, match="run 0"):
        store.ingest([Run(run.fd, PAGE, 4)], owner="t")
    for bad in ("x", "../" * 21 + "a", "ab" * 32):
        with pytest.raises(StoreError) as e:
            store.open_raw([bad])
        assert e.value.code == "pack-missing"
        assert not store.has(bad)
    assert [p.pack for p in store.verify(["ab" * 32])] == ["ab" * 32]
    assert list((store.root / "tmp").iterdir()) == [] and store.verify() == []
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.stats()


def test_breathe_is_called_between_batches_with_nothing_held(store: PageStore, files: Files, root: Path) -> None:
    seen = []

    def breathe() -> None:
        with closing(PageStore(root)) as other:
            other.lease(["ab" * 32], "another")
            seen.append(1)

    store.ingest([files.run(noise(1, 600))], owner="t", breathe=breathe)
    assert len(seen) == 3


# Integrity


def flip(path: Path, at: int, bit: int) -> None:
    with open(path, "r+b") as f:
        f.seek(at)
        byte = f.read(1)[0]
        f.seek(at)
        f.write(bytes([byte ^ 1 << bit]))


def test_every_flipped_bit_is_found(root: Path, files: Files, key: bytes | None) -> None:
    """Names and deltas: each bit. Pages: one bit of each byte."""
    store = PageStore(root, key=key)
    old = noise(1, 2)
    base = store.ingest([files.run(old)], owner="t")
    child = store.ingest([files.run(altered(old[:PAGE], 5) + old[PAGE:], base=whole(base))], owner="t")
    (delta,) = set(child.packs) - set(base.packs)
    rng = random.Random(4)
    for path in sorted(root.rglob("packs/*/*")):
        original = path.read_bytes()
        pack = path.name[:64]
        every = [(i, b) for i in range(len(original)) for b in range(8)]
        places = every if path.suffix != ".pages" else [(i, rng.randrange(8)) for i in range(len(original))]
        for at, bit in places:
            flip(path, at, bit)
            assert store.verify([pack]), (path.name, at, bit)
            flip(path, at, bit)
        assert path.read_bytes() == original
    assert store.verify() == []
    store.close()
    # What opens packs finds them too, and never gives a file that holds anything else.
    for path in sorted(root.rglob("packs/*/*")):
        for _ in range(30):
            at, bit = rng.randrange(path.stat().st_size), rng.randrange(8)
            flip(path, at, bit)
            store = PageStore(root, key=key)
            (root / "packs" / delta[:2] / f"{delta}.pages").unlink(missing_ok=True)
            with pytest.raises(IntegrityError) as e:
                store.open_raw([delta, *base.packs])
            assert e.value.fields["pack"] in (path.name[:64], delta)
            flip(path, at, bit)
            store.close()


def test_files_cut_short_or_grown_are_found(root: Path, store: PageStore, files: Files) -> None:
    (pack,) = store.ingest([files.run(noise(1, 3))], owner="t").packs
    for form in ("names", "pages"):
        path = only(root, f"*.{form}")
        data = path.read_bytes()
        for broken in (data[:-1], data[:-PAGE], data + b"\0", data + bytes(PAGE), b""):
            path.write_bytes(broken)
            other = PageStore(root)
            with pytest.raises((IntegrityError, StoreError)):
                other.open_raw([pack])
            assert other.verify() and other.verify(deep=False)
            other.close()
        path.write_bytes(data)
    path = only(root, "*.pages")
    path.unlink()
    assert [p.what for p in store.verify()] == ["its pages are missing"]
    with pytest.raises(StoreError, match="missing"):
        store.open_raw([pack])


def test_a_damaged_pack_is_stored_anew_when_its_pages_come_again(root: Path, files: Files, key: bytes | None) -> None:
    data = noise(1, 3)
    store = PageStore(root, key=key)
    done = store.ingest([files.run(data)], owner="t")
    store.close()
    flip(only(root, "*.pages"), 5000, 3)
    store = PageStore(root, key=key)
    with pytest.raises(IntegrityError, match="page 1"):
        store.open_raw(done.packs)
    assert not store.has(done.packs[0]) and store.verify()
    again = store.ingest([files.run(data)], owner="t")
    assert again.packs == done.packs and again.new_pages == 3
    assert content(store, again.refs[0]) == data and store.verify() == [] and store.has(done.packs[0])
    store.close()


def test_pages_are_verified_once_while_the_file_stays_as_it_is(
    root: Path, files: Files, key: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from woodfrog.store import pages as module

    store = PageStore(root, key=key)
    (pack,) = store.ingest([files.run(noise(1, 3))], owner="t").packs
    store.close()
    store = PageStore(root, key=key)
    looked: list[str] = []
    for name in ("wrong_page", "content_digest"):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, name=name: looked.append(name) or real(*a))
    for _ in range(3):
        store.open_raw([pack])
    assert looked == (["content_digest"] if key else ["wrong_page"])
    os.utime(only(root, "*.pages"))
    store.open_raw([pack])
    assert len(looked) == 2
    store.close()


def test_a_seal_holds_for_its_key_only(root: Path, files: Files) -> None:
    store = PageStore(root, key=KEY)
    done = store.ingest([files.run(noise(1, 3))], owner="t")
    store.close()
    path = only(root, "*.pages")
    good = path.read_bytes()
    path.write_bytes(noise(2, 3))
    # One who can write everything but does not know the key makes a seal of his own.
    forger = PageStore(root, key=bytes(32))
    forged = forger._sealed(done.packs[0], blake3(path.read_bytes()).digest())
    forger.index.execute("UPDATE packs SET seal = ?", [(forged,)])
    forger.close()
    store = PageStore(root, key=KEY)
    with pytest.raises(IntegrityError):
        store.open_raw(done.packs)
    path.write_bytes(good)
    store.open_raw(done.packs)
    store.close()


# The index


@pytest.mark.parametrize("how", ["removed", "garbage", "cut", "old"])
def test_the_index_is_found_again_from_the_packs(root: Path, files: Files, how: str) -> None:
    data = noise(1, 700)
    store, other = PageStore(root), PageStore(root)
    done = store.ingest([files.run(data)], owner="t")
    index = root / "index.sqlite"
    if how == "removed":
        store.close()
        other.close()
        index.unlink()
    else:
        store.index.query("PRAGMA wal_checkpoint(TRUNCATE)")
        size = index.stat().st_size
        with open(index, "r+b") as f:
            if how == "garbage":
                f.write(noise(5, size // PAGE))
            elif how == "cut":
                f.truncate(size // 2)
            else:
                for at in range(4096, size, 8192):  # every second page of it
                    f.seek(at)
                    f.write(noise(at))
        store.close()
    fresh = PageStore(root)
    again = fresh.ingest([files.run(data)], owner="t")
    assert content(fresh, again.refs[0]) == data
    if how != "removed":
        assert content(other, other.ingest([files.run(data)], owner="t").refs[0]) == data
        assert other.verify() == []
        other.close()
    assert fresh.verify() == [] and fresh.stats().packs >= 1
    if how in ("removed", "garbage"):
        assert again.packs == done.packs
    fresh.close()


def test_leases_outlive_the_index(root: Path, files: Files) -> None:
    store = PageStore(root)
    done = store.ingest([files.run(noise(1))], owner="t")
    (root / "index.sqlite").write_bytes(b"nonsense" * 1000)
    other = PageStore(root)
    assert store.has(done.packs[0])  # it notices that there is another index, and enters its leases there
    assert other.gc(set(), min_age_s=0).packs == ()
    store.release("t")
    assert other.gc(set(), min_age_s=0).packs == done.packs
    store.close()
    other.close()


def test_wrong_rows_of_the_index_do_no_harm(root: Path, files: Files) -> None:
    data = noise(1, 50)
    store = PageStore(root)
    store.ingest([files.run(data)], owner="t")
    store.index.execute("UPDATE pages SET slot = 49 - slot", [()])
    assert any("wrongly" in p.what for p in store.verify())
    done = store.ingest([files.run(data)], owner="t")
    assert content(store, done.refs[0]) == data
    store.index.execute("UPDATE pages SET slot = slot + 1000000, pack = pack + 7", [()])
    done = store.ingest([files.run(data)], owner="t")
    assert content(store, done.refs[0]) == data
    store.close()


def test_an_index_that_contradicts_itself_removes_nothing(root: Path, store: PageStore, files: Files) -> None:
    data = noise(1, 3)
    done = store.ingest([files.run(data)], owner="t")
    store.index.execute("INSERT INTO doomed SELECT id, num FROM packs", [()])
    store.gc(set(done.packs), min_age_s=0)
    assert store.has(done.packs[0]) and content(store, done.refs[0]) == data and store.verify() == []


def test_an_index_of_another_version_is_made_anew(root: Path, store: PageStore, files: Files) -> None:
    done = store.ingest([files.run(noise(1))], owner="t")
    connection = sqlite3.connect(root / "index.sqlite")
    connection.execute("PRAGMA user_version = 9")
    connection.close()
    other = PageStore(root)
    assert other.has(done.packs[0]) and other.verify() == []
    other.close()


def test_whatever_bit_of_the_index_flips_pages_stay_right(root: Path, files: Files, tmp_path: Path) -> None:
    old = noise(1, 200)
    store = PageStore(root)
    base = store.ingest([files.run(old)], owner="t")
    new = b"".join(altered(old[i : i + PAGE], i) if i % 7 == 0 else old[i : i + PAGE] for i in range(0, len(old), PAGE))
    run = files.run(new, base=whole(base))
    done = store.ingest([run], owner="t")
    store.index.query("PRAGMA wal_checkpoint(TRUNCATE)")
    store.close()
    size, rng = (root / "index.sqlite").stat().st_size, random.Random(11)
    for number in range(60):
        copy = tmp_path / f"copy-{number}"
        shutil.copytree(root, copy)
        for _ in range(rng.choice((1, 5, 50))):
            flip(copy / "index.sqlite", rng.randrange(size), rng.randrange(8))
        store = PageStore(copy)
        assert content(store, done.refs[0]) == new
        again = store.ingest([run], owner="u")
        store.release("u")
        store.gc({*base.packs, *done.packs, *again.packs}, min_age_s=0)
        for refs, data in ((done.refs[0], new), (again.refs[0], new), (base.refs[0], old)):
            assert content(store, refs) == data
        assert not [p for p in store.verify() if "index" not in p.what and "missing" not in p.what]
        store.close()
        shutil.rmtree(copy)


# Leases and gc


def test_gc_keeps_what_lives_what_that_rests_on_and_what_is_leased(root: Path, store: PageStore, files: Files) -> None:
    old = noise(1, 4)
    base = store.ingest([files.run(old)], owner="t")
    child = store.ingest([files.run(altered(old[:PAGE], 1), base=((0, base.refs[0][0]),))], owner="t")
    other = store.ingest([files.run(noise(2))], owner="u")
    third = store.ingest([files.run(noise(3))], owner="t")
    assert child.delta_pages == 1 and base.packs[0] not in child.packs
    assert store.gc(set(), min_age_s=0).packs == ()
    store.release("t")
    assert store.gc(set()).packs == ()  # too young
    gone = store.gc(set(child.packs), min_age_s=0)
    assert gone.packs == third.packs and gone.freed_bytes == PAGE + 32
    assert content(store, child.refs[0]) == altered(old[:PAGE], 1)
    assert content(store, other.refs[0]) == noise(2)
    store.release("u")
    assert set(store.gc(set(), min_age_s=0).packs) == {*base.packs, *child.packs, *other.packs}
    assert list(root.rglob("packs/*/*")) == [] and store.verify() == []
    assert store.index.query("SELECT * FROM pages") == []
    again = store.ingest([files.run(old)], owner="t")
    assert again.new_pages == 4 and content(store, again.refs[0]) == old


def test_a_lease_makes_a_pack_young_again(store: PageStore, files: Files) -> None:
    done = store.ingest([files.run(noise(1))], owner="t")
    store.release("t")
    store.index.execute("UPDATE packs SET used = used - 1000", [()])
    store.ingest([files.run(noise(1))], owner="u")
    store.release("u")
    assert store.gc(set()).packs == ()
    store.index.execute("UPDATE packs SET used = used - 1000", [()])
    assert store.gc(set()).packs == done.packs


def test_leases_of_dead_processes_lapse(root: Path, store: PageStore, files: Files) -> None:
    done = store.ingest([files.run(noise(1))], owner="t")
    program = (
        "import sys; from pathlib import Path; from woodfrog.store.pages import PageStore\n"
        "s = PageStore(Path(sys.argv[1])); s.lease([sys.argv[2]], 'child'); print(flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(root), done.packs[0]], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    child.stdout.readline()
    store.release("t")
    store.release("child")  # not this process's
    assert store.gc(set(), min_age_s=0).packs == ()
    child.kill()
    child.communicate()
    assert store.gc(set(), min_age_s=0).packs == done.packs


def test_a_lease_saves_a_pack_that_is_marked_for_removal(root: Path, store: PageStore, files: Files) -> None:
    data = noise(1, 3)
    done = store.ingest([files.run(data)], owner="t")
    store.release("t")

    def leave(packs: object) -> None:
        """Another process's gc has marked the pack and not come further."""

    store._remove = leave  # type: ignore[method-assign]
    assert store.gc(set(), min_age_s=0).packs == done.packs
    assert not store.has(done.packs[0])
    store.lease(done.packs, "u")
    assert store.has(done.packs[0])
    del store._remove  # type: ignore[method-assign]
    assert store.gc(set(), min_age_s=0).packs == ()
    assert store.verify() == [] and content(store, done.refs[0]) == data
    assert store.ingest([files.run(data)], owner="u").stored_bytes == 0


def test_trim_cache_takes_nothing_that_was_leased_meanwhile(
    root: Path, store: PageStore, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process leases and opens a pack at the moment when its file goes."""
    old = noise(1, 2)
    base = store.ingest([files.run(old)], owner="t")
    run = files.run(altered(old[:PAGE], 1), base=((0, Ref(base.packs[0], 0, 1)),))
    [pack] = store.ingest([run], owner="child").packs
    store.open_raw([pack])
    store.release("child")
    seen: list[Path] = []
    unlink = Path.unlink

    def late(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".pages" and not seen:
            with closing(PageStore(root)) as other:
                other.lease([pack], "late")
                seen.extend(other.open_raw([pack]).values())
                unlink(path, missing_ok)
                assert seen[0].exists(), "leased, opened, and gone"
            return
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", late)
    assert store.trim_cache(0) == PAGE
    assert seen


def test_trim_cache_drops_rebuilt_packs_least_recently_opened_first(root: Path, store: PageStore, files: Files) -> None:
    old = noise(1, 30)
    base = store.ingest([files.run(old)], owner="t")
    children = []
    for i in range(3):
        part = altered(old[i * PAGE : (i + 1) * PAGE], i)
        segment = ((0, Ref(base.packs[0], i, 1)),)
        children.append((part, store.ingest([files.run(part, base=segment)], owner=f"c{i}")))
    for _, done in (*children, children[0]):
        store.open_raw(done.packs)
    assert store.stats().cache_bytes == 3 * PAGE
    store.release("c1")
    store.release("c0")
    assert store.trim_cache(0, keep=[*children[0][1].packs, *children[1][1].packs]) == 0
    assert store.trim_cache(2 * PAGE) == PAGE and len(list(root.rglob("*.pages"))) == 3
    assert not (root / "packs" / children[1][1].packs[0][:2] / f"{children[1][1].packs[0]}.pages").exists()
    assert store.trim_cache(0) == PAGE  # the third is leased
    for part, done in children:
        assert content(store, done.refs[0]) == part
    assert store.verify() == []


def test_a_damaged_cache_is_rebuilt(root: Path, store: PageStore, files: Files) -> None:
    old = noise(1, 2)
    base = store.ingest([files.run(old)], owner="t")
    new = altered(old[:PAGE], 1)
    done = store.ingest([files.run(new, base=((0, base.refs[0][0]),))], owner="t")
    store.open_raw(done.packs)
    path = root / "packs" / done.packs[0][:2] / f"{done.packs[0]}.pages"
    for damage in (noise(9), b"", new + b"x"):
        path.write_bytes(damage)
        assert [p.pack for p in store.verify()] == list(done.packs)
        assert content(store, done.refs[0]) == new
    assert store.verify() == []


# From elsewhere


def test_packs_move_to_another_store(tmp_path: Path, store: PageStore, files: Files, key: bytes | None) -> None:
    old = noise(1, 40)
    base = store.ingest([files.run(old)], owner="t")
    new = b"".join(altered(old[i : i + PAGE], i) for i in range(0, len(old), PAGE))
    done = store.ingest([files.run(new, base=whole(base))], owner="t")
    (delta,) = done.packs
    there = PageStore(tmp_path / "there", key=key)

    def send(pack: str, damage: str = "") -> str:
        names, data, form = store.files(pack)
        copy = tmp_path / "copy"
        shutil.copy(data, copy)
        text = bytearray(names.read_bytes())
        if damage == "data":
            flip(copy, copy.stat().st_size // 2, 2)
        elif damage == "names":
            text[40] ^= 1
        elif damage == "short":
            os.truncate(copy, copy.stat().st_size - 1)
        return there.adopt(bytes(text), owner="t", **{form: copy})  # type: ignore[arg-type]

    with pytest.raises(StoreError, match="missing"):
        send(delta)
    for pack in (*base.packs, delta):
        for damage in ("data", "names", "short"):
            with pytest.raises(IntegrityError):
                send(pack, damage)
        assert not there.has(pack)
        assert send(pack) == pack and there.has(pack)
        assert send(pack) == pack
    assert content(there, done.refs[0]) == new and content(there, base.refs[0]) == old
    assert there.verify() == [] and list((there.root / "tmp").iterdir()) == []
    assert there.ingest([files.run(new)], owner="t").stored_bytes == 0
    with pytest.raises(IntegrityError):
        there.adopt(b"x" * 33, pages=tmp_path / "copy")
    there.close()


# Anything, in any order


class Model(RuleBasedStateMachine):
    """Snapshots come and go, processes open and close the store, files are lost; what is live stays readable."""

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.folder = Path(tempfile.mkdtemp(prefix="wf-pages-"))
        self.files = Files(self.folder)
        self.root = self.folder / "store"
        self.store = PageStore(self.root, key=KEY)
        self.live: dict[int, tuple[list[bytes], Ingested]] = {}
        self.count = 0
        self.rng = random.Random(0)

    @initialize(seed=st.integers(0, 1 << 30))
    def seed(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def page(self, like: bytes | None) -> bytes:
        kind = self.rng.choice(("zero", "few", "new", "close", "same", "same"))
        if kind == "zero":
            return bytes(PAGE)
        if kind == "few":
            return noise(self.rng.randrange(8))
        if like is None or kind == "new":
            return noise(self.rng.getrandbits(60))
        return altered(like, self.rng.getrandbits(30)) if kind == "close" else like

    @rule(pages=st.integers(1, 700), parent=st.booleans(), cuts=st.integers(0, 4), hold=st.booleans())
    def capture(self, pages: int, parent: bool, cuts: int, hold: bool) -> None:
        old: list[bytes] = []
        base: list[tuple[int, Ref]] = []
        if parent and self.live:
            old, done = self.live[self.rng.choice(sorted(self.live))]
            at = 0
            for ref in (r for refs in done.refs for r in refs):
                base.append((at, ref))
                at += ref.pages
        data = [self.page(old[i] if i < len(old) else None) for i in range(pages)]
        edges = sorted({0, pages, *(self.rng.randrange(pages) for _ in range(cuts))})
        runs = []
        source = self.files.run(b"".join(data))
        for begin, end in pairwise(edges):
            segments = []
            for at, ref in base:
                low, high = max(at, begin), min(at + ref.pages, end)
                if low < high:
                    segments.append((low - begin, Ref(ref.pack, ref.slot + low - at if ref.pack else 0, high - low)))
            runs.append(Run(source.fd, PAGE + begin * PAGE, end - begin, self.rng.random() < 0.3, tuple(segments)))
        self.count += 1
        done = self.store.ingest(runs, owner=f"capture-{self.count}")
        assert sum(counts(done)) == pages == sum(r.pages for refs in done.refs for r in refs)
        assert set(done.packs) == {r.pack for refs in done.refs for r in refs} - {""}
        self.live[self.count] = (data, done)
        if not hold:
            self.store.release(f"capture-{self.count}")

    @precondition(lambda self: self.live)
    @rule()
    def delete(self) -> None:
        number = self.rng.choice(sorted(self.live))
        del self.live[number]
        self.store.release(f"capture-{number}")

    @rule()
    def collect(self) -> None:
        self.store.gc({p for _, done in self.live.values() for p in done.packs}, min_age_s=0)

    @rule(budget=st.integers(0, 300))
    def trim(self, budget: int) -> None:
        self.store.trim_cache(budget * PAGE)

    @rule(keyed=st.booleans())
    def reopen(self, keyed: bool) -> None:
        self.store.close()
        self.store = PageStore(self.root, key=KEY if keyed else None)

    @rule()
    def lose_the_index(self) -> None:
        (self.root / "index.sqlite").write_bytes(b"lost" * 2000)

    @precondition(lambda self: self.live)
    @rule()
    def read(self) -> None:
        data, done = self.live[self.rng.choice(sorted(self.live))]
        assert b"".join(content(self.store, refs) for refs in done.refs) == b"".join(data)

    @invariant()
    def nothing_is_wrong(self) -> None:
        if self.rng.random() < 0.2:
            assert self.store.verify() == []

    def teardown(self) -> None:
        for data, done in self.live.values():
            assert b"".join(content(self.store, refs) for refs in done.refs) == b"".join(data)
        assert self.store.verify() == []
        for number in self.live:
            self.store.release(f"capture-{number}")
        self.store.gc(set(), min_age_s=0)
        assert list(self.root.rglob("packs/*/*")) == []
        self.store.close()
        self.files.close()
        shutil.rmtree(self.folder)


TestModel = Model.TestCase
TestModel.settings = settings(
    max_examples=40, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
