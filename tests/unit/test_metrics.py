"""What a scrape tells: the format, what is counted under which name, and that it stays bounded."""

from __future__ import annotations

import re
import time
from pathlib import Path

import woodfrog
from woodfrog.daemon import metrics
from woodfrog.daemon.metrics import COUNTED, OTHER, SERIES, Family, Metrics, render
from woodfrog.daemon.starts import Start
from woodfrog.telemetry import Phase

SAMPLE = re.compile(r'[a-z_]+(\{[a-z]+="(?:[^"\\\n]|\\.)*"(?:,[a-z]+="(?:[^"\\\n]|\\.)*")*\})? -?[0-9.e+-]+')


def start(app: str = "demo", **more: object) -> Start:
    return Start(app, 1, "f", "i-1", **{"kind": "thawed", "result": "ready", "ms": 40.0, **more})  # type: ignore[arg-type]


def text_of(found: Metrics, **counted: int) -> list[str]:
    return render(found.families(counted, ["demo"])).splitlines()


def test_every_line_is_of_the_format() -> None:
    found = Metrics()
    found.started('an"odd\\name\n', start(phases=[Phase("restore", 0, 30), Phase("made-by-a-worker", 0, 1)]))
    found.started("demo", start(kind="cold", why="none-fits", result="failed", code="startup-enter"))
    found.called("demo", "success", "", 0.001, 0.25)
    found.called("demo", "failure", "timeout", 0.1, None)
    found.failed("capture", "io-uring")
    lines = text_of(found)
    names = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(names) == len(set(names)) and all(name.startswith("woodfrog_") for name in names)
    assert all(SAMPLE.fullmatch(line) for line in lines if not line.startswith("# ")), lines
    assert r'woodfrog_starts_total{app="an\"odd\\name\n",kind="thawed",result="ready"} 1' in lines
    assert 'woodfrog_cold_starts_total{app="demo",why="none-fits"} 1' in lines
    assert 'woodfrog_calls_total{app="demo",outcome="exception"} 0' in lines, "from 0 on"
    assert 'woodfrog_start_seconds_bucket{kind="thawed",le="0.02"} 0' in lines
    assert 'woodfrog_start_seconds_bucket{kind="thawed",le="0.05"} 1' in lines
    assert 'woodfrog_start_seconds_bucket{kind="thawed",le="+Inf"} 1' in lines
    assert 'woodfrog_start_seconds_count{kind="thawed"} 1' in lines, "one that failed says nothing of times"
    assert 'woodfrog_start_phase_seconds_sum{kind="thawed",phase="restore"} 0.03' in lines
    assert not any("made-by-a-worker" in line for line in lines)
    assert 'woodfrog_call_run_seconds_count{app="demo"} 1' in lines
    assert 'woodfrog_call_wait_seconds_count{app="demo"} 2' in lines
    for code, what in (("timeout", "call"), ("startup-enter", "start"), ("io-uring", "capture")):
        assert f'woodfrog_failures_total{{code="{code}",what="{what}"}} 1' in lines


def test_what_others_name_makes_no_series_without_end() -> None:
    """Apps and, by way of a worker, codes of failures."""
    found = Metrics()
    for n in range(3 * SERIES):
        found.started(f"app{n}", start(kind="cold", why="off"))
        found.called(f"app{n}", "failure", f"startup-{n}", 0.0, 1.0)
    lines = text_of(found)
    assert len(lines) < 5 * (SERIES + 10) + 2 * 18 * (SERIES + 10)
    assert sum(line.startswith("woodfrog_failures_total") for line in lines) <= SERIES + 1
    [rest] = [line for line in lines if line.startswith(f'woodfrog_calls_total{{app="{OTHER}",outcome="failure"}}')]
    assert int(rest.split()[-1]) >= SERIES
    total = sum(int(line.split()[-1]) for line in lines if line.startswith("woodfrog_starts_total"))
    assert total == 3 * SERIES, "all are counted"


def test_every_counter_of_the_daemon_is_told() -> None:
    """What counts something new says here under which name a scraper sees it."""
    source = Path(woodfrog.__file__).parent
    names = {
        name
        for path in source.rglob("*.py")
        for name in re.findall(r'\bcounters\[f?"([a-z.{}_-]+)', path.read_text())
        if not name.startswith(("start.", "call."))  # they have metrics of their own
    }
    assert names == COUNTED.keys()
    lines = text_of(Metrics(), **{"pages.faults": 7})
    assert 'woodfrog_pages_total{how="faults"} 7' in lines
    assert 'woodfrog_captures_total{result="failed"} 0' in lines and "woodfrog_page_server_deaths_total 0" in lines


def test_what_is_put_down_is_counted_though_nobody_asks() -> None:
    found = Metrics()
    for _ in range(10 * metrics._PENDING):
        found.called("demo", "success", "", 0.0, 0.0)
        found.started("demo", start())
        found.failed("capture", "x")
    assert max(len(found._called), len(found._started), len(found._failed)) < metrics._PENDING
    assert found.calls["demo", "success"] > 9 * metrics._PENDING


def test_the_daemon_s_own_process() -> None:
    values = {f.name: f.samples[()] for f in metrics.process_families(5.0)}
    assert values["daemon_start_time_seconds"] == 5.0 and values["daemon_memory_bytes"] > 1 << 20  # type: ignore[operator]
    assert 0 < values["daemon_cpu_seconds_total"] <= time.process_time() and values["daemon_open_fds"] > 2  # type: ignore[operator]


def test_numbers() -> None:
    odd = Family("x", "gauge", "a\nb", (), {(): 0.1})
    assert render([odd]) == "# HELP woodfrog_x a\\nb\n# TYPE woodfrog_x gauge\nwoodfrog_x 0.1\n"
    assert render([Family("x", "gauge", "", (), {(): 3e20})]).endswith(" 3e+20\n")
