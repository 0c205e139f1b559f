# SPDX-License-Identifier: Apache-2.0
# The Hugging Face Trainer, as released, around tiny models: it must train as a written loop does.
# Bits are compared; the Trainer makes the batches, and the loop is given the same.
"""Trainer: optimizers=, optimizer_cls_and_kwargs=, resuming, clipping, schedules, logs."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import hf
import models
import pytest
import torch
from torch import nn
from transformers import TrainerCallback, get_scheduler

import hift_ext
from hift_ext.integrations import HiFTCallback, for_trainer, watch


def inner(trainer: Any) -> hift_ext.HiFTOptimizer:
    """The optimizer under accelerate's wrapper."""
    return trainer.optimizer.optimizer


def loop(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    batches: list[dict[str, torch.Tensor]],
    accumulate: int = 1,
    clip: float = 1.0,
) -> None:
    """What the Trainer does, written out."""
    model.train()
    for start in range(0, len(batches), accumulate):
        micro = batches[start : start + accumulate]
        # The Trainer has models divide by the step's labels (a language model's are shifted).
        labels = [batch["labels"][..., 1 if batch["labels"].dim() > 1 else 0 :] for batch in micro]
        items = torch.tensor(float(sum(part.numel() for part in labels)))
        for batch in micro:
            model(**batch, num_items_in_batch=items).loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_optimizers_equals_a_written_loop(kind, accumulate, tmp_path) -> None:
    model = hf.make(kind)
    copied = models.twin(model)
    optimizer = hift_ext.AdamW(model, lr=1e-2)
    scheduler = get_scheduler("cosine", optimizer, 0, 10)
    seen = hf.Recorder()
    args = hf.arguments(tmp_path, gradient_accumulation_steps=accumulate)
    trainer = hf.trainer(
        model,
        args,
        train_dataset=hf.rows(kind),
        data_collator=seen,
        optimizers=(optimizer, scheduler),
    )
    trainer.train()
    assert len(optimizer.groups) == hf.GROUPS[kind]
    assert (optimizer.pass_index, optimizer._schedule.position) == (2, 2)

    other = hift_ext.AdamW(copied, lr=1e-2)
    batches = seen.batches[: 10 * accumulate]
    loop(copied, other, get_scheduler("cosine", other, 0, 10), batches, accumulate)
    assert models.same(model, copied)
    assert not models.same(model, hf.make(kind))


@pytest.mark.parametrize("store", ["ram", "disk"])
def test_resume_from_checkpoint_goes_on_to_the_bit(store, tmp_path) -> None:
    """In the middle of a pass, with dropout, accumulation, a schedule and evaluation."""

    def prepared(name: str) -> tuple[nn.Module, Any]:
        model = hf.make(dropout=0.1)
        args = hf.arguments(
            tmp_path / name,
            save_strategy="steps",
            save_steps=6,
            eval_strategy="steps",
            eval_steps=4,
            gradient_accumulation_steps=2,
            lr_scheduler_type="linear",
        )
        optimizer = hift_ext.AdamW(model, lr=1e-2, store=store, order="random", seed=5)
        data = {"train_dataset": hf.rows(), "eval_dataset": hf.rows(count=8)}
        return model, hf.trainer(model, args, optimizers=(optimizer, None), **data)

    model, trainer = prepared("whole")
    trainer.train()
    whole = inner(trainer)

    resumed_model, resumed = prepared("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    again = inner(resumed)
    saved = torch.load(tmp_path / "whole/checkpoint-6/optimizer.pt", weights_only=True)
    assert saved["param_groups"][0]["hift"]["position"] == 2  # of four
    assert len(hf.logged(resumed)) == 10  # six of them from the checkpoint
    assert again.param_groups[0]["hift"] == whole.param_groups[0]["hift"]
    assert models.same(model, resumed_model)
    for p, q in zip(model.parameters(), resumed_model.parameters(), strict=True):
        assert whole.state[p].keys() == again.state[q].keys()
        for name, value in whole.state[p].items():
            assert torch.equal(value, again.state[q][name])


def test_the_pair_makes_the_optimizer_that_args_describe(tmp_path) -> None:
    model = hf.make()
    copied = models.twin(model)
    seen = hf.Recorder()
    args = hf.arguments(
        tmp_path, weight_decay=0.3, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6
    )
    pair = for_trainer(args, layers_per_group=2)
    trainer = hf.trainer(model, args, data_collator=seen, optimizer_cls_and_kwargs=pair)
    trainer.train()
    optimizer = inner(trainer)
    assert type(optimizer) is hift_ext.AdamW
    assert len(optimizer.groups) == 2

    # The Trainer's own optimizer has the same param_groups.
    torchs = hf.trainer(copied, args).create_optimizer()
    settings = {"lr", "betas", "eps", "weight_decay"}
    for ours, theirs in zip(optimizer.param_groups, torchs.param_groups, strict=True):
        assert [p.shape for p in ours["params"]] == [p.shape for p in theirs["params"]]
        assert {k: theirs[k] for k in settings - {"lr"}} == {k: ours[k] for k in settings - {"lr"}}
        assert ours["initial_lr"] == theirs["lr"] == 1e-2
    by_hand = hift_ext.AdamW(
        [{k: group[k] for k in ("params", "weight_decay")} for group in torchs.param_groups],
        lr=1e-2,
        betas=(0.8, 0.95),
        eps=1e-6,
        model=copied,
        layers_per_group=2,
    )
    loop(copied, by_hand, get_scheduler("linear", by_hand, 0, 10), seen.batches[:10])
    assert models.same(model, copied)


def test_the_pair_takes_settings_and_every_class(tmp_path) -> None:
    args = hf.arguments(tmp_path, max_steps=1, weight_decay=0.3)
    for cls in (hift_ext.Adam, hift_ext.Adagrad, hift_ext.SGD):
        pair = for_trainer(args, cls, lr=0.5, weight_decay=0.1, order="top2down")
        trainer = hf.trainer(hf.make(), args, optimizer_cls_and_kwargs=pair)
        optimizer = trainer.create_optimizer()
        assert type(optimizer) is cls
        assert optimizer.active == 3
        assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
        assert optimizer.param_groups[0]["lr"] == 0.5
        if cls is hift_ext.Adagrad:
            assert optimizer.param_groups[0]["eps"] == 1e-10  # Adagrad's own


def test_the_pair_with_model_init_trains_again_from_the_start(tmp_path) -> None:
    """The Trainer makes a model and an optimizer for every train(); arguments are read anew."""
    args = hf.arguments(tmp_path)
    trainer = hf.trainer(
        None, args, model_init=lambda: hf.make(), optimizer_cls_and_kwargs=for_trainer(args)
    )
    trainer.train()
    first, weights = inner(trainer), models.weights(trainer.model)
    trainer.train()
    assert inner(trainer) is not first
    assert not models.changed(weights, trainer.model)
    args.learning_rate = 3e-3  # as a hyper-parameter search sets it
    trainer.train()
    assert inner(trainer).param_groups[0]["initial_lr"] == 3e-3
    assert models.changed(weights, trainer.model)


def test_the_pair_sees_through_a_copy_of_a_model_in_training(tmp_path) -> None:
    model = hf.make()
    optimizer = hift_ext.AdamW(model)
    model(**hf.collate(hf.rows(count=2)))
    copied = models.copy.deepcopy(model)  # with all but one group frozen
    args = hf.arguments(tmp_path)
    pair = for_trainer(args)
    other = hf.trainer(copied, args, optimizer_cls_and_kwargs=pair).create_optimizer()
    assert len(other.groups) == len(optimizer.groups)
    with pytest.raises(RuntimeError, match="still open"):
        hf.trainer(model, args, optimizer_cls_and_kwargs=pair).create_optimizer()


def test_what_the_pair_refuses(tmp_path) -> None:
    args = hf.arguments(tmp_path)
    with pytest.raises(TypeError, match="makes HiFT optimizers"):
        for_trainer(args, torch.optim.AdamW)
    factory, settings = for_trainer(args, lr=1e-3)
    with pytest.raises(TypeError, match="hands over parameters"):
        factory([{"params": [nn.Parameter(torch.ones(1))]}], **settings)
    bare = hf.trainer(hf.make(), args, optimizer_cls_and_kwargs=(hift_ext.AdamW, {"lr": 1e-3}))
    with pytest.raises(ValueError, match="for_trainer"):
        bare.create_optimizer()


def test_evaluation_changes_nothing(tmp_path) -> None:
    trained = []
    for settings in ({}, {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}):
        model = hf.make()
        trainer = hf.trainer(
            model,
            hf.arguments(tmp_path, **settings),
            eval_dataset=hf.rows(count=8),
            optimizers=(hift_ext.AdamW(model, lr=1e-2), None),
        )
        trainer.train()
        trained.append(model)
    assert any("eval_loss" in row for row in trainer.state.log_history)
    assert models.same(*trained)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("linear", {}),
        ("cosine", {"warmup_steps": 3}),
        ("constant_with_warmup", {"warmup_steps": 3}),
        ("polynomial", {}),
        ("inverse_sqrt", {"warmup_steps": 2}),
        ("reduce_lr_on_plateau", {"lr_scheduler_kwargs": {"patience": 0, "threshold": 9.0}}),
    ],
)
@pytest.mark.filterwarnings("ignore:pass 0 runs at the learning rate 0.0")
def test_the_rate_of_a_pass_is_the_schedule_s_at_its_first_step(kind, settings, tmp_path) -> None:
    model = hf.make()
    args = hf.arguments(
        tmp_path, lr_scheduler_type=kind, eval_strategy="steps", eval_steps=1, **settings
    )
    optimizer = hift_ext.SGD(model, lr=0.1)
    trainer = hf.trainer(
        model,
        args,
        eval_dataset=hf.rows(count=8),
        optimizers=(optimizer, None),
        callbacks=[HiFTCallback()],
    )
    trainer.train()
    rows = hf.logged(trainer)
    rates = [row["learning_rate"] for row in rows]  # the scheduler's at that step
    assert len(set(rates)) > 2
    assert [row["hift/lr"] for row in rows] == [rates[step - step % 4] for step in range(10)]
    assert [row["hift/pass"] for row in rows] == [step // 4 for step in range(10)]
    assert [row["hift/group"] for row in rows] == [step % 4 for step in range(10)]


def test_clipping_by_the_trainer_or_by_the_optimizer(tmp_path) -> None:
    """Both clip the active group's norm; the Trainer writes its gradients, the optimizer none."""
    trained = {}
    for who, theirs, ours in (
        ("trainer", 0.05, None),
        ("optimizer", 0.0, 0.05),
        ("both", 0.05, 0.05),
        ("nobody", 0.0, None),
    ):
        model = hf.make()
        optimizer = hift_ext.SGD(model, lr=0.5, max_grad_norm=ours)
        args = hf.arguments(tmp_path, max_grad_norm=theirs)
        trainer = hf.trainer(model, args, optimizers=(optimizer, None))
        trainer.train()
        trained[who] = model
        assert max(row["grad_norm"] for row in hf.logged(trainer)) > 0.05  # before clipping
    for who in ("optimizer", "both"):
        other = dict(trained[who].named_parameters())
        for name, p in trained["trainer"].named_parameters():
            torch.testing.assert_close(p, other[name], rtol=1e-5, atol=1e-6)
    worst = max(
        float((p - q).detach().abs().max())
        for p, q in zip(
            trained["trainer"].parameters(), trained["nobody"].parameters(), strict=True
        )
    )
    assert worst > 1e-2


def test_bf16_autocast(tmp_path) -> None:
    model = hf.make()
    args = hf.arguments(tmp_path, bf16=True)
    trainer = hf.trainer(model, args, optimizers=(hift_ext.AdamW(model, lr=1e-2), None))
    before = models.weights(model)
    trainer.train()
    assert models.changed(before, model) == set(before)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


# Logging -----------------------------------------------------------------------------------------


class Reporter(TrainerCallback):
    """Stands where TensorBoard's callback stands: before those of the user."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.rows.append(dict(logs))


def test_watch_reaches_the_reporters(tmp_path) -> None:
    model, reporter = hf.make(), Reporter()
    args = hf.arguments(tmp_path, logging_steps=5)
    trainer = hf.trainer(
        model,
        args,
        callbacks=[reporter],
        optimizers=(hift_ext.AdamW(model, lr=1e-2, store="disk", page_bytes=4096), None),
    )
    assert isinstance(watch(trainer), HiFTCallback)
    trainer.train()
    rows = [row for row in reporter.rows if "loss" in row]
    assert len(rows) == 2
    for row, kept in zip(rows, hf.logged(trainer), strict=True):
        assert {k: v for k, v in kept.items() if k != "step"} == row
        assert all(isinstance(value, int | float) for value in row.values())
    assert not any("hift/lr" in row for row in reporter.rows if "loss" not in row)
    assert rows[1]["hift/group"] == 1
    assert rows[1]["hift/pass"] == 2
    assert rows[1]["hift/wait_ms"] >= 0
    # Step 6 to 10 brought in what their groups hold: averages over steps, not the last one's.
    sizes = [group.numel for group in inner(trainer).groups]
    assert rows[1]["hift/bytes_out"] * 5 >= 8 * sum(sizes[i] for i in (1, 2, 3, 0, 1))
    assert rows[1]["hift/bytes_in"] > 0


def test_it_says_once_what_was_chosen(tmp_path, caplog) -> None:
    model = hf.make()
    optimizer = hift_ext.AdamW(model, lr=1e-2, max_grad_norm=0.5)
    args = hf.arguments(tmp_path, max_steps=3)
    trainer = hf.trainer(model, args, optimizers=(optimizer, None), callbacks=[HiFTCallback()])
    with caplog.at_level(logging.INFO, "hift_ext"):
        trainer.train()
        trainer.train()
    said = [r.getMessage() for r in caplog.records if "order 'bottom2up'" in r.getMessage()]
    assert len(said) == 1
    assert "4 groups" in said[0]
    assert "the Trainer's max_grad_norm=1.0 and the optimizer's max_grad_norm=0.5" in said[0]
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert any("3 steps and a pass 4" in text for text in warned)


def test_the_callback_refuses_other_optimizers(tmp_path) -> None:
    trainer = hf.trainer(hf.make(), hf.arguments(tmp_path), callbacks=[HiFTCallback()])
    with pytest.raises(TypeError, match="the Trainer's is AdamW"):
        trainer.train()


def test_transformers_is_imported_only_when_used() -> None:
    code = (
        "import sys, hift_ext; hift_ext.integrations.for_trainer;"
        "assert not {'transformers', 'accelerate', 'peft'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'HFCallback'"):
        _ = hift_ext.integrations.HFCallback


def test_example() -> None:
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, root / "examples" / "trainer.py", "--steps", "2"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])},
    )
    assert done.returncode == 0, done.stderr
    assert "'hift/lr': '0.0004'" in done.stdout
    assert re.search(r"held-out accuracy \d\d\.\d%", done.stdout)
