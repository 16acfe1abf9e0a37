"""The control machine: `handle(state, event) -> actions`. The same events always yield the same actions.

Layout: `handle` · what each event does · calls · instances · snapshots · scaling · time.
A call takes the newest idle instance of its group, else it queues (first in, first out) and an instance is started.
Nothing on the way of a warm call looks at more than its own group.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

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
    InstanceExited,
    InstanceReady,
    InstanceStage,
    InstanceStopped,
    InstanceStopRequested,
    KillInstance,
    Outcome,
    RestoreFailed,
    RetireSnapshot,
    RunCall,
    ShutdownRequested,
    SnapshotAvailable,
    SnapshotCaptured,
    SnapshotInvalidated,
    SnapshotRequested,
    StartFailed,
    StartInstance,
    StopInstance,
    Tick,
    WakeAt,
)
from woodfrog.control.state import HISTORY, NEVER, App, Call, Group, Instance, InstanceState, Knowledge, Service, State
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
        _feed(state)
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


def _note(st: State, entity: Call | Instance, state: str) -> None:
    history = entity.history
    history.append((st.now, state, st.event))
    if len(history) > HISTORY:
        del history[0]


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
        if app.active.get(old.tag) is not old:
            _drain(st, old)
    for service in app.active.values():
        if service.spec.scaling.min_containers:
            _schedule(st, service.group(""))


def _app_stopped(st: State, ev: AppStopped) -> None:
    app = st.apps.get(ev.app)
    if app is None or app.stopped:
        return _stale(st)
    app.stopped = True
    app.active = {}
    error = CallCancelledError(f"app {app.name!r} was stopped", app=app.name).to_dict()
    for call in [c for c in st.calls.values() if c.group.service.app == app.name]:
        _end_call(st, call, "cancelled", error)
    for service in list(app.services.values()):
        service.active = False
        for group in list(service.groups.values()):
            group.capture_wanted = False
            for inst in list(group.instances.values()):
                _dismiss(st, inst, "app stopped")
            _tidy(st, group)
        _tidy_service(st, service)
    _tidy_app(st, app)


def _drain(st: State, service: Service) -> None:
    """New calls go elsewhere: keep only what its unfinished calls need."""
    service.active = False
    for group in list(service.groups.values()):
        group.capture_wanted = False
        spare = group.starting - len(group.queue)
        for inst in list(group.instances.values()):
            if inst.state == "idle":
                _stop(st, inst, "newer version")
            elif inst.state in ("starting", "capturing") and spare > 0:
                spare -= 1
                _kill(st, inst, "newer version")
        _tidy(st, group)
    _tidy_service(st, service)


def _shutdown(st: State, ev: ShutdownRequested) -> None:
    if st.shutting_down:
        return _stale(st)
    st.shutdown_at = st.now + st.config.shutdown_grace
    for inst in list(st.instances.values()):
        if inst.state == "running":
            _deadline(st, inst, min(inst.deadline, st.shutdown_at))
        else:
            _dismiss(st, inst, "daemon stops")


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
        _remember(st, ev.call_id, "failure")
        st.out.append(FinishCall(call_id=ev.call_id, outcome="failure", error=error.to_dict()))
        return
    group = service.group(ev.params_digest)
    call = Call(ev.call_id, group, ev.method, st.now, retryable=not service.generators[ev.method])
    st.calls[call.id] = call
    group.calls += 1
    service.calls += 1
    group.last_load = st.now
    _enqueue(st, call)


def _call_cancelled(st: State, ev: CallCancelled) -> None:
    call = st.calls.get(ev.call_id)
    if call is None:
        return _stale(st)
    group, inst = call.group, call.instance
    _end_call(st, call, "cancelled", CallCancelledError("the call was cancelled", call=call.id).to_dict())
    if inst is not None:
        # Its code still runs: there is no way to stop it and keep the process.
        _kill(st, inst, "call cancelled")
    _schedule(st, group)
    _tidy(st, group)


def _call_finished(st: State, ev: CallFinished) -> None:
    inst = st.instances.get(ev.instance_id)
    call = st.calls.get(ev.call_id)
    if inst is None or call is None or inst.state == "stopping":
        return _stale(st)
    if call.instance is not inst:
        raise _invalid(ev, f"but it does not run on {inst.id}", call.id, call.history)
    group = inst.group
    group.last_load = st.now
    call.instance = inst.call = None
    inst.served += 1
    delay = None if ev.outcome == "success" else _retry_delay(call)
    if delay is None:
        _end_call(st, call, ev.outcome, ev.error)
    if ev.instance_ok:
        _serve(st, inst)
    else:
        _kill(st, inst, "not usable after its call")
    if delay is not None:
        _retry(st, call, delay)
    if not ev.instance_ok:
        _schedule(st, group)


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
        _move(st, inst, "capturing")
    elif inst.state == "capturing":
        _move(st, inst, "starting")
    inst.stage = ev.stage
    if ev.stage in ("capturing", "restoring"):
        _deadline(st, inst, st.now + inst.group.service.spec.startup_timeout)


def _instance_ready(st: State, ev: InstanceReady) -> None:
    inst = st.instances.get(ev.instance_id)
    if inst is None or inst.state == "stopping":
        return _stale(st)
    if inst.state not in ("starting", "capturing"):
        raise _invalid(ev, "but it has come up already", inst.id, inst.history)
    group = inst.group
    knowledge = st.knows(group.service, group.digest)
    # With a capture still on its way to disk, `SnapshotCaptured` or `CaptureFailed` follows while it serves already.
    if inst.snapshot_id is not None and knowledge.snapshot_id == inst.snapshot_id:
        knowledge.failures = 0
        if inst.mode == "restore":
            knowledge.attempts = 0
    group.start_failures = 0
    group.hold_calls = group.hold_spares = -NEVER
    inst.stage = ""
    _serve(st, inst)
    st.freed = True


def _start_failed(st: State, ev: StartFailed) -> None:
    inst = st.instances.get(ev.instance_id)
    if inst is None:
        return _stale(st)
    if inst.state in ("idle", "running"):
        raise _invalid(ev, "but it has come up", inst.id, inst.history)
    wanted = inst.state != "stopping"
    _gone(st, inst)
    if wanted:
        _start_broke(st, inst, ev.error, ev.user_fault)
    _after_loss(st, inst)


def _instance_exited(st: State, ev: InstanceExited) -> None:
    inst = st.instances.get(ev.instance_id)
    if inst is None:
        return _stale(st)
    was, call = inst.state, inst.call
    reason = str(ev.error.get("message", "the process ended"))
    _gone(st, inst)
    if was == "running" and call is not None:
        inst.call = call.instance = None
        _fail_call(st, call, "failure", ev.error)
    elif was == "capturing":
        _capture_broke(st, inst, reason)
    elif was == "starting" and inst.snapshot_id is not None:
        _restore_broke(st, inst, reason, at_fault=False)
    elif was == "starting":
        _start_broke(st, inst, ev.error, user_fault=False)
    _after_loss(st, inst)


def _instance_stopped(st: State, ev: InstanceStopped) -> None:
    inst = st.instances.get(ev.instance_id)
    if inst is None:
        return _stale(st)
    if inst.state != "stopping":
        raise _invalid(ev, "but nobody asked for it", inst.id, inst.history)
    _gone(st, inst)
    _after_loss(st, inst)


def _instance_stop_requested(st: State, ev: InstanceStopRequested) -> None:
    inst = st.instances.get(ev.instance_id)
    if inst is None or inst.state == "stopping":
        return _stale(st)
    call = inst.call
    if inst.capture:
        inst.group.capture_wanted = False
    _dismiss(st, inst, "stopped by hand")
    if call is not None:
        inst.call = call.instance = None
        if call.retryable:
            call.attempts -= 1
            _enqueue(st, call, front=True)
        else:
            error = InstanceCrashed("the container was stopped by hand in the middle of the call", call=call.id)
            _end_call(st, call, "failure", error.to_dict())
    _schedule(st, inst.group)


# What each event does: snapshots


def _snapshot_captured(st: State, ev: SnapshotCaptured) -> None:
    inst = st.instances.get(ev.instance_id)
    if inst is None:
        return _stale(st)
    knowledge = st.knows(inst.group.service, inst.group.digest)
    if knowledge.capturer != inst.id:
        raise _invalid(ev, "but it was not to capture", inst.id, inst.history)
    knowledge.capturer = None
    inst.capture = False
    _learn(st, inst.group.service, inst.group.digest, ev.snapshot_id)
    if inst.state in ("idle", "running"):
        inst.snapshot_id = ev.snapshot_id
    elif inst.state != "stopping":
        inst.snapshot_id = ev.snapshot_id
        _move(st, inst, "starting")
        inst.stage = "restoring"
        _deadline(st, inst, st.now + inst.group.service.spec.startup_timeout)
    _schedule_key(st, inst.group.service.key, inst.group.digest)


def _capture_failed(st: State, ev: CaptureFailed) -> None:
    inst = st.instances.get(ev.instance_id)
    if inst is None:
        return _stale(st)
    stopping = inst.state == "stopping"
    if not stopping and not inst.capture:
        raise _invalid(ev, "but it was not to capture", inst.id, inst.history)
    if not ev.alive:
        _gone(st, inst)
    if not stopping:
        _capture_broke(st, inst, ev.reason)
    if ev.alive and inst.state in ("starting", "capturing"):
        _move(st, inst, "starting")
        inst.stage = "capture failed"
        _deadline(st, inst, st.now + inst.group.service.spec.startup_timeout)
    if not ev.alive:
        _after_loss(st, inst)


def _restore_failed(st: State, ev: RestoreFailed) -> None:
    inst = st.instances.get(ev.instance_id)
    if inst is None:
        return _stale(st)
    if inst.state in ("idle", "running") or inst.snapshot_id != ev.snapshot_id:
        raise _invalid(ev, f"of {ev.snapshot_id} but that is not what it does", inst.id, inst.history)
    _gone(st, inst)
    _restore_broke(st, inst, ev.reason, ev.at_fault)
    _after_loss(st, inst)


def _snapshot_available(st: State, ev: SnapshotAvailable) -> None:
    service = st.find_service(ev.app, ev.tag, ev.version)
    if service is None:
        return _stale(st)
    _learn(st, service, ev.params_digest, ev.snapshot_id)
    _schedule_key(st, service.key, ev.params_digest)


def _snapshot_invalidated(st: State, ev: SnapshotInvalidated) -> None:
    found = [k for known in st.knowledge.values() for k in known.values() if k.snapshot_id == ev.snapshot_id]
    for knowledge in found:
        knowledge.snapshot_id = None
        knowledge.failures = knowledge.attempts = 0
        knowledge.gave_up = False
    if not found:
        _stale(st)


def _snapshot_requested(st: State, ev: SnapshotRequested) -> None:
    service = st.find_service(ev.app, ev.tag)
    if service is None or not service.spec.snapshot.enabled:
        return _stale(st)
    knowledge = st.knows(service, ev.params_digest)
    if knowledge.snapshot_id is not None:
        return
    if knowledge.gave_up:
        knowledge.gave_up = False
        knowledge.attempts = 0
    group = service.group(ev.params_digest)
    group.capture_wanted = True
    _schedule(st, group)


# Calls


def _enqueue(st: State, call: Call, front: bool = False) -> None:
    group = call.group
    if group.idle:
        _run(st, group.idle.popitem()[1], call)
        if group.service.spec.scaling.buffer_containers:
            _schedule(st, group)
        return
    call.state = "queued"
    _note(st, call, "queued")
    group.queue[call.id] = call
    if front:
        group.queue.move_to_end(call.id, last=False)
    _schedule(st, group)


def _run(st: State, inst: Instance, call: Call) -> None:
    _move(st, inst, "running")
    inst.call = call
    call.instance = inst
    call.state = "running"
    call.attempts += 1
    _note(st, call, "running")
    _deadline(st, inst, st.now + inst.group.service.spec.timeout)
    st.out.append(RunCall(call_id=call.id, instance_id=inst.id, attempt=call.attempts))


def _retry_delay(call: Call) -> float | None:
    """Seconds until the next attempt; None = there is none."""
    policy = call.group.service.spec.retries
    if not call.retryable or call.attempts > policy.max_retries:
        return None
    try:
        delay = policy.initial_delay * policy.backoff_coefficient ** (call.attempts - 1)
    except OverflowError:
        delay = policy.max_delay
    return min(delay, policy.max_delay)


def _fail_call(st: State, call: Call, outcome: Outcome, error: Error | None) -> None:
    """The call's attempt came to nothing: try again if its policy says so."""
    delay = _retry_delay(call)
    if delay is None:
        _end_call(st, call, outcome, error)
    else:
        _retry(st, call, delay)


def _retry(st: State, call: Call, delay: float) -> None:
    if delay <= 0:
        return _enqueue(st, call)
    call.state = "waiting_retry"
    call.retry_at = st.now + delay
    _note(st, call, "waiting_retry")
    _push(st, call.retry_at, "call", (call.id,))


def _end_call(st: State, call: Call, outcome: Outcome, error: Error | None) -> None:
    """The one place where a call ends. Its instance, if any, is the caller's to deal with."""
    group = call.group
    group.queue.pop(call.id, None)
    if call.instance is not None:
        call.instance.call = None
        call.instance = None
    del st.calls[call.id]
    group.calls -= 1
    group.service.calls -= 1
    _remember(st, call.id, outcome)
    st.out.append(FinishCall(call_id=call.id, outcome=outcome, error=error))


def _remember(st: State, call_id: str, outcome: Outcome) -> None:
    st.finished[call_id] = outcome
    if len(st.finished) > st.config.keep_finished:
        st.finished.popitem(last=False)


# Instances


def _move(st: State, inst: Instance, state: InstanceState | None) -> None:
    """Change an instance's state and every count that depends on it; None = gone."""
    group, service = inst.group, inst.group.service
    if inst.state in ("starting", "capturing"):
        group.starting -= 1
        st.cold_starting -= inst.mode == "cold"
    elif inst.state == "idle":
        group.idle.pop(inst.id, None)
        st.idle.pop(inst.id, None)
    elif inst.state == "running":
        group.running -= 1
    else:
        group.stopping -= 1
        service.stopping -= 1
        st.stopping -= 1
    _note(st, inst, state or "gone")
    inst.since = st.now
    if state is None:
        return
    inst.state = state
    if state in ("starting", "capturing"):
        group.starting += 1
        st.cold_starting += inst.mode == "cold"
    elif state == "idle":
        group.idle[inst.id] = st.idle[inst.id] = inst
    elif state == "running":
        group.running += 1
    else:
        group.stopping += 1
        service.stopping += 1
        st.stopping += 1


def _start(st: State, group: Group) -> bool:
    """Start one more instance, unless a limit forbids it."""
    service = group.service
    limit = service.spec.scaling.max_containers
    if len(st.instances) >= st.config.max_instances or (limit is not None and service.instances >= limit):
        return False
    knowledge = st.knows(service, group.digest)
    enabled = service.spec.snapshot.enabled
    restore = enabled and knowledge.snapshot_id is not None and not group.force_cold
    if not restore and st.cold_starting >= st.config.max_starting:
        return False
    if group.force_cold:
        group.force_cold -= 1
    capture = enabled and not restore and _capture_due(knowledge)
    st.counter += 1
    inst = Instance(
        id=f"i-{st.run}-{st.counter}",
        group=group,
        mode="restore" if restore else "cold",
        snapshot_id=knowledge.snapshot_id if restore else None,
        capture=capture,
        started_at=st.now,
        since=st.now,
        born=st.seq,
    )
    if capture:
        knowledge.capturer = inst.id
    st.instances[inst.id] = group.instances[inst.id] = inst
    service.instances += 1
    group.starting += 1
    st.cold_starting += not restore
    if group.starved_since != NEVER:
        group.starved_since = st.now
    _note(st, inst, "starting")
    _deadline(st, inst, st.now + service.spec.startup_timeout)
    st.out.append(
        StartInstance(
            instance_id=inst.id,
            service_id=service.id,
            params_digest=group.digest,
            mode=inst.mode,
            snapshot_id=inst.snapshot_id,
            capture=capture,
        )
    )
    return True


def _serve(st: State, inst: Instance) -> None:
    """An instance is free: give it the next call, or rest, or go."""
    group = inst.group
    service = group.service
    if st.shutting_down:
        return _stop(st, inst, "daemon stops")
    if inst.served and service.spec.scaling.single_use:
        _stop(st, inst, "single use")
        return _schedule(st, group)
    if group.queue:
        if st.starved and _should_yield(st, group):
            _stop(st, inst, "makes room for another function")
            return _schedule(st, group)
        return _run(st, inst, group.queue.popitem(last=False)[1])
    if not service.active:
        return _stop(st, inst, "newer version")
    _move(st, inst, "idle")
    _deadline(st, inst, st.now + service.spec.scaling.scaledown_window)
    if st.starved:
        st.freed = True


def _stop(st: State, inst: Instance, reason: str) -> None:
    _move(st, inst, "stopping")
    inst.reason = reason
    _deadline(st, inst, st.now + st.config.stop_grace)
    st.out.append(StopInstance(instance_id=inst.id, reason=reason, graceful=True))


def _kill(st: State, inst: Instance, reason: str) -> None:
    if inst.killed:
        return
    inst.killed = True
    inst.reason = reason
    inst.deadline = NEVER
    _move(st, inst, "stopping")
    st.freed = True
    st.out.append(KillInstance(instance_id=inst.id, reason=reason))


def _dismiss(st: State, inst: Instance, reason: str) -> None:
    """Let it go in the way that fits its state."""
    if inst.state == "idle":
        _stop(st, inst, reason)
    elif inst.state != "stopping":
        _kill(st, inst, reason)


def _gone(st: State, inst: Instance) -> None:
    """It does not exist any more. Follow with `_after_loss` once the causes are dealt with."""
    group = inst.group
    _move(st, inst, None)
    del st.instances[inst.id]
    del group.instances[inst.id]
    group.service.instances -= 1
    st.freed = True


def _after_loss(st: State, inst: Instance) -> None:
    group = inst.group
    service = group.service
    knowledge = st.knows(service, group.digest)
    if knowledge.capturer == inst.id:
        knowledge.capturer = None
        _schedule_key(st, service.key, group.digest)
    _schedule(st, group)
    _tidy(st, group)


def _start_broke(st: State, inst: Instance, error: Error, user_fault: bool) -> None:
    """A start failed. The user's fault fails all calls that wait for this group; ours is tried again first."""
    group = inst.group
    config = st.config
    if inst.born > group.failure_seq:
        group.start_failures += 1
        group.failure_seq = st.seq
    exponent = min(group.start_failures - 1, 30)
    group.hold_spares = st.now + min(config.start_backoff * 2.0**exponent, config.max_backoff)
    _push(st, group.hold_spares, "group", group.key)
    give_up = user_fault or group.start_failures >= config.start_attempts
    if not user_fault:
        exponent = min(exponent, config.start_attempts - 1)
        group.hold_calls = st.now + min(config.start_backoff * 2.0**exponent, config.max_backoff)
        _push(st, group.hold_calls, "group", group.key)
    if not give_up:
        return
    group.capture_wanted = False
    waiting = list(group.queue.values())
    group.queue.clear()
    for call in waiting:
        call.attempts += 1
        _fail_call(st, call, "failure", error)


def _tidy(st: State, group: Group) -> None:
    """Forget a group that nothing is left of, and its service if that has drained."""
    service = group.service
    if group.calls or group.instances or group.capture_wanted:
        return
    if group.digest or not service.active:
        service.groups.pop(group.digest, None)
        st.starved.pop(group.key, None)
    _tidy_service(st, service)


def _tidy_service(st: State, service: Service) -> None:
    if service.active or service.calls or service.instances:
        return
    app = st.apps.get(service.app)
    if app is None or app.services.pop(service.id, None) is None:
        return
    del st.services[service.id]
    if not any(s.key == service.key for s in st.services.values()):
        del st.knowledge[service.key]
    _tidy_app(st, app)


def _tidy_app(st: State, app: App) -> None:
    if app.stopped and not app.services:
        st.apps.pop(app.name, None)


# Snapshots


def _capture_due(knowledge: Knowledge) -> bool:
    return knowledge.snapshot_id is None and knowledge.capturer is None and not knowledge.gave_up


def _learn(st: State, service: Service, digest: str, snapshot_id: str) -> None:
    knowledge = st.knows(service, digest)
    if knowledge.snapshot_id != snapshot_id:
        knowledge.snapshot_id = snapshot_id
        knowledge.failures = 0


def _attempt_failed(st: State, knowledge: Knowledge, reason: str) -> None:
    knowledge.attempts += 1
    knowledge.reason = reason
    if knowledge.attempts >= st.config.capture_attempts:
        knowledge.gave_up = True


def _capture_broke(st: State, inst: Instance, reason: str) -> None:
    service, digest = inst.group.service, inst.group.digest
    knowledge = st.knows(service, digest)
    if knowledge.capturer == inst.id:
        knowledge.capturer = None
        inst.capture = False
        _attempt_failed(st, knowledge, reason)
        _schedule_key(st, service.key, digest)


def _restore_broke(st: State, inst: Instance, reason: str, at_fault: bool) -> None:
    """Count it against the snapshot, and let the start in its place be a cold one."""
    group = inst.group
    knowledge = st.knows(group.service, group.digest)
    if inst.state != "stopping":
        group.force_cold += 1
    if inst.snapshot_id is None or knowledge.snapshot_id != inst.snapshot_id:
        return
    knowledge.failures += 1
    knowledge.reason = reason
    if at_fault or knowledge.failures >= st.config.snapshot_failures:
        st.out.append(RetireSnapshot(snapshot_id=inst.snapshot_id, reason=reason))
        knowledge.snapshot_id = None
        knowledge.failures = 0
        _attempt_failed(st, knowledge, reason)


def _schedule_key(st: State, key: str, digest: str) -> None:
    """What is known of a snapshot changed: that may let starts go ahead in every service of the key."""
    for service in [s for s in st.services.values() if s.key == key]:
        group = service.groups.get(digest)
        if group is not None:
            _schedule(st, group)


# Scaling


def _target(st: State, group: Group) -> int:
    """How many instances the group should have, limits aside."""
    service = group.service
    load = len(group.queue) + group.running
    if not service.active or group.digest:
        return load
    policy = service.spec.scaling
    if policy.buffer_containers and (load or st.now - group.last_load < policy.scaledown_window):
        load += policy.buffer_containers
    return max(load, policy.min_containers)


def _floor(group: Group) -> int:
    service = group.service
    return service.spec.scaling.min_containers if service.active and not group.digest else 0


def _wanted(st: State, group: Group) -> tuple[int, int]:
    """Starts that someone waits for, and starts to have some in reserve."""
    if st.shutting_down:
        return 0, 0
    urgent = len(group.queue) - group.starting if st.now >= group.hold_calls else 0
    urgent = max(urgent, 0)
    if st.now < group.hold_spares:
        return urgent, 0
    if group.capture_wanted:
        knowledge = st.knows(group.service, group.digest)
        if knowledge.snapshot_id is not None or knowledge.gave_up:
            group.capture_wanted = False
        elif knowledge.capturer is None:
            urgent = max(urgent, 1)
    return urgent, max(_target(st, group) - group.live - urgent, 0)


def _schedule(st: State, group: Group) -> None:
    """Start what the group needs, as far as the limits allow; the rest waits in `starved` for `_feed`."""
    urgent, spare = _wanted(st, group)
    if st.starved:
        # Others wait too: who comes first is not for this group to say.
        st.freed = st.freed or len(st.instances) < st.config.max_instances
    else:
        while urgent and _start(st, group):
            urgent -= 1
        while spare and not urgent and _start(st, group):
            spare -= 1
    if urgent:
        _make_room(st, group, urgent)
    _mark_starved(st, group, urgent, spare)


def _mark_starved(st: State, group: Group, urgent: int, spare: int) -> None:
    if urgent or spare:
        st.starved.setdefault(group.key, group)
        if not urgent:
            group.starved_since = NEVER
        elif group.starved_since == NEVER:
            group.starved_since = st.now
    else:
        st.starved.pop(group.key, None)
        group.starved_since = NEVER
        group.force_cold = 0


def _feed(st: State) -> None:
    """Room was made: groups with the fewest instances come first, those with waiting calls before mere reserves."""
    st.freed = False
    for reserves in (False, True):
        pending = list(st.starved.values())
        while pending and len(st.instances) < st.config.max_instances:
            group = min(pending, key=lambda g: g.live)
            if not _wanted(st, group)[reserves] or not _start(st, group):
                pending.remove(group)
    for group in list(st.starved.values()):
        urgent, spare = _wanted(st, group)
        if urgent:
            _make_room(st, group, urgent)
        _mark_starved(st, group, urgent, spare)
    st.freed = False


def _make_room(st: State, group: Group, urgent: int) -> None:
    """Stop idle instances of others where a limit on instances keeps calls waiting."""
    service = group.service
    limit = service.spec.scaling.max_containers
    if limit is not None and service.instances >= limit:
        while service.stopping < urgent:
            idle = [next(iter(g.idle.values())) for g in service.groups.values() if g.idle]
            if not idle:
                return
            _stop(st, min(idle, key=lambda i: i.since), "makes room for other parameters")
    elif len(st.instances) >= st.config.max_instances:
        while st.stopping < urgent and st.idle:
            # Oldest first; those that `min_containers` asks for only when there is no other.
            spare = (i for i in st.idle.values() if i.group.live > _floor(i.group))
            _stop(st, next(spare, None) or next(iter(st.idle.values())), "makes room for another function")


def _should_yield(st: State, group: Group) -> bool:
    """Whether a group with calls of its own is to give up an instance to one that a limit starves."""
    if st.now < st.yield_at:
        return False
    st.yield_at = st.now + min(1.0, st.config.give_way)
    for other in st.starved.values():
        if other is group or st.now - other.starved_since < st.config.give_way:
            continue
        if other.live and other.live + 1 >= group.live:
            continue
        limit = other.service.spec.scaling.max_containers
        if limit is not None and other.service.instances >= limit:
            if other.service is group.service and not group.service.stopping:
                return True
        elif len(st.instances) >= st.config.max_instances and not st.stopping:
            return True
    return False


# Time


def _push(st: State, time: float, kind: str, ident: tuple[str, ...]) -> None:
    st.heap_seq += 1
    heappush(st.heap, (time, st.heap_seq, kind, ident))


def _deadline(st: State, inst: Instance, time: float) -> None:
    """Move an instance's deadline. A later one leaves the heap alone, so that warm calls do not fill it."""
    inst.deadline = time
    if time < inst.armed:
        inst.armed = time
        _push(st, time, "instance", (inst.id,))


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
                _deadline(st, inst, inst.deadline)
        elif kind == "call":
            call = st.calls.get(ident[0])
            if call is not None and call.state == "waiting_retry" and call.retry_at <= st.now:
                _enqueue(st, call)
        else:
            service = st.services.get(ident[0])
            group = service.groups.get(ident[1]) if service else None
            if group is not None:
                _schedule(st, group)


def _overdue(st: State, inst: Instance) -> None:
    group = inst.group
    spec = group.service.spec
    if inst.state == "idle":
        _scale_down(st, inst)
    elif inst.state == "stopping":
        _kill(st, inst, f"{inst.reason}; exit hooks ran past {st.config.stop_grace:g} s")
    elif inst.state == "running":
        _cut_off(st, inst)
    elif inst.state == "capturing":
        _kill(st, inst, "capture hangs")
        _capture_broke(st, inst, f"no end after {spec.startup_timeout:g} s")
        _schedule(st, group)
    elif inst.stage == "restoring":
        _restore_broke(st, inst, f"no end after {spec.startup_timeout:g} s", at_fault=False)
        _kill(st, inst, "restore hangs")
        _schedule(st, group)
    else:
        _kill(st, inst, "start-up timeout")
        error = StartupError(
            f"{spec.tag}: not ready after {spec.startup_timeout:g} s (stage: {inst.stage or 'start'}); "
            "make import and enter faster or raise startup_timeout",
            instance=inst.id,
            stage=inst.stage,
        )
        _start_broke(st, inst, error.to_dict(), user_fault=True)
        _schedule(st, group)


def _cut_off(st: State, inst: Instance) -> None:
    """A call ran too long: for its timeout, or for a daemon that has to stop."""
    group, call = inst.group, inst.call
    assert call is not None
    inst.call = call.instance = None
    if st.now >= st.shutdown_at:
        # No end for the call: it stays unfinished, for the next daemon.
        _kill(st, inst, "daemon stops")
        call.attempts -= 1
        return _enqueue(st, call, front=True)
    timeout = group.service.spec.timeout
    name = group.service.tag if call.method == group.service.tag else f"{group.service.tag}.{call.method}"
    _kill(st, inst, "call timeout")
    error = FunctionTimeoutError(
        f"{name}: ran past its timeout of {timeout:g} s; raise timeout= or do less in one call",
        call=call.id,
        timeout=timeout,
    )
    _fail_call(st, call, "failure", error.to_dict())
    _schedule(st, group)


def _scale_down(st: State, inst: Instance) -> None:
    group = inst.group
    if group.live > _target(st, group):
        return _stop(st, inst, "idle")
    if group.live > _floor(group):
        # Kept as a buffer as long as there is load.
        load = st.now if group.running or group.queue else group.last_load
        return _deadline(st, inst, max(load + group.service.spec.scaling.scaledown_window, st.now + 1.0))
    inst.deadline = NEVER


_HANDLERS: dict[type[Event], Callable[[State, Any], None]] = {
    AppDeployed: _app_deployed,
    AppStopped: _app_stopped,
    CallCancelled: _call_cancelled,
    CallFinished: _call_finished,
    CallSubmitted: _call_submitted,
    CaptureFailed: _capture_failed,
    InstanceExited: _instance_exited,
    InstanceReady: _instance_ready,
    InstanceStage: _instance_stage,
    InstanceStopRequested: _instance_stop_requested,
    InstanceStopped: _instance_stopped,
    RestoreFailed: _restore_failed,
    ShutdownRequested: _shutdown,
    SnapshotAvailable: _snapshot_available,
    SnapshotCaptured: _snapshot_captured,
    SnapshotInvalidated: _snapshot_invalidated,
    SnapshotRequested: _snapshot_requested,
    StartFailed: _start_failed,
    Tick: _tick,
}
