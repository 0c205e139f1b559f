# SPDX-License-Identifier: Apache-2.0
# A plan for people: tables in the terminal, and a picture of the peaks beside what the card has.
# No number is made here; all are the plan's.
"""Tables and picture of a plan."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hift_ext.planning.footprint import GroupFootprint

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
_WIDTH = 22  # of a name, so that tables fit 80 columns
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


def _unit(plan: Plan) -> tuple[int, str]:
    """GiB for models of which a method needs one, else MiB."""
    large = plan.methods.full_fine_tuning.peak_bytes >= 1 << 30
    return (1 << 30, "GiB") if large else (1 << 20, "MiB")


def _in(count: float, unit: int) -> str:
    return f"{count / unit:.2f}"


def _sizes(found: GroupFootprint, unit: int) -> list[str]:
    return [_in(getattr(found, name), unit) for name in ("peak_bytes", *_PARTS)]


def _columns(table: Table, first: str, ring: str) -> None:
    table.add_column(first, no_wrap=True)
    for name in ("peak", *_PARTS):
        table.add_column(ring if name == "ring" else name, justify="right")


def _made(title: str, *, header: bool = True) -> Table:
    return Table(title=title, show_header=header, box=SIMPLE_HEAD, title_justify="left")


def _worst(plan: Plan) -> GroupFootprint:
    return max(plan.forecast.footprints, key=lambda group: group.peak_bytes)


def _methods(plan: Plan) -> Table:
    unit, name = _unit(plan)
    table = _made(f"Peak memory by method, {name}")
    _columns(table, "method", "state")
    table.add_column("of full", justify="right")
    full = plan.methods.full_fine_tuning
    for name, found in (
        ("HiFT", _worst(plan)),
        ("full", full),
        ("BAdam", plan.methods.badam),
        ("LoRA", plan.methods.lora),
    ):
        table.add_row(
            name, *_sizes(found, unit), f"{100 * found.peak_bytes / full.peak_bytes:.0f} %"
        )
    return table


def _groups(plan: Plan) -> Table:
    unit, name = _unit(plan)
    table = _made(f"HiFT's peaks by active group, {name}")
    _columns(table, "group", "ring")
    found = list(plan.forecast.footprints)
    names = _short([group.name for group in found])
    cut = len(found) > 2 * _ENDS + 3
    for number, group in enumerate(found):
        if cut and _ENDS <= number < len(found) - _ENDS:
            if number == _ENDS:
                between = [g.peak_bytes for g in found[_ENDS:-_ENDS]]
                table.add_row(f"... {len(between)} more, from", _in(min(between), unit))
                table.add_row("    to", _in(max(between), unit))
            continue
        table.add_row(names[number], *_sizes(group, unit))
    return table


def _rings(plan: Plan) -> Table:
    unit, unit_name = _unit(plan)
    table = _made("Rings: what they cost and gain; ms are the average step's")
    for name in ("staging", "MiB", f"peak, {unit_name}", "waits", "hidden", "step", "fits"):
        table.add_column(name, justify="right" if name != "fits" else "left")
    for ring in plan.rings:
        here = "this plan's " if ring.staging == plan.forecast.staging else ""
        table.add_row(
            f"{here}{ring.staging}",
            f"{ring.ring_bytes / 2**20:.0f}",
            _in(ring.peak_bytes, unit),
            f"{ring.exposed_ms:.1f}",
            f"{ring.hidden_ms:.1f}",
            f"{ring.step_ms:.1f}",
            "yes" if ring.fits else "no",
        )
    return table


def _rest(plan: Plan) -> Table:
    forecast, values = plan.forecast, plan.as_dict()
    unit, name = _unit(plan)
    step = forecast.mean("step_ms")
    table = _made("An average step", header=False)
    table.add_row(
        "over the bus",
        f"{_in(values['mean_bus_bytes_per_step'], unit)} {name} in and out; in the largest step "
        f"{_in(plan.bus_bytes_per_step, unit)} {name}",
    )
    table.add_row(
        "transfer",
        f"{values['transfer_ms']:.1f} ms, of which {values['hidden_ms']:.1f} ms hide behind "
        f"{values['compute_ms']:.1f} ms of forward and backward",
    )
    table.add_row("step", f"{step:.1f} ms, {values['update_ms']:.1f} ms of it the update")
    rests = {"ram": "host memory", "disk": "a file", "device": "memory of the card"}
    table.add_row("state rests in", rests[forecast.store])
    table.add_row(
        "host memory",
        f"{_in(plan.host_bytes, unit)} {name}, {_in(plan.pinned_bytes, unit)} {name} of it locked",
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
    table = _made("Recommended", header=False)
    if found.batch:
        checkpointing = ", gradient checkpointing" if found.grad_checkpointing else ""
        table.add_row("batch", f"{found.batch} x {found.seq} tokens, {found.dtype}{checkpointing}")
        table.add_row(
            "peak",
            f"{_in(found.peak_bytes, 1 << 30)} of {_in(plan.machine.limit_bytes, 1 << 30)} GiB",
        )
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
    unit, unit_name = _unit(plan)
    left, right = figure.subplots(1, 2, width_ratios=[1, 2.2])
    worst = _worst(plan)
    methods = {
        "HiFT": worst,
        "full": plan.methods.full_fine_tuning,
        "BAdam": plan.methods.badam,
        "LoRA": plan.methods.lora,
    }
    _stack(left, list(methods.values()), unit)
    left.set_xticks(range(len(methods)), list(methods))
    left.set_title("by method")
    left.set_ylabel(f"peak, {unit_name}")
    groups = list(plan.forecast.footprints)
    _stack(right, groups, unit)
    every = max(1, len(groups) // 12)
    last = len(groups) - 1
    shown = [*range(0, last - every + 1, every), last]
    names = _short([group.name for group in groups])
    right.set_xticks(shown, [names[i] for i in shown], rotation=45, ha="right")
    right.set_title("HiFT, by active group")
    limit = plan.machine.limit_bytes / unit
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.02)
    says = f"{plan.machine.profile.name}: {plan.machine.limit_bytes / 2**30:.1f} GiB for tensors"
    top = max(plan.methods.full_fine_tuning.peak_bytes, plan.peak_bytes) / unit
    if limit > 3 * top:  # far above: a line there would leave the bars no room
        left.set_xlabel(says, fontsize=9)
    else:
        for axes in (left, right):
            axes.axhline(limit, color="#222222", linestyle="--", linewidth=1)
        right.set_ylim(top=1.15 * max(limit, plan.peak_bytes / unit))
        right.annotate(
            says,
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


def _stack(axes: Axes, bars: list[GroupFootprint], unit: int) -> None:
    under = [0.0] * len(bars)
    for part, color in _PARTS.items():
        heights = [getattr(bar, part) / unit for bar in bars]
        axes.bar(range(len(bars)), heights, 0.8, under, color=color, label=_NAMES.get(part, part))
        under = [a + b for a, b in zip(under, heights, strict=True)]


def _short(names: list[str]) -> list[str]:
    """Names without the words they all begin with, and of long ones the end."""
    words = [name.split(".") for name in names]
    same = 0
    while len(names) > 1 and all(len(w) > same + 1 and w[same] == words[0][same] for w in words):
        same += 1
    shorter = [".".join(w[same:]) for w in words]
    return [n if len(n) <= _WIDTH else "..." + n[3 - _WIDTH :] for n in shorter]
