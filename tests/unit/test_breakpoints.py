"""The counter that keeps hardware breakpoints switched on."""

from __future__ import annotations

import os
import platform

import pytest

from woodfrog.linux.breakpoints import keep_quick


@pytest.mark.root
def test_it_is_a_counter_until_it_is_closed() -> None:
    def counters() -> list[str]:
        paths = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
        return [p for p in paths if os.path.islink(p) and "perf_event" in os.readlink(p)]

    before = counters()
    quick = keep_quick()
    if quick is None:
        pytest.skip("the kernel allows no performance counters here")
    (path,) = set(counters()) - set(before)
    assert not os.get_inheritable(int(path.rpartition("/")[2]))
    os.close(quick)
    assert counters() == before


def test_a_processor_that_is_not_known_goes_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "vax")
    assert keep_quick() is None
