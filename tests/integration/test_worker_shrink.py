"""What libraries free before a freeze: servers as real processes with real HTTP, a stand-in for vLLM in the process."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from integration.test_worker import Worker
from woodfrog.worker import servers

SERVER = '''
"""The endpoints of an inference server that free memory; writes down what is asked for, a line each."""
import http.server, json, sys, time
from pathlib import Path

log, port_file, trouble = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
KNOWN = ("/sleep", "/wake_up", "/collective_rpc", "/release_memory_occupation", "/resume_memory_occupation")

LOOKS = {
    "/is_sleeping": {"is_sleeping": trouble == "asleep"},
    "/server_info": {"enable_memory_saver": trouble != "no saver", "enable_weights_cpu_backup": trouble != "no backup"},
}

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        found = LOOKS.get(self.path) if trouble not in ("missing", "old") else None
        if trouble == "old" and self.path == "/get_server_info":
            found = LOOKS["/server_info"]
        self.send_response(200 if found else 404)
        self.end_headers()
        self.wfile.write(json.dumps(found or {"detail": "Not Found"}).encode())
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0)).decode()
        with log.open("a") as file:
            file.write(json.dumps([self.path, body]) + "\\n")
        if trouble == "hang":
            time.sleep(60)
        known = self.path.partition("?")[0] in KNOWN and trouble != "missing"
        self.send_response(500 if trouble == "broken" else 200 if known else 404)
        self.end_headers()
        self.wfile.write(b"{}")
    def log_message(self, *args): pass

server = http.server.ThreadingHTTPServer((sys.argv[4], 0), Handler)
port_file.write_text(str(server.server_port))
server.serve_forever()
'''
PROGRAM = """
import subprocess, sys, time
from pathlib import Path
import woodfrog
woodfrog.shrink_before_snapshot(@OPTIONS@)

here = Path(__file__).parent
class Model:
    @enter(snap=True)
    def load(self):
        self.server = subprocess.Popen([sys.executable, str(here / "@NAME@.py"), str(here / "log"), str(here / "port"),
                                        "@TROUBLE@", "@HOST@"])
        while not (here / "port").exists() or not (here / "port").read_text():
            time.sleep(0.01)
    @exit
    def end(self):
        self.server.kill()
    def asked(self):
        return (here / "log").read_text() if (here / "log").exists() else ""
"""


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    made: list[Worker] = []

    def start(name: str, trouble: str = "", host: str = "127.0.0.1", options: str = "") -> Worker:
        root = tmp_path / f"w{len(made)}"
        root.mkdir()
        (root / f"{name}.py").write_text(SERVER)
        text = PROGRAM
        for key, value in (("NAME", name), ("TROUBLE", trouble), ("HOST", host), ("OPTIONS", options)):
            text = text.replace(f"@{key}@", value)
        made.append(Worker(root, text))
        booted = made[-1].boot("Model", kind="class", methods=("asked",), snapshot=True)
        assert booted["type"] == "booted", booted
        return made[-1]

    yield start
    for worker in made:
        worker.ask({"type": "stop"})
        worker.close()


def port(worker: Worker) -> str:
    return (worker.root / "port").read_text()


def asked(worker: Worker) -> list[Any]:
    return [json.loads(line) for line in worker.call("asked").splitlines()]


VLLM_1 = [["/sleep?level=1", ""], ["/wake_up", ""]]
VLLM_2 = [
    ["/sleep?level=2", ""],
    ["/wake_up?tags=weights", ""],
    ["/collective_rpc", '{"method": "reload_weights"}'],
    ["/wake_up?tags=kv_cache", ""],
]
SGLANG = [["/release_memory_occupation", "{}"], ["/resume_memory_occupation", "{}"]]
CACHE = [[path, '{"tags": ["kv_cache"]}'] for path, _ in SGLANG]


@pytest.mark.parametrize(
    ("name", "host", "options", "wanted"),
    [
        ("vllm_server", "127.0.0.1", "", VLLM_1),
        ("vllm_server", "0.0.0.0", "vllm=2", VLLM_2),
        ("sglang_server", "127.0.0.1", "sglang=True", SGLANG),
        ("vllm_server", "127.0.0.1", "vllm=0", []),
        ("sglang_server", "127.0.0.1", "", []),  # it may have been released already, and ends when it is asked twice
        ("web_server", "127.0.0.1", "", []),
    ],
)
def test_a_server_in_the_tree_lets_go_and_takes_back(
    serve: Callable[..., Worker], name: str, host: str, options: str, wanted: list[Any]
) -> None:
    worker = serve(name, host=host, options=options)
    frozen = worker.freeze()
    kind = name.partition("_")[0]
    assert (f"shrink.{kind}:{port(worker)}" in frozen["phases"]) == bool(wanted), frozen
    ready = worker.start(restored=True)
    assert ready["type"] == "ready" and ready["warnings"] == []
    assert asked(worker) == wanted
    assert (f"unshrink.{kind}:{port(worker)}" in ready["phases"]) == bool(wanted)


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ("missing", "answered 404 (it needs --enable-sleep-mode, VLLM_SERVER_DEV_MODE=1)"),
        ("broken", "answered 500"),
        ("hang", "going on without it"),
    ],
)
def test_a_server_that_does_not_is_named_and_the_freeze_goes_on(
    serve: Callable[..., Worker], trouble: str, said: str
) -> None:
    worker = serve("vllm_server", trouble, options="timeout_s=1.0")
    begin = time.monotonic()
    assert worker.freeze()["type"] == "frozen" and time.monotonic() - begin < 20
    [line] = [line for line in worker.err().splitlines() if line.startswith("woodfrog: shrink")]
    assert line.startswith(f"woodfrog: shrink vllm:{port(worker)}: ") and (said in line or "timed out" in line), line
    # What did not let go is not asked to take back; what did not answer, or failed, may have done it or a part.
    assert worker.start(restored=True)["type"] == "ready"
    assert [path for path, _ in asked(worker)] == ["/sleep?level=1", *([] if trouble == "missing" else ["/wake_up"])]


def test_what_the_program_put_to_sleep_is_its_own_to_wake(serve: Callable[..., Worker]) -> None:
    worker = serve("vllm_server", "asleep")
    worker.freeze()
    assert worker.start(restored=True)["warnings"] == []
    assert asked(worker) == []


@pytest.mark.parametrize(
    ("trouble", "said", "wanted"),
    [
        ("no backup", "only its cache was let go: weights need --enable-weights-cpu-backup", CACHE),
        ("no saver", "does not say that it has --enable-memory-saver; left as it is", []),
        ("missing", "gives no /server_info; left as it is", []),
        ("old", "", SGLANG),
    ],
)
def test_sglang_lets_go_only_of_what_it_can_bring_back(
    serve: Callable[..., Worker], trouble: str, said: str, wanted: list[Any]
) -> None:
    worker = serve("sglang_server", trouble, options="sglang=True")
    worker.freeze()
    lines = [line for line in worker.err().splitlines() if line.startswith("woodfrog: shrink")]
    assert len(lines) == bool(said) and all(said in line for line in lines), lines
    assert worker.start(restored=True)["warnings"] == []
    assert asked(worker) == wanted


def test_what_let_go_takes_back_also_without_a_snapshot(serve: Callable[..., Worker]) -> None:
    worker = serve("vllm_server")
    worker.freeze()
    assert worker.start(restored=False)["type"] == "ready"
    assert asked(worker) == VLLM_1


def test_an_engine_in_the_process_sleeps(tmp_path: Path) -> None:
    """A stand-in for vLLM: its engine's interface for sleeping, and nothing else."""
    root = tmp_path / "w"
    (root / "vllm").mkdir(parents=True)
    (root / "vllm" / "__init__.py").write_text(
        "from types import SimpleNamespace\n"
        "did = []\n"
        "class LLM:\n"
        "    def __init__(self, enable_sleep_mode=True, asleep=False):\n"
        "        config = SimpleNamespace(enable_sleep_mode=enable_sleep_mode)\n"
        "        self.llm_engine = SimpleNamespace(model_config=config, is_sleeping=lambda: asleep)\n"
        "    def sleep(self, level=1, mode='abort'): did.append(['sleep', level])\n"
        "    def wake_up(self, tags=None): did.append(['wake_up', tags])\n"
        "    def collective_rpc(self, method): did.append([method])\n"
    )
    program = (
        "import vllm, woodfrog\nwoodfrog.shrink_before_snapshot(vllm=2)\nllm = vllm.LLM()\n"
        "left = [vllm.LLM(enable_sleep_mode=False), vllm.LLM(asleep=True)]\ndef f(): return vllm.did"
    )
    worker = Worker(root, program)
    try:
        worker.boot("f", snapshot=True)
        assert "shrink.vllm" in worker.freeze()["phases"]
        worker.start(restored=True)
        assert worker.call("f") == [
            ["sleep", 2],
            ["wake_up", ["weights"]],
            ["reload_weights"],
            ["wake_up", ["kv_cache"]],
        ]
        assert worker.err() == "woodfrog: shrink vllm: an engine has no enable_sleep_mode=True, and is left as it is\n"
    finally:
        worker.close()


@pytest.mark.torch
def test_torch_gives_back_what_it_keeps(tmp_path: Path) -> None:
    """The order of the calls. The CPU build has no CUDA: they are written down where they would go into its C part."""
    program = """
import torch
did = []
torch.cuda.is_initialized = lambda: True
torch.cuda.device_count = lambda: 2
torch.cuda.synchronize = lambda device: did.append(f"synchronize {device}")
torch.cuda.empty_cache = lambda: did.append("empty_cache")
torch._C._cuda_clearCublasWorkspaces = lambda: did.append("workspaces")
torch._C._host_emptyCache = lambda: did.append("host")
torch.cuda.manual_seed_all = lambda seed: None
def f(): return did
"""
    worker = Worker(tmp_path / "w", program)
    try:
        worker.boot("f", snapshot=True)
        assert "shrink.torch" in worker.freeze()["phases"]
        worker.start(restored=True)
        assert worker.call("f") == ["synchronize 0", "synchronize 1", "workspaces", "host", "empty_cache"]
    finally:
        worker.close()


def test_a_program_with_none_of_them_is_left_alone(tmp_path: Path) -> None:
    worker = Worker(tmp_path / "w", "def f(): return 1")
    try:
        worker.boot("f", snapshot=True)
        assert not [name for name in worker.freeze()["phases"] if "shrink" in name]
        assert worker.start(restored=True)["type"] == "ready" and worker.err() == ""
    finally:
        worker.close()


def test_servers_are_found_by_what_started_them(tmp_path: Path) -> None:
    """A server's own child listens under a name of its own, also on IPv6; one that is no child of ours is not ours."""
    text = (
        "import socket, subprocess, sys, time\n"
        "if len(sys.argv) == 1:\n"
        "    sys.exit(subprocess.run([sys.executable, '-c', sys.stdin.read()]).returncode)\n"
    )
    (tmp_path / "sglang_launch.py").write_text(text)
    child = (
        "import socket, time\ns = socket.create_server(('::1', 0), family=socket.AF_INET6)\n"
        f"open({str(tmp_path / 'port')!r}, 'w').write(str(s.getsockname()[1]))\ntime.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, str(tmp_path / "sglang_launch.py")], stdin=subprocess.PIPE)
    try:
        assert process.stdin is not None
        process.stdin.write(child.encode())
        process.stdin.close()
        deadline = time.monotonic() + 20
        while not (tmp_path / "port").exists() or not (tmp_path / "port").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        number = int((tmp_path / "port").read_text())
        [found] = [s for s in servers.find() if s.port == number]
        assert (found.kind, found.host) == ("sglang", "::1")
        assert servers.find(root=process.pid + 1_000_000) == []
    finally:
        for pid in reversed([process.pid, *(s.pid for s in servers.find())]):
            subprocess.run(["kill", "-9", str(pid)])
        process.wait()


@pytest.mark.parametrize(("spoken", "status"), [("", 0), ("nonsense", 0), ("HTTP/1.1 404 Not Found", 404)])
def test_a_port_that_speaks_no_http_is_told_from_a_server(spoken: str, status: int) -> None:
    """Engines listen for their own processes, too (torch's store, ZeroMQ), and these wait for more without an end."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = servers.Server("vllm", 1, "127.0.0.1", listening.getsockname()[1])

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(1000)
                if spoken:
                    connection.sendall(spoken.encode() + b"\r\n\r\n")
                else:
                    connection.recv(1000)  # until the other side has gone

        thread = threading.Thread(target=serve)
        thread.start()
        if status:
            assert server.get("/is_sleeping", 60) == ""
        else:
            with pytest.raises(servers.NotHttp):
                server.get("/is_sleeping", 60 if spoken else 0.2)
        thread.join()


@pytest.mark.parametrize(
    ("title", "found"),
    [
        (["VLLM::EngineCore"], False),
        (["VLLM::Worker_TP0"], False),
        (["sglang::scheduler_TP0"], False),
        (["/usr/bin/python3", "-c", "from multiprocessing.spawn import spawn_main; spawn_main()"], False),
        (["VLLM::APIServer_0"], True),
        (["sglang::tokenizer_worker:12"], True),
        (["/usr/bin/python3", "-m", "vllm.entrypoints.openai.api_server"], True),
        (["serve"], True),
    ],
)
def test_an_engines_inner_processes_are_not_asked(tmp_path: Path, title: list[str], found: bool) -> None:
    """A connection to one that accepts none would be in the capture, and CRIU refuses such."""
    net = tmp_path / "self" / "net"
    net.mkdir(parents=True)
    (net / "tcp").write_text("head\n0: 0100007F:1F40 00000000:0000 0A 0:0 0:0 0 0 0 77 1\n")
    for pid, parent, words in ((1, 0, ["python3"]), (2, 1, ["/bin/vllm", "serve"]), (3, 2, title)):
        (tmp_path / str(pid) / "fd").mkdir(parents=True)
        (tmp_path / str(pid) / "stat").write_text(f"{pid} (x) S {parent} 0")
        (tmp_path / str(pid) / "cmdline").write_bytes("\0".join(words).encode())
    (tmp_path / "3" / "fd" / "5").symlink_to("socket:[77]")
    assert [(s.pid, s.port) for s in servers.find(str(tmp_path), 1)] == ([(3, 8000)] if found else [])


def test_options_are_checked() -> None:
    from woodfrog.sdk import hooks

    with pytest.raises(ValueError, match="sleep level, 0, 1 or 2, not 3"):
        hooks.shrink_before_snapshot(vllm=3)
    with pytest.raises(ValueError, match="timeout_s must be above 0"):
        hooks.shrink_before_snapshot(timeout_s=0)
