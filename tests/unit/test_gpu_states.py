"""The states of a process on the GPU, the map of devices, the table of failures: pure."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from woodfrog.cuda.devices import Device, Node, device_map
from woodfrog.cuda.failures import CODES, RESULTS, failures_markdown, gpu_error
from woodfrog.cuda.states import MOVES, Move, State, after, way_back
from woodfrog.engine.gpu import added
from woodfrog.engine.plan import GpuFacts
from woodfrog.errors import GpuError
from woodfrog.linux.procfs import Resident
from woodfrog.snapshot.capture import device_bytes

DOCS = Path(__file__).parents[2] / "docs" / "failure-modes.md"
MOVE = st.sampled_from(list(MOVES))


@given(st.lists(MOVE, max_size=30))
def test_a_walk_is_legal_or_named_and_always_leads_back(moves: list[Move]) -> None:
    state = State.RUNNING
    for move in moves:
        before, then = MOVES[move]
        if state is before:
            state = after(state, move)
            assert state is then
        else:
            with pytest.raises(GpuError, match=f"needs {before.name}, it is {state.name}") as e:
                after(state, move)
            assert e.value.code == "gpu-illegal-move"
    for move in way_back(state):
        state = after(state, move)
    assert state is State.RUNNING


@pytest.mark.parametrize("state", [State.CHECKPOINTING, State.RESTORING])
def test_where_somebody_else_is_at_work(state: State) -> None:
    for attempt, code in ((lambda: after(state, "unlock"), "gpu-illegal-move"), (lambda: way_back(state), "gpu-stuck")):
        with pytest.raises(GpuError) as e:
            attempt()
        assert e.value.code == code and state.name in str(e.value.fields)


@given(MOVE)
def test_nothing_leads_out_of_failed(move: Move) -> None:
    for attempt in (lambda: after(State.FAILED, move), lambda: way_back(State.FAILED)):
        with pytest.raises(GpuError) as e:
            attempt()
        assert e.value.code == "gpu-stuck"


def node(*names: str, version: int = 13000, first: int = 0) -> Node:
    return Node(version, "580", tuple(Device(f"GPU-{first + i}", name, 1 << 30) for i, name in enumerate(names)))


def test_which_driver_can_what() -> None:
    assert not Node(12060, "560.35.03").checkpoints and Node(12080, "570.10").checkpoints
    assert Node(13030, "610.12").peers and not Node(13000, "580.65.06").peers and not Node(13030, "CUDA 13030").peers


def known(of: Node) -> list[tuple[str, str]]:
    return [(d.uuid, d.name) for d in of.devices]


def test_the_same_gpus_need_no_map() -> None:
    here = node("A", "A")
    assert device_map(known(here), ["GPU-1"], here, ["GPU-1"]) == ()
    assert device_map(known(here), ["GPU-1"], node("A", "A", version=12080), ["GPU-1"]) == ()


def test_another_gpu_of_the_machine() -> None:
    here = node("A", "A", "B")
    assert dict(device_map(known(here), ["GPU-0"], here, ["GPU-1"])) == {
        "GPU-0": "GPU-1", "GPU-1": "GPU-0", "GPU-2": "GPU-2",
    }  # fmt: skip


@given(st.data(), st.integers(1, 6), st.booleans())
def test_a_map_names_every_gpu_once(data: st.DataObject, count: int, elsewhere: bool) -> None:
    then = node(*["A"] * count)
    now = node(*["A"] * count, first=10 if elsewhere else 0)
    used = data.draw(st.integers(1, count))
    before = data.draw(st.permutations([d.uuid for d in then.devices]))[:used]
    after_ = data.draw(st.permutations([d.uuid for d in now.devices]))[:used]
    pairs = device_map(known(then), before, now, after_)
    if not pairs:
        assert before == after_
        return
    assert {a for a, _ in pairs} == {d.uuid for d in then.devices}
    assert {b for _, b in pairs} == {d.uuid for d in now.devices}
    assert [dict(pairs)[a] for a in before] == after_


@pytest.mark.parametrize(
    ("now", "used", "code"),
    [
        (node("B"), ["GPU-0"], "gpu-chip"),
        (node("A"), [], "gpu-chip"),
        (node("A"), ["GPU-9"], "gpu-chip"),
        (node("A", version=12080, first=3), ["GPU-3"], "gpu-driver-old"),
    ],
)
def test_what_cannot_stand_for_it(now: Node, used: list[str], code: str) -> None:
    with pytest.raises(GpuError) as e:
        device_map([("GPU-0", "A")], ["GPU-0"], now, used)
    assert e.value.code == code and e.value.fields["remedy"]


def test_the_page_of_failures_holds_the_table() -> None:
    found = re.search(r"<!-- gpu -->\n(.*?)<!-- end -->", DOCS.read_text(), re.DOTALL)
    assert found is not None and found[1] == failures_markdown(), "docs/failure-modes.md is not up to date: gpu"
    assert set(RESULTS.values()) <= set(CODES)


def test_an_error_is_one_line() -> None:
    for code in CODES:
        error = gpu_error(code, "process 7: lock", pid=7)
        assert error.code == code and "\n" not in error.message and error.message.startswith("process 7: lock: ")


MIB = 1 << 20


def resident(*rows: tuple[int, int, int]) -> list[Resident]:
    """(begin, end, bytes of its own), in MiB."""
    return [Resident(begin * MIB, end * MIB, own * MIB, 0) for begin, end, own in rows]


@pytest.mark.parametrize(
    ("before", "now", "found"),
    [
        ([(1, 2, 1)], [(1, 2, 1), (5, 9, 4)], [(5, 9)]),
        ([(1, 2, 1), (9, 10, 1)], [(1, 6, 5), (9, 10, 1)], [(2, 6)]),  # joined to the one below
        ([(8, 10, 1)], [(2, 10, 7)], [(2, 8)]),  # to the one above
        ([(1, 2, 1), (8, 10, 1)], [(1, 10, 8)], [(2, 8)]),  # to both
        ([(1, 9, 0)], [(1, 9, 8)], [(1, 9)]),  # reserved, and filled
        ([(1, 9, 0)], [(1, 3, 0), (3, 9, 6)], [(3, 9)]),
        ([(1, 9, 3)], [(1, 9, 3)], []),
        ([(1, 9, 3)], [], []),
        ([], [(4, 6, 2), (7, 8, 0)], [(4, 6)]),
    ],
)
def test_where_a_driver_put_it(
    before: list[tuple[int, int, int]], now: list[tuple[int, int, int]], found: list[tuple[int, int]]
) -> None:
    assert added(resident(*before), resident(*now)) == tuple((begin * MIB, end * MIB) for begin, end in found)


def test_what_is_on_a_gpu_as_a_worker_tells_it() -> None:
    gpu = GpuFacts("580", (), (), ((100, 100), (120, 7)))
    told = {"weights": 60, "graphs": 10, "tensors": 0, "my own": 5, "allocator cache": "x"}
    assert device_bytes(gpu, 100, told) == {
        "weights": 60, "graphs": 10, "contexts and other libraries": 30, "other processes": 7,
    }  # fmt: skip
    assert device_bytes(gpu, 100, {"weights": 1 << 60, "tensors": 9}) == {"weights": 100, "other processes": 7}
    for nothing in (None, {}, [1], {"weights": -1}):
        assert device_bytes(gpu, 100, nothing) == {"not told": 100, "other processes": 7}
