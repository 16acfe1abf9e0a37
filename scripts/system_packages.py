"""Install the distribution's packages that woodfrog needs, and remember which ones were not there before.

The record, one package a line, is what `make clean-machine` may remove again. Standard library only: this runs before
there is a virtual environment.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

DEFAULT_PREFIX = Path("/usr/local/lib/woodfrog")
RECORD = "installed-packages"
QUIET_APT = {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}


class SetupError(Exception):
    """One line for the person who runs the set-up: what is wrong, and what to do."""


def say(step: str, text: str) -> None:
    print(f"{step}: {text}", flush=True)


def run(command: list[str]) -> str:
    """Run a command that must succeed and return what it printed; the end of its complaint goes into the error."""
    done = subprocess.run(
        command, env=os.environ | QUIET_APT, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )
    if done.returncode != 0:
        tail = " / ".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-3:])
        raise SetupError(f"`{' '.join(command[:4])} …` failed ({done.returncode}): {tail}")
    return done.stdout


def on_path(program: str) -> str | None:
    """Find a program also where an unprivileged shell does not look."""
    path = os.environ.get("PATH", os.defpath)
    return shutil.which(program, path=f"{path}:/usr/local/sbin:/usr/sbin:/sbin")


def require_root(what: str) -> None:
    if os.geteuid() != 0:
        raise SetupError(f"{what} needs root: run make as root (sudo make …)")


def require_apt(what: str) -> None:
    if not shutil.which("apt-get"):
        raise SetupError(f"{what} is missing and this system has no apt-get: install it by hand")


def installed(packages: list[str]) -> set[str]:
    done = subprocess.run(
        ["dpkg-query", "-W", "-f", "${db:Status-Abbrev}\t${Package}\n", *packages],
        capture_output=True,
        text=True,
    )
    rows = (line.split("\t") for line in done.stdout.splitlines())
    return {name for status, name in rows if status.startswith("ii")}


def candidate(package: str) -> str | None:
    """Return the version that apt would install from the configured sources."""
    for line in run(["apt-cache", "policy", package]).splitlines():
        key, _, value = line.strip().partition(": ")
        if key == "Candidate":
            return None if value == "(none)" else value
    return None


def update_lists() -> None:
    say("apt", "update the package lists")
    run(["apt-get", "update", "-q"])


def install(packages: list[str], prefix: Path) -> None:
    """Install packages, writing the names of all that come in new to the record first."""
    command = ["apt-get", "install", "-y", "-q", "--no-install-recommends", "--no-upgrade", *packages]
    try:
        plan = run([*command, "--simulate"])
    except SetupError:
        # A fresh machine has no lists, an old one has lists that name versions no longer there.
        update_lists()
        plan = run([*command, "--simulate"])
    coming = [line.split()[1].split(":")[0] for line in plan.splitlines() if line.startswith("Inst ")]
    new = sorted(set(coming) - installed(coming)) if coming else []
    remember(new, prefix)
    say("apt", f"install {' '.join(packages)}")
    try:
        run(command)
    except SetupError:
        update_lists()
        run(command)


def remember(packages: list[str], prefix: Path) -> None:
    record = prefix / RECORD
    known = set(recorded(prefix))
    fresh = [name for name in packages if name not in known]
    if fresh:
        prefix.mkdir(parents=True, exist_ok=True)
        with record.open("a") as file:
            file.writelines(f"{name}\n" for name in fresh)


def recorded(prefix: Path) -> list[str]:
    try:
        return (prefix / RECORD).read_text().split()
    except FileNotFoundError:
        return []


def venv_works(python: str) -> bool:
    command = [python, "-c", "import venv, ensurepip"]
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def missing(python: str) -> list[str]:
    """Name the packages whose programs are not there; a program of the user's own will do as well."""
    wanted = []
    if not on_path("ip"):
        wanted.append("iproute2")
    if not on_path("nft"):
        wanted.append("nftables")
    if not any(on_path(name) for name in ("cc", "gcc", "clang")):
        wanted += ["gcc", "libc6-dev"]
    if not venv_works(python):
        wanted.append("python3-venv")
    return wanted


def main() -> int:
    parser = argparse.ArgumentParser(description="Install the system packages that woodfrog needs.")
    parser.add_argument("--prefix", type=Path, default=DEFAULT_PREFIX, help="where the record is kept")
    parser.add_argument("--python", default=sys.executable, help="the interpreter the virtual environment is made of")
    options = parser.parse_args()
    try:
        wanted = missing(options.python)
        if wanted:
            require_apt(wanted[0])
            require_root(f"installing {' '.join(wanted)}")
            install(wanted, options.prefix)
            still = missing(options.python)
            if still:
                raise SetupError(f"{' '.join(still)} is installed, but {options.python} or PATH does not find it")
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
