# SPDX-License-Identifier: Apache-2.0
# Run by tests/test_probe.py beside a module `_hift_ext` that is linked with the simulated runtime:
# the probe's copies and kernels, and what "auto" chooses on a GPU, end to end.
"""The probe and the choices on "cuda"."""

from __future__ import annotations

import gc
import math
import sys
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import optimizer as rig
import pytest
import torch

import hift_ext
from hift_ext import choices, hardware, memory, ops, probe, rates
from hift_ext.profiles import get

SIZE = 64 << 10
TICK_MS = 0.01  # of the simulated runtime, for each operation


def check_clean(what: str) -> None:
    gc.collect()
    assert not rig.sim.sim_error(), f"{what}: {rig.sim.sim_error().decode()}"
    assert rig.sim.sim_registrations() == 0, f"{what}: registrations left"
    assert rig.sim.sim_pageable_copies() == 0, f"{what}: pageable copies"


def check_copies(seed: int) -> None:
    """Every path moves its bytes, and `stop` waits for both ways and times them."""
    rig.sim.sim_begin(seed)
    source, target = (torch.frombuffer(ops.host_slab(SIZE), dtype=torch.uint8) for _ in range(2))
    source.copy_(torch.arange(SIZE) * 7 % 251)
    near, far = rig.Ring(SIZE), rig.Ring(SIZE)
    addresses = [m.data_ptr() for m in (source, target, near, far)]
    bus = ops.ext.Bus(*addresses, SIZE, rig.DEVICE.index)
    for path in (0, 2, 1):  # in, across, out
        bus.start()
        bus.copy(path, SIZE)
        bus.stop()
    assert torch.equal(target, source), seed
    target.zero_()
    bus.start()
    bus.copy(1, SIZE)
    bus.copy(0, SIZE)
    bus.stop()
    assert torch.equal(target, source), f"schedule {seed}: stop did not wait for both ways"
    for path, size, words in ((0, SIZE + 1, f"{SIZE + 1} bytes"), (0, 0, " 0 "), (3, 9, "path 3")):
        with pytest.raises(ValueError, match=words):
            bus.copy(path, size)
    bus.copy(0, SIZE)  # the clock starts behind it, for both ways
    bus.start()
    bus.copy(1, SIZE)
    # The copy, its event, the wait for it and the end: four operations after the beginning.
    assert bus.stop() > 3.5 * TICK_MS, f"schedule {seed}: the copy ran before the clock"
    bus.copy(0, SIZE)
    bus.copy(1, SIZE)
    del bus  # waits: what is queued uses the registered ranges
    check_clean(f"copies, schedule {seed}")


def check_rates() -> None:
    told: list[float] = []
    found = rates.bus_rates(rig.DEVICE, SIZE, told.append)
    assert all(math.isfinite(rate) and rate > 0 for rate in asdict(found).values()), found
    assert sum(told) == 6 * rates.ROUNDS * SIZE
    # Operations take the same simulated time: two copies at once and one alone differ by their
    # records only, and a copy of few bytes takes as long as one of many.
    assert found.both_ways <= found.to_device
    assert found.copy_latency_s >= 1e-3 * TICK_MS * 0.9
    check_clean("rates")


def check_facts() -> None:
    facts = ops.cuda_device(rig.DEVICE.index)
    assert facts == {
        "pci": "0000:66:00.0",
        "copy_engines": 2,
        "clock_hz": 1_500_000_000,
        "memory_hz": 8_001_000_000,
        "bus_bits": 384,
    }, facts
    with pytest.raises(RuntimeError, match="device 7"):
        ops.cuda_device(7)
    rig.sim.sim_begin(1)  # forgets the misuse


def pretend_card() -> None:
    """torch sees a card of the runtime's second device."""
    card = SimpleNamespace(
        name="NVIDIA RTX A6000",
        major=8,
        minor=6,
        multi_processor_count=84,
        total_memory=50 << 30,
        L2_cache_size=6 << 20,
    )
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 2
    torch.cuda.get_device_properties = lambda index: card
    memory.device_free_bytes = lambda device: 16 * SIZE
    rates.BLOCK_BYTES = 4096


def check_measure() -> None:
    """From the command down to the cache, with a card."""
    found = probe.measure(rig.DEVICE.index)
    assert found.bus is not None
    assert found.notes == (), found.notes
    assert probe.cached(rig.DEVICE.index).bus == found.bus
    card = hardware.present(rig.DEVICE.index)
    assert card is not None
    assert card.known
    assert card.profile.bandwidth == get("a6000").bandwidth
    assert probe.bus_key(card) in probe.cache_file().read_text()
    machine = choices.look(rig.DEVICE)
    assert machine.measured
    assert machine.both_ways == found.bus.both_ways
    assert machine.zero_copy == found.bus.zero_copy_update
    assert machine.copy_s == found.bus.copy_latency_s
    assert machine.sms == 84
    check_clean("measure")


def check_choices() -> int:
    """Rings that "auto" takes for several amounts of free memory; always the CPU's bits."""
    choices.LEAST_PAGE = 1024
    options: dict[str, Any] = {"lr": 1e-2}
    expected = rig.on_cpu(hift_ext.AdamW, rig.model, options, False)
    largest = 8 * (40 * 33 + 33)  # of the middle layer, before it is padded
    cases = (
        # Free on the card, measured zero-copy speed, ring at least and at most, pages move.
        (1 << 30, None, 2 * largest, 3 * largest, True),
        (16 << 10, None, 2 * 1024, largest - 1, True),
        (16 << 10, 1e15, 0, 0, False),
        (100, None, 0, 0, False),
    )
    for number, (free, zero_copy, least, most, moves) in enumerate(cases):
        machine = choices.Machine(
            on_gpu=True, host_free=1 << 30, device_free=free, zero_copy=zero_copy, sms=84
        )
        choices.look = lambda device, kernels=True, machine=machine: machine
        rig.on_device = True
        rig.sim.sim_begin(number)
        trained = rig.model()
        with hift_ext.AdamW(trained, **options) as optimizer:
            found = rig.train(trained, optimizer, 7, False)
            stats, engine = optimizer.stats(), optimizer.state.engine
        assert rig.equal(found, expected), f"{free} bytes free: other bits than on the CPU"
        assert least <= stats["staging_bytes"] <= most, (free, stats, engine.why)
        assert (stats["bytes_out"] > 0) == moves, (free, stats, engine.why)
        assert "store ram" in engine.why, engine.why
        assert "84 SMs" in engine.why, engine.why
        del optimizer, trained, engine
        check_clean(f"{free} bytes free")
    return len(cases)


def main() -> int:
    for seed in range(60):
        check_copies(seed)
    check_rates()
    check_facts()
    chosen = check_choices()
    print(f"60 schedules, {chosen} choices")
    return 0


def measured() -> int:
    """In a process of its own: torch is changed for good."""
    rig.sim.sim_begin(1)
    pretend_card()
    check_measure()
    print("measured")
    return 0


if __name__ == "__main__":
    sys.exit(measured() if "measure" in sys.argv[1:] else main())
