"""Captures of tensors: how fast blocks are hashed, and what a capture costs when little, much or nothing changed.

    python benchmarks/tensors.py                        # 256 MiB, on the GPU too where there is one
    python benchmarks/tensors.py --mib 64 --rounds 2    # briefly

Writes benchmarks/results/tensors.json. benchmarks/README.md says what is measured. Needs torch.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest import mock

import blake3
import torch
from common import console, machine, number, save, summary, table

from woodfrog.settings import load
from woodfrog.tensors import Away, TensorTracker, Tree, link, restore
from woodfrog.tensors.hashing import Hasher

BLOCKS = (4096, 65536, 1 << 20)
CHANGED = (0.0, 0.01, 0.1, 1.0)
HOSTS_MIB = 64
"""What the host's hashes are measured on: they do not get faster with size."""


def timed(device: str, action: Callable[[], Any]) -> float:
    """Seconds."""
    settle(device)
    begin = time.perf_counter()
    action()
    settle(device)
    return time.perf_counter() - begin


def settle(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def rate(nbytes: int, seconds: list[float]) -> dict[str, Any]:
    """GB/s (10⁹ bytes)."""
    return summary([nbytes / s / 1e9 for s in seconds])


def hashes(device: str, nbytes: int, rounds: int) -> dict[str, Any]:
    """GB/s of each way, in turn within each round, after a round that does not count."""
    data = torch.randint(-128, 128, (nbytes,), dtype=torch.int8, device=device)
    arms: dict[str, tuple[int, int, Callable[[], Any]]] = {}
    for threads in sorted({1, torch.get_num_threads()}) if device == "cpu" else [1]:
        where = f", {threads} thread{'s' * (threads > 1)}" if device == "cpu" else ""
        for width in BLOCKS:
            sign = partial(Hasher(bytes(32), width).signatures, data)
            arms[f"signatures, blocks of {width >> 10} KiB{where}"] = (nbytes, threads, sign)
        arms[f"one copy, for comparison{where}"] = (nbytes, threads, data.clone)
    if device == "cpu":
        size = min(nbytes, HOSTS_MIB << 20)
        raw = memoryview(data[:size].numpy()).cast("B")
        for name, make in (("blake3", blake3.blake3), ("blake2b", hashlib.blake2b), ("sha256", hashlib.sha256)):
            arms[f"{name}, blocks of 64 KiB, 1 thread"] = (size, 1, partial(host, make, raw))
    taken: dict[str, list[float]] = {name: [] for name in arms}
    before = torch.get_num_threads()
    for counts in range(rounds + 1):
        for name, (_, threads, action) in arms.items():
            torch.set_num_threads(threads)
            seconds = timed(device, action)
            if counts:
                taken[name].append(seconds)
    torch.set_num_threads(before)
    return {name: rate(size, taken[name]) for name, (size, _, _) in arms.items()}


def host(make: Callable[[memoryview], Any], raw: memoryview) -> None:
    for at in range(0, len(raw), 65536):
        make(raw[at : at + 65536]).digest()


def captures(device: str, nbytes: int, rounds: int) -> dict[str, Any]:
    """Milliseconds and bytes of a capture, by size of block and share of blocks that changed."""
    found: dict[str, Any] = {}
    tensors = [torch.randint(-128, 128, (nbytes // 16,), dtype=torch.int8, device=device) for _ in range(16)]
    for width in BLOCKS:
        tracker = TensorTracker(tensors, block_bytes=width)
        begin = time.perf_counter()
        first = tracker.capture()
        full = (time.perf_counter() - begin) * 1e3
        assert first.nbytes == nbytes // 16 * 16
        rows = {}
        for share in CHANGED:
            taken, sizes = [], []
            for _ in range(rounds):
                for tensor in tensors:
                    count = tensor.numel() // width
                    picked = torch.randperm(count, device=device)[: round(count * share)]
                    tensor.view(count, width)[picked, 0] += 1
                settle(device)
                begin = time.perf_counter()
                delta = tracker.capture()
                taken.append((time.perf_counter() - begin) * 1e3)
                sizes.append(delta.nbytes)
            rows[f"{share:.0%}"] = {"ms": summary(taken), "mib": round(sizes[-1] / (1 << 20), 2)}
        found[f"{width >> 10} KiB"] = {"first_ms": round(full, 1), "changed": rows}
    whole = [TensorTracker(tensors).capture()]
    begin = time.perf_counter()
    back = restore(whole)
    found["restore_ms"] = round((time.perf_counter() - begin) * 1e3, 1)
    assert all(torch.equal(back[f"0.{i}"], tensor) for i, tensor in enumerate(tensors))
    return found


def trees(nbytes: int) -> dict[str, Any]:
    """Two states of which one block differs: what is read of their trees."""
    count = nbytes // 65536
    one = Tree.build([i.to_bytes(64, "little") for i in range(count)])
    two = one.replace({count // 2: bytes(64)})
    begin = time.perf_counter()
    assert one.differences(two) == [count // 2]
    return {"leaves": count, "reads": one.reads, "ms": round((time.perf_counter() - begin) * 1e3, 3)}


class InMemory:
    """For the CPU, in place of a device's streams and pinned memory: nothing is pinned, and copies are done at once."""

    def pinned(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.int8)

    def copy(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> InMemory:
        for source, target in pairs:
            target.copy_(source)
        return self

    def synchronize(self) -> None:
        pass


def away(device: str, nbytes: int, rounds: int) -> dict[str, Any]:
    """GB/s out, and back: plainly, and through buffers that threads fill, in turn within each round."""
    tensors = [torch.ones(nbytes // 16, dtype=torch.int8, device=device) for _ in range(16)]
    staged = "staged, from memory to memory: what buffers and threads cost" if device == "cpu" else "staged"
    leaving: list[float] = []
    coming: dict[str, list[float]] = {"plain": [], staged: []}
    for _ in range(rounds):
        for name, taken in coming.items():
            gone = Away(tensors, devices=[device], **({"staging_bytes": 0} if name == "plain" else {}))
            leaving.append(timed(device, gone.leave))
            with mock.patch.object(link, "find", lambda _: InMemory()) if device == "cpu" else nullcontext():
                taken.append(timed(device, gone.come_back))
    found = {name: rate(nbytes, taken) for name, taken in coming.items()}
    return {"leave": rate(nbytes, leaving), "come_back": found}


def show(device: str, found: dict[str, Any]) -> None:
    table(
        f"{device}: GB/s",
        ("", "min", "median", "max"),
        [
            (name, *(number(x, 2) for x in (v["min"], v["median"], max(v["values"]))))
            for name, v in found["hash_gb_s"].items()
        ],
    )
    rows = []
    for width, row in found["captures"].items():
        if isinstance(row, dict):
            rows += [(width, "first", number(row["first_ms"]), "")]
            rows += [(width, s, number(c["ms"]["median"]), number(c["mib"], 1)) for s, c in row["changed"].items()]
    table(f"{device}: a capture", ("blocks", "changed", "ms", "MiB"), rows)
    moved = {"out": found["away_gb_s"]["leave"]} | {f"back, {k}": v for k, v in found["away_gb_s"]["come_back"].items()}
    table(
        f"{device}: put away and back, GB/s",
        ("", "min", "median", "max"),
        [(name, *(number(x, 2) for x in (v["min"], v["median"], max(v["values"])))) for name, v in moved.items()],
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=256, help="size of the state (default 256)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="torch's threads on the CPU (default: all cores)")
    parser.add_argument("--json", help="write the result here")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    nbytes = options.mib << 20
    result: dict[str, Any] = {
        "machine": machine(load()),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "mib": options.mib,
        "rounds": options.rounds,
        "tree": trees(nbytes),
        "devices": {},
    }
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        found: dict[str, Any] = {"name": "CPU" if device == "cpu" else torch.cuda.get_device_name()}
        found["hash_gb_s"] = hashes(device, nbytes, options.rounds)
        found["captures"] = captures(device, nbytes, options.rounds)
        found["away_gb_s"] = away(device, nbytes, options.rounds)
        result["devices"][device] = found
        show(device, found)
    console.print(f"\nwritten to {save('tensors', result, options.json)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
