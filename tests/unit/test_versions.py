"""What differs between who pickled and who cannot unpickle."""

from __future__ import annotations

import io
import pickle
import platform
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle
import pytest

from woodfrog import versions
from woodfrog.errors import SerializationError
from woodfrog.sdk import call, payload
from woodfrog.worker import codec

PYTHON = platform.python_version()


@pytest.fixture
def pond(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A package, and in it `Frog`, `toad`."""
    module = ModuleType("pond.deep")
    top = ModuleType("pond")
    for name, made in (("pond", top), ("pond.deep", module)):
        monkeypatch.setitem(sys.modules, name, made)
    exec("class Frog: ...\ndef toad(): ...", vars(module))
    top.deep = module  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_modules_of_a_pickle(pond: Any, protocol: int) -> None:
    value = ["pond2", "yaml", {"a": (pond.Frog(), pond.toad, pond.Frog())}, Path("x"), PYTHON]
    assert versions.modules_of(pickle.dumps(value, protocol)) == ["pond"]
    body = io.BytesIO(pickle.dumps(value, protocol))
    assert versions.modules_of(body) == ["pond"] and body.tell() == 0
    assert versions.modules_of(pickle.dumps([1, "pond", b"x" * 1000], protocol)) == []


def test_modules_of_what_is_cut_off_or_no_pickle(pond: Any) -> None:
    assert versions.modules_of(pickle.dumps([pond.Frog(), "x" * 1000])[:-500]) == ["pond"]
    assert versions.modules_of(b"\x80\x05no pickle") == versions.modules_of(b"") == []
    # Code that travels by value is made by cloudpickle, from what one Python alone understands.
    assert versions.modules_of(cloudpickle.dumps(lambda: 3)) == ["cloudpickle"]


def test_versions_here(pond: Any) -> None:
    import pytest as installed

    found = versions.here(["pond", "pytest", "no_such_module"])
    assert found == {"Python": PYTHON, "pytest": installed.__version__, "no_such_module": "not installed"}
    sys.modules["pond"].__version__ = "3.1"  # type: ignore[attr-defined]
    assert versions.here(["pond"])["pond"] == "3.1"


def test_versions_of_another_environment(tmp_path: Path) -> None:
    for name, version, top in (("Py-Pond", "1.0", "pond"), ("water_lily", "2.0", None)):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        if top:
            (folder / "top_level.txt").write_text(f"{top}\n")
    (tmp_path / "own.py").write_text("")
    wanted = ["pond", "water_lily", "own", "elsewhere"]
    assert versions.installed_at([str(tmp_path)], wanted, "3.12.1") == {
        "Python": "3.12.1",
        "pond": "1.0",
        "water_lily": "2.0",
        "elsewhere": "not installed",
    }
    # Of another machine nothing is known but what the daemon says.
    assert versions.installed_at([str(tmp_path / "none")], wanted, "3.12.1") == {"Python": "3.12.1"}


def test_what_differs() -> None:
    names = "here", "there"
    one = {"Python": "3.11.2", "a": "1", "b": "2", "c": "3"}
    assert versions.difference(one, {"Python": "3.11.9", "a": "1", "d": "4"}, names) == ""
    assert versions.difference(one, {"Python": "3.12.0", "b": "not installed"}, names) == (
        "Python is 3.11.2 here and 3.12.0 there, b is 2 here and not installed there"
    )


class Client:
    """Of a daemon that runs a function with another Python."""

    def __init__(self, **answers: Any) -> None:
        self.answers = {"/calls/c1/trace": {"app": "demo"}, "/apps/demo": {"runtime": answers}}

    def request(self, method: str, path: str) -> Any:
        answer = self.answers[path]
        return type("Reply", (), {"json": lambda self: answer})()


def test_arguments_that_a_container_cannot_read(pond: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    body = bytearray(pickle.dumps(((pond.Frog(),), {})))
    sys.modules["pond"].__version__ = "1.0"  # type: ignore[attr-defined]
    monkeypatch.delattr(pond, "Frog")
    with pytest.raises(SerializationError) as caught:
        codec.load_arguments(body, "pickle", "f()")
    assert caught.value.fields["versions"] == {"Python": PYTHON, "pond": "1.0"}
    error = pickle.loads(pickle.dumps(caught.value))
    sys.modules["pond"].__version__ = "2.0"  # type: ignore[attr-defined]
    client: Any = Client()
    words = r"code\? pond is 2.0 here and 1.0 in the container$"
    with pytest.raises(SerializationError, match=words), call._versions_told(client, "c1"):
        raise error
    with pytest.raises(SerializationError) as plain:
        codec.load_arguments(bytearray(b"{"), "json", "f()")
    assert plain.value.fields == {}


def test_a_result_that_the_client_cannot_read(pond: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    body = pickle.dumps(pond.Frog())
    monkeypatch.delattr(pond, "Frog")
    client: Any = Client(sys_path=[str(tmp_path)], version="3.1.4")
    words = rf"types; Python is {PYTHON} here and 3.1.4 in the container$"
    with pytest.raises(SerializationError, match=words), call._versions_told(client, "c1"):
        payload.load_result(body, "f")
    # What tells of it may be missing; the error stays.
    with pytest.raises(SerializationError, match=r"types$"), call._versions_told(client, "c2"):
        payload.load_result(body, "f")
