# SPDX-License-Identifier: Apache-2.0
"""When each copy, update and wait ran: what the compiled engine tells if it is asked (intervals.h).

Engines that are not compiled tell none.
"""

from __future__ import annotations

from typing import Any

from hift_ext import ops
from hift_ext.engines import StateEngine

Interval = tuple[int, int, int, int, float, float]
"""One copy, update or wait: kind, group and number of its page (-1 for updates and waits), bytes
moved, begin and end (seconds, as time.perf_counter() gives them).

A plain tuple, as the compiled module makes it: a step may have hundreds.
"""

IN, OUT, UPDATE, WAIT, READ, WRITE = range(6)
"""Kinds. IN and OUT of the memory that is computed in; READ and WRITE: between a file and the host
memory that a GPU's IN and OUT go through."""


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
    told: tuple[list[Interval], int] = inner.take_intervals()
    return told
