# SPDX-License-Identifier: Apache-2.0
# How much optimizer state this machine's memory can hold: what is registered with CUDA is
# committed, and cannot be swapped.
"""Host memory."""

from __future__ import annotations

import re
from pathlib import Path

RESERVE = 2 << 30
"""Bytes that are left to others."""


def available_bytes() -> int:
    """Bytes of host memory that can be had."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    available = 0 if found is None else 1024 * int(found[1])
    group = Path("/sys/fs/cgroup")  # a container may be allowed less
    limit, used = (group / f"memory.{name}" for name in ("max", "current"))
    if limit.is_file() and used.is_file() and limit.read_text().strip() != "max":
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return available - RESERVE
