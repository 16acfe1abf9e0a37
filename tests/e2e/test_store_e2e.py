"""The page store, the tier and encryption as a user meets them: one daemon captures, another thaws."""

from __future__ import annotations

import os
import random
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.harness import Daemon, until

pytestmark = [pytest.mark.root, pytest.mark.criu]

PROGRAM = """
import woodfrog
app = woodfrog.App("NAME")


@app.cls(enable_memory_snapshot=True, scaledown_window=60)
class Holder:
    @woodfrog.enter(snap=True)
    def load(self):
        import random
        rng = random.Random(4)
        self.secret = b"a text that must not lie on any disk " * 1000
        self.data = [rng.randbytes(1 << 20) for _ in range(24)]
        with open("/tmp/started", "a") as f:
            f.write("x")

    @woodfrog.method()
    def look(self, at: int):
        import zlib
        return [zlib.crc32(self.data[at]), open("/tmp/started").read(), woodfrog.restored()]
"""


@pytest.fixture
def place() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="wf-", dir="/var/tmp"))
    (path / "tier").mkdir()
    yield path
    shutil.rmtree(path, ignore_errors=True)


def deploy(daemon: Daemon, program: str, name: str = "held") -> None:
    daemon.cli("deploy", str(daemon.program(program.replace("NAME", name))))


def packed(daemon: Daemon, app: str = "held") -> str:
    """The app's snapshot, once its memory is in the page store."""

    def found() -> str | None:
        rows = daemon.kept()
        return next((r["id"] for r in rows if r["app"] == app and r["form"] == "packed"), None)

    return str(until(found, 60, 0.2))


def counts(daemon: Daemon) -> dict[str, int]:
    return dict(daemon.get("/status").get("counters", {}))


def test_a_machine_that_never_saw_it_thaws_it_from_the_tier(place: Path) -> None:
    """Encrypted on the way and at rest, trusted only when told so, and refused when it was altered."""
    secret = place / "secret-key"
    secret.write_text(secrets.token_hex(32))
    secret.chmod(0o600)
    env = {"WOODFROG_TIER": str(place / "tier"), "WOODFROG_ENCRYPTION_KEY_FILE": str(secret), "WOODFROG_ZYGOTES": "0"}
    with Daemon(**env) as first, Daemon(**env) as second:
        program = PROGRAM.replace("NAME", "held")
        path = place / "src" / "program.py"
        path.parent.mkdir()
        os.chmod(place, 0o755)
        path.write_text(program)
        first.cli("deploy", str(path))
        right = first.call("held", "Holder.look", at=5)
        assert right[1:] == ["x", True]
        snapshot = packed(first)
        until(lambda: [r for r in first.kept() if r["pushed"]], 60, 0.2)

        # not trusted yet: it boots by itself, and says why
        second.cli("deploy", str(path))
        assert second.call("held", "Holder.look", at=5) == right
        assert snapshot not in second.snapshots("held")
        assert "trust" in second.log.read_text()
        for other in until(lambda: second.snapshots("held"), 30):  # stored in the background
            second.scale_to_zero()
            second.cli("snapshot", "invalidate", other)
        shutil.rmtree(place / "tier" / "by-key")
        first.cli("snapshot", "push", snapshot)

        text = first.json("snapshot", "trust", "list")["own"]["text"]
        second.cli("snapshot", "trust", "add", "--yes", text)
        second.stop()
        second.start()
        assert second.call("held", "Holder.look", at=5) == right
        phases = second.last_phases()
        assert "fetch" in phases and "boot" not in phases
        until(lambda: second.snapshots("held") == [snapshot], 60)  # it was thawed before all of it was here

        # the same on a machine that forgot everything but its keys, as after a reboot
        second.scale_to_zero()
        second.stop()
        shutil.rmtree(second.settings.kdat_dir.parent / "hot")
        second.start()
        assert second.call("held", "Holder.look", at=6)[1:] == right[1:]
        until(lambda: second.snapshots("held") == [snapshot], 60)  # it was thawed before all of it was here

        for daemon in (first, second):
            for found in [*daemon.home.rglob("*"), *(place / "tier").rglob("*")]:
                if found.is_file() and not found.is_symlink() and found.stat().st_size < 1 << 28:
                    assert b"must not lie on any disk must" not in found.read_bytes().replace(program.encode(), b"")


def test_what_people_ask_of_the_store(place: Path) -> None:
    """verify, pin, export, import, gc, stats; and a bit that flips under a running daemon."""
    with Daemon(WOODFROG_ZYGOTES="0", WOODFROG_KEEP_SNAPSHOTS="1") as daemon, Daemon(WOODFROG_ZYGOTES="0") as other:
        deploy(daemon, PROGRAM)
        right = daemon.call("held", "Holder.look", at=1)
        snapshot = packed(daemon)
        stats = daemon.json("store", "stats")
        assert stats["stored_bytes"] > 20 << 20 and stats["packs"] >= 1
        assert daemon.json("snapshot", "verify")["store"] == []
        daemon.cli("snapshot", "pin", snapshot)

        exported = place / "held.frog"
        daemon.cli("snapshot", "export", snapshot, str(exported))
        failed = other.cli("snapshot", "import", str(exported), check=False)
        assert failed.returncode != 0 and "trust" in failed.stderr and "Traceback" not in failed.stderr
        other.cli("snapshot", "trust", "add", "--yes", daemon.json("snapshot", "trust", "list")["own"]["text"])
        assert other.json("snapshot", "import", str(exported))["new"] is True
        assert other.json("snapshot", "import", str(exported))["new"] is False
        assert other.json("snapshot", "verify", snapshot)["snapshots"][0]["problems"] == []

        # a new version: the pinned one stays although only one is kept
        daemon.scale_to_zero()
        deploy(daemon, PROGRAM.replace("range(24)", "range(25)"))
        assert daemon.call("held", "Holder.look", at=1) == right
        newer = daemon.wait_snapshot("held", other_than=[snapshot])
        assert snapshot in daemon.snapshots("held")
        until(lambda: len([r for r in daemon.kept() if r["form"] == "packed"]) == 2, 60, 0.2)
        grown = daemon.json("store", "stats")
        row = next(r for r in grown["snapshots"] if r["id"] == newer)
        assert row["stored_bytes"] < row["raw_bytes"] / 2, "most of its pages were there"

        # a flipped bit in a pack: noticed before anything runs, the call is answered all the same
        daemon.scale_to_zero()
        rng = random.Random(2)
        packs = [p for p in (daemon.home / "store" / "packs").rglob("*.pages") if p.stat().st_size > 1 << 20]
        for path in packs:
            with open(path, "r+b") as f:
                at = rng.randrange(path.stat().st_size)
                f.seek(at)
                (value,) = f.read(1)
                f.seek(at)
                f.write(bytes([value ^ 16]))
        told = daemon.cli("snapshot", "verify", newer, check=False)
        assert told.returncode != 0 and newer in told.stdout + told.stderr
        assert daemon.call("held", "Holder.look", at=1) == right
        assert newer not in daemon.snapshots("held"), "it is retired"

        daemon.scale_to_zero()
        daemon.cli("snapshot", "unpin", snapshot)
        for found in daemon.json("snapshot", "list"):
            if found["state"] != "damaged":
                daemon.cli("snapshot", "invalidate", found["id"])
        until(lambda: not daemon.snapshots("held"), 30)
        assert daemon.json("snapshot", "gc")["freed_bytes"] >= 0


def test_what_goes_when_there_is_no_room_comes_back(place: Path) -> None:
    env = {"WOODFROG_TIER": str(place / "tier"), "WOODFROG_SNAPSHOTS_MIB": "40", "WOODFROG_ZYGOTES": "0"}
    with Daemon(**env) as daemon:
        right = {}
        for name in ("one", "two"):
            deploy(daemon, PROGRAM.replace("Random(4)", f"Random('{name}')"), name)
            right[name] = daemon.call(name, "Holder.look", at=1)
            until(lambda: [r for r in daemon.kept() if r["pushed"]], 60, 0.2)
            daemon.scale_to_zero()
        deploy(daemon, PROGRAM, "three")  # after its packing one of the others goes
        right["three"] = daemon.call("three", "Holder.look", at=1)
        until(lambda: len(daemon.kept()) < 3, 60, 0.2)
        for name in ("one", "two", "three"):
            daemon.scale_to_zero()
            assert daemon.call(name, "Holder.look", at=1) == right[name]


MODEL = """
import woodfrog
app = woodfrog.App("NAME")
VERSION = 1


@app.cls(enable_memory_snapshot=True, scaledown_window=60)
class Reader:
    @woodfrog.enter(snap=True)
    def load(self):
        import os, random
        with open("/tmp/model", "wb") as f:
            f.write(random.Random(9).randbytes(20 << 20))
        os.utime("/tmp/model", ns=(1_700_000_000_000_000_001,) * 2)
        open("/tmp/started", "a").write("x")
        self.ballast = random.Random(VERSION).randbytes(20 << 20)

    @woodfrog.method()
    def look(self, write: bool):
        import os, zlib
        if write:
            with open("/tmp/model", "r+b") as f:
                f.write(b"other")
        info = os.stat("/tmp/model")
        assert info.st_nlink, "replaced below the mounted layer"
        return [zlib.crc32(open("/tmp/model", "rb").read()), info.st_mtime_ns, open("/tmp/started").read(), VERSION]
"""


def test_a_large_file_is_kept_and_sent_once(place: Path) -> None:
    """For all captures of it; whoever writes to it has a copy of their own."""
    env = {"WOODFROG_TIER": str(place / "tier"), "WOODFROG_ZYGOTES": "0", "WOODFROG_KEEP_SNAPSHOTS": "4"}
    with Daemon(**env) as first, Daemon(**env) as second:
        os.chmod(place, 0o755)
        path = place / "src" / "program.py"
        path.parent.mkdir()
        chunks = []
        for version in (1, 2):
            path.write_text(MODEL.replace("NAME", "held").replace("VERSION = 1", f"VERSION = {version}"))
            first.cli("deploy", str(path))
            right = first.call("held", "Reader.look", write=False)
            assert right[1:] == [1_700_000_000_000_000_001, "x", version]
            until(
                lambda n=version: len([r for r in first.kept() if r["pushed"]]) == n,
                90,
                0.2,
            )
            chunks.append({p.name for p in (place / "tier" / "chunks").rglob("*") if p.is_file()})
        assert len(chunks[0]) == 5 and chunks[0] == chunks[1]
        stats = first.json("store", "stats")
        assert stats["large_files"] == 1 and stats["large_files_shared_bytes"] >= 20 << 20
        assert "shared" in first.cli("store", "stats").stdout

        other = first.call("held", "Reader.look", write=True)
        assert other[0] != right[0]
        first.scale_to_zero()
        assert first.call("held", "Reader.look", write=False) == right, "the next one has it as it was"
        report = first.json("snapshot", "verify")
        assert report["store"] == [] and all(not row["problems"] for row in report["snapshots"])

        second.cli("snapshot", "trust", "add", "--yes", first.json("snapshot", "trust", "list")["own"]["text"])
        second.cli("deploy", str(path))
        assert second.call("held", "Reader.look", write=False) == right
        (found,) = until(lambda: second.snapshots("held"), 60)
        assert found in first.snapshots("held")

        first.scale_to_zero()
        for snapshot in first.snapshots("held"):
            assert first.cli("snapshot", "invalidate", snapshot, "--tier", check=False).returncode == 1, "it asks"
            first.cli("snapshot", "invalidate", snapshot, "--tier", "--yes")
        until(lambda: not first.snapshots("held"), 30)
        left = [p.name for p in (place / "tier").rglob("*") if p.is_file() and p.parent.name != "tombstones"]
        assert "manifest.json" not in left and "manifest.sig" in left and not any(p.startswith("s-") for p in left)
        until(lambda: first.json("snapshot", "gc")["freed_bytes"] >= 0 and not first.get("/store")["large_files"])
        assert first.call("held", "Reader.look", write=False) == right
        assert "boot" in first.last_phases(), "nobody finds it any more"


def test_what_was_removed_from_the_tier_does_not_come_back(place: Path) -> None:
    """One machine pushes, another fetches; the first removes it for both, and the second cannot put it back."""
    env = {"WOODFROG_TIER": str(place / "tier"), "WOODFROG_ZYGOTES": "0"}
    with Daemon(**env) as first, Daemon(**env) as second, Daemon(WOODFROG_ZYGOTES="0") as alone:
        os.chmod(place, 0o755)
        path = place / "src" / "program.py"
        path.parent.mkdir()
        path.write_text(PROGRAM.replace("NAME", "held"))
        first.cli("deploy", str(path))
        right = first.call("held", "Holder.look", at=5)
        snapshot = packed(first)
        until(lambda: [r for r in first.kept() if r["pushed"]], 60, 0.2)
        for one, other in ((first, second), (second, first)):
            one.cli("snapshot", "trust", "add", "--yes", other.json("snapshot", "trust", "list")["own"]["text"])
        second.cli("deploy", str(path))
        assert second.call("held", "Holder.look", at=5) == right
        until(lambda: second.snapshots("held") == [snapshot], 60)
        second.scale_to_zero()

        def there(daemon: Daemon) -> dict[str, str]:
            return {row["id"]: row["state"] for row in daemon.json("snapshot", "list", "--tier")}

        (row,) = second.json("snapshot", "list", "--tier")
        assert (row["id"], row["state"], row["app"], row["here"], row["trusted"]) == (
            snapshot, "ready", "held", True, True
        )  # fmt: skip
        assert snapshot in second.cli("snapshot", "list", "--tier").stdout

        first.scale_to_zero()
        first.cli("snapshot", "invalidate", snapshot, "--tier", "--yes")
        assert there(first) == there(second) == {snapshot: "removed"}
        refused = second.cli("snapshot", "push", snapshot, check=False)
        assert refused.returncode == 2 and f"push {snapshot} --anyway` takes that back" in refused.stderr
        assert "for all machines" in first.cli("snapshot", "pull", snapshot, check=False).stderr
        assert second.snapshots("held", "retired") == [snapshot] and second.snapshots("held") == []
        assert second.call("held", "Holder.look", at=5) == right and "boot" in second.last_phases()
        until(lambda: len([s for s in there(first).values() if s == "ready"]) == 1, 60, 0.5)  # of that start
        assert there(first)[snapshot] == "removed"

        # it makes room, and hears of it by itself: at its start
        second.cli("snapshot", "push", snapshot, "--anyway")
        assert there(first)[snapshot] == "ready" and snapshot in [r["id"] for r in second.kept() if r["pushed"]]
        first.cli("snapshot", "invalidate", snapshot, "--tier", "--yes")
        second.scale_to_zero()
        second.stop()
        second.start()
        until(lambda: second.snapshots("held", "retired") == [snapshot], 30, 0.5)
        assert there(second)[snapshot] == "removed"

        for command in (["list", "--tier"], ["invalidate", snapshot, "--tier"]):
            said = alone.cli("snapshot", *command, check=False)
            assert said.returncode == 2 and said.stderr.startswith("error: no tier is configured"), said.stderr
            assert len(said.stderr.splitlines()) == 1
