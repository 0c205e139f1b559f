# SPDX-License-Identifier: Apache-2.0
# One parameter of more elements than 32 bits count, updated and compared with torch, every element.
# Run by hand, `python tests/big.py`: it takes 13 GB of memory (5 with `--store disk`) and minutes.
"""One bf16 parameter above 2^31 elements, with fp32 momentum."""

from __future__ import annotations

import argparse
import time

import torch
from torch import nn

import hift_ext

PIECE = 1 << 24
SETTINGS = {"lr": 0.5, "momentum": 0.75, "weight_decay": 0.125}


def pattern(begin: int, count: int) -> torch.Tensor:
    """Values that differ between any two neighbouring multiples of 2^31 and 2^32 bytes."""
    index = torch.arange(begin, begin + count, dtype=torch.int64)
    return ((index * 2_654_435_761 >> 7) % 251 - 125).to(torch.bfloat16) / 64


def expected(begin: int, count: int, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What torch makes of these elements in float32, rounded to bf16 after each step."""
    p = pattern(begin, count)
    momentum = torch.zeros(count)
    for step in range(steps):
        # The gradient is the parameter itself; torch has no bf16 parameter with fp32 momentum.
        whole = nn.Parameter(p.float())
        optimizer = torch.optim.SGD([whole], foreach=False, **SETTINGS)
        if step:
            optimizer.state[whole]["momentum_buffer"] = momentum
        whole.grad = p.float()
        optimizer.step()
        momentum = optimizer.state[whole]["momentum_buffer"]
        p = whole.detach().bfloat16()
    return p, momentum


def main() -> None:
    """Fills, steps twice, compares every element."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--elements", type=int, default=(1 << 31) + 4099)
    parser.add_argument("--store", default="ram")
    parser.add_argument("--staging", type=int, default=1 << 28)
    options = parser.parse_args()
    count = options.elements
    p = nn.Parameter(torch.empty(count, dtype=torch.bfloat16))
    starts = range(0, count, PIECE)
    for begin in starts:
        piece = p.data[begin : begin + PIECE]
        piece.copy_(pattern(begin, piece.numel()))
    optimizer = hift_ext.SGD(
        [p],
        layers_per_group="all",
        store=options.store,
        staging=options.staging if options.store != "ram" else "auto",
        **SETTINGS,
    )
    p.grad = p.data  # as large, and no memory of its own
    for step in range(2):
        start = time.perf_counter()
        optimizer.step()
        print(f"step {step}: {time.perf_counter() - start:.1f} s", flush=True)
    state = optimizer.state[p]["momentum_buffer"]
    assert state.numel() == p.numel() == count
    wrong, largest = 0, 0.0
    for begin in starts:
        piece = p.data[begin : begin + PIECE]
        weights, momentum = expected(begin, piece.numel(), 2)
        wrong += int((piece != weights).sum())
        largest = max(largest, float((state[begin : begin + PIECE] - momentum).abs().max()))
    print(f"{count} elements: {wrong} weights differ, momentum differs by at most {largest:g}")
    assert wrong == 0
    assert largest <= 1e-6


if __name__ == "__main__":
    main()
