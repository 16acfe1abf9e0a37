"""CRIU's own statistics (`stats-dump`, `stats-restore`): one small protobuf message behind two magic numbers."""

from __future__ import annotations

import struct
from collections.abc import Iterator

__all__ = ["encode_bytes", "encode_int", "fields_of", "messages_of", "parse_stats"]

MAGIC = 0x57093306
DUMP = {
    1: "freezing_time", 2: "frozen_time", 3: "memdump_time", 4: "memwrite_time", 5: "pages_scanned",
    6: "pages_skipped_parent", 7: "pages_written", 8: "irmap_resolve", 9: "pages_lazy",
}  # fmt: skip
RESTORE = {1: "pages_compared", 2: "pages_skipped_cow", 3: "forking_time", 4: "restore_time", 5: "pages_restored"}


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def encode_int(number: int, value: int) -> bytes:
    """One field of a protobuf message with an integer in it."""
    return _varints(number << 3, value)


def encode_bytes(number: int, value: bytes) -> bytes:
    """The same with bytes, or a message."""
    return _varints(number << 3 | 2, len(value)) + value


def _varints(*values: int) -> bytes:
    out = bytearray()
    for left in values:
        while left > 0x7F:
            out.append(left & 0x7F | 0x80)
            left >>= 7
        out.append(left)
    return bytes(out)


def fields_of(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of one protobuf message: number, and an integer or the bytes of what has a length."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        match key & 7:
            case 0:
                value, at = _varint(data, at)
                yield key >> 3, value
            case 2:
                length, at = _varint(data, at)
                yield key >> 3, data[at : at + length]
                at += length
            case 1:
                at += 8
            case 5:
                at += 4
            case kind:
                raise ValueError(f"wire type {kind}")


def messages_of(image: bytes) -> Iterator[bytes]:
    """The messages of one of CRIU's images: magic numbers, then each with its length before it.

    Raises:
        ValueError: the image is cut short.
    """
    at = 8
    while at < len(image):
        end = at + 4 + int.from_bytes(image[at : at + 4], "little")
        if end > len(image):
            raise ValueError("an image that is cut short")
        yield image[at + 4 : end]
        at = end


def parse_stats(data: bytes) -> dict[str, int]:
    """Counts, and times in microseconds, by CRIU's names; empty when the data is not a statistics image.

    Example:
        `parse_stats(Path("stats-restore").read_bytes())["restore_time"]`
    """
    try:
        _, magic, length = struct.unpack_from("<III", data)
        if magic != MAGIC or len(data) < 12 + length:
            return {}
        found: dict[str, int] = {}
        for number, message in fields_of(data[12 : 12 + length]):
            names = {1: DUMP, 2: RESTORE}.get(number)
            if names is not None and isinstance(message, bytes):
                found |= {names[n]: v for n, v in fields_of(message) if n in names and isinstance(v, int)}
        return found
    except (IndexError, ValueError, struct.error):
        return {}
