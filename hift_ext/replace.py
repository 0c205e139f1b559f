# SPDX-License-Identifier: Apache-2.0
"""A directory that is replaced whole or not at all, whatever ends the process.

Work in progress is `NAME.tmp-PID-RANDOM` beside it, locked while its process lives.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import os
import re
import secrets
import shutil
import time
from pathlib import Path

from typing_extensions import Self

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_SUFFIX = re.compile(r"\.tmp-\d+-[0-9a-f]{8}(\.old)?")
_OLD = ".old"
_PATIENCE_S = 10.0


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems keep names by themselves
            raise
    finally:
        os.close(handle)


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two names at once. Returns whether the system can."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    names = os.fsencode(a), os.fsencode(b)
    if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, f"cannot exchange {a} and {b}: {os.strerror(code)}")


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock, or None: someone else has it, or it is gone."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(handle).st_nlink > 0:
            return handle
    except OSError:
        pass
    os.close(handle)
    return None


def _leftovers(target: Path) -> list[Path]:
    found = glob.glob(glob.escape(str(target)) + ".tmp-*")
    return [Path(name) for name in found if _SUFFIX.fullmatch(name[len(str(target)) :])]


def recover(target: Path) -> None:
    """Puts the old directory back where a process died between two renames.

    Raises:
        TimeoutError: A living process is between them for too long.
    """
    deadline = time.monotonic() + _PATIENCE_S
    while not os.path.lexists(target):
        olds = [path for path in _leftovers(target) if path.name.endswith(_OLD)]
        if not olds:
            return
        try:
            newest = max(olds, key=lambda path: path.stat().st_mtime)
        except FileNotFoundError:  # its process has finished
            continue
        work = newest.with_name(newest.name[: -len(_OLD)])
        handle = _lock(work)
        if handle is not None or not work.exists():
            try:
                if not os.path.lexists(target):
                    os.rename(newest, target)
                return
            except FileNotFoundError:  # another one that recovers was quicker
                continue
            finally:
                if handle is not None:
                    os.close(handle)
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"another process has been replacing {target} for {_PATIENCE_S} s; if there is "
                f"none, rename {newest} to {target}"
            )
        time.sleep(0.05)


def sweep(target: Path) -> None:
    """Removes what dead processes left beside `target`, and nothing of living ones."""
    for path in _leftovers(target):
        handle = _lock(path)
        if handle is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(handle)


class Replacement:
    """The next content of a directory. Use as a context manager; without `publish` it is dropped.

    Args:
        target: The directory, which may exist or not; its parent must.

    Attributes:
        folder: Where to put the files.
    """

    def __init__(self, target: Path) -> None:
        self._target = target
        self._published = False
        for _ in range(16):
            name = f"{target.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
            self.folder = target.with_name(name)
            try:
                os.mkdir(self.folder)
            except FileExistsError:
                continue
            handle = self._own_lock()
            if handle is not None:
                self._handle = handle
                return
        raise OSError(errno.EAGAIN, f"other processes keep removing {target}.tmp-*")

    def _own_lock(self) -> int | None:
        try:
            handle = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:  # someone's `sweep` was quicker
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # a `sweep` has it, and will remove it
            os.close(handle)
            return None
        except OSError:  # a file system without locks: nobody can sweep there either
            return handle
        if os.fstat(handle).st_nlink == 0:
            os.close(handle)
            return None
        return handle

    def publish(self) -> None:
        """Puts the folder in the target's place; its files must be on the disk."""
        sync_folder(self.folder)
        old = self.folder
        if not os.path.lexists(self._target) and self._take_free_name():
            pass
        elif not _exchange(self.folder, self._target):
            old = self.folder.with_name(self.folder.name + _OLD)
            os.rename(self._target, old)
            # Dying here leaves no directory: `recover` puts the old one back.
            try:
                os.rename(self.folder, self._target)
            except BaseException:
                os.rename(old, self._target)
                raise
        self._published = True
        sync_folder(self._target.parent)
        shutil.rmtree(old, ignore_errors=True)  # or the next `sweep` does

    def _take_free_name(self) -> bool:
        try:
            os.rename(self.folder, self._target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                return False  # another process was quicker
            raise
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._published:
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._handle)
