# SPDX-License-Identifier: Apache-2.0
"""`save` and `load`: a checkpoint of an optimizer, page by page, that is there whole or not at all.

A directory of safetensors shards and a manifest; what is read is checked before anything changes.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hift_ext import interchange, precision, settings
from hift_ext.booking import book
from hift_ext.conversion import Source, check_state, loses_master, wanted_streams
from hift_ext.engines import StateEngine
from hift_ext.manifest import (
    Manifest,
    SavedParam,
    check_class,
    check_files,
    check_fit,
    saved_param,
    shard_name,
)
from hift_ext.notices import stacklevel
from hift_ext.paged_state import Entry
from hift_ext.precision import PLAIN, Precision
from hift_ext.profiling import stage
from hift_ext.progress import Progress, progress
from hift_ext.replace import Replacement, recover, sweep
from hift_ext.schedule import checked_schedule
from hift_ext.shards import BUFFER_BYTES, Pieces, ShardReader, ShardWriter

if TYPE_CHECKING:
    from hift_ext.optimizer import HiFTOptimizer

SHARD_BYTES = 4 << 30
"""A shard is closed when it has as many; a larger tensor has one for itself."""

_STEP = BUFFER_BYTES // 4  # elements at once; no stream has more bytes for one
_LOAD_STEP = 2 * _STEP  # a stream of a default page: a page in a file is written for every piece

_Home = tuple[Entry, SavedParam, list[int]]
"""A parameter that has values, and the engine's streams they are in."""


def save(optimizer: HiFTOptimizer, path: str | os.PathLike[str]) -> None:
    """Saves an optimizer's state, settings and place in the pass; not the model's weights.

    Values are saved as they are kept: 8-bit codes, 16-bit state and masters included. They pass
    through two buffers of 1 MiB (and, from a file, one page): memory does not grow with the model.
    The directory appears when all of it is on the disk, in the place of the last checkpoint if
    there is one: until then, however the process ends, that one stays.

    Args:
        optimizer: Any HiFT optimizer whose parameters are not sharded.
        path: The checkpoint's directory; its parent must exist. Work in progress is
            `path.tmp-*` beside it; what dead processes left there is removed.

    Raises:
        FileExistsError: `path` is something else than a checkpoint, or holds other files.
        FileNotFoundError: There is no directory for it.
        OSError: The disk is full or fails; the last checkpoint is as it was.
        RuntimeError: The optimizer is closed, or its parameters are sharded.
        TypeError: A setting in param_groups that the manifest cannot hold.
    """
    with optimizer._turnstile.lock:
        _check(optimizer)
        book(optimizer)
        target = Path(os.path.realpath(path))
        if not target.parent.is_dir():
            raise FileNotFoundError(f"the directory {target.parent} does not exist: make it first")
        recover(target)
        check_files(target)
        sweep(target)
        manifest, homes = _describe(optimizer)
        size = sum(param.spec(s).bytes for _, param, _ in homes for s in param.streams)
        bar = progress(f"saving {target.name}", size, in_bytes=True)
        with stage("save"), Replacement(target) as work, bar as shown:
            _write_shards(optimizer, manifest, homes, work.folder, shown)
            manifest.write(work.folder)
            check_files(target)
            work.publish()


def load(optimizer: HiFTOptimizer, path: str | os.PathLike[str]) -> None:
    """Takes over a checkpoint of the same class, whatever store, pages or groups it was saved from.

    Everything is read and checked before anything changes. State kept in another type is converted;
    masters are made of the model's weights where none can be had, so load those before. Where the
    number of groups differs, a warning says so and a new pass begins, as with `load_state_dict`.

    Args:
        optimizer: An optimizer over the same parameters in the same order.
        path: A directory that `save` wrote.

    Raises:
        CheckpointError: A file is missing, damaged or not ours; the message names it.
        ValueError: Another class, or other param_groups, parameters, shapes or streams.
        RuntimeError: The optimizer is closed or sharded; or the store or the disk failed after
            loading had begun: load again.
    """
    with optimizer._turnstile.alone():
        _check(optimizer)
        folder = Path(os.path.realpath(path))
        recover(folder)
        saved = Manifest.read(folder)
        check_class(optimizer, saved, folder)
        groups = interchange.merged_groups(optimizer, saved.param_groups)
        members = [p for group in groups for p in group["params"]]
        check_fit(optimizer, members, saved, folder)
        schedule = checked_schedule(groups[0].get("hift"))
        found = _found(optimizer, groups, members, saved)
        size = sum(param.spec(s).bytes for param in saved.params for s in param.streams if s.shard)
        bar = progress(f"verifying {folder.name}", 2 * size, in_bytes=True)
        with ExitStack() as stack:
            stack.enter_context(stage("load"))
            shown = stack.enter_context(bar)
            shards = _open_shards(folder, saved, stack, shown)
            shown.say(f"loading {folder.name}")
            # Nothing has changed so far; from here on only the page file and the disk can fail.
            try:
                _replace(optimizer, groups, found, shards, shown)
            except Exception as error:
                raise RuntimeError(
                    f"loading {folder} stopped in the middle, and the optimizer's state is partly "
                    f"replaced: load again before the next step. Cause: {error}"
                ) from error
        interchange.adopt_schedule(optimizer, schedule)


def _check(optimizer: HiFTOptimizer) -> None:
    optimizer._check_open()
    settings.check_unchanged(optimizer, whole=True)
    if optimizer._sharded:
        raise RuntimeError(
            "the parameters are sharded over ranks, and hift_ext.save and load deal in whole ones: "
            "use torch.distributed.checkpoint, with get_state_dict and set_state_dict"
        )


# Saving -----------------------------------------------------------------------------------------


def _describe(optimizer: HiFTOptimizer) -> tuple[Manifest, list[_Home]]:
    """The manifest without checksums, and the parameters that have values, in order of pages."""
    state = optimizer.state
    state.settle()
    members = [p for group in optimizer.param_groups for p in group["params"]]
    index_of = {p: index for index, p in enumerate(members)}
    names, groups, number = optimizer._names(), [], 0
    for group in optimizer.param_groups:
        indices = list(range(number, number + len(group["params"])))
        groups.append({**group, "params": indices})
        number += len(indices)
    homes, params = [], {}
    for entry in (entry for group in optimizer._entries for entry in group):
        p = entry.param
        laid_out = state.engine is not None
        stored = PLAIN.stored(entry.streams) if state.engine is None else state.engine.stored
        own = wanted_streams(stored, entry.streams)
        saved = saved_param(entry, index_of[p], names.get(p), (s for _, s in own), laid_out)
        params[saved.index] = saved
        if laid_out and (entry.visits or p in state):
            homes.append((entry, saved, [number for number, _ in own]))
    in_order = [params[index] for index in sorted(params)]
    return Manifest(type(optimizer).__name__, groups, in_order), homes


def _write_shards(
    optimizer: HiFTOptimizer,
    manifest: Manifest,
    homes: list[_Home],
    folder: Path,
    shown: Progress,
) -> None:
    batches: list[list[_Home]] = []
    room = 0
    for home in homes:
        param = home[1]
        size = sum(param.spec(stream).bytes for stream in param.streams)
        if not batches or size > room:
            batches.append([])
            room = SHARD_BYTES
        room -= size
        batches[-1].append(home)
    engine = optimizer.state.engine
    for number, batch in enumerate(batches, 1):
        assert engine is not None
        name = shard_name(number)
        specs = [param.spec(stream) for _, param, _ in batch for stream in param.streams]
        with ShardWriter(folder / name, specs) as shard, Pieces() as pieces:
            for entry, param, numbers in batch:
                for begin, count in _walk(engine.parts(entry.group, entry.item), _STEP):
                    for at, stream in zip(numbers, param.streams, strict=True):
                        values = stream.nbytes(count) // stream.dtype.itemsize
                        value = pieces.buffer(stream.dtype, values)
                        engine.read(entry.group, entry.item, at, begin, count, value)
                        pieces.write(shard, param.key(stream), stream.nbytes(begin), value)
                        shown.advance(value.nbytes)
        for _, param, _ in batch:
            for stream in param.streams:
                stream.shard, stream.crc32 = name, shard.crc32[param.key(stream)]
        manifest.shards[name] = {
            "size": shard.size,
            "head_bytes": shard.head_bytes,
            "head_crc32": shard.head_crc32,
        }


def _walk(parts: Sequence[int], step: int) -> Iterator[tuple[int, int]]:
    """Pieces of parts: the first element, and how many, at most `step`."""
    begin = 0
    for elements in parts:
        for piece in range(begin, begin + elements, step):
            yield piece, min(step, begin + elements - piece)
        begin += elements


# Loading ----------------------------------------------------------------------------------------


def _found(
    optimizer: HiFTOptimizer,
    groups: list[dict[str, Any]],
    members: Sequence[torch.Tensor],
    saved: Manifest,
) -> dict[torch.Tensor, SavedParam]:
    """What was saved of each parameter that is trained here, once it is known to fit."""
    kept = _precision(optimizer)
    for group in groups:
        precision.check_rule(kept, optimizer.rule(group), optimizer.streams(group))
    group_of = {p: group for group in groups for p in group["params"]}
    found = {members[param.index]: param for param in saved.params}
    found = {p: param for p, param in found.items() if p in optimizer.state.entries}
    for p, param in found.items():
        check_state(param, optimizer.streams(group_of[p]), optimizer._say(p))
    absent = len(saved.params) - len(found)
    if absent:
        warnings.warn(
            f"the saved state of {absent} parameters is left out: they are not trained here",
            stacklevel=stacklevel(),
        )
    lost = sum(loses_master(param, p.dtype, kept.master) for p, param in found.items())
    if lost:
        warnings.warn(
            f"the saved masters of {lost} parameters are left out: this optimizer keeps none that "
            "they could be made into, and goes on from the weights as they are",
            stacklevel=stacklevel(),
        )
    return found


def _precision(optimizer: HiFTOptimizer) -> Precision:
    state = optimizer.state
    if state.engine is not None:
        return state.precision
    return precision.chosen(optimizer._options, {p.dtype for p in state.entries})


def _open_shards(
    folder: Path, saved: Manifest, stack: ExitStack, shown: Progress
) -> dict[str, ShardReader]:
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
        shard.verify(sums[name], shown.advance)
    return shards


def _replace(
    optimizer: HiFTOptimizer,
    groups: list[dict[str, Any]],
    found: Mapping[torch.Tensor, SavedParam],
    shards: Mapping[str, ShardReader],
    shown: Progress,
) -> None:
    state = optimizer.state
    interchange.adopt_settings(optimizer, groups)
    buffers: dict[tuple[bool, int], torch.Tensor] = {}
    with ThreadPoolExecutor(1) as summer:
        for entry in (entry for group in optimizer._entries for entry in group):
            param = found.get(entry.param)
            known = state.engine is not None and (entry.visits > 0 or entry.param in state)
            if known or (param is not None and _has_values(param)):
                engine = optimizer._engine()
                own = wanted_streams(engine.stored, entry.streams)
                _load_entry(engine, entry, Source(entry, param, own, shards, summer, buffers))
            if param is not None and _has_values(param):
                shown.advance(sum(param.spec(stream).bytes for stream in param.streams))
            entry.visits = 0 if param is None else param.visits
    if any(entry.visits for group in optimizer._entries for entry in group):
        optimizer._engine()


def _has_values(param: SavedParam) -> bool:
    return any(stream.shard is not None for stream in param.streams)


def _load_entry(engine: StateEngine, entry: Entry, source: Source) -> None:
    """Fills a parameter's state, a piece at a time."""
    step = max(entry.numel, 1) if source.whole else _LOAD_STEP
    parts = [entry.numel] if source.blocks else engine.parts(entry.group, entry.item)
    for begin, count in _walk(parts, step):
        for number, value in source.piece(begin, count):
            engine.load(entry.group, entry.item, number, begin, count, value)
    source.check()
