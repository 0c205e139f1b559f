# SPDX-License-Identifier: Apache-2.0
# The policy as a user meets it: which group is trained when, at which rate, and what is said.
# Numbers are compared to the bit with a plain-torch HiFT loop, or to torch.optim itself.
"""Turns, freezing, learning rates, gradient accumulation."""

from __future__ import annotations

import warnings

import models
import pytest
import torch
from reference import ReferenceHiFT
from torch import nn

import hift_ext


def names(optimizer: hift_ext.HiFTOptimizer, index: int) -> set[str]:
    return set(optimizer.groups[index].names)


@pytest.mark.parametrize("order", ["bottom2up", "top2down", "random", [2, 0, 3, 1, 5, 4]])
def test_each_step_changes_exactly_the_active_group(order) -> None:
    model = models.tiny()
    optimizer = hift_ext.AdamW(model, lr=1e-2, order=order, seed=3)
    assert len(optimizer.groups) == 6
    turns = []
    for tokens in models.batches(12):
        before, active = models.weights(model), optimizer.active
        models.train(model, optimizer, [tokens])
        assert models.changed(before, model) == names(optimizer, active)
        turns.append(active)
    assert sorted(turns[:6]) == list(range(6))
    assert turns[:6] == turns[6:]  # the order is fixed, also the random one
    assert optimizer.pass_index == 2
    if isinstance(order, list):
        assert turns[:6] == order
    if order == "random":
        assert turns[:6] != list(range(6))


def test_random_order_follows_the_seed() -> None:
    orders = {
        seed: hift_ext.AdamW(models.tiny(6), order="random", seed=seed).param_groups[0]["hift"]
        for seed in (0, 1, 2)
    }
    assert orders[0] == hift_ext.AdamW(models.tiny(6), order="random").param_groups[0]["hift"]
    assert len({tuple(state["order"]) for state in orders.values()}) > 1


@pytest.mark.parametrize("order", ["sideways", [0, 1], [0, 0, 1, 2, 3, 4], [1, 2, 3, 4, 5, 6]])
def test_bad_order(order) -> None:
    with pytest.raises(ValueError, match="order must"):
        hift_ext.AdamW(models.tiny(), order=order)


@pytest.mark.parametrize(("m", "k"), [(1, 6), (2, 3), (4, 2), (5, 2), (6, 1), (100, 1), ("all", 1)])
def test_groups_are_fixed_when_m_does_not_divide_n(m, k) -> None:
    model = models.tiny()
    optimizer = hift_ext.SGD(model, lr=0.1, layers_per_group=m)
    assert len(optimizer.groups) == k
    seen: dict[int, set[str]] = {}
    for tokens in models.batches(3 * k):
        before, active = models.weights(model), optimizer.active
        models.train(model, optimizer, [tokens])
        assert seen.setdefault(active, models.changed(before, model)) == models.changed(
            before, model
        )
    assert set().union(*seen.values()) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("m", [0, -1, 1.5, True, "some"])
def test_bad_layers_per_group(m) -> None:
    with pytest.raises(ValueError, match="layers_per_group"):
        hift_ext.AdamW(models.tiny(), layers_per_group=m)


@pytest.mark.parametrize("order", ["bottom2up", "top2down"])
@pytest.mark.parametrize(
    ("ours", "theirs", "settings"),
    [
        (hift_ext.AdamW, torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-4}),
        (hift_ext.Adam, torch.optim.Adam, {"lr": 1e-2, "amsgrad": True, "eps": 1e-4}),
        (hift_ext.Adagrad, torch.optim.Adagrad, {"lr": 5e-2, "lr_decay": 0.1}),
        (hift_ext.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
        (hift_ext.SGD, torch.optim.SGD, {"lr": 0.1}),
    ],
)
def test_equals_a_plain_torch_hift_loop(ours, theirs, settings, order) -> None:
    model = models.tiny()
    copied = models.twin(model)
    by_name = dict(copied.named_parameters())
    optimizer = ours(model, order=order, **settings)
    reference = ReferenceHiFT(
        [[by_name[name] for name in group.names] for group in optimizer.groups],
        theirs,
        optimizer.param_groups[0]["hift"]["order"],
        **settings,
    )
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=24)
    for tokens in models.batches(24):
        reference.lr = optimizer.param_groups[0]["lr"]
        loss = models.loss_of(model, tokens)
        loss.backward()
        optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler.step()
        optimizer.zero_grad()
        reference.freeze()
        other = models.loss_of(copied, tokens)
        other.backward()
        reference.step()
        torch.testing.assert_close(loss, other, rtol=1e-5, atol=1e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, by_name[name], rtol=2e-5, atol=2e-6)


def test_rate_is_latched_for_a_pass_and_per_param_group() -> None:
    model = models.tiny(blocks=1)
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = hift_ext.SGD(
        [{"params": decay, "lr": 1.0}, {"params": rest, "lr": 0.5}], model=model
    )
    data = models.batches(6)
    for step, tokens in enumerate(data):
        optimizer.param_groups[0]["lr"] = 1.0 / (step + 1)
        optimizer.param_groups[1]["lr"] = 0.5 / (step + 1)
        assert optimizer.current_lr == pytest.approx(1.0 if step < 3 else 0.25)
        models.loss_of(model, tokens).backward()
        expected = {}
        for p in optimizer.groups[optimizer.active].params:
            rate = (1.0 if p.dim() > 1 else 0.5) / (1 if step < 3 else 4)
            expected[p] = p.detach() - rate * p.grad
        optimizer.step()
        optimizer.zero_grad()
        for p, value in expected.items():
            torch.testing.assert_close(p.detach(), value, rtol=1e-6, atol=1e-7)


def test_other_settings_are_read_at_every_step() -> None:
    model = models.tiny(blocks=1)
    optimizer = hift_ext.AdamW(model, lr=0.1, weight_decay=0.0)
    models.train(model, optimizer, models.batches(1))
    optimizer.param_groups[0]["weight_decay"] = 1.0
    group = optimizer.groups[optimizer.active]
    models.loss_of(model, models.batches(2)[1]).backward()
    for p in group.params:
        p.grad.zero_()
    before = [p.detach().clone() for p in group.params]
    optimizer.step()
    for p, old in zip(group.params, before, strict=True):
        torch.testing.assert_close(p.detach(), old * 0.9)


def test_zero_rate_warns_once() -> None:
    model = models.tiny(blocks=1)
    optimizer = hift_ext.AdamW(model, lr=0.0)
    with pytest.warns(UserWarning, match="learning rate 0.0") as record:
        models.train(model, optimizer, models.batches(6))
    assert len(record) == 1
    assert record[0].filename == models.__file__  # it points at the user's step()


def test_visits_count_per_parameter() -> None:
    model = models.tiny(blocks=2)
    optimizer = hift_ext.AdamW(model, lr=1e-3)
    models.train(model, optimizer, models.batches(6))
    for index, group in enumerate(optimizer.groups):
        for p in group.params:
            assert optimizer.state[p]["step"].item() == (2 if index < 2 else 1)


def test_gradient_accumulation_turns_on_steps_not_on_micro_batches() -> None:
    model, data = models.tiny(blocks=2), models.batches(24)
    copied = models.twin(model)
    accumulated = hift_ext.AdamW(model, lr=1e-2)
    whole = hift_ext.AdamW(copied, lr=1e-2)
    for start in range(0, 24, 4):
        active = accumulated.active
        for tokens in data[start : start + 4]:
            (models.loss_of(model, tokens) / 4).backward()
            assert accumulated.active == active
        accumulated.step()
        accumulated.zero_grad()
        loss = sum(models.loss_of(copied, tokens) for tokens in data[start : start + 4]) / 4
        loss.backward()
        whole.step()
        whole.zero_grad()
    for p, q in zip(model.parameters(), copied.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_construction_freezes_and_allocates_nothing() -> None:
    model = models.tiny()
    optimizer = hift_ext.AdamW(model)
    assert all(p.requires_grad for p in model.parameters())
    assert optimizer.stats()["store_bytes"] == 0
    models.loss_of(model, models.batches(1)[0])
    assert {n for n, p in model.named_parameters() if p.requires_grad} == names(optimizer, 0)


def test_backward_stops_at_the_active_group() -> None:
    model = models.tiny()
    optimizer = hift_ext.AdamW(model, order="top2down")
    reached = []
    model.blocks[2].register_full_backward_hook(lambda *_: reached.append(1))
    models.train(model, optimizer, models.batches(1))
    assert not reached
    assert all(p.grad is None for p in model.blocks.parameters())


def test_frozen_by_the_user_stay_frozen_and_keep_their_index() -> None:
    model = models.tiny()
    model.embedding.requires_grad_(False)
    before = models.weights(model)
    optimizer = hift_ext.AdamW(model, lr=1e-2)
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))
    assert len(optimizer.groups) == 5
    models.train(model, optimizer, models.batches(10))
    assert "embedding.weight" not in models.changed(before, model)
    optimizer.close()
    assert not model.embedding.weight.requires_grad
    assert all(p.requires_grad for n, p in model.named_parameters() if n != "embedding.weight")


def test_without_a_module_freezing_happens_in_the_constructor_and_in_step() -> None:
    model = models.tiny(blocks=1)
    optimizer = hift_ext.AdamW(model.named_parameters(), lr=1e-2)
    for turn in range(4):
        trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trainable == names(optimizer, turn % 3)
        models.train(model, optimizer, models.batches(1))


def test_step_without_any_gradient_advances_and_warns_once() -> None:
    model = models.tiny(blocks=1)
    before = models.weights(model)
    optimizer = hift_ext.AdamW(model, lr=1e-2)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for _ in range(7):
            optimizer.step()
    texts = [str(w.message) for w in record]
    assert len(texts) == 2
    assert "'embedding' has a gradient" in texts[0]
    assert "backward() was not called" in texts[0]
    assert "could not reach 'embedding', 'blocks.0'" in texts[1]
    assert "groups=" in texts[1]
    assert optimizer.pass_index == 2
    assert not models.changed(before, model)
    assert len(optimizer.state) == 0


def test_gradient_that_is_none_is_skipped_as_in_torch() -> None:
    used, unused = nn.Linear(3, 3), nn.Linear(3, 3)
    model = nn.ModuleDict({"used": used, "unused": unused})
    optimizer = hift_ext.AdamW(model.parameters(), lr=0.1, layers_per_group="all")
    before = models.weights(model)
    for _ in range(3):
        used(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    assert models.changed(before, model) == {"used.weight", "used.bias"}
    assert set(optimizer.state) == set(used.parameters())


def test_closure() -> None:
    model = models.tiny(blocks=1)
    optimizer = hift_ext.AdamW(model, lr=1e-2)
    tokens = models.batches(1)[0]

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = models.loss_of(model, tokens)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(9)]
    assert losses[-1] < losses[0]


def test_weights_changed_between_forward_and_backward_raise() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    optimizer = hift_ext.SGD(model.parameters(), lr=0.1, layers_per_group="all")
    model(torch.ones(2, 4)).sum().backward()
    late = model(torch.ones(2, 4)).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()


def test_names_model_groups_or_all_are_needed() -> None:
    parameters = list(models.tiny().parameters())
    with pytest.raises(ValueError, match="named_parameters"):
        hift_ext.AdamW(parameters)
    hift_ext.AdamW(parameters, layers_per_group="all")
    optimizer = hift_ext.AdamW(parameters, groups=[parameters[:3], parameters[3:]])
    assert [len(group.params) for group in optimizer.groups] == [3, len(parameters) - 3]
    optimizer.close()
    with pytest.raises(ValueError, match="in no group"):
        hift_ext.AdamW(parameters, groups=[parameters[:3]])


def test_hints_are_accepted_and_impossible_ones_refused() -> None:
    model = models.tiny(blocks=1)
    for hints in ({"foreach": True}, {"fused": True}, {"foreach": False, "fused": False}):
        models.train(model, hift_ext.AdamW(model, **hints), models.batches(1))
    with pytest.raises(ValueError, match="capturable=True is not offered"):
        hift_ext.AdamW(model, capturable=True)
    with pytest.raises(ValueError, match="differentiable=True is not offered"):
        hift_ext.SGD(model, differentiable=True)
    with pytest.raises(TypeError, match="unknown argument 'layers_per_groups'"):
        hift_ext.AdamW(model, layers_per_groups=2)
    with pytest.raises(ValueError, match="state_dtype"):
        hift_ext.AdamW(model, state_dtype=torch.float64)


def test_step_hooks_and_profile_hooks_run() -> None:
    model, calls = models.tiny(blocks=1), []
    optimizer = hift_ext.AdamW(model)
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    models.train(model, optimizer, models.batches(2))
    assert calls == ["pre", "post"] * 2
