"""What there is to know about a tree of processes before CRIU touches it: read from /proc, nothing is changed."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from woodfrog.linux import ipc, procfs
from woodfrog.linux.sandbox import PRESTART_PID
from woodfrog.linux.threads import ThreadSettings, own_settings, tids

__all__ = [
    "AMD_NODES",
    "Connection",
    "Descriptor",
    "ExternalFile",
    "HostPaths",
    "Task",
    "Tree",
    "inspect_tree",
    "parse_bound",
    "parse_inet",
    "task_alive",
]

PRIVATE_KINDS = frozenset(
    {"overlay", "tmpfs", "ramfs", "proc", "sysfs", "devpts", "mqueue", "cgroup", "cgroup2", "devtmpfs"}
)
"""File systems of the sandbox itself: what lies on them is in the snapshot, or made anew."""
HOST_KINDS = frozenset({"overlay", "tmpfs", "ramfs"})
"""Those of them that may be the host's, too: a container's root, a `/tmp` in memory."""
GPU_NODES = ("/dev/nvidia", "/dev/dri/", "/dev/kfd")
AMD_NODES = ("/dev/kfd", "/dev/dri/renderD")
"""What a ROCm process has open."""
GPU_PEERS = ("/dev/shm/nccl-",)
NAMESPACES = ("ipc", "mnt", "net", "pid", "user", "uts")


@dataclass(frozen=True, slots=True)
class Descriptor:
    """An open descriptor. `target` is what its link says; `deleted` files have no path any more."""

    number: int
    target: str
    deleted: bool = False
    device: tuple[int, int] | None = None
    """Major and minor number of a character or block device."""


@dataclass(frozen=True, slots=True)
class ExternalFile:
    """A file outside the sandbox's own layers that a restore needs unchanged. `path` is the host's."""

    path: str
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Task:
    """One process of the tree. `pid` is the host's, `inner_pid` the sandbox's."""

    pid: int
    inner_pid: int
    name: str
    state: str
    start_ticks: int
    uid: int = 0
    tracer: int = 0
    threads: int = 1
    max_thread: int = 0
    """The highest inner pid among its threads."""
    descriptors: tuple[Descriptor, ...] = ()
    special_maps: tuple[str, ...] = ()
    """Names of mapped devices, rings and System V segments."""
    foreign_namespaces: tuple[str, ...] = ()
    """Kinds of namespaces in which it differs from the root of the tree."""
    cuda: bool = False
    """It has NVIDIA's library mapped: the driver may know it, with or without a device."""
    gpu_peers: tuple[str, ...] = ()
    """Mapped shared memory by which GPU programs reach one another (NCCL)."""
    settings: tuple[ThreadSettings, ...] = ()
    """Of its threads, those of their own that CRIU does not keep."""

    @property
    def gpu_devices(self) -> tuple[str, ...]:
        """What of the GPU it has open or mapped."""
        names = (*(d.target for d in self.descriptors), *self.special_maps)
        return tuple(sorted({n for n in names if n.startswith(GPU_NODES)}))

    @property
    def amd(self) -> bool:
        return any(n.startswith(AMD_NODES) for n in self.gpu_devices)


@dataclass(frozen=True, slots=True)
class Connection:
    """A TCP socket of the tree that is not merely listening. Addresses as `host:port`."""

    local: str
    remote: str
    inside: bool
    """Over the loopback device. A connection to the sandbox's own address ends with that address."""


@dataclass(frozen=True, slots=True)
class Tree:
    """The processes that a snapshot would hold, the first being the root, and what surrounds them."""

    tasks: tuple[Task, ...]
    strays: tuple[Task, ...] = ()
    """Processes of the sandbox that are not below the root: they would be lost."""
    connections: tuple[Connection, ...] = ()
    bound: tuple[str, ...] = ()
    """Sockets bound to the sandbox's own address, which another sandbox does not have: `udp 10.231.0.2:5353`."""
    files: tuple[ExternalFile, ...] = ()
    ipc: tuple[str, ...] = ()
    """What belongs to the sandbox and to no process: `semaphores 0 (key 0x00005eed)`, `message queue /frogs`."""
    page_size: int = 4096
    """Bytes of the kernel's memory pages."""
    root: str = "/"
    """Where paths begin that the kernel tells us of these processes. Elsewhere only where we are in a chroot."""


class HostPaths:
    """Where paths of a sandbox lie on the host.

    Args:
        inside, outside: the mount tables of the sandbox and of the host, in the kernel's order.
    """

    def __init__(self, inside: tuple[procfs.MountEntry, ...], outside: tuple[procfs.MountEntry, ...]) -> None:
        # Of two at one place the later one covers the earlier.
        self._inside = {mount.target: mount for mount in inside}
        self._outside: dict[tuple[tuple[int, int], str], procfs.MountEntry] = {}
        for mount in outside:
            self._outside.setdefault((mount.device, mount.root), mount)
        self._devices = {mount.device for mount in outside if mount.kind in HOST_KINDS}
        self._directories: dict[str, tuple[procfs.MountEntry | None, str | None]] = {}

    def of(self, path: str) -> str | None:
        """None: on a file system of the sandbox's own."""
        directory, _, name = path.rpartition("/")
        if not directory or not name or path in self._inside:
            return self._look_up(path)
        if directory not in self._directories:
            mount = next((found for at in _ancestors(directory) if (found := self._inside.get(at))), None)
            self._directories[directory] = mount, self._look_up(directory)
        mount, outer = self._directories[directory]
        if mount is not None and (mount.device, _within(mount, path)) in self._outside:
            return self._look_up(path)  # the file has a mount of its own on the host
        return None if outer is None else _join(outer, name)

    def _look_up(self, path: str) -> str | None:
        mount = next((found for at in _ancestors(path) if (found := self._inside.get(at))), None)
        if mount is None or (mount.kind in PRIVATE_KINDS and mount.device not in self._devices):
            return None
        within = _within(mount, path)
        for at in _ancestors(within):
            other = self._outside.get((mount.device, at))
            if other is not None:
                return _join(other.target, within[len(at.rstrip("/")) :])
        return path


def _ancestors(path: str) -> Iterator[str]:
    """The path and all directories above it, the root last."""
    while path != "/":
        yield path
        path = path.rpartition("/")[0] or "/"
    yield path


def _within(mount: procfs.MountEntry, path: str) -> str:
    """A path of the mount, on its own file system."""
    return _join(mount.root, path[len(mount.target.rstrip("/")) :])


def _join(directory: str, rest: str) -> str:
    return directory.rstrip("/") + ("/" + rest.lstrip("/") if rest.strip("/") else "") or "/"


def _address(text: str) -> tuple[bytes, int]:
    raw, _, port = text.partition(":")
    words = [bytes.fromhex(raw[i : i + 8])[::-1] for i in range(0, len(raw), 8)]
    address = b"".join(words)
    if len(address) == 16 and address.startswith(bytes(10) + b"\xff\xff"):
        address = address[12:]
    return address, int(port, 16)


def _show(address: bytes, port: int) -> str:
    if len(address) == 4:
        return f"{'.'.join(map(str, address))}:{port}"
    groups = ":".join(address[i : i + 2].hex().lstrip("0") or "0" for i in range(0, 16, 2))
    return f"[{groups}]:{port}"


def _loopback(address: bytes) -> bool:
    return address[:1] == b"\x7f" if len(address) == 4 else address == bytes(15) + b"\x01"


def parse_inet(text: str, inodes: frozenset[int]) -> tuple[Connection, ...]:
    """The connections in a /proc/PID/net/tcp or tcp6 table whose socket is one of `inodes`."""
    found = []
    for line in text.splitlines()[1:]:
        fields = line.split()
        if len(fields) < 10:
            continue
        state, inode = int(fields[3], 16), int(fields[9])
        # Listening (10) and closed (7) sockets have nobody at the other end.
        if state in (7, 10) or inode not in inodes:
            continue
        local, remote = _address(fields[1]), _address(fields[2])
        found.append(Connection(_show(*local), _show(*remote), _loopback(local[0]) and _loopback(remote[0])))
    return tuple(found)


def parse_bound(text: str, inodes: frozenset[int], kind: str) -> tuple[str, ...]:
    """The sockets of a /proc/PID/net/{tcp,udp} table that keep an address of the sandbox's own: not connected TCP."""
    found = []
    for line in text.splitlines()[1:]:
        fields = line.split()
        if len(fields) < 10 or int(fields[9]) not in inodes:
            continue
        address, port = _address(fields[1])
        if any(address) and not _loopback(address) and (kind != "tcp" or int(fields[3], 16) == 10):
            found.append(f"{kind} {_show(address, port)}")
    return tuple(found)


def _descriptors(pid: int) -> tuple[Descriptor, ...]:
    found = []
    for number, target in sorted(procfs.descriptors(pid).items()):
        device = None
        if target.startswith("/dev/"):
            try:
                info = os.stat(f"/proc/{pid}/fd/{number}")
            except OSError:
                continue
            if stat.S_ISCHR(info.st_mode) or stat.S_ISBLK(info.st_mode):
                device = (os.major(info.st_rdev), os.minor(info.st_rdev))
        deleted = target.startswith("/") and target.endswith(" (deleted)")
        found.append(Descriptor(number, target.removesuffix(" (deleted)") if deleted else target, deleted, device))
    return tuple(found)


def _status_number(pid: int, key: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines():
        if line.startswith(key):
            return int(line.split()[1])
    return 0


def _namespaces(pid: int) -> dict[str, str]:
    return {kind: os.readlink(f"/proc/{pid}/ns/{kind}") for kind in NAMESPACES}


def _special(entry: procfs.MapEntry) -> bool:
    path = entry.path
    return path.startswith(("/SYSV", "anon_inode:", "/dev/")) and not path.startswith(("/dev/zero", "/dev/shm/"))


def _task(pid: int, init_pid: int, root_namespaces: dict[str, str], maps: tuple[procfs.MapEntry, ...]) -> Task:
    status = procfs.status(pid)
    current = procfs.stat(pid)
    if status.state == "Z":
        return Task(pid, status.ns_pids[-1], status.name, "Z", current.start_ticks, status.uids[0])
    own = _namespaces(pid)
    return Task(
        pid=pid,
        inner_pid=status.ns_pids[-1],
        name=status.name,
        state=status.state,
        start_ticks=current.start_ticks,
        uid=status.uids[0],
        tracer=_status_number(pid, "TracerPid:"),
        threads=status.threads,
        max_thread=max((inner for _, inner in tids(pid)), default=0),
        settings=own_settings(pid, init_pid),
        descriptors=_descriptors(pid),
        special_maps=tuple(sorted({m.path for m in maps if _special(m)})),
        foreign_namespaces=tuple(k for k in NAMESPACES if own[k] != root_namespaces[k]),
        cuda=any("/libcuda.so" in m.path for m in maps),
        gpu_peers=tuple(sorted({m.path for m in maps if m.path.startswith(GPU_PEERS)})),
    )


def _external_files(
    tasks: tuple[Task, ...], maps: dict[int, tuple[procfs.MapEntry, ...]], init_pid: int
) -> tuple[ExternalFile, ...]:
    paths: set[str] = set()
    for task in tasks:
        paths |= {m.path for m in maps.get(task.pid, ()) if m.path.startswith("/") and m.inode and m.device != (0, 0)}
        paths |= {d.target for d in task.descriptors if d.target.startswith("/") and not d.deleted and d.device is None}
    places = HostPaths(procfs.mountinfo(init_pid), procfs.mountinfo(os.getpid()))
    found = []
    for path in sorted(paths):
        # Deleted and replaced files are CRIU's to capture.
        if path.endswith(" (deleted)") or (outer := places.of(path)) is None:
            continue
        try:
            info = os.stat(f"/proc/{init_pid}/root{path}")
        except OSError:
            continue
        if stat.S_ISREG(info.st_mode):
            found.append(ExternalFile(outer, info.st_size, info.st_mtime_ns))
    return tuple(found)


def inspect_tree(root_pid: int, init_pid: int) -> Tree:
    """Look at the tree of `root_pid` in the sandbox of `init_pid`; both are the host's pids.

    Raises:
        ProcessLookupError: the root is gone.
    """
    namespaces = _namespaces(root_pid)
    tasks: list[Task] = []
    maps: dict[int, tuple[procfs.MapEntry, ...]] = {}
    pids = procfs.tree(root_pid)
    for pid in pids:
        try:
            maps[pid] = procfs.maps(pid)
            tasks.append(_task(pid, init_pid, namespaces, maps[pid]))
        except (FileNotFoundError, ProcessLookupError):
            if pid == root_pid:
                raise ProcessLookupError(f"no process {pid}") from None
    known = {init_pid, *pids}
    strays: list[Task] = []
    for pid in procfs.tree(init_pid):
        if pid not in known:
            try:
                stray = procfs.status(pid)
            except (FileNotFoundError, ProcessLookupError):
                continue
            # The CRIU that waits for the dump has a pid that nobody else gets.
            if stray.state != "Z" and stray.ns_pids[-1] != PRESTART_PID and not _descends(pid, root_pid):
                strays.append(Task(pid, stray.ns_pids[-1], stray.name, stray.state, 0))
    sockets = frozenset(int(d.target[8:-1]) for t in tasks for d in t.descriptors if d.target.startswith("socket:["))
    connections: tuple[Connection, ...] = ()
    bound: tuple[str, ...] = ()
    for table in ("tcp", "tcp6", "udp", "udp6") if sockets else ():
        try:
            text = Path(f"/proc/{root_pid}/net/{table}").read_text()
        except FileNotFoundError:
            continue  # a kernel without IPv6
        if table.startswith("tcp"):
            connections += parse_inet(text, sockets)
        bound += parse_bound(text, sockets, table[:3])
    everything = tuple(tasks)
    files = _external_files(everything, maps, init_pid)
    page_size = os.sysconf("SC_PAGE_SIZE")
    root = os.readlink(f"/proc/{init_pid}/root")
    return Tree(everything, tuple(strays), connections, bound, files, ipc.objects(root_pid), page_size, root)


def _descends(pid: int, root_pid: int) -> bool:
    """Whether a process is below the root by now: one that was started while the tree was being read is no stray."""
    try:
        while pid > 1:
            if pid == root_pid:
                return True
            pid = procfs.stat(pid).parent
    except (FileNotFoundError, ProcessLookupError):
        return True  # gone again
    return False


def task_alive(task: Task) -> bool:
    """Whether this very process still runs as it did: not dead, and stopped or traced only if it was before."""
    try:
        now = procfs.stat(task.pid)
        if now.start_ticks != task.start_ticks:
            return False
        if task.state == "Z" or now.state == "Z":
            return task.state == now.state
        return (now.state not in "TtX" or task.state in "Tt") and _status_number(task.pid, "TracerPid:") == task.tracer
    except (FileNotFoundError, ProcessLookupError):
        return False
