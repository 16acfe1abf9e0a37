"""Whether a GPU may be given to a program: what NVML says of it, and what that means. Pure."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

__all__ = ["FATAL_XIDS", "Vitals", "judge"]

RESET = "reset it (nvidia-smi --gpu-reset) or restart the machine"
REPLACE = "restart the machine; if it comes back, have the GPU replaced"

FATAL_XIDS: dict[int, tuple[str, str]] = {
    48: ("an uncorrectable memory error", RESET),
    62: ("its micro-controller halted", RESET),
    63: ("memory that failed is to be replaced by spare rows", RESET),
    64: ("memory that failed could not be replaced by spare rows", REPLACE),
    74: ("an NVLink error", RESET),
    79: ("it has fallen off the bus", REPLACE),
    94: ("a contained uncorrectable memory error", RESET),
    95: ("an uncontained uncorrectable memory error", RESET),
    119: ("its system processor (GSP) does not answer", RESET),
    120: ("an error in its system processor (GSP)", RESET),
    140: ("an uncorrected memory error", RESET),
}
"""Xid errors after which a GPU is not used before it was put right: what it is, and what to do. All others are an
application's (13, 31, 43, 45: its own kernel or access failed), or say that the driver recovered."""


@dataclass(frozen=True)
class Vitals:
    """What NVML says of one GPU. None and False: nothing, or that it is well.

    Args:
        uncorrected: ECC errors since the driver was loaded that could not be corrected.
        remap_pending, remap_failed: memory rows that are to be replaced by spare ones, or could not be.
        retired_pending: pages that are to be retired at the next reset.
        memory, used: bytes in all, and in use by whomever.
        lost: NVML does not reach it; `reset`: it says that only a reset helps.
    """

    uncorrected: int | None = None
    remap_pending: bool = False
    remap_failed: bool = False
    retired_pending: bool = False
    memory: int | None = None
    used: int | None = None
    lost: bool = False
    reset: bool = False


def judge(vitals: Vitals, xids: Collection[int] = (), *, free_percent: int = 0) -> str:
    """Why a GPU is not to be given out now, with the remedy; empty = it may be.

    Args:
        xids: what the driver reported of it lately.
        free_percent: how much of its memory must be free; 0 = however little.

    Example:
        >>> judge(Vitals(memory=80 << 30, used=60 << 30), free_percent=75)
        'others use 61440 of its 81920 MiB; end them (nvidia-smi shows who), or lower WOODFROG_GPU_FREE_PERCENT'
    """
    if vitals.lost:
        return f"the driver does not reach it any more; {REPLACE}"
    for xid in sorted(xids):
        if xid in FATAL_XIDS:
            what, remedy = FATAL_XIDS[xid]
            return f"Xid {xid}: {what}; {remedy}"
    if vitals.reset:
        return f"the driver says that it must be reset; {RESET}"
    if vitals.remap_failed:
        return f"memory rows that failed could not be replaced by spare ones; {REPLACE}"
    if vitals.uncorrected:
        return f"{vitals.uncorrected} uncorrectable memory errors since the driver was loaded; {RESET}"
    if vitals.remap_pending or vitals.retired_pending:
        return f"memory that failed is replaced at the next reset only; {RESET}"
    if vitals.memory and vitals.used is not None and (vitals.memory - vitals.used) * 100 < vitals.memory * free_percent:
        return (
            f"others use {vitals.used >> 20} of its {vitals.memory >> 20} MiB; "
            "end them (nvidia-smi shows who), or lower WOODFROG_GPU_FREE_PERCENT"
        )
    return ""
