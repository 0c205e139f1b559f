# SPDX-License-Identifier: Apache-2.0
# Saved on two ranks and resumed on one, and the reverse, with torch's own tools: the run goes on to
# the bit. Functions named `on_...` run on both ranks.
"""Checkpoints across numbers of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import Ranks, averaged, pair, share
from test_sharded import Scaled, alone, made, plain, same, sharded, whole
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

pytestmark = pytest.mark.needs("fsdp2_on_cpu")

END = 14
TOOLS = ["full", "sharded", "own"]


@pytest.fixture
def ranks() -> Ranks:
    """Two processes, made by the first test that asks."""
    return pair()


def save(model: Scaled, optimizer: Any, tool: str, path: Path) -> None:
    """Saves by torch's full or sharded state dicts, or each part's own state_dict."""
    writes = not dist.is_initialized() or dist.get_rank() == 0
    if tool == "own":
        parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        full = torch.utils._pytree.tree_map_only(torch.Tensor, whole, parts)
        if writes:
            torch.save(full, path)
        return
    options = StateDictOptions(full_state_dict=tool == "full", cpu_offload=tool == "full")
    parts = dict(
        zip(("model", "optimizer"), get_state_dict(model, optimizer, options=options), strict=True)
    )
    if tool == "sharded":
        dcp.save(parts, checkpoint_id=path)
    elif writes:
        torch.save(parts, path)


def load(model: Scaled, optimizer: Any, tool: str, path: Path) -> None:
    options = StateDictOptions(full_state_dict=tool == "full")
    if tool == "sharded":
        parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.load(parts, checkpoint_id=path)
    else:
        parts = torch.load(path, weights_only=True)
    if tool == "own":
        options = StateDictOptions(full_state_dict=True)
        set_state_dict(
            model, [], model_state_dict=parts["model"], optim_state_dict={}, options=options
        )
        optimizer.load_state_dict(parts["optimizer"])
    else:
        set_state_dict(
            model,
            optimizer,
            model_state_dict=parts["model"],
            optim_state_dict=parts["optimizer"],
            options=options,
        )


def on_save(stop: int, tool: str, path: Path) -> None:
    model = sharded()
    optimizer = made(model, order="random", seed=1)
    models.train(model, optimizer, share(models.batches(stop)))
    save(model, optimizer, tool, path)


def on_resume(stop: int, tool: str, path: Path) -> dict[str, torch.Tensor]:
    model = sharded()
    optimizer = made(model, order="random", seed=1)
    load(model, optimizer, tool, path)
    models.train(model, optimizer, share(models.batches(END))[stop:])
    return {name: whole(p) for name, p in model.named_parameters()}


def train_alone(model: Scaled, optimizer: Any, data: list[torch.Tensor]) -> None:
    for tokens in data:
        averaged(model, [[tokens[:2]], [tokens[2:]]])
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("stop", [3, 8])  # in the first pass, and in the second
@pytest.mark.parametrize("tool", TOOLS)
def test_saved_on_two(tool, stop, ranks, tmp_path) -> None:
    weights, _ = alone(END, order="random", seed=1)
    ranks.run(on_save, stop, tool, tmp_path / "saved")
    for got in ranks.run(on_resume, stop, tool, tmp_path / "saved"):
        same(got, weights)
    model = plain()
    optimizer = made(model, order="random", seed=1)
    load(model, optimizer, tool, tmp_path / "saved")
    train_alone(model, optimizer, models.batches(END)[stop:])
    same(models.weights(model), weights)


@pytest.mark.parametrize("stop", [3, 8])
@pytest.mark.parametrize("tool", TOOLS)
def test_saved_on_one_and_resumed_on_two(tool, stop, ranks, tmp_path) -> None:
    weights, _ = alone(END, order="random", seed=1)
    model = plain()
    optimizer = made(model, order="random", seed=1)
    train_alone(model, optimizer, models.batches(stop))
    save(model, optimizer, tool, tmp_path / "saved")
    for got in ranks.run(on_resume, stop, tool, tmp_path / "saved"):
        same(got, weights)
