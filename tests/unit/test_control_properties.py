"""Random life of the control machine against a model of the backend: what must hold whatever happens."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from woodfrog.control.events import (
    Action,
    AppDeployed,
    AppStopped,
    CallCancelled,
    CallFinished,
    CallSubmitted,
    CaptureFailed,
    CloseCall,
    Event,
    FillMemory,
    FinishCall,
    GpusSetAside,
    InstanceExited,
    InstanceParked,
    InstanceReady,
    InstanceStage,
    InstanceStopped,
    InstanceStopRequested,
    KillInstance,
    MemorySeen,
    ParkInstance,
    RestoreFailed,
    RetireSnapshot,
    RetryCall,
    RunCall,
    ShutdownRequested,
    SnapshotAvailable,
    SnapshotCaptured,
    SnapshotInvalidated,
    SnapshotRequested,
    StartFailed,
    StartInstance,
    StartRefused,
    StopInstance,
    Tick,
    WakeAt,
    WakeInstance,
)
from woodfrog.control.gpus import Gpu, possible
from woodfrog.control.machine import handle
from woodfrog.control.replay import journal_header, journal_line, replay
from woodfrog.control.state import Config, State
from woodfrog.spec import FunctionSpec, MethodSpec, Resources, RetryPolicy, ScalingPolicy, SnapshotPolicy, SourceSpec

ERROR = {"type": "InstanceCrashed", "code": "crashed", "message": "gone", "retryable": False, "fields": {}}
APPS = ("a", "b")
TAGS = ("f", "C")

policies = st.builds(
    ScalingPolicy,
    min_containers=st.integers(0, 1),
    max_containers=st.sampled_from([None, 1, 2]),
    buffer_containers=st.integers(0, 1),
    scaledown_window=st.sampled_from([0.0, 2.0, 60.0]),
    single_use=st.booleans(),
)
retries = st.builds(
    RetryPolicy, max_retries=st.integers(0, 2), initial_delay=st.sampled_from([0.0, 1.0]), max_delay=st.just(3.0)
)
specs = st.tuples(
    *[
        st.builds(
            FunctionSpec,
            tag=st.just(tag),
            kind=st.just("function" if tag == "f" else "class"),
            source=st.just(SourceSpec("module", "m", tag)),
            methods=st.just((MethodSpec("f"),) if tag == "f" else (MethodSpec("run"), MethodSpec("gen", True))),
            snapshot=st.builds(SnapshotPolicy, enabled=st.booleans(), gpu=st.booleans()),
            resources=st.builds(Resources, gpu=st.sampled_from([(), (), ("any",), ("A:2", "B"), ("B",), ("Z",)])),
            scaling=policies,
            retries=retries,
            timeout=st.sampled_from([5.0, 300.0]),
            startup_timeout=st.sampled_from([5.0, 300.0]),
        )
        for tag in TAGS
    ]
)
configs = st.builds(
    Config,
    max_instances=st.integers(1, 6),
    max_starting=st.integers(1, 3),
    max_thawing=st.integers(1, 3),
    snapshot_failures=st.integers(1, 3),
    capture_attempts=st.integers(1, 3),
    start_attempts=st.integers(1, 3),
    parked=st.integers(0, 2),
    park_window=st.sampled_from([3.0, 3600.0]),
    gpus=st.sampled_from([(), (Gpu("1", "A"), Gpu("2", "A"), Gpu("3", "B"))]),
    drain_calls=st.integers(0, 2),
    abreast=st.integers(1, 3),
)
MIB = 1 << 20
TAKES = {"f": 60 * MIB, "C": 120 * MIB}
"""What an instance of each function takes, from its start on: never more than is expected of it at first."""
memories = st.sampled_from([None, None, 100 * MIB, 250 * MIB, 1000 * MIB])
"""Of the machine; None = nobody looks."""


@dataclass
class Box:
    """An instance as the backend sees it."""

    id: str
    service: str
    group: tuple[str, str, str]
    """Key, parameters, and the chip where its snapshots hold GPU memory."""
    mode: str
    snapshot: str | None
    capturing: bool
    park: bool = False
    parked: bool = False
    up: bool = False
    thawing: bool = False
    """Its memory is being restored: the user's own part has not begun."""
    ending: bool = False
    call: str | None = None
    gpus: tuple[str, ...] = ()
    filled: bool = False

    @property
    def takes(self) -> int:
        """Parked it is asleep; being thawed for that, too."""
        return 0 if self.park else TAKES[self.service.partition("/")[2].partition("@")[0]]


@dataclass
class Backend:
    """Carries out the machine's actions and checks that they make sense."""

    state: State
    memory: int | None = None
    now: float = 0.0
    wake: float = float("inf")
    boxes: dict[str, Box] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    open: set[str] = field(default_factory=set)
    """Submitted calls that have not ended."""
    journal: list[str] = field(default_factory=list)
    snapshots: int = 0
    retired: set[str] = field(default_factory=set)
    chips: dict[str, str] = field(default_factory=dict)
    """By snapshot: whose GPU memory it holds."""
    shutdown: bool = False
    storing: dict[str, Box] = field(default_factory=dict)
    """What has come up and whose snapshot is still on its way to disk, also of those that are gone."""

    def send(self, event: Event) -> tuple[Action, ...]:
        if isinstance(event, CallSubmitted):
            self.open.add(event.call_id)
        if isinstance(event, Tick):
            self.wake = float("inf")
        actions = handle(self.state, event)
        for box in self.storing.values():
            # Of a service that nothing is left of the machine forgets all, also what is on its way.
            box.capturing &= box.group[0] in self.state.knowledge
        self.journal.append(journal_line(event, actions))
        for action in actions:
            self.carry_out(action)
        assert not any(isinstance(a, WakeAt) for a in actions[:-1])
        return actions

    def carry_out(self, action: Action) -> None:
        match action:
            case StartInstance():
                assert not self.shutdown
                assert action.instance_id not in self.seen
                assert (action.snapshot_id is not None) == (action.mode == "restore")
                assert action.snapshot_id not in self.retired
                assert not (action.capture and action.mode == "restore")
                service = self.state.services[action.service_id]
                self.seen.add(action.instance_id)
                chips = {g.chip for g in self.state.config.gpus if g.id in action.gpus}
                assert len(chips) <= 1
                chip = next(iter(chips), "") if service.spec.snapshot.gpu else ""
                assert self.chips.get(action.snapshot_id or "", chip) == chip, "of another chip"
                self.boxes[action.instance_id] = Box(
                    action.instance_id,
                    action.service_id,
                    (service.key, action.params_digest, chip),
                    action.mode,
                    action.snapshot_id,
                    action.capture,
                    gpus=action.gpus,
                    thawing=action.mode == "restore",
                )
                wish = service.spec.resources.gpu
                assert bool(action.gpus) == (bool(wish) and possible(wish, self.state.config.gpus))
                well = [g for g in self.state.config.gpus if g.id not in self.state.sick]
                assert not set(action.gpus) & self.state.sick.keys() or not possible(wish, well)
            case ParkInstance():
                assert not self.shutdown
                assert action.instance_id not in self.seen
                assert action.snapshot_id not in self.retired
                service = self.state.services[action.service_id]
                assert service.active
                self.seen.add(action.instance_id)
                key = (service.key, action.params_digest, "")
                self.boxes[action.instance_id] = Box(
                    action.instance_id,
                    action.service_id,
                    key,
                    "restore",
                    action.snapshot_id,
                    False,
                    park=True,
                    thawing=True,
                )
            case WakeInstance():
                box = self.boxes[action.instance_id]
                box.thawing = False
                assert box.parked and not box.ending and not self.shutdown
                box.park = box.parked = False
            case RunCall():
                box = self.boxes[action.instance_id]
                assert box.up and not box.ending and box.call is None and not self.shutdown
                assert action.call_id in self.open
                assert all(b.call != action.call_id or b.ending for b in self.boxes.values())
                call = self.state.calls.get(action.call_id)
                if call is not None and call.group.service.id != box.service:
                    self.check_rolling(box, call.group.service.id, call.group.digest)
                box.call = action.call_id
            case CloseCall():
                box = self.boxes[action.instance_id]
                assert box.call == action.call_id and not box.ending and action.call_id not in self.open
            case StopInstance():
                box = self.boxes[action.instance_id]
                assert box.up and not box.ending and (box.call is None or box.call not in self.open)
                box.ending = True
            case KillInstance():
                self.boxes[action.instance_id].ending = True
            case FillMemory():
                box = self.boxes[action.instance_id]
                assert box.up and not box.ending and not box.filled
                box.filled = True
            case FinishCall():
                assert action.call_id in self.open
                assert (action.error is None) == (action.outcome == "success")
                self.open.remove(action.call_id)
            case RetryCall():
                assert action.call_id in self.open
                assert 1 <= action.attempt < action.attempts
            case RetireSnapshot():
                self.retired.add(action.snapshot_id)
            case WakeAt():
                self.wake = action.time

    def check_rolling(self, box: Box, service_id: str, digest: str) -> None:
        """An older version may serve a newer one's calls only until that has an instance ready."""
        old, new = (self.state.services.get(i) for i in (box.service, service_id))
        assert old is not None and new is not None
        assert (old.app, old.tag) == (new.app, new.tag) and old.version < new.version
        assert not old.active and new.active
        assert not [
            b for b in self.boxes.values() if (b.service, b.group[1]) == (service_id, digest) and b.up and not b.ending
        ]

    def check(self) -> None:
        config = self.state.config
        assert len(self.boxes) <= config.max_instances
        cold = [b for b in self.boxes.values() if b.mode == "cold" and not b.up and not b.ending]
        assert len(cold) <= config.max_starting
        thawing = [b for b in self.boxes.values() if b.thawing and not (b.up or b.parked or b.ending)]
        assert len(thawing) <= config.max_thawing
        given = [gpu for b in self.boxes.values() for gpu in b.gpus]
        assert len(given) == len(set(given)), "one GPU, two instances"
        capturing = [b.group for b in (self.boxes | self.storing).values() if b.capturing]
        assert len(capturing) == len(set(capturing))
        for service in self.state.services.values():
            limit = service.spec.scaling.max_containers
            assert limit is None or sum(b.service == service.id for b in self.boxes.values()) <= limit
        if self.memory is not None:
            taking = [b.takes for b in self.boxes.values() if b.takes]
            assert sum(taking) <= self.memory or len(taking) == 1, "more than there is"
        self.check_books()

    def look(self) -> None:
        """Everybody's memory is looked at."""
        if self.memory is not None:
            used = {b.id: b.takes for b in self.boxes.values() if b.up or b.ending}
            available = max(self.memory - sum(used.values()), 0)
            self.send(MemorySeen(now=self.now, total=self.memory, available=available, used=used))

    def check_books(self) -> None:
        """The machine's counters against what they count."""
        state = self.state
        assert set(state.instances) == set(self.boxes)
        assert set(state.calls) == self.open
        assert state.stopping == sum(i.state == "stopping" for i in state.instances.values())
        assert set(state.parked) == {i.id for i in state.instances.values() if i.state == "parked"}
        assert set(state.parked) == {b.id for b in self.boxes.values() if b.parked and not b.ending}
        assert set(state.idle) == {i.id for i in state.instances.values() if i.state == "idle"}
        assert state.cold_starting == sum(
            i.state in ("starting", "capturing") and i.mode == "cold" for i in state.instances.values()
        )
        for service in state.services.values():
            mine = [i for i in state.instances.values() if i.group.service is service]
            assert service.instances == len(mine)
            assert service.stopping == sum(i.state == "stopping" for i in mine)
            assert service.calls == sum(c.group.service is service for c in state.calls.values())
            for group in service.groups.values():
                states = [i.state for i in group.instances.values()]
                assert group.starting + group.parking == states.count("starting") + states.count("capturing")
                assert group.parking == sum(i.park for i in group.instances.values() if i.state == "starting")
                assert set(group.parked) == {i.id for i in group.instances.values() if i.state == "parked"}
                assert not group.parked or not group.queue or state.now < group.hold_calls or group.hungry
                assert not group.hungry or self.memory is not None
                assert (group.running, group.stopping) == (states.count("running"), states.count("stopping"))
                assert set(group.idle) == {i.id for i in group.instances.values() if i.state == "idle"}
                assert not (group.queue and group.idle)
                elder = group.elder
                assert not (group.standby and (group.warm or group.heir is None))
                if elder is not None:
                    assert elder.heir is group and elder.elder is None and group.heir is None
                    assert not elder.service.active and service.active and elder.digest == group.digest
                    assert not group.warm
                    methods = elder.service.generators
                    assert not (elder.idle and any(c.method in methods for c in group.queue.values()))
                assert group.heir is None or group.heir.elder is group
                assert service.active or not group.idle or group.heir is not None
                assert group.calls == sum(c.group is group for c in state.calls.values())
        assert sum(s.instances for s in state.services.values()) == len(state.instances)

    # One step of the backend for one box; `fate` chooses among what may happen.

    def step(self, box: Box, fate: int) -> None:
        now = self.now
        if box.ending:
            if fate % 4 == 3 and box.call is not None:
                # What was under way when it was killed still comes in.
                self.send(CallFinished(now=now, call_id=box.call, instance_id=box.id, outcome="success"))
                return
            if fate % 4 == 2 and box.park and not box.parked:
                self.send(InstanceParked(now=now, instance_id=box.id))
                return
            if fate % 4 == 2 and not box.up and not box.park:
                self.send(InstanceReady(now=now, instance_id=box.id))
                return
            self.gone(box)
            if fate % 4 == 1:
                self.send(InstanceExited(now=now, instance_id=box.id, error=ERROR))
            else:
                self.send(InstanceStopped(now=now, instance_id=box.id))
        elif box.call is not None:
            call, outcome = box.call, ("success", "success", "exception", "failure", "exit", "bad")[fate % 6]
            if outcome == "exit":
                self.gone(box)
                self.send(InstanceExited(now=now, instance_id=box.id, error=ERROR))
                return
            box.call = None
            self.send(
                CallFinished(
                    now=now,
                    call_id=call,
                    instance_id=box.id,
                    outcome="success" if outcome == "bad" else outcome,  # type: ignore[arg-type]
                    error=None if outcome in ("success", "bad") else ERROR,
                    instance_ok=outcome != "bad",
                )
            )
        elif box.up or box.parked:
            if fate % 4 == 3:
                self.gone(box)
                self.send(InstanceExited(now=now, instance_id=box.id, error=ERROR))
        else:
            self.start_step(box, fate)

    def start_step(self, box: Box, fate: int) -> None:
        now = self.now
        if self.state.sick.keys() & set(box.gpus):
            # It is looked at before it is used: it is well again, or the start is refused.
            if fate % 2:
                self.gone(box)
                self.send(StartRefused(now=now, instance_id=box.id, error=ERROR))
            else:
                sick = {gpu: why for gpu, why in self.state.sick.items() if gpu not in box.gpus}
                self.send(GpusSetAside(now=now, sick=sick))
            return
        match fate % 8:
            case 4:
                self.gone(box)
                self.send(StartFailed(now=now, instance_id=box.id, error=ERROR, user_fault=bool(fate & 8)))
            case 5:
                self.gone(box)
                self.send(InstanceExited(now=now, instance_id=box.id, error=ERROR))
            case 6 if box.snapshot:
                self.gone(box)
                event = RestoreFailed(
                    now=now,
                    instance_id=box.id,
                    snapshot_id=box.snapshot,
                    reason="x",
                    at_fault=bool(fate & 8),
                    gpu=bool(box.gpus) and not fate & 8,
                )
                self.send(event)
            case 6 if box.capturing:
                box.capturing = False
                alive = bool(fate & 8)
                if not alive:
                    self.gone(box)
                self.send(CaptureFailed(now=now, instance_id=box.id, reason="x", alive=alive))
            case 7:
                stage = "capturing" if box.capturing else "restoring" if box.snapshot and fate & 8 else "enter"
                box.thawing &= stage == "restoring"
                self.send(InstanceStage(now=now, instance_id=box.id, stage=stage))
            case 3 if box.capturing:
                self.storing[box.id] = box
                box.up = True
                self.send(InstanceReady(now=now, instance_id=box.id))
            case _ if box.capturing:
                box.capturing = False
                self.snapshots += 1
                box.snapshot = f"s{self.snapshots}"
                self.chips[box.snapshot] = box.group[2]
                self.send(SnapshotCaptured(now=now, instance_id=box.id, snapshot_id=box.snapshot))
            case _ if box.park:
                box.parked = True
                self.send(InstanceParked(now=now, instance_id=box.id))
            case _:
                box.up = True
                self.send(InstanceReady(now=now, instance_id=box.id))

    def stored(self, box: Box, well: bool) -> None:
        """Its snapshot came to the disk, or did not; it may be gone by now."""
        del self.storing[box.id]
        box.capturing = False
        if not well:
            self.send(CaptureFailed(now=self.now, instance_id=box.id, reason="x", alive=True))
            return
        self.snapshots += 1
        self.chips[f"s{self.snapshots}"] = box.group[2]
        self.send(SnapshotCaptured(now=self.now, instance_id=box.id, snapshot_id=f"s{self.snapshots}"))

    def gone(self, box: Box) -> None:
        del self.boxes[box.id]

    def settle(self, until: float) -> None:
        """Everything succeeds from here on, until nothing is under way and no timer is left before `until`."""
        for turn in range(5000):
            if turn % 3 == 0:
                self.look()
            busy = [b for b in self.boxes.values() if b.ending or b.call or not (b.up or b.parked)]
            if busy:
                self.step(busy[0], 0)
            elif self.storing:
                self.stored(next(iter(self.storing.values())), True)
            elif self.wake <= until:
                self.now = max(self.now, self.wake)
                self.send(Tick(now=self.now))
            else:
                self.now = until
                return
            self.check()
        raise AssertionError("never comes to rest")


class Life(RuleBasedStateMachine):
    backend: Backend
    versions: dict[str, int]
    calls: int

    @initialize(config=configs, specs=specs, memory=memories)
    def begin(self, config: Config, specs: tuple[FunctionSpec, ...], memory: int | None) -> None:
        self.config = config
        self.backend = Backend(State(config, "t"), memory)
        self.backend.look()
        self.versions = {}
        self.calls = 0
        self.deploy("a", specs, False)

    @rule(
        app=st.sampled_from(APPS),
        specs=specs,
        shared=st.booleans(),
        rolling=st.sampled_from([True, True, False]),
        standby=st.dictionaries(st.sampled_from(TAGS), st.sampled_from([("",), ("", "p")]), max_size=1),
    )
    def deploy(
        self,
        app: str,
        specs: tuple[FunctionSpec, ...],
        shared: bool,
        rolling: bool = True,
        standby: dict[str, tuple[str, ...]] | None = None,
    ) -> None:
        version = self.versions[app] = self.versions.get(app, 0) + 1
        keys = {t: f"{t}-shared" if shared else f"{app}-{t}-{version}" for t in TAGS}
        self.backend.send(
            AppDeployed(
                now=self.backend.now,
                app=app,
                version=version,
                specs=specs,
                keys=keys,
                rolling=rolling,
                standby=standby or {},
            )
        )

    @rule(app=st.sampled_from(APPS))
    def stop_app(self, app: str) -> None:
        self.backend.send(AppStopped(now=self.backend.now, app=app))
        assert not any(c.group.service.app == app for c in self.backend.state.calls.values())

    @rule(
        app=st.sampled_from(APPS),
        what=st.sampled_from([("f", "f", ""), ("C", "run", ""), ("C", "run", "p"), ("C", "gen", "q"), ("x", "y", "")]),
        count=st.integers(1, 4),
    )
    def submit(self, app: str, what: tuple[str, str, str], count: int) -> None:
        for _ in range(count):
            self.calls += 1
            tag, method, digest = what
            self.backend.send(
                CallSubmitted(
                    now=self.backend.now,
                    call_id=f"c{self.calls}",
                    app=app,
                    tag=tag,
                    method=method,
                    params_digest=digest,
                )
            )

    @precondition(lambda self: self.calls)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        call = f"c{data.draw(st.integers(1, self.calls))}"
        self.backend.send(CallCancelled(now=self.backend.now, call_id=call))
        assert call not in self.backend.open

    @precondition(lambda self: self.backend.boxes)
    @rule(data=st.data(), steps=st.integers(1, 6))
    def progress(self, data: st.DataObject, steps: int) -> None:
        for _ in range(steps):
            if not self.backend.boxes:
                return
            box = self.backend.boxes[data.draw(st.sampled_from(list(self.backend.boxes)))]
            self.backend.step(box, data.draw(st.integers(0, 15)))
            self.backend.check()

    @precondition(lambda self: self.backend.storing)
    @rule(data=st.data(), well=st.booleans())
    def store(self, data: st.DataObject, well: bool) -> None:
        self.backend.stored(self.backend.storing[data.draw(st.sampled_from(list(self.backend.storing)))], well)
        self.backend.check()

    @rule(seconds=st.sampled_from([0.1, 1.0, 10.0, 100.0]))
    def time_passes(self, seconds: float) -> None:
        until = self.backend.now + seconds
        for _ in range(500):
            if self.backend.wake > until:
                break
            self.backend.now = max(self.backend.now, self.backend.wake)
            self.backend.send(Tick(now=self.backend.now))
            self.backend.check()
        else:
            raise AssertionError("wakes for ever")
        self.backend.now = until

    @rule(app=st.sampled_from(APPS), tag=st.sampled_from(TAGS), digest=st.sampled_from(["", "p"]))
    def request_snapshot(self, app: str, tag: str, digest: str) -> None:
        self.backend.send(SnapshotRequested(now=self.backend.now, app=app, tag=tag, params_digest=digest))

    @rule(
        app=st.sampled_from(APPS),
        tag=st.sampled_from(TAGS),
        digest=st.sampled_from(["", "p"]),
        chip=st.sampled_from(["", "A", "B"]),
    )
    def snapshot_found(self, app: str, tag: str, digest: str, chip: str) -> None:
        self.backend.snapshots += 1
        self.backend.chips[f"s{self.backend.snapshots}"] = chip
        self.backend.send(
            SnapshotAvailable(
                now=self.backend.now,
                app=app,
                tag=tag,
                params_digest=digest,
                snapshot_id=f"s{self.backend.snapshots}",
                chip=chip,
            )
        )

    @precondition(lambda self: self.backend.memory is not None)
    @rule()
    def look(self) -> None:
        self.backend.look()

    @precondition(lambda self: self.config.gpus)
    @rule(sick=st.sets(st.sampled_from("123")))
    def set_aside(self, sick: set[str]) -> None:
        self.backend.send(GpusSetAside(now=self.backend.now, sick=dict.fromkeys(sorted(sick), "x")))

    @precondition(lambda self: self.backend.snapshots)
    @rule(data=st.data())
    def invalidate(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(1, self.backend.snapshots))
        self.backend.send(SnapshotInvalidated(now=self.backend.now, snapshot_id=f"s{number}"))
        self.backend.retired.add(f"s{number}")

    @precondition(lambda self: self.backend.boxes)
    @rule(data=st.data())
    def stop_by_hand(self, data: st.DataObject) -> None:
        box = data.draw(st.sampled_from(list(self.backend.boxes)))
        self.backend.send(InstanceStopRequested(now=self.backend.now, instance_id=box))

    @precondition(lambda self: self.backend.seen)
    @rule(data=st.data())
    def late_event(self, data: st.DataObject) -> None:
        gone = sorted(self.backend.seen - set(self.backend.boxes))
        if gone:
            inst = data.draw(st.sampled_from(gone))
            event = data.draw(
                st.sampled_from(
                    [
                        InstanceReady(now=self.backend.now, instance_id=inst),
                        InstanceParked(now=self.backend.now, instance_id=inst),
                        InstanceStopped(now=self.backend.now, instance_id=inst),
                        StartRefused(now=self.backend.now, instance_id=inst, error=ERROR),
                        SnapshotCaptured(now=self.backend.now, instance_id=inst, snapshot_id="s0"),
                        CallFinished(now=self.backend.now, instance_id=inst, call_id="c1", outcome="success"),
                    ]
                )
            )
            actions = self.backend.send(event)
            assert all(isinstance(a, WakeAt) for a in actions)

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "backend"):
            self.backend.check()
            json.dumps(self.backend.state.snapshot_view())

    def teardown(self) -> None:
        if not hasattr(self, "backend"):
            return
        backend, state = self.backend, self.backend.state
        # Half of the runs end by a shutdown, the others by coming to rest.
        if self.calls % 2:
            backend.shutdown = True
            backend.send(ShutdownRequested(now=backend.now))
            backend.settle(backend.now + 10_000)
            assert not state.instances
        else:
            backend.settle(backend.now + 10_000)
            assert not backend.open
            floors = {
                s.id: min(s.spec.scaling.min_containers, s.spec.scaling.max_containers or 1)
                for s in state.services.values()
                if s.active
            }
            assert all(s.active for s in state.services.values())
            wishes = any(s.spec.resources.gpu for s in state.services.values())
            short = self.backend.memory is not None
            if sum(floors.values()) <= self.config.max_instances and not (wishes and self.config.gpus) and not short:
                assert {s.id: s.instances for s in state.services.values()} == floors
            assert len(backend.boxes) <= sum(floors.values())
        for app in APPS:
            backend.send(AppStopped(now=backend.now, app=app))
        backend.settle(backend.now + 10_000)
        assert not backend.boxes and not backend.open
        assert not state.apps and not state.services and not state.knowledge and not state.starved and not state.idle
        _, count, difference = replay([journal_header(self.config, "t"), *backend.journal])
        assert difference is None, str(difference)
        assert count == len(backend.journal)


Life.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestLife = Life.TestCase
