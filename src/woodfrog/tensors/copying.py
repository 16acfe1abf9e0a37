"""Bytes on their way between the host and a device, through pinned buffers, while both go on working.

Out: the copy that must be of this moment is made on the device, on the caller's stream; from there the bytes leave on a
stream of their own. Copying aside first and letting it leave while work goes on is after Lee et al., "GPU Snapshot:
Checkpoint Offloading for GPU-Dense Systems" (2019).

In: threads fill buffers from ordinary memory, and each is sent when it is full, while others are being filled.

Devices without streams, and the CPU, get plain copies.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field

import torch

from woodfrog.tensors import link as links
from woodfrog.tensors.link import Event, Link

__all__ = ["Arena", "CopyIn", "CopyOut", "copy_to_host"]

_BUFFER = 16 << 20
_SLOT = 8 << 20
_ALIGN = 64


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
        self._jobs: deque[tuple[Event, torch.Tensor, torch.Tensor]] = deque()
        self._link = links.find(device)

    def put(self, data: torch.Tensor, width: int, index: torch.Tensor, out: torch.Tensor) -> None:
        """Copy the blocks `index` of `data` (int8, one row), `width` bytes each, one after the other into `out`."""
        full = data.numel() // width
        blocks = data[: full * width].view(full, width)
        whole, tail = index, data[full * width :]
        if tail.numel() and index.numel() and int(index[-1]) == full:
            whole = index[:-1]
            self._copy(tail.clone(), out[whole.numel() * width :])
        if self._device.type == "cpu" and self._link is None:
            torch.index_select(blocks, 0, whole, out=out[: whole.numel() * width].view(-1, width))
            return
        step = max(1, _BUFFER // width)
        for at in range(0, whole.numel(), step):
            some = whole[at : at + step]
            self._copy(blocks[some].view(-1), out[at * width : (at + some.numel()) * width])

    def _copy(self, source: torch.Tensor, out: torch.Tensor) -> None:
        """`source` is a copy that nothing writes to any more."""
        if self._link is None:
            out.copy_(source)
            return
        pinned = self._buffer(self._link, source.numel())
        self._jobs.append((self._link.copy([(source, pinned[: source.numel()])]), pinned, out))

    def _buffer(self, link: Link, size: int) -> torch.Tensor:
        if not self._free and self._made >= self._buffers:
            self._settle()
        if self._free:
            return self._free.pop()
        self._made += 1
        return link.pinned(max(size, _BUFFER))

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
    """All of `data` (int8, one row), in ordinary host memory. With no room for one buffer it is a plain copy."""
    out = torch.empty(data.numel(), dtype=torch.int8, device="cpu")
    if staging_bytes < _BUFFER:
        return out.copy_(data)
    copier = CopyOut(data.device, staging_bytes)
    index = torch.arange(-(-data.numel() // _BUFFER), device=data.device)
    copier.put(data, _BUFFER, index, out)
    copier.finish()
    return out


@dataclass(frozen=True)
class Arena:
    """Pinned buffers to send from, and threads that fill them. No buffers: plain copies."""

    buffer_bytes: int
    buffers: int
    fillers: int

    @classmethod
    def of(cls, staging_bytes: int, nbytes: int) -> Arena:
        """What to send `nbytes` through.

        Locking a page is taken to cost about what copying it plainly does, so that a buffer is worth it only if it is
        filled several times: no more than a quarter is pinned, and fewer than two buffers are none. A buffer is large
        enough for a transfer's start not to count, and small enough that the first is soon on its way. Two more than
        are filled at once keep the device busy; threads beyond the cores help while they wait for pages.
        """
        buffers = min(staging_bytes, nbytes // 4) // _SLOT
        if buffers < 2:
            return cls(_SLOT, 0, 0)
        return cls(_SLOT, buffers, min(max(1, buffers - 2), max(4, len(os.sched_getaffinity(0)))))


@dataclass
class _Whole:
    """One memory on its way: how much of it is not in place yet."""

    left: int
    arrived: Callable[[], object]

    def came(self, nbytes: int) -> None:
        self.left -= nbytes
        if not self.left:
            self.arrived()


@dataclass(frozen=True)
class _Piece:
    source: torch.Tensor
    target: torch.Tensor
    offset: int
    whole: _Whole


@dataclass
class _Batch:
    """What one buffer carries: part of a large memory, or many small ones."""

    device: torch.device
    link: Link
    pieces: list[_Piece] = field(default_factory=list)
    size: int = 0


class CopyIn:
    """Copies from ordinary host memory to devices. To be closed after use: then there are no threads and no pinned
    memory.

    Memories go in the order in which they are `put`, large ones in several buffers, small ones together in one. Each
    small one is still a transfer of its own (they are begun without waiting): sending a buffer whole would take room on
    a device that may have none left.

    Where no memory can be pinned, or no thread started, it goes on with plain copies, and says so in `warnings`.
    """

    def __init__(self, arena: Arena) -> None:
        self.warnings: list[str] = []
        self._arena = arena
        self._most = arena.buffers
        self._made = 0
        self._free: list[torch.Tensor] = []
        self._links: dict[torch.device, Link] = {}
        self._batch: _Batch | None = None
        self._filling: dict[Future[None], tuple[torch.Tensor, _Batch]] = {}
        self._flying: deque[tuple[Event, torch.Tensor, _Batch]] = deque()
        self._pool = ThreadPoolExecutor(max(1, arena.fillers), "woodfrog-fill")

    def put(self, source: torch.Tensor, target: torch.Tensor, arrived: Callable[[], object]) -> None:
        """Copy `source`, on the host, to `target`, both int8 in one row. May wait until some of what was put is there.

        Args:
            arrived: called by a later call of this object, when all of it is in place. Until then `source` and
                `target` are not to be touched.

        Raises:
            RuntimeError: of torch: this, or something put before, did not arrive. `finish` brings the others.
        """
        link = self._link(target.device)
        if link is None or not source.numel():
            target.copy_(source)
            arrived()
            return
        whole = _Whole(source.numel(), arrived)
        at = 0
        while at < source.numel():
            if self._batch is not None and self._batch.device != target.device:
                self._dispatch()
            if self._batch is None:
                self._batch = _Batch(target.device, link)
            batch = self._batch
            end = min(source.numel(), at + self._arena.buffer_bytes - batch.size)
            batch.pieces.append(_Piece(source[at:end], target[at:end], batch.size, whole))
            batch.size += -(-(end - at) // _ALIGN) * _ALIGN
            if batch.size >= self._arena.buffer_bytes:
                self._dispatch()
            at = end

    def finish(self) -> None:
        """Wait until everything that was put is in place.

        Raises:
            RuntimeError: as `put`.
        """
        self._dispatch()
        while self._filling or self._flying:
            self._advance()

    def close(self) -> None:
        """Let go of everything. When this returns nobody writes to a device any more; what is not there by then does
        not come."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        for link in self._links.values():
            with suppress(RuntimeError):
                link.synchronize()
        self._batch = None
        self._filling.clear()
        self._flying.clear()
        self._free.clear()
        if self._links:
            links.free_pinned()

    def _link(self, device: torch.device) -> Link | None:
        if not self._most:
            return None
        if device not in self._links:
            found = links.find(device)
            if found is None:
                return None
            self._links[device] = found
        return self._links[device]

    def _dispatch(self) -> None:
        """Have the batch filled into a buffer; where there is none, copy it plainly."""
        batch, self._batch = self._batch, None
        if batch is None:
            return
        buffer = self._buffer(batch.link)
        if buffer is not None:
            try:
                future = self._pool.submit(_fill, buffer, batch)
            except RuntimeError as e:
                # A thread that there is already may fill it even so: the buffer is not used again.
                self._most = 0
                self.warnings.append(f"copied without pinned buffers: {e}")
            else:
                self._filling[future] = (buffer, batch)
                return
        for piece in batch.pieces:
            piece.target.copy_(piece.source)
            piece.whole.came(piece.source.numel())

    def _buffer(self, link: Link) -> torch.Tensor | None:
        """One is pinned only when all others are in use, so that the first are filled and sent meanwhile."""
        self._send_filled()
        while not self._free:
            if self._made < self._most:
                try:
                    self._free.append(link.pinned(self._arena.buffer_bytes))
                    self._made += 1
                except (RuntimeError, MemoryError) as e:
                    self._most = self._made
                    reason = (str(e) or type(e).__name__).splitlines()[0]
                    some = f"with {self._made} of {self._arena.buffers}" if self._made else "without"
                    self.warnings.append(f"copied {some} pinned buffers: {reason}")
            elif self._most and (self._filling or self._flying):
                self._advance()
            else:
                return None
        return self._free.pop()

    def _advance(self) -> None:
        """Wait until something is nearer. A transfer is waited for first: it ends soon, while filling may wait for
        pages that are not here yet."""
        self._send_filled()
        if self._flying:
            event, buffer, batch = self._flying.popleft()
            event.synchronize()
            self._free.append(buffer)
            for piece in batch.pieces:
                piece.whole.came(piece.source.numel())
        else:
            wait(self._filling, return_when=FIRST_COMPLETED)

    def _send_filled(self) -> None:
        for future in [future for future in self._filling if future.done()]:
            buffer, batch = self._filling.pop(future)
            future.result()
            pairs = [(buffer[p.offset : p.offset + p.source.numel()], p.target) for p in batch.pieces]
            self._flying.append((batch.link.copy(pairs), buffer, batch))


def _fill(buffer: torch.Tensor, batch: _Batch) -> None:
    """In a thread. Not `copy_`, with which torch would start threads of its own below each of these; nor a memoryview,
    which keeps all other threads of Python waiting meanwhile."""
    start = buffer.data_ptr()
    for piece in batch.pieces:
        ctypes.memmove(start + piece.offset, piece.source.data_ptr(), piece.source.numel())
