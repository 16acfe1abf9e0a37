"""What of a program's imports is read from its source, where a plan ends, and how layers are merged."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path
from typing import Any

import pytest

from woodfrog.backends.base import StartRequest
from woodfrog.backends.imports import OURS, installed, local_source, scan, serves
from woodfrog.backends.zygote import Plan, ZygoteConfig, Zygotes, load_key, make_plan
from woodfrog.errors import IncompatibleSnapshot, SandboxError
from woodfrog.snapshot.capture import uncover
from woodfrog.snapshot.compat import WorkerClass
from woodfrog.snapshot.manifest import FORMAT, Manifest
from woodfrog.spec import FunctionSpec, MethodSpec, RuntimeSpec, SourceSpec

INSTALLED = frozenset({"numpy", "pandas", "torch", "transformers"})


def found(source: str, **others: str) -> list[str]:
    """The steps of a program, woodfrog's left out; `a__b` stands for a.b, `a__` for the package a."""
    modules = {
        name.rstrip("_").replace("__", "."): (textwrap.dedent(text), name.endswith("_"))
        for name, text in others.items()
    }
    modules["app"] = (textwrap.dedent(source), False)
    return [step for step in scan("app", modules.get, INSTALLED.__contains__) if step != OURS]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            "import json, torch\nimport numpy.linalg as la\n"
            "from pandas import DataFrame, Series",
            "torch numpy.linalg pandas pandas:DataFrame pandas:Series",
        ),
        ("from torch import *", "torch"),
        ("import torch\nimport torch\nfrom torch import nn", "torch torch:nn"),
        ("import json, os", ""),
        ("def f():\n    import torch", ""),
        ("class A:\n    import torch", "torch"),
        ("import torch\nthis is no Python", ""),
        ("import nowhere\nimport torch", ""),
        ("import numpy\nimport nowhere\nimport torch", "numpy"),
        # try
        ("try:\n    import torch\nexcept ImportError:\n    import numpy", "torch"),
        ("try:\n    import nowhere\nexcept ImportError:\n    import numpy\nimport torch", "numpy torch"),
        ("try:\n    import nowhere\nexcept ValueError:\n    import numpy\nimport torch", ""),
        (
            "try:\n    import torch\nexcept ImportError:\n    pass\nelse:\n    import numpy\n"
            "finally:\n    import pandas",
            "torch numpy pandas",
        ),
        # conditions
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\nimport numpy", "numpy"),
        ("import typing as t\nif not t.TYPE_CHECKING:\n    import torch", "torch"),
        ("import numpy\nif __name__ == '__main__':\n    import torch", "numpy"),
        ("import numpy, os\nif os.environ.get('X'):\n    import torch\nimport pandas", "numpy"),
        ("import numpy, os\nif os.environ.get('X'):\n    Y = 1\nimport pandas", "numpy pandas"),
        ("import woodfrog\nif woodfrog.is_local():\n    import torch\nimport numpy", "numpy"),
        # what might change how the next import goes
        ("import os\nos.environ['X'] = '1'\nimport torch", ""),
        ("import os\nos.environ.setdefault('X', '1')\nimport torch", ""),
        ("import numpy, sys\nsys.path.insert(0, 'x')\nimport torch", "numpy"),
        ("import warnings\nwarnings.filterwarnings('ignore')\nimport torch", ""),
        ("import numpy\nwith numpy.errstate():\n    import torch", "numpy"),
        ("import numpy\nfor i in range(3):\n    pass\nimport torch", "numpy"),
        ("import numpy\ndef f(x=g()): ...\nimport torch", "numpy"),
        ("import numpy\n@g\ndef f(): ...\nimport torch", "numpy"),
        ("import numpy\ndef len(x): ...\nlen(1)\nimport torch", "numpy"),
        (
            "import numpy\nclass A:\n    @property\n    def f(self): ...\n    @f.setter\n"
            "    def f(self, x): ...\nimport torch",
            "numpy torch",
        ),
        ("import numpy\nf = lambda: g()\nimport torch", "numpy torch"),
        (
            "import logging, re\nlog = logging.getLogger('x')\nP = re.compile('x')\nN: int = 3\n"
            "A, B = 1, 2\nimport torch",
            "torch",
        ),
    ],
)  # fmt: skip
def test_what_a_program_surely_imports_first(source: str, expected: str) -> None:
    assert found(source) == expected.split()


def test_with_image_imports_and_decorators() -> None:
    source = """
        import woodfrog as modal
        image = modal.Image.debian_slim().pip_install("torch")
        app = modal.App("x", image=image)
        with image.imports():
            import torch
            from transformers import pipeline
        @app.cls(image=image, enable_memory_snapshot=True)
        class A:
            @modal.enter(snap=True)
            def load(self):
                import pandas
        import numpy
    """
    assert found(source) == ["torch", "transformers", "transformers:pipeline", "numpy"]
    both = ("import numpy, woodfrog", False)
    assert scan("app", {"app": both}.get, INSTALLED.__contains__) == (OURS, "numpy")


def test_the_programs_own_modules_are_followed_in_order() -> None:
    assert found(
        "import numpy\nfrom pkg import part\nimport helper, torch",
        pkg__="from . import other\n",
        pkg__other="from .deep import x\n",
        pkg__deep="import pandas\n",
        pkg__part="from ..app import x\n",
        helper="import app\nfrom transformers import pipeline",
    ) == ["numpy", "pandas"]  # `from ..app` leads out of the package: the program fails there
    assert found("import helper, torch", helper="import pandas\nsetup()\nimport numpy") == ["pandas"]
    assert found("import helper, torch", helper="import app\nimport numpy") == ["numpy", "torch"]


def test_a_module_of_ones_own_hides_the_installed_one() -> None:
    assert found("import numpy, torch", numpy="import pandas") == ["pandas", "torch"]
    assert found("import pandas, json, torch", json="x = 1") == ["pandas"]


@pytest.mark.parametrize(
    ("done", "wanted", "expected"),
    [
        ("torch", "torch", True),
        ("torch", "torch numpy", True),
        ("torch numpy", "torch", False),  # nothing is imported that a plain start would not import
        ("torch numpy", "numpy torch", False),
        ("torch pandas", "torch scipy pandas", False),
        ("torch", "torch:nn torch", False),
        # What loads nothing any more is on the way of every program that has come so far.
        ("torch (torch:nn) pandas", "torch torch:nn pandas scipy", True),
        ("torch (torch:nn) pandas", "torch pandas", True),
        ("torch (torch:nn) pandas (numpy)", "torch pandas scipy", True),
        ("torch (torch:nn) pandas", "torch torch:optim pandas", False),
        ("torch pandas (torch:nn)", "torch torch:nn pandas", False),
        ("numpy.linalg pandas", "numpy.linalg numpy pandas", True),
        ("numpy pandas", "numpy numpy pandas", True),
        ("", "torch", True),
        ("torch", "", False),
    ],
)
def test_a_zygote_serves_whoever_comes_by(done: str, wanted: str, expected: bool) -> None:
    assert serves(done.split(), wanted.split()) == expected


def test_plans_differ_by_what_imports_can_see(tmp_path: Path) -> None:
    root, site = tmp_path / "app", tmp_path / "site"
    (root / "sub").mkdir(parents=True)
    (site / "heavy").mkdir(parents=True)
    (site / "fast.cpython-311-x86_64-linux-gnu.so").touch()
    (root / "app.py").write_text("import woodfrog, heavy, fast, sub.x")
    (root / "sub" / "x.py").write_text("import elsewhere")
    runtime = RuntimeSpec("/usr/bin/python3", "/usr", "/usr", "3.11", sys_path=(str(site),))

    def plan(env: dict[str, str], *, key: bytes = b"k" * 32, hide_gpu: bool = False) -> Plan:
        made = make_plan("app", root, runtime, env, key=key, hide_gpu=hide_gpu)
        assert made is not None and made.steps == (OURS, "heavy", "fast")
        return made

    first = plan({"A": "1"})
    assert plan({"A": "1", "WOODFROG_INSTANCE": "i-1", "MODAL_TASK_ID": "i-1"}) == first
    (root / "app.py").write_text("import woodfrog, heavy, fast\nVERSION = 2")
    assert plan({"A": "1"}) == first
    others = [plan({"A": "2"}), plan({"A": "1"}, hide_gpu=True), plan({"A": "1"}, key=b"l" * 32)]
    assert len({first.key, *(o.key for o in others)}) == 4
    assert others[0].own == first.own != others[2].own and first.own.steps == (OURS,)
    (root / "matplotlibrc").write_text("backend: Agg")
    assert plan({"A": "1"}).key != first.key
    (root / "x.dist-info").mkdir()
    assert make_plan("app", root, runtime, {}, key=b"k") is None


def test_a_key_that_others_could_read_is_not_used_any_more(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "zygotes"
    key = load_key(path)
    assert len(key) == 32 and load_key(path) == key and path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    other = load_key(path)
    assert other != key and path.stat().st_mode & 0o777 == 0o600 and load_key(path) == other
    path.write_bytes(b"short")
    assert len(load_key(path)) == 32


def test_sources_on_disk(tmp_path: Path) -> None:
    (tmp_path / "pkg").mkdir()
    (tmp_path / "space").mkdir()
    (tmp_path / "pkg" / "__init__.py").write_text("a = 1")
    (tmp_path / "mod.py").write_text("b = 1")
    source = local_source(tmp_path)
    assert source("pkg") == ("a = 1", True) and source("mod") == ("b = 1", False)
    assert source("space") == ("", True) and source("pkg.none") is None and source("json") is None
    assert installed((str(tmp_path), "/nowhere"))("mod") and not installed(("/nowhere",))("mod")


def test_an_upper_layer_replaces_what_it_lies_on(tmp_path: Path) -> None:
    upper, lower = tmp_path / "upper", tmp_path / "lower"
    for folder in (upper / "both", upper / "was-file", lower / "both", lower / "was-dir" / "deep"):
        folder.mkdir(parents=True)
    for file in (
        upper / "both" / "new",
        upper / "was-dir",
        lower / "both" / "old",
        lower / "both" / "new",
        lower / "was-file",
    ):
        file.write_text("x")
    os.symlink("/etc", lower / "link")
    (upper / "link").mkdir()
    uncover(upper, lower)
    assert sorted(p.relative_to(lower).as_posix() for p in lower.rglob("*")) == ["both", "both/old"]


class Shelf:
    """A catalogue of zygotes with nothing in them."""

    def __init__(self) -> None:
        self.held: list[Manifest] = []
        self.out: dict[str, str] = {}
        self.removed: list[str] = []

    def add(self, name: str, key: str, modules: str, *, seen: str = "", worker_class: str = "here") -> None:
        manifest = Manifest(
            FORMAT, name, Zygotes.function_key(key), worker_class, {}, "", "(zygote)", "", float(len(self.held)), 100,
            1, 0, 0, (), kind="zygote", modules=tuple(modules.split()), seen=tuple(seen.split()),
        )  # fmt: skip
        self.held.append(manifest)

    def manifests(self) -> list[Manifest]:
        return list(self.held)

    def retired(self, name: str) -> str | None:
        return self.out.get(name)

    def retire(self, name: str, why: str) -> None:
        self.out[name] = why

    def remove(self, name: str, *, wait: bool = True) -> None:
        assert not wait, "it may be large, and this is the event loop"
        self.removed.append(name)


def shelf_and_zygotes(tmp_path: Path, **config: Any) -> tuple[Shelf, Zygotes]:
    shelf: Any = Shelf()
    nothing: Any = None
    zygotes = Zygotes(
        ZygoteConfig(tmp_path / "keys" / "zygotes", tmp_path, **config),
        catalogue=shelf,
        factory=nothing,
        criu=nothing,
        worker_class=WorkerClass("here"),
        busy=lambda: False,
        in_use=lambda: {"z-used"},
    )
    return shelf, zygotes


def test_the_furthest_zygote_on_a_programs_way_is_taken_while_it_is_good(tmp_path: Path) -> None:
    shelf, zygotes = shelf_and_zygotes(tmp_path)
    shelf.add("z-base", "base", OURS)
    shelf.add("z-numpy", "k", f"{OURS} numpy")
    shelf.add("z-both", "k", f"{OURS} numpy (numpy:array) torch", seen="numpy torch secrets")
    shelf.add("z-long", "k", f"{OURS} numpy torch pandas")
    shelf.add("z-env", "another", f"{OURS} numpy torch scipy")
    shelf.add("z-host", "k", f"{OURS} numpy torch scipy", worker_class="elsewhere")

    def found(steps: str, *names: str) -> str:
        manifest = zygotes.find(Plan("k", "base", tuple(f"{OURS} {steps}".split()), frozenset(names)))
        return manifest.id if manifest else ""

    assert found("numpy numpy:array torch scipy") == "z-both"
    assert found("numpy torch pandas") == "z-long"
    assert found("numpy torch scipy", "secrets") == "z-numpy"
    assert found("torch numpy") == "z-base"
    zygotes.failed("z-both", SandboxError("no"))
    assert found("numpy torch scipy") == "z-both"
    zygotes.failed("z-both", SandboxError("no"))
    assert found("numpy torch scipy") == "z-numpy"
    zygotes.failed("z-numpy", TimeoutError())
    assert found("numpy torch scipy") == "z-base"
    zygotes.failed("z-base", IncompatibleSnapshot("changed"))
    assert found("numpy torch scipy") == "" and "z-base" in shelf.out


def test_what_was_used_last_is_kept(tmp_path: Path) -> None:
    shelf, zygotes = shelf_and_zygotes(tmp_path, keep=2)
    for name in ("z-a", "z-used", "z-b", "z-c", "z-d", "z-out"):
        shelf.add(name, name, OURS)
    shelf.out["z-out"] = "old"
    zygotes.find(Plan("z-a", "", (OURS,), frozenset()))
    zygotes.trim()
    assert shelf.removed == ["z-b", "z-c", "z-out"]


async def test_what_had_to_go_for_others_is_not_made_in_turn_with_them(tmp_path: Path) -> None:
    shelf, zygotes = shelf_and_zygotes(tmp_path, keep=1, min_ms=50)
    plan = Plan("k", "base", (OURS, "torch"), frozenset())

    def wanted() -> list[tuple[str, ...]]:
        jobs = list(zygotes._jobs)
        zygotes._jobs.clear()
        return [steps for _, steps in jobs]

    runtime = RuntimeSpec("/usr/bin/python3", "/usr", "/usr", "3.11")
    request = StartRequest("i-1", "a", "a", nothing_spec(), runtime, "f", "cold", None, False, {"SECRET": "x"})
    zygotes.started(request, {"SECRET": "x"}, tmp_path, plan, 49)
    own = next(iter(zygotes._jobs.values()))
    # What is there for everybody has nothing of anybody's.
    assert own.plan == plan.own and "SECRET" not in own.env and own.code is None
    assert wanted() == [(OURS,)]
    zygotes.started(request, {}, tmp_path, plan, 51)
    assert wanted() == [(OURS,), (OURS, "torch")]
    shelf.add("z-base", "base", OURS)
    shelf.add("z-torch", "k", f"{OURS} torch")
    zygotes.started(request, {}, tmp_path, plan, 51)
    assert wanted() == []
    zygotes.find(plan)
    zygotes.trim()
    assert shelf.removed == ["z-base"]
    shelf.held.pop(0)
    zygotes.started(request, {}, tmp_path, plan, 51)
    assert wanted() == []
    shelf.held.clear()  # removed by hand
    zygotes.started(request, {}, tmp_path, plan, 51)
    assert wanted() == [(OURS, "torch")]
    await zygotes.close()
    zygotes.started(request, {}, tmp_path, plan, 51)
    assert wanted() == [] and zygotes._maker is not None and zygotes._maker.done()


def nothing_spec() -> FunctionSpec:
    return FunctionSpec("f", "function", SourceSpec("module", "app", "f"), (MethodSpec("f"),))
