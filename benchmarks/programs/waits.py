"""The 600 MB process of programs/starts.py, whose calls can be held open so that each gets a container of its own.

Two classes, since what a thaw brings in first is learned for each.
"""

import time

import starts

import woodfrog as modal

app = modal.App("waits")


class Big:
    @modal.enter(snap=True)
    def load(self):
        self.state = starts.load_big()


@app.cls(enable_memory_snapshot=True)
class Small(Big):
    @modal.method()
    def run(self, seconds):
        time.sleep(seconds)
        return len(self.state)


@app.cls(enable_memory_snapshot=True)
class Reads(Big):
    @modal.method()
    def run(self, seconds):
        time.sleep(seconds)
        return starts.run_big(self.state, 0)
