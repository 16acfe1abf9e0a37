"""The real page server and a process whose memory it serves, without CRIU."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

from woodfrog.linux.pageserver import NEVER, PageServer, Present, ServedPages

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ("-std=gnu11", "-D_GNU_SOURCE", "-Wall", "-Wextra")
SANITIZE = (
    "-g",
    "-O1",
    "-DPROCESSORS=16",
    "-DPIECES_A_PUSHER=2",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
)
UID = 64647


def compile_c(target: Path, source: Path, *flags: str) -> Path:
    subprocess.run(
        [shutil.which("cc") or "gcc", *FLAGS, *flags, str(source), "-o", str(target), "-pthread"], check=True
    )
    return target


def sanitized_server(folder: Path) -> Path | None:
    """The page server with the address and undefined-behaviour sanitizers; None where the compiler has none."""
    options = folder / "options.c"
    # It may not be traced, so no leaks can be looked for.
    options.write_text('const char *__asan_default_options(void) { return "detect_leaks=0:abort_on_error=1"; }\n')
    source = ROOT / "native" / "pageserver.c"
    done = subprocess.run(
        [
            shutil.which("cc") or "gcc",
            *FLAGS,
            *SANITIZE,
            str(source),
            str(options),
            "-o",
            str(folder / "server"),
            "-pthread",
        ],
        capture_output=True,
    )
    return folder / "server" if done.returncode == 0 else None


def cpu_s(pid: int) -> float:
    """Processor time it has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass
class Victim:
    """`pageserver_victim.c`: a process that waits for its memory."""

    process: asyncio.subprocess.Process
    folder: Path
    served: ServedPages | None = None

    @classmethod
    async def start(
        cls, binary: Path, folder: Path, *, seed: int = 1, operations: int = 0, threads: int = 2, pages: int = 2048
    ) -> Victim:
        folder.mkdir()
        process = await asyncio.create_subprocess_exec(
            str(binary), str(folder), str(seed), str(operations), str(threads), str(pages),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        victim = cls(process, folder)
        await victim.expect("ready")
        return victim

    async def expect(self, word: str, seconds: float = 60) -> None:
        assert self.process.stdout is not None
        line = await asyncio.wait_for(self.process.stdout.readline(), seconds)
        assert line.decode().strip() == word, (line, await self.words())

    def serve(
        self,
        server: PageServer,
        *,
        working_set: bytes | None = None,
        drain_ms: int = NEVER,
        around: int = 1 << 16,
        present: Present | None = None,
        files: tuple[str, ...] = ("pages0", "pages1", "pages2"),
        **more: bool,
    ) -> ServedPages:
        """Give it to the page server, and let it go."""
        names = ("index", *files)
        fds = [os.open(self.folder / name, os.O_RDONLY) for name in names]
        if working_set is not None:
            (self.folder / "set").write_bytes(working_set)
            fds.append(os.open(self.folder / "set", os.O_RDONLY))
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(self.folder / "socket"))
            listener.listen(1)
            self.served = server.serve(
                listener,
                fds[0],
                fds[1 : len(names)],
                working_set=fds[-1] if working_set is not None else None,
                around=around,
                drain_ms=drain_ms,
                present=present,
                **more,
            )
        for fd in fds:
            os.close(fd)
        self.go()
        return self.served

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")

    async def words(self) -> str:
        """What it complained of."""
        assert self.process.stderr is not None
        return (await asyncio.wait_for(self.process.stderr.read(), 10)).decode()

    async def end(self, seconds: float = 60) -> int:
        """Let it check everything once more and end."""
        self.go()
        return await asyncio.wait_for(self.process.wait(), seconds)

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
