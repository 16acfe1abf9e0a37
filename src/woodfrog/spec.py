"""Frozen descriptions of apps and functions: what the SDK builds, the daemon stores, and keys are made of.

Everything here is plain data. `to_dict` and `from_dict` carry any of these through JSON; unknown fields are refused.
"""

from __future__ import annotations

import hashlib
import json
import types
import typing
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any, Literal, TypeVar

from woodfrog.errors import SpecError

__all__ = [
    "AppSpec",
    "FunctionSpec",
    "ImageSpec",
    "LeftOut",
    "MethodSpec",
    "Resources",
    "RetryPolicy",
    "RuntimeSpec",
    "ScalingPolicy",
    "SecretSpec",
    "SnapshotPolicy",
    "SourceSpec",
    "VolumeMount",
    "from_dict",
    "function_key",
    "key_parts",
    "split_tag",
    "to_dict",
]

T = TypeVar("T")

MAX_NUMBER = 1e15
"""Bound of every real number in a spec: infinities and NaN have no place in deadlines."""


@dataclass(frozen=True)
class SnapshotPolicy:
    enabled: bool = False
    gpu: bool = False
    """Capture device memory too (`experimental_options={"enable_gpu_snapshot": True}`)."""


@dataclass(frozen=True)
class RetryPolicy:
    """Delays in seconds: `initial_delay * backoff_coefficient ** attempt`, at most `max_delay`."""

    max_retries: int = 0
    backoff_coefficient: float = 2.0
    initial_delay: float = 1.0
    max_delay: float = 60.0


@dataclass(frozen=True)
class ScalingPolicy:
    """Container counts; `scaledown_window` in seconds."""

    min_containers: int = 0
    max_containers: int | None = None
    buffer_containers: int = 0
    scaledown_window: float = 60.0
    single_use: bool = False

    def __post_init__(self) -> None:
        if self.max_containers is not None and self.max_containers < 1:
            raise SpecError(f"max_containers={self.max_containers}: must be at least 1", code="bad-spec")


@dataclass(frozen=True)
class Resources:
    """`cpu` and `cpu_limit` in cores, `memory_mib` and `disk_mib` in MiB.

    `cpu` is what the function gets of busy processors beside others; None = 0.125. The rest are limits; None = none
    (disk: the daemon's default).
    """

    cpu: float | None = None
    cpu_limit: float | None = None
    memory_mib: int | None = None
    disk_mib: int | None = None
    gpu: tuple[str, ...] = ()
    """Requests in order of preference (`("H100:2", "A100")`); empty = none."""


@dataclass(frozen=True)
class VolumeMount:
    name: str
    path: str
    read_only: bool = False
    create: bool = True
    ephemeral: bool = False
    sub_path: str = ""
    """The directory in the volume that is mounted; "" = the whole volume."""


@dataclass(frozen=True)
class SecretSpec:
    """A named secret kept by the daemon (`name`), or values from the program (`values`)."""

    name: str | None = None
    values: dict[str, str] = field(default_factory=dict)
    required_keys: tuple[str, ...] = ()


CODE = "app"
"""Where code is in what a client sends, and in the container."""


@dataclass(frozen=True)
class LocalFiles:
    """A file or directory of the client's that an image adds."""

    local: str
    """Path on the client; relative to its working directory at the deploy."""
    remote: str
    """Absolute path in the container."""
    ignore: tuple[str, ...] = ()
    """Patterns as in .gitignore, below `local`."""


@dataclass(frozen=True)
class ImageSpec:
    """What the program asked of its environment. Until images are built it is checked against the host's."""

    packages: tuple[str, ...] = ()
    """Python requirements in PEP 508 form."""
    env: dict[str, str] = field(default_factory=dict)
    steps: tuple[str, ...] = ()
    """Every build step as recorded, for people to read."""
    files: tuple[LocalFiles, ...] = ()
    workdir: str = ""
    """Where functions start; "" = where their code is."""


@dataclass(frozen=True)
class RuntimeSpec:
    """The Python environment that runs the function: the one `woodfrog deploy` ran in."""

    executable: str
    prefix: str
    base_prefix: str
    version: str
    sys_path: tuple[str, ...] = ()
    """Import path of the environment, without the program's own directory."""
    packages_digest: str = ""
    """Digest over the names and versions of the installed distributions."""


@dataclass(frozen=True)
class MethodSpec:
    name: str
    """Method name; for a plain function the function's own name."""
    generator: bool = False
    is_async: bool = False


@dataclass(frozen=True)
class SourceSpec:
    """Where the user's object comes from.

    `module`: import `module` from the code mounted at /app and take `qualname` from it.
    `serialized`: unpickle the blob `blob_digest` (cloudpickle of the function or class).
    """

    kind: Literal["module", "serialized"]
    module: str
    qualname: str
    code_digest: str | None = None
    blob_digest: str | None = None


@dataclass(frozen=True)
class FunctionSpec:
    """One function, or one class with its methods: what an instance (container) serves."""

    tag: str
    """Unique in the app: the function's or class's name."""
    kind: Literal["function", "class"]
    source: SourceSpec
    methods: tuple[MethodSpec, ...]
    snapshot: SnapshotPolicy = SnapshotPolicy()
    scaling: ScalingPolicy = ScalingPolicy()
    resources: Resources = Resources()
    retries: RetryPolicy = RetryPolicy()
    timeout: float = 300.0
    """Seconds one call may run."""
    startup_timeout: float = 300.0
    """Seconds import and `enter` may take."""
    plain_start: bool = False
    """Its starts without a snapshot begin at nothing, never in a zygote."""
    block_network: bool = False
    env: dict[str, str] = field(default_factory=dict)
    secrets: tuple[SecretSpec, ...] = ()
    volumes: tuple[VolumeMount, ...] = ()
    image: ImageSpec = ImageSpec()
    parameters: dict[str, str] = field(default_factory=dict)
    """Class parameters: name to a short text of type and default."""
    constructor: dict[str, str] | None = None
    """The same of what an `__init__` of the class's own takes, in its order; "*" stands before those by name only.
    None: nothing is known of it, or it takes any number of them."""

    @property
    def required(self) -> list[str]:
        """What its constructor has to be given."""
        return [n for n, text in (self.parameters | (self.constructor or {})).items() if n != "*" and " = " not in text]

    def method(self, name: str) -> MethodSpec | None:
        return next((m for m in self.methods if m.name == name), None)


@dataclass(frozen=True)
class LeftOut:
    """What of a program is not in its app."""

    tag: str
    """Of a function, a class, or a method (`Class.method`)."""
    why: str
    """One line for people: what it asks for, what to do without, and `file:line`."""


@dataclass(frozen=True)
class AppSpec:
    name: str
    runtime: RuntimeSpec
    functions: tuple[FunctionSpec, ...] = ()
    description: str = ""
    left_out: tuple[LeftOut, ...] = ()

    def function(self, tag: str) -> FunctionSpec | None:
        return next((f for f in self.functions if f.tag == tag), None)

    def serves(self, tag: str) -> bool:
        """Whether a function, a class or a method (`Class.method`) is in it."""
        service, method = split_tag(tag)
        function = self.function(service)
        return function is not None and (method is None or function.method(method) is not None)

    def missing(self, service: str, method: str | None) -> LeftOut | None:
        """What was left out of that name: itself, or its class."""
        return next((x for x in self.left_out if x.tag in (service, f"{service}.{method}")), None)


def split_tag(tag: str) -> tuple[str, str | None]:
    """`"Embedder.run"` → `("Embedder", "run")`; `"square"` → `("square", None)`."""
    service, _, method = tag.partition(".")
    return service, method or None


def to_dict(value: Any) -> Any:
    """Plain JSON form of a spec (dataclasses, tuples, dicts, scalars)."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_dict(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, (tuple, list)):
        return [to_dict(v) for v in value]
    if isinstance(value, dict):
        return {str(k): to_dict(v) for k, v in value.items()}
    return value


def _at(where: str, key: Any) -> str:
    """The place of a dict's entry, in one line whatever the key is."""
    text = str(key)
    return f"{where}.{text}" if text.isprintable() and len(text) <= 80 else f"{where}[{text[:80]!r}]"


def _decode(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    args = typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _decode(next(a for a in args if a is not type(None)), value, where)
    if origin is Literal:
        if value not in args:
            raise SpecError(f"{where}: {value!r} is not one of {', '.join(map(repr, args))}", code="bad-spec")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise SpecError(f"{where}: expected a list, got {type(value).__name__}", code="bad-spec")
        return tuple(_decode(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise SpecError(f"{where}: expected an object, got {type(value).__name__}", code="bad-spec")
        return {str(k): _decode(args[1], v, _at(where, k)) for k, v in value.items()}
    if is_dataclass(hint) and isinstance(hint, type):
        return from_dict(hint, value, where)
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not abs(value) < MAX_NUMBER:
            raise SpecError(f"{where}: expected a number below {MAX_NUMBER:g}", code="bad-spec")
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise SpecError(f"{where}: expected {hint.__name__}, got {type(value).__name__}", code="bad-spec")
    return value


_hints: dict[type, dict[str, Any]] = {}


def from_dict(cls: type[T], data: Any, where: str = "") -> T:
    """Rebuild a spec from `to_dict`'s form, checking every type.

    Raises:
        SpecError: a missing, unknown or wrongly typed field; the message names its path.
    """
    where = where or cls.__name__
    if not isinstance(data, dict):
        raise SpecError(f"{where}: expected an object, got {type(data).__name__}", code="bad-spec")
    hints = _hints.setdefault(cls, typing.get_type_hints(cls))
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - set(known))
    if unknown:
        raise SpecError(f"{where}: unknown field {unknown[0]!r}", code="bad-spec")
    values = {}
    for name, f in known.items():
        if name in data:
            values[name] = _decode(hints[name], data[name], f"{where}.{name}")
        elif f.default is MISSING and f.default_factory is MISSING:
            raise SpecError(f"{where}: field {name!r} is missing", code="bad-spec")
    try:
        return cls(**values)
    except SpecError as e:
        raise SpecError(f"{where}: {e.message}", code="bad-spec") from None


def digest_of(value: Any) -> str:
    """sha256 over the canonical JSON of `value`, in hex."""
    text = json.dumps(to_dict(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def key_parts(spec: FunctionSpec, runtime: RuntimeSpec, params_digest: str = "") -> dict[str, Any]:
    """All that decides what a booted function looks like in memory, by name.

    Scaling, retries and timeouts are left out: changing them keeps the snapshots. Secrets count by name and keys,
    not by value, so that a rotated secret does not cost a capture (after a restore the new values are in place).
    """
    return {
        "kind": spec.kind,
        "source": spec.source,
        "methods": spec.methods,
        "snapshot": spec.snapshot,
        "gpu": spec.resources.gpu,
        "block_network": spec.block_network,
        "env": spec.env,
        "secrets": [[s.name, sorted(s.values), sorted(s.required_keys)] for s in spec.secrets],
        # Without what is at its default: keys that are there already stay.
        "volumes": [{k: v for k, v in to_dict(m).items() if k != "sub_path" or v} for m in spec.volumes],
        "image": spec.image,
        "runtime": runtime,
        "params": params_digest,
    }


def function_key(spec: FunctionSpec, runtime: RuntimeSpec, params_digest: str = "") -> str:
    """Digest of all that decides what a booted function looks like in memory."""
    return digest_of(key_parts(spec, runtime, params_digest))
