# SPDX-License-Identifier: Apache-2.0
"""Memory that the system can write out: parts of mapped files without a name.

Copies of state that rests on disk lie here, so that asking for all of it does not take the memory
that paging saved.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref

import torch

_FIRST_BYTES = 1 << 20
_ALIGNMENT = 64


class Scratch:
    """Hands out parts of files, each twice as large as the one before.

    A file and its space are gone with the last tensor in it.

    Args:
        folder: Where the files are, on a disk.
    """

    def __init__(self, folder: str) -> None:
        self._folder = os.path.abspath(folder)
        self._file: weakref.ref[mmap.mmap] | None = None
        self._size = self._used = 0

    def take(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """A flat tensor with a storage of its own, not initialized.

        Raises:
            OSError: The disk has no room.
        """
        if count == 0:
            return torch.empty(0, dtype=dtype, device="cpu")
        needed = -(-dtype.itemsize * count // _ALIGNMENT) * _ALIGNMENT
        file = None if self._file is None else self._file()
        if file is None or self._used + needed > self._size:
            self._size = max(needed, _FIRST_BYTES if file is None else 2 * self._size)
            file = self._new(self._size)
            self._file, self._used = weakref.ref(file), 0
        part = torch.frombuffer(file, dtype=dtype, count=count, offset=self._used)
        self._used += needed
        return part

    def _new(self, size: int) -> mmap.mmap:
        try:
            with tempfile.TemporaryFile(dir=self._folder, prefix=".hift-") as file:
                # A page that finds no room later would end the process.
                os.posix_fallocate(file.fileno(), 0, size)
                return mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot reserve {size} bytes in {self._folder} for a copy of optimizer state: "
                f"{error.strerror}. Make room there, or use hift_ext.save, which needs none",
            ) from error
