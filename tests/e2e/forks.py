"""Command lines without the price of an interpreter's start: forks of a process that has loaded what all commands load.

Half a second of processor for each of hundreds would be a good part of the suite's time. A fork runs the installed
program itself, as a process of its own; only the libraries that every command needs, and its client, are there already.
"""

from __future__ import annotations

import array
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

_STARTS = ("PYTHON", "LD_", "LC_", "LANG", "TZ", "HOME", "VIRTUAL_ENV", "SSL_", "OPENSSL")
"""Beginnings of the names of variables that matter to an interpreter's start, or to what is loaded."""


def _matters(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name.startswith(_STARTS)}


class Forks:
    """The process that is forked, as long as this one lives."""

    def __init__(self, program: Path) -> None:
        self._environ = _matters(os.environ)
        self._folder = tempfile.TemporaryDirectory(prefix="wf-forks-", dir="/var/tmp")
        address = f"{self._folder.name}/socket"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen(64)
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(program), str(listener.fileno())],
                pass_fds=[listener.fileno()],
                stdin=subprocess.PIPE,  # its end is the end of the process
                stdout=subprocess.DEVNULL,
                cwd="/",
            )
        self._address = address

    def fits(self, environ: Mapping[str, str]) -> bool:
        """Whether an interpreter that starts with these variables would be no different from the one to be forked."""
        return _matters(environ) == self._environ

    def run(
        self,
        arguments: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: str | os.PathLike[str] | None,
        input: str | None,
        timeout: float,
    ) -> subprocess.CompletedProcess[str]:
        """As `subprocess.run` with `capture_output=True, text=True`."""
        out: list[bytes] = [b"", b""]
        (out_read, out_write), (err_read, err_write) = os.pipe(), os.pipe()
        in_read, in_write = os.pipe() if input is not None else (os.open(os.devnull, os.O_RDONLY), -1)
        request = {"arguments": list(arguments), "environ": dict(env), "cwd": os.path.abspath(cwd or os.getcwd())}
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(self._address)
            streams = array.array("i", (in_read, out_write, err_write))
            connection.sendmsg([b"."], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
            connection.sendall(json.dumps(request).encode() + b"\n")
            for fd in streams:
                os.close(fd)
            threads = [
                threading.Thread(target=_read, args=(out_read, out, 0)),
                threading.Thread(target=_read, args=(err_read, out, 1)),
            ]
            if input is not None:
                threads.append(threading.Thread(target=_write, args=(in_write, input.encode())))
            for thread in threads:
                thread.start()
            connection.settimeout(timeout)
            said = connection.makefile("rb")
            pid = int(said.readline())
            try:
                status = int(said.readline())
            except TimeoutError:
                os.kill(pid, 9)
                raise subprocess.TimeoutExpired(["woodfrog", *arguments], timeout) from None
            finally:
                for thread in threads:  # a child of the command that keeps its output open is waited for, too
                    thread.join()
        stdout, stderr = (data.decode().replace("\r\n", "\n") for data in out)
        return subprocess.CompletedProcess(["woodfrog", *arguments], status, stdout, stderr)


def _read(fd: int, out: list[bytes], index: int) -> None:
    with open(fd, "rb") as stream:
        out[index] = stream.read()


def _write(fd: int, data: bytes) -> None:
    with suppress(BrokenPipeError), open(fd, "wb") as stream:
        stream.write(data)


@cache
def forks(program: str) -> Forks:
    return Forks(Path(program))


# The process that is forked


def _serve(program: str, listener: socket.socket) -> None:
    """Answer requests; return in the process that is to be the program."""
    while True:
        ready, _, _ = select.select([listener, 0], [], [])
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if listener not in ready:
            os._exit(0)
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            if _attend(program, connection):
                return
        connection.close()


def _attend(program: str, connection: socket.socket) -> bool:
    """Start the program and tell of its pid and end; True in the process that is to be it."""
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    request = json.loads(connection.makefile("rb").readline())
    pid = os.fork()
    if pid:
        for fd in streams:
            os.close(fd)
        connection.sendall(b"%d\n" % pid)
        connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        os._exit(0)
    connection.close()
    for number, fd in enumerate(streams):
        os.dup2(fd, number)
        os.close(fd)
    os.environ.clear()
    os.environ.update(request["environ"])
    os.chdir(request["cwd"])
    sys.argv = [program, *request["arguments"]]
    sys.path[0] = os.path.dirname(program)
    return True


if __name__ == "__main__":
    import gc
    import runpy

    import woodfrog.sdk.client  # noqa: F401
    from woodfrog.cli.commands import app

    with suppress(SystemExit):
        app(["doctor", "-h"])  # what typer loads for any command, with pydantic
    sys.stdout.flush()
    gc.freeze()
    _serve(sys.argv[1], socket.socket(fileno=int(sys.argv[2])))
    runpy.run_path(sys.argv[0], run_name="__main__")
