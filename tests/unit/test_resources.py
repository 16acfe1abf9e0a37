"""Specs against this machine: what a client may name."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pytest

from woodfrog.daemon.resources import Resources
from woodfrog.errors import NotFoundError, SandboxError, SpecError
from woodfrog.linux.skeleton import host_above
from woodfrog.settings import Settings
from woodfrog.spec import (
    AppSpec,
    FunctionSpec,
    ImageSpec,
    LocalFiles,
    MethodSpec,
    RuntimeSpec,
    SecretSpec,
    SourceSpec,
    VolumeMount,
)
from woodfrog.store.content import ContentStore


def resources(home: Path, **settings: str) -> Resources:
    return Resources(Settings(home=home, worker_uid=home.stat().st_uid, **settings), ContentStore(home))


def app(*, sys_path: tuple[str, ...] = (), **function: object) -> AppSpec:
    runtime = RuntimeSpec(sys.executable, sys.prefix, sys.base_prefix, "3", sys_path)
    source = SourceSpec("module", "m", "f")
    spec = FunctionSpec("f", "function", source, (MethodSpec("f"),), **function)  # type: ignore[arg-type]
    return AppSpec("demo", runtime, (spec,))


def test_clients_that_are_not_root_name_no_closed_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = tmp_path / "closed"
    (closed / "lib").mkdir(parents=True)
    closed.chmod(0o700)
    resources(tmp_path).check(app(sys_path=(str(closed / "lib"),)))
    for opened in ({"socket_group": "frogs"}, {"listen": "127.0.0.1:1"}):
        strict = resources(tmp_path, **opened)
        strict.check(app())
        with pytest.raises(SpecError, match="not open to all users"):
            strict.check(app(sys_path=(str(closed / "lib"),)))
    # The daemon's own code, in a clone below /root.
    monkeypatch.setattr(
        "woodfrog.daemon.resources.__file__", str(closed / "lib" / "woodfrog" / "daemon" / "resources.py")
    )
    strict.check(app(sys_path=(str(closed / "lib"),)))


def test_where_a_volumes_mount_point_has_to_be_added_to_the_hosts_directory(tmp_path: Path) -> None:
    within = {"/opt/none/such": "/opt", "/usr/share/none": "/usr/share", "/usr/share": "", "/none/x": ""}
    own = dict.fromkeys(("/root/.cache/x", "/mnt/x", f"{tmp_path}/x"), "")
    assert {path: host_above(path) for path in (*within, *own)} == {**within, **own}
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        (link := Path(folder) / "link").symlink_to("/usr")
        with pytest.raises(SandboxError, match=f"below {link}, which is a symlink"):
            host_above(f"{link}/x")
        with pytest.raises(SpecError, match=f"below {link}, which is a symlink"):
            resources(tmp_path).check(app(volumes=(VolumeMount("v", f"{link}/x"),)))


@pytest.mark.parametrize("path", ["/usr/x", "/etc/x", "/proc/x", "/bin/x", "relative", "/run/woodfrog/x"])
def test_files_of_an_image_that_nobody_would_see_are_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(SpecError, match="where functions see the machine's own"):
        resources(tmp_path).check(app(image=ImageSpec(files=(LocalFiles("x", path),))))


def test_files_of_an_image_elsewhere(tmp_path: Path) -> None:
    files = tuple(LocalFiles("x", path) for path in ("/root/x", "/tmp/x", "/mnt/x", "/app/x", "/never-made/x"))
    resources(tmp_path).check(app(image=ImageSpec(files=files)))


@pytest.mark.parametrize("path", ["/", "relative", "/proc/x", "/app", "/usr/lib/x", "/data/../etc"])
def test_volumes_do_not_cover_the_systems_places(tmp_path: Path, path: str) -> None:
    with pytest.raises(SpecError, match="volume path"):
        resources(tmp_path).check(app(volumes=(VolumeMount("v", path),)))


def test_names_that_must_exist(tmp_path: Path) -> None:
    held = resources(tmp_path)
    with pytest.raises(
        NotFoundError, match=r"^demo.f: no secret 'token': `woodfrog secret create token KEY=VALUE \.\.\.`"
    ):
        held.check(app(secrets=(SecretSpec(name="token"),)))
    with pytest.raises(NotFoundError, match=r"`woodfrog secret create token A=VALUE B=VALUE` makes it"):
        held.check(app(secrets=(SecretSpec(name="token", required_keys=("A", "B", "no key")),)))
    held.put_secret("token", {"A": "1"})
    held.check(app(secrets=(SecretSpec(name="token", required_keys=("A",)),)))
    with pytest.raises(
        SpecError, match=r"^demo.f: secret 'token' lacks the required key 'B': `woodfrog secret create token`"
    ):
        held.check(app(secrets=(SecretSpec(name="token", required_keys=("B",)),)))
    with pytest.raises(NotFoundError, match=r"^demo.f: no volume 'v': `woodfrog volume create v` makes it, or Volume"):
        held.check(app(volumes=(VolumeMount("v", "/data", create=False),)))
    assert (tmp_path / "secrets" / "token.json").stat().st_mode & 0o077 == 0


def test_volumes_are_closed_to_other_users_of_the_machine(tmp_path: Path) -> None:
    (tmp_path / "volumes").mkdir(mode=0o755)  # as an earlier version may have left it
    path = resources(tmp_path).volume_path(VolumeMount("v", "/data"))
    assert path.parent.stat().st_mode & 0o777 == 0o700
