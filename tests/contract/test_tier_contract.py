"""What every tier owes its users, on each kind of tier; buckets are those of a real S3-compatible server process."""

from __future__ import annotations

import itertools
import os
import stat
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest

from contract.faulty_tier import Fault, FaultyTier
from s3_server import S3Server
from woodfrog.errors import IntegrityError, StoreError
from woodfrog.store.cold import Key, decode_file, encode_bytes
from woodfrog.store.tiers import DirectoryTier, MemoryTier, ObjectTier, Tier, open_tier

PART = 5 << 20
"""The smallest part that S3 takes."""
_prefix = itertools.count()


@pytest.fixture
def bucket(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Callable[[], ObjectTier]:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return lambda: ObjectTier(f"s3://woodfrog/run/{next(_prefix)}", part=PART, parallel=4)


@pytest.fixture(params=["memory", "directory", "bucket", "faulty"])
def tier(request: pytest.FixtureRequest, tmp_path: Path) -> Tier:
    match request.param:
        case "memory":
            return MemoryTier()
        case "directory":
            return DirectoryTier(tmp_path / "tier")
        case "bucket":
            made: Tier = request.getfixturevalue("bucket")()
            return made
    return FaultyTier(MemoryTier())


def code(error: pytest.ExceptionInfo[StoreError]) -> str:
    assert "\n" not in str(error.value)
    return error.value.code


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_what_is_put_comes_back_at_every_size(tier: Tier, tmp_path: Path) -> None:
    for size in (0, 1, PART - 1, PART, PART + 1, 3 * PART + 7):
        data = os.urandom(size)
        source, target = tmp_path / "source", tmp_path / "target"
        source.write_bytes(data)
        tier.put(f"a/{size}", source)
        tier.put(f"b/{size}", data)
        for key in (f"a/{size}", f"b/{size}"):
            assert tier.size(key) == size and tier.has(key)
            tier.get(key, target)
            assert target.read_bytes() == data
            assert tier.get_bytes(key) == data
    assert stat.S_IMODE(target.stat().st_mode) == 0o600, "what comes from a tier holds memory: nobody else reads it"
    assert leftovers(tmp_path) == []


def test_ranges_are_those_of_a_slice(tier: Tier) -> None:
    small, large = bytes(range(100)), os.urandom(2 * PART + 1000)
    tier.put("small", small)
    tier.put("large", large)
    for begin, end in [(0, 0), (0, 1), (3, 3), (99, 100), (99, 300), (100, 101), (5000, 6000), (0, None), (100, None)]:
        assert tier.get_bytes("small", begin, end) == small[begin:end], (begin, end)
    for begin, end in [(1, 2 * PART), (PART - 1, PART + 1), (7, None), (2 * PART, 1 << 40), (len(large), None)]:
        assert tier.get_bytes("large", begin, end) == large[begin:end], (begin, end)
    for begin, end in [(-1, 5), (5, 4)]:
        with pytest.raises(ValueError, match="range"):
            tier.get_bytes("small", begin, end)


def test_no_more_is_written_than_was_asked_for(tier: Tier, tmp_path: Path) -> None:
    """Who can write to a tier may exchange an object for a larger one after somebody has looked how large it is."""
    tier.put("a/b", bytes(1001))
    tier.get("a/b", tmp_path / "target", 1001)
    with pytest.raises(StoreError) as error:
        tier.get("a/b", tmp_path / "larger", 1000)
    assert code(error) == "tier-damaged" and not (tmp_path / "larger").exists()


def test_put_replaces_the_whole_object(tier: Tier, tmp_path: Path) -> None:
    tier.put("k", b"x" * 1000)
    tier.put("k", b"y")
    tier.put("k", b"y")
    assert tier.get_bytes("k") == b"y" and tier.size("k") == 1 and tier.list() == ["k"]
    (tmp_path / "target").write_bytes(b"old and longer")
    tier.get("k", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == b"y"


def test_what_is_not_there_is_missing(tier: Tier, tmp_path: Path) -> None:
    tier.put("folder/object", b"1")
    target = tmp_path / "target"
    target.write_bytes(b"kept")
    assert not tier.has("nothing")
    for key in ("nothing", "folder", "folder/object/below"):
        tier.delete(key)
    assert tier.list() == ["folder/object"]
    reads: list[Callable[[str], object]] = [
        lambda key: tier.get(key, target),
        tier.get_bytes,
        lambda key: tier.get_bytes(key, 5, 10),
        lambda key: tier.get_bytes(key, 5, 5),
        tier.size,
    ]
    for key, read in itertools.product(["nothing", "folder", "folder/object/below"], reads):
        assert not tier.has(key)
        with pytest.raises(StoreError, match=rf"no {key}") as error:
            read(key)
        assert code(error) == "tier-missing" and not error.value.retryable
        assert error.value.fields["key"] == key and error.value.fields["tier"] == tier.name
    assert target.read_bytes() == b"kept" and leftovers(tmp_path) == []


def test_delete(tier: Tier) -> None:
    tier.put("a/b", b"1")
    tier.put("a/c", b"2")
    tier.delete("a/b")
    assert not tier.has("a/b") and tier.list() == ["a/c"]
    tier.put("a/b", b"again")
    assert tier.get_bytes("a/b") == b"again"


def test_list_goes_by_folder(tier: Tier) -> None:
    assert tier.list() == tier.list("packs/ab") == []
    keys = ["packs/ab/1", "packs/ab/2", "packs/abc/3", "packs/ab2", "top", "packs/ab/deep/er/4"]
    for key in keys:
        tier.put(key, b"x")
    assert tier.list() == tier.list("/") == sorted(keys)
    assert tier.list("packs/ab") == tier.list("packs/ab/") == ["packs/ab/1", "packs/ab/2", "packs/ab/deep/er/4"]
    assert tier.list("top") == tier.list("packs/a") == tier.list("no/such") == []


def test_a_listing_tells_sizes_and_times(tier: Tier) -> None:
    """What was put later, or put again, is not older; and the clock is some clock of today."""
    before = time.time()
    tier.put("a/one", b"xyz")
    tier.put("b/two", b"")
    first = {entry.key: entry for entry in tier.entries()}
    assert {key: entry.size for key, entry in first.items()} == {"a/one": 3, "b/two": 0}
    time.sleep(1.1)  # S3 tells whole seconds
    tier.put("a/one", b"again")
    (again,) = tier.entries("a")
    assert (again.key, again.size) == ("a/one", 5)
    assert first["a/one"].modified < again.modified and first["b/two"].modified < again.modified
    assert all(abs(entry.modified - before) < 60 for entry in (*first.values(), again))
    assert [entry.key for entry in tier.entries("b")] == ["b/two"] and list(tier.entries("no/such")) == []


def test_list_has_no_page_limit(tier: Tier) -> None:
    keys = [f"many/{number:04}" for number in range(1005)]  # S3 gives 1,000 at a time
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda key: tier.put(key, b""), keys))
    assert tier.list("many") == keys


@pytest.mark.parametrize(
    "key", ["", "/a", "a/", "a//b", "../a", "a/../b", "./a", ".a", "a/.b", "a\0b", "ä", "a b", "x" * 701]
)
def test_keys_that_lead_elsewhere_are_refused(tier: Tier, key: str, tmp_path: Path) -> None:
    uses: list[Callable[[], object]] = [
        lambda: tier.put(key, b"x"),
        lambda: tier.get(key, tmp_path / "t"),
        lambda: tier.get_bytes(key),
        lambda: tier.has(key),
        lambda: tier.size(key),
        lambda: tier.delete(key),
    ]
    for use in uses:
        with pytest.raises(StoreError) as error:
            use()
        assert code(error) == "bad-tier"


def test_a_source_or_target_that_cannot_be_used_is_named(tier: Tier, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="absent") as error:
        tier.put("k", tmp_path / "absent")
    assert code(error) == "store" and not tier.has("k")
    tier.put("k", b"x")
    with pytest.raises(StoreError, match="no/where") as error:
        tier.get("k", tmp_path / "no/where")
    assert code(error) == "store"
    (tmp_path / "folder").mkdir()
    with pytest.raises(StoreError, match="folder"):
        tier.get("k", tmp_path / "folder")
    assert leftovers(tmp_path) == []


def test_readers_and_writers_of_one_key_never_see_a_mixture(tier: Tier, tmp_path: Path) -> None:
    """Each version is one byte value throughout, and has its own length."""
    versions = {bytes([value]) * (200_000 + value) for value in range(4)}
    tier.put("k", bytes([0]) * 200_000)
    stop = threading.Event()

    def write(data: bytes) -> None:
        for _ in range(5):
            tier.put("k", data)

    def read(number: int) -> int:
        reads = 0
        while not stop.is_set() or not reads:
            try:
                if number % 2:
                    tier.get("k", tmp_path / f"{number}")
                    data = (tmp_path / f"{number}").read_bytes()
                else:
                    data = tier.get_bytes("k")
            except StoreError as e:
                assert e.code == "tier-damaged", e  # noticed, which is as good
                continue
            assert data in versions
            reads += 1
        return reads

    with ThreadPoolExecutor(6) as pool:
        readers = [pool.submit(read, number) for number in range(2)]
        try:
            for writer in [pool.submit(write, data) for data in versions]:
                writer.result()
        finally:
            stop.set()
        assert all(reader.result() for reader in readers)
    assert tier.get_bytes("k") in versions


# -- each kind for itself ------------------------------------------------------------------------------------------


def test_a_directory_holds_nothing_half_written(tmp_path: Path) -> None:
    tier = DirectoryTier(tmp_path / "tier")
    for number in range(3):
        tier.put(f"a/b{number}/c", bytes(100))
    with pytest.raises(StoreError):
        tier.put("a/b0/c/under-a-file", b"x")
    assert list((tmp_path / "tier/.incoming").iterdir()) == []
    stale, fresh = (tmp_path / "tier/.incoming" / name for name in ("stale", "fresh"))
    for path in (stale, fresh):
        path.touch()
    os.utime(stale, (0, 0))
    again = DirectoryTier(tmp_path / "tier")
    assert not stale.exists() and fresh.exists(), "only what is surely left over goes"
    assert again.list() == ["a/b0/c", "a/b1/c", "a/b2/c"]


def test_who_can_write_to_a_directory_reaches_nothing_else(tmp_path: Path) -> None:
    """A share that others write to, while the daemon is root."""
    root, away = tmp_path / "tier", tmp_path / "away"
    tier = DirectoryTier(root)
    tier.put("real/a", b"x")
    away.mkdir()
    (away / "a").write_bytes(b"theirs")
    os.utime(away / "a", (0, 0))
    (root / "link").symlink_to(away)
    (root / "real/file").symlink_to(away / "a")
    for key in ("link/a", "link/new", "link/new/a"):
        with pytest.raises(StoreError):
            tier.put(key, b"mine")
        tier.delete(key)
        assert not tier.has(key)
    with pytest.raises(StoreError):
        tier.get_bytes("real/file")
    assert tier.list("link") == [] and tier.entries("link") == []
    (root / ".incoming").rmdir()
    (root / ".incoming").symlink_to(away)
    with pytest.raises(StoreError):
        DirectoryTier(root)
    with pytest.raises(StoreError):
        tier.put("real/b", b"mine")
    assert {p.name: p.read_bytes() for p in away.iterdir()} == {"a": b"theirs"}
    assert tier.get_bytes("real/a") == b"x"


def test_a_directory_of_odd_files_keeps_nobody_waiting(tmp_path: Path) -> None:
    tier = DirectoryTier(tmp_path / "tier")
    os.mkfifo(tmp_path / "tier/fifo")
    assert not tier.has("fifo")
    with pytest.raises(StoreError) as error:
        tier.get("fifo", tmp_path / "target")
    assert code(error) == "tier-missing"


def test_a_file_that_grows_while_it_is_read_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = DirectoryTier(tmp_path / "tier")
    tier.put("k", bytes(1000))
    written = 0
    sendfile = os.sendfile

    def grow(out: int, source: int, offset: None, count: int) -> int:
        nonlocal written
        with open(tmp_path / "tier/k", "ab") as f:
            f.write(bytes(1000))
        done = sendfile(out, source, offset, count)
        written += done
        assert written < 100_000
        return done

    monkeypatch.setattr(os, "sendfile", grow)
    with pytest.raises(StoreError) as error:
        tier.get("k", tmp_path / "target")
    assert code(error) == "tier-damaged" and written == 1000 and not (tmp_path / "target").exists()


def test_a_directory_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="file") as error:
        DirectoryTier(tmp_path / "file")
    assert code(error) == "tier-unreachable"


def test_a_directory_that_goes_away_is_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    tier = DirectoryTier(tmp_path / "tier")
    tier.put("a/b", b"x")
    (tmp_path / "tier").rename(tmp_path / "elsewhere")
    uses: list[Callable[[], object]] = [
        lambda: tier.has("a/b"),
        tier.list,
        lambda: tier.list("a"),
        lambda: tier.get_bytes("a/b"),
        lambda: tier.get("a/b", tmp_path / "target"),
        lambda: tier.put("a/b", b"y"),
    ]
    for use in uses:
        with pytest.raises(StoreError) as error:
            use()
        assert code(error) == "tier-unreachable"
    (tmp_path / "elsewhere").rename(tmp_path / "tier")
    assert tier.list() == ["a/b"]


@pytest.mark.root
def test_a_full_disk_keeps_what_was_there(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", small], check=True)
    try:
        tier = DirectoryTier(small / "tier")
        tier.put("k", bytes(500_000))
        (tmp_path / "source").write_bytes(bytes(900_000))
        sources: list[Path | bytes] = [bytes(900_000), tmp_path / "source"]
        for source in sources:
            with pytest.raises(StoreError, match="no space left") as error:
                tier.put("k", source)
            assert code(error) == "disk-full" and tier.size("k") == 500_000
        for number in range(3):
            with pytest.raises(StoreError, match="no space left") if number else nullcontext():
                tier.get("k", small / f"target{number}")
        assert sorted(path.name for path in small.iterdir()) == ["target0", "tier"]
        assert list((small / "tier/.incoming").iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)


def test_memory_is_bounded() -> None:
    tier = MemoryTier(budget=1000)
    tier.put("a", bytes(600))
    with pytest.raises(StoreError, match="600 of 1000 are used") as error:
        tier.put("b", bytes(401))
    assert code(error) == "tier-full" and tier.list() == ["a"]
    tier.put("a", bytes(1000))
    tier.delete("a")
    tier.put("b", bytes(1000))


def test_urls(tmp_path: Path, bucket: Callable[[], ObjectTier]) -> None:
    assert open_tier(str(tmp_path / "x")).name == open_tier(f"file://{tmp_path}/x").name == f"file://{tmp_path}/x"
    for url in (f"{tmp_path}/y", f"file://{tmp_path}/y"):
        with pytest.raises(StoreError, match="y' is no directory: mount what belongs there"):
            open_tier(url, make=False)
    assert open_tier(str(tmp_path / "x"), make=False).name.endswith("/x") and not (tmp_path / "y").exists()
    assert isinstance(open_tier("memory://"), MemoryTier)
    assert open_tier("s3://woodfrog/a/b/").name == "s3://woodfrog/a/b"
    bad = ["ftp://host/x", "relative/path", "s3://", "s3:///x", "file://host/x", "s3://b?x=1", "s3://AK:SECRET@b/x", ""]
    for url in bad:
        with pytest.raises(StoreError) as error:
            open_tier(url)
        assert code(error) == "bad-tier" and "SECRET" not in str(error.value.to_dict())


# -- faults --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["unreachable", "hang", "lost-answer", "broken-off", "denied", "missing"])
def test_an_operation_happens_whole_or_not_at_all(kind: str, tmp_path: Path) -> None:
    tier = FaultyTier(MemoryTier(), hang_s=0.01)
    tier.put("k", b"old")
    tier.faults = [Fault(kind, at=1)]  # type: ignore[arg-type]
    with pytest.raises(StoreError) as error:
        tier.put("k", b"new")
    assert error.value.retryable == (kind not in ("denied", "missing"))
    assert tier.inner.get_bytes("k") == (b"new" if kind == "lost-answer" else b"old")
    tier.faults = [Fault(kind, "get", at=2)]  # type: ignore[arg-type]
    tier.gone = False
    tier.get("k", tmp_path / "one")
    with pytest.raises(StoreError):
        tier.get("k", tmp_path / "two")
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


@pytest.mark.parametrize("kind", ["truncate", "alter"])
@pytest.mark.parametrize("key", [None, Key(bytes(32))])
def test_the_cold_form_shows_what_a_tier_spoiled(kind: str, key: Key | None, tmp_path: Path) -> None:
    for op in ("put", "get"):
        tier = FaultyTier(MemoryTier(), Fault(kind, op))  # type: ignore[arg-type]
        tier.put("k", encode_bytes(os.urandom(3_000_000), key=key))
        tier.get("k", tmp_path / "cold")
        with pytest.raises(IntegrityError, match=r"cold: .*(altered|cut off)"):
            decode_file(tmp_path / "cold", tmp_path / "plain", key=key)
        assert not (tmp_path / "plain").exists()
