# SPDX-License-Identifier: Apache-2.0
# Hugging Face models of a few thousand random weights, rows to train them on, and the Trainer.
# Nothing is downloaded; every call gives the same weights and rows.
"""Tiny transformers for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

VOCABULARY = 60
GROUPS = {"bert": 4, "llama": 4}  # embeddings, two blocks, head


def make(kind: str = "bert", dropout: float = 0.0) -> nn.Module:
    """A model with two blocks; `dropout` is Bert's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "bert":
            bert = BertConfig(
                vocab_size=VOCABULARY,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=16,
                hidden_dropout_prob=dropout,
                attention_probs_dropout_prob=dropout,
                num_labels=2,
            )
            return BertForSequenceClassification(bert)
        llama = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
        )
        return LlamaForCausalLM(llama)


def rows(kind: str = "bert", count: int = 96) -> list[dict[str, torch.Tensor]]:
    """Examples of eight tokens."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for index in range(count):
        tokens = torch.randint(0, VOCABULARY, (8,), generator=generator)
        labels = torch.tensor(index % 2) if kind == "bert" else tokens
        made.append({"input_ids": tokens, "labels": labels})
    return made


def collate(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch."""
    return {key: torch.stack([row[key] for row in examples]) for key in examples[0]}


class Recorder:
    """A collator that keeps the batches it makes, so that a loop can train on the same."""

    def __init__(self) -> None:
        self.batches: list[dict[str, torch.Tensor]] = []

    def __call__(self, examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        batch = collate(examples)
        self.batches.append({key: value.clone() for key, value in batch.items()})
        return batch


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    """Arguments of a short, silent training on the CPU; a row is logged at every step."""
    defaults: dict[str, Any] = {
        "use_cpu": True,
        "max_steps": 10,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return TrainingArguments(str(folder), **{**defaults, **settings})


def trainer(model: nn.Module | None, args: TrainingArguments, **settings: Any) -> Trainer:
    """A Trainer on `rows` that prints nothing."""
    from transformers import PrinterCallback

    defaults: dict[str, Any] = {"train_dataset": rows(), "data_collator": collate}
    made = Trainer(model, args, **{**defaults, **settings})
    made.remove_callback(PrinterCallback)
    return made


def logged(trained: Trainer) -> list[dict[str, float]]:
    """The rows with a training loss, one a step."""
    return [row for row in trained.state.log_history if "loss" in row]
