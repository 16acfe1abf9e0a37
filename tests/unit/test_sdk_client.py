"""Reaching the daemon: starting it, waiting for it, and what is said when it cannot be had."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fake_daemon import Answer, private_home, serving
from unit.fake_daemon import FakeDaemon
from woodfrog.errors import CallNotFound, DaemonError, HostError, NotOverYet, OutOfMemoryError, SpecError
from woodfrog.sdk import client as module
from woodfrog.sdk.call import FunctionCall
from woodfrog.sdk.client import Client, connect, error_from_answer, start_daemon
from woodfrog.settings import Settings

# A daemon in a process of its own: takes a lock as the real one does, and gives way to another.
STARTER = textwrap.dedent(
    """
    import fcntl, os, sys, time
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    home = Path(os.environ["WOODFROG_HOME"])
    with open(home / "starts", "a") as f:
        f.write("x")
    lock = open(home / "lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit("another daemon holds the lock")
    time.sleep(0.5)
    from unit.fake_daemon import FakeDaemon
    FakeDaemon(home)
    (home / "pid").write_text(str(os.getpid()))
    time.sleep(60)
    """
)
COMMAND = [sys.executable, "-c", STARTER, str(Path(__file__).parents[1])]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    fake = FakeDaemon(tmp_path)
    yield fake
    fake.close()


def kill(home: Path) -> None:
    os.kill(int((home / "pid").read_text()), 9)


def test_two_starters_start_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    settings = Settings(home=tmp_path / "state")
    clients = [Client(settings) for _ in range(3)]
    threads = [threading.Thread(target=start_daemon, args=(c,), kwargs={"command": COMMAND}) for c in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [bool(c.health()) for c in clients] == [True] * 3
    assert (settings.home / "starts").read_text() == "x"
    kill(settings.home)


def test_a_daemon_that_dies_shows_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    client = Client(Settings(home=tmp_path))
    command = [sys.executable, "-c", "import sys; print('first line', flush=True); sys.exit('no CRIU here')"]
    with pytest.raises(
        DaemonError, match=r"ended with status 1 while starting; the end of .*daemon.log:\nfirst line\nno CRIU"
    ):
        start_daemon(client, command=command)
    with pytest.raises(DaemonError, match=r"did not answer within 0.3 s"):
        start_daemon(client, command=[sys.executable, "-c", "import time; time.sleep(3)"], timeout=0.3)


def test_no_daemon_and_not_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(HostError, match="starting it needs root: run `sudo woodfrog daemon start`"):
        connect(Settings(home=tmp_path))
    with pytest.raises(DaemonError, match="is not running"):
        connect(Settings(home=tmp_path), start=False)
    with pytest.raises(DaemonError, match=r"no woodfrog daemon answers at http://127.0.0.1:9 \(WOODFROG_HOST\)"):
        connect(Settings(home=tmp_path, host="http://127.0.0.1:9"))


def test_connect_is_shared_and_notices_a_restart(daemon: FakeDaemon) -> None:
    settings = Settings(home=daemon.home)
    client = connect(settings)
    assert connect(settings) is client
    daemon.stop()
    with pytest.raises(DaemonError, match="is not running"):
        connect(settings, start=False)
    daemon.start()
    assert connect(settings, start=False) is client


def test_another_protocol(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.protocol, "VERSION", 99)
    with pytest.raises(DaemonError, match=r"is woodfrog fake and speaks protocol 1, this client 99"):
        connect(Settings(home=daemon.home))


def test_a_daemon_that_stays_away(daemon: FakeDaemon) -> None:
    client = Client(Settings(home=daemon.home), reconnect_s=0.3)
    daemon.stop()
    begin = time.monotonic()
    with pytest.raises(
        DaemonError, match=r"went away and did not come back in 0.3 s \(ConnectError.*\); kept words"
    ) as e:
        client.request("GET", "/health", kept="kept words")
    assert e.value.retryable and time.monotonic() - begin < 3
    daemon.start()


@pytest.mark.parametrize(
    ("died", "uid", "new", "starts"),
    [(True, 0, False, 1), (True, 1000, True, 0), (False, 0, False, 0), (False, 0, True, 1)],
)
def test_a_daemon_that_died_is_replaced_by_who_waits_for_it(
    daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch, died: bool, uid: int, new: bool, starts: int
) -> None:
    """One that was stopped, and so took its socket with it, is not while something is under way: somebody wants it so.
    What begins then has one started, as a new program would."""
    monkeypatch.setattr(module, "ABANDONED_S", 0.2)
    monkeypatch.setattr(module, "TELL_S", 0.1)
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    started: list[Client] = []

    def start(client: Client) -> None:
        started.append(client)
        daemon.start()

    monkeypatch.setattr(module, "start_daemon", start)
    client = Client(Settings(home=daemon.home), reconnect_s=1.0)
    told: list[str] = []
    client.on_lost = told.append
    daemon.stop()
    if died:
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(daemon.socket))
    outcomes: list[str] = []

    def ask() -> None:
        try:
            outcomes.append(client.request("GET", "/health", new=new).json()["version"])
        except DaemonError as e:
            outcomes.append(e.message)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(started) == starts
    remedy = f"`{'sudo ' if uid else ''}woodfrog daemon start` starts one"
    if starts:
        assert (
            outcomes == ["fake"] * 4
            and told[-1].endswith(f"{'died' if died else 'is not running'}: starting another")
            and len(told) == 2
        )
    else:
        assert all(text.endswith(f"; {remedy}") for text in outcomes) and len(told) == 1
        daemon.start()
    assert told[0].endswith(f"went away: waiting for another; {remedy}")


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, int]]:
    """A daemon in a process of its own that was stopped (SIGSTOP) while it had a request to answer."""
    monkeypatch.setattr(module, "HUNG_S", 0.4)
    child = subprocess.Popen(COMMAND, env={**os.environ, "WOODFROG_HOME": str(tmp_path)})
    client = Client(Settings(home=tmp_path))
    while not client.health(timeout=1.0):
        time.sleep(0.05)
    client.close()
    os.kill(child.pid, signal.SIGSTOP)
    yield tmp_path, child.pid
    child.kill()
    child.wait()


def test_a_daemon_that_does_not_answer_is_told_of(stopped: tuple[Path, int]) -> None:
    home, pid = stopped
    client = Client(Settings(home=home))
    told: list[str] = []
    client.on_lost = told.append
    answers: list[object] = []
    waiting = threading.Thread(target=lambda: answers.append(client.request("GET", "/health", wait=50).status))
    waiting.start()
    until = time.monotonic() + 30
    while not told and time.monotonic() < until:
        time.sleep(0.05)
    assert len(told) == 1 and told[0].startswith(
        f"woodfrog's daemon (pid {pid}) does not answer: waiting for it; its log: {home}"
    )
    assert not answers
    os.kill(pid, signal.SIGCONT)  # the request was not given up
    waiting.join()
    assert answers == [200] and len(told) == 1


def test_a_daemon_that_does_not_answer_is_not_taken_for_none(
    stopped: tuple[Path, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    home, pid = stopped
    monkeypatch.setattr(Client.health, "__defaults__", (0.3,))
    monkeypatch.setattr(module, "START_S", 0.5)
    monkeypatch.setattr(module, "start_daemon", lambda client: pytest.fail("another was started"))
    told: list[str] = []
    monkeypatch.setattr(module, "note", lambda key, text: told.append(text))
    for start, count in ((True, 1), (False, 1)):
        with pytest.raises(DaemonError, match=rf"\(pid {pid}\) does not answer") as e:
            connect(Settings(home=home), start=start)
        assert e.value.code == "daemon-hung" and len(told) == count


def test_long_answers_are_no_reason_to_tell(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HUNG_S", 0.1)
    client = Client(Settings(home=daemon.home))
    told: list[str] = []
    client.on_lost = told.append
    asked, let_go = threading.Event(), threading.Event()
    real = daemon.handle

    def slow(request: object) -> None:
        if "wait=" in getattr(request, "path", ""):
            asked.set()
            let_go.wait(20)
        real(request)

    monkeypatch.setattr(daemon, "handle", slow)
    waiting = threading.Thread(target=lambda: client.request("GET", "/health", wait=50))
    waiting.start()
    asked.wait(20)
    before = daemon.requests.count("GET /v1/health")
    while daemon.requests.count("GET /v1/health") < before + 2:  # it was asked whether it is there
        time.sleep(0.01)
    let_go.set()
    waiting.join()
    assert told == []


def test_a_timeout_counts_while_the_daemon_is_away(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    patient, short = (FunctionCall("c1", Client(Settings(home=daemon.home), reconnect_s=s)) for s in (60.0, 0.2))
    daemon.stop()
    for timeout in (0, 0.2):
        begin = time.monotonic()
        with pytest.raises(NotOverYet, match=r"daemon at \S+ is away; `sudo woodfrog daemon start` starts one"):
            patient.get(timeout=timeout)
        assert timeout <= time.monotonic() - begin < 30
    for longer in (5, None):
        with pytest.raises(DaemonError, match=r"FunctionCall.from_id\('c1'\).get\(\) asks for it again"):
            short.get(timeout=longer)
    daemon.start()


def test_who_asks_again_and_again_waits_for_the_daemon_too(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time too shortly to see that it has been away for long enough to start another."""
    monkeypatch.setattr(module, "ABANDONED_S", 0.2)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(module, "start_daemon", lambda client: daemon.start())
    call = FunctionCall("c1", Client(Settings(home=daemon.home)))
    daemon.stop()
    deadline = time.monotonic() + 5
    with pytest.raises(CallNotFound):  # by the next daemon
        while time.monotonic() < deadline:
            with contextlib.suppress(NotOverYet):
                call.get(timeout=0)


def test_a_daemon_that_ends_lets_go_of_what_it_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    with private_home(monkeypatch) as home, serving(home) as fake:
        client = Client(Settings(home=home))
        fake.routes["GET /calls/c1"] = [Answer(b"Internal Server Error", 500), Answer({"through": True})]
        assert client.request("GET", "/calls/c1").json() == {"through": True}
        fake.routes["GET /calls/c1"] = Answer({"error": {"type": "DaemonError", "message": "a bug"}}, 500)
        with pytest.raises(DaemonError, match="a bug"):
            client.request("GET", "/calls/c1")


def test_errors_are_told_by_type_or_by_code() -> None:
    plain = {"code": "out-of-memory", "message": "m", "fields": {"limit": 1}, "retryable": False}
    error = error_from_answer({"error": plain}, "")
    assert isinstance(error, OutOfMemoryError) and error.fields == {"limit": 1}
    assert isinstance(error_from_answer({"error": {**plain, "type": "SpecError"}}, ""), SpecError)
    assert str(error_from_answer("<html>", "answered 500")) == "answered 500"


def test_the_daemon_gets_no_secrets_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("WOODFROG_GPU", "none")
    found = module.daemon_environ(Settings())
    assert "AWS_SECRET_ACCESS_KEY" not in found and found["WOODFROG_GPU"] == "none" and "PATH" in found
    json.dumps(found)


@pytest.mark.parametrize(
    ("host", "base"),
    [
        ("name:8040", "http://name:8040"),
        ("https://name/", "https://name"),
        ("http://[::1]:80/at a/place", "http://[::1]:80/at%20a/place"),
        ("b\xfccher:1", "http://xn--bcher-kva:1"),
    ],
)
def test_addresses(host: str, base: str) -> None:
    assert Client(Settings(host=host))._base == base


@pytest.mark.parametrize(
    "host", ["ftp://name", "name:port", "http://[::1", "http://", "http://a b", "name:99999", "a?b"]
)
def test_what_is_no_address_is_one_line(host: str) -> None:
    with pytest.raises(SpecError, match="is not the address of a daemon") as e:
        Client(Settings(host=host))
    assert repr(host) in str(e.value) and "WOODFROG_HOST" in str(e.value)
