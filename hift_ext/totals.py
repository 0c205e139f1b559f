# SPDX-License-Identifier: Apache-2.0
"""What all steps since an optimizer was made moved and took, by group: sums, means and worst.

A step leaves its report in a list; many are added up at once, when somebody asks or it is long.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from hift_ext.engines import StateEngine
from hift_ext.ops import Report

TIMES = ("transfer_ms", "hidden_ms", "wait_ms", "update_ms", "step_ms")


_AT_ONCE = 1024
"""Reports that are added up together: one at a time costs several times as much."""


def stats(report: Report, engine: StateEngine | None) -> dict[str, float]:
    """One step's report, with what the engine holds: see `HiFTOptimizer.stats`."""
    return {
        **report._asdict(),
        "hidden_ms": max(0.0, report.transfer_ms - report.wait_ms),
        "store_bytes": engine.store_bytes if engine else 0,
        "staging_bytes": engine.staging_bytes if engine else 0,
        "state_bytes": engine.touched_bytes if engine else 0,
    }


class Tally:
    """Sums over some steps."""

    __slots__ = ("bytes_in", "bytes_out", "steps", "sums", "worst")

    def __init__(self) -> None:
        self.steps = self.bytes_in = self.bytes_out = 0
        self.sums = [0.0] * len(TIMES)
        self.worst = [0.0] * len(TIMES)

    def add(self, reports: np.ndarray) -> None:
        """Adds steps: a row of each, its columns a report's."""
        bytes_in, bytes_out, wait, transfer, update, step = reports.T
        self.steps += len(reports)
        self.bytes_in += int(bytes_in.sum())
        self.bytes_out += int(bytes_out.sum())
        hidden = np.maximum(transfer - wait, 0.0)
        times = np.stack([transfer, hidden, wait, update, step])
        self.sums = (times.sum(axis=1) + self.sums).tolist()
        self.worst = np.maximum(times.max(axis=1), self.worst).tolist()

    def join(self, other: Tally) -> None:
        """Adds another's steps."""
        self.steps += other.steps
        self.bytes_in += other.bytes_in
        self.bytes_out += other.bytes_out
        self.sums = [a + b for a, b in zip(self.sums, other.sums, strict=True)]
        self.worst = [max(pair) for pair in zip(self.worst, other.worst, strict=True)]

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "steps": self.steps,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "mean": {
                name: value / max(self.steps, 1)
                for name, value in zip(TIMES, self.sums, strict=True)
            },
            "worst": dict(zip(TIMES, self.worst, strict=True)),
        }


class Totals:
    """A tally for each group."""

    def __init__(self) -> None:
        self._tallies: dict[int, Tally] = {}
        self._waiting: list[tuple[int, Report]] = []
        self._lock = threading.Lock()

    def add(self, group: int, report: Report) -> None:
        """Adds a step of a group."""
        waiting = self._waiting
        waiting.append((group, report))
        if len(waiting) >= _AT_ONCE:
            self._settle()

    def _settle(self) -> None:
        with self._lock:  # steps may be added meanwhile, at the list's end
            steps = self._waiting[:]
            del self._waiting[: len(steps)]
            if not steps:
                return
            groups = np.array([group for group, _ in steps])
            reports = np.array([report for _, report in steps], dtype=np.float64)
            for group in np.unique(groups).tolist():
                self._tallies.setdefault(group, Tally()).add(reports[groups == group])

    def summary(self, names: list[str], passes: int) -> dict[str, Any]:
        """All of it as plain numbers: see `HiFTOptimizer.summary`."""
        self._settle()
        whole, groups = Tally(), []
        for index, name in enumerate(names):
            tally = self._tallies.get(index) or Tally()
            whole.join(tally)
            groups.append({"name": name, **tally.as_dict()})
        return {"passes": passes, **whole.as_dict(), "groups": groups}
