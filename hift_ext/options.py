# SPDX-License-Identifier: Apache-2.0
"""The keyword arguments that every HiFT optimizer takes beside torch's own, checked in one place.

What is not offered raises here, at construction, with what is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from typing_extensions import TypedDict

from hift_ext.clipping import check_clipping

STORES = ("auto", "ram", "disk", "device")
BACKENDS = ("auto", "cpu", "cuda", "triton")


class HiFTOptions(TypedDict, total=False):
    """Keyword arguments of `hift_ext.AdamW` and its siblings, beside those of torch's class.

    Attributes:
        model: The module whose forward freezes the inactive groups, and whose structure gives the
            layers. Implied where `params` is a module.
        layers_per_group: m consecutive layers a group; `"all"` for one group.
        order: `"bottom2up"`, `"top2down"`, `"random"`, or a permutation of group indices.
        seed: Seed of the random order and of stochastic rounding.
        groups: The groups themselves: lists of parameter-name prefixes or of Parameters.
        store: Where state rests: `"ram"`, `"disk"` (unlinked scratch), `"disk:PATH"`, `"device"`
            (beside the parameters); `"auto"` is `"ram"`.
        staging: Bytes of the ring in compute memory through which pages pass (on the CPU a disk
            store's only); `"auto"` holds the largest group, 0 has a GPU update pages in host memory
            over the bus.
        page_bytes: Upper bound of a page's record in bytes.
        state_dtype: Type of the state: `torch.float32`, `torch.bfloat16`, or `"8bit"` (codes in
            blocks of 256 elements, for Adam, AdamW and SGD's momentum).
        master: What 16-bit weights are updated from: `"fp32"`, a float32 copy beside the state;
            `"split"`, the same number as the bfloat16 weight and its low half; None, the weights
            themselves. `"auto"` is `"split"` for bfloat16, `"fp32"` for float16, and None where
            `rounding="stochastic"` makes up for it. A weight that was changed by somebody else
            counts, not its master.
        rounding: How bfloat16 weights without a master, and state in fewer than 32 bits, are
            rounded: `"nearest"`, or `"stochastic"`, by `seed`.
        max_grad_norm: Clips the norm of the active group's gradients to this inside the update.
        error_if_nonfinite: A norm that is NaN or infinite raises before anything changes. On a GPU
            the step then waits for the norm.
        backend: `"auto"`, `"cpu"`, `"cuda"` or `"triton"`.
    """

    model: nn.Module | None
    layers_per_group: int | Literal["all"]
    order: str | Sequence[int]
    seed: int
    groups: Sequence[Sequence[str | torch.Tensor]] | None
    store: str
    staging: int | Literal["auto"]
    page_bytes: int | Literal["auto"]
    state_dtype: torch.dtype | str
    master: str | None
    rounding: str
    max_grad_norm: float | None
    error_if_nonfinite: bool
    backend: str


DEFAULTS: dict[str, Any] = {
    "model": None,
    "layers_per_group": 1,
    "order": "bottom2up",
    "seed": 0,
    "groups": None,
    "store": "auto",
    "staging": "auto",
    "page_bytes": "auto",
    "state_dtype": torch.float32,
    "master": "auto",
    "rounding": "nearest",
    "max_grad_norm": None,
    "error_if_nonfinite": False,
    "backend": "auto",
}


def checked(options: HiFTOptions) -> dict[str, Any]:
    """All options, the absent ones at their defaults.

    Raises:
        TypeError: An unknown keyword, or a value of the wrong type.
        ValueError: A value that is not offered.
    """
    unknown = sorted(set(options) - set(DEFAULTS))
    if unknown:
        raise TypeError(
            f"unknown argument {unknown[0]!r}; beside torch's own there are {', '.join(DEFAULTS)}"
        )
    full = {**DEFAULTS, **options}
    store = full["store"]
    if not isinstance(store, str) or not (store in STORES or (store[5:] and store[:5] == "disk:")):
        raise ValueError(f"store must be one of {', '.join(STORES)} or 'disk:PATH', not {store!r}")
    for name in ("staging", "page_bytes"):
        value = full[name]
        least = 0 if name == "staging" else 1
        if value != "auto" and (
            isinstance(value, bool) or not isinstance(value, int) or value < least
        ):
            raise ValueError(
                f"{name} must be 'auto' or a number of bytes, at least {least}, not {value!r}"
            )
    if full["model"] is not None and not isinstance(full["model"], nn.Module):
        raise TypeError(f"model must be an nn.Module, not {type(full['model']).__name__}")
    if isinstance(full["seed"], bool) or not isinstance(full["seed"], int):
        raise TypeError(f"seed must be an int, not {full['seed']!r}")
    check_clipping(full["max_grad_norm"], full["error_if_nonfinite"])
    _offered("state_dtype", full["state_dtype"], (torch.float32, torch.bfloat16, "8bit"))
    _offered("master", full["master"], ("auto", None, "fp32", "split"))
    _offered("rounding", full["rounding"], ("nearest", "stochastic"))
    _offered("backend", full["backend"], BACKENDS)
    return full


def _offered(name: str, value: object, values: tuple[object, ...]) -> None:
    if value not in values:
        offered = ", ".join(map(repr, values))
        raise ValueError(f"{name}={value!r} is not offered by this version; offered: {offered}")


def check_offered(defaults: Mapping[str, Any]) -> None:
    """Refuses what torch's own classes offer and these cannot.

    Raises:
        ValueError: It was asked for.
    """
    if defaults.get("capturable"):
        raise ValueError(
            "capturable=True is not offered: pages move and groups change on the host's clock, "
            "which a CUDA graph cannot replay"
        )
    if defaults.get("differentiable"):
        raise ValueError(
            "differentiable=True is not offered: the fused update writes weights and state in "
            "place, out of autograd's sight"
        )
