# SPDX-License-Identifier: Apache-2.0
"""Clipping the active group's gradients by their norm, without writing them and without a wait.

The gradients are read once for the norm; the coefficient it gives enters the update's own pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch

from hift_ext.profiling import stage

if TYPE_CHECKING:
    from hift_ext.ops import Row
    from hift_ext.optimizer import HiFTOptimizer

Reduce = Callable[[torch.Tensor], None]
"""Where each process has a shard of the gradients: makes the sum of the squares of its own, one
float64 on the parameters' device, the sum of all processes', in place and in stream order."""


def check_clipping(limit: Any, error_if_nonfinite: Any) -> None:
    """Checks `max_grad_norm` and `error_if_nonfinite`.

    Raises:
        TypeError: One of them is of a wrong type.
        ValueError: The limit is not positive, or absent where an error asks for it.
    """
    if limit is not None:
        if isinstance(limit, bool) or not isinstance(limit, Real):
            raise TypeError(f"max_grad_norm must be None or a number, not {limit!r}")
        if not float(limit) > 0:
            raise ValueError(f"max_grad_norm must be None or a positive number, not {limit!r}")
    if not isinstance(error_if_nonfinite, bool):
        raise TypeError(f"error_if_nonfinite must be a bool, not {error_if_nonfinite!r}")
    if error_if_nonfinite and limit is None:
        raise ValueError(
            "error_if_nonfinite=True needs max_grad_norm, or no norm is computed: "
            "max_grad_norm=float('inf') clips nothing"
        )


def clip(
    optimizer: HiFTOptimizer,
    rows: Sequence[Row],
    counts: Sequence[int],
    scale: torch.Tensor | None,
    found_inf: torch.Tensor | None,
) -> torch.Tensor | None:
    """What the step multiplies gradients by, and the norm, which the optimizer keeps.

    Args:
        optimizer: Whose active group takes its step; laid out.
        rows: The step's rows.
        counts: Elements of each row's gradient.
        scale: What the gradients were multiplied by; one float32 on the parameters' device.
        found_inf: Non-zero where the step will change nothing anyway; there too.

    Returns:
        One float32 on the device, from 0 to 1 or NaN; None without `max_grad_norm`.

    Raises:
        RuntimeError: The norm is not finite, and that is to be an error. Nothing has changed.
    """
    limit = optimizer._options["max_grad_norm"]
    if limit is None:
        return None
    engine = optimizer._engine()
    # Made anew for each step: a norm that the user keeps stays what it was.
    memory = torch.empty(2, dtype=torch.float64, device=optimizer._device)
    total, result = memory[0], memory[1:].view(torch.float32)
    with stage("norm"):
        engine.sum_of_squares(rows, counts, total)
        if optimizer._reduce_norm is not None:
            optimizer._reduce_norm(total)
        engine.write_clip(total, limit, 0 if scale is None else scale.data_ptr(), result)
    optimizer._grad_norm = result[0]
    if optimizer._options["error_if_nonfinite"]:
        _refuse_nonfinite(optimizer, result[0], found_inf)
    return result[1]


def _refuse_nonfinite(
    optimizer: HiFTOptimizer, norm: torch.Tensor, found_inf: torch.Tensor | None
) -> None:
    if norm.isfinite() or (found_inf is not None and found_inf.item() != 0):
        return
    name = optimizer._groups[optimizer.active].name
    raise RuntimeError(
        f"the norm of the gradients of group {name!r} is non-finite ({norm.item()}), so they "
        "cannot be clipped; nothing was changed. With error_if_nonfinite=False the step would be "
        "taken with it, as by torch.nn.utils.clip_grad_norm_"
    )
