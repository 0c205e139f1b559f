# SPDX-License-Identifier: Apache-2.0
# 16-bit floats: every pattern read, every rounding boundary written, against torch's conversions to
# the bit. Rules reach them: a first momentum is the gradient, and sgd at rate -1 adds it.

from __future__ import annotations

import pytest
import torch
from spans import BITS, Buffers

pytestmark = pytest.mark.usefixtures("isa")

each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])

FIRST_MOMENTUM = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0)  # factor 1, no decay, rate 0, ..., first
ADD_GRADIENT = (1.0, 0.0, -1.0)


def every_pattern(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def from_bits(bits: torch.Tensor) -> torch.Tensor:
    """Floats of the patterns in an int64 tensor, modulo 2^32."""
    bits = bits.remainder(2**32)
    return torch.where(bits < 2**31, bits, bits - 2**32).to(torch.int32).view(torch.float32)


def bits_of(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int32).to(torch.int64).remainder(2**32)


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bits; a NaN for a NaN, with whatever payload."""
    bits = BITS[got.element_size()]
    same = (got.view(bits) == expected.view(bits)) | (got.isnan() & expected.isnan())
    where = (~same).nonzero().flatten().tolist()
    assert not where, f"{len(where)} differ, first {got[where[0]]!r}, not {expected[where[0]]!r}"


@each_dtype
def test_every_pattern_is_read(dtype):
    grad = every_pattern(dtype)
    buffer = torch.full(grad.shape, 7.0)
    Buffers("momentum", torch.zeros_like(grad), grad, [buffer]).step(hyper=FIRST_MOMENTUM)
    assert_same(buffer, grad.float())


@each_dtype
def test_every_pattern_comes_back(dtype):
    """Read as a weight, unchanged by a rate of 0, and written."""
    weights = every_pattern(dtype)
    before = weights.clone()
    Buffers("sgd", weights, torch.zeros(weights.shape), []).step(hyper=(1.0, 0.0, 0.0))
    assert_same(weights, before)


def boundaries(dtype: torch.dtype) -> torch.Tensor:
    """Every value of `dtype`, the middles between neighbours, and the floats around all of them."""
    values = every_pattern(dtype)
    values = values[values.isfinite()].float().double().unique()
    step = values.diff()
    middles = torch.cat([values[:-1] + step / 2, values[-1:] + step[-1:] / 2])  # the last: overflow
    exact = torch.cat([values, middles, -middles[-1:]]).float()
    bits = bits_of(exact)
    return torch.cat([from_bits(bits + d) for d in (-1, 0, 1)])


@each_dtype
def test_every_rounding_boundary_is_written(dtype):
    everywhere = from_bits(torch.arange(0, 2**32, 9973))  # signs, exponents, infinities and NaN
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 3.4e38, -1e-45])
    grad = torch.cat([boundaries(dtype), everywhere, special])
    weights = torch.full(grad.shape, -0.0, dtype=dtype)  # x + -0 is x for every x
    Buffers("sgd", weights, grad, []).step(hyper=ADD_GRADIENT)
    assert_same(weights, grad.to(dtype))
    assert len(grad) > 500_000
