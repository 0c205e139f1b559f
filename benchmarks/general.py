# SPDX-License-Identifier: Apache-2.0
# Judges the kernels that read at run time how numbers are kept. Which of their branches a step
# takes is not known here, so there is no time to predict: only what holds for every branch.
"""Verdicts on the general kernels: spills, occupancy, access widths, exact arithmetic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sass import Listing, access_of, accesses
from verdicts import Arch, Rule, unrounded

WIDTH = 4
"""Neighbouring values of a thread: 16 bytes of a 32-bit stream, 8 of a 16-bit one."""

HELD = 8
"""Values of a block of codes that a lane holds."""


@dataclass(frozen=True)
class General:
    """One of these kernels, as compiled for one architecture; `coded`: for 8-bit state."""

    rule: Rule
    coded: bool
    ptx: Listing
    sass: Listing
    usage: Mapping[str, int]
    threads: int
    min_blocks: int

    @property
    def streams(self) -> tuple[int, int]:
        """Streams that are read and written beside coded state, a master among them."""
        states = 0 if self.coded else self.rule.states
        return 3 + states, 2 + states

    @property
    def widths(self) -> tuple[set[int], set[int]]:
        """Bytes of the accesses that there must be, and of those that there may be."""
        if self.coded:  # a value of each stream, and words of codes
            return {2, 4}, {2, 4}
        return {4 * WIDTH, 2 * WIDTH}, {4 * WIDTH, 2 * WIDTH, 4, 2}


def judge_widths(kernel: General) -> list[str]:
    """What is wrong with the widths of accesses: each stream has a wide one of either type."""
    wanted, allowed = kernel.widths
    wrong = []
    for store, streams in zip((False, True), kernel.streams, strict=True):
        found = Counter(a.bytes for a in accesses(kernel.sass.reached) if a.store == store)
        name = "stores" if store else "loads"
        wrong += [
            f"{found[width]} {name} of {width} bytes, for {streams} streams"
            for width in sorted(wanted)
            if found[width] < streams * (HELD if kernel.coded else 1)
        ]
        wrong += [f"{name} of {width} bytes" for width in sorted(found) if width not in allowed]
    return wrong


def judge_exact(kernel: General) -> list[str]:
    """Divisions, roots and fused operations: as many as the values of a pack and one of a tail."""
    values = HELD if kernel.coded else WIDTH + 1
    ops = Counter(i.op for i in kernel.ptx.reached)
    shares = kernel.rule.states if kernel.coded else 0
    divided = ops["div.rn.f32"] + ops["rcp.rn.f32"]
    wrong = unrounded(kernel.ptx)
    for name, found, wanted in (
        ("div.rn.f32", divided, kernel.rule.exact * values + 1 + shares),
        ("sqrt.rn.f32", ops["sqrt.rn.f32"], kernel.rule.exact * values),
        ("fma.rn.f32", ops["fma.rn.f32"], kernel.rule.fused * values),
    ):
        if found != wanted:
            wrong.append(f"PTX: {found} {name} for {wanted}")
    return wrong


def judge_general(kernel: General, arch: Arch) -> dict[str, Any]:
    """Figures and verdicts of one kernel; a verdict is a list of what is wrong."""
    registers, shared = kernel.usage["REG"], kernel.usage["SHARED"]
    blocks = arch.blocks_per_sm(registers, kernel.threads, shared)
    verdicts: dict[str, list[str]] = {
        "spills": [
            f"{kernel.usage[k]} bytes of {k}" for k in ("STACK", "LOCAL") if kernel.usage[k]
        ],
        "argument": [],
        "occupancy": [],
        "width": judge_widths(kernel),
        "exact": judge_exact(kernel),
    }
    for i in (*kernel.sass.instructions, *kernel.ptx.instructions):
        access = access_of(i)
        if access is not None and access.space != "global":
            which = "spills" if access.space == "local" else "argument"
            verdicts[which].append(f"{access.space} memory: {i.text}")
    if blocks < kernel.min_blocks:
        verdicts["occupancy"].append(f"{blocks} blocks fit on an SM, not {kernel.min_blocks}")
    return {
        "rule": kernel.rule.name,
        "kernel": "codes" if kernel.coded else "values",
        "registers": registers,
        "local_bytes": kernel.usage["LOCAL"] + kernel.usage["STACK"],
        "threads": kernel.threads,
        "blocks_per_sm": blocks,
        "occupancy": blocks * kernel.threads / 32 / arch.warps,
        "instructions": len(kernel.sass.reached),
        "verdicts": verdicts,
        "ok": not any(verdicts.values()),
    }
