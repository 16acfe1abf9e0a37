"""Fifty copies of one snapshot: what is drawn after the thaw never repeats, and what a user holds needs a hook."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from e2e.harness import Daemon

pytestmark = [pytest.mark.root, pytest.mark.criu]

COPIES = 50

# Every family is used before the freeze, so that whatever it keeps in memory is in the snapshot. Each copy answers one
# call, since containers are for single use.
PROGRAM = """
import json, os, queue, random, secrets, socket, ssl, sys, tempfile, threading, uuid
import numpy, sqlite3
import woodfrog

app = woodfrog.App("unique")
held = random.Random(1)
held_numpy = numpy.random.default_rng(1)
renewed = random.Random(1)


@woodfrog.register_after_restore
def renew():
    renewed.seed()


def thread_of_old(wanted, drawn):
    while wanted.get():
        drawn.put(ssl.RAND_bytes(16).hex())


def draw():
    handle, name = tempfile.mkstemp()
    os.close(handle)
    database = sqlite3.connect(":memory:")
    return {
        "random": random.getrandbits(64),
        "random.random": random.random(),
        "numpy legacy": int(numpy.random.randint(2**62)),
        "numpy legacy normal": float(numpy.random.standard_normal()),
        "ssl": ssl.RAND_bytes(16).hex(),
        "urandom": os.urandom(16).hex(),
        "secrets": secrets.token_hex(16),
        "SystemRandom": random.SystemRandom().getrandbits(64),
        "uuid1": str(uuid.uuid1()),
        "uuid1 node and sequence": [uuid.uuid1().node, uuid.uuid1().clock_seq],
        "uuid4": str(uuid.uuid4()),
        "tempfile": name,
        "tempfile of a new thread": in_thread(tempfile.mktemp),
        "ssl in a new thread": in_thread(lambda: ssl.RAND_bytes(16).hex()),
        "sqlite": database.execute("select hex(randomblob(16))").fetchone()[0],
    }


def in_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


@app.cls(enable_memory_snapshot=True, single_use_containers=True, max_containers=10)
class Copy:
    @woodfrog.enter(snap=True)
    def load(self):
        self.wanted, self.drawn = queue.SimpleQueue(), queue.SimpleQueue()
        threading.Thread(target=thread_of_old, args=(self.wanted, self.drawn), daemon=True).start()
        self.before = draw() | self.old_thread()
        self.loop_seed = random.random()

    def old_thread(self):
        self.wanted.put(True)
        return {"ssl in a thread from before": self.drawn.get()}

    @woodfrog.method()
    def draw(self):
        fresh = draw() | self.old_thread() | {
            "host name": socket.gethostname(),
            "instance": os.environ["WOODFROG_INSTANCE"],
            "held and renewed": renewed.random(),
        }
        kept = {
            "held": held.random(),
            "held numpy": float(held_numpy.random()),
            "drawn before the freeze": self.loop_seed,
            "hash of a text": hash("frog"),
        }
        return {"fresh": fresh, "kept": kept, "before": self.before, "restored": woodfrog.restored()}


if __name__ == "__main__":
    draw_once = woodfrog.Cls.from_name("unique", "Copy")().draw
    calls = [draw_once.spawn() for _ in range(int(sys.argv[1]))]
    json.dump(woodfrog.FunctionCall.gather(*calls), sys.stdout)
"""

TORCH = """
import json, sys
import torch
import woodfrog

app = woodfrog.App("unique-torch")
held = torch.Generator().manual_seed(1)
torch.rand(4)


@app.function(enable_memory_snapshot=True, single_use_containers=True, max_containers=4)
def draw():
    return [torch.randint(2**62, ()).item(), torch.rand(3).tolist(), torch.rand(1, generator=held).item()]


if __name__ == "__main__":
    one = woodfrog.Function.from_name("unique-torch", "draw")
    json.dump(woodfrog.FunctionCall.gather(*[one.spawn() for _ in range(int(sys.argv[1]))]), sys.stdout)
"""


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with Daemon() as daemon:
        yield daemon


def drawn_by_copies(daemon: Daemon, text: str) -> list[Any]:
    program = daemon.program(text)
    daemon.cli("deploy", str(program), "--snapshot")
    argv = [sys.executable, str(program), str(COPIES)]
    done = subprocess.run(argv, env=daemon.env, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout)
    assert len(found) == COPIES
    return found


def test_no_copy_draws_what_another_drew(daemon: Daemon) -> None:
    drawn = drawn_by_copies(daemon, PROGRAM)
    assert all(d["restored"] for d in drawn)
    # They are copies indeed: what was drawn before the freeze is the same in all.
    assert len({json.dumps(d["before"]) for d in drawn}) == 1

    repeats = {}
    for family in drawn[0]["fresh"]:
        values = [json.dumps(d["fresh"][family]) for d in drawn]
        values += [json.dumps(drawn[0]["before"].get(family, "none"))]
        if len(set(values)) < COPIES + 1:
            repeats[family] = values
    assert repeats == {}

    # What only the program knows goes on from where it was, in every copy alike (docs/uniqueness.md), and one line
    # with register_after_restore puts that right: "held and renewed" above.
    for name in drawn[0]["kept"]:
        assert len({d["kept"][name] for d in drawn}) == 1, name


@pytest.mark.torch
def test_no_copy_draws_what_another_drew_from_torch(daemon: Daemon) -> None:
    drawn = drawn_by_copies(daemon, TORCH)
    assert len({d[0] for d in drawn}) == COPIES
    assert len({json.dumps(d[1]) for d in drawn}) == COPIES
    assert len({d[2] for d in drawn}) == 1  # a generator of the user's own
