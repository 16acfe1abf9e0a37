from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from woodfrog.linux import procfs

# What the kernel can put into a path or a process name: anything but NUL (and "/" in one name).
texts = st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), max_size=20)
numbers = st.integers(0, 2**31)


@given(name=texts, pid=numbers, parent=numbers, start=st.integers(0, 2**63))
def test_stat_whatever_the_name(name: str, pid: int, parent: int, start: int) -> None:
    fields = ["S", str(parent), *["0"] * 17, str(start), *["0"] * 30]
    parsed = procfs.parse_stat(f"{pid} ({name}) {' '.join(fields)}\n")
    assert parsed == procfs.Stat(pid, name, "S", parent, start)


path_parts = st.text(
    st.characters(min_codepoint=33, max_codepoint=0x2FF, blacklist_characters="/\\"), min_size=1, max_size=8
)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2**47), st.integers(1, 2**30), st.text("rwx-", min_size=3, max_size=3), st.booleans(),
            st.integers(0, 2**40), st.lists(path_parts, max_size=3), st.sampled_from(["", " (deleted)", " b"]),
        )
    )
)  # fmt: skip
def test_maps_roundtrip(rows: list[tuple[int, int, str, bool, int, list[str], str]]) -> None:
    lines = []
    for start, size, flags, shared, offset, parts, suffix in rows:
        path = "/" + "/".join(parts) + suffix if parts else ""
        lines.append(
            f"{start:08x}-{start + size:08x} {flags}{'s' if shared else 'p'} {offset:08x} fe:0a 42".ljust(73)
            + f"{path}\n"
        )
    for entry, (start, size, flags, shared, offset, parts, suffix) in zip(
        procfs.parse_maps("".join(lines)), rows, strict=True
    ):
        assert (entry.start, entry.size, entry.offset) == (start, size, offset)
        assert (entry.read, entry.write, entry.execute) == (flags[0] == "r", flags[1] == "w", flags[2] == "x")
        assert entry.shared == shared
        assert entry.device == (0xFE, 0x0A)
        assert entry.path == ("/" + "/".join(parts) + suffix if parts else "")


def escape(text: str) -> str:
    return "".join(f"\\{ord(c):03o}" if c in " \t\n\\" else c for c in text)


@given(
    target=texts, source=texts, optional=st.lists(st.sampled_from(["shared:1", "master:2", "unbindable"]), max_size=2)
)
def test_mountinfo_roundtrip(target: str, source: str, optional: list[str]) -> None:
    # The kernel escapes what separates fields and lines; other characters come as they are.
    target, source = (t.replace("\r", "") for t in (target, source))
    line = " ".join(
        [
            "36",
            "35",
            "98:0",
            "/r",
            escape("/" + target),
            "rw,noatime",
            *optional,
            "-",
            "ext4",
            escape("d" + source),
            "rw",
        ]
    )
    (entry,) = procfs.parse_mountinfo(line + "\n")
    assert (entry.target, entry.source, entry.propagation) == ("/" + target, "d" + source, tuple(optional))
    assert entry.options == {"rw", "noatime"}


def test_status_of_a_thread_with_everything() -> None:
    parsed = procfs.parse_status(
        "Name:\tpython3\nUmask:\t0022\nState:\tS (sleeping)\nTgid:\t77\nPid:\t77\nPPid:\t1\nUid:\t1\t2\t3\t4\n"
        "Gid:\t5\t6\t7\t8\nGroups:\t10 20 \nNStgid:\t77\t100\nNSpid:\t77\t100\nVmRSS:\t    1024 kB\nThreads:\t4\n"
        "CapInh:\t0000000000000000\nCapPrm:\t0000000000000001\nCapEff:\t0000000000000002\nCapBnd:\t000001fffeffffff\n"
        "CapAmb:\t0000000000000003\nNoNewPrivs:\t1\nSeccomp:\t2\nSeccomp_filters:\t1\n"
    )
    assert parsed.ns_pids == (77, 100)
    assert parsed.uids == (1, 2, 3, 4)
    assert parsed.groups == (10, 20)
    assert (parsed.threads, parsed.seccomp, parsed.no_new_privs, parsed.rss_bytes) == (4, 2, True, 1 << 20)
    assert parsed.cap_bounding == 0x1FFFEFFFFFF


def test_this_very_process() -> None:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        me = os.getpid()
        assert procfs.status(me).threads >= 2
        assert procfs.stat(me).parent == os.getppid()
        assert any(m.path.endswith("[stack]") for m in procfs.maps(me))
        assert any(m.target == "/" for m in procfs.mountinfo(me))
        with open("/dev/null") as f:
            assert procfs.descriptors(me)[f.fileno()] == "/dev/null"
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
            assert child.pid in procfs.children(me)
            assert set(procfs.tree(me)) >= {me, child.pid}
            child.communicate(b"\n")
    finally:
        stop.set()
        thread.join()


def test_process_that_is_gone() -> None:
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    for read in (procfs.status, procfs.stat, procfs.maps, procfs.children, procfs.descriptors):
        with pytest.raises(ProcessLookupError):
            read(int(done.stdout))


SMAPS = """\
55d0-55d1 rw-p 00000000 00:00 0                          [heap]
Rss:                  24 kB
Anonymous:            20 kB
Swap:                  8 kB
VmFlags: rd wr mr mw me ac
7f00-7f08 rw-s 00000000 00:01 7                          /dev/zero (deleted)
Rss:                  32 kB
Anonymous:             0 kB
Swap:                  0 kB
7f10-7f20 r--s 00001000 fe:01 9                          /usr/lib/a-b.so
Rss:                  64 kB
Anonymous:             0 kB
Swap:                  0 kB
"""


def test_what_a_process_has() -> None:
    rows = procfs.parse_smaps(SMAPS)
    assert [(r.begin, r.end, r.own >> 10, r.shared >> 10) for r in rows] == [
        (0x55D0, 0x55D1, 28, 0), (0x7F00, 0x7F08, 0, 32), (0x7F10, 0x7F20, 0, 0),
    ]  # fmt: skip
    mine = procfs.resident(os.getpid())
    assert sum(r.own for r in mine) > 1 << 20
    assert [(r.begin, r.end) for r in mine] == sorted((r.begin, r.end) for r in mine)


def test_threads_outside_any_system_call_are_counted() -> None:
    program = "import sys, threading, time\nthreading.Thread(target=time.sleep, args=(1000,), daemon=True).start()\n"
    for last, count in (("sys.stdin.read()", 0), ("while True: pass", 1)):
        child = subprocess.Popen(
            [sys.executable, "-c", f"{program}print('up', flush=True)\n{last}"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        with child:
            try:
                assert child.stdout is not None and child.stdout.readline() == b"up\n"
                deadline = time.monotonic() + 30
                while procfs.computing(child.pid) != count and time.monotonic() < deadline:
                    time.sleep(0.01)
                assert procfs.computing(child.pid) == count
            finally:
                child.kill()
    with pytest.raises(ProcessLookupError):
        procfs.computing(child.pid)
