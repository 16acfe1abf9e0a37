"""Workers that are more than one process: servers, pools and pipes started before the freeze go on after the thaw."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import woodfrog
from e2e.harness import Daemon, until

pytestmark = [pytest.mark.root, pytest.mark.criu]

PROGRAM = r'''
import multiprocessing, os, signal, socket, subprocess, sys, threading, time
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


def power(x):
    return [os.getpid(), x**2]


@app.cls(**ONCE)
class Pool:
    """Worker processes made by fork, their queues and their semaphores."""

    @woodfrog.enter(snap=True)
    def start(self):
        self.pool = multiprocessing.get_context("fork").Pool(2)
        self.before = sorted({pid for pid, _ in self.pool.map(power, range(50), chunksize=1)})
        self.shared = multiprocessing.Value("i", 40)
        self.array = multiprocessing.RawArray("d", [1.0, 2.0])

    @woodfrog.method()
    def work(self):
        found = self.pool.map(power, range(50), chunksize=1)
        with self.shared.get_lock():
            self.shared.value += 2
        alive = sorted(child.pid for child in multiprocessing.active_children())
        self.pool.terminate()
        return [[value for _, value in found], self.before == alive, self.shared.value, list(self.array)]


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
    until(lambda: [s for s in daemon.json("snapshot", "list") if s["function"] == name and s["state"] == "ready"], 20)
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


def test_nothing_is_left_of_them(daemon: Daemon) -> None:
    daemon.wait_idle()
    daemon.stop()
    assert daemon.leaks() == {}
