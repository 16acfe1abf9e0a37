"""Single bits turned over anywhere in a stored snapshot: found before the process runs, and the call answered all the
same. `python benchmarks/bitflips.py` does it a thousand times."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.root, pytest.mark.criu]

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "bitflips.py"


def test_every_flip_is_found_and_every_call_answered(tmp_path: Path) -> None:
    target = tmp_path / "bitflips.json"
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--count", "12", "--seed", "5", "--json", str(target)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert target.exists(), done.stdout[-4000:] + done.stderr[-4000:]
    result = json.loads(target.read_text())
    assert (result["not_found"], result["not_answered"]) == ([], [])
    assert done.returncode == 0
    assert sum(result["by_kind"].values()) == 12 and sum(result["reasons"].values()) >= 6
