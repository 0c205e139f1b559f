# SPDX-License-Identifier: Apache-2.0
# The Triton kernels against the CUDA kernels: the same bits from the same values, and GB/s in
# turns. In a dry run Triton's interpreter stands in, whose fma rounds twice: there values are near.
"""Section `triton`: Triton against CUDA."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch

from gpu import bits, engine, kernels
from gpu.device import Device, interleaved, median_ratio
from gpu.report import Row
from gpu.runner import Budget
from hift_ext import ops, triton_step

RACES_SECONDS = 12
"""Left to what comes after the comparison."""


def near(a: torch.Tensor, b: torch.Tensor) -> str:
    """Where two tensors are not close; empty if nowhere."""
    close = torch.isclose(a.float(), b.float(), rtol=1e-2 if a.element_size() == 2 else 1e-5)
    return "" if bool(close.all()) else f"{int((~close).sum())} elements are not close"


def same(device: Device) -> Callable[[torch.Tensor, torch.Tensor], str]:
    """How results are compared on this device."""
    return near if device.dry else bits.difference


def agreement(device: Device, rule: str, pair: Any) -> str:
    """Both kernels on the same values, as they are and misaligned; how they differ."""
    count = device.size(1_000_003, 1_500)
    hyper = bits.hyper_of(rule)
    start = bits.Buffers.random(rule, pair, count)
    failures = []
    for first in (0, 1):
        by_cuda, by_triton = start.copy(device.tensors), start.copy(device.tensors)
        places = [(count - first, [first] * len(start.tensors), hyper)]
        bits.run_kernel(device, by_cuda.rows(places), {})
        param, grad, *state = (t[first:] for t in by_triton.tensors)
        triton_step.step([triton_step.Span(param, grad, state, rule, hyper)])
        device.synchronize()
        for a, b in zip(by_cuda.tensors, by_triton.tensors, strict=True):
            found = same(device)(a.cpu(), b.cpu())
            failures += [f"from element {first} on: {found}"] if found else []
    return "; ".join(failures)


def spans(device: Device, rule: str, params: list[torch.nn.Parameter]) -> kernels.Run:
    """Triton's update of all parameters, a launch each."""
    hyper, all_spans = bits.hyper_of(rule), []
    for p in params:
        assert p.grad is not None
        states = [torch.zeros_like(p, dtype=torch.float32) for _ in range(ops.RULES[rule][1])]
        all_spans.append(triton_step.Span(p.detach(), p.grad, states, rule, hyper))
    return lambda: triton_step.step(all_spans)


def race(device: Device, contest: kernels.Contest, dtype: torch.dtype) -> Row:
    """One rule in one type, both ways, in turns."""
    params = kernels.block(device, dtype)
    elements = sum(p.numel() for p in params)
    runs = {
        "cuda": kernels.ours(device, contest.rule, params),
        "triton": spans(device, contest.rule, params),
    }
    samples = interleaved(device, runs, device.size(9, 2))
    moved = elements * contest.bytes(dtype.itemsize, 4)
    measured = {
        f"{key}_gbps": moved / statistics.median(times) / 1e6 for key, times in samples.items()
    }
    measured["triton_over_cuda"] = median_ratio(samples["cuda"], samples["triton"])
    facts = {"elements": elements, "bytes": moved}
    return Row(f"{contest.rule} {kernels.NAMES[dtype]}", facts, measured)


def optimizer(device: Device, place: dict[str, Any]) -> Row:
    """A training with backend="triton" against the same with CUDA kernels, state in one place."""
    training = engine.TRAININGS[0]
    by_cuda, _ = engine.train(device, training, device.tensors, place)
    by_triton, _ = engine.train(device, training, device.tensors, {**place, "backend": "triton"})
    failures = []
    for name in by_cuda:
        found = same(device)(by_cuda[name].flatten(), by_triton[name].flatten())
        failures += [f"{name}: {found}"] if found else []
    name = f'backend="triton", store="{place["store"]}"'
    return Row(name, {"passes": engine.PASSES}, failed="; ".join(failures[:3]))


def run(device: Device, budget: Budget) -> Iterator[Row]:
    """Agreement of all rules, the optimizer, then speed."""
    failures, number = [], 0
    cases = list(itertools.product(bits.PAIRS[:: device.size(1, 2)], ops.RULES))
    for pair, rule in cases:  # fp32 of all rules first, since compiling takes what it takes
        if budget.left() < RACES_SECONDS and number >= len(ops.RULES):
            break
        number += 1
        found = agreement(device, rule, pair)
        failures += [f"{rule} {pair[0]}: {found}"] if found else []
    compared = {
        "kernels": number,
        "of": len(cases),
        "compared": "closeness" if device.dry else "bits",
    }
    yield Row("agreement", compared, shown=tuple(compared), failed="; ".join(failures[:3]))
    page = device.size(65536, 4096)
    for place in (
        {"store": "device"},
        {"store": "ram", "page_bytes": page},
        {"store": "ram", "page_bytes": page, "staging": 2 * page},
    ):
        yield optimizer(device, place)
    for contest in kernels.CONTESTS:
        for dtype in (torch.float32, torch.bfloat16):
            yield race(device, contest, dtype)
            device.empty_cache()
