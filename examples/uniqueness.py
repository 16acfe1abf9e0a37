"""Copies of one snapshot draw different random numbers, except from a generator of one's own that is not seeded anew.

woodfrog reseeds Python's `random`, and NumPy's, torch's and OpenSSL's global generators in every thawed copy. A
`random.Random` object (or NumPy `Generator`) that the program keeps is the program's: all copies have it in the same
state, until a function registered with `register_after_restore` puts that right.
"""

import random

import woodfrog

app = woodfrog.App("uniqueness")

forgotten = random.Random()
renewed = random.Random()


@woodfrog.register_after_restore
def renew():
    renewed.seed()


@app.function(enable_memory_snapshot=True, single_use_containers=True)
def draw():
    return {"global": random.random(), "forgotten": forgotten.random(), "renewed": renewed.random()}


@app.local_entrypoint()
def main(copies: int = 5):
    draw.remote()  # The first start takes the snapshot; every call after it is answered by a thawed copy.
    drawn = [draw.remote() for _ in range(copies)]
    for family in ("global", "renewed", "forgotten"):
        print(f"{family:10} {len({d[family] for d in drawn})} different numbers in {copies} copies")
