"""A snapshot's memory through the page store, with real processes: packed, moved to another machine, thawed."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from engine_rig import WORKER_PID, Rig
from repack import repack
from woodfrog.engine.engine import Lazy, restore
from woodfrog.errors import IncompatibleSnapshot, IntegrityError, NotFoundError, StoreError
from woodfrog.linux.pageserver import PageServer
from woodfrog.linux.sandbox import Sandbox
from woodfrog.snapshot import transport
from woodfrog.snapshot.capture import SnapshotIdentity, capture
from woodfrog.snapshot.catalogue import Catalogue, Opened
from woodfrog.snapshot.compat import WorkerClass
from woodfrog.snapshot.manifest import Manifest, SigningKey
from woodfrog.snapshot.materialise import check_external
from woodfrog.snapshot.packing import NotPackable, prepare
from woodfrog.snapshot.transport import Transport
from woodfrog.snapshot.trust import TrustStore, public_text
from woodfrog.store.cold import Key
from woodfrog.store.pages import PageStore
from woodfrog.store.tiers import DirectoryTier
from woodfrog.telemetry import Phases

pytestmark = [pytest.mark.root, pytest.mark.criu]

PROGRAM = """
import random, zlib
rng = random.Random(5)
data = [bytearray(rng.randbytes(1 << 20)) for _ in range(24)]
empty = bytearray(32 << 20)
empty[:] = bytes(len(empty))
words = {i: str(i) * 3 for i in range(60000)}
open("/tmp/notes", "w").write("kept")
added = []
def check():
    if len(added) < {more}:
        added.append(rng.randbytes(500_000))
        data[3][100] ^= 255
    sums = [zlib.crc32(d) for d in (*data, empty, *added)]
    return sums, zlib.crc32(repr(sorted(words.items())).encode()), open("/tmp/notes").read(), len(added)
"""


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    made = Rig.make(tmp_path)
    yield made
    await made.close()


class Machine:
    """A catalogue, its store and its key."""

    def __init__(self, home: Path) -> None:
        home.mkdir(exist_ok=True)
        self.home = home
        self.key = SigningKey.load_or_create(home / "key")
        self.trust = TrustStore(home / "trusted")
        self.open()

    def open(self) -> None:
        self.store = PageStore(self.home / "store")
        self.catalogue = Catalogue(self.home / "snapshots", self.key, self.store)

    def reopen(self) -> None:
        self.store.close()
        self.open()

    def transport(self, key: Key | None = None) -> Transport:
        return Transport(self.catalogue, self.store, self.key, self.trust, self.home / "moving", key)

    def pack(self, snapshot_id: str, working_set: bytes = b"") -> Manifest:
        try:
            old, new = prepare(self.catalogue, self.store, snapshot_id, working_set=working_set, owner="test")
            return repack(self.catalogue, old, new)
        finally:
            self.store.release("test")


async def frozen(rig: Rig, machine: Machine, sandbox: Sandbox, snapshot_id: str, parent: str = "") -> Manifest:
    staging = machine.catalogue.begin(snapshot_id)
    draft = await capture(
        sandbox,
        root_pid=WORKER_PID,
        staging=staging,
        identity=SnapshotIdentity(snapshot_id, "fkey", WorkerClass("class", {}), "app", "f", ""),
        criu=rig.criu,
        phases=Phases(),
        below=machine.catalogue.path(parent) / "fs" if parent else None,
    )
    await sandbox.destroy()
    return machine.catalogue.commit(staging, replace(draft, parent=parent))


async def thawed(
    rig: Rig, opened: Opened, server: PageServer, *, everything: bool = False, working_set: Path | None = None
) -> tuple[Sandbox, Lazy]:
    check_external(opened.manifest)
    sandbox = await rig.sandbox(layers=(opened.path / "fs",), shm=opened.path / "shm")
    lazy = Lazy(server, working_set, files=opened.files, everything=everything)
    await restore(sandbox, images=opened.images, criu=rig.criu, phases=Phases(), lazy=lazy)
    return sandbox, lazy


@pytest.fixture
async def server() -> AsyncIterator[PageServer]:
    made = await PageServer.start(uid=64647, on_death=lambda: None)
    yield made
    await made.close()


async def ask(rig: Rig, sandbox: Sandbox, lazy: Lazy) -> str:
    answer = await rig.ask(sandbox, patience=30)
    assert lazy.served is not None and not lazy.served.failed.done()
    return answer


def disk(path: Path) -> int:
    return sum(os.lstat(p).st_blocks * 512 for p in path.rglob("*") if not p.is_symlink())


async def arrives(
    rig: Rig,
    server: PageServer,
    there: Machine,
    here: Machine,
    key: Key,
    snapshot: str,
    tier: DirectoryTier,
    right: str,
) -> None:
    """Thawed while most of it, and of what it rests on, is still to come."""
    there.trust.add(public_text(here.key))
    moving = there.transport(key)
    arrival = await asyncio.to_thread(moving.arrive, snapshot, tier)
    loop, needed = asyncio.get_running_loop(), []

    def need(place: int, pages: int, asked: bool) -> None:
        def answer(found: bool) -> None:
            loop.call_soon_threadsafe(server.have, place, pages, 0 if found else 5)

        needed.append(pages)
        moving.incoming.need(place, pages, asked, answer)

    server.on_need = need
    opened = arrival.opened()
    assert opened.present is not None and there.store.stats().packs == 0
    sandbox = await rig.sandbox(layers=(opened.path / "fs",), shm=opened.path / "shm")
    lazy = Lazy(server, None, files=opened.files, present=opened.present)
    await restore(sandbox, images=opened.images, criu=rig.criu, phases=Phases(), lazy=lazy)
    assert await ask(rig, sandbox, lazy) == right
    assert needed, "it had to wait for some"
    await sandbox.destroy()
    await asyncio.to_thread(arrival.rest)
    await asyncio.to_thread(arrival.finish)
    sandbox, lazy = await thawed(rig, there.catalogue.open_verified(snapshot), server)
    assert await ask(rig, sandbox, lazy) == right
    await sandbox.destroy()
    assert there.store.verify() == []


async def test_packed_moved_and_thawed(
    rig: Rig, server: PageServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parent and child share pages; both answer as before in every form and place."""
    here = Machine(tmp_path / "here")
    sandbox, _ = await rig.start(PROGRAM.replace("{more}", "2"))
    first = await rig.ask(sandbox)
    assert first.endswith("'kept', 1)")
    loose = await frozen(rig, here, sandbox, "s-000000000001")
    with pytest.raises(NotFoundError):
        here.catalogue.get("s-2")

    # the child: thawed whole from the parent, changed a little, frozen again
    sandbox, lazy = await thawed(rig, here.catalogue.open_verified(loose.id), server, everything=True)
    second = await ask(rig, sandbox, lazy)
    assert second.endswith("'kept', 2)")
    child = await frozen(rig, here, sandbox, "s-000000000002", parent=loose.id)

    # the working set, from a lazy thaw
    sandbox, lazy = await thawed(rig, here.catalogue.open_verified(child.id), server)
    assert await ask(rig, sandbox, lazy) == second
    assert lazy.served is not None
    working_set = tmp_path / "working-set"
    working_set.write_bytes(await lazy.served.record())
    await sandbox.destroy()

    parent_packed = here.pack(loose.id)
    child_packed = here.pack(child.id, working_set.read_bytes())
    assert parent_packed.form == child_packed.form == "packed"
    raw = child.pages_bytes
    assert disk(here.catalogue.path(child.id) / child_packed.images) < raw / 10
    assert child_packed.stored_bytes < raw / 5, (child_packed.stored_bytes, raw)
    assert parent_packed.stored_bytes < loose.pages_bytes - (30 << 20), "zeroes are free"
    with pytest.raises(NotPackable):
        here.pack(child.id)

    for _ in range(2):
        for known in (None, working_set):
            sandbox, lazy = await thawed(rig, here.catalogue.open_verified(child.id), server, working_set=known)
            assert await ask(rig, sandbox, lazy) == second
            await sandbox.destroy()
        sandbox, lazy = await thawed(rig, here.catalogue.open_verified(loose.id), server, everything=True)
        assert await ask(rig, sandbox, lazy) == second, "it does what the child did"
        await sandbox.destroy()
        here.reopen()
    assert here.store.verify() == []

    # packed, thawed whole, it can be frozen again
    sandbox, lazy = await thawed(rig, here.catalogue.open_verified(child.id), server, everything=True)
    assert await ask(rig, sandbox, lazy) == second
    again = await frozen(rig, here, sandbox, "s-000000000003", parent=child.id)
    assert here.pack(again.id).stored_bytes < raw / 10

    # to another machine, which trusts this one
    tier, key = DirectoryTier(tmp_path / "bucket"), Key(os.urandom(32))
    out = here.transport(key)
    await asyncio.to_thread(out.push, child.id, tier)
    there = Machine(tmp_path / "there")
    with pytest.raises(IntegrityError, match="key"):
        there.transport(key).pull(child.id, tier)
    there.trust.add(public_text(here.key))
    with pytest.raises((IntegrityError, StoreError)):
        there.transport(None).pull(child.id, tier)
    assert there.transport(key).find(tier, "fkey", "class") == [child.id]
    assert there.transport(key).find(tier, "fkey", "other") == []
    await arrives(rig, server, Machine(tmp_path / "fourth"), here, key, child.id, tier, second)
    pulled = await asyncio.to_thread(there.transport(key).pull, child.id, tier)
    assert pulled.form == "packed" and there.store.verify() == []
    for _ in range(2):
        sandbox, lazy = await thawed(rig, there.catalogue.open_verified(child.id), server)
        assert await ask(rig, sandbox, lazy) == second
        await sandbox.destroy()
        there.reopen()

    # as one file, back to a machine that lost it
    exported = tmp_path / "child.frog"
    await asyncio.to_thread(there.transport().export, child.id, exported)
    there.catalogue.remove(child.id)
    there.store.gc(set(), min_age_s=0)
    assert there.store.stats().packs == 0
    there.transport().import_(exported)
    sandbox, lazy = await thawed(rig, there.catalogue.open_verified(child.id), server)
    assert await ask(rig, sandbox, lazy) == second
    await sandbox.destroy()

    # altered on its way, or resting on what is another file there: refused, and nothing of it visible
    other = Machine(tmp_path / "other")
    other.trust.add(public_text(here.key))
    altered = sorted(p for p in (tmp_path / "bucket").rglob("*") if p.is_file() and p.stat().st_size)
    assert len(altered) > 8
    for path in altered:
        # Not read by a pull.
        if "by-key" in path.parts or path.name in ("working-set", "signer") or path.suffix == ".frames":
            continue
        other.store.gc(set(), min_age_s=0)  # what came whole is not fetched again
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 4]) + whole[len(whole) // 2 + 1 :])
        with pytest.raises((IntegrityError, StoreError)):
            other.transport(key).pull(child.id, tier)
        path.write_bytes(whole)
        assert other.catalogue.manifests() == [] and list(other.catalogue.root.iterdir()) == []
    digests, odd = transport.with_digests, f"/etc/passwd|1|1|{'0' * 64}"
    monkeypatch.setattr(transport, "with_digests", lambda m: replace(digests(m), external=(*digests(m).external, odd)))
    here.transport(key).push(child.id, tier)
    with pytest.raises(IncompatibleSnapshot, match="/etc/passwd"):
        other.transport(key).pull(child.id, tier)
    assert other.catalogue.manifests() == []
    with pytest.raises(IntegrityError, match=r"^the file is not an exported snapshot"):
        other.transport().import_(Path("/etc/hostname"))
