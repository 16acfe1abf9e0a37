from __future__ import annotations

import contextlib
import struct
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from woodfrog.criu.pagemap import (
    PageIndex,
    PageTask,
    build_index,
    index_files,
    keep_arguments,
    keep_reservations,
    parse_pagemap,
    read_index,
    unreserved,
    wiped_on_fork,
    write_index,
)

MAGICS = struct.pack("<II", 0x54564319, 0x56084025)
PARENT, LAZY, PRESENT = 1, 2, 4


def varint(n: int) -> bytes:
    out = bytearray()
    while n > 0x7F:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    return bytes(out) + bytes([n])


def fields(**values: int | bytes) -> bytes:
    return b"".join(
        varint(int(k[1:]) << 3) + varint(v) if isinstance(v, int) else varint(int(k[1:]) << 3 | 2) + varint(len(v)) + v
        for k, v in values.items()
    )


def message(**values: int | bytes) -> bytes:
    body = fields(**values)
    return struct.pack("<I", len(body)) + body


def pagemap(*entries: tuple[int, int, int], old: bool = False, pages_file: int = 3) -> bytes:
    """(address, pages, flags) each; `old` writes the count where older versions of CRIU do."""
    count = "f2" if old else "f5"
    extra = {} if old else {"f2": 0}
    return MAGICS + message(f1=pages_file) + b"".join(message(f1=a, f4=f, **extra, **{count: n}) for a, n, f in entries)


@pytest.mark.parametrize("old", [False, True])
def test_offsets_count_what_is_present_lazy_or_not(old: bool) -> None:
    data = pagemap(
        (0x1000, 2, PRESENT | LAZY), (0x9000, 3, PRESENT), (0x20000, 9, 0), (0x40000, 1, PRESENT | LAZY), old=old
    )
    assert parse_pagemap(data) == (3, ((0x1000, 2, 0), (0x40000, 1, 5 * 4096)))


def test_what_cannot_be_served_is_refused() -> None:
    good = pagemap((0x1000, 2, PRESENT | LAZY))
    for bad in (
        b"\0" * 16,
        MAGICS,
        good[:-1],
        pagemap((0x1000, 2, PARENT | LAZY)),
    ):
        with pytest.raises(ValueError):
            parse_pagemap(bad)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    ("arguments", "lazy"),
    [
        ((0x2000, 0x3000), ((0x1000, 1, 0), (0x3000, 2, 8192), (0x20000, 1, 20480))),
        ((0x1010, 0x1020), ((0x2000, 3, 4096), (0x20000, 1, 20480))),
        ((0x4001, 0x20001), ((0x1000, 3, 0),)),
        ((0x0, 0x0), ((0x1000, 4, 0), (0x20000, 1, 20480))),
        ((0x9000, 0xA000), ((0x1000, 4, 0), (0x20000, 1, 20480))),
    ],
)
def test_arguments_are_read_by_criu(
    tmp_path: Path, old: bool, arguments: tuple[int, int], lazy: tuple[tuple[int, int, int], ...]
) -> None:
    entries = (0x1000, 4, PRESENT | LAZY), (0x9000, 1, PRESENT), (0x20000, 1, PRESENT | LAZY), (0x30000, 1, LAZY)
    data = pagemap(*entries, old=old)
    image = tmp_path / "pagemap-100.img"
    image.write_bytes(data)
    begin, end = arguments
    middle = (begin + end) // 2
    maps = message(f5=7, f8=begin, f9=middle, f10=middle, f11=end, f14=fields(f1=1, f2=2))
    (tmp_path / "mm-100.img").write_bytes(MAGICS + maps)
    keep_arguments(tmp_path)
    kept = image.read_bytes()
    assert parse_pagemap(kept) == (3, lazy)
    # CRIU finds every page where it was; what is not served is marked as present alone.
    assert (kept == data) == (lazy == parse_pagemap(data)[1])
    keep_arguments(tmp_path)
    assert image.read_bytes() == kept


@given(st.binary(max_size=200))
def test_damaged_page_maps_never_surprise(data: bytes) -> None:
    """Only what the engine takes as "no index"."""
    for text in (data, MAGICS + data, pagemap((0x1000, 2, PRESENT | LAZY)) + data):
        with contextlib.suppress(ValueError, KeyError, IndexError, struct.error):
            parse_pagemap(text)


number = st.integers(0, 2**40)
tasks = st.lists(
    st.builds(
        PageTask,
        st.integers(1, 2**31 - 1),
        st.lists(st.tuples(number, number, number, st.integers(0, 189)), max_size=4).map(tuple),
    ),
    max_size=5,
).map(tuple)
names = st.lists(st.from_regex(r"pages-[0-9]{1,9}\.img|[0-9a-f]{64}", fullmatch=True), max_size=5).map(tuple)


ranges = st.lists(st.tuples(st.integers(1, 2**31 - 1), st.integers(0, 2**32 - 1), number), max_size=3).map(tuple)


@given(st.builds(PageIndex, tasks, names, ranges))
def test_an_index_is_read_as_it_was_written(index: PageIndex) -> None:
    data = write_index(index)
    assert read_index(data) == index
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        assert index_files(Path(file.name)) == index.files


def test_the_files_of_an_index_of_very_many_tasks(tmp_path: Path) -> None:
    many = PageIndex(tuple(PageTask(n, ((n << 12, 1, 0, 0),)) for n in range(1, 20_000)), ("pages-1.img",))
    (tmp_path / "index").write_bytes(write_index(many))
    assert index_files(tmp_path / "index") == many.files


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"FROGIDX2",
        b"x" * 64,
        struct.pack("=QII", 0, 1, 0) + b"\0" * 12,
        b"FROGIDX1" + struct.pack("=IIiIQQQI", 1, 0, 100, 1, 0x1000, 1, 0, 3),
        write_index(PageIndex((PageTask(1, ()),), ("pages-1.img",)))[:-1],
        write_index(PageIndex((PageTask(1, ()),), ("pages-1.img",))) + b"\0",
        write_index(PageIndex((), ("x",)))[:-64] + b"\xff" * 64,
        write_index(PageIndex((), ())) + b"\0" * 32,
        write_index(PageIndex((), (), ((1, 1, 0x1000),)))[:-16],
        write_index(PageIndex((), (), ((1, 1, 0x1000),))) + b"\0" * 16,
    ],
)
def test_other_files_are_no_index(data: bytes) -> None:
    with pytest.raises(ValueError):
        read_index(data)


@given(st.binary(max_size=200))
def test_damaged_files_have_no_names(data: bytes) -> None:
    for text in (data, b"FROGIDX2" + data, write_index(PageIndex((PageTask(1, ()),), ("pages-1.img",)))[:-1] + data):
        with tempfile.NamedTemporaryFile() as file:
            file.write(text)
            file.flush()
            with contextlib.suppress(ValueError):
                index_files(Path(file.name))


def test_what_a_fork_empties(tmp_path: Path) -> None:
    plain = fields(f1=0x48000, f2=0x49000, f3=0x48, f9=1 << 16)
    wiped = fields(f1=0x5000, f2=0x9000, f9=1 << 18 | 1 << 16)
    assert wiped_on_fork(MAGICS + message(f1=0x1000, f14=plain, f17=3)) == []
    assert wiped_on_fork(MAGICS + message(f1=0x48, f14=wiped)) == [(0x5000, 4)]
    (tmp_path / "pagemap-100.img").write_bytes(pagemap((0x5000, 4, PRESENT | LAZY)))
    (tmp_path / "mm-100.img").write_bytes(MAGICS + message(f1=0x48, f14=wiped))
    assert build_index(tmp_path).wiped == ((100, 4, 0x5000),)


GIB = 1 << 30


@pytest.mark.parametrize(
    ("end", "prot", "flags", "then"),
    [
        (400 * GIB, 0, 0x22, 0x4022),
        (3 * GIB, 1, 0x22, 0x4022),
        (400 * GIB, 0, 0x4022, 0x4022),
        (400 * GIB, 3, 0x22, 0x22),  # writable: the kernel has been asked
        (400 * GIB, 0, 0x21, 0x21),  # shared
        (400 * GIB, 1, 0x02, 0x4002),  # a file: it is writable at first, too
        (2 * GIB - 4096, 0, 0x22, 0x22),
    ],
)
def test_what_is_reserved_and_not_used(tmp_path: Path, end: int, prot: int, flags: int, then: int) -> None:
    def image(flags: int) -> bytes:
        other = fields(f1=0x1000, f2=0x2000, f3=0, f4=0, f5=0, f6=0x22, f7=0x201, f8=1)
        vma = fields(f1=GIB, f2=end, f3=0, f4=0, f5=prot, f6=flags, f7=0x201, f8=1, f9=1 << 16)
        body = fields(f1=0x48, f8=0x7FFC00000000, f13=2**64 - 1) + fields(f14=other) + fields(f14=vma)
        body += fields(f15=2**64 - 1, f16=b"an aio ring")
        return MAGICS + struct.pack("<I", len(body)) + body

    path = tmp_path / "mm-100.img"
    for _ in range(2):
        path.write_bytes(image(flags))
        keep_reservations(tmp_path)
        assert path.read_bytes() == image(then)
        flags = then


def test_maps_that_only_reserve_addresses_count_no_memory() -> None:
    """Large ones that are private and not writable get MAP_NORESERVE; nothing else changes."""

    def vma(size: int, prot: int, flags: int) -> bytes:
        more = {"f3": 0, "f4": 0, "f7": 1, "f8": 1, "f9": 1 << 16}
        return fields(**{"f1": 0x7000_0000_0000, "f2": 0x7000_0000_0000 + size, "f5": prot, "f6": flags, **more})

    def image(*vmas: bytes, more: bytes = b"") -> bytes:
        body = fields(f1=0x48, f8=2**64 - 1) + b"".join(fields(f14=v) for v in vmas) + more
        return MAGICS + struct.pack("<I", len(body)) + body

    terabyte, reserved, written = 1 << 40, 0x4022, 0x22
    others = vma(4096, 0, 0x22), vma(terabyte, 3, written), vma(terabyte, 0, 0x21), vma(terabyte, 0, reserved)
    assert unreserved(image(*others)) == image(*others)
    assert unreserved(image(others[0], vma(terabyte, 0, 0x22))) == image(others[0], vma(terabyte, 0, reserved))
    assert unreserved(image(vma(terabyte, 1, 0x2), *others)) == image(vma(terabyte, 1, 0x4002), *others)
    unknown = image(vma(terabyte, 0, 0x22), more=bytes([31 << 3 & 0x7F | 0x85, 1, 1, 2, 3, 4]))
    assert unreserved(unknown) == unknown  # what would be lost is left as it is


def test_the_page_maps_of_a_dump(tmp_path: Path) -> None:
    (tmp_path / "pagemap-100.img").write_bytes(pagemap((0x1000, 1, PRESENT | LAZY), pages_file=1))
    (tmp_path / "pagemap-101.img").write_bytes(pagemap((0x5000, 4, PRESENT), pages_file=2))
    (tmp_path / "pagemap-102.img").write_bytes(pagemap((0x5000, 1, PRESENT), (0x9000, 2, PRESENT | LAZY), pages_file=5))
    (tmp_path / "pagemap-shmem-9.img").write_bytes(pagemap((0, 1, PRESENT), pages_file=4))
    assert build_index(tmp_path) == PageIndex(
        (PageTask(100, ((0x1000, 1, 0, 0),)), PageTask(101, ()), PageTask(102, ((0x9000, 2, 4096, 2),))),
        ("pages-1.img", "pages-2.img", "pages-5.img"),
    )
