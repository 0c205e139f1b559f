# SPDX-License-Identifier: Apache-2.0
"""State that Triton updates: what a GPU gets without this build's kernels.

Apart from engines.py, since it imports triton, which takes half a second.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import torch

from hift_ext import triton_norm, triton_step
from hift_ext.engines import ResidentEngine
from hift_ext.ops import DTYPE_CODES, RULES, Draw, Hypers, Kept, Report, Row, Scalars

_RULES = {number: (name, states) for name, (number, states, *_) in RULES.items()}
_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}


def rule_of(row: Row) -> tuple[str, int]:
    """Name of a row's rule, and how many states it has."""
    return _RULES[row[3] & 0xFF]


def tensors_of(row: Row, count: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The parameter and the gradient of a row."""
    _, param, grad, kind, _ = row
    codes = (param, kind >> 8 & 0xF), (grad, kind >> 12 & 0xF)
    p, g = (triton_step.tensor_at(at, count, _DTYPES[code], device) for at, code in codes)
    return p, g


def scalars_at(addresses: Scalars, device: torch.device) -> triton_step.Scalars:
    """Scalars by their addresses."""
    at = partial(triton_step.tensor_at, count=1, dtype=torch.float32, device=device)
    return triton_step.Scalars(*(at(address) if address else None for address in addresses))


def span_of(
    row: Row,
    param: torch.Tensor,
    grad: torch.Tensor,
    stored: Sequence[torch.Tensor],
    kept: Kept,
    state_count: int,
    hyper: Sequence[float],
    draw: Draw,
) -> triton_step.Span:
    """What Triton updates of a row.

    Args:
        row: The row.
        param: Its parameter, or a part of it.
        grad: As much of its gradient.
        stored: As much of every stored stream, in the engine's order.
        kept: How numbers are kept.
        state_count: States that were laid out.
        hyper: The gradient's factor and the rule's hyper-parameters.
        draw: Key of the random numbers, and the parameter's element that is the part's first.
    """
    rule, states = rule_of(row)
    way = row[3] >> 16
    scales = state_count + (kept.master is not None)
    return triton_step.Span(
        param,
        grad,
        stored[:states],
        rule,
        hyper,
        scales=stored[scales : scales + states],
        master=stored[state_count] if way >= 2 else None,
        stochastic=way == 1,
        stochastic_state=kept.stochastic,
        key=draw[0],
        element=draw[1],
    )


class TritonNorm:
    """The norm of a step's gradients, by Triton."""

    why: str = ""
    _place: torch.device

    def sum_of_squares(
        self, rows: Sequence[Row], counts: Sequence[int], total: torch.Tensor
    ) -> None:
        """Behind the work of torch's current stream, a launch per gradient and one more."""
        filled = [(row, count) for row, count in zip(rows, counts, strict=True) if count]
        gradients = [tensors_of(row, count, self._place)[1] for row, count in filled]
        triton_norm.sum_of_squares(gradients, total)

    def write_clip(
        self, total: torch.Tensor, limit: float, grad_scale: int, result: torch.Tensor
    ) -> None:
        """Behind the work of torch's current stream."""
        scale = scalars_at(Scalars(grad_scale), self._place).grad_scale
        triton_norm.write_clip(total, limit, scale, result)


class TritonEngine(TritonNorm, ResidentEngine):
    """State in tensors on the parameters' own device; nothing moves."""

    @property
    def _place(self) -> torch.device:  # type: ignore[override]
        return self._device

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
        start = time.perf_counter()
        spans = []
        for row, draw in zip(rows, draws or [(0, 0)] * len(rows), strict=True):
            p, g = tensors_of(row, self._counts[group][row[0]], self._device)
            state = self._state(group, row[0])
            how = self._kept, self._state_count, hypers[row[4]], draw
            spans.append(span_of(row, p, g, state, *how))
        triton_step.step(spans, scalars_at(scalars, self._device))
        done.append(True)
        elapsed = 1e3 * (time.perf_counter() - start)
        return Report(update_ms=elapsed, step_ms=elapsed)
