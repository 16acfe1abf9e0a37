"""The engine against real CRIU in real sandboxes: what a frozen program holds, it holds after the thaw."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from engine_rig import UID, WORKER_PID, Rig
from woodfrog.criu.authority import Credentials
from woodfrog.engine import engine
from woodfrog.engine.engine import dump, restore
from woodfrog.engine.inspect import inspect_tree
from woodfrog.errors import CaptureError, RestoreError
from woodfrog.linux import procfs
from woodfrog.linux.sandbox import ProcessSpec
from woodfrog.telemetry import Phases

pytestmark = [pytest.mark.root, pytest.mark.criu]


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    made = Rig.make(tmp_path)
    yield made
    await made.close()


COUNTER = """
n = 0
def check():
    global n
    n += 1
    return n
"""
SERVER = """
import http.client
code = '''
import http.server
class H(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    n = 0
    def do_GET(self):
        H.n += 1
        body = str(H.n).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *a): pass
http.server.ThreadingHTTPServer(("127.0.0.1", 8123), H).serve_forever()
'''
server = subprocess.Popen([sys.executable, "-c", code])
for _ in range(200):
    try:
        socket.create_connection(("127.0.0.1", 8123)).close()
        break
    except OSError:
        time.sleep(0.05)
kept = http.client.HTTPConnection("127.0.0.1", 8123)
loop = "import sys\\nfor i, line in enumerate(sys.stdin): print(i, line.strip())"
pipe = subprocess.Popen([sys.executable, "-uc", loop], stdin=-1, stdout=-1, text=True)
def check():
    kept.request("GET", "/")
    a = kept.getresponse().read()
    new = http.client.HTTPConnection("127.0.0.1", 8123)
    new.request("GET", "/")
    b = new.getresponse().read()
    new.close()
    pipe.stdin.write("x\\n")
    pipe.stdin.flush()
    return a, b, pipe.stdout.readline(), server.poll()
"""

# What a process may hold: a set-up that defines check(), its answer before the snapshot, and after.
HELD = {
    "eventfd": ("fd = os.eventfd(3)\ncheck = lambda: (os.eventfd_read(fd), os.eventfd_write(fd, 3))[0]", "3", "3"),
    "epoll": (
        "e = select.epoll(); r, w = os.pipe(); e.register(r, 1)\n"
        "check = lambda: (os.write(w, b'x'), e.poll(1), os.read(r, 1))[2]",
        "b'x'", "b'x'",
    ),
    "timerfd": (
        "fd = libc.timerfd_create(1, 0)\n"
        "libc.timerfd_settime(fd, 0, struct.pack('qqqq', 0, 50000000, 0, 50000000), 0)\ncheck = lambda: "
        "os.read(fd, 8) > b''",
        "True", "True",
    ),
    "pidfd": (
        "p = subprocess.Popen(['sleep', '1000']); fd = os.pidfd_open(p.pid)\n"
        "check = lambda: (signal.pidfd_send_signal(fd, 0), p.poll())",
        "(None, None)", "(None, None)",
    ),
    "inotify": (
        "fd = libc.inotify_init1(os.O_NONBLOCK); libc.inotify_add_watch(fd, b'/tmp', 0x100)\n"
        "check = lambda: (open(f'/tmp/{time.time_ns()}', 'w').close(), len(os.read(fd, 4096)) > 0)[1]",
        "True", "True",
    ),
    "deleted-file": (
        "f = open('/tmp/gone', 'w+b'); f.write(b'ab' * 1000000); f.flush(); os.unlink('/tmp/gone')\n"
        "check = lambda: (f.seek(0), hash(f.read()) == hash(b'ab' * 1000000))[1]",
        "True", "True",
    ),
    "open-file": ("f = open('/tmp/kept', 'w+'); check = lambda: (f.write('x'), f.flush(), f.tell())[2]", "1", "2"),
    "memfd": (
        "fd = os.memfd_create('arena'); os.ftruncate(fd, 1 << 20); m = mmap.mmap(fd, 1 << 20); m[:5] = b'hello'\n"
        "check = lambda: (m[:5], os.pread(fd, 5, 0))",
        "(b'hello', b'hello')", "(b'hello', b'hello')",
    ),
    "shared-memory": (
        "from multiprocessing import shared_memory\n"
        "s = shared_memory.SharedMemory(create=True, size=1 << 20); s.buf[:5] = b'hello'\ncheck = lambda: "
        "bytes(s.buf[:5])",
        "b'hello'", "b'hello'",
    ),
    "semaphore": (
        "import multiprocessing as mp\nq = mp.get_context('spawn').Queue(); q.put(1); time.sleep(0.3)\n"
        "check = lambda: (q.get(timeout=5), q.put(1), time.sleep(0.1))[0]",
        "1", "1",
    ),
    "pool": (
        "from concurrent.futures import ProcessPoolExecutor\nimport multiprocessing as mp\n"
        "p = ProcessPoolExecutor(2, mp_context=mp.get_context('fork')); list(p.map(abs, range(4)))\n"
        "check = lambda: list(p.map(abs, [-1, -2]))",
        "[1, 2]", "[1, 2]",
    ),
    "flock": (
        "f = open('/tmp/lock', 'w'); fcntl.flock(f, fcntl.LOCK_EX)\n"
        "def check():\n    g = open('/tmp/lock')\n    try: fcntl.flock(g, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "    except OSError: return 'held'",
        "'held'", "'held'",
    ),
    "sqlite-wal": (
        "import sqlite3\nc = sqlite3.connect('/tmp/x.db', isolation_level=None); c.execute('pragma journal_mode=wal')\n"
        "c.execute('create table t(a)'); c.execute('begin immediate')\n"
        "check = lambda: (c.execute('insert into t values(1)'), c.execute('select count(*) from t').fetchall())[1]",
        "[(1,)]", "[(2,)]",
    ),
    "pty": (
        "import pty\npid, fd = pty.fork()\nif pid == 0: os.execv('/bin/cat', ['cat'])\n"
        "check = lambda: (os.write(fd, b'y\\n'), time.sleep(0.2), b'y' in os.read(fd, 100))[2]",
        "True", "True",
    ),
    "asyncio-thread": (
        "import asyncio\nn = 0\nasync def tick():\n    global n\n    while True:\n        await "
        "asyncio.sleep(0.01); n += 1\n"
        "threading.Thread(target=lambda: asyncio.run(tick()), daemon=True).start()\n"
        "def check():\n    a = n; time.sleep(0.3); return n > a",
        "True", "True",
    ),
    "detached-below-subreaper": (
        "libc.prctl(36, 1, 0, 0, 0)\n"
        "if os.fork() == 0:\n    if os.fork() == 0: os.setsid(); os.execv('/bin/sleep', ['sleep', '1000'])\n    "
        "os._exit(0)\n"
        "os.wait(); time.sleep(0.1)\ncheck = lambda: len(open('/proc/thread-self/children').read().split())",
        "1", "1",
    ),
    "zombie": ("p = subprocess.Popen(['true']); time.sleep(0.2)\ncheck = lambda: p.poll()", None, "0"),
    "reserved-addresses": (  # more than the machine has, as a browser does; its child has them in common with it
        "libc.mmap.restype = ctypes.c_void_p\n"
        "at = libc.mmap(None, ctypes.c_size_t(1 << 40), 0, 0x22, -1, ctypes.c_long(0))\n"
        "libc.mprotect(ctypes.c_void_p(at + (1 << 39)), 4096, 3); ctypes.memmove(at + (1 << 39), b'used', 4)\n"
        "child = os.fork()\nif child == 0: time.sleep(1000)\n"
        "check = lambda: (ctypes.string_at(at + (1 << 39), 4), os.waitpid(child, os.WNOHANG))",
        "(b'used', (0, 0))", "(b'used', (0, 0))",
    ),
    "seccomp-and-no-new-privs": (
        "lines = lambda: [l.split()[1] for l in open('/proc/self/status') if l.startswith(('NoNewPrivs', "
        "'Seccomp:', 'CapEff'))]\n"
        "check = lambda: (lines(), os.getuid(), os.getgroups(), os.getsid(0) == os.getpid())",
        f"(['0000000000000000', '1', '2'], {UID}, [], True)", f"(['0000000000000000', '1', '2'], {UID}, [], True)",
    ),
    "where-threads-run": (  # on processors 0 and 1, by I/O priority, with timers of their own
        "cpus = sorted(os.sched_getaffinity(0))\n"
        "def bound():\n    os.sched_setaffinity(0, cpus[:1]); libc.prctl(29, 70000); libc.syscall(251, 1, 0, 3 << 13)\n"
        "    done.set()\n    while True:\n        global seen\n"
        "        seen = (os.sched_getaffinity(0) == {cpus[0]}, libc.prctl(30), libc.syscall(252, 1, 0) >> 13)\n"
        "        time.sleep(0.01)\n"
        "done = threading.Event(); threading.Thread(target=bound, daemon=True).start(); done.wait()\n"
        "os.sched_setaffinity(0, cpus[-1:])\n"
        "check = lambda: (time.sleep(0.1), os.sched_getaffinity(0) == {cpus[-1]}, seen)[1:]",
        "(True, (True, 70000, 3))", "(True, (True, 70000, 3))",
    ),
    "many-descriptors": (
        "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (3000, 3000))\n"
        "keep = [open('/dev/null') for _ in range(2000)]\ncheck = lambda: len(os.listdir('/proc/self/fd')) > 2000",
        "True", "True",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HELD)
async def test_what_is_held_comes_back(rig: Rig, name: str) -> None:
    setup, before, after = HELD[name]
    sandbox, _ = await rig.start(setup)
    if before is not None:
        assert await rig.ask(sandbox) == before
    else:
        await asyncio.sleep(0.5)
    frozen = await rig.freeze(sandbox)
    thawed, _ = await rig.thaw(frozen)
    assert await rig.ask(thawed) == after


async def test_three_clones_of_threads_side_by_side(rig: Rig) -> None:
    setup = """
lock = threading.Lock()
total = [0]
def work():
    while True:
        with lock: total[0] += 1
        time.sleep(0.001)
for _ in range(8): threading.Thread(target=work, daemon=True).start()
blob = os.urandom(8 << 20)
import zlib
def check():
    a = total[0]
    time.sleep(0.2)
    return threading.active_count(), zlib.crc32(blob), total[0] > a
"""
    sandbox, process = await rig.start(setup)
    before = await rig.ask(sandbox)
    phases = Phases()
    frozen = await rig.freeze(sandbox, phases=phases)
    assert process.status == -signal.SIGKILL
    assert frozen.result.tasks == 1 and frozen.result.pages_bytes > 8 << 20 and frozen.result.warnings == ()
    assert {"inspect", "plan", "criu", "criu.frozen"} <= {p.name for p in phases.items}
    state = {p.name: (p.stat().st_size, p.stat().st_mtime_ns) for p in frozen.images.iterdir()}

    clones = await asyncio.gather(*(rig.thaw(frozen) for _ in range(3)))
    assert [await rig.ask(sb) for sb, _ in clones] == [before] * 3
    assert len({p.host_pid for _, p in clones}) == 3 and {p.inner_pid for _, p in clones} == {WORKER_PID}
    # The images are only read: 32 restores share them, and they are signed.
    assert {p.name: (p.stat().st_size, p.stat().st_mtime_ns) for p in frozen.images.iterdir()} == state
    # What a restored process starts may not take a pid that CRIU needs when it is dumped again.
    again, _ = clones[0]
    second = await rig.freeze(again)
    sb, _ = await rig.thaw(second)
    assert await rig.ask(sb) == before


async def test_images_are_roots_alone(rig: Rig) -> None:
    sandbox, _ = await rig.start(COUNTER)
    await rig.ask(sandbox)
    frozen = await rig.freeze(sandbox)
    for path in frozen.images.iterdir():
        info = path.stat()
        assert (info.st_uid, info.st_mode & 0o777) == (0, 0o600), path.name
    assert (rig.kdat / "criu.kdat").stat().st_uid == 0, "the worker could alter the cache"


async def test_a_family_of_processes(rig: Rig) -> None:
    """A server of the function's own over TCP and a filter over pipes, with a kept connection."""
    if rig.criu.version < (4, 2, 0) and tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 16):
        pytest.skip("CRIU 4.1 cannot dump network sockets on this kernel")
    sandbox, _ = await rig.start(SERVER)
    assert await rig.ask(sandbox) == repr((b"1", b"2", "0 x\n", None))
    frozen = await rig.freeze(sandbox)
    assert frozen.result.tasks == 3
    one, _ = await rig.thaw(frozen)
    two, _ = await rig.thaw(frozen)
    for clone in (one, two):
        assert await rig.ask(clone) == repr((b"3", b"4", "1 x\n", None))


async def test_connections_beyond_loopback_come_back_closed(rig: Rig) -> None:
    setup = """
pair = []
def check():
    if not pair:
        listening = socket.create_server(("0.0.0.0", 9000))
        pair.append(socket.create_connection(("10.99.9.2", 9000)))
        pair.append(listening.accept()[0])
    pair[0].sendall(b"x")
    return pair[1].recv(1)
"""
    sandbox, _ = await rig.start(setup)
    address = ("nsenter", "-t", str(sandbox.init_pid), "-n", "ip", "addr", "add", "10.99.9.2/32", "dev", "lo")
    subprocess.run(address, check=True)
    assert await rig.ask(sandbox) == "b'x'"
    frozen = await rig.freeze(sandbox)
    assert "2 TCP connections to the outside" in frozen.result.warnings[0]
    thawed, _ = await rig.thaw(frozen)
    assert "BrokenPipeError" in await rig.ask(thawed)


async def test_a_connection_to_the_outside_takes_no_other_with_it(rig: Rig) -> None:
    """Those within the sandbox go on with what was on its way; the others read as ended."""
    setup = """
pairs = []
def connect(address):
    listening = socket.create_server(("0.0.0.0", 0))
    one = socket.create_connection((address, listening.getsockname()[1]))
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    pairs.append((one, listening.accept()[0]))
    one.sendall(b"frozen")
def check():
    if not pairs:
        for address in ("127.0.0.1", "10.99.9.2"):
            connect(address)
        return len(pairs)
    (inner, served), (outer, other) = pairs
    inner.sendall(b"+")
    ended = [select.select([s], [], [], 5)[0] == [s] and s.recv(10) for s in (outer, other)]
    return served.recv(10), ended, outer.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
"""
    sandbox, _ = await rig.start(setup)
    address = ("nsenter", "-t", str(sandbox.init_pid), "-n", "ip", "addr", "add", "10.99.9.2/32", "dev", "lo")
    subprocess.run(address, check=True)
    assert await rig.ask(sandbox) == "2"
    frozen = await rig.freeze(sandbox)
    assert len(frozen.result.warnings) == 1 and "2 TCP connections to the outside" in frozen.result.warnings[0]
    for _ in range(2):
        thawed, _ = await rig.thaw(frozen)
        assert await rig.ask(thawed) == "(b'frozen+', [b'', b''], 1)"


async def test_external_files_are_named_by_the_hosts_paths(rig: Rig) -> None:
    data = rig.home / "files" / "data.bin"
    data.write_bytes(b"x" * 5000)
    sandbox, _ = await rig.start(f"f = open('{data}', 'rb')\ncheck = lambda: f.read(2)")
    await rig.ask(sandbox)
    frozen = await rig.freeze(sandbox)
    files = {path: (size, mtime) for path, size, mtime in frozen.result.files}
    assert files[str(data)] == (5000, data.stat().st_mtime_ns)
    assert os.path.realpath(sys._base_executable) in files
    for path, (size, mtime) in files.items():
        info = os.stat(path)
        assert (info.st_size, info.st_mtime_ns) == (size, mtime)


REFUSED = {
    "stray-process": (
        "if os.fork() == 0:\n    if os.fork() == 0: os.setsid(); os.execv('/bin/sleep', ['sleep', '1000'])\n    "
        "os._exit(0)\n"
        "os.wait(); time.sleep(0.2)\n"
    ),
    "descriptor-kind": "fd = libc.syscall({'x86_64': 323, 'aarch64': 282}[os.uname().machine], 0o4000 | 1)\n",
    "traced": "p = subprocess.Popen(['sleep', '1000']); time.sleep(0.2); libc.ptrace(0x4206, p.pid, 0, 0)\n",
    "sysv-shm": (
        "libc.shmat.restype = ctypes.c_void_p\nlibc.shmat(libc.shmget(0, 4096, 0o1600), None, 0)\n"
    ),
    "ipc-object": "libc.semget(0x5EED, 1, 0o1600)\n",
    "nested-namespace": "p = subprocess.Popen(['unshare', '-U', '-r', 'sleep', '1000']); time.sleep(0.5)\n",
    "own-address": (
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.setsockopt(0, 15, 1); s.bind(('10.99.9.9', 5353))\n"
    ),
    "io-uring": "fd = libc.syscall(425, 8, ctypes.create_string_buffer(120))\nassert fd >= 0\n",
}  # fmt: skip


@pytest.mark.parametrize("code", REFUSED)
async def test_what_cannot_be_captured_is_refused_and_unharmed(rig: Rig, code: str) -> None:
    sandbox, process = await rig.start(REFUSED[code] + COUNTER, seccomp=False)
    assert await rig.ask(sandbox) == "1"
    images = rig.images()
    with pytest.raises(CaptureError) as caught:
        await dump(sandbox, root_pid=WORKER_PID, images=images, criu=rig.criu, phases=Phases())
    assert caught.value.code == code and caught.value.alive and caught.value.fields["remedy"]
    assert "\n" not in caught.value.message
    assert caught.value.fields["phase"] == "plan" and list(images.iterdir()) == []
    assert await rig.ask(sandbox) == "2" and process.status is None


@pytest.mark.parametrize("rests", [True, False])
async def test_where_vectors_would_be_cut_threads_that_compute_are_refused(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rests: bool
) -> None:
    monkeypatch.setattr(engine, "SVE", tmp_path)
    body = "time.sleep(1000)" if rests else "\n    while True: pass"
    setup = f"def work(): {body}\nthreading.Thread(target=work, daemon=True).start()\n"
    sandbox, process = await rig.start(setup + COUNTER)
    assert await rig.ask(sandbox) == "1"
    images = rig.images()
    dumping = dump(sandbox, root_pid=WORKER_PID, images=images, criu=rig.criu, phases=Phases())
    if rests:
        await dumping
        return
    with pytest.raises(CaptureError) as caught:
        await dumping
    assert (caught.value.code, caught.value.alive) == ("sve", True) and "1 thread outside" in caught.value.message
    assert list(images.iterdir()) == [] and await rig.ask(sandbox) == "2" and process.status is None


async def test_a_dump_that_criu_refuses_leaves_the_process_as_it_was(rig: Rig) -> None:
    """A half of a socket pair whose other half is here, in this test: CRIU alone can tell."""
    ours, theirs = socket.socketpair()
    sandbox = await rig.sandbox()
    program = (
        "import os, socket\nn = 0\ns = socket.socket(fileno=3)\n"
        "while True:\n    s.recv(1); n += 1; s.send(str(n).encode())"
    )
    process = await sandbox.spawn(
        ProcessSpec(
            (sys._base_executable, "-c", program), uid=UID, gid=UID, inner_pid=WORKER_PID, pass_fds={3: theirs.fileno()}
        )
    )
    theirs.close()
    with ours:
        ours.settimeout(10)
        ours.send(b"x")
        assert ours.recv(10) == b"1"
        before = inspect_tree(process.host_pid, sandbox.init_pid)
        images = rig.images()
        with pytest.raises(CaptureError) as caught:
            await dump(sandbox, root_pid=WORKER_PID, images=images, criu=rig.criu, phases=Phases())
        assert caught.value.code == "unix-peer-outside" and caught.value.alive, caught.value.to_dict()
        assert "Error" in caught.value.fields["log_tail"]
        assert [p.name for p in images.iterdir()] == ["dump.log"]
        ours.send(b"x")
        assert ours.recv(10) == b"2"
        after = inspect_tree(process.host_pid, sandbox.init_pid)
        assert [t.descriptors for t in after.tasks] == [t.descriptors for t in before.tasks]
        assert not any("CRIU" in m.path for m in procfs.maps(process.host_pid))


async def test_dump_of_a_process_that_is_gone(rig: Rig) -> None:
    sandbox, process = await rig.start("os._exit(3)\n")
    assert await process.wait() == 3
    with pytest.raises(CaptureError) as caught:
        await dump(sandbox, root_pid=WORKER_PID, images=rig.images(), criu=rig.criu, phases=Phases())
    assert caught.value.code == "process-gone" and not caught.value.alive


async def _frozen_counter(rig: Rig) -> tuple[Path, Path, Path]:
    sandbox, _ = await rig.start(COUNTER)
    assert await rig.ask(sandbox) == "1"
    frozen = await rig.freeze(sandbox)
    return frozen.images, frozen.fs, frozen.shm


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        ("truncate-core", "image-corrupt"),
        ("flip-magic", "image-corrupt"),
        ("remove-descriptors", "image-corrupt"),
        ("truncate-pages", "image-corrupt"),
        ("damage-facts", "image-corrupt"),
    ],
)
async def test_a_damaged_snapshot_is_at_fault_and_leaves_nothing(rig: Rig, damage: str, code: str) -> None:
    images, fs, shm = await _frozen_counter(rig)
    match damage:
        case "truncate-core":
            core = images / "core-100.img"
            core.write_bytes(core.read_bytes()[:200])
        case "flip-magic":
            core = images / "core-100.img"
            core.write_bytes(b"\0\1\2\3\4\5\6\7" + core.read_bytes()[8:])
        case "remove-descriptors":
            # CRIU itself restores without them, and says nothing.
            (images / "fdinfo-2.img").unlink()
        case "truncate-pages":
            # CRIU itself waits for ever.
            os.truncate(images / "pages-1.img", 8192)
        case "damage-facts":
            (images / "engine.json").write_text("{}")
    sandbox = await rig.sandbox(layers=(fs,), shm=shm)
    with pytest.raises(RestoreError) as caught:
        await restore(sandbox, images=images, criu=rig.criu, phases=Phases())
    error = caught.value
    assert error.snapshot_at_fault and error.code == code, error.to_dict()
    assert "\n" not in error.message and error.message.startswith("cannot restore: ")
    assert "cleanup" not in error.fields
    await rig.nothing_runs(sandbox)


async def test_a_restore_where_a_file_is_missing_names_it(rig: Rig) -> None:
    data = rig.home / "files" / "data.bin"
    data.write_bytes(b"x" * 5000)
    sandbox, _ = await rig.start(f"f = open('{data}', 'rb')\ncheck = lambda: f.read(2)")
    await rig.ask(sandbox)
    frozen = await rig.freeze(sandbox)
    data.unlink()
    with pytest.raises(RestoreError) as caught:
        await rig.thaw(frozen)
    assert caught.value.code == "file-missing" and "files/data.bin" in caught.value.message
    assert not caught.value.snapshot_at_fault


async def test_a_clock_that_ran_backwards_goes_on(rig: Rig) -> None:
    """As after a reboot: the snapshot's monotonic clock is ahead of the machine's."""
    sandbox, _ = await rig.start("check = lambda: round(time.monotonic())")
    before = int(await rig.ask(sandbox))
    frozen = await rig.freeze(sandbox)
    facts = json.loads((frozen.images / "engine.json").read_text())
    assert abs(facts["monotonic_ns"] / 1e9 - before) < 30
    plain, _ = await rig.thaw(frozen)
    assert os.readlink(f"/proc/{plain.init_pid}/ns/time") == os.readlink("/proc/self/ns/time")
    facts["monotonic_ns"] += 10**15
    (frozen.images / "engine.json").write_text(json.dumps(facts))
    ahead, process = await rig.thaw(frozen)
    assert int(await rig.ask(ahead)) - before < 60
    assert os.readlink(f"/proc/{process.host_pid}/ns/time") != os.readlink("/proc/self/ns/time")


async def test_a_process_that_ran_on_while_the_others_were_dumped(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is taken of what it may have changed meanwhile."""
    sandbox, _ = await rig.start("def check(): return 1")
    await rig.ask(sandbox)
    monkeypatch.setattr("woodfrog.engine.engine.refuse", lambda *_, **__: None)  # it came after the look
    await sandbox.spawn(ProcessSpec(("/bin/sleep", "1000"), uid=UID, gid=UID))
    with pytest.raises(CaptureError) as caught:
        await rig.freeze(sandbox)
    assert caught.value.code == "stray-process" and not caught.value.alive


async def test_credentials_that_are_not_the_processes_own(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """CRIU reads them from memory that others may have written to."""
    sandbox, _ = await rig.start("def check(): return 1")
    await rig.ask(sandbox)
    real = engine.credentials

    def forged(images: Path) -> dict[str, Credentials]:
        return {name: replace(has, capabilities=1 << 21) for name, has in real(images).items()}

    monkeypatch.setattr(engine, "credentials", forged)
    with pytest.raises(CaptureError, match="capabilities 200000") as caught:
        await rig.freeze(sandbox)
    assert caught.value.code == "images-altered" and not caught.value.alive
    await rig.nothing_runs(sandbox)


@pytest.mark.parametrize("cache", ["criu.kdat", "lazy/criu.kdat"])
async def test_what_criu_believes_of_the_kernel_is_roots(rig: Rig, cache: str) -> None:
    """CRIU as root, or with root's powers, reads it as it is: no worker may have written it."""
    from woodfrog.engine.engine import _fill_cache, _fill_lazy_cache

    sandbox = await rig.sandbox()
    fill = _fill_cache if cache == "criu.kdat" else _fill_lazy_cache
    await fill(sandbox, rig.criu)
    path = rig.kdat / cache
    good = path.read_bytes()
    assert path.stat().st_uid == 0 and len(good) > 100
    path.write_bytes(b"x" * len(good))
    os.chown(path, UID, UID)
    await fill(sandbox, rig.criu)
    found = path.read_bytes()  # not to the byte as before: it has numbers of mounts in it
    assert path.stat().st_uid == 0 and (len(found), found[:64]) == (len(good), good[:64])
