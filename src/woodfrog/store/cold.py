"""The cold form of a file: compressed and, with a key, encrypted frames.

    header   magic, flags, frame size, total size, key id, salt (see `_HEADER`)
    frame    u32 length, body          one for each `frame size` bytes of the content; at least one

A body is one zstd frame. With a key it is encrypted with AES-256-GCM in the STREAM construction of Hoang,
Reyhanitabar, Rogaway and Vizár ("Online Authenticated-Encryption and its Nonce-Reuse Misuse-Resistance", CRYPTO 2015):
the nonce is a prefix, the frame's number and whether it is the last one, so that frames that were altered, swapped,
left out, repeated or cut off do not decrypt. Each file has a key of its own, derived with HKDF-SHA256 from the user's
key and a fresh random salt of 256 bits, so counting from zero never repeats a nonce, and frames of another file do not
decrypt either. The header is associated data of every frame.

Without a key the same place holds a BLAKE3 digest over header, number, last flag and body. That finds every
accidental change; it does not stop somebody who can write where the file lies. What protects an unencrypted snapshot is
its signed manifest, which names every page and file.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import io
import os
import re
import secrets
import struct
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NoReturn

import blake3
import zstandard
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from woodfrog.errors import IntegrityError, StoreError
from woodfrog.store.files import store_error, write_atomic

__all__ = [
    "HEADER",
    "FrameReader",
    "Key",
    "content_size",
    "decode_bytes",
    "decode_file",
    "encode_bytes",
    "encode_file",
    "frame_table",
    "is_cold",
    "key_id",
]

_MAGIC = b"FROGCLD1"
_HEADER = struct.Struct("<8sIIQ16s32s")
"""Magic, flags (1: encrypted), frame size, total size, key id, salt."""
HEADER = _HEADER.size
_LENGTH = struct.Struct("<I")
_ENCRYPTED = 1
_TAG = 16
_MIN_FRAME, _MAX_FRAME = 1 << 12, 1 << 26
FRAME = 1 << 20
LEVEL = 3


def _workers() -> int:
    return min(4, len(os.sched_getaffinity(0)))


# -- keys ----------------------------------------------------------------------------------------------------------


class Key:
    """A secret of 256 bits that cold forms are encrypted with. It never shows in a repr, an error or a pickle.

    >>> Key(bytes(32))
    Key(2cdd8dea5ddc4d8d)
    """

    __slots__ = ("_secret", "id")

    def __init__(self, secret: bytes) -> None:
        if len(secret) != 32:
            raise StoreError("an encryption key has 32 bytes, as 64 hex digits or 44 base64 characters", code="bad-key")
        self._secret = secret
        self.id: str = HKDF(SHA256(), 16, None, b"woodfrog key id").derive(secret).hex()
        """Names the key without telling it: 32 hex digits."""

    @classmethod
    def load(cls, source: str | Path) -> Key:
        """Read a key.

        Args:
            source: the key itself (64 hex digits or base64 of 32 bytes), `env:NAME`, or a file that holds it and that
                only its owner may read.

        Raises:
            StoreError: no key there (`bad-key`), or others may read the file (`exposed-key`).
        """
        if isinstance(source, str):
            if (secret := _secret(source)) is not None:
                return cls(secret)
            if source.startswith("env:"):
                name = source[4:]
                if (secret := _secret(os.environ.get(name, ""))) is None:
                    raise StoreError(
                        f"the environment variable {name} holds no key: 64 hex digits or base64 of 32 bytes",
                        code="bad-key",
                    )
                return cls(secret)
            # A mistyped key must not come back in an error: only what is plainly a path is named.
            if "/" not in source or not os.path.exists(source):
                raise StoreError(
                    "the encryption key is neither 64 hex digits, nor base64 of 32 bytes, nor env:NAME, nor an "
                    "existing file (with a / in its path)",
                    code="bad-key",
                )
        path = Path(source)
        try:
            with open(path, "rb") as f:
                if os.fstat(f.fileno()).st_mode & 0o077:
                    raise StoreError(
                        f"{path}: others may read the encryption key; chmod 600 it", code="exposed-key", path=str(path)
                    )
                text = f.read(4096).decode("ascii", "replace")
        except OSError as e:
            raise store_error("cannot read the encryption key", path, e) from e
        if (secret := _secret(text)) is None:
            raise StoreError(
                f"{path}: not an encryption key; it holds 64 hex digits or base64 of 32 bytes",
                code="bad-key",
                path=str(path),
            )
        return cls(secret)

    @classmethod
    def create(cls, path: Path) -> Key:
        """Make a new random key and write it to `path`, mode 0600.

        Raises:
            StoreError: the file exists already, or cannot be written.
        """
        if path.exists():
            raise StoreError(f"{path} exists already; what it encrypted needs it", code="bad-key", path=str(path))
        secret = secrets.token_bytes(32)
        write_atomic(path, base64.b64encode(secret) + b"\n", 0o600)
        return cls(secret)

    def derive(self, salt: bytes) -> tuple[AESGCM, bytes]:
        """Cipher and nonce prefix of one file."""
        material = HKDF(SHA256(), 39, salt, b"woodfrog cold form 1").derive(self._secret)
        return AESGCM(material[:32]), material[32:]

    def name(self, data: bytes) -> str:
        """A name for some content, 64 hex digits, that only the holder of the key can find."""
        secret = HKDF(SHA256(), 32, None, b"woodfrog names").derive(self._secret)
        return blake3.blake3(data, key=secret).hexdigest()

    def __repr__(self) -> str:
        return f"Key({self.id[:16]})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and hmac.compare_digest(self._secret, other._secret)

    def __hash__(self) -> int:
        return hash(self.id)

    def __reduce__(self) -> NoReturn:
        raise TypeError("an encryption key is not pickled")


def _secret(text: str) -> bytes | None:
    text = text.strip()
    if re.fullmatch(r"[0-9a-fA-F]{64}", text):
        return bytes.fromhex(text)
    if re.fullmatch(r"[A-Za-z0-9+/_-]{43}=?", text):
        with suppress(binascii.Error):
            return base64.urlsafe_b64decode(text.rstrip("=").replace("+", "-").replace("/", "_") + "=")
    return None


# -- frames --------------------------------------------------------------------------------------------------------


class _Sealer:
    """Compresses and encrypts, or the reverse, the frames of one file. Used from several threads."""

    def __init__(self, header: bytes, key: Key | None, what: str, level: int = LEVEL) -> None:
        self.header, self.what, self.level = header, what, level
        self.frame: int
        self.total: int
        _, _, self.frame, self.total, _, salt = _HEADER.unpack(header)
        self.count = max(1, -(-self.total // self.frame))
        self.cipher: AESGCM | None = None
        if key:
            self.cipher, self.prefix = key.derive(salt)
        self._local = threading.local()

    def plain_size(self, number: int) -> int:
        return min(self.frame, self.total - number * self.frame)

    def seal(self, number: int, data: bytes) -> bytes:
        try:
            compressor = self._local.compressor
        except AttributeError:
            compressor = self._local.compressor = zstandard.ZstdCompressor(level=self.level)
        packed: bytes = compressor.compress(data)
        if self.cipher:
            return self.cipher.encrypt(self._nonce(number), packed, self.header)
        return packed + self._digest(number, packed)

    def open(self, number: int, body: bytes) -> bytes:
        if self.cipher:
            try:
                packed = self.cipher.decrypt(self._nonce(number), body, self.header)
            except InvalidTag:
                raise self.altered(number) from None
        else:
            packed, digest = body[:-_TAG], body[-_TAG:]
            if not hmac.compare_digest(self._digest(number, packed), digest):
                raise self.altered(number)
        size = self.plain_size(number)
        try:
            decompressor = self._local.decompressor
        except AttributeError:
            decompressor = self._local.decompressor = zstandard.ZstdDecompressor()
        try:
            # What the frame says of its size is checked before memory is taken for it.
            if zstandard.get_frame_parameters(packed).content_size != size:
                raise self.altered(number)
            data: bytes = decompressor.decompress(packed)
        except zstandard.ZstdError:
            raise self.altered(number) from None
        if len(data) != size:
            raise self.altered(number)
        return data

    def altered(self, number: int) -> IntegrityError:
        return IntegrityError(
            f"{self.what}: frame {number} of {self.count} was altered, swapped or damaged; fetch or make it again",
            code="altered",
        )

    def _last(self, number: int) -> int:
        return int(number == self.count - 1)

    def _nonce(self, number: int) -> bytes:
        return self.prefix + struct.pack(">IB", number, self._last(number))

    def _digest(self, number: int, packed: bytes) -> bytes:
        digest = blake3.blake3(self.header + struct.pack(">IB", number, self._last(number)))
        return digest.update(packed).digest(_TAG)


def _encoded(
    read: Callable[[int], bytes], total: int, what: str, key: Key | None, level: int, frame: int
) -> Iterator[bytes]:
    """The pieces of a cold form, in order; frames are worked on in parallel and at most a few are in memory."""
    salt = secrets.token_bytes(32) if key else bytes(32)
    header = _HEADER.pack(
        _MAGIC, _ENCRYPTED if key else 0, frame, total, bytes.fromhex(key.id) if key else bytes(16), salt
    )
    sealer = _Sealer(header, key, what, level)

    def work(number: int) -> Callable[[], bytes]:
        size = sealer.plain_size(number)
        data = read(size)
        if len(data) != size:
            raise StoreError(f"{what}: became shorter while it was read", code="changed")
        return lambda: sealer.seal(number, data)

    yield header
    for body in _in_order(work, sealer.count):
        yield _LENGTH.pack(len(body)) + body
    if read(1):
        raise StoreError(f"{what}: became longer while it was read", code="changed")


def _decoded(read: Callable[[int], bytes], what: str, key: Key | None) -> Iterator[bytes]:
    """The content's pieces, in order, each one verified. The last piece comes only when nothing follows it."""
    sealer = _opener(read(_HEADER.size), what, key)
    longest = _longest(sealer.frame)

    def work(number: int) -> Callable[[], bytes]:
        raw = read(_LENGTH.size)
        if len(raw) != _LENGTH.size:
            raise _truncated(what)
        (length,) = _LENGTH.unpack(raw)
        if not _TAG <= length <= longest:
            raise sealer.altered(number)
        body = read(length)
        if len(body) != length:
            raise _truncated(what)
        if number == sealer.count - 1 and read(1):
            raise IntegrityError(f"{what}: something follows its end; fetch or make it again", code="altered")
        return lambda: sealer.open(number, body)

    yield from _in_order(work, sealer.count)


def frame_table(path: Path) -> bytes:
    """What `FrameReader` needs to read single frames of a cold form: its header, and each frame's length.

    Raises:
        IntegrityError: not a cold form.
        StoreError: it cannot be read.
    """
    with _reading(path) as f:
        read = _reader(f, str(path))
        header = read(_HEADER.size)
        count = _opener_size(header, str(path))
        lengths = []
        for _ in range(count):
            raw = read(_LENGTH.size)
            if len(raw) != _LENGTH.size:
                raise _truncated(str(path))
            lengths.append(raw)
            f.seek(_LENGTH.unpack(raw)[0], os.SEEK_CUR)
    return header + b"".join(lengths)


class FrameReader:
    """Reads single frames of a cold form from wherever it lies. A table that lies gives an error, never other bytes.

    Args:
        table: what `frame_table` made.
        what: names the cold form in errors.

    Raises:
        IntegrityError: not a table, or of a form that was encrypted with a key that is not this one.
    """

    def __init__(self, table: bytes, what: str, key: Key | None) -> None:
        self._sealer = _opener(table[: _HEADER.size], what, key)
        self._what = what
        self.size: int = self._sealer.total
        """Bytes of the content."""
        self.frame: int = self._sealer.frame
        """Bytes of the content in each frame, but for the last."""
        self.count: int = self._sealer.count
        lengths = table[_HEADER.size :]
        if len(lengths) != self.count * _LENGTH.size:
            raise IntegrityError(f"{what}: its table of frames is damaged", code="altered")
        at = _HEADER.size
        self._offsets = [at]
        longest = _longest(self.frame)
        for (length,) in _LENGTH.iter_unpack(lengths):
            if not _TAG <= length <= longest:
                raise IntegrityError(f"{what}: its table of frames is damaged", code="altered")
            at += _LENGTH.size + length
            self._offsets.append(at)

    def place(self, first: int, count: int = 1) -> tuple[int, int]:
        """Where some frames lie: from, to."""
        return self._offsets[first], self._offsets[first + count]

    def open(self, first: int, count: int, data: bytes) -> Iterator[bytes]:
        """The contents of some frames, from the bytes that lie at their place.

        Raises:
            IntegrityError: altered, truncated, or not these frames.
        """
        begin, end = self.place(first, count)
        if len(data) != end - begin:
            raise _truncated(self._what)
        for number in range(first, first + count):
            at, stop = self._offsets[number] - begin + _LENGTH.size, self._offsets[number + 1] - begin
            if _LENGTH.unpack_from(data, at - _LENGTH.size)[0] != stop - at:
                raise self._sealer.altered(number)
            yield self._sealer.open(number, data[at:stop])


def _longest(frame: int) -> int:
    """zstd's bound on what data that does not compress grows by."""
    return frame + (frame >> 8) + 512


def _opener_size(header: bytes, what: str) -> int:
    if len(header) != _HEADER.size or not header.startswith(_MAGIC):
        raise IntegrityError(f"{what}: not a cold form that this version reads", code="altered")
    _, _, frame, total, _, _ = _HEADER.unpack(header)
    return max(1, -(-int(total) // int(frame)))


def _truncated(what: str) -> IntegrityError:
    return IntegrityError(f"{what}: it is cut off; fetch or make it again", code="truncated")


def _opener(header: bytes, what: str, key: Key | None) -> _Sealer:
    if len(header) != _HEADER.size:
        raise _truncated(what)
    magic, flags, frame, total, owner, _ = _HEADER.unpack(header)
    if magic != _MAGIC or flags & ~_ENCRYPTED or not _MIN_FRAME <= frame <= _MAX_FRAME:
        raise IntegrityError(f"{what}: not a cold form that this version reads", code="altered")
    if total > frame << 32:
        raise IntegrityError(f"{what}: its header is damaged", code="altered")
    if not flags & _ENCRYPTED:
        return _Sealer(header, None, what)
    if key is None:
        raise IntegrityError(
            f"{what}: encrypted with key {owner.hex()[:16]}, and no key is set; set the encryption key", code="no-key"
        )
    if owner.hex() != key.id:
        raise IntegrityError(
            f"{what}: encrypted with key {owner.hex()[:16]}, not with the one that is set ({key.id[:16]})",
            code="wrong-key",
        )
    return _Sealer(header, key, what)


def _in_order(work: Callable[[int], Callable[[], bytes]], count: int) -> Iterator[bytes]:
    """Prepare numbered pieces one after the other, finish them in parallel, and hand them out in order."""
    workers = min(_workers(), count)
    if workers <= 1:
        for number in range(count):
            yield work(number)()
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="cold") as pool:
        waiting: deque[Future[bytes]] = deque()
        try:
            for number in range(count):
                if len(waiting) == 2 * workers:
                    yield waiting.popleft().result()
                waiting.append(pool.submit(work(number)))
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def key_id(header: bytes) -> str | None:
    """Which key a cold form was encrypted with, from its first bytes (72 are enough); None for an unencrypted one.

    Raises:
        IntegrityError: not a cold form.
    """
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise IntegrityError("not a cold form", code="altered")
    _, flags, _, _, owner, _ = _HEADER.unpack(header[: _HEADER.size])
    return owner.hex() if flags & _ENCRYPTED else None


def is_cold(data: bytes) -> bool:
    """Whether data begins as a cold form does."""
    return data.startswith(_MAGIC)


def content_size(header: bytes) -> int:
    """How many bytes a cold form says, in its first `HEADER` bytes, that its content has; decoding gives so many or
    fails.

    Raises:
        IntegrityError: not a cold form.
    """
    key_id(header)
    return int(_HEADER.unpack(header[: _HEADER.size])[3])


def encode_bytes(data: bytes, *, key: Key | None, level: int = LEVEL) -> bytes:
    """The cold form of `data`."""
    return b"".join(_encoded(io.BytesIO(data).read, len(data), "data", key, level, FRAME))


def decode_bytes(data: bytes, *, key: Key | None, what: str = "data") -> bytes:
    """Undo `encode_bytes`; the whole result is in memory. `what` names it in errors.

    Raises:
        IntegrityError: altered, truncated, or encrypted with a key that is not this one.

    >>> decode_bytes(encode_bytes(b"brrr", key=None), key=None)
    b'brrr'
    """
    return b"".join(_decoded(io.BytesIO(data).read, what, key))


def encode_file(source: Path, target: Path, *, key: Key | None, level: int = LEVEL) -> int:
    """Write the cold form of `source` to `target`, whole or not at all; returns its size in bytes.

    It is not synced to disk. Without a key the same content gives the same bytes.

    Raises:
        StoreError: a file cannot be read or written, or the source changed meanwhile.
    """
    with _reading(source) as f, replacing(target) as out:
        return encode_stream(f, out, str(source), key=key, level=level)


def decode_file(source: Path, target: Path, *, key: Key | None) -> int:
    """Undo `encode_file`; returns the content's size in bytes. `target` appears only when all of it is verified.

    An unencrypted form is read with a key as well as without: what was stored before there was a key stays readable.

    Raises:
        IntegrityError: altered, truncated, or encrypted with a key that is not this one.
        StoreError: a file cannot be read or written.
    """
    with replacing(target) as out:
        return decode_stream(source, out, key=key)


def encode_stream(source: IO[bytes], out: IO[bytes], what: str, *, key: Key | None, level: int = LEVEL) -> int:
    """As `encode_file`, from the start of an open file to an open file."""
    return _write_all(out, _encoded(_reader(source, what), os.fstat(source.fileno()).st_size, what, key, level, FRAME))


def decode_stream(source: Path, out: IO[bytes], *, key: Key | None) -> int:
    """As `decode_file`, to an open file; what is in it before this returns is verified but not whole."""
    with _reading(source) as f:
        return _write_all(out, _decoded(_reader(f, str(source)), str(source), key))


@contextmanager
def _reading(path: Path) -> Iterator[IO[bytes]]:
    try:
        f = open(path, "rb", buffering=1 << 17)  # noqa: SIM115
    except OSError as e:
        raise store_error("cannot read", path, e) from e
    with f:
        yield f


def _reader(f: IO[bytes], what: str) -> Callable[[int], bytes]:
    def read(size: int) -> bytes:
        try:
            return f.read(size)
        except OSError as e:
            raise store_error("cannot read", Path(what), e) from e

    return read


@contextmanager
def replacing(target: Path) -> Iterator[IO[bytes]]:
    """A new file that takes the place of `target` when the block ends well, and is gone otherwise."""
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(fd, "wb", buffering=0) as f:
                yield f
            os.rename(temporary, target)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
    except OSError as e:
        raise store_error("cannot write", target, e) from e


def _write_all(out: IO[bytes], pieces: Iterator[bytes]) -> int:
    written = 0
    for piece in pieces:
        view = memoryview(piece)
        while view:
            count = out.write(view)
            view, written = view[count:], written + count
    return written
