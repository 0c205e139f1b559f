# SPDX-License-Identifier: Apache-2.0
# Works the choices of hift_ext/choices.py through for one card, and writes them down: from its
# profile, from what the compiled kernels were seen to be, and from arithmetic. It needs no GPU.
"""`python benchmarks/a6000.py`: writes docs/a6000.md."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hift_ext import choices, hardware, ops
from hift_ext.planning.machine import FLOPS_SHARE

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "benchmarks" / "results" / "inspect_kernels.json"
PAGE = ROOT / "docs" / "a6000.md"

GIB, MIB = 1 << 30, 1 << 20
WIDTH, INNER, WORDS, BLOCKS = 4096, 11008, 32000, 32
BLOCK = 4 * WIDTH**2 + 3 * WIDTH * INNER + 2 * WIDTH
EMBEDDING = WORDS * WIDTH
HEAD = WORDS * WIDTH + WIDTH
GROUPS = [EMBEDDING, *[BLOCK] * BLOCKS, HEAD]
"""Parameters of LLaMA-7B's groups, one layer each."""

TYPES = {  # name: profile's rate, bytes of AdamW's state and master an element
    "float32": ("float32", 8),
    "float32, TF32 allowed": ("tfloat32", 8),
    "bfloat16, split master": ("bfloat16", 10),
}
TOKENS = (64, 128, 256, 512, 1024, 2048, 4096)
LENGTH = 512


def flops(tokens: int, active: int) -> float:
    """Floating-point operations of forward and backward with one group active.

    Forward goes through all matrices; backward from the head down to the active group, whose
    weights' gradients come on top. Attention of sequences of LENGTH is counted in full.
    """
    attention = 4 * min(tokens, LENGTH) * WIDTH
    layers = [0.0, *[2.0 * BLOCK + attention] * BLOCKS, 2.0 * HEAD]
    forward = sum(layers)
    backward = sum(layers[max(active, 1) :]) + 2.0 * GROUPS[active] * (active > 0)
    return tokens * (forward + backward)


def compute_ms(profile: hardware.Profile, kind: str, tokens: int, active: int) -> float:
    """Forward and backward, at FLOPS_SHARE of the peak."""
    return 1e3 * flops(tokens, active) / (FLOPS_SHARE * profile.flops[kind])


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    """Markdown."""
    lines = [[*map(str, row)] for row in (head, *rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return [f"| {' | '.join(line)} |" for line in lines] + [""]


def launches(profile: hardware.Profile, rows: list[dict[str, Any]]) -> list[str]:
    """Why this block and this grid."""
    shown = [
        r
        for r in rows
        if r["arch"] == "sm_86"
        and (r["param"], r["grad"]) in (("fp32", "fp32"), ("bf16", "bf16"))
        and r["rule"] in ("adamw", "adagrad", "momentum")
    ]
    first = shown[0]
    shape = choices.launch(BLOCK, profile.sms, blocks_per_sm=first["blocks_per_sm"])
    needed, flying = first["needed_bytes_per_sm"], first["in_flight_bytes_per_sm"]
    enough = needed / (flying / first["blocks_per_sm"])
    block_bytes = shape.run * first["bytes_per_param"]
    last_us = 1e6 * block_bytes * shape.resident / profile.bandwidth
    return [
        "## Block and grid",
        "",
        f"Every kernel has {shape.threads} threads a block and {choices.ROUNDS} accesses "
        "of 16 bytes "
        "a thread and stream; the grid",
        f"has a block for every {shape.run} elements. By registers {first['blocks_per_sm']} blocks "
        f"fit on each of the {profile.sms} SMs: {shape.resident} at once.",
        "",
        *table(
            (
                "rule",
                "types",
                "registers",
                "blocks an SM",
                "KB in flight an SM",
                "memory ms",
                "arithmetic ms",
            ),
            (
                (
                    r["rule"],
                    r["param"],
                    r["registers"],
                    r["blocks_per_sm"],
                    f"{r['in_flight_bytes_per_sm'] / 1e3:.1f}",
                    f"{r['memory_ms']:.2f}",
                    f"{r['compute_ms']:.2f}",
                )
                for r in shown
            ),
        ),
        "For one block of LLaMA-7B, from the machine code "
        "(`benchmarks/results/inspect_kernels.json`).",
        f"Memory at {profile.bandwidth / 1e9:.0f} GB/s and an assumed latency of 1 us asks for "
        f"{needed / 1e3:.1f} KB in flight on an SM. AdamW in float32 has",
        f"{flying / 1e3:.1f} KB: {enough:.1f} of its {first['blocks_per_sm']} blocks would do. So "
        "the pass is bound by memory, and larger blocks or more of them gain nothing.",
        f"A block of LLaMA-7B is {shape.blocks} blocks, {shape.waves:.1f} times what the SMs hold. "
        f"At full load a block takes {last_us:.0f} us; that, against "
        f"{first['memory_ms']:.1f} ms, is",
        "the most that a partly empty last wave can cost, and less in fact: fewer blocks "
        "run faster, "
        "until",
        f"fewer than {enough:.1f} are left on an SM. A grid made for 84 SMs would save no "
        "more than "
        "this, and need a loop and a number for every card.",
        "",
    ]


def pages(profile: hardware.Profile, machine: choices.Machine) -> list[str]:
    """Why this page."""
    group, speed = 8 * BLOCK, machine.both_ways
    latency = 2 * choices.COPY_S + choices.LAUNCH_S
    chosen = choices.choose([group], 2, machine).page_bytes
    rows = []
    for size in (1, 4, 8, 16, 32, 64):
        page = size * MIB
        shape = choices.launch(page // 8, profile.sms)
        rows.append(
            (
                f"**{size} MiB**" if page == chosen else f"{size} MiB",
                -(-group // page),
                f"{1e3 * latency * group / page:.1f}",
                f"{2e3 * page / speed:.1f}",
                f"{1e3 * (latency * group / page + 2 * page / speed):.1f}",
                f"{1e6 * page / 8 * 28 / profile.bandwidth:.0f}",
                f"{shape.waves:.1f}",
            )
        )
    return [
        "## Page",
        "",
        f"A link of PCIe {profile.pcie_generation} x{profile.pcie_lanes} carries "
        f"{profile.link_bytes_per_s / 1e9:.1f} GB/s each way, nominally; {speed / 1e9:.1f} are "
        f"counted on ({choices.LINK_SHARE:.0%}) while both ways are busy.",
        "A page of AdamW's float32 state is two copies each way and a launch: "
        f"{latency * 1e6:.0f} us "
        "of latency, assumed. Both are measured by",
        "`python -m hift_ext doctor --probe`, and then what was measured counts. For one block's "
        f"{group / 1e9:.2f} GB, streamed:",
        "",
        *table(
            (
                "page",
                "pages",
                "latency ms",
                "first in, last out ms",
                "sum ms",
                "update us a page",
                "waves",
            ),
            rows,
        ),
        f"The sum is least at sqrt(G L B / 2) = "
        f"{(group * latency * speed / 2) ** 0.5 / MIB:.1f} MiB, and flat: the next lower power of "
        "two is chosen.",
        f"A page is updated in a fraction of the {1e6 * chosen / speed:.0f} us that "
        f"{chosen // MIB} "
        "MiB take over the link, so streaming runs at the link's speed.",
        "",
    ]


def rings(profile: hardware.Profile) -> list[str]:
    """Which ring."""
    group = 8 * BLOCK
    rows = []
    for free in (32.0, 16.0, 8.0, 6.0, 4.0, 2.0, 1.0, 0.25, 0.0):
        machine = choices.on_card(profile, host_free=None, device_free=int(free * GIB))
        choice = choices.choose([8 * n for n in GROUPS], 2, machine)
        ring = group if choice.staging == ops.WHOLE_GROUP else choice.staging
        exposed = 1e3 * (group - ring) / machine.both_ways
        ring_text = "whole group" if ring == group else f"{ring / MIB:.0f} MiB" if ring else "none"
        page = f"{choice.page_bytes / MIB:g} MiB"
        rows.append((f"{free:g} GiB", ring_text, page, f"{ring / group:.0%}", f"{exposed:.1f}"))
    return [
        "## Ring",
        "",
        f"The largest group is a block: {group / 1e9:.2f} GB of state. A ring may take "
        f"{choices.RING_SHARE:.0%} of what was free at the peak. In float32:",
        "",
        *table(("free at the peak", "ring", "page", "hidden", "in the step, ms"), rows),
        "*hidden*: of the transfer, behind forward and backward that are long enough (next table); "
        "the rest streams inside the step.",
        "Without a ring pages are updated over the bus; nothing is hidden.",
        "",
    ]


def hidden(profile: hardware.Profile, machine: choices.Machine) -> list[str]:
    """What is hidden at which batch."""
    lines = [
        "## What is hidden at which batch",
        "",
        "A ring for the whole group: while forward and backward run, one group's pages go out and "
        "another's come in.",
        f"Compute is counted operations at {FLOPS_SHARE:.0%} of the card's peak, and the "
        "shortest of "
        "all groups: with the head active backward ends at once.",
        f"Sequences of {LENGTH} tokens (shorter where there are fewer).",
        "",
    ]
    for name, (kind, size) in TYPES.items():
        moved = 1e3 * size * BLOCK / machine.both_ways
        rows = []
        for tokens in TOKENS:
            times = [compute_ms(profile, kind, tokens, g) for g in range(len(GROUPS))]
            least, mean = min(times), sum(times) / len(times)
            share = min(least / moved, 1.0)
            rows.append(
                (
                    tokens,
                    f"{least:.0f}",
                    f"{mean:.0f}",
                    f"{share:.0%}",
                    f"{max(moved - least, 0):.0f}",
                )
            )
        one = compute_ms(profile, kind, LENGTH, len(GROUPS) - 1) / LENGTH
        lines += [
            f"**{name}** ({profile.flops[kind] / 1e12:.1f} TFLOP/s peak): "
            f"{size * BLOCK / 1e9:.2f} GB "
            f"each way, {moved:.0f} ms; hidden from about {moved / one:.0f} tokens on.",
            "",
            *table(("tokens a step", "shortest ms", "mean ms", "hidden", "exposed ms"), rows),
        ]
    return lines


def text() -> str:
    """The page."""
    profile = hardware.get("a6000")
    machine = choices.on_card(profile, host_free=None, device_free=20 * GIB)
    rows = json.loads(KERNELS.read_text())["rows"]
    state = sum(8 * n for n in GROUPS)
    lines = [
        "# The choices for an RTX A6000",
        "",
        "Written by `python benchmarks/a6000.py` from the card's profile (`hift_ext/profiles.py`), "
        "the compiled kernels and the rules in",
        "`hift_ext/choices.py`. **Forecasts: nothing here was measured on a card.** The model is "
        "LLaMA-7B, one layer a group, AdamW.",
        "",
        *table(
            ("of the card", ""),
            (
                ("multiprocessors", profile.sms),
                (
                    "memory",
                    f"{profile.memory_bytes / GIB:.0f} GiB, {profile.usable_bytes / GIB:.1f} "
                    "for tensors (2 % to the driver, 0.5 GiB to the context: assumed)",
                ),
                ("memory bandwidth", f"{profile.bandwidth / 1e9:.0f} GB/s"),
                ("L2", f"{profile.l2_bytes / MIB:.0f} MiB"),
                (
                    "link",
                    f"PCIe {profile.pcie_generation} x{profile.pcie_lanes}, "
                    f"{profile.link_bytes_per_s / 1e9:.1f} GB/s each way",
                ),
                ("copy engines", profile.copy_engines),
                (
                    "peak TFLOP/s",
                    ", ".join(f"{name} {rate / 1e12:g}" for name, rate in profile.flops.items()),
                ),
                ("source", profile.source),
            ),
        ),
        *launches(profile, rows),
        *pages(profile, machine),
        *rings(profile),
        *hidden(profile, machine),
        "## Store",
        "",
        f"All state is {state / 1e9:.1f} GB. It rests in host memory where at least "
        f"{state / choices.HOST_SHARE / 1e9:.1f} GB are free ({choices.HOST_SHARE:.0%} are "
        "taken at "
        "most), else on disk.",
        f"A disk of {choices.DISK_BYTES_PER_S / 1e9:g} GB/s moves a block's state in "
        f"{8 * BLOCK / choices.DISK_BYTES_PER_S:.1f} s each way: then the disk decides the "
        "step, not "
        "the link.",
        "",
        "## Where 24 and 48 GB end",
        "",
        "See [headline.md](headline.md): it is the planner's answer, from executed forward and "
        "backward passes.",
    ]
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=PAGE, metavar="FILE.md")
    options = parser.parse_args()
    options.out.write_text(text())
    print(f"written: {options.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
