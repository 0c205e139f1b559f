# SPDX-License-Identifier: Apache-2.0
"""AdamW (arXiv 1711.05101) and Adam (arXiv 1412.6980), with AMSGrad (arXiv 1904.09237).

The arithmetic is csrc/rules/adamw.h; semantics, names and state are those of torch.optim.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from typing_extensions import Unpack

from hift_ext.ops import StreamSpec
from hift_ext.optimizer import HiFTOptimizer
from hift_ext.options import HiFTOptions


class Adam(HiFTOptimizer):
    """`torch.optim.Adam`, one group of layers a step.

    Args:
        params: An `nn.Module`, parameters, named parameters, or dicts with settings of their own.
        lr: Learning rate; latched for each pass.
        betas: Decay rates of the first and second moment.
        eps: Added to the root of the second moment.
        weight_decay: L2 penalty, or decoupled decay with `decoupled_weight_decay`.
        amsgrad: Divide by the largest second moment so far.
        maximize: Ascend instead of descend.
        foreach: A hint for torch's own loops; accepted.
        capturable: Must be False.
        differentiable: Must be False.
        fused: A hint for torch's own loops; accepted.
        decoupled_weight_decay: Decay the weight itself, as AdamW does.
        **options: See `HiFTOptions`.
    """

    torch_class: ClassVar[type[torch.optim.Optimizer] | None] = torch.optim.Adam

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **options: Unpack[HiFTOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "foreach": foreach,
            "maximize": maximize,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        if decoupled_weight_decay:
            defaults["decoupled_weight_decay"] = True
        super().__init__(params, defaults, **options)

    def _decoupled(self, group: dict[str, Any]) -> bool:
        return bool(group.get("decoupled_weight_decay", False))

    def rule(self, group: dict[str, Any]) -> str:
        """One of the four rules in csrc/rules/adamw.h."""
        name = "adamw" if self._decoupled(group) else "adam"
        return name + "_amsgrad" if group["amsgrad"] else name

    def streams(self, group: dict[str, Any]) -> list[StreamSpec]:
        """First and second moment, and the latter's maximum for AMSGrad."""
        largest = ["max_exp_avg_sq"] if group["amsgrad"] else []
        squares = [StreamSpec(name, signed=False) for name in ["exp_avg_sq", *largest]]
        return [StreamSpec("exp_avg"), *squares]

    def hyper(self, group: dict[str, Any], lr: float, step: int) -> tuple[float, ...]:
        """AdamHyper."""
        beta1, beta2 = float(group["betas"][0]), float(group["betas"][1])
        decay = float(group["weight_decay"])
        return (
            1 - lr * decay if self._decoupled(group) else decay,
            1 - beta1,
            beta2,
            1 - beta2,
            lr / (1 - beta1**step),
            1 / math.sqrt(1 - beta2**step),
            float(group["eps"]),
        )


class AdamW(Adam):
    """`torch.optim.AdamW`, one group of layers a step.

    Args:
        params: An `nn.Module`, parameters, named parameters, or dicts with settings of their own.
        lr: Learning rate; latched for each pass.
        betas: Decay rates of the first and second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay: each visit multiplies the weight by `1 - lr * weight_decay`.
        amsgrad: Divide by the largest second moment so far.
        maximize: Ascend instead of descend.
        foreach: A hint for torch's own loops; accepted.
        capturable: Must be False.
        differentiable: Must be False.
        fused: A hint for torch's own loops; accepted.
        **options: See `HiFTOptions`.
    """

    torch_class = torch.optim.AdamW

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[HiFTOptions],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            **options,
        )

    def _decoupled(self, group: dict[str, Any]) -> bool:
        return True
