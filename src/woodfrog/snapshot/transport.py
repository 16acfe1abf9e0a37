"""Snapshots between machines: to and from a tier (a bucket, a shared directory), and as one file.

In a tier:

    packs[-<key>]/<2>/<id>.names, .pages | .delta     a pack of the page store, cold form each; encrypted with that key
    packs[-<key>]/<2>/<id>.frames             where the frames of its .pages lie; a hint, as it is not trusted
    chunks[-<key>]/<2>/<name>                 a part of a large file of some layer, see store/chunks.py
    snapshots/<id>/images, fs, shm            CRIU's images and the file layers, cold form of trees
    snapshots/<id>/packs.json                 where its packs are and in which form; a hint, not trusted
    snapshots/<id>/origin                     what it was made of, to tell what changed since; advice, not trusted
    snapshots/<id>/signer                     the public key of .sig, as a hint to people
    snapshots/<id>/manifest.json, .sig        last: what is not named by it is not there
    by-key/<function key>/<worker class>/<id> last of all: found by those who look for it
    tombstones/<id>                           it was removed, and is not to come back, see snapshot/tombstones.py
    leases/<kind>/<random>                    who sends and who collects now, see store/leases.py

Nothing that arrives is trusted: the manifest's signature must be of this machine's key or of one it was told to trust,
each file must have the manifest's digest, each page its name. Then this machine signs it with its own key. Before that
is known of something, it gets no more memory or disk than what was signed can need.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tarfile
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from woodfrog.errors import IncompatibleSnapshot, IntegrityError, NotFoundError, StoreError
from woodfrog.faults import fault
from woodfrog.snapshot.arrival import Arrival
from woodfrog.snapshot.catalogue import WORKING_SET, Catalogue, Staging
from woodfrog.snapshot.incoming import Incoming, Origin
from woodfrog.snapshot.listing import MANIFEST_MAX, SIGNATURE_MAX, SIGNER, Lister
from woodfrog.snapshot.manifest import Manifest, SigningKey, decode, encode, external_file
from woodfrog.snapshot.origin import MOST_BYTES, ORIGIN
from woodfrog.snapshot.sweep import Swept, sweep
from woodfrog.snapshot.tombstones import Tombstone, bury, dig_up, read
from woodfrog.snapshot.trust import TrustedKey, TrustStore, fingerprint, public_text, verify_any
from woodfrog.store.bundle import large_files, pack_tree, unpack_tree
from woodfrog.store.chunks import LARGE, Chunks, Large
from woodfrog.store.cold import (
    HEADER,
    Key,
    content_size,
    decode_bytes,
    decode_file,
    encode_bytes,
    encode_file,
    frame_table,
    is_cold,
)
from woodfrog.store.files import Member, remove_tree, sha256_file, store_error
from woodfrog.store.leases import sending
from woodfrog.store.packs import NAME, PAGE, pack_id, read_delta
from woodfrog.store.pages import PageStore
from woodfrog.store.tiers import DirectoryTier, Tier

__all__ = ["Transport", "with_digests"]

log = logging.getLogger("woodfrog")

Progress = Callable[[str, int, int], None]
"""Told what is counted, how many are done, of how many."""

_ID = re.compile(r"[sz]-[0-9a-f]{12}\Z")
_PACK = re.compile(r"[0-9a-f]{64}\Z")
_PLACE = re.compile(r"packs(-[0-9a-f]{16})?\Z")
_EXPORT = re.compile(
    r"(packs(-[0-9a-f]{16})?/[0-9a-f]{2}/[0-9a-f]{64}\.(names|pages|delta|frames)"
    r"|chunks(-[0-9a-f]{16})?/[0-9a-f]{2}/[0-9a-f]{64}|(snapshots|by-key)/[A-Za-z0-9_./-]+)\Z"
)
_TREES = ("images", "fs", "shm")
_PARALLEL = 4
_HINT_MAX = 4 << 20
_WORKING_SET_MAX = 64 << 20
_NAMES_MAX = 4 << 20
"""Of one pack: twice what the largest one has."""
_PAGES_MAX = _NAMES_MAX // NAME
_BESIDE_PAGE = 64
"""Of a delta: what a page takes beside itself when it does not compress."""
_ENTRY = 64 << 10
"""More than a file of a tree takes beside its content: name, times, attributes, holes."""


def with_digests(manifest: Manifest) -> Manifest:
    """The manifest with the digests of the files outside it: another machine has them with other times.

    Raises:
        IncompatibleSnapshot: one of them is not what it was at the capture.
    """

    def one(entry: str) -> str:
        path, size, mtime, _ = external_file(entry)
        try:
            info = os.stat(path)
            if info.st_size != size or info.st_mtime_ns != mtime:
                raise IncompatibleSnapshot(f"{path} was changed since the snapshot was made", path=path)
            return f"{path}|{size}|{mtime}|{sha256_file(Path(path))}"
        except OSError as e:
            raise IncompatibleSnapshot(f"{path}: {e.strerror}", path=path) from None

    with ThreadPoolExecutor(_PARALLEL) as pool:
        return replace(manifest, external=tuple(pool.map(one, manifest.external)))


def _as_here(manifest: Manifest) -> Manifest:
    """The manifest with the times that the files outside it have on this machine.

    Raises:
        IncompatibleSnapshot: one of them is not here, or is another.
    """

    def one(entry: str) -> str:
        path, size, _, digest = external_file(entry)
        try:
            info = os.stat(path)
            if info.st_size != size or sha256_file(Path(path)) != digest:
                raise IncompatibleSnapshot(f"{path} is another file here than where the snapshot was made", path=path)
        except OSError as e:
            raise IncompatibleSnapshot(
                f"{path}, which the snapshot rests on, cannot be read here: {e.strerror}", path=path
            ) from None
        return f"{path}|{size}|{info.st_mtime_ns}"

    with ThreadPoolExecutor(_PARALLEL) as pool:
        return replace(manifest, external=tuple(pool.map(one, manifest.external)))


class Transport:
    """Moves snapshots of one catalogue. Everything here takes its time: call it in a thread.

    Args:
        key: what the cold form is encrypted with; None = it is not.
        scratch: a directory on the store's disk for what is on its way.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        store: PageStore,
        signing: SigningKey,
        trust: TrustStore,
        scratch: Path,
        key: Key | None,
    ) -> None:
        self._catalogue = catalogue
        self._store = store
        self.signing = signing
        self.trust = trust
        self._scratch = scratch
        self._key = key
        self._place = f"packs-{key.id[:16]}" if key else "packs"
        self.stop = threading.Event()
        """Set when the daemon goes: what is under way is given up at the next object."""
        self.incoming = Incoming(store, key, self._get, self._go_on, _NAMES_MAX)

    def _go_on(self) -> None:
        if self.stop.is_set():
            raise StoreError("the daemon is stopping; the transfer is begun anew when it is back", code="stopping")

    def push(self, snapshot_id: str, tier: Tier, progress: Progress | None = None, *, anyway: bool = False) -> None:
        """Copy a snapshot to a tier: packs, files, then the manifest. What is there already is not sent again.

        Args:
            anyway: also when it was removed from there for all machines: that is taken back.

        Raises:
            StoreError: it could not be, or it was removed from there (`tier-removed`).
            IntegrityError: it could not be.
            IncompatibleSnapshot: files it rests on were changed: nobody could thaw it.
        """
        if not anyway and (found := self.tombstone(snapshot_id, tier)) is not None:
            raise _not_wanted(found, tier)
        opened = self._catalogue.open_verified(snapshot_id)
        manifest = with_digests(opened.manifest)
        packs = sorted(self._store.needs(manifest.packs))
        tell = progress or (lambda *_: None)
        owner = _owner("push", snapshot_id)
        self._store.lease(packs, owner)
        try:
            with sending(tier, self._go_on) as lease, self._room() as room, ThreadPoolExecutor(_PARALLEL) as pool:
                done = 0

                def send(pack: str) -> tuple[str, str, int]:
                    nonlocal done
                    self._go_on()
                    kind, pages = self._send_pack(pack, tier, room)
                    done += 1
                    tell("packs", done, len(packs))
                    return pack, kind, pages

                kinds = list(pool.map(send, packs))
                fault("push.packs")
                prefix = f"snapshots/{snapshot_id}"
                for part, folder in zip(_TREES, (manifest.images, "fs", "shm"), strict=True):
                    self._go_on()
                    # Images are different in each snapshot, and small once memory is packed.
                    large = None if part == "images" else Chunks(tier, self._key).send
                    pack_tree(opened.path / folder, room / part, key=self._key, send=large)
                    fault("push.tree")
                    tier.put(f"{prefix}/{part}", room / part)
                tier.put(f"{prefix}/packs.json", json.dumps({"place": self._place, "packs": kinds}).encode())
                fault("push.files")
                if working_set := _read_advice(opened.path / WORKING_SET):
                    tier.put(f"{prefix}/{WORKING_SET}", self._sealed(working_set))
                if made_of := _read_advice(opened.path / ORIGIN):
                    tier.put(f"{prefix}/{ORIGIN}", self._sealed(made_of))
                data = encode(manifest)
                lease.check()
                tier.put(f"{prefix}/{SIGNER}", public_text(self.signing).encode())
                tier.put(f"{prefix}/manifest.sig", self.signing.sign(data))
                tier.put(f"{prefix}/manifest.json", self._sealed(data))
                tier.put(f"by-key/{manifest.function_key}/{manifest.worker_class}/{snapshot_id}", b"")
                if anyway:
                    dig_up(tier, snapshot_id)  # last: until then it is not there
                elif (found := self.tombstone(snapshot_id, tier)) is not None:
                    # It was removed meanwhile: by somebody who did not find all that came after.
                    self._take_out(snapshot_id, tier)
                    raise _not_wanted(found, tier)
        except OSError as e:
            raise store_error("cannot push the snapshot", opened.path, e) from e
        finally:
            self._store.release(owner)

    def _send_pack(self, pack: str, tier: Tier, room: Path) -> tuple[str, int]:
        names, content, kind = self._store.files(pack)
        pages = names.stat().st_size // NAME
        prefix = f"{self._place}/{pack[:2]}/{pack}"
        if tier.has(f"{prefix}.names"):
            return kind, pages
        # One encoding for content and table. Names last: the pack is whole then.
        target = room / f"{pack}.cold"
        encode_file(content, target, key=self._key)
        tier.put(f"{prefix}.{kind}", target)
        if kind == "pages":
            tier.put(f"{prefix}.frames", frame_table(target))
        encode_file(names, target, key=self._key)
        tier.put(f"{prefix}.names", target)
        target.unlink()
        return kind, pages

    def find(self, tier: Tier, function_key: str, worker_class: str) -> list[str]:
        """What a tier says are snapshots for this function on this kind of host. Nobody has signed that.

        Raises:
            StoreError: the tier cannot be asked.
        """
        keys = tier.list(f"by-key/{function_key}/{worker_class}/")
        return [name for name in (key.rsplit("/", 1)[1] for key in keys) if _ID.match(name)]

    @staticmethod
    def has(tier: Tier, snapshot_id: str) -> bool:
        """Whether a snapshot is in a tier.

        Raises:
            StoreError: the tier cannot be asked.
        """
        return tier.has(f"snapshots/{snapshot_id}/manifest.json")

    def pull(
        self, snapshot_id: str, tier: Tier, progress: Progress | None = None, *, function_key: str = ""
    ) -> Manifest:
        """Bring a snapshot from a tier into this machine's catalogue.

        Args:
            function_key: what it must be a snapshot of; "" = of anything.

        Raises:
            NotFoundError: it is not there.
            IntegrityError: it is not signed by a trusted key, or is not what was signed.
            IncompatibleSnapshot: files it rests on are missing or others here.
            StoreError: the tier or the disk fails.
        """
        if self._catalogue.form(snapshot_id) is not None:
            return self._catalogue.get(snapshot_id)
        manifest, here = self._manifest(snapshot_id, tier, function_key)
        prefix = f"snapshots/{snapshot_id}"
        owner = _owner("pull", snapshot_id)
        try:
            with self._room() as room:
                self._fetch_packs(tier, prefix, manifest, room, owner, progress or (lambda *_: None))
                fault("pull.packs")
                staging = self._fetch_files(tier, manifest, room)
                try:
                    fault("pull.files")
                    self._catalogue.check(staging, here)
                    self._catalogue.share(staging, here)
                    return self._catalogue.admit(staging, here)
                except BaseException:
                    self._catalogue.abandon(staging)
                    raise
        except OSError as e:
            raise store_error("cannot pull the snapshot", self._scratch, e) from e
        finally:
            self._store.release(owner)

    def arrive(
        self,
        snapshot_id: str,
        tier: Tier,
        *,
        function_key: str = "",
        urgent: bool = True,
        on_begin: Callable[[Manifest], None] = lambda _: None,
    ) -> Arrival:
        """Begin to bring a snapshot from a tier: it can be thawed when this returns, while the rest is on its way.

        Args:
            function_key: what it must be a snapshot of; "" = of anything.
            urgent: somebody waits for it: what comes in the background gives way. Otherwise this does.
            on_begin: called when it is known what it is, before anything of its memory comes.

        Raises:
            NotFoundError, IntegrityError, IncompatibleSnapshot, StoreError: as `pull`.
        """
        with self.incoming.hurry() if urgent else nullcontext():
            return self._arrive(snapshot_id, tier, function_key, urgent, on_begin)

    def _arrive(
        self, snapshot_id: str, tier: Tier, function_key: str, urgent: bool, on_begin: Callable[[Manifest], None]
    ) -> Arrival:
        manifest, here = self._manifest(snapshot_id, tier, function_key)
        hint = self._read_hint(tier, f"snapshots/{snapshot_id}", manifest)
        owner = _owner("arrive", snapshot_id)
        on_begin(here)
        try:
            with self._room() as room:
                staging = self._fetch_files(tier, manifest, room)
            arrival = Arrival(self._catalogue, self._store, self.incoming, staging, here, owner)
        except OSError as e:
            self._store.release(owner)
            raise store_error("cannot pull the snapshot", self._scratch, e) from e
        except BaseException:
            self._store.release(owner)
            raise
        try:
            arrival.begin(
                {
                    pack: Origin(tier, f"{hint.place}/{pack[:2]}/{pack}", kind, hint.pages[pack])
                    for pack, kind in hint.kinds.items()
                },
                urgent=urgent,
            )
        except IntegrityError:
            arrival.give_up()
            raise
        except OSError as e:
            arrival.give_up(keep=True)
            raise store_error("cannot pull the snapshot", self._scratch, e) from e
        except BaseException:
            arrival.give_up(keep=True)  # whoever tries again goes on with what has come
            raise
        return arrival

    def tombstone(self, snapshot_id: str, tier: Tier) -> Tombstone | None:
        """Whether a snapshot was removed from a tier for all machines.

        Raises:
            StoreError: the tier cannot be asked.
        """
        return read(tier, snapshot_id, self._known)

    def _known(self) -> tuple[bytes, ...]:
        return (self.signing.public, *self.trust.public_keys())

    def withdraw(self, snapshot_id: str, tier: Tier) -> bool:
        """Take a snapshot out of a tier, for all machines: nobody finds it there any more, under its key or its id, and
        nobody brings it back. Whether it was there.

        Its tombstone comes first: whatever ends this after that, it is gone, and a collection does the rest. What
        points to it goes before its manifest, as it came after it. Its files stay for `sweep`: somebody may be about to
        send the same snapshot, and an upload takes what it finds for sent.

        Raises:
            NotFoundError: that is no snapshot's id.
            StoreError: the tier fails; it may still be there.
        """
        if not _ID.match(snapshot_id):
            raise NotFoundError(f"no snapshot {snapshot_id!r}: the tier wants a whole id", snapshot=snapshot_id)
        found = bool(self._visible(snapshot_id, tier))
        if not found and self._catalogue.form(snapshot_id) is None and snapshot_id not in self._catalogue.damaged:
            return False  # no tombstones for what nobody has ever seen
        bury(tier, snapshot_id, self.signing)
        self._take_out(snapshot_id, tier)
        return found

    def _take_out(self, snapshot_id: str, tier: Tier) -> None:
        for key in self._visible(snapshot_id, tier):
            self._go_on()
            tier.delete(key)

    @staticmethod
    def _visible(snapshot_id: str, tier: Tier) -> list[str]:
        """What makes a snapshot one of a tier's, by name and not as its manifest says: that may be damaged, of
        another's key, or gone in an attempt before."""
        keys = [key for key in tier.list("by-key") if key.endswith(f"/{snapshot_id}")]
        manifest = f"snapshots/{snapshot_id}/manifest.json"
        return [*keys, manifest] if tier.has(manifest) else keys

    def listing(self, tier: Tier, progress: Progress) -> list[dict[str, Any]]:
        """What is in a tier; see `snapshot.listing`.

        Raises:
            StoreError: the tier cannot be asked.
            IntegrityError: a file of a trusted key is damaged.
        """
        own = TrustedKey(fingerprint(self.signing.public), self.signing.public, "this machine")
        return Lister(
            tier,
            small=lambda key, most: self._small(tier, key, most),
            tombstone=lambda snapshot_id: self.tombstone(snapshot_id, tier),
            keys=(own, *self.trust.list()),
            here=self._catalogue.known,
            go_on=self._go_on,
        ).rows(progress)

    def sweep(self, tier: Tier, *, dry_run: bool = False, progress: Progress | None = None) -> Swept:
        """Remove from a tier what no snapshot there needs; see `snapshot.sweep`.

        Raises:
            StoreError: the tier fails or is busy, or something there cannot be read.
        """
        tell = progress or (lambda *_: None)
        with self._room() as room:
            return sweep(
                tier, lambda i: self._named_by(i, tier, room), dry_run=dry_run, progress=tell, go_on=self._go_on
            )

    def _named_by(self, snapshot_id: str, tier: Tier, room: Path) -> set[str]:
        """All packs and chunks that a snapshot in a tier needs."""
        manifest = self._signed(snapshot_id, tier)
        prefix = f"snapshots/{snapshot_id}"
        hint = self._read_hint(tier, prefix, manifest)
        if absent := sorted(set(manifest.packs) - hint.kinds.keys()):
            raise IntegrityError(f"{prefix}/packs.json does not name pack {absent[0]}", code="altered")
        found = {f"{hint.place}/{pack[:2]}/{pack}" for pack in hint.kinds}
        chunks = Chunks(tier, self._key if hint.place != "packs" else None)
        for folder in ("fs", "shm"):
            if any(f.size >= LARGE and f.path.startswith(f"{folder}/") for f in manifest.files):
                bundle = room / f"{snapshot_id}-{folder}"
                self._get(tier, f"{prefix}/{folder}", bundle, _tree_max(manifest, folder))
                for large in large_files(bundle, key=self._key):
                    found |= chunks.needed(large)
                bundle.unlink()
        return found

    def _manifest(self, snapshot_id: str, tier: Tier, function_key: str) -> tuple[Manifest, Manifest]:
        """A snapshot's manifest as it was signed, and as it is here."""
        with ThreadPoolExecutor(1) as pool:
            tombstone = pool.submit(self.tombstone, snapshot_id, tier) if _ID.match(snapshot_id) else None
            try:
                manifest = self._signed(snapshot_id, tier)
            finally:  # before it is said that there is none
                if tombstone is not None and (found := tombstone.result()) is not None:
                    raise NotFoundError(_removed(found, tier), code="tier-removed", snapshot=snapshot_id) from None
        if function_key and manifest.function_key != function_key:
            raise IntegrityError(f"snapshot {snapshot_id} in {tier.name} is of another function", code="other-function")
        return manifest, _as_here(manifest)

    def _signed(self, snapshot_id: str, tier: Tier) -> Manifest:
        """A snapshot's manifest, of a signature that is trusted."""
        if not _ID.match(snapshot_id):
            raise NotFoundError(f"{snapshot_id!r} is not a snapshot's id", snapshot=snapshot_id)
        prefix = f"snapshots/{snapshot_id}"
        try:
            data = self._small(tier, f"{prefix}/manifest.json", MANIFEST_MAX)
            signature = _small(tier, f"{prefix}/manifest.sig", SIGNATURE_MAX)
        except StoreError as e:
            if e.code == "tier-missing":
                raise NotFoundError(f"no snapshot {snapshot_id} in {tier.name}", snapshot=snapshot_id) from None
            raise
        verify_any(data, signature, self._known(), f"snapshot {snapshot_id} from {tier.name}")
        manifest = decode(data)
        if manifest.id != snapshot_id:
            raise IntegrityError(f"snapshot {snapshot_id}: its manifest is of {manifest.id}", code="bad-manifest")
        return manifest

    def _fetch_files(self, tier: Tier, manifest: Manifest, room: Path) -> Staging:
        """All of a snapshot but its packs, not checked yet. The staging directory is the caller's."""
        prefix = f"snapshots/{manifest.id}"
        folders = dict(zip(_TREES, (manifest.images, "fs", "shm"), strict=True))

        def get(part: str) -> None:
            self._get(tier, f"{prefix}/{part}", room / part, _tree_max(manifest, folders[part]))

        def get_advice(name: str, most: int) -> bytes:
            if not tier.has(f"{prefix}/{name}"):
                return b""
            return self._small(tier, f"{prefix}/{name}", most)

        with ThreadPoolExecutor(_PARALLEL + 1) as pool:
            working_set = pool.submit(get_advice, WORKING_SET, _WORKING_SET_MAX)
            made_of = pool.submit(get_advice, ORIGIN, MOST_BYTES)
            list(pool.map(get, folders))
        staging = self._catalogue.begin(manifest.id)
        try:
            remove_tree(staging.images)
            for part, folder in folders.items():
                bring = self._bring_large(tier, manifest, folder) if part != "images" else None
                unpack_tree(room / part, staging.path / folder, key=self._key, devices=True, bring=bring)
                fault("pull.tree")
            if found := working_set.result():
                (staging.path / WORKING_SET).write_bytes(found)
            with suppress(StoreError, IntegrityError):  # without it a later start says less
                if found := made_of.result():
                    (staging.path / ORIGIN).write_bytes(found)
        except BaseException:
            self._catalogue.abandon(staging)
            raise
        return staging

    def _bring_large(self, tier: Tier, manifest: Manifest, folder: str) -> Callable[[str, Large, int], None]:
        """Brings large files of a layer, each no larger than the manifest says."""
        known = {f.path: f for f in manifest.files}
        chunks = Chunks(tier, self._key)
        layers = self._catalogue.layers

        def bring(name: str, large: Large, fd: int) -> None:
            self._go_on()
            entry = known.get(f"{folder}/{name}")
            if entry is not None and layers is not None and layers.copy(entry.sha256, entry.size, fd):
                return
            if entry is None or entry.size != large.size:
                raise IntegrityError(
                    f"snapshot {manifest.id} in {tier.name}: {folder}/{name} is not as it was signed", code="altered"
                )
            chunks.bring(large, fd)

        return bring

    def _sealed(self, data: bytes) -> bytes:
        """Digests of small files, names and addresses tell something, too."""
        return encode_bytes(data, key=self._key) if self._key else data

    def _small(self, tier: Tier, key: str, most: int) -> bytes:
        data = _small(tier, key, most)
        if not is_cold(data):
            return data
        if content_size(data) > most:
            raise _too_large(tier, key)
        return decode_bytes(data, key=self._key, what=f"{tier.name}: {key}")

    def _get(self, tier: Tier, key: str, target: Path, most: int) -> None:
        """Bring a cold form, whose content has no more than `most` bytes."""
        self._go_on()
        size = tier.size(key)
        if size > most + (most >> 7) + (1 << 20):
            raise _too_large(tier, key)
        tier.get(key, target, size)  # it may have been exchanged since
        with open(target, "rb") as f:
            head = f.read(HEADER)
        if content_size(head) > most:
            raise _too_large(tier, key)

    def _read_hint(self, tier: Tier, prefix: str, manifest: Manifest) -> _Hint:
        hint = _hint(_small(tier, f"{prefix}/packs.json", _HINT_MAX), f"{prefix}/packs.json")
        if hint.place not in ("packs", self._place):
            raise IntegrityError(
                f"snapshot {manifest.id} in {tier.name} is encrypted with key {hint.place.removeprefix('packs-')}, "
                "which is not the one that is set",
                code="wrong-key",
            )
        return hint

    def _fetch_packs(
        self,
        tier: Tier,
        prefix: str,
        manifest: Manifest,
        room: Path,
        owner: str,
        tell: Progress,
    ) -> None:
        hint = self._read_hint(tier, prefix, manifest)
        place, kinds = hint.place, hint.kinds
        done = 0

        def bring(pack: str) -> tuple[bytes, Path] | None:
            """Names and content of a pack that is not here."""
            nonlocal done
            done += 1
            tell("packs", done, max(done, len(kinds)))
            self._store.lease([pack], owner)  # first: it might be collected while it is looked at
            if self._store.has(pack):
                return None
            if pack not in kinds:
                raise IntegrityError(f"{prefix}/packs.json does not name pack {pack}", code="altered")
            found = []
            most = _NAMES_MAX
            for suffix in ("names", kinds[pack]):
                cold, local = room / f"{pack}.{suffix}.cold", room / f"{pack}.{suffix}"
                self._get(tier, f"{place}/{pack[:2]}/{pack}.{suffix}", cold, most)
                decode_file(cold, local, key=self._key)
                cold.unlink()
                found.append(local)
                if suffix == "names":
                    names = local.read_bytes()
                    if pack_id(names) != pack:
                        raise IntegrityError(f"pack {pack} from {tier.name} has other names", code="altered")
                    most = len(names) // NAME * (PAGE + _BESIDE_PAGE) + _NAMES_MAX
            return names, found[1]

        def take_raw(pack: str) -> None:
            if (new := bring(pack)) is not None:
                self._store.adopt(new[0], pages=new[1], owner=owner)
                new[1].unlink()

        wanted = set(manifest.packs)
        deltas = sorted(pack for pack in wanted if kinds.get(pack) == "delta")
        with ThreadPoolExecutor(_PARALLEL) as pool:
            new = {pack: got for pack, got in zip(deltas, pool.map(bring, deltas), strict=True) if got is not None}
            bases = {base for _, path in new.values() for base in read_delta(path).bases} | self._store.needs(deltas)
            list(pool.map(take_raw, sorted((wanted | bases) - set(deltas))))
            list(pool.map(lambda p: self._store.adopt(new[p][0], delta=new[p][1], owner=owner), new))

    def _room(self) -> _Room:
        return _Room(self._scratch)

    def export(self, snapshot_id: str, target: Path, progress: Progress | None = None) -> int:
        """Write a snapshot as one file, which `import_` reads on this or another machine.

        Returns:
            Its size in bytes.

        Raises:
            StoreError, IntegrityError, IncompatibleSnapshot: as `push`.
        """
        with self._room() as room:
            self.push(snapshot_id, DirectoryTier(room / "tier"), progress)
            temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
            try:
                fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                with os.fdopen(fd, "wb") as file:
                    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
                        for path in sorted((room / "tier").rglob("*")):
                            if path.is_file():
                                tar.add(path, str(path.relative_to(room / "tier")), recursive=False)
                    file.flush()
                    os.fsync(file.fileno())
                os.rename(temporary, target)
            except OSError as e:
                raise store_error("cannot export the snapshot", target, e) from e
            finally:
                temporary.unlink(missing_ok=True)
        return target.stat().st_size

    def import_(self, source: Path, progress: Progress | None = None) -> Manifest:
        """Read a snapshot that `export` wrote.

        Raises:
            IntegrityError: not such a file, altered, or not signed by a trusted key.
            IncompatibleSnapshot, StoreError: as `pull`.
        """
        with self._room() as room:
            tier = DirectoryTier(room / "tier", "the file")
            try:
                with tarfile.open(source, "r:", tarinfo=Member) as tar:
                    ids = set(_take_members(tar, room / "tier"))
            except (tarfile.TarError, ValueError, OverflowError, EOFError) as e:
                why = str(e).partition("\n")[0]
                raise IntegrityError(f"the file is not an exported snapshot: {why}", code="bad-export") from None
            except OSError as e:
                raise store_error("cannot import the snapshot", source, e) from e
            if len(ids) != 1:
                raise IntegrityError("the file is not an exported snapshot", code="bad-export")
            self._catalogue.accept(snapshot_id := ids.pop())
            return self.pull(snapshot_id, tier, progress)


def _read_advice(path: Path) -> bytes:
    """A file that a snapshot can do without; empty where it cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as e:
        log.warning("%s is not sent: %s", path, e.strerror)
        return b""


def _take_members(tar: tarfile.TarFile, target: Path) -> Iterable[str]:
    """Unpack regular files with the names of a tier's objects, nothing else."""
    at = -1
    for member in tar:
        name = member.name
        # A sparse file may be of any size; a size below zero leads back to where the reader was.
        odd = member.issparse() or member.size < 0 or member.offset <= at
        at = member.offset
        if odd or not member.isreg() or not _EXPORT.match(name) or ".." in name.split("/"):
            raise IntegrityError(f"an exported snapshot holds no {name[:80]!r}", code="bad-export")
        content = tar.extractfile(member)
        assert content is not None
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with content, open(path, "xb") as f:
            while data := content.read(1 << 20):
                f.write(data)
        if name.startswith("snapshots/"):
            yield name.split("/")[1]


def _removed(found: Tombstone, tier: Tier) -> str:
    by = f" by the machine with key {found.signer}" if found.signer else ""
    return f"snapshot {found.snapshot} was removed from {tier.name} for all machines{by}"


def _not_wanted(found: Tombstone, tier: Tier) -> StoreError:
    return StoreError(
        f"{_removed(found, tier)}; `woodfrog snapshot push {found.snapshot} --anyway` takes that back",
        code="tier-removed",
        tier=tier.name,
        snapshot=found.snapshot,
    )


def _owner(what: str, snapshot_id: str) -> str:
    """Of leases: the same snapshot may be on its way twice."""
    return f"{what}-{snapshot_id}-{uuid.uuid4().hex[:8]}"


def _small(tier: Tier, key: str, most: int) -> bytes:
    data = tier.get_bytes(key, 0, most + 1)
    if len(data) > most:
        raise _too_large(tier, key)
    return data


def _too_large(tier: Tier, key: str) -> IntegrityError:
    return IntegrityError(f"{tier.name}: {key} is larger than what was signed can be", code="altered")


def _tree_max(manifest: Manifest, folder: str) -> int:
    """Bytes that a tree's archive takes at most."""
    inside = f"{folder}/"
    files = [f for f in manifest.files if f.path.startswith(inside)]
    others = [text for name, text in manifest.links.items() if name.startswith(inside)]
    return sum(f.size for f in files) + sum(map(len, others)) + _ENTRY * (len(files) + len(others) + 2)


@dataclass(frozen=True)
class _Hint:
    """Where the packs are, the form of each, and its pages (0 = not told)."""

    place: str
    kinds: dict[str, str]
    pages: dict[str, int]


def _hint(data: bytes, what: str) -> _Hint:
    try:
        raw = json.loads(data)
        rows = [(str(p), str(k), int(rest[0]) if rest else 0) for p, k, *rest in raw["packs"]]
        place = str(raw["place"])
    except (ValueError, TypeError, KeyError, RecursionError) as e:
        raise IntegrityError(f"{what} is damaged: {e}", code="altered") from None
    odd = [p for p, k, n in rows if not _PACK.match(p) or k not in ("pages", "delta") or not 0 <= n <= _PAGES_MAX]
    if odd or not _PLACE.match(place):
        raise IntegrityError(f"{what} names {(odd or [place])[0][:80]!r}", code="altered")
    return _Hint(place, {p: k for p, k, _ in rows}, {p: n for p, _, n in rows})


class _Room:
    """A private directory for what is on its way."""

    def __init__(self, parent: Path) -> None:
        self._parent = parent
        self._path: Path | None = None

    def __enter__(self) -> Path:
        self._parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._path = Path(tempfile.mkdtemp(prefix=".moving-", dir=self._parent))
        return self._path

    def __exit__(self, *_: object) -> None:
        assert self._path is not None
        remove_tree(self._path)
