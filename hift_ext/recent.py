# SPDX-License-Identifier: Apache-2.0
"""What the monitor's picture will show: the last steps as they ran, and memory over the whole run.

Both are bounded, however long the training is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from hift_ext.intervals import IN, OUT, READ, UPDATE, WAIT, WRITE, Interval
from hift_ext.timeline import LANES, Picture, Span

_MOST_INTERVALS = 1 << 14
_MOST_POINTS = 4000
_LANE_OF = {
    IN: "copy in",
    OUT: "copy out",
    UPDATE: "update",
    WAIT: "wait",
    READ: "read file",
    WRITE: "write file",
}


class Ran(NamedTuple):
    """When a step's parts ran, in seconds.

    Attributes:
        group: Its name.
        whole: From the end of the step before.
        call: Of optimizer.step().
        forwards: In the order of time.
        backwards: In the order of time.
    """

    group: str
    whole: Span
    call: Span
    forwards: list[Span]
    backwards: list[Span]


class Recent:
    """Keeps the last `window` steps, their intervals, and the memory curve."""

    def __init__(self, window: int) -> None:
        self._steps: deque[Ran] = deque(maxlen=window)
        self._intervals: deque[Interval] = deque(maxlen=_MOST_INTERVALS)
        self._curve: list[tuple[float, int, int]] = []
        self._stride, self._count = 1, 0

    def moved(self, intervals: Iterable[Interval]) -> None:
        """Adds what the engine told."""
        self._intervals.extend(intervals)

    def ran(self, step: Ran, taken: int, highest: int) -> None:
        """Adds a step, and the memory in bytes after it and at most during it."""
        self._steps.append(step)
        self._count += 1
        if self._curve and self._count % self._stride:
            at, before, most = self._curve[-1]
            self._curve[-1] = (at, before, max(most, highest))
            return
        self._curve.append((step.whole[1], taken, highest))
        if len(self._curve) > _MOST_POINTS:  # of two points one is kept, with the higher peak
            pairs = zip(self._curve[::2], self._curve[1::2], strict=False)
            self._curve = [(at, taken, max(a, b)) for (at, taken, a), (_, _, b) in pairs]
            self._stride *= 2

    def picture(self, title: str, memory_name: str) -> Picture:
        """What there is to draw."""
        lanes: dict[str, list[Span]] = {lane: [] for lane in LANES}
        for step in self._steps:
            lanes["forward"] += step.forwards
            lanes["backward"] += step.backwards
        for kind, *_, begin, end in self._intervals:
            lanes[_LANE_OF[kind]].append((begin, end))
        if not self._intervals:  # an engine that tells of a step as a whole only
            lanes["optimizer"] += [step.call for step in self._steps]
        steps = [(*step.whole, step.group) for step in self._steps]
        return Picture(title, steps, lanes, self._curve, memory_name)
