"""What decorators record, and what they refuse."""

from __future__ import annotations

import inspect
import json
import pickle
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

import woodfrog
import woodfrog as modal
from woodfrog.errors import SpecError
from woodfrog.sdk import checks, hooks, options, payload
from woodfrog.sdk.deploy import build, check_packages
from woodfrog.spec import ImageSpec, RetryPolicy, VolumeMount, from_dict, to_dict
from woodfrog.worker.runtime import Runtime, _hooks

HERE = "test_sdk_decorators.py"


def plain(x: int) -> int:
    return x


def spec_of(**parameters: Any) -> Any:
    return modal.App("a").function(**parameters)(plain).spec


def test_parameters_land_in_the_spec() -> None:
    image = modal.Image.debian_slim().pip_install("numpy>=2", ["a", "b"]).env({"A": "1"}).apt_install("git")
    volume = modal.Volume.from_name("models", create_if_missing=True)
    app = modal.App("a", image=image, secrets=[modal.Secret.from_name("s")], volumes={"/shared/": volume})
    spec: Any = app.function(
        cpu=(0.5, 2),
        memory=512,
        gpu=["H100:2", "any", None],
        timeout=10,
        retries=modal.Retries(max_retries=2, initial_delay=0),
        min_containers=1,
        max_containers=3,
        buffer_containers=1,
        scaledown_window=5,
        single_use_containers=True,
        enable_memory_snapshot=True,
        experimental_options={"enable_gpu_snapshot": True},
        block_network=True,
        env={"B": "2"},
        secrets=[modal.Secret.from_dict({"K": "v", "gone": None})],
        volumes={"/models": volume.with_mount_options(read_only=True)},
        name="other",
    )(plain).spec
    assert from_dict(type(spec), to_dict(spec)) == spec
    assert (spec.tag, spec.source.kind, spec.source.qualname) == ("other", "module", "plain")
    assert (spec.resources.cpu, spec.resources.cpu_limit) == (0.5, 2.0)
    assert (spec.resources.memory_mib, spec.resources.gpu) == (512, ("H100:2", "any"))
    assert (spec.timeout, spec.startup_timeout) == (10.0, 300.0)
    assert spec.retries == RetryPolicy(2, 2.0, 0.0, 60.0)
    s = spec.scaling
    assert (s.min_containers, s.max_containers, s.buffer_containers, s.scaledown_window) == (1, 3, 1, 5.0)
    assert s.single_use and spec.snapshot.enabled and spec.snapshot.gpu and spec.block_network
    assert spec.env == {"B": "2"} and spec.image.env == {"A": "1"}
    assert spec.image.packages == ("numpy>=2", "a", "b")
    assert [s.name for s in spec.secrets] == ["s", None] and spec.secrets[1].values == {"K": "v"}
    assert spec.volumes == (
        VolumeMount("models", "/shared"),
        VolumeMount("models", "/models", read_only=True),
    )
    assert (spec_of(cpu=2).resources.cpu, spec_of(cpu=2).resources.cpu_limit) == (2.0, None)
    assert spec_of(memory=(64, 128)).resources.memory_mib == 128
    assert spec_of(retries=3).retries == RetryPolicy(3, 1.0, 1.0, 60.0)
    assert spec_of(gpu="a10g").resources.gpu == ("A10G",)
    assert spec_of(timeout=900).startup_timeout == 900


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"cpu": -1}, "must be more than 0"),
        ({"cpu": "2"}, "expected a number, got '2'"),
        ({"cpu": (4, 2)}, "the request 4 is more than the limit 2"),
        ({"memory": 1.5}, "expected a whole number"),
        ({"memory": (1, 2, 3)}, "pair"),
        ({"memory": 1}, "1 MiB are too few for a container's Python: 16 is the least"),
        ({"gpu": "H100:0"}, "count"),
        ({"gpu": "H 100"}, "expected the form"),
        ({"gpu": 3}, "expected text"),
        ({"timeout": 0}, "must be more than 0"),
        ({"timeout": True}, "expected a number"),
        ({"retries": -1}, "must be at least 0"),
        ({"retries": 1.5}, "Retries"),
        ({"max_containers": 0}, "must be at least 1, got 0"),
        ({"min_containers": 3, "max_containers": 2}, "min_containers=3 is more than max_containers=2"),
        ({"enable_memory_snapshot": "yes"}, "expected True or False"),
        ({"experimental_options": {"enable_gpu_snapshot": True}}, "needs enable_memory_snapshot"),
        ({"env": {"A": 1}}, "expected str to str"),
        ({"env": {"A=B": "1"}}, "cannot stand in an environment"),
        ({"image": "debian"}, "expected a woodfrog.Image"),
        ({"volumes": {"models": modal.Volume.from_name("v")}}, "not an absolute path"),
        ({"volumes": {"/proc/x": modal.Volume.from_name("v")}}, "taken by the container"),
        ({"volumes": {"/a": "v"}}, "expected a woodfrog.Volume"),
        ({"secrets": modal.Secret.from_dict({})}, "put it in"),
        ({"max_inputs": 0}, "must be at least 1"),
        ({"name": "a/b"}, "is not a name"),
    ],
)
def test_wrong_values_are_one_line_with_the_place(parameters: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError) as caught:
        spec_of(**parameters)
    assert words in str(caught.value)
    assert "plain, " in str(caught.value) and HERE in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_parameter_names_the_nearest() -> None:
    with pytest.raises(
        TypeError, match=r"no parameter 'enable_memory_snapshots'; did you mean 'enable_memory_snapshot'"
    ):
        spec_of(enable_memory_snapshots=True)
    with pytest.raises(TypeError, match="App has no parameter 'imag'; did you mean 'image'"):
        modal.App("a", imag=1)
    with pytest.raises(TypeError, match=r"write @app\.function"):
        modal.App("a").function(plain)


def test_parameters_without_meaning_are_noted_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "_noted", set())
    spec_of(region="eu", cloud=None, schedule=None)
    spec_of(region="us")
    err = capsys.readouterr().err
    assert err.count("region= has no meaning") == 1 and "cloud" not in err


def test_older_names() -> None:
    with pytest.warns(DeprecationWarning, match="now called App"):
        stub = modal.Stub("checkpointing-example-simple")
    with pytest.warns(DeprecationWarning, match="enable_memory_snapshot"):
        handle = stub.function(checkpointing_enabled=True)(plain)
    assert handle.spec and handle.spec.snapshot.enabled
    with pytest.warns(DeprecationWarning, match="min_containers"):
        assert spec_of(keep_warm=2).scaling.min_containers == 2


def test_the_table_and_the_types_agree() -> None:
    assert set(options.Options.__annotations__) == set(options.PARAMETERS) | options.WITHOUT_MEANING


def test_names() -> None:
    app = modal.App("a")
    app.function()(plain)
    with pytest.raises(
        SpecError, match=rf"two functions of one name in app a: plain, .*{HERE}:\d+, and before it plain, .*{HERE}:\d+"
    ):
        app.function()(plain)
    app.function(name="again")(plain)
    with pytest.raises(SpecError, match="not a name"):
        modal.App("no spaces please")


class Snapped:
    @modal.enter(snap=True)
    def load(self) -> None:
        self.loaded = ["load"]

    @modal.enter()
    def after(self) -> None:
        self.loaded.append("after")

    @modal.exit()
    def leave(self) -> None: ...

    @modal.method()
    def run(self, x: int) -> str:
        return self.helper.local(x) + self.helper(x)  # type: ignore[attr-defined, no-any-return]

    @modal.method()
    def helper(self, x: int) -> str:
        return f"{self.loaded}{x}"

    @modal.method()
    async def items(self) -> Any:
        yield 1


def test_classes() -> None:
    app = modal.App("a")
    with pytest.raises(SpecError, match=rf"Snapped.load is marked enter\(snap=True\), .* \(.*{HERE}:\d+\)$"):
        app.cls()(Snapped)
    handle: Any = app.cls(enable_memory_snapshot=True)(Snapped)
    assert [(m.name, m.generator, m.is_async) for m in handle.spec.methods] == [
        ("run", False, False),
        ("helper", False, False),
        ("items", True, True),
    ]
    assert handle().run.local(3) == "['load', 'after']3" * 2
    assert handle().items.is_generator is True
    with pytest.raises(SpecError, match=r"in this process: call self\.helper\.local"):
        handle()._local().helper.remote(1)

    class Child(handle):  # type: ignore[misc]
        @modal.enter(snap=True)
        def load(self) -> None:
            self.loaded = ["child"]

    assert issubclass(Child, Snapped)
    child: Any = modal.App("b").cls(enable_memory_snapshot=True, serialized=True)(Child)
    assert child().helper.local(1) == "['child', 'after']1"

    class Nothing: ...

    with pytest.raises(SpecError, match="Nothing has no method to call"):
        modal.App("c").cls()(Nothing)
    with pytest.raises(SpecError, match=r"use @app\.cls"):
        modal.App("c").function()(Snapped)
    with pytest.raises(SpecError, match="is for classes"):
        modal.App("c").cls()(plain)  # type: ignore[type-var]
    with pytest.raises(SpecError, match="with_options"):
        handle.with_options(cpu=2)


def test_markers_outside_a_class() -> None:
    for marker in (modal.method(), modal.enter(), modal.exit()):
        with pytest.raises(SpecError, match=rf"it is for methods of a class .*{HERE}:\d+"):
            marker(plain)
    with pytest.raises(SpecError, match="with parentheses"):
        modal.method(plain)


def test_names_of_modals_handles_are_no_methods_of_the_user() -> None:
    class Model:
        @modal.method()
        def keep_warm(self) -> str:
            return "mine"

    here: Any = modal.App("a").cls(serialized=True)(Model)
    assert here().keep_warm.local() == "mine"
    function = modal.Function.from_name("a", "f", client=None, version=None)
    cls = modal.Cls.from_name("a", "Model", client=None, version=None)
    for handle, names in (
        (function, ["update_autoscaler", "keep_warm", "get_web_url", "web_url", "stats", "with_options"]),
        (cls, ["with_options", "with_concurrency", "with_batching"]),
        (cls(), ["update_autoscaler", "keep_warm", "get_web_url", "get_dashboard_url", "with_options"]),
        (here(), ["update_autoscaler"]),
    ):
        for name in names:
            with pytest.raises(SpecError, match=rf"\.{name}: not in woodfrog yet: .*{HERE}:\d+") as no:
                getattr(handle, name)
            assert no.value.code == "not-yet" and not hasattr(handle, name)
    for name in ("stats", "run", "logs"):
        assert getattr(cls(), name).tag == f"Model.{name}"


def test_names_take_modals_arguments(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(checks, "_noted", set())
    modal.Secret.from_name("s", client=None, environment_name="main")
    modal.Volume.from_name("v", client=None, version=2)
    assert capsys.readouterr().err == ""
    modal.Cls.from_name("a", "C", version=3)
    modal.Function.from_name("a", "f", version=3)
    assert capsys.readouterr().err.count("ignores version=: the newest deploy is called") == 2


def test_class_parameters() -> None:
    class Sized:
        size: int = modal.parameter()
        scale: float = modal.parameter(default=1)
        hidden: str = modal.parameter(default="h", init=False)

        @modal.method()
        def all(self) -> Any:
            return self.size, self.scale, self.hidden

    handle: Any = modal.App("a").cls(serialized=True)(Sized)
    assert handle.spec.parameters == {"size": "int", "scale": "float = 1.0"}
    assert handle(size=3).all.local() == (3, 1.0, "h")
    assert Sized(size=2, scale=2).all() == (2, 2.0, "h")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="Sized needs the parameter size"):
        handle()
    with pytest.raises(TypeError, match="by name"):
        handle(3)
    with pytest.raises(TypeError, match="no parameter 'hidden'"):
        handle(size=1, hidden="x")
    with pytest.raises(SpecError, match="must be of type int, got True"):
        handle(size=True)

    class Untyped:
        size = modal.parameter()

        @modal.method()
        def run(self) -> None: ...

    with pytest.raises(SpecError, match="needs a type annotation"):
        modal.App("a").cls(serialized=True)(Untyped)


def test_context_managers_of_older_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Base:
        def __enter__(self) -> None:
            log.append("enter")

        async def __aenter__(self) -> None:
            log.append("aenter")

        def __exit__(self, kind: Any, error: Any, at: Any) -> None:
            log.append(f"exit {kind}")

    class Old(Base):
        @modal.method()
        def run(self) -> int:
            return 1

    with pytest.warns(DeprecationWarning) as warned:
        handle: Any = modal.App("a").cls(serialized=True)(Old)
    assert [str(w.message).split(" (")[0] for w in warned] == [
        "__enter__ runs at a container's start: write @woodfrog.enter()",
        "__exit__ runs at a container's end: write @woodfrog.exit()",
    ]
    assert {w.filename for w in warned} == {__file__}
    assert handle().run.local() == 1
    assert log == ["enter", "aenter"]
    # As the worker sees it, of a class that came by value.
    target = pickle.loads(payload.dumps_by_value(Old, "Old"))
    runtime = Runtime()
    runtime._instance = target()
    for kind, wanted in (("enter", {"snap": True}), ("enter", {"snap": False}), ("exit", {})):
        runtime._run_hooks(kind, **wanted)
    runtime._end_loop()
    assert [f.__name__ for f in _hooks(target, "exit", {})] == ["<lambda>"]

    class Child(Old): ...

    with pytest.warns(DeprecationWarning):
        modal.Stub("b").cls(serialized=True)(Child)
    assert len(_hooks(Child, "enter", {"snap": False})) == 2

    class Marked(Base):
        @modal.enter()
        def load(self) -> None: ...

        @modal.exit()
        def leave(self) -> None: ...

        @modal.method()
        def run(self) -> int:
            return 2

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        modal.App("c").cls(serialized=True)(Marked)
    assert [f.__name__ for f in _hooks(Marked, "enter", {"snap": False})] == ["load"]
    with pytest.warns(DeprecationWarning, match="Stub"):
        stub = modal.Stub("d")
    with pytest.warns(DeprecationWarning, match="is_local"):
        assert stub.is_inside() is False
    monkeypatch.setitem(sys.modules, "woodfrog.worker.state", sys)
    with pytest.warns(DeprecationWarning, match="is_local"):
        assert stub.is_inside(modal.Image.debian_slim()) is True


def test_attributes_of_a_handle_start_nothing() -> None:
    log: list[str] = []

    class Model:
        size: int = modal.parameter(default=3)
        KIND = "small"

        @modal.enter(snap=True)
        def load(self) -> None:
            log.append("load")
            self.weights = [self.size]

        @property
        def double(self) -> int:
            return self.size * 2

        @modal.method()
        def run(self) -> Any:
            return self.weights

    m: Any = modal.App("a").cls(serialized=True, enable_memory_snapshot=True)(Model)(size=4)
    assert (m.size, m.double, m.KIND, m._cls.tag) == (4, 8, "small", "Model")
    assert not hasattr(m, "foo") and not hasattr(m, "_foo") and not hasattr(m, "weights")
    with pytest.raises(AttributeError, match="no method or attribute 'rn'; did you mean 'run'"):
        m.rn.remote()
    assert log == []
    assert m.run.local() == m.run.local() == [4]
    assert m.weights == [4]
    assert log == ["load"]

    class Own:
        def __init__(self, size: int) -> None:
            log.append("init")
            self.size = size

        @modal.enter()
        def load(self) -> None:
            log.append("load")

        @modal.method()
        def run(self) -> int:
            return self.size

    del log[:]
    own: Any = modal.App("a").cls(serialized=True)(Own)(5)
    assert log == []
    assert own.size == 5 and not hasattr(own, "foo")
    assert log == ["init"]
    assert own.run.local() == 5
    assert log == ["init", "load"]


class Greeter:
    def __init__(self, greeting: Any = "hi", n: int = 1, *, weights: Any = (), rate: float = float("inf")) -> None: ...

    @modal.method()
    def run(self) -> None: ...


class Sized:
    greeting: str = modal.parameter(default="hi")
    rate: float = modal.parameter(default=float("inf"))
    n: int = modal.parameter(default=1)

    @modal.method()
    def run(self) -> None: ...


@pytest.fixture(params=["here", "by name"])
def handle_of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[type], Any]:
    """The handle of a class whose code is here, or of one that only the daemon describes."""

    def make(cls: type) -> Any:
        here = modal.App("a").cls(serialized=True)(cls)
        if request.param == "here":
            return here
        handle = modal.Cls.from_name("a", cls.__name__)
        spec = json.loads(json.dumps(to_dict(here.spec)))
        monkeypatch.setattr(handle, "_describe", lambda: spec)
        return handle

    return make


def test_parameters_pickle_alike(handle_of: Callable[[type], Any]) -> None:
    handle = handle_of(Greeter)
    text = "".join(["a", "b"])
    assert handle("ab", n=2)._pickled() == handle(n=2, greeting=str(text + "c")[:2])._pickled()
    assert pickle.loads(handle("ab")._pickled()) == ((), {"greeting": "ab"})
    for same in ((), ("hi",), ("hi", 1)):
        assert handle(*same)._pickled() is None
    assert handle(greeting="hi", n=1)._pickled() is None
    # What is not plain, or of another type, is never taken for the default.
    different = [handle(1), handle(True), handle(n=True), handle(n=1.0), handle(weights=()), handle(greeting=None)]
    assert len({d._pickled() for d in different}) == len(different)
    sized = handle_of(Sized)
    assert sized(greeting="hi", n=1, rate=float("inf"))._pickled() is None
    assert pickle.loads(sized(n=2, rate=3)._pickled()) == ((), {"n": 2, "rate": 3.0})


def test_constructor_arguments_that_a_class_does_not_take(handle_of: Callable[[type], Any]) -> None:
    greeter, sized = handle_of(Greeter), handle_of(Sized)
    for wrong, words in (
        (
            lambda: greeter("a", 1, 2),
            r"^Greeter: too many positional arguments; it takes greeting, n, weights, rate \(.*py:",
        ),
        (lambda: greeter(name="a"), "^Greeter: got an unexpected keyword argument 'name'; it takes greeting"),
        (lambda: sized("a"), r"^Sized takes its parameters by name, as in Sized\(greeting="),
        (lambda: sized(greetin="a"), "^Sized has no parameter 'greetin'; did you mean 'greeting'"),
        (lambda: sized(n="a"), r"^Sized\(n=...\) must be of type int, got 'a'"),
    ):
        with pytest.raises((TypeError, SpecError), match=words):
            wrong()._pickled()


def test_a_constructor_of_any_arguments_is_told_nothing_of() -> None:
    class Any_:
        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

        @modal.method()
        def run(self) -> None: ...

    handle: Any = modal.App("a").cls(serialized=True)(Any_)
    assert handle.spec.constructor is None
    assert pickle.loads(handle(1, a=2)._pickled()) == ((1,), {"a": 2})


def test_what_the_daemon_says_of_a_class_is_asked_again_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A deploy may have changed its defaults."""
    answers = iter([{"functions": [{"tag": "C", "constructor": {"n": f" = {i}"}}]} for i in (1, 2)])

    class Client:
        def request(self, *args: Any) -> Any:
            return SimpleNamespace(json=lambda: next(answers))

    handle: Any = modal.Cls.from_name("a", "C")
    monkeypatch.setattr(handle._owner, "reach", lambda tag: (Client(), "a"))
    monkeypatch.setattr("woodfrog.sdk.cls._KNOWN_S", 0.05)
    obj = handle(n=1)
    assert obj._pickled() is None and obj._pickled() is None
    time.sleep(0.06)
    assert pickle.loads(obj._pickled()) == ((), {"n": 1})


def test_functions_that_a_container_cannot_import(tmp_path: Path) -> None:
    def nested() -> None: ...

    with pytest.raises(SpecError, match=r"nested is defined inside another function.*serialized=True"):
        modal.App("a").function()(nested)
    modal.App("a").function(serialized=True)(nested)
    done = subprocess.run(
        [sys.executable, "-"],
        input="import woodfrog\ndef f(): pass\nwoodfrog.App('a').function()(f)",
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert (
        "f is defined in no file (a REPL, a notebook, or standard input): use @app.function(serialized=True)"
        in done.stderr
    )
    app = modal.App("a")
    app.function()(first_hidden)
    with pytest.raises(SpecError, match=r"which is a function that is not it: give it a name of its own"):
        build("a", list(app._handles.values()))


def hidden() -> int:
    return 1


first_hidden = hidden


def hidden() -> int:  # type: ignore[no-redef]
    return 2


def test_calls_without_an_app_running(monkeypatch: pytest.MonkeyPatch) -> None:
    app = modal.App("a")
    handle = app.function()(plain)
    assert handle(2) == handle.local(2) == 2
    with pytest.raises(
        SpecError, match=r"plain.remote\(\) needs a running app: .*woodfrog run .*from_name\('a', 'plain'\)"
    ):
        handle.remote(1)
    outer = modal.App("outer").include(app)
    assert outer["plain"] is handle
    with pytest.raises(SpecError, match="two functions of one name"):
        outer.function()(plain)
    monkeypatch.setitem(sys.modules, "woodfrog.worker.state", sys)
    for call in (handle.remote, modal.Function.from_name("x", "y").remote):
        with pytest.raises(SpecError, match="from inside a container is not in woodfrog yet"):
            call(1)
    waiting = pickle.loads(pickle.dumps(modal.FunctionCall.from_id("c1")))
    for use in (waiting.get, waiting.cancel, lambda: modal.FunctionCall.gather(waiting)):
        with pytest.raises(
            SpecError, match=r"'c1'.*from inside a container is not in woodfrog yet.*on the client"
        ) as no:
            use()
        assert no.value.code == "not-yet"
    assert woodfrog.is_local() is False


def test_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "_before_snapshot", [])
    monkeypatch.setattr(hooks, "_after_restore", [])

    @woodfrog.register_before_snapshot
    def first() -> None: ...

    assert woodfrog.register_after_restore(first) is first
    assert hooks._before_snapshot == hooks._after_restore == [first]
    with pytest.raises(TypeError, match="needs a function"):
        woodfrog.register_after_restore(3)  # type: ignore[type-var]
    assert (woodfrog.restored(), woodfrog.snapshot_id(), woodfrog.is_local()) == (False, None, True)


def test_names_that_are_missing() -> None:
    with pytest.raises(AttributeError, match="Modal has 'Sandbox'; woodfrog does not have it yet") as caught:
        _ = modal.Sandbox
    assert isinstance(caught.value, SpecError) and caught.value.code == "not-yet"
    assert str(caught.value).endswith(f"({checks.short(__file__)}:{caught.tb.tb_lineno})")
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = modal.nonsense
    for name in ("Queue", "nonsense", "__wrapped__", "__file__x"):
        assert not hasattr(modal, name) and getattr(modal, name, 3) == 3
    assert {"App", "Volume", "Error", "__version__"} <= set(dir(modal))


def test_sources_that_are_not_installed_have_a_version_too(tmp_path: Path) -> None:
    source = Path(modal.__file__).parents[1]
    (tmp_path / "woodfrog").symlink_to(source / "woodfrog")
    code = "import sys; sys.path = [sys.argv[1], *sys.path]; import woodfrog; print(woodfrog.__version__)"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout == "unknown\n", done.stderr
    assert not set(dir(modal)) & set(modal._NOT_YET)
    inspect.getmembers(modal)
    with pytest.raises(AttributeError), mock.patch("woodfrog.Queue"):
        pass


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("from woodfrog import App, Queue", "'Queue'; .* Volume"),
        ("from woodfrog import gpu", 'gpu="A100:2"'),
        ("from woodfrog.gpu import A100", 'gpu="A100:2"'),
        ("import woodfrog.gpu", 'gpu="A100:2"'),
        ("from woodfrog.experimental import eager_image", "'experimental.eager_image'"),
        ("import woodfrog.experimental as e; e.stop_fetching_inputs()", "'experimental.stop_fetching_inputs'"),
        ("import woodfrog.queue", "'queue'; .* Volume"),
        ("from woodfrog.server import Server", "'server'; .*on the host"),
        ("from woodfrog.container_process import ContainerProcess", "'container_process'; .*subprocess"),
    ],
)
def test_importing_names_that_are_missing(line: str, words: str) -> None:
    with pytest.raises(SpecError, match=words) as caught:
        exec(compile("\n" + line, "program.py", "exec"), {})
    assert caught.value.code == "not-yet" and str(caught.value).endswith("(program.py:2)")


def test_importing_names_that_nobody_has() -> None:
    with pytest.raises(ImportError, match="nonsense"):
        exec("from woodfrog import nonsense", {})
    exec("from woodfrog import *", {})


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("app.serve()", "App.serve: not in woodfrog yet: .*`woodfrog run`"),
        ("app.stop()", "App.stop: not in woodfrog yet: use `woodfrog app stop`"),
        ("modal.Volume.objects.list()", "Volume.objects: not in woodfrog yet: use `woodfrog volume list`"),
        ("modal.Volume.from_name('v').rename('w')", "Volume.rename: .*`woodfrog volume get`"),
        ("modal.Secret.objects", "Secret.objects: .*`woodfrog secret list`"),
        ("modal.Image.debian_slim().build(app)", "Image.build: .*not built"),
        ("modal.Image.from_name('x')", "Image.from_name: .*not built"),
        ("modal.Function.from_id('x')", "Function.from_id: .*Function.from_name"),
        ("modal.FunctionCall.from_id('x').get_call_graph()", "FunctionCall.get_call_graph: .*`woodfrog app calls`"),
    ],
)
def test_what_modals_objects_have_says_what_to_do_without_it(line: str, words: str) -> None:
    names = {"app": modal.App("a"), "modal": modal}
    with pytest.raises(AttributeError, match=words) as caught:
        exec(compile("\n" + line, "program.py", "exec"), names)
    assert isinstance(caught.value, SpecError) and caught.value.code == "not-yet"
    assert str(caught.value).endswith("(program.py:2)")


def test_absent_options_that_ask_for_nothing_are_accepted() -> None:
    app = modal.App("a")
    app.function(serialized=True, network_file_systems={}, mounts=[], schedule=None, shared_volumes={})(plain)  # type: ignore[call-arg]


def test_a_wrong_value_of_retries_says_where() -> None:
    with pytest.raises(SpecError, match="most 10") as caught:
        exec(compile("\nmodal.Retries(max_retries=20)", "program.py", "exec"), {"modal": modal})
    assert str(caught.value).endswith("(program.py:2)")


def test_a_function_has_one_role() -> None:
    with pytest.raises(SpecError, match=r"both @enter\(\) and @method\(\)"):

        class A:
            @modal.method()
            @modal.enter()
            def load(self) -> None: ...

    with pytest.raises(SpecError, match=r"both @exit\(\) and @enter\(\)"):

        class B:
            @modal.enter()
            @modal.exit()
            def end(self) -> None: ...


def test_what_is_missing_is_not_there() -> None:
    for owner, name in ((modal.Volume, "objects"), (modal.Image, "build"), (modal.App("a"), "serve")):
        assert not hasattr(owner, name)
    inspect.getmembers(modal.Volume)
    with pytest.raises(AttributeError, match="'Volume' object has no attribute 'nonsense'"):
        _ = modal.Volume.from_name("v").nonsense  # type: ignore[attr-defined]


def test_an_app_tells_what_it_was_given() -> None:
    app = modal.App("a", image=modal.Image.debian_slim().pip_install("numpy"), tags={"team": "x"})
    assert app.image.spec.packages == ("numpy",) and modal.App().image.spec.packages == ()
    assert (app.app_id, app.description, app.get_tags()) == (None, "a", {"team": "x"})
    app.set_tags({"team": "y"})
    assert app.get_tags() == {"team": "y"} and modal.App.lookup("there").app_id == "there"
    with app.image.imports():
        import nothing_of_this_name  # noqa: F401


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: modal.Image.debian_slim().pip_install("x", extra_index="u"), "'extra_index'; did you mean 'extra_i"),
        (lambda: modal.Image.debian_slim().apt_install("x", forcebuild=True), "'forcebuild'; did you mean"),
        (lambda: modal.Image.from_registry("x", addpython="3.11"), "Image.from_registry has no parameter 'addpython'"),
        (lambda: modal.Image.debian_slim().uv_sync(group=["x"]), "Image.uv_sync has no parameter 'group'"),
        (lambda: modal.App("a").run(detached=True), "App.run has no parameter 'detached'"),
        (lambda: modal.App("a").deploy(nam="b"), "App.deploy has no parameter 'nam'"),
        (lambda: modal.App.lookup("a", create=True), "App.lookup has no parameter 'create'"),
    ],
)
def test_a_parameter_that_nobody_has_is_refused(call: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        call()


def test_how_an_image_is_built_is_accepted() -> None:
    image = modal.Image.from_registry("x", setup_dockerfile_commands=["RUN x"], add_python="3.11", force_build=True)
    image = image.apt_install("x", gpu="T4", secrets=[], env={"A": "b"}, force_build=True)
    image = image.pip_install("x", find_links="u", index_url="u", extra_index_url="u", pre=True, extra_options="-v")
    image = image.uv_pip_install("y", uv_version="0.5", extra_options="-v").uv_sync(
        Path(__file__).parents[2], frozen=False
    )
    image = image.run_function(plain, args=(1,), kwargs={}, timeout=3, volumes={}, include_source=False)
    assert {"x", "y"} <= set(image.spec.packages)


def test_modules_of_modals_have_its_names() -> None:
    names: dict[str, Any] = {}
    exec(
        "import woodfrog.app, woodfrog.image\n"
        "from woodfrog.app import App, LocalEntrypoint\n"
        "from woodfrog.cls import Cls, Obj\n"
        "from woodfrog.functions import Function, FunctionCall\n"
        "from woodfrog.image import Image\n"
        "from woodfrog.output import enable_output\n"
        "from woodfrog.partial_function import enter, exit, method\n"
        "from woodfrog.retries import Retries\n"
        "from woodfrog.secret import Secret\n"
        "from woodfrog.volume import FileEntry, FileEntryType, Volume\n",
        names,
    )
    for name in ("App", "Cls", "Function", "FunctionCall", "Image", "Retries", "Secret", "Volume", "enable_output"):
        assert names[name] is getattr(modal, name)
    with pytest.raises(ImportError, match="nonsense"):
        exec("from woodfrog.functions import nonsense", {})
    with pytest.raises(ImportError, match="nonsense"):
        exec("import woodfrog.nonsense", {})


def test_packages_are_checked() -> None:
    installed = {"sentence-transformers": "5.1.0", "numpy": "2.1"}
    good = (
        "Sentence_Transformers[onnx]>=5,<6",
        "numpy",
        "git+https://example.com/x.git",
        "nothere; python_version<'3'",
    )
    check_packages(ImageSpec(packages=good), "f", installed)
    with pytest.raises(
        SpecError, match=r"needs nothere>=1, which is not installed, numpy>=3, but numpy 2.1 is installed"
    ):
        check_packages(ImageSpec(packages=("nothere>=1", "numpy>=3")), "f", installed)


def test_packages_are_checked_without_packaging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    check_packages(ImageSpec(packages=("num.py [x] >= 2; python_version>'3'",)), "f", {"num-py": "1"})
    with pytest.raises(SpecError, match="nothere>=1, which is not installed"):
        check_packages(ImageSpec(packages=("nothere>=1",)), "f", {})


def test_images_and_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = modal.Image.from_registry("ubuntu:24.04", add_python="3.11").uv_pip_install("x")
    image = image.run_commands("make").run_function(plain).add_local_dir("d", "/d").workdir("/w")
    assert len(image.spec.steps) == 6
    with image.imports():
        import nothing_of_this_name  # noqa: F401
    (tmp_path / "r.txt").write_text("# c\n-r other\nnumpy>=2 # why\n\n")
    assert modal.Image.debian_slim().pip_install_from_requirements(tmp_path / "r.txt").spec.packages == ("numpy>=2",)
    (tmp_path / ".env").write_text("# c\nexport A='1 2'\nB=\"x\\ny\"  # c\nC=plain # c\nD=\n")
    (tmp_path / "deep").mkdir()
    found = modal.Secret.from_dotenv(tmp_path / "deep")._spec.values
    assert found == {"A": "1 2", "B": "x\ny", "C": "plain", "D": ""}
    monkeypatch.setenv("WF_TEST_KEY", "v")
    assert modal.Secret.from_local_environ(["WF_TEST_KEY"])._spec.values == {"WF_TEST_KEY": "v"}
    with pytest.raises(SpecError, match="WF_NONE is not set"):
        modal.Secret.from_local_environ(["WF_NONE"])
    with modal.Volume.ephemeral() as volume:
        assert volume.is_ephemeral
        volume.commit()


def test_importing_is_light(tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import sys
        import dataclasses, inspect, json, pathlib, typing, hashlib, warnings  # not counted: every program has them
        before = set(sys.modules)
        import woodfrog as modal
        assert len(set(sys.modules) - before) <= 3, set(sys.modules) - before
        app = modal.App("light", image=modal.Image.debian_slim().pip_install("x"), secrets=[modal.Secret.from_dict({})])

        @app.cls(enable_memory_snapshot=True, serialized=True, retries=3)
        class C:
            size: int = modal.parameter(default=1)

            @modal.enter(snap=True)
            def load(self): ...

            @modal.method()
            def run(self): ...

        modal.Cls.from_name("a", "b")().run
        modal.register_after_restore(print)
        new = set(sys.modules) - before
        heavy = {"httpcore", "httpx", "cloudpickle", "asyncio", "typer", "rich", "fastapi", "pydantic", "pickle",
                 "subprocess", "socket", "threading", "uuid", "ssl", "email", "tarfile", "importlib.metadata",
                 "logging", "numpy"}
        assert not new & heavy, new & heavy
        assert len(new) < 40, sorted(new)
        """
    )
    (tmp_path / "light.py").write_text(program)
    done = subprocess.run([sys.executable, str(tmp_path / "light.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.version_info < (3, 14), reason="until Python 3.14 a class with such annotations is none")
def test_annotations_may_name_what_only_type_checkers_know() -> None:
    program = """
class Sized:
    size: int = modal.parameter(default=1)
    other: Missing

    @modal.method()
    def run(self): return self.size

class Plain:
    def __init__(self, x: Missing): ...

    @modal.method()
    def run(self): ...
"""
    classes: dict[str, Any] = {"modal": modal, "__name__": "__main__"}
    exec(compile(program, "program", "exec", dont_inherit=True), classes)
    app = modal.App("a")
    sized, plain = (app.cls(serialized=True)(classes[name]) for name in ("Sized", "Plain"))
    assert sized(size=2).run.local() == 2
    assert plain(1)
    with pytest.raises(TypeError, match="too many"):
        plain(1, 2)


def test_no_warnings_for_present_names() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spec_of(enable_memory_snapshot=True, scaledown_window=2)
