"""What the machine's decisions are made of: calls, instances, snapshots, scaling, timers.

Each function changes the state, keeps every count right, and adds to `state.out` what the daemon has to do.
Nothing on the way of a warm call looks at more than its own group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from heapq import heappush
from typing import Any

from woodfrog.control.events import (
    CloseCall,
    FillMemory,
    FinishCall,
    KillInstance,
    Outcome,
    ParkInstance,
    RetireSnapshot,
    RetryCall,
    RunCall,
    StartInstance,
    StopInstance,
    WakeInstance,
)
from woodfrog.control.gpus import Gpu, chip_of, chips_for, choose, possible
from woodfrog.control.memory import FILL_S, expected, fits, fits_whole, is_known, shortage
from woodfrog.control.state import (
    HISTORY,
    NEVER,
    App,
    Call,
    Group,
    Instance,
    InstanceState,
    Knowledge,
    Service,
    State,
    WhyCold,
)

Error = dict[str, Any]


def note(st: State, entity: Call | Instance, state: str) -> None:
    history = entity.history
    history.append((st.now, state, st.event))
    if len(history) > HISTORY:
        del history[0]


# Calls


def enqueue(st: State, call: Call, front: bool = False) -> None:
    group = call.group
    if group.idle:
        run(st, group.idle.popitem()[1], call)
        if group.service.spec.scaling.buffer_containers:
            schedule(st, group)
        return
    if group.elder is not None and group.elder.idle and served_by(call, group.elder):
        return run(st, group.elder.idle.popitem()[1], call)
    call.state = "queued"
    note(st, call, "queued")
    group.queue[call.id] = call
    if front:
        group.queue.move_to_end(call.id, last=False)
    schedule(st, group)


def run(st: State, inst: Instance, call: Call) -> None:
    change(st, inst, "running")
    inst.call = call
    call.instance = inst
    call.state = "running"
    call.attempts += 1
    note(st, call, "running")
    set_deadline(st, inst, st.now + inst.group.service.spec.timeout)
    st.out.append(RunCall(call_id=call.id, instance_id=inst.id, attempt=call.attempts))


def retry_delay(call: Call) -> float | None:
    """Seconds until the next attempt; None = there is none."""
    policy = call.group.service.spec.retries
    if not call.retryable or call.attempts > policy.max_retries:
        return None
    try:
        delay = policy.initial_delay * policy.backoff_coefficient ** (call.attempts - 1)
    except OverflowError:
        delay = policy.max_delay
    return min(delay, policy.max_delay)


def fail_call(st: State, call: Call, outcome: Outcome, error: Error | None) -> None:
    """The call's attempt came to nothing: try again if its policy says so."""
    delay = retry_delay(call)
    if delay is None:
        end_call(st, call, outcome, error)
    else:
        retry(st, call, delay, error)


def retry(st: State, call: Call, delay: float, error: Error | None) -> None:
    attempts = call.group.service.spec.retries.max_retries + 1
    st.out.append(RetryCall(call_id=call.id, attempt=call.attempts, attempts=attempts, delay=delay, error=error))
    if delay <= 0:
        return enqueue(st, call)
    call.state = "waiting_retry"
    call.retry_at = st.now + delay
    note(st, call, "waiting_retry")
    push(st, call.retry_at, "call", (call.id,))


def end_call(st: State, call: Call, outcome: Outcome, error: Error | None) -> None:
    """The one place where a call ends. Its instance, if any, is the caller's to deal with."""
    group = call.group
    group.queue.pop(call.id, None)
    if call.instance is not None:
        call.instance.call = None
        call.instance = None
    del st.calls[call.id]
    group.calls -= 1
    group.service.calls -= 1
    remember(st, call.id, outcome)
    st.out.append(FinishCall(call_id=call.id, outcome=outcome, error=error))


def close(st: State, inst: Instance, call_id: str) -> None:
    """A generator's call is over before its code is: let that come to its end."""
    inst.closing = call_id
    set_deadline(st, inst, min(inst.deadline, st.now + st.config.close_grace))
    st.out.append(CloseCall(call_id=call_id, instance_id=inst.id))


def remember(st: State, call_id: str, outcome: Outcome) -> None:
    st.finished[call_id] = outcome
    if len(st.finished) > st.config.keep_finished:
        st.finished.popitem(last=False)


# Instances


def change(st: State, inst: Instance, state: InstanceState | None) -> None:
    """Change an instance's state and every count that depends on it; None = gone."""
    group, service = inst.group, inst.group.service
    if inst.state in ("starting", "capturing"):
        group.parking -= inst.park
        group.starting -= not inst.park
        st.cold_starting -= inst.mode == "cold"
    elif inst.state == "parked":
        group.parked.pop(inst.id, None)
        st.parked.pop(inst.id, None)
        inst.park = False
    elif inst.state == "idle":
        group.idle.pop(inst.id, None)
        st.idle.pop(inst.id, None)
    elif inst.state == "running":
        group.running -= 1
    else:
        group.stopping -= 1
        service.stopping -= 1
        st.stopping -= 1
    note(st, inst, state or "gone")
    inst.since = st.now
    if state is None:
        return
    inst.state = state
    if state in ("starting", "capturing"):
        group.parking += inst.park
        group.starting += not inst.park
        st.cold_starting += inst.mode == "cold"
    elif state == "parked":
        group.parked[inst.id] = st.parked[inst.id] = inst
    elif state == "idle":
        group.idle[inst.id] = st.idle[inst.id] = inst
    elif state == "running":
        group.running += 1
    else:
        group.stopping += 1
        service.stopping += 1
        st.stopping += 1


def can_restore(st: State, group: Group, chip: str) -> bool:
    service = group.service
    if not service.spec.snapshot.enabled or group.force_cold:
        return False
    return st.knows(service, group.digest, chip).snapshot_id is not None


@dataclass(frozen=True)
class Place:
    """Where one more instance of a group goes. `chip`: as in `Instance`; `restore`: a snapshot for it is ready."""

    gpus: tuple[str, ...]
    chip: str
    restore: bool


def room(st: State, group: Group, *, spare: bool = False) -> Place | None:
    """Where the limits allow one more instance; None = nowhere now.

    Args:
        spare: nobody waits for it and nobody asked for it by number: it leaves memory for another one.
    """
    found = allowed(st, group)
    if found is None:
        return None
    need = expected(st, group, found.chip, restore=found.restore)
    if not fits(st, group, 2 * need if spare else need, known=is_known(st, group, found.chip)):
        return None
    # The user's own part of a thaw, `enter(snap=False)`, may take long, and holds up nobody.
    busy = (
        sum(i.state == "starting" and i.stage == "restoring" and i.mode == "restore" for i in st.instances.values())
        >= st.config.max_thawing
        if found.restore
        else st.cold_starting >= st.config.max_starting or awaits_snapshot(st, group, found.chip)
    )
    return None if busy else found


def awaits_snapshot(st: State, group: Group, chip: str) -> bool:
    """Whether enough of its cold starts are under way until the first of them is captured: then the rest are thawed."""
    if group.starting < st.config.abreast:
        return False
    capturer = st.instances.get(st.knows(group.service, group.digest, chip).capturer or "")
    return capturer is not None and capturer.group is group and capturer.state in ("starting", "capturing")


def allowed(st: State, group: Group) -> Place | None:
    """Where it would go, memory and what starts just now aside."""
    service = group.service
    limit = service.spec.scaling.max_containers
    if len(st.instances) >= st.config.max_instances or (limit is not None and service.instances >= limit):
        return None
    return place(st, group)


def lacks_memory(st: State, group: Group) -> bool:
    """Whether it is memory that its next instance waits for, parked ones included."""
    if st.memory is None:
        return False
    found = Place((), "", True) if group.parked else allowed(st, group)
    if found is None:
        return False
    group.hungry_need = expected(st, group, found.chip, restore=found.restore)
    return not fits(st, group, group.hungry_need, known=is_known(st, group, found.chip))


def fits_beside(st: State, group: Group, elder: Group) -> bool:
    """Whether there is memory for it beside its elder, once idle instances of others have made room."""
    idle = sum(i.used for i in st.idle.values() if i.group not in (group, elder))
    return not lacks_memory(st, group) or shortage(st, group, group.hungry_need) <= idle


def place(st: State, group: Group) -> Place | None:
    """None = it waits for a GPU."""
    if not needs_gpu(st, group):
        return Place((), "", can_restore(st, group, ""))
    others = gpus_for(st, group, avoid=group.no_room)
    gpus = others or gpus_for(st, group)
    if gpus is None:
        return None
    chip = chip_of(group.service.spec, gpus, st.config.gpus)
    # Where only those without room are left, it starts cold on one of them.
    return Place(gpus, chip, others is not None and can_restore(st, group, chip))


def knows_all(st: State, group: Group) -> list[Knowledge]:
    service = group.service
    return [st.knows(service, group.digest, chip) for chip in chips_for(service.spec, st.config.gpus)]


def of_instance(st: State, inst: Instance) -> Knowledge:
    """What is known of the snapshots that fit where this instance is."""
    return st.knows(inst.group.service, inst.group.digest, inst.chip)


def needs_gpu(st: State, group: Group) -> bool:
    """Whether its instances hold GPUs of this machine."""
    requests = group.service.spec.resources.gpu
    return bool(requests and st.config.gpus) and possible(requests, st.config.gpus)


def lacks_gpu(st: State, group: Group) -> bool:
    """Whether it waits for a GPU that others have."""
    return needs_gpu(st, group) and gpus_for(st, group) is None


def gpus_for(
    st: State, group: Group, *, without: tuple[Instance, ...] = (), avoid: frozenset[str] = frozenset()
) -> tuple[str, ...] | None:
    """GPUs for one more instance, were those of `without` free; None = there are not enough."""
    requests = group.service.spec.resources.gpu
    taken = avoid | {gpu for i in st.instances.values() if i not in without for gpu in i.gpus}
    known = st.knowledge[group.service.key]
    ready = {chip for (digest, chip), k in known.items() if digest == group.digest and k.snapshot_id}
    # Where none but those set aside would do, one of them is tried: it may be well again, else the calls are told why.
    return choose(requests, usable(st) if has_usable(st, group) else st.config.gpus, taken, ready)


def usable(st: State) -> tuple[Gpu, ...]:
    """The GPUs that are not set aside."""
    return tuple(g for g in st.config.gpus if g.id not in st.sick) if st.sick else st.config.gpus


def has_usable(st: State, group: Group) -> bool:
    """Whether GPUs that are not set aside could fulfil its requests, were they free."""
    return possible(group.service.spec.resources.gpu, usable(st))


def start(st: State, group: Group, *, spare: bool = False) -> bool:
    """Start one more instance, or wake one, unless a limit or memory forbids it. `spare`: in reserve."""
    if group.parked and wake(st, group):
        return True
    found = room(st, group, spare=spare and group.live >= floor(group))
    if found is None:
        return False
    service = group.service
    knowledge = st.knows(service, group.digest, found.chip)
    enabled = service.spec.snapshot.enabled
    why: WhyCold = "" if found.restore else why_cold(group, knowledge)
    if group.force_cold:
        group.force_cold -= 1
    if not found.restore:
        group.no_room = frozenset()
    capture = enabled and service.active and not found.restore and capture_due(knowledge)
    need = expected(st, group, found.chip, restore=found.restore)
    inst = begin(st, group, knowledge.snapshot_id if found.restore else None, capture=capture)
    inst.gpus, inst.chip, inst.need, inst.why_cold = found.gpus, found.chip, need, why
    if capture:
        knowledge.capturer = inst.id
    if group.starved_since != NEVER:
        group.starved_since = st.now
    st.out.append(
        StartInstance(
            instance_id=inst.id,
            service_id=service.id,
            params_digest=group.digest,
            mode=inst.mode,
            snapshot_id=inst.snapshot_id,
            capture=capture,
            gpus=found.gpus,
        )
    )
    return True


def why_cold(group: Group, knowledge: Knowledge) -> WhyCold:
    """Why a start of this group's that is about to begin thaws nothing."""
    if not group.service.spec.snapshot.enabled:
        return "off"
    if group.force_cold:
        return "did-not-thaw"
    if knowledge.snapshot_id is not None:
        return "gpu-full"
    if knowledge.capturer is not None:
        return "being-made"
    return "gave-up" if knowledge.gave_up else "none-fits"


def begin(st: State, group: Group, snapshot_id: str | None, *, capture: bool = False, park: bool = False) -> Instance:
    """A new instance, starting."""
    st.counter += 1
    inst = Instance(
        id=f"i-{st.run}-{st.counter}",
        group=group,
        mode="restore" if snapshot_id else "cold",
        snapshot_id=snapshot_id,
        capture=capture,
        started_at=st.now,
        since=st.now,
        born=st.seq,
        park=park,
        stage="restoring" if snapshot_id else "",
    )
    st.instances[inst.id] = group.instances[inst.id] = inst
    group.service.instances += 1
    group.parking += park
    group.starting += not park
    st.cold_starting += not snapshot_id
    note(st, inst, "starting")
    set_deadline(st, inst, st.now + group.service.spec.startup_timeout)
    return inst


def serve(st: State, inst: Instance) -> None:
    """An instance is free: give it the next call, or rest, or go."""
    group = inst.group
    service = group.service
    if st.shutting_down:
        return stop(st, inst, "daemon stops")
    if on_sick(st, inst):
        stop(st, inst, "its GPU was set aside")
        return schedule(st, group)
    if inst.served and service.spec.scaling.single_use:
        stop(st, inst, "single use")
        return schedule(st, group)
    if group.queue:
        if st.starved and should_yield(st, group):
            stop(st, inst, "makes room for another function")
            group.starved_since = st.now  # it was served until now
            return schedule(st, group)
        return run(st, inst, group.queue.popitem(last=False)[1])
    if group.heir is not None:
        call = next((c for c in group.heir.queue.values() if served_by(c, group)), None)
        if call is not None:
            del group.heir.queue[call.id]
            run(st, inst, call)
            return schedule(st, group.heir)
    elif not service.active:
        return stop(st, inst, "newer version")
    change(st, inst, "idle")
    set_deadline(st, inst, st.now + service.spec.scaling.scaledown_window)
    if st.starved:
        st.freed = True


def on_sick(st: State, inst: Instance) -> bool:
    """Whether one of its GPUs was set aside since it has it."""
    return any(gpu in st.sick for gpu in inst.gpus)


def stop(st: State, inst: Instance, reason: str) -> None:
    change(st, inst, "stopping")
    inst.reason = reason
    set_deadline(st, inst, st.now + st.config.stop_grace)
    st.out.append(StopInstance(instance_id=inst.id, reason=reason, graceful=True))


def kill(st: State, inst: Instance, reason: str) -> None:
    if inst.killed:
        return
    inst.killed = True
    inst.reason = reason
    inst.deadline = NEVER
    change(st, inst, "stopping")
    st.freed = True
    st.out.append(KillInstance(instance_id=inst.id, reason=reason))


def dismiss(st: State, inst: Instance, reason: str) -> None:
    """Let it go in the way that fits its state."""
    if inst.state == "idle":
        stop(st, inst, reason)
    elif inst.state != "stopping":
        kill(st, inst, reason)


# Parked instances


def park_target(st: State, group: Group) -> int:
    """How many parked instances the group should have, limits aside."""
    service = group.service
    if st.shutting_down or not service.active or not can_restore(st, group, ""):
        return 0
    if service.spec.resources.gpu and st.config.gpus:
        return 0  # it would hold a GPU that others could use
    if not st.knows(service, group.digest, "").used:
        return 0
    if not (group.queue or group.running) and st.now - group.last_load >= st.config.park_window:
        return 0
    return max(st.config.parked, 0 if group.digest else service.spec.scaling.buffer_containers)


def park(st: State, group: Group) -> None:
    """Park one more if that is due; nobody waits for it, so anything else comes first."""
    if len(group.parked) + group.parking >= park_target(st, group):
        return
    if st.now < group.hold_parks:
        return park_later(st, group, 0.0)
    if group.parking or group.starting or group.queue:
        return  # the end of that comes back here
    if st.starved or room(st, group, spare=True) is None:
        return park_later(st, group, st.config.park_full)
    knowledge = st.knows(group.service, group.digest, "")
    assert knowledge.snapshot_id is not None
    inst = begin(st, group, knowledge.snapshot_id, park=True)
    st.out.append(
        ParkInstance(
            instance_id=inst.id,
            service_id=group.service.id,
            params_digest=group.digest,
            snapshot_id=knowledge.snapshot_id,
        )
    )


def park_later(st: State, group: Group, seconds: float) -> None:
    """Nothing is parked for so long."""
    group.hold_parks = max(group.hold_parks, st.now + seconds)
    if group.parks_timer != group.hold_parks and park_target(st, group):
        group.parks_timer = group.hold_parks
        push(st, group.hold_parks, "group", group.key)


def wake(st: State, group: Group) -> bool:
    """Let the newest parked instance run, if there is memory for what it will take."""
    need = expected(st, group, "", restore=True)
    if not fits(st, group, need):
        return False
    inst = group.parked.popitem()[1]
    change(st, inst, "starting")
    inst.need = need
    inst.stage = "restoring"
    set_deadline(st, inst, st.now + group.service.spec.startup_timeout)
    st.out.append(WakeInstance(instance_id=inst.id))
    return True


def unpark(st: State, snapshot_id: str, reason: str) -> None:
    """The snapshot is not to be used any more."""
    for inst in [i for i in st.instances.values() if i.park and i.snapshot_id == snapshot_id]:
        dismiss(st, inst, reason)
        park_later(st, inst.group, st.config.park_delay)


def gone(st: State, inst: Instance) -> None:
    """It does not exist any more. Follow with `after_loss` once the causes are dealt with."""
    group = inst.group
    change(st, inst, None)
    del st.instances[inst.id]
    del group.instances[inst.id]
    group.service.instances -= 1
    if st.memory is not None and inst.used:
        st.memory = replace(st.memory, available=st.memory.available + inst.used)
    st.freed = True


def after_loss(st: State, inst: Instance) -> None:
    group = inst.group
    service = group.service
    knowledge = of_instance(st, inst)
    if knowledge.capturer == inst.id and not inst.storing:
        knowledge.capturer = None
        schedule_key(st, service.key, group.digest)
    schedule(st, group)
    tidy(st, group)


def start_broke(st: State, inst: Instance, error: Error, user_fault: bool) -> None:
    """A start failed. The user's fault fails all calls that wait for this group; ours is tried again first."""
    group = inst.group
    config = st.config
    if inst.born > group.failure_seq:
        group.start_failures += 1
        group.failure_seq = st.seq
    exponent = min(group.start_failures - 1, 30)
    group.hold_spares = st.now + min(config.start_backoff * 2.0**exponent, config.max_backoff)
    push(st, group.hold_spares, "group", group.key)
    # While an older version serves, calls wait for its instances; else there would be no end of starts for them.
    served = group.elder is not None and (group.elder.standby or bool(group.elder.running))
    hopeless = user_fault or group.start_failures >= config.start_attempts
    group.start_error, group.hopeless = str(error.get("message", "")), hopeless
    if hopeless:
        group.capture_wanted = group.standby = False
    if group.elder is not None and group.elder.standby:
        schedule(st, group.elder)
    if not user_fault or served:
        exponent = min(exponent, config.start_attempts - 1)
        group.hold_calls = st.now + min(config.start_backoff * 2.0**exponent, config.max_backoff)
        push(st, group.hold_calls, "group", group.key)
    if not hopeless or served:
        return
    waiting = list(group.queue.values())
    group.queue.clear()
    for call in waiting:
        call.attempts += 1
        fail_call(st, call, "failure", error)


def tidy(st: State, group: Group) -> None:
    """Forget a group that nothing is left of, and its service if that has drained."""
    service = group.service
    if group.calls or group.instances or group.capture_wanted or group.elder is not None or group.standby:
        return
    heir = group.heir
    if heir is not None:
        part(heir)
        tidy(st, heir)
    if group.digest or not service.active:
        service.groups.pop(group.digest, None)
        st.starved.pop(group.key, None)
    tidy_service(st, service)


def tidy_service(st: State, service: Service) -> None:
    if service.active or service.calls or service.instances or any(g.standby for g in service.groups.values()):
        return
    app = st.apps.get(service.app)
    if app is None or app.services.pop(service.id, None) is None:
        return
    del st.services[service.id]
    if not any(s.key == service.key for s in st.services.values()):
        del st.knowledge[service.key]
    tidy_app(st, app)


def tidy_app(st: State, app: App) -> None:
    if app.stopped and not app.services:
        st.apps.pop(app.name, None)


# From one version to the next


def drain(st: State, group: Group) -> None:
    """New calls go elsewhere: keep only what its unfinished calls need."""
    group.capture_wanted = False
    spare = group.starting - len(group.queue)
    for inst in list(group.instances.values()):
        if inst.state == "idle" and (group.heir is None or group.standby):
            stop(st, inst, "newer version")
        elif inst.park:
            kill(st, inst, "newer version")
        elif inst.state in ("starting", "capturing") and spare > 0:
            spare -= 1
            kill(st, inst, "newer version")
    tidy(st, group)


def served_by(call: Call, elder: Group) -> bool:
    """Whether that version has the call's method, too."""
    return elder.service.generators.get(call.method) == call.group.service.generators[call.method]


def succeed(st: State, old: Group, service: Service | None) -> None:
    """A newer version's service takes the place of this group's, or nothing does. What is warm serves on until that has
    an instance ready. Where nobody uses it the next call gets the newer code, and where somebody just did, that is so
    unless it does not start."""
    elder = old.elder or old
    busy = any(g.running or g.queue for g in (old, elder))
    standby = elder.standby
    part(old)
    elder.standby = False
    late = st.now - max(old.last_load, elder.last_load) < st.config.just_used
    in_use = busy or (late and elder is not old)  # it serves in place of one that does not start
    in_use = in_use or (service is not None and service.spec.scaling.min_containers > 0 and not old.digest)
    if service is not None and (standby or (elder.warm and (in_use or late))):
        group = service.group(old.digest)
        # Without room beside the elder it would wait for the elder's end.
        if len(st.instances) < st.config.max_instances and not lacks_gpu(st, group) and fits_beside(st, group, elder):
            group.elder, elder.heir, elder.standby = elder, group, not (elder.warm and in_use)
            set_rolling(st, group)
    if elder is not old and elder.heir is None:
        drain(st, elder)
        tidy_service(st, elder.service)


def set_rolling(st: State, group: Group) -> None:
    group.rolls_until = st.now + group.service.spec.startup_timeout
    push(st, group.rolls_until, "group", group.key)


def part(group: Group) -> None:
    """Its elder serves no more of its calls."""
    if group.elder is not None:
        group.elder.heir, group.elder.standby = None, False
        group.elder = None


def retire_elder(st: State, group: Group) -> None:
    """Its own instances serve from now on, or have to."""
    elder = group.elder
    if elder is not None:
        part(group)
        drain(st, elder)
        tidy_service(st, elder.service)
        schedule(st, group)
        tidy(st, group)


def end_rolling(st: State, group: Group) -> None:
    """The elder gives way where both together have no room, and one on standby where the new version was not called.
    While starts go on, or fail, it serves."""
    if group.elder is None or st.now < group.rolls_until:
        return
    unused = group.elder.standby and not (group.start_failures or group.starting or group.calls)
    if group.key in st.starved or unused:
        retire_elder(st, group)
    else:
        set_rolling(st, group)


# Snapshots


def capture_due(knowledge: Knowledge) -> bool:
    return knowledge.snapshot_id is None and knowledge.capturer is None and not knowledge.gave_up


def hand_on(st: State, old: Service, new: Service) -> None:
    """Until its own instances are seen, a version takes what the one before took."""
    for (digest, chip), known in list(st.knowledge[old.key].items()):
        if known.need and not (knowledge := st.knows(new, digest, chip)).need:
            knowledge.need, knowledge.boot = known.need, known.boot


def learn(knowledge: Knowledge, snapshot_id: str, size: int) -> None:
    knowledge.size = size or knowledge.size
    if knowledge.snapshot_id != snapshot_id:
        knowledge.snapshot_id = snapshot_id
        knowledge.failures = 0
        knowledge.used = False


def fill(st: State, inst: Instance) -> None:
    """It is used: the rest of its snapshot's memory may come, where there is room for that."""
    if inst.whole or inst.snapshot_id is None or inst.state == "stopping" or not st.config.drain_calls:
        return
    if inst.served >= st.config.drain_calls and fits_whole(st, inst):
        inst.whole = True
        inst.fills_until = st.now + FILL_S
        inst.need = max(inst.need, of_instance(st, inst).size)
        st.out.append(FillMemory(instance_id=inst.id))


def note_use(st: State, inst: Instance) -> None:
    """An instance has answered a call."""
    knowledge = of_instance(st, inst)
    if inst.served and inst.snapshot_id is not None and inst.snapshot_id == knowledge.snapshot_id:
        first, knowledge.used = not knowledge.used, True
        if first:
            park_later(st, inst.group, st.config.park_delay)


def attempt_failed(st: State, knowledge: Knowledge, reason: str) -> None:
    knowledge.attempts += 1
    knowledge.reason = reason
    if knowledge.attempts >= st.config.capture_attempts:
        knowledge.gave_up = True


def capture_broke(st: State, inst: Instance, reason: str) -> None:
    service, digest = inst.group.service, inst.group.digest
    knowledge = of_instance(st, inst)
    if knowledge.capturer == inst.id:
        knowledge.capturer = None
        inst.capture = inst.storing = False
        attempt_failed(st, knowledge, reason)
        schedule_key(st, service.key, digest)


def restore_broke(st: State, inst: Instance, reason: str, at_fault: bool) -> None:
    """Count it against the snapshot, and let the start in its place be a cold one."""
    group = inst.group
    knowledge = of_instance(st, inst)
    if inst.park:
        park_later(st, group, st.config.park_retry)
    elif inst.state != "stopping":
        group.force_cold += 1
        group.thaw_error = reason
    if inst.snapshot_id is None or knowledge.snapshot_id != inst.snapshot_id:
        return
    knowledge.failures += 1
    knowledge.reason = reason
    if at_fault or knowledge.failures >= st.config.snapshot_failures:
        st.out.append(RetireSnapshot(snapshot_id=inst.snapshot_id, reason=reason))
        unpark(st, inst.snapshot_id, "its snapshot was retired")
        knowledge.snapshot_id = None
        knowledge.failures = 0
        attempt_failed(st, knowledge, reason)


def schedule_key(st: State, key: str, digest: str) -> None:
    """What is known of a snapshot changed: that may let starts go ahead in every service of the key."""
    for service in [s for s in st.services.values() if s.key == key]:
        group = service.groups.get(digest)
        if group is not None:
            schedule(st, group)


# Scaling


def target(st: State, group: Group) -> int:
    """How many instances the group should have, limits aside."""
    service = group.service
    load = len(group.queue) + group.running
    if group.heir is not None:
        return max(load, min(group.live, floor(group)), int(group.standby and group.heir.start_failures > 0))
    if group.elder is not None and not group.elder.standby:
        load = max(load, 1)
    if not service.active or group.digest:
        return load
    policy = service.spec.scaling
    recent = load or st.now - group.last_load < policy.scaledown_window
    if policy.buffer_containers and recent and (not can_restore(st, group, "") or needs_gpu(st, group)):
        load += policy.buffer_containers  # otherwise they are parked
    return max(load, policy.min_containers)


def floor(group: Group) -> int:
    service = group.service
    if group.digest or not (service.active or group.heir is not None):
        return 0
    return service.spec.scaling.min_containers


def wanted(st: State, group: Group) -> tuple[int, int]:
    """Starts that someone waits for, and starts to have some in reserve."""
    if st.shutting_down:
        return 0, 0
    urgent = len(group.queue) - group.starting - group.parking if st.now >= group.hold_calls else 0
    urgent = max(urgent, 0)
    coming = min(group.parking, max(len(group.queue) - group.starting, 0))
    if st.now < group.hold_spares:
        return urgent, 0
    if group.capture_wanted:
        known = knows_all(st, group)
        if any(k.snapshot_id is not None or k.gave_up for k in known):
            group.capture_wanted = False
        elif all(k.capturer is None for k in known):
            urgent = max(urgent, 1)
    return urgent, max(target(st, group) - group.live - coming - urgent, 0)


def schedule(st: State, group: Group) -> None:
    """Start what the group needs, as far as the limits allow; the rest waits in `starved` for `feed`."""
    urgent, spare = wanted(st, group)
    while (urgent or spare) and group.parked and wake(st, group):
        urgent, spare = wanted(st, group)
    if st.starved:
        # Others wait too: who comes first is not for this group to say.
        st.freed = st.freed or bool((urgent or spare) and room(st, group))
    else:
        while urgent and start(st, group):
            urgent -= 1
        while spare and not urgent and start(st, group, spare=True):
            spare -= 1
    if urgent:
        make_room(st, group, urgent)
    mark_starved(st, group, urgent, spare)
    if not urgent and not spare:
        park(st, group)


def mark_starved(st: State, group: Group, urgent: int, spare: int) -> None:
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
    if not urgent or not lacks_memory(st, group):
        group.hungry_since = NEVER
    elif group.hungry_since == NEVER:
        group.hungry_since = st.now


def feed(st: State) -> None:
    """Room was made: groups with the fewest instances come first, then those that wait longest; waiting calls before
    mere reserves."""
    st.freed = False
    for reserves in (False, True):
        pending = list(st.starved.values())
        while pending and (len(st.instances) < st.config.max_instances or st.parked):
            group = min(pending, key=lambda g: (g.live, g.starved_since))
            if not wanted(st, group)[reserves] or not start(st, group, spare=reserves):
                pending.remove(group)
    for group in list(st.starved.values()):
        urgent, spare = wanted(st, group)
        if urgent:
            make_room(st, group, urgent)
        mark_starved(st, group, urgent, spare)
    st.freed = False


def make_room(st: State, group: Group, urgent: int) -> None:
    """Stop idle instances of others where a limit on instances keeps calls waiting."""
    service = group.service
    limit = service.spec.scaling.max_containers
    if limit is not None and service.instances >= limit:
        while service.stopping < urgent:
            parked = next((i for g in service.groups.values() for i in g.parked.values()), None)
            if parked is not None:
                kill(st, parked, "makes room for other parameters")
                park_later(st, parked.group, st.config.park_full)
                continue
            idle = [next(iter(g.idle.values())) for g in service.groups.values() if g.idle]
            if not idle:
                return
            stop(st, min(idle, key=lambda i: i.since), "makes room for other parameters")
    elif lacks_gpu(st, group):
        free_gpu(st, group)  # which makes room under the limit on instances, too; another's end would not help
    elif len(st.instances) >= st.config.max_instances:
        while st.stopping < urgent and st.parked:
            parked = next(iter(st.parked.values()))
            kill(st, parked, "makes room for another function")
            park_later(st, parked.group, st.config.park_full)
        while st.stopping < urgent and st.idle:
            # Oldest first; those that `min_containers` asks for only when there is no other.
            spare = (i for i in st.idle.values() if i.group.live > floor(i.group))
            stop(st, next(spare, None) or next(iter(st.idle.values())), "makes room for another function")
    elif lacks_memory(st, group):
        free_memory(st, group)


def free_memory(st: State, group: Group) -> None:
    """Stop idle instances of others, the least recently used first, as few as one start needs, then parked ones.

    Where all of them are not enough they go only for a function that nothing serves: it may need the whole machine.
    """
    missing = shortage(st, group, group.hungry_need)
    idle = [i for i in st.idle.values() if i.group not in (group, group.elder)]
    idle.sort(key=lambda i: i.group.live <= floor(i.group))
    going = []
    for inst in [*idle, *(i for i in st.parked.values() if i.group is not group)]:
        if missing <= 0:
            break
        going.append(inst)
        missing -= inst.used
    if missing > 0 and group.live:
        return
    for inst in going:
        if inst.park:
            park_later(st, inst.group, st.config.park_full)
        dismiss(st, inst, "makes room in memory for another function")


def free_gpu(st: State, group: Group) -> None:
    """Stop idle instances that hold GPUs, oldest first, as few as one start needs; none where that would not do."""
    leaving = tuple(i for i in st.instances.values() if i.state == "stopping" and i.gpus)
    holders = [i for i in st.idle.values() if i.gpus]
    holders.sort(key=lambda i: i.group.live <= floor(i.group))
    for count in range(len(holders) + 1):
        if gpus_for(st, group, without=(*leaving, *holders[:count])) is None:
            continue
        going = holders[:count]
        for holder in holders[:count]:
            rest = [h for h in going if h is not holder]
            if gpus_for(st, group, without=(*leaving, *rest)) is not None:
                going = rest  # it is of another chip, or has less than the others
        for holder in going:
            stop(st, holder, "makes room on its GPU for another function")
        return


def should_yield(st: State, group: Group) -> bool:
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
        elif not st.stopping and (
            len(st.instances) >= st.config.max_instances
            or (lacks_gpu(st, other) and needs_gpu(st, group))
            or other.hungry
        ):
            return True
    return False


# Timers


def push(st: State, time: float, kind: str, ident: tuple[str, ...]) -> None:
    st.heap_seq += 1
    heappush(st.heap, (time, st.heap_seq, kind, ident))


def set_deadline(st: State, inst: Instance, time: float) -> None:
    """Move an instance's deadline. A later one leaves the heap alone, so that warm calls do not fill it."""
    inst.deadline = time
    if time < inst.armed:
        inst.armed = time
        push(st, time, "instance", (inst.id,))
