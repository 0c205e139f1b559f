# SPDX-License-Identifier: Apache-2.0
# HiFT in plain torch, for comparison: one torch optimizer per group, everything in memory.
# It follows arXiv 2401.15207: freeze all but one group, step it, go on; one learning rate a pass.
"""A plain-torch HiFT loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


class ReferenceHiFT:
    """Steps one torch optimizer per group, in turn."""

    def __init__(
        self,
        groups: Sequence[Sequence[nn.Parameter]],
        torch_class: type[torch.optim.Optimizer],
        order: Sequence[int] | None = None,
        **settings: Any,
    ) -> None:
        self.groups = [list(group) for group in groups]
        self.order = list(order if order is not None else range(len(groups)))
        self.position = 0
        self.lr = settings["lr"]  # what the user's scheduler would set, at every step
        self.optimizers = [torch_class(group, **settings) for group in self.groups]

    def freeze(self) -> None:
        """Before a forward: only the active group may have gradients."""
        active = self.order[self.position]
        for index, group in enumerate(self.groups):
            for p in group:
                p.requires_grad_(index == active)

    def step(self) -> None:
        """Updates the active group and moves on."""
        if self.position == 0:
            self.latched = self.lr
        optimizer = self.optimizers[self.order[self.position]]
        for settings in optimizer.param_groups:
            settings["lr"] = self.latched
        optimizer.step()
        for group in self.groups:
            for p in group:
                p.grad = None
        self.position = (self.position + 1) % len(self.order)
