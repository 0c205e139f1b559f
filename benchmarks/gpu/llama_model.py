# SPDX-License-Identifier: Apache-2.0
# A decoder of LLaMA's shape in plain torch, with random weights: what memory and time a training
# takes depends on shapes alone.
"""The model of the sections `rings` and `llama`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional


@dataclass(frozen=True)
class Size:
    """A decoder's dimensions."""

    blocks: int
    hidden: int
    inner: int
    heads: int
    vocabulary: int


LLAMA_7B = Size(blocks=32, hidden=4096, inner=11008, heads=32, vocabulary=32000)


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotary positions for (batch, heads, length, width); `angles` is (length, width / 2)."""
    cos, sin = (torch.cat([f(angles)] * 2, -1).to(x.dtype) for f in (torch.cos, torch.sin))
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin


class Block(nn.Module):
    """Attention, then a gated feed-forward net, each behind a norm and beside the residual."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.attention_norm = nn.RMSNorm(size.hidden, eps=1e-6)
        self.q, self.k, self.v, self.o = (
            nn.Linear(size.hidden, size.hidden, bias=False) for _ in range(4)
        )
        self.inner_norm = nn.RMSNorm(size.hidden, eps=1e-6)
        self.gate = nn.Linear(size.hidden, size.inner, bias=False)
        self.up = nn.Linear(size.hidden, size.inner, bias=False)
        self.down = nn.Linear(size.inner, size.hidden, bias=False)

    def forward(self, x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        """(batch, length, hidden) to the same."""
        batch, length, hidden = x.shape
        h = self.attention_norm(x)
        q, k, v = (
            layer(h).view(batch, length, self.heads, -1).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        attended = functional.scaled_dot_product_attention(
            rotate(q, angles), rotate(k, angles), v, is_causal=True
        )
        x = x + self.o(attended.transpose(1, 2).reshape(batch, length, hidden))
        h = self.inner_norm(x)
        return x + self.down(functional.silu(self.gate(h)) * self.up(h))


class Llama(nn.Module):
    """The decoder with its loss."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.embedding = nn.Embedding(size.vocabulary, size.hidden)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.blocks))
        self.norm = nn.RMSNorm(size.hidden, eps=1e-6)
        self.head = nn.Linear(size.hidden, size.vocabulary, bias=False)
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.02)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The mean loss of predicting each next token of `ids` (batch, length)."""
        width = self.size.hidden // self.size.heads
        places = torch.arange(ids.shape[1], device=ids.device, dtype=torch.float32)
        rates = torch.arange(0, width, 2, device=ids.device, dtype=torch.float32) / width
        angles = torch.outer(places, 10000.0**-rates)
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, angles)
        logits = self.head(self.norm(x))[:, :-1].flatten(0, 1)
        return functional.cross_entropy(logits.float(), ids[:, 1:].flatten())


def make(size: Size, device: torch.device, dtype: torch.dtype) -> Llama:
    """The model on `device`, without a copy on the host."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return Llama(size)
    finally:
        torch.set_default_dtype(before)


def parameters(size: Size) -> int:
    """How many the model has."""
    with torch.device("meta"):
        return sum(p.numel() for p in Llama(size).parameters())


def tokens(size: Size, batch: int, length: int, device: torch.device) -> torch.Tensor:
    """Random ids (batch, length)."""
    return torch.randint(size.vocabulary, (batch, length), device=device)
