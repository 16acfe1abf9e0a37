"""Which capabilities this process holds; containers and some virtual machines lack one or another."""

from __future__ import annotations

import os

from woodfrog.linux import procfs

__all__ = ["CAP_NET_ADMIN", "CAP_SYS_ADMIN", "CAP_SYS_RESOURCE", "held"]

CAP_NET_ADMIN = 12
CAP_SYS_ADMIN = 21
CAP_SYS_RESOURCE = 24


def held(capability: int) -> bool:
    """Whether this process has the capability in effect. Without `CAP_SYS_RESOURCE`, CRIU cannot dump as root."""
    return bool(procfs.status(os.getpid()).cap_effective >> capability & 1)
