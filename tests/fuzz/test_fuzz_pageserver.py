"""Malformed commands, indexes and working sets against the real page server, with sanitizers where there are any.

It refuses or serves, and lives: after every round a well-formed restore is still taken.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import random
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.pages_rig import cpu_s, sanitized_server
from woodfrog.linux.pageserver import page_server_path

COMMAND = struct.Struct("=IIIIII")
MESSAGE = struct.Struct("=IIQQQ")
INDEX, SET = b"FROGIDX2", b"FROGSET1"
ROUNDS = int(os.environ.get("WOODFROG_FUZZ_ROUNDS", "600"))
EDGES = (
    0,
    1,
    2,
    0xFFF,
    0x1000,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    1 << 40,
    (1 << 57) - 4096,
    1 << 63,
    (1 << 64) - 4096,
)


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sanitized_server(tmp_path_factory.mktemp("server")) or page_server_path()


class Rig:
    def __init__(self, binary: Path, folder: Path) -> None:
        self.folder = folder
        self.ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.ours.settimeout(10)
        self.process = subprocess.Popen(
            [str(binary), str(os.getuid()), str(theirs.fileno())],
            pass_fds=(theirs.fileno(),), stderr=subprocess.PIPE, env={},
        )  # fmt: skip
        theirs.close()
        self.number = 1 << 20
        self.map = os.memfd_create("map", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.truncate(self.map, 1 << 16)
        fcntl.fcntl(self.map, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        os.pwrite(self.map, b"\1" * 40, 100)

    def file(self, name: str, data: bytes) -> int:
        path = self.folder / name
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        return os.open(path, os.O_RDONLY)

    def send(self, data: bytes, fds: list[int]) -> None:
        self.ours.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else [])

    def listener(self) -> socket.socket:
        path = self.folder / "socket"
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen(1)
        return listener

    def restore(
        self,
        index: bytes,
        files: list[bytes],
        working_set: bytes | None,
        talk: bytes,
        flags: int = 0,
        places: bytes | None = None,
    ) -> int:
        self.number += 1
        fds = [self.file("index", index)]
        if working_set is not None:
            fds.append(self.file("set", working_set))
        if places is not None:
            flags |= 8
            # Now and then a map that might become shorter, or is none.
            odd = len(places) % 8 == 3
            fds += [self.file("map", places) if odd else os.dup(self.map), self.file("places", places)]
        fds += [self.file(f"pages{i}", data) for i, data in enumerate(files)]
        with self.listener() as listener:
            fds.insert(0, listener.fileno())
            flags |= int(working_set is not None)
            self.send(COMMAND.pack(1, self.number, len(fds), 65536, 0, flags), fds)
            with socket.socket(socket.AF_UNIX) as criu:
                criu.connect(str(self.folder / "socket"))
                criu.settimeout(5)
                # With a file for a userfaultfd now and then; it may have hung up by now.
                extra = (
                    [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds[1:2]))] if talk[:1] == b"\1" else []
                )
                with contextlib.suppress(OSError):
                    criu.sendmsg([talk], extra)
        for fd in fds[1:]:
            os.close(fd)
        return self.number

    def lives(self) -> None:
        """A good restore is taken: RESTORE_FINISHED is answered."""
        number = self.restore(
            index_of([(7, [(0x1000, 1, 0, 0)])], 1), [b"x" * 4096], None, struct.pack("=iI", -5, 0x52535446)
        )
        seen = set()
        while 2 not in seen:
            op, found, *_ = MESSAGE.unpack(self.ours.recv(64))
            if found == number:
                assert op != 5
                seen.add(op)
        self.send(COMMAND.pack(2, number, 0, 0, 0, 0), [])

    def drain(self) -> None:
        self.ours.setblocking(False)
        try:
            while self.ours.recv(64):
                pass
        except BlockingIOError:
            pass
        self.ours.settimeout(10)

    def rests(self) -> bool:
        """It goes before all others of the machine: with nothing to do, it must take no time."""
        before = cpu_s(self.process.pid)
        time.sleep(0.25)
        return cpu_s(self.process.pid) - before < 0.1

    def close(self) -> str:
        self.process.kill()
        assert self.process.stderr is not None
        text = self.process.stderr.read().decode(errors="replace")
        self.process.wait()
        self.ours.close()
        os.close(self.map)
        return text


@pytest.fixture
def rig(binary: Path, tmp_path: Path) -> Iterator[Rig]:
    made = Rig(binary, tmp_path)
    yield made
    assert made.process.poll() is not None or made.rests()
    text = made.close()
    assert "Sanitizer" not in text and "runtime error" not in text, text


Task = tuple[int, list[tuple[int, int, int, int]]]


def index_of(tasks: list[Task], files: int, reserved: int = 0) -> bytes:
    out = INDEX + struct.pack("=II", len(tasks), files)
    out += b"".join(struct.pack("=iI", pid, len(extents)) for pid, extents in tasks)
    out += b"".join(struct.pack("=QQQII", *e, reserved) for _, extents in tasks for e in extents)
    return out + b"".join((b"pages-%d.img" % i).ljust(64, b"\0") for i in range(files))


def set_of(ranges: list[tuple[int, int, int]]) -> bytes:
    return SET + struct.pack("=II", len(ranges), 0) + b"".join(struct.pack("=iIQ", *r) for r in ranges)


def number(rng: random.Random, bits: int) -> int:
    value = rng.choice((rng.choice(EDGES), rng.randrange(1 << bits), rng.randrange(64) * 4096, rng.randrange(64)))
    return value & ((1 << bits) - 1)


def spoiled(rng: random.Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.randrange(3)):
        match rng.randrange(3):
            case 0 if out:
                out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
            case 1:
                del out[rng.randrange(len(out) + 1) :]
            case _:
                out += rng.randbytes(rng.randrange(40))
    return bytes(out)


def some(rng: random.Random) -> tuple[bytes, list[bytes], bytes | None, bytes, int, bytes | None]:
    tasks = []
    for _ in range(rng.randrange(4)):
        extents, at = [], 0
        for _ in range(rng.randrange(5)):
            wild = rng.random() < 0.05
            at = number(rng, 64) if wild else at + 4096 * rng.randrange(9)
            pages = number(rng, 64) if rng.random() < 0.05 else rng.randrange(1, 9)
            offset = number(rng, 64) if rng.random() < 0.05 else 4096 * rng.randrange(4)
            extents.append((at, pages, offset, number(rng, 32) if rng.random() < 0.05 else rng.randrange(3)))
            at = (at + pages * 4096) & ((1 << 64) - 1)
        tasks.append((rng.choice((7, 8, number(rng, 31))), extents))
    count = 3 if rng.random() < 0.9 else rng.randrange(3)
    files = [bytes(4096 * rng.choice((16, 16, rng.randrange(16)))) for _ in range(count)]
    ranges = [(rng.choice((7, 8, 9)), number(rng, 32), number(rng, 64)) for _ in range(rng.randrange(6))]
    working_set = None if rng.random() < 0.3 else spoiled(rng, set_of(ranges))
    talk = b"".join(
        rng.choice(
            (struct.pack("=i", -3), struct.pack("=i", 7), b"\1", struct.pack("=I", 0x52535446), rng.randbytes(3))
        )
        for _ in range(rng.randrange(1, 6))
    )
    index = index_of(tasks, count if rng.random() < 0.9 else number(rng, 32) % 300)
    if rng.random() < 0.5:
        index += set_of([(rng.choice((7, 8, 9)), number(rng, 32), number(rng, 64) & ~0xFFF) for _ in range(3)])
    parked_or_everything = rng.choice((0, 0, 2, 4, 6))
    places = b"".join(struct.pack("=Q", rng.choice((100, 0, (1 << 64) - 1, number(rng, 64)))) for _ in range(count))
    return (
        index if rng.random() < 0.5 else spoiled(rng, index),
        files,
        working_set,
        talk,
        parked_or_everything,
        rng.choice((None, None, places, spoiled(rng, places))),
    )


GOOD = (7, [(0x1000, 2, 0, 0), (0x3000, 1, 4096, 1), (0x8000, 3, 0, 1)])
BAD: dict[str, tuple[list[Task], int, int]] = {
    "overlap": ([(7, [(0x1000, 2, 0, 0), (0x2000, 1, 0, 1)])], 2, 0),
    "order": ([(7, [(0x3000, 1, 0, 0), (0x1000, 1, 0, 0)])], 2, 0),
    "address": ([(7, [(0x1001, 1, 0, 0)])], 2, 0),
    "kernel's address": ([(7, [(1 << 57, 1, 0, 0)])], 2, 0),
    "offset": ([(7, [(0x1000, 1, 1, 0)])], 2, 0),
    "no pages": ([(7, [(0x1000, 0, 0, 0)])], 2, 0),
    "file": ([(7, [(0x1000, 1, 0, 2)])], 2, 0),
    "beyond the end": ([(7, [(0x1000, 2, 3 * 4096, 1)])], 2, 0),
    "far beyond the end": ([(7, [(0x1000, 1, (1 << 64) - 4096, 1)])], 2, 0),
    "pages wrap": ([(7, [(0x1000, (1 << 52) + 1, 0, 1)])], 2, 0),
    "pid": ([(-7, GOOD[1])], 2, 0),
    "more files than came": ([GOOD], 3, 0),
    "fewer files than came": ([(7, [(0x1000, 1, 0, 0)])], 1, 0),
    "no task": ([], 2, 0),
    "reserved": ([GOOD], 2, 1),
}


@pytest.mark.parametrize("name", ["good", *BAD])
def test_what_an_index_may_not_say(rig: Rig, name: str) -> None:
    tasks, files, reserved = BAD.get(name, ([GOOD], 2, 0))
    talk = struct.pack("=iI", -5, 0x52535446)
    asked = rig.restore(index_of(tasks, files, reserved), [bytes(8192), bytes(4 * 4096)], None, talk)
    op = 0
    while op not in (2, 5):
        op, found, *_ = MESSAGE.unpack(rig.ours.recv(64))
        assert found == asked
    assert op == (2 if name == "good" else 5)
    rig.lives()


@pytest.mark.parametrize("change", [b"", b"\0", b"\0" * 64, SET + b"\1" + b"\0" * 7])
def test_an_index_of_another_length(rig: Rig, change: bytes) -> None:
    index = index_of([GOOD], 2)
    rig.restore(index + change if change else index[:-1], [bytes(8192), bytes(4 * 4096)], None, b"")
    assert MESSAGE.unpack(rig.ours.recv(64))[0] == 5
    rig.lives()


def test_files_and_words_of_criu(rig: Rig) -> None:
    rng = random.Random(11)
    for n in range(ROUNDS):
        last = rig.restore(*some(rng))
        if rng.random() < 0.8:
            rig.send(COMMAND.pack(rng.choice((2, 3, 4, 5)), last - rng.randrange(2), 0, 0, number(rng, 32), 0), [])
        if rng.random() < 0.3:
            rig.send(COMMAND.pack(6, 0, 0, number(rng, 32), number(rng, 32), rng.choice((0, 5))), [])
        if n % 50 == 49:
            rig.lives()
        rig.drain()
    rig.lives()


def test_commands(rig: Rig) -> None:
    rng = random.Random(12)
    for n in range(ROUNDS):
        fds = [rig.file("junk", rng.randbytes(rng.randrange(64))) for _ in range(rng.choice((0, 1, 3, 30)))]
        if rng.random() < 0.5:
            data = COMMAND.pack(*(rng.choice((number(rng, 32), rng.randrange(6))) for _ in range(6)))
        else:
            data = rng.randbytes(rng.randrange(1, 60))
        rig.send(data, fds)
        for fd in fds:
            os.close(fd)
        if n % 50 == 49:
            rig.lives()
        rig.drain()
    # More descriptors than it takes at once.
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(220)]
    rig.send(COMMAND.pack(1, 3, 220, 65536, 0, 0), fds)
    for fd in fds:
        os.close(fd)
    rig.lives()


def test_a_set_of_very_many_pieces_is_left_out(rig: Rig) -> None:
    extents = [(0x1000 * 2 * i, 1, 0, 0) for i in range(3000)]
    ranges = [(7, 0xFFFFFFFF, 0)] * 3000
    talk = struct.pack("=iI", -5, 0x52535446)
    asked = rig.restore(index_of([(7, extents)], 1), [b"x" * 4096], set_of(ranges), talk)
    while True:
        op, found, pages, *_ = MESSAGE.unpack(rig.ours.recv(64))
        assert op != 5
        if (op, found) == (2, asked):
            assert pages == 0
            break
    rig.lives()
