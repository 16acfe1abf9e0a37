"""The control machine's rules, one by one."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from woodfrog.control import events as ev
from woodfrog.control.events import Action, Event, action_from_dict, event_from_dict
from woodfrog.control.machine import _HANDLERS, InvalidTransition, handle
from woodfrog.control.replay import journal_header, journal_line
from woodfrog.control.state import Config, State
from woodfrog.errors import SpecError
from woodfrog.spec import FunctionSpec, MethodSpec, RetryPolicy, ScalingPolicy, SnapshotPolicy, SourceSpec

ERROR = {
    "type": "InstanceCrashed",
    "code": "crashed",
    "message": "killed by signal 11",
    "retryable": False,
    "fields": {},
}


def function(tag: str = "f", **changes: Any) -> FunctionSpec:
    return replace(FunctionSpec(tag, "function", SourceSpec("module", "m", tag), (MethodSpec(tag),)), **changes)


class Driver:
    """Sends events with a running clock; unpacks the actions but for `WakeAt`."""

    def __init__(self, *specs: FunctionSpec, **config: Any) -> None:
        self.state = State(Config(**config), run="t")
        self.now = 0.0
        self.wake: float | None = None
        self.version = 0
        self.calls = 0
        if specs:
            self.deploy(*specs)

    def send(self, kind: type[Event], **values: Any) -> list[Action]:
        actions = list(handle(self.state, kind(now=self.now, **values)))
        if actions and isinstance(actions[-1], ev.WakeAt):
            self.wake = actions.pop().time
        return actions

    def deploy(self, *specs: FunctionSpec, key: str = "", rolling: bool = True, **more: Any) -> list[Action]:
        self.version += 1
        keys = {s.tag: key or f"key-{s.tag}-{self.version}" for s in specs}
        return self.send(ev.AppDeployed, app="a", version=self.version, specs=specs, keys=keys, rolling=rolling, **more)

    def call(self, tag: str = "f", method: str = "", digest: str = "") -> list[Action]:
        self.calls += 1
        return self.send(
            ev.CallSubmitted, call_id=f"c{self.calls}", app="a", tag=tag, method=method or tag, params_digest=digest
        )

    def ready(self, instance: str) -> list[Action]:
        return self.send(ev.InstanceReady, instance_id=instance)

    def done(self, call: str, instance: str, outcome: str = "success", **values: Any) -> list[Action]:
        error = None if outcome == "success" else ERROR
        return self.send(
            ev.CallFinished, **{"call_id": call, "instance_id": instance, "outcome": outcome, "error": error, **values}
        )

    def stopped(self, instance: str) -> list[Action]:
        return self.send(ev.InstanceStopped, instance_id=instance)

    def at(self, now: float) -> list[Action]:
        """Time passes, with ticks whenever the machine asked for them."""
        actions = []
        while self.wake is not None and self.wake <= now:
            self.now, self.wake = max(self.now, self.wake), None
            actions += self.send(ev.Tick)
        self.now = now
        return actions

    def states(self) -> dict[str, str]:
        return {i.id: i.state for i in self.state.instances.values()}


def names(actions: list[Action]) -> list[str]:
    return [type(a).__name__ for a in actions]


def start(instance: str, **values: Any) -> ev.StartInstance:
    return ev.StartInstance(
        **{"instance_id": instance, "service_id": "a/f@1", "params_digest": "", "mode": "cold", **values}
    )


# Ways of a call


def test_cold_call_then_warm_call() -> None:
    d = Driver(function())
    assert d.call() == [start("i-t-1")]
    assert d.ready("i-t-1") == [ev.RunCall(call_id="c1", instance_id="i-t-1")]
    assert d.done("c1", "i-t-1") == [ev.FinishCall(call_id="c1", outcome="success")]
    assert d.call() == [ev.RunCall(call_id="c2", instance_id="i-t-1")]


def test_why_a_start_is_cold() -> None:
    frozen = SnapshotPolicy(enabled=True)
    d = Driver(function(), function("g", snapshot=frozen), capture_attempts=2)

    def why(number: int) -> str:
        return d.state.instances[f"i-t-{number}"].why_cold

    d.call()
    d.call("g")
    d.call("g")
    assert [why(n) for n in (1, 2, 3)] == ["off", "none-fits", "being-made"]
    d.ready("i-t-2")
    d.send(ev.SnapshotCaptured, instance_id="i-t-2", snapshot_id="s-1")
    d.call("g")
    assert why(4) == ""
    d.send(ev.RestoreFailed, instance_id="i-t-4", snapshot_id="s-1", reason="no pages", at_fault=True)
    assert why(5) == "did-not-thaw" and d.state.instances["i-t-5"].group.thaw_error == "no pages"
    d.send(ev.CaptureFailed, instance_id="i-t-5", reason="an io_uring is open", alive=True)
    d.call("g")
    assert why(6) == "gave-up"
    assert d.state.snapshots_view("a", "f") == {"state": "off", "snapshots": [], "reason": ""}
    assert d.state.snapshots_view("a", "g") == {"state": "gave-up", "snapshots": [], "reason": "an io_uring is open"}


def test_what_each_function_has_to_do() -> None:
    d = Driver(function(scaling=ScalingPolicy(max_containers=1)), function("g"))
    assert d.state.load_view() == {}
    d.call()
    d.now = 5.0
    d.call()
    d.call("g")
    d.ready("i-t-1")
    load = d.state.load_view()
    assert (load["a", "f"].running, load["a", "f"].waiting, load["a", "f"].oldest) == (1, 1, 5.0)
    assert (load["a", "g"].running, load["a", "g"].waiting, load["a", "g"].oldest) == (0, 1, 5.0)


def test_queue_is_first_in_first_out() -> None:
    d = Driver(function(scaling=ScalingPolicy(max_containers=1)))
    for _ in range(3):
        d.call()
    d.ready("i-t-1")
    order = [d.done(f"c{n}", "i-t-1")[-1] for n in (1, 2)]
    assert [a.call_id for a in order if isinstance(a, ev.RunCall)] == ["c2", "c3"]


def test_unknown_function_method_and_version_fail_at_once() -> None:
    d = Driver(function())
    for values in ({"tag": "g", "method": "g"}, {"tag": "f", "method": "h"}, {"tag": "f", "method": "f", "version": 9}):
        [action] = d.send(ev.CallSubmitted, **{"call_id": str(values), "app": "a", **values})
        assert isinstance(action, ev.FinishCall) and action.error and action.error["code"] == "not-found"


def test_exception_is_retried_with_growing_delay_then_final() -> None:
    d = Driver(function(retries=RetryPolicy(max_retries=2, initial_delay=1.0, backoff_coefficient=3.0)))
    d.call()
    d.ready("i-t-1")
    again = ev.RetryCall(call_id="c1", attempt=1, attempts=3, delay=1.0, error=ERROR)
    assert d.done("c1", "i-t-1", "exception") == [again]
    assert d.at(0.9) == []
    assert d.at(1.0) == [ev.RunCall(call_id="c1", instance_id="i-t-1", attempt=2)]
    assert d.done("c1", "i-t-1", "exception") == [replace(again, attempt=2, delay=3.0)]
    assert d.at(3.9) == []
    assert d.at(4.0) == [ev.RunCall(call_id="c1", instance_id="i-t-1", attempt=3)]
    assert d.done("c1", "i-t-1", "exception") == [ev.FinishCall(call_id="c1", outcome="exception", error=ERROR)]


def test_generator_is_never_run_again() -> None:
    d = Driver(function(methods=(MethodSpec("f", generator=True),), retries=RetryPolicy(max_retries=5)))
    d.call()
    d.ready("i-t-1")
    assert names(d.done("c1", "i-t-1", "exception")) == ["FinishCall"]


def test_timeout_kills_and_fails_and_the_queue_goes_on() -> None:
    d = Driver(function(timeout=10.0, scaling=ScalingPolicy(max_containers=1)))
    d.call()
    d.call()
    d.ready("i-t-1")
    kill, finish = d.at(10.0)
    assert isinstance(kill, ev.KillInstance) and isinstance(finish, ev.FinishCall)
    assert finish.error and finish.error["type"] == "FunctionTimeoutError"
    assert d.done("c1", "i-t-1") == [] and d.state.stale == {"CallFinished": 1}
    assert d.stopped("i-t-1") == [start("i-t-2")], "not before the first is gone: at most one container"


def test_cancel_queued_running_and_waiting() -> None:
    d = Driver(function(retries=RetryPolicy(max_retries=1), scaling=ScalingPolicy(max_containers=1)))
    d.call()
    d.call()
    d.ready("i-t-1")
    assert names(d.send(ev.CallCancelled, call_id="c2")) == ["FinishCall"]
    assert names(d.send(ev.CallCancelled, call_id="c1")) == ["FinishCall", "KillInstance"]
    d.stopped("i-t-1")
    d.call()
    d.ready("i-t-2")
    d.done("c3", "i-t-2", "exception")
    [finish] = d.send(ev.CallCancelled, call_id="c3")
    assert isinstance(finish, ev.FinishCall) and finish.outcome == "cancelled"
    assert d.at(5.0) == [] and not d.state.calls


def test_a_cancelled_generator_is_closed_and_its_instance_serves_on() -> None:
    d = Driver(function(methods=(MethodSpec("f", generator=True),), scaling=ScalingPolicy(max_containers=1)))
    d.call()
    d.ready("i-t-1")
    finish, close = d.send(ev.CallCancelled, call_id="c1")
    assert isinstance(finish, ev.FinishCall) and finish.outcome == "cancelled"
    assert close == ev.CloseCall(call_id="c1", instance_id="i-t-1")
    assert d.call() == [] and d.states() == {"i-t-1": "running"}, "it has not ended yet"
    assert d.done("c1", "i-t-1", "exception") == [ev.RunCall(call_id="c2", instance_id="i-t-1")]
    d.send(ev.CallCancelled, call_id="c2")
    assert d.done("c2", "i-t-1") == [] and d.states() == {"i-t-1": "idle"}
    assert d.done("c2", "i-t-1") == [] and d.state.stale == {"CallFinished": 1}


def test_a_generator_whose_items_are_of_two_runs_fails() -> None:
    d = Driver(function(methods=(MethodSpec("f", generator=True),)))
    d.call()
    d.ready("i-t-1")
    finish, close = d.send(ev.CallCancelled, call_id="c1", error=ERROR)
    assert finish == ev.FinishCall(call_id="c1", outcome="failure", error=ERROR)
    assert close == ev.CloseCall(call_id="c1", instance_id="i-t-1")


def test_a_generator_that_does_not_end_costs_its_instance() -> None:
    d = Driver(function(methods=(MethodSpec("f", generator=True),), timeout=60.0))
    for instance in ("i-t-1", "i-t-2"):
        d.call()
        d.ready(instance)
    d.send(ev.CallCancelled, call_id="c1")
    d.send(ev.CallCancelled, call_id="c2")
    assert d.send(ev.InstanceExited, instance_id="i-t-2", error=ERROR) == [], "its call was over"
    assert d.at(9.9) == []
    [kill] = d.at(10.0)
    assert isinstance(kill, ev.KillInstance) and "did not end" in kill.reason
    assert d.stopped("i-t-1") == [] and not d.state.instances


def test_crash_during_a_call_uses_its_error() -> None:
    d = Driver(function())
    d.call()
    d.ready("i-t-1")
    finish = ev.FinishCall(call_id="c1", outcome="failure", error=ERROR)
    assert d.send(ev.InstanceExited, instance_id="i-t-1", error=ERROR) == [finish]


def test_untrusted_instance_serves_no_more() -> None:
    d = Driver(function())
    d.call()
    d.ready("i-t-1")
    assert names(d.done("c1", "i-t-1", "failure", instance_ok=False)) == ["FinishCall", "KillInstance"]
    assert d.call() == [start("i-t-2")]


# Starts


def test_users_fault_fails_all_that_wait_and_nothing_is_started_for_them() -> None:
    d = Driver(function())
    d.call()
    d.call()
    actions = d.send(ev.StartFailed, instance_id="i-t-1", error=ERROR, user_fault=True)
    assert actions == [ev.FinishCall(call_id=f"c{n}", outcome="failure", error=ERROR) for n in (1, 2)]


def test_our_fault_is_tried_again_then_gives_up() -> None:
    d = Driver(function(), start_attempts=3, start_backoff=0.5)
    d.call()
    fail = {"error": ERROR, "user_fault": False}
    assert d.send(ev.StartFailed, instance_id="i-t-1", **fail) == []
    assert d.at(0.5) == [start("i-t-2")]
    assert d.send(ev.StartFailed, instance_id="i-t-2", **fail) == []
    assert d.at(1.5) == [start("i-t-3")]
    assert names(d.send(ev.StartFailed, instance_id="i-t-3", **fail)) == ["FinishCall"]
    # The next call gets one try.
    d.call()
    assert d.at(10.0) == [start("i-t-4")]
    assert names(d.send(ev.StartFailed, instance_id="i-t-4", **fail)) == ["FinishCall"]


def test_a_burst_of_failures_counts_once() -> None:
    d = Driver(function(), start_attempts=2)
    for _ in range(4):
        d.call()
    for n in range(1, 5):
        assert d.send(ev.StartFailed, instance_id=f"i-t-{n}", error=ERROR, user_fault=False) == []
    assert names(d.at(5.0)) == ["StartInstance"] * 4


def test_failing_min_container_is_not_started_in_a_busy_loop() -> None:
    d = Driver(function(scaling=ScalingPolicy(min_containers=1)), start_backoff=1.0, max_backoff=60.0)
    starts = 1
    while d.now < 3600:
        inst = next(iter(d.state.instances), None)
        if inst:
            assert d.send(ev.StartFailed, instance_id=inst, error=ERROR, user_fault=True) == []
        assert d.wake is not None
        starts += names(d.at(max(d.wake, d.now + 0.1))).count("StartInstance")
    assert 60 <= starts <= 70


def test_startup_timeout_is_the_users_but_not_while_capturing() -> None:
    d = Driver(function(startup_timeout=10.0, snapshot=SnapshotPolicy(enabled=True)))
    d.call()
    d.at(9.0)
    d.send(ev.InstanceStage, instance_id="i-t-1", stage="capturing")
    assert d.at(18.0) == [], "the clock was set back when the capture began"
    kill, again = d.at(19.0)
    assert isinstance(kill, ev.KillInstance) and isinstance(again, ev.StartInstance)
    d.send(ev.InstanceStage, instance_id="i-t-2", stage="enter")
    kill, finish = d.at(29.0)
    assert isinstance(finish, ev.FinishCall) and finish.error and finish.error["type"] == "StartupError"
    assert finish.error["fields"]["stage"] == "enter"


# Scaling


def test_not_all_thaw_at_once() -> None:
    """More at once end no sooner; those that are up answer calls of the others, and the user's part holds up nobody."""
    d = Driver(function(snapshot=SnapshotPolicy(enabled=True)), max_thawing=2)
    d.call()
    d.send(ev.SnapshotCaptured, instance_id="i-t-1", snapshot_id="s1")
    d.ready("i-t-1")
    assert [len(d.call()) for _ in range(5)] == [1, 1, 0, 0, 0]
    assert names(d.ready("i-t-2")) == ["RunCall", "StartInstance"]
    assert names(d.send(ev.InstanceStage, instance_id="i-t-3", stage="starting")) == ["StartInstance"]
    # Two thaw, one starts; the last call is answered by what comes free.
    assert names(d.done("c1", "i-t-1")) == ["FinishCall", "RunCall"]
    assert d.send(ev.InstanceStage, instance_id="i-t-4", stage="starting") == []


def test_burst_is_bounded() -> None:
    d = Driver(function(), max_starting=8, max_instances=10)
    starts = sum(len(d.call()) for _ in range(1000))
    assert starts == 8
    for n in range(1, 9):
        d.ready(f"i-t-{n}")
    assert len(d.state.instances) == 10


def test_idle_instance_goes_after_its_window_but_not_the_minimum() -> None:
    d = Driver(function(scaling=ScalingPolicy(min_containers=1, scaledown_window=60.0)))
    d.ready("i-t-1")
    d.call()
    d.call()
    d.ready("i-t-2")
    d.at(5.0)
    d.done("c1", "i-t-1")
    d.at(10.0)
    d.done("c2", "i-t-2")
    assert d.at(64.9) == []
    assert d.at(65.0) == [ev.StopInstance(instance_id="i-t-1", reason="idle")]
    d.stopped("i-t-1")
    assert d.at(10_000.0) == []


def test_buffer_is_kept_while_there_is_load() -> None:
    d = Driver(function(scaling=ScalingPolicy(buffer_containers=1, scaledown_window=60.0)))
    assert names(d.call()) == ["StartInstance"] * 2
    d.ready("i-t-1")
    d.ready("i-t-2")
    assert d.call() == [ev.RunCall(call_id="c2", instance_id="i-t-2"), start("i-t-3")]
    d.ready("i-t-3")
    assert d.at(200.0) == []
    d.done("c1", "i-t-1")
    d.done("c2", "i-t-2")
    assert names(d.at(261.0)) == ["StopInstance"] * 3


# Parked instances


def thawing(**config: Any) -> Driver:
    """A driver whose one function has a snapshot."""
    scaling = ScalingPolicy(buffer_containers=config.pop("buffer", 0), max_containers=config.pop("limit", None))
    d = Driver(function(snapshot=SnapshotPolicy(enabled=True), scaling=scaling), **config)
    d.send(ev.SnapshotAvailable, app="a", tag="f", snapshot_id="s1")
    return d


def parking(instance: str) -> ev.ParkInstance:
    return ev.ParkInstance(instance_id=instance, service_id="a/f@1", params_digest="", snapshot_id="s1")


@pytest.mark.parametrize("setting", [{"parked": 1}, {"buffer": 1}])
def test_a_call_wakes_a_parked_instance_which_is_then_replaced(setting: dict[str, int]) -> None:
    d = thawing(**setting)
    assert names(d.call()) == ["StartInstance"]
    assert d.ready("i-t-1") == [ev.RunCall(call_id="c1", instance_id="i-t-1")]
    assert d.at(5.0) == []  # what a call needs of the memory is not known yet
    d.done("c1", "i-t-1")
    assert d.at(5.9) == []
    assert d.at(6.0) == [parking("i-t-2")]
    assert d.send(ev.InstanceParked, instance_id="i-t-2") == []
    assert d.states()["i-t-2"] == "parked"
    d.call()
    assert d.call() == [ev.WakeInstance(instance_id="i-t-2")]
    assert d.ready("i-t-2") == [ev.RunCall(call_id="c3", instance_id="i-t-2")]
    assert d.at(7.0) == [parking("i-t-3")]


def test_a_call_takes_an_idle_instance_rather_than_a_parked_one() -> None:
    d = thawing(parked=1)
    d.call()
    d.ready("i-t-1")
    d.done("c1", "i-t-1")
    d.at(1.0)
    d.send(ev.InstanceParked, instance_id="i-t-2")
    assert d.call() == [ev.RunCall(call_id="c2", instance_id="i-t-1")]


def test_a_call_waits_for_what_is_being_parked() -> None:
    d = thawing(parked=1)
    d.call()
    d.ready("i-t-1")
    d.done("c1", "i-t-1")
    d.at(1.0)
    d.call()
    assert d.call() == []
    assert d.send(ev.InstanceParked, instance_id="i-t-2") == [ev.WakeInstance(instance_id="i-t-2")]


def test_a_call_does_not_wait_for_a_parking_that_failed() -> None:
    d = thawing(parked=1)
    d.call()
    d.ready("i-t-1")
    d.done("c1", "i-t-1")
    d.at(1.0)
    d.call()
    d.call()
    failed = d.send(ev.RestoreFailed, instance_id="i-t-2", snapshot_id="s1", reason="x")
    assert failed == [start("i-t-3", mode="restore", snapshot_id="s1")]
    d.ready("i-t-3")
    assert names(d.at(6.0)) == ["ParkInstance"]


def test_parked_instances_go_when_their_function_is_not_used_any_more() -> None:
    d = thawing(parked=1, park_window=100.0)
    d.call()
    d.ready("i-t-1")
    d.done("c1", "i-t-1")
    d.at(1.0)
    d.send(ev.InstanceParked, instance_id="i-t-2")
    assert names(d.at(60.0)) == ["StopInstance"]
    assert d.stopped("i-t-1") == []
    assert d.at(99.0) == []
    assert d.at(100.0) == [ev.KillInstance(instance_id="i-t-2", reason="not used any more")]
    assert d.stopped("i-t-2") == []
    assert d.at(1000.0) == []


def parked(**config: Any) -> Driver:
    """A driver with one idle and one parked instance."""
    d = thawing(parked=1, **config)
    d.call()
    d.ready("i-t-1")
    d.done("c1", "i-t-1")
    d.at(1.0)
    d.send(ev.InstanceParked, instance_id="i-t-2")
    assert d.states() == {"i-t-1": "idle", "i-t-2": "parked"}
    return d


def test_parked_instances_go_with_their_snapshot() -> None:
    d = parked()
    assert names(d.send(ev.SnapshotInvalidated, snapshot_id="s1")) == ["KillInstance"]
    assert d.stopped("i-t-2") == []
    assert d.at(30.0) == []


def test_parked_instances_go_with_their_version_and_their_app() -> None:
    d = parked()
    assert names(d.deploy(function())) == ["StopInstance", "KillInstance"]
    d = parked()
    assert names(d.send(ev.AppStopped, app="a")) == ["StopInstance", "KillInstance"]
    d = parked()
    assert names(d.send(ev.ShutdownRequested)) == ["StopInstance", "KillInstance"]


def test_a_parked_instance_that_dies_is_replaced_after_a_pause() -> None:
    d = parked()
    assert d.send(ev.InstanceExited, instance_id="i-t-2", error=ERROR) == []
    assert d.at(5.9) == []
    assert d.at(6.0) == [parking("i-t-3")]


def test_parked_instances_give_way_where_a_limit_keeps_calls_waiting() -> None:
    d = parked(max_instances=2)
    d.send(ev.AppDeployed, app="b", version=1, specs=(function("g"),), keys={"g": "kg"})
    asked = d.send(ev.CallSubmitted, call_id="g1", app="b", tag="g", method="g", params_digest="")
    assert asked == [ev.KillInstance(instance_id="i-t-2", reason="makes room for another function")]
    assert names(d.stopped("i-t-2")) == ["StartInstance"]
    assert d.at(20.0) == []  # no room to park one


def test_a_limit_on_containers_counts_parked_ones() -> None:
    d = thawing(parked=1, limit=1)
    d.call()
    d.ready("i-t-1")
    d.done("c1", "i-t-1")
    assert d.at(30.0) == []


def test_a_wake_that_fails_becomes_a_cold_start() -> None:
    d = parked()
    d.call()
    assert d.call() == [ev.WakeInstance(instance_id="i-t-2")]
    failed = d.send(ev.RestoreFailed, instance_id="i-t-2", snapshot_id="s1", reason="x")
    assert failed == [start("i-t-3")]


def test_single_use() -> None:
    d = Driver(function(scaling=ScalingPolicy(single_use=True)))
    d.call()
    d.ready("i-t-1")
    assert names(d.done("c1", "i-t-1")) == ["FinishCall", "StopInstance"]
    assert d.call() == [start("i-t-2")]


def test_hanging_exit_hooks_are_cut_off() -> None:
    d = Driver(function(scaling=ScalingPolicy(scaledown_window=1.0)), stop_grace=5.0)
    d.call()
    d.ready("i-t-1")
    d.done("c1", "i-t-1")
    assert names(d.at(1.0)) == ["StopInstance"]
    assert names(d.at(6.0)) == ["KillInstance"]


def test_idle_instances_make_room_at_the_machines_limit() -> None:
    d = Driver(function("f"), function("g"), max_instances=1)
    d.call("f")
    d.ready("i-t-1")
    d.done("c1", "i-t-1")
    assert names(d.call("g")) == ["StopInstance"]
    assert names(d.stopped("i-t-1")) == ["StartInstance"]


def test_busy_function_gives_way_to_a_starved_one() -> None:
    d = Driver(function("f"), function("g"), max_instances=2, give_way=5.0)
    for _ in range(20):
        d.call("f")
    d.ready("i-t-1")
    d.ready("i-t-2")
    d.call("g")
    assert names(d.done("c1", "i-t-1")) == ["FinishCall", "RunCall"]
    d.at(6.0)
    assert names(d.done("c3", "i-t-1")) == ["FinishCall", "StopInstance"]
    [action] = d.stopped("i-t-1")
    assert isinstance(action, ev.StartInstance) and action.service_id == "a/g@1"


def test_max_containers_counts_all_parameters_of_a_class() -> None:
    cls = function("C", kind="class", methods=(MethodSpec("run"),), scaling=ScalingPolicy(max_containers=1))
    d = Driver(cls)
    d.call("C", "run", "p1")
    d.ready("i-t-1")
    assert d.call("C", "run", "p2") == []
    assert names(d.done("c1", "i-t-1")) == ["FinishCall", "StopInstance"]
    [action] = d.stopped("i-t-1")
    assert isinstance(action, ev.StartInstance) and action.params_digest == "p2"


# Snapshots


def test_first_start_captures_later_ones_restore() -> None:
    d = Driver(function(snapshot=SnapshotPolicy(enabled=True)))
    assert d.call() == [start("i-t-1", capture=True)]
    assert d.call() == [start("i-t-2", capture=False)]
    d.send(ev.InstanceStage, instance_id="i-t-1", stage="capturing")
    d.send(ev.SnapshotCaptured, instance_id="i-t-1", snapshot_id="s1")
    assert d.call() == [start("i-t-3", mode="restore", snapshot_id="s1")]
    assert names(d.ready("i-t-1")) == ["RunCall"]


def test_capture_lifts_the_limit_on_cold_starts() -> None:
    d = Driver(function(snapshot=SnapshotPolicy(enabled=True)), max_starting=1)
    for _ in range(3):
        d.call()
    actions = d.send(ev.SnapshotCaptured, instance_id="i-t-1", snapshot_id="s1")
    assert [a.mode for a in actions if isinstance(a, ev.StartInstance)] == ["restore", "restore"]


def test_failed_captures_are_given_up() -> None:
    d = Driver(function(snapshot=SnapshotPolicy(enabled=True)), capture_attempts=2)
    d.call()
    [again] = d.send(ev.CaptureFailed, instance_id="i-t-1", reason="x", alive=False)
    assert again == start("i-t-2", capture=True)
    assert d.send(ev.CaptureFailed, instance_id="i-t-2", reason="y", alive=True) == []
    assert d.ready("i-t-2") == [ev.RunCall(call_id="c1", instance_id="i-t-2")]
    assert d.call() == [start("i-t-3", capture=False)]
    [service] = d.state.snapshot_view()["services"]
    assert service["groups"][0]["snapshot"]["state"] == "gave-up"
    # A person's wish starts over.
    assert d.send(ev.SnapshotRequested, app="a", tag="f") == [start("i-t-4", capture=True)]


def test_killed_capture_is_taken_up_again_once_it_is_gone() -> None:
    d = Driver(function(snapshot=SnapshotPolicy(enabled=True), startup_timeout=10.0))
    d.call()
    d.send(ev.InstanceStage, instance_id="i-t-1", stage="capturing")
    assert d.at(10.0)[1:] == [start("i-t-2", capture=False)]
    d.stopped("i-t-1")
    assert d.call() == [start("i-t-3", capture=True)]


@pytest.mark.parametrize("stages", [("capturing",), ("capturing", "restoring")], ids=["capture", "fresh thaw"])
def test_captures_that_hang_are_given_up(stages: tuple[str, ...]) -> None:
    """Else a call for which there is one place only would wait for one capture after another."""
    spec = function(
        snapshot=SnapshotPolicy(enabled=True), startup_timeout=10.0, scaling=ScalingPolicy(max_containers=1)
    )
    d = Driver(spec, capture_attempts=2)
    assert d.call() == [start("i-t-1", capture=True)]
    for number in (1, 2):
        for stage in stages:
            d.send(ev.InstanceStage, instance_id=f"i-t-{number}", stage=stage)
        [kill] = d.at(d.now + 10.0)
        assert kill == ev.KillInstance(instance_id=f"i-t-{number}", reason="capture hangs")
        assert d.stopped(f"i-t-{number}") == [start(f"i-t-{number + 1}", capture=number < 2)]
    assert d.ready("i-t-3") == [ev.RunCall(call_id="c1", instance_id="i-t-3")]


def test_no_second_capture_while_the_first_is_on_its_way_to_disk() -> None:
    d = Driver(function(snapshot=SnapshotPolicy(enabled=True), scaling=ScalingPolicy(single_use=True)))
    d.call()
    d.send(ev.InstanceStage, instance_id="i-t-1", stage="capturing")
    d.ready("i-t-1")
    d.done("c1", "i-t-1")
    d.stopped("i-t-1")
    assert d.call() == [start("i-t-2", capture=False)]
    d.send(ev.SnapshotCaptured, instance_id="i-t-1", snapshot_id="s1")
    assert d.call() == [start("i-t-3", mode="restore", snapshot_id="s1")]


@pytest.mark.parametrize("gone", [True, False])
def test_a_capture_that_fails_after_its_instance_is_taken_up_again(gone: bool) -> None:
    d = Driver(
        function(snapshot=SnapshotPolicy(enabled=True), scaling=ScalingPolicy(single_use=True)), capture_attempts=2
    )
    for number in (1, 2):
        assert d.call() == [start(f"i-t-{number}", capture=True)]
        d.ready(f"i-t-{number}")
        d.done(f"c{number}", f"i-t-{number}")
        if gone:
            d.stopped(f"i-t-{number}")
        d.send(ev.CaptureFailed, instance_id=f"i-t-{number}", reason="the disk is full", alive=True)
        if not gone:
            d.stopped(f"i-t-{number}")
    assert d.call() == [start("i-t-3", capture=False)]
    [service] = d.state.snapshot_view()["services"]
    assert service["groups"][0]["snapshot"]["state"] == "gave-up"


def test_failed_restore_becomes_a_cold_start_and_retires_in_time() -> None:
    d = Driver(function(snapshot=SnapshotPolicy(enabled=True)), snapshot_failures=2)
    d.send(ev.SnapshotAvailable, app="a", tag="f", snapshot_id="s1")
    assert d.call() == [start("i-t-1", mode="restore", snapshot_id="s1")]
    fail = {"snapshot_id": "s1", "reason": "x"}
    assert d.send(ev.RestoreFailed, instance_id="i-t-1", **fail) == [start("i-t-2")]
    assert d.call() == [start("i-t-3", mode="restore", snapshot_id="s1")]
    actions = d.send(ev.RestoreFailed, instance_id="i-t-3", **fail)
    assert actions == [ev.RetireSnapshot(snapshot_id="s1", reason="x"), start("i-t-4", capture=True)]


def test_hanging_restore_becomes_a_cold_start() -> None:
    d = Driver(function(startup_timeout=10.0, snapshot=SnapshotPolicy(enabled=True)))
    d.send(ev.SnapshotAvailable, app="a", tag="f", snapshot_id="s1")
    d.call()
    assert d.at(10.0) == [ev.KillInstance(instance_id="i-t-1", reason="restore hangs"), start("i-t-2")]


def test_snapshot_at_fault_is_retired_at_once() -> None:
    d = Driver(function(snapshot=SnapshotPolicy(enabled=True)))
    d.send(ev.SnapshotAvailable, app="a", tag="f", snapshot_id="s1")
    d.call()
    fail = {"snapshot_id": "s1", "reason": "x", "at_fault": True}
    actions = d.send(ev.RestoreFailed, instance_id="i-t-1", **fail)
    assert names(actions) == ["RetireSnapshot", "StartInstance"]


def test_snapshots_that_never_restore_are_not_captured_for_ever() -> None:
    d = Driver(function(snapshot=SnapshotPolicy(enabled=True)), capture_attempts=3)
    [action] = d.call()
    captures = 0
    for n in range(10):
        assert isinstance(action, ev.StartInstance)
        if not action.capture:
            break
        captures += 1
        d.send(ev.SnapshotCaptured, instance_id=action.instance_id, snapshot_id=f"s{n}")
        fail = {"snapshot_id": f"s{n}", "reason": "x", "at_fault": True}
        _, action = d.send(ev.RestoreFailed, instance_id=action.instance_id, **fail)
    assert captures == 3
    assert isinstance(action, ev.StartInstance)
    assert names(d.ready(action.instance_id)) == ["RunCall"]


def test_redeploy_with_the_same_key_keeps_the_snapshot() -> None:
    spec = function(snapshot=SnapshotPolicy(enabled=True))
    d = Driver()
    d.deploy(spec, key="k")
    d.send(ev.SnapshotAvailable, app="a", tag="f", snapshot_id="s1")
    d.deploy(replace(spec, timeout=7.0), key="k")
    [action] = d.call()
    assert isinstance(action, ev.StartInstance) and action.snapshot_id == "s1"


def test_eager_capture_without_calls() -> None:
    d = Driver(function(snapshot=SnapshotPolicy(enabled=True), scaling=ScalingPolicy(scaledown_window=5.0)))
    assert d.send(ev.SnapshotRequested, app="a", tag="f") == [start("i-t-1", capture=True)]
    assert d.send(ev.SnapshotRequested, app="a", tag="f") == []
    d.send(ev.SnapshotCaptured, instance_id="i-t-1", snapshot_id="s1")
    d.ready("i-t-1")
    assert names(d.at(5.0)) == ["StopInstance"]
    assert d.stopped("i-t-1") == []


# Apps


def test_new_version_takes_new_calls_and_the_old_one_drains() -> None:
    d = Driver(function(scaling=ScalingPolicy(min_containers=1, max_containers=1)))
    d.ready("i-t-1")
    d.call()
    d.call()
    [action] = d.deploy(function(scaling=ScalingPolicy(min_containers=1)), rolling=False)
    assert isinstance(action, ev.StartInstance) and action.service_id == "a/f@2"
    d.ready("i-t-2")
    assert d.call() == [ev.RunCall(call_id="c3", instance_id="i-t-2")]
    assert names(d.done("c1", "i-t-1")) == ["FinishCall", "RunCall"]
    assert names(d.done("c2", "i-t-1")) == ["FinishCall", "StopInstance"]
    assert d.stopped("i-t-1") == []
    assert list(d.state.services) == ["a/f@2"]


KEPT = ScalingPolicy(min_containers=1)


def rolling(spec: FunctionSpec, **config: Any) -> Driver:
    """`spec` is deployed again while the first version has a warm instance, and starts i-t-2."""
    d = Driver(spec, **config)
    d.ready("i-t-1")
    assert d.deploy(spec) == [start("i-t-2", service_id="a/f@2")]
    return d


def test_the_old_version_serves_until_the_new_one_is_ready() -> None:
    d = rolling(function(scaling=KEPT))
    assert d.call() == [ev.RunCall(call_id="c1", instance_id="i-t-1")]
    d.call()  # the newer version may be ready before the older one is free
    assert d.done("c1", "i-t-1")[-1] == ev.RunCall(call_id="c2", instance_id="i-t-1")
    assert names(d.done("c2", "i-t-1")) == ["FinishCall"]
    assert names(d.ready("i-t-2")) == ["StopInstance"]
    assert d.call() == [ev.RunCall(call_id="c3", instance_id="i-t-2")]
    d.stopped("i-t-1")
    assert "a/f@1" not in d.state.services


def test_a_call_that_waits_goes_to_whichever_is_free_first() -> None:
    d = rolling(function(scaling=KEPT))
    d.call()
    assert names(d.call()) == []
    assert d.ready("i-t-2") == [ev.RunCall(call_id="c2", instance_id="i-t-2")]
    assert names(d.done("c1", "i-t-1")) == ["FinishCall", "StopInstance"]


def test_the_new_code_is_served_at_once_where_nobody_used_the_old() -> None:
    d = Driver(function())
    d.call()
    d.ready("i-t-1")
    d.done("c1", "i-t-1")
    assert names(d.deploy(function())) == ["StopInstance"]
    assert d.call() == [start("i-t-2", service_id="a/f@2")]


def test_a_version_in_use_rolls_without_min_containers() -> None:
    d = Driver(function())
    d.call()
    d.ready("i-t-1")
    assert d.deploy(function()) == [start("i-t-2", service_id="a/f@2")]
    d.done("c1", "i-t-1")
    assert d.call() == [ev.RunCall(call_id="c2", instance_id="i-t-1")]
    d.done("c2", "i-t-1")
    assert names(d.ready("i-t-2")) == ["StopInstance"]


def test_the_old_version_serves_on_while_the_new_one_cannot_start() -> None:
    d = rolling(function(scaling=KEPT, startup_timeout=5.0))
    d.send(ev.StartFailed, instance_id="i-t-2", error=ERROR, user_fault=True)
    while d.now < 200.0:
        for action in d.at(d.now + 1.0):
            assert isinstance(action, ev.StartInstance)
            d.send(ev.StartFailed, instance_id=action.instance_id, error=ERROR, user_fault=True)
    assert d.call() == [ev.RunCall(call_id="c1", instance_id="i-t-1")]
    # One that waits is not failed as long as somebody serves, and starts for it do not follow one another at once.
    [action] = d.call()
    assert d.send(ev.StartFailed, instance_id=action.instance_id, error=ERROR, user_fault=True) == []
    assert d.done("c1", "i-t-1")[-1] == ev.RunCall(call_id="c2", instance_id="i-t-1")
    # Without it they are told.
    d.send(ev.InstanceExited, instance_id="i-t-1", error=ERROR)
    d.call()
    while "c3" in d.state.calls:
        starting = [i for i, state in d.states().items() if state == "starting"]
        if starting:
            d.send(ev.StartFailed, instance_id=starting[0], error=ERROR, user_fault=True)
        else:
            d.at(d.now + 1.0)
    assert d.state.finished["c3"] == "failure"


def test_the_old_version_is_there_for_who_called_just_before_a_deploy_that_does_not_start() -> None:
    """A call every second, and none under way at that moment, is use, too."""
    d = Driver(function())
    d.call()
    d.ready("i-t-1")
    d.done("c1", "i-t-1")
    d.at(d.now + 5.0)
    assert names(d.deploy(function())) == ["StopInstance"]
    d.stopped("i-t-1")
    assert d.call() == [start("i-t-2", service_id="a/f@2")], "the newer code comes first"
    [action] = d.send(ev.StartFailed, instance_id="i-t-2", error=ERROR, user_fault=True)
    assert action == start("i-t-3", service_id="a/f@1")
    assert d.ready("i-t-3") == [ev.RunCall(call_id="c2", instance_id="i-t-3")]


def test_a_deploy_that_mends_one_whose_elder_came_late_starts_at_once() -> None:
    d = Driver(function())
    d.call()
    d.ready("i-t-1")
    d.done("c1", "i-t-1")
    d.deploy(function())
    d.call()
    d.send(ev.StartFailed, instance_id="i-t-2", error=ERROR, user_fault=True)
    d.ready("i-t-3")
    d.done("c2", "i-t-3")
    assert d.deploy(function()) == [start("i-t-4", service_id="a/f@3")]
    assert d.call() == [ev.RunCall(call_id="c3", instance_id="i-t-3")]
    d.done("c3", "i-t-3")
    assert names(d.ready("i-t-4")) == ["StopInstance"]


def test_an_old_version_on_standby_goes_where_the_new_one_starts_or_nobody_calls() -> None:
    for called in (True, False):
        d = Driver(function())
        d.call()
        d.ready("i-t-1")
        d.done("c1", "i-t-1")
        d.deploy(function())
        d.stopped("i-t-1")
        if called:
            d.call()
            d.ready("i-t-2")
        else:
            assert d.at(d.now + 600.0) == []
        assert list(d.state.services) == ["a/f@2"]


def test_the_error_is_told_where_nobody_called_for_a_while_before_the_deploy() -> None:
    d = Driver(function())
    d.call()
    d.ready("i-t-1")
    d.done("c1", "i-t-1")
    d.at(d.now + 11.0)
    d.deploy(function())
    d.call()
    assert names(d.send(ev.StartFailed, instance_id="i-t-2", error=ERROR, user_fault=True)) == ["FinishCall"]


def after_restart() -> Driver:
    """The second version could not start when the daemon ended, and the first served."""
    d = Driver()
    spec = function(scaling=KEPT)
    assert d.deploy(spec, followed=True) == []
    assert d.deploy(spec, standby={"f": ("",)}) == [start("i-t-1", service_id="a/f@2")]
    return d


def test_after_a_restart_the_old_version_serves_when_the_new_one_fails_again() -> None:
    d = after_restart()
    assert d.call() == []
    [action] = d.send(ev.StartFailed, instance_id="i-t-1", error=ERROR, user_fault=True)
    assert action == start("i-t-2", service_id="a/f@1"), "the call waits for it"
    assert names(d.ready("i-t-2")) == ["RunCall"]
    assert names(d.done("c1", "i-t-2")) == ["FinishCall"]
    [action] = [a for a in d.at(d.now + 1.0) if isinstance(a, ev.StartInstance)]
    assert action.service_id == "a/f@2"
    assert names(d.ready(action.instance_id)) == ["StopInstance"]
    d.stopped("i-t-2")
    assert list(d.state.services) == ["a/f@2"]


def test_after_a_restart_a_new_version_that_starts_needs_no_elder() -> None:
    d = after_restart()
    d.ready("i-t-1")
    assert list(d.state.services) == ["a/f@2"]


def test_after_a_restart_a_further_deploy_takes_over_the_elder() -> None:
    d = after_restart()
    assert names(d.deploy(function(scaling=KEPT))) == ["KillInstance", "StartInstance"]
    [action] = d.send(ev.StartFailed, instance_id="i-t-2", error=ERROR, user_fault=True)
    assert action == start("i-t-3", service_id="a/f@1")
    d.send(ev.AppStopped, app="a")
    d.stopped("i-t-1")
    d.stopped("i-t-3")
    assert not d.state.apps and not d.state.services


def test_after_a_restart_calls_are_told_where_the_old_version_does_not_start_either() -> None:
    d = after_restart()
    d.call()
    d.send(ev.StartFailed, instance_id="i-t-1", error=ERROR, user_fault=True)
    d.send(ev.StartFailed, instance_id="i-t-2", error=ERROR, user_fault=True)
    assert list(d.state.services) == ["a/f@2"]
    while "c1" in d.state.calls:
        for action in d.at(d.now + 1.0):
            if isinstance(action, ev.StartInstance):
                d.send(ev.StartFailed, instance_id=action.instance_id, error=ERROR, user_fault=True)
    assert d.state.finished["c1"] == "failure"


def test_a_deploy_that_mends_a_broken_one_takes_over_its_elder() -> None:
    d = rolling(function(scaling=KEPT))
    d.send(ev.StartFailed, instance_id="i-t-2", error=ERROR, user_fault=True)
    [action] = d.deploy(function(scaling=KEPT))
    assert action == start("i-t-3", service_id="a/f@3")
    assert d.call() == [ev.RunCall(call_id="c1", instance_id="i-t-1")]
    d.done("c1", "i-t-1")
    assert names(d.ready("i-t-3")) == ["StopInstance"]
    d.stopped("i-t-1")
    assert list(d.state.services) == ["a/f@3"]


def test_a_call_that_the_old_version_does_not_know_waits_for_the_new_one() -> None:
    old = function("C", kind="class", methods=(MethodSpec("run"),), scaling=KEPT)
    d = Driver(old)
    d.ready("i-t-1")
    d.deploy(replace(old, methods=(MethodSpec("run"), MethodSpec("more"))))
    assert d.call("C", "more") == []
    assert d.call("C", "run") == [ev.RunCall(call_id="c2", instance_id="i-t-1")]
    assert d.done("c2", "i-t-1") == [ev.FinishCall(call_id="c2", outcome="success")]
    assert names(d.ready("i-t-2")) == ["RunCall", "StopInstance"]


def test_no_rolling_where_it_was_not_wanted_or_there_is_no_room_or_another_constructor() -> None:
    spec = function(scaling=KEPT)
    for config, changes, wish in (
        ({}, {}, False),
        ({"max_instances": 1}, {}, True),
        ({}, {"parameters": {"n": "int"}}, True),
    ):
        d = Driver(spec, **config)
        d.ready("i-t-1")
        assert "StopInstance" in names(d.deploy(replace(spec, **changes), rolling=wish))


def test_the_elder_gives_way_where_the_new_version_finds_no_room() -> None:
    spec = function(scaling=KEPT, startup_timeout=5.0)
    d = rolling(spec, max_instances=2)
    d.send(ev.StartFailed, instance_id="i-t-2", error=ERROR, user_fault=False)
    other = function("g")
    d.send(ev.AppDeployed, app="b", version=1, specs=(other,), keys={"g": "k"})
    d.send(ev.CallSubmitted, call_id="x", app="b", tag="g", method="g")
    assert names(d.at(6.0)) == ["StopInstance"], "of the elder"


def test_what_rolls_is_stopped_with_its_app() -> None:
    d = rolling(function(scaling=KEPT))
    d.call()
    assert names(d.send(ev.AppStopped, app="a")) == ["FinishCall", "KillInstance", "KillInstance"]
    d.stopped("i-t-1")
    d.stopped("i-t-2")
    assert not d.state.apps and not d.state.services


def test_stopped_app_leaves_nothing() -> None:
    d = Driver(function(scaling=ScalingPolicy(min_containers=2, max_containers=3)))
    d.ready("i-t-1")
    d.ready("i-t-2")
    d.call()
    assert names(d.send(ev.AppStopped, app="a")) == ["FinishCall", "StopInstance", "KillInstance"]
    assert d.stopped("i-t-1") == d.stopped("i-t-2") == []
    state = d.state
    assert not state.apps and not state.services and not state.knowledge and not state.instances and not state.calls


def test_shutdown_lets_calls_finish_and_ends_no_other() -> None:
    d = Driver(function(scaling=ScalingPolicy(max_containers=2)), shutdown_grace=10.0)
    for _ in range(3):
        d.call()
    d.ready("i-t-1")
    d.ready("i-t-2")
    assert d.send(ev.ShutdownRequested) == []
    assert names(d.done("c1", "i-t-1")) == ["FinishCall", "StopInstance"]
    assert names(d.at(10.0)) == ["KillInstance"]
    d.stopped("i-t-1")
    d.stopped("i-t-2")
    assert not d.state.instances and set(d.state.calls) == {"c2", "c3"}


def test_stop_by_hand_puts_the_call_back_in_front() -> None:
    d = Driver(function(scaling=ScalingPolicy(max_containers=1)))
    d.call()
    d.call()
    d.ready("i-t-1")
    assert names(d.send(ev.InstanceStopRequested, instance_id="i-t-1")) == ["KillInstance"]
    assert d.done("c1", "i-t-1") == [], "too late: it runs again"
    d.stopped("i-t-1")
    assert d.ready("i-t-2") == [ev.RunCall(call_id="c1", instance_id="i-t-2")]


# The machine as such


def test_invalid_transition_tells_the_story_and_changes_nothing() -> None:
    d = Driver(function())
    d.call()
    d.ready("i-t-1")
    before = d.state.snapshot_view()
    with pytest.raises(InvalidTransition) as caught:
        d.ready("i-t-1")
    assert d.state.snapshot_view() == before
    told = caught.value.fields
    assert told["entity"] == "i-t-1"
    assert [step[1] for step in told["history"]] == ["starting", "running"]
    assert told["event"]["type"] == "InstanceReady"


def _example(hint: Any) -> Any:
    text = str(hint)
    if "Literal" in text:
        return hint.__args__[0]
    for name, value in (
        ("FunctionSpec", (function(),)),
        ("dict[str, tuple[str, ...]]", {"f": ("", "d")}),
        ("tuple[str", ("x",)),
        ("dict[str, dict[str, str]]", {"f": {"c": "k"}}),
        ("dict[str, str]", {"f": "k"}),
        ("dict[str, int]", {"f": 1}),
        ("dict", {"a": [1, None]}),
    ):
        if name in text:
            return value
    return {bool: True, int: 3, float: 1.5}.get(hint, 3 if "int" in text else "x")


@pytest.mark.parametrize("cls", [*Event.registry.values(), *Action.registry.values()], ids=lambda c: c.__name__)
def test_every_event_and_action_survives_json(cls: type[Any]) -> None:
    hints = get_type_hints(cls)
    value = cls(**{f.name: _example(hints[f.name]) for f in fields(cls)})
    decode = event_from_dict if issubclass(cls, Event) else action_from_dict
    assert decode(json.loads(json.dumps(value.to_dict()))) == value
    with pytest.raises(SpecError):
        decode({**value.to_dict(), "extra": 1})


def test_every_event_is_handled() -> None:
    assert set(_HANDLERS) == set(Event.registry.values())


def test_replay_command_finds_the_difference(tmp_path: Path) -> None:
    config = Config(max_instances=2)
    state = State(config, run="r")
    lines = [journal_header(config, "r")]
    deployed = ev.AppDeployed(now=0.0, app="a", version=1, specs=(function(),), keys={"f": "k"})
    called = ev.CallSubmitted(now=1.0, call_id="c1", app="a", tag="f", method="f")
    lines += [journal_line(event, handle(state, event)) for event in (deployed, called)]
    journal = tmp_path / "journal"
    command = [sys.executable, "-m", "woodfrog.control.replay", str(journal)]

    journal.write_text("\n".join(lines))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("2 events")

    journal.write_text("\n".join(lines).replace("i-r-1", "i-r-7"))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "line 3" in done.stdout

    journal.write_text("{}")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "line 1" in done.stderr


def test_warm_call_is_cheap_beside_many_others() -> None:
    """It takes as long beside 200 other functions and 5000 waiting calls as beside none."""

    def warm(others: int, waiting: int) -> Callable[[], float]:
        many = [function(f"g{n}", scaling=ScalingPolicy(min_containers=1)) for n in range(others)]
        blocked = function("blocked", scaling=ScalingPolicy(max_containers=1))
        d = Driver(function(), blocked, *many, max_instances=1000, max_starting=1000)
        for instance in list(d.state.instances):
            d.ready(instance)
        for _ in range(waiting):
            d.call("blocked")
        d.call()
        instance = f"i-t-{d.state.counter}"
        d.ready(instance)
        d.done(f"c{d.calls}", instance)

        def calls() -> float:
            begin = time.process_time()
            for _ in range(200):
                d.call()
                d.done(f"c{d.calls}", instance)
            assert len(d.state.heap) < 1000
            return time.process_time() - begin

        return calls

    alone, beside = warm(0, 0), warm(200, 5000)
    times = [(alone(), beside()) for _ in range(9)]
    assert min(b for _, b in times) < 6 * min(a for a, _ in times), times
