"""The worker as a real process, driven over its real socket."""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

import woodfrog
from woodfrog import protocol

PACKAGE_ROOT = str(Path(woodfrog.__file__).parent.parent)
MARK = textwrap.dedent(
    """
    def enter(snap=False):
        return lambda f: (setattr(f, "__woodfrog_role__", {"kind": "enter", "snap": snap}), f)[1]
    def exit(f):
        f.__woodfrog_role__ = {"kind": "exit"}
        return f
    """
)


class Worker:
    def __init__(self, root: Path, source: str) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.root = root
        (root / "prog.py").write_text(MARK + textwrap.dedent(source))
        self.path = root / "w.sock"
        env = {
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
            "PYTHONPATH": PACKAGE_ROOT,
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        self.stdout, self.stderr = root / "stdout", root / "stderr"
        with self.stdout.open("wb") as out, self.stderr.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "woodfrog.worker", "--socket", str(self.path)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=env,
                cwd="/",
            )
        self.calls = 0
        self.connect()

    def connect(self) -> None:
        deadline = time.monotonic() + 20
        while True:
            self.conn = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                self.conn.connect(str(self.path))
                break
            except (FileNotFoundError, ConnectionRefusedError):
                self.conn.close()
                if time.monotonic() > deadline or self.process.poll() is not None:
                    raise
                time.sleep(0.01)
        self.conn.settimeout(60)

    def send(self, header: dict[str, Any], body: bytes = b"") -> None:
        self.conn.sendall(protocol.pack(header, len(body)))
        if body:
            self.conn.sendall(body)

    def read(self, size: int) -> bytes:
        data = bytearray(size)
        view, at = memoryview(data), 0
        while at < size:
            count = self.conn.recv_into(view[at:])
            if not count:
                raise EOFError
            at += count
        return bytes(data)

    def receive(self) -> tuple[dict[str, Any], bytes]:
        header_len, body_len = protocol.parse_head(self.read(protocol.HEAD.size))
        return protocol.parse_header(self.read(header_len)), self.read(body_len)

    def ask(self, header: dict[str, Any], body: bytes = b"") -> tuple[dict[str, Any], bytes]:
        self.send(header, body)
        return self.receive()

    def boot(
        self,
        name: str,
        *,
        kind: str = "function",
        methods: tuple[str, ...] = (),
        generators: tuple[str, ...] = (),
        params: bytes = b"",
        blob: bytes = b"",
        **changes: Any,
    ) -> dict[str, Any]:
        names = methods or (name,)
        message = protocol.BootMessage(
            app="app",
            tag=name,
            kind=kind,
            source_kind="serialized" if blob else "module",
            module="prog",
            qualname=name,
            methods=[{"name": n, "generator": n in generators, "is_async": False} for n in names],
            **{
                "sys_path": [str(self.root), *[p for p in sys.path if p]],
                "env": {"PATH": os.environ["PATH"], "PLACE": "boot"},
                "cwd": str(self.root),
                **changes,
            },
            has_params=bool(params),
            params_len=len(params),
            blob_len=len(blob),
        )
        return self.ask(message.header(), params + blob)[0]

    def start(self, *, restored: bool = False, **changes: Any) -> dict[str, Any]:
        context = protocol.StartContext(
            **{
                "instance_id": "i-1",
                "hostname": "host",
                "restored": restored,
                "snapshot_id": "s-1" if restored else None,
                "entropy": os.urandom(64).hex(),
                "wall_clock": time.time(),
                "env": {"PATH": os.environ["PATH"], "PLACE": "start"},
                **changes,
            }
        )
        return self.ask(context.header())[0]

    def serve(self, name: str, **kwargs: Any) -> Worker:
        assert self.boot(name, **kwargs)["type"] == "booted"
        assert self.start()["type"] == "ready"
        return self

    def freeze(self) -> dict[str, Any]:
        header = self.ask({"type": "freeze"})[0]
        if header["type"] == "frozen":
            with pytest.raises(EOFError):
                self.read(1)
            self.conn.close()
            self.connect()
        return header

    def raw_call(self, method: str, data: bytes, encoding: str = "pickle") -> tuple[dict[str, Any], bytes]:
        self.calls += 1
        header, body = self.ask(
            {"type": "call", "call": f"c{self.calls}", "method": method, "encoding": encoding}, data
        )
        assert header["call"] == f"c{self.calls}"
        return header, body

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        header, body = self.raw_call(method, cloudpickle.dumps((args, kwargs)))
        if header["type"] == "error":
            raise Failed(header["error"], pickle.loads(body))
        assert header["type"] == "result", header
        return pickle.loads(body)

    def err(self) -> str:
        return self.stderr.read_text()

    def close(self) -> None:
        self.conn.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(20)


class Failed(Exception):
    def __init__(self, plain: dict[str, str], body: dict[str, Any]) -> None:
        super().__init__(plain)
        self.plain = plain
        self.body = body

    @property
    def exception(self) -> BaseException:
        return pickle.loads(self.body["exception"])[0]


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Callable[[str], Worker]]:
    made: list[Worker] = []

    def make(source: str) -> Worker:
        made.append(Worker(tmp_path / f"w{len(made)}", source))
        return made[-1]

    yield make
    for w in made:
        w.close()


def test_function_from_boot_to_stop(worker: Callable[[str], Worker]) -> None:
    w = worker(
        """
        import os, sys
        print("importing", os.environ["PLACE"])
        def square(x, *, plus=0):
            print("called", os.environ["PLACE"], os.getcwd() == sys.path[0], sys.argv)
            return x * x + plus
        """
    )
    assert stat.S_IMODE(w.path.stat().st_mode) == 0o600
    assert w.ask({"type": "ping"})[0] == {"type": "pong"}
    booted = w.boot("square", argv=["prog.py", "-v"])
    assert booted["type"] == "booted" and set(booted["phases"]) == {"import"}
    ready = w.start()
    assert ready["type"] == "ready" and ready["warnings"] == []
    assert w.call("square", 7, plus=1) == 50
    assert w.stdout.read_text() == "importing boot\ncalled start True ['prog.py', '-v']\n"
    assert w.ask({"type": "stop"})[0] == {"type": "stopped"}
    assert w.process.wait(20) == 0
    assert w.err() == ""


SURROUNDINGS = """
    import os, random, sys
    import first, second.part
    drawn = random.random()
    def look(x):
        return {
            "argv": sys.argv, "path": sys.path, "cwd": os.getcwd(), "env": dict(os.environ), "drawn": drawn,
            "order": [m for m in sys.modules if m.partition(".")[0] in ("first", "second", "prog")],
            "seen": [first.SEEN, second.part.lazy()],
        }
"""


def test_a_preloaded_worker_is_as_a_plain_start_would_have_it(worker: Callable[[str], Worker], tmp_path: Path) -> None:
    site = tmp_path / "site"
    (site / "second").mkdir(parents=True)
    (site / "first.py").write_text(
        "import os, random, sys\n"
        "SEEN = [os.getcwd() == sys.path[0] or os.getcwd(), sys.argv, os.environ['PLACE'], os.environ.get('ONE')]\n"
        "random.random()\nos.environ['LEFT'] = 'by an import'\nsys.path.append('/appended')\nprint('imported')\n"
        "try:\n    import maybe\nexcept ImportError: pass\n"
    )
    (site / "second" / "__init__.py").write_text("")
    (site / "second" / "part.py").write_text("def lazy(): return 1")
    answers = []
    for mode in ("plain", "zygote", "zygote"):
        w = worker(SURROUNDINGS)
        env = {"PATH": os.environ["PATH"], "PLACE": "boot"}
        common: dict[str, Any] = {"cwd": "/tmp", "argv": ["a", "b"]}
        paths = [p for p in sys.path if p]
        if mode != "plain":
            steps = ["first", "second", "second:part", "second.part", "second:part"]
            message = protocol.PreloadMessage(steps, [str(site), *paths], env, **common)
            preloaded = w.ask(message.header())[0]
            assert preloaded["type"] == "preloaded" and set(preloaded["phases"]) == {"preload"}
            assert {"first", "second", "maybe"} <= set(preloaded["seen"]) and "prog" not in preloaded["seen"]
            assert str(site / "second" / "part.py") in preloaded["files"] and preloaded["cpu_ms"] > 0
            assert preloaded["steps"] == ["first", "second", "second:part", "(second.part)", "(second:part)"]
            assert w.freeze()["type"] == "frozen"
        entropy = os.urandom(64).hex() if mode == "zygote" else ""
        sys_path = [str(w.root), str(site), *paths]
        booted = w.boot("look", sys_path=sys_path, env={**env, "ONE": "own"}, entropy=entropy, **common)
        assert booted["type"] == "booted"
        assert w.freeze()["type"] == "frozen"
        assert w.start(restored=True, env={**env, "ONE": "own"})["type"] == "ready"
        answer = w.call("look", 1)
        answer["path"].remove(str(w.root))
        answers.append(answer)
        assert w.stdout.read_text() == "imported\n" and w.err() == ""
    assert len({a.pop("drawn") for a in answers}) == 3
    plain, *others = answers
    assert plain["seen"][0] == ["/tmp", ["a", "b"], "boot", "own"]
    assert plain["path"][-1] == "/appended"
    for other in others:
        # A zygote does not know what is for one instance alone, and a program's name comes after what it imports.
        assert other["seen"][0] == ["/tmp", ["a", "b"], "boot", None]
        assert [m for m in other["order"] if m != "prog"] == [m for m in plain["order"] if m != "prog"]
        for key in ("argv", "path", "cwd", "env"):
            assert other[key] == plain[key]


@pytest.mark.parametrize(
    "source", ["raise ValueError('broken')", "import sys; sys.path.reverse()", "import os; os.chdir('/')", "1 +"]
)
def test_a_preload_that_fails_says_nothing_to_the_user(
    worker: Callable[[str], Worker], tmp_path: Path, source: str
) -> None:
    (tmp_path / "faulty.py").write_text(source)
    w = worker("")
    message = protocol.PreloadMessage(["faulty"], [str(tmp_path), *filter(None, sys.path)], {}, cwd="/tmp")
    failed = w.ask(message.header())[0]
    assert (failed["type"], failed["stage"]) == ("failed", "preload")
    assert w.process.wait(20) == 1
    assert w.err() == ""


@pytest.mark.parametrize(("opens", "left"), [("pass", 1), ("kept = open(os.devnull)", 0)])
def test_old_garbage_goes_before_a_freeze_where_descriptors_may_be_in_it(
    worker: Callable[[str], Worker], opens: str, left: int
) -> None:
    w = worker(
        f"""
        import gc, os
        {opens}
        class Ring: pass
        gc.disable()
        ring = Ring()
        ring.ring = ring
        gc.collect()  # now it is old
        del ring
        def rings(): return sum(type(o) is Ring for o in gc.get_objects())
        """
    )
    w.boot("rings", snapshot=True)
    w.freeze()
    w.start(restored=False)
    assert w.call("rings") == left


def test_class_hooks_run_in_order_around_a_freeze(worker: Callable[[str], Worker]) -> None:
    w = worker(
        """
        import asyncio, woodfrog.sdk.hooks as hooks
        log = []
        class Base:
            @enter(snap=True)
            def load(self): log.append("base load")
            @enter(snap=True)
            def replaced(self): log.append("never")
            @exit
            def bye(self): print("bye")
        class Model(Base):
            def __init__(self, size=1): log.append(f"init {size}")
            @enter(snap=False)
            async def late(self):
                await asyncio.sleep(0); log.append(f"late {hooks.restored()} {hooks.snapshot_id()}")
            @enter(snap=True)
            def warm(self): log.append(f"warm {hooks.restored()}")
            @enter(snap=True)
            def replaced(self): log.append("replaced")
            async def log_async(self):
                await asyncio.sleep(0); return log
            def twice(self, x): return 2 * x
        hooks.register_before_snapshot(lambda: log.append("before 1"))
        @hooks.register_before_snapshot
        async def before(): log.append("before 2")
        hooks.register_after_restore(lambda: log.append("after 1"))
        hooks.register_after_restore(lambda: log.append("after 2"))
        """
    )
    params = cloudpickle.dumps(((), {"size": 3}))
    booted = w.boot("Model", kind="class", methods=("log_async", "twice"), params=params, snapshot=True)
    assert set(booted["phases"]) == {"import", "construct", "enter"}
    assert set(w.freeze()["phases"]) == {"before_snapshot", "preload", "prepare", "collect", "trim", "join_code"}
    ready = w.start(restored=True)
    assert {"reseed", "reseed.random", "after_restore", "enter_restore"} <= set(ready["phases"])
    assert w.call("log_async") == [
        "init 3", "base load", "replaced", "warm False", "before 2", "before 1", "after 1", "after 2", "late True s-1"
    ]  # fmt: skip
    assert w.call("twice", 4) == 8
    assert w.ask({"type": "stop"})[0]["type"] == "stopped"
    assert w.process.wait(20) == 0
    assert w.stdout.read_text() == "bye\n"


def test_frozen_worker_holds_nothing_but_its_listener(worker: Callable[[str], Worker]) -> None:
    w = worker("def f(): return 1")
    w.boot("f", snapshot=True)
    header = w.ask({"type": "freeze"})[0]
    assert header["type"] == "frozen"
    with pytest.raises(EOFError):
        w.read(1)
    process = f"/proc/{w.process.pid}"
    fds = {int(fd): os.readlink(f"{process}/fd/{fd}") for fd in os.listdir(f"{process}/fd")}
    # Newer libffi keeps its own library open, from when ctypes is loaded.
    extra = {fd: target for fd, target in fds.items() if fd > 2 and "/libffi" not in target}
    assert len(extra) == 1 and min(extra) > 900 and next(iter(extra.values())).startswith("socket:")
    assert len(os.listdir(f"{process}/task")) == 1
    w.connect()
    w.conn.close()  # A visitor that says nothing changes nothing.
    w.connect()
    assert w.start(restored=True)["type"] == "ready"
    assert w.call("f") == 1


@pytest.mark.parametrize(
    ("source", "boot", "stage", "text"),
    [
        ("1/0", {}, "import", "ZeroDivisionError"),
        ("def f(:", {}, "import", "SyntaxError"),
        ("import sys; sys.exit(3)", {}, "import", "SystemExit"),
        ("g = 1", {}, "import", "module prog has no 'f'"),
        ("f = 3", {}, "import", "is a int"),
        ("def f(): pass", {"cwd": "/proc/nonexistent"}, "import", "working directory /proc/nonexistent"),
        ("class f:\n    def __init__(self): raise KeyError('k')", {"kind": "class"}, "enter", "KeyError: 'k'"),
        (
            "class f:\n    @enter(snap=True)\n    def e(self): raise OSError('no')",
            {"kind": "class"},
            "enter",
            "OSError",
        ),
    ],
)
def test_failed_boot(worker: Callable[[str], Worker], source: str, boot: dict[str, Any], stage: str, text: str) -> None:
    w = worker(source)
    header = w.boot("f", snapshot=True, **boot)
    assert (header["type"], header["stage"]) == ("failed", stage)
    assert text in header["error"]["traceback"]
    assert "woodfrog/worker" not in header["error"]["traceback"] and "importlib" not in header["error"]["traceback"]
    assert w.process.wait(20) == 1
    assert text not in w.err()  # the daemon tells it in the log, once


@pytest.mark.parametrize("stage", ["before-snapshot", "after-restore", "enter-restore", "exit"])
def test_failed_hooks(worker: Callable[[str], Worker], stage: str) -> None:
    w = worker(
        f"""
        import woodfrog.sdk.hooks as hooks
        def at(stage):
            if stage == {stage!r}: raise ValueError("at " + stage)
        hooks.register_before_snapshot(lambda: at("before-snapshot"))
        hooks.register_after_restore(lambda: at("after-restore"))
        class C:
            @enter(snap=False)
            def late(self): at("enter-restore")
            @exit
            def end(self): at("exit")
        """
    )
    w.boot("C", kind="class", snapshot=True)
    header = w.freeze()
    if stage != "before-snapshot":
        header = w.start(restored=True)
    if stage == "exit":
        header = w.ask({"type": "stop"})[0]
    assert (header["type"], header["stage"]) == ("failed", stage)
    assert (header["error"]["type"], header["error"]["message"]) == ("ValueError", "at " + stage)
    assert w.process.wait(20) == 1


def test_cold_start_runs_both_enters_and_no_snapshot_hooks(worker: Callable[[str], Worker]) -> None:
    w = worker(
        """
        import random, woodfrog.sdk.hooks as hooks
        log = []
        hooks.register_after_restore(lambda: log.append("after"))
        random.seed(1)
        class C:
            @enter(snap=False)
            def late(self): log.append("late")
            @enter(snap=True)
            def early(self): log.append("early")
            def get(self): return log, random.random()
        """
    )
    w.serve("C", kind="class", methods=("get",))
    assert w.call("get") == (["early", "late"], 0.13436424411240122)


def test_remote_exceptions_keep_type_chain_notes_and_text(worker: Callable[[str], Worker]) -> None:
    w = worker(
        """
        class Odd(Exception):
            def __init__(self, a, b): super().__init__(f"{a} and {b}")
        class Mute(Exception):
            def __str__(self): raise RuntimeError("no")
        def inner(): return {}["missing"]
        def f(what):
            if what == "chain":
                try: inner()
                except KeyError as e:
                    e.add_note("a note")
                    raise ValueError("outer") from e
            if what == "odd": raise Odd(1, 2)
            if what == "mute": raise Mute
            if what == "exit": raise SystemExit(4)
            if what == "interrupt": raise KeyboardInterrupt
            if what == "lock":
                import threading
                raise RuntimeError(threading.Lock())
            if what == "deep": return f(what)
            return what
        """
    )
    w.serve("f")
    with pytest.raises(Failed) as caught:
        w.call("f", "chain")
    exception, links = pickle.loads(caught.value.body["exception"])
    assert type(exception) is ValueError and exception.args == ("outer",)
    assert [(type(e), kind) for e, kind in links] == [(KeyError, "cause")]
    assert links[0][0].__notes__ == ["a note"]
    text = caught.value.plain["traceback"]
    assert "a note" in text and "inner()" in text and "direct cause" in text and "woodfrog/worker" not in text
    for what, kind, message in [
        ("odd", "prog.Odd", "1 and 2"),
        ("mute", "prog.Mute", "<its message failed: RuntimeError>"),
        ("exit", "SystemExit", "4"),
        ("interrupt", "KeyboardInterrupt", ""),
        ("deep", "RecursionError", "maximum recursion depth exceeded"),
    ]:
        with pytest.raises(Failed) as caught:
            w.call("f", what)
        assert caught.value.plain["type"] == kind
        assert caught.value.plain["message"].startswith(message)
    with pytest.raises(Failed) as caught:
        w.call("f", "lock")
    assert caught.value.body["exception"] is None and "_thread.lock" in caught.value.plain["message"]
    with pytest.raises(Failed, match="positional argument"):
        w.call("f")
    assert w.call("f", "alive") == "alive"


def test_unpicklable_results_unknown_methods_and_bad_arguments(worker: Callable[[str], Worker]) -> None:
    w = worker(
        """
        import threading
        kinds = {"lock": threading.Lock, "gen": lambda: (i for i in "ab"), "fn": lambda: (lambda: 5)}
        def f(kind): return kinds[kind]()
        """
    ).serve("f")
    with pytest.raises(Failed, match=r"f\(\) returned _thread.lock, which cannot be pickled") as caught:
        w.call("f", "lock")
    assert caught.value.plain["type"] == "woodfrog.errors.SerializationError"
    assert isinstance(caught.value.exception, woodfrog.errors.SerializationError)
    with pytest.raises(Failed, match="remote_gen"):
        w.call("f", "gen")
    assert w.call("f", "fn")() == 5
    with pytest.raises(Failed, match="f has no method 'g'; it has: f"):
        w.call("g")
    header, _ = w.raw_call("f", b"junk")
    assert header["type"] == "error" and "the arguments of f() cannot be read here" in header["error"]["message"]


def test_json(worker: Callable[[str], Worker]) -> None:
    w = worker(
        """
        def f(x=0, y=1):
            if x == "set": return {1}
            if x == "nan": return float("nan")
            if x == "raise": raise ValueError("no")
            return [x, y]
        """
    ).serve("f")

    def call(text: str) -> tuple[str, Any]:
        header, body = w.raw_call("f", text.encode(), "json")
        return header["type"], json.loads(body)

    assert call("[1, 2]") == ("result", [1, 2])
    assert call('{"y": 5}') == ("result", [0, 5])
    assert call('"a"') == ("result", ["a", 1])
    assert call("") == ("result", [0, 1])
    for bad in ('"set"', '"nan"'):
        kind, error = call(bad)
        assert kind == "error" and "is not JSON" in error["message"]
    assert call('"raise"')[1]["type"] == "ValueError"
    assert "cannot be read" in call("{")[1]["message"]


@pytest.mark.parametrize("prefix", ["", "async "])
def test_generators_stream(worker: Callable[[str], Worker], prefix: str) -> None:
    w = worker(
        f"""
        closed = []
        {prefix}def count(n, fail=False):
            try:
                for i in range(n): yield {{"i": i}}
                if fail: raise ValueError("in the middle")
            finally:
                closed.append(n)
        """
    ).serve("count", generators=("count",))
    for fail in (False, True):
        header, body = w.raw_call("count", cloudpickle.dumps(((3, fail), {})))
        for i in range(3):
            assert header["type"] == "item" and pickle.loads(body) == {"i": i}
            header, body = w.receive()
        assert header["type"] == ("error" if fail else "done")
        assert fail or header["items"] == 3


@pytest.mark.parametrize("prefix", ["", "async "])
def test_a_generator_is_closed_where_it_stands(worker: Callable[[str], Worker], prefix: str) -> None:
    """Its blocks end, the worker serves on; and a close that comes late, or for another call, closes nothing."""
    w = worker(
        f"""
        import time
        ended = []
        {prefix}def count(raises):
            try:
                while True:
                    yield ended
                    time.sleep(0.01)
            finally:
                ended.append("closed")
                if raises: raise ValueError("at the end")
        """
    ).serve("count", generators=("count",))
    call = {"type": "call", "method": "count", "encoding": "pickle"}

    def to_the_end(name: str) -> dict[str, Any]:
        header = w.receive()[0]
        while header["type"] == "item":
            header = w.receive()[0]
        assert header["call"] == name
        return header

    w.send({**call, "call": "a"}, pickle.dumps(((False,), {})))
    assert pickle.loads(w.receive()[1]) == []
    w.send({"type": "close", "call": "before"})
    assert [w.receive()[0]["type"] for _ in range(5)] == ["item"] * 5
    w.send({"type": "close", "call": "a"})
    assert to_the_end("a")["type"] == "done"
    w.send({"type": "close", "call": "a"})
    w.send({**call, "call": "b"}, pickle.dumps(((True,), {})))
    assert pickle.loads(w.receive()[1]) == ["closed"]
    w.send({"type": "close", "call": "b"})
    assert to_the_end("b")["error"]["message"] == "at the end"
    assert w.ask({"type": "ping"})[0]["type"] == "pong"
    assert w.err() == ""


def test_a_child_forked_in_a_generator_leaves(worker: Callable[[str], Worker]) -> None:
    w = worker(
        """
        import os
        def f():
            pid = os.fork()
            if pid == 0: yield "child"
            else: yield os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        """
    ).serve("f", generators=("f",))
    assert pickle.loads(w.raw_call("f", pickle.dumps(((), {})))[1]) == 0
    assert w.receive()[0]["type"] == "done" and w.err() == ""


def test_a_loop_has_heard_of_closed_connections_before_the_first_call(worker: Callable[[str], Worker]) -> None:
    """One to the outside reads as ended after a thaw; a session must not hand it out once more."""
    w = worker(
        """
        import asyncio, socket
        import woodfrog.sdk.hooks as hooks
        near, far = socket.socketpair()
        class Client:
            @enter(snap=True)
            async def connect(self): self.reader, self.writer = await asyncio.open_connection(sock=near)
            async def ended(self): return self.reader.at_eof()
        hooks.register_before_snapshot(far.close)
        """
    )
    w.boot("Client", kind="class", methods=("ended",), snapshot=True)
    w.freeze()
    assert "notice" in w.start(restored=True)["phases"]
    assert w.call("ended") is True


def test_async_calls_share_one_event_loop(worker: Callable[[str], Worker]) -> None:
    w = worker(
        """
        import asyncio
        loops, done = [], []
        async def background():
            await asyncio.sleep(0.01); done.append(1)
        async def f():
            loops.append(asyncio.get_running_loop())
            if len(loops) == 1: asyncio.create_task(background())
            else: await asyncio.sleep(0.05)
            return len(set(loops)), len(done)
        """
    ).serve("f")
    assert w.call("f") == (1, 0)
    assert w.call("f") == (1, 1)
    assert w.ask({"type": "stop"})[0]["type"] == "stopped"
    assert w.process.wait(20) == 0 and w.err() == ""


def test_large_results_and_arguments_are_not_copied(worker: Callable[[str], Worker]) -> None:
    w = worker(
        """
        import resource
        def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        def f(data, n):
            before = peak()
            return bytes(n) if n else (len(data), before)
        def g(): return peak()
        """
    ).serve("f", methods=("f",))
    size = 200 << 20
    _, before = w.call("f", b"", 0)
    assert len(w.call("f", b"", size)) == size
    after = w.call("f", b"", 0)[1]
    assert after - before < 215
    assert w.call("f", bytes(size), 0)[0] == size


def test_serialized_function_and_class(worker: Callable[[str], Worker]) -> None:
    def add(a: int, b: int) -> int:
        return a + b

    class Counter:
        def __init__(self, start: int) -> None:
            self.n = start

        def up(self) -> int:
            self.n += 1
            return self.n

    add.__module__ = Counter.__module__ = "__main__"
    w = worker("").serve("add", blob=cloudpickle.dumps(add))
    assert w.call("add", 2, 3) == 5
    w = worker("")
    w.serve(
        "Counter", kind="class", methods=("up",), blob=cloudpickle.dumps(Counter), params=cloudpickle.dumps(((5,), {}))
    )
    assert [w.call("up"), w.call("up")] == [6, 7]


def test_handles_and_markers_are_unwrapped(worker: Callable[[str], Worker]) -> None:
    w = worker(
        """
        class Marker:
            def __init__(self, f, **role): self.raw_f = f; self.__woodfrog_role__ = role
            def __get__(self, instance, owner=None): return self.raw_f.__get__(instance, owner)
        class Raw:
            @staticmethod
            def plus(x): return x + 1
            e = Marker(lambda self: setattr(self, "ready", 1), kind="enter", snap=True)
            run = Marker(lambda self, x: self.plus(x) + self.ready, kind="method")
        class Handle:
            __woodfrog_wrapped__ = Raw
        Model = Handle()
        """
    ).serve("Model", kind="class", methods=("run", "plus"))
    assert w.call("run", 1) == 3
    assert w.call("plus", 1) == 2


def test_user_code_that_forks_closes_and_patches(worker: Callable[[str], Worker]) -> None:
    w = worker(
        """
        import os, signal, socket, sys, time
        socket.setdefaulttimeout(0.05)
        def f(what):
            if what == "fork":
                pid = os.fork()
                if pid == 0: return "child"
                return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if what == "fork-raise":
                pid = os.fork()
                if pid == 0: raise ValueError("in the child")
                return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if what == "leave":
                if os.fork() == 0: time.sleep(60)
                return os.getpid()
            if what == "stdio": [os.close(fd) for fd in (0, 1, 2)]
            if what == "low": os.closerange(3, 900)
            if what == "chdir": os.chdir("/"); sys.stdout = None
            if what == "block": signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            if what == "alarm":
                signal.signal(signal.SIGALRM, lambda *_: 1 / 0); signal.setitimer(signal.ITIMER_REAL, 0.05)
            if what == "patch":
                socket.socket = None; os.read = os.write = None
            return what
        """
    ).serve("f")
    assert w.call("f", "alarm") == "alarm"
    time.sleep(0.15)
    assert w.call("f", "fork") == 0
    assert w.call("f", "fork-raise") == 1
    assert "in the child" in w.err() and "a signal handler raised" in w.err()
    for what in ("low", "block", "chdir", "patch", "stdio"):
        assert w.call("f", what) == what
    assert w.call("f", "leave") == w.process.pid
    w.conn.close()
    assert w.process.wait(20) == 0


def test_crashes_end_in_eof(worker: Callable[[str], Worker]) -> None:
    source = """
        import os, ctypes
        def f(how):
            if how == "exit": os._exit(7)
            ctypes.string_at(0)
        """
    w = worker(source).serve("f")
    with pytest.raises(EOFError):
        w.call("f", "exit")
    assert w.process.wait(20) == 7
    w = worker(source).serve("f")
    with pytest.raises((EOFError, ConnectionError)):
        w.call("f", "segfault")
    assert w.process.wait(20) == -signal.SIGSEGV
    assert "Segmentation fault" in w.err() and "prog.py" in w.err()


def test_gpu_is_hidden_until_start(worker: Callable[[str], Worker]) -> None:
    w = worker(
        """
        import os
        seen = os.environ["CUDA_VISIBLE_DEVICES"]
        def f(): return seen, os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("PYTORCH_NVML_BASED_CUDA_CHECK")
        """
    )
    w.boot("f", snapshot=True, hide_gpu=True)
    w.freeze()
    w.start(restored=True, env={"CUDA_VISIBLE_DEVICES": "0"})
    assert w.call("f") == ("", "0", None)


def test_messages_out_of_turn_and_junk_end_the_worker(worker: Callable[[str], Worker]) -> None:
    w = worker("def f(): pass")
    w.send({"type": "call", "call": "c", "method": "f"})
    with pytest.raises(EOFError):
        w.receive()
    assert w.process.wait(20) == 2 and "does not fit a worker that is new" in w.err()
    w = worker("")
    w.conn.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert w.process.wait(20) == 2 and "not a woodfrog message" in w.err()


def test_nothing_heavy_before_the_users_code(worker: Callable[[str], Worker]) -> None:
    w = worker(
        """
        import sys
        loaded = sorted(sys.modules)
        def f(): return loaded
        """
    ).serve("f")
    loaded = w.call("f")
    heavy = {"asyncio", "socket", "cloudpickle", "ctypes", "logging", "threading", "subprocess", "tempfile", "uuid",
             "random", "hashlib", "ssl", "traceback", "woodfrog.spec", "woodfrog.settings"}  # fmt: skip
    assert heavy.isdisjoint(loaded)
    assert len(loaded) < 115
