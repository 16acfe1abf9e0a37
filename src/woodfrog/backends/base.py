"""What a backend is: it starts, calls and stops instances, and tells an observer what became of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from woodfrog.backends.payload import Payload
from woodfrog.errors import WoodfrogError
from woodfrog.linux.meminfo import Room
from woodfrog.linux.rootplan import VolumeMount
from woodfrog.spec import FunctionSpec, RuntimeSpec
from woodfrog.telemetry import Phase

__all__ = ["Answer", "Backend", "CallRequest", "Observer", "Progress", "SnapshotKeeper", "StartRequest"]

Progress: TypeAlias = Callable[[str, int, int], None]
"""Told of what is being done ("packs", …), how much of it is done, and of how much (0 = not known). Called from
any thread."""


@dataclass(frozen=True)
class StartRequest:
    """One instance to start. `mode` "restore" thaws `snapshot_id`; "cold" boots, and freezes when `capture` is set.

    `parked`: it is thawed and left stopped, without having run, until `Backend.wake`.
    """

    instance_id: str
    app: str
    family: str
    """The app's name without what makes an ephemeral app's unique: its runs share their snapshots."""
    spec: FunctionSpec
    runtime: RuntimeSpec
    function_key: str
    mode: Literal["cold", "restore"]
    snapshot_id: str | None
    capture: bool
    env: dict[str, str]
    """The user's environment: image, function, secrets."""
    volumes: tuple[VolumeMount, ...] = ()
    """Host directories and where the function sees them."""
    params: bytes = b""
    params_digest: str = ""
    parked: bool = False
    gpus: tuple[str, ...] = ()
    """Uuids of the GPUs it gets, in the order it sees them."""


@dataclass(frozen=True)
class CallRequest:
    call_id: str
    method: str
    encoding: str
    payload: Payload
    on_item: Callable[[Payload], Awaitable[None]] | None = None
    """Takes a generator's items as they come; while it waits, the worker does."""


@dataclass(frozen=True)
class Answer:
    """How a call ended. "lost": the instance died under it; the observer is told separately."""

    outcome: Literal["success", "exception", "lost"]
    payload: Payload = field(default_factory=lambda: Payload(data=b""))
    error: dict[str, Any] | None = None
    ms: float = 0.0


class Observer(Protocol):
    """Told of everything that happens to instances. Called on the event loop, never concurrently."""

    def on_stage(self, instance_id: str, stage: str) -> None: ...
    def on_ready(self, instance_id: str, *, phases: Sequence[Phase] = (), zygote: bool = False) -> None:
        """It serves. `phases` of its start; `zygote`: it was booted in a thawed copy of its libraries."""

    def on_parked(self, instance_id: str) -> None: ...
    def on_found(self, instance_id: str, snapshot_id: str) -> None:
        """It was to boot, and was thawed instead: from what another machine, or another instance just now, captured."""

    def on_cold(self, instance_id: str, why: str) -> None:
        """Why a function that has had a snapshot gets another: in words, while it starts or soon after."""

    def on_captured(self, request: StartRequest, snapshot_id: str) -> None:
        """Committed, or found where one was to be captured; the instance serves already, and may be gone by now."""

    def on_capture_failed(self, request: StartRequest, error: WoodfrogError, *, alive: bool) -> None:
        """`alive`: the instance goes on without; or it served already, and may be gone by now."""

    def on_restore_failed(
        self, instance_id: str, snapshot_id: str, error: WoodfrogError, *, at_fault: bool, gpu: bool = False
    ) -> None:
        """`gpu`: the GPUs that it was given do not fit the snapshot; others may."""

    def on_start_failed(self, instance_id: str, error: WoodfrogError, *, user_fault: bool) -> None: ...
    def on_refused(self, instance_id: str, error: WoodfrogError) -> None:
        """Nothing was started: its GPUs are among those of `on_gpus`."""

    def on_gpus(self, sick: dict[str, str]) -> None:
        """The GPUs that are set aside from now on, all of them, and why."""

    def on_exited(self, instance_id: str, error: WoodfrogError) -> None: ...
    def on_lost(self, instance_id: str, reason: str) -> None:
        """Through no fault of its own the instance cannot go on: stop it and run its call elsewhere."""

    def on_stopped(self, instance_id: str) -> None: ...
    def on_log(self, instance_id: str, stream: str, data: bytes) -> None: ...


class SnapshotKeeper(Protocol):
    """What people may ask for beside calls. Ids are whole, and known to the catalogue but for `pull` and `withdraw`.

    Every method raises a `WoodfrogError` of one line when it cannot: StoreError (disk, tier), IntegrityError (altered,
    not signed by a trusted key), IncompatibleSnapshot (cannot be thawed elsewhere, or here), NotFoundError. Results are
    plain: they become JSON. Sizes are in bytes, times Unix seconds.
    """

    def using(self, snapshot_id: str) -> AbstractAsyncContextManager[Any]:
        """While its images are read: they stay where they are."""

    async def verify(self, snapshot_id: str | None, progress: Progress) -> dict[str, Any]:
        """Read every byte again. None: every snapshot, and the whole page store.

        Returns:
            `snapshots`: [{`id`, `bytes`, `problems`: [text]}]; `store`: [{`pack`, `what`}], problems that belong to no
            snapshot. What is wrong is told, not raised.
        """

    async def gc(self, *, dry_run: bool, rebuilt: bool, progress: Progress) -> dict[str, Any]:
        """Remove what no snapshot and no instance needs; with `rebuilt` also what is only there for faster thaws.

        Returns:
            `packs`: how many; `freed_bytes`, of them `rebuilt_bytes`. With `dry_run`: what would be.
        """

    async def gc_tier(self, *, dry_run: bool, progress: Progress) -> dict[str, Any]:
        """Remove from the tier what no snapshot there needs and nobody can be about to name.

        Returns:
            `tier`; `packs`, `chunks`, `snapshots` (without a manifest), `tombstones`: how many; `objects` of all of
            them, and `freed_bytes`. With `dry_run`: what would be.
        """

    async def pin(self, snapshot_id: str) -> dict[str, Any]:
        """Keep it until a person removes it: `{"id", "pinned": true}`. Again is no error, likewise `unpin`."""

    async def unpin(self, snapshot_id: str) -> dict[str, Any]: ...

    async def export(self, snapshot_id: str, target: Path, progress: Progress) -> dict[str, Any]:
        """Write one file that `import_` reads on this or another machine: `{"id", "bytes"}`."""

    async def import_(self, source: Path, progress: Progress) -> dict[str, Any]:
        """Take up such a file: `{"id", "app", "function", "new"}`; `new` false when the snapshot was here."""

    async def push(self, snapshot_id: str, progress: Progress, *, anyway: bool = False) -> dict[str, Any]:
        """Copy it to the tier: `{"id", "tier"}`. `anyway`: also when it was removed there for all machines."""

    async def pull(self, snapshot_id: str, progress: Progress) -> dict[str, Any]:
        """Bring it from the tier: `{"id", "app", "function", "new", "tier"}`."""

    async def tier(self) -> dict[str, Any]:
        """The tier that is configured: `{"tier"}`; StoreError (`no-tier`) where there is none."""

    async def list_tier(self, progress: Progress) -> dict[str, Any]:
        """What is in the tier.

        Returns:
            `tier`; `snapshots`: [{`id`, `state` ("ready", "untrusted": no trusted key has signed it, "unreadable",
            "incomplete": no manifest, "removed": a tombstone), `why`, `here`, `signer` (fingerprint), `signer_comment`,
            `trusted`, `removed` (when), and what its manifest says: `app`, `function`, `kind`, `created`,
            `memory_bytes`, `files_bytes`, `stored_bytes`, `function_key`, `worker_class`}]; None where it is not known.
        """

    async def withdraw(self, snapshot_id: str) -> dict[str, Any]:
        """Take it out of the tier, for all machines: `{"id", "tier", "found"}`. What is here of it stays."""

    async def trust_add(self, text: str, comment: str) -> dict[str, Any]:
        """Trust another machine's key from now on: `{"fingerprint", "comment"}`."""

    async def trust_list(self) -> dict[str, Any]:
        """`own`: {`fingerprint`, `text`}, what other machines add; `trusted`: [{`fingerprint`, `comment`}]."""

    async def trust_remove(self, fingerprint: str) -> dict[str, Any]:
        """Trust it no longer; what was taken up stays: `{"fingerprint", "comment"}`."""

    async def store_stats(self) -> dict[str, Any]:
        """`packs`, `pages`, `raw_bytes` (of all pages in the store), `stored_bytes` (what they take), `cache_bytes`
        (rebuilt, for faster thaws), `large_files`, `large_files_bytes` (of file layers, once each),
        `large_files_shared_bytes` (what they would take beside that, were they not shared), `budget_bytes` (0 = none),
        `tier` (name or ""), and `snapshots`: [{`id`, `kind`, `app`, `function`, `parent`, `form`, `raw_bytes`,
        `stored_bytes` (what it added), `fs_bytes`, `pinned`, `pushed`}].
        """


class Backend(Protocol):
    @property
    def keeper(self) -> SnapshotKeeper: ...

    def start(self, request: StartRequest) -> None:
        """Begin a start; the observer hears how it goes."""

    def wake(self, instance_id: str, env: dict[str, str]) -> None:
        """Let a parked instance run, with this user's environment; the observer hears the rest as of a start."""

    async def call(self, instance_id: str, request: CallRequest) -> Answer: ...

    def close_call(self, instance_id: str, call_id: str) -> None:
        """Have a generator closed where it stands, or at its next item; its `call` then ends. Of a call that is over:
        nothing."""

    def fill(self, instance_id: str) -> None:
        """Let the rest of a thawed instance's memory come, in the background."""

    def room(self, *, quick: bool = False) -> Room:
        """What memory instances can have, now: the machine's, or what a limit on all of them leaves.

        Args:
            quick: somebody waits: a limit that was not there the last time is not looked for.

        Raises:
            OSError, ValueError: the kernel does not say.
        """

    async def memory_used(self) -> dict[str, int]:
        """What each instance takes for itself, in bytes, without the page cache of files."""

    def stop(self, instance_id: str, *, graceful: bool, reason: str) -> None:
        """Begin a stop; `on_stopped` follows. Graceful runs the exit hooks."""

    def find_snapshot(self, function_key: str, *, chip: str = "") -> str | None:
        """The snapshot that a start on this machine could thaw; `chip`: one that holds the memory of such a GPU."""

    def gpus(self) -> list[dict[str, Any]]:
        """Each GPU of this machine: `gpu` (uuid), `chip`, `memory_bytes`, `used_bytes` (None = not looked at yet),
        `state` ("free", "used", "set-aside"), `why`, `xids`, `container`."""

    async def check_gpus(self) -> None:
        """Look at all of them now, and forget what was seen of them before."""

    def snapshots_in_use(self) -> set[str]:
        """Snapshots whose files some instance rests on."""

    def describe(self, instance_id: str) -> dict[str, Any] | None: ...

    async def execute(self, instance_id: str, argv: list[str], timeout: float) -> dict[str, Any]: ...

    async def close(self) -> None:
        """Kill everything and wait until it is gone."""
