"""The engine's decisions, apart from any process; and the injected faults."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from woodfrog import faults
from woodfrog.engine.inspect import Connection, Descriptor, HostPaths, Task, Tree, parse_bound, parse_inet
from woodfrog.engine.plan import (
    REFUSALS,
    Facts,
    GpuFacts,
    damaged,
    dump_plan,
    facts_of,
    parse_facts,
    refuse,
    restore_plan,
    warnings,
)
from woodfrog.errors import SpecError
from woodfrog.linux.ipc import parse_sysv
from woodfrog.linux.procfs import MountEntry
from woodfrog.linux.threads import ThreadSettings

TASK = Task(pid=4000, inner_pid=100, name="python3", state="S", start_ticks=1, uid=64646, max_thread=304)


def holding(*descriptors: Descriptor) -> Tree:
    return Tree((replace(TASK, descriptors=descriptors),))


@pytest.mark.parametrize(
    ("tree", "code"),
    [
        (Tree((replace(TASK, tracer=77),)), "traced"),
        (Tree((TASK, replace(TASK, inner_pid=305, foreign_namespaces=("user",)))), "nested-namespace"),
        (Tree((TASK,), strays=(replace(TASK, inner_pid=310, name="redis"),)), "stray-process"),
        (holding(Descriptor(3, "anon_inode:[io_uring]")), "io-uring"),
        (holding(Descriptor(3, "anon_inode:[userfaultfd]")), "descriptor-kind"),
        (holding(Descriptor(3, "/dev/nvidiactl", device=(195, 255))), "gpu-device"),
        (holding(Descriptor(3, "/dev/nvidia-uvm", device=(510, 0))), "gpu-device"),
        (holding(Descriptor(3, "/dev/kvm", device=(10, 232))), "device"),
        (Tree((replace(TASK, special_maps=("/SYSV00000000 (deleted)",)),)), "sysv-shm"),
        (Tree((replace(TASK, special_maps=("/dev/nvidia0",)),)), "gpu-device"),
        (Tree((replace(TASK, special_maps=("anon_inode:[io_uring]",)),)), "io-uring"),
        (Tree((replace(TASK, special_maps=("anon_inode:[perf_event]",)),)), "descriptor-kind"),
    ],
)
def test_refused_by_name(tree: Tree, code: str) -> None:
    refusal = refuse(tree)
    assert refusal is not None and refusal.code == code and refusal.remedy == REFUSALS[code][1]
    culprit = tree.strays[0] if tree.strays else tree.tasks[-1]
    assert f"process {culprit.inner_pid} ({culprit.name})" in refusal.cause


def test_larger_pages_than_those_of_snapshots_are_refused() -> None:
    refusal = refuse(Tree((TASK,), page_size=16384))
    assert refusal is not None and refusal.code == "page-size" and refusal.cause.startswith("16 KiB: this kernel's")


def test_in_a_chroot_nothing_is_captured() -> None:
    """Paths of mapped libraries are not those of the sandbox: their changes would go unnoticed."""
    refusal = refuse(Tree((TASK,), root="/srv/other"))
    assert refusal is not None and refusal.code == "chroot" and refusal.cause.startswith("/srv/other: the daemon")


def test_what_this_criu_could_not_restore_is_not_dumped() -> None:
    refusal = refuse(Tree((TASK,)), criu_signs=True)
    assert refusal is not None and refusal.code == "criu-pointers" and "arm64.nopauth" in refusal.remedy


@pytest.mark.parametrize(
    ("task", "known", "code"),
    [
        (replace(TASK, descriptors=(Descriptor(3, "/dev/nvidia0", device=(195, 0)),)), True, ""),
        (replace(TASK, special_maps=("/dev/nvidia-uvm", "/dev/nvidia0")), True, ""),
        (replace(TASK, special_maps=("/dev/nvidia0",)), False, "gpu-fork"),
        (replace(TASK, descriptors=(Descriptor(3, "/dev/nvidia-caps/nvidia-cap21"),)), True, "gpu-mig"),
        # Fabric memory of NVSwitch machines, which has its nodes beside MIG's.
        (replace(TASK, descriptors=(Descriptor(3, "/dev/nvidia-caps-imex-channels/channel0"),)), True, ""),
        (replace(TASK, descriptors=(Descriptor(3, "/dev/dri/renderD128", device=(226, 128)),)), True, "gpu-graphics"),
        (replace(TASK, descriptors=(Descriptor(3, "/dev/nvidia-modeset", device=(195, 254)),)), True, "gpu-graphics"),
        (replace(TASK, descriptors=(Descriptor(3, "/tmp/nvidia-mps/control"),)), True, "gpu-mps"),
        (replace(TASK, gpu_peers=("/dev/shm/nccl-x1",)), True, "gpu-peers"),
        (replace(TASK, descriptors=(Descriptor(3, "/dev/kvm", device=(10, 232)),)), True, "device"),
    ],
)
def test_what_of_a_gpu_is_captured_and_what_is_refused(task: Task, known: bool, code: str) -> None:
    refusal = refuse(Tree((task,)), {task.pid: known})
    assert (refusal.code if refusal else "") == code
    if code == "gpu-peers":
        assert refuse(Tree((task,)), {task.pid: known}, gpu_peers=True) is None


def test_gpu_facts_survive_json() -> None:
    gpu = GpuFacts("580.65", (("GPU-1", "A"), ("GPU-2", "A")), ("GPU-2",), ((100, 1 << 33), (104, 0)))
    facts = replace(facts_of(Tree((TASK,)), monotonic_ns=5, criu="4.2", gpu=gpu), sizes={"a.img": 1})
    assert parse_facts(facts.to_json()) == facts
    assert "gpu" not in replace(facts, gpu=None).to_json()
    with pytest.raises(ValueError, match="visible"):
        parse_facts(facts.to_json().replace('"visible"', '"seen"'))


def test_what_criu_can_capture_is_not_refused() -> None:
    kinds = ("[eventfd]", "[eventpoll]", "[signalfd]", "[timerfd]", "inotify", "[fanotify]", "[pidfd]")
    descriptors = [Descriptor(i, f"anon_inode:{k}") for i, k in enumerate(kinds)]
    descriptors += [
        Descriptor(20, "/dev/null", device=(1, 3)), Descriptor(21, "/dev/pts/0", device=(136, 0)),
        Descriptor(22, "/dev/ptmx", device=(5, 2)), Descriptor(23, "/dev/shm/x"),
        Descriptor(24, "/memfd:x", deleted=True), Descriptor(25, "socket:[1]"), Descriptor(26, "pipe:[2]"),
        Descriptor(27, "/tmp/about io_uring"),
    ]  # fmt: skip
    assert refuse(holding(*descriptors)) is None
    assert refuse(Tree((TASK,))) is None


INSIDE = Connection("127.0.0.1:5", "127.0.0.1:6", True)
OUTSIDE = Connection("10.231.0.2:5", "93.184.216.34:443", False)


@pytest.mark.parametrize(
    ("connections", "tcp", "says"),
    [
        ((), "none", ""),
        ((INSIDE, INSIDE), "established", ""),
        ((OUTSIDE,), "close", "1 TCP connection to the outside (first: 93.184.216.34:443) will be closed"),
        ((INSIDE, OUTSIDE, OUTSIDE), "established", "2 TCP connections to the outside"),
    ],
)
def test_connections(connections: tuple[Connection, ...], tcp: str, says: str) -> None:
    tree = Tree((TASK,), connections=connections)
    assert dump_plan(tree).tcp == tcp
    said = warnings(tree)
    assert (says in said[0]) if says else said == ()
    # A restore must be told the same.
    facts = facts_of(tree, monotonic_ns=5, criu="4.2.1")
    assert restore_plan(facts, monotonic_ns=6).tcp == tcp


def test_watches_are_looked_for_only_where_there_are_some() -> None:
    assert dump_plan(Tree((TASK,))).irmap_paths == ()
    assert "/tmp" in dump_plan(holding(Descriptor(3, "anon_inode:inotify"))).irmap_paths


def test_facts() -> None:
    tree = Tree((TASK, replace(TASK, inner_pid=900, max_thread=0)))
    facts = replace(facts_of(tree, monotonic_ns=10, criu="4.2.1"), sizes={"core-100.img": 5})
    assert (facts.root_pid, facts.max_pid, facts.tasks) == (100, 900, 2)
    assert parse_facts(facts.to_json()) == facts and "huge" not in facts.to_json()
    huge = replace(facts, huge=((100, 1 << 21, 3 << 21),), threads=(ThreadSettings(101, (0, 2), 7, 5),))
    assert parse_facts(huge.to_json()) == huge
    assert not restore_plan(facts, monotonic_ns=10).new_clock
    assert restore_plan(facts, monotonic_ns=9).new_clock, (
        "the machine was started anew: the clock may not run backwards"
    )


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 2}', '{"format": 1}', '{"format": 1, "root_pid": 1, "unknown": 2}', "\x00"]
)
def test_damaged_facts(text: str) -> None:
    with pytest.raises(ValueError):
        parse_facts(text)


def test_damaged_images() -> None:
    facts = Facts(100, 100, 1, "none", 0, "4.2", sizes={"a.img": 5, "b.img": 6})
    assert damaged(facts, {"a.img": 5, "b.img": 6, "other": 1}) == ""
    assert damaged(facts, {"a.img": 5}) == "b.img is missing"
    assert damaged(facts, {"a.img": 5, "b.img": 4}) == "b.img has 4 bytes, not 6"


def mount(target: str, root: str = "/", device: tuple[int, int] = (254, 0), kind: str = "ext4") -> MountEntry:
    return MountEntry(1, 0, device, root, target, frozenset(), (), kind, "", frozenset())


SANDBOX = (
    mount("/", kind="overlay", device=(0, 50)), mount("/usr", "/usr"), mount("/app", "/var/lib/woodfrog/code/ab"),
    mount("/data", "/vol", device=(254, 1)), mount("/dev/shm", kind="tmpfs", device=(0, 47)),
    mount("/var", "/var"), mount("/var/tmp", "/.var-tmp", kind="overlay", device=(0, 50)),
    mount("/lost", device=(9, 9)), mount("/tmp/venv", "/venv", kind="tmpfs", device=(0, 28)),
    mount("/opt", "/opt", kind="overlay", device=(0, 29)), mount("/sys", kind="sysfs", device=(0, 30)),
)  # fmt: skip
HOST = (
    mount("/"), mount("/mnt/disk", device=(254, 1)), mount("/dev/shm", kind="tmpfs", device=(0, 27)),
    mount("/tmp", kind="tmpfs", device=(0, 28)), mount("/image", kind="overlay", device=(0, 29)),
    mount("/sys", kind="sysfs", device=(0, 30)),
)  # fmt: skip


@pytest.mark.parametrize(
    ("inner", "outer"),
    [
        ("/usr/lib/libc.so.6", "/usr/lib/libc.so.6"),
        ("/app/main.py", "/var/lib/woodfrog/code/ab/main.py"),
        ("/data/model.bin", "/mnt/disk/vol/model.bin"),
        ("/var/lib/x", "/var/lib/x"),
        ("/var/tmp/x", None),
        ("/tmp/x", None),
        ("/appendix/x", None),
        ("/dev/shm/x", None),
        ("/lost/x", "/lost/x"),
        ("/tmp/venv/lib/x.so", "/tmp/venv/lib/x.so"),
        ("/opt/x", "/image/opt/x"),
        ("/sys/kernel/x", None),
    ],
)
def test_host_path(inner: str, outer: str | None) -> None:
    places = HostPaths(SANDBOX, HOST)
    assert places.of(inner) == places.of(inner) == outer


PARTS = st.lists(st.sampled_from(["usr", "app", "data", "vol", "var", "tmp", "a"]), max_size=4)
PATHS = PARTS.map(lambda parts: "/" + "/".join(parts))
MOUNTS = st.lists(
    st.builds(mount, PATHS, PATHS, st.sampled_from([(254, 0), (254, 1)]), st.sampled_from(["ext4", "overlay"])),
    max_size=8,
).map(tuple)


@given(inside=MOUNTS, outside=MOUNTS, paths=st.lists(PATHS, max_size=12))
def test_host_paths_of_one_directory_are_found_as_each_alone(
    inside: tuple[MountEntry, ...], outside: tuple[MountEntry, ...], paths: list[str]
) -> None:
    """Mounts on single files, on both sides, included."""
    together = HostPaths(inside, outside)
    for path in paths:
        assert together.of(path) == HostPaths(inside, outside)._look_up(path)


TCP = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1FBB 00000000:0000 0A 00000000:00000000 00:00000000 00000000 64646        0 10 1 0 100 0 0 10 0
   1: 0100007F:1FBB 0100007F:C001 01 00000000:00000000 00:00000000 00000000 64646        0 11 1 0 20 4 30 10 -1
   2: 0200E70A:C002 22D8B85D:01BB 01 00000000:00000000 00:00000000 00000000 64646        0 12 1 0 20 4 30 10 -1
   3: 0200E70A:C003 0200E70A:1FBB 08 00000000:00000000 00:00000000 00000000 64646        0 13 1 0 20 4 30 10 -1
   4: 0100007F:1FBB 0100007F:C009 06 00000000:00000000 03:00000000 00000000     0        0 0 3 0
   5: 0100007F:1FBB 0100007F:C001 01 00000000:00000000 00:00000000 00000000 64646        0 99 1 0 20 4 30 10 -1
"""
TCP6 = """\
  sl  local_address                         remote_address                        st tx rx tr tm uid timeout inode
   0: 00000000000000000000000001000000:1FBB 00000000000000000000000001000000:C001 01 0:0 00:0 0 0 0 21 1
   1: 0000000000000000FFFF00000100007F:1FBB 0000000000000000FFFF00000100007F:C001 01 0:0 00:0 0 0 0 22 1
   2: 0000000000000000FFFF00000100007F:1FBB 0000000000000000FFFF000022D8B85D:01BB 02 0:0 00:0 0 0 0 23 1
"""


def test_parse_inet() -> None:
    ours = frozenset({10, 11, 12, 13})
    assert parse_inet(TCP, ours) == (
        Connection("127.0.0.1:8123", "127.0.0.1:49153", True),
        Connection("10.231.0.2:49154", "93.184.216.34:443", False),
        Connection("10.231.0.2:49155", "10.231.0.2:8123", False),
    )
    found = parse_inet(TCP6, frozenset({21, 22, 23}))
    assert [c.inside for c in found] == [True, True, False]
    assert found[0].local == "[0:0:0:0:0:0:0:1]:8123" and found[2].remote == "93.184.216.34:443"


UDP = """\
   sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops
  1: 0200E70A:8A82 63004D0A:0035 01 00000000:00000000 00:00000000 00000000 64646        0 31 2 0 0
  2: 00000000:14E9 00000000:0000 07 00000000:00000000 00:00000000 00000000 64646        0 32 2 0 0
  3: 0100007F:14E9 00000000:0000 07 00000000:00000000 00:00000000 00000000 64646        0 33 2 0 0
"""


def test_sockets_at_the_sandboxs_own_address_are_refused() -> None:
    """Another sandbox has another address: such a snapshot would never thaw."""
    assert parse_bound(UDP, frozenset({31, 32, 33}), "udp") == ("udp 10.231.0.2:35458",)
    assert parse_bound(TCP, frozenset({10, 11, 12, 13}), "tcp") == ()
    listening = TCP.replace("0100007F:1FBB 00000000:0000 0A", "0200E70A:1FBB 00000000:0000 0A")
    assert parse_bound(listening, frozenset({10}), "tcp") == ("tcp 10.231.0.2:8123",)
    refusal = refuse(Tree((TASK,), bound=("udp 10.231.0.2:35458",)))
    assert refusal is not None and refusal.code == "own-address" and "10.231.0.2:35458" in refusal.cause


def test_what_belongs_to_no_process_is_refused_by_name() -> None:
    """Nothing in /proc/PID tells of it: without a look at the namespace it would be lost without a word."""
    semaphores = (
        "       key      semid perms      nsems   uid   gid\n     24301          0   600          3 64646 64646\n"
    )
    memory = "       key      shmid perms\n        -5          7  1600\n"
    assert parse_sysv(semaphores, "sem") == ("semaphores 0 (key 0x00005eed)",)
    assert parse_sysv(memory, "shm") == ("shared memory 7 (key 0xfffffffb)",)
    assert parse_sysv("       key      msqid perms\n", "msg") == ()
    refusal = refuse(Tree((TASK,), ipc=("message queue /frogs",)))
    assert refusal is not None and refusal.code == "ipc-object" and refusal.cause.startswith("message queue /frogs: ")


def test_faults() -> None:
    try:
        faults.fault("dump.before")
        faults.configure("dump.before=raise*1, restore.criu=kill-criu ,commit.data=enospc")
        with pytest.raises(faults.InjectedFault):
            faults.fault("dump.before")
        faults.fault("dump.before")
        with pytest.raises(OSError, match="No space left"):
            faults.fault("commit.data")
        faults.fault("restore.criu")
        assert faults.kills_criu("restore.criu") and not faults.kills_criu("dump.criu")
        with pytest.raises(OSError):
            faults.kills_criu("commit.data")
        for bad in ("dump.before", "nowhere=raise", "dump.before=explode", "dump.before=raise*x"):
            with pytest.raises(SpecError):
                faults.configure(bad)
        assert faults.active("restore.criu") == "kill-criu", "a bad text changes nothing"
    finally:
        faults.configure("")
    assert faults.active("restore.criu") is None
