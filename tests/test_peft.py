# SPDX-License-Identifier: Apache-2.0
# Models wrapped by peft: adapters trained layer by layer, and all weights under the wrapper.
# Afterwards peft must be able to merge what was trained, as if a torch optimizer had been there.
"""peft: LoRA under HiFT, its groups, merging, and full fine-tuning of a wrapped model."""

from __future__ import annotations

import warnings

import hf
import models
import pytest
import torch
from peft import LoraConfig, get_peft_model
from reference import ReferenceHiFT
from torch import nn

import hift_ext

pytestmark = pytest.mark.filterwarnings("ignore:.*checkpointing.* is deprecated:FutureWarning")

TARGETS = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj", "down_proj"]}
TASKS = {"bert": "SEQ_CLS", "llama": "CAUSAL_LM"}


def lora(kind: str) -> nn.Module:
    torch.manual_seed(3)
    config = LoraConfig(task_type=TASKS[kind], r=4, target_modules=TARGETS[kind], lora_dropout=0.0)
    return get_peft_model(hf.make(kind), config)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, kind: str, steps: int) -> None:
    for start in range(0, 4 * steps, 4):
        model(**hf.collate(hf.rows(kind)[start : start + 4])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("source", ["module", "names", "parameters"])
def test_adapters_of_a_block_are_a_group(kind, source) -> None:
    model = lora(kind)
    before = models.weights(model)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    if source == "module":
        optimizer = hift_ext.AdamW(model, lr=1e-2)
    elif source == "names":
        optimizer = hift_ext.AdamW(model.named_parameters(), lr=1e-2)
    else:  # as peft's own examples have it
        optimizer = hift_ext.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=1e-2, model=model
        )
    wanted = ["layer.0", "layer.1", "classifier"] if kind == "bert" else ["layers.0", "layers.1"]
    for group, end in zip(optimizer.groups, wanted, strict=True):
        assert group.name.endswith(end)
    assert set().union(*(group.names for group in optimizer.groups)) == trainable
    for _ in range(2):
        for group in optimizer.groups:
            now = models.weights(model)
            train(model, optimizer, kind, 1)
            # B starts at zero, so that A has no gradient at first; AdamW's decay moves it.
            assert models.changed(now, model) == set(group.names)
    assert models.changed(before, model) == trainable
    optimizer.close()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable


def test_lora_equals_a_plain_torch_hift_loop() -> None:
    model, copied = lora("llama"), lora("llama")
    assert models.same(model, copied)
    optimizer = hift_ext.AdamW(model, lr=1e-2)
    by_name = dict(copied.named_parameters())
    reference = ReferenceHiFT(
        [[by_name[name] for name in group.names] for group in optimizer.groups],
        torch.optim.AdamW,
        lr=1e-2,
    )
    train(model, optimizer, "llama", 7)
    for start in range(0, 28, 4):
        reference.freeze()
        copied(**hf.collate(hf.rows("llama")[start : start + 4])).loss.backward()
        reference.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, by_name[name], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("close", [True, False])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_merge_and_unload_after_training(kind, close) -> None:
    """In the middle of a pass, with the optimizer closed before or still open."""
    model = lora(kind)
    optimizer = hift_ext.AdamW(model, lr=1e-1)
    train(model, optimizer, kind, 3)
    model.eval()
    batch = hf.collate(hf.rows(kind)[:4])
    with torch.no_grad():
        before = model(**batch).logits
        with model.disable_adapter():
            assert (model(**batch).logits - before).abs().max() > 1e-3  # the adapters do something
        if close:
            optimizer.close()
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, before, rtol=1e-4, atol=1e-6)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    optimizer.close()

    # And what was merged can be fine-tuned in full.
    merged.requires_grad_(True).train()
    start = models.weights(merged)
    with hift_ext.AdamW(merged, lr=1e-2) as full:
        assert len(full.groups) == hf.GROUPS[kind]
        train(merged, full, kind, len(full.groups))
    assert models.changed(start, merged) == set(start)


@pytest.mark.parametrize("reference_first", [True, False])
def test_switching_adapters_off_and_on_does_not_unfreeze(reference_first) -> None:
    """As preference training does; peft then lets all adapters have gradients."""
    model = lora("bert")
    optimizer = hift_ext.AdamW(model, lr=1e-2)
    for step in range(7):
        for micro in range(2):
            batch = hf.collate(hf.rows()[8 * step + 4 * micro :][:4])

            def reference(batch=batch) -> None:
                with torch.no_grad(), model.disable_adapter():
                    model(**batch)

            if reference_first:
                reference()
            loss = model(**batch).loss
            if not reference_first:
                reference()
            loss.backward()
        having = {name for name, p in model.named_parameters() if p.grad is not None}
        assert having == set(optimizer.groups[optimizer.active].names)
        optimizer.step()
        optimizer.zero_grad()
    trainable = {name for group in optimizer.groups for name in group.names}
    optimizer.close()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_full_fine_tuning_of_a_wrapped_model(kind) -> None:
    model = lora(kind)
    model.requires_grad_(True)
    optimizer = hift_ext.AdamW(model, lr=1e-2)
    assert len(optimizer.groups) == hf.GROUPS[kind]
    plain = hift_ext.AdamW(hf.make(kind))
    for group, other in zip(optimizer.groups, plain.groups, strict=True):
        cleaned = {name.removeprefix("base_model.model.") for name in group.names}
        for wrapper in (".base_layer", ".original_module"):
            cleaned = {name.replace(wrapper, "") for name in cleaned}
        assert set(other.names) <= cleaned  # each layer is where it is without peft
    before = models.weights(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, kind, len(optimizer.groups))
    unused = {name for name in before if "original_module" in name}  # peft trains a copy of it
    assert models.changed(before, model) == set(before) - unused


def test_in_the_trainer_with_checkpointing(tmp_path) -> None:
    made = []
    for settings in ({}, {"gradient_checkpointing": True}):
        model = lora("llama")
        args = hf.arguments(tmp_path, max_steps=5, **settings)
        trainer = hf.trainer(
            model,
            args,
            train_dataset=hf.rows("llama"),
            optimizer_cls_and_kwargs=hift_ext.integrations.for_trainer(args),
        )
        trainer.train()
        assert len(trainer.optimizer.optimizer.groups) == 2
        made.append(model)
    assert models.same(*made)
    assert not models.same(made[0], lora("llama"))
