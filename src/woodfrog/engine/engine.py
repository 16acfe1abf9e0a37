"""Dump and restore a process tree with CRIU, inside its sandbox.

Each of the two is the same three steps: look (`inspect`), decide (`plan`, pure), carry out with an undo stack.
Whatever fails, the error says one cause and one remedy, what clean-up could not do is added to it, and never takes its
place.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import resource
import signal
import socket
import stat
import struct
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from woodfrog.criu.authority import credentials, paths
from woodfrog.criu.binary import Criu
from woodfrog.criu.diagnose import Diagnosis, diagnose, tail
from woodfrog.criu.options import check_command, dump_command, environment, restore_command
from woodfrog.criu.pagemap import (
    INDEX,
    MAX_FILES,
    build_index,
    index_files,
    keep_arguments,
    keep_reservations,
    write_index,
)
from woodfrog.criu.sockets import close_outside
from woodfrog.criu.stats import parse_stats
from woodfrog.cuda.failures import gpu_error
from woodfrog.engine.amd import AmdSide
from woodfrog.engine.gpu import GpuCapture, GpuSide, plan_back, put_back
from woodfrog.engine.inspect import Task, Tree, inspect_tree, task_alive
from woodfrog.engine.plan import (
    CACHE,
    FACTS,
    IMAGES,
    REFUSALS,
    WORK,
    Facts,
    GpuFacts,
    Refusal,
    damaged,
    dump_plan,
    facts_of,
    foreign_credentials,
    parse_facts,
    refuse,
    refused_computing,
    restore_plan,
    volumes_entered,
    warnings,
)
from woodfrog.errors import CaptureError, GpuError, RestoreError, SandboxError
from woodfrog.faults import fault, kills_criu
from woodfrog.linux import hugepages, procfs, threads
from woodfrog.linux.pageserver import NEVER, PageServer, Present, ServedPages
from woodfrog.linux.sandbox import Completed, ProcessSpec, Sandbox, SandboxProcess
from woodfrog.telemetry import Phases

__all__ = ["AmdSide", "DumpResult", "GpuSide", "Lazy", "dump", "prestart", "restore"]

T = TypeVar("T")

_daemon_log = logging.getLogger("woodfrog")

DUMP_TIMEOUT_S = 600.0
RESTORE_TIMEOUT_S = 60.0
RESTORE_BYTES_PER_S = 20e6
"""The slowest disk that a restore waits for."""
LAZY_SOCKET = "lazy-pages.socket"
"""Where CRIU looks for a page server, in its work directory."""
LAZY_CACHE = f"{CACHE}/lazy"
CRIU_LAST_WORDS_S = 0.5
"""How long CRIU may take to notice by itself that its page server is gone."""
SETTLE_S = 2.0
"""How long the tasks may take to run on after CRIU ended."""
SVE = Path("/proc/sys/abi/sve_default_vector_length")
"""There where the processor has arm64's scalable vectors, of whose registers CRIU keeps the first 16 bytes."""
AT_REST_S = 1.0
"""How long threads may go on computing before a dump where that matters."""
KILL_AFTER_S = 0.01
"""How far CRIU gets before the injected fault `kill-criu`."""
INJECTED_BLOB = "memfd:CRIUMFD"
"""What CRIU maps into a task to dump it from inside; gone again when it let go of the task."""


@dataclass(frozen=True)
class DumpResult:
    """What a dump made.

    Args:
        phases: CRIU's own times in ms: freezing, frozen, memdump, memwrite.
        tasks: processes in the snapshot.
        log: CRIU's log, beside the images.
        files: (path on the host, size, mtime_ns) of each file outside the sandbox's own layers that the processes have
            mapped or open: a restore needs them unchanged.
        warnings: what the snapshot does not keep, one line each.
        gpu: of `pages_bytes`, what was on GPUs, and where it lies now; None = nothing.
        reached: every path that a restore opens.
    """

    phases: dict[str, float]
    pages_bytes: int
    tasks: int
    log: Path
    files: tuple[tuple[str, int, int], ...] = ()
    warnings: tuple[str, ...] = ()
    gpu: GpuFacts | None = None
    reached: frozenset[str] = frozenset()

    @property
    def gpu_bytes(self) -> int:
        return sum(size for _, size in self.gpu.processes) if self.gpu is not None else 0


@dataclass
class _Undo:
    """Steps that take back what was done, the latest first."""

    steps: list[tuple[str, Callable[[], Awaitable[None]]]] = field(default_factory=list)

    def push(self, name: str, step: Callable[[], Awaitable[None]]) -> None:
        self.steps.append((name, step))

    async def unwind(self) -> list[str]:
        """Take everything back. What fails is returned, not raised: the cause of the failure comes first."""
        failures = []
        while self.steps:
            name, step = self.steps.pop()
            try:
                await step()
            except Exception as e:
                failures.append(f"{name}: {e}")
        return failures


class _Failure(Exception):
    """Why a step did not succeed, before it is known what became of the processes."""

    def __init__(
        self,
        message: str,
        code: str,
        remedy: str = "",
        *,
        log: str = "",
        at_fault: bool = False,
        criu_killed: bool = False,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.remedy = remedy
        self.log = log
        self.at_fault = at_fault
        self.criu_killed = criu_killed


def _failed(verb: str, done: Completed, log: str) -> _Failure:
    why = _why(done, log)
    return _Failure(
        f"cannot {verb}: {why.cause}",
        why.code,
        why.remedy,
        log=log,
        at_fault=why.at_fault,
        criu_killed=done.status < 0,
    )


def _is_full(directory: Path) -> bool:
    space = os.statvfs(directory)
    return space.f_bavail * space.f_frsize < 1 << 16


def _unexpected(verb: str, error: Exception) -> _Failure:
    if isinstance(error, _Failure):
        return error
    if isinstance(error, SandboxError):
        return _Failure(f"cannot {verb}: {error.message}", error.code)
    if isinstance(error, GpuError):
        remedy = str(error.fields.get("remedy", ""))
        return _Failure(f"cannot {verb}: {error.message.removesuffix(f'; {remedy}')}", error.code, remedy)
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "make room below woodfrog's state directory" if full else ""
        return _Failure(f"cannot {verb}: {error}", "disk-full" if full else "engine-io", remedy)
    return _Failure(f"cannot {verb}: {type(error).__name__}: {error}", "engine-unexpected")


def _one_line(failure: _Failure) -> str:
    return f"{failure.message}; {failure.remedy}" if failure.remedy else failure.message


def _read_log(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _stats(path: Path) -> dict[str, int]:
    try:
        return parse_stats(path.read_bytes())
    except OSError:
        return {}


def _clock_ns(pid: int) -> int:
    """The monotonic clock as a process sees it, which may be in a time namespace."""
    now = time.monotonic_ns()
    try:
        lines = Path(f"/proc/{pid}/timens_offsets").read_text().splitlines()
    except OSError:
        return now
    for line in lines:
        name, seconds, nanoseconds = line.split()
        if name in ("monotonic", "1"):
            return now + int(seconds) * 1_000_000_000 + int(nanoseconds)
    return now


def _limits() -> dict[int, tuple[int, int]]:
    """CRIU opens every descriptor of every process at once."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return {resource.RLIMIT_NOFILE: (hard, hard)}


async def _run_criu(sandbox: Sandbox, spec: ProcessSpec, timeout: float, point: str) -> Completed:
    kill = kills_criu(point)
    criu: list[SandboxProcess] = []

    def started(process: SandboxProcess) -> None:
        criu.append(process)
        if kill:
            asyncio.get_running_loop().call_later(KILL_AFTER_S, process.send_signal, signal.SIGKILL)

    finished = False
    try:
        done = await sandbox.run(spec, timeout, on_spawn=started)
        finished = done.status >= 0
        return done
    finally:
        if criu and not finished:
            # A killed CRIU leaves processes behind in its session, and keeps directories busy until it is gone.
            with suppress(SandboxError):
                await sandbox.signal(-criu[0].inner_pid, signal.SIGKILL)
            with suppress(SandboxError, TimeoutError):
                await asyncio.wait_for(criu[0].wait(), SETTLE_S)


def _spec(criu: Criu, argv: tuple[str, ...], *, uid: int = 0, gid: int = 0, cache: str = CACHE) -> ProcessSpec:
    """CRIU as root, or as the worker's uid with every capability that is held: a process of another uid cannot be
    dumped without CAP_SYS_RESOURCE, which containers and some virtual machines lack, and one's own always can."""
    return ProcessSpec(
        argv=argv,
        env=environment(cache),
        uid=uid,
        gid=gid,
        caps="ambient" if uid else "held",
        no_new_privs=False,
        seccomp=False,
        rlimits=_limits(),
        umask=0o077,
    )


async def prestart(sandbox: Sandbox, criu: Criu, *, uid: int = 0, gid: int = 0) -> None:
    """Load CRIU ahead of what needs it, which takes 3 to 8 ms. Where that cannot be, it is loaded when it is needed."""
    with suppress(SandboxError, OSError):
        await sandbox.prestart(_spec(criu, (str(criu.path),), uid=uid, gid=gid))


async def _prestart_dump(sandbox: Sandbox, criu: Criu, root: SandboxProcess) -> None:
    with suppress(ProcessLookupError):
        who = procfs.status(root.host_pid)
        await prestart(sandbox, criu, uid=who.uids[0], gid=who.gids[0])


async def _fill_cache(sandbox: Sandbox, criu: Criu) -> None:
    """Let root write CRIU's kernel-feature cache, before a CRIU that runs as the worker's uid makes one the worker
    could alter. CRIU believes what is in it: one that is not root's is made anew."""
    if not _of_root(sandbox.path(f"{CACHE}/criu.kdat")):
        await sandbox.run(_spec(criu, check_command(str(criu.path))), 60.0)


def _of_root(cache: Path) -> bool:
    """Whether there is such a file, which none but root may have written. Any other is removed."""
    with suppress(FileNotFoundError):
        info = cache.lstat()
        if stat.S_ISREG(info.st_mode) and info.st_uid == 0 and not info.st_mode & 0o022:
            return True
        cache.unlink()
    return False


async def _fill_lazy_cache(sandbox: Sandbox, criu: Criu) -> bool:
    """A cache of its own for restores with a page server; False when there can be none.

    An unprivileged CRIU does not look for userfaultfd, and with the cache it makes it asks the kernel for no events:
    the page server would not hear of a fork or of memory given back, and processes would read wrong bytes. So a
    privileged CRIU makes this one. It keeps it in /run, and only where that is a tmpfs.
    """
    target = sandbox.path(f"{LAZY_CACHE}/criu.kdat")
    if _of_root(target):
        return True
    script = 'mount -n -t tmpfs tmpfs /run && { "$0" check --no-default-config >/dev/null 2>&1; cat /run/criu.kdat; }'
    argv = ("unshare", "--mount", "--propagation", "private", "/bin/sh", "-c", script, str(criu.path))
    done = await sandbox.run(_spec(criu, argv), 60.0)
    if done.status != 0 or not done.stdout:
        return False
    target.parent.mkdir(mode=0o700, exist_ok=True)
    # Several sandboxes share this directory.
    temporary = target.with_name(f".{sandbox.id}")
    temporary.write_bytes(done.stdout)
    temporary.replace(target)
    return True


def _pages_bytes(images: Path) -> int:
    return sum(p.stat().st_size for p in images.glob("pages-*.img"))


def _image_sizes(images: Path) -> dict[str, int]:
    with os.scandir(images) as entries:
        return {e.name: e.stat().st_size for e in entries if e.name.endswith(".img")}


def _close_outside(images: Path) -> bool:
    """Whether only connections within the tree are left in the images."""
    try:
        close_outside(images)
    except (ValueError, IndexError, OSError):
        return False
    return True


def _write_index(images: Path) -> None:
    """Without an index the images restore as plain CRIU does it: everything is read first."""
    try:
        keep_reservations(images)
        keep_arguments(images)
        index = write_index(build_index(images))
    except (ValueError, KeyError, IndexError, struct.error):
        return
    (images / INDEX).write_bytes(index)


@dataclass
class Lazy:
    """Memory that follows the processes: they run first, the page server gives them what they touch.

    Args:
        server: who serves it.
        working_set: pages pushed in before the processes run; a file of `ServedPages.record`'s form.
        around: bytes served around a fault.
        drain_ms: when to fill in the rest, counted from the start of the processes.
        index: the page index; None = `pages.idx` of the images.
        files: what the page index names, in its order; None = the pages files beside it.
        present: some of the files are still on their way.
        everything: all memory is there before the processes run, and nothing waits for more: they may be dumped again.
        on_held: called when memory is laid out and the processes are about to run: their sockets are there.
        parked: nothing is pushed or filled in before `served.push()`: an instance that waits has almost no memory.
        served: set by `restore`: the memory of this restore, to be dropped when its processes are gone.
        huge: set by `restore`: (inner pid, begin, end) of what lay in huge pages at the dump, and does not now.
    """

    server: PageServer
    working_set: Path | None = None
    around: int = 16 << 12
    drain_ms: int = NEVER
    index: Path | None = None
    files: tuple[Path, ...] | None = None
    present: Present | None = None
    everything: bool = False
    parked: bool = False
    on_held: Callable[[], None] | None = None
    served: ServedPages | None = None
    huge: tuple[tuple[int, int, int], ...] = ()


def _page_files(images: Path, lazy: Lazy) -> tuple[Path, ...] | None:
    """The files of the page index, or None where the page server cannot take it: CRIU reads everything itself then."""
    try:
        names = index_files(lazy.index or images / INDEX)
    except (OSError, ValueError):
        return None
    files = tuple(images / name for name in names) if lazy.files is None else lazy.files
    return files if len(files) == len(names) <= MAX_FILES else None


def _serve_pages(sandbox: Sandbox, images: Path, files: tuple[Path, ...], lazy: Lazy) -> None:
    """Have the page server wait for CRIU inside the sandbox."""
    fds: list[int] = []
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(sandbox.path(f"{WORK}/{LAZY_SOCKET}")))
        listener.listen(1)
        paths = (lazy.index or images / INDEX, *files)
        fds += [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in paths]
        working_set = None
        if lazy.working_set is not None:
            with suppress(FileNotFoundError):
                working_set = os.open(lazy.working_set, os.O_RDONLY | os.O_CLOEXEC)
                fds.append(working_set)
        lazy.served = lazy.server.serve(
            listener,
            fds[0],
            fds[1 : len(paths)],
            working_set=working_set,
            around=lazy.around,
            drain_ms=lazy.drain_ms,
            parked=lazy.parked,
            everything=lazy.everything,
            present=lazy.present,
        )
        if lazy.on_held is not None:
            tell = lazy.on_held
            lazy.served.held.add_done_callback(lambda held: held.cancelled() or tell())
    finally:
        listener.close()
        for fd in fds:
            os.close(fd)


def _seal(images: Path, facts: Facts) -> None:
    (images / FACTS).write_text(replace(facts, sizes=_image_sizes(images)).to_json())
    for path in images.iterdir():
        os.chown(path, 0, 0, follow_symlinks=False)
        path.chmod(0o600)


def _refuse_survivors(sandbox: Sandbox) -> None:
    """What CRIU did not stop may have changed what it was dumping."""
    for pid in procfs.children(sandbox.init_pid):
        with suppress(ProcessLookupError):
            left = procfs.status(pid)
            if not procfs.ending(pid):
                cause, remedy = REFUSALS["stray-process"]
                raise _Failure(f"process {left.ns_pids[-1]} ({left.name}): {cause}", "stray-process", remedy)


def _check_authority(images: Path, who: procfs.Status) -> frozenset[str]:
    """Every path in the images; the processes in them must not be more than they were."""
    try:
        found = foreign_credentials(
            credentials(images),
            ids=frozenset((*who.uids, *who.gids, *who.groups)),
            capabilities=who.cap_inheritable | who.cap_permitted | who.cap_bounding | who.cap_ambient,
            no_new_privs=who.no_new_privs,
        )
        reached = paths(images)
    except (ValueError, IndexError) as e:
        found = f"an image is not understood ({e})"
    if found:
        cause, remedy = "the images do not hold the processes as they were", "do not change a process that is frozen"
        raise _Failure(f"cannot capture: {cause}: {found}", "images-altered", remedy)
    return reached


def _remove_images(images: Path) -> None:
    """A capture that failed leaves its logs only: the images may be gigabytes."""
    for path in images.iterdir():
        if path.suffix != ".log":
            path.unlink()


def _deleted_directories(tree: Tree) -> set[str]:
    found = {os.path.dirname(d.target) for t in tree.tasks for d in t.descriptors if d.deleted}
    return {"/dev/shm", *(d for d in found if d.startswith("/"))}


def _link_remaps(sandbox: Sandbox, directories: set[str]) -> set[str]:
    """Names that CRIU gave to deleted files while dumping. Directories below which the user writes are opened without
    symlinks."""
    found = set()
    for directory in directories:
        try:
            fd = sandbox.open_path(directory, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            continue
        try:
            found |= {f"{directory}/{name}" for name in os.listdir(fd) if name.startswith("link_remap.")}
        finally:
            os.close(fd)
    return found


def _unlink(sandbox: Sandbox, path: str) -> None:
    directory, _, name = path.rpartition("/")
    fd = sandbox.open_path(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.unlink(name, dir_fd=fd)
    finally:
        os.close(fd)


def _still_injected(task: Task) -> bool:
    try:
        return any(INJECTED_BLOB in m.path for m in procfs.maps(task.pid))
    except OSError:
        return False


async def _settle(sandbox: Sandbox, root: SandboxProcess, tree: Tree, *, criu_killed: bool) -> bool:
    """After a failed dump: True when every process runs on as before. Otherwise none is left alive, so that it is
    known.

    CRIU undoes its work when it fails. When it was killed half-way, a task may be left stopped, or with the code that
    CRIU put into it: such a task is not what it was.
    """
    deadline = time.monotonic() + SETTLE_S
    while True:
        # Nobody is left who would take it out again.
        if criu_killed and any(_still_injected(t) for t in tree.tasks):
            break
        gone = [t for t in tree.tasks if not task_alive(t)]
        if not gone:
            return True
        if time.monotonic() > deadline:
            break
        for task in gone:
            try:
                if procfs.stat(task.pid).start_ticks == task.start_ticks:
                    os.kill(task.pid, signal.SIGCONT)
            except (OSError, ProcessLookupError):
                continue
        await asyncio.sleep(0.05)
    await _kill_and_wait(sandbox, root)
    return False


async def dump(
    sandbox: Sandbox,
    *,
    root_pid: int,
    images: Path,
    criu: Criu,
    phases: Phases,
    gpu: GpuSide | AmdSide | None = None,
    timeout: float = DUMP_TIMEOUT_S,
) -> DumpResult:
    """Dump the tree of `root_pid` into `images` and kill it.

    Args:
        root_pid: pid inside the sandbox.
        images: an empty host directory, root's alone.
        gpu: capture device memory too; None = a process that holds a GPU is refused.
        timeout: seconds CRIU may take.

    Raises:
        CaptureError: with cause and remedy. `alive` is True when every process runs on unharmed, False when all are
        dead.

    Example:
        `result = await dump(sandbox, root_pid=100, images=staging.images, criu=find_criu(), phases=Phases())`
    """
    log_path = images / "dump.log"
    undo = _Undo()
    phase = "inspect"
    tree: Tree | None = None
    killed_ok = False
    on_gpu = GpuCapture(gpu) if isinstance(gpu, GpuSide) else None
    amd = gpu if isinstance(gpu, AmdSide) else None
    root = await _watch(sandbox, root_pid)
    loading = asyncio.create_task(_prestart_dump(sandbox, criu, root))

    async def end_waiting() -> None:
        await loading
        await sandbox.drop_prestarted()

    undo.push("end the CRIU that waits", end_waiting)
    try:
        with phases("inspect"):
            tree = await asyncio.to_thread(inspect_tree, root.host_pid, sandbox.init_pid)
            if on_gpu is not None:
                await on_gpu.find(tree)
        phase = "plan"
        if on_gpu is not None:
            _refuse(refuse(tree, on_gpu.known, gpu_peers=on_gpu.peers, criu_signs=criu.signs))
            if on_gpu.processes:
                phase = "gpu"
                await on_gpu.save(phases)
                # Nothing of the GPU may be left in it: CRIU would fail, or lose it.
                tree = await asyncio.to_thread(inspect_tree, root.host_pid, sandbox.init_pid)
                phase = "plan"
        with phases("huge"):
            huge = await asyncio.to_thread(_huge, tree)
        with phases("plan"):
            plugin = amd.plugins is not None if amd is not None else None
            _refuse(refuse(tree, amd_plugin=plugin, criu_signs=criu.signs))
            plan = dump_plan(tree, plugins=_plugins(amd))
            facts = facts_of(
                tree,
                monotonic_ns=_clock_ns(root.host_pid),
                criu=criu.name,
                gpu=on_gpu.facts() if on_gpu is not None else None,
                huge=huge,
            )
        phase = "prepare"
        with phases("prepare"):
            await _fill_cache(sandbox, criu)
            undo.push("remove images", lambda: asyncio.to_thread(_remove_images, images))
            before = _link_remaps(sandbox, directories := _deleted_directories(tree))

            async def remove_remaps() -> None:
                for path in _link_remaps(sandbox, directories) - before:
                    _unlink(sandbox, path)

            undo.push("remove link_remap files", remove_remaps)
            await sandbox.bind(images, IMAGES, read_only=False)
            undo.push("unbind images", lambda: sandbox.unbind(IMAGES))
            fault("dump.before")
        phase = "criu"
        with phases("criu"):
            who = procfs.status(tree.tasks[0].pid)
            await loading
            await _at_rest(tree)
            command = dump_command(str(criu.path), plan)
            spec = _spec(criu, command, uid=who.uids[0], gid=who.gids[0])
            done = await _run_criu(sandbox, spec, timeout, "dump.criu")
            if done.status != 0:
                log = _read_log(log_path)
                if _is_full(images):
                    # CRIU's last words did not fit either.
                    log += f"\nError (images): {os.strerror(errno.ENOSPC)}\n"
                raise _failed("capture", done, log)
            killed_ok = True
        phase = "finish"
        with phases("finish"):
            fault("dump.after")
            await sandbox.unbind(IMAGES)
            _refuse_survivors(sandbox)
            reached = await asyncio.to_thread(_check_authority, images, who)
            facts = replace(facts, directories=tuple(sorted({os.path.dirname(p) for p in reached})))
            stats = _stats(images / "stats-dump")
            await asyncio.to_thread(_write_index, images)
            lost = warnings(tree)
            if facts.tcp == "established" and not await asyncio.to_thread(_close_outside, images) and lost:
                facts = replace(facts, tcp="close")
                lost += (
                    "connections within the sandbox will be closed too: CRIU's image of sockets is an unknown one",
                )
            await asyncio.to_thread(_seal, images, facts)
            pages = _pages_bytes(images)
    except asyncio.CancelledError:
        await undo.unwind()
        raise
    except Exception as e:
        failure = _unexpected("capture", e)
        cleanup = await undo.unwind()
        killed = failure.criu_killed or failure.code == "sandbox-timeout"
        alive = False
        if tree is not None and not killed_ok:
            alive = await _settle(sandbox, root, tree, criu_killed=killed)
            # Not before: the driver works inside the processes, and waits for ever for one that is stopped.
            if alive and on_gpu is not None:
                alive = await _bring_back(sandbox, root, on_gpu, cleanup, lost=failure.code == "gpu-bytes-missing")
        raise _capture_error(failure, phase, alive, cleanup) from e
    times = {
        name: stats[key] / 1e3
        for name, key in (
            ("freezing", "freezing_time"), ("frozen", "frozen_time"),
            ("memdump", "memdump_time"), ("memwrite", "memwrite_time"),
        )
        if key in stats
    }  # fmt: skip
    for name, ms in times.items():
        phases.add(f"criu.{name}", ms, parent="criu")
    return DumpResult(
        phases=times,
        pages_bytes=pages,
        tasks=len(tree.tasks),
        log=log_path,
        files=tuple((f.path, f.size, f.mtime_ns) for f in tree.files),
        warnings=lost,
        gpu=facts.gpu,
        reached=reached,
    )


def _huge(tree: Tree) -> tuple[tuple[int, int, int], ...]:
    if not hugepages.available():
        return ()
    return tuple((t.inner_pid, *found) for t in tree.tasks for found in hugepages.huge_ranges(t.pid))


def _plugins(amd: AmdSide | None) -> str:
    return str(amd.plugins) if amd is not None and amd.plugins is not None else ""


def _refuse(refusal: Refusal | None) -> None:
    if refusal is not None:
        raise _Failure(f"cannot capture: {refusal.cause}", refusal.code, refusal.remedy)


async def _at_rest(tree: Tree) -> None:
    """With SVE, wait for a moment in which no thread computes. Those in a system call have nothing in its registers:
    the kernel clears them there. One that begins again before CRIU has stopped it is not seen.

    Raises:
        _Failure: there was no such moment.
    """
    if not SVE.exists():
        return
    end = time.monotonic() + AT_REST_S
    while busy := await asyncio.to_thread(_computing, tree):
        if time.monotonic() >= end:
            _refuse(refused_computing(*busy))
        await asyncio.sleep(0.01)


def _computing(tree: Tree) -> tuple[Task, int] | None:
    for task in tree.tasks:
        with suppress(FileNotFoundError, ProcessLookupError):
            if threads := procfs.computing(task.pid):
                return task, threads
    return None


async def _bring_back(
    sandbox: Sandbox, root: SandboxProcess, on_gpu: GpuCapture, cleanup: list[str], *, lost: bool
) -> bool:
    """Whether all are back on the GPU, and run. Otherwise none is left alive: one that is stuck never runs again, and
    one whose device memory is `lost` would go on with other bytes."""
    if not lost:
        try:
            await on_gpu.bring_back()
            return True
        except GpuError as e:
            cleanup.append(f"bring back to the GPU: {e.message}")
    await _kill_and_wait(sandbox, root)
    return False


async def _kill_and_wait(sandbox: Sandbox, root: SandboxProcess) -> None:
    with suppress(SandboxError):
        await _kill_all(sandbox)
    with suppress(SandboxError, TimeoutError):
        await asyncio.wait_for(root.wait(), SETTLE_S)


async def _watch(sandbox: Sandbox, root_pid: int) -> SandboxProcess:
    try:
        root = await sandbox.watch(root_pid)
    except SandboxError as e:
        raise CaptureError(f"cannot capture: {e.message}", alive=False, phase="inspect", code="process-gone") from e
    if root.status is not None or root.host_pid < 0:
        raise CaptureError(
            f"cannot capture: process {root_pid} ended (status {root.status})",
            alive=False,
            phase="inspect",
            code="process-gone",
        )
    return root


def _why(done: Completed, log: str) -> Diagnosis:
    diagnosis = diagnose(log)
    said = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
    if done.status < 0 and diagnosis.code in ("criu-silent", "criu-unknown"):
        name = signal.Signals(-done.status).name
        return Diagnosis(
            "criu-killed", f"CRIU was killed ({name})", "look for an out-of-memory kill in the kernel's log", ""
        )
    if diagnosis.code == "criu-silent" and said:
        return Diagnosis("criu-unknown", f"unknown CRIU error: {said[-1]}", diagnosis.remedy, said[-1])
    return diagnosis


def _capture_error(failure: _Failure, phase: str, alive: bool, cleanup: list[str]) -> CaptureError:
    fields: dict[str, Any] = {"cleanup": cleanup} if cleanup else {}
    return CaptureError(
        _one_line(failure),
        alive=alive,
        phase=phase,
        remedy=failure.remedy,
        log_tail=tail(failure.log),
        code=failure.code,
        **fields,
    )


async def restore(
    sandbox: Sandbox,
    *,
    images: Path,
    criu: Criu,
    phases: Phases,
    lazy: Lazy | None = None,
    stopped: bool = False,
    gpu: GpuSide | AmdSide | None = None,
    timeout: float | None = None,
) -> SandboxProcess:
    """Restore the tree of `images` in a sandbox that nothing else runs in. The images are only read.

    Args:
        lazy: let the page server give the processes their memory; its `served` is set. None = CRIU reads all of it
        first.
        stopped: not one instruction of it runs before it is sent SIGCONT. Not with GPU memory, which comes back through
        the running process.
        gpu: the GPUs of this sandbox; needed where the snapshot holds GPU memory.
        timeout: seconds CRIU may take; None = by the size of the images.

    Returns:
        The root process, running or stopped.

    Raises:
        RestoreError: with cause and remedy; nothing of the tree is left running. `snapshot_at_fault` when it will
        never restore.
    """
    undo = _Undo()
    log = ""
    phase = "inspect"
    try:
        with phases("inspect"):
            facts = await asyncio.to_thread(_load_facts, images)
        phase = "plan"
        with phases("plan"):
            pairs: tuple[tuple[str, str], ...] = ()
            amd = gpu if isinstance(gpu, AmdSide) else None
            if facts.gpu is not None:
                if not isinstance(gpu, GpuSide) or stopped:
                    raise gpu_error("gpu-needed", "snapshot")
                pairs = await plan_back(gpu, facts.gpu)
            elif facts.amd:
                if amd is None or stopped:
                    raise gpu_error("gpu-needed", "snapshot")
                if amd.plugins is None:
                    cause, remedy = REFUSALS["gpu-amd-plugin"]
                    raise _Failure(f"cannot restore: {cause}", "gpu-amd-plugin", remedy)
            # AMD's kernel driver asks for memory that programs gave it at the end of CRIU's restore, and as NVIDIA's it
            # cannot wait for it.
            served_later = lazy is not None and not (facts.amd and lazy.files is None)
            page_files = (
                await asyncio.to_thread(_page_files, images, lazy) if lazy is not None and served_later else None
            )
            clock = _clock_ns(sandbox.init_pid)
            lazy_pages = page_files is not None
            # Another sandbox may put a symlink where a directory was, and CRIU follows it as root.
            entered = volumes_entered(facts.directories, sandbox.volumes)
            plan = restore_plan(
                facts,
                monotonic_ns=clock,
                lazy_pages=lazy_pages,
                stopped=stopped or bool(entered),
                plugins=_plugins(amd),
            )
        phase = "prepare"
        with phases("prepare"):
            if plan.lazy_pages and not await _fill_lazy_cache(sandbox, criu):
                plan = replace(plan, lazy_pages=False)
            if not plan.lazy_pages:
                await _fill_cache(sandbox, criu)
            if lazy is not None and lazy.files is not None and not plan.lazy_pages:
                # The images have only what CRIU reads itself: it would take the rest for zeroes.
                raise _Failure(
                    "cannot restore: its memory lies in packs, and no page server can give it",
                    "memory-not-served",
                    "run `woodfrog doctor`; it starts cold meanwhile",
                )
            await sandbox.bind(images, IMAGES, read_only=True)
            undo.push("unbind images", lambda: sandbox.unbind(IMAGES))
            undo.push("kill what was restored", lambda: _kill_all(sandbox))
            await sandbox.set_last_pid(facts.max_pid)
            if entered:
                await sandbox.follow_links(entered, False)
            if lazy is not None and page_files is not None and plan.lazy_pages:
                _serve_pages(sandbox, images, page_files, lazy)
                undo.push("drop its pages", lambda: _drop_pages(lazy))
            fault("restore.before")
        phase = "criu"
        with phases("criu") as criu_phase:
            limit = timeout or RESTORE_TIMEOUT_S + sum(facts.sizes.values()) / RESTORE_BYTES_PER_S
            spec = _spec(criu, restore_command(str(criu.path), plan), cache=LAZY_CACHE if plan.lazy_pages else CACHE)
            served = lazy.served if lazy is not None and plan.lazy_pages else None
            done = await _while_served(_run_criu(sandbox, spec, limit, "restore.criu"), served)
            log = _read_log(sandbox.path(f"{WORK}/restore.log"))
            if served is not None and (done.status == 0 or served.failed.done()):
                # Also when CRIU failed: without a page server it does, and the snapshot is not at fault.
                await served.safe()
            if done.status != 0:
                raise _failed("restore", done, log)
            if entered:
                await sandbox.follow_links(entered, True)
                if not stopped:
                    await sandbox.signal(-1, signal.SIGCONT)
            stats = _stats(sandbox.path(f"{WORK}/stats-restore"))
        for name, key in (("criu.fork", "forking_time"), ("criu.restore", "restore_time")):
            if key in stats:
                phases.add(name, stats[key] / 1e3, start_ms=criu_phase.start_ms, parent="criu")
        if served is not None and lazy is not None and lazy.everything:
            phase = "memory"
            with phases("memory"):
                await served.whole()
        phase = "finish"
        with phases("finish"):
            root = await sandbox.watch(facts.root_pid)
            if root.status is not None:
                raise _Failure(
                    f"cannot restore: process {facts.root_pid} ended at once (status {root.status})",
                    "process-gone",
                    log=log,
                )
            fault("restore.after")
            await sandbox.unbind(IMAGES)
            if lazy is not None:
                lazy.huge = facts.huge
            if facts.threads:
                tree = procfs.tree(root.host_pid)
                for line in await asyncio.to_thread(threads.apply, tree, facts.threads, sandbox.init_pid):
                    _daemon_log.warning("%s: %s", sandbox.id, line)
        if facts.gpu is not None and isinstance(gpu, GpuSide):
            phase = "gpu"
            await _while_served(put_back(gpu, facts.gpu, pairs, sandbox.init_pid, phases), served)
        return root
    except asyncio.CancelledError:
        await undo.unwind()
        raise
    except Exception as e:
        failure = _unexpected("restore", e)
        cleanup = await undo.unwind()
        fields: dict[str, Any] = {"cleanup": cleanup} if cleanup else {}
        raise RestoreError(
            _one_line(failure),
            snapshot_at_fault=failure.at_fault,
            phase=phase,
            remedy=failure.remedy,
            log_tail=tail(failure.log),
            code=failure.code,
            **fields,
        ) from e


async def _while_served(work: Coroutine[Any, Any, T], served: ServedPages | None) -> T:
    """Let CRIU or the driver finish, unless the memory that is restored can no longer be served: the tasks may wait for
    some of it.

    Raises:
        SandboxError: it was ended for that.
    """
    if served is None:
        return await work
    running = asyncio.ensure_future(work)
    try:
        either: set[asyncio.Future[Any]] = {running, served.failed}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            await asyncio.wait({running}, timeout=CRIU_LAST_WORDS_S)
        if running.done():
            return running.result()
        raise SandboxError(f"memory cannot be served: {served.failed.result()}", code="memory-not-served")
    finally:
        if not running.done():
            running.cancel()
            await asyncio.wait({running})


async def _drop_pages(lazy: Lazy) -> None:
    if lazy.served is not None:
        await lazy.served.drop()


def _load_facts(images: Path) -> Facts:
    try:
        facts = parse_facts((images / FACTS).read_text())
        damage = damaged(facts, _image_sizes(images))
    except (OSError, ValueError) as e:
        damage = f"{FACTS}: {e}"
    if damage:
        raise _Failure(
            f"cannot restore: the snapshot is damaged ({damage})",
            "image-corrupt",
            "it is retired and a new one made; check the disk",
            at_fault=True,
        )
    return facts


async def _kill_all(sandbox: Sandbox) -> None:
    try:
        await sandbox.signal(-1, signal.SIGKILL)
    except SandboxError as e:
        if e.fields.get("errno") != errno.ESRCH:
            raise
