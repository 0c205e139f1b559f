# SPDX-License-Identifier: Apache-2.0
# The arguments of `python -m hift_ext plan`, and what it does with them: a plan, a table, a
# picture, and on a machine with a GPU the step itself beside the forecast.
"""`python -m hift_ext plan`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from hift_ext import plan
from hift_ext.options import STORES
from hift_ext.planning import report as plan_report
from hift_ext.planning.forecast import DTYPES, STATE_DTYPES, Settings
from hift_ext.planning.keeping import OPTIMIZERS
from hift_ext.planning.machine import GPUS
from hift_ext.planning.models import PRESETS
from hift_ext.progress import progress
from hift_ext.schedule import ORDERS

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def add_arguments(
    parser: argparse.ArgumentParser,
    positive: Callable[[str], int],
    layers: Callable[[str], int | str],
) -> None:
    """Adds what a plan takes.

    Args:
        parser: The command's.
        positive: Reads a positive whole number.
        layers: Reads a number of layers, or "all".
    """
    add = parser.add_argument
    default = Settings("")
    add(
        "--model", required=True, help=f"a config.json, its folder, or one of: {', '.join(PRESETS)}"
    )
    add(
        "--gpu", choices=GPUS, default=default.gpu, help="the card; `here`: the one of this machine"
    )
    add("--batch", type=positive, default=default.batch, metavar="N", help="sequences a step")
    add("--seq", type=positive, default=default.seq, metavar="N", help="tokens a sequence")
    add(
        "--dtype",
        type=_dtype,
        default=default.dtype,
        help=f"of the weights: {', '.join(DTYPES)} (float32 weights, bfloat16 autocast)",
    )
    add("--optimizer", choices=OPTIMIZERS, default=default.optimizer, help="the rule")
    add("--layers-per-group", type=layers, default=1, metavar="M", help='a number, or "all"')
    add("--order", choices=ORDERS, default=default.order, help="in which order groups take turns")
    add(
        "--master", choices=["auto", "none", "fp32", "split"], default="auto", help="of the weights"
    )
    add("--state-dtype", type=_state_dtype, default=default.state_dtype, help="of the state")
    add("--grad-checkpointing", action="store_true", help="checkpoint every block")
    add("--host-memory", type=size, metavar="SIZE", help="host memory for state, as 64GiB")
    add("--store", choices=STORES, default=default.store, help="where optimizer state rests")
    add("--staging", type=_staging, default="auto", metavar="SIZE", help="the ring, as 256MiB")
    add("--page-bytes", type=_staging, default="auto", metavar="SIZE", help="a page's record")
    add("--attention", choices=["sdpa", "eager"], default=default.attention, help="the kernels")
    add("--plot", type=Path, metavar="F.png", help="draw the peaks here")
    add("--measure", action="store_true", help="run the step on this machine's GPU as well")


def run(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Makes the plan, prints it and draws it.

    Returns:
        The figures that `--json` writes.

    Raises:
        ValueError, OSError, RuntimeError: See `hift_ext.make_plan`.
    """
    chosen = {name: getattr(arguments, name) for name in Settings.__dataclass_fields__}
    if chosen["master"] == "none":
        chosen["master"] = None
    if arguments.plot is not None:
        plan_report.check_plot(arguments.plot)
    if arguments.measure:
        from hift_ext.planning import measure

        measure.check()
    with progress("planning", 100) as bar:
        shown = 0

        def tell(what: str, share: float) -> None:
            nonlocal shown
            bar.say(what)
            bar.advance(round(100 * share) - shown)
            shown = round(100 * share)

        made = plan.make_plan(**chosen, progress=tell)
    result = made.as_dict()
    plan_report.show(made, console)
    if arguments.measure:
        measured = measure.measure(made)
        result["measured"] = measured.as_dict()
        measure.show(made, measured, console)
    if arguments.plot is not None:
        plan_report.draw(made, arguments.plot)
        console.print(f"drawn: {arguments.plot}", markup=False, highlight=False)
    return result


def size(text: str) -> int:
    """Bytes, as 268435456, 256MiB, 64GB or 64G (which is 10^9)."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", text.strip(), re.I)
    if found is None or (found[3] and not found[2]):
        raise argparse.ArgumentTypeError(f"must be bytes, as 256MiB or 64GB, got {text!r}")
    unit = (_BINARY if found[3] else _UNITS)[found[2].lower()]
    return int(float(found[1]) * unit)


def _staging(text: str) -> int | str:
    return text if text == "auto" else size(text)


def _dtype(text: str) -> str:
    return _known(text, DTYPES, {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"})


def _state_dtype(text: str) -> str:
    return _known(text, STATE_DTYPES, {"fp32": "float32", "bf16": "bfloat16"})


def _known(text: str, offered: Any, short: dict[str, str]) -> str:
    name = short.get(text, text)
    if name not in offered:
        raise argparse.ArgumentTypeError(
            f"invalid choice: {text!r} (choose from {', '.join(offered)})"
        )
    return name
