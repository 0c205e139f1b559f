# SPDX-License-Identifier: Apache-2.0
# What a check found: rows of exact facts and of measured figures, which a dry run keeps apart, and
# the short table that is printed last.
"""Rows of the report."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

DRY = "dry"
"""Stands for every measured figure of a dry run."""

GIGA = {"bytes": (1e9, "GB"), "gbps": (1, "GB/s"), "ms": (1, "ms")}


@dataclass
class Row:
    """One line of a section.

    Attributes:
        name: What was checked.
        facts: What is so wherever it runs: counts, sizes, names, figures of the paper.
        measured: Figures of this device, by name; the end of a name is the unit.
        shown: Those of both that the table shows; all measured ones if empty.
        note: A sentence on what the figures mean.
        failed: Why the check failed; empty if it did not.
        absent: There is nothing to check here, and `note` says why.
    """

    name: str
    facts: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)
    shown: Sequence[str] = ()
    note: str = ""
    failed: str = ""
    absent: bool = False

    @property
    def status(self) -> str:
        """`ok`, `failed` or `absent`."""
        return "failed" if self.failed else "absent" if self.absent else "ok"

    def as_dict(self, dry: bool) -> dict[str, Any]:
        """The row for JSON. A dry run's figures must be numbers, and are not written.

        Raises:
            ValueError: A figure is not a finite number.
        """
        for name, value in self.measured.items():
            if not math.isfinite(value):
                raise ValueError(f"{self.name}: {name} is {value}")
        figures = dict.fromkeys(self.measured, DRY) if dry else self.measured
        rest = {"note": self.note, "failed": self.failed}
        return {
            "name": self.name,
            "status": self.status,
            **self.facts,
            **figures,
            **{key: value for key, value in rest.items() if value},
            **({"dry_run": True} if dry else {}),
        }


def shown(name: str, value: Any) -> str:
    """A figure with its unit, which is the end of its name."""
    stem, _, end = name.rpartition("_")
    scale, unit = GIGA.get(end, (1, ""))
    label = stem if unit else name
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return f"{label.replace('_', ' ')} {value}"
    number = f"{value / scale:,.4g}" if isinstance(value, float) or unit else f"{value:,}"
    return f"{label.replace('_', ' ')} {number}{' ' * bool(unit)}{unit}"


def line(row: Mapping[str, Any], keys: Sequence[str]) -> str:
    """What the table says of a row."""
    if row["status"] == "failed":
        return f"failed: {row['failed']}"
    parts = [shown(key, row[key]) for key in keys]
    return "; ".join(parts + ([row["note"]] if "note" in row else []))


Lines = list[tuple[str, str, str]]
"""Section, row, result."""


def print_table(title: str, lines: Lines) -> None:
    """Prints the table to stdout, by rich where it is installed."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print_plain(title, lines)
        return
    table = Table(title=title)
    for column in ("section", "what", "result"):
        table.add_column(column, overflow="fold")
    before = None
    for section, name, result in lines:
        if before not in (None, section):
            table.add_section()
        table.add_row("" if section == before else section, name, result)
        before = section
    # Piped output has no width: 120 columns keep most rows on one line.
    Console(width=None if sys.stdout.isatty() else 120, markup=False).print(table)


def print_plain(title: str, lines: Lines) -> None:
    """The same in plain text."""
    widths = [max(map(len, column)) for column in list(zip(*lines, strict=True))[:2]]
    print(title)
    for section, name, result in lines:
        print(f"{section:{widths[0]}}  {name:{widths[1]}}  {result}")
