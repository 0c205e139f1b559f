# SPDX-License-Identifier: Apache-2.0
# torch's own distributed checkpoints, in one process: they call step() to make state, and deal only
# in parameters that require a gradient. Neither may move the schedule or lose state.
"""torch.distributed.checkpoint, get_state_dict, set_state_dict."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

import hift_ext

RULES: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (hift_ext.AdamW, {}),
    "adagrad": (hift_ext.Adagrad, {"initial_accumulator_value": 0.5}),
    "momentum": (hift_ext.SGD, {"momentum": 0.9, "dampening": 0.2}),
    "sgd": (hift_ext.SGD, {}),
}
OPTIONS = {
    "plain": {},
    "flat": {"flatten_optimizer_state_dict": True},
    "full": {"full_state_dict": True},
    "full on cpu": {"full_state_dict": True, "cpu_offload": True},
    "on cpu": {"cpu_offload": True},
}


def make(rule: str, **options: Any):
    kind, settings = RULES[rule]
    model = models.tiny(blocks=2, width=8)
    return model, kind(model, **{"lr": 1e-2, **settings, **options})


def standing(optimizer: hift_ext.HiFTOptimizer) -> tuple[Any, ...]:
    """Where an optimizer stands, and the weights."""
    visits = [entry.visits for entry in optimizer.state.entries.values()]
    members = [p for group in optimizer.groups for p in group.params]
    return (
        dict(optimizer.param_groups[0]["hift"]),
        visits,
        [float(group["lr"]) for group in optimizer.param_groups],
        [p.detach().clone().flatten().tolist() for p in members],
    )


# torch's own SGD without momentum fails with full_state_dict: "Expected device to be set".
PAIRS = [(rule, kind) for rule in RULES for kind in OPTIONS if rule != "sgd" or "full" not in kind]
CASES = [
    *((rule, kind, 2) for rule, kind in PAIRS),  # in the middle of the first pass
    *((rule, kind, 9) for rule, kind in PAIRS if kind == "flat" or rule == "adamw"),  # the third
]


@pytest.mark.parametrize(("rule", "kind", "steps"), CASES)
def test_round_trip(rule, kind, steps, tmp_path) -> None:
    options = StateDictOptions(**OPTIONS[kind])
    model, optimizer = make(rule)
    models.train(model, optimizer, models.batches(steps))
    before = standing(optimizer)
    weights, state = get_state_dict(model, optimizer, options=options)
    assert standing(optimizer) == before
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path)

    for used in (0, 3):  # a new optimizer, and one that has frozen all but its active group
        again, resumed = make(rule, lr=0.5)
        models.train(again, resumed, models.batches(used, seed=3))
        fresh = get_state_dict(again, resumed, options=options)
        target = dict(zip(("model", "optimizer"), fresh, strict=True))
        dcp.load(target, checkpoint_id=tmp_path)
        set_state_dict(
            again,
            resumed,
            model_state_dict=target["model"],
            optim_state_dict=target["optimizer"],
            options=options,
        )
        there = standing(resumed)
        assert there[0] == before[0]
        assert there[2:] == before[2:]
        if resumed.has_step:
            assert there[1] == before[1]
        twin, reference = make(rule)
        models.train(twin, reference, models.batches(steps))
        for m, o in ((twin, reference), (again, resumed)):
            models.train(m, o, models.batches(7, seed=4))
        assert models.same(twin, again)


@pytest.mark.parametrize(
    ("rule", "forward", "store"),
    [
        *((rule, forward, "ram") for rule in RULES for forward in (False, True)),
        ("adamw", True, "disk"),
        ("adagrad", True, "device"),
    ],
)
def test_asking_for_state_is_no_step(rule, forward, store) -> None:
    model, optimizer = make(rule, store=store)
    if forward:  # freezes all but the active group
        models.loss_of(model, models.batches(1)[0])
    before = standing(optimizer)
    state = get_optimizer_state_dict(model, optimizer)["state"]
    assert standing(optimizer) == before
    assert all(p.grad is None for p in model.parameters())
    if rule != "sgd":
        assert state.keys() == dict(model.named_parameters()).keys()
    for entry in state.values():
        assert entry.get("step", 0) == 0
        for name in entry.keys() - {"step"}:
            assert torch.all(entry[name] == (0.5 if name == "sum" else 0))
    twin, reference = make(rule, store=store)
    models.train(model, optimizer, models.batches(9))
    models.train(twin, reference, models.batches(9))
    assert models.same(model, twin)
    assert optimizer.param_groups[0]["hift"] == reference.param_groups[0]["hift"]
    frozen = [not p.requires_grad for p in model.parameters()]
    assert any(frozen)
    optimizer.close()
    reference.close()


def test_a_warm_up_step_at_rate_0_is_a_step() -> None:
    model, optimizer = make("adamw", lr=0.0)
    with pytest.warns(UserWarning, match=r"learning rate 0\.0"):
        models.train(model, optimizer, models.batches(1))
    assert optimizer.active == 1
    assert len(optimizer.state) == 1
    whole = models.tiny(blocks=1, width=8)
    one = hift_ext.AdamW(whole, lr=0.0, layers_per_group="all")
    with pytest.warns(UserWarning, match=r"learning rate 0\.0"):
        models.train(whole, one, models.batches(1))
    assert one.pass_index == 1
    assert all(int(entry["step"]) == 1 for entry in one.state.values())
    # Zeros in the active group alone: it is its turn.
    lazy, optimizer = make("adamw", lr=0.0)
    models.loss_of(lazy, models.batches(1)[0])
    lazy.embedding.weight.grad = torch.zeros_like(lazy.embedding.weight)
    with pytest.warns(UserWarning, match=r"learning rate 0\.0"):
        optimizer.step()
    assert optimizer.active == 1


def test_named_parameters_without_a_model_stay_frozen() -> None:
    model = models.tiny(blocks=2, width=8)
    optimizer = hift_ext.AdamW(list(model.named_parameters()), lr=1e-2)
    models.train(model, optimizer, models.batches(5))
    frozen = [p.requires_grad for p in model.parameters()]
    state = get_optimizer_state_dict(model, optimizer)
    assert [p.requires_grad for p in model.parameters()] == frozen
    set_optimizer_state_dict(model, optimizer, state)
    assert [p.requires_grad for p in model.parameters()] == frozen
    assert [entry.visits for entry in optimizer.state.entries.values()][:2] == [2, 1]


def test_another_number_of_groups(tmp_path) -> None:
    """torch merges a loaded order into the one that is there, number by number."""
    options = StateDictOptions(full_state_dict=True)
    model = models.tiny(blocks=2, width=8)
    optimizer = hift_ext.AdamW(model, layers_per_group=2, order=[1, 0])
    models.train(model, optimizer, models.batches(3))
    state = get_optimizer_state_dict(model, optimizer, options=options)
    visits = [entry.visits for entry in optimizer.state.entries.values()]
    optimizer.close()
    again, resumed = make("adamw")
    with pytest.warns(UserWarning, match="of 2 groups, this optimizer has 4"):
        set_optimizer_state_dict(again, resumed, state, options=options)
    assert resumed.active == 0
    assert [entry.visits for entry in resumed.state.entries.values()] == visits


def test_loading_into_a_state_dict_leaves_the_schedule_alone() -> None:
    model, optimizer = make("adamw")
    models.train(model, optimizer, models.batches(2))
    taken = optimizer.state_dict()["param_groups"][0]["hift"]
    taken["position"] = 0
    taken["order"].reverse()
    taken["lr"][0] = 7.0
    assert optimizer.active == 2
    assert optimizer.current_lr == 1e-2
