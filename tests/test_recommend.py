# SPDX-License-Identifier: Apache-2.0
# The search for the largest batch: right for every convex peak, and with few looks at it, each of
# which is a trace of the model.

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hift_ext.planning.recommend import largest


class Counted:
    """A peak that counts its looks."""

    def __init__(self, peak: Callable[[int], int]) -> None:
        self.peak, self.looks = peak, 0

    def __call__(self, n: int) -> int:
        self.looks += 1
        return self.peak(n)


def test_a_straight_peak_takes_two_looks_beside_the_first() -> None:
    peak = Counted(lambda n: 26_000 + 3_500 * n)
    known = {8: peak(8)}
    assert largest(peak, 47_000, most=1000, known=known, fixed=26_000) == 6
    assert peak.looks == 3
    assert known == {8: 54_000, 6: 47_000, 7: 50_500}


def test_what_does_not_fit_at_all_is_0() -> None:
    assert largest(lambda n: 100 + n, 100, most=50) == 0
    assert largest(lambda n: 100 + n, 100, most=50, known={8: 108}) == 0


def test_no_more_than_was_asked_for() -> None:
    assert largest(lambda n: n, 100, most=7) == 7


line = st.tuples(st.integers(0, 1000), st.integers(0, 300))


@given(
    st.lists(line, min_size=1, max_size=4),
    st.integers(0, 3),
    st.integers(0, 20_000),
    st.integers(1, 200),
    st.integers(1, 64),
    st.integers(0, 1000),
)
def test_right_for_every_convex_peak(lines, square, limit, most, start, fixed) -> None:
    def curve(n: int) -> int:
        return max(a + b * n for a, b in lines) + square * n * n

    peak = Counted(curve)
    found = largest(peak, limit, most=most, known={start: curve(start)}, fixed=fixed)
    assert found == max((n for n in range(1, most + 1) if curve(n) <= limit), default=0)
    assert peak.looks <= 9


@pytest.mark.parametrize("known", [{1: 10}, {64: 640}, {3: 30, 4: 40}])
def test_what_is_returned_has_been_looked_at(known) -> None:
    assert known is not None
    assert largest(lambda n: 10 * n, 333, most=1000, known=known) == 33
    assert known[33] == 330
