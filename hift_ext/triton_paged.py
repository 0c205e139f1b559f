# SPDX-License-Identifier: Apache-2.0
"""State in pages that Triton updates, moved by torch's streams.

csrc/paging and csrc/cuda do the same for the CUDA kernels; here the host's part is Python.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import NamedTuple

import torch

from hift_ext import ops, triton_step
from hift_ext.ops import Draw, Hypers, Kept, Report, Row, Stored, StreamSpec
from hift_ext.precision import PLAIN
from hift_ext.torch_device import CudaDevice, Stopwatch
from hift_ext.torch_pages import Group, Page, bytes_of, offsets, page_elements, typed
from hift_ext.torch_ring import Ring
from hift_ext.triton_engine import TritonNorm, scalars_at, span_of, tensors_of


class _Part(NamedTuple):
    """What of one parameter lies in one page: elements [begin, end) of the page."""

    row: Row
    param: torch.Tensor
    grad: torch.Tensor
    begin: int
    end: int
    hyper: Sequence[float]
    draw: Draw


class PagedTritonEngine(TritonNorm):
    """State in host memory, in pages that pass through a ring on the GPU.

    A copy that CUDA refuses is tried once more by the next call that needs it, whose error it is
    then; no page is lost meanwhile.

    Args:
        streams: The state of an element; at least one.
        page_bytes: Upper bound of a page's record.
        staging: Bytes of the ring, or WHOLE_GROUP.
        device: Of the parameters.
        kept: How state and weights are kept.
    """

    description = "ram"
    """Where state rests."""

    _update = staticmethod(triton_step.step)

    def __init__(
        self,
        streams: Sequence[StreamSpec],
        page_bytes: int,
        staging: int,
        device: CudaDevice,
        kept: Kept = PLAIN,
    ) -> None:
        self._kept, self._state_count = kept, len(streams)
        self._streams, self._device, self._staging = kept.stored(streams), device, staging
        self._place = device.torch_device
        self._page_elements = page_elements(self._streams, page_bytes)
        self._groups: list[Group] = []
        self._slots = self._slot_bytes = 0
        self._rings: list[Ring] = []  # one, or none yet
        self._updates = Stopwatch(device)
        self._lock = threading.RLock()
        self._process = os.getpid()
        weakref.finalize(self, _end, self._process, device, self._rings)

    @property
    def stored(self) -> Sequence[Stored]:
        """The streams of an item."""
        return self._streams

    @property
    def store_bytes(self) -> int:
        """Bytes reserved in host memory."""
        return sum(group.offsets[-1] for group in self._groups)

    @property
    def staging_bytes(self) -> int:
        """Bytes of the ring on the GPU."""
        return self._slots * self._slot_bytes

    @property
    def touched_bytes(self) -> int:
        """Bytes of pages that hold something."""
        touched = (page for group in self._groups for page in group.pages if page.touched)
        return sum(bytes_of(stream, page.count) for page in touched for stream in self._streams)

    def add_groups(self, counts: Sequence[Sequence[int]]) -> None:
        """Adds groups; all or nothing.

        Raises:
            ValueError: `staging` does not hold two pages.
            OSError: There is no room for the groups' state.
        """
        with self._entered():
            added = [Group(self._streams, group, self._page_elements) for group in counts]
            groups = [*self._groups, *added]
            extents = (page.extent for group in groups for page in group.pages)
            slot_bytes = offsets(self._streams, max(extents, default=0))[-1]
            most = max([2, *(len(group.pages) for group in groups)])
            staging = self._staging if self._staging != ops.WHOLE_GROUP else most * slot_bytes
            if staging < 2 * slot_bytes:
                raise ValueError(
                    f"staging of {staging} bytes does not hold two pages of {slot_bytes} bytes: "
                    "pass a larger staging or a smaller page_bytes (staging=0, updates over the "
                    "bus, needs the CUDA kernels)"
                )
            if self._rings:
                self._rings[0].bring_home()
                ring = self._rings.pop()
                ring.close()
            self._groups, self._slot_bytes = groups, slot_bytes
            self._slots = min(staging // slot_bytes, most) if slot_bytes else 0

    def step(
        self,
        group: int,
        rows: Sequence[Row],
        hypers: Hypers,
        scalars: ops.Scalars,
        following: int,
        done: list[bool],
        draws: Sequence[Draw] = (),
    ) -> Report:
        """Updates `group` behind the work on torch's current stream, a launch per page's part.

        Then `following` starts to move in (-1: nothing).

        Raises:
            RuntimeError: CUDA or Triton refuses; the error says whether anything was changed.
        """
        with self._entered():
            start = time.perf_counter()
            ring, device = self._ring(), self._device
            ring.save()
            work = self._work(self._groups[group], rows, hypers, draws)
            values = scalars_at(scalars, self._place)
            ring.plan(list(work))
            stream = device.current()
            finished, changed = 0, False
            try:
                for page, parts in work.items():
                    with ring.acquired(page, stream) as slot, self._updates.time(stream):
                        for part in parts:
                            here = part.begin, part.end - part.begin
                            count = range(len(self._streams))
                            stored = [ring.part(slot, number, *here) for number in count]
                            how = self._kept, self._state_count, part.hyper, part.draw
                            tensors = part.row, part.param, part.grad, stored
                            span = span_of(*tensors, *how)
                            device.run(partial(self._update, [span], values), stream)
                            changed = True
                    finished += 1
            except Exception as error:
                if not changed:
                    raise
                raise RuntimeError(
                    f"the step stopped after {finished} of {len(work)} pages of group {group} had "
                    f"been updated; repeat it only from a checkpoint. Cause: {error}"
                ) from error
            done.append(True)
            if following >= 0:
                with suppress(RuntimeError):  # this step is done; the next one tries again
                    ring.plan(self._groups[following].pages)
            moved = ring.bytes_in, ring.bytes_out
            ring.bytes_in = ring.bytes_out = 0
            times = ring.waits.take(), ring.copies.take(), self._updates.take()
            return Report(*moved, *times, 1e3 * (time.perf_counter() - start))

    def _work(
        self, group: Group, rows: Sequence[Row], hypers: Hypers, draws: Sequence[Draw]
    ) -> dict[Page, list[_Part]]:
        """The pages that a step changes, in order, with what of each parameter lies in them."""
        work: dict[Page, list[_Part]] = {}
        for row, (key, first) in zip(rows, draws or [(0, 0)] * len(rows), strict=True):
            start, count = group.items[row[0]]
            p, g = tensors_of(row, count, self._place)
            for page in group.pages_of(start, count):
                begin = max(start, page.begin)
                end = min(start + count, page.begin + page.count)
                here = slice(begin - start, end - start)
                place = begin - page.begin, end - page.begin
                draw = key, first + begin - start
                part = _Part(row, p[here], g[here], *place, hypers[row[4]], draw)
                work.setdefault(page, []).append(part)
        return work

    def tensor(self, group: int, item: int, stream: int, count: int) -> torch.Tensor:
        """A view of host memory with a storage of its own; what is written to it counts."""
        with self._entered():
            self._bring_home(group)
            owner = self._groups[group]
            begin, whole = owner.items[item]
            for page in owner.pages_of(begin, whole):
                if not page.touched:
                    for number, spec in enumerate(self._streams):
                        if spec.fill != 0:  # the system gives memory zeroed
                            host = owner.host(number, page.begin, page.extent)
                            typed(spec, host).fill_(spec.fill)
                    page.touched = True
            if not count:
                return torch.empty(0, dtype=self._streams[stream].dtype, device="cpu")
            return typed(self._streams[stream], owner.host(stream, begin, count))

    def write(self, group: int, item: int, stream: int, value: torch.Tensor) -> None:
        """Copies `value` to the stream in host memory."""
        if value.numel():
            self.tensor(group, item, stream, self._groups[group].items[item][1]).copy_(value)

    def room(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Ordinary memory."""
        return torch.empty(count, dtype=dtype, device="cpu")

    def parts(self, group: int, item: int) -> list[int]:
        """In host memory pages lie behind each other: one part."""
        return [self._groups[group].items[item][1]]

    def read(
        self, group: int, item: int, stream: int, begin: int, count: int, out: torch.Tensor
    ) -> None:
        """Copies from host memory."""
        out.copy_(self._some(group, item, stream, begin, count))

    def load(
        self, group: int, item: int, stream: int, begin: int, count: int, value: torch.Tensor
    ) -> None:
        """Copies to host memory."""
        self._some(group, item, stream, begin, count).copy_(value)

    def _some(self, group: int, item: int, stream: int, begin: int, count: int) -> torch.Tensor:
        whole = self.tensor(group, item, stream, self._groups[group].items[item][1])
        first = self._streams[stream].numel(begin)
        return whole[first : first + self._streams[stream].numel(count)]

    def prefetch(self, group: int) -> None:
        """Starts bringing `group` in."""
        with self._entered():
            self._ring().plan(self._groups[group].pages)

    def flush(self) -> None:
        """Waits until all state is in host memory."""
        with self._entered():
            for ring in self._rings:
                ring.bring_home()

    def _ring(self) -> Ring:
        if not self._rings:
            self._rings.append(Ring(self._device, self._streams, self._slots, self._slot_bytes))
        return self._rings[0]

    def _bring_home(self, group: int) -> None:
        for ring in self._rings:
            ring.bring_home()
            ring.forget(self._groups[group])

    @contextmanager
    def _entered(self) -> Iterator[None]:
        if os.getpid() != self._process:
            raise RuntimeError("state on a GPU belongs to the process that made the optimizer")
        with self._lock:
            yield


def _end(process: int, device: CudaDevice, rings: list[Ring]) -> None:
    """The end of an engine: nothing is under way, then memory is unlocked and freed."""
    if os.getpid() != process:
        return
    for ring in rings:
        ring.close()
    with suppress(RuntimeError):
        device.release()
