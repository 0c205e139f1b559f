# SPDX-License-Identifier: Apache-2.0
# The update of a LLaMA-7B block on the device: bytes counted here, over time, beside a copy within
# the device that was measured in turns with it, and beside torch's and apex' own.
"""Section `kernels`: update kernels in GB/s."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import _hift_ext
import torch

from gpu.bits import hyper_of
from gpu.device import Device, interleaved, median_ratio
from gpu.report import Row
from gpu.runner import Budget
from hift_ext import ops

LLAMA_7B_BLOCK = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)] + [(4096,)] * 2
DRY_BLOCK = [(32, 32)] * 2 + [(33,)] * 2
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Contest:
    """A rule and who else has it.

    Attributes:
        rule: Ours.
        theirs: torch's class and arguments.
        states: Streams of state.
    """

    rule: str
    theirs: Any
    arguments: dict[str, Any]
    states: int

    def bytes(self, element: int, state: int) -> int:
        """Read and written for each parameter: weight and state in and out, gradient in."""
        return 3 * element + 2 * self.states * state


CONTESTS = [
    Contest("adamw", torch.optim.AdamW, {"lr": 1e-3}, 2),
    Contest("adagrad", torch.optim.Adagrad, {"lr": 1e-3}, 1),
    Contest("momentum", torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9}, 1),
]

Run = Callable[[], object]


def block(device: Device, dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """The parameters of one block, with gradients."""
    params = []
    for shape in device.size(LLAMA_7B_BLOCK, DRY_BLOCK):
        p = torch.nn.Parameter(torch.randn(shape, dtype=dtype, device=device.tensors))
        p.grad = torch.randn_like(p)
        params.append(p)
    return params


def ours(device: Device, rule: str, params: list[torch.nn.Parameter]) -> Run:
    """One launch over all parameters."""
    states = [
        [torch.zeros_like(p, dtype=torch.float32) for _ in range(ops.RULES[rule][1])]
        for p in params
    ]
    hyper, rows = hyper_of(rule), []
    for p, state in zip(params, states, strict=True):
        assert p.grad is not None
        kind = ops.kind(rule, p.dtype, p.grad.dtype)
        addresses = [s.data_ptr() for s in state]
        rows.append((p.data_ptr(), p.grad.data_ptr(), p.numel(), kind, addresses, hyper))

    def run(held: Any = (params, states)) -> None:
        _hift_ext.cuda_step_spans(rows, 0, 0, 0, device.index, device.stream())

    return run


def torchs(contest: Contest, params: list[torch.nn.Parameter]) -> tuple[str, Run]:
    """torch's fused optimizer, or the fastest that it has; gives its name too."""
    for name in ("fused", "foreach"):
        try:
            optimizer = contest.theirs(params, **contest.arguments, **{name: True})
            optimizer.step()  # some refuse only here
        except (RuntimeError, ValueError, TypeError):
            if name == "foreach":
                raise
            continue
        return f"torch_{name}", optimizer.step
    raise AssertionError


def apexs(params: list[torch.nn.Parameter]) -> Run | None:
    """apex' FusedAdam, if it is installed."""
    try:
        from apex.optimizers import FusedAdam  # type: ignore[import-not-found]
    except ImportError:
        return None
    step: Run = FusedAdam(params, lr=1e-3, adam_w_mode=True).step
    return step


def device_copy(device: Device) -> tuple[Run, int]:
    """A copy within the device, and the bytes it reads and writes."""
    count = device.size(1 << 28, 1 << 10)
    source, target = (torch.ones(count, device=device.tensors) for _ in range(2))
    return lambda: target.copy_(source), 2 * source.nbytes


def measure(device: Device, contest: Contest, dtype: torch.dtype, rounds: int) -> Row:
    """One rule in one type, against all that is there."""
    params = block(device, dtype)
    elements = sum(p.numel() for p in params)
    copy_run, copy_bytes = device_copy(device)
    name, torch_run = torchs(contest, params)
    runs: dict[str, Run] = {"copy": copy_run, name: torch_run}
    runs["hift"] = ours(device, contest.rule, params)
    # torch keeps state in the parameters' type, and so moves fewer bytes in 16 bits.
    size = dtype.itemsize
    moved = {
        "copy": copy_bytes,
        "hift": elements * contest.bytes(size, 4),
        name: elements * contest.bytes(size, size),
    }
    apex_run = apexs(params) if contest.rule == "adamw" else None
    if apex_run is not None:
        runs["apex"], moved["apex"] = apex_run, moved["hift"]
    samples = interleaved(device, runs, rounds)
    measured = {}
    for key, times in samples.items():
        median = statistics.median(times)
        measured[f"{key}_gbps"] = moved[key] / median / 1e6
        measured[f"{key}_update_ms"] = median
    measured["share_of_copy"] = (
        median_ratio(samples["copy"], samples["hift"]) * moved["hift"] / moved["copy"]
    )
    measured["times_as_fast_as_torch"] = median_ratio(samples[name], samples["hift"])
    facts = {"elements": elements, "bytes": moved["hift"], "torch_state": NAMES[dtype]}
    title = f"{contest.rule} {NAMES[dtype]}, fp32 state"
    shown = [f"{key}_gbps" for key in ("hift", name, "apex", "copy") if key in runs]
    note = "" if size == 4 else "torch's state is bf16: it moves fewer bytes"
    return Row(title, facts, measured, [*shown, "share_of_copy", "times_as_fast_as_torch"], note)


def run(device: Device, budget: Budget) -> Iterator[Row]:
    """A row for each rule and type."""
    for contest in CONTESTS:
        for dtype in (torch.float32, torch.bfloat16):
            yield measure(device, contest, dtype, device.size(9, 2))
            device.empty_cache()
