"""What a backend is: it starts, calls and stops instances, and tells an observer what became of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from woodfrog.backends.connection import Payload
from woodfrog.errors import WoodfrogError
from woodfrog.linux.rootplan import VolumeMount
from woodfrog.spec import FunctionSpec, RuntimeSpec

__all__ = ["Answer", "Backend", "CallRequest", "Observer", "StartRequest"]


@dataclass(frozen=True)
class StartRequest:
    """One instance to start. `mode` "restore" thaws `snapshot_id`; "cold" boots, and freezes when `capture` is set."""

    instance_id: str
    app: str
    family: str
    """The app's name without what makes an ephemeral app's unique: its runs share their snapshots."""
    spec: FunctionSpec
    runtime: RuntimeSpec
    function_key: str
    mode: Literal["cold", "restore"]
    snapshot_id: str | None
    capture: bool
    env: dict[str, str]
    """The user's environment: image, function, secrets."""
    volumes: tuple[VolumeMount, ...] = ()
    """Host directories and where the function sees them."""
    params: bytes = b""
    params_digest: str = ""


@dataclass(frozen=True)
class CallRequest:
    call_id: str
    method: str
    encoding: str
    payload: Payload
    on_item: Callable[[Payload], Awaitable[None]] | None = None
    """Takes a generator's items as they come; while it waits, the worker does."""


@dataclass(frozen=True)
class Answer:
    """How a call ended. "lost": the instance died under it; the observer is told separately."""

    outcome: Literal["success", "exception", "lost"]
    payload: Payload = field(default_factory=lambda: Payload(data=b""))
    error: dict[str, Any] | None = None
    ms: float = 0.0


class Observer(Protocol):
    """Told of everything that happens to instances. Called on the event loop, never concurrently."""

    def on_stage(self, instance_id: str, stage: str) -> None: ...
    def on_ready(self, instance_id: str) -> None: ...
    def on_captured(self, request: StartRequest, snapshot_id: str) -> None:
        """Committed; the instance serves already, and may be gone by now."""

    def on_capture_failed(self, instance_id: str, error: WoodfrogError, *, alive: bool) -> None: ...
    def on_restore_failed(
        self, instance_id: str, snapshot_id: str, error: WoodfrogError, *, at_fault: bool
    ) -> None: ...
    def on_start_failed(self, instance_id: str, error: WoodfrogError, *, user_fault: bool) -> None: ...
    def on_exited(self, instance_id: str, error: WoodfrogError) -> None: ...
    def on_lost(self, instance_id: str, reason: str) -> None:
        """Through no fault of its own the instance cannot go on: stop it and run its call elsewhere."""

    def on_stopped(self, instance_id: str) -> None: ...
    def on_log(self, instance_id: str, stream: str, data: bytes) -> None: ...


class Backend(Protocol):
    def start(self, request: StartRequest) -> None:
        """Begin a start; the observer hears how it goes."""

    async def call(self, instance_id: str, request: CallRequest) -> Answer: ...

    def stop(self, instance_id: str, *, graceful: bool, reason: str) -> None:
        """Begin a stop; `on_stopped` follows. Graceful runs the exit hooks."""

    def find_snapshot(self, function_key: str) -> str | None:
        """The snapshot that a start on this machine could thaw."""

    def snapshots_in_use(self) -> set[str]:
        """Snapshots whose files some instance rests on."""

    def describe(self, instance_id: str) -> dict[str, Any] | None: ...

    async def execute(self, instance_id: str, argv: list[str], timeout: float) -> dict[str, Any]: ...

    async def close(self) -> None:
        """Kill everything and wait until it is gone."""
