# SPDX-License-Identifier: Apache-2.0
# Peaks along the optimizer's timeline: what is traced, and what the optimizer adds at each instant.
# HiFT beside standard full fine-tuning, BAdam and LoRA, all traced alike.
"""Peak memory of a step, by category."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hift_ext.trace import Progress, Trace, Workload

SMALL_RING = 256 << 20
"""Bytes of the streaming ring that a plan assumes unless told otherwise."""


@dataclass(frozen=True)
class GroupFootprint:
    """The peak of one step, in bytes; the categories add up to `peak_bytes`.

    Attributes:
        name: The group's, or the method's.
        params: Number of trained parameters.
        numel: Their elements.
        peak_bytes: Peak of compute memory.
        weights: Parameters and buffers.
        gradients: Gradients.
        activations: What forward keeps for backward.
        ring: What the optimizer holds in compute memory: the ring pages pass through, or (store
            "device", and the other methods) state and master themselves.
        other: Inputs and temporaries.
        when: `"forward"`, `"backward"` or `"step"`: where the peak lies.
    """

    name: str
    params: int
    numel: int
    peak_bytes: int
    weights: int
    gradients: int
    activations: int
    ring: int
    other: int
    when: str


@dataclass(frozen=True)
class Footprints:
    """All methods on one workload.

    Attributes:
        groups: HiFT, one a group, in forward order.
        full_fine_tuning: All gradients and all state in compute memory.
        badam: One block's master, gradient and state in float32 in compute memory.
        lora: Rank 16 on the blocks' linear layers, AdamW.
        traces: What `groups` were made from.
    """

    groups: tuple[GroupFootprint, ...]
    full_fine_tuning: GroupFootprint
    badam: GroupFootprint
    lora: GroupFootprint
    traces: tuple[Trace, ...]


def state_bytes(
    numel: int,
    dtype: torch.dtype,
    *,
    optimizer: str = "adamw",
    master: str | None = "auto",
    state_dtype: torch.dtype | str = torch.float32,
    rounding: str = "nearest",
) -> int:
    """Bytes of a group's state and master at rest: what crosses the bus each way in its step."""
    raise NotImplementedError


def footprints(
    workload: Workload,
    *,
    traces: Sequence[Trace] | None = None,
    optimizer: str = "adamw",
    master: str | None = "auto",
    state_dtype: torch.dtype | str = torch.float32,
    rounding: str = "nearest",
    store: str = "auto",
    staging: int | str = SMALL_RING,
    page_bytes: int | str = "auto",
    progress: Progress | None = None,
) -> Footprints:
    """Peak memory of HiFT, group by group, and of the other methods.

    Args:
        workload: What is run.
        traces: `trace(workload)`, where it was made before.
        optimizer: `"adamw"`, `"adam"`, `"adagrad"`, `"sgdm"` (momentum) or `"sgd"`.
        master: As in `HiFTOptions`.
        state_dtype: As in `HiFTOptions`.
        rounding: As in `HiFTOptions`.
        store: As in `HiFTOptions`.
        staging: Bytes of the ring; `"auto"` holds the largest group.
        page_bytes: As in `HiFTOptions`.
        progress: Told how far it is.
    """
    raise NotImplementedError


def hift_only(
    traces: Sequence[Trace],
    *,
    optimizer: str = "adamw",
    master: str | None = "auto",
    state_dtype: torch.dtype | str = torch.float32,
    rounding: str = "nearest",
    store: str = "auto",
    staging: int | str = SMALL_RING,
    page_bytes: int | str = "auto",
) -> tuple[GroupFootprint, ...]:
    """The groups of `footprints` alone: nothing is executed."""
    raise NotImplementedError
