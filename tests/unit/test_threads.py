"""Threads' own settings: found, and given to others."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from woodfrog.linux.threads import ThreadSettings, apply, own_settings, tids

pytestmark = [pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")]


@contextmanager
def child() -> Iterator[int]:
    """A process that has settings as this one, and waits."""
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    try:
        yield pid
    finally:
        os.close(write)
        os.close(read)
        os.waitpid(pid, 0)


def test_only_what_differs_is_found() -> None:
    cpu = min(os.sched_getaffinity(0))
    with child() as pid:
        assert own_settings(pid, os.getpid()) == ()
        os.sched_setaffinity(pid, {cpu})
        assert own_settings(pid, os.getpid()) == (ThreadSettings(pid, cpus=(cpu,)),)
        assert own_settings(pid, pid) == ()


@pytest.mark.root
def test_what_was_found_is_given_back() -> None:
    cpus = sorted(os.sched_getaffinity(0))
    with child() as pid:
        wanted = ThreadSettings(pid, cpus=(cpus[1],), ioprio=2 << 13 | 7, slack_ns=70_000)
        assert apply([pid], [wanted], os.getpid()) == ()
        assert own_settings(pid, os.getpid()) == (wanted,)


def test_processors_that_are_not_here_are_told() -> None:
    cpu = min(os.sched_getaffinity(0))
    with child() as pid:
        (line,) = apply([pid], [ThreadSettings(pid, cpus=(4000, 4001))], os.getpid())
        assert "(4000, 4001)" in line and own_settings(pid, os.getpid()) == ()
        assert apply([pid], [ThreadSettings(pid, cpus=(cpu, 4000))], os.getpid()) == ()
        assert os.sched_getaffinity(pid) == {cpu}
        assert apply([pid], [ThreadSettings(pid + 1, cpus=(4000,))], os.getpid()) == (), "not one of its threads"


def test_threads_are_found_and_those_that_end_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a program whose threads come and go is said to be gone, and its snapshot fails."""
    listed = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: [str(2**22 + 1), *listed(path)])
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        found = dict(tids(os.getpid()))
        assert {os.getpid(), thread.native_id} <= set(found) and 2**22 + 1 not in found
    finally:
        done.set()
        thread.join()
    with pytest.raises((FileNotFoundError, ProcessLookupError)):
        own_settings(2**22 + 1, os.getpid())
