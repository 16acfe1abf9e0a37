"""The daemon as a service: the unit's file, and who starts the daemon where systemd runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fake_daemon import private_home
from woodfrog.cli import commands
from woodfrog.daemon.__main__ import _tell_ready
from woodfrog.errors import DaemonError, SpecError
from woodfrog.sdk import client as module
from woodfrog.sdk import systemd
from woodfrog.sdk.client import Client, start_daemon
from woodfrog.settings import Settings

FAKE = """#!{python}
import json, os, subprocess, sys
from pathlib import Path
here = Path({here!r})
with open(here / "calls", "a") as f:
    f.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
if (here / "refuse").exists():
    sys.exit("Job failed. See \\"journalctl -xe\\" for details.")
if "start" in sys.argv:
    code = "import sys, time; sys.path.insert(0, {tests!r}); from unit.fake_daemon import FakeDaemon; "
    code += "from pathlib import Path; FakeDaemon(Path({home!r})); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    (here / "pid").write_text(str(process.pid))
elif "--" in sys.argv:
    command = sys.argv[sys.argv.index("--") + 1:]
    os.execvp(command[0], command)
"""


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with private_home(monkeypatch) as path:
        yield path


@pytest.fixture
def machine(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """One on which systemd seems to run."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "units").mkdir()
    for name in ("systemctl", "systemd-run"):
        tests = str(Path(__file__).parents[1])
        text = FAKE.format(python=sys.executable, here=str(tmp_path), home=str(home), tests=tests)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(systemd, "UNITS", tmp_path / "units")
    monkeypatch.setattr(systemd, "_BOOTED", tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    yield tmp_path
    if (tmp_path / "pid").exists():
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


def calls(machine: Path) -> list[list[str]]:
    path = machine / "calls"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    path.unlink(missing_ok=True)
    return found


def run(*argv: str) -> Result:
    return CliRunner().invoke(commands.app, list(argv))


@pytest.mark.parametrize("home", ["/var/lib/woodfrog", "/srv/my 100% frog"])
def test_the_unit_s_file(home: str, tmp_path: Path) -> None:
    settings = Settings(home=Path(home))
    text = systemd.unit_text(settings, [sys.executable, "-P", "-m", "woodfrog.daemon", 'a "$b"'])
    assert f'ExecStart={sys.executable} -P -m woodfrog.daemon "a \\"$$b\\""\n' in text
    assert f"EnvironmentFile={home.replace('%', '%%')}/service.env\n" in text
    for line in ("Type=notify", "KillMode=process", "Delegate=yes", "Restart=on-failure", "WantedBy=multi-user.target"):
        assert f"\n{line}\n" in text
    patience = re.search(r"^TimeoutStartSec=(\d+)$", text, re.MULTILINE)
    assert patience and int(patience[1]) > module.START_S >= 120, "systemd ends no daemon that a client still waits for"
    name = systemd.unit_name(settings)
    assert name == "woodfrogd.service" if home == "/var/lib/woodfrog" else name == f"woodfrogd-{settings.tag}.service"
    if shutil.which("systemd-analyze"):
        (tmp_path / name).write_text(text)
        done = subprocess.run(["systemd-analyze", "verify", tmp_path / name], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


def test_the_environment_s_file() -> None:
    text = systemd.environment_text({"B": 'a "b" \\ $c `d` %e', "A": ""})
    assert text == 'A=""\nB="a \\"b\\" \\\\ \\$c \\`d\\` %e"\n'
    with pytest.raises(SpecError, match="WOODFROG_X has more than one line"):
        systemd.environment_text({"WOODFROG_X": "a\nb"})


def test_the_service_that_a_process_belongs_to() -> None:
    for groups in ("0::/system.slice/web.service\n", "4:pids:/x\n1:name=systemd:/system.slice/web.service\n"):
        assert systemd.unit_of(groups) == "web.service"
    assert systemd.unit_of("0::/system.slice/web.service/woodfrog-daemon\n") == "web.service"
    for groups in ("0::/system.slice/run-r1.scope\n", "0::/\n", "4:pids:/web.service\n", ""):
        assert systemd.unit_of(groups) == ""


def test_a_daemon_is_no_part_of_its_client_s_service(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = systemd.apart()
    assert Path(prefix[0]).name == "systemd-run" and "--scope" in prefix and prefix[-1] == "--"
    assert calls(machine)[0][-1] == "true"
    monkeypatch.setattr(module, "DAEMON", [sys.executable, "-c", "raise SystemExit('started')"])
    with pytest.raises(DaemonError, match=r"ended with status 1 while starting(.|\n)*started"):
        start_daemon(Client(Settings(home=machine / "state")))
    assert calls(machine)[-1][-3:] == module.DAEMON
    # Where systemd-run does not work (a container without its bus), the daemon is a child as ever.
    (machine / "refuse").touch()
    assert systemd.apart() == []
    monkeypatch.setattr(systemd, "_BOOTED", machine / "none")
    (machine / "refuse").unlink()
    calls(machine)
    assert systemd.apart() == [] and calls(machine) == []


def test_install_and_uninstall(machine: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WOODFROG_TOKEN", "sesame-4711")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "sesame-4712")
    unit = systemd.unit_name(Settings(home=home))
    path = machine / "units" / unit
    shown = run("daemon", "install", "--print")
    assert "[Service]" in shown.stdout and not path.exists() and calls(machine) == []
    done = run("daemon", "install")
    assert done.exit_code == 0 and f"installed {path}" in done.stderr, done.output
    assert [c[1:] for c in calls(machine)] == [["daemon-reload"], ["enable", unit], ["start", unit]]
    assert path.read_text() == shown.stdout and path.stat().st_mode & 0o777 == 0o644 and "sesame" not in shown.stdout
    variables = home / "service.env"
    assert variables.stat().st_mode & 0o777 == 0o600
    assert f'WOODFROG_HOME="{home}"\nWOODFROG_TOKEN="sesame-4711"\n' in variables.read_text()
    assert "4712" not in variables.read_text()
    done = run("daemon", "uninstall")
    assert done.exit_code == 0 and [c[1:] for c in calls(machine)] == [["disable", "--now", unit], ["daemon-reload"]]
    assert not path.exists() and not variables.exists()
    assert "nothing to uninstall" in run("daemon", "uninstall").stderr


def test_a_service_that_does_not_start(machine: Path, home: Path) -> None:
    settings = Settings(home=home)
    systemd.unit_path(settings).touch()
    (machine / "refuse").touch()
    said = rf"{systemd.unit_name(settings)} did not start: Job failed.*; `journalctl -u {systemd.unit_name(settings)}`"
    with pytest.raises(DaemonError, match=said):
        start_daemon(Client(settings))


def test_install_without_systemd_or_root(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systemd, "_BOOTED", home / "none")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    refused = run("daemon", "install")
    assert refused.exit_code == 4 and "systemd does not run here" in refused.stderr
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "sudo woodfrog daemon uninstall" in run("daemon", "uninstall").stderr


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told_when_the_daemon_is_ready(
    abstract: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"woodfrog-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
        s.bind(f"\0{name}" if abstract else name)
        s.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}" if abstract else name)
        _tell_ready()
        assert s.recv(100) == b"READY=1" and "NOTIFY_SOCKET" not in os.environ
    _tell_ready()
