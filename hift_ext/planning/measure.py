# SPDX-License-Identifier: Apache-2.0
# The plan's training on the card that is here, with random weights: every group's step once to make
# its state, once to be measured. Then forecast and measurement stand side by side.
"""`python -m hift_ext plan --measure`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hift_ext.adagrad import Adagrad
from hift_ext.adamw import Adam, AdamW
from hift_ext.planning.forecast import DTYPES, STATE_DTYPES
from hift_ext.planning.workload import loss_of, make_inputs, make_model
from hift_ext.progress import progress
from hift_ext.sgd import SGD

if TYPE_CHECKING:
    from hift_ext.plan import Plan

_CLASSES: Mapping[str, Any] = {"adamw": AdamW, "adam": Adam, "adagrad": Adagrad}


class Meter(Protocol):
    """Reads a device's memory and waits for it."""

    def reset(self) -> None:
        """Peaks count from now on."""

    def peak_bytes(self) -> int:
        """Of tensors, since the last reset."""

    def settle(self) -> None:
        """All work that was queued is done."""


class CudaMeter:
    """torch's own books of the current GPU."""

    def reset(self) -> None:
        """Peaks count from now on."""
        torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int:
        """Of tensors, since the last reset."""
        return torch.cuda.max_memory_allocated()

    def settle(self) -> None:
        """All work that was queued is done."""
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Measured:
    """One pass over all groups.

    Attributes:
        device: Its name.
        groups: Each group's `name`, `peak_bytes`, `step_ms`, `hidden_ms`, `wait_ms`, in order.
    """

    device: str
    groups: tuple[dict[str, Any], ...]

    @property
    def peak_bytes(self) -> int:
        """Of the step that needed most."""
        return max(group["peak_bytes"] for group in self.groups)

    @property
    def step_ms(self) -> float:
        """Of the average step."""
        return sum(group["step_ms"] for group in self.groups) / len(self.groups)

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "device": self.device,
            "peak_bytes": self.peak_bytes,
            "step_ms": self.step_ms,
            "groups": [dict(group) for group in self.groups],
        }


def check() -> None:
    """Whether there is a GPU to measure on.

    Raises:
        RuntimeError: There is none.
    """
    if not torch.cuda.is_available():
        raise RuntimeError(
            "--measure runs the step on a GPU of this machine, and torch sees none: leave it out, "
            "or run it where the card is"
        )


def measure(plan: Plan, device: torch.device | None = None, meter: Meter | None = None) -> Measured:
    """Trains two passes with random weights and measures the second.

    Args:
        plan: What to train, and how its optimizer is set.
        device: Where; the first GPU by default.
        meter: Reads that device's memory.

    Raises:
        RuntimeError: There is no GPU, or it runs out of memory.
    """
    if device is None:
        check()
        device = torch.device("cuda", 0)
    meter = CudaMeter() if meter is None else meter
    asked, forecast = plan.settings, plan.forecast
    work, autocast = asked.workload, DTYPES[asked.dtype][1]
    torch.manual_seed(0)
    model = make_model(work, device).to(device)
    inputs = make_inputs(work, model, device)
    momentum = {"momentum": 0.9} if asked.optimizer == "sgdm" else {}
    optimizer = _CLASSES.get(asked.optimizer, SGD)(
        model,
        lr=1e-6,
        layers_per_group=asked.layers_per_group,
        order=asked.order,
        store=forecast.store,
        staging=forecast.staging,
        page_bytes=forecast.page_bytes,
        master=asked.master,
        state_dtype=STATE_DTYPES[asked.state_dtype],
        **momentum,
    )
    found: dict[int, dict[str, Any]] = {}
    with optimizer, progress("measuring steps", 2 * len(optimizer.groups)) as bar:
        for _ in range(2 * len(optimizer.groups)):
            active = optimizer.active
            bar.say(f"measuring {optimizer.groups[active].name}")
            meter.settle()
            meter.reset()
            begin = time.perf_counter()
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                loss = loss_of(model, inputs)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            meter.settle()
            stats = optimizer.stats()
            found[active] = {
                "name": optimizer.groups[active].name,
                "peak_bytes": meter.peak_bytes(),
                "step_ms": 1e3 * (time.perf_counter() - begin),
                "hidden_ms": stats["hidden_ms"],
                "wait_ms": stats["wait_ms"],
            }
            bar.advance()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return Measured(name, tuple(found[index] for index in sorted(found)))


def show(plan: Plan, measured: Measured, console: Console) -> None:
    """Prints forecast and measurement, group by group."""
    table = Table(
        title=f"Forecast for {plan.machine.profile.name}, measured on {measured.device}",
        box=SIMPLE_HEAD,
        title_justify="left",
    )
    table.add_column("group", no_wrap=True)
    for name in ("peak, MiB", "measured", "step, ms", "measured"):
        table.add_column(name, justify="right")
    rows = zip(plan.forecast.footprints, plan.forecast.steps, measured.groups, strict=True)
    for footprint, step, group in rows:
        table.add_row(
            footprint.name,
            f"{footprint.peak_bytes / 2**20:.1f}",
            f"{group['peak_bytes'] / 2**20:.1f}",
            f"{step.step_ms:.1f}",
            f"{group['step_ms']:.1f}",
        )
    console.print(table)
