"""The commands that look into, keep and move snapshots, against a daemon that answers from a table."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fake_daemon import Answer, Daemon, Request, private_home, serving
from woodfrog.cli import commands
from woodfrog.cli.plot import Box, squarify, tiles
from woodfrog.cli.remote import job_words
from woodfrog.errors import IntegrityError, NotFoundError, SpecError, StoreError

MIB = 1 << 20


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with private_home(monkeypatch) as path:
        yield path


@pytest.fixture
def daemon(home: Path) -> Iterator[Daemon]:
    with serving(home) as fake:
        yield fake


def run_results(daemon: Daemon, *argv: str, stdin: str | None = None) -> Result:
    one = {"app": "demo", "results": 3, "bytes": 5 << 20, "oldest": 1.0, "fetched": 1}
    daemon.routes["GET /results"] = {"apps": [one], "limit_bytes": 1 << 30, "keep_s": 86400.0}
    daemon.routes["DELETE /results"] = {"deleted": 3, "bytes": 5 << 20}
    return run("result", *argv, stdin=stdin)


def test_results(daemon: Daemon) -> None:
    shown = run_results(daemon, "list")
    assert re.split(r"\s{2,}", shown.stdout.splitlines()[1])[:4] == ["demo", "3", "5.0 MiB", "2"]
    assert "5.0 MiB of at most 1.0 GiB" in shown.stderr
    assert "name an app, or --older-than" in run_results(daemon, "delete").stderr
    shown = run_results(daemon, "delete", "demo", stdin="n\n")
    assert "2 of them have not been fetched by anybody" in shown.stderr and shown.exit_code == 1
    assert not any(r.method == "DELETE" for r in daemon.requests)
    shown = run_results(daemon, "delete", "demo", stdin="y\n")
    assert "Remove 3 results of demo (5.0 MiB)?" in shown.stderr and "removed 3 results, 5.0 MiB" in shown.stderr
    shown = run_results(daemon, "delete", "--older-than", "1d", "--yes", "--json")
    assert json.loads(shown.stdout)["deleted"] == 3
    last = [r for r in daemon.requests if r.method == "DELETE"][-1]
    unknown = NotFoundError("no app 'nope' was ever deployed here")
    for argv in (["delete", "nope"], ["delete", "nope", "-y"]):
        answers = {f"{m} /results": Answer({"error": unknown.to_dict()}, 404) for m in ("GET", "DELETE")}
        daemon.routes |= answers
        shown = run("result", *argv)
        assert (shown.exit_code, shown.stderr) == (2, f"error: {unknown.message}\n")
    assert "app=" not in last.query and "before=" in last.query
    assert run_results(daemon, "delete", "--older-than", "soon").exit_code == 2


def run(*argv: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(commands.app, list(argv), input=stdin)


def running(what: str, step: str = "packs", done: int = 1, total: int = 9) -> Answer:
    job = {"job": "j1", "what": what, "state": "running", "step": step, "done": done, "total": total}
    return Answer(job, 202)


def row(size: int, zero: int = 0, shared: int = 0, **more: Any) -> dict[str, Any]:
    return {"resident_bytes": size * MIB, "zero_bytes": zero * MIB, "shared_bytes": shared * MIB, **more}


MAPPING = {"begin": "7f00", "end": "8f00", "kind": "large blocks", "name": "", "parts": {"large blocks": 30 * MIB}}
CONTENTS = {
    **row(100, 2, 80, id="s1", form="packed", parent="z-1", compared=True, stored_bytes=3 * MIB, files_bytes=5000),
    "kinds": [row(60, kind="python objects"), row(30, kind="large blocks"), row(10, 2, 8, kind="library data")],
    "libraries": [row(8, library="torch"), row(2, library="libc")],
    "files": [row(8, file="/v/lib/python3.11/site-packages/torch/lib/libtorch_cpu.so")],
    "processes": [{"pid": 100, "comm": "python", "mapped": 700, "mappings": [row(30, **MAPPING)], **row(100)}],
    "written": [{"file": "/tmp/notes", "bytes": 5000}],
}
SNAPSHOT = {"id": "s1", "app": "demo", "function": "square", "state": "ready", "function_key": "k"}


def test_inspect_shows_what_is_in_it(daemon: Daemon) -> None:
    daemon.routes["GET /snapshots/s1"] = {**SNAPSHOT, "phases": [{"name": "dump", "ms": "12.5"}], "files": []}
    daemon.routes["GET /snapshots/s1/contents"] = CONTENTS
    shown = run("snapshot", "inspect", "s1").stdout
    assert "memory 100.0 MiB in 1 process: 2.0 MiB zeroes, 80.0 MiB as in z-1, stored in 3.0 MiB (packed)" in shown
    assert re.search(r"^python objects +60\.0 MiB +60 % +0 B +0 B +▇{14}$", shown, re.MULTILINE)
    assert re.search(r"^torch +8\.0 MiB +8\.0 %", shown, re.MULTILINE)
    assert re.search(r"^7f00-8f00 +large blocks +30\.0 MiB", shown, re.MULTILINE)
    assert re.search(r"^/tmp/notes +4\.9 KiB$", shown, re.MULTILINE)
    assert json.loads(run("snapshot", "inspect", "s1", "--json").stdout)["contents"] == CONTENTS
    asked = len(daemon.seen("GET /snapshots/s1/contents"))
    assert "python objects" not in run("snapshot", "inspect", "s1", "--quick").stdout
    assert "contents" not in json.loads(run("snapshot", "inspect", "s1", "--quick", "--json").stdout)
    assert len(daemon.seen("GET /snapshots/s1/contents")) == asked


def test_a_snapshot_that_cannot_be_looked_into_is_still_described(daemon: Daemon) -> None:
    daemon.routes["GET /snapshots/s1"] = SNAPSHOT
    error = IntegrityError("snapshot s1: img/pages-1.img was altered").to_dict()
    daemon.routes["GET /snapshots/s1/contents"] = Answer({"error": error}, 409)
    shown = run("snapshot", "inspect", "s1")
    assert shown.exit_code == 0 and re.search("^function +square$", shown.stdout, re.MULTILINE)
    assert shown.stderr == "not looked into: snapshot s1: img/pages-1.img was altered\n"
    assert json.loads(run("snapshot", "inspect", "s1", "--json").stdout)["contents"] is None


def test_a_picture_needs_matplotlib_and_a_known_format(daemon: Daemon, tmp_path: Path) -> None:
    daemon.routes["GET /snapshots/s1"] = SNAPSHOT
    daemon.routes["GET /snapshots/s1/contents"] = CONTENTS
    for suffix, magic in ((".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")):
        target = tmp_path / f"out{suffix}"
        assert run("snapshot", "inspect", "s1", "--plot", str(target)).exit_code == 0
        assert target.read_bytes().startswith(magic)
    wrong = run("snapshot", "inspect", "s1", "--plot", "out.txt")
    assert (wrong.exit_code, wrong.stderr) == (2, "error: --plot out.txt: its name must end with .png, .svg, .pdf\n")
    code = "import sys; sys.modules['matplotlib'] = None; import woodfrog.cli as c; c.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "snapshot", "inspect", "s1", "--plot", "out.png"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (2, "error: --plot needs matplotlib: pip install 'woodfrog[plot]'\n")


def test_tiles_fill_the_picture_and_each_kind() -> None:
    for kind, parts in tiles(CONTENTS):
        whole = next(k["resident_bytes"] for k in CONTENTS["kinds"] if k["kind"] == kind)  # type: ignore[index]
        assert sum(t.size for t in parts) == whole
    for sizes in ([5.0], [6.0, 6.0, 4.0, 3.0, 2.0, 2.0, 1.0], [1e9, 1.0], [1.0] * 50):
        boxes = list(squarify(sizes, Box(0, 0, 6, 4)))
        assert len(boxes) == len(sizes)
        for size, box in zip(sizes, boxes, strict=True):
            assert box.width * box.height == pytest.approx(size * 24 / sum(sizes))
            assert box.x >= -1e-6 and box.x + box.width <= 6 + 1e-6
            assert box.y >= -1e-6 and box.y + box.height <= 4 + 1e-6
    assert list(squarify([], Box(0, 0, 1, 1))) == []


DIFFERENCE = {
    "before": "s1", "after": "i1", "container": "i1", "served": 1, "changed": 10, "new": 2, "gone": 1, "same": 900,
    "bytes": 12 * 4096, "kinds": [{"kind": "heap", "changed": 10, "new": 2, "bytes": 12 * 4096}], "libraries": [],
    "mappings": [{"pid": 100, **MAPPING, "changed": 10, "new": 2, "bytes": 12 * 4096}],
    "ranges": [{"pid": 100, "address": "7f00", "pages": 12, "kind": "heap", "name": ""}],
}  # fmt: skip


def test_diff_of_two_and_of_a_call(daemon: Daemon) -> None:
    daemon.routes["GET /snapshots/s1/diff/i1"] = DIFFERENCE
    shown = run("snapshot", "diff", "s1", "i1", "--most", "5").stdout
    assert shown.startswith("s1 → container i1, after 1 call: 12 pages differ, 48.0 KiB\n")
    assert re.search(r"^100 +7f00 +12 +heap$", shown, re.MULTILINE)
    assert daemon.seen("GET /snapshots/s1/diff/i1")[0].query.startswith("most=5&")
    assert json.loads(run("snapshot", "diff", "s1", "i1", "--json").stdout) == DIFFERENCE

    method = {"name": "poke", "generator": False, "is_async": False}
    daemon.routes["GET /apps/demo"] = {"functions": [{"tag": "Box", "methods": [method], "key": "k"}]}
    daemon.routes["GET /snapshots/s1"] = {**SNAPSHOT, "function": "Box"}
    daemon.routes["POST /apps/demo/calls/Box.poke"] = Answer(3, 200, {"Woodfrog-Status": "success"})
    plain = Daemon.answer

    def answer(request: Request) -> Answer:
        if request.path.endswith("/trace"):
            return Answer({"instance": "i1"})
        return plain(daemon, request)

    daemon.answer = answer  # type: ignore[method-assign]
    daemon.routes["GET /containers/i1"] = {"id": "i1", "snapshot": "s1"}
    assert run("snapshot", "diff", "s1", "--call", "poke", "--args", "[1, 2]", "--json").exit_code == 0
    assert daemon.seen("POST /apps/demo/calls/Box.poke")[0].json() == [1, 2]
    daemon.routes["GET /containers/i1"] = {"id": "i1", "snapshot": None}
    assert "was not thawed from s1" in run("snapshot", "diff", "s1", "--call", "poke").stderr
    del daemon.routes["GET /containers/i1"]
    assert "ended with the call" in run("snapshot", "diff", "s1", "--call", "poke").stderr
    error = {"type": "ValueError", "message": "no", "traceback": "ValueError: no"}
    daemon.routes["POST /apps/demo/calls/Box.poke"] = Answer({"error": error}, 200, {"Woodfrog-Status": "exception"})
    raised = run("snapshot", "diff", "s1", "--call", "poke")
    assert (raised.exit_code, raised.stderr) == (1, "ValueError: no\n")
    daemon.routes["GET /apps/demo"] = {"functions": [{"tag": "Box", "methods": [method], "key": "other"}]}
    assert "another version of demo.Box" in run("snapshot", "diff", "s1", "--call", "poke").stderr
    for argv in (["s1"], ["s1", "i1", "--call", "poke"], ["s1", "i1", "--args", "[]"]):
        assert run("snapshot", "diff", *argv).exit_code == 2


def test_verify_ends_with_a_status(daemon: Daemon) -> None:
    good = {"id": "s1", "bytes": 5 * MIB, "problems": []}
    daemon.routes["POST /snapshots/verify"] = running("verify", "snapshots", 1, 2)
    daemon.routes["GET /jobs/j1"] = [running("verify", "snapshots", 2, 3), {"snapshots": [good], "store": []}]
    shown = run("snapshot", "verify", "--all")
    assert shown.exit_code == 0 and shown.stdout.splitlines()[1].split() == ["s1", "5.0", "MiB", "good"]
    assert shown.stderr == "verify: 1 of 2 snapshots\nverify: 2 of 3 snapshots\n"
    bad = {**good, "problems": ["img/core-100.img was altered"]}
    daemon.routes["POST /snapshots/s1/verify"] = {"snapshots": [bad], "store": []}
    shown = run("snapshot", "verify", "s1")
    assert shown.exit_code == 2 and "img/core-100.img was altered" in shown.stdout
    lost = {"snapshots": [good], "store": [{"pack": "ab", "what": "page 3 is not what its name says"}]}
    daemon.routes["POST /snapshots/verify"] = lost
    shown = run("snapshot", "verify", "--json")
    assert (shown.exit_code, json.loads(shown.stdout), shown.stderr) == (2, lost, "")
    assert "page store: ab: page 3" in run("snapshot", "verify").stderr


def test_gc_pin_push_and_pull(daemon: Daemon) -> None:
    daemon.routes["POST /snapshots/gc"] = {"packs": 2, "freed_bytes": 3 * MIB}
    assert run("snapshot", "gc").stderr == "freed 3.0 MiB in 2 packs\n"
    assert run("snapshot", "gc", "--dry-run").stderr == "would free 3.0 MiB in 2 packs\n"
    assert "dry_run" in daemon.seen("POST /snapshots/gc")[1].query
    daemon.routes["POST /snapshots/gc"] = {"packs": 0, "freed_bytes": 3 * MIB, "rebuilt_bytes": 2 * MIB}
    assert run("snapshot", "gc", "--rebuilt").stderr == "freed 3.0 MiB in 0 packs, 2.0 MiB of it rebuilt ones\n"
    assert "rebuilt=1" in daemon.seen("POST /snapshots/gc")[2].query
    assert run("snapshot", "gc", "--rebuilt", "--tier").exit_code == 2
    found = {"tier": "s3://b", "packs": 1, "chunks": 4, "snapshots": 2, "objects": 12, "freed_bytes": MIB}
    daemon.routes["POST /snapshots/gc"] = found
    words = "1.0 MiB in s3://b: 12 objects of 1 packs, 4 chunks, 2 snapshots, 0 tombstones\n"
    assert run("snapshot", "gc", "--tier").stderr == f"freed {words}"
    assert run("snapshot", "gc", "--tier", "--dry-run").stderr == f"would free {words}"
    queries = [seen.query for seen in daemon.seen("POST /snapshots/gc")]
    assert ["tier" in query for query in queries] == [False, False, False, True, True]
    assert ["dry_run" in query for query in queries] == [False, True, False, False, True]
    daemon.routes["POST /snapshots/gc"] = {**found, "objects": 0}
    assert run("snapshot", "gc", "--tier").stderr == "nothing to remove in s3://b\n"
    daemon.routes["POST /snapshots/s1/pin"] = {"id": "s1", "pinned": True}
    assert run("snapshot", "pin", "s1").stderr == "pinned s1\n"
    daemon.routes["POST /snapshots/s1/push"] = {"id": "s1", "tier": "s3://b"}
    assert run("snapshot", "push", "s1").stderr == "pushed s1 to s3://b\n"
    daemon.routes["POST /snapshots/s1/pull"] = running("pull s1", "bytes", MIB, 4 * MIB)
    daemon.routes["GET /jobs/j1"] = {"id": "s1", "app": "demo", "function": "f", "new": True, "tier": "s3://b"}
    assert run("snapshot", "pull", "s1").stderr == "pull s1: 1.0 MiB of 4.0 MiB\npulled s1 of demo.f\n"
    daemon.routes["GET /jobs/j1"] = Answer({"error": IntegrityError("no trusted key has signed it").to_dict()}, 409)
    failed = run("snapshot", "pull", "s1")
    assert (failed.exit_code, failed.stderr.splitlines()[-1]) == (2, "error: no trusted key has signed it")
    assert job_words({"what": "gc", "step": "packs", "done": 0, "total": 1}) == "gc"


def test_what_is_in_the_tier(daemon: Daemon) -> None:
    rows = [
        {"id": "s-1", "app": "demo", "function": "f", "state": "ready", "memory_bytes": MIB, "stored_bytes": MIB,
         "files_bytes": 0, "created": 1.0, "signer": "abcdef0123456789abcdef01", "signer_comment": "gpu-7",
         "trusted": True, "here": True, "removed": None, "why": None, "function_key": "k1"},
        {"id": "s-2", "app": None, "state": "removed", "removed": 1.0, "why": "for all machines", "here": False},
    ]  # fmt: skip
    daemon.routes["POST /tier/list"] = running("list the tier", "snapshots", 1, 2)
    daemon.routes["GET /jobs/j1"] = {"tier": "s3://b", "snapshots": rows}
    shown = run("snapshot", "list", "--tier")
    header, first, second = shown.stdout.splitlines()
    assert header.split()[-5:] == ["MADE", "SIGNED", "BY", "HERE", "WHY"]
    assert "abcdef01 gpu-7  here" in first and second.split()[:2] == ["s-2", "removed"]
    assert re.search(r"for all machines, \d+ d ago$", second)
    assert json.loads(run("snapshot", "list", "--tier", "--json").stdout) == rows
    daemon.routes["GET /apps/demo"] = {"functions": [{"key": "k1"}]}
    assert [r["id"] for r in json.loads(run("snapshot", "list", "--tier", "--app", "demo", "--json").stdout)] == ["s-1"]
    daemon.routes["POST /tier/list"] = {"tier": "s3://b", "snapshots": []}
    assert run("snapshot", "list", "--tier").stderr == "no snapshots in s3://b\n"
    daemon.routes["POST /tier/list"] = Answer({"error": StoreError("no tier is configured").to_dict()}, 507)
    none = run("snapshot", "list", "--tier")
    assert (none.exit_code, none.stderr) == (2, "error: no tier is configured\n")
    daemon.routes["POST /snapshots/s1/push"] = {"id": "s1", "tier": "s3://b"}
    assert run("snapshot", "push", "s1", "--anyway").exit_code == 0
    assert "anyway=1" in daemon.seen("POST /snapshots/s1/push")[-1].query


def test_removing_from_the_tier_asks(daemon: Daemon) -> None:
    answer = {"snapshot": "s1-whole", "removed": True, "here": True, "tier": "s3://b", "in_tier": True}
    no_tier = StoreError("no tier is configured; set WOODFROG_TIER to a bucket's URL or a directory", code="no-tier")
    daemon.routes["GET /tier"] = Answer({"error": no_tier.to_dict()}, 507)
    refused = run("snapshot", "invalidate", "s1", "--tier", stdin="y\n")
    assert (refused.exit_code, refused.stderr) == (2, f"error: {no_tier.message}\n"), "nothing is asked"
    daemon.routes["GET /tier"] = {"tier": "s3://b"}
    daemon.routes["GET /snapshots/s1"] = {**SNAPSHOT, "id": "s1-whole", "pinned": True}
    daemon.routes["POST /snapshots/s1-whole/invalidate"] = answer
    refused = run("snapshot", "invalidate", "s1", "--tier", stdin="n\n")
    assert refused.exit_code == 1 and refused.stderr.startswith("s1-whole of demo.square, which is pinned\n")
    assert run("snapshot", "invalidate", "s1", "--tier").exit_code == 1, "nobody is there to ask"
    assert not daemon.seen("POST /snapshots/s1-whole/invalidate")
    done = run("snapshot", "invalidate", "s1", "--tier", stdin="y\n")
    assert done.exit_code == 0 and done.stderr.endswith("removed s1-whole\nremoved s1-whole from s3://b\n")
    assert "tier=1" in daemon.seen("POST /snapshots/s1-whole/invalidate")[0].query

    daemon.routes["POST /snapshots/s2/invalidate"] = {**answer, "snapshot": "s2", "here": False}
    refused = run("snapshot", "invalidate", "s2", "--tier", stdin="n\n")
    assert refused.exit_code == 1 and "s2 is not on this machine: the tier's may be the last copy" in refused.stderr
    assert run("snapshot", "invalidate", "s2", "--tier", "--yes").stderr == "removed s2 from s3://b\n"
    daemon.routes["POST /snapshots/s2/invalidate"] = {**answer, "snapshot": "s2", "in_tier": False, "removed": False}
    shown = run("snapshot", "invalidate", "s2", "--tier", "-y").stderr.splitlines()
    assert shown == ["retired s2: removed with the last container thawed from it", "s2 was not in s3://b"]
    daemon.routes["POST /snapshots/s2/invalidate"] = {"snapshot": "s2", "removed": True}
    assert run("snapshot", "invalidate", "s2").stderr == "removed s2\n"
    pinned = SpecError("snapshot s2 is pinned: unpin it, or give force=1", code="pinned").to_dict()
    removed = daemon.routes["POST /snapshots/s2/invalidate"]
    daemon.routes["POST /snapshots/s2/invalidate"] = lambda r: (
        removed if "force=1" in r.query else Answer({"error": pinned}, 400)
    )
    refused = run("snapshot", "invalidate", "s2", stdin="n\n")
    assert refused.exit_code == 1 and "s2 is pinned. Remove it?" in refused.stderr
    assert run("snapshot", "invalidate", "s2", stdin="y\n").stderr.endswith("removed s2\n")
    assert run("snapshot", "invalidate", "s2", "--yes").stderr == "removed s2\n"
    assert "tier" not in daemon.seen("POST /snapshots/s2/invalidate")[-1].query


def test_export_and_import_files(daemon: Daemon, tmp_path: Path) -> None:
    data = bytes(range(256)) * 3000
    daemon.routes["POST /snapshots/s1/export"] = running("export s1")
    daemon.routes["GET /jobs/j1"] = {"id": "s1", "bytes": len(data), "file": "/jobs/j1/file"}
    daemon.routes["GET /jobs/j1/file"] = Answer(data)
    target = tmp_path / "s1.frog"
    shown = run("snapshot", "export", "s1", str(target))
    assert (shown.exit_code, target.read_bytes()) == (0, data), shown.stderr
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert run("snapshot", "export", "s1", str(target)).exit_code == 2
    assert run("snapshot", "export", "s1", str(target), "--force", "--json").exit_code == 0
    assert "no directory" in run("snapshot", "export", "s1", str(tmp_path / "none" / "x")).stderr
    daemon.routes["GET /jobs/j1/file"] = Answer({"error": IntegrityError("gone").to_dict()}, 404)
    assert run("snapshot", "export", "s1", str(tmp_path / "other")).exit_code == 2
    assert [p.name for p in tmp_path.iterdir()] == ["s1.frog"]

    daemon.routes["POST /snapshots/import"] = {"id": "s1", "app": "demo", "function": "f", "new": False}
    assert run("snapshot", "import", str(target)).stderr.endswith("s1 of demo.f is here\n")
    assert daemon.seen("POST /snapshots/import")[0].body == data
    missing = run("snapshot", "import", str(tmp_path / "none"))
    assert (missing.exit_code, missing.stderr) == (
        2, f"error: cannot read {tmp_path / 'none'}: No such file or directory\n",
    )  # fmt: skip
    refused = IntegrityError("no trusted key has signed it").to_dict()
    daemon.routes["POST /snapshots/import"] = Answer({"error": refused}, 409)
    assert run("snapshot", "import", str(target)).stderr.endswith(f"error: {target}: no trusted key has signed it\n")


def test_an_interrupted_export_is_given_up(daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = running("export s1")
    begun.body["for_client"] = True
    daemon.routes["POST /snapshots/s1/export"] = begun
    daemon.routes["DELETE /jobs/j1/file"] = {"job": "j1"}

    def interrupted(job: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("woodfrog.cli.remote.job_words", interrupted)
    shown = run("snapshot", "export", "s1", str(tmp_path / "s1.frog"))
    assert (shown.exit_code, shown.stderr) == (130, "interrupted\n") and daemon.seen("DELETE /jobs/j1/file")


def test_trust_shows_the_fingerprint_and_asks(daemon: Daemon, home: Path, tmp_path: Path) -> None:
    raw = bytes(range(32))
    text = base64.b64encode(raw).decode() + " other-host"
    fingerprint = hashlib.sha256(raw).hexdigest()[:24]
    own = {"fingerprint": "f" * 24, "text": "AAAA this-host"}
    daemon.routes["GET /trust"] = {"own": own, "trusted": [{"fingerprint": fingerprint, "comment": "x"}]}
    shown = run("snapshot", "trust")
    assert shown.stdout.splitlines()[0] == "AAAA this-host" and fingerprint in shown.stdout
    assert json.loads(run("snapshot", "trust", "list", "--json").stdout)["own"] == own

    denied = run("snapshot", "trust", "add", text, "--yes")
    assert denied.exit_code == 4 and "only root may change whom this machine trusts" in denied.stderr
    (home / "keys").mkdir()
    (home / "keys" / "admin").write_text("secret")
    daemon.routes["POST /trust"] = {"fingerprint": fingerprint, "comment": "mine"}
    refused = run("snapshot", "trust", "add", text, stdin="n\n")
    assert refused.exit_code == 1 and f"fingerprint {fingerprint} other-host" in refused.stderr
    assert not daemon.seen("POST /trust")
    file = tmp_path / "key.pub"
    file.write_text(text + "\n")
    for argv, stdin in ((["--yes", text], None), ([str(file)], "y\n"), (["-", "--yes"], text)):
        assert run("snapshot", "trust", "add", *argv, "--comment", "mine", stdin=stdin).exit_code == 0
        sent = daemon.seen("POST /trust")[-1]
        assert sent.json() == {"key": text, "comment": "mine"} and sent.headers["woodfrog-admin"] == "secret"
    assert "not a public key" in run("snapshot", "trust", "add", "hello").stderr
    daemon.routes[f"POST /trust/{fingerprint}/remove"] = {"fingerprint": fingerprint, "comment": "mine"}
    assert run("snapshot", "trust", "remove", fingerprint).stderr == f"no longer trusted: {fingerprint} mine\n"


def test_store_stats_by_lineage(daemon: Daemon) -> None:
    def stored(name: str, parent: str, raw: int, added: int, **more: Any) -> dict[str, Any]:
        facts = {"kind": "function", "app": "demo", "function": "f", "form": "packed", "fs_bytes": 0}
        return {
            "id": name, "parent": parent, "raw_bytes": raw * MIB, "stored_bytes": added * MIB, "pinned": False,
            "pushed": False, **facts, **more,
        }  # fmt: skip

    snapshots = [
        stored("s-child", "z-1", 50, 2, pinned=True),
        stored("z-1", "", 46, 40, kind="zygote"),
        stored("s-odd", "z-gone", 10, 10, form="loose"),
    ]
    answer = {
        "packs": 7, "pages": 20000, "raw_bytes": 80 * MIB, "stored_bytes": 42 * MIB, "cache_bytes": 0,
        "budget_bytes": 0, "tier": "", "snapshots": snapshots,
    }  # fmt: skip
    daemon.routes["GET /store"] = answer
    shown = run("store", "stats").stdout
    lines = shown.splitlines()
    table = lines[lines.index("") + 2 :]
    assert [line.split()[0] for line in table] == ["z-1", "s-child", "s-odd"]
    assert table[1].startswith("  s-child") and "4.0 %" in table[1] and table[1].endswith("pinned")
    assert re.search(r"^on disk +52\.0 MiB$", shown, re.MULTILINE)
    assert json.loads(run("store", "stats", "--json").stdout) == answer
