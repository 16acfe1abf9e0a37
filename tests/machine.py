"""One machine's snapshots without a daemon, for tests and the processes that they kill."""

from __future__ import annotations

import random
from pathlib import Path

from woodfrog.backends.keeper import Keeper
from woodfrog.criu.pagemap import INDEX, PageIndex, PageTask, read_index, write_index
from woodfrog.snapshot.catalogue import Catalogue
from woodfrog.snapshot.manifest import FORMAT, Manifest, SigningKey
from woodfrog.snapshot.transport import Transport
from woodfrog.snapshot.trust import TrustStore
from woodfrog.store.cold import Key
from woodfrog.store.pages import PageStore
from woodfrog.store.tiers import Tier

PAGE = 4096
BASE = 0x7F0000000000
PAGES = 60
A, B, C = "s-00000000000a", "s-00000000000b", "s-00000000000c"


class Machine:
    """One machine's snapshots."""

    def __init__(self, home: Path, key: Key | None = None) -> None:
        home.mkdir(exist_ok=True)
        self.signing = SigningKey.load_or_create(home / "key")
        self.store = PageStore(home / "store")
        self.catalogue = Catalogue(home / "snapshots", self.signing, self.store)
        self.trust = TrustStore(home / "trusted")
        self.transport = Transport(self.catalogue, self.store, self.signing, self.trust, home / "store" / "moving", key)

    def keeper(self, tier: Tier | None = None, **more: object) -> Keeper:
        """One that fetches snapshots whole; test_arrival.py is about the other."""
        more.setdefault("read_through", False)
        keeper = Keeper(self.catalogue, self.store, self.transport, tier=tier, worker_class="class", **more)  # type: ignore[arg-type]
        self.catalogue.on_removed = keeper.collect_later
        return keeper

    def make(
        self, snapshot_id: str, *, seed: int = 0, function: str = "key", host: str = "class", created: float = 1.0
    ) -> None:
        staging = self.catalogue.begin(snapshot_id)
        memory = random.Random(seed or snapshot_id).randbytes(PAGES * PAGE)
        (staging.images / "pages-1.img").write_bytes(memory)
        index = PageIndex((PageTask(100, ((BASE, PAGES - 5, 5 * PAGE, 0),)),), ("pages-1.img",))
        (staging.images / INDEX).write_bytes(write_index(index))
        (staging.images / "core-100.img").write_bytes(b"registers")
        (staging.fs / "file").write_bytes(b"in the layer")
        self.catalogue.commit(
            staging,
            Manifest(FORMAT, snapshot_id, function, host, {}, "demo", "f", "", created, 1, 1, PAGES * PAGE, 0, ()),
        )

    def whole(self, snapshot_id: str) -> bool:
        """Whether a restore gets all of its memory."""
        opened = self.catalogue.open_verified(snapshot_id)
        index = read_index((opened.images / INDEX).read_bytes())
        files = opened.files or tuple(opened.images / name for name in index.files)
        parts = [files[e[3]].read_bytes()[e[2] : e[2] + e[1] * PAGE] for e in index.tasks[0].extents]
        return b"".join(parts) == random.Random(snapshot_id).randbytes(PAGES * PAGE)[5 * PAGE :]
