# SPDX-License-Identifier: Apache-2.0
# Judges a compiled kernel by its listings: is its loop at the memory bound of a given card, and are
# its bits those of IEEE 754? What is wrong is said with the instruction that is to blame.
"""Verdicts on one kernel: spills, occupancy, access widths, exact arithmetic, latency, bound."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sass import Instruction, Listing, access_of, accesses

LLAMA_7B_BLOCK = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
"""Parameters of one LLaMA-7B block: four projections, the gated feed-forward net, two norms."""

LATENCY_S = 1e-6
"""From a load to its value while the card is busy: assumed, and more than an idle card takes."""

ARITHMETIC_SHARE = 0.8
"""How much of memory's time arithmetic may take: above it, neither hides behind the other."""


@dataclass(frozen=True)
class Rule:
    """What a rule asks for per element: `fmaf`s in its source, divisions, roots."""

    name: str
    states: int
    fused: int
    exact: int = 0


RULES = {
    "AdamRule<true>": Rule("adamw", states=2, fused=3, exact=1),
    "AmsgradRule<true>": Rule("adamw_amsgrad", states=3, fused=3, exact=1),
    "AdamRule<false>": Rule("adam", states=2, fused=4, exact=1),
    "AmsgradRule<false>": Rule("adam_amsgrad", states=3, fused=4, exact=1),
    "Adagrad": Rule("adagrad", states=1, fused=2, exact=1),
    "Sgd": Rule("sgd", states=0, fused=2),
    "Momentum": Rule("momentum", states=1, fused=4),
}
TYPES = {"float": ("fp32", 4), "BFloat16": ("bf16", 2), "Float16": ("fp16", 2)}
TYPE_PAIRS = [
    ("fp32", "fp32"),
    ("bf16", "fp32"),
    ("bf16", "bf16"),
    ("fp16", "fp32"),
    ("fp16", "fp16"),
]
KERNELS = [(rule.name, *pair) for rule in RULES.values() for pair in TYPE_PAIRS]


@dataclass(frozen=True)
class Arch:
    """An SM's limits, and a card that has such SMs.

    `warps`, `blocks`, `shared_bytes`, `fp32_lanes`: CUDA C++ Programming Guide, "Technical
    Specifications per Compute Capability" and "Throughput of Native Arithmetic Instructions".
    65,536 registers in four parts, given to warps in units of 256, and 1 KiB of shared memory that
    each block costs: the toolkit's cuda_occupancy.h. `bandwidth` (bytes a second), `sms` and
    `clock` (Hz, from the peak fp32 rate): the card's data sheet.
    """

    warps: int
    blocks: int
    shared_bytes: int
    fp32_lanes: int
    card: str
    bandwidth: float
    sms: int
    clock: float

    def blocks_per_sm(self, registers: int, threads: int, shared: int) -> int:
        """Blocks that fit on an SM at once."""
        warps = -(-threads // 32)
        per_warp = -(-registers * 32 // 256) * 256
        by_registers = 65536 // 4 // per_warp * 4 // warps
        by_shared = self.shared_bytes // (-(-shared // 128) * 128 + 1024)
        return min(self.blocks, self.warps // warps, by_registers, by_shared)

    def compute_s(self, loop: Sequence[Instruction], passes: float) -> float:
        """Seconds for `passes` of a loop by a warp each, on the whole card, if memory were free.

        An SM issues four instructions a cycle. Float arithmetic and integer multiplication have
        `fp32_lanes`, or 64 for the latter; the other integer, logic, selection and comparison
        instructions have 64; roots, reciprocals and range checks 16. As many are taken for reads of
        the argument at a computed place, which no table lists.
        """
        kinds = Counter(pipe_of(i) for i in loop)
        multiplied = sum(i.base == "IMAD" for i in loop)
        cycles = max(
            len(loop) / 4,
            kinds["fma"] * 32 / self.fp32_lanes,
            multiplied * 32 / 64,
            kinds["alu"] * 32 / 64,
            kinds["slow"] * 32 / 16,
        )
        return passes * cycles / self.sms / self.clock


def pipe_of(i: Instruction) -> str:
    """Which part of an SM executes an instruction (Nsight Compute's guide, "Pipelines")."""
    if i.base in ("FFMA", "FMUL", "FADD", "IMAD"):
        return "fma"
    if i.base in ("MUFU", "FCHK", "LDC"):
        return "slow"
    if access_of(i) or i.base.startswith("U") or i.base in ("BRA", "BSSY", "BSYNC", "CALL", "EXIT"):
        return "other"
    return "alu"


ARCHS = {
    "80": Arch(64, 32, 164 << 10, 64, "A100 80GB SXM", 2039e9, 108, 1.41e9),
    "86": Arch(48, 16, 100 << 10, 128, "RTX A6000", 768e9, 84, 1.80e9),
    "89": Arch(48, 24, 100 << 10, 128, "RTX 6000 Ada", 960e9, 142, 2.505e9),
    "90": Arch(64, 32, 228 << 10, 128, "H100 SXM", 3350e9, 132, 1.98e9),
}


@dataclass(frozen=True)
class Kernel:
    """One instantiation of the kernel, as compiled for one architecture."""

    rule: Rule
    param: str
    grad: str
    ptx: Listing
    sass: Listing
    usage: Mapping[str, int]
    threads: int
    min_blocks: int

    @property
    def width(self) -> int:
        """Elements of one access: 16 bytes of the widest type involved."""
        return 4 if self.rule.states or "fp32" in (self.param, self.grad) else 8

    def streams(self, elements: int = 1) -> tuple[list[int], list[int]]:
        """Bytes of the loads and of the stores that update so many neighbouring elements."""
        sizes = dict(TYPES.values())
        states = [4 * elements] * self.rule.states
        param, grad = sizes[self.param] * elements, sizes[self.grad] * elements
        return sorted([param, grad, *states]), sorted([param, *states])

    def elements(self, instructions: Sequence[Instruction]) -> float:
        """How many elements `instructions` update: nothing else is stored."""
        stored = sum(a.bytes for a in accesses(instructions) if a.store)
        return stored / sum(self.streams()[1])

    def hot_loop(self, listing: Listing) -> list[Instruction]:
        """The loop that nearly all elements go through; empty if no loop stores anything."""

        def size(body: Sequence[Instruction]) -> tuple[int, int]:
            stores = [a.bytes for a in accesses(body) if a.store]
            return max(stores, default=0), sum(stores)

        best = max((listing.body(loop) for loop in listing.loops), key=size, default=[])
        return best if size(best) > (0, 0) else []


Cost = Mapping[str, Counter[str]]
"""What an exact division ("div") and an exact root ("sqrt") are made of: see `signature`."""


def signature(listing: Listing) -> Counter[str]:
    """Counts what tells exact arithmetic from approximate: fused operations, reciprocals and roots,
    checks of a division's range, calls of slow paths, and all that flushes denormals.
    """
    counts: Counter[str] = Counter()
    for i in listing.reached:
        if i.base in ("FFMA", "FCHK", "MUFU"):
            counts[i.op.removesuffix(".FTZ")] += 1
        if listing.enters_subroutine(i):
            counts["CALL"] += 1
        if ".FTZ" in i.op:
            counts["FTZ"] += 1
    return counts


def differences(found: Counter[str], wanted: Counter[str]) -> list[str]:
    """Where two counts differ, in words."""
    keys = sorted(found.keys() | wanted.keys())
    return [f"{found[k]} {k} for {wanted[k]}" for k in keys if found[k] != wanted[k]]


def unrounded(ptx: Listing) -> list[str]:
    """Float operations that are not rounded as IEEE 754 asks, or may be contracted."""
    rounded = re.compile(
        r"(add|sub|mul|fma|div|sqrt|rcp)\.rn\.f32|cvt\.(f32\.b?f16|rn\.b?f16\.f32)"
    )
    free = re.compile(r"(mov|neg|abs|selp|setp\.\w+|ld|st|min|max)\b(?!.*\.ftz)")
    return [
        f"PTX: {i.text}"
        for i in ptx.instructions
        if re.search(r"\.f(16|32|64|16x2)$|bf16|\.approx|\.full|\.ftz", i.op)
        and not (rounded.fullmatch(i.op) or free.match(i.op))
    ]


def judge_arithmetic(kernel: Kernel, cost: Cost) -> tuple[list[str], list[str]]:
    """What is wrong with divisions, roots and roundings, and with fused operations."""
    exact, fused = unrounded(kernel.ptx), []
    ops = Counter(i.op for i in kernel.ptx.reached)
    elements = kernel.elements(kernel.ptx.reached)
    roots = kernel.rule.exact * elements
    divisions = roots + 1  # by the gradients' scale, once
    for op, wanted in (("div.rn.f32", divisions), ("sqrt.rn.f32", roots)):
        if ops[op] != wanted:
            exact.append(f"PTX: {ops[op]} {op} for {wanted:g}")
    if ops["fma.rn.f32"] != kernel.rule.fused * elements:
        wanted = kernel.rule.fused * elements
        fused.append(f"PTX: {ops['fma.rn.f32']} fma.rn.f32 for {wanted:g}")

    elements = kernel.elements(kernel.sass.reached)
    roots = kernel.rule.exact * elements
    expected = Counter({"FFMA": int(kernel.rule.fused * elements)})
    for part, times in (("div", roots + 1), ("sqrt", roots)):
        expected.update({key: int(times * count) for key, count in cost[part].items()})
    for difference in differences(signature(kernel.sass), expected):
        (fused if " FFMA " in difference else exact).append(f"SASS: {difference}")
    return exact, fused


def in_flight(loop: Sequence[Instruction]) -> int:
    """Bytes that a thread asks for before it first needs one of them."""
    waiting: set[str] = set()
    asked = 0
    for i in loop:
        if waiting & i.reads:
            break
        access = access_of(i)
        if access is not None and access.space == "global" and not access.store:
            asked += access.bytes
            waiting |= i.writes
    return asked


def judge_accesses(
    kernel: Kernel, loop: Sequence[Instruction], loads: Sequence[int], stores: Sequence[int]
) -> list[str]:
    """What is wrong with the widths of the main loop's accesses, given in bytes and in order."""
    times = max(1, round(kernel.elements(loop) / kernel.width))
    wanted = tuple(sorted(side * times) for side in kernel.streams(kernel.width))
    if (loads, stores) == wanted:
        return []
    narrow = [i.text for i in loop if (a := access_of(i)) and a.bytes not in wanted[a.store]]
    text = f"loads of {loads} and stores of {stores} bytes, for {wanted[0]} and {wanted[1]}"
    return ["; ".join([text, *narrow])]


def judge(kernel: Kernel, arch: Arch, cost: Cost) -> dict[str, Any]:
    """Figures and verdicts of one kernel; a verdict is a list of what is wrong."""
    registers, shared = kernel.usage["REG"], kernel.usage["SHARED"]
    blocks = arch.blocks_per_sm(registers, kernel.threads, shared)
    loop, ptx_loop = kernel.hot_loop(kernel.sass), kernel.hot_loop(kernel.ptx)
    loads = sorted(a.bytes for a in accesses(loop) if not a.store)
    stores = sorted(a.bytes for a in accesses(loop) if a.store)
    elements = kernel.elements(loop)
    if not elements or not ptx_loop:
        raise ValueError(f"{kernel.sass.name}: no loop that stores anything, so nothing to judge")

    moved = (sum(loads) + sum(stores)) / elements
    memory_s = LLAMA_7B_BLOCK * moved / arch.bandwidth
    compute_s = arch.compute_s(loop, passes=LLAMA_7B_BLOCK / 32 / elements)
    # A warp waits for its loads, then computes, 4 cycles to an instruction that depends on the one
    # before and 40 to a root, a reciprocal or a read of the argument; all the while the SM's share
    # of the reading must be on its way to other warps.
    rounds = max(1.0, elements / kernel.width)
    cycles = sum(40 if pipe_of(i) == "slow" else 4 for i in loop) / rounds
    reading = arch.bandwidth * sum(loads) / (sum(loads) + sum(stores)) / arch.sms
    needed = reading * (LATENCY_S + cycles / arch.clock)
    flying = in_flight(loop) * kernel.threads * blocks

    exact, fused = judge_arithmetic(kernel, cost)
    verdicts: dict[str, list[str]] = {
        "spills": [
            f"{kernel.usage[k]} bytes of {k}" for k in ("STACK", "LOCAL") if kernel.usage[k]
        ],
        "argument": [],
        "occupancy": [],
        "width": judge_accesses(kernel, loop, loads, stores),
        "exact": exact,
        "fused": fused,
        "latency": [],
        "memory_bound": [],
    }
    for i in (*kernel.sass.instructions, *kernel.ptx.instructions):
        access = access_of(i)
        if access is not None and access.space != "global":
            which = "spills" if access.space == "local" else "argument"
            verdicts[which].append(f"{access.space} memory: {i.text}")
    if blocks < kernel.min_blocks:
        verdicts["occupancy"].append(f"{blocks} blocks fit on an SM, not {kernel.min_blocks}")
    if flying < needed:
        verdicts["latency"].append(f"{flying} bytes in flight on an SM, {needed:.0f} needed")
    if compute_s > ARITHMETIC_SHARE * memory_s:
        verdicts["memory_bound"].append(
            f"arithmetic takes {1e3 * compute_s:.3f} ms, memory {1e3 * memory_s:.3f} ms"
        )

    flops = sum(
        (2 if i.base == "fma" else 1)
        for i in ptx_loop
        if re.fullmatch(r"(add|sub|mul|fma|div|sqrt)\..*f32", i.op)
    )
    per_element = flops / kernel.elements(ptx_loop)
    return {
        "rule": kernel.rule.name,
        "param": kernel.param,
        "grad": kernel.grad,
        "state": "fp32" if kernel.rule.states else None,
        "registers": registers,
        "shared_bytes": shared,
        "local_bytes": kernel.usage["LOCAL"] + kernel.usage["STACK"],
        "threads": kernel.threads,
        "blocks_per_sm": blocks,
        "occupancy": blocks * kernel.threads / 32 / arch.warps,
        "loop_elements": elements,
        "loop_instructions": len(loop),
        "loop_argument_reads": sum(i.base == "LDC" for i in loop),
        "load_bits": dict(sorted(Counter(str(8 * b) for b in loads).items())),
        "store_bits": dict(sorted(Counter(str(8 * b) for b in stores).items())),
        "bytes_per_param": moved,
        "flops_per_param": per_element,
        "flops_per_byte": per_element / moved,
        "in_flight_bytes_per_sm": flying,
        "needed_bytes_per_sm": needed,
        "memory_ms": 1e3 * memory_s,
        "compute_ms": 1e3 * compute_s,
        "verdicts": verdicts,
        "ok": not any(verdicts.values()),
    }
