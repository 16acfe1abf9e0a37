"""AMD's GPUs: what processes have on them CRIU itself captures and restores, through AMD's plugin of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["AmdSide"]


@dataclass(frozen=True)
class AmdSide:
    """The AMD GPUs of one sandbox.

    Args:
        plugins: directory of CRIU's plugins, AMD's among them, as seen on the host and in the sandbox; None = it is
            not installed.
    """

    plugins: Path | None
