"""Images: where their packages are named, and steps that are recorded."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from woodfrog import App, Image
from woodfrog.errors import SpecError
from woodfrog.sdk import checks
from woodfrog.sdk.deploy import build

PYPROJECT = """
[project]
name = "shop"
dependencies = ["numpy>=2", "requests[socks]"]
[project.optional-dependencies]
plot = ["matplotlib"]
[dependency-groups]
web = ["flask", {include-group = "base"}]
base = ["rich", {include-group = "web"}]
"""

POETRY = """
[tool.poetry.dependencies]
python = "^3.11"
numpy = "^2.0"
torch = {version = "*", optional = true}
requests = {version = "^2", extras = ["socks"]}
[tool.poetry.group.web.dependencies]
flask = "*"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    (tmp_path / "poetry.toml").write_text(POETRY)
    (tmp_path / "a.txt").write_text("numpy>=2  # why\n-r b.txt\n\n# c\n")
    (tmp_path / "b.txt").write_text("rich\n")
    return tmp_path


def packages(image: Image) -> tuple[str, ...]:
    return image.spec.packages


def test_requirements_of_uv_pip_install(folder: Path) -> None:
    slim = Image.debian_slim()
    assert packages(slim.uv_pip_install("flask", requirements=["a.txt", "b.txt"])) == ("flask", "numpy>=2", "rich")
    assert packages(slim.uv_pip_install(requirements=["a.txt"])) == ("numpy>=2",)
    assert packages(slim.uv_pip_install(["flask", "rich"], pre=True)) == ("flask", "rich")
    with pytest.raises(SpecError, match=r"uv_pip_install: none.txt: No such file"):
        slim.uv_pip_install(requirements=["none.txt"])


def test_dependencies_of_projects(folder: Path) -> None:
    slim, own = Image.debian_slim(), ("numpy>=2", "requests[socks]")
    assert packages(slim.uv_sync()) == packages(slim.uv_sync(str(folder), frozen=True)) == own
    assert packages(slim.uv_sync(extras=["plot"], groups=["web"])) == (*own, "matplotlib", "flask", "rich")
    assert packages(slim.pip_install_from_pyproject("pyproject.toml")) == own
    assert packages(slim.pip_install_from_pyproject("pyproject.toml", ["plot"])) == (*own, "matplotlib")
    assert packages(slim.poetry_install_from_file("poetry.toml")) == ("numpy", "requests")
    assert packages(slim.poetry_install_from_file("poetry.toml", with_=["web"])) == ("numpy", "requests", "flask")
    assert packages(slim.poetry_install_from_file("pyproject.toml")) == own


def test_projects_that_cannot_be_read(folder: Path) -> None:
    slim = Image.debian_slim()
    with pytest.raises(SpecError, match=r"uv_sync: .*nowhere/pyproject.toml: No such file"):
        slim.uv_sync("nowhere")
    with pytest.raises(SpecError, match=r"poetry.toml has no \[project\] dependencies"):
        slim.pip_install_from_pyproject("poetry.toml")
    with pytest.raises(SpecError, match="'plt' is not there; did you mean 'plot'"):
        slim.uv_sync(extras=["plt"])
    with pytest.raises(SpecError, match="group 'dev' is not there"):
        slim.poetry_install_from_file("poetry.toml", with_=["dev"])
    (folder / "pyproject.toml").write_text("no toml")
    with pytest.raises(SpecError, match=r"uv_sync: pyproject.toml: .*line 1"):
        slim.uv_sync()


def test_files_of_the_client_are_not_read_in_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "woodfrog.worker.state", sys)
    image = Image.debian_slim().uv_sync().uv_pip_install("numpy", requirements=["r.txt"])
    image = image.pip_install_from_pyproject("p.toml").poetry_install_from_file("p.toml")
    assert packages(image) == ("numpy",)


async def test_steps_that_are_recorded(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(checks, "_noted", set())
    assert Image.from_aws_ecr("1.dkr.ecr/x", None).spec.steps == ("from_aws_ecr 1.dkr.ecr/x",)
    assert Image.from_gcp_artifact_registry("g/x").spec.steps == ("from_gcp_artifact_registry g/x",)
    assert Image.from_scratch().spec.steps == ("from_scratch",)
    assert Image.from_id("im-1").spec == (await Image.from_id.aio("im-1")).spec
    image = Image.debian_slim().pip_install_private_repos("github.com/a/b@1", git_user="me", secrets=[])

    def f() -> None: ...

    app = App("a")
    app.function(image=image, serialized=True)(f)
    build("a", list(app.registered_functions.values()))
    assert "not run: pip_install_private_repos github.com/a/b@1" in capsys.readouterr().err


def test_pipe() -> None:
    def recipe(image: Image, name: str, *, more: str) -> Image:
        return image.pip_install(name, more)

    assert packages(Image.debian_slim().pipe(recipe, "numpy", more="rich")) == ("numpy", "rich")
