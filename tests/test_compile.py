# SPDX-License-Identifier: Apache-2.0
# A compiled model is compiled once more for each group, since what needs a gradient is part of it.
# After the first pass nothing is compiled any more, and the weights are those of the plain model.
"""torch.compile of the model: how often, and the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import hf
import models
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import hift_ext

GROUPS = 4
CONFIG = torch._dynamo.config
LIMIT = "recompile_limit" if hasattr(CONFIG, "recompile_limit") else "cache_size_limit"  # torch 2.6


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Nothing compiled, counters at zero, and the limit that the README recommends."""
    torch._dynamo.reset()
    counters.clear()
    with CONFIG.patch({LIMIT: GROUPS + 1}):
        yield
    torch._dynamo.reset()
    counters.clear()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def before(model: nn.Module, backend: str) -> tuple[nn.Module, hift_ext.HiFTOptimizer]:
    """Compiled, then given to the optimizer: `AdamW(torch.compile(model))`."""
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    return compiled, hift_ext.AdamW(compiled, lr=1e-2)


def after(model: nn.Module, backend: str) -> tuple[nn.Module, hift_ext.HiFTOptimizer]:
    """Compiled when the optimizer is there, as the Trainer and Accelerate do."""
    optimizer = hift_ext.AdamW(model, lr=1e-2)
    return torch.compile(model, backend=backend), optimizer


def in_place(model: nn.Module, backend: str) -> tuple[nn.Module, hift_ext.HiFTOptimizer]:
    """`model.compile()`."""
    optimizer = hift_ext.AdamW(model, lr=1e-2)
    model.compile(backend=backend)
    return model, optimizer


def blocks(model: nn.Module, backend: str) -> tuple[nn.Module, hift_ext.HiFTOptimizer]:
    """Block by block."""
    for block in model.blocks:
        block.compile(backend=backend, fullgraph=True)
    return model, hift_ext.AdamW(model, lr=1e-2)


@pytest.mark.needs("compile")
@pytest.mark.parametrize(
    ("way", "backend"),
    [(before, "aot_eager"), (after, "aot_eager"), (in_place, "eager"), (blocks, "aot_eager")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_compiles_in_the_first_pass_only(way: Callable, backend: str) -> None:
    model = models.tiny(blocks=GROUPS - 2)
    plain = models.twin(model)
    compiled, optimizer = way(model, backend)
    by_hand = hift_ext.AdamW(plain, lr=1e-2)
    assert len(optimizer.groups) == GROUPS
    seen = []
    data = models.batches(3 * GROUPS)
    for start in range(0, 3 * GROUPS, GROUPS):
        for tokens in data[start : start + GROUPS]:
            models.loss_of(compiled, tokens).backward()
            having = {p for p in model.parameters() if p.grad is not None}
            assert having == set(optimizer.groups[optimizer.active].params)
            optimizer.step()
            optimizer.zero_grad()
        seen.append(graphs())
    models.train(plain, by_hand, data)
    # One graph a group. A block knows three cases: above the active group, active, below.
    assert seen == [3 if way is blocks else GROUPS] * 3
    assert sum(counters["graph_break"].values()) == (way in (after, in_place))
    assert models.same(model, plain)


def test_blocks_need_no_more_graphs_in_a_deeper_model() -> None:
    model, optimizer = blocks(models.tiny(blocks=9), "eager")
    assert len(optimizer.groups) == 11
    with CONFIG.patch({LIMIT: 3}):
        models.train(model, optimizer, models.batches(22))
    assert graphs() == 3


def test_too_low_a_limit_is_slower_and_still_right() -> None:
    model = models.tiny(blocks=GROUPS - 2)
    plain = models.twin(model)
    compiled, optimizer = after(model, "eager")
    with CONFIG.patch({LIMIT: 2}):
        models.train(compiled, optimizer, models.batches(2 * GROUPS))
    assert graphs() <= 2
    models.train(plain, hift_ext.AdamW(plain, lr=1e-2), models.batches(2 * GROUPS))
    assert models.same(model, plain)


def test_evaluation_between_steps() -> None:
    """Under no_grad it is another graph, once a group where it comes in every group's turn."""
    model = models.tiny(blocks=GROUPS - 2)
    compiled, optimizer = before(model, "eager")
    seen = []
    with CONFIG.patch({LIMIT: 2 * GROUPS}):
        for tokens in models.batches(3 * GROUPS):
            with torch.no_grad():
                compiled(tokens)
            models.train(compiled, optimizer, [tokens])
            seen.append(graphs())
    assert seen[GROUPS - 1] <= 2 * GROUPS
    assert len(set(seen[GROUPS - 1 :])) == 1


@pytest.mark.needs("compile")
def test_the_trainer_s_torch_compile(tmp_path) -> None:
    made = []
    for settings in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        model = hf.make("llama")
        args = hf.arguments(tmp_path, **settings)
        trainer = hf.trainer(
            model,
            args,
            train_dataset=hf.rows("llama"),
            optimizers=(hift_ext.AdamW(model, lr=1e-2, layers_per_group=2), None),
        )
        trainer.train()
        made.append(model)
    assert 0 < graphs() <= 2 + 1
    assert models.same(*made)
