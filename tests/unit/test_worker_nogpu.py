"""What libraries keep of having seen no GPU. With torch: tests/integration/test_worker_gpu.py."""

from __future__ import annotations

import functools
import importlib.util
import sys
import time
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from woodfrog.worker import nogpu


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A stand-in for torch, so that its libraries are looked at."""
    for name in ("torch", "torch.cuda", "torch._C"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["torch.cuda"].is_initialized = lambda: False  # type: ignore[attr-defined]
    return sys.modules["torch._C"]


def module(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(contents)
    monkeypatch.setitem(sys.modules, name, made)
    return made


def test_nothing_is_done_without_such_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch", "tensorflow", "jax"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    answers = nogpu.Answers()
    begin = time.perf_counter()
    answers.find()
    assert answers.forget() == [] and time.perf_counter() - begin < 0.01


def test_full_caches_about_devices_are_dropped_and_no_others(torch: ModuleType) -> None:
    def made(name: str, uses: str, module: str = "transformers.utils") -> Any:
        scope: dict[str, Any] = {}
        exec(f"def {name}():\n    return {uses}", {"len": len, "has_cuda": lambda: False}, scope)
        scope[name].__module__ = module
        scope[name].__qualname__ = name
        cache = functools.lru_cache(scope[name])
        cache()
        return cache

    asked = made("pick", "has_cuda()")
    named = made("get_gpu_type", "1")
    package = made("is_tokenizers_available", "len('')")
    own = made("my_device", "2", "program")
    answers = nogpu.Answers()
    answers.find()
    assert answers.forget() == []
    assert [c.cache_info().currsize for c in (asked, named, package, own)] == [0, 0, 1, 1]


def test_the_shield_waits_for_torch_and_comes_down(torch: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._cuda_getDeviceCount = count = lambda: 4  # type: ignore[attr-defined]
    torch._cuda_init = start = lambda: None  # type: ignore[attr-defined]
    monkeypatch.delitem(sys.modules, "torch.cuda")
    shield, finders = nogpu.Shield(), list(sys.meta_path)
    shield.raise_()
    assert sys.meta_path[0] is shield and torch._cuda_getDeviceCount is count
    assert importlib.util.find_spec("json") is not None  # others are found as ever
    assert shield.find_spec("torch.cuda") is None
    assert sys.meta_path == finders
    assert torch._cuda_getDeviceCount() == 0 and not hasattr(torch, "_xpu_init")
    with pytest.raises(RuntimeError, match="hidden until after the snapshot"):
        torch._cuda_init()
    shield.raise_()
    shield.take_down()
    assert torch._cuda_getDeviceCount is count and torch._cuda_init is start
    assert sys.meta_path == finders


def test_xformers_is_told_not_to_look_where_triton_is(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"xformers", "triton"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in there or None)
    assert nogpu.hidden()["XFORMERS_ENABLE_TRITON"] == "1" and nogpu.hidden()["CUDA_VISIBLE_DEVICES"] == ""
    there.remove("triton")
    assert "XFORMERS_ENABLE_TRITON" not in nogpu.hidden()


@pytest.mark.parametrize(
    ("name", "contents", "said"),
    [
        ("bitsandbytes.cextension", {}, "gpu: bitsandbytes: it chose its library for the CPU"),
        ("accelerate.state", {"PartialState": SimpleNamespace(_shared_state={"device": "cpu"})}, "stays on the CPU"),
        ("accelerate.state", {"PartialState": SimpleNamespace(_shared_state={})}, None),
        ("jax._src.xla_bridge", {"_backends": {"cpu": 1}}, "clear_backends()"),
        ("jax._src.xla_bridge", {"_backends": {"cpu": 1, "cuda": 2}}, None),
        ("jax._src.xla_bridge", {"_backends": {}}, None),
        (
            "tensorflow.python.eager.context",
            {"_context": SimpleNamespace(_physical_devices=["cpu"], _context_handle=None)},
            "it looked for devices before the snapshot",
        ),
        ("tensorflow.python.eager.context", {"_context": SimpleNamespace(_physical_devices=None)}, None),
        ("vllm.platforms", {"_current_platform": None}, None),
        ("vllm.platforms", {"_current_platform": SimpleNamespace(device_type="cuda")}, None),
        ("vllm.platforms", {"_current_platform": SimpleNamespace(device_type="")}, "gpu: vllm: it chose its platform"),
        ("sglang.srt.utils", {}, "gpu: sglang: its modules looked"),
        ("tensorflow.python.eager.context", {"_context": None}, None),
        ("torch._dynamo.device_interface", {"caching_worker_device_properties": 5}, "gpu: torch: AttributeError"),
    ],
)
def test_what_cannot_be_put_right_is_named(
    torch: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str, contents: dict[str, Any], said: str | None
) -> None:
    for library in list(nogpu._BY_LIBRARY):
        monkeypatch.delitem(sys.modules, library, raising=False)
    monkeypatch.setattr(nogpu.os, "environ", {"CUDA_VISIBLE_DEVICES": "GPU-1"})
    module(monkeypatch, name, **contents)
    warnings = nogpu.Answers().forget()
    assert len(warnings) == (said is not None) and (said is None or said in warnings[0]), warnings


def test_what_libraries_chose_is_chosen_anew(torch: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = sys.modules["torch.cuda"]
    cuda._cached_device_count = 0  # type: ignore[attr-defined]
    interface = module(
        monkeypatch,
        "torch._dynamo.device_interface",
        _device_initialized=True,
        caching_worker_device_properties={"cuda": [], "cpu": [1]},
        caching_worker_current_devices={},
    )
    speed = module(monkeypatch, "deepspeed.accelerator.real_accelerator", ds_accelerator=SimpleNamespace(_name="cpu"))
    monkeypatch.setattr(nogpu.os, "environ", {"ROCR_VISIBLE_DEVICES": "GPU-1"})
    [warning] = nogpu.Answers().forget()
    assert warning.startswith("gpu: deepspeed: it took the CPU for its accelerator")
    assert cuda._cached_device_count is None  # type: ignore[attr-defined]
    assert not interface._device_initialized and interface.caching_worker_device_properties == {"cpu": [1]}
    assert speed.ds_accelerator is None


@pytest.mark.parametrize(("value", "wanted"), [(None, None), ("", None), ("cuda,cpu", "cuda,cpu")])
def test_jax_looks_for_all_platforms_again(
    torch: ModuleType, monkeypatch: pytest.MonkeyPatch, value: str | None, wanted: str | None
) -> None:
    """JAX reads JAX_PLATFORMS when it is imported, and was told to keep to the CPU."""
    assert nogpu.hidden()["JAX_PLATFORMS"] == "cpu"
    told: list[Any] = []
    module(monkeypatch, "jax", config=SimpleNamespace(update=lambda name, value: told.append((name, value))))
    module(monkeypatch, "jax._src.xla_bridge", _backends={})
    monkeypatch.setattr(nogpu.os, "environ", {} if value is None else {"JAX_PLATFORMS": value})
    nogpu.Answers().forget()
    assert told == [("jax_platforms", wanted)]


def test_tensorflow_without_cuda_is_not_told_of(torch: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nogpu.os, "environ", {"CUDA_VISIBLE_DEVICES": "GPU-1"})
    module(monkeypatch, "tensorflow.python.eager.context", _context=SimpleNamespace(_physical_devices=["cpu"]))
    build = {"is_cuda_build": False, "is_rocm_build": False}
    module(monkeypatch, "tensorflow.python.platform.build_info", build_info=build)
    assert nogpu.Answers().forget() == []
    build["is_cuda_build"] = True
    assert len(nogpu.Answers().forget()) == 1


def test_a_function_without_a_gpu_is_told_nothing(torch: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    module(monkeypatch, "jax._src.xla_bridge", _backends={"cpu": 1})
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    assert nogpu.Answers().forget() == []


def test_of_xformers_only_answers_are_dropped(torch: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its namespace of operators is kept in the same way, and can be made once only."""

    def once(func: Any) -> Any:
        value = None

        def wrapper() -> Any:
            nonlocal value
            if value is None:
                value = func()
            return value

        return wrapper

    made: list[str] = []
    asked, library = once(lambda: bool(made.append("asked"))), once(lambda: made.append("library") or object())
    module(monkeypatch, "xformers", asked=asked, library=library)
    asked(), library()
    answers = nogpu.Answers()
    answers.find()
    answers.forget()
    asked(), library()
    assert made == ["asked", "library", "asked"]
