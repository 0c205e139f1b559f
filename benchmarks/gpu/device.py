# SPDX-License-Identifier: Apache-2.0
# The GPU as the sections see it: where tensors go, on which stream work is queued, how it is timed,
# what memory is taken. simulated.py has the same for a machine without one.
"""The device under test."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch

REGISTER_PORTABLE_AND_MAPPED = 3  # cudaHostRegisterPortable | cudaHostRegisterMapped

CONTEXT_GROWTH = 512 << 20
"""Bytes that kernels take when they are first used."""


class Memory(NamedTuple):
    """Bytes of the device: allocated now, allocated at the peak, and reserved at the peak."""

    allocated: int
    peak: int
    reserved_peak: int


class Device(Protocol):
    """What sections ask for."""

    dry: bool
    tensors: torch.device
    """Where tensors of the device live."""
    index: int
    """The number that the compiled module knows it by."""

    def size(self, real: Any, dry: Any) -> Any:
        """The size to work at."""

    def stream(self) -> int:
        """The handle of the stream that work is queued on."""

    def synchronize(self) -> None:
        """Waits for all work on the stream; the engine's copies go on."""

    def settle(self) -> None:
        """Called between a step and what the host may do next; the device keeps its own order."""

    def host(self) -> Any:
        """A context in which optimizers run on the CPU."""

    def clock(self, run: Callable[[], object], repeats: int) -> float:
        """Milliseconds of one `run`, on the device's clock, over `repeats` in a row."""

    def beside(self, runs: Sequence[Callable[[], object]]) -> None:
        """Queues each of `runs` on a stream of its own; the current stream waits for all."""

    def registered(self, host: torch.Tensor) -> Any:
        """A context in which host memory is registered; gives the device's view of it."""

    def memory(self) -> Memory:
        """Bytes in use."""

    def reset_peak(self) -> None:
        """Starts a new peak."""

    def empty_cache(self) -> None:
        """Gives back what torch keeps for later."""

    def cap(self, size: int) -> int:
        """Lets torch take so much that with the context it is `size` bytes; gives torch's bytes."""

    def context_bytes(self) -> int:
        """Bytes of the device that are taken and are not torch's."""

    def info(self) -> dict[str, Any]:
        """Name, multiprocessors, memory, compute capability."""

    def sanitizer(self, tool: str, kind: str) -> list[str]:
        """The words before a command that run it under compute-sanitizer."""

    def check(self) -> None:
        """Raises for what went wrong unseen."""


class CudaDevice:
    """The first CUDA device that is visible."""

    dry = False
    index = 0

    def __init__(self) -> None:
        torch.cuda.init()
        self.tensors = torch.device("cuda", self.index)
        self._streams = [torch.cuda.Stream(self.tensors) for _ in range(2)]

    def size(self, real: Any, dry: Any) -> Any:
        return real

    def stream(self) -> int:
        return int(torch.cuda.current_stream(self.tensors).cuda_stream)

    def synchronize(self) -> None:
        torch.cuda.current_stream(self.tensors).synchronize()

    def settle(self) -> None:
        pass

    @contextmanager
    def host(self) -> Iterator[None]:
        yield

    def clock(self, run: Callable[[], object], repeats: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / repeats

    def beside(self, runs: Sequence[Callable[[], object]]) -> None:
        now = torch.cuda.current_stream(self.tensors)
        for stream, run in zip(self._streams, runs, strict=False):
            stream.wait_stream(now)
            with torch.cuda.stream(stream):
                run()
        for stream in self._streams:
            now.wait_stream(stream)

    @contextmanager
    def registered(self, host: torch.Tensor) -> Iterator[torch.Tensor]:
        cudart = torch.cuda.cudart()
        flags = REGISTER_PORTABLE_AND_MAPPED
        error = int(cudart.cudaHostRegister(host.data_ptr(), host.nbytes, flags))
        if error != 0:
            raise RuntimeError(f"cudaHostRegister of {host.nbytes} bytes: CUDA error {error}")
        try:
            # On every 64-bit system with unified addressing both sides use the host's address.
            storage = torch._C._construct_storage_from_data_pointer(
                host.data_ptr(), self.tensors, host.nbytes
            )
            view = torch.empty(0, dtype=host.dtype, device=self.tensors)
            yield view.set_(storage, 0, (host.numel(),), (1,))
        finally:
            torch.cuda.synchronize(self.tensors)  # no copy may use it any more
            cudart.cudaHostUnregister(host.data_ptr())

    def memory(self) -> Memory:
        return Memory(
            torch.cuda.memory_allocated(self.tensors),
            torch.cuda.max_memory_allocated(self.tensors),
            torch.cuda.max_memory_reserved(self.tensors),
        )

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.tensors)

    def empty_cache(self) -> None:
        self.synchronize()
        torch.cuda.empty_cache()

    def context_bytes(self) -> int:
        free, total = torch.cuda.mem_get_info(self.tensors)
        return int(total - free) - torch.cuda.memory_reserved(self.tensors)

    def cap(self, size: int) -> int:
        total = torch.cuda.get_device_properties(self.tensors).total_memory
        context = self.context_bytes()
        share = min(size, total) - context - CONTEXT_GROWTH
        torch.cuda.set_per_process_memory_fraction(share / total, self.tensors)
        return int(share)

    def info(self) -> dict[str, Any]:
        found = torch.cuda.get_device_properties(self.tensors)
        return {
            "card": found.name,
            "capability": f"sm_{found.major}{found.minor}",
            "sms": found.multi_processor_count,
            "card_memory_bytes": found.total_memory,
        }

    def sanitizer(self, tool: str, kind: str) -> list[str]:
        # Calls that return an error are checked by the product itself, and torch lets some fail.
        calls = ["--report-api-errors", "no"] if kind == "memcheck" else []
        return [tool, "--tool", kind, "--error-exitcode", "99", "--print-limit", "5", *calls]

    def check(self) -> None:
        torch.cuda.synchronize(self.tensors)


def open_device(dry: bool) -> Device:
    """The device of this process."""
    if not dry:
        return CudaDevice()
    from gpu.simulated import SimulatedDevice

    return SimulatedDevice()


def interleaved(
    device: Device, runs: Mapping[str, Callable[[], object]], rounds: int, repeats: int = 3
) -> dict[str, list[float]]:
    """Milliseconds of each run, `rounds` of them; index r of all names is from one round."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()  # makes state, compiles, loads modules
    order = list(runs)
    for _ in range(rounds):
        for name in order:
            samples[name].append(device.clock(runs[name], repeats))
        order = order[1:] + order[:1]  # clocks and heat drift: nobody is always first
    return samples


def median_ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """The median of the ratios of samples that were taken in the same round."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))
