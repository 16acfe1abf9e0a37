"""What is in a snapshot, what a request dirtied, and snapshots between two machines, with the command line."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.harness import Daemon, until

pytestmark = [pytest.mark.root, pytest.mark.criu]

MIB = 1 << 20
PROGRAM = '''
import ctypes, random
import woodfrog

app = woodfrog.App("keep")


@app.cls(enable_memory_snapshot=True, scaledown_window=300)
class Holder:
    @woodfrog.enter(snap=True)
    def load(self):
        rng = random.Random(3)
        self.table = bytearray(rng.randbytes(24 << 20))
        self.words = {i: str(i) * 3 for i in range(120_000)}
        open("/tmp/notes", "w").write("n" * 300_000)

    @woodfrog.method()
    def poke(self, mib: int = 0, spread: int = 0):
        """Write to every page of so many MiB, and to one page of each of so many others."""
        base = 8 << 20
        for at in range(base, base + (mib << 20), 4096):
            self.table[at] ^= 255
        for n in range(spread):
            self.table[(16 << 20) + n * 8192] ^= 255
        return len(self.table)
'''


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon() as daemon:
        yield daemon


@pytest.fixture(scope="module")
def snapshot(daemon: Daemon) -> str:
    daemon.cli("deploy", str(daemon.program(PROGRAM, "keep.py")))
    return daemon.cli("snapshot", "create", "keep.Holder").stdout.strip()


def sizes(rows: list[dict[str, Any]], name: str, field: str = "resident_bytes") -> dict[str, float]:
    return {row[name]: row[field] / MIB for row in rows}


def packed(daemon: Daemon, snapshot: str) -> None:
    until(lambda: daemon.get(f"/snapshots/{snapshot}")["form"] == "packed", 60)


def test_what_is_in_it_is_told_alike_loose_and_packed(daemon: Daemon, snapshot: str, tmp_path: Path) -> None:
    loose = daemon.json("snapshot", "inspect", snapshot)
    found = loose["contents"]
    kinds = sizes(found["kinds"], "kind")
    assert 29 <= kinds["large blocks"] < 31  # the array, and the table of the dict
    assert 8 < kinds["python objects"] < 40
    assert {"python", "libc"} <= sizes(found["libraries"], "library").keys()
    assert any(f["file"].endswith("/libc.so.6") for f in found["files"])
    assert {"file": "/tmp/notes", "bytes": 300_000} in found["written"]
    assert abs(sum(kinds.values()) * MIB - found["resident_bytes"]) < 1
    assert found["resident_bytes"] == loose["memory_bytes"]
    assert found["processes"][0]["pid"] == loose["root_pid"]
    daemon.call("keep", "Holder.poke")
    packed(daemon, snapshot)
    again = daemon.json("snapshot", "inspect", snapshot)["contents"]
    assert again["form"] == "packed"
    for part in ("resident_bytes", "zero_bytes", "kinds", "libraries", "files", "processes"):
        assert again[part] == found[part], part
    picture = tmp_path / "contents.png"
    shown = daemon.cli("snapshot", "inspect", snapshot, "--plot", str(picture)).stdout
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000
    for words in ("large blocks", "LIBRARY", "process 100", "/tmp/notes", "capture"):
        assert words in shown


def test_what_a_request_dirtied(daemon: Daemon, snapshot: str) -> None:
    first = daemon.json("snapshot", "diff", snapshot, "--call", "poke", "--args", '{"mib": 0}')
    container, calls = first["container"], first["served"]
    assert sizes(first["kinds"], "kind", "bytes").get("large blocks", 0) < 0.1
    assert 0 < first["bytes"] < 12 * MIB and first["same"] * 4096 > 30 * MIB
    second = daemon.json("snapshot", "diff", snapshot, "--call", "poke", "--args", '{"mib": 4, "spread": 100}')
    assert (second["container"], second["served"]) == (container, calls + 1)
    blocks = next(k for k in second["kinds"] if k["kind"] == "large blocks")
    assert 1124 <= blocks["changed"] + blocks["new"] <= 1160
    assert second["gone"] < 200
    assert second["bytes"] - first["bytes"] < 6 * MIB
    biggest = second["mappings"][0]
    assert biggest["changed"] >= 1124 and biggest["parts"]["large blocks"] >= 1124 * 4096
    shown = daemon.cli("snapshot", "diff", snapshot, container).stdout
    assert f"{snapshot} → container {container}, after {calls + 1} calls" in shown
    assert "large blocks" in shown
    # And back: what is as it was is not dirty.
    third = daemon.json("snapshot", "diff", snapshot, "--call", "poke", "--args", '{"mib": 4, "spread": 100}')
    assert sizes(third["kinds"], "kind", "bytes").get("large blocks", 0) < 0.1
    same = daemon.json("snapshot", "diff", snapshot, snapshot)
    assert (same["changed"], same["new"], same["gone"]) == (0, 0, 0) and same["same"] * 4096 > 30 * MIB


def test_a_container_of_another_snapshot_is_refused(daemon: Daemon, snapshot: str) -> None:
    for argv, words in (
        (["diff", snapshot], "give either another snapshot or container, or --call"),
        (["diff", snapshot, "i-none"], "no snapshot 'i-none'"),
        (["diff", snapshot, "--call", "nope"], "nope"),
        (["inspect", snapshot, "--plot", "/tmp/x.gif"], "must end with .png"),
    ):
        done = daemon.cli("snapshot", *argv, check=False)
        assert done.returncode == 2 and words in done.stderr, done.stderr


def test_to_another_machine_and_back(daemon: Daemon, snapshot: str, tmp_path: Path) -> None:
    daemon.call("keep", "Holder.poke")
    packed(daemon, snapshot)
    file = tmp_path / "holder.frog"
    daemon.cli("snapshot", "export", snapshot, str(file))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    again = daemon.cli("snapshot", "export", snapshot, str(file), check=False)
    assert again.returncode == 2 and "exists" in again.stderr
    own = daemon.cli("snapshot", "trust").stdout.strip()
    with Daemon() as other:
        refused = other.cli("snapshot", "import", str(file), check=False)
        assert refused.returncode == 2 and "no trusted key has signed it" in refused.stderr
        other.cli("snapshot", "trust", "add", own, "--comment", "first", "--yes")
        [key] = other.json("snapshot", "trust", "list")["trusted"]
        assert key["comment"] == "first"
        taken = other.json("snapshot", "import", str(file))
        assert (taken["id"], taken["new"]) == (snapshot, True)
        assert other.json("snapshot", "import", str(file))["new"] is False
        assert other.json("snapshot", "verify", snapshot)["snapshots"][0]["problems"] == []
        contents = other.json("snapshot", "inspect", snapshot)["contents"]
        assert contents["kinds"] == daemon.json("snapshot", "inspect", snapshot)["contents"]["kinds"]
        other.cli("snapshot", "trust", "remove", key["fingerprint"])
        assert other.json("snapshot", "trust", "list")["trusted"] == []
    assert not list((daemon.home / "calls").glob(".export-*"))


def test_by_way_of_a_tier(tmp_path: Path) -> None:
    tier = str(tmp_path)
    env = {"WOODFROG_TIER": tier, "WOODFROG_ZYGOTES": "0"}
    with Daemon(**env) as first, Daemon(**env) as second:
        first.cli("deploy", str(first.program(PROGRAM, "keep.py")))
        snapshot = first.cli("snapshot", "create", "keep.Holder").stdout.strip()
        first.call("keep", "Holder.poke")
        packed(first, snapshot)
        assert first.json("snapshot", "push", snapshot)["id"] == snapshot
        assert first.json("snapshot", "list")[0]["pushed"]
        unknown = second.cli("snapshot", "pull", "s-000000000000", check=False)
        assert unknown.returncode == 2 and "no snapshot s-000000000000" in unknown.stderr
        refused = second.cli("snapshot", "pull", snapshot, check=False)
        assert refused.returncode == 2 and "no trusted key has signed it" in refused.stderr
        key = first.json("snapshot", "trust", "list")["own"]["text"]
        second.cli("snapshot", "trust", "add", key, "--yes")
        assert second.json("snapshot", "pull", snapshot)["new"] is True
        assert second.json("snapshot", "verify")["snapshots"][0]["problems"] == []
        for folder in ("packs", "snapshots", "by-key"):
            for path in (Path(tier) / folder).rglob("*"):
                os.utime(path, (0, 0))
        assert second.json("snapshot", "gc", "--tier")["objects"] == 0, "all of it is needed"
        (Path(tier) / "snapshots" / snapshot / "manifest.json").unlink()
        found = second.json("snapshot", "gc", "--tier")
        assert found["packs"] and (found["tier"], found["freed_bytes"] > 20 * MIB) == (f"file://{tier}", True)
        assert not [path for path in Path(tier).rglob("*") if path.is_file()]


def test_pins_gc_and_stats(daemon: Daemon, snapshot: str) -> None:
    daemon.call("keep", "Holder.poke")
    packed(daemon, snapshot)
    daemon.cli("snapshot", "pin", snapshot)
    [row] = daemon.json("snapshot", "list", "--app", "keep")
    assert row["pinned"] and 0 < row["stored_bytes"] <= row["memory_bytes"]
    stats = daemon.json("store", "stats")
    assert snapshot in [s["id"] for s in stats["snapshots"]] and stats["packs"] > 0
    shown = daemon.cli("store", "stats").stdout
    assert snapshot in shown and "pinned" in shown
    assert daemon.json("snapshot", "gc", "--dry-run")["packs"] == 0
    daemon.cli("snapshot", "unpin", snapshot)
    assert not daemon.json("snapshot", "list", "--app", "keep")[0]["pinned"]
    unconfigured = daemon.cli("snapshot", "push", snapshot, check=False)
    assert unconfigured.returncode == 2 and "no tier is configured" in unconfigured.stderr


def test_damage_is_told_with_a_status(daemon: Daemon, snapshot: str) -> None:
    assert daemon.cli("snapshot", "verify").stdout.split()[-1] == "good"
    # Run last: it spoils the snapshot.
    image = next((daemon.home / "snapshots" / snapshot).glob("img*/core-100.img"))
    data = bytearray(image.read_bytes())
    data[len(data) // 2] ^= 1
    image.write_bytes(data)
    done = daemon.cli("snapshot", "verify", snapshot, check=False)
    assert done.returncode == 2 and "was altered" in done.stdout and "1 damaged" in done.stderr
