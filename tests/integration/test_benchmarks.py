"""Each benchmark runs and its numbers are whole; how good they are is not a test's affair."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from conftest import criu_path
from fake_cuda.hardware import Hardware
from woodfrog.cuda.client import Cuda

pytestmark = [pytest.mark.root, pytest.mark.criu]

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(script: str, target: Path, *options: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *options, "--json", str(target)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    result: dict[str, Any] = json.loads(target.read_text())
    assert result["machine"]["criu"] and result["machine"]["cores"] > 0
    return result


def import_module_alone(file: Path) -> ModuleType:
    """A benchmark as a module, under a name of its own: two of them are called start."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{file.parent.name}_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look for it
    path = list(sys.path)
    sys.path[:0] = [str(file.parent), str(BENCHMARKS)]  # as where it runs
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = path
    return module


def test_start(tmp_path: Path) -> None:
    result = run("start.py", tmp_path / "start.json", "--rounds", "1", "small")
    small = result["workloads"]["small"]
    assert set(small["ms"]) == {"cold", "criu", "lazy", "woodfrog", "fork", "criu-alone", "lazy-alone"}
    assert all(arm["n"] == 1 and arm["median"] > 0 for arm in small["ms"].values())
    assert "restore" in small["phases_ms"]["woodfrog"] and "boot" in small["phases_ms"]["cold"]
    assert small["best_thaw_over_woodfrog"] > 0 and small["handler_ms"]["warm"]["n"] == 1


def test_parked(tmp_path: Path) -> None:
    small = run("parked.py", tmp_path / "parked.json", "--rounds", "1", "small")["workloads"]["small"]
    assert set(small["ms"]) == {"parked", "thaw", "warm"}
    assert small["parked_pss_mb"]["median"] > 0 and "unpark" in small["phases_ms"]["parked"]


@pytest.mark.slow
def test_gpu_start_on_the_fake_driver(tmp_path: Path) -> None:
    result = run("gpu/start.py", tmp_path / "gpu.json", "--fake", "--rounds", "1", "--sizes", "0.03125")
    (found,) = result["workloads"].values()
    assert result["gpu"] == {"name": "fake"} and found["device_bytes"] == {
        "cold": 32 << 20,
        "cpu": 32 << 20,
        "gpu": 32 << 20,
    }
    assert all(found["ms"][arm]["n"] == 1 for arm in ("cold", "cpu", "gpu")) and set(found["over_gpu"]) == {
        "cold",
        "cpu",
    }
    assert set(found["gpu_ms"]) == {"gpu.lock", "gpu.checkpoint", "gpu.check", "gpu.restore", "gpu.unlock"}
    assert found["captures"]["gpu"]["gpu_bytes"] >= 32 << 20 > found["captures"]["cpu"]["gpu_bytes"] == 0
    assert "boot" in found["phases_ms"]["cold"] and "wake/enter_restore" in found["phases_ms"]["cpu"]


def test_gpu_restore_on_the_fake_driver(tmp_path: Path) -> None:
    result = run("gpu/restore.py", tmp_path / "gpu.json", "--fake", "--rounds", "1", "--cycles", "3")
    parts, moves = result["parts"], {"lock", "checkpoint", "restore", "unlock"}
    assert result["gpu"] == {"name": "fake"} and result["failed"] == {}
    (found,) = parts["restore"].values()
    assert found["failed"] == {} and found["image_bytes"] > 32 << 20 < found["pushed_bytes"]
    assert {arm: v["n"] for arm, v in found["ms"].items()} == dict.fromkeys(
        ("ours", "follows", "whole", "plain", "lazy"), 1
    )
    assert all({"criu", "gpu.restore", "gpu.unlock", "answer"} <= set(p) for p in found["phases_ms"].values())
    assert set(found["first_round_ms"]) == set(found["ms"])
    assert all(v > 0 for rates in found["gib_s"].values() for v in rates.values()) and len(found["gib_s"]) == 2
    copies, driver = parts["bound"]["copies"], parts["bound"]["driver"]
    ways = {"pageable", "pinned", "registered", "staged, 1 thread", "staged, 4 threads"}
    assert set(copies["to_device"]) == ways == set(copies["from_device"]) and moves < set(driver["ms"])
    assert set(parts["several"]) == {"1", "2", "4"}
    assert all(v["at_once"]["restore"]["n"] == 1 == v["in_turn"]["all"]["n"] for v in parts["several"].values())
    cycles = parts["cycles"]
    assert (cycles["cycles"], cycles["failures"], cycles["leaks"]) == (3, [], [])
    assert cycles["held_at_start"].keys() == {"descriptors", "processes", "device_mib"}


async def test_a_part_of_gpu_restore_that_fails_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    restore = import_module_alone(BENCHMARKS / "gpu" / "restore.py")

    async def fails(bench: Any, sizes: Any, keep: Any) -> None:
        keep({"so far": 1})
        raise SystemExit("out of luck")

    restore.PARTS["bound"] = (fails, lambda found: None)
    target = tmp_path / "gpu.json"
    options = argparse.Namespace(
        fake=True, json=str(target), under="/var/tmp", sizes=(0.0078125,), rounds=1, cycles=1, seconds=60.0,
        parts=["bound", "several"],
    )  # fmt: skip
    with restore.fake_hardware() as hardware:
        assert await restore.measure(options, hardware) == 1
    result = json.loads(target.read_text())
    assert result["failed"] == {"bound": "SystemExit: out of luck"} and result["parts"]["bound"] == {"so far": 1}
    assert set(result["parts"]["several"]) == {"1", "2", "4"}


async def test_gpu_restore_sees_lost_bytes(tmp_path: Path) -> None:
    bench = import_module_alone(BENCHMARKS / "gpu" / "restore_bench.py")
    hardware = Hardware(tmp_path / "cuda")
    cuda = Cuda(library=hardware.folder)
    holder = bench.Holder(tmp_path, 8 << 20, {"LD_LIBRARY_PATH": str(hardware.folder)})
    try:
        holder.ready()
        holder.check("full")
        hardware.configure("lossy 1")
        for move in bench.MOVES:
            await cuda.move(holder.process.pid, move)
        for how in ("quick", "full"):
            with pytest.raises(bench.Wrong):
                holder.check(how)
    finally:
        holder.end()
        await cuda.close()


def test_gpu_restore_sees_leaks() -> None:
    cycles = import_module_alone(BENCHMARKS / "gpu" / "restore_cycles.py")
    first = {"descriptors": 10, "processes": 2, "device_mib": 500}
    assert cycles.grown(first, {"descriptors": 12, "processes": 2, "device_mib": 505}) == []
    assert len(cycles.grown(first, {"descriptors": 15, "processes": 3, "device_mib": 600})) == 3


SESSION = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import session
from session import Step
session.END_S, sh = (0.3, 0.3, 2.0), lambda text: ("/bin/sh", "-c", text)
session.RESERVE_S = 2.0
hangs = "trap '' INT TERM; setsid sleep 1000 & echo orphan $!; setsid sleep 1000; sleep 1000"
status = session.run_all([
    Step("told", sh("echo to the log >&2; echo to the file"), 0.2, output="told.txt"),
    Step("fails", sh("echo no luck; exit 3"), 0.2),
    Step("hangs", sh(hangs), 0.02, least=1),
    Step("not there", ("/nowhere/program",), 0.2),
    Step("clocked", sh("echo $0 $1"), 0.1, own_clock=True),
    Step("too long", sh("exit 0"), 0.1, least=1000),
], 1, Path(sys.argv[2]), {"gpu": "fake"})
assert status == 1
"""


def test_a_gpu_session_goes_on_whatever_happens(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SESSION, str(BENCHMARKS / "gpu"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    steps = json.loads((tmp_path / "out/session.json").read_text())["steps"]
    found = {name: (step["status"], step.get("exit_status"), step.get("left_behind")) for name, step in steps.items()}
    log = (tmp_path / "out/session.log").read_text()
    assert found["told"] == ("ended", 0, 0) and (tmp_path / "out/told.txt").read_text() == "to the file\n"
    assert found["fails"] == ("ended", 3, 0) and "to the log" in log and "no luck" in log and "no luck" in done.stdout
    assert found["hangs"] == ("out of time", -9, 2), log
    assert "FileNotFoundError" in found["not there"][0] and found["too long"][0] == "left out, the time is over"
    assert found["clocked"][:2] == ("ended", 0) and "--seconds" in log
    for line in log.splitlines():
        if line.startswith("orphan "):
            assert not Path(f"/proc/{line.split()[1]}").exists()


def test_gpu_probe_on_the_fake_driver(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu/session.py"), "--fake", "--steps", "probe", "--out", str(tmp_path)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "probe.jsonl").read_text().splitlines()]
    asked = {row.pop("question"): row for row in rows}
    assert len(asked) == 6 and all(row["fake"] and "error" not in row for row in rows)
    assert asked["the moves"]["checkpointed"]["state"] == "CHECKPOINTED" and len(asked["the moves"]["restore_ms"]) == 2
    assert asked["memory that follows"]["page-locked"]["pages_asked_for"] == 0, "what page-locks does not wait"
    assert asked["in a pid namespace"]["states"][-1] == "RUNNING"


def test_gpu_bare_on_the_fake_driver(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu/bare.py"), "--fake", "--torch-mib", "1"],
        env={**os.environ, "WOODFROG_CRIU": criu_path() or ""}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    said = {row["bare"]: row for row in rows}
    assert said["cuInit"]["answer"] == "CUDA_SUCCESS" and said["allowed"]["mount"] == "yes", done.stdout + done.stderr
    raw = rows[[r["bare"] for r in rows].index("worker") :]
    assert [r["state"] for r in raw[1:4] if "state" in r] == ["LOCKED", "CHECKPOINTED"]
    assert said["after the moves"]["memory"] == "same" and said["after CRIU and the moves"]["memory"] == "same"
    assert next(r for r in raw if r["bare"] == "Checkpoint")["open"] == []
    assert [r["by"] for r in rows if r["bare"] == "left open"] == ["a cuInit that finds no device", "NVML"]


def test_gpu_bare_ends_what_hangs(tmp_path: Path) -> None:
    hardware = Hardware(tmp_path / "cuda")
    hardware.configure("fault cuInit hang")
    command = [sys.executable, str(BENCHMARKS / "gpu/bare.py"), "--seconds", "6"]
    env = {**os.environ, "LD_LIBRARY_PATH": str(hardware.folder)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    said = {row["bare"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 1 and "did not end" in said["device"]["error"], done.stdout
    assert "the time is over" in said["moves"]["error"]


def test_gpu_bare_needs_python_alone() -> None:
    for path in (BENCHMARKS / "gpu/bare.py", *(BENCHMARKS / "gpu/programs" / f"{n}.py" for n in ("files", "raw"))):
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {a.name.partition(".")[0] for a in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add((node.module or "").partition(".")[0])
        # Those of its own, and what is tried only where it is there or asked for.
        assert names - sys.stdlib_module_names <= {"raw", "torch", "common_gpu"}, path


def test_a_gpu_step_that_cannot_work_is_left_out(tmp_path: Path) -> None:
    session = import_module_alone(BENCHMARKS / "gpu" / "session.py")
    steps = {s.name: s for s in session.steps(tmp_path, fake=False)}
    said = tmp_path / "bare.jsonl"

    def left_out(*rows: dict[str, Any]) -> dict[str, str]:
        said.write_text("".join(json.dumps(row) + "\n" for row in rows) + "half a li")
        facts = session.known(said)
        found = {name: session.hindrance(replace(step, packages=()), facts) for name, step in steps.items()}
        return {name: why for name, why in found.items() if why}

    machine, started = {"bare": "machine"}, {"bare": "cuInit", "answer": "CUDA_SUCCESS"}
    assert left_out() == left_out(machine, {"bare": "allowed", "mount": "yes"}, started) == {}
    no_mounts = {"bare": "allowed", "mount": "Operation not permitted"}
    found = left_out(machine, no_mounts, started)
    assert set(found) == {"engine", "programs", "start"} and "Operation not permitted" in found["engine"]
    found = left_out(machine, {"bare": "cuInit", "answer": "CUDA_ERROR_NO_DEVICE"})
    assert set(found) == set(steps) - {"bare", "machine", "after"} and "CUDA_ERROR_NO_DEVICE" in found["probe"]
    assert "within 45 s" in left_out(machine, {"bare": "device", "error": "it did not end within 45 s"})["probe"]
    lacking = replace(steps["machine"], packages=("json", "no_such_package", "no.such"))
    assert session.hindrance(lacking, session.Known()) == "these packages are missing: no_such_package, no.such"


def test_without_criu_the_driver_is_measured_alone(tmp_path: Path) -> None:
    target, options = tmp_path / "gpu.json", ("--fake", "--rounds", "1", "--parts", "restore,several", "--json")
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu/restore.py"), *options, str(target)],
        env={**os.environ, "WOODFROG_CRIU": "/nowhere"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    result = json.loads(target.read_text())
    assert done.returncode == 1 and result["machine"]["criu"] == "" and set(result["parts"]) == {"several"}
    assert list(result["failed"]) == ["restore"] and "/nowhere cannot be run" in result["failed"]["restore"]


@pytest.mark.parametrize("name", ["start", "restore"])
def test_numbers_of_the_fake_driver_are_not_a_gpus(name: str) -> None:
    target = BENCHMARKS / "results" / "gpu" / f"{name}.json"
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu" / f"{name}.py"), "--fake", "--json", str(target)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and "fake" in done.stderr


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a GPU here")
@pytest.mark.parametrize("name", ["start", "restore"])
def test_without_a_gpu_it_says_so(name: str) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu" / f"{name}.py")], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, f"gpu/{name}.py: nothing measured: needs an NVIDIA GPU\n")


def test_a_gpu_workload_that_fails_is_told_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = import_module_alone(BENCHMARKS / "gpu" / "start.py")

    class Workload:
        def __init__(self, daemon: Any, module: Any, plan: Any) -> None:
            self.plan, self.values = plan, {"gpu": [1.0] if plan.variant == "graphs" else []}
            if plan.variant == "compile":
                raise SystemExit("no compiler")

        def round(self, *, counted: bool) -> None:
            if self.plan.variant == "graphs":
                raise ValueError("other bytes")
            if self.plan.variant == "ended":
                sys.exit(143)

        def result(self) -> dict[str, Any]:
            return {"variant": self.plan.variant}

        def close(self) -> None:
            pass

    (tmp_path / "daemon.log").touch()
    daemon: Any = SimpleNamespace(home=tmp_path, log=tmp_path / "daemon.log", stop_containers=lambda: None)
    monkeypatch.setattr(start, "Workload", Workload)
    monkeypatch.setattr(start, "fitting", lambda gib, arms, free: arms)
    kept: dict[str, Any] = {}
    plans = [start.Plan(1, variant, ("gpu",), 1) for variant in ("compile", "graphs", "plain")]
    failed = start.measure(daemon, None, plans, float("inf"), kept.__setitem__)
    assert failed == {"1 GiB, compile": "SystemExit: no compiler", "1 GiB, graphs": "ValueError: other bytes"}
    assert list(kept) == ["1 GiB, graphs", "1 GiB"]
    with pytest.raises(SystemExit):
        start.measure(daemon, None, [start.Plan(1, "ended", ("gpu",), 1)], float("inf"), kept.__setitem__)


def test_what_of_a_gpu_benchmark_there_is_room_for() -> None:
    start = import_module_alone(BENCHMARKS / "gpu" / "start.py")
    arms, gib = ("cold", "cpu", "gpu"), 1 << 30
    assert start.fitting(30, arms, 80 * gib) == arms
    assert start.fitting(30, arms, 60 * gib) == ("cold", "gpu")
    assert start.fitting(30, arms, 20 * gib) == () == start.fitting(1, arms, 0)
    assert start.fitting(30, ("cold", "cpu"), 60 * gib) == ("cold", "cpu")
    assert [start.rounds_for(g, 5) for g in (1, 8, 30)] == [5, 3, 2]
    assert start.near([1.0, 2.0], [1.01, 2.0]) and not start.near([1.0, 2.0], [1.0, 2.5]) and not start.near([1.0], [])


@pytest.mark.slow
def test_calls(tmp_path: Path) -> None:
    result = run("calls.py", tmp_path / "calls.json", "--calls", "10", "--seconds", "0.3", "--clients", "1,2")
    assert len(result["payload_ms"]) == 6 and result["payload_ms"]["1 KB pickle"]["median"] > 0
    assert all(v["calls_per_second"] > 0 for v in result["throughput"].values())


@pytest.mark.slow
def test_tier(tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    options = ("--rounds", "1", "--workload", "arrays", "--mb-s", "100", "--fill-mb", "4")
    result = run("tier.py", tmp_path / "tier.json", *options)
    assert set(result["arms"]) == {"cold", "whole", "through"} and result["whole_over_through"] > 0
    assert result["arms"]["through"]["first_mb"]["median"] > 0
    assert all(column["8"]["median"] > 0 for column in result["parallel_mb_s"].values())


@pytest.mark.slow  # the same paths as in tests/e2e, more often
def test_soak(tmp_path: Path) -> None:
    result = run("soak.py", tmp_path / "soak.json", "--cycles", "6")
    assert (result["differences"], result["leaks"]) == ([], [])
    assert result["freezes"] >= 5 and result["thaws"] >= 11


@pytest.mark.slow
@pytest.mark.torch
def test_tensors(tmp_path: Path) -> None:
    result = run("tensors.py", tmp_path / "tensors.json", "--mib", "32", "--rounds", "1")
    cpu = result["devices"]["cpu"]
    away = (cpu["away_gb_s"]["leave"], *cpu["away_gb_s"]["come_back"].values())
    assert len(away) == 3 and all(v["median"] > 0 for v in (*cpu["hash_gb_s"].values(), *away))
    changed = cpu["captures"]["64 KiB"]["changed"]
    assert changed["0%"]["mib"] == 0 and changed["100%"]["mib"] == 32 and result["tree"]["reads"] < 100


@pytest.mark.slow
def test_cold_disk(tmp_path: Path) -> None:
    """Slow for the others: it drops the page cache of the whole machine."""
    result = run("cold_disk.py", tmp_path / "cold_disk.json", "--mib", "64", "--rounds", "1")
    assert result["bytes"] >= 64 << 20 and len(result["ms"]) == 5
    assert all(v["median"] > 0 for v in result["ms"].values())


@pytest.mark.slow
def test_burst(tmp_path: Path) -> None:
    result = run("burst.py", tmp_path / "burst.json", "--calls", "12", "--rounds", "1")
    assert (result["thaws"], result["cold"]) == (12, 0)
    assert result["thaws_per_second"]["n"] == 1 and result["processor_ms_per_thaw"]["sandboxes"] > 0


@pytest.mark.slow
def test_memory(tmp_path: Path) -> None:
    result = run("memory.py", tmp_path / "memory.json", "--clones", "3", "--drained", "1")
    small, read, filled = (v["clone"] for v in result["mib_per_clone"].values())
    assert 0 < small < read < filled
    assert read >= 30 and filled >= 600


@pytest.mark.slow
def test_capture(tmp_path: Path) -> None:
    small = run("capture.py", tmp_path / "capture.json", "--rounds", "1", "small")["workloads"]["small"]
    assert small["criu_dump_ms"]["n"] == 1 and small["pause_over_criu_dump"] > 0
    assert small["stored_after_answer_ms"]["n"] == 1 and "capture/dump" in small["phases_ms"]


@pytest.mark.slow
def test_kills(tmp_path: Path) -> None:
    result = run("kills.py", tmp_path / "kills.json", "--count", "8", "--seed", "4")
    assert (result["wrong"], result["leaks"], result["store_problems"]) == ([], [], [])
    assert sum(result["killed"].values()) == 8 and result["right_answers"] > 0


def test_soak_sees_differences_and_leaks() -> None:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import soak
    finally:
        sys.path.remove(str(BENCHMARKS))
    seen = {"fds": {"3": ["/tmp/a", "0"]}, "cwd": "/tmp"}
    assert soak.differences(seen, {"fds": {"3": ["/tmp/a", "0"]}, "cwd": "/tmp"}) == []
    assert len(soak.differences(seen, {"fds": {"3": ["/tmp/a", "7"], "4": ["/tmp/b", "0"]}, "cwd": "/tmp"})) == 2
    assert soak.grown({"processes": 2, "threads": 2}, {"processes": 3, "threads": 4}) == ["processes: 2 -> 3"]
