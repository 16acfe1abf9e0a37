"""What apps, volumes and secrets may be called."""

from __future__ import annotations

import re

from woodfrog.errors import SpecError

__all__ = ["check_name"]

_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")


def check_name(kind: str, name: str) -> str:
    if not _NAME.fullmatch(name):
        raise SpecError(f"{kind} name {name!r}: letters, digits, '.', '_' and '-' only, at most 64", code="bad-name")
    return name
