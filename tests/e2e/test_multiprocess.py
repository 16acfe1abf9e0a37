"""Workers that are more than one process and memory: servers, pools, and what they hold open go on after the thaw."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import woodfrog
from e2e.harness import Daemon, until
from woodfrog.linux import hugepages

pytestmark = [pytest.mark.root, pytest.mark.criu]

PROGRAM = r'''
import ctypes, fcntl, mmap, multiprocessing, os, pty, queue, select, signal, socket, struct, subprocess, sys
import threading, time
from multiprocessing import shared_memory

import woodfrog

app = woodfrog.App("family")
ONCE = {"enable_memory_snapshot": True, "single_use_containers": True}

SERVER = """
import http.server, os, socketserver, sys, threading

started = os.urandom(8).hex()  # in memory only: a server started again has another
count = 0

class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        global count
        for line in self.rfile:
            count += 1
            self.wfile.write(f"{started} {count} {line.decode().strip()}\\n".encode())

class Http(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = f"{started} {self.path}".encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args):
        print("served", self.path, flush=True)

class Unix(socketserver.ThreadingMixIn, socketserver.UnixStreamServer): daemon_threads = True
class Tcp(socketserver.ThreadingMixIn, socketserver.TCPServer): daemon_threads = True

unix, tcp = Unix("/tmp/server.sock", Handler), Tcp(("127.0.0.1", 7070), Handler)
web = http.server.ThreadingHTTPServer(("0.0.0.0", 8080), Http)
for server in (unix, tcp, web):
    threading.Thread(target=server.serve_forever).start()
print("listening", flush=True)
"""


def talk(family, address, text):
    with socket.socket(family) as s:
        s.settimeout(5)
        s.connect(address)
        s.sendall(text.encode() + b"\n")
        return s.makefile().readline().split()


@app.cls(**ONCE)
class Servers:
    @woodfrog.enter(snap=True)
    def start(self):
        self.server = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
        started = self.server.stdout.readline()
        assert started == "listening\n", started
        self.first = talk(socket.AF_UNIX, "/tmp/server.sock", "one")

    @woodfrog.method()
    def ask(self):
        import urllib.request

        unix = talk(socket.AF_UNIX, "/tmp/server.sock", "two")
        tcp = talk(socket.AF_INET, ("127.0.0.1", 7070), "three")
        web = urllib.request.urlopen("http://127.0.0.1:8080/page", timeout=5).read().decode().split()
        printed = self.server.stdout.readline()  # through a pipe from before
        alive = self.server.poll() is None
        self.server.terminate()
        return {"answers": [self.first, unix, tcp, web], "printed": printed, "alive": alive, "end": self.server.wait(5)}


HUGE = """
import mmap, sys

area = mmap.mmap(-1, 16 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
area.madvise(mmap.MADV_HUGEPAGE)
for at in range(0, len(area), 4096):
    area[at : at + 8] = at.to_bytes(8, "little")

def seen():
    right = all(area[at : at + 8] == at.to_bytes(8, "little") for at in range(0, len(area), 4096))
    huge = next(line for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages:"))
    return [right, int(huge.split()[1]) >> 10]
"""
LOOP = """
for line in sys.stdin:
    print(*seen(), flush=True)
"""


@app.cls(enable_memory_snapshot=True, scaledown_window=300)
class Huge:
    """Memory in huge pages, here and in a child."""

    @woodfrog.enter(snap=True)
    def load(self):
        self.names = {}
        exec(HUGE, self.names)
        self.child = subprocess.Popen(
            [sys.executable, "-c", HUGE + LOOP], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.before = self.look()

    @woodfrog.method()
    def look(self):
        print("now", file=self.child.stdin, flush=True)
        right, huge = self.child.stdout.readline().split()
        return [*self.names["seen"](), right == "True", int(huge)]

    @woodfrog.method()
    def first(self):
        return self.before


def power(x):
    return x**2


@app.cls(**ONCE)
class Pool:
    """Worker processes made by fork, their queues and their semaphores."""

    @woodfrog.enter(snap=True)
    def start(self):
        self.pool = multiprocessing.get_context("fork").Pool(2)
        self.pool.map(power, range(50), chunksize=1)
        self.before = sorted(child.pid for child in multiprocessing.active_children())
        self.shared = multiprocessing.Value("i", 40)
        self.array = multiprocessing.RawArray("d", [1.0, 2.0])

    @woodfrog.method()
    def work(self):
        found = self.pool.map(power, range(50), chunksize=1)
        with self.shared.get_lock():
            self.shared.value += 2
        alive = sorted(child.pid for child in multiprocessing.active_children())
        self.pool.terminate()
        return [found, len(alive) == 2 and self.before == alive, self.shared.value, list(self.array)]


@app.cls(**ONCE)
class Executor:
    """The same with the spawn method and concurrent.futures: a resource tracker and a forkserver beside it."""

    @woodfrog.enter(snap=True)
    def start(self):
        from concurrent.futures import ProcessPoolExecutor

        self.executor = ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn"))
        self.before = self.executor.submit(os.getpid).result()

    @woodfrog.method()
    def work(self):
        found = list(self.executor.map(abs, [-1, -2, -3]))
        self.executor.shutdown()
        return found


@app.cls(**ONCE)
class Shell:
    """A tree three deep: with a child in a session of its own, a stopped one, and a dead one nobody waited for."""

    @woodfrog.enter(snap=True)
    def start(self):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.cat = subprocess.Popen(["sh", "-c", "cat; echo ended"], **pipes)
        self.sleeper = subprocess.Popen(["sleep", "1000"], start_new_session=True)
        self.stopped = subprocess.Popen(["sh", "-c", "kill -STOP $$; exit 7"])
        self.dead = subprocess.Popen(["sh", "-c", "exit 5"])
        os.waitid(os.P_PID, self.dead.pid, os.WEXITED | os.WNOWAIT)
        os.waitid(os.P_PID, self.stopped.pid, os.WSTOPPED | os.WNOWAIT)
        self.caught = []
        signal.signal(signal.SIGUSR1, lambda *a: self.caught.append("USR1"))

    @woodfrog.method()
    def use(self):
        out, _ = self.cat.communicate("through\n", timeout=5)
        sleeping = self.sleeper.poll() is None and os.getsid(self.sleeper.pid) == self.sleeper.pid
        self.sleeper.kill()
        self.stopped.send_signal(signal.SIGCONT)
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.01)
        return [out, sleeping, self.sleeper.wait(5), self.stopped.wait(5), self.dead.wait(5), self.caught]


@app.cls(**ONCE)
class Held:
    """Every kind of thing that a process can hold open, in use when it is frozen."""

    @woodfrog.enter(snap=True)
    def start(self):
        self.listener = socket.create_server(("127.0.0.1", 7001))
        self.client = socket.create_connection(("127.0.0.1", 7001))
        self.served, _ = self.listener.accept()
        self.client.sendall(b"frozen")
        self.udp, self.udp_client = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
        self.udp.bind(("127.0.0.1", 7002))
        self.udp_client.connect(("127.0.0.1", 7002))
        self.pair = socket.socketpair()
        self.pair[0].send(b"frozen")
        self.unix = self.bound("/tmp/stream.sock", socket.SOCK_STREAM)
        self.unix_client = self.connected("/tmp/stream.sock", socket.SOCK_STREAM)
        self.unix_served, _ = self.unix.accept()
        self.waiting = self.connected("/tmp/stream.sock", socket.SOCK_STREAM)  # not accepted yet
        self.datagram = self.bound("/tmp/datagram.sock", socket.SOCK_DGRAM)
        self.datagram_client = self.connected("/tmp/datagram.sock", socket.SOCK_DGRAM)
        self.datagram_client.send(b"frozen")
        self.abstract = self.bound("\0abstract", socket.SOCK_STREAM)
        self.netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
        self.netlink.bind((0, 0))

        self.pipe = os.pipe()
        self.epoll = select.epoll()
        self.epoll.register(self.pipe[0], select.EPOLLIN)
        self.eventfd = os.eventfd(3)
        os.mkfifo("/tmp/fifo")
        self.fifo = os.open("/tmp/fifo", os.O_RDONLY | os.O_NONBLOCK), os.open("/tmp/fifo", os.O_WRONLY)
        os.write(self.fifo[1], b"frozen")
        libc = ctypes.CDLL(None)
        os.mkdir("/tmp/watched")
        self.inotify = libc.inotify_init1(0)
        libc.inotify_add_watch(self.inotify, b"/tmp/watched", 0x100)
        self.timerfd = libc.timerfd_create(1, 0)
        libc.timerfd_settime(self.timerfd, 0, struct.pack("4q", 0, 50_000_000, 0, 50_000_000), None)
        self.alarms = 0
        signal.signal(signal.SIGALRM, self.alarm)
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)

        self.memfd = os.memfd_create("held")
        os.write(self.memfd, b"frozen")
        self.mapped_memfd = mmap.mmap(self.memfd, 6)
        self.anonymous = mmap.mmap(-1, 4096)
        self.anonymous[:6] = b"frozen"
        self.shared = shared_memory.SharedMemory(create=True, size=4096)
        self.shared.buf[:6] = b"frozen"
        self.file = open("/tmp/mapped", "w+b")
        self.file.write(b"frozen" * 1000)
        self.file.flush()
        self.mapped = mmap.mmap(self.file.fileno(), 6000)
        self.mapped[:6] = b"FROZEN"
        self.deleted = open("/tmp/deleted", "w+b")
        self.deleted.write(b"frozen" * 1000)
        self.deleted.flush()
        self.private = mmap.mmap(self.deleted.fileno(), 6000, mmap.MAP_PRIVATE)
        self.private[:3] = b"FRO"
        os.unlink("/tmp/deleted")
        self.locked = open("/tmp/locked", "w")
        fcntl.flock(self.locked, fcntl.LOCK_EX)
        places = ("/proc/self/stat", "/proc/meminfo", "/dev/zero", "/dev/urandom", sys.executable, "/usr/bin")
        self.places = [os.open(p, os.O_RDONLY) for p in places]
        self.terminal, other = pty.openpty()
        self.cat = subprocess.Popen(["cat"], stdin=other, stdout=other, stderr=other, start_new_session=True)
        os.close(other)
        self.pidfd = os.pidfd_open(self.cat.pid)

        self.queue, self.event, self.woken = queue.Queue(), threading.Event(), []
        waits = (
            self.queue.get,
            self.event.wait,
            lambda: time.sleep(0.3),
            lambda: select.select([self.pipe[0]], [], [], 30),
            lambda: subprocess.run(["sleep", "0.3"]),
        )
        for wait in waits:
            threading.Thread(target=lambda wait=wait: self.woken.append(wait())).start()

    def alarm(self, *args):
        self.alarms += 1

    def bound(self, path, kind):
        s = socket.socket(socket.AF_UNIX, kind)
        s.bind(path)
        if kind == socket.SOCK_STREAM:
            s.listen()
        return s

    def connected(self, path, kind):
        s = socket.socket(socket.AF_UNIX, kind)
        s.connect(path)
        return s

    @woodfrog.method()
    def use(self):
        alarms = self.alarms
        for s in (self.client, self.pair[0], self.unix_client, self.waiting, self.udp_client, self.datagram_client):
            s.send(b"+")
        os.write(self.pipe[1], b"+")
        os.write(self.fifo[1], b"+")
        open("/tmp/watched/new", "w").close()
        self.queue.put(1)
        self.event.set()
        os.write(self.terminal, b"echo\n")
        time.sleep(0.5)
        found = {
            "tcp": self.served.recv(100),
            "udp": self.udp.recv(100),
            "pair": self.pair[1].recv(100),
            "stream": self.unix_served.recv(100),
            "accepted late": self.unix.accept()[0].recv(100),
            "datagrams": [self.datagram.recv(100), self.datagram.recv(100)],
            "abstract": self.connected("\0abstract", socket.SOCK_STREAM).getpeername(),
            "netlink": self.netlink.getsockname()[0] > 0,
            "epoll": [fd == self.pipe[0] for fd, _ in self.epoll.poll(1)],
            "eventfd": os.eventfd_read(self.eventfd),
            "fifo": os.read(self.fifo[0], 100),
            "inotify": b"new" in os.read(self.inotify, 4096),
            "timer": struct.unpack("q", os.read(self.timerfd, 8))[0] > 0,
            "alarms": self.alarms > alarms,
            "memfd": [os.pread(self.memfd, 100, 0), self.mapped_memfd[:]],
            "anonymous": self.anonymous[:6],
            "shared memory": [bytes(self.shared.buf[:6]), open("/dev/shm/" + self.shared.name, "rb").read(6)],
            "mapped": [self.mapped[:12], open("/tmp/mapped", "rb").read(6)],
            "deleted": [self.private[:6], os.pread(self.deleted.fileno(), 6, 0)],
            "places": [len(os.read(fd, 4)) for fd in self.places[:5]] + [len(os.listdir(self.places[5])) > 1],
            "terminal": os.read(self.terminal, 100).split(),
            "woken": len(self.woken),
        }
        try:
            with open("/tmp/locked") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found["lock"] = "lost"
        except BlockingIOError:
            found["lock"] = "held"
        signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        found["child"] = self.cat.wait(5)
        signal.setitimer(signal.ITIMER_REAL, 0)
        self.shared.unlink()
        return found
'''


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with Daemon() as daemon, pytest.MonkeyPatch.context() as patch:
        patch.setenv("WOODFROG_HOME", str(daemon.home))
        daemon.cli("deploy", str(daemon.program(PROGRAM, "family.py")))
        yield daemon


def thawed(daemon: Daemon, name: str, method: str) -> list[Any]:
    """Answers of the instance that captured, and of two copies."""
    service = woodfrog.Cls.from_name("family", name)()
    answers = [getattr(service, method).remote()]
    until(
        lambda: [s for s in daemon.get("/snapshots")["snapshots"] if s["function"] == name and s["state"] == "ready"],
        20,
    )
    answers += [getattr(service, method).remote() for _ in range(2)]
    modes = [e["line"] for e in daemon.app_log("family") if e["stream"] == "system" and e.get("function") == name]
    assert not [line for line in modes if "failed" in line], modes
    return answers


def test_servers_beside_the_worker(daemon: Daemon) -> None:
    for found in thawed(daemon, "Servers", "ask"):
        first, unix, tcp, web = found["answers"]
        assert first[1:] == ["1", "one"] and unix[1:] == ["2", "two"] and tcp[1:] == ["3", "three"]
        assert web[1] == "/page" and found["printed"] == "served /page\n"
        assert len({first[0], unix[0], tcp[0], web[0]}) == 1  # the very same process
        assert found["alive"] and found["end"] == -15


def test_a_pool_of_processes(daemon: Daemon) -> None:
    for values, same, shared, array in thawed(daemon, "Pool", "work"):
        assert values == [x**2 for x in range(50)]
        assert same, "the pool's processes were replaced"
        assert (shared, array) == (42, [1.0, 2.0])


def test_an_executor_of_spawned_processes(daemon: Daemon) -> None:
    assert thawed(daemon, "Executor", "work") == [[1, 2, 3]] * 3


def test_a_tree_of_processes_and_signals(daemon: Daemon) -> None:
    assert thawed(daemon, "Shell", "use") == [["through\nended\n", True, -9, 7, 5, ["USR1"]]] * 3


def test_what_a_process_can_hold(daemon: Daemon) -> None:
    expected = {
        "tcp": b"frozen+",
        "udp": b"+",
        "pair": b"frozen+",
        "stream": b"+",
        "accepted late": b"+",
        "datagrams": [b"frozen", b"+"],
        "abstract": b"\0abstract",
        "netlink": True,
        "epoll": [True],
        "eventfd": 3,
        "fifo": b"frozen+",
        "inotify": True,
        "timer": True,
        "alarms": True,
        "memfd": [b"frozen", b"frozen"],
        "anonymous": b"frozen",
        "shared memory": [b"frozen", b"frozen"],
        "mapped": [b"FROZENfrozen", b"FROZEN"],
        "deleted": [b"FROzen", b"frozen"],
        "places": [4, 4, 4, 4, 4, True],
        "terminal": [b"echo", b"echo"],
        "woken": 5,
        "lock": "held",
        "child": -9,
    }
    for found in thawed(daemon, "Held", "use"):
        assert found == expected


@pytest.mark.skipif(not hugepages.available(), reason="this machine has no huge pages")
def test_huge_pages_come_back(daemon: Daemon) -> None:
    """In every process of a copy that goes on being called: what was booted is not faster than it."""
    huge = woodfrog.Cls.from_name("family", "Huge")()
    before = huge.first.remote()
    assert before[0] and before[2] and before[1] >= 12 and before[3] >= 12, before

    def back() -> bool:
        """its huge pages, after the freeze and the thaw that came before the first call"""
        here, mine, there, others = huge.look.remote()
        assert here and there
        return mine >= before[1] - 2 and others >= before[3] - 2

    until(back, 60)
    for container in daemon.get("/containers")["containers"]:
        daemon.cli("container", "stop", container["id"])


def test_nothing_is_left_of_them(daemon: Daemon) -> None:
    daemon.wait_idle()
    daemon.stop()
    assert daemon.leaks() == {}
