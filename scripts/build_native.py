"""Compile native/*.c into src/woodfrog/native/bin/woodfrog-<stem>; NAME.so.c becomes a shared library.

Used by `make native` and by the package's own build (setup.py). Does nothing for a binary that is newer than its
source and every header. A build replaces the binary in one step, so a running copy is never disturbed.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "native"
BINARIES = ROOT / "src" / "woodfrog" / "native" / "bin"
FLAGS = ["-O2", "-Wall", "-Wextra", "-Werror", "-std=gnu11", "-D_GNU_SOURCE"]


class BuildError(Exception):
    """One line for the person who ran the build."""


def compiler() -> list[str]:
    named = shlex.split(os.environ.get("CC", ""))
    if named:
        return named
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return [name]
    raise BuildError("no C compiler: install gcc and libc6-dev, or name one in CC")


def can_link_static(cc: list[str]) -> bool:
    """Whether the toolchain has a static libc: a static binary starts inside any root file system."""
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory, "probe.c")
        source.write_text("int main(void) { return 0; }\n")
        command = [*cc, "-static", str(source), "-o", str(Path(directory, "probe"))]
        return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def stale(binary: Path, inputs: list[Path]) -> bool:
    try:
        built = binary.stat().st_mtime_ns
    except FileNotFoundError:
        return True
    return any(path.stat().st_mtime_ns > built for path in inputs)


def build(sources: Path = SOURCES, binaries: Path = BINARIES) -> list[Path]:
    """Compile what is out of date and return the binaries that were built."""
    headers = sorted(sources.glob("*.h"))
    wanted = {binaries / f"woodfrog-{source.stem}": source for source in sorted(sources.glob("*.c"))}
    if binaries.is_dir():
        for old in binaries.glob("woodfrog-*"):
            if old not in wanted:
                old.unlink(missing_ok=True)
    pending = {binary: source for binary, source in wanted.items() if stale(binary, [source, *headers])}
    if not pending:
        return []
    cc = compiler()
    static = ["-static"] if can_link_static(cc) else []
    binaries.mkdir(parents=True, exist_ok=True)
    for binary, source in pending.items():
        # A name that the sweep above does not match: another build may be running.
        temporary = binary.with_name(f".{binary.name}.{os.getpid()}")
        try:
            print(f"native: {source.name} -> {binary.name}", flush=True)
            kind = ["-shared", "-fPIC"] if binary.suffix == ".so" else static
            done = subprocess.run([*cc, *FLAGS, *kind, "-I", str(sources), str(source), "-o", str(temporary), "-ldl"])
            if done.returncode != 0:
                raise BuildError(f"{source.name} does not compile (the compiler's messages are above)")
            temporary.chmod(0o755)
            temporary.replace(binary)
        finally:
            temporary.unlink(missing_ok=True)
    return list(pending)


def main() -> int:
    try:
        build()
    except BuildError as error:
        print(f"native: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
