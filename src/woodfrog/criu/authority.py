"""What a restore would do with its powers for the processes in images: whose they would be, and what it would open.

CRIU takes a process's credentials from code that it runs inside of that process, in memory that others may write to
who have the process's own; and it opens files by their paths, as root. Both are looked at here, in the images.
"""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from pathlib import Path

from woodfrog.criu.stats import fields_of, messages_of

__all__ = ["Credentials", "credentials", "paths"]

_THREAD = 5
_CREDENTIALS = 10
_IDS = range(1, 9)
_CAPABILITIES = (9, 10, 11, 12, 19)
_GROUPS, _NO_NEW_PRIVS = 14, 18
_UNIX_SOCKET = 16
_NAME, _NAME_DIRECTORY = 11, 14


@dataclass(frozen=True)
class Credentials:
    """Of one thread. `capabilities` are those of any of its sets."""

    ids: frozenset[int]
    capabilities: int
    no_new_privs: bool


def credentials(images: Path) -> dict[str, Credentials]:
    """By the name of each thread's image.

    Raises:
        ValueError, IndexError: an image is not understood.
    """
    found = {}
    for path in sorted(images.glob("core-*.img")):
        for message in messages_of(path.read_bytes()):
            thread = dict(fields_of(message)).get(_THREAD)
            if isinstance(thread, bytes):  # a zombie has none
                value = dict(fields_of(thread)).get(_CREDENTIALS)
                if not isinstance(value, bytes):
                    raise ValueError(f"{path.name}: a thread without credentials")
                found[path.name] = _credentials(value)
    return found


def _credentials(message: bytes) -> Credentials:
    ids, words, no_new_privs = set(), {n: list[int]() for n in _CAPABILITIES}, False
    for number, value in fields_of(message):
        if isinstance(value, bytes):
            raise ValueError("credentials of an unknown form")
        if number in _IDS or number == _GROUPS:
            ids.add(value)
        elif number in words:
            words[number].append(value)
        elif number == _NO_NEW_PRIVS:
            no_new_privs = bool(value)
    capabilities = 0
    for halves in words.values():
        for i, half in enumerate(halves):
            capabilities |= half << 32 * i
    return Credentials(frozenset(ids), capabilities, no_new_privs)


def paths(images: Path) -> frozenset[str]:
    """Of everything that the processes have open or mapped, are in, or have bound a socket to.

    Raises:
        ValueError, IndexError: the image is not understood.
    """
    found: set[str] = set()
    for message in messages_of((images / "files.img").read_bytes()):
        _collect(message, found)
    return frozenset(found)


def _collect(message: bytes, found: set[str]) -> None:
    for number, value in fields_of(message):
        if not isinstance(value, bytes):
            continue
        if number == _UNIX_SOCKET:
            fields = dict(fields_of(value))
            name, folder = fields.get(_NAME), fields.get(_NAME_DIRECTORY)
            if isinstance(name, bytes) and isinstance(folder, bytes) and name[:1] not in (b"", b"/", b"\0"):
                found.add(posixpath.join(_text(folder), _text(name)))
        # A message within never begins so: there is no field of that kind.
        if value.startswith(b"/"):
            found.add(_text(value))
            continue
        try:
            _collect(value, found)
        except (ValueError, IndexError):
            continue  # it was some other text


def _text(path: bytes) -> str:
    return path.rstrip(b"\0").decode(errors="surrogateescape")
