# SPDX-License-Identifier: Apache-2.0
"""What of a parameter a rank saves, and where the engine has it.

One home a parameter that has values: copied stream by stream, or cut out of the page file.
"""

from __future__ import annotations

from dataclasses import dataclass

from hift_ext.manifest import SavedParam
from hift_ext.paged_state import Entry
from hift_ext.shards import TensorSpec


@dataclass(frozen=True)
class Home:
    """A parameter that has values: the engine's streams they are in, and the rank's part of it."""

    entry: Entry
    param: SavedParam
    numbers: list[int]
    begin: int
    count: int

    @property
    def part(self) -> tuple[int, int, int]:
        """What ranks with the same values have in common."""
        return self.param.index, self.begin, self.count

    @property
    def specs(self) -> list[TensorSpec]:
        """A tensor for each stream, whole or this rank's rows."""
        return [self.param.spec(stream, self.begin, self.count) for stream in self.param.streams]
