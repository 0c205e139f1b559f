# SPDX-License-Identifier: Apache-2.0
"""Pages of state in host memory, as paging in Python has them: what lies where.

Cut as in csrc/paging: a group's items in a row, all streams of a run of elements a page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hift_ext import ops
from hift_ext.ops import Stored

PAGE_ELEMENTS = 256
"""Page boundaries are multiples of it."""

ITEM_ELEMENTS = 16
"""Parameters start at multiples of it, or of longer runs."""

ALIGNMENT = 256
"""Bytes; streams start at multiples of it, in slabs and in slots."""


def bytes_of(stream: Stored, elements: int) -> int:
    """Bytes of so many elements of a stream. All sizes here come from this."""
    return stream.nbytes(elements)


def typed(stream: Stored, raw: torch.Tensor) -> torch.Tensor:
    """A stream's bytes as its values."""
    return raw.view(stream.dtype)


def item_elements(streams: Sequence[Stored]) -> int:
    """Parameters start at multiples of this: with a run of elements that share a value."""
    return max((ITEM_ELEMENTS, *(stream.run for stream in streams)))


def offsets(streams: Sequence[Stored], elements: int) -> list[int]:
    """Where each stream begins among so many elements of all, and the end; bytes."""
    places = [0]
    for stream in streams:
        places.append(_up(places[-1] + bytes_of(stream, elements), ALIGNMENT))
    return places


def _up(count: int, unit: int) -> int:
    return -(-count // unit) * unit


@dataclass(eq=False, slots=True)
class Page:
    """Elements [begin, begin + count) of a group, with all streams.

    Attributes:
        touched: False while they hold the streams' fill everywhere; then nothing is stored.
    """

    group: Group
    begin: int
    count: int
    touched: bool = False

    @property
    def extent(self) -> int:
        """Elements as moved."""
        return _up(self.count, PAGE_ELEMENTS)


class Group:
    """Items in a row, cut into pages, and the slab of host memory their state rests in.

    Stream after stream, so that an item's stream is one range. Nothing is committed before the
    first visit.

    Args:
        streams: The state of an element.
        counts: Elements of each item.
        page_elements: Of a page, a multiple of PAGE_ELEMENTS.

    Raises:
        OSError: There is no room for the slab.
    """

    def __init__(
        self, streams: Sequence[Stored], counts: Sequence[int], page_elements: int
    ) -> None:
        self.streams = streams
        self.items: list[tuple[int, int]] = []  # first element, elements
        end = 0
        for count in counts:
            self.items.append((end, count))
            end = _up(end + count, item_elements(streams))
        self.page_elements = page_elements
        self.pages = [
            Page(self, begin, min(page_elements, end - begin))
            for begin in range(0, end, page_elements)
        ]
        self.offsets = offsets(streams, _up(end, PAGE_ELEMENTS))
        self.slab = ops.host_slab(self.offsets[-1]) if self.pages else None
        self.registered = False

    def host(self, number: int, begin: int, count: int) -> torch.Tensor:
        """Bytes of one stream of elements [begin, begin + count), with a storage of their own."""
        stream = self.streams[number]
        first = bytes_of(stream, begin)
        size = bytes_of(stream, begin + count) - first
        place = self.offsets[number] + first
        return torch.frombuffer(self.slab, dtype=torch.uint8, offset=place, count=size)

    def pages_of(self, begin: int, count: int) -> list[Page]:
        """The pages that elements [begin, begin + count) lie in."""
        if not count:
            return []
        last = (begin + count - 1) // self.page_elements
        return self.pages[begin // self.page_elements : last + 1]


def page_elements(streams: Sequence[Stored], page_bytes: int) -> int:
    """Elements of a page whose record does not exceed `page_bytes`, if it can be that small."""
    return max(page_bytes // offsets(streams, PAGE_ELEMENTS)[-1], 1) * PAGE_ELEMENTS
