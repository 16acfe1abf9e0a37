"""What transformer.py does, in ctypes on the driver API alone: bytes in device memory, and answers made of them. It
runs on the fake driver of the tests too. `driver.py`, with a class `Cuda`, and `served.py` lie beside it where it is
deployed.
"""

import hashlib
import os

from driver import Cuda
from served import Served

import woodfrog as modal

ENV = {"MODEL_GIB": os.environ.get("MODEL_GIB", "0.03125")}
SIZE = int(float(ENV["MODEL_GIB"]) * (1 << 30))

app = modal.App("tiny")


class Model:
    def __init__(self):
        block = hashlib.shake_256(b"weights").digest(1 << 16)
        count = -(-SIZE // len(block))
        # No two pages alike.
        self.bytes = b"".join(i.to_bytes(8, "little") + block[8:] for i in range(count))[:SIZE]
        self.cuda = self.held = None

    def ready(self):
        self.cuda = Cuda()
        self.held = self.cuda.put(self.bytes)
        self.bytes = b""

    def answer(self, request):
        digest = hashlib.sha256(self.cuda.get(self.held)[: 1 << 20] + bytes([request % 256])).digest()
        return [x / 256 for x in digest[:16]]

    def facts(self):
        found = self.cuda.get(self.held)
        return {
            "weights": int.from_bytes(hashlib.sha256(found).digest()[:7], "little"),
            "torch": "",
            "device": self.cuda.name(),
            "device_bytes": len(found),
        }

    @staticmethod
    def gpus():
        """1 where there is one."""
        try:
            Cuda()
        except (OSError, RuntimeError):
            return 0
        return 1


# No network: what it needs, machines that lend a GPU may not have.
LIMITS = {"env": ENV, "scaledown_window": 600, "block_network": True}


@app.cls(gpu="any", enable_memory_snapshot=True, experimental_options={"enable_gpu_snapshot": True}, **LIMITS)
class OnGpu(Served):
    @modal.enter(snap=True)
    def load(self):
        self.model = Model()
        self.model.ready()
        self.seen = 1


@app.cls(gpu="any", enable_memory_snapshot=True, **LIMITS)
class OnCpu(Served):
    @modal.enter(snap=True)
    def load(self):
        self.model = Model()
        self.seen = Model.gpus()

    @modal.enter(snap=False)
    def move(self):
        self.model.ready()
