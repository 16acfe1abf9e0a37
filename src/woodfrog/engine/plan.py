"""What to do about a tree, as pure decisions: refuse it by name, or the command lines and what to remember."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from woodfrog.criu.authority import Credentials
from woodfrog.criu.options import Dump, Restore, Tcp
from woodfrog.criu.pagemap import PAGE
from woodfrog.engine.inspect import AMD_NODES, Descriptor, Task, Tree
from woodfrog.linux.rootplan import APP, HOME
from woodfrog.linux.threads import ThreadSettings

__all__ = [
    "FACTS",
    "IMAGES",
    "REFUSALS",
    "WORK",
    "Facts",
    "GpuFacts",
    "Refusal",
    "damaged",
    "dump_plan",
    "facts_of",
    "foreign_credentials",
    "parse_facts",
    "refusals_markdown",
    "refuse",
    "refused_computing",
    "restore_plan",
    "volumes_entered",
    "warnings",
]

IMAGES = "/run/woodfrog/img"
"""Where the image directory is bound inside the sandbox."""
WORK = "/run/woodfrog/criu"
"""The sandbox's own scratch for CRIU: log and statistics of a restore."""
CACHE = "/run/criu"
"""CRIU's kernel-feature cache, shared by all sandboxes."""
FACTS = "engine.json"
"""What a restore must know of the dump, beside the images."""
IRMAP_PATHS = ("/tmp", "/var/tmp", "/run", "/dev/shm", APP, HOME)
"""Where the watched files of inotify are looked for: an overlay cannot open a file by its handle."""

ANON_INODES = frozenset(
    f"anon_inode:{name}"
    for name in (
        "[eventfd]", "[eventpoll]", "[signalfd]", "[timerfd]", "inotify", "[inotify]", "[fanotify]", "[pidfd]", "pidfd",
    )
)  # fmt: skip
"""The anonymous kinds that CRIU captures."""
HARMLESS_MAJORS = frozenset({1, 5, *range(136, 144)})
"""Memory devices (null, zero, random), terminals' own device and ptmx, pseudo-terminals."""


@dataclass(frozen=True)
class Refusal:
    """Why a tree is not dumped. `cause` names the process; `code` is one of `REFUSALS`."""

    code: str
    cause: str
    remedy: str


REFUSALS: dict[str, tuple[str, str]] = {
    "page-size": (
        "this kernel's memory pages are larger than the 4 KiB that snapshots are made of (some arm64 kernels')",
        "use a kernel with pages of 4 KiB: on arm64, one without 16k or 64k in its name",
    ),
    "criu-pointers": (
        "this CRIU's restores hang where the processor authenticates pointers (arm64): its own code signs return "
        "addresses, with keys that it changes meanwhile",
        "boot the kernel with arm64.nopauth, or build CRIU without -mbranch-protection and name it in WOODFROG_CRIU",
    ),
    "sve": (
        "a thread computes, and CRIU does not keep the registers of this processor's SVE (arm64): what it works on "
        "would be wrong after it",
        "let threads rest before a snapshot: stop them in a register_before_snapshot hook, or start them after it "
        "(enter(snap=False)); or boot the kernel with arm64.nosve",
    ),
    "chroot": (
        "the daemon was started in a chroot, where files that change after a snapshot cannot be told",
        "run it in a container, or give it the directory as its root with pivot_root",
    ),
    "stray-process": (
        "a process in the sandbox is no descendant of the worker's any more (a daemon that detached itself), and "
        "would be lost",
        "start it in the foreground with subprocess.Popen, or after the snapshot",
    ),
    "io-uring": (
        "a process holds an io_uring, which CRIU cannot capture",
        "turn io_uring off in that library, or open it after the snapshot (enter(snap=False))",
    ),
    "gpu-device": (
        "a process holds a GPU device, which CRIU cannot capture",
        "do not touch the GPU before the snapshot: move the model to it in enter(snap=False); check children "
        "left by fork too",
    ),
    "gpu-fork": (
        "a process holds a GPU device that the driver does not know it by: a child left by fork, without exec",
        "start children with subprocess or multiprocessing's spawn, or before the GPU is used",
    ),
    "gpu-peers": (
        "a process shares GPU memory with others (NCCL, CUDA IPC), which this driver cannot checkpoint",
        "open communicators after the snapshot (enter(snap=False)), or destroy them in a register_before_snapshot hook",
    ),
    "gpu-mps": (
        "a process uses the GPU through MPS, which the driver cannot checkpoint",
        "run it without MPS, or without enable_gpu_snapshot",
    ),
    "gpu-mig": (
        "a process uses a part of a GPU (MIG), which the driver cannot checkpoint",
        "give it a whole GPU, or run it without enable_gpu_snapshot",
    ),
    "gpu-graphics": (
        "a process uses the GPU for graphics or video, which the driver cannot checkpoint",
        "open it after the snapshot (enter(snap=False))",
    ),
    "gpu-amd-plugin": (
        "a process holds an AMD GPU, and CRIU's plugin for it (amdgpu_plugin.so) is not there",
        "install it (it is built with CRIU where libdrm is; WOODFROG_CRIU names a criu that has it), or touch the GPU "
        "after the snapshot only (enter(snap=False))",
    ),
    "device": (
        "a process holds a device, which CRIU cannot capture",
        "open it after the snapshot (enter(snap=False)), or close it in a register_before_snapshot hook",
    ),
    "descriptor-kind": (
        "a process holds a descriptor of a kind CRIU cannot capture",
        "open it after the snapshot (enter(snap=False)), or close it in a register_before_snapshot hook",
    ),
    "sysv-shm": (
        "a process uses System V shared memory (shmget), which is not captured",
        "use POSIX shared memory (multiprocessing.shared_memory), or attach it after the snapshot",
    ),
    "ipc-object": (
        "System V semaphores, message queues and shared memory, and POSIX message queues (mq_open), belong to no "
        "process and are not captured",
        "use POSIX semaphores and shared memory (multiprocessing's), make it after the snapshot (enter(snap=False)), "
        "or remove it in a register_before_snapshot hook",
    ),
    "own-address": (
        "a socket is bound to the sandbox's own address, which it has only before the snapshot",
        "bind servers to 127.0.0.1 or 0.0.0.0; close connected UDP sockets in a register_before_snapshot hook",
    ),
    "traced": (
        "a process is being traced (strace, gdb, a debugger), so that CRIU cannot stop it",
        "detach the tracer; the next capture will be tried anew",
    ),
    "nested-namespace": (
        "a process runs in namespaces of its own (a browser's or another sandbox)",
        "start it after the snapshot, or turn its sandbox off (for example chromium --no-sandbox)",
    ),
}
"""What the engine refuses before CRIU is started: cause and remedy by code."""


def _named(task: Task) -> str:
    return f"process {task.inner_pid} ({task.name})"


def _refusal(code: str, task: Task, what: str = "") -> Refusal:
    cause, remedy = REFUSALS[code]
    return Refusal(code, f"{_named(task)}{f', {what}' if what else ''}: {cause}", remedy)


def refused_computing(task: Task, threads: int) -> Refusal:
    """A process with threads that would go on with other registers than they had."""
    return _refusal("sve", task, f"{threads} thread{'s' * (threads > 1)} outside any system call")


def _refused_descriptor(d: Descriptor) -> str:
    if d.target == "anon_inode:[io_uring]":
        return "io-uring"
    if d.target.startswith(AMD_NODES):
        return "amd"
    if d.target.startswith("/dev/nvidia") or (d.device is not None and d.device[0] == 195):
        return "gpu-device"
    if d.device is not None and d.device[0] not in HARMLESS_MAJORS:
        return "device"
    if d.target.startswith("anon_inode:") and d.target not in ANON_INODES:
        return "descriptor-kind"
    return ""


def _refused_map(name: str) -> str:
    if name.startswith("/SYSV"):
        return "sysv-shm"
    if "io_uring" in name:
        return "io-uring"
    if name.startswith(AMD_NODES):
        return "amd"
    if name.startswith("/dev/nvidia"):
        return "gpu-device"
    # CRIU knows asynchronous I/O rings by another name; the rest of the anonymous kinds cannot be mapped again.
    return "device" if name.startswith("/dev/") else "descriptor-kind"


def refuse(
    tree: Tree,
    gpu: Mapping[int, bool] | None = None,
    *,
    gpu_peers: bool = False,
    amd_plugin: bool | None = None,
    criu_signs: bool = False,
) -> Refusal | None:
    """The first thing in the tree that CRIU cannot capture, or would capture wrongly.

    Args:
        gpu: where device memory is to be captured too: by host pid, whether the driver knows the process.
        gpu_peers: this driver can checkpoint memory that GPU processes share.
        amd_plugin: where memory of AMD's GPUs is to be captured too: whether CRIU has the plugin for it.
        criu_signs: what this CRIU dumps, it cannot restore here.
    """
    if criu_signs:
        return Refusal("criu-pointers", *REFUSALS["criu-pointers"])
    if tree.page_size != PAGE:
        return _of_tree("page-size", f"{tree.page_size >> 10} KiB")
    if tree.root != "/":
        return _of_tree("chroot", tree.root)
    device = "" if gpu is not None else "gpu-device"
    codes = {"gpu-device": device, "amd": {None: device, False: "gpu-amd-plugin", True: ""}[amd_plugin]}
    for task in tree.tasks:
        if task.tracer:
            return _refusal("traced", task, f"traced by {task.tracer}")
        if task.foreign_namespaces:
            return _refusal("nested-namespace", task, f"own {', '.join(task.foreign_namespaces)}")
        if gpu is not None and (refusal := _refused_gpu(task, gpu.get(task.pid, False), gpu_peers)):
            return refusal
        for d in task.descriptors:
            found = _refused_descriptor(d)
            if code := codes.get(found, found):
                return _refusal(code, task, f"descriptor {d.number}, {d.target}")
        for name in task.special_maps:
            found = _refused_map(name)
            if code := codes.get(found, found):
                return _refusal(code, task, f"mapped {name}")
    for code, names in (("own-address", tree.bound), ("ipc-object", tree.ipc)):
        if names:
            return _of_tree(code, names[0])
    return _refusal("stray-process", tree.strays[0]) if tree.strays else None


def _of_tree(code: str, what: str) -> Refusal:
    """Not of one process alone."""
    cause, remedy = REFUSALS[code]
    return Refusal(code, f"{what}: {cause}", remedy)


def _refused_gpu(task: Task, known: bool, peers: bool) -> Refusal | None:
    for name in task.gpu_devices:
        if name.startswith("/dev/nvidia-caps") and "-imex-" not in name:
            return _refusal("gpu-mig", task, f"holds {name}")
        if name.startswith(("/dev/dri/", "/dev/nvidia-modeset")):
            return _refusal("gpu-graphics", task, f"holds {name}")
        if not known:
            return _refusal("gpu-fork", task, f"holds {name}")
    for d in task.descriptors:
        if "/nvidia-mps/" in d.target:
            return _refusal("gpu-mps", task, f"descriptor {d.number}, {d.target}")
    if task.gpu_peers and not peers:
        return _refusal("gpu-peers", task, f"mapped {task.gpu_peers[0]}")
    return None


def _tcp(tree: Tree) -> Tcp:
    if not tree.connections:
        return "none"
    return "established" if any(c.inside for c in tree.connections) else "close"


def warnings(tree: Tree) -> tuple[str, ...]:
    """What of the tree a snapshot will not keep, one line each."""
    outside = [c for c in tree.connections if not c.inside]
    if not outside:
        return ()
    return (
        f"{len(outside)} TCP connection{'s' * (len(outside) > 1)} to the outside (first: {outside[0].remote}) will be "
        f"closed after the restore: close connections in a register_before_snapshot hook",
    )


@dataclass(frozen=True)
class GpuFacts:
    """What a restore must know of the GPUs.

    Args:
        driver: the driver's version.
        node: (uuid, chip) of each GPU of the machine.
        visible: uuids that the processes saw, in their order.
        processes: (inner pid, bytes of host memory that hold its device memory) of each process with GPU state.
        memory: (inner pid, begin, end): where that memory lies.
    """

    driver: str
    node: tuple[tuple[str, str], ...]
    visible: tuple[str, ...]
    processes: tuple[tuple[int, int], ...]
    memory: tuple[tuple[int, int, int], ...] = ()


@dataclass(frozen=True)
class Facts:
    """What a restore must know of the dump.

    Args:
        root_pid, max_pid: pids inside the sandbox: the root, and the highest of any thread.
        monotonic_ns: the processes' monotonic clock at the dump.
        sizes: bytes of each image file, by name.
    """

    root_pid: int
    max_pid: int
    tasks: int
    tcp: Tcp
    monotonic_ns: int
    criu: str
    sizes: Mapping[str, int] = field(default_factory=dict)
    format: int = 1
    gpu: GpuFacts | None = None
    directories: tuple[str, ...] = ()
    """Those in which CRIU, as root, will open what the processes had open, mapped or bound."""
    amd: bool = False
    """The images hold the memory of AMD's GPUs: CRIU needs its plugin to restore them."""
    huge: tuple[tuple[int, int, int], ...] = ()
    """(inner pid, begin, end) of the mappings that had memory in huge pages."""
    threads: tuple[ThreadSettings, ...] = ()
    """What threads had of their own that CRIU does not give back."""

    def to_json(self) -> str:
        data = asdict(self)
        if self.gpu is None:
            del data["gpu"]
        if not self.amd:
            del data["amd"]
        for name in ("huge", "threads"):
            if not data[name]:
                del data[name]
        return json.dumps(data, indent=1) + "\n"


def parse_facts(text: str) -> Facts:
    """Read what `Facts.to_json` wrote.

    Raises:
        ValueError: it is something else.
    """
    data = json.loads(text)
    if not isinstance(data, dict) or data.get("format") != 1:
        raise ValueError("not an engine.json of format 1")
    try:
        if (gpu := data.pop("gpu", None)) is not None:
            data["gpu"] = GpuFacts(
                driver=str(gpu["driver"]),
                node=tuple((str(uuid), str(name)) for uuid, name in gpu["node"]),
                visible=tuple(map(str, gpu["visible"])),
                processes=tuple((int(pid), int(size)) for pid, size in gpu["processes"]),
                memory=tuple((int(pid), int(begin), int(end)) for pid, begin, end in gpu.get("memory", ())),
            )
        data["threads"] = tuple(
            ThreadSettings(int(tid), tuple(map(int, cpus)), int(ioprio), int(slack))
            for tid, cpus, ioprio, slack in data.get("threads", ())
        )
        data["huge"] = tuple((int(pid), int(begin), int(end)) for pid, begin, end in data.get("huge", ()))
        facts = Facts(**(data | {"directories": tuple(map(str, data.get("directories", ())))}))
    except (TypeError, KeyError) as e:
        raise ValueError(str(e)) from None
    if not isinstance(facts.sizes, dict) or not facts.sizes:
        raise ValueError("no sizes")
    if facts.tcp not in ("none", "established", "close"):
        raise ValueError(f"tcp {facts.tcp!r}")
    return facts


def volumes_entered(directories: tuple[str, ...], volumes: tuple[str, ...]) -> tuple[str, ...]:
    """The volumes in which a restore opens anything."""
    return tuple(v for v in volumes if any(d == v or d.startswith(f"{v}/") for d in directories))


def foreign_credentials(
    found: Mapping[str, Credentials], *, ids: frozenset[int], capabilities: int, no_new_privs: bool
) -> str:
    """The thread that would be restored with more than the process had that was dumped; empty when there is none."""
    for name, has in found.items():
        more = has.capabilities & ~capabilities
        if more or not has.ids <= ids or (no_new_privs and not has.no_new_privs):
            return f"{name}: ids {', '.join(map(str, sorted(has.ids)))}, capabilities {has.capabilities:x}"
    return "" if found else "no thread"


def facts_of(
    tree: Tree,
    *,
    monotonic_ns: int,
    criu: str,
    gpu: GpuFacts | None = None,
    huge: tuple[tuple[int, int, int], ...] = (),
) -> Facts:
    return Facts(
        root_pid=tree.tasks[0].inner_pid,
        max_pid=max(max(t.inner_pid, t.max_thread) for t in tree.tasks),
        tasks=len(tree.tasks),
        tcp=_tcp(tree),
        monotonic_ns=monotonic_ns,
        criu=criu,
        gpu=gpu,
        amd=any(t.amd for t in tree.tasks),
        huge=huge,
        threads=tuple(s for t in tree.tasks for s in t.settings),
    )


def damaged(facts: Facts, found: Mapping[str, int]) -> str:
    """What is wrong with the image files, whose sizes are `found`; empty when nothing is. CRIU itself waits for ever
    for the missing end of a pages image."""
    for name, size in facts.sizes.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != size:
            return f"{name} has {found[name]} bytes, not {size}"
    return ""


def dump_plan(tree: Tree, *, plugins: str = "") -> Dump:
    """How to dump a tree that is not refused. `plugins`: where AMD's is."""
    watches = any("inotify" in d.target for t in tree.tasks for d in t.descriptors)
    return Dump(
        pid=tree.tasks[0].inner_pid,
        images=IMAGES,
        log="dump.log",
        tcp=_tcp(tree),
        irmap_paths=IRMAP_PATHS if watches else (),
        plugins=plugins if any(t.amd for t in tree.tasks) else "",
    )


def restore_plan(
    facts: Facts, *, monotonic_ns: int, lazy_pages: bool = False, stopped: bool = False, plugins: str = ""
) -> Restore:
    """How to restore. `monotonic_ns` is the sandbox's clock now; `lazy_pages`: a page server waits; `stopped`: it does
    not run yet; `plugins`: where AMD's is.

    A monotonic clock that ran backwards would stop timers for as long as the machine had been up. One that jumps ahead
    is what a suspended machine does to its programs too, and is left alone: a time namespace costs a millisecond.
    """
    return Restore(
        images=IMAGES,
        work=WORK,
        log="restore.log",
        tcp=facts.tcp,
        new_clock=monotonic_ns < facts.monotonic_ns,
        lazy_pages=lazy_pages,
        stopped=stopped,
        plugins=plugins if facts.amd else "",
    )


def refusals_markdown() -> str:
    """`REFUSALS` as `docs/failure-modes.md` shows them."""
    return "\n".join(
        f"**`{code}`**: {cause}.\n\n- What to do: {remedy}.\n" for code, (cause, remedy) in REFUSALS.items()
    )
