# SPDX-License-Identifier: Apache-2.0
# The paged engine by its public face: the same gradients to an optimizer on the device and to one
# on the CPU, several passes, a state_dict loaded in the middle; weights and state must be equal.
"""Section `engine`: paged state on the device == on the CPU."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import hift_ext
from gpu.bits import difference
from gpu.device import Device
from gpu.report import Row
from gpu.runner import Budget

PASSES = 3
PAGE = 1 << 16
DRY_PAGE = 1 << 12


@dataclass(frozen=True)
class Training:
    """An optimizer and its settings, on parameters of a type."""

    kind: Any
    settings: dict[str, Any]
    dtype: torch.dtype
    layers_per_group: Any = 1


TRAININGS = [
    Training(hift_ext.AdamW, {"weight_decay": 0.1}, torch.float32),
    Training(hift_ext.AdamW, {"max_grad_norm": 0.5}, torch.bfloat16, "all"),
    Training(hift_ext.Adam, {"amsgrad": True}, torch.float16),
    Training(hift_ext.Adagrad, {"initial_accumulator_value": 0.5}, torch.bfloat16, 2),
    Training(hift_ext.SGD, {"momentum": 0.9, "nesterov": True}, torch.float32, 2),
]


def places(page: int) -> dict[str, dict[str, Any]]:
    """Where state rests and how it travels."""
    pages = {"page_bytes": page}
    return {
        "ram, zero-copy": {"store": "ram", "staging": 0, **pages},
        "ram, ring of two pages": {"store": "ram", "staging": 2 * page, **pages},
        "ram, ring of the whole group": {"store": "ram", **pages},
        "disk, ring of two pages": {"store": "disk", "staging": 2 * page, **pages},
        "disk, ring of the whole group": {"store": "disk", **pages},
        "on the device": {"store": "device"},
    }


def model(device: Device, dtype: torch.dtype) -> nn.Module:
    """Layers whose sizes fit neither pages nor vectors."""
    torch.manual_seed(0)
    width, wider = device.size((509, 700), (33, 40))
    sizes = [width, wider, width, wider]
    layers = [nn.Linear(a, b, dtype=dtype) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*layers)


def train(
    device: Device,
    training: Training,
    where: torch.device,
    place: dict[str, Any],
    skip: int = -1,
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Trains for PASSES passes; gives weights and state, and the last step's statistics.

    Step `skip` passes its turn and changes nothing: on a GPU by a found_inf that the host does not
    look at, elsewhere for want of gradients.
    """
    trained = model(device, training.dtype).to(where)
    arguments = {**training.settings, **place, "layers_per_group": training.layers_per_group}
    draw = torch.Generator().manual_seed(1)
    with training.kind(trained, 1e-2, **arguments) as optimizer:
        steps = PASSES * len(optimizer.groups)
        for step in range(steps):
            for p in optimizer.groups[optimizer.active].params:
                # By hand: forward and backward of two devices do not give the same bits.
                p.grad = torch.randn(p.shape, generator=draw).to(p.dtype).to(where)
                if step == skip and where.type == "cpu":
                    p.grad = None
            if step % 3 == 1:
                optimizer.grad_scale = torch.tensor(4.0, device=where)
                optimizer.found_inf = torch.tensor(0.0, device=where)
            if step == skip and where.type == "cuda":
                optimizer.found_inf = torch.tensor(1.0, device=where)
            optimizer.step()
            device.settle()
            optimizer.grad_scale = optimizer.found_inf = None
            optimizer.zero_grad()
            if step == steps // 2:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        values = {name: p.detach().cpu().clone() for name, p in trained.named_parameters()}
        for name, p in trained.named_parameters():
            state = optimizer.state[p]
            values |= {f"{key} of {name}": value.cpu().clone() for key, value in state.items()}
        return values, optimizer.stats()


def compare(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> str:
    """The first difference; empty if there is none."""
    if a.keys() != b.keys():
        return f"other state: {sorted(a.keys() ^ b.keys())}"
    for name in a:
        found = difference(a[name].flatten(), b[name].flatten())
        if found:
            return f"{name}: {found} (CPU, CUDA)"
    return ""


def skipped(device: Device) -> Row:
    """A step that the device skips, right before a state_dict: visits are counted as if not."""
    training, skip, failures = TRAININGS[0], 4, []
    with warnings.catch_warnings(), device.host():
        warnings.simplefilter("ignore")  # that there is no gradient
        wanted, _ = train(device, training, torch.device("cpu"), {}, skip)
        plain, _ = train(device, training, torch.device("cpu"), {})
    if not compare(wanted, plain):
        failures.append("nothing was skipped")
    for name, place in places(device.size(PAGE, DRY_PAGE)).items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found, _ = train(device, training, device.tensors, place, skip)
        differs = compare(wanted, found)
        failures += [f"{name}: {differs}"] if differs else []
    return Row("a step skipped by found_inf", {"step": skip}, failed="; ".join(failures))


def run(device: Device, budget: Budget) -> Iterator[Row]:
    """A row for each place that state can rest in, and one for a step that is skipped."""
    cpu = torch.device("cpu")
    with device.host():
        expected = [train(device, t, cpu, {})[0] for t in TRAININGS]
    page = device.size(PAGE, DRY_PAGE)
    for name, place in places(page).items():
        failures, out = [], 0.0
        for training, wanted in zip(TRAININGS, expected, strict=True):
            found, stats = train(device, training, device.tensors, place)
            out = max(out, stats["bytes_out"])
            differs = compare(wanted, found)
            if differs:
                failures.append(f"{training.kind.__name__}: {differs}")
        moves = place["store"] != "device" and place.get("staging") != 0
        if moves != (out > 0):
            failures.append(f"the last step wrote {out:.0f} bytes back")
        facts = {"trainings": len(TRAININGS), "passes": PASSES, "page_bytes": page}
        yield Row(name, facts, shown=("trainings", "passes"), failed="; ".join(failures))
    yield skipped(device)
