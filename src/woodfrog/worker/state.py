"""What this worker knows of itself. The module is loaded in workers only: `woodfrog.sdk.hooks` looks for it by name."""

from __future__ import annotations

restored: bool = False
"""True once this process was thawed from a snapshot."""
snapshot_id: str | None = None
instance_id: str | None = None
call_id: str | None = None
"""Of the call that is answered now: one at a time."""
