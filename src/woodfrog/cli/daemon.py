"""`woodfrog daemon …`: the one daemon of this machine and state directory."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from woodfrog import settings
from woodfrog.cli import output
from woodfrog.cli.remote import connect
from woodfrog.errors import DaemonError, HostError, WoodfrogError

if TYPE_CHECKING:
    from woodfrog.sdk.client import Client

app = typer.Typer(help="Start, stop and look after the daemon.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Timeout = Annotated[float, typer.Option(help="Seconds to wait until it has ended.")]


@app.command()
def start(as_json: Json = False) -> None:
    """Start the daemon, when none runs yet."""
    health = _health()
    fresh = health is None
    if health is None:
        with output.Progress(quiet=as_json) as progress:
            progress.say("starting the daemon")
            health = connect().health() or {}
    if as_json:
        output.show_json({"running": True, "started": fresh, **health})
    else:
        output.note(f"{'started' if fresh else 'already running'}: pid {health.get('pid')}, {health.get('state_dir')}")


def _client() -> Client:
    """For a daemon of any version: it may be there to be stopped."""
    from woodfrog.sdk.client import Client

    return Client(settings.load())


def _health() -> dict[str, Any] | None:
    """What the daemon says of itself; None when none runs."""
    return _client().look(any_protocol=True)


@app.command()
def stop(timeout: Timeout = 60.0, as_json: Json = False) -> None:
    """Stop the daemon. Deployed apps and finished results are kept; running calls may finish, containers end."""
    health = _health()
    if health is None:
        if as_json:
            output.show_json({"running": False, "stopped": False})
        else:
            output.note("the daemon is not running")
        return
    pid = health.get("pid")
    with output.Progress(quiet=as_json) as progress:
        _end(pid, timeout, progress)
    if as_json:
        output.show_json({"running": False, "stopped": True, "pid": pid})
    else:
        output.note(f"stopped: pid {pid}")


@app.command()
def restart(timeout: Timeout = 60.0, as_json: Json = False) -> None:
    """Stop the daemon and start one of the code and the settings that are here now; start one when none runs."""
    config = settings.load()
    if config.host:
        raise DaemonError(f"the daemon at {config.host} (WOODFROG_HOST) is restarted on its machine", code="no-daemon")
    if os.geteuid() != 0:
        raise HostError("restarting the daemon needs root: run `sudo woodfrog daemon restart`", code="not-root")
    old = _health()
    with output.Progress(quiet=as_json) as progress:
        if old is not None:
            _end(old.get("pid"), timeout, progress)
        progress.say("starting the daemon")
        health = connect().health() or {}
    if as_json:
        output.show_json({"running": True, "restarted": old is not None, **health})
    else:
        output.note(f"{'restarted' if old else 'started'}: pid {health.get('pid')}, {health.get('state_dir')}")


def _end(pid: Any, timeout: float, progress: output.Progress) -> None:
    """Have the daemon end, and wait for that.

    Raises:
        DaemonError: it takes longer than `timeout` seconds.
    """
    try:
        _client().request("POST", "/shutdown", reconnect_s=0.0)
    except DaemonError as e:
        # It may be gone before its answer is out.
        if e.code != "daemon-lost":
            raise
    begin = time.monotonic()
    while isinstance(pid, int) and Path(f"/proc/{pid}").exists() and not _is_zombie(pid):
        if time.monotonic() > begin + timeout:
            raise DaemonError(f"the daemon (pid {pid}) has not ended within {timeout:.0f} s", code="daemon-stuck")
        if time.monotonic() > begin + 1.0:
            progress.say("waiting for running calls and containers")
        time.sleep(0.05)


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except OSError:
        return True


@app.command()
def install(
    show: Annotated[bool, typer.Option("--print", help="Print the unit's file, and change nothing.")] = False,
) -> None:
    """Have systemd start the daemon, now and at every boot, with this program's WOODFROG_* variables."""
    from woodfrog.sdk import systemd
    from woodfrog.sdk.client import DAEMON, daemon_environ

    config = settings.load()
    text = systemd.unit_text(config, DAEMON)
    if show:
        sys.stdout.write(text)
        return
    unit, path = _service(config, "install")
    variables = systemd.environment_text(daemon_environ(config))
    with output.Progress() as progress:
        if (old := _health()) is not None:
            _end(old.get("pid"), 60.0, progress)
        progress.say(f"starting {unit}")
        config.home.mkdir(parents=True, exist_ok=True)
        _write(config.home / systemd.ENVIRONMENT, variables, 0o600)
        _write(path, text, 0o644)
        _systemctl("daemon-reload")
        _systemctl("enable", unit)
        health = connect().health() or {}
    output.note(f"installed {path}, with the variables in {config.home / systemd.ENVIRONMENT}: pid {health.get('pid')}")


@app.command()
def uninstall() -> None:
    """Stop the daemon and take it from systemd again. The state directory stays."""
    from woodfrog.sdk import systemd

    config = settings.load()
    unit, path = _service(config, "uninstall")
    if not path.exists():
        raise DaemonError(f"no {path}: nothing to uninstall", code="no-unit")
    _systemctl("disable", "--now", unit)
    path.unlink()
    (config.home / systemd.ENVIRONMENT).unlink(missing_ok=True)
    _systemctl("daemon-reload")
    output.note(f"removed {path}")


def _service(config: settings.Settings, verb: str) -> tuple[str, Path]:
    """The unit's name and file.

    Raises:
        HostError: systemd does not run here, or this is not root.
    """
    from woodfrog.sdk import systemd

    if os.geteuid() != 0:
        raise HostError(f"this needs root: run `sudo woodfrog daemon {verb}`", code="not-root")
    if config.host:
        raise DaemonError(f"the daemon at {config.host} (WOODFROG_HOST) is not this machine's", code="no-daemon")
    if not systemd.runs():
        raise HostError(
            "systemd does not run here: have this machine's init system run `woodfrogd`, which stays in the foreground",
            code="no-systemd",
        )
    return systemd.unit_name(config), systemd.unit_path(config)


def _write(path: Path, text: str, mode: int) -> None:
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode), "w") as file:
            os.fchmod(file.fileno(), mode)
            file.write(text)
    except OSError as e:
        raise HostError(f"{path}: {e.strerror}", code="no-unit") from None


def _systemctl(*arguments: str) -> None:
    done = subprocess.run(["systemctl", *arguments], capture_output=True, text=True, errors="replace")
    if done.returncode:
        why = " ".join(done.stderr.split())
        raise DaemonError(f"systemctl {' '.join(arguments)} failed: {why}", code="systemd")


@app.command()
def status(as_json: Json = False) -> None:
    """Tell whether the daemon runs. Exit status 3 when it does not."""
    from woodfrog.sdk.client import outdated

    health = _health()
    if health is None:
        if as_json:
            output.show_json({"running": False})
        else:
            output.note(f"the daemon is not running (state directory {settings.load().home})")
        raise typer.Exit(output.DAEMON_ERROR)
    if as_json:
        output.show_json({"running": True, **health})
    else:
        output.fields({"running": True, **health})
        if old := outdated(health):
            output.note(f"note: {old}")


@app.command()
def logs(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for more.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", help="Only the last so many; 0 = all.")] = 0,
) -> None:
    """Print the daemon's own log."""
    path = settings.load().home / "daemon.log"
    if elsewhere := _writes_elsewhere(path):
        output.note(f"note: {elsewhere}")
    try:
        with contextlib.ExitStack() as opened:
            file = opened.enter_context(path.open(errors="replace"))
            text = file.readlines()
            sys.stdout.writelines(text[-lines:] if lines > 0 else text)
            sys.stdout.flush()
            while follow:
                line = file.readline()
                if line:
                    sys.stdout.write(line)
                    sys.stdout.flush()
                elif not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):  # the daemon began another
                    sys.stdout.write(file.read())
                    opened.close()
                    file = opened.enter_context(path.open(errors="replace"))
                else:
                    time.sleep(0.2)
    except FileNotFoundError:
        raise DaemonError(f"no log at {path}: the daemon has not run here yet", code="no-daemon-log") from None
    except OSError as e:
        raise WoodfrogError(f"{path}: {e.strerror}", code="daemon-log") from None


def _writes_elsewhere(path: Path) -> str:
    """Whether the daemon that runs now writes its log to another place, as under an init system."""
    from woodfrog.sdk import systemd

    with contextlib.suppress(WoodfrogError, OSError):
        pid = (_health() or {}).get("pid")
        if isinstance(pid, int):
            target = os.stat(f"/proc/{pid}/fd/2")
            if not (path.exists() and os.path.samestat(target, os.stat(path))):
                unit = systemd.unit_of(Path(f"/proc/{pid}/cgroup").read_text())
                where = f"`journalctl -u {unit}` shows it" if unit else "ask what started it"
                return f"the daemon that runs (pid {pid}) does not write to {path}, which is an earlier one's: {where}"
    return ""
