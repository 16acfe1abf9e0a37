"""Tensors put away and back. The CPU stands for a device here: its memory is freed and given back in the same way."""

from __future__ import annotations

from typing import Any

import pytest

from woodfrog.errors import RestoreError

torch: Any = pytest.importorskip("torch", reason="needs torch (make demo-setup installs it)")

from torch.nn.utils import parametrize  # noqa: E402

from woodfrog.tensors import Away, away, put_away_on_snapshot  # noqa: E402

pytestmark = pytest.mark.torch
CPU = ("cpu",)


class Symmetric(torch.nn.Module):  # type: ignore[misc]
    def forward(self, x: Any) -> Any:
        return x.triu() + x.triu(1).mT


class Model(torch.nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(50, 32)
        self.square = torch.nn.Linear(32, 32)
        self.norm = torch.nn.BatchNorm1d(32)
        self.out = torch.nn.Linear(32, 50, bias=False)
        self.out.weight = self.embed.weight
        parametrize.register_parametrization(self.square, "weight", Symmetric())
        self.held = {"mask": torch.rand(32)}

    def forward(self, x: Any) -> Any:
        return self.out(self.norm(self.square(self.embed(x))) * self.held["mask"])


@pytest.fixture
def trained() -> tuple[Model, Any, Any]:
    torch.manual_seed(2)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.arange(50)
    model(x).square().sum().backward()
    optimizer.step()
    return model, optimizer, x


def test_everything_is_the_same_after_as_before(trained: tuple[Model, Any, Any]) -> None:
    model, optimizer, x = trained
    view, leaf, graph = model.embed.weight[3:9].detach(), torch.ones(4, requires_grad=True), model(x).sum()
    parameters, ids = list(model.parameters()), [p.grad for p in model.parameters()]
    model.eval()
    wanted, rows = model(x), view.clone()
    versions = [p._version for p in parameters]

    gone = Away(model, optimizer, leaf, view, devices=CPU)
    assert gone.leave() == [] and gone.nbytes > 0
    assert model.embed.weight.untyped_storage().nbytes() == 0 == model.held["mask"].untyped_storage().nbytes()
    assert gone.leave() == []  # twice is once
    gone.come_back()

    assert gone.nbytes == 0 and torch.equal(model(x), wanted)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(a is b.grad for a, b in zip(ids, parameters, strict=True))
    assert [p._version for p in parameters] == versions
    assert model.out.weight is model.embed.weight and torch.equal(view, rows)
    with torch.no_grad():
        model.embed.weight[3] = 7
    assert (view[0] == 7).all() and model.out.weight[3, 0] == 7
    (leaf * 2).sum().backward()
    assert leaf.grad.tolist() == [2.0] * 4
    model.train()
    model(x).sum().backward()
    optimizer.step()
    del graph


def test_training_goes_on_as_if_nothing_had_been(trained: tuple[Model, Any, Any]) -> None:
    def losses(interrupt: bool) -> list[float]:
        torch.manual_seed(2)
        model = Model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        found = []
        for _ in range(4):
            loss = model(torch.arange(50)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
            if interrupt:
                gone = Away(model, optimizer, devices=CPU)
                gone.leave()
                gone.come_back()
        return found

    assert losses(True) == losses(False)


def test_memory_of_others_stays_and_is_named() -> None:
    import numpy

    mine, theirs = torch.rand(10), torch.from_numpy(numpy.ones(10))
    gone = Away({"mine": mine, "theirs": theirs}, devices=CPU)
    [warning] = gone.leave()
    assert "tensor 0.theirs stays" in warning and gone.nbytes == 40 and theirs.sum() == 10
    gone.come_back()


def test_other_devices_are_left_alone() -> None:
    gone = Away([torch.rand(5), torch.empty(5, device="meta")])
    assert gone.leave() == [] and gone.nbytes == 0


def test_tensors_that_nobody_named_are_found() -> None:
    lonely = torch.rand(1000)
    gone = Away(devices=CPU)
    gone.leave()
    try:
        assert lonely.untyped_storage().nbytes() == 0
    finally:
        gone.come_back()
    assert lonely.untyped_storage().nbytes() == 4000


def test_a_failure_on_the_way_leaves_everything_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.rand(100) for _ in range(3)]
    wanted = [t.clone() for t in tensors]
    real, calls = away.copy_to_host, []

    def failing(data: Any, staging_bytes: int) -> Any:
        calls.append(data)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return real(data, staging_bytes)

    monkeypatch.setattr(away, "copy_to_host", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        Away(tensors, devices=CPU).leave()
    assert all(torch.equal(a, b) for a, b in zip(tensors, wanted, strict=True))


def test_no_room_to_come_back_is_named_and_can_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.rand(100) for _ in range(3)]
    wanted = [t.clone() for t in tensors]
    gone = Away(tensors, devices=CPU)
    gone.leave()
    real, calls = away.find.as_bytes, []

    def failing(storage: Any) -> Any:
        calls.append(storage)
        if len(calls) == 2:
            raise RuntimeError("CUDA out of memory.\nmore")
        return real(storage)

    monkeypatch.setattr(away.find, "as_bytes", failing)
    with pytest.raises(RestoreError, match=r"800 bytes of tensors do not fit back on cpu: CUDA out of memory\.$"):
        gone.come_back()
    gone.come_back()
    assert all(torch.equal(a, b) for a, b in zip(tensors, wanted, strict=True))


def test_what_is_registered_goes_and_comes_with_the_worker() -> None:
    tensor = torch.rand(10)
    gone = put_away_on_snapshot(tensor, devices=CPU)
    try:
        assert away.put_away() == [] and tensor.untyped_storage().nbytes() == 0
        away.bring_back()
        assert tensor.untyped_storage().nbytes() == 40
    finally:
        away._registered.remove(gone)


def test_open_nodes_are_those_of_gpus() -> None:
    assert away.open_nodes(["/dev/nvidia0", "/dev/null", "/dev/nvidiactl", "/dev/nvidia0"]) == [
        "/dev/nvidia0",
        "/dev/nvidiactl",
    ]
