"""Cutting a page index into pieces for the store, and the pages files that are left."""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from woodfrog.criu.pagemap import PageIndex, PageTask
from woodfrog.linux.pageserver import merge_sets
from woodfrog.snapshot.catalogue import _sparse_sha256
from woodfrog.snapshot.packing import _keep_rest, _packed_index, pieces
from woodfrog.store.pages import Ref

PAGE = 4096


def working_set(*ranges: tuple[int, int, int]) -> bytes:
    """(pid, address in pages, pages)…"""
    data = struct.pack("=QII", int.from_bytes(b"FROGSET1", "little"), len(ranges), 0)
    return merge_sets(data + b"".join(struct.pack("=iIQ", p, n, a * PAGE) for p, a, n in ranges))


@st.composite
def indexes(draw: st.DrawFn, name: str) -> PageIndex:
    """Up to two tasks with disjoint extents over a hundred pages."""
    tasks = []
    for number, pid in enumerate(draw(st.sampled_from([[7], [7, 9]]))):
        borders = sorted(draw(st.sets(st.integers(0, 100), max_size=8)))
        extents = []
        offset = 0
        for low, high in zip(borders[::2], borders[1::2], strict=False):
            extents.append((low * PAGE, high - low, offset, number))
            offset += (high - low) * PAGE
        tasks.append(PageTask(pid, tuple(extents)))
    return PageIndex(tuple(tasks), tuple(name.format(n) for n in range(len(tasks))))


def pages_of(index: PageIndex) -> dict[tuple[int, int], tuple[str, int]]:
    """(pid, page number) -> (file, page in it)."""
    return {
        (task.pid, address // PAGE + i): (index.files[file], offset // PAGE + i)
        for task in index.tasks
        for address, pages, offset, file in task.extents
        for i in range(pages)
    }


ranges = st.lists(st.tuples(st.sampled_from([7, 9]), st.integers(0, 99), st.integers(1, 30)), max_size=5)


@given(indexes("pages-{}.img"), ranges, st.none() | indexes("{:064x}"))
def test_pieces_are_the_index(index: PageIndex, wanted: list[tuple[int, int, int]], parent: PageIndex | None) -> None:
    first = {(pid, page + i) for pid, page, n in wanted for i in range(n)}
    known = pages_of(parent) if parent else {}
    seen = {}
    for piece in pieces(index, working_set(*wanted) if wanted else b"", parent):
        pid = index.tasks[piece.task].pid
        base = {at + i: (ref.pack, ref.slot + i) for at, ref in piece.base for i in range(ref.pages)}
        for i in range(piece.pages):
            key = (pid, piece.address // PAGE + i)
            assert key not in seen
            seen[key] = (index.files[piece.file], piece.offset // PAGE + i)
            assert piece.first == (key in first)
            assert base.get(i) == known.get(key)
    assert seen == pages_of(index)


@given(indexes("pages-{}.img"), st.data())
def test_the_packed_index_says_where_each_page_went(index: PageIndex, data: st.DataObject) -> None:
    cut = pieces(index)
    refs = []
    expected = {}
    for piece in cut:
        run = []
        at = 0
        while at < piece.pages:
            n = data.draw(st.integers(1, piece.pages - at))
            pack, slot = data.draw(st.sampled_from(["", "a" * 64, "b" * 64])), data.draw(st.integers(0, 50))
            run.append(Ref(pack, slot if pack else 0, n))
            for i in range(n if pack else 0):
                key = (index.tasks[piece.task].pid, piece.address // PAGE + at + i)
                expected[key] = (pack, slot + i)
            at += n
        refs.append(tuple(run))
    assert pages_of(_packed_index(index, cut, tuple(refs))) == expected


@pytest.mark.parametrize("packed", [[], [(0, 2)], [(PAGE, 1), (3 * PAGE, 2)], [(6 * PAGE, 2)], [(0, 8)]])
def test_what_is_not_packed_stays_in_its_place(tmp_path: Path, packed: list[tuple[int, int]]) -> None:
    content = os.urandom(8 * PAGE)
    (tmp_path / "old").write_bytes(content)
    _keep_rest(tmp_path / "old", tmp_path / "new", packed)
    expected = bytearray(content)
    for offset, pages in packed:
        expected[offset : offset + pages * PAGE] = bytes(pages * PAGE)
    assert (tmp_path / "new").read_bytes() == expected


def test_the_digest_of_a_sparse_file_sees_holes_and_zeroes_alike(tmp_path: Path) -> None:
    page = os.urandom(PAGE)
    holes, filled = tmp_path / "holes", tmp_path / "filled"
    with open(holes, "wb") as f:
        f.truncate(100 * PAGE)
        f.seek(70 * PAGE)
        f.write(page)
    filled.write_bytes(holes.read_bytes())
    digest = _sparse_sha256(holes)
    assert digest == _sparse_sha256(filled)
    assert digest != hashlib.sha256(filled.read_bytes()).hexdigest()
    for at, value in ((0, 1), (70 * PAGE + 5, page[5] ^ 4), (99 * PAGE + 4095, 128)):
        with open(holes, "r+b") as f:
            f.seek(at)
            before = f.read(1)
            f.seek(at)
            f.write(bytes([value]))
        assert _sparse_sha256(holes) != digest
        with open(holes, "r+b") as f:
            f.seek(at)
            f.write(before)
    assert _sparse_sha256(holes) == digest
    os.truncate(holes, 101 * PAGE)
    assert _sparse_sha256(holes) != digest
