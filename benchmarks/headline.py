# SPDX-License-Identifier: Apache-2.0
# The paper's headline, as a plan answers it: with how many tokens a LLaMA-7B trains in full on one
# card of 48 or 24 GB. Writes docs/headline.md; tests/test_plan.py holds a cell of it.
"""`python benchmarks/headline.py`: the largest batch and length of LLaMA-7B on 48 and 24 GB."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hift_ext.planning.forecast import Forecaster, Settings
from hift_ext.planning.machine import machine
from hift_ext.planning.search import largest
from hift_ext.progress import progress

PAGE = Path(__file__).resolve().parents[1] / "docs" / "headline.md"
LENGTHS = (512, 1024, 2048)
UNIT = 16
POSITIONS = 4096


@dataclass(frozen=True)
class Card:
    """A question: what fits there?

    Attributes:
        title: Of its rows.
        settings: With a batch and length to begin with.
        paper: What the paper says of it.
    """

    title: str
    settings: Settings
    paper: str


CARDS = (
    Card(
        "float32 on a 48 GB A6000",
        Settings("llama2-7b", gpu="a6000", batch=6, seq=512),
        "fits, its tokens are not stated",
    ),
    Card(
        "bfloat16 with masters on a 48 GB A6000",
        Settings("llama2-7b", gpu="a6000", batch=16, seq=512, dtype="bfloat16"),
        "8 x 512 or 1 x 2800",
    ),
    Card(
        "bfloat16 with masters on a 24 GB RTX 3090",
        Settings("llama2-7b", gpu="rtx3090", batch=4, seq=512, dtype="bfloat16"),
        "3 x 512 or 1 x 1400",
    ),
)


@dataclass(frozen=True)
class Cell:
    """The largest that fits, and its peak and the next one's, in bytes."""

    batch: int
    seq: int
    peak: int
    beyond: int | None


def cells(card: Card, checkpointed: bool) -> Iterator[Cell]:
    """The largest batch at each of LENGTHS, and the longest single sequence."""
    asked = card.settings.but(grad_checkpointing=checkpointed)
    forecaster = Forecaster(machine(asked.gpu))
    limit = forecaster.machine.limit_bytes
    forecaster.traces(asked)
    fixed = forecaster.fixed(asked)

    def peak(batch: int, seq: int) -> int:
        return forecaster.quick_peak(asked.but(batch=batch, seq=seq), asked)

    guess = asked.batch * asked.seq
    for seq in LENGTHS:
        start = max(guess // seq, 1)
        known = {start: peak(start, seq)}
        most = largest(lambda n: peak(n, seq), limit, most=4096, known=known, fixed=fixed)  # noqa: B023
        guess = max(most * seq, seq)
        yield Cell(most, seq, known.get(most, 0), known.get(most + 1))
    known = {1: peak(1, UNIT)}
    known[min(guess, POSITIONS) // UNIT] = peak(1, min(guess, POSITIONS) // UNIT * UNIT)
    most = largest(
        lambda n: peak(1, n * UNIT), limit, most=POSITIONS // UNIT, known=known, fixed=fixed
    )
    yield Cell(1, most * UNIT, known.get(most, 0), known.get(most + 1))


def page() -> str:
    """docs/headline.md."""
    lines = [
        "# How many tokens LLaMA-7B trains with, on one card",
        "",
        "Written by `python benchmarks/headline.py`: forecasts by tracing, not yet measured on a "
        "card. AdamW, one layer a group, SDPA attention, a ring of at most 256 MiB, state and "
        "masters in host memory. `48 GB` and `24 GB` are what tensors can have of such a card, as "
        "stated below; the next larger batch, or 16 tokens more, does not fit (`-`: not executed, "
        "since what smaller ones take shows it, or it is beyond the model's "
        f"{POSITIONS} positions). Whether masters are split or whole changes host "
        "memory, not the card's.",
        "",
        "| card | batch x length | peak, GiB | the next one's | the paper |",
        "|---|---|---|---|---|",
    ]
    notes: dict[str, None] = {}
    with progress("looking for what fits", 8 * len(CARDS)) as bar:
        for card in CARDS:
            for checkpointed in (False, True):
                title = card.title + (", checkpointed" if checkpointed else "")
                bar.say(title)
                for cell in cells(card, checkpointed):
                    beyond = "-" if cell.beyond is None else f"{cell.beyond / 2**30:.2f}"
                    paper = "" if checkpointed else card.paper
                    lines.append(
                        f"| {title} | {cell.batch} x {cell.seq} | {cell.peak / 2**30:.2f} | "
                        f"{beyond} | {paper} |"
                    )
                    bar.advance()
            there = machine(card.settings.gpu)
            notes[
                f"- {there.profile.name}: {there.limit_bytes / 2**30:.2f} GiB. {there.notes[2]}."
            ] = None
    return "\n".join([*lines, "", *notes, ""])


def main() -> None:
    """Writes the page, or prints it with `-`."""
    text = page()
    if sys.argv[1:] == ["-"]:
        print(text)
    else:
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
