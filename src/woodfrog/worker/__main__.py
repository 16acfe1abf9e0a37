"""`python -P -m woodfrog.worker [--socket PATH]`: started by the daemon inside a sandbox."""

from __future__ import annotations

import sys

from woodfrog.protocol import WORKER_SOCKET
from woodfrog.worker.server import serve


def main(argv: list[str]) -> int:
    path = WORKER_SOCKET
    if len(argv) == 2 and argv[0] == "--socket":
        path = argv[1]
    elif argv:
        print("usage: python -m woodfrog.worker [--socket PATH]", file=sys.stderr)
        return 2
    return serve(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
