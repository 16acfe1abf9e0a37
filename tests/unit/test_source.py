"""Which files are shipped, under which names, and that the archive is the same whenever the files are."""

from __future__ import annotations

import hashlib
import importlib
import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import woodfrog
from woodfrog.errors import SpecError
from woodfrog.sdk import checks, source
from woodfrog.sdk.follow import followed_roots
from woodfrog.sdk.source import Root, import_program, merge_roots, pack, root_of


def make(folder: Path, *files: str) -> None:
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n")


def names(archive: source.Archive) -> list[str]:
    """Of the code's files."""
    with tarfile.open(fileobj=io.BytesIO(archive.data)) as tar:
        return [n.removeprefix("app/") for n in tar.getnames() if n.startswith("app/")]


def test_what_is_left_out(tmp_path: Path) -> None:
    make(
        tmp_path,
        *(
            "app.py",
            "pkg/__init__.py",
            "pkg/data.txt",
            ".env",
            ".git/config",
            "__pycache__/a.pyc",
            "b.pyc",
            "app.py~",
            "#app.py#",
        ),
        *("venv/pyvenv.cfg", "venv/lib/x.py", "node_modules/x.js", "build/lib.py", "dist/x.whl", "x.egg-info/PKG-INFO"),
        *(
            "pkg/build/__init__.py",
            "pkg/build/tool.py",
            "data/large.bin",
            "data/keep.txt",
            "logs/a.log",
            "deep/logs/b.log",
        ),
    )
    (tmp_path / ".woodfrogignore").write_text("# what is not code\ndata/*\n!data/keep.txt\nlogs/\n/deep/**/c.txt\n")
    make(tmp_path, "deep/c.txt", "deep/er/c.txt", "deep/d.txt")
    os.mkfifo(tmp_path / "fifo")
    assert names(pack([Root(tmp_path)])) == [
        *("app.py", "data", "data/keep.txt", "deep", "deep/d.txt", "deep/er", "pkg", "pkg/__init__.py"),
        *("pkg/build", "pkg/build/__init__.py", "pkg/build/tool.py", "pkg/data.txt"),
    ]
    assert names(pack([Root(tmp_path, "pkg")]))[:2] == ["pkg", "pkg/__init__.py"]
    assert names(pack([Root(tmp_path, "app.py")])) == ["app.py"]


def test_the_archive_depends_on_the_files_only(tmp_path: Path) -> None:
    for name, order in (("one", ["a.py", "b/c.py"]), ("two", ["b/c.py", "a.py"])):
        make(tmp_path / name, *order)
    (tmp_path / "two" / "a.py").chmod(0o600)
    os.utime(tmp_path / "two" / "a.py", (1, 1))
    one, two = pack([Root(tmp_path / "one")]), pack([Root(tmp_path / "two")])
    assert one.data == two.data and one.digest == hashlib.sha256(one.data).hexdigest()
    (tmp_path / "two" / "a.py").chmod(0o755)
    assert pack([Root(tmp_path / "two")]).digest != one.digest
    with tarfile.open(fileobj=io.BytesIO(one.data)) as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname) for m in tar} == {(0, 0, 0, "")}
        assert {m.mode for m in tar} == {0o644, 0o755}


def test_links(tmp_path: Path) -> None:
    make(tmp_path / "p", "a.py", "sub/b.py")
    (tmp_path / "p/link.py").symlink_to("a.py")
    (tmp_path / "p/sub/up.py").symlink_to(tmp_path / "p" / "a.py")
    (tmp_path / "p/dir").symlink_to("sub")
    with tarfile.open(fileobj=io.BytesIO(pack([Root(tmp_path / "p")]).data)) as tar:
        assert {m.name: m.linkname for m in tar if m.issym()} == {
            "app/link.py": "a.py",
            "app/sub/up.py": "../a.py",
            "app/dir": "sub",
        }
    (tmp_path / "p/out").symlink_to("/etc/hostname")
    with pytest.raises(
        SpecError, match=r"p/out: the symbolic link leads out of the program's directory, to /etc/hostname"
    ):
        pack([Root(tmp_path / "p")])


def test_limits_name_the_largest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "app.py")
    for name, size in (("weights.bin", 3000), ("more/data.bin", 2000), ("x.bin", 1000), ("y.bin", 10)):
        make(tmp_path, name)
        (tmp_path / name).write_bytes(bytes(size << 10))
    monkeypatch.setattr(source, "MAX_BYTES", 1 << 20)
    with pytest.raises(SpecError) as caught:
        pack([Root(tmp_path)])
    assert "largest: weights.bin (2.9 MiB), more (2.0 MiB), x.bin (1.0 MiB); name what is not code in" in str(
        caught.value
    )
    assert str(tmp_path / ".woodfrogignore") in str(caught.value)
    (tmp_path / ".woodfrogignore").write_text("*.bin\n")
    assert names(pack([Root(tmp_path)])) == ["app.py", "more"]
    monkeypatch.setattr(source, "MAX_FILES", 0)
    with pytest.raises(SpecError, match="holds 1 files"):
        pack([Root(tmp_path)])


def test_roots(tmp_path: Path) -> None:
    assert root_of("app", str(tmp_path / "app.py")) == Root(tmp_path)
    assert root_of("a.b.c", str(tmp_path / "a/b/c.py")) == Root(tmp_path, "a")
    assert root_of("a.b", str(tmp_path / "a/b/__init__.py")) == Root(tmp_path, "a")
    assert root_of("a", str(tmp_path / "a/__init__.py")) == Root(tmp_path, "a")
    for shared in ("/", "/tmp", "/root", "/home/someone", "/usr/lib/python3/dist-packages", str(Path.home())):
        assert root_of("app", f"{shared}/app.py").only == "app.py", shared
    package, whole, other = Root(tmp_path, "pkg"), Root(tmp_path), Root(tmp_path / "x", "pkg")
    assert merge_roots([package, whole, other]) == {package: whole, whole: whole, other: other}


def test_import_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    make(
        tmp_path, "wf_prog.py", "wf_pkg/__init__.py", "wf_pkg/sub/__init__.py", "wf_pkg/sub/mod.py", "a.b.py", "json.py"
    )
    (tmp_path / "wf_bad.py").write_text("x = 1\ndef f(:\n")
    (tmp_path / "wf_needs.py").write_text("import nothing_of_this_name\n")
    assert import_program(str(tmp_path / "wf_prog.py")).__name__ == "wf_prog"
    assert import_program(str(tmp_path / "wf_pkg/sub/mod.py")).__name__ == "wf_pkg.sub.mod"
    assert import_program("wf_pkg.sub.mod").__file__ == str(tmp_path / "wf_pkg/sub/mod.py")
    for target, words in (
        (str(tmp_path / "none.py"), "no such file"),
        (str(tmp_path / "wf_bad.py"), r"wf_bad.py:2: syntax error: "),
        (str(tmp_path / "a.b.py"), "rename it"),
        (str(tmp_path / "json.py"), "its module name 'json' is taken by"),
        ("wf_pkg.none", "no such module"),
    ):
        with pytest.raises(SpecError, match=words):
            import_program(target)
    with pytest.raises(ModuleNotFoundError, match="nothing_of_this_name"):
        import_program(str(tmp_path / "wf_needs.py"))


def test_main_is_shipped_under_its_own_name(tmp_path: Path) -> None:
    make(tmp_path, "my_script.py", "pkg/__init__.py", "pkg/__main__.py", "pkg/mod.py")
    text = "from woodfrog.sdk import source; print(source.main_name())"
    for name in ("my_script.py", "pkg/__main__.py", "pkg/mod.py"):
        (tmp_path / name).write_text(text)

    def run(*args: str) -> str:
        return subprocess.run([sys.executable, *args], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    assert run("my_script.py").strip() == "my_script"
    assert run("-m", "pkg.mod").strip() == "pkg.mod"
    assert run("-m", "pkg").strip() == "pkg.__main__"
    assert run("-c", text).strip() == "None"


def test_runtime_is_the_environment_without_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    base = source.runtime([], {"a": "1"})
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), *sys.path, str(elsewhere), "/nowhere"])
    found = source.runtime([Root(tmp_path)], {"a": "1"})
    assert found.sys_path == (*base.sys_path, str(elsewhere))
    assert found.executable == source._by_one_name(sys.executable) and found.version.startswith("3.")
    assert any(p.endswith("site-packages") for p in found.sys_path)
    assert found.packages_digest == base.packages_digest and len(found.packages_digest) == 64
    assert source.runtime([], {"a": "2"}).packages_digest != base.packages_digest
    script = tmp_path / "prints.py"
    script.write_text("from woodfrog.sdk import source; print(source.runtime([], {}).sys_path)")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd="/", check=True)
    assert str(tmp_path) not in done.stdout.replace(str(elsewhere), "")


@given(st.text("ab*?[]/!.", min_size=1, max_size=8))
def test_any_ignore_line_is_harmless(line: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), "a.py", "b/a.py")
        (Path(folder) / ".woodfrogignore").write_text(line + "\n")
        assert set(names(pack([Root(Path(folder))]))) <= {"a.py", "b", "b/a.py"}


def test_the_examples_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    from woodfrog.sdk.deploy import build

    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = Path(__file__).parents[2] / "examples"
    for name in ("basic", "uniqueness"):
        sys.modules.pop(name, None)
        module = import_program(str(folder / f"{name}.py"))
        bundle = build("x", list(module.app._handles.values()), module.app._program)
        assert len(bundle.code) == 1
        assert {f.source.module for f in bundle.spec.functions} == {name}
        assert f"{name}.py" in names(source.Archive(next(iter(bundle.code.values())), "", 0))
        importlib.invalidate_caches()


def test_installed_packages_are_those_of_their_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import distributions

    expected: dict[str, str] = {}
    for d in distributions():
        if d.metadata["Name"]:
            expected.setdefault(source.normalise(d.metadata["Name"]), d.version)
    assert source.installed_packages() == expected and len(expected) > 20
    for folder, text in (
        ("odd-1.dist-info", "Metadata-Version: 2.1\r\nName: Odd_Name\r\nVersion:1.0+cpu \r\n\r\nName: no\r\n"),
        ("none-1.dist-info", "Metadata-Version: 2.1\n\nName: not-this\nVersion: 9\n"),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "METADATA").write_bytes(text.encode())
    (tmp_path / "old.egg-info").mkdir()
    (tmp_path / "old.egg-info" / "PKG-INFO").write_text("Name: old\nVersion: 3\n")
    (tmp_path / "older.egg-info").write_text("Metadata-Version: 1.0\nName: older\nVersion: 2\nDescription: x\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert source.installed_packages() == {"odd-name": "1.0+cpu", "old": "3", "older": "2"}


def test_modules_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """repo/deploy/app.py, started from repo/, with its library beside `deploy`."""
    from woodfrog.sdk.deploy import build

    monkeypatch.setattr(sys, "path", list(sys.path))
    repo = tmp_path / "repo"
    make(repo, "wf_lib/__init__.py", "wf_lib/sub/part.py", "wf_lib/data.txt", "wf_lib/.env", "wf_never/__init__.py")
    make(repo, "wf_plain.py", "deploy/wf_beside.py", "elsewhere/wf_far.py", "big/data.bin", "wf_beside.py")
    (repo / "deploy" / "wf_app.py").write_text(
        "import woodfrog, wf_beside, wf_lib.sub.part\n"
        "app = woodfrog.App('a')\n"
        "image = woodfrog.Image.debian_slim()\n"
        "@app.function()\ndef f(): ...\n"
        "@app.function(image=image.add_local_python_source('wf_plain', 'wf_lib', 'json', 'numpy'))\ndef g(): ...\n"
        "@app.function(image=image.add_local_python_source('wf_far'), include_source=False)\ndef h(): ...\n"
        "@app.function(image=image.add_local_python_source('wf_far'), serialized=True)\ndef s(): ...\n"
    )
    monkeypatch.chdir(repo)
    monkeypatch.syspath_prepend(str(repo / "elsewhere"))
    module = import_program("deploy/wf_app.py")
    assert module.wf_beside.__file__ == str(repo / "deploy" / "wf_beside.py")
    bundle = build("a", list(module.app._handles.values()), module.app._program)
    sent = {f.tag: names(source.Archive(bundle.code[f.source.code_digest or ""], "", 0)) for f in bundle.spec.functions}
    library = ["wf_lib", "wf_lib/__init__.py", "wf_lib/data.txt", "wf_lib/sub", "wf_lib/sub/part.py"]
    assert sent["f"] == ["wf_app.py", "wf_beside.py", *library]
    assert sent["g"] == [*sent["f"], "wf_plain.py"]
    assert sent["h"] == sent["s"] == ["wf_far.py"]
    (repo / ".woodfrogignore").write_text("wf_lib/\n")
    assert source.imported_roots() == []
    # What was sent from there only in part stays on the import path.
    assert str(repo / "elsewhere") in bundle.spec.runtime.sys_path and str(repo) not in bundle.spec.runtime.sys_path


def test_a_named_module_that_is_nowhere(tmp_path: Path) -> None:
    import woodfrog
    from woodfrog.sdk.deploy import build

    app = woodfrog.App("a")
    image = woodfrog.Image.debian_slim().add_local_python_source("json", "wf_nowhere.part")

    @app.function(image=image, serialized=True)
    def f() -> None: ...

    with pytest.raises(
        SpecError, match=r"the image of f: add_local_python_source\('wf_nowhere.part'\).*no module"
    ) as e:
        build("a", [f])
    assert e.value.code == "no-such-module"


def follow(main: Path, name: str, shipped: Root, visible: Sequence[str] = ()) -> list[str]:
    return [str(r.directory / (r.only or "")) for r in followed_roots([(name, main)], [shipped], visible)]


def test_imports_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies beside the package, on PYTHONPATH or in an editable install goes with the program, imported or not."""
    proj, lib = tmp_path / "proj", tmp_path / "lib"
    make(proj, "wf_own/__init__.py", "wf_common.py", "wf_later.py", "wf_never.py", "wf_doc.py", "wf_space/part.py")
    make(lib, "wf_far/__init__.py", "wf_far/data.txt", "wf_deep.py", "wf_deeper.py", "json.py")
    (proj / "wf_own/prog.py").write_text(
        '"""For example:\n    import wf_doc\n"""\nimport json, woodfrog, pytest\nfrom . import part as x\n'
        "from wf_space.part import (\n    zero,  # (all\n    one,\n)\ndef f():\n    if x: import os, wf_later\n"
    )
    (proj / "wf_own/part.py").write_text("from .sub.other import thing\n")
    make(proj, "wf_own/sub/__init__.py")
    (proj / "wf_own/sub/other.py").write_text(
        "from ..part import x\nimport wf_common; import wf_far.missing, nowhere\n"
    )
    (lib / "wf_far/__init__.py").write_text("from wf_deep import *\n")
    (lib / "wf_deep.py").write_text("# import wf_deeper\nno Python\nimport wf_deeper\n")
    for folder in (lib, proj):
        monkeypatch.syspath_prepend(str(folder))
    found = follow(proj / "wf_own/prog.py", "wf_own.prog", Root(proj, "wf_own"))
    assert found == [
        *(str(lib / n) for n in ("wf_deep.py", "wf_far")),
        *(str(proj / n) for n in ("wf_common.py", "wf_later.py", "wf_space")),
    ]
    assert not {"wf_common", "wf_far", "wf_later"} & sys.modules.keys()
    # What is shipped whole needs nothing beside it; what was found by a path of the program's own is there already.
    monkeypatch.syspath_prepend(str(proj / "wf_space"))
    (proj / "wf_main.py").write_text("import wf_common, part, wf_own.prog\n")
    assert follow(proj / "wf_main.py", "wf_main", Root(proj)) == [str(lib / n) for n in ("wf_deep.py", "wf_far")]


def test_what_cannot_be_sent_stays_where_a_container_sees_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path, "wf_huge/__init__.py", "wf_huge/a.py", "prog/main.py")
    (tmp_path / "prog/main.py").write_text("import wf_huge.a\n")
    (tmp_path / "wf_huge/out").symlink_to("/etc/hostname")
    monkeypatch.syspath_prepend(str(tmp_path))
    main = tmp_path / "prog/main.py"
    for visible, word in (((str(tmp_path),), "a change of it makes no new snapshot"), ((), "a container has none")):
        monkeypatch.setattr(checks, "_noted", set())
        assert follow(main, "main", Root(main.parent), visible) == []
        said = capsys.readouterr().err
        assert f"{tmp_path}/wf_huge, imported by" in said and f"is not sent with the code: {word}" in said
        assert said.count("\n") == 1
    (tmp_path / ".woodfrogignore").write_text("wf_huge/\n")
    assert follow(main, "main", Root(main.parent)) == [] and not capsys.readouterr().err
    (tmp_path / ".woodfrogignore").unlink()
    importlib.import_module("wf_huge")
    with pytest.raises(SpecError, match="leads out of"):
        follow(main, "main", Root(main.parent))


@pytest.mark.parametrize(
    ("path", "plain"),
    [
        ("/usr/bin/python3", "/usr/bin/python3"),
        ("{tmp}/a/../venv/bin/python", "{tmp}/real/bin/python"),
        ("{tmp}/a/..", "{tmp}"),
    ],
)
def test_an_interpreter_that_was_named_by_a_relative_path(tmp_path: Path, path: str, plain: str) -> None:
    (tmp_path / "real/bin").mkdir(parents=True)
    (tmp_path / "a").mkdir()
    (tmp_path / "venv").symlink_to("real")
    (tmp_path / "real/bin/python").symlink_to("/usr/bin/python3")
    assert source._without_dots(path.format(tmp=tmp_path)) == plain.format(tmp=tmp_path)


def test_the_programs_directory_comes_first(tmp_path: Path) -> None:
    make(tmp_path, "a/lib/__init__.py", "b/lib/__init__.py", "b/lib/other.py", "c/lib/third.py")
    assert names(pack([Root(tmp_path / "a"), Root(tmp_path / "b", "lib")])) == ["lib", "lib/__init__.py"]
    both = pack([Root(tmp_path / "b", "lib"), Root(tmp_path / "c", "lib")])  # two parts of a namespace
    assert names(both) == ["lib", "lib/__init__.py", "lib/other.py", "lib/third.py"]


def test_files_that_an_image_adds(tmp_path: Path) -> None:
    make(tmp_path / "p", "app.py")
    make(tmp_path / "d", "a.txt", ".hidden", "b/c.log", "b/d.txt", "x[1].txt")
    (tmp_path / "d/link").symlink_to("b/d.txt")
    image = (
        woodfrog.Image.debian_slim()
        .add_local_file(tmp_path / "p/app.py", "/root/in/")
        .add_local_file(tmp_path / "p/app.py", "/root/as.py")
        .add_local_dir(tmp_path / "d", "/root/d", ignore=["*.log"])
        .add_local_dir(tmp_path / "d", "/root/e", ignore=lambda path: path.name in ("a.txt", "x[1].txt"))
    )
    archive = pack([Root(tmp_path / "p")], image.spec.files)
    with tarfile.open(fileobj=io.BytesIO(archive.data)) as tar:
        found = {m.name: m.linkname for m in tar if not m.isdir()}
    assert found == {
        **dict.fromkeys(("app/app.py", "root/as.py", "root/in/app.py"), ""),
        **dict.fromkeys((f"root/d/{n}" for n in ("a.txt", ".hidden", "b/d.txt", "x[1].txt")), ""),
        **dict.fromkeys((f"root/e/{n}" for n in (".hidden", "b/c.log", "b/d.txt")), ""),
        "root/d/link": "b/d.txt",
        "root/e/link": "b/d.txt",
    }
    assert pack([Root(tmp_path / "p")], image.spec.files).digest == archive.digest


def test_files_that_an_image_cannot_add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = woodfrog.Image.debian_slim()
    for remote in ("relative", "/", "//x"):
        with pytest.raises(SpecError, match=r"is not an absolute path below / \(.*test_source.py"):
            image.add_local_dir(tmp_path, remote)
    with pytest.raises(SpecError, match="nowhere: no such file or directory"):
        pack([], image.add_local_file(tmp_path / "nowhere", "/root/x").spec.files)
    (tmp_path / "large").write_bytes(bytes(3 << 20))
    monkeypatch.setattr(source, "MAX_BYTES", 2 << 20)
    with pytest.raises(
        SpecError, match=r"largest: large \(3.0 MiB\); leave some out with ignore=, or keep them in a Volume"
    ):
        pack([], image.add_local_dir(tmp_path, "/root/x").spec.files)


def test_one_interpreter_has_one_name(tmp_path: Path) -> None:
    for name in ("python3.11", "other"):
        (tmp_path / name).touch()
    (tmp_path / "python3").symlink_to("python3.11")
    (tmp_path / "python").symlink_to("python3")
    assert {source._by_one_name(str(tmp_path / n)) for n in ("python", "python3", "python3.11")} == {
        str(tmp_path / "python3")
    }
    for kept in ("other", "gone"):
        assert source._by_one_name(str(tmp_path / kept)) == str(tmp_path / kept)
