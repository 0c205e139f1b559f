# SPDX-License-Identifier: Apache-2.0
# Bytes of state, of masters and of the ring they pass through, for parameters that need not exist:
# the optimizer classes say what they keep, transfer.py how pages are cut.
"""How much an optimizer keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hift_ext import ops, precision
from hift_ext.adagrad import Adagrad
from hift_ext.adamw import Adam, AdamW
from hift_ext.ops import Stored, StreamSpec
from hift_ext.planning.transfer import Group, cut, slots_of
from hift_ext.sgd import SGD

SMALL_RING = 256 << 20
"""Bytes of the streaming ring that a plan assumes unless told otherwise."""

_RULES: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "adamw": (AdamW, {}),
    "adam": (Adam, {}),
    "adagrad": (Adagrad, {}),
    "sgdm": (SGD, {"lr": 1e-3, "momentum": 0.9}),
    "sgd": (SGD, {"lr": 1e-3}),
}
OPTIMIZERS = tuple(_RULES)


def rule_of(optimizer: str) -> tuple[str, list[StreamSpec]]:
    """The kernel's name and the state of one of OPTIMIZERS, as the class itself has them."""
    if optimizer not in _RULES:
        raise ValueError(f"optimizer={optimizer!r} is not offered; offered: {', '.join(_RULES)}")
    cls, settings = _RULES[optimizer]
    with cls([nn.Parameter(torch.zeros(1))], layers_per_group="all", **settings) as made:
        group = made.param_groups[0]
        return made.rule(group), made.streams(group)


@dataclass(frozen=True)
class Keeping:
    """How state and weights are kept.

    Attributes:
        optimizer: One of OPTIMIZERS.
        master: As in `HiFTOptions`.
        state_dtype: As in `HiFTOptions`.
        rounding: As in `HiFTOptions`.
    """

    optimizer: str = "adamw"
    master: str | None = "auto"
    state_dtype: torch.dtype | str = torch.float32
    rounding: str = "nearest"

    def stored(self, dtypes: Sequence[torch.dtype]) -> list[Stored]:
        """The streams of a page for parameters of these types.

        Raises:
            ValueError: They cannot be kept so.
        """
        options = {
            "master": self.master,
            "state_dtype": self.state_dtype,
            "rounding": self.rounding,
        }
        kept = precision.chosen(options, set(dtypes))
        rule, streams = rule_of(self.optimizer)
        precision.check_rule(kept, rule, streams)
        return kept.stored(streams)


def state_bytes(
    numel: int,
    dtype: torch.dtype,
    *,
    optimizer: str = "adamw",
    master: str | None = "auto",
    state_dtype: torch.dtype | str = torch.float32,
    rounding: str = "nearest",
) -> int:
    """Bytes of a group's state and master: what crosses the bus each way in its step.

    Raises:
        ValueError: Something that is not offered.
    """
    keeping = Keeping(optimizer, master, state_dtype, rounding)
    return sum(stream.nbytes(numel) for stream in keeping.stored([dtype]))


def ring_bytes(
    counts: Sequence[Sequence[int]],
    stored: Sequence[Stored],
    *,
    staging: int | str = SMALL_RING,
    page_bytes: int | str = "auto",
) -> int:
    """Bytes of the ring in a GPU's memory, as csrc/engine.cpp takes them.

    Args:
        counts: Elements of each parameter, group by group.
        stored: The streams of a page.
        staging: Bytes it may take; `"auto"` holds the largest group; 0: none.
        page_bytes: Upper bound of a page's record.

    Raises:
        ValueError: `staging` does not hold two pages.
    """
    if staging == 0 or not stored:
        return 0
    whole = ops.WHOLE_GROUP if staging == "auto" else int(staging)
    page = ops.PAGE_BYTES["cuda"] if page_bytes == "auto" else int(page_bytes)
    if page_bytes == "auto" and whole > 0:
        page = min(page, whole // 2)
    groups = [Group(cut(count, stored, page), 0, 0.0) for count in counts]
    slots = slots_of(groups, None if whole == ops.WHOLE_GROUP else whole)
    return slots * max((size for group in groups for size in group.pages), default=0)
