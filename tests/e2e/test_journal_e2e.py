"""A real run's event journal, replayed: the machine decides the same again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from e2e.harness import Daemon
from woodfrog.control.replay import replay

pytestmark = [pytest.mark.root, pytest.mark.criu]

PROGRAM = """
import woodfrog

app = woodfrog.App("journal", secrets=[woodfrog.Secret.from_dict({"TOKEN": "never-in-the-journal"})])


@app.function(enable_memory_snapshot=True, env={"PLAIN": "nor-this"})
def square(x: int) -> int:
    return x * x


@app.function(retries=1)
def fails() -> None:
    raise ValueError("always")


@app.local_entrypoint()
def main() -> None:
    assert list(square.map(range(8))) == [x * x for x in range(8)]
    try:
        fails.remote()
    except ValueError:
        print("done")
"""


def test_a_run_can_be_replayed_and_its_journal_holds_no_secret() -> None:
    with Daemon() as daemon:
        program = daemon.program(PROGRAM, "journal.py")
        for _ in range(2):
            assert "done" in daemon.cli("run", str(program)).stdout
        daemon.stop()
        (journal,) = Path(daemon.home / "events").glob("*.ndjson")
        text = journal.read_text()
        state, count, difference = replay(text.splitlines())
        assert difference is None, str(difference)
        kinds = {json.loads(line)["event"]["type"] for line in text.splitlines()[1:]}
        assert {"AppDeployed", "CallSubmitted", "SnapshotCaptured", "CallFinished", "InstanceStopped"} <= kinds
        assert count > 40 and not state.instances and not state.calls
        assert "never-in-the-journal" not in text and "nor-this" not in text
        assert journal.stat().st_mode & 0o077 == 0
