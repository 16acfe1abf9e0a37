"""When a GPU is not given out: what NVML's answers mean. Where sandboxes find the driver."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from woodfrog.backends.factory import SandboxFactory
from woodfrog.backends.gpus import library_path
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


def test_where_the_drivers_libraries_are(tmp_path: Path) -> None:
    for name, library in (("driver", "libcuda.so.1"), ("nvml", "libnvidia-ml.so.1"), ("other", "libother.so")):
        (tmp_path / name).mkdir()
        (tmp_path / name / library).touch()
    driver, nvml, other = (str(tmp_path / n) for n in ("driver", "nvml", "other"))
    named = {"LD_LIBRARY_PATH": f"{other}:{driver}::{nvml}:{driver}:relative:/nowhere"}
    assert library_path("", named) == f"{driver}:{nvml}"
    assert library_path("/set", named) == "/set"
    assert library_path("", {}) == library_path("", {"LD_LIBRARY_PATH": other}) == ""


def test_sandboxes_find_them(tmp_path: Path) -> None:
    factory: Any = SandboxFactory.__new__(SandboxFactory)
    factory._settings, factory.package_root = SimpleNamespace(home=tmp_path / "home"), tmp_path
    runtime: Any = SimpleNamespace(prefix="/usr", base_prefix="/usr", executable=sys.executable, sys_path=())
    places = [tmp_path / "a", tmp_path / "b"]
    for place in places:
        place.mkdir()
    factory._libraries = f"{places[0]}:{places[1]}"
    assert factory.library_env() == {"LD_LIBRARY_PATH": factory._libraries}
    assert set(places) <= set(factory._prefixes(runtime))
    factory._libraries = ""
    assert factory.library_env() == {} and not set(places) & set(factory._prefixes(runtime))
