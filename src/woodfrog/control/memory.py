"""Who may take memory: what an instance is expected to need, what is left, who goes first. Pure.

An instance that starts, or serves, is promised what it is expected to need and does not use yet. A start goes ahead
where what is left beyond all promises holds it, or where nothing else runs: then it has the whole machine.
"""

from __future__ import annotations

from woodfrog.control.events import MemorySeen
from woodfrog.control.state import Group, Instance, Knowledge, Memory, State

__all__ = ["FILL_S", "expected", "fits", "fits_whole", "is_known", "look", "shortage"]

FILL_S = 5.0
"""After so long what was to be filled in is in."""
STEP = 4 << 20
"""Less than so much more is no growth."""
UNKNOWN_LEAST, UNKNOWN_MOST = 128 << 20, 1 << 30
"""What is expected of a function of which nothing is known: a quarter of the machine, within these."""


def expected(st: State, group: Group, chip: str, *, restore: bool) -> int:
    """Bytes that one more instance of the group will probably take."""
    knowledge = st.knows(group.service, group.digest, chip)
    limit = (group.service.spec.resources.memory_mib or 0) << 20
    need = knowledge.need or knowledge.size or limit or _unknown(st)
    if not restore:
        need = max(need, knowledge.size, knowledge.boot)
    elif group.service.spec.snapshot.gpu:
        need = max(need, knowledge.size)  # all of it is in before it runs
    return min(need, limit) if limit else need


def _unknown(st: State) -> int:
    total = st.memory.total if st.memory is not None else 0
    return min(max(total // 4, UNKNOWN_LEAST), UNKNOWN_MOST)


def is_known(st: State, group: Group, chip: str) -> bool:
    """Whether anything is known of what it takes."""
    knowledge = st.knows(group.service, group.digest, chip)
    return bool(knowledge.need or knowledge.size or group.service.spec.resources.memory_mib)


def fits(st: State, group: Group, need: int, *, known: bool = True) -> bool:
    """Whether one more instance may begin to take memory."""
    if st.memory is None or all(i.state == "parked" for i in st.instances.values()):
        return True
    if not known and group.live >= st.config.abreast:
        return False
    left = st.memory_left
    if left < need:
        return False
    # A small one passes a large one that does not fit yet, but not for ever.
    return not any(
        other is not group
        and not other.live
        and other.hungry_since + st.config.give_way <= st.now
        and other.hungry_since < group.hungry_since
        and left < need + other.hungry_need
        for other in st.starved.values()
    )


def fits_whole(st: State, inst: Instance) -> bool:
    """Whether there is room for the rest of its snapshot's memory; it can do without."""
    if st.memory is None:
        return True
    if any(group.hungry for group in st.starved.values()):
        return False
    return st.memory_left + inst.promised >= _size(st, inst) - inst.used


def shortage(st: State, group: Group, need: int) -> int:
    """Bytes that are missing for one more instance once all that is being stopped is gone; 0 = none are."""
    if fits(st, group, need):
        return 0
    leaving = sum(i.used for i in st.instances.values() if i.state == "stopping")
    return max(need - st.memory_left - leaving, 0)


def look(st: State, ev: MemorySeen) -> None:
    """Take in what the machine has and, where that is told too, what instances take of it."""
    st.memory = Memory(ev.total, ev.available) if ev.total else None
    if ev.used is None:
        return
    seen: dict[Knowledge, list[Instance]] = {}
    for inst in st.instances.values():
        inst.used = ev.used.get(inst.id, 0)
        inst.seen = inst.id in ev.used and inst.state not in ("starting", "capturing")
        if inst.park or inst.state == "stopping":
            continue
        knowledge = st.knows(inst.group.service, inst.group.digest, inst.chip)
        if _boots(inst):
            knowledge.boot = max(knowledge.boot, inst.used)
        else:
            if inst.used >= inst.grown + STEP:
                inst.grown, inst.grew_at = inst.used, ev.now
            inst.high = max(inst.high, inst.used)
        if not inst.whole:
            seen.setdefault(knowledge, []).append(inst)
    for knowledge, instances in seen.items():
        first = instances[0]
        before = expected(st, first.group, first.chip, restore=True)
        high = max(i.high for i in instances)
        # What has served no call may still be about to grow: it shows that more is needed, never that less is.
        if high and (any(i.proven(ev.now) for i in instances) or high > before):
            knowledge.need = high
        elif not is_known(st, first.group, first.chip) and any(i.known(ev.now) for i in instances):
            knowledge.need = before
    for inst in st.instances.values():
        if not inst.park:
            need = expected(st, inst.group, inst.chip, restore=not _boots(inst))
            inst.need = max(need, inst.high, _size(st, inst) if st.now < inst.fills_until else 0)


def _boots(inst: Instance) -> bool:
    return inst.state in ("starting", "capturing") and inst.snapshot_id is None


def _size(st: State, inst: Instance) -> int:
    return st.knows(inst.group.service, inst.group.digest, inst.chip).size
