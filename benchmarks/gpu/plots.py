# SPDX-License-Identifier: Apache-2.0
# The picture of a run: kernels against a copy, step time by ring, memory by category beside the
# paper's. A dry run's has no scales, and all its bars are alike.
"""`--plot`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpu.report import Row

COLORS = ("#3b6ea5", "#c8102e", "#5a9e6f", "#d9a441", "#8fb3d9", "#9a9a9a", "#7b5ea7")
OURS = ("weights", "gradients", "activations", "ring", "other")
PAPER = ("weights", "gradients", "residual", "state")


def kernels(panel: Any, rows: Sequence[Row]) -> None:
    """GB/s of each implementation, rule by rule."""
    names = [row.name.removesuffix(", fp32 state") for row in rows]
    impls = sorted({key for row in rows for key in row.measured if key.endswith("_gbps")})
    for number, impl in enumerate(impls):
        at = [i + 0.8 * (number / len(impls) - 0.5) for i in range(len(rows))]
        values = [row.measured.get(impl, 0.0) for row in rows]
        color = COLORS[number % len(COLORS)]
        panel.barh(at, values, 0.8 / len(impls), color=color, label=impl.removesuffix("_gbps"))
    panel.set_yticks(range(len(rows)), names)
    panel.set_xlabel("GB/s")
    panel.set_title("update of a LLaMA-7B block", fontsize=10)
    panel.legend(fontsize=8)


def rings(panel: Any, rows: Sequence[Row]) -> None:
    """Step time, and what of it was waiting for pages."""
    names = [row.name for row in rows]
    wait = [row.measured["wait_ms"] for row in rows]
    rest = [max(0.0, row.measured["step_ms"] - w) for row, w in zip(rows, wait, strict=True)]
    panel.barh(names, rest, color="#c9d3dd", label="step")
    panel.barh(names, wait, left=rest, color="#c8102e", label="waiting for pages")
    panel.set_xlabel("ms a step")
    panel.set_title("training by ring size", fontsize=10)
    panel.legend(fontsize=8)


def memory(panel: Any, rows: Sequence[Row]) -> None:
    """Bytes by category, ours above the paper's."""
    colors: dict[str, str] = {}
    for row in rows:
        if "activations_bytes" not in row.measured:
            continue
        ours = {name: row.measured[f"{name}_bytes"] for name in OURS}
        paper = {name: row.facts[f"paper_{name}_bytes"] for name in PAPER}
        size = f"{row.facts['batch']} x {row.facts['length']}"
        for title, sizes in (
            (f"{row.name}\n{size}", ours),
            (f"paper, {row.name}\n8 x 512", paper),
        ):
            left = 0.0
            for name, value in sizes.items():
                color = colors.setdefault(name, COLORS[len(colors) % len(COLORS)])
                panel.barh([title], [value / 1e9], left=left, color=color)
                left += value / 1e9
    for name, color in colors.items():
        panel.barh([0], [0], color=color, label=name)
    panel.set_xlabel("GB")
    panel.set_title("peak memory", fontsize=10)
    panel.legend(fontsize=8)


def hidden(row: Row) -> Row:
    """The row with the same figure everywhere."""
    same = {name: 1e9 if name.endswith("_bytes") else 1.0 for name in row.measured}
    return replace(row, measured=same)


PANELS = {"kernels": kernels, "rings": rings, "llama": memory}


def plot(path: Path, rows: Mapping[str, Sequence[Row]], info: Mapping[str, Any], dry: bool) -> None:
    """Draws those sections that have figures.

    Args:
        path: Of the PNG.
        rows: By section.
        info: The machine, for the title.
        dry: Scales are left out.

    Raises:
        ValueError: No section has any.
    """
    from common import draw
    from matplotlib.figure import Figure

    drawn = {
        name: good
        for name in PANELS
        if (good := [row for row in rows.get(name, ()) if row.measured and not row.failed])
    }
    if not drawn:
        raise ValueError(f"nothing to draw: none of {', '.join(PANELS)} has figures")
    if dry:
        drawn = {name: [hidden(row) for row in good] for name, good in drawn.items()}
    figure = Figure(figsize=(8, 4.5 * len(drawn)))
    for panel, (name, good) in zip(
        figure.subplots(len(drawn), squeeze=False)[:, 0], drawn.items(), strict=True
    ):
        PANELS[name](panel, good)
        panel.invert_yaxis()
        panel.spines[["top", "right"]].set_visible(False)
        if dry:
            panel.set_xticks([])
            panel.set_xlabel("")
    names = [row.facts["card"] for row in rows.get("build", ()) if "card" in row.facts]
    title = "a dry run: no measurements" if dry else ", ".join(names) or "one GPU"
    draw(path, figure, title, info)
