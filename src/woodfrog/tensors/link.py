"""The way between the host and a device that has streams: pinned memory, and copies that go by themselves.

All of `copying` that only such a device has is here, so that tests can put another in its place.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch

__all__ = ["Event", "Link", "find", "free_pinned"]


class Event(Protocol):
    def synchronize(self) -> None:
        """Wait until what was sent before it is there. Raises RuntimeError of the device."""


class Link(Protocol):
    def pinned(self, nbytes: int) -> torch.Tensor:
        """Host memory (int8, one row) that the device reads and writes by itself. RuntimeError: there is none."""

    def copy(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Event:
        """Begin to copy (from, to) each, after what the caller's stream was given so far.

        Device memory that is copied from may be let go of at once; pinned memory is to be left alone until the event.
        """

    def synchronize(self) -> None:
        """Wait for all copies that were begun."""


class Cuda:
    """CUDA, and ROCm by the same names."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def pinned(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.int8, device="cpu", pin_memory=True)

    def copy(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Event:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        # Who waits for it sleeps: the cores are wanted for filling buffers.
        event = torch.cuda.Event(blocking=True)
        with torch.cuda.stream(self._stream):
            for source, target in pairs:
                target.copy_(source, non_blocking=True)
                if source.device.type != "cpu":
                    source.record_stream(self._stream)
            event.record(self._stream)
        return event  # type: ignore[no-any-return]

    def synchronize(self) -> None:
        self._stream.synchronize()


def find(device: torch.device) -> Link | None:
    """None: it has no streams that are known here, and is copied to and from plainly."""
    return Cuda(device) if device.type == "cuda" else None


def free_pinned() -> None:
    """Have torch give back the pinned memory that it keeps for later."""
    empty: Any = getattr(torch._C, "_host_emptyCache", None)
    if empty is not None and torch.cuda.is_initialized():
        empty()
