"""Killed while a snapshot is packed, pushed or pulled: it is as it was or as it will be, and every byte of it right."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from woodfrog.criu.pagemap import INDEX, PageIndex, PageTask, read_index, write_index
from woodfrog.errors import NotFoundError
from woodfrog.faults import POINTS
from woodfrog.snapshot.catalogue import Catalogue, Opened
from woodfrog.snapshot.manifest import FORMAT, Manifest, SigningKey
from woodfrog.store.pages import PageStore

PAGE = 4096
ID = "s-0123456789ab"
BASE = 0x7F0000000000
SCRIPT = """
import sys
from pathlib import Path
from woodfrog import faults
from woodfrog.snapshot.catalogue import Catalogue
from woodfrog.snapshot.manifest import SigningKey
from woodfrog.snapshot.packing import prepare
from woodfrog.snapshot.transport import Transport
from woodfrog.snapshot.trust import TrustStore
from woodfrog.store.pages import PageStore
from woodfrog.store.tiers import DirectoryTier
home, tier, what, point = sys.argv[1:]
home = Path(home)
key = SigningKey.load_or_create(home.parent / "key")
store = PageStore(home / "store")
catalogue = Catalogue(home / "snapshots", key, store)
transport = Transport(catalogue, store, key, TrustStore(home / "trusted"), home / "moving", None)
if point:
    faults.configure(point + "=sigkill-self")
if what == "pack":
    old, new = prepare(catalogue, store, "s-0123456789ab", owner="me")
    ready = catalogue.ready_images(old, new)
    catalogue.swap_images(old, ready)
    catalogue.remove_replaced(ready.manifest)
    store.release("me")
elif what == "arrive":
    arrival = transport.arrive("s-0123456789ab", DirectoryTier(Path(tier)))
    arrival.rest()
    arrival.finish()
else:
    getattr(transport, what)("s-0123456789ab", DirectoryTier(Path(tier)))
"""


def memory() -> list[bytes]:
    rng = random.Random(9)
    pages = [rng.randbytes(PAGE) for _ in range(40)]
    return [*pages, bytes(PAGE), *pages[:10], bytes(PAGE)]


def make(home: Path, key: SigningKey) -> None:
    """A loose snapshot: pages 5 to the last are given by a page server, the rest CRIU reads itself."""
    catalogue = Catalogue(home / "snapshots", key, PageStore(home / "store"))
    staging = catalogue.begin(ID)
    pages = memory()
    (staging.images / "pages-1.img").write_bytes(b"".join(pages))
    (staging.images / "core-100.img").write_bytes(b"core")
    index = PageIndex((PageTask(100, ((BASE, len(pages) - 5, 5 * PAGE, 0),)),), ("pages-1.img",))
    (staging.images / INDEX).write_bytes(write_index(index))
    (staging.fs / "file").write_bytes(b"in the layer")
    size = len(pages) * PAGE
    catalogue.commit(staging, Manifest(FORMAT, ID, "key", "class", {}, "demo", "f", "", 1.0, 100, 1, size, 0, ()))


def machine(home: Path, key: SigningKey) -> tuple[Catalogue, PageStore]:
    store = PageStore(home / "store")
    return Catalogue(home / "snapshots", key, store), store


def read(opened: Opened) -> list[bytes]:
    """The snapshot's memory as a restore sees it."""
    rest = (opened.images / "pages-1.img").read_bytes()
    pages = [rest[i : i + PAGE] for i in range(0, len(rest), PAGE)]
    for i in range(5, len(pages)):
        pages[i] = bytes(PAGE)
    index = read_index((opened.images / INDEX).read_bytes())
    files = opened.files or tuple(opened.images / name for name in index.files)
    for address, count, offset, file in index.tasks[0].extents:
        data = files[file].read_bytes()[offset : offset + count * PAGE]
        for i in range(count):
            pages[5 + (address - BASE) // PAGE + i] = data[i * PAGE : (i + 1) * PAGE]
    return pages


def run(home: Path, tier: Path, what: str, point: str) -> int:
    argv = [sys.executable, "-c", SCRIPT, str(home), str(tier), what, point]
    return subprocess.run(argv, check=False, timeout=60).returncode


ELSEWHERE = {"store.leased", "store.delta", "store.rebuilt", "store.gc.marked", "store.gc.unlinked", "store.gc.removed"}
PACKING = [p for p in POINTS if p.startswith(("pack.", "store.")) and p not in ELSEWHERE]


@pytest.mark.parametrize("point", PACKING)
def test_killed_while_packing(tmp_path: Path, point: str) -> None:
    key = SigningKey.load_or_create(tmp_path / "key")
    home = tmp_path / "home"
    make(home, key)
    assert run(home, tmp_path / "tier", "pack", point) == -9
    for _ in range(2):  # the second has nothing left to sweep
        catalogue, store = machine(home, key)
        opened = catalogue.open_verified(ID)
        assert read(opened) == memory()
        assert (opened.path / "fs" / "file").read_bytes() == b"in the layer"
        assert {p.name for p in opened.path.glob("img*")} == {opened.manifest.images}
        assert store.verify() == [] and catalogue.damaged == {}
        store.close()
    if catalogue.form(ID) == "loose":
        assert run(home, tmp_path / "tier", "pack", "") == 0
        catalogue, store = machine(home, key)
        assert catalogue.form(ID) == "packed" and read(catalogue.open_verified(ID)) == memory()
        store.gc(set(catalogue.get(ID).packs), min_age_s=0)
        assert read(catalogue.open_verified(ID)) == memory() and store.verify() == []


@pytest.mark.parametrize(
    "what, point",
    [(p.split(".")[0], p) for p in POINTS if p.startswith(("push.", "pull.", "arrive."))]
    + [("pull", "admit.manifest"), ("arrive", "admit.manifest")]
    + [("arrive", f"store.{p}") for p in ("leased", "durable", "pages", "names", "renamed", "entered", "listed")],
)
def test_killed_on_the_way(tmp_path: Path, what: str, point: str) -> None:
    """Nobody sees half a snapshot, and the next attempt succeeds."""
    key = SigningKey.load_or_create(tmp_path / "key")
    here, there, tier = tmp_path / "here", tmp_path / "there", tmp_path / "tier"
    there.mkdir()
    make(here, key)
    assert run(here, tier, "pack", "") == 0
    if what == "push":
        assert run(here, tier, "push", point) == -9
        assert run(there, tier, "pull", "") == 1, "there is no manifest yet"
    assert run(here, tier, "push", "") == 0
    if what != "push":
        assert run(there, tier, what, point) == -9
        catalogue, store = machine(there, key)
        with pytest.raises(NotFoundError):
            catalogue.get(ID)
        assert catalogue.damaged == {} and not [p for p in catalogue.root.iterdir() if p.name.startswith(".")]
        assert store.verify() == [] and not list(store.folder.tmp.iterdir())
        store.close()
    assert run(there, tier, "arrive" if what == "arrive" else "pull", "") == 0
    catalogue, store = machine(there, key)
    assert read(catalogue.open_verified(ID)) == memory() and store.verify() == []


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """Anywhere in what a packed snapshot consists of."""
    key = SigningKey.load_or_create(tmp_path / "key")
    home = tmp_path / "home"
    make(home, key)
    assert run(home, tmp_path / "tier", "pack", "") == 0
    rng = random.Random(1)
    catalogue, store = machine(home, key)
    folder = catalogue.path(ID)
    files = [p for p in (*folder.rglob("*"), *(home / "store" / "packs").rglob("*")) if p.is_file()]
    files = [p for p in files if p.stat().st_size and p.suffix != ".log"]
    assert {"manifest.json", "manifest.sig", "pages-1.img", INDEX, "file"} <= {p.name for p in files}
    for number in range(150):
        path = rng.choice(files)
        at = rng.randrange(path.stat().st_size * 8)
        flip(path, at)
        if number % 10 == 0:  # also by one who has not seen it whole
            store.close()
            catalogue, store = machine(home, key)
        with pytest.raises((Exception,)) as caught:
            catalogue.open_verified(ID)
        assert caught.type.__name__ in ("IntegrityError", "StoreError"), (path, at)
        flip(path, at)
        if number % 10 == 0:
            store.close()
            catalogue, store = machine(home, key)
    assert read(catalogue.open_verified(ID)) == memory()


def flip(path: Path, bit: int) -> None:
    with open(path, "r+b") as f:
        f.seek(bit // 8)
        (value,) = f.read(1)
        f.seek(bit // 8)
        f.write(bytes([value ^ 1 << bit % 8]))
        os.fsync(f.fileno())
