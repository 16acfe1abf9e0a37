"""The fork server to compare with: a parent that has a function loaded and forks a child for each request.

    python benchmarks/forkserver.py Small /tmp/fork.sock

One line of JSON in (the request), one line of JSON out (the answer). It says `ready` on stdout when it listens, and
ends with its parent, which holds the other end of its standard input.
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

sys.path.insert(0, str(Path(__file__).parent / "programs"))

from starts import PLAIN


def main(workload: str, path: str) -> None:
    load, run = PLAIN[workload]
    state = load()
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(8)
    print("ready", flush=True)
    while select.select([listener, sys.stdin], [], [])[0] == [listener]:
        connection, _ = listener.accept()
        if os.fork() == 0:
            with connection.makefile("rwb") as stream:
                stream.write(json.dumps(run(state, json.loads(stream.readline()))).encode() + b"\n")
            os._exit(0)
        connection.close()


if __name__ == "__main__":
    main(*sys.argv[1:3])
