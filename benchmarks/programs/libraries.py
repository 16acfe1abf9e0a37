"""Libraries and programs in use when they are frozen: what benchmarks/zoo.py asks of each.

Each class loads one in `load` and gives a plain answer in `use`, which is called once before the freeze and once after.
It says what it needs (`library(...)`): modules, and programs that begin with a slash or are found on PATH.
"""

# ruff: noqa: SIM115 - files that stay open are the point

import asyncio
import contextlib
import ctypes
import fcntl
import http.server
import json
import mmap
import os
import select
import shutil
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

import woodfrog as modal

app = modal.App("libraries")
NEEDS: dict[str, tuple[str, ...]] = {}
"""What each class needs."""
POSTGRES = "/usr/lib/postgresql/15/bin/postgres"


def library(*needs, **options):
    def register(cls):
        NEEDS[cls.__name__] = needs
        return app.cls(enable_memory_snapshot=True, scaledown_window=600, startup_timeout=240, timeout=90, **options)(
            cls
        )

    return register


def processes():
    """Names of the sandbox's other processes."""
    found = []
    for pid in sorted((int(p) for p in os.listdir("/proc") if p.isdigit()), key=int):
        if pid not in (1, os.getpid()):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/comm") as file:
                found.append(file.read().strip())
    return found


class Library:
    @modal.enter(snap=True)
    def enter(self):
        self.load()
        self.first = repr(self.use())

    @modal.method()
    def run(self):
        begin = time.perf_counter()
        answer = repr(self.use())
        return {
            "first": self.first,
            "answer": answer,
            "ms": round((time.perf_counter() - begin) * 1e3, 1),
            "threads": len(os.listdir("/proc/self/task")),
            "processes": processes(),
            "again": repr(self.use()),
        }

    def load(self):
        raise NotImplementedError

    def use(self):
        raise NotImplementedError


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while True:
        try:
            found = condition()
        except OSError:
            found = None
        if found:
            return found
        if time.monotonic() > end:
            raise TimeoutError("the server does not answer")
        time.sleep(0.05)


def listens(port):
    def attempt():
        socket.create_connection(("127.0.0.1", port), 1).close()
        return True

    return until(attempt)


class Echo(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Lines in upper case; a thread of this process for each connection."""

    allow_reuse_address = True
    daemon_threads = True

    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            for line in self.rfile:
                self.wfile.write(line.upper())

    def __init__(self, host="127.0.0.1", port=0):
        super().__init__((host, port), self.Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Web(http.server.ThreadingHTTPServer):
    """HTTP/1.1 with connections that stay open; says how many it has had."""

    daemon_threads = True

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self):
            super().setup()
            self.server.connections += 1

        def answer(self):
            self.rfile.read(int(self.headers.get("content-length") or 0))
            body = json.dumps([self.command, self.path]).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            self.server.served.append(self.path)

        do_GET = do_POST = do_PUT = answer

        def log_message(self, *args):
            pass

    def __init__(self, host="127.0.0.1", port=0):
        self.connections, self.served = 0, []
        super().__init__((host, port), self.Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


# Data


@library("polars")
class Polars(Library):
    def load(self):
        import polars

        self.pl = polars
        self.frame = polars.DataFrame({"k": [i % 7 for i in range(200_000)], "v": range(200_000)})

    def use(self):
        pl = self.pl
        found = (
            self.frame.lazy().group_by("k").agg(pl.col("v").sum(), pl.col("v").mean().alias("m")).sort("k").collect()
        )
        return found.rows()


@library("pyarrow")
class PyArrow(Library):
    """Tables, its thread pools, a Parquet file that stays mapped."""

    def load(self):
        import pyarrow
        import pyarrow.dataset
        import pyarrow.parquet

        self.pa = pyarrow
        self.table = pyarrow.table({"k": [i % 7 for i in range(200_000)], "v": range(200_000)})
        pyarrow.parquet.write_table(self.table, "/tmp/table.parquet")
        with pyarrow.OSFile("/tmp/table.arrow", "wb") as sink, pyarrow.ipc.new_file(sink, self.table.schema) as writer:
            writer.write_table(self.table)
        self.mapped = pyarrow.ipc.open_file(pyarrow.memory_map("/tmp/table.arrow")).read_all()
        self.dataset = pyarrow.dataset.dataset("/tmp/table.parquet")

    def use(self):
        grouped = self.table.group_by("k").aggregate([("v", "sum")]).sort_by("k").to_pydict()
        read = self.dataset.to_table(filter=self.pa.dataset.field("k") == 3)
        return grouped, read.num_rows, self.mapped.equals(self.table), self.pa.default_memory_pool().backend_name


@library("pandas")
class Pandas(Library):
    def load(self):
        import pandas

        self.frame = pandas.DataFrame({"k": [i % 7 for i in range(200_000)], "v": range(200_000)})

    def use(self):
        return self.frame.groupby("k")["v"].agg(["sum", "mean"]).values.tolist()


@library("duckdb")
class DuckDB(Library):
    """A database file with its threads, and a transaction that is open."""

    def load(self):
        import duckdb

        self.base = duckdb.connect("/tmp/x.duckdb")
        self.base.execute("create table t as select i % 7 as k, i as v from range(200000) r(i)")
        self.base.execute("begin")
        self.base.execute("insert into t values (1, 1)")

    def use(self):
        return self.base.execute("select k, sum(v), count(*) from t group by k order by k").fetchall()


@library("sqlalchemy")
class SQLAlchemy(Library):
    """An engine with its pool, a session in a transaction, SQLite in WAL mode."""

    def load(self):
        import sqlalchemy as sa
        import sqlalchemy.orm as orm

        self.sa = sa
        self.engine = sa.create_engine("sqlite:////tmp/x.sqlite")
        self.session = orm.Session(self.engine)
        self.session.execute(sa.text("pragma journal_mode=wal"))
        self.session.execute(sa.text("create table t (a integer)"))
        self.session.commit()
        self.session.execute(sa.text("insert into t values (41)"))

    def use(self):
        with self.engine.connect() as other:
            committed = other.execute(self.sa.text("select count(*) from t")).scalar()
        return committed, self.session.execute(self.sa.text("select sum(a) + 1 from t")).scalar()


@library("chromadb", "onnxruntime")
class Chroma(Library):
    def load(self):
        import chromadb

        settings = chromadb.config.Settings(anonymized_telemetry=False)
        self.client = chromadb.PersistentClient("/tmp/chroma", settings=settings)
        self.things = self.client.create_collection("things", embedding_function=None)
        self.things.add(ids=[str(i) for i in range(200)], embeddings=[[i / 7, i % 5, i % 3] for i in range(200)])

    def use(self):
        return self.things.query(query_embeddings=[[3.0, 2.0, 1.0]], n_results=5)["ids"]


@library("faiss", "numpy")
class Faiss(Library):
    def load(self):
        import faiss
        import numpy

        data = numpy.random.default_rng(1).random((5000, 32), dtype="float32")
        self.queries = data[:20]
        self.index = faiss.index_factory(32, "IVF32,Flat")
        self.index.train(data)
        self.index.add(data)

    def use(self):
        return self.index.search(self.queries, 4)[1].tolist()


@library("hnswlib", "numpy")
class Hnswlib(Library):
    def load(self):
        import hnswlib
        import numpy

        data = numpy.random.default_rng(1).random((3000, 32), dtype="float32")
        self.queries = data[:20]
        self.index = hnswlib.Index("l2", 32)
        self.index.init_index(3000, random_seed=1)
        self.index.set_num_threads(2)
        self.index.add_items(data, num_threads=1)

    def use(self):
        return self.index.knn_query(self.queries, 3)[0].tolist()


# Models


@library("sklearn")
class ScikitLearn(Library):
    """A forest on joblib's threads, boosted trees on OpenMP."""

    def load(self):
        from sklearn.datasets import make_classification
        from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier

        self.x, self.y = make_classification(2000, 10, random_state=1)
        self.forest = RandomForestClassifier(20, n_jobs=2, random_state=1).fit(self.x, self.y)
        self.boosted = HistGradientBoostingClassifier(max_iter=20, random_state=1).fit(self.x, self.y)

    def use(self):
        return [m.predict_proba(self.x[:5]).round(6).tolist() for m in (self.forest, self.boosted)]


@library("xgboost")
class XGBoost(Library):
    def load(self):
        import numpy
        import xgboost

        x = numpy.random.default_rng(1).random((2000, 10))
        self.x = x[:5]
        self.model = xgboost.XGBClassifier(n_estimators=20, n_jobs=2, random_state=1).fit(x, (x.sum(1) > 5) * 1)

    def use(self):
        return self.model.predict_proba(self.x).round(5).tolist()


@library("lightgbm")
class LightGBM(Library):
    def load(self):
        import lightgbm
        import numpy

        x = numpy.random.default_rng(1).random((2000, 10))
        self.x = x[:5]
        data = lightgbm.Dataset(x, (x.sum(1) > 5) * 1)
        options = {"objective": "binary", "num_threads": 2, "verbose": -1, "deterministic": True, "seed": 1}
        self.model = lightgbm.train(options, data, 20)

    def use(self):
        return self.model.predict(self.x).round(6).tolist()


@library("onnxruntime", "onnx")
class OnnxRuntime(Library):
    def load(self):
        import numpy
        import onnx
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper

        weights = numpy.random.default_rng(1).random((256, 256), dtype="float32")
        graph = helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("Relu", ["m"], ["y"])],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 256])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 256])],
            [numpy_helper.from_array(weights, "w")],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 2
        onnx.checker.check_model(model)
        self.session = onnxruntime.InferenceSession(model.SerializeToString(), options)
        self.x = numpy.linspace(-1, 1, 64 * 256, dtype="float32").reshape(64, 256)

    def use(self):
        return self.session.run(None, {"x": self.x})[0].sum(1).round(2)[:8].tolist()


@library("torch", "transformers")
class Transformers(Library):
    """A small model with random weights, and its generation."""

    def load(self):
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(1)
        self.torch = torch
        sizes = {"vocab_size": 500, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 2}
        config = GPT2Config(bos_token_id=0, eos_token_id=1, **sizes)
        self.model = GPT2LMHeadModel(config).eval()

    def use(self):
        start = self.torch.tensor([[5, 6, 7]])
        ones = self.torch.ones_like(start)
        made = self.model.generate(start, attention_mask=ones, max_new_tokens=10, do_sample=False, pad_token_id=1)
        return made.tolist()


@library("torch")
class TorchLoader(Library):
    """A DataLoader whose worker processes stay, tensors in shared memory."""

    def load(self):
        import torch
        from torch.utils.data import DataLoader, TensorDataset

        data = TensorDataset(torch.arange(64.0).reshape(32, 2))
        self.loader = DataLoader(data, batch_size=8, num_workers=2, persistent_workers=True)
        self.shared = torch.arange(1000.0).share_memory_()

    def use(self):
        return [batch[0].sum().item() for batch in self.loader], self.shared.sum().item()


@library("torch", "g++")
class TorchCompile(Library):
    def load(self):
        import torch

        self.x = torch.linspace(-1, 1, 10_000)
        self.f = torch.compile(lambda x: (x.sin() ** 2 + x.cos() ** 2).sum())

    def use(self):
        return round(self.f(self.x).item(), 2)


@library("tensorflow")
class TensorFlow(Library):
    """A traced function and an input pipeline with its threads."""

    def load(self):
        import tensorflow as tf

        self.tf = tf
        self.w = tf.Variable(tf.reshape(tf.range(256 * 256, dtype=tf.float32) / 1e4, (256, 256)))
        self.f = tf.function(lambda x: tf.reduce_sum(tf.nn.relu(x @ self.w), 1))
        self.data = tf.data.Dataset.range(100).map(lambda x: x * 2, num_parallel_calls=2).batch(10).prefetch(2)

    def use(self):
        y = self.f(self.tf.reshape(self.tf.range(512, dtype=self.tf.float32), (2, 256))).numpy()
        return [f"{v:.4g}" for v in y], sum(int(b.numpy().sum()) for b in self.data)


@library("jax")
class Jax(Library):
    def load(self):
        import jax

        self.jax = jax
        self.x = jax.numpy.linspace(0, 1, 512 * 512).reshape(512, 512)
        self.f = jax.jit(lambda x: jax.numpy.tanh(x @ x.T).sum(1))
        self.g = jax.jit(jax.grad(lambda x: (x**2).sum()))

    def use(self):
        # One that is compiled anew in each call, too: compiling has threads of its own.
        fresh = self.jax.jit(lambda x: x.sum() * 2)
        return self.f(self.x)[:3].round(1).tolist(), self.g(self.x)[5, :3].tolist(), round(float(fresh(self.x)))


@library("spacy")
class Spacy(Library):
    def load(self):
        import spacy

        self.nlp = spacy.blank("en")
        self.nlp.add_pipe("sentencizer")
        ruler = self.nlp.add_pipe("entity_ruler")
        ruler.add_patterns([{"label": "FROG", "pattern": [{"LOWER": "wood"}, {"LOWER": "frog"}]}])

    def use(self):
        doc = self.nlp("A wood frog freezes solid in winter. It thaws in spring.")
        return [len(list(doc.sents)), [(e.text, e.label_) for e in doc.ents], [t.text for t in doc][:4]]


@library("tokenizers")
class Tokenizers(Library):
    """Trained here; batches go over its thread pool."""

    def load(self):
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        self.tokenizer = Tokenizer(models.BPE(unk_token="?"))
        self.tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        text = ["the wood frog freezes solid in winter and thaws in spring"] * 50
        self.tokenizer.train_from_iterator(text, trainers.BpeTrainer(vocab_size=80, special_tokens=["?"]))

    def use(self):
        return [e.ids for e in self.tokenizer.encode_batch(["the frog", "winter thaws"] * 20)][:2]


@library("tiktoken")
class Tiktoken(Library):
    def load(self):
        import tiktoken

        ranks = {bytes([i]): i for i in range(256)} | {b"fr": 256, b"og": 257, b"frog": 258}
        self.encoding = tiktoken.Encoding("own", pat_str=r"\w+|\s+", mergeable_ranks=ranks, special_tokens={})

    def use(self):
        return self.encoding.encode_batch(["a frog", "frogs"], num_threads=2)


@library("numba")
class Numba(Library):
    """Compiled, and on its thread layer."""

    def load(self):
        import numba
        import numpy

        @numba.njit(parallel=True)
        def total(x):
            s = 0.0
            for i in numba.prange(x.size):
                s += x[i] * 2
            return s

        self.numba, self.f, self.x = numba, total, numpy.arange(100_000.0)

    def use(self):
        @self.numba.njit
        def fresh(n):
            return n * 3

        return float(self.f(self.x)), self.numba.threading_layer(), fresh(5)


@library("cv2", "numpy")
class OpenCV(Library):
    def load(self):
        import cv2
        import numpy

        self.cv2, self.image = cv2, numpy.random.default_rng(1).integers(0, 255, (720, 1280, 3), dtype="uint8")
        cv2.setNumThreads(2)

    def use(self):
        blurred = self.cv2.GaussianBlur(self.image, (31, 31), 3)
        small = self.cv2.resize(blurred, (64, 36), interpolation=self.cv2.INTER_AREA)
        return int(small.sum()), self.cv2.imencode(".png", small)[1].size


@library("PIL")
class Pillow(Library):
    def load(self):
        from PIL import Image, ImageDraw

        self.image = Image.new("RGB", (640, 480), "navy")
        ImageDraw.Draw(self.image).ellipse((100, 100, 400, 400), fill="gold")
        self.image.save("/tmp/x.png")
        self.open = Image.open("/tmp/x.png")  # read on demand, from a file that is open

    def use(self):
        return self.image.resize((8, 6)).tobytes().hex()[:64], self.open.getpixel((200, 200))


@library("shapely")
class Shapely(Library):
    def load(self):
        import shapely

        self.shapely = shapely
        self.tree = shapely.STRtree([shapely.Point(i % 50, i // 50).buffer(0.4) for i in range(1000)])

    def use(self):
        return sorted(self.tree.query(self.shapely.box(3, 3, 5, 5), predicate="intersects").tolist())


@library("lxml")
class Lxml(Library):
    def load(self):
        from lxml import etree

        self.tree = etree.fromstring("<a>" + "".join(f"<b n='{i}'/>" for i in range(1000)) + "</a>")
        self.path = etree.XPath("count(//b[@n > 500])")

    def use(self):
        return self.path(self.tree)


@library("matplotlib")
class Matplotlib(Library):
    def load(self):
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        self.plt = plt
        self.figure, self.axes = plt.subplots()
        self.axes.plot([1, 2, 3], [1, 4, 9])

    def use(self):
        import hashlib
        import io

        out = io.BytesIO()
        self.figure.savefig(out, format="png", metadata={"Software": None})
        return hashlib.sha256(out.getvalue()).hexdigest()


# Servers, clients and connections


@library("grpc")
class Grpc(Library):
    """A server, a channel with a connection, and a stream that is open."""

    def load(self):
        from concurrent.futures import ThreadPoolExecutor

        import grpc

        def stream(requests, context):
            for request in requests:
                yield request[::-1]

        handlers = {
            "Upper": grpc.unary_unary_rpc_method_handler(lambda request, context: request.upper()),
            "Back": grpc.stream_stream_rpc_method_handler(stream),
        }
        self.server = grpc.server(ThreadPoolExecutor(4))
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("frog.Frog", handlers),))
        port = self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()
        self.channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        self.upper = self.channel.unary_unary("/frog.Frog/Upper")
        import queue

        self.queue = queue.SimpleQueue()
        self.back = self.channel.stream_stream("/frog.Frog/Back")(iter(self.queue.get, None))

    def use(self):
        self.queue.put(b"stream")
        return self.upper(b"frog", timeout=20), next(self.back)


@library("grpc")
class GrpcAio(Library):
    def load(self):
        self.loop = asyncio.new_event_loop()
        self.loop.run_until_complete(self.start())

    async def start(self):
        import grpc

        async def upper(request, context):
            return request.upper()

        handlers = {"Upper": grpc.unary_unary_rpc_method_handler(upper)}
        self.server = grpc.aio.server()
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("frog.Frog", handlers),))
        port = self.server.add_insecure_port("127.0.0.1:0")
        await self.server.start()
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        self.upper = self.channel.unary_unary("/frog.Frog/Upper")

    def use(self):
        async def ask():
            return await self.upper(b"frog", timeout=20)

        return self.loop.run_until_complete(ask())


@library("uvloop")
class Uvloop(Library):
    """A loop that runs in a thread of its own, with a server, a client, timers and a child process."""

    def load(self):
        import uvloop

        self.loop = uvloop.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.ask(self.start())

    def ask(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(20)

    async def start(self):
        async def serve(reader, writer):
            while line := await reader.readline():
                writer.write(line.upper())

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        self.reader, self.writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        pipe = asyncio.subprocess.PIPE
        self.child = await asyncio.create_subprocess_exec("cat", stdin=pipe, stdout=pipe)
        self.ticks, self.server = 0, server
        self.ticker = asyncio.ensure_future(self.tick())

    async def tick(self):
        while True:
            await asyncio.sleep(0.01)
            self.ticks += 1

    def use(self):
        async def ask():
            before = self.ticks
            self.writer.write(b"frog\n")
            self.child.stdin.write(b"cat\n")
            await asyncio.sleep(0.1)
            return [await self.reader.readline(), await self.child.stdout.readline(), self.ticks > before]

        return self.ask(ask())


@library("aiohttp")
class Aiohttp(Library):
    """Server and session on one loop, a connection kept alive and a WebSocket."""

    def load(self):
        self.loop = asyncio.new_event_loop()
        self.loop.run_until_complete(self.start())

    async def start(self):
        import aiohttp
        from aiohttp import web

        async def talk(request):
            ws = web.WebSocketResponse()
            await ws.prepare(request)
            async for message in ws:
                await ws.send_str(message.data.upper())
            return ws

        async def page(request):
            return web.json_response([request.path, id(request.transport) in seen or seen.add(id(request.transport))])

        seen = set()
        site = web.Application()
        site.add_routes([web.get("/talk", talk), web.get("/{page}", page)])
        self.runner = web.AppRunner(site)
        await self.runner.setup()
        tcp = web.TCPSite(self.runner, "127.0.0.1", 0)
        await tcp.start()
        self.url = f"http://127.0.0.1:{tcp._server.sockets[0].getsockname()[1]}"
        self.session = aiohttp.ClientSession()
        await (await self.session.get(f"{self.url}/a")).json()
        self.ws = await self.session.ws_connect(f"{self.url}/talk")

    def use(self):
        async def ask():
            async with self.session.get(f"{self.url}/b") as answer:
                page = await answer.json()  # true: over the connection that was there
            await self.ws.send_str("frog")
            return page, await self.ws.receive_str(timeout=10)

        return self.loop.run_until_complete(ask())


@library("requests")
class Requests(Library):
    def load(self):
        import requests

        self.web, self.session = Web(), requests.Session()

    def use(self):
        return self.session.get(f"{self.web.url}/a", timeout=10).json(), self.web.connections


@library("httpx")
class Httpx(Library):
    def load(self):
        import httpx

        self.web, self.client = Web(), httpx.Client()

    def use(self):
        return self.client.get(f"{self.web.url}/a", timeout=10).json(), self.web.connections


@library("boto3", "moto", "flask")
class Boto3(Library):
    """A client and its connections, moto's server as a child."""

    def load(self):
        import boto3

        self.server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-p", "5566"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        listens(5566)
        keys = {"aws_access_key_id": "x", "aws_secret_access_key": "x", "region_name": "us-east-1"}
        self.s3 = boto3.client("s3", endpoint_url="http://127.0.0.1:5566", **keys)
        self.s3.create_bucket(Bucket="frogs")
        self.s3.put_object(Bucket="frogs", Key="a", Body=b"frozen")

    def use(self):
        return self.s3.get_object(Bucket="frogs", Key="a")["Body"].read(), self.server.poll()


@library("redis", "redis-server")
class Redis(Library):
    """redis-server as a child; connections, one of them subscribed."""

    def load(self):
        import redis

        options = ["--port", "6399", "--save", "", "--dir", "/tmp", "--daemonize", "no"]
        self.server = subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL)
        listens(6399)
        self.client = redis.Redis(port=6399)
        self.client.set("a", "frozen")
        self.listening = self.client.pubsub()
        self.listening.subscribe("news")
        self.listening.get_message(timeout=5)

    def use(self):
        self.client.publish("news", "thaw")
        return self.client.get("a"), self.listening.get_message(timeout=5)["data"], self.server.poll()


@library("psycopg", POSTGRES)
class Postgres(Library):
    """PostgreSQL as a child; a connection in a transaction."""

    options = ()

    def load(self):
        import psycopg

        home = os.path.dirname(POSTGRES)
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        command = [f"{home}/initdb", "-D", "/tmp/pg", "-U", "frog", "-A", "trust", "--locale=C", "--no-sync"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise RuntimeError(done.stdout)
        command = [POSTGRES, "-D", "/tmp/pg", "-k", "/tmp", "-p", "5499", "-h", "127.0.0.1", "-c", "fsync=off"]
        self.server = subprocess.Popen([*command, *self.options], **quiet)
        connect = "host=127.0.0.1 port=5499 user=frog dbname=postgres"

        def attempt():
            try:
                return psycopg.connect(connect)
            except psycopg.OperationalError:
                return None

        self.base = until(attempt)
        self.base.execute("create table t (a int)")
        self.base.commit()
        self.base.execute("insert into t values (41)")

    def use(self):
        return self.base.execute("select sum(a) + 1 from t").fetchone(), self.server.poll()


@library("zmq")
class ZeroMQ(Library):
    def load(self):
        import zmq

        self.context = zmq.Context()
        self.answering, self.asking = self.context.socket(zmq.REP), self.context.socket(zmq.REQ)
        port = self.answering.bind_to_random_port("tcp://127.0.0.1")
        self.asking.connect(f"tcp://127.0.0.1:{port}")
        self.asking.setsockopt(zmq.RCVTIMEO, 10_000)
        self.answering.setsockopt(zmq.RCVTIMEO, 10_000)

    def use(self):
        self.asking.send(b"frog")
        self.answering.send(self.answering.recv().upper())
        return self.asking.recv()


WSGI = """
import os
def application(environ, start):
    start("200 OK", [("content-type", "text/plain")])
    return [environ["PATH_INFO"].upper().encode()]
async def asgi(scope, receive, send):
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": scope["path"].upper().encode()})
"""


class Served(Library):
    command = ()

    def load(self):
        with open("/tmp/site.py", "w") as file:
            file.write(WSGI)
        command = [sys.executable, "-m", *self.command]
        self.server = subprocess.Popen(command, cwd="/tmp", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        listens(8077)

    def use(self):
        found = [urllib.request.urlopen(f"http://127.0.0.1:8077/{i}x", timeout=10).read() for i in range(4)]
        return found, self.server.poll()


@library("gunicorn")
class Gunicorn(Served):
    command = ("gunicorn", "-b", "127.0.0.1:8077", "-w", "2", "site:application")

    def load(self):
        # "site" is the standard library's.
        self.command = tuple(part.replace("site:", "frogsite:") for part in self.command)
        with open("/tmp/frogsite.py", "w") as file:
            file.write(WSGI)
        super().load()


@library("uvicorn")
class Uvicorn(Gunicorn):
    command = ("uvicorn", "--host", "127.0.0.1", "--port", "8077", "--workers", "2", "site:asgi")


# Asynchronous and green


@library("gevent")
class Gevent(Library):
    """Its hub, greenlets that wait, a server."""

    def load(self):
        import gevent
        from gevent.server import StreamServer
        from gevent.threadpool import ThreadPool

        self.gevent = gevent

        def serve(sock, address):
            for line in sock.makefile("rb"):
                sock.sendall(line.upper())

        self.server = StreamServer(("127.0.0.1", 0), serve)
        self.server.start()
        self.client = gevent.socket.create_connection(("127.0.0.1", self.server.server_port))
        self.pool, self.ticks = ThreadPool(2), 0
        gevent.spawn(self.tick)

    def tick(self):
        while True:
            self.gevent.sleep(0.01)
            self.ticks += 1

    def use(self):
        before = self.ticks
        self.client.sendall(b"frog\n")
        self.gevent.sleep(0.1)
        return self.client.recv(100), self.pool.spawn(pow, 2, 10).get(timeout=10), self.ticks > before


@library("eventlet")
class Eventlet(Library):
    def load(self):
        import eventlet
        import eventlet.tpool

        self.eventlet = eventlet
        listener = eventlet.listen(("127.0.0.1", 0))

        def serve():
            connection, _ = listener.accept()
            for line in connection.makefile("rb"):
                connection.sendall(line.upper())

        eventlet.spawn(serve)
        self.client = eventlet.connect(listener.getsockname())

    def use(self):
        self.client.sendall(b"frog\n")
        return self.client.recv(100), self.eventlet.tpool.execute(pow, 2, 10)


@library("trio")
class Trio(Library):
    """A run in a thread, with a nursery of tasks that wait."""

    def load(self):
        import trio

        self.trio, ready = trio, threading.Event()

        async def main():
            self.token = trio.lowlevel.current_trio_token()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.tick)
                ready.set()
                await trio.sleep_forever()

        self.ticks = 0
        threading.Thread(target=trio.run, args=(main,), daemon=True).start()
        ready.wait(20)

    async def tick(self):
        while True:
            await self.trio.sleep(0.01)
            self.ticks += 1

    def use(self):
        before = self.ticks
        time.sleep(0.1)

        async def ask():
            return await self.trio.to_thread.run_sync(pow, 2, 10)

        return self.trio.from_thread.run(ask, trio_token=self.token), self.ticks > before


@library()
class Asyncio(Library):
    """A loop in a thread, an executor, a child, a timer."""

    def load(self):
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.due = []
        self.loop.call_soon_threadsafe(self.loop.call_later, 0.5, self.due.append, 1)
        pipe = asyncio.subprocess.PIPE
        self.child = self.ask(asyncio.create_subprocess_exec("cat", stdin=pipe, stdout=pipe))

    def ask(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(20)

    def use(self):
        async def ask():
            self.child.stdin.write(b"cat\n")
            return await self.child.stdout.readline(), await asyncio.to_thread(pow, 2, 10)

        time.sleep(0.6)
        return self.ask(ask()), self.due


# Pools and processes


def square(x):
    return x * x


@library("joblib")
class Joblib(Library):
    """loky's pool of processes."""

    def load(self):
        import joblib

        self.pool = joblib.Parallel(2)
        self.pool.__enter__()
        self.joblib = joblib

    def use(self):
        return self.pool(self.joblib.delayed(square)(i) for i in range(20))


@library()
class Multiprocessing(Library):
    """A pool, a manager, shared memory, a queue with its feeder thread."""

    def load(self):
        import multiprocessing
        from multiprocessing import shared_memory

        context = multiprocessing.get_context("fork")
        self.pool, self.manager = context.Pool(2), context.Manager()
        self.dict, self.queue = self.manager.dict(a=41), context.Queue()
        self.queue.put("frozen")
        self.memory = shared_memory.SharedMemory(create=True, size=1 << 20)
        self.memory.buf[:6] = b"frozen"

    def use(self):
        got = self.queue.get(timeout=10)
        self.queue.put(got)
        return self.pool.map(square, range(10)), self.dict["a"] + 1, got, bytes(self.memory.buf[:6])


@library()
class Futures(Library):
    def load(self):
        from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

        self.threads, self.processes = ThreadPoolExecutor(4), ProcessPoolExecutor(2)

    def use(self):
        return list(self.threads.map(square, range(5))), list(self.processes.map(square, range(5)))


@library("ray", memory=6000)
class Ray(Library):
    """One process of it listens on the sandbox's own address: refused."""

    def load(self):
        import ray

        options = {"include_dashboard": False, "object_store_memory": 100 << 20, "logging_level": "ERROR"}
        ray.init(num_cpus=1, **options)
        self.ray = ray
        self.f = ray.remote(square)
        self.kept = ray.put(list(range(1000)))

    def use(self):
        return self.ray.get(self.f.remote(7), timeout=60), sum(self.ray.get(self.kept, timeout=60))


@library("pyspark", "java", memory=4000)
class Spark(Library):
    def load(self):
        from pyspark.sql import SparkSession

        builder = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false")
        builder = builder.config("spark.driver.host", "127.0.0.1").config("spark.driver.bindAddress", "127.0.0.1")
        self.spark = builder.config("spark.sql.shuffle.partitions", "2").getOrCreate()
        self.frame = self.spark.range(1000).cache()

    def use(self):
        rows = self.frame.selectExpr("id % 3 as k").groupBy("k").count().orderBy("k").collect()
        return [tuple(row) for row in rows]


JAVA = """
import java.util.Scanner;
import java.util.stream.IntStream;
public class Frog {
    public static void main(String[] args) {
        Scanner in = new Scanner(System.in);
        while (in.hasNextLine()) {
            int n = Integer.parseInt(in.nextLine());
            System.out.println(IntStream.range(0, n).parallel().map(x -> x % 7).sum());
            System.gc();
        }
    }
}
"""


class Lines(Library):
    """A child that answers lines."""

    question, command = "100000", ()

    def load(self):
        self.child = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def use(self):
        self.child.stdin.write(self.question + "\n")
        self.child.stdin.flush()
        if not select.select([self.child.stdout], [], [], 60)[0]:
            raise TimeoutError("the child does not answer")
        return self.child.stdout.readline(), self.child.poll()


@library("java", "javac")
class Java(Lines):
    """A JVM that computes in parallel and collects garbage."""

    def load(self):
        with open("/tmp/Frog.java", "w") as file:
            file.write(JAVA)
        self.command = ("java", "/tmp/Frog.java")
        super().load()


NODE = """
const { Worker } = require("worker_threads")
const worker = new Worker('require("worker_threads").parentPort.on("message", (n) => { let s = 0; ' +
  'for (let i = 0; i < n; i++) s += i % 7; require("worker_threads").parentPort.postMessage(s) })', { eval: true })
let ticks = 0
setInterval(() => ticks++, 5)
worker.on("message", (s) => setTimeout(() => { console.log(s, ticks > 0); ticks = 0 }, 100))
require("readline").createInterface({ input: process.stdin }).on("line", (n) => worker.postMessage(Number(n)))
"""


@library("node")
class Node(Lines):
    command = ("node", "-e", NODE)


FFMPEG = ["ffmpeg", "-v", "quiet", "-f", "rawvideo", "-pix_fmt", "gray", "-s", "16x16", "-r", "25", "-i", "pipe:0"]


@library("ffmpeg")
class Ffmpeg(Library):
    """A filter in the middle of its stream, in both pipes."""

    def load(self):
        command = [*FFMPEG, "-vf", "negate", "-f", "rawvideo", "-flush_packets", "1", "pipe:1"]
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self.sent = self.got = 0

    def use(self):
        # It keeps some frames for itself: as many go in until one more has come out.
        while not select.select([self.child.stdout], [], [], 0.2)[0]:
            self.child.stdin.write(bytes([10]) * 256)
            self.sent += 1
            if self.sent > 300:
                raise TimeoutError("no frame comes out")
        frame = self.child.stdout.read(256)
        return len(frame), frame[:4].hex(), self.child.poll()


def high_pipe():
    low = os.pipe()
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 20) for fd in low]
    for fd in low:
        os.close(fd)
    return high


def devtools(command):
    """A browser asked over its pipes: (ask, child)."""
    to, from_ = high_pipe(), high_pipe()
    # It takes its questions from descriptor 3 and answers on 4.
    script = f'exec 3<&{to[0]} 4>&{from_[1]} {to[0]}<&- {from_[1]}>&-; exec "$@"'
    child = subprocess.Popen(
        ["bash", "-c", script, "bash", *command],
        pass_fds=(to[0], from_[1]),
        stdout=subprocess.DEVNULL,
        stderr=open("/tmp/browser.log", "w"),
    )
    os.close(to[0])
    os.close(from_[1])
    count, buffer = 0, bytearray()

    def ask(method, session=None, **params):
        nonlocal count
        count += 1
        question = {"id": count, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(to[1], json.dumps(question).encode() + b"\0")
        while True:
            while b"\0" not in buffer:
                if not select.select([from_[0]], [], [], 60)[0]:
                    raise TimeoutError(f"the browser does not answer {method}")
                piece = os.read(from_[0], 1 << 20)
                if not piece:
                    raise EOFError(f"the browser ended: {child.wait(5)}: {open('/tmp/browser.log').read()[-500:]}")
                buffer.extend(piece)
            at = buffer.index(0)
            answer = json.loads(buffer[:at])
            del buffer[: at + 1]
            if answer.get("id") == count:
                if "error" in answer:
                    raise RuntimeError(answer["error"])
                return answer["result"]

    return ask, child


CHROMIUM = ("--headless", "--remote-debugging-pipe", "--disable-gpu", "--no-first-run", "--user-data-dir=/tmp/profile")


class Browser(Library):
    flags = ()

    def load(self):
        self.ask, self.child = devtools(["chromium", *CHROMIUM, *self.flags, "about:blank"])
        target = self.ask("Target.createTarget", url="data:text/html,<h1>frog</h1>")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        time.sleep(1)

    def use(self):
        def run(expression):
            return self.ask("Runtime.evaluate", self.session, expression=expression)["result"]["value"]

        shot = self.ask("Page.captureScreenshot", self.session)["data"]
        text = run("document.querySelector('h1').textContent.toUpperCase()")
        return text, run("[...Array(1000).keys()].reduce((a, b) => a + b)"), len(shot) > 1000, self.child.poll()


@library("chromium", memory=3000)
class Chromium(Browser):
    flags = ("--no-sandbox",)


@library("chromium", memory=3000)
class ChromiumNoZygote(Browser):
    flags = ("--no-sandbox", "--no-zygote", "--disable-dev-shm-usage")


@library("playwright", "chromium", memory=3000)
class Playwright(Library):
    def load(self):
        from playwright.sync_api import sync_playwright

        self.playwright = sync_playwright().start()
        chromium = self.playwright.chromium
        self.browser = chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        self.page = self.browser.new_page()
        self.page.set_content("<h1>frog</h1>")

    def use(self):
        return self.page.evaluate("document.querySelector('h1').textContent"), len(self.page.screenshot()) > 1000


@library("kaleido", "plotly", "chromium", memory=3000)
class Kaleido(Library):
    """plotly's export through a browser that stays."""

    def load(self):
        import kaleido
        import plotly.graph_objects as go

        os.environ["BROWSER_PATH"] = shutil.which("chromium")
        self.figure = go.Figure(go.Bar(y=[1, 2, 3]))
        kaleido.start_sync_server(silence_warnings=True)

    def use(self):
        return self.figure.to_image("svg")[:4]


@library("plotly")
class Plotly(Library):
    def load(self):
        import plotly.graph_objects as go

        self.figure = go.Figure(go.Bar(y=[1, 2, 3]))

    def use(self):
        return len(self.figure.to_json())


# Watching and telling


@library("watchdog")
class Watchdog(Library):
    def load(self):
        from watchdog.events import FileSystemEventHandler
        from watchdog.observers import Observer

        os.makedirs("/tmp/watched/deep", exist_ok=True)
        self.seen = seen = []

        class Handler(FileSystemEventHandler):
            def on_created(self, event):
                seen.append(event.src_path)

        self.observer, self.count = Observer(), 0
        self.observer.schedule(Handler(), "/tmp/watched", recursive=True)
        self.observer.start()

    def use(self):
        self.count += 1
        self.seen.clear()
        for place in ("", "deep/"):
            open(f"/tmp/watched/{place}{self.count}", "w").close()
        until(lambda: len(self.seen) >= 2, 10)
        return sorted(self.seen)


@library("sentry_sdk")
class Sentry(Library):
    """Events and sessions through its worker thread."""

    def load(self):
        import sentry_sdk

        self.web, self.sentry = Web(), sentry_sdk
        dsn = f"http://key@127.0.0.1:{self.web.server_port}/1"
        sentry_sdk.init(dsn, traces_sample_rate=1.0)

    def use(self):
        before = len(self.web.served)
        with self.sentry.start_transaction(name="t"):
            self.sentry.capture_message("frog")
        self.sentry.flush(10)
        return len(self.web.served) > before, self.web.served[-1]


@library("opentelemetry.sdk")
class OpenTelemetry(Library):
    """Spans and metrics by background threads."""

    def load(self):
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import ConsoleMetricExporter, PeriodicExportingMetricReader
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

        self.got = got = []

        class Exporter(SpanExporter):
            def export(self, spans):
                got.extend(s.name for s in spans)
                return SpanExportResult.SUCCESS

        self.provider = TracerProvider()
        self.provider.add_span_processor(BatchSpanProcessor(Exporter(), schedule_delay_millis=200))
        out = open("/tmp/metrics", "w")
        reader = PeriodicExportingMetricReader(ConsoleMetricExporter(out=out), export_interval_millis=200)
        self.counter = MeterProvider([reader]).get_meter("m").create_counter("frogs")

    def use(self):
        self.got.clear()
        size = os.path.getsize("/tmp/metrics")
        self.counter.add(1)
        with self.provider.get_tracer("t").start_as_current_span("span"):
            pass
        until(lambda: self.got and os.path.getsize("/tmp/metrics") > size, 10)
        return self.got


@library("prometheus_client")
class Prometheus(Library):
    def load(self):
        import prometheus_client

        self.counter = prometheus_client.Counter("frogs", "frogs")
        prometheus_client.start_http_server(9555, "127.0.0.1")

    def use(self):
        self.counter.inc()
        text = urllib.request.urlopen("http://127.0.0.1:9555/metrics", timeout=10).read().decode()
        return [line for line in text.splitlines() if line.startswith("frogs_total")]


@library("ddtrace")
class Ddtrace(Library):
    """Its native writer and periodic threads, to a server that is no agent."""

    def load(self):
        self.web = Web()
        os.environ["DD_TRACE_AGENT_URL"] = self.web.url
        os.environ["DD_INSTRUMENTATION_TELEMETRY_ENABLED"] = "false"
        from ddtrace.trace import tracer

        self.tracer = tracer

    def use(self):
        before = len(self.web.served)
        with self.tracer.trace("frog"):
            pass
        self.tracer.flush()
        until(lambda: [p for p in self.web.served[before:] if "traces" in p], 20)
        return True


@library("debugpy")
class Debugpy(Library):
    """Listening, its adapter as a child."""

    def load(self):
        import debugpy

        debugpy.listen(("127.0.0.1", 5688))
        self.client, self.count, self.data = socket.create_connection(("127.0.0.1", 5688), 10), 0, b""
        self.client.settimeout(10)

    def use(self):
        """Another question over the connection that is there."""
        self.count += 1
        question = {"seq": self.count, "type": "request", "command": "initialize", "arguments": {"adapterID": "frog"}}
        text = json.dumps(question)
        self.client.sendall(f"Content-Length: {len(text)}\r\n\r\n{text}".encode())
        while f'"request_seq": {self.count},' not in self.data.decode():
            self.data += self.client.recv(1 << 16)
        return True


@library("psutil")
class Psutil(Library):
    """Processes that it knew before are others to it afterwards: they are looked up anew."""

    def load(self):
        import psutil

        self.psutil = psutil
        self.child = psutil.Popen(["sleep", "1000"])

    def use(self):
        process = self.psutil.Process()
        process.cpu_percent()
        return process.is_running(), self.child.poll(), len(process.children())


# What the kernel gives


@library()
class Threads(Library):
    """threading.Timer, locks, conditions, thread-local state, signals, faulthandler, weak references."""

    def load(self):
        import faulthandler

        self.fired, self.caught = [], []
        self.timer = threading.Timer(0.5, self.fired.append, ("timer",))
        self.timer.start()
        signal.signal(signal.SIGUSR2, lambda *a: self.caught.append("USR2"))
        faulthandler.register(signal.SIGUSR1, open("/tmp/trace", "w"))
        faulthandler.dump_traceback_later(3600, repeat=True, file=open("/tmp/later", "w"))
        self.condition = threading.Condition()
        threading.Thread(target=self.wait, daemon=True).start()

    def wait(self):
        while True:
            with self.condition:
                self.condition.wait()
                self.fired.append("condition")

    def use(self):
        time.sleep(0.7)
        self.caught.clear()
        with self.condition:
            self.condition.notify_all()
        os.kill(os.getpid(), signal.SIGUSR2)
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.1)
        return sorted(set(self.fired)), self.caught, os.path.getsize("/tmp/trace") > 0


@library()
class Prctl(Library):
    """A name, and a seccomp filter of its own."""

    def load(self):
        self.prctl = ctypes.CDLL(None).prctl
        self.prctl(15, b"frog", 0, 0, 0)
        # getpriority (140 on x86-64) is answered with EDOM, everything else let through.
        code = struct.pack("HBBIHBBIHBBIHBBI", 0x20, 0, 0, 0, 0x15, 0, 1, 140, 6, 0, 0, 0x50021, 6, 0, 0, 0x7FFF0000)
        self.code = ctypes.create_string_buffer(code)
        program = struct.pack("HxxxxxxQ", 4, ctypes.addressof(self.code))
        if self.prctl(22, 2, program, 0, 0):
            raise OSError("no seccomp")

    def use(self):
        try:
            os.getpriority(os.PRIO_PROCESS, 0)
            refused = 0
        except OSError as e:
            refused = e.errno
        with open("/proc/self/comm") as file:
            return file.read().strip(), refused


@library()
class Undumpable(Library):
    """PR_SET_DUMPABLE 0, as agents for keys and some secrets' managers do."""

    def load(self):
        self.prctl = ctypes.CDLL(None).prctl
        self.prctl(4, 0, 0, 0, 0)

    def use(self):
        return self.prctl(3, 0, 0, 0, 0)


@library()
class Locked(Library):
    """mlock, mlockall, MADV_DONTFORK, guard pages, a large file mapped."""

    def load(self):
        libc = ctypes.CDLL(None)
        self.memory = mmap.mmap(-1, 1 << 20)
        self.memory[:6] = b"frozen"
        self.memory.madvise(mmap.MADV_DONTFORK)
        at = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.results = [libc.mlock(ctypes.c_void_p(at), 1 << 16)]
        self.file = open("/tmp/large", "w+b")
        self.file.truncate(1 << 32)
        self.large = mmap.mmap(self.file.fileno(), 1 << 32)
        self.large[1 << 31] = 65

    def use(self):
        return bytes(self.memory[:6]), self.results, self.large[1 << 31], self.large[5]


@library()
class SysV(Library):
    """System V shared memory, which C programs and PostgreSQL use."""

    def load(self):
        libc = ctypes.CDLL(None, use_errno=True)
        self.id = libc.shmget(0x5EED, 1 << 16, 0o1600)
        libc.shmat.restype = ctypes.c_void_p
        self.at = libc.shmat(self.id, None, 0)
        ctypes.memmove(self.at, b"frozen", 6)

    def use(self):
        return ctypes.string_at(self.at, 6)


@library()
class SysVSemaphores(Library):
    """System V semaphores and messages."""

    def load(self):
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.semaphores = self.libc.semget(0x5EED, 3, 0o1600)
        self.libc.semctl(self.semaphores, 0, 16, 5)
        self.queue = self.libc.msgget(0x5EED, 0o1600)

    def use(self):
        value = self.libc.semctl(self.semaphores, 0, 12)
        sent = self.libc.msgsnd(self.queue, struct.pack("q6s", 1, b"frozen"), 6, 0)
        buffer = ctypes.create_string_buffer(64)
        return value, sent, self.libc.msgrcv(self.queue, buffer, 56, 0, 0o4000)


@library("posix_ipc")
class PosixIPC(Library):
    """Named semaphores, shared memory, a message queue that has a message in it."""

    def load(self):
        import posix_ipc

        self.semaphore = posix_ipc.Semaphore("/frog", posix_ipc.O_CREX, initial_value=3)
        self.memory = posix_ipc.SharedMemory("/frog", posix_ipc.O_CREX, size=4096)
        self.mapped = mmap.mmap(self.memory.fd, 4096)
        self.mapped[:6] = b"frozen"

    def use(self):
        self.semaphore.acquire(1)
        self.semaphore.release()
        return self.semaphore.value, self.mapped[:6]


@library("posix_ipc")
class PosixQueue(Library):
    def load(self):
        import posix_ipc

        self.queue = posix_ipc.MessageQueue("/frogs", posix_ipc.O_CREX)
        self.queue.send(b"frozen")

    def use(self):
        message = self.queue.receive(5)[0]
        self.queue.send(message)
        return message


@library()
class Descriptors(Library):
    """Descriptors of every kind that Python and libuv open: eventfd, timerfd, signalfd, memfd, pidfd, epoll."""

    def load(self):
        libc = ctypes.CDLL(None, use_errno=True)
        self.event, self.memory = os.eventfd(0), os.memfd_create("frog", os.MFD_ALLOW_SEALING)
        os.write(self.memory, b"frozen")
        fcntl.fcntl(self.memory, 1033, 0x2 | 0x4)  # sealed against growing and shrinking
        self.timer = libc.timerfd_create(0, 0)
        libc.timerfd_settime(self.timer, 0, struct.pack("4q", 0, 20_000_000, 0, 20_000_000), None)
        self.child = subprocess.Popen(["sleep", "1000"])
        self.pidfd = os.pidfd_open(self.child.pid)
        self.epoll = select.epoll()
        for fd in (self.event, self.timer, self.pidfd):
            self.epoll.register(fd, select.EPOLLIN)
        self.names = {self.event: "event", self.timer: "timer", self.pidfd: "pidfd"}

    def use(self):
        os.eventfd_write(self.event, 2)
        time.sleep(0.1)
        found = sorted(self.names[fd] for fd, _ in self.epoll.poll(1))
        return found, os.eventfd_read(self.event), os.pread(self.memory, 10, 0), self.child.poll()


@library("liburing")
class IoUring(Library):
    def load(self):
        import liburing

        self.ring = liburing.Ring()
        try:
            liburing.io_uring_queue_init(8, self.ring)
            self.answer = "there"
        except OSError as e:
            self.answer = e.errno

    def use(self):
        return self.answer


@library()
class Callbacks(Library):
    """ctypes callbacks: code that was made at run time."""

    def load(self):
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_int))
        self.compare = kind(lambda a, b: a[0] - b[0])

    def use(self):
        numbers = (ctypes.c_int * 5)(5, 3, 1, 4, 2)
        ctypes.CDLL(None).qsort(numbers, 5, 4, self.compare)
        return list(numbers)


@library()
class Connections(Library):
    """Plain TCP in this process."""

    def load(self):
        self.server = Echo()
        self.client = socket.create_connection(self.server.server_address)
        self.file = self.client.makefile("rwb")

    def use(self):
        self.file.write(b"frog\n")
        self.file.flush()
        return self.file.readline()


# Connections to the outside, which come back closed: what does the next use of each say?

OUTSIDE = os.environ.get("ZOO_OUTSIDE", "")
"""Address of servers outside the sandbox: those of `serve`."""
WEB, ECHO, GRPC, SOCKET, REDIS, DATABASE = range(8000, 8006)


class Outside(Library):
    def use(self):
        try:
            return self.ask()
        except Exception as e:
            return type(e).__name__


@library("requests", "outside")
class OutRequests(Outside):
    def load(self):
        import requests

        self.session = requests.Session()

    def ask(self):
        return self.session.get(f"http://{OUTSIDE}:{WEB}/a", timeout=10).json()


@library("requests", "outside")
class OutRequestsPost(OutRequests):
    def ask(self):
        return self.session.post(f"http://{OUTSIDE}:{WEB}/a", data=b"x", timeout=10).json()


@library("httpx", "outside")
class OutHttpx(Outside):
    def load(self):
        import httpx

        self.client = httpx.Client()

    def ask(self):
        return self.client.post(f"http://{OUTSIDE}:{WEB}/a", content=b"x", timeout=10).json()


@library("httpx", "outside")
class OutHttpxAsync(Outside):
    def load(self):
        import httpx

        self.loop, self.client = asyncio.new_event_loop(), httpx.AsyncClient()

    def ask(self):
        async def ask():
            return (await self.client.post(f"http://{OUTSIDE}:{WEB}/a", content=b"x", timeout=10)).json()

        return self.loop.run_until_complete(ask())


@library("aiohttp", "outside")
class OutAiohttp(Outside):
    method = "get"

    def load(self):
        self.loop = asyncio.new_event_loop()
        self.loop.run_until_complete(self.start())

    async def start(self):
        import aiohttp

        self.session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(10))

    def ask(self):
        async def ask():
            async with getattr(self.session, self.method)(f"http://{OUTSIDE}:{WEB}/a") as answer:
                return await answer.json()

        return self.loop.run_until_complete(ask())


@library("aiohttp", "outside")
class OutAiohttpPost(OutAiohttp):
    method = "post"


@library("aiohttp", "outside")
class OutAiohttpAsync(Outside):
    """The same where methods are async: all on the worker's own loop."""

    @modal.enter(snap=True)
    async def enter(self):
        import aiohttp

        self.session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(10))
        self.first = repr(await self.ask())

    async def ask(self):
        try:
            async with self.session.post(f"http://{OUTSIDE}:{WEB}/a") as answer:
                return await answer.json()
        except Exception as e:
            return type(e).__name__

    @modal.method()
    async def run(self):
        answers = [repr(await self.ask()) for _ in range(2)]
        return {"first": self.first, "answer": answers[0], "again": answers[1], "threads": 0, "processes": []}


@library("boto3", "outside")
class OutBoto3(Outside):
    def load(self):
        import boto3

        keys = {"aws_access_key_id": "x", "aws_secret_access_key": "x", "region_name": "us-east-1"}
        self.s3 = boto3.client("s3", endpoint_url=f"http://{OUTSIDE}:{WEB}", **keys)

    def ask(self):
        return self.s3.get_object(Bucket="frogs", Key="a")["Body"].read()


@library("grpc", "outside")
class OutGrpc(Outside):
    def load(self):
        import grpc

        self.channel = grpc.insecure_channel(f"{OUTSIDE}:{GRPC}")
        self.upper = self.channel.unary_unary("/frog.Frog/Upper")

    def ask(self):
        return self.upper(b"frog", timeout=10)


@library("websockets", "outside")
class OutWebsocket(Outside):
    def load(self):
        from websockets.sync.client import connect

        self.socket = connect(f"ws://{OUTSIDE}:{SOCKET}")

    def ask(self):
        self.socket.send("frog")
        return self.socket.recv(timeout=10)


@library("redis", "redis-server", "outside")
class OutRedis(Outside):
    def load(self):
        import redis

        self.client = redis.Redis(OUTSIDE, REDIS)

    def ask(self):
        return self.client.set("a", "b")


@library("psycopg", POSTGRES, "outside")
class OutPsycopg(Outside):
    where = f"host={OUTSIDE} port={DATABASE} user=frog dbname=postgres connect_timeout=10"

    def load(self):
        import psycopg

        self.base = psycopg.connect(self.where, autocommit=True)

    def ask(self):
        return self.base.execute("select 6 * 7").fetchone()


@library("psycopg_pool", POSTGRES, "outside")
class OutPsycopgPool(OutPsycopg):
    checked = False

    def load(self):
        from psycopg_pool import ConnectionPool

        check = ConnectionPool.check_connection if self.checked else None
        self.pool = ConnectionPool(self.where, min_size=1, max_size=2, open=True, check=check)

    def ask(self):
        with self.pool.connection(10) as base:
            return base.execute("select 6 * 7").fetchone()


@library("psycopg_pool", POSTGRES, "outside")
class OutPsycopgPoolChecked(OutPsycopgPool):
    checked = True


@library("sqlalchemy", "psycopg", POSTGRES, "outside")
class OutSQLAlchemy(Outside):
    ping = False

    def load(self):
        import sqlalchemy as sa

        self.text = sa.text
        self.engine = sa.create_engine(
            f"postgresql+psycopg://frog@{OUTSIDE}:{DATABASE}/postgres", pool_pre_ping=self.ping
        )

    def ask(self):
        with self.engine.connect() as base:
            return base.execute(self.text("select 6 * 7")).scalar()


@library("sqlalchemy", "psycopg", POSTGRES, "outside")
class OutSQLAlchemyPing(OutSQLAlchemy):
    ping = True


@library("outside")
class OutBlocked(Outside):
    """A thread that waits for the other side when it is frozen, and one in a loop with a timeout."""

    def load(self):
        self.ends = []
        for patience in (None, 0.2):
            threading.Thread(target=self.wait, args=(patience,), daemon=True).start()

    def wait(self, patience):
        with socket.create_connection((OUTSIDE, ECHO)) as s:
            s.settimeout(patience)
            while True:
                try:
                    self.ends.append(s.recv(10))
                    return
                except TimeoutError:
                    continue
                except OSError as e:
                    self.ends.append(type(e).__name__)
                    return

    def ask(self):
        time.sleep(1)
        return len(self.ends)


@library("outside")
class OutAndIn(Outside):
    """One connection to the outside beside one of its own processes."""

    def load(self):
        self.outer = socket.create_connection((OUTSIDE, ECHO))
        self.server = Echo()
        self.inner = socket.create_connection(self.server.server_address)

    def ask(self):
        self.inner.sendall(b"frog\n")
        return self.inner.recv(10)


def serve():
    """The servers outside, until the standard input ends."""
    web, echo = Web("0.0.0.0", WEB), Echo("0.0.0.0", ECHO)
    kept = [web, echo]
    with contextlib.suppress(ImportError):
        from concurrent.futures import ThreadPoolExecutor

        import grpc

        handlers = {"Upper": grpc.unary_unary_rpc_method_handler(lambda request, context: request.upper())}
        kept.append(grpc.server(ThreadPoolExecutor(2)))
        kept[-1].add_generic_rpc_handlers((grpc.method_handlers_generic_handler("frog.Frog", handlers),))
        kept[-1].add_insecure_port(f"0.0.0.0:{GRPC}")
        kept[-1].start()
    with contextlib.suppress(ImportError):
        from websockets.sync.server import serve as serve_sockets

        def upper(socket):
            for message in socket:
                socket.send(message.upper())

        kept.append(serve_sockets(upper, "0.0.0.0", SOCKET))
        threading.Thread(target=kept[-1].serve_forever, daemon=True).start()
    children = []
    with tempfile.TemporaryDirectory(dir="/var/tmp") as home:
        if shutil.which("redis-server"):
            options = ["--port", str(REDIS), "--bind", "0.0.0.0", "--protected-mode", "no", "--save", "", "--dir", home]
            children.append(subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL))
        if shutil.which(POSTGRES):
            os.chown(home, 65534, 65534)
            nobody = {"user": 65534, "group": 65534, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            initdb = os.path.join(os.path.dirname(POSTGRES), "initdb")
            subprocess.run([initdb, "-D", f"{home}/pg", "-U", "frog", "-A", "trust", "--no-sync"], check=True, **nobody)
            with open(f"{home}/pg/pg_hba.conf", "a") as file:
                file.write("host all all 0.0.0.0/0 trust\n")
            command = [POSTGRES, "-D", f"{home}/pg", "-k", home, "-p", str(DATABASE), "-h", "0.0.0.0"]
            children.append(subprocess.Popen(command, **nobody))
            listens(DATABASE)
        print("serving", flush=True)
        sys.stdin.read()
        for child in children:
            child.terminate()
            child.wait(20)


if __name__ == "__main__":
    serve()
