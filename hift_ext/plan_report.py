# SPDX-License-Identifier: Apache-2.0
# A plan for people: tables in the terminal, and a picture of the peaks beside what the card has.
# No number is made here; all are the plan's.
"""Tables and picture of a plan."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from hift_ext.footprint import GroupFootprint
from hift_ext.transfer import Step

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from hift_ext.plan import Plan

_PARTS = {
    "weights": "#3b6ea5",
    "gradients": "#c8102e",
    "activations": "#e0a030",
    "ring": "#5a9e6f",
    "other": "#b0b0b0",
}
_NAMES = {"ring": "ring or state"}
_ENDS = 3  # groups shown at each end of a long list


def show(plan: Plan, console: Console) -> None:
    """Prints the plan."""
    asked, verdict = plan.settings, "fits" if plan.fits else "does not fit"
    console.print(
        f"{_model(plan)}, {plan.parameters / 1e6:,.2f}M parameters, {asked.batch} x {asked.seq} "
        f"tokens, {asked.dtype}, {asked.optimizer}, on {plan.machine.profile.name}: {verdict}",
        style="bold",
        highlight=False,
    )
    for misfit in plan.misfits:
        console.print(f"  {misfit}", markup=False, highlight=False)
    console.print(_methods(plan))
    console.print(_groups(plan))
    if plan.rings:
        console.print(_rings(plan))
    console.print(_rest(plan))
    console.print(_recommended(plan))
    for sentence in plan.assumptions:
        console.print(f"  {sentence}", markup=False, highlight=False)


def _model(plan: Plan) -> str:
    model = plan.settings.model
    return str(model) if isinstance(model, str | Path) else type(model).__name__


def gib(count: float) -> str:
    """Bytes in GiB."""
    return f"{count / 2**30:.2f}"


def _sizes(found: GroupFootprint) -> list[str]:
    return [gib(found.peak_bytes), *(gib(getattr(found, part)) for part in _PARTS)]


def _columns(table: Table, first: str) -> None:
    table.add_column(first)
    for name in ("peak", *(_NAMES.get(part, part) for part in _PARTS)):
        table.add_column(name, justify="right")


def _worst(plan: Plan) -> GroupFootprint:
    return max(plan.forecast.footprints, key=lambda group: group.peak_bytes)


def _methods(plan: Plan) -> Table:
    table = Table(title="Peak memory by method, GiB")
    _columns(table, "method")
    table.add_column("of full", justify="right")
    table.add_column("fits")
    full = plan.methods.full_fine_tuning
    worst = _worst(plan)
    for name, found in (
        (f"HiFT, with {worst.name} active", worst),
        ("full fine-tuning", full),
        ("BAdam", plan.methods.badam),
        ("LoRA, rank 16", plan.methods.lora),
    ):
        fits = "yes" if found.peak_bytes <= plan.machine.limit_bytes else "no"
        share = f"{100 * found.peak_bytes / full.peak_bytes:.0f} %"
        table.add_row(name, *_sizes(found), share, fits)
    return table


def _groups(plan: Plan) -> Table:
    table = Table(title="HiFT's steps: GiB at the peak, ms")
    _columns(table, "group")
    for name in ("when", "compute", "transfer", "hidden", "waits"):
        table.add_column(name, justify="right" if name != "when" else "left")
    rows = list(zip(plan.forecast.footprints, plan.forecast.steps, strict=True))
    cut = len(rows) > 2 * _ENDS + 3
    for number, (found, step) in enumerate(rows):
        if cut and _ENDS <= number < len(rows) - _ENDS:
            if number == _ENDS:
                table.add_row(f"... {len(rows) - 2 * _ENDS} more, each between its neighbours")
            continue
        table.add_row(found.name, *_sizes(found), found.when, *_times(step))
    return table


def _times(step: Step) -> list[str]:
    times = (step.compute_ms, step.transfer_ms, step.hidden_ms, step.exposed_ms)
    return [f"{time:.1f}" for time in times]


def _rings(plan: Plan) -> Table:
    table = Table(title="Rings: what they cost and gain; ms are the average step's")
    for name in ("staging", "ring, MiB", "peak, GiB", "waits", "hidden", "step", "fits"):
        table.add_column(name, justify="right" if name != "fits" else "left")
    for ring in plan.rings:
        here = " (this plan)" if ring.staging == plan.forecast.staging else ""
        table.add_row(
            f"{ring.staging}{here}",
            f"{ring.ring_bytes / 2**20:.0f}",
            gib(ring.peak_bytes),
            f"{ring.exposed_ms:.1f}",
            f"{ring.hidden_ms:.1f}",
            f"{ring.step_ms:.1f}",
            "yes" if ring.fits else "no",
        )
    return table


def _rest(plan: Plan) -> Table:
    forecast, values = plan.forecast, plan.as_dict()
    step = forecast.mean("step_ms")
    table = Table(show_header=False, title="An average step")
    table.add_row(
        "over the bus",
        f"{values['mean_bus_bytes_per_step'] / 1e9:.2f} GB in and out; in the largest step "
        f"{plan.bus_bytes_per_step / 1e9:.2f} GB",
    )
    table.add_row(
        "transfer",
        f"{values['transfer_ms']:.0f} ms, of which {values['hidden_ms']:.0f} ms hide behind "
        f"{values['compute_ms']:.0f} ms of forward and backward",
    )
    table.add_row("step", f"{step:.0f} ms, {values['update_ms']:.1f} ms of it the update")
    rests = {"ram": "host memory", "disk": "a file", "device": "memory of the card"}
    table.add_row("state rests in", rests[forecast.store])
    table.add_row(
        "host memory", f"{gib(plan.host_bytes)} GiB, {gib(plan.pinned_bytes)} GiB of it locked"
    )
    if plan.disk_bytes:
        written = values["disk_bytes_written_per_1000_steps"]
        table.add_row(
            "disk",
            f"{plan.disk_bytes / 1e9:.1f} GB; 1,000 steps write {written / 1e12:.2f} TB",
        )
    return table


def _recommended(plan: Plan) -> Table:
    found = plan.recommended
    table = Table(show_header=False, title="Recommended")
    if found.batch:
        checkpointing = ", gradient checkpointing" if found.grad_checkpointing else ""
        table.add_row("batch", f"{found.batch} x {found.seq} tokens, {found.dtype}{checkpointing}")
        table.add_row("peak", f"{gib(found.peak_bytes)} of {gib(plan.machine.limit_bytes)} GiB")
        table.add_row(
            "time",
            f"{found.step_ms:.0f} ms a step, {found.exposed_ms:.1f} ms of it waiting; "
            f"{found.tokens_per_s:,.0f} tokens/s",
        )
        table.add_row("optimizer", found.call)
    for sentence in found.why:
        table.add_row("why", sentence)
    return table


def check_plot(path: Path) -> None:
    """Whether a picture can be drawn there, before anything takes time.

    Raises:
        ValueError: It is no PNG, or its folder is absent.
        RuntimeError: matplotlib is missing.
    """
    if path.suffix.lower() != ".png":
        raise ValueError(f"--plot draws PNG files: {str(path)!r} must end in .png")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--plot: there is no folder {str(path.absolute().parent)!r}")
    if importlib.util.find_spec("matplotlib") is None:
        raise RuntimeError("--plot needs matplotlib: `pip install matplotlib`")


def draw(plan: Plan, path: Path) -> None:
    """Draws the peaks of methods and groups, by category, beside what the card has."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[1, 2.2])
    worst = _worst(plan)
    methods = {
        "HiFT": worst,
        "full": plan.methods.full_fine_tuning,
        "BAdam": plan.methods.badam,
        "LoRA": plan.methods.lora,
    }
    _stack(left, list(methods.values()))
    left.set_xticks(range(len(methods)), list(methods))
    left.set_title("by method")
    left.set_ylabel("peak, GiB")
    groups = list(plan.forecast.footprints)
    _stack(right, groups)
    every = max(1, len(groups) // 12)
    shown = list(range(0, len(groups), every))
    right.set_xticks(shown, [_short(groups[i].name) for i in shown], rotation=45, ha="right")
    right.set_title("HiFT, by active group")
    limit = plan.machine.limit_bytes / 2**30
    for axes in (left, right):
        axes.axhline(limit, color="#222222", linestyle="--", linewidth=1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.02)
    right.set_ylim(top=1.15 * max(limit, worst.peak_bytes / 2**30))
    right.annotate(
        f"{plan.machine.profile.name}: {limit:.1f} GiB for tensors",
        (len(groups) - 0.5, limit),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=9,
    )
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    asked = plan.settings
    figure.suptitle(
        f"{_model(plan)}, {asked.batch} x {asked.seq} tokens, {asked.dtype}, {asked.optimizer}, "
        f"{asked.attention}" + (", checkpointed" if asked.grad_checkpointing else "")
    )
    figure.savefig(path, dpi=120)


def _stack(axes: Axes, bars: list[GroupFootprint]) -> None:
    under = [0.0] * len(bars)
    for part, color in _PARTS.items():
        heights = [getattr(bar, part) / 2**30 for bar in bars]
        axes.bar(range(len(bars)), heights, 0.8, under, color=color, label=_NAMES.get(part, part))
        under = [a + b for a, b in zip(under, heights, strict=True)]


def _short(name: str) -> str:
    """The end of a long name, which is what tells it from its neighbours."""
    return name if len(name) <= 24 else "..." + name[-21:]
