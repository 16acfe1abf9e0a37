"""The loop around the pure machine: events in, actions carried out, everything recorded."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from woodfrog.backends.base import Answer, Backend, CallRequest, StartRequest
from woodfrog.backends.payload import Payload, discard, spooled
from woodfrog.control import events as ev
from woodfrog.control.gpus import Gpu, chip_of, chips_for
from woodfrog.control.machine import InvalidTransition, handle
from woodfrog.control.replay import journal_header, journal_line
from woodfrog.control.state import Config, State
from woodfrog.daemon.calllog import CallLog
from woodfrog.daemon.installed import installed_since
from woodfrog.daemon.journal import INLINE_BYTES, CallRow, DeployRow, Journal
from woodfrog.daemon.logs import LogBook
from woodfrog.daemon.memory import MemoryWatch
from woodfrog.daemon.metrics import EPHEMERAL, OTHER, Metrics
from woodfrog.daemon.resources import Resources
from woodfrog.daemon.starts import Start, Starts, why_words
from woodfrog.errors import (
    CallCancelled,
    HostError,
    NotFoundError,
    OutputExpired,
    SandboxError,
    SpecError,
    StartupError,
    StoreError,
    WoodfrogError,
    error_from_dict,
)
from woodfrog.linux import heap
from woodfrog.settings import Settings
from woodfrog.snapshot.catalogue import Catalogue
from woodfrog.snapshot.manifest import Manifest
from woodfrog.spec import AppSpec, FunctionSpec, ImageSpec, from_dict, function_key, to_dict
from woodfrog.store.files import remove_tree
from woodfrog.telemetry import Phase, counters

__all__ = ["CallRecord", "Controller"]

log = logging.getLogger("woodfrog")

_JOURNAL_LIMIT = 64 << 20
_EPHEMERAL_TTL_S = 300.0
_CLIENT_LOST_S = _EPHEMERAL_TTL_S + 60.0
"""How long the client of a run may be silent while a call is under way. Its last word may be a minute old when it is
suspended: one that is back within 5 minutes has lost nothing."""
_SPARED_S = 3600.0
"""Results that nobody has fetched are kept for so long, however many they are."""
_FETCHED_S = 120.0
"""And fetched ones for so long: a client that lost its connection may ask again."""
_FETCHED_AT_ONCE = 500
_REMOVED_AT_ONCE = 200
_LITTLE_ROOM = 256 << 20
"""With less on the disk, fetched results go."""
_LEAST_THAWS = 4
"""So many snapshots may be restored at the same time, also on one processor: a part of it is waiting."""
_LEAST_ABREAST = 2
"""And so many of one function be booted."""
_RUNS_AT_ONCE = 20
_MANY = 100
"""So many calls may have left much memory."""
_CONTENT_EVERY_S = 600.0
_CONTENT_KEPT_S = 3600.0
"""How long code stays that no app needs: a client that found it here deploys it soon, and edits are taken back."""
_UNUSED_EVERY_S = 3600.0
_ITEM_LIMIT = 64 << 20
"""Bytes of unread generator items; beyond it the generator waits for its reader."""
_ITEM_OWN = 256
"""What an item takes beside its bytes: there may be millions of empty ones."""
_ERROR = 300
"""Characters of an app's last error that are kept."""
_ANSWER_S = 60.0
"""How long an answer stays in memory that may have been lost on its way."""
_ANSWERS_LIMIT = 64 << 20
"""Bytes of such answers; beyond it the oldest are read from the journal again."""
_UNREAD_S = 300.0
"""How long the items of a generator that is over wait for somebody to ask for the first."""
_READER_S = 3600.0
"""How long a reader may take over one page of items."""


@dataclass(eq=False)
class CallRecord:
    """A call in memory: who waits for it and what has come of it."""

    row: CallRow
    payload: Payload
    done: asyncio.Event = field(default_factory=asyncio.Event)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    items: deque[tuple[bytes, Payload]] = field(default_factory=deque)
    """A generator's, without those that the client has."""
    taken: int = 0
    """Items the client has: the number of the first that is kept."""
    sent: int = 0
    """Items that were given out so far."""
    taken_up: bool = False
    """Of an earlier daemon's, unfinished there: whoever has more items than were `sent` has them of its run there."""
    unread: int = 0
    """Bytes of items that the client has not said it has."""
    read: asyncio.Event = field(default_factory=asyncio.Event)
    answer: Answer | None = None
    ended: bool = False
    """The machine is done with it; it has an outcome as soon as its answer is durable."""
    outcome: str | None = None
    error: dict[str, Any] | None = None
    result: Payload = field(default_factory=lambda: Payload(data=b""))
    phases: list[Phase] = field(default_factory=list)
    submitted: float = field(default_factory=time.monotonic)
    finished: float = 0.0
    asked: float | None = None
    """When somebody asked for items last."""
    closed: float | None = None
    """When somebody was told last that there are no more items."""
    instance_id: str | None = None
    ran: int | None = None
    """The version of the container that took it last: while a newer one starts, the old one's serve its calls."""
    mode: str = ""
    attempts: int = 0
    """So many there are at most; 0 = none has failed so far."""
    unwritten: bool = False
    """It is over, and the journal could not be told: the next daemon would run it again."""
    from_journal: bool = False
    """A finished call read back: a generator's items are not kept there."""

    @property
    def count(self) -> int:
        """Items there were so far."""
        return self.taken + len(self.items)

    def acknowledge(self, count: int) -> None:
        """The client has the first `count` items: they need not be kept."""
        while self.items and self.taken < count:
            _, payload = self.items.popleft()
            self.unread -= payload.size + _ITEM_OWN
            _drop(payload)
            self.taken += 1
        self.read.set()

    def wanted(self, now: float) -> bool:
        """Whether somebody may still come for what is in memory; the answer itself is in the journal."""
        if not self.done.is_set():
            return True
        if not self.count:
            return now - self.submitted <= _ANSWER_S
        if self.closed is not None:
            return now - self.closed <= _ANSWER_S
        if self.outcome == "cancelled":
            return now - self.finished <= _ANSWER_S
        if self.asked is None:
            return now - self.finished <= _UNREAD_S
        return now - max(self.asked, self.finished) <= _READER_S

    def drop_items(self) -> None:
        for _, payload in self.items:
            _drop(payload)
        self.items.clear()
        self.unread = 0

    def trace(self) -> list[dict[str, Any]]:
        return [{"name": p.name, "start_ms": p.start_ms, "ms": p.ms, "parent": p.parent} for p in self.phases]


@dataclass
class InstanceInfo:
    """What the daemon remembers of an instance beyond what the backend does."""

    request: StartRequest
    begun: float
    version: int
    call_id: str | None = None
    served: int = 0
    ready: bool = False
    mode: str = ""
    """How it starts: what was asked, or "restore" where a snapshot was found."""

    stopping: str = ""
    """Why it is being stopped."""
    start: Start | None = None
    """Until it is over; None of a copy that is parked or to be parked."""

    def __post_init__(self) -> None:
        self.mode = self.mode or self.request.mode


class Controller:
    """Feeds the machine and does what it says. Implements `backends.base.Observer`. One event loop, no locks."""

    def __init__(
        self,
        settings: Settings,
        *,
        journal: Journal,
        logs: LogBook,
        resources: Resources,
        catalogue: Catalogue,
        run_id: str,
        gpus: tuple[Gpu, ...] = (),
        no_gpu: str = "",
    ) -> None:
        self.settings = settings
        self._no_gpu = no_gpu
        self.journal = journal
        self.logs = logs
        self.call_log = CallLog(logs)
        self.metrics = Metrics()
        self.starts = Starts(journal)
        self.starts.on_ended = lambda start: self.metrics.started(self.counted_as(start.app), start)
        self.last_errors: dict[str, tuple[float, str, str]] = {}
        """Of each app: when (Unix time), function, and what it was."""
        self.resources = resources
        self.backend: Backend
        self.memory: MemoryWatch | None = None
        self.catalogue = catalogue
        self._doomed: set[str] = set()
        processors = len(os.sched_getaffinity(0))
        self.state = State(
            Config(
                snapshot_failures=settings.snapshot_failures,
                capture_attempts=settings.capture_attempts,
                max_instances=settings.max_containers,
                max_thawing=max(_LEAST_THAWS, 2 * processors),
                abreast=max(_LEAST_ABREAST, processors),
                parked=settings.parked,
                gpus=gpus,
                drain_calls=settings.drain_calls,
            ),
            run_id,
        )
        self.calls: dict[str, CallRecord] = {}
        self._answers: dict[str, int] = {}
        """Sizes of the answers in memory, the oldest first."""
        self._answer_bytes = 0
        self._fetched: list[str] = []
        """Calls whose answers have been delivered, that the journal has not been told of."""
        self.instances: dict[str, InstanceInfo] = {}
        self.apps: dict[tuple[str, int], tuple[DeployRow, AppSpec]] = {}
        self.active: dict[str, int] = {}
        self.touched: dict[str, float] = {}
        """When each active app was last used: something was heard of its clients, or a call of it ended."""
        self.heard: dict[str, float] = {}
        """When something was last heard of its clients."""
        self._abandoned: deque[str] = deque(maxlen=1000)
        """Ephemeral apps that were stopped since nothing was heard of their clients."""
        self._leaving: set[str] = set()
        """Ephemeral apps that were stopped and may still have containers."""
        self._content_due = 0.0
        self._unused_due = 0.0
        self._unreadable: dict[str, str] = {}
        """What to say of apps that an earlier or later version of woodfrog has deployed in a form that is not known."""
        self._elders: dict[tuple[str, str, str], int] = {}
        """As in the journal: by app, tag and digest of parameters, the version that serves in place of the newest."""
        self._known_groups: set[tuple[str, int, str, str]] = set()
        self._events: deque[ev.Event] = deque()
        self._running = False
        self._wake: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._keeping: set[asyncio.Task[None]] = set()
        """Those of them that write answers."""
        self.shutting_down = False
        self.quiet = asyncio.Event()
        self._told_installed: dict[str, tuple[int, list[str]]] = {}
        """What was said of each app's packages last, and of which version of it."""
        folder = settings.home / "events"
        folder.mkdir(mode=0o700, exist_ok=True)
        for old in sorted(folder.glob("*.ndjson"))[:-4]:
            old.unlink(missing_ok=True)
        self._record_path: Path | None = folder / f"{time.strftime('%Y%m%dT%H%M%S')}-{run_id}.ndjson"
        self._record = open(self._record_path, "w", buffering=1 << 16)  # noqa: SIM115 - open for the daemon's life
        self._record_path.chmod(0o600)
        self._record.write(journal_header(self.state.config, run_id) + "\n")
        self._recorded = 0

    # The loop

    @staticmethod
    def now() -> float:
        return time.monotonic()

    def emit(self, event: ev.Event) -> None:
        """Give the machine an event and carry out what it answers; events of the way are queued."""
        self._events.append(event)
        if self._running:
            return
        self._running = True
        try:
            while self._events:
                current = self._events.popleft()
                try:
                    actions = handle(self.state, current)
                except InvalidTransition as e:
                    counters["control.invalid"] += 1
                    log.error("%s", e.message, exc_info=e)
                    continue
                self._note(current, actions)
                for action in actions:
                    try:
                        self._do(action)
                    except Exception as e:
                        # The actions behind it are owed all the same.
                        log.error("cannot carry out %s", action, exc_info=e)
        finally:
            self._running = False
        if self.shutting_down and not self.state.instances:
            self.quiet.set()

    def _note(self, event: ev.Event, actions: tuple[ev.Action, ...]) -> None:
        """Append to the run's event journal, up to its limit."""
        if self._record_path is None:
            return
        line = journal_line(event, actions)
        self._recorded += len(line)
        try:
            self._record.write(line + "\n")
        except OSError as e:
            self._end_record(e)
        if self._recorded > _JOURNAL_LIMIT:
            log.info("the event journal is full: this run is not recorded any further")
            self._end_record()

    def _end_record(self, why: OSError | None = None) -> None:
        """The rest of this run is not in its event journal."""
        if self._record_path is None:
            return
        self._record_path = None
        if why is not None:
            log.warning("the event journal ends here: %s", why)
        with contextlib.suppress(OSError):  # what is still to be written may not fit on the disk
            self._record.close()

    def _do(self, action: ev.Action) -> None:
        match action:
            case ev.StartInstance() | ev.ParkInstance():
                self._start_instance(action)
            case ev.WakeInstance():
                self._wake_instance(action)
            case ev.RunCall():
                self._task(self._run_call(action))
            case ev.CloseCall():
                self.backend.close_call(action.instance_id, action.call_id)
            case ev.StopInstance():
                self._stop_instance(action.instance_id, graceful=action.graceful, reason=action.reason)
            case ev.KillInstance():
                self._stop_instance(action.instance_id, graceful=False, reason=action.reason)
            case ev.FillMemory():
                self.backend.fill(action.instance_id)
            case ev.RetryCall():
                self._tell_retry(action)
            case ev.FinishCall():
                self._finish_call(action)
            case ev.RetireSnapshot():
                log.warning("snapshot %s retired: %s", action.snapshot_id, action.reason)
                self.catalogue.retire(action.snapshot_id, action.reason)
            case ev.WakeAt():
                self._schedule(action.time)

    def _task(self, work: Any) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("internal error", exc_info=error)

    def _schedule(self, at: float) -> None:
        if self._wake is not None:
            self._wake.cancel()
        self._wake = asyncio.get_running_loop().call_later(max(0.0, at - self.now()), self._tick)

    def _tick(self) -> None:
        self._wake = None
        self.emit(ev.Tick(now=self.now()))

    # Apps

    def recover(self) -> None:
        """Take up where the last daemon was stopped or killed: deployed apps and unfinished calls."""
        unfinished: dict[tuple[str, int], list[CallRow]] = {}
        for row in self.journal.unfinished():
            unfinished.setdefault((row.app, row.version), []).append(row)
        self._elders = self.journal.elders()
        live = self.journal.live()
        newest = {deploy.app: deploy.version for deploy in live}
        for deploy in live:
            key = (deploy.app, deploy.version)
            try:
                self._take_deploy(deploy, followed=deploy.version != newest[deploy.app], again=True)
            except SpecError as e:
                # Its calls stay unfinished, for a daemon that can read it.
                waiting = len(unfinished.pop(key, []))
                self._unreadable[deploy.app] = (
                    f"app {deploy.app!r}, version {deploy.version}, was deployed by another version of woodfrog, and "
                    f"this one cannot read it ({e.message}): go back to that one, which still runs its calls, or "
                    "deploy it anew"
                )
                log.error("%s; unfinished calls: %d", self._unreadable[deploy.app], waiting)
                continue
            for row in unfinished.pop(key, []):
                try:
                    payload = self.journal.payload(row.id)
                except StoreError as e:
                    self._end_call(row, "failure", e)
                    continue
                self._take_call(row, payload).taken_up = True
        for row in self.journal.last_failures():
            self._note_error(row, row.error or {}, row.finished or 0.0)
        for rows in unfinished.values():
            for row in rows:
                self._end_call(row, "cancelled", CallCancelled(f"app {row.app!r} was stopped"))

    def _end_call(self, row: CallRow, outcome: str, error: WoodfrogError) -> None:
        """A call of an earlier daemon's that cannot be taken up."""
        try:
            self.journal.finish_call(row.id, outcome=outcome, error=error.to_dict(), result=Payload(data=b""), trace=[])
        except StoreError as e:  # on a full disk a daemon has to start, to make room; the next one tries again
            log.error("call %s: %s", row.id, e.message)

    def deploy(
        self,
        raw: dict[str, Any],
        *,
        ephemeral: bool,
        client: dict[str, Any],
        capture: bool,
        rolling: bool = True,
        lose: bool = False,
    ) -> dict[str, Any]:
        """A new version of an app.

        Args:
            rolling: as in `AppDeployed`.
            lose: what the active version serves may be left out.

        Raises:
            SpecError: the spec is not usable here, or leaves out what is served now; nothing has changed.
        """
        spec = from_dict(AppSpec, raw)
        self.resources.check(spec)
        if spec.name in self.active and not lose:
            now = self.active[spec.name]
            for left in spec.left_out:
                if self.apps[spec.name, now][1].serves(left.tag):
                    raise SpecError(
                        f"{left.tag} is served by version {now} of app {spec.name!r}, and would be left out: "
                        f"{left.why}; or take it away: `woodfrog app stop {spec.name}`, then deploy",
                        code="left-out",
                    )
        row = self.journal.add_deploy(spec.name, to_dict(spec), ephemeral=ephemeral, client=client)
        self._take_deploy(row, rolling=rolling)
        self.logs.note(
            spec.name, f"deployed version {row.version}: {', '.join(f.tag for f in spec.functions) or 'no functions'}"
        )
        for left in spec.left_out:
            self.logs.note(spec.name, f"{left.tag} is left out: {left.why}")
        for function in spec.functions:
            if function.scaling.buffer_containers and self._uses_gpu(row, function):
                text = f"{function.tag}: buffer_containers keeps idle copies that hold their GPUs; none is parked"
                self.logs.note(spec.name, text, function=function.tag)
            memory, asked = self.state.memory, function.resources.memory_mib or 0
            if memory is not None and asked << 20 > memory.total:
                text = (
                    f"{function.tag}: memory={asked} is more than the {memory.total >> 20} MiB there are for containers"
                )
                text += ": the kernel ends it, or others, before it comes to that limit"
                self.logs.note(spec.name, text, function=function.tag)
        if capture:
            for function in spec.functions:
                if function.snapshot.enabled and not function.required:
                    self.request_snapshot(spec.name, function.tag)
        functions = [{"tag": f.tag, "key": function_key(f, spec.runtime)} for f in spec.functions]
        return {"app": spec.name, "version": row.version, "functions": functions}

    def rollback(self, app: str, version: int | None) -> dict[str, Any]:
        """An earlier version's functions, as a new version.

        Args:
            version: None = the one before the active one.

        Raises:
            NotFoundError: no such app runs, or there was no such version, or its code is not kept any more.
            SpecError: as `deploy`; or it is the active version.
        """
        active, _ = self.app(app)
        rows = {row.version: row for row in self.journal.deploys(app) if not row.ephemeral}
        if version is None:
            version = max((v for v in rows if v < active.version), default=None)
            if version is None:
                raise NotFoundError(f"app {app!r} has no version before {active.version}", app=app)
        if version not in rows:
            versions = ", ".join(map(str, sorted(rows))) or "none"
            raise NotFoundError(f"app {app!r} was never deployed in version {version}; it was in: {versions}", app=app)
        if version == active.version:
            raise SpecError(f"version {version} of app {app!r} is the active one", code="bad-arguments")
        row = rows[version]
        try:
            answer = self.deploy(
                row.spec, ephemeral=False, client={**row.client, "rollback": version}, capture=False, lose=True
            )
        except SpecError as e:
            if e.code not in ("missing-code", "missing-blob"):
                raise
            raise NotFoundError(
                f"the code of version {version} of app {app!r} is not kept any more: deploy it from its source",
                code="missing-code",
                app=app,
            ) from None
        return {**answer, "rollback": version}

    def _take_deploy(
        self, row: DeployRow, *, rolling: bool = True, followed: bool = False, again: bool = False
    ) -> None:
        standby: dict[str, tuple[str, ...]] = {}
        for (app, tag, digest), version in self._elders.items() if again else ():
            if app == row.app and version < row.version:
                standby[tag] = (*standby.get(tag, ()), digest)
        spec = from_dict(AppSpec, row.spec)
        self.apps[row.app, row.version] = (row, spec)
        self.active[row.app] = row.version
        self._unreadable.pop(row.app, None)
        self.touched[row.app] = self.heard[row.app] = self.now()
        keys = {f.tag: function_key(f, spec.runtime) for f in spec.functions}
        found: dict[str, dict[str, str]] = {}
        for function in spec.functions:
            if function.snapshot.enabled:
                self._known_groups.add((row.app, row.version, function.tag, ""))
                found[function.tag] = self._find_snapshots(row, function, keys[function.tag])
        self._look_at_memory()
        self.emit(
            ev.AppDeployed(
                now=self.now(),
                app=row.app,
                version=row.version,
                specs=tuple(_lean(f, gpu=self._uses_gpu(row, f)) for f in spec.functions),
                keys=keys,
                snapshots={tag: by_chip[""] for tag, by_chip in found.items() if "" in by_chip},
                gpu_snapshots={tag: by_chip for tag, by_chip in found.items() if by_chip and "" not in by_chip},
                sizes={s: self._size(s) for by_chip in found.values() for s in by_chip.values()},
                ephemeral=row.ephemeral,
                rolling=rolling,
                followed=followed,
                standby=standby,
            )
        )

    def _look_at_memory(self) -> None:
        if self.memory is not None:
            self.memory.look()

    def _size(self, snapshot_id: str) -> int:
        """Memory that a copy of it takes once all of it is in: its pages, and the files of its /dev/shm."""
        manifest = self.catalogue.known(snapshot_id)
        if manifest is None:
            return 0
        return manifest.pages_bytes + sum(f.size for f in manifest.files if f.path.startswith("shm/"))

    def _find_snapshots(self, row: DeployRow, function: FunctionSpec, key: str) -> dict[str, str]:
        """The snapshots of a function that fit here, by the chip that they need; "" = any, or none."""
        lean = _lean(function, gpu=self._uses_gpu(row, function))
        wanted = chips_for(lean, self.state.config.gpus)
        found = {chip: self.backend.find_snapshot(key, chip=chip) for chip in wanted}
        return {chip: snapshot_id for chip, snapshot_id in found.items() if snapshot_id is not None}

    def _tell_snapshot(self, app: str, version: int, function: FunctionSpec, params_digest: str) -> None:
        group = (app, version, function.tag, params_digest)
        if not function.snapshot.enabled or group in self._known_groups:
            return
        self._known_groups.add(group)
        row, spec = self.apps[app, version]
        key = function_key(function, spec.runtime, params_digest)
        for chip, found in self._find_snapshots(row, function, key).items():
            self.emit(
                ev.SnapshotAvailable(
                    now=self.now(),
                    app=app,
                    tag=function.tag,
                    snapshot_id=found,
                    params_digest=params_digest,
                    version=version,
                    chip=chip,
                    size=self._size(found),
                )
            )

    def thaws(self, key: str, tag: str, params_digest: str) -> bool:
        """Whether a deployed function would thaw a snapshot of that function key."""
        return any(
            function.tag == tag
            and function.snapshot.enabled
            and function_key(function, self.apps[deployed][1].runtime, params_digest) == key
            for deployed in self.active.items()
            for function in self.apps[deployed][1].functions
        )

    def snapshot_arrived(self, manifest: Manifest) -> None:
        """One was brought from elsewhere: the functions that it fits may thaw it."""
        for app, version in list(self.active.items()):
            for function in self.apps[app, version][1].functions:
                if function.tag == manifest.tag:
                    self._known_groups.discard((app, version, function.tag, manifest.params_digest))
                    self._tell_snapshot(app, version, function, manifest.params_digest)

    def app(self, name: str) -> tuple[DeployRow, AppSpec]:
        """The active version of an app.

        Raises:
            NotFoundError: no such app runs.
        """
        version = self.active.get(name)
        if version is None:
            if name in self._unreadable:
                raise NotFoundError(self._unreadable[name], code="app-unreadable", app=name)
            if name in self._abandoned:
                raise NotFoundError(
                    f"this app.run() was stopped after {_EPHEMERAL_TTL_S / 60:.0f} minutes without its client: {name}; "
                    "run it again, or deploy the app so that it stays",
                    code="app-abandoned",
                    app=name,
                )
            names = ", ".join(sorted(n for n, v in self.active.items() if not self.apps[n, v][0].ephemeral)) or "none"
            raise NotFoundError(f"no app {name!r} is deployed; deployed: {names}", app=name)
        self.touch(name)
        return self.apps[name, version]

    def touch(self, name: str) -> None:
        """A client of the app is there: an ephemeral one is not idle."""
        if name in self.touched:
            self.touched[name] = self.heard[name] = self.now()

    def _function(self, app: str, tag: str, method: str | None = None) -> tuple[DeployRow, FunctionSpec]:
        """A function of an app's active version.

        Raises:
            NotFoundError: no such app runs, or it has no such function; or it, or that method of it, was left out.
        """
        row, spec = self.app(app)
        left = spec.missing(tag, method)
        if left is not None:
            raise NotFoundError(f"{left.tag} is left out of app {app!r}: {left.why}", code="left-out", app=app, tag=tag)
        function = spec.function(tag)
        if function is None:
            names = ", ".join(f.tag for f in spec.functions) or "none"
            raise NotFoundError(f"app {app!r} has no function {tag!r}; it has: {names}", app=app, tag=tag)
        return row, function

    def stop_app(self, name: str, why: str = "") -> int:
        """The number of calls that are cancelled.

        Raises:
            NotFoundError: no such app runs.
        """
        row, _ = self.app(name)
        unfinished = sum(call.group.service.app == name for call in self.state.calls.values())
        self.journal.stop_app(name)
        if row.ephemeral:
            self._leaving.add(name)
        self.emit(ev.AppStopped(now=self.now(), app=name, reason=why))
        self.active.pop(name, None)
        self.touched.pop(name, None)
        self.heard.pop(name, None)
        for key in [k for k in self.apps if k[0] == name]:
            del self.apps[key]
        self._known_groups = {g for g in self._known_groups if g[0] != name}
        self._elders = {k: v for k, v in self._elders.items() if k[0] != name}
        self.call_log.settle(name)
        self.logs.note(name, f"stopped: {why}" if why else "stopped")
        return unfinished

    def is_over(self, name: str) -> bool:
        """Whether nothing is written of an app any more: it was ephemeral, was stopped, and has no container.

        Raises:
            NotFoundError: there was never such an app.
        """
        if name in self.active:
            return False
        rows = self.journal.deploys(name)
        if not rows:
            raise NotFoundError(f"no app {name!r} was ever deployed here", app=name)
        return rows[-1].ephemeral and not any(i.request.app == name for i in self.instances.values())

    def request_snapshot(self, app: str, tag: str) -> None:
        """Capture without waiting for a call.

        Raises:
            NotFoundError: no such app runs, or it has no such function.
            SpecError: the function has snapshots off.
        """
        _, function = self._function(app, tag)
        if not function.snapshot.enabled:
            raise SpecError(f"{tag!r} does not have enable_memory_snapshot=True", code="no-snapshot")
        self.emit(ev.SnapshotRequested(now=self.now(), app=app, tag=tag))

    # Calls

    def submit(
        self,
        call_id: str,
        *,
        app: str,
        service: str,
        method: str | None,
        params: bytes,
        digest: str,
        encoding: str,
        payload: Payload,
    ) -> CallRecord:
        """Take a call; the same id again is the same call.

        Raises:
            NotFoundError: no such app, function or method.
        """
        known = self.find_call(call_id)
        if known is not None:
            return known
        row, function = self._function(app, service, method)
        if function.kind == "class" and method is None:
            names = ", ".join(m.name for m in function.methods)
            raise NotFoundError(f"{service!r} is a class: name one of its methods ({names})", app=app, tag=service)
        name = method or function.methods[0].name
        if function.method(name) is None:
            names = ", ".join(m.name for m in function.methods)
            raise NotFoundError(f"{service!r} has no method {name!r}; it has: {names}", app=app, tag=service)
        if params:
            self.journal.add_params(digest, params)
        call = self.journal.add_call(
            call_id,
            app=app,
            version=row.version,
            tag=service,
            method=name,
            params_digest=digest,
            encoding=encoding,
            payload=payload,
        )
        # A large body was moved beside the journal.
        return self._take_call(call, payload if payload.data is not None else self.journal.payload(call_id))

    def _take_call(self, row: CallRow, payload: Payload) -> CallRecord:
        record = CallRecord(row, payload)
        self.calls[row.id] = record
        _, spec = self.apps[row.app, row.version]
        function = spec.function(row.tag)
        if function is not None:
            self._tell_snapshot(row.app, row.version, function, row.params_digest)
        self._look_at_memory()
        self.emit(
            ev.CallSubmitted(
                now=self.now(),
                call_id=row.id,
                app=row.app,
                tag=row.tag,
                method=row.method,
                params_digest=row.params_digest,
                version=row.version,
            )
        )
        return record

    def find_call(self, call_id: str) -> CallRecord | None:
        """A call in memory, or a finished one from the journal."""
        record = self.calls.get(call_id)
        if record is not None:
            self.touch(record.row.app)
            return record
        row = self.journal.call(call_id)
        if row is None or row.outcome is None:
            if row is not None and row.app in self._unreadable:
                raise NotFoundError(self._unreadable[row.app], code="app-unreadable", app=row.app)
            return None
        self.touch(row.app)
        record = CallRecord(row, Payload(data=b""))
        record.outcome, record.error = row.outcome, row.error
        record.from_journal = True
        try:
            record.result = self.journal.result(call_id)
        except OutputExpired as e:
            record.outcome, record.error = "failure", e.to_dict()
        record.phases = [
            Phase(str(p["name"]), float(p["start_ms"]), float(p["ms"]), p.get("parent")) for p in row.trace
        ]
        record.done.set()
        return record

    def cancel(self, call_id: str, error: WoodfrogError | None = None) -> None:
        """End a call, as cancelled, or as failed with this error."""
        self.emit(ev.CallCancelled(now=self.now(), call_id=call_id, error=None if error is None else error.to_dict()))

    async def _run_call(self, action: ev.RunCall) -> None:
        record = self.calls[action.call_id]
        info = self.instances.get(action.instance_id)
        if info is None:
            return  # it died before this began: the machine knows
        if record.done.is_set():  # cancelled before this began
            self._call_finished(action, "success", None)
            return
        info.call_id = action.call_id
        record.instance_id, record.ran = action.instance_id, info.version
        record.drop_items()
        waited = (self.now() - record.submitted) * 1e3
        record.phases = [Phase("queue", 0.0, round(waited, 3))]
        if info.served == 0 and info.begun >= record.submitted - 0.001:
            record.mode = "parked" if info.request.parked else info.mode
            described = self.backend.describe(action.instance_id) or {}
            offset = (info.begun - record.submitted) * 1e3
            for p in described.get("phases", []):
                record.phases.append(
                    Phase(p["name"], round(p["start_ms"] + offset, 3), p["ms"], p["parent"] or "queue")
                )
        else:
            record.mode = "warm"
        info.served += 1

        async def on_item(payload: Payload) -> None:
            if record.done.is_set():  # it was cancelled, and is not closed yet
                _drop(payload)
                return
            record.items.append((b"i", payload))
            record.unread += payload.size + _ITEM_OWN
            record.changed.set()
            while record.unread > _ITEM_LIMIT and not record.done.is_set():
                record.read.clear()
                await record.read.wait()

        request = CallRequest(action.call_id, record.row.method, record.row.encoding, record.payload, on_item)
        try:
            answer = await self.backend.call(action.instance_id, request)
        except Exception as e:
            # What state its connection is in nobody knows: the call fails, the instance goes.
            log.error("call %s broke", action.call_id, exc_info=e)
            self._call_finished(action, "failure", _as_error("the call", e).to_dict(), instance_ok=False)
            return
        finally:
            if info.call_id == action.call_id:
                info.call_id = None
        total = (self.now() - record.submitted) * 1e3
        record.phases.append(Phase("run", round(total - answer.ms, 3), round(answer.ms, 3)))
        if answer.outcome == "lost":
            return  # the instance's end is reported by itself, with its reason
        error = answer.error if answer.outcome == "exception" else None
        if record.done.is_set():  # a generator that was closed, or what was still under way when it was killed
            _drop(answer.payload)
            if error is not None:
                self.call_log.failed(record.row, action.instance_id, error, "raised after the call was over")
        else:
            record.answer = answer
        self._call_finished(action, answer.outcome, error)

    def _call_finished(
        self,
        run: ev.RunCall,
        outcome: Literal["success", "exception", "failure"],
        error: dict[str, Any] | None,
        *,
        instance_ok: bool = True,
    ) -> None:
        self.emit(
            ev.CallFinished(
                now=self.now(),
                call_id=run.call_id,
                instance_id=run.instance_id,
                outcome=outcome,
                error=error,
                instance_ok=instance_ok,
            )
        )

    def _tell_retry(self, action: ev.RetryCall) -> None:
        record = self.calls.get(action.call_id)
        if record is not None:
            record.attempts = action.attempts
            when = f"in {action.delay:.3g} s" if action.delay else "at once"
            then = f"attempt {action.attempt} of {action.attempts}, the next {when}"
            self.call_log.failed(record.row, record.instance_id or "", action.error or {}, then)

    def _finish_call(self, action: ev.FinishCall) -> None:
        record = self.calls.get(action.call_id)
        if record is None or record.ended:
            return
        record.ended = True
        record.finished = self.now()
        if record.row.app in self.touched:  # its client may have nothing to ask before it has looked at the answer
            self.touched[record.row.app] = record.finished
        counters[f"call.{action.outcome}"] += 1
        answer, error = record.answer, action.error
        if action.outcome in ("success", "exception") and answer is not None:
            if answer.payload.data is not None and len(answer.payload.data) > INLINE_BYTES:
                task = self._task(self._keep_answer(record, action.outcome, answer))
                self._keeping.add(task)
                task.add_done_callback(self._keeping.discard)
                return
            error, record.result = answer.error, answer.payload
        self._conclude(record, action.outcome, error)

    async def _keep_answer(self, record: CallRecord, outcome: str, answer: Answer) -> None:
        """An answer that the journal keeps in a file gets there without the loop."""
        record.result = answer.payload
        with contextlib.suppress(OSError):  # the journal meets the same, and says it
            record.result = await spooled(answer.payload, self.journal.bodies)
        self._conclude(record, outcome, answer.error)

    def _conclude(self, record: CallRecord, outcome: str, error: dict[str, Any] | None) -> None:
        """Write the answer, and let those have it who wait."""
        call_id = record.row.id
        record.outcome, record.error = outcome, error
        try:
            self.journal.finish_call(
                call_id, outcome=outcome, error=error, result=record.result, trace=record.trace(), version=record.ran
            )
            if record.result.path is not None:  # the journal has moved it
                data = record.result.data
                record.result = self.journal.result(call_id) if data is None else Payload(data=data)
        except StoreError as e:
            # Without a durable answer the caller gets the truth rather than a result that a restart would lose.
            log.error("call %s: %s", call_id, e.message)
            _drop(record.result)
            record.outcome, record.error, record.result = "failure", e.to_dict(), Payload(data=b"")
            self._write_failure(record)
        if record.outcome in ("exception", "failure"):
            then = f"the last of {record.attempts} attempts" if record.attempts else ""
            self.call_log.failed(record.row, record.instance_id or "", record.error or {}, then)
            self._note_error(record.row, record.error or {}, time.time())
        self._count_call(record)
        record.payload = Payload(data=b"")
        record.done.set()
        record.changed.set()
        record.read.set()
        if record.result.data and not record.items and not record.unwritten:
            self._bound_answers(record)

    def _note_error(self, call: CallRow, error: dict[str, Any], when: float) -> None:
        kind = f"{error.get('type')}: " if "code" not in error else ""
        self.last_errors[call.app] = (when, call.tag, f"{kind}{error.get('message', '')}"[:_ERROR])

    def _count_call(self, record: CallRecord) -> None:
        outcome = record.outcome or ""
        code = str((record.error or {}).get("code", "")) if outcome == "failure" else ""
        ran = record.phases[-1].ms / 1e3 if record.phases and record.phases[-1].name == "run" else None
        waited = record.phases[0].ms / 1e3 if record.phases else record.finished - record.submitted
        self.metrics.called(self.counted_as(record.row.app), outcome, code, waited, ran)

    def _bound_answers(self, newest: CallRecord) -> None:
        """Who waits for a call has its record; who asks later gets it from the journal."""
        size = self._answers[newest.row.id] = newest.result.size
        self._answer_bytes += size
        while self._answer_bytes > _ANSWERS_LIMIT:
            self._forget_call(next(iter(self._answers)))

    def _forget_call(self, call_id: str) -> None:
        self._answer_bytes -= self._answers.pop(call_id, 0)
        record = self.calls.pop(call_id, None)
        if record is not None:
            record.drop_items()

    def _write_failure(self, record: CallRecord) -> None:
        """Tell the journal of a call whose answer it had no room for."""
        assert record.outcome is not None
        try:
            self.journal.finish_call(
                record.row.id, outcome=record.outcome, error=record.error, result=record.result, trace=[]
            )
            record.unwritten = False
        except StoreError:  # tidy tries again
            record.unwritten = True

    # Instances

    def _start_instance(self, action: ev.StartInstance | ev.ParkInstance) -> None:
        """Whatever goes wrong, the machine hears of it."""
        try:
            self._begin_start(action)
        except Exception as e:
            if not isinstance(e, WoodfrogError):
                log.error("start of %s", action.service_id, exc_info=e)
            self.on_start_failed(action.instance_id, _as_error("the start", e), user_fault=isinstance(e, SpecError))

    def _wake_instance(self, action: ev.WakeInstance) -> None:
        info = self.instances.get(action.instance_id)
        if info is None:
            return  # it died before this began; the machine has been told
        info.begun = self.now()
        info.start = self._begun(info)
        counters["start.parked"] += 1
        try:
            # Secrets may have changed since it was parked.
            self.backend.wake(action.instance_id, self.resources.environment(info.request.spec))
        except Exception as e:
            self.on_exited(action.instance_id, _as_error("the wake", e))
            self.backend.stop(action.instance_id, graceful=False, reason="not woken")

    def _begin_start(self, action: ev.StartInstance | ev.ParkInstance) -> None:
        name, _, rest = action.service_id.partition("/")
        tag, _, version = rest.rpartition("@")
        row, spec = self.apps[name, int(version)]
        function = spec.function(tag)
        assert function is not None
        mode: Literal["cold", "restore"] = "restore"
        gpus: tuple[str, ...] = ()
        capture, parked = False, isinstance(action, ev.ParkInstance)
        if isinstance(action, ev.StartInstance):
            mode, capture, gpus = action.mode, action.capture, action.gpus
        request = StartRequest(
            instance_id=action.instance_id,
            app=name,
            family=re.sub(r"-[0-9a-f]{8}$", "", name) if row.ephemeral else name,
            spec=function,
            runtime=spec.runtime,
            function_key=function_key(function, spec.runtime, action.params_digest),
            mode=mode,
            snapshot_id=action.snapshot_id,
            capture=capture,
            env=self.resources.environment(function),
            volumes=self.resources.mounts(function),
            params=self.journal.params(action.params_digest) if action.params_digest else b"",
            params_digest=action.params_digest,
            parked=parked,
            gpus=gpus,
        )
        info = self.instances[action.instance_id] = InstanceInfo(request, self.now(), row.version)
        counters[f"start.{mode}"] += not parked
        if not parked:
            info.start = self._begun(info)
        if self._uses_gpu(row, function) and not request.gpus:
            wanted = ", ".join(function.resources.gpu)
            has = ", ".join(sorted({g.chip for g in self.state.config.gpus})) or self._no_gpu
            error = HostError(
                f"{tag} asks for gpu={wanted}, and this machine has none woodfrog can use{f' ({has})' if has else ''}; "
                "set WOODFROG_GPU=none to run it without",
                code="no-gpu",
            )
            self.on_start_failed(action.instance_id, error, user_fault=True)
            return
        if mode == "restore":
            self._tell_installed(row, request)
        self.backend.start(request)

    def _begun(self, info: InstanceInfo) -> Start:
        request = info.request
        start = Start(
            request.app,
            info.version,
            request.spec.tag,
            request.instance_id,
            "woken" if request.parked else "thawed" if request.mode == "restore" else "cold",
            snapshot=request.snapshot_id or "",
        )
        known = self.state.instances.get(request.instance_id)
        if known is not None and known.why_cold:
            start.why = known.why_cold
            if start.why == "did-not-thaw":
                start.detail = known.group.thaw_error
            elif start.why == "gave-up":
                start.detail = self.state.knows(known.group.service, known.group.digest, known.chip).reason
        return start

    def counted_as(self, app: str) -> str:
        """The app's name in metrics: those of runs would be ever more, and what is stopped has none."""
        version = self.active.get(app)
        if version is None:
            return OTHER
        row, _ = self.apps[app, version]
        return EPHEMERAL if row.ephemeral else app

    def _started(
        self,
        info: InstanceInfo,
        result: Literal["ready", "failed", "stopped"],
        error: WoodfrogError | None = None,
    ) -> None:
        """A start is over; of one that is over already: nothing."""
        start, info.start = info.start, None
        if start is None:
            return
        start.result, start.ms = result, (self.now() - info.begun) * 1e3
        if error is not None:
            start.code, start.error = error.code, error.message
            self.last_errors[start.app] = (time.time(), start.function, error.message)
        self.starts.ended(start)

    def _tell_installed(self, row: DeployRow, request: StartRequest) -> None:
        """Say, once, that a snapshot is thawed beside other packages than it was made with."""
        manifest = self.catalogue.known(request.snapshot_id or "")
        if manifest is None:
            return
        found = installed_since(request.runtime.sys_path, max(manifest.created, row.deployed))
        if not found or self._told_installed.get(request.app) == (row.version, found):
            return
        self._told_installed[request.app] = (row.version, found)
        names = f"{', '.join(found[:5])}{f' and {len(found) - 5} more' if len(found) > 5 else ''}"
        self._say(
            request.instance_id,
            f"installed since its snapshot was made: {names}. What that had imported stays, what is imported after the "
            "thaw is new; deploy again to have one version of all",
        )

    def _uses_gpu(self, row: DeployRow, function: FunctionSpec) -> bool:
        """Whether it is to have the GPU it asks for: `none` runs it without."""
        return bool(function.resources.gpu) and "none" not in (self.settings.gpu, row.client.get("gpu"))

    def _stop_instance(self, instance_id: str, *, graceful: bool, reason: str) -> None:
        info = self.instances.get(instance_id)
        if info is not None:
            info.stopping = reason
        self.backend.stop(instance_id, graceful=graceful, reason=reason)

    def _forget(self, instance_id: str, error: WoodfrogError | None = None) -> None:
        info = self.instances.pop(instance_id, None)
        if info is not None:
            self._started(info, "failed" if error is not None else "stopped", error)
            self.logs.end(info.request.app, instance_id, info.request.spec.tag)
        if self._doomed:
            self._remove_doomed()

    def _say(self, instance_id: str, text: str) -> None:
        info = self.instances.get(instance_id)
        if info is not None:
            self.logs.note(info.request.app, text, instance=instance_id, function=info.request.spec.tag)
        log.info("%s: %s", instance_id, text)

    def on_stage(self, instance_id: str, stage: str) -> None:
        self.emit(ev.InstanceStage(now=self.now(), instance_id=instance_id, stage=stage))

    def on_ready(self, instance_id: str, *, phases: Sequence[Phase] = (), zygote: bool = False) -> None:
        info = self.instances[instance_id]
        info.ready = True
        how = "woken" if info.request.parked else "thawed" if info.mode == "restore" else "started"
        cold = ""
        if info.start is not None:
            info.start.phases = phases
            if zygote and info.start.kind == "cold":
                info.start.kind = "zygote"
            told = info.start.why == "did-not-thaw" or (info.start.why == "none-fits" and info.start.detail)
            if info.start.why not in ("", "off") and not told:
                cold = f", cold: {why_words(info.start.why, info.start.detail)}"
        self._say(instance_id, f"{how} in {(self.now() - info.begun) * 1e3:.0f} ms{cold}")
        self._started(info, "ready")
        self.emit(ev.InstanceReady(now=self.now(), instance_id=instance_id))
        if info.version == self.active.get(info.request.app):
            self._note_elder(info.request, None)

    def on_parked(self, instance_id: str) -> None:
        self._say(instance_id, "parked")
        self.emit(ev.InstanceParked(now=self.now(), instance_id=instance_id))

    def on_found(self, instance_id: str, snapshot_id: str) -> None:
        info = self.instances.get(instance_id)
        if info is not None:
            info.mode = "restore"
            if info.start is not None:
                info.start.found(snapshot_id)
        self._say(instance_id, f"goes on from snapshot {snapshot_id}")

    def on_cold(self, instance_id: str, why: str) -> None:
        info = self.instances.get(instance_id)
        if info is not None and info.start is not None and info.start.why == "none-fits":
            info.start.detail = why
        self._say(instance_id, f"starts cold: {why}")

    def on_captured(self, request: StartRequest, snapshot_id: str) -> None:
        info = self.instances.get(request.instance_id)
        if info is None or info.mode != "restore":  # else it was found
            text = f"snapshot {snapshot_id} captured"
            self.logs.note(request.app, text, instance=request.instance_id, function=request.spec.tag)
        if self.catalogue.form(snapshot_id) is not None:  # else most of it is still on its way
            for warning in self.catalogue.get(snapshot_id).warnings:
                text = f"snapshot {snapshot_id}: {warning}"
                self.logs.note(request.app, text, instance=request.instance_id, function=request.spec.tag)
            self._supersede(request, snapshot_id)
        self.emit(
            ev.SnapshotCaptured(
                now=self.now(),
                instance_id=request.instance_id,
                snapshot_id=snapshot_id,
                size=self._size(snapshot_id),
            )
        )
        version = self.active.get(request.app)
        if (
            info is None and version is not None
        ):  # by now the app may be another version, with a function of the same key
            self._known_groups.discard((request.app, version, request.spec.tag, request.params_digest))
            self._tell_snapshot(request.app, version, request.spec, request.params_digest)

    def on_capture_failed(self, request: StartRequest, error: WoodfrogError, *, alive: bool) -> None:
        instance_id = request.instance_id
        gone = instance_id not in self.instances
        what = "it had answered, and is gone" if gone else "it runs on without a snapshot" if alive else "starting anew"
        snapshot_id = error.fields.get("snapshot")
        log_of = f"; CRIU's log: woodfrog snapshot inspect {snapshot_id} --log" if snapshot_id else ""
        text = f"no snapshot: {error.message} ({what}{log_of})"
        self.logs.note(request.app, text, instance=instance_id, function=request.spec.tag)
        log.info("%s: %s", instance_id, text)
        self.metrics.failed("capture", error.code)
        if not alive:
            self._forget(instance_id, error)
        self.emit(ev.CaptureFailed(now=self.now(), instance_id=instance_id, reason=error.message, alive=alive))
        self._say_given_up(request)

    def on_restore_failed(
        self, instance_id: str, snapshot_id: str, error: WoodfrogError, *, at_fault: bool, gpu: bool = False
    ) -> None:
        instead = "on another GPU, or cold, instead" if gpu else "cold start instead"
        self._say(instance_id, f"snapshot {snapshot_id} did not thaw: {error.message} ({instead})")
        info = self.instances.get(instance_id)
        self._forget(instance_id, error)
        self.emit(
            ev.RestoreFailed(
                now=self.now(),
                instance_id=instance_id,
                snapshot_id=snapshot_id,
                reason=error.message,
                at_fault=at_fault,
                gpu=gpu,
            )
        )
        if info is not None:
            self._say_given_up(info.request)

    def _say_given_up(self, request: StartRequest) -> None:
        """Else a function would be cold from now on, and nobody would know why."""
        service = self.state.find_service(request.app, request.spec.tag)
        if service is None:
            return
        chip = chip_of(request.spec, request.gpus, self.state.config.gpus)
        if not self.state.knows(service, request.params_digest, chip).gave_up:
            return
        name = f"{request.app}.{request.spec.tag}"
        text = f"starts cold from now on: {self.settings.capture_attempts} snapshots failed"
        text += f"; `woodfrog snapshot create {name}` tries again"
        self.logs.note(request.app, text, instance=request.instance_id, function=request.spec.tag)
        log.warning("%s %s", name, text)

    def on_start_failed(self, instance_id: str, error: WoodfrogError, *, user_fault: bool) -> None:
        self._say(instance_id, f"start failed: {error.message}")
        trace = error.fields.get("traceback") if isinstance(error, StartupError) else None
        info = self.instances.get(instance_id)
        if trace and info is not None:
            request = info.request
            self.logs.lines(
                request.app, str(trace), instance=instance_id, function=request.spec.tag, stream="stderr", call=None
            )
        if info is not None:
            self.call_log.start_failed(info.request.app, info.request.spec.tag, error.message)
        self._forget(instance_id, error)
        self.emit(ev.StartFailed(now=self.now(), instance_id=instance_id, error=error.to_dict(), user_fault=user_fault))
        if info is not None:
            self._say_elder(info.request)

    def _say_elder(self, request: StartRequest) -> None:
        """Else nobody would know why calls are still answered by the code before."""
        service = self.state.find_service(request.app, request.spec.tag)
        group = service.groups.get(request.params_digest) if service is not None else None
        elder = group.elder.service.version if group is not None and group.elder is not None else None
        self._note_elder(request, elder)
        if service is not None and elder is not None:
            text = f"version {elder} serves until version {service.version} starts"
            self.logs.note(request.app, text, function=request.spec.tag)

    def _note_elder(self, request: StartRequest, version: int | None) -> None:
        """For the next daemon: which version serves, since the newest has not started; None = it has, or none does."""
        key = request.app, request.spec.tag, request.params_digest
        if self._elders.get(key) == version:
            return
        try:
            self.journal.set_elder(*key, version)
        except StoreError as e:
            log.error("%s", e.message)
            return
        if version is None:
            del self._elders[key]
        else:
            self._elders[key] = version

    def on_refused(self, instance_id: str, error: WoodfrogError) -> None:
        self._say(instance_id, f"not started: {error.message}")
        self._forget(instance_id, error)
        self.emit(ev.StartRefused(now=self.now(), instance_id=instance_id, error=error.to_dict()))

    def on_gpus(self, sick: dict[str, str]) -> None:
        self.emit(ev.GpusSetAside(now=self.now(), sick=sick))

    def on_exited(self, instance_id: str, error: WoodfrogError) -> None:
        self._say(instance_id, error.message)
        info = self.instances.get(instance_id)
        self._forget(instance_id, error)
        self.emit(ev.InstanceExited(now=self.now(), instance_id=instance_id, error=error.to_dict()))
        if info is not None and not info.ready:
            self._say_elder(info.request)

    def on_lost(self, instance_id: str, reason: str) -> None:
        self._say(instance_id, reason)
        self.stop_instance(instance_id)

    def on_stopped(self, instance_id: str) -> None:
        info = self.instances.get(instance_id)
        self._say(instance_id, f"stopped: {info.stopping}" if info is not None and info.stopping else "stopped")
        self._forget(instance_id)
        self.emit(ev.InstanceStopped(now=self.now(), instance_id=instance_id))

    def on_log(self, instance_id: str, stream: str, data: bytes) -> None:
        info = self.instances.get(instance_id)
        if info is not None:
            spec = info.request
            self.logs.feed(
                spec.app, instance=instance_id, function=spec.spec.tag, stream=stream, call=info.call_id, data=data
            )

    def stop_instance(self, instance_id: str) -> None:
        """A person's wish; a call in it goes back to the queue."""
        self.emit(ev.InstanceStopRequested(now=self.now(), instance_id=instance_id))

    def invalidate(self, snapshot_id: str, *, elsewhere: bool = True) -> bool:
        """Never use a snapshot again and remove it; True when it is gone already.

        With `elsewhere` it is not taken from the tier again either, unless a person pulls it.

        Instances thawed from it have its files below their own: it is removed from disk when the last of them is gone.
        """
        self.emit(ev.SnapshotInvalidated(now=self.now(), snapshot_id=snapshot_id))
        if snapshot_id not in self.catalogue.damaged:
            if elsewhere:
                try:
                    self.catalogue.refuse(snapshot_id)
                except StoreError as e:  # it is removed, perhaps because the disk is full
                    log.warning("snapshot %s may come back from the tier: %s", snapshot_id, e.message)
            self.catalogue.retire(snapshot_id, "invalidated")
        self._doomed.add(snapshot_id)
        self._remove_doomed()
        return snapshot_id not in self._doomed

    def retire(self, snapshot_id: str, reason: str) -> None:
        """Never use a snapshot again, but keep it."""
        self.emit(ev.SnapshotInvalidated(now=self.now(), snapshot_id=snapshot_id))
        self.catalogue.retire(snapshot_id, reason)

    def _remove_doomed(self) -> None:
        for snapshot_id in self._doomed - self.backend.snapshots_in_use():
            try:
                self.catalogue.remove(snapshot_id, wait=False)
            except StoreError as e:
                log.error("%s", e.message)
            self._doomed.discard(snapshot_id)

    def _supersede(self, request: StartRequest, snapshot_id: str) -> None:
        """Of one function's snapshots the newest few are kept; earlier versions' are rolled off."""
        for manifest in self.catalogue.superseded(snapshot_id, self.settings.keep_snapshots):
            self._say(request.instance_id, f"snapshot {manifest.id} of an earlier version is removed")
            self.invalidate(manifest.id, elsewhere=False)

    # Housekeeping

    def tidy(self) -> None:
        """Forget what is over, and let go of what it took. Called every so often."""
        for step in (
            self._forget_results,
            self._forget_calls,
            self._stop_abandoned,
            self._forget_versions,
            self.call_log.settle,
            self._settle_starts,
            self._settle_logs,
            self._forget_runs,
            self._remove_unneeded,
            self._remove_unused,
            self._flush_record,
        ):
            try:
                step()
            except WoodfrogError as e:
                log.error("housekeeping: %s", e.message)
            except Exception:  # what is left undone now is done the next time
                log.exception("housekeeping")

    def fetched(self, call_id: str) -> None:
        """A client has got the answer: it is among the first to go where results take too much."""
        self._fetched.append(call_id)
        if len(self._fetched) >= _FETCHED_AT_ONCE:
            self.tell_fetched()

    def tell_fetched(self) -> None:
        calls, self._fetched = self._fetched, []
        if calls:
            try:
                self.journal.mark_delivered(calls)
            except StoreError as e:  # they stay for longer
                log.error("%s", e.message)

    def _forget_results(self) -> None:
        self.tell_fetched()
        now = time.time()
        before, most = now - self.settings.keep_results_s, self.settings.keep_results_mib << 20
        gone = self.journal.prune(before, most, now - _SPARED_S, now - _FETCHED_S)
        if self.journal.room.free() < _LITTLE_ROOM:
            gone += self.journal.prune(0.0, 1, 0.0, now - _FETCHED_S)
        for call_id in gone:
            self._forget_call(call_id)

    async def remove_results(self, app: str, before: float) -> tuple[int, int]:
        """Somebody wants results of finished calls gone: how many went, and their bytes.

        Args:
            app: only this one's; "" = all.
            before: only those that finished before it (Unix time); 0 = all.
        """
        self.tell_fetched()
        gone = await asyncio.to_thread(self.journal.finished, app, before)
        count = size = 0
        for at in range(0, len(gone), _REMOVED_AT_ONCE):
            # What went meanwhile by itself is not counted twice.
            part = [g for g in gone[at : at + _REMOVED_AT_ONCE] if self.journal.call(g[0]) is not None]
            size += self.journal.forget(part)
            count += len(part)
            for call_id, _, _ in part:
                self._forget_call(call_id)
            await asyncio.sleep(0)
        return count, size

    def _forget_calls(self) -> None:
        before = len(self.calls)
        for call_id, record in list(self.calls.items()):
            if record.unwritten:
                self._write_failure(record)
            elif not record.wanted(self.now()):
                self._forget_call(call_id)
        if before - len(self.calls) >= _MANY:  # the allocator would keep what their answers took
            self._task(asyncio.to_thread(heap.trim))

    def _stop_abandoned(self) -> None:
        """Ephemeral apps whose client is gone. While a call is under way only those whose client would say that it is
        there."""
        busy = {r.row.app for r in self.calls.values() if not r.done.is_set()}
        for name, touched in list(self.touched.items()):
            row, _ = self.apps[name, self.active[name]]
            if not row.ephemeral:
                continue
            if name not in busy:
                limit, silent, hint = _EPHEMERAL_TTL_S, self.now() - touched, "no call was running"
            elif row.client.get("attended") is True:
                limit, silent = _CLIENT_LOST_S, self.now() - self.heard[name]
                hint = "`woodfrog run --detach` and `woodfrog deploy` go on without"
            else:
                continue
            if silent > limit:
                self.stop_app(name, f"nothing was heard of its client for {limit / 60:.0f} minutes; {hint}")
                self._abandoned.append(name)

    def _forget_versions(self) -> None:
        """Those that have drained."""
        wanted = {(s.app, s.version) for s in self.state.services.values()} | set(self.active.items())
        for key in self.apps.keys() - wanted:
            del self.apps[key]
        self._known_groups = {g for g in self._known_groups if g[:2] in self.apps}

    def _settle_starts(self) -> None:
        self.starts.write()
        for name in self.last_errors.keys() - self.active.keys():
            del self.last_errors[name]

    def _settle_logs(self) -> None:
        with_containers = {i.request.app for i in self.instances.values()}
        over = self._leaving - with_containers
        self.logs.settle(with_containers | set(self.active), over)
        self._leaving -= over

    def _forget_runs(self) -> None:
        """Ephemeral apps of which no result is kept any more."""
        for name in self.journal.ended_runs(time.time() - self.settings.keep_results_s, _RUNS_AT_ONCE):
            if self.journal.forget_run(name):
                self.logs.remove(name)

    def _specs(self) -> list[str]:
        """All that runs, or may be started, as JSON."""
        specs = self.journal.kept_specs()
        specs += [json.dumps(row.spec) for row, _ in self.apps.values()]
        return specs + [json.dumps(to_dict(i.request.spec)) for i in self.instances.values()]

    def _remove_unneeded(self) -> None:
        """What clients sent for apps, and ephemeral volumes of apps, that are gone."""
        aside = self.resources.set_volumes_aside(self._specs)
        if self.now() >= self._content_due:
            self._content_due = self.now() + _CONTENT_EVERY_S
            aside += self.resources.set_content_aside(self._specs(), time.time() - _CONTENT_KEPT_S)
        if aside:
            self._task(asyncio.to_thread(_remove, aside))

    def _remove_unused(self) -> None:
        """Snapshots that nothing deployed would thaw here, and nothing did for long: their app was stopped, their
        function renamed, or the kernel, CRIU or woodfrog changed. No capture comes that would supersede them."""
        if self.now() < self._unused_due or not self.settings.keep_unused_s:
            return
        self._unused_due = self.now() + _UNUSED_EVERY_S
        days = self.settings.keep_unused_s / 86400
        in_use = self.backend.snapshots_in_use()
        for manifest in self.catalogue.unused_since(time.time() - self.settings.keep_unused_s):
            if manifest.id not in in_use and not self._may_thaw(manifest):
                log.info(
                    "snapshot %s of %s.%s is removed: for %.3g days nothing was thawed from it, and nothing that is "
                    "deployed would be", manifest.id, manifest.app, manifest.tag, days,
                )  # fmt: skip
                self.invalidate(manifest.id, elsewhere=False)

    def _may_thaw(self, manifest: Manifest) -> bool:
        """Whether a deployed function would thaw it on this machine as it is now."""
        if not self.thaws(manifest.function_key, manifest.tag, manifest.params_digest):
            return False
        found = self.backend.find_snapshot(manifest.function_key, chip=manifest.host.get("gpu", ""))
        return found is not None and self.catalogue.get(found).worker_class == manifest.worker_class

    def _flush_record(self) -> None:
        if self._record_path is not None:
            try:
                self._record.flush()
            except OSError as e:
                self._end_record(e)

    async def shutdown(self, grace: float = 30.0) -> None:
        """Let running calls finish, stop every instance; unfinished calls are for the next daemon."""
        if not self.shutting_down:
            self.shutting_down = True
            self.emit(ev.ShutdownRequested(now=self.now()))
        try:
            await asyncio.wait_for(self.quiet.wait(), grace)
        except TimeoutError:
            log.warning("shutdown: instances left after %.0f s are killed", grace)
        if self._wake is not None:
            self._wake.cancel()
        await self.backend.close()
        if self._keeping:
            await asyncio.wait(self._keeping, timeout=grace)
        self.tell_fetched()
        self.starts.write()
        for record in self.calls.values():
            if record.unwritten:
                self._write_failure(record)
            # Whose call is not over is told so, and asks the next daemon; the server would break off.
            record.done.set()
            record.changed.set()
        for task in list(self._tasks):
            task.cancel()
        self._end_record()


def _drop(payload: Payload) -> None:
    if payload.path is not None:
        discard(payload.path)


def _remove(paths: list[Path]) -> None:
    for path in paths:
        try:
            remove_tree(path)
        except OSError as e:  # the next daemon tries again
            log.warning("cannot remove %s: %s", path, e)


def _as_error(what: str, error: Exception) -> WoodfrogError:
    if isinstance(error, WoodfrogError):
        return error
    return SandboxError(f"{what} failed unexpectedly: {type(error).__name__}: {error}", code="unexpected")


def _lean(spec: FunctionSpec, *, gpu: bool) -> FunctionSpec:
    """What the control machine needs of a function: its event journal shall hold nobody's secrets."""
    resources = spec.resources if gpu else replace(spec.resources, gpu=())
    return replace(spec, secrets=(), env={}, image=ImageSpec(), resources=resources)


def failure_of(record: CallRecord) -> WoodfrogError:
    """The error of a call that ended without an answer of the user's."""
    return error_from_dict(record.error or {"message": "the call ended without an answer"})
