# SPDX-License-Identifier: Apache-2.0
# Does a precision cost learning? A pretrained MiniLM learns film reviews in each of them, from the
# same weights, on the same batches, at the same rate; the loss curves stand together.
"""`python benchmarks/bench_modes.py --json FILE --plot FILE.png`."""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import arguments, deliver, draw, machine
from matplotlib.figure import Figure
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import hift_ext
from hift_ext import demo

SEED, BATCH, MAX_LENGTH = 0, 16, 32
LAST = 20  # steps whose mean loss is given as the final one
SMOOTH = 15  # steps that a drawn point averages
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Mode:
    """The model's type, what the optimizer is told, and how the curve is drawn."""

    name: str
    dtype: torch.dtype
    color: str
    style: str = "-"
    options: Mapping[str, Any] = field(default_factory=dict)


F32, BF16 = torch.float32, torch.bfloat16
MODES = (
    Mode("fp32", F32, "#222222"),
    Mode("fp32, 8bit state", F32, "#888888", "--", {"state_dtype": "8bit"}),
    Mode("bf16, no master", BF16, "#c8102e", "-", {"master": None}),
    Mode("bf16, stochastic", BF16, "#e8963a", "-", {"rounding": "stochastic"}),
    Mode("bf16, fp32 master", BF16, "#1f4e79", "-", {"master": "fp32"}),
    Mode("bf16, split master", BF16, "#6fa8dc", "--", {"master": "split"}),
    Mode("bf16, split, bf16 state", BF16, "#2e8b57", "-", {"master": "split", "state_dtype": BF16}),
    Mode(
        "bf16, split, 8bit state", BF16, "#9b59b6", "-.", {"master": "split", "state_dtype": "8bit"}
    ),
)

_MATMULS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
}


class RoundedMatmuls(TorchDispatchMode):
    """Has bfloat16 matrices multiplied in float32 and the products rounded, backward too.

    That is what bfloat16 units compute, whose sums are float32. Without them torch's own loop on
    the CPU takes 20 times as long, and training could not be shown.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func not in _MATMULS or args[0].dtype is not torch.bfloat16:
            return func(*args, **(kwargs or {}))
        wide = (x.float() if isinstance(x, torch.Tensor) else x for x in args)
        return func(*wide, **(kwargs or {})).bfloat16()


def batches(data: TensorDataset) -> Iterator[list[torch.Tensor]]:
    """Endless shuffled batches, the same for every mode."""
    order = torch.Generator().manual_seed(SEED)
    loader = DataLoader(data, BATCH, shuffle=True, drop_last=True, generator=order)
    while True:
        yield from loader


def train(
    mode: Mode,
    pretrained: torch.nn.Module,
    data: TensorDataset,
    held_out: TensorDataset,
    steps: int,
    say: Callable[[int, float], None],
) -> dict[str, Any]:
    """Trains a copy of the model and judges it: one mode's row."""
    model = copy.deepcopy(pretrained).to(mode.dtype).train()
    losses, ms = [], []
    torch.manual_seed(SEED)  # dropout
    # Attention's fused kernel would hide its products from RoundedMatmuls.
    with (
        hift_ext.AdamW(
            model, lr=demo.RECIPES["adamw"].lr, store="ram", seed=SEED, **mode.options
        ) as optimizer,
        sdpa_kernel(SDPBackend.MATH),
        RoundedMatmuls(),
    ):
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
        for ids, mask, labels in itertools.islice(batches(data), steps):
            begin = time.perf_counter()
            logits = model(input_ids=ids, attention_mask=mask).logits
            # In float32: bfloat16 knows no loss between 0.691 and 0.695.
            loss = torch.nn.functional.cross_entropy(logits.float(), labels)
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            ms.append(1e3 * (time.perf_counter() - begin))
            losses.append(loss.item())
            say(len(losses), losses[-1])
        state_bytes = optimizer.stats()["state_bytes"]
        accuracy = demo.accuracy(model, held_out)
    return {
        "way": mode.name,
        "param": NAMES[mode.dtype],
        "options": {name: NAMES.get(value, value) for name, value in mode.options.items()},
        "dataset": "rotten_tomatoes",
        "seed": SEED,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "final_loss": statistics.fmean(losses[-LAST:]),
        "accuracy": accuracy,
        "step_ms": statistics.median(ms),
        "state_bytes": state_bytes,
        "losses": losses,
    }


def smoothed(values: Sequence[float]) -> dict[int, float]:
    """The mean over SMOOTH values around each step that has so many."""
    reach = min(SMOOTH // 2, (len(values) - 1) // 2)
    return {
        index + 1: statistics.fmean(values[index - reach : index + reach + 1])
        for index in range(reach, len(values) - reach)
    }


def plot(path: Path, result: dict[str, Any]) -> None:
    """All loss curves in one panel, smoothed, over the losses as they were."""
    figure = Figure(figsize=(12, 6))
    panel = figure.subplots()
    for mode, row in zip(MODES, result["rows"], strict=True):
        steps = range(1, 1 + row["steps"])
        panel.plot(steps, row["losses"], color=mode.color, lw=0.6, alpha=0.18)
        label = f"{mode.name}: {row['final_loss']:.3f}, {100 * row['accuracy']:.1f} %"
        means = smoothed(row["losses"])
        panel.plot(
            list(means), list(means.values()), mode.style, color=mode.color, lw=1.8, label=label
        )
    panel.set_xlabel("step")
    panel.set_ylabel(f"training loss (mean of {SMOOTH} steps; faint: each step's)")
    panel.legend(
        title=f"mean loss of the last {min(LAST, len(steps))} steps, held-out accuracy",
        fontsize=9,
        title_fontsize=9,
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        frameon=False,
    )
    panel.spines[["top", "right"]].set_visible(False)
    rows = result["rows"]
    title = f"MiniLM on Rotten Tomatoes, {rows[0]['steps']} steps of {result['batch']} reviews"
    draw(path, figure, f"{title}, one seed: every precision", result["machine"])


def parsed() -> argparse.Namespace:
    parser = arguments("MiniLM on film reviews, trained in every precision: the loss curves.")
    parser.add_argument("--steps", type=int, help="steps of each training (180; at least 2)")
    parser.add_argument(
        "--quick", action="store_true", help="one block, a few steps of few words: a trial"
    )
    options = parser.parse_args()
    if options.steps is None:
        options.steps = 4 if options.quick else 180
    if options.steps < 2:
        parser.error(f"--steps must be at least 2, not {options.steps}")
    return options


def main() -> None:
    """Trains, prints as it goes, and writes what was asked for."""
    options = parsed()
    demo.check_packages()
    length, count = (8, 20) if options.quick else (MAX_LENGTH, demo.HELD_OUT)
    data = demo.load_reviews(length)
    # Sorted by length: every n-th is a fair sample.
    held_out = TensorDataset(*(column[:: demo.HELD_OUT // count] for column in data.held_out[:]))
    pretrained: Any = demo.load_model(SEED)
    if options.quick:
        pretrained.bert.encoder.layer = pretrained.bert.encoder.layer[:1]
    result: dict[str, Any] = {
        "machine": machine(),
        "batch": BATCH,
        "max_length": length,
        "lr": demo.RECIPES["adamw"].lr,
        "held_out": len(held_out),
        "rows": [],
    }
    for mode in MODES:

        def say(step: int, loss: float, name: str = mode.name) -> None:
            if step % max(1, options.steps // 4) == 0:
                print(f"{name}, step {step}/{options.steps}: loss {loss:.3f}", file=sys.stderr)

        row = train(mode, pretrained, data.training, held_out, options.steps, say)
        result["rows"].append(row)
        print(
            f"{row['way']:24} loss of the last {LAST}: {row['final_loss']:.4f}"
            f"  accuracy {row['accuracy']:.3f}  {row['step_ms']:.0f} ms a step"
            f"  state {row['state_bytes'] / 1e6:.1f} MB",
            file=sys.stderr,
            flush=True,
        )
    deliver(options, result, plot)


if __name__ == "__main__":
    main()
