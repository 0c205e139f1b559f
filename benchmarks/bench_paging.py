# SPDX-License-Identifier: Apache-2.0
# Does paging cost time? The same model is trained with its state in RAM and on disk, in turns, and
# each step says how much of the transfer was hidden behind forward and backward.
"""`python benchmarks/bench_paging.py --json FILE --plot FILE.png`."""

from __future__ import annotations

import copy
import itertools
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from common import arguments, deliver, draw, machine
from disk import BareCopies, disk_gbps
from matplotlib.figure import Figure
from torch import nn

import hift_ext

PAGE_BYTES = 4 << 20
TOKENS = {"long": 128, "short": 16}
"""Tokens a step: with the long input a block's transfer is shorter than its compute."""


@dataclass(frozen=True)
class Size:
    """A decoder's dimensions."""

    blocks: int
    hidden: int
    heads: int
    vocabulary: int


SIZES = {
    "350m": Size(blocks=24, hidden=1024, heads=16, vocabulary=50257),  # GPT-2 medium's
    "tiny": Size(blocks=3, hidden=128, heads=4, vocabulary=4000),
}


class Decoder(nn.Module):
    """Causal transformer with random weights; the head shares the embedding's weight."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size.vocabulary, size.hidden)
        self.positions = nn.Embedding(1024, size.hidden)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                size.hidden,
                size.heads,
                4 * size.hidden,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(size.blocks)
        )
        self.norm = nn.LayerNorm(size.hidden)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The mean loss of predicting each next token of `ids` (batch, length)."""
        length = ids.shape[1]
        x = self.embedding(ids) + self.positions.weight[:length]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        logits = self.norm(x)[:, :-1] @ self.embedding.weight.T
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


@dataclass
class Step:
    """One step on the clock (seconds) and by the optimizer's own count (`stats`)."""

    group: int
    begin: float
    forward: float
    backward: float
    end: float
    stats: dict[str, float]

    @property
    def ms(self) -> float:
        """Milliseconds of the whole step."""
        return 1e3 * (self.end - self.begin)

    @property
    def compute_ms(self) -> float:
        """Milliseconds of forward and backward."""
        return 1e3 * (self.backward - self.begin)


class Variant:
    """A copy of the model that shares its weights' memory, with an optimizer of its own."""

    def __init__(
        self, name: str, model: nn.Module, store: str, staging: Any, bare: bool = False
    ) -> None:
        self.name, self.store, self.staging = name, store, staging
        self.model = copy.deepcopy(model)
        for mine, theirs in zip(self.model.parameters(), model.parameters(), strict=True):
            mine.data = theirs.data
        self.optimizer = hift_ext.AdamW(
            self.model, lr=1e-6, store=store, staging=staging, page_bytes=PAGE_BYTES
        )
        self.steps: list[Step] = []
        # What moving the same bytes costs a computation where no pager has a hand in it.
        self.copies = BareCopies(PAGE_BYTES) if bare else None

    def turn(self, ids: torch.Tensor, count: int) -> list[Step]:
        """`count` timed steps, after one that is not: its pages came in during others' turns."""
        steps = []
        for index in range(count + 1):
            group = self.optimizer.active
            begin = time.perf_counter()
            loss = self.model(ids)
            forward = time.perf_counter()
            loss.backward()
            backward = time.perf_counter()
            self.optimizer.step()
            if self.copies is not None:
                sizes = [8 * self.optimizer.groups[g].numel for g in (self.optimizer.active, group)]
                self.copies.start(*sizes)
            end = time.perf_counter()
            self.optimizer.zero_grad()
            if index > 0:
                step = Step(group, begin, forward, backward, end, self.optimizer.stats())
                steps.append(step)
        self._settle()
        return steps

    def _settle(self) -> None:
        """Waits until nothing is under way, so that the next turn has the disk for itself."""
        engine = self.optimizer.state.engine
        assert engine is not None
        engine.flush()
        if self.copies is not None:
            self.copies.wait()


def by_group(steps: Sequence[Step]) -> dict[int, list[Step]]:
    """Steps under the group that they updated."""
    found: dict[int, list[Step]] = {}
    for step in steps:
        found.setdefault(step.group, []).append(step)
    return dict(sorted(found.items()))


def mean_of_medians(steps: Sequence[Step], value: Any) -> float:
    """Groups differ, since backward stops at them: the median of each, averaged."""
    return statistics.fmean(
        statistics.median(value(step) for step in same) for same in by_group(steps).values()
    )


def row_of(
    variant: Variant, ram: Variant, bare: Variant, model: str, tokens: int
) -> dict[str, Any]:
    """The figures of one variant; times in ms a step, sizes in bytes a step."""

    def ratio(mine: Sequence[Step], theirs: Sequence[Step]) -> float:
        return statistics.median(a.ms / b.ms for a, b in zip(mine, theirs, strict=True))

    mine, theirs = by_group(variant.steps), by_group(ram.steps)
    groups: list[dict[str, Any]] = []
    for index, steps in mine.items():
        keys = ("hidden_ms", "wait_ms", "transfer_ms", "update_ms", "bytes_in", "bytes_out")
        figures = {key: statistics.median(step.stats[key] for step in steps) for key in keys}
        compute = statistics.median(step.compute_ms for step in steps)
        groups.append(
            {
                "group": index,
                "name": variant.optimizer.groups[index].name,
                "parameters": variant.optimizer.groups[index].numel,
                "step_ms": statistics.median(step.ms for step in steps),
                "compute_ms": compute,
                **figures,
                "transfer_is_shorter": figures["transfer_ms"] < compute,
                "ratio_to_ram": ratio(steps, theirs[index]),
            }
        )
    stats = variant.steps[-1].stats
    shorter: list[float] = [
        group["ratio_to_ram"] for group in groups if group["transfer_is_shorter"]
    ]
    return {
        "store": variant.store,
        "staging": variant.staging,
        "variant": variant.name,
        "model": model,
        "tokens": tokens,
        "step_ms": mean_of_medians(variant.steps, lambda step: step.ms),
        "compute_ms": mean_of_medians(variant.steps, lambda step: step.compute_ms),
        **{
            key: mean_of_medians(variant.steps, lambda step, key=key: step.stats[key])
            for key in ("hidden_ms", "wait_ms", "transfer_ms", "update_ms", "bytes_in", "bytes_out")
        },
        "store_bytes": stats["store_bytes"],
        "staging_bytes": stats["staging_bytes"],
        "ratio_to_ram": ratio(variant.steps, ram.steps),
        "ratio_to_bare_copies": ratio(variant.steps, bare.steps),
        "ratio_to_ram_where_transfer_is_shorter": statistics.median(shorter) if shorter else None,
        "groups": groups,
        "steps": len(variant.steps),
    }


def plot(path: Any, result: dict[str, Any], timelines: dict[tuple[int, str], list[Step]]) -> None:
    """Bars of hidden and exposed transfer above, one turn on the clock below, per input length."""
    lengths = sorted({row["tokens"] for row in result["rows"]}, reverse=True)
    figure = Figure(figsize=(8 * len(lengths), 8.5))
    panels = figure.subplots(2, len(lengths), squeeze=False, height_ratios=(2, 3))
    for column, tokens in enumerate(lengths):
        rows = [row for row in result["rows"] if row["tokens"] == tokens]
        panel = panels[0][column]
        names = [row["variant"] for row in rows]
        compute = [row["compute_ms"] for row in rows]
        wait = [row["wait_ms"] for row in rows]
        rest = [row["step_ms"] - row["compute_ms"] - row["wait_ms"] for row in rows]
        start = [sum(parts) for parts in zip(compute, rest, strict=True)]
        panel.barh(names, compute, color="#c9d3dd", label="forward and backward", height=0.5)
        panel.barh(names, rest, left=compute, color="#3b6ea5", label="update", height=0.5)
        panel.barh(names, wait, left=start, color="#c8102e", label="waiting for pages", height=0.5)
        hidden = [row["hidden_ms"] for row in rows]
        shown = "transfer hidden behind them"
        panel.barh(names, hidden, color="#5a9e6f", label=shown, height=0.12)
        for index, row in enumerate(rows):
            text = f" {row['step_ms']:.0f} ms"
            if index > 0:
                text += f": {row['ratio_to_ram']:.3f} of RAM's"
            if index > 1:
                text += f", {row['ratio_to_bare_copies']:.3f} of bare copies'"
            panel.text(row["step_ms"], index, text, va="center", fontsize=9)
        panel.set_xlim(0, 1.6 * max(row["step_ms"] for row in rows))
        panel.invert_yaxis()
        panel.set_xlabel("ms a step, mean over groups of medians")
        panel.set_title(f"{rows[0]['model']}, {tokens} tokens a step", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
        timeline(panels[1][column], [(n, timelines[tokens, n]) for n in names])
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=9, loc="upper center", ncols=4, bbox_to_anchor=(0.5, 0))
    disk = result["disk"]
    title = (
        f"Optimizer state in RAM and on disk (the disk alone: {disk['read_gbps']:.2f} GB/s in, "
        f"{disk['write_gbps']:.2f} GB/s out)"
    )
    draw(path, figure, title, result["machine"])


def timeline(panel: Any, lines: Sequence[tuple[str, list[Step]]]) -> None:
    """Spans of a turn's first steps: above computation, below the transfer under way meanwhile."""
    for index, (_, steps) in enumerate(lines):
        steps = steps[:6]
        origin = steps[0].begin
        for number, step in enumerate(steps):
            marks = [step.begin, step.forward, step.backward, step.end]
            spans = [(1e3 * (a - origin), 1e3 * (b - a)) for a, b in itertools.pairwise(marks)]
            wait = step.stats["wait_ms"]
            begin, length = spans.pop()
            panel.broken_barh(spans[:1], (index - 0.36, 0.36), color="#c9d3dd")
            panel.broken_barh(spans[1:], (index - 0.36, 0.36), color="#9fb0c0")
            update = (begin + wait, length - wait)
            panel.broken_barh([(begin, wait)], (index - 0.36, 0.36), color="#c8102e")
            panel.broken_barh([update], (index - 0.36, 0.36), color="#3b6ea5")
            # The pager reports how long copies ran since the last step, and they start at its end.
            after = 1e3 * ((steps[number - 1].end if number else step.begin) - origin)
            transfer = [(after, step.stats["transfer_ms"])]
            panel.broken_barh(transfer, (index + 0.02, 0.24), color="#5a9e6f")
    panel.set_yticks(range(len(lines)), [name for name, _ in lines])
    panel.invert_yaxis()
    panel.set_xlabel("ms since the turn began")
    panel.set_title(
        "a turn's first steps: forward, backward, update (blue), waiting (red); below, in green:\n"
        "copies under way, as long as the pager reports them, from the end of the step before",
        fontsize=9,
    )
    panel.spines[["top", "right"]].set_visible(False)


def make_variants(model: str) -> list[Variant]:
    """One model, ways to keep its optimizer's state; the first is the one to compare with."""
    torch.manual_seed(0)
    base = Decoder(SIZES[model])
    block = sum(8 * p.numel() for p in base.blocks[0].parameters())
    return [
        Variant("RAM", base, "ram", "auto"),
        Variant("RAM, and bare copies", base, "ram", "auto", bare=True),
        Variant("disk, ring: largest group", base, "disk", "auto"),
        Variant("disk, ring: half a block", base, "disk", max(block // 2, 2 * PAGE_BYTES)),
        Variant("disk, ring: four pages", base, "disk", 4 * PAGE_BYTES),
    ]


def measure(variants: Sequence[Variant], ids: torch.Tensor, turns: int, steps: int) -> None:
    """Trains on `ids` by all variants, `steps` timed steps a turn."""
    for variant in variants:
        variant.steps = []
    order, shuffle = list(variants), random.Random(0)
    for turn in range(turns):
        # The machine's speed moves with its neighbours: short turns, in a new order each time.
        shuffle.shuffle(order)
        for variant in order:
            done = variant.turn(ids, steps)
            variant.steps += done
            print(
                f"{ids.shape[1]} tokens, turn {turn + 1} of {turns}, {variant.name}: "
                f"{statistics.fmean(step.ms for step in done):.0f} ms a step",
                file=sys.stderr,
                flush=True,
            )


def main() -> None:
    """Measures, prints as it goes, and writes what was asked for."""
    parser = arguments("Training with optimizer state in RAM and on disk, in turns.")
    parser.add_argument("--model", choices=SIZES, default="350m")
    parser.add_argument("--rounds", type=int, default=10, help="timed turns of each variant")
    parser.add_argument("--steps", type=int, default=4, help="timed steps a turn")
    options = parser.parse_args()
    if options.rounds < 1 or options.steps < 1:
        parser.error("--rounds and --steps must be at least 1")
    result: dict[str, Any] = {"machine": machine(), "rows": []}
    variants = make_variants(options.model)
    groups = len(variants[0].optimizer.groups)
    steps = min(options.steps, groups)
    ids = torch.randint(SIZES[options.model].vocabulary, (1, max(TOKENS.values())))
    print("the first pass, untimed: pages that were never touched do not move", file=sys.stderr)
    measure(variants, ids[:, : TOKENS["short"]], 1, groups)
    disks, timelines = [], {}
    for tokens in TOKENS.values():
        disks.append(disk_gbps(1024 if options.model == "350m" else 16, PAGE_BYTES))
        measure(variants, ids[:, :tokens], options.rounds, steps)
        disks.append(disk_gbps(1024 if options.model == "350m" else 16, PAGE_BYTES))
        for variant in variants:
            result["rows"].append(row_of(variant, *variants[:2], options.model, tokens))
            timelines[tokens, variant.name] = variant.steps[-steps:]
    for variant in variants:
        variant.optimizer.close()
    read, written = (statistics.median(rates) for rates in zip(*disks, strict=True))
    result["disk"] = {"read_gbps": read, "write_gbps": written}
    for row in result["rows"]:
        print(
            f"{row['tokens']:4} tokens  {row['variant']:26} {row['step_ms']:8.1f} ms"
            f"  x RAM {row['ratio_to_ram']:.3f}"
            f"  x bare copies {row['ratio_to_bare_copies']:.3f}  hidden {row['hidden_ms']:7.1f}"
            f"  waited {row['wait_ms']:7.1f}  update {row['update_ms']:6.1f}",
            file=sys.stderr,
        )
    deliver(options, result, lambda path, found: plot(path, found, timelines))


if __name__ == "__main__":
    main()
