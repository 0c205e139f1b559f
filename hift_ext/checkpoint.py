# SPDX-License-Identifier: Apache-2.0
"""`save` and `load`: a checkpoint of an optimizer, page by page, that is there whole or not at all.

A directory of safetensors shards and a manifest; what is read is checked before anything changes.
"""

from __future__ import annotations

import os
import warnings
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hift_ext import interchange
from hift_ext.manifest import (
    Manifest,
    SavedParam,
    SavedStream,
    check_class,
    check_files,
    check_fit,
    saved_param,
    saved_stream,
    shard_name,
    stored_count,
)
from hift_ext.ops import StateEngine, StreamSpec
from hift_ext.paged_state import Entry
from hift_ext.replace import Replacement, recover, sweep
from hift_ext.shards import BUFFER_BYTES, Pieces, ShardReader, ShardWriter, bytes_of

if TYPE_CHECKING:
    from hift_ext.optimizer import HiFTOptimizer

SHARD_BYTES = 4 << 30
"""A shard is closed when it has as many; a larger tensor has one for itself."""

_STEP = BUFFER_BYTES // 4  # stored values at once; none is wider
_LOAD_STEP = 2 * _STEP  # a stream of a default page: a page in a file is written for every piece


def save(optimizer: HiFTOptimizer, path: str | os.PathLike[str]) -> None:
    """Saves an optimizer's state, settings and place in the pass; not the model's weights.

    State passes through two buffers of 1 MiB (and, from a file, one page): memory does not grow
    with the model. The directory appears when all of it is on the disk, in the place of the last
    checkpoint if there is one: until then, however the process ends, that one stays.

    Args:
        optimizer: Any HiFT optimizer.
        path: The checkpoint's directory; its parent must exist. Work in progress is
            `path.tmp-*` beside it; what dead processes left there is removed.

    Raises:
        FileExistsError: `path` is something else than a checkpoint, or holds other files.
        OSError: The disk is full or fails; the last checkpoint is as it was.
        TypeError: A setting in param_groups that the manifest cannot hold.
    """
    optimizer._check_open()
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"the directory {target.parent} does not exist: make it first")
    recover(target)
    check_files(target)
    sweep(target)
    manifest, homes = _describe(optimizer)
    with Replacement(target) as work:
        _write_shards(optimizer, manifest, homes, work.folder)
        manifest.write(work.folder)
        check_files(target)
        work.publish()


def load(optimizer: HiFTOptimizer, path: str | os.PathLike[str]) -> None:
    """Takes over a checkpoint of the same class, whatever store, pages or groups it was saved from.

    Everything is read and checked before anything changes. Where the number of groups differs, a
    warning says so and a new pass begins, as with `load_state_dict`.

    Args:
        optimizer: An optimizer over the same parameters in the same order.
        path: A directory that `save` wrote.

    Raises:
        CheckpointError: A file is missing, damaged or not ours; the message names it.
        ValueError: Another class, or other param_groups, parameters, shapes or streams.
        RuntimeError: The store or the disk failed after loading had begun; load again.
    """
    optimizer._check_open()
    folder = Path(os.path.realpath(path))
    recover(folder)
    saved = Manifest.read(folder)
    check_class(optimizer, saved, folder)
    groups = interchange.merged_groups(optimizer, saved.param_groups)
    members = [p for group in groups for p in group["params"]]
    check_fit(optimizer, members, saved, folder)
    group_of = {p: group for group in groups for p in group["params"]}
    entries = optimizer.state.entries
    found: dict[torch.Tensor, SavedParam] = {}
    for param in saved.params:
        p = members[param.index]
        if p in entries:
            found[p] = param
            _check_streams(optimizer, p, param, optimizer.streams(group_of[p]))
    if len(found) < len(saved.params):
        warnings.warn(
            f"the saved state of {len(saved.params) - len(found)} parameters is left out: they are "
            "not trained here",
            stacklevel=2,
        )
    with ExitStack() as stack:
        shards = _open_shards(folder, saved, stack)
        # Nothing has changed so far; from here on only the page file and the disk can fail.
        try:
            _replace(optimizer, groups, found, shards)
        except Exception as error:
            raise RuntimeError(
                f"loading {folder} stopped in the middle, and the optimizer's state is partly "
                f"replaced: load again before the next step. Cause: {error}"
            ) from error
    interchange.adopt_schedule(optimizer)


# Saving -----------------------------------------------------------------------------------------


def _describe(optimizer: HiFTOptimizer) -> tuple[Manifest, list[tuple[Entry, SavedParam]]]:
    """The manifest without checksums, and the parameters that have values, in order of pages."""
    optimizer.state.settle()
    members = [p for group in optimizer.param_groups for p in group["params"]]
    index_of = {p: index for index, p in enumerate(members)}
    laid_out = optimizer.state.engine is not None
    names, groups, number = optimizer._names(), [], 0
    for group in optimizer.param_groups:
        indices = list(range(number, number + len(group["params"])))
        groups.append({**group, "params": indices})
        number += len(indices)
    stored, params = [], {}
    for entry in (entry for group in optimizer._entries for entry in group):
        p = entry.param
        saved = saved_param(entry, index_of[p], names.get(p), laid_out)
        params[saved.index] = saved
        if laid_out and p in optimizer.state:
            stored.append((entry, saved))
    in_order = [params[index] for index in sorted(params)]
    return Manifest(type(optimizer).__name__, groups, in_order), stored


def _write_shards(
    optimizer: HiFTOptimizer,
    manifest: Manifest,
    stored: list[tuple[Entry, SavedParam]],
    folder: Path,
) -> None:
    batches: list[list[tuple[Entry, SavedParam]]] = []
    room = 0
    for entry, param in stored:
        size = sum(param.spec(stream).bytes for stream in param.streams)
        if not batches or size > room:
            batches.append([])
            room = SHARD_BYTES
        room -= size
        batches[-1].append((entry, param))
    engine = optimizer.state.engine
    for number, batch in enumerate(batches, 1):
        assert engine is not None
        name = shard_name(number)
        specs = [param.spec(stream) for _, param in batch for stream in param.streams]
        with ShardWriter(folder / name, specs) as shard, Pieces() as pieces:
            for entry, param in batch:
                for at, begin, count in _walk(engine, entry, param.streams, _STEP):
                    stream = param.streams[at]
                    value = pieces.buffer(stream.dtype, count)
                    engine.read(entry.group, entry.item, at, begin, value)
                    offset = begin * stream.dtype.itemsize
                    pieces.write(shard, param.key(stream), offset, value)
        for _, param in batch:
            for stream in param.streams:
                stream.shard, stream.crc32 = name, shard.crc32[param.key(stream)]
        manifest.shards[name] = {
            "size": shard.size,
            "head_bytes": shard.head_bytes,
            "head_crc32": shard.head_crc32,
        }


def _walk(
    engine: StateEngine, entry: Entry, streams: list[SavedStream], step: int
) -> Iterator[tuple[int, int, int]]:
    """Pieces (stream, first stored value, at most `step` of them), page by page."""
    begin = 0
    for elements in engine.parts(entry.group, entry.item, entry.numel):
        for at, stream in enumerate(streams):
            first = stored_count(begin, stream.run)
            end = stored_count(begin + elements, stream.run)
            for piece in range(first, end, step):
                yield at, piece, min(step, end - piece)
        begin += elements


# Loading ----------------------------------------------------------------------------------------


def convert(value: torch.Tensor, saved: SavedStream, wanted: SavedStream) -> torch.Tensor:
    """Stored values of one stream as another stream type stores them.

    Raises:
        ValueError: There is no such conversion.
    """
    if (saved.dtype, saved.run) == (wanted.dtype, wanted.run):
        return value
    floats = (torch.float32, torch.bfloat16)
    if saved.run == wanted.run == 1 and saved.dtype in floats and wanted.dtype in floats:
        return value.to(wanted.dtype)
    raise ValueError(
        f"{saved.name} was saved as {saved.dtype} for every {saved.run} elements and is kept as "
        f"{wanted.dtype} for every {wanted.run} here: this conversion is not offered"
    )


def _check_streams(
    optimizer: HiFTOptimizer, p: torch.Tensor, param: SavedParam, wanted: list[StreamSpec]
) -> None:
    by_name = {stream.name: stream for stream in param.streams}
    for spec in wanted:
        if spec.name not in by_name:
            raise ValueError(
                f"the saved state of {optimizer._say(p)} lacks {spec.name}; it has "
                f"{', '.join(by_name) or 'nothing'}"
            )
        stream = by_name[spec.name]
        convert(torch.empty(0, dtype=stream.dtype), stream, saved_stream(spec))


def _open_shards(folder: Path, saved: Manifest, stack: ExitStack) -> dict[str, ShardReader]:
    """Opens every shard and verifies every byte."""
    sums: dict[str, dict[str, int]] = {name: {} for name in saved.shards}
    for param in saved.params:
        for stream in param.streams:
            if stream.shard is not None:
                sums[stream.shard][param.key(stream)] = stream.crc32
    shards = {}
    for name, facts in saved.shards.items():
        shards[name] = ShardReader(folder / name, **facts)
        stack.callback(shards[name].close)
    for name, shard in shards.items():
        shard.verify(sums[name])
    return shards


def _replace(
    optimizer: HiFTOptimizer,
    groups: list[dict[str, Any]],
    found: dict[torch.Tensor, SavedParam],
    shards: dict[str, ShardReader],
) -> None:
    state = optimizer.state
    interchange.adopt_settings(optimizer, groups)
    buffer = torch.empty(4 * _LOAD_STEP, dtype=torch.uint8)
    for entry in (entry for group in optimizer._entries for entry in group):
        param = found.get(entry.param)
        by_name = {} if param is None else {stream.name: stream for stream in param.streams}
        wanted = [saved_stream(spec) for spec in entry.streams]
        sources = [by_name.get(stream.name, stream) for stream in wanted]
        fresh = all(
            source.shard is None and source.fill == stream.fill
            for source, stream in zip(sources, wanted, strict=True)
        )
        known = state.engine is not None and entry.param in state
        if known or not fresh:
            _load_entry(optimizer._engine(), entry, param, sources, wanted, shards, buffer)
        entry.visits = 0 if param is None else param.visits
    if any(entry.visits for group in optimizer._entries for entry in group):
        optimizer._engine()


def _load_entry(
    engine: StateEngine,
    entry: Entry,
    param: SavedParam | None,
    sources: list[SavedStream],
    wanted: list[SavedStream],
    shards: dict[str, ShardReader],
    buffer: torch.Tensor,
) -> None:
    """Fills a parameter's state, a piece at a time."""
    if param is not None and param.strides != entry.strides:
        buffer = torch.empty(4 * entry.numel, dtype=torch.uint8)
        pieces: Iterable[tuple[int, int, int]] = (
            (at, 0, stored_count(entry.numel, stream.run)) for at, stream in enumerate(wanted)
        )
    else:
        pieces = _walk(engine, entry, wanted, _LOAD_STEP)
    sums = [0] * len(wanted)
    for at, begin, count in pieces:
        source = sources[at]
        value = buffer[: count * source.dtype.itemsize].view(source.dtype)
        if source.shard is None or param is None:
            value.fill_(source.fill)
        else:
            data = bytes_of(value)
            offset = begin * source.dtype.itemsize
            shards[source.shard].read(param.key(source), offset, data)
            sums[at] = zlib.crc32(data, sums[at])
            if param.strides != entry.strides:
                ordered = entry.laid_out(value.as_strided(param.shape, param.strides), value.dtype)
                value = ordered.as_strided((entry.numel,), (1,))
        engine.load(entry.group, entry.item, at, begin, convert(value, source, wanted[at]))
    for at, source in enumerate(sources):
        if source.shard is not None and param is not None:
            shards[source.shard].check(param.key(source), sums[at], source.crc32)
