# SPDX-License-Identifier: Apache-2.0
# Does a 7B model train in full on one 48 GB card in fp32, and on one of 24 GB in bf16? torch may
# take no more of this card than that, HiFT trains, and torch's own AdamW tries the same.
"""Section `llama`: peak memory of a LLaMA-7B-shaped model, by category, beside the paper's."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

import hift_ext
from gpu.device import Device
from gpu.host import available_bytes
from gpu.llama_model import LLAMA_7B, Llama, Size, make, tokens
from gpu.report import Row
from gpu.runner import Budget, reason

MIB, GIB = 1 << 20, 1 << 30
CATEGORIES = ("weights", "gradients", "activations", "ring", "other")
DRY_SIZE = Size(blocks=6, hidden=32, inner=88, heads=2, vocabulary=128)
MOST_BATCH = 8
USABLE = 0.97
"""Of what torch may take: the rest goes to gaps between blocks."""

DRY_USABLE = 1.5
"""A dry run asks for too much, so that stepping down is run too."""


@dataclass(frozen=True)
class Plan:
    """A training to fit on a card.

    Attributes:
        name: Its row's.
        dtype: Of weights and gradients; moments are float32.
        card_bytes: What torch and the context may take together.
        dry_bytes: The same for the dry run's small model.
        paper: HiFT's there: MiB of weights, gradients and state, GiB of the rest and of all.
        paper_full: GiB that all took without HiFT.
        note: What to know of it.
    """

    name: str
    dtype: torch.dtype
    card_bytes: int
    dry_bytes: int
    paper: tuple[float, float, float, float, float]
    paper_full: float
    note: str = ""


PLANS = [
    Plan(
        "fp32 on 48 GB",
        torch.float32,
        48_000_000_000,
        1_000_000,
        (25705.04, 772.03, 1544.06, 28.04, 55.41),
        142.11,
    ),
    Plan(
        "bf16 on 24 GB",
        torch.bfloat16,
        24_000_000_000,
        640_000,
        (13624.53, 772.03, 1544.06, 21.00, 36.57),
        145.50,
        "masters are split, 2 bytes beside each bf16 weight; the paper's are whole",
    ),
]
"""LLaMA-7B, AdamW, 8 x 512 tokens in the paper (arXiv 2401.15207): fp32 and Mixed^Hi."""


class Training:
    """A model and its optimizer, with an account of the device's memory.

    Args:
        device: Where it trains.
        model: What.
        optimizer: By what; torch's or ours.
        length: Tokens of a sequence.
    """

    def __init__(self, device: Device, model: Llama, optimizer: Any, length: int) -> None:
        self._device, self._model, self.optimizer = device, model, optimizer
        self._length = length
        self.phase = "start"

    def backward(self, batch: int) -> dict[str, int]:
        """Forward and backward; gives bytes of activations, gradients and the peak."""
        device = self._device
        device.reset_peak()
        self.phase = "forward"
        before = device.memory().allocated
        ids = tokens(self._model.size, batch, self._length, device.tensors)
        loss = self._model(ids)
        held = device.memory().allocated - before
        self.phase = "backward"
        loss.backward()
        gradients = sum(p.grad.nbytes for p in self._model.parameters() if p.grad is not None)
        return {"activations": held, "gradients": gradients, **self.peaks()}

    def step(self) -> None:
        """The update; then gradients are dropped."""
        self.phase = "step"
        self.optimizer.step()
        self._device.settle()
        self.drop()

    def drop(self) -> None:
        """Drops gradients."""
        self.optimizer.zero_grad()

    def peaks(self) -> dict[str, int]:
        """Bytes at the peak since the last reset."""
        memory = self._device.memory()
        return {"peak": memory.peak, "reserved": memory.reserved_peak}


def largest_batch(training: Training, limit: int) -> int:
    """The batch whose peak is just below `limit`, from the peaks of two small ones."""
    peaks = []
    for batch in (1, 2):
        try:
            peaks.append(training.backward(batch)["peak"])
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            return 1
        finally:
            training.drop()
    each = max(1, peaks[1] - peaks[0])
    return max(1, min(MOST_BATCH, 1 + (limit - peaks[0]) // each))


def visitable(optimizer: hift_ext.AdamW, available: int, each: int = 8) -> int:
    """How many groups' states fit into `available` bytes of host memory, in the order of turns.

    `each` bytes an element: two moments, and 2 more for a split master.
    """
    left, count = available, 0
    for group in optimizer.groups:
        left -= each * group.numel
        if left < 0:
            break
        count += 1
    return count


def split(found: dict[str, int], weights: int, ring: int) -> dict[str, int]:
    """The peak by category. What of the gradients does not fit under it came after it."""
    rest = found["peak"] - weights - ring - found["activations"]
    gradients = max(0, min(found["gradients"], rest))
    other = rest - gradients
    return dict(
        zip(CATEGORIES, (weights, gradients, found["activations"], ring, other), strict=True)
    )


def paper_facts(plan: Plan) -> dict[str, float]:
    """The paper's figures of the plan's row, in bytes."""
    para, gradients, state, residual, total = plan.paper
    return {
        "paper_weights_bytes": para * MIB,
        "paper_gradients_bytes": gradients * MIB,
        "paper_state_bytes": state * MIB,
        "paper_residual_bytes": residual * GIB,
        "paper_peak_bytes": total * GIB,
        "paper_full_peak_bytes": plan.paper_full * GIB,
        "paper_tokens": 8 * 512,
    }


def title(device: Device, plan: Plan) -> str:
    """The plan's name; a dry run's model has nothing to do with a card."""
    return str(device.size(plan.name, f"{plan.name}: a tiny model instead"))


def hift(device: Device, plan: Plan, model: Llama, share: int, budget: Budget) -> Row:
    """HiFT with m = 1: the largest batch that fits, trained for as long as the budget lasts."""
    length = device.size(512, 16)
    optimizer = hift_ext.AdamW(model, 1e-6, layers_per_group=1)
    training = Training(device, model, optimizer, length)
    available = available_bytes()
    groups = visitable(optimizer, available, 8 if plan.dtype == torch.float32 else 10)
    if groups < 3:
        raise MemoryError(
            f"{available / 1e9:.1f} GB of host memory hold the state of {groups} groups; three are "
            "needed: free some"
        )
    whole = groups == len(optimizer.groups)
    notes = [plan.note or "matrix products in TF32"]
    if not whole:
        notes.append(f"host memory holds the state of {groups} of {len(optimizer.groups)} groups")
    weights = sum(p.nbytes for p in model.parameters())
    with optimizer:
        training.backward(1)
        training.step()  # takes the ring
        # Now the first block has its turn, whose backward goes through all of the model.
        batch = largest_batch(training, int(device.size(USABLE, DRY_USABLE) * share))
        device.empty_cache()
        found: dict[str, int] = {}
        times: list[float] = []
        steps, most = 0, 2 * groups if whole else groups - 1
        ring = int(optimizer.stats()["staging_bytes"])
        while steps < most and (steps < 3 or budget.left() > 0):
            begin = time.perf_counter()
            try:
                now = training.backward(batch)
                training.step()
            except torch.OutOfMemoryError:
                training.drop()
                if batch == 1:
                    raise
                batch, found, times = batch - 1, {}, []
                device.empty_cache()
                continue
            device.synchronize()
            times.append(1e3 * (time.perf_counter() - begin))
            steps += 1
            if now["peak"] > found.get("peak", 0):
                found = now
        stats = optimizer.stats()
        if optimizer.pass_index == 0:
            notes.append("first pass only: no page had to come in")
    by_category = split(found, weights, ring)
    total = found["reserved"] + device.context_bytes()
    measured = {
        "peak_bytes": found["peak"],
        "reserved_and_context_bytes": total,
        **{f"{name}_bytes": size for name, size in by_category.items()},
        "step_ms": statistics.median(times),
        **{key: stats[key] for key in ("hidden_ms", "wait_ms", "transfer_ms", "update_ms")},
    }
    facts = {
        "batch": batch,
        "length": length,
        "steps": steps,
        "groups_visited": min(steps + 1, len(optimizer.groups)),
        "state_on_host_bytes": int(stats["state_bytes"]),
        "limit_bytes": device.size(plan.card_bytes, plan.dry_bytes),
        "parameters": sum(p.numel() for p in model.parameters()),
        **paper_facts(plan),
    }
    shown = ["batch", "length", "peak_bytes", *(f"{c}_bytes" for c in CATEGORIES)]
    shown += ["step_ms", "paper_peak_bytes"]
    over = total - device.size(plan.card_bytes, plan.dry_bytes)
    failed = f"{over / 1e9:.2f} GB over the limit, with the context" if over > 0 else ""
    return Row(f"HiFT, {title(device, plan)}", facts, measured, shown, "; ".join(notes), failed)


def standard(device: Device, plan: Plan, model: Llama, share: int) -> Row:
    """torch's AdamW on all parameters, a single sequence: where it runs out, or its peak."""
    length = device.size(512, 16)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-6, fused=True)
    training = Training(device, model, optimizer, length)
    try:
        training.backward(1)
        training.step()
        result = "it fits"
    except torch.OutOfMemoryError:
        result = f"out of memory in {training.phase}"
    peak = training.peaks()["peak"]
    training.drop()
    weights = sum(p.nbytes for p in model.parameters())
    facts = {
        "result": result,
        "batch": 1,
        "length": length,
        "torch_may_take_bytes": share,
        "needed_without_activations_bytes": 4 * weights,
        "paper_full_peak_bytes": plan.paper_full * GIB,
    }
    shown = ("result", "peak_bytes", "needed_without_activations_bytes", "paper_full_peak_bytes")
    note = "" if plan.dtype == torch.float32 else "torch keeps state in bf16 here"
    return Row(f"standard AdamW, {title(device, plan)}", facts, {"peak_bytes": peak}, shown, note)


def both(device: Device, plan: Plan, share: int, budget: Budget) -> Iterator[Row]:
    """The plan's model by HiFT, then by torch's AdamW."""
    model = make(device.size(LLAMA_7B, DRY_SIZE), device.tensors, plan.dtype)
    yield hift(device, plan, model, share, budget)
    device.empty_cache()
    yield standard(device, plan, model, share)


def run(device: Device, budget: Budget) -> Iterator[Row]:
    """Two rows for each plan."""
    torch.set_float32_matmul_precision("high")  # TF32: of time only; the paper does not say
    for plan, part in zip(PLANS, (0.65, 0.8), strict=True):
        share = device.cap(device.size(plan.card_bytes, plan.dry_bytes))
        try:
            yield from both(device, plan, share, budget.part(part))
        except (torch.OutOfMemoryError, MemoryError) as error:
            # One training that does not fit does not hide the other.
            yield Row(title(device, plan), failed=reason(error))
        device.empty_cache()
