# SPDX-License-Identifier: Apache-2.0
# What was built, for which cards, and whether this card's driver can run it. The build itself is
# module.py's: it comes before all sections.
"""Section `build`: the module, the driver and the card."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator

import torch

from gpu.device import Device
from gpu.report import Row
from gpu.runner import Budget
from hift_ext import ops


def version(number: int) -> str:
    """CUDA's integer as it is written: 13000 is 13.0."""
    return f"{number // 1000}.{number % 1000 // 10}"


def run(device: Device, budget: Budget) -> Iterator[Row]:
    """One row for the module, one for the machine."""
    built, seen = ops.build_info(), ops.cuda_info()
    driver, runtime = seen["driver"], seen["runtime"]
    failed = seen["error"]
    if not failed and driver // 1000 < runtime // 1000:
        failed = (
            f"the module's runtime is CUDA {version(runtime)} and the driver is of CUDA "
            f"{version(driver)}: update the driver, or build with an older CUDA toolkit"
        )
    module = {
        "archs": built["cuda_archs"] or "none",
        "nvcc": built["nvcc_version"] or "none",
        "runtime": version(runtime),
        "driver": version(driver),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda or "none",
    }
    yield Row("module", module, shown=tuple(module), failed=failed)
    card = device.info()
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    facts = {**card, "host": platform.machine(), "host_memory_bytes": pages * page}
    yield Row("card", facts, shown=tuple(facts))
