"""The requirement checks on hosts of every kind, and how doctor shows them."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from woodfrog.cli import commands, doctor
from woodfrog.errors import DaemonError, HostError
from woodfrog.linux import requirements
from woodfrog.linux.requirements import Cgroups, Check, CriuState, Host, demand, failed, judge, probe

GOOD = Host(
    system="Linux",
    kernel="6.12.9-amd64",
    machine="x86_64",
    uid=0,
    capabilities=(1 << 41) - 1,
    page_size=4096,
    checkpoint_restore=True,
    userfaultfd=0,
    seccomp_filter=True,
    seccomp_confined=False,
    time_namespace=True,
    trial=dict.fromkeys(("namespaces", "overlay", "bridge", "veth", "nat"), ""),
    overlay_known=True,
    cgroups=Cgroups({"cpu": 2, "memory": 2, "pids": 2}, True),
    criu=CriuState("/usr/sbin/criu", (4, 1, 1), check=""),
    programs={"ip": "/usr/sbin/ip", "nft": "/usr/sbin/nft"},
    ip_forward=True,
    ip_forward_writable=True,
    shm="tmpfs",
    state_dir="/var/lib/woodfrog",
    state_dir_problem="",
    free_bytes=100 << 30,
    memory_bytes=16 << 30,
    open_files=524288,
    python=(3, 11, 7),
    native_missing=(),
    worker_uid=64646,
    worker_user=None,
    now=1_790_000_000.0,
    installed_at=1_780_000_000.0,
)


def only_failure(host: Host) -> Check:
    bad = failed(judge(host))
    assert len(bad) == 1, bad
    return bad[0]


def test_a_good_host_passes_everything() -> None:
    checks = judge(GOOD)
    assert all(c.ok for c in checks)
    assert all(not c.remedy for c in checks)
    assert len({c.name for c in checks}) == len(checks)
    demand(checks)


@pytest.mark.parametrize(
    ("changes", "name", "found", "remedy"),
    [
        ({"criu": CriuState(error="criu not found")}, "criu", "criu not found", "install CRIU 4.1 or newer"),
        (
            {"criu": CriuState("/usr/sbin/criu", (3, 17, 1), error="criu 3.17.1 is too old")},
            "criu",
            "3.17.1 at /usr/sbin/criu is too old",
            "install CRIU 4.1 or newer",
        ),
        ({"criu": CriuState("/usr/sbin/criu", (4, 0))}, "criu", "4.0 at", "WOODFROG_CRIU"),
        (
            {"criu": CriuState("/usr/sbin/criu", (4, 1), check="Error (criu/cr-check.c:1): UFFD is not supported")},
            "criu-check",
            "UFFD is not supported",
            "docs/failure-modes.md",
        ),
        ({"kernel": "5.4.0-90-generic"}, "kernel", "5.4.0-90-generic", "Linux 5.14 or newer"),
        ({"system": "Darwin", "kernel": "24.1.0"}, "kernel", "Darwin", "Linux 5.14 or newer"),
        ({"capabilities": GOOD.capabilities & ~(1 << 21)}, "capabilities", "CAP_SYS_ADMIN", "--privileged"),
        ({"seccomp_filter": False}, "seccomp", "no filters", "CONFIG_SECCOMP_FILTER"),
        ({"trial": {**GOOD.trial, "overlay": "mount: unknown type"}}, "overlayfs", "unknown type", "modprobe overlay"),
        ({"trial": {**GOOD.trial, "veth": "Unknown device type."}}, "veth", "Unknown device type", "modprobe veth"),
        ({"trial": {**GOOD.trial, "nat": "No such file"}}, "nat", "No such file", "nft_masq"),
        (
            {"cgroups": Cgroups({}, False)},
            "cgroups",
            "no memory and no pids controller (found none)",
            "mount cgroup v2",
        ),
        ({"cgroups": Cgroups({"memory": 1, "pids": 1, "cpu": 1}, False)}, "cgroups", "read-only", "--cgroupns=host"),
        ({"programs": {"ip": "/sbin/ip", "nft": None}}, "nft", "not found", "apt-get install nftables"),
        ({"programs": {"ip": None, "nft": "/sbin/nft"}}, "ip", "not found", "apt-get install iproute2"),
        ({"shm": "overlay"}, "shm", "overlay", "mount -t tmpfs"),
        ({"state_dir_problem": "/x can be written by others"}, "state-dir", "written by others", "WOODFROG_HOME"),
        ({"free_bytes": 100 << 20}, "disk", "100 MiB free", "woodfrog needs 1.0 GiB"),
        ({"open_files": 256}, "open-files", "at most 256", "LimitNOFILE="),
        ({"python": (3, 10, 4)}, "python", "3.10.4", "Python 3.11"),
        ({"native_missing": ("woodfrog-init",)}, "native", "woodfrog-init", "make native"),
        ({"worker_user": "ann"}, "worker-uid", "64646 is 'ann'", "WOODFROG_WORKER_UID"),
    ],
)
def test_each_lack_is_one_failure_with_its_remedy(changes: dict[str, Any], name: str, found: str, remedy: str) -> None:
    check = only_failure(replace(GOOD, **changes))
    assert check.name == name
    assert found in check.found
    assert remedy in check.remedy
    with pytest.raises(HostError, match=name) as caught:
        demand(judge(replace(GOOD, **changes)))
    assert caught.value.code == f"host-{name}"
    assert remedy in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "name", "found", "remedy"),
    [
        ({"checkpoint_restore": False}, "checkpoint-restore", "not in this kernel", "CONFIG_CHECKPOINT_RESTORE=y"),
        ({"criu": replace(GOOD.criu, signs=True)}, "criu-pointers", "authenticates pointers", "arm64.nopauth"),
        ({"page_size": 65536}, "page-size", "64 KiB", "pages have 4 KiB"),
        ({"seccomp_confined": True}, "seccomp-profile", "under a seccomp filter", "seccomp=unconfined"),
    ],
)
def test_what_only_freezing_needs_fails_and_the_daemon_starts(
    changes: dict[str, Any], name: str, found: str, remedy: str
) -> None:
    host = replace(GOOD, **changes)
    check = only_failure(host)
    assert check.name == name and found in check.found
    assert "every start is a cold one" in check.remedy and remedy in check.remedy
    demand(judge(host))


@pytest.mark.parametrize(
    ("changes", "name", "remedy"),
    [
        ({"capabilities": GOOD.capabilities & ~(1 << 24)}, "cap-sys-resource", "run as the worker's uid"),
        ({"userfaultfd": errno.ENOSYS}, "userfaultfd", "CONFIG_USERFAULTFD=y"),
        ({"userfaultfd": errno.EPERM}, "userfaultfd", "--privileged"),
        ({"time_namespace": False}, "time-namespace", "CONFIG_TIME_NS"),
        ({"cgroups": Cgroups({"memory": 1, "pids": 1}, True)}, "cgroup-cpu", "no effect"),
        ({"ip_forward": False, "ip_forward_writable": False}, "ip-forwarding", "sysctl -w net.ipv4.ip_forward=1"),
        ({"free_bytes": 3 << 30}, "disk", "free some space"),
        ({"memory_bytes": 100 << 20}, "memory", "out of memory"),
        ({"now": 0.0}, "clock", "set the clock"),
        ({"now": GOOD.now, "installed_at": GOOD.now + 1e6}, "clock", "set the clock"),
    ],
)
def test_what_is_only_noted_does_not_stop_the_daemon(changes: dict[str, Any], name: str, remedy: str) -> None:
    checks = judge(replace(GOOD, **changes))
    demand(checks)
    (noted,) = [c for c in checks if not c.ok]
    assert (noted.name, noted.required) == (name, False)
    assert remedy in noted.remedy


def test_forwarding_that_is_off_is_fine_when_the_daemon_can_turn_it_on() -> None:
    assert all(c.ok for c in judge(replace(GOOD, ip_forward=False)))


def test_without_root_only_root_fails_and_the_rest_is_not_guessed() -> None:
    host = replace(
        GOOD,
        uid=1000,
        capabilities=0,
        trial={},
        overlay_known=False,
        userfaultfd=errno.EPERM,
        cgroups=Cgroups({"memory": 2, "pids": 2, "cpu": 2}, False),
        criu=CriuState("/usr/sbin/criu", (4, 1)),
        ip_forward=False,
        ip_forward_writable=False,
    )
    check = only_failure(host)
    assert check.name == "root"
    assert check.found == "no, uid 1000"
    assert "sudo woodfrog daemon start" in check.remedy
    unknown = {c.name for c in judge(host) if c.ok is None}
    assert {"namespaces", "overlayfs", "userfaultfd", "criu-check", "veth", "nat", "cgroups"} <= unknown


def test_demand_counts_what_else_is_missing() -> None:
    host = replace(GOOD, criu=CriuState(error="criu not found"), python=(3, 9))
    with pytest.raises(HostError, match=r"1 more: see `woodfrog doctor`") as caught:
        demand(judge(host))
    assert [c["name"] for c in caught.value.fields["checks"]] == ["criu", "python"]


HYBRID = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime shared:5 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
39 31 0:36 / /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
"""


def test_controllers_are_found_where_their_hierarchy_is() -> None:
    hybrid = requirements.parse_cgroups(HYBRID, lambda path: "", lambda path: True)
    assert hybrid == Cgroups({"cpu": 1, "memory": 1, "pids": 1}, True)
    pure = requirements.parse_cgroups(
        "30 20 0:26 / /sys/fs/cgroup ro - cgroup2 cgroup2 rw",
        {"/sys/fs/cgroup/cgroup.controllers": "cpuset cpu io memory hugetlb pids\n"}.get,
        lambda path: False,
    )
    assert pure == Cgroups({"cpuset": 2, "cpu": 2, "memory": 2, "pids": 2}, False)


@pytest.mark.parametrize(
    ("script", "found"),
    [
        ("echo 'Version: 3.17.1'", "3.17.1 at {path} is too old"),
        ("echo 'vdso: Unexpected rt vDSO area bounds' >&2; exit 1", "Unexpected rt vDSO area bounds"),
    ],
)
def test_an_unusable_criu_is_described_and_its_remedy_given_once(tmp_path: Path, script: str, found: str) -> None:
    path = tmp_path / "criu"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    for place, text in ((path, found.format(path=path)), (tmp_path / "none", "No such file")):
        check = only_failure(replace(GOOD, criu=doctor.find_criu(str(place))))
        assert check.name == "criu"
        assert text in check.found
        assert "install CRIU 4.1 or newer" in check.remedy
        assert "install" not in check.found


def test_the_state_directory_is_judged_by_owner_and_mode(tmp_path: Path) -> None:
    me = os.geteuid()
    assert requirements.probe_state_dir(tmp_path / "not" / "yet", owner=me) == ""
    good = tmp_path / "good"
    good.mkdir(mode=0o700)
    assert requirements.probe_state_dir(good, owner=me) == ""
    good.chmod(0o777)
    assert "written by others" in requirements.probe_state_dir(good, owner=me)
    good.chmod(0o700)
    assert f"belongs to uid {me}" in requirements.probe_state_dir(good, owner=me + 1)
    (tmp_path / "file").write_text("")
    assert "not a directory" in requirements.probe_state_dir(tmp_path / "file", owner=me)
    assert "not a directory" in requirements.probe_state_dir(tmp_path / "file" / "below", owner=me)


def test_probing_this_machine_never_raises(tmp_path: Path) -> None:
    host = probe(state_dir=tmp_path / "state", worker_uid=64646, native=(), criu=CriuState(error="none"))
    assert host.system == "Linux"
    assert host.memory_bytes and host.free_bytes
    assert not (tmp_path / "state").exists()
    judge(host)


def present(monkeypatch: pytest.MonkeyPatch, host: Host, health: dict[str, Any] | None = None) -> None:
    checks = doctor.run_checks(lambda: host, lambda: health)
    monkeypatch.setattr(doctor, "run_checks", lambda: checks)


def test_doctor_shows_every_check_and_each_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    present(monkeypatch, replace(GOOD, checkpoint_restore=False, criu=CriuState(error="criu not found")))
    result = CliRunner().invoke(commands.app, ["doctor"])
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    at = next(i for i, line in enumerate(lines) if line.split()[:2] == ["FAIL", "checkpoint-restore"])
    assert "use a kernel built with CONFIG_CHECKPOINT_RESTORE=y" in lines[at + 1]
    assert any(line.split()[:2] == ["ok", "userfaultfd"] for line in lines)
    assert "2 of" in lines[-1] and "checks failed" in lines[-1]


def test_doctor_in_json(monkeypatch: pytest.MonkeyPatch) -> None:
    present(monkeypatch, GOOD, {"version": doctor.own_version(), "pid": 7})
    result = CliRunner().invoke(commands.app, ["doctor", "--json"])
    assert result.exit_code == 0
    answer = json.loads(result.stdout)
    assert answer["ok"] is True
    assert {"name", "ok", "required", "found", "remedy"} == set(answer["checks"][0])
    assert answer["checks"][-1]["name"] == "daemon"


def test_doctor_on_a_daemon_of_another_version_or_a_broken_one(monkeypatch: pytest.MonkeyPatch) -> None:
    check = doctor.judge_daemon({"version": "0.0.1"}, "0.2.0")
    assert (check.ok, check.required) == (False, False)
    assert "version 0.0.1 runs, 0.2.0 is installed" in check.found
    assert check.remedy == "`woodfrog daemon restart`"
    check = doctor.judge_daemon({"version": "0.2.0", "pid": 7, "package": "/p", "current": False}, "0.2.0")
    assert not check.ok and check.found == "pid 7 is older than its code in /p, which was updated"

    def broken() -> None:
        raise DaemonError("no answer within 5 s")

    assert doctor.run_checks(lambda: GOOD, broken)[-1].found == "no answer within 5 s"


def test_doctor_without_the_criu_part_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "woodfrog.criu", None)
    assert "cannot be imported" in doctor.find_criu("").error
