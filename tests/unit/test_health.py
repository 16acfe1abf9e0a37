"""Who is set aside and for how long, over a driver that says what it is told to."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, cast

import pytest

from woodfrog.backends import health
from woodfrog.backends.gpus import Gpus
from woodfrog.backends.health import Health
from woodfrog.cuda.client import Cuda
from woodfrog.cuda.devices import Device
from woodfrog.cuda.failures import gpu_error
from woodfrog.cuda.health import Vitals
from woodfrog.errors import GpuError

MEMORY = 100 << 20
WELL = Vitals(memory=MEMORY, used=0)


class FakeCuda:
    """Answers what is put in `says`; the last of a list goes on."""

    def __init__(self) -> None:
        self.says: dict[str, list[Vitals | GpuError]] = {}
        self.asked: list[str] = []

    async def vitals(self, uuid: str) -> Vitals:
        self.asked.append(uuid)
        rows = self.says.get(uuid, [WELL])
        found = rows.pop(0) if len(rows) > 1 else rows[0]
        if isinstance(found, GpuError):
            raise found
        return found


class Rig:
    def __init__(self, **more: Any) -> None:
        self.cuda = FakeCuda()
        self.held: set[str] = set()
        self.told: list[dict[str, str]] = []
        gpus = Gpus(cast(Cuda, self.cuda), (Device("a", "A10", MEMORY), Device("b", "A10", MEMORY)))
        self.health = Health(gpus, held=lambda: self.held, tell=self.told.append, free_percent=75, **more)

    @property
    def sick(self) -> set[str]:
        return set(self.health.sick)


@pytest.fixture
def rig() -> Rig:
    return Rig()


async def test_one_that_is_well_is_given_out(rig: Rig) -> None:
    assert await rig.health.before_use(["a"]) is None and rig.told == [] and rig.cuda.asked == ["a"]


async def test_a_sick_one_is_refused_and_logged_once(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "woodfrog")
    rig.cuda.says["a"] = [Vitals(uncorrected=1), Vitals(uncorrected=2)]
    for _ in range(3):
        error = await rig.health.before_use(["a"])
        assert error is not None and error.code == "gpu-set-aside"
    assert "2 uncorrectable" in error.message and error.fields["gpus"] == rig.health.sick
    assert [set(t) for t in rig.told] == [{"a"}, {"a"}], "whoever gives them out knows the reason of now"
    assert [r.message for r in caplog.records if "set aside" in r.message] == [
        f"GPU a is set aside: {rig.told[0]['a']}"
    ]
    asked = len(rig.cuda.asked)
    assert await rig.health.before_use(["b"]) is None
    assert rig.cuda.asked[asked:] == ["b"], "nobody waits for one that hangs, perhaps"
    rig.cuda.says |= {"a": [WELL], "b": [Vitals(lost=True)]}
    await rig.health.check()
    assert set(rig.told[-1]) == {"b"} and "GPU a is used again" in caplog.messages
    rig.cuda.says |= {"a": [Vitals(lost=True)], "b": [WELL]}
    await rig.health.check()
    rig.cuda.says["b"] = [Vitals(lost=True)]
    await rig.health.check()
    rig.cuda.says["b"] = [WELL]
    assert await rig.health.before_use(["a"]) is not None
    assert rig.sick == {"a"}, "who had no other choice looks at all that are set aside"
    await rig.health.close()


async def test_memory_of_our_own_instances_is_no_reason(rig: Rig) -> None:
    rig.cuda.says["b"] = [Vitals(memory=MEMORY, used=MEMORY)]
    rig.held = {"b"}
    await rig.health.check()
    assert rig.sick == set()
    rig.held = set()
    await rig.health.check()
    assert rig.sick == {"b"}
    await rig.health.close()


async def test_memory_of_one_that_has_just_ended_is_waited_for(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    full = Vitals(memory=MEMORY, used=MEMORY)
    rig.cuda.says["a"] = [full, full, WELL]
    assert await rig.health.before_use(["a"]) is None and rig.told == []
    monkeypatch.setattr(health, "FREEING_S", 0.2)
    rig.cuda.says["a"] = [full]
    assert await rig.health.before_use(["a"]) is not None
    asked = len(rig.cuda.asked)
    rig.cuda.says["a"] = [Vitals(uncorrected=1)]
    assert await rig.health.before_use(["a"]) is not None
    assert len(rig.cuda.asked) == asked + 1, "nothing else gets better by waiting a moment"
    await rig.health.close()


async def test_one_that_hangs_is_set_aside_alone(rig: Rig) -> None:
    rig.cuda.says["a"] = [gpu_error("gpu-helper-hung", "a: vitals took over 5 s")]
    await rig.health.check()
    assert rig.sick == {"a"} and "did not return in time" in rig.health.sick["a"]
    rig.cuda.says["a"] = [gpu_error("gpu-helper-lost", "a: vitals"), WELL]
    await rig.health.check()
    assert rig.sick == set(), "a helper that went is asked once more"
    await rig.health.close()


async def test_a_look_ends_whatever_hangs(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(uuid: str) -> Vitals:
        await asyncio.sleep(60)
        raise AssertionError

    monkeypatch.setattr(rig.cuda, "vitals", never)
    async with asyncio.timeout(5):
        error = await rig.health.before_use(["a", "b"], within=0.05)
    assert error is not None and rig.sick == {"a", "b"} and "no answer within" in rig.told[0]["a"]
    await rig.health.close()


async def test_an_xid_counts_for_a_while_or_until_somebody_looks(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.health._on_xid("a", 31)
    assert rig.sick == set()
    rig.health._on_xid("a", 79)
    assert rig.sick == {"a"} and rig.told == [rig.health.sick] and "Xid 79" in rig.told[0]["a"]
    assert await rig.health.before_use(["a"]) is not None
    assert rig.health.view()[0]["xids"] == [31, 79]
    await rig.health.check()
    assert rig.sick == set() and rig.health.view()[0]["xids"] == []
    rig.health._on_xid("a", 79)
    monkeypatch.setattr(health, "XID_S", 0.0)
    assert await rig.health.before_use(["a"]) is None
    await rig.health.close()


async def test_it_is_tried_again_by_itself() -> None:
    rig = Rig(again_s=0.01)
    rig.cuda.says["a"] = [*[Vitals(uncorrected=1)] * 4, WELL]
    assert await rig.health.before_use(["a"]) is not None
    async with asyncio.timeout(5):
        while rig.sick:
            await asyncio.sleep(0.01)
    assert rig.told[-1] == {}
    asked = len(rig.cuda.asked)
    await asyncio.sleep(0.1)
    assert len(rig.cuda.asked) == asked, "nobody looks while all are well"
    rig.cuda.says["a"] = [Vitals(lost=True)]
    assert await rig.health.before_use(["a"]) is not None
    await asyncio.sleep(0.1)
    assert len(rig.cuda.asked) > asked + 1, "and again after it came back"
    await rig.health.close()
