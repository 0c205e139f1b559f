# SPDX-License-Identifier: Apache-2.0
# Spans for the raw binding: buffers of weights, gradients and state, rows made of their addresses,
# and comparison to the bit.

from __future__ import annotations

from dataclasses import dataclass

import _hift_ext
import torch
from rules import Case, find_cases

from hift_ext import ops

CASES = {case.rule: case for case in find_cases()}
PAIRS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float16, torch.float16),
]
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
BITS = {4: torch.int32, 2: torch.int16}


def hyper_of(case: Case, visit: int = 3, **changes) -> tuple[float, ...]:
    """Gradient factor and the rule's hyper-parameters, as rows carry them."""
    optimizer = case.ours(
        [torch.nn.Parameter(torch.zeros(1))], **case.typical, layers_per_group="all"
    )
    group = {**optimizer.param_groups[0], **changes}
    return (1.0, *optimizer.hyper(group, float(group["lr"]), visit))


@dataclass
class Buffers:
    """What spans lie in: weights, gradients, and the rule's streams of state."""

    rule: str
    param: torch.Tensor
    grad: torch.Tensor
    state: list[torch.Tensor]

    @classmethod
    def random(cls, rule: str, pair, count: int, seed: int = 0) -> Buffers:
        generator = torch.Generator().manual_seed(seed)

        def draw():
            return torch.randn(count, generator=generator)

        state = [draw().abs() for _ in range(ops.RULES[rule][1])]  # a second moment is not negative
        return cls(rule, draw().to(pair[0]), draw().to(pair[1]), state)

    @property
    def all(self) -> list[torch.Tensor]:
        return [self.param, self.grad, *self.state]

    def map(self, function) -> Buffers:
        param, grad, *state = (function(t) for t in self.all)
        return Buffers(self.rule, param, grad, state)

    def clone(self) -> Buffers:
        return self.map(torch.clone)

    def span(self, count: int, starts=None, hyper=None) -> tuple:
        """A row of step_spans: `count` elements from `starts[b]` of each buffer on."""
        starts = starts if starts is not None else [0] * len(self.all)
        param, grad, *state = (
            t.data_ptr() + s * t.element_size() for t, s in zip(self.all, starts, strict=True)
        )
        kind = ops.kind(self.rule, self.param.dtype, self.grad.dtype)
        return (param, grad, count, kind, state, hyper or hyper_of(CASES[self.rule]))

    def step(self, hyper=None, **keywords) -> Buffers:
        """One span over everything; `keywords` go to step_spans."""
        _hift_ext.step_spans([self.span(self.param.numel(), hyper=hyper)], **keywords)
        return self

    def assert_equal(self, other: Buffers, *, payloads: bool = True) -> None:
        """To the bit; without `payloads`, one NaN is as good as another."""
        for name, a, b in zip(
            ("param", "grad", "state 0", "state 1", "state 2"), self.all, other.all, strict=False
        ):
            bits = [t.view(BITS[t.element_size()]) for t in (a, b)]
            differ = bits[0] != bits[1]
            if not payloads:
                differ &= ~(a.isnan() & b.isnan())
            where = differ.nonzero().flatten().tolist()
            assert not where, (
                f"{name} differs in {len(where)} elements, first in {where[0]}: "
                f"{a[where[0]].item()!r} and {b[where[0]].item()!r}"
            )


def on_baseline(buffers: Buffers, **scalars) -> Buffers:
    before = ops.build_info()["isa"]
    _hift_ext.use_instruction_set("baseline")
    try:
        return buffers.step(**scalars)
    finally:
        _hift_ext.use_instruction_set(before)
