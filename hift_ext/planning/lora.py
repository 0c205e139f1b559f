# SPDX-License-Identifier: Apache-2.0
# LoRA (arXiv 2106.09685) as far as its memory goes: what a plan compares with. Nothing to train
# with; peft is the library for that.
"""Adapters on every linear layer of a model's blocks, to be traced."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from hift_ext.tree import Node, build_tree


class _Adapted(nn.Module):
    """A linear layer with a float32 adapter beside it, which computes in the input's type."""

    def __init__(self, base: nn.Module, width: int, out: int, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(width, rank, bias=False, dtype=torch.float32)
        self.up = nn.Linear(rank, out, bias=False, dtype=torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., width) -> (..., out) in the base layer's type."""
        low = F.linear(x, self.down.weight.to(x.dtype))
        result: torch.Tensor = self.base(x) + 2.0 * F.linear(low, self.up.weight.to(low.dtype))
        return result


def _trunks(node: Node) -> list[str]:
    """Paths of all blocks, the outermost ones."""
    if node.blocks:
        return [block.path for block in node.blocks]
    return [path for child in node.children.values() for path in _trunks(child)]


def _shape(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear layer; GPT-2's is a class of its own: weights (in, out)."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        weight: Any = module.weight
        return weight.shape[0], weight.shape[1]
    return None


def adapt(model: nn.Module, rank: int) -> list[nn.Parameter]:
    """Freezes `model` and puts adapters of `rank` beside the linear layers of its blocks.

    Returns:
        The adapters' parameters, float32.

    Raises:
        ValueError: A rank below 1, or no block with a linear layer.
    """
    if rank < 1:
        raise ValueError(f"the rank of adapters must be at least 1, not {rank}")
    model.requires_grad_(False)
    blocks = tuple(f"{path}." for path in _trunks(build_tree(model)))
    made: list[nn.Parameter] = []
    for name, module in list(model.named_modules()):
        shape = _shape(module)
        if shape is None or not name.startswith(blocks):
            continue
        adapted = _Adapted(module, *shape, rank)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, adapted)
        made += [*adapted.down.parameters(), *adapted.up.parameters()]
    if not made:
        raise ValueError("the model has no blocks with linear layers to put adapters beside")
    return made
