"""How many descriptors the daemon may have open, and its users' programs; sandboxes are prepared again after errors."""

from __future__ import annotations

import asyncio
import logging
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from woodfrog.backends.factory import SandboxFactory
from woodfrog.linux import descriptors
from woodfrog.linux.rootplan import HostRoot, RootPlan

CHILD = """
import resource
from woodfrog.linux import descriptors
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
assert descriptors.usual() == {}
descriptors.raise_limit()
descriptors.raise_limit()
wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (wanted, hard)
assert descriptors.usual() == {resource.RLIMIT_NOFILE: (1024, hard)}
"""


def test_the_limit_is_raised_for_the_daemon_alone() -> None:
    subprocess.run([sys.executable, "-c", CHILD], check=True)


def test_a_low_hard_limit_is_raised_where_that_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 1024 no restore works: CRIU has its own descriptors above those of the processes."""
    for allowed in (True, False):
        taken: list[tuple[int, int]] = []

        def take(which: int, limits: tuple[int, int], allowed: bool = allowed, taken: Any = taken) -> None:
            if limits[1] > 2000 and not allowed:
                raise ValueError("not allowed to raise maximum limit")
            taken.append(limits)

        monkeypatch.setattr(resource, "getrlimit", lambda which: (512, 2000))
        monkeypatch.setattr(resource, "setrlimit", take)
        monkeypatch.setattr(descriptors, "_usual", {})
        descriptors.raise_limit()
        assert taken == ([(512, 65536), (65536, 65536)] if allowed else [(2000, 2000)])
        assert list(descriptors.usual().values()) == [(1024, 65536 if allowed else 2000)]


async def test_sandboxes_are_prepared_again_after_any_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    factory: Any = SandboxFactory.__new__(SandboxFactory)
    factory._settings, factory._ready, factory._closed = SimpleNamespace(pool_size=2), [], False
    factory._wanted, factory.ahead = asyncio.Event(), None
    errors = [OSError(24, "Too many open files"), KeyError("what nobody thought of")]

    async def prepare(*, network: bool) -> object:
        if errors:
            raise errors.pop(0)
        return object()

    factory._prepare = prepare
    sleep = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda seconds: sleep(0))
    with caplog.at_level(logging.WARNING):
        factory.start_filling()
        for _ in range(50):
            await sleep(0)
    assert len(factory._ready) == 2 and not factory._filling.done()
    assert "Too many open files" in caplog.text
    factory._filling.cancel()


@pytest.mark.parametrize(
    ("blocked", "leased", "taken"), [(True, False, False), (True, True, True), (False, True, False)]
)
async def test_a_sandbox_without_a_network_has_none_to_take_away(
    tmp_path: Path, blocked: bool, leased: bool, taken: bool
) -> None:
    factory: Any = SandboxFactory.__new__(SandboxFactory)
    factory._settings = SimpleNamespace(home=tmp_path, worker_uid=64646, kdat_dir=tmp_path, socket_group="", listen="")
    factory._host, factory._scratch, factory._disk_bytes = HostRoot(()), tmp_path, 1 << 20
    factory._network = SimpleNamespace(resolver=lambda: SimpleNamespace(text=""))
    factory._look_at_host, factory._base = lambda: None, lambda runtime: ((), tmp_path / "lowest")
    plans: list[RootPlan] = []

    async def assemble(plan: RootPlan) -> None:
        plans.append(plan)

    lease = SimpleNamespace(address="10.231.0.2") if leased else None
    spec = SimpleNamespace(block_network=blocked, resources=SimpleNamespace(disk_mib=0))
    sandbox = SimpleNamespace(network=lease, assemble=assemble)
    await factory.assemble(
        sandbox, spec=spec, runtime=None, code=None, volumes=(), layers=(), shm=None, hostname="frog"
    )
    assert ("linkdel" in [op.name for op in plans[0].ops]) is taken
