"""What there is on a machine with a GPU, and whether its driver and CRIU do what everything else here relies on: one
line of JSON for each thing that is known. It needs python3 alone: no package, no compiler, no woodfrog that can be
imported. Where torch and CRIU are, they are tried too.

    python3 benchmarks/gpu/bare.py

Each question has a process of its own, which is ended when its time is over; what it said until then stays.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PROGRAMS = Path(__file__).parent / "programs"
STATES = ("RUNNING", "LOCKED", "CHECKPOINTED", "FAILED", "CHECKPOINTING", "RESTORING")
CRIU = ("/usr/local/lib/woodfrog/criu/bin/criu", "/usr/sbin/criu", "/usr/local/sbin/criu")
PLACES = ("/var/tmp", "/tmp", "/dev/shm")
LOCK_MS = 10_000
END_S = 3.0
OURS = (
    "blake3", "cloudpickle", "cryptography", "dotenv", "fastapi", "httpcore", "httptools", "rich", "typer", "uvicorn",
    "uvloop", "wrapt", "zstandard", "cuda.bindings",
)  # fmt: skip
TESTS = (*OURS, "pytest", "pytest_asyncio", "pytest_timeout", "hypothesis")
"""What the steps of session.py import."""
TOOLS = ("nvidia-smi", "cuda-checkpoint", "cc", "nvcc", "ip", "nft", "mount", "unshare", "setpriv", "setsid", "nsenter")
KERNEL = (
    "CHECKPOINT_RESTORE", "USERFAULTFD", "MEM_SOFT_DIRTY", "OVERLAY_FS", "TMPFS", "VETH", "BRIDGE", "NF_TABLES",
    "NET_NS", "PID_NS", "UTS_NS", "IPC_NS", "SECCOMP_FILTER", "CGROUPS", "MEMCG", "CGROUP_FREEZER", "UNIX_DIAG",
    "FHANDLE", "PROC_CHILDREN", "PROC_PAGE_MONITOR", "TIME_NS",
)  # fmt: skip
USERFAULTFD = 323
CLONE_NEWNS, CLONE_NEWNET, CLONE_NEWPID = 0x20000, 0x40000000, 0x20000000
MS_REC, MS_PRIVATE = 0x4000, 0x40000
PTRACE_SEIZE = 0x4206


def say(what: str, **answer: Any) -> None:
    print(json.dumps({"bare": what, **answer}), flush=True)


def read(path: str | Path) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError as e:
        return f"({e.strerror})"


def run(*command: str, seconds: float = 20.0) -> str:
    """The end of what a command says, or why there is nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except (OSError, subprocess.TimeoutExpired) as e:
        return f"({e})"
    return (done.stdout + done.stderr).strip()[-1500:] + (f" (exit status {done.returncode})" * bool(done.returncode))


def smi(fields: str) -> str:
    return run("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", seconds=8)


def there(package: str) -> bool:
    with contextlib.suppress(ImportError, ValueError):
        return importlib.util.find_spec(package) is not None
    return False


def may(call: Callable[[], int]) -> str:
    """Whether a system call is allowed, tried in a child that is thrown away."""
    pid = os.fork()
    if pid == 0:
        ctypes.set_errno(0)
        os._exit(0 if call() >= 0 else ctypes.get_errno() & 0xFF or 255)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return "yes" if code == 0 else os.strerror(code) if code > 0 else f"signal {-code}"


def the_machine(options: argparse.Namespace) -> None:
    status = dict(line.split(":\t", 1) for line in read("/proc/self/status").splitlines() if ":\t" in line)
    wanted = ("CapEff", "CapBnd", "NoNewPrivs", "Seccomp")
    memory = [line for line in read("/proc/meminfo").splitlines() if line.startswith(("MemTotal", "MemAvail"))]
    say(
        "machine", uname=list(os.uname()), uid=os.getuid(), python=sys.version.split()[0], executable=sys.executable,
        os=[x for x in read("/etc/os-release").splitlines() if x.startswith("PRETTY_NAME")],
        version=read("/proc/version"), status={k: status.get(k) for k in wanted}, memory=memory, cpus=os.cpu_count(),
        overcommit=read("/proc/sys/vm/overcommit_memory"), yama=read("/proc/sys/kernel/yama/ptrace_scope"),
        unprivileged_userfaultfd=read("/proc/sys/vm/unprivileged_userfaultfd"),
        free_gib={p: round(shutil.disk_usage(p).free / 2**30, 1) for p in PLACES if os.path.isdir(p)},
    )  # fmt: skip
    libc = ctypes.CDLL(None, use_errno=True)

    def cgroup() -> int:
        try:
            folder = next(p for p in ("/sys/fs/cgroup/memory", "/sys/fs/cgroup") if os.path.isdir(p))
            os.mkdir(f"{folder}/woodfrog-bare")
            os.rmdir(f"{folder}/woodfrog-bare")
        except OSError as e:
            ctypes.set_errno(e.errno or 255)
            return -1
        return 0

    def mount() -> int:
        return (
            libc.unshare(CLONE_NEWNS)
            or libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None)
            or libc.mount(b"tmpfs", b"/mnt", b"tmpfs", 0, None)
        )

    say(
        "allowed", mount=may(mount), network=may(lambda: libc.unshare(CLONE_NEWNET)),
        pids=may(lambda: libc.unshare(CLONE_NEWPID)), userfaultfd=may(lambda: libc.syscall(USERFAULTFD, os.O_NONBLOCK)),
        ptrace=may(lambda: libc.ptrace(PTRACE_SEIZE, os.getppid(), None, None)), cgroup=may(cgroup),
        cgroups=[x.split()[2] for x in read("/proc/mounts").splitlines() if "/sys/fs/cgroup" in x][:3],
    )  # fmt: skip
    packages, tools = [p for p in (*TESTS, "torch") if not there(p)], [t for t in TOOLS if not shutil.which(t)]
    say("missing", packages=packages, tools=tools, criu=options.criu or "none")
    config = subprocess.run(
        ["sh", "-c", "zcat /proc/config.gz 2>/dev/null || cat /boot/config-$(uname -r)"], capture_output=True, text=True
    ).stdout
    have = {line.split("=")[0].removeprefix("CONFIG_") for line in config.splitlines() if "=" in line}
    say("kernel", without=[k for k in KERNEL if k not in have] if have else "its configuration cannot be read")


class Driver:
    """The calls, by ctypes; each answer by its name, with the milliseconds that it took."""

    def __init__(self) -> None:
        self.cuda = ctypes.CDLL("libcuda.so.1")

    def call(self, name: str, *arguments: Any) -> tuple[str, float]:
        function = getattr(self.cuda, name, None)
        if function is None:
            return "not in this driver", 0.0
        begin = time.perf_counter()
        result = function(*arguments)
        ms = round((time.perf_counter() - begin) * 1e3, 1)
        text = ctypes.c_char_p()
        self.cuda.cuGetErrorName(result, ctypes.byref(text))
        return (text.value or str(result).encode()).decode(), ms

    def state(self, pid: int) -> str:
        number = ctypes.c_int(-1)
        answer, _ = self.call("cuCheckpointProcessGetState", pid, ctypes.byref(number))
        if answer != "CUDA_SUCCESS":
            return answer
        return STATES[number.value] if 0 <= number.value < len(STATES) else str(number.value)

    def move(self, pid: int, move: str, size: int) -> bool:
        lock = (ctypes.c_uint * 16)(LOCK_MS)
        arguments = (ctypes.byref(lock),) if move == "Lock" else (None,)
        answer, ms = self.call(f"cuCheckpointProcess{move}", pid, *arguments)
        gib_s = {"gib_s": round(size / 2**30 / ms * 1e3, 2)} if ms and move in ("Checkpoint", "Restore") else {}
        say(move, answer=answer, ms=ms, **gib_s, state=self.state(pid), **of_the_gpu(pid))
        return answer == "CUDA_SUCCESS"


def of_the_gpu(pid: int) -> dict[str, Any]:
    """What a process has open and mapped of the GPU's devices, and how much host memory it has."""
    open_, folder = [], Path(f"/proc/{pid}/fd")
    with contextlib.suppress(OSError):
        for entry in folder.iterdir():
            with contextlib.suppress(OSError):
                open_.append(os.readlink(entry))
    maps = {line.split(maxsplit=5)[5] for line in read(f"/proc/{pid}/maps").splitlines() if "/dev/nvidia" in line}
    rss = [x.split()[1] for x in read(f"/proc/{pid}/status").splitlines() if x.startswith(("RssAnon", "RssShmem"))]
    return {"open": sorted({x for x in open_ if "nvidia" in x}), "mapped": sorted(maps)[:6], "rss_kb": rss}


def the_device(options: argparse.Namespace) -> None:
    def nodes() -> dict[str, str]:
        found = sorted(p for p in Path("/dev").glob("nvidia*"))
        return {p.name: f"{p.stat().st_mode & 0o777:o} {os.major(p.stat().st_rdev)}" for p in found}

    say("nodes", before=nodes(), module=read("/proc/driver/nvidia/version"))
    driver, version, count = Driver(), ctypes.c_int(), ctypes.c_int()
    until = time.monotonic() + 25
    while (found := driver.call("cuInit", 0))[0] == "CUDA_ERROR_SYSTEM_NOT_READY" and time.monotonic() < until:
        say("cuInit waits", answer=found)  # for the fabric manager, on a machine that has just started
        time.sleep(3)
    answer, ms = found
    driver.call("cuDriverGetVersion", ctypes.byref(version))
    driver.call("cuDeviceGetCount", ctypes.byref(count))
    name, total = ctypes.create_string_buffer(96), ctypes.c_size_t()
    driver.call("cuDeviceGetName", name, 96, 0)
    driver.call("cuDeviceTotalMem_v2", ctypes.byref(total), 0)
    library = {x.split(maxsplit=5)[5] for x in read("/proc/self/maps").splitlines() if "libcuda.so" in x}
    say(
        "cuInit", answer=answer, ms=ms, cuda=version.value, devices=count.value, name=name.value.decode(),
        gib=round(total.value / 2**30, 1), library=sorted(library), nodes=nodes(), **of_the_gpu(os.getpid()),
        threads=sorted(read(p / "comm") for p in Path("/proc/self/task").iterdir()),
    )  # fmt: skip
    fields = "name,uuid,driver_version,memory.total,memory.used,persistence_mode,mig.mode.current,pcie.link.gen.max"
    say("smi", said=smi(fields))


LEFTOVERS = """
import ctypes, json, os
def held():
    names = [f"/proc/self/fd/{n}" for n in os.listdir("/proc/self/fd")]
    return sorted({os.readlink(n) for n in names if os.path.lexists(n) and "nvidia" in os.readlink(n)})
said = {}
"""
LEFT = {
    "a cuInit that finds no device": "cuda = ctypes.CDLL('libcuda.so.1'); said['cuInit'] = cuda.cuInit(0)",
    "NVML": "ml = ctypes.CDLL('libnvidia-ml.so.1'); said['nvmlInit'] = ml.nvmlInit_v2(); said['then'] = held(); "
    "said['nvmlShutdown'] = ml.nvmlShutdown()",
}


def the_leftovers(options: argparse.Namespace) -> None:
    """What stays open in a process that has, or had, nothing on the GPU: it would be in the way of CRIU."""
    for name, code in LEFT.items():
        env = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if name != "NVML" else {})}
        code = f"{LEFTOVERS}{code}\nsaid['open'] = held()\nprint(json.dumps(said))"
        done = subprocess.run([sys.executable, "-I", "-c", code], env=env, capture_output=True, text=True, timeout=30)
        say("left open", by=name, said=done.stdout.strip() or done.stderr.strip()[-500:])


class Worker:
    """programs/files.py in a session of its own, with files for its standard streams: so CRIU can take it."""

    def __init__(self, kind: str, size: int, folder: Path) -> None:
        self.folder, self.size, self.heard = folder, size, 0
        with open(folder / "said", "ab") as said:
            command = [sys.executable, "-B", str(PROGRAMS / "files.py"), kind, str(size), str(folder)]
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True, cwd=PROGRAMS
            )
        self.pid = self.process.pid

    def line(self, seconds: float) -> str:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            lines = read(self.folder / "out").splitlines() if (self.folder / "out").exists() else []
            if len(lines) > self.heard:
                self.heard += 1
                return lines[self.heard - 1]
            if self.process.poll() is not None and not os.path.exists(f"/proc/{self.pid}"):
                break
            time.sleep(0.01)
        return f"nothing said: {read(self.folder / 'said')[-800:]}"

    def check(self, what: str) -> None:
        begin = time.monotonic()
        (self.folder / "go").unlink(missing_ok=True)
        say(what, memory=self.line(30), ms=round((time.monotonic() - begin) * 1e3))

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(END_S)


@contextlib.contextmanager
def worker(kind: str, size: int) -> Iterator[Worker]:
    with tempfile.TemporaryDirectory(prefix="wfb-bare-", dir="/var/tmp", ignore_cleanup_errors=True) as folder:
        made = Worker(kind, size, Path(folder))
        try:
            yield made
        finally:
            made.end()


def the_moves(options: argparse.Namespace, kind: str, size: int) -> None:
    driver = Driver()
    say("caller's cuInit", answer=driver.call("cuInit", 0))
    with worker(kind, size) as made:
        begin = time.monotonic()
        said = made.line(60)
        pid, tid = made.pid, ctypes.c_int()
        thread, _ = driver.call("cuCheckpointProcessGetRestoreThreadId", pid, ctypes.byref(tid))
        comm = read(f"/proc/{pid}/task/{tid.value}/comm") if tid.value else ""
        ranges = [line.split()[0].split("-") for line in read(f"/proc/{pid}/maps").splitlines() if line[0] != "("]
        largest = sorted((int(end, 16) - int(start, 16) for start, end in ranges), reverse=True)
        ms = round((time.monotonic() - begin) * 1e3)
        say(
            "worker", kind=kind, bytes=size, said=said, ms=ms, state=driver.state(pid),
            thread=[thread, tid.value, comm], largest_maps_gib=[round(x / 2**30, 2) for x in largest[:6]],
            **of_the_gpu(pid),
        )  # fmt: skip
        if said != "ready":
            return
        if not (driver.move(pid, "Lock", size) and driver.move(pid, "Checkpoint", size)):
            return
        say("used while it is checkpointed", smi=smi("memory.used"))
        if not (driver.move(pid, "Restore", size) and driver.move(pid, "Unlock", size)):
            return
        made.check("after the moves")
        if not options.criu:
            say("criu", error="there is none")
            return
        if driver.move(pid, "Lock", size) and driver.move(pid, "Checkpoint", size):
            through_criu(options.criu, driver, made)


def through_criu(criu: str, driver: Driver, made: Worker) -> None:
    """The plainest dump and restore there is: no namespaces, no page server, no woodfrog."""
    images = made.folder / "images"
    images.mkdir()
    common = ("--images-dir", str(images), "-v4", "--no-default-config", "--libdir", str(images))
    for verb, options in (
        ("dump", ("--tree", str(made.pid), "--log-file", "dump.log")),
        ("restore", ("--restore-detached", "--log-file", "restore.log")),
    ):
        begin = time.monotonic()
        said = run(criu, verb, *common, *options, seconds=60)
        log = [x for x in read(images / f"{verb}.log").splitlines() if "Error" in x or "Warn" in x]
        failed = "exit status" in said or said.startswith("(")
        gib = round(sum(p.stat().st_size for p in images.iterdir()) / 2**30, 2)
        ms = round((time.monotonic() - begin) * 1e3)
        say(f"criu {verb}", failed=failed, ms=ms, gib=gib, said=said[-300:], log=log[-8:])
        if failed:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            made.process.wait(END_S)
    if driver.move(made.pid, "Restore", made.size) and driver.move(made.pid, "Unlock", made.size):
        made.check("after CRIU and the moves")


QUESTIONS: dict[str, tuple[Callable[[argparse.Namespace], None], float]] = {
    "machine": (the_machine, 20.0),
    "device": (the_device, 45.0),
    "moves": (lambda o: the_moves(o, "raw", o.raw_mib << 20), 60.0),
    "leftovers": (the_leftovers, 30.0),
    "torch": (lambda o: the_moves(o, "torch", o.torch_mib << 20), 90.0),
}


def ask_all(options: argparse.Namespace, more: tuple[str, ...] = ()) -> int:
    until, failed = time.monotonic() + options.seconds, 0
    for name, (_, limit) in QUESTIONS.items():
        if name == "torch" and not there("torch"):
            say(name, error="there is no torch")
            continue
        limit = min(limit, until - time.monotonic())
        if limit < 1:
            say(name, error="left out, the time is over (--seconds)")
            failed += 1
            continue
        command = [sys.executable, __file__, *sys.argv[1:], *more, "--ask", name]
        process = subprocess.Popen(command, start_new_session=True)
        try:
            failed += process.wait(limit) != 0
        except subprocess.TimeoutExpired:
            say(name, error=f"it did not end within {limit:.0f} s")
            failed += 1
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_S)  # one that hangs in the kernel stays
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    criu = next(filter(os.path.exists, (os.environ.get("WOODFROG_CRIU", ""), *CRIU)), "")
    parser.add_argument("--criu", default=criu, help=f"(default: {criu or 'that on the PATH'})")
    parser.add_argument("--raw-mib", type=int, default=1024, help="on the GPU, without torch (default: 1024)")
    parser.add_argument("--torch-mib", type=int, default=2048, help="on the GPU, by torch (default: 2048)")
    parser.add_argument("--seconds", type=float, default=240.0, help="for all questions together (default: 240)")
    parser.add_argument("--fake", action="store_true", help="on the fake driver of the tests")
    parser.add_argument("--ask", default="", help="one question, in this process")
    options = parser.parse_args()
    options.criu = options.criu or shutil.which("criu") or ""
    if options.ask:
        try:
            QUESTIONS[options.ask][0](options)
        except Exception as e:
            say(options.ask, error=f"{type(e).__name__}: {e}")
            return 1
        return 0
    if options.fake:
        sys.path.insert(0, str(PROGRAMS.parent))
        from common_gpu import fake_hardware

        with fake_hardware() as hardware:
            os.environ["LD_LIBRARY_PATH"] = str(hardware.folder)
            return ask_all(options, ("--raw-mib", "32"))
    return ask_all(options)


if __name__ == "__main__":
    sys.exit(main())
