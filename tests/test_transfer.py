# SPDX-License-Identifier: Apache-2.0
# The forecast of transfers, against numbers made by hand and against what the engine itself counts.
# Times are of a link whose rates make every page a round number of milliseconds.

from __future__ import annotations

import models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hift_ext
from hift_ext.planning.transfer import (
    Group,
    Link,
    cut,
    over_the_bus,
    slots_of,
    through_a_ring,
)
from hift_ext.precision import Precision

MB = 1_000_000
HEADER = 4096  # of a page file
LLAMA_BLOCK = 202_383_360
ADAMW = hift_ext.AdamW([torch.nn.Parameter(torch.zeros(1))], layers_per_group="all")


def streams(precision: Precision = Precision()):  # noqa: B008
    return precision.stored(ADAMW.streams(ADAMW.param_groups[0]))


def fast(rate: float = 1.0, **options) -> Link:
    """1 MB is 1 ms, and updates cost nothing worth a digit."""
    return Link(rate, rate, 1e9, **options)


def test_a_llama_block_crosses_the_bus_in_65_ms() -> None:
    pages = cut([LLAMA_BLOCK], streams(), 16 << 20)
    assert sum(pages) == pytest.approx(1.62e9, rel=1e-3)
    assert len(pages) == -(-8 * LLAMA_BLOCK // (16 << 20))
    link = Link(25, 25, 768)
    assert sum(map(link.in_ms, pages)) == pytest.approx(65, abs=0.5)
    with_master = cut([LLAMA_BLOCK], streams(Precision(master="fp32")), 16 << 20)
    assert sum(map(link.out_ms, with_master)) == pytest.approx(97, abs=0.5)
    # And the update takes 8 ms: weights and both moments read and written, gradients read.
    assert link.update_ms(28 * LLAMA_BLOCK) == pytest.approx(7.4, abs=0.1)


def test_a_whole_ring_hides_all_behind_a_second_of_computing() -> None:
    groups = [Group((100 * MB,) * 16, 0, 1000.0)] * 3
    for step in through_a_ring(groups, fast(25), slots=16):
        assert step.bytes_in == step.bytes_out == 1600 * MB
        assert step.exposed_ms == 0
        # Page i comes in while page i + 1 goes out: one page more than a single way.
        assert step.transfer_ms == step.hidden_ms == pytest.approx(64 + 4, abs=1e-3)
        assert step.step_ms == pytest.approx(1000, abs=1e-3)


def test_a_whole_ring_hides_as_much_as_there_is_to_compute() -> None:
    # The bus is never idle: a step takes the 8 ms of its pages, 5 of them behind the computing.
    groups = [Group((MB,) * 8, 0, 5.0)] * 3
    for step in through_a_ring(groups, fast(), slots=8):
        assert step.exposed_ms == pytest.approx(3, abs=1e-3)
        assert step.transfer_ms == pytest.approx(8, abs=1e-3)
        assert step.hidden_ms == pytest.approx(5, abs=1e-3)


def test_a_small_ring_streams_inside_the_step() -> None:
    # Two of ten pages are here when the update begins. The third takes the first one's slot, which
    # is empty after 1 ms, and is here after 2; so a slot brings a page every 2 ms, and two slots
    # bring one a millisecond: 8 pages in 8 ms, the first of them a millisecond late.
    groups = [Group((MB,) * 10, 0, 100.0)] * 3
    for step in through_a_ring(groups, fast(), slots=2):
        assert step.exposed_ms == pytest.approx(9, abs=1e-3)
        # The last two go out behind the next forward, and the next two come in.
        assert step.transfer_ms == pytest.approx(9 + 2, abs=1e-3)


def test_slower_one_way_is_what_a_small_ring_waits_for() -> None:
    groups = [Group((MB,) * 100, 0, 1000.0)] * 2
    for step in through_a_ring(groups, Link(1, 0.5, 1e9), slots=4):
        assert step.exposed_ms == pytest.approx(2 * 96, rel=0.03)


def test_one_disk_takes_turns() -> None:
    groups = [Group((MB,) * 10, 0, 100.0)] * 3
    for step in through_a_ring(groups, fast(taking_turns=True), slots=10):
        assert step.exposed_ms == 0
        assert step.transfer_ms == pytest.approx(20, abs=1e-3)


def test_a_file_is_read_whole_before_the_first_update() -> None:
    update = Link(1, 1, 1)  # a page's update takes as long as its transfer
    groups = [Group((MB,) * 4, 4 * MB, 0.0)] * 2
    one_by_one = through_a_ring(groups, update, slots=4)[0]
    at_once = through_a_ring(groups, update, slots=4, all_first=True)[0]
    assert one_by_one.update_ms == at_once.update_ms == pytest.approx(4)
    assert at_once.exposed_ms > one_by_one.exposed_ms + 1


def test_one_group_stays_in_its_ring() -> None:
    (step,) = through_a_ring([Group((MB,) * 8, 0, 20.0)], fast(), slots=8)
    assert step.bytes_in == 0
    assert step.bytes_out == 8 * MB
    assert step.exposed_ms == 0
    assert step.transfer_ms == pytest.approx(8, abs=1e-3)
    # A page may not change before it is out, and 5 ms are too few for 8.
    (step,) = through_a_ring([Group((MB,) * 8, 0, 5.0)], fast(), slots=8)
    assert step.exposed_ms == pytest.approx(3, abs=1e-3)


def test_the_order_of_turns_decides_what_comes_next() -> None:
    small, large = Group((MB,), 0, 3.0), Group((MB,) * 6, 0, 3.0)
    groups = [small, large, small, small]
    first = through_a_ring(groups, fast(), slots=6)
    # Two small ones out of a ring of six slots leave their pages there: nothing changes for them.
    assert [step.bytes_out for step in first] == [MB, 6 * MB, MB, MB]
    other = through_a_ring(groups, fast(), slots=6, order=[1, 0, 2, 3])
    assert [step.bytes_out for step in other] == [MB, 6 * MB, MB, MB]
    assert other[1].step_ms != first[1].step_ms or other[0].transfer_ms != first[0].transfer_ms


def test_over_the_bus_the_step_waits_for_all_of_it() -> None:
    (step,) = over_the_bus([Group((10 * MB,), 10 * MB, 50.0)], Link(1, 0.5, 2))
    assert step.bytes_in == step.bytes_out == 10 * MB
    assert step.transfer_ms == pytest.approx(20)
    assert step.update_ms == pytest.approx(5)
    assert step.exposed_ms == pytest.approx(15)
    assert step.step_ms == pytest.approx(70)


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=5),
    st.integers(2, 8),
    st.floats(0, 30),
    st.floats(0.2, 5),
    st.floats(0.2, 5),
)
def test_no_step_is_faster_than_its_bytes(counts, slots, compute, rate_in, rate_out) -> None:
    groups = [Group((MB,) * count, 0, compute) for count in counts]
    steps = through_a_ring(groups, Link(rate_in, rate_out, 1e9), slots)
    total = sum(step.step_ms for step in steps)
    for way, rate in (("bytes_in", rate_in), ("bytes_out", rate_out)):
        moved = sum(getattr(step, way) for step in steps)
        assert total >= moved / rate / 1e6 - max(1 / rate_in, 1 / rate_out) * slots - 1e-6
    for step, group in zip(steps, groups, strict=True):
        assert 0 <= step.exposed_ms <= step.transfer_ms + 1e-6
        assert step.transfer_ms <= step.step_ms + 1e-6
        assert step.bytes_in <= step.bytes_out == group.size


@pytest.mark.parametrize(
    ("precision", "each"),
    [
        (Precision(), 8),
        (Precision(master="fp32"), 12),
        (Precision(master="split"), 10),
        (Precision(torch.bfloat16, "split"), 6),
        (Precision("8bit", "split"), 4 + 8 / 256),
    ],
)
def test_pages_are_cut_for_every_precision(precision, each) -> None:
    pages = cut([1 << 20], streams(precision), 1 << 20)
    assert sum(pages) == pytest.approx(each * (1 << 20), rel=5e-3)
    assert max(pages) <= 1 << 20


@pytest.mark.parametrize("page_bytes", [4096, 10_000, 1 << 20])
@pytest.mark.parametrize("staging", ["auto", 3 * 12_288])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, "8bit"])
def test_bytes_are_those_that_the_engine_counts(page_bytes, staging, state_dtype) -> None:
    if staging != "auto" and page_bytes > staging // 2:
        page_bytes = staging // 3
    model = models.tiny(blocks=3)
    optimizer = hift_ext.AdamW(
        model, store="disk", page_bytes=page_bytes, staging=staging, state_dtype=state_dtype
    )
    with optimizer:
        stored = streams(Precision(state_dtype))
        groups = [
            Group(cut([p.numel() for p in group.params], stored, page_bytes), 0, 1.0)
            for group in optimizer.groups
        ]
        slots = slots_of(groups, None if staging == "auto" else staging)
        steps = through_a_ring(groups, fast(), slots)
        counted = []
        for tokens in models.batches(3 * len(groups)):
            models.train(model, optimizer, [tokens])
            counted.append(optimizer.stats())
        assert counted[0]["staging_bytes"] == slots * max(max(group.pages) for group in groups)
        assert counted[0]["store_bytes"] == sum(group.size for group in groups) + HEADER
        # A step's bytes in are counted when they are asked for: at the end of the step before.
        last = counted[-len(groups) :]
        assert [stats["bytes_out"] for stats in last] == [step.bytes_out for step in steps]
        assert sum(stats["bytes_in"] for stats in last) == sum(step.bytes_in for step in steps)


def test_what_cannot_be_says_so() -> None:
    groups = [Group((MB, MB), 0, 1.0)]
    with pytest.raises(ValueError, match="1000001 bytes does not hold two pages of 1000000"):
        slots_of(groups, MB + 1)
    with pytest.raises(ValueError, match="at least two pages, not 1"):
        through_a_ring(groups, fast(), 1)
    with pytest.raises(ValueError, match=r"in_gbps must be a positive number of GB/s, not 0"):
        Link(0, 1, 1)


def test_without_state_nothing_moves() -> None:
    assert cut([100], [], 4096) == ()
    groups = [Group((), 100, 2.0)]
    assert slots_of(groups, None) == 0
    (step,) = through_a_ring(groups, fast(), 0)
    assert step.bytes_in == step.bytes_out == 0
    assert step.step_ms == pytest.approx(2, abs=1e-3)


@pytest.mark.parametrize("state_dtype", [torch.float32, "8bit"])
def test_small_parameters_take_the_room_that_the_engine_gives_them(state_dtype) -> None:
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(300)]
    options = {"store": "disk", "page_bytes": 8192, "state_dtype": state_dtype}
    with hift_ext.AdamW(weights, layers_per_group="all", **options) as optimizer:
        sum(weight.sum() for weight in weights).backward()
        optimizer.step()
        records = cut([3] * 300, streams(Precision(state_dtype)), 8192)
        assert optimizer.stats()["store_bytes"] == sum(records) + HEADER
