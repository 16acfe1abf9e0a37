"""What type checkers make of a program: the types of calls, as Modal's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import asyncio
from collections.abc import Iterator
from typing import assert_type

import woodfrog as modal

app = modal.App("typed", image=modal.Image.debian_slim().pip_install("numpy"))


@app.function(cpu=(0.5, 2.0), memory=1024, retries=modal.Retries(max_retries=3))
def plain(a: str, n: int = 3) -> float:
    return float(a) + n


@app.function()
async def later(flag: bool) -> str:
    return str(flag)


@app.function()
def many(n: int) -> Iterator[int]:
    yield from range(n)


@app.cls(enable_memory_snapshot=True)
class Model:
    @modal.enter(snap=True)
    def load(self) -> None: ...

    @modal.method()
    def run(self, a: str) -> int:
        return self.length(a) + self.length.local(a)

    @modal.method()
    def length(self, a: str) -> int:
        return len(a)

    @modal.method()
    async def later(self, a: str) -> str:
        return a


assert_type(plain.remote("a", n=2), float)
assert_type(plain.local("a"), float)
assert_type(plain("a"), float)
assert_type(later.remote(True), str)
assert_type(plain.spawn("a"), modal.FunctionCall[float])
assert_type(plain.spawn("a").get(timeout=3), float)
assert_type(Model().run.remote("a"), int)
assert_type(Model().later.remote("a"), str)
for item in many.remote_gen(3):
    print(item)


async def main() -> None:
    assert_type(await plain.remote.aio("a"), float)
    assert_type(await later.remote.aio(True), str)
    assert_type(await later.local(True), str)
    assert_type(await Model().run.remote.aio("a"), int)
    assert_type(await Model().later.local("a"), str)
    assert_type(await plain.spawn.aio("a"), modal.FunctionCall[float])
    assert_type(await asyncio.create_task(plain.remote.aio("a")), float)


plain.remote(3)  # wrong
plain.remote()  # wrong
later.remote("yes")  # wrong
Model().run.remote(3)  # wrong
Model().nonsense.remote(3)  # wrong
"""


def test_calls_have_the_types_of_the_functions(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--cache-dir", str(tmp_path / "cache")]
    done = subprocess.run([*command, "program.py"], cwd=tmp_path, capture_output=True, text=True)
    wrong = {n for n, line in enumerate(PROGRAM.splitlines(), 1) if line.endswith("# wrong")}
    found = {int(line.split(":")[1]) for line in done.stdout.splitlines() if ": error:" in line}
    assert found == wrong, done.stdout + done.stderr
