"""systemd, where it runs: the daemon as a service of its own, and never as a part of the one that needed it first."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from woodfrog.errors import SpecError
from woodfrog.settings import Settings

__all__ = ["apart", "environment_text", "installed", "runs", "unit_name", "unit_of", "unit_path", "unit_text"]

UNITS = Path("/etc/systemd/system")
_BOOTED = Path("/run/systemd/system")
ENVIRONMENT = "service.env"
"""In the state directory, mode 0600: what a unit says, every user of the machine can read."""


def runs() -> bool:
    """Whether systemd is this machine's init system."""
    return _BOOTED.is_dir() and shutil.which("systemctl") is not None


def unit_name(settings: Settings) -> str:
    """The service of one state directory."""
    return "woodfrogd.service" if settings.home == Settings.home else f"woodfrogd-{settings.tag}.service"


def unit_path(settings: Settings) -> Path:
    return UNITS / unit_name(settings)


def installed(settings: Settings) -> bool:
    return runs() and unit_path(settings).exists()


def _quoted(word: str) -> str:
    escaped = re.sub(r'(["\\])', r"\\\1", word).replace("%", "%%").replace("$", "$$")
    return word if re.fullmatch(r"[\w./:=@,+-]+", word) else f'"{escaped}"'


def unit_text(settings: Settings, command: Sequence[str]) -> str:
    """The unit's file."""
    home = str(settings.home).replace("%", "%%")
    return f"""\
[Unit]
Description=woodfrog: functions thawed from memory snapshots
Wants=network-online.target
After=network-online.target
RequiresMountsFor={_quoted(str(settings.home))}

[Service]
Type=notify
ExecStart={" ".join(map(_quoted, command))}
EnvironmentFile={home}/{ENVIRONMENT}
WorkingDirectory=/
# The daemon alone is killed. Its containers end with it, and its page server three seconds later: were that killed
# with it, they would find zeroes in their memory for as long as they have not ended.
KillMode=process
TimeoutStartSec=150
TimeoutStopSec=60
Restart=on-failure
RestartSec=1
# Keeps the cpu, memory and pids controllers on; the daemon makes its containers' groups in /sys/fs/cgroup/woodfrog.
Delegate=yes

[Install]
WantedBy=multi-user.target
"""


def environment_text(environ: Mapping[str, str]) -> str:
    """The file with the daemon's environment.

    Raises:
        SpecError: a value that such a file cannot hold.
    """
    lines = []
    for name, value in sorted(environ.items()):
        if "\n" in value:
            raise SpecError(f"{name} has more than one line: systemd takes no such variable", code="bad-setting")
        escaped = re.sub(r'(["\\`$])', r"\\\1", value)
        lines.append(f'{name}="{escaped}"\n')
    return "".join(lines)


def apart() -> list[str]:
    """What a command is begun with so that it is no part of this process's service: systemd ends all of a service, and
    would end the daemon and its containers with it. Empty where systemd does not run, or gives no scope."""
    tool = shutil.which("systemd-run")
    if tool is None or not runs():
        return []
    prefix = [tool, "--scope", "--quiet", "--collect", "--description=woodfrog's daemon", "--"]
    try:
        done = subprocess.run([*prefix, "true"], capture_output=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return prefix if done.returncode == 0 else []


def unit_of(groups: str) -> str:
    """The service that a process belongs to, from its `/proc/<pid>/cgroup`; empty when to none."""
    found = re.search(r"^(?:0:|\d+:name=systemd):.*/([^/\n]+\.service)(?:/woodfrog-daemon)?$", groups, re.MULTILINE)
    return found.group(1) if found else ""
