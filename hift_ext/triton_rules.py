# SPDX-License-Identifier: Apache-2.0
"""Every rule's arithmetic in Triton: csrc/rules', operation by operation.

The one second copy of it; a test holds it to the other's bits.
"""

# What the compiler types itself.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


@triton.jit
def _lerp(start, end, weight):
    near_start = weight < 0.5
    coefficient = tl.where(near_start, weight, weight - 1.0)
    return tl.fma(coefficient, end - start, tl.where(near_start, start, end))


@triton.jit
def _with_l2(grad, param, weight_decay):
    return tl.where(weight_decay != 0.0, tl.fma(weight_decay, param, grad), grad)


@triton.jit
def _adam_moments(p, g, exp_avg, exp_avg_sq, hyper, decoupled: tl.constexpr):
    decay, one_minus_beta1, beta2, one_minus_beta2, _, _, _ = hyper
    if decoupled:
        p = p * decay
    else:
        g = _with_l2(g, p, decay)
    exp_avg = _lerp(exp_avg, g, one_minus_beta1)
    exp_avg_sq = tl.fma(one_minus_beta2 * g, g, beta2 * exp_avg_sq)
    return p, exp_avg, exp_avg_sq


@triton.jit
def _adam_apply(p, exp_avg, second_moment, hyper):
    _, _, _, _, step_size, inv_bc2_sqrt, eps = hyper
    denominator = tl.fma(tl.sqrt_rn(second_moment), inv_bc2_sqrt, eps)
    return p - tl.div_rn(step_size * exp_avg, denominator)


@triton.jit
def _adam(p, g, state, hyper, decoupled: tl.constexpr):
    p, exp_avg, exp_avg_sq = _adam_moments(p, g, state[0], state[1], hyper, decoupled)
    return _adam_apply(p, exp_avg, exp_avg_sq, hyper), (exp_avg, exp_avg_sq)


@triton.jit
def _amsgrad(p, g, state, hyper, decoupled: tl.constexpr):
    p, exp_avg, exp_avg_sq = _adam_moments(p, g, state[0], state[1], hyper, decoupled)
    largest = tl.where(state[2] > exp_avg_sq, state[2], exp_avg_sq)
    return _adam_apply(p, exp_avg, largest, hyper), (exp_avg, exp_avg_sq, largest)


@triton.jit
def _adamw_rule(p, g, state, hyper):
    return _adam(p, g, state, hyper, True)


@triton.jit
def _adamw_amsgrad_rule(p, g, state, hyper):
    return _amsgrad(p, g, state, hyper, True)


@triton.jit
def _adam_rule(p, g, state, hyper):
    return _adam(p, g, state, hyper, False)


@triton.jit
def _adam_amsgrad_rule(p, g, state, hyper):
    return _amsgrad(p, g, state, hyper, False)


@triton.jit
def _adagrad_rule(p, g, state, hyper):
    weight_decay, rate, eps = hyper
    g = _with_l2(g, p, weight_decay)
    total = tl.fma(g, g, state[0])
    return p - tl.div_rn(rate * g, tl.sqrt_rn(total) + eps), (total,)


@triton.jit
def _against(rate, direction, p):
    return tl.fma(rate, direction * -1.0, p)  # Triton's -x is 0 - x, which is never -0


@triton.jit
def _sgd_rule(p, g, state, hyper):
    weight_decay, rate = hyper
    return _against(rate, _with_l2(g, p, weight_decay), p), state


@triton.jit
def _momentum_rule(p, g, state, hyper):
    weight_decay, rate, momentum, one_minus_dampening, nesterov, first = hyper
    g = _with_l2(g, p, weight_decay)
    buffer = tl.where(first != 0.0, g, tl.fma(one_minus_dampening, g, momentum * state[0]))
    ahead = tl.where(nesterov != 0.0, tl.fma(momentum, buffer, g), buffer)
    return _against(rate, ahead, p), (buffer,)


class Rule(NamedTuple):
    """A rule's function `(p, g, state, hyper) -> (p, state)` and the sizes of its tuples.

    `signed`: for each state whether its 8-bit codes need a sign; None: it is not kept in codes.
    """

    update: Any
    states: int
    hypers: int
    signed: tuple[bool, ...] | None = None


RULES = {
    "adamw": Rule(_adamw_rule, 2, 7, (True, False)),
    "adamw_amsgrad": Rule(_adamw_amsgrad_rule, 3, 7, (True, False, False)),
    "adam": Rule(_adam_rule, 2, 7, (True, False)),
    "adam_amsgrad": Rule(_adam_amsgrad_rule, 3, 7, (True, False, False)),
    "adagrad": Rule(_adagrad_rule, 1, 3),
    "sgd": Rule(_sgd_rule, 0, 2),
    "momentum": Rule(_momentum_rule, 1, 6, (True,)),
}
"""csrc/rules/all.h, by name."""
