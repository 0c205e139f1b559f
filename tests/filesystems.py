# SPDX-License-Identifier: Apache-2.0
# File systems in files, mounted for a test that needs what the disk here may not have: sharing of
# blocks, or its absence. For root, where the system has loop devices and the programs.
"""XFS, Btrfs and ext4 of a test's own."""

from __future__ import annotations

import array
import fcntl
import functools
import gc
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

IMAGES = {
    "xfs": (["mkfs.xfs", "-q"], 320 << 20),  # its least is 300 MiB
    "btrfs": (["mkfs.btrfs", "-q"], 256 << 20),
    "ext4": (["mkfs.ext4", "-q"], 96 << 20),
}
"""How each is made, and its size; files with holes, so that little of that is taken."""

PROGRAMS = {
    **os.environ,
    "PATH": os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]),
}

_FIEMAP, _SYNC, _SHARED = 0xC020660B, 1, 0x2000
_EXTENTS = 1024


def run(*command: str | os.PathLike[str]) -> None:
    """Runs a program of the system's."""
    subprocess.run(command, check=True, capture_output=True, env=PROGRAMS)


@contextmanager
def mounted(kind: str, folder: Path) -> Iterator[Path]:
    """An empty file system, made and mounted in `folder`."""
    command, size = IMAGES[kind]
    image, place = folder / f"{kind}.image", folder / kind
    image.touch()
    os.truncate(image, size)
    place.mkdir()
    run(*command, image)
    run("mount", "-o", "loop", image, place)
    try:
        yield place
    finally:
        gc.collect()  # optimizers that a failed test has left open
        try:
            run("umount", place)
        except subprocess.CalledProcessError:
            run("umount", "--lazy", place)
        image.unlink()


@functools.cache
def can_mount(kind: str) -> bool:
    """Tries it."""
    if not shutil.which(IMAGES[kind][0][0], path=PROGRAMS["PATH"]):
        return False
    with tempfile.TemporaryDirectory() as folder:
        try:
            with mounted(kind, Path(folder)):
                return True
        except (OSError, subprocess.CalledProcessError):
            return False


def shared_bytes(path: Path) -> int:
    """How much of a file lies in blocks that another file has, too."""
    found, at = 0, 0
    with open(path, "rb") as file:
        while True:
            head = struct.pack("=QQIIII", at, (1 << 64) - 1 - at, _SYNC, 0, _EXTENTS, 0)
            buffer = array.array("B", head + bytes(56 * _EXTENTS))
            fcntl.ioctl(file, _FIEMAP, buffer)
            count = struct.unpack_from("=I", buffer, 20)[0]
            for number in range(count):
                place = struct.unpack_from("=QQQQQI", buffer, 32 + 56 * number)
                found += place[2] if place[5] & _SHARED else 0
                at = place[0] + place[2]
            if count < _EXTENTS:
                return found
