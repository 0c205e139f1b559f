# SPDX-License-Identifier: Apache-2.0
# Every learning-rate scheduler of torch and transformers, run as its users run it: over the steps.
# Beside it a HiFT loop in plain torch, which is handed the rate of the pass's first step.
"""Schedulers: latched for a pass, and otherwise what they are with torch's optimizers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from reference import ReferenceHiFT
from torch.optim import lr_scheduler as lrs
from torch.optim.swa_utils import SWALR
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType

import hift_ext

HORIZON = 12  # steps, the T of every scheduler here; four passes of three groups

TORCH: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lrs.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lrs.StepLR(o, step_size=2, gamma=0.5),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, milestones=[2, 7], gamma=0.3),
    "ConstantLR": lambda o: lrs.ConstantLR(o, factor=0.5, total_iters=4),
    "LinearLR": lambda o: lrs.LinearLR(o, 1.0, 0.1, total_iters=HORIZON),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, gamma=0.9),
    "PolynomialLR": lambda o: lrs.PolynomialLR(o, total_iters=HORIZON, power=2.0),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, T_max=HORIZON),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, T_0=5),
    "CyclicLR": lambda o: lrs.CyclicLR(o, base_lr=1e-3, max_lr=1e-2, step_size_up=4),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, max_lr=1e-2, total_steps=HORIZON),
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "ChainedScheduler": lambda o: lrs.ChainedScheduler(
        [lrs.ConstantLR(o, factor=0.1, total_iters=3), lrs.ExponentialLR(o, gamma=0.9)]
    ),
    "SequentialLR": lambda o: lrs.SequentialLR(
        o,
        [lrs.LinearLR(o, 0.1, 1.0, total_iters=4), lrs.CosineAnnealingLR(o, T_max=HORIZON - 4)],
        milestones=[4],
    ),
    "SWALR": lambda o: SWALR(o, swa_lr=1e-3, anneal_epochs=HORIZON),
}
WARM_UP = 4
SPECIFIC = {
    "cosine_with_min_lr": {"min_lr": 1e-4},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-4, "warmup_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 4},
    "reduce_lr_on_plateau": {"patience": 1, "factor": 0.5},
    "greedy": {"patience": 1, "factor": 0.5, "smooth": False},
}
CASES = [
    *((name, hift_ext.AdamW, torch.optim.AdamW, {"lr": 1e-2}) for name in TORCH),
    *((kind.value, hift_ext.AdamW, torch.optim.AdamW, {"lr": 1e-2}) for kind in SchedulerType),
    # These two cycle the momentum too, which is not latched.
    *(
        (name, hift_ext.SGD, torch.optim.SGD, {"lr": 1e-1, "momentum": 0.9})
        for name in ("CyclicLR", "OneCycleLR")
    ),
]


def make(name: str, optimizer: torch.optim.Optimizer) -> Any:
    if name in TORCH:
        return TORCH[name](optimizer)
    return get_scheduler(
        name,
        optimizer,
        num_warmup_steps=WARM_UP,
        num_training_steps=HORIZON,
        scheduler_specific_kwargs=dict(SPECIFIC.get(name, {})),
    )


def test_every_scheduler_of_torch_is_here() -> None:
    classes = {
        name
        for name, value in vars(lrs).items()
        if isinstance(value, type) and issubclass(value, lrs.LRScheduler)
    }
    assert classes - {"LRScheduler", "_LRScheduler"} <= TORCH.keys()


@pytest.mark.parametrize(
    ("name", "ours", "theirs", "settings"), CASES, ids=[f"{c[0]}-{c[1].__name__}" for c in CASES]
)
def test_equals_a_plain_torch_loop_with_the_same_scheduler(name, ours, theirs, settings) -> None:
    model = models.tiny(blocks=1)
    copied = models.twin(model)
    by_name = dict(copied.named_parameters())
    optimizer = ours(model, **settings)
    groups = [[by_name[name] for name in group.names] for group in optimizer.groups]
    reference = ReferenceHiFT(groups, theirs, **settings)
    clock = theirs([torch.nn.Parameter(torch.zeros(1))], **settings)  # only for its scheduler
    scheduler, other = make(name, optimizer), make(name, clock)
    by_metric = name in ("ReduceLROnPlateau", "reduce_lr_on_plateau", "greedy")
    rates, latched = [], 0.0
    for step, tokens in enumerate(models.batches(HORIZON)):
        now = clock.param_groups[0]
        if step % 3 == 0:
            latched = float(now["lr"])
        rates.append(float(now["lr"]))
        assert optimizer.current_lr == latched  # exactly: before the step that uses it
        reference.lr = latched
        for group in reference.optimizers:  # what a scheduler cycles beside the rate
            group.param_groups[0].update(
                {key: now[key] for key in ("betas", "momentum") if key in now}
            )
        clock.step()
        models.loss_of(model, tokens).backward()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="pass 0 runs at the learning rate 0.0")
            optimizer.step()
        if step % 3 < 2:
            assert optimizer.current_lr == latched  # and after it, until the pass is over
        optimizer.zero_grad()
        metric = (step / HORIZON,) if by_metric else ()  # it grows: a plateau
        scheduler.step(*metric)
        other.step(*metric)
        reference.freeze()
        models.loss_of(copied, tokens).backward()
        reference.step()
    assert optimizer.param_groups[0]["lr"] == clock.param_groups[0]["lr"]
    if name != "constant":
        assert len(set(rates)) > 1
        assert len(set(rates[::3])) > 1  # latching the last rate, or the first one, would show
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, by_name[name], rtol=2e-5, atol=2e-6)


def test_the_schedule_ends_where_its_user_wrote() -> None:
    """T counts steps, not passes or visits; the scheduler neither stops early nor runs over."""
    model = models.tiny(blocks=1)
    optimizer = hift_ext.AdamW(model, lr=1e-2)
    scheduler = lrs.OneCycleLR(optimizer, max_lr=1e-2, total_steps=HORIZON)
    for tokens in models.batches(HORIZON - 1):
        models.train(model, optimizer, [tokens])
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 / 25 / 1e4)
    assert optimizer.current_lr > optimizer.param_groups[0]["lr"]  # the last pass's, latched
    models.train(model, optimizer, models.batches(1))
    scheduler.step()
    with pytest.raises(ValueError, match="Tried to step 13 times"):
        scheduler.step()


def test_each_param_group_has_its_own_schedule() -> None:
    model = models.tiny(blocks=1)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = hift_ext.SGD([{"params": matrices}, {"params": rest}], lr=1.0, model=model)
    scheduler = lrs.LambdaLR(optimizer, [lambda step: 0.5**step, lambda step: 0.25**step])
    for step, tokens in enumerate(models.batches(6)):
        models.loss_of(model, tokens).backward()
        start = step - step % 3
        expected = {
            p: p.detach() - (0.5 if p.dim() > 1 else 0.25) ** start * p.grad
            for p in optimizer.groups[optimizer.active].params
        }
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        for p, value in expected.items():
            torch.testing.assert_close(p.detach(), value, rtol=1e-6, atol=1e-7)


def test_warm_up_from_zero_is_said_once() -> None:
    model = models.tiny(blocks=1)
    optimizer = hift_ext.AdamW(model, lr=1e-2)
    scheduler = make("linear", optimizer)
    before = models.weights(model)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for tokens in models.batches(3):
            models.train(model, optimizer, [tokens])
            scheduler.step()
    assert ["pass 0 runs at the learning rate 0.0" in str(w.message) for w in record] == [True]
    assert not models.changed(before, model)  # what it says is so
    models.train(model, optimizer, models.batches(1))
    assert models.changed(before, model)


def test_a_copy_made_under_a_scheduler_steps_itself() -> None:
    """A scheduler wraps its optimizer's `step`; a copy must not carry the wrapper along."""
    model = models.tiny(blocks=1)
    optimizer = hift_ext.AdamW(model, lr=1e-2)
    lrs.LinearLR(optimizer, 1.0, 0.1, total_iters=HORIZON)
    models.train(model, optimizer, models.batches(2))
    copied_model, copied = copy.deepcopy((model, optimizer))
    before = models.weights(model)
    models.train(copied_model, copied, models.batches(2))
    assert not models.changed(before, model)
    assert (copied._schedule.position, optimizer._schedule.position) == (1, 2)
    assert models.changed(before, copied_model)
