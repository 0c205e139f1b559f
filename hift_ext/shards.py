# SPDX-License-Identifier: Apache-2.0
"""Safetensors files that are written and read a piece at a time, with checksums of every byte.

The safetensors library wants all tensors in memory; here a tensor passes through small buffers.
Data is summed by XXH3, in a fraction of the time that a copy takes; the small headers by CRC-32.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from typing_extensions import Self

BUFFER_BYTES = 1 << 20
"""Of each of the two buffers: below the smallest default page, and large enough for a disk."""

FLUSH_BYTES = 8 << 20
"""After so many bytes the system is told to begin writing them."""

DTYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
}
"""As safetensors spells them."""


class TensorSpec(NamedTuple):
    """One tensor of a shard."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, incomplete or of another kind; the message names the file."""


def _head(places: Iterable[tuple[int, TensorSpec]], block: int = 4096) -> bytes:
    """The head of a file with tensors at these bytes of its data, which begin on a block."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for begin, tensor in places:
        entries[tensor.key] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, begin + tensor.bytes],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % block)
    return len(text).to_bytes(8, "little") + text


def header_of(tensors: Sequence[TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """The head of a safetensors file, and where each tensor's data begins in the file (bytes)."""
    begin, places = 0, []
    # Wider types first, so that every tensor is aligned to its type.
    for tensor in sorted(tensors, key=lambda t: -t.dtype.itemsize):
        places.append((begin, tensor))
        begin += tensor.bytes
    head = _head(places)
    return head, {tensor.key: len(head) + begin for begin, tensor in places}


def head_over(places: Iterable[tuple[int, TensorSpec]], size: int, block: int) -> bytes:
    """The head of a safetensors file whose data are laid out already.

    What lies between tensors is tensors, too, `unused[begin:end]`: readers refuse gaps.

    Args:
        places: Where each tensor begins in the data (bytes), in ascending order.
        size: Bytes of the data.
        block: The data begin at a multiple of it in the file.
    """
    end, all_places = 0, []
    for begin, tensor in (*places, (size, TensorSpec("", torch.uint8, (0,)))):
        assert begin >= end, f"{tensor.key} begins at {begin}, before {end}"
        if begin > end:
            all_places.append(
                (end, TensorSpec(f"unused[{end}:{begin}]", torch.uint8, (begin - end,)))
            )
        all_places.append((begin, tensor))
        end = begin + tensor.bytes
    return _head(all_places[:-1], block)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    array: Any = tensor.view(torch.uint8).numpy()
    return memoryview(array)


class ShardWriter:
    """Writes one file; pieces of a tensor come in order, tensors in any. A context manager.

    Args:
        path: The file, which must not exist.
        tensors: What it will hold.

    Attributes:
        size: Bytes of the whole file.
        head_bytes: Bytes before the first tensor's data.
        head_crc32: Checksum of these.
    """

    def __init__(self, path: Path, tensors: Sequence[TensorSpec]) -> None:
        self.path = path
        head, self._offsets = header_of(tensors)
        self.size = len(head) + sum(tensor.bytes for tensor in tensors)
        self.head_bytes, self.head_crc32 = len(head), zlib.crc32(head)
        self._sums = {tensor.key: xxhash.xxh3_64() for tensor in tensors}
        self._unflushed = 0
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            self._write(memoryview(head), 0)
        except BaseException:
            os.close(self._file)
            raise

    def _write(self, data: memoryview, offset: int) -> None:
        try:
            while data:
                written = os.pwrite(self._file, data, offset)
                data, offset = data[written:], offset + written
        except OSError as error:
            raise explained(error, self.path, self.size) from error

    def xxh3(self, key: str) -> str:
        """Checksum of a tensor's bytes so far."""
        return self._sums[key].hexdigest()

    def write(self, key: str, begin: int, data: memoryview) -> None:
        """Writes a tensor's next bytes, which begin at `begin`. For one thread at a time."""
        if not data:
            return
        self._sums[key].update(data)
        self._write(data, self._offsets[key] + begin)
        self._unflushed += len(data)
        if self._unflushed >= FLUSH_BYTES:
            self._unflushed = 0
            # Left alone, the system would write most of it only when it is waited for.
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Waits until the disk has all of it."""
        try:
            if kind is None:
                os.fsync(self._file)
        except OSError as error:
            raise explained(error, self.path, self.size) from error
        finally:
            os.close(self._file)


def explained(error: OSError, path: Path, size: int) -> OSError:
    """The same error, with what to do."""
    space = os.statvfs(path.parent)
    return OSError(
        error.errno,
        f"cannot write {path} of {size} bytes: {error.strerror}; {space.f_bavail * space.f_frsize} "
        "bytes are free there: make room, raise 'ulimit -f' or the quota, or save elsewhere. What "
        "was saved before is as it was",
    )


class Pieces:
    """Two buffers in turn: while one is written, the other is filled.

    Use as a context manager; an error of a write comes out of a later call, at the latest at the
    end of the `with`.
    """

    def __init__(self) -> None:
        self._buffers = [torch.empty(BUFFER_BYTES, dtype=torch.uint8) for _ in range(2)]
        self._busy: list[Future[None] | None] = [None, None]
        self._writer = ThreadPoolExecutor(1)  # one thread: a tensor's pieces stay in order
        self._turn = 0

    def buffer(self, dtype: torch.dtype, count: int) -> torch.Tensor:
        """Room for `count` elements, at most BUFFER_BYTES, to be filled and handed to `write`."""
        self._turn ^= 1
        self._wait(self._turn)
        return self._buffers[self._turn][: count * dtype.itemsize].view(dtype)

    def write(self, shard: ShardWriter, key: str, begin: int, value: torch.Tensor) -> None:
        """Writes the last buffer to a tensor, from byte `begin` on."""
        data = bytes_of(value)
        self._busy[self._turn] = self._writer.submit(shard.write, key, begin, data)

    def _wait(self, turn: int) -> None:
        future, self._busy[turn] = self._busy[turn], None
        if future is not None:
            future.result()

    def wait(self) -> None:
        """Until all is written."""
        for turn in range(2):
            self._wait(turn)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._writer.shutdown(wait=True, cancel_futures=True)


class ShardReader:
    """An open shard whose size and header are as its manifest says.

    Args:
        path: The file.
        size: Bytes it must have.
        head_bytes: Bytes before the first tensor's data.
        head_crc32: Checksum of these.

    Raises:
        CheckpointError: It is missing, of another size, or its header is damaged.
    """

    def __init__(self, path: Path, size: int, head_bytes: int, head_crc32: int) -> None:
        self.path = path
        self._buffer: memoryview | None = None
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise CheckpointError(f"the shard {path} is missing") from None
        try:
            self._opened = os.fstat(self._file)
            found = self._opened.st_size
            if found != size:
                what = "truncated" if found < size else "not the file that was saved"
                raise CheckpointError(f"the shard {path} is {what}: {found} bytes, not {size}")
            head = bytearray(head_bytes)
            self._read(memoryview(head), 0)
            if zlib.crc32(head) != head_crc32:
                raise CheckpointError(f"the shard {path} is corrupted: its header's checksum fails")
            entries: Mapping[str, Any] = json.loads(head[8:])
            self._places = {
                key: tuple(head_bytes + at for at in entry["data_offsets"])
                for key, entry in entries.items()
                if key != "__metadata__"
            }
        except BaseException:
            os.close(self._file)
            raise

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)

    def check_unchanged(self) -> None:
        """Whether nobody has written to the file since it was opened.

        Raises:
            CheckpointError: Somebody has.
        """
        now, then = os.fstat(self._file), self._opened
        if (now.st_size, now.st_mtime_ns) != (then.st_size, then.st_mtime_ns):
            raise CheckpointError(f"the shard {self.path} was changed while it was read")

    def _read(self, data: memoryview, offset: int) -> None:
        while data:
            count = os.preadv(self._file, [data], offset)
            if count == 0:
                raise CheckpointError(f"the shard {self.path} became shorter while it was read")
            data, offset = data[count:], offset + count

    def read(self, key: str, begin: int, data: memoryview) -> None:
        """Reads a tensor's bytes from `begin` on, while the system fetches as many behind them."""
        first, end = self._places[key]
        at, size = first + begin, len(data)
        # Streams are read in turns, which the system's own read-ahead takes for jumps.
        ahead = min(size, end - at - size)
        if ahead > 0:
            os.posix_fadvise(self._file, at + size, ahead, os.POSIX_FADV_WILLNEED)
        self._read(data, at)

    def check_present(self, keys: Iterable[str]) -> None:
        """Whether these tensors are in it.

        Raises:
            CheckpointError: One is not.
        """
        absent = sorted(set(keys) - self._places.keys())
        if absent:
            raise CheckpointError(f"the shard {self.path} holds no {absent[0]!r}")

    def verify(
        self, xxh3: Mapping[str, str], read: Callable[[int], object] = lambda size: None
    ) -> None:
        """Reads tensors once.

        Args:
            xxh3: The checksum each must have.
            read: Is told of the bytes read, piece by piece.

        Raises:
            CheckpointError: One has another checksum.
        """
        for key in sorted(xxh3, key=lambda key: self._places[key]):
            self.check(key, self.sum(key, read), xxh3[key])

    def sum(self, key: str, read: Callable[[int], object]) -> str:
        """The checksum of a tensor as it is in the file; `read` is told of the bytes read."""
        if self._buffer is None:
            self._buffer = memoryview(bytearray(BUFFER_BYTES))
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        (begin, end), total = self._places[key], xxhash.xxh3_64()
        for at in range(begin, end, BUFFER_BYTES):
            data = self._buffer[: min(BUFFER_BYTES, end - at)]
            self._read(data, at)
            total.update(data)
            read(len(data))
        return total.hexdigest()

    def forget(self, key: str) -> None:
        """What lies before a tensor's end need not stay in the system's memory."""
        # Not what lies behind it: the system has begun to read that.
        os.posix_fadvise(self._file, 0, self._places[key][1], os.POSIX_FADV_DONTNEED)

    def check(self, key: str, found: str, expected: str) -> None:
        """Compares a tensor's checksum with what it must be.

        Raises:
            CheckpointError: They differ.
        """
        if found != expected:
            raise CheckpointError(
                f"the shard {self.path} is corrupted: the checksum of {key!r} is {found}, not "
                f"{expected}"
            )
