"""Inference servers that this process started and that listen on this machine, and a request to one.

Nothing of a server's is imported, and no HTTP library: what is loaded here would be in every snapshot.
"""

from __future__ import annotations

import _socket
import os
from dataclasses import dataclass

__all__ = ["NotHttp", "Refused", "Server", "find"]

KINDS = ("vllm", "sglang")
_LISTENING = "0A"
_TOP = 1 << 20
"""Of an answer, so much is read."""
_INNER = (b"multiprocessing.", b"vllm::", b"sglang::")
"""What an engine's inner processes are called. Most listen for each other only, and to connect where nobody accepts
would leave a connection that CRIU cannot capture."""
_OUTER = (b"vllm::apiserver", b"sglang::tokenizer_worker")
"""Those of them that serve HTTP."""


class Refused(OSError):
    """The server answered, and did not do it."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


class NotHttp(OSError):
    """Who listens there speaks something else, or did not answer in time."""


@dataclass(frozen=True)
class Server:
    """One server. `kind` is a name of KINDS."""

    kind: str
    pid: int
    host: str
    port: int

    def get(self, path: str, timeout_s: float) -> str:
        """The text of an answer; "" where there is none of that name.

        Raises:
            NotHttp: no answer, or no HTTP.
        """
        try:
            status, text = self._ask(f"GET {path} HTTP/1.0\r\nHost: localhost:{self.port}\r\n\r\n", timeout_s)
        except OSError as e:
            raise NotHttp(f"port {self.port}: {e}") from None
        if not status:
            raise NotHttp(f"port {self.port} does not speak HTTP")
        return text if 200 <= status < 300 else ""

    def post(self, path: str, timeout_s: float, body: str = "", *, hint: str = "") -> str:
        """Send one POST and wait for its answer.

        Raises:
            Refused: an answer other than 2xx; with `hint` for 404.
            OSError: no connection, or no answer in time (TimeoutError): it may have been done, or be done later.
        """
        kind = "Content-Type: application/json\r\n" if body else ""
        head = f"POST {path} HTTP/1.0\r\nHost: localhost:{self.port}\r\n{kind}"
        status, text = self._ask(f"{head}Content-Length: {len(body.encode())}\r\n\r\n{body}", timeout_s)
        if not 200 <= status < 300:
            missing = f" ({hint})" if hint and status == 404 else ""
            said = f"{path} on port {self.port} answered {status or 'nothing'}{missing} {text[:120]}"
            raise Refused(said.rstrip(), status)
        return text

    def _ask(self, request: str, timeout_s: float) -> tuple[int, str]:
        """Status and text of the answer; status 0 where it is no HTTP."""
        family = _socket.AF_INET6 if ":" in self.host else _socket.AF_INET
        connection = _socket.socket(family, _socket.SOCK_STREAM)
        try:
            connection.settimeout(timeout_s)
            connection.connect((self.host, self.port))
            connection.sendall(request.encode())
            # Read to its end: the server has then closed its side, and no connection is left to freeze.
            answer = b""
            while piece := connection.recv(1 << 16):
                answer = (answer + piece)[:_TOP]
        finally:
            connection.close()
        top, _, text = answer.decode("utf-8", "replace").partition("\r\n\r\n")
        words = top.split("\r\n", 1)[0].split(" ", 2)
        spoken = len(words) > 1 and words[0].startswith("HTTP/") and words[1].isdigit()
        return int(words[1]) if spoken else 0, text


def find(proc: str = "/proc", root: int | None = None) -> list[Server]:
    """Servers of a known kind that listen in the tree of `root` (this process).

    A process counts as one when it, or what started it, is called so: its command line has the name in it. An engine's
    inner processes do not.

    Raises:
        OSError: /proc cannot be read.
    """
    kinds = _tree(proc, os.getpid() if root is None else root)
    if not any(kinds.values()):
        return []
    listening = _listening(proc)
    found: dict[int, Server] = {}
    for pid, kind in kinds.items():
        if not kind or _inner(proc, pid):
            continue
        for inode in _sockets(proc, pid):
            if inode in listening:
                host, port = listening[inode]
                found.setdefault(port, Server(kind, pid, host, port))
    return sorted(found.values(), key=lambda s: s.port)


def _tree(proc: str, root: int) -> dict[int, str]:
    """The pids below `root`, `root` apart, each with its kind or ""."""
    children: dict[int, list[int]] = {}
    for name in os.listdir(proc):
        if name.isdigit():
            try:
                # The program's name is in parentheses and may have any character in it.
                parent = int(_read(f"{proc}/{name}/stat").rpartition(b")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(name))
    kinds: dict[int, str] = {}
    queue = [(pid, "") for pid in children.get(root, ())]
    while queue:
        pid, inherited = queue.pop()
        if pid in kinds:
            continue
        kinds[pid] = _kind(proc, pid) or inherited
        queue += [(child, kinds[pid]) for child in children.get(pid, ())]
    return kinds


def _words(proc: str, pid: int) -> list[bytes]:
    try:
        # The first words say what runs; an argument further on may be a model's path or anything.
        return _read(f"{proc}/{pid}/cmdline").lower().split(b"\0")[:5]
    except OSError:
        return []


def _inner(proc: str, pid: int) -> bool:
    words = _words(proc, pid)
    return any(name in word for word in words for name in _INNER) and not any(
        word.startswith(name) for word in words for name in _OUTER
    )


def _kind(proc: str, pid: int) -> str:
    words = _words(proc, pid)
    return next((kind for kind in KINDS if any(kind.encode() in word for word in words)), "")


def _listening(proc: str) -> dict[str, tuple[str, int]]:
    """Inode of each listening TCP socket, with an address that reaches it."""
    found: dict[str, tuple[str, int]] = {}
    for name, loopback in (("tcp", "127.0.0.1"), ("tcp6", "::1")):
        try:
            lines = _read(f"{proc}/self/net/{name}").decode().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            words = line.split()
            if words[3] == _LISTENING:
                address, _, port = words[1].partition(":")
                anywhere = set(address) == {"0"} or address in ("0100007F", "00000000000000000000000001000000")
                host = loopback if anywhere else _host(address)
                found[words[9]] = (host, int(port, 16))
    return found


def _host(address: str) -> str:
    """An address as /proc writes it, little-endian by four bytes."""
    raw = b"".join(bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8))
    return _socket.inet_ntop(_socket.AF_INET if len(raw) == 4 else _socket.AF_INET6, raw)


def _sockets(proc: str, pid: int) -> list[str]:
    try:
        folder = f"{proc}/{pid}/fd"
        names = [os.readlink(f"{folder}/{fd}") for fd in os.listdir(folder)]
    except OSError:
        return []
    return [name[8:-1] for name in names if name.startswith("socket:[")]


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()
