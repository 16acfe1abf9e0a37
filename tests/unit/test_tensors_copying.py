"""Bytes through pinned buffers. The CPU stands for a device, and what only a device with streams has is played: what is
sent lies in its buffer until somebody waits for it, so that a buffer used too early shows."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from woodfrog.errors import RestoreError

torch: Any = pytest.importorskip("torch", reason="needs torch (make demo-setup installs it)")

from woodfrog.tensors import Away, TensorTracker, away, copying, link, put_away_on_snapshot, restore  # noqa: E402
from woodfrog.tensors.copying import Arena, CopyIn  # noqa: E402

pytestmark = pytest.mark.torch
CPU = ("cpu",)


@dataclass
class Played:
    """A way to a device, with streams.

    Args:
        pins: so many buffers can be pinned.
        copies: so many copies work, then one fails; what comes after it works again.
        late: so many events can be waited for, then one fails, and so do all after it.
    """

    random: random.Random = field(default_factory=lambda: random.Random(1))
    pins: int = 1000
    copies: int = 1_000_000
    late: int = 1_000_000
    pinned_sizes: list[int] = field(default_factory=list)
    sent: list[list[int]] = field(default_factory=list)
    pending: list[_Sent] = field(default_factory=list)

    def pinned(self, nbytes: int) -> Any:
        if len(self.pinned_sizes) >= self.pins:
            raise RuntimeError("cannot lock pages\nmore")
        self.pinned_sizes.append(nbytes)
        return torch.full((nbytes,), 85, dtype=torch.int8, device="cpu")

    def copy(self, pairs: Any) -> _Sent:
        assert threading.current_thread() is threading.main_thread()
        pairs = list(pairs)
        self.sent.append([source.numel() for source, _ in pairs])
        sent = _Sent(self, pairs)
        self.pending.append(sent)
        if len(self.sent) == self.copies + 1:
            raise RuntimeError("the device fell off the bus")
        return sent

    def synchronize(self) -> None:
        for sent in self.random.sample(self.pending, len(self.pending)):
            sent.arrive()


@dataclass(eq=False)
class _Sent:
    link: Played
    pairs: list[tuple[Any, Any]]

    def arrive(self) -> None:
        self.link.pending.remove(self)
        for source, target in self.pairs:
            target.copy_(source)

    def synchronize(self) -> None:
        self.link.late -= 1
        if self.link.late < 0:
            raise RuntimeError("an earlier kernel failed")
        others = [sent for sent in self.link.pending if sent is not self and self.link.random.random() < 0.3]
        for sent in self.link.random.sample(others, len(others)):
            sent.arrive()
        if self in self.link.pending:
            self.arrive()


@contextmanager
def through(played: Played, arena: Arena | None = None) -> Iterator[Played]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(link, "find", lambda device: played)
        if arena is not None:
            patch.setattr(Arena, "of", lambda staging_bytes, nbytes: arena)
        yield played


def fillers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("woodfrog-fill")]


def rows(*sizes: int) -> list[Any]:
    return [torch.randint(-128, 128, (size,), dtype=torch.int8) for size in sizes]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 700), min_size=1, max_size=12),
    buffer=st.integers(1, 900),
    buffers=st.integers(1, 5),
    fillers_=st.integers(1, 4),
    pins=st.integers(0, 6),
    seed=st.integers(0, 1 << 20),
)
def test_any_memory_comes_back_bit_for_bit(
    sizes: list[int], buffer: int, buffers: int, fillers_: int, pins: int, seed: int
) -> None:
    rng = random.Random(seed)
    types = (torch.int8, torch.float32, torch.bfloat16, torch.complex64, torch.bool)
    tensors: list[Any] = []
    for size in sizes:
        whole = torch.randint(0, 2, (size,)).to(rng.choice(types))
        # Views that overlap one another, and some without the whole.
        start, end = sorted((rng.randrange(size + 1), rng.randrange(size + 1)))
        tensors += [whole, whole[start:end], whole[:: rng.randrange(1, 4)]]
        tensors += [whole[start:].as_strided((2, max(1, (size - start) // 2)), (0, 1))] if start < size else []
    wanted = [tensor.clone() for tensor in tensors]
    with through(Played(rng, pins=pins), Arena(buffer, buffers, fillers_)) as played:
        gone = Away(tensors, devices=CPU, staging_bytes=0)
        assert gone.leave() == [] and not any(tensor.untyped_storage().nbytes() for tensor in tensors)
        warnings = gone.come_back()
    assert all(torch.equal(a, b) for a, b in zip(tensors, wanted, strict=True))
    assert len(played.pinned_sizes) <= min(pins, buffers) and not played.pending and not fillers()
    assert len(warnings) <= (pins < buffers) and (pins or warnings)


def test_large_ones_are_cut_and_small_ones_share_a_buffer() -> None:
    tensors = rows(1000, 70, 10, 20, 30)
    with through(Played(), Arena(512, 3, 2)) as played:
        gone = Away(tensors, devices=CPU, staging_bytes=0)
        gone.leave()
        assert gone.come_back() == []
    # The last left comes first; each begins at a multiple of 64.
    assert sorted(played.sent) == sorted([[30, 20, 10, 70, 192], [512], [296]])
    assert played.pinned_sizes == [512] * len(played.pinned_sizes)


def test_little_memory_is_copied_plainly() -> None:
    with through(Played()) as played:
        gone = Away(rows(5000), devices=CPU)
        gone.leave()
        before = len(played.pinned_sizes)
        assert before and gone.come_back() == []
    assert len(played.pinned_sizes) == before


def test_how_much_is_pinned() -> None:
    mib = 1 << 20
    assert Arena.of(64 * mib, 1 << 34).buffers == 8
    assert Arena.of(1 << 32, 256 * mib).buffers == 8
    assert Arena.of(0, 1 << 34).buffers == Arena.of(15 * mib, 1 << 34).buffers == Arena.of(64 * mib, mib).buffers == 0
    with pytest.raises(ValueError, match="staging_bytes"):
        Away(staging_bytes=-1)


@pytest.mark.parametrize("pins", [0, 1])
def test_memory_that_cannot_be_pinned_is_told(pins: int, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = rows(1000, 1000)
    wanted = [tensor.clone() for tensor in tensors]
    gone = put_away_on_snapshot(tensors, devices=CPU, staging_bytes=0)
    try:
        with through(Played(pins=pins), Arena(100, 3, 2)):
            assert away.put_away() == []
            [warning] = away.bring_back()
    finally:
        away._registered.remove(gone)
    some = "with 1 of 3" if pins else "without"
    assert warning == f"tensors: copied {some} pinned buffers: cannot lock pages"
    assert all(torch.equal(a, b) for a, b in zip(tensors, wanted, strict=True))


def test_without_threads_it_goes_on_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(thread: Any) -> None:
        raise RuntimeError("can't start new thread")

    tensors = rows(1000, 1000)
    wanted = [tensor.clone() for tensor in tensors]
    with through(Played(), Arena(100, 3, 2)) as played:
        gone = Away(tensors, devices=CPU, staging_bytes=0)
        gone.leave()
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", none)
            assert gone.come_back() == ["copied without pinned buffers: can't start new thread"]
    assert all(torch.equal(a, b) for a, b in zip(tensors, wanted, strict=True)) and played.sent == []


def no_room(at: int) -> Callable[[Any], Any]:
    real, calls = away.find.as_bytes, []

    def as_bytes(storage: Any) -> Any:
        calls.append(storage)
        if len(calls) == at:
            raise RuntimeError("CUDA out of memory.\nmore")
        return real(storage)

    return as_bytes


def test_no_room_for_one_leaves_those_before_it_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = rows(300, 900, 500, 30)
    wanted = [tensor.clone() for tensor in tensors]
    with through(Played(), Arena(128, 3, 2)):
        gone = Away(tensors, devices=CPU, staging_bytes=0)
        gone.leave()
        with monkeypatch.context() as patch:
            patch.setattr(away.find, "as_bytes", no_room(3))
            with pytest.raises(RestoreError, match=r"^1200 bytes of .* back on cpu: CUDA out of memory\.$") as e:
                gone.come_back()
        assert e.value.code == "device-memory" and gone.nbytes == 1200
        assert [tensor.untyped_storage().nbytes() for tensor in tensors] == [0, 0, 500, 30]
        assert torch.equal(tensors[2], wanted[2]) and torch.equal(tensors[3], wanted[3])
        assert gone.come_back() == [] and gone.come_back() == []
    assert all(torch.equal(a, b) for a, b in zip(tensors, wanted, strict=True)) and not fillers()


@pytest.mark.parametrize("fault", [{"copies": 0}, {"copies": 3}, {"copies": 11}, {"late": 0}, {"late": 4}])
def test_a_copy_that_fails_can_be_tried_again(fault: dict[str, int]) -> None:
    tensors = rows(300, 900, 500, 30)
    wanted = [tensor.clone() for tensor in tensors]
    gone = Away(tensors, devices=CPU, staging_bytes=0)
    gone.leave()
    with through(Played(**fault), Arena(128, 3, 2)) as played, pytest.raises(RestoreError) as e:
        gone.come_back()
    assert e.value.code == "device-memory" and not played.pending and not fillers()
    sizes = [tensor.untyped_storage().nbytes() for tensor in tensors]
    assert sum(sizes) + gone.nbytes == 1730 and gone.nbytes > 0
    back = [torch.equal(a, b) for a, b, size in zip(tensors, wanted, sizes, strict=True) if size]
    assert all(back)
    with through(Played(), Arena(128, 3, 2)):
        gone.come_back()
    assert all(torch.equal(a, b) for a, b in zip(tensors, wanted, strict=True))


def test_who_interrupts_it_can_call_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = rows(300, 900)
    wanted = [tensor.clone() for tensor in tensors]
    gone = Away(tensors, devices=CPU)
    gone.leave()

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CopyIn, "put", interrupted)
        with pytest.raises(KeyboardInterrupt):
            gone.come_back()
    assert gone.nbytes == 1200 and not any(tensor.untyped_storage().nbytes() for tensor in tensors)
    gone.come_back()
    assert all(torch.equal(a, b) for a, b in zip(tensors, wanted, strict=True))


def test_filling_goes_on_while_one_waits_for_its_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = rows(100, 100, 100)
    wanted = [tensor.clone() for tensor in tensors]
    others, real, lock, count = threading.Event(), copying._fill, threading.Lock(), [0]

    def fill(buffer: Any, batch: Any) -> None:
        with lock:
            count[0] += 1
            first = count[0] == 1
        assert not first or others.wait(10)  # the first gets its pages last
        real(buffer, batch)
        if not first and count[0] == 3:
            others.set()

    monkeypatch.setattr(copying, "_fill", fill)
    with through(Played(), Arena(100, 2, 2)):
        gone = Away(tensors, devices=CPU, staging_bytes=0)
        gone.leave()
        gone.come_back()
    assert all(torch.equal(a, b) for a, b in zip(tensors, wanted, strict=True))


def test_the_way_out_keeps_buffers_until_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "_BUFFER", 4096)
    tensors = rows(50_001, 4096, 7)
    wanted = [tensor.clone() for tensor in tensors]
    with through(Played()) as played:
        gone = Away(tensors, devices=CPU, staging_bytes=3 * 4096)
        gone.leave()
        assert played.sent and not played.pending
        gone.come_back()
        assert all(torch.equal(a, b) for a, b in zip(tensors, wanted, strict=True))
        tracker = TensorTracker(tensors, block_bytes=4096, staging_bytes=3 * 4096)
        chain = [tracker.capture()]
        tensors[0][-1] += 1
        tensors[0][9000] += 1
        chain.append(tracker.capture())
    assert all(torch.equal(restore(chain)[f"0.{i}"], tensor) for i, tensor in enumerate(tensors))
