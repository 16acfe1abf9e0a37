"""Limits and accounting of sandboxes by cgroup: v2, or v1 controllers where a host has only those.

Every sandbox has the group `woodfrog/<tag>-<id>` below the root of each hierarchy. The tag is the daemon's
(its state directory's), so that two daemons never sweep each other's.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import signal
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from woodfrog.errors import HostError, SandboxError
from woodfrog.linux import procfs
from woodfrog.linux.meminfo import Room

__all__ = ["Cgroup", "Cgroups", "Limits", "detect"]

GROUP = "woodfrog"
KERNEL = Path("/proc/sys/kernel")
CPU_SHARE = 0.125
CONTROLLERS = ("cpu", "memory", "pids")
PERIOD_US = 100_000
GONE_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What a sandbox may use.

    Args:
        memory_bytes: memory, with what it writes to its own file system; None = no limit.
        cpus: processors' worth of time (0.5 = half of one) that it never exceeds; None = no limit.
        cpu_share: processors' worth of time by which sandboxes divide busy processors among them: one of 1.0 gets
            twice what one of 0.5 gets. What the others leave idle, it may use. None = 0.125.
        pids: processes and threads.
        disk_bytes: what it may write to its own file system; the root plan applies it, not the cgroup.
        background: where processors are short it gets a twentieth of what others get.
    """

    memory_bytes: int | None = None
    cpus: float | None = None
    cpu_share: float | None = None
    pids: int = 4096
    disk_bytes: int = 1 << 30
    background: bool = False


class Cgroup(Protocol):
    """One sandbox's group, in whatever hierarchies there are."""

    @property
    def name(self) -> str: ...

    def attach_paths(self) -> tuple[Path, ...]:
        """The `cgroup.procs` files a process writes `0` to in order to join."""
        ...

    def set_limits(self, limits: Limits) -> None: ...
    def oom_kills(self) -> int: ...
    def memory_peak(self) -> int: ...
    def memory_current(self) -> int: ...
    def memory_private(self) -> int:
        """What it takes for itself: the page cache of files, which the kernel takes back when it is short, aside."""
        ...

    def pids(self) -> tuple[int, ...]: ...
    def kill_all(self) -> None: ...

    async def destroy(self) -> None:
        """Kill what is left in it and remove it; nothing when it is gone."""
        ...


class Cgroups(Protocol):
    """Makes groups for one daemon."""

    @property
    def version(self) -> int:
        """Of the cgroup interface: 1 or 2."""
        ...

    def create(self, name: str, limits: Limits) -> Cgroup: ...

    def room(self) -> Room | None:
        """What a limit on all sandboxes together (of the container that the daemon runs in, or set on `woodfrog`)
        leaves; None = there is none. Reads one small file where there is none, two more where there is."""
        ...

    async def sweep_leftovers(self) -> list[str]:
        """Destroy the groups of a daemon with this tag that died; returns their names."""
        ...


def _write(path: Path, text: str) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)
    except OSError as e:
        raise SandboxError(f"cgroup: cannot write {text!r} to {path}: {e.strerror}", code="cgroup") from e


def _leave_pids_to_the_host(directory: Path) -> None:
    """All sandboxes of the machine together have three quarters of its process numbers: a few with 4,096 each would
    otherwise leave none to start a shell with."""
    most = min(_read_int(KERNEL / "pid_max"), _read_int(KERNEL / "threads-max"))
    _write(directory / "pids.max", str(most * 3 // 4))


def _make(directory: Path, *, exist_ok: bool = False) -> None:
    try:
        directory.mkdir(exist_ok=exist_ok)
    except FileExistsError:
        raise SandboxError(
            f"cgroup: {directory} is there already: a leftover to sweep, or the sandbox's name is not unique",
            code="cgroup",
        ) from None
    except OSError as e:
        raise SandboxError(f"cgroup: cannot make {directory}: {e.strerror}", code="cgroup") from e


def _quota_us(cpus: float) -> int:
    """The kernel's least is a millisecond."""
    return max(1000, round(cpus * PERIOD_US))


def _weight(limits: Limits, usual: int, least: int, most: int) -> int:
    """The share in the kernel's terms, where `usual` is what every group has at first."""
    if limits.background:
        return max(least, usual // 20)
    share = CPU_SHARE if limits.cpu_share is None else limits.cpu_share
    return max(least, min(most, round(share / CPU_SHARE * usual)))


def _read_int(path: Path) -> int:
    try:
        text = path.read_text().strip()
    except OSError:
        return 0
    return int(text) if text.isdigit() else 0


def _read_keyed(path: Path, key: str) -> int:
    with suppress(OSError):
        for line in path.read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == key:
                return int(value)
    return 0


def _read_stat(path: Path) -> dict[str, int]:
    with suppress(OSError, ValueError):
        return {name: int(value) for name, _, value in (line.partition(" ") for line in path.read_text().splitlines())}
    return {}


_UNLIMITED = 1 << 60
"""A limit of v1 from here on is none."""


def _tightest(rooms: list[Room | None]) -> Room | None:
    known = [r for r in rooms if r is not None]
    return Room(min(r.total for r in known), min(r.available for r in known)) if known else None


def _room_v2(directory: Path) -> Room | None:
    """Of a group with a limit. A machine's root group has none of these files."""
    limit = min(_read_int(directory / name) or _UNLIMITED for name in ("memory.max", "memory.high"))
    return None if limit == _UNLIMITED else Room(limit, max(limit - _private_v2(directory), 0))


def _room_v1(directory: Path) -> Room | None:
    limit = _read_int(directory / "memory.limit_in_bytes")
    return Room(limit, max(limit - _private_v1(directory), 0)) if 0 < limit < _UNLIMITED else None


def _private_v2(directory: Path) -> int:
    # Of the total, since that is exact at any moment; the parts are gathered every two seconds only.
    stat = _read_stat(directory / "memory.stat")
    caches = sum(stat.get(name, 0) for name in ("inactive_file", "active_file", "slab_reclaimable"))
    return max(_read_int(directory / "memory.current") - caches, 0)


def _private_v1(directory: Path) -> int:
    stat = _read_stat(directory / "memory.stat")
    caches = sum(stat.get(name, 0) for name in ("total_inactive_file", "total_active_file"))
    return max(_read_int(directory / "memory.usage_in_bytes") - caches, 0)


def _pids_in(directories: tuple[Path, ...]) -> tuple[int, ...]:
    found: set[int] = set()
    for directory in directories:
        with suppress(OSError):
            found.update(map(int, (directory / "cgroup.procs").read_text().split()))
    return tuple(sorted(found - {0}))


async def _remove(directories: tuple[Path, ...], kill: Cgroup) -> None:
    """rmdir, waiting for the last exiting task to leave."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + GONE_TIMEOUT_S
    pause = 0.001
    for directory in directories:
        while True:
            try:
                directory.rmdir()
                break
            except FileNotFoundError:
                break
            except OSError as e:
                if e.errno != errno.EBUSY:
                    raise SandboxError(f"cgroup: cannot remove {directory}: {e.strerror}", code="cgroup") from e
                if loop.time() > deadline:
                    raise SandboxError(
                        f"cgroup: {directory} is still in use by pids {list(kill.pids())}", code="cgroup"
                    ) from None
            kill.kill_all()
            await asyncio.sleep(pause)
            pause = min(pause * 2, 0.05)


def _kill_each(group: Cgroup) -> None:
    for pid in group.pids():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@dataclass(frozen=True)
class _CgroupV2:
    name: str
    directory: Path

    def attach_paths(self) -> tuple[Path, ...]:
        return (self.directory / "cgroup.procs",)

    def set_limits(self, limits: Limits) -> None:
        d = self.directory
        _write(d / "memory.max", "max" if limits.memory_bytes is None else str(limits.memory_bytes))
        if (d / "memory.swap.max").exists():
            _write(d / "memory.swap.max", "max" if limits.memory_bytes is None else "0")
        if (d / "cpu.max").exists():
            quota = "max" if limits.cpus is None else str(_quota_us(limits.cpus))
            _write(d / "cpu.max", f"{quota} {PERIOD_US}")
            _write(d / "cpu.weight", str(_weight(limits, 100, 1, 10_000)))
        _write(d / "pids.max", str(limits.pids))

    def oom_kills(self) -> int:
        return _read_keyed(self.directory / "memory.events", "oom_kill")

    def memory_peak(self) -> int:
        return _read_int(self.directory / "memory.peak")

    def memory_current(self) -> int:
        return _read_int(self.directory / "memory.current")

    def memory_private(self) -> int:
        return _private_v2(self.directory)

    def pids(self) -> tuple[int, ...]:
        return _pids_in((self.directory,))

    def kill_all(self) -> None:
        try:
            (self.directory / "cgroup.kill").write_text("1")
        except OSError:
            _kill_each(self)

    async def destroy(self) -> None:
        await _remove((self.directory,), self)


@dataclass(frozen=True)
class _CgroupV1:
    name: str
    directories: Mapping[str, Path]
    """By controller: memory, cpu, pids (cpu may be absent)."""

    def attach_paths(self) -> tuple[Path, ...]:
        return tuple(d / "cgroup.procs" for d in self.directories.values())

    def set_limits(self, limits: Limits) -> None:
        if memory := self.directories.get("memory"):
            self._set_memory(memory, -1 if limits.memory_bytes is None else limits.memory_bytes)
        if cpu := self.directories.get("cpu"):
            _write(cpu / "cpu.cfs_period_us", str(PERIOD_US))
            _write(cpu / "cpu.cfs_quota_us", "-1" if limits.cpus is None else str(_quota_us(limits.cpus)))
            _write(cpu / "cpu.shares", str(_weight(limits, 1024, 2, 262_144)))
        if pids := self.directories.get("pids"):
            _write(pids / "pids.max", str(limits.pids))

    @staticmethod
    def _set_memory(directory: Path, value: int) -> None:
        # memory+swap may never be below memory: its place in the order depends on the direction.
        both = [directory / "memory.limit_in_bytes"]
        swap = directory / "memory.memsw.limit_in_bytes"
        if swap.exists():
            both.append(swap)
        current = _read_int(directory / "memory.limit_in_bytes")
        if value == -1 or value > current:
            both.reverse()
        for path in both:
            _write(path, str(value))

    def oom_kills(self) -> int:
        return _read_keyed(self.directories["memory"] / "memory.oom_control", "oom_kill")

    def memory_peak(self) -> int:
        return _read_int(self.directories["memory"] / "memory.max_usage_in_bytes")

    def memory_current(self) -> int:
        return _read_int(self.directories["memory"] / "memory.usage_in_bytes")

    def memory_private(self) -> int:
        return _private_v1(self.directories["memory"])

    def pids(self) -> tuple[int, ...]:
        return _pids_in(tuple(self.directories.values()))

    def kill_all(self) -> None:
        _kill_each(self)

    async def destroy(self) -> None:
        await _remove(tuple(self.directories.values()), self)


def _check_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,100}", name) or name.startswith("."):
        raise SandboxError(f"cgroup: {name!r} is not a usable name", code="cgroup")
    return name


@dataclass(frozen=True)
class _CgroupsV2:
    root: Path
    tag: str
    version: int = 2

    def enable(self) -> None:
        """Make the controllers available in `woodfrog/*`."""
        self._delegate(self.root)
        (self.root / GROUP).mkdir(exist_ok=True)
        _leave_pids_to_the_host(self.root / GROUP)
        self._delegate(self.root / GROUP)

    def _delegate(self, directory: Path) -> None:
        control = directory / "cgroup.subtree_control"
        # Without the cpu controller there are no limits of it, and `woodfrog doctor` says so.
        here, given = (directory / "cgroup.controllers").read_text().split(), control.read_text().split()
        missing = [c for c in CONTROLLERS if c in here and c not in given]
        if not missing:
            return
        text = " ".join(f"+{c}" for c in missing)
        try:
            control.write_text(text)
            return
        except OSError as e:
            if e.errno != errno.EBUSY:
                raise HostError(
                    f"cgroup: cannot enable {text} in {directory}: {e.strerror}; delegate these controllers to "
                    "woodfrogd (systemd: Delegate=yes)",
                    code="cgroup",
                ) from e
        # A delegated group that has processes of its own (a container's root): they move to a leaf.
        leaf = directory / f"{GROUP}-daemon"
        leaf.mkdir(exist_ok=True)
        for pid in _pids_in((directory,)):
            with suppress(OSError):
                (leaf / "cgroup.procs").write_text(str(pid))
        _write(control, text)

    def create(self, name: str, limits: Limits) -> Cgroup:
        group = _CgroupV2(name, self.root / GROUP / f"{self.tag}-{_check_name(name)}")
        if not (self.root / GROUP).is_dir():
            self.enable()
        _make(group.directory)
        group.set_limits(limits)
        return group

    def room(self) -> Room | None:
        return _tightest([_room_v2(self.root), _room_v2(self.root / GROUP)])

    async def sweep_leftovers(self) -> list[str]:
        names = _leftovers((self.root,), self.tag)
        for name in names:
            group = _CgroupV2(name, self.root / GROUP / f"{self.tag}-{name}")
            group.kill_all()
            await group.destroy()
        return names


@dataclass(frozen=True)
class _CgroupsV1:
    roots: Mapping[str, Path]
    tag: str
    version: int = 1

    def _group(self, name: str) -> _CgroupV1:
        _check_name(name)
        return _CgroupV1(name, {c: root / GROUP / f"{self.tag}-{name}" for c, root in self.roots.items()})

    def create(self, name: str, limits: Limits) -> Cgroup:
        group = self._group(name)
        for controller, directory in group.directories.items():
            above = self.roots[controller] / GROUP
            if not above.exists():
                self._make_above(controller)
            _make(directory)
        group.set_limits(limits)
        return group

    def _make_above(self, controller: str) -> None:
        above = self.roots[controller] / GROUP
        _make(above, exist_ok=True)
        if controller == "pids":
            _leave_pids_to_the_host(above)

    def room(self) -> Room | None:
        root = self.roots["memory"]
        return _tightest([_room_v1(root), _room_v1(root / GROUP)])

    async def sweep_leftovers(self) -> list[str]:
        for controller in self.roots:
            self._make_above(controller)
        names = _leftovers(tuple(self.roots.values()), self.tag)
        for name in names:
            group = self._group(name)
            group.kill_all()
            await group.destroy()
        return names


def _leftovers(roots: tuple[Path, ...], tag: str) -> list[str]:
    found: set[str] = set()
    for root in roots:
        found.update(p.name.removeprefix(f"{tag}-") for p in (root / GROUP).glob(f"{tag}-*"))
    return sorted(found)


def detect(tag: str, mounts: tuple[procfs.MountEntry, ...] | None = None) -> Cgroups:
    """The cgroup implementation for this host: v2 when it has the memory controller, else v1.

    Args:
        tag: short name of the daemon; part of every group's name.

    Raises:
        HostError: neither has a memory controller.
    """
    _check_name(tag)
    if mounts is None:
        mounts = procfs.mountinfo(os.getpid())
    v1: dict[str, Path] = {}
    for mount in mounts:
        path = Path(mount.target)
        if mount.kind == "cgroup2":
            with suppress(OSError):
                if {"memory", "pids"} <= set((path / "cgroup.controllers").read_text().split()):
                    v2 = _CgroupsV2(path, tag)
                    v2.enable()
                    return v2
        elif mount.kind == "cgroup":
            for controller in CONTROLLERS:
                if controller in mount.super_options:
                    v1.setdefault(controller, path)
    if "memory" in v1:
        return _CgroupsV1(v1, tag)
    raise HostError(
        "no cgroup memory controller: mount cgroup v2 at /sys/fs/cgroup with the memory and pids controllers "
        "(kernel option cgroup_enable=memory)",
        code="cgroup",
    )
