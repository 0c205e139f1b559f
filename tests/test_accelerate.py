# SPDX-License-Identifier: Apache-2.0
# Accelerate, as released, around a HiFT optimizer: prepare, accumulate, clip, save and resume.
# A training under it must be the training without it, to the bit.
"""Accelerate: its wrapper takes the optimizer's state apart and hands it back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hf
import models
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader

import hift_ext


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps its settings in singletons."""
    for when in ("before", "after"):
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        if when == "before":
            yield


def loader() -> DataLoader:
    return DataLoader(hf.rows(count=48), batch_size=4, collate_fn=hf.collate)


def parts(**options: Any) -> tuple[nn.Module, hift_ext.HiFTOptimizer, LinearLR]:
    model = hf.make()
    optimizer = hift_ext.AdamW(model, lr=1e-2, **options)
    return model, optimizer, LinearLR(optimizer, 1.0, 0.1, total_iters=12)


def train(
    accelerator: Accelerator,
    prepared: Any,
    skip: int = 0,
    clip: float = 0.0,
    save: Path | None = None,
) -> None:
    """An epoch, as Accelerate's users write it; saves after six batches."""
    model, optimizer, data, scheduler = prepared
    model.train()
    for number, batch in enumerate(accelerator.skip_first_batches(data, skip), 1):
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if clip and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if save is not None and number == 6:
            accelerator.save_state(str(save))


def loop(
    model: nn.Module, optimizer: Any, scheduler: Any, accumulate: int, clip: float = 0.0
) -> None:
    """The same without Accelerate."""
    model.train()
    for number, batch in enumerate(loader(), 1):
        (model(**batch).loss / accumulate).backward()
        if number % accumulate == 0:
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("store", ["ram", "disk"])
@pytest.mark.parametrize(("accumulate", "clip"), [(1, 0.0), (3, 0.05)])
def test_prepared_trains_as_a_written_loop(accumulate, clip, store) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model, optimizer, scheduler = parts(store=store)
    prepared = accelerator.prepare(model, optimizer, loader(), scheduler)
    train(accelerator, prepared, clip=clip)
    other, by_hand, schedule = parts()
    loop(other, by_hand, schedule, accumulate, clip)
    assert optimizer.pass_index == 12 // accumulate // 4
    assert models.same(model, other)
    assert optimizer.param_groups[0]["hift"] == by_hand.param_groups[0]["hift"]


@pytest.mark.parametrize("store", ["ram", "disk"])
def test_prepare_in_the_middle_of_a_pass_keeps_everything(store) -> None:
    """Its wrapper sends the state_dict to the device and loads it: pages stay where they are."""
    model, optimizer, scheduler = parts(store=store)
    batches = [hf.collate(hf.rows()[i : i + 4]) for i in range(0, 24, 4)]
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    before = {p: {k: v.clone() for k, v in optimizer.state[p].items()} for p in model.parameters()}
    schedule, stats = dict(optimizer.param_groups[0]["hift"]), optimizer.stats()
    assert (schedule["position"], schedule["pass"]) == (2, 1)
    assert schedule["lr"] is not None
    engine = optimizer.state.engine
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(model, optimizer, loader(), scheduler)
    assert optimizer.state.engine is engine
    assert optimizer.stats()["store_bytes"] == stats["store_bytes"]
    assert optimizer.param_groups[0]["hift"] == schedule
    assert set(optimizer.state) == set(model.parameters())
    for p, state in before.items():
        for name, value in state.items():
            assert torch.equal(optimizer.state[p][name], value)
    if store == "ram":
        slab = optimizer.state[optimizer.groups[0].params[0]]["exp_avg"]
        train(accelerator, prepared)
        now = optimizer.state[optimizer.groups[0].params[0]]["exp_avg"]
        assert now.data_ptr() == slab.data_ptr()  # still the pages, not tensors beside them


@pytest.mark.parametrize("store", ["ram", "disk"])
def test_load_state_goes_on_to_the_bit(store, tmp_path) -> None:
    def prepared() -> tuple[Accelerator, Any, hift_ext.HiFTOptimizer]:
        accelerator = Accelerator(cpu=True)
        model, optimizer, scheduler = parts(store=store)
        return accelerator, accelerator.prepare(model, optimizer, loader(), scheduler), optimizer

    accelerator, wholes, whole = prepared()
    train(accelerator, wholes, save=tmp_path)

    again, others, optimizer = prepared()
    again.load_state(str(tmp_path))
    assert (optimizer.pass_index, optimizer._schedule.position) == (1, 2)
    train(again, others, skip=6)
    assert models.same(wholes[0], others[0])
    assert optimizer.param_groups[0]["hift"] == whole.param_groups[0]["hift"]
    assert optimizer.param_groups[0]["lr"] == whole.param_groups[0]["lr"]


def test_bf16_mixed_precision_equals_autocast() -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model, optimizer, scheduler = parts()
    train(accelerator, accelerator.prepare(model, optimizer, loader(), scheduler))
    other, by_hand, schedule = parts()
    for batch in loader():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = other(**batch).loss
        loss.backward()
        by_hand.step()
        schedule.step()
        by_hand.zero_grad()
    assert models.same(model, other)
    full, plain, schedule = parts()
    loop(full, plain, schedule, 1)
    assert not models.same(model, full)  # it did compute in bf16


def test_a_scaler_s_skipped_step_keeps_the_turn() -> None:
    """Accelerate steps through its scaler, and puts a step of its own on the optimizer."""
    from accelerate.optimizer import AcceleratedOptimizer

    Accelerator(cpu=True)
    model, optimizer, _ = parts()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
    wrapped = AcceleratedOptimizer(optimizer, scaler=scaler)
    before = models.weights(model)
    for number, batch in enumerate(list(loader())[:4]):
        scaler.scale(model(**batch).loss).backward()
        if number == 1:
            optimizer.groups[optimizer.active].params[0].grad.fill_(float("inf"))
        turn, count = optimizer.active, len(optimizer.state)
        wrapped.step()
        wrapped.zero_grad()
        assert optimizer.active == (turn if number == 1 else turn + 1)
        assert len(optimizer.state) == count + (number != 1) * len(optimizer.groups[turn].params)
    assert scaler.get_scale() == 4.0
    trained = {name for group in optimizer.groups[:3] for name in group.names}
    assert models.changed(before, model) == trained
