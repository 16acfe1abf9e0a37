"""The states of a process on the GPU and the moves between them, as the driver has them. Pure.

RUNNING --lock--> LOCKED --checkpoint--> CHECKPOINTED --restore--> LOCKED --unlock--> RUNNING
"""

from __future__ import annotations

from enum import IntEnum
from typing import Literal, TypeAlias

from woodfrog.cuda.failures import gpu_error

__all__ = ["MOVES", "Move", "State", "after", "way_back"]

Move: TypeAlias = Literal["lock", "checkpoint", "restore", "unlock"]


class State(IntEnum):
    """The numbers are the driver's."""

    RUNNING = 0
    LOCKED = 1
    CHECKPOINTED = 2
    FAILED = 3
    CHECKPOINTING = 4
    """This and the next: between two calls of one who keeps the memory elsewhere, which this program does not."""
    RESTORING = 5


MOVES: dict[Move, tuple[State, State]] = {
    "lock": (State.RUNNING, State.LOCKED),
    "checkpoint": (State.LOCKED, State.CHECKPOINTED),
    "restore": (State.CHECKPOINTED, State.LOCKED),
    "unlock": (State.LOCKED, State.RUNNING),
}


def after(state: State, move: Move, who: str = "process") -> State:
    """The state that a move leads to.

    Raises:
        GpuError: `gpu-illegal-move`, or `gpu-stuck` for a process that no move leads out of.
    """
    before, then = MOVES[move]
    if state is State.FAILED:
        raise gpu_error("gpu-stuck", f"{who}: {move}", state=state.name)
    if state is not before:
        raise gpu_error(
            "gpu-illegal-move", f"{who}: {move} needs {before.name}, it is {state.name}", state=state.name, move=move
        )
    return then


def way_back(state: State, who: str = "process") -> tuple[Move, ...]:
    """The moves from a state back to RUNNING, in order.

    Raises:
        GpuError: `gpu-stuck`: there is no way.
    """
    match state:
        case State.RUNNING:
            return ()
        case State.LOCKED:
            return ("unlock",)
        case State.CHECKPOINTED:
            return ("restore", "unlock")
        case _:
            raise gpu_error("gpu-stuck", who, state=state.name)
