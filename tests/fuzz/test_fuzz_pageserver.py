"""Malformed commands, indexes and working sets against the real page server, with sanitizers where there are any.

It refuses or serves, and lives: after every round a well-formed restore is still taken.
"""

from __future__ import annotations

import array
import contextlib
import os
import random
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.pages_rig import sanitized_server
from woodfrog.linux.pageserver import page_server_path

COMMAND = struct.Struct("=IIIIII")
MESSAGE = struct.Struct("=IIQQQ")
INDEX, SET = b"FROGIDX1", b"FROGSET1"
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

    def restore(self, index: bytes, files: list[bytes], working_set: bytes | None, talk: bytes) -> int:
        self.number += 1
        fds = [self.file("index", index)]
        if working_set is not None:
            fds.append(self.file("set", working_set))
        fds += [self.file(f"pages{i}", data) for i, data in enumerate(files)]
        with self.listener() as listener:
            fds.insert(0, listener.fileno())
            self.send(COMMAND.pack(1, self.number, len(fds), 65536, 0, int(working_set is not None)), fds)
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
            index_of([(7, [(0x1000, 1, 0)])]), [b"x" * 4096], None, struct.pack("=iI", -5, 0x52535446)
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

    def close(self) -> str:
        time.sleep(0.05)
        self.process.kill()
        assert self.process.stderr is not None
        text = self.process.stderr.read().decode(errors="replace")
        self.process.wait()
        self.ours.close()
        return text


@pytest.fixture
def rig(binary: Path, tmp_path: Path) -> Iterator[Rig]:
    made = Rig(binary, tmp_path)
    yield made
    text = made.close()
    assert "Sanitizer" not in text and "runtime error" not in text, text


def index_of(tasks: list[tuple[int, list[tuple[int, int, int]]]]) -> bytes:
    out = INDEX + struct.pack("=II", len(tasks), 0)
    out += b"".join(struct.pack("=iI", pid, len(extents)) for pid, extents in tasks)
    return out + b"".join(struct.pack("=QQQ", *e) for _, extents in tasks for e in extents)


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


def some(rng: random.Random) -> tuple[bytes, list[bytes], bytes | None, bytes]:
    tasks = []
    for _ in range(rng.randrange(4)):
        extents, at = [], 0
        for _ in range(rng.randrange(5)):
            wild = rng.random() < 0.1
            at = number(rng, 64) if wild else at + 4096 * rng.randrange(9)
            pages = number(rng, 64) if rng.random() < 0.05 else rng.randrange(1, 9)
            extents.append((at, pages, number(rng, 64) if rng.random() < 0.05 else 4096 * rng.randrange(4)))
            at = (at + pages * 4096) & ((1 << 64) - 1)
        tasks.append((rng.choice((7, 8, number(rng, 31))), extents))
    files = [bytes(4096 * rng.randrange(16)) for _ in range(max(0, len(tasks) + rng.choice((0, 0, 0, 1, -1))))]
    ranges = [(rng.choice((7, 8, 9)), number(rng, 32), number(rng, 64)) for _ in range(rng.randrange(6))]
    working_set = None if rng.random() < 0.3 else spoiled(rng, set_of(ranges))
    talk = b"".join(
        rng.choice(
            (struct.pack("=i", -3), struct.pack("=i", 7), b"\1", struct.pack("=I", 0x52535446), rng.randbytes(3))
        )
        for _ in range(rng.randrange(1, 6))
    )
    return spoiled(rng, index_of(tasks)), files, working_set, talk


def test_files_and_words_of_criu(rig: Rig) -> None:
    rng = random.Random(11)
    for n in range(ROUNDS):
        last = rig.restore(*some(rng))
        if rng.random() < 0.8:
            rig.send(COMMAND.pack(rng.choice((2, 3, 4)), last - rng.randrange(2), 0, 0, number(rng, 32), 0), [])
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
    extents = [(0x1000 * 2 * i, 1, 0) for i in range(3000)]
    ranges = [(7, 0xFFFFFFFF, 0)] * 3000
    talk = struct.pack("=iI", -5, 0x52535446)
    asked = rig.restore(index_of([(7, extents)]), [b"x" * 4096], set_of(ranges), talk)
    while True:
        op, found, pages, *_ = MESSAGE.unpack(rig.ours.recv(64))
        assert op != 5
        if (op, found) == (2, asked):
            assert pages == 0
            break
    rig.lives()
