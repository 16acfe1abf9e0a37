"""All that is to be run on a GPU that is there for some minutes only, the most important first, each step within its
time, whatever becomes of the others.

    python benchmarks/gpu/session.py --minutes 9 --out DIR
    python benchmarks/gpu/session.py --minutes 4 --out DIR --steps engine,restore
    python benchmarks/gpu/session.py --minutes 3 --out DIR --fake     # the harness alone, on the tests' fake driver

What a step cannot do without (a package, a driver that starts, mounts) is asked first, by `bare.py`: a step that lacks
it is left out, with the reason, and its time is for the others.

Writes few files into DIR, as it goes on: session.json (what became of each step), session.log (all they said),
bare.jsonl, probe.jsonl, restore.json, start.json.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bare import OURS, TESTS, there

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PR_SET_CHILD_SUBREAPER = 36
END_S = (12.0, 5.0, 2.0)
"""How long a step may take to end when it is told to: by SIGINT, SIGTERM, SIGKILL."""
RESERVE_S = 20.0
"""For that, and for what a step does after its own clock said stop."""
LAST_LINES = 12
PYTEST = ("-m", "pytest", "-v", "-rfEsP", "--tb=short", "-p", "no:cacheprovider", "-o", "timeout=90",
          "-p", "pytest_asyncio.plugin", "-p", "pytest_timeout")  # fmt: skip
"""With the plugins that are needed, whatever others a machine brings along."""
MACHINE = """
uname -a; id; date; free -m; df -h /var/tmp /dev/shm /tmp; nproc; ulimit -a
timeout 15 nvidia-smi; timeout 15 nvidia-smi topo -m
ls -l /dev/nvidia* /proc/driver/nvidia; cat /proc/driver/nvidia/version; mount | grep -i nvidia
cat /proc/sys/vm/overcommit_memory; command -v ip nft cc criu
echo "LD_LIBRARY_PATH=$LD_LIBRARY_PATH"; ldconfig -p | grep -E 'libcuda|nvidia-ml'; stat -fc %T /sys/fs/cgroup
[ -x src/woodfrog/native/bin/woodfrog-init ] || "$PYTHON" scripts/build_native.py
"$PYTHON" -c 'from woodfrog.cli import main; main()' doctor
"$PYTHON" -VV; "$PYTHON" -m pip list 2>/dev/null | grep -iE '^(cuda|torch|pytest|nvidia-ml|triton|woodfrog)'
"""

AFTER = """
dmesg | grep -iE 'nvrm|xid|segfault|out of memory|oom-kill|userfault|hung' | tail -40; timeout 15 nvidia-smi
ls /var/tmp /dev/shm; free -m; ps -eo pid,ppid,stat,wchan:20,comm | grep -iE 'criu|woodfrog|python' | tail -20
"""


@dataclass(frozen=True)
class Step:
    """One command.

    Args:
        share: of the whole time; what a step does not use is for those after it.
        least: seconds below which it is not worth beginning.
        own_clock: it is told by `--seconds` when to begin nothing more.
        output: where its standard output goes.
        packages: what it imports.
        sandboxes: it needs mounts, as root; without_sandboxes: options with which it does without.
    """

    name: str
    command: tuple[str, ...]
    share: float
    least: float = 10.0
    own_clock: bool = False
    output: str = ""
    packages: tuple[str, ...] = ()
    driver: bool = True
    sandboxes: bool = False
    without_sandboxes: tuple[str, ...] = ()


def steps(out: Path, *, fake: bool) -> tuple[Step, ...]:
    python = sys.executable
    flags = ("--fake",) if fake else ()

    def benchmark(name: str, *options: str) -> tuple[str, ...]:
        return (python, str(HERE / f"{name}.py"), *flags, *options)

    def tests(name: str) -> tuple[str, ...]:
        return (python, *PYTEST, str(ROOT / "tests" / "gpu" / name))

    restore = () if fake else ("--sizes", "2", "--cycles", "20")
    start = () if fake else ("--sizes", "1")
    restore = benchmark("restore", *restore, "--rounds", "3", "--json", str(out / "restore.json"))
    start = benchmark("start", *start, "--rounds", "3", "--json", str(out / "start.json"))
    return (
        Step("bare", benchmark("bare"), 0.18, own_clock=True, output="bare.jsonl", driver=False),
        Step("machine", ("/bin/sh", "-c", MACHINE), 0.05, driver=False),
        Step("probe", benchmark("probe"), 0.10, output="probe.jsonl", packages=OURS),
        Step("engine", tests("test_gpu_engine.py"), 0.22, packages=TESTS, sandboxes=True),
        Step(
            "restore", restore, 0.21, least=60, own_clock=True, packages=OURS,
            without_sandboxes=("--parts", "bound,several"),
        ),
        Step("programs", tests("test_gpu_programs.py"), 0.12, least=30, packages=(*TESTS, "torch"), sandboxes=True),
        Step("start", start, 0.11, least=60, own_clock=True, packages=(*OURS, "torch"), sandboxes=True),
        Step("after", ("/bin/sh", "-c", AFTER), 0.01, least=3, driver=False),
    )  # fmt: skip


@dataclass(frozen=True)
class Known:
    """What `bare.py` said that decides about the steps after it; empty = nothing is in their way."""

    driver: str = ""
    sandboxes: str = ""


def known(path: Path) -> Known:
    """From its output; what it was not asked stays open."""
    rows: dict[str, dict[str, Any]] = {}
    with contextlib.suppress(OSError):
        for line in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                row = json.loads(line)
                rows[row["bare"]] = row
    if "machine" not in rows:
        return Known()
    started = rows.get("cuInit", rows.get("device", {}))
    answer = started.get("answer", started.get("error", "it did not end"))
    driver = "" if answer == "CUDA_SUCCESS" else f"cuInit: {answer}"
    allowed = rows.get("allowed", {}).get("mount", "yes")
    return Known(driver, "" if allowed == "yes" else f"this machine allows no mounts: {allowed}")


def hindrance(step: Step, facts: Known) -> str:
    """Why a step is not worth its time; empty when it is."""
    if step.driver and facts.driver:
        return facts.driver
    if step.sandboxes and facts.sandboxes:
        return facts.sandboxes
    missing = [p for p in step.packages if not there(p)]
    return f"these packages are missing: {', '.join(missing)}" if missing else ""


def children() -> list[int]:
    found = []
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, path.read_text().split())
    return found


def end(process: subprocess.Popen[bytes]) -> None:
    """End a step: as Ctrl-C first, so that it takes its daemons and sandboxes with it."""
    for number, patience in zip((signal.SIGINT, signal.SIGTERM, signal.SIGKILL), END_S, strict=True):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            return


def sweep() -> int:
    """End what a step left behind: this process is the parent of orphans. How many there were."""
    count = 0
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + 5
        for pid in (left := children()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        count = max(count, len(left))
        while children() and time.monotonic() < deadline:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(-1, os.WNOHANG)
            time.sleep(0.05)
    return count


def run(step: Step, limit: float, out: Path) -> dict[str, Any]:
    command = [*step.command, *(("--seconds", f"{limit - RESERVE_S:.0f}") if step.own_clock else ())]
    packages = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT / "src"))))
    plain = {"PYTHONUNBUFFERED": "1", "NO_COLOR": "1", "COLUMNS": "160", "PYTHON": sys.executable}
    env = {**os.environ, **plain, "PYTHONPATH": packages, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    begin = time.monotonic()
    status = "ended"
    with open(out / "session.log", "ab", buffering=0) as log:
        log.write(f"\n======== {step.name}, at most {limit:.0f} s: {' '.join(command)[:500]}\n".encode())
        at = log.tell()
        with contextlib.ExitStack() as stack:
            stdout = stack.enter_context(open(out / step.output, "wb")) if step.output else log
            process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=stdout, stderr=log, start_new_session=True
            )
            try:
                process.wait(limit)
            except subprocess.TimeoutExpired:
                status = "out of time"
                end(process)
            except BaseException:
                end(process)
                raise
        left = sweep()
    shown = out / step.output if step.output else out / "session.log"
    text = shown.read_bytes()[0 if step.output else at :].decode(errors="replace")
    print(f"\n======== {step.name}: {status}, exit status {process.returncode}", flush=True)
    print("\n".join(line[:400] for line in text.splitlines()[-LAST_LINES:]), flush=True)
    return {
        "status": status,
        "exit_status": process.returncode,
        "seconds": round(time.monotonic() - begin, 1),
        "limit_s": round(limit, 1),
        "left_behind": left,
    }


def run_all(wanted: Sequence[Step], minutes: float, out: Path, facts: dict[str, Any]) -> int:
    """Each step in its turn; not 0 when one did not end well."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    out.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + minutes * 60
    shares = sum(step.share for step in wanted)
    result: dict[str, Any] = {**facts, "steps": {}}
    found = Known()
    for step in wanted:
        left = until - time.monotonic()
        # What earlier ones left over is for all that come.
        limit = max(step.least, left * step.share / shares)
        shares -= step.share
        if found.sandboxes and step.without_sandboxes:
            step = replace(step, command=(*step.command, *step.without_sandboxes))
        if why := hindrance(step, found):
            print(f"\n======== {step.name}: left out: {why}", flush=True)
            result["steps"][step.name] = {"status": f"left out: {why}"}
        elif left < step.least:
            result["steps"][step.name] = {"status": "left out, the time is over"}
        else:
            try:
                result["steps"][step.name] = run(step, min(limit, left), out)
            except Exception as e:
                result["steps"][step.name] = {"status": f"{type(e).__name__}: {e}"}
        if step.name == "bare":
            found = known(out / step.output)
        (out / "session.json").write_text(json.dumps(result, indent=1) + "\n")
    well = all(row.get("exit_status") == 0 and row["status"] == "ended" for row in result["steps"].values())
    print(f"\nWhat became of each step is in {out / 'session.json'}, what they said in session.log", flush=True)
    return 0 if well else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="for all together (default: 9)")
    parser.add_argument("--out", type=Path, required=True, help="where what they say and measure goes")
    parser.add_argument("--steps", default="", help="some of them, by name (default: all)")
    parser.add_argument("--fake", action="store_true", help="on the fake driver of the tests")
    options = parser.parse_args()
    out = options.out.resolve()
    if options.fake and out.is_relative_to(ROOT / "benchmarks" / "results"):
        parser.error("what the fake driver says does not belong among results")
    all_steps = steps(out, fake=options.fake)
    names = [s.name for s in all_steps]
    wanted = options.steps.split(",") if options.steps else names
    if unknown := set(wanted) - set(names):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    facts = {"gpu": "fake"} if options.fake else {}
    return run_all([s for s in all_steps if s.name in wanted], options.minutes, out, facts)


if __name__ == "__main__":
    sys.exit(main())
