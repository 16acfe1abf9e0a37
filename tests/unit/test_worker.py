from __future__ import annotations

import ctypes
import os
import pickle
import random
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cloudpickle
import pytest

from woodfrog import protocol
from woodfrog.errors import NotFoundError, SerializationError
from woodfrog.sdk import hooks
from woodfrog.worker import codec, renew, runtime


def join(pieces: codec.Body) -> bytes:
    return b"".join(pieces)


@pytest.mark.parametrize("value", [None, 5, "text", b"x" * 200_000, [1, {"a": (2,)}], bytearray(b"y" * 100_000)])
def test_encode_round_trip(value: Any) -> None:
    assert pickle.loads(join(codec.encode(value, "pickle", "f()"))) == value


def test_large_buffers_travel_as_themselves() -> None:
    numpy = pytest.importorskip("numpy")
    data = bytes(1 << 20)
    assert any(piece is data for piece in codec.encode({"a": data}, "pickle", "f()"))
    for array in (numpy.arange(1 << 18), numpy.asfortranarray(numpy.arange(1 << 18).reshape(512, 512))):
        pieces = codec.encode(array, "pickle", "f()")
        assert any(isinstance(p, memoryview) and numpy.shares_memory(numpy.frombuffer(p, "u1"), array) for p in pieces)
        assert all(memoryview(p).itemsize == 1 for p in pieces)
        assert (pickle.loads(join(pieces)) == array).all()


def test_arguments() -> None:
    assert codec.load_arguments(bytearray(), "pickle", "f()") == ((), {})
    assert codec.load_arguments(bytearray(cloudpickle.dumps(((1,), {"b": 2}))), "pickle", "f()") == ((1,), {"b": 2})
    assert codec.load_arguments(bytearray(b"[1, null]"), "json", "f()") == ((1, None), {})
    with pytest.raises(SerializationError, match=r"arguments of f\(\)"):
        codec.load_arguments(bytearray(b"\x80\x05."), "pickle", "f()")


def test_what_a_header_says_of_an_error_is_bounded() -> None:
    error = ValueError("begin" + "\0" * 5_000_000 + "end")
    for encoding in ("pickle", "json"):
        plain, body = codec.encode_error(error, encoding)
        assert len(protocol.pack({"type": "error", "error": plain})) < protocol.MAX_HEADER
        assert plain["message"].startswith("begin\0") and plain["message"].endswith("\0end")
        assert "4900008 characters left out" in plain["message"]
        assert len(join(body)) > 5_000_000  # the caller gets all of it


def test_exception_that_holds_itself_is_sent_once() -> None:
    try:
        raise ValueError("a")
    except ValueError as e:
        e.__cause__ = e
        error = e
    plain, body = codec.encode_error(error)
    exception, links = pickle.loads(pickle.loads(join(body))["exception"])
    assert plain["type"] == "ValueError" and exception.args == ("a",) and links == []


class Told(Exception):
    """As people write them: the constructor wants what `args` does not hold."""

    def __init__(self, status: int, body: str) -> None:
        super().__init__(f"{status}: {body}")
        self.status = status


def test_an_exception_whose_constructor_wants_more_comes_back_as_itself() -> None:
    error = Told(404, "nope")
    error.__cause__ = Told(500, "deeper")
    data = codec.pickle_exception(error)
    assert data is not None
    found, [(cause, kind)] = pickle.loads(data)
    assert type(found) is Told and (str(found), found.status) == ("404: nope", 404)
    assert type(cause) is Told and (cause.status, kind) == (500, "cause")


def test_links_end_at_what_cannot_be_pickled() -> None:
    class Lock(Exception):
        def __reduce__(self) -> Any:
            raise TypeError("no")

    error = ValueError("top")
    error.__cause__ = KeyError("middle")
    error.__cause__.__cause__ = Lock()
    data = codec.pickle_exception(error)
    assert data is not None
    _, links = pickle.loads(data)
    assert [(type(e), kind) for e, kind in links] == [(KeyError, "cause")]


def role(f: Any, **fields: Any) -> Any:
    f.__woodfrog_role__ = fields
    return f


def test_hooks_of_a_class_follow_definition_order_and_overrides() -> None:
    class A:
        first = role(lambda self: 1, kind="enter", snap=True)
        second = role(lambda self: 2, kind="enter", snap=True)
        dropped = role(lambda self: 3, kind="enter", snap=True)
        late = role(lambda self: 4, kind="enter")

    class B(A):
        third = role(lambda self: 5, kind="enter", snap=True)
        first = role(lambda self: 6, kind="enter", snap=True)
        dropped = None

    def run(kind: str, **wanted: bool) -> list[int]:
        return [f(None) for f in runtime._hooks(B, kind, wanted)]

    assert run("enter", snap=True) == [6, 2, 5]
    assert run("enter", snap=False) == [4]
    assert run("exit") == []


def test_unknown_method_names_the_known() -> None:
    r = runtime.Runtime()
    r._boot, r._methods = {"tag": "Model"}, {"run": False, "load": False}
    with pytest.raises(NotFoundError, match="Model has no method 'walk'; it has: load, run"):
        r.function("walk")


def test_hooks_are_kept_in_order_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "_after_restore", [])

    @hooks.register_after_restore
    def f() -> None: ...

    assert hooks.register_after_restore(f) is f
    assert hooks._after_restore == [f, f]
    with pytest.raises(TypeError, match="register_before_snapshot"):
        hooks.register_before_snapshot(3)  # type: ignore[type-var]


def test_environment_is_replaced_for_python_and_c(monkeypatch: pytest.MonkeyPatch) -> None:
    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_char_p
    before = dict(os.environ)
    monkeypatch.setattr(tempfile, "tempdir", "/old")
    try:
        renew.set_environ({"A": "1", "TZ": "Asia/Tokyo"})
        assert dict(os.environ) == {"A": "1", "TZ": "Asia/Tokyo"}
        assert (getenv(b"A"), getenv(b"PATH")) == (b"1", None)
        assert time.timezone == -9 * 3600
        assert tempfile.tempdir == "/old"
        renew.set_environ({"A": "2", "TMPDIR": "/new"})
        assert (getenv(b"A"), getenv(b"TZ"), time.timezone) == (b"2", None, 0)
        assert tempfile.tempdir is None
    finally:
        renew.set_environ(before)


def test_renewal_reseeds_what_the_program_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_generate_time_safe", "_node", "_last_timestamp"):
        monkeypatch.setattr(uuid, name, getattr(uuid, name))
    seen = set()
    for _ in range(3):
        random.seed(1)
        timings, _ = renew.renew(bytes(64))
        seen.add(random.random())
    assert len(seen) == 3 and {"random", "numpy", "torch", "openssl", "sqlite", "tempfile", "uuid"} <= set(timings)


def test_renewal_has_nothing_left_to_import() -> None:
    program = """
import random, sys, tempfile, uuid
from woodfrog.worker import renew
renew.prepare()
before = set(sys.modules)
renew.renew(bytes(64))
print(*set(sys.modules) - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_numpy_with_another_bit_generator_is_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    numpy = pytest.importorskip("numpy")
    original = numpy.random.get_bit_generator()
    try:
        seen = set()
        for _ in range(3):
            numpy.random.set_bit_generator(numpy.random.PCG64(1))
            renew._numpy(os.urandom)
            assert type(numpy.random.get_bit_generator()) is numpy.random.PCG64
            seen.add(numpy.random.rand())
        assert len(seen) == 3
    finally:
        numpy.random.set_bit_generator(original)


def test_family_that_cannot_be_renewed_stops_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "seed", lambda *_: 1 / 0)
    with pytest.raises(RuntimeError, match="state of random could not be renewed"):
        renew.renew(bytes(64))


@pytest.mark.torch
def test_a_seed_that_waits_for_cuda_is_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    tracker = type(torch.cuda._lazy_seed_tracker)()
    monkeypatch.setattr(torch.cuda, "_lazy_seed_tracker", tracker)
    monkeypatch.setattr(torch._C, "_cuda_init", print, raising=False)
    renew._torch(os.urandom)
    assert tracker.call_order == []
    device = torch.Generator()
    monkeypatch.setattr(torch.cuda, "default_generators", (device,))
    tracker.queue_seed_all(lambda: device.manual_seed(1), [])
    seen = set()
    for _ in range(3):
        renew._torch(os.urandom)
        for call, _ in tracker.get_calls()[-1:]:
            call()
        seen.add(device.initial_seed())
    assert len(seen) == 3 and 1 not in seen


def test_tensorflow_gets_a_global_seed_where_it_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that exist go on from what they drew before the freeze, until there is one."""
    seeds: list[int] = []
    context = SimpleNamespace(_context=SimpleNamespace(_set_global_seed=seeds.append))
    monkeypatch.setitem(sys.modules, "tensorflow.python.eager.context", context)
    for _ in range(2):
        renew.renew(os.urandom(64))
    assert len(set(seeds)) == 2 and all(0 <= seed < 1 << 56 for seed in seeds)
    context._context = None  # imported, and not used
    assert "tensorflow" in renew.renew(os.urandom(64))[0]


def test_polars_and_numba_draw_from_seeds_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[tuple[Any, int]] = []
    numba = SimpleNamespace(
        rnd_get_np_state_ptr=lambda: "np",
        rnd_get_py_state_ptr=lambda: "py",
        rnd_seed=lambda *given: seeds.append(given),
    )
    polars = SimpleNamespace(set_random_seed=lambda seed: seeds.append(("polars", seed)))
    for name, module in (("numba._helperlib", numba), ("polars", polars)):
        monkeypatch.setitem(sys.modules, name, module)  # type: ignore[arg-type]
    for _ in range(2):
        renew.renew(bytes(64))
    drawn = [of for of, _ in seeds]
    assert sorted(drawn) == ["np", "np", "polars", "polars", "py", "py"] and len({seed for _, seed in seeds}) == 6
    assert all(0 <= seed < 2 ** (64 if of == "polars" else 32) for of, seed in seeds)
    for name in ("numba._helperlib", "polars"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())  # type: ignore[arg-type]
    renew.renew(bytes(64))  # versions without these functions


def test_every_family_is_documented() -> None:
    page = Path(__file__).parents[2] / "docs" / "uniqueness.md"
    text = page.read_text()
    assert [name for name in renew._FAMILIES if f"`{name}`" not in text] == []


def test_worker_state_is_seen_by_the_hooks_module(monkeypatch: pytest.MonkeyPatch) -> None:
    from woodfrog.worker import state

    monkeypatch.setitem(sys.modules, "woodfrog.worker.state", state)
    assert (hooks.restored(), hooks.snapshot_id()) == (False, None)
    monkeypatch.setattr(state, "restored", True)
    monkeypatch.setattr(state, "snapshot_id", "s-1")
    assert (hooks.restored(), hooks.snapshot_id()) == (True, "s-1")
    monkeypatch.delitem(sys.modules, "woodfrog.worker.state")
    assert (hooks.restored(), hooks.snapshot_id()) == (False, None)


HELD = """
import gc, sys
from woodfrog.worker.runtime import Runtime
own = sys.argv[1] == "own"
runtime = Runtime()
runtime._boot, runtime._methods, runtime._target = {"tag": "f", "kind": "function"}, {"f": False}, lambda: 0
if own:
    gc.freeze()
runtime.freeze()
assert gc.get_freeze_count() > 1000
counts = []
for _ in range(10):
    runtime.call("f", (), {})
    counts.append(gc.get_freeze_count() > 1000)
assert counts == ([True] * 10 if own else [True] * 8 + [False] * 2), counts
again = Runtime()
again._hold()
again._let_go()
assert (gc.get_freeze_count() > 1000) == own
"""


@pytest.mark.parametrize("who", ["ours", "own"])
def test_the_collector_leaves_what_was_frozen_alone_for_a_while(who: str) -> None:
    """Unless the program keeps it so itself."""
    subprocess.run([sys.executable, "-c", HELD, who], check=True)


def test_what_torch_has_on_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    from woodfrog.worker.shrink import device_use

    class Tensor:
        def __init__(self, address: int, size: int, device: str = "cuda") -> None:
            self.device = SimpleNamespace(type=device)
            self.untyped_storage = lambda: SimpleNamespace(data_ptr=lambda: address, nbytes=lambda: size)

    class Module:
        def parameters(self, recurse: bool) -> list[Tensor]:
            return [Tensor(1, 40), Tensor(1, 40), Tensor(2, 1000, "cpu")]

        def buffers(self, recurse: bool) -> list[Tensor]:
            return [Tensor(3, 20)]

    segments = [
        {"total_size": 100, "allocated_size": 90, "segment_pool_id": (0, 0)},
        {"total_size": 50, "allocated_size": 0},
        {"total_size": 30, "allocated_size": 30, "segment_pool_id": (0, 1)},
    ]
    cuda = SimpleNamespace(is_initialized=lambda: True, memory_snapshot=lambda: segments)
    torch = SimpleNamespace(cuda=cuda, nn=SimpleNamespace(Module=Module))
    monkeypatch.setitem(sys.modules, "torch", torch)  # type: ignore[arg-type]
    kept = [Module(), Module()]
    assert device_use() == {"weights": 60, "tensors": 30, "graphs": 30, "allocator cache": 60}
    kept.clear()
    assert device_use() == {"tensors": 90, "graphs": 30, "allocator cache": 60}
    cuda.is_initialized = lambda: False
    assert device_use() == {}
    monkeypatch.delitem(sys.modules, "torch")
    assert device_use() == {}
