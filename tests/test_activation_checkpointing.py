# SPDX-License-Identifier: Apache-2.0
# Recomputed activations under frozen lower layers: the weights must be those without recomputation.
# Reentrant checkpoints lose the gradients below a frozen input, unless the input asks for one.
"""Gradient (activation) checkpointing, of torch and of transformers, reentrant and not."""

from __future__ import annotations

from collections.abc import Callable

import hf
import models
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import hift_ext

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:the first pass could not reach 'blocks'"),
]


class Checkpointed(models.Tiny):
    """Every block is computed again in backward."""

    use_reentrant = False

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.use_reentrant)
        return self.head(self.norm(x))


def pair(use_reentrant: bool) -> tuple[nn.Module, nn.Module]:
    """A model without and with checkpoints."""
    plain, checked = models.tiny(blocks=3), Checkpointed(blocks=3)
    checked.load_state_dict(plain.state_dict())
    checked.use_reentrant = use_reentrant
    return plain, checked


def ask_for_gradients(module: nn.Module) -> None:
    """What `enable_input_require_grads` of transformers does: the cure."""
    module.register_forward_hook(lambda module, args, output: output.requires_grad_())


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("order", ["bottom2up", "top2down"])
def test_torch_checkpoints_change_no_bit(use_reentrant, order) -> None:
    plain, checked = pair(use_reentrant)
    if use_reentrant:
        ask_for_gradients(checked.embedding)
    for model in (plain, checked):
        models.train(model, hift_ext.AdamW(model, lr=1e-2, order=order), models.batches(12))
    assert models.same(plain, checked)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_reentrant_checkpoints_without_the_cure() -> None:
    """Where the loss has no gradient torch raises; where the group has none the step says so."""
    _, checked = pair(use_reentrant=True)
    optimizer = hift_ext.AdamW(
        checked, lr=1e-2, groups=[["embedding"], ["blocks"], ["norm", "head"]]
    )
    data = models.batches(3)
    models.train(checked, optimizer, data[:1])
    with pytest.raises(RuntimeError, match="does not require grad"):
        models.loss_of(checked, data[1]).backward()
    scale = torch.ones((), requires_grad=True)  # something of the user's that is trained besides
    before = models.weights(checked)
    (scale * models.loss_of(checked, data[1])).backward()
    with pytest.warns(UserWarning, match="'blocks' has a gradient") as record:
        optimizer.step()
    assert "use_reentrant=False" in str(record[0].message)
    assert not models.changed(before, checked)
    models.train(checked, optimizer, data[2:])  # above all checkpoints it trains
    assert models.changed(before, checked) == {
        "norm.weight",
        "norm.bias",
        "head.weight",
        "head.bias",
    }


def trained(kind: str, prepare: Callable[[nn.Module], None]) -> tuple[nn.Module, list[int]]:
    """A model after ten steps, and the groups whose backward reached the first block."""
    model = hf.make(kind, dropout=0.1).train()
    prepare(model)
    optimizer = hift_ext.AdamW(model, lr=1e-2)
    reached: list[int] = []
    blocks = model.bert.encoder.layer if kind == "bert" else model.model.layers
    blocks[0].register_full_backward_hook(lambda *_: reached.append(optimizer.active))
    torch.manual_seed(7)
    for start in range(0, 40, 4):
        model(**hf.collate(hf.rows(kind)[start : start + 4])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, reached


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_transformers_checkpoints_change_no_bit(kind) -> None:
    def enable(model: nn.Module, use_reentrant: bool) -> None:
        settings = {"use_reentrant": use_reentrant}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
        if not getattr(model, "_require_grads_hook", None):  # transformers 5 does it by itself
            model.enable_input_require_grads()

    def enable_cheaply(model: nn.Module) -> None:
        enable(model, use_reentrant=False)
        model.disable_input_require_grads()

    plain, reached = trained(kind, lambda model: None)
    assert set(reached) == {0, 1}  # backward stops at the active group
    for use_reentrant in (False, True):
        checked, reached = trained(kind, lambda model, r=use_reentrant: enable(model, r))
        assert models.same(plain, checked)
        assert set(reached) == {0, 1, 2, 3}  # and does not where the embeddings ask for more
    checked, reached = trained(kind, enable_cheaply)
    assert models.same(plain, checked)
    assert set(reached) == {0, 1}


def test_the_trainer_s_gradient_checkpointing_changes_no_bit(tmp_path, caplog) -> None:
    made = []
    for settings in ({}, {"gradient_checkpointing": True}):
        model = hf.make(dropout=0.1)
        trainer = hf.trainer(
            model,
            hf.arguments(tmp_path, **settings),
            optimizers=(hift_ext.AdamW(model, lr=1e-2), None),
            callbacks=[hift_ext.integrations.HiFTCallback()],
        )
        assert "disable_input_require_grads" not in caplog.text
        trainer.train()
        made.append(model)
    assert models.same(*made)
    assert "disable_input_require_grads" in caplog.text
