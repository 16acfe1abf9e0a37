"""What a program sees of the SDK, with nothing between it and real containers."""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import woodfrog
from e2e.harness import Daemon, until
from woodfrog.errors import (
    CallCancelled,
    ExecutionError,
    FunctionTimeoutError,
    InstanceCrashed,
    NotFoundError,
    SerializationError,
    SpecError,
    StartupError,
)

pytestmark = [pytest.mark.root, pytest.mark.criu]

SHOP = '''
"""A user's program."""

import asyncio
import json
import os
import socket
import threading
import time

import woodfrog

app = woodfrog.App("shop", secrets=[woodfrog.Secret.from_dict({"SHARED": "by all"})])
shelf = woodfrog.Volume.from_name("shelf", create_if_missing=True)


class OutOfStock(Exception):
    def __init__(self, item, left):
        super().__init__(item, left)
        self.item, self.left = item, left


class Stubborn(Exception):
    """Cannot be pickled: holds a lock."""

    def __init__(self, text):
        super().__init__(text)
        self.lock = threading.Lock()


@app.function(enable_memory_snapshot=True)
def square(x, *, plus=0):
    return x * x + plus


@app.function()
def echo(value):
    return value


@app.function(max_containers=2)
def divide(a, b):
    return a / b


@app.function()
def buy(item, left=0):
    try:
        {}[item]
    except KeyError as e:
        raise OutOfStock(item, left) from e


@app.function()
def stubborn():
    raise Stubborn("no")


@app.function()
def leave():
    raise SystemExit(3)


@app.function()
def handle():
    return threading.Lock()


@app.function(max_containers=1)
def slow(seconds):
    time.sleep(seconds)
    return seconds


@app.function()
def countdown(n, fail_at=None):
    for i in range(n, 0, -1):
        if i == fail_at:
            raise OutOfStock("numbers", i)
        yield i


@app.function()
def endless():
    try:
        while True:
            yield os.getpid(), os.urandom(8)
            time.sleep(0.05)
    finally:
        print("endless was closed")


@app.function()
def dying():
    yield 1
    os.kill(os.getpid(), 9)
    yield 2


@app.function()
async def adouble(x):
    await asyncio.sleep(0.01)
    return 2 * x


@app.function()
async def acountdown(n):
    for i in range(n, 0, -1):
        await asyncio.sleep(0)
        yield i


@app.function(volumes={"/shelf": shelf}, retries=woodfrog.Retries(max_retries=3, initial_delay=0.0))
def flaky(name, failures):
    with open(f"/shelf/{name}", "a") as file:
        file.write("x")
    if os.path.getsize(f"/shelf/{name}") <= failures:
        raise OutOfStock("luck", 0)
    return os.path.getsize(f"/shelf/{name}")


@app.function(timeout=1)
def too_long():
    time.sleep(60)


@app.function(
    env={"PLAIN": "value"},
    secrets=[woodfrog.Secret.from_dict({"TOKEN": "s3cret"}), woodfrog.Secret.from_name("kept", required_keys=["KEPT"])],
    enable_memory_snapshot=True,
)
def environment():
    return {k: os.environ.get(k) for k in ("PLAIN", "TOKEN", "SHARED", "KEPT", "HOME", "USER", "WOODFROG_HOME")}


@app.function(volumes={"/shelf": shelf})
def put(name, text):
    with open(f"/shelf/{name}", "w") as file:
        file.write(text)


@app.function(volumes={"/store/deep": shelf.with_mount_options(read_only=True)}, enable_memory_snapshot=True)
def look(name):
    try:
        open("/store/deep/new", "w").close()
    except OSError as e:
        return [open(f"/store/deep/{name}").read(), e.strerror]


def ways_out():
    with open("/proc/net/route") as file:
        routes = [line.split()[0] for line in file.readlines()[1:] if line.split()[1] == "00000000"]
    with socket.socket() as s:
        s.settimeout(0.3)
        return [sorted(name for _, name in socket.if_nameindex()), routes, s.connect_ex(("192.0.2.1", 9))]


@app.function()
def online():
    return ways_out()


@app.function(block_network=True, enable_memory_snapshot=True)
def offline():
    return ways_out()


@app.function(single_use_containers=True, enable_memory_snapshot=True)
def once():
    return socket.gethostname()


@app.cls(enable_memory_snapshot=True)
class Counter:
    start: int = woodfrog.parameter(default=0)
    name: str = woodfrog.parameter(default="plain")

    @woodfrog.enter(snap=True)
    def load(self):
        self.value = self.start * 100

    @woodfrog.method()
    def add(self, n):
        self.value += n
        return [self.name, self.value]

    @woodfrog.method()
    def count(self, n):
        yield from range(self.value, self.value + n)

    @woodfrog.method()
    async def later(self, n):
        await asyncio.sleep(0)
        return self.value + n


@app.cls(scaledown_window=0.5)
class Classic:
    def __init__(self, greeting, *, mark="!"):
        self.greeting, self.mark = greeting, mark

    @woodfrog.enter()
    def open(self):
        self.opened = True

    @woodfrog.method()
    def greet(self, who):
        return f"{self.greeting}, {who}{self.mark}" if self.opened else None

    @woodfrog.exit()
    def close(self):
        print(f"{self.greeting}: closed")
'''


def imported(path: Path) -> ModuleType:
    """A user's program in this process, as `import` would have it."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with Daemon() as daemon, pytest.MonkeyPatch.context() as patch:
        patch.setenv("WOODFROG_HOME", str(daemon.home))
        yield daemon


@pytest.fixture(scope="module")
def shop(daemon: Daemon) -> Iterator[Any]:
    module: Any = imported(daemon.program(SHOP, "shop.py"))
    client = daemon_client(daemon)
    client.request("PUT", "/secrets/kept", headers={"content-type": "application/json"}, content=b'{"KEPT": "here"}')
    with module.app.run():
        yield module


def daemon_client(daemon: Daemon) -> Any:
    from woodfrog.sdk.client import Client

    return Client(daemon.settings)


def lines(daemon: Daemon, app: str, stream: str = "stdout") -> list[str]:
    return [entry["line"] for entry in daemon.app_log(app) if entry["stream"] == stream]


# Calls


def test_ways_of_calling(shop: Any) -> None:
    assert shop.square.remote(7) == 49
    assert shop.square.remote(7, plus=1) == 50
    assert shop.square.local(7) == shop.square(7) == 49
    assert list(shop.square.map(range(20))) == [x * x for x in range(20)]
    assert list(shop.square.map([1, 2], kwargs={"plus": 1})) == [2, 5]
    assert sorted(shop.square.map(range(20), order_outputs=False)) == [x * x for x in range(20)]
    assert list(shop.divide.starmap([(1, 2), (3, 4)])) == [0.5, 0.75]
    assert list(shop.divide.map([1, 6], [2, 3])) == [0.5, 2.0]
    shop.divide.for_each([1], [2])
    assert shop.divide.remote(1, b=4) == 0.25
    big = os.urandom(20 << 20)
    assert shop.echo.remote(big) == big


def test_map_and_exceptions(shop: Any) -> None:
    with pytest.raises(ZeroDivisionError):
        list(shop.divide.map([1, 1, 1], [1, 0, 1]))
    first, second, third = shop.divide.map([1, 1, 1], [1, 0, 2], return_exceptions=True)
    assert (first, third) == (1.0, 0.5) and isinstance(second, ZeroDivisionError)
    shop.divide.for_each([1, 1], [0, 1], ignore_exceptions=True)


async def test_asynchronous_forms(shop: Any) -> None:
    assert await shop.square.remote.aio(3) == 9
    assert await asyncio.gather(*(shop.square.remote.aio(i) for i in range(5))) == [0, 1, 4, 9, 16]
    assert [x async for x in shop.square.map.aio(range(5))] == [0, 1, 4, 9, 16]
    assert [x async for x in shop.divide.starmap.aio([(1, 2)])] == [0.5]
    call = await shop.square.spawn.aio(4)
    assert await call.get.aio(timeout=30) == 16
    assert [x async for x in shop.countdown.remote_gen.aio(3)] == [3, 2, 1]
    assert await shop.adouble.remote.aio(4) == 8
    assert await shop.Counter(start=9).later.remote.aio(1) == 901


def test_asynchronous_functions_and_generators(shop: Any) -> None:
    assert shop.adouble.remote(21) == 42
    assert list(shop.acountdown.remote_gen(3)) == [3, 2, 1]
    assert list(shop.countdown.remote_gen(3)) == [3, 2, 1]
    assert list(shop.countdown.local(3)) == [3, 2, 1]
    with pytest.raises(SpecError, match="remote_gen"):
        shop.countdown.remote(3)

    got = []
    with pytest.raises(shop.OutOfStock, match="numbers"):
        for item in shop.countdown.remote_gen(5, fail_at=3):
            got.append(item)
    assert got == [5, 4]


def test_a_generator_that_comes_to_no_end_says_why(shop: Any) -> None:
    items = shop.dying.remote_gen()
    assert next(items) == 1
    with pytest.raises(InstanceCrashed, match="SIGKILL"):
        next(items)


def test_leaving_a_generator_closes_it_over_there(daemon: Daemon, shop: Any) -> None:
    """Its `finally` runs, and its container serves on."""
    for i, (_, item) in enumerate(shop.endless.remote_gen()):
        assert len(item) == 8
        if i == 2:
            break
    until(lambda: not any(c["call"] for c in daemon.get("/containers")["containers"]), 20)
    containers = [c["id"] for c in daemon.get("/containers")["containers"] if c["function"] == "endless"]
    app = daemon.get(f"/containers/{containers[0]}")["app"]
    until(lambda: "endless was closed" in daemon.app_text(app), 5)


def test_spawned_calls(daemon: Daemon, shop: Any) -> None:
    call = shop.slow.spawn(1.0)
    with pytest.raises(TimeoutError):
        call.get(timeout=0)
    with pytest.raises(TimeoutError):
        call.get(timeout=0.2)
    # The id is enough for another program.
    code = f"import woodfrog; print(woodfrog.FunctionCall.from_id({call.object_id!r}).get(timeout=30))"
    done = subprocess.run([sys.executable, "-c", code], env=daemon.env, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "1.0", done.stderr
    assert call.get() == 1.0

    running, waiting = shop.slow.spawn(60), shop.slow.spawn(60)
    begin = time.monotonic()
    for other in (waiting, running):
        other.cancel()
        with pytest.raises(CallCancelled):
            other.get(timeout=20)
    assert time.monotonic() - begin < 20
    assert woodfrog.FunctionCall.gather(shop.square.spawn(2), shop.square.spawn(3)) == [4, 9]
    with pytest.raises(NotFoundError):
        woodfrog.FunctionCall.from_id("0" * 32).get(timeout=5)


# Exceptions


def test_exceptions_are_raised_as_themselves(shop: Any) -> None:
    with pytest.raises(ZeroDivisionError, match="division by zero") as caught:
        shop.divide.remote(1, 0)
    assert "in divide" in str(caught.value.__cause__) and "return a / b" in str(caught.value.__cause__)

    with pytest.raises(shop.OutOfStock) as own:
        shop.buy.remote("frogs", left=2)
    assert (own.value.item, own.value.left) == ("frogs", 2)
    assert isinstance(own.value.__cause__, KeyError)
    assert any("in buy" in note for note in own.value.__notes__)


def test_exceptions_that_cannot_be_themselves(shop: Any) -> None:
    with pytest.raises(ExecutionError, match=r"shop\.Stubborn: no") as caught:
        shop.stubborn.remote()
    assert "in stubborn" in caught.value.fields["traceback"]
    with pytest.raises(ExecutionError, match="SystemExit"):
        shop.leave.remote()
    with pytest.raises(Exception, match="cannot be pickled") as result:
        shop.handle.remote()
    assert "lock" in str(result.value)
    with pytest.raises(SerializationError, match="argument 1 of type"):
        shop.square.remote(threading.Lock())
    assert shop.square.remote(2) == 4  # all that hurt nobody


# Classes


def test_class_parameters(daemon: Daemon, shop: Any) -> None:
    plain, other = shop.Counter(), shop.Counter(start=3, name="three")
    assert plain.add.remote(1) == ["plain", 1]
    assert other.add.remote(1) == ["three", 301]
    assert plain.add.remote(1) == ["plain", 2]  # the same container, and its state
    assert list(other.count.remote_gen(2)) == [301, 302]
    assert other.later.remote(0) == 301
    assert {name for name, _ in other.add.map([1, 1])} == {"three"}  # maybe in two containers
    assert shop.Counter(start=1).add.local(5) == ["plain", 105]
    with pytest.raises(TypeError, match="strat"):
        shop.Counter(strat=3)
    with pytest.raises((TypeError, SpecError), match="start"):
        shop.Counter(start="three")


def test_custom_constructor_and_exit_hook(daemon: Daemon, shop: Any) -> None:
    assert shop.Classic("Good day", mark=".").greet.remote("frog") == "Good day, frog."
    _, name = shop.app.reach("Classic")
    assert until(lambda: "Good day: closed" in lines(daemon, name), 20)


# Options


def test_retries(shop: Any) -> None:
    assert shop.flaky.remote("luck", 2) == 3
    with pytest.raises(shop.OutOfStock):
        shop.flaky.remote("none", 99)
    assert shop.look.remote("none")[0] == "xxxx"  # the first try and three more


def test_timeout(shop: Any) -> None:
    begin = time.monotonic()
    with pytest.raises(FunctionTimeoutError, match="1 s"):
        shop.too_long.remote()
    assert 0.9 < time.monotonic() - begin < 20


def test_environment_and_secrets(shop: Any) -> None:
    expected = {
        "PLAIN": "value",
        "TOKEN": "s3cret",
        "SHARED": "by all",
        "KEPT": "here",
        "HOME": "/root",
        "USER": "woodfrog",
        "WOODFROG_HOME": None,
    }
    assert shop.environment.remote() == expected


def test_volumes(daemon: Daemon, shop: Any) -> None:
    shop.put.remote("note", "seen")
    assert shop.look.remote("note") == ["seen", "Read-only file system"]
    shop.put.remote("note", "changed")
    assert shop.look.remote("note")[0] == "changed"
    assert (daemon.home / "volumes" / "shelf" / "note").read_text() == "changed"

    app = woodfrog.App("no-volume")

    @app.function(serialized=True, volumes={"/nowhere": woodfrog.Volume.from_name("never-made")})
    def nothing() -> None:
        pass

    with pytest.raises(NotFoundError, match=r"never-made.*create_if_missing=True"), app.run():
        pass


def test_network(shop: Any) -> None:
    import errno

    names, routes, result = shop.online.remote()
    assert names == ["eth0", "lo"] and routes == ["eth0"]
    assert result not in (errno.ENETUNREACH, errno.EHOSTUNREACH)
    assert shop.offline.remote() == [["lo"], [], errno.ENETUNREACH]


def test_single_use(shop: Any) -> None:
    assert len({shop.once.remote() for _ in range(3)}) == 3


def test_names_that_are_not_there(shop: Any) -> None:
    name = shop.app.reach("square")[1]
    with pytest.raises(NotFoundError, match="nothing"):
        woodfrog.Function.from_name(name, "nothing").remote()
    with pytest.raises(NotFoundError, match="no app 'nowhere'"):
        woodfrog.Function.from_name("nowhere", "square").remote()
    assert woodfrog.Function.from_name(name, "square").remote(5) == 25
    assert woodfrog.Cls.from_name(name, "Counter")(start=7).later.remote(0) == 700
    assert woodfrog.App.lookup(name)["square"].remote(6) == 36


# Code


def test_serialized_functions(daemon: Daemon) -> None:
    app = woodfrog.App("serialized")
    factor = 3

    @app.function(serialized=True, enable_memory_snapshot=True)
    def times(x: int) -> int:
        return x * factor

    @app.cls(serialized=True)
    class Keeper:
        @woodfrog.enter()
        def open(self) -> None:
            self.kept = factor

        @woodfrog.method()
        def get(self) -> tuple[int, list[str]]:
            return self.kept, os.listdir("/app") if os.path.isdir("/app") else []

    with app.run():
        assert times.remote(5) == 15
        kept, _ = Keeper().get.remote()  # type: ignore[attr-defined]
        assert kept == 3


WITHOUT_SOURCE = """
import woodfrog
app = woodfrog.App("bare", include_source=False)

@app.function()
def here():
    pass

@app.function(serialized=True)
def there():
    import os
    return os.listdir("/app") if os.path.isdir("/app") else []
"""


def test_without_source_the_program_is_not_shipped(daemon: Daemon) -> None:
    module: Any = imported(daemon.program(WITHOUT_SOURCE, "bare.py"))
    with module.app.run():
        with pytest.raises((StartupError, ModuleNotFoundError), match="bare"):
            module.here.remote()
        assert "bare.py" not in module.there.remote()


# Apps


def test_an_app_that_was_run_is_gone_afterwards(daemon: Daemon) -> None:
    module: Any = imported(daemon.program(WITHOUT_SOURCE, "gone.py"))
    with module.app.run():
        module.there.remote()
        name = module.app.reach("there")[1]
        assert name in [a["app"] for a in daemon.get("/apps")["apps"]]
        with pytest.raises(SpecError, match="runs already"), module.app.run():
            pass
    assert name not in [a["app"] for a in daemon.get("/apps")["apps"]]
    until(lambda: not [c for c in daemon.get("/containers")["containers"] if c["app"] == name], 20)
    with pytest.raises(SpecError, match="needs a running app"):
        module.there.remote()


def test_a_program_of_several_files(daemon: Daemon) -> None:
    """A package with relative imports and a data file; the code of a helper counts as much as the function's own."""
    folder = daemon.program("", "README").parent
    package = folder / "zoo"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "helper.py").write_text("def name():\n    return 'frog'\n")
    (package / "data" / "sound.txt").write_text("ribbit")
    (package / "main.py").write_text(
        "from pathlib import Path\n"
        "import woodfrog\n"
        "from .helper import name\n"
        "app = woodfrog.App('zoo')\n"
        "SOUND = Path(__file__).parent / 'data' / 'sound.txt'\n"
        "@app.function(enable_memory_snapshot=True)\n"
        "def say():\n"
        "    from zoo import helper\n"
        "    import beside\n"
        "    return f'{name()}: {SOUND.read_text()} {helper.__name__} {__name__} {beside.word}'\n"
    )
    (folder / "beside.py").write_text("word = 'beside'\n")
    said = "frog: ribbit zoo.helper zoo.main beside\n"
    assert daemon.cli("run", str(package / "main.py")).stdout == said
    assert daemon.cli("run", "-m", "zoo.main", cwd=folder).stdout == said
    (package / "helper.py").write_text("def name():\n    return 'toad'\n")
    assert daemon.cli("run", "-m", "zoo.main::say", cwd=folder).stdout == said.replace("frog", "toad", 1)
    (package / "data" / "sound.txt").write_text("croak")
    assert "toad: croak" in daemon.cli("run", "-m", "zoo.main::say", cwd=folder).stdout


def test_apps_of_several_parts(daemon: Daemon) -> None:
    """`include`, app-wide options, a name of its own, options of a class handle, and calls from inside."""
    app, part = woodfrog.App("whole"), woodfrog.App("part", secrets=[woodfrog.Secret.from_dict({"PART": "yes"})])

    @part.function(serialized=True, name="named")
    def anything() -> str | None:
        return os.environ.get("PART")

    @app.function(serialized=True)
    def caller() -> Any:
        try:
            return woodfrog.Function.from_name("whole", "named").remote()
        except SpecError as e:
            return e.code

    app.include(part)
    with app.run():
        assert anything.remote() == "yes"
        name = app.reach("named")[1]
        assert woodfrog.Function.from_name(name, "named").remote() == "yes"
        assert caller.remote() == "not-yet"


SITE = """
import woodfrog as modal
import woodfrog.experimental
from woodfrog import concurrent

app = modal.App("site")

@app.function()
def square(x):
    return x * x

@app.function(schedule=modal.Period(days=1))
def nightly():
    return square.local(3)

@app.function()
@concurrent(max_inputs=10)
@modal.asgi_app()
def web(): ...

@app.cls()
class Model:
    @modal.method()
    def run(self, x):
        return [self.page(x), self.page.local(x), nightly.local()]

    @modal.fastapi_endpoint()
    def page(self, x):
        return x + 1

    @modal.method()
    def calls(self):
        return square.remote(3)
"""


def test_a_program_of_which_woodfrog_lacks_something(daemon: Daemon) -> None:
    """Its other functions run, in containers that import the very program; what is left out is an error at the call."""
    file = daemon.program(SITE, "site_program.py")
    told = daemon.cli("deploy", str(file)).stderr
    for tag in ("nightly", "web", "Model.page"):
        assert f"note: {tag} is left out: " in told
    assert "note: Model.calls calls square.remote(), which fails in a container: " in told
    assert daemon.call("site", "square", x=3) == 9
    assert daemon.call("site", "Model.run", x=1) == [2, 2, 9]
    for tag in ("nightly", "web", "Model.page"):
        with pytest.raises(NotFoundError, match=f"{tag} is left out of app 'site': .*site_program.py:") as no:
            daemon.call("site", tag)
        assert no.value.code == "left-out"
    with pytest.raises(AssertionError, match=r"square: calling other functions .*\(site_program.py:\d+\)"):
        daemon.call("site", "Model.calls")
    assert daemon.cli("deploy", str(file), "--strict", check=False).returncode == 2


VERSIONED = """
import woodfrog
app = woodfrog.App("versioned")
shelf = woodfrog.Volume.from_name("lasting", create_if_missing=True)

@app.function(enable_memory_snapshot=True, volumes={"/lasting": shelf}, scaledown_window=300)
def version():
    with open("/lasting/seen", "a") as file:
        file.write("%d")
    return [%d, woodfrog.snapshot_id(), open("/lasting/seen").read()]
"""


def test_redeploying(daemon: Daemon) -> None:
    def deploy(number: int) -> Any:
        path.write_text(VERSIONED % (number, number))
        daemon.cli("deploy", str(path), "--snapshot")
        return woodfrog.Function.from_name("versioned", "version").remote()

    path = daemon.program("", "versioned.py")
    answer, first, _ = deploy(1)
    assert answer == 1 and first is not None
    # Unchanged: the snapshot of before is thawed.
    assert deploy(1)[:2] == [1, first]
    # Changed: another snapshot and the new answer, also where a container of the old version is still warm.
    answer, second, seen = deploy(2)
    assert answer == 2 and second not in (None, first)
    assert seen == "112"  # the volume outlives versions
    # Back again.
    assert deploy(1)[:2] == [1, first]

    call = daemon.json("call", "versioned.version")
    assert call["result"][0] == 1
    trace = daemon.get(f"/calls/{call['call']}/trace")
    assert trace["status"] == "success"
    modes = {c["mode"] for c in daemon.get("/containers")["containers"] if c["app"] == "versioned"}
    assert modes == {"restore"}


SCALED = """
import socket, time
import woodfrog
app = woodfrog.App("scaled")

@app.function(enable_memory_snapshot=True, min_containers=2, scaledown_window=0.5)
def always():
    return socket.gethostname()

@app.function(max_containers=1, scaledown_window=0.5)
def alone(seconds):
    begin = time.time()
    time.sleep(seconds)
    return [socket.gethostname(), begin, time.time()]

@app.function(enable_memory_snapshot=True, buffer_containers=1, scaledown_window=0.5)
def spare(seconds):
    time.sleep(seconds)
"""


def test_scaling(daemon: Daemon) -> None:
    def containers(tag: str) -> list[dict[str, Any]]:
        found = [c for c in daemon.get("/containers")["containers"] if c["app"] == "scaled" and c["function"] == tag]
        return [c for c in found if c["stage"] == "ready" and not c.get("storing")]

    daemon.cli("deploy", str(daemon.program(SCALED, "scaled.py")))
    until(lambda: len(containers("always")) == 2)  # without any call

    alone = woodfrog.Function.from_name("scaled", "alone")
    times = sorted(alone.map([0.2] * 4), key=lambda found: float(found[1]))
    assert len({found[0] for found in times}) == 1
    assert all(a[2] <= b[1] for a, b in itertools.pairwise(times))

    spare = woodfrog.Function.from_name("scaled", "spare")
    call = spare.spawn(3)
    until(lambda: any(c["call"] for c in containers("spare")))
    until(lambda: len(containers("spare")) == 2)  # one beyond the one at work
    call.get()

    until(lambda: not containers("alone") and not containers("spare"), 20)
    time.sleep(1)
    assert len(containers("always")) == 2
    daemon.cli("app", "stop", "scaled")
    until(lambda: "scaled" not in [c["app"] for c in daemon.get("/containers")["containers"]], 20)


# Freeze and thaw


FROZEN = """
import asyncio, os, socket, sqlite3, sys, threading, time
import woodfrog

app = woodfrog.App("frozen")
order = []
ticks = 0


@woodfrog.register_before_snapshot
def first_registered():
    order.append("before 1")


@woodfrog.register_before_snapshot
async def second_registered():
    order.append("before 2")


@woodfrog.register_after_restore
def third_registered():
    order.append("after 1")


@woodfrog.register_after_restore
async def fourth_registered():
    order.append("after 2")


def tick():
    global ticks
    while True:
        ticks += 1
        time.sleep(0.01)


class Base:
    @woodfrog.enter(snap=True)
    def base(self):
        order.append("enter base")


@app.cls(enable_memory_snapshot=True, single_use_containers=True)
class Frozen(Base):
    def __init__(self):
        order.append("construct")
        self.restored_at_boot = woodfrog.restored()

    @woodfrog.enter(snap=True)
    async def load(self):
        order.append("enter snap")
        self.background = asyncio.create_task(self.beat())
        self.beats = 0
        await asyncio.sleep(0.02)
        self.write_files()
        threading.Thread(target=tick, daemon=True, name="ticker").start()
        self.local = threading.local()
        self.host = socket.gethostname()

    async def beat(self):
        while True:
            self.beats += 1
            await asyncio.sleep(0.005)

    def write_files(self):
        for folder in ("/tmp", os.path.expanduser("~"), "/dev/shm", "/var/tmp", "/data/made"):
            os.makedirs(folder, exist_ok=True)
            with open(f"{folder}/kept", "w") as file:
                file.write(folder)
        os.symlink("/tmp/kept", "/tmp/link")
        os.mkfifo("/tmp/fifo")
        os.chmod("/tmp/kept", 0o640)
        self.deleted = open("/tmp/deleted", "w+")
        self.deleted.write("still here")
        self.deleted.flush()
        os.unlink("/tmp/deleted")
        self.open = open("/tmp/growing", "a+")
        self.open.write("one ")
        self.open.flush()
        self.database = sqlite3.connect("/tmp/things.sqlite", check_same_thread=False)
        self.database.execute("pragma journal_mode = wal")
        self.database.execute("create table things (name text)")
        self.database.execute("insert into things values ('frog')")
        self.database.commit()
        self.database.execute("insert into things values ('in the open transaction')")
        self.pipe = os.pipe()
        os.write(self.pipe[1], b"in the pipe")

    @woodfrog.enter(snap=False)
    def wake(self):
        order.append("enter thaw")

    @woodfrog.method()
    async def look(self):
        global ticks
        beats, before = self.beats, ticks
        await asyncio.sleep(0.2)
        self.deleted.seek(0)
        self.open.write("two")
        self.open.flush()
        self.open.seek(0)
        folders = ["/tmp", os.path.expanduser("~"), "/dev/shm", "/var/tmp", "/data/made", "/tmp/link/.."]
        return {
            "order": order,
            "restored": [self.restored_at_boot, woodfrog.restored(), woodfrog.is_local()],
            "snapshot": woodfrog.snapshot_id(),
            "files": {f: open(f + "/kept").read() for f in folders[:-1]},
            "link": os.readlink("/tmp/link"),
            "mode": oct(os.stat("/tmp/kept").st_mode & 0o777),
            "deleted": self.deleted.read(),
            "growing": self.open.read(),
            "rows": self.database.execute("select name from things order by rowid").fetchall(),
            "transaction": self.database.in_transaction,
            "pipe": os.read(self.pipe[0], 100).decode(),
            "threads": sorted(t.name for t in threading.enumerate() if t.name == "ticker"),
            "thread ran": ticks > before,
            "task ran": self.beats > beats,
            "host": [self.host, socket.gethostname()],
            "instance": os.environ["WOODFROG_INSTANCE"],
            "modal": [os.environ["MODAL_TASK_ID"], os.environ["MODAL_IS_REMOTE"]],
        }
"""


ORDER = ["construct", "enter base", "enter snap", "before 2", "before 1", "after 1", "after 2", "enter thaw"]


def test_what_a_thawed_copy_still_has(daemon: Daemon) -> None:
    daemon.cli("deploy", str(daemon.program(FROZEN, "frozen.py")), "--snapshot")
    look = woodfrog.Cls.from_name("frozen", "Frozen")().look
    hosts = []
    for _ in range(3):
        found = look.remote()
        hosts.append(found.pop("host"))
        assert hosts[-1][1] == found.pop("instance")
        assert found.pop("modal") == [hosts[-1][1], "1"]
        snapshot = found.pop("snapshot")
        assert snapshot in daemon.snapshots("frozen")
        home = "/root"
        assert found == {
            "order": ORDER,
            "restored": [False, True, False],
            "files": {f: f for f in ("/tmp", home, "/dev/shm", "/var/tmp", "/data/made")},
            "link": "/tmp/kept",
            "mode": "0o640",
            "deleted": "still here",
            "growing": "one two",
            "rows": [("frog",), ("in the open transaction",)],
            "transaction": True,
            "pipe": "in the pipe",
            "threads": ["ticker"],
            "thread ran": True,
            "task ran": True,
        }
    assert len({host[0] for host in hosts}) == 1  # where the snapshot was made
    assert len({host[1] for host in hosts}) == 3


WRITER = """
import os
import pathlib
import woodfrog as modal

cache = modal.Volume.from_name("writer-cache", create_if_missing=True)
tools = modal.Volume.from_name("writer-tools", create_if_missing=True)
app = modal.App("writer")


@app.cls(enable_memory_snapshot=True, volumes={"/root/.cache/hub": cache, "/opt/writer/tools": tools})
class Writer:
    @modal.enter(snap=True)
    def prepare(self):
        pathlib.Path("before.txt").write_text("frozen")
        os.makedirs("data/deep")
        self.log = open("data/log", "a+")
        pathlib.Path("data/rows.txt").write_text("changed")
        pathlib.Path("~/.cache/other").expanduser().mkdir()
        pathlib.Path("~/.cache/hub/weights").expanduser().write_text("kept")
        pathlib.Path("/opt/writer/tools/tool").write_text("kept")

    @modal.method()
    def look(self, word):
        self.log.write(word)
        self.log.seek(0)
        return [
            modal.restored(), os.getcwd(), sorted(os.listdir(".")), pathlib.Path("before.txt").read_text(),
            pathlib.Path("data/rows.txt").read_text(), self.log.read(), sorted(os.listdir("/root/.cache")),
            pathlib.Path("/root/.cache/hub/weights").read_text(), os.listdir("/opt/writer/tools"),
        ]
"""


def test_a_program_writes_beside_itself_and_into_its_caches(daemon: Daemon) -> None:
    program = daemon.program(WRITER, "writer.py")
    (program.parent / "data").mkdir()
    (program.parent / "data/rows.txt").write_text("as deployed")
    daemon.cli("deploy", str(program))
    beside = ["before.txt", "data", "writer.py"]
    for word in ("a", "b", "c"):
        found = daemon.call("writer", "Writer.look", word=word)
        assert found == [True, "/app", beside, "frozen", "changed", word, ["hub", "other"], "kept", ["tool"]]
        daemon.wait_snapshot("writer")
        daemon.scale_to_zero()
    assert "boot" not in daemon.last_phases()
    assert (program.parent / "data/rows.txt").read_text() == "as deployed"
    assert (daemon.home / "volumes/writer-cache/weights").read_text() == "kept"
    assert not os.path.exists("/opt/writer")


ADDER = """
import pathlib
import woodfrog as modal

image = (
    modal.Image.debian_slim()
    .add_local_dir("assets", "/root/assets", ignore=["*.tmp"])
    .add_local_file("assets/one.txt", "/srv-of-its-own/deep/one.txt")
)
app = modal.App("adder", image=image)


@app.function(enable_memory_snapshot=True, include_source=True)
def look():
    root = pathlib.Path("/root/assets")
    (root / "made").write_text("here")
    (root / "one.txt").write_text(root.joinpath("one.txt").read_text() + "+")
    other = pathlib.Path("/srv-of-its-own/deep/one.txt").read_text()
    return [sorted(p.name for p in root.iterdir()), (root / "one.txt").read_text(), other]


@app.function(serialized=True, image=image.workdir("/root/work/in"), enable_memory_snapshot=True)
def by_value():
    import os
    return [sorted(os.listdir("/root/assets")), os.getcwd(), os.access(".", os.W_OK)]
"""


def test_files_that_an_image_adds(daemon: Daemon) -> None:
    program = daemon.program(ADDER, "adder.py")
    (assets := program.parent / "assets").mkdir()
    for name in ("one.txt", "two.txt", "left.tmp"):
        (assets / name).write_text(name)
    daemon.cli("deploy", str(program), cwd=program.parent)
    assert daemon.call("adder", "look") == [["made", "one.txt", "two.txt"], "one.txt+", "one.txt"]
    assert daemon.call("adder", "by_value") == [["one.txt", "two.txt"], "/root/work/in", True]
    (assets / "one.txt").write_text("anew")
    until(lambda: len(daemon.snapshots("adder")) == 2)
    (program.parent / "result.json").write_text("{}")
    daemon.cli("deploy", str(program), cwd=program.parent)
    assert daemon.call("adder", "look") == [["made", "one.txt", "two.txt"], "anew+", "anew"]
    why = "starts cold: assets/one.txt changed, result.json is new, /root/assets/one.txt changed, 1 more file changed"
    until(lambda: why in daemon.app_text("adder"))
    program.write_text(ADDER.replace("/srv-of-its-own", "/usr/share"))
    refused = daemon.cli("deploy", str(program), cwd=program.parent, check=False)
    assert refused.returncode == 2 and "adds files at /usr/share/deep/one.txt, where functions see" in refused.stderr


def test_a_call_knows_its_id(daemon: Daemon) -> None:
    app = woodfrog.App("known")

    @app.function(serialized=True)
    def own() -> str | None:
        return woodfrog.current_function_call_id()

    @app.function(serialized=True)
    def each() -> Iterator[str | None]:
        yield woodfrog.current_input_id()
        yield woodfrog.current_input_id()

    app.deploy()
    call = own.spawn()
    assert call.get() == call.object_id
    first, second = each.remote_gen()
    assert first == second and first not in (None, call.object_id)
    assert woodfrog.current_function_call_id() is None


def test_directories_of_the_machine_come_and_go(daemon: Daemon) -> None:
    app = woodfrog.App("top")
    place = Path(f"/woodfrog-test-{os.getpid()}")

    @app.function(serialized=True, single_use_containers=True)
    def there(path: str) -> bool:
        import os

        return os.path.isdir(path)

    app.deploy()
    assert not there.remote(str(place))
    place.mkdir()
    try:
        assert there.remote(str(place))
    finally:
        place.rmdir()
    assert not there.remote(str(place))


DEFERRED = """
import sys
import woodfrog as modal

image = modal.Image.debian_slim().pip_install("numpy")
app = modal.App("deferred", image=image)

with image.imports():
    import numpy as np
    from numpy.linalg import norm

@app.cls(enable_memory_snapshot=True)
class Vector:
    @modal.method()
    def length(self, values: list) -> "np.floating":
        return float(norm(np.array(values)))

@app.local_entrypoint()
def main():
    print(Vector().length.remote([3, 4]), "numpy" in sys.modules, Vector().length.local([6, 8]), "numpy" in sys.modules)
"""


def test_what_only_a_container_needs_is_not_imported_here(daemon: Daemon) -> None:
    """Neither to run, to deploy nor to call a program; for what runs here all the same it is there."""
    path = daemon.program(DEFERRED, "deferred.py")
    assert daemon.cli("run", str(path)).stdout == "5.0 False 10.0 True\n"
    program = f"import runpy, sys; runpy.run_path({str(path)!r}, run_name='client'); assert 'numpy' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], env=daemon.env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


FICKLE = """
import socket
import woodfrog
app = woodfrog.App("fickle")
shelf = woodfrog.Volume.from_name("fickle", create_if_missing=True)

@app.cls(enable_memory_snapshot=True, single_use_containers=True, volumes={"/shelf": shelf})
class Fickle:
    @woodfrog.enter(snap=True)
    def open(self):
        self.file = open("/shelf/log", "a+")

    @woodfrog.method()
    def write(self):
        self.file.write("x")
        self.file.flush()
        return open("/shelf/log").read()
"""


def test_a_file_of_a_volume_that_is_open_in_the_freeze_and_changes(daemon: Daemon) -> None:
    """The snapshot no longer fits what is there: every call is answered all the same; in the end none is tried."""
    daemon.cli("deploy", str(daemon.program(FICKLE, "fickle.py")))
    write = woodfrog.Cls.from_name("fickle", "Fickle")().write
    said, number = "", 0
    while "cold from now on" not in said and number < 40:  # some calls come while a snapshot is on its way to disk
        number += 1
        assert write.remote() == "x" * number
        until(lambda: "fickle" not in [c["app"] for c in daemon.get("/containers")["containers"]], 20)
        said = daemon.app_text("fickle")
    assert write.remote() == "x" * (number + 1)
    captured, refused = (said.count(words) for words in (" captured", "did not thaw"))
    assert captured == refused == 3, said  # never two at once: each was tried
    assert "/fickle/log was changed since the snapshot was made (cold start instead)" in said
    [line] = [line for line in said.splitlines() if "cold from now on" in line]
    assert "woodfrog snapshot create fickle.Fickle" in line
