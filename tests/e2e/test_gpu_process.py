"""What a GPU program's own process does around a freeze: through the daemon, with CRIU, and torch on the CPU.

No test here needs a GPU or shows one: stand-ins (`fake_gpu`) take the place of its libraries, the CPU that of a device.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from e2e.harness import Daemon
from fake_gpu import install, install_device

pytestmark = [pytest.mark.root, pytest.mark.criu]


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with Daemon(WOODFROG_GPU="none") as daemon:
        yield daemon


def printed(daemon: Daemon, program: Any) -> Any:
    """What a program's last line prints, cold and thawed: JSON."""
    return json.loads(daemon.cli("run", str(program)).stdout.splitlines()[-1])


HIDDEN = """
import json, os
from pathlib import Path
import woodfrog as modal

app = modal.App("hidden")
gpus = Path("/tmp/gpus")
gpus.write_text("2")
os.environ["FAKE_GPUS"] = str(gpus)
import fake_cuda, torch, xformers

# The naive program: it asks at import, before the snapshot and after it, and never imports torch again.
at_import = torch.cuda.is_available()


@app.cls(enable_memory_snapshot=True, gpu="A10")
class Availability:
    @modal.enter(snap=True)
    def before(self):
        os.environ["FAKE_GPUS"] = str(gpus)
        self.seen = fake_cuda.answers()

    @modal.enter(snap=False)
    def after(self):
        os.environ["FAKE_GPUS"] = str(gpus)  # what is set in the process goes with the restore

    @modal.method()
    def demo(self):
        return [modal.restored(), at_import, self.seen, fake_cuda.answers()]


@app.local_entrypoint()
def main():
    print(json.dumps(Availability().demo.remote()))
"""


@pytest.mark.model
def test_a_gpu_hidden_in_the_snapshot_is_there_after_the_thaw(daemon: Daemon) -> None:
    program = daemon.program(HIDDEN)
    install(program.parent)
    restored, at_import, before, after = printed(daemon, program)
    assert restored and not at_import and not before["is_available"] and before["device_count"] == 0
    assert after["is_available"] and after["device_count"] == 2 and after["start"] == "started"
    assert after["dynamo"] == ["cuda:0", "cuda:1"]
    assert after["transformers"] and after["devices"] and after["xformers"]


AWAY = """
import json
import torch
import woodfrog
if "@DEVICE@" == "fake":
    import fake_device
from woodfrog.tensors import TensorTracker, put_away_on_snapshot, restore

app = woodfrog.App("away-@DEVICE@")
torch.set_default_device("@DEVICE@")


@app.cls(enable_memory_snapshot=True)
class Trainer:
    @woodfrog.enter(snap=True)
    def load(self):
        torch.manual_seed(1)
        self.model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Tanh(), torch.nn.Linear(256, 256))
        self.model[2].weight = self.model[0].weight
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.view = self.model[0].weight.detach()[7:9]
        self.step()
        self.tracker = TensorTracker(self.model, self.optimizer, block_bytes=4096)
        self.chain = [self.tracker.capture()]
        self.step()
        self.chain.append(self.tracker.capture())
        self.answer = self.model(torch.ones(256)).detach().clone()
        self.identity = [id(p) for p in self.model.parameters()]
        self.away = put_away_on_snapshot(self.model, self.optimizer, devices=["@DEVICE@"])

    def step(self):
        loss = self.model(torch.ones(4, 256)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    @woodfrog.method()
    def check(self):
        same = torch.equal(self.model(torch.ones(256)), self.answer)
        tied = self.model[2].weight is self.model[0].weight and torch.equal(self.view, self.model[0].weight[7:9])
        identity = [id(p) for p in self.model.parameters()] == self.identity
        unchanged = self.tracker.capture().nbytes
        self.step()
        self.chain += [self.tracker.capture()]
        back = restore(self.chain)
        last = torch.equal(back["0.0.weight"], self.model[0].weight)
        return [woodfrog.restored(), self.away.nbytes, same, tied, identity, unchanged, last]


@app.local_entrypoint()
def main():
    print(json.dumps(Trainer().check.remote()))
"""


@pytest.mark.torch
# The device of our own is compiled against torch, which takes minutes.
@pytest.mark.parametrize("device", ["cpu", pytest.param("fake", marks=pytest.mark.slow)])
def test_tensors_put_away_and_captures_go_on_after_the_thaw(daemon: Daemon, device: str) -> None:
    """Once the CPU stands for a device, once there is one of ours, with its own memory."""
    program = daemon.program(AWAY.replace("@DEVICE@", device))
    if device == "fake":
        if shutil.which("c++") is None:
            pytest.skip("needs a C++ compiler")
        install_device(program.parent)
    assert printed(daemon, program) == [True, 0, True, True, True, 0, True]


GROUP = """
import json
import woodfrog

app = woodfrog.App("group")


@app.cls(enable_memory_snapshot=True)
class Group:
    @woodfrog.enter(snap=True)
    def join(self):
        import torch.distributed as dist

        dist.init_process_group("gloo", init_method="file:///tmp/store", rank=0, world_size=1)

    @woodfrog.method()
    def total(self):
        import torch

        one = torch.ones(2)
        torch.distributed.all_reduce(one)
        return [woodfrog.restored(), float(one.sum())]


@app.local_entrypoint()
def main():
    print(json.dumps(Group().total.remote()))
"""


@pytest.mark.torch
def test_a_process_group_goes_on_after_the_thaw(daemon: Daemon) -> None:
    """Inference engines make one for a single GPU, too. It listens for the others of the group."""
    assert printed(daemon, daemon.program(GROUP)) == [True, 2.0]


ENGINE = """
import json, subprocess, sys, time
from pathlib import Path
import woodfrog

app = woodfrog.App("engine")


@app.cls(enable_memory_snapshot=True)
class Engine:
    @woodfrog.enter(snap=True)
    def load(self):
        here, self.log = Path(__file__).parent, Path("/tmp/log")
        self.server = subprocess.Popen([sys.executable, str(here / "vllm_server.py"), str(self.log), "/tmp/port", "",
                                        "127.0.0.1"])
        while not Path("/tmp/port").exists() or not Path("/tmp/port").read_text():
            time.sleep(0.02)

    @woodfrog.method()
    def asked(self):
        return [woodfrog.restored(), self.server.poll(), [json.loads(line)[0] for line in self.log.open()]]

    @woodfrog.exit()
    def end(self):
        self.server.kill()


@app.local_entrypoint()
def main():
    print(json.dumps(Engine().asked.remote()))
"""


def test_a_server_in_the_tree_sleeps_through_the_freeze(daemon: Daemon) -> None:
    from integration.test_worker_shrink import SERVER

    program = daemon.program(ENGINE)
    (program.parent / "vllm_server.py").write_text(SERVER)
    assert printed(daemon, program) == [True, None, ["/sleep?level=1", "/wake_up"]]
