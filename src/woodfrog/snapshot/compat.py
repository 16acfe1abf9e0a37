"""What must match between the machine that made a snapshot and the one that thaws it."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import woodfrog
from woodfrog.criu.binary import Criu
from woodfrog.linux.sandbox import init_binary_path

__all__ = [
    "HostFacts",
    "WorkerClass",
    "cpu_features",
    "cpu_model",
    "explain_mismatch",
    "host_facts",
    "runtime_digest",
    "with_gpu",
    "worker_class",
]

X86_ISA = (
    "fpu", "mmx", "sse", "ssse3", "pni", "avx", "fma", "f16c", "bmi", "adx", "aes", "vaes", "pclmul", "vpclmul",
    "sha", "gfni", "popcnt", "abm", "lzcnt", "movbe", "cx16", "cx8", "cmov", "rdrand", "rdseed", "xsave", "fxsr",
    "amx", "rtm", "hle", "erms", "fsrm", "fsgsbase", "invpcid", "clflush", "clwb", "pku", "ospke", "movdir",
    "serialize", "xgetbv", "user_shstk", "3dnow", "waitpkg", "lahf", "rdpid", "rdtscp", "tbm", "xop", "prefetch",
)  # fmt: skip
"""Beginnings of the flags that user programs can see and choose code by. The rest of the flags (power, virtualisation,
mitigations) change with firmware and kernel and mean nothing to a thawed process."""


@dataclass(frozen=True)
class HostFacts:
    """What of the machine a frozen process has seen and cannot see again."""

    arch: str
    cpu: tuple[str, ...]
    kernel: str
    criu: str
    runtime: str
    page_size: int
    model: str = ""
    """arm64: who made the processor, and which it is."""
    vector_bytes: str = ""
    """arm64: how long SVE's vectors are in a new process; empty without SVE."""


@dataclass(frozen=True)
class WorkerClass:
    """Snapshots restore where the digest is the same. `parts` says what it is made of, by name."""

    digest: str
    parts: Mapping[str, str] = field(default_factory=dict)


def cpu_features(cpuinfo: str) -> tuple[str, ...]:
    """The instruction sets every processor has, from /proc/cpuinfo (x86 `flags`, arm64 `Features`)."""
    common: set[str] | None = None
    x86 = False
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            x86 = key.strip() == "flags"
            found = set(value.split())
            common = found if common is None else common & found
    return tuple(sorted(f for f in common or () if not x86 or f.startswith(X86_ISA)))


def cpu_model(cpuinfo: str) -> str:
    """Every kind of processor that there is, by implementer and part; empty on x86, whose text names neither.

    On arm64 the features do not say it all: libc's copies and compilers at run time keep a cache line's length and how
    much one instruction zeroes, and numeric libraries choose their code by the part. They ask once, at their start.

    >>> cpu_model("CPU implementer\\t: 0x41\\nCPU part\\t: 0xd0c\\n")
    '0x41:0xd0c'
    """
    found, implementer = set(), ""
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "CPU implementer":
            implementer = value.strip()
        elif key.strip() == "CPU part":
            found.add(f"{implementer}:{value.strip()}")
    return " ".join(sorted(found))


def _vector_bytes() -> str:
    try:
        return Path("/proc/sys/abi/sve_default_vector_length").read_text().strip()
    except OSError:
        return ""


def runtime_digest(package: Path, init_binary: Path) -> str:
    """Digest of woodfrog's own code that is frozen into a snapshot, talks to a thawed worker, or makes its root."""
    digest = hashlib.sha256()
    for path in (
        *sorted((package / "worker").glob("*.py")),
        package / "protocol.py",
        package / "linux/rootplan.py",
        init_binary,
    ):
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            content = b""
        digest.update(f"{path.name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def host_facts(criu: Criu) -> HostFacts:
    """Look at this machine: a few files, about a millisecond."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    return HostFacts(
        arch=platform.machine(),
        cpu=cpu_features(cpuinfo),
        kernel=os.uname().release,
        criu=criu.name,
        runtime=runtime_digest(Path(woodfrog.__file__).parent, init_binary_path()),
        page_size=os.sysconf("SC_PAGE_SIZE"),
        model=cpu_model(cpuinfo),
        vector_bytes=_vector_bytes(),
    )


def worker_class(facts: HostFacts) -> WorkerClass:
    """The class of this machine.

    >>> facts = HostFacts("x86_64", ("avx2", "sse2"), "6.18.0", "4.2.1", "ab12", 4096)
    >>> worker_class(facts).parts["cpu"]
    'avx2 sse2'
    """
    parts = {
        "arch": facts.arch,
        "cpu": " ".join(facts.cpu),
        "kernel": facts.kernel,
        "criu": facts.criu,
        "runtime": facts.runtime,
        "page_size": str(facts.page_size),
    }
    # Where there is none, as on x86, the class is what it would be without.
    parts |= {"model": facts.model} if facts.model else {}
    parts |= {"vector_bytes": facts.vector_bytes} if facts.vector_bytes else {}
    return _class_of(parts)


def _class_of(parts: Mapping[str, str]) -> WorkerClass:
    text = "".join(f"{key}={value}\n" for key, value in sorted(parts.items()))
    return WorkerClass(hashlib.sha256(text.encode()).hexdigest()[:32], parts)


def with_gpu(base: WorkerClass, chip: str, driver: str) -> WorkerClass:
    """The class of snapshots that hold the memory of such a GPU."""
    return _class_of({**base.parts, "gpu": chip, "driver": driver})


NAMES = {
    "arch": "architecture",
    "kernel": "kernel",
    "criu": "CRIU",
    "runtime": "woodfrog's worker runtime",
    "page_size": "page size",
    "model": "processor",
    "vector_bytes": "length of SVE vectors",
    "gpu": "GPU",
    "driver": "GPU driver",
}


def explain_mismatch(made_on: Mapping[str, str], here: Mapping[str, str]) -> str:
    """What differs between two machines, in words; empty when nothing does.

    >>> explain_mismatch({"cpu": "avx2 sse2", "kernel": "6.1"}, {"cpu": "sse2", "kernel": "6.2"})
    'this processor lacks avx2; kernel 6.1 there, 6.2 here'
    """
    differences = []
    for key in sorted({*made_on, *here}):
        there, now = made_on.get(key, "unknown"), here.get(key, "unknown")
        if there == now:
            continue
        if key == "cpu":
            lacks, more = set(there.split()) - set(now.split()), set(now.split()) - set(there.split())
            if lacks:
                differences.append(f"this processor lacks {', '.join(sorted(lacks))}")
            if more:
                differences.append(f"this processor has {', '.join(sorted(more))} besides")
        else:
            differences.append(f"{NAMES.get(key, key)} {there} there, {now} here")
    return "; ".join(differences)
