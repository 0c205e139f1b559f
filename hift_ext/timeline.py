# SPDX-License-Identifier: Apache-2.0
"""The monitor's picture: what ran when in the last steps, and how much memory was taken.

matplotlib is imported here, and only when a picture is wanted.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LANES = {
    "forward": "#c9d3dd",
    "backward": "#9fb0c0",
    "optimizer": "#e3b23c",
    "wait": "#c8102e",
    "update": "#3b6ea5",
    "copy in": "#5a9e6f",
    "copy out": "#8e6bbf",
    "read file": "#a3cfae",
    "write file": "#c7b5e0",
}
"""From top to bottom. Lanes in which nothing ran are left out, but for the first six."""

_ALWAYS = ("forward", "backward", "wait", "update", "copy in", "copy out")
_LETTERS = 22  # of a group's name, at most

Span = tuple[float, float]
"""Begin and end, seconds."""


@dataclass
class Picture:
    """What is drawn; times in seconds of one clock.

    Attributes:
        title: Above all.
        steps: Begin, end and group of each step in the window.
        lanes: What ran in it.
        memory: (time, bytes, highest bytes since the one before), over the whole run.
        memory_name: Whose memory.
    """

    title: str
    steps: Sequence[tuple[float, float, str]] = ()
    lanes: Mapping[str, Sequence[Span]] = field(default_factory=dict)
    memory: Sequence[tuple[float, int, int]] = ()
    memory_name: str = "memory"


def check_can_draw(path: str | os.PathLike[str]) -> Path:
    """Finds out before a training what would keep its picture from being drawn after it.

    Raises:
        ImportError: There is no matplotlib.
        FileNotFoundError: There is no directory for the picture.
        ValueError: It is not called .png.
        PermissionError: It cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"plot={str(path)!r}: the picture is a PNG, so its name ends in .png")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"plot={str(path)!r}: the directory {folder} does not exist")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise PermissionError(f"plot={str(path)!r} cannot be written")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"plot= draws with matplotlib, which cannot be imported ({error}): pip install "
            '"hift_ext[bench]"'
        ) from error
    return path


def draw(path: Path, picture: Picture) -> None:
    """Writes the picture as PNG; it appears whole or not at all."""
    from matplotlib.figure import Figure

    shown = [lane for lane in LANES if lane in _ALWAYS or picture.lanes.get(lane)]
    figure = Figure(figsize=(12, 2.6 + 0.36 * len(shown)), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[0.36 * len(shown), 1.6])
    _draw_lanes(above, picture, shown)
    _draw_memory(below, picture)
    figure.suptitle(picture.title, fontsize=10)
    work = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        figure.savefig(work, dpi=110, format="png")
        os.replace(work, path)
    finally:
        work.unlink(missing_ok=True)


def _draw_lanes(panel: Any, picture: Picture, shown: Sequence[str]) -> None:
    begin = picture.steps[0][0] if picture.steps else 0.0
    end = picture.steps[-1][1] if picture.steps else 1.0
    unit, scale = ("s", 1.0) if end - begin >= 10 else ("ms", 1e3)
    for row, lane in enumerate(shown):
        spans = [
            (scale * (max(a, begin) - begin), scale * (min(b, end) - max(a, begin)))
            for a, b in picture.lanes.get(lane, ())
            if b > begin and a < end
        ]
        # The edge keeps what is short beside the window visible.
        panel.broken_barh(spans, (row - 0.38, 0.76), color=LANES[lane], linewidth=0.8)
    width = scale * (end - begin)
    for first, last, name in picture.steps:
        panel.axvline(scale * (last - begin), color="#444444", linewidth=0.6, alpha=0.6)
        # As many letters as the step is wide enough for.
        room = int(_LETTERS * 7 * scale * (last - first) / max(width, 1e-12))
        panel.annotate(
            _short(name, max(min(room, _LETTERS), 2)),
            (scale * ((first + last) / 2 - begin), 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=7,
        )
    panel.set_xlim(0, width)
    panel.set_yticks(range(len(shown)), shown)
    panel.set_ylim(len(shown) - 0.5, -0.5)
    panel.set_xlabel(f"{unit} in the last {len(picture.steps)} steps; a line ends each")
    panel.spines[["top", "right"]].set_visible(False)


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else "…" + name[-(most - 1) :]


def _draw_memory(panel: Any, picture: Picture) -> None:
    start = picture.memory[0][0] if picture.memory else 0.0
    times = [at - start for at, _, _ in picture.memory]
    taken = [taken / 1e9 for _, taken, _ in picture.memory]
    highest = [highest / 1e9 for _, _, highest in picture.memory]
    panel.plot(times, taken, color="#3b6ea5", linewidth=2, label="after each step")
    panel.plot(times, highest, color="#c8102e", linewidth=0.9, label="highest during it")
    if picture.steps:
        window = (picture.steps[0][0] - start, picture.steps[-1][1] - start)
        panel.axvspan(*window, color="#dddddd", alpha=0.5, linewidth=0, label="shown above")
    panel.set_ylim(0, 1.15 * max(highest, default=1.0) or 1.0)
    panel.margins(x=0)
    panel.set_xlabel("seconds of the run")
    panel.set_ylabel(f"{picture.memory_name}, GB")
    panel.legend(loc="lower right", fontsize=8, framealpha=0.8)
    panel.spines[["top", "right"]].set_visible(False)
