# SPDX-License-Identifier: Apache-2.0
# Fake tensors live on the CPU, whose operators save other things for backward than a GPU's where
# torch chooses kernels by device. Here stand the choices that differ.
"""Kernels as torch chooses them on a GPU."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


class AsOnGpu(TorchFunctionMode):
    """Makes dropout and attention on the CPU keep what they keep on a GPU.

    - Dropout has one fused kernel on a GPU, whose mask takes a byte an element.
    - Attention with dropout is still fused on a GPU, which keeps a seed; the CPU would fall back to
      the mathematical form, which keeps the whole matrix.
    - float32 attention with fewer key-value heads has no fused kernel on a GPU; on the CPU it has.
    - In 16 bits it has one on a GPU. Where the CPU's takes no fewer heads (torch 2.6), they are
      repeated: that keeps them whole, not the matrix.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs one function of torch's."""
        kwargs = dict(kwargs or {})
        if func is F.dropout:
            return _dropout(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)


def _dropout(
    input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> torch.Tensor:
    if training and 0 < p < 1 and not inplace:
        return torch.native_dropout(input, p, True)[0]
    return F.dropout(input, p, training, inplace)


def _flash_shares_heads() -> bool:
    """Whether the CPU's fused attention takes fewer key-value heads."""
    query = torch.zeros(1, 2, 1, 8, dtype=torch.bfloat16)
    key = query[:, :1]
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        warnings.simplefilter("ignore")  # of why it does not
        try:
            F.scaled_dot_product_attention(query, key, key, enable_gqa=True)
        except RuntimeError:
            return False
    return True


_SHARES_HEADS = _flash_shares_heads()


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    given: dict[str, Any] = {"attn_mask": attn_mask, "is_causal": is_causal, "scale": scale}
    if enable_gqa and query.dtype == torch.float32:
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(query, key, value, enable_gqa=True, **given)
    if enable_gqa and not _SHARES_HEADS:
        repeats = query.size(-3) // key.size(-3)
        key, value = (heads.repeat_interleave(repeats, -3) for heads in (key, value))
        enable_gqa = False
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=enable_gqa, **given)
