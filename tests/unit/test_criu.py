"""criu: what its log means, its command lines, its statistics, which binary."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from woodfrog.criu.binary import authenticates, find_criu, parse_version, restorer_signs
from woodfrog.criu.diagnose import TABLE, Known, diagnose, error_lines, markdown, tail
from woodfrog.criu.options import Dump, Restore, check_command, dump_command, environment, restore_command
from woodfrog.criu.stats import parse_stats
from woodfrog.engine.plan import REFUSALS, refusals_markdown
from woodfrog.errors import HostError

DOCS = Path(__file__).parents[2] / "docs" / "failure-modes.md"


@pytest.mark.parametrize("known", TABLE, ids=lambda k: k.code)
def test_each_known_text_is_diagnosed_as_itself(known: Known) -> None:
    found = diagnose(known.seen)
    assert (found.code, found.remedy, found.at_fault) == (known.code, known.remedy, known.at_fault)
    assert "{" not in found.cause and "?" not in found.cause and "\n" not in str(found)


def test_codes_are_unique_and_enough() -> None:
    codes = [k.code for k in TABLE]
    assert len(codes) == len(set(codes)) and len(codes) > 40
    assert all(re.fullmatch(r"[a-z][a-z-]+", c) for c in [*codes, *REFUSALS])
    assert all(k.at_fault is False or k.when != "capture" for k in TABLE)


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        (
            "(00.01)    100: Error (criu/files-reg.c:2144): File usr/lib/libx.so has bad size 108 (expect 54)",
            "the file /usr/lib/libx.so was changed since the snapshot was made (it has 108 bytes, had 54)",
        ),
        (
            "   100: Error (criu/files-reg.c:2353): Can't open file app/data.bin on restore: No such file or directory",
            "a file that was open or mapped when the snapshot was made is gone (app/data.bin)",
        ),
        (
            "(00.01) Error (compel/src/lib/infect.c:263): Unseizable non-zombie 101 found, state S, err -1/10",
            "process 101 is being traced (strace, gdb, a debugger), so that CRIU cannot stop it",
        ),
    ],
)
def test_causes_name_the_thing(line: str, cause: str) -> None:
    assert diagnose(line).cause == cause


def test_the_cause_is_neither_an_echo_nor_harmless() -> None:
    log = """\
(00.003944) Error (criu/tun.c:85): tun: Unable to create tun: No such file or directory
(00.030628) Error (criu/util.c:1533): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted
(00.031000) Warn  (criu/kerndat.c:1285): Can't keep kdat cache on non-tempfs
(00.005719) Error (criu/files-ext.c:94): Can't dump file 3 of that type [600] (anon anon_inode:[userfaultfd])
(00.005729) Error (criu/cr-dump.c:1681): Dump files (pid: 100) failed with -1
(00.014634) Error (criu/cr-dump.c:2111): Dumping FAILED.
"""
    found = diagnose(log)
    assert found.code == "descriptor-kind" and found.line.startswith("Can't dump file 3")
    assert len(error_lines(log)) == 5
    harmless = "\n".join(log.splitlines()[:3])
    assert diagnose(harmless).code == "criu-silent"


def test_a_particular_later_line_beats_a_general_earlier_one() -> None:
    log = """\
Error (criu/a.c:1): Can't open /proc/100/x: Permission denied
pie: 100: Error (criu/pie/parasite.c:588): send_fds failed (-22)
"""
    assert diagnose(log).code == "io-uring"
    assert diagnose(log.splitlines()[0]).code == "not-permitted"


@pytest.mark.parametrize(
    ("log", "code", "says"),
    [
        ("", "criu-silent", "named no error"),
        (
            "Error (criu/x.c:1): a thing never seen\n(1.0) Error (criu/x.c:2): Dumping FAILED.",
            "criu-unknown",
            "never seen",
        ),
        ("Error (criu/cr-dump.c:2111): Dumping FAILED.", "criu-unknown", "Dumping FAILED"),
    ],
)
def test_unknown_logs_say_so(log: str, code: str, says: str) -> None:
    found = diagnose(log)
    assert found.code == code and says in found.cause and found.remedy and not found.at_fault


def test_tail() -> None:
    assert tail("".join(f"{i}\n" for i in range(100)), 2) == "98\n99"
    assert tail("") == ""


def test_the_page_of_failures_holds_the_tables() -> None:
    """To renew it: put the output of the two functions between the marks."""
    page = DOCS.read_text()
    for name, text in (("refusals", refusals_markdown()), ("diagnoses", markdown())):
        found = re.search(rf"<!-- {name} -->\n(.*?)<!-- end -->", page, re.DOTALL)
        assert found is not None and found[1] == text, f"docs/failure-modes.md is not up to date: {name}"
    assert all(f"`{k.code}`" in page for k in TABLE)


def test_dump_command() -> None:
    command = dump_command("/x/criu", Dump(pid=100, images="/img", log="dump.log", tcp="established"))
    assert command[:2] == ("/x/criu", "dump") and "--tcp-established" in command and "--tcp-close" not in command
    for option in ("--unprivileged", "--no-default-config", "--link-remap", "--file-locks", "--manage-cgroups=ignore"):
        assert option in command
    assert command[command.index("--tree") + 1] == "100" and "--force-irmap" not in command
    watched = dump_command("criu", Dump(100, "/img", "dump.log", irmap_paths=("/tmp", "/app")))
    assert watched[-5:] == ("--force-irmap", "--irmap-scan-path", "/tmp", "--irmap-scan-path", "/app")


def test_restore_command() -> None:
    plain = restore_command("criu", Restore(images="/img", work="/work", log="restore.log"))
    assert "--restore-detached" in plain and "--unprivileged" in plain
    assert plain[plain.index("--work-dir") + 1] == "/work"
    clock = restore_command("criu", Restore(images="/img", work="/work", log="restore.log", new_clock=True))
    assert set(plain) - set(clock) == {"--unprivileged"}
    closed = restore_command("criu", Restore("/img", "/work", "restore.log", tcp="close"))
    assert "--tcp-close" in closed
    # What must be the same on both sides.
    dumped = dump_command("criu", Dump(100, "/img", "dump.log"))
    assert {"--link-remap", "--file-locks"} <= set(plain) & set(dumped)
    assert check_command("criu")[1] == "check" and environment("/run/criu")["XDG_RUNTIME_DIR"] == "/run/criu"


def test_stats() -> None:
    restored = bytes.fromhex("40591055063309570f000000120d0800100018022 0a291 0128d612".replace(" ", ""))
    assert parse_stats(restored) == {
        "pages_compared": 0, "pages_skipped_cow": 0, "forking_time": 2, "restore_time": 18594, "pages_restored": 2390,
    }  # fmt: skip
    dumped = bytes.fromhex(
        "4059105506330957240000000a22086e10aca50518f73320ce1528cc1b300038d61240004800500858086000680070 00".replace(
            " ", ""
        )
    )
    assert parse_stats(dumped)["frozen_time"] == 86700
    for damaged in (b"", b"\0" * 12, restored[:20], struct.pack("<III", 0, 0x57093306, 4) + b"\xff\xff\xff\xff"):
        assert parse_stats(damaged) == {}


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("Version: 4.1.1\n", (4, 1, 1)),
        ("Version: 4.2\nGitID: v4.2\n", (4, 2, 0)),
        ("vdso: Unexpected rt vDSO area bounds", None),
    ],
)
def test_version(text: str, version: tuple[int, int, int] | None) -> None:
    assert parse_version(text) == version


def _script(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_find_criu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = _script(tmp_path / "criu", "echo Version: 4.2")
    found = find_criu(good)
    assert (found.path, found.version, found.name) == (good, (4, 2, 0), "4.2.0")
    for body, code, says in (
        ("echo Version: 3.17.1", "criu-too-old", "3.17.1"),
        ("echo 'vdso: broken' >&2; exit 1", "criu-missing", "vdso: broken"),
    ):
        with pytest.raises(HostError) as caught:
            find_criu(_script(tmp_path / "other", body))
        assert caught.value.code == code and says in caught.value.message and "make setup" in caught.value.message
    with pytest.raises(HostError, match="No such file"):
        find_criu(tmp_path / "none")
    monkeypatch.setattr("woodfrog.criu.binary.PRIVATE", tmp_path / "none")
    monkeypatch.setattr("woodfrog.criu.binary.SYSTEM_PATH", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    assert find_criu().path == good
    good.unlink()
    with pytest.raises(HostError) as caught:
        find_criu()
    assert caught.value.code == "criu-missing"


def elf(*sections: tuple[int, bytes], machine: int = 183) -> bytes:
    """A 64-bit ELF file of sections of data: (flags, what is in it)."""
    head = b"\x7fELF\2\1".ljust(18, b"\0") + struct.pack("<HIQQQIHHHHHH", machine, 1, 0, 0, 64, 0, 64, 0, 0, 64, 0, 0)
    at, rows, bodies = 64 + 64 * len(sections), b"", b""
    for flags, body in sections:
        rows += struct.pack("<IIQQQQIIQQ", 0, 1, flags, 0, at + len(bodies), len(body), 0, 0, 4, 0)
        bodies += body
    return head[:60] + struct.pack("<H", len(sections)) + head[62:] + rows + bodies


NOP, PACIASP = bytes.fromhex("1f2003d5"), bytes.fromhex("3f2303d5")
READ_ONLY, CODE = 2, 6


@pytest.mark.parametrize(
    ("data", "signs"),
    [
        (elf((CODE, NOP + PACIASP), (READ_ONLY, NOP + PACIASP)), True),
        (elf((CODE, NOP + PACIASP), (READ_ONLY, NOP * 3)), False),  # CRIU itself may sign what it likes
        (elf((READ_ONLY, b"text: " + PACIASP)), False),
        (elf((READ_ONLY, NOP + PACIASP), machine=62), False),
        (elf((READ_ONLY, PACIASP))[:100], False),
        (b"#!/bin/sh\nexec criu\n", False),
    ],
)
def test_a_restorer_that_signs_return_addresses_is_known(tmp_path: Path, data: bytes, signs: bool) -> None:
    (tmp_path / "criu").write_bytes(data)
    assert restorer_signs(tmp_path / "criu") is signs
    assert not restorer_signs(tmp_path / "none")


def test_whether_pointers_are_authenticated() -> None:
    assert authenticates("processor: 0\nFeatures\t: fp asimd paca pacg\n")
    assert not authenticates("processor: 0\nFeatures\t: fp asimd pacag\nflags: paca\n") and not authenticates("")
