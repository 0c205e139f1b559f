# SPDX-License-Identifier: Apache-2.0
# A step that clips: max_grad_norm against torch's clip_grad_norm_ and step on the same tensors, and
# the norm alone against loops that only read. All of a row's competitors are timed in turns.
"""`python benchmarks/bench_clip.py --json FILE --plot FILE.png`."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from bench_step import CASES, NAMES, QUICK_SHAPES, SHAPES, Case, Shape, parameters, torch_step
from ceiling import Ceiling, ReadCeiling
from common import COLORS, arguments, deliver, draw, interleave, machine, median_ratio, with_rounds
from matplotlib.figure import Figure
from torch import nn

from hift_ext import engines, ops

LIMIT = 1.0
KINDS = {("adamw", torch.float32), ("sgd", torch.float32), ("adamw", torch.bfloat16)}
PEERS = {"torch_fused": {"fused": True}, "torch_foreach": {"foreach": True}}


def hift_step(case: Case, params: Sequence[nn.Parameter]) -> Callable[[], object]:
    """Our step, which clips inside the update."""
    options = {**dict(case.keywords), "layers_per_group": "all", "max_grad_norm": LIMIT}
    return case.hift(params, lr=1e-5, store="ram", master=None, **options).step


def torch_clip_step(
    case: Case, params: Sequence[nn.Parameter], **how: bool
) -> Callable[[], object]:
    """torch's: the norm, the gradients scaled in place, the step."""
    step = torch_step(case, params, **how)

    def run() -> None:
        nn.utils.clip_grad_norm_(params, LIMIT)
        step()

    return run


def hift_norm(params: Sequence[nn.Parameter]) -> Callable[[], object]:
    """Our norm alone, as the step calls it."""
    engine = engines.ResidentEngine([], params[0].device)
    grads = [p.grad for p in params if p.grad is not None]
    rows = [(0, 0, g.data_ptr(), ops.DTYPE_CODES[g.dtype] << 12, 0) for g in grads]
    counts = [g.numel() for g in grads]
    total = torch.zeros((), dtype=torch.float64)
    return lambda: engine.sum_of_squares(rows, counts, total)


def torch_norm(params: Sequence[nn.Parameter]) -> Callable[[], object]:
    """torch's norm alone."""
    grads = [p.grad for p in params if p.grad is not None]
    return lambda: nn.utils.get_total_norm(grads)


def absences(case: Case) -> dict[str, str]:
    """Which of torch's ways cannot take this case, and its own words for it."""
    reasons = {}
    for name, how in PEERS.items():
        try:
            torch_clip_step(case, parameters((64,), case.dtype), **how)()
        except RuntimeError as error:
            reasons[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return reasons


def rows_of(
    case: Case, shape: Shape, absent: dict[str, str], rounds: int, sample_s: float
) -> list[dict[str, Any]]:
    """Measures steps, then norms alone: a row for each competitor and one for the ceiling."""
    params = parameters(shape.sizes, case.dtype)
    update, read = Ceiling(params, case.states), ReadCeiling([p.grad for p in params])

    def both() -> None:
        read()
        update()

    peers = {name: how for name, how in PEERS.items() if name not in absent}
    parts: dict[str, tuple[int, dict[str, Callable[[], object]]]] = {
        "step": (
            case.bytes_per_element + case.dtype.itemsize,  # the gradient is read twice
            {
                "hift": hift_step(case, params),
                **{n: torch_clip_step(case, params, **how) for n, how in peers.items()},
                "ceiling": both,
            },
        ),
        "norm": (
            case.dtype.itemsize,
            {"hift": hift_norm(params), "torch": torch_norm(params), "ceiling": read},
        ),
    }
    rows = []
    for part, (element_bytes, runs) in parts.items():
        samples = interleave(runs, rounds, sample_s)
        medians = {name: statistics.median(seconds) for name, seconds in samples.items()}
        others = (name for name in runs if name not in ("hift", "ceiling"))
        best = min(others, key=medians.__getitem__, default=None)
        moved = element_bytes * sum(shape.sizes)
        for impl, seconds in samples.items():
            rows.append(
                {
                    "part": part,
                    "rule": case.rule,
                    "param": NAMES[case.dtype],
                    "grad": NAMES[case.dtype],
                    "state": "fp32",
                    "shape": shape.name,
                    "tensors": len(shape.sizes),
                    "elements": sum(shape.sizes),
                    "impl": impl,
                    "median_ms": 1e3 * medians[impl],
                    "min_ms": 1e3 * min(seconds),
                    "bytes": moved,
                    "gbps": moved / medians[impl] / 1e9,
                    "ceiling_gbps": moved / medians["ceiling"] / 1e9,
                    "ratio_to_ceiling": median_ratio(samples["ceiling"], seconds),
                    "best_peer": best if impl == "hift" else None,
                    "ratio_to_best_peer": (
                        median_ratio(samples[best], seconds) if best and impl == "hift" else None
                    ),
                    "samples": rounds,
                }
            )
    return rows


def plot(path: Any, result: dict[str, Any]) -> None:
    """A panel for each rule and shape: milliseconds of each competitor's clipped step."""
    rows = [row for row in result["rows"] if row["part"] == "step"]
    cases = list(dict.fromkeys((row["rule"], row["param"]) for row in rows))
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure = Figure(figsize=(3.6 * len(shapes), 1.7 * len(cases) + 1))
    panels = figure.subplots(len(cases), len(shapes), squeeze=False)
    for case, line in zip(cases, panels, strict=True):
        for shape, panel in zip(shapes, line, strict=True):
            here = [r for r in rows if (r["rule"], r["param"], r["shape"]) == (*case, shape)]
            names = [r["impl"].replace("_", " ") for r in here]
            values = [r["median_ms"] for r in here]
            panel.barh(names, values, color=[COLORS[r["impl"]] for r in here])
            for index, row in enumerate(here):
                text = f"{row['median_ms']:.3g}"
                if row["ratio_to_best_peer"]:
                    text += f"  ({row['ratio_to_best_peer']:.2f} x torch's speed)"
                panel.text(row["median_ms"], index, f" {text}", va="center", fontsize=8)
            panel.invert_yaxis()
            panel.set_xlim(0, 1.9 * max(values))  # room for what is written beside the bars
            panel.tick_params(labelsize=8)
            panel.locator_params(axis="x", nbins=4)
            panel.set_title(f"{case[0]} {case[1]}: {shape}", fontsize=9)
            panel.set_xlabel("ms a step", fontsize=8)
            panel.spines[["top", "right"]].set_visible(False)
    draw(path, figure, "One clipped optimizer step", result["machine"])


def main() -> None:
    """Measures, prints a line a row, and writes what was asked for."""
    parser = arguments("A clipped optimizer step, beside torch and the memory's own speed.")
    options, rounds = with_rounds(parser, 15, "samples of each row", "small tensors")
    sample_s = 0.001 if options.quick else 0.02
    result: dict[str, Any] = {"machine": machine(), "limit": LIMIT, "rows": [], "absent": []}
    for case in (case for case in CASES if (case.rule, case.dtype) in KINDS):
        absent = absences(case)
        for impl, reason in absent.items():
            kind = {"rule": case.rule, "param": NAMES[case.dtype], "impl": impl}
            result["absent"].append({**kind, "reason": reason})
            print(f"{case.rule} {kind['param']}: no {impl}: {reason}", file=sys.stderr)
        shapes = [s for s in (QUICK_SHAPES if options.quick else SHAPES) if s.groups == 1]
        for shape in shapes:
            for row in rows_of(case, shape, absent, rounds, sample_s):
                result["rows"].append(row)
                peer = row["ratio_to_best_peer"]
                print(
                    f"{row['rule']:8}{row['param']:5} {row['shape']:24} {row['part']:5}"
                    f"{row['impl']:14}{row['median_ms']:10.4f} ms {row['gbps']:7.1f} GB/s"
                    f"  x ceiling {row['ratio_to_ceiling']:.3f}"
                    + (f"  x {row['best_peer']} {peer:.3f}" if peer else ""),
                    file=sys.stderr,
                    flush=True,
                )
    deliver(options, result, plot)


if __name__ == "__main__":
    main()
