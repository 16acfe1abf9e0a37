"""The daemon's side of the page server (native/pageserver.c): one process, many restores.

    server = await PageServer.start(uid=64647)
    pages = await server.serve(listener, index_fd, page_fds, working_set=None)
    ...CRIU restores with --lazy-pages...
    ready = await pages.ready           # (pages pushed, ms), once the working set is in
    await pages.push()                  # a parked one: only now
    text = await pages.record()         # what the process asked for, as a working set
    await pages.drop()                  # the instance is gone

The kernel shows a process zeroes once the last descriptor of its userfaultfd is closed. A copy of each is held here, so
that the death of the page server makes processes wait, never read wrong bytes; `on_death` has them killed.
"""

from __future__ import annotations

import array
import asyncio
import errno
import os
import socket
import struct
import subprocess
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from woodfrog.errors import HostError, SandboxError
from woodfrog.linux.native import cannot_start, native_path

__all__ = [
    "NEVER",
    "PageServer",
    "Present",
    "ServedPages",
    "common_set",
    "is_guess",
    "make_set",
    "merge_sets",
    "page_server_path",
    "set_pages",
    "set_ranges",
]

NEVER = 0xFFFFFFFF
"""`drain_ms`: leave what nobody asks for out."""

_COMMAND = struct.Struct("=IIIIII")
_MESSAGE = struct.Struct("=IIQQQ")
_RESTORE, _DROP, _WORKING_SET, _DRAIN, _PUSH, _HAVE = 1, 2, 3, 4, 5, 6
_WITH_SET, _PARKED, _EVERYTHING, _WITH_MAP = 1, 2, 4, 8
_NEED = 8
_PLACES = "Q"
_WHOLE = 0xFFFFFFFFFFFFFFFF
_ANSWER_S = 10.0
_PUSH_S = 600.0
"""All memory from a slow disk, perhaps."""
_AGAIN_S = 0.005
_EVENTS = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6
_PAGE = 4096
_SET = struct.Struct("=QII")
_RANGE = struct.Struct("=iIQ")
_SET_MAGIC = int.from_bytes(b"FROGSET1", "little")
_GUESS = 1


@dataclass(frozen=True)
class Present:
    """Which pages of files that are still on their way are here.

    Args:
        fd: a memfd that never becomes shorter, a byte for each page, not 0 when it is here. One for all restores.
        places: for each file of an index, where its first page is in there; None = the file is whole.
    """

    fd: int
    places: tuple[int | None, ...]


def page_server_path() -> Path:
    """Where the package keeps the compiled page server."""
    return native_path("woodfrog-pageserver")


def make_set(ranges: Iterable[tuple[int, int, int]]) -> bytes:
    """A working set of (pid, begin, end) that nobody has learned: what is known to be needed beforehand."""
    rows = [_RANGE.pack(pid, (end - begin) // _PAGE, begin) for pid, begin, end in ranges]
    return _SET.pack(_SET_MAGIC, len(rows), _GUESS) + b"".join(rows)


def is_guess(data: bytes) -> bool:
    """Whether a working set is `make_set`'s, and the rest of it still to be learned."""
    return len(data) >= _SET.size and bool(_SET.unpack_from(data)[2] & _GUESS)


def merge_sets(*sets: bytes) -> bytes:
    """The union of working sets, in the order of tasks and addresses; a learned one.

    Raises:
        ValueError: one of them is not a working set.
    """
    spans: dict[int, list[tuple[int, int]]] = {}
    for data in sets:
        for pid, pages, address in set_ranges(data):
            spans.setdefault(pid, []).append((address, address + pages * _PAGE))
    out: list[bytes] = []
    for pid, items in sorted(spans.items()):
        begin = end = -1
        for start, stop in [*sorted(items), (1 << 63, 1 << 63)]:
            if start <= end:
                end = max(end, stop)
                continue
            if end > begin:
                out.append(_RANGE.pack(pid, (end - begin) // _PAGE, begin))
            begin, end = start, stop
    return _SET.pack(_SET_MAGIC, len(out), 0) + b"".join(out)


def common_set(one: bytes, other: bytes) -> bytes:
    """The pages that are in both working sets.

    Raises:
        ValueError: one of them is not a working set.
    """
    # Each without overlap of its own: a page that is covered twice is then in both.
    edges = [
        (pid, address + end * pages * _PAGE, -1 if end else 1)
        for data in (one, other)
        for pid, pages, address in set_ranges(merge_sets(data))
        for end in (0, 1)
    ]
    out, begin, depth = [], 0, 0
    for pid, at, step in sorted(edges):  # an end before a beginning at the same address
        if step < 0 and depth == 2:
            out.append(_RANGE.pack(pid, (at - begin) // _PAGE, begin))
        depth, begin = depth + step, at
    return _SET.pack(_SET_MAGIC, len(out), 0) + b"".join(out)


def set_pages(data: bytes) -> int:
    """How many pages a working set has."""
    return sum(pages for _, pages, _ in set_ranges(data))


def set_ranges(data: bytes) -> list[tuple[int, int, int]]:
    """A working set's (pid, pages, address).

    Raises:
        ValueError: not a working set.
    """
    if len(data) < _SET.size:
        raise ValueError("not a working set")
    magic, count, _ = _SET.unpack_from(data)
    if magic != _SET_MAGIC or len(data) != _SET.size + count * _RANGE.size:
        raise ValueError("not a working set")
    return list(_RANGE.iter_unpack(data[_SET.size :]))


def _has_events(fd: int) -> bool:
    """Whether a userfaultfd tells of FORK, REMAP, REMOVE and UNMAP: without them, wrong bytes are served."""
    try:
        for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines():
            if line.startswith("API:"):
                return int(line.split(":")[2], 16) & _EVENTS == _EVENTS
    except (OSError, ValueError, IndexError):
        return False
    return False


class ServedPages:
    """The memory of one restore."""

    def __init__(self, server: PageServer, number: int) -> None:
        loop = asyncio.get_running_loop()
        self._server = server
        self._number = number
        self.ready: asyncio.Future[tuple[int, float]] = loop.create_future()
        """(pages pushed, ms they took), once CRIU has laid the memory out and the working set is in."""
        self.held: asyncio.Future[int] = loop.create_future()
        """How many descriptors were handed over, once the processes are about to run: from here on the page server's
        death makes them wait."""
        self.failed: asyncio.Future[str] = loop.create_future()
        """Set when this restore cannot go on: its processes wait for ever and must be killed."""
        self.out_of_memory = False
        """Why it failed: the processes may not have more memory, and the kernel killed none of them for it."""
        self._whole: asyncio.Event = asyncio.Event()
        self._recorded: asyncio.Future[bytes] | None = None
        self._stats: asyncio.Future[tuple[int, int, int]] = loop.create_future()
        self._held: dict[int, int] = {}

    @property
    def complete(self) -> bool:
        """Everything is in and the kernel serves these processes alone."""
        return self.ready.done() and not self._held

    async def safe(self) -> None:
        """Wait, after CRIU ended well, until no death of the page server can show the processes zeroes.

        Raises:
            SandboxError: their memory cannot be served; kill them.
        """
        either: set[asyncio.Future[Any]] = {self.held, self.failed}
        await asyncio.wait(either, timeout=_ANSWER_S, return_when=asyncio.FIRST_COMPLETED)
        if self.failed.done() or not self.held.done():
            why = self.failed.result() if self.failed.done() else f"no sign of the processes within {_ANSWER_S:.0f} s"
            raise SandboxError(f"memory cannot be served: {why}", code="memory-not-served")

    async def push(self) -> tuple[int, float]:
        """Push the working set of a parked restore now, whether its processes run already or not.

        Returns:
            (pages pushed, ms they took), when it is in.

        Raises:
            SandboxError: its memory cannot be served; kill its processes.
        """
        self._server._send(_PUSH, self._number)
        await self._unless_failed(self.ready)
        return self.ready.result()

    async def whole(self) -> None:
        """Wait until all memory is in and the kernel serves these processes alone: they may be dumped again.

        Raises:
            SandboxError: their memory cannot be served; kill them.
        """
        await self._unless_failed(asyncio.ensure_future(self._whole.wait()))

    async def _unless_failed(self, waited: asyncio.Future[Any]) -> None:
        await asyncio.wait({waited, self.failed}, timeout=_PUSH_S, return_when=asyncio.FIRST_COMPLETED)
        if not waited.done():
            why = self.failed.result() if self.failed.done() else f"it was not in within {_PUSH_S:.0f} s"
            if waited is not self.ready:
                waited.cancel()
            raise SandboxError(f"memory cannot be served: {why}", code="memory-not-served")

    async def record(self) -> bytes:
        """The working set so far: what faults asked for, as `serve` takes it.

        Raises:
            SandboxError: the page server died.
        """
        if self.failed.done():
            raise SandboxError(f"memory cannot be served: {self.failed.result()}", code="memory-not-served")
        if self._recorded is None:
            self._server._send(_WORKING_SET, self._number)
            self._recorded = asyncio.get_running_loop().create_future()
        return await asyncio.wait_for(asyncio.shield(self._recorded), _ANSWER_S)

    def drain(self, after_ms: int = 0) -> None:
        """Fill in the rest in the background, so many milliseconds after the restore."""
        self._server._send(_DRAIN, self._number, drain_ms=after_ms)

    async def drop(self) -> tuple[int, int, int]:
        """The processes are gone. Returns pages pushed, faults, pages given on demand; zeroes if the server died."""
        try:
            self._server._send(_DROP, self._number)
            if self.failed.done():
                return 0, 0, 0  # of one that it refused the page server knows nothing and answers nothing
            return await asyncio.wait_for(self._stats, _ANSWER_S)
        except (SandboxError, TimeoutError):
            return 0, 0, 0
        finally:
            self._server._forget(self._number)

    def _check_whole(self) -> None:
        if self.complete:
            self._whole.set()

    def _fail(self, why: str) -> None:
        if not self.failed.done():
            self.failed.set_result(why)
        if self._recorded is not None and not self._recorded.done():
            self._recorded.set_exception(SandboxError(f"memory cannot be served: {why}", code="memory-not-served"))

    def _close(self) -> None:
        while self._held:
            os.close(self._held.popitem()[1])


class PageServer:
    """One running page server. Make it with `start`."""

    def __init__(self, process: subprocess.Popen[bytes], sock: socket.socket, on_death: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._process = process
        self._sock = sock
        self._on_death = on_death
        self._served: dict[int, ServedPages] = {}
        self.on_need: Callable[[int, int, bool], None] = lambda place, pages, _: self.have(place, pages, errno.ENODATA)
        """Called when pages are wanted that are not here: place and number in the map of `Present`, and whether a
        process waits for them. To be answered with `have`."""
        self._count = 0
        self._closing = False
        self.alive = True
        sock.setblocking(False)
        self._loop.add_reader(sock.fileno(), self._readable)

    @classmethod
    async def start(cls, *, uid: int, on_death: Callable[[], None], binary: Path | None = None) -> PageServer:
        """Start it as an unprivileged user.

        Args:
            on_death: called once if it ends by itself: every process it serves must be killed.

        Raises:
            HostError: it is not built.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        path = binary or page_server_path()
        try:
            process = subprocess.Popen(
                [str(path), str(uid), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env={},
                start_new_session=True,
            )
        except OSError as e:
            ours.close()
            raise HostError(cannot_start(path, e), code="no-native") from e
        finally:
            theirs.close()
        return cls(process, ours, on_death)

    @property
    def pid(self) -> int:
        return self._process.pid

    def _send(self, op: int, number: int, fds: list[int] | None = None, **values: int) -> None:
        fds = fds or []
        data = _COMMAND.pack(
            op, number, len(fds), values.get("around", 0), values.get("drain_ms", 0), values.get("flags", 0)
        )
        if not self.alive:
            raise SandboxError("the page server died", code="page-server-died")
        try:
            self._sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else [])
        except OSError as e:
            raise SandboxError(f"cannot talk to the page server: {e.strerror}", code="page-server-died") from e

    def serve(
        self,
        listener: socket.socket,
        index: int,
        pages: list[int],
        *,
        working_set: int | None = None,
        around: int = 16 << 12,
        drain_ms: int = NEVER,
        parked: bool = False,
        everything: bool = False,
        present: Present | None = None,
    ) -> ServedPages:
        """Be ready for one CRIU that connects to `listener`. Descriptors are copied; close yours.

        Args:
            index: a page index (`criu.pagemap.write_index`).
            pages: the files of the index, in its order.
            working_set: what `ServedPages.record` gave at an earlier restore; pushed in before the processes run.
            around: bytes served around a fault; a power of two, at least a page.
            parked: only what is asked for goes in, before `ServedPages.push`.
            everything: all memory is pushed, as the working set is, and then let go of: see `ServedPages.whole`.
            present: some of the files are still on their way.

        Raises:
            SandboxError: the page server died.
        """
        self._count += 1
        served = ServedPages(self, self._count)
        self._served[self._count] = served
        fds = [listener.fileno(), index, *([] if working_set is None else [working_set])]
        flags = _WITH_SET * (working_set is not None) | _PARKED * parked | _EVERYTHING * everything
        places = -1
        try:
            if present is not None:
                flags |= _WITH_MAP
                places = os.memfd_create("woodfrog-places", os.MFD_CLOEXEC)
                table = array.array(_PLACES, [_WHOLE if place is None else place for place in present.places])
                os.write(places, table.tobytes())
                fds += [present.fd, places]
            self._send(_RESTORE, self._count, [*fds, *pages], around=around, drain_ms=drain_ms, flags=flags)
        except (SandboxError, OSError) as e:
            self._forget(self._count)
            if isinstance(e, OSError):
                raise SandboxError(f"cannot tell the page server what is here: {e.strerror}", code="page-server") from e
            raise
        finally:
            if places >= 0:
                os.close(places)
        return served

    def have(self, place: int, pages: int, error: int = 0) -> None:
        """Say that pages are here now, as the map says; with an errno, that they cannot be had."""
        try:
            self._send(_HAVE, 0, around=place, drain_ms=pages, flags=error)
        except SandboxError as e:
            if self.alive and isinstance(e.__cause__, BlockingIOError):
                self._loop.call_later(_AGAIN_S, self.have, place, pages, error)
            # else it is dead: nobody waits

    def _readable(self) -> None:
        for _ in range(256):
            try:
                data, fds, _, _ = socket.recv_fds(self._sock, _MESSAGE.size, 1)
            except BlockingIOError:
                return
            except OSError:
                data, fds = b"", []
            if len(data) != _MESSAGE.size:
                self._died()
                return
            op, number, a, b, c = _MESSAGE.unpack(data)
            self._take(op, number, a, b, c, fds[0] if fds else -1)

    def _take(self, op: int, number: int, a: int, b: int, c: int, fd: int) -> None:
        if op == _NEED:
            self.on_need(a, b, c == 1)
            return
        served = self._served.get(number)
        if served is None:
            if fd >= 0:
                os.close(fd)
            return
        match op:
            case 1 if fd < 0:  # the message came without it
                served._fail("the daemon has too many open files")
            case 1:  # a descriptor to hold
                served._held[a] = fd
                if not _has_events(fd):
                    served._fail("the userfaultfd tells of no events (CRIU's cache of kernel features is wrong)")
                return
            case 2 if not served.ready.done():
                served.ready.set_result((a, b / 1e3))
                served._check_whole()
            case 3:  # the recorded set
                if served._recorded is not None and not served._recorded.done():
                    try:
                        served._recorded.set_result(os.pread(fd, os.fstat(fd).st_size, 0))
                    except OSError as e:
                        served._recorded.set_exception(
                            SandboxError(f"cannot read the working set: {e.strerror}", code="working-set")
                        )
                    served._recorded = None
            case 4:  # an address space is whole
                held = served._held.pop(a, -1)
                if held >= 0:
                    os.close(held)
                served._check_whole()
            case 5:
                served.out_of_memory = c == 1
                served._fail(f"{os.strerror(a)} (step {b})")
            case 6 if not served._stats.done():
                served._stats.set_result((a, b, c))
            case 7 if not served.held.done():
                served.held.set_result(a)
        if fd >= 0:
            os.close(fd)

    def _forget(self, number: int) -> None:
        served = self._served.pop(number, None)
        if served is not None:
            served._close()

    def _died(self) -> None:
        if not self.alive:
            return
        self.alive = False
        self._loop.remove_reader(self._sock.fileno())
        self._sock.close()
        for served in self._served.values():
            served._fail("the page server died")
            if not served._stats.done():
                served._stats.set_result((0, 0, 0))
        if not self._closing:
            self._process.kill()  # what it says cannot be understood, if it is not dead
            self._reaped = self._loop.run_in_executor(None, self._process.wait)
            self._on_death()

    async def close(self) -> None:
        """End it. Processes it still serves must be dead by now."""
        self._closing = True
        self._died()
        for number in list(self._served):
            self._forget(number)
        with suppress(ProcessLookupError):
            self._process.kill()
        await asyncio.to_thread(self._process.wait)
