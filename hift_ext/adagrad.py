# SPDX-License-Identifier: Apache-2.0
"""Adagrad (Duchi et al., JMLR 12, 2011).

The arithmetic is csrc/rules/adagrad.h; semantics, names and state are those of torch.optim.
"""

from __future__ import annotations

from typing import Any

import torch
from typing_extensions import Unpack

from hift_ext.ops import StreamSpec
from hift_ext.optimizer import HiFTOptimizer
from hift_ext.options import HiFTOptions


class Adagrad(HiFTOptimizer):
    """`torch.optim.Adagrad`, one group of layers a step.

    Args:
        params: An `nn.Module`, parameters, named parameters, or dicts with settings of their own.
        lr: Learning rate; latched for each pass.
        lr_decay: The t-th visit of a parameter uses `lr / (1 + (t - 1) * lr_decay)`.
        weight_decay: L2 penalty.
        initial_accumulator_value: What the sum of squares starts from.
        eps: Added to the root of the sum.
        foreach: A hint for torch's own loops; accepted.
        maximize: Ascend instead of descend.
        differentiable: Must be False.
        fused: A hint for torch's own loops; accepted.
        **options: See `HiFTOptions`.
    """

    torch_class = torch.optim.Adagrad
    state_from_start = True

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[HiFTOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "eps": eps,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, **options)

    def rule(self, group: dict[str, Any]) -> str:
        """The one rule in csrc/rules/adagrad.h."""
        return "adagrad"

    def streams(self, group: dict[str, Any]) -> list[StreamSpec]:
        """The sum of squared gradients."""
        return [StreamSpec("sum", float(self.defaults["initial_accumulator_value"]))]

    def hyper(self, group: dict[str, Any], lr: float, step: int) -> tuple[float, ...]:
        """Adagrad::Hyper."""
        rate = lr / (1 + (step - 1) * float(group["lr_decay"]))
        return float(group["weight_decay"]), rate, float(group["eps"])
