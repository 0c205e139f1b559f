# SPDX-License-Identifier: Apache-2.0
# What a plan is made for: a preset, a Hugging Face configuration, or a module; never its weights.
# Under fake tensors a model of any size is built in a second and takes no memory.
"""Models by name, by configuration, or as modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

ModelSource: TypeAlias = "str | Path | Mapping[str, Any] | Any | Callable[[], nn.Module]"
"""A preset's name, a config.json or its folder, a configuration, or what makes a module."""

PRESETS: Mapping[str, Mapping[str, Any]] = {}


def build(
    model: ModelSource,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Builds a model without weights, as a rule under FakeTensorMode.

    Args:
        model: A preset's name, a config.json or the folder that holds one, the same as a mapping,
            a transformers configuration, or a callable without arguments that makes a module.
        dtype: Type of the weights.
        attention: `"sdpa"` or `"eager"`: what transformers calls `attn_implementation`.
        device: Where the tensors are said to be.

    Raises:
        ValueError: An unknown preset, or a configuration that says no model class.
        OSError: The file cannot be read.
        RuntimeError: transformers is not installed.
    """
    raise NotImplementedError
