"""What woodfrog is compared with: the same workload as a plain process (server.py), thawed by others' means.

Each peer is used as well as it can be: CRIU's cache of kernel features is there (else every start probes the kernel for
25 ms), it logs errors only, checks files by size, and its page server waits already when the clock starts; gVisor's
image is not compressed. Times are from the request to the answer, in milliseconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Protocol

from common import HERE, wait_until

from woodfrog.criu.binary import find_criu

PR_SET_CHILD_SUBREAPER = 36
COMMON = (
    "--unprivileged",
    "--no-default-config",
    "--manage-cgroups=ignore",
    "--network-lock", "skip",
    "--file-validation", "filesize",
)  # fmt: skip
"""`--unprivileged` is what makes CRIU look for its cache of kernel features in XDG_RUNTIME_DIR."""


class Peer(Protocol):
    def measure(self, request: int) -> tuple[float, Any]:
        """From nothing to the answer: milliseconds, and the answer."""

    def close(self) -> None: ...


def arguments(how: str, *more: str) -> list[str]:
    return [sys.executable, str(HERE / "server.py"), how, *more]


def ask(path: str, request: int) -> Any:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(120)
        connection.connect(path)
        with connection.makefile("rwb") as stream:
            return exchange(stream, stream, request)


def exchange(out: IO[bytes], stream: IO[bytes], request: int) -> Any:
    out.write(json.dumps(request).encode() + b"\n")
    out.flush()
    if not (line := stream.readline()):
        raise SystemExit("a peer ended instead of answering")
    return json.loads(line)


def done(command: list[str], env: dict[str, str] | None = None, log: Path | None = None) -> None:
    run = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if run.returncode:
        said = log.read_text(errors="replace") if log is not None and log.exists() else run.stdout + run.stderr
        raise SystemExit(f"{' '.join(command[:2])} ended with {run.returncode}:\n{said[-3000:]}")


class ForkServer:
    """A live parent with the workload loaded, which forks."""

    def __init__(self, cls: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="wfb-")
        self._path = str(Path(self._folder.name) / "fork.sock")
        self._process = subprocess.Popen(
            arguments("fork", cls, self._path),
            # OpenMP's threads do not survive a fork, and the child would wait for them for ever.
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"ready\n":
            raise SystemExit("the fork server did not start")

    def measure(self, request: int) -> tuple[float, Any]:
        begin = time.perf_counter()
        answer = ask(self._path, request)
        return (time.perf_counter() - begin) * 1e3, answer

    def close(self) -> None:
        with self._process:
            self._process.terminate()
        self._folder.cleanup()


class CriuImages:
    """A process with the workload loaded, dumped by `criu dump`, on the host and without a sandbox.

    Args:
        cls: the workload; None = the caller has a process of its own, and calls `dump`.
        under: where the images go.

    Attributes:
        dump_ms: how long the dump took, from exec to exit.
    """

    def __init__(self, criu: str, cls: str | None, under: str = "/var/tmp") -> None:
        self.criu = str(find_criu(Path(criu) if criu else None).path)
        # What criu restores must become a child of this process, which ends it and waits for its end.
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self.folder = Path(tempfile.mkdtemp(prefix="wfb-criu-", dir=under))
        self._cache = Path(tempfile.mkdtemp(prefix="wfb-criu-", dir="/dev/shm"))
        self.env = {"PATH": os.defpath + ":/usr/sbin:/sbin", "LC_ALL": "C", "XDG_RUNTIME_DIR": str(self._cache)}
        self.images, self.socket = self.folder / "img", str(self.folder / "one.sock")
        self.images.mkdir()
        try:
            self._fill_cache()
            self.dump_ms = self._dump(cls) if cls is not None else 0.0
        except BaseException:
            self.close()
            raise

    def _fill_cache(self) -> None:
        # Only a privileged CRIU looks for userfaultfd, and it keeps what it found in /run, and only on a tmpfs.
        script = 'mount -t tmpfs tmpfs /run && { "$0" check --no-default-config >/dev/null 2>&1; cat /run/criu.kdat; }'
        command = ["unshare", "--mount", "--propagation", "private", "/bin/sh", "-c", script, self.criu]
        found = subprocess.run(command, env=self.env, capture_output=True).stdout
        if not found:
            raise SystemExit("criu check left no cache of kernel features")
        (self._cache / "criu.kdat").write_bytes(found)

    def _dump(self, cls: str) -> float:
        process = subprocess.Popen(
            arguments("listen", cls, self.socket),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n" or process.stdout.read():
            raise SystemExit(f"{cls} did not start")
        return self.dump(process)

    def dump(self, process: subprocess.Popen[bytes]) -> float:
        """Dump a process that is ready for it, in a session of its own: milliseconds."""
        self.pid = process.pid
        begin = time.perf_counter()
        done(
            [self.criu, "dump", *COMMON, "--tree", str(self.pid), "--images-dir", str(self.images), "-v1",
             "--log-file", "dump.log"],
            self.env, self.images / "dump.log",
        )  # fmt: skip
        ms = (time.perf_counter() - begin) * 1e3
        process.wait()
        return ms

    @property
    def bytes(self) -> int:
        return sum(p.stat().st_size for p in self.images.glob("pages-*.img"))

    def thaw(self, work: Path, *options: str) -> None:
        done(
            [self.criu, "restore", *COMMON, "--restore-detached", "--images-dir", str(self.images),
             "--work-dir", str(work), "-v1", "--log-file", "restore.log", *options],
            self.env, work / "restore.log",
        )  # fmt: skip

    def end(self) -> None:
        """Kill what was restored, if anything was."""
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self.pid, signal.SIGKILL)
            gone = lambda: os.waitpid(self.pid, os.WNOHANG)[0]  # noqa: E731
            wait_until(gone, f"process {self.pid} cannot be killed", 30)

    def restore(self, request: int, work: Path, *options: str) -> tuple[float, Any]:
        Path(self.socket).unlink(missing_ok=True)
        begin = time.perf_counter()
        try:
            self.thaw(work, *options)
            answer = ask(self.socket, request)
            return (time.perf_counter() - begin) * 1e3, answer
        finally:
            self.end()

    @contextlib.contextmanager
    def lazy_server(self, work: str) -> Iterator[None]:
        """CRIU's own page server, which listens already when this is entered."""
        command = [self.criu, "lazy-pages", *COMMON[:2], "--images-dir", str(self.images), "--work-dir", work,
                   "-v1", "--log-file", "lazy.log"]  # fmt: skip
        server = subprocess.Popen(command, env=self.env, stdin=subprocess.DEVNULL)
        try:
            wait_until(lambda: (Path(work) / "lazy-pages.socket").exists(), "criu lazy-pages does not listen", 20)
            time.sleep(0.02)  # between bind and listen
            yield
        finally:
            server.kill()
            server.wait()

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(self._cache, ignore_errors=True)


class CriuRestore:
    """`criu restore`: all memory is read before the process runs."""

    def __init__(self, images: CriuImages) -> None:
        self._images = images

    def measure(self, request: int) -> tuple[float, Any]:
        with tempfile.TemporaryDirectory(dir=self._images.folder) as work:
            return self._images.restore(request, Path(work))

    def close(self) -> None:
        self._images.close()


class CriuLazy:
    """`criu restore --lazy-pages` with CRIU's own daemon, which listens already when the clock starts."""

    def __init__(self, images: CriuImages) -> None:
        self._images = images

    def measure(self, request: int) -> tuple[float, Any]:
        images = self._images
        with tempfile.TemporaryDirectory(dir=images.folder) as work, images.lazy_server(work):
            return images.restore(request, Path(work), "--lazy-pages")

    def close(self) -> None:
        pass  # the images are the other one's


class Runsc:
    """gVisor's `runsc restore`, without a network. The request waits in its standard input."""

    def __init__(self, runsc: str, platform: str, cls: str) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="wfb-runsc-", dir="/var/tmp"))
        self._image = self._folder / "image"
        self._image.mkdir()
        self._base = [runsc, "--root", str(self._folder / "state"), "--platform", platform, "--network=none",
                      "--ignore-cgroups", "--overlay2=none"]  # fmt: skip
        self._count = 0
        config = {
            "ociVersion": "1.0.0",
            "process": {
                "user": {"uid": 0, "gid": 0},
                "args": arguments("stdio", cls),
                "env": [f"PATH={os.defpath}", "HF_HUB_OFFLINE=1"],
                "cwd": "/",
            },
            "root": {"path": "/", "readonly": True},
            "mounts": [
                {"destination": "/proc", "type": "proc"},
                {"destination": "/dev", "type": "tmpfs"},
                {"destination": "/sys", "type": "sysfs"},
                {"destination": "/tmp", "type": "tmpfs"},
            ],
            "linux": {"namespaces": [{"type": n} for n in ("pid", "network", "ipc", "uts", "mount")]},
        }
        (self._folder / "config.json").write_text(json.dumps(config))
        try:
            self._checkpoint()
        except BaseException:
            self.close()
            raise

    def _start(self, verb: str, *options: str) -> tuple[str, subprocess.Popen[bytes]]:
        self._count += 1
        name = f"wfb-{os.getpid()}-{self._count}"
        with open(self._folder / "errors", "wb") as errors:
            process = subprocess.Popen(
                [*self._base, verb, *options, "--bundle", str(self._folder), name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        return name, process

    def _checkpoint(self) -> None:
        name, process = self._start("run")
        assert process.stdout is not None and process.stdin is not None
        with process:
            if process.stdout.readline() != b"ready\n":
                raise SystemExit(f"runsc run failed: {(self._folder / 'errors').read_text()[-2000:]}")
            # Older versions know no other image than a compressed one.
            options = ("--image-path", str(self._image))
            newer = subprocess.run([*self._base, "checkpoint", "--compression=none", *options, name])
            if newer.returncode:
                done([*self._base, "checkpoint", *options, name])
        self._delete(name)

    def _delete(self, name: str) -> None:
        subprocess.run([*self._base, "delete", "-force", name], capture_output=True)

    def measure(self, request: int) -> tuple[float, Any]:
        begin = time.perf_counter()
        name, process = self._start("restore", "--image-path", str(self._image))
        assert process.stdout is not None and process.stdin is not None
        try:
            answer = exchange(process.stdin, process.stdout, request)
            return (time.perf_counter() - begin) * 1e3, answer
        finally:
            subprocess.run([*self._base, "kill", name, "KILL"], capture_output=True)
            process.communicate()
            self._delete(name)

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


def runsc_version(runsc: str) -> str:
    return subprocess.run([runsc, "--version"], capture_output=True, text=True).stdout.split("\n")[0].split()[-1]
