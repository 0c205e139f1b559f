# SPDX-License-Identifier: Apache-2.0
# What is run: a model, a batch of random tokens and how forward is done. It becomes a fake module
# and fake inputs, or, on a card that is there, real ones.
"""Workloads: a model and its batch."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from hift_ext.planning import models
from hift_ext.planning.models import ModelSource


@dataclass(frozen=True)
class Workload:
    """What is run: a model, a batch, and how.

    Attributes:
        model: See `hift_ext.planning.models.build`.
        batch: Sequences a micro-batch.
        seq: Tokens a sequence.
        dtype: Type of the weights (of a preset or a configuration; a module keeps its own).
        autocast: Runs forward under `torch.autocast` to this type ("mixed precision").
        attention: `"sdpa"` or `"eager"`.
        grad_checkpointing: Checkpoints every block, with `use_reentrant=False`.
        layers_per_group: As in `HiFTOptions`.
        groups: As in `HiFTOptions`: lists of parameter-name prefixes.
        accumulate: Gradients are there from an earlier micro-batch already.
        inputs: Makes the model's keyword arguments from `batch` and `seq`; None: token numbers, a
            mask without padding, and labels that suit a transformers model's head.
    """

    model: ModelSource
    batch: int
    seq: int
    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    attention: str = "sdpa"
    grad_checkpointing: bool = False
    layers_per_group: int | Literal["all"] = 1
    groups: Sequence[Sequence[str]] | None = None
    accumulate: bool = False
    inputs: Callable[[int, int], Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "seq"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number, at least 1, not {value!r}")


def make_model(workload: Workload, device: str | torch.device = "cpu") -> nn.Module:
    """The module, with checkpoints where they are wanted.

    Raises:
        ValueError: It cannot checkpoint, or `seq` is beyond its positions; see also `models.build`.
    """
    model = models.build(
        workload.model, dtype=workload.dtype, attention=workload.attention, device=device
    )
    limit = _positions(model)
    if limit is not None and workload.seq > limit:
        raise ValueError(f"seq={workload.seq} is beyond the model's {limit} positions")
    if workload.grad_checkpointing:
        enable: Any = getattr(model, "gradient_checkpointing_enable", None)
        if enable is None:
            raise ValueError(
                f"{type(model).__name__} has no gradient_checkpointing_enable(): checkpoint inside "
                "the module, and leave grad_checkpointing off"
            )
        with warnings.catch_warnings():  # version 5 renames it; 4.45 knows only this name
            warnings.simplefilter("ignore", FutureWarning)
            enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # Else every backward goes down to the embeddings, whichever group is active.
        disable: Any = getattr(model, "disable_input_require_grads", None)
        if disable is not None and hasattr(model, "_require_grads_hook"):
            disable()
    return model


def _positions(model: nn.Module) -> int | None:
    """Positions that the model has a table or a rotation for."""
    config = getattr(model, "config", None)
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int):
        return None
    # RoBERTa's and its like's table begins behind the padding's number.
    roberta = "roberta" in str(getattr(config, "model_type", ""))
    return limit - config.pad_token_id - 1 if roberta and config is not None else limit


def make_inputs(
    workload: Workload, model: nn.Module, device: str | torch.device = "cpu"
) -> dict[str, Any]:
    """The model's keyword arguments.

    Raises:
        ValueError: It does not take token numbers and labels.
    """
    batch, seq = workload.batch, workload.seq
    if workload.inputs is not None:
        return dict(workload.inputs(batch, seq))
    accepted = set(inspect.signature(model.forward).parameters)
    if not {"input_ids", "labels"} <= accepted:
        raise ValueError(
            f"{type(model).__name__} does not take input_ids and labels: pass inputs=, a function "
            "of batch and seq that makes its keyword arguments"
        )
    long: Any = {"dtype": torch.long, "device": device}
    ids = torch.zeros(batch, seq, **long)
    name = type(model).__name__
    whole = name.endswith(("SequenceClassification", "MultipleChoice", "NextSentencePrediction"))
    labels = torch.zeros(batch, **long) if whole else torch.zeros(batch, seq, **long)
    made = {"input_ids": ids, "labels": labels}
    if "attention_mask" in accepted:
        if workload.attention == "sdpa":
            # Real: transformers looks whether something is padded, and drops the mask if not.
            with unset_fake_temporarily():
                made["attention_mask"] = torch.ones(batch, seq, **long)
        else:
            made["attention_mask"] = torch.ones(batch, seq, **long)
    return made


def loss_of(model: nn.Module, inputs: Mapping[str, Any]) -> torch.Tensor:
    """Runs forward and keeps the loss alone, as `model(**batch).loss.backward()` does.

    Raises:
        ValueError: The model gives no loss.
    """
    out = model(**inputs)
    loss = out if isinstance(out, torch.Tensor) else getattr(out, "loss", None)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise ValueError(
            f"{type(model).__name__} must give one number to train on, or an output with `loss`, "
            f"not {type(out).__name__}"
        )
    return loss
