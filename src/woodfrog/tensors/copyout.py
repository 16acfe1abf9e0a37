"""Blocks of device memory copied to the host while the device goes on computing.

The copy that must be of this moment is made on the device, on the caller's stream; from there the bytes leave through
pinned buffers on a stream of their own. Copying aside first and letting it leave while work goes on is after Lee et
al., "GPU Snapshot: Checkpoint Offloading for GPU-Dense Systems" (2019). On the CPU there is one copy and no stream.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

__all__ = ["CopyOut", "copy_to_host"]

_BUFFER = 16 << 20


class CopyOut:
    """Copies out of one device. Bytes that were `put` are in place after `finish`.

    Args:
        device: where the memory is.
        staging_bytes: at most so much is on its way at once, on the device and in pinned memory each; with more, `put`
            waits.
    """

    def __init__(self, device: torch.device, staging_bytes: int) -> None:
        self._device = device
        self._buffers = max(1, staging_bytes // _BUFFER)
        self._free: list[torch.Tensor] = []
        self._made = 0
        self._jobs: deque[tuple[Any, torch.Tensor, torch.Tensor]] = deque()
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None

    def put(self, data: torch.Tensor, width: int, index: torch.Tensor, out: torch.Tensor) -> None:
        """Copy the blocks `index` of `data` (int8, one row), `width` bytes each, one after the other into `out`."""
        full = data.numel() // width
        blocks = data[: full * width].view(full, width)
        whole, tail = index, data[full * width :]
        if tail.numel() and index.numel() and int(index[-1]) == full:
            whole = index[:-1]
            self._copy(tail.clone(), out[whole.numel() * width :])
        if self._device.type == "cpu":
            torch.index_select(blocks, 0, whole, out=out[: whole.numel() * width].view(-1, width))
            return
        step = max(1, _BUFFER // width)
        for at in range(0, whole.numel(), step):
            some = whole[at : at + step]
            self._copy(blocks[some].view(-1), out[at * width : (at + some.numel()) * width])

    def _copy(self, source: torch.Tensor, out: torch.Tensor) -> None:
        """`source` is a copy that nothing writes to any more."""
        if self._stream is None:
            out.copy_(source)
            return
        pinned = self._buffer(source.numel())
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            pinned[: source.numel()].copy_(source, non_blocking=True)
            source.record_stream(self._stream)
            event = torch.cuda.Event()
            event.record(self._stream)
        self._jobs.append((event, pinned, out))

    def _buffer(self, size: int) -> torch.Tensor:
        if not self._free and self._made >= self._buffers:
            self._settle()
        if self._free:
            return self._free.pop()
        self._made += 1
        return torch.empty(max(size, _BUFFER), dtype=torch.int8, device="cpu", pin_memory=True)

    def _settle(self) -> None:
        event, pinned, out = self._jobs.popleft()
        event.synchronize()
        out.copy_(pinned[: out.numel()])
        self._free.append(pinned)

    def finish(self) -> None:
        """Wait until everything is in place. The pinned memory goes back to torch's cache of it."""
        while self._jobs:
            self._settle()
        self._free.clear()
        self._made = 0


def copy_to_host(data: torch.Tensor, staging_bytes: int = 64 << 20) -> torch.Tensor:
    """All of `data` (int8, one row), in ordinary host memory."""
    out = torch.empty(data.numel(), dtype=torch.int8, device="cpu")
    copier = CopyOut(data.device, staging_bytes)
    index = torch.arange(-(-data.numel() // _BUFFER), device=data.device)
    copier.put(data, _BUFFER, index, out)
    copier.finish()
    return out
