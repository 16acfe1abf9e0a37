"""Calls against a daemon over a real socket that runs the shipped code in child processes."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import re
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import woodfrog
import woodfrog as modal
from unit.fake_daemon import FakeDaemon
from woodfrog.errors import (
    CallCancelled,
    ExecutionError,
    FunctionTimeoutError,
    InstanceCrashed,
    NotFoundError,
    OutputExpired,
    SerializationError,
    SpecError,
    StartupError,
    WoodfrogError,
)
from woodfrog.sdk import call as calls
from woodfrog.sdk import payload
from woodfrog.sdk.source import import_program

PROGRAM = """
import asyncio, os, time
import {helper}
import woodfrog

app = woodfrog.App("calls", image=woodfrog.Image.debian_slim().env({{"FROM_IMAGE": "yes"}}))

class MyError(Exception):
    def __init__(self, a, b):
        super().__init__(f"{{a}} and {{b}}")
        self.pair = (a, b)
    def __reduce__(self):
        return MyError, self.pair

class Unpicklable(Exception):
    def __init__(self, a, b):
        super().__init__("fixed text")
        self.lock = __import__("threading").Lock()

@app.function()
def square(x, plus=0):
    return {helper}.multiply(x, x) + plus

@app.function()
async def later(x):
    await asyncio.sleep(0)
    return x + 1

@app.function()
def slow(x, seconds=0.2):
    time.sleep(seconds)
    return x

@app.function()
def fails(x):
    if x == 3:
        raise MyError(x, "b")
    return x

@app.function()
def chained():
    try:
        1 / 0
    except ZeroDivisionError as e:
        raise MyError(1, 2) from e

@app.function()
def odd_error():
    raise Unpicklable(1, 2)

class Ours(woodfrog.Error):
    pass

@app.function()
def raises_modals(name):
    raise Ours("own") if name == "Ours" else getattr(woodfrog.exception, name)("made there")

@app.function()
def leaves():
    raise SystemExit(3)

@app.function()
def big(n):
    return bytes(n)

@app.function()
def echo(x):
    return x

@app.function()
def environment(name):
    return os.environ.get(name)

@app.function()
def numbers(n, fail_at=-1):
    for i in range(n):
        if i == fail_at:
            raise MyError(i, "gen")
        yield i

@app.function()
def drip():
    i = 0
    while True:
        yield i
        i += 1
        time.sleep(0.02)

@app.function()
def crash():
    os._exit(3)

@app.cls()
class Adder:
    base: int = woodfrog.parameter(default=10)
    label: str = woodfrog.parameter(default="sum")

    @woodfrog.enter()
    def start(self):
        self.ready = True

    @woodfrog.method()
    def add(self, x):
        return f"{{self.label}} {{self.base + x}} {{self.ready}}"

    @woodfrog.method()
    def count(self, n):
        yield from range(self.base, self.base + n)

@app.cls(serialized=True)
class Custom:
    def __init__(self, first, *, second=2):
        self.total = first + second

    @woodfrog.method()
    def get(self):
        return self.total
"""


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeDaemon]:
    fake = FakeDaemon(tmp_path_factory.mktemp("home"))
    yield fake
    fake.close()


@pytest.fixture(scope="module", autouse=True)
def home(daemon: FakeDaemon) -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setenv("WOODFROG_HOME", str(daemon.home))
    patch.delenv("WOODFROG_HOST", raising=False)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def program(daemon: FakeDaemon, home: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("program")
    (folder / "calls_helper.py").write_text("def multiply(a, b):\n    return a * b\n")
    (folder / "calls_program.py").write_text(textwrap.dedent(PROGRAM.format(helper="calls_helper")))
    module = import_program(str(folder / "calls_program.py"))
    with module.app.run():
        yield module


def test_remote_runs_the_shipped_code(program: Any, daemon: FakeDaemon) -> None:
    assert program.square.remote(7, plus=1) == 50
    assert program.square.local(7) == program.square(7) == 49
    assert program.later.remote(1) == 2
    assert program.environment.remote("FROM_IMAGE") == "yes"
    app = next(iter(daemon.apps))
    assert app.startswith("calls-") and daemon.apps[app]["ephemeral"] is True


def test_an_exception_comes_back_as_itself(program: Any) -> None:
    with pytest.raises(program.MyError) as caught:
        program.fails.remote(3)
    assert caught.value.pair == (3, "b")
    assert 'raise MyError(x, "b")' in str(caught.value.__cause__)
    assert "calls_program.py" in str(caught.value.__cause__)
    with pytest.raises(program.MyError) as caught:
        program.chained.remote()
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert "1 / 0" in "".join(caught.value.__notes__)


def test_exceptions_that_cannot_come_back(program: Any) -> None:
    with pytest.raises(ExecutionError, match="Unpicklable: fixed text") as caught:
        program.odd_error.remote()
    assert caught.value.code == "remote-exception"
    assert "raise Unpicklable(1, 2)" in str(caught.value.__cause__)
    with pytest.raises(ExecutionError, match="SystemExit"):
        program.leaves.remote()
    with pytest.raises(InstanceCrashed):
        program.crash.remote()


def test_arguments_that_cannot_be_pickled(program: Any) -> None:
    with pytest.raises(SerializationError, match=r"square: argument 'plus' of type lock cannot be pickled"):
        program.square.remote(1, plus=threading.Lock())
    with pytest.raises(SerializationError, match=r"argument 1 of type lock"):
        program.square.remote(threading.Lock())


def test_large_values(program: Any) -> None:
    size = 80 << 20
    assert len(program.big.remote(size)) == size
    data = os.urandom(5 << 20)
    assert program.echo.remote(data) == data


def test_map(program: Any, daemon: FakeDaemon) -> None:
    assert list(program.square.map(range(250))) == [x * x for x in range(250)]
    assert list(program.square.map([1, 2], kwargs={"plus": 1})) == [2, 5]
    assert list(program.square.map([1, 2, 3], [10, 20])) == [11, 24]
    assert list(program.square.starmap([(1, 2), (3, 4)])) == [3, 13]
    assert list(program.square.map([])) == []
    assert program.square.for_each([1, 2]) is None
    inputs = [(0, 0.6), (1, 0.0), (2, 0.2)]
    assert list(program.slow.starmap(inputs, order_outputs=False)) == [1, 2, 0]


def test_map_hands_out_results_while_inputs_still_come(program: Any) -> None:
    gate = threading.Event()

    def inputs() -> Iterator[int]:
        yield 1
        assert gate.wait(20)
        yield 2

    results = program.square.map(inputs())
    assert next(results) == 1
    gate.set()
    assert list(results) == [4]


def test_map_takes_inputs_as_needed(program: Any, daemon: FakeDaemon) -> None:
    taken: list[int] = []

    def endless() -> Iterator[int]:
        while True:
            taken.append(1)
            yield len(taken)

    daemon.most_pending = 0
    results = program.square.map(endless())
    assert [next(results) for _ in range(5)] == [1, 4, 9, 16, 25]
    results.close()
    assert len(taken) <= 5 + calls.WINDOW + 1
    assert daemon.most_pending <= calls.WINDOW


def test_map_exceptions(program: Any, daemon: FakeDaemon) -> None:
    with pytest.raises(program.MyError):
        list(program.fails.map(range(10)))
    found = list(program.fails.map(range(5), return_exceptions=True))
    assert found[:3] == [0, 1, 2] and isinstance(found[3], program.MyError) and found[4] == 4

    def broken() -> Iterator[int]:
        yield 1
        raise KeyError("input")

    with pytest.raises(KeyError, match="input"):
        list(program.square.map(broken()))

    begin = time.monotonic()
    with pytest.raises(program.MyError):
        for _ in program.fails.map([3]):
            pass
    list_of_slow = program.slow.starmap([(1, 0.0), (2, 30.0)])
    assert next(list_of_slow) == 1
    # Leaving at once catches the second call unsent, under way, or running; none may be left behind.
    list_of_slow.close()
    time.sleep(0.3)
    assert all(c.status != "pending" for c in daemon.calls.values())
    list_of_slow = program.slow.starmap([(1, 0.0), (2, 30.0)])
    assert next(list_of_slow) == 1
    while not any(c.status == "pending" for c in daemon.calls.values()):
        time.sleep(0.02)
    list_of_slow.close()
    assert all(c.status != "pending" for c in daemon.calls.values())
    assert any(c.status == "cancelled" and c.tag == "slow" for c in daemon.calls.values())
    assert time.monotonic() - begin < 20


def test_spawn(program: Any) -> None:
    call = program.square.spawn(9)
    assert call.get(timeout=20) == 81
    assert woodfrog.FunctionCall.from_id(call.object_id).get() == 81
    assert pickle.loads(pickle.dumps(call)).get() == 81
    assert woodfrog.FunctionCall.gather(program.square.spawn(1), program.square.spawn(2)) == [1, 4]
    assert [c.get() for c in program.square.spawn_map([1, 2])] == [1, 4]
    slow = program.slow.spawn(1, seconds=30)
    with pytest.raises(TimeoutError):
        slow.get(timeout=0.1)
    with pytest.raises(TimeoutError):
        slow.get(timeout=0)
    slow.cancel()
    with pytest.raises(CallCancelled):
        slow.get()
    with pytest.raises(NotFoundError):
        woodfrog.FunctionCall.from_id("nothing").get()


async def test_gather_without_blocking(program: Any) -> None:
    started = [await program.square.spawn.aio(n) for n in (1, 2)]
    assert await woodfrog.FunctionCall.gather.aio(*started) == [1, 4]


def test_modals_names_of_exceptions_catch_what_is_raised(program: Any, daemon: FakeDaemon) -> None:
    slow = program.slow.spawn(1, seconds=30)
    for kind in (modal.exception.TimeoutError, TimeoutError, modal.Error, modal.exception.Error):
        with pytest.raises(kind):
            slow.get(timeout=0)
    daemon.calls[slow.object_id].finish("failure", _failure(FunctionTimeoutError("slow: ran past its timeout of 1 s")))
    for kind in (modal.exception.FunctionTimeoutError, modal.exception.TimeoutError, TimeoutError):
        with pytest.raises(kind, match="1 s"):
            slow.get()
    expired = program.slow.spawn(1, seconds=30)
    daemon.calls[expired.object_id].finish("failure", _failure(OutputExpired("the result is gone")))
    for call in (expired, woodfrog.FunctionCall.from_id("nothing")):
        for kind in (modal.exception.OutputExpiredError, modal.exception.TimeoutError):
            with pytest.raises(kind) as caught:
                call.get(timeout=0)
        assert not isinstance(caught.value, TimeoutError)  # which says that the call goes on
    with pytest.raises(modal.exception.NotFoundError):
        call.get()
    slow.cancel()
    with pytest.raises(modal.exception.RemoteError):
        program.leaves.remote()
    for kind in (modal.exception.SerializationError, modal.exception.DeserializationError):
        with pytest.raises(kind):
            program.square.remote(threading.Lock())
    with pytest.raises(modal.exception.InvalidError):
        modal.App("not a name")
    with pytest.raises(modal.exception.ImageBuildError, match="made there") as made:
        program.raises_modals.remote("ImageBuildError")
    assert type(made.value) is modal.exception.ImageBuildError and made.value.__cause__ is not None
    with pytest.raises(program.Ours, match="own") as own:
        program.raises_modals.remote("Ours")
    assert isinstance(own.value, modal.Error)


def test_a_failed_start_shows_the_program_s_line(program: Any, daemon: FakeDaemon) -> None:
    text = 'Traceback:\n  File "prog.py", line 3, in load\nOSError: no weights\n'
    slow = program.slow.spawn(1, seconds=30)
    error = StartupError("slow: enter failed: OSError: no weights", traceback=text)
    daemon.calls[slow.object_id].finish("failure", _failure(error))
    with pytest.raises(StartupError, match="no weights") as caught:
        slow.get()
    assert 'File "prog.py", line 3, in load' in str(caught.value.__cause__)


def _failure(error: WoodfrogError) -> bytes:
    return json.dumps({"error": error.to_dict()}).encode()


def test_generators(program: Any, daemon: FakeDaemon) -> None:
    assert list(program.numbers.remote_gen(5)) == [0, 1, 2, 3, 4]
    assert list(program.numbers.remote_gen(0)) == []
    seen = []
    with pytest.raises(program.MyError, match="2 and gen"):
        for i in program.numbers.remote_gen(5, fail_at=2):
            seen.append(i)
    assert seen == [0, 1]
    drip = program.drip.remote_gen()
    assert [next(drip), next(drip)] == [0, 1]
    drip.close()
    assert [c.status for c in daemon.calls.values() if c.tag == "drip"] == ["cancelled"]
    with pytest.raises(SpecError, match=r"is a generator and cannot be called with .remote\(\): use .remote_gen"):
        program.numbers.remote(3)
    with pytest.raises(SpecError, match="is not a generator"):
        list(program.square.remote_gen(3))


def test_classes(program: Any, daemon: FakeDaemon) -> None:
    assert program.Adder().add.remote(1) == "sum 11 True"
    assert program.Adder(base=1, label="s").add.remote(1) == "s 2 True"
    assert program.Adder(base=1).add.local(1) == "sum 2 True"
    assert list(program.Adder(base=3).count.remote_gen(2)) == [3, 4]
    assert program.Adder().base == 10
    assert program.Custom(5).get.remote() == 7
    assert program.Custom(5, second=1).get.local() == 6
    # Defaults said and unsaid are one and the same instance.
    before = len(daemon.runners)
    assert program.Adder(base=10).add.remote(0) == "sum 10 True"
    assert len(daemon.runners) == before
    with pytest.raises(TypeError, match=r"Adder has no parameter 'bas'; did you mean 'base'\?"):
        program.Adder(bas=1)
    with pytest.raises(SpecError, match=r"Adder\(base=...\) must be of type int, got '1'"):
        program.Adder(base="1")
    with pytest.raises(TypeError, match="missing a required argument: 'first'"):
        program.Custom()
    with pytest.raises(AttributeError, match="did you mean 'add'"):
        _ = program.Adder().ad


def test_aio(program: Any, daemon: FakeDaemon) -> None:
    async def main() -> None:
        assert await program.square.remote.aio(3) == 9
        # More at once than the default pool of an event loop has threads.
        begin = time.monotonic()
        assert await asyncio.gather(*(program.slow.remote.aio(i, seconds=0.3) for i in range(40))) == list(range(40))
        assert time.monotonic() - begin < 6
        assert [x async for x in program.square.map.aio(range(5))] == [0, 1, 4, 9, 16]

        async def inputs() -> Any:
            for i in range(3):
                await asyncio.sleep(0)
                yield i

        assert [x async for x in program.square.map.aio(inputs())] == [0, 1, 4]
        assert [x async for x in program.numbers.remote_gen.aio(3)] == [0, 1, 2]
        assert await (await program.square.spawn.aio(4)).get.aio() == 16
        await program.square.for_each.aio([1])
        with pytest.raises(program.MyError):
            await program.fails.remote.aio(3)
        task = asyncio.create_task(program.slow.remote.aio(77, seconds=30))
        while not any(c.status == "pending" and c.tag == "slow" for c in daemon.calls.values()):
            await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


def test_a_lost_answer_is_asked_for_again_and_runs_once(program: Any, daemon: FakeDaemon) -> None:
    before = set(daemon.started)
    daemon.drop += [f"POST /v1/apps/{next(iter(daemon.apps))}/calls/square"] * 2
    assert program.square.remote(5) == 25
    assert not daemon.drop
    assert [daemon.started[c] for c in set(daemon.started) - before] == [1]


def test_a_call_outlives_the_daemon(program: Any, daemon: FakeDaemon) -> None:
    def restart() -> None:
        time.sleep(0.3)
        daemon.stop()
        time.sleep(0.7)
        daemon.start()

    thread = threading.Thread(target=restart)
    thread.start()
    assert program.slow.remote(5, seconds=0.6) == 5
    thread.join()
    thread = threading.Thread(target=restart)
    thread.start()
    items = program.drip.remote_gen()
    assert [next(items) for _ in range(60)] == list(range(60))
    items.close()
    thread.join()


def test_deployed_handles(program: Any, daemon: FakeDaemon) -> None:
    app = woodfrog.App("kept")

    @app.function(serialized=True)
    def triple(x: int) -> int:
        return 3 * x

    with pytest.raises(SpecError, match=r"needs a running app: .*woodfrog.Function.from_name\('kept', 'triple'\)"):
        triple.remote(1)
    app.deploy()
    assert triple.remote(2) == 6
    assert woodfrog.Function.from_name("kept", "triple").remote(3) == 9
    assert woodfrog.App.lookup("kept")["triple"].remote(4) == 12
    assert payload.loads(payload.dumps(triple)).remote(5) == 15
    asyncio.run(app.deploy.aio())
    assert daemon.apps["kept"]["ephemeral"] is False


def test_hydrate_asks_whether_it_is_there(program: Any, daemon: FakeDaemon) -> None:
    app = woodfrog.App("hydrated")

    class Model:
        @woodfrog.method()
        def run(self) -> int:
            return 1

    def triple(x: int) -> int:
        return 3 * x

    app.function(serialized=True)(triple)
    app.cls(serialized=True)(Model)
    with pytest.raises(SpecError, match="needs a running app"):
        app.registered_functions["triple"].hydrate()
    app.deploy()
    found = woodfrog.Function.from_name("hydrated", "triple")
    assert found.hydrate() is found and asyncio.run(found.hydrate.aio(client=None)) is found
    assert app.registered_functions["triple"].hydrate().tag == "triple"
    assert woodfrog.Function.from_name("hydrated", "Model.run").hydrate().tag == "Model.run"
    model = woodfrog.Cls.from_name("hydrated", "Model")
    assert model.hydrate() is model and asyncio.run(model.hydrate.aio()) is model
    obj = model()
    assert obj.hydrate() is obj and asyncio.run(obj.hydrate.aio()) is obj
    for handle, words in (
        (woodfrog.Function.from_name("hydrated", "tripel"), "app hydrated has no 'tripel'; did you mean 'triple'"),
        (woodfrog.Cls.from_name("hydrated", "Modell")(), "app hydrated has no 'Modell'; did you mean 'Model"),
        (woodfrog.Cls.from_name("nowhere", "Model"), "nowhere"),
    ):
        with pytest.raises(NotFoundError, match=words):
            handle.hydrate()


def test_a_running_app_s_client_says_that_it_is_there(
    program: Any, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the time of the block, and also after the daemon was restarted."""
    monkeypatch.setattr("woodfrog.sdk.app.PRESENT_S", 0.02)
    app = woodfrog.App("present")

    def touched() -> int:
        return daemon.requests.count(f"POST /v1/apps/{name}/touch")

    def wait(count: int) -> None:
        deadline = time.monotonic() + 10
        while touched() < count and time.monotonic() < deadline:
            time.sleep(0.01)
        assert touched() >= count

    with app.run():
        assert app._running is not None
        name = app._running[1]
        wait(2)
        daemon.stop()
        time.sleep(0.2)
        daemon.start()
        wait(touched() + 2)
    threads = {t.name for t in threading.enumerate() if not t.daemon}
    assert "woodfrog-presence" not in threads, "it would keep the program from ending"
    time.sleep(0.2)
    count = touched()
    time.sleep(0.2)
    assert touched() == count


def test_names_ask_nothing_of_the_daemon(daemon: FakeDaemon) -> None:
    before = len(daemon.requests)
    woodfrog.Function.from_name("nowhere", "f")
    handle = woodfrog.Cls.from_name("nowhere", "C")(1)
    _ = handle.method
    woodfrog.App.lookup("nowhere")
    assert len(daemon.requests) == before
    with pytest.raises(NotFoundError):
        handle.method.remote()


def test_unchanged_code_is_sent_once(program: Any, daemon: FakeDaemon) -> None:
    puts = [r for r in daemon.requests if r.startswith("PUT /v1/code")]
    name = program.app._running[1]
    program.app._send(name, ephemeral=True)
    assert [r for r in daemon.requests if r.startswith("PUT /v1/code")] == puts


SCRIPT = """
from dataclasses import dataclass
import sys
import woodfrog as modal

app = modal.App("script")

@dataclass
class Point:
    x: int

class MyError(Exception):
    pass

@app.function()
def move(p):
    assert isinstance(p, Point), type(p)
    if p.x < 0:
        raise MyError(f"x is {p.x}")
    print("moving")
    return Point(p.x + 1)

@app.local_entrypoint()
def main():
    pass

if __name__ == "__main__":
    with modal.enable_output(), app.run():
        moved = move.remote(Point(1))
        assert type(moved) is Point and moved == Point(2), moved
        try:
            move.remote(Point(-1))
        except MyError as e:
            print("caught", e)
"""


def test_a_script_meets_its_own_classes(daemon: FakeDaemon, tmp_path: Path) -> None:
    (tmp_path / "the_script.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, "the_script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "caught x is -1" in done.stdout
    assert "logs of script-" in done.stdout


def test_ctrl_c_cancels_the_call(daemon: FakeDaemon, tmp_path: Path) -> None:
    import signal

    (tmp_path / "waits.py").write_text(
        "import time, woodfrog\napp = woodfrog.App('waits')\n@app.function()\ndef wait_long():\n    time.sleep(60)\n"
        "if __name__ == '__main__':\n    with app.run():\n        wait_long.remote()\n"
    )
    process = subprocess.Popen([sys.executable, "waits.py"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not any(c.tag == "wait_long" for c in list(daemon.calls.values())):
        time.sleep(0.05)
        assert process.poll() is None
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode != 0 and "KeyboardInterrupt" in errors
    assert [c.status for c in daemon.calls.values() if c.tag == "wait_long"] == ["cancelled"]
    assert not any(a.startswith("waits-") for a in daemon.apps)


STAYS = """
import asyncio, sys, time
import woodfrog

app = woodfrog.App("stays")

@app.function()
def stay(x, seconds=60):
    time.sleep(seconds)
    return x

@app.function()
def drips():
    while True:
        yield 0
        time.sleep(0.01)

async def several():
    await asyncio.gather(*(stay.remote.aio(n) for n in range(2)))

async def within():
    async with app.run(detach=True):
        await asyncio.gather(several(), stay.remote.aio(2))

def many():
    for _ in stay.starmap([(0, 0), (1, 60), (2, 60)]):
        time.sleep(60)  # interrupted outside of the map

def items():
    for _ in drips.remote_gen():
        time.sleep(60)

if __name__ == "__main__":
    if sys.argv[1] == "within":
        asyncio.run(within())
    with app.run(detach=True):
        match sys.argv[1]:
            case "remote":
                stay.remote(1)
            case name:
                globals()[name]()
"""


def test_ctrl_c_leaves_the_calls_of_a_detached_run(daemon: FakeDaemon, tmp_path: Path) -> None:
    import signal

    (tmp_path / "stays.py").write_text(STAYS)
    before = set(daemon.calls)
    expected = {"remote": 1, "within": 3, "many": 2, "items": 1}
    programs = {
        name: subprocess.Popen([sys.executable, "stays.py", name], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        for name in expected
    }

    def pending() -> dict[str, str]:
        return {i: c.tag for i, c in list(daemon.calls.items()) if i not in before and c.status == "pending"}

    count = sum(expected.values())
    deadline = time.monotonic() + 60
    while (len(daemon.calls) - len(before), len(pending())) != (count + 1, count) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    for process in programs.values():
        process.send_signal(signal.SIGINT)
    for name, process in programs.items():
        _, errors = process.communicate(timeout=30)
        assert process.returncode != 0 and "KeyboardInterrupt" in errors
        found = re.search(r"note: (stays-\w+) goes on with call (.*): `woodfrog app logs \1 -f`", errors)
        assert found, errors
        assert len(found[2].split(", ")) == expected[name]
        assert all(i.split()[0] in pending() for i in found[2].split(", "))
    assert len(pending()) == count
    for call_id in pending():
        daemon.calls[call_id].finish("cancelled", b"{}")


def test_loops_and_tasks_of_a_detached_run_that_are_left_are_cancelled(daemon: FakeDaemon, program: Any) -> None:
    app = woodfrog.App("detached")
    app.include(program.app)

    async def cancelled() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(program.slow.remote.aio(1, seconds=60), 0.2)

    before = set(daemon.calls)
    program.app._running, running = None, program.app._running
    try:
        with app.run(detach=True):
            next(program.drip.remote_gen())
            asyncio.run(cancelled())
            deadline = time.monotonic() + 10
            calls = [daemon.calls[i] for i in set(daemon.calls) - before]
            while {c.status for c in calls} != {"cancelled"} and time.monotonic() < deadline:
                time.sleep(0.05)
            assert [c.status for c in calls] == ["cancelled"] * 2
    finally:
        program.app._running = running


FORKS = """
import asyncio, multiprocessing, os, sys, threading, time
import woodfrog
from woodfrog.sdk import client

app = woodfrog.App("forks")

@app.function()
def echo(x):
    return x

@app.function()
def forever():
    while True:
        yield 0

async def several(numbers):
    return await asyncio.gather(*(echo.remote.aio(n) for n in numbers))

def work(k):
    numbers = [k * 1000 + i for i in range(8)]
    return [echo.remote(n) for n in numbers] == numbers == asyncio.run(several(numbers)) == list(echo.map(numbers))

def hold(lock):
    with lock:
        time.sleep(1)

if __name__ == "__main__":
    with app.run():
        assert work(9)
        items = forever.remote_gen()
        next(items)
        for lock in (client._lock, app.reach("echo")[0]._starting):
            threading.Thread(target=hold, args=(lock,), daemon=True).start()
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map(work, range(2), 1) == [True] * 2
        if not (pid := os.fork()):
            client.connect()
            sys.exit(0 if work(5) else 3)  # leaves the block, and the loop
        assert os.waitpid(pid, 0)[1] == 0
        assert work(10) and next(items) == 0
        items.close()
"""


def test_processes_after_a_fork_get_their_own_answers(daemon: FakeDaemon, tmp_path: Path) -> None:
    (tmp_path / "forks.py").write_text(FORKS)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "forks.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not any(a.startswith("forks-") for a in daemon.apps)
