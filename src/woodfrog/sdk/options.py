"""The parameters of `@app.function` and `@app.cls`: one table, and one function that turns them into a FunctionSpec."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

from woodfrog.errors import SpecError
from woodfrog.sdk import absent, checks
from woodfrog.sdk.image import Image
from woodfrog.sdk.secret import Secret
from woodfrog.sdk.volume import Volume, mounts
from woodfrog.spec import (
    FunctionSpec,
    ImageSpec,
    MethodSpec,
    Resources,
    RetryPolicy,
    ScalingPolicy,
    SecretSpec,
    SnapshotPolicy,
    SourceSpec,
    VolumeMount,
)

__all__ = ["PARAMETERS", "Defaults", "Options", "Retries", "build_spec"]


@dataclass(frozen=True)
class Retries:
    """How often a failed call is tried again, and when.

    Args:
        max_retries: 0 to 10.
        backoff_coefficient: factor between one delay and the next, 1 to 10.
        initial_delay: seconds before the first retry, 0 to 60.
        max_delay: longest delay in seconds, 1 to 60.

    Raises:
        SpecError: a value out of range.

    Example:
        >>> import woodfrog
        >>> woodfrog.Retries(max_retries=3, backoff_coefficient=1.0, initial_delay=0.5)
        Retries(max_retries=3, backoff_coefficient=1.0, initial_delay=0.5, max_delay=60.0)
    """

    max_retries: int
    backoff_coefficient: float = 2.0
    initial_delay: float = 1.0
    max_delay: float = 60.0

    def __post_init__(self) -> None:
        at = "max_retries"
        try:
            checks.whole(self.max_retries, most=10)
            at = "backoff_coefficient"
            checks.number(self.backoff_coefficient, least=1, most=10)
            at = "initial_delay"
            checks.number(self.initial_delay, least=0, most=60)
            at = "max_delay"
            checks.number(self.max_delay, least=1, most=60)
        except (TypeError, ValueError) as e:
            raise SpecError(f"Retries({at}=...): {e} ({checks.caller()})") from None


class Options(TypedDict, total=False):
    """Parameters of `@app.function` and `@app.cls`.

    cpu: cores: the share it gets when processors are busy (0.125 unless given); a pair is (request, limit), and the
    limit is never exceeded. memory: MiB, 16 at least, as a limit; a pair is (request, limit), of which the limit
    counts.
    gpu: "H100", "A100:2", "any", or a list in order of preference. timeout, startup_timeout, scaledown_window: seconds.
    """

    image: Image | None
    env: Mapping[str, str] | None
    secrets: Sequence[Secret] | None
    volumes: Mapping[Any, Volume] | None
    gpu: str | Sequence[str | None] | None
    cpu: float | tuple[float, float] | None
    memory: int | tuple[int, int] | None
    ephemeral_disk: int | None
    min_containers: int | None
    max_containers: int | None
    buffer_containers: int | None
    scaledown_window: float | None
    single_use_containers: bool | None
    retries: int | Retries | None
    timeout: float | None
    startup_timeout: float | None
    enable_memory_snapshot: bool | None
    experimental_options: Mapping[str, Any] | None
    block_network: bool | None
    serialized: bool | None
    include_source: bool | None
    is_generator: bool | None
    name: str | None
    # Older names of Modal's.
    checkpointing_enabled: bool | None
    concurrency_limit: int | None
    container_idle_timeout: float | None
    keep_warm: int | None
    max_inputs: int | None
    # Accepted, and noted once: without meaning on one's own machine.
    allow_background_volume_commits: Any
    cloud: Any
    i6pn: Any
    nonpreemptible: Any
    proxy: Any
    region: Any
    restrict_modal_access: Any
    routing_region: Any
    scheduler_placement: Any


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"expected True or False, got {value!r}")
    return value


def _seconds(value: Any) -> float:
    return float(checks.number(value, above=0))


def _pair(value: Any, check: Callable[[Any], Any]) -> tuple[Any, Any]:
    """A (request, limit) pair; a single value is a request."""
    if not isinstance(value, (tuple, list)):
        return check(value), None
    if len(value) != 2:
        raise TypeError(f"expected a number or a (request, limit) pair, got {value!r}")
    request, limit = check(value[0]), check(value[1])
    if request > limit:
        raise ValueError(f"the request {request} is more than the limit {limit}")
    return request, limit


def _cpu(value: Any) -> tuple[float, float | None]:
    request, limit = _pair(value, lambda v: checks.number(v, above=0))
    return float(request), None if limit is None else float(limit)


MIN_MEMORY_MIB = 16
"""A worker that does nothing takes 12."""


def _memory(value: Any) -> int:
    request, limit = _pair(value, checks.whole)
    mib = int(request if limit is None else limit)
    if mib < MIN_MEMORY_MIB:
        raise ValueError(f"{mib} MiB are too few for a container's Python: {MIN_MEMORY_MIB} is the least")
    return mib


_GPU = re.compile(r"([A-Za-z][A-Za-z0-9_.-]*!?)(?::(\d{1,3}))?")


def parse_gpu(value: Any) -> tuple[str, ...]:
    """`"a10g"` → `("A10G",)`, `"H100:2"`, `"any"`, or a sequence of them; None asks for no GPU.

    Raises:
        TypeError, ValueError: with the words to put behind the parameter's name.
    """
    if value is None:
        return ()
    if isinstance(value, (list, tuple)):
        return tuple(dict.fromkeys(text for v in value for text in parse_gpu(v)))
    if not isinstance(value, str):
        raise TypeError(f'expected text such as "H100" or "A100:2", or a list of such, got {value!r}')
    found = _GPU.fullmatch(value.strip())
    if not found:
        raise ValueError(f'expected the form "H100" or "A100:2", got {value!r}')
    kind = "any" if found[1].lower() == "any" else found[1].upper()
    count = int(found[2] or 1)
    if count < 1:
        raise ValueError(f"the count must be at least 1, got {value!r}")
    return (kind if count == 1 else f"{kind}:{count}",)


def _retries(value: Any) -> RetryPolicy:
    if isinstance(value, Retries):
        return RetryPolicy(
            value.max_retries, float(value.backoff_coefficient), float(value.initial_delay), float(value.max_delay)
        )
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"expected a whole number or woodfrog.Retries, got {value!r}")
    return RetryPolicy(checks.whole(value, most=10), backoff_coefficient=1.0, initial_delay=1.0)


def _image(value: Any) -> ImageSpec:
    if not isinstance(value, Image):
        raise TypeError(f"expected a woodfrog.Image, got {type(value).__name__}")
    return value.spec


def _secrets(value: Any) -> tuple[SecretSpec, ...]:
    if isinstance(value, Secret):
        raise TypeError("expected a list of secrets, got one: put it in [ ]")
    values = list(value)
    wrong = [v for v in values if not isinstance(v, Secret)]
    if wrong:
        raise TypeError(f"expected woodfrog.Secret objects, got {type(wrong[0]).__name__}")
    return tuple(v._spec for v in values)


def _experimental(value: Any) -> bool:
    if not isinstance(value, Mapping):
        raise TypeError(f"expected a dict, got {type(value).__name__}")
    for key in value:
        if key != "enable_gpu_snapshot":
            checks.note(f"experimental:{key}", f"experimental_options[{key!r}] is not known and is ignored")
    return _flag(value.get("enable_gpu_snapshot", False))


def _count(value: Any) -> int:
    return checks.whole(value)


def _some(value: Any) -> int:
    return checks.whole(value, least=1)


def _single(value: Any) -> bool:
    return checks.whole(value, least=1) == 1


def _name(value: Any) -> str:
    return checks.name(value, "name")


def _disk(value: Any) -> int:
    asked = _some(value)
    here = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 3 // 4 >> 20
    if asked > here:
        checks.note(
            "ephemeral_disk",
            f"ephemeral_disk={asked}: a container's disk is memory, and gets at most three quarters of the machine's "
            f"({here} MiB of this one's); put large data in a Volume",
        )
    return asked


@dataclass(frozen=True)
class Parameter:
    parse: Callable[[Any], Any]
    """Checks and converts; raises TypeError or ValueError with the words to put behind the parameter's name."""
    field: str
    """Where the value goes in a FunctionSpec, or a name that `build_spec` reads itself."""
    instead: str = ""
    """The present name of a parameter that is out of date."""


PARAMETERS: dict[str, Parameter] = {
    "image": Parameter(_image, "image"),
    "env": Parameter(checks.text_dict, "env"),
    "secrets": Parameter(_secrets, "secrets"),
    "volumes": Parameter(mounts, "volumes"),
    "gpu": Parameter(parse_gpu, "resources.gpu"),
    "cpu": Parameter(_cpu, "resources.cpu"),
    "memory": Parameter(_memory, "resources.memory_mib"),
    "ephemeral_disk": Parameter(_disk, "resources.disk_mib"),
    "min_containers": Parameter(_count, "scaling.min_containers"),
    "max_containers": Parameter(_some, "scaling.max_containers"),
    "buffer_containers": Parameter(_count, "scaling.buffer_containers"),
    "scaledown_window": Parameter(_seconds, "scaling.scaledown_window"),
    "single_use_containers": Parameter(_flag, "scaling.single_use"),
    "retries": Parameter(_retries, "retries"),
    "timeout": Parameter(_seconds, "timeout"),
    "startup_timeout": Parameter(_seconds, "startup_timeout"),
    "enable_memory_snapshot": Parameter(_flag, "snapshot.enabled"),
    "experimental_options": Parameter(_experimental, "snapshot.gpu"),
    "block_network": Parameter(_flag, "block_network"),
    "serialized": Parameter(_flag, "serialized"),
    "include_source": Parameter(_flag, "include_source"),
    "is_generator": Parameter(_flag, "is_generator"),
    "name": Parameter(_name, "name"),
    "checkpointing_enabled": Parameter(_flag, "snapshot.enabled", instead="enable_memory_snapshot"),
    "concurrency_limit": Parameter(_some, "scaling.max_containers", instead="max_containers"),
    "container_idle_timeout": Parameter(_seconds, "scaling.scaledown_window", instead="scaledown_window"),
    "keep_warm": Parameter(_count, "scaling.min_containers", instead="min_containers"),
    "max_inputs": Parameter(_single, "scaling.single_use", instead="single_use_containers"),
}
WITHOUT_MEANING = frozenset(
    {
        "allow_background_volume_commits",
        "cloud",
        "i6pn",
        "nonpreemptible",
        "proxy",
        "region",
        "restrict_modal_access",
        "routing_region",
        "scheduler_placement",
    }
)
NOT_YET = {
    "allow_concurrent_inputs": "several inputs at once in one container: drop it, and more containers are started",
    "mounts": "mounts: files beside the program are sent with it, others with Image.add_local_file and add_local_dir",
    "network_file_systems": "network file systems: use a Volume",
    "schedule": "schedules: drop it, and have cron run `woodfrog call`",
    "shared_volumes": "shared volumes: use volumes= and Volume.from_name",
    "webhook_config": "web endpoints: call it with .remote(), with `woodfrog call`, or over woodfrog's HTTP API",
}
"""Modal's parameters that cannot be left out without changing what the program does, and what to do instead."""

_GROUPS: dict[str, type[Any]] = {"resources": Resources, "scaling": ScalingPolicy, "snapshot": SnapshotPolicy}


@dataclass(frozen=True)
class Defaults:
    """What an app gives to all its functions."""

    image: ImageSpec = field(default_factory=ImageSpec)
    secrets: tuple[SecretSpec, ...] = ()
    volumes: tuple[VolumeMount, ...] = ()
    include_source: bool = True


@dataclass(frozen=True)
class Built:
    spec: FunctionSpec
    """`source.code_digest` and `source.blob_digest` are filled in at deploy."""
    include_source: bool
    lacks: tuple[absent.Lack, ...]
    """What woodfrog does not have of what the options ask for."""


def parse(decorator: str, options: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[absent.Lack]]:
    """Checked values by the `field` of their parameter, and what woodfrog lacks of what they ask for.

    Args:
        where: names the function, its file and line.

    Raises:
        TypeError: an unknown parameter; names the nearest.
        SpecError: a value of the wrong type or out of range.
    """
    found: dict[str, Any] = {}
    lacks: list[absent.Lack] = []
    line = where.partition(", ")[2] or where
    for key, value in options.items():
        known = PARAMETERS.get(key)
        if known is None or (key in ("name", "is_generator") and decorator == "cls"):
            if key in NOT_YET and (absent.among(value) or value not in (None, (), [], {})):
                what, _, remedy = NOT_YET[key].partition(": ")
                text = f"@app.{decorator}({key}=...): woodfrog does not have {what} yet: {remedy}"
                lacks.append(absent.Lack(text, line))
            if key in WITHOUT_MEANING:
                if value not in (None, False):
                    checks.note(
                        f"parameter:{key}", f"{key}= has no meaning on your own machine and is ignored ({where})"
                    )
            elif key not in NOT_YET:
                hint = checks.nearest(key, [*PARAMETERS, *WITHOUT_MEANING])
                raise TypeError(f"@app.{decorator} has no parameter {key!r}{hint} ({where})")
            continue
        if value is None:
            continue
        if key == "max_inputs" and type(value) is int and value > 1:
            text = "woodfrog does not have containers that end after several inputs yet: drop it, or give "
            lacks.append(absent.Lack(f"@app.{decorator}({key}=...): {text}single_use_containers=True", line))
            continue
        if (stand_in := absent.among(value)) is not None:
            lacks.append(absent.Lack(f"@app.{decorator}({key}=...): {stand_in.text}", line))
            continue
        if known.instead:
            warnings.warn(f"{key}= is now called {known.instead}= ({where})", DeprecationWarning, stacklevel=4)
        try:
            found[known.field] = known.parse(value)
        except (TypeError, ValueError, SpecError) as e:
            raise SpecError(f"@app.{decorator}({key}=...): {e} ({where})", code="bad-parameter") from None
    return found, lacks


def build_spec(
    kind: Literal["function", "class"],
    *,
    name: str,
    module: str | None,
    qualname: str,
    methods: tuple[MethodSpec, ...],
    options: Mapping[str, Any],
    defaults: Defaults,
    where: str,
    parameters: dict[str, str] | None = None,
    constructor: dict[str, str] | None = None,
) -> Built:
    """The whole of what a decorator says, checked, as one frozen spec.

    Raises:
        TypeError, SpecError: as `parse`, and values that contradict one another; or code that cannot be found again.
    """
    decorator = "cls" if kind == "class" else kind
    values, lacks = parse(decorator, options, where)
    serialized = values.pop("serialized", False)
    include_source = values.pop("include_source", defaults.include_source)
    tag = values.pop("name", None) or name
    if values.pop("is_generator", None):
        methods = tuple(MethodSpec(m.name, True, m.is_async) for m in methods)
    if not serialized:
        if "<locals>" in qualname or "<lambda>" in qualname:
            raise SpecError(
                f"{name} is defined inside another function, where a container cannot import it: "
                f"move it to the top level of its module, or use @app.{decorator}(serialized=True) ({where})",
                code="not-importable",
            )
        if module is None:
            raise SpecError(
                f"{name} is defined in no file (a REPL, a notebook, or standard input): "
                f"use @app.{decorator}(serialized=True) ({where})",
                code="not-importable",
            )
    if "resources.cpu" in values:
        values["resources.cpu"], values["resources.cpu_limit"] = values["resources.cpu"]
    groups: dict[str, dict[str, Any]] = {}
    plain: dict[str, Any] = {"image": defaults.image}
    for path, value in values.items():
        group, _, rest = path.partition(".")
        if rest:
            groups.setdefault(group, {})[rest] = value
        else:
            plain[path] = value
    built = {group: _GROUPS[group](**fields) for group, fields in groups.items()}
    scaling = built.get("scaling", ScalingPolicy())
    if scaling.max_containers is not None and scaling.min_containers > scaling.max_containers:
        raise SpecError(
            f"@app.{decorator}: min_containers={scaling.min_containers} is more than "
            f"max_containers={scaling.max_containers} ({where})",
            code="bad-parameter",
        )
    snapshot = built.get("snapshot", SnapshotPolicy())
    if snapshot.gpu and not snapshot.enabled:
        raise SpecError(
            f"@app.{decorator}: enable_gpu_snapshot needs enable_memory_snapshot=True ({where})", code="bad-parameter"
        )
    own = plain.pop("volumes", ())
    taken = {m.path for m in own}
    plain["volumes"] = (*(m for m in defaults.volumes if m.path not in taken), *own)
    plain["secrets"] = (*defaults.secrets, *plain.pop("secrets", ()))
    plain.setdefault("startup_timeout", max(FunctionSpec.startup_timeout, plain.get("timeout", 0.0)))
    source = SourceSpec("serialized" if serialized else "module", module or "__main__", qualname)
    spec = FunctionSpec(
        tag=tag,
        kind=kind,
        source=source,
        methods=methods,
        parameters=parameters or {},
        constructor=constructor,
        **built,
        **plain,
    )
    return Built(spec, include_source, tuple(lacks))
