# SPDX-License-Identifier: Apache-2.0
# The largest batch, or length, whose peak fits: found by few traces, for a trace takes seconds.
# A peak is the largest of many sums that grow evenly with the batch, so it is convex in it.
"""The search for the largest n that fits."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping


def largest(
    peak: Callable[[int], int],
    limit: int,
    *,
    most: int,
    known: MutableMapping[int, int] | None = None,
    fixed: int = 0,
) -> int:
    """The largest n from 1 to `most` with peak(n) <= limit; 0 if there is none.

    `peak` grows with n and is convex. A line through two points then lies below it outside of
    them, so what the line puts above the limit is above it. Every n that is returned has been
    looked at.

    Args:
        peak: Bytes at n; slow.
        limit: Bytes.
        most: Largest n of interest.
        known: Values of `peak` that are there already; gains those that were asked for.
        fixed: Bytes that do not grow with n, for a good first guess.
    """
    known = {} if known is None else known
    if not known:
        known[1] = peak(1)
    while True:
        points = sorted(n for n in known if n <= most)
        fits = [n for n in points if known[n] <= limit]
        over = [n for n in points if known[n] > limit]
        best = max(fits, default=0)
        end = min(over, default=most + 1)
        # What the lines through the two points before, and behind, still let in.
        if len(fits) > 1:
            end = min(end, _crossing(known, fits[-2], fits[-1], limit) + 1)
        if len(over) > 1:
            end = min(end, _crossing(known, over[0], over[1], limit) + 1)
        if end - best <= 1:
            return best
        if len(points) == 1:
            (n,) = points
            guess = int(n * (limit - fixed) / max(known[n] - fixed, 1))
        elif fits and over and len(fits) == 1:
            guess = _crossing(known, best, over[0], limit)
        else:
            guess = end - 1
        guess = min(max(guess, best + 1), end - 1)
        known[guess] = peak(guess)


def _crossing(known: MutableMapping[int, int], a: int, b: int, limit: int) -> int:
    """The last whole n at which the line through the points at a < b is not above the limit."""
    rise = known[b] - known[a]
    if rise <= 0:
        return 1 << 62
    return a + (limit - known[a]) * (b - a) // rise
