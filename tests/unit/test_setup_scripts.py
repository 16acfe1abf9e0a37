"""The set-up's own decisions: whose mirror, which CRIU, what may be removed, what is compiled again."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

import build_native
import clean_machine
import criu_prefix
from system_packages import SetupError

DEB822 = """\
# the usual one
Types: deb deb-src
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 abc

Types: deb
URIs: http://off.example/debian
Suites: bookworm
Components: main
Enabled: no
"""


def write_sources(etc: Path, name: str, text: str) -> list[criu_prefix.Source]:
    path = etc / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return criu_prefix.host_sources(etc)


def test_the_newer_release_comes_from_the_hosts_own_mirror_and_keys(tmp_path: Path) -> None:
    sources = write_sources(tmp_path, "sources.list.d/debian.sources", DEB822)
    entry = criu_prefix.archive(sources, {"ID": "debian", "VERSION_CODENAME": "bookworm"})
    assert "URIs: http://mirror.example/debian\nSuites: forky\nComponents: main\n" in entry
    assert "\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc\n" in entry


def test_one_line_sources_keep_their_options(tmp_path: Path) -> None:
    text = (
        "# deb http://no.example/ubuntu noble main\n"
        "deb-src http://no.example/ubuntu noble main\n"
        "deb http://security.example/ubuntu noble-security main\n"
        "deb [arch=amd64,arm64 signed-by=/k.gpg] http://mirror.example/ubuntu noble main universe # all\n"
    )
    sources = write_sources(tmp_path, "sources.list", text)
    entry = criu_prefix.archive(sources, {"ID": "mint", "ID_LIKE": "ubuntu debian", "VERSION_CODENAME": "noble"})
    assert "URIs: http://mirror.example/ubuntu\nSuites: resolute\nComponents: main universe\n" in entry
    assert "signed-by: /k.gpg\n" in entry and "architectures: amd64 arm64\n" in entry


@pytest.mark.parametrize("release", [{"ID": "fedora"}, {"ID": "debian", "VERSION_CODENAME": "bookworm"}])
def test_without_a_known_mirror_the_error_says_what_to_do(release: dict[str, str]) -> None:
    with pytest.raises(SetupError, match=r"put criu >= 4\.\d on PATH"):
        criu_prefix.archive([], release)


@pytest.mark.parametrize(
    ("version", "enough"),
    [
        (None, False),
        ("3.17.1-2+deb12u2", False),
        ("4.0-1", False),
        ("4.1.1-1", True),
        ("1:4.10-1", True),
        ("5.0", True),
    ],
)
def test_which_criu_of_the_distribution_is_new_enough(
    version: str | None, enough: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(criu_prefix, "OLDEST", (4, 1))
    assert criu_prefix.offers(version) is enough


def test_clean_up_of_another_state_directory_touches_its_own_names_only() -> None:
    every = clean_machine.owned_name(clean_machine.DEFAULT_STATE)
    assert all(every.fullmatch(name) for name in ("woodfrog", "woodfrog-12ab", "woodfrog_x", "woodfrog.slice"))
    assert not any(every.fullmatch(name) for name in ("woodfrogs", "my-woodfrog", "wood"))
    own = clean_machine.owned_name(Path("/srv/frog"))
    assert not own.fullmatch("woodfrog") and not own.fullmatch("woodfrog-12ab")


def test_a_mistyped_directory_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    for path in (tmp_path, Path("/usr")):
        with pytest.raises(SetupError, match="nothing was removed"):
            clean_machine.refuse_foreign(path, {"criu"})
    clean_machine.refuse_foreign(tmp_path / "absent", {"criu"})


def test_programs_are_compiled_when_out_of_date_and_only_then(tmp_path: Path) -> None:
    sources, binaries = tmp_path / "native", tmp_path / "bin"
    sources.mkdir()
    assert build_native.build(sources, binaries) == []
    (sources / "value.h").write_text("#define VALUE 3\n")
    (sources / "a.c").write_text('#include "value.h"\nint main(void) { return VALUE; }\n')
    binary = binaries / "woodfrog-a"
    assert build_native.build(sources, binaries) == [binary]
    assert subprocess.run([binary]).returncode == 3
    assert build_native.build(sources, binaries) == []

    later = binary.stat().st_mtime + 1
    (sources / "value.h").write_text("#define VALUE 4\n")
    os.utime(sources / "value.h", (later, later))
    assert build_native.build(sources, binaries) == [binary]
    assert subprocess.run([binary]).returncode == 4

    (sources / "a.c").write_text("int main(void) { int unused; return 0; }\n")
    os.utime(sources / "a.c", (later + 9, later + 9))
    with pytest.raises(build_native.BuildError, match=r"a\.c does not compile"):
        build_native.build(sources, binaries)
    assert subprocess.run([binary]).returncode == 4, "a failed build keeps the last good program"

    (sources / "a.c").unlink()
    assert build_native.build(sources, binaries) == []
    assert list(binaries.iterdir()) == []
