"""What an IPC namespace holds: System V shared memory, semaphores and message queues, and POSIX message queues.

It belongs to no process, so nothing in /proc/PID tells of it, and the kernel shows it to those inside only. So a thread
goes into the namespace for that, and ends.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from pathlib import Path

__all__ = ["objects", "parse_sysv"]

_SYSV = {"shm": "shared memory", "sem": "semaphores", "msg": "message queue"}
_NEW_IPC = 0x08000000
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
_CREATE = 6
_CLOEXEC = 1


def parse_sysv(text: str, kind: str) -> tuple[str, ...]:
    """What is in /proc/sysvipc/KIND (`shm`, `sem` or `msg`), each as `semaphores 0 (key 0x00005eed)`."""
    rows = (line.split() for line in text.splitlines()[1:])
    return tuple(f"{_SYSV[kind]} {row[1]} (key {int(row[0]) & 0xFFFFFFFF:#010x})" for row in rows if len(row) > 1)


def objects(pid: int) -> tuple[str, ...]:
    """Names of what is in the IPC namespace of a process; nothing of a kind that the kernel does not have.

    Raises:
        ProcessLookupError: the process is gone.
        OSError: the namespace cannot be entered.
    """
    found: list[str] = []
    failure: list[OSError] = []

    def look() -> None:
        try:
            _enter(pid)
            for kind in _SYSV:
                try:
                    found.extend(parse_sysv(Path(f"/proc/sysvipc/{kind}").read_text(), kind))
                except FileNotFoundError:
                    continue
            found.extend(f"message queue /{name}" for name in _posix_queues())
        except OSError as e:
            failure.append(e)

    thread = threading.Thread(target=look, name="ipc-objects")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return tuple(found)


def _enter(pid: int) -> None:
    try:
        fd = os.open(f"/proc/{pid}/ns/ipc", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ProcessLookupError(f"no process {pid}") from None
    try:
        if ctypes.CDLL(None, use_errno=True).setns(fd, _NEW_IPC) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"the IPC namespace of process {pid} cannot be entered: {os.strerror(number)}")
    finally:
        os.close(fd)


def _posix_queues() -> list[str]:
    """In the file system that they are, mounted nowhere."""
    opened: list[int] = []

    def call(number: int, *arguments: object) -> int:
        result = int(ctypes.CDLL(None, use_errno=True).syscall(number, *arguments))
        if result < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return result

    try:
        opened.append(call(_FSOPEN, b"mqueue", _CLOEXEC))
        call(_FSCONFIG, opened[0], _CREATE, None, None, 0)
        opened.append(call(_FSMOUNT, opened[0], _CLOEXEC, 0))
        opened.append(os.open(".", os.O_RDONLY | os.O_CLOEXEC, dir_fd=opened[1]))
        return sorted(os.listdir(opened[2]))
    except OSError as e:
        if e.errno in (errno.ENODEV, errno.ENOSYS):
            return []
        raise
    finally:
        for fd in opened:
            os.close(fd)
