"""Who may start when memory is short: the control machine's rules, what it is told, and what people are told."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from unit.test_control import ERROR, Driver, names
from unit.test_control import function as plain
from woodfrog.control import events as ev
from woodfrog.control.events import Action
from woodfrog.daemon.logs import LogBook
from woodfrog.daemon.memory import MemoryWatch, short_of, to_give
from woodfrog.errors import SpecError
from woodfrog.linux import cgroups, meminfo
from woodfrog.linux.meminfo import Room
from woodfrog.settings import load
from woodfrog.spec import FunctionSpec, Resources, ScalingPolicy, SnapshotPolicy

MIB = 1 << 20


def function(tag: str = "f", **changes: Any) -> FunctionSpec:
    return plain(tag, **{"snapshot": SnapshotPolicy(enabled=True), **changes})


class Machine(Driver):
    """With so many MiB, of which those in `takes` have theirs."""

    def __init__(self, *specs: FunctionSpec, mib: int, **config: Any) -> None:
        super().__init__(**config)
        self.mib = mib
        self.takes: dict[str, int] = {}
        self.look()
        self.deploy(*specs)

    def look(self, **takes: int) -> list[Action]:
        self.takes.update({name.replace("_", "-"): mib for name, mib in takes.items()})
        used = {name: mib * MIB for name, mib in self.takes.items() if name in self.state.instances}
        left = self.mib * MIB - sum(used.values())
        return self.send(ev.MemorySeen, total=self.mib * MIB, available=left, used=used)

    def found(self, mib: int, tag: str = "f", snapshot: str = "s") -> list[Action]:
        return self.send(ev.SnapshotAvailable, app="a", tag=tag, snapshot_id=snapshot, size=mib * MIB)

    def serve(self, tag: str = "f", mib: int = 0) -> str:
        """A call is answered by an instance that is new; it takes so much."""
        [begun] = self.call(tag)
        inst = begun.instance_id  # type: ignore[attr-defined]
        self.ready(inst)
        self.done(f"c{self.calls}", inst)
        self.look(**{inst: mib})
        return inst


def starts(actions: list[Action]) -> list[str]:
    return [a.instance_id for a in actions if isinstance(a, (ev.StartInstance, ev.WakeInstance))]


def calls(d: Driver, count: int, tag: str = "f") -> list[str]:
    return [s for _ in range(count) for s in starts(d.call(tag))]


def test_nobody_looks_and_all_start() -> None:
    assert len(calls(Driver(function()), 8)) == 8


def test_as_many_are_thawed_as_their_memory_allows_and_serve_the_rest() -> None:
    d = Machine(function(), mib=1000)
    d.found(200)
    assert len(calls(d, 30)) == 5
    for n in range(1, 6):
        d.ready(f"i-t-{n}")
    taken = [d.done(f"c{n}", f"i-t-{n}")[-1] for n in range(1, 6)]
    assert [a.call_id for a in taken if isinstance(a, ev.RunCall)] == ["c6", "c7", "c8", "c9", "c10"]


def test_what_is_seen_of_them_lets_more_start() -> None:
    """A copy takes what it touches, not all that its snapshot holds."""
    d = Machine(function(), mib=1000)
    d.found(400)
    assert calls(d, 20) == ["i-t-1", "i-t-2"]
    d.ready("i-t-1")
    assert starts(d.look(i_t_1=20)) == [], "it has not answered yet: it may still grow"
    d.done("c1", "i-t-1")
    assert len(starts(d.look(i_t_1=100))) == 8, "of 1000 it has 100, and 100 are promised to the other"


def test_a_call_that_runs_on_shows_what_it_takes() -> None:
    d = Machine(function(), mib=1000)
    d.found(900)
    calls(d, 3)
    d.ready("i-t-1")
    for d.now, mib in ((3.0, 50), (5.0, 97), (8.0, 100), (9.9, 101), (14.8, 103)):  # type: ignore[misc]
        assert starts(d.look(i_t_1=mib)) == [], "it grows"
    d.now = 15.0
    assert starts(d.look(i_t_1=103)) == ["i-t-2", "i-t-3"]


def test_what_was_looked_at_before_its_call_ended_shows_nothing() -> None:
    d = Machine(function(), mib=1000)
    d.found(900)
    calls(d, 3)
    d.ready("i-t-1")
    d.now = 1.0
    d.done("c1", "i-t-1")
    d.now = 0.9
    assert starts(d.look(i_t_1=100)) == []
    d.now = 1.1
    assert starts(d.look(i_t_1=100)) == ["i-t-2"]


def test_more_than_expected_counts_at_once() -> None:
    d = Machine(function(), mib=1000)
    d.found(100)
    assert len(calls(d, 3)) == 3
    d.ready("i-t-1")
    d.look(i_t_1=600)
    assert calls(d, 1) == [], "each of those that start is now expected to take as much"


def test_one_may_always_start() -> None:
    d = Machine(function(), mib=100)
    d.found(5000)
    assert calls(d, 2) == ["i-t-1"]


def test_a_declared_limit_is_the_most_and_the_first_guess() -> None:
    d = Machine(function(resources=Resources(memory_mib=300)), mib=1000)
    assert len(calls(d, 9)) == 3
    d = Machine(function(resources=Resources(memory_mib=100)), mib=1000)
    d.found(400)
    assert len(calls(d, 20)) == 10


def test_an_unknown_function_starts_few_until_one_is_seen() -> None:
    d = Machine(plain(), mib=16_000, abreast=2)
    assert calls(d, 6) == ["i-t-1", "i-t-2"]
    d.now = 1.0
    assert starts(d.look(i_t_1=30, i_t_2=30)) == []
    d.now = 2.0
    assert len(starts(d.look(i_t_1=30, i_t_2=30))) == 4


def test_the_next_version_is_expected_to_take_as_much() -> None:
    d = Machine(function(), mib=1000)
    inst = d.serve(mib=450)
    d.deploy(function())
    d.stopped(inst)
    assert len(calls(d, 5)) == 2


def test_a_new_version_starts_beside_the_old_one_where_idle_ones_make_room() -> None:
    for mib, beside in ((800, True), (750, False)):
        d = Machine(function(), function("g"), mib=mib)
        other, inst = d.serve("g", mib=300), d.serve(mib=400)
        d.call()
        stops = [a.instance_id for a in d.deploy(function(), function("g")) if isinstance(a, ev.StopInstance)]
        new = d.state.services["a/f@2"]
        assert bool(new.groups and new.groups[""].elder) == beside
        assert stops == [other], "of an older version, and idle"
        d.stopped(other)
        assert d.states()[inst] == "running"


def test_a_parked_one_is_not_woken_where_it_does_not_fit() -> None:
    d = Machine(function(scaling=ScalingPolicy(buffer_containers=1)), function("g"), mib=1250)
    d.found(400)
    inst = d.serve(mib=400)
    [parked] = [a.instance_id for a in d.at(2.0) if isinstance(a, ev.ParkInstance)]
    d.send(ev.InstanceParked, instance_id=parked)
    other = d.serve("g", mib=500)
    d.call("g")  # it is in use
    assert calls(d, 1) == [], "the idle one"
    assert d.states()[inst] == "running"
    assert calls(d, 1) == []
    assert d.states()[parked] == "parked"
    d.done("c3", other)
    assert d.states()[other] == "stopping", "idle, and another's call waits"
    assert starts(d.stopped(other)) == [parked]


def test_nothing_is_kept_in_reserve_where_memory_is_short() -> None:
    spec = function(scaling=ScalingPolicy(buffer_containers=1))
    for mib, parked in ((900, 0), (1300, 1)):
        d = Machine(spec, mib=mib)
        d.found(400)
        d.serve(mib=400)
        assert sum(isinstance(a, ev.ParkInstance) for a in d.at(2.0)) == parked


def test_idle_ones_of_others_make_room_the_least_used_first() -> None:
    d = Machine(*(function(t) for t in "fghi"), mib=1000)
    a, b, c = (d.serve(t, mib=250) for t in "ghi")
    d.now = 1.0
    d.call("g")
    d.done("c4", a)  # used last
    assert starts(d.found(500)) == []
    stops = [x.instance_id for x in d.call("f") if isinstance(x, ev.StopInstance)]
    assert stops == [b], "250 are free, 250 come of it"
    assert d.states()[c] == d.states()[a] == "idle"
    assert starts(d.stopped(b)) == ["i-t-4"]


def test_nobody_goes_for_one_more_copy_that_does_not_fit_anyhow() -> None:
    d = Machine(function(), function("g"), mib=1000)
    d.found(800)
    idle = d.serve("g", mib=100)
    assert calls(d, 2) == ["i-t-2"]
    d.ready("i-t-2")
    d.look(i_t_2=800)
    assert d.states()[idle] == "idle"


def test_a_small_function_passes_a_large_one_but_not_for_ever() -> None:
    d = Machine(function("large"), function("small"), function("busy"), mib=1000, give_way=5.0)
    d.found(600, "large", "s-large")
    d.found(100, "small", "s-small")
    [begun] = d.call("busy")
    d.ready("i-t-1")
    d.look(i_t_1=500)
    assert calls(d, 1, "large") == []
    assert calls(d, 1, "small") == ["i-t-2"], "400 are left after it"
    d.ready("i-t-2")
    d.look(i_t_2=100)
    d.now = 6.0
    assert calls(d, 1, "small") == [], "it would keep the large one waiting"
    assert starts(d.done("c1", "i-t-1")) == []
    assert d.states()["i-t-1"] == "stopping"
    assert starts(d.stopped("i-t-1")) == ["i-t-3", "i-t-4"], "the large one first; then there is room for both"
    assert d.state.instances["i-t-3"].group.service.tag == "large"
    assert begun.instance_id == "i-t-1"  # type: ignore[attr-defined]


def test_a_function_that_is_always_busy_gives_way() -> None:
    d = Machine(function(), function("g"), mib=1000, give_way=5.0)
    d.found(300)
    assert len(calls(d, 4)) == 3
    for n in (1, 2, 3):
        d.ready(f"i-t-{n}")
    d.look(i_t_1=300, i_t_2=300, i_t_3=300)
    d.found(300, "g", "s-g")
    assert calls(d, 1, "g") == []
    d.now = 5.0
    actions = d.done("c1", "i-t-1")
    assert "StopInstance" in names(actions) and "RunCall" not in names(actions)
    assert [d.state.instances[i].group.service.tag for i in starts(d.stopped("i-t-1"))] == ["g"]


def test_what_ends_leaves_its_memory_at_once() -> None:
    d = Machine(function(), mib=500)
    d.found(400)
    assert calls(d, 2) == ["i-t-1"]
    d.ready("i-t-1")
    d.look(i_t_1=400)
    assert starts(d.send(ev.InstanceExited, instance_id="i-t-1", error=ERROR)) == ["i-t-2"]


def test_the_rest_of_a_copys_memory_comes_where_there_is_room() -> None:
    d = Machine(function(), function("g"), mib=1000, drain_calls=2)
    d.found(400)
    inst = d.serve(mib=50)
    d.call()
    assert names(d.done("c2", inst)) == ["FinishCall", "FillMemory"]
    d.call()
    assert "FillMemory" not in names(d.done("c3", inst)), "once"
    d = Machine(function(), function("g"), mib=450, drain_calls=2)
    d.found(400)
    inst = d.serve(mib=50)
    other = d.serve("g", mib=150)
    d.call()
    assert names(d.done("c3", inst)) == ["FinishCall"]
    d.send(ev.InstanceExited, instance_id=other, error=ERROR)
    d.call()
    assert names(d.done("c4", inst)) == ["FinishCall", "FillMemory"]


def test_what_is_filled_in_says_nothing_of_the_next_copy() -> None:
    d = Machine(function(), mib=1000, drain_calls=1)
    d.found(600)
    d.call()
    d.ready("i-t-1")
    d.look(i_t_1=50)
    assert "FillMemory" in names(d.done("c1", "i-t-1"))
    assert d.state.instances["i-t-1"].need == 600 * MIB
    d.look(i_t_1=600)
    assert d.state.knowledge["key-f-1"][("", "")].need == 0


def test_without_facts_nothing_depends_on_memory_any_more() -> None:
    d = Machine(function(), mib=100)
    d.found(90)
    assert len(calls(d, 3)) == 1
    assert len(starts(d.send(ev.MemorySeen, total=0, available=0))) == 2


def test_cold_starts_wait_for_the_first_snapshot_where_more_of_them_gain_nothing() -> None:
    d = Driver(function(), abreast=2)
    assert calls(d, 6) == ["i-t-1", "i-t-2"]
    d.send(ev.InstanceStage, instance_id="i-t-1", stage="capturing")
    d.send(ev.InstanceStage, instance_id="i-t-1", stage="restoring")
    again = d.send(ev.SnapshotCaptured, instance_id="i-t-1", snapshot_id="s")
    assert [a.mode for a in again if isinstance(a, ev.StartInstance)] == ["restore"] * 4


def test_cold_starts_go_on_where_there_will_be_no_snapshot() -> None:
    d = Driver(function(), abreast=2)
    calls(d, 4)
    d.send(ev.InstanceStage, instance_id="i-t-1", stage="capturing")
    again = d.send(ev.CaptureFailed, instance_id="i-t-1", reason="x", alive=True)
    assert [a.capture for a in again if isinstance(a, ev.StartInstance)] == [True], "the rest waits for this one"
    d.ready("i-t-1")
    assert starts(d.ready("i-t-2")) == ["i-t-4"]


# What the daemon tells


def test_meminfo() -> None:
    text = "MemTotal:       24684388 kB\nMemFree:  2285012 kB\nMemAvailable:   23631616 kB\nBuffers: 1 kB\n"
    assert meminfo.parse(text) == Room(24684388 << 10, 23631616 << 10)
    with pytest.raises(ValueError):
        meminfo.parse("MemTotal: 1 kB\n")
    room = meminfo.machine()
    assert 0 < room.available < room.total


@pytest.mark.parametrize(
    ("given", "limit", "used", "expected"),
    [
        (Room(10_000, 8_000), 0, 0, (10_000, 7_500)),
        (Room(500, 300), 0, 0, (500, 236)),
        (Room(500, 30), 0, 0, (500, 0)),
        (Room(10_000, 8_000), 1_000, 300, (1_000, 700)),
        (Room(10_000, 600), 1_000, 300, (1_000, 100)),
        (Room(10_000, 8_000), 1_000, 1_300, (1_000, 0)),
    ],
)
def test_what_there_is_to_give(given: Room, limit: int, used: int, expected: tuple[int, int]) -> None:
    found = to_give(given.total * MIB, given.available * MIB, used * MIB, limit * MIB)
    assert tuple(n // MIB for n in found) == expected


def test_a_limit_on_all_containers_is_found(tmp_path: Path) -> None:
    v2 = tmp_path / "v2"
    (v2 / "woodfrog").mkdir(parents=True)
    groups = cgroups._CgroupsV2(v2, "tag")
    assert groups.room() is None, "a machine's root has no limit"
    (v2 / "woodfrog/memory.max").write_text("max\n")
    assert groups.room() is None
    (v2 / "memory.max").write_text("1000\n")
    (v2 / "memory.current").write_text("700\n")
    (v2 / "memory.stat").write_text("anon 300\nfile 350\nactive_file 100\ninactive_file 150\nslab_reclaimable 50\n")
    assert groups.room() == Room(1000, 600)
    (v2 / "woodfrog/memory.high").write_text("400\n")
    assert groups.room() == Room(400, 400)
    v1 = tmp_path / "v1"
    (v1 / "woodfrog").mkdir(parents=True)
    (v1 / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    old = cgroups._CgroupsV1({"memory": v1}, "tag")
    assert old.room() is None
    (v1 / "memory.limit_in_bytes").write_text("1000\n")
    (v1 / "memory.usage_in_bytes").write_text("700\n")
    (v1 / "memory.stat").write_text("rss 1\ntotal_active_file 100\ntotal_inactive_file 150\n")
    assert old.room() == Room(1000, 550)


class FakeBackend:
    def __init__(self) -> None:
        self.now = Room(1000 * MIB, 900 * MIB)
        self.used: dict[str, int] = {}
        self.looks = 0

    def room(self, *, quick: bool = False) -> Room:
        self.looks += 1
        if not self.now.total:
            raise OSError("gone")
        return self.now

    async def memory_used(self) -> dict[str, int]:
        return self.used


async def test_the_watch_tells_what_changed_and_who_waits(tmp_path: Path) -> None:
    d = Machine(function(), mib=1000)
    backend, sent, logs = FakeBackend(), [], LogBook(tmp_path, MIB)
    clock = [0.0]

    def emit(event: ev.Event) -> None:
        sent.append(event)
        d.now = event.now
        d.send(type(event), **{k: v for k, v in vars(event).items() if k != "now"})

    watch = MemoryWatch(d.state, backend, emit, logs, limit=0, clock=lambda: 1000.0 + clock[0])  # type: ignore[arg-type]
    watch.look()
    assert sent == [ev.MemorySeen(now=1000.0, total=1000 * MIB, available=836 * MIB)]
    watch.look()
    assert backend.looks == 1, "just now"
    clock[0] = 2.0
    watch.look()
    assert (backend.looks, len(sent)) == (2, 1), "nothing has changed"
    d.now = 1002.0
    d.found(600)
    assert len(calls(d, 3)) == 1
    clock[0] = 4.0
    backend.used = {"i-t-1": 1}
    task = asyncio.ensure_future(watch.run())
    await asyncio.sleep(0.35)
    assert sent[-1].used == {"i-t-1": 1}
    assert not await _lines(logs, "a"), "it may be over in a moment"
    clock[0] = 8.0
    await asyncio.sleep(0.6)
    [line] = await _lines(logs, "a")
    assert "2 calls wait for memory: a container needs about 600 MiB, 237 of 1000 MiB are left; " in line, line
    backend.now = Room(0, 0)
    await asyncio.sleep(0.6)
    assert d.state.memory is None and len(d.states()) == 3
    task.cancel()


async def _lines(logs: LogBook, app: str) -> list[str]:
    read = logs.app(app).read(since=0.0, after=None, follow=False)
    return [json.loads(line)["line"] for chunk in [c async for c in read] for line in chunk.splitlines()]


def test_words() -> None:
    found = {"need": 250 * MIB, "left": 10 * MIB, "total": 1000 * MIB, "calls": 1, "containers": 1}
    assert short_of(found, 0) == (
        "1 call waits for memory: a container needs about 250 MiB, 10 of 1000 MiB are left; 1 answers them one after "
        "the other. Free memory on the machine, or have the function hold less"
    )
    text = short_of({**found, "need": 2000 * MIB, "containers": 0}, 1000 * MIB)
    assert "it starts when nothing else runs. Free memory on the machine, raise WOODFROG_MEMORY_MIB, or" in text


def test_the_setting() -> None:
    assert load({"WOODFROG_MEMORY_MIB": "-1"}).memory_mib == -1
    with pytest.raises(SpecError, match="-2 is not -1 or more"):
        load({"WOODFROG_MEMORY_MIB": "-2"})
    assert load({}).memory_mib == 0


def test_the_state_shows_it() -> None:
    d = Machine(function(), mib=500)
    d.found(400)
    calls(d, 2)
    view = d.state.snapshot_view()
    assert view["memory"] == {"total": 500 * MIB, "available": 500 * MIB, "left": 100 * MIB}
    assert view["instances"][0]["memory"] == {"need": 400 * MIB, "used": 0}
    [waiting] = d.state.memory_waits(d.now)
    assert (waiting["calls"], waiting["containers"], waiting["need"]) == (1, 1, 400 * MIB)
