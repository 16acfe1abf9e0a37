"""The daemon's side of the helper process: every call of the driver ends, well or badly, within a bound."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from woodfrog.cuda.devices import Node, node_from_dict
from woodfrog.cuda.failures import gpu_error
from woodfrog.cuda.health import Vitals
from woodfrog.cuda.states import Move, State
from woodfrog.errors import error_from_dict

__all__ = ["Cuda"]

START_S = 60.0
END_S = 5.0
ASK_S = 10.0
LOCK_S = 10.0
"""How long the GPU's work may take to end before a checkpoint."""
LOCK_GRACE_S = 5.0
"""How much longer the driver may take to say that it did not."""
VITALS_S = 5.0
MOVE_S = 30.0
BYTES_PER_S = 5e8
"""The slowest way between device and host memory that is waited for."""


class _Helper:
    """One helper process and the calls it works on."""

    def __init__(self, process: Process, on_xid: Callable[[str, int], None]) -> None:
        self.process = process
        self.waiting: dict[int, asyncio.Future[Any]] = {}
        self.retired = False
        self.reader: asyncio.Task[None] | None = None
        self.on_xid = on_xid

    async def read(self) -> None:
        assert self.process.stdout is not None
        with contextlib.suppress(ValueError, OSError):
            while line := await self.process.stdout.readline():
                answer = json.loads(line)
                if "xid" in answer:
                    self.on_xid(str(answer["uuid"]), int(answer["xid"]))
                    continue
                future = self.waiting.get(answer["id"])
                if future is None or future.done():
                    continue
                if "error" in answer:
                    future.set_exception(error_from_dict(answer["error"]))
                else:
                    future.set_result(answer["value"])
        self.retired = True
        for future in self.waiting.values():
            if not future.done():
                future.set_exception(gpu_error("gpu-helper-lost", "GPU helper"))

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()


class Cuda:
    """Calls of the driver, made by one warm helper process, which is started anew when one does not return.

    Args:
        library: directory with libcuda.so.1 where the loader does not find it by itself.
        lock_s, move_s, ask_s, vitals_s: bounds of the calls, in seconds; by size on top for those that move memory.
        context_bytes: what a process has of a GPU beside what it allocated, which need not be saved.

    Example:
        cuda = Cuda()
        node = await cuda.start()
        await cuda.move(pid, "lock")
    """

    def __init__(
        self,
        *,
        library: Path | None = None,
        start_s: float = START_S,
        ask_s: float = ASK_S,
        vitals_s: float = VITALS_S,
        lock_s: float = LOCK_S,
        move_s: float = MOVE_S,
        context_bytes: int = 1 << 30,
    ) -> None:
        self._library = library
        self._start_s = start_s
        self._ask_s = ask_s
        self._vitals_s = vitals_s
        self._lock_s = lock_s
        self._move_s = move_s
        self.context_bytes = context_bytes
        self._helper: _Helper | None = None
        self._all: set[_Helper] = set()
        self._endings: set[asyncio.Task[None]] = set()
        self._starting = asyncio.Lock()
        self._last = 0
        self.node: Node | None = None
        """What the helper found; None before `start`."""
        self.on_xid: Callable[[str, int], None] = lambda uuid, xid: None
        """Told of each Xid error that the driver reports, by the GPU's uuid and number."""

    async def start(self) -> Node:
        """Have a helper, and know the GPUs of this machine.

        Raises:
            GpuError: there is no driver, it is too old, or `cuInit` failed or hung.
        """
        await self._running()
        assert self.node is not None
        return self.node

    async def _running(self) -> _Helper:
        async with self._starting:
            if self._helper is not None and not self._helper.retired:
                return self._helper
            env = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
            env["PYTHONPATH"] = os.pathsep.join(
                filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")))
            )
            if self._library is not None:
                env["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, (str(self._library), env.get("LD_LIBRARY_PATH"))))
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", "woodfrog.cuda.helper", stdin=PIPE, stdout=PIPE, stderr=None, env=env,
                start_new_session=True,
            )  # fmt: skip
            helper = _Helper(process, lambda uuid, xid: self.on_xid(uuid, xid))
            self._all.add(helper)
            assert process.stdout is not None
            try:
                async with asyncio.timeout(self._start_s):
                    line = await process.stdout.readline()
            except TimeoutError:
                await self._end(helper)
                raise gpu_error("gpu-helper-hung", f"GPU helper: cuInit took over {self._start_s:.0f} s") from None
            except BaseException:
                await self._end(helper)
                raise
            hello = json.loads(line) if line else {}
            if "node" not in hello:
                await self._end(helper)
                if "error" in hello:
                    raise error_from_dict(hello["error"])
                raise gpu_error("gpu-helper-lost", "GPU helper: it ended at its start")
            self.node = node_from_dict(hello["node"])
            helper.reader = asyncio.get_running_loop().create_task(helper.read())
            self._helper = helper
            return helper

    async def _end(self, helper: _Helper) -> None:
        helper.retired = True
        helper.kill()
        self._all.discard(helper)
        assert helper.process.stdin is not None
        helper.process.stdin.close()
        # One that hangs inside the kernel cannot be killed: it goes when the driver lets it, and nobody waits for it.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_S):
                await helper.process.wait()
                if helper.reader is not None:
                    await asyncio.wait({helper.reader})

    async def _call(self, op: str, pid: int, limit: float, *, who: str = "", **arguments: Any) -> Any:
        helper = await self._running()
        who = who or f"process {pid}"
        self._last += 1
        number = self._last
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        helper.waiting[number] = future
        request = {"id": number, "op": op, "pid": pid, **arguments}
        hung = False
        try:
            assert helper.process.stdin is not None
            helper.process.stdin.write(json.dumps(request).encode() + b"\n")
            async with asyncio.timeout(limit):
                return await future
        except TimeoutError:
            hung = True
            raise gpu_error("gpu-helper-hung", f"{who}: {op} took over {limit:.0f} s", pid=pid, call=op) from None
        except (ConnectionError, RuntimeError) as e:
            helper.retired = True
            raise gpu_error("gpu-helper-lost", f"{who}: {op}: {e}", pid=pid, call=op) from None
        finally:
            del helper.waiting[number]
            if hung or not future.done():
                # The thread that hangs goes only with its process; calls of others in it may end first.
                helper.retired = True
            if helper.retired and not helper.waiting:
                ending = asyncio.get_running_loop().create_task(self._end(helper))
                self._endings.add(ending)
                ending.add_done_callback(self._endings.discard)

    async def state(self, pid: int) -> State | None:
        """Where a process (a pid of the host) stands; None = it is no CUDA process.

        Raises:
            GpuError: it cannot be known.
        """
        value = await self._call("state", pid, self._ask_s)
        return None if value is None else State(value)

    async def vitals(self, uuid: str) -> Vitals:
        """How a GPU is.

        Raises:
            GpuError: `gpu-helper-hung` when NVML does not say in time; the helper cannot be had.
        """
        return Vitals(**await self._call("vitals", 0, self._vitals_s, who=uuid, uuid=uuid))

    async def held(self, pid: int) -> int | None:
        """Bytes of GPU memory a process has; None = not known."""
        value = await self._call("held", pid, self._ask_s)
        return None if value is None else int(value)

    async def move(self, pid: int, move: Move, *, size: int = 0, pairs: Sequence[tuple[str, str]] = ()) -> State:
        """Bring a process one step on.

        Args:
            size: bytes that have to be moved for it.
            pairs: for "restore": `devices.device_map`.

        Raises:
            GpuError: `gpu-helper-hung` when it took too long; else what the driver said.
        """
        if move == "lock":
            limit = self._lock_s + LOCK_GRACE_S
            return State(await self._call(move, pid, limit, timeout_ms=max(1, int(self._lock_s * 1000))))
        limit = self._move_s + size / BYTES_PER_S
        return State(await self._call(move, pid, limit, pairs=[list(p) for p in pairs]))

    async def close(self) -> None:
        """End the helper; calls on their way fail."""
        for helper in list(self._all):
            await self._end(helper)
        if self._endings:
            await asyncio.wait(set(self._endings))
        self._helper = None
