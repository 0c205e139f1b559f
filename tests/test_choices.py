# SPDX-License-Identifier: Apache-2.0
# What "auto" means: the rules against brute force and against their promises, and the optimizer's
# one line about them. tests/cuda_sim/probing.py has them drive a ring on the simulated runtime.

from __future__ import annotations

import errno
import logging
import re
import sys
from pathlib import Path

import models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hift_ext
from hift_ext import choices, hardware, memory, ops, probe
from hift_ext.choices import Disk, Machine, choose, launch, look
from hift_ext.rates import BusRates, DiskRates

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import a6000  # noqa: E402

GIB = 1 << 30
LLAMA_BLOCK = 8 * 202_383_360
"""Bytes of AdamW's float32 state of one LLaMA-7B block."""

GPU = Machine(on_gpu=True, host_free=256 * GIB, device_free=20 * GIB, sms=84)


def room(free: int = 1 << 50, speed: float = 1e9):
    return lambda store: Disk("/scratch", free, speed)


def test_the_cpu_keeps_its_usual() -> None:
    choice = choose([LLAMA_BLOCK], 2, Machine(on_gpu=False, host_free=64 * GIB))
    assert (choice.store, choice.staging, choice.page_bytes) == ("ram", ops.WHOLE_GROUP, 4 << 20)
    assert choice.why == "store ram: state of 1.62 GB fits 68.7 GB of free host memory"
    choice = choose([100], 2, Machine(on_gpu=False), store="disk", staging=1 << 20)
    assert (choice.store, choice.staging, choice.page_bytes) == ("disk", 1 << 20, 1 << 19)
    assert choice.why == ""


def test_nothing_known_is_as_ever() -> None:
    choice = choose([], 2, Machine(on_gpu=True))
    assert (choice.store, choice.staging, choice.page_bytes) == ("ram", ops.WHOLE_GROUP, 16 << 20)


def test_what_was_asked_for_stays() -> None:
    wishes = {"store": "disk:/x", "staging": 5 << 20, "page_bytes": 1 << 20}
    choice = choose(
        [LLAMA_BLOCK] * 32, 2, Machine(on_gpu=True, host_free=10, disk=room()), **wishes
    )
    assert (choice.store, choice.staging, choice.page_bytes) == ("disk:/x", 5 << 20, 1 << 20)
    assert choice.why == ""
    choice = choose([LLAMA_BLOCK], 2, GPU, store="device")
    assert choice.store == "device"
    assert choice.why == ""


def test_state_goes_to_disk_where_memory_is_short() -> None:
    groups = [LLAMA_BLOCK] * 32  # 51.8 GB
    fits = sum(groups) / choices.HOST_SHARE
    near = Machine(on_gpu=True, host_free=int(fits) + 1, disk=room())
    assert choose(groups, 2, near).store == "ram"
    short = Machine(on_gpu=True, host_free=int(fits) - 8, disk=room(70 * 10**9))
    choice = choose(groups, 2, short)
    assert choice.store == "disk"
    assert "state of 51.8 GB is more than 80% of 64.8 GB" in choice.why
    assert "/scratch has 70 GB" in choice.why
    for on_gpu in (True, False):
        full = Machine(on_gpu=on_gpu, host_free=10**9, disk=room(60 * 10**9))
        with pytest.raises(
            OSError, match=r"51.8 GB .* of 60 GB free in /scratch.*'disk:PATH'"
        ) as e:
            choose(groups, 2, full)
        assert e.value.errno == errno.ENOSPC


def test_no_disk_for_triton_and_none_at_all() -> None:
    def nowhere(store: str) -> Disk:
        raise OSError("no folder for a scratch page file")

    short = Machine(on_gpu=True, host_free=1000, disk=nowhere)
    with pytest.raises(OSError, match=r"no disk takes it \(no folder for a scratch"):
        choose([10**6], 2, short)
    with pytest.raises(OSError, match="without CUDA kernels there is no disk store"):
        choose([10**6], 2, Machine(on_gpu=True, host_free=1000, kernels=False, disk=room()))


def streaming_s(group: float, page: float, latency: float, speed: float) -> float:
    """The model behind the page rule, by itself."""
    return group / speed + group / page * latency + 2 * page / speed


@given(st.floats(1e5, 1e11), st.floats(1e-6, 1e-3), st.floats(1e8, 1e11), st.integers(1, 4))
def test_pages_are_near_the_best(group, copy_s, speed, streams) -> None:
    machine = Machine(on_gpu=True, both_ways=speed, copy_s=copy_s)
    page = choose([int(group)], streams, machine).page_bytes
    assert page & (page - 1) == 0
    offered = [1 << n for n in range(18, 27)]
    assert page in offered
    latency = streams * copy_s + choices.LAUNCH_S
    best = min(streaming_s(group, p, latency, speed) for p in offered)
    assert streaming_s(group, page, latency, speed) <= 1.3 * best


def test_pages_of_known_links() -> None:
    a6000, h100 = (
        choices.on_card(hardware.get(key), host_free=None, device_free=40 * GIB)
        for key in ("a6000", "h100")
    )
    assert choose([LLAMA_BLOCK], 2, a6000).page_bytes == 16 << 20
    assert choose([LLAMA_BLOCK], 2, h100).page_bytes == 32 << 20
    # A slower disk decides, not the link.
    slow = Machine(on_gpu=True, host_free=1000, disk=room(speed=2e8))
    choice = choose([LLAMA_BLOCK], 2, slow)
    assert choice.store == "disk"
    assert choice.page_bytes == 2 << 20
    assert "100 us of latency a page and 0.2 GB/s" in choice.why.replace("200 MB/s", "0.2 GB/s")


def test_rings() -> None:
    whole = choose([LLAMA_BLOCK, 100], 2, GPU)
    assert whole.staging == ops.WHOLE_GROUP
    assert "hides behind forward and backward" in whole.why
    part = choose([LLAMA_BLOCK], 2, Machine(on_gpu=True, device_free=2 * GIB))
    assert part.staging == GIB // 2
    assert part.page_bytes == 16 << 20
    assert "33% of the largest group" in part.why
    # Less than LEAST_RING, up to half of what is free; pages shrink with it.
    small = choose([LLAMA_BLOCK], 2, Machine(on_gpu=True, device_free=100 << 20))
    assert small.staging == 48 << 20  # whole pages of 16 MiB / 2
    assert small.page_bytes == 8 << 20


def test_updates_over_the_bus() -> None:
    none = {"on_gpu": True, "device_free": 256 << 10}
    assert choose([LLAMA_BLOCK], 2, Machine(**none)).staging == 0
    least = 2 * choices.LEAST_PAGE  # where zero-copy is not offered, two pages
    for machine, store in (
        (Machine(**none, kernels=False), "auto"),
        (Machine(**none, disk=room()), "disk"),
    ):
        assert choose([LLAMA_BLOCK], 2, machine, store=store).staging == least
    # Measured faster than streaming what a small ring does not hold.
    for speed, staging in ((40e9, 0), (25e9, GIB // 2)):
        machine = Machine(on_gpu=True, device_free=2 * GIB, both_ways=20e9, zero_copy=speed)
        assert choose([LLAMA_BLOCK], 2, machine).staging == staging
    # A ring that hides everything is never given up.
    fast = Machine(on_gpu=True, device_free=40 * GIB, both_ways=20e9, zero_copy=1e12)
    assert choose([LLAMA_BLOCK], 2, fast).staging == ops.WHOLE_GROUP


@given(
    st.integers(0, 1 << 36),
    st.integers(0, 1 << 37),
    st.sampled_from(["ram", "disk"]),
    st.one_of(st.none(), st.floats(1e9, 1e11)),
    st.sampled_from(["auto", 1 << 12, 1 << 25]),
)
def test_a_ring_holds_two_pages_and_leaves_room(group, free, store, zero_copy, page) -> None:
    machine = Machine(on_gpu=True, device_free=free, zero_copy=zero_copy, disk=room())
    choice = choose([group], 2, machine, store=store, page_bytes=page)
    if page != "auto":
        assert choice.page_bytes == page
    if choice.staging == ops.WHOLE_GROUP:
        assert group <= choices.RING_SHARE * free or group == 0
    elif choice.staging == 0:
        assert store == "ram"
    else:
        assert choice.staging >= 2 * choice.page_bytes
        assert choice.staging % choice.page_bytes == 0
        most = max(choices.RING_SHARE * free, min(choices.LEAST_RING, free / 2))
        assert choice.staging <= max(most, 2 * choice.page_bytes)


def test_the_launch_is_the_kernels() -> None:
    text = (ROOT / "csrc/cuda/kernel.h").read_text()
    there = {
        name: int(value)
        for name, value in re.findall(r"inline constexpr int (k\w+) = (\d+);", text)
    }
    assert there["kThreads"] == choices.THREADS
    assert there["kRounds"] == choices.ROUNDS
    assert there["kBlocksPerSm"] == choices.BLOCKS_PER_SM
    assert "std::int64_t{kThreads} * kWidth * kRounds" in text
    shape = launch(202_383_360, 84)
    assert (shape.threads, shape.run, shape.blocks, shape.resident) == (256, 4096, 49410, 336)
    assert shape.waves == pytest.approx(147.05, abs=0.01)
    assert launch(1, 84).blocks == 1
    assert launch(8192, 84, width=8).blocks == 1


def test_the_a6000_is_worked_through_as_the_rules_are_now() -> None:
    assert (ROOT / "docs/a6000.md").read_text() == a6000.text(), "run benchmarks/a6000.py"


def test_a_machine_without_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(memory, "host_free_bytes", lambda: 800)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    found = look(torch.device("cpu"))
    assert (found.on_gpu, found.host_free, found.sms) == (False, 200, None)
    monkeypatch.setattr(memory, "disk_free_bytes", lambda folder: 4000)
    monkeypatch.setattr(ops, "scratch_folder", lambda: "/scratch")
    kept = probe.Probe(disk=DiskRates(3e9, 2e9, 1))
    monkeypatch.setattr(probe, "cached", lambda device=None, folder=None: kept)
    assert found.disk is not None
    assert found.disk("disk") == Disk("/scratch", 1000, 2e9)
    assert found.disk("disk:/data/x.pages") == Disk("/data", 1000, 2e9)
    assert found.disk("disk:x.pages") == Disk(".", 1000, 2e9)
    kept = probe.Probe()
    assert found.disk("disk") == Disk("/scratch", 1000, choices.DISK_BYTES_PER_S)
    monkeypatch.setattr(memory, "host_free_bytes", lambda: None)
    assert look(torch.device("cpu")).host_free is None


def test_a_machine_with_a_card(monkeypatch) -> None:
    profile = hardware.get("a6000")
    card = hardware.Present(1, profile, True, None, "", "580.1")
    monkeypatch.setattr(hardware, "present", lambda index: card)
    monkeypatch.setattr(memory, "device_free_bytes", lambda device: 7 * GIB)
    kept = probe.Probe()
    monkeypatch.setattr(probe, "cached", lambda device=None, folder=None: kept)
    found = look(torch.device("cuda", 1))
    assert (found.device_free, found.sms, found.measured) == (7 * GIB, 84, False)
    assert found.both_ways == pytest.approx(0.75 * 31.5e9, rel=1e-3)
    kept = probe.Probe(bus=BusRates(26e9, 25e9, 20e9, 300e9, 24e9, 18e9, 5e-6))
    found = look(torch.device("cuda", 1), kernels=False)
    assert (found.both_ways, found.copy_s, found.zero_copy) == (20e9, 5e-6, 18e9)
    assert (found.measured, found.kernels) == (True, False)
    monkeypatch.setattr(hardware, "present", lambda index: None)
    assert look(torch.device("cuda", 1)).device_free is None


def test_the_optimizer_says_what_it_chose_and_why(caplog) -> None:
    with caplog.at_level(logging.INFO, "hift_ext"):
        model = models.tiny()
        with hift_ext.AdamW(model) as optimizer:
            models.train(model, optimizer, models.batches(2))
    said = [r.getMessage() for r in caplog.records if "state in ram" in r.getMessage()]
    assert len(said) == 1
    assert "; store ram: state of " in said[0]
    assert "\n" not in said[0]


def test_state_that_does_not_fit_memory_rests_on_disk(monkeypatch, caplog) -> None:
    results = []
    for free in (None, 1000):
        monkeypatch.setattr(memory, "host_free_bytes", lambda free=free: free)
        model = models.tiny()
        with caplog.at_level(logging.INFO, "hift_ext"), hift_ext.AdamW(model) as optimizer:
            models.train(model, optimizer, models.batches(5))
            results.append((model, optimizer.state.engine.description))
    assert results[0][1] == "ram"
    assert results[1][1].startswith("disk")
    assert models.same(results[0][0], results[1][0])
    assert "store disk: state of" in caplog.text


def test_state_that_fits_nowhere_changes_nothing(monkeypatch) -> None:
    model, other = models.tiny(), models.tiny()
    optimizer = hift_ext.AdamW(model)
    with monkeypatch.context() as patch:
        patch.setattr(memory, "host_free_bytes", lambda: 1000)
        patch.setattr(memory, "disk_free_bytes", lambda folder: 1000)
        with pytest.raises(OSError, match="insist with store='ram'"):
            models.train(model, optimizer, models.batches(1))
        assert models.same(model, other)
        assert optimizer.active == 0
    optimizer.zero_grad()
    models.train(model, optimizer, models.batches(3))
    with hift_ext.AdamW(other, store="ram") as plain:
        models.train(other, plain, models.batches(3))
    assert models.same(model, other)
    optimizer.close()
