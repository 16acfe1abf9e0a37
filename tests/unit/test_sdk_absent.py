"""What of Modal's is given to one function: that function is left out by name, and the others run."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

import woodfrog
import woodfrog as modal
from woodfrog.errors import NotFoundError, SpecError
from woodfrog.sdk import checks
from woodfrog.sdk.deploy import build
from woodfrog.spec import AppSpec, LeftOut, from_dict, to_dict

HERE = checks.short(__file__)
names: Any = modal
"""With the names that type checkers are not told of."""


def square(x: int) -> int:
    return x * x


def options(**parameters: Any) -> Any:
    return modal.App("a").function(serialized=True, **parameters)(square)


def why(handle: Any) -> str:
    """Of what is left out as a whole."""
    (left,) = handle._left_out()
    assert left.tag == handle.tag and handle._lacks
    assert HERE in left.why and "\n" not in left.why
    return str(left.why)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"schedule": names.Cron("* * * * *")}, "schedules yet: drop it, and have cron run `woodfrog call`"),
        ({"schedule": names.Period(days=1)}, "schedules"),
        ({"schedule": object()}, "schedules"),
        (
            {"network_file_systems": {"/x": names.NetworkFileSystem.from_name("n")}},
            "network file systems yet: use a Volume",
        ),
        ({"mounts": [names.Mount.from_local_dir(".")]}, "sent with it"),
        ({"allow_concurrent_inputs": 3}, "several inputs at once"),
        ({"max_inputs": 5}, "drop it, or give single_use_containers=True"),
        (
            {"volumes": {"/x": names.CloudBucketMount("b", secret=None)}},
            r"\(volumes=...\).*mount the bucket on the host",
        ),
    ],
)
def test_options(parameters: dict[str, Any], words: str) -> None:
    import re

    handle = options(**parameters)
    assert re.search(words, why(handle))
    assert handle.local(3) == handle(3) == 9
    for call in (handle.remote, handle.spawn, lambda x: list(handle.map([x])), lambda x: handle.hydrate()):
        with pytest.raises(SpecError, match=f"square is left out of its app: .*{words}") as caught:
            call(1)
        assert caught.value.code == "left-out"


def test_values_of_options_that_mean_nothing_here() -> None:
    handle = options(proxy=names.Proxy.from_name("p"), scheduler_placement=names.SchedulerPlacement(region="eu"))
    assert handle._left_out() == () and handle.spec is not None


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("asgi_app", {}),
        ("batched", {"max_batch_size": 3, "wait_ms": 100}),
        ("concurrent", {"max_inputs": 3, "target_inputs": 2}),
        ("fastapi_endpoint", {"method": "POST", "docs": True}),
        ("web_endpoint", {}),
        ("web_server", {"port": 8000}),
        ("wsgi_app", {"label": "x"}),
    ],
)
def test_decorators(name: str, given: dict[str, Any]) -> None:
    decorator = getattr(names, name)(**given)

    def plain(x: int) -> int:
        return x + 1

    app = modal.App("a")
    assert why(app.function(serialized=True)(decorator(plain))) and plain(1) == 2

    class Model:
        @decorator
        def web(self, x: int) -> int:
            return x + 1

        @modal.method()
        def run(self, x: int) -> Any:
            return self.web(x), self.web.local(x)

    cls: Any = app.cls(serialized=True)(Model)
    assert [left.tag for left in cls._left_out()] == ["Model.web"] and not cls._lacks
    assert [m.name for m in cls.spec.methods] == ["run"]
    assert cls().run.local(1) == (2, 2) and cls().web.local(1) == 2
    with pytest.raises(SpecError, match=r"Model\.web is left out of its app: "):
        cls().web.remote(1)

    class Whole:
        @modal.method()
        def run(self) -> int:
            return 1

    whole: Any = app.cls(serialized=True)(decorator(Whole))
    assert why(whole) and whole().run.local() == 1
    with pytest.raises(SpecError, match=r"Whole.run is left out of its app: "):
        whole().run.remote()
    with pytest.raises(SpecError, match="Whole is left out"):
        whole.hydrate()

    class Child(Whole):
        @modal.method()
        def more(self) -> int:
            return 1

    assert app.cls(serialized=True)(Child)._left_out() == ()  # type: ignore[attr-defined]


def test_a_class_that_rests_on_what_is_missing_is_left_out_whole() -> None:
    class Endpoints:
        @names.web_server(8000)
        def serve(self) -> None: ...

    class Built:
        @names.build()
        def download(self) -> None: ...

        @modal.method()
        def run(self) -> int:
            return 1

    app = modal.App("a")
    for cls in (Endpoints, Built):
        assert why(app.cls(serialized=True)(cls))
    server: Any = app.server(port=8000)(type("Server", (), {}))  # type: ignore[attr-defined]
    assert "on the host" in why(server) and "Server" in app.registered_classes


def test_all_reasons_are_told() -> None:
    @names.concurrent(max_inputs=2)
    @names.asgi_app()
    def serve() -> None: ...

    found = why(modal.App("a").function(serialized=True, schedule=names.Period(days=1))(serve))
    assert [word in found for word in ("@concurrent", "@asgi_app", "schedules")] == [True] * 3


def test_the_rest_is_built() -> None:
    app = modal.App("a")
    app.function(serialized=True, name="kept")(square)
    left = app.function(serialized=True, name="left", schedule=names.Period(days=1))(square)
    outer = modal.App("outer").include(app)
    spec = build("outer", outer.handles).spec
    assert [f.tag for f in spec.functions] == ["kept"] and spec.left_out == left._left_out() == outer.left_out
    assert from_dict(AppSpec, to_dict(spec)) == spec
    assert (spec.missing("left", None), spec.missing("kept", None)) == (spec.left_out[0], None)
    methods = AppSpec("a", spec.runtime, (), "", (LeftOut("C.m", "so"),))
    assert (methods.missing("C", "m"), methods.missing("C", "n")) == (methods.left_out[0], None)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("@modal.fastapi_endpoint\ndef f(): ...", r"write @fastapi_endpoint\(\), with parentheses"),
        (
            "@modal.asgi_app()\n@app.function(serialized=True)\ndef f(): ...",
            r"f: @asgi_app\(\) goes below @app.function",
        ),
        (
            "@modal.concurrent()\n@app.cls(serialized=True)\nclass C:\n  @modal.method()\n  def f(self): ...",
            "goes below",
        ),
        ("modal.concurrent()(3)", r"@concurrent\(\) is for functions and classes, got 3"),
        ("modal.Period(days=1).days", "'Period.days'; .*cron"),
        ("modal.Mount.from_nowhere()", "'Mount.from_nowhere'; .*sent with it"),
        ("modal.batched.aio", "'batched.aio'; .*list of inputs"),
        ("modal.App('a', volumes={'/x': modal.CloudBucketMount('b')})", r"App\('a'\): .*CloudBucketMount"),
        ("app.server()(3)", r"@app.server\(\) is for classes, got 3"),
    ],
)
def test_what_cannot_be_meant_for_one_function_is_refused(line: str, words: str) -> None:
    with pytest.raises(SpecError, match=words) as caught:
        exec(compile("\n" + line, "program.py", "exec"), {"app": modal.App("a"), "modal": modal})
    assert str(caught.value).endswith("(program.py:2)")


def test_they_are_in_modals_modules_too() -> None:
    for module, name in (("schedule", "Cron"), ("partial_function", "batched"), ("mount", "Mount")):
        assert getattr(importlib.import_module(f"woodfrog.{module}"), name) is getattr(woodfrog, name)
    exec("from woodfrog.experimental import clustered, http_server\nimport woodfrog.experimental", found := {})
    assert why(modal.App("a").function(serialized=True)(found["clustered"](size=2)(square)))
    assert names.experimental is found["woodfrog"].experimental and not hasattr(names.experimental, "nonsense")
    del square.__woodfrog_lacks__  # type: ignore[attr-defined]
    assert not hasattr(woodfrog, "Queue") and "Cron" not in dir(woodfrog)


def test_what_an_app_of_another_program_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from woodfrog.sdk import functions

    class Client:
        def request(self, *args: Any, **options: Any) -> Any:
            return self

        def json(self) -> Any:
            return {"functions": [], "left_out": [{"tag": "C", "why": "so (a.py:3)"}]}

    class Owner:
        def reach(self, tag: str) -> Any:
            return Client(), "a"

    for tag in ("C", "C.m"):
        with pytest.raises(SpecError, match=r"C is left out of its app: so \(a.py:3\)") as caught:
            functions.ask(Owner(), tag)
        assert caught.value.code == "left-out"
    with pytest.raises(NotFoundError):
        functions.ask(Owner(), "D")
