# SPDX-License-Identifier: Apache-2.0
# Models that change under the optimizer: parameters replaced, moved, retyped, reshaped, tied, or
# frozen by the user. Training goes on as it should, or an error says why it cannot.
"""Models changed after the optimizer was made."""

from __future__ import annotations

import models
import pytest
import torch
from torch import nn

import hift_ext


def trained(steps: int = 3, **options) -> tuple[nn.Module, hift_ext.HiFTOptimizer]:
    model = models.tiny(blocks=1)
    optimizer = hift_ext.AdamW(model, lr=1e-2, **options)
    models.train(model, optimizer, models.batches(steps))
    return model, optimizer


@pytest.mark.parametrize("group", [1, "all"])
def test_a_replaced_parameter_is_told_before_anything_changes(group) -> None:
    model, optimizer = trained(3, layers_per_group=group)
    old = model.embedding.weight
    model.embedding.weight = nn.Parameter(old.detach().clone())
    before = models.weights(model)
    with pytest.raises(
        RuntimeError, match=r"'embedding.weight'.*was replaced after.*new optimizer"
    ):
        models.train(model, optimizer, models.batches(1))
    assert not models.changed(before, model)
    model.embedding.weight = old
    optimizer.zero_grad()
    models.train(model, optimizer, models.batches(3))


def test_functional_call_replaces_parameters_for_a_while() -> None:
    model, optimizer = trained(3)
    others = {name: nn.Parameter(p.detach().clone()) for name, p in model.named_parameters()}
    tokens = models.batches(1)[0]
    torch.func.functional_call(model, others, (tokens,)).sum().backward()
    before = models.weights(model)
    models.train(model, optimizer, [tokens])
    assert models.changed(before, model) == {"embedding.weight"}


def test_a_model_moved_to_another_kind_of_device_is_told() -> None:
    model, optimizer = trained(3)
    model.to("meta")
    assert len(optimizer.state) == 11
    with pytest.raises(RuntimeError, match=r"'embedding.weight'.*was replaced after.*another kind"):
        models.train(model, optimizer, [models.batches(1)[0].to("meta")])
    optimizer.close()
    lost = hift_ext.AdamW(model, layers_per_group="all")
    model.head.weight.grad = torch.zeros_like(model.head.weight)
    with pytest.raises(RuntimeError, match="does not update parameters on meta"):
        lost.step()


def test_weights_tied_after_construction_are_trained_once() -> None:
    model, optimizer = trained(3)
    model.head.weight = model.embedding.weight
    for tokens in models.batches(3):
        before, active = models.weights(model), optimizer.active
        models.train(model, optimizer, [tokens])
        assert ("embedding.weight" in models.changed(before, model)) == (active == 0)


def test_a_module_added_later_is_left_to_the_user() -> None:
    model, optimizer = trained(3)
    model.extra = nn.Linear(3, 3)
    before = models.weights(model)
    models.train(model, optimizer, models.batches(3))
    assert not any(name.startswith("extra") for name in models.changed(before, model))
    optimizer.add_param_group({"params": model.extra.parameters()})
    assert len(optimizer.groups) == 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_model_retyped_between_steps(dtype) -> None:
    model, optimizer = trained(4)
    model.to(dtype)
    if dtype is torch.float64:
        with pytest.raises(TypeError, match="float64 parameter"):
            models.train(model, optimizer, models.batches(1))
        model.float()
        optimizer.zero_grad()
    models.train(model, optimizer, models.batches(5))
    assert optimizer.pass_index == 3
    assert all(optimizer.state[p]["step"] == 3 for p in model.parameters())


def test_another_shape_of_as_many_elements_is_followed() -> None:
    p = nn.Parameter(torch.arange(12.0))
    optimizer = hift_ext.AdamW([p], lr=0.1, layers_per_group="all")
    q = nn.Parameter(torch.arange(12.0))
    reference = hift_ext.AdamW([q], lr=0.1, layers_per_group="all")
    for shape in ((12,), (3, 4), (2, 6)):
        p.grad = None
        p.data = p.data.view(shape)
        p.grad, q.grad = torch.ones(shape), torch.ones(12)
        optimizer.step()
        reference.step()
        assert torch.equal(p.detach().flatten(), q.detach())
        assert optimizer.state[p]["exp_avg"].shape == shape
        optimizer.load_state_dict(optimizer.state_dict())
    p.grad = None
    p.data = p.data.t()
    p.grad = torch.ones(6, 2)
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match=r"had the shape \(2, 6\).*now it has \(6, 2\).*strides"):
        optimizer.step()
    assert torch.equal(p.detach(), before)


def test_memory_that_was_taken_away() -> None:
    p = nn.Parameter(torch.ones(4))
    optimizer = hift_ext.SGD([p], lr=0.25, momentum=0.9, layers_per_group="all")
    for victim in ("gradient", "memory"):
        p.grad = torch.ones(4)
        optimizer.step()
        before = p.detach().clone()
        storage = (p.grad if victim == "gradient" else p).untyped_storage()
        storage.resize_(0)
        with pytest.raises(RuntimeError, match=f"the {victim} of a parameter.*is not there"):
            optimizer.step()
        assert victim == "memory" or torch.equal(p.detach(), before)
    p.data = before
    p.grad = torch.ones(4)
    optimizer.step()


def test_inference_tensors_are_refused_and_inference_mode_is_not() -> None:
    with torch.inference_mode():
        born = models.tiny(blocks=1)
    with pytest.raises(RuntimeError, match="inference tensor"):
        hift_ext.AdamW(born)
    model, optimizer = trained(3)
    copied = models.twin(model)
    reference = hift_ext.AdamW(copied, lr=1e-2)
    reference.load_state_dict(optimizer.state_dict())
    for around in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        for m, o, mode in ((model, optimizer, around), (copied, reference, torch.enable_grad)):
            models.loss_of(m, models.batches(1)[0]).backward()
            with mode():
                o.step()
            o.zero_grad()
        assert models.same(model, copied)


# What the user freezes ----------------------------------------------------------------------------


def test_a_model_frozen_and_thawed_by_the_user_goes_on() -> None:
    model, optimizer = trained(3)
    model.requires_grad_(False)
    before = models.weights(model)
    # The embedding and the block were frozen for their turns, and are thawed at them; the head was
    # not, and stays frozen.
    models.train(model, optimizer, models.batches(2))
    with pytest.raises(RuntimeError, match="does not require grad"):  # torch's own words
        models.train(model, optimizer, models.batches(1))
    assert "head.weight" not in models.changed(before, model)
    model.requires_grad_(True)
    optimizer.zero_grad()
    start = optimizer.pass_index
    models.train(model, optimizer, models.batches(6))
    assert optimizer.pass_index >= start + 2
    assert len(models.changed(before, model)) == len(before)


def test_a_freeze_of_the_active_group_lasts() -> None:
    model, optimizer = trained(3)
    model(models.batches(1)[0])  # the embedding's turn
    model.embedding.requires_grad_(False)
    before = models.weights(model)
    with pytest.warns(UserWarning, match="'embedding' has a gradient"):
        optimizer.step()
    models.train(model, optimizer, models.batches(2))
    assert models.changed(before, model) >= {"head.weight", "blocks.0.up.weight"}
    with pytest.raises(RuntimeError, match="does not require grad"):
        models.train(model, optimizer, models.batches(1))
    assert "embedding.weight" not in models.changed(before, model)
    optimizer.close()
    assert not model.embedding.weight.requires_grad


def test_gradients_of_inactive_groups_set_by_hand_are_kept_and_not_used() -> None:
    model, optimizer = trained(3)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = models.weights(model)
    optimizer.step()
    assert models.changed(before, model) == set(optimizer.groups[0].names)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    optimizer.zero_grad(set_to_none=False)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())


def test_train_and_eval_do_not_matter_and_backward_twice_adds_up() -> None:
    model, copied = (models.tiny(blocks=1) for _ in range(2))
    optimizer, reference = (hift_ext.SGD(m, lr=0.1) for m in (model, copied))
    for tokens in models.batches(4):
        model.eval()
        loss = models.loss_of(model, tokens)
        loss.backward(retain_graph=True)
        loss.backward()
        model.train()
        optimizer.step()
        optimizer.zero_grad()
        (2 * models.loss_of(copied, tokens)).backward()
        reference.step()
        reference.zero_grad()
    for p, q in zip(model.parameters(), copied.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
