"""The client of woodfrog's daemon: one HTTP connection pool, waits that survive a restart, and starting the daemon."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, urlencode, urlsplit

import httpcore

from woodfrog import errors, protocol
from woodfrog.errors import DaemonError, HostError, SpecError, WoodfrogError
from woodfrog.sdk import systemd
from woodfrog.sdk.checks import note
from woodfrog.settings import Settings, load

__all__ = ["Client", "Reply", "connect", "daemon_environ", "outdated", "segment", "start_daemon"]

RECONNECT_S = 60.0
"""How long a lost daemon is waited for."""
ABANDONED_S = 15.0
"""How long a daemon that died is left to an init system, which may be starting another, before a client does so."""
TELL_S = 1.0
"""One that is away for longer is told of."""
PATIENCE_S = 60.0
"""How long the daemon may take over an answer."""
HUNG_S = 6.0
"""An answer that takes longer may be that of a daemon that does not answer at all: it is asked for its health."""
START_S = 120.0
"""How long a daemon may take from its start to its first answer: two seconds as a rule, two minutes where a loaded
machine reads all of Python from a slow disk. One that dies is told of at once."""
END_S = 60.0
"""How long one may take to its end that has nothing to do any more."""
DAEMON = [sys.executable, "-P", "-m", "woodfrog.daemon"]
_PIECE = 256 << 10
"""A request's body is handed to the connection in pieces of this size."""
_TEMPORARY = (httpcore.NetworkError, httpcore.TimeoutException, httpcore.RemoteProtocolError)
_AS_IT_IS = "/%!$&'()*+,;=:@"
"""What stays as it is in the path of a URL; names in it are quoted already."""


def _address(host: str) -> str:
    """The setting `host` as the beginning of URLs.

    Raises:
        SpecError: it is none.
    """
    try:
        url = urlsplit(host if "://" in host else f"http://{host}")
        name, port = (url.hostname or "").encode("idna").decode(), url.port
        if url.scheme not in ("http", "https") or not name or re.search(r"[\s/@]", name) or url.query or url.fragment:
            raise ValueError
    except ValueError:
        raise SpecError(
            f"setting host (WOODFROG_HOST): {host!r} is not the address of a daemon, such as http://name:8040",
            code="bad-setting",
        ) from None
    place = f"[{name}]" if ":" in name else name
    return f"{url.scheme}://{place}{'' if port is None else f':{port}'}{quote(url.path.rstrip('/'), safe=_AS_IT_IS)}"


def segment(text: str) -> str:
    """A name as one segment of a URL path.

    Raises:
        SpecError: it is empty.
    """
    if not text:
        raise SpecError("an empty name", code="bad-name")
    return quote(text, safe="")


def _pieces(content: bytes) -> Iterator[bytes]:
    for at in range(0, len(content), _PIECE):
        yield content[at : at + _PIECE]


class _Answer:
    """An answer whose body is still to come."""

    def __init__(self, method: str, response: httpcore.Response) -> None:
        self.status = response.status
        self.headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers}
        self._body = response.iter_stream()
        length = None if method == "HEAD" else self.headers.get("content-length")
        self._expected = None if length is None else int(length)

    def pieces(self) -> Iterator[bytes]:
        """
        Raises:
            httpcore.RemoteProtocolError: the body broke off.
        """
        count = 0
        for piece in self._body:
            count += len(piece)
            yield piece
        if self._expected is not None and count != self._expected:
            raise httpcore.RemoteProtocolError("the answer broke off")

    def read(self) -> bytes:
        return b"".join(self.pieces())

    def lines(self) -> Iterator[bytes]:
        rest = b""
        for piece in self.pieces():
            *whole, rest = (rest + piece).split(b"\n")
            yield from whole
        if rest:
            yield rest


@dataclass(frozen=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: io.BytesIO

    def json(self) -> Any:
        try:
            return json.loads(self.body.getvalue() or b"null")
        except ValueError:
            raise DaemonError(
                f"the daemon answered {self.status} with something that is not JSON: {self.body.getvalue()[:200]!r}"
            ) from None


def _code_table() -> dict[str, type[WoodfrogError]]:
    table: dict[str, type[WoodfrogError]] = {}
    for cls in WoodfrogError._registry.values():
        if "code" in vars(cls):
            table.setdefault(cls.code, cls)
    return table


def error_from_answer(data: Any, fallback: str) -> WoodfrogError:
    """The error in `{"error": {...}}`: by its type, or by its code where no type is given."""
    error = data.get("error") if isinstance(data, dict) else None
    if not isinstance(error, dict):
        return DaemonError(fallback)
    if not error.get("type"):
        cls = _code_table().get(str(error.get("code")), WoodfrogError)
        error = {**error, "type": cls.__name__}
    return errors.error_from_dict(error)


_all_clients: weakref.WeakSet[Client] = weakref.WeakSet()


class Client:
    """Speaks to one daemon. Safe to use from many threads, and on both sides of a fork.

    Args:
        settings: where the daemon is (`host` and `token`, or the socket in `home`).
        reconnect_s: seconds to wait for a daemon that went away in the middle of something.
        patience_s: seconds the daemon may take over an answer, besides those it was asked to wait.
    """

    def __init__(self, settings: Settings, *, reconnect_s: float = RECONNECT_S, patience_s: float = PATIENCE_S) -> None:
        self.settings = settings
        self.reconnect_s = reconnect_s
        self.patience_s = patience_s
        self.where = settings.host or str(settings.socket)
        self.on_lost: Callable[[str], None] = lambda text: note(f"daemon-lost-{time.monotonic()}", text)
        """Told, in words, what is waited for when the daemon is away."""
        self._told = False
        self._away: float | None = None
        """Since when no daemon answers, over all requests: who asks briefly, again and again, waits as well."""
        self._base = "http://woodfrog"
        self._headers = {"accept": "*/*", "accept-encoding": "identity", "user-agent": "woodfrog"}
        if settings.host:
            self._base = _address(settings.host)
            if settings.token:
                self._headers["authorization"] = f"Bearer {settings.token}"
        self._watching = True
        self._begin()
        _all_clients.add(self)

    def _begin(self) -> None:
        """With connections and locks of this process's own. Its parent's would carry the answers to others' calls, and
        a lock that one of its threads held at the fork would never be free here."""
        self._starting = threading.Lock()
        self._under_way: dict[object, float] = {}
        """When each request was begun that is not over."""
        self._watch_lock = threading.Lock()
        self._watched = False
        # Without httpx above it, which is slow to import and a quarter of a small call.
        self._pool = httpcore.ConnectionPool(
            uds=None if self.settings.host else str(self.settings.socket),
            max_connections=None,
            max_keepalive_connections=64,
            keepalive_expiry=30,
        )

    def close(self) -> None:
        self._pool.close()

    @contextmanager
    def _stream(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        content: bytes | Iterator[bytes] | None = None,
        connect: float = 5.0,
        read: float | None,
        write: float,
    ) -> Iterator[_Answer]:
        url = self._base + quote(path, safe=_AS_IT_IS)
        if params:
            url += "?" + urlencode(params)
        own = {name.lower(): value for name, value in (headers or {}).items()}
        if content is None and method in ("POST", "PUT"):
            own["content-length"] = "0"
        sent = [(name.encode(), str(value).encode()) for name, value in {**self._headers, **own}.items()]
        timeout = {"connect": connect, "read": read, "write": write, "pool": None}
        request = object()
        self._under_way[request] = time.monotonic()
        try:
            if self._watching and not self._watched:
                self._begin_watch()
            with self._pool.stream(method, url, headers=sent, content=content, extensions={"timeout": timeout}) as r:
                yield _Answer(method, r)
        finally:
            self._under_way.pop(request, None)

    def _begin_watch(self) -> None:
        with self._watch_lock:
            if not self._watched:
                self._watched = True
                threading.Thread(target=self._watch, daemon=True, name="woodfrog-watch").start()

    def _watch(self) -> None:
        """Tell of a daemon that does not answer any more: the answer to a call may take hours, that of its health not.

        One thread for all requests, which ends when there have been none for a while.
        """
        idle = 0.0
        while idle < 60.0:
            time.sleep(HUNG_S / 4)
            begun = min(list(self._under_way.values()), default=None)
            idle = 0.0 if begun is not None else idle + HUNG_S / 4
            if begun is None or time.monotonic() - begun < HUNG_S or self._told:
                continue
            with self.apart(HUNG_S) as other, suppress(WoodfrogError):
                if other.health(timeout=HUNG_S) is None and (hung := other.hung()) and self._under_way:
                    self._tell(hung.replace("does not answer", "does not answer: waiting for it", 1))
            time.sleep(HUNG_S)
        self._watched = False

    @contextmanager
    def apart(self, seconds: float) -> Iterator[Client]:
        """A client of the same daemon with connections of its own, that gives up after about `seconds`.

        For what remains to be done after Ctrl-C, which may have left this one's pool locked or a connection half used.
        """
        client = Client(self.settings, reconnect_s=seconds, patience_s=seconds)
        client.on_lost, client._told, client._watching = self.on_lost, self._told, False
        try:
            yield client
        finally:
            client.close()

    def _send(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
        wait: float = 0.0,
        patience: float | None = None,
    ) -> Reply:
        patience = self.patience_s if patience is None else patience
        body_out: bytes | Iterator[bytes] | None = content
        if content is not None and len(content) > _PIECE:
            # httpcore copies what is left of a piece after every write: one piece of 64 MB would take seconds.
            headers = {**(headers or {}), "content-length": str(len(content))}
            body_out = _pieces(content)
        with self._stream(
            method,
            path,
            params=params,
            headers=headers,
            content=body_out,
            connect=min(5, patience),
            read=wait + patience,
            write=2 * patience,
        ) as r:
            # One buffer, however large the body: it is read and unpickled in place.
            body = io.BytesIO()
            for piece in r.pieces():
                body.write(piece)
            body.seek(0)
            return Reply(r.status, r.headers, body)

    def request(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
        data: Any = None,
        wait: float = 0.0,
        kept: str = "",
        reconnect_s: float | None = None,
        new: bool = False,
    ) -> Reply:
        """One request under `/v1`; repeated while the daemon is away, so it must do no harm twice.

        Args:
            data: sent as JSON, instead of `content`.
            wait: seconds the daemon may hold the answer back.
            kept: words for the error when the daemon stays away.
            new: nothing is under way yet: where no daemon runs, one is started as `connect` would, also when the last
                one was stopped.

        Raises:
            DaemonError: the daemon went away and did not come back in `reconnect_s`.
            WoodfrogError: what the daemon answered.
        """
        if data is not None:
            content, headers = json.dumps(data).encode(), {**(headers or {}), "content-type": "application/json"}
        if wait:
            params = {**(params or {}), "wait": f"{wait:g}"}
        allowed = self.reconnect_s if reconnect_s is None else reconnect_s
        lost: float | None = None
        absent = False
        delay = 0.05
        while True:
            trouble: Exception | None = None
            try:
                reply = self._send(method, "/v1" + path, params=params, headers=headers, content=content, wait=wait)
                said = _json_or_none(reply) if reply.status in (500, 503) else None
                # Its own errors are JSON: without it, a daemon that ends has let go of an answer that it held back.
                ends = reply.status == 500 and said is None and method != "HEAD"
                if reply.status != 503 and not ends:
                    self._told, self._away = False, None
                    break
                failure = error_from_answer(said, "the daemon ends" if ends else "the daemon is not ready")
                if not failure.retryable and "error" in (said or {}):
                    raise failure
                trouble = failure
            except _TEMPORARY as e:
                trouble = e
                if _denied(e):
                    raise _no_permission(self.where) from None
            now = time.monotonic()
            if lost is None:
                lost, absent = now, isinstance(trouble, httpcore.ConnectError)
            self._away = self._away or lost
            if now - lost > allowed:
                went = f"went away and did not come back in {allowed:g} s ({type(trouble).__name__}: {trouble})"
                hung = self.hung() if isinstance(trouble, httpcore.TimeoutException) else ""
                raise DaemonError(
                    (hung or f"woodfrog's daemon at {self.where} {went}")
                    + f"{kept and '; ' + kept}{'' if hung else self.remedy()}",
                    code="daemon-lost",
                    retryable=True,
                ) from None
            if now - lost > TELL_S and isinstance(trouble, httpcore.ConnectError):
                self._tell(f"woodfrog's daemon at {self.where} went away: waiting for another{self.remedy()}")
            died = _died(trouble) and allowed > 0
            may = not self.settings.host and os.geteuid() == 0
            if now - self._away > ABANDONED_S and may and (died or (new and absent)):
                self._start_another("died" if died else "is not running", kept)
            time.sleep(min(delay, max(0.01, lost + allowed - now)))
            delay = min(1.0, delay * 1.6)
        if reply.status >= 400 and method != "HEAD":
            raise error_from_answer(_json_or_none(reply), f"the daemon answered {reply.status} to {method} {path}")
        return reply

    def remedy(self) -> str:
        """What to do where no daemon answers, as the end of a message."""
        if self.settings.host:
            return ""
        return f"; `{'' if os.geteuid() == 0 else 'sudo '}woodfrog daemon start` starts one"

    def _tell(self, text: str) -> None:
        """Once for each time that the daemon is away, whatever waits for it."""
        if not self._told:
            self._told = True
            self.on_lost(text)

    def _start_another(self, why: str, kept: str) -> None:
        with self._starting:
            if self.health(timeout=1.0) is not None:
                return
            self.on_lost(f"woodfrog's daemon at {self.where} {why}: starting another")
            try:
                start_daemon(self)
            except DaemonError as e:
                first, newline, log = e.message.partition("\n")
                e.message = f"{first}{kept and '; ' + kept}{newline}{log}"
                raise

    def upload(self, path: str, source: BinaryIO, size: int) -> dict[str, Any]:
        """Post a file of any size, once.

        Args:
            size: its length in bytes.

        Raises:
            DaemonError: the daemon went away.
            WoodfrogError: what the daemon answered.
        """
        headers = {"content-length": str(size), "content-type": "application/octet-stream"}
        pieces = iter(lambda: source.read(_PIECE), b"")
        try:
            with self._stream("POST", "/v1" + path, headers=headers, content=pieces, read=120, write=120) as r:
                found = _or_none(r.read())
        except _TEMPORARY as e:
            raise self._broken(e) from None
        if r.status >= 400:
            raise error_from_answer(found, f"the daemon answered {r.status} to POST {path}")
        return found if isinstance(found, dict) else {}

    def download(self, path: str, target: BinaryIO, progress: Callable[[int], None] = lambda count: None) -> int:
        """Get a body of any size into a file.

        Args:
            progress: told of the bytes so far.

        Raises:
            DaemonError: the daemon went away, or the answer broke off.
            WoodfrogError: what the daemon answered.
        """
        count = 0
        try:
            with self._stream("GET", "/v1" + path, read=120, write=30) as r:
                if r.status >= 400:
                    raise error_from_answer(_or_none(r.read()), f"the daemon answered {r.status} to GET {path}")
                for piece in r.pieces():
                    target.write(piece)
                    count += len(piece)
                    progress(count)
        except _TEMPORARY as e:
            raise self._broken(e) from None
        return count

    def _broken(self, error: Exception) -> WoodfrogError:
        if _denied(error):
            return _no_permission(self.where)
        return DaemonError(f"woodfrog's daemon at {self.where} broke off ({error})", code="daemon-lost", retryable=True)

    def exists(self, path: str) -> bool:
        """Whether the daemon has what `path` names."""
        reply = self.request("HEAD", path)
        if reply.status not in (200, 204, 404):
            raise DaemonError(f"the daemon answered {reply.status} to HEAD {path}")
        return reply.status != 404

    def health(self, timeout: float = 5.0, *, any_protocol: bool = False) -> dict[str, Any] | None:
        """What the daemon says of itself; None when none answers.

        Args:
            any_protocol: also one that is only to be stopped.

        Raises:
            HostError: this user may not use the socket.
            DaemonError: a daemon that speaks another protocol, or refuses the token.
        """
        try:
            reply = self._send("GET", "/v1/health", patience=timeout)
        except _TEMPORARY as e:
            if _denied(e):
                raise _no_permission(self.where) from None
            return None
        if reply.status == 503:
            return None
        self._away = None
        if reply.status != 200:
            raise error_from_answer(_json_or_none(reply), f"{self.where} answered {reply.status} to a health check")
        found = reply.json()
        if not isinstance(found, dict):
            raise DaemonError(f"{self.where} answers a health check with {found!r}: it is no woodfrog daemon")
        if found.get("protocol", protocol.VERSION) != protocol.VERSION and not any_protocol:
            raise DaemonError(
                f"the daemon at {self.where} is woodfrog {found.get('version')} and speaks protocol "
                f"{found.get('protocol')}, this client {protocol.VERSION}: `woodfrog daemon restart`",
                code="daemon-version",
            )
        return found

    def look(self, *, patience: float = 0.0, any_protocol: bool = False) -> dict[str, Any] | None:
        """As `health`, but one that is there and does not answer is not taken for none.

        Args:
            patience: seconds to wait for it, besides the first 5; that it is waited for is told.

        Raises:
            DaemonError: it does not answer; or as `health`.
        """
        begin = time.monotonic()
        while (found := self.health(any_protocol=any_protocol)) is None:
            hung = self.hung()
            if not hung:
                return None
            if time.monotonic() - begin > patience:
                raise DaemonError(hung, code="daemon-hung", retryable=True)
            self._tell(hung.replace("does not answer", "does not answer: waiting for it", 1))
        self._told = False
        return found

    def hung(self) -> str:
        """Of a daemon that did not answer: who it is and what to do, where it is there all the same."""
        if self.settings.host:
            return f"woodfrog's daemon at {self.where} does not answer"
        try:
            with socket.socket(socket.AF_UNIX) as asked:
                asked.settimeout(1.0)
                asked.connect(str(self.settings.socket))
                pid = struct.unpack("3i", asked.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        except OSError:
            return ""
        return (
            f"woodfrog's daemon (pid {pid}) does not answer; its log: {self.settings.home / 'daemon.log'}; where it is "
            f"stopped `kill -CONT {pid}` lets it go on, and after `kill -9 {pid}` the next command starts another, "
            "which runs unfinished calls again"
        )

    def lines(self, path: str, params: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        """An NDJSON answer line by line (logs); with `follow` for as long as the daemon sends.

        Raises:
            DaemonError: the daemon went away before the end.
        """
        follow = bool(params and params.get("follow"))
        read = None if follow else self.patience_s
        try:
            with self._stream("GET", "/v1" + path, params=params, read=read, write=30) as r:
                if r.status >= 400:
                    raise error_from_answer(_or_none(r.read()), f"the daemon answered {r.status} to GET {path}")
                for line in r.lines():
                    if line.strip():
                        yield json.loads(line)
        except _TEMPORARY as e:
            raise DaemonError(
                f"woodfrog's daemon at {self.where} went away in the middle of an answer ({type(e).__name__}: {e})",
                code="daemon-lost",
                retryable=True,
            ) from None

    def logs(
        self,
        app: str,
        *,
        follow: bool = False,
        since: float | None = None,
        after: int | None = None,
        last: int | None = None,
        which: Mapping[str, str] | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Log lines of an app: {t, n, instance, function, stream, line, call}.

        Args:
            follow: until the app's end, also when another daemon takes over meanwhile.
            after: the `n` of the line before the first.
            last: so many of those that there are now.
            which: only those of a `function`, `container` or `call`.

        Raises:
            DaemonError: the daemon went away; with `follow`: and did not come back in `reconnect_s`.
        """
        path = f"/apps/{segment(app)}/logs"
        while True:
            params = {"follow": "1" if follow else None, "since": since, "after": after}
            params |= {"last": last if after is None else None, **{k: v or None for k, v in (which or {}).items()}}
            try:
                for entry in self.lines(path, {k: v for k, v in params.items() if v is not None}):
                    after = entry.get("n") or after or 0
                    yield entry
                return
            except DaemonError as e:
                if not follow or e.code != "daemon-lost":
                    raise
            time.sleep(0.1)
            self.request("GET", "/health")  # as every request, it waits for a daemon or starts one


def _or_none(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None


def _json_or_none(reply: Reply) -> Any:
    return _or_none(reply.body.getvalue())


def _denied(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, PermissionError) or getattr(error, "errno", None) in (errno.EACCES, errno.EPERM):
            return True
        error = error.__cause__ or error.__context__
    return False


def _died(error: BaseException | None) -> bool:
    """Whether nobody listens where somebody did: one that was stopped takes its socket away."""
    while error is not None:
        if isinstance(error, ConnectionRefusedError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _no_permission(where: str) -> HostError:
    return HostError(
        f"this user may not use woodfrog's socket {where}: run the program with sudo, or let the daemon's "
        "setting `socket_group` name a group of yours",
        code="no-permission",
    )


_clients: dict[Settings, Client] = {}
_lock = threading.Lock()


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()
    for client in _all_clients:
        client._begin()


os.register_at_fork(after_in_child=_after_fork)


def connect(settings: Settings | None = None, *, start: bool = True) -> Client:
    """The client of the daemon named by the settings; starts a local daemon when none runs, or one whose code is gone.

    Raises:
        HostError: no daemon runs and starting one needs root, or this user may not use its socket.
        DaemonError: the daemon does not answer, or could not be started; with the end of its log.
    """
    settings = settings or load()
    with _lock:
        client = _clients.get(settings) or Client(settings)
        found = client.health() if settings.host else client.look(patience=START_S if start else 0.0)
        gone = _gone(found)
        if found is None or (gone and start):
            if settings.host and gone:
                raise DaemonError(f"{gone}: stop it there", code="daemon-gone")
            if settings.host:
                raise DaemonError(f"no woodfrog daemon answers at {settings.host} (WOODFROG_HOST)", code="no-daemon")
            if not start:
                raise DaemonError(
                    f"woodfrog's daemon is not running (no answer at {settings.socket}): start it with "
                    "`woodfrog daemon start`",
                    code="no-daemon",
                )
            start_daemon(client)
        elif start and (old := outdated(found)):
            note("daemon-outdated", old)
        _clients[settings] = client
        return client


def _gone(found: dict[str, Any] | None) -> str:
    """Whether a daemon's own code was removed (a clone, a virtual environment), so that it can start nothing more."""
    if found is None or found.get("intact", True):
        return ""
    return f"woodfrog's daemon (pid {found.get('pid')}) runs from {found.get('package')}, which is gone"


def outdated(found: dict[str, Any]) -> str:
    """Whether a daemon's code was updated since it began, with the remedy; empty when it was not."""
    if found.get("current", True):
        return ""
    return (
        f"woodfrog's daemon (pid {found.get('pid')}) is older than its code in {found.get('package')}, which was "
        "updated: `woodfrog daemon restart`"
    )


def _end(client: Client, gone: str, timeout: float = END_S) -> None:
    """Have a daemon end that can start nothing more.

    Raises:
        HostError: not root.
        DaemonError: calls run there, or it does not end.
    """
    if os.geteuid() != 0:
        raise HostError(f"{gone}, and replacing it needs root: run `sudo woodfrog daemon stop`", code="not-root")
    calls = (client.health() or {}).get("calls", 0)
    if calls:
        raise DaemonError(
            f"{gone}, and {calls} call{'s are' if calls > 1 else ' is'} not finished there: wait for them, or "
            "`woodfrog daemon stop` (the next daemon runs them again)",
            code="daemon-gone",
        )
    note("daemon-gone", f"{gone}: another is started in its place")
    with suppress(DaemonError):  # it may be gone before its answer is out
        client.request("POST", "/shutdown", reconnect_s=0.0)
    deadline = time.monotonic() + timeout
    while client.health(timeout=1.0) is not None:
        if time.monotonic() > deadline:
            raise DaemonError(f"{gone}, and did not end within {timeout:g} s", code="daemon-stuck")
        time.sleep(0.05)


def start_daemon(client: Client, *, command: list[str] | None = None, timeout: float = START_S) -> None:
    """Start a daemon for the client's settings, and wait until it answers. Several at once start one.

    One whose own code is gone is ended first. Where it is installed as a service of systemd's, that is started.

    Raises:
        HostError: not root.
        DaemonError: it died or did not answer in time; with the end of its log.
    """
    settings = client.settings
    if os.geteuid() != 0:
        raise HostError(
            "woodfrog's daemon is not running and starting it needs root: run `sudo woodfrog daemon start`",
            code="not-root",
        )
    log = settings.home / "daemon.log"
    deadline = time.monotonic() + timeout
    with _start_lock(settings.home, deadline):
        found = client.health()
        if gone := _gone(found):
            _end(client, gone)
            deadline = time.monotonic() + timeout
        elif found is not None:
            return
        if command is None and systemd.installed(settings):
            _start_unit(client, systemd.unit_name(settings), deadline)
            return
        command = command or [*systemd.apart(), *DAEMON]
        with open(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600), "ab") as out:
            begin = out.tell()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                cwd="/",
                env=daemon_environ(settings),
                start_new_session=True,
            )
        ended: float | None = None
        while client.health(timeout=1.0) is None:
            now = time.monotonic()
            status = process.poll()
            if status is not None:
                # It gives way when another one was started some other way; that one answers soon.
                ended = ended or now
                if now - ended > 2.0:
                    raise DaemonError(
                        f"woodfrog's daemon ended with status {status} while starting; the end of {log}:\n"
                        f"{_tail(log, begin)}",
                        code="daemon-start",
                    )
            if now > deadline:
                raise DaemonError(
                    f"woodfrog's daemon (pid {process.pid}) did not answer within {timeout:g} s; "
                    f"the end of {log}:\n{_tail(log, begin)}",
                    code="daemon-start",
                )
            time.sleep(0.05)
    # The daemon outlives this process, and is reaped by init then; until then a thread takes note of its end.
    threading.Thread(target=process.wait, daemon=True, name="woodfrog-daemon").start()


@contextmanager
def _start_lock(home: Path, deadline: float) -> Iterator[None]:
    try:
        home.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(home / "start.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as e:
        raise HostError(f"woodfrog's state directory {home} cannot be used: {e.strerror}") from None
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise DaemonError(
                        f"another program has been starting woodfrog's daemon for too long: see {home / 'daemon.log'}",
                        code="daemon-start",
                    ) from None
                time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)


def _start_unit(client: Client, unit: str, deadline: float) -> None:
    try:
        done = subprocess.run(
            ["systemctl", "start", unit],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=max(1.0, deadline - time.monotonic()),
        )
        why = "" if done.returncode == 0 else " ".join(done.stderr.split())
    except subprocess.TimeoutExpired:
        why = "it takes too long"
    while not why and client.health(timeout=1.0) is None:
        if time.monotonic() > deadline:
            why = "it does not answer"
        time.sleep(0.05)
    if why:
        raise DaemonError(f"{unit} did not start: {why}; `journalctl -u {unit}` says more", code="daemon-start")


def daemon_environ(settings: Settings) -> dict[str, str]:
    """What the daemon needs of this environment; the rest (the user's keys and tokens) is none of its business."""
    keep = ("PATH", "HOME", "LANG", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "CUDA_HOME")
    found = {k: v for k, v in os.environ.items() if k in keep or k.startswith(("WOODFROG_", "PYTHON", "LC_"))}
    return {**found, "WOODFROG_HOME": str(settings.home)}


def _tail(log: Path, begin: int, lines: int = 15) -> str:
    try:
        with open(log, "rb") as f:
            f.seek(begin)
            text = f.read().decode(errors="replace")
    except OSError as e:
        return f"({e.strerror})"
    return "\n".join(text.splitlines()[-lines:]) or "(it wrote nothing)"
