# SPDX-License-Identifier: Apache-2.0
# What the ring's size costs: one model is trained in turns with rings of several sizes, by
# zero-copy, and with its state on the device, with more computation than transfer and with less.
"""Section `rings`: step time, and transfer that was hidden or exposed."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

import hift_ext
from gpu.device import Device, median_ratio
from gpu.host import available_bytes
from gpu.llama_model import Llama, Size, make, parameters, tokens
from gpu.report import Row
from gpu.runner import Budget

SIZES = (
    Size(blocks=4, hidden=2048, inner=5504, heads=16, vocabulary=8192),
    Size(blocks=4, hidden=1024, inner=2752, heads=8, vocabulary=8192),
)
DRY_SIZE = Size(blocks=3, hidden=32, inner=88, heads=2, vocabulary=64)
WAYS = 5
"""Of `settings` that keep a state of their own on the host."""

PAGE = 16 << 20
DRY_PAGE = 8 << 10
KEYS = ("hidden_ms", "wait_ms", "transfer_ms", "update_ms")


def settings(device: Device, block_bytes: int) -> dict[str, dict[str, Any]]:
    """Ways to keep the state; the first is the one to compare with."""
    page = device.size(PAGE, DRY_PAGE)
    pages = {"store": "ram", "page_bytes": page}
    return {
        "state on the device": {"store": "device"},
        "ring: whole group": pages,
        "ring: half a block": {**pages, "staging": max(block_bytes // 2, 2 * page)},
        "ring: four pages": {**pages, "staging": 4 * page},
        "ring: two pages": {**pages, "staging": 2 * page},
        "zero-copy": {**pages, "staging": 0},
    }


def choose(available: int, sizes: Sequence[Size], last: bool) -> tuple[Size, str]:
    """The first size whose states, one for each way to keep them, fit into host memory.

    Args:
        available: Bytes of it.
        sizes: From large to small; the last is taken in any case.
        last: It is wanted.

    Returns:
        The size, and a sentence if it is not the first.
    """
    for size in sizes[:-1]:
        if WAYS * 8 * parameters(size) <= available and not last:
            return size, ""
    return sizes[-1], f"{available / 1e9:.0f} GB of host memory: a smaller model" * (not last)


class Variant:
    """A copy of the model with an optimizer of its own."""

    def __init__(self, device: Device, model: Llama, place: dict[str, Any]) -> None:
        self._device = device
        self.model = copy.deepcopy(model)
        self.optimizer = hift_ext.AdamW(self.model, 1e-6, **place)

    def turn(self, ids: torch.Tensor) -> tuple[float, dict[str, float]]:
        """A pass over all groups: milliseconds a step, and the mean of the optimizer's figures.

        An untimed step comes before: its pages had come in by the end of the turn before.
        """
        groups, found = len(self.optimizer.groups), []
        self._step(ids)
        self._device.synchronize()
        begin = time.perf_counter()
        for _ in range(groups):
            self._step(ids)
            found.append(self.optimizer.stats())
        self._device.synchronize()
        step_ms = 1e3 * (time.perf_counter() - begin) / groups
        # What has moved while others have their turn would be nobody's time.
        engine = self.optimizer.state.engine
        assert engine is not None
        engine.flush()
        figures = (*KEYS, "bytes_in", "bytes_out", "staging_bytes")
        return step_ms, {key: statistics.fmean(stats[key] for stats in found) for key in figures}

    def _step(self, ids: torch.Tensor) -> None:
        self.model(ids).backward()
        self.optimizer.step()
        self._device.settle()
        self.optimizer.zero_grad()


def measure(
    device: Device, variants: dict[str, Variant], ids: torch.Tensor, budget: Budget
) -> dict[str, list[tuple[float, dict[str, float]]]]:
    """Turns of all variants, in a new order each round, for as long as the budget lasts."""
    turns: dict[str, list[tuple[float, dict[str, float]]]] = {name: [] for name in variants}
    order = list(variants)
    for variant in variants.values():  # pages that were never touched do not move
        variant.turn(ids)
    begin, most = budget.left(), device.size(15, 2)
    for number in range(most):
        for name in order:
            turns[name].append(variants[name].turn(ids))
        order = order[1:] + order[:1]
        spent = (begin - budget.left()) / (number + 1)
        if number >= 1 and budget.left() < spent:
            break
    return turns


def run(device: Device, budget: Budget) -> Iterator[Row]:
    """For each length of input a row for each way to keep the state."""
    torch.manual_seed(0)
    size, note = choose(available_bytes(), device.size(SIZES, (SIZES[0], DRY_SIZE)), device.dry)
    model = make(size, device.tensors, torch.float32)
    block = 8 * sum(p.numel() for p in model.blocks[0].parameters())
    variants = {
        name: Variant(device, model, place) for name, place in settings(device, block).items()
    }
    lengths = device.size({"long": 2048, "short": 32}, {"long": 16, "short": 4})
    for share, (label, length) in zip((0.5, 0.9), lengths.items(), strict=True):
        ids = tokens(size, 1, length, device.tensors)
        turns = measure(device, variants, ids, budget.part(share))
        first = [ms for ms, _ in next(iter(turns.values()))]
        for name, taken in turns.items():
            times = [ms for ms, _ in taken]
            stats = [figures for _, figures in taken]
            means = {key: statistics.median(s[key] for s in stats) for key in KEYS}
            measured = {
                "step_ms": statistics.median(times),
                "times_resident": median_ratio(times, first),
                **means,
            }
            facts = {
                "tokens": length,
                "variant": name,
                "block_state_bytes": block,
                "rounds": len(times),
                **{k: int(stats[-1][k]) for k in ("bytes_in", "bytes_out", "staging_bytes")},
            }
            shown = ("step_ms", "times_resident", "hidden_ms", "wait_ms")
            yield Row(f"{label} input, {name}", facts, measured, shown, note)
    for variant in variants.values():
        variant.optimizer.close()
