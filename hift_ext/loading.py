# SPDX-License-Identifier: Apache-2.0
"""What `hift_ext.load` does on each rank: find what was saved, verify it, put it in place.

Into an optimizer that has no state yet it is read once, and checked meanwhile; else it is read
before anything changes, and once more.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hift_ext import interchange, precision
from hift_ext.conversion import Source, check_state, loses_master, wanted_streams
from hift_ext.engines import StateEngine
from hift_ext.manifest import Manifest, SavedParam, check_class, check_fit
from hift_ext.notices import stacklevel
from hift_ext.paged_state import Entry
from hift_ext.precision import Precision
from hift_ext.progress import progress
from hift_ext.schedule import checked_schedule
from hift_ext.sharding import is_sharded, part_of
from hift_ext.shards import BUFFER_BYTES, ShardReader
from hift_ext.team import Team

if TYPE_CHECKING:
    from hift_ext.optimizer import HiFTOptimizer

LOAD_STEP = BUFFER_BYTES // 2
"""Elements at once: a stream of a default page; a page in a file is written for every piece."""


def walk(parts: Sequence[int], step: int) -> Iterator[tuple[int, int]]:
    """Pieces of parts: the first element, and how many, at most `step`."""
    begin = 0
    for elements in parts:
        for piece in range(begin, begin + elements, step):
            yield piece, min(step, begin + elements - piece)
        begin += elements


class Loading:
    """A checkpoint on its way into an optimizer, on one rank.

    Args:
        optimizer: Where it goes.
        folder: Where it is.
        stack: Closes the files.
        ranks: How many share the verification.

    Raises:
        CheckpointError: A file is missing, damaged or not ours.
        ValueError: It does not fit.
    """

    def __init__(
        self, optimizer: HiFTOptimizer, folder: Path, stack: ExitStack, ranks: int
    ) -> None:
        self._optimizer = optimizer
        self._saved = saved = Manifest.read(folder)
        check_class(optimizer, saved, folder)
        self._groups = interchange.merged_groups(optimizer, saved.param_groups)
        members = [p for group in self._groups for p in group["params"]]
        check_fit(optimizer, members, saved, folder)
        self._schedule = checked_schedule(self._groups[0].get("hift"))
        self._found = _found(optimizer, self._groups, members, saved)
        self.fresh = optimizer.state.engine is None
        self._sums: dict[str, dict[str, str]] = {name: {} for name in saved.shards}
        for param in saved.params:
            for stream in param.streams:
                for piece in stream.pieces:
                    self._sums[piece.shard][piece.key] = piece.xxh3
        self._shards: dict[str, ShardReader] = {}
        for name, facts in saved.shards.items():
            self._shards[name] = ShardReader(folder / name, **facts)
            stack.callback(self._shards[name].close)
            self._shards[name].check_present(self._sums[name])
        found = self._found.items()
        total = sum(_bytes(param, part_of(p, optimizer._say(p))[1]) for p, param in found)
        if not self.fresh:  # each byte is verified before
            total += sum(_bytes(param, param.numel) for param in saved.params) // ranks
        bar = progress(f"loading {folder.name}", total, in_bytes=True)
        self._shown = stack.enter_context(bar)

    @property
    def facts(self) -> dict[str, Any]:
        """What must be the same on all ranks."""
        return {"checkpoint": f"{self._saved.crc32:08x}", "state before it": not self.fresh}

    def verify(self, team: Team, known: Collection[tuple[str, str]] = ()) -> None:
        """Reads this rank's share of what nobody has verified.

        Raises:
            CheckpointError: It is not what was saved.
        """
        mine = team.ranks.index(team.rank)
        for number, (name, sums) in enumerate(self._sums.items()):
            if number % len(team.ranks) == mine:
                left = {key: xxh3 for key, xxh3 in sums.items() if (name, key) not in known}
                self._shards[name].verify(left, self._shown.advance)

    def replace(self) -> set[tuple[str, str]]:
        """Puts settings and state in the place of those there are.

        Returns:
            The tensors that were read whole and verified.

        Raises:
            CheckpointError: The files are not, or no longer, what was saved.
            OSError: The store, or a file, cannot be used.
        """
        optimizer, state = self._optimizer, self._optimizer.state
        interchange.adopt_settings(optimizer, self._groups)
        buffers: dict[bool, torch.Tensor] = {}
        verified = set()
        for entry in (entry for group in optimizer._entries for entry in group):
            param = self._found.get(entry.param)
            known = state.engine is not None and (entry.visits > 0 or entry.param in state)
            if known or (param is not None and _has_values(param)):
                engine = optimizer._engine()
                own = wanted_streams(engine.stored, entry.streams)
                source = Source(entry, param, own, self._shards, buffers)
                verified |= _load_entry(engine, entry, source)
                if param is not None:
                    self._shown.advance(_bytes(param, entry.numel))
            entry.visits = 0 if param is None else param.visits
        if any(entry.visits for group in optimizer._entries for entry in group):
            optimizer._engine()
        for shard in self._shards.values():
            shard.check_unchanged()
        return verified

    def finish(self) -> None:
        """Goes on where the saved schedule stands."""
        interchange.adopt_schedule(self._optimizer, self._schedule)


@contextmanager
def undone_on_error(optimizer: HiFTOptimizer) -> Iterator[None]:
    """Gives an optimizer that had no state its settings back, and no state, where it fails."""
    state, groups = optimizer.state, list(optimizer.param_groups)
    books = [(entry, entry.streams, entry.visits) for entry in state.entries.values()]
    try:
        yield
    except BaseException:
        state.engine = None
        optimizer.param_groups[:] = groups
        for entry, streams, visits in books:
            entry.streams, entry.visits = streams, visits
        raise


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
        who = optimizer._say(p)
        check_state(param, optimizer.streams(group_of[p]), who)
        part_of(p, who)
        if is_sharded(p) and not param.row_major:
            raise ValueError(
                f"the saved state of {who} has the strides {param.strides}, which rows of a "
                "sharded parameter cannot take over: load it into a model that is not sharded, "
                "make that contiguous, and save it from there"
            )
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


def _bytes(param: SavedParam, count: int) -> int:
    """Of the saved state of so many elements."""
    return sum(stream.nbytes(count) for stream in param.streams if stream.pieces)


def _has_values(param: SavedParam) -> bool:
    return any(stream.pieces for stream in param.streams)


def _load_entry(engine: StateEngine, entry: Entry, source: Source) -> set[tuple[str, str]]:
    """Fills a parameter's state, a piece at a time; what was verified doing so."""
    step = max(entry.numel, 1) if source.whole else LOAD_STEP
    parts = [entry.numel] if source.blocks else engine.parts(entry.group, entry.item)
    for begin, count in walk(parts, step):
        for number, value in source.piece(begin, count):
            engine.load(entry.group, entry.item, number, begin, count, value)
    return source.check()
