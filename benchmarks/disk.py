# SPDX-License-Identifier: Apache-2.0
# The disk without the pager: how fast it is by itself, and what its transfers cost a computation
# that runs beside them.
"""Plain reads and writes of one file, past the page cache where that can be."""

from __future__ import annotations

import itertools
import mmap
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

THREADS = 2
"""Blocks under way at once in a direction; as many as the pager has readers, and writers."""


@contextmanager
def scratch() -> Iterator[int]:
    """A file of no name, opened for direct I/O (buffered where the file system has none)."""
    handle, path = tempfile.mkstemp(dir=os.environ.get("TMPDIR", "/var/tmp"))
    os.close(handle)
    try:
        try:
            handle = os.open(path, os.O_RDWR | os.O_DIRECT)
        except OSError:  # the pager does the same
            handle = os.open(path, os.O_RDWR)
    finally:
        os.unlink(path)
    try:
        yield handle
    finally:
        os.close(handle)


def random_buffer(size: int) -> mmap.mmap:
    """Memory aligned to a page, which direct I/O needs."""
    buffer = mmap.mmap(-1, size)
    buffer.write(os.urandom(size))
    return buffer


def move(handle: int, buffer: mmap.mmap, offset: int, writes: bool) -> None:
    """Moves one block.

    Raises:
        OSError: It was moved in part.
    """
    moved = (os.pwritev if writes else os.preadv)(handle, [buffer], offset)
    if moved != len(buffer):
        raise OSError(f"{moved} of {len(buffer)} bytes at {offset} were moved")


def disk_gbps(mebibytes: int, block: int) -> tuple[float, float]:
    """The disk's own speed.

    Args:
        mebibytes: Size of the file.
        block: Bytes moved at once.

    Returns:
        GB/s in (read) and out (written).
    """
    blocks = max(THREADS, (mebibytes << 20) // block)
    buffers = [random_buffer(block) for _ in range(THREADS)]
    rates = []
    with scratch() as handle, ThreadPoolExecutor(THREADS) as pool:

        def share(thread: int, writes: bool) -> None:
            for index in range(thread, blocks, THREADS):
                move(handle, buffers[thread], index * block, writes)

        for writes in (True, False):
            begin = time.perf_counter()
            list(pool.map(share, range(THREADS), [writes] * THREADS))
            rates.append(blocks * block / (time.perf_counter() - begin) / 1e9)
    return rates[1], rates[0]


class BareCopies:
    """Moves so many bytes in and out in the background, and does nothing with them.

    Args:
        block: Bytes moved at once.
    """

    def __init__(self, block: int) -> None:
        self._block = block
        self._file = scratch()
        self._handle = self._file.__enter__()
        self._pools = [ThreadPoolExecutor(THREADS) for _ in range(2)]
        self._buffers = [[random_buffer(block) for _ in range(THREADS)] for _ in range(2)]
        self._under_way: list[Future[None]] = []
        self._blocks = 0

    def start(self, bytes_in: int, bytes_out: int) -> None:
        """Waits for the copies before, then starts these."""
        self.wait()
        for writes, size in ((False, bytes_in), (True, bytes_out)):
            blocks = size // self._block
            self._reserve(blocks)
            turns = itertools.cycle(range(THREADS))
            shares: list[list[int]] = [[] for _ in range(THREADS)]
            for index, thread in zip(range(blocks), turns, strict=False):
                shares[thread].append(index)
            for thread, share in enumerate(shares):
                pool, buffer = self._pools[writes], self._buffers[writes][thread]
                self._under_way.append(pool.submit(self._move, buffer, share, writes))

    def _reserve(self, blocks: int) -> None:
        """Writes the file as far as it will be read."""
        while self._blocks < blocks:
            move(self._handle, self._buffers[1][0], self._blocks * self._block, writes=True)
            self._blocks += 1

    def _move(self, buffer: mmap.mmap, share: list[int], writes: bool) -> None:
        for index in share:
            move(self._handle, buffer, index * self._block, writes)

    def wait(self) -> None:
        """Until nothing is under way."""
        for copy in self._under_way:
            copy.result()
        self._under_way = []
