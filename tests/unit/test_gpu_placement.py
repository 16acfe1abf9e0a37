"""Which function gets which GPU, and what the control machine does when there are too few."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from woodfrog.control import events as ev
from woodfrog.control.events import Action, Event
from woodfrog.control.gpus import Gpu, choose, fits, parse, possible
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


class Driver:
    def __init__(self, *specs: FunctionSpec, gpus: tuple[Gpu, ...] = FOUR) -> None:
        self.state = State(Config(gpus=gpus), run="t")
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
