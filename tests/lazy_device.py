# SPDX-License-Identifier: Apache-2.0
# A GPU for tests of paging in Python: host memory, and streams whose work runs in a random order
# that CUDA allows, drawn from a seed. What CUDA would let pass in silence is an error here.
"""A simulated device in the place of hift_ext.torch_device.CudaDevice."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable

import torch

POISON = 0x5B
POLICIES = ("random", "lazy", "eager", "starved")


class LazyEvent:
    """Versioned: who waits, waits for the last record before."""

    def __init__(self, device: LazyDevice) -> None:
        self.device, self.issued, self.done, self.at = device, 0, 0, 0

    def record(self, stream: LazyStream) -> None:
        self.device.call()
        self.issued += 1
        stream.push(("record", self, self.issued))

    def query(self) -> bool:
        self.device.call()
        return self.done >= self.issued

    def elapsed_time(self, end_event: LazyEvent) -> float:
        self.device.call()
        assert self.done == self.issued > 0, "a time is asked for that has not come"
        assert end_event.done == end_event.issued > 0, "a time is asked for that has not come"
        return float(end_event.at - self.at)


class LazyStream:
    """A queue of operations."""

    def __init__(self, device: LazyDevice) -> None:
        self.device, self.queue = device, deque()
        device.streams.append(self)

    def wait_event(self, event: LazyEvent) -> None:
        self.device.call()
        if event.issued:
            self.push(("wait", event, event.issued))

    def synchronize(self) -> None:
        self.device.call()
        while self.queue:
            self.device.need(self)

    def push(self, operation: tuple) -> None:
        self.queue.append(operation)
        self.device.drift()


class LazyDevice:
    """Runs what is queued when it must, and by chance before."""

    def __init__(self, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.policy = POLICIES[seed % len(POLICIES)]
        self.torch_device = torch.device("cpu")
        self.streams: list[LazyStream] = []
        self.compute = LazyStream(self)
        self.weights: dict[LazyStream, float] = {}
        self.blocks: list[torch.Tensor] = []
        self.registered: list[torch.Tensor] = []
        self.clock = self.calls = 0
        self.fails = -1
        self.errors: list[str] = []
        self.kept: list[object] = []  # torch frees memory behind the work queued on it

    def call(self) -> None:
        """One call of the runtime; the one that is to fail does."""
        self.calls += 1
        if self.calls - 1 == self.fails:
            raise RuntimeError("the simulated device refuses")

    # What CudaDevice offers ---------------------------------------------------------------------

    def stream(self) -> LazyStream:
        self.call()
        return LazyStream(self)

    def current(self) -> LazyStream:
        return self.compute

    def event(self, *, timed: bool = False) -> LazyEvent:
        self.call()
        return LazyEvent(self)

    def synchronize(self) -> None:
        for stream in self.streams:
            stream.synchronize()

    def allocate(self, size: int) -> torch.Tensor:
        """The block before is free by then; what it was used for may still run on this one."""
        self.call()
        self.check_idle("memory is freed")
        for old in self.blocks:
            old.fill_(POISON)
        block = torch.full((size,), POISON, dtype=torch.uint8)
        self.blocks = [block]
        self.compute.push(("work", lambda: block.fill_(POISON), False))
        return block

    def register(self, host: torch.Tensor) -> None:
        self.call()
        assert not any(self.within(host, other) for other in self.registered), "registered twice"
        self.registered.append(host)

    def release(self) -> None:
        self.check_idle("host memory is unlocked")
        self.registered.clear()

    def copy(self, to: torch.Tensor, source: torch.Tensor, stream: LazyStream) -> None:
        self.call()
        places = [
            any(self.within(side, area) for area in areas)
            for side, areas in ((to, self.blocks), (source, self.registered))
        ]
        back = [
            any(self.within(side, area) for area in areas)
            for side, areas in ((to, self.registered), (source, self.blocks))
        ]
        assert all(places) or all(back), "a copy that is not between the device and locked memory"
        middle = to.numel() // 2
        for half in (slice(0, middle), slice(middle, None)):
            stream.push(("work", lambda half=half: to[half].copy_(source[half]), True))

    def fill(self, to: torch.Tensor, value: float, stream: LazyStream) -> None:
        self.call()
        stream.push(("work", lambda: to.fill_(value), True))

    def run(self, work: Callable[[], None], stream: LazyStream) -> None:
        self.call()
        stream.push(("work", work, True))

    # What the test does -------------------------------------------------------------------------

    def compute_stream_does(self, work: Callable[[], None]) -> None:
        """Queues work that has nothing to do with pages, such as a backward pass."""
        self.compute.push(("work", work, False))

    @staticmethod
    def within(part: torch.Tensor, whole: torch.Tensor) -> bool:
        first, start = part.data_ptr(), whole.data_ptr()
        return start <= first and first + part.nbytes <= start + whole.nbytes

    def check_idle(self, when: str) -> None:
        for stream in self.streams:
            busy = any(kind == "work" and detail for kind, _, detail in stream.queue)
            if busy:  # an end has nobody to raise to
                self.errors.append(f"{when} while work on it is under way")

    # The order ----------------------------------------------------------------------------------

    def advance(self, stream: LazyStream) -> bool:
        """Runs the stream's next operation; False where it has to wait."""
        kind, what, detail = stream.queue[0]
        if kind == "wait" and what.done < detail:
            return False
        stream.queue.popleft()
        self.clock += 1
        if kind == "record":
            what.done, what.at = detail, self.clock
        elif kind == "work":
            what()
        return True

    def need(self, stream: LazyStream) -> None:
        """Runs the stream's next operation, and first what it waits for."""
        self.drift()
        if not stream.queue or self.advance(stream):
            return
        _, event, version = stream.queue[0]
        for other in self.streams:
            if any(kind == "record" and what is event for kind, what, _ in other.queue):
                while event.done < version:
                    self.need(other)
                return
        raise AssertionError("a wait for a record that nobody has queued")

    def drift(self) -> None:
        """Lets some of what may run do so."""
        if self.policy == "lazy":
            return
        often = 1 << 30 if self.policy == "eager" else self.random.choice((0, 0, 1, 3, 9))
        for _ in range(often):
            able = [s for s in self.streams if s.queue and self.able(s)]
            if not able:
                return
            chosen = self.random.choices(able, [self.weight(s) for s in able])[0]
            if self.weight(chosen) < 0.01 and self.random.random() > 0.01:
                return
            self.advance(chosen)

    @staticmethod
    def able(stream: LazyStream) -> bool:
        kind, what, detail = stream.queue[0]
        return kind != "wait" or what.done >= detail

    def weight(self, stream: LazyStream) -> float:
        """How readily a stream moves: one of them hardly does, where the policy is to starve."""
        if stream not in self.weights:
            low = self.policy == "starved" and self.random.random() < 0.5
            self.weights[stream] = 0.001 if low else self.random.uniform(0.2, 1)
        return self.weights[stream]
