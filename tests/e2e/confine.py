"""Runs a program on a kernel that lacks something: `python confine.py LACK... -- PROGRAM ARGUMENT...`

The system calls that the missing part brings answer as they would without it, by a seccomp filter that the program
and all that it starts inherit; what it brings in /proc is hidden in a mount namespace.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

LD, JEQ, RET = 0x20, 0x15, 0x06
ALLOW, ERRNO = 0x7FFF0000, 0x00050000
NUMBER, ARGUMENT_0, ARGUMENT_1 = 0, 16, 24
IOCTL, PRCTL, KCMP, USERFAULTFD = 16, 157, 312, 323
USERFAULTFD_IOC_NEW, PR_SET_MM = 0xAA00, 35
PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
CLONE_NEWNS, MS_BIND, MS_REC, MS_PRIVATE = 0x20000, 0x1000, 0x4000, 1 << 18

REFUSED = {
    "userfaultfd": (
        (USERFAULTFD, None, 0, errno.ENOSYS),
        (IOCTL, ARGUMENT_1, USERFAULTFD_IOC_NEW, errno.ENOTTY),
    ),
    "checkpoint-restore": ((KCMP, None, 0, errno.ENOSYS), (PRCTL, ARGUMENT_0, PR_SET_MM, errno.EINVAL)),
}
"""By what lacks: system call, offset and value of the argument that it is refused with, the answer."""

libc = ctypes.CDLL(None, use_errno=True)


def checked(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def instruction(code: int, k: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, k)


def seccomp(lacks: list[str]) -> None:
    program = b""
    for number, offset, value, answer in (rule for lack in lacks for rule in REFUSED[lack]):
        program += instruction(LD, NUMBER)
        if offset is None:
            program += instruction(JEQ, number, 0, 1)
        else:
            program += instruction(JEQ, number, 0, 3) + instruction(LD, offset) + instruction(JEQ, value, 0, 1)
        program += instruction(RET, ERRNO | answer)
    program += instruction(RET, ALLOW)
    code = ctypes.create_string_buffer(program)
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code)))
    checked(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0))


def hide(path: str) -> None:
    """Leave out one file of a directory of /proc, which itself cannot be changed."""
    folder, name = os.path.split(path)
    kept = f"/proc/self/fd/{os.open(folder, os.O_PATH)}"
    others = {n: os.path.isdir(f"{folder}/{n}") for n in os.listdir(folder) if n != name}
    checked(libc.mount(b"tmpfs", folder.encode(), b"tmpfs", 0, None))
    for other, is_folder in others.items():
        target = f"{folder}/{other}"
        if is_folder:
            os.mkdir(target)
        else:
            open(target, "x").close()
        checked(libc.mount(f"{kept}/{other}".encode(), target.encode(), None, MS_BIND, None))


def main() -> None:
    split = sys.argv.index("--")
    lacks, command = sys.argv[1:split], sys.argv[split + 1 :]
    if "checkpoint-restore" in lacks:
        checked(libc.unshare(CLONE_NEWNS))
        checked(libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None))
        hide("/proc/sys/kernel/ns_last_pid")
    seccomp(lacks)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
