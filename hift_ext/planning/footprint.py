# SPDX-License-Identifier: Apache-2.0
# Peaks along the optimizer's timeline: what is traced, and what the optimizer adds at each instant.
# HiFT beside standard full fine-tuning, BAdam and LoRA, all traced alike.
"""Peak memory of a step, by category."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hift_ext import precision
from hift_ext.ops import Stored
from hift_ext.planning.keeping import (
    OPTIMIZERS,
    SMALL_RING,
    Keeping,
    ring_bytes,
    rule_of,
    state_bytes,
)
from hift_ext.planning.recorder import allocated
from hift_ext.planning.trace import Peak, Progress, Trace, Workload, trace, trace_full, trace_lora

__all__ = [
    "OPTIMIZERS",
    "SMALL_RING",
    "Footprints",
    "GroupFootprint",
    "Keeping",
    "badam",
    "footprints",
    "hift_only",
    "ring_bytes",
    "state_bytes",
]


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
        full_fine_tuning: All gradients, and all state kept as HiFT's, in compute memory; torch's
            fused update, which needs no buffers.
        badam: One group's state in float32 in compute memory, and of 16-bit weights a master and,
            in the step, the gradient in float32 too.
        lora: Float32 adapters of rank 16 on the blocks' linear layers, the rule's state in float32.
        traces: What `groups` were made from.
    """

    groups: tuple[GroupFootprint, ...]
    full_fine_tuning: GroupFootprint
    badam: GroupFootprint
    lora: GroupFootprint
    traces: tuple[Trace, ...]

    @property
    def peak(self) -> GroupFootprint:
        """The group whose step needs most: HiFT's peak."""
        return max(self.groups, key=lambda group: group.peak_bytes)


def _resident(traced: Trace, stored: Sequence[Stored]) -> int:
    """Bytes of streams that are tensors of their own in compute memory."""
    return sum(allocated(s.nbytes(count)) for s in stored for count in traced.counts)


def _footprint(traced: Trace, held: int, step: int = 0, name: str = "") -> GroupFootprint:
    """The peak of a step with `held` bytes there all the time, and `step` more in the update."""
    at: dict[str, tuple[Peak, int]] = {
        "forward": (traced.forward, held),
        "backward": (traced.backward, held),
        "step": (traced.end, held + step),
    }
    when = max(at, key=lambda key: at[key][0].total + at[key][1])
    peak, ring = at[when]
    return GroupFootprint(
        name=name or traced.name,
        params=traced.params,
        numel=traced.numel,
        peak_bytes=peak.total + ring,
        weights=peak.weights,
        gradients=peak.gradients,
        activations=peak.activations,
        ring=ring,
        other=peak.other,
        when=when,
    )


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

    Raises:
        ValueError: Something that is not offered, or does not fit the workload.
    """
    keeping = Keeping(optimizer, master, state_dtype, rounding)
    keeping.stored([workload.dtype])  # what cannot be kept is said before anything is traced

    def part(begin: float, share: float) -> Progress | None:
        return progress and (lambda text, done: progress(text, begin + share * done))

    found = tuple(traces) if traces is not None else tuple(trace(workload, progress=part(0, 0.6)))
    if progress is not None:
        progress("tracing full fine-tuning", 0.6)
    full = trace_full(workload)
    if progress is not None:
        progress("tracing LoRA", 0.75)
    lora = trace_lora(workload)
    return Footprints(
        groups=hift_only(
            found,
            optimizer=optimizer,
            master=master,
            state_dtype=state_dtype,
            rounding=rounding,
            store=store,
            staging=staging,
            page_bytes=page_bytes,
        ),
        full_fine_tuning=_footprint(full, _resident(full, keeping.stored(full.dtypes))),
        badam=badam(found, optimizer),
        lora=_footprint(lora, _resident(lora, Keeping(optimizer).stored(lora.dtypes))),
        traces=found,
    )


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
    keeping = Keeping(optimizer, master, state_dtype, rounding)
    stored = keeping.stored([dtype for traced in traces for dtype in traced.dtypes])
    if store == "device":
        held = sum(_resident(traced, stored) for traced in traces)
    elif store.startswith("disk") and staging == 0 and stored:
        raise ValueError("staging=0 has a GPU update pages in host memory: it needs store='ram'")
    else:
        counts = [traced.counts for traced in traces]
        held = allocated(ring_bytes(counts, stored, staging=staging, page_bytes=page_bytes))
    return tuple(_footprint(traced, held) for traced in traces)


def badam(traces: Sequence[Trace], optimizer: str = "adamw") -> GroupFootprint:
    """BAdam (arXiv 2404.02827) on the same groups, the one that needs most."""
    _, streams = rule_of(optimizer)
    state = precision.PLAIN.stored(streams)
    whole = [Stored("float32", torch.float32)]
    made = []
    for traced in traces:
        narrow = [c for c, d in zip(traced.counts, traced.dtypes, strict=True) if d.itemsize < 4]
        extra = sum(allocated(whole[0].nbytes(count)) for count in narrow)
        made.append(
            _footprint(traced, _resident(traced, state) + extra, extra, f"BAdam, {traced.name}")
        )
    return max(made, key=lambda footprint: footprint.peak_bytes)
