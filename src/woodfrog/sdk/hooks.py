"""What user code and the worker share inside one process: snapshot hooks, and where this process came from.

The worker and the SDK meet here and by three attributes, so that neither imports the other:

- `__woodfrog_wrapped__` on a handle (`Function`, `Cls`): the user's own function or class;
- `__woodfrog_role__` on a function in a class: `{"kind": "enter", "snap": bool}` or `{"kind": "exit"}`;
- `raw_f` on what `method()` leaves in a class: the plain function.

Imports nothing but sys, so that it may be loaded into every worker. What the worker knows (restored, the snapshot's
id) is read from `woodfrog.worker.state`, a module of plain values that is loaded in workers only.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    F = TypeVar("F", bound=Callable[..., Any])

__all__ = [
    "current_function_call_id",
    "current_input_id",
    "in_worker",
    "is_local",
    "register_after_restore",
    "register_before_snapshot",
    "restored",
    "shrink_before_snapshot",
    "snapshot_id",
]

_before_snapshot: list[Callable[[], Any]] = []
"""In order of registration; the worker runs them in reverse."""
_after_restore: list[Callable[[], Any]] = []
"""In order of registration; the worker runs them in this order."""

_shrink: dict[str, Any] = {}
"""What `shrink_before_snapshot` was told; the worker reads it."""


def in_worker() -> bool:
    """True inside a container. The worker's own state module is loaded there and nowhere else."""
    return "woodfrog.worker.state" in sys.modules


def register_before_snapshot(function: F) -> F:
    """Have `function()` called before this process is frozen. Works as a decorator too.

    Functions registered later run earlier. Close what must not be frozen (connections, temporary files) here.

    Example:
        >>> import woodfrog
        >>> @woodfrog.register_before_snapshot
        ... def close_pool():
        ...     pool.close()

    Raises:
        TypeError: `function` cannot be called.
    """
    if not callable(function):
        raise TypeError(f"register_before_snapshot needs a function, got {type(function).__name__}")
    _before_snapshot.append(function)
    return function


def register_after_restore(function: F) -> F:
    """Have `function()` called in every copy thawed from the snapshot, before it serves. Works as a decorator too.

    Functions run in the order in which they were registered. Make anew here what must differ between copies: a
    random generator of your own, an identifier, a connection.

    Example:
        >>> import woodfrog
        >>> @woodfrog.register_after_restore
        ... def reseed():
        ...     rng.seed()

    Raises:
        TypeError: `function` cannot be called.
    """
    if not callable(function):
        raise TypeError(f"register_after_restore needs a function, got {type(function).__name__}")
    _after_restore.append(function)
    return function


def shrink_before_snapshot(
    *, torch: bool | None = None, vllm: int | None = None, sglang: bool | None = None, timeout_s: float | None = None
) -> None:
    """Say what libraries free before this process is frozen; what is not named stays as it is.

    Done without asking, after the functions of `register_before_snapshot`, for what is loaded in this process or runs
    as a server that it started: a hook that fails or does not end in time is named in the log, and the freeze goes on.

    Args:
        torch: empty the caching allocators and drop cuBLAS workspaces, if CUDA was initialised. Default True.
        vllm: sleep level of vLLM engines: 1 moves weights to host memory and drops the KV cache, 2 drops both and reads
            the weights again after the restore, 0 leaves them alone. Default 1. One that sleeps already is left so.
        sglang: have SGLang servers release their memory. Default False: a server that the program has released itself
            cannot be told from others, and ends when it is asked twice.
        timeout_s: seconds that each may take. Default 60.

    Example:
        >>> import woodfrog
        >>> woodfrog.shrink_before_snapshot(vllm=2, timeout_s=120)

    Raises:
        ValueError: `vllm` is not 0, 1 or 2, or `timeout_s` not above 0.
    """
    if vllm not in (None, 0, 1, 2):
        raise ValueError(f"shrink_before_snapshot: vllm is a sleep level, 0, 1 or 2, not {vllm!r}")
    if timeout_s is not None and not timeout_s > 0:
        raise ValueError(f"shrink_before_snapshot: timeout_s must be above 0, got {timeout_s!r}")
    given = {"torch": torch, "vllm": vllm, "sglang": sglang, "timeout_s": timeout_s}
    _shrink.update({name: value for name, value in given.items() if value is not None})


def restored() -> bool:
    """True in a process that was thawed from a snapshot, False in one that was started, and on the client."""
    return bool(getattr(sys.modules.get("woodfrog.worker.state"), "restored", False))


def snapshot_id() -> str | None:
    """Id of the snapshot this process was thawed from; None where it was not."""
    return getattr(sys.modules.get("woodfrog.worker.state"), "snapshot_id", None)


def current_function_call_id() -> str | None:
    """Id of the call that this container answers now, as `FunctionCall.object_id`; None outside of calls.

    Example:
        >>> import woodfrog
        >>> woodfrog.current_function_call_id() is None
        True
    """
    return getattr(sys.modules.get("woodfrog.worker.state"), "call_id", None)


def current_input_id() -> str | None:
    """The same as `current_function_call_id`: a call has one input."""
    return current_function_call_id()


def is_local() -> bool:
    """True on the client, False inside a container."""
    return not in_worker()
