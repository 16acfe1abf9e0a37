"""AMD's GPUs: which there are, what a sandbox gets of them, where CRIU's plugin is. None of it ran on one."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from woodfrog.backends import gpus as backend
from woodfrog.backends.gpus import amd_gpus
from woodfrog.control.gpus import fits
from woodfrog.criu.options import NO_PLUGINS, Dump, Restore, dump_command, restore_command
from woodfrog.criu.plugins import AMD_PLUGIN, find_amd_plugin, plugin_places
from woodfrog.engine.engine import AmdSide
from woodfrog.engine.inspect import Descriptor, Task, Tree
from woodfrog.engine.plan import dump_plan, facts_of, parse_facts, refuse, restore_plan
from woodfrog.linux.kfd import KfdGpu, find_kfd
from woodfrog.snapshot.compat import HostFacts, worker_class

TASK = Task(pid=1000, inner_pid=100, name="python3", state="S", start_ticks=1)
KFD = Descriptor(3, "/dev/kfd", device=(511, 0))
RENDER = Descriptor(4, "/dev/dri/renderD129", device=(226, 129))
ROCM = Tree((TASK, replace(TASK, pid=1001, inner_pid=101, descriptors=(KFD, RENDER), special_maps=("/dev/kfd",))))
TWO = (
    KfdGpu("GPU-00000000000000ab", "AMD Instinct MI300X OAM", 128, 192 << 30),
    KfdGpu("", "AMD gfx1100", 129, 24 << 30),
)


def test_what_the_kernel_lists(tmp_path: Path) -> None:
    nodes, drm = tmp_path / "nodes", tmp_path / "drm"

    def node(number: int, banks: dict[int, int], **properties: int) -> None:
        for index, (kind, size) in enumerate(banks.items()):
            bank = nodes / str(number) / "mem_banks" / str(index)
            bank.mkdir(parents=True)
            (bank / "properties").write_text(f"heap_type {kind}\nsize_in_bytes {size}\n")
        text = "".join(f"{key} {value}\n" for key, value in properties.items())
        (nodes / str(number) / "properties").write_text(text)

    node(0, {0: 1 << 40}, cpu_cores_count=64, simd_count=0, drm_render_minor=0)
    node(10, {1: 24 << 30}, simd_count=96, drm_render_minor=129, gfx_target_version=110000, unique_id=0)
    node(9, {2: 192 << 30, 0: 5}, simd_count=1216, drm_render_minor=128, gfx_target_version=90402, unique_id=0xAB)
    (nodes / "11").mkdir()  # of another container: nothing can be read
    (drm / "renderD128" / "device").mkdir(parents=True)
    (drm / "renderD128" / "device" / "product_name").write_text("AMD Instinct MI300X OAM\n")
    assert find_kfd(nodes, drm) == TWO
    assert find_kfd(tmp_path / "none", drm) == ()
    assert fits("MI300X", TWO[0].chip) and fits("gfx1100", TWO[1].chip) and not fits("MI300", TWO[0].chip)


@pytest.mark.parametrize(("version", "chip"), [(90010, "AMD gfx90a"), (90402, "AMD gfx942"), (100302, "AMD gfx1032")])
def test_a_chip_without_a_name(tmp_path: Path, version: int, chip: str) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "properties").write_text(f"simd_count 8\ndrm_render_minor 128\ngfx_target_version {version}\n")
    assert [g.chip for g in find_kfd(tmp_path, tmp_path)] == [chip]


def test_where_the_plugin_is(tmp_path: Path) -> None:
    criu = tmp_path / "sbin" / "criu"
    assert plugin_places(criu, {})[0] == tmp_path / "lib" / "criu"
    assert Path("/usr/lib/criu") in plugin_places(criu, {})
    folder = tmp_path / "lib64" / "criu"
    folder.mkdir(parents=True)
    assert find_amd_plugin(criu, {}) != folder
    (folder / AMD_PLUGIN).touch()
    assert find_amd_plugin(criu, {}) == folder
    named = tmp_path / "named"
    named.mkdir()
    assert find_amd_plugin(criu, {"CRIU_LIBS_DIR": str(named)}) == folder, "it is not there"
    (named / AMD_PLUGIN).touch()
    assert find_amd_plugin(criu, {"CRIU_LIBS_DIR": str(named)}) == named


def test_what_a_sandbox_gets(tmp_path: Path) -> None:
    (tmp_path / "dri").mkdir()
    for name in ("kfd", "dri/renderD128", "dri/renderD129", "dri/card0"):
        (tmp_path / name).touch()
    gpus = amd_gpus(TWO, Path("/usr/lib/criu"), tmp_path, "6.8.5")
    first, second = (d.uuid for d in gpus.devices)
    assert [n.name for n in gpus.device_nodes((first,))] == ["kfd", "dri/renderD128"]
    assert gpus.device_nodes(()) == () and gpus.env(()) == {} and gpus.side(()) is None
    assert gpus.env((first,)) == {"ROCR_VISIBLE_DEVICES": "GPU-00000000000000ab", "HIP_VISIBLE_DEVICES": "0"}
    assert gpus.env((second,)) == {"HIP_VISIBLE_DEVICES": "0"}, "it has no name that ROCr knows"
    assert gpus.side((first,)) == AmdSide(Path("/usr/lib/criu"))
    base = worker_class(HostFacts("x86_64", (), "6.18", "4.2.1", "r", 4096))
    mine = gpus.worker_class(base, (first,))
    assert (mine.parts["gpu"], mine.parts["driver"]) == ("AMD Instinct MI300X OAM", "6.8.5")
    assert mine.digest != gpus.worker_class(base, (second,)).digest


@pytest.mark.parametrize(("plugin", "code"), [(None, "gpu-device"), (False, "gpu-amd-plugin"), (True, "")])
def test_a_rocm_process_is_captured_with_the_plugin_or_refused_by_name(plugin: bool | None, code: str) -> None:
    refusal = refuse(ROCM, amd_plugin=plugin)
    assert (refusal.code if refusal else "") == code
    if refusal:
        assert "process 101 (python3), descriptor 3, /dev/kfd" in refusal.cause
    mapped = Tree((replace(TASK, special_maps=("/dev/dri/renderD129",)),))
    refusal = refuse(mapped, amd_plugin=plugin)
    assert (refusal.code if refusal else "") == code


def test_the_plugin_is_given_to_criu_where_it_is_needed() -> None:
    dumped = dump_command("criu", dump_plan(ROCM, plugins="/usr/lib/criu"))
    assert dumped[dumped.index("--libdir") + 1] == "/usr/lib/criu"
    for plan in (dump_plan(Tree((TASK,)), plugins="/usr/lib/criu"), Dump(100, "/img", "dump.log")):
        other = dump_command("criu", plan)
        assert other[other.index("--libdir") + 1] == NO_PLUGINS, "none, not whatever lies in CRIU's own directory"
    facts = replace(facts_of(ROCM, monotonic_ns=5, criu="4.2"), sizes={"a.img": 1})
    assert facts.amd and parse_facts(facts.to_json()) == facts
    restored = restore_command("criu", restore_plan(facts, monotonic_ns=6, plugins="/p"))
    assert restored[restored.index("--libdir") + 1] == "/p"
    plain = replace(facts, amd=False)
    assert "amd" not in plain.to_json() and parse_facts(plain.to_json()) == plain
    assert restore_plan(plain, monotonic_ns=6, plugins="/p") == Restore(
        "/run/woodfrog/img", "/run/woodfrog/criu", "restore.log"
    )


async def test_gpus_are_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backend, "DEV", tmp_path)
    monkeypatch.setattr(backend, "find_kfd", lambda: TWO)
    monkeypatch.setattr(backend, "find_amd_plugin", lambda criu: None)
    none = await backend.find_gpus("", "", Path("/usr/sbin/criu"))
    assert none.devices == () and "no NVIDIA device" in none.why
    (tmp_path / "kfd").touch()
    (tmp_path / "kfd").chmod(0o660)
    with caplog.at_level(logging.WARNING, "woodfrog"):
        found = await backend.find_gpus("", "", Path("/usr/sbin/criu"))
    assert [d.name for d in found.devices] == [g.chip for g in TWO] and found.amd == AmdSide(None)
    assert "is not open to all users" in caplog.text and "amdgpu_plugin.so" in caplog.text
    assert (await backend.find_gpus("none", "", Path("/usr/sbin/criu"))).devices == ()
