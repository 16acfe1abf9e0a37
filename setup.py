"""The C parts are programs, not extension modules: compile them first, then let setuptools copy them as data."""

import importlib.util
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

_SCRIPT = Path(__file__).resolve().parent / "scripts" / "build_native.py"


def _build_native() -> None:
    spec = importlib.util.spec_from_file_location("build_native", _SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        module.build()
    except module.BuildError as error:
        raise SystemExit(f"native: {error}") from None


class BuildWithPrograms(build_py):
    def run(self) -> None:
        _build_native()
        # setuptools lists the data files once, perhaps before they were compiled.
        self.__dict__.pop("data_files", None)
        super().run()


class PlatformWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


class BinaryDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


setup(cmdclass={"build_py": BuildWithPrograms, "bdist_wheel": PlatformWheel}, distclass=BinaryDistribution)
