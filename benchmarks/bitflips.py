"""Single bits turned over in a stored snapshot: is each one found before the process runs, and every call answered?

    python benchmarks/bitflips.py                    # 1000 flips
    python benchmarks/bitflips.py --count 20 --seed 3

Exit status 1 when a flip was not found or a call not answered rightly. Writes benchmarks/results/bitflips.json.
benchmarks/README.md says what is flipped.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import Daemon, console, machine, program, save, table

from woodfrog.errors import WoodfrogError

APP, CLS = "bitflips", "Tiny"
RESTART_EVERY = 20
HINTS = ("working-set",)
"""Not under the signature: they say which pages come first, never what is in them."""

UNREAD = ("pack .names", "pack .delta")
"""Read when a pack's pages are verified, once by each daemon and after each change of them. With a delta's pages there,
the delta itself is not read at all."""


class Flip:
    """One bit of one file, turned over in place: size and everything else stay as they are."""

    def __init__(self, path: Path, at: int, bit: int) -> None:
        self.path, self.kind, self.at, self.bit = path, kind_of(path), at, bit
        self._file = open(path, "r+b", buffering=0)  # noqa: SIM115 - it may be replaced before the bit is turned back
        self._turn()

    def _turn(self) -> None:
        byte = os.pread(self._file.fileno(), 1, self.at)[0]
        os.pwrite(self._file.fileno(), bytes([byte ^ 1 << self.bit]), self.at)

    def undo(self) -> bool:
        """Turn it back; whether the file was still the one that would be used."""
        with self._file:
            self._turn()
            try:
                return os.stat(self.path).st_ino == os.fstat(self._file.fileno()).st_ino
            except FileNotFoundError:
                return False


def kind_of(path: Path) -> str:
    name = path.name
    for group, names in {"manifest": ("manifest.json", "manifest.sig"), "hint": HINTS}.items():
        if name in names:
            return group
    if path.suffix in (".pages", ".names", ".delta"):
        return f"pack {path.suffix}"
    if name.startswith("pages-"):
        return "pages of the images"
    return "images" if "img" in str(path.parent.name) else "files"


def files_of(home: Path, snapshot: str) -> list[Path]:
    """Every file that a restore of the snapshot rests on."""
    root = home / "snapshots" / snapshot
    manifest = json.loads((root / "manifest.json").read_text())
    found = [root / name for name in ("manifest.json", "manifest.sig", *HINTS)]
    found += [root / entry["path"] for entry in manifest["files"]]
    found += [p for pack in manifest["packs"] for p in home.glob(f"store/packs/{pack[:2]}/{pack}.*")]
    return sorted(p for p in found if p.exists() and p.stat().st_size)


def flip_one(random_: random.Random, files: list[Path]) -> Flip:
    """Half of them anywhere in all bytes, half in any file: most files are small, most bytes are memory."""
    sizes = [p.stat().st_size for p in files]
    path = random_.choices(files, sizes if random_.random() < 0.5 else None)[0]
    return Flip(path, random_.randrange(path.stat().st_size), random_.randrange(8))


@dataclass
class Found:
    """What came of the flips so far."""

    kinds: Counter[str] = field(default_factory=Counter)
    forms: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    missed: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    unread: int = 0


class Bench:
    def __init__(self, daemon: Daemon, random_: random.Random, found: Found) -> None:
        self.daemon, self.random, self.found = daemon, random_, found
        self.number = 0
        daemon.deploy(APP, program("bursts"), [CLS], scaledown_window=600.0)
        self.call()

    def call(self) -> str | None:
        """One call, and what is wrong with its answer."""
        self.number += 1
        try:
            answer = self.daemon.call(APP, f"{CLS}.check", self.number)
        except (WoodfrogError, ValueError) as e:
            return f"{type(e).__name__}: {e}"
        return None if answer == self.number * 2 else f"{answer} for {self.number}"

    def start_of(self, what: str) -> str:
        """How the container of one more call was started; a wrong answer is noted."""
        if wrong := self.call():
            self.found.failed.append(f"{what}: {wrong}")
            return "none"
        return str(self.daemon.last_trace(APP)["start"])

    def state(self, snapshot: str) -> dict[str, Any] | None:
        rows = self.daemon.client.request("GET", "/snapshots").json()["snapshots"]
        return next((r for r in rows if r["id"] == snapshot), None)

    def flip(self, turn: int) -> None:
        daemon, found = self.daemon, self.found
        snapshot = daemon.wait_for_snapshot(APP)["id"]
        form = daemon.wait_for_packing(APP) if daemon.settings.pack else "loose"
        daemon.stop_containers()
        restart = turn % RESTART_EVERY == RESTART_EVERY - 1
        if restart:
            daemon.stop()
        flip = flip_one(self.random, files_of(daemon.home, snapshot))
        found.forms[form] += 1
        if restart:
            daemon.start()
        what = f"flip {turn}: bit {flip.bit} of byte {flip.at} in {flip.path.relative_to(daemon.home)}"
        start = self.start_of(what)
        if start == "restore" and flip.kind in UNREAD and not restart:
            # This daemon has verified the pack's pages, and they have not changed: nothing else of it was read.
            found.unread += 1
            daemon.stop()
            daemon.start()
            restart, start = True, self.start_of(what)
        row = self.state(snapshot)
        stood = flip.undo()
        kind = flip.kind if stood or flip.kind == "hint" else "replaced before its use"
        used = kind == flip.kind and kind not in ("hint", "pack .delta")
        found.kinds[kind] += 1
        if start == "restore" and used:
            found.missed.append(what)
        if start != "restore" and used and (row is None or row["state"] == "ready") and not restart:
            found.missed.append(f"{what}: started {start}, but the snapshot is {row and row['state']}")
        if row is not None and row["state"] != "ready":
            why = str(row.get("why") or row["state"]).split(": ")
            found.reasons[" ".join(why[-1].split()[-3:])] += 1
        with contextlib.suppress(WoodfrogError):
            if row is not None and start != "restore":
                daemon.client.request("POST", f"/snapshots/{snapshot}/invalidate")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", help="where the numbers go (default: benchmarks/results/bitflips.json)")
    options = parser.parse_args()
    random_, found = random.Random(options.seed), Found()
    seconds, done = 0.0, 0
    # Both forms that a snapshot has on a disk. Small memory goes through the page server all the same, as most
    # snapshots do; and each flip costs a snapshot.
    for pack, count in ((True, options.count - options.count // 4), (False, options.count // 4)):
        with Daemon(lazy_min_mib=1, capture_attempts=1 << 30, pack=pack) as daemon:
            facts = machine(daemon.settings)
            bench = Bench(daemon, random_, found)
            begin = time.monotonic()
            for turn in range(count):
                bench.flip(turn)
                done += 1
                if done % 50 == 0:
                    now = seconds + time.monotonic() - begin
                    console.print(
                        f"   {done} flips, {len(found.missed)} not found, {len(found.failed)} failed, {now:.0f} s"
                    )
            seconds += time.monotonic() - begin
    result = {
        "machine": facts,
        "count": options.count,
        "seed": options.seed,
        "seconds": round(seconds, 1),
        "by_kind": dict(sorted(found.kinds.items())),
        "by_form": dict(sorted(found.forms.items())),
        "reasons": dict(found.reasons.most_common()),
        "first_unread": found.unread,
        "not_found": found.missed,
        "not_answered": found.failed,
    }
    table(
        f"{options.count} single bits turned over in {seconds:.0f} s",
        ("in", "flips"),
        [[k, str(v)] for k, v in result["by_kind"].items()],
    )
    for line in (*found.missed[:20], *found.failed[:20]):
        console.print(f"[red]{line}", soft_wrap=True)
    console.print(
        f"{len(found.missed)} not found, {len(found.failed)} calls not answered rightly. "
        f"Numbers in {save('bitflips', result, options.json)}"
    )
    return 1 if found.missed or found.failed else 0


if __name__ == "__main__":
    sys.exit(main())
