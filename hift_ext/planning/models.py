# SPDX-License-Identifier: Apache-2.0
# What a plan is made for: a preset, a Hugging Face configuration, or a module; never its weights.
# Under fake tensors a model of any size is built in a second and takes no memory.
"""Models by name, by configuration, or as modules."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    FakeCopyMode,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from hift_ext.planning.presets import PRESETS

__all__ = ["PRESETS", "ModelSource", "build", "config_of"]

ModelSource: TypeAlias = (
    "str | Path | Mapping[str, Any] | nn.Module | Callable[[], nn.Module] | Any"
)
"""A preset's name, a config.json or its folder, a configuration, a module or what makes one."""

ATTENTION = ("sdpa", "eager")


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
            a transformers configuration, a module (copied as fake tensors, where a
            FakeTensorMode is active), or a callable without arguments that makes a module.
        dtype: Type of the weights; of a configuration's only, a module keeps its own.
        attention: `"sdpa"` or `"eager"`: what transformers calls `attn_implementation`.
        device: Where a configuration's tensors are said to be.

    Returns:
        The module, in training mode.

    Raises:
        TypeError: `model` is none of these.
        ValueError: An unknown preset, or a configuration that does not say which model.
        OSError: The file cannot be read.
        RuntimeError: transformers is not installed.
    """
    if attention not in ATTENTION:
        raise ValueError(f"attention={attention!r} is not offered; offered: {', '.join(ATTENTION)}")
    if isinstance(model, nn.Module):
        fake = next(
            (m for m in _get_current_dispatch_mode_stack() if isinstance(m, FakeTensorMode)), None
        )
        if fake is None:
            return model.train()
        with FakeCopyMode(fake):
            return copy.deepcopy(model).train()
    if callable(model):
        made = model()
        if not isinstance(made, nn.Module):
            raise TypeError(f"{model!r} must make an nn.Module, not {type(made).__name__}")
        return made.train()
    return _from_config(config_of(model), dtype, attention, device).train()


def config_of(model: ModelSource) -> Any:
    """The transformers configuration of a preset, a file, a folder or a mapping.

    Raises:
        TypeError: `model` is none of these.
        ValueError: An unknown preset, or a configuration that does not say which model.
        OSError: The file cannot be read.
        RuntimeError: transformers is not installed.
    """
    if isinstance(model, str | Path):
        return _config(_read(model), f"{str(model)!r}")
    if isinstance(model, Mapping):
        return _config(dict(model), "the mapping")
    if hasattr(model, "to_dict") and hasattr(model, "model_type"):
        classes: Any = getattr(model, "architectures", None)
        if not classes:
            raise ValueError(
                f"{type(model).__name__} does not say which model: set its `architectures`, as in "
                "['LlamaForCausalLM']"
            )
        return model
    raise TypeError(
        "a model is a preset's name, a config.json or its folder, a configuration, a module or a "
        f"callable that makes one, not {model!r} ({type(model).__name__})"
    )


def _read(model: str | Path) -> dict[str, Any]:
    """A preset, or what a config.json holds."""
    if isinstance(model, str) and model.lower() in PRESETS:
        return copy.deepcopy(dict(PRESETS[model.lower()]))
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{str(model)!r} is neither a preset ({', '.join(PRESETS)}) nor a config.json or a "
            "folder that holds one"
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold an object, not {type(found).__name__}")
    return found


def _transformers() -> Any:
    try:
        with unset_fake_temporarily():
            import transformers
    except ImportError as error:
        raise RuntimeError(
            "building a model from its configuration needs transformers: "
            '`pip install "hift_ext[plan]"`, or pass a callable that makes the module'
        ) from error
    return transformers


def _config(values: dict[str, Any], where: str) -> Any:
    transformers = _transformers()
    kind, classes = values.get("model_type"), values.get("architectures")
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        raise ValueError(
            f"{where} has model_type {kind!r}, which transformers {transformers.__version__} does "
            "not know"
        )
    if not isinstance(classes, list) or not classes or not isinstance(classes[0], str):
        raise ValueError(
            f"{where} does not say which model: its `architectures` is {classes!r}; set it, as in "
            '["LlamaForCausalLM"]'
        )
    return transformers.CONFIG_MAPPING[kind].from_dict(values)


def _from_config(config: Any, dtype: torch.dtype, attention: str, device: Any) -> nn.Module:
    transformers = _transformers()
    name = config.architectures[0]
    with unset_fake_temporarily():  # what an import makes outlives the mode
        cls = getattr(transformers, name, None)
    if cls is None or not hasattr(cls, "_from_config"):
        raise ValueError(f"transformers {transformers.__version__} has no model class {name!r}")
    config = copy.deepcopy(config)
    if hasattr(config, "use_cache"):
        config.use_cache = False  # a cache of keys and values is for generation
    before = torch.get_default_dtype()
    try:
        with torch.device(device):
            made: nn.Module = cls._from_config(
                config, attn_implementation=attention, **{_dtype_name(transformers): dtype}
            )
    except ValueError as error:
        if attention == "sdpa" and "scaled_dot_product_attention" in str(error):
            raise ValueError(f"{name} has no SDPA attention: pass attention='eager'") from error
        raise
    finally:
        torch.set_default_dtype(before)
    return made


def _dtype_name(transformers: Any) -> str:
    """`torch_dtype` was renamed in version 4.56."""
    major, minor = map(int, transformers.__version__.split(".")[:2])
    return "dtype" if (major, minor) >= (4, 56) else "torch_dtype"
