"""The one process of a node that calls the driver: `python -m woodfrog.cuda.helper`.

It is warm (cuInit takes seconds), and it can be killed: a call that hangs takes no daemon with it. One JSON object a
line, in and out; each request has a thread of its own. What the driver reports by itself (Xid errors) is told without
having been asked. It ends with its standard input.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
from dataclasses import asdict
from typing import Any

from woodfrog.cuda.driver import Driver
from woodfrog.errors import GpuError, WoodfrogError

__all__ = ["main"]

_PR_SET_PDEATHSIG = 1
_writing = threading.Lock()


def _say(answer: dict[str, Any]) -> None:
    with _writing:
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _do(driver: Driver, request: dict[str, Any]) -> Any:
    pid = int(request["pid"])
    match request["op"]:
        case "state":
            return driver.state(pid)
        case "held":
            return driver.held(pid)
        case "thread":
            return driver.thread(pid)
        case "vitals":
            return asdict(driver.vitals(str(request["uuid"])))
        case "lock" | "checkpoint" | "restore" | "unlock" as move:
            pairs = [(str(a), str(b)) for a, b in request.get("pairs", ())]
            return driver.move(pid, move, timeout_ms=int(request.get("timeout_ms", 0)), pairs=pairs)
        case other:
            raise GpuError(f"no operation {other!r}")


def _answer(driver: Driver, request: dict[str, Any]) -> None:
    try:
        _say({"id": request["id"], "value": _do(driver, request)})
    except WoodfrogError as e:
        _say({"id": request["id"], "error": e.to_dict()})
    except Exception as e:
        error = GpuError(f"{request.get('op')}: {type(e).__name__}: {e}")
        _say({"id": request["id"], "error": error.to_dict()})


def _tell_xid(uuid: str, xid: int) -> None:
    _say({"xid": xid, "uuid": uuid})


def main() -> int:
    # Also while cuInit hangs: nobody would read the end of the input then.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        driver = Driver()
    except WoodfrogError as e:
        _say({"error": e.to_dict()})
        return 1
    _say({"node": asdict(driver.node)})
    watching = threading.Thread(target=driver.watch, args=(_tell_xid,), daemon=True)
    watching.start()
    for line in sys.stdin:
        threading.Thread(target=_answer, args=(driver, json.loads(line)), daemon=True).start()
    os._exit(0)  # a thread may hang in the driver


if __name__ == "__main__":
    sys.exit(main())
