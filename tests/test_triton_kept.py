# SPDX-License-Identifier: Apache-2.0
# Triton's kernels for state, masters and rounding in fewer bits, run by its interpreter: to the bit
# against the compiled passes, for every way of keeping numbers. See test_triton.py.

from __future__ import annotations

import itertools
from typing import NamedTuple

import _hift_ext
import pytest
import torch
from interpreted import INTERPRETED, fma, inside, outside, run_interpreted  # noqa: F401
from spans import CASES, PAIRS, hyper_of
from torch import nn

import hift_ext
from hift_ext import ops

if INTERPRETED:
    from hift_ext import triton_step
    from hift_ext.triton_step import RUN, Span

STATES = (torch.float32, torch.bfloat16, torch.uint8)
WAYS = ("nearest", "stochastic", "fp32", "split")
MASTERS = {"fp32": torch.float32, "split": torch.int16}
KEY = 0x9E3779B97F4A7C15


def offered(pair, way) -> bool:
    """What core/kept.h offers."""
    if way == "nearest":
        return True
    return pair[0] == torch.bfloat16 or (pair[0] == torch.float16 and way == "fp32")


class Kept(NamedTuple):
    """A span's tensors, and how its numbers are kept."""

    rule: str
    param: torch.Tensor
    grad: torch.Tensor
    states: list[torch.Tensor]
    scales: list[torch.Tensor]
    master: torch.Tensor | None
    way: str
    random_state: bool
    element: int

    @classmethod
    def random(cls, rule, pair, state, way, random_state, count, element=0) -> Kept:
        generator = torch.Generator().manual_seed(count)
        blocks = -(-count // 256)

        def draw(n=count):
            return torch.randn(n, generator=generator)

        states, scales = [], []
        for _ in range(ops.RULES[rule][1]):
            if state == torch.uint8:
                codes = torch.randint(0, 121, (blocks * 256,), generator=generator)
                codes[count:] = 0
                states.append(codes.to(torch.uint8))
                scale = draw(blocks).abs()
                scale[1::3] = 0
                scales.append(scale)
            else:
                states.append(draw().abs().to(state))
        param, grad, master = draw(), draw(), None
        if way == "fp32":
            master = param.clone()
            master[::5] = draw()[::5]  # set by somebody else: the weight counts
        elif way == "split":
            master = torch.randint(-(1 << 15), 1 << 15, (count,), generator=generator)
            master = master.to(torch.int16)
        pair_of = param.to(pair[0]), grad.to(pair[1])
        return cls(rule, *pair_of, states, scales, master, way, random_state, element)

    def clone(self) -> Kept:
        def copy(tensors):
            return [t.clone() for t in tensors]

        master = None if self.master is None else self.master.clone()
        return self._replace(
            param=self.param.clone(),
            states=copy(self.states),
            scales=copy(self.scales),
            master=master,
        )

    def span(self) -> Span:
        return Span(
            self.param,
            self.grad,
            self.states,
            self.rule,
            hyper_of(CASES[self.rule]),
            scales=self.scales,
            master=self.master,
            stochastic=self.way == "stochastic",
            stochastic_state=self.random_state,
            key=KEY,
            element=self.element,
        )

    def row(self) -> tuple:
        """As the compiled passes take it."""
        kind = ops.kind(self.rule, self.param.dtype, self.grad.dtype)
        kind |= WAYS.index(self.way) << 16
        state = STATES.index(self.states[0].dtype) if self.states else 0
        scales = [t.data_ptr() for t in self.scales]
        master = 0 if self.master is None else self.master.data_ptr()
        kept = (state, scales, master, self.random_state, KEY, self.element)
        addresses = [t.data_ptr() for t in self.states]
        hyper = hyper_of(CASES[self.rule])
        count = self.param.numel()
        return self.param.data_ptr(), self.grad.data_ptr(), count, kind, addresses, hyper, kept

    @property
    def changing(self) -> list[torch.Tensor]:
        """All that a step changes."""
        return [self.param, *self.states, *([] if self.master is None else [self.master])]

    def assert_equal(self, other: Kept) -> None:
        pairs = [
            ("param", self.param, other.param),
            *(
                (f"state {i}", *both)
                for i, both in enumerate(zip(self.states, other.states, strict=True))
            ),
            *(
                (f"scale {i}", *both)
                for i, both in enumerate(zip(self.scales, other.scales, strict=True))
            ),
        ]
        if self.master is not None:
            pairs.append(("master", self.master, other.master))
        for name, a, b in pairs:
            where = (a.view(torch.uint8) != b.view(torch.uint8)).nonzero().flatten().tolist()
            assert not where, f"{name}: {len(where)} bytes differ, first {where[0]}"


def check(kept: list[Kept]) -> None:
    """All of these at once, here and there."""
    got, expected = [k.clone() for k in kept], [k.clone() for k in kept]
    triton_step.step([k.span() for k in got])
    _hift_ext.step_spans([k.row() for k in expected])
    for a, b, before in zip(got, expected, kept, strict=True):
        a.assert_equal(b)
        same = [torch.equal(x, y) for x, y in zip(a.changing, before.changing, strict=True)]
        assert not all(same)


@inside
@pytest.mark.parametrize("rule", list(ops.RULES))
@pytest.mark.parametrize("state", STATES, ids=["fp32", "bf16", "8bit"])
def test_every_way(rule, state):
    states, signs = ops.RULES[rule][1], ops.RULES[rule][3]
    if state == torch.uint8 and (states == 0 or signs < 0):
        return
    ways = [
        (pair, way, random_state, element)
        for pair, way, random_state in itertools.product(PAIRS, WAYS, (False, True))
        for element in ([0, (1 << 32) - 100] if way == "stochastic" or random_state else [7])
        if offered(pair, way)
    ]
    # The interpreter is slow: each rule has a seventh of the ways, and together they have all.
    share = ways[list(ops.RULES).index(rule) :: len(ops.RULES)]
    counts = itertools.cycle([RUN + 259, 255, 513, 1])
    kept = [
        Kept.random(rule, pair, state, way, random_state, next(counts), element)
        for pair, way, random_state, element in share
    ]
    check(kept)


@inside
def test_long_spans_are_cut_where_a_third_key_would_begin(monkeypatch):
    monkeypatch.setattr(triton_step, "KEYED", RUN)
    pair = PAIRS[2]
    for state in (torch.bfloat16, torch.uint8):
        kept = Kept.random("adamw", pair, state, "stochastic", True, 2 * RUN + 300, (1 << 32) - RUN)
        assert len(list(kept.span().parts())) == 3
        check([kept])


BAD = {
    "codes": (
        ValueError,
        "codes are whole blocks",
        {"states": [torch.zeros(300, dtype=torch.uint8)]},
    ),
    "scales": (ValueError, "0 scales for 1 states", {"scales": []}),
    "scale": (ValueError, "one float32 for every block", {"scales": [torch.ones(1)]}),
    "mixed": (TypeError, "state 0 is torch.float16", {"states": [torch.ones(300).half()]}),
    "word": (ValueError, "word of 4 bytes", {"states": [torch.zeros(513, dtype=torch.uint8)[1:]]}),
    "master": (TypeError, "int16 master of torch.float32", {"master": torch.zeros(300).short()}),
    "random": (TypeError, "only bfloat16 weights", {"stochastic": True}),
    "rule": (TypeError, "adagrad is not kept", {"rule": "adagrad", "hyper": (1.0,) * 4}),
}


@inside
@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused(name):
    kept = Kept.random("momentum", PAIRS[0], torch.uint8, "nearest", False, 300)
    error, match, changes = BAD[name]
    before = kept.clone()
    with pytest.raises(error, match=match):
        triton_step.step([kept.span(), kept.span()._replace(**changes)])
    kept.assert_equal(before)


@inside
@pytest.mark.parametrize(
    "options",
    [
        {"state_dtype": "8bit"},
        {"state_dtype": torch.bfloat16, "rounding": "stochastic"},
        {"state_dtype": "8bit", "master": "fp32", "rounding": "stochastic"},
    ],
    ids=["8bit_split", "bf16_stochastic", "8bit_fp32_stochastic"],
)
def test_optimizers_end_to_end(options):
    """As a user names them, on the interpreter and on the CPU's passes."""
    ended = []
    for backend in ("cpu", "triton"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 3)).bfloat16()
        with hift_ext.AdamW(
            model, lr=1e-2, store="device", backend=backend, seed=3, **options
        ) as optimizer:
            for _ in range(6):
                model(torch.ones(4, 24).bfloat16()).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            state = [t for p in model.parameters() for t in optimizer.state[p].values()]
            values = [torch.as_tensor(t).clone() for t in [*model.parameters(), *state]]
        ended.append(values)
    assert len(ended[0]) == len(ended[1]) > 4
    assert all(torch.equal(a, b) for a, b in zip(*ended, strict=True))


@outside
@pytest.mark.needs("triton")
def test_under_the_interpreter():
    run_interpreted(__file__)
