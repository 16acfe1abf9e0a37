"""Volumes' content: what the daemon does with hostile ones, over its API, and what the SDK makes of that."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import os
import socket
import stat
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

import pytest
import uvicorn
from typer.testing import CliRunner

import woodfrog
from unit.test_api import Daemon, FaultyBackend, error_of, function, gates
from woodfrog.cli import commands
from woodfrog.daemon.volumes import VolumeFiles
from woodfrog.errors import DaemonError, FileMissing, FileTaken, NotFoundError, SpecError
from woodfrog.sdk import client as client_module
from woodfrog.sdk import volume_files
from woodfrog.sdk.client import Client
from woodfrog.sdk.volume import Volume
from woodfrog.sdk.volume_files import FileEntryType
from woodfrog.settings import Settings
from woodfrog.spec import VolumeMount

UID = 64646


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """The directory of the volume `v`."""
    path = tmp_path / "volumes" / "v"
    path.mkdir(parents=True)
    return path


@pytest.fixture
def files(top: Path) -> VolumeFiles:
    return VolumeFiles(top.parent, UID)


def put(files: VolumeFiles, path: str, data: bytes = b"new", *, force: bool = False, mode: int = 0o644) -> None:
    upload = files.upload("v", path, force=force, mode=mode)
    try:
        upload.write(data)
        upload.finish()
    finally:
        upload.close()


def read(files: VolumeFiles, path: str) -> bytes:
    file, _ = files.open_file("v", path)
    with file:
        return file.read()


def listed(files: VolumeFiles, path: str = "", *, recursive: bool = True) -> list[str]:
    return [e["path"] for e in files.entries("v", path, recursive=recursive)]


def test_write_list_read_remove(files: VolumeFiles, top: Path) -> None:
    put(files, "/a/b/c.txt", b"one", mode=0o4755)
    put(files, "a//./d.txt", b"two")
    assert listed(files) == ["a", "a/b", "a/d.txt", "a/b/c.txt"] and listed(files, "/", recursive=False) == ["a"]
    assert listed(files, "a/d.txt") == ["a/d.txt"]
    assert read(files, "a/b/c.txt") == b"one"
    made = (top / "a" / "b" / "c.txt").stat()
    assert stat.S_IMODE(made.st_mode) == 0o755
    if os.geteuid() == 0:
        assert made.st_uid == made.st_gid == UID and (top / "a" / "b").stat().st_uid == UID
    files.remove("v", "a/d.txt", recursive=False)
    with pytest.raises(SpecError, match="'v': a is a directory: recursive=True") as refused:
        files.remove("v", "a", recursive=False)
    assert refused.value.code == "is-directory"
    files.remove("v", "a", recursive=True)
    assert listed(files) == []
    until(lambda: not os.listdir(top))


def test_nothing_is_replaced_without_force(files: VolumeFiles, top: Path) -> None:
    put(files, "a", b"old")
    with pytest.raises(FileTaken, match="a exists already: force=True") as taken:
        put(files, "a")
    assert isinstance(taken.value, FileExistsError) and read(files, "a") == b"old"
    put(files, "a", force=True)
    assert read(files, "a") == b"new"
    (top / "d").mkdir()
    for force in (False, True):
        with pytest.raises(SpecError, match="d is a directory"):
            put(files, "d", force=force)
    # What came meanwhile is not replaced either.
    upload = files.upload("v", "late", force=False)
    (top / "late").write_text("theirs")
    with pytest.raises(FileTaken):
        upload.finish()
    upload.close()
    assert read(files, "late") == b"theirs" and sorted(os.listdir(top)) == ["a", "d", "late"]


def test_nothing_half_written_is_visible(files: VolumeFiles, top: Path) -> None:
    put(files, "a", b"old")
    upload = files.upload("v", "a", force=True)
    upload.write(b"half of ")
    assert listed(files) == ["a"] and read(files, "a") == b"old"
    upload.close()
    assert os.listdir(top) == ["a"]
    left = files.upload("v", "b", force=False)  # as if the daemon was killed
    assert len(os.listdir(top)) == 2
    files.sweep()
    until(lambda: os.listdir(top) == ["a"])
    left.close()


@pytest.mark.parametrize("path", ["../x", "a/../../x", "..", "a\0b", "a\nb", "\udc80"])
def test_paths_that_are_refused(files: VolumeFiles, path: str) -> None:
    for act in (
        lambda: listed(files, path),
        lambda: read(files, path),
        lambda: put(files, path),
        lambda: files.remove("v", path, recursive=True),
        lambda: files.copy("v", [path], "b", recursive=True),
    ):
        with pytest.raises(SpecError) as refused:
            act()
        assert refused.value.code == "bad-path"


@pytest.mark.parametrize("name", ["..", ".", "a/b", "", ".hidden", "x" * 65, "a\n"])
def test_volume_names_that_are_refused(files: VolumeFiles, name: str) -> None:
    for act in (lambda: list(files.entries(name, "", recursive=False)), lambda: files.delete(name)):
        with pytest.raises(SpecError, match="volume name"):
            act()


def test_symbolic_links_lead_nowhere(files: VolumeFiles, top: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    (top / "file").symlink_to(outside / "secret")
    (top / "dir").symlink_to(outside)
    (top / "up").symlink_to("..")
    (top / "inner").mkdir()
    (top / "inner" / "self").symlink_to(top)
    for path in ("dir/secret", "up/v/x", "inner/self/file"):
        with pytest.raises(SpecError, match="symbolic links are not followed"):
            read(files, path)
        with pytest.raises(SpecError, match="symbolic links are not followed"):
            put(files, path, force=True)
        with pytest.raises(SpecError, match="symbolic links are not followed"):
            files.remove("v", path, recursive=True)
    with pytest.raises(SpecError, match="file is not a regular file: a symlink"):
        read(files, "file")
    with pytest.raises(SpecError):
        files.copy("v", ["dir"], "stolen", recursive=True)
    assert set(listed(files)) == {"dir", "file", "inner", "inner/self", "up"}
    # A link itself may be replaced and removed: what it leads to is as it was.
    put(files, "file", force=True)
    for path in ("dir", "up", "inner"):
        files.remove("v", path, recursive=True)
    until(lambda: os.listdir(top) == ["file"])
    assert (outside / "secret").read_text() == "secret" and not (top / "file").is_symlink()


def test_only_regular_files_are_read(files: VolumeFiles, top: Path) -> None:
    os.mkfifo(top / "fifo")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(top / "socket"))
    kinds = {"fifo": "fifo", "socket": "socket"}
    if os.geteuid() == 0:
        os.mknod(top / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        kinds["null"] = "device"
    for name, kind in kinds.items():
        with pytest.raises(SpecError, match=f"{name} is not a regular file: a {kind}"):
            read(files, name)
        files.remove("v", name, recursive=False)
    listener.close()
    with pytest.raises(SpecError, match="/ is a directory"):
        read(files, "/")


def test_hostile_depth(files: VolumeFiles, top: Path) -> None:
    depth = 1200
    fd = os.open(top, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=fd)
        deeper = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = deeper
    os.close(fd)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SpecError, match="too deep ones, to list all"):
        list(files.entries("v", "", recursive=True))
    files.delete("v")
    assert files.names() == []
    until(lambda: not os.listdir(top.parent))
    assert len(os.listdir("/proc/self/fd")) <= before


def test_directories_larger_than_what_is_held(files: VolumeFiles, top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("woodfrog.daemon.volumes._AT_ONCE", 7)
    made = {f"d{i}/f{j}" for i in range(9) for j in range(20)}
    for path in made:
        put(files, path)
    assert set(listed(files)) == made | {f"d{i}" for i in range(9)}
    files.delete("v")
    until(lambda: not os.listdir(top.parent))


def test_copy(files: VolumeFiles, top: Path) -> None:
    put(files, "a/one", b"1")
    put(files, "a/two", b"2")
    files.copy("v", ["a/one"], "b", recursive=False)
    files.copy("v", ["a/one", "a/two"], "a", recursive=False)
    files.copy("v", ["a"], "new/", recursive=True)
    assert read(files, "b") == b"1" and read(files, "new/a/two") == b"2"
    (top / "a" / "empty").mkdir()
    (top / "a" / "link").symlink_to("/etc")
    for _ in range(2):
        files.copy("v", ["a"], "new/", recursive=True)
    assert (top / "new/a/empty").is_dir() and os.readlink(top / "new/a/link") == "/etc"
    if os.geteuid() == 0:
        assert (top / "new/a/link").lstat().st_uid == (top / "new/a/empty").stat().st_uid == UID
    os.mkfifo(top / "a" / "pipe")
    with pytest.raises(SpecError, match="new/a/pipe cannot be copied: a fifo"):
        files.copy("v", ["a"], "new/", recursive=True)
    with pytest.raises(SpecError, match=r"a is a directory: recursive=True \(--recursive\) copies it"):
        files.copy("v", ["a"], "c", recursive=False)
    with pytest.raises(SpecError, match="into itself"):
        files.copy("v", ["a"], "a/b/c", recursive=True)
    with pytest.raises(FileMissing, match="none: no such file"):
        files.copy("v", ["none"], "c", recursive=True)


# The API


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Daemon]:
    gates.clear()
    daemon = Daemon(tmp_path, FaultyBackend)
    yield daemon
    await daemon.close()


async def test_a_volume_in_use_is_not_deleted(daemon: Daemon) -> None:
    await daemon.deploy(function("wait", volumes=(VolumeMount("v", "/v"),)))
    await daemon.submit("wait")
    while not daemon.controller.instances:
        await asyncio.sleep(0.01)
    assert (await daemon.http.get("/volumes")).json() == {"volumes": [{"name": "v", "containers": 1}]}
    refused = await daemon.http.delete("/volumes/v")
    assert refused.status_code == 400 and error_of(refused)["code"] == "volume-in-use"
    assert "in use by 1 container of demo" in error_of(refused)["message"]
    gates.setdefault("gate", asyncio.Event()).set()
    await daemon.http.post("/apps/demo/stop")
    while daemon.controller.instances:
        await asyncio.sleep(0.01)
    assert (await daemon.http.delete("/volumes/v")).json() == {"name": "v", "deleted": True}
    missing = await daemon.http.delete("/volumes/v")
    assert missing.status_code == 404 and "volume create v" in error_of(missing)["message"]


async def test_errors_have_their_status(daemon: Daemon) -> None:
    assert (await daemon.http.put("/volumes/v")).json() == {"name": "v", "created": True}
    assert (await daemon.http.put("/volumes/v")).json() == {"name": "v", "created": False}
    assert (await daemon.http.put("/volumes/..v")).status_code == 400
    for path, status, code in (("a", 404, "file-missing"), ("../a", 400, "bad-path"), ("", 400, "is-directory")):
        answer = await daemon.http.get("/volumes/v/file", params={"path": path})
        assert (answer.status_code, error_of(answer)["code"]) == (status, code)
    answer = await daemon.http.get("/volumes/v/list", params={"path": "a"})
    assert (answer.status_code, error_of(answer)["code"]) == (404, "file-missing")
    answer = await daemon.http.post("/volumes/v/check", json={"paths": "a"})
    assert error_of(answer)["code"] == "bad-request"


# The SDK, over a real socket


@pytest.fixture
async def served(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Daemon]:
    path = daemon.settings.home / "woodfrogd.sock"
    server = uvicorn.Server(uvicorn.Config(daemon.app, uds=str(path), log_level="error", lifespan="off"))
    task = asyncio.get_running_loop().create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    client = Client(Settings(home=daemon.settings.home))
    monkeypatch.setattr(client_module, "connect", lambda **_: client)
    yield daemon
    client.close()
    server.should_exit = True
    await task


async def test_sdk(served: Daemon, tmp_path: Path) -> None:
    volume = Volume.from_name("v", create_if_missing=True)
    local = tmp_path / "local"
    (local / "sub").mkdir(parents=True)
    (local / "one").write_text("1")
    (local / "sub" / "two").write_text("2")
    big = os.urandom(5 << 20)

    def use() -> None:
        buffer = io.BytesIO(big)
        buffer.read()
        with volume.batch_upload() as batch:
            batch.put_directory(local, "/data")
            batch.put_file(buffer, "/big", mode=0o600)
        assert b"".join(volume.read_file("big")) == big
        entries = {e.path: e for e in volume.listdir("/", recursive=True)}
        assert list(entries) == ["big", "data", "data/one", "data/sub", "data/sub/two"]
        assert entries["big"].size == len(big) and entries["data"].type == FileEntryType.DIRECTORY
        with pytest.raises(FileExistsError), volume.batch_upload() as batch:
            batch.put_file(io.BytesIO(b"x"), "/new")
            batch.put_file(io.BytesIO(b"x"), "/big")
        assert "new" not in [e.path for e in volume.iterdir("/", recursive=False)]
        with pytest.raises(ValueError, match="cannot end with /"), volume.batch_upload() as batch:
            batch.put_file(local / "one", "/x/")
        with pytest.raises(TypeError, match="binary mode"), volume.batch_upload() as batch:
            batch.put_file(io.StringIO("x"), "/text")  # type: ignore[arg-type]
        with pytest.raises(FileNotFoundError):
            list(volume.read_file("text"))
        volume.copy_files(["data/one"], "again")
        out = io.BytesIO()
        assert volume.read_file_into_fileobj("again", out) == 1 and out.getvalue() == b"1"
        with pytest.raises(SpecError, match="recursive=True"):
            volume.remove_file("data")
        volume.remove_file("data", recursive=True)
        with pytest.raises(FileNotFoundError):
            volume.listdir("data")
        with pytest.raises(NotFoundError, match="no volume 'w'"):
            Volume.from_name("w").listdir("/")

    await asyncio.to_thread(use)
    async with volume.batch_upload(force=True) as batch:
        batch.put_file(io.BytesIO(b"later"), "/big")
    assert b"".join([piece async for piece in volume.read_file.aio("big")]) == b"later"
    assert [e.path async for e in volume.iterdir.aio("/")] == [e.path for e in await volume.listdir.aio("/")]
    await volume.remove_file.aio("big")
    with pytest.raises(FileMissing):
        await volume.read_file_into_fileobj.aio("big", io.BytesIO())


async def test_nothing_of_a_directory_is_left_out_unsaid(
    served: Daemon, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    volume = Volume.from_name("v", create_if_missing=True)
    local, other = tmp_path / "local", tmp_path / "other"
    for folder in (local / "empty" / "deep", local / "only", other / "below"):
        folder.mkdir(parents=True)
    (local / "one").write_text("1")
    (other / "below" / "far").write_text("far")
    for name, target in (("a", "one"), ("b", "only"), ("c", other), ("d", other / "below" / "far"), ("up", ".")):
        (local / name).symlink_to(target)
    (local / "only" / "gone").symlink_to("nowhere")
    os.mkfifo(local / "pipe")

    def use() -> None:
        with volume.batch_upload() as batch:
            batch.put_directory(local, "/x")
            assert len(batch) == 4
            batch.put_directory(local, "/flat", recursive=False)
            batch.put_directory(local / "empty" / "deep", "/e")
        listed = {e.path: e.type for e in volume.listdir("/", recursive=True)}
        below = ["a", "b", "c", "c/below", "c/below/far", "d", "empty", "empty/deep", "one", "only"]
        assert sorted(p for p in listed if p.startswith("x/")) == [f"x/{p}" for p in below]
        assert sorted(p for p in listed if p.startswith("flat/")) == ["flat/a", "flat/d", "flat/one"] and "e" in listed
        assert b"".join(volume.read_file("x/c/below/far")) == b"".join(volume.read_file("x/d")) == b"far"
        with pytest.raises(SpecError, match="not a directory"), volume.batch_upload() as batch:
            batch.put_directory(local / "empty", "/x/one")

    await asyncio.to_thread(use)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"woodfrog: note: {local}: followed out of it: c -> {other}, d -> {other}/below/far"
    assert said[1] == (
        f"woodfrog: note: {local}: left out: pipe (not a file), up (a link to a directory above it), "
        "b/gone (a link to nothing) and 1 more"
    )


async def test_an_upload_that_breaks_off_leaves_nothing(served: Daemon) -> None:
    volume = Volume.from_name("v", create_if_missing=True)
    top = served.settings.home / "volumes" / "v"

    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() > 4 << 20:
                raise OSError("the disk is gone")
            return super().read(size)

    def use() -> None:
        with pytest.raises(OSError, match="the disk is gone"), volume.batch_upload() as batch:
            batch.put_file(Broken(bytes(8 << 20)), "/x")

    await asyncio.to_thread(use)
    while os.listdir(top):
        await asyncio.sleep(0.01)


async def test_a_file_that_becomes_shorter(served: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    top = served.settings.home / "volumes" / "v"
    await served.http.put("/volumes/v")
    (top / "x").write_bytes(bytes(64 << 20))

    def use() -> None:
        pieces = Volume.from_name("v").read_file("x")
        next(pieces)
        os.truncate(top / "x", 1 << 20)
        with pytest.raises(DaemonError, match="broke off"):
            list(pieces)

    await asyncio.to_thread(use)


# The command line


def run(*argv: str, stdin: str | None = None) -> tuple[int, str, str]:
    done = CliRunner().invoke(commands.app, ["volume", *argv], input=stdin)
    return done.exit_code, done.stdout, done.stderr


def broken(*_: Any) -> int:
    raise BrokenPipeError(errno.EPIPE, "Broken pipe")


async def test_commands(served: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "src" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    Path("src/one").write_text("1")
    Path("src/sub/two").write_text("2")

    def use() -> None:
        assert run("list") == (0, "", "no volumes\n")
        assert run("create", "v") == (0, "", "made volume v\n")
        assert run("create", "v") == (2, "", "error: volume 'v' exists already\n")
        assert json.loads(run("list", "--json")[1]) == [{"name": "v", "containers": 0}]
        assert run("ls", "v") == (0, "", "nothing in it\n")
        assert run("put", "v", "src/one") == (0, "", "sent src/one to one in v\n")
        assert run("put", "v", "src/one")[2].startswith("error: volume 'v': one exists already: force=True (--force)")
        assert run("put", "v", "src/one", "-f")[0] == 0
        assert run("put", "v", "src", "/data") == (0, "", "sent src: 2 files to data in v\n")
        assert "data is a directory: end the path with /" in run("put", "v", "src/one", "data")[2]
        assert run("put", "v", "src/one", "data/")[2].startswith("error: volume 'v': data/one exists already")
        assert run("put", "v", "nowhere") == (2, "", "error: nowhere: No such file or directory\n")
        assert run("put", "w", "src/one")[2].startswith("error: no volume 'w'")
        (served.settings.home / "volumes" / "v" / "\x1b[2J").touch()
        listed = run("ls", "v")[1].splitlines()
        assert [line.split()[0] for line in listed] == ["PATH", "\\x1b[2J", "data", "one"]
        found = json.loads(run("ls", "v", "data", "--json")[1])
        assert [(e["path"], e["type"]) for e in found] == [("data/one", "file"), ("data/sub", "directory")]
        assert run("ls", "v", "none") == (2, "", "error: volume 'v': none: no such file or directory\n")
        assert run("get", "v", "one", "-") == (0, "1", "")
        with monkeypatch.context() as patched:
            patched.setattr(volume_files, "read_into", broken)
            assert run("get", "v", "one", "-") == (141, "", "")
        assert run("get", "v", "one", "new/")[0] == 0 and Path("new/one").read_text() == "1"
        assert run("get", "v", "one", "new") == (2, "", "error: new/one exists already: --force replaces it\n")
        assert run("get", "v", "one", "new", "--force")[0] == 0
        Path("part/sub/two").mkdir(parents=True)
        assert run("get", "v", "data/", "part/sub/..")[0] == 0 and Path("part/data/sub/two").is_file()
        Path("part/data/one").unlink()
        assert run("get", "v", "data", "part")[2] == "error: part/data/sub/two exists already: --force replaces it\n"
        assert not Path("part/data/one").exists()
        assert run("get", "v", "data", "all") == (0, "", "fetched all: 2 files\n")
        assert run("get", "v", "data")[0] == 0 and Path("data/sub/two").read_text() == Path("all/sub/two").read_text()
        assert run("get", "v", "none") == (2, "", "error: volume 'v': none: no such file or directory\n")
        assert not list(Path().rglob(".woodfrog-*"))
        assert run("cp", "v", "one", "data", "copies/", "-r")[0] == 0
        assert run("get", "v", "copies/data/sub/two", "-")[1] == "2"
        assert run("cp", "v", "one")[2].startswith("error: volume cp wants SOURCE and TARGET")
        assert "is a directory: recursive=True (--recursive)" in run("rm", "v", "data")[2]
        assert run("rm", "v", "data", "-r") == (0, "", "removed data from v\n")
        assert "volume delete v" in run("rm", "v", "/", "-r")[2]
        assert run("delete", "v", stdin="n\n")[0] == 1 and run("list")[1]
        assert run("delete", "w")[2] == "error: no volume 'w'; `woodfrog volume list` shows them\n"
        assert run("delete", "w", "--yes", "--allow-missing") == (0, "", "no volume w\n")
        assert run("delete", "v", "-y") == (0, "", "removed volume v\n") and not run("list")[1]

    await asyncio.to_thread(use)


# The handle


def test_read_only_and_mount_options(monkeypatch: pytest.MonkeyPatch) -> None:
    volume = Volume.from_name("v")
    assert not volume.is_read_only and volume.read_only().is_read_only
    assert volume.read_only().with_mount_options().is_read_only
    assert not volume.read_only().with_mount_options(read_only=False).is_read_only
    inner = volume.read_only().with_mount_options(sub_path=PurePosixPath("/a/./b/"))
    assert inner.is_read_only and inner.sub_path == "a/b"
    assert inner.with_mount_options(read_only=False).sub_path == "a/b"
    assert inner.with_mount_options(sub_path="/").sub_path == ""
    for bad in ("a/../../b", "a\0b"):
        with pytest.raises(SpecError, match=r"is not a path within the volume.*test_volumes.py"):
            volume.with_mount_options(sub_path=bad)
    for act in (
        lambda v: v.remove_file("a"),
        lambda v: v.batch_upload().__enter__(),
        lambda v: v.copy_files(["a"], "b"),
    ):
        with pytest.raises(SpecError, match="read-only here"):
            act(volume.read_only())
    app: Any = woodfrog.App("a")

    @app.function(serialized=True, volumes={"/v": volume.read_only()})
    def f() -> None: ...

    assert f.spec.volumes == (VolumeMount("v", "/v", read_only=True, create=False),)
    monkeypatch.setitem(sys.modules, "woodfrog.worker.state", ModuleType("state"))
    with pytest.raises(SpecError, match=r"Volume.iterdir works outside of containers: in one, use the files"):
        volume.listdir("/")
