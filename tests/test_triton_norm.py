# SPDX-License-Identifier: Apache-2.0
# The norm in Triton: under its interpreter, in a process of its own, with the bits of the compiled
# module; compiled for the GPUs it is meant for, with wide loads, one fma an element, no spills.

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.needs("triton")
TYPES = [torch.float32, torch.bfloat16, torch.float16]

INTERPRETED = """
import _hift_ext, torch
from hift_ext import ops, triton_norm

torch.manual_seed(0)
counts = [0, 1, 127, 128, 129, 4095, 4096, 4097, 5000, 3]
rows, gradients, held = [], [], []
for number, count in enumerate(counts):
    dtype = list(ops.DTYPE_CODES)[number % 3]
    base = (torch.randn(count + 1) * torch.randn(count + 1).exp()).to(dtype)
    gradient = base[number % 2 :][:count]
    held.append(base)
    gradients.append(gradient)
    rows.append((0, 0, gradient.data_ptr(), ops.DTYPE_CODES[dtype] << 12, 0))
found, expected = torch.zeros(2, dtype=torch.float64)
triton_norm.sum_of_squares(gradients, found)
_hift_ext.sum_of_squares(rows, counts, expected.data_ptr(), 1)
assert torch.equal(found, expected), (found, expected)
sums = torch.rand(40 * 3 + 7, dtype=torch.float64).exp()
triton_norm.add_up(sums, found)
assert found.item() == sum(sums.tolist()), found
scale = torch.tensor(3.7)
for total in (0.0, 1e-9, 2.0, 25.0, 1e12, float("inf"), float("nan")):
    for by in (None, scale):
        total_ = torch.tensor(total, dtype=torch.float64)
        result, wanted = torch.zeros(2, 2)
        triton_norm.write_clip(total_, 0.7, by, result)
        at, scale_at = wanted.data_ptr(), 0 if by is None else by.data_ptr()
        _hift_ext.write_clip(total_.data_ptr(), 0.7, scale_at, at, at + 4)
        same = torch.equal(result.nan_to_num(-1), wanted.nan_to_num(-1))
        assert same, (total, by, result, wanted)

from hift_ext import backend, layout
import hift_ext
def trained(make):
    layout.make_engine = make
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(5000))
    optimizer = hift_ext.AdamW([p], lr=0.1, layers_per_group="all", max_grad_norm=0.5)
    norms = []
    for _ in range(2):
        p.grad = torch.randn(5000)
        optimizer.grad_scale = torch.tensor(4.0)
        optimizer.step()
        norms.append(optimizer.grad_norm.item())
    return p.detach(), norms
plain = trained(backend.make_engine)
def on_triton(streams, device, **options):
    from hift_ext.triton_engine import TritonEngine
    return TritonEngine(streams, device)
by_triton = trained(on_triton)
assert plain[1] == by_triton[1], (plain[1], by_triton[1])
torch.testing.assert_close(plain[0], by_triton[0])
print("same bits")
"""


def test_the_interpreter_has_the_bits_of_the_compiled_module() -> None:
    path = f"{Path(__file__).resolve().parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == ["same", "bits"]


@pytest.mark.needs("triton_compiler")
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_compiled_for_a_gpu(dtype, tmp_path, monkeypatch) -> None:
    from test_triton_compile import Target
    from triton.runtime.driver import driver

    from hift_ext import triton_norm

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    sums = torch.empty(3, dtype=torch.float64)
    before = dict(vars(driver))
    driver.set_active(Target(86))
    try:
        kernel = triton_norm.square_sums(torch.empty(9001, dtype=dtype), sums, compile_only=True)
        last = triton_norm.add_up(sums, sums[0], compile_only=True)
    finally:
        vars(driver).update(before)
    counts = Counter(re.findall(r"\b(?:ld|st|fma|mul|add|shfl)\.\S+", kernel.asm["ptx"]))
    width = "v4.b32" if dtype is torch.float32 else "v2.b32"
    assert counts[f"ld.global.{width}"] == 32  # a row each, for a whole block
    assert counts["fma.rn.f64"] == 4 * 33  # and one in the loop over the last block's rows
    assert not any("local" in op or (op.startswith("mul") and "f64" in op) for op in counts)
    assert (kernel.metadata.num_warps, kernel.metadata.shared) == (1, 0)
    assert (kernel.metadata.enable_fp_fusion, last.metadata.enable_fp_fusion) == (False, False)
    added = re.findall(r"add\.\S*f64", last.asm["ptx"])
    assert len(added) == triton_norm.TOGETHER + 1
