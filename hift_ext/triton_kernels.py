# SPDX-License-Identifier: Apache-2.0
"""The update in Triton: one loop, and every rule a function that is compiled into it.

How numbers are kept is compiled into it too: `weights` is a number of core/span.h's Weights.
"""

# What the compiler types itself.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from hift_ext.triton_precision import (
    decode,
    encode,
    joined,
    low_of,
    lower,
    narrowed,
    scale_of,
    settled,
    shares_per,
    state_random,
    stochastic_bits,
    widened,
)


@triton.jit
def _opened(stored, master, at, mask, weights: tl.constexpr):
    """Weights as the rule takes them."""
    if weights == 3:
        return joined(stored, tl.load(master + at, mask=mask))
    elif weights == 2:
        whole = tl.load(master + at, mask=mask)
        # A weight that is not its master's rounding was set by somebody else, and is what counts.
        rounded = narrowed(whole, stored.dtype).to(tl.int16, bitcast=True)
        return tl.where(rounded == stored.to(tl.int16, bitcast=True), whole, widened(stored))
    else:
        return widened(stored)


@triton.jit
def _close(p, param, master, at, mask, key, element, weights: tl.constexpr):
    """Keeps weights, and what is beside them."""
    dtype: tl.constexpr = param.dtype.element_ty
    if weights == 1:
        bits = stochastic_bits(p, state_random(key, -1, element))
        tl.store(param + at, lower(bits, dtype), mask=mask)
    else:
        if weights >= 2 and dtype == tl.bfloat16:
            p = settled(p)
        weight = narrowed(p, dtype)
        tl.store(param + at, weight, mask=mask)
        if weights == 2:
            tl.store(master + at, p, mask=mask)
        elif weights == 3:
            tl.store(master + at, low_of(p, weight), mask=mask)


@triton.jit
def _key_of(keys, first, element):
    # The second key holds where an element's number, without its upper half, has begun anew.
    low, high, next_low, next_high = keys
    return tl.where(element < first, next_low, low), tl.where(element < first, next_high, high)


@triton.jit
def _update(
    param,
    grad,
    state,
    scale,
    master,
    hyper,
    grad_factor,
    keys,
    first,
    begin,
    lane,
    mask,
    rule: tl.constexpr,
    weights: tl.constexpr,
    random_state: tl.constexpr,
):
    # A program's place is added to the addresses: 64-bit sums for every lane would take registers.
    param = param + begin
    if weights >= 2:
        master = master + begin
    p = _opened(tl.load(param + lane, mask=mask), master, lane, mask, weights)
    g = widened(tl.load(grad + begin + lane, mask=mask)) * grad_factor
    values = ()
    for k in tl.static_range(len(state)):
        value = widened(tl.load(state[k] + begin + lane, mask=mask))
        values = values + (value,)  # type: ignore[assignment]  # noqa: RUF005
    p, values = rule(p, g, values, hyper)
    element = lane.to(tl.uint32) + (begin.to(tl.uint32) + first)
    key = _key_of(keys, first, element)
    _close(p, param, master, lane, mask, key, element, weights)
    for k in tl.static_range(len(state)):
        if random_state:
            bits = stochastic_bits(values[k], state_random(key, k, element))
            tl.store(state[k] + begin + lane, lower(bits, tl.bfloat16), mask=mask)
        else:
            kept = narrowed(values[k], state[k].dtype.element_ty)
            tl.store(state[k] + begin + lane, kept, mask=mask)


@triton.jit
def _update_blocks(
    param,
    grad,
    state,
    scale,
    master,
    hyper,
    grad_factor,
    keys,
    first,
    begin,
    count,
    masked: tl.constexpr,
    rule: tl.constexpr,
    signed: tl.constexpr,
    run: tl.constexpr,
    weights: tl.constexpr,
    random_state: tl.constexpr,
):
    blocks: tl.constexpr = run // 256
    block, k, w = tl.arange(0, blocks), tl.arange(0, 4), tl.arange(0, 64)
    lane = block[:, None, None] * 256 + k[None, :, None] * 64 + w[None, None, :]
    shift = (k * 8).to(tl.uint32)[None, :, None]
    word, place = begin // 4 + block[:, None] * 64 + w[None, :], begin // 256 + block
    inside = lane < count
    if masked:
        mask, words_mask, place_mask = (
            inside,
            block[:, None] * 256 + w[None, :] * 0 < count,
            block * 256 < count,
        )
    else:
        mask, words_mask, place_mask = None, None, None
    at = begin + lane
    p = _opened(tl.load(param + at, mask=mask), master, at, mask, weights)
    g = widened(tl.load(grad + at, mask=mask)) * grad_factor
    values = ()
    for s in tl.static_range(len(state)):
        words = tl.load(state[s] + word, mask=words_mask).to(tl.uint32, bitcast=True)
        code = (words[:, None, :] >> shift) & 0xFF
        share = decode(code, signed[s])
        value = share * tl.load(scale[s] + place, mask=place_mask)[:, None, None]
        values = values + (value,)  # type: ignore[assignment]  # noqa: RUF005
    p, values = rule(p, g, values, hyper)
    # All of a block has the key of its first element, as on the host.
    place_of = (block * 256).to(tl.uint32) + (begin.to(tl.uint32) + first)
    key = _key_of(keys, first, place_of[:, None, None])
    element = (lane % 256).to(tl.uint32) + place_of[:, None, None]
    _close(p, param, master, at, mask, key, element, weights)
    for s in tl.static_range(len(state)):
        value = values[s]
        if masked:
            value = tl.where(inside, value, 0.0)  # what is kept behind a parameter's end
        magnitude = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        new_scale = scale_of(tl.max(tl.max(magnitude, axis=2), axis=1))
        share = value * shares_per(new_scale)[:, None, None]
        added = 0x80000
        if random_state:
            added = (state_random(key, s, element) << 4).to(tl.int32)
        words = tl.sum(encode(share, added, signed[s]) << shift, axis=1)
        tl.store(state[s] + word, words.to(tl.int32, bitcast=True), mask=words_mask)
        tl.store(scale[s] + place, new_scale, mask=place_mask)


@triton.jit(
    do_not_specialize=["count", "key_low", "key_high", "next_low", "next_high", "first"],
    do_not_specialize_on_alignment=["grad_scale", "clip", "found_inf"],
)
def update_span(
    param,
    grad,
    state,
    scale,
    master,
    hyper,
    grad_factor,
    grad_scale,
    clip,
    found_inf,
    count: tl.int64,
    key_low: tl.uint32,
    key_high: tl.uint32,
    next_low: tl.uint32,
    next_high: tl.uint32,
    first: tl.uint32,
    rule: tl.constexpr,
    run: tl.constexpr,
    width: tl.constexpr,
    signed: tl.constexpr,
    weights: tl.constexpr,
    random_state: tl.constexpr,
):
    """A program updates `run` elements; see triton_step.launch for the arguments."""
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
    left = count - begin
    # The interpreter takes large arguments for wider than they are said to be.
    keys = (
        key_low.to(tl.uint32),
        key_high.to(tl.uint32),
        next_low.to(tl.uint32),
        next_high.to(tl.uint32),
    )
    first = first.to(tl.uint32)
    # A whole run has no mask: its accesses are as wide as the addresses allow, whatever the length
    # of the span, and one compiled kernel serves all lengths.
    whole = left >= run
    if len(scale) > 0:
        some = tl.minimum(left, run).to(tl.int32)
        if whole:
            _update_blocks(
                param, grad, state, scale, master, hyper, factor, keys, first, begin, some,
                False, rule, signed, run, weights, random_state,
            )  # fmt: skip
        else:
            _update_blocks(
                param, grad, state, scale, master, hyper, factor, keys, first, begin, some,
                True, rule, signed, run, weights, random_state,
            )  # fmt: skip
    else:
        # Every access of a warp is one unbroken run: as wide a one of each stream as 16 bytes of
        # the widest type are elements. Else Triton would give a thread 8 neighbours of a 16-bit
        # stream, and move the others between threads to match.
        lane = tl.max_contiguous(tl.arange(0, run), width)
        if whole:
            _update(
                param, grad, state, scale, master, hyper, factor, keys, first, begin, lane,
                None, rule, weights, random_state,
            )  # fmt: skip
        else:
            mask = lane < left.to(tl.int32)
            _update(
                param, grad, state, scale, master, hyper, factor, keys, first, begin, lane,
                mask, rule, weights, random_state,
            )  # fmt: skip
