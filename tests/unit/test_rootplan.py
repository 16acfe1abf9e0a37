from __future__ import annotations

from dataclasses import replace
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from woodfrog.errors import SandboxError
from woodfrog.linux.rootplan import (
    HostEntry,
    HostRoot,
    Op,
    RootRequest,
    VolumeMount,
    base_plan,
    etc_files,
    is_visible,
    root_plan,
    skeleton_entries,
)
from woodfrog.linux.skeleton import private_skeletons

UID = 64646
TOP = (
    "boot",
    "dev",
    "etc",
    "home",
    "lost+found",
    "mnt",
    "opt",
    "proc",
    "root",
    "run",
    "srv",
    "sys",
    "tmp",
    "usr",
    "var",
)
HOST = HostRoot(
    entries=(*(HostEntry(n, "directory") for n in TOP), HostEntry("bin", "symlink", "usr/bin")),
    masks=(("/proc/kcore", False), ("/sys/firmware", True)),
    read_only=("/proc/sys", "/proc/irq"),
    passwd="root:x:0:0:root:/root:/bin/bash\nwoodfrog:x:1:1::/:/bin/false\n",
    group="root:x:0:\n",
)
REQUEST = RootRequest(
    scratch=Path("/var/lib/woodfrog/mnt"),
    skeleton=Path("/var/lib/woodfrog/skeletons/ab"),
    disk_bytes=1 << 30,
    hostname="frog",
    worker_uid=UID,
    hidden=(Path("/var/lib/woodfrog"),),
    etc=(("hostname", "frog\n"),),
)


def binds(ops: tuple[Op, ...]) -> dict[str, tuple[str, set[str]]]:
    return {op.args[1]: (op.args[0], set(op.args[2].split(","))) for op in ops if op.name == "bind"}


def position(ops: tuple[Op, ...], name: str, target: str) -> int:
    return next(i for i, op in enumerate(ops) if op.name == name and target in op.args)


def test_host_directories_are_bound_read_only_and_secrets_are_not() -> None:
    bound = binds(root_plan(REQUEST, HOST).ops)
    for name in ("opt", "srv", "usr", "var"):
        assert bound[f"/{name}"] == (f"/{name}", {"ro", "nosuid", "nodev", "rec"})
    for name in ("home", "root", "boot", "mnt", "lost+found", "tmp", "run", "dev", "proc", "sys", "etc", "bin"):
        assert f"/{name}" not in bound


def test_every_host_bind_is_read_only_but_volumes() -> None:
    request = replace(
        REQUEST, volumes=(VolumeMount(Path("/v/1"), "/data"), VolumeMount(Path("/v/2"), "/ro", read_only=True))
    )
    for target, (source, attributes) in binds(root_plan(request, HOST).ops).items():
        assert {"nosuid", "nodev"} <= attributes
        assert ("ro" in attributes) == (target not in ("/data", "/var/tmp")), (source, target)


def test_state_directory_is_masked_after_the_bind_that_shows_it() -> None:
    ops = root_plan(REQUEST, HOST).ops
    mask = position(ops, "bind", "/var/lib/woodfrog")
    assert ops[mask].args[0].startswith("/var/lib/woodfrog/mnt/mask/")
    assert position(ops, "bind", "/var") < mask < len(ops)


def test_prefix_below_a_masked_home_is_bound_at_its_own_path() -> None:
    prefix = Path("/root/.pyenv/versions/3.11")
    ops = root_plan(replace(REQUEST, prefixes=(prefix, Path("/usr/lib/python3"), prefix / "lib")), HOST).ops
    bound = binds(ops)
    assert bound[str(prefix)] == (str(prefix), {"ro", "nosuid", "nodev", "rec"})
    assert "/usr/lib/python3" not in bound
    assert str(prefix / "lib") not in bound
    assert position(ops, "mkdir", str(prefix)) < position(ops, "bind", str(prefix))
    paths = {e.path for e in skeleton_entries(HOST, (prefix,), UID)}
    assert {"/root/.pyenv", "/root/.pyenv/versions", str(prefix)} <= paths


def test_prefix_with_the_state_directory_inside_is_masked_there() -> None:
    """A clone in a home directory: its virtual environment is needed, its state directory must not show."""
    clone, state = Path("/root/clone"), Path("/root/clone/state")
    request = replace(REQUEST, prefixes=(clone, state / "venv"), hidden=(state,), scratch=state / "mnt")
    ops = root_plan(request, HOST).ops
    order = [position(ops, "bind", str(p)) for p in (clone, state, state / "venv")]
    assert order == sorted(order)
    mask = ops[order[1]].args[0]
    assert Op("mkdir", (f"{mask}/venv", "755", "0", "0")) in ops
    # Its mount point lies in the mask's directory, on the private tmpfs: nothing is made in the real one.
    assert not any(op.name == "mkdir" and op.args[0] == str(state / "venv") for op in ops)


def test_layers_come_above_the_skeleton_and_odd_characters_are_escaped() -> None:
    request = replace(REQUEST, layers=(Path("/s/new:er"), Path("/s/old,er")))
    overlay = next(op for op in root_plan(request, HOST).ops if op.args[:1] == ("overlay",))
    options = overlay.args[3]
    assert options.startswith(r"lowerdir=/s/new\:er:/s/old\,er:/var/lib/woodfrog/skeletons/ab,upperdir=")


def test_a_directory_app_of_the_hosts_does_not_hide_the_code() -> None:
    """As in many a Docker image, with the environment inside."""
    host = replace(HOST, entries=(*HOST.entries, HostEntry("app", "directory")))
    bound = binds(root_plan(replace(REQUEST, prefixes=(Path("/app/.venv"),), code=Path("/code/ab")), host).ops)
    assert "/app" not in bound and bound["/app/.venv"][0] == "/app/.venv"


def test_code_is_the_lowest_layer() -> None:
    request = replace(REQUEST, layers=(Path("/s/new"),), code=Path("/code/ab"))
    overlay = next(op for op in root_plan(request, HOST).ops if op.args[:1] == ("overlay",))
    assert overlay.args[3].startswith("lowerdir=/s/new:/var/lib/woodfrog/skeletons/ab:/code/ab,upperdir=")


def test_a_host_directory_with_a_volume_inside_is_laid_over_and_its_mask_stays_on_top() -> None:
    volumes = (VolumeMount(Path("/v"), "/var/lib/models", under="/var/lib"),)
    ops = root_plan(replace(REQUEST, volumes=volumes), HOST).ops
    laid = next(i for i, op in enumerate(ops) if op.name == "mount" and op.args[1] == "/var/lib")
    assert f"{REQUEST.scratch}/mask/under-0:/var/lib" in ops[laid].args[3] and "ro" in ops[laid].args[2].split(",")
    assert position(ops, "bind", "/var") < laid < position(ops, "bind", "/var/lib/woodfrog")
    assert laid < position(ops, "straight", "/var/lib/models") < position(ops, "bind", "/var/lib/models")


def test_too_many_layers_is_an_error_not_a_truncated_mount() -> None:
    with pytest.raises(SandboxError, match="too many"):
        root_plan(replace(REQUEST, layers=tuple(Path(f"/snapshots/{'x' * 60}/{i}") for i in range(60))), HOST)


@pytest.mark.parametrize(
    "target", ["/proc", "/dev/shm", "/etc/x", "/run/woodfrog", "/app/x", "data", "/", "/data/../etc"]
)
def test_volume_where_the_sandbox_has_its_own(target: str) -> None:
    with pytest.raises(SandboxError):
        root_plan(replace(REQUEST, volumes=(VolumeMount(Path("/v"), target),)), HOST)


def test_nul_bytes_never_reach_init() -> None:
    with pytest.raises(SandboxError, match="NUL"):
        root_plan(replace(REQUEST, hostname="a\0b"), HOST)


def test_block_network_takes_the_device_away() -> None:
    assert Op("linkdel", ("eth0",)) in root_plan(replace(REQUEST, network=False), HOST).ops
    assert Op("linkdel", ("eth0",)) not in root_plan(REQUEST, HOST).ops


def test_user_code_cannot_replace_what_init_trusts() -> None:
    entries = {e.path: e for e in skeleton_entries(HOST, (), UID)}
    for path in ("/", "/app", "/mnt", "/root", "/run"):
        assert (entries[path].uid, entries[path].gid, entries[path].mode) == (0, UID, 0o1775)
    for path in ("/run/woodfrog", "/run/criu", "/etc", "/proc", "/boot"):
        assert (entries[path].uid, entries[path].mode & 0o022) == (0, 0)
    assert entries["/bin"].link == "usr/bin"


def test_base_masks_what_tells_about_the_host_and_keeps_ns_last_pid_writable() -> None:
    ops = base_plan(Path("/s"), HOST, UID)
    bound = binds(ops)
    assert bound["/s/proc/kcore"][0] == "/dev/null"
    assert bound["/s/sys/firmware"][0] == "/s/empty"
    assert "ro" in bound["/s/proc/sys"][1]
    assert bound["/s/proc/sys/kernel/ns_last_pid"][1] == {"rw"}
    fifos = [op for op in ops if op.name == "mknod" and op.args[1] == "p"]
    assert [(op.args[0], op.args[2], op.args[5]) for op in fifos] == [
        ("/s/run/stdout", "600", str(UID)),
        ("/s/run/stderr", "600", str(UID)),
    ]


def test_etc_files() -> None:
    files = dict(
        etc_files(HOST, hostname="frog", worker_uid=UID, resolv_conf="nameserver 9.9.9.9\n", address="10.0.0.9")
    )
    assert files["passwd"].count("woodfrog:x:") == 1
    assert f"woodfrog:x:{UID}:{UID}:" in files["passwd"]
    assert "10.0.0.9\tfrog" in files["hosts"]


names = st.text("abcxyz:,\\ ", min_size=1, max_size=6).filter(lambda s: s.strip())
paths = st.lists(names, min_size=1, max_size=4).map(lambda parts: Path("/", *parts))


@given(
    st.lists(st.sampled_from(["/root/a", "/root/a/b", "/home/x", "/usr/lib", "/var/lib/woodfrog/v", "/tmp/v"])),
    st.lists(paths),
)
def test_whatever_the_prefixes_each_is_reachable_inside(fixed: list[str], drawn: list[Path]) -> None:
    prefixes = (*map(Path, fixed), *drawn)
    request = replace(REQUEST, prefixes=prefixes)
    ops = root_plan(request, HOST).ops
    bound = binds(ops)
    hidden = tuple(map(PurePosixPath, REQUEST.hidden))
    for prefix in map(PurePosixPath, prefixes):
        nearest = next((p for p in (prefix, *prefix.parents) if str(p) in bound), None)
        assert is_visible(prefix, HOST, hidden) or (nearest is not None and bound[str(nearest)][0] == str(nearest))
    # Parents are mounted before what lies in them.
    targets = [op.args[1] for op in ops if op.name == "bind" and op.args[1] in map(str, prefixes)]
    assert targets == sorted(targets, key=lambda t: len(PurePosixPath(t).parts))


def test_skeletons_are_roots_alone(tmp_path: Path) -> None:
    left = tmp_path / "skeletons" / "ab" / "tmp"
    left.mkdir(parents=True)
    (tmp_path / "skeletons").chmod(0o755)  # of an earlier version: anybody may have put something there
    for _ in range(2):
        path = private_skeletons(tmp_path)
        assert path.stat().st_mode & 0o777 == 0o700 and not left.exists()
    (path / "cd").mkdir()
    assert (private_skeletons(tmp_path) / "cd").exists()
