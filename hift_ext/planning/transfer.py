# SPDX-License-Identifier: Apache-2.0
# How long pages travel in a step, and what of it hides behind forward and backward: the pager's own
# order of slots (csrc/paging), played through with the rates of a link instead of a card.
"""The forecast of transfers."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

from hift_ext.ops import Stored

_BLOCK = 256  # csrc/paging/page_table.h: page boundaries are multiples of so many elements
_ITEM = 16  # csrc/engine.cpp: a parameter starts at a multiple of so many
_RECORD = 4096  # a page's record is a multiple of so many bytes

_WARM = 8  # steps, at least, before those that are reported


@dataclass(frozen=True)
class Link:
    """The rates that pages travel and are updated at. 1 GB is 1e9 bytes.

    Attributes:
        in_gbps: From where state rests to compute memory, GB/s.
        out_gbps: Back, GB/s.
        update_gbps: What the update's kernel reads and writes in compute memory, GB/s.
        page_us: What a page costs beside its bytes, each way and for its kernel, microseconds.
        taking_turns: Pages come in and go out one after the other, as with one disk; else at once.
    """

    in_gbps: float
    out_gbps: float
    update_gbps: float
    page_us: float = 0.0
    taking_turns: bool = False

    def __post_init__(self) -> None:
        for name in ("in_gbps", "out_gbps", "update_gbps"):
            rate = getattr(self, name)
            if not 0 < rate < math.inf:
                raise ValueError(f"{name} must be a positive number of GB/s, not {rate!r}")

    def in_ms(self, size: int) -> float:
        """Milliseconds that `size` bytes take to come in, as one page."""
        return size / self.in_gbps / 1e6 + self.page_us / 1e3

    def out_ms(self, size: int) -> float:
        """Milliseconds that `size` bytes take to go out, as one page."""
        return size / self.out_gbps / 1e6 + self.page_us / 1e3

    def update_ms(self, size: int) -> float:
        """Milliseconds of a kernel that reads and writes `size` bytes of compute memory."""
        return size / self.update_gbps / 1e6 + self.page_us / 1e3


@dataclass(frozen=True)
class Group:
    """One group as the pager sees it.

    Attributes:
        pages: Bytes of each page's record.
        update_bytes: What the update reads and writes in all: weights, gradients, state.
        compute_ms: Forward and backward of its step.
    """

    pages: tuple[int, ...]
    update_bytes: int
    compute_ms: float

    @property
    def size(self) -> int:
        """Bytes of all records: what moves each way in a step."""
        return sum(self.pages)


@dataclass(frozen=True)
class Step:
    """The forecast of one step, in milliseconds and bytes.

    Attributes:
        bytes_in: Into compute memory.
        bytes_out: Back to where state rests.
        transfer_ms: At least one page was under way.
        exposed_ms: The update waited for pages.
        hidden_ms: The rest of `transfer_ms`.
        update_ms: The update's kernels.
        compute_ms: Forward and backward.
    """

    bytes_in: int
    bytes_out: int
    transfer_ms: float
    exposed_ms: float
    update_ms: float
    compute_ms: float

    @property
    def hidden_ms(self) -> float:
        """Transfer that cost the step nothing."""
        return max(0.0, self.transfer_ms - self.exposed_ms)

    @property
    def step_ms(self) -> float:
        """Forward, backward, update, and the wait for pages."""
        return self.compute_ms + self.update_ms + self.exposed_ms


def cut(counts: Sequence[int], stored: Sequence[Stored], page_bytes: int) -> tuple[int, ...]:
    """Record bytes of each page of a group, as csrc/paging/page_table.cpp cuts it.

    Args:
        counts: Elements of each parameter.
        stored: The streams of an element: `Precision.stored`.
        page_bytes: Upper bound of a record, at least of 256 elements.
    """
    each = sum(stream.nbytes(_BLOCK) for stream in stored)
    if not each:
        return ()
    unit = max([_ITEM, *(stream.run for stream in stored)])
    left = sum(-(-count // unit) * unit for count in counts)
    most = max(page_bytes // each, 1) * _BLOCK
    records = []
    while left > 0:
        extent = -(-min(most, left) // _BLOCK)
        records.append(-(-extent * each // _RECORD) * _RECORD)
        left -= most
    return tuple(records)


def slots_of(groups: Sequence[Group], staging: int | None) -> int:
    """How many pages the ring holds: as many as `staging` bytes do, at most the largest group.

    Args:
        groups: With their pages.
        staging: Bytes of the ring; None for the largest group's.

    Raises:
        ValueError: The ring does not hold two pages.
    """
    largest = max((size for group in groups for size in group.pages), default=0)
    if not largest:
        return 0
    most = max(2, *(len(group.pages) for group in groups), 2)
    if staging is None:
        return most
    if staging < 2 * largest:
        raise ValueError(
            f"a ring of {staging} bytes does not hold two pages of {largest} bytes: pass a larger "
            "staging or a smaller page_bytes"
        )
    return min(staging // largest, most)


def over_the_bus(groups: Sequence[Group], link: Link) -> list[Step]:
    """Steps without a ring: the kernel reads and writes pages in host memory (`staging=0`).

    Both ways at once, and the step waits for all of it but what the update takes anyway.
    """
    steps = []
    for group in groups:
        update = link.update_ms(group.update_bytes)
        bus = max(group.size / link.in_gbps, group.size / link.out_gbps) / 1e6
        exposed = max(0.0, bus - update)
        steps.append(Step(group.size, group.size, bus, exposed, update, group.compute_ms))
    return steps


class _Slot:
    """A place in the ring. Times are of the device's clock, in milliseconds."""

    def __init__(self) -> None:
        self.page: tuple[int, int] | None = None  # group, page
        self.arrived = 0.0
        self.left = 0.0  # its write-back is out


class _Ring:
    """The pager's books over two copy streams and the compute stream, each first in, first out."""

    def __init__(self, groups: Sequence[Group], link: Link, slots: int) -> None:
        self._groups, self._link = groups, link
        # Those that may be given away, longest released first.
        self._free: OrderedDict[_Slot, None] = OrderedDict((_Slot(), None) for _ in range(slots))
        self._slot_of: dict[tuple[int, int], _Slot] = {}
        self._leaving: dict[tuple[int, int], float] = {}
        self._pending: deque[tuple[int, int]] = deque()
        self._in_free = self._out_free = 0.0
        self.now = 0.0
        self.copies: list[tuple[float, float]] = []
        self.bytes_in = [0] * len(groups)  # since the group's last prefetch

    def _size(self, page: tuple[int, int]) -> int:
        return self._groups[page[0]].pages[page[1]]

    def _fill(self) -> None:
        """Gives the free slots to the pages whose turn is next."""
        while self._pending and self._free:
            page = self._pending[0]
            slot = self._slot_of.get(page)
            if slot is not None and slot not in self._free:
                return  # held; it is here
            self._pending.popleft()
            if slot is not None:  # still here from its last turn
                del self._free[slot]
                continue
            slot, _ = self._free.popitem(last=False)
            if slot.page is not None:
                del self._slot_of[slot.page]
            slot.page, self._slot_of[page] = page, slot
            # The slot's last page, and this page's own last bytes, are on their way out.
            begin = max(self.now, self._in_free, slot.left, self._leaving.get(page, 0.0))
            if self._link.taking_turns:
                begin = max(begin, self._out_free)
            slot.arrived = self._in_free = begin + self._link.in_ms(self._size(page))
            if self._link.taking_turns:
                self._out_free = self._in_free
            self.copies.append((begin, slot.arrived))
            self.bytes_in[page[0]] += self._size(page)

    def prefetch(self, group: int) -> None:
        """The group's pages start to come in, as far as slots are free."""
        self._pending = deque((group, i) for i in range(len(self._groups[group].pages)))
        self.bytes_in[group] = 0
        # First those that are here, so that none is given away for one before it.
        here = list(self._pending)[: len(self._free)]
        kept = [page for page in here if page in self._slot_of]
        for page in kept:
            self._free.pop(self._slot_of[page], None)
            self._pending.remove(page)
        self._fill()

    def update(self, group: int, all_first: bool) -> tuple[float, float]:
        """The group's update, page by page. Gives what it waited and what its kernels took, ms."""
        whole = self._groups[group]
        waited = worked = 0.0
        pages = [(group, i) for i in range(len(whole.pages))]
        if all_first:
            arrived = max((self._slot_of[p].arrived for p in pages), default=0.0)
            waited = max(0.0, arrived - self.now)
            self.now += waited
        for page in pages:
            slot = self._slot_of[page]
            wait = max(0.0, max(slot.arrived, slot.left) - self.now)
            work = self._link.update_ms(round(whole.update_bytes * self._size(page) / whole.size))
            waited, worked, self.now = waited + wait, worked + work, self.now + wait + work
            begin = max(self.now, self._out_free)
            if self._link.taking_turns:
                begin = max(begin, self._in_free)
            slot.left = self._out_free = begin + self._link.out_ms(self._size(page))
            if self._link.taking_turns:
                self._in_free = self._out_free
            self._leaving[page] = slot.left
            self.copies.append((begin, slot.left))
            self._free[slot] = None
            self._fill()
        return waited, worked


def through_a_ring(
    groups: Sequence[Group],
    link: Link,
    slots: int,
    *,
    order: Sequence[int] | None = None,
    all_first: bool = False,
) -> list[Step]:
    """The steps of one pass over all groups, long after the start, in the groups' own order.

    Args:
        groups: What moves, and what computes meanwhile.
        link: At what rates.
        slots: Pages that the ring holds.
        order: In which order the groups take their turns; None: as they are given.
        all_first: Every page is here before the first is updated, as with a file whose group fits
            the ring.

    Returns:
        A step for each group, indexed as `groups`.

    Raises:
        ValueError: There are pages, and fewer than two slots.
    """
    turns = list(range(len(groups))) if order is None else list(order)
    if any(group.pages for group in groups) and slots < 2:
        raise ValueError(f"a ring holds at least two pages, not {slots}")
    ring = _Ring(groups, link, slots)
    spans: list[tuple[float, float]] = []
    found: dict[int, tuple[int, float, float]] = {}
    ring.prefetch(turns[0])
    # The first pass, or steps, fill the ring and what queues behind it; then all passes are alike.
    warm = -(-_WARM // max(len(turns), 1))
    for number, group in enumerate(turns * (warm + 1)):
        begin = ring.now
        ring.now += groups[group].compute_ms
        waited, worked = ring.update(group, all_first and len(groups[group].pages) <= slots)
        found[group] = (ring.bytes_in[group], waited, worked)
        ring.prefetch(turns[(number + 1) % len(turns)])
        spans.append((begin, ring.now))
    busy = _within(_union(ring.copies), spans[warm * len(turns) :])
    steps: dict[int, Step] = {}
    for group, transfer in zip(turns, busy, strict=True):
        whole = groups[group]
        bytes_in, waited, worked = found[group]
        steps[group] = Step(bytes_in, whole.size, transfer, waited, worked, whole.compute_ms)
    return [steps[group] for group in range(len(groups))]


def _union(intervals: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Disjoint intervals, in order, of the times that lie in any of them."""
    joined: list[tuple[float, float]] = []
    for begin, end in sorted(intervals):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return joined


def _within(
    intervals: Sequence[tuple[float, float]], windows: Sequence[tuple[float, float]]
) -> list[float]:
    """How much of each window lies in the intervals; both are in order and disjoint."""
    lengths, at = [], 0
    for begin, end in windows:
        while at < len(intervals) and intervals[at][1] <= begin:
            at += 1
        covered, here = 0.0, at
        while here < len(intervals) and intervals[here][0] < end:
            covered += min(end, intervals[here][1]) - max(begin, intervals[here][0])
            here += 1
        lengths.append(covered)
    return lengths
