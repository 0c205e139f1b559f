# SPDX-License-Identifier: Apache-2.0
# NVIDIA's own tool watches a small run: accesses beside an allocation, and threads of a block that
# race for shared memory. Where the tool is not installed, that is said.
"""Section `sanitizer`: compute-sanitizer memcheck and racecheck."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from gpu.device import Device
from gpu.report import Row
from gpu.runner import Budget

TOOL = "compute-sanitizer"
KINDS = ("memcheck", "racecheck")


def find_tool(environ: Mapping[str, str]) -> str | None:
    """The tool, on PATH or in a CUDA toolkit."""
    homes = [environ.get("CUDA_HOME"), environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [str(Path(home, *more)) for home in homes if home for more in (("bin",), (TOOL,))]
    return shutil.which(TOOL, path=os.pathsep.join([environ.get("PATH", ""), *folders]))


def absent() -> Iterator[Row]:
    """What is said where there is no tool."""
    for kind in KINDS:
        yield Row(kind, absent=True, note=f"absent: no {TOOL} on PATH or in CUDA_HOME")


def check(device: Device, tool: str, kind: str, seconds: float) -> Row:
    """Runs `small_run` under one of the tool's kinds."""
    command = [*device.sanitizer(tool, kind), sys.executable, "-m", "gpu.small_run"]
    try:
        done = subprocess.run(
            command + ["--dry-run"] * device.dry,
            # Every tensor its own allocation, or an access beside one would hit its neighbour.
            env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=max(seconds, 1.0),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Row(kind, note=f"not finished in {seconds:.0f} s", absent=True)
    said = done.stdout.strip().splitlines() or ["nothing printed"]
    facts = {"run": next((text for text in said if text == "all equal"), said[-1])}
    failed = "" if done.returncode == 0 else f"status {done.returncode}: {' '.join(said[-4:])}"
    return Row(kind, facts, shown=("run",), failed=failed)


def run(device: Device, budget: Budget) -> Iterator[Row]:
    """A row for each kind."""
    tool = find_tool(os.environ)
    if tool is None and not device.dry:
        yield from absent()
        return
    # The first has its share even where the second then has none.
    for kind, share in zip(KINDS, (0.5, 1.0), strict=True):
        yield check(device, tool or TOOL, kind, share * budget.left())
