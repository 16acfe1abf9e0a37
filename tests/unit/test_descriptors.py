"""How many descriptors the daemon may have open, and its users' programs; sandboxes are prepared again after errors."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from woodfrog.backends.factory import SandboxFactory

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
assert descriptors.usual() == {resource.RLIMIT_NOFILE: (100, hard)}
"""


def test_the_limit_is_raised_for_the_daemon_alone() -> None:
    subprocess.run([sys.executable, "-c", CHILD], check=True)


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
