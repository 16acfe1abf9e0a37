"""Run a recorded journal through the machine again and see whether it decides the same.

A journal is lines of JSON: one header (`journal_header`), then one line for each event (`journal_line`).
`python -m woodfrog.control.replay FILE` exits with 0 when every action is the same, with 1 at the first that differs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from woodfrog import spec
from woodfrog.control.events import Action, Event, event_from_dict
from woodfrog.control.machine import InvalidTransition, handle
from woodfrog.control.state import Config, State
from woodfrog.errors import SpecError, WoodfrogError

__all__ = ["Difference", "journal_header", "journal_line", "replay"]


@dataclass(frozen=True)
class Difference:
    """The first event after which the machine decided otherwise than recorded."""

    line: int
    event: dict[str, Any]
    recorded: list[dict[str, Any]]
    replayed: list[dict[str, Any]]

    def __str__(self) -> str:
        def lines(actions: list[dict[str, Any]], mark: str) -> list[str]:
            return [f"  {mark} {json.dumps(a)}" for a in actions] or [f"  {mark} (nothing)"]

        head = f"line {self.line}: {json.dumps(self.event)}"
        return "\n".join([head, *lines(self.recorded, "-"), *lines(self.replayed, "+")])


def journal_header(config: Config, run: str) -> str:
    """First line of a journal, without the line end."""
    return json.dumps({"config": spec.to_dict(config), "run": run})


def journal_line(event: Event, actions: Iterable[Action]) -> str:
    """One event and what was decided, without the line end. For an event that was refused pass no actions."""
    return json.dumps({"event": event.to_dict(), "actions": [a.to_dict() for a in actions]})


def replay(lines: Iterable[str]) -> tuple[State, int, Difference | None]:
    """Replay a journal.

    Returns:
        The state at the end, the number of events taken in, and the first difference (None when all is the same).

    Raises:
        SpecError: a line that is not of a journal; the message names its number.
    """
    state: State | None = None
    count = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if state is None:
                state = State(spec.from_dict(Config, record["config"]), str(record["run"]))
                continue
            event = event_from_dict(record["event"])
            recorded: list[dict[str, Any]] = record["actions"]
        except (ValueError, KeyError, TypeError, SpecError) as e:
            raise SpecError(f"line {number}: not a journal of woodfrog's control: {e!r}", code="bad-journal") from None
        try:
            actions = handle(state, event)
        except InvalidTransition:
            actions = ()
        # Through JSON, as the recorded ones went.
        replayed = json.loads(json.dumps([a.to_dict() for a in actions]))
        count += 1
        if replayed != recorded:
            return state, count, Difference(number, record["event"], recorded, replayed)
    if state is None:
        raise SpecError("empty journal", code="bad-journal")
    return state, count, None


def main(argv: list[str]) -> int:
    if len(argv) != 1:
        print("usage: python -m woodfrog.control.replay FILE", file=sys.stderr)
        return 2
    try:
        with open(argv[0], encoding="utf-8") as file:
            state, count, difference = replay(file)
    except (OSError, WoodfrogError) as e:
        print(f"{argv[0]}: {e}", file=sys.stderr)
        return 2
    if difference is not None:
        print(difference)
        return 1
    print(f"{count} events, the same decisions; {len(state.calls)} calls and {len(state.instances)} instances left")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
