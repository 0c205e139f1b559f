# SPDX-License-Identifier: Apache-2.0
"""State beside the parameters, updated by Triton: what a GPU gets without this build's kernels.

Apart from ops.py, since it imports triton, which takes half a second.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from hift_ext import triton_norm, triton_step
from hift_ext.engines import ResidentEngine
from hift_ext.ops import DTYPE_CODES, RULES, Draw, Hypers, Report, Row, Scalars

_RULES = {number: (name, states) for name, (number, states, *_) in RULES.items()}
_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}


class TritonEngine(ResidentEngine):
    """State in tensors on the parameters' own device; nothing moves."""

    def _at(self, address: int, count: int, code: int) -> torch.Tensor:
        return triton_step.tensor_at(address, count, _DTYPES[code], self._device)

    def step(
        self,
        group: int,
        rows: Sequence[Row],
        hypers: Hypers,
        scalars: Scalars,
        following: int,
        done: list[bool],
        draws: Sequence[Draw] = (),
    ) -> Report:
        """Updates `group`, a launch per parameter, on torch's current stream."""
        at = self._at
        start = time.perf_counter()
        spans = []
        for item, param, grad, kind, hyper in rows:
            rule, states = _RULES[kind & 0xFF]
            count = self._counts[group][item]
            p, g = at(param, count, kind >> 8 & 0xF), at(grad, count, kind >> 12 & 0xF)
            state = self._state(group, item)[:states]
            spans.append(triton_step.Span(p, g, state, rule, hypers[hyper]))
        tensors = (at(address, 1, 0) if address else None for address in scalars)
        triton_step.step(spans, triton_step.Scalars(*tensors))
        done.append(True)
        elapsed = 1e3 * (time.perf_counter() - start)
        return Report(update_ms=elapsed, step_ms=elapsed)

    def sum_of_squares(
        self, rows: Sequence[Row], counts: Sequence[int], total: torch.Tensor
    ) -> None:
        """Behind the work of torch's current stream, a launch per gradient and one more."""
        filled = [(row, count) for row, count in zip(rows, counts, strict=True) if count]
        gradients = [self._at(row[2], count, row[3] >> 12 & 0xF) for row, count in filled]
        triton_norm.sum_of_squares(gradients, total)

    def write_clip(
        self, total: torch.Tensor, limit: float, grad_scale: int, result: torch.Tensor
    ) -> None:
        """Behind the work of torch's current stream."""
        scale = self._at(grad_scale, 1, 0) if grad_scale else None
        triton_norm.write_clip(total, limit, scale, result)
