# SPDX-License-Identifier: Apache-2.0
# What the benchmarks share: the machine's name, interleaved samples, a HiFT loop in plain
# torch to compare with, and files that are written whole.
"""Shared parts of the benchmarks."""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import random
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import hift_ext
from hift_ext import ops

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {
    "hift": "#c8102e",
    "ceiling": "#222222",
    "torch_fused": "#3b6ea5",
    "torch_foreach": "#8fb3d9",
    "deepspeed": "#5a9e6f",
}


def machine() -> dict[str, Any]:
    """The machine the figures are from: name, cores, instruction set, memory, torch, date."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "isa": ops.build_info()["isa"],
        "memory_bytes": pages * page,
        "torch": torch.__version__,
        "hift_ext": hift_ext.__version__,
        "load": os.getloadavg()[0],
        "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
    }


def caption(info: Mapping[str, Any]) -> str:
    """One line for a picture's title."""
    return (
        f"{info['cpu']}, {info['cores']} cores, {info['memory_bytes'] / 2**30:.0f} GiB, "
        f"{info['isa']}, torch {info['torch']}, {info['date'][:16].replace('T', ' ')}"
    )


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser that knows `--json FILE` and `--plot FILE.png`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw them here")
    return parser


def with_rounds(
    parser: argparse.ArgumentParser, usual: int, samples: str, trial: str
) -> tuple[argparse.Namespace, int]:
    """Parses the command line with `--quick` and `--rounds` added.

    Args:
        parser: Of `arguments`.
        usual: Rounds unless told otherwise; with `--quick` the least, 3.
        samples: What a round is, for the help.
        trial: What `--quick` does besides, for the help.
    """
    parser.add_argument("--quick", action="store_true", help=f"{trial}, 3 rounds: a trial")
    parser.add_argument("--rounds", type=int, help=f"{samples} ({usual}; at least 3)")
    options = parser.parse_args()
    rounds = options.rounds if options.rounds is not None else 3 if options.quick else usual
    if rounds < 3:
        parser.error(f"--rounds must be at least 3, not {rounds}")
    return options, rounds


def deliver(
    options: argparse.Namespace, result: Mapping[str, Any], plot: Callable[[Path, Any], None]
) -> None:
    """Writes and draws what `--json` and `--plot` ask for."""
    if options.json:
        write(options.json, result)
    if options.plot:
        plot(options.plot, result)


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Writes a JSON file."""
    path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def draw(path: Path, figure: Figure, title: str, info: Mapping[str, Any]) -> None:
    """Titles a figure with the machine, and writes it as PNG."""
    figure.tight_layout()
    figure.suptitle(f"{title}\n{caption(info)}", fontsize=11, va="bottom", y=1.0)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def interleave(
    runs: Mapping[str, Callable[[], object]], rounds: int, sample_s: float
) -> dict[str, list[float]]:
    """Times all `runs` once a round, in a new order each round.

    Memory bandwidth belongs to the neighbours too and moves from minute to minute: what is compared
    must have been measured in the same moment.

    Args:
        runs: What to time, by name.
        rounds: Samples of each.
        sample_s: Seconds that a sample lasts at least, by repeating a short run.

    Returns:
        Seconds a run, `rounds` of them for each name; index r of all names is from one round.
    """
    repeats: dict[str, int] = {}
    for name, run in runs.items():
        run()  # makes state, starts threads, touches memory
        begin = time.perf_counter()
        run()
        repeats[name] = max(1, round(sample_s / (time.perf_counter() - begin)))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            shuffle.shuffle(order)
            for name in order:
                run = runs[name]
                begin = time.perf_counter()
                for _ in range(repeats[name]):
                    run()
                samples[name].append((time.perf_counter() - begin) / repeats[name])
    finally:
        if collecting:
            gc.enable()
    return samples


def median_ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """The median of the ratios of samples that were taken in the same round."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


class TorchHiFT:
    """HiFT in plain torch: one torch.optim.AdamW a group, all state in memory.

    Args:
        model: The model to train.
        groups: Parameter names, group by group, in the order of their turns.
        lr: Learning rate at the start; decays linearly to zero.
        steps: Steps of the whole training.
    """

    def __init__(
        self, model: torch.nn.Module, groups: Iterable[Iterable[str]], lr: float, steps: int
    ) -> None:
        named = dict(model.named_parameters())
        self._optimizers = [
            torch.optim.AdamW([named[name] for name in names], lr=lr, fused=True)
            for names in groups
        ]
        self._lr, self._steps, self._now = lr, steps, 0
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self._train_active(True)

    @property
    def active(self) -> int:
        """Index of the group that the next step updates."""
        return self._now % len(self._optimizers)

    def _train_active(self, on: bool) -> None:
        for parameter in self._optimizers[self.active].param_groups[0]["params"]:
            parameter.requires_grad_(on)

    def step(self) -> None:
        """Updates the active group and moves on to the next."""
        if self.active == 0:  # one rate for the whole pass
            for optimizer in self._optimizers:
                optimizer.param_groups[0]["lr"] = self._lr * (1 - self._now / self._steps)
        optimizer = self._optimizers[self.active]
        optimizer.step()
        optimizer.zero_grad()
        self._train_active(False)
        self._now += 1
        self._train_active(True)
