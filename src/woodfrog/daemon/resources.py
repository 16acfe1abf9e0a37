"""Secrets and volumes, which functions name and the daemon keeps, and checks of a spec against this machine."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from woodfrog.daemon.names import check_name
from woodfrog.daemon.volumes import VolumeFiles, path_parts
from woodfrog.errors import NotFoundError, SandboxError, SpecError
from woodfrog.linux import rootplan
from woodfrog.linux.skeleton import host_above, is_the_systems
from woodfrog.settings import Settings
from woodfrog.spec import AppSpec, FunctionSpec, SecretSpec, VolumeMount
from woodfrog.store.content import ContentStore
from woodfrog.store.files import fsync_dir, remove_tree, store_error, write_atomic

__all__ = ["Resources"]

_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
_EPHEMERAL = re.compile(r"ephemeral-[0-9a-f]{12}")
_DIGEST = re.compile(r"\b[0-9a-f]{64}\b")
_UNUSED_S = 86400.0
_SUB_PATHS = 32
"""So many mounts a sandbox takes at once."""
_TAKEN_MOUNTS = ("/app", "/proc", "/sys", "/dev", "/run", "/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc")


def _check_open(name: str) -> None:
    """A client that is not root may name directories anybody can enter, or those of the daemon's own Python.

    Raises:
        SpecError: it would get to see, inside its sandbox, what is closed to it outside.
    """
    path = Path(os.path.realpath(name))
    # The last is where woodfrog's own code is, in a clone.
    owns = {Path(own).resolve() for own in (sys.prefix, sys.base_prefix, Path(__file__).parents[2])}
    if owns & {path, *path.parents}:
        return
    for part in (path, *path.parents):
        if part.is_dir() and not part.stat().st_mode & 0o001:
            raise SpecError(
                f"{name} cannot be part of the Python environment: {part} is not open to all users", code="runtime"
            )


@contextmanager
def _of(where: str) -> Iterator[None]:
    """Says whose it is that is missing."""
    try:
        yield
    except (NotFoundError, SpecError) as e:
        e.message = f"{where}: {e.message}"
        raise


class Resources:
    """Secrets in `<home>/secrets` (mode 0600), volumes in `<home>/volumes` (owned by the worker uid)."""

    def __init__(self, settings: Settings, content: ContentStore) -> None:
        self._uid = settings.worker_uid
        self._others = bool(settings.socket_group or settings.listen)
        self._content = content
        """Ephemeral volumes that an app has had."""
        self._secrets = settings.home / "secrets"
        self._volumes = settings.home / "volumes"
        self._secrets.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._volumes.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._volumes.chmod(0o700)  # their files are as open as functions make them; earlier versions left it at 0711
        for leftover in self._volumes.glob(".gone-*"):
            remove_tree(leftover)

    # Secrets

    def put_secret(self, name: str, values: dict[str, str]) -> None:
        write_atomic(self._secrets / f"{check_name('secret', name)}.json", json.dumps(values).encode())

    def secret_names(self) -> list[str]:
        return sorted(p.stem for p in self._secrets.glob("*.json"))

    def delete_secret(self, name: str) -> None:
        """Remove a secret.

        Raises:
            NotFoundError: there is none of that name.
        """
        path = self._secrets / f"{check_name('secret', name)}.json"
        try:
            path.unlink()
            fsync_dir(self._secrets)
        except FileNotFoundError:
            raise NotFoundError(f"no secret {name!r}; `woodfrog secret list` shows them") from None
        except OSError as e:
            raise store_error(f"cannot remove secret {name!r}", path, e) from e

    def _secret(self, spec: SecretSpec) -> dict[str, str]:
        if spec.name is None:
            return dict(spec.values)
        path = self._secrets / f"{check_name('secret', spec.name)}.json"
        if not path.is_file():
            keys = " ".join(f"{k}=VALUE" for k in spec.required_keys if _KEY.fullmatch(k)) or "KEY=VALUE ..."
            raise NotFoundError(f"no secret {spec.name!r}: `woodfrog secret create {spec.name} {keys}` makes it")
        values: dict[str, str] = {**json.loads(path.read_text()), **spec.values}
        missing = [k for k in spec.required_keys if k not in values]
        if missing:
            raise SpecError(
                f"secret {spec.name!r} lacks the required key {missing[0]!r}: "
                f"`woodfrog secret create {spec.name}` with all its keys makes it anew",
                code="secret-key",
            )
        return values

    def environment(self, function: FunctionSpec) -> dict[str, str]:
        """The user's variables as they are now: image, then secrets, then the function's own.

        A secret that was removed since the deploy is left out: the function meets a missing variable, not a dead start.
        """
        env = dict(function.image.env)
        for secret in function.secrets:
            try:
                env.update(self._secret(secret))
            except NotFoundError:
                continue
        env.update(function.env)
        return env

    # Volumes

    def volume_path(self, mount: VolumeMount) -> Path:
        """The directory behind a volume, made on first use.

        Raises:
            NotFoundError: it does not exist and may not be created.
        """
        path = self._volumes / check_name("volume", mount.name)
        if not path.is_dir():
            if not (mount.create or mount.ephemeral):
                raise NotFoundError(
                    f"no volume {mount.name!r}: `woodfrog volume create {mount.name}` makes it, or "
                    f"Volume.from_name({mount.name!r}, create_if_missing=True)"
                )
            try:
                path.mkdir(mode=0o755, exist_ok=True)
                os.chown(path, self._uid, self._uid)
            except OSError as e:
                raise store_error(f"cannot make volume {mount.name!r}", path, e) from e
        return path

    def mounts(self, function: FunctionSpec) -> tuple[rootplan.VolumeMount, ...]:
        """What a sandbox of this function gets mounted.

        Raises:
            NotFoundError: a volume does not exist and may not be created.
            SpecError: a link or a file is on the way to a directory in one.
        """
        found = []
        for volume in function.volumes:
            source, parts = self.volume_path(volume), path_parts(volume.sub_path)
            if parts:
                VolumeFiles(self._volumes, self._uid).make(volume.name, parts)
            above = host_above(os.path.normpath(volume.path))
            found.append(rootplan.VolumeMount(source, volume.path, volume.read_only, above, parts))
        return tuple(found)

    def set_volumes_aside(self, specs: Callable[[], Iterable[str]]) -> list[Path]:
        """Take away the ephemeral volumes that none of these specs (JSON) has named for a day.

        Their clients remove them at the end of their blocks, in which app may follow app: this is for a client that
        was killed.

        Returns:
            What is still to be removed; nobody finds it any more.
        """
        made = {name for name in os.listdir(self._volumes) if _EPHEMERAL.fullmatch(name)}
        named = {name for spec in specs() for name in _EPHEMERAL.findall(spec)} if made else set()
        now, aside = time.time(), []
        for name in made:
            path = self._volumes / name
            found = path.stat()
            if name in named:
                os.utime(path, (now, found.st_mtime))  # so that the next daemon knows, too
            elif now - found.st_atime >= _UNUSED_S:
                aside.append(path.rename(self._volumes / f".gone-{name}"))
        return aside

    def set_content_aside(self, specs: Iterable[str], before: float) -> list[Path]:
        """Take away code and pickled objects that none of these specs (JSON) names, and nobody asked for since `before`
        (Unix time).

        Returns:
            What is still to be removed; nobody finds it any more.
        """
        return self._content.set_aside({digest for spec in specs for digest in _DIGEST.findall(spec)}, before)

    # Specs

    def check(self, spec: AppSpec) -> None:
        """Everything a deploy can know beforehand.

        Raises:
            SpecError: with the function and what is wrong.
        """
        check_name("app", spec.name)
        seen: set[str] = set()
        runtime = spec.runtime
        for name in (runtime.executable, runtime.prefix, runtime.base_prefix):
            if not os.path.exists(name):
                raise SpecError(f"the Python environment {name} does not exist on the daemon's machine", code="runtime")
        if self._others:
            for name in (runtime.executable, runtime.prefix, runtime.base_prefix, *runtime.sys_path):
                _check_open(name)
        for function in spec.functions:
            where = f"{spec.name}.{function.tag}"
            check_name("function", function.tag)
            if function.tag in seen:
                raise SpecError(f"{where}: two functions of this name", code="duplicate-function")
            seen.add(function.tag)
            if not function.methods:
                raise SpecError(f"{where}: has no methods", code="bad-spec")
            source = function.source
            if source.code_digest and not self._content.has_code(source.code_digest):
                raise SpecError(f"{where}: its source was not sent; deploy again", code="missing-code")
            if source.blob_digest and not self._content.has_blob(source.blob_digest):
                raise SpecError(f"{where}: its pickled object was not sent; deploy again", code="missing-blob")
            for name in (f.remote for f in function.image.files):
                if not name.startswith("/") or is_the_systems(name):
                    raise SpecError(
                        f"{where}: the image adds files at {name}, where functions see the machine's own: add them "
                        "elsewhere, such as at /root/...",
                        code="bad-path",
                    )
            with _of(where):
                for secret in function.secrets:
                    self._secret(secret)
            if sum(bool(v.sub_path) for v in function.volumes) > _SUB_PATHS:
                raise SpecError(f"{where}: at most {_SUB_PATHS} volumes with sub_path", code="bad-volume")
            for mount in function.volumes:
                path = os.path.normpath(mount.path)
                if not os.path.isabs(mount.path) or path == "/":
                    raise SpecError(
                        f"{where}: volume path {mount.path!r} must be absolute and not /", code="bad-volume"
                    )
                if any(path == taken or path.startswith(taken + "/") for taken in _TAKEN_MOUNTS):
                    raise SpecError(
                        f"{where}: volume path {mount.path!r} is the system's; mount it elsewhere", code="bad-volume"
                    )
                try:
                    host_above(path)
                except SandboxError as e:
                    raise SpecError(f"{where}: volume path {e.message}", code="bad-volume") from None
                with _of(where):
                    self.volume_path(mount)
                    path_parts(mount.sub_path)
