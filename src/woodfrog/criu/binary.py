"""Which criu to use, and whether it is new enough."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

from woodfrog.errors import HostError

__all__ = ["OLDEST", "PRIVATE", "Criu", "authenticates", "find_criu", "parse_version", "restorer_signs"]

OLDEST = (4, 1)
"""3.x does not start on kernels from 6.13 on."""
PRIVATE = Path("/usr/local/lib/woodfrog/criu/bin/criu")
"""Where `make setup` puts a criu when the distribution's is too old."""
REMEDY = f"install CRIU {OLDEST[0]}.{OLDEST[1]} or newer, or run `make setup`; WOODFROG_CRIU names one elsewhere"
_AARCH64, _PROGBITS, _ALLOC, _CODE = 183, 1, 2, 4
_PACIASP = re.compile(rb"[\x3f\x7f]\x23\x03\xd5")
"""The instructions that sign a return address."""
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Criu:
    """A usable criu binary."""

    path: Path
    version: tuple[int, int, int]
    signs: bool = False
    """It cannot be relied on to restore on this processor: see `restorer_signs`."""

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
    return Criu(path, version, authenticates(Path("/proc/cpuinfo").read_text()) and restorer_signs(path))


def authenticates(cpuinfo: str) -> bool:
    """Whether the processor authenticates pointers (arm64), and the kernel lets programs use it.

    >>> authenticates("Features\\t: fp asimd paca pacg\\n")
    True
    """
    return any(line.startswith("Features") and "paca" in line.split() for line in cpuinfo.splitlines())


def restorer_signs(path: Path) -> bool:
    """Whether the code that CRIU has a task restore itself with was built to sign its return addresses (arm64).

    While it runs, CRIU gives the task its own keys again. Where it then returns from a function, the signature is
    wrong: the task stops, and CRIU waits for ever, about every second time. Debian 13's is built so. The code is data
    to the binary that carries it.
    """
    try:
        data = path.read_bytes()
        if data[:6] != b"\x7fELF\2\1" or struct.unpack_from("<H", data, 18)[0] != _AARCH64:
            return False
        (table,) = struct.unpack_from("<Q", data, 40)
        size, count = struct.unpack_from("<HH", data, 58)
        for at in range(table, table + size * count, size):
            _, kind, flags, _, begin, length = struct.unpack_from("<IIQQQQ", data, at)
            if kind == _PROGBITS and flags & _ALLOC and not flags & _CODE:
                body = data[begin : begin + length]
                if any(found.start() % 4 == 0 for found in _PACIASP.finditer(body)):
                    return True
    except (OSError, struct.error, ValueError):
        pass  # a script, or what nobody can read: CRIU itself will tell
    return False


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
