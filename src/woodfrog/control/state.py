"""What the machine knows: apps, services, groups, calls, instances, snapshots. Only `machine.handle` changes it."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, Literal

from woodfrog.control.events import Action
from woodfrog.control.gpus import Gpu
from woodfrog.spec import FunctionSpec

__all__ = [
    "App",
    "Call",
    "Config",
    "Group",
    "Instance",
    "InstanceState",
    "Knowledge",
    "Load",
    "Memory",
    "Service",
    "State",
    "WhyCold",
]

HISTORY = 20
"""Transitions kept per call and instance, for the story in an error."""

PROVEN_S = 5.0
"""A call that has run for so long without taking more memory probably has what it needs."""
KNOWN_S = 2.0
"""An instance that is there for so long tells something of a function of which nothing was known."""

InstanceState = Literal["starting", "capturing", "parked", "idle", "running", "stopping"]
WhyCold = Literal["", "off", "none-fits", "being-made", "gave-up", "did-not-thaw", "gpu-full"]
"""Why a start is cold. "" = it is not."""
CallState = Literal["queued", "running", "waiting_retry"]
NEVER = float("inf")


@dataclass(frozen=True)
class Config:
    """Limits. Times in seconds."""

    max_instances: int = 64
    """Of the whole machine, those being stopped included."""
    max_starting: int = 8
    """Cold starts at the same time."""
    max_thawing: int = 64
    """Snapshots that are restored at the same time, for calls that wait. A restore is bound by the processors: more at
    once end no sooner all together, and the first of them later; what is up by then answers calls of the others."""
    snapshot_failures: int = 3
    """Failed restores in a row after which a snapshot is retired."""
    capture_attempts: int = 3
    """Failed captures and retired snapshots after which a function goes without."""
    start_attempts: int = 3
    """Failed starts in a row (not by the user's code) after which the waiting calls fail."""
    start_backoff: float = 0.5
    """Pause after a failed start; doubles with each."""
    max_backoff: float = 60.0
    """Longest pause between starts that no call waits for."""
    stop_grace: float = 30.0
    """Time for exit hooks; then the instance is killed."""
    close_grace: float = 10.0
    """Time for a generator to end once it is closed; then its instance is killed."""
    shutdown_grace: float = 30.0
    """Time that running calls get once the daemon is to stop."""
    give_way: float = 5.0
    """A busy group gives up an instance to one that a limit has kept waiting so long with fewer."""
    just_used: float = 10.0
    """Who called so shortly before a deploy is expected to call again: should the new version not start, the old one
    serves."""
    parked: int = 0
    """Parked instances of each function that was used within `park_window`."""
    park_window: float = 3600.0
    """How long after its last call a function keeps parked instances."""
    park_delay: float = 1.0
    """Pause after a start before parked instances are replaced: whoever waits for a call needs the processor more."""
    park_retry: float = 5.0
    """Pause after one could not be parked, or was lost."""
    park_full: float = 60.0
    """Pause where a limit leaves no room for parked instances."""
    gpus: tuple[Gpu, ...] = ()
    """Of the whole machine. Without any, functions that ask for one are started all the same, and told."""
    keep_finished: int = 1000
    """Outcomes of finished calls that are remembered."""
    drain_calls: int = 8
    """After so many calls the rest of a thawed instance's memory is filled in, where there is room for it."""
    abreast: int = 8
    """Cold starts of one function at the same time while its first snapshot is on its way, or before anything is known
    of what it takes: more of them do the same work on the same processors."""


@dataclass(frozen=True)
class Memory:
    """What the machine has for instances, in bytes."""

    total: int
    available: int
    """Nobody uses it, and a margin is taken off; what instances were promised is still in it."""


@dataclass(slots=True, eq=False)
class Knowledge:
    """What is known about the snapshot of one function key and one set of constructor parameters, and where it holds
    GPU memory, of one chip."""

    snapshot_id: str | None = None
    used: bool = False
    """A call was answered by an instance of `snapshot_id`: what such calls need of its memory is known."""
    capturer: str | None = None
    """Id of the instance that captures, or is to capture; it stays until that is done or the instance gone, and of one
    that is gone until its snapshot is on disk."""
    size: int = 0
    """Memory that `snapshot_id` holds, in bytes: a copy that has all of it in takes so much, and shares none of it."""
    need: int = 0
    """Memory that such instances were seen to take once they are up, in bytes; 0 = none was seen."""
    boot: int = 0
    """The most that one was seen to take while it booted."""
    failures: int = 0
    """Restores of `snapshot_id` that failed in a row."""
    attempts: int = 0
    """Failed captures and retired snapshots since a restored instance last came up."""
    reason: str = ""
    """Of the last failure."""
    gave_up: bool = False

    def view(self) -> dict[str, Any]:
        state = (
            "available"
            if self.snapshot_id
            else "capturing"
            if self.capturer
            else "gave-up"
            if self.gave_up
            else "failed"
            if self.attempts
            else "none"
        )
        return {
            "state": state,
            "snapshot": self.snapshot_id,
            "capturer": self.capturer,
            "attempts": self.attempts,
            "restore_failures": self.failures,
            "reason": self.reason,
        }


@dataclass(slots=True, eq=False)
class Call:
    id: str
    group: Group
    method: str
    submitted_at: float
    retryable: bool
    """Generators are not run again: their first items may have been consumed."""
    state: CallState = "queued"
    attempts: int = 0
    instance: Instance | None = None
    retry_at: float = 0.0
    history: list[tuple[float, str, str]] = field(default_factory=list)

    def view(self) -> dict[str, Any]:
        service = self.group.service
        return {
            "id": self.id,
            "app": service.app,
            "tag": service.tag,
            "version": service.version,
            "method": self.method,
            "params_digest": self.group.digest,
            "state": self.state,
            "attempts": self.attempts,
            "submitted_at": self.submitted_at,
            "instance": self.instance.id if self.instance else None,
            "retry_at": self.retry_at if self.state == "waiting_retry" else None,
        }


@dataclass(slots=True, eq=False)
class Instance:
    id: str
    group: Group
    mode: Literal["cold", "restore"]
    snapshot_id: str | None
    """The snapshot it was thawed from, or the one made of it."""
    capture: bool
    """It captures, or is to capture, or its snapshot is still on its way to disk."""
    started_at: float
    since: float
    """When it came into its present state."""
    born: int
    """Number of the event that started it."""
    park: bool = False
    """It is to be parked, or is."""
    gpus: tuple[str, ...] = ()
    """Its own until it is gone."""
    chip: str = ""
    """Of its GPUs, where its snapshots hold their memory."""
    state: InstanceState = "starting"
    stage: str = ""
    call: Call | None = None
    closing: str | None = None
    """A generator's call that is over, while its code still runs here."""
    served: int = 0
    need: int = 0
    """Memory it is expected to take, in bytes."""
    used: int = 0
    """Memory it took when that was looked at last."""
    seen: bool = False
    """Whether that was since it came up, or began to go."""
    high: int = 0
    """The most that was seen of it since it came up."""
    grown: int = 0
    grew_at: float = -NEVER
    """When it was last seen to have grown, and to what."""
    served_at: float = NEVER
    """When it had served its first call."""
    whole: bool = False
    """All of its memory is in, or is being filled in."""
    fills_until: float = -NEVER
    """By then that is over."""
    storing: bool = False
    """It has come up, and its snapshot is still on its way to disk; how that ends is told also when it is gone."""
    killed: bool = False
    reason: str = ""
    """Why it is being stopped."""
    why_cold: WhyCold = ""
    deadline: float = NEVER
    """When its present state has lasted too long."""
    armed: float = NEVER
    """Time of its entry in the heap: at or before `deadline`."""
    history: list[tuple[float, str, str]] = field(default_factory=list)

    @property
    def promised(self) -> int:
        """Memory that it will take beside what it has, in bytes. One that rests is not expected to grow."""
        if self.park or (self.seen and self.state in ("idle", "stopping")):
            return 0
        return max(self.need - self.used, 0)

    def proven(self, now: float) -> bool:
        """Whether what it took at that time tells what a call takes."""
        return self.served_at <= now or (self.state == "running" and now - max(self.since, self.grew_at) >= PROVEN_S)

    def known(self, now: float) -> bool:
        """Whether it is there for long enough to tell anything."""
        return self.proven(now) or now - self.started_at >= KNOWN_S

    def view(self) -> dict[str, Any]:
        service = self.group.service
        return {
            "id": self.id,
            "app": service.app,
            "tag": service.tag,
            "version": service.version,
            "params_digest": self.group.digest,
            "state": self.state,
            "mode": self.mode,
            "gpus": list(self.gpus),
            "stage": self.stage,
            "capture": self.capture,
            "snapshot": self.snapshot_id,
            "call": self.call.id if self.call else None,
            "started_at": self.started_at,
            "since": self.since,
            "served": self.served,
            "memory": {"need": self.need, "used": self.used},
            "reason": self.reason,
        }


@dataclass(slots=True, eq=False)
class Group:
    """The interchangeable instances of a service: one set of constructor parameters."""

    service: Service
    digest: str
    queue: OrderedDict[str, Call] = field(default_factory=OrderedDict)
    idle: OrderedDict[str, Instance] = field(default_factory=OrderedDict)
    """Oldest first. The newest serves next, so that the others can go."""
    parked: OrderedDict[str, Instance] = field(default_factory=OrderedDict)
    """Oldest first."""
    instances: dict[str, Instance] = field(default_factory=dict)
    calls: int = 0
    """Unfinished: queued, running or waiting for a retry."""
    parking: int = 0
    """Starts that end parked; not counted in `starting`."""
    starting: int = 0
    running: int = 0
    stopping: int = 0
    last_load: float = -NEVER
    force_cold: int = 0
    """So many of the next starts are in place of failed restores."""
    thaw_error: str = ""
    """Of the last of these restores."""
    no_room: frozenset[str] = frozenset()
    """GPUs on which its snapshot could not be restored lately, through no fault of its own."""
    capture_wanted: bool = False
    """Someone asked for a snapshot."""
    start_failures: int = 0
    """In a row."""
    start_error: str = ""
    """Of the last of them."""
    hopeless: bool = False
    """It was the user's fault, or there were too many: calls that wait fail."""
    failure_seq: int = 0
    """Event of the last failed start that counted: those begun before it belong to the same burst."""
    hold_calls: float = -NEVER
    """No start before this time for waiting calls."""
    hold_spares: float = -NEVER
    """No start before this time for anything else."""
    hold_parks: float = -NEVER
    """Nothing is parked before this time."""
    parks_timer: float = -NEVER
    """Time of the latest entry in the heap for that."""
    starved_since: float = NEVER
    hungry_since: float = NEVER
    """Since when it is memory that keeps its calls waiting."""
    hungry_need: int = 0
    """Bytes that its next instance is expected to take."""
    elder: Group | None = None
    """An older version's group whose instances serve this one's calls until one of its own is ready."""
    heir: Group | None = None
    """The group whose `elder` this is."""
    standby: bool = False
    """An elder that has no instance, and gets one when a start of its heir's fails."""
    rolls_until: float = -NEVER
    """When the elder gives way if this group still waits for room."""

    @property
    def key(self) -> tuple[str, str]:
        return (self.service.id, self.digest)

    @property
    def live(self) -> int:
        """Instances that serve or will."""
        return self.starting + len(self.idle) + self.running

    @property
    def hungry(self) -> bool:
        """Whether it is memory that keeps its calls waiting."""
        return self.hungry_since != NEVER

    @property
    def warm(self) -> bool:
        """Whether an instance serves."""
        return bool(self.idle or self.running)


@dataclass(slots=True)
class Load:
    """Calls of a function."""

    running: int = 0
    waiting: int = 0
    """For a container, or for another attempt."""
    oldest: float = NEVER
    """When the oldest of these was submitted."""

    def add(self, other: Load) -> None:
        self.running += other.running
        self.waiting += other.waiting
        self.oldest = min(self.oldest, other.oldest)


@dataclass(slots=True, eq=False)
class Service:
    """One function or class of one version of an app."""

    id: str
    app: str
    tag: str
    version: int
    spec: FunctionSpec
    key: str
    active: bool = True
    """False: drains. New calls go to a newer version."""
    groups: dict[str, Group] = field(default_factory=dict)
    generators: dict[str, bool] = field(default_factory=dict)
    """Method name to whether it is a generator."""
    calls: int = 0
    instances: int = 0
    """Those being stopped included."""
    stopping: int = 0

    def group(self, digest: str) -> Group:
        group = self.groups.get(digest)
        if group is None:
            group = self.groups[digest] = Group(self, digest)
        return group


@dataclass(slots=True, eq=False)
class App:
    name: str
    version: int
    ephemeral: bool
    stopped: bool = False
    active: dict[str, Service] = field(default_factory=dict)
    """By tag."""
    services: dict[str, Service] = field(default_factory=dict)
    """Of all versions, by id."""


class State:
    """Everything the machine remembers between events.

    Args:
        config: the limits.
        run: different at each start of the daemon; instance ids are `i-<run>-<number>`.

    Example:
        >>> state = State(Config(max_instances=8), run="k3f9")
        >>> actions = handle(state, event)
    """

    def __init__(self, config: Config | None = None, run: str = "0") -> None:
        self.config = config or Config()
        self.run = run
        self.apps: dict[str, App] = {}
        self.services: dict[str, Service] = {}
        self.calls: dict[str, Call] = {}
        """Unfinished ones."""
        self.finished: OrderedDict[str, str] = OrderedDict()
        """Outcomes of the latest finished calls."""
        self.instances: dict[str, Instance] = {}
        self.knowledge: dict[str, dict[tuple[str, str], Knowledge]] = {}
        """By function key, and then by digest of the parameters and chip."""
        self.sick: dict[str, str] = {}
        """GPUs that are set aside, and why."""
        self.memory: Memory | None = None
        """None = starts do not depend on it."""
        self.stale: dict[str, int] = {}
        """Events ignored because what they speak of is gone, by event."""
        self.shutdown_at = NEVER
        """When the calls still running are cut off; `NEVER` = no shutdown."""

        # The machine's own.
        self.now = -NEVER
        self.seq = 0
        self.event = ""
        self.out: list[Action] = []
        self.counter = 0
        self.cold_starting = 0
        self.stopping = 0
        self.idle: OrderedDict[str, Instance] = OrderedDict()
        self.parked: OrderedDict[str, Instance] = OrderedDict()
        self.starved: dict[tuple[str, str], Group] = {}
        self.freed = False
        self.yield_at = -NEVER
        self.heap: list[tuple[float, int, str, tuple[str, ...]]] = []
        self.heap_seq = 0
        self.wake = NEVER

    @property
    def shutting_down(self) -> bool:
        return self.shutdown_at != NEVER

    @property
    def memory_left(self) -> int:
        """Bytes that nobody has and nobody was promised; below 0 when too much was promised."""
        assert self.memory is not None
        return self.memory.available - sum(i.promised for i in self.instances.values())

    def find_service(self, app: str, tag: str, version: int | None = None) -> Service | None:
        """The active service of this tag, or that of `version` as long as it drains."""
        if version is not None:
            return self.services.get(f"{app}/{tag}@{version}")
        found = self.apps.get(app)
        return found.active.get(tag) if found else None

    def knows(self, service: Service, digest: str, chip: str) -> Knowledge:
        """`chip`: where snapshots hold GPU memory; they are of use on that one alone. "" = they hold none."""
        known = self.knowledge[service.key]
        knowledge = known.get((digest, chip))
        if knowledge is None:
            knowledge = known[digest, chip] = Knowledge()
        return knowledge

    def capture_view(self, app: str, tag: str) -> dict[str, Any]:
        """How it stands with the snapshot that somebody asked for: whether it is still to come, why the last attempt
        came to nothing."""
        service = self.find_service(app, tag)
        group = service.groups.get("") if service is not None else None
        if service is None or group is None:
            return {"pending": False, "snapshot": None, "reason": ""}
        known = [k for (digest, _), k in self.knowledge[service.key].items() if not digest]
        return {
            "pending": group.capture_wanted,
            "snapshot": next((k.snapshot_id for k in known if k.snapshot_id), None),
            "reason": group.start_error or next((k.reason for k in known if k.reason), ""),
        }

    def warm_view(self, app: str, tag: str) -> dict[str, Any]:
        """How it stands with the containers that `min_containers` asks for: how many of them are ready, and why the
        others cannot be."""
        service = self.find_service(app, tag)
        group = service.groups.get("") if service is not None else None
        return {
            "wanted": service.spec.scaling.min_containers if service is not None else 0,
            "ready": len(group.idle) + group.running if group is not None else 0,
            "reason": group.start_error if group is not None and group.hopeless else "",
            "no_room": group is not None and group.key in self.starved,
        }

    @property
    def starting(self) -> bool:
        """Whether any instance is on its way up."""
        return any(i.state in ("starting", "capturing") for i in self.instances.values())

    def memory_waits(self, now: float, seconds: float = 0.0) -> list[dict[str, Any]]:
        """The groups whose calls have waited for memory so long: whose, since when, and how it stands."""
        if self.memory is None:
            return []
        return [
            {
                "app": g.service.app,
                "tag": g.service.tag,
                "params_digest": g.digest,
                "since": g.hungry_since,
                "calls": len(g.queue) - g.starting,
                "containers": g.live,
                "need": g.hungry_need,
                "left": max(self.memory_left, 0),
                "total": self.memory.total,
            }
            for g in self.starved.values()
            if len(g.queue) > g.starting and now - g.hungry_since >= seconds
        ]

    def load_view(self) -> dict[tuple[str, str], Load]:
        """What each function of each app has to do just now, of all its versions; who has nothing is left out."""
        found: dict[tuple[str, str], Load] = {}
        for call in self.calls.values():
            service = call.group.service
            load = found.setdefault((service.app, service.tag), Load())
            if call.state == "running":
                load.running += 1
            else:
                load.waiting += 1
                load.oldest = min(load.oldest, call.submitted_at)
        return found

    def snapshots_view(self, app: str, tag: str) -> dict[str, Any]:
        """How it stands with the snapshots of a function: the worst of its parameters' and chips'."""
        service = self.find_service(app, tag)
        if service is None or not service.spec.snapshot.enabled:
            return {"state": "off", "snapshots": [], "reason": ""}
        known = list(self.knowledge[service.key].values())
        views = [k.view() for k in known]
        states = [v["state"] for v in views]
        state = next((s for s in ("gave-up", "failed", "capturing", "available") if s in states), "none")
        reason = next((v["reason"] for v in views if v["state"] == state), "")
        return {"state": state, "snapshots": sorted(k.snapshot_id for k in known if k.snapshot_id), "reason": reason}

    def snapshot_view(self) -> dict[str, Any]:
        """Plain dicts of everything, for the API: apps, services, queues, instances, calls, counters."""
        services = []
        for s in self.services.values():
            groups = [
                {
                    "params_digest": g.digest,
                    "queued": len(g.queue),
                    "parked": len(g.parked),
                    "parking": g.parking,
                    "starting": g.starting,
                    "idle": len(g.idle),
                    "running": g.running,
                    "stopping": g.stopping,
                    "calls": g.calls,
                    "start_failures": g.start_failures,
                    "starved": g.key in self.starved,
                    "memory_short_since": g.hungry_since if g.hungry else None,
                    "elder": g.elder.service.version if g.elder else None,
                    "snapshot": self.knowledge[s.key].get((g.digest, ""), Knowledge()).view(),
                    "chips": {c: k.view() for (d, c), k in self.knowledge[s.key].items() if c and d == g.digest},
                }
                for g in s.groups.values()
            ]
            services.append(
                {
                    "id": s.id,
                    "app": s.app,
                    "tag": s.tag,
                    "version": s.version,
                    "key": s.key,
                    "state": "active" if s.active else "draining",
                    "instances": s.instances,
                    "calls": s.calls,
                    "groups": groups,
                }
            )
        return {
            "apps": [
                {
                    "name": a.name,
                    "version": a.version,
                    "state": "stopped" if a.stopped else "ephemeral" if a.ephemeral else "deployed",
                    "functions": sorted(a.active),
                    "services": list(a.services),
                }
                for a in self.apps.values()
            ],
            "services": services,
            "instances": [i.view() for i in self.instances.values()],
            "calls": [c.view() for c in self.calls.values()],
            "gpus_set_aside": dict(self.sick),
            "memory": None
            if self.memory is None
            else {"total": self.memory.total, "available": self.memory.available, "left": self.memory_left},
            "stale": dict(self.stale),
            "shutting_down": self.shutting_down,
        }
