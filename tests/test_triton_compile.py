# SPDX-License-Identifier: Apache-2.0
# The Triton kernel, compiled without a GPU for those that it is meant for, and read: registers and
# spills, the width of its accesses, and which arithmetic it does. What is compiled is what a launch
# with the same arguments would run: the launch is stopped where it would follow.

from __future__ import annotations

import itertools
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from spans import CASES, NAMES, PAIRS, hyper_of

from hift_ext import ops

pytestmark = pytest.mark.needs("triton", "triton_compiler")

COUNT = 3 * 1024 + 5  # no multiple of anything: a whole run must not care
FLOATS = PAIRS[0]

# Of each element: explicit fused multiply-adds, and divisions and roots by IEEE rounding.
FMAS = {
    "adamw": 3,
    "adamw_amsgrad": 3,
    "adam": 4,
    "adam_amsgrad": 4,
    "adagrad": 2,
    "sgd": 2,
    "momentum": 4,
}
DIVIDING = {rule for rule in FMAS if rule not in ("sgd", "momentum")}


class Target:
    """What a launch asks a driver: a device of one architecture, that nobody has."""

    def __init__(self, arch: int) -> None:
        self._arch = arch

    def get_current_device(self) -> int:
        return self._arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._arch, 32)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """`compiled(arch, rule, pair, ...)`: the kernel that a launch would run."""
    from triton.runtime.driver import driver

    from hift_ext import triton_step

    patch = pytest.MonkeyPatch()
    patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))

    def compile_(
        arch, rule, pair, *, offset=0, count=COUNT, visit=3, device="cpu", kept=None, **scalars
    ):
        def tensor(dtype, size=count):
            return torch.empty(size + offset, dtype=dtype, device=device)[offset:]

        kept = dict(kept or {})
        state, master = kept.pop("state", torch.float32), kept.pop("master", None)
        blocks, number = -(-count // 256), ops.RULES[rule][1]
        if state == torch.uint8:
            kept["scales"] = [tensor(torch.float32, blocks) for _ in range(number)]
        values = blocks * 256 if state == torch.uint8 else count
        states = [tensor(state, values) for _ in range(number)]
        if master is not None:
            kept["master"] = tensor(master)
        hyper = hyper_of(CASES[rule], visit)
        span = triton_step.Span(tensor(pair[0]), tensor(pair[1]), states, rule, hyper, **kept)
        before = dict(vars(driver))  # reset_active() would look for a GPU
        driver.set_active(Target(arch))
        try:
            return triton_step.launch(span, triton_step.Scalars(**scalars), compile_only=True)
        finally:
            vars(driver).update(before)

    yield compile_
    patch.undo()


def tool(name: str) -> str:
    """A program that Triton brings along."""
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    assert path.is_file(), f"triton {triton.__version__} has no {name}"
    return str(path)


def resources(kernel, folder: Path) -> dict[str, int]:
    """Registers, stack and local memory of a thread, from the machine code."""
    path = folder / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    command = [tool("cuobjdump"), "--dump-resource-usage", str(path)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", listing)}


def accesses(ptx: str) -> Counter:
    """Global loads and stores: (direction, bytes of one access) -> how many are written."""
    found = re.findall(r"\b(ld|st)\.global(?:\.L\w+::\w+)*(?:\.v(\d))?\.[bfsu](\d+)", ptx)
    return Counter((kind, int(lanes or 1) * int(bits) // 8) for kind, lanes, bits in found)


def sizes(rule: str, pair) -> tuple[list[int], list[int]]:
    """Bytes of an element of each stream that is read, and of each that is written."""
    state = [4] * ops.RULES[rule][1]
    return [pair[0].itemsize, pair[1].itemsize, *state], [pair[0].itemsize, *state]


MATRIX = [(86, rule, pair) for rule in FMAS for pair in PAIRS]
MATRIX += [(arch, rule, FLOATS) for arch in (80, 90) for rule in FMAS]
MATRIX += [(arch, "adamw_amsgrad", pair) for arch in (80, 90) for pair in PAIRS[1:]]


def pair_name(pair) -> str:
    return "-".join(NAMES[t] for t in pair)


@pytest.mark.parametrize(
    ("arch", "rule", "pair"),
    MATRIX,
    ids=lambda v: pair_name(v) if isinstance(v, tuple) else str(v),
)
def test_machine_code(compiled, arch, rule, pair, tmp_path):
    from hift_ext.triton_step import RUN, WARPS

    kernel = compiled(arch, rule, pair)
    ptx, elements = kernel.asm["ptx"], RUN // (32 * WARPS)
    assert f".target sm_{arch}" in ptx
    used = resources(kernel, tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0, used
    assert used["REG"] <= 80, used  # 6 programs of 128 threads on an SM: 24 warps or more
    assert kernel.metadata.shared == 0  # no stream changes its layout on the way

    # A whole run by accesses of 16 bytes of the widest type, as the CUDA kernel has them, and as
    # many elements of the others; the tail element by element.
    expected = Counter()
    width = 16 // max(sizes(rule, pair)[0])
    for direction, streams in zip(("ld", "st"), sizes(rule, pair), strict=True):
        for size in streams:
            expected[direction, width * size] += elements // width
            expected[direction, size] += elements
    assert accesses(ptx) == expected

    assert not re.findall(r"\w+\.approx\S*|div\.full\S*|\S*\.ftz\S*|rcp\S*|rsqrt\S*", ptx)
    both = 2 * elements  # whole run and tail
    dividing = both * (rule in DIVIDING)
    assert len(re.findall(r"\bdiv\.rn\.f32", ptx)) == dividing
    assert len(re.findall(r"\bsqrt\.rn\.f32", ptx)) == dividing
    assert len(re.findall(r"\bfma\.rn\.f32", ptx)) == both * FMAS[rule]
    # Nor does the assembler make more of them: what names its rounding stays as it is.
    assert not re.findall(r"\b(?:add|sub|mul)\.f32", ptx)
    assert kernel.metadata.enable_fp_fusion is False


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
@pytest.mark.parametrize("pair", PAIRS, ids=pair_name)
def test_one_kernel_for_all_lengths_and_settings(compiled, rule, pair):
    """A learning rate or a length that changes compiles nothing."""
    first = compiled(86, rule, pair)
    for count in (1, 16, 1023, 1 << 20):
        assert compiled(86, rule, pair, count=count, visit=count) is first
    # Longer than 32 bits count, without the memory.
    assert compiled(86, rule, pair, count=(1 << 33) + 7, device="meta") is first
    ttir = first.asm["ttir"]
    start = re.search(r"(%\S+) = tt\.get_program_id x : i32.*\n.*?(%\S+) = arith\.extsi \1", ttir)
    assert start, ttir
    assert re.search(rf"arith\.muli {re.escape(start[2])}, %\S+ : i64", ttir), ttir


@pytest.mark.parametrize("pair", PAIRS, ids=pair_name)
def test_misaligned_addresses_get_narrow_accesses(compiled, pair):
    """An address that is not a multiple of 16 bytes must not be used as if it were."""
    kernel = compiled(86, "adamw", pair, offset=1)
    widest = max(size for _, size in accesses(kernel.asm["ptx"]))
    assert widest == 4
    assert kernel is not compiled(86, "adamw", pair)


@pytest.mark.parametrize("arch", [80, 86, 90])
def test_scalars_enter_by_address(compiled, arch, tmp_path):
    """Loads of one float more each, whatever their alignment; no copy of the rule for them."""
    names = ("grad_scale", "clip", "found_inf")
    plain = accesses(compiled(arch, "adamw", FLOATS).asm["ptx"])
    for used in itertools.product((False, True), repeat=3):
        floats = torch.ones(4)
        scalars = {name: floats[k] for k, name in enumerate(names) if used[k]}
        kernel = compiled(arch, "adamw", FLOATS, **scalars)
        extra = accesses(kernel.asm["ptx"]) - plain
        assert extra == Counter({("ld", 4): sum(used)}) - Counter()
        assert resources(kernel, tmp_path)["LOCAL"] == 0
        aligned = {name: torch.ones(1) for name in scalars}
        assert compiled(arch, "adamw", FLOATS, **aligned) is kernel


BF16 = PAIRS[2]
KEPT = {
    "split": {"master": torch.int16},
    "whole": {"master": torch.float32, "state": torch.bfloat16},
    "random": {"state": torch.bfloat16, "stochastic": True, "stochastic_state": True},
    "codes": {"state": torch.uint8, "master": torch.int16},
    "random_codes": {"state": torch.uint8, "stochastic": True, "stochastic_state": True},
}


@pytest.mark.parametrize(
    ("arch", "name"), [*((86, name) for name in KEPT), (80, "random_codes"), (90, "random_codes")]
)
def test_machine_code_of_numbers_in_fewer_bits(compiled, arch, name, tmp_path):
    from hift_ext.triton_step import RUN, WARPS

    kernel = compiled(arch, "adamw", BF16, kept=KEPT[name])
    ptx, elements = kernel.asm["ptx"], RUN // (32 * WARPS)
    assert f".target sm_{arch}" in ptx
    used = resources(kernel, tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0, used
    assert used["REG"] <= 128, used  # 4 programs on an SM
    assert not re.findall(r"\w+\.approx\S*|div\.full\S*|\S*\.ftz\S*|rsqrt\S*", ptx)
    both = 2 * elements  # whole run and tail
    assert len(re.findall(r"\bsqrt\.rn\.f32", ptx)) == both
    assert len(re.findall(r"\bfma\.rn\.f32", ptx)) == both * FMAS["adamw"]
    assert not re.findall(r"\b(?:add|sub|mul)\.f32", ptx)
    # Another key, element or length compiles nothing.
    other = {**KEPT[name], "key": 1 << 63, "element": (1 << 40) + 3}
    for count in (1, 4096):
        assert compiled(arch, "adamw", BF16, kept=other, count=count) is kernel
