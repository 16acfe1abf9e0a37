"""What can go wrong with a GPU, by stable code: cause and remedy. `docs/failure-modes.md` shows this table."""

from __future__ import annotations

from typing import Any

from woodfrog.errors import GpuError

__all__ = ["CODES", "RESULTS", "failures_markdown", "gpu_error"]

CODES: dict[str, tuple[str, str]] = {
    "gpu-no-driver": (
        "NVIDIA's driver, or the package that calls it, is not there",
        "install the driver (570 or newer) and `pip install woodfrog[gpu]`; set WOODFROG_CUDA_DIR where libcuda.so.1 "
        "is in no usual place",
    ),
    "gpu-driver-old": (
        "the driver is too old for this",
        "install driver 570 or newer; 580 or newer to restore on another GPU than the captured one",
    ),
    "gpu-illegal-move": (
        "a process is not in the state that this step needs",
        "somebody else checkpoints it too (cuda-checkpoint, another tool); stop that",
    ),
    "gpu-busy": (
        "the GPU's work did not end within the time that a lock may take",
        "let kernels and collectives end before the snapshot (synchronize in a register_before_snapshot hook)",
    ),
    "gpu-out-of-memory": (
        "the GPU has not enough free memory for what the snapshot holds",
        "free memory on it (nvidia-smi); it is thawed on another GPU of this chip meanwhile, else it starts cold",
    ),
    "gpu-unsupported": (
        "a process uses what the driver cannot checkpoint (managed memory, CUDA IPC, MPS, MIG, graphics)",
        "open it after the snapshot (enter(snap=False)), or run without enable_gpu_snapshot",
    ),
    "gpu-not-permitted": (
        "the driver may not do this here",
        "enable persistence mode (nvidia-smi -pm 1); in a container, give it CAP_SYS_PTRACE, and all of the machine's "
        "GPUs or driver 580",
    ),
    "gpu-not-ready": (
        "the driver does not start yet: GPUs that are joined by NVSwitch wait for NVIDIA's fabric manager",
        "start nvidia-fabricmanager, wait until `nvidia-smi -q` calls the fabric's state Completed, and start the "
        "daemon again",
    ),
    "gpu-not-cuda": (
        "the driver knows no such process",
        "it ended, or holds no CUDA state; look at the function's log",
    ),
    "gpu-stuck": (
        "a process cannot be brought back to the GPU; it is ended",
        "nothing: it is started anew. If it repeats, look for Xid errors in the kernel's log",
    ),
    "gpu-helper-hung": (
        "a call to the driver did not return in time; the helper process that made it was killed",
        "look for Xid errors in the kernel's log; the helper is started anew by itself",
    ),
    "gpu-helper-lost": (
        "the helper process that calls the driver ended",
        "look in daemon.log for its last words; it is started anew by itself",
    ),
    "gpu-chip": (
        "the snapshot was made on other GPUs than these",
        "nothing: it starts cold on these, and a snapshot for them is made",
    ),
    "gpu-set-aside": (
        "a GPU is not given out: it is not well, or others use its memory",
        "`woodfrog gpu list` says what to do for each; `woodfrog gpu check` looks again at once",
    ),
    "gpu-needed": (
        "the snapshot holds GPU memory, and it was given no GPU to restore on",
        "run it where there is one, or remove the snapshot",
    ),
    "gpu-bytes-missing": (
        "the driver said that GPU memory was saved, but the process did not grow by it",
        "update the driver; the process is ended, since it may have lost the bytes, and started anew",
    ),
    "gpu-driver": (
        "the driver refused a call",
        "look up the CUDA error it names; look for Xid errors in the kernel's log",
    ),
}

RESULTS: dict[str, str] = {
    "CUDA_ERROR_OUT_OF_MEMORY": "gpu-out-of-memory",
    "CUDA_ERROR_NOT_READY": "gpu-busy",
    "CUDA_ERROR_NOT_SUPPORTED": "gpu-unsupported",
    "CUDA_ERROR_ILLEGAL_STATE": "gpu-illegal-move",
    "CUDA_ERROR_INVALID_DEVICE": "gpu-chip",
    "CUDA_ERROR_NOT_PERMITTED": "gpu-not-permitted",
    "CUDA_ERROR_SYSTEM_NOT_READY": "gpu-not-ready",
}
"""Codes by the driver's answer; anything else is `gpu-driver`."""


def gpu_error(code: str, what: str, **fields: Any) -> GpuError:
    """An error of this table: `what` names the place, the table says the rest."""
    cause, remedy = CODES[code]
    return GpuError(f"{what}: {cause}; {remedy}", code=code, remedy=remedy, **fields)


def failures_markdown() -> str:
    """`CODES` as `docs/failure-modes.md` shows them."""
    return "\n".join(f"**`{code}`**: {cause}.\n\n- What to do: {remedy}.\n" for code, (cause, remedy) in CODES.items())
