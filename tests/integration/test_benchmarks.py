"""Each benchmark runs and its numbers are whole; how good they are is not a test's affair."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.root, pytest.mark.criu]

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(script: str, target: Path, *options: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *options, "--json", str(target)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    result: dict[str, Any] = json.loads(target.read_text())
    assert result["machine"]["criu"] and result["machine"]["cores"] > 0
    return result


def test_start(tmp_path: Path) -> None:
    result = run("start.py", tmp_path / "start.json", "--rounds", "1", "small")
    small = result["workloads"]["small"]
    assert set(small["ms"]) == {"cold", "plain", "whole", "woodfrog", "fork"}
    assert all(arm["n"] == 1 and arm["median"] > 0 for arm in small["ms"].values())
    assert "restore" in small["phases_ms"]["woodfrog"] and "boot" in small["phases_ms"]["cold"]


def test_calls(tmp_path: Path) -> None:
    result = run("calls.py", tmp_path / "calls.json", "--calls", "10", "--seconds", "0.3", "--clients", "1,2")
    assert len(result["payload_ms"]) == 6 and result["payload_ms"]["1 KB pickle"]["median"] > 0
    assert all(v["calls_per_second"] > 0 for v in result["throughput"].values())


def test_soak(tmp_path: Path) -> None:
    result = run("soak.py", tmp_path / "soak.json", "--cycles", "6")
    assert (result["differences"], result["leaks"]) == ([], [])
    assert result["freezes"] >= 5 and result["thaws"] >= 11


def test_soak_sees_differences_and_leaks() -> None:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import soak
    finally:
        sys.path.remove(str(BENCHMARKS))
    seen = {"fds": {"3": ["/tmp/a", "0"]}, "cwd": "/tmp"}
    assert soak.differences(seen, {"fds": {"3": ["/tmp/a", "0"]}, "cwd": "/tmp"}) == []
    assert len(soak.differences(seen, {"fds": {"3": ["/tmp/a", "7"], "4": ["/tmp/b", "0"]}, "cwd": "/tmp"})) == 2
    assert soak.grown({"processes": 2, "threads": 2}, {"processes": 3, "threads": 4}) == ["processes: 2 -> 3"]
