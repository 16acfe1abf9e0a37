"""A GPU that is hidden until after the restore, and seen then. docs/gpu.md ("In the process") is the user's view.

A library that looks for a GPU before the snapshot keeps the answer, some of them where nothing in the process can
reach it: torch's C++ part and the CUDA runtime count devices once in a process's life. So the hidden GPU is kept from
them twice: variables that the drivers and torch's own counting go by, and a `Shield` before torch's C functions, so
that these never run. What Python code keeps is found before the freeze (`Answers.find`), where time does not matter,
and dropped after the restore (`Answers.forget`): some microseconds.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

__all__ = ["HIDDEN", "Answers", "Shield", "hidden"]

HIDDEN = {
    "CUDA_VISIBLE_DEVICES": "",
    "HIP_VISIBLE_DEVICES": "",
    "ROCR_VISIBLE_DEVICES": "",
    # torch then answers is_available() from this list and never initialises CUDA, which would cache "none" for good.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    # JAX starts every plugin at its first look, and the CUDA one counts devices once in a process's life.
    "JAX_PLATFORMS": "cpu",
}
_GIVEN = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
"""One of them names the GPUs that a function was given."""

# Whose caches are looked through. A program's own caches are its own.
_LIBRARIES = frozenset(
    (
        "accelerate",
        "deepspeed",
        "diffusers",
        "flash_attn",
        "flashinfer",
        "peft",
        "sentence_transformers",
        "sglang",
        "torch",
        "torchao",
        "torchaudio",
        "torchvision",
        "transformers",
        "triton",
        "vllm",
        "xformers",
    )
)
_WORDS = (
    *("accelerator", "bf16", "big_gpu", "capability", "cublas", "cuda", "cudnn", "cutlass", "device", "dram", "dsl"),
    *("flash", "fp8", "get_system", "gpu", "hip", "nccl", "nvml", "rocm", "sdpa", "tf32", "tflops", "triton", "xpu"),
)
"""A cache in these libraries is dropped when its function's name, or a name that it uses, has one of these in it. Not
the others: whether a package is installed stays as it is, and is dear to find out again."""


def hidden() -> dict[str, str]:
    """The variables that hide the GPU in this process; `sys.path` must be the program's already."""
    from importlib.util import find_spec

    found = dict(HIDDEN)
    try:
        # What xformers imports is decided by its first look at the GPU; with this it does not look.
        if find_spec("xformers") is not None and find_spec("triton") is not None:
            found["XFORMERS_ENABLE_TRITON"] = "1"
    except (ImportError, ValueError):
        pass
    return found


class Shield:
    """Stands before torch's C functions that count or initialise GPUs, from torch's import on, until it is taken down.

    What it answers is what they answer where there is no GPU: none to count, RuntimeError on initialising.
    """

    _COUNTS = ("_cuda_getDeviceCount", "_xpu_getDeviceCount")
    _STARTS = ("_cuda_init", "_xpu_init")

    def __init__(self) -> None:
        self._real: dict[str, Any] = {}
        self._looking = False

    def raise_(self) -> None:
        """Put it up: now, if torch is there, else when torch is imported."""
        if "torch.cuda" in sys.modules:
            self._put()
        elif not self._looking:
            self._looking = True
            sys.meta_path.insert(0, self)

    def take_down(self) -> None:
        """Give torch its functions back."""
        self._stop_looking()
        core: Any = sys.modules.get("torch._C")
        for name, real in self._real.items():
            setattr(core, name, real)
        self._real.clear()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Finds nothing; torch.cuda is imported right after torch's C part."""
        if name == "torch.cuda":
            self._stop_looking()
            self._put()

    def _stop_looking(self) -> None:
        if self._looking:
            self._looking = False
            # Not remove(): by equality, which a finder of the user's may have its own idea of.
            sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]

    def _put(self) -> None:
        core: Any = sys.modules.get("torch._C")
        for names, stand_in in ((self._COUNTS, _none), (self._STARTS, _refuse)):
            for name in names:
                real = getattr(core, name, None)
                # A build without CUDA has none of these, and libraries tell such builds by that.
                if real is not None and name not in self._real:
                    self._real[name] = real
                    setattr(core, name, stand_in)


def _none() -> int:
    return 0


def _refuse() -> None:
    raise RuntimeError("No CUDA GPUs are available: the GPU is hidden until after the snapshot")


class Answers:
    """What libraries in this process keep of having seen no GPU."""

    def __init__(self) -> None:
        self._caches: list[Any] = []
        self._cells: list[Any] = []
        self._looked = False

    def find(self) -> None:
        """Find the caches that hold something; to be called when no more of the user's code will run."""
        self._caches, self._cells, self._looked = [], [], True
        if not _loaded():
            return
        import gc
        from functools import _lru_cache_wrapper

        # Objects that the program keeps from the collector are not shown by it.
        kept = gc.get_freeze_count() > 0
        if kept:
            gc.unfreeze()
        objects = gc.get_objects()
        if kept:
            gc.freeze()
        for found in objects:
            if (
                type(found) is _lru_cache_wrapper
                and (found.__module__ or "").partition(".")[0] in _LIBRARIES
                and found.cache_info().currsize
                and _about_devices(found)
            ):
                self._caches.append(found)
        self._cells = list(_once_cells())

    def forget(self) -> list[str]:
        """Drop them; warnings about what cannot be put right, where there is a GPU now. Nothing is done where no such
        library was imported."""
        warnings: list[str] = []
        if not _loaded():
            return warnings
        try:
            if not self._looked:  # there was no freeze
                self.find()
            for cache in self._caches:
                cache.cache_clear()
            for cell in self._cells:
                cell.cell_contents = None
        except Exception as e:
            warnings.append(f"gpu: cached answers from before the restore could not be cleared: {e}")
        for name, forget in _BY_LIBRARY.items():
            module = sys.modules.get(name)
            if module is None:
                continue
            try:
                warning = forget(module)
            except Exception as e:
                warning = f"{type(e).__name__}: {e}"
            if warning:
                warnings.append(f"gpu: {name.partition('.')[0]}: {warning}")
        return warnings if any(os.environ.get(name) for name in _GIVEN) else []


def _about_devices(cache: Any) -> bool:
    names = [cache.__qualname__]
    function = cache
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    names += getattr(getattr(function, "__code__", None), "co_names", ())
    return any(word in name.lower() for name in names for word in _WORDS)


def _loaded() -> bool:
    return not sys.modules.keys().isdisjoint(("torch", "tensorflow", "jax"))


def _once_cells() -> Iterator[Any]:
    """Where xformers keeps the answers of functions that it calls once: in a closure, under the name `value`.

    Only a yes or no: it keeps what may be made once only in the same way (its namespace of torch operators).
    """
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != "xformers":
            continue
        for function in list(vars(module).values()):
            code, closure = getattr(function, "__code__", None), getattr(function, "__closure__", None)
            if code is not None and closure and set(code.co_freevars) == {"func", "value"}:
                cell = closure[code.co_freevars.index("value")]
                if type(cell.cell_contents) is bool:
                    yield cell


_LATER = "import it in enter(snap=False)"


def _torch(cuda: Any) -> str | None:
    if hasattr(cuda, "_cached_device_count") and not cuda.is_initialized():
        cuda._cached_device_count = None
    return None


def _dynamo(interface: Any) -> str | None:
    # Devices are registered by number once, at the first look: with none there, none can be compiled for.
    if hasattr(interface, "_device_initialized"):
        interface._device_initialized = False
    for kept in ("caching_worker_device_properties", "caching_worker_current_devices"):
        for device in ("cuda", "xpu"):
            getattr(interface, kept, {}).pop(device, None)
    return None


def _deepspeed(module: Any) -> str | None:
    chosen = getattr(module, "ds_accelerator", None)
    if chosen is None or getattr(chosen, "_name", "") != "cpu":
        return None
    module.ds_accelerator = None
    return "it took the CPU for its accelerator when it was imported, and parts of it keep to that; " + _LATER


def _accelerate(module: Any) -> str | None:
    shared = getattr(getattr(module, "PartialState", None), "_shared_state", None) or {}
    if str(shared.get("device", "")).partition(":")[0] == "cpu":
        return "an Accelerator made before the snapshot stays on the CPU; make it in enter(snap=False)"
    return None


def _bitsandbytes(module: Any) -> str | None:
    return f"it chose its library for the CPU when it was imported; {_LATER}"


def _vllm(platforms: Any) -> str | None:
    if getattr(getattr(platforms, "_current_platform", None), "device_type", None) in ("", "cpu"):
        return f"it chose its platform when it was imported, and saw no GPU; {_LATER}"
    return None


def _sglang(module: Any) -> str | None:
    return f"its modules looked for a GPU when they were imported; {_LATER}"


def _tensorflow(module: Any) -> str | None:
    context = getattr(module, "_context", None)
    if context is None or getattr(context, "_physical_devices", None) is None:
        return None
    built = getattr(sys.modules.get("tensorflow.python.platform.build_info"), "build_info", None)
    if built is not None and not (built.get("is_cuda_build") or built.get("is_rocm_build")):
        return None
    # Its C++ part has counted, which it does once in a process's life.
    return "it looked for devices before the snapshot, and finds no others; use it in enter(snap=False) first"


def _jax(bridge: Any) -> str | None:
    config = getattr(sys.modules.get("jax"), "config", None)
    if config is not None:
        config.update("jax_platforms", os.environ.get("JAX_PLATFORMS") or None)
    # Its list of backends is made whole at the first look; arrays that exist belong to the old one.
    if getattr(bridge, "_backends", None) and not {"cuda", "rocm", "gpu"} & set(bridge._backends):
        return "it chose its devices before the snapshot; call jax.extend.backend.clear_backends() in enter(snap=False)"
    return None


_BY_LIBRARY = {
    "torch.cuda": _torch,
    "torch._dynamo.device_interface": _dynamo,
    "deepspeed.accelerator.real_accelerator": _deepspeed,
    "accelerate.state": _accelerate,
    "bitsandbytes.cextension": _bitsandbytes,
    "tensorflow.python.eager.context": _tensorflow,
    "jax._src.xla_bridge": _jax,
    "vllm.platforms": _vllm,
    "sglang.srt.utils": _sglang,
}
