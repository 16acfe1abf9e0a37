"""Make a CRIU new enough for woodfrog available, changing as little of the machine as possible.

In this order: the criu that is on PATH; the distribution's package; otherwise the packages of a newer release of the
same distribution, fetched and verified by apt, and unpacked with their own C library into a private prefix, so that
nothing else on the machine changes. woodfrog looks for <prefix>/criu/bin/criu before PATH.

Standard library only: this is run by make, as root.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from system_packages import (
    DEFAULT_PREFIX,
    QUIET_APT,
    SetupError,
    candidate,
    install,
    on_path,
    require_apt,
    require_root,
    run,
    say,
    update_lists,
)

# 4.1 cannot dump an internet socket on kernels from 6.16 on (SO_PASSCRED is refused there).
OLDEST = (4, 2) if tuple(map(int, re.findall(r"\d+", os.uname().release)[:2])) >= (6, 16) else (4, 1)
NEEDED = f"criu >= {OLDEST[0]}.{OLDEST[1]}"
# Bump when the contents of the prefix change, so that existing ones are built again.
RECIPE = 2
STAMP = "stamp.json"
# Per distribution: the release that has a new enough criu, and the components it and its libraries are in.
NEWER_RELEASE = {"debian": ("forky", "main"), "ubuntu": ("resolute", "main universe")}


@dataclass(frozen=True)
class Source:
    """One archive of the host's apt configuration."""

    uris: str
    suites: str
    components: str
    options: tuple[tuple[str, str], ...]

    def for_suite(self, suite: str, components: str) -> str:
        fields = [("Types", "deb"), ("URIs", self.uris), ("Suites", suite), ("Components", components)]
        return "".join(f"{name}: {value}\n" for name, value in [*fields, *self.options])


class Progress:
    """A bar on a terminal, one line per step elsewhere."""

    def __init__(self) -> None:
        self.terminal = sys.stderr.isatty()

    def step(self, text: str) -> None:
        if not self.terminal:
            say("criu", text)

    def show(self, percent: float, text: str) -> None:
        if self.terminal:
            done = int(percent * 30 / 100)
            bar = "█" * done + "░" * (30 - done)
            sys.stderr.write(f"\r\x1b[Kcriu: {bar} {percent:3.0f}% {text[:40]}")
            sys.stderr.flush()

    def finish(self) -> None:
        if self.terminal:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


# --- the apt configuration of the host ---------------------------------------------------------------------------


def parse_deb822(text: str) -> list[Source]:
    sources = []
    for paragraph in re.split(r"\n\s*\n", "\n".join(line for line in text.splitlines() if not line.startswith("#"))):
        fields: dict[str, str] = {}
        name = ""
        for line in paragraph.splitlines():
            if line[:1] in " \t" and name:
                fields[name] += "\n" + line
            elif ":" in line:
                name, value = line.split(":", 1)
                name = name.strip().lower()
                fields[name] = value.strip()
        if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() in ("no", "false"):
            continue
        kept = tuple((key, fields[key]) for key in ("signed-by", "architectures", "trusted") if key in fields)
        sources.append(Source(fields.get("uris", ""), fields.get("suites", ""), fields.get("components", ""), kept))
    return sources


def parse_one_line(text: str) -> list[Source]:
    sources = []
    for line in text.splitlines():
        match = re.match(
            r"\s*deb\s+(?:\[(?P<options>[^]]*)\]\s*)?(?P<uri>\S+)\s+(?P<suite>\S+)\s*(?P<rest>[^#]*)", line
        )
        if match:
            pairs = [option.split("=", 1) for option in (match["options"] or "").split() if "=" in option]
            names = {"arch": "architectures", "signed-by": "signed-by", "trusted": "trusted"}
            kept = tuple((names[key], value.replace(",", " ")) for key, value in pairs if key in names)
            sources.append(Source(match["uri"], match["suite"], match["rest"].strip(), kept))
    return sources


def host_sources(etc: Path = Path("/etc/apt")) -> list[Source]:
    found: list[Source] = []
    for path in [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*"))]:
        if path.suffix in (".list", ".sources") and path.is_file():
            parse = parse_deb822 if path.suffix == ".sources" else parse_one_line
            found += parse(path.read_text(errors="replace"))
    return found


def os_release() -> dict[str, str]:
    pairs = (line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    return {key: value.strip('"') for key, value in pairs}


def archive(sources: list[Source], release: dict[str, str]) -> str:
    """Write the source entry of the newer release on the mirror that the host itself uses."""
    names = [release.get("ID", ""), *release.get("ID_LIKE", "").split()]
    distribution = next((name for name in names if name in NEWER_RELEASE), "")
    if not distribution:
        raise SetupError(f"no CRIU package known for {release.get('ID', 'this system')}: put {NEEDED} on PATH")
    suite, components = NEWER_RELEASE[distribution]
    codename = release.get("VERSION_CODENAME", "")
    aliases = {codename, "stable", "oldstable", "testing", "unstable", "sid"}
    for source in sources:
        if aliases & set(source.suites.split()) and "main" in source.components.split():
            return source.for_suite(suite, components)
    raise SetupError(f"no apt source for {codename} main in /etc/apt: configure one, or put {NEEDED} on PATH")


# --- criu itself -------------------------------------------------------------------------------------------------


def version_of(binary: str) -> tuple[int, ...] | None:
    """Return the version a binary reports, or None when it does not start."""
    try:
        done = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"Version: (\d+(?:\.\d+)*)", done.stdout)
    return tuple(int(part) for part in match[1].split(".")) if match else None


def complaint(binary: str) -> str | None:
    """Return why a binary will not do, or None when it will. Without root the version alone decides."""
    version = version_of(binary)
    if version is None:
        return "does not start"
    if version < OLDEST:
        return f"is version {'.'.join(map(str, version))}, older than {'.'.join(map(str, OLDEST))}"
    if os.geteuid() != 0:
        return None
    done = subprocess.run([binary, "check"], capture_output=True, text=True, timeout=60)
    if done.returncode != 0:
        return "fails `criu check`: " + " / ".join((done.stdout + done.stderr).strip().splitlines()[-2:])
    return None


def offers(version: str | None) -> bool:
    match = re.match(r"(?:\d+:)?(\d+)\.(\d+)", version or "")
    return match is not None and (int(match[1]), int(match[2])) >= OLDEST


# --- the private prefix ------------------------------------------------------------------------------------------


class PrivateApt:
    """apt with lists, cache and sources of its own; keys, proxies and credentials are the host's."""

    def __init__(self, directory: Path, source: str, progress: Progress) -> None:
        self.downloads = directory / "downloads"
        self.progress = progress
        for name in ("lists/partial", "cache/archives/partial", "downloads", "parts"):
            (directory / name).mkdir(parents=True)
        (directory / "private.sources").write_text(source)
        (directory / "status").touch()
        options = {
            "Dir::State::Lists": directory / "lists",
            "Dir::State::status": directory / "status",
            "Dir::Cache": directory / "cache",
            "Dir::Etc::SourceList": directory / "private.sources",
            "Dir::Etc::SourceParts": directory / "parts",
            "Dir::Etc::Preferences": "/dev/null",
            "Dir::Etc::PreferencesParts": directory / "parts",
            "Acquire::Languages": "none",
            "APT::Sandbox::User": "root",
            "APT::Update::Post-Invoke-Success": "",
        }
        self.options = [part for key, value in options.items() for part in ("-o", f"{key}={value}")]

    def fetch(self, text: str, begin: float, end: float, arguments: list[str]) -> None:
        """Run apt-get, showing its download status as the part of the bar between two percentages."""
        self.progress.step(text)
        self.progress.show(begin, text)
        reading, writing = os.pipe()
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(
                ["apt-get", *self.options, "-o", f"APT::Status-Fd={writing}", "-q", *arguments],
                cwd=self.downloads,
                env=os.environ | QUIET_APT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[writing],
            )
            os.close(writing)
            with os.fdopen(reading, errors="replace") as status:
                for line in status:
                    kind, _, rest = line.partition(":")
                    if kind == "dlstatus" and (match := re.match(r"\d+:([\d.]+):", rest)):
                        self.progress.show(begin + float(match[1]) * (end - begin) / 100, text)
            if process.wait() != 0:
                output.seek(0)
                tail = " / ".join(output.read().strip().splitlines()[-3:])
                raise SetupError(f"apt-get {arguments[0]} failed: {tail}")

    def libraries_of(self, package: str) -> list[str]:
        """Name the library packages below a package; programs it may also call are the host's business."""
        ignored = [f"--no-{kind}" for kind in ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")]
        output = run(["apt-cache", *self.options, "depends", "--recurse", *ignored, package])
        names = {line.strip() for line in output.splitlines() if line and not line.startswith((" ", "<"))}
        return sorted(name for name in names if name.startswith("lib") and ":" not in name and "python" not in name)


def unpack(downloads: Path, tree: Path, progress: Progress) -> None:
    packages = sorted(downloads.glob("*.deb"))
    progress.step(f"unpack {len(packages)} packages")
    for number, package in enumerate(packages):
        progress.show(75 + 15 * number / len(packages), f"unpack {package.name.split('_')[0]}")
        run(["dpkg", "-x", str(package), str(tree)])


def assemble(tree: Path, target: Path, home: Path, patchelf: str) -> None:
    """Move the binary and the libraries it needs into target, linked to run from home and nothing else."""
    binary = next((path for path in (tree / "usr/sbin/criu", tree / "usr/bin/criu") if path.is_file()), None)
    if binary is None:
        raise SetupError(f"the criu package holds no criu binary: put {NEEDED} on PATH")
    (target / "bin").mkdir(parents=True)
    (target / "lib").mkdir()
    libraries: dict[str, Path] = {}
    for path in sorted(tree.rglob("*.so*")):
        if path.is_file() and re.search(r"\.so(\.\d+)*$", path.name) and path.parent.name not in ("gconv", "criu"):
            libraries.setdefault(path.name, path)
    loader = Path(run([patchelf, "--print-interpreter", str(binary)]).strip()).name
    pending = [binary, libraries[loader]]
    # libgcc_s is loaded by libc itself, when a thread ends early.
    taken = {loader, "libgcc_s.so.1"} & libraries.keys()
    while pending:
        for name in run([patchelf, "--print-needed", str(pending.pop())]).split():
            if name not in libraries:
                raise SetupError(f"criu needs {name}, which none of its packages holds")
            if name not in taken:
                taken.add(name)
                pending.append(libraries[name])
    for name in taken:
        shutil.copy(libraries[name].resolve(), target / "lib" / name)
        (target / "lib" / name).chmod(0o755)
    criu = target / "bin" / "criu"
    shutil.copy(binary, criu)
    criu.chmod(0o755)
    lib = home / "lib"
    run([patchelf, "--force-rpath", "--set-rpath", str(lib), "--set-interpreter", str(lib / loader), str(criu)])


def build(home: Path, patchelf: str) -> None:
    progress = Progress()
    source = archive(host_sources(), os_release())
    home.parent.mkdir(parents=True, exist_ok=True)
    say("criu", f"build a private copy in {home} (nothing else on this machine changes)")
    with tempfile.TemporaryDirectory(prefix="woodfrog-criu-") as scratch:
        directory = Path(scratch)
        apt = PrivateApt(directory, source, progress)
        apt.fetch("read the package lists", 0, 30, ["update"])
        packages = ["criu", *apt.libraries_of("criu")]
        apt.fetch(f"download criu and {len(packages) - 1} libraries", 30, 75, ["download", *packages])
        tree = directory / "tree"
        unpack(apt.downloads, tree, progress)
        progress.show(90, "link")
        staging = Path(tempfile.mkdtemp(prefix=".criu-", dir=home.parent))
        try:
            staging.chmod(0o755)
            assemble(tree, staging, home, patchelf)
            versions = sorted(path.stem.replace("%3a", ":") for path in apt.downloads.glob("*.deb"))
            (staging / STAMP).write_text(json.dumps({"recipe": RECIPE, "packages": versions}, indent=1) + "\n")
            for path in [staging, *staging.rglob("*")]:
                path.chmod(0o755 if path.is_dir() or path.parent.name in ("bin", "lib") else 0o644)
            if home.exists():
                old = Path(tempfile.mkdtemp(prefix=".criu-", dir=home.parent))
                home.rename(old / "criu")
                staging.rename(home)
                shutil.rmtree(old)
            else:
                staging.rename(home)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    progress.finish()


def stamped(home: Path) -> bool:
    try:
        stamp = json.loads((home / STAMP).read_text())
    except (OSError, ValueError):
        return False
    return bool(stamp.get("recipe") == RECIPE) and (home / "bin" / "criu").is_file()


def ensure(prefix: Path, patchelf: Path, private: bool) -> str | None:
    """Return the path of a usable criu when something had to be done for it, None when all was there already."""
    home = prefix / "criu"
    binary = str(home / "bin" / "criu")
    if stamped(home):
        reason = complaint(binary)
        if reason:
            raise SetupError(f"{binary} {reason}; this kernel may lack what CRIU needs (see `woodfrog doctor`)")
        return None
    host = None if private else on_path("criu")
    if host and complaint(host) is None:
        return None
    require_apt(NEEDED)
    require_root("installing criu")
    if not private and candidate("criu") is None:
        # A fresh machine has no package lists at all.
        update_lists()
    if not private and offers(candidate("criu")):
        install(["criu"], prefix)
        host = on_path("criu")
        reason = complaint(host) if host else "is not on PATH"
        if host and reason is None:
            return host
        say("criu", f"the distribution's criu {reason}")
    if not patchelf.is_file():
        raise SetupError(f"{patchelf} is missing: run `make setup`, which installs it")
    build(home, str(patchelf))
    reason = complaint(binary)
    if reason:
        raise SetupError(f"{binary} {reason}; this kernel may lack what CRIU needs (see `woodfrog doctor`)")
    return binary


def main() -> int:
    parser = argparse.ArgumentParser(description=f"Make {NEEDED} available.")
    parser.add_argument("--prefix", type=Path, default=DEFAULT_PREFIX, help="criu goes to PREFIX/criu/bin/criu")
    parser.add_argument("--patchelf", type=Path, default=Path(".venv/bin/patchelf"))
    parser.add_argument("--private", action="store_true", help="use the private copy even if the host has a criu")
    options = parser.parse_args()
    try:
        binary = ensure(options.prefix.absolute(), options.patchelf.absolute(), options.private)
    except SetupError as error:
        Progress().finish()
        print(f"criu: {error}", file=sys.stderr)
        return 1
    if binary:
        version = version_of(binary) or ()
        say("criu", f"{'.'.join(map(str, version))} at {binary}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
