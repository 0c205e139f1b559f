# SPDX-License-Identifier: Apache-2.0
# What a plan was asked for, and looks at it: peaks from traces, a step's time from counted FLOPs
# and the pages that travel meanwhile. Looks are kept, for each is a trace of the model.
"""Forecasts of a step's memory and time."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch

from hift_ext import ops
from hift_ext.ops import Stored
from hift_ext.options import STORES
from hift_ext.planning import transfer
from hift_ext.planning.footprint import GroupFootprint, hift_only
from hift_ext.planning.keeping import OPTIMIZERS, SMALL_RING, Keeping
from hift_ext.planning.machine import GPUS, Machine
from hift_ext.planning.models import ModelSource
from hift_ext.planning.trace import Progress, Trace, Workload, trace
from hift_ext.schedule import ORDERS, make_order

DTYPES: Mapping[str, tuple[torch.dtype, torch.dtype | None]] = MappingProxyType(
    {
        "float32": (torch.float32, None),
        "bfloat16": (torch.bfloat16, None),
        "float16": (torch.float16, None),
        "mixed": (torch.float32, torch.bfloat16),
    }
)
"""Weights' type, and the type that forward is autocast to."""

STATE_DTYPES: Mapping[str, torch.dtype | str] = MappingProxyType(
    {"float32": torch.float32, "bfloat16": torch.bfloat16, "8bit": "8bit"}
)

_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Settings:
    """What a plan is made for.

    Attributes:
        model: See `hift_ext.planning.models.build`.
        gpu: A card's key, or "here".
        batch: Sequences a step.
        seq: Tokens a sequence.
        dtype: Of weights and gradients; "mixed": float32 weights, bfloat16 autocast.
        optimizer: "adamw", "adam", "adagrad", "sgdm" (momentum) or "sgd".
        layers_per_group: As in `HiFTOptions`.
        order: As in `HiFTOptions`.
        master: As in `HiFTOptions`.
        state_dtype: "float32", "bfloat16" or "8bit".
        grad_checkpointing: Checkpoints every block, with `use_reentrant=False`.
        host_memory: Bytes of host memory for state; None: what is free here, or unknown.
        store: As in `HiFTOptions`.
        staging: Bytes of the ring; "auto": a small one, at most 256 MiB.
        page_bytes: As in `HiFTOptions`.
        attention: "sdpa" or "eager".
    """

    model: ModelSource
    gpu: str = "a6000"
    batch: int = 1
    seq: int = 512
    dtype: str = "float32"
    optimizer: str = "adamw"
    layers_per_group: int | Literal["all"] = 1
    order: str = "bottom2up"
    master: str | None = "auto"
    state_dtype: str = "float32"
    grad_checkpointing: bool = False
    host_memory: int | None = None
    store: str = "auto"
    staging: int | Literal["auto"] = "auto"
    page_bytes: int | Literal["auto"] = "auto"
    attention: str = "sdpa"

    def __post_init__(self) -> None:
        for name in ("dtype", "state_dtype"):
            given = str(getattr(self, name)).removeprefix("torch.")
            object.__setattr__(self, name, _SHORT.get(given, given))
        for name, offered in (
            ("gpu", GPUS),
            ("dtype", DTYPES),
            ("optimizer", OPTIMIZERS),
            ("state_dtype", STATE_DTYPES),
            ("order", ORDERS),
            ("attention", ("sdpa", "eager")),
            ("store", STORES),
        ):
            value = getattr(self, name)
            if value not in offered:
                raise ValueError(f"{name}={value!r} is not offered; offered: {', '.join(offered)}")
        for name, least in (("batch", 1), ("seq", 1), ("host_memory", 0), ("staging", 0)):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
            if not (whole or (name == "host_memory" and value is None) or value == "auto"):
                raise ValueError(f"{name} must be a whole number from {least} on, not {value!r}")

    @property
    def workload(self) -> Workload:
        """What is to be traced."""
        weights, autocast = DTYPES[self.dtype]
        return Workload(
            self.model,
            self.batch,
            self.seq,
            dtype=weights,
            autocast=autocast,
            attention=self.attention,
            grad_checkpointing=self.grad_checkpointing,
            layers_per_group=self.layers_per_group,
        )

    @property
    def stored(self) -> list[Stored]:
        """The streams of a page.

        Raises:
            ValueError: Weights or state cannot be kept so.
        """
        return Keeping(**self.options).stored([DTYPES[self.dtype][0]])

    @property
    def options(self) -> dict[str, Any]:
        """What footprints need to know of the optimizer."""
        return {
            "optimizer": self.optimizer,
            "master": self.master,
            "state_dtype": STATE_DTYPES[self.state_dtype],
        }

    def but(self, **changes: Any) -> Settings:
        """The same with other values."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class Forecast:
    """Memory and time of every group's step with one ring.

    Attributes:
        store: "ram", "disk" or "device".
        staging: Bytes of the ring as asked for; 0: pages are updated in host memory.
        page_bytes: Upper bound of a page's record.
        ring_bytes: The ring as it is made.
        footprints: Of each group.
        steps: Of each group.
    """

    store: str
    staging: int
    page_bytes: int
    ring_bytes: int
    footprints: tuple[GroupFootprint, ...]
    steps: tuple[transfer.Step, ...]

    @property
    def peak_bytes(self) -> int:
        """Of the group that needs most."""
        return max(group.peak_bytes for group in self.footprints)

    def mean(self, name: str) -> float:
        """A figure of the steps, averaged over a pass."""
        return sum(getattr(step, name) for step in self.steps) / len(self.steps)


class Forecaster:
    """Makes forecasts for one machine, and keeps the traces they need.

    Args:
        machine: For which.
        progress: Told how far a trace is.
    """

    def __init__(self, machine: Machine, progress: Progress | None = None) -> None:
        self.machine = machine
        self._progress = progress
        self._whole: dict[tuple[Any, ...], tuple[Trace, ...]] = {}
        self._heaviest: dict[tuple[Any, ...], int] = {}

    def traces(self, settings: Settings) -> tuple[Trace, ...]:
        """Of every group."""
        key = _shape(settings)
        if key not in self._whole:
            self._whole[key] = tuple(trace(settings.workload, progress=self._progress))
        return self._whole[key]

    def peak(self, settings: Settings) -> int:
        """Peak bytes of the group that needs most, with the ring that is asked for."""
        held = self._made(settings, self.traces(settings), store_or_ram(settings))[0].ring
        return max(_top(found) for found in self.traces(settings)) + held

    def quick_peak(self, settings: Settings, like: Settings) -> int:
        """The same by fewer executions: of the groups that need most in what was traced before.

        Args:
            settings: Differ from `like` in batch and length alone.
            like: All of its groups are traced.
        """
        if _shape(settings) in self._whole:
            return self.peak(settings)
        before = self.traces(like)
        # With more tokens it is where most is kept, with fewer where the gradients are largest.
        heavy = {max(range(len(before)), key=lambda i: _top(before[i]))}
        heavy.add(max(range(len(before)), key=lambda i: before[i].numel))
        tops = []
        for index in sorted(heavy):
            key = (_shape(settings), index)
            if key not in self._heaviest:
                (found,) = trace(settings.workload, progress=self._progress, positions=[index])
                self._heaviest[key] = _top(found)
            tops.append(self._heaviest[key])
        return max(tops) + self._made(like, before, store_or_ram(like))[0].ring

    def fixed(self, settings: Settings) -> int:
        """Bytes that do not grow with the batch, of settings whose groups are traced."""
        made = self._made(settings, self.traces(settings), store_or_ram(settings))
        return max(found.weights + found.gradients + found.ring for found in made)

    def forecast(self, settings: Settings, store: str) -> Forecast:
        """Memory and time of every step with state in `store`: "ram", "disk" or "device"."""
        traces = self.traces(settings)
        made = self._made(settings, traces, store)
        steps = self._steps(settings, traces, store)
        return Forecast(
            store, ring_of(settings), page_of(settings), made[0].ring, made, tuple(steps)
        )

    def _made(
        self, settings: Settings, traces: Sequence[Trace], store: str
    ) -> tuple[GroupFootprint, ...]:
        return hift_only(
            traces,
            **settings.options,
            store=store,
            staging=ring_of(settings),
            page_bytes=page_of(settings),
        )

    def _steps(
        self, settings: Settings, traces: Sequence[Trace], store: str
    ) -> list[transfer.Step]:
        stored, staging, page = settings.stored, ring_of(settings), page_of(settings)
        weights, autocast = DTYPES[settings.dtype]
        flops = self.machine.flops(autocast or weights)
        groups = []
        for found in traces:
            moved = sum(stream.nbytes(found.numel) for stream in stored)
            sizes = zip(found.counts, found.dtypes, strict=True)
            weights_bytes = sum(count * dtype.itemsize for count, dtype in sizes)
            groups.append(
                transfer.Group(
                    () if store == "device" else transfer.cut(found.counts, stored, page),
                    (2 * moved if staging > 0 else 0) + 3 * weights_bytes,
                    1e3 * (found.forward_flops + found.backward_flops) / flops,
                )
            )
        where = "ram" if store == "device" else store
        link = self.machine.link(where, len(stored), ring=staging > 0)
        if staging == 0:
            return transfer.over_the_bus(groups, link)
        slots = transfer.slots_of(groups, staging)
        order = make_order(settings.order, len(groups), seed=0)
        return transfer.through_a_ring(groups, link, slots, order=order, all_first=store == "disk")


def _shape(settings: Settings) -> tuple[Any, ...]:
    """What a trace depends on."""
    work = settings.workload
    names = ("batch", "seq", "dtype", "autocast", "attention", "grad_checkpointing")
    return (*(getattr(work, name) for name in names), work.layers_per_group)


def _top(found: Trace) -> int:
    """Bytes at the step's peak, without the optimizer's."""
    return max(found.peak.total, found.end.total)


def store_or_ram(settings: Settings) -> str:
    """Where state rests, host memory until that is decided."""
    return "ram" if settings.store == "auto" else settings.store


def ring_of(settings: Settings) -> int:
    """Bytes of the ring that a plan assumes unless it is told."""
    return SMALL_RING if settings.staging == "auto" else settings.staging


def page_of(settings: Settings) -> int:
    """Upper bound of a page's record, as the optimizer chooses it for such a ring on a GPU."""
    if settings.page_bytes != "auto":
        return settings.page_bytes
    ring = ring_of(settings)
    return min(ops.PAGE_BYTES["cuda"], ring // 2) if ring > 0 else ops.PAGE_BYTES["cuda"]
