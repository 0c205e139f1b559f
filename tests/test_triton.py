# SPDX-License-Identifier: Apache-2.0
# The Triton kernel, run by Triton's interpreter: to the bit against the compiled loop, and against
# torch.optim. The interpreter is chosen when triton is first imported, so all of this file but its
# last test runs in a process of its own, which that last test starts.

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from fractions import Fraction

import _hift_ext
import numpy as np
import pytest
import torch
from spans import CASES, NAMES, PAIRS, Buffers, hyper_of, on_baseline
from tolerances import ULPS, ulps

from hift_ext import ops

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    from triton.runtime import interpreter

    from hift_ext import triton_step
    from hift_ext.triton_step import RUN, Scalars, Span


def inside(test):
    """A test for the interpreter's process; there is none of that name in the other."""
    return test if INTERPRETED else None


each_rule = pytest.mark.parametrize("rule", list(ops.RULES))
each_pair = pytest.mark.parametrize(
    "pair", PAIRS, ids=lambda pair: "-".join(NAMES[t] for t in pair)
)


def fused(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """`x * y + z` of float32, rounded once. The interpreter's own rounds the product too."""
    with np.errstate(all="ignore"):
        product, z = x.astype(np.float64) * y, z.astype(np.float64)  # exact
        total = product + z
        # What the addition lost (Knuth's TwoSum). Where it lost anything, the last bit is made odd,
        # so that the second rounding cannot take the sum for a tie.
        virtual = total - product
        lost = (product - (total - virtual)) + (z - virtual)
        even = (total.view(np.int64) & 1) == 0
        inexact = np.isfinite(total) & (lost != 0) & even
        odd = np.nextafter(total, np.where(lost > 0, np.inf, -np.inf))
        return np.where(inexact, odd, total).astype(np.float32)


@pytest.fixture(autouse=True)
def fma(monkeypatch):
    """Gives the interpreter a fused multiply-add, as every GPU has."""
    if INTERPRETED:

        def create_fma(self, x, y, z):
            arrays = np.broadcast_arrays(x.data, y.data, z.data)
            result = fused(*(a.astype(np.float32) for a in arrays))
            return interpreter.TensorHandle(result, z.dtype.scalar)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", create_fma)
        with np.errstate(all="ignore"):  # lanes beyond a span's end divide by zero
            yield
    else:
        yield


def span_of(b: Buffers, count: int, starts=None, hyper=None) -> Span:
    """As Buffers.span, with tensors for addresses."""
    starts = starts if starts is not None else [0] * len(b.all)
    param, grad, *state = (t[s : s + count] for t, s in zip(b.all, starts, strict=True))
    return Span(param, grad, state, b.rule, hyper or hyper_of(CASES[b.rule]))


def triton_step_of(b: Buffers, hyper=None, **scalars: torch.Tensor) -> Buffers:
    """One step over everything."""
    triton_step.step([span_of(b, b.param.numel(), hyper=hyper)], Scalars(**scalars))
    return b


@inside
def test_fused_rounds_once():
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 1 << 32, (3, 4000), dtype=np.uint32)
    x, y, z = bits.view(np.float32)
    # Ties and near-ties: products that cancel against z, or lie half a unit off it.
    x[:2000], y[:2000] = generator.normal(size=(2, 2000))
    z[:1000] = -(x[:1000] * y[:1000])
    z[1000:2000] = x[1000:2000] * y[1000:2000] * np.float32(2) ** generator.integers(22, 28, 1000)
    finite = np.isfinite(x) & np.isfinite(y) & np.isfinite(z)
    got = fused(x, y, z)
    checked = 0
    for a, b, c, result in zip(x[finite], y[finite], z[finite], got[finite], strict=True):
        if not np.isfinite(result) or result == 0:
            continue
        exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
        error = abs(Fraction(float(result)) - exact)
        for other in (np.nextafter(result, np.float32(np.inf)), np.nextafter(result, -np.inf)):
            if np.isfinite(other):
                beside = abs(Fraction(float(other)) - exact)
                tie_to_even = error == beside and result.view(np.uint32) % 2 == 0
                assert error < beside or tie_to_even, (a, b, c, result, other)
        checked += 1
    assert checked > 2000


@inside
def test_rules_are_the_extensions():
    theirs = {name: (states, hypers) for name, (_, states, hypers, _) in ops.RULES.items()}
    assert {n: (r.states, r.hypers) for n, r in triton_step.RULES.items()} == theirs


@inside
@each_rule
@each_pair
def test_counts_and_misalignments(rule, pair):
    """Whole runs, tails and nothing at all; only the span changes, by the compiled loop's bits."""
    buffers, hyper = ops.RULES[rule][1] + 2, hyper_of(CASES[rule])
    gap, place, spans, rows = 5, 3, [], []
    arena = Buffers.random(rule, pair, 4 * RUN + 200)
    got, expected = arena.clone(), arena.clone()
    for k, count in enumerate([0, 1, 2, 7, RUN - 1, RUN, RUN + 1, 19]):
        starts = [place + (k * b) % gap for b in range(buffers)]
        spans.append(span_of(got, count, starts, hyper))
        rows.append(expected.span(count, starts, hyper))
        place += count + 2 * gap
    triton_step.step(spans)
    _hift_ext.step_spans(rows)
    got.assert_equal(expected)
    assert (expected.param != arena.param).sum() > 2 * RUN


def hypers_of(rule: str) -> list[tuple[float, ...]]:
    """The rule's switches: on and off, from both ends of an interpolation, up and down."""
    typical = hyper_of(CASES[rule])
    if rule.startswith("adam"):
        _, decay, _, *rest = typical
        one = (0.0 if not rule.startswith("adamw") else 1.0, decay)
        ends = itertools.product((1.0, -1.0), one, (0.0, 0.1, 0.5, 1 - 1e-9, 0.9, 1.0))
        return [(factor, d, w, *rest) for factor, d, w in ends]
    if rule == "momentum":
        flags = itertools.product((1.0, -1.0), (0.0, 0.1), (0.0, 1.0), (0.0, 1.0))
        return [
            (factor, decay, *typical[2:5], nesterov, first)
            for factor, decay, nesterov, first in flags
        ]
    return [(f, d, *typical[2:]) for f, d in itertools.product((1.0, -1.0), (0.0, 0.1))]


@inside
@each_rule
def test_switches(rule):
    hypers, count = hypers_of(rule), 64
    arena = Buffers.random(rule, PAIRS[0], count * len(hypers))
    got, expected = arena.clone(), arena.clone()
    places = [[count * k] * len(arena.all) for k in range(len(hypers))]
    triton_step.step(
        [span_of(got, count, at, hyper) for at, hyper in zip(places, hypers, strict=True)]
    )
    _hift_ext.step_spans(
        [expected.span(count, at, hyper) for at, hyper in zip(places, hypers, strict=True)]
    )
    got.assert_equal(expected)
    assert (got.param != arena.param).float().mean() > 0.9


@inside
@each_rule
@each_pair
def test_special_values(rule, pair):
    """NaN, infinities, subnormal, tiny and huge values, in every combination."""
    values = [float("nan"), float("inf"), -float("inf"), 3e38, 1e-41, -1e-45, 1e-20, 0.0, -0.0, 1.0]
    buffers = ops.RULES[rule][1] + 2
    grid = torch.tensor(list(itertools.product(values, repeat=min(buffers, 3)))).T.contiguous()
    rows = [grid[b % 3].clone() for b in range(buffers)]
    before = Buffers(rule, rows[0].to(pair[0]), rows[1].to(pair[1]), rows[2:])
    for decay in (0.1, 0.0):  # without decay, weights that are not finite stay out of the gradient
        hyper = hyper_of(CASES[rule], weight_decay=decay)
        expected = on_baseline(before.clone(), hyper=hyper)
        got = triton_step_of(before.clone(), hyper)
        got.assert_equal(expected, payloads=False)
        if pair[0] != torch.float32:  # there is one NaN of 16 bits
            assert torch.equal(got.param.view(torch.int16), expected.param.view(torch.int16))
        finite = torch.stack([t.float().isfinite() for t in expected.all])
        assert finite.any(1).all()
        assert not finite.all(1).any()


@inside
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_every_16_bit_number(dtype):
    """Widened and rounded again; and what lies between two of them, rounded to the even one."""
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    kept = triton_step_of(Buffers("sgd", numbers.clone(), torch.zeros(1 << 16), []), (1.0, 0, 0))
    same = kept.param.view(torch.int16) == numbers.view(torch.int16)
    assert (same | numbers.isnan()).all()
    wide, dropped = numbers.float().view(torch.int32), 16 if dtype == torch.bfloat16 else 13
    half = 1 << dropped - 1
    for offset in (half - 1, half, half + 1):
        between = (wide + offset).view(torch.float32)
        zeros = Buffers("sgd", torch.zeros(1 << 16, dtype=dtype), between, [])
        rounded = triton_step_of(zeros, (1.0, 0.0, -1.0)).param  # 0 + 1 * between
        expected = between.to(dtype)
        zero = expected == 0  # 0 + -0 is 0
        bits = rounded.view(torch.int16) == expected.view(torch.int16)
        assert (bits | zero | expected.isnan()).all()
        assert (rounded.isnan() == expected.isnan()).all()


@inside
@each_rule
def test_scalars(rule):
    """Clip and scale enter the pass as on the CPU; found_inf stops it."""
    before = Buffers.random(rule, PAIRS[0], RUN + 9)
    clip, scale = torch.tensor(0.37), torch.tensor([7.0])
    assert clip / scale != clip * (1 / scale)  # or it would not show how the kernel divides
    found = {None: None, 0.0: torch.zeros(1), 1.0: torch.ones(1), "nan": torch.tensor(np.nan)}
    for use_clip, use_scale, inf in itertools.product((False, True), (False, True), found):
        scalars = {
            "clip": clip if use_clip else None,
            "grad_scale": scale if use_scale else None,
            "found_inf": found[inf],
        }
        addresses = {k: 0 if t is None else t.data_ptr() for k, t in scalars.items()}
        hyper = (-1.0, *hyper_of(CASES[rule])[1:])
        expected = before.clone().step(hyper, **addresses)
        got = triton_step_of(before.clone(), hyper, **scalars)
        got.assert_equal(expected)
        stopped = inf in (1.0, "nan")
        assert torch.equal(got.param, before.param) == stopped


@inside
@each_rule
def test_against_torch(rule):
    case, count, steps = CASES[rule], RUN + 77, 6
    generator = torch.Generator().manual_seed(5)
    start = torch.randn(count, generator=generator)
    theirs = torch.nn.Parameter(start.clone())
    optimizer = case.theirs([theirs], **case.typical, foreach=False)
    fill = case.typical.get("initial_accumulator_value", 0.0)
    state = [torch.full((count,), fill) for _ in range(ops.RULES[rule][1])]
    mine, largest = start.clone(), start.abs().double()
    for visit in range(1, steps + 1):
        grad = torch.randn(count, generator=generator)
        theirs.grad = grad.clone()
        optimizer.step()
        triton_step.step([Span(mine, grad, state, rule, hyper_of(case, visit))])
        largest = torch.maximum(largest, theirs.detach().abs().double())
        error = ulps((mine.double() - theirs.detach().double()).numpy(), largest.numpy())
        assert error.max() <= ULPS["torch, weights"], (visit, error.argmax(), error.max())
    assert (mine != start).all()
    names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "sum", "momentum_buffer")
    streams = [optimizer.state[theirs][n] for n in names if n in optimizer.state[theirs]]
    for got, wanted in zip(state, streams, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)


class Bad:
    """A span of momentum over 8 elements, and one change to it or its scalars."""

    def __init__(self, error, match: str, scalars=None, **changes) -> None:
        self.error, self.match = error, match
        self.scalars, self.changes = scalars or {}, changes


HYPER = (1.0,) * 7
BAD = {
    "rule": Bad(ValueError, "rule 'lion' is not offered; offered are adamw", rule="lion"),
    "param_type": Bad(TypeError, "float64 parameter", param=torch.ones(8).double()),
    "grad_type": Bad(TypeError, "a torch.bfloat16 gradient", grad=torch.ones(8).bfloat16()),
    "states": Bad(ValueError, "takes 1 states, not 2", states=[torch.ones(8)] * 2),
    "state_type": Bad(TypeError, "state 0 is torch.float16", states=[torch.ones(8).half()]),
    "state_count": Bad(ValueError, "state 0 has 9 elements", states=[torch.ones(9)]),
    "grad_count": Bad(ValueError, "gradient has 7 elements", grad=torch.ones(7)),
    "strides": Bad(ValueError, r"gradient has strides \(2,\)", grad=torch.ones(16)[::2]),
    "param_strides": Bad(ValueError, r"parameter has strides", param=torch.ones(16)[::2]),
    "hypers": Bad(ValueError, r"takes 1 \+ 6 numbers, not 6", hyper=HYPER[:6]),
    "device": Bad(ValueError, "gradient is on meta", grad=torch.ones(8, device="meta")),
    "no_gpu": Bad(ValueError, "parameter is on meta", param=torch.ones(8, device="meta")),
    "clip_type": Bad(TypeError, "clip is a torch.float64", {"clip": torch.ones(1).double()}),
    "clip_count": Bad(TypeError, "tensor of 2 elements", {"clip": torch.ones(2)}),
    "inf_device": Bad(ValueError, "found_inf is on", {"found_inf": torch.ones(1, device="meta")}),
}


@inside
@pytest.mark.parametrize("name", BAD)
def test_bad_spans_change_nothing(name):
    good = Buffers.random("momentum", PAIRS[0], 8)
    bad, before = BAD[name], good.clone()
    spans = [span_of(good, 8, hyper=HYPER), span_of(good, 8, hyper=HYPER)._replace(**bad.changes)]
    with pytest.raises(bad.error, match=bad.match):
        triton_step.step(spans, Scalars(**bad.scalars))
    good.assert_equal(before)
    triton_step.step(spans[:1])
    assert not torch.equal(good.param, before.param)


def outside(test):
    """The reverse."""
    return None if INTERPRETED else test


@outside
@pytest.mark.needs("triton")
def test_under_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    assert " passed" in done.stdout
