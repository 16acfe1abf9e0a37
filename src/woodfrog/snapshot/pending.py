"""What is on its way from a tier, noted for the next daemon: a file for each, gone when it is here or given up.

A note only says what is worth going on with. It is not durable, and nothing rests on it: without it a snapshot comes
when somebody asks for it.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["TRIES", "Pending", "PendingNotes", "why_not"]

TRIES = 5
"""So often the next daemons go on with the same snapshot."""


@dataclass(frozen=True)
class Pending:
    """
    Args:
        tier: the name of where it comes from.
        host: the worker class of the machine that it comes to.
        function_key, tag, params_digest: what it is a snapshot of.
        tries: how often a daemon went on with it.
    """

    id: str
    tier: str
    host: str
    function_key: str
    tag: str
    params_digest: str
    tries: int = 0


def why_not(pending: Pending, *, tier: str, host: str, have: bool, invalid: bool, wanted: bool) -> str:
    """Why nobody needs to go on with it; "" = somebody does.

    Args:
        tier, host: as they are now.
        have: a snapshot of that function is here.
        invalid: a person has invalidated it.
        wanted: a function that is deployed would thaw it.
    """
    for over, why in (
        (invalid, "it was invalidated"),
        (have, "there is one here"),
        (pending.tier != tier, "the tier is another"),
        (pending.host != host, "this host is another kind now"),
        (not wanted, "no deployed function needs it"),
        (pending.tries >= TRIES, f"it was tried {pending.tries} times"),
    ):
        if over:
            return why
    return ""


class PendingNotes:
    """The notes below a directory, which is made with the first of them. What cannot be written is not noted."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def list(self) -> list[Pending]:
        """All that can be read; the others are removed."""
        found = []
        for path in sorted(self._folder.glob("*")):
            try:
                one = Pending(**json.loads(path.read_bytes()))
                if one.id != path.name or not isinstance(one.tries, int):
                    raise ValueError("it is of another")
                found.append(one)
            except (OSError, ValueError, TypeError, RecursionError):
                self.drop(path.name)
        return found

    def put(self, pending: Pending) -> None:
        with suppress(OSError):
            self._folder.mkdir(mode=0o700, exist_ok=True)
            (self._folder / pending.id).write_text(json.dumps(asdict(pending)))

    def add(self, pending: Pending) -> None:
        """Note it, unless it is: how often it was tried stays."""
        if not self.has(pending.id):
            self.put(pending)

    def has(self, snapshot_id: str) -> bool:
        return (self._folder / snapshot_id).exists()

    def drop(self, snapshot_id: str) -> None:
        with suppress(OSError):
            (self._folder / snapshot_id).unlink(missing_ok=True)
