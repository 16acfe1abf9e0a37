"""What libraries hold and need not travel, freed before the freeze and taken back after the restore.

Most of a GPU process's memory is not its program's: inference engines fill it with cache, torch's allocator keeps what
was freed. Each library that is there, in this process or as a server among its children, is asked to let go in its own
way. A hook that fails or does not end in time is named in a warning, and the freeze goes on without it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from woodfrog.worker import servers

__all__ = ["OPTIONS", "Shrinker", "device_use"]

OPTIONS: dict[str, Any] = {"torch": True, "vllm": 1, "sglang": False, "timeout_s": 60.0}
"""What `woodfrog.shrink_before_snapshot` changes; its docstring says what they mean."""

_LOOK_S = 5.0
"""For a look at a server: who has not answered by then speaks no HTTP."""
_TOGETHER_S = 90.0
"""All of them together; the freeze is given up when its hooks take longer than two minutes."""

Back = tuple[str, Callable[[], Any]]
"""What is to be done after the restore, and its name."""


@dataclass
class Shrinker:
    """Lets go before one freeze (`before`), and takes back after (`after`)."""

    options: dict[str, Any]
    """All of OPTIONS' keys."""
    phases: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    _back: list[Back] = field(default_factory=list)

    def before(self) -> None:
        """Let go of what need not travel. Never raises: what does not work is in `warnings`."""
        hooks: list[tuple[str, Callable[[], None]]] = []
        if self.options["vllm"] and "vllm" in sys.modules:
            hooks.append(("vllm", self._vllm))
        try:
            hooks += [(f"{s.kind}:{s.port}", self._server(s)) for s in servers.find() if self.options.get(s.kind)]
        except OSError as e:
            self.warnings.append(f"shrink servers: {e}")
        cuda = getattr(sys.modules.get("torch"), "cuda", None)
        if self.options["torch"] and cuda is not None and cuda.is_initialized():
            hooks.append(("torch", _torch))  # last: the others give memory back to torch's allocator
        ends = time.monotonic() + _TOGETHER_S
        for name, hook in hooks:
            self._bounded("shrink", name, hook, ends - time.monotonic())

    def after(self) -> None:
        """Take back what was let go, in reverse order; what does not work is in `warnings`."""
        back, self._back = self._back, []
        for name, hook in reversed(back):
            self._bounded("unshrink", name, hook, _TOGETHER_S)

    def _bounded(self, verb: str, name: str, hook: Callable[[], Any], left: float) -> None:
        # In a thread: nothing else ends a call into a library that hangs. It may go on later, and do no harm.
        import threading

        failure: list[BaseException] = []

        def run() -> None:
            try:
                hook()
            except BaseException as e:
                failure.append(e)

        begin, limit = time.perf_counter(), min(float(self.options["timeout_s"]), max(0.0, left))
        thread = threading.Thread(target=run, name=f"woodfrog-{verb}-{name}", daemon=True)
        thread.start()
        thread.join(limit)
        self.phases[f"{verb}.{name}"] = round((time.perf_counter() - begin) * 1e3, 3)
        if failure and isinstance(failure[0], servers.NotHttp):
            return  # no server, but a port that an engine listens on for itself
        if thread.is_alive():
            self.warnings.append(f"{verb} {name}: not done within {limit:g} s; going on without it")
        elif failure:
            self.warnings.append(f"{verb} {name}: {type(failure[0]).__name__}: {failure[0]}")

    def _vllm(self) -> None:
        """Engines in this process."""
        import gc

        kind = getattr(sys.modules["vllm"], "LLM", None)
        level = int(self.options["vllm"])
        if not isinstance(kind, type):
            return
        engines: list[Any] = [found for found in gc.get_objects() if isinstance(found, kind)]
        for engine in engines:
            inner = engine.llm_engine
            if not inner.model_config.enable_sleep_mode:
                self.warnings.append("shrink vllm: an engine has no enable_sleep_mode=True, and is left as it is")
            elif not inner.is_sleeping():  # else it is the program's to wake
                self._let_go("vllm", partial(engine.sleep, level=level), partial(_wake, engine, level))

    def _server(self, server: servers.Server) -> Callable[[], None]:
        return partial(self._vllm_server if server.kind == "vllm" else self._sglang_server, server)

    def _vllm_server(self, server: servers.Server) -> None:
        limit, level = float(self.options["timeout_s"]), int(self.options["vllm"])
        again = [("/wake_up", "")]
        if level >= 2:  # the weights are gone too, and are read again between
            reload = ("/collective_rpc", '{"method": "reload_weights"}')
            again = [("/wake_up?tags=weights", ""), reload, ("/wake_up?tags=kv_cache", "")]

        def take_back() -> None:
            for path, body in again:
                server.post(path, limit, body)

        if "true" in server.get("/is_sleeping", min(limit, _LOOK_S)):
            return  # the program put it to sleep, and wakes it
        hint = "it needs --enable-sleep-mode, VLLM_SERVER_DEV_MODE=1"
        self._let_go(f"vllm:{server.port}", partial(server.post, f"/sleep?level={level}", limit, hint=hint), take_back)

    def _sglang_server(self, server: servers.Server) -> None:
        limit = float(self.options["timeout_s"])
        look = min(limit, _LOOK_S)
        said = "".join((server.get("/server_info", look) or server.get("/get_server_info", look)).split())
        if '"enable_memory_saver":true' not in said:
            why = "does not say that it has --enable-memory-saver" if said else "gives no /server_info"
            raise OSError(f"it {why}; left as it is")
        body = "{}"
        if '"enable_weights_cpu_backup":true' not in said:
            # It would forget the weights, and answer from whatever lies in their memory.
            body = '{"tags": ["kv_cache"]}'
            self.warnings.append(
                f"shrink sglang:{server.port}: only its cache was let go: weights need --enable-weights-cpu-backup"
            )
        act = partial(server.post, "/release_memory_occupation", limit, body)
        self._let_go(f"sglang:{server.port}", act, partial(server.post, "/resume_memory_occupation", limit, body))

    def _let_go(self, name: str, act: Callable[[], Any], back: Callable[[], Any]) -> None:
        """Do `act`, to be undone by `back` unless it is certain that nothing was done: what does not answer in time may
        still do it, what fails may have done a part (vLLM takes no requests from then on), and neither must be left so.
        """
        entry = (name, back)
        self._back.append(entry)
        try:
            act()
        except servers.Refused as e:
            if e.status < 500:
                self._back.remove(entry)
            raise


def _wake(engine: Any, level: int) -> None:
    if level < 2:
        engine.wake_up()
        return
    engine.wake_up(tags=["weights"])
    engine.collective_rpc("reload_weights")
    engine.wake_up(tags=["kv_cache"])


def _torch() -> None:
    """torch's workspaces and the memory that its allocators keep for later, on every device."""
    import gc

    torch: Any = sys.modules["torch"]
    for device in range(torch.cuda.device_count()):
        torch.cuda.synchronize(device)
    gc.collect()
    for name in ("_cuda_clearCublasWorkspaces", "_host_emptyCache"):
        free = getattr(torch._C, name, None)
        if free is not None:
            free()
    torch.cuda.empty_cache()


def device_use() -> dict[str, int]:
    """What torch's memory on this process's GPUs is, in bytes; empty where it has none, or cannot tell.

    `weights`: parameters and buffers of modules; `tensors`: others; `graphs`: of CUDA graphs; `allocator cache`: what
    its allocator keeps for later. What else is on the GPU (contexts, other libraries) torch does not know.
    """
    torch: Any = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    if cuda is None or not cuda.is_initialized() or not hasattr(cuda, "memory_snapshot"):
        return {}
    used = kept = graphs = 0
    for segment in cuda.memory_snapshot():
        if tuple(segment.get("segment_pool_id", (0, 0))) != (0, 0):
            graphs += segment["total_size"]
        else:
            used += segment["allocated_size"]
            kept += segment["total_size"] - segment["allocated_size"]
    weights = min(_weights(torch), used)
    found = {"weights": weights, "tensors": used - weights, "graphs": graphs, "allocator cache": kept}
    return {name: size for name, size in found.items() if size}


def _weights(torch: Any) -> int:
    import gc

    storages: dict[int, int] = {}
    for module in gc.get_objects():
        if issubclass(type(module), torch.nn.Module):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if tensor.device.type == "cuda":
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
