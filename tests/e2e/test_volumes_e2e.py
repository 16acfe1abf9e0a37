"""Volumes through the command line: a function changes what a client puts, and a client gets what a function makes."""

from __future__ import annotations

import asyncio
import io
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

import woodfrog
from e2e.harness import Daemon, until

pytestmark = [pytest.mark.root, pytest.mark.criu]

PROGRAM = """
import os
import woodfrog as modal

app = modal.App("shelves")
shelf = modal.Volume.from_name("shelf", create_if_missing=True)

@app.function(volumes={"/shelf": shelf}, scaledown_window=300)
def work():
    with open("/shelf/in/put.txt", "a") as f:
        f.write(" and more")
    with open("/shelf/in/beside.txt", "w") as f:
        f.write("beside")
    os.symlink("/etc", "/shelf/out")
    os.symlink("../../../keys/admin", "/shelf/key")
    os.mkfifo("/shelf/fifo")
    return open("/shelf/in/put.txt").read()

@app.function(volumes={"/shelf": shelf.read_only()})
def spoil():
    open("/shelf/in/put.txt", "w")
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    port = free_port()
    with Daemon(WOODFROG_LISTEN=f"127.0.0.1:{port}", WOODFROG_TOKEN="t") as daemon:
        # The client speaks TCP: it need not see the daemon's files.
        daemon.env.update(WOODFROG_HOST=f"http://127.0.0.1:{port}", WOODFROG_TOKEN="t")
        yield daemon


def test_there_and_back(daemon: Daemon, tmp_path: Path) -> None:
    program = tmp_path / "prog" / "shelves.py"
    program.parent.mkdir()
    program.write_text(PROGRAM)
    (tmp_path / "put.txt").write_text("put")
    daemon.cli("volume", "create", "shelf")
    daemon.cli("volume", "put", "shelf", str(tmp_path / "put.txt"), "/in/")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "leaf").write_text("leaf")
    for local, to in (("tree/", "/a"), ("./tree/", "/b/"), ("tree", "/c/")):
        daemon.cli("volume", "put", "shelf", local, to, cwd=tmp_path)
    shelf = daemon.home / "volumes" / "shelf"
    assert sorted(str(p.relative_to(shelf)) for p in shelf.rglob("leaf")) == ["a/leaf", "b/tree/leaf", "c/tree/leaf"]
    for name in ("a", "b", "c"):
        daemon.cli("volume", "rm", "shelf", name, "--recursive")
    for arguments in (("volume", "create", ""), ("secret", "create", "", "A=1"), ("app", "stop", "")):
        refused = daemon.cli(*arguments, check=False)
        assert refused.returncode == 2 and refused.stderr == "error: an empty name\n", refused
    daemon.cli("deploy", str(program))
    assert daemon.cli("call", "shelves.work").stdout == '"put and more"\n'
    assert "Read-only file system" in daemon.cli("call", "shelves.spoil", check=False).stderr
    daemon.cli("volume", "get", "shelf", "/", str(tmp_path / "got"))
    got = tmp_path / "got"
    assert {p.relative_to(got).as_posix() for p in got.rglob("*")} == {"in", "in/put.txt", "in/beside.txt"}
    assert (got / "in" / "put.txt").read_text() == "put and more"
    for path, why in (("out/passwd", "symbolic links"), ("key", "a symlink"), ("fifo", "a fifo")):
        assert why in daemon.cli("volume", "get", "shelf", path, "-", check=False).stderr
    assert "in use by" in daemon.cli("volume", "delete", "shelf", "--yes", check=False).stderr
    daemon.cli("app", "stop", "shelves")
    until(lambda: "0" in daemon.cli("volume", "list").stdout)
    daemon.cli("volume", "rm", "shelf", "out")
    daemon.cli("volume", "delete", "shelf", "--yes")
    until(lambda: not os.listdir(daemon.home / "volumes"))
    assert Path("/etc/passwd").exists()


PARTS = """
import os
import woodfrog as modal

app = modal.App("parts")
shelf = modal.Volume.from_name("shelf", create_if_missing=True)
part = shelf.with_mount_options(sub_path="made/here")

@app.function(volumes={"/part": part, "/again": part.read_only(), "/shelf": shelf}, enable_memory_snapshot=True)
def work(text: str):
    with open("/part/file", "a") as f:
        f.write(text)
    try:
        open("/again/file", "w")
        return "written"
    except OSError as e:
        return [sorted(os.listdir("/part")), open("/shelf/made/here/file").read(), e.strerror]

@app.function(volumes={"/shelf": shelf})
def mislead(target: str):
    os.rename("/shelf/made", f"/shelf/away-{len(os.listdir('/shelf'))}")
    os.symlink(target, "/shelf/made")

@app.function(volumes={"/part": part})
def look():
    return os.listdir("/part")
"""


def test_a_directory_of_a_volume(daemon: Daemon, tmp_path: Path) -> None:
    program = tmp_path / "parts.py"
    program.write_text(PARTS)
    daemon.cli("deploy", str(program))
    for count in (1, 2):
        done = daemon.cli("call", "parts.work", "--json", "--arg", '"x"')
        assert json.loads(done.stdout)["result"] == [["file"], "x" * count, "Read-only file system"]
        daemon.wait_snapshot("parts")
        daemon.scale_to_zero()
    counters = daemon.get("/health")["counters"]
    assert counters["restore.done"] and "restore.failed" not in counters
    # Who may write in the volume puts a link in the way: to the host's files, and to others of the volume's own.
    for target in ("/etc", "../..", "away"):
        daemon.cli("call", "parts.mislead", "--arg", json.dumps(target))
        done = daemon.cli("call", "parts.look", check=False)
        assert done.returncode == 2 and "made" in done.stderr and "symbolic link" in done.stderr, done.stderr
        assert done.stderr.count("error:") == 1


def test_an_ephemeral_volume_is_gone_at_the_end_of_its_block(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WOODFROG_HOST", "WOODFROG_TOKEN", "WOODFROG_HOME"):
        monkeypatch.setenv(name, daemon.env[name])
    volumes = daemon.home / "volumes"
    with woodfrog.Volume.ephemeral() as volume:
        with volume.batch_upload() as batch:
            batch.put_file(io.BytesIO(b"for a while"), "/note")
        assert (volumes / volume.name / "note").read_bytes() == b"for a while"
        assert b"".join(volume.read_file("note")) == b"for a while"
    until(lambda: not os.listdir(volumes))

    async def at_once() -> None:
        async with woodfrog.Volume.ephemeral() as volume:
            async with volume.batch_upload.aio() as batch:
                batch.put_file(io.BytesIO(b"for a while"), "/note")
            assert [e.path async for e in volume.iterdir.aio("/")] == ["note"]

    asyncio.run(at_once())
    until(lambda: not os.listdir(volumes))
