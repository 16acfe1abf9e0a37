"""Volumes: directories that outlive containers and are shared between them."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from woodfrog.sdk import checks
from woodfrog.sdk.dual import Dual, at_once
from woodfrog.spec import VolumeMount

__all__ = ["Volume", "mounts"]

_TAKEN = ("/app", "/bin", "/dev", "/etc", "/lib", "/lib64", "/proc", "/run", "/sbin", "/sys", "/usr", "/var")


@dataclass(frozen=True)
class Volume:
    """A directory kept by the daemon. Made by `from_name` or `ephemeral`.

    What one container writes is visible to the others at once: all of them see the same directory.

    Example:
        >>> import woodfrog
        >>> models = woodfrog.Volume.from_name("models", create_if_missing=True)
        >>> app = woodfrog.App("example", volumes={"/models": models})
    """

    name: str
    read_only: bool = False
    create: bool = False
    is_ephemeral: bool = False

    @classmethod
    def from_name(
        cls,
        name: str,
        *,
        create_if_missing: bool = False,
        environment_name: str | None = None,
        version: Any = None,
        create_options: Any = None,
        client: Any = None,
    ) -> Volume:
        """The volume called `name`; without `create_if_missing` it must exist when a container starts.

        Raises:
            SpecError: not a name.
        """
        del environment_name, version, create_options, client
        return cls(checks.name(name, "Volume.from_name"), create=bool(create_if_missing))

    @classmethod
    def ephemeral(cls) -> _Ephemeral:
        """A volume for the time of a `with` or `async with` block, removed with the app that used it."""
        return _Ephemeral(cls(f"ephemeral-{os.urandom(6).hex()}", create=True, is_ephemeral=True))

    def with_mount_options(self, *, read_only: bool = False) -> Volume:
        """The same volume, mounted read-only or not."""
        return replace(self, read_only=bool(read_only))

    @property
    def commit(self) -> Dual[[], None, Awaitable[None]]:
        """`commit()`: does nothing: writes are shared as they happen. Here for programs written for Modal."""
        return at_once(_nothing)

    @property
    def reload(self) -> Dual[[], None, Awaitable[None]]:
        """`reload()`: does nothing: writes are seen as they happen. Here for programs written for Modal."""
        return at_once(_nothing)


def _nothing() -> None: ...


class _Ephemeral:
    """The block of `Volume.ephemeral()`."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume

    def __enter__(self) -> Volume:
        return self._volume

    def __exit__(self, *error: object) -> None: ...

    async def __aenter__(self) -> Volume:
        return self._volume

    async def __aexit__(self, *error: object) -> None: ...


def mounts(value: Any) -> tuple[VolumeMount, ...]:
    """The `volumes=` parameter as mounts in the order of their paths.

    Raises:
        TypeError, ValueError: with the words to put behind the parameter's name.
    """
    if not isinstance(value, Mapping):
        raise TypeError(f"expected a dict of path to Volume, got {type(value).__name__}")
    found: dict[str, VolumeMount] = {}
    for path, volume in value.items():
        if not isinstance(volume, Volume):
            raise TypeError(f"{path}: expected a woodfrog.Volume, got {type(volume).__name__}")
        text = posixpath.normpath(str(path))
        if not text.startswith("/") or text.startswith("//") or text == "/":
            raise ValueError(f"{str(path)!r} is not an absolute path below /")
        if text in _TAKEN or text.startswith(("/proc/", "/sys/", "/dev/", "/run/", "/app/")):
            raise ValueError(f"{text} is taken by the container itself: choose another path")
        if text in found:
            raise ValueError(f"two volumes at {text}")
        found[text] = VolumeMount(
            name=volume.name, path=text, read_only=volume.read_only, create=volume.create, ephemeral=volume.is_ephemeral
        )
    return tuple(found[k] for k in sorted(found))
