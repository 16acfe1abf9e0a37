"""CRIU's image of sockets: connections to the outside become closed ones, everything else stays as it is."""

from __future__ import annotations

import contextlib
import ipaddress
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from woodfrog.criu.sockets import close_outside, closed_outside
from woodfrog.criu.stats import encode_bytes, encode_int

MAGICS = struct.pack("<II", 0x54564319, 0x56303138)
TCP, UDP = 6, 17


def socket(source: str, target: str, *, state: int = 1, protocol: int = TCP, inode: int = 0x5A, down: int = 0) -> bytes:
    def words(number: int, address: str) -> bytes:
        packed = ipaddress.ip_address(address).packed
        return b"".join(
            encode_int(number, int.from_bytes(packed[i : i + 4], "little")) for i in range(0, len(packed), 4)
        )

    body = b"".join(encode_int(n, v) for n, v in enumerate((7, inode, 2, 1, protocol, state, 4000, 443, 2, 0), 1))
    body += words(11, source) + words(12, target) + encode_bytes(13, b"\x08\0") + encode_bytes(14, b"\x08\1")
    return body + (encode_int(19, down) if down else b"") + encode_bytes(20, b"\x08\1")


def image(*sockets: bytes) -> bytes:
    entries = [
        encode_int(1, 1) + encode_int(2, 9) + encode_bytes(3, b"\x08\x09"),
        *(encode_bytes(4, s) for s in sockets),
    ]
    return MAGICS + b"".join(struct.pack("<I", len(e)) + e for e in entries)


@pytest.mark.parametrize(
    "kept",
    [
        socket("127.0.0.1", "127.0.0.1"),
        socket("::1", "::1"),
        socket("::ffff:127.0.0.1", "::ffff:127.0.0.2"),
        socket("10.231.0.2", "0.0.0.0", state=10),
        socket("0.0.0.0", "0.0.0.0", state=7),
        socket("10.231.0.2", "93.184.216.34", protocol=UDP),
    ],
)
def test_what_is_kept(kept: bytes) -> None:
    assert closed_outside(image(kept)) == (image(kept), ())


@pytest.mark.parametrize("state", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "ends", [("10.231.0.2", "93.184.216.34"), ("10.231.0.2", "10.231.0.2"), ("fd00::2", "fd00::3")]
)
def test_what_is_closed(tmp_path: Path, ends: tuple[str, str], state: int) -> None:
    inside = socket("127.0.0.1", "127.0.0.1", inode=0x5B)
    (tmp_path / "files.img").write_bytes(image(inside, socket(*ends, state=state, down=1), inside))
    for inode in (0x5A, 0x5B):
        (tmp_path / f"tcp-stream-{inode:x}.img").write_bytes(b"unread")
    close_outside(tmp_path)
    closed = socket(*ends, state=7).replace(
        encode_int(7, 4000) + encode_int(8, 443), encode_int(7, 0) + encode_int(8, 0)
    )
    assert (tmp_path / "files.img").read_bytes() == image(inside, closed + encode_int(19, 3), inside)
    assert [p.name for p in tmp_path.glob("tcp-*")] == ["tcp-stream-5b.img"]
    again = (tmp_path / "files.img").read_bytes()
    assert closed_outside(again) == (again, ())


def test_what_is_not_understood_is_left(tmp_path: Path) -> None:
    fixed = socket("10.231.0.2", "93.184.216.34") + bytes([21 << 3 & 0x7F | 0x85, 1, 1, 2, 3, 4])
    for data in (image(fixed), image(socket("127.0.0.1", "127.0.0.1"))[:-1]):
        (tmp_path / "files.img").write_bytes(data)
        with pytest.raises(ValueError):
            close_outside(tmp_path)
        assert (tmp_path / "files.img").read_bytes() == data


@given(st.binary(max_size=200))
def test_damaged_images_never_surprise(data: bytes) -> None:
    for text in (data, MAGICS + data, image(data), image(socket("10.231.0.2", "93.184.216.34") + data)):
        with contextlib.suppress(ValueError, IndexError):
            closed_outside(text)
