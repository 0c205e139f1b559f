# SPDX-License-Identifier: Apache-2.0
# Small models with the structure of real ones, and batches; every call gives the same weights.
"""Models and batches for tests."""

from __future__ import annotations

import copy

import torch
from torch import nn


class Block(nn.Module):
    """A residual block: norm, two matrices."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Tiny(nn.Module):
    """Embedding, blocks, final norm and head: with `blocks` blocks it has `blocks` + 2 layers."""

    def __init__(self, blocks: int = 4, width: int = 24, vocabulary: int = 50) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def tiny(blocks: int = 4, width: int = 24, seed: int = 0) -> Tiny:
    """A `Tiny` with weights drawn from `seed`, without touching the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Tiny(blocks, width)


def batches(count: int, seed: int = 1, vocabulary: int = 50) -> list[torch.Tensor]:
    """`count` batches of 4 x 6 tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocabulary, (4, 6), generator=generator) for _ in range(count)]


def loss_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Next-token cross entropy."""
    logits = model(tokens)[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: list[torch.Tensor]) -> None:
    """One step per batch, the way users write it."""
    for tokens in data:
        loss_of(model, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all parameters by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(before: dict[str, torch.Tensor], model: nn.Module) -> set[str]:
    """Names of the parameters that differ from `before`."""
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models' parameters agree to the bit."""
    other = dict(b.named_parameters())
    return all(torch.equal(p, other[name]) for name, p in a.named_parameters())


def twin(model: nn.Module) -> nn.Module:
    """A copy with the same weights, all of them trainable."""
    copied = copy.deepcopy(model)
    return copied.requires_grad_(True)
