"""Looks after the GPUs of this machine: what is not fit for use is set aside, and tried again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection
from typing import Any

from woodfrog.backends.gpus import Gpus
from woodfrog.cuda.client import Cuda
from woodfrog.cuda.failures import gpu_error
from woodfrog.cuda.health import FATAL_XIDS, Vitals, judge
from woodfrog.errors import GpuError

__all__ = ["Health"]

log = logging.getLogger("woodfrog")

XID_S = 600.0
"""How long a GPU is kept aside for an Xid error that NVML says nothing else of."""
AGAIN_S = 15.0
"""When one that was set aside is looked at again; after each look that finds it no better, in double the time."""
AGAIN_MOST_S = 300.0
LOOK_S = 20.0
"""How long one look may take, with the start of a helper where the one before hangs."""
FREEING_S = 1.0
"""How long the driver may take to free what a process had that has just ended."""


class Health:
    """Which GPUs are set aside.

    Args:
        held: the GPUs that running instances have; what is in use of them is theirs.
        tell: called with all that are set aside, and why, whenever that changes.
        free_percent: how much of a GPU's memory must be free.
    """

    def __init__(
        self,
        gpus: Gpus,
        *,
        held: Callable[[], set[str]],
        tell: Callable[[dict[str, str]], None],
        free_percent: int,
        again_s: float = AGAIN_S,
    ) -> None:
        self._gpus = gpus
        self._held = held
        self._tell = tell
        self._free_percent = free_percent
        self._again_s = again_s
        self._xids: dict[str, dict[int, float]] = {}
        self._seen: dict[str, Vitals] = {}
        self._again: asyncio.Task[None] | None = None
        self._published: dict[str, str] = {}
        self.sick: dict[str, str] = {}
        """Those set aside, and why."""
        if gpus.cuda is not None:
            gpus.cuda.on_xid = self._on_xid

    async def before_use(self, uuids: Collection[str], *, within: float = LOOK_S) -> GpuError | None:
        """Look at GPUs that an instance is to have; why it cannot have them.

        Args:
            within: seconds after which one that has not answered is set aside.
        """
        deadline = time.monotonic() + FREEING_S
        wanted = set(uuids)
        if wanted & self.sick.keys():
            wanted |= self.sick.keys()  # nothing else was left: another of them may be well again
        while True:
            await self._look(wanted, own=uuids, within=within)
            if not any(self._is_full(u) for u in uuids) or time.monotonic() > deadline:
                break
            await asyncio.sleep(0.1)
            wanted = set(uuids)
        self._publish()
        refused = [u for u in uuids if u in self.sick]
        if not refused:
            return None
        named = {d.uuid: d.name for d in self._gpus.devices}
        # Others that would do may be set aside too: who reads this wants to know of all.
        about = "; ".join(f"{named.get(u, '?')} {u}: {why}" for u, why in self.sick.items())
        return gpu_error("gpu-set-aside", about, gpus=dict(self.sick))

    async def check(self) -> None:
        """Look at all of them now. Xid errors seen before are forgotten."""
        self._xids.clear()
        await self._look({d.uuid for d in self._gpus.devices})
        self._publish()

    def view(self) -> list[dict[str, Any]]:
        """Plain facts of each GPU, as they were when it was looked at last."""
        return [
            {
                "gpu": device.uuid,
                "chip": device.name,
                "memory_bytes": device.memory,
                "used_bytes": self._seen[device.uuid].used if device.uuid in self._seen else None,
                "why": self.sick.get(device.uuid, ""),
                "xids": sorted(self._xids.get(device.uuid, {})),
            }
            for device in self._gpus.devices
        ]

    def _is_full(self, uuid: str) -> bool:
        """Whether only the memory that is in use is wrong with it."""
        return uuid in self.sick and not judge(self._seen.get(uuid, Vitals(lost=True)), self._recent(uuid))

    def _recent(self, uuid: str) -> list[int]:
        now = time.monotonic()
        return [xid for xid, at in self._xids.get(uuid, {}).items() if now - at < XID_S]

    def _on_xid(self, uuid: str, xid: int) -> None:
        self._xids.setdefault(uuid, {})[xid] = time.monotonic()
        log.warning("GPU %s: the driver reports Xid %d", uuid, xid)
        if xid in FATAL_XIDS:
            self._judge(uuid, self._seen.get(uuid, Vitals()), held=True)
            self._publish()

    async def _look(self, uuids: Collection[str], own: Collection[str] = (), within: float = LOOK_S) -> None:
        """`own`: of an instance that uses nothing of them yet."""
        await asyncio.gather(*(self._look_at(u, own, within) for u in uuids))

    async def _look_at(self, uuid: str, own: Collection[str], within: float) -> None:
        if self._gpus.cuda is None:
            return
        try:
            async with asyncio.timeout(within):
                vitals = await self._ask(self._gpus.cuda, uuid)
        except (GpuError, TimeoutError) as e:
            # The driver cannot even say how it is: nothing started on it would come up.
            self._seen.pop(uuid, None)
            late = gpu_error("gpu-helper-hung", f"no answer within {within:.0f} s")
            self._put(uuid, e.message if isinstance(e, GpuError) else late.message)
            return
        self._seen[uuid] = vitals
        self._judge(uuid, vitals, held=uuid not in own and uuid in self._held())

    @staticmethod
    async def _ask(cuda: Cuda, uuid: str) -> Vitals:
        try:
            return await cuda.vitals(uuid)
        except GpuError as e:
            if e.code != "gpu-helper-lost":
                raise
            return await cuda.vitals(uuid)  # it went for a reason of its own

    def _judge(self, uuid: str, vitals: Vitals, *, held: bool) -> None:
        self._put(uuid, judge(vitals, self._recent(uuid), free_percent=0 if held else self._free_percent))

    def _put(self, uuid: str, why: str) -> None:
        if why:
            self.sick[uuid] = why
        else:
            self.sick.pop(uuid, None)

    def _publish(self) -> None:
        """Say what changed: in the log when one comes or goes, to whoever gives them out always."""
        before, self._published = self._published, dict(self.sick)
        for uuid in sorted(self.sick.keys() - before.keys()):
            log.warning("GPU %s is set aside: %s", uuid, self.sick[uuid])
        for uuid in sorted(before.keys() - self.sick.keys()):
            log.info("GPU %s is used again", uuid)
        if before != self.sick:
            self._tell(dict(self.sick))
        if self.sick and self._again is None:
            self._again = asyncio.get_running_loop().create_task(self._look_again())

    async def _look_again(self) -> None:
        pause = self._again_s
        while self.sick:
            await asyncio.sleep(pause)
            before = set(self.sick)
            await self._look(before)
            self._publish()
            pause = min(2 * pause, AGAIN_MOST_S) if before <= self.sick.keys() else self._again_s
        self._again = None

    async def close(self) -> None:
        again, self._again = self._again, None
        if again is not None:
            again.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await again
