"""What a real driver does where this project's code relies on it and only a fake was at hand: one line of JSON for each
question. It needs neither CRIU nor a sandbox, and no question waits for another's answer.

    python benchmarks/gpu/probe.py
    python benchmarks/gpu/probe.py --fake     # the harness alone, on the fake driver of the tests
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from common_gpu import fake_hardware, missing
from restore_bench import MOVES, PROGRAMS, Holder, says

from woodfrog.backends.gpus import find_gpus, library_path
from woodfrog.cuda.client import Cuda
from woodfrog.engine.gpu import added
from woodfrog.linux import procfs
from woodfrog.settings import load

QUESTION_S = 60.0
WORKER_UID = 64646


@dataclass
class Probe:
    """What the questions have in common."""

    cuda: Cuda
    folder: Path
    env: dict[str, str]
    size: int

    @contextlib.contextmanager
    def holder(self) -> Iterator[Holder]:
        holder = Holder(self.folder, self.size, self.env)
        try:
            holder.ready()
            yield holder
        finally:
            holder.end()

    def run(self, *command: str, **how: Any) -> dict[str, Any]:
        """The end of what a program says, and its JSON."""
        env = {**os.environ, **self.env}
        try:
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=QUESTION_S - 5, **how)
        except OSError as e:
            return {"said": str(e)}
        if done.returncode:
            return {"status": done.returncode, "said": (done.stdout + done.stderr)[-1500:]}
        found: dict[str, Any] = json.loads(done.stdout or "{}")
        return found


def of_the_gpu(pid: int) -> dict[str, Any]:
    """What a process has of the GPU's devices, and what else of its own is unusual."""
    open_ = [t for t in procfs.descriptors(pid).values() if not t.startswith("/")]
    kinds = {t.partition(":")[0] + (f":{t[11:]}" if t.startswith("anon_inode:") else "") for t in open_}
    maps = sorted(procfs.maps(pid), key=lambda m: m.start - m.end)
    return {
        "descriptors": sum(t.startswith("/dev/nvidia") for t in procfs.descriptors(pid).values()),
        "other_descriptors": sorted(kinds),
        "mapped": sorted({m.path for m in maps if m.path.startswith("/dev/")}),
        "threads": procfs.status(pid).threads,
        # Addresses that are reserved only: CRIU has to map them again.
        "largest_maps_gib": [round((m.end - m.start) / 2**30, 2) for m in maps[:6]],
    }


def of_the_caller(probe: Probe) -> int:
    """Descriptors of the helper: whether the driver keeps something open between calls."""
    assert probe.cuda._helper is not None
    return len(procfs.descriptors(probe.cuda._helper.process.pid))


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError as e:
        return str(e)


async def the_machine(probe: Probe) -> dict[str, Any]:
    node = await probe.cuda.start()
    return {
        "cuda": node.version,
        "driver": node.driver,
        "devices": [asdict(d) for d in node.devices],
        "vitals": [asdict(await probe.cuda.vitals(d.uuid)) for d in node.devices],
        "nodes": {p.name: f"{p.stat().st_mode & 0o777:o}" for p in sorted(Path("/dev").glob("nvidia*"))},
        "module": _read("/proc/driver/nvidia/version"),
        "params": [x for x in _read("/proc/driver/nvidia/params").splitlines() if "DeviceFile" in x],
        "library_path": probe.env.get("LD_LIBRARY_PATH", ""),
    }


async def the_moves(probe: Probe) -> dict[str, Any]:
    """A process brought through all of them, twice: what each takes, what is left of the GPU, where memory grew."""
    found: dict[str, Any] = {"bytes": probe.size}
    with probe.holder() as holder:
        pid = holder.process.pid
        found["held"], found["before"] = await probe.cuda.held(pid), of_the_gpu(pid)
        found["thread"], found["of_the_caller"] = await probe.cuda._call("thread", pid, 10.0), [of_the_caller(probe)]
        for turn in range(2):
            before: tuple[procfs.Resident, ...] = ()
            for move in MOVES:
                begin = time.perf_counter()
                state = await probe.cuda.move(pid, move, size=probe.size)
                found.setdefault(f"{move}_ms", []).append(round((time.perf_counter() - begin) * 1e3, 1))
                if turn == 0 and move == "lock":
                    before = procfs.resident(pid)
                elif turn == 0 and move == "checkpoint":
                    now = procfs.resident(pid)
                    found["checkpointed"] = {
                        **of_the_gpu(pid),
                        "state": state.name,
                        "held": await probe.cuda.held(pid),
                        "grown": {
                            "private": sum(r.own for r in now) - sum(r.own for r in before),
                            "shared": sum(r.shared for r in now) - sum(r.shared for r in before),
                        },
                        "largest_private": sorted((e - b for b, e in added(before, now)), reverse=True)[:8],
                        "largest_shared": sorted((r.shared for r in now), reverse=True)[:8],
                    }
            holder.check("full")
        found["after"] = of_the_gpu(pid)
        found["of_the_caller"].append(of_the_caller(probe))
    return found


async def others(probe: Probe) -> dict[str, Any]:
    """What it says of processes that are none of CUDA's, of children left by fork, and of threads."""
    found: dict[str, Any] = {}
    code = f"import os, sys, time; sys.path.insert(0, {str(PROGRAMS)!r}); import raw; c = raw.Cuda(); child = os.fork()"
    code += "\nif child: print(child, flush=True)\ntime.sleep(60)"
    with contextlib.ExitStack() as stack:

        def begin(*command: str) -> subprocess.Popen[str]:
            env = {**os.environ, **probe.env}
            process = stack.enter_context(subprocess.Popen(command, env=env, stdout=-1, text=True))
            stack.callback(process.kill)
            return process

        sleep, parent = begin("sleep", "60"), begin(sys.executable, "-B", "-c", code)
        assert parent.stdout is not None
        child = int(await asyncio.to_thread(parent.stdout.readline))
        stack.callback(os.kill, child, signal.SIGKILL)
        threads = sorted(map(int, os.listdir(f"/proc/{parent.pid}/task")))
        asked = {"sleep": sleep.pid, "this one": os.getpid(), "no process": 4194303}
        asked |= {"parent": parent.pid, "its child": child, "its last thread": threads[-1]}
        found["threads"] = threads
        for name, pid in asked.items():
            row = found[name] = {"pid": pid}
            for what in ("state", "thread"):
                try:
                    row[what] = await probe.cuda._call(what, pid, 10.0)
                except Exception as e:
                    row[what] = says(e)
    return found


async def memory_that_follows(probe: Probe) -> dict[str, Any]:
    return await asyncio.to_thread(probe.run, sys.executable, "-B", str(PROGRAMS / "pins.py"))


async def as_another_user(probe: Probe) -> dict[str, Any]:
    """Whether a program that may do nothing gets a context: as the worker's user, and never more than that."""
    shutil.copy(PROGRAMS / "raw.py", probe.folder)
    code = (
        f"import sys; sys.path.insert(0, {str(probe.folder)!r}); import raw; raw.Cuda().alloc(1 << 20); print('{{}}')"
    )
    # The system's own: another user may not reach what lies in a home directory.
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin") or sys.executable
    command = (python, "-I", "-B", "-c", code)
    who = {"user": WORKER_UID, "group": WORKER_UID, "extra_groups": ()} if os.geteuid() == 0 else {}
    ways: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
        "root": (command, {}),
        "worker": (command, who),
        "worker, no new privileges": (("setpriv", "--no-new-privs", *command), who),
    }
    return {name: await asyncio.to_thread(probe.run, *words, **how) or "it can" for name, (words, how) in ways.items()}


async def in_a_namespace(probe: Probe) -> dict[str, Any]:
    """By which pid the driver knows a process of another pid namespace."""
    path = probe.folder / "inside.sock"
    inner = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child", sys.executable, "-B")
    command = (*inner, str(PROGRAMS / "holder.py"), str(path), str(1 << 24))
    with subprocess.Popen(command, env={**os.environ, **probe.env}, stdout=-1, stderr=-1, text=True) as outer:
        assert outer.stdout is not None and outer.stderr is not None
        try:
            if await asyncio.to_thread(outer.stdout.readline) != "ready\n":
                return {"error": outer.stderr.read()[-1500:]}
            (pid,) = procfs.children(outer.pid)
            states = [(await probe.cuda.move(pid, move)).name for move in MOVES]
            return {"pids": list(procfs.status(pid).ns_pids), "states": states}
        finally:
            outer.kill()


QUESTIONS: dict[str, Callable[[Probe], Awaitable[dict[str, Any]]]] = {
    "the machine": the_machine,
    "the moves": the_moves,
    "memory that follows": memory_that_follows,
    "other processes": others,
    "as another user": as_another_user,
    "in a pid namespace": in_a_namespace,
}


async def ask_all(options: argparse.Namespace, hardware: Any) -> int:
    place = str(hardware.folder) if hardware is not None else load().cuda_dir
    library = library_path(place)
    env = {"LD_LIBRARY_PATH": library} if library else {}
    failed = 0
    with tempfile.TemporaryDirectory(prefix="wfb-probe-", dir="/var/tmp") as folder:
        Path(folder).chmod(0o755)
        gpus = await find_gpus("", place)
        if gpus.cuda is None:
            print(json.dumps({"question": "the machine", "error": gpus.why or "no NVIDIA GPU"}), flush=True)
            return 1
        probe = Probe(gpus.cuda, Path(folder), env, 8 << 20 if options.fake else 512 << 20)
        for question, ask in QUESTIONS.items():
            try:
                answer = await asyncio.wait_for(ask(probe), QUESTION_S)
            except Exception as e:
                answer = {"error": says(e)}
            failed += "error" in answer
            fake = {"fake": True} if options.fake else {}
            print(json.dumps({"question": question, **fake, **answer}), flush=True)
        await gpus.close()
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fake", action="store_true", help="on the fake driver of the tests")
    options = parser.parse_args()
    if not options.fake and (why := missing(torch=False)):
        print(f"gpu/probe.py: nothing asked: {why}")
        return 0
    with fake_hardware() if options.fake else contextlib.nullcontext() as hardware:
        return asyncio.run(ask_all(options, hardware))


if __name__ == "__main__":
    sys.exit(main())
