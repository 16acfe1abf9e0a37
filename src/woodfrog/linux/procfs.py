"""Typed readers of /proc. The `parse_*` functions are pure; the others read one process's files.

A process that is gone raises `ProcessLookupError`, whichever way the kernel says so.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

__all__ = [
    "MapEntry",
    "MountEntry",
    "Resident",
    "Stat",
    "Status",
    "by_inner_pid",
    "children",
    "computing",
    "descriptors",
    "ending",
    "maps",
    "mountinfo",
    "parse_maps",
    "parse_mountinfo",
    "parse_smaps",
    "parse_stat",
    "parse_status",
    "resident",
    "stat",
    "status",
    "tree",
]

PROC = Path("/proc")
PF_EXITING = 4


@dataclass(frozen=True, slots=True)
class Stat:
    """/proc/PID/stat, the fields that identify a process."""

    pid: int
    name: str
    state: str
    parent: int
    start_ticks: int
    """When it started, in clock ticks since boot: with the pid, this names one process for good."""


@dataclass(frozen=True, slots=True)
class Status:
    """/proc/PID/status."""

    name: str
    state: str
    pid: int
    parent: int
    ns_pids: tuple[int, ...]
    """Its pid in each pid namespace, the reader's own first, the innermost last."""
    uids: tuple[int, int, int, int]
    gids: tuple[int, int, int, int]
    groups: tuple[int, ...]
    threads: int
    cap_inheritable: int
    cap_permitted: int
    cap_effective: int
    cap_bounding: int
    cap_ambient: int
    no_new_privs: bool
    seccomp: int
    rss_bytes: int


class MapEntry(NamedTuple):
    """One line of /proc/PID/maps. A tuple: a process has hundreds, and a capture reads all of them."""

    start: int
    end: int
    read: bool
    write: bool
    execute: bool
    shared: bool
    offset: int
    device: tuple[int, int]
    inode: int
    path: str
    """Empty for anonymous memory; `[heap]` and the like; ` (deleted)` is kept."""

    @property
    def size(self) -> int:
        return self.end - self.start


class Resident(NamedTuple):
    """What a mapping has of memory that a dump would hold, in bytes: the process's own, and shared memory objects'."""

    begin: int
    end: int
    own: int
    shared: int


@dataclass(frozen=True, slots=True)
class MountEntry:
    """One line of /proc/PID/mountinfo."""

    id: int
    parent: int
    device: tuple[int, int]
    root: str
    target: str
    options: frozenset[str]
    propagation: tuple[str, ...]
    kind: str
    source: str
    super_options: frozenset[str]


def _octal(text: str) -> str:
    """Undo the kernel's \\040 for blanks in paths."""
    if "\\" not in text:
        return text
    return re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8) & 0xFF), text)


def parse_stat(text: str) -> Stat:
    """The name may hold blanks and brackets: it ends at the last bracket."""
    head, _, tail = text.rpartition(")")
    pid, _, name = head.partition(" (")
    fields = tail.split()
    return Stat(int(pid), name, fields[0], int(fields[1]), int(fields[19]))


def parse_status(text: str) -> Status:
    values: dict[str, str] = {}
    for line in text.split("\n"):
        key, colon, value = line.partition(":")
        if colon:
            values.setdefault(key, value.strip())

    def numbers(key: str) -> tuple[int, ...]:
        return tuple(int(x) for x in values.get(key, "").split())

    def four(key: str) -> tuple[int, int, int, int]:
        a, b, c, d = numbers(key)
        return a, b, c, d

    pid = int(values["Pid"])
    return Status(
        name=values.get("Name", ""),
        state=values["State"][:1],
        pid=pid,
        parent=int(values["PPid"]),
        ns_pids=numbers("NSpid") or (pid,),
        uids=four("Uid"),
        gids=four("Gid"),
        groups=numbers("Groups"),
        threads=int(values.get("Threads", "0")),
        cap_inheritable=int(values["CapInh"], 16),
        cap_permitted=int(values["CapPrm"], 16),
        cap_effective=int(values["CapEff"], 16),
        cap_bounding=int(values["CapBnd"], 16),
        cap_ambient=int(values.get("CapAmb", "0"), 16),
        no_new_privs=values.get("NoNewPrivs", "0") == "1",
        seccomp=int(values.get("Seccomp", "0")),
        rss_bytes=int(values["VmRSS"].split()[0]) * 1024 if "VmRSS" in values else 0,
    )


@lru_cache(maxsize=256)
def _device(text: str, base: int) -> tuple[int, int]:
    major, _, minor = text.partition(":")
    return int(major, base), int(minor, base)


def parse_maps(text: str) -> tuple[MapEntry, ...]:
    entries = []
    for line in text.split("\n"):
        if not line:
            continue
        fields = line.split(None, 5)
        span, flags, offset, device, inode = fields[:5]
        start, _, end = span.partition("-")
        # The kernel writes a newline in a path as \012 and nothing else.
        path = fields[5].replace("\\012", "\n") if len(fields) > 5 else ""
        entries.append(
            MapEntry(
                int(start, 16),
                int(end, 16),
                flags[0] == "r",
                flags[1] == "w",
                flags[2] == "x",
                flags[3] == "s",
                int(offset, 16),
                _device(device, 16),
                int(inode),
                path,
            )
        )
    return tuple(entries)


def parse_mountinfo(text: str) -> tuple[MountEntry, ...]:
    entries = []
    for line in text.split("\n"):
        if not line:
            continue
        fields = line.split(" ")
        dash = fields.index("-", 6)
        kind, source, super_options = fields[dash + 1 : dash + 4]
        entries.append(
            MountEntry(
                id=int(fields[0]),
                parent=int(fields[1]),
                device=_device(fields[2], 10),
                root=_octal(fields[3]),
                target=_octal(fields[4]),
                options=frozenset(fields[5].split(",")),
                propagation=tuple(fields[6:dash]),
                kind=kind,
                source=_octal(source),
                super_options=frozenset(super_options.split(",")),
            )
        )
    return tuple(entries)


@contextmanager
def _of(pid: int) -> Iterator[Path]:
    try:
        yield PROC / str(pid)
    except FileNotFoundError:
        raise ProcessLookupError(f"no process {pid}") from None


def _read(pid: int, name: str) -> str:
    with _of(pid) as path:
        return (path / name).read_bytes().decode(errors="surrogateescape")


def stat(pid: int) -> Stat:
    return parse_stat(_read(pid, "stat"))


def status(pid: int) -> Status:
    return parse_status(_read(pid, "status"))


def by_inner_pid(root_pid: int) -> dict[int, int]:
    """The host's pids of a process and all below it, by their pids in their own namespace."""
    found = {}
    for pid in tree(root_pid):
        with suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            found[status(pid).ns_pids[-1]] = pid
    return found


def parse_smaps(text: str) -> tuple[Resident, ...]:
    found: list[Resident] = []
    memory_object = False
    for line in text.split("\n"):
        word, _, rest = line.partition(" ")
        if word in ("Anonymous:", "Swap:"):
            found[-1] = found[-1]._replace(own=found[-1].own + (int(rest.split()[0]) << 10))
        elif word == "Rss:" and memory_object:
            found[-1] = found[-1]._replace(shared=int(rest.split()[0]) << 10)
        elif not word.endswith(":") and "-" in word:
            begin, _, end = word.partition("-")
            found.append(Resident(int(begin, 16), int(end, 16), 0, 0))
            flags, _, device, _ = rest.split(None, 3)
            memory_object = flags[3] == "s" and _device(device, 16)[0] == 0
    return tuple(found)


def resident(pid: int) -> tuple[Resident, ...]:
    """All mappings of a process, ascending."""
    return parse_smaps(_read(pid, "smaps"))


def maps(pid: int) -> tuple[MapEntry, ...]:
    return parse_maps(_read(pid, "maps"))


def mountinfo(pid: int) -> tuple[MountEntry, ...]:
    return parse_mountinfo(_read(pid, "mountinfo"))


def ending(pid: int) -> bool:
    """Whether a process runs no code of its own any more: it is dead, on its way there, or was sent SIGKILL."""
    fields = _read(pid, "stat").rpartition(")")[2].split()
    if fields[0] in "ZX" or int(fields[6]) & PF_EXITING:
        return True
    pending = [x.split()[1] for x in _read(pid, "status").split("\n") if x.startswith(("SigPnd:", "ShdPnd:"))]
    return any(int(x, 16) & 1 << signal.SIGKILL - 1 for x in pending)


def children(pid: int) -> tuple[int, ...]:
    """The children of all the process's threads (needs CONFIG_PROC_CHILDREN, as CRIU does)."""
    found: list[int] = []
    with _of(pid) as path:
        for thread in os.listdir(path / "task"):
            try:
                found += map(int, (path / "task" / thread / "children").read_text().split())
            except (FileNotFoundError, ProcessLookupError):
                continue  # that thread ended meanwhile
    return tuple(sorted(found))


def tree(pid: int) -> tuple[int, ...]:
    """The process and all below it, parents first. Those that end meanwhile are left out."""
    found = [pid]
    for process in found:
        try:
            found += children(process)
        except ProcessLookupError:
            continue
    return tuple(found)


def descriptors(pid: int) -> dict[int, str]:
    """Open descriptors and what each link says (`/path`, `socket:[1]`, `anon_inode:[eventpoll]`)."""
    found = {}
    with _of(pid) as path:
        for name in os.listdir(path / "fd"):
            try:
                found[int(name)] = os.readlink(path / "fd" / name)
            except FileNotFoundError:
                continue  # closed meanwhile
    return found


def computing(pid: int) -> int:
    """How many threads are outside any system call: they run, wait for a processor or for a page, or were stopped so.

    0 where the kernel does not tell.
    """
    found = 0
    with _of(pid) as process:
        for thread in (process / "task").iterdir():
            try:
                found += (thread / "syscall").read_text().split()[:1] in (["running"], ["-1"])
            except OSError:
                continue  # gone, or the file is not there
    return found
