"""When a GPU is not given out: what NVML's answers mean."""

from __future__ import annotations

import pytest

from woodfrog.cuda.health import FATAL_XIDS, Vitals, judge

GIB = 1 << 30


@pytest.mark.parametrize(
    ("vitals", "xids", "why"),
    [
        (Vitals(), (), ""),
        (Vitals(uncorrected=0, memory=80 * GIB, used=GIB), (13, 31, 43, 45), ""),
        (Vitals(uncorrected=2), (), "2 uncorrectable"),
        (Vitals(remap_pending=True), (), "next reset"),
        (Vitals(retired_pending=True), (), "next reset"),
        (Vitals(remap_failed=True, remap_pending=True), (), "replaced"),
        (Vitals(lost=True, uncorrected=2), (48,), "does not reach"),
        (Vitals(reset=True), (), "must be reset"),
        (Vitals(), (31, 79), "Xid 79: it has fallen off the bus"),
        (Vitals(uncorrected=2), (48,), "Xid 48"),
    ],
)
def test_what_makes_a_gpu_sick(vitals: Vitals, xids: tuple[int, ...], why: str) -> None:
    found = judge(vitals, xids, free_percent=75)
    assert why in found and bool(why) == bool(found)


@pytest.mark.parametrize("xid", [48, 63, 64, 74, 79, 94, 95, 119, 120])
def test_errors_of_the_gpu_itself(xid: int) -> None:
    assert f"Xid {xid}: {FATAL_XIDS[xid][0]}; {FATAL_XIDS[xid][1]}" == judge(Vitals(), [13, xid])


def test_how_much_memory_must_be_free() -> None:
    def at(used: int, free_percent: int = 75) -> str:
        return judge(Vitals(memory=80 * GIB, used=used), free_percent=free_percent)

    assert at(20 * GIB) == "" and "others use 20481 of its 81920 MiB" in at(20 * GIB + (1 << 20))
    assert at(80 * GIB, 0) == ""
    assert judge(Vitals(memory=80 * GIB), free_percent=75) == "", "NVML does not say"
