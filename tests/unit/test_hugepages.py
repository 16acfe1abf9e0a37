"""Huge pages: which mappings have them, and putting them together again in a process that runs."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from woodfrog.linux import hugepages
from woodfrog.linux.hugepages import collapse, huge_ranges, parse_huge

MIB = 1 << 20


def smaps(mappings: list[tuple[int, int, int, str]]) -> bytes:
    return "".join(
        f"{begin:08x}-{end:08x} rw-p 00000000 00:00 0 {name}\nSize: {(end - begin) >> 10} kB\nRss: 4 kB\n"
        f"AnonHugePages:  {huge} kB\nShmemPmdMapped:        0 kB\nVmFlags: rd wr mr mw me ac \n"
        for begin, end, huge, name in mappings
    ).encode()


@given(
    st.lists(
        st.tuples(
            st.integers(0, 1 << 47),
            st.integers(0, 1 << 47),
            st.sampled_from([0, 2048, 20480]),
            st.sampled_from(["", "[heap]", "/a b/Size: x", "/AnonHugePages: 7 kB"]),
        )
    )
)
def test_mappings_with_huge_pages_are_found(mappings: list[tuple[int, int, int, str]]) -> None:
    assert parse_huge(smaps(mappings)) == tuple((begin, end) for begin, end, huge, _ in mappings if huge)


def test_of_a_process_that_is_gone() -> None:
    assert huge_ranges(1 << 30) == ()
    assert collapse(1 << 30, [(0, 4 * MIB)]).error


def test_where_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hugepages, "_SYSTEM", tmp_path)
    assert not hugepages.available() and collapse(os.getpid(), [(0, 4 * MIB)]).error == errno.ENOSYS
    (tmp_path / "hpage_pmd_size").write_text(f"{2 * MIB}\n")
    (tmp_path / "enabled").write_text("always madvise [never]\n")
    assert not hugepages.available()
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    assert hugepages.available()
    (tmp_path / "hpage_pmd_size").write_text(f"{512 * MIB}\n")
    assert not hugepages.available()


@contextmanager
def memory(size: int) -> Iterator[tuple[mmap.mmap, int]]:
    """Memory in small pages, each with bytes of its own, in whole blocks; and where it begins."""
    block = hugepages.block_bytes()
    with mmap.mmap(-1, size + block, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as map_:
        map_.madvise(mmap.MADV_NOHUGEPAGE)
        first = ctypes.c_char.from_buffer(map_)
        begin = -(-ctypes.addressof(first) // block) * block
        offset = begin - ctypes.addressof(first)
        for at in range(0, size, mmap.PAGESIZE):
            map_[offset + at : offset + at + 8] = at.to_bytes(8, "little")
        map_.madvise(mmap.MADV_HUGEPAGE)
        try:
            yield map_, begin
        finally:
            del first


@pytest.mark.root
@pytest.mark.skipif(not hugepages.available(), reason="this machine has no huge pages")
def test_what_is_shared_with_a_child_is_not_copied() -> None:
    block = hugepages.block_bytes()
    with memory(2 * block) as (_, begin):
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            os.close(write)
            os.read(read, 1)
            os._exit(0)
        try:
            assert collapse(os.getpid(), [(begin, begin + 2 * block)]).blocks == 0
        finally:
            os.close(write)
            os.close(read)
            os.waitpid(child, 0)


@pytest.mark.root
@pytest.mark.skipif(not hugepages.available(), reason="this machine has no huge pages")
def test_small_pages_become_huge_ones() -> None:
    block = hugepages.block_bytes()
    with memory(4 * block) as (map_, begin):
        offset = begin - ctypes.addressof(ctypes.c_char.from_buffer(map_))
        assert not huge_ranges(os.getpid())
        # The third block has holes: it stays as it is, as what lies outside of whole blocks does.
        map_.madvise(mmap.MADV_DONTNEED, offset + 2 * block, block // 4)
        done = collapse(os.getpid(), [(begin + mmap.PAGESIZE - block, begin + 4 * block + mmap.PAGESIZE)])
        if done.error in (errno.EPERM, errno.ENOSYS) or (not done.blocks and not done.error):
            pytest.skip("this kernel does not put pages together for others (Linux 6.1)")
        assert done == hugepages.Collapsed(3)
        (found,) = huge_ranges(os.getpid())
        assert found[0] <= begin and found[1] >= begin + 4 * block
        for at in range(0, 4 * block, mmap.PAGESIZE):
            hole = 2 * block <= at < 2 * block + block // 4
            assert map_[offset + at : offset + at + 8] == (0 if hole else at).to_bytes(8, "little")
        assert collapse(os.getpid(), [(begin, begin + 4 * block)], wanted=lambda: False).blocks == 0
