# SPDX-License-Identifier: Apache-2.0
"""The norm of a group's gradients in Triton, added up in the order of csrc/core/norm.h.

A program of one warp takes a block, with the layout of the CUDA kernel: a lane holds four columns.
"""

# What the compiler types itself.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl

from hift_ext.triton_precision import widened

OPTIONS = {"num_warps": 1, "enable_fp_fusion": False}
BLOCK = 4096
COLUMNS = 128
TOGETHER = 32
"""Sums that are fetched at once, so that their additions wait for memory once."""


@triton.jit
def _halved(column, size: tl.constexpr):
    # A sum of two: its order does not matter.
    return tl.sum(tl.reshape(column, (2, size)), axis=0)


@triton.jit
def _add_row(column, values):
    wide = widened(values).to(tl.float64)
    return tl.fma(wide, wide, column)  # the product is exact: fused or not, the same bits


@triton.jit(do_not_specialize=["count"])
def _square_sums(grad, sums, count: tl.int64, block: tl.constexpr, columns: tl.constexpr):
    begin = tl.program_id(0).to(tl.int64) * block
    lane = tl.max_contiguous(tl.arange(0, columns), 4)
    column = tl.zeros((columns,), tl.float64)
    left = count - begin
    if left >= block:
        for row in tl.static_range(block // columns):
            column = _add_row(column, tl.load(grad + begin + row * columns + lane))
    else:
        for row in range(tl.cdiv(left, columns)):
            at = row * columns + lane
            column = _add_row(column, tl.load(grad + begin + at, mask=at < left, other=0.0))
    column = _halved(column, 64)
    column = _halved(column, 32)
    column = _halved(column, 16)
    column = _halved(column, 8)
    column = _halved(column, 4)
    column = _halved(column, 2)
    tl.store(sums + tl.program_id(0), tl.sum(column, axis=0))


@triton.jit(do_not_specialize=["count"])
def _add_up(sums, count: tl.int64, total, together: tl.constexpr):
    total_sum = tl.full((), 0.0, tl.float64)
    whole = count // together * together
    for begin in range(0, whole, together):
        for k in tl.static_range(together):
            total_sum += tl.load(sums + begin + k)
    for i in range(whole, count):
        total_sum += tl.load(sums + i)
    tl.store(total, total_sum)


def _run(kernel: Any, programs: int, device: torch.device, compile_only: bool, *arguments) -> Any:
    # Triton launches on the current device, which need not be the gradients'.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        if compile_only:
            return kernel.warmup(*arguments, grid=(programs,), **OPTIONS)
        return kernel[(programs,)](*arguments, **OPTIONS)


def blocks_of(count: int) -> int:
    """Blocks of a gradient of `count` elements."""
    return -(-count // BLOCK)


def square_sums(grad: torch.Tensor, sums: torch.Tensor, *, compile_only: bool = False) -> Any:
    """Writes the sum of the squares of each of a gradient's blocks.

    Args:
        grad: Flat and contiguous, not empty; float32, bfloat16 or float16.
        sums: One float64 a block, on the gradient's device.
        compile_only: Stop where the launch would follow, with the kernel that it would run.
    """
    arguments = grad, sums, grad.numel(), BLOCK, COLUMNS
    return _run(_square_sums, blocks_of(grad.numel()), grad.device, compile_only, *arguments)


def add_up(sums: torch.Tensor, total: torch.Tensor, *, compile_only: bool = False) -> Any:
    """Adds float64 `sums` to one float64, one by one in their order."""
    arguments = sums, sums.numel(), total, TOGETHER
    return _run(_add_up, 1, sums.device, compile_only, *arguments)


def sum_of_squares(gradients: Sequence[torch.Tensor], total: torch.Tensor) -> None:
    """Writes the sum of all gradients' squares to `total`, one float64; returns at once.

    Args:
        gradients: Flat and contiguous; float32, bfloat16 or float16; on one CUDA device, or on the
            CPU under Triton's interpreter.
        total: On that device.
    """
    full = [grad for grad in gradients if grad.numel()]
    counts = [blocks_of(grad.numel()) for grad in full]
    sums = torch.empty(sum(counts), dtype=torch.float64, device=total.device)
    for grad, part in zip(full, sums.split(counts), strict=True):
        square_sums(grad, part)
    add_up(sums, total)


def write_clip(
    total: torch.Tensor, limit: float, scale: torch.Tensor | None, result: torch.Tensor
) -> None:
    """Writes the norm and its coefficient to `result`, two float32 on the device of `total`."""
    norm = total.sqrt()
    if scale is not None:
        norm = norm / scale.double()
    single = torch.tensor(limit, dtype=torch.float32).item()  # as the other backends have it
    result[0] = norm
    result[1] = (single / (norm + 1e-6)).clamp(max=1.0)
