# SPDX-License-Identifier: Apache-2.0
# One optimizer step through the public API, beside torch, DeepSpeed and a loop without arithmetic.
# All of a row's competitors share parameters and gradients and are timed in turns, round by round.
"""`python benchmarks/bench_step.py --json FILE --plot FILE.png`."""

from __future__ import annotations

import importlib
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ceiling import Ceiling
from common import COLORS, arguments, deliver, draw, interleave, machine, median_ratio, with_rounds
from matplotlib.figure import Figure

import hift_ext

LR = 1e-5
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Case:
    """A rule with its types. `states` fp32 streams of state."""

    rule: str
    states: int
    dtype: torch.dtype
    hift: Callable[..., torch.optim.Optimizer]
    torch: Callable[..., torch.optim.Optimizer]
    keywords: tuple[tuple[str, Any], ...] = ()

    @property
    def bytes_per_element(self) -> int:
        """Parameter and state are read and written, the gradient is read."""
        return 3 * self.dtype.itemsize + 8 * self.states


CASES = (
    Case("adamw", 2, torch.float32, hift_ext.AdamW, torch.optim.AdamW),
    Case("adagrad", 1, torch.float32, hift_ext.Adagrad, torch.optim.Adagrad),
    Case("sgd", 1, torch.float32, hift_ext.SGD, torch.optim.SGD, (("momentum", 0.9),)),
    Case("adamw", 2, torch.bfloat16, hift_ext.AdamW, torch.optim.AdamW),
)


@dataclass(frozen=True)
class Shape:
    """Sizes of the tensors of one group, and how many such groups take turns."""

    name: str
    sizes: tuple[int, ...]
    groups: int = 1


def bert(name: str, vocabulary: int, hidden: int, inner: int, blocks: int) -> Shape:
    """Sizes of a BERT's parameters, in registration order."""
    linear = (hidden * hidden, hidden)
    norm = (hidden, hidden)
    embeddings = (vocabulary * hidden, 512 * hidden, 2 * hidden, *norm)
    feed_forward = (inner * hidden, inner, hidden * inner, hidden, *norm)
    block = (*linear * 4, *norm, *feed_forward)
    sizes = (*embeddings, *block * blocks, *linear)
    return Shape(f"{name}, {len(sizes)} tensors", sizes)


SHAPES = (
    Shape("one of 64M", (1 << 26,)),
    Shape("64 of 1M", (1 << 20,) * 64),
    bert("MiniLM-L6", vocabulary=30522, hidden=384, inner=1536, blocks=6),
    Shape("16 of 1K", (1 << 10,) * 16),
    Shape("16 of 1K, one of 8 groups", (1 << 10,) * 16, groups=8),
)
QUICK_SHAPES = (
    Shape("one of 64K", (1 << 16,)),
    bert("tiny BERT", vocabulary=50, hidden=16, inner=32, blocks=1),
    Shape("3 of 1K, one of 2 groups", (1 << 10,) * 3, groups=2),
)


def parameters(sizes: Sequence[int], dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """Parameters with gradients, both drawn at random."""
    made = []
    for size in sizes:
        p = torch.nn.Parameter(torch.randn(size).to(dtype))
        p.grad = (1e-3 * torch.randn(size)).to(dtype)
        made.append(p)
    return made


def hift_optimizer(case: Case, groups: Sequence[Sequence[torch.nn.Parameter]]) -> Any:
    """Ours; with several groups each step updates the next one, as in training."""
    options: dict[str, Any] = {"groups": groups} if len(groups) > 1 else {"layers_per_group": "all"}
    members = [p for group in groups for p in group]
    # As the peers do it: 16-bit weights are updated themselves.
    options["master"] = None
    return case.hift(members, lr=LR, store="ram", **dict(case.keywords), **options)


def torch_step(
    case: Case, params: Sequence[torch.nn.Parameter], **how: bool
) -> Callable[[], object]:
    """torch's step. State is given to it in fp32 where torch would make it in 16 bits."""
    optimizer = case.torch(params, lr=LR, **dict(case.keywords), **how)
    if case.dtype is not torch.float32:
        for p in params:
            optimizer.state[p] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros(p.shape),
                "exp_avg_sq": torch.zeros(p.shape),
            }
    return optimizer.step


def deepspeed_step(case: Case, params: Sequence[torch.nn.Parameter]) -> Callable[[], object]:
    """DeepSpeed's step on the CPU, which it compiles at its first use."""
    if case.rule == "sgd":
        raise NotImplementedError("DeepSpeed has no SGD for the CPU")
    adagrad = case.rule == "adagrad"
    module = importlib.import_module(f"deepspeed.ops.{'adagrad' if adagrad else 'adam'}")
    optimizer: torch.optim.Optimizer = (
        module.DeepSpeedCPUAdagrad(params, lr=LR)
        if adagrad
        else module.DeepSpeedCPUAdam(
            params, lr=LR, weight_decay=1e-2, adamw_mode=True, fp32_optimizer_states=True
        )
    )
    return optimizer.step


PEERS: dict[str, Callable[[Case, Sequence[torch.nn.Parameter]], Callable[[], object]]] = {
    "torch_fused": lambda case, params: torch_step(case, params, fused=True),
    "torch_foreach": lambda case, params: torch_step(case, params, foreach=True),
    "deepspeed": deepspeed_step,
}


def absences(case: Case) -> dict[str, str]:
    """Which peers cannot take this case, and their own words for it; tried on one small tensor."""
    reasons = {}
    for name, make in PEERS.items():
        try:
            make(case, parameters((64,), case.dtype))()
        except Exception as error:
            # Whatever keeps a peer away goes into the file: a missing row must not look like a win.
            reasons[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return reasons


def rows_of(
    case: Case, shape: Shape, absent: dict[str, str], rounds: int, sample_s: float
) -> list[dict[str, Any]]:
    """Measures one case on one shape: a row for each competitor and one for the ceiling."""
    groups = [parameters(shape.sizes, case.dtype) for _ in range(shape.groups)]
    ours = hift_optimizer(case, groups)
    runs: dict[str, Callable[[], object]] = {
        "hift": ours.step,
        **{name: make(case, groups[0]) for name, make in PEERS.items() if name not in absent},
        "ceiling": Ceiling(groups[0], case.states),
    }
    samples = interleave(runs, rounds, sample_s)
    medians = {name: statistics.median(seconds) for name, seconds in samples.items()}
    elements = sum(shape.sizes)
    moved = case.bytes_per_element * elements
    # The pass itself, over all steps and the faults of the first; the rest of a step is overhead.
    updates = ours.summary()["mean"]["update_ms"]
    rows = []
    for impl, seconds in samples.items():
        peers = [name for name in runs if name not in ("hift", "ceiling", impl)]
        best = min(peers, key=medians.__getitem__, default=None)
        rows.append(
            {
                "rule": case.rule,
                "param": NAMES[case.dtype],
                "grad": NAMES[case.dtype],
                "state": "fp32",
                "shape": shape.name,
                "tensors": len(shape.sizes),
                "elements": elements,
                "impl": impl,
                "median_ms": 1e3 * medians[impl],
                "min_ms": 1e3 * min(seconds),
                "update_mean_ms": updates if impl == "hift" else None,
                "bytes": moved,
                "gbps": moved / medians[impl] / 1e9,
                "ceiling_gbps": moved / medians["ceiling"] / 1e9,
                "ratio_to_ceiling": median_ratio(samples["ceiling"], seconds),
                "best_peer": best,
                "ratio_to_best_peer": median_ratio(samples[best], seconds) if best else None,
                "samples": rounds,
            }
        )
    return rows


def plot(path: Any, result: dict[str, Any]) -> None:
    """A panel for each rule and shape: GB/s of each competitor, the ceiling as a line."""
    rows = result["rows"]
    cases = list(dict.fromkeys((row["rule"], row["param"]) for row in rows))
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure = Figure(figsize=(3.6 * len(shapes), 1.9 * len(cases) + 1))
    panels = figure.subplots(len(cases), len(shapes), squeeze=False)
    for case, line in zip(cases, panels, strict=True):
        for shape, panel in zip(shapes, line, strict=True):
            here = [r for r in rows if (r["rule"], r["param"], r["shape"]) == (*case, shape)]
            bars = [r for r in here if r["impl"] != "ceiling"]
            small = here[0]["elements"] < 1 << 20
            values = [1e3 * r["median_ms"] if small else r["gbps"] for r in bars]
            colors = [COLORS[r["impl"]] for r in bars]
            names = [r["impl"].replace("_", " ") for r in bars]
            panel.barh(names, values, color=colors)
            top = max(values)
            if not small:
                top = max(top, here[0]["ceiling_gbps"])
                panel.axvline(here[0]["ceiling_gbps"], color=COLORS["ceiling"], ls="--", lw=1)
            for index, (value, row) in enumerate(zip(values, bars, strict=True)):
                text = f"{value:.0f} µs" if small else f"{value:.1f}"
                if not small and row["impl"] == "hift":
                    text += f"  ({row['ratio_to_ceiling']:.2f} of ceiling)"
                inside = value > 0.5 * top
                panel.text(
                    value - 0.02 * top if inside else value + 0.02 * top,
                    index,
                    text,
                    va="center",
                    ha="right" if inside else "left",
                    color="white" if inside else "black",
                    fontsize=8,
                )
            panel.invert_yaxis()
            panel.set_xlim(0, 1.08 * top)
            panel.tick_params(labelsize=8)
            panel.locator_params(axis="x", nbins=4)
            panel.set_title(f"{case[0]} {case[1]}: {shape}", fontsize=9)
            panel.set_xlabel("µs a step" if small else "GB/s (dashed: ceiling)", fontsize=8)
            panel.spines[["top", "right"]].set_visible(False)
    draw(path, figure, "One optimizer step: bytes read and written a second", result["machine"])


def main() -> None:
    """Measures, prints a line a row, and writes what was asked for."""
    parser = arguments("One optimizer step, beside torch, DeepSpeed and the memory's own speed.")
    options, rounds = with_rounds(parser, 15, "samples of each row", "small tensors")
    sample_s = 0.001 if options.quick else 0.02
    result: dict[str, Any] = {"machine": machine(), "rows": [], "absent": []}
    for case in CASES:
        absent = absences(case)
        for impl, reason in absent.items():
            kind = {"rule": case.rule, "param": NAMES[case.dtype], "impl": impl}
            result["absent"].append({**kind, "reason": reason})
            print(f"{case.rule} {kind['param']}: no {impl}: {reason}", file=sys.stderr)
        for shape in QUICK_SHAPES if options.quick else SHAPES:
            for row in rows_of(case, shape, absent, rounds, sample_s):
                result["rows"].append(row)
                peer = row["ratio_to_best_peer"]
                print(
                    f"{row['rule']:8}{row['param']:5} {row['shape']:26} {row['impl']:14}"
                    f"{row['median_ms']:10.4f} ms {row['gbps']:7.1f} GB/s"
                    f"  x ceiling {row['ratio_to_ceiling']:.3f}"
                    + (f"  x {row['best_peer']} {peer:.3f}" if peer else ""),
                    file=sys.stderr,
                    flush=True,
                )
    deliver(options, result, plot)


if __name__ == "__main__":
    main()
