"""What must differ between copies of one snapshot, renewed in each. docs/uniqueness.md is the user's view of this file.

Everything here looks only at what the user's code has loaded: a module that is not in memory has no frozen state.
`prepare` runs before the freeze and finds the C functions, so that a thawed copy pays for no search and no import.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["prepare", "renew", "set_environ", "trim_heap"]

_native: dict[str, list[Any]] = {}
"""C functions found by `prepare`: family to functions, already loaded, with their types set."""
_TEMP_VARIABLES = ("TMPDIR", "TEMP", "TMP")


def set_environ(env: Mapping[str, str]) -> None:
    """Make the environment exactly `env`, for Python and for C's getenv, and what the C library derives from it."""
    before = {name: os.environ.get(name) for name in ("TZ", *_TEMP_VARIABLES)}
    for name in set(os.environ) - set(env):
        del os.environ[name]
    for name, value in env.items():
        if os.environ.get(name) != value:
            os.environ[name] = value
    if os.environ.get("TZ") != before["TZ"]:
        time.tzset()
    tempfile = sys.modules.get("tempfile")
    if tempfile is not None and any(os.environ.get(name) != before[name] for name in _TEMP_VARIABLES):
        tempfile.__dict__["tempdir"] = None


def prepare() -> None:
    """Find the C libraries in this process that keep generators of their own."""
    import _blake2  # noqa: F401
    import ctypes

    _native.clear()
    wanted = {
        "libcrypto": ("openssl", "RAND_add", (ctypes.c_char_p, ctypes.c_int, ctypes.c_double)),
        "libsqlite3": ("sqlite", "sqlite3_randomness", (ctypes.c_int, ctypes.c_void_p)),
        "_sqlite3": ("sqlite", "sqlite3_randomness", (ctypes.c_int, ctypes.c_void_p)),
    }
    for path in _mapped_libraries():
        # Bundled copies are called libcrypto-1a2b3c.so.3 or libcrypto_custom.so.
        name = os.path.basename(path).partition(".")[0].partition("-")[0]
        entry = wanted.get(name)
        if entry is None:
            continue
        family, symbol, types = entry
        try:
            function = getattr(ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_LAZY), symbol)
        except (OSError, AttributeError):
            continue
        function.argtypes, function.restype = types, None
        _native.setdefault(family, []).append(function)
    libc = ctypes.CDLL(None)
    for symbol, kind in (("srandom", ctypes.c_uint), ("srand48", ctypes.c_long)):
        function = getattr(libc, symbol, None)
        if function is not None:
            function.argtypes, function.restype = (kind,), None
            _native.setdefault("libc", []).append(function)
    trim = getattr(libc, "malloc_trim", None)
    if trim is not None:
        trim.argtypes = (ctypes.c_size_t,)
        _native["trim"] = [trim]
    # Its first use takes a millisecond, which no copy has to spend.
    _openssl(os.urandom)


def _mapped_libraries() -> list[str]:
    paths: dict[str, None] = {}
    try:
        with open("/proc/self/maps", "rb") as maps:
            for line in maps:
                at = line.find(b"/")
                if at >= 0 and b".so" in line:
                    paths[os.fsdecode(line[at:].rstrip(b"\n"))] = None
    except OSError:
        return []
    return list(paths)


def trim_heap() -> None:
    """Give freed heap back to the kernel: what is not resident is not in the snapshot."""
    for trim in _native.get("trim", ()):
        trim(0)


Seed = Callable[[int], bytes]


def _random(seed: Seed) -> None:
    module = sys.modules.get("random")
    if module is not None:
        module.seed(int.from_bytes(seed(64), "little"))  # of bytes, Python 3.13 would import a hash first


def _numpy(seed: Seed) -> None:
    module: Any = sys.modules.get("numpy.random")
    if module is None or not hasattr(module, "seed"):
        return
    data = seed(64)
    try:
        module.seed([int.from_bytes(data[i : i + 4], "little") for i in range(0, 64, 4)])
    except TypeError:
        # The program put another bit generator behind the global functions: a new one of that kind.
        generator = type(module.get_bit_generator())
        module.set_bit_generator(generator(int.from_bytes(data, "little")))


def _torch(seed: Seed) -> None:
    torch: Any = sys.modules.get("torch")
    generator = getattr(torch, "default_generator", None)
    if generator is None:
        return
    generator.manual_seed(int.from_bytes(seed(8), "little"))
    cuda = getattr(torch, "cuda", None)
    if cuda is None:
        return
    # A seed given before CUDA started waits for that, and would be the same in every copy.
    waiting = getattr(cuda, "_lazy_seed_tracker", None)
    if cuda.is_initialized():
        cuda.manual_seed_all(int.from_bytes(seed(8), "little"))
    elif waiting is not None and waiting.call_order and hasattr(torch._C, "_cuda_init"):
        value = int.from_bytes(seed(8), "little")
        # Not by manual_seed_all: it would write down the stack, which takes longer than all the rest.
        waiting.queue_seed_all(lambda: [device.manual_seed(value) for device in cuda.default_generators], [])


def _tensorflow(seed: Seed) -> None:
    # Kernels draw their seeds when they are made, from a generator in C++; a global seed has them made anew.
    context = getattr(sys.modules.get("tensorflow.python.eager.context"), "_context", None)
    if context is not None and hasattr(context, "_set_global_seed"):
        context._set_global_seed(int.from_bytes(seed(7), "little"))


def _polars(seed: Seed) -> None:
    set_seed = getattr(sys.modules.get("polars"), "set_random_seed", None)
    if set_seed is not None:
        set_seed(int.from_bytes(seed(8), "little"))


def _numba(seed: Seed) -> None:
    # What compiled code draws from, one for `numpy.random` in it and one for `random`; each thread has its own.
    helpers: Any = sys.modules.get("numba._helperlib")
    if hasattr(helpers, "rnd_seed"):
        for state in (helpers.rnd_get_np_state_ptr(), helpers.rnd_get_py_state_ptr()):
            helpers.rnd_seed(state, int.from_bytes(seed(4), "little"))


def _openssl(seed: Seed) -> None:
    # RAND_add reseeds the primary generator from the kernel and mixes this in. The per-thread generators see at
    # their next use that their parent was reseeded, and reseed from it: so one call serves every thread.
    _ssl: Any = sys.modules.get("_ssl")
    if _ssl is not None:
        _ssl.RAND_add(seed(64), 64.0)
    for add in _native.get("openssl", ()):
        add(seed(64), 64, 64.0)
    # The `cryptography` package links a copy of its own.
    bundled: Any = sys.modules.get("cryptography.hazmat.bindings._rust")
    lib = getattr(getattr(bundled, "_openssl", None), "lib", None)
    if lib is not None:
        lib.RAND_add(seed(64), 64, 64.0)


def _sqlite(seed: Seed) -> None:
    del seed
    for randomness in _native.get("sqlite", ()):
        # With no buffer sqlite forgets its generator and seeds a new one from the kernel at the next use.
        randomness(0, None)


def _libc(seed: Seed) -> None:
    for set_seed in _native.get("libc", ()):
        set_seed(int.from_bytes(seed(4), "little"))


def _tempfile(seed: Seed) -> None:
    del seed
    module: Any = sys.modules.get("tempfile")
    if module is not None:
        module._name_sequence = None


def _uuid(seed: Seed) -> None:
    module: Any = sys.modules.get("uuid")
    if module is None:
        return
    # libuuid keeps its clock sequence where nothing can reach it, so uuid1 falls back on Python's own version. With a
    # random node (multicast bit set, RFC 9562 6.10) copies differ even within one clock tick.
    module._generate_time_safe = None
    module._node = int.from_bytes(seed(6), "little") | (1 << 40)
    for name in ("_last_timestamp", "_last_timestamp_v6", "_last_timestamp_v7"):
        if hasattr(module, name):
            setattr(module, name, None)


def _host(seed: Seed) -> None:
    del seed
    module: Any = sys.modules.get("platform")
    if module is not None:
        module._uname_cache = None
        module._platform_cache.clear()


_FAMILIES: dict[str, Callable[[Seed], None]] = {
    "random": _random,
    "numpy": _numpy,
    "torch": _torch,
    "tensorflow": _tensorflow,
    "polars": _polars,
    "numba": _numba,
    "openssl": _openssl,
    "sqlite": _sqlite,
    "libc": _libc,
    "tempfile": _tempfile,
    "uuid": _uuid,
    "host": _host,
}


def renew(entropy: bytes) -> tuple[dict[str, float], list[str]]:
    """Renew every family from `entropy` and from the kernel; milliseconds by family, and warnings.

    Raises:
        RuntimeError: a family could not be renewed; its copies would repeat each other, so none of them may serve.
    """
    from _blake2 import blake2b

    key, fresh, count = entropy[:64], os.urandom(64), 0

    def seed(size: int) -> bytes:
        nonlocal count
        count += 1
        return blake2b(fresh + count.to_bytes(8, "little"), key=key, digest_size=size).digest()

    timings: dict[str, float] = {}
    for name, family in _FAMILIES.items():
        begin = time.perf_counter()
        try:
            family(seed)
        except Exception as e:
            raise RuntimeError(f"the state of {name} could not be renewed after the restore: {e}") from e
        timings[name] = round((time.perf_counter() - begin) * 1e3, 3)
    warnings = []
    if "_sqlite3" in sys.modules and not _native.get("sqlite"):
        warnings.append("sqlite: its generator is out of reach here; SQL random() may repeat between copies")
    return timings, warnings
