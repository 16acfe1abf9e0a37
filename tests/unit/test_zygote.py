"""What of a program's imports is read from its source, where a plan ends, and how layers are merged."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path

import pytest

from woodfrog.backends.zygote import Import, installed, local_source, make_plan, scan
from woodfrog.snapshot.capture import uncover
from woodfrog.spec import RuntimeSpec

INSTALLED = frozenset({"numpy", "pandas", "torch", "transformers"})


def found(source: str, **others: str) -> list[str]:
    """Modules and names of a program, woodfrog's left out; `a__b` stands for a.b, `a__` for the package a."""
    modules = {
        name.rstrip("_").replace("__", "."): (textwrap.dedent(text), name.endswith("_"))
        for name, text in others.items()
    }
    modules["app"] = (textwrap.dedent(source), False)
    imports = scan("app", modules.get, INSTALLED.__contains__)
    return [".".join([i.module, *i.names]) for i in imports if not i.module.startswith("woodfrog")]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            "import json, torch\nimport numpy.linalg as la\n"
            "from pandas import DataFrame, Series",
            "torch numpy.linalg pandas.DataFrame.Series",
        ),
        ("from torch import *", "torch"),
        ("import torch\nimport torch\nfrom torch import nn", "torch torch.nn"),
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
    assert found(source) == ["torch", "transformers.pipeline", "numpy"]
    assert scan("app", {"app": ("import woodfrog", False)}.get, INSTALLED.__contains__) == ()


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


def test_plans_differ_by_what_imports_can_see(tmp_path: Path) -> None:
    root, site = tmp_path / "app", tmp_path / "site"
    (root / "sub").mkdir(parents=True)
    (site / "heavy").mkdir(parents=True)
    (site / "fast.cpython-311-x86_64-linux-gnu.so").touch()
    (root / "app.py").write_text("import heavy, fast, sub.x")
    (root / "sub" / "x.py").write_text("import elsewhere")
    runtime = RuntimeSpec("/usr/bin/python3", "/usr", "/usr", "3.11", sys_path=(str(site),))

    def plan(env: dict[str, str], *, hide_gpu: bool = False) -> str:
        made = make_plan("app", root, runtime, env, hide_gpu=hide_gpu)
        assert made is not None and made.imports == (Import("heavy"), Import("fast"))
        return made.key

    first = plan({"A": "1"})
    assert plan({"A": "1", "WOODFROG_INSTANCE": "i-1"}) == first
    (root / "app.py").write_text("import heavy, fast\nVERSION = 2")
    assert plan({"A": "1"}) == first
    assert len({first, plan({"A": "2"}), plan({"A": "1"}, hide_gpu=True)}) == 3
    (root / "matplotlibrc").write_text("backend: Agg")
    assert plan({"A": "1"}) != first
    (root / "x.dist-info").mkdir()
    assert make_plan("app", root, runtime, {}, hide_gpu=False) is None


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
