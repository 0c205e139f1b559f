# SPDX-License-Identifier: Apache-2.0
# What watching costs: training steps with hift_ext.monitor and without, in turns, and what the
# names of stages and the running sums cost where nobody watches.
"""`python benchmarks/bench_monitor.py --json FILE --plot FILE.png`."""

from __future__ import annotations

import itertools
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import COLORS, arguments, deliver, draw, machine, median_ratio, with_rounds
from matplotlib.figure import Figure
from torch import nn

import hift_ext
from hift_ext import demo, ops
from hift_ext.profiling import staged
from hift_ext.totals import Totals

WAYS = ("off", "on")
STAGES = 4  # that a step passes: freeze, step, update, and the norm where it clips


class Small(nn.Module):
    """A step of it takes about a millisecond: what the monitor itself takes shows."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(96, 96) for _ in range(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Residual linear layers."""
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return x


@dataclass
class Training:
    """A model in training, its state on disk.

    Attributes:
        name: Of the model.
        optimizer: In training.
        step: One step.
        steps: Of a turn: whole passes, since groups take different times.
        turns: Seconds a step, a number for each turn, by way.
    """

    name: str
    optimizer: hift_ext.HiFTOptimizer
    step: Callable[[], object]
    steps: int
    turns: dict[str, list[float]] = field(default_factory=lambda: {way: [] for way in WAYS})

    def turn(self, way: str, folder: Path) -> None:
        """Trains for a turn and keeps its time."""
        if way == "off":
            self.turns[way].append(self._seconds())
            return
        log = folder / f"{self.name}-{len(self.turns[way])}.jsonl"
        with hift_ext.monitor(self.optimizer, log, plot=log.with_suffix(".png")):
            self.step()  # the first one says what the run is
            self.turns[way].append(self._seconds())
        written = log.read_text().count("\n")
        if written != self.steps + 2:
            raise RuntimeError(f"{log} has {written} lines, not {self.steps + 2}")

    def _seconds(self) -> float:
        begin = time.perf_counter()
        for _ in range(self.steps):
            self.step()
        return (time.perf_counter() - begin) / self.steps


def small() -> Training:
    """The small model, with pages of 4 KiB: 19 of them move each way in a step."""
    torch.manual_seed(0)
    model = Small()
    optimizer = hift_ext.AdamW(model, store="disk", page_bytes=4096)
    batch = torch.randn(4, 96)

    def step() -> None:
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return Training("small", optimizer, step, 8 * len(optimizer.groups))


def minilm(batch: int, length: int) -> Training:
    """The demo's model on the demo's reviews."""
    options = demo.Options(batch=batch, max_length=length)
    model, data = demo.load_model(options.seed), demo.load_reviews(length)
    model.train()
    optimizer = hift_ext.AdamW(model, lr=1e-5, store="disk")
    batches: Iterator[list[torch.Tensor]] = itertools.cycle(
        itertools.islice(demo._batches(data.training, options), len(optimizer.groups))
    )

    def step() -> None:
        ids, mask, labels = next(batches)
        inputs = demo._inputs(ids, mask, torch.device("cpu"))
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Training("minilm", optimizer, step, len(optimizer.groups))


def measure(training: Training, rounds: int, folder: Path) -> None:
    """Each way once a round, in a new order each time."""
    for _ in range(2 * len(training.optimizer.groups)):
        training.step()  # makes state, and has pages to move
    order, shuffle = list(WAYS), random.Random(0)
    for number in range(rounds):
        shuffle.shuffle(order)
        for way in order:
            training.turn(way, folder)
        off, on = (1e3 * training.turns[way][-1] for way in WAYS)
        text = f"{training.name}, round {number + 1} of {rounds}: {off:.3f} ms, with {on:.3f} ms"
        print(text, file=sys.stderr, flush=True)


def row_of(training: Training) -> dict[str, Any]:
    """What was measured of one model."""
    off, on = (training.turns[way] for way in WAYS)
    return {
        "model": training.name,
        "groups": len(training.optimizer.groups),
        "rounds": len(off),
        "steps": training.steps,
        "off_ms": 1e3 * statistics.median(off),
        "on_ms": 1e3 * statistics.median(on),
        "cost_us": 1e6 * statistics.median(b - a for a, b in zip(off, on, strict=True)),
        "ratio": median_ratio(on, off),
    }


def unwatched_us(repeats: int) -> dict[str, float]:
    """Microseconds a step spends on names of stages that nobody reads, and on the running sums."""
    totals, report = Totals(), ops.Report(1, 2, 0.1, 0.2, 0.3, 0.4)

    def stages() -> None:
        for _ in range(STAGES):
            staged("step", "a group", int)

    result = {}
    for name, run in (("stages_us", stages), ("totals_us", lambda: totals.add(3, report))):
        samples = []
        for _ in range(15):
            begin = time.perf_counter()
            for _ in range(repeats):
                run()
            samples.append((time.perf_counter() - begin) / repeats)
        result[name] = 1e6 * statistics.median(samples)
    return result


def plot(path: Path, result: dict[str, Any]) -> None:
    """A panel for each model: each round's step with the monitor, against without."""
    rows = result["rows"]
    figure = Figure(figsize=(4.6 * len(rows), 3.4))
    for row, panel in zip(rows, figure.subplots(1, len(rows), squeeze=False)[0], strict=True):
        for way, color in zip(WAYS, (COLORS["torch_fused"], COLORS["hift"]), strict=True):
            values = [1e3 * seconds for seconds in row["samples"][way]]
            panel.plot(range(1, len(values) + 1), values, ".-", color=color, label=f"monitor {way}")
        panel.set_ylim(0, 1.3 * max(max(part) for part in row["samples"].values()) * 1e3)
        panel.set_xlabel("round")
        panel.set_ylabel("ms a step")
        panel.set_title(
            f"{row['model']}: ratio {row['ratio']:.4f}, {row['cost_us']:.0f} us a step", fontsize=9
        )
        panel.legend(fontsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    draw(path, figure, "A training step with and without hift_ext.monitor", result["machine"])


def main() -> None:
    """Measures, prints as it goes, and writes what was asked for."""
    parser = arguments("Training steps with hift_ext.monitor and without, in turns.")
    options, rounds = with_rounds(parser, 30, "turns of each way", "short turns")
    result: dict[str, Any] = {"machine": machine(), "rows": []}
    result |= unwatched_us(200 if options.quick else 20_000)
    trainings = [small(), minilm(*((2, 8) if options.quick else (32, 64)))]
    with tempfile.TemporaryDirectory() as folder:
        for training in trainings:
            measure(training, rounds, Path(folder))
            result["rows"].append({**row_of(training), "samples": training.turns})
            training.optimizer.close()
    # What it takes in a step that takes next to nothing else, as a share of the demo's step.
    first, last = result["rows"]
    result["cost_us"] = first["cost_us"]
    result["share_of_demo_step"] = first["cost_us"] / (1e3 * last["off_ms"])
    print(
        f"watching: {result['cost_us']:.0f} us a step, {100 * result['share_of_demo_step']:.3f} % "
        f"of the demo's; ratio measured there {last['ratio']:.4f}. Not watching: stages "
        f"{result['stages_us']:.2f} us, sums {result['totals_us']:.2f} us",
        file=sys.stderr,
    )
    deliver(options, result, plot)


if __name__ == "__main__":
    main()
