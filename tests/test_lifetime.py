# SPDX-License-Identifier: Apache-2.0
# An optimizer's life beside its model's: closing, deleting, copying, a second one, one more group.
# Whatever happens, the model stays trainable and nothing is trained twice.
"""Closing, copying and sharing models."""

from __future__ import annotations

import copy
import gc
import pickle

import models
import pytest
import torch
from torch import nn

import hift_ext


def test_close_restores_everything_and_refuses_steps() -> None:
    model = models.tiny()
    with hift_ext.AdamW(model, lr=1e-2) as optimizer:
        models.train(model, optimizer, models.batches(1))
        hooks = len(model._forward_pre_hooks)
        view = next(iter(optimizer.state.values()))["exp_avg"]
        kept = view.clone()
    assert all(p.requires_grad for p in model.parameters())
    assert len(model._forward_pre_hooks) == hooks - 1
    assert torch.equal(view, kept)  # the memory lives as long as its view
    optimizer.close()
    with pytest.raises(RuntimeError, match="closed"):
        optimizer.step()


def test_deleting_the_optimizer_gives_the_model_back() -> None:
    model = models.tiny()
    optimizer = hift_ext.AdamW(model)
    models.train(model, optimizer, models.batches(2))
    assert not all(p.requires_grad for p in model.parameters())
    del optimizer
    gc.collect()
    assert all(p.requires_grad for p in model.parameters())
    models.train(model, hift_ext.AdamW(model), models.batches(2))


def test_second_optimizer_raises_while_the_first_is_open() -> None:
    model = models.tiny()
    first = hift_ext.AdamW(model)
    models.train(model, first, models.batches(1))
    with pytest.raises(RuntimeError, match=r"still open.*close\(\)"):
        hift_ext.AdamW(model)
    first.close()
    second = hift_ext.AdamW(model)
    assert sum(group.numel for group in second.groups) == sum(p.numel() for p in model.parameters())
    models.train(model, second, models.batches(7))


def test_two_optimizers_made_before_the_first_step() -> None:
    model = models.tiny()
    first, second = hift_ext.AdamW(model), hift_ext.AdamW(model)
    with pytest.raises(RuntimeError, match="still open"):
        models.train(model, first, models.batches(1))
    second.close()
    first.close()


def test_add_param_group_joins_at_the_next_pass() -> None:
    model, extra = models.tiny(blocks=1), nn.Linear(50, 50)
    optimizer = hift_ext.AdamW(model, lr=1e-2)
    models.train(model, optimizer, models.batches(1))
    optimizer.add_param_group({"params": extra.parameters(), "lr": 1e-3})
    assert len(optimizer.groups) == 4
    before = models.weights(extra)
    turns = []
    for tokens in models.batches(6):
        turns.append(optimizer.active)
        logits = extra(model(tokens)[:, :-1])
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert turns == [1, 2, 0, 1, 2, 3]
    assert models.changed(before, extra) == {"weight", "bias"}
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [extra.weight]})
    assert len(optimizer.param_groups) == 2


def test_deepcopy_and_pickle_go_on_like_the_original() -> None:
    model, data = models.tiny(), models.batches(9)
    optimizer = hift_ext.AdamW(model, lr=1e-2)
    models.train(model, optimizer, data[:4])
    copies = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    models.train(model, optimizer, data[4:])
    for other, other_optimizer in copies:
        assert not models.same(other, model)
        models.train(other, other_optimizer, data[4:])
        assert models.same(other, model)
        other_optimizer.close()
        assert all(p.requires_grad for p in other.parameters())


def test_copy_of_a_driven_model_can_be_trained() -> None:
    model = models.tiny()
    optimizer = hift_ext.AdamW(model)
    models.train(model, optimizer, models.batches(2))
    copied = copy.deepcopy(model)
    second = hift_ext.AdamW(copied)
    assert sum(g.numel for g in second.groups) == sum(p.numel() for p in model.parameters())
    models.train(copied, second, models.batches(7))
    models.train(model, optimizer, models.batches(2))
