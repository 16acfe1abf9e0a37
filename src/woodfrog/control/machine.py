"""The control machine: `handle(state, event) -> actions`. The same events always yield the same actions.

A call takes the newest idle instance of its group, else it queues (first in, first out) and an instance is started.
Here is what each event means; what follows from it is made of the moves in `moves.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop
from typing import Any

from woodfrog.control import memory, moves
from woodfrog.control.events import (
    Action,
    AppDeployed,
    AppStopped,
    CallCancelled,
    CallFinished,
    CallSubmitted,
    CaptureFailed,
    Event,
    FinishCall,
    GpusSetAside,
    InstanceExited,
    InstanceParked,
    InstanceReady,
    InstanceStage,
    InstanceStopped,
    InstanceStopRequested,
    MemorySeen,
    RestoreFailed,
    ShutdownRequested,
    SnapshotAvailable,
    SnapshotCaptured,
    SnapshotInvalidated,
    SnapshotRequested,
    StartFailed,
    StartRefused,
    Tick,
    WakeAt,
)
from woodfrog.control.gpus import chips_for
from woodfrog.control.state import NEVER, App, Call, Instance, Service, State
from woodfrog.errors import (
    CallCancelled as CallCancelledError,
)
from woodfrog.errors import (
    FunctionTimeoutError,
    InstanceCrashed,
    NotFoundError,
    StartupError,
    WoodfrogError,
)

__all__ = ["InvalidTransition", "handle"]

Error = dict[str, Any]


class InvalidTransition(WoodfrogError):
    """The machine was told something that cannot be: a bug in what drives it. The state is as it was before.

    Args (fields): entity, its recent history as (time, state, event), and the event.
    """

    code = "invalid-transition"


def handle(state: State, event: Event) -> tuple[Action, ...]:
    """Take in one event and say what to do about it.

    Args:
        state: changed in place.
        event: what happened; a `now` before that of an earlier event counts as that.

    Returns:
        Actions, to be carried out in order.

    Raises:
        InvalidTransition: the event contradicts the state, which stays unchanged.

    Example:
        >>> handle(state, CallSubmitted(now=1.0, call_id="c1", app="demo", tag="square", method="square"))
        (StartInstance(instance_id='i-0-1', ...), WakeAt(time=301.0))
    """
    state.now = max(state.now, event.now)
    state.seq += 1
    state.event = type(event).__name__
    out: list[Action] = []
    state.out = out
    _HANDLERS[type(event)](state, event)
    if state.freed:
        moves.feed(state)
    if state.heap and state.heap[0][0] < state.wake:
        state.wake = state.heap[0][0]
        out.append(WakeAt(time=state.wake))
    return tuple(out)


def _stale(st: State) -> None:
    st.stale[st.event] = st.stale.get(st.event, 0) + 1


def _invalid(event: Event, message: str, entity: str, history: list[tuple[float, str, str]]) -> InvalidTransition:
    return InvalidTransition(
        f"{entity}: {type(event).__name__} {message}; report this with the daemon's log",
        entity=entity,
        history=[list(step) for step in history],
        event=event.to_dict(),
    )


# What each event does: apps


def _app_deployed(st: State, ev: AppDeployed) -> None:
    for spec in ev.specs:
        name = f"{ev.app}/{spec.tag}@{ev.version}"
        old = st.services.get(name)
        if spec.tag not in ev.keys:
            raise _invalid(ev, "has no function key for it", name, [])
        if old is not None and (old.spec != spec or old.key != ev.keys[spec.tag]):
            raise _invalid(ev, "brings another spec under the same version", name, [])
    app = st.apps.setdefault(ev.app, App(ev.app, ev.version, ev.ephemeral))
    app.version, app.ephemeral, app.stopped = ev.version, ev.ephemeral, False
    before, app.active = app.active, {}
    for spec in ev.specs:
        name = f"{ev.app}/{spec.tag}@{ev.version}"
        service = app.services.get(name)
        if service is None:
            service = Service(name, ev.app, spec.tag, ev.version, spec, ev.keys[spec.tag])
            service.generators = {m.name: m.generator for m in spec.methods}
            app.services[name] = st.services[name] = service
            st.knowledge.setdefault(service.key, {})
        service.active = True
        app.active[spec.tag] = service
    for old in before.values():
        new = app.active.get(old.tag)
        if new is not None:
            moves.hand_on(st, old, new)
        if new is not old:
            same = new is not None and _constructor(new) == _constructor(old)
            standby = ev.standby.get(old.tag, ())
            for group in [*old.groups.values(), *(old.group(d) for d in standby if d not in old.groups)]:
                group.standby = group.digest in standby and group.elder is None
                moves.succeed(st, group, new if same and ev.rolling and not st.shutting_down else None)
            _drain(st, old)
    for tag, snapshot_id in ev.snapshots.items():
        if tag in app.active:
            moves.learn(st.knows(app.active[tag], "", ""), snapshot_id, ev.sizes.get(snapshot_id, 0))
    for tag, by_chip in ev.gpu_snapshots.items():
        for chip, snapshot_id in by_chip.items():
            if tag in app.active:
                moves.learn(st.knows(app.active[tag], "", chip), snapshot_id, ev.sizes.get(snapshot_id, 0))
    for service in () if ev.followed else app.active.values():
        if service.spec.scaling.min_containers:
            service.group("")
        for group in list(service.groups.values()):
            moves.schedule(st, group)


def _constructor(service: Service) -> tuple[object, ...]:
    return service.spec.kind, service.spec.parameters, service.spec.constructor


def _app_stopped(st: State, ev: AppStopped) -> None:
    app = st.apps.get(ev.app)
    if app is None or app.stopped:
        return _stale(st)
    app.stopped = True
    app.active = {}
    why = f": {ev.reason}" if ev.reason else ""
    error = CallCancelledError(f"app {app.name!r} was stopped{why}", app=app.name).to_dict()
    for call in [c for c in st.calls.values() if c.group.service.app == app.name]:
        moves.end_call(st, call, "cancelled", error)
    for service in app.services.values():
        for group in service.groups.values():
            moves.part(group)
    for service in list(app.services.values()):
        service.active = False
        for group in list(service.groups.values()):
            group.capture_wanted = False
            for inst in list(group.instances.values()):
                moves.dismiss(st, inst, "app stopped")
            moves.tidy(st, group)
        moves.tidy_service(st, service)
    moves.tidy_app(st, app)


def _drain(st: State, service: Service) -> None:
    service.active = False
    for group in list(service.groups.values()):
        moves.drain(st, group)
    moves.tidy_service(st, service)


def _shutdown(st: State, ev: ShutdownRequested) -> None:
    if st.shutting_down:
        return _stale(st)
    st.shutdown_at = st.now + st.config.shutdown_grace
    for inst in list(st.instances.values()):
        if inst.state == "running":
            moves.set_deadline(st, inst, min(inst.deadline, st.shutdown_at))
        else:
            moves.dismiss(st, inst, "daemon stops")


# What each event does: calls


def _call_submitted(st: State, ev: CallSubmitted) -> None:
    if ev.call_id in st.calls or ev.call_id in st.finished:
        known = st.calls.get(ev.call_id)
        raise _invalid(ev, "a second time", ev.call_id, known.history if known else [])
    service = st.find_service(ev.app, ev.tag, ev.version)
    if service is None or ev.method not in service.generators or st.apps[ev.app].stopped:
        wanted = ev.tag if ev.method == ev.tag else f"{ev.tag}.{ev.method}"
        version = "" if ev.version is None else f" in version {ev.version}"
        error = NotFoundError(f"no function {wanted!r} in app {ev.app!r}{version}; deploy it first")
        moves.remember(st, ev.call_id, "failure")
        st.out.append(FinishCall(call_id=ev.call_id, outcome="failure", error=error.to_dict()))
        return
    group = service.group(ev.params_digest)
    call = Call(ev.call_id, group, ev.method, st.now, retryable=not service.generators[ev.method])
    st.calls[call.id] = call
    group.calls += 1
    service.calls += 1
    group.last_load = st.now
    moves.enqueue(st, call)


def _call_cancelled(st: State, ev: CallCancelled) -> None:
    call = st.calls.get(ev.call_id)
    if call is None:
        return _stale(st)
    group, inst = call.group, call.instance
    if ev.error is not None:
        moves.end_call(st, call, "failure", ev.error)
    else:
        moves.end_call(st, call, "cancelled", CallCancelledError("the call was cancelled", call=call.id).to_dict())
    if inst is not None and group.service.generators[call.method]:
        moves.close(st, inst, call.id)
    elif inst is not None:
        # Its code still runs: there is no way to stop it and keep the process.
        moves.kill(st, inst, "call cancelled")
    moves.schedule(st, group)
    moves.tidy(st, group)


def _call_finished(st: State, ev: CallFinished) -> None:
    inst = st.instances.get(ev.instance_id)
    call = st.calls.get(ev.call_id)
    if inst is None or inst.state == "stopping" or (call is None and inst.closing != ev.call_id):
        return _stale(st)
    if call is not None and call.instance is not inst:
        raise _invalid(ev, f"but it does not run on {inst.id}", call.id, call.history)
    group = inst.group
    group.last_load = st.now
    inst.call = inst.closing = None
    inst.served += 1
    inst.served_at = min(inst.served_at, st.now)
    moves.note_use(st, inst)
    delay = None
    if call is not None:
        call.instance = None
        delay = None if ev.outcome == "success" else moves.retry_delay(call)
        if delay is None:
            moves.end_call(st, call, ev.outcome, ev.error)
    if ev.instance_ok:
        moves.serve(st, inst)
    else:
        moves.kill(st, inst, "not usable after its call")
    moves.fill(st, inst)
    if call is not None and delay is not None:
        moves.retry(st, call, delay, ev.error)
    if not ev.instance_ok:
        moves.schedule(st, group)


# What each event does: instances


def _instance_stage(st: State, ev: InstanceStage) -> None:
    inst = st.instances.get(ev.instance_id)
    if inst is None or inst.state == "stopping":
        return _stale(st)
    if inst.state not in ("starting", "capturing"):
        raise _invalid(ev, f"{ev.stage!r} but it has come up", inst.id, inst.history)
    if ev.stage == "capturing":
        if not inst.capture:
            raise _invalid(ev, "'capturing' but it was not asked to", inst.id, inst.history)
        moves.change(st, inst, "capturing")
    elif inst.state == "capturing":
        moves.change(st, inst, "starting")
    st.freed = st.freed or inst.stage == "restoring"
    inst.stage = ev.stage
    if ev.stage in ("capturing", "restoring"):
        moves.set_deadline(st, inst, st.now + inst.group.service.spec.startup_timeout)


def _instance_ready(st: State, ev: InstanceReady) -> None:
    inst = st.instances.get(ev.instance_id)
    if inst is None or inst.state == "stopping":
        return _stale(st)
    if inst.state not in ("starting", "capturing") or inst.park:
        raise _invalid(ev, "but it has come up already", inst.id, inst.history)
    group = inst.group
    knowledge = moves.of_instance(st, inst)
    # With a capture still on its way to disk, `SnapshotCaptured` or `CaptureFailed` follows in any case.
    inst.storing = inst.capture
    if inst.snapshot_id is not None and knowledge.snapshot_id == inst.snapshot_id:
        knowledge.failures = 0
        if inst.mode == "restore":
            knowledge.attempts = 0
            group.no_room = frozenset()
    group.start_failures, group.start_error, group.hopeless, group.standby = 0, "", False, False
    group.hold_calls = group.hold_spares = -NEVER
    inst.stage = ""
    moves.serve(st, inst)
    if group.warm:
        moves.retire_elder(st, group)
    moves.park_later(st, group, st.config.park_delay)
    st.freed = True


def _instance_parked(st: State, ev: InstanceParked) -> None:
    inst = st.instances.get(ev.instance_id)
    if inst is None or inst.state == "stopping":
        return _stale(st)
    if inst.state != "starting" or not inst.park:
        raise _invalid(ev, "but it was not to be", inst.id, inst.history)
    group = inst.group
    inst.stage = ""
    moves.change(st, inst, "parked")
    moves.set_deadline(st, inst, max(group.last_load + st.config.park_window, st.now + 1.0))
    moves.schedule(st, group)


def _start_failed(st: State, ev: StartFailed) -> None:
    inst = st.instances.get(ev.instance_id)
    if inst is None:
        return _stale(st)
    if inst.state in ("parked", "idle", "running"):
        raise _invalid(ev, "but it has come up", inst.id, inst.history)
    wanted, parking = inst.state != "stopping", inst.park
    moves.gone(st, inst)
    if wanted and parking:
        moves.park_later(st, inst.group, st.config.park_retry)
    elif wanted:
        moves.start_broke(st, inst, ev.error, ev.user_fault)
    moves.after_loss(st, inst)


def _instance_exited(st: State, ev: InstanceExited) -> None:
    inst = st.instances.get(ev.instance_id)
    if inst is None:
        return _stale(st)
    was, call = inst.state, inst.call
    reason = str(ev.error.get("message", "the process ended"))
    moves.gone(st, inst)
    if was == "running" and call is not None:
        inst.call = call.instance = None
        moves.fail_call(st, call, "failure", ev.error)
    elif was == "parked":
        moves.park_later(st, inst.group, st.config.park_retry)
    elif was == "capturing":
        moves.capture_broke(st, inst, reason)
    elif was == "starting" and inst.snapshot_id is not None:
        moves.restore_broke(st, inst, reason, at_fault=False)
    elif was == "starting":
        moves.start_broke(st, inst, ev.error, user_fault=False)
    moves.after_loss(st, inst)


def _instance_stopped(st: State, ev: InstanceStopped) -> None:
    inst = st.instances.get(ev.instance_id)
    if inst is None:
        return _stale(st)
    if inst.state != "stopping":
        raise _invalid(ev, "but nobody asked for it", inst.id, inst.history)
    moves.gone(st, inst)
    moves.after_loss(st, inst)


def _instance_stop_requested(st: State, ev: InstanceStopRequested) -> None:
    inst = st.instances.get(ev.instance_id)
    if inst is None or inst.state == "stopping":
        return _stale(st)
    call = inst.call
    if inst.capture:
        inst.group.capture_wanted = False
    if inst.park:
        moves.park_later(st, inst.group, st.config.park_retry)
    moves.dismiss(st, inst, "stopped by hand")
    if call is not None:
        inst.call = call.instance = None
        if call.retryable:
            call.attempts -= 1
            moves.enqueue(st, call, front=True)
        else:
            error = InstanceCrashed("the container was stopped by hand in the middle of the call", call=call.id)
            moves.end_call(st, call, "failure", error.to_dict())
    moves.schedule(st, inst.group)


# What each event does: snapshots


def _snapshot_captured(st: State, ev: SnapshotCaptured) -> None:
    inst = st.instances.get(ev.instance_id)
    if inst is None:
        return _stored_after_loss(st, ev.instance_id, snapshot_id=ev.snapshot_id, size=ev.size)
    knowledge = moves.of_instance(st, inst)
    if knowledge.capturer != inst.id:
        raise _invalid(ev, "but it was not to capture", inst.id, inst.history)
    knowledge.capturer = None
    inst.capture = inst.storing = False
    moves.learn(knowledge, ev.snapshot_id, ev.size)
    if inst.state in ("idle", "running"):
        inst.snapshot_id = ev.snapshot_id
        moves.note_use(st, inst)
    elif inst.state != "stopping":
        inst.snapshot_id = ev.snapshot_id
        moves.change(st, inst, "starting")
        inst.stage = "restoring"
        moves.set_deadline(st, inst, st.now + inst.group.service.spec.startup_timeout)
    moves.schedule_key(st, inst.group.service.key, inst.group.digest)


def _stored_after_loss(
    st: State, instance_id: str, snapshot_id: str | None = None, size: int = 0, reason: str = ""
) -> None:
    """What an instance that is gone had captured is on disk now, or failed to get there."""
    for key, known in st.knowledge.items():
        for (digest, _), knowledge in known.items():
            if knowledge.capturer == instance_id:
                knowledge.capturer = None
                if snapshot_id is None:
                    moves.attempt_failed(st, knowledge, reason)
                elif knowledge.snapshot_id is None:
                    moves.learn(knowledge, snapshot_id, size)
                return moves.schedule_key(st, key, digest)
    _stale(st)


def _capture_failed(st: State, ev: CaptureFailed) -> None:
    inst = st.instances.get(ev.instance_id)
    if inst is None:
        return _stored_after_loss(st, ev.instance_id, reason=ev.reason)
    stopping = inst.state == "stopping"
    if not stopping and not inst.capture:
        raise _invalid(ev, "but it was not to capture", inst.id, inst.history)
    if not ev.alive:
        moves.gone(st, inst)
    if not stopping or inst.storing:
        moves.capture_broke(st, inst, ev.reason)
    if ev.alive and inst.state in ("starting", "capturing"):
        moves.change(st, inst, "starting")
        inst.stage = "capture failed"
        moves.set_deadline(st, inst, st.now + inst.group.service.spec.startup_timeout)
    if not ev.alive:
        moves.after_loss(st, inst)


def _restore_failed(st: State, ev: RestoreFailed) -> None:
    inst = st.instances.get(ev.instance_id)
    if inst is None:
        return _stale(st)
    if inst.state in ("parked", "idle", "running") or inst.snapshot_id != ev.snapshot_id:
        raise _invalid(ev, f"of {ev.snapshot_id} but that is not what it does", inst.id, inst.history)
    moves.gone(st, inst)
    if ev.gpu:
        inst.group.no_room |= set(inst.gpus)
    elif inst.state != "stopping" or ev.at_fault:
        moves.restore_broke(st, inst, ev.reason, ev.at_fault)
    moves.after_loss(st, inst)


def _snapshot_available(st: State, ev: SnapshotAvailable) -> None:
    service = st.find_service(ev.app, ev.tag, ev.version)
    if service is None:
        return _stale(st)
    moves.learn(st.knows(service, ev.params_digest, ev.chip), ev.snapshot_id, ev.size)
    moves.schedule_key(st, service.key, ev.params_digest)


def _snapshot_invalidated(st: State, ev: SnapshotInvalidated) -> None:
    found = [k for known in st.knowledge.values() for k in known.values() if k.snapshot_id == ev.snapshot_id]
    for knowledge in found:
        knowledge.snapshot_id = None
        knowledge.failures = knowledge.attempts = 0
        knowledge.gave_up = False
    moves.unpark(st, ev.snapshot_id, "its snapshot is gone")
    if not found:
        _stale(st)


def _snapshot_requested(st: State, ev: SnapshotRequested) -> None:
    service = st.find_service(ev.app, ev.tag)
    if service is None or not service.spec.snapshot.enabled:
        return _stale(st)
    known = [st.knows(service, ev.params_digest, chip) for chip in chips_for(service.spec, st.config.gpus)]
    if any(k.snapshot_id is not None for k in known):
        return
    for knowledge in known:
        if knowledge.gave_up:
            knowledge.gave_up = False
            knowledge.attempts = 0
    group = service.group(ev.params_digest)
    group.capture_wanted = True
    moves.schedule(st, group)


# What each event does: GPUs


def _gpus_set_aside(st: State, ev: GpusSetAside) -> None:
    well = st.sick.keys() - ev.sick.keys()
    st.sick = dict(ev.sick)
    for inst in list(st.idle.values()):
        if moves.on_sick(st, inst):
            moves.stop(st, inst, "its GPU was set aside")
            moves.schedule(st, inst.group)
    st.freed = st.freed or bool(well)


def _start_refused(st: State, ev: StartRefused) -> None:
    inst = st.instances.get(ev.instance_id)
    if inst is None:
        return _stale(st)
    if inst.state in ("parked", "idle", "running"):
        raise _invalid(ev, "but it has come up", inst.id, inst.history)
    wanted = inst.state != "stopping"
    refused = moves.on_sick(st, inst)
    moves.gone(st, inst)
    if wanted and not (refused and moves.has_usable(st, inst.group)):
        moves.start_broke(st, inst, ev.error, user_fault=refused)
    moves.after_loss(st, inst)


# What each event does: memory


def _memory_seen(st: State, ev: MemorySeen) -> None:
    memory.look(st, ev)
    st.freed = st.freed or bool(st.starved)


# Time


def _tick(st: State, ev: Tick) -> None:
    st.wake = NEVER
    while st.heap and st.heap[0][0] <= st.now:
        time, _, kind, ident = heappop(st.heap)
        if kind == "instance":
            inst = st.instances.get(ident[0])
            if inst is None or inst.armed != time:
                continue
            inst.armed = NEVER
            if inst.deadline <= st.now:
                _overdue(st, inst)
            elif inst.deadline != NEVER:
                moves.set_deadline(st, inst, inst.deadline)
        elif kind == "call":
            call = st.calls.get(ident[0])
            if call is not None and call.state == "waiting_retry" and call.retry_at <= st.now:
                moves.enqueue(st, call)
        else:
            service = st.services.get(ident[0])
            group = service.groups.get(ident[1]) if service else None
            if group is not None:
                moves.schedule(st, group)
                moves.end_rolling(st, group)


def _overdue(st: State, inst: Instance) -> None:
    group = inst.group
    spec = group.service.spec
    if inst.state == "idle":
        _scale_down(st, inst)
    elif inst.state == "parked":
        if len(group.parked) > moves.park_target(st, group):
            return moves.kill(st, inst, "not used any more")
        load = st.now if group.running or group.queue else group.last_load
        moves.set_deadline(st, inst, max(load + st.config.park_window, st.now + 1.0))
    elif inst.state == "stopping":
        moves.kill(st, inst, f"{inst.reason}; exit hooks ran past {st.config.stop_grace:g} s")
    elif inst.state == "running":
        _cut_off(st, inst)
    elif inst.state == "capturing" or (inst.stage == "restoring" and inst.capture and inst.snapshot_id is None):
        # What it captured, or took from the tier in place of that, is nobody's snapshot yet: it is the capture that
        # failed. It stays the capturer until it is gone: never two captures at once.
        moves.kill(st, inst, "capture hangs")
        moves.attempt_failed(st, moves.of_instance(st, inst), f"no end after {spec.startup_timeout:g} s")
        moves.schedule(st, group)
    elif inst.stage == "restoring":
        moves.restore_broke(st, inst, f"no end after {spec.startup_timeout:g} s", at_fault=False)
        moves.kill(st, inst, "restore hangs")
        moves.schedule(st, group)
    else:
        moves.kill(st, inst, "start-up timeout")
        error = StartupError(
            f"{spec.tag}: not ready after {spec.startup_timeout:g} s (stage: {inst.stage or 'start'}); "
            "make import and enter faster or raise startup_timeout",
            instance=inst.id,
            stage=inst.stage,
        )
        moves.start_broke(st, inst, error.to_dict(), user_fault=True)
        moves.schedule(st, group)


def _cut_off(st: State, inst: Instance) -> None:
    """A call ran too long: for its timeout, or for a daemon that has to stop; or a generator after its call."""
    group, call = inst.group, inst.call
    if call is None:
        moves.kill(st, inst, "its generator did not end when it was closed")
        return moves.schedule(st, group)
    inst.call = call.instance = None
    if st.now >= st.shutdown_at:
        # No end for the call: it stays unfinished, for the next daemon.
        moves.kill(st, inst, "daemon stops")
        call.attempts -= 1
        return moves.enqueue(st, call, front=True)
    timeout = group.service.spec.timeout
    name = group.service.tag if call.method == group.service.tag else f"{group.service.tag}.{call.method}"
    moves.kill(st, inst, "call timeout")
    error = FunctionTimeoutError(
        f"{name}: ran past its timeout of {timeout:g} s; raise timeout= or do less in one call",
        call=call.id,
        timeout=timeout,
    )
    moves.fail_call(st, call, "failure", error.to_dict())
    moves.schedule(st, group)


def _scale_down(st: State, inst: Instance) -> None:
    group = inst.group
    if group.live > moves.target(st, group):
        return moves.stop(st, inst, "idle")
    if group.live > moves.floor(group):
        # Kept as a buffer as long as there is load.
        load = st.now if group.running or group.queue else group.last_load
        return moves.set_deadline(st, inst, max(load + group.service.spec.scaling.scaledown_window, st.now + 1.0))
    inst.deadline = NEVER


_HANDLERS: dict[type[Event], Callable[[State, Any], None]] = {
    AppDeployed: _app_deployed,
    AppStopped: _app_stopped,
    CallCancelled: _call_cancelled,
    CallFinished: _call_finished,
    CallSubmitted: _call_submitted,
    CaptureFailed: _capture_failed,
    GpusSetAside: _gpus_set_aside,
    InstanceExited: _instance_exited,
    InstanceParked: _instance_parked,
    InstanceReady: _instance_ready,
    InstanceStage: _instance_stage,
    InstanceStopRequested: _instance_stop_requested,
    InstanceStopped: _instance_stopped,
    MemorySeen: _memory_seen,
    RestoreFailed: _restore_failed,
    ShutdownRequested: _shutdown,
    SnapshotAvailable: _snapshot_available,
    SnapshotCaptured: _snapshot_captured,
    SnapshotInvalidated: _snapshot_invalidated,
    SnapshotRequested: _snapshot_requested,
    StartFailed: _start_failed,
    StartRefused: _start_refused,
    Tick: _tick,
}
