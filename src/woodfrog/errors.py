"""Every failure woodfrog reports, as one tree of exceptions with stable codes.

    WoodfrogError
    ├── SpecError               the program's own: a decorator, a deploy, an argument
    │   ├── SerializationError  an argument or a result cannot be pickled
    │   ├── MissingNameError    Modal has that name, woodfrog does not (an AttributeError, too)
    │   ├── FileTaken           a volume has a file of that name already
    │   └── NotFoundError       no such app, function, call, container, snapshot or volume
    │       └── FileMissing     no such file in a volume
    ├── HostError               the machine lacks something (root, CRIU, a kernel feature)
    ├── DaemonError             the daemon cannot be reached, or broke off
    │   └── AuthError           it wants a token, or another one
    ├── SandboxError            a sandbox could not be set up or died
    ├── SnapshotError
    │   ├── IncompatibleSnapshot   made on a host that differs: cold start
    │   ├── CaptureError           the freeze failed
    │   ├── RestoreError           the thaw failed: cold start
    │   └── IntegrityError         altered, truncated or unsigned: never restored
    ├── GpuError                a GPU or its driver did not do what it was asked
    ├── StoreError              reading or writing state on disk
    ├── ExecutionError          the call did not come to an answer
    │   ├── FunctionTimeoutError   it ran past its timeout
    │   ├── StartupError           import or enter() failed or ran past startup_timeout
    │   ├── OutOfMemoryError       the sandbox hit its memory limit
    │   ├── InstanceCrashed        the process ended in the middle of a call
    │   ├── CallCancelled          cancelled by the user, or its app stopped
    │   └── OutputExpired          the result is no longer kept
    │       └── CallNotFound       or there never was such a call (a NotFoundError, too)
    └── TimedOut                FunctionTimeoutError and OutputExpired, too
        └── NotOverYet          the call has no answer within the timeout of `get`

`code` is stable and safe to test for; `fields` holds plain JSON values; `retryable` says whether the same
request may succeed when it is simply tried again.
"""

from __future__ import annotations

from typing import Any, ClassVar

__all__ = [
    "AuthError",
    "CallCancelled",
    "CallNotFound",
    "CaptureError",
    "DaemonError",
    "ExecutionError",
    "FileMissing",
    "FileTaken",
    "FunctionTimeoutError",
    "GpuError",
    "HostError",
    "IncompatibleSnapshot",
    "InstanceCrashed",
    "IntegrityError",
    "MissingNameError",
    "NotFoundError",
    "NotOverYet",
    "OutOfMemoryError",
    "OutputExpired",
    "RestoreError",
    "SandboxError",
    "SerializationError",
    "SnapshotError",
    "SpecError",
    "StartupError",
    "StoreError",
    "TimedOut",
    "WoodfrogError",
    "error_from_dict",
]


class WoodfrogError(Exception):
    """Base of all of woodfrog's errors.

    Args:
        message: one line: what, where, what to do.
        code: a more particular stable code than the class's own.
        retryable: whether trying the same again may succeed.
        fields: plain JSON values for programs (pid, phase, digest, ...).
    """

    code: str = "error"
    retryable: bool = False
    _registry: ClassVar[dict[str, type[WoodfrogError]]] = {}

    def __init__(
        self, message: str = "", *, code: str | None = None, retryable: bool | None = None, **fields: Any
    ) -> None:
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code
        if retryable is not None:
            self.retryable = retryable
        self.fields: dict[str, Any] = fields

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        WoodfrogError._registry[cls.__name__] = cls

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.to_dict()))

    def to_dict(self) -> dict[str, Any]:
        """The form that travels as JSON: type, code, message, retryable, fields."""
        return {
            "type": type(self).__name__,
            "code": self.code,
            "message": self.message,
            "retryable": self.retryable,
            "fields": self.fields,
        }


def error_from_dict(data: dict[str, Any]) -> WoodfrogError:
    """Rebuild an error from `to_dict`'s form; an unknown type becomes a plain `WoodfrogError`."""
    return _rebuild(WoodfrogError._registry.get(str(data.get("type")), WoodfrogError), data)


def _rebuild(cls: type[WoodfrogError], data: dict[str, Any]) -> WoodfrogError:
    error = cls(str(data.get("message", "unknown error")), code=data.get("code"), retryable=data.get("retryable"))
    error.fields = dict(data.get("fields") or {})
    return error


class SpecError(WoodfrogError):
    """The program or request is wrong; the message says where and what to change."""

    code = "spec"


class SerializationError(SpecError):
    """An argument or a result could not be pickled or unpickled."""

    code = "serialization"


class MissingNameError(SpecError, AttributeError):
    """Modal has a name of that kind; woodfrog does not."""

    code = "missing-name"


class NotFoundError(SpecError):
    """No app, function, call, container, snapshot or volume of that name."""

    code = "not-found"


class FileMissing(NotFoundError, FileNotFoundError):
    """A volume has no file or directory of that name."""

    code = "file-missing"


class FileTaken(SpecError, FileExistsError):
    """A volume has something of that name already."""

    code = "file-exists"


class HostError(WoodfrogError):
    """The machine lacks something woodfrog needs; the message names the remedy."""

    code = "host"


class DaemonError(WoodfrogError):
    """The daemon cannot be reached, could not be started, or broke off."""

    code = "daemon"


class AuthError(DaemonError):
    """The daemon wants a token, or another one."""

    code = "unauthorized"


class SandboxError(WoodfrogError):
    """A sandbox could not be prepared, assembled or used."""

    code = "sandbox"


class SnapshotError(WoodfrogError):
    """Base of the snapshot failures."""

    code = "snapshot"


class IncompatibleSnapshot(SnapshotError):
    """The snapshot was made on a host that differs in what matters: cold start, and a new snapshot."""

    code = "snapshot-incompatible"


class CaptureError(SnapshotError):
    """The freeze failed. `alive` says whether the process runs on unharmed.

    Args:
        alive: True when the process was left running, False when it is known dead.
        phase: the named phase that failed.
        remedy: what the user can do.
        log_tail: the last lines of the engine's log.
    """

    code = "capture-failed"

    def __init__(
        self,
        message: str,
        *,
        alive: bool = False,
        phase: str = "",
        remedy: str = "",
        log_tail: str = "",
        **fields: Any,
    ) -> None:
        super().__init__(message, alive=alive, phase=phase, remedy=remedy, log_tail=log_tail, **fields)

    @property
    def alive(self) -> bool:
        return bool(self.fields.get("alive"))


class RestoreError(SnapshotError):
    """The thaw failed; the call falls back to a cold start.

    Args:
        snapshot_at_fault: True when the snapshot itself is bad, so that it must be retired.
    """

    code = "restore-failed"

    def __init__(self, message: str, *, snapshot_at_fault: bool = False, **fields: Any) -> None:
        super().__init__(message, snapshot_at_fault=snapshot_at_fault, **fields)

    @property
    def snapshot_at_fault(self) -> bool:
        return bool(self.fields.get("snapshot_at_fault"))


class IntegrityError(SnapshotError):
    """Something stored was altered, truncated or is unsigned; it is never restored."""

    code = "integrity"


class GpuError(WoodfrogError):
    """A GPU or its driver did not do what it was asked; `code` is one of `woodfrog.cuda.failures.CODES`.

    Args:
        pid: the process it was about, as the host knows it.
        call: the driver's function.
        result: what the driver answered (`CUDA_ERROR_…`).
    """

    code = "gpu-driver"


class StoreError(WoodfrogError):
    """State on disk could not be read or written (disk full, permissions)."""

    code = "store"


class ExecutionError(WoodfrogError):
    """The call did not come to an answer, for a reason that is not an exception of the user's code."""

    code = "execution"


class TimedOut(WoodfrogError):
    """Base of what took, or was left, too long."""

    code = "timed-out"


class NotOverYet(TimedOut, TimeoutError):
    """The call has no answer within the `timeout` of `get`; it goes on."""

    code = "not-over-yet"


class FunctionTimeoutError(ExecutionError, TimedOut, TimeoutError):
    """The call ran past the function's `timeout`."""

    code = "timeout"


class StartupError(ExecutionError):
    """The function's import or `enter` failed, or ran past `startup_timeout`."""

    code = "startup"


class OutOfMemoryError(ExecutionError, MemoryError):
    """The sandbox hit its memory limit and the kernel killed a process in it."""

    code = "out-of-memory"


class InstanceCrashed(ExecutionError):
    """The process ended in the middle of the call (exit, signal, segmentation fault)."""

    code = "crashed"


class CallCancelled(ExecutionError):
    """The call was cancelled, or its app was stopped."""

    code = "cancelled"


class OutputExpired(ExecutionError, TimedOut):
    """The result existed but is no longer kept."""

    code = "expired"


class CallNotFound(NotFoundError, OutputExpired):
    """No call of that id: its result is no longer kept, or there never was one."""

    code = "call-not-found"
