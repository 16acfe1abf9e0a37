"""A restore of a process with its device memory against plain driver calls and CRIU one after the other; the driver's
own rate beside raw copies; several processes at once or in turn; a hundred freezes and thaws.

    python benchmarks/gpu/restore.py                               # 8 GiB, all parts
    python benchmarks/gpu/restore.py --parts bound,several         # what needs no CRIU
    python benchmarks/gpu/restore.py --fake                        # the harness alone, on the fake driver of the tests

Writes benchmarks/results/gpu/restore.json, after each part. benchmarks/README.md says what each arm is.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from common import console, machine, save
from common_gpu import fake_hardware, gpu_facts, missing, refuse_fake_results
from restore_arms import part_restore, show_restore
from restore_bench import GIB, Bench, says
from restore_cycles import part_cycles, show_cycles
from restore_driver import part_bound, part_several, show_bound, show_several

from engine_rig import Rig
from woodfrog.backends.gpus import find_gpus, library_path
from woodfrog.criu.binary import Criu
from woodfrog.errors import HostError
from woodfrog.settings import load

PARTS: dict[str, tuple[Callable[..., Awaitable[None]], Callable[[dict[str, Any]], None]]] = {
    "restore": (part_restore, show_restore),
    "bound": (part_bound, show_bound),
    "several": (part_several, show_several),
    "cycles": (part_cycles, show_cycles),
}


async def measure(options: argparse.Namespace, hardware: Any) -> int:
    task = asyncio.current_task()
    assert task is not None
    # One that is stopped takes its sandboxes with it.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    settings = load()
    result: dict[str, Any] = {
        "machine": machine(settings),
        "gpu": {"name": "fake"} if options.fake else gpu_facts(),
        "parts": {},
        "failed": {},
    }

    def write() -> None:
        if options.json or not options.fake:
            save("gpu/restore", result, options.json)

    under = Path(options.under)
    with tempfile.TemporaryDirectory(prefix="wfb-gpu-", dir=under) as folder:
        home = Path(folder)
        home.chmod(0o755)
        try:
            rig = Rig.make(home)
        except HostError as e:  # the other parts do without
            rig = Rig(home, Criu(Path("none"), (0, 0, 0)))
            result["failed"] = {name: says(e) for name in ("restore", "cycles") if name in options.parts}
        rig.hardware = hardware
        place = str(hardware.folder) if hardware is not None else settings.cuda_dir
        library = library_path(place)
        gpus = await find_gpus("", place)
        if not gpus.devices or gpus.cuda is None:
            console.print(f"gpu/restore.py: nothing measured: {gpus.why or 'no NVIDIA GPU'}")
            return 1
        rig.nodes = lambda indexes: gpus.device_nodes([gpus.devices[i].uuid for i in indexes])
        bench = Bench(
            home,
            rig,
            gpus,
            gpus.env([gpus.devices[0].uuid]) | ({"LD_LIBRARY_PATH": library} if library else {}),
            under,
            options.rounds,
            options.cycles,
            cycle_bytes=8 << 20 if options.fake else 256 << 20,
            copy_bytes=16 << 20 if options.fake else int(min(2.0, options.sizes[-1]) * GIB),
            seconds=options.seconds,
        )
        try:
            for name, (part, show) in PARTS.items():
                if name not in options.parts or name in result["failed"]:
                    continue
                if bench.over(name):
                    result["failed"][name] = "left out, the time is over (--seconds)"
                    continue

                def keep(found: dict[str, Any], name: str = name) -> None:
                    result["parts"][name] = found
                    write()

                try:
                    await part(bench, [int(s * GIB) for s in options.sizes], keep)
                except (Exception, SystemExit) as e:
                    result["failed"][name] = says(e)
                # Also of a part that failed half-way.
                if name in result["parts"]:
                    show(result["parts"][name])
                write()
        finally:
            await rig.close()
            await gpus.close()
    for name, why in result["failed"].items():
        console.print(f"[red]{name}: {why}", soft_wrap=True)
    if options.json or not options.fake:
        console.print(f"Numbers in {save('gpu/restore', result, options.json)}")
    cycles = result["parts"].get("cycles", {})
    return 1 if result["failed"] or cycles.get("failures") or cycles.get("leaks") else 0


def numbers(text: str) -> tuple[float, ...]:
    return tuple(sorted(float(x) for x in text.split(",")))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=numbers, help="GiB on the GPU (default: 8)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cycles", type=int, default=100, help="freezes and thaws of a small process (default: 100)")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--seconds", type=float, default=400.0, help="begin nothing after so long (default: 400)")
    parser.add_argument("--under", default="/var/tmp", help="where images go")
    parser.add_argument("--fake", action="store_true", help="tiny processes on the fake driver of the tests")
    parser.add_argument(
        "--json", help="where the numbers go (default: benchmarks/results/gpu/restore.json; of --fake: nowhere)"
    )
    options = parser.parse_args()
    options.parts = options.parts.split(",")
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    refuse_fake_results(parser, options)
    if not options.fake and (why := missing(torch=False)):
        console.print(f"gpu/restore.py: nothing measured: {why}")
        return 0
    options.sizes = options.sizes or ((0.03125,) if options.fake else (8.0,))
    mib = int(options.sizes[-1] * 2048) + 256
    with fake_hardware(mib) if options.fake else contextlib.nullcontext() as hardware:
        try:
            return asyncio.run(measure(options, hardware))
        except asyncio.CancelledError:
            return 128 + signal.SIGTERM


if __name__ == "__main__":
    sys.exit(main())
