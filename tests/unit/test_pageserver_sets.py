from __future__ import annotations

import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from woodfrog.linux.pageserver import common_set, merge_sets, set_pages

HEAD, RANGE = struct.Struct("=QII"), struct.Struct("=iIQ")
MAGIC = int.from_bytes(b"FROGSET1", "little")
Ranges = list[tuple[int, int, int]]


def pack(ranges: Ranges) -> bytes:
    return HEAD.pack(MAGIC, len(ranges), 0) + b"".join(RANGE.pack(p, n, page << 12) for p, n, page in ranges)


def unpack(data: bytes) -> Ranges:
    return [(p, n, at >> 12) for p, n, at in RANGE.iter_unpack(data[HEAD.size :])]


def pages(ranges: Ranges) -> set[tuple[int, int]]:
    return {(p, page + i) for p, n, page in ranges for i in range(n)}


ranges = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 20), st.integers(0, 60)), max_size=12)


@given(st.lists(ranges, max_size=4))
def test_a_merge_is_the_union_in_order_without_overlap(sets: list[Ranges]) -> None:
    merged = unpack(merge_sets(*(pack(s) for s in sets)))
    assert pages(merged) == set().union(*(pages(s) for s in sets))
    for (p, n, at), (q, _, after) in itertools.pairwise(merged):
        assert (p, at + n) < (q, after), "apart, or they would be one range"
    assert set_pages(pack(merged)) == len(pages(merged))
    assert merge_sets(pack(merged)) == pack(merged)


@given(ranges, ranges)
def test_what_two_sets_have_in_common(one: Ranges, other: Ranges) -> None:
    both = common_set(pack(one), pack(other))
    assert pages(unpack(both)) == pages(one) & pages(other)
    assert both == merge_sets(both)


@given(st.binary(max_size=80))
def test_anything_else_is_refused(data: bytes) -> None:
    for text in (data, pack([(1, 1, 1)])[:-1], pack([]) + data[:15] + b"x"):
        try:
            set_pages(text)
        except ValueError:
            with pytest.raises(ValueError, match="not a working set"):
                merge_sets(text)
