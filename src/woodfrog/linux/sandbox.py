"""One sandbox: its namespaces, its init (native/init.c), and what the daemon asks of it.

    sandbox = await Sandbox.prepare("a1", init_binary=..., scratch=..., host=host, worker_uid=64646)
    await sandbox.assemble(root_plan(request, host))
    worker = await sandbox.spawn(ProcessSpec(("/usr/bin/python3", "-c", "..."), uid=64646, gid=64646))
    status = await worker.wait()
    await sandbox.destroy()

Everything is driven by the running event loop (asyncio's own or uvloop): no threads, no blocking waits. A sandbox
belongs to the thread and process that prepared it, and dies with them.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import signal
import socket
import stat
import struct
import subprocess
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from woodfrog.errors import SandboxError
from woodfrog.linux.cgroups import Cgroup, Cgroups, Limits
from woodfrog.linux.native import cannot_start, native_path
from woodfrog.linux.network import NetworkLease
from woodfrog.linux.rootplan import Beneath, HostRoot, Op, RootPlan, base_plan

__all__ = ["Completed", "Limits", "ProcessSpec", "Sandbox", "SandboxProcess", "init_binary_path", "prestart_path"]

PACKET_BYTES = 64_000
MAX_UNCLAIMED_EXITS = 4096
STARTUP_TIMEOUT_S = 30.0
GONE_TIMEOUT_S = 10.0
CAPTURE_BYTES = 1 << 20
PRESTART_PID = 2
"""Init gives such low pids to nobody else, so that they are in no snapshot."""

_OPEN_TREE = 428
_OPENAT2 = 437
_OPEN_TREE_CLONE = 1
_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_AT_RECURSIVE = 0x8000
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_NO_SYMLINKS = 0x04
_RESOLVE_IN_ROOT = 0x10
_libc = ctypes.CDLL(None, use_errno=True)

Stdio = int | str | None
"""A descriptor to hand over, a path inside the sandbox to open, or None for /dev/null."""


def init_binary_path() -> Path:
    """Where the package keeps the compiled init."""
    return native_path("woodfrog-init")


def prestart_path() -> Path:
    """Where the package keeps the library that makes a program wait before its main()."""
    return native_path("woodfrog-prestart.so")


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """A process to start inside a sandbox.

    Args:
        argv: program and arguments; a program without a slash is looked for in `env`'s PATH.
        caps: "none" drops everything for good; "held" keeps what the uid has (root: all that init holds);
            "ambient" switches the uid and keeps all that init holds, inherited across exec.
        inner_pid: the pid it is to have inside; None = the next free one.
        pass_fds: target number (3-255) to descriptor of this process.
        rlimits: `resource.RLIMIT_*` to (soft, hard); -1 = unlimited.
        subreaper: processes that detach themselves stay in its tree, and so in a snapshot of it.
        umask: file mode mask.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str = "/"
    uid: int = 0
    gid: int = 0
    caps: Literal["none", "held", "ambient"] = "none"
    no_new_privs: bool = True
    seccomp: bool = True
    inner_pid: int | None = None
    stdin: Stdio = None
    stdout: Stdio = None
    stderr: Stdio = None
    pass_fds: Mapping[int, int] = field(default_factory=dict)
    rlimits: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    new_session: bool = True
    subreaper: bool = False
    umask: int = 0o022


@dataclass(frozen=True, slots=True)
class Completed:
    """What `Sandbox.run` brings back. `status` is the exit status; negative = the signal that ended it."""

    status: int
    stdout: bytes
    stderr: bytes
    truncated: bool = False


class SandboxProcess:
    """A process in a sandbox: started by `spawn`, or found by `watch`."""

    def __init__(self, sandbox: Sandbox, inner_pid: int, pidfd: int | None) -> None:
        self._sandbox = sandbox
        self._pidfd = pidfd
        self._exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        # Nobody need wait for it: a sandbox that is destroyed ends it with an exception.
        self._exited.add_done_callback(lambda f: f.cancelled() or f.exception())
        self.inner_pid = inner_pid
        self.host_pid = _pid_of(pidfd) if pidfd is not None else -1
        """Pid as the host sees it; -1 when it was gone before it could be looked at."""

    @property
    def status(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        if not self._exited.done() or self._exited.exception() is not None:
            return None
        return self._exited.result()

    async def wait(self) -> int:
        """Wait for its end and return the exit status, negative for a signal.

        Raises:
            SandboxError: the sandbox died, so that nobody will ever know.
        """
        return await asyncio.shield(self._exited)

    def send_signal(self, number: int) -> None:
        """Signal this very process; nothing when it is gone."""
        if self._pidfd is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def _finish(self, status: int | None, error: SandboxError | None = None) -> None:
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
        if self._exited.done():
            return
        if error is not None:
            self._exited.set_exception(error)
        elif status is not None:
            self._exited.set_result(status)


def _pid_of(pidfd: int) -> int:
    with open(f"/proc/self/fdinfo/{pidfd}") as f:
        for line in f:
            if line.startswith("Pid:"):
                return int(line.split()[1])
    return -1


class _Channel:
    """The control socket: requests by sequence number, exit events."""

    def __init__(self, sock: socket.socket, on_event: Callable[[list[bytes], list[int]], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._on_event = on_event
        self._sequence = 0
        self._waiting: dict[int, asyncio.Future[tuple[list[bytes], list[int]]]] = {}
        self._queue: deque[tuple[bytes, Sequence[int]]] = deque()
        self.closed: asyncio.Future[None] = self._loop.create_future()
        sock.setblocking(False)
        self._loop.add_reader(sock.fileno(), self._readable)

    def close(self) -> None:
        if self.closed.done():
            return
        self.closed.set_result(None)
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(SandboxError("the sandbox died", code="sandbox-died"))
        self._waiting.clear()
        while self._queue:
            for fd in self._queue.popleft()[1]:
                os.close(fd)

    async def request(self, *fields: str | bytes, fds: Sequence[int] = ()) -> tuple[list[bytes], list[int]]:
        if self.closed.done():
            raise SandboxError("the sandbox died", code="sandbox-died")
        self._sequence += 1
        sequence = self._sequence
        encoded = [str(sequence).encode(), *(os.fsencode(f) for f in fields)]
        if any(b"\0" in e for e in encoded):
            raise SandboxError("a NUL byte in a request to the sandbox", code="sandbox-request")
        data = b"\0".join(encoded) + b"\0"
        future: asyncio.Future[tuple[list[bytes], list[int]]] = self._loop.create_future()
        self._waiting[sequence] = future
        memfd = -1
        try:
            if len(data) > PACKET_BYTES:
                memfd = os.memfd_create("woodfrog-request", os.MFD_CLOEXEC)
                with open(memfd, "wb", closefd=False) as f:
                    f.write(data)
                data, fds = b"memfd\0", (memfd, *fds)
            self._send(data, fds)
            return await future
        finally:
            self._waiting.pop(sequence, None)
            if memfd >= 0:
                os.close(memfd)

    def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        self._send(data, fds)

    def _send(self, data: bytes, fds: Sequence[int]) -> None:
        if not self._queue and self._try(data, fds):
            return
        # The caller keeps its descriptors open until it is answered, or gives up: keep copies.
        self._queue.append((data, [os.dup(fd) for fd in fds]))
        self._loop.add_writer(self._sock.fileno(), self._writable)

    def _try(self, data: bytes, fds: Sequence[int]) -> bool:
        try:
            socket.send_fds(self._sock, [data], list(fds))
        except BlockingIOError:
            return False
        except OSError as e:
            if e.errno in (errno.EPIPE, errno.ECONNRESET):
                self.close()
                return True
            raise SandboxError(f"cannot talk to the sandbox: {e.strerror}", code="sandbox-request") from e
        return True

    def _writable(self) -> None:
        while self._queue:
            data, fds = self._queue[0]
            if not self._try(data, fds):
                return
            if not self._queue:
                return
            self._queue.popleft()
            for fd in fds:
                os.close(fd)
        if not self.closed.done():
            self._loop.remove_writer(self._sock.fileno())

    def _readable(self) -> None:
        for _ in range(64):
            try:
                data, fds, _, _ = socket.recv_fds(self._sock, 8192, 4)
            except BlockingIOError:
                return
            except OSError:
                data, fds = b"", []
            if not data:
                self.close()
                return
            self._dispatch(data.split(b"\0")[:-1], list(fds))
            if self.closed.done():
                return

    def _dispatch(self, fields: list[bytes], fds: list[int]) -> None:
        if fields[0] in (b"ok", b"err"):
            future = self._waiting.pop(int(fields[1]), None)
            if future is not None and not future.done():
                if fields[0] == b"ok":
                    future.set_result((fields[2:], fds))
                    return
                number, what = int(fields[2]), fields[3].decode(errors="replace")
                future.set_exception(
                    SandboxError(
                        f"sandbox: {what}: {os.strerror(number)}",
                        code="sandbox-operation",
                        errno=number,
                        operation=what,
                    )
                )
            elif fields[1] == b"0":
                self._on_event(fields, fds)
                return
            for fd in fds:
                os.close(fd)
            return
        self._on_event(fields, fds)


def _mount_beneath(sandbox: str, where: Beneath) -> int:
    """A directory as a detached mount. Whoever writes there may put a link on the way at any time: none is followed.

    Raises:
        SandboxError: it is not there, or a link or a file is on the way, or what must be open is not.
    """
    source, parts = where.source, where.parts
    recursive = _AT_RECURSIVE if where.recursive else 0
    fd = os.open(source, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for number, part in enumerate(parts, 1):
            deeper = os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            os.close(fd)
            fd = deeper
            if where.open and not os.fstat(fd).st_mode & 0o001:
                raise SandboxError(
                    f"{source.joinpath(*parts)} cannot be part of the Python environment: "
                    f"{source.joinpath(*parts[:number])} is not open to all users",
                    code="runtime",
                )
        flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_EMPTY_PATH | recursive
        mount: int = _libc.syscall(_OPEN_TREE, fd, b"", flags)
        if mount < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return mount
    except OSError as e:
        inner = source.joinpath(*parts)
        raise SandboxError(f"sandbox {sandbox}: cannot mount {inner}: {e.strerror}", errno=e.errno) from e
    finally:
        os.close(fd)


class Sandbox:
    """A set of namespaces with woodfrog's init as PID 1. Make one with `prepare`."""

    def __init__(self, id: str) -> None:
        self.id = id
        self.init_pid = 0
        """Host pid of the sandbox's PID 1."""
        self.network: NetworkLease | None = None
        self.cgroup: Cgroup | None = None
        self.worker_uid = 0
        self.volumes: tuple[str, ...] = ()
        """Where inside directories are mounted that other sandboxes may change at the same time."""
        self._channel: _Channel
        self._init_pidfd = -1
        self._launcher: subprocess.Popen[bytes] | None = None
        self._loop = asyncio.get_running_loop()
        self._started: asyncio.Future[None] = self._loop.create_future()
        self._started.add_done_callback(lambda f: f.cancelled() or f.exception())
        self._dead: asyncio.Future[None] = self._loop.create_future()
        self._ready = False
        self._processes: dict[int, SandboxProcess] = {}
        self._unclaimed: dict[int, int] = {}
        self._upper_fd: int | None = None
        self._destroying: asyncio.Task[None] | None = None
        self._prestarted: _Prestarted | None = None

    # ------------------------------------------------------------------------------------------- life

    @classmethod
    async def prepare(
        cls,
        id: str,
        *,
        init_binary: Path,
        scratch: Path,
        host: HostRoot,
        worker_uid: int,
        limits: Limits = Limits(),  # noqa: B008 - frozen
        cgroups: Cgroups | None = None,
        network: NetworkLease | None = None,
        time_offsets_ns: tuple[int, int] | None = None,
    ) -> Sandbox:
        """Make the namespaces, cgroup, network device, /proc, /dev and /run: what any sandbox needs.

        Args:
            id: unique within the daemon: letters, digits, `-`.
            scratch: an existing empty directory of the host; all sandboxes of a daemon may share it.
            host: from `read_host_root`.
            network: a lease (`Network.lease`), which the sandbox then owns and releases; None = loopback only.
            time_offsets_ns: offsets of the monotonic and boot-time clocks: the sandbox then has its own time namespace.

        Raises:
            SandboxError: what failed; nothing is left behind.
        """
        self = cls(id)
        self.network = network
        self.worker_uid = worker_uid
        try:
            if cgroups is not None:
                self.cgroup = cgroups.create(id, limits)
            self._launch(init_binary, time_offsets_ns)
            await asyncio.wait_for(self._started, STARTUP_TIMEOUT_S)
            _make_killable(self.init_pid)
            base = self._ops(base_plan(scratch, host, worker_uid, limits.disk_bytes))
            if network is None:
                await base
            else:
                await asyncio.gather(base, network.attach(self.init_pid))
                await self._ops(
                    [
                        Op("addr", ("eth0", network.address, str(network.prefix))),
                        Op("ifup", ("eth0",)),
                        Op("route", (network.gateway,)),
                    ]
                )
        except BaseException as e:
            await self.destroy()
            if isinstance(e, TimeoutError):
                raise SandboxError(f"sandbox {id}: init did not start in {STARTUP_TIMEOUT_S:.0f} s") from None
            raise
        return self

    def _launch(self, init_binary: Path, time_offsets_ns: tuple[int, int] | None) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        cgroup_fds: list[int] = []
        try:
            for path in self.cgroup.attach_paths() if self.cgroup is not None else ():
                cgroup_fds.append(os.open(path, os.O_WRONLY | os.O_CLOEXEC))
            argv = [str(init_binary), "--control", str(theirs.fileno())]
            for fd in cgroup_fds:
                argv += ["--cgroup", str(fd)]
            if time_offsets_ns is not None:
                argv += ["--timens", *map(str, time_offsets_ns)]
            self._channel = _Channel(ours, self._event)
            self._channel.closed.add_done_callback(lambda _: self._lost())
            try:
                self._launcher = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(), *cgroup_fds),
                    env={},
                )
            except OSError as e:
                raise SandboxError(cannot_start(init_binary, e), code="no-init") from e
        finally:
            theirs.close()
            for fd in cgroup_fds:
                os.close(fd)

    def _lost(self) -> None:
        error = SandboxError(f"sandbox {self.id} died", code="sandbox-died")
        if not self._started.done():
            self._started.set_exception(SandboxError(f"sandbox {self.id}: init ended at once", code="sandbox-died"))
        for process in list(self._processes.values()):
            process._finish(None, error)
        self._processes.clear()
        if self._init_pidfd < 0 and not self._dead.done():
            self._dead.set_result(None)

    def _event(self, fields: list[bytes], fds: list[int]) -> None:
        match fields:
            case [b"launched", pid] if len(fds) == 1:
                self.init_pid, self._init_pidfd = int(pid), fds.pop()
                self._loop.add_reader(self._init_pidfd, self._init_exited)
                if self._launcher is not None:
                    self._launcher.wait()  # its last act was this message
                    self._launcher = None
                self._check_started()
            case [b"ready"]:
                self._ready = True
                self._check_started()
            case [b"exit", pid, wait_status]:
                status = os.waitstatus_to_exitcode(int(wait_status))
                process = self._processes.pop(int(pid), None)
                if process is not None:
                    process._finish(status)
                else:
                    self._unclaimed[int(pid)] = status
                    if len(self._unclaimed) > MAX_UNCLAIMED_EXITS:
                        del self._unclaimed[next(iter(self._unclaimed))]
            case [b"err", _, number, what] if not self._started.done():
                self._started.set_exception(
                    SandboxError(
                        f"sandbox {self.id}: {what.decode(errors='replace')}: {os.strerror(int(number))}",
                        code="sandbox-start",
                        errno=int(number),
                    )
                )
        for fd in fds:
            os.close(fd)

    def _check_started(self) -> None:
        if self._ready and self.init_pid and not self._started.done():
            self._started.set_result(None)

    def _init_exited(self) -> None:
        self._loop.remove_reader(self._init_pidfd)
        with suppress(ChildProcessError):
            os.waitid(os.P_PIDFD, self._init_pidfd, os.WEXITED | os.WNOHANG)
        os.close(self._init_pidfd)
        self._init_pidfd = -1
        self._channel.close()
        if not self._dead.done():
            self._dead.set_result(None)

    @property
    def alive(self) -> bool:
        return self.init_pid > 0 and not self._dead.done()

    async def wait_dead(self) -> None:
        """Wait until PID 1 has ended, and with it every process of the sandbox."""
        await asyncio.shield(self._dead)

    async def destroy(self) -> None:
        """Kill everything, wait until it is gone, give back network and cgroup. May be called again, and concurrently.

        Raises:
            SandboxError: something would not go.
        """
        if self._destroying is None:
            self._destroying = self._loop.create_task(self._destroy())
        await asyncio.shield(self._destroying)

    async def _destroy(self) -> None:
        if self._launcher is not None:
            # It never reported: it is stuck or dead, and PID 1, if there is one, sees the socket close.
            self._launcher.kill()
            self._launcher.wait()
            self._launcher = None
        if self._init_pidfd >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._init_pidfd, signal.SIGKILL)
        elif hasattr(self, "_channel"):
            self._channel.close()
        failures: list[SandboxError] = []
        if hasattr(self, "_channel"):
            try:
                await asyncio.wait_for(self.wait_dead(), GONE_TIMEOUT_S)
            except TimeoutError:
                failures.append(
                    SandboxError(f"sandbox {self.id}: pid {self.init_pid} does not die", code="sandbox-stuck")
                )
            self._channel.close()
        prestarted, self._prestarted = self._prestarted, None
        if prestarted is not None:
            prestarted.close()
        for release in (self.network, self.cgroup):
            if release is not None:
                try:
                    await release.destroy()
                except SandboxError as e:
                    failures.append(e)
        if failures:
            raise failures[0]

    # ------------------------------------------------------------------------------------------- requests

    async def _ops(self, ops: Sequence[Op], fds: Sequence[int] = ()) -> list[bytes]:
        fields: list[str] = ["ops"]
        for op in ops:
            fields.append(op.name)
            fields.extend(op.args)
        values, _ = await self._channel.request(*fields, fds=fds)
        return values

    async def assemble(self, plan: RootPlan) -> None:
        """Give the prepared sandbox its root, host name and network choice. Once per sandbox.

        Raises:
            SandboxError: which operation failed; the sandbox can only be destroyed then.
        """
        mounts: list[int] = []
        try:
            for where in plan.beneath:
                mounts.append(_mount_beneath(self.id, where))
            values = await self._ops(plan.ops, fds=mounts)
        finally:
            for mount in mounts:
                os.close(mount)
        self._upper_fd = int(values[0]) if values else None
        self.volumes = plan.volumes
        if plan.shm_layer is not None and not _copy_small(plan.shm_layer, self.path("/dev/shm")):
            copy = await asyncio.create_subprocess_exec(
                "cp", "-a", "--sparse=auto", f"{plan.shm_layer}/.", f"{self.path('/dev/shm')}/",
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            )  # fmt: skip
            _, complaint = await copy.communicate()
            if copy.returncode:
                why = complaint.decode(errors="replace").strip()
                raise SandboxError(f"sandbox {self.id}: cannot copy {plan.shm_layer} to /dev/shm: {why}")

    async def set_limits(self, limits: Limits) -> None:
        """Change memory, processor and process limits; `disk_bytes` takes effect in the root plan only."""
        if self.cgroup is not None:
            self.cgroup.set_limits(limits)

    async def spawn(self, spec: ProcessSpec) -> SandboxProcess:
        """Start a process.

        Raises:
            SandboxError: which step failed (`fields["errno"]`): no such program, pid taken, ...
        """
        fds: list[int] = []

        def pass_fd(fd: int) -> str:
            fds.append(fd)
            return f"@{len(fds) - 1}"

        def stdio(value: Stdio) -> str:
            return "" if value is None else pass_fd(value) if isinstance(value, int) else value

        flags = [
            name
            for name, on in (
                ("no_new_privs", spec.no_new_privs),
                ("seccomp", spec.seccomp),
                ("new_session", spec.new_session),
                ("subreaper", spec.subreaper),
            )
            if on
        ]
        fields = [
            "spawn", str(spec.uid), str(spec.gid), spec.caps, ",".join(flags), f"{spec.umask:o}",
            str(spec.inner_pid or 0), spec.cwd, stdio(spec.stdin), stdio(spec.stdout), stdio(spec.stderr),
            str(len(spec.rlimits)),
        ]  # fmt: skip
        for resource, values in spec.rlimits.items():
            fields += [str(resource), *("inf" if v == -1 else str(v) for v in values)]
        fields.append(str(len(spec.pass_fds)))
        for target, source in spec.pass_fds.items():
            fields += [str(target), pass_fd(source)]
        fields += [str(len(spec.argv)), *spec.argv, str(len(spec.env)), *(f"{k}={v}" for k, v in spec.env.items())]
        if spec.inner_pid is not None:
            self._unclaimed.pop(spec.inner_pid, None)
        values_, received = await self._channel.request(*fields, fds=fds)
        return self._claim(int(values_[0]), received)

    async def watch(self, inner_pid: int) -> SandboxProcess:
        """A handle for a process init did not start: what CRIU restored.

        `wait` works for those that are, or become, children of PID 1.

        Raises:
            SandboxError: no such process, and none of that pid ended unclaimed.
        """
        if inner_pid in self._processes:
            return self._processes[inner_pid]
        try:
            _, received = await self._channel.request("pidfd", str(inner_pid))
        except SandboxError as e:
            if e.fields.get("errno") == errno.ESRCH and inner_pid in self._unclaimed:
                return self._claim(inner_pid, [])
            raise
        return self._claim(inner_pid, received)

    def _claim(self, inner_pid: int, received: list[int]) -> SandboxProcess:
        """The exit event may have been read in the same breath as the answer, before the caller came to run."""
        process = SandboxProcess(self, inner_pid, received[0] if received else None)
        if inner_pid in self._unclaimed:
            process._finish(self._unclaimed.pop(inner_pid))
        elif self._channel.closed.done():
            process._finish(None, SandboxError(f"sandbox {self.id} died", code="sandbox-died"))
        else:
            self._processes[inner_pid] = process
        return process

    async def signal(self, inner_pid: int, number: int) -> None:
        """Signal a process, a process group (negative), or everything but PID 1 (-1)."""
        await self._channel.request("signal", str(inner_pid), str(number))

    async def set_last_pid(self, pid: int) -> None:
        """Let the next process get a higher pid than this.

        Before a restore, set it to the highest pid in the images: then neither CRIU's own processes nor what the
        restored ones start later can take, or be confused with, a pid of the images.
        """
        await self._channel.request("lastpid", str(pid))

    async def prestart(self, spec: ProcessSpec) -> None:
        """Load a dynamically linked program, and let it wait before its main() for the `run` that needs it.

        Args:
            spec: as `run` will have it; of `argv` only the program matters, `env` does not.

        Raises:
            SandboxError: it could not be started.
        """
        if not os.path.exists(self.path(str(prestart_path()))):  # the program would run at once, and for nothing
            raise SandboxError(f"{prestart_path()} is not seen in the sandbox", code="no-prestart")
        ours, theirs = socket.socketpair()
        out, err = _Capture(CAPTURE_BYTES), _Capture(CAPTURE_BYTES)
        try:
            process = await self.spawn(
                replace(
                    spec,
                    argv=spec.argv[:1],
                    env={"LD_PRELOAD": str(prestart_path())},
                    inner_pid=PRESTART_PID,
                    stdin=theirs.fileno(),
                    stdout=out.write_end,
                    stderr=err.write_end,
                )
            )
        except BaseException:
            ours.close()
            out.close()
            err.close()
            raise
        finally:
            theirs.close()
            out.close_write_end()
            err.close_write_end()
        self._prestarted = _Prestarted(_program(spec), process, ours, out, err)

    async def drop_prestarted(self) -> None:
        """End what `prestart` started, if it still waits."""
        prestarted, self._prestarted = self._prestarted, None
        if prestarted is not None:
            prestarted.close()
            await prestarted.process.wait()

    async def _begin(self, spec: ProcessSpec, limit: int) -> tuple[SandboxProcess, _Capture, _Capture]:
        """A process for `run`: the one that waits, or a new one."""
        waiting = self._prestarted
        if waiting is not None and waiting.program == _program(spec) and limit == CAPTURE_BYTES:
            self._prestarted = None
            if waiting.release(spec):
                return waiting.process, waiting.out, waiting.err
            waiting.close()
        out, err = _Capture(limit), _Capture(limit)
        try:
            return await self.spawn(replace(spec, stdout=out.write_end, stderr=err.write_end)), out, err
        except BaseException:
            out.close()
            err.close()
            raise
        finally:
            out.close_write_end()
            err.close_write_end()

    async def run(
        self,
        spec: ProcessSpec,
        timeout: float,
        *,
        limit: int = CAPTURE_BYTES,
        on_spawn: Callable[[SandboxProcess], None] | None = None,
    ) -> Completed:
        """Start a process, collect what it writes, and wait for its end.

        Args:
            timeout: seconds; then its process group is killed.
            on_spawn: called with the process as soon as it runs.
            limit: bytes kept of each of stdout and stderr; the rest is read and dropped.

        Raises:
            SandboxError: code `sandbox-timeout` after `timeout`, with what was written in `fields`.
        """
        process, out, err = await self._begin(spec, limit)
        try:
            if on_spawn is not None:
                on_spawn(process)
            try:
                status = await asyncio.wait_for(process.wait(), timeout)
            except (TimeoutError, asyncio.CancelledError) as e:
                with suppress(SandboxError):
                    await self.signal(-process.inner_pid if spec.new_session else process.inner_pid, signal.SIGKILL)
                if isinstance(e, asyncio.CancelledError):
                    raise
                out.drain()
                err.drain()
                raise SandboxError(
                    f"sandbox {self.id}: {spec.argv[0]} ran past {timeout:g} s and was killed",
                    code="sandbox-timeout",
                    stdout=out.text(),
                    stderr=err.text(),
                ) from None
            out.drain()
            err.drain()
            return Completed(status, bytes(out.data), bytes(err.data), out.truncated or err.truncated)
        finally:
            out.close()
            err.close()

    # ------------------------------------------------------------------------------------------- files

    def path(self, inner: str) -> Path:
        """The host's way to a path inside.

        Symlinks on the way resolve on the *host*: where user code can write (not in /run/woodfrog itself, /usr and
        other read-only places), use `open_path` or `connect`.
        """
        return Path(f"/proc/{self.init_pid}/root/{inner.lstrip('/')}")

    def upper_path(self) -> Path:
        """The directory of what was written to the sandbox's root: overlay upper, with its whiteouts and attributes."""
        if self._upper_fd is None:
            raise SandboxError(f"sandbox {self.id} has no root yet", code="sandbox-state")
        return Path(f"/proc/{self.init_pid}/fd/{self._upper_fd}")

    def open_path(self, inner: str, flags: int = os.O_PATH) -> int:
        """Open a path inside without following any symlink; safe below what user code can write.

        Raises:
            OSError: as open; ELOOP when a part of it is a symlink.
        """
        root = os.open(f"/proc/{self.init_pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            how = struct.pack(
                "=QQQ",
                flags | os.O_CLOEXEC,
                0,
                _RESOLVE_IN_ROOT | _RESOLVE_NO_SYMLINKS | _RESOLVE_NO_MAGICLINKS,
            )
            fd = _libc.syscall(_OPENAT2, root, os.fsencode(inner), how, ctypes.c_size_t(len(how)))
            if fd < 0:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number), inner)
            return int(fd)
        finally:
            os.close(root)

    async def connect(self, inner: str) -> socket.socket:
        """Connect to a listening Unix stream socket inside; the result is non-blocking.

        Raises:
            OSError: as connect; the path's parts may not be symlinks.
        """
        fd = self.open_path(inner)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            while True:
                try:
                    sock.connect(f"/proc/self/fd/{fd}")
                    return sock
                except BlockingIOError:
                    # The backlog is full; the kernel offers no event for that.
                    await asyncio.sleep(0.001)
        except BaseException:
            sock.close()
            raise
        finally:
            os.close(fd)

    async def bind(self, source: Path, inner: str, *, read_only: bool) -> None:
        """Mount a host directory at an existing directory inside, while it runs."""
        mount = _libc.syscall(_OPEN_TREE, _AT_FDCWD, os.fsencode(source), _OPEN_TREE_CLONE | os.O_CLOEXEC)
        if mount < 0:
            number = ctypes.get_errno()
            raise SandboxError(f"sandbox {self.id}: cannot bind {source}: {os.strerror(number)}", errno=number)
        try:
            attributes = "nosuid,nodev" + (",ro" if read_only else "")
            await self._ops([Op("bind", ("@0", inner, attributes))], fds=(mount,))
        finally:
            os.close(mount)

    async def unbind(self, inner: str) -> None:
        """Take away what `bind` mounted."""
        await self._ops([Op("umount", (inner,))])

    async def follow_links(self, volumes: Sequence[str], yes: bool) -> None:
        """Whether symlinks in these volumes lead anywhere, for everyone in the sandbox, root too.

        Raises:
            SandboxError: one is not where it was mounted.
        """
        await self._ops([Op("setattr", (path, "symfollow" if yes else "nosymfollow")) for path in volumes])

    async def mount_tmpfs(self, inner: str) -> None:
        """Mount an empty tmpfs, for root only, at an existing directory inside."""
        await self._ops([Op("mount", ("tmpfs", inner, "nosuid,nodev", "mode=0700,size=64m"))])

    # ------------------------------------------------------------------------------------------- accounting

    def oom_kills(self) -> int:
        """How many processes of the sandbox the kernel killed for memory."""
        return self.cgroup.oom_kills() if self.cgroup is not None else 0

    def memory_peak(self) -> int:
        """The most memory the sandbox has used, in bytes, with its files and page cache."""
        return self.cgroup.memory_peak() if self.cgroup is not None else 0

    def memory_current(self) -> int:
        return self.cgroup.memory_current() if self.cgroup is not None else 0

    def memory_private(self) -> int:
        """Without the page cache of files."""
        return self.cgroup.memory_private() if self.cgroup is not None else 0


def _make_killable(pid: int) -> None:
    """A daemon that is protected from the kernel's memory killer (OOMScoreAdjust=) does not hand that on.

    A memory limit would otherwise kill nothing: what reaches it would wait in the page fault for ever.
    """
    path = Path(f"/proc/{pid}/oom_score_adj")
    with suppress(OSError):
        if int(path.read_text()) < 0:
            path.write_text("0")


def _copy_small(source: Path, target: Path) -> bool:
    """Copy a directory of a few plain small files; False, with nothing done, when there is more to it.

    A process started for that would take longer than all the rest of `assemble`.
    """
    files = list(os.scandir(source))
    about = [f.stat(follow_symlinks=False) for f in files]
    if not all(stat.S_ISREG(a.st_mode) and a.st_nlink == 1 for a in about) or sum(a.st_size for a in about) > 1 << 20:
        return False
    for file, a in zip(files, about, strict=True):
        fd = os.open(target / file.name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as f:
            f.write(Path(file.path).read_bytes())
            os.fchown(fd, a.st_uid, a.st_gid)
            os.fchmod(fd, stat.S_IMODE(a.st_mode))
            os.utime(fd, ns=(a.st_atime_ns, a.st_mtime_ns))
    return True


class _Capture:
    """A pipe whose read end is emptied by the event loop into a bounded buffer."""

    def __init__(self, limit: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._read_end, self.write_end = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._read_end, False)
        self._limit = limit
        self.data = bytearray()
        self.truncated = False
        self._loop.add_reader(self._read_end, self._readable)

    def text(self) -> str:
        return self.data.decode(errors="replace")

    def _readable(self) -> bool:
        try:
            chunk = os.read(self._read_end, 65536)
        except BlockingIOError:
            return False
        if not chunk:
            self._loop.remove_reader(self._read_end)
            return False
        room = self._limit - len(self.data)
        self.data += chunk[:room]
        self.truncated = self.truncated or len(chunk) > room
        return True

    def drain(self) -> None:
        """What is in the pipe by now; a process left behind may hold it open for ever."""
        for _ in range(64):
            if not self._readable():
                return

    def close_write_end(self) -> None:
        if self.write_end >= 0:
            os.close(self.write_end)
            self.write_end = -1

    def close(self) -> None:
        self.close_write_end()
        if self._read_end >= 0:
            self._loop.remove_reader(self._read_end)
            os.close(self._read_end)
            self._read_end = -1


def _program(spec: ProcessSpec) -> ProcessSpec:
    """What of a spec is settled when its program is loaded."""
    return replace(spec, argv=spec.argv[:1], env={}, stdin=None, stdout=None, stderr=None)


@dataclass(frozen=True, slots=True, eq=False)
class _Prestarted:
    """A program that waits in native/prestart.so.c for its arguments."""

    program: ProcessSpec
    process: SandboxProcess
    door: socket.socket
    out: _Capture
    err: _Capture

    def release(self, spec: ProcessSpec) -> bool:
        """Let it run; False when it is gone."""
        texts = [*spec.argv, *(f"{k}={v}" for k, v in spec.env.items())]
        body = b"".join(os.fsencode(t) + b"\0" for t in texts)
        with self.door:
            if self.process.status is not None:
                return False
            try:
                self.door.sendall(struct.pack("=III", len(body), len(spec.argv), len(spec.env)) + body)
            except OSError:
                return False
        return True

    def close(self) -> None:
        self.door.close()
        self.out.close()
        self.err.close()
