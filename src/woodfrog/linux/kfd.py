"""AMD's GPUs of this machine, as the kernel's compute driver (KFD) lists them in /sys."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["KfdGpu", "find_kfd", "parse_properties"]

TOPOLOGY = Path("/sys/class/kfd/kfd/topology/nodes")
DRM = Path("/sys/class/drm")
LOCAL_HEAPS = (1, 2)
"""Kinds of memory banks that are the GPU's own."""


@dataclass(frozen=True)
class KfdGpu:
    """One GPU. `id`: what ROCR_VISIBLE_DEVICES takes (`GPU-…`); empty for chips that have no number of their own.
    `render`: of its node `/dev/dri/renderD…`."""

    id: str
    chip: str
    render: int
    memory: int


def parse_properties(text: str) -> dict[str, int]:
    """A `properties` file of the topology: a name and a number a line.

    >>> parse_properties("simd_count 304\\nunique_id 7")
    {'simd_count': 304, 'unique_id': 7}
    """
    rows = (line.split() for line in text.splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdigit()}


def _chip(found: dict[str, int], drm: Path) -> str:
    try:
        name = (drm / f"renderD{found['drm_render_minor']}" / "device" / "product_name").read_text().strip()
    except OSError:
        name = ""
    if not name:
        version = found.get("gfx_target_version", 0)
        name = f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"
    return name if name.startswith("AMD") else f"AMD {name}"


def find_kfd(topology: Path = TOPOLOGY, drm: Path = DRM) -> tuple[KfdGpu, ...]:
    """The GPUs that programs can compute on, in the driver's order; none where there is no such driver."""
    gpus = []
    for node in sorted(topology.glob("[0-9]*"), key=lambda p: int(p.name)):
        try:
            found = parse_properties((node / "properties").read_text())
            banks = [parse_properties(p.read_text()) for p in node.glob("mem_banks/*/properties")]
        except OSError:
            continue  # not for this container
        if not found.get("simd_count") or found.get("drm_render_minor", 0) <= 0:
            continue  # a processor
        unique = found.get("unique_id", 0)
        memory = sum(b.get("size_in_bytes", 0) for b in banks if b.get("heap_type") in LOCAL_HEAPS)
        gpus.append(
            KfdGpu(f"GPU-{unique:016x}" if unique else "", _chip(found, drm), found["drm_render_minor"], memory)
        )
    return tuple(gpus)
