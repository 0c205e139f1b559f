# SPDX-License-Identifier: Apache-2.0
"""Numbers kept in fewer bits than they are computed in, in Triton: csrc/core/precision.h again.

In integers, so that a GPU and Triton's interpreter have the same bits. A 16-bit value is often held
in the upper half of a word, where a bfloat16 is a float's bits too.
"""

# What the compiler types itself.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = 256
"""Elements that share a scale."""

WORDS = 64
"""Words of a block's codes; word w holds those of elements w, w + 64, w + 128 and w + 192."""


@triton.jit
def bits_of(x):
    """A float's bits."""
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def float_of(bits):
    """The reverse."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def upper(x):
    """A 16-bit value in the upper half of a word."""
    return x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16


@triton.jit
def lower(bits, dtype: tl.constexpr):
    """The reverse."""
    return (bits >> 16).to(tl.uint16).to(dtype, bitcast=True)


@triton.jit
def widened(x):
    """Any of the three types as float32."""
    if x.dtype == tl.bfloat16:
        return float_of(upper(x))
    else:
        return x.to(tl.float32)


@triton.jit
def nearest_bits(x):
    """A bfloat16 in the upper half: to nearest, ties to even; NaN becomes the one torch stores."""
    bits = bits_of(x)
    return tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)


@triton.jit
def narrowed(x, dtype: tl.constexpr):
    """A float32 in one of the three types."""
    if dtype == tl.bfloat16:
        return lower(nearest_bits(x), tl.bfloat16)
    elif dtype == tl.float16:
        bits = x.to(tl.float16).to(tl.int16, bitcast=True)
        return tl.where(x == x, bits, 0x7E00).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        return x


@triton.jit
def settled(master):
    """A master that its weight and a remainder of 16 bits make up."""
    bits = bits_of(master)
    return float_of(bits - ((bits & 0x1FFFF) == 0x8000).to(tl.uint32))


@triton.jit
def joined(weight, low):
    """The master of a bfloat16 weight and its int16 remainder."""
    remainder = low.to(tl.int32).to(tl.uint32, bitcast=True)
    return float_of(upper(weight) + remainder)


@triton.jit
def low_of(master, weight):
    """What the rounded master lacks, as int16."""
    lacks = bits_of(master) - upper(weight)
    return tl.where(master == master, lacks, 0).to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit
def random_bits(key, number: tl.constexpr, element):
    """32 random bits for an element; `key`: the lower and the upper half of its parameter's."""
    low, high = key
    x = element ^ low
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = x ^ (high + number * 0x9E3779B9)
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def state_random(key, state: tl.constexpr, element):
    """Draw 0 is the weight's and state 0's, draw 1 that of the states after: 16 bits each."""
    bits = random_bits(key, (state + 1) // 2, element)
    if state % 2 == 0:
        bits = bits >> 16
    return bits & 0xFFFF


@triton.jit
def stochastic_bits(x, random):
    """A bfloat16 in the upper half, rounded at random."""
    return tl.where(x == x, bits_of(x) + (random & 0xFFFF), 0x7FC00000)


@triton.jit
def decode(code, signed: tl.constexpr):
    """A code's share of its scale."""
    if signed:
        magnitude = code & 0x7F
        share = tl.where(magnitude != 0, (magnitude << 20) + (112 << 23), 0)
        return float_of((share | ((code & 0x80) << 24)).to(tl.uint32))
    else:
        return float_of(tl.where(code != 0, (code << 20) + (96 << 23), 0).to(tl.uint32))


@triton.jit
def encode(share, added, signed: tl.constexpr):
    """The code of a share; `added` decides which of the two around it: 0x80000 the nearer one."""
    bits = bits_of(share)
    magnitude = (bits & 0x7FFFFFFF).to(tl.int32)
    most = tl.minimum(magnitude, 0x3F800000)
    bias: tl.constexpr = (112 << 23) if signed else (96 << 23)
    above = most + added - bias
    code = (tl.maximum(above, 0) >> 20).to(tl.uint32)
    if signed:
        code = code | ((bits >> 24) & 0x80)
    return code


@triton.jit
def scale_of(largest):
    """The scale of a block from the bits of its largest magnitude."""
    scale = float_of(largest.to(tl.uint32))
    return tl.where(scale < 8.077935669463161e-28, 0.0, scale)  # 2^-90


@triton.jit
def shares_per(scale):
    """What magnitudes are multiplied by to become shares."""
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    inverse = tl.where(scale * inverse < 1.0, float_of(bits_of(inverse) + 1), inverse)
    return tl.where(scale == 0.0, 0.0, inverse)


_MASK = (1 << 64) - 1


def _spread(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def block_key(key: int, block: int) -> int:
    """The key of elements [block * 2^32, (block + 1) * 2^32) of a parameter's visit `key`."""
    return key if block == 0 else _spread((key + block) & _MASK)
