"""Looking into an IPC namespace."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from woodfrog.linux.ipc import objects

pytestmark = pytest.mark.root

PROGRAM = """
import ctypes, sys
libc = ctypes.CDLL(None)
assert min(libc.shmget(-5, 4096, 0o1600), libc.semget(0x5EED, 3, 0o1600), libc.msgget(7, 0o1600)) >= 0
libc.mq_close(libc.mq_open(b"/frogs", 0o102, 0o600, None))
print("made", flush=True)
sys.stdin.read()
"""


def test_what_no_process_holds_is_found() -> None:
    """Semaphores, memory that nobody has attached, queues that nobody has open."""
    here = objects(os.getpid())
    command = ["unshare", "--ipc", "--", sys.executable, "-c", PROGRAM]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "made\n"
        assert objects(process.pid) == (
            "shared memory 0 (key 0xfffffffb)",
            "semaphores 0 (key 0x00005eed)",
            "message queue 0 (key 0x00000007)",
            "message queue /frogs",
        )
        assert objects(os.getpid()) == here  # the daemon itself stays where it is
        process.communicate()
    with pytest.raises(ProcessLookupError):
        objects(process.pid)
