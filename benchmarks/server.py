"""A workload of programs/starts.py as a plain Python process, for what woodfrog is compared with.

    python benchmarks/server.py fork Small /tmp/fork.sock     # a live parent that forks a child for each request
    python benchmarks/server.py listen Small /tmp/one.sock    # one process that answers; frozen and thawed by criu
    python benchmarks/server.py stdio Small                   # the same over stdin and stdout; by gVisor

One line of JSON in (the request), one line of JSON out (the answer). On stdout it says `ready` when it is. `fork` ends
with its parent, which holds the other end of its standard input.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import socket
import sys
from pathlib import Path
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).parent / "programs"))

from starts import PLAIN


def answer(run: Any, state: Any, stream: IO[bytes], out: IO[bytes]) -> None:
    while line := stream.readline():
        out.write(json.dumps(run(state, json.loads(line))).encode() + b"\n")
        out.flush()


def main(how: str, workload: str, path: str = "") -> None:
    load, run = PLAIN[workload]
    state = load()
    gc.collect()
    gc.freeze()
    if how == "stdio":
        print("ready", flush=True)
        answer(run, state, sys.stdin.buffer, sys.stdout.buffer)
        return
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(8)
    print("ready", flush=True)
    if how == "listen":
        # What criu cannot take along must not be open when it comes.
        null = os.open(os.devnull, os.O_RDWR)
        for fd in range(3):
            os.dup2(null, fd)
        os.close(null)
    while how == "listen" or select.select([listener, sys.stdin], [], [])[0] == [listener]:
        connection, _ = listener.accept()
        if how == "listen" or os.fork() == 0:
            with connection.makefile("rwb") as stream:
                answer(run, state, stream, stream)
            if how == "fork":
                os._exit(0)
        connection.close()


if __name__ == "__main__":
    main(*sys.argv[1:4])
