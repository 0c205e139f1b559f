# SPDX-License-Identifier: Apache-2.0
"""What all steps since an optimizer was made moved and took, by group: sums, means and worst.

A step adds a few numbers; the rest is worked out when somebody asks.
"""

from __future__ import annotations

from typing import Any

from hift_ext.engines import StateEngine
from hift_ext.ops import Report

TIMES = ("transfer_ms", "hidden_ms", "wait_ms", "update_ms", "step_ms")


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

    def add(self, report: Report) -> None:
        """Adds a step."""
        bytes_in, bytes_out, wait, transfer, update, step = report
        self.steps += 1
        self.bytes_in += bytes_in
        self.bytes_out += bytes_out
        hidden = transfer - wait if transfer > wait else 0.0
        sums, worst = self.sums, self.worst
        sums[2] += wait
        sums[3] += update
        sums[4] += step
        if update > worst[3]:
            worst[3] = update
        if step > worst[4]:
            worst[4] = step
        if transfer or wait:  # nothing moves where state is updated in place
            sums[0] += transfer
            sums[1] += hidden
            worst[0] = max(worst[0], transfer)
            worst[1] = max(worst[1], hidden)
            worst[2] = max(worst[2], wait)

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

    def add(self, group: int, report: Report) -> None:
        """Adds a step of a group."""
        tally = self._tallies.get(group)
        if tally is None:
            tally = self._tallies[group] = Tally()
        tally.add(report)

    def summary(self, names: list[str], passes: int) -> dict[str, Any]:
        """All of it as plain numbers: see `HiFTOptimizer.summary`."""
        whole, groups = Tally(), []
        for index, name in enumerate(names):
            tally = self._tallies.get(index) or Tally()
            whole.join(tally)
            groups.append({"name": name, **tally.as_dict()})
        return {"passes": passes, **whole.as_dict(), "groups": groups}
