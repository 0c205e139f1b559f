# SPDX-License-Identifier: Apache-2.0
"""Footprints: rings as the engine takes them, state as the optimizers keep it, and where peaks lie.

Beside them stands the paper's table, regenerated where that is fast.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hift_ext
from hift_ext.planning import footprint
from hift_ext.planning.footprint import Keeping, footprints, hift_only, ring_bytes, state_bytes
from hift_ext.planning.keeping import OPTIMIZERS
from hift_ext.planning.trace import Peak, Trace, Workload, trace

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]
import paper_table  # noqa: E402
from test_trace import LLAMA, chain  # noqa: E402

BF16 = torch.bfloat16
SIZES = [[3, 5000], [70000, 1, 257], [2_000], [17] * 3000]  # the last, by its gaps, is largest


def hand(counts: list[int], dtype: torch.dtype = torch.float32, **peaks: Peak) -> Trace:
    """A trace with made-up peaks, 1000 bytes of weights unless said."""
    usual = dict.fromkeys(("start", "forward", "above", "own", "end"), Peak(1000, 0, 0, 0))
    return Trace(
        index=0,
        name="made up",
        params=len(counts),
        numel=sum(counts),
        counts=tuple(counts),
        dtypes=(dtype,) * len(counts),
        forward_flops=0,
        backward_flops=0,
        **{**usual, **peaks},
    )


@pytest.mark.parametrize("page", [4096, 100_000])
@pytest.mark.parametrize("staging", ["auto", 300_000])
@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        (torch.float32, {}),
        (torch.float32, {"state_dtype": "8bit"}),
        (BF16, {"master": "split"}),
        (BF16, {"master": "fp32", "state_dtype": BF16}),
    ],
)
def test_the_ring_is_the_engines(
    page: int, staging: Any, dtype: torch.dtype, settings: dict[str, Any]
) -> None:
    """A disk store on the CPU takes its ring by the same lines of the engine as a GPU's."""
    params = [[nn.Parameter(torch.ones(n, dtype=dtype)) for n in group] for group in SIZES]
    flat = [p for group in params for p in group]
    with hift_ext.AdamW(
        flat, groups=params, store="disk", staging=staging, page_bytes=page, **settings
    ) as made:
        for p in flat:
            p.grad = torch.ones_like(p)
        made.step()
        want = made.stats()["staging_bytes"]
    stored = Keeping(**settings).stored([dtype])
    assert ring_bytes(SIZES, stored, staging=staging, page_bytes=page) == want


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_state_is_what_the_optimizer_keeps(name: str, dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.ones(512, dtype=dtype))
    cls = {"adamw": hift_ext.AdamW, "adam": hift_ext.Adam, "adagrad": hift_ext.Adagrad}
    momentum = {"momentum": 0.9} if name == "sgdm" else {}
    with cls.get(name, hift_ext.SGD)([weight], lr=0.1, layers_per_group="all", **momentum) as made:
        weight.grad = torch.ones_like(weight)
        made.step()
        tensors = [v for k, v in made.state[weight].items() if torch.is_tensor(v) and k != "step"]
    master = 2 if dtype is BF16 else 0  # the low half of a split one
    want = sum(t.nbytes for t in tensors) + master * 512
    assert state_bytes(512, dtype, optimizer=name) == want


def test_the_peak_is_where_it_is() -> None:
    high = Peak(1000, 10, 500, 90)
    for when, place in [("forward", "forward"), ("backward", "above"), ("backward", "own")]:
        found = hift_only([hand([1024], **{place: high})], staging=0)[0]
        assert (found.when, found.peak_bytes, found.ring) == (when, 1600, 0)
        parts = found.weights + found.gradients + found.activations + found.other + found.ring
        assert parts == found.peak_bytes
        assert found.activations == 500
    # State beside the parameters is there all the time, whichever group is active.
    resident = hift_only([hand([1024]), hand([2048])], store="device")
    assert [g.ring for g in resident] == [8 * 3072] * 2
    # BAdam's float32 gradient of a 16-bit weight exists in the step alone.
    block = footprint.badam([hand([1024], BF16, above=high)])
    assert (block.when, block.peak_bytes) == ("step", 1000 + (8 + 4 + 4) * 1024)
    assert footprint.badam([hand([1024], above=high)]).peak_bytes == 1600 + 8 * 1024


def test_a_ring_moves_the_peak_by_its_size_and_no_more() -> None:
    traces = trace(Workload(LLAMA, 2, 16))
    none = hift_only(traces, staging=0)
    small = hift_only(traces, staging=1 << 16)
    assert [a.peak_bytes - b.peak_bytes for a, b in zip(small, none, strict=True)] == [1 << 16] * 4
    assert [t.peak.total for t in traces] == [g.peak_bytes for g in none]


def test_all_methods_on_one_workload() -> None:
    workload = Workload(LLAMA, 4, 32, dtype=BF16)
    found = footprints(workload, staging=1 << 16)
    total = sum(t.numel for t in found.traces)
    full = found.full_fine_tuning
    assert full.numel == total
    # Two moments in float32 and the low half of the master, and a gradient of two bytes.
    assert full.ring >= total * 10
    assert found.peak.peak_bytes < found.badam.peak_bytes < full.peak_bytes
    assert found.lora.weights > full.weights  # adapters beside the weights
    assert found.peak.peak_bytes == max(g.peak_bytes for g in found.groups)


def test_accumulated_gradients_are_there_in_forward() -> None:
    without, with_them = (
        hift_only(trace(chain(lambda _: nn.ReLU(), accumulate=a)), staging=0) for a in (False, True)
    )
    gradient = 256 * 256 * 4
    assert with_them[0].gradients >= gradient
    assert with_them[0].peak_bytes >= without[0].peak_bytes


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optimizer": "lion"}, "'lion' is not offered; offered: adamw"),
        ({"optimizer": "adagrad", "state_dtype": "8bit"}, "not offered for adagrad"),
        ({"staging": 8000, "page_bytes": 8192}, "does not hold two pages"),
        ({"store": "disk", "staging": 0}, "needs store='ram'"),
    ],
)
def test_what_cannot_be_is_said(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        hift_only([hand([100_000])], **settings)


# The paper ----------------------------------------------------------------------------------------


def test_the_papers_sizes_come_out_exactly() -> None:
    for row in paper_table.ROWS:
        assert paper_table.published(row) == (row.para, row.gra, row.sta), row
        for ours, theirs in zip(
            paper_table.counted(row), (row.para, row.gra, row.sta), strict=True
        ):
            assert abs(ours - theirs) <= 0.07, row


def test_the_table_in_docs_is_the_scripts() -> None:
    text = paper_table.TARGET.read_text()
    for row in paper_table.ROWS:
        assert paper_table.sizes(row) in text
    for line in paper_table.shares():
        assert line in text
    # The totals are traced for minutes; one of them stands for the others: 55.41 GiB measured,
    # fp32, the first block active.
    peak = hift_only(trace(paper_table.LLAMA, positions=[1]))[0].peak_bytes / 2**30
    assert f"| AdamW | fp32 | HiFT | 55.41 | {peak:.2f} |" in text
    assert abs(peak / 55.41 - 1) < 0.01
