"""Who looks after many apps: which wait, how starts went and why they were cold, metrics, and each listing as JSON."""

from __future__ import annotations

import http.client
import json
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.harness import Daemon, until

pytestmark = [pytest.mark.root, pytest.mark.criu]

PROGRAM = """
import time
import woodfrog

app = woodfrog.App("shop")


@app.function(enable_memory_snapshot=True, single_use_containers=True)
def price(item: str):
    print("pricing", item)
    return len(item)


@app.function(max_containers=1)
def slow(seconds: float):
    time.sleep(seconds)


@app.cls(enable_memory_snapshot=True)
class Broken:
    @woodfrog.enter(snap=True)
    def load(self):
        raise RuntimeError("weights are missing")

    @woodfrog.method()
    def run(self):
        return 1


@app.function(timeout=1)
def hangs():
    time.sleep(60)
"""
TOKEN, SCRAPE = "whole-power", "metrics-only"


@pytest.fixture(scope="module")
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


@pytest.fixture(scope="module")
def daemon(port: int) -> Iterator[Daemon]:
    settings = {"LISTEN": f"127.0.0.1:{port}", "TOKEN": TOKEN, "METRICS_TOKEN": SCRAPE}
    with Daemon(**{f"WOODFROG_{name}": value for name, value in settings.items()}) as daemon:
        daemon.cli("deploy", str(daemon.program(PROGRAM, "shop.py")))
        yield daemon


def scraped(port: int) -> dict[str, float]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {SCRAPE}"})
    answer = connection.getresponse()
    text = answer.read().decode()
    assert answer.status == 200, text
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


def spawn(daemon: Daemon, tag: str, **arguments: Any) -> str:
    """A call that nobody waits for."""
    assert daemon._client is not None
    reply = daemon._client.request("POST", f"/apps/shop/calls/{tag}", data=arguments)
    return str(reply.headers["woodfrog-call"])


def told(done: subprocess.CompletedProcess[str]) -> str:
    return done.stdout + done.stderr


def test_why_each_start_was_cold(daemon: Daemon) -> None:
    daemon.call("shop", "price", item="egg")
    first = daemon.wait_snapshot("shop")
    daemon.call("shop", "price", item="ham")
    program = next(daemon.home.glob("src-*/shop.py"))
    program.write_text(PROGRAM.replace("pricing", "priced at"))
    daemon.cli("deploy", str(program))
    daemon.call("shop", "price", item="jam")
    daemon.wait_snapshot("shop", other_than=[first])
    rows = [s for s in daemon.json("app", "starts", "shop") if s["function"] == "price"]
    assert [(s["version"], s["why"], s["result"]) for s in rows] == [
        (2, "none-fits", "ready"),
        (1, "", "ready"),
        (1, "none-fits", "ready"),
    ]
    assert rows[0]["words"] == "shop.py changed since its last snapshot" and rows[1]["snapshot"] == first
    assert rows[2]["words"] == "it had no snapshot yet" and rows[1]["kind"] == "thawed"
    shown = daemon.cli("app", "starts", "shop", "-n", "3").stdout.splitlines()
    assert shown[1].endswith("shop.py changed since its last snapshot") and "thawed" in shown[2] and first in shown[2]
    inspected = daemon.cli("app", "inspect", "shop").stdout
    assert re.search(r"price +function .* thaws s-[0-9a-f]+", inspected), inspected
    log = told(daemon.cli("app", "logs", "shop", "--function", "price"))
    assert re.search(r"started in \d+ ms, cold: it had no snapshot yet\n", log)
    assert "starts cold: shop.py changed since its last snapshot" in log


def test_calls_that_wait_and_what_failed(daemon: Daemon, port: int) -> None:
    daemon.call("shop", "slow", seconds=0)
    running = spawn(daemon, "slow", seconds=60)
    waiting = spawn(daemon, "slow", seconds=60)
    until(lambda: daemon.json("app", "list")[0]["calls"]["running"] == 1)
    [row] = daemon.json("app", "list")
    assert (row["calls"]["running"], row["calls"]["waiting"]) == (1, 1) and row["calls"]["oldest_waiting_s"] >= 0
    assert re.search(r"^shop +deployed .* 1 +1 \(", daemon.cli("app", "list").stdout, re.MULTILINE)
    found = scraped(port)
    assert found['woodfrog_calls_waiting{app="shop"}'] == found['woodfrog_calls_running{app="shop"}'] == 1
    assert found['woodfrog_calls_oldest_waiting_seconds{app="shop"}'] > 0
    for call in (running, waiting):
        daemon._client.request("POST", f"/calls/{call}/cancel")  # type: ignore[union-attr]

    done = daemon.cli("call", "shop.Broken.run", check=False)
    assert done.returncode == 2 and "error: Broken: enter failed: RuntimeError: weights are missing" in done.stderr
    [row] = daemon.json("app", "list")
    assert row["last_error"]["message"] == "Broken: enter failed: RuntimeError: weights are missing"
    assert row["starts"]["failed"] == 1 and "weights are missing" in daemon.cli("app", "list").stdout
    log = told(daemon.cli("app", "logs", "shop", "--function", "Broken"))
    assert log.count("enter failed: RuntimeError: weights are missing") == 1, log
    assert log.count('raise RuntimeError("weights are missing")') == 1 and "not run, no container started" in log
    found = scraped(port)
    assert found['woodfrog_starts_total{app="shop",kind="cold",result="failed"}'] == 1
    assert found['woodfrog_failures_total{code="startup-enter",what="start"}'] == 1
    assert found['woodfrog_calls_total{app="shop",outcome="cancelled"}'] == 2


def test_what_nobody_waits_for_is_in_the_log_once(daemon: Daemon) -> None:
    daemon.get("/apps")
    call = spawn(daemon, "hangs")
    until(lambda: "ran past its timeout" in daemon.app_text("shop"), 60)
    said = [e for e in daemon.app_log("shop") if "ran past its timeout" in e["line"]]
    assert len(said) == 1 and said[0]["call"] == call
    assert "ran past its timeout" in told(daemon.cli("app", "logs", "shop", "--call", call[:8]))
    failed = daemon.json("app", "calls", "shop", "--failed")
    assert failed[0]["id"] == call and {c["status"] for c in failed} <= {"failure", "exception"}
    assert re.search(
        rf"^{call} .* hangs: ran past its timeout", daemon.cli("app", "calls", "shop").stdout, re.MULTILINE
    )
    shown = daemon.cli("app", "trace", call).stdout
    assert "shop.hangs" in shown and "hangs: ran past its timeout of 1 s" in shown and " ms " in shown


def test_the_last_lines_of_a_log(daemon: Daemon) -> None:
    for item in ("one", "two", "three"):
        daemon.call("shop", "price", item=item)
    until(lambda: not daemon.json("container", "list"), 60)
    one_each = [e for e in daemon.app_log("shop") if e["line"].endswith((" one", " two", " three"))]
    assert len(one_each) == 3
    gone = one_each[1]["instance"]
    lines = daemon.cli("app", "logs", "shop", "--container", gone).stdout.splitlines()
    assert lines == ["priced at two"]
    assert daemon.cli("app", "logs", "shop", "--call", one_each[2]["call"]).stdout == "priced at three\n"
    last = [
        json.loads(line)["n"] for line in daemon.cli("app", "logs", "shop", "-n", "2", "--json").stdout.splitlines()
    ]
    assert last == [e["n"] for e in daemon.app_log("shop")][-2:]
    done = daemon.cli("container", "logs", gone, check=False)
    assert done.returncode == 2 and "woodfrog app logs APP --container" in done.stderr


def test_metrics(daemon: Daemon, port: int) -> None:
    daemon.call("shop", "price", item="egg")
    before = scraped(port)
    daemon.call("shop", "price", item="a-secret-argument")
    found = until(lambda: (now := scraped(port)) != before and now)
    thawed = 'woodfrog_starts_total{app="shop",kind="thawed",result="ready"}'
    assert found[thawed] == before[thawed] + 1
    assert found['woodfrog_start_phase_seconds_count{kind="thawed",phase="restore"}'] >= 1
    assert found['woodfrog_snapshots{kind="function",state="ready"}'] >= 1
    assert found['woodfrog_restores_total{result="failed"}'] == 0 and found["woodfrog_store_budget_bytes"] == 0
    assert not any("argument" in name or TOKEN in name or SCRAPE in name for name in found)
    done = subprocess.run(
        ["curl", "-sS", "--unix-socket", str(daemon.settings.socket), "http://w/metrics"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "# TYPE woodfrog_start_seconds histogram" in done.stdout, "over the socket no token is wanted"
    for path, token, status in (("/v1/apps", SCRAPE, 401), ("/metrics", "", 401), ("/metrics", TOKEN, 200)):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", path, headers={"Authorization": f"Bearer {token}"})
        assert connection.getresponse().status == status, path


def test_results_of_an_app_that_there_never_was(daemon: Daemon) -> None:
    for argv in (("nope",), ("nope", "-y"), ("nope", "-y", "--json")):
        done = daemon.cli("result", "delete", *argv, check=False)
        assert (done.returncode, done.stderr) == (
            2,
            "error: no app 'nope' was ever deployed here\n",
        ) and not done.stdout


def documented() -> list[tuple[str, str, list[str]]]:
    """Commands of docs/cli.md's table of JSON forms, whether a list or an object, and the names in it."""
    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    table = page.partition("## JSON")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `woodfrog ([^`]+)` \| (list|object) \| (.+) \|$", table, re.MULTILINE)
    return [(command, kind, re.findall(r"`(\w+)`", names)) for command, kind, names in rows]


def test_every_listing_has_the_json_form_that_is_documented(daemon: Daemon) -> None:
    daemon.cli("volume", "create", "shelf")
    source = daemon.program("x", "x.txt")
    daemon.cli("volume", "put", "shelf", str(source))
    daemon.cli("secret", "create", "key", "A=1")
    call = spawn(daemon, "slow", seconds=0)
    until(lambda: daemon.json("container", "list"))
    rows = documented()
    assert len(rows) >= 15
    for command, kind, names in rows:
        argv = command.replace("APP", "shop").replace("CALL", call).replace("VOLUME", "shelf").split()
        found = json.loads(daemon.cli(*argv, "--json", check=command != "doctor").stdout)
        assert isinstance(found, list if kind == "list" else dict), command
        one = found[0] if kind == "list" and found else found
        if command != "gpu list":
            assert one, command
            assert not isinstance(one, dict) or set(names) <= one.keys(), (command, set(names) - one.keys())


def test_starts_outlive_the_daemon(daemon: Daemon, port: int) -> None:
    before = daemon.json("app", "starts", "shop")
    assert before
    daemon.kill()
    daemon.start()
    after = daemon.json("app", "starts", "shop", "-n", "1000")
    assert {s["instance"] for s in after} & {s["instance"] for s in before}
    assert daemon.json("app", "list")[0]["last_error"]["at"] < time.time()
    assert scraped(port)['woodfrog_calls_total{app="shop",outcome="failure"}'] == 0
