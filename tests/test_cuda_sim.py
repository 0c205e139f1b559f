# SPDX-License-Identifier: Apache-2.0
# The CUDA path without a GPU: the product's own sources against a runtime that runs on the host.
# What is built here is in tests/cuda_sim; which ordering edge is caught by what, in docs/edges.md.

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SIM = ROOT / "tests" / "cuda_sim"

pytestmark = pytest.mark.needs("cuda_headers")


def run(command: list[str], **environ: str) -> str:
    """What a program prints; fails with its output."""
    done = subprocess.run(
        command,
        env={**os.environ, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stdout[-4000:]}"
    return done.stdout


def test_the_simulated_runtime_sees_misuse(cuda_sim: Path) -> None:
    run([str(cuda_sim / "test_sim")])


def test_the_mover_keeps_its_promises(cuda_sim: Path) -> None:
    run([str(cuda_sim / "test_mover")])


def test_a_thousand_schedules_give_the_bits_of_the_host(cuda_sim: Path) -> None:
    run([str(cuda_sim / "test_schedules"), "1000"])


def test_no_failing_call_loses_a_page(cuda_sim: Path) -> None:
    printed = run([str(cuda_sim / "test_faults"), "11"])
    failed = [int(n) for n in re.findall(r"(\d+) calls failed", printed)]
    assert len(failed) == 14
    assert sum(failed) > 1000


def test_the_optimizer_end_to_end(cuda_sim: Path) -> None:
    path = f"{cuda_sim}{os.pathsep}{ROOT}"
    printed = run([sys.executable, str(SIM / "optimizer.py")], PYTHONPATH=path)
    assert re.search(r"^\d+ trainings on the simulated device$", printed, re.M)
