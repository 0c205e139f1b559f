# SPDX-License-Identifier: Apache-2.0
"""Saved state as an optimizer keeps it: raw where it is kept the same way, else by way of float32.

A piece of one parameter at a time; what is read is compared with its checksum once more.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import xxhash

from hift_ext import precision
from hift_ext.manifest import Piece, SavedParam, SavedStream
from hift_ext.ops import Stored, StreamSpec
from hift_ext.paged_state import Entry
from hift_ext.sharding import first_element, is_sharded, local
from hift_ext.shards import ShardReader, bytes_of

Wanted = tuple[int, Stored]
"""A stream of the engine: its number, and how its values are kept."""

_Place = tuple[str, str]
"""A shard and a tensor in it."""

_FLOATS = (torch.float32, torch.bfloat16)
_HALVES = (torch.bfloat16, torch.float16)
_MASTERS = ("master", "master_low")


def wanted_streams(stored: Sequence[Stored], streams: Sequence[StreamSpec]) -> list[Wanted]:
    """Those of an engine's streams that a parameter with this state has."""
    names = {spec.name for spec in streams}
    names |= {f"{name}.scale" for name in names} | set(_MASTERS)
    return [(number, stream) for number, stream in enumerate(stored) if stream.name in names]


def _is_codes(stream: Stored | SavedStream) -> bool:
    kept = (stream.dtype, stream.run, stream.width)
    return kept == (torch.uint8, precision.BLOCK, precision.BLOCK)


def check_state(param: SavedParam, streams: Sequence[StreamSpec], who: str) -> None:
    """Whether a saved parameter has the state that is wanted, in a way that can be read.

    Raises:
        ValueError: It has not.
    """
    there = {stream.name: stream for stream in param.streams}
    for spec in streams:
        stream = there.get(spec.name)
        if stream is None:
            raise ValueError(
                f"the saved state of {who} lacks {spec.name}; it has "
                f"{', '.join(there) or 'nothing'}"
            )
        plain = stream.dtype in _FLOATS and (stream.run, stream.width) == (1, 1)
        if not plain and not (_is_codes(stream) and f"{spec.name}.scale" in there):
            raise ValueError(
                f"the saved {spec.name} of {who} is {stream.width} values of {stream.dtype} for "
                f"every {stream.run} elements: this conversion is not offered"
            )


def loses_master(param: SavedParam, here: torch.dtype, master: str | None) -> bool:
    """Whether saved masters cannot be kept for a parameter of the type `here`."""
    saved = {stream.name for stream in param.streams if stream.pieces}
    if param.dtype not in _HALVES or not saved & set(_MASTERS):
        return False
    exact = "master" in saved or here == param.dtype
    return master is None or here not in _HALVES or not exact


class Source:
    """One parameter's saved state, read from its shards in the order and way of an entry.

    Of a sharded parameter this rank's part, however it was cut when it was saved.

    Args:
        entry: Whose state it becomes, laid out.
        param: What was saved; None: the state that `entry` starts from.
        wanted: The streams that `entry` has.
        shards: The open shards by name.
        buffers: Of all parameters, one after the other: one for scales and one for others.
    """

    def __init__(
        self,
        entry: Entry,
        param: SavedParam | None,
        wanted: Sequence[Wanted],
        shards: Mapping[str, ShardReader],
        buffers: dict[bool, torch.Tensor],
    ) -> None:
        self._entry, self._param, self._shards = entry, param, shards
        self._wanted = wanted
        self._number = {stored.name: number for number, stored in wanted}
        self._saved = {} if param is None else {s.name: s for s in param.streams}
        self._first = first_element(entry.param)
        # Of each tensor what was read from its beginning on without a gap, or -1, and the sum.
        self._next: dict[_Place, int] = {}
        self._sums: dict[_Place, Any] = {}
        self._same: dict[str, bool] = {}
        self._buffers = buffers
        self._weights: torch.Tensor | None = None
        # Where strides differ, a piece is the whole parameter.
        self.whole = param is not None and not (
            param.row_major if is_sharded(entry.param) else param.strides == entry.strides
        )
        self.blocks = self.whole or any(map(_is_codes, self._saved.values()))

    def piece(self, begin: int, count: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Stream numbers and stored values (CPU) of some elements; in order, `begin` from 0 on."""
        for number, stored in self._wanted:
            if stored.name in _MASTERS:
                yield number, self._master(stored, begin, count)
            elif _is_codes(stored):
                yield from self._codes(number, stored, begin, count)
            elif not stored.name.endswith(".scale"):
                yield number, self._floats(stored, begin, count).to(stored.dtype)

    def check(self) -> set[_Place]:
        """Compares what was read with the checksums of the manifest.

        Returns:
            The tensors that were read whole and are as they were saved.

        Raises:
            CheckpointError: One is not.
        """
        known = set()
        for stream in self._saved.values():
            for piece in stream.pieces:
                place = piece.shard, piece.key
                if self._next.get(place) == stream.nbytes(piece.count):
                    found = self._sums[place].hexdigest()
                    self._shards[piece.shard].check(piece.key, found, piece.xxh3)
                    known.add(place)
        return known

    def _room(self, stream: SavedStream, count: int) -> torch.Tensor:
        """A buffer for stored values, which is good until the next."""
        apart, size = stream.name.endswith(".scale"), stream.nbytes(count)
        buffer = self._buffers.get(apart)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[apart] = torch.empty(size, dtype=torch.uint8, device="cpu")
        return buffer[:size].view(stream.dtype)

    def _overlaps(
        self, stream: SavedStream, begin: int, count: int
    ) -> Iterator[tuple[Piece, int, int]]:
        """The pieces that hold some of the entry's elements: from which on, up to which."""
        at = self._first + begin
        first = bisect_right(stream.pieces, at, key=lambda piece: piece.begin) - 1
        for number in range(max(first, 0), len(stream.pieces)):
            piece = stream.pieces[number]
            if piece.begin >= at + count:
                break
            low, high = max(at, piece.begin), min(at + count, piece.begin + piece.count)
            if low < high:
                yield piece, low, high

    def _read(self, stream: SavedStream, begin: int, count: int) -> torch.Tensor:
        """Saved values, in the order saved, in a buffer that is good until the next."""
        value = self._room(stream, count)
        if not stream.pieces:
            return value.fill_(stream.fill)
        data, done = bytes_of(value), 0
        for piece, low, high in self._overlaps(stream, begin, count):
            size = stream.nbytes(high - low)
            self._pull(stream, piece, low - piece.begin, data[done : done + size])
            done += size
        return value

    def _pull(self, stream: SavedStream, piece: Piece, begin: int, data: memoryview) -> None:
        """Reads values of a piece, from its `begin`-th element on."""
        place, at = (piece.shard, piece.key), stream.nbytes(begin)
        self._shards[piece.shard].read(piece.key, at, data)
        if self._next.get(place, 0) != at:
            self._next[place] = -1
            return
        self._next[place] = at + len(data)
        self._sums.setdefault(place, xxhash.xxh3_64()).update(data)

    def _same_blocks(self, stream: SavedStream) -> bool:
        """Whether the entry's blocks of 8-bit codes are the saved ones."""
        if stream.name not in self._same:
            self._same[stream.name] = self._compare_blocks(stream)
        return self._same[stream.name]

    def _compare_blocks(self, stream: SavedStream) -> bool:
        end = self._first + self._entry.numel
        for piece, low, high in self._overlaps(stream, 0, self._entry.numel):
            starts = (low - piece.begin) % precision.BLOCK, (low - self._first) % precision.BLOCK
            last = high == piece.begin + piece.count or (high - piece.begin) % precision.BLOCK == 0
            ends = high == end or (high - self._first) % precision.BLOCK == 0
            if any(starts) or not (last and ends):
                return False
        return True

    def _decoded(self, stored: Stored, begin: int, count: int) -> torch.Tensor:
        """A state's codes as floats, by the saved blocks that they lie in."""
        codes, scales = self._saved[stored.name], self._saved[f"{stored.name}.scale"]
        value = torch.zeros(count, dtype=torch.float32, device="cpu")
        pairs = zip(
            self._overlaps(codes, begin, count), self._overlaps(scales, begin, count), strict=True
        )
        for (piece, low, high), (scale_piece, _, _) in pairs:
            first = (low - piece.begin) // precision.BLOCK * precision.BLOCK
            elements = high - piece.begin - first
            read = []
            for stream, source in ((codes, piece), (scales, scale_piece)):
                room = self._room(stream, elements)
                self._pull(stream, source, first, bytes_of(room))
                read.append(room)
            to = torch.empty(elements, dtype=torch.float32, device="cpu")
            precision.decoded(read[0], read[1], to, self._signed(stored))
            at = low - self._first - begin
            value[at : at + high - low] = to[low - piece.begin - first :]
        return value

    def _ordered(self, value: torch.Tensor) -> torch.Tensor:
        if not self.whole or self._param is None:
            return value
        shaped = value.as_strided(self._param.shape, self._param.strides)
        return self._entry.laid_out(shaped, value.dtype).as_strided((value.numel(),), (1,))

    def _floats(self, stored: Stored, begin: int, count: int) -> torch.Tensor:
        """A state as float32 or bfloat16, as saved."""
        saved = self._saved.get(stored.name)
        if saved is None:
            spec = next(s for s in self._entry.streams if s.name == stored.name)
            return torch.full((count,), spec.fill, dtype=torch.float32, device="cpu")
        if _is_codes(saved):
            return self._ordered(self._decoded(stored, begin, count))
        return self._ordered(self._read(saved, begin, count))

    def _codes(
        self, number: int, stored: Stored, begin: int, count: int
    ) -> Iterator[tuple[int, torch.Tensor]]:
        scale = f"{stored.name}.scale"
        saved = self._saved.get(stored.name)
        if saved and _is_codes(saved) and not self.whole and self._same_blocks(saved):
            yield number, self._read(saved, begin, count)
            yield self._number[scale], self._read(self._saved[scale], begin, count)
            return
        values = self._floats(stored, begin, count).float()
        codes, scales = precision.encoded(values, self._signed(stored))
        yield number, codes
        yield self._number[scale], scales

    def _signed(self, stored: Stored) -> bool:
        return next(s.signed for s in self._entry.streams if s.name == stored.name)

    def _master(self, stored: Stored, begin: int, count: int) -> torch.Tensor:
        here = self._entry.param.dtype
        there = None if self._param is None else self._param.dtype
        found = {n: s for n in _MASTERS if (s := self._saved.get(n)) and s.pieces}
        if stored.name in found and here == there:
            return self._ordered(self._read(found[stored.name], begin, count))
        weights = self._weights_of(begin, count)
        whole = weights.float()
        if "master" in found and here in _HALVES:
            whole = self._ordered(self._read(found["master"], begin, count))
        elif "master_low" in found and here == there == torch.bfloat16:
            low = self._ordered(self._read(found["master_low"], begin, count))
            whole = precision.joined(weights, low)
        if stored.name == "master":
            return whole
        if here != torch.bfloat16:  # a float32 weight is its own master
            return torch.zeros(count, dtype=torch.int16, device="cpu")
        return precision.low_of(whole, weights)

    def _weights_of(self, begin: int, count: int) -> torch.Tensor:
        entry = self._entry
        if self._weights is None:
            p = local(entry.param).detach()
            given = p if entry.fits(p) else entry.laid_out(p, p.dtype)
            self._weights = given.as_strided((math.prod(entry.shape),), (1,))
        return self._weights[begin : begin + count].cpu()
