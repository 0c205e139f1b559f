# SPDX-License-Identifier: Apache-2.0
# The kernels against the CPU's loops, through the raw binding, to the bit: every rule and pair of
# types, every count and misalignment around a vector, long spans, special values, scaling.
"""Section `bits`: CUDA == CPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import _hift_ext
import torch

import hift_ext
from gpu import kept
from gpu.device import Device
from gpu.report import Row
from gpu.runner import Budget
from hift_ext import ops

CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (hift_ext.AdamW, {"weight_decay": 0.1}),
    "adamw_amsgrad": (hift_ext.AdamW, {"weight_decay": 0.1, "amsgrad": True}),
    "adam": (hift_ext.Adam, {"weight_decay": 0.1}),
    "adam_amsgrad": (hift_ext.Adam, {"amsgrad": True}),
    "adagrad": (hift_ext.Adagrad, {"weight_decay": 0.1, "lr_decay": 0.1}),
    "sgd": (hift_ext.SGD, {"weight_decay": 0.1}),
    "momentum": (hift_ext.SGD, {"momentum": 0.9, "nesterov": True}),
}
"""For each rule a class and settings that lead to it."""

PAIRS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float16, torch.float16),
]
SPECIAL = [float("nan"), float("inf"), -float("inf"), 3e38, 1e-41, -1e-45, 1e-20, 0.0, -0.0, 1.0]
FEW = [1, 255, 1023, 4095, 4096, 4097, 0, 8193]
"""Elements of spans: around those that a warp and a block take."""

SCALARS = ("grad_scale", "clip", "found_inf")

Hyper = tuple[float, ...]
Place = tuple[int, list[int], Hyper]
"""Elements of a span, its first element in each buffer, its numbers."""


def hyper_of(rule: str, visit: int = 3, maximize: bool = False) -> Hyper:
    """Gradient factor and hyper-parameters, as rows carry them.

    Raises:
        ValueError: No case here leads to the rule.
    """
    if rule not in CASES:
        raise ValueError(f"rule {rule!r} has no case here: add one to CASES")
    kind, settings = CASES[rule]
    optimizer = kind([torch.nn.Parameter(torch.zeros(1))], 1e-2, **settings, layers_per_group="all")
    group = optimizer.param_groups[0]
    assert optimizer.rule(group) == rule
    return (-1.0 if maximize else 1.0, *optimizer.hyper(group, 1e-2, visit))


@dataclass
class Buffers:
    """Weights, gradients and the rule's state that spans lie in."""

    rule: str
    tensors: list[torch.Tensor]

    @classmethod
    def random(cls, rule: str, pair: Sequence[torch.dtype], count: int, seed: int = 0) -> Buffers:
        """Normal values; state is not negative, as a second moment is."""
        draw = torch.Generator().manual_seed(seed)
        values = [torch.randn(count, generator=draw) for _ in range(2 + ops.RULES[rule][1])]
        types = [*pair, *[torch.float32] * ops.RULES[rule][1]]
        values[2:] = [state.abs() for state in values[2:]]
        return cls(rule, [v.to(t) for v, t in zip(values, types, strict=True)])

    def copy(self, device: torch.device) -> Buffers:
        """The same values elsewhere."""
        return Buffers(self.rule, [t.to(device, copy=True) for t in self.tensors])

    def rows(self, places: Sequence[Place]) -> list[tuple[Any, ...]]:
        """What the binding takes."""
        kind = ops.kind(self.rule, self.tensors[0].dtype, self.tensors[1].dtype)
        rows = []
        for count, starts, hyper in places:
            param, grad, *state = (
                t.data_ptr() + s * t.element_size()
                for t, s in zip(self.tensors, starts, strict=True)
            )
            rows.append((param, grad, count, kind, state, hyper))
        return rows


def run_kernel(
    device: Device, rows: list[tuple[Any, ...]], scalars: Mapping[str, torch.Tensor]
) -> None:
    """One update on the device; returns when it is done."""
    addresses = [scalars[name].data_ptr() if name in scalars else 0 for name in SCALARS]
    _hift_ext.cuda_step_spans(rows, *addresses, device.index, device.stream())
    device.synchronize()


def difference(a: torch.Tensor, b: torch.Tensor) -> str:
    """Where two tensors differ in bits; one NaN is as good as another. Empty if nowhere."""
    integers = torch.int32 if a.element_size() == 4 else torch.int16
    differ = (a.view(integers) != b.view(integers)) & ~(a.isnan() & b.isnan())
    where = differ.nonzero().flatten().tolist()
    if not where:
        return ""
    first = where[0]
    return f"{len(where)} elements, first in {first}: {a[first].item()!r}, {b[first].item()!r}"


def compare(
    device: Device,
    before: Buffers,
    places: Sequence[Place],
    scalars: Mapping[str, float] | None = None,
    idle: bool = False,
) -> str:
    """Runs spans here and there; what lies between them is compared too.

    Args:
        device: Where the kernels run.
        before: What both start from.
        places: The spans.
        scalars: Of grad_scale, clip and found_inf those that are passed.
        idle: Nothing must change; otherwise something must.

    Returns:
        How they differ; empty if they do not.
    """
    here, there = before.copy(torch.device("cpu")), before.copy(device.tensors)
    values = {name: torch.tensor(value) for name, value in (scalars or {}).items()}
    addresses = {name: value.data_ptr() for name, value in values.items()}
    _hift_ext.step_spans(here.rows(places), **addresses)
    run_kernel(device, there.rows(places), {k: v.to(device.tensors) for k, v in values.items()})
    names = ("param", "grad", "state 0", "state 1", "state 2")
    for name, a, b in zip(names, here.tensors, there.tensors, strict=False):
        found = difference(a, b.cpu())
        if found:
            return f"{name}: {found} (CPU, CUDA)"
    if (difference(before.tensors[0], here.tensors[0]) == "") != idle:
        return "an update changed something" if idle else "an update changed nothing"
    return ""


def placements(device: Device, rule: str, pair: Any) -> tuple[Buffers, list[Place]]:
    """Every count of 0..2 vectors, with every misalignment of each buffer alone and of all."""
    slot, width, buffers = 64, 17, 2 + ops.RULES[rule][1]
    starts = [[0] * buffers]
    for offset in range(1, width):
        starts += [[offset * (b == other) for b in range(buffers)] for other in range(buffers)]
        starts += [[offset] * buffers, [(offset * (b + 3)) % width for b in range(buffers)]]
    cases = list(itertools.product(range(2 * width + 1), starts))[:: device.size(1, 23)]
    hyper = hyper_of(rule)
    places = [
        (count, [8 + slot * i + s for s in start], hyper) for i, (count, start) in enumerate(cases)
    ]
    return Buffers.random(rule, pair, slot * (len(cases) + 1)), places


def lengths(device: Device, rule: str, pair: Any) -> tuple[Buffers, list[Place]]:
    """Spans around and far above what a block of threads takes."""
    return spans_in_a_row(rule, pair, [*FEW, *device.size([300_007, 1_048_579], [20_483])])


def few(device: Device, rule: str, pair: Any) -> tuple[Buffers, list[Place]]:
    """Some of these, for what has nothing to do with length."""
    return spans_in_a_row(rule, pair, FEW)


def spans_in_a_row(rule: str, pair: Any, counts: list[int]) -> tuple[Buffers, list[Place]]:
    """One span behind the other, each at a visit of its own."""
    ends = list(itertools.accumulate(counts, initial=0))
    buffers = 2 + ops.RULES[rule][1]
    places = [
        (count, [begin] * buffers, hyper_of(rule, visit))
        for visit, (count, begin) in enumerate(zip(counts, ends, strict=False), 1)
    ]
    return Buffers.random(rule, pair, ends[-1], seed=1), places


def special(rule: str, pair: Any) -> Buffers:
    """NaN, infinities, subnormal, tiny and huge values, in every combination."""
    buffers = 2 + ops.RULES[rule][1]
    grid = torch.tensor(list(itertools.product(SPECIAL, repeat=min(buffers, 4)))).T.contiguous()
    types = [*pair, *[torch.float32] * (buffers - 2)]
    return Buffers(rule, [grid[b % 4].to(t).clone() for b, t in enumerate(types)])


def patterns(dtype: torch.dtype) -> Buffers:
    """Every number of 16 bits as a weight, for an update that adds nothing."""
    numbers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    return Buffers("sgd", [numbers, torch.zeros(1 << 16)])


def boundaries(dtype: torch.dtype) -> Buffers:
    """Gradients in the middle between two numbers of 16 bits and beside it, to be added to -0."""
    (numbers, _), dropped = patterns(dtype).tensors, 16 if dtype == torch.bfloat16 else 13
    wide = numbers[numbers.isfinite()].float().view(torch.int32)
    half = 1 << dropped - 1
    grad = torch.cat([wide + offset for offset in (half - 1, half, half + 1)]).view(torch.float32)
    return Buffers("sgd", [torch.full(grad.shape, -0.0, dtype=dtype), grad])


def checks(device: Device, rule: str, pair: Any) -> Iterator[tuple[str, Callable[[], str], int]]:
    """Name, check, and number of spans."""
    buffers = 2 + ops.RULES[rule][1]
    for make in (placements, lengths):
        before, places = make(device, rule, pair)
        yield make.__name__, partial(compare, device, before, places), len(places)
    before = special(rule, pair)
    whole = [(before.tensors[0].numel(), [0] * buffers, hyper_of(rule))]
    yield "special values", partial(compare, device, before, whole), 1
    if rule == "sgd" and pair[0] != pair[1]:
        for before, rate in ((patterns(pair[0]), 0.0), (boundaries(pair[0]), -1.0)):
            whole = [(before.tensors[0].numel(), [0, 0], (1.0, 0.0, rate))]
            check = partial(compare, device, before, whole, idle=rate == 0)
            yield "16-bit numbers", check, 1
    before, places = few(device, rule, pair)
    up = [(count, starts, hyper_of(rule, maximize=True)) for count, starts, _ in places]
    yield "maximize", partial(compare, device, before, up), len(up)
    for scalars in (
        {"clip": 0.3},
        {"grad_scale": 65536.0},
        {"grad_scale": 1000.0, "clip": 0.7},
        {"found_inf": 0.0},
        {"grad_scale": 3.0, "found_inf": -0.0},
    ):
        name = ", ".join(f"{key} {value}" for key, value in scalars.items())
        yield name, partial(compare, device, before, places, scalars), len(places)
    for found in (1.0, float("inf"), float("nan")):
        flag = {"found_inf": found, "clip": 0.5}
        idle = partial(compare, device, before, places, flag, idle=True)
        yield f"found_inf {found}", idle, len(places)


def kept_checks(device: Device, rule: str) -> Iterator[tuple[str, Callable[[], str], int]]:
    """The same for numbers that are kept in fewer bits."""
    there = partial(run_kernel, device, scalars={})
    pairs = device.size(PAIRS, PAIRS[2:3])
    hyper = hyper_of(rule)
    counts = device.size(kept.COUNTS, kept.COUNTS[:6])
    return kept.checks(rule, pairs, hyper, device.tensors, _hift_ext.step_spans, there, counts)


def run(device: Device, budget: Budget) -> Iterator[Row]:
    """A row for each rule."""
    for rule in ops.RULES:
        total, failures = 0, []
        for pair in PAIRS:
            for name, check, spans in checks(device, rule, pair):
                found = check()
                total += spans
                if found:
                    types = " with ".join(str(t).removeprefix("torch.") for t in pair)
                    failures.append(f"{types}, {name}: {found}")
        for name, check, spans in kept_checks(device, rule):
            found = check()
            total += spans
            if found:
                failures.append(f"{name}: {found}")
        facts = {"type_pairs": len(PAIRS), "spans": total}
        yield Row(rule, facts, shown=tuple(facts), failed="; ".join(failures[:3]))
