"""Stand-ins for a GPU's libraries, copied beside a test's program."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).parent

XFORMERS = '''
"""As xformers keeps its answer: in a closure, at the first call, made when it is imported."""
import torch

def compute_once(func):
    value = None
    def func_wrapper():
        nonlocal value
        if value is None:
            value = func()
        return value
    return func_wrapper

@compute_once
def has_gpu():
    return torch.cuda.is_available()

@compute_once
def get_python_lib():
    return torch.library.Library("xformers_python", "DEF")

has_gpu()
get_python_lib()
'''


def install(folder: Path) -> None:
    """Put fake_cuda.py, an NVML and a package `xformers` into a program's directory."""
    shutil.copy(HERE / "fake_cuda.py", folder)
    (folder / "xformers").mkdir()
    (folder / "xformers" / "__init__.py").write_text(XFORMERS)
    compiler = shutil.which("cc") or "gcc"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-Wl,-soname,libnvidia-ml.so.1", "-o", folder / "nvml.so", HERE / "nvml.c"],
        check=True,
    )


def install_device(folder: Path) -> None:
    """Put fake_device.py and what it loads into a program's directory. Compiling takes half a minute."""
    import torch

    root = Path(torch.__file__).parent
    shutil.copy(HERE / "fake_device.py", folder)
    includes = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    libraries = ["-Wl,--no-as-needed", f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root / 'lib'}"]
    command = ["c++", "-O0", "-std=c++20", "-shared", "-fPIC", *includes, str(HERE / "device.cpp"), *libraries]
    subprocess.run([*command, "-o", str(folder / "device.so")], check=True)
