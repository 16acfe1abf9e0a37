"""What the control machine is told (events) and what it asks for (actions).

All are frozen and carry only plain data; `to_dict` and `from_dict` take any of them through JSON (field `type` names
the class), so that a journal of them can be replayed. Times are seconds on one clock that never goes back.

What the daemon owes the machine:
- Every `StartInstance` is answered by `InstanceReady`, `StartFailed`, `StartRefused`, `RestoreFailed`,
  `CaptureFailed(alive=False)` or `InstanceExited`, whichever comes first; all but the first mean that the instance is
  gone, sandbox and all.
- Every `ParkInstance` is answered by `InstanceParked`, `RestoreFailed`, `StartFailed` or `InstanceExited`, and every
  `WakeInstance` as a `StartInstance` is.
- Every `StopInstance` and `KillInstance` is answered by `InstanceStopped` (or `InstanceExited`) once it is gone.
- Every `RunCall` is answered by `CallFinished`, or by `InstanceExited`, also after its `CloseCall`.
- `FinishCall` ends every call, exactly once, also after a success: only then is the outcome final. After a
  `CallFinished` that is to be retried a `RetryCall`, and a later `RunCall` of the same call, come instead.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from woodfrog import spec
from woodfrog.errors import SpecError
from woodfrog.spec import FunctionSpec

__all__ = [
    "Action",
    "AppDeployed",
    "AppStopped",
    "CallCancelled",
    "CallFinished",
    "CallSubmitted",
    "CaptureFailed",
    "CloseCall",
    "Event",
    "FillMemory",
    "FinishCall",
    "GpusSetAside",
    "InstanceExited",
    "InstanceParked",
    "InstanceReady",
    "InstanceStage",
    "InstanceStopRequested",
    "InstanceStopped",
    "KillInstance",
    "MemorySeen",
    "Outcome",
    "ParkInstance",
    "RestoreFailed",
    "RetireSnapshot",
    "RetryCall",
    "RunCall",
    "ShutdownRequested",
    "SnapshotAvailable",
    "SnapshotCaptured",
    "SnapshotInvalidated",
    "SnapshotRequested",
    "StartFailed",
    "StartInstance",
    "StartRefused",
    "StopInstance",
    "Tick",
    "WakeAt",
    "WakeInstance",
    "action_from_dict",
    "event_from_dict",
]

Outcome = Literal["success", "exception", "failure", "cancelled"]


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened. `now` is when the machine is told of it."""

    now: float
    registry: ClassVar[dict[str, type[Event]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Event.registry[cls.__name__] = cls

    def to_dict(self) -> dict[str, Any]:
        return {"type": type(self).__name__, **spec.to_dict(self)}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Event:
        return event_from_dict(data)


@dataclass(frozen=True, kw_only=True)
class Action:
    """Something the daemon has to do. Actions of one event are carried out in order."""

    registry: ClassVar[dict[str, type[Action]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Action.registry[cls.__name__] = cls

    def to_dict(self) -> dict[str, Any]:
        return {"type": type(self).__name__, **spec.to_dict(self)}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Action:
        return action_from_dict(data)


def event_from_dict(data: dict[str, Any]) -> Event:
    """Inverse of `Event.to_dict`.

    Raises:
        SpecError: an unknown event, or a missing, unknown or wrongly typed field.
    """
    name = data.get("type")
    cls = Event.registry.get(str(name))
    if cls is None:
        raise SpecError(f"unknown event {name!r}", code="bad-event")
    return spec.from_dict(cls, {k: v for k, v in data.items() if k != "type"})


def action_from_dict(data: dict[str, Any]) -> Action:
    """Inverse of `Action.to_dict`.

    Raises:
        SpecError: an unknown action, or a missing, unknown or wrongly typed field.
    """
    name = data.get("type")
    cls = Action.registry.get(str(name))
    if cls is None:
        raise SpecError(f"unknown action {name!r}", code="bad-action")
    return spec.from_dict(cls, {k: v for k, v in data.items() if k != "type"})


# Events: apps and calls


@dataclass(frozen=True, kw_only=True)
class AppDeployed(Event):
    """A version of an app is now the one that new calls go to.

    After a daemon's restart: for each app in the order of its versions, the deploy of a version and then the
    unfinished calls of that version (a version that drains and has no calls is forgotten at once).
    """

    app: str
    version: int
    specs: tuple[FunctionSpec, ...]
    keys: dict[str, str]
    """Tag to function key (`spec.function_key` without parameters): services of one key share their snapshots."""
    snapshots: dict[str, str] = field(default_factory=dict)
    """Tag to a snapshot that fits: known before `min_containers` start."""
    gpu_snapshots: dict[str, dict[str, str]] = field(default_factory=dict)
    """The same of snapshots that hold GPU memory: tag to chip to snapshot."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes of memory in each of these snapshots."""
    ephemeral: bool = False
    rolling: bool = True
    """Warm instances of the version before that are in use serve new calls until this one has an instance ready."""
    followed: bool = False
    """A newer version's deploy follows at once: nothing is started for this one but what its unfinished calls need."""
    standby: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Tag to digests of parameters: groups that the version before served, since this one could not start. It does so
    again, although none of its instances is warm, should this one still not start."""


@dataclass(frozen=True, kw_only=True)
class AppStopped(Event):
    """Cancels the app's calls and stops its instances, of all versions."""

    app: str
    reason: str = ""
    """For the callers; "" = somebody wanted it."""


@dataclass(frozen=True, kw_only=True)
class CallSubmitted(Event):
    call_id: str
    app: str
    tag: str
    """Of the function or class, without the method."""
    method: str
    """A plain function's own name."""
    params_digest: str = ""
    version: int | None = None
    """None = the active one."""


@dataclass(frozen=True, kw_only=True)
class CallCancelled(Event):
    call_id: str
    error: dict[str, Any] | None = None
    """Why it has failed, where nobody cancelled it: it cannot be brought to a right end."""


@dataclass(frozen=True, kw_only=True)
class CallFinished(Event):
    """The worker answered, or the call broke in a way that the instance may have survived."""

    call_id: str
    instance_id: str
    outcome: Literal["success", "exception", "failure"]
    error: dict[str, Any] | None = None
    instance_ok: bool = True
    """False: the instance cannot be trusted with another call."""


# Events: instances


@dataclass(frozen=True, kw_only=True)
class InstanceStage(Event):
    """A start got further. `"capturing"` and `"restoring"` have meaning, other texts are for people.

    A start of mode `restore` begins in `"restoring"`, and so does what follows a `SnapshotCaptured`. Name another stage
    (`"enter"`) once user code runs after a restore: a start that hangs in `"capturing"` or `"restoring"` is ours and
    falls back to a cold start, in any other stage it is the user's and fails the calls.
    """

    instance_id: str
    stage: str


@dataclass(frozen=True, kw_only=True)
class InstanceReady(Event):
    instance_id: str


@dataclass(frozen=True, kw_only=True)
class InstanceParked(Event):
    """It was thawed and is stopped: it has not run yet, and waits for `WakeInstance`."""

    instance_id: str


@dataclass(frozen=True, kw_only=True)
class StartFailed(Event):
    """The instance did not come up and is gone. `user_fault`: the user's import or `enter` raised."""

    instance_id: str
    error: dict[str, Any]
    user_fault: bool


@dataclass(frozen=True, kw_only=True)
class InstanceExited(Event):
    """The instance died by itself, in whatever state. `error` becomes that of its call."""

    instance_id: str
    error: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class InstanceStopped(Event):
    """An instance that was to be stopped or killed is gone."""

    instance_id: str


@dataclass(frozen=True, kw_only=True)
class InstanceStopRequested(Event):
    """A person asks for this instance to be stopped; its call goes back to the head of the queue."""

    instance_id: str


# Events: snapshots


@dataclass(frozen=True, kw_only=True)
class SnapshotCaptured(Event):
    """The snapshot is committed. The instance goes on to its restore, and may be ready before that, or gone."""

    instance_id: str
    snapshot_id: str
    size: int = 0
    """Bytes of memory in it; 0 = not known."""


@dataclass(frozen=True, kw_only=True)
class CaptureFailed(Event):
    """`alive`: the instance goes on and will be ready, or was and may be gone; otherwise this is its end."""

    instance_id: str
    reason: str
    alive: bool


@dataclass(frozen=True, kw_only=True)
class RestoreFailed(Event):
    """The instance is gone. `at_fault`: the snapshot itself is bad. `gpu`: it was not; the GPUs that the instance had
    do not fit it (no room, another chip), and others may."""

    instance_id: str
    snapshot_id: str
    reason: str
    at_fault: bool = False
    gpu: bool = False


@dataclass(frozen=True, kw_only=True)
class SnapshotAvailable(Event):
    """The daemon has a snapshot that fits (found in the catalogue). Tell it before the first call that could use it."""

    app: str
    tag: str
    snapshot_id: str
    params_digest: str = ""
    version: int | None = None
    """None = the active one."""
    chip: str = ""
    """Of the GPU whose memory it holds; empty = it holds none."""
    size: int = 0
    """Bytes of memory in it; 0 = not known."""


@dataclass(frozen=True, kw_only=True)
class SnapshotInvalidated(Event):
    """The snapshot is not to be used any more (deleted, or refused by a person)."""

    snapshot_id: str


@dataclass(frozen=True, kw_only=True)
class SnapshotRequested(Event):
    """Make a snapshot now, without waiting for a call. Nothing happens if there is one."""

    app: str
    tag: str
    params_digest: str = ""


# Events: GPUs


@dataclass(frozen=True, kw_only=True)
class GpusSetAside(Event):
    """The GPUs that are not to be used now, all of them, by id, and why. What runs on one goes on."""

    sick: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class StartRefused(Event):
    """Nothing was started: the GPUs that it was given cannot be used. The instance is gone; `GpusSetAside` has said
    which. `error` becomes that of the calls where no others would do."""

    instance_id: str
    error: dict[str, Any]


# Events: memory


@dataclass(frozen=True, kw_only=True)
class MemorySeen(Event):
    """What the machine has for instances, in bytes. Until the first of these, starts do not depend on memory.

    `now` is when instances were looked at; that may be before other events of which the machine has been told since.
    """

    total: int
    """0 = it is not known any more: from now on starts do not depend on it."""
    available: int
    """What nobody uses, less what is to stay free."""
    used: dict[str, int] | None = None
    """What each instance takes for itself, caches of files aside, by id; who is not in it takes nothing yet, or no
    more. None = not looked at."""


# Events: time


@dataclass(frozen=True, kw_only=True)
class Tick(Event):
    """Time has passed; needed at the time of the latest `WakeAt`."""


@dataclass(frozen=True, kw_only=True)
class ShutdownRequested(Event):
    """Start nothing more, let running calls finish for `shutdown_grace`, stop every instance.

    Calls that do not finish get no `FinishCall`: they are for the next daemon. The shutdown is complete when the
    state has no instances left.
    """


# Actions


@dataclass(frozen=True, kw_only=True)
class StartInstance(Action):
    instance_id: str
    service_id: str
    params_digest: str
    mode: Literal["cold", "restore"]
    snapshot_id: str | None = None
    """Set for mode `restore`."""
    capture: bool = False
    """Freeze it after `enter(snap=True)`, then go on through the restore path."""
    gpus: tuple[str, ...] = ()
    """Ids of the GPUs it gets; empty although it asks for some: this machine has none that fit."""


@dataclass(frozen=True, kw_only=True)
class ParkInstance(Action):
    """Thaw it as a `StartInstance` does, and leave it stopped."""

    instance_id: str
    service_id: str
    params_digest: str
    snapshot_id: str


@dataclass(frozen=True, kw_only=True)
class WakeInstance(Action):
    """Let a parked instance run; from here on it goes through the end of a start."""

    instance_id: str


@dataclass(frozen=True, kw_only=True)
class RunCall(Action):
    call_id: str
    instance_id: str
    attempt: int = 1
    """1 for the first run."""


@dataclass(frozen=True, kw_only=True)
class CloseCall(Action):
    """Nobody wants more items of that generator, whose call is over: close it, so that its instance is free again."""

    call_id: str
    instance_id: str


@dataclass(frozen=True, kw_only=True)
class FillMemory(Action):
    """It is used, and there is room: let the rest of its snapshot's memory come."""

    instance_id: str


@dataclass(frozen=True, kw_only=True)
class StopInstance(Action):
    """`graceful`: run the exit hooks first."""

    instance_id: str
    reason: str
    graceful: bool = True


@dataclass(frozen=True, kw_only=True)
class KillInstance(Action):
    instance_id: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class FinishCall(Action):
    """The call is over. For `success`, and `exception` of the last attempt, the payload is the one the worker sent."""

    call_id: str
    outcome: Outcome
    error: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class RetryCall(Action):
    """An attempt came to nothing; another follows in `delay` seconds, by a later `RunCall`."""

    call_id: str
    attempt: int
    """The one that failed."""
    attempts: int
    """So many there are at most."""
    delay: float
    error: dict[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class RetireSnapshot(Action):
    snapshot_id: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class WakeAt(Action):
    """Send a `Tick` at `time`; replaces any earlier wish. At most one per event, always the last action."""

    time: float
