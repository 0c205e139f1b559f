# SPDX-License-Identifier: Apache-2.0
"""`save` and `load`: a checkpoint of an optimizer, page by page, that is there whole or not at all.

A directory of safetensors shards and a manifest; what is read is checked before anything changes.
Ranks that hold parts of the parameters write and read it together.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hift_ext import distributed, reflink, settings
from hift_ext.booking import book
from hift_ext.conversion import wanted_streams
from hift_ext.homes import Home
from hift_ext.loading import Loading, undone_on_error, walk
from hift_ext.manifest import (
    Manifest,
    Piece,
    check_files,
    check_tiled,
    encoded,
    saved_param,
    shard_name,
)
from hift_ext.precision import PLAIN
from hift_ext.profiling import stage
from hift_ext.progress import Progress, progress
from hift_ext.replace import Replacement, recover, sweep
from hift_ext.sharding import part_of
from hift_ext.shards import BUFFER_BYTES, Pieces, ShardWriter
from hift_ext.team import Team

if TYPE_CHECKING:
    from hift_ext.optimizer import HiFTOptimizer

SHARD_BYTES = 4 << 30
"""A shard is closed when it has as many; a larger tensor has one for itself."""

_STEP = BUFFER_BYTES // 4  # elements at once; no stream has more bytes for one


def save(optimizer: HiFTOptimizer, path: str | os.PathLike[str]) -> None:
    """Saves an optimizer's state, settings and place in the pass; not the model's weights.

    Values are saved as they are kept: 8-bit codes, 16-bit state and masters included. They pass
    through two buffers of 1 MiB (and, from a file, one page): memory does not grow with the model.
    Where the file system shares blocks (a reflink), state in a page file is not copied, only read
    once for its checksums; memory then takes about 1 KB for each page and stream.
    The directory appears when all of it is on the disk, in the place of the last checkpoint if
    there is one: until then, however a process ends, that one stays.

    Where parameters are sharded (FSDP2) every rank calls it, with one path that all of them see,
    and writes its own part; where one fails, all raise. Ranks wait for the slowest, so the process
    group's timeout must be longer than a save. Where each rank has whole parameters (DDP) one call,
    on any rank, is enough.

    Args:
        optimizer: Any HiFT optimizer whose parameters are whole or cut into rows.
        path: The checkpoint's directory; its parent must exist. Work in progress is
            `path.tmp-*` beside it; what dead processes left there is removed.

    Raises:
        FileExistsError: `path` is something else than a checkpoint, or holds other files.
        FileNotFoundError: There is no directory for it, or a rank does not see it.
        OSError: The disk is full or fails; the last checkpoint is as it was.
        RuntimeError: The optimizer is closed, parameters are cut otherwise, the ranks differ, or
            one of them has ended.
        TypeError: A setting in param_groups that the manifest cannot hold.
    """
    with optimizer._turnstile.lock, stage("save"), ExitStack() as stack:
        team = Team.of(optimizer)
        saving = _Saving(optimizer, Path(os.path.realpath(path)), team, stack)
        plans = team.together(saving.prepare)
        team.agree({rank: plan["facts"] for rank, plan in plans.items()})
        written = team.together(lambda: saving.write(plans))
        team.together(lambda: saving.publish(written))


def load(optimizer: HiFTOptimizer, path: str | os.PathLike[str]) -> None:
    """Takes over a checkpoint of the same class, whatever store, pages or groups it was saved from.

    Everything is read and checked before anything changes. State kept in another type is converted;
    masters are made of the model's weights where none can be had, so load those before. Where the
    number of groups differs, a warning says so and a new pass begins, as with `load_state_dict`.

    Sharded parameters take their rows from whatever number of ranks it was saved on. All ranks call
    it; where one fails, all raise.

    Args:
        optimizer: An optimizer over the same parameters in the same order.
        path: A directory that `save` wrote.

    Raises:
        CheckpointError: A file is missing, damaged or not ours; the message names it.
        ValueError: Another class, or other param_groups, parameters, shapes or streams.
        RuntimeError: The optimizer is closed, or its parameters are cut otherwise than into rows;
            the ranks differ or one has ended; or the store or the disk failed after loading into
            an optimizer with state had begun: load again.
    """
    with optimizer._turnstile.alone(), stage("load"), ExitStack() as stack:
        team = Team.of(optimizer)
        folder = Path(os.path.realpath(path))

        def prepare() -> dict[str, Any]:
            _check(optimizer)
            recover(folder)
            opened.append(Loading(optimizer, folder, stack, len(team.ranks)))
            return opened[0].facts

        opened: list[Loading] = []
        team.agree(team.together(prepare))
        (loading,) = opened
        if loading.fresh:
            with undone_on_error(optimizer):
                verified = team.together(loading.replace)
                known = set().union(*verified.values())
                team.together(lambda: loading.verify(team, known))
                loading.finish()
            return
        team.together(lambda: loading.verify(team))
        # Nothing has changed so far; from here on only the page file and the disk can fail.
        try:
            team.together(loading.replace)
        except Exception as error:
            raise RuntimeError(
                f"loading {folder} stopped in the middle, and the optimizer's state is partly "
                f"replaced: load again before the next step. Cause: {error}"
            ) from error
        loading.finish()


def _check(optimizer: HiFTOptimizer) -> None:
    optimizer._check_open()
    settings.check_unchanged(optimizer, whole=True)


class _Saving:
    """A checkpoint in the making, on one rank: three parts that all ranks do together.

    Args:
        optimizer: What is saved.
        target: The checkpoint's directory.
        team: The ranks.
        stack: Drops the work if it is not published.
    """

    def __init__(
        self, optimizer: HiFTOptimizer, target: Path, team: Team, stack: ExitStack
    ) -> None:
        self._optimizer, self._target, self._team, self._stack = optimizer, target, team, stack
        self._manifest = Manifest(type(optimizer).__name__, [], [])
        self._homes: list[Home] = []

    def prepare(self) -> dict[str, Any]:
        """Describes what this rank has; the first rank makes the folder that all write to."""
        optimizer, target, folder = self._optimizer, self._target, None
        _check(optimizer)
        book(optimizer)
        if self._team.leads:
            if not target.parent.is_dir():
                raise FileNotFoundError(
                    f"the directory {target.parent} does not exist: make it first"
                )
            recover(target)
            check_files(target)
            sweep(target)
        self._describe()
        facts: dict[str, Any] = {}
        if not self._team.alone:
            facts = {"path": str(target), **distributed.plan(optimizer), **_digests(self._manifest)}
        if self._team.leads:
            self._work = self._stack.enter_context(Replacement(target))
            folder = str(self._work.folder)
        return {"facts": facts, "parts": [home.part for home in self._homes], "folder": folder}

    def _describe(self) -> None:
        """The manifest without values, and the parameters that have some, in order of pages."""
        optimizer, state = self._optimizer, self._optimizer.state
        state.settle()
        members = [p for group in optimizer.param_groups for p in group["params"]]
        index_of = {p: index for index, p in enumerate(members)}
        names, number, params = optimizer._names(), 0, {}
        for group in optimizer.param_groups:
            indices = list(range(number, number + len(group["params"])))
            self._manifest.param_groups.append({**group, "params": indices})
            number += len(indices)
        for entry in (entry for group in optimizer._entries for entry in group):
            p = entry.param
            laid_out = state.engine is not None
            stored = PLAIN.stored(entry.streams) if state.engine is None else state.engine.stored
            own = wanted_streams(stored, entry.streams)
            saved = saved_param(entry, index_of[p], names.get(p), (s for _, s in own), laid_out)
            params[saved.index] = saved
            begin, count = part_of(p, optimizer._say(p))
            if laid_out and (entry.visits or p in state):
                numbers = [number for number, _ in own]
                self._homes.append(Home(entry, saved, numbers, begin, count))
        self._manifest.params[:] = [params[index] for index in sorted(params)]

    def write(self, plans: dict[int, dict[str, Any]]) -> dict[str, Any]:
        """Writes this rank's parts, but what an earlier rank has as well.

        Returns:
            `shards`, as the manifest has them, and `pieces` with the places they belong to.
        """
        taken: set[tuple[int, int, int]] = set()
        for rank, plan in plans.items():
            if rank < self._team.rank:
                taken.update(map(tuple, plan["parts"]))
        folder = Path(next(plan["folder"] for plan in plans.values() if plan["folder"]))
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder}, which rank {self._team.ranks[0]} has made, is not there: sharded "
                "parameters are saved to a directory that all ranks see"
            )
        mine = [
            home
            for home in self._homes
            if home.part not in taken and (home.count or not home.param.numel)
        ]
        shards: dict[str, dict[str, int]] = {}
        pieces: list[tuple[int, str, Piece]] = []
        total = sum(spec.bytes for home in mine for spec in home.specs)
        bar = progress(f"saving {self._target.name}", total, in_bytes=True)
        shown = self._stack.enter_context(bar)
        writer = None if self._team.alone else self._team.rank
        name, engine = shard_name(1, writer), self._optimizer.state.engine
        told = self._target, len(self._team.ranks), shown
        shared = reflink.share(engine, mine, folder / name, *told)
        if shared is not None:
            shards[name], pieces, mine = shared.facts, shared.pieces, shared.left
        for number, batch in enumerate(_batches(mine), 1 + len(shards)):
            name = shard_name(number, writer)
            with ShardWriter(folder / name, [s for home in batch for s in home.specs]) as shard:
                self._write_shard(shard, batch, shown)
            for home in batch:
                for stream, (key, _, _) in zip(home.param.streams, home.specs, strict=True):
                    piece = Piece(name, key, home.begin, home.count, shard.xxh3(key))
                    pieces.append((home.param.index, stream.name, piece))
            shards[name] = {
                "size": shard.size,
                "head_bytes": shard.head_bytes,
                "head_crc32": shard.head_crc32,
            }
        return {"shards": shards, "pieces": pieces}

    def _write_shard(self, shard: ShardWriter, batch: list[Home], shown: Progress) -> None:
        engine = self._optimizer.state.engine
        assert engine is not None
        with Pieces() as pieces:
            for home in batch:
                entry, streams, specs = home.entry, home.param.streams, home.specs
                for begin, count in walk(engine.parts(entry.group, entry.item), _STEP):
                    for at, stream, spec in zip(home.numbers, streams, specs, strict=True):
                        values = stream.nbytes(count) // stream.dtype.itemsize
                        value = pieces.buffer(stream.dtype, values)
                        engine.read(entry.group, entry.item, at, begin, count, value)
                        pieces.write(shard, spec.key, stream.nbytes(begin), value)
                        shown.advance(value.nbytes)

    def publish(self, written: dict[int, dict[str, Any]]) -> None:
        """The first rank writes the manifest and puts the folder in the target's place."""
        if not self._team.leads:
            return
        streams = {(p.index, s.name): s for p in self._manifest.params for s in p.streams}
        for each in written.values():
            self._manifest.shards.update(each["shards"])
            for index, name, piece in each["pieces"]:
                streams[index, name].pieces.append(piece)
        for stream in streams.values():
            stream.pieces.sort(key=lambda piece: piece.begin)
        check_tiled(self._manifest)
        self._manifest.write(self._work.folder)
        check_files(self._target)
        self._work.publish()
        self._stack.close()  # what fails here the others are told, too


def _batches(homes: list[Home]) -> list[list[Home]]:
    """What goes into each shard."""
    batches: list[list[Home]] = []
    room = 0
    for home in homes:
        size = sum(spec.bytes for spec in home.specs)
        if not batches or size > room:
            batches.append([])
            room = SHARD_BYTES
        room -= size
        batches[-1].append(home)
    return batches


def _digests(manifest: Manifest) -> dict[str, str]:
    """What the ranks must agree on beside their plans, in few letters."""
    told = {
        "settings": [encoded(group) for group in manifest.param_groups],
        "state": [{**vars(param), "streams": param.streams} for param in manifest.params],
    }
    return {
        name: hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()[:12]
        for name, value in told.items()
    }
