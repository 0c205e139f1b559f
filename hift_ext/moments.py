# SPDX-License-Identifier: Apache-2.0
"""Moments of a step, and what memory holds then, without making anybody wait.

On a GPU a moment is an event in the stream, and its time is read when it has passed.
"""

from __future__ import annotations

import os
import time
from typing import Any, Protocol

import torch

from hift_ext.torch_device import CudaDevice

Moment = Any
"""What a clock's `now` gives."""


class Clock(Protocol):
    """Tells when something happened where the work is done."""

    def now(self) -> Moment:
        """This moment; its time may be asked for later."""

    def passed(self, moment: Moment) -> bool:
        """Whether its time is known."""

    def seconds(self, moment: Moment) -> float:
        """Its time, as time.perf_counter() counts."""

    def wait(self) -> None:
        """Until all moments have passed."""


class HostClock:
    """For work that is done when a call returns."""

    def now(self) -> Moment:
        """The time."""
        return time.perf_counter()

    def passed(self, moment: Moment) -> bool:
        """Always."""
        return True

    def seconds(self, moment: Moment) -> float:
        """The same number."""
        return float(moment)

    def wait(self) -> None:
        """Nothing to wait for."""


class CudaClock:
    """For work that is queued on a GPU's current stream.

    Args:
        device: The GPU; tests put a simulated one in its place.
    """

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        # Once: events are related to the host's clock by one on a stream without work.
        idle = device.stream()
        self._anchor = device.event(timed=True)
        before = time.perf_counter()
        self._anchor.record(idle)
        idle.synchronize()
        self._at = (before + time.perf_counter()) / 2

    def now(self) -> Moment:
        """An event behind the work queued so far."""
        event = self._device.event(timed=True)
        event.record(self._device.current())
        return event

    def passed(self, moment: Moment) -> bool:
        """Whether the work before it is done."""
        return bool(moment.query())

    def seconds(self, moment: Moment) -> float:
        """When it was done."""
        return self._at + float(self._anchor.elapsed_time(moment)) / 1e3

    def move(self, moment: Moment) -> None:
        """Counts from a moment that has passed: CUDA's float would get coarse over hours."""
        self._at, self._anchor = self.seconds(moment), moment

    def wait(self) -> None:
        """Until the GPU has done all its work."""
        self._device.synchronize()


def clock_of(device: torch.device) -> Clock:
    """The clock of work on `device`."""
    return CudaClock(CudaDevice(device)) if device.type == "cuda" else HostClock()


class Memory:
    """Bytes that are taken: of the GPU by torch's tensors, or of the host by this process."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._file = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        self._page = os.sysconf("SC_PAGE_SIZE")
        self.highest = 0

    def rss(self) -> int:
        """Bytes of host memory that this process holds."""
        return self._page * int(os.pread(self._file, 128, 0).split()[1])

    def look(self) -> int:
        """What is taken now; `highest` keeps the most until it is set back."""
        taken = self.rss() if self._cuda is None else torch.cuda.memory_allocated(self._cuda)
        self.highest = max(self.highest, taken)
        return taken

    def facts(self) -> dict[str, int]:
        """What a step's line says of memory; the highest since the line before."""
        taken, highest = self.look(), self.highest
        self.highest = 0
        if self._cuda is None:
            return {"rss_bytes": taken, "rss_highest_bytes": highest}
        return {
            "rss_bytes": self.rss(),
            "cuda_bytes": taken,
            "cuda_highest_bytes": highest,
            "cuda_peak_bytes": torch.cuda.max_memory_allocated(self._cuda),
        }

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)
