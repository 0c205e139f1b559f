# SPDX-License-Identifier: Apache-2.0
"""All that pages and the monitor's clock need of a GPU, by torch: streams, events, memory, copies.

Nothing else of theirs in Python touches a device: tests put a simulated one in its place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch


class Event(Protocol):
    """A point in a stream's work, as torch.cuda.Event; before the first `record` it has passed."""

    def record(self, stream: Any) -> None:
        """Puts the point behind what is queued on `stream`."""

    def query(self) -> bool:
        """Whether it has passed."""

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds from here to `end_event`; both have passed and are timed."""


class Stream(Protocol):
    """A queue of work, as torch.cuda.Stream."""

    def wait_event(self, event: Any) -> None:
        """What is queued from now on comes after the event's last `record`."""

    def synchronize(self) -> None:
        """The host waits for all that is queued."""


class CudaDevice:
    """One GPU.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.torch_device = device
        self._registered: list[torch.Tensor] = []

    def stream(self) -> Stream:
        """A stream that does not wait for the default one."""
        return torch.cuda.Stream(self.torch_device)

    def current(self) -> Stream:
        """The stream that torch queues work on now: updates run there."""
        return torch.cuda.current_stream(self.torch_device)

    def event(self, *, timed: bool = False) -> Event:
        """An event that nothing has recorded."""
        return torch.cuda.Event(enable_timing=timed)

    def synchronize(self) -> None:
        """The host waits for all that is queued on any stream."""
        torch.cuda.synchronize(self.torch_device)

    def allocate(self, size: int) -> torch.Tensor:
        """Bytes from torch's allocator, so that its figures and caps include them.

        Work on the current stream may still use them for what they were before.
        """
        return torch.empty(size, dtype=torch.uint8, device=self.torch_device)

    def register(self, host: torch.Tensor) -> None:
        """Locks bytes of host memory, which commits them, for copies at full speed.

        torch's own pinned allocator would round them up to a power of two.

        Raises:
            RuntimeError: CUDA refuses.
        """
        portable = 1
        with torch.cuda.device(self.torch_device):
            result = torch.cuda.cudart().cudaHostRegister(host.data_ptr(), host.numel(), portable)
        try:
            torch.cuda.check_error(result)
        except RuntimeError as error:
            raise RuntimeError(
                f"CUDA cannot lock {host.numel()} bytes of host memory for optimizer state "
                f"({error}): free host memory, raise 'ulimit -l', or pass store=\"device\""
            ) from error
        self._registered.append(host)

    def release(self) -> None:
        """Unlocks all that was registered; no copy may be under way."""
        while self._registered:
            torch.cuda.cudart().cudaHostUnregister(self._registered.pop().data_ptr())

    def copy(self, to: torch.Tensor, source: torch.Tensor, stream: Any) -> None:
        """Queues a copy between device and registered memory; both contiguous, of bytes."""
        with torch.cuda.stream(stream):
            to.copy_(source, non_blocking=True)

    def fill(self, to: torch.Tensor, value: float, stream: Any) -> None:
        """Queues a fill of device memory."""
        with torch.cuda.stream(stream):
            to.fill_(value)

    def run(self, work: Callable[[], None], stream: Any) -> None:
        """Queues what `work` launches."""
        with torch.cuda.stream(stream):
            work()


class Stopwatch:
    """How long work on streams took, by events on them: nobody waits, so it is told late.

    What CUDA refuses to time goes untimed.
    """

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        self._stretches: deque[tuple[Event, Event]] = deque()
        self._anchor: Event | None = None

    @contextmanager
    def time(self, stream: Stream) -> Iterator[None]:
        """Times what is queued on `stream` inside."""
        begin = self._mark(stream)
        self._anchor = self._anchor or begin
        yield
        end = self._mark(stream)
        if begin is not None and end is not None:
            self._stretches.append((begin, end))

    def take(self) -> float:
        """Milliseconds in which any of it was under way, as far as done and not told before."""
        try:
            return self._told()
        except RuntimeError:
            return 0.0

    def _mark(self, stream: Stream) -> Event | None:
        try:
            event = self._device.event(timed=True)
            event.record(stream)
        except RuntimeError:
            return None
        return event

    def _told(self) -> float:
        done: list[tuple[Event, Event]] = []
        while self._stretches and self._stretches[0][1].query():
            done.append(self._stretches.popleft())
        anchor = self._anchor
        if not done or anchor is None:
            return 0.0
        # A float of milliseconds: from an anchor that moves along it stays exact to microseconds.
        times = ((anchor.elapsed_time(a), anchor.elapsed_time(b), b) for a, b in done)
        total, told = 0.0, 0.0
        for begin, end, event in sorted(times, key=lambda time: time[:2]):
            if end > told:
                total += end - max(begin, told)
                told, self._anchor = end, event
        return total
