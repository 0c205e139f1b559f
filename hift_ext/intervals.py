# SPDX-License-Identifier: Apache-2.0
"""When each copy, update and wait ran: what the compiled engine tells if it is asked (intervals.h).

Engines that are not compiled tell none.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from hift_ext import ops
from hift_ext.engines import StateEngine

Kind = Literal["in", "out", "update", "wait", "read", "write"]
_KINDS: tuple[Kind, ...] = ("in", "out", "update", "wait", "read", "write")


class Interval(NamedTuple):
    """One copy, update or wait.

    Attributes:
        kind: `in` and `out` of the memory that is computed in; `read` and `write`: between a file
            and the host memory that a GPU's `in` and `out` go through.
        group: Of the page; -1 for updates and waits.
        page: Its number; -1 for updates and waits.
        bytes: Moved.
        begin: Seconds, as time.perf_counter() gives them.
        end: Seconds.
    """

    kind: Kind
    group: int
    page: int
    bytes: int
    begin: float
    end: float


def compiled(engine: StateEngine | None) -> Any:
    """The compiled module's engine inside; None where there is none."""
    inner = getattr(engine, "_engine", None)
    return inner if isinstance(inner, ops.ext.Engine) else None


def keep_intervals(engine: StateEngine | None, most: int) -> bool:
    """Has an engine keep at most `most` intervals until they are taken; 0 stops it.

    Returns:
        Whether it can.
    """
    inner = compiled(engine)
    if inner is not None:
        inner.keep_intervals(most)
    return inner is not None


def take_intervals(engine: StateEngine | None) -> tuple[list[Interval], int]:
    """The intervals told since the last call, and how many found no room."""
    inner = compiled(engine)
    if inner is None:
        return [], 0
    told, lost = inner.take_intervals()
    return [Interval(_KINDS[kind], *rest) for kind, *rest in told], lost
