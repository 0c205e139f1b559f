# SPDX-License-Identifier: Apache-2.0
"""State that Triton updates: what a GPU gets without this build's kernels.

Apart from ops.py, since it imports triton, which takes half a second.
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
from hift_ext.ops import DTYPE_CODES, RULES, Hypers, Report, ResidentEngine, Row, StreamSpec
from hift_ext.torch_device import CudaDevice, Stopwatch
from hift_ext.torch_pages import Group, Page, bytes_of, offsets, page_elements, typed
from hift_ext.torch_ring import Ring

_RULES = {number: (name, states) for name, (number, states, _) in RULES.items()}
_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}


def _tensors(row: Row, count: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The parameter and the gradient of a row."""
    _, param, grad, kind, _ = row
    codes = (param, kind >> 8 & 0xF), (grad, kind >> 12)
    p, g = (triton_step.tensor_at(at, count, _DTYPES[code], device) for at, code in codes)
    return p, g


def _scalars(addresses: ops.Scalars, device: torch.device) -> triton_step.Scalars:
    at = partial(triton_step.tensor_at, count=1, dtype=torch.float32, device=device)
    return triton_step.Scalars(*(at(address) if address else None for address in addresses))


class TritonEngine(ResidentEngine):
    """State in tensors on the parameters' own device; nothing moves."""

    def step(
        self, group: int, rows: list[Row], hypers: Hypers, scalars: ops.Scalars, following: int
    ) -> Report:
        """Updates `group`, a launch per parameter, on torch's current stream."""
        start = time.perf_counter()
        spans = []
        for row in rows:
            item, _, _, kind, hyper = row
            rule, states = _RULES[kind & 0xFF]
            p, g = _tensors(row, self._counts[group][item], self._device)
            state = self._state(group, item)[:states]
            spans.append(triton_step.Span(p, g, state, rule, hypers[hyper]))
        triton_step.step(spans, _scalars(scalars, self._device))
        elapsed = 1e3 * (time.perf_counter() - start)
        return Report(update_ms=elapsed, step_ms=elapsed)


class _Part(NamedTuple):
    """What of one parameter lies in one page: elements [begin, end) of the page."""

    param: torch.Tensor
    grad: torch.Tensor
    begin: int
    end: int
    rule: str
    states: int
    hyper: Sequence[float]


class PagedTritonEngine:
    """State in host memory, in pages that pass through a ring on the GPU.

    A copy that CUDA refuses is tried once more by the next call that needs it, whose error it is
    then; no page is lost meanwhile.

    Args:
        streams: The state of an element; at least one.
        page_bytes: Upper bound of a page's record.
        staging: Bytes of the ring, or WHOLE_GROUP.
        device: Of the parameters.
    """

    description = "ram"
    """Where state rests."""

    _update = staticmethod(triton_step.step)

    def __init__(
        self, streams: Sequence[StreamSpec], page_bytes: int, staging: int, device: CudaDevice
    ) -> None:
        self._streams, self._device, self._staging = list(streams), device, staging
        self._page_elements = page_elements(streams, page_bytes)
        self._groups: list[Group] = []
        self._slots = self._slot_bytes = 0
        self._rings: list[Ring] = []  # one, or none yet
        self._updates = Stopwatch(device)
        self._lock = threading.RLock()
        self._process = os.getpid()
        weakref.finalize(self, _end, self._process, device, self._rings)

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
        self, group: int, rows: list[Row], hypers: Hypers, scalars: ops.Scalars, following: int
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
            work = self._work(self._groups[group], rows, hypers)
            values = _scalars(scalars, device.torch_device)
            ring.plan(list(work))
            stream = device.current()
            done, changed = 0, False
            try:
                for page, parts in work.items():
                    with ring.acquired(page, stream) as slot, self._updates.time(stream):
                        for part in parts:
                            states = [
                                ring.part(slot, number, part.begin, part.end - part.begin)
                                for number in range(part.states)
                            ]
                            span = triton_step.Span(*part[:2], states, part.rule, part.hyper)
                            device.run(partial(self._update, [span], values), stream)
                            changed = True
                    done += 1
            except Exception as error:
                if not changed:
                    raise
                raise RuntimeError(
                    f"the step stopped after {done} of {len(work)} pages of group {group} had been "
                    f"updated; repeat it only from a checkpoint. Cause: {error}"
                ) from error
            if following >= 0:
                with suppress(RuntimeError):  # this step is done; the next one tries again
                    ring.plan(self._groups[following].pages)
            moved = ring.bytes_in, ring.bytes_out
            ring.bytes_in = ring.bytes_out = 0
            times = ring.waits.take(), ring.copies.take(), self._updates.take()
            return Report(*moved, *times, 1e3 * (time.perf_counter() - start))

    def _work(self, group: Group, rows: list[Row], hypers: Hypers) -> dict[Page, list[_Part]]:
        """The pages that a step changes, in order, with what of each parameter lies in them."""
        work: dict[Page, list[_Part]] = {}
        for row in rows:
            item, _, _, kind, hyper = row
            start, count = group.items[item]
            rule, states = _RULES[kind & 0xFF]
            p, g = _tensors(row, count, self._device.torch_device)
            for page in group.pages_of(start, count):
                begin = max(start, page.begin)
                end = min(start + count, page.begin + page.count)
                here = slice(begin - start, end - start)
                place = begin - page.begin, end - page.begin
                part = _Part(p[here], g[here], *place, rule, states, hypers[hyper])
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
                return torch.empty(0)
            return typed(self._streams[stream], owner.host(stream, begin, count))

    def write(self, group: int, item: int, stream: int, value: torch.Tensor) -> None:
        """Copies `value` to the stream in host memory."""
        if value.numel():
            self.tensor(group, item, stream, value.numel()).copy_(value)

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
