from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from woodfrog.errors import HostError, SandboxError
from woodfrog.linux import cgroups
from woodfrog.linux.cgroups import Limits
from woodfrog.linux.procfs import MountEntry


def mount(kind: str, target: Path, *options: str) -> MountEntry:
    return MountEntry(1, 0, (0, 1), "/", str(target), frozenset(), (), kind, kind, frozenset(options))


@pytest.fixture
def tag() -> str:
    return f"c{os.getpid():x}{os.urandom(2).hex()}"


def spawn_in(group: cgroups.Cgroup) -> subprocess.Popen[bytes]:
    paths = group.attach_paths()
    return subprocess.Popen(
        ["/bin/sh", "-c", "".join(f"echo 0 > {p}; " for p in paths) + "echo in; exec sleep 60"], stdout=subprocess.PIPE
    )


@pytest.mark.root
async def test_limits_accounting_and_destruction(tag: str) -> None:
    groups = cgroups.detect(tag)
    group = groups.create("a", Limits(memory_bytes=64 << 20, cpus=0.5, pids=10))
    with pytest.raises(SandboxError, match="there already"):
        groups.create("a", Limits())
    process = spawn_in(group)
    assert process.stdout is not None and process.stdout.readline() == b"in\n"
    assert group.pids() == (process.pid,)
    assert group.memory_peak() >= group.memory_current() > 0
    assert group.oom_kills() == 0
    for memory in (512 << 20, 32 << 20, None, 64 << 20):
        group.set_limits(Limits(memory_bytes=memory))
    reaper = asyncio.get_running_loop().run_in_executor(None, process.wait)
    await group.destroy()
    assert await reaper == -9
    process.stdout.close()
    await group.destroy()
    assert not any(p.parent.exists() for p in group.attach_paths())


@pytest.mark.root
async def test_all_sandboxes_together_leave_process_numbers_to_the_host(tag: str) -> None:
    group = cgroups.detect(tag).create("a", Limits())
    try:
        limits = [p.parent.parent / "pids.max" for p in group.attach_paths() if (p.parent / "pids.max").exists()]
        assert limits and all(int(p.read_text()) < int(Path("/proc/sys/kernel/pid_max").read_text()) for p in limits)
    finally:
        await group.destroy()


@pytest.mark.root
async def test_sweep_takes_only_ones_own(tag: str) -> None:
    mine, other = cgroups.detect(tag), cgroups.detect(f"{tag}x")
    left = mine.create("left", Limits())
    kept = other.create("kept", Limits())
    process = spawn_in(left)
    assert process.stdout is not None and process.stdout.readline() == b"in\n"
    reaper = asyncio.get_running_loop().run_in_executor(None, process.wait)
    assert await mine.sweep_leftovers() == ["left"]
    assert await reaper == -9
    process.stdout.close()
    assert await mine.sweep_leftovers() == []
    assert all(p.exists() for p in kept.attach_paths())
    await kept.destroy()


def v2_tree(root: Path) -> Path:
    """The files a v2 hierarchy shows, as plain files: they tell which values are written where."""
    (root / "woodfrog" / "tag-a").mkdir(parents=True)
    (root / "cgroup.controllers").write_text("cpu io memory pids\n")
    (root / "cgroup.subtree_control").write_text("cpu memory\n")
    (root / "woodfrog" / "cgroup.controllers").write_text("cpu memory pids\n")
    (root / "woodfrog" / "cgroup.subtree_control").write_text("")
    (root / "woodfrog" / "tag-a" / "memory.swap.max").write_text("max")
    (root / "woodfrog" / "tag-a" / "cpu.max").write_text("max 100000")
    return root


def test_v2_is_preferred_and_gets_the_right_values(tmp_path: Path) -> None:
    root = v2_tree(tmp_path / "v2")
    v1 = tmp_path / "v1"
    groups = cgroups.detect("tag", (mount("cgroup", v1, "rw", "memory"), mount("cgroup2", root, "rw")))
    assert groups.version == 2
    assert (root / "cgroup.subtree_control").read_text() == "+pids"
    assert (root / "woodfrog/cgroup.subtree_control").read_text() == "+cpu +memory +pids"
    directory = root / "woodfrog" / "tag-a"
    group = cgroups._CgroupV2("a", directory)
    group.set_limits(Limits(memory_bytes=1 << 20, cpus=0.5, cpu_share=2, pids=7))
    values = {p.name: p.read_text() for p in directory.iterdir()}
    assert values == {
        "memory.max": "1048576",
        "memory.swap.max": "0",
        "cpu.max": "50000 100000",
        "cpu.weight": "1600",
        "pids.max": "7",
    }
    (directory / "memory.events").write_text("low 0\noom 3\noom_kill 2\noom_group_kill 0\n")
    (directory / "memory.peak").write_text("4096\n")
    assert (group.oom_kills(), group.memory_peak(), group.memory_current()) == (2, 4096, 0)
    group.set_limits(Limits())
    assert (directory / "memory.max").read_text() == "max"
    assert (directory / "cpu.max").read_text() == "max 100000"
    assert (directory / "cpu.weight").read_text() == "100"


def test_v2_without_the_cpu_controller_limits_the_rest(tmp_path: Path) -> None:
    root = v2_tree(tmp_path / "v2")
    (root / "cgroup.controllers").write_text("memory pids\n")
    (root / "woodfrog" / "cgroup.controllers").write_text("memory pids\n")
    (root / "woodfrog" / "tag-a" / "cpu.max").unlink()
    cgroups.detect("tag", (mount("cgroup2", root, "rw"),))
    assert (root / "woodfrog/cgroup.subtree_control").read_text() == "+memory +pids"
    cgroups._CgroupV2("a", root / "woodfrog" / "tag-a").set_limits(Limits(cpus=0.5, pids=7))
    assert {p.name for p in (root / "woodfrog" / "tag-a").iterdir()} == {"memory.max", "memory.swap.max", "pids.max"}


SPIN = """
import os, time
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
print("in", flush=True)
while True:
    pass
"""


def spin_in(group: cgroups.Cgroup) -> subprocess.Popen[bytes]:
    paths = "".join(f"echo 0 > {p}; " for p in group.attach_paths())
    return subprocess.Popen(
        ["/bin/sh", "-c", f'{paths} exec "$0" -c "$1"', sys.executable, SPIN], stdout=subprocess.PIPE
    )


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.root
async def test_a_share_divides_one_processor_and_a_limit_is_never_exceeded(tag: str) -> None:
    groups = cgroups.detect(tag)
    wanted = {"large": Limits(cpu_share=1.0), "small": Limits(cpu_share=0.125), "capped": Limits(cpu_share=4, cpus=0.1)}
    made = {name: groups.create(name, limits) for name, limits in wanted.items()}
    processes = {name: spin_in(group) for name, group in made.items()}
    try:
        for process in processes.values():
            assert process.stdout is not None and process.stdout.readline() == b"in\n"
        before = {name: cpu_seconds(process.pid) for name, process in processes.items()}
        begin = asyncio.get_running_loop().time()
        await asyncio.sleep(3)
        used = {name: cpu_seconds(process.pid) - before[name] for name, process in processes.items()}
        passed = asyncio.get_running_loop().time() - begin
        assert used["large"] > 4 * used["small"], used
        assert used["capped"] < 0.2 * passed, used
    finally:
        for name, process in processes.items():
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
            await made[name].destroy()


def test_v2_without_controllers_falls_back_to_v1(tmp_path: Path) -> None:
    unified, memory = tmp_path / "unified", tmp_path / "memory"
    unified.mkdir()
    (unified / "cgroup.controllers").write_text("hugetlb\n")
    mounts = (mount("cgroup2", unified), mount("cgroup", memory, "rw", "memory"))
    assert cgroups.detect("tag", mounts).version == 1
    with pytest.raises(HostError, match="memory controller"):
        cgroups.detect("tag", mounts[:1])


@pytest.mark.root
def test_real_v2_hierarchy_moves_processes_out_of_the_way(tmp_path: Path) -> None:
    """No-internal-process rule: a group with processes in it cannot hand controllers to its children."""
    root = Path("/sys/fs/cgroup/unified" if Path("/sys/fs/cgroup/unified").is_dir() else "/sys/fs/cgroup")
    controllers = (root / "cgroup.controllers").read_text().split()
    if not {"cpu", "memory", "pids"} <= set(controllers):
        pytest.skip("needs cgroup v2 with the cpu, memory and pids controllers")
    nested = root / f"woodfrog-test-{os.getpid()}"
    nested.mkdir()
    (root / "cgroup.subtree_control").write_text("+cpu +memory +pids")
    sleeper = subprocess.Popen(["/bin/sleep", "60"])
    try:
        (nested / "cgroup.procs").write_text(str(sleeper.pid))
        cgroups._CgroupsV2(nested, "tag").enable()
        assert {"cpu", "memory", "pids"} <= set((nested / "woodfrog/cgroup.controllers").read_text().split())
        assert (nested / "woodfrog-daemon/cgroup.procs").read_text().split() == [str(sleeper.pid)]
    finally:
        sleeper.kill()
        sleeper.wait()
        for directory in (nested / "woodfrog-daemon", nested / "woodfrog", nested):
            directory.rmdir()


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a b", ".x"])
def test_names_cannot_leave_the_group(name: str, tmp_path: Path) -> None:
    with pytest.raises(SandboxError, match="usable name"):
        cgroups._CgroupsV1({"memory": tmp_path}, "tag").create(name, Limits())
