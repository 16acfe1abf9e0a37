"""The cold form: what goes in comes out, and nothing that was touched does."""

from __future__ import annotations

import base64
import copy
import io
import os
import pickle
import random
import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from woodfrog.errors import IntegrityError, StoreError
from woodfrog.store import cold
from woodfrog.store.cold import Key, decode_bytes, decode_file, encode_bytes, encode_file, key_id

KEY, OTHER = Key(bytes(range(32))), Key(bytes(32))
SMALL = 4096
both = pytest.mark.parametrize("key", [None, KEY], ids=["plain", "encrypted"])


def encode(data: bytes, key: Key | None, frame: int = SMALL) -> bytes:
    return b"".join(cold._encoded(io.BytesIO(data).read, len(data), "data", key, 1, frame))


def frames(coded: bytes) -> tuple[bytes, list[bytes]]:
    """The header, and each frame with its length."""
    at, found = cold._HEADER.size, []
    while at < len(coded):
        (length,) = struct.unpack_from("<I", coded, at)
        found.append(coded[at : at + 4 + length])
        at += 4 + length
    return coded[: cold._HEADER.size], found


def refused(coded: bytes, key: Key | None) -> IntegrityError:
    with pytest.raises(IntegrityError) as error:
        decode_bytes(coded, key=key, what="the pack")
    assert str(error.value).startswith("the pack: ") and "\n" not in str(error.value)
    return error.value


@both
@settings(max_examples=60, deadline=None)
@given(
    blocks=st.lists(st.tuples(st.binary(max_size=300), st.integers(1, 60)), max_size=8),
    frame=st.sampled_from([4096, 4097, 10_000]),
)
def test_round_trip(key: Key | None, blocks: list[tuple[bytes, int]], frame: int) -> None:
    data = b"".join(block * times for block, times in blocks)
    assert decode_bytes(encode(data, key, frame), key=key) == data


@both
@pytest.mark.parametrize("size", [0, 1, SMALL - 1, SMALL, SMALL + 1, 3 * SMALL, cold.FRAME, 2 * cold.FRAME + 1])
def test_files(key: Key | None, size: int, tmp_path: Path) -> None:
    data = os.urandom(size)
    source, coded, back = (tmp_path / name for name in ("source", "coded", "back"))
    source.write_bytes(data)
    back.write_bytes(b"old")
    written = encode_file(source, coded, key=key)
    assert written == coded.stat().st_size < size + size // 100 + 200
    assert decode_file(coded, back, key=key) == size and back.read_bytes() == data
    assert decode_bytes(coded.read_bytes(), key=key) == data
    assert coded.stat().st_mode & 0o777 == back.stat().st_mode & 0o777 == 0o600
    assert len(list(tmp_path.iterdir())) == 3


def test_only_unencrypted_forms_of_equal_content_are_equal() -> None:
    data = b"page" * 5000
    assert encode(data, None) == encode(data, None)
    one, two = encode(data, KEY), encode(data, KEY)
    (head, body), (head2, body2) = frames(one), frames(two)
    assert head != head2 and not set(body) & set(body2)
    assert len(set(body)) == len(body), "equal frames of one file do not look equal"
    assert b"pagepage" not in one


@both
def test_every_single_flipped_bit_is_detected(key: Key | None) -> None:
    data = b"some memory " * 900
    coded = encode(data, key)
    assert len(frames(coded)[1]) == 3 and len(coded) < 600
    for bit in range(len(coded) * 8):
        altered = bytearray(coded)
        altered[bit // 8] ^= 1 << bit % 8
        refused(bytes(altered), key)


@both
def test_every_truncation_and_addition_is_detected(key: Key | None) -> None:
    coded = encode(b"some memory " * 900, key)
    for length in range(len(coded)):
        assert refused(coded[:length], key).code in ("truncated", "altered")
    for more in (b"\0", coded, frames(coded)[1][-1]):
        refused(coded + more, key)


@both
def test_frames_stay_where_they_were(key: Key | None) -> None:
    """The same content twice: apart from their place the frames are the same, and so is what they decrypt to."""
    first, second = (encode(bytes(3 * SMALL), key) for _ in range(2))
    head, body = frames(first)
    other = frames(second)[1]
    for order in ([1, 0, 2], [0, 2], [0, 1], [0, 0, 2], [2, 1, 0], [0, 1, 2, 2], [0], [1, 2], []):
        refused(head + b"".join(body[number] for number in order), key)
    if key:
        for number in range(3):
            refused(head + b"".join([*body[:number], other[number], *body[number + 1 :]]), key)
    shorter = encode(bytes(2 * SMALL), key)
    refused(frames(shorter)[0] + b"".join(body[:2]), key)
    refused(head + b"".join(frames(shorter)[1]), key)


def test_the_wrong_key_is_named(tmp_path: Path) -> None:
    coded = encode_bytes(b"secret", key=KEY)
    assert key_id(coded) == KEY.id and key_id(encode_bytes(b"", key=None)) is None
    wrong, none = refused(coded, OTHER), refused(coded, None)
    assert (wrong.code, none.code) == ("wrong-key", "no-key")
    assert KEY.id[:16] in str(wrong) and OTHER.id[:16] in str(wrong) and KEY.id[:16] in str(none)
    # The id alone opens nothing.
    forged = coded.replace(bytes.fromhex(KEY.id), bytes.fromhex(OTHER.id))
    assert refused(forged, OTHER).code == "altered"
    assert decode_bytes(encode_bytes(b"public", key=None), key=KEY) == b"public"
    with pytest.raises(IntegrityError):
        key_id(b"FROGCLD1")


@both
def test_a_frame_that_claims_to_be_large_takes_no_memory(key: Key | None) -> None:
    """Somebody without the key, or with it: the content is always bounded by the header, the frames by their size."""
    bomb = cold.zstandard.ZstdCompressor().compress(bytes(50 << 20))
    header = cold._HEADER.pack(
        b"FROGCLD1", int(bool(key)), SMALL, 100, bytes.fromhex(key.id) if key else bytes(16), bytes(32)
    )
    sealer = cold._Sealer(header, key, "x")
    body = sealer.cipher.encrypt(sealer._nonce(0), bomb, header) if sealer.cipher else bomb + sealer._digest(0, bomb)
    tracemalloc.start()
    refused(header + struct.pack("<I", len(body)) + body, key)
    refused(header + struct.pack("<I", 0xFFFFFFFF), key)
    refused(cold._HEADER.pack(b"FROGCLD1", 0, 0xFFFFFFFF, 100, bytes(16), bytes(32)), key)
    refused(cold._HEADER.pack(b"FROGCLD1", 0, SMALL, 2**63, bytes(16), bytes(32)), key)
    assert tracemalloc.get_traced_memory()[1] < 5 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("workers", [1, 3])
def test_memory_is_bounded_and_pieces_come_in_order(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cold, "_workers", lambda: workers)
    total, frame = 64 << 20, 1 << 20
    asked = 0

    def read(size: int) -> bytes:
        nonlocal asked
        size = min(size, total - asked)
        asked += size
        return random.Random(asked).randbytes(1000) + bytes(size - 1000) if size else b""

    tracemalloc.start()
    coded = b"".join(cold._encoded(read, total, "x", KEY, 1, frame))
    pieces: Iterator[bytes] = cold._decoded(io.BytesIO(coded).read, "x", KEY)
    for number, piece in enumerate(pieces, start=1):
        assert piece == random.Random(number * frame).randbytes(1000) + bytes(frame - 1000)
        del piece
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert number == 64 and peak < (4 * workers + 4) * frame


@both
def test_nothing_appears_that_is_not_verified(key: Key | None, tmp_path: Path) -> None:
    source, coded, back = (tmp_path / name for name in ("source", "coded", "back"))
    source.write_bytes(os.urandom(3 * cold.FRAME))
    encode_file(source, coded, key=key)
    altered = bytearray(coded.read_bytes())
    altered[-5] ^= 1
    coded.write_bytes(altered)
    with pytest.raises(IntegrityError, match=f"^{coded}: frame 2 of 3"):
        decode_file(coded, back, key=key)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["coded", "source"]
    with pytest.raises(StoreError, match="absent"):
        encode_file(tmp_path / "absent", back, key=key)
    with pytest.raises(StoreError, match="no/where"):
        encode_file(source, tmp_path / "no/where", key=key)
    with pytest.raises(StoreError, match="absent"):
        decode_file(tmp_path / "absent", back, key=key)
    assert not back.exists()


@pytest.mark.parametrize("change", [b"", b"longer" * 10_000])
def test_a_file_that_changes_meanwhile_is_not_stored(change: bytes) -> None:
    with pytest.raises(StoreError, match="while it was read"):
        b"".join(cold._encoded(io.BytesIO(change).read, 10_000, "x", None, 1, SMALL))


# -- keys ----------------------------------------------------------------------------------------------------------


def test_a_key_loads_from_text_environment_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = os.urandom(32)
    texts = [
        secret.hex(),
        secret.hex().upper(),
        base64.b64encode(secret).decode(),
        base64.urlsafe_b64encode(secret).decode(),
    ]
    for text in texts:
        monkeypatch.setenv("FROG_KEY", f"{text}\n")
        path = tmp_path / "key"
        path.write_text(f" {text}\n")
        path.chmod(0o600)
        for source in (text, "env:FROG_KEY", path, str(path)):
            assert Key.load(source) == Key(secret)
    made = Key.create(tmp_path / "new")
    assert Key.load(tmp_path / "new") == made != Key(secret) and (tmp_path / "new").stat().st_mode & 0o777 == 0o600
    with pytest.raises(StoreError, match="exists already"):
        Key.create(tmp_path / "new")


def test_a_key_that_is_none_is_not_repeated_in_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    almost = os.urandom(31).hex()
    path = tmp_path / "key"
    path.write_text(almost)
    path.chmod(0o600)
    monkeypatch.setenv("FROG_KEY", almost)
    for source in (almost, f"{almost}/", "env:FROG_KEY", "env:FROG_NOT_SET", path, str(path), ""):
        with pytest.raises(StoreError) as error:
            Key.load(source)
        assert error.value.code == "bad-key" and almost not in str(error.value.to_dict())
    with pytest.raises(StoreError, match="absent"):
        Key.load(tmp_path / "absent")
    path.write_text(os.urandom(32).hex())
    path.chmod(0o640)
    with pytest.raises(StoreError, match="chmod 600") as error:
        Key.load(path)
    assert error.value.code == "exposed-key"


def test_a_key_does_not_leak(tmp_path: Path) -> None:
    secret = os.urandom(32)
    key = Key(secret)
    assert secret.hex() not in f"{key!r} {key} {key.id}" and key.id[:16] in repr(key) and not hasattr(key, "__dict__")
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(key)
    with pytest.raises(TypeError, match="not pickled"):
        copy.copy(key)
    assert Key(secret) == key and Key(secret).id == key.id and hash(Key(secret)) == hash(key) and key != OTHER
