# SPDX-License-Identifier: Apache-2.0
# The plan: what training this model on that card takes, whether it fits, and what to set. It is
# data; what people read is made of it in plan_report.py. Nothing here allocates a weight.
"""Plans: memory, transfers and settings, known before a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hift_ext import choices
from hift_ext.planning import transfer
from hift_ext.planning.footprint import Footprints, GroupFootprint, footprints
from hift_ext.planning.forecast import Forecast, Forecaster, Settings
from hift_ext.planning.machine import Machine, machine
from hift_ext.planning.models import ModelSource
from hift_ext.planning.recommend import Recommendation, recommend
from hift_ext.planning.rings import Ring, rings
from hift_ext.planning.trace import Progress

_HEADER = 4096  # of a page file
_CATEGORIES = ("weights", "gradients", "activations", "ring", "other")


@dataclass(frozen=True)
class Plan:
    """What a training takes on a machine.

    Attributes:
        settings: What was asked for.
        machine: Of which.
        forecast: HiFT's steps, group by group.
        methods: Full fine-tuning, BAdam and LoRA on the same batch.
        host_bytes: Host memory of the state, and of pinned slots for a file.
        pinned_bytes: Of that, locked.
        disk_bytes: Of the page file.
        rings: Rings to choose from.
        recommended: Settings that make the most of the machine.
        misfits: Why it does not fit; nothing where it does.
    """

    settings: Settings
    machine: Machine
    forecast: Forecast
    methods: Footprints
    host_bytes: int
    pinned_bytes: int
    disk_bytes: int
    rings: tuple[Ring, ...]
    recommended: Recommendation
    misfits: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether device and host have room."""
        return not self.misfits

    @property
    def peak_bytes(self) -> int:
        """Of the step that needs most."""
        return self.forecast.peak_bytes

    @property
    def bus_bytes_per_step(self) -> int:
        """Bytes in and out of compute memory in the step of the group that moves most."""
        return max(step.bytes_in + step.bytes_out for step in self.forecast.steps)

    @property
    def parameters(self) -> int:
        """Elements of all groups."""
        return sum(group.numel for group in self.forecast.footprints)

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What the numbers rest on, in sentences."""
        asked, ring = self.settings, self.forecast.ring_bytes
        kernel = "flash or memory-efficient kernels" if asked.attention == "sdpa" else "all scores"
        streaming = {
            "device": "ring: none, state stays beside the parameters",
        }.get(
            self.forecast.store,
            f"ring: {_mib(ring)} in pages of at most {_mib(self.forecast.page_bytes)}"
            if ring
            else "ring: none, pages are updated in host memory over the bus",
        )
        return (
            f"attention: {asked.attention} ({kernel})",
            streaming,
            "peak: executed with fake tensors, each allocation rounded as torch's allocator does; "
            "the context is not in it",
            *self.machine.notes,
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as `--json` writes them: bytes, milliseconds."""
        steps = self.forecast.steps
        profile = self.machine.profile
        mean = self.forecast.mean
        return {
            "fits": self.fits,
            "misfits": list(self.misfits),
            "peak_bytes": self.peak_bytes,
            "limit_bytes": self.machine.limit_bytes,
            "parameters": self.parameters,
            "settings": _plain(self.settings),
            "gpu": {
                "key": profile.key,
                "name": profile.name,
                "memory_bytes": profile.memory_bytes,
                "usable_bytes": profile.usable_bytes,
                "source": profile.source,
            },
            "groups": [
                {"name": group.name, **_footprint(group), "when": group.when, **_step(step)}
                for group, step in zip(self.forecast.footprints, steps, strict=True)
            ],
            "full_fine_tuning": _footprint(self.methods.full_fine_tuning),
            "badam": _footprint(self.methods.badam),
            "lora": _footprint(self.methods.lora),
            "store": self.forecast.store,
            "ring_bytes": self.forecast.ring_bytes,
            "page_bytes": self.forecast.page_bytes,
            "bus_bytes_per_step": self.bus_bytes_per_step,
            "mean_bus_bytes_per_step": mean("bytes_in") + mean("bytes_out"),
            "transfer_ms": mean("transfer_ms"),
            "hidden_ms": mean("hidden_ms"),
            "exposed_ms": mean("exposed_ms"),
            "compute_ms": mean("compute_ms"),
            "update_ms": mean("update_ms"),
            "step_ms": mean("step_ms"),
            "host_bytes": self.host_bytes,
            "pinned_bytes": self.pinned_bytes,
            "disk_bytes": self.disk_bytes,
            "disk_bytes_written_per_1000_steps": (
                round(1000 * mean("bytes_out")) if self.forecast.store == "disk" else 0
            ),
            "rings": [ring.as_dict() for ring in self.rings],
            "recommended": self.recommended.as_dict(),
            "assumptions": list(self.assumptions),
        }


def _footprint(found: GroupFootprint) -> dict[str, Any]:
    return {
        "peak_bytes": found.peak_bytes,
        **{name: getattr(found, name) for name in _CATEGORIES},
        "params": found.params,
        "numel": found.numel,
    }


def _step(step: transfer.Step) -> dict[str, Any]:
    names = ("bytes_in", "bytes_out", "transfer_ms", "hidden_ms", "exposed_ms", "compute_ms")
    return {name: getattr(step, name) for name in (*names, "update_ms", "step_ms")}


def _plain(settings: Settings) -> dict[str, Any]:
    values = dict(vars(settings))
    if not isinstance(values["model"], str):
        model = values["model"]
        values["model"] = str(model) if isinstance(model, Path) else type(model).__name__
    return values


def make_plan(model: ModelSource, *, progress: Progress | None = None, **settings: Any) -> Plan:
    """Forecasts a training before anything is downloaded or allocated.

    Args:
        model: A preset's name, a config.json or its folder, a configuration, a module, or a
            callable that makes one: see `hift_ext.planning.models.build`.
        progress: Told what is done, and the share of it, 0 to 1.
        **settings: See `Settings`: gpu, batch, seq, dtype, optimizer, layers_per_group, order,
            master, state_dtype, grad_checkpointing, host_memory, store, staging, page_bytes,
            attention.

    Raises:
        TypeError: A setting that there is not.
        ValueError: A setting that cannot be, with what is offered.
        OSError: The model's configuration cannot be read.
        RuntimeError: transformers is missing, or `gpu="here"` and there is none.
    """
    unknown = sorted(set(settings) - set(Settings.__dataclass_fields__))
    if unknown:
        raise TypeError(
            f"a plan has no setting {unknown[0]!r}; there are "
            f"{', '.join(Settings.__dataclass_fields__)}"
        )
    asked = Settings(model, **settings)
    there = machine(asked.gpu, asked.host_memory)
    forecaster = Forecaster(there, progress)
    traces = forecaster.traces(asked)
    store = store_of(asked, there, sum(trace.numel for trace in traces))
    forecast = forecaster.forecast(asked, store)
    methods = footprints(
        asked.workload,
        traces=traces,
        **asked.options,
        store=store,
        staging=forecast.staging,
        page_bytes=forecast.page_bytes,
        progress=progress,
    )
    host, pinned, disk = _resting(forecast)
    return Plan(
        asked,
        there,
        forecast,
        methods,
        host,
        pinned,
        disk,
        tuple(rings(forecaster, asked, store)),
        recommend(forecaster, asked, store),
        tuple(_misfits(forecast, there, host)),
    )


def store_of(settings: Settings, there: Machine, numel: int) -> str:
    """Where state rests: as asked, or by the rules of choices.py."""
    if settings.store != "auto":
        return settings.store
    size = sum(stream.nbytes(numel) for stream in settings.stored)
    return choices.choose([size], len(settings.stored), there.chosen(0), staging=0).store


def _resting(forecast: Forecast) -> tuple[int, int, int]:
    """Bytes of host memory, of locked host memory, and of disk."""
    moved = sum(step.bytes_out for step in forecast.steps)
    if forecast.store == "ram":
        return moved, moved, 0
    if forecast.store == "disk":
        # Pages pass through locked slots, one for each slot of the ring.
        return forecast.ring_bytes, forecast.ring_bytes, moved + _HEADER
    return 0, 0, 0


def _misfits(forecast: Forecast, there: Machine, host: int) -> list[str]:
    found = []
    if forecast.peak_bytes > there.limit_bytes:
        found.append(
            f"the peak of {_gib(forecast.peak_bytes)} is above the {_gib(there.limit_bytes)} that "
            f"tensors can have on the {there.profile.name}"
        )
    if there.host_bytes is not None and host > there.host_bytes:
        found.append(
            f"state in host memory takes {_gib(host)} of {_gib(there.host_bytes)}: take "
            'store="disk"'
        )
    return found


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"
