"""What woodfrog needs of a machine: `probe` looks, `judge` decides, and each failure names its remedy.

`woodfrog doctor` shows the checks; the daemon refuses to start with the same texts (`demand`).

    host = probe(state_dir=settings.home, worker_uid=settings.worker_uid, native=(init,), criu=probe_criu(find))
    demand(judge(host))
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import pwd
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from woodfrog.errors import HostError, WoodfrogError
from woodfrog.linux import meminfo
from woodfrog.linux.descriptors import raise_limit

__all__ = ["Cgroups", "Check", "CriuState", "Host", "demand", "failed", "judge", "probe", "probe_criu"]

OLDEST_KERNEL = (5, 14)
"""mount_setattr with MOUNT_ATTR_NOSYMFOLLOW."""
OLDEST_CRIU = (4, 1)
OLDEST_PYTHON = (3, 11)
MIN_FREE_BYTES = 1 << 30
LOW_FREE_BYTES = 10 << 30
MIN_MEMORY_BYTES = 512 << 20
MIN_OPEN_FILES = 4096
"""CRIU wants more than a thousand for itself."""
PAGE_SIZE = 4096
"""What snapshots are made of. An arm64 kernel may have larger ones."""
MAX_STATE_DIR = 90
"""A Unix socket's path has at most 107 bytes."""
OLDEST_CLOCK = 1_735_689_600.0
"""2025-01-01: no machine that runs this can rightly show an earlier time."""

CAPABILITIES = {
    "chown": 0,
    "dac_override": 1,
    "dac_read_search": 2,
    "fowner": 3,
    "kill": 5,
    "setgid": 6,
    "setuid": 7,
    "net_admin": 12,
    "sys_chroot": 18,
    "sys_ptrace": 19,
    "sys_admin": 21,
}
"""The capabilities the daemon cannot do without (linux/capability.h)."""
CAP_SYS_RESOURCE = 24

# In namespaces of its own, which end with the shell: nothing of this is left on the machine.
TRIAL = r"""
try() {
    name=$1; shift
    if out=$("$@" 2>&1); then echo "$name ok"; else echo "$name no $(echo "$out" | head -n 1)"; fi
}
overlay() {
    mount -t tmpfs woodfrog /tmp && mkdir /tmp/l /tmp/u /tmp/w /tmp/m &&
    mount -t overlay woodfrog -o lowerdir=/tmp/l,upperdir=/tmp/u,workdir=/tmp/w /tmp/m
}
nat() { printf 'table ip t {\nchain c {\ntype nat hook postrouting priority 100\nmasquerade\n}\n}\n' | nft -f -; }
echo namespaces ok
try bridge ip link add wfprobe0 type bridge
try veth ip link add wfprobe1 type veth peer name wfprobe2
try nat nat
try overlay overlay
"""
WITHOUT_USERFAULTFD = "thaws read all memory before the function runs, which takes longer"
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Check:
    """One requirement and how the machine meets it."""

    name: str
    """Stable, for scripts."""
    ok: bool | None
    """None: could not be tried (mostly for want of root)."""
    required: bool
    """False: woodfrog works without it, in the way that `found` or `remedy` says."""
    found: str
    remedy: str = ""
    """What to do; empty when there is nothing to do."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Cgroups:
    """Where a controller can be used: `controllers` maps it to the version of its hierarchy."""

    controllers: Mapping[str, int] = field(default_factory=dict)
    writable: bool = False


@dataclass(frozen=True)
class CriuState:
    path: str = ""
    version: tuple[int, ...] = ()
    error: str = ""
    """Why there is none to use, in one line."""
    remedy: str = ""
    """What to do about it; empty = the usual."""
    signs: bool = False
    """On this arm64 processor its restores hang: its own code signs return addresses."""
    check: str | None = None
    """What `criu check` complains of; empty = nothing, None = not run."""


@dataclass(frozen=True)
class Host:
    """All that `judge` looks at. A test presents any machine by replacing fields. None = could not be found out."""

    system: str
    kernel: str
    machine: str
    uid: int
    capabilities: int
    page_size: int
    checkpoint_restore: bool | None
    userfaultfd: int
    """errno of the system call; 0 = works."""
    seccomp_filter: bool
    seccomp_confined: bool
    """This process is itself under a filter."""
    time_namespace: bool
    trial: Mapping[str, str]
    """`TRIAL`'s answers: step to "" when it works, else the complaint. A step that was not tried is absent."""
    overlay_known: bool
    cgroups: Cgroups
    criu: CriuState
    programs: Mapping[str, str | None]
    ip_forward: bool | None
    ip_forward_writable: bool
    shm: str
    """File system at /dev/shm; empty = not mounted."""
    state_dir: str
    state_dir_problem: str
    free_bytes: int | None
    memory_bytes: int | None
    open_files: int
    """The most descriptors that a process may have; -1 = as many as it likes."""
    python: tuple[int, ...]
    native_missing: tuple[str, ...]
    worker_uid: int
    worker_user: str | None
    """Name of the user that has the worker's uid already."""
    now: float
    installed_at: float | None
    """Modification time of woodfrog's own files."""


def _size(n: int) -> str:
    return f"{n / (1 << 30):.1f} GiB" if n >= 1 << 30 else f"{n >> 20} MiB"


def _dotted(version: Iterable[int]) -> str:
    return ".".join(map(str, version))


def _numbers(text: str) -> tuple[int, ...]:
    match = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(n) for n in match.group().split(".")) if match else ()


def judge(host: Host) -> list[Check]:
    """Every requirement, in the order in which a person would put them right."""
    checks: list[Check] = []

    def add(name: str, ok: bool | None, found: str, remedy: str = "", *, required: bool = True) -> None:
        checks.append(Check(name, ok, required, found, "" if ok else remedy))

    def tried(name: str, step: str, works: str, remedy: str) -> None:
        if step in host.trial:
            complaint = host.trial[step]
            add(name, not complaint, complaint or works, remedy)
        else:
            why = "needs root" if host.uid != 0 else "namespaces do not work"
            add(name, None, f"not tried: {why}")

    add(
        "root",
        host.uid == 0,
        "yes" if host.uid == 0 else f"no, uid {host.uid}",
        "the daemon must run as root: start it with `sudo woodfrog daemon start`",
    )
    lacking = [name for name, bit in CAPABILITIES.items() if not host.capabilities >> bit & 1]
    if host.uid == 0:
        add(
            "capabilities",
            not lacking,
            "all that are needed" if not lacking else "missing " + ", ".join("CAP_" + n.upper() for n in lacking),
            "run woodfrog on the host itself, or in a container started with `--privileged`",
        )
    add(
        "cap-sys-resource",
        bool(host.capabilities >> CAP_SYS_RESOURCE & 1),
        "held" if host.capabilities >> CAP_SYS_RESOURCE & 1 else "not held",
        "nothing to do: captures then run as the worker's uid",
        required=False,
    )
    add(
        "kernel",
        host.system == "Linux" and _numbers(host.kernel)[:2] >= OLDEST_KERNEL,
        f"{host.system} {host.kernel} {host.machine}",
        f"woodfrog needs Linux {_dotted(OLDEST_KERNEL)} or newer: upgrade the kernel",
    )
    add(
        "checkpoint-restore",
        host.checkpoint_restore,
        {True: "yes", False: "not in this kernel", None: "cannot tell"}[host.checkpoint_restore],
        "every start is a cold one: use a kernel built with CONFIG_CHECKPOINT_RESTORE=y (every distribution's own"
        " kernel is)",
    )
    add(
        "page-size",
        host.page_size == PAGE_SIZE,
        f"{host.page_size >> 10} KiB",
        "every start is a cold one: use a kernel whose memory pages have 4 KiB (of arm64's, the ones without 16k or 64k"
        " in their names)",
    )
    if host.userfaultfd == 0:
        add("userfaultfd", True, "yes")
    elif host.userfaultfd == errno.ENOSYS:
        add(
            "userfaultfd",
            False,
            "not in this kernel",
            f"{WITHOUT_USERFAULTFD}: use a kernel built with CONFIG_USERFAULTFD=y (every distribution's own kernel is)",
            required=False,
        )
    else:
        add(
            "userfaultfd",
            False if host.uid == 0 else None,
            f"refused: {os.strerror(host.userfaultfd)}",
            f"{WITHOUT_USERFAULTFD}: allow the system call, which a container's seccomp profile forbids (start the "
            "container with `--privileged`)",
            required=False,
        )
    if host.seccomp_confined:
        add(
            "seccomp-profile",
            False,
            "woodfrog itself runs under a seccomp filter",
            "CRIU cannot freeze what has a filter of its own then, so every start is a cold one: run woodfrog on the"
            " host itself, or in a container started with `--privileged` or `--security-opt seccomp=unconfined`",
        )
    add(
        "seccomp",
        host.seccomp_filter,
        "yes" if host.seccomp_filter else "no filters in this kernel",
        "use a kernel built with CONFIG_SECCOMP_FILTER=y",
    )
    if host.uid == 0:
        complaint = host.trial.get("namespaces", "not tried")
        add(
            "namespaces",
            not complaint,
            complaint or "pid, mnt, ipc, uts, net",
            "run woodfrog on the host itself, or in a container started with `--privileged`;"
            " the kernel needs CONFIG_NAMESPACES, CONFIG_PID_NS and CONFIG_NET_NS",
        )
    else:
        add("namespaces", None, "not tried: needs root")
    add(
        "time-namespace",
        host.time_namespace,
        "yes" if host.time_namespace else "not in this kernel",
        "only snapshots made on another machine need CONFIG_TIME_NS=y",
        required=False,
    )
    if "overlay" not in host.trial and host.overlay_known:
        add("overlayfs", True, "known to the kernel")
    else:
        tried("overlayfs", "overlay", "yes", "load the module with `modprobe overlay` (CONFIG_OVERLAY_FS)")
    _judge_cgroups(host, add)
    _judge_criu(host, add)
    for program, package in (("ip", "iproute2"), ("nft", "nftables")):
        path = host.programs.get(program)
        add(program, path is not None, path or "not found", f"install {package} (`apt-get install {package}`)")
    if host.programs.get("ip"):
        tried("bridge", "bridge", "yes", "load the module with `modprobe bridge` (CONFIG_BRIDGE)")
        tried("veth", "veth", "yes", "load the module with `modprobe veth` (CONFIG_VETH)")
    if host.programs.get("nft"):
        tried("nat", "nat", "yes", "load the modules with `modprobe nft_masq nft_chain_nat` (CONFIG_NFT_MASQ)")
    # The daemon turns forwarding on by itself, so only a setting that nobody can change is a failure.
    add(
        "ip-forwarding",
        bool(host.ip_forward or (host.uid == 0 and host.ip_forward_writable)) or (None if host.uid else False),
        {True: "on", False: "off (the daemon turns it on)", None: "cannot tell"}[host.ip_forward],
        "sandboxes reach no network until `sysctl -w net.ipv4.ip_forward=1`",
        required=False,
    )
    add(
        "shm",
        host.shm == "tmpfs",
        host.shm or "not mounted",
        "mount a tmpfs there: `mount -t tmpfs tmpfs /dev/shm`",
    )
    add(
        "state-dir",
        not host.state_dir_problem,
        host.state_dir_problem or host.state_dir,
        f"give {host.state_dir} to root alone (`chown root: {host.state_dir} && chmod go-w {host.state_dir}`),"
        " or name another directory in WOODFROG_HOME",
    )
    if host.free_bytes is None:
        add("disk", None, "cannot tell")
    else:
        enough = host.free_bytes >= MIN_FREE_BYTES
        add(
            "disk",
            host.free_bytes >= LOW_FREE_BYTES,
            f"{_size(host.free_bytes)} free for {host.state_dir}",
            f"{'snapshots soon fill that' if enough else f'woodfrog needs {_size(MIN_FREE_BYTES)}'}:"
            " free some space, or name another directory in WOODFROG_HOME",
            required=not enough,
        )
    add(
        "memory",
        None if host.memory_bytes is None else host.memory_bytes >= MIN_MEMORY_BYTES,
        "cannot tell" if host.memory_bytes is None else f"{_size(host.memory_bytes)} available",
        "functions will run out of memory: stop other programs",
        required=False,
    )
    add(
        "open-files",
        host.open_files < 0 or host.open_files >= MIN_OPEN_FILES,
        "no limit" if host.open_files < 0 else f"at most {host.open_files} a process",
        f"containers and CRIU need {MIN_OPEN_FILES}: raise the hard limit (ulimit -Hn, LimitNOFILE= of the service)",
    )
    add(
        "python",
        host.python[:2] >= OLDEST_PYTHON,
        _dotted(host.python),
        f"install Python {_dotted(OLDEST_PYTHON)} or newer",
    )
    add(
        "native",
        not host.native_missing,
        "built" if not host.native_missing else "missing " + ", ".join(host.native_missing),
        "build them with `make native` in the clone, or install woodfrog again where a C compiler is",
    )
    add(
        "worker-uid",
        host.worker_user is None,
        f"{host.worker_uid} is free" if host.worker_user is None else f"{host.worker_uid} is {host.worker_user!r}",
        "user code would own that user's files: set WOODFROG_WORKER_UID (worker_uid in config.toml) to an unused uid",
    )
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(host.now))
    # A day of grace: files may carry the time of another zone or machine.
    behind = host.now < OLDEST_CLOCK or (host.installed_at is not None and host.now < host.installed_at - 86400)
    add(
        "clock",
        not behind,
        f"{when}{', behind the date of its own files' if behind else ''}",
        "set the clock (`timedatectl set-ntp true`): logs, results and snapshots carry its time",
        required=False,
    )
    return checks


class _Add(Protocol):
    def __call__(self, name: str, ok: bool | None, found: str, remedy: str = "", *, required: bool = True) -> None: ...


def _judge_cgroups(host: Host, add: _Add) -> None:
    has = host.cgroups.controllers
    lacking = [c for c in ("memory", "pids") if c not in has]
    by_version = {v: sorted(c for c in has if has[c] == v) for v in sorted(set(has.values()))}
    found = "; ".join(f"v{v}: {', '.join(names)}" for v, names in by_version.items()) or "none"
    if lacking:
        add(
            "cgroups",
            False,
            f"no {' and no '.join(lacking)} controller (found {found})",
            "mount cgroup v2 at /sys/fs/cgroup with its memory and pids controllers, or v1's",
        )
    elif not host.cgroups.writable:
        add(
            "cgroups",
            None if host.uid else False,
            f"{found}, read-only",
            "run woodfrog on the host itself, or in a container started with `--privileged --cgroupns=host`",
        )
    else:
        add("cgroups", True, found)
    add(
        "cgroup-cpu",
        "cpu" in has,
        f"v{has['cpu']}" if "cpu" in has else "no cpu controller",
        "`cpu=` of a function has no effect without it",
        required=False,
    )


def _judge_criu(host: Host, add: _Add) -> None:
    remedy = host.criu.remedy or (
        f"install CRIU {_dotted(OLDEST_CRIU)} or newer, or run `make setup`; WOODFROG_CRIU names one elsewhere"
    )
    criu = host.criu
    if criu.version and criu.version[:2] < OLDEST_CRIU:
        where = f" at {criu.path}" if criu.path else ""
        add("criu", False, f"{_dotted(criu.version)}{where} is too old", remedy)
    elif criu.error or not criu.path:
        add("criu", False, criu.error or "not found", remedy)
    else:
        add("criu", True, f"{_dotted(criu.version)} at {criu.path}")
        if criu.signs:
            add(
                "criu-pointers",
                False,
                "this CRIU's restores hang where the processor authenticates pointers",
                "every start is a cold one: boot the kernel with arm64.nopauth, or build CRIU without"
                " -mbranch-protection and name it in WOODFROG_CRIU",
            )
        if criu.check is None:
            add("criu-check", None, "not tried: needs root")
        else:
            add(
                "criu-check",
                not criu.check,
                criu.check or "looks good",
                "the kernel lacks what CRIU names: see `criu check` and docs/failure-modes.md",
            )


COLD_ONLY = frozenset({"checkpoint-restore", "criu-pointers", "page-size", "seccomp-profile"})
"""What the daemon runs without: calls are answered, each by a cold start where no snapshot can be made or thawed."""


def failed(checks: Iterable[Check]) -> list[Check]:
    """The required checks that are not met."""
    return [c for c in checks if c.required and c.ok is False]


def demand(checks: Iterable[Check]) -> None:
    """Return when every required check is met, but for those that only freezing needs.

    Raises:
        HostError: the first unmet one and its remedy in the message, all of them in `fields["checks"]`.
    """
    bad = [c for c in failed(checks) if c.name not in COLD_ONLY]
    if bad:
        first = bad[0]
        more = f" ({len(bad) - 1} more: see `woodfrog doctor`)" if len(bad) > 1 else ""
        raise HostError(
            f"{first.name}: {first.found}; {first.remedy}{more}",
            code=f"host-{first.name}",
            remedy=first.remedy,
            checks=[c.to_dict() for c in bad],
        )


# --- looking ---------------------------------------------------------------------------------------------------------


class _Criu(Protocol):
    @property
    def path(self) -> Path: ...
    @property
    def version(self) -> tuple[int, int, int]: ...
    @property
    def signs(self) -> bool: ...


def probe_criu(find: Callable[[], _Criu], *, remedy: str = "", check: bool = True, timeout: float = 30.0) -> CriuState:
    """Find CRIU with `find` and, as root, let it check the kernel (about 50 ms).

    `find` raises a `WoodfrogError` when there is none to use; its fields may carry `path` and `version`, and its
    message may end in `remedy`.
    """
    try:
        criu = find()
    except WoodfrogError as e:
        raw = e.fields.get("version") or ()
        version = _numbers(raw) if isinstance(raw, str) else tuple(int(n) for n in raw)
        return CriuState(
            path=str(e.fields.get("path") or ""),
            version=version,
            error=e.message.removesuffix(remedy).rstrip(": "),
            remedy=remedy,
        )
    complaint: str | None = None
    if check and os.geteuid() == 0:
        complaint = _criu_check(str(criu.path), timeout)
    return CriuState(str(criu.path), tuple(criu.version), signs=criu.signs, check=complaint)


def _criu_check(path: str, timeout: float) -> str:
    try:
        done = subprocess.run(
            [path, "check"], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=timeout
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        return f"`criu check` did not run: {e}"
    if done.returncode == 0:
        return ""
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("Error")] or lines
    return errors[0] if errors else f"`criu check` ended with status {done.returncode}"


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return None


def probe_checkpoint_restore(proc: Path = Path("/proc")) -> bool | None:
    """Whether the kernel has CONFIG_CHECKPOINT_RESTORE, by a file that only such a kernel has."""
    if not (proc / "sys/kernel/pid_max").exists():
        return None
    return (proc / "sys/kernel/ns_last_pid").exists()


def probe_userfaultfd() -> int:
    """errno of userfaultfd(2), 0 when it works."""
    number = {"x86_64": 323, "aarch64": 282}.get(platform.machine())
    if number is None:
        return errno.ENOSYS
    libc = ctypes.CDLL(None, use_errno=True)
    user_mode_only = 1
    for flags in (os.O_CLOEXEC, os.O_CLOEXEC | user_mode_only):
        fd = libc.syscall(number, flags)
        if fd >= 0:
            os.close(fd)
            return 0
    return ctypes.get_errno()


def parse_cgroups(mountinfo: str, read: Callable[[str], str | None], writable: Callable[[str], bool]) -> Cgroups:
    """Controllers by the version of their hierarchy, from the text of /proc/self/mountinfo."""
    known = {"cpu", "memory", "pids", "freezer", "cpuset"}
    found: dict[str, int] = {}
    points: list[str] = []
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        if not right:
            continue
        kind, _, rest = right.partition(" ")
        point = left.split(" ")[4]
        if kind == "cgroup":
            here = known & set(rest.split(" ")[-1].split(","))
            version = 1
        elif kind == "cgroup2":
            here = known & set((read(point + "/cgroup.controllers") or "").split())
            version = 2
        else:
            continue
        if here:
            found.update(dict.fromkeys(here, version))
            points.append(point)
    return Cgroups(found, bool(points) and all(writable(p) for p in points))


def _trial(timeout: float = 30.0) -> dict[str, str]:
    command = ["unshare", "--pid", "--fork", "--mount", "--ipc", "--uts", "--net", "sh", "-c", TRIAL]
    try:
        done = subprocess.run(
            command,
            env={"PATH": SYSTEM_PATH, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
        )
    except FileNotFoundError:
        return {"namespaces": "the program unshare (util-linux) is missing"}
    except subprocess.TimeoutExpired:
        return {"namespaces": f"no answer within {timeout:.0f} s"}
    answers: dict[str, str] = {}
    for line in done.stdout.splitlines():
        name, word, complaint = (*line.split(" ", 2), "")[:3]
        answers[name] = "" if word == "ok" else complaint.strip() or "does not work"
    if "namespaces" not in answers:
        answers["namespaces"] = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
    return answers


def _overlay_known(kernel: str) -> bool:
    if "overlay" in (_read("/proc/filesystems") or "").split():
        return True
    modules = Path("/lib/modules", kernel)
    return any("/overlay.ko" in (_read(str(modules / name)) or "") for name in ("modules.dep", "modules.builtin"))


def probe_state_dir(path: Path, *, owner: int = 0) -> str:
    """What is wrong with the state directory; empty = nothing. It need not exist yet."""
    if len(os.fsencode(path)) > MAX_STATE_DIR:
        return f"{path}: the path has over {MAX_STATE_DIR} bytes, too long for the sockets in it"
    try:
        info = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        parent = next((p for p in path.parents if p.exists()), Path("/"))
        if not parent.is_dir():
            return f"{parent} is not a directory"
        return "" if os.geteuid() != owner or os.access(parent, os.W_OK) else f"{parent} is read-only"
    except OSError as e:
        return f"{path}: {e.strerror}"
    if not path.is_dir():
        return f"{path} is not a directory"
    if info.st_uid != owner:
        return f"{path} belongs to uid {info.st_uid}"
    if info.st_mode & 0o022:
        return f"{path} can be written by others than root (mode {info.st_mode & 0o777:04o})"
    if os.geteuid() == owner and not os.access(path, os.W_OK):
        return f"{path} is read-only"
    return ""


def _free_bytes(path: Path) -> int | None:
    for place in (path, *path.parents):
        try:
            return shutil.disk_usage(place).free
        except FileNotFoundError:
            continue
        except OSError:
            return None
    return None


def _open_files() -> int:
    raise_limit()  # as the daemon does
    return resource.getrlimit(resource.RLIMIT_NOFILE)[1]


def _available_memory() -> int | None:
    try:
        return meminfo.machine().available
    except (OSError, ValueError):
        return None


def _filesystem_at(point: str, mountinfo: str) -> str:
    kind = ""
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        if left.split(" ")[4:5] == [point]:
            kind = right.partition(" ")[0]
    return kind


def _user_of(uid: int) -> str | None:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return None


def _capabilities() -> int:
    match = re.search(r"^CapEff:\s+([0-9a-f]+)", _read("/proc/self/status") or "", re.MULTILINE)
    return int(match.group(1), 16) if match else 0


def _confined() -> bool:
    return re.search(r"^Seccomp:\s+[12]$", _read("/proc/self/status") or "", re.MULTILINE) is not None


def probe(*, state_dir: Path, worker_uid: int, native: Iterable[Path], criu: CriuState) -> Host:
    """Look at this machine. Changes nothing that outlives it; takes some 50 ms as root, and never raises.

    Args:
        state_dir: the daemon's state directory, which need not exist.
        worker_uid: uid that user code will run as.
        native: the compiled helper programs that must be there.
        criu: what `probe_criu` found.
    """
    mountinfo = _read("/proc/self/mountinfo") or ""
    kernel = platform.release()
    forward = _read("/proc/sys/net/ipv4/ip_forward")
    own = Path(__file__)
    search = f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}"
    return Host(
        system=platform.system(),
        kernel=kernel,
        machine=platform.machine(),
        uid=os.geteuid(),
        capabilities=_capabilities(),
        page_size=os.sysconf("SC_PAGE_SIZE"),
        checkpoint_restore=probe_checkpoint_restore(),
        userfaultfd=probe_userfaultfd(),
        seccomp_filter="errno" in (_read("/proc/sys/kernel/seccomp/actions_avail") or "").split(),
        seccomp_confined=_confined(),
        time_namespace=Path("/proc/self/ns/time").exists(),
        trial=_trial() if os.geteuid() == 0 else {},
        overlay_known=_overlay_known(kernel),
        cgroups=parse_cgroups(mountinfo, _read, lambda p: os.access(p, os.W_OK)),
        criu=criu,
        programs={name: shutil.which(name, path=search) for name in ("ip", "nft")},
        ip_forward=None if forward is None else forward.strip() == "1",
        ip_forward_writable=os.access("/proc/sys/net/ipv4/ip_forward", os.W_OK),
        shm=_filesystem_at("/dev/shm", mountinfo),
        state_dir=str(state_dir),
        state_dir_problem=probe_state_dir(state_dir),
        free_bytes=_free_bytes(state_dir),
        memory_bytes=_available_memory(),
        open_files=_open_files(),
        python=tuple(sys.version_info[:3]),
        native_missing=tuple(p.name for p in native if not os.access(p, os.X_OK)),
        worker_uid=worker_uid,
        worker_user=_user_of(worker_uid),
        now=time.time(),
        installed_at=own.stat().st_mtime if own.exists() else None,
    )
