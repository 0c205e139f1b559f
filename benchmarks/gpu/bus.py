# SPDX-License-Identifier: Apache-2.0
# What pages travel over: registered host memory to the device and back, both at once, and read by a
# kernel where it lies. These are the bounds that rings and zero-copy are held against.
"""Section `bus`: host and device, in GB/s each way."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import torch

from gpu.device import Device, interleaved
from gpu.report import Row
from gpu.runner import Budget


def run(device: Device, budget: Budget) -> Iterator[Row]:
    """One row for copies, one for kernels that work on host memory."""
    count = device.size(1 << 26, 1 << 10)
    source, target = torch.ones(count), torch.zeros(count)
    near, far = (torch.zeros(count, device=device.tensors) for _ in range(2))
    with device.registered(source) as mapped_source, device.registered(target) as mapped_target:

        def to_device() -> None:
            near.copy_(source, non_blocking=True)

        def to_host() -> None:
            target.copy_(far, non_blocking=True)

        runs = {
            "to_device": to_device,
            "to_host": to_host,
            "both": lambda: device.beside([to_device, to_host]),
            "kernel_reads": lambda: torch.add(mapped_source, 1, out=far),
            "kernel_reads_and_writes": lambda: torch.add(mapped_source, 2, out=mapped_target),
        }
        samples = interleaved(device, runs, device.size(7, 2), repeats=2)
        # The same once more, one by one, for their values.
        wrong = []
        for name, tensor, value in (
            ("to_device", near, 1),
            ("kernel_reads", far, 2),
            ("to_host", target, 2),
            ("kernel_reads_and_writes", target, 3),
        ):
            runs[name]()
            device.synchronize()
            if not bool((tensor == value).all()):
                wrong.append(name)
    failed = f"wrong values after: {', '.join(wrong)}" if wrong else ""
    rates = {
        f"{name}_gbps": 4 * count / statistics.median(times) / 1e6
        for name, times in samples.items()
    }
    facts = {"bytes_each_way": 4 * count}
    copies = {name: rate for name, rate in rates.items() if "kernel" not in name}
    kernels = {name: rate for name, rate in rates.items() if "kernel" in name}
    yield Row("copies", facts, copies, note="each way", failed=failed)
    yield Row("zero-copy", facts, kernels, note="each way")
