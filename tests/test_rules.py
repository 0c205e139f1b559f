# SPDX-License-Identifier: Apache-2.0
# Every rule through the public classes: against its float64 reference and torch.optim, step by step
# and element by element, and 16-bit weights against float32 ones. The data is in rules/.

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from rules import Case, find_cases
from tolerances import MOVED_ULPS, ULPS, ulps

import hift_ext
from hift_ext import ops

CASES = find_cases()
STEPS = 50
SHAPES = ((7, 9), (), (1,))

# The first failure tells all; to shrink runs of 50 steps would take minutes.
unshrunk = settings(phases=[Phase.explicit, Phase.reuse, Phase.generate])

each_case = pytest.mark.parametrize("case", CASES, ids=str)
seeds = st.integers(0, 2**32 - 1)


def draw(generator: torch.Generator) -> list[torch.Tensor]:
    """One tensor per shape, normal, over two orders of magnitude."""
    return [
        torch.randn(shape, generator=generator)
        * 10 ** (2 * torch.rand(shape, generator=generator) - 1)
        for shape in SHAPES
    ]


def flat(tensors) -> np.ndarray:
    return torch.cat([t.detach().reshape(-1) for t in tensors]).double().numpy()


class Run:
    """An optimizer with parameters of its own, seen as flat float64 arrays."""

    def __init__(self, make, start: list[torch.Tensor], **hypers) -> None:
        self.params = [torch.nn.Parameter(t.clone()) for t in start]
        self.optimizer = make(self.params, **hypers)

    def step(self, grads: list[torch.Tensor]) -> None:
        for p, g in zip(self.params, grads, strict=True):
            p.grad = g.clone()
        self.optimizer.step()

    @property
    def weights(self) -> np.ndarray:
        return flat(self.params)

    @property
    def state(self) -> dict[str, np.ndarray]:
        each = [self.optimizer.state.get(p, {}) for p in self.params]
        return {
            name: flat(s[name] for s in each)
            for name, value in each[0].items()
            if name != "step" and value is not None
        }

    def become(self, other: Run) -> None:
        """Takes over the weights and state of `other`."""
        for mine, theirs in zip(self.params, other.params, strict=True):
            mine.data.copy_(theirs.data)
            for name, value in other.optimizer.state.get(theirs, {}).items():
                if name != "step" and mine in self.optimizer.state:
                    self.optimizer.state[mine][name].copy_(value)


def ours(case: Case, start: list[torch.Tensor], hypers) -> Run:
    run = Run(case.ours, start, **hypers, layers_per_group="all", master=None)
    assert [group.numel for group in run.optimizer.groups] == [sum(t.numel() for t in start)]
    assert run.optimizer.rule(run.optimizer.param_groups[0]) == case.rule
    return run


def within(name: str, bound: float, got, expected, magnitude) -> None:
    """Fails for the worst element beyond `bound` ulp, with its values."""
    error = ulps(got - expected, magnitude)
    worst = int(np.argmax(error))
    assert error[worst] <= bound, (
        f"{name}: element {worst} is {got[worst]!r}, expected {expected[worst]!r}: "
        f"{error[worst]:.1f} ulp of {magnitude[worst]!r}, allowed are {bound}"
    )


class Magnitudes:
    """The largest an element, its steps and its state have been, for tolerances.

    State counts by its terms, as if none cancelled: an L2 penalty may nearly equal its gradient.
    """

    def __init__(self, case: Case, hypers, start: list[torch.Tensor]) -> None:
        self.case, self.hypers = case, {**hypers, "maximize": False}
        self._last = flat(start)
        self.weights = np.abs(self._last)
        self.state: dict[str, np.ndarray] = {}
        self._terms: dict[str, np.ndarray] = {}

    def step(self, t: int, grads: list[torch.Tensor], weights: np.ndarray) -> None:
        """The t-th step has led to `weights`."""
        g = np.abs(flat(grads))
        _, self._terms = self.case.reference(self.weights, g, self._terms, t, **self.hypers)
        moved = np.abs(weights - self._last)
        self.weights = np.maximum(self.weights, np.maximum(np.abs(weights), moved))
        self._last = weights
        self.state = {k: np.maximum(v, self.state.get(k, 0.0)) for k, v in self._terms.items()}


def test_every_rule_has_one_case():
    counts = Counter(case.rule for case in CASES)
    assert counts == Counter(ops.RULES.keys()), (
        "tests/rules must hold one case for each rule of csrc/rules/all.h"
    )


@each_case
def test_against_float64(case):
    @unshrunk
    @given(case.hypers, seeds)
    def check(hypers, seed):
        generator = torch.Generator().manual_seed(seed)
        start = draw(generator)
        run = ours(case, start, hypers)
        free, free_state = flat(start), {}
        largest = Magnitudes(case, hypers, start)
        moved = np.zeros_like(free)
        for t in range(1, STEPS + 1):
            grads = draw(generator)
            g, before, state = flat(grads), run.weights, run.state
            run.step(grads)
            after = run.weights
            step, step_state = case.reference(before, g, state, t, **hypers)
            free, free_state = case.reference(free, g, free_state, t, **hypers)
            largest.step(t, grads, after)
            moved += ulps(after - before, largest.weights)
            run_bound = ULPS["reference, a run"] + ULPS["reference, each step of a run"] * t
            bound = ULPS["reference, one step, weights"]
            within(f"step {t}, weights", bound, after, step, largest.weights)
            within(f"{t} steps, weights", run_bound, after, free, largest.weights)
            bound = ULPS["reference, one step, state"]
            assert run.state.keys() == step_state.keys()
            for name, value in run.state.items():
                scale = largest.state[name]
                within(f"step {t}, {name}", bound, value, step_state[name], scale)
                within(f"{t} steps, {name}", run_bound, value, free_state[name], scale)
        assert moved.min() >= MOVED_ULPS

    check()


@each_case
@pytest.mark.parametrize("flavour", ["torch", "torch fused"])
def test_against_torch(case, flavour):
    hint = {"fused": True} if flavour == "torch fused" else {"foreach": False}

    @unshrunk
    @given(case.hypers, seeds)
    def check(hypers, seed):
        generator = torch.Generator().manual_seed(seed)
        start = draw(generator)
        run, theirs = ours(case, start, hypers), Run(case.theirs, start, **hypers, **hint)
        largest = Magnitudes(case, hypers, start)
        for t in range(1, STEPS + 1):
            grads = draw(generator)
            run.step(grads)
            theirs.step(grads)
            largest.step(t, grads, theirs.weights)
            bound = ULPS[f"{flavour}, weights"]
            within(f"{t} steps, weights", bound, run.weights, theirs.weights, largest.weights)
            state = theirs.state
            assert run.state.keys() == state.keys()
            for name, value in run.state.items():
                bound, scale = ULPS[f"{flavour}, state"], largest.state[name]
                within(f"{t} steps, {name}", bound, value, state[name], scale)

    check()


@pytest.mark.needs("torch_fma")
@each_case
def test_state_equals_torch_to_the_bit(case):
    """One step of torch from our weights and state: each fmaf stands where torch has its own."""

    @unshrunk
    @given(case.hypers, seeds)
    def check(hypers, seed):
        generator = torch.Generator().manual_seed(seed)
        start = draw(generator)
        run, theirs = ours(case, start, hypers), Run(case.theirs, start, **hypers, foreach=False)
        largest = Magnitudes(case, hypers, start)
        for t in range(1, 11):
            grads = draw(generator)
            theirs.become(run)
            run.step(grads)
            theirs.step(grads)
            largest.step(t, grads, theirs.weights)
            bound = ULPS["torch, one step, weights"] if case.divides else 0.0
            within(f"step {t}, weights", bound, run.weights, theirs.weights, largest.weights)
            for name, value in theirs.state.items():
                np.testing.assert_array_equal(run.state[name], value, f"step {t}, {name}")

    check()


@each_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    "own_gradient",
    [True, pytest.param(False, marks=pytest.mark.needs("grad_dtype"))],
    ids=["own_gradient", "fp32_gradient"],
)
def test_16_bit_weights(case, dtype, own_gradient):
    """Without a master: upcast, float32 rule, rounding to nearest even, as torch converts."""

    @settings(unshrunk, max_examples=5)
    @given(case.hypers, seeds)
    def check(hypers, seed):
        generator = torch.Generator().manual_seed(seed)
        start = [t.to(dtype) for t in draw(generator)]
        narrow, wide = ours(case, start, hypers), ours(case, [t.float() for t in start], hypers)
        changed = 0
        for t in range(1, 21):
            grads = draw(generator)
            if own_gradient:
                grads = [g.to(dtype) for g in grads]
            else:
                for p in narrow.params:
                    p.grad_dtype = torch.float32
            before = narrow.weights
            narrow.step(grads)
            wide.step([g.float() for g in grads])
            for n, w in zip(narrow.params, wide.params, strict=True):
                assert n.dtype == dtype
                assert torch.equal(n.view(torch.int16), w.detach().to(dtype).view(torch.int16))
                w.data.copy_(n.data)
            for name, value in wide.state.items():
                np.testing.assert_array_equal(narrow.state[name], value, f"step {t}, {name}")
            changed += np.count_nonzero(narrow.weights != before)
        assert changed > narrow.weights.size  # of 20 times that
        for p in narrow.params:
            for name, value in narrow.optimizer.state.get(p, {}).items():
                assert value.dtype == torch.float32, name

    check()


@each_case
def test_not_finite_where_torch_is_not_finite(case):
    special = [float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e-45, 0.0, -0.0, 1.0]
    values = torch.tensor(special)
    start, grads = values.repeat_interleave(len(special)), values.repeat(len(special))
    for flag in (False, True):
        hypers = {**case.typical, "maximize": flag}
        run = ours(case, [start], hypers)
        theirs = Run(case.theirs, [start], **hypers, foreach=False)
        for step in ([grads], [torch.ones_like(grads)]):
            run.step(step)
            theirs.step(step)
            pairs = {"weights": (run.weights, theirs.weights)}
            pairs |= {name: (value, theirs.state[name]) for name, value in run.state.items()}
            for name, (mine, other) in pairs.items():
                for kind in (np.isnan, np.isposinf, np.isneginf):
                    np.testing.assert_array_equal(kind(mine), kind(other), name)


@pytest.mark.needs("decoupled_adam")
@pytest.mark.parametrize("amsgrad", [False, True])
def test_adam_with_decoupled_decay_is_adamw(amsgrad):
    generator = torch.Generator().manual_seed(1)
    start, settings_ = draw(generator), {"lr": 0.01, "weight_decay": 0.3, "amsgrad": amsgrad}
    adamw = Run(hift_ext.AdamW, start, **settings_, layers_per_group="all")
    adam = Run(
        hift_ext.Adam, start, **settings_, decoupled_weight_decay=True, layers_per_group="all"
    )
    for _ in range(5):
        grads = draw(generator)
        adamw.step(grads)
        adam.step(grads)
    np.testing.assert_array_equal(adam.weights, adamw.weights)
    assert np.all(adam.weights != flat(start))
