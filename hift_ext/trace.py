# SPDX-License-Identifier: Apache-2.0
# What forward and backward need, for each position of the active group: found by executing them on
# fake tensors. The optimizer's own buffers come after, in footprint.py.
"""Memory and compute of a step, traced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from hift_ext.models import ModelSource


@dataclass(frozen=True)
class Peak:
    """Bytes that are live at one instant, by category.

    Attributes:
        weights: Parameters and buffers.
        gradients: What is, or ends up in, a parameter's `.grad`.
        activations: Made in forward (or in a checkpoint's second forward) for backward.
        other: Inputs, and temporaries of forward and backward.
    """

    weights: int
    gradients: int
    activations: int
    other: int

    @property
    def total(self) -> int:
        """All categories together."""
        return self.weights + self.gradients + self.activations + self.other


@dataclass(frozen=True)
class Trace:
    """One step with one group active, without anything of the optimizer's.

    Attributes:
        index: The group's place among the groups; -1 where all, or adapters, are trained.
        name: The group's name.
        params: Number of its parameters.
        numel: Their elements.
        numel_by_dtype: Their elements by type.
        start: Live when the step begins.
        forward: Live at the peak inside forward, the loss included.
        backward: Live at the peak inside backward.
        end: Live when backward is over, at `optimizer.step()`: weights, gradients, inputs, loss.
        forward_flops: Floating-point operations of forward (matrix products and attention).
        backward_flops: The same of backward, second forwards of checkpoints included.
        executed: False where the numbers follow exactly from those of executed neighbours.
    """

    index: int
    name: str
    params: int
    numel: int
    numel_by_dtype: tuple[tuple[torch.dtype, int], ...]
    start: Peak
    forward: Peak
    backward: Peak
    end: Peak
    forward_flops: int
    backward_flops: int
    executed: bool = True

    @property
    def peak(self) -> Peak:
        """The larger of the peaks inside forward and inside backward."""
        return max(self.forward, self.backward, key=lambda peak: peak.total)


@dataclass(frozen=True)
class Workload:
    """What is run: a model, a batch, and how.

    Attributes:
        model: See `hift_ext.models.build`.
        batch: Sequences a micro-batch.
        seq: Tokens a sequence.
        dtype: Type of the weights.
        autocast: Runs forward under `torch.autocast` to this type ("mixed precision").
        attention: `"sdpa"` or `"eager"`.
        grad_checkpointing: Checkpoints every block, with `use_reentrant=False`.
        layers_per_group: As in `HiFTOptions`.
        groups: As in `HiFTOptions`: lists of parameter-name prefixes.
        accumulate: Gradients are there from an earlier micro-batch already.
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


Progress = Callable[[str, float], None]
"""Called with what is being done, and the share done, 0 to 1."""


def trace(workload: Workload, *, progress: Progress | None = None) -> list[Trace]:
    """Executes one forward and backward per distinct position of the active group.

    Groups between two executed positions are not executed where a third one in the middle is
    exactly what the two predict.

    Args:
        workload: What is run.
        progress: Told how far it is.

    Returns:
        One Trace a group, in forward order.

    Raises:
        ValueError: A batch or length below 1, or beyond the model's positions.
    """
    raise NotImplementedError


def trace_full(workload: Workload) -> Trace:
    """One step of standard full fine-tuning: every parameter has a gradient."""
    raise NotImplementedError


def trace_lora(workload: Workload, rank: int = 16) -> Trace:
    """One step of LoRA: float32 adapters of `rank` on every linear layer of the blocks."""
    raise NotImplementedError
