"""Parked instances: thawed ahead of need, stopped before their first instruction, woken by a call.

CRIU leaves the processes stopped, so that nothing of the user's runs before the copy has an identity of its own: no
thread, no timer. Of the memory that the page server gives, nothing is there yet: the working set is pushed at the wake.
"""

from __future__ import annotations

import asyncio
import signal

from woodfrog.linux.pageserver import ServedPages
from woodfrog.linux.sandbox import Sandbox

__all__ = ["unpark"]


async def unpark(sandbox: Sandbox, pages: ServedPages | None) -> None:
    """Let the processes of a sandbox run. Their working set comes to them meanwhile, what they ask for first.

    Raises:
        SandboxError: they are gone.
    """
    if pages is not None:
        push = asyncio.ensure_future(pages.push())
        push.add_done_callback(lambda f: f.cancelled() or f.exception())  # `pages.failed` tells
    await sandbox.signal(-1, signal.SIGCONT)
