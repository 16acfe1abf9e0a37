"""For programs of tests: a device "fake" for torch, of `device.so` beside this file. `used()` counts its memory."""

from pathlib import Path

import torch


class _Module:
    @staticmethod
    def is_available():
        return True

    @staticmethod
    def device_count():
        return 1

    @staticmethod
    def current_device():
        return 0


torch.utils.rename_privateuse1_backend("fake")
torch.ops.load_library(str(Path(__file__).with_name("device.so")))
torch._register_device_module("fake", _Module)
used = torch.ops.fake_device.used
