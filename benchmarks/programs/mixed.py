"""Programs whose visible state is compared before a freeze and after each thaw.

Each class builds some state, looks at it last thing before the freeze (`look`, plain data), and looks again when asked.
`mutate` changes all of it: no later thaw may show a trace of that.
"""

# ruff: noqa: SIM115 - files that stay open are the point

import hashlib
import importlib.util
import os
import random
import resource
import signal
import sqlite3
import stat
import subprocess
import sys
import threading

import woodfrog as modal

app = modal.App("mixed")
ENV = {"SOAK_KEPT": "kept"}
HIGH_FD = 900
"""The worker's own descriptors are above."""
STATUS = (
    "Name", "Umask", "Uid", "Gid", "Groups", "Threads", "SigBlk", "SigIgn", "SigCgt", "CapEff", "NoNewPrivs", "Seccomp",
)  # fmt: skip


def digest(data):
    return hashlib.blake2b(data, digest_size=12).hexdigest()


def read(path):
    with open(path) as f:
        return f.read()


def fields(path):
    """The lines `name:<tab>value` of a file in /proc."""
    return {k: v.strip() for k, found, v in (line.partition(":\t") for line in read(path).splitlines()) if found}


def descriptors(pid="self"):
    found = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{name}")
            info = fields(f"/proc/{pid}/fdinfo/{name}")
        except OSError:
            continue  # the listing's own
        if int(name) < HIGH_FD and not target.startswith("/proc/"):
            # Numbers of sockets and pipes are the kernel's.
            found[name] = [target.partition(":[")[0], info["pos"], info["flags"]]
    return found


def status(pid="self"):
    lines = fields(f"/proc/{pid}/status")
    return {k: lines[k] for k in STATUS}


def children():
    return sorted(int(p) for t in os.listdir("/proc/self/task") for p in read(f"/proc/self/task/{t}/children").split())


def process():
    """What any process shows of itself."""
    return {
        "pid": os.getpid(),
        "session": [os.getsid(0), os.getpgrp(), os.getppid()],
        "cwd": os.getcwd(),
        "argv": sys.argv,
        "environment": {k: os.environ.get(k) for k in (*ENV, "HOME", "PATH", "LANG")},
        "status": status(),
        "limits": [resource.getrlimit(n) for n in range(16)],
        "handlers": {int(s): repr(signal.getsignal(s)) for s in signal.valid_signals()},
        "descriptors": descriptors(),
        "threads": sorted(t.name for t in threading.enumerate()),
        "children": children(),
        "nice": os.nice(0),
        "timer_runs": signal.getitimer(signal.ITIMER_REAL)[0] > 0,
    }


class Soaked:
    """Builds, looks before the freeze, looks after the thaw."""

    def freeze(self):
        self.build()
        modal.register_before_snapshot(self.remember)

    def remember(self):
        self.before = self.see()

    def compare(self):
        return self.before, self.see()

    def see(self):
        # First what opens files: SQLite keeps descriptors of files that are locked through another one.
        return {**self.look(), **process()}


@app.cls(enable_memory_snapshot=True, env=ENV)
class Arrays(Soaked):
    def build(self):
        import numpy as np

        self.generator = np.random.default_rng(3)
        self.values = self.generator.standard_normal((512, 1024))
        self.view = self.values[::7, ::3]
        self.mapped = np.memmap("/tmp/mapped.bin", dtype="f8", mode="w+", shape=4096)
        self.mapped[:] = np.arange(4096)
        self.mapped.flush()

    def look(self):
        return {
            "values": digest(self.values.tobytes()),
            "view": digest(self.view.tobytes()),
            "mapped": digest(self.mapped.tobytes()),
            "file": digest(open("/tmp/mapped.bin", "rb").read()),
            "generator": repr(self.generator.bit_generator.state),
            "product": digest((self.values @ self.values.T).tobytes()),
        }

    @modal.enter(snap=True)
    def start(self):
        self.freeze()

    @modal.method()
    def check(self):
        return self.compare()

    @modal.method()
    def mutate(self):
        self.values += 1
        self.mapped[:] = 0
        self.mapped.flush()
        self.generator.random(10)


@app.cls(enable_memory_snapshot=True, env=ENV)
class Files(Soaked):
    def build(self):
        os.makedirs("/tmp/tree/deep")
        os.umask(0o027)
        for i in range(20):
            with open(f"/tmp/tree/deep/{i}", "w") as f:
                f.write("x" * i * 100)
        os.symlink("deep", "/tmp/tree/link")
        os.unlink("/tmp/tree/deep/7")
        self.open = open("/tmp/tree/open", "w+")
        self.open.write("0123456789" * 100)
        self.open.flush()
        self.open.seek(123)
        self.append = open("/tmp/tree/append", "a")
        self.append.write("first\n")
        self.append.flush()
        self.gone = open("/tmp/tree/gone", "w+b")
        self.gone.write(b"deleted but open" * 1000)
        self.gone.seek(32)
        os.unlink("/tmp/tree/gone")
        self.shared = open("/dev/shm/soak", "w+b")
        self.shared.write(random.Random(1).randbytes(100_000))
        self.shared.flush()
        self.pipe = os.pipe()
        os.write(self.pipe[1], b"in the pipe")
        self.twin = os.dup(self.open.fileno())
        os.chdir("/tmp/tree")
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 1000), hard))
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGUSR2, on_signal)
        signal.setitimer(signal.ITIMER_REAL, 100_000)

    def look(self):
        tree = {}
        for folder, folders, files in os.walk("/tmp/tree"):
            for name in (*folders, *files):
                path = f"{folder}/{name}"
                info = os.lstat(path)
                # A directory's size is its file system's affair.
                size = None if stat.S_ISDIR(info.st_mode) else info.st_size
                tree[path] = [oct(info.st_mode), size, info.st_uid, info.st_mtime_ns]
        at = self.gone.tell()
        self.gone.seek(0)
        gone = digest(self.gone.read())
        self.gone.seek(at)
        waiting = os.read(self.pipe[0], 100)
        os.write(self.pipe[1], waiting)
        with open("/tmp/tree/append") as f:
            appended = f.read()
        with open("/dev/shm/soak", "rb") as f:
            shared = digest(f.read())
        return {
            "tree": tree, "gone": gone, "pipe": waiting.decode(), "append": appended, "shared": shared,
            "offset": os.lseek(self.twin, 0, os.SEEK_CUR),
        }  # fmt: skip

    @modal.enter(snap=True)
    def start(self):
        self.freeze()

    @modal.method()
    def check(self):
        return self.compare()

    @modal.method()
    def mutate(self):
        self.open.write("mutated")
        self.append.write("mutated\n")
        self.append.flush()
        self.gone.write(b"mutated")
        self.shared.seek(0)
        self.shared.write(b"mutated")
        self.shared.flush()
        os.read(self.pipe[0], 100)
        os.unlink("/tmp/tree/deep/3")
        open("/tmp/tree/new", "w").close()


def on_signal(number, frame):
    """A handler that must still be set after the thaw."""


@app.cls(enable_memory_snapshot=True, env=ENV)
class Database(Soaked):
    def build(self):
        self.db = sqlite3.connect("/tmp/soak.sqlite", isolation_level=None)
        self.db.execute("PRAGMA journal_mode=WAL")
        self.db.execute("CREATE TABLE t (k INTEGER PRIMARY KEY, v TEXT)")
        self.db.executemany("INSERT INTO t VALUES (?, ?)", ((i, f"row {i}") for i in range(1000)))
        self.memory = sqlite3.connect(":memory:")
        self.memory.execute("CREATE TABLE m (v)")
        self.memory.executemany("INSERT INTO m VALUES (?)", ((i,) for i in range(500)))
        self.db.execute("BEGIN")
        self.db.execute("INSERT INTO t VALUES (5000, 'not committed')")

    def look(self):
        other = sqlite3.connect("file:/tmp/soak.sqlite?mode=ro", uri=True)
        try:
            seen = other.execute("SELECT count(*), sum(k) FROM t").fetchall()
        finally:
            other.close()
        return {
            "rows": digest(repr(self.db.execute("SELECT * FROM t ORDER BY k").fetchall()).encode()),
            "seen_by_others": seen,
            "transaction": self.db.in_transaction,
            "memory": self.memory.execute("SELECT count(*), sum(v) FROM m").fetchall(),
            "integrity": self.db.execute("PRAGMA integrity_check").fetchall(),
        }

    @modal.enter(snap=True)
    def start(self):
        self.freeze()

    @modal.method()
    def check(self):
        return self.compare()

    @modal.method()
    def mutate(self):
        self.db.execute("COMMIT")
        self.db.execute("DELETE FROM t WHERE k < 500")
        self.memory.execute("DELETE FROM m")


@app.cls(enable_memory_snapshot=True, env=ENV)
class Threads(Soaked):
    def build(self):
        self.lock, self.wake = threading.Lock(), threading.Condition()
        self.turn, self.counts = 0, [0] * 6
        for i in range(6):
            threading.Thread(target=self.serve, args=(i,), name=f"soak-{i}", daemon=True).start()
        self.everybody()

    def serve(self, i):
        local = threading.local()
        local.seen = 0
        while True:
            with self.wake:
                self.wake.wait_for(lambda: self.turn > local.seen)
                local.seen += 1
                self.counts[i] += 1
                self.wake.notify_all()

    def everybody(self):
        with self.wake:
            self.turn += 1
            self.wake.notify_all()
            if not self.wake.wait_for(lambda: min(self.counts) == self.turn, timeout=10):
                raise RuntimeError(f"threads do not answer: {self.counts}")

    def look(self):
        natives = {t.native_id for t in threading.enumerate()}
        return {
            "counts": list(self.counts),
            "natives": sorted(natives) == sorted(int(t) for t in os.listdir("/proc/self/task")),
            "ids": sorted(natives),
        }

    @modal.enter(snap=True)
    def start(self):
        self.freeze()

    @modal.method()
    def check(self):
        found = self.compare()
        self.everybody()
        return found

    @modal.method()
    def mutate(self):
        self.everybody()


SERVER = """
import hashlib, os, sys
memory, asked = bytearray(range(256)) * 4096, 0
scratch = open("/tmp/server-scratch", "w+")
scratch.write("server"); scratch.flush()
for line in sys.stdin:
    if line == "mutate\\n":
        memory[0] = 255
        asked += 1
    print(os.getpid(), os.getcwd(), asked, scratch.tell(), hashlib.sha256(memory).hexdigest(), flush=True)
"""


@app.cls(enable_memory_snapshot=True, env=ENV)
class Processes(Soaked):
    def build(self):
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/tmp"
        )
        self.sleeper = subprocess.Popen(["sleep", "1000000"])
        self.ask("look")

    def ask(self, what):
        self.server.stdin.write(what + "\n")
        self.server.stdin.flush()
        return self.server.stdout.readline()

    def look(self):
        return {
            "answer": self.ask("look"),
            "alive": [self.server.poll(), self.sleeper.poll()],
            "status_of": {p: status(p) for p in children()},
            "descriptors_of": {p: descriptors(p) for p in children()},
            "command": {p: read(f"/proc/{p}/cmdline") for p in children()},
        }

    @modal.enter(snap=True)
    def start(self):
        self.freeze()

    @modal.method()
    def check(self):
        return self.compare()

    @modal.method()
    def mutate(self):
        self.ask("mutate")
        self.sleeper.kill()
        self.sleeper.wait()


@app.cls(enable_memory_snapshot=True, env=ENV)
class Torch(Soaked):
    def build(self):
        import torch

        self.generator = torch.Generator().manual_seed(5)
        self.model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.ReLU(), torch.nn.Linear(512, 16))
        for parameter in self.model.parameters():
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=self.generator))
        self.data = torch.randn((64, 256), generator=self.generator)
        with torch.no_grad():
            self.model(self.data)

    def look(self):
        import torch

        with torch.no_grad():
            out = self.model(self.data)
        return {
            "weights": digest(b"".join(p.detach().numpy().tobytes() for p in self.model.parameters())),
            "out": digest(out.numpy().tobytes()),
            "generator": digest(self.generator.get_state().numpy().tobytes()),
            "settings": [torch.get_num_threads(), torch.is_grad_enabled(), str(torch.get_default_dtype())],
        }

    @modal.enter(snap=True)
    def start(self):
        self.freeze()

    @modal.method()
    def check(self):
        return self.compare()

    @modal.method()
    def mutate(self):
        import torch

        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(1)
        torch.rand(3, generator=self.generator)


NEEDS = {"Arrays": "numpy", "Torch": "torch"}
CLASSES = [
    n for n in ("Arrays", "Files", "Database", "Threads", "Processes", "Torch")
    if n not in NEEDS or importlib.util.find_spec(NEEDS[n])
]  # fmt: skip
