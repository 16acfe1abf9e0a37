"""What an app's log says of calls that came to nothing: the container's traceback, and what follows from it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from woodfrog.daemon.journal import CallRow
from woodfrog.daemon.logs import LogBook

__all__ = ["CallLog"]

_AT_ONCE = 20
_PER_S = 1.0
_LINE = 300
_TRACEBACK = 32 << 10
"""Characters. A traceback is as long as the texts that the user's exceptions carry."""


@dataclass
class _Budget:
    """How much is said of one function: a map whose every input fails must not push all else out of the log."""

    since: float
    left: float = _AT_ONCE
    left_out: int = 0
    instance: str = ""
    """Where the last one was that was left out."""

    def take(self, now: float) -> bool:
        self.left = min(_AT_ONCE, self.left + (now - self.since) * _PER_S)
        self.since = now
        if self.left < 1:
            self.left_out += 1
            return False
        self.left -= 1
        return True


class CallLog:
    """Writes failures of calls to the log of their app, within bounds; of the rest it tells the number."""

    def __init__(self, logs: LogBook, now: Callable[[], float] = time.monotonic) -> None:
        self._logs = logs
        self._now = now
        self._budgets: dict[tuple[str, str], _Budget] = {}
        self._starts: dict[tuple[str, str], str] = {}
        """Why a container of a function did not start, as the log has it already."""

    def start_failed(self, app: str, tag: str, message: str) -> None:
        """The log tells of a start that failed: of the calls that waited for it no more is to be said."""
        self._starts[app, tag] = message

    def failed(self, call: CallRow, instance: str, error: dict[str, Any], then: str = "") -> None:
        """An attempt of a call came to nothing.

        Args:
            instance: where it ran; "" = nowhere.
            error: an exception of the user's ("type", "message", "traceback"), or one of ours as a dict.
            then: what follows.
        """
        now = self._now()
        budget = self._budgets.setdefault((call.app, call.tag), _Budget(now))
        if not budget.take(now):
            budget.instance = instance
            return
        self._tell_left_out(call.app, call.tag, budget)
        name = call.tag if call.method == call.tag else f"{call.tag}.{call.method}"
        message, trace = str(error.get("message", "")), str(error.get("traceback") or "")
        if "code" not in error:
            message = f"{error.get('type')}: {message}"
        message = " ".join(message.removeprefix(f"{name}: ").split())
        if len(message) > _LINE:
            message = message[:_LINE] + " …"
        if not instance and error.get("message") == self._starts.get((call.app, call.tag)):
            message = "not run, no container started"
        text = f"call {call.id} of {name}: {message}{'; ' if then else ''}{then}"
        self._logs.note(call.app, text, instance=instance, function=call.tag, call=call.id)
        if trace:
            self._logs.lines(call.app, _cut(trace), instance=instance, function=call.tag, stream="stderr", call=call.id)

    def settle(self, app: str | None = None) -> None:
        """Tell what was left out so far, of one app or of all, and forget who has not failed for a while."""
        now = self._now()
        for key in [k for k in self._starts if k[0] == app]:
            del self._starts[key]
        for (name, tag), budget in list(self._budgets.items()):
            if app in (None, name):
                self._tell_left_out(name, tag, budget)
                if app is not None or now - budget.since > _AT_ONCE / _PER_S:
                    del self._budgets[name, tag]

    def _tell_left_out(self, app: str, tag: str, budget: _Budget) -> None:
        if budget.left_out:
            count, budget.left_out = budget.left_out, 0
            text = f"failures of calls left out here: {count}"
            self._logs.note(app, text, instance=budget.instance, function=tag)


def _cut(text: str) -> str:
    if len(text) <= _TRACEBACK:
        return text
    half = _TRACEBACK // 2
    return f"{text[:half]}\n… {len(text) - 2 * half} characters left out …\n{text[-half:]}"
