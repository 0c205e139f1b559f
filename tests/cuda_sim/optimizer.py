# SPDX-License-Identifier: Apache-2.0
# Run by tests/test_cuda_sim.py beside a module `_hift_ext` that is linked with the simulated
# runtime. torch's CPU tensors stand for those of a device; all else is the product as it is.
"""The optimizers on "cuda", against the same on the CPU and against torch.optim."""

from __future__ import annotations

import copy
import ctypes
import gc
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import _hift_ext
import torch
from torch import nn

import hift_ext
from hift_ext import backend, engines, layout, ops
from hift_ext.shards import bytes_of

DEVICE = torch.device("cuda", 1)
sim = ctypes.CDLL(_hift_ext.__file__)
for name in ("sim_allocate", "sim_make_stream"):
    getattr(sim, name).restype = ctypes.c_void_p
for name in ("sim_operations", "sim_pageable_copies", "sim_registrations"):
    getattr(sim, name).restype = ctypes.c_int64
sim.sim_error.restype = ctypes.c_char_p
stream = sim.sim_make_stream(DEVICE.index)


class Ring:
    """Device memory that is freed with its last tensor."""

    def __init__(self, size: int) -> None:
        self.address = sim.sim_allocate(ctypes.c_size_t(size))
        self.size = size

    def __del__(self) -> None:
        sim.sim_free(ctypes.c_void_p(self.address))

    def data_ptr(self) -> int:
        return self.address


ops.cuda_memory = lambda size, device: Ring(size)
ops.cuda_stream = lambda device: stream
make_engine = backend.make_engine
on_device = False


def on(streams: Any, device: torch.device, **options: Any) -> engines.StateEngine:
    assert device.type == "cpu"
    return make_engine(streams, DEVICE if on_device else device, **options)


layout.make_engine = on

CASES: list[tuple[Callable[..., torch.optim.Optimizer], Any, dict[str, Any]]] = [
    (hift_ext.AdamW, torch.optim.AdamW, {"lr": 1e-2}),
    (hift_ext.Adam, torch.optim.Adam, {"lr": 1e-2, "amsgrad": True}),
    (hift_ext.Adagrad, torch.optim.Adagrad, {"lr": 1e-2, "initial_accumulator_value": 0.5}),
    (hift_ext.SGD, torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "nesterov": True}),
]
KEPT: list[dict[str, Any]] = [
    {"state_dtype": "8bit"},
    {"state_dtype": torch.bfloat16, "rounding": "stochastic"},
    {"state_dtype": "8bit", "master": "fp32", "rounding": "stochastic"},
]
"""Ways of keeping a bfloat16 model's numbers; the first has split masters."""

PLACES: list[dict[str, Any]] = [
    {"store": "ram"},
    {"store": "ram", "staging": 0},
    {"store": "ram", "staging": 3 * 4096, "page_bytes": 4096},
    {"store": "disk", "staging": 2 * 8192, "page_bytes": 8192},
    {"store": "disk"},
]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 40), nn.Tanh(), nn.Linear(40, 33), nn.Tanh(), nn.Linear(33, 3)
    )


def train(trained: nn.Module, optimizer: Any, steps: int, scaled: bool) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    dtype = next(trained.parameters()).dtype
    norms: list[torch.Tensor] = []
    for step in range(steps):
        x = torch.randn(8, 16, generator=generator).to(dtype)
        trained(x).square().mean().backward()
        if scaled:
            optimizer.grad_scale = torch.tensor(0.5)
        optimizer.step()
        sim.sim_wait(ctypes.c_void_p(stream))  # torch's next forward is queued behind the step
        norms.append(torch.zeros(()) if not scaled else optimizer.grad_norm.clone())
        optimizer.zero_grad()
        if step == steps // 2 and isinstance(optimizer, hift_ext.HiFTOptimizer):
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    state = [
        value.clone()
        for p in trained.parameters()
        for name, value in sorted(optimizer.state[p].items())
        if name != "step"
    ]
    return [p.detach().clone() for p in trained.parameters()] + state + norms


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def check_page_file(optimizer: hift_ext.HiFTOptimizer) -> int:
    """Whether a page file has what the engine reads; the number of values compared."""
    engine, compared = optimizer.state.engine, 0
    engine.flush()
    for entry in optimizer.state.entries.values():
        begin = 0
        for count, touched, offsets in engine._engine.places(entry.group, entry.item):
            assert touched
            # Opened anew: the engine's own descriptor may be for direct I/O.
            with open(f"/proc/self/fd/{engine._engine.file}", "rb") as file:
                for number, stored in enumerate(engine.stored):
                    value = torch.empty(stored.numel(count), dtype=stored.dtype)
                    engine.read(entry.group, entry.item, number, begin, count, value)
                    there = os.pread(file.fileno(), value.nbytes, offsets[number])
                    assert there == bytes(bytes_of(value))
                    compared += value.numel()
            begin += count
    return compared


def on_cpu(ours: Any, make: Callable[[], nn.Module], options: Any, scaled: bool) -> list[Any]:
    """What a training on the CPU ends with."""
    global on_device
    on_device = False
    cpu = make()
    with ours(cpu, **options) as optimizer:
        return train(cpu, optimizer, 7, scaled)


def on_cuda(
    ours: Any,
    make: Callable[[], nn.Module],
    options: Any,
    scaled: bool,
    expected: list[Any],
    places: Sequence[dict[str, Any]] = PLACES,
) -> int:
    """The same on the device, with state in each of the places; the number of trainings."""
    global on_device
    on_device = True
    for number, place in enumerate(places):
        sim.sim_begin(number + 100 * len(str(options)))
        cuda = make()
        with ours(cuda, **options, **place) as optimizer:
            found = train(cuda, optimizer, 7, scaled)
            stats = optimizer.stats()
            assert (check_page_file(optimizer) > 0) == (place["store"] == "disk"), place
            moves = "device" not in place.values() and place.get("staging") != 0
            assert (stats["bytes_out"] > 0) == moves, (place, stats)
            assert not moves or stats["staging_bytes"] > 0, (place, stats)
        where = f"{ours.__name__}, {options}, {place}, scaled: {scaled}"
        assert equal(found, expected), f"{where}: other bits than on the CPU"
        assert sim.sim_operations() > 0, f"{where}: nothing ran on the device"
        assert sim.sim_pageable_copies() == 0, f"{where}: pageable copies"
        del optimizer, cuda
        gc.collect()
        assert sim.sim_registrations() == 0, f"{where}: registrations left"
        assert not sim.sim_error(), f"{where}: {sim.sim_error().decode()}"
    return len(places)


def main() -> int:
    runs = 0
    for ours, theirs, settings in CASES:
        for m in ("all", 1):
            for scaled in (False, True):
                options: dict[str, Any] = {**settings, "layers_per_group": m}
                if scaled:
                    options["max_grad_norm"] = 0.05
                expected = on_cpu(ours, model, options, scaled)
                if m == "all" and not scaled:
                    plain = model()
                    values = train(plain, theirs(plain.parameters(), **settings), 7, False)
                    for x, y in zip(expected, values, strict=True):
                        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)
                runs += on_cuda(ours, model, options, scaled, expected)
    for ours, _, settings in (CASES[0], CASES[3]):
        for kept in KEPT:
            options = {**settings, **kept, "seed": 5, "max_grad_norm": 0.05}
            expected = on_cpu(ours, lambda: model().bfloat16(), options, True)
            runs += on_cuda(ours, lambda: model().bfloat16(), options, True, expected, PLACES[1:4])
    print(f"{runs} trainings on the simulated device")
    return 0


if __name__ == "__main__":
    sys.exit(main())
