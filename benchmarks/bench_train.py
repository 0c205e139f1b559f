# SPDX-License-Identifier: Apache-2.0
# A pretrained MiniLM learns to tell good film reviews from bad ones: with hift_ext, with HiFT in
# plain torch, and with all parameters at once. The three train in turns on the same batches.
"""`python benchmarks/bench_train.py --json FILE --plot FILE.png`."""

from __future__ import annotations

import argparse
import itertools
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import TorchHiFT, arguments, deliver, draw, machine, median_ratio
from matplotlib.figure import Figure
from torch.utils.data import DataLoader, TensorDataset

import hift_ext
from hift_ext import demo

BATCH = 32
PEAK_STEPS = 9
METHODS = ("hift", "torch_hift", "full")
LABELS = {
    "hift": "hift_ext.AdamW",
    "torch_hift": "HiFT loop in plain torch",
    "full": "torch.optim.AdamW, all parameters",
}
COLORS = {"hift": "#c8102e", "torch_hift": "#3b6ea5", "full": "#8fb3d9"}


class Run:
    """One way to train a model of its own.

    Args:
        method: One of METHODS.
        seed: Draws the classifier, the batches and the dropout.
        steps: Steps of the whole training; the rate decays over them to zero.
        store: Where `hift` keeps its state.
    """

    def __init__(self, method: str, seed: int, steps: int, store: str) -> None:
        self.method = method
        recipe = demo.RECIPES["adamw"]
        self.model = demo.load_model(seed).train()
        self.optimizer: Any
        self.scheduler: Any = None
        if method == "full":
            self.optimizer = torch.optim.AdamW(
                self.model.parameters(), lr=recipe.full_lr, fused=True
            )
        elif method == "hift":
            self.optimizer = hift_ext.AdamW(self.model, lr=recipe.lr, store=store)
        else:
            # The same groups: what is compared is the optimizer, not the cut.
            probe = hift_ext.AdamW(self.model)
            names = [group.names for group in probe.groups]
            probe.close()
            self.optimizer = TorchHiFT(self.model, names, recipe.lr, steps)
        if method != "torch_hift":
            self.scheduler = torch.optim.lr_scheduler.LinearLR(
                self.optimizer, 1.0, 0.0, total_iters=steps
            )
        self.loss = float("nan")
        self.ms: list[float] = []
        self.groups: list[int] = []
        self._random = torch.Generator().manual_seed(seed).get_state()

    def step(self, batch: list[torch.Tensor]) -> None:
        """One training step; its milliseconds and its group are remembered."""
        ids, mask, labels = batch
        self.groups.append(getattr(self.optimizer, "active", 0))
        torch.set_rng_state(self._random)  # the others' dropout must not move this one's
        begin = time.perf_counter()
        loss = self.model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
            self.optimizer.zero_grad()
        self.ms.append(1e3 * (time.perf_counter() - begin))
        self._random = torch.get_rng_state()
        self.loss = loss.item()


def batches(data: TensorDataset, seed: int) -> Iterator[list[torch.Tensor]]:
    """Endless shuffled batches, the same for the same seed."""
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(data, BATCH, shuffle=True, drop_last=True, generator=order)
    while True:
        yield from loader


def anonymous_bytes() -> int:
    """Resident memory of this process that is no file's: libraries come in as they are used."""
    status = Path("/proc/self/status").read_text()
    return 1024 * sum(int(kb) for kb in re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+)", status, re.M))


def peak_bytes(method: str, options: argparse.Namespace, steps: int) -> int:
    """Bytes that a fresh process grows by to train: weights, gradients, state, activations."""
    command = [sys.executable, __file__, "--peak", method, "--store", options.store]
    command += ["--steps", str(steps), "--max-length", str(options.max_length)]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def peak_of_this_process(method: str, options: argparse.Namespace) -> int:
    """What `peak_bytes` measures, in the process made for it; looks every 2 ms."""
    before = peak = anonymous_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run = Run(method, 0, options.steps, options.store)
        ids = torch.randint(1000, 20000, (BATCH, options.max_length))
        batch = [ids, torch.ones_like(ids), torch.zeros(BATCH, dtype=torch.long)]
        for _ in range(options.steps):
            run.step(batch)
    finally:
        done.set()
        watcher.join()
    return peak - before


def train(seed: int, steps: int, store: str, data: TensorDataset) -> dict[str, Run]:
    """Trains by all methods, in turns of one pass and a step, on the same batches."""
    runs = {method: Run(method, seed, steps, store) for method in METHODS}
    turn = len(runs["hift"].optimizer.groups) + 1
    source = itertools.islice(batches(data, seed), steps)
    order = list(METHODS)
    while block := list(itertools.islice(source, turn)):
        for method in order:
            for batch in block:
                runs[method].step(batch)
        order = order[1:] + order[:1]
        now = ", ".join(f"{method} {run.loss:.3f}" for method, run in runs.items())
        done = len(runs["full"].ms)
        print(f"seed {seed}, step {done}/{steps}: loss {now}", file=sys.stderr, flush=True)
    return runs


def timed(run: Run, turn: int) -> list[float]:
    """Milliseconds of all steps but each turn's first, whose pages came in during others' turns."""
    return [ms for index, ms in enumerate(run.ms) if index % turn]


def rows_of(
    runs: dict[str, Run], seed: int, epochs: float, held_out: TensorDataset
) -> list[dict[str, Any]]:
    """A row for each method; a ratio is the median over pairs of equal steps."""
    turn = len(runs["hift"].optimizer.groups) + 1
    rows = []
    for method, run in runs.items():
        groups = [group for index, group in enumerate(run.groups) if index % turn]
        times = timed(run, turn)
        by_group: dict[int, list[float]] = {}
        for group, ms in zip(groups, times, strict=True):
            by_group.setdefault(group, []).append(ms)
        medians = {group: statistics.median(ms) for group, ms in sorted(by_group.items())}
        row: dict[str, Any] = {
            "method": method,
            "dataset": "rotten_tomatoes",
            "seed": seed,
            "epochs": epochs,
            "steps": len(run.ms),
            "accuracy": demo.accuracy(run.model, held_out),
            "loss": run.loss,
            "step_ms": statistics.fmean(medians.values()),
            "step_ms_by_group": list(medians.values()),
        }
        for other, theirs in runs.items():
            row[f"ratio_to_{other}"] = median_ratio(times, timed(theirs, turn))
        if method == "hift":
            row["group_names"] = [group.name for group in run.optimizer.groups]
            row["stats"] = run.optimizer.stats()
        rows.append(row)
    return rows


def plot(path: Path, result: dict[str, Any]) -> None:
    """Step time by group, accuracy and peak memory."""
    rows = result["rows"]
    figure = Figure(figsize=(15, 4.6))
    panels = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    first = {method: next(r for r in rows if r["method"] == method) for method in METHODS}
    for place, method in enumerate(METHODS):
        row, color = first[method], COLORS[method]
        mine = [r for r in rows if r["method"] == method]
        if method == "full":
            panels[0].axhline(row["step_ms"], color=color, lw=2, label=LABELS[method])
        else:
            shift = -0.2 if method == "hift" else 0.2
            bars = [index + shift for index in range(len(row["step_ms_by_group"]))]
            panels[0].bar(bars, row["step_ms_by_group"], 0.38, color=color, label=LABELS[method])
        values = (statistics.fmean(100 * r["accuracy"] for r in mine), row["peak_bytes"] / 1e6)
        for panel, value, text in zip(panels[1:], values, ("{:.1f} %", "{:.0f} MB"), strict=True):
            panel.bar(place, value, 0.6, color=color)
            panel.text(place, value, text.format(value), ha="center", va="bottom", fontsize=9)
    hift = first["hift"]
    panels[0].set_ylabel("ms a step (median)")
    panels[0].set_xlabel("active group, in the order of training")
    panels[0].set_title(
        f"step time: {hift['ratio_to_torch_hift']:.3f} of the plain-torch loop, "
        f"{hift['ratio_to_full']:.2f} of full fine-tuning",
        fontsize=10,
    )
    panels[0].set_ylim(0, 1.25 * panels[0].get_ylim()[1])
    panels[0].legend(fontsize=8, loc="upper right", ncols=3)
    seeds = len({row["seed"] for row in rows})
    panels[1].set_title(f"held-out accuracy, mean of {seeds} seed(s)", fontsize=10)
    panels[2].set_title("peak memory of training (process, measured)", fontsize=10)
    for panel in panels[1:]:
        panel.set_xticks(range(3), ["hift_ext", "HiFT in\nplain torch", "full"])
        panel.margins(y=0.12)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    title = f"MiniLM on Rotten Tomatoes, {hift['steps']} steps, hift_ext's state: {result['store']}"
    draw(path, figure, title, result["machine"])


def parsed() -> argparse.Namespace:
    parser = arguments("MiniLM on film reviews: hift_ext, HiFT in plain torch, full fine-tuning.")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--steps", type=int, help="stop after so many steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--store", default=demo.default_store(), help="ram or disk")
    parser.add_argument("--max-length", type=int, default=64, help="tokens a review is cut to")
    parser.add_argument("--held-out", type=int, default=demo.HELD_OUT, help="reviews to judge by")
    parser.add_argument("--peak", choices=METHODS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.epochs < 1 or (options.steps is not None and options.steps < 2):
        parser.error("--epochs must be at least 1, and --steps at least 2")
    if not 1 <= options.held_out <= demo.HELD_OUT:
        parser.error(f"--held-out must be 1 to {demo.HELD_OUT}, not {options.held_out}")
    return options


def main() -> None:
    """Measures, prints as it goes, and writes what was asked for."""
    options = parsed()
    demo.check_packages()
    if options.peak:
        print(peak_of_this_process(options.peak, options))
        return
    result: dict[str, Any] = {"machine": machine(), "store": options.store, "rows": []}
    data = demo.load_reviews(options.max_length)
    held_out = TensorDataset(*data.held_out[: options.held_out])
    epoch = len(data.training) // BATCH
    steps = min(options.steps or options.epochs * epoch, options.epochs * epoch)
    # The peak comes with the largest group's second turn, when all state has been made.
    peaks = {m: peak_bytes(m, options, min(steps, PEAK_STEPS)) for m in METHODS}
    for seed in options.seeds:
        runs = train(seed, steps, options.store, data.training)
        for row in rows_of(runs, seed, steps / epoch, held_out):
            row["peak_bytes"] = peaks[row["method"]]
            result["rows"].append(row)
            print(
                f"{row['method']:11} accuracy {row['accuracy']:.3f}"
                f"  {row['step_ms']:7.1f} ms a step, x torch_hift {row['ratio_to_torch_hift']:.3f},"
                f" x full {row['ratio_to_full']:.3f}  peak {row['peak_bytes'] / 1e6:.0f} MB",
                file=sys.stderr,
            )
        runs["hift"].optimizer.close()
    deliver(options, result, plot)


if __name__ == "__main__":
    main()
