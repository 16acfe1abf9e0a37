"""Which function gets which GPU, and what the control machine does when there are too few."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from woodfrog.control import events as ev
from woodfrog.control.events import Action, Event
from woodfrog.control.gpus import Gpu, chip_of, chips, chips_for, choose, fits, parse, possible
from woodfrog.control.machine import handle
from woodfrog.control.state import Config, State
from woodfrog.spec import FunctionSpec, MethodSpec, Resources, ScalingPolicy, SnapshotPolicy, SourceSpec

H100, A10 = "NVIDIA H100 80GB HBM3", "NVIDIA A10"
FOUR = (Gpu("a", A10), Gpu("b", A10), Gpu("c", H100), Gpu("d", H100))


@pytest.mark.parametrize(
    ("wanted", "chip", "fit"),
    [
        ("H100", H100, True), ("A10", A10, True), ("A10", "NVIDIA A10G", False), ("A10G", "NVIDIA A10G", True),
        ("A100", "NVIDIA A100-SXM4-40GB", True), ("A100-80GB", "NVIDIA A100-SXM4-40GB", False),
        ("A100-80GB", "NVIDIA A100 80GB PCIe", True), ("T4", "Tesla T4", True), ("L4", "NVIDIA L40S", False),
        ("L40S", "NVIDIA L40S", True), ("B200", "NVIDIA B200", True), ("any", "whatever", True),
    ],
)  # fmt: skip
def test_what_a_chip_is(wanted: str, chip: str, fit: bool) -> None:
    assert fits(wanted, chip) is fit


def test_requests() -> None:
    assert parse("H100") == ("H100", 1) and parse("A10G:2") == ("A10G", 2) and parse("H100!:8") == ("H100", 8)
    assert choose(["H100"], FOUR) == ("c",)
    assert choose(["H100:2"], FOUR, {"c"}) is None and possible(["H100:2"], FOUR)
    assert choose(["H100:2", "A10"], FOUR, {"c"}) == ("a",)
    assert choose(["any"], FOUR, {"a"}) == ("b",)
    assert choose(["any:2"], FOUR, {"a"}) == ("c", "d"), "all of one chip"
    assert choose(["any:3"], FOUR) is None and not possible(["any:3", "T4"], FOUR)


def test_a_chip_with_a_snapshot_comes_first_among_equals() -> None:
    assert choose(["any"], FOUR, ready={H100}) == ("c",)
    assert choose(["A10", "H100"], FOUR, ready={H100}) == ("a",), "the order of the list goes before"
    assert choose(["any"], FOUR, {"c", "d"}, {H100}) == ("a",)
    assert chips(["H100", "any"], FOUR) == (H100, A10) and chips(["T4"], FOUR) == ()


@given(st.lists(st.sampled_from(["any", "A10", "H100:2", "A10:2", "T4"]), min_size=1), st.sets(st.sampled_from("abcd")))
def test_what_is_chosen_is_free_and_of_one_chip(requests: list[str], taken: set[str]) -> None:
    found = choose(requests, FOUR, taken)
    if found is not None:
        assert (
            not taken & set(found)
            and len({g.chip for g in FOUR if g.id in found}) == 1
            and len(set(found)) == len(found)
        )
        assert possible(requests, FOUR)


def function(tag: str, *gpu: str, **scaling: Any) -> FunctionSpec:
    source = SourceSpec("module", "m", tag)
    return FunctionSpec(
        tag, "function", source, (MethodSpec(tag),), resources=Resources(gpu=gpu), scaling=ScalingPolicy(**scaling)
    )


@pytest.mark.parametrize(
    ("requests", "saved", "found"),
    [
        (("any",), True, (A10, H100)), (("H100:2", "A10"), True, (H100, A10)), (("T4",), True, ("",)),
        (("any",), False, ("",)), ((), True, ("",)),
    ],
)  # fmt: skip
def test_what_snapshots_depend_on(requests: tuple[str, ...], saved: bool, found: tuple[str, ...]) -> None:
    spec = replace(function("f", *requests), snapshot=SnapshotPolicy(enabled=True, gpu=saved))
    assert chips_for(spec, FOUR) == found
    held = choose(requests, FOUR) or ()
    assert chip_of(spec, held, FOUR) == (found[0] if held else "") and chip_of(spec, (), FOUR) == ""


class Driver:
    def __init__(self, *specs: FunctionSpec, gpus: tuple[Gpu, ...] = FOUR, **config: Any) -> None:
        self.state = State(Config(gpus=gpus, **config), run="t")
        self.now, self.calls = 0.0, 0
        keys = {s.tag: f"key-{s.tag}" for s in specs}
        self.send(ev.AppDeployed, app="a", version=1, specs=specs, keys=keys)

    def send(self, kind: type[Event], **values: Any) -> list[Action]:
        self.now += 0.001
        actions = list(handle(self.state, kind(now=self.now, **values)))
        used = [gpu for i in self.state.instances.values() for gpu in i.gpus]
        assert len(used) == len(set(used)), "a GPU was given twice"
        return [a for a in actions if not isinstance(a, ev.WakeAt)]

    def call(self, tag: str) -> list[Action]:
        self.calls += 1
        return self.send(ev.CallSubmitted, call_id=f"c{self.calls}", app="a", tag=tag, method=tag, params_digest="")


def started(actions: list[Action]) -> list[tuple[str, tuple[str, ...]]]:
    return [(a.instance_id, a.gpus) for a in actions if isinstance(a, ev.StartInstance)]


def test_calls_wait_for_a_gpu() -> None:
    d = Driver(function("f", "H100"))
    assert started(d.call("f")) == [("i-t-1", ("c",))] and started(d.call("f")) == [("i-t-2", ("d",))]
    assert d.call("f") == [], "it waits"
    d.send(ev.InstanceReady, instance_id="i-t-1")
    d.send(ev.InstanceReady, instance_id="i-t-2")
    done = d.send(ev.CallFinished, call_id="c1", instance_id="i-t-1", outcome="success", error=None)
    assert [type(a).__name__ for a in done] == ["FinishCall", "RunCall"]


def test_a_fallback_is_taken_when_the_first_wish_is_not_free() -> None:
    d = Driver(function("f", "H100:2", "A10"))
    assert [started(d.call("f")) for _ in range(4)] == [
        [("i-t-1", ("c", "d"))], [("i-t-2", ("a",))], [("i-t-3", ("b",))], [],
    ]  # fmt: skip


def test_an_idle_instance_makes_room_for_a_call_that_waits() -> None:
    d = Driver(function("f", "H100:2"), function("other", "A10:2"), function("g", "H100"))
    d.call("f")
    d.call("other")
    for n, call in ((1, "c1"), (2, "c2")):
        d.send(ev.InstanceReady, instance_id=f"i-t-{n}")
        d.send(ev.CallFinished, call_id=call, instance_id=f"i-t-{n}", outcome="success", error=None)
    stops = d.call("g")
    assert [(type(a).__name__, a.instance_id) for a in stops if isinstance(a, ev.StopInstance)] == [
        ("StopInstance", "i-t-1")
    ], "and not the one whose GPUs do not help"
    assert started(d.send(ev.InstanceStopped, instance_id="i-t-1")) == [("i-t-3", ("c",))]


def test_who_waits_for_a_gpu_stops_nobody_without_one() -> None:
    """Where the limit on instances is reached, too: what it stopped would come again, and so on for ever."""
    kept = {"min_containers": 1}
    specs = function("plain", **kept), function("f", "any", **kept), function("g", "any")
    d = Driver(*specs, gpus=FOUR[:1], max_instances=2)
    for n in (1, 2):
        d.send(ev.InstanceReady, instance_id=f"i-t-{n}")
    stops = [a.instance_id for a in d.call("g") if isinstance(a, ev.StopInstance)]
    assert stops == ["i-t-2"]
    assert started(d.send(ev.InstanceStopped, instance_id="i-t-2")) == [("i-t-3", ("a",))]


def test_one_that_this_machine_can_never_have_is_started_to_be_told() -> None:
    d = Driver(function("f", "B200"))
    assert started(d.call("f")) == [("i-t-1", ())]
    assert started(Driver(function("f", "any"), gpus=()).call("f")) == [("i-t-1", ())]


def test_a_gpu_is_free_again_when_its_instance_is_gone() -> None:
    d = Driver(function("f", "any"), gpus=FOUR[:1])
    d.call("f")
    d.call("f")
    gone = d.send(ev.InstanceExited, instance_id="i-t-1", error={"code": "crashed", "message": "x"})
    later = gone
    while not started(later):
        d.now += 1
        later = d.send(ev.Tick)
        assert d.now < 30
    assert started(later)[0][1] == ("a",)


def test_a_busy_function_gives_its_gpu_to_one_that_waits() -> None:
    d = Driver(function("f", "any"), function("g", "any"), gpus=FOUR[:1])
    for _ in range(3):
        d.call("f")
    d.send(ev.InstanceReady, instance_id="i-t-1")
    assert d.call("g") == []
    d.now += 10
    actions = d.send(ev.CallFinished, call_id="c1", instance_id="i-t-1", outcome="success", error=None)
    assert [type(a).__name__ for a in actions] == ["FinishCall", "StopInstance"]
    assert started(d.send(ev.InstanceStopped, instance_id="i-t-1")) == [("i-t-2", ("a",))]
    assert d.state.instances["i-t-2"].group.service.tag == "g"


def test_gpu_functions_are_not_parked() -> None:
    spec = function("f", "any", buffer_containers=1)
    spec = replace(spec, snapshot=SnapshotPolicy(enabled=True, gpu=True))
    d = Driver(spec, gpus=FOUR[:2])
    actions = d.call("f")
    assert len(started(actions)) == 2
    d.send(ev.SnapshotCaptured, instance_id="i-t-1", snapshot_id="s1")
    d.send(ev.InstanceReady, instance_id="i-t-1")
    d.send(ev.InstanceReady, instance_id="i-t-2")
    d.send(ev.CallFinished, call_id="c1", instance_id="i-t-1", outcome="success", error=None)
    for _ in range(60):
        d.now += 1
        assert not [a for a in d.send(ev.Tick) if isinstance(a, ev.ParkInstance)]


# Snapshots of several chips


def saving(tag: str, *gpu: str, **scaling: Any) -> FunctionSpec:
    """Its snapshots hold GPU memory."""
    return replace(function(tag, *gpu, **scaling), snapshot=SnapshotPolicy(enabled=True, gpu=True))


def starts(actions: list[Action]) -> list[tuple[tuple[str, ...], str | None, bool]]:
    return [(a.gpus, a.snapshot_id, a.capture) for a in actions if isinstance(a, ev.StartInstance)]


def finish(d: Driver, instance: int, call: int) -> list[Action]:
    d.send(ev.InstanceReady, instance_id=f"i-t-{instance}")
    return d.send(ev.CallFinished, call_id=f"c{call}", instance_id=f"i-t-{instance}", outcome="success", error=None)


def test_each_chip_has_a_snapshot_of_its_own() -> None:
    d = Driver(saving("f", "any"))
    assert starts(d.call("f")) == [(("a",), None, True)]
    d.send(ev.SnapshotCaptured, instance_id="i-t-1", snapshot_id="s-a10")
    assert starts(d.call("f")) == [(("b",), "s-a10", False)]
    assert starts(d.call("f")) == [(("c",), None, True)], "of another chip: cold, and captured"
    d.send(ev.SnapshotCaptured, instance_id="i-t-3", snapshot_id="s-h100")
    assert starts(d.call("f")) == [(("d",), "s-h100", False)]


def test_two_chips_are_captured_at_a_time() -> None:
    d = Driver(saving("f", "any"))
    assert [starts(d.call("f")) for _ in range(4)] == [
        [(("a",), None, True)], [(("b",), None, False)], [(("c",), None, True)], [(("d",), None, False)],
    ]  # fmt: skip
    d.send(ev.CaptureFailed, instance_id="i-t-1", reason="x", alive=True)
    d.send(ev.SnapshotCaptured, instance_id="i-t-3", snapshot_id="s-h100")
    assert d.state.knows(d.state.services["a/f@1"], "", A10).attempts == 1
    assert d.state.knows(d.state.services["a/f@1"], "", H100).snapshot_id == "s-h100"


@pytest.mark.parametrize("stages", [("capturing",), ("capturing", "restoring")], ids=["capture", "fresh thaw"])
def test_captures_that_hang_are_counted_for_their_chip(stages: tuple[str, ...]) -> None:
    d = Driver(replace(saving("f", "any"), startup_timeout=10.0), gpus=(Gpu("a", A10),))
    d.call("f")
    for number in range(1, d.state.config.capture_attempts + 1):
        for stage in stages:
            d.send(ev.InstanceStage, instance_id=f"i-t-{number}", stage=stage)
        d.now += 11.0
        assert [type(a).__name__ for a in d.send(ev.Tick)] == ["KillInstance"]
        again = starts(d.send(ev.InstanceStopped, instance_id=f"i-t-{number}"))
        assert again == [(("a",), None, number < d.state.config.capture_attempts)]


def test_a_gpu_with_a_snapshot_is_preferred() -> None:
    d = Driver(saving("f", "any"), saving("g", "A10", "H100"))
    for tag in "fg":
        d.send(ev.SnapshotAvailable, app="a", tag=tag, snapshot_id=f"s-{tag}", chip=H100)
    assert starts(d.call("f")) == [(("c",), "s-f", False)]
    assert starts(d.call("g")) == [(("a",), None, True)], "its list names another chip first"


def test_a_snapshot_known_at_the_deploy() -> None:
    d = Driver()
    spec = saving("f", "any", min_containers=1)
    found = {"f": {H100: "s-1"}}
    assert starts(d.send(ev.AppDeployed, app="b", version=1, specs=(spec,), keys={"f": "k"}, gpu_snapshots=found)) == [
        (("c",), "s-1", False)
    ]


def test_a_snapshot_by_request_is_made_for_one_chip() -> None:
    d = Driver(saving("f", "any"))
    assert starts(d.send(ev.SnapshotRequested, app="a", tag="f")) == [(("a",), None, True)]
    d.send(ev.SnapshotCaptured, instance_id="i-t-1", snapshot_id="s-1")
    d.send(ev.InstanceReady, instance_id="i-t-1")
    assert starts(d.send(ev.SnapshotRequested, app="a", tag="f")) == []


def test_no_room_for_it_is_another_gpu_and_then_cold() -> None:
    d = Driver(saving("f", "H100"))
    d.send(ev.SnapshotAvailable, app="a", tag="f", snapshot_id="s-1", chip=H100)

    def fails(number: int) -> list[Action]:
        return d.send(ev.RestoreFailed, instance_id=f"i-t-{number}", snapshot_id="s-1", reason="full", gpu=True)

    assert starts(d.call("f")) == [(("c",), "s-1", False)]
    for round in range(4):  # often enough for a snapshot that was at fault to be retired
        first = 1 + 3 * round
        assert starts(fails(first)) == [(("d",), "s-1", False)]
        cold = fails(first + 1)
        assert starts(cold) == [(("c",), None, False)] and not [a for a in cold if isinstance(a, ev.RetireSnapshot)]
        finish(d, first + 2, round + 1)
        d.send(ev.InstanceStopRequested, instance_id=f"i-t-{first + 2}")
        d.send(ev.InstanceStopped, instance_id=f"i-t-{first + 2}")
        assert starts(d.call("f")) == [(("c",), "s-1", False)], "the snapshot is as good as before"


def test_no_room_on_one_chip_is_a_start_on_another_that_is_asked_for_too() -> None:
    d = Driver(saving("f", "any"))
    d.send(ev.SnapshotAvailable, app="a", tag="f", snapshot_id="s-1", chip=H100)
    assert starts(d.call("f")) == [(("c",), "s-1", False)]
    for number, then in ((1, (("d",), "s-1", False)), (2, (("a",), None, True))):
        failed = d.send(ev.RestoreFailed, instance_id=f"i-t-{number}", snapshot_id="s-1", reason="full", gpu=True)
        assert starts(failed) == [then]


# GPUs that are set aside


def test_one_that_is_set_aside_is_not_given_out() -> None:
    d = Driver(function("f", "H100"))
    d.send(ev.GpusSetAside, sick={"c": "Xid 79"})
    assert started(d.call("f")) == [("i-t-1", ("d",))]
    assert d.call("f") == [], "it waits: the other is in use, and well"
    assert started(d.send(ev.GpusSetAside, sick={})) == [("i-t-2", ("c",))]


def test_where_all_are_set_aside_one_is_tried_and_the_calls_are_told() -> None:
    d = Driver(function("f", "H100"))
    d.send(ev.GpusSetAside, sick={"c": "Xid 79", "d": "full"})
    assert started(d.call("f")) == [("i-t-1", ("c",))]
    error = {"code": "gpu-set-aside", "message": "x"}
    failed = d.send(ev.StartRefused, instance_id="i-t-1", error=error)
    assert [(a.call_id, a.outcome, a.error) for a in failed if isinstance(a, ev.FinishCall)] == [
        ("c1", "failure", error)
    ]
    assert not started(failed) and not d.state.instances
    d.now += 60
    assert started(d.call("f")) == [("i-t-2", ("c",))], "the next call tries again"


def test_one_found_sick_before_its_use_is_replaced_by_another() -> None:
    d = Driver(saving("f", "H100"))
    d.send(ev.SnapshotAvailable, app="a", tag="f", snapshot_id="s-1", chip=H100)
    assert starts(d.call("f")) == [(("c",), "s-1", False)]
    d.send(ev.GpusSetAside, sick={"c": "Xid 79"})
    refused = d.send(ev.StartRefused, instance_id="i-t-1", error={"code": "gpu-set-aside", "message": "x"})
    assert starts(refused) == [(("d",), "s-1", False)] and not [a for a in refused if isinstance(a, ev.FinishCall)]


def test_a_refusal_nobody_can_account_for_is_not_tried_for_ever() -> None:
    d = Driver(function("f", "any"))
    d.call("f")
    ends: list[Action] = []
    for number in range(1, 4):
        told = d.send(ev.StartRefused, instance_id=f"i-t-{number}", error={"code": "gpu-set-aside", "message": "x"})
        ends += [a for a in told if isinstance(a, ev.FinishCall)]
        for _ in range(200):
            if ends or started(told):
                break
            d.now += 0.1
            told = d.send(ev.Tick)
    assert [a.call_id for a in ends] == ["c1"]


def test_what_rests_on_one_that_is_set_aside_goes_and_what_runs_ends_first() -> None:
    d = Driver(function("f", "H100"))
    d.call("f")
    d.call("f")
    finish(d, 1, 1)  # and takes the second call
    d.send(ev.InstanceReady, instance_id="i-t-2")
    told = d.send(ev.GpusSetAside, sick={"c": "Xid 79", "d": "Xid 79"})
    assert [(type(a).__name__, a.instance_id) for a in told if isinstance(a, ev.StopInstance)] == [
        ("StopInstance", "i-t-2")
    ]
    done = d.send(ev.CallFinished, call_id="c2", instance_id="i-t-1", outcome="success", error=None)
    assert [type(a).__name__ for a in done] == ["FinishCall", "StopInstance"]
