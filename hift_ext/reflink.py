# SPDX-License-Identifier: Apache-2.0
"""A shard whose data are a page file's own blocks, shared by the file system and not copied.

XFS, Btrfs and others can (a reflink): what steps write to the page file later goes to new blocks.
The header says which bytes are which tensor's; checksums are made of what the new file gives.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct
import zlib
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hift_ext.engines import PagedEngine, StateEngine
from hift_ext.homes import Home
from hift_ext.manifest import Piece, SavedStream
from hift_ext.shards import FLUSH_BYTES, ShardReader, TensorSpec, explained, head_over

if TYPE_CHECKING:
    from hift_ext.progress import Progress

FICLONERANGE = 0x4020940D
"""The request of linux/fs.h: share a range of one file's blocks with another file."""

MOST_HEAD_BYTES = 100_000_000
"""The safetensors library reads no larger header."""

_CANNOT = {errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY}
_BLOCKS = 4096, 65536  # the least and the largest that files are aligned to here

log = logging.getLogger("hift_ext")


class NotSharedError(Exception):
    """Why a page file has to be copied."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Values of a run of a parameter's elements, in one page of the page file.

    Attributes:
        at: First byte in the page file.
        spec: The tensor that they are.
        index: Of the parameter.
        stream: Its name.
        begin: First element.
        count: Elements.
    """

    at: int
    spec: TensorSpec
    index: int
    stream: str
    begin: int
    count: int


@dataclass(frozen=True)
class Shared:
    """A shard that was written without copying.

    Attributes:
        facts: What the manifest has of it.
        pieces: By index of the parameter and name of the stream.
        left: What lies in pages that were never written, and has to be copied.
    """

    facts: dict[str, int]
    pieces: list[tuple[int, str, Piece]]
    left: list[Home]


def share(
    engine: StateEngine | None,
    homes: Sequence[Home],
    path: Path,
    target: Path,
    ranks: int,
    shown: Progress,
) -> Shared | None:
    """Writes what rests in a page file to a new shard by sharing its blocks, if that can be done.

    Args:
        engine: What keeps the state.
        homes: What to save of it.
        path: The shard.
        target: The checkpoint, for the log.
        ranks: How many do the same on the same file system.
        shown: Is told of the bytes that have their checksum.

    Returns:
        None, and no file, where all is to be copied; where there is a page file the log says why.

    Raises:
        OSError: The disk is full or fails.
    """
    if not isinstance(engine, PagedEngine) or engine._engine.file < 0:
        return None
    cuts: list[Cut] = []
    left = []
    for home in homes:
        found = _cuts(engine._engine, home)
        cuts += found or []
        if found is None:
            left.append(home)
    cuts.sort(key=lambda cut: (cut.at, cut.spec.bytes))
    if not any(cut.spec.bytes for cut in cuts):
        return None
    try:
        _write_back(engine)
        facts = _clone(engine._engine.file, path, cuts, ranks)
    except NotSharedError as why:
        # Its words: whoever keeps the record must not keep the engine with it.
        log.info("%s: the page file is copied: %s", target, str(why))
        return None
    log.info("%s: blocks of the page file are shared, not copied (a reflink)", target)
    sums = _sums(path, facts, cuts, shown)
    pieces = [
        (cut.index, cut.stream, Piece(path.name, key, cut.begin, cut.count, sums[key]))
        for cut in cuts
        for key in (cut.spec.key,)
    ]
    return Shared(facts, pieces, left)


def _cuts(engine: Any, home: Home) -> list[Cut] | None:
    """The home's tensors as they lie in the page file; None: not all of them do."""
    param = home.param
    places = engine.places(home.entry.group, home.entry.item)
    if not all(touched for _, touched, _ in places):
        return None
    if len(places) < 2:
        offsets = places[0][2] if places else [0] * (max(home.numbers, default=0) + 1)
        return [
            Cut(offsets[number], spec, param.index, stream.name, home.begin, home.count)
            for number, spec, stream in zip(home.numbers, home.specs, param.streams, strict=True)
        ]
    cuts, begin = [], home.begin
    for count, _, offsets in places:
        for number, stream in zip(home.numbers, param.streams, strict=True):
            spec = _flat(param.index, stream, begin, count)
            cuts.append(Cut(offsets[number], spec, param.index, stream.name, begin, count))
        begin += count
    return cuts


def _flat(index: int, stream: SavedStream, begin: int, count: int) -> TensorSpec:
    """Elements of a parameter, which a page ends anywhere in a row."""
    key = f"{index}.{stream.name}.flat[{begin}:{begin + count}]"
    return TensorSpec(key, stream.dtype, (stream.nbytes(count) // stream.dtype.itemsize,))


def _write_back(engine: PagedEngine) -> None:
    """Waits until the page file, and its disk, have what is in the ring."""
    try:
        engine.flush()
        os.fdatasync(engine._engine.file)  # not every file system does so for blocks it shares
    except OSError as error:  # what could not be written is still in the ring, and is copied
        raise NotSharedError(f"its last pages could not be written ({error})") from error


def _clone(source: int, path: Path, cuts: Sequence[Cut], ranks: int) -> dict[str, int]:
    """Makes the shard; what the manifest has of it."""
    space = os.statvfs(path.parent)
    block = max(_BLOCKS[0], space.f_bsize if space.f_bsize <= _BLOCKS[1] else 0)
    end = max(cut.at + cut.spec.bytes for cut in cuts)
    first = next(cut.at for cut in cuts if cut.spec.bytes) // block * block
    size = min(-(-end // block) * block, os.fstat(source).st_size) - first
    # Each page that steps write takes new blocks. As after a copy, these are there.
    free, needed = space.f_bavail * space.f_frsize, ranks * sum(cut.spec.bytes for cut in cuts)
    if free < needed:
        raise NotSharedError(f"steps may write {needed} bytes anew, and only {free} are free there")
    head = head_over([(max(cut.at - first, 0), cut.spec) for cut in cuts], size, block)
    if len(head) > MOST_HEAD_BYTES:
        raise NotSharedError(f"a header of {len(head)} bytes is more than readers take")
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        _share_blocks(source, first, size, file, len(head), path)
        data, at = memoryview(head), 0
        while at < len(data):
            at += os.pwrite(file, data[at:], at)
        os.fsync(file)
    except OSError as error:
        raise explained(error, path, len(head) + size) from error
    finally:
        os.close(file)
    return {"size": len(head) + size, "head_bytes": len(head), "head_crc32": zlib.crc32(head)}


def _share_blocks(source: int, first: int, size: int, file: int, to: int, path: Path) -> None:
    """Gives a range of one file to another; both begin at a block, and its end is one or the last.

    Raises:
        NotSharedError: The file system cannot, and there is no file.
    """
    try:
        fcntl.ioctl(file, FICLONERANGE, struct.pack("qQQQ", source, first, size, to))
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
        os.unlink(path)
        where = path.parent.parent
        raise NotSharedError(f"{where} cannot share its blocks ({error.strerror})") from error


def _sums(
    path: Path, facts: dict[str, int], cuts: Sequence[Cut], shown: Progress
) -> dict[str, str]:
    """Checksums of the tensors; what was read does not stay in memory."""
    sums, unforgotten = {}, 0
    with closing(ShardReader(path, **facts)) as reader:
        for cut in cuts:
            sums[cut.spec.key] = reader.sum(cut.spec.key, shown.advance)
            unforgotten += cut.spec.bytes
            if unforgotten >= FLUSH_BYTES:
                unforgotten = 0
                reader.forget(cut.spec.key)
        reader.forget(cuts[-1].spec.key)
    return sums
