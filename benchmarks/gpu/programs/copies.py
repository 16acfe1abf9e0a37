"""Copies between host and GPU in one process, by each way there is; the program of restore.py's bound.

    python copies.py BYTES TURNS

Prints JSON: GiB/s of each turn, by direction and way, and of pinning itself.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable

from raw import Cuda

BUFFER = 16 << 20
"""Of a staging buffer; there are two for each thread."""
THREADS = (1, 4)
GIB = 1 << 30


def staged(cuda: Cuda, device: int, host: int, size: int, arena: int, threads: int, *, up: bool) -> None:
    """Through pinned buffers, two for each thread: one is filled or emptied while the other is on its way."""
    buffer = min(BUFFER, size // threads // 2)
    failures: list[Exception] = []

    def work(number: int) -> None:
        try:
            cuda.ok("cuCtxSetCurrent", cuda.context)
            share = size // threads
            begin, end = number * share, (number + 1) * share
            places = [arena + (2 * number + i) * BUFFER for i in (0, 1)]
            streams = [cuda.stream() for _ in places]
            waiting: list[tuple[int, int] | None] = [None, None]
            pieces = [(at, min(buffer, end - at)) for at in range(begin, end, buffer)]
            for turn, piece in enumerate([*pieces, None, None]):
                i = turn % 2
                cuda.wait(streams[i])
                if not up and (done := waiting[i]) is not None:
                    ctypes.memmove(host + done[0], places[i], done[1])
                waiting[i] = piece
                if piece is None:
                    continue
                at, length = piece
                if up:
                    ctypes.memmove(places[i], host + at, length)
                    cuda.to_device_later(device + at, places[i], length, streams[i])
                else:
                    cuda.to_host_later(places[i], device + at, length, streams[i])
            for stream in streams:
                cuda.ok("cuStreamDestroy_v2", stream)
        except Exception as e:
            failures.append(e)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        raise failures[0]


def main(text: str, turns: str) -> None:
    size = int(text) & -4096 * max(THREADS)
    cuda = Cuda()
    device = cuda.alloc(size)
    pages = mmap.mmap(-1, size)
    host = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    ctypes.memset(host, 7, size)  # all there: a copy of untouched memory would count faults
    arena = cuda.pinned(2 * BUFFER * max(THREADS))
    pinned = cuda.pinned(size)
    ctypes.memset(pinned, 9, size)
    speeds: dict[str, dict[str, list[float]]] = {"to_device": {}, "from_device": {}, "pinning": {}}

    def timed(kind: str, way: str, work: Callable[[], object]) -> None:
        begin = time.perf_counter()
        work()
        cuda.synchronise()
        speeds[kind].setdefault(way, []).append(size / GIB / (time.perf_counter() - begin))

    ways: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
        "pageable": (lambda: cuda.to_device(device, host, size), lambda: cuda.to_host(host, device, size)),
        "pinned": (lambda: cuda.to_device(device, pinned, size), lambda: cuda.to_host(pinned, device, size)),
    }
    for n in THREADS:
        ways[f"staged, {n} thread{'s' * (n > 1)}"] = (
            lambda n=n: staged(cuda, device, host, size, arena, n, up=True),
            lambda n=n: staged(cuda, device, host, size, arena, n, up=False),
        )
    for up, down in ways.values():  # once each, not counted
        up()
        down()
    for _ in range(int(turns)):
        for way, (up, down) in ways.items():
            timed("to_device", way, up)
            timed("from_device", way, down)
        timed("pinning", "register", lambda: cuda.register(host, size))
        timed("to_device", "registered", ways["pageable"][0])
        timed("from_device", "registered", ways["pageable"][1])
        timed("pinning", "unregister", lambda: cuda.unregister(host))
        more: list[int] = []
        timed("pinning", "allocate", lambda more=more: more.append(cuda.pinned(size)))
        cuda.free_pinned(more[0])
    # The staged ways must not be fast because they leave something out.
    for n in THREADS:
        tile = os.urandom((1 << 20) + 4104)
        for at in range(0, size, len(tile)):
            pages[at : at + len(tile)] = tile[: size - at]
        ctypes.memmove(pinned, host, size)
        staged(cuda, device, host, size, arena, n, up=True)
        ctypes.memset(host, 0, size)
        staged(cuda, device, host, size, arena, n, up=False)
        if ctypes.CDLL(None).memcmp(ctypes.c_void_p(host), ctypes.c_void_p(pinned), ctypes.c_size_t(size)):
            raise SystemExit(f"staged by {n} threads: other bytes came back")
    print(json.dumps(speeds))


if __name__ == "__main__":
    main(*sys.argv[1:])
