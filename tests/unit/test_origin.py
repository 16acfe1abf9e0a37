"""Why a start that a function's last snapshot does not fit is a cold one."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from woodfrog.snapshot.origin import Origin, explain, origin_of, read, write
from woodfrog.spec import FunctionSpec, ImageSpec, MethodSpec, Resources, RuntimeSpec, SecretSpec, SourceSpec

SPEC = FunctionSpec("f", "function", SourceSpec("module", "m", "f", code_digest="1"), (MethodSpec("f"),))
RUNTIME = RuntimeSpec(sys.executable, sys.prefix, sys.base_prefix, "3.11", ("/lib",), "p")


def of_files(**files: str) -> Origin:
    return Origin({"source.code_digest": str(files)}, {f"/{k}": v for k, v in files.items()})


def app(*names: str, digest: str = "1") -> Origin:
    return of_files(**{f"app/{name}": digest for name in names})


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        (app("p.py", "r.json"), app("p.py", "r.json"), ""),
        (
            app("r.json"),
            app("r.json", digest="2"),
            "r.json changed since its last snapshot (name it in .woodfrogignore if the function does not need it)",
        ),
        (app("p.py"), app("p.py", digest="2"), "p.py changed since its last snapshot"),
        (app("p.py", "old"), app("p.py"), "old is gone since its last snapshot (name it in .woodfrogignore"),
        (
            app("p.py"),
            app("p.py", "a.png", "b.png"),
            "a.png is new, b.png is new since its last snapshot (name them in",
        ),
        (app(), app(*"edcba"), "a is new, b is new, c is new, 2 more files changed since its last snapshot (name them"),
        (of_files(**{"root/a": "1"}), of_files(**{"root/a": "2"}), "/root/a changed since its last snapshot"),
        (of_files(), of_files(**{"app/d": "dir", "app/d/x": "1"}), "d/x is new since its last snapshot (name it"),
        (of_files(), of_files(**{"app/d": "dir"}), "d is new since its last snapshot (name it"),
        (app("x"), replace(app("x", "y"), files=None), "its files changed since its last snapshot"),
        (of_files(), app("a\nb"), "'a\\nb' is new since its last snapshot (name it"),
    ],
)
def test_files(before: Origin, now: Origin, words: str) -> None:
    said = explain(before, now)
    assert said.startswith(words) and bool(said) == bool(words)
    assert "\n" not in said and ("(" in words or "(" not in said)


@pytest.mark.parametrize(
    ("spec", "runtime", "words"),
    [
        (replace(SPEC, env={"A": "secret-value"}), RUNTIME, "env= changed"),
        (replace(SPEC, image=ImageSpec(env={"A": "1"})), RUNTIME, "its image changed"),
        (
            replace(SPEC, secrets=(SecretSpec("s"),), resources=Resources(gpu=("T4",))),
            RUNTIME,
            "gpu= changed, secrets=",
        ),
        (SPEC, replace(RUNTIME, packages_digest="q"), "the installed packages changed"),
        (
            SPEC,
            replace(RUNTIME, executable="/x", packages_digest="q", version="3.12"),
            "the Python environment changed",
        ),
        (replace(SPEC, timeout=7.0, retries=replace(SPEC.retries, max_retries=2)), RUNTIME, ""),
    ],
)
def test_what_else_counts(spec: FunctionSpec, runtime: RuntimeSpec, words: str) -> None:
    said = explain(origin_of(SPEC, RUNTIME, "", None), origin_of(spec, runtime, "", None))
    assert said.startswith(words) and bool(said) == bool(words) and said.count("changed") <= 2
    assert "secret-value" not in said


def test_it_is_read_from_the_layer_and_kept(tmp_path: Path) -> None:
    code = tmp_path / "layer/app"
    (code / "sub").mkdir(parents=True)
    (code / "p.py").write_text("1")
    (code / "empty").touch()
    (code / "link").symlink_to("nowhere")
    before = origin_of(SPEC, RUNTIME, "", code)
    assert set(before.files or ()) == {"/app", "/app/p.py", "/app/empty", "/app/link", "/app/sub"}
    write(before, tmp_path)
    assert read(tmp_path) == before and explain(before, origin_of(SPEC, RUNTIME, "", code)) == ""
    (code / "p.py").chmod(0o755)
    (code / "link").unlink()
    (code / "link").symlink_to("p.py")
    now = origin_of(replace(SPEC, source=replace(SPEC.source, code_digest="2")), RUNTIME, "", code)
    assert explain(before, now) == "link changed, p.py changed since its last snapshot"


def test_what_cannot_be_kept_or_read_is_not_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(tmp_path) is None
    for text in ("", "[1]", '{"other": 1}', '{"parts": [1]}', '{"parts": {}, "files": {"a": 1}}', "[" * 100_000):
        (tmp_path / "origin").write_text(text)
        assert read(tmp_path) is None
    monkeypatch.setattr("woodfrog.snapshot.origin.MOST_BYTES", 100)
    write(app(*map(str, range(100))), tmp_path)
    kept = read(tmp_path)
    assert kept is not None and kept.files is None
    write(kept, tmp_path / "not there")
    assert origin_of(SPEC, RUNTIME, "", tmp_path / "gone" / "app").files is None
