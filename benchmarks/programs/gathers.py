"""A program that reads here and there in a lot of memory, and says how long that took it."""

import woodfrog as modal

app = modal.App("gathers")
WORDS = 64 << 20
READS = 4_000_000


@app.cls(enable_memory_snapshot=True, memory=4096, max_containers=1)
class Gather:
    @modal.enter(snap=True)
    def load(self):
        import numpy as np

        self.table = np.ones(WORDS)  # numpy asks for huge pages
        self.table[:] = np.arange(WORDS)
        self.places = np.random.default_rng(7).integers(0, WORDS, READS)

    @modal.method()
    def run(self):
        import re
        import time
        from pathlib import Path

        begin = time.thread_time()
        answer = float(self.table[self.places].sum())
        ms = (time.thread_time() - begin) * 1e3
        huge = re.search(r"AnonHugePages: +(\d+)", Path("/proc/self/smaps_rollup").read_text())
        return {"answer": answer, "ms": ms, "huge_mib": int(huge[1]) >> 10}
