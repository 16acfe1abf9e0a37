"""What was installed into a Python environment after snapshots of it were made."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress


def installed_since(directories: Iterable[str], since: float) -> list[str]:
    """Distributions that pip, uv or the like put there after that Unix time, as `name version`.

    Where nothing was installed or removed since, it costs one look at each directory.
    """
    found = set()
    for directory in directories:
        with suppress(OSError):  # gone, or a zip file
            if os.stat(directory).st_mtime <= since:
                continue
            with os.scandir(directory) as entries:
                for entry in entries:
                    name, _, version = entry.name.removesuffix(".dist-info").partition("-")
                    if entry.name.endswith(".dist-info") and entry.stat().st_mtime > since:
                        found.add(f"{name} {version}")
    return sorted(found)
