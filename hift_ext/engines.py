# SPDX-License-Identifier: Apache-2.0
"""Engines: what keeps the state of all groups and updates one of them, in pages or in place.

The compiled module does the work; here tensors become addresses and counts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import torch

from hift_ext import ops
from hift_ext.norm_engine import NormEngine
from hift_ext.ops import Draw, Hypers, Kept, Report, Row, Scalars, Stored, StreamSpec
from hift_ext.precision import PLAIN
from hift_ext.scratch import Scratch


class StateEngine(Protocol):
    """What keeps the state of all groups and updates one of them; `why` tells how it was chosen."""

    why: str

    @property
    def store_bytes(self) -> int:
        """Bytes reserved where state rests."""

    @property
    def staging_bytes(self) -> int:
        """Bytes of the ring in compute memory."""

    @property
    def touched_bytes(self) -> int:
        """Bytes of state that holds something."""

    @property
    def description(self) -> str:
        """Where state rests, in words."""

    def add_groups(self, counts: Sequence[Sequence[int]]) -> None:
        """Adds groups; `counts[g][i]` elements for item i of group g."""

    @property
    def stored(self) -> Sequence[Stored]:
        """The streams of an item: the rule's state, a master if there is one, scales of codes."""

    def step(
        self,
        group: int,
        rows: Sequence[Row],
        hypers: Hypers,
        scalars: Scalars,
        following: int,
        done: list[bool],
        draws: Sequence[Draw] = (),
    ) -> Report:
        """Updates `group`; then `following` starts to move in (-1: nothing).

        `done` gets an element in the call that updates, so that an interrupt cannot part the two.
        """

    def tensor(self, group: int, item: int, stream: int, count: int) -> torch.Tensor:
        """The stored values of an item's `count` elements, flat: a view or, from a file, a copy."""

    def room(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """A flat CPU tensor for a copy of state, where it does not take the memory paging saved."""

    def write(self, group: int, item: int, stream: int, value: torch.Tensor) -> None:
        """Writes all stored values of an item's stream: flat, contiguous, on the CPU."""

    def parts(self, group: int, item: int) -> list[int]:
        """Elements of an item that lie in each page; best read and loaded page by page."""

    def read(
        self, group: int, item: int, stream: int, begin: int, count: int, out: torch.Tensor
    ) -> None:
        """Copies the stored values of `count` elements, from the `begin`-th on, to a CPU tensor.

        `begin` is a multiple of the stream's run.
        """

    def load(
        self, group: int, item: int, stream: int, begin: int, count: int, value: torch.Tensor
    ) -> None:
        """Replaces what `read` would give; `value` is contiguous and on the CPU."""

    def sum_of_squares(
        self, rows: Sequence[Row], counts: Sequence[int], total: torch.Tensor
    ) -> None:
        """Adds up the squares of the rows' gradients, `counts[i]` elements each (csrc/core/norm.h).

        `total` is one float64 on the parameters' device.
        """

    def write_clip(
        self, total: torch.Tensor, limit: float, grad_scale: int, result: torch.Tensor
    ) -> None:
        """Writes the norm and its coefficient to `result`, two float32 on the device.

        `grad_scale` is an address or 0.
        """

    def prefetch(self, group: int) -> None:
        """Starts bringing `group` in."""

    def flush(self) -> None:
        """Waits until all state has reached the store."""


class PagedEngine(NormEngine):
    """State in pages, in host memory or in a file.

    Args:
        streams: The state of an element.
        store: `"ram"`, `"disk"` or `"disk:PATH"`.
        page_bytes: Upper bound of a page's record.
        staging: Bytes of the ring, or WHOLE_GROUP. With 0 a GPU updates pages in host memory over
            the bus; the CPU always updates them where they are.
        device: Of the parameters.
        kept: How state and weights are kept.
    """

    def __init__(
        self,
        streams: Sequence[StreamSpec],
        store: str,
        page_bytes: int,
        staging: int,
        device: torch.device,
        kept: Kept = PLAIN,
    ) -> None:
        self._stored = kept.stored(streams)
        self._stochastic = kept.stochastic
        self._counts: list[list[int]] = []
        self._device = device
        self._cuda = device if device.type == "cuda" else None
        ring: list[torch.Tensor] = []  # owned by the callback, and so by the engine

        def allocate(size: int) -> int:
            ring[:] = []
            ring.append(ops.cuda_memory(size, device))
            return ring[0].data_ptr()

        self._engine = ops.ext.Engine(
            [(s.width * s.dtype.itemsize, s.pattern, s.run) for s in self._stored],
            states=len(streams),
            state_type=kept.state_code,
            master=kept.master is not None,
            store=store,
            page_bytes=page_bytes,
            staging=staging,
            readers=2,
            writers=2,
            device=-1 if self._cuda is None else self._cuda.index,
            allocate=None if self._cuda is None else allocate,
        )
        folder = self._engine.folder
        self._scratch = Scratch(folder) if folder else None

    @property
    def store_bytes(self) -> int:
        """Bytes reserved where pages rest."""
        return int(self._engine.store_bytes)

    @property
    def staging_bytes(self) -> int:
        """Bytes of the ring in compute memory (0: pages are updated in place)."""
        return int(self._engine.staging_bytes)

    @property
    def touched_bytes(self) -> int:
        """Bytes of pages that hold something."""
        return int(self._engine.touched_bytes)

    @property
    def description(self) -> str:
        """Where the pages rest, with what could not be had."""
        return str(self._engine.description)

    @property
    def stored(self) -> Sequence[Stored]:
        """The streams of an item."""
        return self._stored

    def add_groups(self, counts: Sequence[Sequence[int]]) -> None:
        """Adds groups; all or nothing."""
        self._engine.add_groups(counts)
        self._counts += [list(group) for group in counts]

    def step(
        self,
        group: int,
        rows: Sequence[Row],
        hypers: Hypers,
        scalars: Scalars,
        following: int,
        done: list[bool],
        draws: Sequence[Draw] = (),
    ) -> Report:
        """Updates `group` on torch's number of threads, or behind its current stream's work."""
        threads = torch.get_num_threads()
        stream = 0 if self._cuda is None else ops.cuda_stream(self._cuda)
        random = (draws, self._stochastic) if draws else ()
        place = threads, following, stream, done
        return Report(*self._engine.step(group, rows, hypers, *scalars, *place, *random))

    def tensor(self, group: int, item: int, stream: int, count: int) -> torch.Tensor:
        """A view with a storage of its own for host memory, else a copy that can be paged out."""
        stored = self._stored[stream]
        if count == 0:
            return torch.empty(0, dtype=stored.dtype, device="cpu")
        if self._scratch is None:
            view = self._engine.view(group, item, stream, count)
            return torch.frombuffer(view, dtype=stored.dtype)
        copy = self.room(stored.numel(count), stored.dtype)
        self._engine.read(group, item, stream, 0, count, copy.data_ptr())
        return copy

    def room(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """In a mapped file beside the pages', where there is one."""
        if self._scratch is None:
            return torch.empty(count, dtype=dtype, device="cpu")
        return self._scratch.take(count, dtype)

    def write(self, group: int, item: int, stream: int, value: torch.Tensor) -> None:
        """Writes through the pages the item lies in."""
        count = self._counts[group][item]
        assert value.numel() == self._stored[stream].numel(count)
        self._engine.write(group, item, stream, 0, count, value.data_ptr())

    def parts(self, group: int, item: int) -> list[int]:
        """In host memory pages lie behind each other: one part."""
        if self._scratch is None:
            return [self._counts[group][item]]
        return list(self._engine.parts(group, item))

    def read(
        self, group: int, item: int, stream: int, begin: int, count: int, out: torch.Tensor
    ) -> None:
        """Reads from the pages, wherever they are."""
        assert out.is_contiguous()
        assert out.numel() == self._stored[stream].numel(count)
        self._engine.read(group, item, stream, begin, count, out.data_ptr())

    def load(
        self, group: int, item: int, stream: int, begin: int, count: int, value: torch.Tensor
    ) -> None:
        """Writes through the pages."""
        assert value.is_contiguous()
        assert value.numel() == self._stored[stream].numel(count)
        self._engine.write(group, item, stream, begin, count, value.data_ptr())

    def prefetch(self, group: int) -> None:
        """Starts bringing `group` in."""
        self._engine.prefetch(group)

    def flush(self) -> None:
        """Waits for the write-backs."""
        self._engine.flush()


class ResidentEngine(NormEngine):
    """State in tensors on the parameters' own device; nothing moves."""

    def __init__(
        self, streams: Sequence[StreamSpec], device: torch.device, kept: Kept = PLAIN
    ) -> None:
        self._state_count = len(streams)
        self._kept = kept
        self._stored = kept.stored(streams)
        self._device = device
        self._items: list[list[list[torch.Tensor] | None]] = []
        self._counts: list[list[int]] = []

    @property
    def description(self) -> str:
        """Where state rests, in words."""
        return f"device memory of {self._device}"

    @property
    def staging_bytes(self) -> int:
        """Nothing moves: 0."""
        return 0

    @property
    def store_bytes(self) -> int:
        """Bytes of all state, made or not."""
        counts = [count for group in self._counts for count in group]
        return sum(s.nbytes(count) for s in self._stored for count in counts)

    @property
    def touched_bytes(self) -> int:
        """Bytes of state that has been made."""
        made = (state for group in self._items for state in group if state is not None)
        return sum(tensor.nbytes for state in made for tensor in state)

    @property
    def stored(self) -> Sequence[Stored]:
        """The streams of an item."""
        return self._stored

    def add_groups(self, counts: Sequence[Sequence[int]]) -> None:
        """Adds groups; their state is made at the first visit."""
        self._counts += [list(group) for group in counts]
        self._items += [[None] * len(group) for group in counts]

    def _state(self, group: int, item: int) -> list[torch.Tensor]:
        state = self._items[group][item]
        if state is None:
            count = self._counts[group][item]
            state = [
                torch.full((s.numel(count),), s.fill, dtype=s.dtype, device=self._device)
                for s in self._stored
            ]
            self._items[group][item] = state
        return state

    def step(
        self,
        group: int,
        rows: Sequence[Row],
        hypers: Hypers,
        scalars: Scalars,
        following: int,
        done: list[bool],
        draws: Sequence[Draw] = (),
    ) -> Report:
        """Updates `group` by one call over all its parameters."""
        states_of = {number: states for number, states, *_ in ops.RULES.values()}
        start = time.perf_counter()
        spans = []
        scales = self._state_count + (self._kept.master is not None)
        draws = draws or [(0, 0)] * len(rows)
        for (item, param, grad, code, hyper), draw in zip(rows, draws, strict=True):
            addresses = [tensor.data_ptr() for tensor in self._state(group, item)]
            states = states_of[code & 0xFF]
            master = addresses[self._state_count] if self._kept.master else 0
            how = (
                self._kept.state_code,
                addresses[scales : scales + states],
                master,
                self._kept.stochastic,
                *draw,
            )
            count = self._counts[group][item]
            spans.append((param, grad, count, code, addresses[:states], hypers[hyper], how))
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device).cuda_stream
            ops.ext.cuda_step_spans(spans, *scalars, self._device.index, stream, done)
        else:
            ops.ext.step_spans(spans, *scalars, torch.get_num_threads(), done)
        elapsed = 1e3 * (time.perf_counter() - start)
        return Report(update_ms=elapsed, step_ms=elapsed)

    def tensor(self, group: int, item: int, stream: int, count: int) -> torch.Tensor:
        """The stream itself."""
        return self._state(group, item)[stream]

    def write(self, group: int, item: int, stream: int, value: torch.Tensor) -> None:
        """Copies `value` to the stream."""
        self._state(group, item)[stream].copy_(value)

    def room(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Ordinary memory."""
        return torch.empty(count, dtype=dtype, device="cpu")

    def parts(self, group: int, item: int) -> list[int]:
        """There are no pages: one part."""
        return [self._counts[group][item]]

    def read(
        self, group: int, item: int, stream: int, begin: int, count: int, out: torch.Tensor
    ) -> None:
        """Copies a slice; state that was never made is its fill value."""
        state, stored = self._items[group][item], self._stored[stream]
        if state is None:
            out.fill_(stored.fill)
        else:
            first = stored.numel(begin)
            out.copy_(state[stream][first : first + stored.numel(count)])

    def load(
        self, group: int, item: int, stream: int, begin: int, count: int, value: torch.Tensor
    ) -> None:
        """Copies into a slice."""
        first = self._stored[stream].numel(begin)
        self._state(group, item)[stream][first : first + value.numel()].copy_(value)

    def prefetch(self, group: int) -> None:
        """Nothing moves."""

    def flush(self) -> None:
        """Nothing is under way."""
