"""For programs of tests: what torch's C part has in a build with CUDA, in a build without. Imported before torch.

As in C++, GPUs are counted once in a process's life, and by CUDA_VISIBLE_DEVICES as it is then: who asks while it hides
them never sees one again. How many there are says the file $FAKE_GPUS; `nvml.so` beside this file answers by it too.
"""

import ctypes
import os
import sys
from pathlib import Path

ctypes.CDLL(str(Path(__file__).with_name("nvml.so")), mode=ctypes.RTLD_GLOBAL)
counted = None


def count():
    global counted
    if counted is None:
        there = int(Path(os.environ["FAKE_GPUS"]).read_text())
        counted = 0 if os.environ.get("CUDA_VISIBLE_DEVICES") == "" else there
    return counted


def init():
    if count() == 0:
        raise RuntimeError("No CUDA GPUs are available")


class _AtImport:
    """Right after torch's C part, as a build with CUDA has it."""

    def find_spec(self, name, path=None, target=None):
        if name == "torch.cuda":
            core = sys.modules["torch._C"]
            core._cuda_getDeviceCount, core._cuda_init = count, init
            core._cuda_getCurrentRawStream = lambda device: 0


sys.meta_path.insert(0, _AtImport())
import torch  # noqa: E402

torch.cuda._cudart = object()


def answers():
    """What this process says of its GPUs, by every way that a program may ask."""
    import torch._dynamo.device_interface as interface
    import transformers
    import transformers.utils

    def start():
        try:
            torch.cuda.init()
        except RuntimeError as e:
            return str(e)
        return "started"

    return {
        "is_available": torch.cuda.is_available(),
        "device_count": torch.cuda.device_count(),
        "nvml": torch.cuda._device_count_nvml(),
        "start": start(),
        "dynamo": sorted(name for name, _ in interface.get_registered_device_interfaces() if name.startswith("cuda:")),
        "transformers": transformers.utils.is_torch_cuda_available(),
        "devices": "cuda" in transformers.utils.get_available_devices(),
        "xformers": sys.modules["xformers"].has_gpu() if "xformers" in sys.modules else None,
    }
