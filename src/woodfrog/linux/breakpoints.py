"""Hardware breakpoints without a wait.

CRIU ends a restore at a hardware breakpoint in each process. The kernel makes one of the performance
counters' machinery; while nobody on the machine uses that, it has to be switched on first, and waits for every
processor to have seen it: 10 to 20 ms, of each restore. It is switched off a second after its last user went (Linux,
`account_event` in kernel/events/core.c). A counter that counts nothing keeps it on.
"""

from __future__ import annotations

import ctypes
import platform
import struct

__all__ = ["keep_quick"]

_PERF_EVENT_OPEN = {"x86_64": 298, "aarch64": 241}
_SOFTWARE, _DUMMY = 1, 9
_DISABLED, _NO_KERNEL, _NO_HYPERVISOR = 1 << 0, 1 << 5, 1 << 6
_CLOEXEC = 8
_ATTR_BYTES = 64


def keep_quick() -> int | None:
    """Hold a counter that counts nothing, on this thread: while its descriptor is open, breakpoints are set without a
    wait, on the whole machine. None where the kernel has none or does not allow it."""
    number = _PERF_EVENT_OPEN.get(platform.machine())
    if number is None:
        return None
    flags = _DISABLED | _NO_KERNEL | _NO_HYPERVISOR
    # struct perf_event_attr as it was at first: type, size, config, period, sample_type, read_format, flags.
    attr = struct.pack("IIQQQQQ", _SOFTWARE, _ATTR_BYTES, _DUMMY, 0, 0, 0, flags).ljust(_ATTR_BYTES, b"\0")
    this_thread, any_cpu, no_group = 0, -1, -1
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(number, attr, this_thread, any_cpu, no_group, ctypes.c_ulong(_CLOEXEC))
    return int(fd) if fd >= 0 else None
