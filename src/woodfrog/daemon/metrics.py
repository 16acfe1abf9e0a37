"""What the daemon has counted, in Prometheus's text format.

No client library: it would keep a second set of counters beside `telemetry`, each with a lock, for a format of a few
lines. What starts and calls tell is put down as they end, and counted when somebody asks, or when it is much.
"""

from __future__ import annotations

import os
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from woodfrog.daemon.starts import Start

__all__ = ["CONTENT_TYPE", "COUNTED", "EPHEMERAL", "OTHER", "Family", "Metrics", "process_families", "render"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Upper bounds, in seconds."""
OUTCOMES = ("success", "exception", "failure", "cancelled")
PHASES = frozenset(
    (
        *("sandbox", "assemble", "spawn", "connect", "zygote.restore", "boot", "import", "enter", "freeze", "capture"),
        *("dump", "share", "fetch", "verify", "restore", "criu", "gpu.restore", "unpark", "wake"),
    )
)
"""Of a start: those that are measured. A worker names its own, and what it says is no reason for a series."""
SERIES = 500
"""So many of one metric; what comes beyond them is counted under the first label `(other)`."""
OTHER = "(other)"
EPHEMERAL = "(ephemeral)"
"""All apps of `woodfrog run` and `app.run()`: each has a name of its own."""
_PENDING = 2000

COUNTED: dict[str, tuple[str, str, str]] = {
    "capture.done": ("captures_total", "result", "done"),
    "capture.failed": ("captures_total", "result", "failed"),
    "restore.done": ("restores_total", "result", "done"),
    "restore.failed": ("restores_total", "result", "failed"),
    "zygote.made": ("zygotes_total", "what", "made"),
    "zygote.used": ("zygotes_total", "what", "used"),
    "zygote.failed": ("zygotes_total", "what", "failed"),
    "pack.done": ("packs_total", "result", "done"),
    "pack.failed": ("packs_total", "result", "failed"),
    "push.done": ("pushes_total", "result", "done"),
    "push.failed": ("pushes_total", "result", "failed"),
    "pull.done": ("pulls_total", "result", "done"),
    "pull.failed": ("pulls_total", "result", "failed"),
    "pages.pushed": ("pages_total", "how", "pushed"),
    "pages.faults": ("pages_total", "how", "faults"),
    "pages.demanded": ("pages_total", "how", "demanded"),
    "pages.fetched": ("pages_total", "how", "fetched"),
    "page-server.died": ("page_server_deaths_total", "", ""),
    "control.invalid": ("control_invalid_total", "", ""),
}
"""Counters of `telemetry`: metric, label, and its value. Calls and starts have metrics of their own."""
_HELP = {
    "captures_total": "Snapshots made, and attempts that failed.",
    "restores_total": "Thaws of snapshots by CRIU.",
    "zygotes_total": "Snapshots of imported libraries: made, used by a start, failed.",
    "packs_total": "Snapshots put into the page store.",
    "pushes_total": "Snapshots copied to the tier.",
    "pulls_total": "Snapshots brought from the tier.",
    "pages_total": "Pages of 4 KiB given to thawed processes: pushed ahead, demanded with the fault of one; faults; "
    "fetched from the tier at a fault.",
    "page_server_deaths_total": "Page servers that ended by themselves.",
    "control_invalid_total": "Events that contradicted the control machine's state: report them.",
}

Labels = tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """One metric: its samples by the values of its labels."""

    name: str
    kind: str
    help: str
    labels: Labels
    samples: Mapping[Any, float | Histogram]


class Histogram:
    """Counts by the buckets above."""

    __slots__ = ("counts", "sum")

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)
        self.sum = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self.sum += seconds


class _Histograms(dict[Labels, Histogram]):
    def __missing__(self, labels: Labels) -> Histogram:
        found = self[labels] = Histogram()
        return found


def _bounded(samples: Mapping[Labels, Any], labels: Labels) -> Labels:
    """The series to count under: there are never many more than `SERIES`."""
    return labels if labels in samples or len(samples) < SERIES else (OTHER, *labels[1:])


@dataclass
class Metrics:
    """What starts and calls have told since the daemon began."""

    starts: Counter[Labels] = field(default_factory=Counter)
    cold: Counter[Labels] = field(default_factory=Counter)
    calls: Counter[Labels] = field(default_factory=Counter)
    failures: Counter[Labels] = field(default_factory=Counter)
    start_s: _Histograms = field(default_factory=_Histograms)
    phase_s: _Histograms = field(default_factory=_Histograms)
    wait_s: _Histograms = field(default_factory=_Histograms)
    run_s: _Histograms = field(default_factory=_Histograms)
    _started: list[tuple[str, Start]] = field(default_factory=list)
    _called: list[tuple[str, str, str, float, float | None]] = field(default_factory=list)
    _failed: list[Labels] = field(default_factory=list)

    def started(self, app: str, start: Start) -> None:
        self._started.append((app, start))
        if len(self._started) >= _PENDING:
            self.count()

    def called(self, app: str, outcome: str, code: str, waited: float, ran: float | None) -> None:
        """A call is over: `code` of its failure, seconds until it was taken, and in the container (None: in none)."""
        self._called.append((app, outcome, code, waited, ran))
        if len(self._called) >= _PENDING:
            self.count()

    def failed(self, what: str, code: str) -> None:
        self._failed.append((code, what))
        if len(self._failed) >= _PENDING:
            self.count()

    def count(self) -> None:
        """Take in what was put down."""
        started, self._started = self._started, []
        for app, start in started:
            self._add(self.starts, app, start.kind, start.result)
            if start.why:
                self._add(self.cold, app, start.why)
            if start.code:
                self._failed.append((start.code, "start"))
            if start.result == "ready":
                self.start_s[(start.kind,)].add(start.ms / 1e3)
                for phase in start.phases:
                    if phase.name in PHASES:
                        self.phase_s[start.kind, phase.name].add(phase.ms / 1e3)
        called, self._called = self._called, []
        for app, outcome, code, waited, ran in called:
            self._add(self.calls, app, outcome)
            if code:
                self._failed.append((code, "call"))
            self.wait_s[_bounded(self.wait_s, (app,))].add(waited)
            if ran is not None:
                self.run_s[_bounded(self.run_s, (app,))].add(ran)
        failed, self._failed = self._failed, []
        for labels in failed:
            self._add(self.failures, *labels)

    @staticmethod
    def _add(counter: Counter[Labels], *labels: str) -> None:
        counter[_bounded(counter, labels)] += 1

    def families(self, counted: Mapping[str, int], apps: Iterable[str]) -> list[Family]:
        """What there is to tell.

        Args:
            counted: the counters of `telemetry`.
            apps: those that have calls to come: told from 0 on, else the first failure of one were no increase.
        """
        self.count()
        for app_name in apps:
            for outcome in OUTCOMES:
                self.calls[_bounded(self.calls, (app_name, outcome))] += 0
        app = ("app",)
        return [
            Family("starts_total", "counter", "Starts of containers.", ("app", "kind", "result"), self.starts),
            Family("cold_starts_total", "counter", "Starts that thawed nothing.", ("app", "why"), self.cold),
            Family("start_seconds", "histogram", "From a start's request until it serves.", ("kind",), self.start_s),
            Family("start_phase_seconds", "histogram", "Parts of it.", ("kind", "phase"), self.phase_s),
            Family("calls_total", "counter", "Calls that are over.", ("app", "outcome"), self.calls),
            Family("call_wait_seconds", "histogram", "Until a container took the call.", app, self.wait_s),
            Family("call_run_seconds", "histogram", "In the container, the last attempt.", app, self.run_s),
            Family("failures_total", "counter", "By code: docs/failure-modes.md.", ("code", "what"), self.failures),
            *_counted_families(counted),
        ]


def _counted_families(counted: Mapping[str, int]) -> list[Family]:
    """Zero where nothing has been counted: else the first failure were no change."""
    found: dict[str, tuple[Labels, dict[Labels, float]]] = {}
    for name, (metric, label, value) in COUNTED.items():
        _, samples = found.setdefault(metric, ((label,) if label else (), {}))
        samples[(value,) if label else ()] = counted.get(name, 0)
    return [Family(name, "counter", _HELP[name], labels, samples) for name, (labels, samples) in found.items()]


def process_families(begun: float) -> list[Family]:
    """The daemon's own process. `begun`: Unix time of its start."""
    with open("/proc/self/statm") as f:
        resident = int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return [
        Family(name, kind, text, (), {(): value})
        for name, kind, text, value in (
            ("daemon_start_time_seconds", "gauge", "Unix time of its start.", begun),
            ("daemon_cpu_seconds_total", "counter", "Processor time of the daemon itself.", time.process_time()),
            ("daemon_memory_bytes", "gauge", "Resident memory of the daemon itself.", resident),
            ("daemon_open_fds", "gauge", "Its descriptors.", len(os.listdir("/proc/self/fd"))),
        )
    ]


# The text


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(value)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _labelled(names: Sequence[str], values: Sequence[str]) -> str:
    inner = ",".join(f'{name}="{_escaped(value)}"' for name, value in zip(names, values, strict=True))
    return f"{{{inner}}}" if inner else ""


def _lines(family: Family) -> Iterable[str]:
    name = f"woodfrog_{family.name}"
    yield f"# HELP {name} {_escaped(family.help)}"
    yield f"# TYPE {name} {family.kind}"
    for labels, value in sorted(family.samples.items()):
        if not isinstance(value, Histogram):
            yield f"{name}{_labelled(family.labels, labels)} {_number(value)}"
            continue
        bounds = [*map(_number, BUCKETS), "+Inf"]
        counts = list(accumulate(value.counts))
        for bound, count in zip(bounds, counts, strict=True):
            yield f"{name}_bucket{_labelled((*family.labels, 'le'), (*labels, bound))} {count}"
        yield f"{name}_sum{_labelled(family.labels, labels)} {_number(round(value.sum, 6))}"
        yield f"{name}_count{_labelled(family.labels, labels)} {counts[-1]}"


def render(families: Iterable[Family]) -> str:
    """The answer to a scrape."""
    return "".join(f"{line}\n" for family in families for line in _lines(family))
