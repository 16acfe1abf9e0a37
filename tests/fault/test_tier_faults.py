"""A bucket behind a network that breaks: a real S3-compatible server, and a relay that cuts, stalls and lies."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from s3_server import S3Server
from wire import Wire, wire
from woodfrog.errors import StoreError
from woodfrog.store.tiers import ObjectTier

PART = 5 << 20
BIG = os.urandom(3 * PART + 12345)
BUSY = "say HTTP/1.1 503 SlowDown\r\nContent-Length: 0\r\n\r\n"
STALL_S = 0.5


@pytest.fixture
def line(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    server.client().put_object(Bucket="woodfrog", Key="p/big", Body=BIG)
    with wire(server.endpoint) as line:
        for name, value in {**server.environment, "AWS_ENDPOINT_URL": line.url}.items():
            monkeypatch.setenv(name, value)
        yield line


def open_bucket(url: str = "s3://woodfrog/p", *, stall_s: float = STALL_S) -> ObjectTier:
    return ObjectTier(url, stall_s=stall_s, part=PART, parallel=3)


def at(broken: int, behaviour: str | int) -> Callable[[int], str | int]:
    return lambda number: behaviour if number == broken else "pass"


@pytest.mark.parametrize("broken", [0, 2])
@pytest.mark.parametrize("behaviour", ["refuse", "hang", BUSY, 100_000, "stall 100000"])
def test_one_broken_connection_is_made_good(line: Wire, behaviour: str | int, broken: int, tmp_path: Path) -> None:
    line.plan = at(broken, behaviour)
    silent = behaviour in ("hang", "stall 100000")
    # Where nothing is waited for, the server may take its time: other tests run beside this one.
    tier = open_bucket(stall_s=STALL_S if silent else 5)
    tier.get("big", tmp_path / "big")
    assert (tmp_path / "big").read_bytes() == BIG
    if silent:
        return  # a part that is under way gets more time than a test has
    line.connections = 0
    tier.put(f"new-{broken}", tmp_path / "big")
    line.plan = lambda _: "pass"
    assert open_bucket().get_bytes(f"new-{broken}") == BIG


def test_a_slow_line_is_not_a_broken_one(line: Wire, tmp_path: Path) -> None:
    """Each part takes twice as long as a request may be silent."""
    line.plan = lambda _: f"slow {PART // 2}"
    tier = ObjectTier("s3://woodfrog/p", stall_s=1, part=PART, parallel=3)
    begin = time.monotonic()
    tier.put("slow", BIG[: 2 * PART])
    assert time.monotonic() - begin > 2
    assert tier.get_bytes("slow") == BIG[: 2 * PART]


@pytest.mark.parametrize("behaviour", ["refuse", "hang", BUSY, 100, 100_000, "stall 100000"])
def test_a_network_that_stays_broken_is_an_error_in_bounded_time(
    line: Wire, behaviour: str | int, tmp_path: Path
) -> None:
    (tmp_path / "target").write_bytes(b"kept")
    line.plan = lambda _: behaviour
    begin = time.monotonic()
    with pytest.raises(StoreError, match=r"^s3://woodfrog/p: cannot read big: .*try again$") as error:
        open_bucket().get("big", tmp_path / "target")
    assert time.monotonic() - begin < 40  # a few seconds on a machine of its own
    assert error.value.code == "tier-unreachable" and error.value.retryable
    assert error.value.fields == {"tier": "s3://woodfrog/p", "key": "big"}
    assert [path.name for path in tmp_path.iterdir()] == ["target"] and (tmp_path / "target").read_bytes() == b"kept"


@pytest.mark.parametrize("behaviour", ["refuse", "hang", BUSY])
def test_an_upload_that_fails_leaves_no_object(line: Wire, behaviour: str) -> None:
    open_bucket().put("old", b"old")
    line.plan = lambda _: behaviour
    for key in ("old", "never"):
        with pytest.raises(StoreError, match="cannot store") as error:
            open_bucket().put(key, BIG)
        assert error.value.code == "tier-unreachable"
    # Half-way: the upload has begun, its parts do not arrive.
    line.plan, line.connections = lambda number: "pass" if number == 0 else behaviour, 0
    with pytest.raises(StoreError, match="cannot store"):
        open_bucket().put("never", BIG)
    line.plan = lambda _: "pass"
    tier = open_bucket()
    assert tier.get_bytes("old") == b"old" and not tier.has("never")


def test_an_object_replaced_between_its_parts_is_noticed(
    line: Wire, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = os.urandom(len(BIG))
    tier = open_bucket()
    tier.put("changing", BIG)
    receive, first, replaced = tier._receive, threading.Lock(), threading.Event()

    def replace_first(*arguments: object) -> None:
        if not first.acquire(blocking=False):
            assert replaced.wait(30)
            receive(*arguments)  # type: ignore[arg-type]
            return
        receive(*arguments)  # type: ignore[arg-type]
        open_bucket().put("changing", other)
        replaced.set()

    monkeypatch.setattr(tier, "_receive", replace_first)
    with pytest.raises(StoreError, match="changed while it was read") as error:
        tier.get("changing", tmp_path / "target")
    assert error.value.code == "tier-damaged" and error.value.retryable
    assert list(tmp_path.iterdir()) == []
    assert open_bucket().get_bytes("changing") == other


def test_wrong_credentials_are_denied_at_once_and_never_shown(line: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "wJalrXUtnFEMIbPxRfiCYEXAMPLEKEYwrong"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    tier = open_bucket()
    uses: list[Callable[[], object]] = [
        lambda: tier.put("k", b"x"),
        lambda: tier.put("k", BIG),
        lambda: tier.get_bytes("big"),
        lambda: tier.has("big"),
        tier.list,
        lambda: tier.delete("big"),
    ]
    for use in uses:
        with pytest.raises(StoreError, match=r"access denied.*check the credentials") as error:
            use()
        assert error.value.code == "tier-denied" and not error.value.retryable
        assert error.value.__cause__ is None and error.value.__suppress_context__
        for text in (repr(tier), str(vars(tier)), str(error.value.to_dict())):
            assert secret not in text and os.environ["AWS_ACCESS_KEY_ID"] not in text


def test_set_ups_that_cannot_work_say_what_to_do(line: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreError, match="no such bucket; make it") as error:
        open_bucket("s3://not-there/p").put("k", b"x")
    assert error.value.code == "tier-missing"
    with pytest.raises(StoreError, match="no such bucket; make it"):
        open_bucket("s3://not-there/p").list()

    monkeypatch.delenv("AWS_ALLOW_HTTP")
    with pytest.raises(StoreError, match="AWS_ALLOW_HTTP") as error:
        open_bucket().get_bytes("big")
    assert error.value.code == "bad-tier"

    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(StoreError, match=r"pip install 'woodfrog\[bucket\]'") as error:
        open_bucket()
    assert error.value.code == "tier-package"
