"""What makes two machines the same to a snapshot."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest

from woodfrog.criu.binary import Criu
from woodfrog.snapshot.compat import (
    HostFacts,
    cpu_features,
    cpu_model,
    explain_mismatch,
    host_facts,
    runtime_digest,
    worker_class,
)

FACTS = HostFacts("x86_64", ("avx2", "sse2"), "6.18.0", "4.2.1", "ab12", 4096)
ARM64 = """\
processor\t: 0
BogoMIPS\t: 125.00
Features\t: fp asimd evtstrm aes crc32 atomics sve cpuid
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x4
CPU part\t: 0xd0c
CPU revision\t: 1
"""


def test_every_fact_counts_and_is_explained() -> None:
    first = worker_class(FACTS)
    assert worker_class(replace(FACTS)) == first and explain_mismatch(first.parts, first.parts) == ""
    other = HostFacts("aarch64", ("avx2",), "6.19.0", "4.3.0", "cd34", 16384, "0x41:0xd0c", "32")
    for name in (f.name for f in fields(HostFacts)):
        changed = worker_class(replace(FACTS, **{name: getattr(other, name)}))
        assert changed.digest != first.digest, name
        assert explain_mismatch(first.parts, changed.parts), name


@pytest.mark.parametrize(
    ("there", "here", "says"),
    [
        ({"cpu": "avx2 avx512f sse2"}, {"cpu": "avx2 sse2"}, "this processor lacks avx512f"),
        ({"cpu": "sse2"}, {"cpu": "avx2 sse2"}, "this processor has avx2 besides"),
        ({"criu": "4.1.1"}, {"criu": "4.2.1"}, "CRIU 4.1.1 there, 4.2.1 here"),
        ({"model": "0x41:0xd0c"}, {"model": "0x41:0xd40"}, "processor 0x41:0xd0c there, 0x41:0xd40 here"),
        ({"vector_bytes": "32"}, {"vector_bytes": "16"}, "length of SVE vectors 32 there, 16 here"),
        ({"gpu": "H100"}, {}, "GPU H100 there, unknown here"),
    ],
)
def test_explanations(there: dict[str, str], here: dict[str, str], says: str) -> None:
    assert explain_mismatch(there, here) == says


def test_cpu_features() -> None:
    x86 = "processor: 0\nflags\t\t: fpu sse2 avx2 avx512f md_clear constant_tsc hypervisor\n"
    assert cpu_features(x86) == ("avx2", "avx512f", "fpu", "sse2")
    # A process may run on any of them: only what all have counts.
    assert cpu_features(x86 + "\nflags\t\t: fpu sse2\n") == ("fpu", "sse2")
    assert cpu_features(ARM64) == tuple(sorted(("fp", "asimd", "evtstrm", "aes", "crc32", "atomics", "sve", "cpuid")))
    assert cpu_features(ARM64 + "\n" + ARM64.replace("sve ", "")) == tuple(sorted(set(cpu_features(ARM64)) - {"sve"}))
    assert cpu_features("") == ()


def test_arm64_names_the_processor_itself() -> None:
    assert cpu_model(ARM64) == cpu_model(ARM64 + "\n" + ARM64) == "0x41:0xd0c"
    # Large and small cores: a process may have asked either.
    assert cpu_model(ARM64 + "\n" + ARM64.replace("0xd0c", "0xd05")) == "0x41:0xd05 0x41:0xd0c"
    assert cpu_model("processor: 0\nmodel name: x\nflags: fpu\n") == ""
    # On x86 its class is what it was before: nothing has to be captured anew.
    assert not worker_class(FACTS).parts.keys() & {"model", "vector_bytes"}


def test_runtime_digest(tmp_path: Path) -> None:
    (tmp_path / "worker").mkdir()
    (tmp_path / "worker" / "a.py").write_text("1")
    (tmp_path / "protocol.py").write_text("2")
    init = tmp_path / "init"
    init.write_bytes(b"3")
    seen = {runtime_digest(tmp_path, init)}
    for path in (tmp_path / "worker" / "a.py", tmp_path / "protocol.py", init):
        path.write_text("changed")
        seen.add(runtime_digest(tmp_path, init))
    (tmp_path / "worker" / "b.py").write_text("")
    seen.add(runtime_digest(tmp_path, init))
    assert len(seen) == 5
    (tmp_path / "unrelated.py").write_text("x")
    assert runtime_digest(tmp_path, init) in seen


def test_this_machine() -> None:
    facts = host_facts(Criu(Path("/usr/sbin/criu"), (4, 2, 1)))
    assert facts == host_facts(Criu(Path("/elsewhere/criu"), (4, 2, 1))) and facts.cpu and facts.criu == "4.2.1"
    assert len(worker_class(facts).digest) == 32
