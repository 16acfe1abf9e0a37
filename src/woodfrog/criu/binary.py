"""Which criu to use, and whether it is new enough."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from woodfrog.errors import HostError

__all__ = ["OLDEST", "PRIVATE", "Criu", "find_criu", "parse_version"]

OLDEST = (4, 1)
"""3.x does not start on kernels from 6.13 on."""
PRIVATE = Path("/usr/local/lib/woodfrog/criu/bin/criu")
"""Where `make setup` puts a criu when the distribution's is too old."""
REMEDY = f"install CRIU {OLDEST[0]}.{OLDEST[1]} or newer, or run `make setup`; WOODFROG_CRIU names one elsewhere"
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Criu:
    """A usable criu binary."""

    path: Path
    version: tuple[int, int, int]

    @property
    def name(self) -> str:
        """The version as text: `4.1.1`."""
        return ".".join(map(str, self.version))


def parse_version(text: str) -> tuple[int, int, int] | None:
    """Read the output of `criu --version`.

    >>> parse_version("Version: 4.2\\nGitID: v4.2")
    (4, 2, 0)
    """
    match = re.search(r"Version:\s*(\d+)\.(\d+)(?:\.(\d+))?", text)
    return (int(match[1]), int(match[2]), int(match[3] or 0)) if match else None


def _ask(path: Path) -> Criu:
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as e:
        reason = e.strerror if isinstance(e, OSError) else "does not answer"
        raise HostError(f"{path} cannot be run ({reason}): {REMEDY}", code="criu-missing", path=str(path)) from None
    version = parse_version(done.stdout)
    if version is None:
        complaint = (done.stderr or done.stdout).strip().splitlines()
        raise HostError(
            f"{path} does not start ({complaint[-1] if complaint else f'exit status {done.returncode}'}): {REMEDY}",
            code="criu-missing",
            path=str(path),
        )
    if version[:2] < OLDEST:
        found = ".".join(map(str, version))
        raise HostError(
            f"{path} is CRIU {found}, too old: {REMEDY}", code="criu-too-old", path=str(path), version=list(version)
        )
    return Criu(path, version)


def find_criu(explicit: Path | None = None) -> Criu:
    """Find a criu that starts and is new enough.

    Args:
        explicit: the one to use and no other (setting `criu`); None looks at the private prefix, then on PATH.

    Raises:
        HostError: code `criu-missing` or `criu-too-old`, with the remedy.
    """
    if explicit is not None:
        return _ask(explicit)
    on_path = shutil.which("criu", path=f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}")
    places = [PRIVATE, *([Path(on_path)] if on_path else [])]
    first: HostError | None = None
    for place in places:
        if place.is_file():
            try:
                return _ask(place)
            except HostError as e:
                first = first or e
    raise first or HostError(f"criu was not found: {REMEDY}", code="criu-missing")
