"""What a sandbox's file system is made of, as a pure computation.

A plan is a tuple of operations that the sandbox's init carries out in order. It comes in two parts:
`base_plan` needs nothing of the function that will run and is carried out when a sandbox is prepared;
`root_plan` is on the path of every start and is short.

Nothing here touches the machine: what the host looks like comes in as a `HostRoot`
(`woodfrog.linux.skeleton.read_host_root`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Literal

from woodfrog.errors import SandboxError

__all__ = [
    "APP",
    "CRIU_KDAT",
    "HOME",
    "MASKED",
    "Beneath",
    "DeviceNode",
    "HostEntry",
    "HostRoot",
    "Op",
    "RootPlan",
    "RootRequest",
    "SkeletonEntry",
    "VolumeMount",
    "base_plan",
    "etc_files",
    "is_visible",
    "root_plan",
    "skeleton_entries",
]

OWN = frozenset({"proc", "sys", "dev", "run", "tmp", "etc"})
"""Top-level directories every sandbox has of its own."""
MASKED = frozenset({"app", "home", "root", "boot", "media", "mnt", "lost+found"})
"""Top-level directories of the host that nobody sees inside: homes and secrets, and where the code is."""
OPEN = ("app", "home", "media", "mnt", "root", "run")
"""Those in which user code may make what it likes, as in `/`."""
PROC_MASKS = (
    "/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
    "/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats", "/proc/vmallocinfo",
    "/sys/firmware", "/sys/devices/virtual/powercap", "/sys/kernel/notes",
)  # fmt: skip
"""What tells about the host and helps nobody inside."""
PROC_READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
NS_LAST_PID = "/proc/sys/kernel/ns_last_pid"
VAR_TMP = "/.var-tmp"
"""Where /var/tmp's files live: /var itself is the host's, read-only."""
APP = "/app"
"""Where the user's code is, and where it starts."""
HOME = "/root"
"""As on Modal: programs name it, their caches' volumes lie below it."""
CRIU_KDAT = "/run/criu.kdat"
"""Where CRIU, as root, looks for what it knows of the kernel. It would itself write it there on a tmpfs only."""
MOST_BENEATH = 32
"""So many descriptors init takes at once."""
DEVICES = (("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0))


@dataclass(frozen=True, slots=True)
class Op:
    """One operation of init, by name; see the table in native/init.c."""

    name: str
    args: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if any("\0" in a for a in (self.name, *self.args)):
            raise SandboxError(f"a NUL byte in the sandbox operation {self.name}", code="sandbox-plan")


@dataclass(frozen=True, slots=True)
class HostEntry:
    """A top-level directory or symlink of the host."""

    name: str
    kind: Literal["directory", "symlink"]
    target: str = ""


@dataclass(frozen=True, slots=True)
class HostRoot:
    """What of the host decides how a root is made."""

    entries: tuple[HostEntry, ...]
    masks: tuple[tuple[str, bool], ...] = ()
    """The existing ones of `PROC_MASKS`, and whether each is a directory."""
    read_only: tuple[str, ...] = ()
    ns_last_pid: bool = True
    var_tmp: bool = True
    passwd: str = ""
    group: str = ""


@dataclass(frozen=True, slots=True)
class VolumeMount:
    """A host directory at a path inside, writable unless said otherwise."""

    source: Path
    target: str
    read_only: bool = False
    under: str = ""
    """The host's directory that has to be laid over because it lacks the mount point; see `skeleton.host_above`."""
    parts: tuple[str, ...] = ()
    """The way to the directory in `source` that is mounted. Others write there: no link on it is followed."""


@dataclass(frozen=True, slots=True)
class DeviceNode:
    """A device of the host, at `/dev/<name>` inside; the name may be a path."""

    source: Path
    name: str
    directory: bool = False


@dataclass(frozen=True, slots=True)
class SkeletonEntry:
    """One directory, symlink or empty file of the lowest layer."""

    path: str
    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    link: str = ""
    file: bool = False


@dataclass(frozen=True, slots=True)
class Beneath:
    """A directory that others may put links, and other directories, on the way to: none of `parts` may be a link.

    Args:
        open: each directory on the way, and this one, must be open to all users.
        recursive: with what is mounted below it.
    """

    source: Path
    parts: tuple[str, ...]
    open: bool = False
    recursive: bool = False


@dataclass(frozen=True, slots=True)
class RootRequest:
    """What one sandbox's root is to hold.

    Args:
        scratch: an empty host directory; the sandbox mounts its private tmpfs there, in its own namespace only.
        skeleton: the lowest layer, from `woodfrog.linux.skeleton.make_skeleton`.
        layers: file system layers of snapshots, the topmost first.
        shm_layer: what /dev/shm holds at first; copied.
        code: layer with the user's code in its directory `app`. What the code writes there stays its own.
        prefixes: directories needed at their own path, read-only (interpreter, virtual environment, woodfrog itself);
            where a part of a path is a symlink, give the resolved path too.
        named: of prefixes that others than root have named: where each is.
        hidden: host directories that appear empty inside (woodfrog's state).
        etc: files of /etc that are the sandbox's own: name and text; see `etc_files`.
        kdat_dir: host directory on tmpfs, bound to /run/criu, where CRIU as another user keeps its kernel features
            (with `XDG_RUNTIME_DIR=/run/criu`).
        kdat_file: the same for CRIU as root, made once (`CRIU_KDAT` in a sandbox with a tmpfs on /run): without it,
            every restore probes the kernel anew, for 50 ms.
        devices: what `/dev` holds beside what every sandbox has.
        disk_bytes: how much the sandbox may write; it is memory, and counts against the memory limit.
    """

    scratch: Path
    skeleton: Path
    disk_bytes: int
    hostname: str
    worker_uid: int
    layers: tuple[Path, ...] = ()
    shm_layer: Path | None = None
    code: Path | None = None
    prefixes: tuple[Path, ...] = ()
    named: tuple[tuple[Path, Beneath], ...] = ()
    volumes: tuple[VolumeMount, ...] = ()
    hidden: tuple[Path, ...] = ()
    etc: tuple[tuple[str, str], ...] = ()
    kdat_dir: Path | None = None
    kdat_file: Path | None = None
    devices: tuple[DeviceNode, ...] = ()
    network: bool = True
    """False takes the prepared network device away (`block_network`)."""


@dataclass(frozen=True, slots=True)
class RootPlan:
    """The operations that turn a prepared sandbox into one with this root."""

    ops: tuple[Op, ...]
    shm_layer: Path | None = None
    beneath: tuple[Beneath, ...] = ()
    """Directories in others' ones that are mounted: the operations' `@0`, `@1`, …"""
    volumes: tuple[str, ...] = ()
    """Where they are mounted."""


def _mkdir(path: str | PurePosixPath, mode: int = 0o755, uid: int = 0, gid: int = 0) -> Op:
    return Op("mkdir", (str(path), f"{mode:o}", str(uid), str(gid)))


def _bind(source: str | PurePosixPath, target: str | PurePosixPath, attributes: str) -> Op:
    return Op("bind", (str(source), str(target), attributes))


def _mount(kind: str, target: str | PurePosixPath, flags: str, options: str = "") -> Op:
    return Op("mount", (kind, str(target), flags, options))


def _below(path: PurePosixPath, above: PurePosixPath) -> bool:
    return path != above and above in path.parents


def _absolute(path: Path | str, what: str) -> PurePosixPath:
    pure = PurePosixPath(path)
    if not pure.is_absolute() or ".." in pure.parts:
        raise SandboxError(f"{what} {path}: not an absolute path without '..'", code="sandbox-plan")
    return pure


def is_visible(path: PurePosixPath, host: HostRoot, hidden: tuple[PurePosixPath, ...]) -> bool:
    """Whether a host path can be seen inside without a bind of its own."""
    if any(path == h or h in path.parents for h in hidden) or len(path.parts) < 2:
        return False
    top = path.parts[1]
    if top in OWN or top in MASKED or (host.var_tmp and path.parts[1:3] == ("var", "tmp")):
        return False
    return any(e.name == top and e.kind == "directory" for e in host.entries)


def skeleton_entries(host: HostRoot, prefixes: tuple[Path, ...], worker_uid: int) -> tuple[SkeletonEntry, ...]:
    """The lowest layer: mount points, masked directories, and the writable places, all empty.

    User code may make files and directories in `/`, `/run`, its home and others (they are its group's, sticky) but
    cannot rename or replace what is there: init and CRIU, which have capabilities, resolve paths below them.
    """
    gid = worker_uid
    entries = {
        "/": SkeletonEntry("/", 0o1775, 0, gid),
        **{f"/{n}": SkeletonEntry(f"/{n}") for n in ("proc", "sys", "dev", "etc")},
        **{f"/{n}": SkeletonEntry(f"/{n}", 0o1775, 0, gid) for n in OPEN},
        "/run/lock": SkeletonEntry("/run/lock", 0o1777),
        "/run/woodfrog": SkeletonEntry("/run/woodfrog"),
        "/run/criu": SkeletonEntry("/run/criu"),
        CRIU_KDAT: SkeletonEntry(CRIU_KDAT, 0o600, file=True),
        "/tmp": SkeletonEntry("/tmp", 0o1777),
        VAR_TMP: SkeletonEntry(VAR_TMP, 0o1777),
    }
    for entry in host.entries:
        path = f"/{entry.name}"
        if path in entries or entry.name == "lost+found":
            continue
        entries[path] = SkeletonEntry(path, link=entry.target) if entry.kind == "symlink" else SkeletonEntry(path)
    for prefix in prefixes:
        pure = _absolute(prefix, "prefix")
        if is_visible(pure, host, ()):
            continue
        for part in (*reversed(pure.parents), pure):
            entries.setdefault(str(part), SkeletonEntry(str(part)))
    return tuple(entries[k] for k in sorted(entries))


def etc_files(
    host: HostRoot, *, hostname: str, worker_uid: int, resolv_conf: str = "", address: str = ""
) -> tuple[tuple[str, str], ...]:
    """The sandbox's own files of /etc: hostname, hosts, resolv.conf, passwd, group."""

    def without_ours(text: str) -> str:
        lines = [x for x in text.splitlines() if x and x.split(":")[0] != "woodfrog"]
        return "".join(f"{x}\n" for x in lines)

    hosts = f"127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n{address or '127.0.1.1'}\t{hostname}\n"
    return (
        ("hostname", f"{hostname}\n"),
        ("hosts", hosts),
        ("resolv.conf", resolv_conf),
        (
            "passwd",
            f"{without_ours(host.passwd)}woodfrog:x:{worker_uid}:{worker_uid}:woodfrog:{HOME}:/bin/sh\n",
        ),
        ("group", f"{without_ours(host.group)}woodfrog:x:{worker_uid}:\n"),
    )


@lru_cache(maxsize=8)
def base_plan(scratch: Path, host: HostRoot, worker_uid: int, shm_bytes: int | None = None) -> tuple[Op, ...]:
    """/proc, /sys, /dev and /run/woodfrog, made below `scratch` to be moved into the root later."""
    s = _absolute(scratch, "scratch")
    uid = worker_uid
    ops = [_mount("tmpfs", s, "nosuid,nodev", "mode=0700,size=64m")]
    ops += [_mkdir(s / n) for n in ("disk", "root", "proc", "sys", "dev", "run", "etc", "empty", "mask")]

    ops.append(_mount("proc", s / "proc", "nosuid,nodev,noexec"))
    ops.append(_mount("sysfs", s / "sys", "ro,nosuid,nodev,noexec"))
    for path, is_directory in host.masks:
        source = str(s / "empty") if is_directory else "/dev/null"
        ops.append(_bind(source, f"{s}{path}", "ro,nosuid,noexec"))
    for path in host.read_only:
        ops.append(_bind(f"{s}{path}", f"{s}{path}", "ro,rec"))
    if host.ns_last_pid and "/proc/sys" in host.read_only:
        # What CRIU writes where it cannot choose a pid in clone3.
        ops.append(_bind(f"{s}{NS_LAST_PID}", f"{s}{NS_LAST_PID}", "rw"))

    dev = s / "dev"
    ops.append(_mount("tmpfs", dev, "nosuid,noexec", "mode=0755,size=64k"))
    for name, major, minor in DEVICES:
        ops.append(Op("mknod", (str(dev / name), "c", "666", str(major), str(minor), "0", "0")))
    for name, target in (
        ("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0"), ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"), ("ptmx", "pts/ptmx"),
    ):  # fmt: skip
        ops.append(Op("symlink", (target, str(dev / name))))
    ops += [_mkdir(dev / "pts"), _mkdir(dev / "shm")]
    ops.append(_mount("devpts", dev / "pts", "nosuid,noexec", "newinstance,ptmxmode=0666,mode=0620,gid=5"))
    size = f",size={shm_bytes}" if shm_bytes else ""
    ops.append(_mount("tmpfs", dev / "shm", "nosuid,nodev", f"mode=1777{size}"))

    run = s / "run"
    ops.append(_mount("tmpfs", run, "nosuid,nodev,noexec", "mode=0711,size=64m"))
    ops += [_mkdir(run / "worker", 0o700, uid, uid), _mkdir(run / "img", 0o700), _mkdir(run / "criu", 0o700)]
    for name in ("stdout", "stderr"):
        ops.append(Op("mknod", (str(run / name), "p", "600", "0", "0", str(uid), str(uid))))
    ops.append(Op("ifup", ("lo",)))
    return tuple(ops)


def _overlay_path(path: PurePosixPath | Path) -> str:
    text = str(path)
    for character in ("\\", ":", ","):
        text = text.replace(character, "\\" + character)
    return text


def _overlay(target: PurePosixPath, lower: list[PurePosixPath | Path], flags: str, rest: str) -> Op:
    # Layers are copied from one upper directory to another host's store: each must be whole in itself.
    # xino: one device number for the mount and its files, or CRIU takes the path of a bound Unix socket for deleted.
    options = f"lowerdir={':'.join(map(_overlay_path, lower))}{rest},redirect_dir=off,metacopy=off,index=off,xino=on"
    if len(options) > 4000:
        raise SandboxError(
            f"{len(lower)} file system layers are too many for one mount; capture the function anew",
            code="sandbox-plan",
        )
    return _mount("overlay", target, flags, options)


@lru_cache(maxsize=32)
def _own_paths(
    s: PurePosixPath, prefixes: tuple[Path, ...], hidden: tuple[Path, ...], host: HostRoot
) -> tuple[tuple[Op, ...], tuple[Op, ...]]:
    """What makes the masks of hidden directories, and what binds them and the prefixes, in the new root."""
    away = tuple(_absolute(h, "hidden directory") for h in hidden)
    # A mask with a needed prefix below holds the mount point for it: each mask has a directory of its own.
    needed = sorted({_absolute(p, "prefix") for p in prefixes}, key=lambda p: (len(p.parts), str(p)))
    bound = [p for p in needed if not is_visible(p, host, away)]
    bound = [p for p in bound if not any(_below(p, q) and not _between(p, q, away) for q in bound)]
    masks: dict[PurePosixPath, PurePosixPath] = {}
    masking, binding = [], []
    for index, path in enumerate(away):
        if not (is_visible(path, host, ()) or any(q == path or _below(path, q) for q in bound)):
            continue
        masks[path] = s / "mask" / str(index)
        masking.append(_mkdir(masks[path]))
        masking += [_mkdir(masks[path] / p.relative_to(path)) for p in bound if _below(p, path)]
    for path in sorted({*masks, *bound}, key=lambda p: (len(p.parts), str(p))):
        if path in masks:
            binding.append(_bind(masks[path], path, "ro,nosuid,nodev,noexec"))
        else:
            if not any(_below(path, m) for m in masks):
                binding.append(_mkdir(path))
            binding.append(_bind(path, path, "ro,nosuid,nodev,rec"))
    return tuple(masking), tuple(binding)


def root_plan(request: RootRequest, host: HostRoot) -> RootPlan:
    """The operations that make the root, and make it the only one.

    Raises:
        SandboxError: a path that is not absolute, or would cover what the sandbox itself needs.
    """
    s = _absolute(request.scratch, "scratch")
    gid = request.worker_uid
    disk = s / "disk"
    ops = [
        _mount("tmpfs", disk, "nosuid,nodev", f"mode=0700,size={request.disk_bytes}"),
        # The merged root has the upper directory's owner and mode.
        _mkdir(disk / "upper", 0o1775, 0, gid),
        _mkdir(disk / "work"),
        _overlay(
            s / "root",
            # The code's layer is the lowest: the directory it is in has the skeleton's owner and mode.
            [*request.layers, request.skeleton, *([request.code] if request.code is not None else [])],
            "nosuid,nodev",
            f",upperdir={_overlay_path(disk / 'upper')},workdir={_overlay_path(disk / 'work')}",
        ),
        Op("hold", (str(disk / "upper"),)),
    ]
    ops += [Op("write", (str(s / "etc" / name), "644", "0", "0", text)) for name, text in sorted(request.etc)]
    masking, binding = _own_paths(s, request.prefixes, request.hidden, host)
    ops += masking
    laying = []
    for index, under in enumerate(sorted({v.under for v in request.volumes if v.under})):
        points = s / "mask" / f"under-{index}"
        inside = [_user_target(v.target, "volume").relative_to(under) for v in request.volumes if v.under == under]
        ops += [_mkdir(points), *(_mkdir(points / p) for p in inside)]
        laying.append(_overlay(_absolute(under, "directory"), [points, PurePosixPath(under)], "ro,nosuid,nodev", ""))
    ops.append(Op("enter", (str(s / "root"),)))
    for entry in host.entries:
        if entry.kind == "directory" and entry.name not in OWN and entry.name not in MASKED:
            ops.append(_bind(f"/{entry.name}", f"/{entry.name}", "ro,nosuid,nodev,rec"))
    ops += laying
    if request.etc:
        # Laid over, not bound over: /etc/resolv.conf is often a symlink into /run.
        ops.append(_overlay(PurePosixPath("/etc"), [s / "etc", PurePosixPath("/etc")], "ro,nosuid,nodev", ""))
    else:
        ops.append(_bind("/etc", "/etc", "ro,nosuid,nodev,rec"))
    if host.var_tmp:
        ops.append(_bind(f"={VAR_TMP}", "/var/tmp", "nosuid,nodev"))
    ops += [Op("move", (str(s / n), f"/{n}")) for n in ("proc", "sys", "dev")]
    for device in request.devices:
        target = PurePosixPath("/dev") / device.name
        if target.parent != PurePosixPath("/dev"):
            ops.append(_mkdir(target.parent))
        ops.append(_mkdir(target) if device.directory else Op("touch", (str(target),)))
        ops.append(_bind(_absolute(device.source, "device"), target, "nosuid,noexec"))
    ops.append(Op("move", (str(s / "run"), "/run/woodfrog")))
    if request.kdat_dir is not None:
        ops.append(_bind(_absolute(request.kdat_dir, "kdat directory"), "/run/criu", "nosuid,nodev,noexec"))
    if request.kdat_file is not None:
        ops.append(_bind(_absolute(request.kdat_file, "kdat file"), CRIU_KDAT, "ro,nosuid,nodev,noexec"))

    beneath: list[Beneath] = []
    named = {str(prefix): where for prefix, where in request.named}
    for op in binding:
        if op.name == "bind" and op.args[0] == op.args[1] and op.args[1] in named:
            op = Op("bind", (f"@{len(beneath)}", *op.args[1:]))
            beneath.append(named[op.args[1]])
        ops.append(op)
    for volume in sorted(request.volumes, key=lambda v: v.target):
        target = _user_target(volume.target, "volume")
        attributes = "nosuid,nodev" + (",ro" if volume.read_only else "")
        # Else a link that was made in a directory of the worker's would have it lie over the system's own files.
        ops.append(Op("straight", (str(target),)))
        ops += [_mkdir(p, 0o1775, 0, gid) for p in reversed(target.parents) if len(p.parts) > 1]
        source: str | PurePosixPath = _absolute(volume.source, "volume source")
        if volume.parts:
            source = f"@{len(beneath)}"
            beneath.append(Beneath(volume.source, volume.parts))
        ops += [_mkdir(target), _bind(source, target, attributes)]
    if len(beneath) > MOST_BENEATH:
        raise SandboxError(
            f"{len(beneath)} directories of the Python environment and of volumes (sub_path) in one container: "
            f"{MOST_BENEATH} at most",
            code="sandbox-plan",
        )
    ops.append(Op("pivot"))
    if not request.network:
        ops.append(Op("linkdel", ("eth0",)))
    ops.append(Op("hostname", (request.hostname,)))
    volumes = tuple(str(_user_target(v.target, "volume")) for v in request.volumes)
    return RootPlan(tuple(ops), request.shm_layer, tuple(beneath), volumes)


def _between(path: PurePosixPath, above: PurePosixPath, hidden: tuple[PurePosixPath, ...]) -> bool:
    """Whether a mask lies between a directory and one above it."""
    return any((h == path or _below(path, h)) and _below(h, above) for h in hidden)


def _user_target(path: str, what: str) -> PurePosixPath:
    pure = _absolute(path, what)
    if len(pure.parts) < 2 or pure.parts[1] in {"app", "proc", "sys", "dev", "etc", "run"}:
        raise SandboxError(f"{what} cannot be mounted at {path}; choose a path such as /data", code="bad-mount-path")
    return pure
