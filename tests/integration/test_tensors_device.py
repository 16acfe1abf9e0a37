"""`woodfrog.tensors` on a device that is not the CPU: one of ours for torch (tests/fake_gpu/device.cpp), no GPU.

Its memory is allocated, freed, copied and counted as a device's is. Streams and pinned memory it has not.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import woodfrog
from fake_gpu import install_device

pytestmark = pytest.mark.torch

SCRIPT = """
import fake_device, torch
from fake_device import used
from woodfrog.tensors import Away, TensorTracker, link, restore
from woodfrog.tensors.copying import Arena

def step(model, optimizer, seed):
    x = torch.randn(8, 60, generator=torch.Generator().manual_seed(seed)).to("fake")
    loss = model(x).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()

torch.manual_seed(1)
model = torch.nn.Sequential(torch.nn.Linear(60, 60), torch.nn.Tanh(), torch.nn.Linear(60, 60)).to("fake")
model[2].weight = model[0].weight
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
step(model, optimizer, 0)

# Captured block by block.
tracker = TensorTracker(model, optimizer, block_bytes=4096)
chain = [tracker.capture()]
assert tracker.capture().nbytes == 0
with torch.no_grad():
    model[0].weight[59, 59] += 1
chain.append(tracker.capture())
assert chain[-1].nbytes == 60 * 60 * 4 % 4096, chain[-1].nbytes
step(model, optimizer, 1)
chain.append(tracker.capture())
back = restore(chain)
weight = back["0.0.weight"]
assert weight.device.type == "fake" and torch.equal(weight.cpu(), model[0].weight.cpu())
assert weight.untyped_storage()._cdata == back["0.2.weight"].untyped_storage()._cdata
there = restore(chain, device="cpu")
assert there["0.0.weight"].device.type == "cpu" and torch.equal(there["0.0.weight"], weight.cpu())
# The name of a state does not depend on where it is.
assert TensorTracker(there, key=chain[0].key).capture().root == TensorTracker(back, key=chain[0].key).capture().root
wanted = [step(model, optimizer, seed) for seed in (2, 3)]
restore(chain, into=(model, optimizer))
assert [step(model, optimizer, seed) for seed in (2, 3)] == wanted
del back, there, weight

# Put away: the device's memory is free, and everything goes on after.
restore(chain, into=(model, optimizer))
view, parameters, before = model[0].weight.detach()[3:5], list(model.parameters()), used()
away = Away(model, optimizer)
warnings = away.leave()
assert warnings == [], warnings
assert used() == before - away.nbytes and away.nbytes > 20_000, (used(), before, away.nbytes)
away.come_back()
assert used() == before and torch.equal(view.cpu(), model[0].weight[3:5].cpu())
assert all(a is b for a, b in zip(parameters, model.parameters()))
assert [step(model, optimizer, seed) for seed in (2, 3)] == wanted

# The same through buffers that threads fill.
class Way:
    def pinned(self, nbytes):
        return torch.empty(nbytes, dtype=torch.int8)

    def copy(self, pairs):
        for source, target in pairs:
            target.copy_(source)
        return self

    def synchronize(self):
        pass

plainly = link.find, Arena.of
link.find, Arena.of = lambda device: Way(), lambda staging_bytes, nbytes: Arena(5000, 3, 2)
restore(chain, into=(model, optimizer))
assert away.leave() == [] and used() == before - away.nbytes
assert away.come_back() == [] and used() == before and torch.equal(view.cpu(), model[0].weight[3:5].cpu())
assert [step(model, optimizer, seed) for seed in (2, 3)] == wanted
link.find, Arena.of = plainly

# Everything there is, and nothing is left.
everything = Away()
everything.leave()
assert used() == 0, used()
everything.come_back()
restore(chain, into=(model, optimizer))
assert [step(model, optimizer, seed) for seed in (2, 3)] == wanted
print("done")
"""


@pytest.mark.slow
def test_tensors_of_another_device(tmp_path: Path) -> None:
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    install_device(tmp_path)
    (tmp_path / "script.py").write_text(SCRIPT)
    env = {**os.environ, "PYTHONPATH": str(Path(woodfrog.__file__).parent.parent)}
    done = subprocess.run([sys.executable, str(tmp_path / "script.py")], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr[-3000:]
