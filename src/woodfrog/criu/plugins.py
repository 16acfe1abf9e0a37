"""AMD's plugin of CRIU, which captures and restores what a process has on AMD GPUs: whether it is there, and where."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

__all__ = ["AMD_PLUGIN", "find_amd_plugin", "plugin_places"]

AMD_PLUGIN = "amdgpu_plugin.so"


def plugin_places(criu: Path, environ: Mapping[str, str] | None = None) -> tuple[Path, ...]:
    """Directories where plugins of this criu may be: what its own variable names, its prefix, the system's."""
    named = (os.environ if environ is None else environ).get("CRIU_LIBS_DIR", "")
    prefixes = dict.fromkeys((criu.parent.parent, Path("/usr"), Path("/usr/local")))
    libraries = ("lib", "lib64", f"lib/{os.uname().machine}-linux-gnu")
    return (*((Path(named),) if named else ()), *(p / lib / "criu" for p in prefixes for lib in libraries))


def find_amd_plugin(criu: Path, environ: Mapping[str, str] | None = None) -> Path | None:
    """The directory that has it; None = it is not installed."""
    return next((p for p in plugin_places(criu, environ) if (p / AMD_PLUGIN).is_file()), None)
