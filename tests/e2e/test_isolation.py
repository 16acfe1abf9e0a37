"""What user code can see and do, asked from inside a function: cold, and thawed."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import woodfrog
from e2e.harness import Daemon
from woodfrog.errors import OutOfMemoryError

pytestmark = [pytest.mark.root, pytest.mark.criu]

PROGRAM = '''
import ctypes, errno, os, signal, socket, subprocess, sys, time
import woodfrog

app = woodfrog.App("inside")
libc = ctypes.CDLL(None, use_errno=True)
UNSHARE_USER, UNSHARE_NET, UNSHARE_MOUNT = 0x10000000, 0x40000000, 0x20000
X86 = os.uname().machine == "x86_64"  # else arm64, whose system calls have other numbers


def attempt(function, *args):
    """The result, or the name of what went wrong."""
    try:
        return function(*args)
    except OSError as e:
        return errno.errorcode[e.errno]


def syscall(number, *args):
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, args))
    return errno.errorcode[ctypes.get_errno()] if result < 0 else result


def read(path):
    if os.path.isdir(path):
        return os.listdir(path)
    with open(path, "rb") as file:
        return file.read(64)


def write(path):
    with open(path, "w"):
        return "written"


CAPABILITIES = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp")
PLACES = (
    "/", "/usr", "/etc", "/var", "/app", "/proc/sys/kernel", "/dev/shm", "/tmp", "/sys", "/run/criu", "/run/woodfrog",
)


def look(paths):
    with open("/proc/self/status") as file:
        status = dict(line.split(":", 1) for line in file)
    return {
        "ids": [list(os.getresuid()), list(os.getresgid()), os.getgroups()],
        "status": {k: status[k].strip() for k in CAPABILITIES},
        "pids": sorted(int(p) for p in os.listdir("/proc") if p.isdigit()),
        "own": [os.getpid(), os.getppid()],
        "read": {path: attempt(read, path) for path in paths},
        "write": {path: attempt(write, path + "/woodfrog-test") for path in PLACES},
        "devices": sorted(os.listdir("/dev")),
        "umask": os.umask(0o022),
        "cwd": os.getcwd(),
        "host": socket.gethostname(),
    }


def misbehave():
    status = {
        "mount": libc.mount(b"none", b"/tmp", b"tmpfs", 0, None),
        "mount errno": errno.errorcode[ctypes.get_errno()],
        "unshare user": libc.unshare(UNSHARE_USER),
        "unshare net": libc.unshare(UNSHARE_NET),
        "unshare mount": libc.unshare(UNSHARE_MOUNT),
        "ptrace init": libc.ptrace(16, 1, 0, 0),
        "chroot": attempt(os.chroot, "/tmp"),
        "setuid": attempt(os.setuid, 0),
        "kill init": attempt(os.kill, 1, signal.SIGTERM),
        "mknod": attempt(os.mknod, "/tmp/disk", 0o60600, os.makedev(8, 0)),
        "sethostname": attempt(socket.sethostname, "other"),
        "raw socket": attempt(socket.socket, socket.AF_INET, socket.SOCK_RAW, 1),
        "read init": attempt(os.listdir, "/proc/1/root"),
        "io_uring_setup": syscall(425, 8, 0),
        "io_uring_enter": syscall(426, 0, 0, 0, 0, 0, 0),
        "io_uring_register": syscall(427, 0, 0, 0, 0),
        "bpf": syscall(321 if X86 else 280, 0, 0, 0),
        "keyctl": syscall(250 if X86 else 219, 0, 0, 0),
        "init_module": syscall(175 if X86 else 105, 0, 0, 0),
        "kexec_load": syscall(246 if X86 else 104, 0, 0, 0, 0),
        "open_by_handle_at": syscall(304 if X86 else 265, 0, 0, 0),
        "still here": True,
    }
    su = subprocess.run(["su", "-c", "id"], stdin=subprocess.DEVNULL, capture_output=True)
    status["su"] = su.returncode != 0
    return status


@app.function()
def cold(paths):
    return look(paths)


@app.function(enable_memory_snapshot=True, single_use_containers=True)
def thawed(paths):
    return look(paths)


@app.function()
def cold_misbehaves():
    return misbehave()


@app.function(enable_memory_snapshot=True, single_use_containers=True)
def thawed_misbehaves():
    return misbehave()


@app.function(memory=128)
def hungry():
    return len(bytearray(os.urandom(1 << 20)) * 512)


@app.function(memory=256)
def modest():
    return len(bytearray(64 << 20))


@app.function(ephemeral_disk=32)
def fill():
    for folder in ("/tmp", "/root"):
        try:
            with open(folder + "/big", "wb") as file:
                for _ in range(64):
                    file.write(bytes(1 << 20))
            return "no limit"
        except OSError as e:
            os.unlink(folder + "/big")
            found = errno.errorcode[e.errno]
    return found


@app.function(single_use_containers=True)
def fork_bomb():
    children = []
    try:
        while len(children) < 20000:
            children.append(os.posix_spawn("/bin/sleep", ["sleep", "1000"], {}))
        return "no limit"
    except OSError as e:
        return [errno.errorcode[e.errno], len(children)]


@app.function(cpu=(0.25, 0.5))
def spin():
    begin, used = time.monotonic(), time.process_time()
    while time.monotonic() - begin < 1.5:
        pass
    return (time.process_time() - used) / (time.monotonic() - begin)
'''


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with Daemon() as daemon, pytest.MonkeyPatch.context() as patch:
        patch.setenv("WOODFROG_HOME", str(daemon.home))
        daemon.cli("deploy", str(daemon.program(PROGRAM, "inside.py")))
        yield daemon


def call(name: str, *args: Any) -> Any:
    return woodfrog.Function.from_name("inside", name).remote(*args)


def twice(name: str, *args: Any) -> list[Any]:
    """Answers of a cold container, of the one that captured, and of a thawed copy."""
    return [call(f"cold{name}", *args), call(f"thawed{name}", *args), call(f"thawed{name}", *args)]


def way_to_the_interpreter(folder: str) -> set[str]:
    """What must be seen of a masked directory, since Python or its environment lies below it."""
    needed = {Path(p).resolve() for p in (sys.prefix, sys.base_prefix, woodfrog.__file__)} | {Path(sys.prefix)}
    return {p.relative_to(folder).parts[0] for p in needed if p.is_relative_to(folder)}


def test_what_a_function_sees(daemon: Daemon) -> None:
    secret = daemon.home / "secret"
    secret.write_text("of the host")
    secret.chmod(0o644)
    note = Path("/tmp") / f"of-the-host-{os.getpid()}"
    note.write_text("of the host")
    homes = [str(p) for p in Path("/home").iterdir()]
    run = [str(p) for p in Path("/run").iterdir()]
    paths = ["/root", "/home", "/etc/shadow", "/run", "/mnt", "/boot", "/dev/mem", "/proc/kcore", "/proc/1/environ"]
    paths += [str(secret), str(daemon.home), str(note), "/var/lib/woodfrog", *homes, *run]
    try:
        seen = twice("", paths)
    finally:
        note.unlink()
    uid = daemon.settings.worker_uid
    for found in seen:
        assert found["ids"] == [[uid] * 3, [uid] * 3, found["ids"][2]] and found["ids"][2] in ([], [uid])
        caps = {name: "0" * 16 for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")}
        assert found["status"] == {**caps, "NoNewPrivs": "1", "Seccomp": "2"}
        # Its own processes only: PID 1 and itself.
        assert found["pids"] == [1, found["own"][0]] and found["own"][1] == 1

        read = found["read"]
        assert set(read["/root"]) <= way_to_the_interpreter("/root") and read["/home"] == []
        assert read["/etc/shadow"] in ("EACCES", "ENOENT")
        ours = {"criu", "criu.kdat", "lock", "woodfrog"}
        assert set(read["/run"]) <= ours
        assert read["/proc/1/environ"] == "EACCES"
        for path in ("/dev/mem", str(secret), str(note)):
            assert read[path] in ("ENOENT", "EACCES"), (path, read[path])
        for path in ("/mnt", "/boot", "/proc/kcore", str(daemon.home), "/var/lib/woodfrog"):
            assert read[path] in ([], b"", "ENOENT", "EACCES", "ENOTDIR"), (path, read[path])
        for path in (*homes, *run):
            assert Path(path).name in ours or read[path] in ("ENOENT", "EACCES", []), (path, read[path])

        for path in ("/usr", "/etc", "/var", "/proc/sys/kernel", "/run/criu", "/run/woodfrog"):
            assert found["write"][path] in ("EROFS", "EACCES", "EPERM", "ENOENT"), (path, found["write"][path])
        assert found["write"]["/sys"] in ("EROFS", "EACCES", "ENOENT")
        for path in ("/tmp", "/dev/shm", "/app"):
            assert found["write"][path] == "written"
        assert not {"mem", "kmsg", "sda", "vda", "fuse", "kvm"} & set(found["devices"])
        assert {"null", "zero", "urandom", "random", "shm", "tty"} <= set(found["devices"])
        assert found["cwd"] == "/app"
    # A thaw changes nothing of it.
    for key in ("ids", "status", "own", "read", "write", "devices", "umask"):
        assert seen[0][key] == seen[1][key] == seen[2][key], key
    assert len({found["host"] for found in seen}) == 3


def test_what_a_function_cannot_do(daemon: Daemon) -> None:
    for found in twice("_misbehaves"):
        assert found.pop("still here")
        assert found.pop("mount") == -1 and found.pop("mount errno") == "EPERM"
        for name in ("unshare user", "unshare net", "unshare mount", "ptrace init"):
            assert found.pop(name) == -1, name
        for name in ("io_uring_setup", "io_uring_enter", "io_uring_register"):
            assert found.pop(name) == "ENOSYS", name
        assert found.pop("su")
        assert found.pop("read init") == "EACCES"
        assert set(found.values()) <= {"EPERM", "EACCES", "ENOSYS"}, found


def test_limits(daemon: Daemon) -> None:
    with pytest.raises(OutOfMemoryError, match="128 MiB"):
        call("hungry")
    assert call("modest") == 64 << 20
    assert call("fill") == "ENOSPC"
    error, count = call("fork_bomb")
    assert error == "EAGAIN" and 100 < count < 4096
    assert call("spin") < 0.75


def test_the_host_itself_was_not_changed(daemon: Daemon) -> None:
    assert os.geteuid() == 0
    for folder in ("/usr", "/etc", "/var", "/", "/tmp", "/dev/shm"):
        assert not Path(folder, "woodfrog-test").exists(), folder
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(0) == 0 and ctypes.get_errno() in (0, errno.ENOENT)
