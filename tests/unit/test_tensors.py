"""Tensors captured block by block, on the CPU: the same code runs on a GPU, where there are streams too."""

from __future__ import annotations

import io
import os
import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from woodfrog.errors import IntegrityError, SpecError

torch: Any = pytest.importorskip("torch", reason="needs torch (make demo-setup installs it)")

from woodfrog.tensors import Away, Delta, TensorTracker, Tree, restore  # noqa: E402
from woodfrog.tensors.hashing import LANES, ROW, Hasher, by_floats, product  # noqa: E402

pytestmark = pytest.mark.torch

# fmt: off
DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.bool,
    torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.float8_e4m3fn,
)
# fmt: on


def fresh(rng: random.Random) -> Any:
    """A tensor of some type, size and layout; now and then a view of part of its memory."""
    dtype, size = rng.choice(DTYPES), rng.choice((0, 1, 7, 300, 1024, 5000, 20_000))
    raw = torch.frombuffer(bytearray(rng.randbytes(max(1, size) * 16)), dtype=torch.uint8)
    tensor = (raw % 2).bool()[:size] if dtype is torch.bool else raw.view(dtype)[:size].clone()
    match rng.randrange(4):
        case 0 if size > 4:
            return tensor[1 : size - 1 : 2]
        case 1 if size >= 300:
            return tensor[:300].view(20, 15).t()
        case 2 if size > 4:
            return tensor[3:]
    return tensor


def edit(rng: random.Random, held: dict[str, Any]) -> None:
    """Add, drop, alias, resize, or write into some bytes of a tensor's memory."""
    name = rng.choice(sorted(held)) if held else ""
    match rng.randrange(8):
        case 0:
            held[f"t{rng.randrange(1000)}"] = fresh(rng)
        case 1 if len(held) > 1:
            del held[name]
        case 2 if held and held[name].is_contiguous():
            held[f"alias{rng.randrange(1000)}"] = held[name].view(-1)[held[name].numel() // 2 :]
        case 3 if held and held[name].untyped_storage().resizable():
            storage = held[name].untyped_storage()
            old = storage.nbytes()
            storage.resize_(old + rng.choice((16, 4096, 9000)))
            raw(storage)[old:] = rng.randrange(2)
        case _ if held:
            data = raw(held[name].untyped_storage())
            for _ in range(rng.randrange(4) if data.numel() else 0):
                # One bit, also a sign: what a weak hash of whole words would let cancel out.
                data[rng.randrange(data.numel())] ^= 1 << rng.randrange(7) if rng.random() < 0.5 else -128


def raw(storage: Any) -> Any:
    return torch.empty(0, dtype=torch.int8).set_(storage, 0, (storage.nbytes(),), (1,))


def bits(tensor: Any) -> bytes:
    return raw(tensor.contiguous().clone().untyped_storage()).numpy().tobytes()


def assert_same(got: dict[str, Any], held: dict[str, Any]) -> None:
    assert {name.removeprefix("0.") for name in got} == set(held)
    homes: dict[int, int] = {}
    for name, tensor in held.items():
        back = got[f"0.{name}"]
        assert (back.dtype, back.shape, back.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
        assert bits(back) == bits(tensor), name
        # Those that shared memory share it, the others do not.
        home = back.untyped_storage()
        assert homes.setdefault(tensor.untyped_storage()._cdata, home._cdata) == home._cdata
    assert len(set(homes.values())) == len(homes)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 1 << 32), block=st.sampled_from((4096, 8192, 65536)), rounds=st.integers(1, 6))
def test_any_edits_come_back_bit_for_bit(seed: int, block: int, rounds: int) -> None:
    rng = random.Random(seed)
    held = {f"t{i}": fresh(rng) for i in range(rng.randrange(1, 5))}
    tracker = TensorTracker(held, block_bytes=block)
    chain = [tracker.capture()]
    for _ in range(rounds):
        for _ in range(rng.randrange(4)):
            edit(rng, held)
        chain.append(tracker.capture())
    assert_same(restore(chain), held)
    # A second tracker under the same key, from nothing, names the state alike.
    assert TensorTracker(held, block_bytes=block, key=chain[0].key).capture().root == chain[-1].root


def test_only_changed_blocks_are_captured() -> None:
    weights = torch.randn(1 << 20)
    tracker = TensorTracker(weights, block_bytes=4096)
    assert tracker.capture().nbytes == 4 << 20
    assert tracker.capture().nbytes == 0
    weights[5] += 1
    weights[500_000] += 1
    delta = tracker.capture()
    assert delta.nbytes == 8192 and delta.changed[0].index == (0, 488)


def test_memory_that_tensors_share_is_captured_once() -> None:
    base = torch.randn(4096)
    model = torch.nn.Linear(64, 64, bias=False)
    tied = torch.nn.ModuleList([model, model])
    first = TensorTracker(base, base[5:], base.view(64, 64).t(), tied).capture()
    assert first.nbytes == 2 * 4096 * 4 and len(first.memories) == 2


def test_training_goes_on_from_a_restored_state_as_it_did() -> None:
    def make() -> tuple[Any, Any]:
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32))
        model[2].weight = torch.nn.Parameter(torch.randn(32, 64))
        return model, torch.optim.Adam(model.parameters(), lr=0.01)

    def step(model: Any, optimizer: Any, seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        loss = model(torch.randn(8, 32, generator=generator)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    model, optimizer = make()
    step(model, optimizer, 0)
    tracker = TensorTracker(model, optimizer, block_bytes=4096)
    chain = [tracker.capture()]
    for seed in (1, 2):
        step(model, optimizer, seed)
        chain.append(tracker.capture())
    parameters = list(model.parameters())
    wanted = [step(model, optimizer, seed) for seed in (3, 4)]
    restore(chain, into=(model, optimizer))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert [step(model, optimizer, seed) for seed in (3, 4)] == wanted

    other, its_optimizer = make()
    step(other, its_optimizer, 9)
    restore(chain, into=(other, its_optimizer))
    assert [step(other, its_optimizer, seed) for seed in (3, 4)] == wanted


def test_defaults_of_the_program_change_nothing() -> None:
    weights = torch.randn(5000)
    tracker, plain = TensorTracker(weights, key=bytes(32)), TensorTracker(weights, key=bytes(32)).capture()
    torch.set_default_device("meta")
    try:
        with torch.inference_mode(), torch.autocast("cpu"):
            delta = tracker.capture()
            assert delta.root == plain.root and torch.equal(restore([delta])["0"], weights)
            gone = Away(weights, devices=["cpu"])
            assert gone.leave() == [] and gone.nbytes == 20_000
            gone.come_back()
            keys = torch.ones(ROW, LANES, dtype=torch.int8, device="cpu")
            rows = torch.full((3, ROW), 127, dtype=torch.int8, device="cpu")
            assert torch.equal(by_floats(rows, keys), product(rows, keys))
    finally:
        torch.set_default_device(None)


def test_lazy_views_come_back() -> None:
    z = torch.randn(40, dtype=torch.complex64)
    back = restore([TensorTracker(z.conj(), z.conj().imag).capture()])
    assert torch.equal(back["0"], z.conj()) and torch.equal(back["1"], z.conj().imag)


def test_captures_are_written_and_read() -> None:
    tensors = {"a": torch.randn(3000), "b": torch.zeros(0), "c": torch.randn(10).bfloat16()}
    tracker = TensorTracker(tensors, block_bytes=4096)
    chain = [tracker.capture()]
    tensors["a"][2999] = 5
    chain.append(tracker.capture())
    read = []
    for delta in chain:
        file = io.BytesIO()
        delta.save(file)
        file.seek(0)
        read.append(Delta.load(file))
        for cut in (0, 10, len(file.getvalue()) - 1):
            with pytest.raises(IntegrityError, match="not a capture of tensors, or damaged"):
                Delta.load(io.BytesIO(file.getvalue()[:cut]))
    assert_same(restore(read), tensors)
    file.seek(0)
    data = bytearray(file.getvalue())
    data[-1] ^= 1
    with pytest.raises(IntegrityError, match="not those that were captured"):
        restore([read[0], Delta.load(io.BytesIO(data))])


def test_chains_and_targets_that_do_not_fit() -> None:
    tensors = {"a": torch.randn(10)}
    tracker = TensorTracker(tensors)
    first = tracker.capture()
    tensors["a"][0] = 1
    second = tracker.capture()
    with pytest.raises(IntegrityError, match="the chain is empty"):
        restore([])
    with pytest.raises(IntegrityError, match="does not follow a capture of everything"):
        restore([second])
    with pytest.raises(IntegrityError, match="does not follow the state before it"):
        restore([first, first])
    with pytest.raises(SpecError, match=r"no tensor 0\.a"):
        restore([first], into=({},))
    with pytest.raises(SpecError, match=r"tensor 0\.a is \(11,\) float32, captured \(10,\) float32"):
        restore([first], into=({"a": torch.randn(11)},))
    for unfit in (torch.empty(3, device="meta"), torch.eye(3).to_sparse_csr()):
        with pytest.raises(SpecError, match=r"tensor 0 .* has no memory of its own"):
            TensorTracker(unfit).capture()
    for wrong in (0, 5000, 1 << 24):
        with pytest.raises(ValueError, match="block_bytes must be"):
            TensorTracker(block_bytes=wrong)
    with pytest.raises(ValueError, match="key must have 32 bytes"):
        TensorTracker(key=b"x")


# The hash


def test_all_ways_of_multiplying_give_the_same() -> None:
    generator = torch.Generator().manual_seed(3)
    for rows, width in ((1, ROW), (40, ROW), (5, 1024)):
        data = torch.randint(-128, 128, (rows, width), dtype=torch.int8, generator=generator)
        keys = torch.randint(-128, 128, (width, LANES), dtype=torch.int8, generator=generator)
        exact = data.long() @ keys.long()
        assert torch.equal(product(data, keys).long(), exact) and torch.equal(by_floats(data, keys).long(), exact)
    # The largest sums there are.
    data = torch.full((20, ROW), -128, dtype=torch.int8)
    keys = torch.full((ROW, LANES), -128, dtype=torch.int8)
    assert product(data, keys).unique().tolist() == by_floats(data, keys).unique().tolist() == [ROW << 14]


def test_one_column_lets_differences_through_as_rarely_as_stated() -> None:
    """The bound is for one column of keys: over keys, two rows have one sum with probability 1/256 at most."""
    trials = 20_000
    keys = torch.randint(-128, 128, (ROW, trials), dtype=torch.int8, generator=torch.Generator().manual_seed(5))
    for a, b in (({0: 1}, {0: 2}), ({9: -128}, {9: 127}), ({1: 64, 2: 64}, {1: 0, 2: 0}), ({5: -128, 6: -128}, {})):
        difference = torch.zeros(1, ROW, dtype=torch.long)
        for place in a.keys() | b.keys():
            difference[0, place] = a.get(place, 0) - b.get(place, 0)
        sums = difference[:, :16] @ keys[:16].long()
        # Within 4 standard deviations of 1/256.
        assert (sums == 0).float().mean() < 1 / 256 + 4 * (1 / 256 / trials) ** 0.5


@pytest.mark.parametrize("block", [4096, 65536])
def test_small_and_cancelling_edits_change_the_signature(block: int) -> None:
    hasher = Hasher(os.urandom(32), block)
    data = torch.randint(-128, 128, (block,), dtype=torch.int8)
    plain = hasher.signatures(data)
    words = data.view(torch.int64)
    edits: list[Any] = []
    for places in ([0], [block // 8 - 1], [0, 1], [3, 77], list(range(block // 8))):
        changed = words.clone()
        changed[places] ^= -(1 << 63)  # signs of an even number of words: cancel out in sums over whole words
        edits.append(changed.view(torch.int8))
    swapped = words.clone()
    swapped[0], swapped[1] = words[1], words[0] + (words[0] == words[1])
    edits += [swapped.view(torch.int8), torch.zeros(block, dtype=torch.int8), data.flip(0)]
    for changed in edits:
        assert not torch.equal(hasher.signatures(changed), plain)
    assert torch.equal(
        Hasher(hasher_key := os.urandom(32), block).signatures(data), Hasher(hasher_key, block).signatures(data)
    )


# The tree


def test_a_comparison_reads_few_nodes() -> None:
    leaves = [i.to_bytes(64, "little") for i in range(100_000)]
    a = Tree.build(leaves)
    b = a.replace({77_777: b"x" * 64})
    assert b.root == Tree.build([*leaves[:77_777], b"x" * 64, *leaves[77_778:]]).root != a.root
    assert a.differences(b) == [77_777] and a.reads < 100
    assert a.differences(a) == []


@given(st.lists(st.integers(0, 3), max_size=600), st.lists(st.integers(0, 3), max_size=600))
def test_differences_are_those_of_the_leaves(one: list[int], two: list[int]) -> None:
    a, b = (Tree.build([bytes([x]) for x in leaves]) for leaves in (one, two))
    common = min(len(one), len(two))
    wanted = [i for i in range(common) if one[i] != two[i]] + list(range(common, max(len(one), len(two))))
    assert a.differences(b) == wanted and (a.root == b.root) == (one == two)


def test_states_are_compared() -> None:
    tensors = [torch.zeros(1 << 18), torch.ones(10)]
    tracker = TensorTracker(tensors, block_bytes=4096)
    tracker.capture()
    before = tracker.state
    tensors[0][70_000] = 1
    tracker.capture()
    assert before is not None and tracker.state is not None
    assert before.changed(tracker.state) == {0: [68]} and before.changed(before) == {}
