# SPDX-License-Identifier: Apache-2.0
"""How fast bytes move: in host memory, to and from a disk, and over a GPU's link.

Each function measures now; probe.py keeps what they find.
"""

from __future__ import annotations

import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from hift_ext import ops

Advance = Callable[[float], None]
"""Is told how many bytes more were moved."""

ROUNDS = 5
"""Each rate is the median of so many, taken in turns."""

THREADS = 2
"""Blocks of a file under way at once: as many as the pager has readers, and writers."""

BLOCK_BYTES = 4 << 20
"""Of a file: a page's usual record on the CPU."""

SMALL_BYTES = 4096
"""A copy whose time is all latency."""

_SMALL_COPIES = 64
_TO_DEVICE, _TO_HOST, _ON_DEVICE = range(3)


@dataclass(frozen=True)
class HostRates:
    """Bytes/s of host memory: `copy` counts each byte once, and reads and writes it."""

    copy: float


@dataclass(frozen=True)
class DiskRates:
    """Bytes/s of page files; `direct` tells whether they go past the page cache (1) or not (0)."""

    read: float
    write: float
    direct: float


@dataclass(frozen=True)
class BusRates:
    """Bytes/s between host memory and a GPU.

    Attributes:
        to_device: Copies alone.
        to_host: Copies alone.
        both_ways: Copies in both directions at once; each way.
        device_copy: Within the device; each byte counted once, though read and written.
        zero_copy_read: A kernel reading host memory where it is.
        zero_copy_update: The update kernel changing state in host memory; each way.
        copy_latency_s: Seconds a copy of few bytes takes among others.
    """

    to_device: float
    to_host: float
    both_ways: float
    device_copy: float
    zero_copy_read: float
    zero_copy_update: float
    copy_latency_s: float


def host_rates(size: int, advance: Advance) -> HostRates:
    """Copies `size` bytes on torch's threads."""
    source = torch.ones(size, dtype=torch.uint8, device="cpu")
    target = torch.zeros_like(source)
    target.copy_(source)  # memory is committed by its first touch
    times = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - begin)
        advance(size)
    return HostRates(size / statistics.median(times))


def disk_rates(folder: str, size: int, advance: Advance) -> DiskRates:
    """Writes and reads a file of no name in `folder`, in blocks, as a page file is.

    Args:
        folder: On the disk.
        size: Bytes of the file, rounded up to blocks for every thread.
        advance: Is told twice `size` in all.

    Raises:
        OSError: The disk refuses, or has no room.
    """
    blocks = max(-(-size // BLOCK_BYTES), THREADS)
    rates = {}
    with _unlinked(folder) as (handle, direct), ThreadPoolExecutor(THREADS) as pool:
        buffers = [mmap.mmap(-1, BLOCK_BYTES) for _ in range(THREADS)]  # aligned, for O_DIRECT
        for buffer in buffers:
            buffer.write(os.urandom(BLOCK_BYTES))  # what a file system cannot compress

        def move(thread: int, call: Callable[[int, Sequence[mmap.mmap], int], int]) -> None:
            for index in range(thread, blocks, THREADS):
                moved = call(handle, [buffers[thread]], index * BLOCK_BYTES)
                if moved != BLOCK_BYTES:
                    raise OSError(f"{moved} of {BLOCK_BYTES} bytes of {folder} were moved")
                advance(BLOCK_BYTES * size / (blocks * BLOCK_BYTES))

        for name, call in (("write", os.pwritev), ("read", os.preadv)):
            begin = time.perf_counter()
            list(pool.map(move, range(THREADS), [call] * THREADS))
            if name == "write" and not direct:
                os.fdatasync(handle)
            rates[name] = blocks * BLOCK_BYTES / (time.perf_counter() - begin)
            if not direct:  # what was written is to be read from the disk
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    return DiskRates(rates["read"], rates["write"], float(direct))


@contextmanager
def _unlinked(folder: str) -> Iterator[tuple[int, bool]]:
    """A file of no name, and whether it is past the page cache."""
    made, path = tempfile.mkstemp(prefix=".hift-probe-", dir=folder)
    try:
        try:
            handle, direct = os.open(path, os.O_RDWR | os.O_DIRECT), True
            try:
                os.preadv(handle, [mmap.mmap(-1, SMALL_BYTES)], 0)
            except OSError:  # it took the flag and refuses the access
                os.close(handle)
                raise
        except OSError:
            handle, direct = os.open(path, os.O_RDWR), False
    finally:
        os.close(made)
        os.unlink(path)
    try:
        yield handle, direct
    finally:
        os.close(handle)


def bus_rates(device: torch.device, size: int, advance: Advance) -> BusRates:
    """Copies between registered host memory and a GPU, and runs kernels on host memory.

    Args:
        device: A CUDA device whose kernels are built.
        size: Bytes of each of two ranges on the host and two on the device; a multiple of 4 KiB.
        advance: Is told `size` for every range moved each way.

    Raises:
        RuntimeError: CUDA refuses to lock the host's memory, or a copy.
        torch.OutOfMemoryError: The device has no room.
    """
    host = [torch.frombuffer(ops.host_slab(size), dtype=torch.uint8) for _ in range(2)]
    near, far = (ops.cuda_memory(size, device) for _ in range(2))
    addresses = [memory.data_ptr() for memory in (*host, near, far)]
    bus = ops.ext.Bus(*addresses, size, device.index)
    sgd, momentum = (ops.kind(rule, torch.float32, torch.float32) for rule in ("sgd", "momentum"))

    def run(param: int, grad: int, kind: int, state: tuple[int, ...], hyper: list[float]) -> None:
        # A rate of 0: whatever is in these ranges, an update leaves the weights.
        row = (param, grad, size // 4, kind, state, [1.0, *hyper])
        ops.ext.cuda_step_spans([row], 0, 0, 0, device.index, bus.stream)

    def both() -> None:
        bus.copy(_TO_DEVICE, size)
        bus.copy(_TO_HOST, size)

    source, target = bus.mapped_source, bus.mapped_target
    runs: dict[str, Callable[[], None]] = {
        "to_device": lambda: bus.copy(_TO_DEVICE, size),
        "to_host": lambda: bus.copy(_TO_HOST, size),
        "both_ways": both,
        "device_copy": lambda: bus.copy(_ON_DEVICE, size),
        "zero_copy_read": lambda: run(addresses[3], source, sgd, (), [0.0, 0.0]),
        "zero_copy_update": lambda: run(
            addresses[2], addresses[3], momentum, (target,), [0.0, 0.0, 0.9, 0.1, 0.0, 0.0]
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in [*runs, "small"]}
    for number in range(ROUNDS + 1):
        for name, work in runs.items():
            bus.start()
            work()
            taken = bus.stop()
            if number > 0:  # the first commits memory and loads kernels
                times[name].append(taken)
                advance(size)
        bus.start()
        for _ in range(_SMALL_COPIES):
            bus.copy(_TO_DEVICE, SMALL_BYTES)
        times["small"].append(bus.stop())
    ms = {name: statistics.median(taken) for name, taken in times.items()}
    return BusRates(
        **{name: 1e3 * size / ms[name] for name in runs},
        copy_latency_s=1e-3 * ms["small"] / _SMALL_COPIES,
    )
