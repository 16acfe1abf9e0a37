"""What the burst, memory, capture, bit flip and kill benchmarks call. Answers can be checked by whoever called."""

import os
import time
import zlib

import starts

import woodfrog as modal

app = modal.App("bursts")
MIB = 1 << 20


class Held:
    """Checksums of memory, of files in the overlay and in /dev/shm: `check` sees any byte that is not its own."""

    mib = 8

    @modal.enter(snap=True)
    def load(self):
        self.memory = starts.load_pages(self.mib)
        self.sums = [zlib.crc32(self.memory[at : at + MIB]) for at in range(0, len(self.memory), MIB)]
        for path in ("/tmp/held", "/dev/shm/held"):
            with open(path, "wb") as f:
                f.write(self.memory[: 64 << 10])

    @modal.method()
    def check(self, number, seconds=0.0):
        """The number doubled, if all is as it was."""
        end = time.monotonic() + seconds
        while True:
            for i, right in enumerate(self.sums):
                if zlib.crc32(self.memory[i * MIB : (i + 1) * MIB]) != right:
                    raise ValueError(f"memory differs in its MiB number {i}")
            if time.monotonic() >= end:
                break
            time.sleep(0.01)
        for path in ("/tmp/held", "/dev/shm/held"):
            with open(path, "rb") as f:
                if f.read() != self.memory[: 64 << 10]:
                    raise ValueError(f"{path} differs")
        return number * 2

    @modal.method()
    def identity(self, number):
        return [number * 2, os.environ["WOODFROG_INSTANCE"], os.urandom(8).hex()]


ONCE = {"enable_memory_snapshot": True, "single_use_containers": True}
AGAIN = {"retries": modal.Retries(max_retries=10, initial_delay=0.1, backoff_coefficient=1.0)}


@app.cls(**ONCE)
class Once(Held):
    """A container of its own for each call."""


@app.cls(enable_memory_snapshot=True, scaledown_window=600)
class Lazy(Held):
    """Large enough for the page server."""

    mib = 32


@app.cls(enable_memory_snapshot=True, scaledown_window=600)
class Tiny(Held):
    mib = 2


@app.cls(**ONCE, **AGAIN)
class OnceAgain(Held):
    pass


@app.cls(enable_memory_snapshot=True, scaledown_window=2, **AGAIN)
class LazyAgain(Held):
    mib = 32


@app.function(enable_memory_snapshot=True, **AGAIN)
def twice(number):
    return number * 2
