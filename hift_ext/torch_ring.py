# SPDX-License-Identifier: Apache-2.0
"""The ring on a GPU that pages in host memory pass through, by torch's streams.

What csrc/cuda does, where the extension has no CUDA. Every wait stands under its reason.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from hift_ext.ops import Stored
from hift_ext.torch_device import CudaDevice, Event, Stopwatch, Stream
from hift_ext.torch_pages import Group, Page, bytes_of, offsets, typed


@dataclass(eq=False, slots=True)
class Slot:
    """Room for a page on the device.

    Attributes:
        memory: Its bytes.
        arrived: The last copy into it.
        used: The last work that changed it.
        left: The last copy out of it.
        page: Whose bytes are here or are to come here.
        loaded: They are here, or on their way.
        reserved: Its page's turn is to come.
        unsaved: The copy out was refused: these are the page's only good bytes.
        stream: Where the work that changed it was queued.
        turn: When it was released.
    """

    memory: torch.Tensor
    arrived: Event
    used: Event
    left: Event
    page: Page | None = None
    loaded: bool = False
    reserved: bool = False
    unsaved: bool = False
    stream: Any = None
    turn: int = 0


class Ring:
    """Slots, the two streams that copy into and out of them, and which page is where.

    An error of a copy loses no page: what could not leave stays in its slot, and `save` tries
    again. Single-threaded, as its owner keeps it.

    Args:
        device: Where the slots are.
        streams: The state of an element.
        slots: Their number, at least two.
        slot_bytes: Of the largest page's record.
    """

    def __init__(
        self, device: CudaDevice, streams: Sequence[Stored], slots: int, slot_bytes: int
    ) -> None:
        self._device, self._streams = device, streams
        self._into, self._out = device.stream(), device.stream()
        memory = device.allocate(slots * slot_bytes)
        ready = device.event()
        # Work that is queued already may use the memory for what it was before.
        ready.record(device.current())
        self._into.wait_event(ready)
        self._slots = [
            Slot(
                memory[k * slot_bytes :][:slot_bytes],
                device.event(),
                device.event(),
                device.event(),
            )
            for k in range(slots)
        ]
        self._slot_of: dict[Page, Slot] = {}
        self._left_from: dict[Page, Slot] = {}  # by the last copy of the page
        self._coming: deque[Page] = deque()
        self._turns = 0
        self.copies, self.waits = Stopwatch(device), Stopwatch(device)
        self.bytes_in = self.bytes_out = 0

    def plan(self, pages: Sequence[Page]) -> None:
        """`pages` are to be acquired next, in this order: brings in as many as there is room for.

        The rest follows as slots come free. The plan before is dropped.
        """
        self._coming = deque(pages)
        for slot in self._slots:
            slot.reserved = False
        self._bring()

    @contextmanager
    def acquired(self, page: Page, stream: Stream) -> Iterator[Slot]:
        """The slot with the page, for work on `stream` that changes it; then the page goes home.

        Pages of the plan come in its order.
        """
        if self._coming and self._coming[0] is page:  # there was no room, or its copy was refused
            self.save()
            self._bring()
        slot = self._slot_of[page]
        with self.waits.time(stream):
            # The page's bytes, or those of one that was given up, are on their way in.
            stream.wait_event(slot.arrived)
            # The bytes that are about to change are still on their way out.
            stream.wait_event(slot.left)
        slot.stream = stream
        try:
            if not page.touched:
                for spec, raw in zip(self._streams, self._parts(slot, page), strict=True):
                    self._device.fill(typed(spec, raw), spec.fill, stream)
                page.touched = slot.loaded = True
        except BaseException:
            # Fills that were queued before the refusal still run, and the slot may go to others.
            stream.synchronize()
            raise
        try:
            yield slot
        finally:
            self._turns += 1
            slot.turn, slot.reserved, slot.unsaved = self._turns, False, True
            with suppress(RuntimeError):  # it is tried again, by whoever needs the slot or the page
                self._send(slot)
            with suppress(RuntimeError):
                self._bring()

    def part(self, slot: Slot, number: int, begin: int, count: int) -> torch.Tensor:
        """One stream of elements [begin, begin + count) of the slot's page."""
        assert slot.page is not None
        stream = self._streams[number]
        place = offsets(self._streams, slot.page.extent)[number]
        ends = (place + bytes_of(stream, at) for at in (begin, begin + count))
        return typed(stream, slot.memory[slice(*ends)])

    def save(self) -> None:
        """Sends out again what was refused.

        Raises:
            RuntimeError: It is refused again.
        """
        for slot in self._slots:
            if slot.unsaved:
                self._send(slot)

    def bring_home(self) -> None:
        """All that has been computed is in host memory on return."""
        self.save()
        # The host is about to look at it.
        self._out.synchronize()

    def forget(self, group: Group) -> None:
        """What the host is about to write to the group's slab comes in anew. All is home."""
        for slot in self._slots:
            if slot.page is not None and slot.page.group is group:
                self._unbind(slot)

    def close(self) -> None:
        """Nothing uses the ring or the slabs on return. Errors are lost."""
        # Copies use the ring and the slabs, which go next.
        for stream in (self._into, self._out):
            with suppress(RuntimeError):
                stream.synchronize()
        for slot in self._slots:
            if slot.unsaved:
                with suppress(RuntimeError):
                    # No copy waits for the work that changed it.
                    slot.stream.synchronize()

    def _parts(self, slot: Slot, page: Page) -> list[torch.Tensor]:
        places = offsets(self._streams, page.extent)
        sizes = (bytes_of(stream, page.extent) for stream in self._streams)
        return [slot.memory[p : p + size] for p, size in zip(places, sizes, strict=False)]

    def _record(self, slot: Slot, page: Page) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The parts of a page's record, in the slot and in the slab; registers the slab."""
        group = page.group
        if not group.registered:
            self._device.register(torch.frombuffer(group.slab, dtype=torch.uint8))
            group.registered = True
        return [
            (raw, group.host(number, page.begin, page.extent))
            for number, raw in enumerate(self._parts(slot, page))
        ]

    def _bring(self) -> None:
        """Gives the free slots to the pages whose turn is next; one that is here keeps its slot."""
        free = sum(not (slot.reserved or slot.unsaved) for slot in self._slots)
        nearest = list(islice(self._coming, free))
        for page in nearest:
            if page in self._slot_of:
                self._slot_of[page].reserved = True
        try:
            for page in nearest:
                slot = self._slot_of.get(page) or self._give(page)
                self._load(slot, page)
                slot.reserved = True
                self._coming.popleft()
        except BaseException:
            for page in nearest:
                if page in self._coming and page in self._slot_of:
                    self._slot_of[page].reserved = False
            raise

    def _give(self, page: Page) -> Slot:
        """An empty slot, or else the one released longest ago."""
        free = (slot for slot in self._slots if not (slot.reserved or slot.unsaved))
        slot = min(free, key=lambda slot: (slot.page is not None, slot.turn))
        self._unbind(slot)
        slot.page, self._slot_of[page] = page, slot
        return slot

    def _unbind(self, slot: Slot) -> None:
        if slot.page is not None:
            del self._slot_of[slot.page]
        slot.page, slot.loaded, slot.reserved = None, False, False

    def _load(self, slot: Slot, page: Page) -> None:
        if slot.loaded or not page.touched:
            return
        record = self._record(slot, page)
        try:
            # The page before is still on its way out of the slot.
            self._into.wait_event(slot.left)
            if page in self._left_from:
                # The page's own last bytes are still on their way home, out of another slot.
                self._into.wait_event(self._left_from[page].left)
            with self.copies.time(self._into):
                for raw, host in record:
                    self._device.copy(raw, host, self._into)
            # Who changes the slot waits for this.
            slot.arrived.record(self._into)
        except BaseException:
            with suppress(RuntimeError):
                # Copies that were queued before the refusal still run.
                self._into.synchronize()
            raise
        slot.loaded = True
        self.bytes_in += sum(raw.numel() for raw, _ in record)

    def _send(self, slot: Slot) -> None:
        """Starts the slot's page on its way home."""
        page = slot.page
        assert page is not None
        record = self._record(slot, page)
        # The work that changes the slot is still under way.
        slot.used.record(slot.stream)
        self._out.wait_event(slot.used)
        with self.copies.time(self._out):
            for raw, host in record:
                self._device.copy(host, raw, self._out)
        # Who changes or refills the slot, or brings the page in, waits for this.
        slot.left.record(self._out)
        self._left_from[page], slot.unsaved = slot, False
        self.bytes_out += sum(raw.numel() for raw, _ in record)
