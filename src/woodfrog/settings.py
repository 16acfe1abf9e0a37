"""The one reader of environment variables and the configuration file.

Order: environment variable, then `config.toml` in the state directory, then the default.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from hashlib import sha256
from math import inf
from pathlib import Path
from typing import Any, TypeVar

from woodfrog.errors import SpecError

__all__ = ["Settings", "load"]

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Settings:
    """Everything that can be tuned. Each field `x` is read from `WOODFROG_X` or from `x = ...` in config.toml."""

    home: Path = Path("/var/lib/woodfrog")
    """State directory: socket, journal, code, snapshots, logs, volumes."""
    host: str = ""
    """Client: address of a daemon on TCP (`http://host:port`); empty = the Unix socket in `home`."""
    token: str = field(default="", repr=False)
    """Bearer token for TCP, both sides."""
    listen: str = ""
    """Daemon: also listen on this TCP `address:port` (needs `token`)."""
    metrics_token: str = field(default="", repr=False)
    """Daemon: a bearer token that opens `GET /metrics` on TCP and nothing else; empty = `token` alone does."""
    socket_group: str = ""
    """Daemon: group that may use the Unix socket beside root.

    Its members can run code as the worker uid and read what any user of this machine may read.
    """
    criu: str = ""
    """Path of the criu binary; empty = look in the usual places."""
    gpu: str = ""
    """`none` runs functions that ask for a GPU without one."""
    gpu_free_percent: int = 75
    """A GPU is given to a container only while so much of its memory is free; 0 = whatever is."""
    cuda_dir: str = ""
    """Directory with libcuda.so.1 where the loader does not find it by itself. Where it has a directory `dev`, the
    device nodes are those in it."""
    worker_uid: int = 64646
    """Uid and gid that user code runs as."""
    max_containers: int = 64
    """Containers at a time, of all functions together."""
    memory_mib: int = 0
    """What containers may take of memory together, in MiB: a start that does not fit waits. 0 = what the machine has,
    less a twentieth of it; -1 = starts do not look at memory."""
    pool_size: int = 2
    """Prepared sandboxes kept waiting."""
    lazy_min_mib: int = 4
    """Snapshots of at least so much memory are thawed through the page server; smaller ones are read at once."""
    drain_ms: int = 500
    """How long after its thaw, and not before `drain_calls`, the rest of its memory is filled in; -1 = never."""
    drain_calls: int = 8
    """After how many calls the rest of a process's memory is filled in: a copy that hardly works keeps to what it
    touched."""
    huge_pages: bool = True
    """Memory that lay in huge pages at the freeze is put into huge pages again, some seconds after the thaw: what reads
    a lot of memory is then as fast as after a cold start."""
    pack: bool = True
    """Put snapshots' memory into the page store, where equal pages are kept once, after their first call."""
    tier: str = ""
    """Where snapshots are kept beside this machine: `s3://bucket/prefix`, `gs://…`, `az://…`, or a directory. Each is
    copied there after it was packed; a function with none here looks for one there."""
    read_through: bool = True
    """Thaw a snapshot of the tier as soon as the memory that it needs first is here. Off: when all of it is."""
    encryption_key_file: str = ""
    """File (mode 0600) with a key, 32 bytes in hex or base64. With one, snapshots are on disk and in the tier only
    encrypted; those in use are in memory (tmpfs). Empty = they are not encrypted."""
    encryption_key: str = field(default="", repr=False)
    """The key itself, where it comes by the environment."""
    snapshots_mib: int = 0
    """What snapshots may take of this machine's disk, in MiB; those that are in the tier as well and were not used for
    longest go first; 0 = no limit."""
    network_subnet: str = "10.231.0.0/16"
    """Addresses of the sandboxes."""
    network_bridge: str = "wf0"
    disk_mib: int = 0
    """Default size limit of what a sandbox may write, in MiB; 0 = a quarter of the machine's memory."""
    keep_results_s: float = 7 * 86400.0
    """How long a finished call's result can be fetched, in seconds."""
    keep_results_mib: int = 4096
    """What such results may take of the disk, in MiB; the oldest go first: of those that were fetched, after 2 minutes,
    then of the others, after an hour; 0 = no limit."""
    log_mib: int = 64
    """Log kept per app, in MiB."""
    keep_snapshots: int = 3
    """Snapshots kept per function and kind of host: the current version's and earlier ones'."""
    keep_unused_s: float = 30 * 86400.0
    """How long a snapshot stays that nothing was thawed from and that no deployed function would thaw here, in seconds;
    0 = for good."""
    snapshot_failures: int = 3
    """Restore failures after which a snapshot is retired."""
    zygotes: bool = True
    """Starts without a snapshot begin in a snapshot of a worker that has the program's heavy imports already."""
    keep_zygotes: int = 4
    """Zygotes kept; the longest unused beyond that are removed."""
    zygote_min_ms: int = 50
    """Imports that take less than so many milliseconds are not worth a zygote."""
    parked: int = 0
    """Thawed copies kept stopped for each function that was called in the last hour, to be woken by its next calls:
    almost no memory each, and a sandbox. `buffer_containers` does the same for one function."""
    capture_attempts: int = 3
    """Failed captures after which a function version runs without snapshots."""
    faults: str = ""
    """Fault injection for tests: `point=action[,point=action]`."""

    @property
    def socket(self) -> Path:
        return self.home / "woodfrogd.sock"

    @property
    def encrypted(self) -> bool:
        return bool(self.encryption_key or self.encryption_key_file)

    @property
    def hot(self) -> Path:
        """Where snapshots are as plain bytes: in memory when they may be on disk only encrypted."""
        return self.shm / "hot" if self.encrypted else self.home

    @property
    def tag(self) -> str:
        """Short name of this state directory, for cgroups, bridges and tmpfs names: two daemons never meet."""
        return sha256(str(self.home).encode()).hexdigest()[:8]

    @property
    def shm(self) -> Path:
        """This state directory's place in memory (tmpfs)."""
        return Path("/dev/shm") / f"woodfrog-{self.tag}"

    @property
    def kdat_dir(self) -> Path:
        """CRIU's run-time directory; on tmpfs, or CRIU probes the kernel again at every start (26 ms)."""
        return self.shm / "criu"


_BOOLS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


_LEAST = {
    "drain_ms": -1,
    "memory_mib": -1,
    "worker_uid": 1,
    "max_containers": 1,
    "log_mib": 1,
    "keep_snapshots": 1,
    "snapshot_failures": 1,
    "capture_attempts": 1,
}
"""Of the others it is 0."""
_MOST = {"gpu_free_percent": 100, "worker_uid": (1 << 31) - 2}


def _within(name: str, key: str, value: Number) -> Number:
    least, most = _LEAST.get(key, 0), _MOST.get(key, inf)
    if not least <= value <= most:  # nor is "not a number"
        limits = f"{least} or more" if most == inf else f"between {least} and {most}"
        raise SpecError(f"setting {name}: {value} is not {limits}", code="bad-setting")
    return value


def _text(name: str, key: str, value: str) -> str:
    if key == "gpu" and value not in ("", "none"):
        raise SpecError(f"setting {name}: {value!r} is neither empty nor none", code="bad-setting")
    if key in ("token", "metrics_token") and not re.fullmatch("[!-~]*", value):  # it travels in a header
        raise SpecError(f"setting {name}: a token is of printable ASCII, without spaces", code="bad-setting")
    return value


def _convert(name: str, key: str, kind: str, raw: Any) -> Any:
    try:
        if kind == "int":
            return _within(name, key, int(raw))
        if kind == "bool":
            return _BOOLS[str(raw).lower()]
        if kind == "float":
            return _within(name, key, float(raw))
        if kind == "Path":
            return Path(str(raw)).absolute()
        return _text(name, key, str(raw))
    except (KeyError, TypeError, ValueError):
        raise SpecError(f"setting {name}: {raw!r} is not of type {kind}", code="bad-setting") from None


def load(environ: Mapping[str, str] | None = None, **overrides: Any) -> Settings:
    """Read the settings. Keyword arguments win over everything.

    Raises:
        SpecError: a value of the wrong type or out of its range, an unknown key, or an unreadable config file.
    """
    env = os.environ if environ is None else environ
    kinds = {f.name: str(f.type) for f in fields(Settings)}
    values: dict[str, Any] = {}
    home = overrides.get("home") or env.get("WOODFROG_HOME") or Settings.home
    config = Path(home) / "config.toml"
    try:
        table = tomllib.loads(config.read_text()) if config.is_file() else {}
    except (OSError, ValueError) as e:
        raise SpecError(f"{config}: {e}", code="bad-config") from None
    for key, value in table.items():
        if key not in kinds:
            raise SpecError(f"{config}: unknown setting {key!r}; known: {', '.join(sorted(kinds))}", code="bad-config")
        values[key] = _convert(key, key, kinds[key], value)
    for key, kind in kinds.items():
        raw = env.get("WOODFROG_" + key.upper())
        if raw is not None:
            values[key] = _convert("WOODFROG_" + key.upper(), key, kind, raw)
    values.update({k: v for k, v in overrides.items() if v is not None})
    return replace(Settings(), **values)
