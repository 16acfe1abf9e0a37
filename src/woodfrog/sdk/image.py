"""Images: what a program asks of its environment. Recorded step by step; packages are checked against the host's."""

from __future__ import annotations

import posixpath
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

from woodfrog.errors import SpecError
from woodfrog.sdk import checks
from woodfrog.sdk.dual import ClassDual
from woodfrog.sdk.hooks import in_worker
from woodfrog.spec import ImageSpec, LocalFiles

__all__ = ["Image"]

P = ParamSpec("P")

_BUILD = ("env", "secrets", "gpu", "force_build")
_PIP = (*_BUILD, "find_links", "index_url", "extra_index_url", "pre", "extra_options")
_REGISTRY = ("setup_dockerfile_commands", "force_build")
_DOCKERFILE = (*_BUILD, "context_dir", "context_mount", "ignore", "build_args")
_OPTIONS: dict[str, tuple[str, ...]] = {
    "apt_install": _BUILD,
    "dockerfile_commands": (*_DOCKERFILE, "context_files"),
    "from_aws_ecr": _REGISTRY,
    "from_dockerfile": (*_DOCKERFILE, "registry_secret", "add_python"),
    "from_gcp_artifact_registry": _REGISTRY,
    "from_registry": _REGISTRY,
    "micromamba_install": (*_BUILD, "spec_file", "channels"),
    "pip_install": _PIP,
    "pip_install_from_pyproject": _PIP,
    "pip_install_from_requirements": _PIP,
    "pip_install_private_repos": _PIP,
    "poetry_install_from_file": (*_BUILD, "ignore_lockfile", "without", "only", "poetry_version", "old_installer"),
    "run_commands": (*_BUILD, "volumes"),
    "run_function": (
        *_BUILD,
        *("args", "kwargs", "include_source", "timeout", "cpu", "memory", "cloud", "region", "volumes"),
        *("mounts", "network_file_systems", "shared_volumes"),
    ),
    "uv_pip_install": (*_PIP, "uv_version"),
    "uv_sync": (*_BUILD, "frozen", "extra_options", "uv_version"),
}
"""Modal's parameters of the steps, beside those that count here: how an image is built, not what is in it."""


def _known(step: str, options: Mapping[str, Any]) -> None:
    checks.known(f"Image.{step}", options, _OPTIONS[step])


@checks.lacking(
    {
        "build": "images are not built; what their packages need is told at deploy",
        "conda": "use Image.micromamba, or an environment of conda's to deploy from",
        "copy_local_dir": "use add_local_dir",
        "copy_local_file": "use add_local_file",
        "copy_mount": "use add_local_dir or add_local_file",
        "from_name": "images are not built",
        "get_dashboard_url": "images are not built",
        "hydrate": "images are not built",
        "logs": "images are not built",
        "object_id": "images are not built",
        "publish": "images are not built",
    }
)
class Image:
    """A recipe for an environment. Immutable: every method gives a new one.

    Functions run in the Python environment that deploys them. `pip_install` is checked against it, `env` and `workdir`
    are set, local files are sent, and the other steps are recorded without being run.

    Example:
        >>> import woodfrog
        >>> image = woodfrog.Image.debian_slim().pip_install("numpy>=2").env({"OMP_NUM_THREADS": "1"})
        >>> image.spec.packages
        ('numpy>=2',)
    """

    def __init__(self, spec: ImageSpec | None = None) -> None:
        self.spec = spec or ImageSpec()

    def _step(
        self,
        text: str,
        packages: Iterable[str] = (),
        env: Mapping[str, str] | None = None,
        files: Iterable[LocalFiles] = (),
    ) -> Image:
        return Image(
            replace(
                self.spec,
                packages=(*self.spec.packages, *packages),
                env={**self.spec.env, **(env or {})},
                steps=(*self.spec.steps, text),
                files=(*self.spec.files, *files),
            )
        )

    # Where an image begins.

    @classmethod
    def debian_slim(cls, python_version: str | None = None, force_build: bool = False) -> Image:
        """The ordinary beginning. `python_version` should be that of the environment which deploys."""
        del force_build
        _check_python(python_version, "Image.debian_slim")
        return cls()._step("debian_slim" + (f" {python_version}" if python_version else ""))

    @classmethod
    def micromamba(cls, python_version: str | None = None, force_build: bool = False) -> Image:
        """Recorded; packages still come from the environment that deploys."""
        del force_build
        _check_python(python_version, "Image.micromamba")
        return cls()._step("micromamba")

    @classmethod
    def from_registry(cls, tag: str, secret: Any = None, *, add_python: str | None = None, **options: Any) -> Image:
        """Recorded; functions run on the host's own files."""
        del secret
        _known("from_registry", options)
        _check_python(add_python, "Image.from_registry")
        return cls()._step(f"from_registry {tag}")

    @classmethod
    def from_aws_ecr(cls, tag: str, secret: Any = None, *, add_python: str | None = None, **options: Any) -> Image:
        """As `from_registry`."""
        del secret
        _known("from_aws_ecr", options)
        _check_python(add_python, "Image.from_aws_ecr")
        return cls()._step(f"from_aws_ecr {tag}")

    @classmethod
    def from_gcp_artifact_registry(
        cls, tag: str, secret: Any = None, *, add_python: str | None = None, **options: Any
    ) -> Image:
        """As `from_registry`."""
        del secret
        _known("from_gcp_artifact_registry", options)
        _check_python(add_python, "Image.from_gcp_artifact_registry")
        return cls()._step(f"from_gcp_artifact_registry {tag}")

    @classmethod
    def from_scratch(cls, force_build: bool = False) -> Image:
        """Recorded; functions run on the host's own files."""
        del force_build
        return cls()._step("from_scratch")

    @ClassDual
    @classmethod
    def from_id(cls, image_id: str, client: Any = None) -> Image:
        """Recorded; images of Modal's are not here."""
        del client
        return cls()._step(f"from_id {image_id}")

    @classmethod
    def from_dockerfile(cls, path: str | Path, **options: Any) -> Image:
        """Recorded; functions run on the host's own files."""
        _known("from_dockerfile", options)
        return cls()._step(f"from_dockerfile {path}")

    # Python packages: checked at deploy.

    def pip_install(self, *packages: str | list[str], **options: Any) -> Image:
        """Python packages the functions need, as requirements (`"torch>=2"`). Checked when the app is deployed.

        Raises:
            SpecError: something that is not a requirement.
        """
        _known("pip_install", options)
        names = _requirements(packages, "pip_install")
        return self._step(_words("pip_install", *names, env=options.pop("env", None)), names)

    def uv_pip_install(
        self, *packages: str | list[str], requirements: Iterable[str | Path] | None = None, **options: Any
    ) -> Image:
        """As `pip_install`; and as `pip_install_from_requirements` for each file of `requirements`.

        Raises:
            SpecError: something that is not a requirement, or a file that cannot be read.
        """
        _known("uv_pip_install", options)
        files = [requirements] if isinstance(requirements, (str, Path)) else list(requirements or ())
        names = _requirements(packages, "uv_pip_install")
        for file in files:
            names += _requirements_file(file, "uv_pip_install")
        return self._step(_words("uv_pip_install", *_flat([*packages, *files]), env=options.pop("env", None)), names)

    def pip_install_from_requirements(self, requirements_txt: str | Path, **options: Any) -> Image:
        """The packages of a requirements file, as `pip_install`.

        Raises:
            SpecError: the file cannot be read.
        """
        _known("pip_install_from_requirements", options)
        names = _requirements_file(requirements_txt, "pip_install_from_requirements")
        return self._step(f"pip_install_from_requirements {requirements_txt}", names)

    def pip_install_from_pyproject(
        self, pyproject_toml: str | Path, optional_dependencies: Iterable[str] = (), **options: Any
    ) -> Image:
        """The `[project] dependencies` of a pyproject.toml, and the optional ones of these names, as `pip_install`.

        Raises:
            SpecError: the file cannot be read, or has no such dependencies.
        """
        _known("pip_install_from_pyproject", options)
        what = "pip_install_from_pyproject"
        names = _pyproject(pyproject_toml, what, extras=tuple(optional_dependencies))
        return self._step(f"{what} {pyproject_toml}", names)

    def uv_sync(
        self,
        uv_project_dir: str | Path = "./",
        *,
        groups: Iterable[str] | None = None,
        extras: Iterable[str] | None = None,
        **options: Any,
    ) -> Image:
        """The dependencies in a uv project's pyproject.toml, with these groups and extras, as `pip_install`.

        The versions of uv.lock are not asked for.

        Raises:
            SpecError: the file cannot be read, or has no such dependencies.
        """
        _known("uv_sync", options)
        file = Path(uv_project_dir) / "pyproject.toml"
        names = _pyproject(file, "uv_sync", extras=tuple(extras or ()), groups=tuple(groups or ()))
        return self._step(f"uv_sync {uv_project_dir}", names)

    def poetry_install_from_file(
        self,
        poetry_pyproject_toml: str | Path,
        poetry_lockfile: str | Path | None = None,
        *,
        with_: Iterable[str] = (),
        **options: Any,
    ) -> Image:
        """The dependencies in a Poetry project's pyproject.toml, with the groups of `with_`, as `pip_install`.

        Of Poetry's own table (`[tool.poetry.dependencies]`) the names are checked, and no versions.

        Raises:
            SpecError: the file cannot be read.
        """
        del poetry_lockfile
        _known("poetry_install_from_file", options)
        names = _poetry(poetry_pyproject_toml, tuple(with_))
        return self._step(f"poetry_install_from_file {poetry_pyproject_toml}", names)

    def pip_install_private_repos(self, *repositories: str, git_user: str, **options: Any) -> Image:
        """Recorded, not run: install these packages in the environment that deploys."""
        del git_user
        _known("pip_install_private_repos", options)
        return self._step(_words("pip_install_private_repos", *repositories))

    # Everything else: recorded.

    def env(self, vars: Mapping[str, str]) -> Image:
        """Environment variables of the functions.

        Raises:
            SpecError: names or values that cannot stand in an environment.
        """
        values = checks.environment(vars, "Image.env")
        return self._step(_words("env", *sorted(values)), env=values)

    def apt_install(self, *packages: str | list[str], **options: Any) -> Image:
        """Recorded, not run: install system packages on the host."""
        _known("apt_install", options)
        return self._step(_words("apt_install", *_flat(packages)))

    def micromamba_install(self, *packages: str | list[str], **options: Any) -> Image:
        """Recorded, not run."""
        _known("micromamba_install", options)
        return self._step(_words("micromamba_install", *_flat(packages)))

    def run_commands(self, *commands: str | list[str], **options: Any) -> Image:
        """Recorded, not run."""
        _known("run_commands", options)
        return self._step(_words("run_commands", *_flat(commands)))

    def dockerfile_commands(self, *commands: str | list[str], **options: Any) -> Image:
        """Recorded, not run."""
        _known("dockerfile_commands", options)
        return self._step(_words("dockerfile_commands", *_flat(commands)))

    def run_function(self, raw_f: Callable[..., Any], **options: Any) -> Image:
        """Recorded, not run."""
        _known("run_function", options)
        return self._step(_words("run_function", getattr(raw_f, "__qualname__", repr(raw_f))))

    def add_local_file(self, local_path: str | Path, remote_path: str, *, copy: bool = False) -> Image:
        """Have a file sent with the code, to `remote_path` in the container (below it, where that ends in `/`).

        It is read when the app is deployed. Files beside the program are sent without being named, to /app.

        Raises:
            SpecError: no absolute path.
        """
        del copy
        remote = _remote(remote_path, "add_local_file")
        if str(remote_path).endswith("/"):
            remote = posixpath.join(remote, Path(local_path).name)
        files = LocalFiles(str(local_path), remote)
        return self._step(_words("add_local_file", str(local_path), remote), files=[files])

    def add_local_dir(self, local_path: str | Path, remote_path: str, *, copy: bool = False, ignore: Any = ()) -> Image:
        """Have a directory sent with the code, as `remote_path` in the container.

        It is read when the app is deployed. Directories beside the program are sent without being named, to /app.

        Args:
            ignore: what to leave out: patterns as in .gitignore, or a function of a relative path.

        Raises:
            SpecError: no absolute path.
        """
        del copy
        files = LocalFiles(str(local_path), _remote(remote_path, "add_local_dir"), _ignored(local_path, ignore))
        return self._step(_words("add_local_dir", str(local_path), files.remote), files=[files])

    def add_local_python_source(self, *modules: str, copy: bool = False, ignore: Any = ()) -> Image:
        """Have modules or packages sent with the code, by name (`"mylib"`): from the program's directory, the working
        directory, or wherever this Python finds them. Installed ones are there anyway.

        One that exists nowhere is a `SpecError` when the app is deployed.
        """
        del copy, ignore
        return self._step(_words("add_local_python_source", *modules))

    def workdir(self, path: str | Path) -> Image:
        """Have functions start in this directory of the container, which is made if need be; otherwise it is /app.

        Raises:
            SpecError: no absolute path.
        """
        where = posixpath.normpath(str(path))
        if not where.startswith("/") or where.startswith("//"):
            raise SpecError(f"Image.workdir: {str(path)!r} is not an absolute path ({checks.caller()})")
        return Image(replace(self._step(f"workdir {where}").spec, workdir=where))

    def entrypoint(self, entrypoint_commands: list[str]) -> Image:
        """Recorded, not carried out."""
        return self._step(_words("entrypoint", *entrypoint_commands))

    def cmd(self, cmd: list[str]) -> Image:
        """Recorded, not carried out."""
        return self._step(_words("cmd", *cmd))

    def shell(self, shell_commands: list[str]) -> Image:
        """Recorded, not carried out."""
        return self._step(_words("shell", *shell_commands))

    def pipe(self, func: Callable[Concatenate[Image, P], Image], *args: P.args, **kwargs: P.kwargs) -> Image:
        """`func(image, *args, **kwargs)`: a recipe of one's own among the steps.

        Example:
            >>> def science(image, *more):
            ...     return image.pip_install("numpy", *more)
            >>> Image.debian_slim().pipe(science, "scipy").spec.packages
            ('numpy', 'scipy')
        """
        return func(self, *args, **kwargs)

    def imports(self) -> AbstractContextManager[None]:
        """Imports that are of use inside a container only.

        On the client a missing module is ignored, and an installed package is imported when it is first used there: a
        program that only deploys, or calls, does not wait for it.

        Example:
            >>> image = Image.debian_slim().pip_install("torch")
            >>> with image.imports():
            ...     import torch
        """
        if in_worker():
            return nullcontext()
        return _imports(sys._getframe(1).f_globals)

    def __repr__(self) -> str:
        return f"<Image {' | '.join(self.spec.steps)}>"


@contextmanager
def _imports(namespace: dict[str, Any]) -> Iterator[None]:
    from woodfrog.sdk.deferred import Deferred

    try:
        with Deferred(namespace):
            yield
    except ImportError:
        pass
    except Exception as e:
        checks.note(f"imports:{type(e).__name__}:{e}", f"ignored in image.imports() on the client: {e!r}")


def _flat(values: Iterable[Any]) -> list[str]:
    found: list[str] = []
    for value in values:
        found += _flat(value) if isinstance(value, (list, tuple)) else [str(value)]
    return found


def _words(*words: str, env: Any = None) -> str:
    return " ".join(str(w) for w in words) + (f" (env {', '.join(sorted(env))})" if env else "")


def _remote(path: Any, where: str) -> str:
    text = posixpath.normpath(str(path))
    if not text.startswith("/") or text.startswith("//") or text == "/":
        raise SpecError(f"Image.{where}: {str(path)!r} is not an absolute path below / ({checks.caller()})")
    return text


def _ignored(local_path: str | Path, ignore: Any) -> tuple[str, ...]:
    """`ignore=` as patterns."""
    if isinstance(ignore, str):
        return (ignore,)
    if not callable(ignore):
        return tuple(map(str, ignore))
    if in_worker():  # The files are the client's.
        return ()
    root = Path(local_path)
    found = (p.relative_to(root) for p in root.rglob("*") if not p.is_dir())
    return tuple("/" + re.sub(r"([*?\[\\])", r"[\1]", p.as_posix()) for p in sorted(found) if ignore(p))


def _requirements(values: Iterable[Any], where: str) -> list[str]:
    found: list[str] = []
    for value in values:
        if isinstance(value, (list, tuple)):
            found += _requirements(value, where)
        elif not isinstance(value, str) or not re.match(r"\s*[A-Za-z0-9./~]", value):
            raise SpecError(f"Image.{where}: {value!r} is not a package requirement such as 'numpy>=2'")
        else:
            found.append(value.strip())
    return found


def _requirements_file(path: str | Path, where: str) -> list[str]:
    if in_worker():  # The file is the client's.
        return []
    try:
        lines = Path(path).read_text().splitlines()
    except OSError as e:
        raise SpecError(f"Image.{where}: {path}: {e.strerror}") from None
    names = [line.split(" #")[0].strip() for line in lines]
    return _requirements((n for n in names if n and not n.startswith(("#", "-"))), str(path))


def _toml(path: str | Path, where: str) -> dict[str, Any]:
    import tomllib

    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as e:
        raise SpecError(f"Image.{where}: {path}: {e.strerror}") from None
    except ValueError as e:
        raise SpecError(f"Image.{where}: {path}: {e}") from None


def _pyproject(
    path: str | Path, where: str, *, extras: tuple[str, ...] = (), groups: tuple[str, ...] = ()
) -> list[str]:
    """The dependencies of a project, with some of its extras and dependency groups."""
    if in_worker():  # The file is the client's.
        return []
    data = _toml(path, where)
    project = data.get("project", {})
    if "dependencies" not in project:
        raise SpecError(f"Image.{where}: {path} has no [project] dependencies")
    names = list(project["dependencies"])
    for extra in extras:
        names += _table(
            project.get("optional-dependencies", {}), extra, f"Image.{where}: {path}: optional dependencies"
        )
    todo, seen = list(groups), set()
    while todo:
        group = todo.pop()
        if group not in seen:
            seen.add(group)
            for entry in _table(data.get("dependency-groups", {}), group, f"Image.{where}: {path}: dependency group"):
                if isinstance(entry, Mapping) and "include-group" in entry:
                    todo.append(entry["include-group"])
                else:
                    names.append(entry)
    return _requirements(names, where)


def _poetry(path: str | Path, groups: tuple[str, ...]) -> list[str]:
    where = "poetry_install_from_file"
    if in_worker():  # The file is the client's.
        return []
    data = _toml(path, where)
    own = data.get("tool", {}).get("poetry", {})
    names = list(data.get("project", {}).get("dependencies", ()))
    tables = [own.get("dependencies", {})]
    for group in groups:
        tables.append(_table(own.get("group", {}), group, f"Image.{where}: {path}: group").get("dependencies", {}))
    for table in tables:
        for name, wanted in table.items():
            if name != "python" and not (isinstance(wanted, Mapping) and wanted.get("optional")):
                names.append(name)
    return _requirements(names, where)


def _table(tables: Mapping[str, Any], name: str, what: str) -> Any:
    if name not in tables:
        raise SpecError(f"{what} {name!r} is not there{checks.nearest(name, tables)}")
    return tables[name]


def _check_python(wanted: str | None, where: str) -> None:
    if wanted is None:
        return
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if ".".join(str(wanted).split(".")[:2]) != here:
        checks.note(
            f"python:{wanted}",
            f"{where} asks for Python {wanted}; functions run on Python {here}, the one that deploys "
            f"({checks.caller()})",
        )
