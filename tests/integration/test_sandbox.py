from __future__ import annotations

import asyncio
import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import uvloop

from conftest import criu_path
from integration.sandboxes import ENV, PREFIX, PYTHON, UID, Yard, python, shell, worker_spec
from woodfrog.errors import SandboxError
from woodfrog.linux import capabilities, procfs
from woodfrog.linux.rootplan import CRIU_KDAT, VolumeMount, root_plan
from woodfrog.linux.sandbox import Limits, ProcessSpec, Sandbox
from woodfrog.linux.skeleton import host_above

pytestmark = pytest.mark.root


@pytest.fixture
async def yard() -> AsyncIterator[Yard]:
    yard = Yard.make()
    try:
        yield yard
    finally:
        await yard.close()


async def gone(pid: int, seconds: float = 5) -> bool:
    deadline = time.monotonic() + seconds
    while Path(f"/proc/{pid}").exists():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.01)
    return True


async def test_user_code_has_no_powers(yard: Yard) -> None:
    sandbox = await yard.sandbox()
    worker = await sandbox.spawn(worker_spec("/bin/sleep", "60", inner_pid=100))
    assert worker.inner_pid == 100
    status = procfs.status(worker.host_pid)
    assert status.ns_pids[-1] == 100
    assert status.uids == status.gids == (UID,) * 4
    assert status.groups == ()
    assert (status.cap_effective, status.cap_permitted, status.cap_bounding, status.cap_ambient) == (0, 0, 0, 0)
    assert status.no_new_privs
    assert status.seccomp == 2
    # The program loader has its libraries open for a moment.
    for _ in range(100):
        if set(procfs.descriptors(worker.host_pid)) == {0, 1, 2}:
            break
        await asyncio.sleep(0.05)
    assert set(procfs.descriptors(worker.host_pid)) == {0, 1, 2}
    worker.send_signal(signal.SIGTERM)
    assert await worker.wait() == -signal.SIGTERM


async def test_forbidden_system_calls(yard: Yard) -> None:
    sandbox = await yard.sandbox()
    code = """
        import ctypes, errno, os, platform
        libc = ctypes.CDLL(None, use_errno=True)
        def call(number, *args):
            ctypes.set_errno(0)
            assert libc.syscall(number, *args) == -1, number
            return errno.errorcode[ctypes.get_errno()]
        x86 = platform.machine() == "x86_64"
        assert [call(n, 1, 0, 0) for n in (425, 426, 427)] == ["ENOSYS"] * 3          # io_uring
        assert call(435, 0, 0) == "ENOSYS"                                            # clone3
        assert call(330 if x86 else 289, 0, 0) == "ENOSYS"                            # pkey_alloc
        assert call(272 if x86 else 97, 0x10000000) == "EPERM"                        # unshare(CLONE_NEWUSER)
        assert call(56 if x86 else 220, 0x20000000 | 17, 0, 0, 0, 0) == "EPERM"       # clone(CLONE_NEWPID)
        # A child of init's, or orphans that go to init, would run on while CRIU dumps the worker's tree.
        assert call(56 if x86 else 220, 0x8000 | 17, 0, 0, 0, 0) == "EPERM"           # clone(CLONE_PARENT)
        assert call(157 if x86 else 167, 36, 0, 0, 0, 0) == "EPERM"                   # prctl(PR_SET_CHILD_SUBREAPER, 0)
        assert libc.prctl(36, 1, 0, 0, 0) == 0 and libc.prctl(4, 1, 0, 0, 0) == 0     # 1, PR_SET_DUMPABLE
        assert call(165 if x86 else 40, b"none", b"/tmp", b"tmpfs", 0, 0) == "EPERM"  # mount
        assert call(428, -100, b"/", 0) == "EPERM"                                    # open_tree
        assert call(101 if x86 else 117, 16, 1, 0, 0) == "EPERM"                      # ptrace
        assert call(323 if x86 else 282, 0) == "EPERM"                                # userfaultfd
        assert call(321 if x86 else 280, 0, 0, 0) == "EPERM"                          # bpf
        assert call(41 if x86 else 198, 40, 1, 0) == "EAFNOSUPPORT"                   # socket(AF_VSOCK)
        if x86:
            assert call(0x40000000 + 39) == "ENOSYS"                                  # x32 getpid
        import threading
        threading.Thread(target=print, args=("threads work",)).start()
        assert os.waitstatus_to_exitcode(os.system("true")) == 0
    """
    done = await python(sandbox, textwrap.dedent(code))
    assert (done.status, done.stdout) == (0, b"threads work\n"), done


async def test_what_can_be_read_and_written(yard: Yard) -> None:
    sandbox = await yard.sandbox()
    done = await shell(
        sandbox,
        f"""
        set -eu
        refuse() {{ if "$@" 2>/dev/null; then echo "allowed: $*"; exit 1; fi; }}
        for d in /tmp /var/tmp /dev/shm /run /root; do echo x > $d/file; done
        mkdir /data; echo x > /data/file
        [ "$(ls -A /root | grep -v pyenv || true)" = file ]
        [ "$(ls -A /home)" = "" ]
        refuse ls {yard.base}/secret
        refuse touch /usr/file /etc/file /var/file /opt/file /file/file
        refuse mv /run/woodfrog /run/other
        refuse mv /run /other
        refuse rmdir /home
        refuse ls /run/woodfrog
        refuse cat /etc/shadow
        refuse ls -A /proc/1/fd
        refuse sh -c 'echo 1 > /proc/sys/kernel/ns_last_pid'
        [ "$(hostname)" = frog-{sandbox.id} ]
        [ "$(cat /etc/hostname)" = frog-{sandbox.id} ]
        [ "$(id -un)" = woodfrog ]
        [ "$(ls /dev | tr '\\n' ' ')" = "fd full null ptmx pts random shm stderr stdin stdout tty urandom zero " ]
        ! grep -q {yard.base} /proc/1/cmdline
        find / -xdev -name '*.sock' 2>/dev/null
        """,
    )
    assert (done.status, done.stdout) == (0, b""), done
    upper = sandbox.upper_path()
    assert {p.name for p in upper.iterdir()} == {"tmp", "run", "root", "data", ".var-tmp"}
    assert not list(upper.glob("run/woodfrog"))


async def test_disk_limit(yard: Yard) -> None:
    sandbox = await yard.sandbox(disk_bytes=8 << 20)
    done = await python(sandbox, "open('/data', 'wb').write(bytes(16 << 20))")
    assert done.status == 1
    assert b"No space left on device" in done.stderr


async def test_memory_limit_is_counted(yard: Yard) -> None:
    sandbox = await yard.sandbox(limits=Limits(memory_bytes=64 << 20))
    assert sandbox.oom_kills() == 0
    done = await python(sandbox, "b = bytearray(256 << 20); b[::4096] = b'x' * len(b[::4096])")
    assert done.status == -signal.SIGKILL
    assert sandbox.oom_kills() == 1
    assert sandbox.alive
    assert 48 << 20 < sandbox.memory_peak() <= 64 << 20
    await sandbox.set_limits(Limits(memory_bytes=512 << 20))
    assert (await python(sandbox, "b = bytearray(128 << 20); b[::4096] = b'x' * len(b[::4096])")).status == 0


async def test_protection_of_the_daemon_does_not_reach_into_the_sandbox(yard: Yard) -> None:
    own = Path("/proc/self/oom_score_adj")
    before = own.read_text()
    try:
        own.write_text("-1000")
    except PermissionError:
        pytest.skip("needs CAP_SYS_RESOURCE")
    try:
        sandbox = await yard.sandbox(limits=Limits(memory_bytes=64 << 20))
    finally:
        own.write_text(before)
    assert (await shell(sandbox, "cat /proc/self/oom_score_adj")).stdout == b"0\n"
    done = await python(sandbox, "b = bytearray(256 << 20); b[::4096] = b'x' * len(b[::4096])")
    assert (done.status, sandbox.oom_kills()) == (-signal.SIGKILL, 1)


async def test_pids_limit(yard: Yard) -> None:
    sandbox = await yard.sandbox(limits=Limits(pids=16))
    code = "import os\nfor _ in range(64):\n  if not os.fork(): os.read(os.pipe()[0], 1)"
    done = await python(sandbox, code)
    assert done.status == 1
    assert b"BlockingIOError" in done.stderr
    await sandbox.signal(-1, signal.SIGKILL)
    assert (await shell(sandbox, "echo again")).stdout == b"again\n"


async def test_exec_failures_are_errors(yard: Yard) -> None:
    sandbox = await yard.sandbox()
    for spec, number in (
        (worker_spec("/no/such"), errno.ENOENT),
        (worker_spec("no-such-program"), errno.ENOENT),
        (worker_spec("/etc/passwd"), errno.EACCES),
        (worker_spec("/bin/true", cwd="/no/such"), errno.ENOENT),
        (worker_spec("/bin/true", stdout="/no/such"), errno.ENOENT),
        (worker_spec("/bin/true", inner_pid=1), errno.EINVAL),
        (worker_spec("/bin/true", no_new_privs=False), errno.EINVAL),
    ):
        with pytest.raises(SandboxError) as caught:
            await sandbox.spawn(spec)
        assert caught.value.fields["errno"] == number, caught.value
    worker = await sandbox.spawn(worker_spec("/bin/sleep", "9", inner_pid=100))
    with pytest.raises(SandboxError) as caught:
        await sandbox.spawn(worker_spec("/bin/true", inner_pid=100))
    assert caught.value.fields["errno"] == errno.EEXIST
    worker.send_signal(signal.SIGKILL)
    assert await worker.wait() == -signal.SIGKILL


async def test_descriptors_environment_limits_and_long_arguments(yard: Yard) -> None:
    sandbox = await yard.sandbox()
    read_end, write_end = os.pipe()
    long = "x" * 100_000
    code = (
        "import os, sys, resource; limit = resource.getrlimit(resource.RLIMIT_NOFILE);"
        " answer = os.environ['KEY'], len(sys.argv[1]), len(sys.argv[2]), limit, oct(os.umask(0)), os.getcwd();"
        " os.write(7, ' '.join(map(str, answer)).encode())"
    )
    process = await sandbox.spawn(
        worker_spec(
            PYTHON,
            "-c",
            code,
            long,
            long,
            env={**ENV, "KEY": "välue=1"},
            pass_fds={7: write_end},
            umask=0o077,
            cwd="/tmp",
            rlimits={resource.RLIMIT_NOFILE: (77, 88)},
        )
    )
    os.close(write_end)
    assert await process.wait() == 0
    assert os.read(read_end, 1000).decode() == "välue=1 100000 100000 (77, 88) 0o77 /tmp"
    os.close(read_end)


async def test_run_is_bounded_in_output_and_time(yard: Yard) -> None:
    sandbox = await yard.sandbox()
    done = await sandbox.run(worker_spec("/bin/sh", "-c", "head -c 3000000 /dev/zero; echo e >&2"), 30, limit=1000)
    assert (done.status, len(done.stdout), done.stderr, done.truncated) == (0, 1000, b"e\n", True)
    # A process left behind keeps the pipe open: no reason to wait for it.
    begin = time.monotonic()
    assert (await shell(sandbox, "sleep 60 & echo hi")).stdout == b"hi\n"
    with pytest.raises(SandboxError) as caught:
        await sandbox.run(worker_spec("/bin/sh", "-c", "echo started; sleep 60"), 0.3)
    assert caught.value.code == "sandbox-timeout"
    assert caught.value.fields["stdout"] == "started\n"
    assert time.monotonic() - begin < 10


async def test_every_end_is_reported_also_of_reparented_processes(yard: Yard) -> None:
    sandbox = await yard.sandbox()
    done = await shell(sandbox, "(sleep 0.2; exit 7) & echo $!")
    orphan = await sandbox.watch(int(done.stdout))
    assert await orphan.wait() == 7
    done = await shell(sandbox, "(exit 9) & echo $!; sleep 0.1; exec sleep 0.1")
    many = await asyncio.gather(*(sandbox.spawn(worker_spec("/bin/sh", "-c", f"exit {n}")) for n in range(40)))
    assert [await p.wait() for p in many] == list(range(40))
    with pytest.raises(SandboxError) as caught:
        await sandbox.watch(9999)
    assert caught.value.fields["errno"] == errno.ESRCH


async def test_malformed_messages_do_not_kill_init(yard: Yard) -> None:
    sandbox = await yard.sandbox()
    channel = sandbox._channel
    rng = random.Random(7)
    words = [
        b"ops",
        b"spawn",
        b"signal",
        b"pidfd",
        b"bind",
        b"mkdir",
        b"@0",
        b"@99",
        b"-1",
        b"",
        b"999999999999999999999",
        b"/x",
    ]
    for _ in range(500):
        kind = rng.randrange(4)
        if kind == 0:
            data = rng.randbytes(rng.randrange(1, 300))
        elif kind == 1:
            data = b"memfd\0"
        else:
            fields = [
                str(rng.randrange(10**6, 10**7)).encode(),
                rng.choice(words),
                *rng.choices(words, k=rng.randrange(20)),
            ]
            data = b"\0".join(fields) + (b"\0" if kind == 2 else b"")
        # Not the words that obey: kill(-1, 9) would be legal.
        if b"signal" not in data:
            channel.send_raw(data)
        if rng.random() < 0.1:
            await channel.request("ping")
    for request in (
        ("spawn",), ("spawn", "0", "0", "none"), ("ops", "mkdir", "/a"), ("ops", "nonsense"), ("signal", "1", "9"),
        ("signal", "0", "9"), ("pidfd", "x"), ("nonsense",), ("ops", "mknod", "/tmp/d", "b", "600", "8", "0", "0", "0"),
        ("ops", "addr", "lo", "1.2.3.400", "8"), ("ops", "bind", "@3", "/tmp", ""), ("lastpid", "0"),
    ):  # fmt: skip
        with pytest.raises(SandboxError):
            await channel.request(*request)
    with pytest.raises(SandboxError, match="NUL"):
        await channel.request("ops", "mkdir", "/a\0b", "755", "0", "0")
    assert (await shell(sandbox, "echo alive")).stdout == b"alive\n"


async def test_symlinks_in_a_layer_do_not_lead_init_astray(yard: Yard) -> None:
    """Mount points are made as root: below a symlink that user code planted, they must stay inside."""
    layer, volume, outside = (yard.base / n for n in ("layer", "volume", "outside"))
    for directory in (layer, volume, outside):
        directory.mkdir()
    (layer / "data").symlink_to(outside)
    (layer / "up").symlink_to("../../../../../../tmp")
    for target in ("/data/deep", "/up/there"):
        with pytest.raises(SandboxError, match=f"straight {target}.*symbolic links"):
            await yard.sandbox(layers=(layer,), volumes=(VolumeMount(volume, target),), hidden=())
    assert list(outside.iterdir()) == []
    assert not Path("/tmp/there").exists()


async def test_paths_that_user_code_planted_are_not_followed(yard: Yard) -> None:
    sandbox = await yard.sandbox()
    await shell(sandbox, "ln -s /etc/passwd /run/woodfrog/worker/worker.sock; ln -s / /tmp/root")
    with pytest.raises(OSError) as caught:
        await sandbox.connect("/run/woodfrog/worker/worker.sock")
    assert caught.value.errno == errno.ELOOP
    with pytest.raises(OSError) as caught:
        sandbox.open_path("/tmp/root/etc/shadow", os.O_RDONLY)
    assert caught.value.errno == errno.ELOOP


async def test_volume_is_writable_and_persists(yard: Yard) -> None:
    volume = yard.base / "volume"
    volume.mkdir()
    os.chown(volume, UID, UID)
    changes: dict[str, object] = {
        "volumes": (VolumeMount(volume, "/mnt/data"), VolumeMount(volume, "/ro", read_only=True))
    }
    first = await yard.sandbox(**changes)
    assert (await shell(first, "echo kept > /mnt/data/file")).status == 0
    await first.destroy()
    second = await yard.sandbox(**changes)
    done = await shell(second, "cat /mnt/data/file; echo x > /ro/file")
    assert (done.status, done.stdout) == (2, b"kept\n")


async def test_what_is_written_beside_the_code_stays_in_the_container(yard: Yard) -> None:
    code = yard.base / "code"
    (code / "app/data").mkdir(parents=True)
    for path in (code / "app/app.py", code / "app/data/rows"):
        path.write_text("as deployed\n")
        os.chown(path, UID, UID)
    first = await yard.sandbox(code=code)
    script = "cat app.py; echo new > app.py; echo more >> data/rows; echo out > result; cat app.py data/rows result"
    done = await first.run(worker_spec("/bin/sh", "-c", script, cwd="/app"), 10)
    assert (done.status, done.stdout) == (0, b"as deployed\nnew\nas deployed\nmore\nout\n"), done.stderr
    assert (await shell(first, "mv /app /elsewhere || mv /app/../root /elsewhere")).status == 1
    layer = yard.base / "layer"
    copy_upper(first, layer)
    assert sorted(str(p.relative_to(code)) for p in code.rglob("*")) == [
        "app",
        "app/app.py",
        "app/data",
        "app/data/rows",
    ]
    second, third = await yard.sandbox(code=code), await yard.sandbox(code=code, layers=(layer,))
    assert (await shell(second, "cd /app; ls; cat app.py")).stdout == b"app.py\ndata\nas deployed\n"
    assert (await shell(third, "cd /app; ls; cat app.py data/rows")).stdout == (
        b"app.py\ndata\nresult\nnew\nas deployed\nmore\n"
    )


async def test_home_and_others_are_the_workers_to_write_in(yard: Yard) -> None:
    sandbox = await yard.sandbox()
    script = "for d in / ~ /mnt /media /home /app /tmp /var/tmp /run; do echo x > $d/f && mkdir $d/d || exit 1; done"
    done = await shell(sandbox, script)
    assert done.status == 0, done.stderr


async def test_a_volume_where_the_host_has_directories(yard: Yard) -> None:
    (volume := yard.base / "volume").mkdir()
    os.chown(volume, UID, UID)
    (volume / "kept").write_text("kept\n")
    targets = ("/opt/models/big", "/srv/m", "/var/lib/some/where", "/opt", "/root/.cache/hub", "/mnt/a/b")
    for target in targets:
        mount = VolumeMount(volume, target, under=host_above(target))
        done = await shell(await yard.sandbox(volumes=(mount,)), f"cat {target}/kept; echo new > {target}/new")
        assert (done.status, done.stdout) == (0, b"kept\n"), (target, done.stderr)
        assert (volume / "new").read_text() == "new\n"
        (volume / "new").unlink()
    many = tuple(VolumeMount(volume, t, under=host_above(t)) for t in ("/var/lib/one", "/var/lib/two", "/var/three"))
    done = await shell(
        await yard.sandbox(volumes=many), "cat /var/lib/one/kept /var/lib/two/kept /var/three/kept; ls /var/lib"
    )
    assert done.stdout.startswith(b"kept\n" * 3) and {b"dpkg", b"one", b"two"} <= set(done.stdout.split())
    assert not any(os.path.exists(p) for p in ("/opt/models", "/srv/m", "/var/lib/some", "/var/lib/one"))


async def test_a_caches_directory_with_a_volume_below_stays_writable(yard: Yard) -> None:
    (volume := yard.base / "volume").mkdir()
    sandbox = await yard.sandbox(volumes=(VolumeMount(volume, "/root/.cache/hub"),))
    done = await shell(sandbox, "mkdir ~/.cache/other /root/.cache/other/deep && ! mv /root/.cache /root/elsewhere")
    assert done.status == 0, done.stderr


async def test_a_link_never_moves_a_volume(yard: Yard) -> None:
    """A snapshot's layer, or a volume, holds what user code left: the system's files must not be covered through it."""
    outer, inner, layer = (yard.base / n for n in ("outer", "inner", "layer"))
    for folder in (outer, inner, layer / "root"):
        folder.mkdir(parents=True)
    (outer / "link").symlink_to("/usr/local")
    (layer / "root/link").symlink_to("/usr/local")
    for volumes, layers in (
        ((VolumeMount(outer, "/data"), VolumeMount(inner, "/data/link/bin")), ()),
        ((VolumeMount(inner, "/root/link/bin"),), (layer,)),
    ):
        with pytest.raises(SandboxError, match="symbolic links"):
            await yard.sandbox(volumes=volumes, layers=layers)


async def test_bind_comes_and_goes(yard: Yard) -> None:
    (images := yard.base / "images").mkdir()
    sandbox = await yard.sandbox()
    root = ProcessSpec(("/bin/sh", "-c", "echo x > /run/woodfrog/img/x"), env=ENV)
    await sandbox.bind(images, "/run/woodfrog/img", read_only=False)
    assert (await sandbox.run(root, 10)).status == 0
    assert (images / "x").read_text() == "x\n"
    await sandbox.unbind("/run/woodfrog/img")
    await sandbox.bind(images, "/run/woodfrog/img", read_only=True)
    assert (await sandbox.run(root, 10)).status == 2
    await sandbox.unbind("/run/woodfrog/img")
    with pytest.raises(SandboxError, match="No such file"):
        await sandbox.bind(yard.base / "no-such", "/run/woodfrog/img", read_only=True)


def copy_upper(sandbox: Sandbox, target: Path) -> Path:
    subprocess.run(["cp", "-a", f"{sandbox.upper_path()}/.", str(target)], check=True)
    return target


async def test_layers_with_whiteouts(yard: Yard) -> None:
    one, two = yard.base / "one", yard.base / "two"
    first = await yard.sandbox()
    assert (
        await shell(first, "mkdir -p /data/sub; echo 1 > /data/gone; echo 1 > /data/sub/gone; echo 1 > /tmp/kept")
    ).status == 0
    copy_upper(first, one)
    second = await yard.sandbox(layers=(one,))
    assert (await shell(second, "rm /data/gone; rm -r /data/sub; mkdir /data/sub; echo 2 > /data/sub/new")).status == 0
    copy_upper(second, two)
    third = await yard.sandbox(layers=(two, one))
    done = await shell(third, "find /data /tmp -type f | sort; cat /tmp/kept")
    assert done.stdout == b"/data/sub/new\n/tmp/kept\n1\n"
    assert (one / "data/gone").exists()


async def test_shm_layer_is_copied(yard: Yard) -> None:
    shm = yard.base / "shm"
    shm.mkdir()
    (shm / "seg").write_bytes(b"abc")
    os.chown(shm / "seg", UID, UID)
    for large in (False, True):
        if large:
            (shm / "big").write_bytes(bytes(2 << 20))
        sandbox = await yard.sandbox(shm_layer=shm)
        done = await shell(sandbox, "cat /dev/shm/seg; echo more >> /dev/shm/seg; ls /dev/shm")
        assert done.stdout == b"abc" + (b"big\nseg\n" if large else b"seg\n")
    assert (shm / "seg").read_bytes() == b"abc"


async def test_fifos_carry_output_without_a_reader_at_first(yard: Yard) -> None:
    sandbox = await yard.sandbox()
    worker = await sandbox.spawn(
        worker_spec(
            "/bin/sh",
            "-c",
            "echo out; echo err >&2; sleep 60",
            stdout="/run/woodfrog/stdout",
            stderr="/run/woodfrog/stderr",
        )
    )
    for name, text in (("stdout", b"out\n"), ("stderr", b"err\n")):
        fd = os.open(sandbox.path(f"/run/woodfrog/{name}"), os.O_RDONLY | os.O_NONBLOCK)
        await asyncio.sleep(0.2)
        assert os.read(fd, 100) == text
        os.close(fd)
    worker.send_signal(signal.SIGKILL)


async def test_death_of_init_is_noticed(yard: Yard) -> None:
    sandbox = await yard.sandbox()
    worker = await sandbox.spawn(worker_spec("/bin/sleep", "60"))
    os.kill(sandbox.init_pid, signal.SIGKILL)
    await asyncio.wait_for(sandbox.wait_dead(), 5)
    with pytest.raises(SandboxError, match="died"):
        await worker.wait()
    with pytest.raises(SandboxError, match="died"):
        await sandbox.spawn(worker_spec("/bin/true"))
    await asyncio.gather(sandbox.destroy(), sandbox.destroy())
    assert not sandbox.alive


async def test_twenty_at_once_and_nothing_left(yard: Yard) -> None:
    before = len(os.listdir("/proc/self/fd"))
    mounts = len(procfs.mountinfo(os.getpid()))
    sandboxes = await asyncio.gather(*(yard.sandbox() for _ in range(20)))
    assert len({s.init_pid for s in sandboxes}) == 20
    done = await asyncio.gather(*(shell(s, "hostname; sleep 60 & sleep 60 & sleep 0.1") for s in sandboxes))
    assert [d.stdout.decode().strip() for d in done] == [f"frog-{s.id}" for s in sandboxes]
    pids = [p for s in sandboxes for p in procfs.tree(s.init_pid)]
    assert len(pids) == 60
    namespaces = {
        os.readlink(f"/proc/{s.init_pid}/ns/{kind}") for s in sandboxes for kind in ("net", "mnt", "ipc", "uts", "pid")
    }
    assert len(namespaces) == 100
    assert len(procfs.mountinfo(os.getpid())) == mounts
    await asyncio.gather(*(s.destroy() for s in sandboxes))
    assert not [p for p in pids if Path(f"/proc/{p}").exists()]
    assert await yard.groups.sweep_leftovers() == []
    assert len(os.listdir("/proc/self/fd")) <= before  # what an earlier test left may be collected meanwhile


DAEMON = """
import asyncio, os, sys
from integration.sandboxes import Yard, worker_spec
from woodfrog.linux.rootplan import root_plan
async def main():
    yard = Yard.make()
    prepared = await yard.prepare(network=True)
    busy = await yard.sandbox(network=True)
    worker = await busy.spawn(worker_spec("/bin/sleep", "600"))
    print(yard.tag, yard.base, yard.kdat_dir, prepared.init_pid, busy.init_pid, worker.host_pid, busy.network.link,
          yard.network.bridge, yard.network.subnet, flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


async def test_killed_daemon_leaves_nothing(yard: Yard) -> None:
    tests = Path(__file__).parents[1]
    daemon = subprocess.Popen(
        [sys.executable, "-c", DAEMON], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(tests)}
    )
    assert daemon.stdout is not None
    tag, base, kdat, *rest = daemon.stdout.readline().decode().split()
    pids, (link, bridge, subnet) = [int(p) for p in rest[:3]], rest[3:]
    assert all(Path(f"/proc/{p}").exists() for p in pids)
    assert Path(f"/sys/class/net/{link}").exists()
    daemon.kill()
    daemon.wait()
    daemon.stdout.close()
    assert all([await gone(p) for p in pids])
    deadline = time.monotonic() + 5
    while Path(f"/sys/class/net/{link}").exists() and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    assert not Path(f"/sys/class/net/{link}").exists()
    assert base not in Path("/proc/mounts").read_text()
    from woodfrog.linux import cgroups
    from woodfrog.linux.network import Network

    assert len(await cgroups.detect(tag).sweep_leftovers()) == 2
    assert await cgroups.detect(tag).sweep_leftovers() == []
    await Network(bridge, subnet).teardown()
    shutil.rmtree(base)
    shutil.rmtree(kdat)


def test_under_uvloop() -> None:
    async def main() -> None:
        yard = Yard.make()
        try:
            sandbox = await yard.sandbox(network=True)
            assert (await shell(sandbox, "echo $((6 * 7))")).stdout == b"42\n"
            many = await asyncio.gather(*(sandbox.spawn(worker_spec("/bin/sh", "-c", f"exit {n}")) for n in range(20)))
            assert [await p.wait() for p in many] == list(range(20))
        finally:
            await yard.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


async def test_time_namespace(yard: Yard) -> None:
    from woodfrog.linux.sandbox import init_binary_path

    sandbox = await Sandbox.prepare(
        "clock", init_binary=init_binary_path(), scratch=yard.scratch, host=yard.host, worker_uid=UID,
        time_offsets_ns=(10**15 + 5, -(10**9)) if time.clock_gettime(time.CLOCK_BOOTTIME) > 2 else (10**15, 0),
    )  # fmt: skip
    yard.sandboxes.append(sandbox)
    await sandbox.assemble(root_plan(yard.request(sandbox), yard.host))
    done = await python(sandbox, "import time; print(time.clock_gettime(time.CLOCK_MONOTONIC))")
    assert 0 <= float(done.stdout) - time.clock_gettime(time.CLOCK_MONOTONIC) - 10**6 + 5 < 10


async def test_init_that_cannot_start_leaves_nothing(yard: Yard) -> None:
    with pytest.raises(SandboxError, match="make native"):
        await Sandbox.prepare(
            "x",
            init_binary=yard.base / "nothing",
            scratch=yard.scratch,
            host=yard.host,
            worker_uid=UID,
            cgroups=yard.groups,
        )
    with pytest.raises(SandboxError, match="mount"):
        await Sandbox.prepare(
            "y",
            init_binary=Path(yard_init()),
            scratch=yard.base / "nothing",
            host=yard.host,
            worker_uid=UID,
            cgroups=yard.groups,
        )
    assert await yard.groups.sweep_leftovers() == []


def yard_init() -> str:
    from woodfrog.linux.sandbox import init_binary_path

    return str(init_binary_path())


WORKER = """
import os, socket, threading, time
blob = os.urandom(1 << 20) * 8
ticks = 0
def background():
    global ticks
    while True:
        time.sleep(0.005)
        ticks += 1
for _ in range(3):
    threading.Thread(target=background, daemon=True).start()
kept = open("/data.txt", "w")
segment = open("/dev/shm/segment", "w+b")
segment.write(b"shared"); segment.flush()
listener = socket.socket(socket.AF_UNIX)
listener.bind("/run/woodfrog/worker/worker.sock")
listener.listen(8)
print("listening", flush=True)
served = 0
while True:
    connection, _ = listener.accept()
    served += 1
    before, until = ticks, time.monotonic() + 10
    while ticks == before and time.monotonic() < until:
        time.sleep(0.02)
    kept.write(f"{served}\\n"); kept.flush()
    segment.seek(0)
    text = f"{os.getpid()} {os.uname().nodename} {served} {ticks > before} {hash(blob)} {segment.read().decode()}"
    connection.sendall(text.encode())
    connection.close()
    print(f"served {served}", flush=True)
"""


async def ask(sandbox: Sandbox) -> list[str]:
    with await sandbox.connect("/run/woodfrog/worker/worker.sock") as connection:
        return (await asyncio.get_running_loop().sock_recv(connection, 1000)).decode().split()


async def line(fd: int) -> bytes:
    for _ in range(1000):
        try:
            if data := os.read(fd, 1000):
                return data
        except BlockingIOError:
            pass
        await asyncio.sleep(0.01)
    raise AssertionError("nothing was printed")


@pytest.mark.criu
async def test_freeze_in_one_sandbox_and_thaw_in_three(yard: Yard) -> None:
    criu = criu_path()
    assert criu is not None
    prefixes = (PREFIX, Path(criu).parents[1])
    images, layer, shm, code = (yard.base / n for n in ("images", "layer", "shm", "code"))
    images.mkdir(mode=0o700)
    (code / "app").mkdir(parents=True)
    (code / "app/worker.py").write_text(WORKER)
    as_criu = ProcessSpec(
        ("",), env={**ENV, "XDG_RUNTIME_DIR": "/run/criu"}, caps="held", no_new_privs=False, seccomp=False
    )

    probe = await yard.sandbox(prefixes=prefixes)
    await probe.mount_tmpfs("/run")
    await probe.run(replace(as_criu, argv=(criu, "check")), 30)
    kdat = yard.kdat_dir / "root.kdat"
    shutil.copy(probe.path(CRIU_KDAT), kdat)

    source = await yard.sandbox(prefixes=prefixes, code=code)
    worker = await source.spawn(
        worker_spec(
            PYTHON,
            "/app/worker.py",
            cwd="/app",
            inner_pid=100,
            stdout="/run/woodfrog/stdout",
            stderr="/run/woodfrog/stderr",
        )
    )
    fifo = os.open(source.path("/run/woodfrog/stdout"), os.O_RDONLY | os.O_NONBLOCK)
    assert await line(fifo) == b"listening\n"
    first = await ask(source)
    assert first[:4] == ["100", f"frog-{source.id}", "1", "True"]
    # What is unread would be in the images, and would be printed again by every copy.
    assert await line(fifo) == b"served 1\n"
    os.close(fifo)

    await source.bind(images, "/run/woodfrog/img", read_only=False)
    # Else a CRIU that may do all keeps its features' cache in /run, and so in the layer.
    dump = ("dump", "--unprivileged", "-t", "100", "-D", "/run/woodfrog/img", "-o", "dump.log", "-v4")
    if capabilities.held(capabilities.CAP_SYS_RESOURCE):
        spec = replace(as_criu, argv=(criu, *dump, "--manage-cgroups=ignore"))
    else:
        os.chown(images, UID, UID)
        spec = replace(as_criu, argv=(criu, *dump, "--manage-cgroups=ignore"), uid=UID, gid=UID, caps="ambient")
    done = await source.run(spec, 60)
    assert done.status == 0, (images / "dump.log").read_text()[-3000:]
    assert await worker.wait() == -signal.SIGKILL
    copy_upper(source, layer)
    subprocess.run(["cp", "-a", f"{source.path('/dev/shm')}/.", str(shm)], check=True)
    await source.destroy()
    last_pid = max(int(p.stem.removeprefix("core-")) for p in images.glob("core-*.img"))

    async def thaw(index: int) -> tuple[Sandbox, list[str]]:
        sandbox = await yard.sandbox(prefixes=prefixes, code=code, layers=(layer,), shm_layer=shm, kdat_file=kdat)
        out = os.open(sandbox.path("/run/woodfrog/stdout"), os.O_RDONLY | os.O_NONBLOCK)
        await sandbox.bind(images, "/run/woodfrog/img", read_only=True)
        await sandbox.set_last_pid(last_pid)
        begin = time.perf_counter()
        restore = "restore -D /run/woodfrog/img -W /run/woodfrog/criu -o restore.log -v4 -d --manage-cgroups=ignore"
        done = await sandbox.run(replace(as_criu, argv=(criu, *restore.split())), 60)
        assert done.status == 0, sandbox.path("/run/woodfrog/criu/restore.log").read_text()[-3000:]
        process = await sandbox.watch(100)
        answer = await ask(sandbox)
        print(f"thaw {index}: {(time.perf_counter() - begin) * 1e3:.1f} ms")
        assert await line(out) == b"served 2\n"
        os.close(out)
        status = procfs.status(process.host_pid)
        assert status.parent == sandbox.init_pid
        assert (status.uids, status.groups, status.threads) == ((UID,) * 4, (), 4)
        assert (status.cap_effective, status.cap_bounding, status.seccomp, status.no_new_privs) == (0, 0, 2, True)
        assert (await shell(sandbox, "cat /data.txt")).stdout == b"1\n2\n"
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == -signal.SIGTERM
        return sandbox, answer

    thawed = await asyncio.gather(*(thaw(i) for i in range(3)))
    for sandbox, answer in thawed:
        assert answer == ["100", f"frog-{sandbox.id}", "2", "True", *first[4:]]
