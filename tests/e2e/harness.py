"""A private daemon for end-to-end tests, the CLI as a user runs it, and a look at what is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from e2e.forks import forks
from woodfrog.errors import WoodfrogError
from woodfrog.sdk.client import Client, error_from_answer
from woodfrog.settings import Settings

BIN = Path(sys.executable).parent
WOODFROG: Sequence[str] = (str(BIN / "woodfrog"),)
if not Path(WOODFROG[0]).exists():  # a package that lies in PYTHONPATH has no programs
    WOODFROG = (sys.executable, "-c", "from woodfrog.cli import main; main()")
FORKS = len(WOODFROG) == 1 and os.environ.get("WOODFROG_EXEC") != "1"
"""Whether `Daemon.cli` forks a process in which the program is loaded, instead of starting it each time."""


def until(condition: Callable[[], Any], seconds: float = 30, every: float = 0.05) -> Any:
    """The first true value of `condition`."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {getattr(condition, '__doc__', '') or condition}"
        time.sleep(every)
    return found


class Daemon:
    """One woodfrogd with a state directory of its own.

    Example:
        with Daemon() as daemon:
            done = daemon.cli("run", str(program))
    """

    def __init__(self, *, under: str | Path = "/var/tmp", **env: str) -> None:
        # Short: a Unix socket's path may have 107 bytes.
        self.home = Path(tempfile.mkdtemp(prefix="wf-", dir=under))
        os.chmod(self.home, 0o755)
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith("WOODFROG_")},
            "WOODFROG_HOME": str(self.home),
            "NO_COLOR": "1",
            "COLUMNS": "160",
            **env,
        }
        self.settings = Settings(home=self.home)
        self.command: Sequence[str] = (sys.executable, "-m", "woodfrog.daemon")
        """What `start` runs; it must end up as the daemon, under the same pid."""
        self.process: subprocess.Popen[bytes] | None = None
        self.log = self.home / "test-daemon.log"
        self._client: Client | None = None

    def start(self, **env: str) -> Daemon:
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self.command,
                env={**self.env, **env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + 60
        client = Client(self.settings)
        try:
            # A daemon that was killed left its socket behind.
            while (client.health(timeout=1.0) or {}).get("pid") != self.process.pid:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(f"the daemon did not start:\n{self.log.read_text()[-4000:]}")
                time.sleep(0.02)
        except BaseException:
            self.stop()
            raise
        finally:
            client.close()
        return self

    def kill(self) -> None:
        """`kill -9`, as the kernel would."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                raise AssertionError(f"the daemon did not stop:\n{self.log.read_text()[-4000:]}") from None

    def __enter__(self) -> Daemon:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        try:
            self.stop()
        finally:
            shutil.rmtree(self.home, ignore_errors=True)
            shutil.rmtree(self.settings.kdat_dir.parent, ignore_errors=True)

    # The CLI

    def cli(
        self, *args: str, timeout: float = 180, check: bool = True, env: Mapping[str, str] | None = None, **kwargs: Any
    ) -> subprocess.CompletedProcess[str]:
        environ = {**self.env, **(env or {})}
        if FORKS and kwargs.keys() <= {"cwd", "input"} and (ready := forks(WOODFROG[0])).fits(environ):
            given = {"cwd": kwargs.get("cwd"), "input": kwargs.get("input")}
            done = ready.run(args, env=environ, timeout=timeout, **given)
        else:
            done = subprocess.run(
                [*WOODFROG, *args], env=environ, capture_output=True, text=True, timeout=timeout, **kwargs
            )
        if check and done.returncode:
            raise AssertionError(
                f"woodfrog {' '.join(args)} -> {done.returncode}\n{done.stdout}\n{done.stderr}\n"
                f"daemon:\n{self.log.read_text()[-4000:]}"
            )
        return done

    def json(self, *args: str) -> Any:
        return json.loads(self.cli(*args, "--json").stdout)

    def program(self, text: str, name: str = "program.py") -> Path:
        """A user's program in a directory of its own."""
        folder = Path(tempfile.mkdtemp(prefix="src-", dir=self.home))
        os.chmod(folder, 0o755)
        path = folder / name
        path.write_text(text)
        return path

    # The API, without the price of a process

    def get(self, path: str, **params: Any) -> Any:
        """A JSON answer of the API."""
        self._client = self._client or Client(self.settings, reconnect_s=5)
        return self._client.request("GET", path, params=params).json()

    def call(self, app: str, tag: str, *, timeout: float = 60, **arguments: Any) -> Any:
        """A call with JSON arguments, without the price of a process.

        Raises:
            WoodfrogError: the call did not come to an answer.
            AssertionError: the function raised; with its traceback.
        """
        self._client = self._client or Client(self.settings, reconnect_s=5)
        reply = self._client.request(
            "POST",
            f"/apps/{app}/calls/{tag}",
            data=arguments,
            headers={"Woodfrog-Call": uuid.uuid4().hex},
            wait=timeout,
        )
        body = reply.body.getvalue()
        match reply.headers["woodfrog-status"]:
            case "success":
                return json.loads(body)
            case "exception":
                raise AssertionError(body.decode())
            case status:
                raise error_from_answer(json.loads(body or b"null"), f"{app}.{tag}: {status} after {timeout} s")

    def app_log(self, app: str) -> list[dict[str, Any]]:
        """An app's log so far."""
        self._client = self._client or Client(self.settings, reconnect_s=5)
        return list(self._client.logs(app))

    def app_text(self, app: str) -> str:
        return "\n".join(entry["line"] for entry in self.app_log(app))

    def snapshots(self, app: str, state: str = "ready") -> list[str]:
        """Ids of an app's snapshots in that state, oldest first."""
        found = [s for s in self.get("/snapshots")["snapshots"] if s.get("app") == app and s["state"] == state]
        return [s["id"] for s in sorted(found, key=lambda s: s["created"])]

    def kept(self) -> list[dict[str, Any]]:
        """A row of `store stats` for each snapshot, without the price of a process."""
        return list(self.get("/store")["snapshots"])

    def wait_snapshot(self, app: str, *, other_than: Sequence[str] = (), seconds: float = 30) -> str:
        """The newest usable snapshot of an app, as soon as there is one."""
        return until(lambda: next((s for s in reversed(self.snapshots(app)) if s not in other_than), None), seconds)

    def last_phases(self) -> list[str]:
        """Names of the phases of the newest call: they outlive its container."""
        (call,) = self.get("/calls", limit="1")["calls"]
        return [p["name"] for p in self.get(f"/calls/{call['id']}/trace")["phases"]]

    # What is left behind

    def inits(self) -> list[int]:
        """Host pids of this daemon's sandboxes: those in its cgroups."""
        found: set[int] = set()
        for group in self.cgroups():
            with contextlib.suppress(FileNotFoundError):
                found.update(map(int, (group / "cgroup.procs").read_text().split()))
        return sorted(found)

    def page_server(self) -> int | None:
        """Host pid of the daemon's page server, once something was thawed through it."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        found = [int(c) for c in children if Path(f"/proc/{c}/comm").read_text().startswith("woodfrog-pages")]
        return found[0] if found else None

    def cgroups(self) -> list[Path]:
        tag = self.settings.tag
        while True:
            with contextlib.suppress(FileNotFoundError):  # one went while it was looked at
                return [p for p in Path("/sys/fs/cgroup").glob(f"**/woodfrog/{tag}-*") if p.is_dir()]

    def mounts(self) -> list[str]:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        return [line for line in lines if str(self.home) in line]

    def leaks(self) -> dict[str, list[Any]]:
        """Processes, cgroups and mounts of this daemon's that exist now; {} when it is clean."""
        found: dict[str, list[Any]] = {
            "processes": self.inits(),
            "cgroups": [str(p) for p in self.cgroups()],
            "mounts": self.mounts(),
        }
        return {k: v for k, v in found.items() if v}

    def scale_to_zero(self) -> None:
        """Stop all containers, without waiting for what makes them stop by themselves."""
        for container in self.get("/containers")["containers"]:
            with contextlib.suppress(WoodfrogError):  # it ended meanwhile
                self._client.request("POST", f"/containers/{container['id']}/stop")  # type: ignore[union-attr]
        self.wait_idle()

    def wait_idle(self, seconds: float = 60) -> None:
        """Until no container is left."""
        deadline = time.monotonic() + seconds
        while containers := self.get("/containers")["containers"]:
            assert time.monotonic() < deadline, containers
            time.sleep(0.1)
