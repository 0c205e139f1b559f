# SPDX-License-Identifier: Apache-2.0
# A few kernels and a few steps of the paged engine, for a tool that slows them down a hundredfold.
"""`python -m gpu.small_run [--dry-run]`: prints one line, exits with 1 if a result is wrong."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from gpu import bits, engine
from gpu.device import Device, open_device


def kernels(device: Device) -> list[str]:
    """Every rule in fp32 and bf16 over spans of few elements; gives what went wrong."""
    failures = []
    for rule in bits.CASES:
        for pair in (bits.PAIRS[0], bits.PAIRS[2]):
            before, places = bits.few(device, rule, pair)
            found = bits.compare(device, before, places, {"clip": 0.3, "found_inf": 0.0})
            failures += [f"{rule}: {found}"] if found else []
    return failures


def steps(device: Device) -> list[str]:
    """AdamW in every place that state can rest in."""
    training, cpu = engine.TRAININGS[0], torch.device("cpu")
    with device.host():
        expected, _ = engine.train(device, training, cpu, {})
    failures = []
    for name, place in engine.places(engine.PAGE).items():
        found, _ = engine.train(device, training, device.tensors, place)
        differs = engine.compare(expected, found)
        failures += [f"{name}: {differs}"] if differs else []
    return failures


def main(arguments: Sequence[str]) -> int:
    """Runs both."""
    device = open_device("--dry-run" in arguments)
    failures = kernels(device) + steps(device)
    device.check()
    print("; ".join(failures) or "all equal")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
