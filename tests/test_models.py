# SPDX-License-Identifier: Apache-2.0
"""Presets against what is published about the models: parameters, and the paper's peak shares.

Nothing is executed, and nothing has memory.
"""

from __future__ import annotations

import pytest

from hift_ext.layers import make_groups
from hift_ext.planning import models

PUBLISHED = {
    "llama-7b": 6738415616,
    "llama2-7b": 6738415616,
    "llama2-13b": 13015864320,
    "llama3-8b": 8030261248,
    "qwen2.5-0.5b": 494032768,
    "qwen2.5-1.5b": 1543714304,
    "qwen2.5-7b": 7615616512,
    "mistral-7b": 7241732096,
    "tinyllama-1.1b": 1100048384,
    "gpt2": 124439808,
    "gpt2-medium": 354823168,
    "gpt2-large": 774030080,
    "gpt2-xl": 1557611200,
    "gpt-neo-2.7b": 2651307520,
    "opt-1.3b": 1315758080,
    "opt-6.7b": 6658473984,
    "opt-13b": 12853473280,
    "bert-base": 109483778,
    "bert-large": 335143938,
    "roberta-base": 124647170,
    "roberta-large": 355361794,
}


@pytest.mark.parametrize("name", models.PRESETS)
def test_presets_have_the_published_number_of_parameters(name: str) -> None:
    attention = "eager" if name.startswith("gpt-neo") else "sdpa"
    model = models.build(name, attention=attention, device="meta")
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("roberta-base", 31.29),
        ("roberta-large", 14.63),
        ("gpt2-large", 8.48),
        ("gpt-neo-2.7b", 5.05),
        ("llama2-7b", 3.00),
        ("llama2-13b", 2.44),
    ],
)
def test_the_papers_peak_shares(name: str, share: float) -> None:
    attention = "eager" if name.startswith("gpt-neo") else "sdpa"
    params = list((model := models.build(name, attention=attention, device="meta")).parameters())
    largest = max(group.numel for group in make_groups(model, params))
    assert round(100 * largest / sum(p.numel() for p in params), 2) == share
