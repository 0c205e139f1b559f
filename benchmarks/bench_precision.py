# SPDX-License-Identifier: Apache-2.0
# One optimizer step in every precision, beside torch's fused AdamW in float32 and in bfloat16. All
# ways are timed in turns, and each says how near it comes to moving its bytes at float32's speed.
"""`python benchmarks/bench_precision.py --json FILE --plot FILE.png`."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import COLORS, arguments, deliver, draw, interleave, machine, median_ratio, with_rounds
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

import hift_ext

LR = 1e-5
ELEMENTS, QUICK_ELEMENTS = 1 << 26, 1 << 16
BLOCK = 256  # elements of 8-bit state that share a float32 scale
NAMES: dict[Any, str] = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    "8bit": "8bit",
}
STATE_BYTES: dict[Any, float] = {torch.float32: 4, torch.bfloat16: 2, "8bit": 1 + 4 / BLOCK}
MASTER_BYTES = {None: 0, "split": 2, "fp32": 4}


@dataclass(frozen=True)
class Way:
    """A rule, its types, and whose step it is. Without `options` a way uses the defaults."""

    name: str
    rule: str
    dtype: torch.dtype
    state: torch.dtype | str = torch.float32
    master: str | None = None
    options: tuple[tuple[str, Any], ...] = ()
    impl: str = "hift"

    @property
    def bytes_per_element(self) -> float:
        """Weight, state and master are read and written, the gradient is read."""
        states = 2 if self.rule == "adamw" else 1
        kept = states * STATE_BYTES[self.state] + MASTER_BYTES[self.master]
        return 3 * self.dtype.itemsize + 2 * kept

    def optimizer(self, p: torch.nn.Parameter) -> torch.optim.Optimizer:
        """The optimizer of one parameter, as a user would make it."""
        if self.impl == "torch_fused":
            return torch.optim.AdamW([p], lr=LR, fused=True)
        options: dict[str, Any] = {"layers_per_group": "all", "store": "ram", **dict(self.options)}
        if self.state is not torch.float32:
            options["state_dtype"] = self.state
        if self.rule == "sgd":
            return hift_ext.SGD([p], lr=LR, momentum=0.9, **options)
        return hift_ext.AdamW([p], lr=LR, **options)


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
BARE, STOCHASTIC = ("master", None), ("rounding", "stochastic")
WAYS = (
    Way("fp32", "adamw", F32),
    Way("fp32, bf16 state", "adamw", F32, BF16),
    Way("fp32, 8bit state", "adamw", F32, "8bit"),
    Way("bf16, no master", "adamw", BF16, options=(BARE,)),
    Way("bf16, split master", "adamw", BF16, master="split"),  # the default
    Way("bf16, fp32 master", "adamw", BF16, master="fp32", options=(("master", "fp32"),)),
    Way("bf16, split master, bf16 state", "adamw", BF16, BF16, "split"),
    Way("bf16, split master, 8bit state", "adamw", BF16, "8bit", "split"),
    Way("all bf16, nearest", "adamw", BF16, BF16, options=(BARE,)),
    Way("all bf16, stochastic", "adamw", BF16, BF16, options=(BARE, STOCHASTIC)),
    Way("fp16, fp32 master", "adamw", F16, master="fp32"),  # the default
    Way("torch fp32", "adamw", F32, impl="torch_fused"),
    Way("torch all bf16", "adamw", BF16, BF16, impl="torch_fused"),
    Way("sgd fp32", "sgd", F32),
    Way("sgd fp32, 8bit state", "sgd", F32, "8bit"),
)
FP32 = {"adamw": "fp32", "sgd": "sgd fp32"}
TORCH_BF16 = "torch all bf16"
TARGETS = (
    ("all bf16, nearest", "ratio_to_torch_bf16", 0.75),
    ("all bf16, stochastic", "ratio_to_torch_bf16", 0.75),
    ("fp32, 8bit state", "ratio_to_fp32", 1.0),
    ("bf16, split master, 8bit state", "ratio_to_fp32", 1.0),
    ("sgd fp32, 8bit state", "ratio_to_fp32", 1.0),
)


def optimizers(elements: int) -> dict[str, torch.optim.Optimizer]:
    """An optimizer for each way, on a parameter of its own with a random gradient.

    Gradients share memory where their types agree, and so do weights that have no master (who
    shares one with another optimizer would find its master overruled at every step): with 64M
    elements the process peaks at 8.2 GB.
    """
    values, slope = torch.randn(elements), 1e-3 * torch.randn(elements)
    weights = {way.dtype: values.to(way.dtype) for way in WAYS}
    grads = {way.dtype: slope.to(way.dtype) for way in WAYS}
    made = {}
    for way in WAYS:
        weight = weights[way.dtype]
        p = torch.nn.Parameter(weight if way.master is None else weight.clone())
        p.grad = grads[way.dtype]
        made[way.name] = way.optimizer(p)
    return made


def state_bytes(optimizer: torch.optim.Optimizer) -> float:
    """Bytes of state and master that an optimizer keeps, by its own account."""
    if isinstance(optimizer, hift_ext.HiFTOptimizer):
        return optimizer.stats()["state_bytes"]
    states = (tensors.items() for tensors in optimizer.state.values())
    return sum(tensor.nbytes for items in states for name, tensor in items if name != "step")


def rows_of(
    made: Mapping[str, torch.optim.Optimizer],
    samples: Mapping[str, Sequence[float]],
    elements: int,
) -> list[dict[str, Any]]:
    """A row for each way. Ratios are times over times, medians over the rounds.

    `of_memory` is the share of its time that a way would need if its bytes moved as fast as those
    of the same rule's float32 step in the same round.
    """
    per_element = {way.name: way.bytes_per_element for way in WAYS}
    rows = []
    for way in WAYS:
        seconds, fp32 = samples[way.name], FP32[way.rule]
        median, moved = statistics.median(seconds), way.bytes_per_element * elements
        less = way.bytes_per_element / per_element[fp32]
        rows.append(
            {
                "way": way.name,
                "impl": way.impl,
                "rule": way.rule,
                "param": NAMES[way.dtype],
                "grad": NAMES[way.dtype],
                "state": NAMES[way.state],
                "master": way.master,
                "rounding": dict(way.options).get("rounding", "nearest"),
                "elements": elements,
                "median_ms": 1e3 * median,
                "min_ms": 1e3 * min(seconds),
                "bytes_per_element": way.bytes_per_element,
                "bytes": moved,
                "state_bytes": state_bytes(made[way.name]),
                "gbps": moved / median / 1e9,
                "ratio_to_fp32": median_ratio(seconds, samples[fp32]),
                "ratio_to_torch_bf16": (
                    median_ratio(seconds, samples[TORCH_BF16]) if way.rule == "adamw" else None
                ),
                "of_memory": less * median_ratio(samples[fp32], seconds),
                "samples": len(seconds),
            }
        )
    return rows


def targets_of(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was promised beside what was measured; promised is the step that memory bounds."""
    by_way = {row["way"]: row for row in rows}
    judged = rows[0]["elements"] >= ELEMENTS
    return [
        {
            "way": way,
            "figure": figure,
            "at_most": most,
            "measured": by_way[way][figure],
            "met": by_way[way][figure] <= most if judged else None,
        }
        for way, figure, most in TARGETS
    ]


def plot(path: Path, result: dict[str, Any]) -> None:
    """A bar for each way, and on it the time that its bytes alone would take."""
    rows = result["rows"]
    figure = Figure(figsize=(10.5, 0.36 * len(rows) + 1.9))
    panel = figure.subplots()
    times = [row["median_ms"] for row in rows]
    panel.barh([row["way"] for row in rows], times, color=[COLORS[r["impl"]] for r in rows])
    marks = [row["median_ms"] * row["of_memory"] for row in rows]
    panel.plot(marks, range(len(rows)), "|", color=COLORS["ceiling"], ms=14, mew=2)
    for index, row in enumerate(rows):
        text = f"{row['median_ms']:.3g} ms, {row['bytes_per_element']:.3g} B an element"
        text += f", {row['ratio_to_fp32']:.2f} of fp32's time"
        if row["way"].startswith("all bf16"):
            text += f", {row['ratio_to_torch_bf16']:.2f} of torch's in bf16"
        # Beside the bar, and beside the mark where bytes alone would have taken longer.
        panel.text(max(times[index], marks[index]), index, f"  {text}", va="center", fontsize=8)
    panel.invert_yaxis()
    panel.set_xlim(0, 2.0 * max(times + marks))  # room for what is written beside the bars
    panel.tick_params(labelsize=9)
    panel.set_xlabel("ms a step (median)", fontsize=9)
    panel.spines[["top", "right"]].set_visible(False)
    mark = {"color": COLORS["ceiling"], "marker": "|", "ls": "", "ms": 12, "mew": 2}
    figure.legend(
        handles=[
            Patch(color=COLORS["hift"], label="hift_ext"),
            Patch(color=COLORS["torch_fused"], label="torch, fused"),
            Line2D([], [], label="its bytes at the speed of the rule's fp32 step", **mark),
        ],
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        ncols=3,
        fontsize=9,
        frameon=False,
    )
    size = rows[0]["elements"]
    many = f"{size >> 20}M" if size >> 20 else f"{size >> 10}K"
    draw(path, figure, f"One step on one tensor of {many} elements", result["machine"])


def show(result: dict[str, Any]) -> None:
    """Prints a line a row, and then the targets."""
    for row in result["rows"]:
        torch_bf16 = row["ratio_to_torch_bf16"]
        print(
            f"{row['way']:32}{row['median_ms']:10.4f} ms {row['bytes_per_element']:7.3f} B"
            f"{row['gbps']:7.1f} GB/s  x fp32 {row['ratio_to_fp32']:.3f}"
            f"  of memory {row['of_memory']:.3f}"
            + (f"  x torch bf16 {torch_bf16:.3f}" if torch_bf16 else ""),
            file=sys.stderr,
        )
    verdicts = {True: "met", False: "MISSED", None: "not judged on so few elements"}
    for target in result["targets"]:
        print(
            f"target: {target['way']}: {target['figure']} at most {target['at_most']:.2f}: "
            f"{target['measured']:.3f}, {verdicts[target['met']]}",
            file=sys.stderr,
        )


def main() -> None:
    """Measures, prints a line a row, and writes what was asked for."""
    parser = arguments("An optimizer step in every precision, beside torch's fused AdamW.")
    options, rounds = with_rounds(parser, 15, "samples of each row", "64K elements")
    elements = QUICK_ELEMENTS if options.quick else ELEMENTS
    made = optimizers(elements)
    runs: dict[str, Callable[[], object]] = {name: each.step for name, each in made.items()}
    samples = interleave(runs, rounds, 0.001 if options.quick else 0.02)
    rows = rows_of(made, samples, elements)
    result = {"machine": machine(), "rows": rows, "targets": targets_of(rows)}
    show(result)
    deliver(options, result, plot)


if __name__ == "__main__":
    main()
