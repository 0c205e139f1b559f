# SPDX-License-Identifier: Apache-2.0
"""Stochastic gradient descent, plain or with momentum.

The arithmetic is csrc/rules/sgd.h; semantics, names and state are those of torch.optim.
"""

from __future__ import annotations

from typing import Any

import torch
from typing_extensions import Unpack

from hift_ext.ops import StreamSpec
from hift_ext.optimizer import HiFTOptimizer
from hift_ext.options import HiFTOptions


class SGD(HiFTOptimizer):
    """`torch.optim.SGD`, one group of layers a step.

    Args:
        params: An `nn.Module`, parameters, named parameters, or dicts with settings of their own.
        lr: Learning rate; latched for each pass.
        momentum: Decay rate of the momentum buffer; 0 keeps none.
        dampening: The gradient enters the buffer times `1 - dampening`.
        weight_decay: L2 penalty.
        nesterov: Look ahead along the buffer.
        maximize: Ascend instead of descend.
        foreach: A hint for torch's own loops; accepted.
        differentiable: Must be False.
        fused: A hint for torch's own loops; accepted.
        **options: See `HiFTOptions`.
    """

    torch_class = torch.optim.SGD
    has_step = False

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[HiFTOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, **options)

    def rule(self, group: dict[str, Any]) -> str:
        """One of the two rules in csrc/rules/sgd.h."""
        return "momentum" if group["momentum"] else "sgd"

    def streams(self, group: dict[str, Any]) -> list[StreamSpec]:
        """The momentum buffer, where there is momentum."""
        return [StreamSpec("momentum_buffer")] if group["momentum"] else []

    def hyper(self, group: dict[str, Any], lr: float, step: int) -> tuple[float, ...]:
        """Sgd::Hyper or Momentum::Hyper."""
        decay = float(group["weight_decay"])
        if not group["momentum"]:
            return decay, lr
        return (
            decay,
            lr,
            float(group["momentum"]),
            1 - float(group["dampening"]),
            float(group["nesterov"]),
            float(step == 1),
        )
