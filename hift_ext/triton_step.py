# SPDX-License-Identifier: Apache-2.0
"""The update in Triton: one loop, and every rule a function that is compiled into it.

The arithmetic is csrc/rules', operation by operation, and so are the bits (NaNs in the state
excepted). It needs no compiler on the user's machine but Triton's own.
"""

# What the compiler types itself.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from array import array
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
    raise ImportError(
        f"Triton {triton.__version__} flushes subnormal numbers in divisions and roots, so its "
        "updates differ from the other backends': use Triton 3.6 or later (torch 2.10 has it)"
    )

RUN = 1024
"""Elements of a program: 8 a thread, so that two 16-byte accesses of every stream are in flight."""

WARPS = 4


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
    """A rule's function `(p, g, state, hyper) -> (p, state)` and the sizes of its tuples."""

    update: Any
    states: int
    hypers: int


RULES = {
    "adamw": Rule(_adamw_rule, 2, 7),
    "adamw_amsgrad": Rule(_adamw_amsgrad_rule, 3, 7),
    "adam": Rule(_adam_rule, 2, 7),
    "adam_amsgrad": Rule(_adam_amsgrad_rule, 3, 7),
    "adagrad": Rule(_adagrad_rule, 1, 3),
    "sgd": Rule(_sgd_rule, 0, 2),
    "momentum": Rule(_momentum_rule, 1, 6),
}
"""csrc/rules/all.h, by name."""


@triton.jit
def _widened(x):
    # In integers, as core/dtype.h has it: exact on a GPU and in Triton's interpreter.
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def _narrowed(x, dtype: tl.constexpr):
    # To nearest, ties to even; every NaN becomes the one that torch stores.
    if dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        number = tl.where(x == x, rounded, 0x7FC00000) >> 16
        return number.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    elif dtype == tl.float16:
        bits = x.to(tl.float16).to(tl.int16, bitcast=True)
        return tl.where(x == x, bits, 0x7E00).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        return x


@triton.jit
def _update(param, grad, state, hyper, grad_factor, begin, lane, mask, rule: tl.constexpr):
    p = _widened(tl.load(param + begin + lane, mask=mask))
    g = _widened(tl.load(grad + begin + lane, mask=mask)) * grad_factor
    values = ()
    for k in tl.static_range(len(state)):
        value = tl.load(state[k] + begin + lane, mask=mask)
        values = values + (value,)  # type: ignore[assignment]  # noqa: RUF005
    p, values = rule(p, g, values, hyper)
    tl.store(param + begin + lane, _narrowed(p, param.dtype.element_ty), mask=mask)
    for k in tl.static_range(len(state)):
        tl.store(state[k] + begin + lane, values[k], mask=mask)


@triton.jit(
    do_not_specialize=["count"],
    do_not_specialize_on_alignment=["grad_scale", "clip", "found_inf"],
)
def _update_span(
    param,
    grad,
    state,
    hyper,
    grad_factor,
    grad_scale,
    clip,
    found_inf,
    count: tl.int64,
    rule: tl.constexpr,
    run: tl.constexpr,
    width: tl.constexpr,
):
    if found_inf is not None:  # noqa: SIM102 (the load must not be compiled without it)
        if tl.load(found_inf) != 0.0:
            return
    factor = 1.0
    if clip is not None:
        factor = tl.load(clip)
    if grad_scale is not None:
        factor = tl.div_rn(factor, tl.load(grad_scale))
    factor = factor * grad_factor

    # 64-bit, so that no span is too long; the lanes of a program stay 32-bit.
    begin = tl.program_id(0).to(tl.int64) * run
    # Every access of a warp is one unbroken run: as wide a one of each stream as 16 bytes of the
    # widest type are elements. Else Triton would give a thread 8 neighbours of a 16-bit stream, and
    # move the others between threads to match.
    lane = tl.max_contiguous(tl.arange(0, run), width)
    left = count - begin
    # A whole run has no mask: its accesses are as wide as the addresses allow, whatever the length
    # of the span, and one compiled kernel serves all lengths.
    if left >= run:
        _update(param, grad, state, hyper, factor, begin, lane, None, rule)
    else:
        mask = lane < left.to(tl.int32)
        _update(param, grad, state, hyper, factor, begin, lane, mask, rule)


INTERPRETED = not isinstance(_update_span, triton.JITFunction)
"""Whether TRITON_INTERPRET=1 was set at import: kernels then run on the host, on host memory."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Span(NamedTuple):
    """Elements of one parameter with what one rule needs to update them.

    Attributes:
        param: Weights, float32, bfloat16 or float16; contiguous; changed in place.
        grad: Their gradient, of their type or float32, contiguous, with as many elements.
        states: The rule's state in its order, float32, contiguous, with as many elements each;
            changed in place.
        rule: A name in RULES.
        hyper: The gradient's factor (1, or -1 to maximize), then the rule's hyper-parameters in
            the order of its C++ struct.
    """

    param: torch.Tensor
    grad: torch.Tensor
    states: Sequence[torch.Tensor]
    rule: str
    hyper: Sequence[float]


class Scalars(NamedTuple):
    """Scalars that enter the pass by address: float32 tensors of one element, or None.

    Attributes:
        grad_scale: Gradients are divided by it.
        clip: Gradients are multiplied by it.
        found_inf: Anything but 0: the step changes nothing.
    """

    grad_scale: torch.Tensor | None = None
    clip: torch.Tensor | None = None
    found_inf: torch.Tensor | None = None


def step(spans: Sequence[Span], scalars: Scalars | None = None) -> None:
    """Updates all spans in place, on torch's current stream of their device; returns at once.

    A launch per span: in a table of spans, as the CUDA kernel has it, Triton would not see which
    addresses are aligned, and 16-byte accesses would be lost. The host prepares a launch while the
    GPU works on the spans before it.

    Args:
        spans: On one CUDA device, or on the CPU under Triton's interpreter.
        scalars: On the spans' device.

    Raises:
        ValueError: A rule, a number of states or hyper-parameters, a size, a device or a layout
            does not fit. Nothing has been changed then.
        TypeError: A type is not offered. Nothing has been changed then.
    """
    scalars = scalars or Scalars()
    for span in spans:
        _check(span, scalars)
    for span in spans:
        if span.param.numel():
            launch(span, scalars)


def launch(span: Span, scalars: Scalars, *, compile_only: bool = False) -> Any:
    """Launches the kernel for one span that has elements; no checks.

    Args:
        span: What to update.
        scalars: What scales it.
        compile_only: Stop where the launch would follow, with the kernel that it would run.

    Returns:
        Triton's compiled kernel; None under the interpreter.
    """
    # Rounded here as the launch would round them: the interpreter keeps Python's floats.
    grad_factor, *hyper = array("f", span.hyper)
    rule = RULES[span.rule]
    arguments = (
        span.param,
        span.grad,
        tuple(span.states),
        tuple(hyper),
        grad_factor,
        *scalars,
        span.param.numel(),
        rule.update,
        RUN,
        16 // max(t.element_size() for t in (span.param, span.grad, *span.states)),
    )
    # Without fusion every fma of the kernel is one that the rule asks for, as on the CPU.
    options = {"num_warps": WARPS, "enable_fp_fusion": False}
    grid = (triton.cdiv(span.param.numel(), RUN),)
    device = span.param.device
    # Triton launches on the current device, which need not be the parameters'.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        if compile_only:
            return _update_span.warmup(*arguments, grid=grid, **options)
        return _update_span[grid](*arguments, **options)


def tensor_at(address: int, count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A flat tensor of `count` elements over memory that somebody else owns and keeps."""
    storage = torch._C._construct_storage_from_data_pointer(address, device, count * dtype.itemsize)
    return torch.empty(0, dtype=dtype, device=device).set_(storage, 0, (count,), (1,))


def _check(span: Span, scalars: Scalars) -> None:
    param, grad = span.param, span.grad
    if span.rule not in RULES:
        raise ValueError(f"rule {span.rule!r} is not offered; offered are {', '.join(RULES)}")
    rule = RULES[span.rule]
    if param.dtype not in _DTYPES or grad.dtype not in (param.dtype, torch.float32):
        raise TypeError(
            f"a {param.dtype} parameter with a {grad.dtype} gradient is not offered; offered are "
            "float32, bfloat16 and float16 parameters with gradients of their own type or float32"
        )
    if len(span.states) != rule.states:
        raise ValueError(
            f"rule {span.rule} takes {rule.states} states, not {len(span.states)}: pass them in "
            "the rule's order"
        )
    if len(span.hyper) != 1 + rule.hypers:
        raise ValueError(
            f"rule {span.rule} takes 1 + {rule.hypers} numbers, not {len(span.hyper)}: the "
            "gradient's factor, then the rule's hyper-parameters"
        )
    if not (param.device.type == "cuda" or (INTERPRETED and param.device.type == "cpu")):
        raise ValueError(
            f"the parameter is on {param.device}: Triton updates tensors on CUDA devices; set "
            "TRITON_INTERPRET=1 before the first import to run its interpreter on the CPU"
        )
    tensors = {"gradient": grad, **{f"state {i}": state for i, state in enumerate(span.states)}}
    for name, tensor in tensors.items():
        if tensor.numel() != param.numel():
            raise ValueError(
                f"the {name} has {tensor.numel()} elements and the parameter {param.numel()}: "
                "they must be as many"
            )
        if name != "gradient" and tensor.dtype != torch.float32:
            raise TypeError(f"the {name} is {tensor.dtype}: state is float32")
    tensors["parameter"] = param
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(
                f"the {name} has strides {tuple(tensor.stride())} at shape {tuple(tensor.shape)}: "
                "pass contiguous tensors"
            )
    for name, scalar in zip(scalars._fields, scalars, strict=True):
        if scalar is None:
            continue
        if scalar.dtype != torch.float32 or scalar.numel() != 1:
            raise TypeError(
                f"{name} is a {scalar.dtype} tensor of {scalar.numel()} elements: pass one float32"
            )
        tensors[name] = scalar
    for name, tensor in tensors.items():
        if tensor.device != param.device:
            raise ValueError(
                f"the {name} is on {tensor.device} and the parameter on {param.device}: keep them "
                "on one device"
            )
