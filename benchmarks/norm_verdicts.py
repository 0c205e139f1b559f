# SPDX-License-Identifier: Apache-2.0
# Judges the compiled kernels of a norm by their listings: the loads of its loop are wide and many,
# every square is one fused operation, nothing spills, and the order of additions is as written.
"""Verdicts on csrc/cuda/norm.cu, for benchmarks/inspect_kernels.py."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sass import Instruction, Listing, access_of, accesses
from verdicts import LLAMA_7B_BLOCK, Arch

BLOCK, COLUMNS, LANES = 4096, 128, 32
AT_ONCE = 8
TYPES = {"float": ("fp32", 4), "BFloat16": ("bf16", 2), "Float16": ("fp16", 2)}
KERNELS = [("square_sums", grad) for grad, _ in TYPES.values()]
KERNELS += [("add_up", None), ("make_clip", None)]

FP64_LANES = {"80": 32, "86": 2, "89": 2, "90": 64}
"""Of an SM (CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions")."""

CONVERSIONS = {"80": 16, "86": 2, "89": 2, "90": 16}
"""From 32-bit to 64-bit types that an SM does a cycle; same table."""

DADD_CYCLES = {"80": 8, "86": 48, "89": 48, "90": 8}
"""From a float64 addition to the next that needs it: assumed, not in any table."""


@dataclass(frozen=True)
class NormKernel:
    """A kernel of norm.cu, as compiled for one architecture."""

    name: str
    grad: str | None
    sass: Listing
    usage: Mapping[str, int]
    threads: int
    min_blocks: int


def identify(plain: str) -> tuple[str, str | None]:
    """Kernel and gradient type of a demangled name.

    Raises:
        ValueError: It is none of norm.cu's kernels.
    """
    found = re.search(r"(square_sums|add_up|make_clip)", plain)
    if found is None:
        raise ValueError(f"{plain} is not a kernel of a norm: teach `identify` its name")
    if found[1] != "square_sums":
        return found[1], None
    grad = re.search(r"NormTable<(?:hift::\w+::)?(\w+)>", plain)
    if grad is None or grad[1] not in TYPES:
        raise ValueError(f"{plain} has no gradient type that is known")
    return found[1], TYPES[grad[1]][0]


def hot_part(kernel: NormKernel) -> list[Instruction]:
    """The loop with the widest loads; the whole kernel where it was unrolled to the end."""

    def size(body: Sequence[Instruction]) -> tuple[int, int]:
        loads = [a.bytes for a in accesses(body) if not a.store]
        return max(loads, default=0), sum(loads)

    bodies = [kernel.sass.body(loop) for loop in kernel.sass.loops]
    return max(bodies, key=size, default=list(kernel.sass.instructions))


def judge_sums(kernel: NormKernel, part: Sequence[Instruction]) -> dict[str, list[str]]:
    """Of the kernel that reads: a list of what is wrong for each verdict."""
    element = dict(TYPES.values())[kernel.grad or "fp32"]
    wide = element * COLUMNS // LANES
    loads = [a.bytes for a in accesses(part) if not a.store]
    ops = Counter(i.base for i in part)
    elements = sum(loads) // element
    width = [f"a load of {b} bytes, not {wide}" for b in loads if b != wide]
    if len(loads) % AT_ONCE or not loads:
        width.append(f"{len(loads)} loads of a row, not a multiple of {AT_ONCE}")
    first_use = next((k for k, i in enumerate(part) if i.base == "DFMA"), len(part))
    ahead = sum(1 for a in accesses(part[:first_use]) if not a.store)
    if ahead < AT_ONCE:
        width.append(f"{ahead} loads under way before the first addition, not {AT_ONCE}")
    fused = []
    if ops["DFMA"] != elements or ops["DADD"] or ops["DMUL"]:
        fused.append(f"{ops['DFMA']} DFMA, {ops['DADD']} DADD, {ops['DMUL']} DMUL for {elements}")
    halvings = Counter(i.base for i in kernel.sass.reached)
    order = []
    # Five exchanges of four columns, two registers each; then three additions within the lane.
    if (halvings["SHFL"], halvings["DADD"]) != (40, 23):
        order.append(f"{halvings['SHFL']} SHFL and {halvings['DADD']} DADD, not 40 and 23")
    return {"width": width, "fused": fused, "order": order}


def judge_addition(kernel: NormKernel) -> dict[str, list[str]]:
    """Of the warp that adds up: every addition is there, and each is of one value."""
    ops = Counter(i.base for i in hot_part(kernel))
    wrong = []
    if (ops["SHFL"], ops["DADD"]) != (2 * AT_ONCE * LANES, AT_ONCE * LANES) or ops["DFMA"]:
        wrong.append(f"{ops['SHFL']} SHFL, {ops['DADD']} DADD for {AT_ONCE * LANES} sums")
    return {"order": wrong}


def judge_norm(kernel: NormKernel, arch: Arch, number: str) -> dict[str, Any]:
    """The figures and verdicts of one kernel on a card of architecture `number`."""
    registers = kernel.usage["REG"]
    blocks = arch.blocks_per_sm(registers, kernel.threads, kernel.usage["SHARED"])
    verdicts: dict[str, list[str]] = {
        "spills": [f"{kernel.usage[k]} bytes of {k}" for k in ("STACK", "LOCAL") if kernel.usage[k]]
    }
    verdicts["spills"] += [
        i.text
        for i in kernel.sass.instructions
        if (access := access_of(i)) is not None and access.space == "local"
    ]
    if blocks < kernel.min_blocks:
        verdicts["occupancy"] = [f"{blocks} blocks fit on an SM, not {kernel.min_blocks}"]
    row: dict[str, Any] = {
        "kernel": kernel.name,
        "grad": kernel.grad,
        "registers": registers,
        "threads": kernel.threads,
        "blocks_per_sm": blocks,
    }
    if kernel.name == "square_sums":
        part = hot_part(kernel)
        verdicts |= judge_sums(kernel, part)
        loads = [a.bytes for a in accesses(part) if not a.store]
        element = dict(TYPES.values())[kernel.grad or "fp32"]
        per_second = arch.sms * arch.clock
        row |= {
            "load_bits": dict(sorted(Counter(str(8 * b) for b in loads).items())),
            "in_flight_bytes_per_sm": AT_ONCE * 4 * element * kernel.threads * blocks,
            "memory_ms": 1e3 * LLAMA_7B_BLOCK * element / arch.bandwidth,
            "fp64_ms": 1e3
            * LLAMA_7B_BLOCK
            * (1 / FP64_LANES[number] + 1 / CONVERSIONS[number])
            / per_second,
        }
    elif kernel.name == "add_up":
        verdicts |= judge_addition(kernel)
        additions = LLAMA_7B_BLOCK / BLOCK
        row["latency_ms"] = 1e3 * additions * DADD_CYCLES[number] / arch.clock
    return {**row, "verdicts": verdicts, "ok": not any(verdicts.values())}
