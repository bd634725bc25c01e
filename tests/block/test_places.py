"""Who has which part of a file: as a set of numbers would tell it, only faster."""

from __future__ import annotations

import time

from hypothesis import given, settings
from hypothesis import strategies as st

from skep.block.places import _WORD, _Marks

WORDS = 60
UNITS = WORDS * _WORD


@settings(max_examples=60, deadline=None)
@given(
    claims=st.lists(st.tuples(st.integers(0, UNITS - 1), st.sampled_from((1, 3, _WORD, 9000, 20000))), max_size=12),
    first=st.sampled_from((0, 0, 3, 20)),
)
def test_marks(claims: list[tuple[int, int]], first: int) -> None:
    marks, taken = _Marks(first, WORDS), set[int]()
    for start, length in claims:
        mine = set(range(max(start, first * _WORD), min(start + length, UNITS)))
        assert marks.claim(start, start + length) == mine.isdisjoint(taken)
        taken |= mine
    free = set[int]()
    for start, end in marks.free(1, UNITS):
        assert start < end and free.isdisjoint(range(start, end))
        free |= set(range(start, end))
    assert free == set(range(first * _WORD, UNITS)) - taken


def test_a_claim_of_a_terabyte_takes_no_time() -> None:
    begun = time.process_time()
    units = 1 << 40
    marks = _Marks(0, units // _WORD)
    for at in range(1000):
        assert marks.claim(at, units - at) == (at == 0)
    assert list(marks.free(1, units)) == []
    assert time.process_time() - begun < 1
